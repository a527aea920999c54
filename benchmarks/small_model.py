# SPDX-License-Identifier: Apache-2.0
"""Make the small checkpoint that MMSER ships, and judge it on voices, corpora and languages that it has never heard.

    python benchmarks/small_model.py --wide_dir ser4wide --text_dir xed4 --data_dir ser4 \\
        --audio_encoder openai/whisper-base --text_encoder intfloat/multilingual-e5-small

It learns emotions from CREMA-D (speech) and XED (text) alone, whose licences allow that. The last tenth of the
speakers of `--wide_dir`, its validation split, is the test on CREMA-D; every tenth of the others calibrates. A step
whose folder is in `--work_dir` is not repeated.
"""

import argparse
import copy
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import pipeline

sys.path.insert(0, str(Path(__file__).parent.parent))
import export_hf
import train_hf
from benchmarks.real_speech import read_splits, write_listing
from benchmarks.tables import ROOT, parse_arguments, publish, read_results, table
from mmser.calibration import expected_calibration_error
from mmser.loading import load_emotion_dataset, load_emotion_split
from mmser.metrics import compute_classification_metrics, rank_auroc
from mmser.model_loading import load_label_names
from mmser.publishing import without_local_paths
from mmser.results import environment
from mmser.sources import DataColumns

Tree = dict[str, Any]

SPEECH = "CREMA-D"
NEW_SPEAKERS, WORDS = "CREMA-D, new speakers", "XED, text alone"
BOTH = "CREMA-D, new speakers, with their words"
NOT_CORPORA = (NEW_SPEAKERS, BOTH, WORDS)
RECIPES = FIRST, SECOND = "small_first.json", "small_second.json"
CHECKPOINT = ROOT / "checkpoints" / "mmser-small"
VOCABULARY_SIZE = 6000
PRUNED = 0.15  # of the heads and feed-forward columns of each layer
ONE_IN = 10  # speakers of the training that calibrate


def write_speech(wide_dir: str, folder: Path) -> str:
    """The clips of CREMA-D as a `--data_dir`: who trains, who calibrates (validation) and who is the test."""
    splits, label_names = read_splits(wide_dir)
    clips = {name: [clip for clip in own if clip["corpus"] == SPEECH] for name, own in splits.items()}
    held_out = set(sorted({clip["speaker"] for clip in clips["train"]})[::ONE_IN])
    divided = {
        "train": [clip for clip in clips["train"] if clip["speaker"] not in held_out],
        "validation": [clip for clip in clips["train"] if clip["speaker"] in held_out],
        "test": clips["validation"],
    }
    return write_listing(folder, divided, label_names)


def make(options: argparse.Namespace) -> Path:
    """Train, trim the vocabulary, train on with the smaller one, and store it in int8; returns the checkpoint."""
    work = options.work_dir
    sources = [write_speech(options.wide_dir, work / "speech"), str(options.text_dir)]
    texts = str(Path(options.text_dir) / "train.csv")
    common = ["--data_dir", *sources, "--audio_column", "file_name", "none", "--seed", str(options.seed)]
    common += ["--cache_encoder_states", str(work / "states"), "--overwrite_output_dir", "--disable_tqdm", "true"]
    first, trimmed, second = work / "first", work / "trimmed", work / "second"
    if not (first / "config.json").is_file():
        encoders = ["--audio_model_name_or_path", options.audio_encoder]
        encoders += ["--text_model_name_or_path", options.text_encoder]
        train_hf.main([str(options.recipes / FIRST), *common, *encoders, "--output_dir", str(first)])
    if not (trimmed / "config.json").is_file():
        smaller = ["--vocabulary_text", texts, "--vocabulary_size", str(VOCABULARY_SIZE), "--prune", str(PRUNED)]
        speech = ["--data_dir", sources[0], "--overwrite_output_dir"]
        export_hf.main([*_from_to(first, trimmed), "--format", "safetensors", *smaller, *speech])
    if not (second / "config.json").is_file():
        start = ["--model_name_or_path", str(trimmed), "--output_dir", str(second)]
        train_hf.main([str(options.recipes / SECOND), *common, *start])
    small = work / "int8"
    as_int8 = ["--format", "safetensors", "--dtype", "int8", "--overwrite_output_dir"]
    export_hf.main([*_from_to(second, small), *as_int8])
    options.checkpoint.mkdir(parents=True, exist_ok=True)
    for path in small.iterdir():  # the card and the notices, which lie there, stay
        shutil.copy(path, options.checkpoint / path.name)
    config = options.checkpoint / "config.json"  # without the folders of the encoders
    clean = without_local_paths(json.loads(config.read_text(encoding="utf-8")))
    config.write_text(json.dumps(clean, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return options.checkpoint


def copy_code(checkpoint: Path) -> None:
    """The code in a checkpoint is a copy of ours; this brings it up to date, as saving it again would."""
    for path in checkpoint.glob("*.py"):
        shutil.copy(ROOT / path.name, path)


def _from_to(checkpoint: Path, folder: Path) -> list[str]:
    return ["--checkpoint", str(checkpoint), "--output_dir", str(folder)]


def test_sets(options: argparse.Namespace) -> dict[str, list[Tree]]:
    """Clips by the name of their row: speakers, corpora and texts that the model has not seen."""
    speech = load_emotion_dataset(options.work_dir / "speech" / "metadata.csv")[0]["test"]
    sets = {NEW_SPEAKERS: [{"path": clip["audio"], "labels": clip["labels"]} for clip in speech]}
    sets[BOTH] = [{"path": clip["audio"], "text": clip["text"], "labels": clip["labels"]} for clip in speech]
    wide = load_emotion_dataset(options.data_dir)[0]
    clips = [clip for split in options.splits for clip in wide[split]]
    for corpus in sorted({clip["corpus"] for clip in clips}):
        own = [clip for clip in clips if clip["corpus"] == corpus]
        sets[corpus] = [{"path": clip["audio"], "labels": clip["labels"]} for clip in own]
    text = load_emotion_split(Path(options.text_dir) / f"{options.splits[-1]}.csv", columns=DataColumns(audio=None))
    sets[WORDS] = [{"text": clip["text"], "labels": clip["labels"]} for clip in text]
    return sets


def answer(classify: Any, clips: Sequence[Mapping[str, Any]], label_names: Sequence[str]) -> dict[str, np.ndarray]:
    """`probabilities` [N, C] and `uncertainty` [N], as a user of the pipeline gets them."""
    inputs = [{name: clip[name] for name in clip if name != "labels"} for clip in clips]
    found: dict[str, list[Any]] = {"probabilities": [], "uncertainty": []}
    for entries in classify(inputs, batch_size=16, top_k=None, return_uncertainty=True):
        scores = {entry["label"]: entry["score"] for entry in entries}
        found["probabilities"].append([scores[name] for name in label_names])
        found["uncertainty"].append(entries[0]["uncertainty"])
    return {name: np.array(values) for name, values in found.items()}


def clips_of_a_place(data_dir: str) -> dict[str, list[str]]:
    """The training clips of each corpus, in an order by chance: what a model may hear there, without labels."""
    train = load_emotion_dataset(data_dir)[0]["train"]
    paths: dict[str, list[str]] = {}
    for row in np.random.default_rng(0).permutation(len(train)).tolist():
        paths.setdefault(train["corpus"][row], []).append(train["audio"][row])
    return paths


def judge(
    checkpoint: Path, sets: Mapping[str, Sequence[Mapping[str, Any]]], places: Mapping[str, Sequence[str]]
) -> list[Tree]:
    """
    A row for each set; the uncertainty on unheard corpora is compared with that on new speakers of CREMA-D. Where
    there are clips of the place, also the scores of the model that heard these, without labels.
    """
    classify: Any = pipeline("audio-classification", model=str(checkpoint), trust_remote_code=True, device="cpu")
    names = list(load_label_names(str(checkpoint)))
    rows, known = [], np.array([])
    for name, clips in sets.items():
        answers = answer(classify, clips, names)
        labels = np.array([clip["labels"] for clip in clips])
        metrics = compute_classification_metrics(answers["probabilities"].argmax(axis=1), labels, names)
        row: Tree = {"tested on": name, "clips": len(clips), "weighted F1": metrics["weighted_f1"]}
        row["unweighted recall"] = metrics["unweighted_average_recall"]
        row["ECE"] = expected_calibration_error(answers["probabilities"], labels)
        row["uncertainty"] = float(answers["uncertainty"].mean())
        known = answers["uncertainty"] if name == NEW_SPEAKERS else known
        if name not in NOT_CORPORA:
            is_new = np.arange(len(known) + len(clips)) >= len(known)
            row["more uncertain (AUROC)"] = rank_auroc(np.concatenate([known, answers["uncertainty"]]), is_new)
        if name in places:
            adapted = copy.deepcopy(classify)
            adapted.adapt_to(places[name])
            probabilities = answer(adapted, clips, names)["probabilities"]
            metrics = compute_classification_metrics(probabilities.argmax(axis=1), labels, names)
            row["adapted: weighted F1"] = metrics["weighted_f1"]
            row["adapted: ECE"] = expected_calibration_error(probabilities, labels)
        rows.append(row)
        print(row, flush=True)
    corpora = [row for row in rows if row["tested on"] not in NOT_CORPORA]
    columns = [name for name in corpora[-1] if name not in ("tested on", "clips")]
    mean = {name: float(np.mean([row[name] for row in corpora if name in row])) for name in columns}
    rows.insert(len(corpora) + 2, {"tested on": f"mean of {len(corpora)} corpora never heard", **mean})
    return rows


def make_tables(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {"small_model": table([{key: value for key, value in line.items() if value is not None} for line in lines])}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wide_dir", help="has CREMA-D: train and validation, with a column `corpus`")
    parser.add_argument("--text_dir", help="XED: train.csv, validation.csv and test.csv")
    parser.add_argument("--data_dir", help="corpora that are never heard")
    parser.add_argument("--audio_encoder", default="openai/whisper-base")
    parser.add_argument("--text_encoder", default="intfloat/multilingual-e5-small")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/small_model"))
    parser.add_argument("--recipes", type=Path, default=ROOT / "recipes", help=f"has {' and '.join(RECIPES)}")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="where the result goes")
    parser.add_argument("--splits", nargs="+", default=["test"], help="to judge by; train validation while you choose")
    parser.add_argument("--code_only", action="store_true", help="give the checkpoint today's code, and stop")
    parser.add_argument("--judge_only", action="store_true", help="of the checkpoint that is there")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    required = ("wide_dir", "text_dir", "data_dir")
    options = parse_arguments(parser, "small_model", arguments, () if "--code_only" in sys.argv else required)
    if options.code_only:
        copy_code(options.checkpoint)
        return
    if options.from_results:
        report, lines = read_results(options.output)
    else:
        torch.set_num_threads(options.threads)
        if options.judge_only:
            write_speech(options.wide_dir, options.work_dir / "speech")
        checkpoint = options.checkpoint if options.judge_only else make(options)
        lines = judge(checkpoint, test_sets(options), clips_of_a_place(options.data_dir))
        size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) / 1e6
        settings = {name: getattr(options, name) for name in ("splits", "seed", "threads")}
        report = {"environment": {**environment(), "dtype": "int8"}, "settings": settings, "megabytes": size}
    publish(make_tables(lines), report, lines, options)


if __name__ == "__main__":
    main()
