# SPDX-License-Identifier: Apache-2.0
"""Whether a score means what it says: calibration error, temperature scaling, and the probability of an error.

Every function takes lists, numpy arrays or torch tensors and computes in float64 (see `metrics`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats

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

TEMPERATURE_BOUNDS = (0.05, 20.0)
PRIOR_CLIPS = (100.0, 30.0, 10.0, 3.0)  # strengths of the prior on the temperature that cross-validation chooses from
MODEST_PRIOR = max(PRIOR_CLIPS)  # with this one, scores become more modest on an average gain alone
NUM_FOLDS = 5  # of cross-validation
ONE_MINUS_MAX = (1.0, 0.0, 0.0)  # weights with which the probability of an error is 1 - max probability


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

    Naeini et al. 2015; Guo et al. 2017. Errors as in `reliability_bins`.

    Args:
        probabilities: float [N, C], each row a distribution.
        labels: int [N], true class ids.
        num_bins: bins of equal width over (0, 1].

    Returns:
        A number in [0, 1]; 0 is perfect.
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


def error_rate_interval(num_wrong: int, num_clips: int, level: float = 0.95) -> tuple[float, float]:
    """The error rates that `num_wrong` wrong answers to `num_clips` clips allow (Clopper & Pearson 1934).

    It says what the clips can show: with no error in 60 clips, up to 6 % of further answers may be wrong.

    Args:
        num_wrong: in [0, `num_clips`].
        num_clips: at least 1.
        level: coverage of the interval, in (0, 1).

    Returns: Lower and upper bound, in [0, 1].
    Raises:
        ValueError: a number out of its range.
    """
    if not 0 <= num_wrong <= check_positive_integer(num_clips, "num_clips"):
        raise ValueError(f"`num_wrong` must be from 0 to `num_clips`, got {num_wrong} of {num_clips}.")
    interval = scipy.stats.binomtest(int(num_wrong), num_clips).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)


def folds_by_group(num_clips: int, groups: Any = None) -> tuple[list[np.ndarray], np.ndarray]:
    """The rows of each cross-validation fold, and a group id [N]: a group (a speaker) is never in two folds."""
    if groups is None or len(set(groups)) < 2:  # one speaker cannot be divided
        ids = np.arange(num_clips)
    else:
        check_same_length(groups=np.asarray(groups), clips=np.arange(num_clips))
        ids = np.unique(np.asarray(groups), return_inverse=True)[1]
    number = ids.max() + 1
    fold_of_group = np.random.default_rng(0).permutation(number) % min(NUM_FOLDS, number)
    return [np.flatnonzero(fold_of_group[ids] == fold) for fold in range(min(NUM_FOLDS, number))], ids


def _surely_gained(gains: np.ndarray, groups: np.ndarray) -> float:
    """What the mean exceeds with 95 % confidence (Student's t): `gains` [N] of one of `groups` [N] go together."""
    number = groups.max() + 1
    sums = np.bincount(groups, weights=gains - gains.mean())
    error = math.sqrt((sums**2).sum() * number / (number - 1)) / len(gains)
    return float(gains.mean() - scipy.stats.t.ppf(0.95, number - 1) * error)


def fit_temperature(logits: Any, labels: Any, groups: Any = None, current: float = 1.0) -> float:
    """Temperature scaling (Guo et al. 2017, section 4.2), kept from what few clips or few errors suggest by chance.

    With no error among the clips the NLL falls without end as T does; with few it has its minimum far too low. So T
    minimises the NLL of smoothed targets (Platt 1999: n clips that are all right stand for an error rate of
    1 / (n + 2)) on the given clips and on some more, whose labels are distributed as the scores at T = 1 say. How many
    more is chosen by cross-validation, over whole groups. T stays `current` unless the cross-validated NLL falls: for
    a lower T with 95 % confidence, even if one more clip, with a wrong answer, is counted; for a higher one on
    average, with the strongest prior. Scores that are too modest cost little, those that are too sure without bound.

    Args:
        logits: float [N, C], not from training clips.
        labels: int [N] true class indices in [0, C - 1].
        groups: N speakers, or None if they are not known: clips of one speaker are alike.
        current: the temperature so far, > 0.

    Returns: T in [0.05, 20]; divide the logits by it.
    Raises:
        ValueError: as in `negative_log_likelihood`.
    """
    check_temperature(current)
    logits, labels = _check_logits(logits, labels)
    folds, groups = folds_by_group(len(labels), groups)
    if len(folds) < 2:
        return current
    grid = np.geomspace(*TEMPERATURE_BOUNDS, 81)
    losses = np.stack([_loss_parts(logits, labels, temperature) for temperature in grid])  # [grid, 3, N]
    before = _loss_parts(logits, labels, current)
    surest, strength = 0.0, None
    for candidate in PRIOR_CLIPS:
        after = np.empty((3, len(labels)))
        for fold in folds:
            others = np.setdiff1d(np.arange(len(labels)), fold)
            best = np.argmin(_prior_loss(np.take(losses, others, axis=2), candidate))
            after[:, fold] = losses[best][:, fold]
        gains, if_wrong, _ = before - after
        ids = groups
        if if_wrong.mean() < 0:
            gains, ids = np.append(gains, if_wrong.mean()), np.append(groups, groups.max() + 1)
        is_softer = grid[np.argmin(_prior_loss(losses, candidate))] > current
        surely = gains.mean() if is_softer and candidate == MODEST_PRIOR else _surely_gained(gains, ids)
        if surely > surest:
            surest, strength = surely, candidate
    if strength is None:
        return current
    search = scipy.optimize.minimize_scalar(
        lambda log_temperature: float(_prior_loss(_loss_parts(logits, labels, math.exp(log_temperature)), strength)),
        bounds=tuple(map(math.log, TEMPERATURE_BOUNDS)),
        method="bounded",
    )
    return math.exp(search.x)


def _loss_parts(logits: np.ndarray, labels: np.ndarray, temperature: float) -> np.ndarray:
    """[3, N]: the NLL of the true class, its mean over the others, and its mean over labels as the scores at T = 1."""
    losses = -scipy.special.log_softmax(logits / temperature, axis=1)
    true = losses[np.arange(len(labels)), labels]
    others = (losses.sum(axis=1) - true) / max(losses.shape[1] - 1, 1)
    return np.stack([true, others, (scipy.special.softmax(logits, axis=1) * losses).sum(axis=1)])


def _prior_loss(parts: np.ndarray, strength: float) -> np.ndarray:
    """What `fit_temperature` minimises, of `_loss_parts` [..., 3, N]: convex in 1 / T, so there is one minimum."""
    number = parts.shape[-1]
    true, others, prior = np.moveaxis(parts.sum(axis=-1), -1, 0)
    return (number + 1) / (number + 2) * true + others / (number + 2) + strength / number * prior


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


def doubt_log_odds(logits: Any) -> np.ndarray:
    """Log-odds [N] of 1 - max softmax(logits) [N, C]: exact also where that probability rounds to 0."""
    ordered = np.sort(check_floats(logits, "logits", num_dimensions=2), axis=1)
    return scipy.special.logsumexp(ordered[:, :-1], axis=1) - ordered[:, -1]


def error_log_odds(doubt: Any, uncertainty: Any, weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Log-odds of an error [N]: weights[0] doubt + weights[1] logit(uncertainty) + weights[2].

    Args:
        doubt: float [N], of `doubt_log_odds`.
        uncertainty: float [N], of the uncertainty head, in [0, 1].
        weights: three numbers, as `fit_error_probability` gives them.
    """
    doubt, uncertainty = check_floats(doubt, "doubt"), check_floats(uncertainty, "uncertainty")
    head = scipy.special.logit(np.clip(uncertainty, 1e-6, 1 - 1e-6))
    return weights[0] * doubt + weights[1] * head + weights[2]


def fit_error_probability(
    doubt: Any,
    uncertainty: Any,
    is_wrong: Any,
    groups: Any = None,
    current: Sequence[float] | np.ndarray = ONE_MINUS_MAX,
) -> np.ndarray:
    """Logistic regression of "the prediction is wrong" on the log-odds of two scores (Platt 1999 uses one).

    A unit Gaussian prior keeps the weights near those of 1 - max probability, which needs no fit; the weight of the
    head is at least 0. The weights stay `current` unless the cross-validated log-loss falls with 95 % confidence. The
    head has a part only if it falls further with it, and errors are told apart no worse than by 1 - max probability.

    Args:
        doubt: float [N], of `doubt_log_odds`, of held-out clips.
        uncertainty: float [N], of the uncertainty head, in [0, 1].
        is_wrong: bool [N].
        groups: N speakers, or None if they are not known.
        current: the weights so far.

    Returns: Weights of the two log-odds and the constant, float64 [3]; see `error_log_odds`.
    Raises:
        ValueError: unequal lengths, or an uncertainty outside [0, 1].
    """
    doubt, is_wrong = check_scores(doubt, is_wrong, "doubt", "is_wrong")
    uncertainty = check_floats(uncertainty, "uncertainty")
    check_same_length(doubt=doubt, uncertainty=uncertainty)
    reject(uncertainty, (uncertainty < -1e-6) | (uncertainty > 1 + 1e-6), "`uncertainty` must be in [0, 1]")
    current = np.asarray(current, dtype=np.float64)
    folds, groups = folds_by_group(len(doubt), groups)
    if is_wrong.all() or not is_wrong.any() or len(folds) < 2:
        return current
    columns = np.stack([error_log_odds(doubt, uncertainty, row) for row in np.eye(3)], axis=1)  # [N, 3]
    sign = np.where(is_wrong, 1.0, -1.0)
    rivals, best = [columns @ current], current
    for with_head in (False, True):
        log_odds = np.empty(len(doubt))
        for fold in folds:
            others = np.setdiff1d(np.arange(len(doubt)), fold)
            log_odds[fold] = columns[fold] @ _error_weights(columns[others], sign[others], with_head)
        losses = [np.logaddexp(0, -sign * values) for values in (*rivals, log_odds)]
        is_better = all(_surely_gained(rival - losses[-1], groups) > 0 for rival in losses[:-1])
        if with_head and error_detection_auroc(log_odds, is_wrong) < error_detection_auroc(doubt, is_wrong):
            is_better = False
        if is_better:
            best = _error_weights(columns, sign, with_head)
        rivals.append(log_odds)
    return best


def _error_weights(columns: np.ndarray, sign: np.ndarray, with_head: bool) -> np.ndarray:
    """The weights [3] of `fit_error_probability` for `columns` [N, 3]; without the head its weight is 0."""

    def loss(weights):
        margin, off = sign * (columns @ weights), weights - ONE_MINUS_MAX
        gradient = -(sign * scipy.special.expit(-margin)) @ columns + off
        return np.logaddexp(0, -margin).sum() + (off**2).sum() / 2, gradient

    # Without any weight of the doubt, answers that differ in it would tie
    bounds = [(0.1, None), (0, None if with_head else 0), (None, None)]
    return scipy.optimize.minimize(loss, np.array(ONE_MINUS_MAX), jac=True, bounds=bounds, method="L-BFGS-B").x


def describe_fit(report: Mapping[str, Any]) -> str:
    """What `MMSERTrainer.calibrate` fitted, and what its clips can show, in words."""
    low, high = (100 * rate for rate in report["error_rate_interval"])
    speakers = "unknown speakers" if report["speakers"] is None else f"{report['speakers']} speaker(s)"
    lines = [
        f"Calibrated on {report['clips']} held-out clips of {speakers} with {report['errors']} error(s): as far as "
        f"they can show, {low:.1f} to {high:.1f} % of the answers are wrong, and scores may be off by as much.",
        f"The temperature is {report['temperature']:.3g}."
        if report["temperature"] != 1
        else "The temperature stays 1: these clips do not show that another is better.",
    ]
    if report["speakers"] is not None:
        lines.append(
            "Prediction sets are made for new speakers up to a coverage of "
            f"{report['largest_set_coverage']:.0%}, above that for these."
        )
    if report["uses_one_minus_max"]:
        lines.append("The uncertainty is 1 - the largest score: these clips do not show that another is better.")
    return " ".join(lines)


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
