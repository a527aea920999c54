# SPDX-License-Identifier: Apache-2.0
"""Tables that come with corpora of emotional speech, read into fields of their clips.

Each reader takes all files of a corpus and finds its own tables among them by their names. It returns what they say of
each clip, by the name of the clip in these tables; without tables it returns nothing.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mmser.table_files import read_content, read_rows

Fields = dict[str, str]
Reader = Callable[[Sequence[Path]], dict[str, Fields]]

# [start - end] turn, emotion, [valence, activation, dominance]
IEMOCAP_LABEL = re.compile(r"\[[\d.]+ - [\d.]+\]\s+(\w+)\s+(\w+)\s+\[([\d.-]+), ([\d.-]+), ([\d.-]+)\]")
IEMOCAP_WORDS = re.compile(r"(Ses\w+) \[[\d.]+-[\d.]+\]:(.*)")
# Most lines have tabs between the three; some have spaces
ESD_LINE = re.compile(r"(\d{4}_\d{6})\s+(.*?)(?:\s+(?:Neutral|Angry|Happy|Sad|Surprise|中立|生气|快乐|伤心|惊喜))?\s*")
MELD_SPLITS = {"train": "train", "dev": "validation", "val": "validation", "test": "test"}


def read_iemocap(files: Sequence[Path]) -> dict[str, Fields]:
    """The majority's emotion, the mean ratings and the words of each turn."""
    clips: dict[str, Fields] = {}
    for path in files:
        folder = path.parent.name if path.suffix == ".txt" else ""  # its sub-folders have single annotators
        if folder == "EmoEvaluation":
            for line in _lines(path):
                if found := IEMOCAP_LABEL.match(line):
                    names = ("emotion", "valence", "activation", "dominance")
                    clips.setdefault(found[1], {}).update(zip(names, found.groups()[1:], strict=True))
    for path in files:
        if path.suffix == ".txt" and path.parent.name == "transcriptions":
            for line in _lines(path):
                if (found := IEMOCAP_WORDS.match(line)) and found[1] in clips:
                    clips[found[1]]["transcription"] = found[2].strip()
    return clips


def read_meld(files: Sequence[Path]) -> dict[str, Fields]:
    """Speaker, words, emotion and sentiment of each utterance."""
    clips: dict[str, Fields] = {}
    for path in files:
        found = re.fullmatch(r"(train|dev|val|test)_sent_emo\.csv", path.name)
        if not found:
            continue
        split = MELD_SPLITS[found[1]]
        for row in _rows(path, ("Dialogue_ID", "Utterance_ID", "Speaker", "Emotion", "Utterance")):
            clips[f"{split}/dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}"] = {
                "speaker": row["Speaker"],
                "emotion": row["Emotion"].lower(),
                "transcription": _without_controls(row["Utterance"]),
                "sentiment": row.get("Sentiment", "").lower(),
            }
    return clips


def read_nemo(files: Sequence[Path]) -> dict[str, Fields]:
    """The words, and the sex of who says them."""
    return {
        row["file_id"].removesuffix(".wav"): {"transcription": row["raw_text"], "sex": row["gender"]}
        for path in files
        if path.name == "data.tsv"
        for row in _rows(path, ("file_id", "raw_text", "gender"))
    }


def read_shemo(files: Sequence[Path]) -> dict[str, Fields]:
    """The words of `shemo.json`, which was a list of clips at first and is now an object with their names as keys."""
    clips: dict[str, Fields] = {}
    for path in files:
        if path.name == "shemo.json":
            try:
                content = json.loads(read_content(path, str(path)).decode("utf-8-sig"))
                named = content.items() if isinstance(content, dict) else [(entry["id"], entry) for entry in content]
                clips |= {name: {"transcription": entry["transcript"].strip("\ufeff \n")} for name, entry in named}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path} is not the table of ShEMO, which has a transcript for each clip") from error
    return clips


def read_esd(files: Sequence[Path]) -> dict[str, Fields]:
    """The words, from a text file for each speaker; these are in four encodings."""
    clips: dict[str, Fields] = {}
    for path in files:
        if re.fullmatch(r"00\d\d\.txt", path.name):
            is_chinese = int(path.stem) <= 10
            for line in _lines(path, "gb18030" if is_chinese else "cp1252"):
                if found := ESD_LINE.fullmatch(line):
                    clips[found[1]] = {"transcription": found[2]}
    return clips


def _rows(path: Path, needed: Sequence[str]) -> Iterator[Fields]:
    """The rows of a table, stripped. Raises ValueError for a broken row and a missing column."""
    problems: list[str] = []
    rows = read_rows(path, str(path), problems)
    if problems:
        raise ValueError(problems[0])
    missing = [name for name in needed if name not in rows[0][1]]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(map(repr, missing))}; its columns are {list(rows[0][1])}")
    for _, row in rows:
        yield {name: str(value).strip() for name, value in row.items()}


def _lines(path: Path, encoding: str = "cp1252") -> list[str]:
    """The lines of a text in UTF-8, in UTF-16 with a mark, or else in `encoding`."""
    content = read_content(path, str(path))
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16").splitlines()
    try:
        return content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        return content.decode(encoding, errors="replace").splitlines()


def _without_controls(text: str) -> str:
    """Quotes and dashes of Windows-1252 that some versions of a table hold as control characters."""
    return re.sub(r"[\x80-\x9f]", lambda found: found[0].encode("latin-1").decode("cp1252", "ignore"), text)
