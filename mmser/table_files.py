# SPDX-License-Identifier: Apache-2.0
"""Rows of CSV, TSV and JSONL files, and the files that they name, as spreadsheets and other systems write them too.

`read_rows` finds the delimiter and the encoding (`read_text`), `find_files` the files; `as_text` is for tables that
spreadsheets read.
"""

import codecs
import csv
import difflib
import io
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")
MAX_BYTES = 2**31  # of a table or a text: those of ten million clips
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


# What spreadsheets take for the beginning of a formula, also in its wide forms; apostrophes before it count as ours
FORMULA = re.compile(r"'*[=+@\t\r\n\uff1d\uff0b\uff20\uff0d-]")


def as_text(cell: Any) -> Any:
    """
    A cell as a spreadsheet may read it: words that it would take for a formula get an apostrophe in front, as one
    types it there. Numbers stay. `read_rows` takes the apostrophe away.
    """
    if not isinstance(cell, str) or FORMULA.match(cell) is None:
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def from_text(cell: str) -> str:
    """What `as_text` was given."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


def csv_line(cells: Iterable[Any]) -> str:
    """A line of a CSV file. Line breaks of any kind are in quotes: `csv` forgets CR where lines end in LF."""
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\r\n").writerow(cells)
    return f"{line.getvalue()[:-2]}\n"


def is_table(path: Path) -> bool:
    """Whether a file's name ends like that of a table."""
    return path.suffix.lower() in TABLE_SUFFIXES


def near_name(path: Path) -> str:
    """What to say after the name of something that is not there: whether something near it is meant, or where it is
    looked for."""
    near = near_path(path)
    if near is not None:
        return f" Did you mean {near}?"
    missing = [folder for folder in path.parents if not folder.exists()]
    return f" There is no folder {missing[-1]}." if missing else f" It is looked for in {path.parent.resolve()}."


def near_path(path: Path) -> Path | None:
    """What is there and has nearly this name, with folders that have nearly those of its folders."""
    folder: Path | None = path.parent
    if folder == path:
        return None
    if not path.parent.is_dir():
        folder = near_path(path.parent)
    if folder is None or not folder.is_dir():
        return None
    if folder != path.parent and (folder / path.name).exists():
        return folder / path.name
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], 1)
    return folder / near[0] if near else None


def _what_it_may_be(path: Path) -> str:
    if path.is_dir():
        tables = sorted(str(entry) for entry in path.iterdir() if is_table(entry))
        table = f", {tables[0]}," if tables else ""
        return f" It is a folder: give the table in it{table} or give the folder as data_dir (--data_dir)."
    return " Save a spreadsheet as CSV." if path.suffix.lower() in SPREADSHEETS else ""


def read_rows(path: Path, name: str, problems: list[str]) -> list[tuple[int, dict]]:
    """The good rows of a table.

    Args:
        path: a CSV, TSV or JSONL file in UTF-8 or, with a byte order mark, UTF-16.
        name: what messages call it.
        problems: messages about bad rows are added to it.

    Returns:
        The rows by column, each with its line number.

    Raises:
        ValueError: if the file is not there, not such a table, not in such an encoding, or has no rows.
    """
    if not is_table(path):
        raise ValueError(
            f"{path} is not a manifest: expected a file ending in {', '.join(TABLE_SUFFIXES)}.{_what_it_may_be(path)}"
        )
    if not path.is_file():
        raise ValueError(f"{path} does not exist.{near_name(path)}")
    file = io.StringIO(read_text(path, name), newline="")
    rows = []
    for number, row in _json_rows(file) if path.suffix.lower() == ".jsonl" else _csv_rows(file, name):
        if isinstance(row, dict):
            rows.append((number, row))
        else:
            problems.append(f"{name} row {number} {row}")
    if not rows and not problems:
        raise ValueError(f"{path} has no rows")
    return rows


def read_content(path: Path, name: str) -> bytes:
    """The bytes of a table or a text; ValueError, about `name`, if they are more than `MAX_BYTES`."""
    size = path.stat().st_size  # which may be a claim: a file with holes takes no room on the disk
    if size > MAX_BYTES:
        raise ValueError(
            f"{name} has {size:,} bytes, and at most {MAX_BYTES:,} of a table or a text are read: divide it"
        )
    return path.read_bytes()


def read_text(path: Path, name: str) -> str:
    """The text of a file in UTF-8 or, with a byte order mark, UTF-16; ValueError, about `name`, for any other."""
    content = read_content(path, name)
    is_utf32 = content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE))  # the first begins like UTF-16
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and not is_utf32:
        logger.info(f"{name} is in UTF-16")
        try:
            return content.decode("utf-16")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name} begins like UTF-16, but is not ({error.reason} at byte {error.start}): save it as UTF-8"
            ) from error
    if is_utf32 or b"\0" in content:
        raise ValueError(f"{name} holds zero bytes (perhaps it is UTF-16 without a mark, or UTF-32): save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{name} is not UTF-8 text (row {line} has the byte {content[error.start]:#x}; perhaps it is in "
            "Windows-1252, as spreadsheets save it): save it as UTF-8"
        ) from error


def _json_rows(file: Iterable[str]) -> Iterator[tuple[int, dict | str]]:
    """Line numbers, each with the row or what is wrong with it."""
    from configuration_mmser import check_depth  # here: flags need this module, and do not wait for torch

    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            check_depth(row, "It")
        except json.JSONDecodeError as error:
            yield number, f"is not valid JSON: {error}"
        except (ValueError, RecursionError):
            yield number, "is nested too deeply"
        else:
            yield number, row if isinstance(row, dict) else f"is not a JSON object: {line.strip()[:60]}"


def _csv_rows(file: io.StringIO, name: str) -> Iterator[tuple[int, dict | str]]:
    """Line numbers, each with the row or what is wrong with it."""
    text = file.getvalue().lstrip()
    named = re.match(r"sep=(.)[\r\n]", text)  # a first line that is for spreadsheets alone
    delimiter = named[1] if named else _find_delimiter(re.split(r"[\r\n]", text, maxsplit=1)[0], name)
    reader = csv.reader(file, delimiter=delimiter, strict=True)  # else an open quote swallows the rest of the file
    try:
        lines = (values for values in reader if values)
        if named:
            next(lines)
        header = [column.strip() for column in next(lines, [])]
        twice = [column for column, count in Counter(header).items() if column and count > 1]
        if twice:
            raise ValueError(f"{name} has two columns {twice[0]!r}: rename one of them")
        for values in lines:
            if len(values) == len(header):
                yield reader.line_num, dict(zip(header, map(from_text, values), strict=True))
            else:
                yield reader.line_num, f"has {len(values)} fields, but the header has {len(header)}"
    except csv.Error as error:
        raise ValueError(f"{name} row {reader.line_num} is malformed: {error}") from error


def _find_delimiter(header: str, name: str) -> str:
    """The delimiter that makes the most columns of the header; where none is better, the usual one of the suffix."""
    usual = "\t" if name.lower().endswith(".tsv") else ","
    columns = {delimiter: len(next(csv.reader([header], delimiter=delimiter), [])) for delimiter in DELIMITERS}
    best = max(DELIMITERS, key=lambda delimiter: (columns[delimiter], delimiter == usual))
    if best != usual:
        logger.info(f"The columns of {name} are separated by {DELIMITERS[best]}")
    return best


def find_files(folder: Path, names: Iterable[str], table: str) -> dict[str, str]:
    """Where the files are that a table names.

    A file that is not where its name says is looked for as another system writes it: with backslashes, in another
    Unicode normal form, in other case, or, for an absolute path, under `folder` without the first folders. Such a find
    counts if it is the only one, and no other name means that file.

    Args:
        folder: what relative names are relative to.
        names: as they are written; addresses (`://`) and files that are nowhere stay as they are.
        table: for the warning.

    Returns:
        Name -> path, under `folder` unless the name is absolute.
    """
    paths = {name: name if "://" in name else os.path.join(folder, name) for name in names}
    missing = [name for name, path in paths.items() if "://" not in path and not os.path.exists(path)]
    listings: dict[str, dict[str, list[str]]] = {}
    found = {name: path for name in missing if (path := _find_as_written_elsewhere(folder, name, listings))}
    if not found:
        return paths
    taken = Counter(os.path.normpath(found.get(name, path)) for name, path in paths.items())
    found = {name: path for name, path in found.items() if taken[os.path.normpath(path)] == 1}
    if found:
        name, path = next(iter(found.items()))
        logger.warning(
            f"{table}: {len(found)} of {len(paths)} files are found only if names are read as another system writes "
            f"them, such as {name!r} as {os.path.relpath(path, folder)!r}"
        )
    return {**paths, **found}


def _find_as_written_elsewhere(folder: Path, name: str, listings: dict[str, dict[str, list[str]]]) -> str | None:
    written = PureWindowsPath(name)  # knows both kinds of slashes, and drives
    parts = written.parts[1:] if written.anchor else written.parts
    for start in range(len(parts) if written.anchor else 1):
        path = _walk(str(folder), parts[start:], listings)
        if path is not None:
            return path
    return None


def _walk(path: str, parts: Iterable[str], listings: dict[str, dict[str, list[str]]]) -> str | None:
    """Follow the parts of a path, each to the one entry whose name is the same but for case and normal form."""
    for part in parts:
        if part != ".." and not os.path.exists(os.path.join(path, part)):
            if path not in listings:
                listings[path] = {}
                for entry in os.listdir(path) if os.path.isdir(path) else ():
                    listings[path].setdefault(_key(entry), []).append(entry)
            same = listings[path].get(_key(part), [])
            if len(same) != 1:
                return None
            part = same[0]
        path = os.path.join(path, part)
    return path if os.path.isfile(path) else None


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
