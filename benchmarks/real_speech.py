# SPDX-License-Identifier: Apache-2.0
"""How well MMSER does on real speech, and what each of its parts adds: recipes, what they are changed by, and seeds.

    python benchmarks/real_speech.py --data_dir ser4 --audio_encoder openai/whisper-base \\
        --text_encoder intfloat/multilingual-e5-small --spoken_text_dir spoken
    python benchmarks/real_speech.py --from_results --write_docs

A finished run has a `result.json` in `--work_dir`, so the same command goes on where it was stopped. Tables are of
test clips.
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
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import Timeout
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_hf
from benchmarks import baselines
from benchmarks.modalities import METRICS, Lines, autocast_of, examine_checkpoint, groups_of, score
from benchmarks.pooled_states import stratified_folds
from benchmarks.real_speech_tables import (
    ALL_BEST,
    ALL_HEARD,
    ALL_ON,
    ALL_TUNED,
    ALONE,
    BEST,
    BOUNDS,
    FOLD_STAGES,
    FROZEN,
    HEARD,
    LORA,
    PLAIN_HEAD,
    RUN_COLUMNS,
    TABLES,
    TUNED,
    WIDE,
    WIDE_TUNED,
    make_tables,
)
from benchmarks.tables import ROOT, parse_arguments, publish, read_results, table
from mmser.export import export_checkpoint
from mmser.files import locked
from mmser.loading import load_emotion_dataset
from mmser.results import RESULTS_NAME, environment
from mmser.run_identity import PATIENCE
from mmser.splits import speaker_key
from mmser.tables import strict_json
from processing_mmser import MMSERPipeline

Tree = dict[str, Any]

RECIPE = "real_speech.json"  # all that comes after frozen encoders; the parts are taken away from it
PUBLISHED = "real_speech_published.json"  # the published design, nothing of which is left to a default
STAGES = STAGE_1, STAGE_2, STAGE_3 = tuple(f"real_speech_{name}.json" for name in ("audio", "finetune", "fuse"))
ALL_PARTS = "real_speech_all_parts.json"  # in place of the first
# For many corpora, every part on: first with frozen encoders, then with the audio encoder too
WIDE_RECIPES = WIDE_1, WIDE_2 = "wide.json", "wide_finetune.json"
RECIPES = RECIPE, PUBLISHED, *STAGES, ALL_PARTS, *WIDE_RECIPES
SEED_STEP = 10  # between the seeds of checkpoints that are averaged
DATA_SEED = 42  # one choice of augmented clips for all seeds, so that cached encoder states are reused


# --------------------------------------------------------------------------------------------------------- 1. the rows


@dataclasses.dataclass(frozen=True, eq=False)  # a row is itself alone: keys of dictionaries have rows in them
class Row:
    """One row of a table: a recipe of `train_hf.py` with changes, or a function of `FUNCTIONS`."""

    name: str
    table: str
    recipe: str | None = None
    function: str | None = None
    # Keys of the recipe and their values (a dictionary is merged with that of the recipe), or options of the function
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: str = "speech"  # see `Study.data_folder`
    leaves_out: Mapping[str, str] = dataclasses.field(default_factory=dict)  # column -> value
    starts_from: str | None = None  # the row whose checkpoint of the same seed is the start
    averages: int = 1  # start from the mean of so many checkpoints of that row
    common_start: bool = False  # the runs whose checkpoints are averaged start from one checkpoint
    needs: tuple[str, ...] = ()  # rows that must be finished before, with the same seed
    keep: bool = False  # keep the checkpoint
    examine: bool = False  # also test with modalities that are wrong
    once: bool = False  # the seed changes nothing
    note: str = ""


class Run(NamedTuple):
    row: Row
    seed: int

    def __str__(self) -> str:
        return f"{self.row.table} / {self.row.name}" + ("" if self.row.once else f", seed {self.seed}")


def config(**fields: Any) -> Tree:
    return {"config_overrides": fields}


# Augmented copies depend on a clip's place in its data set, so each fold would need its own encoder states
PLAIN: Tree = {"augment": False}
SPEAKER_FOLDS = 2

STUDY = [
    Row("majority", "study", function="majority", once=True, note="the largest class of the training"),
    Row("hand-made features + logistic regression", "study", function="hand-made features", once=True),
    Row("frozen encoder + linear probe", "study", function="linear probe", once=True),
    Row(
        *("WhisperForAudioClassification, fine-tuned", "study"),
        function="whisper",
        needs=(HEARD, TUNED, ALONE),
        note="as many seconds of training as the three stages of MMSER, tuned once",
    ),
    Row("MMSER, published settings", "study", PUBLISHED),
    Row(FROZEN, "study", RECIPE, keep=True),
    Row(HEARD, "study", STAGE_1, keep=True, note="a plain head on the frozen audio encoder, with audio alone"),
    Row(TUNED, "study", STAGE_2, starts_from=HEARD, keep=True, note="the same with the audio encoder"),
    Row(ALONE, "study", STAGE_3, starts_from=TUNED, note="the third stage: text joins the tuned encoder"),
    Row(BEST, "study", STAGE_3, starts_from=TUNED, averages=3, keep=True, note="from the mean of three seeds"),
    Row(ALL_HEARD, "study", ALL_PARTS, keep=True, note="the whole head in place of the plain one"),
    Row(ALL_TUNED, "study", STAGE_2, starts_from=ALL_HEARD, common_start=True, keep=True),
    Row(ALL_BEST, "study", STAGE_3, starts_from=ALL_TUNED, averages=3, keep=True, note="from the mean of three seeds"),
]
TUNING = [
    Row(LORA, "tuning", STAGE_2, changes={"lora_rank": 16}, starts_from=HEARD, note="adapters in place of all weights")
]
BOTH_SETS: Tree = {"table": "wide", "data": "wide"}
EQUAL_LAYERS = f"{WIDE}, layer weights not learned"
NORM_AFTER = tuple(f"{name}, norm after each block" for name in (WIDE, WIDE_TUNED))
AS_PUBLISHED = config(classifier_norm_first=False, classifier_drop_path_rate=0.0)
WIDE_ROWS = [
    Row("hand-made features + logistic regression, both sets", function="hand-made features", once=True, **BOTH_SETS),
    Row("frozen encoder + linear probe, both sets", function="linear probe", once=True, **BOTH_SETS),
    Row(
        "WhisperForAudioClassification, fine-tuned, both sets",
        function="whisper",
        needs=(WIDE, WIDE_TUNED),
        note="as many seconds of training as both stages of MMSER",
        **BOTH_SETS,
    ),
    Row(WIDE, recipe=WIDE_1, keep=True, **BOTH_SETS),
    Row(WIDE_TUNED, recipe=WIDE_2, starts_from=WIDE, keep=True, **BOTH_SETS),
    Row(EQUAL_LAYERS, recipe=WIDE_1, changes={"lr_multipliers": {"layer_weights": 0.0}}, **BOTH_SETS),
    Row(NORM_AFTER[0], recipe=WIDE_1, changes=AS_PUBLISHED, keep=True, **BOTH_SETS),
    Row(NORM_AFTER[1], recipe=WIDE_2, changes={"sampling_temperature": None}, starts_from=NORM_AFTER[0], **BOTH_SETS),
]
_PARTS: dict[str, Tree] = {
    "last layer only": config(use_weighted_layer_sum=False),
    "layer weights not learned": {"lr_multipliers": {"layer_weights": 0.0}},
    "no anchors": config(anchor_loss_weight=0.0),
    "no focal loss": config(focal_loss_weight=0.0),
    "no uncertainty loss": config(uncertainty_loss_weight=0.0),
    "no prototypes": config(prototype_loss_weight=0.0),
    "5 blocks": config(classifier_num_layers=5),
    "no blocks": config(classifier_num_layers=0),
    "no augmentation": {"augment": False},
    "no class balancing": config(class_balanced_beta=0.0),
    "layer norm of the states": config(cross_attention_layer_norm=True),
    "layer norm in place of standardisation": config(fusion_norm="layer_norm"),
    "no standardisation at all": {**config(fusion_norm="layer_norm"), "standardize_clips": 0},
    "published blocks": config(zero_init_branches=False, scale_branches_by_depth=False),
    "no text dropout": {"text_dropout": 0.0},
}
PARTS = [Row(name, "parts", RECIPE, changes=changes, needs=(FROZEN,)) for name, changes in _PARTS.items()]
TEXT = [
    Row("trained on spoken text", "text", RECIPE, changes=PLAIN, data="spoken", examine=True),
    Row("trained on speech", "text", function="examine", starts_from=FROZEN, note=f"the row {FROZEN}"),
    Row("trained on speech, all stages", "text", function="examine", starts_from=BEST, note=f"the row {BEST}"),
    Row("trained on both", "text", RECIPE, changes=PLAIN, data="mix", examine=True),
]
COMPACT = [
    Row(f"{base}, fewer tokens{name}", "compact", None, "compact", {"dtype": dtype}, data, starts_from=base)
    for base, data in ((BEST, "speech"), (WIDE_TUNED, "wide"))
    for name, dtype in (("", "float32"), (", int8", "int8"))
]


def _speaker_fold_rows() -> Iterator[Row]:
    """Both heads, each with both stages, on each fold of the speakers: what `recipes/` are chosen by."""
    for number in range(1, SPEAKER_FOLDS + 1):
        fold: Tree = {"data": "fold", "leaves_out": {"speakers": f"{number} of {SPEAKER_FOLDS}"}}
        held_out = {"validation_fraction": 0.1}  # for the calibration, which changes no answer
        for head, first in ((PLAIN_HEAD, STAGE_1), (ALL_ON, ALL_PARTS)):
            names = [f"{head}, {stage}, fold {number}" for stage in FOLD_STAGES]
            yield Row(names[0], "folds", first, changes={**PLAIN, **held_out}, keep=True, **fold)
            yield Row(names[1], "folds", STAGE_2, changes=held_out, starts_from=names[0], **fold)


FOLDS = list(_speaker_fold_rows())


def _wide_trial_rows() -> Iterator[Row]:
    """What clips of two frames, as in `wide.py`, cannot show. A third of the speakers of both sets is held out."""
    fold: Tree = {"table": "wide_trials", "data": "wide", "leaves_out": {"speakers": "1 of 3"}}
    held_out = {"validation_fraction": 0.1}  # for the calibration, which changes no answer
    first, pooling = "frozen encoder", {"pooling_type": "layer_statistics"}
    for name, fields in ((first, {}), (f"{first}, transformer fusion", {"fusion_type": "transformer"})):
        changes = {**PLAIN, **held_out, **config(**pooling, **fields)}
        yield Row(name, recipe=WIDE_1, changes=changes, keep=name == first, **fold)
    learns: dict[str, Tree] = {
        "its last layer": {"freeze_audio_layers": 3},
        "its last two": {"freeze_audio_layers": 2},
        "all of it": {},
        "LoRA of rank 16": {"lora_rank": 16},
    }
    for name, changes in learns.items():
        one_epoch = {**held_out, **changes, "num_train_epochs": 1}
        yield Row(f"an epoch that tunes {name}", recipe=WIDE_2, changes=one_epoch, starts_from=first, **fold)


WIDE_TRIALS = list(_wide_trial_rows())


def fold_rows(data_dir: str) -> list[Row]:
    """A row for each corpus and language with test clips that is left out; one for both if they are the same clips."""
    splits, _ = read_splits(data_dir)
    clips = [clip for split in splits.values() for clip in split]
    folds: dict[frozenset[str], dict[str, str]] = {}
    for column in ("corpus", "language"):
        for value in sorted({clip[column] for clip in splits["test"]} - {""}):
            members = frozenset(clip["audio"] for clip in clips if clip[column] == value)
            folds.setdefault(members, {})[column] = value
    options: Tree = {"changes": PLAIN, "data": "fold", "needs": (FROZEN,)}
    return [
        Row(f"without {' = '.join(fold.values())}", "generalisation", RECIPE, leaves_out=fold, **options)
        for fold in folds.values()
    ]


# --------------------------------------------------------------------------------------------------------- 2. the data


def read_splits(data_dir: str) -> tuple[dict[str, list[Tree]], list[str]]:
    """The clips of each split, all with corpus, language, speaker and text, and the label names. No test split is made
    where there is none."""
    splits, label_names = load_emotion_dataset(data_dir, test_fraction=0)
    empty = dict.fromkeys(("corpus", "language", "speaker", "text"), "")
    return {name: [{**empty, **clip} for clip in split.to_list()] for name, split in splits.items()}, label_names


def hold_out_speakers(splits: Mapping[str, Sequence[Tree]], value: str) -> dict[str, list[Tree]]:
    """One fold ("1 of 2") of the speakers of training and validation to test on, and the others to train on."""
    number, count = map(int, value.split(" of "))
    clips = [*splits["train"], *splits["validation"]]
    strata = [f"{clip['corpus']} {clip['labels']}" for clip in clips]
    speakers = [speaker_key(clip["speaker"], clip["corpus"]) for clip in clips]
    heard, new = stratified_folds(strata, speakers, count)[number - 1]
    return {"train": [clips[row] for row in heard], "test": [clips[row] for row in new]}


def hold_out(splits: Mapping[str, Sequence[Tree]], column: str, value: str) -> dict[str, list[Tree]]:
    """Training and validation without the clips of a corpus or language; the test is on all of them."""
    held_out = [clip for split in splits.values() for clip in split if clip[column] == value]
    rest = {name: [clip for clip in splits[name] if clip[column] != value] for name in ("train", "validation")}
    return {**rest, "test": held_out}


def write_listing(folder: Path, splits: Mapping[str, Sequence[Tree]], label_names: Sequence[str]) -> str:
    """The path of a table, for `--data_dir`, of clips that stay where they are."""
    columns = {"text": "transcription", "speaker": "speaker", "corpus": "corpus", "language": "language"}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file_name", "label", *columns.values(), "split"])
        for split, clips in splits.items():
            for clip in clips:
                row = [os.path.abspath(clip["audio"]), label_names[clip["labels"]], *(clip[key] for key in columns)]
                writer.writerow([*row, split])
    return str(folder / "metadata.csv")


# -------------------------------------------------------------------------------------------------------- 3. the study


class Study:
    """The rows that the data allow, where their runs are kept, and what is still to be done."""

    def __init__(self, options: argparse.Namespace, rows: Sequence[Row] | None = None):
        self.options = options
        if rows is None:
            rows = [
                *STUDY,
                *WIDE_ROWS,
                *FOLDS,
                *WIDE_TRIALS,
                *TUNING,
                *PARTS,
                *TEXT,
                *fold_rows(options.data_dir),
                *COMPACT,
            ]
            if options.spoken_text_dir is None:
                rows = [row for row in rows if row.data not in ("spoken", "mix")]
            if options.wide_data_dir is None:
                rows = [row for row in rows if row.data != "wide"]
        self.rows = {row.name: row for row in rows}

    def folder(self, run: Run) -> Path:
        return self.options.work_dir / run.row.table / slug(run.row.name) / f"seed{run.seed}"

    def starts(self, run: Run) -> list[Run]:
        """The runs whose checkpoints a run starts from."""
        if run.row.starts_from is None:
            return []
        seed = run.seed % SEED_STEP if run.row.common_start else run.seed
        return [Run(self.rows[run.row.starts_from], seed + SEED_STEP * i) for i in range(run.row.averages)]

    def needed(self, run: Run) -> list[Run]:
        """What must be finished before a run."""
        rows = [self.rows[name] for name in run.row.needs]
        return [*(Run(row, 0 if row.once else run.seed) for row in rows), *self.starts(run)]

    def settings(self, row: Row) -> Tree:
        """The recipe of a row with its changes."""
        path = self.options.recipes / str(row.recipe)
        if not path.is_file():
            raise ValueError(f"{path} does not exist: --recipes must be a folder with {', '.join(RECIPES)}")
        # Said here: the default goes by the number of clips, which a row may change
        settings = {"num_train_epochs": 15, **json.loads(path.read_text(encoding="utf-8"))}
        for name, value in row.changes.items():
            settings[name] = {**(settings.get(name) or {}), **value} if isinstance(value, Mapping) else value
        return settings

    def recipe(self, run: Run) -> Tree:
        """All that `train_hf.py` is told for a run."""
        settings, options, starts = self.settings(run.row), self.options, self.starts(run)
        if starts:
            first, *others = (str(self.folder(start) / "model") for start in starts)
            settings |= {"model_name_or_path": first, **({"average_with": others} if others else {})}
        else:
            settings["audio_model_name_or_path"] = options.audio_encoder
            settings["text_model_name_or_path"] = options.text_encoder
        # States of an encoder that was tuned serve this run alone
        states = self.folder(run) / "states" if starts else options.work_dir / "states"
        settings |= {"cache_encoder_states": str(states), "output_dir": str(self.folder(run) / "model")}
        if settings.get("save_strategy") == "no":  # one that was interrupted after it was saved starts anew
            settings["overwrite_output_dir"] = True
        if not torch.cuda.is_available():  # on a CPU the backward pass of the fused kernel is several times slower
            settings["attn_implementation"] = "eager"
        data_dir = self.data_folder(run.row)
        return {**settings, "data_dir": data_dir, "seed": run.seed, "data_seed": DATA_SEED, "disable_tqdm": True}

    def data_folder(self, row: Row) -> str:
        """`--data_dir` for "speech", `--spoken_text_dir` for "spoken". "mix", which is both, "wide", the first and
        `--wide_data_dir`, and "fold", the first, are written as listings; without `row.leaves_out` if there is any."""
        if row.data in ("speech", "spoken"):
            return self.options.data_dir if row.data == "speech" else self.options.spoken_text_dir
        splits, label_names = read_splits(self.options.data_dir)
        if row.data in ("mix", "wide"):
            flag = "wide_data_dir" if row.data == "wide" else "spoken_text_dir"
            others, other_names = read_splits(getattr(self.options, flag))
            if other_names != label_names:
                raise ValueError(f"--data_dir has the labels {label_names}, --{flag} {other_names}")
            splits = {name: [*clips, *others.get(name, [])] for name, clips in splits.items()}
            if not row.leaves_out:
                return write_listing(self.options.work_dir / row.data, splits, label_names)
        column, value = next(iter(row.leaves_out.items()))  # a second one names the same clips
        folder = self.options.work_dir / "folds" / slug(f"{row.data} {column} {value}")
        fold = hold_out_speakers(splits, value) if column == "speakers" else hold_out(splits, column, value)
        return write_listing(folder, fold, label_names)

    def fingerprint(self, row: Row) -> str:
        """A hash of everything chosen for a row, and for the rows that it needs. Folders count by their last name."""
        places = [self.options.data_dir, self.options.audio_encoder, self.options.text_encoder]
        places += [self.options.wide_data_dir] if row.data == "wide" else []
        chosen = {
            "settings": self.settings(row) if row.recipe else dict(row.changes),
            "row": [row.function, row.data, dict(row.leaves_out), row.averages, row.common_start],
            "places": [Path(place).name for place in places],
            "needs": [self.fingerprint(needed.row) for needed in self.needed(Run(row, 0))],
        }
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]

    def result(self, run: Run) -> Tree | None:
        """What a run measured, if it is finished and was made with the settings of today."""
        path = self.folder(run) / "result.json"
        result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return result if result and result["settings"] == self.fingerprint(run.row) else None

    def plan(self, names: Iterable[str]) -> list[Run]:
        """What is still to be done for some rows, in an order in which everything comes after what it needs."""
        todo: dict[Run, None] = {}

        def visit(run: Run, needs_model: bool = False) -> None:
            has_model = (self.folder(run) / "model" / "config.json").is_file()
            if run in todo or (self.result(run) is not None and (has_model or not needs_model)):
                return
            for needed in self.needed(run):
                visit(needed, needed.row.name == run.row.starts_from)
            todo[run] = None

        for row in (self.rows[name] for name in names):
            for seed in [0] if row.once else self.options.seeds:
                visit(Run(row, seed))
        return list(todo)

    def execute(self, runs: Sequence[Run]) -> list[str]:
        """Do runs one after the other; returns what to tell of those that failed. A run whose needs failed waits."""
        failed: dict[str, str] = {}
        for number, run in enumerate(runs, 1):
            lost = [str(needed) for needed in self.needed(run) if str(needed) in failed]
            start = time.perf_counter()
            try:
                if lost:
                    raise RuntimeError(f"not done, because this failed: {lost[0]}")
                told = describe(do_run(self, run))
            except Exception as error:  # the other rows do not depend on it; it is reported at the end
                logging.get_logger(__name__).error(f"{run} failed", exc_info=not lost)
                told = failed[str(run)] = f"{type(error).__name__}: {error}"
            print(f"[{number}/{len(runs)}] {run}: {told}, {time.perf_counter() - start:.0f} s", flush=True)
        return [f"{name}: {reason}" for name, reason in failed.items()]


@contextlib.contextmanager
def alone_in(work_dir: Path) -> Iterator[None]:
    """Keep other commands out of a folder of runs: each removes what is not finished there, and does it anew."""
    try:
        lock = locked(work_dir / ".lock", PATIENCE)
    except Timeout:
        raise ValueError(
            f"--work_dir {work_dir}: another command works there. Wait until it has ended, or give another folder."
        ) from None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def exit_status(failed: Sequence[str]) -> int:
    """Tell of the runs that failed, as `Study.execute` returns them: 1 if there are any."""
    if failed:
        print("\nNot all runs could be done:\n" + "\n".join(failed), file=sys.stderr)
    return 1 if failed else 0


def slug(name: str) -> str:
    """A name as part of a path."""
    return re.sub(r"\W+", "_", name.lower()).strip("_")


def describe(result: Tree) -> str:
    """The scores of a run in a few words."""
    names = {"model": "weighted F1", "audio_only": "audio alone"}
    scores = {line["score"]: line["weighted_f1"] for line in result["scores"] if line["group"] == "all"}
    return ", ".join(f"{names[key]} {value:.3f}" for key, value in scores.items() if key in names)


# --------------------------------------------------------------------------------------------------------- 4. the runs


def whisper(study: Study, run: Run) -> Tree:
    """As many seconds of training as the rows had that this one needs."""
    seconds = sum((study.result(needed) or {})["training_seconds"] for needed in study.needed(run))
    return baselines.whisper(study.data_folder(run.row), study.options.audio_encoder, seconds, run.seed)


def train(study: Study, run: Run) -> Tree:
    """`python train_hf.py recipe.json`, with the recipe that is written into the folder of the run."""
    folder = study.folder(run)
    model, recipe = folder / "model", folder / "recipe.json"
    recipe.write_text(json.dumps(study.recipe(run), indent=4) + "\n", encoding="utf-8")
    train_hf.main([str(recipe)])
    stored = json.loads((model / RESULTS_NAME).read_text(encoding="utf-8"))
    lines: Lines = []
    for name, values in stored["test"].items():
        groups = {"all": values}
        for column in ("corpus", "language"):
            groups |= {f"{column}={group}": own for group, own in values.get(f"by_{column}", {}).items()}
        for group, own in groups.items():
            clips = own["clips"] if group == "all" else own["count"]
            bounds = dict(zip(BOUNDS, own["weighted_f1_interval"], strict=True))
            lines.append({"score": name, "group": group, "clips": clips, **{m: own[m] for m in METRICS}, **bounds})
    whole = next(part for part in stored["parameters"] if part["part"] == "all")
    result = {
        "training_seconds": stored["training"]["train_runtime"],
        "validation_weighted_f1": stored["validation"]["model"]["weighted_f1"],
        **{"parameters": whole["parameters"], "trainable_parameters": whole["trainable"]},
        "scores": lines,
        "environment": stored["environment"],
        "dtype": str(autocast_of(model) or torch.float32).removeprefix("torch."),
    }
    if run.row.examine:
        examined = examine_checkpoint(model, study.data_folder(run.row))
        seen = {line["score"] for line in examined}
        result["scores"] = [line for line in lines if line["score"] not in seen] + examined
    for leftover in (*model.glob("checkpoint-*"), folder / "states", *([] if run.row.keep else [model])):
        shutil.rmtree(leftover, ignore_errors=True)
    return result


def examine(study: Study, run: Run) -> Tree:
    """`examine_checkpoint` for the checkpoint of another row."""
    return {"scores": examine_checkpoint(study.folder(study.starts(run)[0]) / "model", study.data_folder(run.row))}


def compact(study: Study, run: Run) -> Tree:
    """The checkpoint of another row as `export_hf.py` makes it small, run by onnxruntime through the pipeline."""
    splits, label_names = load_emotion_dataset(study.data_folder(run.row))
    texts, test = [text for text in splits["train"]["text"] if text], splits["test"]
    checkpoint, lines = study.folder(study.starts(run)[0]) / "model", []
    with tempfile.TemporaryDirectory(dir=study.folder(run)) as folder:
        report = export_checkpoint(checkpoint, folder, texts=texts, overwrite=True, **run.row.changes)
        classify = MMSERPipeline.from_onnx(folder, top_k=1)
        for name, transcripts in (("model", test["text"]), ("audio_only", [None] * len(test))):
            clips = [{"path": path, "text": text} for path, text in zip(test["audio"], transcripts, strict=True)]
            predicted = [label_names.index(labels[0]["label"]) for labels in classify(clips, batch_size=16)]
            lines += score(name, np.array(predicted), test["labels"], label_names, groups_of(test))
    megabytes, trimmed = report.sizes["model.onnx"] / 1e6, report.trimmed
    parameters = trimmed.parameters_after if trimmed else None
    return {"parameters": parameters, "megabytes": megabytes, "scores": lines, "dtype": run.row.changes["dtype"]}


FUNCTIONS: dict[str, Callable[[Study, Run], Tree]] = {
    "majority": lambda study, run: baselines.majority(study.data_folder(run.row)),
    "hand-made features": lambda study, run: baselines.probe_hand_made_features(study.data_folder(run.row)),
    "linear probe": lambda study, run: baselines.probe_encoder(
        study.data_folder(run.row), study.options.audio_encoder, study.options.text_encoder
    ),
    "whisper": whisper,
    "examine": examine,
    "compact": compact,
}


def do_run(study: Study, run: Run) -> Tree:
    """Do one run and write its `result.json`. What an earlier attempt left in its folder is removed."""
    folder = study.folder(run)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = (FUNCTIONS[run.row.function] if run.row.function else train)(study, run)
    measured_with = result.get("environment") or environment()
    result["environment"] = {**measured_with, "dtype": result.pop("dtype", "float32")}
    result = {"settings": study.fingerprint(run.row), "seed": None if run.row.once else run.seed, **result}
    partial = folder / "result.partial"
    partial.write_text(strict_json(result), encoding="utf-8")
    partial.replace(folder / "result.json")  # only a finished run has the name
    return result


# ------------------------------------------------------------------------------------------- 5. results, command line


def collect(study: Study) -> tuple[Tree, Lines]:
    """The summary and the lines of the CSV file, of all runs that are finished with the settings of today."""
    rows, lines, environments = [], [], []
    for row in study.rows.values():
        seeds = sorted(int(path.name[4:]) for path in study.folder(Run(row, 0)).parent.glob("seed*"))
        results = [result for seed in seeds if (result := study.result(Run(row, seed)))]
        for result in results:
            whole = {name: result.get(name) for name in RUN_COLUMNS}
            for line in result["scores"]:
                if row.table != "parts" or line["group"] == "all":
                    name = {"table": row.table, "row": row.name, "seed": result["seed"]}
                    share = {"audio_share": line.get("audio_share")}
                    lines.append({**name, **line, **share, **whole})
                    whole = {}
            environments += [result["environment"]] if result["environment"] not in environments else []
        entry: Tree = {"table": row.table, "row": row.name, "seeds": [result["seed"] for result in results]}
        for score_name, key in (("model", "weighted_f1"), ("audio_only", "audio_alone_weighted_f1")):
            lines_of = [line for result in results for line in result["scores"] if line["group"] == "all"]
            values = [line["weighted_f1"] for line in lines_of if line["score"] == score_name]
            entry |= {key: float(np.mean(values))} if values else {}
        entry |= {"starts_from": row.starts_from, "averages": row.averages} if row.starts_from else {}
        entry |= {"common_start": True} if row.common_start else {}
        entry |= {"leaves_out": dict(row.leaves_out)} if row.leaves_out else {}
        details = [result["details"] for result in results if "details" in result]
        rows.append(entry | ({"details": details} if details else {}))
    places = ("data_dir", "audio_encoder", "text_encoder")
    data = {name: Path(getattr(study.options, name)).name for name in places}
    return {"environments": environments, "data": data, "rows": rows}, lines


def parse_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="real speech: train, validation and test with metadata.csv")
    parser.add_argument("--audio_encoder", help="Hub name or folder")
    parser.add_argument("--text_encoder", help="Hub name or folder")
    parser.add_argument("--spoken_text_dir", help="of benchmarks/speak_text.py; without it those rows are left out")
    parser.add_argument("--wide_data_dir", help="more to train on (ser4wide); without it those rows are left out")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/real_speech"), help="for runs and encoder states")
    parser.add_argument("--recipes", type=Path, default=ROOT / "recipes", help=f"has {', '.join(RECIPES)}")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="GLOB", help="rows with a name like one of these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--list", action="store_true", help="show rows and what is finished, and stop")
    parser.add_argument("--report_only", action="store_true", help="no runs, only the tables of what is finished")
    return parse_arguments(parser, "real_speech", arguments, ("data_dir", "audio_encoder", "text_encoder"))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status: 1 if a run failed."""
    options = parse_flags(arguments)
    if options.from_results:
        report, lines = read_results(options.output)
        publish(make_tables(report, lines), report, lines, options)
        return 0
    torch.set_num_threads(options.threads)
    study = Study(options)
    rows = [row for row in study.rows.values() if row.table in options.tables]
    chosen = [row for row in rows if any(fnmatch.fnmatchcase(row.name, glob) for glob in options.rows)]
    if not chosen:
        raise ValueError(f"--rows {' '.join(options.rows)} fits no row of {', '.join(options.tables)}; see --list")
    failed: list[str] = []
    if not (options.list or options.report_only):
        with alone_in(options.work_dir):
            failed = study.execute(study.plan(row.name for row in chosen))
    report, lines = collect(study)
    if options.list:
        seeds = {row["row"]: ", ".join(map(str, row["seeds"])) for row in report["rows"]}
        columns = [{"table": r.table, "row": r.name, "finished seeds": seeds[r.name], "note": r.note} for r in chosen]
        print(table(columns))
        return 0
    publish(make_tables(report, lines), report, lines, options)
    return exit_status(failed)


if __name__ == "__main__":
    sys.exit(main())
