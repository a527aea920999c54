# SPDX-License-Identifier: Apache-2.0
"""Text files whose lines have times: subtitles (SRT), speaker turns (RTTM), and the labels of Audacity.

`read_srt` and `read_rttm` read them, `format_srt`, `format_rttm` and `format_audacity` write them. All times are in
seconds.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmser.table_files import read_text

SRT_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{1,2})[,.](\d{1,3})"
SRT_TIMES = re.compile(rf"\s*{SRT_TIME}\s*-->\s*{SRT_TIME}(\s.*)?")
MARKUP = re.compile(r"</?[a-zA-Z][^<>]*>|\{\\[^{}]*\}")  # <i>, <font color=...>, {\an8}
NO_VALUE = "<NA>"  # of RTTM


@dataclass(frozen=True)
class Span:
    """
    A piece of a recording and what is in it.

    Args:
        start, end (`float`, seconds): its times.
        text (`str`): what a file says of it: subtitles, or the label to write.
        speaker (`str`): who speaks, if that is known.
        confidence (`float`): probability of the label, if there is one.
    """

    start: float
    end: float
    text: str = ""
    speaker: str = ""
    confidence: float | None = None


def clock(seconds: float, decimals: int = 0) -> str:
    """A time as people write it: 1:05, or 1:01:05 with hours."""
    units = round(seconds * 10**decimals)
    whole, rest = divmod(units, 10**decimals)
    hours, minutes, left = whole // 3600, whole // 60 % 60, whole % 60
    text = f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"
    return f"{text}.{rest:0{decimals}}" if decimals else text


def read_srt(path: Path) -> list[dict[str, Any]]:
    """
    Read subtitles.

    Returns:
        A transcript with times, as the pipeline takes it under `chunks`: `{"text": str, "timestamp": (start, end)}`.

    Raises:
        ValueError: what is no SRT file; the message gives the line.
    """
    words: list[dict[str, Any]] = []
    lines = read_text(path, path.name).splitlines()
    for number, line in enumerate(lines, 1):
        if "-->" in line:
            words.append({"text": [], "timestamp": _srt_times(line, f"{path} line {number}")})
        elif words and line.strip() and not _is_index(lines, number):
            words[-1]["text"].append(MARKUP.sub("", line).strip())
        elif not words and line.strip() and not line.strip().isdigit():
            raise ValueError(f"{path} line {number}: subtitles begin with a number and a line of times, got {line!r}")
    if not words:
        raise ValueError(f"{path} has no lines of times such as 00:00:01,000 --> 00:00:02,500")
    return [{**word, "text": " ".join(filter(None, word["text"]))} for word in words]


def _is_index(lines: list[str], number: int) -> bool:
    """Whether a line (from 1) only counts the subtitle whose times follow. A number may also be what is said."""
    return lines[number - 1].strip().isdigit() and number < len(lines) and "-->" in lines[number]


def _srt_times(line: str, where: str) -> tuple[float, float]:
    found = SRT_TIMES.fullmatch(line)
    if found is None:
        raise ValueError(f"{where}: expected times such as 00:00:01,000 --> 00:00:02,500, got {line.strip()!r}")
    parts = [int(part or 0) for part in (*found.groups()[:3], *found.groups()[4:7])]
    fractions = [int(part.ljust(3, "0")) / 1000 for part in (found[4], found[8])]
    start, end = (
        3600 * hours + 60 * minutes + seconds + fraction
        for (hours, minutes, seconds), fraction in zip((parts[:3], parts[3:]), fractions, strict=True)
    )
    if end < start:
        raise ValueError(f"{where}: the end comes before the start, {line.strip()!r}")
    return start, end


def read_rttm(path: Path) -> dict[str, list[Span]]:
    """
    Read speaker turns: the lines of the type SPEAKER of a file in Rich Transcription Time Marked format (NIST 2009).

    Returns:
        The turns of each recording, by its id in the file, sorted by their start; empty turns are left out.

    Raises:
        ValueError: what is no RTTM file; the message gives the line.
    """
    turns: dict[str, list[Span]] = {}
    for number, line in enumerate(read_text(path, path.name).splitlines(), 1):
        fields = line.split()
        if not fields or line.startswith(";;") or fields[0] != "SPEAKER":
            continue
        try:
            start, length, speaker = float(fields[3]), float(fields[4]), fields[7]
            is_valid = 0 <= start < float("inf") and 0 <= length < float("inf")
        except (IndexError, ValueError):
            is_valid = False
        if not is_valid:
            raise ValueError(
                f"{path} line {number}: expected SPEAKER, recording, channel, start, duration, <NA>, <NA>, speaker, "
                f"got {line.strip()!r:.100}"
            )
        turns.setdefault(fields[1], [])
        if length:
            turns[fields[1]].append(Span(start, start + length, speaker=speaker))
    if not any(turns.values()):
        raise ValueError(f"{path} has no line that begins with SPEAKER: it names nobody's turns")
    return {name: sorted(spans, key=lambda span: span.start) for name, spans in turns.items()}


def format_srt(spans: Iterable[Span], words: Iterable[str] = ()) -> str:
    """Subtitles: each label, with what is said (`words`, one for each span) below it."""
    spans = list(spans)
    said = [*words] or [""] * len(spans)
    blocks = []
    for number, (span, text) in enumerate(zip(spans, said, strict=True), 1):
        shown = f"{span.text} {span.confidence:.2f}" if span.confidence is not None else span.text
        lines = [f"{span.speaker}: {shown}" if span.speaker else shown, *filter(None, [" ".join(text.split())])]
        times = f"{_srt_time(span.start)} --> {_srt_time(span.end)}"
        blocks.append("\n".join([str(number), times, *lines]) + "\n")
    return "\n".join(blocks)


def _srt_time(seconds: float) -> str:
    milliseconds = round(1000 * seconds)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02},{rest % 1000:03}"


def format_rttm(spans: Iterable[Span], recording: str) -> str:
    """SPEAKER lines. The label stands for the speaker; where one is known, the name is `speaker/label`."""
    lines = []
    for span in spans:
        name = f"{span.speaker}/{span.text}" if span.speaker else span.text
        confidence = NO_VALUE if span.confidence is None else f"{span.confidence:.4f}"
        times = f"{span.start:.3f} {span.end - span.start:.3f}"
        lines.append(
            f"SPEAKER {_word(recording)} 1 {times} {NO_VALUE} {NO_VALUE} {_word(name)} {confidence} {NO_VALUE}\n"
        )
    return "".join(lines)


def _word(text: str) -> str:
    """A name as one field of RTTM, whose fields end at a space."""
    return "_".join(text.split()) or NO_VALUE


def format_audacity(spans: Iterable[Span]) -> str:
    """A label track of Audacity: start, end and label, separated by tabs."""
    lines = []
    for span in spans:
        name = f"{span.speaker}: {span.text}" if span.speaker else span.text
        lines.append(f"{span.start:.6f}\t{span.end:.6f}\t{' '.join(name.split())}\n")
    return "".join(lines)
