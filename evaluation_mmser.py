# SPDX-License-Identifier: Apache-2.0
"""Metrics, calibration, open-set scores, uncertainty and plots, on plain arrays (no model code).

Every function takes lists, numpy arrays or torch tensors and computes in float64.
A quantity that does not exist (AUROC with no unknown clip, ...) is `nan`; malformed input (empty, NaN,
unequal lengths, label out of range) is a `ValueError` that names the argument and the first offending index.
Read in this order: checks, classification, calibration, open set, uncertainty, report, plots.
"""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats
import sklearn.metrics
from transformers import EvalPrediction
from transformers.utils import logging

from configuration_mmser import DEFAULT_LABELS

logger = logging.get_logger(__name__)

TEMPERATURE_BOUNDS = (0.05, 20.0)


# ---------------------------------------------------------------------------------------------------------------------
# Checks of the input
# ---------------------------------------------------------------------------------------------------------------------


def _to_numpy(values: Any, name: str) -> np.ndarray:
    """Array from a list, numpy array or torch tensor (any device, any dtype, with or without gradient)."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        # numpy has no bfloat16
        values = (values.double() if values.is_floating_point() else values).numpy()
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(f"`{name}` must be a rectangular array, got rows of different lengths.") from error


def _index(array: np.ndarray, bad: np.ndarray) -> Any:
    """Position of the first True of `bad`: an int for vectors, a tuple otherwise."""
    position = tuple(int(i) for i in np.argwhere(bad)[0])
    return position[0] if array.ndim == 1 else position


def _floats(values: Any, name: str, num_dimensions: int = 1, allow_empty: bool = False) -> np.ndarray:
    """`values` as a finite float64 array with `num_dimensions` axes."""
    array = _to_numpy(values, name)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"`{name}` must hold real numbers, got dtype {array.dtype}.")
    if array.ndim != num_dimensions:
        raise ValueError(f"`{name}` must have {num_dimensions} dimension(s), got shape {array.shape}.")
    if array.size == 0 and not allow_empty:
        raise ValueError(f"`{name}` is empty (shape {array.shape}); at least one example is needed.")
    array = array.astype(np.float64)
    bad = ~np.isfinite(array)
    if bad.any():
        index = _index(array, bad)
        raise ValueError(f"`{name}` must be finite, got {array[index]} at index {index}.")
    return array


def _labels(values: Any, name: str, num_labels: int) -> np.ndarray:
    """`values` as an int64 vector with entries in [0, num_labels - 1]."""
    array = _to_numpy(values, name)
    if array.ndim != 1:
        raise ValueError(f"`{name}` must be one-dimensional, got shape {array.shape}.")
    if array.size == 0:
        raise ValueError(f"`{name}` is empty; at least one example is needed.")
    if array.dtype.kind not in "iu":
        raise ValueError(f"`{name}` must hold integer class indices, got dtype {array.dtype}.")
    bad = (array < 0) | (array >= num_labels)
    if bad.any():
        index = _index(array, bad)
        raise ValueError(
            f"`{name}` has label {array[index]} at index {index}; allowed are 0 to {num_labels - 1}"
            " (clips labelled -1, unknown, belong to the open-set metrics only)."
        )
    return array.astype(np.int64)


def _flags(values: Any, name: str, allow_empty: bool = False) -> np.ndarray:
    """`values` (booleans, or numbers 0 and 1) as a boolean vector."""
    array = _floats(values, name, allow_empty=allow_empty)
    bad = (array != 0) & (array != 1)
    if bad.any():
        index = _index(array, bad)
        raise ValueError(f"`{name}` must hold True/False or 1/0, got {array[index]:g} at index {index}.")
    return array.astype(bool)


def _probabilities(values: Any, name: str = "probabilities") -> np.ndarray:
    """`values` as [N, C] rows of probabilities; the tolerance lets half-precision softmax outputs through."""
    array = _floats(values, name, num_dimensions=2)
    bad = (array < -1e-6) | (array > 1 + 1e-6) | (np.abs(array.sum(axis=1, keepdims=True) - 1) > 1e-2)
    if bad.any():
        row = int(np.argwhere(bad)[0][0])
        raise ValueError(
            f"`{name}` must be in [0, 1] and sum to 1 in each row, got {array[row]} in row {row}"
            " (for logits, apply `softmax` first)."
        )
    return np.clip(array, 0.0, 1.0)


def _check_same_length(**arrays: np.ndarray) -> None:
    if len({len(array) for array in arrays.values()}) > 1:
        lengths = ", ".join(f"`{name}` {len(array)}" for name, array in arrays.items())
        raise ValueError(f"All arrays must have the same length, got {lengths}.")


def _label_names(label_names: Sequence[str]) -> list[str]:
    if isinstance(label_names, str) or not len(label_names) or len(set(label_names)) != len(label_names):
        raise ValueError(f"`label_names` must be a non-empty list of distinct names, got {label_names!r}.")
    return [str(name) for name in label_names]


# ---------------------------------------------------------------------------------------------------------------------
# Classification
# ---------------------------------------------------------------------------------------------------------------------


def softmax(logits: Any) -> np.ndarray:
    """Row-wise softmax: float `logits` [N, C] -> probabilities [N, C], float64."""
    return scipy.special.softmax(_floats(logits, "logits", num_dimensions=2), axis=1)


def confusion_matrix(predictions: Any, references: Any, num_labels: int) -> np.ndarray:
    """Counts of clips, int64 [C, C]: row = true class, column = predicted class.

    Args:
        predictions: int [N] predicted class indices in [0, C - 1].
        references: int [N] true class indices in [0, C - 1].
        num_labels: C.

    Raises:
        ValueError: empty input, unequal lengths, or a label out of range.
    """
    predictions = _labels(predictions, "predictions", num_labels)
    references = _labels(references, "references", num_labels)
    _check_same_length(predictions=predictions, references=references)
    return sklearn.metrics.confusion_matrix(references, predictions, labels=np.arange(num_labels))


def compute_classification_metrics(predictions: Any, references: Any, label_names: Sequence[str]) -> dict[str, float]:
    """Closed-set metrics of hard decisions.

    Classes missing from `references` never make a number undefined: their `f1_<label>` is 0, they do not enter
    `unweighted_average_recall` (mean recall over the classes that occur), and `macro_f1` averages over the classes
    that occur in `references` or `predictions`, as scikit-learn does: a language without sad clips is not punished.

    Args:
        predictions: int [N] predicted class indices.
        references: int [N] true class indices.
        label_names: C names; the position is the class index.

    Returns:
        `weighted_f1` (the primary metric), `accuracy`, `unweighted_average_recall`, `macro_f1` and one `f1_<label>`
        per class, each in [0, 1].

    Raises:
        ValueError: empty input, unequal lengths, or a label out of range.
    """
    names = _label_names(label_names)
    predictions = _labels(predictions, "predictions", len(names))
    references = _labels(references, "references", len(names))
    _check_same_length(predictions=predictions, references=references)
    _, recall, f1, support = sklearn.metrics.precision_recall_fscore_support(
        references, predictions, labels=np.arange(len(names)), zero_division=0
    )
    predicted = np.bincount(predictions, minlength=len(names))
    metrics = {
        "weighted_f1": np.average(f1, weights=support),
        "accuracy": np.mean(predictions == references),
        "unweighted_average_recall": recall[support > 0].mean(),
        "macro_f1": f1[(support > 0) | (predicted > 0)].mean(),
    }
    metrics.update({f"f1_{name}": value for name, value in zip(names, f1, strict=True)})
    return {name: float(value) for name, value in metrics.items()}


class MMSERMetric(evaluate.Metric):
    """The metrics of `compute_classification_metrics` plus `confusion_matrix` as an `evaluate` metric.

    Instantiate it directly (`MMSERMetric(label_names=...)`), which needs no network; works with `evaluate.combine`.

    Args:
        label_names: C class names; the position is the class index.
        kwargs: passed to `evaluate.Metric`, for example `cache_dir` or `keep_in_memory`.
    """

    def __init__(self, label_names: Sequence[str] = DEFAULT_LABELS, **kwargs):
        self.label_names = _label_names(label_names)
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Weighted F1 (primary), accuracy, unweighted average recall, macro and per-class F1.",
            citation="",
            inputs_description="predictions and references: lists of int class indices of the same length.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")},
            ),
        )

    def _compute(self, predictions, references) -> dict[str, Any]:
        metrics: dict[str, Any] = dict(compute_classification_metrics(predictions, references, self.label_names))
        metrics["confusion_matrix"] = confusion_matrix(predictions, references, len(self.label_names)).tolist()
        return metrics


def build_compute_metrics(label_names: Sequence[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """The `compute_metrics` function for `transformers.Trainer`.

    Besides `compute_classification_metrics` it reports `recall_min` (lowest recall of a class that occurs) and
    `num_predicted_classes`, and warns when a collapsed model puts every clip into one class.

    Args:
        label_names: C names; the position is the class index.

    Returns:
        A function of an `EvalPrediction` whose `predictions` are logits [N, C] or a tuple that starts with them, and
        whose `label_ids` are int [N].
    """
    names = _label_names(label_names)

    def compute_metrics(evaluation: EvalPrediction) -> dict[str, float]:
        logits = evaluation.predictions
        logits = _floats(logits[0] if isinstance(logits, tuple) else logits, "logits", num_dimensions=2)
        if logits.shape[1] != len(names):
            raise ValueError(f"`logits` must have {len(names)} columns ({', '.join(names)}), got {logits.shape[1]}.")
        predictions = logits.argmax(axis=1)
        matrix = confusion_matrix(predictions, evaluation.label_ids, len(names))
        support, predicted = matrix.sum(axis=1), matrix.sum(axis=0)
        present = support > 0
        metrics = compute_classification_metrics(predictions, evaluation.label_ids, names)
        metrics["recall_min"] = float((matrix.diagonal()[present] / support[present]).min())
        metrics["num_predicted_classes"] = int(np.count_nonzero(predicted))
        if metrics["num_predicted_classes"] == 1 and present.sum() > 1:
            logger.warning(
                f"Collapsed model: all {len(logits)} clips were classified as '{names[int(predicted.argmax())]}',"
                f" the references hold {present.sum()} classes."
            )
        return metrics

    return compute_metrics


# ---------------------------------------------------------------------------------------------------------------------
# Calibration
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReliabilityBins:
    """Statistics of the top-class probability per bin [num_bins], and the bins' `edges` [num_bins + 1].

    `confidence` and `accuracy` are means (nan in bins without clips), `count` is the number of clips.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray
    edges: np.ndarray


def reliability_bins(probabilities: Any, labels: Any, num_bins: int = 15) -> ReliabilityBins:
    """Mean confidence and accuracy in equal-width bins (lo, hi] of the top-class probability (Guo et al. 2017).

    Args:
        probabilities: float [N, C], rows sum to 1.
        labels: int [N] true class indices in [0, C - 1].
        num_bins: number of bins of [0, 1].

    Returns:
        `confidence`, `accuracy` and `count` [num_bins], and `edges` [num_bins + 1]; empty bins hold nan, nan and 0.

    Raises:
        ValueError: malformed probabilities (the row is named), label out of range, unequal lengths, `num_bins` < 1.
    """
    if not isinstance(num_bins, numbers.Integral) or num_bins < 1:
        raise ValueError(f"`num_bins` must be a positive integer, got {num_bins!r}.")
    probabilities = _probabilities(probabilities)
    labels = _labels(labels, "labels", probabilities.shape[1])
    _check_same_length(probabilities=probabilities, labels=labels)
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    edges = np.linspace(0.0, 1.0, int(num_bins) + 1)
    # side="left" gives edges[i - 1] < value <= edges[i]
    bins = np.searchsorted(edges, confidence, side="left") - 1
    count = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        return ReliabilityBins(
            confidence=np.bincount(bins, weights=confidence, minlength=num_bins) / count,
            accuracy=np.bincount(bins, weights=correct, minlength=num_bins) / count,
            count=count,
            edges=edges,
        )


def expected_calibration_error(probabilities: Any, labels: Any, num_bins: int = 15) -> float:
    """Expected calibration error of the top class: sum over bins of count / N * |accuracy - confidence|.

    Naeini et al. 2015; Guo et al. 2017. Arguments and errors as in `reliability_bins`; the result is in [0, 1].
    """
    bins = reliability_bins(probabilities, labels, num_bins)
    filled = bins.count > 0
    gap = np.abs(bins.accuracy[filled] - bins.confidence[filled])
    return float(np.average(gap, weights=bins.count[filled]))


def negative_log_likelihood(logits: Any, labels: Any, temperature: float = 1.0) -> float:
    """Mean negative log-likelihood (nats per clip) of `labels` under softmax(logits / temperature).

    Args:
        logits: float [N, C].
        labels: int [N] true class indices in [0, C - 1].
        temperature: divisor of the logits, > 0.

    Raises:
        ValueError: non-finite logits, label out of range, unequal lengths, or a temperature that is not positive.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"`temperature` must be positive and finite, got {temperature!r}.")
    logits = _floats(logits, "logits", num_dimensions=2)
    labels = _labels(labels, "labels", logits.shape[1])
    _check_same_length(logits=logits, labels=labels)
    return _mean_nll(logits, labels, float(temperature))


def _mean_nll(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    log_probabilities = scipy.special.log_softmax(logits / temperature, axis=1)
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())


def fit_temperature(logits: Any, labels: Any) -> float:
    """Temperature scaling (Guo et al. 2017, section 4.2): the T in [0.05, 20] with the lowest held-out NLL.

    The NLL is convex in 1/T, so it has one minimum over log T, which a bounded scalar search finds. The bounds and
    T = 1 are compared too: the result is never worse than T = 1 on the given clips, and is 1 when no T is better.

    Args:
        logits: float [N, C], not from training clips.
        labels: int [N] true class indices in [0, C - 1].

    Returns:
        T; divide the logits by it.

    Raises:
        ValueError: as in `negative_log_likelihood`.
    """
    logits = _floats(logits, "logits", num_dimensions=2)
    labels = _labels(labels, "labels", logits.shape[1])
    _check_same_length(logits=logits, labels=labels)
    search = scipy.optimize.minimize_scalar(
        lambda log_temperature: _mean_nll(logits, labels, math.exp(log_temperature)),
        bounds=(math.log(TEMPERATURE_BOUNDS[0]), math.log(TEMPERATURE_BOUNDS[1])),
        method="bounded",
        options={"xatol": 1e-8},
    )
    candidates = (1.0, math.exp(search.x), *TEMPERATURE_BOUNDS)
    best = min(candidates, key=lambda temperature: _mean_nll(logits, labels, temperature))
    if best in TEMPERATURE_BOUNDS:
        logger.warning(
            f"The temperature stopped at its bound {best} on {len(labels)} clips: they are too few, nearly all right"
            " or nearly all wrong. Fit it on more held-out clips."
        )
    return best


# ---------------------------------------------------------------------------------------------------------------------
# Open set: unknown is the positive class
# ---------------------------------------------------------------------------------------------------------------------


def _scores_and_flags(scores: Any, flags: Any, score_name: str, flag_name: str) -> tuple[np.ndarray, np.ndarray]:
    scores, flags = _floats(scores, score_name), _flags(flags, flag_name)
    _check_same_length(**{score_name: scores, flag_name: flags})
    return scores, flags


def _share_at_or_above(scores: np.ndarray, thresholds: np.ndarray, count: int) -> np.ndarray:
    """Number of `scores` >= each threshold, divided by `count`; nan where `count` is 0."""
    above = len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")
    return above / count if count else np.full(len(thresholds), np.nan)


def _thresholds(scores: np.ndarray) -> np.ndarray:
    """inf (nothing passes), then every distinct score, descending (at the last one everything passes)."""
    return np.concatenate([[np.inf], np.unique(scores)[::-1]])


def _trapezoid(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)


def auroc(scores: Any, is_unknown: Any) -> float:
    """Area under the ROC curve with *unknown as the positive class*; higher score = more unknown.

    It is the probability that a random unknown clip scores higher than a random known one, ties counting one half.

    Args:
        scores: float [N].
        is_unknown: bool [N].

    Returns:
        A value in [0, 1]; nan if there is no unknown or no known clip.

    Raises:
        ValueError: empty input, unequal lengths, non-finite score, flag other than 0 / 1.
    """
    return _rank_auroc(*_scores_and_flags(scores, is_unknown, "scores", "is_unknown"))


def _rank_auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if num_positive == 0 or num_negative == 0:
        return float("nan")
    # Mann-Whitney U from mid-ranks
    rank_sum = scipy.stats.rankdata(scores)[positive].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def roc_curve(scores: Any, is_unknown: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False positive rate, true positive rate and threshold [K], from (0, 0) to (1, 1); unknown = positive.

    A clip is flagged as unknown if score >= threshold, at every distinct score. Arguments and errors as in `auroc`;
    the rate of a group without clips is nan.
    """
    scores, is_unknown = _scores_and_flags(scores, is_unknown, "scores", "is_unknown")
    thresholds = _thresholds(scores)
    known, unknown = scores[~is_unknown], scores[is_unknown]
    return (
        _share_at_or_above(known, thresholds, len(known)),
        _share_at_or_above(unknown, thresholds, len(unknown)),
        thresholds,
    )


def fpr_at_95_tpr(scores: Any, is_unknown: Any) -> float:
    """Share of known clips flagged as unknown when at least 95 % of the unknown ones are caught.

    A clip is flagged if score >= t, where t is the highest observed score at which at least
    ceil(0.95 * number of unknown) unknown clips are flagged. Clips tied with t are all flagged: ties are never split
    in the method's favour.

    Args:
        scores: float [N], higher = more unknown.
        is_unknown: bool [N].

    Returns:
        A value in [0, 1], lower is better; nan if there is no unknown or no known clip.

    Raises:
        ValueError: as in `auroc`.
    """
    scores, is_unknown = _scores_and_flags(scores, is_unknown, "scores", "is_unknown")
    known, unknown = scores[~is_unknown], np.sort(scores[is_unknown])
    if len(known) == 0 or len(unknown) == 0:
        return float("nan")
    num_caught = -(-95 * len(unknown) // 100)  # ceil in integers: 0.95 * N is not exact in floating point
    return float(np.mean(known >= unknown[-num_caught]))


def oscr_curve(
    known_scores: Any, known_correct: Any, unknown_scores: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Open-set classification rate curve (Dhamija et al. 2018); here *higher score = more known*.

    At each threshold t, infinity first and then every distinct score descending:
    false positive rate = share of unknown clips with score >= t, and
    correct classification rate = share of known clips that are classified correctly and have score >= t.

    Args:
        known_scores: float [K], for example the maximum softmax probability or 1 - unknown probability.
        known_correct: bool [K], whether the known clip's emotion is right.
        unknown_scores: float [U].

    Returns:
        False positive rate, correct classification rate and threshold, from (0, 0) to (1, accuracy); the rate of a
        group without clips is nan.

    Raises:
        ValueError: no clip at all, unequal lengths, non-finite score, flag other than 0 / 1.
    """
    known_scores = _floats(known_scores, "known_scores", allow_empty=True)
    known_correct = _flags(known_correct, "known_correct", allow_empty=True)
    unknown_scores = _floats(unknown_scores, "unknown_scores", allow_empty=True)
    _check_same_length(known_scores=known_scores, known_correct=known_correct)
    if len(known_scores) + len(unknown_scores) == 0:
        raise ValueError("`known_scores` and `unknown_scores` are both empty; at least one example is needed.")
    thresholds = _thresholds(np.concatenate([known_scores, unknown_scores]))
    return (
        _share_at_or_above(unknown_scores, thresholds, len(unknown_scores)),
        _share_at_or_above(known_scores[known_correct], thresholds, len(known_scores)),
        thresholds,
    )


def oscr(known_scores: Any, known_correct: Any, unknown_scores: Any) -> float:
    """Area under `oscr_curve` by the trapezoid rule, so that a tie of a known and an unknown clip counts one half.

    It is the probability that a random known clip is classified correctly *and* scores higher than a random unknown
    clip: at most the closed-set accuracy. Arguments and errors as in `oscr_curve`; nan if there is no known or no
    unknown clip.
    """
    false_positive_rate, correct_rate, _ = oscr_curve(known_scores, known_correct, unknown_scores)
    return _trapezoid(false_positive_rate, correct_rate)


# ---------------------------------------------------------------------------------------------------------------------
# Uncertainty
# ---------------------------------------------------------------------------------------------------------------------


def error_detection_auroc(uncertainty: Any, is_wrong: Any) -> float:
    """Probability that a random wrong prediction is more uncertain than a random right one (ties count one half).

    Args:
        uncertainty: float [N], higher = less certain.
        is_wrong: bool [N].

    Returns:
        A value in [0, 1], 0.5 = uninformative; nan if all predictions are right or all are wrong.

    Raises:
        ValueError: empty input, unequal lengths, non-finite uncertainty, flag other than 0 / 1.
    """
    return _rank_auroc(*_scores_and_flags(uncertainty, is_wrong, "uncertainty", "is_wrong"))


def risk_coverage_curve(uncertainty: Any, is_wrong: Any) -> tuple[np.ndarray, np.ndarray]:
    """Error rate among the k least uncertain clips, for k = 1..N (El-Yaniv & Wiener 2010).

    Clips with equal uncertainty share their errors evenly, which is the expected curve over random orders of the
    ties: the order of the rows never matters.

    Args:
        uncertainty: float [N], higher = less certain.
        is_wrong: bool [N].

    Returns:
        Coverage k / N and risk, each float64 [N].

    Raises:
        ValueError: as in `error_detection_auroc`.
    """
    uncertainty, is_wrong = _scores_and_flags(uncertainty, is_wrong, "uncertainty", "is_wrong")
    _, group, size = np.unique(uncertainty, return_inverse=True, return_counts=True)
    errors_per_clip = np.bincount(group, weights=is_wrong) / size
    kept = np.arange(1, len(uncertainty) + 1)
    return kept / len(kept), np.cumsum(np.repeat(errors_per_clip, size)) / kept


def area_under_risk_coverage(uncertainty: Any, is_wrong: Any) -> float:
    """Mean risk over all coverages (AURC, Geifman et al. 2019); lower is better, 0 without wrong predictions.

    Uninformative uncertainty gives the error rate. Arguments and errors as in `risk_coverage_curve`.
    """
    return float(risk_coverage_curve(uncertainty, is_wrong)[1].mean())


# ---------------------------------------------------------------------------------------------------------------------
# Report: intervals, groups, tables
# ---------------------------------------------------------------------------------------------------------------------


def bootstrap_interval(
    metric_function: Callable[..., float],
    *arrays: Any,
    num_samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a metric (Efron & Tibshirani 1993, chapter 13); rows are drawn together.

    Args:
        metric_function: maps the arrays to a number; resamples where it is nan are left out.
        arrays: one or more arrays with the same first dimension N.
        num_samples: number of resamples.
        level: coverage of the interval, in (0, 1).
        seed: the interval is a pure function of the arguments and this number.

    Returns:
        Lower and upper bound; (nan, nan) if the metric is nan in all resamples.

    Raises:
        ValueError: no array, empty or unequal arrays, `num_samples` < 1, `level` outside (0, 1).
    """
    if not isinstance(num_samples, numbers.Integral) or num_samples < 1:
        raise ValueError(f"`num_samples` must be a positive integer, got {num_samples!r}.")
    if not 0 < level < 1:
        raise ValueError(f"`level` must be between 0 and 1, got {level!r}.")
    if not arrays:
        raise ValueError("`arrays` is empty: give at least one array to resample.")
    converted = [_to_numpy(array, f"arrays[{i}]") for i, array in enumerate(arrays)]
    if any(array.ndim == 0 or len(array) == 0 for array in converted):
        raise ValueError(f"`arrays` must have at least one row each, got shapes {[a.shape for a in converted]}.")
    _check_same_length(**{f"arrays[{i}]": array for i, array in enumerate(converted)})
    generator = np.random.default_rng(seed)
    size = len(converted[0])
    values = np.empty(num_samples)
    for sample in range(num_samples):
        rows = generator.integers(size, size=size)
        values[sample] = metric_function(*[array[rows] for array in converted])
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def grouped_metrics(
    predictions: Any, references: Any, groups: Any, label_names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """`compute_classification_metrics` and `count` for each group (language, corpus, speaker).

    Args:
        predictions: int [N] predicted class indices.
        references: int [N] true class indices.
        groups: N names (or anything that `str` turns into one).
        label_names: C names; the position is the class index.

    Returns:
        Group name -> metrics, sorted by name.

    Raises:
        ValueError: empty input, unequal lengths, or a label out of range.
    """
    names = _label_names(label_names)
    predictions = _labels(predictions, "predictions", len(names))
    references = _labels(references, "references", len(names))
    groups = groups.tolist() if hasattr(groups, "tolist") else list(groups)
    group_names = np.array([str(group) for group in groups])
    _check_same_length(predictions=predictions, references=references, groups=group_names)
    report: dict[str, dict[str, float]] = {}
    for group in np.unique(group_names).tolist():
        rows = group_names == group
        metrics = compute_classification_metrics(predictions[rows], references[rows], names)
        report[group] = {"count": int(rows.sum()), **metrics}
    return report


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def _format_cell(value: Any) -> str:
    if value is None:
        return ""
    if _is_number(value) and not isinstance(value, numbers.Integral):
        return "n/a" if math.isnan(value) else f"{value:.4f}"
    return " ".join(str(value).split()).replace("|", "\\|")


def format_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Markdown table, padded so that it also reads well on a console.

    Args:
        rows: one mapping per line; a missing key or None gives an empty cell, floats have 4 decimals, nan is `n/a`.
        columns: the keys to show, in this order; they are the header.

    Returns:
        The table as one string without a trailing line break; columns of numbers are right-aligned.
    """
    if isinstance(columns, str) or not len(columns):
        raise ValueError(f"`columns` must be a non-empty list of names, got {columns!r}.")
    table = [[_format_cell(column) for column in columns]]
    table += [[_format_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(3, *(len(line[i]) for line in table)) for i in range(len(columns))]
    values = [[row[column] for row in rows if row.get(column) is not None] for column in columns]
    numeric = [bool(cells) and all(_is_number(cell) for cell in cells) for cells in values]
    padded = [
        [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        for line in table
    ]
    rule = ["-" * (width - 1) + ":" if right else "-" * width for width, right in zip(widths, numeric, strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [padded[0], rule, *padded[1:]])


# ---------------------------------------------------------------------------------------------------------------------
# Plots: each writes one PNG (folders are made) and returns its path
# ---------------------------------------------------------------------------------------------------------------------

# Okabe & Ito (2008): distinguishable with every common form of colour blindness; the line styles survive grey print.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
_LINES = [(BLUE, "-"), (VERMILLION, "--"), (GREEN, "-."), (PURPLE, ":"), (ORANGE, "-"), (SKY, "--")]
_GREY = "#666666"


def _new_figure(width: float, height: float) -> Any:
    """Empty matplotlib figure (inches) with its own Agg canvas: pyplot and the global backend stay untouched."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: `pip install .[report]`.") from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _new_axes(width: float, height: float, title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    figure = _new_figure(width, height)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def _value(number: float) -> str:
    return "undefined" if math.isnan(number) else f"{number:.3f}"


def plot_confusion_matrix(matrix: Any, label_names: Sequence[str], path: str | Path) -> Path:
    """Heat map of `confusion_matrix` counts [C, C]; colour and percentage are shares of the true class (recall)."""
    names = _label_names(label_names)
    counts = _floats(matrix, "matrix", num_dimensions=2)
    if counts.shape != (len(names), len(names)) or (counts < 0).any():
        raise ValueError(f"`matrix` must hold counts >= 0 in shape {(len(names),) * 2}, got shape {counts.shape}.")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = max(4.0, 1.0 + 0.9 * len(names))
    figure, axes = _new_axes(size + 0.9, size, "Confusion matrix", "predicted class", "true class")
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 4 else 0)
    axes.set_yticks(range(len(names)), names)
    axes.spines[:].set_visible(False)
    for row in range(len(names)):
        for column in range(len(names)):
            share = shares[row, column]
            colour = "black" if share > 0.45 else "white"
            axes.text(column, row, f"{share:.0%}\n{counts[row, column]:.0f}", ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.85)
    return _save(figure, path)


def plot_reliability(
    probabilities_before: Any, probabilities_after: Any, labels: Any, path: str | Path, num_bins: int = 15
) -> Path:
    """Reliability diagram before and after temperature scaling, with the share of clips per confidence bin below.

    `probabilities_before`, `probabilities_after`: float [N, C]; `labels`: int [N]. Bins as in `reliability_bins`.
    """
    figure = _new_figure(5.2, 6.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    top.plot([0, 1], [0, 1], color=_GREY, linestyle=":", label="perfect calibration")
    series = [("before", probabilities_before, VERMILLION, "o--"), ("after", probabilities_after, BLUE, "s-")]
    for position, (name, probabilities, colour, style) in enumerate(series):
        bins = reliability_bins(probabilities, labels, num_bins)
        error = expected_calibration_error(probabilities, labels, num_bins)
        filled = bins.count > 0
        label = f"{name} (ECE {error:.3f})"
        top.plot(bins.confidence[filled], bins.accuracy[filled], style, color=colour, label=label, markersize=5)
        width = 0.4 / num_bins
        left = bins.edges[:-1] + (0.1 + 0.4 * position) / num_bins
        bottom.bar(left, bins.count / bins.count.sum(), width=width, align="edge", color=colour)
    top.set(title="Reliability", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    bottom.set(xlabel="confidence (probability of the predicted class)", ylabel="share of clips")
    top.legend(loc="upper left", frameon=False)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def plot_risk_coverage(methods: Mapping[str, tuple[Any, Any]], path: str | Path) -> Path:
    """Risk-coverage curves.

    Args:
        methods: name -> (uncertainty [N], is_wrong [N]), for example the uncertainty head and 1 - maximum softmax.
        path: the PNG file to write.
    """
    figure, axes = _new_axes(5.6, 4.2, "Risk-coverage", "coverage (share of clips kept)", "error rate of kept clips")
    highest = 0.0
    for (name, (uncertainty, is_wrong)), (colour, style) in _with_lines(methods):
        coverage, risk = risk_coverage_curve(uncertainty, is_wrong)
        label = f"{name} (AURC {_value(float(risk.mean()))})"
        axes.plot(coverage, risk, color=colour, linestyle=style, label=label)
        axes.axhline(risk[-1], color=_GREY, linestyle=":", linewidth=1)
        highest = max(highest, float(risk.max()))
    axes.plot([], [], color=_GREY, linestyle=":", linewidth=1, label="error rate of all clips")
    axes.set(xlim=(0, 1), ylim=(0, max(1.1 * highest, 0.05)))
    figure.legend(loc="outside lower center", frameon=False)  # the curves may be anywhere inside the axes
    return _save(figure, path)


def plot_open_set_roc(methods: Mapping[str, tuple[Any, Any]], path: str | Path) -> Path:
    """ROC curves of unknown detection, unknown = positive.

    Args:
        methods: name -> (scores [N], is_unknown [N]), higher = more unknown; for example OpenMax and 1 - max softmax.
        path: the PNG file to write.
    """
    figure, axes = _new_axes(
        5.2, 5.0, "Detection of unknown clips", "known clips flagged as unknown", "unknown clips caught"
    )
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":", linewidth=1, label="chance")
    axes.axhline(0.95, color=_GREY, linewidth=0.8)
    axes.text(1.01, 0.95, "95%", color=_GREY, va="center")
    for (name, (scores, is_unknown)), (colour, style) in _with_lines(methods):
        false_positive_rate, true_positive_rate, _ = roc_curve(scores, is_unknown)
        area, at_95 = auroc(scores, is_unknown), fpr_at_95_tpr(scores, is_unknown)
        label = f"{name} (AUROC {_value(area)}, FPR95 {_value(at_95)})"
        axes.plot(false_positive_rate, true_positive_rate, color=colour, linestyle=style, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(loc="lower right", frameon=False)
    return _save(figure, path)


def plot_oscr(methods: Mapping[str, tuple[Any, Any, Any]], path: str | Path) -> Path:
    """Open-set classification rate curves.

    Args:
        methods: name -> (known_scores [K], known_correct [K], unknown_scores [U]), higher = more known, as in `oscr`.
        path: the PNG file to write.
    """
    figure, axes = _new_axes(
        5.2, 5.0, "Open-set classification rate", "unknown clips accepted", "known clips accepted and correct"
    )
    for (name, arrays), (colour, style) in _with_lines(methods):
        false_positive_rate, correct_rate, _ = oscr_curve(*arrays)
        label = f"{name} (OSCR {_value(_trapezoid(false_positive_rate, correct_rate))})"
        axes.plot(false_positive_rate, correct_rate, color=colour, linestyle=style, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(loc="lower right", frameon=False)
    return _save(figure, path)


def _with_lines(methods: Mapping[str, Any]) -> list[tuple[tuple[str, Any], tuple[str, str]]]:
    """Each method with its colour and line style."""
    if not isinstance(methods, Mapping) or not 1 <= len(methods) <= len(_LINES):
        raise ValueError(f"`methods` must map 1 to {len(_LINES)} names to their arrays, got {methods!r}.")
    return list(zip(methods.items(), _LINES, strict=False))


def plot_score_histograms(
    known_scores: Any, unknown_scores: Any, path: str | Path, score_name: str = "unknown probability"
) -> Path:
    """Histograms of one score [K] for known and [U] for unknown clips, each as shares of its group."""
    groups = [
        ("known", _floats(known_scores, "known_scores", allow_empty=True), BLUE, ""),
        ("unknown", _floats(unknown_scores, "unknown_scores", allow_empty=True), ORANGE, "///"),
    ]
    both = np.concatenate([scores for _, scores, _, _ in groups])
    if len(both) == 0:
        raise ValueError("`known_scores` and `unknown_scores` are both empty; at least one example is needed.")
    edges = np.histogram_bin_edges(both, bins=30)
    figure, axes = _new_axes(5.6, 4.0, "Known and unknown clips", score_name, "share of the group")
    for name, scores, colour, hatch in groups:
        shares = np.histogram(scores, edges)[0] / max(len(scores), 1)
        label = f"{name} ({len(scores)} clips)"
        style = {"facecolor": (colour, 0.3), "edgecolor": colour, "linewidth": 1.5, "hatch": hatch}
        axes.stairs(shares, edges, fill=True, label=label, **style)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _save(figure, path)


def plot_group_bars(groups: Mapping[str, Mapping[str, float]], path: str | Path, metric: str = "weighted_f1") -> Path:
    """Horizontal bars of one metric (in [0, 1]) per group, from the result of `grouped_metrics`."""
    if not groups or any(metric not in values for values in groups.values()):
        raise ValueError(f"`groups` must be a non-empty result of `grouped_metrics` that holds `{metric}`.")
    heights = [values[metric] for values in groups.values()]
    names = [f"{name} (n = {values['count']})" for name, values in groups.items()]
    metric_name = metric.replace("_", " ").replace("f1", "F1")
    figure, axes = _new_axes(5.6, 1.3 + 0.38 * len(names), f"{metric_name} per group", metric_name, "")
    axes.barh(range(len(names)), heights, color=BLUE, height=0.65)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    for position, height in enumerate(heights):
        axes.text(height + 0.01, position, _value(height), va="center")
    axes.set_xlim(0, 1.12)
    axes.set_xticks(np.linspace(0, 1, 6))
    return _save(figure, path)
