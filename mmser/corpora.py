# SPDX-License-Identifier: Apache-2.0
"""Several sources of clips joined to one: each has its own columns, and its labels are made to mean the same.

Read in this order: `find_sources`, `read_sources` (one list of records), `agree_on_labels` and `refuse_other_labels`,
`choose_unknown` (clips of none of the classes), `table_of_corpora` (what came of it).
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from configuration_mmser import DEFAULT_LABELS
from mmser.label_map import FLAG
from mmser.labels import gather_labels, is_no_class, label_id, label_key
from mmser.sources import (
    LEFT_OUT,
    OTHER,
    SPLIT_NAMES,
    DataColumns,
    Record,
    Request,
    read_folder,
    read_hub,
    read_table,
)
from mmser.splits import speaker_key
from mmser.table_files import is_table, near_name
from mmser.tables import format_table

logger = logging.get_logger(__name__)

KINDS = ("data_dir", "manifest", "dataset_name")  # in the order in which sources are joined
Given = Any  # one value, or a sequence of one for each source


@dataclass
class Source:
    """One source of clips, and how to read it."""

    kind: str  # one of `KINDS`
    location: str
    name: str
    columns: DataColumns
    split_names: dict[str, tuple[str, ...]]
    config_name: str | None = None


def as_list(given: Given) -> list:
    """None, one value or several, as a list."""
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def find_sources(
    locations: Mapping[str, Given], config_name: str | None, columns: Given, splits: Mapping[str, Given]
) -> list[Source]:
    """
    The sources, and what each of them is called: by its folder or file, as short as tells it from the others.

    Args:
        locations: kind -> where the sources of this kind are.
        config_name: of the data set on the Hub, if there is one alone.
        columns: a `DataColumns` for all of them, or one for each.
        splits: our name of a split -> its name in all of them, or one name for each; None and "none": the usual ones.
    Raises:
        ValueError: no source, one that is named twice or does not exist, or a number of names that does not fit.
    """
    places = [(kind, str(place)) for kind in KINDS for place in as_list(locations.get(kind))]
    if not places:
        raise ValueError(
            "give a source of data: data_dir (--data_dir), manifest (--manifest) or dataset_name (--dataset_name)"
        )
    if config_name is not None and sum(kind == "dataset_name" for kind, _ in places) != 1:
        raise ValueError(f"dataset_config_name ({config_name}) is of one data set on the Hub: give one dataset_name")
    for kind, place in places:
        if kind == "data_dir" and not Path(place).exists():
            hint = " A data set on the Hub goes to dataset_name (--dataset_name)." if place.count("/") == 1 else ""
            raise ValueError(f"data_dir {place!r} is not a folder.{hint}{near_name(Path(place))}")
    own_columns = _for_each(as_list(columns) or [DataColumns()], len(places), "columns")
    own_splits = {split: _for_each(as_list(name) or [None], len(places), split) for split, name in splits.items()}
    sources = []
    for number, ((kind, place), name) in enumerate(zip(places, _short_names(places), strict=True)):
        given = {split: names[number] for split, names in own_splits.items()}
        split_names = {
            split: SPLIT_NAMES[split] if own is None or own.casefold() == "none" else (own,)
            for split, own in given.items()
        }
        config = config_name if kind == "dataset_name" else None
        sources.append(Source(kind, place, name, own_columns[number], split_names, config))
    return sources


def _for_each(given: list, number: int, what: str) -> list:
    if len(given) not in (1, number):
        raise ValueError(f"{what}: give one name for all {number} sources, or one for each; got {len(given)}")
    return given * number if len(given) == 1 else given


def _short_names(places: Sequence[tuple[str, str]]) -> list[str]:
    """A name for each source: of its folder, or its file; of two with the same name, with the folder above."""
    paths = [
        Path(place) if kind == "dataset_name" and not os.path.exists(place) else Path(place).resolve()
        for kind, place in places
    ]
    paths = [path.parent if is_table(path) and path.stem == "metadata" else path for path in paths]
    twice = [str(path) for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise ValueError(f"the source {twice[0]} is given twice")
    for number in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.with_suffix("").parts[-number:] if is_table(path) else path.parts[-number:])
                 for path in paths]  # fmt: skip
        if len(set(names)) == len(names):
            break
    return names


def read_sources(
    sources: Sequence[Source], request: Request
) -> tuple[list[Record], datasets.Dataset | None, list[str] | None]:
    """
    Read all sources into one list of records.

    With several of them, messages name the source of a row, and a row without a corpus gets the name of its source as
    its corpus: a speaker of that name in another corpus is another speaker.

    Args:
        sources: of `find_sources`.
        request: what to read; the columns and splits are those of each source. It gets the bad rows of all.
    Returns: the records; their audio, if a source embeds it, with a row for each record; the names of the classes, if
        all sources declare the same.
    """
    records: list[Record] = []
    tables: list[tuple[int, datasets.Dataset | None]] = []
    declared: list[list[str] | None] = []
    for source in sources:
        extra = [name for name in request.extra_columns if name != "corpus" or len(sources) == 1]
        own = replace(
            request, columns=source.columns, split_names=source.split_names, extra_columns=extra, problems=[]
        )
        found, audio, class_names = _read_source(source, own)
        prefix = "" if len(sources) == 1 or source.kind == "dataset_name" else f"{source.name}/"
        for record in found:
            record.row, record.source = prefix + record.row, source.name
            if len(sources) > 1:
                record.corpus = record.corpus or source.name
        request.problems += [prefix + problem for problem in own.problems]
        records += found
        tables.append((len(found), audio))
        declared.append(class_names)
    same = declared[0] if all(names == declared[0] for names in declared) else None
    return records, _join_audio(records, tables), same


def _read_source(source: Source, request: Request) -> tuple[list[Record], datasets.Dataset | None, list[str] | None]:
    if source.kind == "dataset_name":
        return read_hub(source.location, source.config_name, request)
    path = Path(source.location)
    is_file = source.kind == "manifest" or (path.is_file() and is_table(path))
    return read_table(path, request) if is_file else read_folder(path, request), None, None


def _join_audio(
    records: Sequence[Record], tables: Sequence[tuple[int, datasets.Dataset | None]]
) -> datasets.Dataset | None:
    """The embedded audio of all records; those of a source of files get a row with their path."""
    if all(table is None for _, table in tables):
        return None
    parts, start = [], 0
    for number, table in tables:
        if table is None:
            paths = [record.audio for record in records[start : start + number]]
            table = datasets.Dataset.from_dict({"audio": paths}).cast_column("audio", datasets.Audio(decode=False))
        parts.append(table)
        start += number
    return datasets.concatenate_datasets(parts)


def agree_on_labels(records: Sequence[Record], known: Sequence[str] | None) -> None:
    """
    See to it that the labels of several sources mean the same.

    The numbers 0, 1, 2, 3 of one source, no more and no less, are the default names where another source has names.

    Args:
        records: those that are to have a class.
        known: names of the classes, of the user or of a model, if there are such.
    Raises:
        ValueError: two sources each have labels of their own that no map and no `known` name explains.
    """
    by_source: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_source[record.source].append(record)
    if len(by_source) < 2:
        return
    labels = {source: _labels_of(own) for source, own in by_source.items()}
    are_numbers = {source: all(key.isdigit() for key in own) for source, own in labels.items() if own}
    if all(are_numbers.values()):
        if known is None:
            logger.warning(f"The labels of all sources are numbers, taken to mean the same in each. {FLAG} maps them.")
        return
    if known is not None:
        return
    for source in [source for source, is_number in are_numbers.items() if is_number]:
        if set(labels[source]) == {str(number) for number in range(len(DEFAULT_LABELS))}:
            logger.info(f"{source}: the labels 0, 1, 2, 3 are taken as {', '.join(DEFAULT_LABELS)}.")
            for record in by_source[source]:
                key = label_key(str(record.label).strip())
                record.label = DEFAULT_LABELS[int(key)] if key.isdigit() else record.label
            labels[source] = _labels_of(by_source[source])
    _refuse_clash(by_source, labels)


def _labels_of(records: Iterable[Record]) -> dict[str, str]:
    """The labels of records, without those that are none: `label_key` -> as it is written first."""
    labels: dict[str, str] = {}
    for label in gather_labels((record.label, record.row) for record in records):
        if not is_no_class(label):
            labels.setdefault(label_key(label), label)
    return labels


def _refuse_clash(by_source: Mapping[str, Sequence[Record]], labels: Mapping[str, Mapping[str, str]]) -> None:
    alone = {}
    for source, records in by_source.items():
        others = {key for other, own in labels.items() if other != source for key in own}
        unmapped = _labels_of(record for record in records if not record.is_mapped)
        if names := sorted(name for key, name in unmapped.items() if key not in others):
            alone[source] = names
    if len(alone) > 1:
        listed = "; ".join(f"only {source} has {', '.join(map(repr, names))}" for source, names in alone.items())
        raise ValueError(
            f"the sources have labels that clash: {listed}. Say with {FLAG} (a table with the columns corpus, label, "
            "target) which of them mean the same, or name all classes with --labels"
        )


def refuse_other_labels(records: Sequence[Record], label_names: Sequence[str]) -> None:
    """
    Raise ValueError for labels that are none of the classes: by source, with what to do, before any row is checked.

    Args:
        records: those that are to have a class.
        label_names: the classes.
    """
    others: dict[str, Counter] = defaultdict(Counter)
    for record in records:
        for label in gather_labels([(record.label, record.row)]):
            try:
                label_id(label, label_names, record.row)
            except ValueError:
                others[record.source][label] += 1
    if others:
        listed = "; ".join(
            f"{source} has {', '.join(f'{label!r} ({count} clips)' for label, count in counts.most_common())}"
            for source, counts in others.items()
        )
        raise ValueError(
            f"labels that are none of {', '.join(label_names)}: {listed}. Map each with {FLAG} (a table with the "
            f"columns corpus, label, target): to one of these, to {OTHER} for the open-set evaluation, or to nothing "
            "to leave its clips out"
        )


def choose_unknown(records: Sequence[Record], unknown: Sequence[int], training: Sequence[int]) -> list[int]:
    """
    The clips of none of the classes that the open-set evaluation takes: those whose speaker is in no training clip.

    Where the speaker of such a clip is not known, its split decides. Where none is left, all are taken.

    Args:
        records: all of them.
        unknown: indices of the clips of none of the classes.
        training: indices of the clips to train on.
    """

    def key(index: int) -> str:
        return speaker_key(records[index].speaker, records[index].corpus)

    heard = {key(index) for index in training if records[index].speaker}
    new = [
        index
        for index in unknown
        if (key(index) not in heard if records[index].speaker else records[index].split != "train")
    ]
    if unknown and len(new) < len(unknown):
        left = f"{len(unknown) - len(new)} are by speakers of training clips and are not used"
        if not new:
            left = "all are by speakers of training clips, whose voices the model knows; they are used all the same"
        logger.warning(f"Of {len(unknown)} clips that {FLAG} maps to {OTHER}, {left}.")
    return new or list(unknown)


def table_of_corpora(
    records: Sequence[Record],
    splits: Mapping[str, Sequence[int]],
    unknown: Sequence[int],
    label_names: Sequence[str],
) -> str:
    """
    How many clips of each class a corpus has in each split, in Markdown.

    Args:
        records: all of them.
        splits: split -> indices of its clips.
        unknown: indices of the clips of none of the classes. They and those left out stand beside the split of the
            source.
        label_names: the classes.
    """
    names = [(split, index, label_names[records[index].labels]) for split in splits for index in splits[split]]
    names += [(str(records[index].split), index, OTHER) for index in unknown]
    names += [(str(record.split), index, LEFT_OUT) for index, record in enumerate(records) if record.role == LEFT_OUT]
    counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for split, index, name in names:
        counts[records[index].corpus or records[index].source, split][name] += 1
    columns = [*label_names, OTHER, LEFT_OUT]
    order = list(SPLIT_NAMES)
    rows = [
        {"corpus": corpus, "split": split, **{name: own[name] for name in columns}}
        for (corpus, split), own in sorted(counts.items(), key=lambda item: (item[0][0], order.index(item[0][1])))
    ]
    return format_table(rows, ["corpus", "split", *columns])
