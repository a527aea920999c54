# SPDX-License-Identifier: Apache-2.0
"""Does a deep classifier train behind encoders that start at random? Ours against variants, on the demo's text.

    python benchmarks/head_depth.py --corpus demo_output/corpus --tokenizer demo_output/tokenizer --seeds 5

Text alone is enough to separate the four classes of that corpus, and small enough for many runs on a CPU. Every run
is the demo's model and optimiser; only the residual blocks differ. Writes `benchmarks/results/head_depth.json`.
"""

import argparse
import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, Wav2Vec2FeatureExtractor, get_cosine_schedule_with_warmup
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from configuration_mmser import DEFAULT_LABELS, MMSERConfig
from mmser.metrics import compute_classification_metrics
from mmser.optimizer import parameter_groups
from mmser.results import environment
from mmser.tables import format_table
from modeling_mmser import MMSERForAudioClassification, ResidualBlock
from processing_mmser import MMSERProcessor

RECIPE = Path(__file__).parent.parent / "recipes" / "demo.json"


def plain_post_norm(block: ResidualBlock, hidden_states: Tensor) -> Tensor:
    """The block without the scaling by depth."""
    return block.layer_norm(hidden_states + block.dropout(block.up(F.relu(block.down(hidden_states)))))


def pre_norm(block: ResidualBlock, hidden_states: Tensor) -> Tensor:
    """LayerNorm inside the branch, as GPT-2 has it."""
    return hidden_states + block.dropout(block.up(F.relu(block.down(block.layer_norm(hidden_states)))))


# name: (number of blocks, forward of a block or None for ours, whether the last Linear of a block starts at zero)
VARIANTS: dict[str, tuple[int, Callable | None, bool]] = {
    "ours: zero start, scaled by depth": (35, None, True),
    "zero start only": (35, plain_post_norm, True),
    "scaled by depth only": (35, None, False),
    "neither (as published)": (35, plain_post_norm, False),
    "zero start, pre-norm": (35, pre_norm, True),
    "no blocks": (0, None, True),
}


@contextlib.contextmanager
def block_forward(forward: Callable | None) -> Iterator[None]:
    with mock.patch.object(ResidualBlock, "forward", forward) if forward else contextlib.nullcontext():
        yield


def read_split(corpus: Path, split: str) -> tuple[list[str], Tensor]:
    with open(corpus / split / "metadata.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["transcription"] for row in rows], torch.tensor([DEFAULT_LABELS.index(row["label"]) for row in rows])


def build(recipe: dict, vocab_size: int, num_layers: int, zero_start: bool) -> MMSERForAudioClassification:
    config = MMSERConfig(
        audio_config={"model_type": "wav2vec2", **recipe["audio_config_overrides"]},
        text_config={"model_type": "bert", "vocab_size": vocab_size, **recipe["text_config_overrides"]},
        **{**recipe["config_overrides"], "classifier_num_layers": num_layers},
    )
    model = MMSERForAudioClassification(config)
    if not zero_start:
        for block in model.classifier.blocks:
            torch.nn.init.xavier_uniform_(block.up.weight)
    return model


def train(variant: str, seed: int, arguments: argparse.Namespace) -> dict:
    """One run; returns the accuracy after each epoch and the metrics after the last on the test split."""
    num_layers, forward, zero_start = VARIANTS[variant]
    recipe = json.loads(RECIPE.read_text(encoding="utf-8"))
    processor = MMSERProcessor(Wav2Vec2FeatureExtractor(), AutoTokenizer.from_pretrained(arguments.tokenizer))
    texts, labels = read_split(arguments.corpus, "train")
    test_texts, test_labels = read_split(arguments.corpus, "test")
    torch.manual_seed(seed)
    model = build(recipe, len(processor.tokenizer), num_layers, zero_start)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe["learning_rate"], recipe["lr_multipliers"]))
    steps = len(texts) // arguments.batch_size * arguments.epochs
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    accuracies = []
    with block_forward(forward):
        for _ in range(arguments.epochs):
            model.train()
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
            accuracies.append((predictions == test_labels).float().mean().item())
    metrics = compute_classification_metrics(predictions, test_labels, DEFAULT_LABELS)
    return {"variant": variant, "seed": seed, "accuracy_by_epoch": accuracies, **metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("demo_output/corpus"))
    parser.add_argument("--tokenizer", type=Path, default=Path("demo_output/tokenizer"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "head_depth.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other

    jobs = [(variant, seed) for seed in range(arguments.seeds) for variant in VARIANTS]
    runs = [train(*job, arguments) for job in logging.tqdm(jobs, desc="runs")]
    rows = []
    for variant in VARIANTS:
        scores = np.array([run["weighted_f1"] for run in runs if run["variant"] == variant])
        lost = sum(any(run[f"f1_{name}"] == 0 for name in DEFAULT_LABELS) for run in runs if run["variant"] == variant)
        rows.append(
            {
                "blocks": variant,
                "weighted F1, mean": scores.mean(),
                "lowest": scores.min(),
                "runs that lose a class": f"{lost} of {len(scores)}",
            }
        )
    table = format_table(rows, list(rows[0]))
    print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        name: str(value) for name, value in vars(arguments).items() if name in ("seeds", "epochs", "batch_size")
    }
    report = {"environment": environment(), "settings": settings, "summary": rows, "runs": runs}
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
