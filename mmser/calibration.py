# SPDX-License-Identifier: Apache-2.0
"""Whether a score means what it says: calibration error, temperature scaling, and the probability of an error.

Every function takes lists, numpy arrays or torch tensors and computes in float64 (see `metrics`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special
from transformers.utils import logging

from mmser.checks import (
    check_floats,
    check_labels,
    check_positive_integer,
    check_probabilities,
    check_same_length,
    check_scores,
    check_temperature,
    reject,
)
from mmser.metrics import rank_auroc

logger = logging.get_logger(__name__)
TEMPERATURE_BOUNDS = (0.05, 20.0)


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
    Returns: `confidence`, `accuracy` and `count` [num_bins], nan, nan and 0 in an empty bin; `edges` [num_bins + 1].
    Raises:
        ValueError: malformed probabilities (the row is named), label out of range, unequal lengths, `num_bins` < 1.
    """
    num_bins = check_positive_integer(num_bins, "num_bins")
    probabilities = check_probabilities(probabilities)
    labels = check_labels(labels, "labels", probabilities.shape[1])
    check_same_length(probabilities=probabilities, labels=labels)
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    edges = np.linspace(0.0, 1.0, num_bins + 1)
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
    check_temperature(temperature)
    return _mean_nll(*_check_logits(logits, labels), float(temperature))


def _check_logits(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    logits = check_floats(logits, "logits", num_dimensions=2)
    labels = check_labels(labels, "labels", logits.shape[1])
    check_same_length(logits=logits, labels=labels)
    return logits, labels


def _mean_nll(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    log_probabilities = scipy.special.log_softmax(logits / temperature, axis=1)
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())


def fit_temperature(logits: Any, labels: Any) -> float:
    """Temperature scaling (Guo et al. 2017, section 4.2): the T in [0.05, 20] with the lowest held-out NLL.

    The NLL is convex in 1/T, so a bounded scalar search over log T finds its one minimum. The result is compared with
    the bounds and with T = 1: it is never worse than T = 1 on the given clips, and it is 1 when no T is better.

    Args:
        logits: float [N, C], not from training clips.
        labels: int [N] true class indices in [0, C - 1].
    Returns: T; divide the logits by it.
    Raises:
        ValueError: as in `negative_log_likelihood`.
    """
    logits, labels = _check_logits(logits, labels)
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
            f"The temperature stopped at its bound {best}: the {len(labels)} held-out clips are too few, or nearly all"
            " right, or nearly all wrong. Fit it on more held-out clips."
        )
    return best


def error_detection_auroc(uncertainty: Any, is_wrong: Any) -> float:
    """Probability that a random wrong prediction is more uncertain than a random right one (ties count one half).

    Args:
        uncertainty: float [N], higher = less certain.
        is_wrong: bool [N].
    Returns: A value in [0, 1], 0.5 = uninformative; nan if all predictions are right or all are wrong.
    Raises:
        ValueError: empty input, unequal lengths, non-finite uncertainty, flag other than 0 / 1.
    """
    return rank_auroc(uncertainty, is_wrong, "uncertainty", "is_wrong")


def error_log_odds(doubt: Any, uncertainty: Any, weights: Sequence[float] | np.ndarray) -> np.ndarray:
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
    """Logistic regression of "the prediction is wrong" on the log-odds of two scores (Platt 1999 uses one).

    The weights of the scores are at least 0, so that more doubt never lowers the probability of an error. A unit
    Gaussian prior on them keeps them small when there are few clips.

    Args:
        doubt: float [N], one minus the largest class probability, of held-out clips.
        uncertainty: float [N], of the uncertainty head, in [0, 1].
        is_wrong: bool [N]; at least one prediction is right and one is wrong.
    Returns: Weights of the two log-odds and the constant, float64 [3]; see `error_log_odds`.
    Raises:
        ValueError: unequal lengths, a score outside [0, 1], or only right (or only wrong) predictions.
    """
    doubt, is_wrong = check_scores(doubt, is_wrong, "doubt", "is_wrong")
    uncertainty = check_floats(uncertainty, "uncertainty")
    check_same_length(doubt=doubt, uncertainty=uncertainty)
    for name, values in (("doubt", doubt), ("uncertainty", uncertainty)):
        reject(values, (values < -1e-6) | (values > 1 + 1e-6), f"`{name}` must be in [0, 1]")
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

    Clips with equal uncertainty share their errors evenly. The curve is then the mean over all orders of these clips,
    and does not depend on the order of the rows.

    Args:
        uncertainty: float [N], higher = less certain.
        is_wrong: bool [N].
    Returns: Coverage k / N and risk, each float64 [N].
    Raises:
        ValueError: as in `error_detection_auroc`.
    """
    uncertainty, is_wrong = check_scores(uncertainty, is_wrong, "uncertainty", "is_wrong")
    _, group, size = np.unique(uncertainty, return_inverse=True, return_counts=True)
    errors_per_clip = np.bincount(group, weights=is_wrong) / size
    kept = np.arange(1, len(uncertainty) + 1)
    return kept / len(kept), np.cumsum(np.repeat(errors_per_clip, size)) / kept


def area_under_risk_coverage(uncertainty: Any, is_wrong: Any) -> float:
    """Mean risk over all coverages (AURC, Geifman et al. 2019); lower is better, 0 without wrong predictions.

    Uninformative uncertainty gives the error rate. Arguments and errors as in `risk_coverage_curve`.
    """
    return float(risk_coverage_curve(uncertainty, is_wrong)[1].mean())
