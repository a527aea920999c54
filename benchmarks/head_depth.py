# SPDX-License-Identifier: Apache-2.0
"""Does a deep classifier train behind encoders that start at random? Ours against variants, on the demo's text.

    python benchmarks/head_depth.py --corpus demo_output/corpus --tokenizer demo_output/tokenizer

Text alone is enough to separate the four classes of that corpus, and small enough for many runs on a CPU. Every run
is the demo's model and optimiser; only the fields of `VARIANTS` differ.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Wav2Vec2FeatureExtractor, get_cosine_schedule_with_warmup
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.tables import ROOT, Row, parse_arguments, publish, read_results, table
from configuration_mmser import DEFAULT_LABELS, MMSERConfig
from mmser.metrics import compute_classification_metrics
from mmser.optimizer import parameter_groups
from mmser.results import environment
from modeling_mmser import MMSERForAudioClassification
from processing_mmser import MMSERProcessor

VARIANTS: dict[str, dict[str, Any]] = {
    "ours: zero start, scaled by depth": {},
    "zero start only": {"scale_branches_by_depth": False},
    "scaled by depth only": {"zero_init_branches": False},
    "neither (as published)": {"zero_init_branches": False, "scale_branches_by_depth": False},
    "no blocks": {"classifier_num_layers": 0},
}


def read_split(corpus: Path, split: str) -> tuple[list[str], torch.Tensor]:
    with open(corpus / split / "metadata.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["transcription"] for row in rows], torch.tensor([DEFAULT_LABELS.index(row["label"]) for row in rows])


def train(variant: str, seed: int, arguments: argparse.Namespace) -> Row:
    """One run; returns the metrics on the test split after the last epoch."""
    recipe = json.loads((ROOT / "recipes" / "demo_wav2vec2.json").read_text(encoding="utf-8"))
    processor = MMSERProcessor(Wav2Vec2FeatureExtractor(), AutoTokenizer.from_pretrained(arguments.tokenizer))
    texts, labels = read_split(arguments.corpus, "train")
    test_texts, test_labels = read_split(arguments.corpus, "test")
    vocabulary = {"vocab_size": len(processor.tokenizer)}
    torch.manual_seed(seed)
    model = MMSERForAudioClassification(
        MMSERConfig(
            audio_config={"model_type": "wav2vec2", **recipe["audio_config_overrides"]},
            text_config={"model_type": "bert", **vocabulary, **recipe["text_config_overrides"]},
            **{**recipe["config_overrides"], "classifier_num_layers": 35, **VARIANTS[variant]},
        )
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe["learning_rate"], recipe["lr_multipliers"]))
    steps = len(texts) // arguments.batch_size * arguments.epochs
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    for _ in range(arguments.epochs):
        for rows in torch.randperm(len(texts)).split(arguments.batch_size):
            if len(rows) < arguments.batch_size:
                continue
            model(**processor(text=[texts[i] for i in rows]), labels=labels[rows]).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        predictions = model(**processor(text=test_texts)).logits.argmax(dim=-1)
    metrics = compute_classification_metrics(predictions, test_labels, DEFAULT_LABELS)
    return {"variant": variant, "seed": seed, **metrics}


def summarise(lines: Sequence[Row]) -> list[Row]:
    """A row for each variant, over its seeds."""
    rows = []
    for variant in dict.fromkeys(line["variant"] for line in lines):
        own = [line for line in lines if line["variant"] == variant]
        scores = [line["weighted_f1"] for line in own]
        lost = sum(any(line[f"f1_{name}"] == 0 for name in DEFAULT_LABELS) for line in own)
        row = {"35 blocks unless said otherwise": variant, "weighted F1, mean": sum(scores) / len(scores)}
        rows.append(row | {"lowest": min(scores), "runs that lose a class": f"{lost} of {len(own)}"})
    return rows


def make_tables(lines: Sequence[Row]) -> dict[str, str]:
    return {"head_depth": table(summarise(lines))}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("demo_output/corpus"))
    parser.add_argument("--tokenizer", type=Path, default=Path("demo_output/tokenizer"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=16)
    options = parse_arguments(parser, "head_depth", arguments)
    if options.from_results:
        report, lines = read_results(options.output)
    else:
        torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
        jobs = [(variant, seed) for seed in range(options.seeds) for variant in VARIANTS]
        lines = [train(variant, seed, options) for variant, seed in logging.tqdm(jobs, desc="runs")]
        settings = {name: getattr(options, name) for name in ("seeds", "epochs", "batch_size")}
        report = {"environment": environment(), "settings": settings, "summary": summarise(lines)}
    publish(make_tables(lines), report, lines, options)


if __name__ == "__main__":
    main()
