# SPDX-License-Identifier: Apache-2.0
"""Groups of clips (language, corpus, sex, duration): which group each clip is in, and how a model does on each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from mmser.calibration import expected_calibration_error
from mmser.checks import (
    check_flags,
    check_label_names,
    check_labels,
    check_probabilities,
    check_same_length,
    reject,
)
from mmser.metrics import bootstrap_classification, compute_classification_metrics
from mmser.splits import speaker_key

GROUPS = ("corpus", "language", "sex")
MEAN_OVER_CORPORA = "mean_over_corpora_weighted_f1"
MEAN_METRICS = ("weighted_f1", "unweighted_average_recall")
FEW_CLIPS = 30  # the metrics of a group with fewer clips say little


def split_groups(
    split: datasets.Dataset | datasets.IterableDataset, names: Iterable[str] = GROUPS
) -> dict[str, list[str]]:
    """The group of each clip in each of the columns `names` that the data have. An empty cell is "unknown".

    A stream has no groups: its clips are not known before they are read.
    """
    if not isinstance(split, datasets.Dataset):
        return {}
    return {
        name: ["unknown" if value in ("", None) else str(value) for value in split[name]]
        for name in names
        if name in split.column_names
    }


def corpora_of(dataset: Any) -> list[str]:
    """The corpus of each clip that an `EmotionDataset` has, as `split_groups` says; empty where none is known."""
    table = getattr(dataset, "dataset", None)
    return split_groups(table, ["corpus"]).get("corpus", []) if isinstance(table, datasets.Dataset) else []


def speakers_of(dataset: Any) -> list[str] | None:
    """
    The speaker of each clip that a data set gives, as `speaker_key` of `mmser.splits`: N names, or None.

    It is None where speakers are not known: a stream, a data set of another kind, a table without speakers. A clip
    without a speaker, among others that have one, is a speaker of its own. Rows that were skipped are left out.
    """
    names, skipped = split_speakers(getattr(dataset, "dataset", None)), getattr(dataset, "skipped", None)
    if names is None or skipped is None:
        return names
    return [name for name, left_out in zip(names, skipped, strict=True) if not left_out]


def split_speakers(table: Any) -> list[str] | None:
    """As `speakers_of`, for each row of a table."""
    if not isinstance(table, datasets.Dataset) or "speaker" not in table.column_names or not any(table["speaker"]):
        return None
    corpora = table["corpus"] if "corpus" in table.column_names else [""] * len(table)
    return [
        speaker_key(speaker, corpus) if speaker else f"clip {index}"
        for index, (corpus, speaker) in enumerate(zip(corpora, table["speaker"], strict=True))
    ]


def duration_bands(seconds: Sequence[float] | np.ndarray) -> list[str]:
    """The band of each clip's duration; the names of the bands sort in their order.

    Args:
        seconds: [N] durations, >= 0.
    Returns: N names: "0-1 s", "1-2 s", "2-4 s", "4-8 s" or "8+ s". A band holds its lower bound, not its upper one.
    Raises:
        ValueError: for a negative or non-finite duration, naming the first.
    """
    names = ("0-1 s", "1-2 s", "2-4 s", "4-8 s", "8+ s")
    durations = np.asarray(seconds, dtype=np.float64)
    reject(durations, ~np.isfinite(durations) | (durations < 0), "`seconds` must be finite and >= 0")
    return [names[band] for band in np.searchsorted([1, 2, 4, 8], durations, side="right")]


def grouped_metrics(
    predictions: Any,
    references: Any,
    groups: Any,
    label_names: Sequence[str],
    probabilities: Any = None,
    is_unknown: Any = None,
    num_samples: int = 1000,
    speakers: Sequence[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """The metrics of each group of clips.

    Args:
        predictions: int [N] predicted class indices.
        references: int [N] true class indices.
        groups: the group of each clip, N names (or anything that `str` turns into one).
        label_names: C names; the position is the class index.
        probabilities: float [N, C], for the calibration within each group.
        is_unknown: bool [N], whether the model rejects the clip.
        num_samples, speakers: as of `bootstrap_classification`, for the interval.
    Returns: Group name -> `count`, `compute_classification_metrics`, `weighted_f1_interval` (95 %, bootstrap) and, if
        the arrays are given, `mean_confidence` and `expected_calibration_error`, and the share of clips `rejected`;
        sorted by name.
    Raises:
        ValueError: empty input, unequal lengths, or a label out of range.
    """
    names = check_label_names(label_names)
    predictions = check_labels(predictions, "predictions", len(names))
    references = check_labels(references, "references", len(names))
    groups = groups.tolist() if hasattr(groups, "tolist") else list(groups)
    group_names = np.array([str(group) for group in groups])
    arrays = {"predictions": predictions, "references": references, "groups": group_names}
    if probabilities is not None:
        arrays["probabilities"] = probabilities = check_probabilities(probabilities)
    if is_unknown is not None:
        arrays["is_unknown"] = is_unknown = check_flags(is_unknown, "is_unknown")
    drawn = None if speakers is None else np.array(speakers)
    if drawn is not None:
        arrays["speakers"] = drawn
    check_same_length(**arrays)
    report: dict[str, dict[str, Any]] = {}
    for group in np.unique(group_names).tolist():
        rows = group_names == group
        own = predictions[rows], references[rows]
        values: dict[str, Any] = {"count": int(rows.sum()), **compute_classification_metrics(*own, names)}
        own_speakers = None if drawn is None else drawn[rows].tolist()
        intervals = bootstrap_classification(*own, names, num_samples, speakers=own_speakers)
        values["weighted_f1_interval"] = intervals["weighted_f1"]
        if probabilities is not None:
            values["mean_confidence"] = float(probabilities[rows].max(axis=1).mean())
            values["expected_calibration_error"] = expected_calibration_error(probabilities[rows], references[rows])
        if is_unknown is not None:
            values["rejected"] = float(is_unknown[rows].mean())
        report[group] = values
    return report


def compute_corpus_metrics(
    predictions: Any, references: Any, corpora: Sequence[str], label_names: Sequence[str]
) -> dict[str, float]:
    """
    The metrics of each corpus under flat names, for the log of a training.

    Args:
        predictions, references, label_names: as of `grouped_metrics`.
        corpora: the corpus of each clip, N names.
    Returns: `corpus_<name>_weighted_f1`, `_unweighted_average_recall` and `_count` for each corpus, and
        `mean_over_corpora_weighted_f1`, in which a small corpus counts as much as a large one; empty for one corpus.
    """
    names = np.array(corpora)
    metrics: dict[str, float] = {}
    if len(set(corpora)) < 2:
        return metrics
    for corpus in np.unique(names).tolist():
        rows = names == corpus
        own = compute_classification_metrics(predictions[rows], references[rows], label_names)
        metrics |= {f"corpus_{corpus}_{name}": own[name] for name in MEAN_METRICS}
        metrics[f"corpus_{corpus}_count"] = int(rows.sum())
    scores = [metrics[f"corpus_{corpus}_weighted_f1"] for corpus in set(corpora)]
    return {**metrics, MEAN_OVER_CORPORA: float(np.mean(scores))}


def with_mean(groups: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Mapping[str, Any]]:
    """Groups for a table; to two or more corpora a line is added with the means of `MEAN_METRICS` over them."""
    if name != "corpus" or len(groups) < 2:
        return dict(groups)
    means = {metric: float(np.mean([own[metric] for own in groups.values()])) for metric in MEAN_METRICS}
    return {**groups, "mean over corpora": means}


def group_gap(
    groups: Mapping[str, Mapping[str, Any]],
    metrics: Sequence[str] = ("weighted_f1", "unweighted_average_recall"),
    min_count: int = FEW_CLIPS,
) -> dict[str, dict[str, Any]]:
    """How far the best and the worst group are apart, among the groups with enough clips.

    Args:
        groups: result of `grouped_metrics`.
        metrics: names of the metrics to compare.
        min_count: smaller groups are left out.
    Returns: Metric name -> `gap`, and the names of the groups with the `highest` and the `lowest` value (of equal
        groups the first by name); empty if fewer than two groups have `min_count` clips.
    """
    large = {name: values for name, values in groups.items() if values["count"] >= min_count}
    if len(large) < 2:
        return {}
    report = {}
    for metric in metrics:
        values = {name: group[metric] for name, group in large.items()}
        highest, lowest = max(values, key=values.__getitem__), min(values, key=values.__getitem__)
        report[metric] = {"gap": values[highest] - values[lowest], "highest": highest, "lowest": lowest}
    return report
