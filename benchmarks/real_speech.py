# SPDX-License-Identifier: Apache-2.0
"""What MMSER does on real speech, and what each part of it adds: every number of the study is one command and a seed.

    python benchmarks/real_speech.py --data_dir ser4 --audio_encoder openai/whisper-base --text_encoder E5

Read: the rows (`all_rows`), what a run does (`run_worker`: one process for each row and seed), patches and data, the
study (`plan` skips what is finished, so it can be interrupted; `Study`), then `aggregate`, tables and `write_docs`.
Choices are made on validation clips; every table is of the test split.
"""

import argparse
import contextlib
import csv
import dataclasses
import fnmatch
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import datasets
import numpy as np
import torch
from filelock import FileLock
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer, BertConfig
from transformers.utils import logging

from mmser.arguments import TRAINING_ARGUMENTS

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_hf
from benchmarks import baselines
from benchmarks.head_depth import plain_post_norm
from benchmarks.speak_text import CORPUS as SPOKEN
from configuration_mmser import MMSERConfig
from mmser.batches import MMSERDataCollator
from mmser.caching import CachedStatesDataset, EncoderStateCache
from mmser.evaluation_run import load_label_names
from mmser.examples import EmotionDataset
from mmser.export import export_checkpoint
from mmser.loading import load_emotion_dataset
from mmser.metrics import compute_classification_metrics
from mmser.optimizer import PARAMETER_GROUPS
from mmser.results import RESULTS_NAME, environment
from mmser.tables import format_table, strict_json
from modeling_mmser import (
    AttentiveStatsPooling,
    CrossModalAttention,
    MMSERForAudioClassification,
    ResidualBlock,
    register_auto_classes,
)
from processing_mmser import MMSERPipeline, MMSERProcessor

ROOT = Path(__file__).resolve().parent.parent
Tree = dict[str, Any]  # nested mappings with numbers at the ends

TABLES = ("study", "parts", "text", "generalisation", "compact")
METRICS = ("weighted_f1", "unweighted_average_recall", "accuracy")
COUNTS = ("clips", "parameters", "trainable_parameters")  # the same for all seeds
RECIPE = "real_speech.json"  # all that comes after frozen encoders, of which the parts are taken away
STAGES = STAGE_1, STAGE_2, STAGE_3 = tuple(f"real_speech_{name}.json" for name in ("audio", "finetune", "fuse"))
FROZEN, BEST = "MMSER, frozen encoder", "MMSER"
HEARD, TUNED = "MMSER, first stage", "MMSER, second stage"
ALONE_TUNED = "MMSER, tuned once"
SEED_STEP = 10  # between the seeds of checkpoints that are averaged
DATA_SEED = 42  # which clips are augmented how: the same for all seeds, so that the states of the encoders are reused
SPEECH_PART, SPOKEN_PART = "acted speech", "spoken text"
EXAMINED = ("model", "audio_only", "text_only", "swapped_text", "swapped_audio")


# --------------------------------------------------------------------------------------------------------- 1. the rows


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table: `train_hf.py` with a recipe, or a function of `FUNCTIONS`."""

    name: str
    table: str
    recipe: str | None = None  # file in the folder of recipes
    function: str | None = None
    # What differs from the recipe, by its keys; dictionaries such as config_overrides are merged. Or the arguments of
    # the function.
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    patch: str | None = None  # of PATCHES: a change that is no option
    data: str = "speech"  # see `data_folder`
    leaves_out: Mapping[str, str] = dataclasses.field(default_factory=dict)  # column -> value, of a fold
    starts_from: str | None = None  # the row whose checkpoint of the same seed is the start
    averages: int = 1  # start from the mean of that many checkpoints of that row: of this seed, and SEED_STEP further
    needs: tuple[str, ...] = ()  # rows that must be finished before, with the same seed
    keep: bool = False  # keep the checkpoint
    examine: bool = False  # gates and wrong modalities as well
    same_for_all_seeds: bool = False
    note: str = ""


class Run(NamedTuple):
    """A row with a seed."""

    row: Row
    seed: int

    def __str__(self) -> str:
        return f"{self.row.table} / {self.row.name}" + ("" if self.row.same_for_all_seeds else f", seed {self.seed}")


# The settings of the published design in full: none of them is left to the recipe
PUBLISHED: Tree = {
    "config_overrides": {
        "use_weighted_layer_sum": False,
        "fusion_norm": "layer_norm",
        "cross_attention_layer_norm": True,
        "fusion_dropout": 0.1,
        "cross_attention_dropout": 0.1,
        "classifier_num_layers": 35,
        "classifier_dropout": 0.15,
        "label_smoothing": 0.1,
        "focal_loss_weight": 0.3,
        "class_balanced_beta": 0.9999,
        "anchor_loss_weight": 0.0,  # the published loss is always 0
        "uncertainty_loss_weight": 0.05,
        "uncertainty_error_weight": 0.0,
        "prototype_loss_weight": 0.01,
        "supervised_contrastive_loss_weight": 0.0,
    },
    "audio_num_hidden_layers": "all",
    "standardize_clips": 0,
    "augment": False,
    "text_dropout": 0.0,
    "audio_dropout": 0.0,
    "learning_rate": 1e-4,
    "weight_decay": None,  # that of each group
    "lr_multipliers": {name: multiplier for name, (_, multiplier, _) in PARAMETER_GROUPS.items()},
}


# Augmented copies depend on a clip's place in its data set, so that each fold would need its own states of them
PLAIN: Tree = {"augment": False}


def _config(**fields: Any) -> Tree:
    return {"config_overrides": fields}


STUDY = [
    Row("majority", "study", function="majority", same_for_all_seeds=True, note="the largest class of the training"),
    Row(
        "hand-made features + logistic regression",
        "study",
        function="hand-made features",
        same_for_all_seeds=True,
        note="73 measures of prosody and spectrum",
    ),
    Row(
        "frozen encoder + linear probe",
        "study",
        function="linear probe",
        same_for_all_seeds=True,
        note="mean and deviation of one layer; layer and C chosen on validation",
    ),
    Row(
        "WhisperForAudioClassification, fine-tuned",
        "study",
        function="whisper",
        changes={"learning_rate": 5e-5, "num_epochs": 40},
        needs=(HEARD, TUNED, ALONE_TUNED),
        note="as many seconds of training as the three stages of MMSER, tuned once",
    ),
    Row("MMSER, published settings", "study", RECIPE, changes=PUBLISHED, patch="published architecture"),
    Row(FROZEN, "study", RECIPE, keep=True),
    Row(HEARD, "study", STAGE_1, keep=True, note="a plain head on the frozen audio encoder, trained with audio alone"),
    Row(TUNED, "study", STAGE_2, starts_from=HEARD, keep=True, note="it and the audio encoder, with audio alone"),
    Row(
        ALONE_TUNED,
        "study",
        STAGE_3,
        starts_from=TUNED,
        note="the third stage: text joins the tuned encoder",
    ),
    Row(
        BEST,
        "study",
        STAGE_3,
        starts_from=TUNED,
        averages=3,
        keep=True,
        note="the same with the mean of what three seeds made of the first two stages",
    ),
]

_PARTS: list[tuple[str, Tree, str | None]] = [
    ("last layer only", _config(use_weighted_layer_sum=False), None),
    ("layer weights not learned", {"lr_multipliers": {"layer_weights": 0.0}}, None),
    ("mean pooling", {}, "mean pooling"),
    ("statistics pooling without attention", {}, "statistics pooling"),
    ("no anchors", _config(anchor_loss_weight=0.0), None),
    ("no focal loss", _config(focal_loss_weight=0.0), None),
    ("no uncertainty loss", _config(uncertainty_loss_weight=0.0), None),
    ("no prototypes", _config(prototype_loss_weight=0.0), None),
    ("35 blocks", _config(classifier_num_layers=35), None),
    ("5 blocks", _config(classifier_num_layers=5), None),
    ("no blocks", _config(classifier_num_layers=0), None),
    ("no augmentation", {"augment": False}, None),
    ("no class balancing", _config(class_balanced_beta=0.0), None),
    ("layer norm of the states", _config(cross_attention_layer_norm=True), None),
    ("layer norm in place of standardisation", _config(fusion_norm="layer_norm"), None),
    ("no standardisation at all", {**_config(fusion_norm="layer_norm"), "standardize_clips": 0}, None),
    ("published blocks", {}, "published blocks"),
    ("attention between modalities starts at random", {}, "attention starts at random"),
    ("no text dropout", {"text_dropout": 0.0}, None),
]
PARTS = [Row(name, "parts", RECIPE, changes=c, patch=p, needs=(FROZEN,)) for name, c, p in _PARTS]

TEXT = [
    Row("trained on spoken text", "text", RECIPE, changes=PLAIN, data="spoken", examine=True),
    Row("trained on speech", "text", function="examine", starts_from=FROZEN, note=f"the row {FROZEN} of the study"),
    Row("trained on speech, all stages", "text", function="examine", starts_from=BEST, note=f"the row {BEST}"),
    Row("trained on both", "text", RECIPE, changes=PLAIN, data="mix", keep=True, examine=True),
]

COMPACT = [
    Row(f"{BEST}, {kind}", "compact", function="compact", starts_from=BEST, changes={"dtype": dtype}, note=note)
    for kind, dtype, note in (
        ("fewer tokens", "float32", "the vocabulary of the training transcripts"),
        ("fewer tokens, int8", "int8", "the same, with weights in 8 bits"),
    )
]


def all_rows(arguments: argparse.Namespace) -> list[Row]:
    """Every row of every table, but for those that change nothing in the recipe and those whose data are not given."""
    rows = [*STUDY, *PARTS, *TEXT, *fold_rows(arguments.data_dir), *COMPACT]
    if arguments.spoken_text_dir is None:
        rows = [row for row in rows if row.data not in ("spoken", "mix")]
    full = effective_settings(next(row for row in STUDY if row.name == FROZEN), arguments)
    rows = [row for row in rows if row.table != "parts" or effective_settings(row, arguments) != full]
    names = [row.name for row in rows]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"rows must have different names, there are two of {', '.join(sorted(twice))}")
    return rows


def fold_rows(data_dir: str) -> list[Row]:
    """A row for each corpus and each language with test clips that is left out; one for both if they are the same."""
    splits, _ = read_rows(data_dir)
    clips = [clip for split in splits.values() for clip in split]
    folds: dict[frozenset[str], dict[str, str]] = {}  # what is left out, by its clips
    for column in ("corpus", "language"):
        for value in sorted({clip[column] for clip in splits["test"]} - {""}):
            members = frozenset(clip["audio"] for clip in clips if clip[column] == value)
            folds.setdefault(members, {})[column] = value
    names = [f"without {' = '.join(fold.values())}" for fold in folds.values()]
    return [
        Row(name, "generalisation", RECIPE, changes=PLAIN, data="fold", leaves_out=fold, needs=(FROZEN,))
        for name, fold in zip(names, folds.values(), strict=True)
    ]


def read_recipe(name: str, arguments: argparse.Namespace) -> Tree:
    path = arguments.recipes / name
    if not path.is_file():
        raise ValueError(f"{path} does not exist: --recipes must be a folder with {', '.join((RECIPE, *STAGES))}")
    return json.loads(path.read_text(encoding="utf-8"))


def merged_changes(row: Row, arguments: argparse.Namespace) -> Tree:
    """The changes of a row as flags that win over its recipe: a dictionary holds what the recipe has in it as well."""
    recipe, changes = read_recipe(row.recipe, arguments) if row.recipe else {}, {}
    for name, value in row.changes.items():
        changes[name] = {**(recipe.get(name) or {}), **value} if isinstance(value, Mapping) else value
        if value == "all":  # layers of the encoder: a recipe may cut it, and no flag takes that back
            changes[name] = AutoConfig.from_pretrained(arguments.audio_encoder).num_hidden_layers
    return changes


def effective_settings(row: Row, arguments: argparse.Namespace) -> Tree:
    """What a row of a recipe trains with, whether it is a default or written down."""
    defaults = {
        field.name: field.default
        for kind in TRAINING_ARGUMENTS
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING
    }
    settings = {**defaults, **read_recipe(row.recipe, arguments), **merged_changes(row, arguments), "patch": row.patch}
    config = {field.name: field.default for field in dataclasses.fields(MMSERConfig)}
    settings["config_overrides"] = {**config, **(settings["config_overrides"] or {})}
    multipliers = {name: multiplier for name, (_, multiplier, _) in PARAMETER_GROUPS.items()}
    settings["lr_multipliers"] = {**multipliers, **(settings["lr_multipliers"] or {})}
    return settings


# ----------------------------------------------------------------------------------------- 2. folders and fingerprints


def slug(name: str) -> str:
    """A name as part of a path."""
    return re.sub(r"\W+", "_", name.lower()).strip("_")


def run_folder(run: Run, arguments: argparse.Namespace) -> Path:
    return arguments.work_dir / run.row.table / slug(run.row.name) / f"seed{run.seed}"


def states_folder(arguments: argparse.Namespace) -> Path:
    return arguments.work_dir / "states"


def needed_runs(run: Run, rows: Sequence[Row]) -> list[Run]:
    """What must be finished before a run."""
    by_name = {row.name: row for row in rows}
    names = [(name, run.seed) for name in run.row.needs]
    if run.row.starts_from:
        names += [(run.row.starts_from, run.seed + SEED_STEP * i) for i in range(run.row.averages)]
    missing = [name for name, _ in names if name not in by_name]
    if missing:
        raise ValueError(f"the row {run.row.name!r} needs {', '.join(missing)}, which is no row")
    return [Run(by_name[name], 0 if by_name[name].same_for_all_seeds else seed) for name, seed in dict.fromkeys(names)]


def starts_of(run: Run, rows: Sequence[Row]) -> list[Run]:
    """The runs whose checkpoints a run starts from."""
    return [needed for needed in needed_runs(run, rows) if needed.row.name == run.row.starts_from]


def fingerprint(row: Row, rows: Sequence[Row], arguments: argparse.Namespace) -> str:
    """A hash of all that was chosen for a row: its definition, its recipe, the names of data and encoders, and those
    of the rows that it needs."""
    definition = {
        field.name: getattr(row, field.name)
        for field in dataclasses.fields(row)
        if field.name not in ("note", "keep") and getattr(row, field.name) not in (field.default, {})
    }
    paths = [arguments.data_dir, arguments.audio_encoder, arguments.text_encoder]
    if row.data in ("spoken", "mix"):
        paths.append(arguments.spoken_text_dir)
    content = {
        "row": definition,
        "recipe": read_recipe(row.recipe, arguments) if row.recipe else None,
        "paths": [Path(path).name for path in paths],
        "needs": [fingerprint(needed.row, rows, arguments) for needed in needed_runs(Run(row, 0), rows)],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_result(run: Run, rows: Sequence[Row], arguments: argparse.Namespace) -> Tree | None:
    """The result of a run that is finished, and was made with the settings of today."""
    path = run_folder(run, arguments) / "result.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    return result if result["settings"] == fingerprint(run.row, rows, arguments) else None


def has_model(run: Run, arguments: argparse.Namespace) -> bool:
    return (run_folder(run, arguments) / "model" / "config.json").is_file()


def write_atomically(path: Path, text: str) -> None:
    """Two processes may write the same file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8", newline="") as file:
        file.write(text)
    os.replace(file.name, path)


# ------------------------------------------------------------------------------------------------------------- 3. data


def read_rows(data_dir: str) -> tuple[dict[str, list[Tree]], list[str]]:
    """The clips of each split, with all of the columns corpus, language, speaker and text, and the label names."""
    splits, label_names = load_emotion_dataset(data_dir)
    empty = dict.fromkeys(("corpus", "language", "speaker", "text"), "")
    return {name: [{**empty, **clip} for clip in split.to_list()] for name, split in splits.items()}, label_names


def hold_out(splits: Mapping[str, Sequence[Tree]], column: str, value: str) -> dict[str, list[Tree]]:
    """Training and validation without the clips of a corpus or language; the test is on all of them."""
    held_out = [clip for split in splits.values() for clip in split if clip[column] == value]
    if not held_out:
        raise ValueError(f"no clip has the {column} {value!r}")
    rest = {name: [clip for clip in splits[name] if clip[column] != value] for name in ("train", "validation")}
    return {**rest, "test": held_out}


def join(first: Mapping[str, Sequence[Tree]], second: Mapping[str, Sequence[Tree]]) -> dict[str, list[Tree]]:
    """Each split of one data set, then the same split of the other."""
    return {name: [*first[name], *second[name]] for name in ("train", "validation", "test")}


def write_listing(folder: Path, splits: Mapping[str, Sequence[Tree]], label_names: Sequence[str]) -> None:
    """A folder that `load_emotion_dataset` takes as `data_dir`, whose clips are where they were."""
    columns = {"text": "transcription", "speaker": "speaker", "corpus": "corpus", "language": "language"}
    rows = [
        {
            "file_name": os.path.abspath(clip["audio"]),
            "label": label_names[clip["labels"]],
            **{name: clip[key] for key, name in columns.items()},
            "split": split,
        }
        for split, clips in splits.items()
        for clip in clips
    ]
    with tempfile.SpooledTemporaryFile(2**26, "w+", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        file.seek(0)
        write_atomically(folder / "metadata.csv", file.read())


def data_folder(row: Row, arguments: argparse.Namespace) -> str:
    """
    The folder of the clips of a row: "speech" is `--data_dir`, "spoken" `--spoken_text_dir`. "mix", which is both, and
    "fold", the first without what `row.leaves_out`, are written.
    """
    if row.data == "speech":
        return arguments.data_dir
    if row.data == "spoken":
        return arguments.spoken_text_dir
    splits, label_names = read_rows(arguments.data_dir)
    if row.data == "mix":
        folder = arguments.work_dir / "mix"
        spoken, other_names = read_rows(arguments.spoken_text_dir)
        if other_names != label_names:
            raise ValueError(f"the two data sets have other labels: {label_names} and {other_names}")
        splits = join(splits, spoken)
    else:
        column, value = next(iter(row.leaves_out.items()))  # the others are the same clips
        folder = arguments.work_dir / "folds" / slug(f"{column} {value}")
        splits = hold_out(splits, column, value)
    write_listing(folder, splits, label_names)
    return str(folder)


def swap_within_language(values: Sequence[str], languages: Sequence[str], seed: int) -> list[str | None]:
    """For each value that of a random other clip of the same language; it differs, or is None if there is no other."""
    rng = np.random.default_rng(seed)
    pools = defaultdict(list)
    for value, language in zip(values, languages, strict=True):
        if value:
            pools[language].append(value)
    swapped: list[str | None] = []
    for value, language in zip(values, languages, strict=True):
        others = [other for other in pools[language] if other != value] if value else []
        swapped.append(others[rng.integers(len(others))] if others else None)
    return swapped


# ---------------------------------------------------------------------------------------------------------- 4. patches


@contextlib.contextmanager
def starts_at_random(kind: type[torch.nn.Module], linear: str) -> Iterator[None]:
    """New modules of a kind draw the weights of this Linear, which else starts at zero."""
    original = kind.__init__

    def initialize(module: torch.nn.Module, *arguments: Any, **options: Any) -> None:
        original(module, *arguments, **options)
        getattr(module, linear).starts_at_zero = False

    with mock.patch.object(kind, "__init__", initialize):
        yield


@contextlib.contextmanager
def published_blocks() -> Iterator[None]:
    """Residual blocks as published: the last Linear starts at random, and nothing is scaled by the depth."""
    with starts_at_random(ResidualBlock, "up"), mock.patch.object(ResidualBlock, "forward", plain_post_norm):
        yield


@contextlib.contextmanager
def published_architecture() -> Iterator[None]:
    """The same, and the attention between the modalities starts at random too."""
    with published_blocks(), starts_at_random(CrossModalAttention, "output"):
        yield


def statistics(hidden_states: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain mean and standard deviation over the valid positions, float32 [B, D] each; 0 where there is none."""
    weights = mask.float()
    weights = (weights / weights.sum(dim=1, keepdim=True).clamp(min=1)).unsqueeze(-1)
    states = hidden_states.float()
    mean = (weights * states).sum(dim=1)
    variance = (weights * (states - mean[:, None]) ** 2).sum(dim=1)
    return mean, torch.where(variance > 1e-7, variance.clamp(min=1e-7).sqrt(), 0.0)


@contextlib.contextmanager
def _pooling(keeps_deviation: bool) -> Iterator[None]:
    def pool(module: AttentiveStatsPooling, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mean, deviation = statistics(hidden_states, mask)
        return torch.cat([mean, deviation * keeps_deviation], dim=-1).to(hidden_states.dtype)

    with mock.patch.object(AttentiveStatsPooling, "forward", pool):
        yield


PATCHES: dict[str | None, Callable[[], contextlib.AbstractContextManager]] = {
    None: contextlib.nullcontext,
    "published architecture": published_architecture,
    "published blocks": published_blocks,
    "attention starts at random": lambda: starts_at_random(CrossModalAttention, "output"),
    "mean pooling": lambda: _pooling(keeps_deviation=False),
    "statistics pooling": lambda: _pooling(keeps_deviation=True),
}


@contextlib.contextmanager
def one_encodes_at_a_time(folder: Path) -> Iterator[None]:
    """Runs that start together want the same states: the first one encodes them, the others then find them."""
    folder.mkdir(parents=True, exist_ok=True)
    original = CachedStatesDataset._build

    def build(dataset: CachedStatesDataset, cache: EncoderStateCache) -> None:
        with FileLock(folder / "encoding.lock"):
            original(dataset, cache)

    with mock.patch.object(CachedStatesDataset, "_build", build):
        yield


# -------------------------------------------------------------------------------------------------- 5. what a run does


def pick_metrics(values: Mapping[str, Any]) -> Tree:
    return {"clips": values.get("clips", values.get("count")), **{name: values[name] for name in METRICS}}


def stored_scores(described: Mapping[str, Mapping[str, Any]]) -> Tree:
    """Of what `eval_results.json` says of a split, what goes into the tables."""
    return {
        name: pick_metrics(values)
        | {
            key: {group: pick_metrics(own) for group, own in values[key].items()}
            for key in ("by_corpus", "by_language")
            if key in values
        }
        for name, values in described.items()
    }


def score(
    predictions: np.ndarray, labels: np.ndarray, label_names: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> Tree:
    """The same for class ids [N]; `groups` names the corpus, language, ... of each clip."""

    def of(chosen: np.ndarray) -> Tree:
        metrics = compute_classification_metrics(predictions[chosen], labels[chosen], label_names)
        return {"clips": int(chosen.sum()), **{name: metrics[name] for name in METRICS}}

    result = of(np.ones(len(labels), dtype=bool))
    for name, values in groups.items():
        result[f"by_{name}"] = {group: of(np.array(values) == group) for group in sorted(set(values))}
    return result


def groups_of(table: datasets.Dataset) -> dict[str, list[str]]:
    return {name: list(table[name]) for name in ("corpus", "language") if name in table.column_names}


def majority(run: Run, rows: Sequence[Row], arguments: argparse.Namespace) -> Tree:
    splits, label_names = load_emotion_dataset(data_folder(run.row, arguments))
    predictions = baselines.majority(splits["train"]["labels"], len(splits["test"]))
    scores = score(predictions, np.array(splits["test"]["labels"]), label_names, groups_of(splits["test"]))
    return {"scores": {"model": scores, "audio_only": scores}}


def probe(run: Run, arguments: argparse.Namespace, features_of: Callable[[datasets.Dataset], np.ndarray]) -> Tree:
    """A logistic regression on features of clips, which know nothing of the text."""
    splits, label_names = load_emotion_dataset(data_folder(run.row, arguments))
    start = time.perf_counter()
    features = {name: features_of(split) for name, split in splits.items()}
    labels = {name: np.array(split["labels"]) for name, split in splits.items()}
    probabilities, chosen = baselines.linear_probe(
        features["train"], labels["train"], features["validation"], labels["validation"], features["test"]
    )
    seconds = time.perf_counter() - start
    scores = score(probabilities.argmax(axis=1), labels["test"], label_names, groups_of(splits["test"]))
    validation = {"weighted_f1": chosen.pop("validation_weighted_f1")}
    return {
        "scores": {"audio_only": scores},
        "validation": validation,
        "details": chosen,
        "seconds": {"training": seconds},
    }


def hand_made_features(run: Run, rows: Sequence[Row], arguments: argparse.Namespace) -> Tree:
    return probe(
        run, arguments, lambda table: baselines.extract_hand_made_features(EmotionDataset(table, use_text=False))
    )


def linear_probe(run: Run, rows: Sequence[Row], arguments: argparse.Namespace) -> Tree:
    """On mean and deviation over time of each layer of the frozen audio encoder."""
    tiny = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = MMSERForAudioClassification.from_backbones(arguments.audio_encoder, tiny).base_model
    processor = MMSERProcessor(
        AutoFeatureExtractor.from_pretrained(arguments.audio_encoder),
        AutoTokenizer.from_pretrained(arguments.text_encoder),
    )
    rate = processor.feature_extractor.sampling_rate

    @torch.no_grad()
    def pooled(table: datasets.Dataset) -> np.ndarray:
        dataset = EmotionDataset(table, sampling_rate=rate, use_text=False)
        features = []
        for index in logging.tqdm(range(len(dataset)), "encoding"):
            states = model.encode(**processor(audio=[dataset[index]["audio"]], sampling_rate=rate))
            features.append(baselines.mean_and_std(states["audio_states"], states["attention_mask"])[0].numpy())
        return np.stack(features)

    return probe(run, arguments, pooled)


def whisper(run: Run, rows: Sequence[Row], arguments: argparse.Namespace) -> Tree:
    """Transformers' own classifier, with the seconds of training that the rows had which this one needs."""
    results = [read_result(needed, rows, arguments) for needed in needed_runs(run, rows)]
    if not all(results):
        raise ValueError(f"{run} takes its seconds of training from {', '.join(run.row.needs)}: run them first")
    splits, label_names = load_emotion_dataset(data_folder(run.row, arguments))
    data = {name: EmotionDataset(split, use_text=False) for name, split in splits.items()}
    probabilities, details = baselines.fine_tune_whisper(
        arguments.audio_encoder,
        data["train"],
        data["validation"],
        {"test": data["test"]},
        label_names,
        seed=run.seed,
        max_seconds_of_training=sum(result["seconds"]["training"] for result in results if result),
        bf16=True,
        use_cpu=not torch.cuda.is_available(),  # else bf16 is refused there
        disable_tqdm=True,
        **run.row.changes,
    )
    test = splits["test"]
    return {
        "scores": {
            "audio_only": score(
                probabilities["test"].argmax(axis=1), np.array(test["labels"]), label_names, groups_of(test)
            )
        },
        "validation": {"weighted_f1": details["validation_weighted_f1"]},
        "seconds": {"training": details["seconds"]},
        "parameters": details["parameters"],
        "trainable_parameters": details["trainable_parameters"],
        "details": details,
        "dtype": "bfloat16 autocast",
    }


def train_flags(run: Run, rows: Sequence[Row], arguments: argparse.Namespace) -> list[str]:
    """Arguments of `train_hf.main` for a row with a recipe."""
    row = run.row
    flags: Tree = {"data_dir": data_folder(row, arguments)}
    if row.starts_from:
        first, *others = (run_folder(start, arguments) / "model" for start in starts_of(run, rows))
        flags["model_name_or_path"] = first
        flags |= {"average_with": others} if others else {}
    else:
        flags["audio_model_name_or_path"] = arguments.audio_encoder
        flags["text_model_name_or_path"] = arguments.text_encoder
    flags |= merged_changes(row, arguments)
    flags |= {"seed": run.seed, "data_seed": DATA_SEED, "output_dir": run_folder(run, arguments) / "model"}
    settings = {**read_recipe(row.recipe, arguments), **flags}
    if settings.get("freeze_audio") or settings.get("freeze_text"):
        # Those of an encoder that was tuned serve this run alone
        own = run_folder(run, arguments) / "states"
        flags["cache_encoder_states"] = own if row.starts_from else states_folder(arguments)
    if not torch.cuda.is_available():  # where the fused kernel's backward pass takes several times as long
        flags["attn_implementation"] = "eager"
    flags["disable_tqdm"] = True
    recipe = arguments.recipes / row.recipe
    defaults = [name for name, value in flags.items() if value is None]
    if defaults:  # no flag takes back what a recipe sets
        kept = {name: value for name, value in read_recipe(row.recipe, arguments).items() if name not in defaults}
        recipe = run_folder(run, arguments) / "recipe.json"
        write_atomically(recipe, json.dumps(kept))
    words = [str(recipe)]
    for name, value in flags.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words += [f"--{name}", json.dumps(value) if isinstance(value, Mapping) else str(value)]
    return words


def train(run: Run, rows: Sequence[Row], arguments: argparse.Namespace) -> Tree:
    """`train_hf.py`; of what it leaves, the checkpoint stays only if the row says so."""
    folder = run_folder(run, arguments)
    model = folder / "model"
    flags = train_flags(run, rows, arguments)
    with PATCHES[run.row.patch]():
        train_hf.main(flags)
    for name in (RESULTS_NAME, "trainer_state.json", "training_args.json"):
        shutil.copy(model / name, folder / name)
    stored = json.loads((folder / RESULTS_NAME).read_text(encoding="utf-8"))
    whole = next(part for part in stored["parameters"] if part["part"] == "all")
    result = {
        "scores": stored_scores(stored["test"]),
        "validation": pick_metrics(stored["validation"]["model"]),
        "seconds": {"training": stored["training"]["train_runtime"]},
        "parameters": whole["parameters"],
        "trainable_parameters": whole["trainable"],
        "environment": stored["environment"],
        "dtype": str(_autocast(model) or torch.float32).removeprefix("torch."),
    }
    if run.row.patch is None:
        result["command"] = shlex.join(["python", "train_hf.py", *flags])
    if run.row.examine:
        data = data_folder(run.row, arguments)
        examined = gate_and_robustness(model, data, states_folder(arguments))
        result |= {"scores": result["scores"] | examined["scores"], "gate": examined["gate"]}
    for leftover in (*model.glob("checkpoint-*"), *folder.glob("states")):
        shutil.rmtree(leftover)
    if not run.row.keep:
        shutil.rmtree(model)
    return result


def examine(run: Run, rows: Sequence[Row], arguments: argparse.Namespace) -> Tree:
    """What `gate_and_robustness` says of the checkpoint of another row."""
    start, *_ = starts_of(run, rows)
    data = data_folder(run.row, arguments)
    model = run_folder(start, arguments) / "model"
    if start.row.starts_from is None:  # the encoders are as they came
        return gate_and_robustness(model, data, states_folder(arguments))
    with tempfile.TemporaryDirectory(dir=run_folder(run, arguments)) as folder:  # states that nothing else will read
        return gate_and_robustness(model, data, Path(folder))


def _autocast(model_dir: Path) -> torch.dtype | None:
    """The precision that a checkpoint was trained with."""
    arguments = json.loads((model_dir / "training_args.json").read_text(encoding="utf-8"))
    return torch.bfloat16 if arguments.get("bf16") else torch.float16 if arguments.get("fp16") else None


def gate_and_robustness(
    model_dir: Path, data_dir: str, states: Path, seed: int = 0, max_seconds: float = 30.0
) -> dict[str, Tree]:
    """
    Which modality a model listens to, and what it does when one is missing or wrong.

    Args:
        model_dir: the checkpoint.
        data_dir: its test split is looked at.
        states: folder for the states of the encoders; those of a frozen one may be there from training.
        seed: of what is swapped: each clip gets the transcript, or the audio, of another clip of its language.
        max_seconds: as in training.
    Returns: `scores`: for each of `EXAMINED` that the data allow, metrics by part (spoken text or not), corpus and
        language; audio is swapped for spoken text only. `gate`: the mean share of the audio in the fused vector, by
        the same groups, over the clips that have both modalities.
    """
    register_auto_classes()
    processor = MMSERProcessor.from_pretrained(model_dir)
    model = MMSERForAudioClassification.from_pretrained(model_dir, dtype=torch.float32).eval()
    model.freeze_audio_encoder()
    model.freeze_text_encoder()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    label_names = load_label_names(str(model_dir))
    test = load_emotion_dataset(data_dir, label_names=label_names)[0]["test"]
    precision = _autocast(model_dir)
    cache = EncoderStateCache(states, model, processor, autocast=precision)
    options = {"sampling_rate": processor.feature_extractor.sampling_rate, "max_seconds": max_seconds}
    scores, gate = {}, {}
    for name, table, modalities in _conditions(test, seed):
        dataset = CachedStatesDataset(EmotionDataset(table, **options, **modalities), cache)
        with torch.autocast(model.device.type, precision, enabled=precision is not None):
            predictions, gates = _predict(model, dataset, MMSERDataCollator(processor))
        groups = groups_of(table) | {"part": _parts(table)}
        scores[name] = score(predictions, np.array(table["labels"]), label_names, groups)
        if name == "model":
            both = np.array([bool(text) for text in table["text"]]) if "text" in table.column_names else gates < 0
            gate = _mean_gates(gates[both], {key: np.array(own)[both] for key, own in groups.items()})
    return {"scores": scores, "gate": gate}


def _conditions(test: datasets.Dataset, seed: int) -> Iterator[tuple[str, datasets.Dataset, dict[str, bool]]]:
    """What the model is shown: name, clips, and arguments of `EmotionDataset`."""
    yield "model", test, {}
    yield "audio_only", test, {"use_text": False}
    if "text" not in test.column_names:
        return
    languages = list(test["language"]) if "language" in test.column_names else [""] * len(test)
    yield "text_only", test.select([i for i, text in enumerate(test["text"]) if text]), {"use_audio": False}
    parts = _parts(test)
    for name, column, part in (("swapped_text", "text", None), ("swapped_audio", "audio", SPOKEN_PART)):
        of_interest = [value if part in (None, own) else "" for value, own in zip(test[column], parts, strict=True)]
        swapped = swap_within_language(of_interest, languages, seed)
        chosen = [i for i, value in enumerate(swapped) if value is not None]
        if chosen:
            table = test.select(chosen).remove_columns(column)
            yield name, table.add_column(column, [swapped[i] for i in chosen]), {}


def _parts(table: datasets.Dataset) -> list[str]:
    corpora = table["corpus"] if "corpus" in table.column_names else [""] * len(table)
    return [SPOKEN_PART if corpus.split("-")[-1] == SPOKEN else SPEECH_PART for corpus in corpora]


@torch.no_grad()
def _predict(
    model: MMSERForAudioClassification, dataset: torch.utils.data.Dataset, collate: MMSERDataCollator
) -> tuple[np.ndarray, np.ndarray]:
    """Class ids [N], and the gate [N]: its mean over dimensions."""
    predictions, gates = [], []
    for batch in torch.utils.data.DataLoader(dataset, batch_size=32, collate_fn=collate):
        inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
        output = model.base_model(**inputs)
        predictions.append(model.classifier(output.pooler_output)[0].argmax(dim=-1))
        gates.append(output.gate.mean(dim=-1))
    return torch.cat(predictions).cpu().numpy(), torch.cat(gates).float().cpu().numpy()


def _mean_gates(gates: np.ndarray, groups: Mapping[str, np.ndarray]) -> Tree:
    return {
        f"by_{name}": {
            str(group): {"clips": int((own == group).sum()), "gate": float(gates[own == group].mean())}
            for group in np.unique(own)
        }
        for name, own in groups.items()
    }


def compact(run: Run, rows: Sequence[Row], arguments: argparse.Namespace) -> Tree:
    """The checkpoint of another row as `export_hf.py` makes it small, run by onnxruntime through the pipeline."""
    start, *_ = starts_of(run, rows)
    splits, label_names = load_emotion_dataset(data_folder(run.row, arguments))
    texts, test = [text for text in splits["train"]["text"] if text], splits["test"]
    with tempfile.TemporaryDirectory(dir=run_folder(run, arguments)) as folder:
        report = export_checkpoint(
            run_folder(start, arguments) / "model", folder, texts=texts, overwrite=True, **run.row.changes
        )
        classify = MMSERPipeline.from_onnx(folder, top_k=1)
        scores, begin = {}, time.perf_counter()
        for name, transcripts in (("model", test["text"]), ("audio_only", [None] * len(test))):
            clips = [{"path": path, "text": text} for path, text in zip(test["audio"], transcripts, strict=True)]
            predicted = [label_names.index(labels[0]["label"]) for labels in classify(clips, batch_size=16)]
            scores[name] = score(np.array(predicted), np.array(test["labels"]), label_names, groups_of(test))
        seconds = time.perf_counter() - begin
    return {
        "scores": scores,
        "megabytes": {"model": report.sizes["model.onnx"] / 1e6, "folder": sum(report.sizes.values()) / 1e6},
        "seconds": {"testing": seconds},
        "parameters": report.trimmed.parameters_after,
        "dtype": run.row.changes["dtype"],
    }


FUNCTIONS: dict[str, Callable[[Run, Sequence[Row], argparse.Namespace], Tree]] = {
    "majority": majority,
    "hand-made features": hand_made_features,
    "linear probe": linear_probe,
    "whisper": whisper,
    "examine": examine,
    "compact": compact,
}


def run_worker(run: Run, rows: Sequence[Row], arguments: argparse.Namespace) -> Tree:
    """Do one run and write its `result.json`. What an earlier attempt left in its folder is removed."""
    folder = run_folder(run, arguments)
    shutil.rmtree(folder / "model", ignore_errors=True)
    (folder / "result.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with one_encodes_at_a_time(states_folder(arguments)):
        result = (FUNCTIONS[run.row.function] if run.row.function else train)(run, rows, arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {
        "row": run.row.name,
        "table": run.row.table,
        "seed": None if run.row.same_for_all_seeds else run.seed,
        "settings": fingerprint(run.row, rows, arguments),
        "command": shlex.join(["python", "benchmarks/real_speech.py", *worker_flags(run, arguments)]),
        **result,
    }
    result["command"] = _without_paths(result["command"], arguments)
    result["seconds"] = {**result.get("seconds", {}), "total": time.perf_counter() - start}
    measured_with = result.get("environment") or environment(device)
    result["environment"] = {**measured_with, "dtype": result.pop("dtype", "float32")}
    write_atomically(folder / "result.json", strict_json(result))
    return result


# -------------------------------------------------------------------------------------------------------- 6. the study


def worker_flags(run: Run, arguments: argparse.Namespace) -> list[str]:
    flags = ["--worker", run.row.name, "--seeds", str(run.seed)]
    for name in ("data_dir", "audio_encoder", "text_encoder", "spoken_text_dir", "work_dir", "recipes"):
        value = getattr(arguments, name)
        flags += [] if value is None else [f"--{name}", str(value)]
    return flags


def _without_paths(command: str, arguments: argparse.Namespace) -> str:
    """Folders of this machine mean nothing to others."""
    names = {
        str(arguments.recipes): "recipes",
        str(arguments.work_dir): "WORK",
        arguments.data_dir: "DATA",
        arguments.spoken_text_dir: "SPOKEN",
        arguments.audio_encoder: "AUDIO_ENCODER",
        arguments.text_encoder: "TEXT_ENCODER",
    }
    words = shlex.split(command)
    for path in sorted((path for path in names if path), key=len, reverse=True):
        words = [
            names[path] + word[len(path) :] if word == path or word.startswith(f"{path}/") else word for word in words
        ]
    return shlex.join(words)


def worker_command(run: Run, arguments: argparse.Namespace) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), *worker_flags(run, arguments)]


def select_rows(rows: Sequence[Row], arguments: argparse.Namespace) -> list[Row]:
    """Those of the tables and with the names that are asked for."""
    chosen = [
        row
        for row in rows
        if row.table in arguments.tables and any(fnmatch.fnmatchcase(row.name, glob) for glob in arguments.rows)
    ]
    if not chosen:
        raise ValueError(f"no row of {', '.join(arguments.tables)} is like {' or '.join(arguments.rows)}; see --list")
    return chosen


def plan(chosen: Iterable[Row], rows: Sequence[Row], arguments: argparse.Namespace) -> list[Run]:
    """What is still to be done for some rows, in an order in which everything comes after what it needs."""
    todo: dict[tuple[str, int], Run] = {}

    def visit(run: Run, needs_model: bool = False) -> None:
        is_finished = read_result(run, rows, arguments) is not None
        if (run.row.name, run.seed) in todo or (is_finished and (has_model(run, arguments) or not needs_model)):
            return
        for needed in needed_runs(run, rows):
            visit(needed, needed.row.name == run.row.starts_from)
        todo[run.row.name, run.seed] = run

    for row in chosen:
        for seed in [0] if row.same_for_all_seeds else arguments.seeds:
            visit(Run(row, seed))
    return list(todo.values())


def start_worker(run: Run, arguments: argparse.Namespace) -> subprocess.Popen:
    folder = run_folder(run, arguments)
    folder.mkdir(parents=True, exist_ok=True)
    threads = {name: str(arguments.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with open(folder / "log.txt", "wb") as log:
        return subprocess.Popen(
            worker_command(run, arguments),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | threads | {"TOKENIZERS_PARALLELISM": "false"},
        )


class Study:
    """Does runs, several at once, each as soon as those that it needs are finished."""

    def __init__(self, runs: Sequence[Run], rows: Sequence[Row], arguments: argparse.Namespace):
        self.rows, self.arguments = rows, arguments
        self.waiting, self.total = list(runs), len(runs)
        self.running: dict[tuple[str, int], tuple[Run, subprocess.Popen, float]] = {}
        self.failed: dict[tuple[str, int], str] = {}  # what to tell of them
        self.seconds: list[float] = []

    def execute(self, poll_seconds: float = 0.2) -> list[str]:
        """Do all runs; returns what to tell of those that failed."""
        try:
            while self.waiting or self.running:
                self._start_some()
                self._finish_some()
                time.sleep(poll_seconds)
        finally:
            for _, process, _ in self.running.values():
                process.terminate()
                process.wait()
        return list(self.failed.values())

    def _start_some(self) -> None:
        undone = {(run.row.name, run.seed) for run in self.waiting} | self.running.keys()
        for run in list(self.waiting):
            keys = [(needed.row.name, needed.seed) for needed in needed_runs(run, self.rows)]
            lost = [key for key in keys if key in self.failed]
            if lost:
                self.waiting.remove(run)
                self._fail(run, f"not done, as {lost[0][0]} failed")
            elif len(self.running) < self.arguments.jobs and not undone.intersection(keys):
                self.waiting.remove(run)
                process = start_worker(run, self.arguments)
                self.running[run.row.name, run.seed] = run, process, time.perf_counter()

    def _finish_some(self) -> None:
        for key, (run, process, start) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[key]
            result = read_result(run, self.rows, self.arguments)
            if process.returncode or result is None:
                log = run_folder(run, self.arguments) / "log.txt"
                self._fail(run, f"failed with exit status {process.returncode}, see {log}")
                continue
            self.seconds.append(time.perf_counter() - start)
            self._tell(f"{run}: {describe(result)}, {self.seconds[-1]:.0f} s; {self._time_left()}")

    def _fail(self, run: Run, reason: str) -> None:
        self.failed[run.row.name, run.seed] = f"{run}: {reason}"
        self._tell(self.failed[run.row.name, run.seed])

    def _time_left(self) -> str:
        left = (len(self.waiting) + len(self.running)) * float(np.mean(self.seconds)) / self.arguments.jobs
        return f"about {left / 60:.0f} min left" if left else "that was the last"

    def _tell(self, line: str) -> None:
        done = self.total - len(self.waiting) - len(self.running)
        print(f"[{done}/{self.total}] {line}", flush=True)


def describe(result: Tree) -> str:
    """The scores of a run in a few words."""
    names = {"model": "weighted F1", "audio_only": "audio alone", "text_only": "text alone"}
    scores = [f"{names[key]} {values['weighted_f1']:.3f}" for key, values in result["scores"].items() if key in names]
    return ", ".join(scores) or "done"


# ------------------------------------------------------------------------------------------------------- 7. the tables


def collect(rows: Sequence[Row], arguments: argparse.Namespace) -> dict[str, list[Tree]]:
    """The results of all runs that are finished with the settings of today, by the name of the row."""
    found: dict[str, list[Tree]] = {}
    for row in rows:
        folders = run_folder(Run(row, 0), arguments).parent.glob("seed*")
        seeds = sorted(int(folder.name.removeprefix("seed")) for folder in folders)
        results = [read_result(Run(row, seed), rows, arguments) for seed in seeds]
        found[row.name] = [result for result in results if result is not None]
    return found


def summarise(trees: Sequence[Any]) -> Any:
    """Nested mappings alike, one for each seed, as one with `mean`, `std` (with n - 1; None for one seed) and `values`
    in place of each number. What only some of them have is of those."""
    trees = [tree for tree in trees if tree is not None]
    if trees and isinstance(trees[0], Mapping):
        keys = dict.fromkeys(key for tree in trees for key in tree)
        return {
            key: trees[0].get(key) if key in COUNTS else summarise([tree.get(key) for tree in trees]) for key in keys
        }
    if not trees or not isinstance(trees[0], (int, float)):
        return None
    values = np.array(trees, dtype=np.float64)
    return {
        "mean": float(values.mean()),
        "std": float(values.std(ddof=1)) if len(values) > 1 else None,
        "values": values.tolist(),
    }


def aggregate(rows: Sequence[Row], collected: Mapping[str, Sequence[Tree]], arguments: argparse.Namespace) -> Tree:
    """Everything that is finished, as it goes into `benchmarks/results/real_speech.json`."""
    tables: dict[str, Tree] = {table: {} for table in TABLES}
    environments: list[Tree] = []
    for row in rows:
        results = collected.get(row.name) or []
        for result in results:
            if result["environment"] not in environments:
                environments.append(result["environment"])
        if not results:
            continue
        entry = {
            "note": row.note,
            "data": row.data,
            "leaves_out": row.leaves_out,
            "seeds": [result["seed"] for result in results],
        }
        entry["commands"] = [result["command"] for result in results]
        for key in ("scores", "validation", "gate", "seconds", "megabytes"):
            if any(key in result for result in results):
                entry[key] = summarise([result.get(key) for result in results])
        for key in ("parameters", "trainable_parameters"):
            if key in results[0]:
                entry[key] = results[0][key]
        entry["details"] = [result["details"] for result in results if "details" in result]
        tables[row.table][row.name] = entry
    return {
        "environments": environments,
        "data": {"speech": Path(arguments.data_dir).name, "audio_encoder": Path(arguments.audio_encoder).name}
        | {"text_encoder": Path(arguments.text_encoder).name},
        "rows": {table: [row.name for row in rows if row.table == table] for table in TABLES},
        "tables": tables,
    }


def short_json(results: Tree) -> str:
    """Strict JSON with a line for each mapping that holds no other."""
    return re.sub(r"\{[^{}]*\}", lambda innermost: " ".join(innermost[0].split()), strict_json(results))


def get(tree: Any, *keys: str) -> Any:
    """What is under the keys, or None."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def cell(summary: Any) -> str:
    """Mean ± standard deviation, or the mean alone of a single value; "-" for what there is not."""
    if not isinstance(summary, Mapping):
        return "-"
    spread = "" if summary["std"] is None else f" ± {summary['std']:.3f}"
    return f"{summary['mean']:.3f}{spread}"


def minus(entry: Tree, other: Tree, *keys: str) -> str:
    """Difference of two rows over the seeds that both have, as in `cell` but with a sign."""
    values = []
    for own in (entry, other):
        summary = get(own, "scores", *keys)
        values.append({} if summary is None else dict(zip(own["seeds"], summary["values"], strict=True)))
    common = [seed for seed in values[0] if seed in values[1]]
    if not common:
        return "-"
    summary = summarise([values[0][seed] - values[1][seed] for seed in common])
    return ("+" if summary["mean"] >= 0 else "") + cell(summary)


def _two(entry: Any, condition: str, names: tuple[str, str]) -> dict[str, str]:
    """Weighted F1 and unweighted average recall, under the names of their columns."""
    return {name: cell(get(entry, "scores", condition, metric)) for name, metric in zip(names, METRICS, strict=False)}


BOTH, ALONE = ("weighted F1", "unweighted recall"), ("audio alone: weighted F1", "audio alone: unweighted recall")


def _number_of_seeds(entry: Any) -> str:
    return "-" if entry is None else str(len(entry["seeds"]))


def _seconds_of_training(entries: Tree, name: str | None) -> float | None:
    """Of a row and of those whose checkpoints it starts from; None if it was not trained."""
    row = next((row for row in STUDY if row.name == name), None)
    own = get(entries, name, "seconds", "training", "mean") if row else None
    earlier = _seconds_of_training(entries, row.starts_from) if row and own is not None else None
    return own if own is None or earlier is None else own + row.averages * earlier


def study_table(results: Tree) -> str:
    entries = results["tables"]["study"]
    lines = []
    for name in results["rows"]["study"]:
        entry = entries.get(name)
        size = get(entry, "parameters")
        seconds = _seconds_of_training(entries, name)
        lines.append(
            {
                "model": name,
                **_two(None if name in (HEARD, TUNED) else entry, "model", BOTH),  # which have not seen a text
                **_two(entry, "audio_only", ALONE),
                "parameters": "-" if size is None else f"{size / 1e6:.1f} M",
                "seconds of training": "-" if seconds is None else f"{seconds:.0f}",
                "seeds": _number_of_seeds(entry),
            }
        )
    parts = [format_table(lines, list(lines[0]))]
    for group in ("corpus", "language"):
        names = sorted(get(entries, "majority", "scores", "model", f"by_{group}") or {})
        by_group = [
            {
                group: name,
                "clips": get(entries, "majority", "scores", "model", f"by_{group}", name, "clips"),
                **{
                    row: cell(get(entries, row, "scores", "model", f"by_{group}", name, "weighted_f1"))
                    for row in ("majority", FROZEN, BEST)
                },
                f"{BEST}, audio alone": cell(
                    get(entries, BEST, "scores", "audio_only", f"by_{group}", name, "weighted_f1")
                ),
            }
            for name in names
        ]
        if by_group:
            parts.append(f"Weighted F1 by {group}:\n\n{format_table(by_group, list(by_group[0]))}")
    return "\n\n".join(parts)


def parts_table(results: Tree) -> str:
    full = get(results, "tables", "study", FROZEN)
    lines = [
        {
            "change": "none",
            **_two(full, "model", BOTH),
            "difference": "",
            **_two(full, "audio_only", ALONE),
        }
    ]
    lines[0] |= {"difference, audio alone": "", "seeds": _number_of_seeds(full)}
    for name in results["rows"]["parts"]:
        entry = results["tables"]["parts"].get(name)
        known = full is not None and entry is not None
        lines.append(
            {
                "change": name,
                **_two(entry, "model", BOTH),
                "difference": minus(entry, full, "model", "weighted_f1") if known else "-",
                **_two(entry, "audio_only", ALONE),
                "difference, audio alone": minus(entry, full, "audio_only", "weighted_f1") if known else "-",
                "seeds": _number_of_seeds(entry),
            }
        )
    return format_table(lines, list(lines[0])) if len(lines) > 1 else ""


def text_table(results: Tree) -> str:
    titles = ("both modalities", "audio alone", "text alone", "transcript of another clip", "audio of another clip")
    lines = []
    for name in results["rows"]["text"]:
        entry = results["tables"]["text"].get(name)
        for part in get(entry, "scores", "model", "by_part") or {"-": None}:
            lines.append(
                {
                    "model": name,
                    "tested on": part,
                    **{
                        title: cell(get(entry, "scores", condition, "by_part", part, "weighted_f1"))
                        for title, condition in zip(titles, EXAMINED, strict=True)
                    },
                    "share of the audio": cell(get(entry, "gate", "by_part", part, "gate")),
                    "seeds": _number_of_seeds(entry),
                }
            )
    return format_table(lines, list(lines[0])) if lines else ""


def generalisation_table(results: Tree) -> str:
    """By corpus, then by language; what is both is in both tables."""
    entries, in_domain = results["tables"]["generalisation"], get(results, "tables", "study", FROZEN)
    parts = []
    for group in ("corpus", "language"):
        lines = []
        for name in results["rows"]["generalisation"]:
            entry, value = entries.get(name), get(entries.get(name), "leaves_out", group)
            if value is None:
                continue
            seen = get(in_domain, "scores", "model", f"by_{group}", value, "weighted_f1")
            lines.append(
                {
                    f"never heard: {group}": value,
                    "clips": get(entry, "scores", "model", "clips"),
                    "majority: weighted F1": cell(get(entry, "scores", "majority", "weighted_f1")),
                    **_two(entry, "model", BOTH),
                    **_two(entry, "audio_only", ALONE),
                    "heard, other speakers: weighted F1": cell(seen),
                    "seeds": _number_of_seeds(entry),
                }
            )
        if lines:
            parts.append(format_table(lines, list(lines[0])))
    return "\n\n".join(parts)


def compact_table(results: Tree) -> str:
    """Beside the checkpoint that they were made of, which is four bytes for each parameter."""
    whole = get(results, "tables", "study", BEST)
    lines = []
    for name in [BEST, *results["rows"]["compact"]]:
        entry = whole if name == BEST else results["tables"]["compact"].get(name)
        megabytes, parameters = get(entry, "megabytes", "model", "mean"), get(entry, "parameters")
        if name == BEST and parameters:
            megabytes = 4e-6 * parameters
        known = name != BEST and whole is not None and entry is not None
        lines.append(
            {
                "model": name,
                "parameters": "-" if parameters is None else f"{parameters / 1e6:.1f} M",
                "MB": "-" if megabytes is None else f"{megabytes:.1f}",
                **_two(entry, "model", BOTH),
                "difference": minus(entry, whole, "model", "weighted_f1") if known else "",
                **_two(entry, "audio_only", ALONE),
                "difference, audio alone": minus(entry, whole, "audio_only", "weighted_f1") if known else "",
                "seeds": _number_of_seeds(entry),
            }
        )
    return format_table(lines, list(lines[0]))


MAKERS: dict[str, Callable[[Tree], str]] = {
    "study": study_table,
    "parts": parts_table,
    "text": text_table,
    "generalisation": generalisation_table,
    "compact": compact_table,
}
TITLES = {
    "study": "Speakers never heard before",
    "parts": "What each part adds",
    "text": "Which modality is listened to",
    "generalisation": "Corpora and languages never heard before",
    "compact": "How small it can be",
}


def tables_of(results: Tree) -> dict[str, str]:
    """Markdown of each table with at least one finished row; rows that are not finished are named below it."""
    tables = {}
    for name, make in MAKERS.items():
        if not results["tables"][name]:
            continue
        missing = [row for row in results["rows"][name] if row not in results["tables"][name]]
        text = make(results) + "\n\nMean ± standard deviation over seeds."
        tables[name] = text + (f" Not finished: {'; '.join(missing)}." if missing else "")
    return tables


def markdown_tables(results: Tree) -> str:
    """All tables with their titles."""
    return "\n\n".join(f"## {TITLES[name]}\n\n{text}" for name, text in tables_of(results).items())


def write_docs(tables: Mapping[str, str], files: Sequence[Path]) -> list[str]:
    """
    Put tables between `<!-- real_speech:NAME -->` and `<!-- /real_speech:NAME -->` in each file that has them.

    Returns: what was written, "FILE: NAME".
    Raises:
        ValueError: a file without any such markers, with one that is not closed, or with one of no known table;
            nothing is written then.
    """
    written, texts = [], {}
    for file in files:
        text = file.read_text(encoding="utf-8")
        names = re.findall(r"<!-- real_speech:(\S+) -->", text)
        if not names:
            raise ValueError(f"{file} has no marker such as <!-- real_speech:{TABLES[0]} -->")
        for name in names:
            start, end = f"<!-- real_speech:{name} -->", f"<!-- /real_speech:{name} -->"
            if name not in TABLES:
                raise ValueError(f"{file} has the marker {start}; the tables are {', '.join(TABLES)}")
            if text.count(start) != 1 or text.count(end) != 1 or text.index(end) < text.index(start):
                raise ValueError(f"{file} must have {start} once and {end} once after it")
            if name in tables:
                before, after = text.split(start)[0], text.split(end)[1]
                text = f"{before}{start}\n\n{tables[name]}\n\n{end}{after}"
                written.append(f"{file.name}: {name}")
        texts[file] = text
    for file, text in texts.items():
        file.write_text(text, encoding="utf-8")
    return written


# ----------------------------------------------------------------------------------------------------- 8. command line


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="real speech: train, validation and test with metadata.csv")
    parser.add_argument("--audio_encoder", required=True, help="Hub name or folder")
    parser.add_argument("--text_encoder", required=True, help="Hub name or folder")
    parser.add_argument("--spoken_text_dir", help="of benchmarks/speak_text.py; without it those rows are left out")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/real_speech"), help="for runs and encoder states")
    parser.add_argument("--recipes", type=Path, default=ROOT / "recipes", help=f"has {', '.join((RECIPE, *STAGES))}")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "real_speech.json")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument(
        "--rows", nargs="+", default=["*"], metavar="GLOB", help="those whose name is like one of these"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--list", action="store_true", help="show rows and what is finished, and stop")
    parser.add_argument("--report_only", action="store_true", help="no runs, only the tables of what is finished")
    parser.add_argument("--write_docs", action="store_true", help="put the tables into README.md and model_card.md")
    parser.add_argument("--worker", metavar="ROW", help="do this one row with the first of the seeds")
    parsed = parser.parse_args(arguments)
    if parsed.jobs < 1 or parsed.threads < 1:
        parser.error(f"--jobs and --threads must be at least 1, got {parsed.jobs} and {parsed.threads}")
    return parsed


def show_rows(chosen: Sequence[Row], rows: Sequence[Row], arguments: argparse.Namespace) -> str:
    finished = collect(rows, arguments)
    lines = []
    for row in chosen:
        seeds = ["done" if result["seed"] is None else str(result["seed"]) for result in finished[row.name]]
        lines.append({"table": row.table, "row": row.name, "finished seeds": ", ".join(seeds), "note": row.note})
    return format_table(lines, list(lines[0]))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status: 1 if a run failed."""
    options = parse_arguments(arguments)
    rows = all_rows(options)
    if options.worker is not None:
        row = next((row for row in rows if row.name == options.worker), None)
        if row is None:
            raise ValueError(f"there is no row {options.worker!r}; see --list")
        run_worker(Run(row, options.seeds[0]), rows, options)
        return 0
    chosen = select_rows(rows, options)
    if options.list:
        print(show_rows(chosen, rows, options))
        return 0
    failed = []
    if not options.report_only:
        failed = Study(plan(chosen, rows, options), rows, options).execute()
    results = aggregate(rows, collect(rows, options), options)
    write_atomically(options.output, short_json(results))
    print(markdown_tables(results))
    if options.write_docs:
        print("\n".join(write_docs(tables_of(results), [ROOT / "README.md", ROOT / "model_card.md"])))
    if failed:
        print("\nNot all runs could be done:\n" + "\n".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
