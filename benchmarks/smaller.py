# SPDX-License-Identifier: Apache-2.0
"""What int8 in PyTorch and pruned encoders cost and gain: size, speed and weighted F1 of one checkpoint.

    python benchmarks/smaller.py --checkpoint runs/mine --data_dir my_data --test_clips 200
    python benchmarks/smaller.py --checkpoint runs/mine --data_dir my_data --onnx runs/onnx_int8 --also runs/pruned_40

`--also` names checkpoints that `export_hf.py --prune 0.4 --recovery_epochs 1` made of the same one. Nothing else is
trained and nothing chosen by scores: training clips decide what is pruned. Every test clip, drawn at
random, goes through all variants in turn, alone; speed is the processor time of the main thread, and ratios are
medians of the ratios of each clip. Writes `benchmarks/results/smaller.json`.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.tables import Row, parse_arguments, publish, read_results, table
from mmser.batches import MMSERDataCollator
from mmser.examples import EmotionDataset, reading_options
from mmser.loading import draw_clips, load_emotion_dataset
from mmser.metrics import compute_classification_metrics
from mmser.pruning import prune
from mmser.results import environment
from mmser.training_run import some_clips
from modeling_mmser import MMSERForAudioClassification
from processing_mmser import MMSEROnnxForAudioClassification, MMSERProcessor
from quantization_mmser import quantize_dynamic

FLOAT32, INT8, ONNX = "float32", "int8 in PyTorch", "int8 in ONNX"


def read_clips(split, processor: MMSERProcessor) -> list[dict[str, Any]]:
    """Inputs and label of each clip, alone."""
    dataset = EmotionDataset(split, **reading_options(processor.modalities, processor.sampling_rate))
    collate = MMSERDataCollator(processor)
    return [dict(collate([dataset[index]])) for index in range(len(dataset))]


@torch.no_grad()
def run(model: Any, clip: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Probabilities [classes] of a clip, and the seconds that they took."""
    start = time.thread_time()
    logits = model(**{key: clip[key] for key in clip if key != "labels"}).logits
    return logits.softmax(-1)[0].numpy(), time.thread_time() - start


def build_variants(arguments: argparse.Namespace, calibration: list[dict[str, Any]]) -> dict[tuple[str, str], Any]:
    """Models by (pruned share, weights)."""
    whole = MMSERForAudioClassification.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    variants: dict[tuple[str, str], Any] = {}
    for share in arguments.shares:
        model = copy.deepcopy(whole)
        if share:
            print(prune(model, calibration, share), flush=True)
        variants[f"{share:.0%}", FLOAT32] = model.eval()
        variants[f"{share:.0%}", INT8] = quantize_dynamic(copy.deepcopy(model))
    for folder in arguments.also:
        model = MMSERForAudioClassification.from_pretrained(folder, dtype=torch.float32).eval()
        variants[folder.name, FLOAT32] = model
        variants[folder.name, INT8] = quantize_dynamic(copy.deepcopy(model))
    if arguments.onnx:
        session = MMSEROnnxForAudioClassification.from_pretrained(arguments.onnx, providers=["CPUExecutionProvider"])
        variants["0%", ONNX] = session
    return variants


def megabytes(model: Any, arguments: argparse.Namespace) -> float:
    """Of the weights."""
    if isinstance(model, torch.nn.Module):
        return sum(value.nbytes for value in model.state_dict().values()) / 1e6
    return sum(path.stat().st_size for path in Path(arguments.onnx).glob("model.onnx*")) / 1e6


def measure(arguments: argparse.Namespace) -> tuple[list[Row], int]:
    """A row for each variant, and the number of test clips."""
    torch.set_num_threads(1)
    processor = MMSERProcessor.from_pretrained(arguments.checkpoint)
    splits, label_names = load_emotion_dataset(data_dir=arguments.data_dir)
    calibration = read_clips(some_clips(splits["train"], arguments.calibration_clips), processor)
    clips = read_clips(draw_clips(splits["test"], arguments.test_clips, seed=0), processor)
    variants = build_variants(arguments, calibration)
    for model in variants.values():
        run(model, clips[0])  # to warm up
    found: dict = {name: [] for name in variants}
    start = time.monotonic()
    while len(found[next(iter(found))]) < len(clips) and time.monotonic() - start < 60 * arguments.max_minutes:
        clip = clips[len(found[next(iter(found))])]
        for name, model in variants.items():
            found[name].append(run(model, clip))
    reference, *_ = found.values()
    labels = np.concatenate([clip["labels"].numpy() for clip in clips[: len(reference)]])
    rows: list[Row] = []
    for (share, weights), results in found.items():
        answers = np.array([probabilities.argmax() for probabilities, _ in results])
        same = np.mean([a == b.argmax() for a, (b, _) in zip(answers, reference, strict=True)])
        ratios = [a / b for (_, a), (_, b) in zip(reference, results, strict=True)]
        scores = compute_classification_metrics(answers, labels, label_names)
        rows.append(
            {
                "pruned": share,
                "weights": weights,
                "MB": f"{megabytes(variants[share, weights], arguments):.0f}",
                "times as fast": round(statistics.median(ratios), 2),
                "weighted F1": round(float(scores["weighted_f1"]), 3),
                "same answer": f"{same:.0%}",
            }
        )
    return rows, len(reference)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="an MMSER checkpoint in float32")
    parser.add_argument("--data_dir", help="with train/ and test/")
    parser.add_argument("--onnx", help="the same checkpoint, exported by `--dtype int8`")
    parser.add_argument("--also", type=Path, nargs="+", default=[], help="checkpoints that were made of it")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.2, 0.4])
    parser.add_argument("--calibration_clips", type=int, default=200)
    parser.add_argument("--test_clips", type=int, help="drawn at random; default: all")
    parser.add_argument("--max_minutes", type=float, default=60.0, help="no further test clip after that")
    options = parse_arguments(parser, "smaller", arguments, required=("checkpoint", "data_dir"))
    if options.from_results:
        report, _ = read_results(options.output)
    else:
        rows, number = measure(options)
        settings = {"calibration_clips": options.calibration_clips, "test_clips": number, "threads": 1, "seed": 0}
        report = {"settings": settings, "environment": environment(torch.device("cpu")), "rows": rows}
    publish({"smaller": table(report["rows"], str)}, report, [], options)
    return report


if __name__ == "__main__":
    main()
