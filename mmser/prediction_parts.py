# SPDX-License-Identifier: Apache-2.0
"""Bulk prediction: the answers in parts, shared out over the processes of a launcher, and resumable part by part.

`run` is all of it. A part is there as a whole or not at all, and says by its name which inputs it is of; a file beside
says what it holds and how these were. Processes do not talk to each other, and a run that was killed goes on with the
parts that are missing. Who finds all of them there merges them.
"""

import csv
import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from mmser import prediction_run
from mmser.files import check_writable, whole_file, write_atomically
from mmser.names import CONFIG
from mmser.prediction_arguments import PredictionArguments, Share
from mmser.prediction_files import content
from mmser.prediction_inputs import Input, add_texts, find_inputs, measure, speaker_turns
from mmser.table_files import csv_line
from mmser.timed_files import Span

IDENTITY = "run.json"  # what the parts in a folder are the answers to
PARTS = "parts"  # the folder of the parts in it
CHECKS = "checks"  # that of what they are made of
MERGED = "answers"  # the name of the one file that they become
SAMPLE = 65536  # bytes of a file, to tell it from others
# Flags that change answers
ASKED = (
    *("segments", "segments_above", "chunk_length_s", "stride_length_s", "allowed_labels", "return_set"),
    *("part_size", "format", "audio_column", "text_column", "allow_outside_files", "adapt_to_inputs"),
)


@dataclass
class Bulk:
    """All inputs of a run with the turns of each, and where the parts of the answers are."""

    inputs: list[Input]
    turns: list[list[Span]]
    notes: list[str]
    folder: Path
    size: int
    format: str

    @property
    def parts(self) -> list[Path]:
        number = -(-len(self.inputs) // self.size)
        name = f"part-{{:05d}}-of-{number:05d}.{self.format}"
        return [self.folder / PARTS / name.format(index) for index in range(number)]

    @property
    def merged(self) -> Path:
        return self.folder / f"{MERGED}.{self.format}"

    def missing(self, share: Share) -> list[int]:
        """The numbers of the parts that this process has still to make. Why one is made again is told."""
        found = []
        for number in range(share.rank, len(self.parts), share.processes):
            path = self.parts[number]
            if not path.is_file():
                found.append(number)
            elif why := self.fault(number):
                print(f"{path} is made again: {why}", file=sys.stderr)
                found.append(number)
        return found

    def fault(self, number: int) -> str:
        """Why a part that is there is not what its inputs would give now; empty for a right one."""
        try:
            check = json.loads(self.check(number).read_bytes())
            digest, looks = check["digest"], dict(check["inputs"])
        except FileNotFoundError:
            return "what it was made of is not known"
        except (ValueError, LookupError, TypeError):
            return f"{self.check(number)} is damaged"
        if digest != _digest(self.parts[number].read_bytes()):
            return "it is damaged"
        inputs = self.of(number)
        changed = [one.name for one in inputs if one.source not in looks or not _is_as_it_was(one, looks[one.source])]
        return f"{changed[0]} has changed since" if changed else ""

    def of(self, number: int) -> list[Input]:
        """The inputs of a part."""
        return self.inputs[number * self.size : (number + 1) * self.size]

    def check(self, number: int) -> Path:
        """The file that says what a part is and what it was made of."""
        return self.folder / CHECKS / self.parts[number].with_suffix(".json").name


def run(options: PredictionArguments, share: Share) -> int:
    """
    Classify the share of this process, part by part, and merge all parts once they are there.

    Returns: the exit code, 1 if some inputs have an error. With several processes always 0: a launcher ends the other
        processes when one of them fails.

    Raises:
        ValueError: the folder holds the answers to something else.
    """
    bulk = find_bulk(options)
    check_writable(bulk.folder)
    claim(bulk.folder, identity_of(bulk, options))
    for name in (PARTS, CHECKS):
        (bulk.folder / name).mkdir(exist_ok=True)
    for note in bulk.notes if share.rank == 0 else ():
        print(f"note: {note}", file=sys.stderr)
    missing = bulk.missing(share)
    if missing:
        classifier = prediction_run.load_classifier(str(options.model_name_or_path), share.device(options.device))
        if options.adapt_to_inputs:
            print(f"note: {prediction_run.adapt(classifier, bulk.inputs, options)}", file=sys.stderr)
        for place, number in enumerate(missing, start=1):
            make_part(bulk, number, classifier, options)
            print(f"process {share.rank}: part {number + 1}, {place} of {len(missing)} to make", file=sys.stderr)
    others = (number for number in range(len(bulk.parts)) if number % share.processes != share.rank)
    # The parts of others are read only once all are there: by the last process, and not by each
    if not all(path.is_file() for path in bulk.parts) or any(map(bulk.fault, others)):
        print(f"process {share.rank} is done; other parts are not there yet", file=sys.stderr)
        return 0
    errors = merge(bulk)
    also = f", {errors} with an error (column `error`)" if errors else ""
    print(f"Written: {bulk.merged}, the answers to {len(bulk.inputs)} inputs{also}")
    return int(errors > 0 and share.processes == 1)


def find_bulk(options: PredictionArguments) -> Bulk:
    """What is to be done, in an order that every process finds; no input is opened yet."""
    inputs = find_inputs(options.inputs, options.allow_outside_files)
    notes = add_texts(inputs, options)
    turns = speaker_turns(inputs, Path(options.speakers)) if options.speakers else []
    return Bulk(inputs, turns, notes, Path(str(options.output_dir)), options.part_size, str(options.format))


def make_part(bulk: Bulk, number: int, classifier: Any, options: PredictionArguments) -> None:
    """Classify the inputs of a part, and write it as a whole or not at all."""
    chosen = slice(number * bulk.size, (number + 1) * bulk.size)
    inputs = bulk.of(number)
    looks = [(one.source, _look_of(one)) for one in inputs]  # before they are read: one may change meanwhile
    measure(inputs)
    prediction_run.leave_long_texts_out(inputs, options)
    job = prediction_run.Job(inputs, bulk.turns[chosen], [], options.by_segment)
    predictions = prediction_run.classify(classifier, job, options)
    labels = prediction_run.labels_of(classifier, options)
    data = content(predictions, labels, bulk.format, options.by_segment)
    write_atomically(bulk.check(number), json.dumps({"digest": _digest(data), "inputs": looks}) + "\n")
    write_atomically(bulk.parts[number], data)


# --- whose answers these are -----------------------------------------------------------------------------------------


def identity_of(bulk: Bulk, options: PredictionArguments) -> dict[str, Any]:
    """What the answers depend on: the model, the inputs in their order, what is said in them, the flags."""
    texts = [options.transcripts, options.speakers]
    return {
        "checkpoint": fingerprint(str(options.model_name_or_path)),
        "inputs": f"{len(bulk.inputs)}, {_digest(chr(0).join(one.name for one in bulk.inputs).encode())}",
        "transcripts or speakers": [_digest(Path(path).read_bytes()) if path else None for path in texts],
        "flags": {name: getattr(options, name) for name in ASKED},
    }


def fingerprint(checkpoint: str) -> str:
    """Of a folder its configuration and, of each file of weights, the size and the middle; of a name on the Hub it."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return checkpoint
    digest = hashlib.blake2b((folder / CONFIG).read_bytes(), digest_size=10)
    for path in sorted(path for kind in ("*.safetensors", "*.onnx") for path in folder.glob(kind)):
        digest.update(f"{path.name} {path.stat().st_size} ".encode() + _middle(path))
    return digest.hexdigest()


def _middle(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - SAMPLE) // 2)
        return file.read(SAMPLE)


def _look_of(one: Input) -> list[Any] | None:
    """The size, the time and a checksum of the middle of a file; None of what is no file, or cannot be read."""
    try:
        status = os.stat(one.source)
        middle = _middle(one.source) if stat.S_ISREG(status.st_mode) else None
    except OSError:  # it has a row with its error; an address has none
        return None
    return None if middle is None else [status.st_size, status.st_mtime_ns, _digest(middle)]


def _is_as_it_was(one: Input, look: Sequence[Any] | None) -> bool:
    """Whether an input still has this look. A file that was copied has another time, and is read for its checksum."""
    try:
        status = os.stat(one.source)
    except OSError:
        return look is None
    if look is not None and look[:2] == [status.st_size, status.st_mtime_ns]:
        return True
    now = _look_of(one)
    return (now and [now[0], now[2]]) == (look and [look[0], look[2]])


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=10).hexdigest()


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """
    Make a folder that of these answers; all processes write the same.

    Raises:
        ValueError: it is that of others, or holds something else.
    """
    path = folder / IDENTITY
    if path.is_file():
        try:
            found = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged, so whose answers {folder} holds is not known: give another --output_dir, or "
                "delete this one."
            ) from error
        different = [name for name, value in identity.items() if found.get(name) != value]
        if different:
            raise ValueError(
                f"--output_dir {folder} holds the answers of a run that differs in its {different[0]}: give another "
                "folder, or delete it."
            )
        return
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    if visible and {path.name for path in visible} != {IDENTITY, PARTS, CHECKS}:
        raise ValueError(f"--output_dir {folder} holds {visible[0].name}, which is no part of answers: give another.")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")


# --- one file of all parts -------------------------------------------------------------------------------------------


def merge(bulk: Bulk) -> int:
    """Write the answers of all parts into one file, a part at a time. Returns: how many rows have an error."""
    with whole_file(bulk.merged) as hidden:
        return {"jsonl": _merge_jsonl, "csv": _merge_csv, "parquet": _merge_parquet}[bulk.format](bulk.parts, hidden)


def _merge_jsonl(parts: Sequence[Path], path: Path) -> int:
    errors = 0
    with open(path, "wb") as file:
        for part in parts:
            data = part.read_bytes()
            errors += sum(bool(json.loads(line)["error"]) for line in data.splitlines())
            file.write(data)
    return errors


def _merge_csv(parts: Sequence[Path], path: Path) -> int:
    errors = 0
    columns = _widest([next(rows) for rows in map(_csv_rows, parts)])
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(csv_line(columns))
        for part in parts:
            rows = _csv_rows(part)
            header = next(rows)
            places = [header.index(name) if name in header else None for name in columns]
            for row in rows:
                file.write(csv_line("" if place is None else row[place] for place in places))
                errors += bool(row[header.index("error")])
    return errors


def _csv_rows(path: Path) -> Iterator[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        yield from csv.reader(file)


def _merge_parquet(parts: Sequence[Path], path: Path) -> int:
    errors = 0
    schemas = [pyarrow.parquet.read_schema(part) for part in parts]
    names = _widest([schema.names for schema in schemas])
    kinds = pyarrow.unify_schemas(schemas)
    schema = pyarrow.schema([kinds.field(name) for name in names])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for part in parts:
            table = pyarrow.parquet.read_table(part)
            for name in set(names) - set(table.column_names):
                table = table.append_column(name, pyarrow.nulls(len(table), schema.field(name).type))
            writer.write_table(table.select(names))
            errors += sum(map(bool, table["error"].to_pylist()))
    return errors


def _widest(headers: Sequence[list[str]]) -> list[str]:
    """The columns of the part that has most: one of bad inputs alone lacks those of sets and of other tasks."""
    return max(headers, key=len)
