# SPDX-License-Identifier: Apache-2.0
"""Targets of the tasks beside the emotion: read from the columns of the data, or derived from the emotion.

A table has them in one column, `auxiliary`: for each row a dict with a class id or a number for each task.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from transformers.utils import logging

from auxiliary_mmser import NO_CLASS
from configuration_mmser import REGRESSION, check_names
from mmser.labels import is_missing, label_id

logger = logging.get_logger(__name__)

Tasks = Mapping[str, list[str] | str]  # `auxiliary_tasks` of `MMSERConfig`
COLUMN = "auxiliary"
UNKNOWN = ("unknown", "-1")  # what tables write for a class that nobody knows
SENTIMENT = "sentiment"  # the task that follows from the emotion without a map of one's own
SENTIMENTS = {
    "negative": (
        *("sad", "sadness", "angry", "anger", "fear", "fearful", "disgust", "disgusted", "contempt", "frustrated"),
        *("frustration", "boredom", "bored", "anxious", "anxiety", "pain", "disappointed", "hate"),
    ),
    "neutral": ("neutral", "calm"),
    "positive": (
        *("happy", "happiness", "joy", "joyful", "excited", "excitement", "amused", "amusement", "love", "proud"),
        *("pride", "pleasure", "relief", "content"),
    ),
}


def no_target(kind: list[str] | str) -> int | float:
    """The target of a clip that has none."""
    return math.nan if kind == REGRESSION else NO_CLASS


def read_target(written: Any, task: str, kind: list[str] | str, row: str) -> int | float:
    """
    The class id or the number that a cell holds; `no_target` for an empty one.

    Args:
        written: as it is in the table.
        task, kind: the name of the task, and its classes or "regression".
        row: where the cell is, for messages.
    Raises:
        ValueError: naming the row and what is allowed.
    """
    text = "" if written is None else str(written).strip()
    if is_missing(text):
        return no_target(kind)
    if kind == REGRESSION:
        try:
            number = float(text)
        except ValueError:
            number = math.inf
        if not math.isfinite(number):
            raise ValueError(f"{row}: {task} must be a number, or empty where it is not known, got {text!r}")
        return number
    if text.casefold() in UNKNOWN and text.casefold() not in (name.casefold() for name in kind):
        return NO_CLASS
    try:
        return label_id(text, kind, row)
    except ValueError as error:
        raise ValueError(
            f"{row}: {task} must be one of {', '.join(kind)}, or empty where it is not known, got {text!r}"
        ) from error


def read_targets(written: Mapping[str, Any], tasks: Tasks, row: str) -> dict[str, int | float]:
    """`read_target` for the cells of one row, by task."""
    return {task: read_target(cell, task, tasks[task], row) for task, cell in written.items()}


def derive_targets(
    splits: Mapping[str, datasets.Dataset | datasets.IterableDataset],
    label_names: Sequence[str],
    tasks: Tasks,
    label_maps: Mapping[str, Mapping[str, Any]] | None = None,
    has_default: bool = True,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """
    Add the targets of the tasks that no column gives and that follow from the emotion.

    Args:
        splits: of `load_emotion_dataset` with `auxiliary_tasks`.
        label_names: in the order of the class ids.
        tasks: name -> list of classes, or "regression".
        label_maps: task -> emotion -> class or number. An emotion that is not in it has no target.
        has_default: a task `sentiment` with the classes negative, neutral and positive needs no map: `SENTIMENTS`.

    Returns:
        The splits, and the maps that were used, for `MMSERConfig.auxiliary_label_maps`.

    Raises:
        ValueError: a map for another emotion.
    """
    maps = {task: dict(targets) for task, targets in (label_maps or {}).items()}
    if not tasks and not maps:  # not to look into a stream
        return dict(splits), {}
    check_names(maps, tasks, "task of `auxiliary_tasks`, but of `auxiliary_label_maps`")
    for task, targets in maps.items():
        unknown = [label for label in targets if label not in label_names]
        if unknown:
            raise ValueError(
                f"auxiliary_label_maps: {task} is given for {unknown[0]!r}, which is none of the classes "
                f"{', '.join(label_names)}"
            )
    if has_default and SENTIMENT in tasks and SENTIMENT not in maps and set(tasks[SENTIMENT]) == set(SENTIMENTS):
        maps[SENTIMENT] = {
            label: sentiment
            for label in label_names
            for sentiment, emotions in SENTIMENTS.items()
            if label.strip().casefold() in emotions
        }
    read = {task for split in splits.values() for task in _tasks_of(split)}
    used = {task: targets for task, targets in maps.items() if task not in read and targets}
    for task, targets in used.items():
        logger.info(f"{task} has no column and follows from the emotion: {targets}")
        if without := [label for label in label_names if label not in targets]:
            logger.warning(f"{task} of {', '.join(without)} is not known: such clips do not count for it")
    return {name: _with_derived(split, label_names, tasks, used) for name, split in splits.items()}, used


def _tasks_of(split: datasets.Dataset | datasets.IterableDataset) -> list[str]:
    if isinstance(split, datasets.Dataset):
        return list(split.features[COLUMN]) if COLUMN in split.column_names else []
    return list(next(iter(split)).get(COLUMN) or {})


def _with_derived(split: Any, label_names: Sequence[str], tasks: Tasks, maps: Mapping[str, Mapping[str, Any]]) -> Any:
    if not maps:
        return split

    def derive(label: int | None, others: dict | None) -> dict[str, int | float]:
        name = label_names[label] if label is not None and label >= 0 else ""
        cells = {task: targets.get(name) for task, targets in maps.items()}
        return {**(others or {}), **read_targets(cells, tasks, name)}

    if not isinstance(split, datasets.Dataset):
        return split.map(lambda row: {COLUMN: derive(row["labels"], row.get(COLUMN))})
    earlier = split[COLUMN] if COLUMN in split.column_names else [None] * len(split)
    rows = [derive(label, others) for label, others in zip(split["labels"], earlier, strict=True)]
    rest = split.remove_columns(COLUMN) if COLUMN in split.column_names else split
    table = datasets.Dataset.from_dict({COLUMN: rows}, features=target_features(tasks, rows[0]))
    return datasets.concatenate_datasets([rest, table], axis=1)


def target_features(tasks: Tasks, present: Any) -> datasets.Features:
    """The type of the column of targets with the tasks that are `present`."""
    types = {task: datasets.Value("float64" if tasks[task] == REGRESSION else "int64") for task in tasks}
    return datasets.Features({COLUMN: {task: kind for task, kind in types.items() if task in present}})


def split_targets(split: datasets.Dataset | datasets.IterableDataset) -> dict[str, list]:
    """The targets of all clips by task; empty for a stream, or a table without any."""
    if not isinstance(split, datasets.Dataset) or COLUMN not in split.column_names:
        return {}
    rows = split[COLUMN]
    return {task: [row[task] for row in rows] for task in split.features[COLUMN]}


def check_targets(split: datasets.Dataset | datasets.IterableDataset, tasks: Tasks) -> None:
    """
    Raise ValueError for a task of which no training clip has a target; log how many have one. A stream is not read.
    """
    if not isinstance(split, datasets.Dataset):
        return
    targets = split_targets(split)
    for task, kind in tasks.items():
        known = [value for value in targets.get(task, []) if value != NO_CLASS and not math.isnan(value)]
        if not known:
            raise ValueError(
                f"no training clip has a target of {task!r}: give the data a column of that name, or let it follow "
                f'from the emotion with --auxiliary_label_maps \'{{"{task}": {{"happy": ...}}}}\''
            )
        if kind == REGRESSION:
            about = f"{min(known):g} to {max(known):g}, mean {sum(known) / len(known):.3g}"
        else:
            counts = Counter(known)
            about = ", ".join(f"{name} {counts[index]}" for index, name in enumerate(kind))
        logger.info(f"{task}: {len(known)} of {len(split)} training clips have a target: {about}")
