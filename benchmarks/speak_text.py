# SPDX-License-Identifier: Apache-2.0
"""Speaks sentences in a flat voice; only the words carry the emotion: `python benchmarks/speak_text.py IN OUT`.

IN holds `{train,validation,test}.csv` with the columns transcription, label, language and license (emotion and corpus
are optional). Same seed, same bytes.
"""

import argparse
import csv
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from demo.synthesize_corpus import SAMPLING_RATE, VOICES, Espeak, Prosody

LONGEST = 12.0  # seconds of speech; longer sentences are left out
RATES, PITCHES = (140, 200), (25, 75)  # words per minute, 0..99; both drawn uniformly
LEVELS = (-30.0, -20.0)  # dBFS, root mean square
SILENCES = (0.05, 0.15)  # seconds, before and after
SPLITS = ("train", "validation", "test")
# ISO 639 code: name of the eSpeak NG voice
LANGUAGES = {code: code for code in ("en", "de", "es", "fr", "pl", "tr", "pt", "ru", "fi", "it", "hi")} | {"zh": "cmn"}
REQUIRED = ("transcription", "label", "language", "license")
COLUMNS = ("file_name", "label", "emotion", "transcription", "speaker", "corpus", "language", "license")
CORPUS = "spoken"  # "XED" becomes "XED-spoken"

Row = dict[str, str]


class Settings(NamedTuple):
    """How one sentence is said; nothing here depends on its label."""

    voice: str  # eSpeak NG variant
    rate: float  # words per minute
    pitch: float  # 0..99, of the whole sentence: the pitch range is 0
    level: float  # dBFS
    before: float  # seconds of silence
    after: float


def spoken_words(text: str) -> str:
    """The words of a sentence without the punctuation and symbols, which eSpeak NG would turn into prosody.

    Apostrophes and hyphens inside words stay. The result is empty if there is nothing to say.
    """
    text = unicodedata.normalize("NFC", text).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    kept = (c if c.isalnum() or unicodedata.category(c).startswith("M") or c in "'-" else " " for c in text)
    return " ".join(word for word in (word.strip("'-") for word in "".join(kept).split()) if word)


def draw_settings(split: str, rng: np.random.Generator) -> Settings:
    """Draws voice, rate, pitch, level and silences; no voice is in two splits."""
    voices = VOICES[split]
    return Settings(
        voices[rng.integers(len(voices))], *(rng.uniform(*r) for r in (RATES, PITCHES, LEVELS, SILENCES, SILENCES))
    )


def render(words: str, language: str, settings: Settings, engine: Espeak) -> np.ndarray | None:
    """Speaks what `spoken_words` returns in a monotone.

    Returns: float64 [T] at 16 kHz in (-1, 1), or None if it would be longer than 12 seconds.
    """
    prosody = Prosody(settings.rate, settings.pitch, pitch_range=0, volume=60, tilt=0, fade=0, emphasis=0)
    audio = engine.say(words, LANGUAGES[language], settings.voice, prosody).astype(np.float64)
    if len(audio) > LONGEST * SAMPLING_RATE:
        return None
    position = np.arange(len(audio))
    audio *= np.minimum(np.minimum(position, position[::-1]) / 160, 1.0)  # 10 ms ramps: no clicks
    audio *= 10 ** (settings.level / 20) / np.sqrt(np.mean(audio**2))
    audio *= min(1.0, 0.98 / np.abs(audio).max())
    return np.pad(audio, [round(seconds * SAMPLING_RATE) for seconds in (settings.before, settings.after)])


def read_table(path: Path) -> list[Row]:
    """The rows of one split. Raises ValueError if the file, a column or the voice of a language is missing."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; the folder must hold {', '.join(f'{s}.csv' for s in SPLITS)}")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        rows, columns = list(reader), reader.fieldnames or []
    missing = [column for column in REQUIRED if column not in columns]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; its columns are {', '.join(columns) or 'none'}")
    for number, row in enumerate(rows, 1):
        if row["language"] not in LANGUAGES:
            raise ValueError(f"{path}, row {number}: no voice for {row['language']!r}, only {', '.join(LANGUAGES)}")
    return rows


def choose(rows: Sequence[Row], limit: int, rng: np.random.Generator) -> list[Row]:
    """Draws at most `limit` rows in random order, as evenly over the pairs of language and label as there are rows."""
    order = rng.permutation(len(rows))
    taken: Counter[tuple[str, str]] = Counter()
    rank = np.empty(len(rows), int)  # how many of the same language and label come before
    for index in order:
        group = (rows[index]["language"], rows[index]["label"])
        rank[index] = taken[group]
        taken[group] += 1
    chosen = order[np.argsort(rank[order], kind="stable")][:limit]
    return [rows[index] for index in rng.permutation(chosen)]  # else rare languages would come first


def speak_split(
    folder: Path, rows: Sequence[Row], engine: Espeak, seed: Sequence[int], progress: tqdm
) -> tuple[list[Row], Counter, float]:
    """Writes the audio of one split and its `metadata.csv`.

    Returns: the rows of `metadata.csv`, how many sentences were left out and why, and the seconds of audio.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Row] = []
    left_out: Counter[str] = Counter()
    samples = 0
    for index, row in enumerate(rows):
        progress.update()
        words = spoken_words(row["transcription"])
        if not words:
            left_out["nothing to say"] += 1
            continue
        settings = draw_settings(folder.name, np.random.default_rng((*seed, index)))
        audio = render(words, row["language"], settings, engine)
        if audio is None:
            left_out[f"longer than {LONGEST:g} s"] += 1
            continue
        file = folder / f"{index:05d}.flac"
        soundfile.write(file, audio, SAMPLING_RATE, subtype="PCM_16")
        samples += len(audio)
        corpus = f"{row['corpus']}-{CORPUS}" if row.get("corpus") else CORPUS
        speaker = f"{row['language']}+{settings.voice}"
        new = {"file_name": file.name, "emotion": "", "speaker": speaker, "corpus": corpus}
        written.append({column: new.get(column) or row.get(column, "") for column in COLUMNS})
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as table:
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(written)
    return written, left_out, samples / SAMPLING_RATE


def speak_text(table_dir: Path, output_dir: Path, limits: dict[str, int], seed: int = 42) -> str:
    """Writes `{train,validation,test}/metadata.csv` with 16 kHz FLAC files, `limits` sentences of each split at most.

    Returns: clips and seconds of each split, and what was left out.
    Raises:
        FileExistsError: `output_dir` is not empty; nothing in it is touched.
        ImportError: espeakng-loader is not installed.
        ValueError: see `read_table`.
    """
    tables = {split: read_table(table_dir / f"{split}.csv") for split in SPLITS}
    engine = Espeak()
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"{output_dir} exists and is not empty; give a new or empty folder")
    chosen = {
        split: choose(rows, limits[split], np.random.default_rng((seed, number)))
        for number, (split, rows) in enumerate(tables.items())
    }
    lines = []
    with tqdm(total=sum(map(len, chosen.values())), unit="sentence", desc="speaking") as progress:
        for number, (split, rows) in enumerate(chosen.items()):
            written, left_out, seconds = speak_split(output_dir / split, rows, engine, (seed, number), progress)
            lines.append(f"{split}: {len(written)} clips, {seconds:.0f} s; left out: {dict(left_out) or 'none'}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        description="Speak emotional sentences in a flat eSpeak NG voice, so that only the words carry the emotion.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("table_dir", type=Path, help="folder with train.csv, validation.csv and test.csv")
    parser.add_argument("output_dir", type=Path, help="new or empty folder")
    for split, limit in zip(SPLITS, (3000, 400, 800), strict=True):
        parser.add_argument(f"--max_{split}", type=int, default=limit, help=f"most sentences in {split}")
    parser.add_argument("--seed", type=int, default=42, help="same seed, same bytes")
    options = parser.parse_args(arguments)
    limits = {split: getattr(options, f"max_{split}") for split in SPLITS}
    try:
        summary = speak_text(options.table_dir, options.output_dir, limits, options.seed)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{summary}\n\nSynthetic speech in {options.output_dir}: its voice carries no emotion, only its words do.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
