# SPDX-License-Identifier: Apache-2.0
"""The files that `mmser predict` writes: tables, JSON, subtitles, speaker turns, label tracks, a picture.

Read in this order: `write` (all that was asked for), `content` (a file of any format), `table_rows` (what is in a
table), `answer` (what counts as the answer).
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from mmser.files import check_writable, write_atomically
from mmser.plots import check_matplotlib, plot_timeline
from mmser.prediction_arguments import PredictionArguments
from mmser.prediction_run import Prediction, Segment
from mmser.table_files import as_text, csv_line
from mmser.tables import json_line, strict_json
from mmser.timed_files import Span, format_audacity, format_rttm, format_srt

AUXILIARY = "auxiliary_"  # in front of the columns of other tasks
UNKNOWN = "unknown"  # the answer to a clip that is none of the classes
SILENCE = "silence"  # that of a segment in which nothing can be heard
ABOUT_A_CLIP = ("score", "uncertainty", "unknown_probability", "is_unknown")


def check_outputs(options: PredictionArguments) -> None:
    """Find out before the work what would stop its results from being written; makes their folders."""
    if options.plot:
        check_matplotlib()
    for path in filter(None, (options.output, options.plot)):
        check_writable(Path(path).parent)
        Path(path).parent.mkdir(parents=True, exist_ok=True)


def write(
    predictions: Sequence[Prediction], labels: Sequence[str], by_segment: bool, options: PredictionArguments
) -> list[str]:
    """
    Write the files that were asked for, each as a whole or not at all; without a name, print what they would hold.

    Args:
        predictions, labels, by_segment: as of `table_rows`.
        options: their formats and names.

    Returns:
        The names of the files.
    """
    written = []
    if options.format is not None:
        data = content(predictions, labels, options.format, by_segment)
        if options.output:
            write_atomically(Path(options.output), data)
            written.append(options.output)
        else:
            sys.stdout.flush()
            sys.stdout.buffer.write(data)  # as it is, whatever the encoding of the console
            sys.stdout.buffer.flush()
    if options.plot and predictions[0].scores:
        draw(predictions[0], labels, Path(options.plot))
        written.append(options.plot)
    return written


def draw(prediction: Prediction, labels: Sequence[str], path: Path, waveform: Any = None) -> None:
    """The picture of one recording over time; `waveform` as of `plot_timeline`."""
    segments = [segment for segment in prediction.segments if segment.scores]
    by_label = [{entry["label"]: entry["score"] for entry in segment.scores} for segment in segments]
    plot_timeline(
        [(segment.start, segment.end) for segment in segments],
        [[scores[label] for label in labels] for scores in by_label],
        labels,
        [answer(segment.scores) for segment in segments],
        path,
        speakers=[segment.speaker for segment in segments],
        title=Path(prediction.input.name).name,
        waveform=waveform,
        seconds=max(segment.end for segment in prediction.segments),
    )


def answer(scores: Sequence[dict]) -> str:
    """The likeliest label; "unknown" for a clip that is rejected; nothing where nothing was classified."""
    if not scores:
        return ""
    return UNKNOWN if scores[0].get("is_unknown") else scores[0]["label"]


def answer_of(segment: Segment) -> str:
    """As `answer`, and "silence" where nothing can be heard."""
    return SILENCE if segment.is_silent else answer(segment.scores)


def confidence(scores: Sequence[dict]) -> float | None:
    """The probability of the answer, as far as the model gives one."""
    if not scores:
        return None
    return scores[0]["unknown_probability"] if answer(scores) == UNKNOWN else scores[0]["score"]


def table_rows(predictions: Sequence[Prediction], labels: Sequence[str], by_segment: bool) -> list[dict[str, Any]]:
    """
    The rows of a table: one for each input or, with `by_segment`, for each segment.

    Args:
        predictions: of the inputs.
        labels: of the model, in the order of their ids; each has a column `score_<label>`.

    Returns:
        Rows that all have the same columns. What is missing is None, for texts "". Prediction sets and the answers to
        other tasks have columns where there are any.
    """
    rows: list[dict[str, Any]] = []
    for prediction in predictions:
        one = prediction.input
        if not by_segment:
            about = {"seconds": one.seconds, "text": one.text or ""}
            rows.append({"file": one.name, **about, **_columns(prediction.scores, labels), "error": one.error})
            continue
        for segment in prediction.segments:
            about = {"start": segment.start, "end": segment.end, "speaker": segment.speaker, "text": segment.text}
            columns = _columns(segment.scores, labels) | {"answer": answer_of(segment)}
            rows.append({"file": one.name, **about, **columns, "error": segment.error})
        if not prediction.segments:  # one that cannot be read has a row too
            about = {"start": None, "end": None, "speaker": "", "text": ""}
            rows.append({"file": one.name, **about, **_columns([], labels), "error": one.error})
    more = dict.fromkeys(name for row in rows for name in row["more"])
    return [
        {name: value for name, value in row.items() if name not in ("more", "error")}
        | {name: row["more"].get(name) for name in more}
        | {"error": row["error"]}
        for row in rows
    ]


def _columns(scores: Sequence[dict], labels: Sequence[str]) -> dict[str, Any]:
    best = scores[0] if scores else {}
    by_label = {entry["label"]: entry["score"] for entry in scores}
    return {
        "answer": answer(scores),
        "label": best.get("label", ""),
        **{name: best.get(name) for name in ABOUT_A_CLIP},
        **{f"score_{label}": by_label.get(label) for label in labels},
        "more": _more(best),
    }


def _more(best: dict[str, Any]) -> dict[str, Any]:
    """By column: the prediction set of a clip, and the answers to other tasks."""
    columns: dict[str, Any] = {}
    if "prediction_set" in best:
        columns["prediction_set"] = ", ".join(best["prediction_set"])
    for task, value in best.get("auxiliary", {}).items():
        columns[f"{AUXILIARY}{task}"] = likeliest(value)
        if isinstance(value, dict):
            columns |= {f"{AUXILIARY}{task}_{name}": probability for name, probability in value.items()}
    return columns


def likeliest(value: dict[str, float] | float) -> str | float:
    """The answer to a task beside the emotion: the likeliest class, or the number."""
    return max(value, key=lambda name: value[name]) if isinstance(value, dict) else value


def content(predictions: Sequence[Prediction], labels: Sequence[str], format: str, by_segment: bool) -> bytes:
    """
    A file, in UTF-8 where it is text.

    Args:
        predictions, labels, by_segment: as of `table_rows`.
        format: csv, json, jsonl, parquet, srt, rttm or audacity. The last three hold segments that have an answer;
            srt and audacity are for one recording.
    """
    if format == "json":
        return strict_json([nested(prediction, labels, by_segment) for prediction in predictions]).encode()
    if format == "rttm":
        return "".join(format_rttm(_spans(one.segments), one.input.stem) for one in predictions).encode()
    if format in ("srt", "audacity"):
        segments = [segment for prediction in predictions for segment in prediction.segments if segment.scores]
        if format == "audacity":
            return format_audacity(_spans(segments)).encode()
        return format_srt(_spans(segments), [segment.text for segment in segments]).encode()
    rows = table_rows(predictions, labels, by_segment)
    if format == "jsonl":
        return "".join(json_line(row) for row in rows).encode()
    return _parquet(rows) if format == "parquet" else _csv(rows)


def _spans(segments: Sequence[Segment]) -> list[Span]:
    return [
        Span(one.start, one.end, answer(one.scores), one.speaker, confidence(one.scores))
        for one in segments
        if one.scores
    ]


def nested(prediction: Prediction, labels: Sequence[str], by_segment: bool) -> dict[str, Any]:
    """An input, perhaps with its segments, as JSON has them: the scores of the labels in an object of their own."""

    def with_scores(row: dict[str, Any], scores: Sequence[dict]) -> dict[str, Any]:
        plain = {name: value for name, value in row.items() if not name.startswith(("score_", AUXILIARY))}
        best = scores[0] if scores else {}
        plain |= {name: best.get(name) for name in ("prediction_set",) if name in row}
        other = {"auxiliary": best["auxiliary"]} if "auxiliary" in best else {}
        return {**plain, **other, "scores": {label: row[f"score_{label}"] for label in labels}}

    (whole,) = table_rows([prediction], labels, by_segment=False)
    nested = with_scores(whole, prediction.scores)
    if by_segment:
        rows = table_rows([prediction], labels, by_segment=True) if prediction.segments else []
        nested["segments"] = [
            with_scores({name: row[name] for name in row if name != "file"}, segment.scores)
            for row, segment in zip(rows, prediction.segments, strict=True)
        ]
    return nested


def _csv(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(csv_line(map(as_text, cells)) for cells in (rows[0], *(row.values() for row in rows))).encode()


def _parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    kinds = {"is_unknown": pyarrow.bool_()}
    kinds |= {name: pyarrow.string() for row in rows for name, value in row.items() if isinstance(value, str)}
    kinds |= dict.fromkeys(("file", "speaker", "text", "answer", "label", "error"), pyarrow.string())
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.float64())) for name in rows[0]])  # also where all is None
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=schema), sink)
    return sink.getvalue().to_pybytes()
