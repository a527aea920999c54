# SPDX-License-Identifier: Apache-2.0
"""Which settings are best for many corpora? The trials of the wide recipe, by cross-validation.

    python benchmarks/wide.py --data_dir ser4 --wide_data_dir ser4wide --audio_encoder openai/whisper-base \
        --cache_dir runs/parts_states

Each trial changes one thing of a model that has every part on. The encoder is frozen and the models hear audio alone
(`pooled_states.py`). Only train + validation of both sets are read: the validation clips are judged, each third of the
speakers is held out once, and for some trials each fourth of the corpora. Of a run that was stopped, the trials that
are done are kept: give the same command again.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import GroupKFold
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.auxiliary_tasks import TASKS, sex_of
from benchmarks.parts import ALL, LABELS, SMALL, WITHOUT, scores_of
from benchmarks.pooled_states import (
    FIELDS,
    Clips,
    Schedule,
    add_flags,
    encode_as_two_frames,
    folds_by_speaker,
    join,
    predict,
    train,
    train_small_network,
)
from benchmarks.tables import Row, cell, difference, parse_arguments, publish, read_csv, read_results, table, write_csv
from benchmarks.teaching import with_cross_fitted_targets, with_pseudo_labels, with_targets_of_an_ensemble
from mmser.augmentation import Augmenter
from mmser.loading import load_emotion_dataset
from mmser.metrics import softmax
from mmser.results import environment
from modeling_mmser import MMSERForAudioClassification

EPOCHS = 8  # of about 7,000 clips: 875 steps
START = Schedule(epochs=EPOCHS)
SEED_STEP = 10  # between the members of an ensemble
COPIES = "a copy in a room, at another level"
AVERAGED = replace(START, weight_averaging=0.998)
EQUAL_LAYERS = replace(START, lr_multipliers={"layer_weights": 0.0})  # all layers of the encoder count alike
NONE = WITHOUT["none of these"]
BLOCKS = {"classifier_norm_first": True, "classifier_drop_path_rate": 0.5}  # of every trial that says nothing else
SPLITS = VALIDATION, SPEAKERS, CORPORA = "validation", "speakers held out", "corpora held out"
CORPUS_FOLDS = 4
Folds = Sequence[tuple[np.ndarray, np.ndarray]]  # rows to train on, rows to judge


@dataclass(frozen=True)
class Trial:
    """What a trial changes of a model with every part on.

    Args:
        overrides: fields of the configuration.
        schedule: how it is trained.
        layers: of the states, the first ones; the first of these is the encoder's input.
        leaves_out: corpora that it does not learn from.
        teach: what is done to the clips that it learns from, with a seed.
        members: trainings with seeds of their own; their probabilities are averaged.
        is_soup: the members start from one training and have half its epochs; their weights are averaged.
    """

    overrides: Mapping[str, Any] = field(default_factory=dict)
    schedule: Schedule = START
    layers: int | None = None
    leaves_out: tuple[str, ...] = ()
    teach: Callable[[Clips, int], Clips] | None = None
    members: int = 1
    is_soup: bool = False


TRIALS: dict[str, Trial | None] = {
    **{name: Trial(overrides) for name, overrides in WITHOUT.items()},
    SMALL: None,
    "norm after each block": Trial({"classifier_norm_first": False, "classifier_drop_path_rate": 0.0}),
    "no stochastic depth": Trial({"classifier_drop_path_rate": 0.0}),
    "no mixup": Trial({"mixup_alpha": 0.0}),
    "sampling temperature 3": Trial(schedule=replace(START, sampling_temperature=3.0)),
    "sampling temperature 2": Trial(schedule=replace(START, sampling_temperature=2.0)),
    "weight averaging": Trial(schedule=AVERAGED),
    "weight averaging, none of these": Trial(NONE, AVERAGED),
    "layer weights not learned": Trial(schedule=EQUAL_LAYERS),
    "layer weights not learned, none of these": Trial(NONE, EQUAL_LAYERS),
    "four layers": Trial(layers=5),
    "twice the epochs": Trial(schedule=replace(START, epochs=2 * EPOCHS)),
    "hides the corpus": Trial(schedule=replace(START, hides_corpus=True)),
    "contrastive loss": Trial({"supervised_contrastive_loss_weight": 0.1}),
    "contrastive loss within a corpus": Trial(
        {"supervised_contrastive_loss_weight": 0.1, "contrastive_other_corpus_weight": 0.0}
    ),
    "more dropout": Trial({"fusion_dropout": 0.4}),
    "less dropout": Trial({"fusion_dropout": 0.1}),
    "more dropout in the blocks": Trial({"classifier_dropout": 0.3}),
    "more mixup": Trial({"mixup_alpha": 1.0}),
    "slower blocks": Trial(schedule=replace(START, lr_multipliers={"classifier": 0.5})),
    "without EmoSpeechCmd": Trial(leaves_out=("EmoSpeechCmd",)),
    "no label smoothing": Trial({"label_smoothing": 0.0}),
    "learns the sex too": Trial({"auxiliary_tasks": {"sex": TASKS["sex"]}}),
    "soft targets": Trial(teach=with_cross_fitted_targets),
    "taught by an ensemble": Trial(teach=with_targets_of_an_ensemble),
    "pseudo-labels of calm clips": Trial(teach=with_pseudo_labels),
    COPIES: Trial(schedule=replace(START, epochs=EPOCHS // 2), teach=lambda clips, seed: clips.with_copies()),
    "ensemble of three": Trial(members=3),
    "soup of three": Trial(members=3, is_soup=True),
}
WITH_CORPORA = (
    *(ALL, "no blocks", "none of these", SMALL, "sampling temperature 3", "hides the corpus"),
    *("layer weights not learned", "layer weights not learned, none of these"),
)


def load_both(options: argparse.Namespace) -> tuple[Clips, np.ndarray]:
    """Training and validation of both sets, and which of them are for validation; the test clips are not read.

    Augmented copies are made for the trial that learns from them alone: they take as long as the clips themselves.
    """
    wide = load_emotion_dataset(options.wide_data_dir, label_names=LABELS, test_fraction=0)[0]
    tables = {f"wide {name}": split for name, split in wide.items()}
    own = load_emotion_dataset(options.data_dir, label_names=LABELS)[0]
    tables |= {name: own[name] for name in ("train", "validation")}
    parts = encode_as_two_frames(tables, options.audio_encoder, options.cache_dir)
    is_validation = [np.full(len(part), name.endswith("validation")) for name, part in parts.items()]
    sexes = [
        sex_of(*pair) for split in tables.values() for pair in zip(split["corpus"], split["speaker"], strict=True)
    ]
    clips = replace(join(*parts.values()), targets={"sex": torch.tensor(sexes)})
    if COPIES in options.trials:
        augmenter = Augmenter(effects=("room", "level"))
        copies = encode_as_two_frames(tables, options.audio_encoder, options.cache_dir, augmenter)
        clips = replace(clips, augmented=join(*copies.values()).states)
    return clips, np.concatenate(is_validation)


def folds_by_groups_of_corpora(clips: Clips) -> Folds:
    """Each fourth of the corpora held out once; the fourths have about as many clips each."""
    return list(GroupKFold(CORPUS_FOLDS).split(clips.corpora, groups=clips.corpora))


def answers_of(trial: Trial | None, shown: Clips, others: Clips, seed: int) -> np.ndarray:
    """Logits [N, C] of `others`."""
    if trial is None:
        return train_small_network(shown, seed)(others)
    shown = shown.take(~np.isin(shown.corpora, trial.leaves_out)).layers(trial.layers)
    others = others.layers(trial.layers)
    if trial.teach:
        shown = trial.teach(shown, seed)
    tasks = trial.overrides.get("auxiliary_tasks", {})
    shown = replace(shown, targets={task: shown.targets[task] for task in tasks})
    fields = {**BLOCKS, **trial.overrides}
    seeds = [seed + SEED_STEP * member for member in range(trial.members)]
    if trial.is_soup:
        return predict(soup(shown, fields, seeds, trial.schedule), others)["logits"]
    probabilities = [softmax(predict(train(shown, fields, own, trial.schedule), others)["logits"]) for own in seeds]
    return np.log(np.mean(probabilities, axis=0))


def soup(
    shown: Clips, fields: Mapping[str, Any], seeds: Sequence[int], schedule: Schedule
) -> MMSERForAudioClassification:
    """The mean of the weights of trainings that go on from one, for half its epochs each, with seeds of their own."""
    first = train(shown, fields, seeds[0], schedule)
    shorter = replace(schedule, epochs=schedule.epochs // 2)
    members = [train(shown, fields, seed, shorter, first).state_dict() for seed in seeds]
    for name, value in first.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.stack([member[name] for member in members]).mean(dim=0))
    return first


def held_out_answers(trial: Trial | None, clips: Clips, folds: Folds, seed: int) -> np.ndarray:
    """Logits [N, C] of all clips, each by a model that was not shown its fold; NaN where no fold judges a clip."""
    logits = np.full((len(clips), len(LABELS)), np.nan, dtype=np.float32)
    for shown, rows in folds:
        logits[rows] = answers_of(trial, clips.take(shown), clips.take(rows), seed)
    return logits


def scores(logits: np.ndarray, clips: Clips) -> dict[str, float]:
    """`weighted_f1` over all clips, `by_corpus`, the mean over the corpora, and `nll`, the negative log-likelihood."""
    answers, labels = logits.argmax(axis=1), clips.labels.numpy()
    own = [clips.corpora == name for name in np.unique(clips.corpora)]
    of_label = softmax(logits.astype(np.float64))[np.arange(len(labels)), labels]
    return {
        "weighted_f1": scores_of(answers, labels)["weighted_f1"],
        "by_corpus": float(np.mean([scores_of(answers[rows], labels[rows])["weighted_f1"] for rows in own])),
        "nll": float(-np.log(of_label).mean()),
    }


def measure(
    clips: Clips,
    is_validation: np.ndarray,
    seeds: Sequence[int],
    names: Sequence[str],
    path: Path,
    chosen: Sequence[str] = SPLITS,
) -> list[Row]:
    """Trials with all seeds, on the chosen splits. What `path` has already, from a run that was stopped, is not
    repeated."""
    validation = [(np.flatnonzero(~is_validation), np.flatnonzero(is_validation))]
    splits: dict[str, Folds] = {VALIDATION: validation, SPEAKERS: folds_by_speaker(clips)}
    splits[CORPORA] = folds_by_groups_of_corpora(clips)
    jobs = [(seed, name, split) for seed in seeds for name in names for split in (VALIDATION, SPEAKERS)]
    jobs += [(seed, name, CORPORA) for seed in seeds for name in names if name in WITH_CORPORA]
    jobs = [job for job in jobs if job[2] in chosen]
    lines = read_csv(path) if path.is_file() else []
    done = {(line["seed"], line["trial"], line["split"]) for line in lines}
    for seed, name, split in logging.tqdm([job for job in jobs if job not in done], desc="trials"):
        logits = held_out_answers(TRIALS[name], clips, splits[split], seed)
        judged = np.concatenate([rows for _, rows in splits[split]])
        lines.append({"split": split, "trial": name, "seed": seed, **scores(logits[judged], clips.take(judged))})
        write_csv(path, lines)
    return lines


# ---- showing


def summarise(lines: Sequence[Row]) -> list[Row]:
    """A row for each split and trial; differences are to all parts on, seed by seed."""
    rows = []
    for split in SPLITS:
        own = [line for line in lines if line["split"] == split]
        first = {line["seed"]: line["by_corpus"] for line in own if line["trial"] == ALL}
        for name in (name for name in TRIALS if any(line["trial"] == name for line in own)):
            values = {
                score: {line["seed"]: line[score] for line in own if line["trial"] == name}
                for score in ("by_corpus", "weighted_f1", "nll")
            }
            change = "" if name == ALL else difference(values["by_corpus"], first)
            row = {"split": split, "trial": name, "mean over corpora": cell(values["by_corpus"]), "difference": change}
            seeds = len(values["by_corpus"])
            rows.append({**row, "all clips": cell(values["weighted_f1"]), "NLL": cell(values["nll"]), "seeds": seeds})
    return rows


def make_tables(lines: Sequence[Row]) -> dict[str, str]:
    return {"wide:trials": table(summarise(lines))}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--wide_data_dir", type=Path, help="ser4wide, the second set")
    parser.add_argument("--trials", nargs="+", choices=list(TRIALS), default=list(TRIALS), metavar="TRIAL")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS, metavar="SPLIT")
    options = parse_arguments(parser, "wide", arguments, required=("data_dir", "wide_data_dir"))
    if options.from_results:
        report, lines = read_results(options.output)
    else:
        torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
        clips, is_validation = load_both(options)
        path = options.output.with_suffix(".csv")
        lines = measure(clips, is_validation, range(options.seeds), options.trials, path, options.splits)
        sizes = {"clips": len(clips), "speakers": len(set(clips.speakers)), "corpora": len(set(clips.corpora))}
        settings = {"epochs": EPOCHS, "batch_size": START.batch_size, **sizes, **FIELDS, **BLOCKS}
        report = {"environment": environment(), "settings": settings, "summary": summarise(lines)}
    publish(make_tables(lines), report, lines, options)


if __name__ == "__main__":
    main()
