# SPDX-License-Identifier: Apache-2.0
"""What the shares of several raters teach more than their majority (`--label_distribution_columns`), on real speech.

    python benchmarks/soft_targets.py --data_dir ser4 --audio_encoder openai/whisper-base

The data have one label a clip and no votes, so raters are simulated: each of five is wrong with a stated probability,
and then says what a log-mel probe says wrongly of validation clips of that class. Models learn from the majority or
from the shares, and are judged by the true labels. As in `parts.py` the encoder is frozen and hears audio alone.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.nn import functional as F
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.pooled_states import BATCH_SIZE, EPOCHS, Clips, add_flags, encode_as_two_frames, predict, train
from benchmarks.tables import Row, cell, difference, parse_arguments, publish, read_results, table, write_csv
from configuration_mmser import DEFAULT_LABELS
from mmser.examples import EmotionDataset
from mmser.loading import load_emotion_dataset
from mmser.log_mel_probe import log_mel_probe
from mmser.metrics import compute_classification_metrics
from mmser.results import environment

LABELS = list(DEFAULT_LABELS)
RATERS = 5
WRONG = (0.2, 0.4)  # the probability that a rater is wrong
TRUTH, MAJORITY, SHARES = "true labels", "majority of the raters", "shares of the raters"
SPLITS = ("validation", "test")


def wrong_answers(answers: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How often each other class is said for a class, where the answer is wrong: [true, said], rows sum to 1."""
    counts = np.zeros((len(LABELS), len(LABELS)))
    np.add.at(counts, (labels, answers), 1)
    np.fill_diagonal(counts, 0)
    if not counts.sum(axis=1).all():
        raise ValueError("The probe is never wrong about a class: its errors cannot be imitated.")
    return counts / counts.sum(axis=1, keepdims=True)


def simulate_votes(labels: np.ndarray, confusion: np.ndarray, wrong: float, seed: int) -> np.ndarray:
    """What each rater says of each clip, ids [N, raters]. Raters err independently, on each clip equally often."""
    rng = np.random.default_rng(seed)
    is_wrong = rng.random((len(labels), RATERS)) < wrong
    said = np.array([rng.choice(len(LABELS), RATERS, p=confusion[label]) for label in labels])
    return np.where(is_wrong, said, labels[:, None])


def read_votes(split: datasets.Dataset, votes: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The majority [N] and the shares [N, C] of votes, as `--label_distribution_columns votes` reads them."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "votes.csv"
        rows: list[Row] = [  # one speaker for all: no clip is held out
            {"file_name": path, "votes": ";".join(LABELS[vote] for vote in own), "split": name}
            for name, paths in (("train", split["audio"]), *((name, split["audio"][:1]) for name in SPLITS))
            for path, own in zip(paths, votes, strict=False)
        ]
        write_csv(manifest, rows)
        read, _ = load_emotion_dataset(
            manifest=str(manifest),
            label_distribution_columns=["votes"],
            label_names=LABELS,
            allow_speaker_overlap=True,
        )
    voted = read["train"]
    if voted["audio"] != split["audio"]:
        raise ValueError("The votes are not in the order of the clips.")
    return torch.tensor(voted["labels"]), torch.tensor(voted["class_shares"], dtype=torch.float32)


def scores_of(shown: Clips, clips: Mapping[str, Clips], seed: int) -> Row:
    """Of a training: weighted F1, and the mean negative logarithm of the true class's probability."""
    model = train(shown, seed=seed)
    row: Row = {}
    for split in SPLITS:
        logits, labels = torch.from_numpy(predict(model, clips[split])["logits"]), clips[split].labels
        metrics = compute_classification_metrics(logits.argmax(dim=1).numpy(), labels.numpy(), LABELS)
        row |= {f"{split}_weighted_f1": metrics["weighted_f1"]}
        row |= {f"{split}_log_loss": F.cross_entropy(logits, labels).item()}
    return row


def measure(
    clips: Mapping[str, Clips], split: datasets.Dataset, confusion: np.ndarray, seeds: Sequence[int]
) -> list[Row]:
    """A row for each seed, each rate of errors and what was learnt from; votes are drawn anew with each seed."""
    lines: list[Row] = []
    truth = clips["train"].labels
    for seed in logging.tqdm(seeds, desc="seeds"):
        variants: dict[tuple[float | None, str], Clips] = {(None, TRUTH): clips["train"]}
        for rate in WRONG:
            majority, shares = read_votes(split, simulate_votes(truth.numpy(), confusion, rate, seed))
            hard = replace(clips["train"], labels=majority)
            variants |= {(rate, MAJORITY): hard, (rate, SHARES): replace(hard, shares=shares)}
        for (wrong, learnt), shown in variants.items():
            right = (shown.labels == truth).float().mean().item()
            line: Row = {"wrong": wrong, "learnt": learnt, "seed": seed, "right": right}
            lines.append({**line, **scores_of(shown, clips, seed)})
    return lines


def make_tables(lines: Sequence[Row]) -> dict[str, str]:
    """Means over seeds; a change is that of the shares against the majority, seed by seed."""
    rows = []
    for wrong, learnt in dict.fromkeys((line["wrong"], line["learnt"]) for line in lines):

        def values(name: str, learnt: str = learnt, wrong: float | None = wrong) -> dict[Any, float]:
            own = [line for line in lines if (line["wrong"], line["learnt"]) == (wrong, learnt)]
            return {line["seed"]: line[name] for line in own}

        row: Row = {"a rater is wrong": "-" if wrong is None else f"{wrong:.0%}", "learnt from": learnt}
        row["majority is right"] = f"{np.mean(list(values('right').values())):.1%}"
        for split in SPLITS:
            for score in ("weighted_f1", "log_loss"):
                name, title = f"{split}_{score}", f"{score.replace('_', ' ').replace('f1', 'F1')}, {split}"
                row[title] = cell(values(name))
                row[f"change of {title}"] = (
                    difference(values(name), values(name, MAJORITY)) if learnt == SHARES else ""
                )
        rows.append(row)
    return {"soft_targets": table(rows)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    options = parse_arguments(parser, "soft_targets", arguments, required=["data_dir"])
    if options.from_results:
        report, lines = read_results(options.output)
    else:
        torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
        tables = dict(load_emotion_dataset(options.data_dir, label_names=LABELS)[0])
        train_set, held_out = (EmotionDataset(tables[name], use_text=False) for name in ("train", "validation"))
        probe = log_mel_probe(train_set, held_out)
        confusion = wrong_answers(probe["predictions"], probe["labels"])
        clips = encode_as_two_frames(tables, options.audio_encoder, options.cache_dir)
        seeds = range(options.seeds)
        lines = measure(clips, tables["train"], confusion, seeds)
        settings = {"seeds": list(seeds), "raters": RATERS, "epochs": EPOCHS, "batch_size": BATCH_SIZE}
        settings["clips"] = {name: len(own) for name, own in clips.items()}
        said = [
            {"true": label, **dict(zip(LABELS, np.round(row, 3).tolist(), strict=True))}
            for label, row in zip(LABELS, confusion, strict=True)
        ]
        report = {"environment": environment(), "settings": settings, "wrong_answers": said}
    publish(make_tables(lines), report, lines, options)


if __name__ == "__main__":
    main()
