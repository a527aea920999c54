# SPDX-License-Identifier: Apache-2.0
"""How good decisions are: F1, accuracy, recall and the confusion matrix, with bootstrap intervals.

Every function takes lists, numpy arrays or torch tensors and computes in float64. A number that is not defined is
`nan`; malformed input is a `ValueError` (see `checks`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import scipy.special
import scipy.stats
from transformers import EvalPrediction
from transformers.utils import logging

from configuration_mmser import DEFAULT_LABELS
from mmser.checks import (
    check_floats,
    check_label_names,
    check_labels,
    check_positive_integer,
    check_same_length,
    check_scores,
    to_numpy,
)

logger = logging.get_logger(__name__)
MIN_SPEAKERS = 10  # that an interval is drawn over; fewer do not show how speakers differ


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
    cells = np.bincount(references * num_labels + predictions, minlength=num_labels**2)
    return cells.reshape(num_labels, num_labels)


def compute_classification_metrics(predictions: Any, references: Any, label_names: Sequence[str]) -> dict[str, float]:
    """Closed-set metrics of hard decisions.

    A class that is missing from `references` makes no number undefined. Its `f1_<label>` is 0.
    `unweighted_average_recall` is the mean recall over the classes that occur in `references`. `macro_f1` averages
    over the classes that occur in `references` or `predictions`, as scikit-learn does. So a language without sad
    clips is not punished.

    Args:
        predictions: int [N] predicted class indices.
        references: int [N] true class indices.
        label_names: C names; the position is the class index.

    Returns: `weighted_f1` (the primary metric), `accuracy`, `unweighted_average_recall`, `macro_f1` and one
        `f1_<label>` per class, each in [0, 1].
    Raises:
        ValueError: empty input, unequal lengths, or a label out of range.
    """
    names = check_label_names(label_names)
    matrix = confusion_matrix(predictions, references, len(names))
    metrics = {name: float(value) for name, value in _matrix_metrics(matrix).items()}
    return {**metrics, **{f"f1_{name}": float(value) for name, value in zip(names, _matrix_f1(matrix), strict=True)}}


def concordance_correlation(predictions: Any, references: Any) -> float:
    """
    The concordance correlation coefficient (Lin 1989): `2 s_xy / (s_x^2 + s_y^2 + (mean_x - mean_y)^2)`, moments over
    N. 1 only where both are equal: unlike Pearson's, it counts a wrong scale and a shift.

    Args:
        predictions, references: float [N].

    Returns: in [-1, 1]; nan if both are the same constant.
    Raises:
        ValueError: empty input, unequal lengths, or a number that is not finite.
    """
    predicted, true = check_floats(predictions, "predictions"), check_floats(references, "references")
    check_same_length(predictions=predicted, references=true)
    covariance = ((predicted - predicted.mean()) * (true - true.mean())).mean()
    spread = predicted.var() + true.var() + (predicted.mean() - true.mean()) ** 2
    return float(2 * covariance / spread) if spread > 0 else float("nan")


def compute_regression_metrics(predictions: Any, references: Any) -> dict[str, float]:
    """
    Metrics of predicted numbers.

    Args:
        predictions, references: float [N].

    Returns: `ccc` (`concordance_correlation`, the primary metric), `pearson` (nan if one of them is constant) and
        `mean_absolute_error`, in the unit of the numbers.
    Raises:
        ValueError: as of `concordance_correlation`.
    """
    ccc = concordance_correlation(predictions, references)
    predicted, true = check_floats(predictions, "predictions"), check_floats(references, "references")
    spread = predicted.std() * true.std()
    covariance = ((predicted - predicted.mean()) * (true - true.mean())).mean()
    return {
        "ccc": ccc,
        "pearson": float(covariance / spread) if spread > 0 else float("nan"),
        "mean_absolute_error": float(np.abs(predicted - true).mean()),
    }


def _matrix_f1(matrices: np.ndarray) -> np.ndarray:
    """F1 of each class [..., C] of confusion matrices [..., C, C]; 0 for a class that occurs nowhere."""
    hits = np.diagonal(matrices, axis1=-2, axis2=-1)
    return 2 * hits / np.maximum(matrices.sum(-1) + matrices.sum(-2), 1)


def _matrix_metrics(matrices: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics [...] of confusion matrices [..., C, C]; see `compute_classification_metrics`."""
    # By hand, as the bootstrap needs 1000 matrices at once: 26 ms here, 5.8 s with scikit-learn
    hits = np.diagonal(matrices, axis1=-2, axis2=-1)
    support, predicted = matrices.sum(-1), matrices.sum(-2)
    f1, total = _matrix_f1(matrices), support.sum(-1)
    return {
        "weighted_f1": (f1 * support).sum(-1) / total,
        "accuracy": hits.sum(-1) / total,
        "unweighted_average_recall": (hits / np.maximum(support, 1)).sum(-1) / (support > 0).sum(-1),
        "macro_f1": f1.sum(-1) / ((support > 0) | (predicted > 0)).sum(-1),
    }


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
        matrix = confusion_matrix(predictions, references, len(self.label_names))
        metrics = compute_classification_metrics(predictions, references, self.label_names)
        return {**metrics, "confusion_matrix": matrix.tolist()}


def build_compute_metrics(label_names: Sequence[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """The `compute_metrics` function for `transformers.Trainer`.

    Besides `compute_classification_metrics` it reports `recall_min` (lowest recall of a class that occurs) and
    `num_predicted_classes`, and warns when a collapsed model puts every clip into one class.

    Args:
        label_names: C names; the position is the class index.

    Returns: A function of an `EvalPrediction` whose `predictions` are logits [N, C] or a tuple that starts with them,
        and whose `label_ids` are int [N].
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


def rank_auroc(scores: Any, positive: Any, score_name: str = "scores", flag_name: str = "positive") -> float:
    """Area under the ROC curve: the probability that a random positive clip scores higher than a random other one.

    Args:
        scores: float [N]; ties count one half.
        positive: bool [N].
        score_name, flag_name: names of these two arguments in an error.

    Returns: A value in [0, 1]; nan if all clips or none are positive.
    Raises:
        ValueError: empty input, unequal lengths, non-finite score, flag other than 0 / 1.
    """
    scores, positive = check_scores(scores, positive, score_name, flag_name)
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if num_positive == 0 or num_negative == 0:
        return float("nan")
    # Mann-Whitney U from mid-ranks: a whole judgement takes 19 s, with scikit-learn's roc_auc_score 139 s
    rank_sum = scipy.stats.rankdata(scores)[positive].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


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
        seed: the interval depends on the arguments and this number alone.

    Returns: Lower and upper bound; (nan, nan) if the metric is nan in all resamples.
    Raises:
        ValueError: no array, empty or unequal arrays, `num_samples` < 1, `level` outside (0, 1).
    """
    num_samples = _check_bootstrap(num_samples, level)
    if not arrays:
        raise ValueError("`arrays` is empty: give at least one array to resample.")
    converted = {f"arrays[{i}]": to_numpy(array, f"arrays[{i}]") for i, array in enumerate(arrays)}
    for name, array in converted.items():
        if array.ndim == 0 or len(array) == 0:
            raise ValueError(f"`{name}` must have at least one row, got shape {array.shape}.")
    check_same_length(**converted)
    generator = np.random.default_rng(seed)
    size = len(converted["arrays[0]"])
    values = np.empty(num_samples)
    for sample in range(num_samples):
        rows = generator.integers(size, size=size)
        values[sample] = metric_function(*[array[rows] for array in converted.values()])
    return _percentiles(values, level)


def bootstrap_classification(
    predictions: Any,
    references: Any,
    label_names: Sequence[str],
    num_samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    speakers: Sequence[str] | None = None,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of `compute_classification_metrics`, all from the same resamples.

    The metrics depend only on the confusion matrix. Clips drawn with replacement fill its C x C cells as a
    multinomial draw with the observed shares does. So the matrices are drawn, not the clips: the distribution is that
    of `bootstrap_interval`, and the draw is about a hundred times as fast.

    Clips of one speaker are right or wrong together, so clips drawn one by one say too narrow an interval. With
    `speakers` these are drawn, each with all of its clips (Davison & Hinkley 1997, section 3.8), if there are at least
    `MIN_SPEAKERS`: fewer do not show how speakers differ, and the clips are drawn.

    Args:
        predictions: int [N] predicted class indices.
        references: int [N] true class indices.
        label_names: C names; the position is the class index.
        num_samples, level, seed: as in `bootstrap_interval`.
        speakers: the speaker of each clip, N names.

    Returns: Lower and upper bound of `weighted_f1`, `accuracy`, `unweighted_average_recall` and `macro_f1`.
    Raises:
        ValueError: as in `compute_classification_metrics` and `bootstrap_interval`.
    """
    num_samples = _check_bootstrap(num_samples, level)
    num_classes, generator = len(check_label_names(label_names)), np.random.default_rng(seed)
    matrix = confusion_matrix(predictions, references, num_classes)
    clips = int(matrix.sum())
    if speakers is not None:
        check_same_length(predictions=to_numpy(predictions, "predictions"), speakers=np.asarray(speakers))
    if draws_speakers(speakers):
        of_clip = np.unique(np.asarray(speakers), return_inverse=True)[1]
        each = np.zeros((of_clip.max() + 1, *matrix.shape), dtype=np.int64)
        np.add.at(each, (of_clip, to_numpy(references, "references"), to_numpy(predictions, "predictions")), 1)
        times = generator.multinomial(len(each), np.full(len(each), 1 / len(each)), size=num_samples)
        drawn = times @ each.reshape(len(each), -1)
    else:
        drawn = generator.multinomial(clips, matrix.ravel() / clips, size=num_samples)
    metrics = _matrix_metrics(drawn.reshape(num_samples, *matrix.shape))
    return {name: _percentiles(values, level) for name, values in metrics.items()}


def draws_speakers(speakers: Sequence[str] | None) -> bool:
    """Whether `bootstrap_classification` draws these speakers, and not their clips."""
    return speakers is not None and len(set(speakers)) >= MIN_SPEAKERS


def _check_bootstrap(num_samples: int, level: float) -> int:
    if not 0 < level < 1:
        raise ValueError(f"`level` must be between 0 and 1, got {level!r}.")
    return check_positive_integer(num_samples, "num_samples")


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    """The central interval that holds the share `level` of the values that are not nan."""
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
