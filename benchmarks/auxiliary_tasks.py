# SPDX-License-Identifier: Apache-2.0
"""What other tasks beside the emotion do on real speech: the emotion without and with them, and the tasks themselves.

    python benchmarks/auxiliary_tasks.py --data_dir ser4 --audio_encoder openai/whisper-base

`sentiment` follows from the emotion, `sex` is known for the corpora whose speaker codes tell it, `pitch` is measured.
The encoder is frozen and the models hear audio alone, as in `parts.py`, with all parts of the model on.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from audio_mmser import load_audio
from auxiliary_mmser import NO_CLASS
from benchmarks.pooled_states import BATCH_SIZE, EPOCHS, Clips, add_flags, encode_as_two_frames, predict, train
from benchmarks.tables import Row, cell, difference, parse_arguments, publish, read_results, table
from configuration_mmser import DEFAULT_LABELS
from mmser.examples import map_in_threads
from mmser.loading import load_emotion_dataset
from mmser.metrics import compute_classification_metrics
from mmser.results import environment
from mmser.scores import describe_tasks
from mmser.targets import COLUMN, derive_targets, split_targets, target_features

TASKS: dict[str, Any] = {
    "sentiment": ["negative", "neutral", "positive"],
    "sex": ["female", "male"],
    "pitch": "regression",
}
SETTINGS = {
    "emotion alone": (),
    "and sentiment": ("sentiment",),
    "and sex": ("sex",),
    "and all three": ("sentiment", "sex", "pitch"),
}
MEN_OF_EMO_DB = ("03", "10", "11", "12", "15")
LOWEST, HIGHEST = 60.0, 400.0  # Hz, of the fundamental frequency
NUMBER_SCORES = ("ccc", "pearson", "mean_absolute_error", "deviation_of_targets")


def sex_of(corpus: str, speaker: str) -> int:
    """The id in `TASKS["sex"]` by what the corpora document of their speaker codes; `NO_CLASS` for the others."""
    code = speaker.removeprefix(f"{corpus}_")
    if corpus == "RAVDESS":
        return int(code) % 2
    if corpus == "EMO-DB":
        return int(code in MEN_OF_EMO_DB)
    if corpus == "URDU":
        return "FM".index(code[1])
    return 0 if corpus == "TESS" else NO_CLASS


def pitch_of(waveform: np.ndarray, rate: int) -> float:
    """
    Median fundamental frequency in semitones above 60 Hz, by the normalised autocorrelation of windows of 50 ms (after
    Boersma 1993); nan for a clip with fewer than five voiced ones.
    """
    size, hop = round(0.05 * rate), round(0.02 * rate)
    padded = np.pad(waveform.astype(np.float64), (0, max(0, size - len(waveform))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]
    frames = (frames - frames.mean(axis=1, keepdims=True)) * np.hanning(size)
    power = np.abs(np.fft.rfft(frames, 2 * size)) ** 2
    window = np.fft.irfft(np.abs(np.fft.rfft(np.hanning(size), 2 * size)) ** 2)[:size]
    correlation = np.fft.irfft(power)[:, :size]
    energy = correlation[:, :1]
    lags = slice(int(rate / HIGHEST), int(rate / LOWEST))
    normal = (correlation / np.maximum(energy, 1e-12) / (window / window[0]))[:, lags]
    is_voiced = (normal.max(axis=1) > 0.6) & (energy[:, 0] > 1e-3 * energy.max())
    if is_voiced.sum() < 5:
        return float("nan")
    octaves = np.log2(np.arange(lags.start, lags.stop) / lags.start)
    # Twice the period fits as well: a small cost of each octave keeps to the shortest one
    frequency = rate / (lags.start + (normal[is_voiced] - 0.05 * octaves).argmax(axis=1))
    return float(12 * np.log2(np.median(frequency) / LOWEST))


def load(data_dir: Path) -> dict[str, datasets.Dataset]:
    """The clips with the targets of all tasks."""
    splits, label_names = load_emotion_dataset(data_dir=data_dir, label_names=DEFAULT_LABELS)
    measured: dict[str, Any] = {}
    for name, split in splits.items():

        def pitch(index: int, paths: Any = split["audio"]) -> float:
            return pitch_of(load_audio(paths[index], target_sampling_rate=16_000), 16_000)

        pitches = map_in_threads(pitch, len(split), "measuring pitch")
        sexes = [sex_of(*pair) for pair in zip(split["corpus"], split["speaker"], strict=True)]
        rows = [{"sex": sex, "pitch": value} for sex, value in zip(sexes, pitches, strict=True)]
        targets = datasets.Dataset.from_dict({COLUMN: rows}, features=target_features(TASKS, rows[0]))
        measured[name] = datasets.concatenate_datasets([split, targets], axis=1)
    derived, _ = derive_targets(measured, label_names, TASKS)
    return derived


def run(setting: str, seed: int, clips: dict[str, Clips], tables: dict[str, Any], weight: float) -> list[Row]:
    """One training; a row for each evaluated split."""
    tasks = {task: TASKS[task] for task in SETTINGS[setting]}
    targets = split_targets(tables["train"])
    train_clips = replace(clips["train"], targets={task: torch.tensor(targets[task]) for task in tasks})
    model = train(train_clips, {"auxiliary_tasks": tasks, "auxiliary_loss_weight": weight}, seed)
    rows = []
    for split in ("validation", "test"):
        outputs = predict(model, clips[split])
        answers, labels = outputs["logits"].argmax(axis=1), clips[split].labels.numpy()
        emotion = compute_classification_metrics(answers, labels, list(DEFAULT_LABELS))
        row: Row = {"setting": setting, "seed": seed, "split": split, "emotion": emotion["weighted_f1"]}
        scores = describe_tasks(outputs, split_targets(tables[split]), tasks, num_samples=2)
        for task, own in scores.items():
            names = NUMBER_SCORES if task == "pitch" else ("weighted_f1", "majority_f1")
            row |= {f"{task}_clips": own["clips"], **{f"{task}_{name}": own[name] for name in names}}
        rows.append(row)
    return rows


def describe(lines: Sequence[Row], weight: float) -> dict[str, Any]:
    """The summary: how it was measured, and the clips that have a target."""
    counts = {name: value for line in lines for name, value in line.items() if name.endswith("_clips")}
    seeds = sorted({line["seed"] for line in lines})
    settings = {"seeds": seeds, "weight": weight, "epochs": EPOCHS, "batch_size": BATCH_SIZE, "precision": "float32"}
    return {"environment": environment(), "settings": settings, "test_clips_with_a_target": counts}


def make_tables(lines: Sequence[Row]) -> dict[str, str]:
    rows = []
    for setting in dict.fromkeys(line["setting"] for line in lines):
        row: Row = {"learnt": setting}
        for split in ("validation", "test"):
            own, plain = (
                {line["seed"]: line for line in lines if line["setting"] == name and line["split"] == split}
                for name in (setting, next(iter(SETTINGS)))
            )
            emotions = [{seed: line["emotion"] for seed, line in each.items()} for each in (own, plain)]
            row[f"emotion, {split}"] = cell(emotions[0])
            if setting != next(iter(SETTINGS)):
                row[f"change, {split}"] = difference(*emotions)
            if split == "test":
                for score in ("sentiment_weighted_f1", "sex_weighted_f1", "pitch_ccc", "pitch_mean_absolute_error"):
                    values = {seed: line[score] for seed, line in own.items() if line.get(score) is not None}
                    row[score.replace("_", " ", 1).replace("_", " ")] = cell(values)
        rows.append(row)
    return {"auxiliary_tasks": table(rows)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--weight", type=float, default=0.3)
    options = parse_arguments(parser, "auxiliary_tasks", arguments, required=["data_dir"])
    if options.from_results:
        report, lines = read_results(options.output)
    else:
        torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
        tables = load(options.data_dir)
        clips = encode_as_two_frames(tables, options.audio_encoder, options.cache_dir)
        jobs = [(setting, seed) for seed in range(options.seeds) for setting in SETTINGS]
        lines = [
            row
            for job in logging.tqdm(jobs, desc="runs")
            for row in run(job[0], job[1], clips, tables, options.weight)
        ]
        report = describe(lines, options.weight)
    publish(make_tables(lines), report, lines, options)


if __name__ == "__main__":
    main()
