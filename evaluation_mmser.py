# SPDX-License-Identifier: Apache-2.0
"""Metrics, calibration, open-set scores and uncertainty, on plain arrays (no model code, no plots).

Every function takes lists, numpy arrays or torch tensors and computes in float64.
A quantity that does not exist (AUROC with no unknown clip, ...) is `nan`; malformed input (empty, NaN,
unequal lengths, label out of range) is a `ValueError` that names the argument and the first offending index.
Read in this order: checks, classification, calibration, open set, uncertainty, test-time augmentation, report.
"""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import evaluate
import numpy as np
import scipy.optimize
import scipy.spatial
import scipy.special
import scipy.stats
import sklearn.metrics
import sklearn.preprocessing
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


def check_floats(values: Any, name: str, num_dimensions: int = 1, allow_empty: bool = False) -> np.ndarray:
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
    array = check_floats(values, name, allow_empty=allow_empty)
    bad = (array != 0) & (array != 1)
    if bad.any():
        index = _index(array, bad)
        raise ValueError(f"`{name}` must hold True/False or 1/0, got {array[index]:g} at index {index}.")
    return array.astype(bool)


def _probabilities(values: Any, name: str = "probabilities") -> np.ndarray:
    """`values` as [N, C] rows of probabilities; the tolerance lets half-precision softmax outputs through."""
    array = check_floats(values, name, num_dimensions=2)
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


def check_label_names(label_names: Sequence[str]) -> list[str]:
    if isinstance(label_names, str) or not len(label_names) or len(set(label_names)) != len(label_names):
        raise ValueError(f"`label_names` must be a non-empty list of distinct names, got {label_names!r}.")
    return [str(name) for name in label_names]


# ---------------------------------------------------------------------------------------------------------------------
# Classification
# ---------------------------------------------------------------------------------------------------------------------


def softmax(logits: Any) -> np.ndarray:
    """Row-wise softmax: float `logits` [N, C] -> probabilities [N, C], float64."""
    return scipy.special.softmax(check_floats(logits, "logits", num_dimensions=2), axis=1)


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
    names = check_label_names(label_names)
    matrix = confusion_matrix(predictions, references, len(names))
    metrics = {name: float(values[0]) for name, values in _matrix_metrics(matrix[None]).items()}
    return {**metrics, **{f"f1_{name}": float(value) for name, value in zip(names, _matrix_f1(matrix), strict=True)}}


def _matrix_f1(matrices: np.ndarray) -> np.ndarray:
    """F1 of each class [..., C] of confusion matrices [..., C, C]; 0 for a class that occurs nowhere."""
    hits = np.diagonal(matrices, axis1=-2, axis2=-1)
    return 2 * hits / np.maximum(matrices.sum(-1) + matrices.sum(-2), 1)


def _matrix_metrics(matrices: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics of many confusion matrices [S, C, C] at once, each [S]; see `compute_classification_metrics`."""
    hits, support, predicted = np.diagonal(matrices, axis1=1, axis2=2), matrices.sum(2), matrices.sum(1)
    f1, total = _matrix_f1(matrices), matrices.sum((1, 2))
    return {
        "weighted_f1": (f1 * support).sum(1) / total,
        "accuracy": hits.sum(1) / total,
        "unweighted_average_recall": (hits / np.maximum(support, 1)).sum(1) / (support > 0).sum(1),
        "macro_f1": f1.sum(1) / ((support > 0) | (predicted > 0)).sum(1),
    }


def bootstrap_classification(
    predictions: Any,
    references: Any,
    label_names: Sequence[str],
    num_samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of `compute_classification_metrics`, all from the same resamples.

    Clips drawn with replacement fall into the C x C cells of the confusion matrix as a multinomial draw with the
    observed shares does, and the metrics depend on nothing else. So the matrices are drawn, not the clips: the same
    distribution as `bootstrap_interval`, about a hundred times as fast.

    Args:
        predictions: int [N] predicted class indices.
        references: int [N] true class indices.
        label_names: C names; the position is the class index.
        num_samples, level, seed: as in `bootstrap_interval`.

    Returns:
        Lower and upper bound of `weighted_f1`, `accuracy`, `unweighted_average_recall` and `macro_f1`.

    Raises:
        ValueError: as in `compute_classification_metrics` and `bootstrap_interval`.
    """
    _check_bootstrap(num_samples, level)
    names = check_label_names(label_names)
    matrix = confusion_matrix(predictions, references, len(names))
    clips = int(matrix.sum())
    drawn = np.random.default_rng(seed).multinomial(clips, matrix.ravel() / clips, size=num_samples)
    metrics = _matrix_metrics(drawn.reshape(num_samples, *matrix.shape))
    return {name: _percentiles(values, level) for name, values in metrics.items()}


class MMSERMetric(evaluate.Metric):
    """The metrics of `compute_classification_metrics` plus `confusion_matrix` as an `evaluate` metric.

    Instantiate it directly (`MMSERMetric(label_names=...)`), which needs no network; works with `evaluate.combine`.

    Args:
        label_names: C class names; the position is the class index.
        kwargs: passed to `evaluate.Metric`, for example `cache_dir` or `keep_in_memory`.
    """

    def __init__(self, label_names: Sequence[str] = DEFAULT_LABELS, **kwargs):
        self.label_names = check_label_names(label_names)
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
    names = check_label_names(label_names)

    def compute_metrics(evaluation: EvalPrediction) -> dict[str, float]:
        logits = evaluation.predictions
        logits = check_floats(logits[0] if isinstance(logits, tuple) else logits, "logits", num_dimensions=2)
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
    _check_temperature(temperature)
    logits = check_floats(logits, "logits", num_dimensions=2)
    labels = _labels(labels, "labels", logits.shape[1])
    _check_same_length(logits=logits, labels=labels)
    return _mean_nll(logits, labels, float(temperature))


def _check_temperature(temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"`temperature` must be positive and finite, got {temperature!r}.")


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
    logits = check_floats(logits, "logits", num_dimensions=2)
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
    scores, flags = check_floats(scores, score_name), _flags(flags, flag_name)
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
    known_scores = check_floats(known_scores, "known_scores", allow_empty=True)
    known_correct = _flags(known_correct, "known_correct", allow_empty=True)
    unknown_scores = check_floats(unknown_scores, "unknown_scores", allow_empty=True)
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


def energy_score(logits: Any, temperature: float = 1.0) -> np.ndarray:
    """Energy of a clip (Liu et al. 2020, equation 4): -T log(sum(exp(logits / T))); higher = more unknown.

    Args:
        logits: float [N, C], as the network gives them: not divided by a fitted temperature.
        temperature: T, > 0.

    Returns:
        float64 [N].

    Raises:
        ValueError: non-finite logits, or a temperature that is not positive.
    """
    _check_temperature(temperature)
    return -temperature * scipy.special.logsumexp(check_floats(logits, "logits", 2) / temperature, axis=1)


def knn_distance(train_features: Any, features: Any, k: int = 10) -> np.ndarray:
    """Distance to the k-th nearest training clip (Sun et al. 2022); higher = more unknown.

    As in the paper, each row is divided by its Euclidean norm, and nothing else is done to it. With fewer than `k`
    training clips it is the distance to the farthest of them.

    Args:
        train_features: float [M, D], of the training clips.
        features: float [N, D].
        k: which neighbour counts, at least 1.

    Returns:
        float64 [N], in [0, 2].

    Raises:
        ValueError: empty or non-finite features, unequal widths, or `k` < 1.
    """
    if not isinstance(k, numbers.Integral) or k < 1:
        raise ValueError(f"`k` must be a positive integer, got {k!r}.")
    train_features = check_floats(train_features, "train_features", 2)
    features = check_floats(features, "features", 2)
    if train_features.shape[1] != features.shape[1]:
        raise ValueError(
            f"`train_features` and `features` must have the same width, got {train_features.shape[1]} and "
            f"{features.shape[1]}."
        )
    # a row of zeros stays as it is
    train_features, features = (sklearn.preprocessing.normalize(rows) for rows in (train_features, features))
    k = min(int(k), len(train_features))
    distances = np.empty(len(features))
    step = max(1, 10_000_000 // len(train_features))  # rows at a time, to bound the memory
    for start in range(0, len(features), step):
        block = scipy.spatial.distance.cdist(features[start : start + step], train_features)
        distances[start : start + step] = np.partition(block, k - 1, axis=1)[:, k - 1]
    return distances


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


def error_log_odds(doubt: Any, uncertainty: Any, weights: Sequence[float]) -> np.ndarray:
    """Log-odds of an error [N]: weights[0] logit(doubt) + weights[1] logit(uncertainty) + weights[2].

    Args:
        doubt: float [N], one minus the largest class probability.
        uncertainty: float [N], of the uncertainty head, in [0, 1].
        weights: three numbers, as `fit_error_probability` gives them.
    """
    scores = [check_floats(doubt, "doubt"), check_floats(uncertainty, "uncertainty")]
    log_odds = [scipy.special.logit(np.clip(values, 1e-6, 1 - 1e-6)) for values in scores]
    return weights[0] * log_odds[0] + weights[1] * log_odds[1] + weights[2]


def fit_error_probability(doubt: Any, uncertainty: Any, is_wrong: Any) -> np.ndarray:
    """Logistic regression of "the prediction is wrong" on the log-odds of two scores (Platt 1999 has one).

    The weights of the scores are at least 0, so that more doubt never means less probability of an error; a unit
    Gaussian prior on them keeps few clips from extreme ones.

    Args:
        doubt: float [N], one minus the largest class probability, of held-out clips.
        uncertainty: float [N], of the uncertainty head, in [0, 1].
        is_wrong: bool [N], with both values present.

    Returns:
        Weights of the two log-odds and the constant, float64 [3]; see `error_log_odds`.

    Raises:
        ValueError: unequal lengths, a score outside [0, 1], or only right (or only wrong) predictions.
    """
    doubt, is_wrong = _scores_and_flags(doubt, is_wrong, "doubt", "is_wrong")
    uncertainty = check_floats(uncertainty, "uncertainty")
    _check_same_length(doubt=doubt, uncertainty=uncertainty)
    for name, values in (("doubt", doubt), ("uncertainty", uncertainty)):
        if (values < -1e-6).any() or (values > 1 + 1e-6).any():
            raise ValueError(f"`{name}` must be in [0, 1], got values from {values.min()} to {values.max()}.")
    if is_wrong.all() or not is_wrong.any():
        raise ValueError("`is_wrong` must hold both right and wrong predictions.")
    sign = np.where(is_wrong, 1.0, -1.0)
    columns = np.stack([error_log_odds(doubt, uncertainty, row) for row in np.eye(3)], axis=1)  # [N, 3]

    def loss(weights):
        margin = sign * (columns @ weights)
        gradient = -(sign * scipy.special.expit(-margin)) @ columns + weights * [1, 1, 0]
        return np.logaddexp(0, -margin).sum() + (weights[:2] ** 2).sum() / 2, gradient

    start, bounds = np.array([0.5, 0.5, 0.0]), [(0, None), (0, None), (None, None)]
    return scipy.optimize.minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B").x


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
# Test-time augmentation
# ---------------------------------------------------------------------------------------------------------------------


def average_passes(outputs: Mapping[str, Any], num_passes: int) -> dict[str, np.ndarray]:
    """Average several passes over each clip: probabilities are averaged, not logits.

    Args:
        outputs: arrays whose rows are the passes, those of one clip together, as `TestTimeAugmentation` orders them:
            `logits` [N * P, C] and any others with N * P rows.
        num_passes: P.

    Returns:
        The same arrays with one row per clip: `logits` is the logarithm of the mean of softmax(logits), so that its
        softmax is that mean; `labels` is that of the first pass; a flag (bool) is set where it is set in more than
        half of the passes; everything else is the mean. With one pass, the same values.

    Raises:
        ValueError: `num_passes` < 1, or an array whose rows are not a multiple of it.
    """
    if not isinstance(num_passes, numbers.Integral) or num_passes < 1:
        raise ValueError(f"`num_passes` must be a positive integer, got {num_passes!r}.")
    averaged = {}
    for name, values in outputs.items():
        array = _to_numpy(values, name)
        if array.ndim == 0 or len(array) % num_passes:
            raise ValueError(f"`{name}` must have {num_passes} rows for each clip, got shape {array.shape}.")
        array = array.reshape(len(array) // num_passes, num_passes, *array.shape[1:])
        if num_passes == 1 or name == "labels":
            averaged[name] = array[:, 0]
        elif name == "logits":
            log_probabilities = scipy.special.log_softmax(array.astype(np.float64), axis=2)
            averaged[name] = scipy.special.logsumexp(log_probabilities, axis=1) - math.log(num_passes)
        else:
            mean = array.mean(axis=1, dtype=np.float64)
            averaged[name] = mean > 0.5 if array.dtype == bool else mean
    return averaged


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
    _check_bootstrap(num_samples, level)
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
    return _percentiles(values, level)


def _check_bootstrap(num_samples: int, level: float) -> None:
    if not isinstance(num_samples, numbers.Integral) or num_samples < 1:
        raise ValueError(f"`num_samples` must be a positive integer, got {num_samples!r}.")
    if not 0 < level < 1:
        raise ValueError(f"`level` must be between 0 and 1, got {level!r}.")


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    """The central interval that holds the share `level` of the values that are not nan."""
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def grouped_metrics(
    predictions: Any,
    references: Any,
    groups: Any,
    label_names: Sequence[str],
    probabilities: Any = None,
    is_unknown: Any = None,
    num_samples: int = 1000,
) -> dict[str, dict[str, Any]]:
    """What is said about each group of clips (language, corpus, sex, duration).

    Args:
        predictions: int [N] predicted class indices.
        references: int [N] true class indices.
        groups: N names (or anything that `str` turns into one).
        label_names: C names; the position is the class index.
        probabilities: float [N, C], for the calibration within each group.
        is_unknown: bool [N], whether the model rejects the clip.
        num_samples: resamples for the interval.

    Returns:
        Group name -> `count`, `compute_classification_metrics`, `weighted_f1_interval` (95 %, bootstrap) and, if the
        arrays are given, `mean_confidence` and `expected_calibration_error`, and the share of clips `rejected`;
        sorted by name.

    Raises:
        ValueError: empty input, unequal lengths, or a label out of range.
    """
    names = check_label_names(label_names)
    predictions = _labels(predictions, "predictions", len(names))
    references = _labels(references, "references", len(names))
    groups = groups.tolist() if hasattr(groups, "tolist") else list(groups)
    group_names = np.array([str(group) for group in groups])
    arrays = {"predictions": predictions, "references": references, "groups": group_names}
    if probabilities is not None:
        arrays["probabilities"] = probabilities = _probabilities(probabilities)
    if is_unknown is not None:
        arrays["is_unknown"] = is_unknown = _flags(is_unknown, "is_unknown")
    _check_same_length(**arrays)
    report: dict[str, dict[str, Any]] = {}
    for group in np.unique(group_names).tolist():
        rows = group_names == group
        own = predictions[rows], references[rows]
        values = {"count": int(rows.sum()), **compute_classification_metrics(*own, names)}
        values["weighted_f1_interval"] = bootstrap_classification(*own, names, num_samples)["weighted_f1"]
        if probabilities is not None:
            values["mean_confidence"] = float(probabilities[rows].max(axis=1).mean())
            values["expected_calibration_error"] = expected_calibration_error(probabilities[rows], references[rows])
        if is_unknown is not None:
            values["rejected"] = float(is_unknown[rows].mean())
        report[group] = values
    return report


def group_gap(
    groups: Mapping[str, Mapping[str, Any]],
    metrics: Sequence[str] = ("weighted_f1", "unweighted_average_recall"),
    min_count: int = 30,
) -> dict[str, dict[str, Any]]:
    """How far the best and the worst group are apart, among those with enough clips to say so.

    Args:
        groups: result of `grouped_metrics`.
        metrics: names of the metrics to compare.
        min_count: groups with fewer clips do not take part.

    Returns:
        Metric name -> `gap`, and the names of the groups with the `highest` and the `lowest` value (the first by name
        among equals); empty if fewer than two groups have `min_count` clips.
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
