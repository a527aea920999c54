# SPDX-License-Identifier: Apache-2.0
"""Where clips come from: a table, a folder of tables or of classes, or a data set on the Hub, read into records.

Read in this order: `DataColumns` and `Request` (what to read), `Record` and `Layout` (how one row becomes a record),
then a reader for each kind of source: `read_table`, `read_folder`, `read_class_folders`, `read_hub`, `stream_hub`.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
from transformers.utils import logging

from mmser.bad_rows import skip_or_raise
from mmser.boundary import Boundary, Reach, is_elsewhere, of_folder, of_hub
from mmser.labels import UNKNOWN_LABEL, choose_label_names, label_id
from mmser.table_files import find_files, is_table, read_rows
from mmser.targets import COLUMN, Tasks, no_target, read_targets
from mmser.votes import FLAG, VoteColumns, Votes, normalise_votes, read_votes

logger = logging.get_logger(__name__)

SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev", "eval"), "test": ("test",)}
AUDIO_SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64"),
    *(".m4a", ".mp4", ".aac", ".webm", ".wma", ".amr", ".mka", ".mkv"),
)
OTHER, LEFT_OUT = "other", "left out"  # what a label map may make of a clip, other than one of a class
TEXT_COLUMNS = ("text", "speaker", "language", "corpus", "sex")  # our own columns that hold strings
ALTERNATIVE_COLUMNS = {  # other usual names, looked for where a default name is missing
    "audio": ("audio", "path", "file"),
    "label": ("emotion",),
    "text": ("text", "transcript", "sentence"),
    "speaker": (
        *("speaker_id", "speaker_name", "spk", "spk_id", "spkr", "talker", "talker_id", "actor", "actor_id"),
        *("client_id", "subject", "subject_id", "participant", "participant_id", "person", "person_id", "sid"),
    ),
    "sex": ("gender",),
}


@dataclass
class DataColumns:
    """Names of the columns to read; the flag for each is `--<field>_column`. None switches an optional one off.

    A default that is missing from the data is looked for under its other usual names (`ALTERNATIVE_COLUMNS`), however
    they are spelt (case, spaces, hyphens, underscores); a name that was chosen by the user must exist.
    """

    audio: str | None = "file_name"
    label: str | None = "label"
    text: str | None = "transcription"
    speaker: str | None = "speaker"
    language: str | None = "language"
    corpus: str | None = "corpus"
    sex: str | None = "sex"


@dataclass
class Request:
    """What to read from a source."""

    columns: DataColumns
    extra_columns: Sequence[str] = ()  # kept as strings under their own names
    split_names: dict[str, tuple[str, ...]] | None = None  # what each split may be called; None: ignore the splits
    tasks: Tasks = field(default_factory=dict)  # whose targets are read where there is a column of their name
    needs_labels: bool = True  # False: a source without a label column has clips of an unknown class
    votes: VoteColumns = field(default_factory=dict)  # see `vote_columns`; with them no label column is needed
    reach: Reach = field(default_factory=Reach)  # which files they may name
    problems: list[str] = field(default_factory=list)  # messages about bad rows; the readers add to them


@dataclass
class Record:
    """One row of a source under our own names. A value that is missing is `""`."""

    row: str  # where it is, for messages
    split: str | None
    label: Any  # as it is written; its id comes later, into `labels`
    audio: Any  # a path, or what a streamed data set holds
    extra: dict[str, str]
    text: str = ""
    speaker: str = ""
    language: str = ""
    corpus: str = ""
    sex: str = ""
    labels: int = UNKNOWN_LABEL
    written_targets: dict[str, Any] = field(default_factory=dict)  # by task, if the source has its column
    targets: dict[str, int | float] = field(default_factory=dict)  # what they mean; comes later, as `labels`
    cells: dict[str, Any] = field(default_factory=dict)  # of the columns with votes, as they are written
    votes: Votes | None = None  # what these say; None without such columns, and for a bad row
    class_shares: list[float] | None = None
    source: str = ""  # the name of the source, for messages and label maps
    role: str = ""  # `OTHER` or `LEFT_OUT` by a label map
    is_mapped: bool = False  # whether a label map said what becomes of its label
    is_embedded: bool = False  # whether its audio is in a table beside the records


@dataclass
class Layout:
    """Which column of a table holds what."""

    found: dict[str, str]  # our own name of a column -> its name in the table
    extra: list[str]
    class_names: dict[str, list[str]] = field(default_factory=dict)  # column -> names of the ids in it
    targets: dict[str, str] = field(default_factory=dict)  # task -> its column
    votes: VoteColumns = field(default_factory=dict)

    @property
    def columns(self) -> set[str]:
        """All columns that are read."""
        return {*self.found.values(), *self.extra, *self.targets.values(), *self.votes}

    def record(self, raw: dict, row: str, split: str | None = None) -> Record:
        """Make a record of one row. An id becomes its name, as it means nothing outside its data set."""
        raw = {**raw, **{column: _named(raw.get(column), names) for column, names in self.class_names.items()}}
        label = raw.get(self.found["label"]) if "label" in self.found else UNKNOWN_LABEL
        extra = {name: _string(raw.get(name)) for name in self.extra}
        record = Record(row, split, label, raw.get(self.found.get("audio")) or "", extra)
        for name in TEXT_COLUMNS:
            setattr(record, name, _string(raw.get(self.found.get(name))))
        record.written_targets = {task: raw.get(column) for task, column in self.targets.items()}
        record.cells = {column: raw.get(column) for column in self.votes}
        return record

    def declared_names(self) -> list[str] | None:
        """The names that the data set declares for its classes, if it does."""
        if self.votes and None not in self.votes.values():
            return [str(name) for name in self.votes.values()]
        column = next(iter(self.votes), None) or self.found.get("label", "")
        return self.class_names.get(column)


def _named(value: Any, names: list[str]) -> Any:
    """The name of an id, or those of a list of ids; what is missing, and -1, stays."""
    if isinstance(value, list):
        return [_named(entry, names) for entry in value]
    return value if value is None or value < 0 else names[value]


def _string(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _folded(column: str) -> str:
    """A name of a column without case, spaces, hyphens and underscores: "Speaker ID" is "speaker_id"."""
    return re.sub(r"[\s_-]", "", column.casefold())


def find_column(role: str, name: str | None, available: Sequence[str]) -> str | None:
    """The available column for a field of `DataColumns`: `name` or, if that is the default, another usual name."""
    if name != DataColumns.__dataclass_fields__[role].default:
        return name if name in available else None
    by_spelling = {_folded(column): column for column in reversed(available)}  # of two, the first one
    names = (str(name), *ALTERNATIVE_COLUMNS.get(role, ()))
    exact = next((candidate for candidate in names if candidate in available), None)
    found = exact or next((by_spelling[_folded(other)] for other in names if _folded(other) in by_spelling), None)
    if role == "speaker" and found not in (None, name):
        logger.info(f"The speakers are in the column {found!r}")
    return found


def find_layout(available: Sequence[str], request: Request, source: object) -> Layout:
    """Find the requested columns among the available ones; a missing column is an error if it is needed."""
    found = {}
    for role in fields(DataColumns):
        name = getattr(request.columns, role.name)
        is_default = name == role.default
        match = find_column(role.name, name, available)
        needs_label = role.name == "label" and request.needs_labels and not request.votes
        is_needed = not is_default or role.name == "audio" or needs_label
        if match is not None:
            found[role.name] = match
        elif name and is_needed:
            hint = ", or pass `none` for data without audio" if role.name == "audio" else ""
            raise ValueError(
                f"{source} has no {role.name} column {name!r}; its columns are {list(available)}. "
                f"Name the right one with --{role.name}_column{hint}."
            )
        elif name and role.name == "text":
            logger.warning_once(
                f"{source} has no text column {name!r} and is used without transcripts; its columns are "
                f"{list(available)}. Name another one with --text_column."
            )
    if "audio" not in found and "text" not in found:
        raise ValueError(
            f"{source} has neither an audio column {request.columns.audio!r} nor a text column "
            f"{request.columns.text!r}; its columns are {list(available)}. Name the right ones with --audio_column "
            "and --text_column."
        )
    kept_anyway = (found.keys() - {"label"}) | {"labels", "row", COLUMN}
    extra = [name for name in dict.fromkeys(request.extra_columns) if name not in kept_anyway]
    missing = [name for name in extra if name not in available]
    if missing:
        raise ValueError(f"{source} has no column {', '.join(map(repr, missing))}; its columns are {list(available)}")
    missing = [name for name in request.votes if name not in available]
    if missing:
        raise ValueError(
            f"{source} has no column {', '.join(map(repr, missing))} ({FLAG}); its columns are {list(available)}"
        )
    for name in extra:
        if name in ("audio", "text"):  # under these names, examples would be made of it
            raise ValueError(f"{source}: {name!r} cannot be an extra column, as --{name}_column is none")
    by_spelling = {_folded(column): column for column in reversed(available)}
    columns = {task: found.get(task) or by_spelling.get(_folded(task)) for task in request.tasks}
    return Layout(found, extra, {}, {task: column for task, column in columns.items() if column}, request.votes)


def _pick_splits(available: Iterable[str], request: Request, source: object) -> dict[str, str]:
    """Map the splits that the source has (train, validation, test) to its own names for them."""
    available = list(available)
    picked = {}
    for split, names in (request.split_names or {}).items():
        usual = [name.casefold() for name in names]
        found = [name for name in available if name.casefold() in usual]
        if len(found) > 1:
            raise ValueError(f"{source} has two {split} splits, {found}: choose one with --{split}_split")
        if found:
            picked[split] = found[0]
        elif names != SPLIT_NAMES[split]:  # chosen by the user
            raise ValueError(f"{source} has no split {names[0]!r} (--{split}_split); it has: {available}")
    if not picked:
        raise ValueError(f"{source} has no split with a usual name, it has {available}: name one with --train_split")
    return picked


def read_table(
    path: Path,
    request: Request,
    *,
    root: Path | None = None,
    split: str | None = None,
    boundary: Boundary | None = None,
) -> list[Record]:
    """Read one CSV, TSV or JSONL file.

    Args:
        path: the file. Audio paths in it are relative to its folder.
        request: what to read.
        root: messages name the file relative to this folder; default: its own.
        split: the split of all rows. None: the one that the `split` column says, if there is one, else train.
        boundary: which files it may name. None: any on this machine, as the user named the table.

    Returns:
        A record for each good row; messages give its line in the file. Bad rows go to `request.problems`.
    """
    boundary = boundary or Boundary(request.reach, None)
    if refusal := boundary.refusal(str(path)):
        raise ValueError(f"the table {refusal}")
    name = os.path.relpath(path, root or path.parent)
    rows = read_rows(path, name, request.problems)
    if not rows:
        return []
    available = list(dict.fromkeys(column for _, raw in rows for column in raw))
    layout = find_layout(available, request, path)
    values = [split or "train"] * len(rows)
    split_of = {values[0]: values[0]}
    if split is None and request.split_names is not None:
        column = next((column for column in available if column.casefold() == "split"), None)
        if column is not None:
            values = [_string(raw.get(column)).casefold() for _, raw in rows]
        split_of = {value: split for split, value in _pick_splits(dict.fromkeys(values), request, path).items()}
    records = []
    for (number, raw), value in zip(rows, values, strict=True):
        record = layout.record(raw, f"{name} row {number}", split_of.get(value))
        if not isinstance(record.audio, str):
            request.problems.append(f"{record.row}: the audio must be a path, got {record.audio!r:.60}")
        elif record.split is None:
            request.problems.append(f"{record.row}: split {value!r} is none of {', '.join(split_of)}")
        elif is_elsewhere(record.audio) and (refusal := boundary.refusal(record.audio)):  # before anything looks there
            request.problems.append(f"{record.row}: {refusal}")
        else:
            records.append(record)
    files = find_files(path.parent, {record.audio for record in records if record.audio}, name)
    for record in records:
        record.audio = files.get(record.audio, "")
    return _within(boundary, records, request)


def _within(boundary: Boundary, records: Iterable[Record], request: Request) -> list[Record]:
    """The records whose files the data may name; the others become problems."""
    kept = []
    for record in records:
        if record.audio and (refusal := boundary.refusal(record.audio)):
            request.problems.append(f"{record.row}: {refusal}")
        else:
            kept.append(record)
    return kept


def read_folder(folder: Path, request: Request) -> list[Record]:
    """Read a folder with `<split>/metadata.csv` or `<split>.csv` for each split, or one `metadata.csv` at the top.

    A folder without any table is read by `read_class_folders`.
    """
    if not folder.is_dir():
        raise ValueError(f"data_dir {str(folder)!r} is not a folder")
    tables: dict[str, list[Path]] = defaultdict(list)
    for table in sorted([*folder.glob("*/metadata.*"), *folder.glob("*.*")]):
        if is_table(table):
            tables[table.stem if table.parent == folder else table.parent.name].append(table)
    usual = {name.casefold() for names in (request.split_names or {}).values() for name in names}
    if not tables and (records := read_class_folders(folder, request)):
        return records
    if not any(name.casefold() in usual for name in tables):
        return read_table(find_metadata(folder), request, root=folder, boundary=of_folder(folder, request.reach))
    tables.pop("metadata", None)
    unread = [path.name for path in _subfolders(folder) if path.name.casefold() in usual and path.name not in tables]
    if unread:
        logger.warning(f"{folder}: {', '.join(unread)} has no metadata.csv (or .tsv, .jsonl) and is not read")
    records, boundary = [], of_folder(folder, request.reach)
    for split, name in _pick_splits(tables, request, folder).items():
        records += read_table(_only_one(tables[name]), request, root=folder, split=split, boundary=boundary)
    return records


def read_class_folders(folder: Path, request: Request) -> list[Record]:
    """Read a folder whose sub-folders are classes: `train/happy/x.wav`, or `happy/x.wav` without splits.

    Loose clips have no class: they are allowed only where no labels are needed.

    Returns:
        The records, sorted by path; messages give the path. No record if there is no clip.

    Raises:
        ValueError: if a clip lies deeper or higher than in the folder of its class, or columns are asked for.
    """
    splits: dict[str | None, Path] = {None: folder}
    if request.split_names is not None:
        names = [path.name for path in _subfolders(folder)]
        usual = {name.casefold() for names in request.split_names.values() for name in names}
        is_divided = any(name.casefold() in usual for name in names)
        picked = _pick_splits(names if is_divided else ["train"], request, folder)
        splits = {split: folder / name if is_divided else folder for split, name in picked.items()}
    rows = []
    for split, top in splits.items():
        for path in sorted(top.rglob("*")):
            if path.suffix.lower() not in AUDIO_SUFFIXES or path.name.startswith(".") or not path.is_file():
                continue
            parts = path.relative_to(top).parts
            if len(parts) > 2 or (len(parts) == 1 and request.needs_labels):
                raise ValueError(
                    f"{folder} has no metadata, and {path.relative_to(folder)} is not in the folder of a class: "
                    "expected train/happy/x.wav and so on, happy/x.wav, or a metadata.csv"
                )
            label = parts[0] if len(parts) == 2 else UNKNOWN_LABEL
            rows.append((split, {"file_name": str(path), "label": label}, str(path.relative_to(folder))))
    if not rows:
        return []
    if request.columns.text == DataColumns.text:  # else its lack would be followed by advice about columns
        request = replace(request, columns=replace(request.columns, text=None))
    layout = find_layout(("file_name", "label"), request, f"{folder}, a folder without metadata,")
    classes = dict.fromkeys(str(raw["label"]) for _, raw, _ in rows)
    logger.info(f"{folder} has no metadata: its classes are the folders {', '.join(classes)}, without transcripts")
    records = [layout.record(raw, row, split) for split, raw, row in rows]
    return _within(of_folder(folder, request.reach), records, request)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def find_metadata(folder: Path) -> Path:
    """The one table `metadata.csv`, `.tsv` or `.jsonl` in a folder."""
    tables = [path for path in sorted(folder.iterdir()) if is_table(path) and path.stem == "metadata"]
    if not tables:
        content = sorted(entry.name for entry in folder.iterdir())
        others = [name for name in content if is_table(folder / name)]
        advice = f". If {others[0]} lists the clips, give that: --manifest {folder / others[0]}" if others else ""
        raise ValueError(
            f"{folder} has no metadata: expected metadata.csv (or .tsv, .jsonl) at the top or, for training data, in "
            "train/, validation/ and test/, or train.csv, or folders of classes with clips; the folder has "
            f"{', '.join(content[:5]) or 'nothing'}{' ...' if len(content) > 5 else ''}{advice}"
        )
    return _only_one(tables)


def _only_one(tables: Sequence[Path]) -> Path:
    if len(tables) > 1:  # to choose one would be a guess
        raise ValueError(f"found both {tables[0]} and {tables[1]}: keep one of them")
    return tables[0]


def read_hub(
    name: str, config_name: str | None, request: Request
) -> tuple[list[Record], datasets.Dataset | None, list[str] | None]:
    """Read a data set on the Hub.

    Returns:
        The records; the audio, a table with one column and a row for each record, if the data set embeds it; and the
        names that it declares for its classes, if it does.
    """
    loaded = _load_hub_dataset(name, config_name)
    splits = {split: loaded[their] for split, their in _pick_splits(loaded, request, name).items()}
    features = next(iter(splits.values())).features  # the same for all splits
    layout = _hub_layout(features, list(features), request, name)
    column = layout.found.get("audio", "")
    feature = features.get(column)
    audio = None
    if isinstance(feature, datasets.Audio | dict):
        # never let `datasets` decode: that needs torchcodec, and we have soundfile
        audio = datasets.concatenate_datasets([dataset.select_columns(column) for dataset in splits.values()])
        audio = audio.cast_column(column, datasets.Audio(decode=False))
        audio = audio if column == "audio" else audio.rename_column(column, "audio")
    elif feature is not None and getattr(feature, "dtype", "") not in ("string", "large_string"):
        raise ValueError(f"{name}: column {column!r} must hold audio files or paths, not {feature}")
    wanted = layout.columns - ({column} if audio is not None else set())
    records = [
        layout.record(raw, f"{name} {dataset.split} row {index}", split)
        for split, dataset in splits.items()
        for index, raw in enumerate(dataset.select_columns([other for other in features if other in wanted]))
    ]
    boundary = of_hub(name, request.reach)
    if audio is None:
        return _within(boundary, records, request), None, layout.declared_names()
    for record in records:
        record.is_embedded = True
    refused = _refused_paths(boundary, audio)
    if refused:
        request.problems += [f"{records[index].row}: {refusal}" for index, refusal in refused.items()]
        kept = [index for index in range(len(records)) if index not in refused]
        records, audio = [records[index] for index in kept], audio.select(kept)
    return records, audio, layout.declared_names()


def _refused_paths(boundary: Boundary, audio: datasets.Dataset) -> dict[int, str]:
    """Of a table with embedded audio: the rows that hold a path alone which they may not name. Audio is not read."""
    refused, start = {}, 0
    for chunk in audio.data.column("audio").chunks:
        has_none = pyarrow.compute.is_null(chunk.field("bytes")).to_numpy(zero_copy_only=False)
        paths = chunk.field("path").filter(pyarrow.array(has_none)).to_pylist()
        for index, path in zip(np.flatnonzero(has_none).tolist(), paths, strict=True):
            if path and (refusal := boundary.refusal(path)):
                refused[start + index] = refusal
        start += len(chunk)
    return refused


def stream_hub(
    name: str,
    config_name: str | None,
    request: Request,
    label_names: Sequence[str] | None,
    on_bad_example: str,
    checkpoint_names: Sequence[str] | None = None,
) -> tuple[datasets.IterableDatasetDict, list[str]]:
    """Read a data set on the Hub row by row while training. A bad row then raises, or (skip) has `labels` None.

    Returns:
        The splits, with the columns of `load_emotion_dataset`, and the label names.
    """
    loaded = _load_hub_dataset(name, config_name, streaming=True)
    picked = _pick_splits(loaded, request, name)
    logger.warning(
        f"{name} is streamed: whether a speaker or a clip is in two of its splits {list(picked.values())}, "
        "which labels it has and how many clips of each cannot be checked, and splits that it lacks are not made."
    )
    streams = {}
    for split, split_name in picked.items():
        stream = loaded[split_name]
        for column, feature in (stream.features or {}).items():
            if isinstance(feature, datasets.Audio):
                stream = stream.cast_column(column, datasets.Audio(decode=False))
        available = stream.column_names or list(next(iter(stream)))  # it may not know them before its first row
        layout = _hub_layout(stream.features or {}, available, request, name)
        label_names = choose_label_names(label_names, layout.declared_names(), checkpoint_names=checkpoint_names)
        options = {"layout": layout, "label_names": label_names, "on_bad_example": on_bad_example}
        options |= {"source": f"{name} {split_name}", "tasks": request.tasks}
        options |= {"boundary": of_hub(name, request.reach)}
        streams[split] = stream.map(_stream_row, with_indices=True, remove_columns=available, fn_kwargs=options)
    return datasets.IterableDatasetDict(streams), list(label_names or ())


def _stream_row(
    raw: dict,
    index: int,
    layout: Layout,
    source: str,
    label_names: list[str],
    on_bad_example: str,
    tasks: Tasks,
    boundary: Boundary,
) -> dict[str, Any]:
    record = layout.record(raw, f"{source} row {index}")
    row: dict[str, Any] = {name: getattr(record, name) for name in layout.found if name != "label"}
    row.update(record.extra, row=record.row, labels=None)
    if layout.targets:
        row[COLUMN] = {task: no_target(tasks[task]) for task in layout.targets}
    try:
        _refuse_streamed(record, boundary)
        row |= {COLUMN: read_targets(record.written_targets, tasks, record.row)} if layout.targets else {}
        if layout.votes:
            row["class_shares"] = None
            votes = read_votes(record.cells, layout.votes, record.row)
            row["class_shares"], row["labels"] = normalise_votes(votes, record.label, label_names, record.row)
        else:
            row["labels"] = label_id(record.label, label_names, record.row)
    except ValueError as error:
        skip_or_raise(error, on_bad_example)
    return row


def _refuse_streamed(record: Record, boundary: Boundary) -> None:
    held = record.audio if isinstance(record.audio, dict) else {"path": record.audio}
    path = held.get("path") if held.get("bytes") is None else None
    if isinstance(path, str) and path and (refusal := boundary.refusal(path)):
        raise ValueError(f"{record.row}: {refusal}")


def _hub_layout(features: dict[str, Any], available: Sequence[str], request: Request, source: str) -> Layout:
    """`find_layout`, with the declared class names. A column of type `Audio` is the audio if none was named."""
    audio = [name for name, feature in features.items() if isinstance(feature, datasets.Audio)]
    if audio and request.columns.audio == DataColumns.audio:
        request = replace(request, columns=replace(request.columns, audio=audio[0]))
    layout = find_layout(available, request, source)
    for name, feature in features.items():
        classes = getattr(feature, "feature", feature)  # of a list, or the feature itself
        if isinstance(classes, datasets.ClassLabel):
            layout.class_names[name] = classes.names
    return layout


def _load_hub_dataset(name: str, config_name: str | None, **options) -> datasets.DatasetDict:
    """`datasets.load_dataset`, with advice where it insists on torchcodec: data stored as loose audio files."""
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
