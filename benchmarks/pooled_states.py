# SPDX-License-Identifier: Apache-2.0
"""Many small trainings on a frozen audio encoder, each in seconds: what `parts.py` measures with.

Each clip is stood for by two frames, mean + deviation and mean - deviation of each layer's states over time. So the
pooling "layer_statistics" finds the mean and the deviations that it finds in the clip itself, and all that comes after
the pooling is the real model, its losses and its optimiser. What the pooling attends to within a clip cannot be seen
here, and "statistics" finds the same as "layer_statistics": in two frames all layers move together.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoFeatureExtractor, TrainerState, get_cosine_schedule_with_warmup
from transformers.utils import logging

from configuration_mmser import MMSERConfig
from mmser.adversarial import DomainHead, reversal_strength
from mmser.augmentation import Augmenter
from mmser.averaging import WeightAverage
from mmser.batches import pad_states
from mmser.caching import CachedStatesDataset, EncoderStateCache
from mmser.examples import EmotionDataset
from mmser.optimizer import parameter_groups
from mmser.sampling import sampling_weights
from mmser.splits import speaker_key
from mmser.training_arguments import processor_has_bf16
from modeling_mmser import MMSERForAudioClassification
from processing_mmser import MMSERProcessor

# Chosen by cross-validation over speakers, on train + validation. All parts of the model are on
FIELDS = {
    "pooling_type": "layer_statistics",
    "cross_attention_layer_norm": False,
    "fusion_dropout": 0.2,
    "mixup_alpha": 0.4,
}
LEARNING_RATE, WEIGHT_DECAY, LR_MULTIPLIERS = 7e-4, 1.0, {"layer_weights": 60.0}
BATCH_SIZE, EPOCHS = 64, 15
NUM_LABELS = 4
SMALL_NETWORK_STEPS = 1500
PORTION = 500  # clips
ADVERSARIAL_HEAD_WEIGHT = 0.1  # the default of `--adversarial_head_weight`


@dataclass(frozen=True)
class Clips:
    """Clips of a split, or of several.

    Args:
        states: of each clip, [T, layers, D]: its frames, or two frames that stand for it.
        labels: int64 [N]; -1 for what is none of the classes.
        corpora, speakers: N names; a speaker's name has that of the corpus in it.
        targets: of tasks beside the emotion, [N] each, as `auxiliary_targets` of the model.
        shares: of the votes for each class, float32 [N, C], where the labels are the majority of votes.
        augmented: as `states`, of an augmented copy of each clip.
    """

    states: list[Tensor]
    labels: Tensor
    corpora: np.ndarray
    speakers: np.ndarray
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    shares: Tensor | None = None
    augmented: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Any) -> "Clips":
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        states = [self.states[row] for row in rows]
        targets = {task: values[torch.from_numpy(rows)] for task, values in self.targets.items()}
        shares = None if self.shares is None else self.shares[torch.from_numpy(rows)]
        labels = self.labels[torch.from_numpy(rows)]
        augmented = None if self.augmented is None else [self.augmented[row] for row in rows]
        return Clips(states, labels, self.corpora[rows], self.speakers[rows], targets, shares, augmented)

    def layers(self, count: int | None) -> "Clips":
        """The states of the first `count` layers only, without augmented copies; None keeps all."""
        if count is None:
            return self
        return replace(self, states=[states[:, :count] for states in self.states], augmented=None)

    def with_copies(self) -> "Clips":
        """Each clip, and then the augmented copy of each."""
        if self.augmented is None:
            raise ValueError("these clips have no augmented copies")
        twice = self.take(np.tile(np.arange(len(self)), 2))
        return replace(twice, states=[*self.states, *self.augmented], augmented=None)


def join(*parts: Clips) -> Clips:
    """The clips of all parts, with neither targets of tasks, nor shares, nor augmented copies."""
    return Clips(
        [states for part in parts for states in part.states],
        torch.cat([part.labels for part in parts]),
        np.concatenate([part.corpora for part in parts]),
        np.concatenate([part.speakers for part in parts]),
    )


def two_frames(clips: Clips) -> Clips:
    """Two frames [2, layers, D] for each clip, with the mean and the deviation of its own over time."""
    states = []
    for own in logging.tqdm(clips.states, desc="mean and deviation of each clip", leave=False):
        mean, deviation = own.float().mean(dim=0), own.float().std(dim=0, correction=0)
        states.append(torch.stack([mean + deviation, mean - deviation]))
    return replace(clips, states=states)


def every_fourth_frame(clips: Clips) -> Clips:
    """A frame each 80 ms, where Whisper has one each 20 ms: enough to compare poolings, and a quarter of the time."""
    return replace(clips, states=[own[::4].clone() for own in clips.states])


def autocast_here() -> torch.dtype | None:
    """What the processor of this machine computes faster than float32."""
    return torch.bfloat16 if processor_has_bf16() else None


def encode(tables: Mapping[str, datasets.Dataset], audio_encoder: str, cache_dir: Path) -> dict[str, Clips]:
    """The clips of each table, with all their frames; these are computed once, and read from `cache_dir`."""
    cache = state_cache(audio_encoder, cache_dir)
    return {name: encode_table(split, cache) for name, split in tables.items()}


def state_cache(audio_encoder: str, cache_dir: Path) -> EncoderStateCache:
    """The states of an audio encoder in `cache_dir`."""
    processor = MMSERProcessor(AutoFeatureExtractor.from_pretrained(audio_encoder))
    model = MMSERForAudioClassification.from_backbones(audio_encoder, None)
    model.freeze_audio_encoder()
    return EncoderStateCache(cache_dir, model, processor, autocast=autocast_here())


def encode_table(split: datasets.Dataset, cache: EncoderStateCache, augmenter: Augmenter | None = None) -> Clips:
    """The clips of a table, with all their frames; with an augmenter, an augmented copy of each clip in its place."""
    rate = cache.processor.feature_extractor.sampling_rate
    is_copy = augmenter is not None
    plain = EmotionDataset(split, sampling_rate=rate, use_text=False, training=is_copy, augmenter=augmenter)
    dataset = CachedStatesDataset(plain, cache, augmented_copies=int(is_copy))
    states = [np.array(cast(Any, dataset[row])["audio_states"]) for row in range(len(split))]
    corpora = np.array(split["corpus"])
    speakers = [speaker_key(speaker, corpus) for speaker, corpus in zip(split["speaker"], corpora, strict=True)]
    return Clips([torch.from_numpy(own) for own in states], torch.tensor(split["labels"]), corpora, np.array(speakers))


def encode_as_two_frames(
    tables: Mapping[str, datasets.Dataset], audio_encoder: str, cache_dir: Path, augmenter: Augmenter | None = None
) -> dict[str, Clips]:
    """As `encode_table`, with two frames that stand for all; all frames of a few clips are in memory at once."""
    cache = state_cache(audio_encoder, cache_dir)

    def portions(split: datasets.Dataset) -> Iterator[Clips]:
        for start in range(0, len(split), PORTION):
            part = split.select(range(start, min(start + PORTION, len(split))))
            yield two_frames(encode_table(part, cache, augmenter))

    return {name: join(*portions(split)) for name, split in tables.items()}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What a benchmark is told of one data set, its encoder and the seeds."""
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--audio_encoder", default="openai/whisper-base")
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/parts_states"))
    parser.add_argument("--seeds", type=int, default=3)


@dataclass(frozen=True)
class Schedule:
    """How a model is trained.

    Args:
        epochs, batch_size, learning_rate: of the training.
        lr_multipliers: besides `LR_MULTIPLIERS`.
        sampling_temperature: as `--sampling_temperature`; None takes each clip once in an epoch.
        hides_corpus: as `--adversarial_head corpus`.
        weight_averaging: as `--weight_averaging`.
    """

    epochs: int = field(default_factory=lambda: EPOCHS)
    batch_size: int = field(default_factory=lambda: BATCH_SIZE)
    learning_rate: float = LEARNING_RATE
    lr_multipliers: Mapping[str, float] = field(default_factory=dict)
    sampling_temperature: float | None = None
    hides_corpus: bool = False
    weight_averaging: float = 0.0

    def draws(self, clips: Clips) -> np.ndarray:
        """How often an epoch takes each clip on average, [N]."""
        if self.sampling_temperature is None:
            return np.ones(len(clips))
        names = [f"{corpus} {label}" for corpus, label in zip(clips.corpora, clips.labels.tolist(), strict=True)]
        return sampling_weights(np.unique(names, return_inverse=True)[1], self.sampling_temperature)


def build(clips: Clips, overrides: Mapping[str, Any], draws: np.ndarray | None = None) -> MMSERForAudioClassification:
    """A model for these clips, of which only what comes after the encoder is ever used; `draws` as in `Schedule`."""
    num_layers, size = clips.states[0].shape[1:]
    # The states are here already: the smallest encoder with such states stands for the one that made them
    encoder = {"model_type": "whisper", "d_model": size, "encoder_layers": num_layers - 1}
    encoder |= {"encoder_attention_heads": 1, "encoder_ffn_dim": 1}
    weights = None if draws is None else torch.from_numpy(draws)
    counts = torch.bincount(clips.labels, weights, minlength=NUM_LABELS).round().long()
    if clips.shares is not None:
        counts = clips.shares.sum(dim=0).round().long()
    config = MMSERConfig(
        audio_config=encoder,
        modalities=["audio"],
        class_counts=counts.tolist(),
        **{**FIELDS, **overrides},
    )
    model = MMSERForAudioClassification(config)
    model.freeze_audio_encoder()
    return model


def batch(clips: Clips, rows: Tensor) -> dict[str, Any]:
    padded, mask = pad_states([clips.states[row].numpy() for row in rows.tolist()])
    targets: dict[str, Any] = {task: values[rows] for task, values in clips.targets.items()}
    targets = {"auxiliary_targets": targets} if targets else {}
    if clips.shares is not None:
        targets["class_shares"] = clips.shares[rows]
    _, corpora = np.unique(clips.corpora[rows.numpy()], return_inverse=True)
    targets["corpus_ids"] = torch.from_numpy(corpora)
    return {"audio_states": padded.float(), "attention_mask": mask, "labels": clips.labels[rows], **targets}


class Batches:
    """All clips in their order, as often as wanted."""

    def __init__(self, clips: Clips):
        self.clips = clips

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (batch(self.clips, rows) for rows in torch.arange(len(self.clips)).split(BATCH_SIZE))


def train(
    clips: Clips,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    schedule: Schedule | None = None,
    start: MMSERForAudioClassification | None = None,
) -> MMSERForAudioClassification:
    """Train a model of `build` on all of `clips`, with the weights of `start` if there is one; returned in eval
    mode."""
    schedule = schedule or Schedule()
    torch.manual_seed(seed)
    draws = schedule.draws(clips)
    model = build(clips, overrides or {}, draws)
    model.mmser.fit_standardization(Batches(clips))
    model.auxiliary.fit_targets(clips.targets)
    if start is not None:
        model.load_state_dict(start.state_dict())
    multipliers = {**LR_MULTIPLIERS, **schedule.lr_multipliers}
    groups = parameter_groups(model, schedule.learning_rate, multipliers, WEIGHT_DECAY)
    adversary = _Adversary(model, clips) if schedule.hides_corpus else None
    if adversary:
        groups.append({"params": adversary.head.parameters(), "lr": schedule.learning_rate})
    optimizer = torch.optim.AdamW(groups, fused=True)
    per_epoch = max(1, len(clips) // schedule.batch_size)
    steps = schedule.epochs * per_epoch
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    average = WeightAverage(model.parameters(), schedule.weight_averaging) if schedule.weight_averaging else None
    model.train()
    for step in range(steps):
        if step % per_epoch == 0:
            order = _grouped_by_length(clips, _epoch(draws, schedule), schedule.batch_size)
        rows = order[(step % per_epoch) * schedule.batch_size :][: schedule.batch_size]
        outputs = model(**batch(clips, rows))
        (outputs.loss + (adversary.loss(outputs, rows, step / steps) if adversary else 0)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if average:
            average.on_step_end(None, TrainerState(global_step=step + 1), None)
    if average:
        average.put(average.averages)
    return model.eval()


def _epoch(draws: np.ndarray, schedule: Schedule) -> Tensor:
    """The rows of an epoch, in their order."""
    if schedule.sampling_temperature is None:
        return torch.randperm(len(draws))
    return torch.multinomial(torch.from_numpy(draws), len(draws), replacement=True)


class _Adversary:
    """Learns the corpus of a clip from its features, behind a reversed gradient, as `MMSERTrainer` has it."""

    def __init__(self, model: MMSERForAudioClassification, clips: Clips):
        names, corpora = np.unique(clips.corpora, return_inverse=True)
        self.corpora = torch.from_numpy(corpora)
        self.head = DomainHead(model.config.feature_size, len(names))

    def loss(self, outputs: Any, rows: Tensor, progress: float) -> Tensor:
        strength = ADVERSARIAL_HEAD_WEIGHT * reversal_strength(progress)
        return self.head(outputs.features.float(), self.corpora[rows], strength)


def _grouped_by_length(clips: Clips, order: Tensor, batch_size: int) -> Tensor:
    """The same order, but that clips of similar length share a batch: each eight batches are sorted. Less padding."""
    lengths = torch.tensor([len(states) for states in clips.states])
    parts = order.split(8 * batch_size)
    return torch.cat([part[lengths[part].argsort(stable=True)] for part in parts])


@torch.no_grad()
def predict(model: MMSERForAudioClassification, clips: Clips) -> dict[str, np.ndarray]:
    """What the model says of each clip: `logits`, `uncertainty`, `auxiliary_<task>` and so on, [N, ...]."""
    without = dict.fromkeys(("labels", "auxiliary_targets", "class_shares"))
    without_labels = ({**own, **without} for own in Batches(clips))
    parts = [model(**own) for own in without_labels]
    names = ("logits", "uncertainty", "features", "fused", "anchor_distances", "rejection_score", "is_unknown")
    found = {name: [part[name] for part in parts] for name in names if parts[0].get(name) is not None}
    for task in model.auxiliary.tasks:
        found[f"auxiliary_{task}"] = [part.auxiliary[task] for part in parts]
    return {name: torch.cat(values).numpy() for name, values in found.items()}


def folds_by_speaker(clips: Clips, num_folds: int = 3) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows to train on and rows held out, with the corpora and classes spread evenly, and no speaker in both."""
    strata = [f"{corpus} {label}" for corpus, label in zip(clips.corpora, clips.labels.tolist(), strict=True)]
    return stratified_folds(strata, clips.speakers, num_folds)


def stratified_folds(
    strata: Sequence[str], groups: Sequence[str] | np.ndarray, num_folds: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows to train on and rows held out, with the strata spread evenly, and no group in both."""
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=0)
    return list(splitter.split(strata, strata, groups))


def folds_by_corpus(clips: Clips) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each corpus held out once."""
    return [
        (np.flatnonzero(clips.corpora != name), np.flatnonzero(clips.corpora == name))
        for name in np.unique(clips.corpora)
    ]


def train_small_network(clips: Clips, seed: int = 0) -> Callable[[Clips], np.ndarray]:
    """
    What has to be beaten: mean and deviation of each layer, learned layer weights, one hidden layer of 256.

    Returns: a function that gives the logits [N, C] of clips.
    """
    torch.manual_seed(seed)
    inputs = _statistics(clips)
    mean, scale = inputs.mean(dim=0), inputs.std(dim=0).clamp(min=1e-3)
    layer_weights = nn.Parameter(torch.zeros(inputs.shape[1]))
    head = nn.Sequential(nn.Linear(inputs.shape[2], 256), nn.ReLU(), nn.Dropout(0.4), nn.Linear(256, NUM_LABELS))
    groups: list[dict[str, Any]] = [{"params": head.parameters()}, {"params": [layer_weights], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [1e-3, 1e-2], total_steps=SMALL_NETWORK_STEPS, pct_start=0.1
    )

    def forward(statistics: Tensor) -> Tensor:
        return head((F.softmax(layer_weights, 0)[:, None] * (statistics - mean) / scale).sum(dim=1))

    for _ in range(SMALL_NETWORK_STEPS):
        rows = torch.randint(len(clips), (32,))
        F.cross_entropy(forward(inputs[rows]), clips.labels[rows], label_smoothing=0.1).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    head.eval()
    return lambda others: forward(_statistics(others)).detach().numpy()


def _statistics(clips: Clips) -> Tensor:
    """[N, layers, 2 D]: mean and deviation."""
    high, low = torch.stack(clips.states).unbind(dim=1)
    return torch.cat([(high + low) / 2, (high - low) / 2], dim=-1)
