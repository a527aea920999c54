# SPDX-License-Identifier: Apache-2.0
"""What adapters in the audio encoder gain and cost, against leaving it frozen and training all of it.

    python benchmarks/adapters.py --data_dir ser4 --checkpoint runs/real_speech

All start from one checkpoint whose encoders were frozen, and go on for a few steps with the encoders run live: the
text encoder stays frozen. Each run is a process of its own, for its memory. F1 is that of the validation clips.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import set_seed
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.tables import BySeed, Row, cell, parse_arguments, publish, read_results, table
from mmser.arguments import TRAINING_ARGUMENTS
from mmser.arguments import parse_arguments as parse_flags
from mmser.batches import MMSERDataCollator
from mmser.examples import EmotionDataset
from mmser.loading import load_emotion_dataset
from mmser.metrics import compute_classification_metrics
from mmser.model_loading import load_model, load_processor
from mmser.results import environment
from mmser.trainer import MMSERTrainer
from mmser.training_run import some_clips

VARIANTS = {
    "as it was": ["--freeze_audio", "--max_steps", "0"],
    "frozen": ["--freeze_audio"],
    "LoRA, rank 16": ["--lora_rank", "16", "--lora_save", "adapter"],
    "LoRA, rank 4": ["--lora_rank", "4", "--lora_save", "adapter"],
    "all weights": [],
}
COSTS = ("encoder_parameters", "seconds", "peak_gb", "checkpoint_mb")


def measure(variant: str, seed: int, options: argparse.Namespace) -> Row:
    """One run, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--model_name_or_path", str(options.checkpoint), "--output_dir", folder, "--freeze_text"]
        fixed += ["--attn_implementation", "eager", "--learning_rate", str(options.learning_rate), "--use_cpu"]
        fixed += ["--num_train_epochs", str(options.epochs), "--save_strategy", "no", "--eval_strategy", "no"]
        fixed += ["--disable_tqdm", "True", "--dataloader_num_workers", "0", "--seed", str(seed)]
        model_arguments, _, training_arguments = parse_flags(TRAINING_ARGUMENTS, [*fixed, *VARIANTS[variant]])
        set_seed(seed)
        splits, names = load_emotion_dataset(options.data_dir)
        processor = load_processor(model_arguments)
        model = load_model(model_arguments, names, processor)
        clips = some_clips(splits["train"], options.clips)
        trainer = MMSERTrainer(
            model,
            training_arguments,
            train_dataset=EmotionDataset(clips, training=True, text_dropout=0.5, seed=seed),
            data_collator=MMSERDataCollator(processor),
        )
        seconds = 0.0
        if "--max_steps" not in VARIANTS[variant]:
            start = time.process_time()
            trainer.train()
            seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        scores = {}
        if not options.costs_only:
            outputs = trainer.predict_outputs(EmotionDataset(splits["validation"]))
            metrics = compute_classification_metrics(np.argmax(outputs["logits"], axis=1), outputs["labels"], names)
            scores["weighted_f1"] = metrics["weighted_f1"]
        trainer.save_model(folder)
        size = (Path(folder) / "model.safetensors").stat().st_size / 1e6
    trained = sum(
        each.numel() for each in cast(Any, model.base_model).audio_encoder.parameters() if each.requires_grad
    )
    costs = dict(zip(COSTS, (trained, round(seconds, 1), round(peak, 3), round(size, 1)), strict=True))
    return {"variant": variant, "seed": seed, **scores, **costs}


def summarise(lines: Sequence[Row]) -> list[Row]:
    """A row for each variant, over its seeds."""
    rows = []
    for variant in dict.fromkeys(line["variant"] for line in lines):
        own = [line for line in lines if line["variant"] == variant]
        scores: BySeed = {line["seed"]: line["weighted_f1"] for line in own if "weighted_f1" in line}
        costs = {name: float(np.mean([line[name] for line in own])) for name in COSTS}
        rows.append(
            {
                "audio encoder": variant,
                "weighted F1, validation": cell(scores),
                "parameters trained in it": f"{costs['encoder_parameters']:,.0f}",
                "processor time, s": f"{costs['seconds']:.0f}",
                "peak memory, GB": f"{costs['peak_gb']:.2f}",
                "checkpoint, MB": f"{costs['checkpoint_mb']:.0f}",
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="of recipes/real_speech.json")
    parser.add_argument("--clips", type=int, default=600, help="training clips, from all over the split")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--costs_only", action="store_true", help="time and memory of a few steps, without scores")
    options = parse_arguments(parser, "adapters", arguments, required=("data_dir", "checkpoint"))
    report: dict[str, Any]
    if options.from_results:
        report, lines = read_results(options.output)
    else:
        jobs = [(variant, seed, options) for seed in range(options.seeds) for variant in options.variants]
        lines = []
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for job in logging.tqdm(jobs, desc="runs"):
                lines.append(pool.apply(measure, job))
                print(lines[-1], flush=True)
        names = ("clips", "epochs", "learning_rate", "seeds", "costs_only")
        settings = {name: getattr(options, name) for name in names}
        report = {"environment": environment(), "settings": settings, "summary": summarise(lines)}
    publish({"adapters": table(summarise(lines))}, report, lines, options)


if __name__ == "__main__":
    main()
