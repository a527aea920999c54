# SPDX-License-Identifier: Apache-2.0
"""Clips that are in the data more than once: their files, or their bytes in a Hub data set, are the same.

`find_copies` reads little: only what has the same size is looked into, only what has the same middle is read whole.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any

import datasets
import pyarrow.compute

from audio_mmser import load_audio
from mmser.examples import ExampleReader, content_sample
from mmser.sources import Record


def find_copies(records: Sequence[Record], audio: datasets.Dataset | None, indices: Iterable[int]) -> list[list[int]]:
    """Groups of clips with the same content.

    Args:
        records: all rows of the source.
        audio: their embedded audio, if there is such.
        indices: of the records to compare. Those without audio, with an address or an empty file are not compared, nor
            is what cannot be decoded, such as one error page for many downloads: whoever reads the clip says why.

    Returns:
        Groups of two or more indices.
    """
    sizes = _embedded_sizes(audio) if audio is not None else [_file_size(record.audio) for record in records]
    groups = _split([[index for index in indices if sizes[index]]], sizes.__getitem__)
    for whole in (False, True):
        groups = _split(groups, partial(_checksum, records, audio, whole))
    return [group for group in groups if _is_audio(_row(records, audio, group[0]))]


def _split(groups: list[list[int]], key: Callable[[int], Hashable]) -> list[list[int]]:
    """Divide groups by a key, and keep those of two or more whose key is not None."""
    result = []
    for group in groups:
        parts = defaultdict(list)
        for index in group:
            parts[key(index)].append(index)
        parts.pop(None, None)
        result += [part for part in parts.values() if len(part) > 1]
    return result


def _file_size(path: str | None) -> int:
    return os.path.getsize(path) if path and os.path.isfile(path) else 0


def _embedded_sizes(audio: datasets.Dataset) -> list[int]:
    """The number of bytes of each clip, without copying them."""
    sizes: list[int] = []
    for batch in audio.with_format("arrow").iter(1000):
        column = batch["audio"].combine_chunks()
        lengths = pyarrow.compute.binary_length(pyarrow.compute.struct_field(column, "bytes")).to_pylist()
        paths = pyarrow.compute.struct_field(column, "path").to_pylist()
        sizes += [_file_size(path) if length is None else length for length, path in zip(lengths, paths, strict=True)]
    return sizes


def _row(records: Sequence[Record], audio: datasets.Dataset | None, index: int) -> dict[str, Any]:
    record = records[index]
    return {"row": record.row, "audio": record.audio if audio is None else audio[index]["audio"]}


def _checksum(records: Sequence[Record], audio: datasets.Dataset | None, whole: bool, index: int) -> bytes | None:
    """Of the whole content or of a sample of it; None if it cannot be read."""
    row = _row(records, audio, index)
    try:
        content = ExampleReader().content(row) if whole else content_sample(row)
    except ValueError:  # the reader of the clip names the row and the reason
        return None
    return hashlib.blake2b(content or b"").digest()


def _is_audio(row: dict[str, Any]) -> bool:
    try:
        return len(load_audio(row["audio"])) > 0
    except (ValueError, OSError):
        return False
