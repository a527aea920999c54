# SPDX-License-Identifier: Apache-2.0
"""What `mmser predict` shows: the answer to one clip, a table of several, a recording over time, and what went wrong.

Bars and timelines are for a terminal; what goes into a file or another program is plain text of any width.
"""

import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from mmser.prediction_arguments import PredictionArguments
from mmser.prediction_files import SILENCE, UNKNOWN, answer, answer_of, likeliest
from mmser.prediction_run import Prediction, Segment
from mmser.tables import format_table, without_controls
from mmser.timed_files import clock

NONE_OF_THESE = "none of these"
EIGHTHS = " ▏▎▍▌▋▊▉█"  # of a cell, from the left
LEVELS = " ▁▂▃▄▅▆▇█"  # of a cell, from below
MANY_ROWS = 30  # more than a screen: they are left out where a file holds them
LEAST_CUT = 14  # characters that are left of a name or a text, however narrow the terminal is
ANSWER_COLUMNS = ("answer", "score", "uncertainty", "error")
MAY_BE_EMPTY = ("speaker", "text", "uncertainty", "error")


@dataclass(frozen=True)
class Screen:
    """
    Where text is shown.

    Args:
        width (`int`): columns of the terminal; 0 for a file or another program, which has no such limit.
        has_blocks (`bool`): whether its characters include blocks; else `#` stands for a full one.
    """

    width: int = 0
    has_blocks: bool = True

    @classmethod
    def of(cls, stream: TextIO) -> "Screen":
        """The one that a stream leads to."""
        width = shutil.get_terminal_size().columns if stream.isatty() else 0
        try:
            (EIGHTHS + LEVELS).encode(stream.encoding or "ascii")
        except (UnicodeEncodeError, LookupError):
            return cls(width, has_blocks=False)
        return cls(width)


def print_answers(
    predictions: Sequence[Prediction], by_segment: bool, options: PredictionArguments, written: Sequence[str]
) -> None:
    """
    Print the answers, and where else they are.

    Args:
        predictions, by_segment: as of `show`.
        options: `top_k`, and whether a file was asked for.
        written: the files that hold them.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # for names in characters that the console lacks
    text = show(predictions, by_segment, Screen.of(sys.stdout), options.top_k, bool(options.output))
    where = f"Written: {', '.join(written)}" if written else ""
    if shown := "\n\n".join(filter(None, [text, where])):
        print(shown)


def print_failures(predictions: Sequence[Prediction]) -> int:
    """List what could not be classified, on stderr. Returns the exit code: 1 if there is such a thing, else 0."""
    text = show_failures(predictions)
    if text:
        print(f"\n{text}" if sys.stdout.isatty() else text, file=sys.stderr)
    return int(bool(text))


def show(
    predictions: Sequence[Prediction],
    by_segment: bool,
    screen: Screen,
    top_k: int | None = None,
    is_written: bool = False,
) -> str:
    """
    What there is to see of the answers; empty if there are none.

    Args:
        predictions: of the inputs.
        by_segment: whether the segments are asked for, or the inputs.
        screen: where it is shown.
        top_k: classes to show, the best ones; all by default.
        is_written: whether a file holds all of it, so that a long table can be left out.
    """
    return without_controls(_shown(predictions, by_segment, screen, top_k, is_written))


def _shown(
    predictions: Sequence[Prediction], by_segment: bool, screen: Screen, top_k: int | None, is_written: bool
) -> str:
    if len(predictions) > 1:
        rows = sum(max(1, len(one.segments)) for one in predictions) if by_segment else len(predictions)
        table = _segments_table(predictions, screen) if by_segment else _clips_table(predictions, screen)
        return counts_of(predictions) if is_written and rows > MANY_ROWS else f"{table}\n\n{counts_of(predictions)}"
    (one,) = predictions
    if not one.scores:
        return ""
    return show_recording(one, screen, top_k, is_written) if by_segment else show_clip(one, screen, top_k)


def in_words(scores: Sequence[dict], is_short: bool = False) -> str:
    """The answer as a person says it; `is_short`: for the cell of a table."""
    if answer(scores) == UNKNOWN:
        nearest = f"{scores[0]['label']}?" if is_short else f"nearest: {scores[0]['label']}"
        return f"{NONE_OF_THESE} ({nearest})"
    return answer(scores)


def show_clip(prediction: Prediction, screen: Screen, top_k: int | None = None) -> str:
    """One clip: its answer, a bar for each class, and how far to trust it."""
    scores, one = prediction.scores, prediction.input
    name = one.name or f'"{one.text}"'
    lines = [f"{name}: {in_words(scores)}", "", *_bars(scores[:top_k], screen), ""]
    best = scores[0]
    notes = []
    if best["uncertainty"] is not None:
        notes.append(("uncertainty", best["uncertainty"], f'the probability that "{best["label"]}" is wrong'))
    if best["unknown_probability"] is None:
        lines.append("  This model does not tell what is none of its classes.")
    else:
        notes.append((UNKNOWN, best["unknown_probability"], "the probability of none of these classes"))
    lines += [f"  {label:<12} {value:.3f}  {meaning}" for label, value, meaning in notes]
    lines += [f"  {name:<12} {value}" for name, value in _more(best, is_long=True).items()]
    return "\n".join(lines)


def _more(best: dict[str, Any], is_long: bool = False) -> dict[str, str]:
    """In words: the labels that a clip may have, and the answers to other tasks, with `is_long` their probability."""
    told = {"may be": ", ".join(best["prediction_set"]) or "-"} if "prediction_set" in best else {}
    for task, value in best.get("auxiliary", {}).items():
        found = likeliest(value)
        if isinstance(value, dict):
            told[task] = f"{found}  {value[found]:.3f}" if is_long else str(found)
        else:
            told[task] = f"{value:.3f}"
    return told


def _bars(scores: Sequence[dict], screen: Screen) -> list[str]:
    names = max(len(entry["label"]) for entry in scores)
    if not screen.width:
        return [f"  {entry['label']:<{names}} {entry['score']:.3f}" for entry in scores]
    cells = max(10, min(50, screen.width - names - 12))
    return [
        f"  {entry['label']:<{names}}  {_bar(entry['score'], cells, screen):<{cells}}  {entry['score']:.3f}"
        for entry in scores
    ]


def _bar(share: float, cells: int, screen: Screen) -> str:
    """A horizontal bar of `share` of so many cells; a share above 0 is always seen."""
    if not screen.has_blocks:
        return "#" * round(share * cells)
    eighths = max(round(8 * share * cells), int(share > 0))
    return EIGHTHS[8] * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _clips_table(predictions: Sequence[Prediction], screen: Screen) -> str:
    """Several inputs, one a row."""
    rows = [{"file": one.input.name, **_cells(one.scores, one.error, screen)} for one in predictions]
    return _fitted(rows, ["file", *ANSWER_COLUMNS[:-1], *_columns_of(rows), "error"], screen)


def _columns_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns of `_more` in a table."""
    return list(dict.fromkeys(name for row in rows for name in row["more"]))


def _cells(scores: Sequence[dict], error: str, screen: Screen) -> dict[str, Any]:
    """The answer in a row of a table. A terminal has no room for an error, which is told below the table."""
    more = _more(scores[0]) if scores else {}
    return {
        "more": list(more),
        **more,
        "answer": "not classified" if error and screen.width else in_words(scores, is_short=True),
        **{name: scores[0][name] if scores else None for name in ("score", "uncertainty")},
        "error": None if screen.width else error or None,
    }


def counts_of(predictions: Sequence[Prediction]) -> str:
    """How many inputs have which answer."""
    good = [one.scores for one in predictions if one.scores]
    counts = Counter(NONE_OF_THESE if answer(scores) == UNKNOWN else answer(scores) for scores in good)
    listed = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    what = f"{_number(len(good), 'input')} classified"
    return f"{what}: {listed}" if listed else what


def _fitted(rows: list[dict[str, Any]], columns: Sequence[str], screen: Screen) -> str:
    """
    A table, without columns that may be empty and are. On a terminal, names that are too wide are cut at their
    beginning, texts at their end, and as a last resort the uncertainty is left out.
    """
    columns = [name for name in columns if name not in MAY_BE_EMPTY or any(row.get(name) for row in rows)]
    table = format_table(rows, columns)
    excess = _width(table) - screen.width
    if not screen.width or excess <= 0:
        return table
    for name, keeps_end in (("text", False), ("file", True)):
        if name in columns and excess > 0:
            widest = max(len(row.get(name) or "") for row in rows)
            width = min(widest, max(LEAST_CUT, widest - excess))
            rows = [{**row, name: _cut(row.get(name) or "", width, keeps_end)} for row in rows]
            excess = _width(format_table(rows, columns)) - screen.width
    if excess > 0 and "uncertainty" in columns:
        return _fitted(rows, [name for name in columns if name != "uncertainty"], screen)
    return format_table(rows, columns)


def _width(table: str) -> int:
    return len(table.partition("\n")[0])


def _cut(text: str, width: int, keeps_end: bool) -> str:
    if len(text) <= width:
        return text
    return f"...{text[3 - width :]}" if keeps_end else f"{text[: width - 3]}..."


def show_recording(prediction: Prediction, screen: Screen, top_k: int | None = None, is_written: bool = False) -> str:
    """
    One recording over time: its mean, a timeline for each class (or for each speaker), and its segments.

    Args:
        is_written: whether a file holds the segments too.
    """
    one, segments = prediction.input, prediction.segments
    scores = prediction.scores
    parts = [f"{one.name} ({clock(one.seconds or segments[-1].end)}): {in_words(scores)}", shares_of_time(segments)]
    if screen.width:
        parts.append(_timeline(prediction, screen, top_k))
    if not is_written or len(segments) <= MANY_ROWS:
        parts.append(_segments_table([prediction], screen))
    return "\n\n".join(parts)


def _segments_table(predictions: Sequence[Prediction], screen: Screen) -> str:
    rows = []
    for one in predictions:
        for segment in one.segments:
            times = {"start": clock(segment.start, 1), "end": clock(segment.end, 1)}
            about = {"speaker": segment.speaker, "text": segment.text}
            cells = _cells(segment.scores, segment.error, screen)
            cells["answer"] = SILENCE if segment.is_silent else cells["answer"]
            rows.append({"file": one.input.name, **times, **about, **cells})
        if not one.segments:
            rows.append({"file": one.input.name, **_cells([], one.error, screen)})
    file = ["file"] * (len(predictions) > 1)
    columns = [*ANSWER_COLUMNS[:-1], *_columns_of(rows), "error"]
    return _fitted(rows, [*file, "start", "end", "speaker", *columns, "text"], screen)


def shares_of_time(segments: Sequence[Segment]) -> str:
    """How much of the time has which answer."""
    times: Counter[str] = Counter()
    for segment in segments:
        if name := answer_of(segment):
            name = NONE_OF_THESE if name == UNKNOWN else name
            times[name] += segment.end - segment.start  # type: ignore[assignment]  # a sum of seconds
    whole = sum(times.values())
    shares = ", ".join(f"{name} {100 * time / whole:.0f} %" for name, time in times.most_common())
    return f"Of the time: {shares}"


def _timeline(prediction: Prediction, screen: Screen, top_k: int | None) -> str:
    """A row for each class, as high as its score is over time; with speakers, a row for each of them and class."""
    segments = [segment for segment in prediction.segments if segment.scores]
    labels = [entry["label"] for entry in prediction.scores][:top_k]
    speakers = list(dict.fromkeys(segment.speaker for segment in segments))
    rows = {}
    for speaker in speakers:
        own = [segment for segment in segments if segment.speaker == speaker]
        for label in labels:
            rows[f"{speaker} {label}".strip()] = (label, own)
        rows[f"{speaker} {NONE_OF_THESE}".strip()] = (UNKNOWN, own)
    names = max(map(len, rows))
    cells = max(20, screen.width - names - 5)
    end = max(segment.end for segment in prediction.segments)
    lines = [f"  {'':<{names}} {_ruler(end, cells)}"]
    for name, (label, own) in rows.items():
        if label != UNKNOWN or any(answer(segment.scores) == UNKNOWN for segment in own):
            lines.append(f"  {name:<{names}} {_row(label, own, end, cells, screen)}".rstrip())
    return "\n".join(lines)


def _row(label: str, segments: Sequence[Segment], end: float, cells: int, screen: Screen) -> str:
    text = ""
    for cell in range(cells):
        middle = (cell + 0.5) * end / cells
        here = next((one for one in segments if one.start <= middle < one.end), None)
        if here is None:
            level = 0.0
        elif label == UNKNOWN:
            level = float(answer(here.scores) == UNKNOWN)
        else:
            level = next((entry["score"] for entry in here.scores if entry["label"] == label), 0.0)
        text += LEVELS[round(8 * level)] if screen.has_blocks else "#" if level > 0.5 else " "
    return text


def _ruler(end: float, cells: int) -> str:
    """Times above a timeline: the beginning, the end, and some between."""
    last = clock(end)
    marks = max(1, cells // 20)
    line = [" "] * cells
    for mark in range(marks):
        text = clock(mark * end / marks)
        place = round(mark * cells / marks)
        line[place : place + len(text)] = text
    line = line[:cells]
    line[cells - len(last) :] = last
    return "".join(line)


def show_failures(predictions: Sequence[Prediction]) -> str:
    """The inputs and segments that could not be classified, each with its reason; empty if there are none."""
    failed = [(one.input.name, one.error) for one in predictions if one.error]
    pieces = [
        (f"{one.input.name} at {clock(segment.start, 1)}", segment.error)
        for one in predictions
        for segment in one.segments
        if segment.error
    ]
    lines = [f"  {name}: {why}" for name, why in (*failed, *pieces)]
    if not lines:
        return ""
    counts = [_number(len(failed), "input")] if failed else []
    counts += [_number(len(pieces), "segment")] if pieces else []
    return without_controls("\n".join([f"{' and '.join(counts)} could not be classified:", *lines]))


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
