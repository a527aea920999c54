# SPDX-License-Identifier: Apache-2.0
"""How well clips that are none of the classes are told apart. Unknown is the positive class.

First the metrics of any score, then two scores of how unknown a clip is (`energy_score`, `knn_distance`). Every
function takes lists, numpy arrays or torch tensors and computes in float64 (see `metrics`).
"""

import warnings
from typing import Any

import numpy as np
import scipy.special
import sklearn.metrics
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from mmser.checks import (
    check_flags,
    check_floats,
    check_positive_integer,
    check_same_length,
    check_scores,
    check_temperature,
)
from mmser.metrics import rank_auroc


def auroc(scores: Any, is_unknown: Any) -> float:
    """Area under the ROC curve with *unknown as the positive class*; higher score = more unknown.

    It is the probability that a random unknown clip scores higher than a random known one, ties counting one half.

    Args:
        scores: float [N].
        is_unknown: bool [N].

    Returns: A value in [0, 1]; nan if there is no unknown or no known clip.
    Raises:
        ValueError: empty input, unequal lengths, non-finite score, flag other than 0 / 1.
    """
    return rank_auroc(scores, is_unknown, "scores", "is_unknown")


def roc_curve(scores: Any, is_unknown: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False positive rate, true positive rate and threshold [K], from (0, 0) to (1, 1); unknown = positive.

    A clip is flagged as unknown if score >= threshold, at every distinct score. Arguments and errors as in `auroc`;
    the rate of a group without clips is nan.
    """
    scores, is_unknown = check_scores(scores, is_unknown, "scores", "is_unknown")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)  # nan says it
        return sklearn.metrics.roc_curve(is_unknown, scores, drop_intermediate=False)


def fpr_at_95_tpr(scores: Any, is_unknown: Any) -> float:
    """Share of known clips flagged as unknown when at least 95 % of the unknown ones are caught.

    A clip is flagged if score >= t, where t is the highest observed score at which at least
    ceil(0.95 * number of unknown) unknown clips are flagged. Clips tied with t are all flagged: ties are never split
    in the method's favour.

    Args:
        scores: float [N], higher = more unknown.
        is_unknown: bool [N].

    Returns: A value in [0, 1], lower is better; nan if there is no unknown or no known clip.
    Raises:
        ValueError: as in `auroc`.
    """
    scores, is_unknown = check_scores(scores, is_unknown, "scores", "is_unknown")
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

    Returns: False positive rate, correct classification rate and threshold, from (0, 0) to (1, accuracy); the rate of
        a group without clips is nan.
    Raises:
        ValueError: no clip at all, unequal lengths, non-finite score, flag other than 0 / 1.
    """
    known_scores = check_floats(known_scores, "known_scores", allow_empty=True)
    known_correct = check_flags(known_correct, "known_correct", allow_empty=True)
    unknown_scores = check_floats(unknown_scores, "unknown_scores", allow_empty=True)
    check_same_length(known_scores=known_scores, known_correct=known_correct)
    if len(known_scores) + len(unknown_scores) == 0:
        raise ValueError("`known_scores` and `unknown_scores` are both empty; at least one example is needed.")
    thresholds = np.concatenate([[np.inf], np.unique(np.concatenate([known_scores, unknown_scores]))[::-1]])

    def share_at_or_above(scores: np.ndarray, count: int) -> np.ndarray:
        above = len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")
        return above / count if count else np.full(len(thresholds), np.nan)

    correct_rate = share_at_or_above(known_scores[known_correct], len(known_scores))
    return share_at_or_above(unknown_scores, len(unknown_scores)), correct_rate, thresholds


def oscr(known_scores: Any, known_correct: Any, unknown_scores: Any) -> float:
    """Area under `oscr_curve` by the trapezoid rule, so that a tie of a known and an unknown clip counts one half.

    It is the probability that a random known clip is classified correctly *and* scores higher than a random unknown
    clip: at most the closed-set accuracy. Errors as in `oscr_curve`.

    Args:
        known_scores: float [K], higher = more known.
        known_correct: bool [K], whether the known clip's emotion is right.
        unknown_scores: float [U].

    Returns:
        A number in [0, 1]; nan if there is no known or no unknown clip.
    """
    false_positive_rate, correct_rate, _ = oscr_curve(known_scores, known_correct, unknown_scores)
    return float(sklearn.metrics.auc(false_positive_rate, correct_rate))


def energy_score(logits: Any, temperature: float = 1.0) -> np.ndarray:
    """Energy of a clip (Liu et al. 2020, equation 4): -T log(sum(exp(logits / T))); higher = more unknown.

    Args:
        logits: float [N, C], as the network gives them: not divided by a fitted temperature.
        temperature: T, > 0.

    Returns: float64 [N].
    Raises:
        ValueError: non-finite logits, or a temperature that is not positive.
    """
    check_temperature(temperature)
    return -temperature * scipy.special.logsumexp(check_floats(logits, "logits", 2) / temperature, axis=1)


def knn_distance(train_features: Any, features: Any, k: int = 10) -> np.ndarray:
    """Distance to the k-th nearest training clip (Sun et al. 2022); higher = more unknown.

    As in the paper, each row is divided by its Euclidean norm, and nothing else is done to it. With fewer than `k`
    training clips it is the distance to the farthest of them.

    Args:
        train_features: float [M, D], of the training clips.
        features: float [N, D].
        k: which neighbour counts, at least 1.

    Returns: float64 [N], in [0, 2].
    Raises:
        ValueError: empty or non-finite features, unequal widths, or `k` < 1.
    """
    k = check_positive_integer(k, "k")
    train_features = check_floats(train_features, "train_features", 2)
    features = check_floats(features, "features", 2)
    if train_features.shape[1] != features.shape[1]:
        raise ValueError(
            f"`train_features` and `features` must have the same width, got {train_features.shape[1]} and "
            f"{features.shape[1]}."
        )
    # `normalize` leaves a row of zeros as it is
    neighbours = NearestNeighbors(n_neighbors=min(k, len(train_features)), algorithm="brute")
    return neighbours.fit(normalize(train_features)).kneighbors(normalize(features))[0][:, -1]
