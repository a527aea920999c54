# SPDX-License-Identifier: Apache-2.0
"""Properties of the judgement: OpenMax, losses, pooling, calibration and open-set metrics on data drawn by hypothesis.

Every reference is derived here from the paper's formula (plain loops in float64, exact fractions, scipy's generic
likelihood fit); data with ties, missing classes, one clip or extreme values are drawn on purpose. Examples by hand
are in `test_losses.py`, `test_modeling.py` and `test_metrics.py`.
"""

import itertools
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import fmin
from scipy.stats import rv_continuous, weibull_min
from tiny import randomize, tiny_batch, tiny_config, tiny_model

from losses_mmser import (
    class_balanced_focal_loss,
    class_balanced_weights,
    clustering_loss,
    distillation_loss,
    prototype_loss,
    uncertainty_loss,
)
from mmser.calibration import (
    PRIOR_CLIPS,
    area_under_risk_coverage,
    error_detection_auroc,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability_bins,
    risk_coverage_curve,
)
from mmser.groups import grouped_metrics
from mmser.metrics import compute_classification_metrics, confusion_matrix, softmax
from mmser.open_set import auroc, fpr_at_95_tpr, oscr, oscr_curve, roc_curve
from modeling_mmser import (
    AttentiveStatsPooling,
    ClassAnchorClustering,
    DeepClassifier,
    PrototypeMemory,
    UncertaintyHead,
)
from openmax_mmser import OpenMax

# The same examples in every run; drawing may be slow on a loaded machine
properties = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
SEEDS = st.integers(0, 2**32 - 1)
PARAMETERS = ("shape", "scale", "shift")
MARKS = {"activation": 1.0, "probability": 3.0}  # what `fitted` holds, by level


def matrix(draw, elements, num_rows, num_columns):
    """A list of rows; hypothesis likes to repeat values, so that ties are common."""
    row = st.lists(elements, min_size=num_columns, max_size=num_columns)
    return draw(st.lists(row, min_size=num_rows, max_size=num_rows))


@st.composite
def labelled_rows(draw, elements, min_size=1, max_size=12):
    """Rows of one value per class [N, C] and their labels [N]; usually some class has no row."""
    num_rows, num_labels = draw(st.integers(min_size, max_size)), draw(st.integers(2, 5))
    labels = draw(st.lists(st.integers(0, num_labels - 1), min_size=num_rows, max_size=num_rows))
    return matrix(draw, elements, num_rows, num_labels), labels


def slow_softmax(row):
    exponentials = [math.exp(x - max(row)) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def log_softmax(row):
    log_sum = max(row) + math.log(sum(math.exp(x - max(row)) for x in row))
    return [x - log_sum for x in row]


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


# --- OpenMax: the Weibull fit ----------------------------------------------------------------------------------------


def draw_tail(rng, family, size, spread):
    """Distances between 0 and `spread` in one of several shapes."""
    values = {
        "uniform": lambda: rng.random(size),
        "gamma": lambda: rng.gamma(2, 1, size),
        "bounded": lambda: -rng.gamma(0.5, 1, size),
        "outlier": lambda: np.append(0.1 * rng.random(size - 1), 1),
        "tied": lambda: np.append(rng.integers(0, 4, size - 1), 4),
    }[family]()
    return spread * (values - values.min()) / np.ptp(values)


def moved_tail(distances, labels, predictions, tail_size, label):
    own = sorted(d[label] for d, y, p in zip(distances, labels, predictions, strict=True) if y == label == p)
    return [float(d - own[-tail_size:][0]) + 1 for d in own[-tail_size:]]


@st.composite
def fitting_data(draw):
    """Distances, labels, predictions and tail size of two classes of correct clips, with wrong ones among them."""
    rng = np.random.default_rng(draw(SEEDS))
    sizes = draw(st.lists(st.integers(5, 40), min_size=2, max_size=2))
    labels = np.repeat([0, 1], sizes)
    distances = rng.uniform(0, 2, (len(labels), 2))
    for label, size in enumerate(sizes):
        family = draw(st.sampled_from(["uniform", "gamma", "bounded", "outlier", "tied"]))
        spread, nearest = 10 ** draw(st.floats(-2, 0.5)), draw(st.floats(0, 1))
        distances[labels == label, label] = nearest + draw_tail(rng, family, size, spread)
    wrong = rng.integers(0, 2, draw(st.integers(0, 8)))
    distances = np.concatenate([distances, rng.uniform(0, 9, (len(wrong), 2))])
    labels, predictions = np.append(labels, wrong), np.append(labels, 1 - wrong)
    order = rng.permutation(len(labels))
    data = distances[order], labels[order], predictions[order], draw(st.integers(5, 45))
    # Tighter tails have shapes above 1000, whose digits float32 parameters do not hold
    assume(all(max(moved_tail(*data, label)) > 1.003 for label in (0, 1)))
    return data


def fit(distances, labels, predictions, tail_size=20):
    openmax = OpenMax(np.shape(distances)[1], alpha=2)
    openmax.fit(distances, labels, predictions, tail_size)
    return openmax


def parameters(openmax):
    """Shape, scale and shift [3, C] in float64."""
    return np.array([openmax.get_buffer(f"weibull_{name}").tolist() for name in PARAMETERS])


def scipy_fit(tail):
    """The generic likelihood search of scipy's base class, stopped only when the parameters stand still."""

    def search(function, start, args=(), disp=0):
        return fmin(function, start, args=args, disp=disp, xtol=1e-9, ftol=1e-12, maxiter=4000, maxfun=4000)

    start = 1.3 / np.std(np.log(tail))
    shape, _, scale = rv_continuous.fit(weibull_min, tail, start, floc=0, scale=np.mean(tail), optimizer=search)
    return shape, scale


def log_likelihood(tail, shape, scale):
    return math.fsum(math.log(shape / scale) + (shape - 1) * math.log(x / scale) - (x / scale) ** shape for x in tail)


@settings(properties, max_examples=40)
@given(fitting_data())
def test_weibull_fit_is_the_maximum_likelihood(data):
    *clips, tail_size = data
    openmax = fit(*clips, tail_size)
    for label, (shape, scale, shift) in enumerate(parameters(openmax).T):
        tail = moved_tail(*clips, tail_size, label)
        assert shift == pytest.approx(sorted(clips[0][(clips[1] == label) & (clips[2] == label), label])[-len(tail)])
        assert (shape, scale) == pytest.approx(scipy_fit(tail), rel=1e-4)
        # The likelihood equations: both derivatives vanish, here as the parameter that each of them asks for
        powers = [x**shape for x in tail]
        weighted = math.fsum(p * math.log(x) for p, x in zip(powers, tail, strict=True)) / math.fsum(powers)
        assert 1 / (weighted - mean(math.log(x) for x in tail)) == pytest.approx(shape, rel=1e-4)
        assert mean(powers) ** (1 / shape) == pytest.approx(scale, rel=1e-4)
        best = log_likelihood(tail, shape, scale)
        for factor in (0.99, 0.999, 1.001, 1.01):
            assert log_likelihood(tail, shape * factor, scale) < best
            assert log_likelihood(tail, shape, scale * factor) < best
            assert log_likelihood(tail, shape * factor, scale / factor) < best


@pytest.mark.parametrize(
    "distances",
    [
        [0.24, 0.11, 0.11, 0.06, 0.04, 0.06],
        np.random.default_rng(18).gamma(2, 0.05, 20).tolist(),  # a shape of 0.64 in place of 14.18
    ],
    ids=["six", "twenty"],
)
def test_weibull_fit_does_not_stop_early(distances):
    """As the simplex search of scipy's own `weibull_min.fit` does on these tails."""
    labels = np.repeat([0, 1], len(distances))
    openmax = fit(np.tile(distances, (2, 2)).T, labels, labels)
    tail = [d - min(distances) + 1 for d in distances]
    for label in (0, 1):
        assert parameters(openmax)[:2, label] == pytest.approx(scipy_fit(tail), rel=1e-4)


@properties
@given(fitting_data(), SEEDS)
def test_weibull_fit_sees_only_the_tails(data, seed):
    """Not the order of the clips, the wrong ones, the distances to other anchors, or how near the nearest ones are."""
    (distances, labels, predictions, tail_size), rng = data, np.random.default_rng(seed)
    expected = parameters(fit(distances, labels, predictions, tail_size))
    changed = rng.uniform(0, 20, distances.shape)
    for label in (0, 1):
        correct = np.flatnonzero((labels == label) & (predictions == label))
        by_distance = correct[np.argsort(distances[correct, label])]
        changed[correct, label] = distances[correct, label]
        changed[by_distance[:-tail_size], label] *= rng.random(max(len(correct) - tail_size, 0))
    order = rng.permutation(len(labels))
    actual = parameters(fit(changed[order], labels[order], predictions[order], tail_size))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@properties
@given(fitting_data(), st.floats(-0.5, 3))
def test_weibull_fit_follows_a_shift_and_the_order_of_the_classes(data, constant):
    distances, labels, predictions, tail_size = data
    expected = parameters(fit(distances, labels, predictions, tail_size))
    moved = parameters(fit(distances + constant, labels, predictions, tail_size))
    np.testing.assert_allclose(moved[:2], expected[:2], rtol=1e-4)
    np.testing.assert_allclose(moved[2], expected[2] + constant, atol=1e-6)
    swapped = parameters(fit(np.flip(distances, axis=1).copy(), 1 - labels, 1 - predictions, tail_size))
    np.testing.assert_allclose(swapped, expected[:, ::-1], rtol=1e-6)


@st.composite
def any_data(draw):
    """Up to 40 clips of three classes with few distinct distances: some class is often missing, tied or all wrong."""
    num_clips = draw(st.sampled_from([0, 1, 4, 5, 12, 25, 40]))
    grid = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]) if draw(st.booleans()) else st.just(0.5)
    classes = st.sampled_from(draw(st.sampled_from([(0,), (1, 2), (0, 1, 2), (0, 0, 0, 2)])))
    column = {"min_size": num_clips, "max_size": num_clips}
    labels, guesses = draw(st.lists(classes, **column)), draw(st.lists(classes, **column))
    right = draw(st.sampled_from([0.0, 0.5, 1.0]))
    predictions = [y if i < right * num_clips else g for i, (y, g) in enumerate(zip(labels, guesses, strict=True))]
    distances = np.array(matrix(draw, grid, num_clips, 3)).reshape(num_clips, 3)
    return distances, np.array(labels, dtype=np.int64), np.array(predictions, dtype=np.int64)


@properties
@given(any_data(), st.integers(5, 30))
def test_any_data_set_gives_a_fit_or_one_error(data, tail_size):
    distances, labels, predictions = data
    correct = labels == predictions
    own = distances[np.arange(len(labels)), labels]

    def has_fit(members):
        tail = sorted(own[members])[-tail_size:]
        return len(tail) >= 5 and tail[0] < tail[-1]

    openmax = OpenMax(3, alpha=2)
    if not has_fit(correct) and not all(has_fit(correct & (labels == label)) for label in range(3)):
        with pytest.raises(ValueError, match="at least 5 correctly classified clips with different distances"):
            openmax.fit(distances, labels, predictions, tail_size)
        assert not openmax.is_fitted and (parameters(openmax) == 1).all()
        return
    openmax.fit(distances, labels, predictions, tail_size)
    shape, scale, shift = parameters(openmax)
    assert openmax.is_fitted and np.isfinite(shape).all() and (shape > 0).all() and (scale > 0).all()
    assert ((shift >= 0) & (shift <= 2)).all()
    cdf = openmax.cdf(torch.linspace(0, 6, 40)[:, None].expand(40, 3))
    assert (cdf.diff(dim=0) >= 0).all() and (cdf >= 0).all() and (cdf[-1] > 0.9).all()
    assert openmax(torch.linspace(-3, 3, 12).view(4, 3), torch.linspace(0, 2, 12).view(4, 3)).isfinite().all()


@properties
@given(fitting_data(), st.sampled_from([math.nan, math.inf, -math.inf]), st.data())
def test_one_bad_distance_is_refused(data, bad, choice):
    distances, labels, predictions, tail_size = data
    row, column = choice.draw(st.integers(0, len(labels) - 1)), choice.draw(st.integers(0, 1))
    distances[row, column] = bad
    with pytest.raises(ValueError, match=r"`distances`.*not finite"):
        fit(distances, labels, predictions, tail_size)


# --- OpenMax: the probabilities --------------------------------------------------------------------------------------


def grid(low, high, steps):
    """Multiples of 1 / `steps`: sums of a few of them are exact in float32, so that ties are real and none is made."""
    return st.integers(low * steps, high * steps).map(lambda x: x / steps)


MODERATE = {"shape": st.floats(0.25, 8, width=32), "scale": st.floats(0.5, 3, width=32), "shift": grid(0, 2, 1024)}
EXTREME = {"shape": st.floats(0.0625, 1e4, width=32), "scale": st.floats(2**-9, 1e3, width=32), "shift": grid(0, 2, 8)}


@st.composite
def openmax_inputs(draw, ranges, logits, distances, max_rows=5, levels=tuple(MARKS)):
    """A fitted OpenMax of 2 to 6 classes with parameters in `ranges`, any alpha, and logits and distances for it."""
    num_labels, num_rows = draw(st.integers(2, 6)), draw(st.integers(1, max_rows))
    openmax = OpenMax(num_labels, alpha=draw(st.integers(1, 7)), level=draw(st.sampled_from(levels)))
    for name in PARAMETERS:
        values = st.lists(ranges[name], min_size=num_labels, max_size=num_labels)
        openmax.get_buffer(f"weibull_{name}").copy_(torch.tensor(draw(values)))
    openmax.fitted.fill_(MARKS[openmax.level])
    rows = [matrix(draw, elements, num_rows, num_labels) for elements in (logits, distances)]
    return openmax, *(torch.tensor(values, dtype=torch.float32) for values in rows)


moderate_inputs = openmax_inputs(MODERATE, grid(-4, 4, 64), grid(0, 2, 1024))
EXTREME_VALUES = st.floats(-1e4, 1e4, width=32), st.floats(0, 1e6, width=32)
extreme_inputs = openmax_inputs(EXTREME, *EXTREME_VALUES)
any_inputs = st.one_of(moderate_inputs, extreme_inputs)
any_of_probabilities = st.one_of(
    openmax_inputs(MODERATE, grid(-4, 4, 64), grid(0, 2, 1024), levels=("probability",)),
    openmax_inputs(EXTREME, *EXTREME_VALUES, levels=("probability",)),
)


def loop_openmax(openmax, logits, distances):
    """
    Bendale & Boult 2016, algorithm 2 with omega_r = (alpha + 1 - r) / alpha, on v - min(v); or, at the level of
    probabilities, P_c (1 - w_c) and the sum of P_c w_c.
    """
    weibulls = parameters(openmax).T
    probabilities = []
    for row, distance in zip(logits.tolist(), distances.tolist(), strict=True):
        if openmax.level == "probability":
            shares = [
                weibull_min.cdf(d, k, loc=t - 1, scale=s) for d, (k, s, t) in zip(distance, weibulls, strict=True)
            ]
            taken = [p * w for p, w in zip(slow_softmax(row), shares, strict=True)]
            left = [p * (1 - w) for p, w in zip(slow_softmax(row), shares, strict=True)]
            probabilities.append([*left, math.fsum(taken)])
            continue
        revised, unknown = [x - min(row) for x in row], 0.0
        by_activation = sorted(range(len(row)), key=lambda label, row=row: (-row[label], label))
        for r, label in enumerate(by_activation[: openmax.alpha], start=1):
            shape, scale, shift = weibulls[label]
            w = weibull_min.cdf(distance[label], shape, loc=shift - 1, scale=scale)
            omega = (openmax.alpha + 1 - r) / openmax.alpha
            unknown += revised[label] * omega * w
            revised[label] -= revised[label] * omega * w
        probabilities.append(slow_softmax([*revised, unknown]))
    return np.array(probabilities)


@properties
@given(moderate_inputs)
def test_openmax_equals_the_algorithm(inputs):
    openmax, logits, distances = inputs
    expected = loop_openmax(*inputs)
    np.testing.assert_allclose(openmax(logits, distances).numpy(), expected, rtol=0, atol=1e-6)


@properties
@given(moderate_inputs)
def test_weibull_cdf_is_that_of_scipy(inputs):
    openmax, _, distances = inputs
    shape, scale, shift = parameters(openmax)
    for values in (distances, distances - 1, openmax.weibull_shift - 1 + 0 * distances):  # below and at the support
        expected = weibull_min.cdf(values.double().numpy(), shape, loc=shift - 1, scale=scale)
        np.testing.assert_allclose(openmax.cdf(values).numpy(), expected, rtol=0, atol=1e-6)


@properties
@given(any_inputs, SEEDS)
def test_openmax_rows_are_probabilities_and_do_not_see_each_other(inputs, seed):
    openmax, logits, distances = inputs
    probabilities = openmax(logits, distances)
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(len(logits)), rtol=0, atol=1e-6)
    rows = torch.from_numpy(np.random.default_rng(seed).integers(0, len(logits), 2 * len(logits)))
    torch.testing.assert_close(openmax(logits[rows], distances[rows]), probabilities[rows], rtol=0, atol=1e-6)
    scores = openmax.rejection_scores(logits, distances)
    torch.testing.assert_close(openmax.rejection_scores(logits[rows], distances[rows]), scores[rows])


def test_rounding_makes_no_probability_larger_than_one():
    """The probabilities of these five logits add up to 1.0000001 in float32, and all of them is taken."""
    openmax = OpenMax(5, alpha=3, level="probability")
    openmax.fitted.fill_(MARKS[openmax.level])
    probabilities = openmax(torch.tensor([[0.0, 0.0, 2.0, 1.9375, -14.0]]), torch.full((1, 5), 1e6))
    assert 0.999999 < probabilities[0, -1] <= 1


@properties
@given(any_inputs, st.data())
def test_a_longer_distance_makes_unknown_likelier_and_the_own_class_less_likely(inputs, choice):
    openmax, logits, distances = inputs
    label = choice.draw(st.integers(0, logits.shape[1] - 1))
    step = choice.draw(st.sampled_from([1e-6, 1e-3, 0.1, 1, 100, 1e6]))
    further = distances.clone()
    further[:, label] += step
    near, far = openmax(logits, distances), openmax(logits, further)
    tolerance = 1e-6 + 1e-7 * float(logits.max() - logits.min())  # float32 logits
    assert (far[:, -1] >= near[:, -1] - tolerance).all()
    assert (far[:, label] <= near[:, label] + tolerance).all()
    assert (openmax.cdf(further) >= openmax.cdf(distances) - 1e-6).all()


@properties
@given(moderate_inputs, SEEDS)
def test_openmax_follows_the_order_of_the_classes(inputs, seed):
    openmax, logits, distances = inputs
    assume(all(len(set(row)) == len(row) for row in logits.tolist()))  # tied classes rank by their index
    order = torch.from_numpy(np.random.default_rng(seed).permutation(logits.shape[1]))
    expected = openmax(logits, distances)[:, [*order, -1]]
    for name in PARAMETERS:
        buffer = openmax.get_buffer(f"weibull_{name}")
        buffer.copy_(buffer[order])
    torch.testing.assert_close(openmax(logits[:, order], distances[:, order]), expected, rtol=0, atol=1e-6)


# --- OpenMax: the score of rejection ---------------------------------------------------------------------------------


def log_survival(openmax, logits, distances):
    """log(P_c (1 - w_c)) [N][C] by the Weibull's log survival function in scipy, which does not underflow."""
    rows = []
    for row, distance in zip(logits.tolist(), distances.tolist(), strict=True):
        weibulls = zip(log_softmax(row), distance, parameters(openmax).T, strict=True)
        rows.append([p + weibull_min.logsf(d, k, loc=t - 1, scale=s) for p, d, (k, s, t) in weibulls])
    return rows


@properties
@given(openmax_inputs(MODERATE, grid(-4, 4, 64), grid(0, 40, 64), levels=("probability",)))
def test_the_score_is_the_least_that_speaks_against_a_class(inputs):
    """-log P_c and the Weibull's cumulative hazard together, also where exp(-score) is 0 in any float."""
    openmax, logits, distances = inputs
    expected = [-max(row) for row in log_survival(*inputs)]
    # Up to 1e30, as float32 says it with an error of up to `shape * log(...)` units in the last place
    expected = np.minimum(expected, math.exp(69))
    np.testing.assert_allclose(openmax.rejection_scores(logits, distances).numpy(), expected, rtol=5e-5, atol=1e-5)


@properties
@given(any_inputs)
def test_the_score_is_finite_and_says_what_the_probabilities_say_where_they_can(inputs):
    openmax, logits, distances = inputs
    scores, left = openmax.rejection_scores(logits, distances), openmax(logits, distances)[:, :-1].amax(dim=1)
    assert scores.isfinite().all() and (scores >= -1e-6).all() and (scores <= 1.1e30).all()
    held = left > 1e-30
    torch.testing.assert_close(scores[held], -left[held].double().log().float(), rtol=1e-5, atol=1e-5)
    assert (scores[~held] > 69).all()  # -log(1e-30)


@properties
@given(any_of_probabilities, st.data())
def test_a_longer_distance_never_lowers_the_score(inputs, choice):
    """To any one class and to all; the published form does not promise this."""
    openmax, logits, distances = inputs
    num_labels = logits.shape[1]
    step = choice.draw(st.sampled_from([1e-6, 1e-3, 0.1, 1, 100, 1e6]))
    before = openmax.rejection_scores(logits, distances)
    for moved in (*torch.eye(num_labels), torch.ones(num_labels)):
        after = openmax.rejection_scores(logits, distances + step * moved)
        assert (after >= before - 1e-6 - 1e-6 * before).all()


@properties
@given(SEEDS, st.floats(1, 20), st.floats(0.5, 2))
def test_the_score_keeps_the_order_where_no_probability_is_left(seed, shape, scale):
    """Ever farther clips, from where float32 still has a probability to where float64 has none, all in order."""
    openmax = OpenMax(3, alpha=3, level="probability")
    for name, value in zip(PARAMETERS, (shape, scale, 0.5), strict=True):
        openmax.get_buffer(f"weibull_{name}").fill_(value)
    openmax.fitted.fill_(MARKS["probability"])
    hazards = torch.logspace(0, 29, 30, dtype=torch.float64)
    distances = (scale * hazards ** (1 / shape) - 0.5).float()[:, None].expand(30, 3)
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0, 3, (1, 3))).float().expand(30, 3)
    probabilities, scores = openmax(logits, distances), openmax.rejection_scores(logits, distances)
    assert (probabilities[-10:, :-1] == 0).all()
    torch.testing.assert_close(probabilities[-10:, -1], torch.ones(10), rtol=0, atol=1e-6)
    assert (scores.diff() > 0).all()
    own = -log_softmax(logits[0].tolist())[int(logits[0].argmax())]
    np.testing.assert_allclose(scores, own + hazards.numpy(), rtol=1e-3)


# --- Losses ----------------------------------------------------------------------------------------------------------

LOGIT = st.floats(-30, 30, width=32)


@properties
@given(
    st.lists(st.one_of(st.just(0), st.integers(1, 50), st.integers(1, 10**6)), min_size=1, max_size=7),
    st.one_of(st.sampled_from([0.0, 0.9, 0.999, 0.9999]), st.floats(0, 1 - 1e-8)),
    SEEDS,
)
def test_class_balanced_weights_equal_the_formula(counts, beta, seed):
    """Cui et al. 2019, eq. 2, in 60 decimal digits; any share of the classes may be missing."""
    assume(any(counts))
    weights = class_balanced_weights(counts, beta)
    with localcontext() as context:
        context.prec = 60
        exact = Decimal(beta)
        expected = [(1 - exact) / (1 - exact**count) if count else Decimal(0) for count in counts]
        expected = [float(weight * len(counts) / sum(expected)) for weight in expected]
    assert weights == pytest.approx(expected, rel=1e-6)
    assert sum(weights) == pytest.approx(len(counts), rel=1e-12)
    present = sorted((count, -weight) for count, weight in zip(counts, weights, strict=True) if count)
    assert all(b >= a * (1 + 1e-12) for (_, a), (_, b) in itertools.pairwise(present))  # rarer weighs more
    order = np.random.default_rng(seed).permutation(len(counts)).tolist()
    assert class_balanced_weights([counts[i] for i in order], beta) == pytest.approx([weights[i] for i in order])


@properties
@given(labelled_rows(LOGIT), st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(0, 5)), st.data())
def test_focal_loss_equals_the_formula(rows, gamma, choice):
    """Lin et al. 2017, eq. 5, weighted by class; weights of 0 (a class without clips) included."""
    logits, labels = rows
    weights = choice.draw(st.lists(st.floats(0, 4, width=32), min_size=len(logits[0]), max_size=len(logits[0])))
    terms = []
    for row, label in zip(logits, labels, strict=True):
        wrong = math.fsum(p for other, p in enumerate(slow_softmax(row)) if other != label)
        terms.append(-weights[label] * wrong**gamma * log_softmax(row)[label])
    loss = class_balanced_focal_loss(torch.tensor(logits), torch.tensor(labels), torch.tensor(weights), gamma)
    assert loss.item() == pytest.approx(mean(terms), rel=2e-6, abs=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits, values, labels: class_balanced_focal_loss(logits, labels, torch.arange(8.0), 2.0),
        clustering_loss,
        lambda logits, values, labels: uncertainty_loss(values[:, :1], logits, labels, 1.5),
        lambda logits, values, labels: prototype_loss(logits, labels),
        lambda logits, values, labels: distillation_loss(logits, 9 * values, 3.0),
    ],
    ids=["focal", "clustering", "uncertainty", "prototype", "distillation"],
)
@settings(properties, max_examples=30)
@given(rows=labelled_rows(LOGIT), seed=SEEDS)
def test_loss_of_a_batch_is_the_mean_over_its_clips(loss, rows, seed):
    """Whatever classes it holds and in whatever order: no clip's share depends on the others."""
    logits, labels = (torch.tensor(values) for values in rows)
    values = torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed))
    single = [loss(logits[i : i + 1], values[i : i + 1], labels[i : i + 1]).item() for i in range(len(labels))]
    assert loss(logits, values, labels).item() == pytest.approx(mean(single), rel=2e-6, abs=1e-6)


@pytest.fixture(scope="module")
def model():
    return tiny_model(class_counts=[9, 50, 1000, 7])  # which must not weigh the cross-entropy


@pytest.fixture(scope="module")
def batch(model):
    return tiny_batch(model, [400] * 5, [2] * 5)


@settings(properties, max_examples=30)
@given(
    labels=st.lists(st.integers(0, 3), min_size=5, max_size=5),
    smoothing=st.one_of(st.sampled_from([0.0, 0.1]), st.floats(0, 0.9)),
    bias=st.lists(st.floats(-20, 20, width=32), min_size=4, max_size=4),
)
@torch.no_grad()
def test_label_smoothing_equals_the_formula(model, batch, labels, smoothing, bias):
    """Szegedy et al. 2016, section 7: the target is (1 - e) on the own class plus e / C on every class."""
    model.config.label_smoothing = smoothing
    model.classifier.output.bias.copy_(torch.tensor(bias))
    outputs = model(**batch, labels=torch.tensor(labels))
    terms = []
    for row, label in zip(outputs.logits.tolist(), labels, strict=True):
        target = [(1 - smoothing) * (other == label) + smoothing / 4 for other in range(4)]
        terms.append(-math.fsum(q * log_p for q, log_p in zip(target, log_softmax(row), strict=True)))
    assert outputs.losses["cross_entropy"].item() == pytest.approx(mean(terms), rel=1e-6, abs=1e-6)


# --- Blocks: pooling and the heads -----------------------------------------------------------------------------------


@st.composite
def pooling_inputs(draw):
    """A pooling, states [B, T, D] and a mask with holes; the attention goes from even to a single frame."""
    batch_size, length, size = draw(st.integers(1, 4)), draw(st.integers(1, 7)), draw(st.integers(1, 4))
    torch.manual_seed(draw(SEEDS))
    pooling = randomize(AttentiveStatsPooling(size, 5))
    pooling.score.weight.data.mul_(draw(st.sampled_from([0.0, 0.3, 1.0, 3.0])))
    states = torch.randn(batch_size, length, size) * draw(st.sampled_from([0.01, 1.0, 3.0]))
    if draw(st.booleans()):
        states = states.round()  # frames that are alike
    mask = matrix(draw, st.booleans(), batch_size, length)
    return pooling, states + draw(st.sampled_from([0.0, 2.0])), torch.tensor(mask)


def loop_pooling(pooling, states):
    """Okabe et al. 2018, eqs. 3-6 on valid frames [T, D]: weighted mean and variance, in float64."""
    weight, bias, score = (
        p.double().tolist() for p in (pooling.hidden.weight, pooling.hidden.bias, pooling.score.weight[0])
    )
    scores = []
    for frame in states:
        hidden = [
            math.tanh(b + math.fsum(w * x for w, x in zip(row, frame, strict=True)))
            for row, b in zip(weight, bias, strict=True)
        ]
        scores.append(math.fsum(v * h for v, h in zip(score, hidden, strict=True)))
    attention = slow_softmax(scores)
    columns = list(zip(*states, strict=True))
    means = [math.fsum(a * x for a, x in zip(attention, column, strict=True)) for column in columns]
    variances = [
        math.fsum(a * (x - m) ** 2 for a, x in zip(attention, column, strict=True))
        for column, m in zip(columns, means, strict=True)
    ]
    return means, variances


@properties
@given(pooling_inputs())
@torch.no_grad()
def test_statistics_pooling_equals_the_formula(inputs):
    pooling, states, mask = inputs
    pooled = pooling(states, mask)
    for row, frames, valid in zip(pooled.tolist(), states, mask, strict=True):
        if not valid.any():
            assert row == [0] * len(row)
            continue
        means, variances = loop_pooling(pooling, frames[valid].tolist())
        tolerance = 1e-6 * max(1, frames[valid].abs().max().item())
        assert row[: len(means)] == pytest.approx(means, abs=tolerance)
        for deviation, variance in zip(row[len(means) :], variances, strict=True):
            negligible = variance < 1.1e-7 and deviation == 0  # taken as constant, for the sake of the gradient
            assert negligible or deviation == pytest.approx(math.sqrt(variance), abs=tolerance)


@properties
@given(pooling_inputs(), SEEDS)
@torch.no_grad()
def test_statistics_pooling_sees_valid_frames_only_and_in_any_order(inputs, seed):
    (pooling, states, mask), generator = inputs, torch.Generator().manual_seed(seed)
    pooled = pooling(states, mask)
    order = torch.randperm(states.shape[1], generator=generator)
    noise = 100 * torch.randn(states.shape, generator=generator)
    other = torch.where(mask[..., None], states, noise)[:, order]
    longer = torch.cat([other, noise], dim=1), torch.cat([mask[:, order], torch.zeros_like(mask)], dim=1)
    torch.testing.assert_close(pooling(*longer), pooled, rtol=1e-6, atol=5e-6)
    for row, frames, valid in zip(pooled, states, mask, strict=True):
        if valid.any():
            alone = pooling(frames[valid][None], torch.ones(1, int(valid.sum()), dtype=torch.bool))[0]
            torch.testing.assert_close(alone, row, rtol=1e-6, atol=5e-6)


@pytest.fixture(scope="module")
def heads():
    torch.manual_seed(0)
    config = tiny_config(fusion_hidden_size=16)
    return [
        randomize(head(config)).eval()
        for head in (ClassAnchorClustering, PrototypeMemory, UncertaintyHead, DeepClassifier)
    ]


@properties
@given(size=st.integers(1, 40), scale=st.sampled_from([1e-3, 1.0, 100.0]), seed=SEEDS)
@torch.no_grad()
def test_no_row_of_a_head_depends_on_its_batch(heads, size, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    features = scale * torch.randn(size, 16, generator=generator)
    rows = torch.randint(size, (int(torch.randint(1, 2 * size + 1, (), generator=generator)),), generator=generator)
    for head in heads:
        whole, part = head(features), head(features[rows])
        for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (whole, part)), strict=True):
            torch.testing.assert_close(other, one[rows], rtol=1e-5, atol=1e-5)


# --- Calibration -----------------------------------------------------------------------------------------------------


def exact_calibration_error(probabilities, labels, num_bins):
    """Guo et al. 2017, eq. 3, in exact fractions: bins (lo, hi], the first class wins a tie."""
    bins = {}
    for row, label in zip(probabilities, labels, strict=True):
        confidence = Fraction(max(row))
        bins.setdefault(math.ceil(confidence * num_bins), []).append((row.index(max(row)) == label) - confidence)
    return float(sum(abs(sum(gaps)) for gaps in bins.values()) / len(labels))


@st.composite
def dyadic_probabilities(draw):
    """Probabilities in 64ths, which floats hold exactly: confidences lie on the edges of the bins and tie."""
    num_rows, num_labels = draw(st.integers(1, 15)), draw(st.integers(2, 5))
    rows = []
    for _ in range(num_rows):
        cuts = draw(st.lists(st.integers(0, 64), min_size=num_labels - 1, max_size=num_labels - 1).map(sorted))
        rows.append([(b - a) / 64 for a, b in itertools.pairwise([0, *cuts, 64])])
    labels = st.lists(st.integers(0, num_labels - 1), min_size=num_rows, max_size=num_rows)
    return rows, draw(labels)


@properties
@given(dyadic_probabilities(), st.sampled_from([1, 2, 4, 8, 16, 64]))
def test_calibration_error_is_exact_on_the_edges_of_its_bins(rows, num_bins):
    error = expected_calibration_error(*rows, num_bins)
    assert error == pytest.approx(exact_calibration_error(*rows, num_bins), abs=1e-12)


@properties
@given(labelled_rows(st.floats(-20, 20), max_size=25), st.integers(1, 30), SEEDS)
def test_calibration_error_properties(rows, num_bins, seed):
    logits, labels = rows
    probabilities, rng = [slow_softmax(row) for row in logits], np.random.default_rng(seed)

    def error(probabilities, labels, num_bins=num_bins):
        return expected_calibration_error(probabilities, labels, num_bins)

    right = [row.index(max(row)) == label for row, label in zip(probabilities, labels, strict=True)]
    overall = abs(mean(right) - mean(max(row) for row in probabilities))
    assert error(probabilities, labels, 1) == pytest.approx(overall, abs=1e-9)
    edges = (Fraction(max(row)) * num_bins for row in probabilities)
    if all(abs(edge - round(edge)) > 1e-9 for edge in edges):  # elsewhere the edge's own rounding decides
        exact = exact_calibration_error(probabilities, labels, num_bins)
        assert error(probabilities, labels) == pytest.approx(exact, abs=1e-6)
    # Finer bins can only show more; the clips' order, and taking all of them three times, change nothing
    assert overall - 1e-9 <= error(probabilities, labels) <= 1 + 1e-9
    order = np.repeat(rng.permutation(len(labels)), 3)
    repeated = [probabilities[i] for i in order], [labels[i] for i in order]
    assert error(*repeated) == pytest.approx(error(probabilities, labels), abs=1e-9)


def prior_slope(logits, labels, strength, inverse_temperature):
    """
    Derivative by 1 / T of what `fit_temperature` minimises: the NLL of targets smoothed as Platt (1999) does, and of
    `strength` more clips with labels as the scores at T = 1. It never falls: the sum is convex in 1 / T.
    """
    slopes, number = [], len(labels)
    for row, label in zip(logits, labels, strict=True):
        expected = math.fsum(
            p * x for p, x in zip(slow_softmax([x * inverse_temperature for x in row]), row, strict=True)
        )
        others = [x for i, x in enumerate(row) if i != label]
        slopes.append((number + 1) / (number + 2) * (expected - row[label]))
        slopes.append((expected - mean(others)) / (number + 2))
        at_one = math.fsum(p * x for p, x in zip(slow_softmax(row), row, strict=True))
        slopes.append(strength / number * (expected - at_one))
    return math.fsum(slopes)


@properties
@given(labelled_rows(st.floats(-9, 9), min_size=3), st.sampled_from([0.05, 0.3, 1.0, 5.0]))
def test_temperature_stays_or_is_the_root_of_the_derivative(rows, scale):
    """Also with tied logits and missing classes, where the best T may be a bound or any T at all."""
    logits, labels = [[scale * x for x in row] for row in rows[0]] * 10, rows[1] * 10
    fitted = fit_temperature(logits, labels)
    if fitted == 1:
        return
    assert negative_log_likelihood(logits, labels, fitted) < negative_log_likelihood(logits, labels)

    def is_root(strength):
        slopes = [prior_slope(logits, labels, strength, factor / fitted) for factor in (1 - 1e-3, 1 + 1e-3)]
        return (slopes[0] <= 1e-6 or fitted > 19.9) and (slopes[1] >= -1e-6 or fitted < 0.051)

    assert any(map(is_root, PRIOR_CLIPS)), fitted


def test_the_temperature_of_scores_that_are_too_sure_and_too_modest():
    """Enough clips find the temperature that the labels were drawn with, nearly."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1500, 4))
    labels = [rng.choice(4, p=slow_softmax(row)) for row in logits.tolist()]
    for scale in (0.4, 1.0, 3.0):
        fitted = fit_temperature(scale * logits, labels)
        assert fitted == pytest.approx(scale, rel=0.15)
        if fitted != 1:
            rows, near = (scale * logits).tolist(), [(1 - 1e-4) / fitted, (1 + 1e-4) / fitted]
            slopes = [[prior_slope(rows, labels, strength, inverse) for inverse in near] for strength in PRIOR_CLIPS]
            assert any(below < 0 < above for below, above in slopes)  # a root is between them


@properties
@given(
    labelled_rows(st.one_of(st.floats(-3, 3, width=32), st.sampled_from([0.0, 1e-30, 80.0, -1e4, 1e4, 1e30]))),
    st.booleans(),
)
def test_temperature_never_raises_the_nll(rows, as_tensor):
    logits, labels = (torch.tensor(values) for values in rows) if as_tensor else rows
    temperature = fit_temperature(logits, labels)
    assert 0.05 <= temperature <= 20
    before = negative_log_likelihood(logits, labels)
    assert negative_log_likelihood(logits, labels, temperature) <= before


@properties
@given(labelled_rows(st.floats(-9, 9), min_size=3), st.floats(-1e3, 1e3), SEEDS)
def test_temperature_does_not_depend_on_constants_or_the_order_of_the_classes(rows, constant, seed):
    logits, labels, rng = np.array(rows[0] * 10), np.array(rows[1] * 10), np.random.default_rng(seed)
    classes = rng.permutation(logits.shape[1])
    changed = logits[:, classes] + constant * rng.random((len(labels), 1))
    fitted = fit_temperature(changed, np.argsort(classes)[labels])
    assert fitted == pytest.approx(fit_temperature(logits, labels), rel=1e-4)


# --- Open set --------------------------------------------------------------------------------------------------------

# Ties, signed zeros, and neighbours that no rounding may merge
SCORE = st.one_of(
    st.sampled_from([-1e308, -1.0, -5e-324, -0.0, 0.0, 5e-324, 1 - 2**-53, 1.0, 1 + 2**-52, 1e308]), st.floats(-2, 2)
)
detection = st.lists(st.tuples(SCORE, st.booleans()), min_size=1, max_size=30)
recognition = st.tuples(detection, st.lists(SCORE, min_size=1, max_size=25))


def split(rows):
    """Scores of the known and of the unknown clips."""
    return [[score for score, flag in rows if flag == wanted] for wanted in (False, True)]


def exact_auroc(known, unknown):
    """Share of (known, unknown) pairs in the right order; a tie is half a pair."""
    return Fraction(sum(2 * (u > k) + (u == k) for k in known for u in unknown), 2 * len(known) * len(unknown))


def exact_fpr95(known, unknown):
    """Lowest share of flagged known clips over all thresholds that flag 95 % of the unknown ones."""
    thresholds = [t for t in known + unknown if 100 * sum(u >= t for u in unknown) >= 95 * len(unknown)]
    return min(Fraction(sum(k >= t for k in known), len(known)) for t in thresholds)


@properties
@given(detection)
def test_auroc_and_fpr95_are_exact(rows):
    scores, flags = zip(*rows, strict=True)
    known, unknown = split(rows)
    area, rate = auroc(scores, flags), fpr_at_95_tpr(scores, flags)
    if not known or not unknown:
        assert math.isnan(area) and math.isnan(rate)
        return
    assert area == pytest.approx(float(exact_auroc(known, unknown)), abs=1e-12)
    assert rate == pytest.approx(float(exact_fpr95(known, unknown)), abs=1e-12)
    # One more known clip, tied with the last unknown one: ties are never split in the method's favour
    worse = [*rows, (min(unknown), False)]
    against = fpr_at_95_tpr(*zip(*worse, strict=True))
    assert against == pytest.approx(float(exact_fpr95([*known, min(unknown)], unknown)), abs=1e-12)


@properties
@given(st.integers(1, 130), st.integers(1, 5), SEEDS)
def test_fpr95_flags_the_fewest_known_clips_at_any_number_of_unknown_ones(num_unknown, step, seed):
    """On ranks, so that 95 % of each number of clips is met at exactly one threshold, tied or not."""
    rng = np.random.default_rng(seed)
    known, unknown = (rng.integers(0, 150 // step, size).tolist() for size in (60, num_unknown))
    flags = [0] * len(known) + [1] * len(unknown)
    rate = fpr_at_95_tpr(known + unknown, flags)
    assert rate == pytest.approx(float(exact_fpr95(known, unknown)), abs=1e-12)


@properties
@given(detection, st.data())
def test_open_set_scores_move_the_right_way(rows, choice):
    """A clip that looks more like what it is helps, or at least does not hurt; copies of all clips change nothing."""
    known, unknown = split(rows)
    assume(known and unknown)

    def judge(known, unknown):
        scores, flags = known + unknown, [0] * len(known) + [1] * len(unknown)
        return np.array([auroc(scores, flags), -fpr_at_95_tpr(scores, flags)])

    before = judge(known, unknown)
    position, score = choice.draw(st.integers(0, len(unknown) - 1)), choice.draw(SCORE)
    raised = [max(u, score) if i == position else u for i, u in enumerate(unknown)]
    lowered = [min(k, score) if i == position % len(known) else k for i, k in enumerate(known)]
    assert (judge(known, raised) >= before - 1e-12).all()
    assert (judge(lowered, unknown) >= before - 1e-12).all()
    copies = choice.draw(st.integers(2, 4))
    np.testing.assert_allclose(judge(known * copies, unknown * copies), before, atol=1e-12)


@properties
@given(recognition)
def test_oscr_is_exact(rows):
    """The mean over known clips of: right, times the share of unknown clips that score lower (a tie is one half)."""
    (scores, right), unknown = zip(*rows[0], strict=True), rows[1]
    shares = [sum(2 * (k > u) + (k == u) for u in unknown) * r for k, r in zip(scores, right, strict=True)]
    area = oscr(scores, right, unknown)
    assert area == pytest.approx(float(Fraction(sum(shares), 2 * len(scores) * len(unknown))), abs=1e-12)
    assert area <= min(mean(right), 1 - float(exact_auroc(list(scores), unknown))) + 1e-12
    false_positive_rate, correct_rate, thresholds = oscr_curve(scores, right, unknown)
    assert thresholds.tolist() == [math.inf, *sorted({*scores, *unknown}, reverse=True)]
    for x, y, t in zip(false_positive_rate, correct_rate, thresholds, strict=True):
        assert x == pytest.approx(mean(u >= t for u in unknown), abs=1e-12)
        assert y == pytest.approx(mean(r and k >= t for k, r in zip(scores, right, strict=True)), abs=1e-12)


# --- Small and broken data -------------------------------------------------------------------------------------------


@properties
@given(labelled_rows(st.one_of(st.floats(-5, 5), st.just(0.0)), max_size=6), st.data())
def test_any_small_data_set_has_defined_results(rows, choice):
    """One clip, missing classes, ties, no unknown clips: a number in [0, 1], or nan exactly where a group is empty."""
    logits, labels = rows
    size, names = len(labels), [f"class {i}" for i in range(len(logits[0]))]
    probabilities = softmax(logits)
    np.testing.assert_allclose(probabilities, [slow_softmax(row) for row in logits], atol=1e-12)
    predictions = probabilities.argmax(axis=1)
    wrong, confidence = predictions != labels, probabilities.max(axis=1)
    is_unknown = np.array(choice.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    results = compute_classification_metrics(predictions, labels, names)
    results |= {
        "error": expected_calibration_error(probabilities, labels),
        "risk": area_under_risk_coverage(-confidence, wrong),
    }
    assert all(0 <= value <= 1 for value in results.values())
    assert results["risk"] == 0 if not wrong.any() else results["risk"] > 0
    assert confusion_matrix(predictions, labels, len(names)).sum() == size
    groups = grouped_metrics(predictions, labels, labels, names)
    assert {name: group["count"] for name, group in groups.items()} == {str(y): labels.count(y) for y in labels}
    maybe = [
        (auroc(-confidence, is_unknown), is_unknown),
        (fpr_at_95_tpr(-confidence, is_unknown), is_unknown),
        (error_detection_auroc(-confidence, wrong), wrong),
        (oscr(confidence[~is_unknown], ~wrong[~is_unknown], confidence[is_unknown]), is_unknown),
    ]
    for value, flags in maybe:
        assert math.isnan(value) if flags.all() or not flags.any() else 0 <= value <= 1


TAKE_SCORES = {
    "scores": [auroc, fpr_at_95_tpr, roc_curve],
    "uncertainty": [
        error_detection_auroc,
        risk_coverage_curve,
        area_under_risk_coverage,
    ],
    "known_scores": [lambda scores, flags: oscr(scores, flags, [0.5])],
    "unknown_scores": [lambda scores, flags: oscr([0.5], [1], scores)],
}
TAKE_ROWS = {
    "logits": [
        fit_temperature,
        negative_log_likelihood,
        lambda rows, _: softmax(rows),
    ],
    "probabilities": [expected_calibration_error, reliability_bins],
}


@properties
@given(st.data(), st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(1, 9))
def test_one_bad_score_is_one_error_that_says_where(data, bad, size):
    position, form = data.draw(st.integers(0, size - 1)), data.draw(st.sampled_from([list, np.array, torch.tensor]))
    for name, functions in TAKE_SCORES.items():
        scores = [0.1 * i for i in range(size)]
        scores[position] = bad
        for function in functions:
            with pytest.raises(ValueError, match=rf"`{name}` must be finite, got {bad} at index {position}\."):
                function(form(scores), [i % 2 for i in range(size)])
    for name, functions in TAKE_ROWS.items():
        rows = [[0.25, 0.75] for _ in range(size)]
        rows[position][1] = bad
        for function in functions:
            with pytest.raises(ValueError, match=rf"`{name}` must be finite, got {bad} at index \({position}, 1\)\."):
                function(form(rows), [0] * size)
