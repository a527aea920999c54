# SPDX-License-Identifier: Apache-2.0
"""Data sets to train and evaluate on: every row is checked, every speaker is in one split.

`load_emotion_dataset` loads training, validation and test data, `load_emotion_split` one table alone.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from configuration_mmser import DEFAULT_LABELS
from mmser.bad_rows import check_on_bad_example, report_problems
from mmser.labels import check_labels, choose_label_names, gather_labels, label_id
from mmser.sources import (
    SPLIT_NAMES,
    TEXT_COLUMNS,
    DataColumns,
    Record,
    Request,
    find_metadata,
    read_class_folders,
    read_folder,
    read_hub,
    read_table,
    stream_hub,
)
from mmser.splits import divide_by_speaker
from mmser.table_files import is_table
from mmser.targets import COLUMN, Tasks, no_target, read_targets, target_features
from mmser.votes import normalise_votes, read_votes, vote_columns


def load_emotion_dataset(
    data_dir: str | os.PathLike | None = None,
    manifest: str | os.PathLike | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    *,
    train_split: str | None = None,
    validation_split: str | None = None,
    test_split: str | None = None,
    columns: DataColumns | None = None,
    extra_columns: Sequence[str] = (),
    auxiliary_tasks: Tasks | None = None,
    label_distribution_columns: Sequence[str] | None = None,
    label_names: Sequence[str] | None = None,
    checkpoint_names: Sequence[str] | None = None,
    streaming: bool = False,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.15,
    seed: int = 42,
    allow_speaker_overlap: bool = False,
    on_bad_example: str = "error",
    for_training: bool = True,
) -> tuple[datasets.DatasetDict | datasets.IterableDatasetDict, list[str]]:
    """Load the training, validation and test data from one of three kinds of source, and check every row.

    Args:
        data_dir: folder with `<split>/metadata.csv` (or `.tsv`, `.jsonl`), `<split>.csv`, or one `metadata.csv` at
            the top with an optional `split` column. Audio paths are relative to the file that lists them. Without
            any such table: `<split>/<class>/<clip>`, or `<class>/<clip>`.
        manifest: one CSV, TSV or JSONL file with an optional `split` column.
        dataset_name, dataset_config_name: data set on the Hub (or a folder that `datasets.load_dataset` reads).
        train_split, validation_split, test_split: names of the splits in the source; default: their usual names.
        columns: names of the columns.
        extra_columns: more columns to keep, as strings under their own names. The name of one of our own columns, such
            as `corpus`, means that one.
        auxiliary_tasks: tasks beside the emotion, as in `MMSERConfig`: the targets of those of which the source has a
            column are read from it. An empty cell is no target.
        label_distribution_columns: columns with votes or shares of the classes, whose majority is the label of a row.
        label_names: class names in the order of their ids; default: those that the Hub data set declares, else the
            names in the rows (see `choose_label_names`).
        checkpoint_names: class names of the checkpoint that is trained further; kept if the data's are among them.
        streaming: read the Hub data set while training. Nothing is split or checked across rows then.
        validation_fraction, test_fraction: shares, of the speakers, to hold out of the training data where the source
            has no validation split; one for test only if it has no test split either.
        seed: seed of the division.
        allow_speaker_overlap: accept a speaker or the same audio in two splits, or a random division of data without
            speakers.
        on_bad_example: "error", or "skip" to leave bad rows out and count them; but an unknown label is an error.
        for_training: False: messages speak of the evaluation of a model, whose `label_names` are given.

    Returns:
        The splits and the label names. Columns: `labels` (int), `row` (where the row is, for messages) and, if the
        source has them, `audio` (path, or `{"bytes", "path"}` from the Hub; not decoded), `text` (`""` = unknown),
        `speaker`, `language`, `corpus`, `sex`, the `extra_columns`, `class_shares` (shares of the classes), and
        `auxiliary` (a dict by task: class ids or -100, numbers or nan).

    Raises:
        ValueError: if the source, a column, a label or a row is not usable, or a speaker or a clip is in two splits.
    """
    fractions = {"test": test_fraction, "validation": validation_fraction}
    _check_arguments({"data_dir": data_dir, "manifest": manifest, "dataset_name": dataset_name}, fractions, streaming)
    check_on_bad_example(on_bad_example)
    given = {"train": train_split, "validation": validation_split, "test": test_split}
    names = {split: (name,) if name else SPLIT_NAMES[split] for split, name in given.items()}
    votes = vote_columns(label_distribution_columns)
    request = Request(columns or DataColumns(), extra_columns, names, auxiliary_tasks or {}, votes=votes)
    if dataset_name is not None and streaming:
        return stream_hub(dataset_name, dataset_config_name, request, label_names, on_bad_example, checkpoint_names)
    records, audio, class_names = _read_source(data_dir, manifest, dataset_name, dataset_config_name, request)
    if on_bad_example == "error":
        report_problems(request.problems, on_bad_example)  # a row that was not read may hold the only clip of a class
    label_names = _choose_classes(records, label_names, class_names, checkpoint_names, for_training)
    usable = _check_records(records, label_names, request.problems, is_embedded=audio is not None, tasks=request.tasks)
    report_problems(request.problems, on_bad_example)
    splits = divide_by_speaker(records, usable, fractions, seed, allow_speaker_overlap, audio)
    empty = [split for split, indices in splits.items() if not indices]
    if empty or not splits:
        raise ValueError(f"no usable row is left in {data_dir or manifest or dataset_name} {' '.join(empty)}")
    table = _to_dataset(records, extra_columns, audio, request.tasks)
    return datasets.DatasetDict({split: table.select(indices) for split, indices in splits.items()}), label_names


def _choose_classes(
    records: list[Record],
    given: Sequence[str] | None,
    class_names: Sequence[str] | None,
    checkpoint_names: Sequence[str] | None,
    for_training: bool,
) -> list[str]:
    """Choose the class names (see `choose_label_names`), and check that each label has its class."""
    found = gather_labels(_labels_of(records))
    training = gather_labels(_labels_of([record for record in records if record.split == "train"]))
    label_names = choose_label_names(given, class_names, found, checkpoint_names)
    is_found = given is None and not class_names
    check_labels(found, training or None, label_names, is_found, for_training, are_given=given is not None)
    return label_names


def _read_source(
    data_dir: Any, manifest: Any, dataset_name: str | None, config_name: str | None, request: Request
) -> tuple[list[Record], datasets.Dataset | None, list[str] | None]:
    """The records of the source that is given with their votes, its embedded audio, and the names that it declares."""
    audio = class_names = None
    if dataset_name is not None:
        records, audio, class_names = read_hub(dataset_name, config_name, request)
    elif data_dir is not None:
        records = read_folder(Path(data_dir), request)
    else:
        records = read_table(Path(str(manifest)), request)
    return records, audio, _read_all_votes(records, request) or class_names


def _read_all_votes(records: list[Record], request: Request) -> list[str] | None:
    """Read the votes of all records. Return the classes that have a column of their own, if there are such."""
    if not request.votes:
        return None
    for record in records:
        try:
            record.votes = read_votes(record.cells, request.votes, record.row)
        except ValueError as error:
            request.problems.append(str(error))
    classes = [name for name in request.votes.values() if name is not None]
    return classes or None


def _labels_of(records: Sequence[Record]) -> Iterator[tuple[Any, str]]:
    """The labels that the rows have, each with its row: one, or all that got a vote."""
    for record in records:
        if not record.cells:
            yield record.label, record.row
        else:
            yield from ((label, record.row) for label, number in (record.votes or {}).items() if number)


def load_emotion_split(
    path: str | os.PathLike,
    *,
    columns: DataColumns | None = None,
    extra_columns: Sequence[str] = (),
    label_names: Sequence[str] = DEFAULT_LABELS,
    allow_unknown: bool = True,
    on_bad_example: str = "error",
) -> datasets.Dataset:
    """Load one folder (with `metadata.csv`, `.tsv` or `.jsonl`) or one manifest, such as an open-set folder.

    Args:
        path: the folder or the file. A `split` column is ignored. In a folder without metadata, sub-folders are
            classes, and for open-set data loose clips have none.
        columns, extra_columns, on_bad_example: as in `load_emotion_dataset`.
        label_names: class names in the order of their ids.
        allow_unknown: open-set data: -1, "unknown" and every name that is not in `label_names` become -1, and so
            does every row if there is no label column. False: the rules of `load_emotion_dataset`.

    Returns:
        The data set, with the columns of `load_emotion_dataset`.

    Raises:
        ValueError: if the file, a column or a row is not usable.
    """
    check_on_bad_example(on_bad_example)
    label_names = choose_label_names(label_names)
    path = Path(path)
    request = Request(columns or DataColumns(), extra_columns, needs_labels=not allow_unknown)
    records = read_class_folders(path, request) if path.is_dir() and not any(map(is_table, path.iterdir())) else []
    records = records or read_table(find_metadata(path) if path.is_dir() else path, request, root=path.parent)
    found = gather_labels((record.label, record.row) for record in records)
    if not allow_unknown:
        check_labels(found, None, label_names)
    usable = _check_records(records, label_names, request.problems, allow_unknown=allow_unknown)
    report_problems(request.problems, on_bad_example)
    if not usable:
        raise ValueError(f"no usable row is left in {path}")
    return _to_dataset(records, extra_columns).select(usable)


def _check_arguments(sources: dict[str, object], fractions: dict[str, float], streaming: bool) -> None:
    if sum(source is not None for source in sources.values()) != 1:
        raise ValueError(
            "give exactly one source of data: data_dir (--data_dir), manifest (--manifest) or dataset_name "
            f"(--dataset_name); got {', '.join(f'{name}={value!r}' for name, value in sources.items())}"
        )
    if min(fractions.values()) < 0 or not sum(fractions.values()) < 1:
        raise ValueError(
            "validation_fraction and test_fraction must be >= 0 and sum to less than 1, got "
            f"{fractions['validation']} and {fractions['test']}"
        )
    if streaming and sources["dataset_name"] is None:
        raise ValueError("streaming reads a Hub data set: give dataset_name (--dataset_name), or no --streaming")


def _check_records(
    records: list[Record],
    label_names: Sequence[str],
    problems: list[str],
    allow_unknown: bool = False,
    is_embedded: bool = False,
    tasks: Tasks | None = None,
) -> list[int]:
    """
    Give every record the id of its label, and its targets. Return the indices of the usable ones; the rest goes to
    `problems`.

    Embedded audio (in a table beside the records) is there for all of them.
    """
    usable = []
    for index, record in enumerate(records):
        if record.cells and record.votes is None:
            continue  # reported when its votes were read
        try:
            if record.votes is not None:
                shares = normalise_votes(record.votes, record.label, label_names, record.row)
                record.class_shares, record.labels = shares
            else:
                record.labels = label_id(record.label, label_names, record.row, allow_unknown)
            record.targets = read_targets(record.written_targets, tasks or {}, record.row)
            if record.audio and "://" not in record.audio and not os.path.exists(record.audio):
                raise ValueError(f"{record.row}: audio file {record.audio} does not exist")
            if not (record.audio or record.text or is_embedded):
                raise ValueError(f"{record.row} has neither audio nor text")
        except ValueError as error:
            problems.append(str(error))
        else:
            usable.append(index)
    return usable


def _to_dataset(
    records: list[Record],
    extra_columns: Sequence[str],
    audio: datasets.Dataset | None = None,
    tasks: Tasks | None = None,
) -> datasets.Dataset:
    """All records as one table, without those of our own columns that are empty everywhere and were not asked for."""
    values = {name: [getattr(record, name) for record in records] for name in ("audio", *TEXT_COLUMNS)}
    kept = {
        name: column for name, column in values.items() if any(column) or (name in extra_columns and name != "audio")
    }
    for name in records[0].extra:
        kept[name] = [record.extra[name] for record in records]
    kept["row"] = [record.row for record in records]
    types: dict[str, Any] = {**dict.fromkeys(kept, datasets.Value("string")), "labels": datasets.Value("int64")}
    numbers: dict[str, list] = {"labels": [record.labels for record in records]}
    if any(record.class_shares for record in records):
        types["class_shares"] = datasets.List(datasets.Value("float64"))
        numbers["class_shares"] = [record.class_shares for record in records]
    read = {task for record in records for task in record.targets}
    present = {task: no_target(kind) for task, kind in (tasks or {}).items() if task in read}
    if present:  # of several tables, some may lack a column
        types |= target_features(tasks or {}, present)
        numbers[COLUMN] = [{**present, **record.targets} for record in records]
    table = datasets.Dataset.from_dict({**kept, **numbers}, features=datasets.Features(types))
    return table if audio is None else datasets.concatenate_datasets([audio, table], axis=1)


def draw_clips(split, limit: int | None, seed: int):
    """Draw at most `limit` clips at random, from a table or a stream; None takes all of them.

    Raises:
        ValueError: if `limit` is less than 1.
    """
    if limit is None:
        return split
    if limit < 1:
        raise ValueError(f"The number of clips to draw must be at least 1, got {limit}.")
    shuffled = split.shuffle(seed=seed)
    if isinstance(split, datasets.IterableDataset):
        return shuffled.take(limit)
    return shuffled.select(range(min(limit, len(shuffled))))
