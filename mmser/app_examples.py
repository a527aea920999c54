# SPDX-License-Identifier: Apache-2.0
"""The examples of the page: clips of the synthetic corpus of `demo/`, made when the page starts."""

import contextlib
import csv
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

SCRIPT = Path(__file__).parents[1] / "demo" / "synthesize_corpus.py"  # of a clone; an installation has none
LANGUAGE = "en"
SPLITS = ("test", "validation", "train")
PAUSE = 0.4  # seconds, between the clips of the long example
SECONDS = 120  # that eSpeak NG may take; it takes one


@dataclass(frozen=True)
class Example:
    """A recording to try: what the page calls it, its file, and what is said in it, if that is known."""

    title: str
    path: str
    text: str = ""


@contextlib.contextmanager
def made() -> Iterator[tuple[list[Example], str]]:
    """
    The examples, as long as this lasts.

    Yields:
        Examples of each emotion, of noise, and of a long recording; none if they cannot be made, with the reason as a
        sentence.
    """
    with tempfile.TemporaryDirectory(prefix="mmser-examples-") as folder:
        reason = _synthesize(Path(folder) / "corpus")
        yield [] if reason else _examples(Path(folder)), reason


def _synthesize(corpus: Path) -> str:
    """Make the corpus; why it cannot be made, or nothing. In a process of its own, as eSpeak NG keeps state."""
    if not SCRIPT.is_file():
        return "There are no examples: what makes them is in MMSER's repository, and this is an installation alone."
    flags = [str(corpus), "--clips_per_cell", "1", "--languages", LANGUAGE]
    try:
        done = subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"There are no examples: making them took longer than {SECONDS} s."
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["error: it said nothing"]
        return f"There are no examples: {lines[-1].removeprefix('error: ').rstrip('.')}."
    return ""


def _examples(folder: Path) -> list[Example]:
    rows = {split: _rows(folder / "corpus" / split) for split in (*SPLITS, "ood")}
    long = folder / "all_in_a_row.flac"
    _join([row["path"] for split in SPLITS for row in rows[split]], long)
    noise = next(row for row in rows["ood"] if row["emotion"] == "pink_noise")
    spoken = sorted(rows["test"], key=lambda row: row["emotion"])
    return [
        *(Example(f"acted {row['emotion']}", _named(row, folder), row["transcription"]) for row in spoken),
        Example("noise", _named(noise, folder)),
        Example("a long recording", str(long)),
    ]


def _named(row: dict[str, str], folder: Path) -> str:
    """The clip of a row, under a name that says what it is, as an answer begins with it."""
    return str(Path(row["path"]).rename(folder / f"{row['emotion']}{Path(row['path']).suffix}"))


def _rows(split: Path) -> list[dict[str, str]]:
    """The table of a split, with the path of each clip."""
    with open(split / "metadata.csv", newline="", encoding="utf-8") as file:
        return [{**row, "path": str(split / row["file_name"])} for row in csv.DictReader(file)]


def _join(paths: Sequence[str], target: Path) -> None:
    pieces, rate = [], 0
    for path in paths:
        samples, rate = soundfile.read(path, dtype="float32")
        pieces += [samples, np.zeros(round(PAUSE * rate), dtype=np.float32)]
    soundfile.write(target, np.concatenate(pieces[:-1]), rate)
