# SPDX-License-Identifier: Apache-2.0
"""Where clips come from: folders, manifests and Hub data sets, read row by row into records.

A record is a dictionary with our own column names; its label is still as it was written.
"""

import csv
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from mmser.labels import UNKNOWN_LABEL, choose_label_names, label_id

logger = logging.get_logger(__name__)
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev", "eval"), "test": ("test",)}
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
STRING_COLUMNS = ("text", "speaker", "language", "corpus", "sex")  # our names, as in the data sets that we return


@dataclass
class DataColumns:
    """Names of the columns to read; the flag for each is `--<field>_column`. None switches an optional one off.

    A default that is missing from the data is looked for under its other usual names (`ALTERNATIVE_COLUMNS`);
    a name that was chosen by the user must exist.
    """

    audio: str | None = "file_name"
    label: str | None = "label"
    text: str | None = "transcription"
    speaker: str | None = "speaker"
    language: str | None = "language"
    corpus: str | None = "corpus"
    sex: str | None = "sex"


ALTERNATIVE_COLUMNS = {
    "audio": ("audio", "path", "file"),
    "label": ("emotion",),
    "text": ("text", "transcript", "sentence"),
    "sex": ("gender",),
}


def only_one(tables: Sequence[Path]) -> Path | None:
    """The only one of `tables`, or None; a choice between two would be a guess, so they are refused."""
    if len(tables) > 1:
        raise ValueError(f"found both {tables[0]} and {tables[1]}: keep one of them")
    return tables[0] if tables else None


def _pick_splits(available: Iterable[str], wanted: dict[str, tuple[str, ...]], source: object) -> dict[str, str]:
    """Map train, validation, test to the source's own names for them, for those that it has."""
    available = list(available)
    picked = {}
    for split, names in wanted.items():
        found = [name for name in available if name.casefold() in {name.casefold() for name in names}]
        if len(found) > 1:
            raise ValueError(f"{source} has two {split} splits, {found}: choose one with --{split}_split")
        if not found and names != SPLIT_NAMES[split]:
            raise ValueError(f"{source} has no split {names[0]!r} (--{split}_split); it has: {available}")
        if found:
            picked[split] = found[0]
    if not picked:
        raise ValueError(f"{source} has no split with a usual name, it has {available}: name one with --train_split")
    return picked


def _find_columns(
    available: Sequence[str], columns: DataColumns, source: object, unlabelled: bool = False
) -> dict[str, str]:
    """Map the fields of `DataColumns` to the columns that are there; a missing necessary one is an error."""
    found = {}
    for role in fields(DataColumns):
        name = getattr(columns, role.name)
        names = (name, *ALTERNATIVE_COLUMNS.get(role.name, ())) if name == role.default else (name,)
        match = next((candidate for candidate in names if candidate in available), None)
        required = role.name == "audio" or (role.name == "label" and not unlabelled)
        if match is None and role.name == "text" and name == role.default:
            logger.warning_once(
                f"{source} has no text column {name!r} and is used without transcripts; its columns are "
                f"{list(available)}. Name another one with --text_column."
            )
        if match is None and name and (required or name != role.default):
            hint = ", or pass `none` for data without audio" if role.name == "audio" else ""
            raise ValueError(
                f"{source} has no {role.name} column {name!r}; its columns are {list(available)}. "
                f"Name the right one with --{role.name}_column{hint}."
            )
        if match is not None:
            found[role.name] = match
    if "audio" not in found and "text" not in found:
        raise ValueError(
            f"{source} has neither an audio column {columns.audio!r} nor a text column {columns.text!r}; its columns "
            f"are {list(available)}. Name the right ones with --audio_column and --text_column."
        )
    return found


def _find_extra_columns(
    available: Sequence[str], extra_columns: Sequence[str], found: dict[str, str], source: object
) -> list[str]:
    """Those of `extra_columns` that are not our own columns, which are there anyway; a missing one is an error."""
    extra = [
        name for name in dict.fromkeys(extra_columns) if name not in ((found.keys() - {"label"}) | {"labels", "row"})
    ]
    missing = [name for name in extra if name not in available]
    if missing:
        raise ValueError(f"{source} has no column {', '.join(map(repr, missing))}; its columns are {list(available)}")
    switched_off = [name for name in extra if name in ("audio", "text")]
    if switched_off:  # examples would be made of it all the same
        raise ValueError(
            f"{source}: {switched_off[0]!r} cannot be an extra column, as --{switched_off[0]}_column is none"
        )
    return extra


def _string(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _record(raw: dict, found: dict[str, str], extra: Sequence[str], row: str) -> dict[str, Any]:
    """One row of any source under our own names; what is missing is `""`. Labels are still as they were written."""
    record: dict[str, Any] = {"row": row, "extra": {name: _string(raw.get(name)) for name in extra}}
    for role in STRING_COLUMNS:
        record[role] = _string(raw.get(found[role])) if role in found else ""
    record["audio"] = (raw.get(found["audio"]) or "") if "audio" in found else ""
    record["label"] = raw.get(found["label"]) if "label" in found else UNKNOWN_LABEL
    return record


def _read_table(path: Path, name: str, problems: list[str]) -> tuple[list[str], list[tuple[int, dict]]]:
    """Read a CSV, TSV or JSONL file: its columns and its (line number, row) pairs. Bad lines go to `problems`."""
    if path.suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{path} is not a manifest: expected a file ending in {', '.join(TABLE_SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.suffix == ".jsonl":
                rows = _read_json_lines(file, name, problems)
            else:
                rows = _read_csv(file, "\t" if path.suffix == ".tsv" else ",", name, problems)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error}): save it as UTF-8") from error
    if not rows and not problems:
        raise ValueError(f"{path} has no rows")
    columns = dict.fromkeys(column for _, row in rows for column in row)  # a set that keeps the order
    return list(columns), rows


def _read_json_lines(file: Iterable[str], name: str, problems: list[str]) -> list[tuple[int, dict]]:
    rows = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{name} row {number} is not valid JSON: {error}")
            continue
        if isinstance(row, dict):
            rows.append((number, row))
        else:
            problems.append(f"{name} row {number} is not a JSON object: {line.strip()[:60]}")
    return rows


def _read_csv(file: Iterable[str], delimiter: str, name: str, problems: list[str]) -> list[tuple[int, dict]]:
    rows = []
    reader = csv.reader(file, delimiter=delimiter, strict=True)  # else an open quote swallows the rest of the file
    try:
        header = next(reader, [])
        for values in reader:
            number = reader.line_num
            if len(values) == len(header):
                rows.append((number, dict(zip(header, values, strict=True))))
            elif values:
                problems.append(f"{name} row {number} has {len(values)} fields, but the header has {len(header)}")
    except csv.Error as error:
        raise ValueError(f"{name} row {reader.line_num} is malformed: {error}") from error
    return rows


def table_records(
    path: Path,
    columns: DataColumns,
    extra_columns: Sequence[str],
    problems: list[str],
    *,
    root: Path | None = None,
    split: str = "train",
    wanted: dict[str, tuple[str, ...]] | None = None,
    unlabelled: bool = False,
) -> list[dict[str, Any]]:
    """Records of one file, in the splits that its `split` column says (if `wanted` is given), else all in `split`.

    The number of a row, in messages, is that of its line in the file.
    """
    name = os.path.relpath(path, root or path.parent)
    available, rows = _read_table(path, name, problems)
    if not rows:
        return []
    found = _find_columns(available, columns, path, unlabelled)
    extra = _find_extra_columns(available, extra_columns, found, path)
    if wanted is not None and "split" in available:
        values = [str(raw.get("split") or "").strip().casefold() for _, raw in rows]
    else:
        values = [split] * len(rows)
    picked = {split: split} if wanted is None else _pick_splits(dict.fromkeys(values), wanted, path)
    split_of = {value: split for split, value in picked.items()}
    records = []
    for (number, raw), value in zip(rows, values, strict=True):
        record = _record(raw, found, extra, f"{name} row {number}")
        record["split"] = split_of.get(value)
        if not isinstance(record["audio"], str):
            problems.append(f"{record['row']}: the audio must be a path, got {record['audio']!r:.60}")
        elif record["split"] is None:
            problems.append(f"{record['row']}: split {value!r} is none of {', '.join(split_of)}")
        else:
            record["audio"] = os.path.join(path.parent, record["audio"]) if record["audio"] else ""
            records.append(record)
    return records


def folder_records(
    folder: Path,
    wanted: dict[str, tuple[str, ...]],
    columns: DataColumns,
    extra_columns: Sequence[str],
    problems: list[str],
) -> list[dict[str, Any]]:
    """Records of a folder with one table per split, or one for all at the top."""
    if not folder.is_dir():
        raise ValueError(f"data_dir {str(folder)!r} is not a folder")
    tables: dict[str, list[Path]] = {}  # <name>/metadata.csv and <name>.csv belong to the split <name>
    for suffix in TABLE_SUFFIXES:
        for table in sorted(folder.glob(f"*/metadata{suffix}")):
            tables.setdefault(table.parent.name, []).append(table)
        for table in sorted(folder.glob(f"*{suffix}")):
            tables.setdefault(table.stem, []).append(table)
    top = only_one(tables.pop("metadata", []))
    usual = {name.casefold() for names in wanted.values() for name in names}
    if any(name.casefold() in usual for name in tables):
        records = []
        for split, name in _pick_splits(tables, wanted, folder).items():
            only_one(tables[name])
            records += table_records(tables[name][0], columns, extra_columns, problems, root=folder, split=split)
        return records
    if top is None:
        content = sorted(entry.name for entry in folder.iterdir())[:10]
        raise ValueError(
            f"{folder} has no metadata: expected metadata.csv (or .tsv, .jsonl) in train/, validation/ and test/, or "
            f"at the top, or train.csv; the folder has {content}"
        )
    return table_records(top, columns, extra_columns, problems, root=folder, wanted=wanted)


def _hub_columns(
    features: datasets.Features | None, available: Sequence[str], columns: DataColumns, source: object
) -> dict[str, str]:
    """`_find_columns` for a Hub data set, where a column of type `Audio` is the audio if none was named."""
    if columns.audio == DataColumns.audio and features is not None:
        typed = [name for name, feature in features.items() if isinstance(feature, datasets.Audio)]
        if typed:
            columns = DataColumns(**{**vars(columns), "audio": typed[0]})
    return _find_columns(available, columns, source)


def _class_names(features: datasets.Features | None) -> dict[str, list[str]]:
    """The names that a Hub data set declares for the ids in its columns."""
    return {
        name: feature.names for name, feature in (features or {}).items() if isinstance(feature, datasets.ClassLabel)
    }


def _name_classes(raw: dict, class_names: dict[str, list[str]]) -> dict:
    """A row with names for ids where its data set declares names: the ids mean nothing outside that data set."""
    ids = {column: raw.get(column) for column in class_names}
    return {**raw, **{column: class_names[column][i] for column, i in ids.items() if i is not None and i >= 0}}


def _load_hub_dataset(name: str, config_name: str | None, **options) -> datasets.DatasetDict:
    """`datasets.load_dataset`, with a way out where it insists on torchcodec: data stored as loose audio files."""
    try:
        return datasets.load_dataset(name, config_name, **options)
    except (ImportError, datasets.exceptions.DatasetGenerationError) as error:
        if "torchcodec" not in f"{error} {error.__cause__}":
            raise
        raise ValueError(
            f"{name} is stored as loose audio files, which `datasets` reads with torchcodec only. Download it "
            f"(`hf download --repo-type dataset {name} --local-dir FOLDER`) and pass --data_dir FOLDER, or install "
            "torchcodec."
        ) from error


def hub_records(
    name: str,
    config_name: str | None,
    wanted: dict[str, tuple[str, ...]],
    columns: DataColumns,
    extra_columns: Sequence[str],
) -> tuple[list[dict[str, Any]], datasets.Dataset | None, list[str] | None]:
    """Records of a Hub data set, its audio column (aligned with the records) if embedded, and its class names."""
    loaded = _load_hub_dataset(name, config_name)
    picked = _pick_splits(loaded, wanted, name)
    records: list[dict[str, Any]] = []
    audio_tables = []
    class_names = None
    for split, split_name in picked.items():
        dataset = loaded[split_name]
        source = f"{name} {split_name}"
        found = _hub_columns(dataset.features, dataset.column_names, columns, source)
        extra = _find_extra_columns(dataset.column_names, extra_columns, found, source)
        declared = _class_names(dataset.features)
        class_names = class_names or declared.get(found["label"])
        audio_feature = dataset.features[found["audio"]] if "audio" in found else None
        embedded = isinstance(audio_feature, datasets.Audio | dict)
        if embedded:
            # never let `datasets` decode: that needs torchcodec, and we have soundfile
            audio = dataset.select_columns(found["audio"]).cast_column(found["audio"], datasets.Audio(decode=False))
            audio_tables.append(audio if found["audio"] == "audio" else audio.rename_column(found["audio"], "audio"))
        elif audio_feature is not None and getattr(audio_feature, "dtype", "") not in ("string", "large_string"):
            raise ValueError(f"{name}: column {found['audio']!r} must hold audio files or paths, not {audio_feature}")
        small = [column for role, column in found.items() if not (embedded and role == "audio")]
        for index, raw in enumerate(dataset.select_columns(list(dict.fromkeys([*small, *extra])))):
            record = _record(_name_classes(raw, declared), found, extra, f"{source} row {index}")
            record["split"] = split
            record["embedded"] = embedded
            records.append(record)
    if not audio_tables:
        return records, None, class_names
    if len(audio_tables) != len(picked):
        raise ValueError(f"{name}: the audio column is not of one type in all of its splits {list(picked.values())}")
    return records, datasets.concatenate_datasets(audio_tables), class_names


def stream_hub(
    name: str,
    config_name: str | None,
    wanted: dict[str, tuple[str, ...]],
    columns: DataColumns,
    extra_columns: Sequence[str],
    label_names: Sequence[str] | None,
    on_bad_example: str,
) -> tuple[datasets.IterableDatasetDict, list[str]]:
    """Like `hub_records`, but row by row while training. A bad row raises then, or (skip) has `labels` None."""
    loaded = _load_hub_dataset(name, config_name, streaming=True)
    picked = _pick_splits(loaded, wanted, name)
    logger.warning(
        f"{name} is streamed: whether a speaker is in two of its splits {list(picked.values())} cannot be checked, "
        "and splits that it lacks are not made."
    )
    streams = {}
    for split, split_name in picked.items():
        stream = loaded[split_name]
        for column, feature in (stream.features or {}).items():
            if isinstance(feature, datasets.Audio):
                stream = stream.cast_column(column, datasets.Audio(decode=False))
        available = stream.column_names or list(next(iter(stream)))
        source = f"{name} {split_name}"
        found = _hub_columns(stream.features, available, columns, source)
        extra = _find_extra_columns(available, extra_columns, found, source)
        declared = _class_names(stream.features)
        label_names = choose_label_names(label_names, declared.get(found["label"]))
        normalise = _StreamNormaliser(found, extra, source, label_names, declared, on_bad_example)
        streams[split] = stream.map(normalise, with_indices=True, remove_columns=available)
    return datasets.IterableDatasetDict(streams), list(label_names or ())


@dataclass
class _StreamNormaliser:
    """The row function of a stream; a class because it has to travel to worker processes."""

    found: dict[str, str]
    extra: list[str]
    source: str
    label_names: list[str]
    class_names: dict[str, list[str]]
    on_bad_example: str

    def __call__(self, raw: dict, index: int) -> dict[str, Any]:
        raw = _name_classes(raw, self.class_names)
        record = _record(raw, self.found, self.extra, f"{self.source} row {index}")
        record["labels"] = None
        try:
            record["labels"] = label_id(record["label"], self.label_names, record["row"])
        except ValueError as error:
            if self.on_bad_example == "error":
                raise
            logger.warning_once(f"skipped: {error}")
        kept = (self.found.keys() | {"row", "labels"}) - {"label"}
        return {**{key: value for key, value in record.items() if key in kept}, **record["extra"]}
