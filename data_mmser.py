# SPDX-License-Identifier: Apache-2.0
"""From a folder, a manifest or a Hub data set to batches: read this file from top to bottom.

1. loading: `load_emotion_dataset` and `load_emotion_split` check every row and make speaker-disjoint splits
2. augmentation: `Augmenter` (speed and noise), seeded per example by `augmentation_generator`
3. examples: `EmotionDataset` and `EmotionIterableDataset` decode, crop and augment inside the DataLoader workers;
   `TestTimeAugmentation` gives each clip several times, augmented in different ways
4. batches: `MMSERDataCollator` pads with the processor; `class_counts` for class-balanced losses; `duration_bands`
"""

import csv
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import soundfile
import soxr
import torch
from sklearn.model_selection import GroupShuffleSplit
from transformers import BatchFeature
from transformers.utils import logging

from configuration_mmser import DEFAULT_LABELS
from processing_mmser import MIN_SECONDS, MMSERProcessor, load_audio

logger = logging.get_logger(__name__)

UNKNOWN_LABEL = -1  # "none of the known classes": only in open-set data
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev", "eval"), "test": ("test",)}
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
STRING_COLUMNS = ("text", "speaker", "language", "corpus", "sex")  # our names, as in the data sets that we return


# ---------------------------------------------------------------------------------------------------- 1. loading


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
    label_names: Sequence[str] | None = None,
    streaming: bool = False,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.15,
    seed: int = 42,
    allow_speaker_overlap: bool = False,
    on_bad_example: str = "error",
) -> tuple[datasets.DatasetDict | datasets.IterableDatasetDict, list[str]]:
    """Load the training, validation and test data from one of three kinds of source.

    Without a validation split, one is held out of the training data, whole speakers at a time, and a test split as
    well if neither is given. Every row
    is checked here: its label, its audio file's existence, and that no speaker is in two splits.

    Args:
        data_dir: folder with `<split>/metadata.csv` (or `.tsv`, `.jsonl`), `<split>.csv`, or one `metadata.csv` at
            the top with an optional `split` column. Audio paths are relative to the file that lists them.
        manifest: one CSV, TSV or JSONL file with an optional `split` column.
        dataset_name, dataset_config_name: data set on the Hub (or a folder that `datasets.load_dataset` reads).
        train_split, validation_split, test_split: names of the splits in the source; default: their usual names.
        columns: names of the columns.
        extra_columns: more columns to keep, as strings under their own names. The name of one of our own columns, such
            as `corpus`, means that one.
        label_names: class names in the order of their ids; default: neutral, happy, sad, angry when the labels are
            ids or among these names, else the class names of the Hub data set or the sorted names in training data.
        streaming: read the Hub data set while training. Nothing is split or checked across rows then.
        validation_fraction, test_fraction: shares, of the speakers, to hold out where the source gives no split.
        seed: seed of the split.
        allow_speaker_overlap: accept a speaker in two splits, or a random split of data without speakers.
        on_bad_example: "error", or "skip" to leave bad rows out with a warning that counts them.

    Returns:
        The splits and the label names. Columns: `labels` (int), `row` (where the row is, for messages) and, if the
        source has them, `audio` (path, or `{"bytes", "path"}` from the Hub; not decoded), `text` (`""` = unknown),
        `speaker`, `language`, `corpus`, `sex`, and the `extra_columns`.

    Raises:
        ValueError: if the source, a column or a row is not usable, or a speaker is in two splits.
    """
    if sum(source is not None for source in (data_dir, manifest, dataset_name)) != 1:
        raise ValueError(
            "give exactly one source of data: data_dir (--data_dir), manifest (--manifest) or dataset_name "
            f"(--dataset_name); got data_dir={data_dir!r}, manifest={manifest!r}, dataset_name={dataset_name!r}"
        )
    if not (validation_fraction >= 0 and test_fraction >= 0 and validation_fraction + test_fraction < 1):
        raise ValueError(
            "validation_fraction and test_fraction must be >= 0 and sum to less than 1, got "
            f"{validation_fraction} and {test_fraction}"
        )
    _check_on_bad_example(on_bad_example)
    columns = columns or DataColumns()
    given = {"train": train_split, "validation": validation_split, "test": test_split}
    wanted = {split: (name,) if name else SPLIT_NAMES[split] for split, name in given.items()}
    if streaming:
        if dataset_name is None:
            raise ValueError("streaming reads a Hub data set: give dataset_name (--dataset_name), or no --streaming")
        return _stream_hub(
            dataset_name, dataset_config_name, wanted, columns, extra_columns, label_names, on_bad_example
        )

    problems: list[str] = []
    records: list[dict[str, Any]] = []
    class_names, audio_table = None, None
    if dataset_name is not None:
        records, audio_table, class_names = _hub_records(
            dataset_name, dataset_config_name, wanted, columns, extra_columns
        )
    elif data_dir is not None:
        records = _folder_records(Path(data_dir), wanted, columns, extra_columns, problems)
    elif manifest is not None:
        records = _table_records(Path(manifest), columns, extra_columns, problems, wanted=wanted)
    training = [record for record in records if record["split"] == "train"] or records
    label_names = _choose_label_names(label_names, class_names, [record["label"] for record in training])
    good = _check_records(records, label_names, problems)
    _warn_of_rare_labels(training, label_names)
    _report_problems(problems, on_bad_example)

    # the splits that the source has, also those of which no row is good
    splits: dict[str, list[int]] = {split: [] for split in wanted if any(r["split"] == split for r in records)}
    for index in good:
        splits[records[index]["split"]].append(index)
    _check_speaker_overlap(records, splits, allow_speaker_overlap)
    fractions = {"test": test_fraction, "validation": validation_fraction}
    splits = _hold_out_missing_splits(records, splits, fractions, seed, allow_speaker_overlap)
    empty = [split for split, indices in splits.items() if not indices]
    if empty or not splits:
        raise ValueError(f"no usable row is left in {data_dir or manifest or dataset_name} {' '.join(empty)}")
    table = _to_dataset(records, extra_columns, audio_table)
    order = [split for split in wanted if split in splits]
    return datasets.DatasetDict({split: table.select(splits[split]) for split in order}), label_names


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
        path: the folder or the file. A `split` column is ignored.
        columns: names of the columns.
        extra_columns: more columns to keep, as in `load_emotion_dataset`.
        label_names: class names in the order of their ids.
        allow_unknown: open-set data: -1, "unknown" and every name that is not in `label_names` become -1, and so
            does every row if there is no label column. False: the rules of `load_emotion_dataset`.
        on_bad_example: "error", or "skip" to leave bad rows out with a warning that counts them.

    Returns:
        The data set, with the columns of `load_emotion_dataset`.

    Raises:
        ValueError: if the file, a column or a row is not usable.
    """
    _check_on_bad_example(on_bad_example)
    label_names = _choose_label_names(label_names)
    path = Path(path)
    table: Path | None = path
    if path.is_dir():
        table = _only_one([table for suffix in TABLE_SUFFIXES for table in path.glob(f"metadata{suffix}")])
    if table is None:
        raise ValueError(f"{path} has no metadata file: expected metadata.csv, metadata.tsv or metadata.jsonl")
    problems: list[str] = []
    columns = columns or DataColumns()
    records = _table_records(table, columns, extra_columns, problems, root=path.parent, unlabelled=allow_unknown)
    good = _check_records(records, label_names, problems, allow_unknown)
    _report_problems(problems, on_bad_example)
    if not good:
        raise ValueError(f"no usable row is left in {path}")
    return _to_dataset(records, extra_columns).select(good)


def _check_on_bad_example(on_bad_example: str) -> None:
    if on_bad_example not in ("error", "skip"):
        raise ValueError(f"on_bad_example must be 'error' or 'skip', got {on_bad_example!r}")


def _only_one(tables: Sequence[Path]) -> Path | None:
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


def _table_records(
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


def _folder_records(
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
    top = _only_one(tables.pop("metadata", []))
    usual = {name.casefold() for names in wanted.values() for name in names}
    if any(name.casefold() in usual for name in tables):
        records = []
        for split, name in _pick_splits(tables, wanted, folder).items():
            _only_one(tables[name])
            records += _table_records(tables[name][0], columns, extra_columns, problems, root=folder, split=split)
        return records
    if top is None:
        content = sorted(entry.name for entry in folder.iterdir())[:10]
        raise ValueError(
            f"{folder} has no metadata: expected metadata.csv (or .tsv, .jsonl) in train/, validation/ and test/, or "
            f"at the top, or train.csv; the folder has {content}"
        )
    return _table_records(top, columns, extra_columns, problems, root=folder, wanted=wanted)


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


def _hub_records(
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


def _stream_hub(
    name: str,
    config_name: str | None,
    wanted: dict[str, tuple[str, ...]],
    columns: DataColumns,
    extra_columns: Sequence[str],
    label_names: Sequence[str] | None,
    on_bad_example: str,
) -> tuple[datasets.IterableDatasetDict, list[str]]:
    """Like `_hub_records`, but row by row while training. A bad row raises then, or (skip) has `labels` None."""
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
        label_names = _choose_label_names(label_names, declared.get(found["label"]))
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
            record["labels"] = _label_id(record["label"], self.label_names, record["row"])
        except ValueError as error:
            if self.on_bad_example == "error":
                raise
            logger.warning_once(f"skipped: {error}")
        kept = (self.found.keys() | {"row", "labels"}) - {"label"}
        return {**{key: value for key, value in record.items() if key in kept}, **record["extra"]}


def _choose_label_names(
    given: Sequence[str] | None, class_names: Sequence[str] | None = None, labels: Iterable[Any] = ()
) -> list[str]:
    """The class names: those given; else the default ones if the data's are among them; else the data's.

    Args:
        given: names given by the user.
        class_names: names that the data set declares, in the order of their ids.
        labels: labels of the training rows, to collect names from if nobody declares any.
    """
    if given is not None:
        names = [str(name).strip() for name in given]
    else:
        written = {str(label).strip() for label in labels if label is not None}
        found = sorted(name for name in written if name and _as_id(name) is None and name.casefold() != "unknown")
        names = list(class_names or found)
        if {name.casefold() for name in names} <= set(DEFAULT_LABELS):
            names = list(DEFAULT_LABELS)
    if len({name.casefold() for name in names}) != len(names) or "" in names or len(names) < 2:
        raise ValueError(f"label names must be two or more different names, got {names}")
    return names


def _warn_of_rare_labels(records: Sequence[dict], label_names: Sequence[str]) -> None:
    """A name that hardly any clip has, among names taken from the data, is most likely misspelt."""
    logger.info(f"Labels: {', '.join(label_names)}")
    counts = Counter(str(record["label"]).strip().casefold() for record in records)
    rare = {name: counts[name.casefold()] for name in label_names if 0 < counts[name.casefold()] < 5}
    if rare and len(records) >= 20 * len(label_names):
        logger.warning(f"Labels with fewer than 5 training clips: {rare} of {list(label_names)}. Is a name misspelt?")


def _as_id(label: str) -> int | None:
    """The integer that a label spells (`"2"`, `"2.0"`, `"-1"`), or None if it is a name."""
    try:
        number = float(label)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def _label_id(label: Any, label_names: Sequence[str], row: str, allow_unknown: bool = False) -> int:
    """The id of a label that is written as a name or as an id.

    Raises:
        ValueError: naming the row and what is allowed.
    """
    written = "" if label is None else str(label).strip()
    names = [name.casefold() for name in label_names]
    if written.casefold() in names:
        return names.index(written.casefold())
    if not written:
        raise ValueError(f"{row} has no label")
    number = _as_id(written)
    if number == UNKNOWN_LABEL or written.casefold() == "unknown" or (number is None and allow_unknown):
        if allow_unknown:
            return UNKNOWN_LABEL
        raise ValueError(
            f"{row}: label {written!r} (none of the classes) is not for training, validation or test; an open-set "
            "folder goes to --ood_dir"
        )
    if number is None:
        raise ValueError(f"{row}: unknown label {written!r}; allowed: {', '.join(label_names)}")
    if not 0 <= number < len(names):
        raise ValueError(
            f"{row}: label {written} is out of range; allowed: 0 to {len(names) - 1} ({', '.join(label_names)}). "
            "For another label set give --labels."
        )
    return number


def _check_records(
    records: list[dict[str, Any]], label_names: Sequence[str], problems: list[str], allow_unknown: bool = False
) -> list[int]:
    """Give every record its `labels` id and return the indices of the usable ones; the rest goes to `problems`."""
    good = []
    for index, record in enumerate(records):
        record["labels"] = UNKNOWN_LABEL
        audio = record["audio"]
        try:
            record["labels"] = _label_id(record["label"], label_names, record["row"], allow_unknown)
            if audio and "://" not in audio and not os.path.exists(audio):
                raise ValueError(f"{record['row']}: audio file {audio} does not exist")
            if not (audio or record["text"] or record.get("embedded")):
                raise ValueError(f"{record['row']} has neither audio nor text")
        except ValueError as error:
            problems.append(str(error))
        else:
            good.append(index)
    return good


def _report_problems(problems: list[str], on_bad_example: str) -> None:
    """Raise, or warn about, all bad rows at once: the first three and how many there are."""
    if not problems:
        return
    count = "1 bad row" if len(problems) == 1 else f"{len(problems)} bad rows"
    first = "".join(f"\n  {problem}" for problem in problems[:3])
    rest = f"\n  and {len(problems) - 3} more" if len(problems) > 3 else ""
    if on_bad_example == "skip":
        logger.warning(f"skipped {count}:{first}{rest}")
    else:
        raise ValueError(f"{count} in the data (--on_bad_example skip leaves them out):{first}{rest}")


def _speaker(record: dict[str, Any]) -> str:
    """A speaker's name with its corpus: the same name in two corpora is two people."""
    return f"{record['corpus']}/{record['speaker']}" if record["corpus"] else record["speaker"]


def _check_speaker_overlap(records: list[dict], splits: dict[str, list[int]], allow: bool) -> None:
    """Refuse, or warn about, speakers that are in two of the given splits. Rows without a speaker say nothing."""
    where: dict[str, list[str]] = {}
    for split, indices in splits.items():
        for speaker in {_speaker(records[index]) for index in indices if records[index]["speaker"]}:
            where.setdefault(speaker, []).append(split)
    shared = sorted(speaker for speaker, names in where.items() if len(names) > 1)
    if not shared:
        return
    listed = ", ".join(f"{speaker} ({' and '.join(where[speaker])})" for speaker in shared[:5])
    message = f"{len(shared)} speakers are in more than one split: {listed}{', ...' if len(shared) > 5 else ''}"
    if not allow:
        raise ValueError(
            f"{message}. Scores on known voices are too good: give each speaker to one split, or pass "
            "--allow_speaker_overlap"
        )
    logger.warning(f"{message}. Allowed by --allow_speaker_overlap; the scores will be too good for new voices.")


def _hold_out_missing_splits(
    records: list[dict], splits: dict[str, list[int]], fractions: dict[str, float], seed: int, allow_overlap: bool
) -> dict[str, list[int]]:
    """Hold the missing splits out of the training data. A source with its own validation split is left as it is."""
    if "validation" in splits or not splits.get("train"):
        return splits
    missing = {split: fraction for split, fraction in fractions.items() if split not in splits and fraction > 0}
    if not missing:
        return splits
    speakers = np.array([_speaker(records[index]) for index in splits["train"]])
    have_speakers = any(records[index]["speaker"] for index in splits["train"])
    enough = len(set(speakers)) > len(missing)
    if not (have_speakers and enough):
        reason = f"has only {len(set(speakers))} speakers" if have_speakers else "has no speaker column"
        if not allow_overlap:
            raise ValueError(
                f"{' and '.join(missing)} data must be held out of the training data, which {reason}: add a column "
                "with the speakers (--speaker_column) or splits of your own, or pass --allow_speaker_overlap to "
                "split at random"
            )
        logger.warning(f"The training data {reason}: split at random, speakers may leak from training into test data.")
    remaining = np.array(splits["train"])
    labels = np.array([records[index]["labels"] for index in remaining])
    splits, left = dict(splits), 1.0
    for number, (split, fraction) in enumerate(missing.items()):
        share = fraction / left
        if have_speakers and enough:
            held_out = _hold_out_groups(speakers, labels, share, seed + number)
        else:
            held_out = _hold_out_per_label(labels, share, seed + number)
        splits[split] = remaining[held_out].tolist()
        remaining, labels, speakers = remaining[~held_out], labels[~held_out], speakers[~held_out]
        left -= fraction
    splits["train"] = remaining.tolist()
    return splits


def _hold_out_groups(groups: np.ndarray, labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Hold out whole groups: of 64 random draws, the one whose label counts are nearest to `fraction` of all.

    Args:
        groups: [N] names of the groups.
        labels: [N] ids >= 0.
        fraction: share to hold out, in (0, 1).
        seed: seed of the draws.

    Returns:
        [N] bool, True where held out.
    """
    counts = np.bincount(labels)
    draws = GroupShuffleSplit(n_splits=64, test_size=fraction, random_state=seed).split(labels, groups=groups)
    candidates = [held_out for _, held_out in draws]
    distances = [
        np.abs(np.bincount(labels[held_out], minlength=len(counts)) - fraction * counts).sum()
        for held_out in candidates
    ]
    mask = np.zeros(len(labels), dtype=bool)
    mask[candidates[int(np.argmin(distances))]] = True
    return mask


def _hold_out_per_label(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Hold out `fraction` of the rows of each label, at random. Arguments and result as in `_hold_out_groups`."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        indices = rng.permutation(np.flatnonzero(labels == label))
        mask[indices[: round(fraction * len(indices))]] = True
    return mask


def _to_dataset(
    records: list[dict[str, Any]], extra_columns: Sequence[str] = (), audio_table: datasets.Dataset | None = None
) -> datasets.Dataset:
    """All records as one table, without those of our own columns that are empty everywhere and were not asked for."""
    asked = set(extra_columns) & set(STRING_COLUMNS)
    kept = [key for key in ("audio", *STRING_COLUMNS) if key in asked or any(record[key] for record in records)]
    kept += [*records[0]["extra"], "row"]
    types = {**dict.fromkeys(kept, datasets.Value("string")), "labels": datasets.Value("int64")}
    rows = [{**record, **record["extra"]} for record in records]
    table = datasets.Dataset.from_dict(
        {key: [row[key] for row in rows] for key in types}, features=datasets.Features(types)
    )
    return table if audio_table is None else datasets.concatenate_datasets([audio_table, table], axis=1)


# ----------------------------------------------------------------------------------------------- 2. augmentation


def augmentation_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random generator of one example in one epoch: the same whatever the batch, worker or process."""
    return np.random.default_rng([seed, epoch, index])


def change_speed(waveform: np.ndarray, factor: float) -> np.ndarray:
    """Play a clip `factor` times as fast; its pitch moves by the same factor, as on a tape.

    Args:
        waveform: [T] float32 samples.
        factor: speed, > 0. 1.1 is faster, shorter and higher.

    Returns:
        [round(T / factor)] float32 samples.
    """
    # what was recorded at `factor` times the rate, brought back to the rate
    return soxr.resample(waveform, factor, 1.0, quality="HQ").astype(np.float32)


def add_noise(waveform: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """Add white noise at a signal-to-noise ratio. The noise is scaled to exactly that ratio; silence stays silent.

    Args:
        waveform: [T] float32 samples.
        snr_db: power of the clip over power of the noise, in dB.
        rng: source of the noise.

    Returns:
        [T] float32 samples.
    """
    signal_power = np.mean(np.square(waveform, dtype=np.float64))
    if signal_power == 0:
        return waveform
    noise = rng.standard_normal(len(waveform))
    noise_power = signal_power / 10 ** (snr_db / 10)
    return (waveform + noise * np.sqrt(noise_power / np.mean(np.square(noise)))).astype(np.float32)


@dataclass
class Augmenter:
    """Random speed and random noise, each with probability `probability`.

    Args:
        speed_range: lowest and highest speed factor, > 0.
        snr_db_range: lowest and highest signal-to-noise ratio, in dB; None adds no noise.
        probability: of each of the two, in [0, 1].
    """

    speed_range: tuple[float, float] = (0.9, 1.1)
    snr_db_range: tuple[float, float] | None = (10.0, 20.0)
    probability: float = 0.5

    def __post_init__(self):
        if not 0 < self.speed_range[0] <= self.speed_range[1]:
            raise ValueError(f"speed_range must be (low, high) with 0 < low <= high, got {self.speed_range}")
        if self.snr_db_range is not None and not self.snr_db_range[0] <= self.snr_db_range[1]:
            raise ValueError(f"snr_db_range must be (low, high) with low <= high, got {self.snr_db_range}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in [0, 1], got {self.probability}")

    def __call__(self, waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return an augmented copy of `waveform` ([T] float32); all that is random comes from `rng`."""
        apply_speed, apply_noise = rng.random(2) < self.probability
        factor = rng.uniform(*self.speed_range)
        if apply_speed:
            waveform = change_speed(waveform, factor)
        if apply_noise and self.snr_db_range is not None:
            waveform = add_noise(waveform, rng.uniform(*self.snr_db_range), rng)
        return waveform


# --------------------------------------------------------------------------------------------------- 3. examples


@dataclass
class ExampleReader:
    """Makes an example from a row: decode, crop, augment. Random only if `training`.

    Args:
        sampling_rate: rate of the waveforms, in Hz.
        training: crop at random, augment and drop modalities; else the middle of a long clip is taken as it is.
        augmenter: used in training only.
        text_dropout, audio_dropout: probability, in training, to hide the text or the audio (never both) of an
            example that has both.
        max_seconds: longer clips are cropped.
        use_audio, use_text: False hides that modality of every example, to score the other one alone.
    """

    sampling_rate: int = 16_000
    training: bool = False
    augmenter: Augmenter | None = None
    text_dropout: float = 0.0
    audio_dropout: float = 0.0
    max_seconds: float | None = None
    use_audio: bool = True
    use_text: bool = True
    min_samples: int = field(init=False)
    max_samples: int | None = field(init=False, default=None)

    def __post_init__(self):
        self.min_samples = round(MIN_SECONDS * self.sampling_rate)
        if min(self.text_dropout, self.audio_dropout) < 0 or self.text_dropout + self.audio_dropout > 1:
            raise ValueError(
                "text_dropout and audio_dropout must be >= 0 and sum to at most 1, got "
                f"{self.text_dropout} and {self.audio_dropout}"
            )
        if self.max_seconds is not None:
            self.max_samples = round(self.max_seconds * self.sampling_rate)
            if self.max_samples < self.min_samples:
                raise ValueError(f"max_seconds must be at least {MIN_SECONDS}, got {self.max_seconds}")

    def __call__(self, row: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Make the example of one row of `load_emotion_dataset`.

        Returns:
            `labels` (int), `length` (samples, 0 without audio), `audio` ([T] float32 or None) if the data set has an
            audio column, and `text` (str or None) if it has a text column.

        Raises:
            ValueError: naming the row, if its audio cannot be read or it has neither audio nor text.
        """
        source, text = self.draw_modalities(_audio_source(row.get("audio")), row.get("text"), rng)
        audio = self._waveform(source, row["row"], rng) if source else None
        if audio is None and text is None:
            raise ValueError(f"{row['row']} has neither audio nor text")
        example: dict[str, Any] = {"labels": int(row["labels"]), "length": 0 if audio is None else len(audio)}
        if "audio" in row:
            example["audio"] = audio
        if "text" in row:
            example["text"] = text
        return example

    def draw_modalities(self, audio: Any, text: Any, rng: np.random.Generator) -> tuple[Any, Any]:
        """Hide what is not to be seen of an example.

        Args:
            audio, text: whatever stands for the two; what is missing is falsy.
            rng: drawn from once in training, if the example has both.

        Returns:
            (audio, text), with None for what is missing, hidden or dropped.
        """
        audio = (audio or None) if self.use_audio else None
        text = (text or None) if self.use_text else None
        if self.training and audio and text:
            draw = rng.random()
            if draw < self.text_dropout:
                text = None
            elif draw < self.text_dropout + self.audio_dropout:
                audio = None
        return audio, text

    def waveform(self, row: dict[str, Any], rng: np.random.Generator) -> np.ndarray | None:
        """The `audio` ([T] float32) that a row's example has when its audio is not dropped; None without audio."""
        source = _audio_source(row.get("audio"))
        self.draw_modalities(source, row.get("text"), rng)  # what is random afterwards depends on this draw
        return self._waveform(source, row["row"], rng) if source else None

    def content(self, row: dict[str, Any]) -> bytes | None:
        """The bytes of the encoded file of a row's audio; None without audio, or where it is hidden."""
        source = _audio_source(row.get("audio")) if self.use_audio else None
        if not source:
            return None
        try:
            content = _fetch(source)
            return content if isinstance(content, bytes) else Path(content).read_bytes()
        except OSError as error:
            raise ValueError(f"{row['row']}: cannot read {str(source)[:200]}: {error}") from error

    def _waveform(self, source: str | bytes, row: str, rng: np.random.Generator) -> np.ndarray:
        name = "embedded audio" if isinstance(source, bytes) else source
        try:
            audio = load_audio(_fetch(source), target_sampling_rate=self.sampling_rate, name=name)
        except (ValueError, OSError) as error:
            raise ValueError(f"{row}: cannot read {name}: {error}") from error
        if len(audio) < self.min_samples:
            raise ValueError(
                f"{row}: {name} is too short, {len(audio)} samples at {self.sampling_rate} Hz; the minimum is "
                f"{self.min_samples} ({MIN_SECONDS} s)"
            )
        spare = 0 if self.max_samples is None else max(0, len(audio) - self.max_samples)
        if spare:
            start = int(rng.integers(spare + 1)) if self.training else spare // 2
            audio = audio[start : len(audio) - spare + start]
        return self.augment(audio, self.augmenter, rng) if self.training and self.augmenter is not None else audio

    def augment(self, audio: np.ndarray, augmenter: Augmenter, rng: np.random.Generator) -> np.ndarray:
        """Augment a waveform ([T] float32) within the limits of its length; one that gets too short stays as it is."""
        augmented = augmenter(audio, rng)[: self.max_samples]  # slowed down, it can be longer again
        return augmented if len(augmented) >= self.min_samples else audio

    def length(self, row: dict[str, Any]) -> int:
        """Samples of a row's clip without augmentation, from the file's header alone; 0 without audio."""
        source = _audio_source(row.get("audio")) if self.use_audio else None
        if not source:
            return 0
        try:
            fetched = _fetch(source)
            info = soundfile.info(io.BytesIO(fetched) if isinstance(fetched, bytes) else fetched)
        except (OSError, RuntimeError) as error:  # soundfile's own errors are RuntimeErrors
            raise ValueError(f"{row['row']}: cannot read {str(source)[:200]}: {error}") from error
        samples = round(info.frames * self.sampling_rate / info.samplerate)
        return samples if self.max_samples is None else min(samples, self.max_samples)


def _audio_source(audio: str | dict | None) -> str | bytes | None:
    """What a cell of the audio column refers to: encoded bytes if it has them, else a path, else nothing."""
    if isinstance(audio, dict):
        return audio.get("bytes") or audio.get("path") or None
    return audio or None


def _fetch(source: str | bytes) -> str | bytes:
    """The bytes behind an address (`hf://`, `zip://`, ... as streamed data sets give them); others as they are."""
    if isinstance(source, str) and "://" in source:
        with fsspec.open(source, "rb") as file:
            return file.read()
    return source


class EmotionDataset(torch.utils.data.Dataset):
    """Examples of a data set with random access. Decoding happens on access, so inside the DataLoader's workers.

    Args:
        dataset: a split of `load_emotion_dataset`.
        seed: with the epoch and the index it decides all that is random in an example.
        on_bad_example: an unreadable file raises ("error") or is left out of its batch ("skip": a warning names the
            row, `skipped` marks it; `dataset[index]` is None).
        **reader_options: of `ExampleReader`: sampling_rate, training, augmenter, text_dropout, audio_dropout,
            max_seconds, use_audio, use_text.
    """

    def __init__(self, dataset: datasets.Dataset, seed: int = 42, on_bad_example: str = "error", **reader_options):
        _check_on_bad_example(on_bad_example)
        self.dataset = dataset
        self.seed = seed
        self.on_bad_example = on_bad_example
        self.reader = ExampleReader(**reader_options)
        # in shared memory: workers, also persistent ones, see a new epoch, and we see what they skipped
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._skipped = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        self._lengths: list[int] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        """The example (see `ExampleReader`) at `index`, or None if it is bad and `on_bad_example` is "skip"."""
        index = range(len(self))[index]
        rng = augmentation_generator(self.seed, int(self._epoch), index)
        try:
            return self._example(index, rng)
        except ValueError as error:
            if self.on_bad_example == "error":
                raise
            self._skipped[index] = True
            logger.warning_once(f"skipped: {error}")
            return None

    def _example(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        return self.reader(self.dataset[index], rng)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The good examples among `indices`; if none is good, the next good one, so that no batch is empty."""
        examples = [example for example in map(self.__getitem__, indices) if example is not None]
        for step in range(1, len(self)):
            if examples:
                break
            example = self[(indices[-1] + step) % len(self)]
            examples = [] if example is None else [example]
        if not examples:
            raise ValueError(f"none of the {len(self)} examples can be read")
        return examples

    def set_epoch(self, epoch: int) -> None:
        """Draw new augmentation from now on, in all workers."""
        self._epoch.fill_(int(epoch))

    @property
    def skipped(self) -> np.ndarray:
        """[N] bool: the rows that were found bad so far."""
        return self._skipped.numpy().copy()

    @property
    def num_skipped(self) -> int:
        """How many rows were found bad so far, each counted once."""
        return int(self._skipped.sum())

    @property
    def lengths(self) -> list[int]:
        """[N] samples of each clip before augmentation, read from the headers on first use; for length grouping."""
        if self._lengths is None:
            with ThreadPool(8) as pool:
                lengths = pool.imap(self._length, range(len(self)), chunksize=64)
                progress = logging.tqdm(lengths, "reading lengths", len(self), disable=len(self) <= 2000)
                self._lengths = list(progress)
        return self._lengths

    def _length(self, index: int) -> int:
        try:
            return self.reader.length(self.dataset[index])
        except ValueError as error:
            if self.on_bad_example == "error":
                raise
            logger.warning_once(f"no length: {error}")
            return 0


class TestTimeAugmentation(torch.utils.data.Dataset):
    """Every clip of a data set `num_passes` times in a row: as it is, then augmented, each time in another way.

    Item i is pass `i % num_passes` of clip `i // num_passes`. What is random in it depends on the seed, the pass and
    the clip alone. Clips without audio are the same in all passes. A clip that cannot be read raises, so leave such
    clips out before, with `drop_unreadable`.

    Args:
        dataset: the clips, as they are for evaluation.
        num_passes: passes over each clip, >= 1.
        augmenter: makes passes 1, 2, ...; with a `probability` below 1 it leaves some of them as they are.
        seed: seed of the augmentation.

    Raises:
        TypeError: for a stream, which has no clip i.
        ValueError: if the data set is one for training, which is random itself, or `num_passes` is not positive.
    """

    __test__ = False  # pytest: the name only looks like that of a test

    def __init__(self, dataset: EmotionDataset, num_passes: int, augmenter: Augmenter, seed: int = 42):
        if not isinstance(dataset, EmotionDataset):
            raise TypeError(f"test-time augmentation needs an EmotionDataset, got {type(dataset).__name__}")
        if dataset.reader.training:
            raise ValueError("test-time augmentation needs a data set for evaluation, got one with training=True")
        if not isinstance(num_passes, int) or num_passes < 1:
            raise ValueError(f"num_passes must be an integer of at least 1, got {num_passes!r}")
        self.dataset = dataset
        self.num_passes = num_passes
        self.augmenter = augmenter
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset) * self.num_passes

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The example (see `ExampleReader`) at `index`."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The examples at `indices`; each clip among them is decoded once."""
        clips: dict[int, dict[str, Any]] = {}
        examples = []
        for index in indices:
            clip, number = divmod(range(len(self))[index], self.num_passes)
            rng = augmentation_generator(self.seed, number, clip)  # the pass in the place of the epoch
            if clip not in clips:
                clips[clip] = self.dataset.reader(self.dataset.dataset[clip], rng)  # not random: not for training
            example = dict(clips[clip])
            if number > 0 and example.get("audio") is not None:
                example["audio"] = self.dataset.reader.augment(example["audio"], self.augmenter, rng)
                example["length"] = len(example["audio"])
            examples.append(example)
        return examples

    @property
    def lengths(self) -> list[int]:
        """[N * num_passes] samples of each clip before augmentation, as `EmotionDataset.lengths`."""
        return [length for length in self.dataset.lengths for _ in range(self.num_passes)]


def drop_unreadable(dataset: datasets.Dataset, on_bad_example: str = "skip", **reader_options) -> datasets.Dataset:
    """Try each row once, before work is spent: leave out those of which no example can be made, and count them.

    With every row readable, all batches are whole: predictions line up with the rows, on any number of processes.

    Args:
        dataset: a split of `load_emotion_dataset`.
        on_bad_example: "skip", or "error" to raise at the first bad row.
        **reader_options: of `ExampleReader`.

    Raises:
        ValueError: if no row is left, or naming the row, for "error".
    """
    examples = EmotionDataset(dataset, on_bad_example=on_bad_example, **reader_options)
    with ThreadPool(8) as pool:
        tried = pool.imap(lambda index: examples[index] is not None, range(len(examples)), chunksize=16)
        progress = logging.tqdm(tried, "checking clips", len(examples), disable=len(examples) <= 2000)
        readable = [index for index, is_readable in enumerate(progress) if is_readable]
    if len(readable) == len(dataset):
        return dataset
    if not readable:
        raise ValueError(f"none of the {len(dataset)} examples can be read, the first is {dataset[0]['row']}")
    logger.warning(f"skipped {examples.num_skipped} of {len(dataset)} clips that cannot be read")
    return dataset.select(readable)


class EmotionIterableDataset(torch.utils.data.IterableDataset):
    """Examples of a streamed data set; its shards are shared out among the workers.

    Args: as for `EmotionDataset`, with a split of `load_emotion_dataset(..., streaming=True)`. Instead of the index,
    which a stream does not have, a checksum of the content seeds the augmentation of an example.
    """

    def __init__(
        self, dataset: datasets.IterableDataset, seed: int = 42, on_bad_example: str = "error", **reader_options
    ):
        _check_on_bad_example(on_bad_example)
        self.dataset = dataset
        self.seed = seed
        self.on_bad_example = on_bad_example
        self.reader = ExampleReader(**reader_options)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        # one slot per worker, as they count at the same time and a lock could not travel to spawned workers
        self._num_skipped = torch.zeros(256, dtype=torch.int64).share_memory_()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = int(self._epoch)
        for row in self.dataset:
            if row["labels"] is None:  # a bad label, reported where it was found
                self._count_skipped()
                continue
            try:
                yield self.reader(row, augmentation_generator(self.seed, epoch, _checksum(row)))
            except ValueError as error:
                if self.on_bad_example == "error":
                    raise
                self._count_skipped()
                logger.warning_once(f"skipped: {error}")

    def _count_skipped(self) -> None:
        worker = torch.utils.data.get_worker_info()
        self._num_skipped[worker.id % len(self._num_skipped) if worker else 0] += 1

    @property
    def num_skipped(self) -> int:
        """How many rows were skipped so far, counted again in each pass."""
        return int(self._num_skipped.sum())

    def set_epoch(self, epoch: int) -> None:
        """Draw new augmentation (and a new order, if the stream is shuffled) from the next pass on."""
        self._epoch.fill_(int(epoch))
        self.dataset.set_epoch(epoch)


def _checksum(row: dict[str, Any]) -> int:
    source = _audio_source(row.get("audio")) or b""
    content = source if isinstance(source, bytes) else source.encode()
    return zlib.crc32((row.get("text") or "").encode(), zlib.crc32(content))


# ---------------------------------------------------------------------------------------------------- 4. batches


@dataclass
class MMSERDataCollator:
    """Pads examples to a batch with the processor.

    All batches of a data set have the same keys, so that the ranks of a distributed run agree: a batch in which
    nobody has text still gets `input_ids` [B,1] with a mask of zeros, one without any audio a minimal silent
    `input_values` [B,400] (or `input_features` [B,mels,2]) with a mask of zeros. `audio_states` [Ta,layers,D] and
    `text_states` [L,D], in place of audio and text, are padded as they are; no rows mean that the modality is missing.
    """

    processor: MMSERProcessor

    def __call__(self, examples: Sequence[dict[str, Any] | None]) -> BatchFeature:
        """Make a batch of the examples of `EmotionDataset` or `CachedStatesDataset`; None (a skipped one) is left out.

        Returns:
            What the processor returns (`input_values` or `input_features`, `attention_mask`, `input_ids`,
            `text_attention_mask`) and `labels` [B] int64. For states: `audio_states` [B,Ta,layers,D] with
            `attention_mask` [B,Ta], `text_states` [B,L,D] with `text_attention_mask` [B,L], padded with zeros.

        Raises:
            ValueError: if no example is left.
        """
        rows = [example for example in examples if example is not None]
        if not rows:
            raise ValueError(f"a batch needs at least one readable example, got {len(examples)} bad ones")
        batch = self._process(rows)
        feature_extractor, tokenizer = self.processor.feature_extractor, self.processor.tokenizer
        if "text" in rows[0] and "input_ids" not in batch:
            batch["input_ids"] = torch.full((len(rows), 1), tokenizer.pad_token_id or 0)
            batch["text_attention_mask"] = torch.zeros(len(rows), 1, dtype=torch.long)
        if "audio" in rows[0] and "attention_mask" not in batch:
            name = feature_extractor.model_input_names[0]
            samples = round(MIN_SECONDS * feature_extractor.sampling_rate)
            shape = (samples,) if name == "input_values" else (feature_extractor.feature_size, 2)
            batch[name] = torch.zeros(len(rows), *shape)
            batch["attention_mask"] = torch.zeros(len(rows), shape[-1], dtype=torch.long)
        for name, mask_name in (("audio_states", "attention_mask"), ("text_states", "text_attention_mask")):
            if name in rows[0]:
                batch[name], batch[mask_name] = _pad_states([row[name] for row in rows])
        batch["labels"] = torch.tensor([row["labels"] for row in rows], dtype=torch.long)
        return batch

    def _process(self, rows: list[dict[str, Any]]) -> BatchFeature:
        """What the processor makes of the audio and text of a batch; empty if no row has either."""
        audio = [row.get("audio") for row in rows]
        text = [row.get("text") for row in rows]
        present = list(range(len(rows)))
        if "audio_states" in rows[0] or "text_states" in rows[0]:
            # A row that has nothing beside its states is nothing to the processor
            present = [index for index in present if audio[index] is not None or (text[index] or "").strip()]
            audio, text = [audio[index] for index in present], [text[index] for index in present]
            if not present:
                return BatchFeature()
        batch = self.processor(  # type: ignore[call-arg]  # the base class routes flat keywords
            audio=audio if any(clip is not None for clip in audio) else None,
            text=text if any(text) else None,
            sampling_rate=self.processor.feature_extractor.sampling_rate,
            padding=True,
            return_tensors="pt",
        )
        if len(present) < len(rows):
            for name, value in batch.items():
                fill = (self.processor.tokenizer.pad_token_id or 0) if name == "input_ids" else 0
                batch[name] = value.new_full((len(rows), *value.shape[1:]), fill)
                batch[name][present] = value
        return batch


def _pad_states(states: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoder states [T_i, ...] -> [B, T, ...] of the same dtype, zero after their end, and the mask [B, T] int64."""
    longest = max(1, *map(len, states))
    padded = np.zeros((len(states), longest, *states[0].shape[1:]), dtype=states[0].dtype)
    mask = np.zeros((len(states), longest), dtype=np.int64)
    for index, row in enumerate(states):
        padded[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return torch.from_numpy(padded), torch.from_numpy(mask)


def class_counts(dataset: datasets.Dataset | EmotionDataset, num_labels: int) -> list[int]:
    """Number of rows of each class, [num_labels]; unknown rows (-1) are not counted.

    Raises:
        TypeError: for a stream, whose rows cannot be counted beforehand.
        ValueError: if a label is not below `num_labels`.
    """
    table = dataset.dataset if isinstance(dataset, EmotionDataset) else dataset
    if not isinstance(table, datasets.Dataset):
        raise TypeError(f"class counts need a data set with random access, got {type(dataset).__name__}")
    labels = np.asarray(table["labels"], dtype=np.int64)
    if labels.size and labels.max() >= num_labels:
        raise ValueError(f"label {labels.max()} is out of range; allowed: 0 to {num_labels - 1}")
    return np.bincount(labels[labels >= 0], minlength=num_labels).tolist()


def duration_bands(seconds: Sequence[float] | np.ndarray) -> list[str]:
    """The band of each clip's duration, to compare scores by; the names of the bands sort in their order.

    Args:
        seconds: [N] durations, >= 0.

    Returns:
        N names: "0-1 s", "1-2 s", "2-4 s", "4-8 s" or "8+ s". A band has its lower bound, but not its upper one.

    Raises:
        ValueError: for a negative or non-finite duration, naming the first.
    """
    names = ("0-1 s", "1-2 s", "2-4 s", "4-8 s", "8+ s")
    durations = np.asarray(seconds, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(durations) | (durations < 0))
    if bad.size:
        raise ValueError(f"durations must be finite and >= 0, got {durations[bad[0]]} at index {bad[0]}")
    return [names[band] for band in np.searchsorted([1, 2, 4, 8], durations, side="right")]
