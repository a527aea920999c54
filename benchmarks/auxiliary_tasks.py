# SPDX-License-Identifier: Apache-2.0
"""What other tasks beside the emotion do on real speech: the emotion without and with them, and the tasks themselves.

    python benchmarks/auxiliary_tasks.py --data_dir ser4 --audio_model openai/whisper-base --states runs/encoder_states

`sentiment` follows from the emotion, `sex` is known for the corpora whose speaker codes tell it, `pitch` is measured.
The audio encoder is frozen and there is no text. Of each clip only mean and deviation over time of the encoder's
states are kept, as two frames, mean plus and minus deviation: a step takes milliseconds, and all that is trained is
the model's own.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoFeatureExtractor, set_seed
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from audio_mmser import load_audio
from auxiliary_mmser import NO_CLASS
from benchmarks.tables import Row, cell, difference, parse_arguments, publish, read_results, table
from mmser.augmentation import Augmenter
from mmser.batches import MMSERDataCollator
from mmser.caching import CachedStatesDataset, EncoderStateCache
from mmser.examples import EmotionDataset, map_in_threads
from mmser.loading import load_emotion_dataset
from mmser.metrics import compute_classification_metrics
from mmser.results import environment
from mmser.scores import describe_tasks
from mmser.targets import COLUMN, derive_targets, split_targets, target_features
from mmser.trainer import MMSERTrainer
from mmser.training_arguments import MMSERTrainingArguments
from modeling_mmser import MMSERForAudioClassification
from processing_mmser import MMSERProcessor

TASKS: dict[str, Any] = {
    "sentiment": ["negative", "neutral", "positive"],
    "sex": ["female", "male"],
    "pitch": "regression",
}
SETTINGS = {
    "emotion alone": (),
    "and sentiment": ("sentiment",),
    "and sex": ("sex",),
    "and pitch": ("pitch",),
    "and all three": ("sentiment", "sex", "pitch"),
}
MEN_OF_EMO_DB = ("03", "10", "11", "12", "15")
LOWEST, HIGHEST = 60.0, 400.0  # Hz, of the fundamental frequency
NUMBER_SCORES = ("ccc", "pearson", "mean_absolute_error", "deviation_of_targets")
COPIES = 4  # augmented ones of each training clip


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


def load(data_dir: Path) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """The clips with the targets of all tasks."""
    splits, label_names = load_emotion_dataset(data_dir=data_dir)
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
    return derived, label_names


class TwoFrames(EmotionDataset):
    """The examples of cached states, each as two frames [2, layers, D], in memory."""

    def __init__(self, cached: CachedStatesDataset):
        super().__init__(cached.dataset, cached.seed)
        self.frames = []
        for copy in range(max(1, cached.augmented_copies)):
            cached.set_epoch(copy)
            self.frames.append(map_in_threads(lambda index: self.reduce(cached[index]), len(cached), "reading states"))
        self.labels, self.targets = list(cached.dataset["labels"]), list(cached.dataset[COLUMN])
        self.tasks: tuple[str, ...] = ()  # those to learn
        self._lengths = [2] * len(cached)

    @staticmethod
    def reduce(example: Any) -> np.ndarray:
        states = example["audio_states"].astype(np.float32)
        mean, deviation = states.mean(axis=0), states.std(axis=0)
        return np.stack([mean + deviation, mean - deviation]).astype(np.float32)

    def _example(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        frames = self.frames[int(self._epoch) % len(self.frames)][index]
        example = {"labels": self.labels[index], "length": 2, "audio_states": frames}
        targets = {task: self.targets[index][task] for task in self.tasks}
        return {**example, COLUMN: targets} if targets else example


def new_model(audio_model: str, label_names: list[str], **overrides: Any) -> MMSERForAudioClassification:
    overrides |= {"id2label": dict(enumerate(label_names)), "fusion_dropout": 0.4, "cross_attention_layer_norm": False}
    model = MMSERForAudioClassification.from_backbones(audio_model, None, audio_num_hidden_layers=4, **overrides)
    model.freeze_audio_encoder()
    return model


def read_states(options: argparse.Namespace, splits: dict[str, Any], label_names: list[str]) -> dict[str, TwoFrames]:
    """The clips of each split; those that the cache lacks are encoded."""
    model = new_model(options.audio_model, label_names)
    processor = MMSERProcessor(AutoFeatureExtractor.from_pretrained(options.audio_model))
    cache = EncoderStateCache(options.states, model, processor, autocast=torch.bfloat16)
    examples = {"train": EmotionDataset(splits["train"], training=True, augmenter=Augmenter(), max_seconds=30.0)}
    examples |= {name: EmotionDataset(splits[name], max_seconds=30.0) for name in ("validation", "test")}
    return {
        name: TwoFrames(CachedStatesDataset(own, cache, COPIES if name == "train" else 0))
        for name, own in examples.items()
    }


def run(setting: str, seed: int, clips: dict[str, TwoFrames], label_names: list[str], options: Any) -> list[Row]:
    """One training; a row for each evaluated split."""
    tasks = {task: TASKS[task] for task in SETTINGS[setting]}
    set_seed(seed)
    overrides = {"auxiliary_tasks": tasks, "auxiliary_loss_weight": options.weight}
    model = new_model(options.audio_model, label_names, **overrides)
    processor = MMSERProcessor(AutoFeatureExtractor.from_pretrained(options.audio_model))
    for examples in clips.values():
        examples.tasks = tuple(tasks)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = MMSERTrainingArguments(
            output_dir=folder,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=128,
            learning_rate=5e-4,
            lr_multipliers={"layer_weights": 60},
            weight_decay=1.0,
            train_sampling_strategy="random",
            dataloader_num_workers=0,
            eval_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=10_000,
            use_cpu=True,
            seed=seed,
        )
        collator = MMSERDataCollator(processor)
        trainer = MMSERTrainer(model, arguments, train_dataset=clips["train"], data_collator=collator)
        trainer.fit_standardization(clips["train"])
        trainer.train()
        for split in ("validation", "test"):
            outputs = trainer.predict_outputs(clips[split])
            emotion = compute_classification_metrics(outputs["logits"].argmax(axis=1), outputs["labels"], label_names)
            row: Row = {"setting": setting, "seed": seed, "split": split, "emotion": emotion["weighted_f1"]}
            scores = describe_tasks(outputs, split_targets(clips[split].dataset), tasks, num_samples=2)
            for task, own in scores.items():
                names = NUMBER_SCORES if task == "pitch" else ("weighted_f1", "majority_f1")
                row |= {"clips_" + task: own["clips"], **{f"{task}_{name}": own[name] for name in names}}
            rows.append(row)
    return rows


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
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--audio_model", default="openai/whisper-base")
    parser.add_argument("--states", type=Path, default=Path("runs/encoder_states"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=15.0)
    parser.add_argument("--weight", type=float, default=0.3)
    options = parse_arguments(parser, "auxiliary_tasks", arguments, required=["data_dir"])
    if options.from_results:
        report, lines = read_results(options.output)
    else:
        torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
        splits, label_names = load(options.data_dir)
        clips = read_states(options, splits, label_names)
        jobs = [(setting, seed) for seed in range(options.seeds) for setting in SETTINGS]
        lines = []
        for setting, seed in logging.tqdm(jobs, desc="runs"):
            lines += run(setting, seed, clips, label_names, options)
            print(lines[-2:], flush=True)
        settings = {name: getattr(options, name) for name in ("seeds", "epochs", "weight")}
        report = {"environment": environment(), "settings": settings, "precision": "float32"}
    publish(make_tables(lines), report, lines, options)


if __name__ == "__main__":
    main()
