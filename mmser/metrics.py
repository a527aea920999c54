# SPDX-License-Identifier: Apache-2.0
"""Closed-set metrics of decisions, with bootstrap intervals and by group, on plain arrays.

Every function takes lists, numpy arrays or torch tensors and computes in float64. A quantity that does not exist is
`nan`; malformed input is a `ValueError` that names the argument and the first offending index. The checks at the top
also serve `calibration` and `open_set`.
"""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import scipy.stats
import sklearn.preprocessing
from transformers import EvalPrediction
from transformers.utils import logging

from configuration_mmser import DEFAULT_LABELS

logger = logging.get_logger(__name__)


def to_numpy(values: Any, name: str) -> np.ndarray:
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
    array = to_numpy(values, name)
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


def check_labels(values: Any, name: str, num_labels: int) -> np.ndarray:
    """`values` as an int64 vector with entries in [0, num_labels - 1]."""
    array = to_numpy(values, name)
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


def check_flags(values: Any, name: str, allow_empty: bool = False) -> np.ndarray:
    """`values` (booleans, or numbers 0 and 1) as a boolean vector."""
    array = check_floats(values, name, allow_empty=allow_empty)
    bad = (array != 0) & (array != 1)
    if bad.any():
        index = _index(array, bad)
        raise ValueError(f"`{name}` must hold True/False or 1/0, got {array[index]:g} at index {index}.")
    return array.astype(bool)


def check_probabilities(values: Any, name: str = "probabilities") -> np.ndarray:
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


def check_same_length(**arrays: np.ndarray) -> None:
    if len({len(array) for array in arrays.values()}) > 1:
        lengths = ", ".join(f"`{name}` {len(array)}" for name, array in arrays.items())
        raise ValueError(f"All arrays must have the same length, got {lengths}.")


def check_label_names(label_names: Sequence[str]) -> list[str]:
    if isinstance(label_names, str) or not len(label_names) or len(set(label_names)) != len(label_names):
        raise ValueError(f"`label_names` must be a non-empty list of distinct names, got {label_names!r}.")
    return [str(name) for name in label_names]


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
    predictions = check_labels(predictions, "predictions", num_labels)
    references = check_labels(references, "references", num_labels)
    check_same_length(predictions=predictions, references=references)
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
        array = to_numpy(values, name)
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
    converted = [to_numpy(array, f"arrays[{i}]") for i, array in enumerate(arrays)]
    if any(array.ndim == 0 or len(array) == 0 for array in converted):
        raise ValueError(f"`arrays` must have at least one row each, got shapes {[a.shape for a in converted]}.")
    check_same_length(**{f"arrays[{i}]": array for i, array in enumerate(converted)})
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


def scores_and_flags(scores: Any, flags: Any, score_name: str, flag_name: str) -> tuple[np.ndarray, np.ndarray]:
    scores, flags = check_floats(scores, score_name), check_flags(flags, flag_name)
    check_same_length(**{score_name: scores, flag_name: flags})
    return scores, flags


def rank_auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if num_positive == 0 or num_negative == 0:
        return float("nan")
    # Mann-Whitney U from mid-ranks
    rank_sum = scipy.stats.rankdata(scores)[positive].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def check_temperature(temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"`temperature` must be positive and finite, got {temperature!r}.")
