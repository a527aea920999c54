# SPDX-License-Identifier: Apache-2.0
"""Data sets to train and evaluate on: every row is checked, every speaker is in one split.

`load_emotion_dataset` loads training, validation and test data, `load_emotion_split` one table alone.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from configuration_mmser import DEFAULT_LABELS
from mmser.bad_rows import BadRows, rule_of
from mmser.boundary import Reach, of_folder
from mmser.corpora import (
    Source,
    agree_on_labels,
    choose_unknown,
    find_sources,
    read_sources,
    refuse_other_labels,
    table_of_corpora,
)
from mmser.label_map import LabelMap, read_label_map
from mmser.labels import FEW_PER_CLASS, check_labels, choose_label_names, gather_labels, label_id
from mmser.sources import (
    LEFT_OUT,
    OTHER,
    TEXT_COLUMNS,
    DataColumns,
    Record,
    Request,
    find_metadata,
    read_class_folders,
    read_table,
    stream_hub,
)
from mmser.splits import divide_by_speaker
from mmser.table_files import is_table
from mmser.targets import COLUMN, Tasks, no_target, read_targets, target_features
from mmser.votes import normalise_votes, read_votes, vote_columns

logger = logging.get_logger(__name__)
Places = str | os.PathLike | Sequence[str | os.PathLike] | None  # of sources: one, or several
Names = str | Sequence[str] | None  # one for all sources, or one for each


def load_emotion_dataset(
    data_dir: Places = None,
    manifest: Places = None,
    dataset_name: Names = None,
    dataset_config_name: str | None = None,
    *,
    train_split: Names = None,
    validation_split: Names = None,
    test_split: Names = None,
    columns: DataColumns | Sequence[DataColumns] | None = None,
    extra_columns: Sequence[str] = (),
    auxiliary_tasks: Tasks | None = None,
    label_distribution_columns: Sequence[str] | None = None,
    label_map: str | os.PathLike | None = None,
    label_names: Sequence[str] | None = None,
    checkpoint_names: Sequence[str] | None = None,
    streaming: bool = False,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.15,
    seed: int = 42,
    allow_speaker_overlap: bool = False,
    on_bad_example: str | BadRows = "error",
    allow_urls: bool = False,
    allow_outside_files: bool = False,
    for_training: bool = True,
) -> tuple[datasets.DatasetDict | datasets.IterableDatasetDict, list[str]]:
    """Load the training, validation and test data from one source or several, and check every row.

    Args:
        data_dir: folder with `<split>/metadata.csv` (or `.tsv`, `.jsonl`), `<split>.csv`, one `metadata.csv` with an
            optional `split` column, or `<split>/<class>/<clip>` or `<class>/<clip>`; or a table as for `manifest`.
        manifest: a CSV, TSV or JSONL file with an optional `split` column. Its paths are relative to its folder.
        dataset_name, dataset_config_name: data set on the Hub (or a folder that `datasets.load_dataset` reads).
        train_split, validation_split, test_split: names of the splits; default: their usual names.
        columns: names of the columns; of several sources, here as for splits, the same or a list with one for each.
        extra_columns: more columns to keep, as strings; names of our own columns, as `corpus`, mean these.
        auxiliary_tasks: tasks beside the emotion, as in `MMSERConfig`, whose targets are read where there are columns.
        label_distribution_columns: columns with votes or shares of the classes, whose majority is the label of a row.
        label_map: table with the columns corpus, label and target: see `LabelMap`.
        label_names: class names in the order of their ids; default: see `choose_label_names`.
        checkpoint_names: class names of the checkpoint that is trained further; kept if the data's are among them.
        streaming: read the Hub data set while training. Nothing is split or checked across rows then.
        validation_fraction, test_fraction: shares of the speakers (with several sources: of each corpus) to hold out
            of the training data where no source has a validation split; one for test only if none has that either.
        seed: seed of the division.
        allow_speaker_overlap: accept a speaker or the same audio in two splits, or a random division of data without
            speakers.
        on_bad_example: "error", "skip" to leave bad rows out, or a `BadRows`; but an unknown label is an error.
        allow_urls, allow_outside_files: let the data name addresses, and files outside of their folder (see `Reach`).
        for_training: False: messages speak of the evaluation of a model, whose `label_names` are given.

    Returns:
        The splits and the label names; with a label map that makes clips `other`, also a split `other`, of clips of
        none of the classes (label -1). Columns: `labels` (int), `row` (where the row is, for messages) and, if the
        source has them, `audio` (path, or `{"bytes", "path"}` from the Hub; not decoded), `text` (`""` = unknown),
        `speaker`, `language`, `corpus`, `sex`, the `extra_columns`, `class_shares` (shares of the classes), and
        `auxiliary` (a dict by task: class ids or -100, numbers or nan).

    Raises:
        ValueError: if a source, a column, a label or a row is not usable, or a speaker or a clip is in two splits.
    """
    rule = _check_arguments(validation_fraction, test_fraction, on_bad_example, label_map, label_distribution_columns)
    given = {"train": train_split, "validation": validation_split, "test": test_split}
    places = {"data_dir": data_dir, "manifest": manifest, "dataset_name": dataset_name}
    sources = find_sources(places, dataset_config_name, columns, given)
    votes = vote_columns(label_distribution_columns)
    tasks, reach = auxiliary_tasks or {}, Reach(allow_urls, allow_outside_files)
    request = Request(sources[0].columns, extra_columns, sources[0].split_names, tasks, votes=votes, reach=reach)
    if streaming:
        _check_stream(sources, label_map)
        name, config = sources[0].location, sources[0].config_name
        return stream_hub(name, config, request, label_names, rule.on_bad_example, checkpoint_names)
    joined = _join_sources(sources, request, label_map, rule)
    label_names = _choose_classes(joined, label_names, checkpoint_names, for_training, not rule.ends_run)
    usable = _check_records(joined.records, label_names, request.problems, tasks=request.tasks)
    rule.report(request.problems, loaded=len(usable) + len(request.problems))
    fractions = {"test": test_fraction, "validation": validation_fraction}
    splits = _divide(joined, usable, label_names, fractions, seed, allow_speaker_overlap, for_training)
    table = _to_dataset(joined.records, extra_columns, joined.audio, request.tasks)
    return datasets.DatasetDict({split: table.select(indices) for split, indices in splits.items()}), label_names


@dataclass
class _Joined:
    """All records of all sources, and what is known of them together."""

    sources: list[Source]
    records: list[Record]
    audio: datasets.Dataset | None  # a row for each record, if a source embeds it
    class_names: list[str] | None  # that the data declare
    label_map: LabelMap | None

    @property
    def is_plain(self) -> bool:
        """Whether there is one source, whose labels are taken as they are."""
        return len(self.sources) == 1 and self.label_map is None

    @property
    def known(self) -> list[Record]:
        """Those that are to have a class."""
        return [record for record in self.records if not record.role]


def _join_sources(
    sources: list[Source], request: Request, label_map: str | os.PathLike | None, rule: BadRows
) -> _Joined:
    """Read all sources, with their votes, and map their labels."""
    mapping = None if label_map is None else read_label_map(label_map)  # first: reading may take long
    records, audio, class_names = read_sources(sources, request)
    class_names = _read_all_votes(records, request) or class_names
    if rule.ends_run:
        rule.report(request.problems)  # a row that was not read may hold the only clip of a class
    if mapping is not None:
        mapping.apply(records)
        class_names = None  # some may have got other names
    return _Joined(sources, records, audio, class_names, mapping)


def _choose_classes(
    joined: _Joined,
    given: Sequence[str] | None,
    checkpoint_names: Sequence[str] | None,
    for_training: bool,
    may_skip: bool,
) -> list[str]:
    """Choose the class names (see `choose_label_names`), and check that each label has its class."""
    records = joined.known
    if not records:
        raise ValueError(f"the label map leaves no clip of a class in {_named(joined.sources)}")
    agree_on_labels(records, given)
    found = gather_labels(_labels_of(records))
    training = gather_labels(_labels_of([record for record in records if record.split == "train"]))
    label_names = choose_label_names(given, joined.class_names, found, checkpoint_names)
    if joined.label_map is not None:
        joined.label_map.check_targets(label_names)
    if not joined.is_plain:
        refuse_other_labels(records, label_names)
    is_found = given is None and not joined.class_names
    are_given = given is not None
    check_labels(found, training or None, label_names, is_found, for_training, are_given, may_skip)
    return label_names


def _divide(
    joined: _Joined,
    usable: Sequence[int],
    label_names: Sequence[str],
    fractions: dict[str, float],
    seed: int,
    allow_speaker_overlap: bool,
    for_training: bool,
) -> dict[str, list[int]]:
    """Split -> indices of its clips (see `divide_by_speaker`); `other` -> clips of none of the classes, if any."""
    records = joined.records
    known = [index for index in usable if not records[index].role]
    unknown = [index for index in usable if records[index].role == OTHER]
    by_corpus = len(joined.sources) > 1
    splits = divide_by_speaker(records, known, fractions, seed, allow_speaker_overlap, joined.audio, by_corpus)
    empty = [split for split, indices in splits.items() if not indices]
    if empty or not splits:
        raise ValueError(f"no usable row is left in {_named(joined.sources)} {' '.join(empty)}")
    if for_training:
        _check_held_out(records, splits, label_names)
    if not joined.is_plain:
        logger.info(f"Clips:\n{table_of_corpora(records, splits, unknown, label_names)}")
    if unknown:
        splits[OTHER] = choose_unknown(records, unknown, splits.get("train", []))
    return splits


def _check_held_out(records: Sequence[Record], splits: dict[str, list[int]], label_names: Sequence[str]) -> None:
    """Refuse a division that holds out all training clips of a class, as of a class of one clip or one speaker."""
    training = [record for record in records if record.split == "train" and not record.role]
    if len(training) < FEW_PER_CLASS * len(label_names):
        return
    left = {records[index].labels for index in splits.get("train", [])}
    for label, name in enumerate(label_names):
        taken = {
            split: sum(record.labels == label and record.split == "train" for record in map(records.__getitem__, rows))
            for split, rows in splits.items()
        }
        number = sum(taken.values())
        if number and label not in left:
            where = " and ".join(split for split, count in taken.items() if count)
            what = f"The only clip of {name!r} is" if number == 1 else f"All {number} clips of {name!r} are"
            raise ValueError(
                f"{what} held out for {where}, as whole speakers are, and nothing is left to train on. Add clips of "
                f"{name!r} by more speakers, join it with another class or leave it out by --label_map, or give "
                "splits of your own."
            )


def _named(sources: Sequence[Source]) -> str:
    return ", ".join(source.location for source in sources)


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
    on_bad_example: str | BadRows = "error",
    allow_urls: bool = False,
    allow_outside_files: bool = False,
) -> datasets.Dataset:
    """Load one folder (with `metadata.csv`, `.tsv` or `.jsonl`) or one manifest, such as an open-set folder.

    Args:
        path: the folder or the file. A `split` column is ignored. In a folder without metadata, sub-folders are
            classes, and for open-set data loose clips have none.
        columns, extra_columns, on_bad_example, allow_urls, allow_outside_files: as in `load_emotion_dataset`.
        label_names: class names in the order of their ids.
        allow_unknown: open-set data: -1, "unknown" and every name that is not in `label_names` become -1, and so
            does every row if there is no label column. False: the rules of `load_emotion_dataset`.

    Returns:
        The data set, with the columns of `load_emotion_dataset`.

    Raises:
        ValueError: if the file, a column or a row is not usable.
    """
    rule = rule_of(on_bad_example)
    label_names = choose_label_names(label_names)
    path = Path(path)
    reach = Reach(allow_urls, allow_outside_files)
    request = Request(columns or DataColumns(), extra_columns, needs_labels=not allow_unknown, reach=reach)
    records = read_class_folders(path, request) if path.is_dir() and not any(map(is_table, path.iterdir())) else []
    if not records:
        table, boundary = (find_metadata(path), of_folder(path, reach)) if path.is_dir() else (path, None)
        records = read_table(table, request, root=path.parent, boundary=boundary)
    found = gather_labels((record.label, record.row) for record in records)
    if not allow_unknown:
        check_labels(found, None, label_names)
    usable = _check_records(records, label_names, request.problems, allow_unknown=allow_unknown)
    rule.report(request.problems, loaded=len(usable) + len(request.problems))
    if not usable:
        raise ValueError(f"no usable row is left in {path}")
    return _to_dataset(records, extra_columns).select(usable)


def _check_arguments(
    validation_fraction: float, test_fraction: float, on_bad_example: str | BadRows, label_map: Any, votes: Any
) -> BadRows:
    rule = rule_of(on_bad_example)
    if min(validation_fraction, test_fraction) < 0 or not validation_fraction + test_fraction < 1:
        raise ValueError(
            "validation_fraction and test_fraction must be >= 0 and sum to less than 1, got "
            f"{validation_fraction} and {test_fraction}"
        )
    if label_map is not None and votes is not None:
        raise ValueError("label_map (--label_map) is for one label a row, and not for label_distribution_columns")
    return rule


def _check_stream(sources: Sequence[Source], label_map: Any) -> None:
    if len(sources) > 1 or sources[0].kind != "dataset_name":
        raise ValueError("streaming reads one Hub data set: give one dataset_name (--dataset_name), or no --streaming")
    if label_map is not None:
        raise ValueError("label_map (--label_map) needs all rows before training: leave out --streaming")


def _check_records(
    records: list[Record],
    label_names: Sequence[str],
    problems: list[str],
    allow_unknown: bool = False,
    tasks: Tasks | None = None,
) -> list[int]:
    """
    Give every record the id of its label, and its targets. Return the indices of the usable ones; the rest goes to
    `problems`, and what a label map leaves out nowhere.
    """
    usable, missing = [], 0
    for index, record in enumerate(records):
        if record.role == LEFT_OUT or (record.cells and record.votes is None):
            continue  # the second was reported when its votes were read
        try:
            if record.votes is not None:
                shares = normalise_votes(record.votes, record.label, label_names, record.row)
                record.class_shares, record.labels = shares
            else:
                record.labels = label_id(record.label, label_names, record.row, allow_unknown or record.role == OTHER)
            record.targets = read_targets(record.written_targets, tasks or {}, record.row)
            if record.audio and "://" not in record.audio and not os.path.isfile(record.audio):
                if os.path.exists(record.audio):  # a device or a pipe would be read without an end
                    raise ValueError(f"{record.row}: {record.audio} is no file, but a folder, a device or a pipe")
                missing += 1
                raise ValueError(f"{record.row}: audio file {record.audio} does not exist")
            if not (record.audio or record.text or record.is_embedded):
                raise ValueError(f"{record.row} has neither audio nor text")
        except ValueError as error:
            problems.append(str(error))
        else:
            usable.append(index)
    if missing and not usable:  # said of the first one, as not all of them are shown
        first = next(number for number, problem in enumerate(problems) if problem.endswith("does not exist"))
        problems[first] += ". None of the files is there: paths are relative to the folder of the table"
    return usable


def _to_dataset(
    records: list[Record],
    extra_columns: Sequence[str],
    audio: datasets.Dataset | None = None,
    tasks: Tasks | None = None,
) -> datasets.Dataset:
    """All records as one table, without those of our own columns that are empty everywhere and were not asked for."""
    values = {name: [getattr(record, name) for record in records] for name in TEXT_COLUMNS}
    if audio is None:
        values = {"audio": [record.audio for record in records], **values}
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
