# SPDX-License-Identifier: Apache-2.0
"""Tests of `metrics`, `calibration`, `open_set`, `groups` and `tables`: each number against an independent reference.

Order: classification, calibration, open set, uncertainty, test-time augmentation, report, bad input.
"""

import itertools
import math

import evaluate
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import sklearn.linear_model
import sklearn.metrics
import sklearn.neighbors
import sklearn.preprocessing
import torch
import torchmetrics.functional.classification
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_predictions
from transformers import EvalPrediction

from mmser.calibration import (
    area_under_risk_coverage,
    doubt_log_odds,
    error_detection_auroc,
    error_log_odds,
    error_rate_interval,
    expected_calibration_error,
    fit_error_probability,
    fit_temperature,
    negative_log_likelihood,
    reliability_bins,
    risk_coverage_curve,
)
from mmser.groups import group_gap, grouped_metrics
from mmser.metrics import (
    MMSERMetric,
    bootstrap_classification,
    bootstrap_interval,
    build_compute_metrics,
    compute_classification_metrics,
    confusion_matrix,
    softmax,
)
from mmser.open_set import auroc, energy_score, fpr_at_95_tpr, knn_distance, oscr, oscr_curve, roc_curve
from mmser.scores import average_passes
from mmser.tables import format_table

LABEL_NAMES = ["neutral", "happy", "sad", "angry"]
TOLERANCE = 1e-6
properties = settings(max_examples=40, deadline=None, database=None, derandomize=True)


# Few distinct values, so that ties are common.
tied_scores = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=25)


def split(rows):
    scores, flags = zip(*rows, strict=True)
    return np.array(scores, dtype=float), np.array(flags)


# --- classification --------------------------------------------------------------------------------------------------


def loop_metrics(predictions, references, num_labels):
    """F1 and recall from counted hits and misses, without any library."""
    f1, recall, support = [], [], []
    for label in range(num_labels):
        pairs = list(zip(predictions, references, strict=True))
        hits = sum(p == label and r == label for p, r in pairs)
        false_alarms = sum(p == label and r != label for p, r in pairs)
        misses = sum(p != label and r == label for p, r in pairs)
        total = 2 * hits + false_alarms + misses
        f1.append(2 * hits / total if total else 0.0)
        support.append(hits + misses)
        recall.append(hits / (hits + misses) if hits + misses else None)
    present = [value for value in recall if value is not None]
    return {
        "weighted_f1": sum(f * s for f, s in zip(f1, support, strict=True)) / len(references),
        "accuracy": sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references),
        "unweighted_average_recall": sum(present) / len(present),
        **{f"f1_{name}": value for name, value in zip(LABEL_NAMES, f1, strict=True)},
    }


@properties
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_classification_metrics_match_loop_and_sklearn(rows):
    predictions, references = (list(column) for column in zip(*rows, strict=True))
    metrics = compute_classification_metrics(predictions, references, LABEL_NAMES)
    for name, value in loop_metrics(predictions, references, 4).items():
        assert metrics[name] == pytest.approx(value, abs=TOLERANCE), name
    macro = sklearn.metrics.f1_score(references, predictions, average="macro", zero_division=0)
    assert metrics["macro_f1"] == pytest.approx(macro, abs=TOLERANCE)
    assert all(type(value) is float and 0 <= value <= 1 for value in metrics.values())


def test_classification_metrics_match_torchmetrics():
    logits, labels = random_predictions(0)
    metrics = compute_classification_metrics(logits.argmax(1), labels, LABEL_NAMES)
    predicted, target = torch.tensor(logits.argmax(1)), torch.tensor(labels)
    functional = torchmetrics.functional.classification
    for name, average in (("weighted_f1", "weighted"), ("macro_f1", "macro")):
        expected = functional.multiclass_f1_score(predicted, target, 4, average=average)
        assert metrics[name] == pytest.approx(expected.item(), abs=TOLERANCE)
    recall = functional.multiclass_recall(predicted, target, 4, average="macro")
    assert metrics["unweighted_average_recall"] == pytest.approx(recall.item(), abs=TOLERANCE)


def test_missing_class_is_defined_and_not_punished():
    metrics = compute_classification_metrics([0, 1, 1], [0, 1, 1], LABEL_NAMES)
    assert metrics["f1_sad"] == metrics["f1_angry"] == 0
    for name in ("weighted_f1", "accuracy", "unweighted_average_recall", "macro_f1", "f1_neutral", "f1_happy"):
        assert metrics[name] == 1
    # one example
    assert compute_classification_metrics([2], [2], LABEL_NAMES)["macro_f1"] == 1
    assert compute_classification_metrics([2], [3], LABEL_NAMES)["macro_f1"] == 0


def test_confusion_matrix_rows_are_true_classes():
    matrix = confusion_matrix(torch.tensor([1, 1, 0]), [0, 0, 2], 3)
    assert matrix.tolist() == [[0, 2, 0], [0, 0, 0], [1, 0, 0]]


def test_metric_works_offline_and_combined(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr("socket.socket.connect", refuse)
    predictions, references = [0, 1, 2, 2, 3], [0, 1, 2, 3, 3]
    expected = compute_classification_metrics(predictions, references, LABEL_NAMES)
    metric = MMSERMetric(cache_dir=str(tmp_path))
    result = metric.compute(predictions=predictions, references=torch.tensor(references))
    matrix = result.pop("confusion_matrix")
    assert result == expected
    assert np.trace(matrix) == 4 and np.sum(matrix) == 5

    with pytest.raises(ValueError, match=r"class indices from 0 to 3 .*got 7 at index 1"):
        metric.compute(predictions=[0, 7], references=[0, 0])
    # an error leaves nothing behind
    metric.add_batch(predictions=predictions[:3], references=references[:3])
    metric.add_batch(predictions=predictions[3:], references=references[3:])
    assert metric.compute()["weighted_f1"] == expected["weighted_f1"]

    binary = MMSERMetric(["calm", "excited"], cache_dir=str(tmp_path), experiment_id="binary")
    combined = evaluate.combine({"four": metric, "two": binary}, force_prefix=True)
    result = combined.compute(predictions=[0, 1, 1], references=[0, 1, 0])
    assert result["two_f1_excited"] == result["four_f1_happy"] == pytest.approx(2 / 3)
    assert "accuracy" in evaluate.combine([metric]).compute(predictions=[0], references=[0])


@pytest.mark.parametrize("as_tuple", [False, True])
def test_compute_metrics_of_logits(as_tuple):
    logits, labels = random_predictions(1)
    predictions = (logits, np.zeros((len(logits), 1))) if as_tuple else logits
    metrics = build_compute_metrics(LABEL_NAMES)(EvalPrediction(predictions, labels))
    expected = compute_classification_metrics(logits.argmax(1), labels, LABEL_NAMES)
    recalls = sklearn.metrics.recall_score(labels, logits.argmax(1), average=None)
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["recall_min"] == pytest.approx(recalls.min(), abs=TOLERANCE)
    assert metrics["num_predicted_classes"] == 4
    assert all(isinstance(value, (int, float)) for value in metrics.values())


def test_compute_metrics_detects_collapse(monkeypatch):
    messages = []
    monkeypatch.setattr("mmser.metrics.logger.warning", messages.append)
    compute_metrics = build_compute_metrics(LABEL_NAMES)
    logits = np.tile([0.0, 0.0, 9.0, 0.0], (5, 1))
    metrics = compute_metrics(EvalPrediction(logits, np.array([0, 1, 2, 3, 2])))
    assert metrics["num_predicted_classes"] == 1 and metrics["recall_min"] == 0
    assert len(messages) == 1 and "'sad'" in messages[0]
    # one class only in the references: predicting it is right, not a collapse
    assert compute_metrics(EvalPrediction(logits, np.full(5, 2)))["recall_min"] == 1
    assert len(messages) == 1
    with pytest.raises(ValueError, match=r"4 columns .* got 3"):
        compute_metrics(EvalPrediction(logits[:, :3], np.zeros(5, dtype=int)))


def test_bootstrap_of_matrices_is_the_bootstrap_of_clips():
    """Against resampling the clips themselves, with scikit-learn's metrics: the same intervals up to chance."""
    logits, labels = random_predictions(11, size=120)
    predictions = logits.argmax(1)
    intervals = bootstrap_classification(predictions, labels, LABEL_NAMES, num_samples=4000)
    metrics = {
        "weighted_f1": lambda p, r: sklearn.metrics.f1_score(r, p, average="weighted"),
        "macro_f1": lambda p, r: sklearn.metrics.f1_score(r, p, average="macro"),
        "accuracy": lambda p, r: sklearn.metrics.accuracy_score(r, p),
        "unweighted_average_recall": lambda p, r: sklearn.metrics.balanced_accuracy_score(r, p),
    }
    assert list(intervals) == ["weighted_f1", "accuracy", "unweighted_average_recall", "macro_f1"]
    for name, metric in metrics.items():
        expected = bootstrap_interval(metric, predictions, labels, num_samples=600, seed=3)
        np.testing.assert_allclose(intervals[name], expected, atol=0.025, err_msg=name)
    exact = scipy.stats.binom(120, np.mean(predictions == labels)).ppf([0.025, 0.975]) / 120
    np.testing.assert_allclose(intervals["accuracy"], exact, atol=0.0101)  # the count of right clips is binomial


def test_bootstrap_of_speakers_is_that_of_whole_speakers():
    """Against drawing the speakers by hand, with scikit-learn's metric: the same interval up to chance."""
    rng = np.random.default_rng(4)
    speakers = np.repeat(np.arange(15), rng.integers(4, 30, size=15))
    labels = rng.integers(4, size=len(speakers))
    is_right = rng.random(len(speakers)) < np.linspace(0.2, 1, 15)[speakers]  # some speakers are easier than others
    predictions = np.where(is_right, labels, (labels + rng.integers(1, 4, size=len(labels))) % 4)
    names = [f"corpus/{speaker}" for speaker in speakers]
    interval = bootstrap_classification(predictions, labels, LABEL_NAMES, num_samples=4000, speakers=names)
    values = []
    for _ in range(800):
        rows = np.concatenate([np.flatnonzero(speakers == drawn) for drawn in rng.integers(15, size=15)])
        values.append(sklearn.metrics.f1_score(labels[rows], predictions[rows], average="weighted"))
    np.testing.assert_allclose(interval["weighted_f1"], np.quantile(values, [0.025, 0.975]), atol=0.02)
    over_clips = bootstrap_classification(predictions, labels, LABEL_NAMES, num_samples=4000)["weighted_f1"]
    assert np.ptp(interval["weighted_f1"]) > 1.5 * np.ptp(over_clips)  # clips of a speaker are alike
    alone = bootstrap_classification(predictions, labels, LABEL_NAMES, 4000, speakers=np.arange(len(labels)).tolist())
    np.testing.assert_allclose(alone["weighted_f1"], over_clips, atol=0.01)
    few = [f"speaker {speaker % 9}" for speaker in speakers]
    assert bootstrap_classification(predictions, labels, LABEL_NAMES, 4000, speakers=few)["weighted_f1"] == over_clips
    with pytest.raises(ValueError, match="`speakers` 3"):
        bootstrap_classification([0, 1], [0, 1], LABEL_NAMES, speakers=["a", "b", "c"])


def test_bootstrap_of_missing_classes_and_single_clips():
    assert set(bootstrap_classification([0, 1, 1], [0, 1, 1], LABEL_NAMES).values()) == {(1.0, 1.0)}
    assert set(bootstrap_classification([2], [3], LABEL_NAMES).values()) == {(0.0, 0.0)}
    rows = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 0]
    first, second = (bootstrap_classification(*rows, LABEL_NAMES, seed=seed) for seed in (1, 1))
    assert first == second != bootstrap_classification(*rows, LABEL_NAMES, seed=2)
    narrow = bootstrap_classification(*rows, LABEL_NAMES, level=0.5)["accuracy"]
    low, high = bootstrap_classification(*rows, LABEL_NAMES)["accuracy"]
    assert 0 <= low <= narrow[0] <= narrow[1] <= high <= 1


# --- calibration -----------------------------------------------------------------------------------------------------


def loop_calibration_error(probabilities, labels, num_bins):
    error = 0.0
    for i in range(num_bins):
        inside = [k for k, row in enumerate(probabilities) if i / num_bins < max(row) <= (i + 1) / num_bins]
        if inside:
            confidence = sum(max(probabilities[k]) for k in inside) / len(inside)
            accuracy = sum(int(np.argmax(probabilities[k])) == labels[k] for k in inside) / len(inside)
            error += len(inside) / len(labels) * abs(accuracy - confidence)
    return error


@pytest.mark.parametrize("num_bins", [1, 7, 15, 100])
@pytest.mark.parametrize("seed", range(3))
def test_calibration_error_matches_loop_and_torchmetrics(seed, num_bins):
    logits, labels = random_predictions(seed)
    probabilities = softmax(logits)
    np.testing.assert_allclose(probabilities, torch.softmax(torch.tensor(logits), dim=1), atol=1e-12)
    error = expected_calibration_error(probabilities, labels, num_bins)
    assert error == pytest.approx(loop_calibration_error(probabilities, labels, num_bins), abs=TOLERANCE)
    # torchmetrics has bins [lo, hi); random values never fall on an edge
    reference = torchmetrics.functional.classification.multiclass_calibration_error(
        torch.tensor(probabilities), torch.tensor(labels), num_classes=4, n_bins=num_bins, norm="l1"
    )
    assert error == pytest.approx(reference.item(), abs=TOLERANCE)


def test_calibration_bins_are_closed_on_the_right():
    probabilities = np.array([[0.5, 0.5], [0.75, 0.25], [0.76, 0.24], [1.0, 0.0]])
    bins = reliability_bins(probabilities, [0, 1, 0, 0], num_bins=4)
    assert bins.count.tolist() == [0, 1, 1, 2]
    np.testing.assert_allclose(bins.confidence, [np.nan, 0.5, 0.75, 0.88])
    np.testing.assert_allclose(bins.accuracy, [np.nan, 1, 0, 1])
    expected = (0.5 + 0.75 + 2 * 0.12) / 4
    assert expected_calibration_error(probabilities, [0, 1, 0, 0], 4) == pytest.approx(expected, abs=1e-12)
    # the edges k / 15 themselves, exactly as they are stored
    confidences = np.linspace(0, 1, 16)[8:]
    bins = reliability_bins(np.stack([confidences, 1 - confidences], axis=1), np.zeros(8, dtype=int), 15)
    assert bins.count[7:].tolist() == [1] * 8


def test_calibration_error_extremes():
    sure = np.eye(4)[[0, 1, 2, 3]]
    assert expected_calibration_error(sure, [0, 1, 2, 3]) == 0
    assert expected_calibration_error(sure, [1, 2, 3, 0]) == 1
    assert expected_calibration_error([[0.8, 0.2]], [0]) == pytest.approx(0.2)


@properties
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 20))
def test_calibration_error_properties(seed, size, num_bins):
    logits, labels = random_predictions(seed, size)
    probabilities = softmax(logits)
    error = expected_calibration_error(probabilities, labels, num_bins)
    order = np.random.default_rng(seed).permutation(size)
    assert 0 <= error <= 1
    assert expected_calibration_error(probabilities[order], labels[order], num_bins) == pytest.approx(error)


def test_negative_log_likelihood_matches_torch():
    logits, labels = random_predictions(3)
    for temperature in (0.3, 1.0, 4.0):
        expected = torch.nn.functional.cross_entropy(torch.tensor(logits) / temperature, torch.tensor(labels))
        value = negative_log_likelihood(logits, labels, temperature)
        assert value == pytest.approx(expected.item(), abs=1e-10)


def drawn_clips(generator, size, accuracy, scale, num_labels=4):
    """
    Logits [N, C] and labels of a model that is right for the share `accuracy`, and whose best temperature is `scale`.

    The labels are drawn by the scores at that temperature; with an accuracy of 1 they are the likeliest.
    """
    margin = {0.5: 1.3, 0.8: 3.0, 0.95: 5.1, 0.99: 7.3, 1.0: 8.0}[accuracy]
    logits = 1.5 * generator.normal(size=(size, num_labels))
    logits[np.arange(size), generator.integers(num_labels, size=size)] += margin
    if accuracy == 1:
        return scale * logits, logits.argmax(axis=1)
    labels = (generator.random((size, 1)) > softmax(logits).cumsum(axis=1)).sum(axis=1)
    return scale * logits, np.minimum(labels, num_labels - 1)


@pytest.mark.parametrize("scale", [0.5, 2.0, 4.0])
def test_temperature_of_many_clips_is_that_of_a_grid(scale):
    logits, labels = drawn_clips(np.random.default_rng(4), 3000, 0.8, scale)
    grid = np.exp(np.linspace(math.log(0.05), math.log(20), 4001))
    losses = [torch.nn.functional.cross_entropy(torch.tensor(logits / t), torch.tensor(labels)).item() for t in grid]
    assert fit_temperature(logits, labels) == pytest.approx(grid[int(np.argmin(losses))], rel=0.05)


def test_temperature_undoes_a_known_scale():
    generator = np.random.default_rng(0)
    logits = 2 * generator.normal(size=(5000, 4))
    labels = (generator.random((5000, 1)) > softmax(logits).cumsum(1)).sum(1)
    assert fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.05)
    assert fit_temperature(logits, labels) == 1


@pytest.mark.parametrize("accuracy", [0.5, 0.8, 0.95, 0.99, 1.0])
@pytest.mark.parametrize("scale", [1 / 2, 1, 3], ids=["too modest", "calibrated", "too sure"])
def test_temperature_of_few_clips_does_not_hurt_fresh_ones(scale, accuracy):
    """
    By simulation: on average the NLL of fresh clips is not above that at T = 1, but for the 0.003 that it may cost to
    become more modest by chance; with many clips it is near the best.
    """
    generator = np.random.default_rng(1)
    fresh = drawn_clips(generator, 4000, accuracy, scale)
    unscaled = negative_log_likelihood(*fresh)
    # Where all are right, fresh clips cannot say how sure is too sure: a finite set of clips bounds the rate of errors
    best = min(negative_log_likelihood(*fresh, temperature) for temperature in (np.geomspace(0.2, 5, 81)))
    for size, draws in ((10, 16), (30, 12), (100, 8), (500, 4)):
        found = [fit_temperature(*drawn_clips(generator, size, accuracy, scale)) for _ in range(draws)]
        change = np.array([negative_log_likelihood(*fresh, temperature) for temperature in found]) - unscaled
        assert change.mean() <= 2 * change.std(ddof=1) / math.sqrt(draws) + 0.003, (size, found)
        assert change.max() <= 0.05 * unscaled + 0.02, (size, found)
        if size == 500 and accuracy < 0.99:
            assert unscaled + change.mean() <= best + 0.02 * max(unscaled, 0.1), found
    if accuracy == 1 and scale < 1:
        assert unscaled + change.mean() < 0.5 * unscaled


@pytest.mark.parametrize(("size", "confidence"), [(10, 0.9), (160, 0.94), (500, 0.9)])
def test_clips_that_are_all_right_never_make_a_model_sure(size, confidence):
    """Their NLL falls without end as T does. Sixty right answers show an error rate below 5 %, not one of zero."""
    logits = np.zeros((size, 4))
    logits[:, 0] = math.log(3 * confidence / (1 - confidence))
    temperature = fit_temperature(logits, np.zeros(size, dtype=int))
    sure = softmax(logits / temperature).max()
    assert temperature <= 1 and sure <= (size + 1) / (size + 2)
    assert (temperature < 1) == (size > 10)
    labels = np.zeros(size, dtype=int)
    labels[0] = 1  # one error
    assert fit_temperature(logits, labels) > 0.5


@properties
@given(st.integers(0, 10_000), st.integers(1, 30), st.floats(0.01, 50))
def test_temperature_never_hurts_the_clips_it_is_fitted_to(seed, size, scale):
    logits, labels = random_predictions(seed, size)
    temperature = fit_temperature(scale * logits, labels)
    before = negative_log_likelihood(scale * logits, labels)
    after = negative_log_likelihood(scale * logits, labels, temperature)
    assert 0.05 <= temperature <= 20
    assert after <= before
    again = fit_temperature(scale * logits, labels, current=temperature)
    assert negative_log_likelihood(scale * logits, labels, again) <= after + 1e-4


def test_temperature_limits():
    assert fit_temperature(np.zeros((5, 4)), [0, 1, 2, 3, 0]) == 1  # no T is better
    assert fit_temperature([[2.0, 0.0]], [1]) == 1  # one clip shows nothing
    assert fit_temperature(np.eye(4), [0, 1, 2, 3], current=2.0) == 2.0  # nor do four that are right
    assert 1 < fit_temperature(9 * np.eye(4)[[0] * 40], [1] * 40) <= 20  # all wrong: the flatter the better


def test_clips_of_one_speaker_count_as_one_voice():
    """Repeated clips show no more than the clips themselves did."""
    logits, labels = drawn_clips(np.random.default_rng(3), 8, 0.5, 1.6)
    many, speakers = np.repeat(logits, 50, axis=0), np.repeat(np.arange(8), 50)
    assert fit_temperature(many, np.repeat(labels, 50)) != 1
    assert fit_temperature(many, np.repeat(labels, 50), [f"speaker {i}" for i in speakers]) == 1
    apart = fit_temperature(*drawn_clips(np.random.default_rng(3), 400, 0.5, 3.0), np.arange(400) // 10)
    assert apart == pytest.approx(3, rel=0.2)


@pytest.mark.parametrize(("wrong", "clips", "bounds"), [(0, 60, (0, 0.0596)), (3, 30, (0.0211, 0.2653))])
def test_error_rate_interval_is_that_of_clopper_and_pearson(wrong, clips, bounds):
    """0 of n: 1 - 0.025 ** (1 / n); 3 of 30: a published table."""
    assert error_rate_interval(wrong, clips) == pytest.approx(bounds, abs=5e-4)
    low, high = error_rate_interval(clips - wrong, clips)
    assert (1 - high, 1 - low) == pytest.approx(bounds, abs=5e-4)


# --- open set --------------------------------------------------------------------------------------------------------


def brute_fpr95(scores, is_unknown):
    """Lowest false positive rate of all thresholds that catch 95 % of the unknown clips."""
    rates = []
    for threshold in scores:
        caught = [s >= threshold for s, unknown in zip(scores, is_unknown, strict=True) if unknown]
        flagged = [s >= threshold for s, unknown in zip(scores, is_unknown, strict=True) if not unknown]
        if 100 * sum(caught) >= 95 * len(caught):
            rates.append(sum(flagged) / len(flagged))
    return min(rates)


def brute_oscr(known_scores, known_correct, unknown_scores):
    """Share of (known, unknown) pairs in which the known clip is correct and scores higher; a tie is half a pair."""
    total = 0.0
    for score, correct in zip(known_scores, known_correct, strict=True):
        for other in unknown_scores:
            total += correct * (1.0 if score > other else 0.5 if score == other else 0.0)
    return total / (len(known_scores) * len(unknown_scores))


@properties
@given(tied_scores)
def test_auroc_and_fpr95_match_references(rows):
    scores, flags = split(rows)
    if flags.all() or not flags.any():
        assert math.isnan(auroc(scores, flags))
        assert math.isnan(fpr_at_95_tpr(scores, flags))
        return
    assert auroc(scores, flags) == pytest.approx(sklearn.metrics.roc_auc_score(flags, scores), abs=TOLERANCE)
    assert fpr_at_95_tpr(scores, flags) == pytest.approx(brute_fpr95(scores, flags), abs=TOLERANCE)
    false_positive_rate, true_positive_rate, thresholds = roc_curve(scores, flags)
    reference = sklearn.metrics.roc_curve(flags, scores, drop_intermediate=False)
    for ours, theirs in zip((false_positive_rate, true_positive_rate, thresholds), reference, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("num_unknown", [1, 19, 20, 21, 40, 60, 100, 300])
def test_fpr95_catches_exactly_95_percent(num_unknown):
    generator = np.random.default_rng(num_unknown)
    scores = np.concatenate([generator.normal(size=150), 1 + generator.normal(size=num_unknown)])
    is_unknown = np.arange(len(scores)) >= 150
    assert fpr_at_95_tpr(scores, is_unknown) == pytest.approx(brute_fpr95(scores, is_unknown), abs=TOLERANCE)
    assert auroc(scores, is_unknown) == pytest.approx(sklearn.metrics.roc_auc_score(is_unknown, scores), abs=TOLERANCE)


def test_open_set_by_hand():
    is_unknown = [0, 0, 0, 1, 1]
    assert auroc([1, 2, 3, 4, 5], is_unknown) == 1  # unknown is positive: higher = more unknown
    assert fpr_at_95_tpr([1, 2, 3, 4, 5], is_unknown) == 0
    assert auroc([4, 5, 6, 1, 2], is_unknown) == 0
    assert fpr_at_95_tpr([4, 5, 6, 1, 2], is_unknown) == 1
    # everything tied: chance, and catching the unknown flags everyone
    assert auroc([1] * 5, is_unknown) == 0.5
    assert fpr_at_95_tpr([1] * 5, is_unknown) == 1
    # one known clip tied with the threshold is flagged
    assert fpr_at_95_tpr([1, 2, 4, 4, 5], is_unknown) == pytest.approx(1 / 3)


@properties
@given(tied_scores, st.integers(0, 1000))
def test_ranking_metrics_ignore_monotone_transforms_and_order(rows, seed):
    scores, flags = split(rows)
    order = np.random.default_rng(seed).permutation(len(scores))
    metrics = (
        auroc,
        fpr_at_95_tpr,
        error_detection_auroc,
        area_under_risk_coverage,
    )
    for metric in metrics:
        value = metric(scores, flags)
        for transformed in (np.exp(scores), 5 * scores - 3, scores**3):
            assert metric(transformed, flags) == pytest.approx(value, abs=1e-12, nan_ok=True)
        assert metric(scores[order], flags[order]) == pytest.approx(value, abs=1e-12, nan_ok=True)
    assert auroc(-scores, flags) == pytest.approx(1 - auroc(scores, flags), nan_ok=True)


@properties
@given(tied_scores, st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.integers(0, 1000))
def test_oscr_matches_pairs_and_is_at_most_accuracy(rows, unknown_scores, seed):
    known_scores, known_correct = split(rows)
    area = oscr(known_scores, known_correct, unknown_scores)
    assert area == pytest.approx(brute_oscr(known_scores, known_correct, unknown_scores), abs=TOLERANCE)
    assert 0 <= area <= known_correct.mean() + 1e-12
    order = np.random.default_rng(seed).permutation(len(known_scores))
    shuffled = oscr(known_scores[order], known_correct[order], unknown_scores[::-1])
    assert shuffled == pytest.approx(area, abs=1e-12)
    # when every known clip is right it is the AUROC of known against unknown
    everything_right = oscr(known_scores, np.ones(len(known_scores)), unknown_scores)
    scores = -np.concatenate([known_scores, unknown_scores])
    is_unknown = np.arange(len(scores)) >= len(known_scores)
    expected = sklearn.metrics.roc_auc_score(is_unknown, scores)
    assert everything_right == pytest.approx(expected, abs=TOLERANCE)


def test_oscr_curve_is_exact():
    known_scores, known_correct, unknown_scores = [0.9, 0.8, 0.6, 0.3], [1, 0, 1, 1], [0.8, 0.5, 0.1]
    false_positive_rate, correct_rate, thresholds = oscr_curve(known_scores, known_correct, unknown_scores)
    assert thresholds.tolist() == [np.inf, 0.9, 0.8, 0.6, 0.5, 0.3, 0.1]
    np.testing.assert_allclose(false_positive_rate, np.array([0, 0, 1, 1, 2, 2, 3]) / 3)
    np.testing.assert_allclose(correct_rate, np.array([0, 1, 1, 2, 2, 3, 3]) / 4)
    expected = sklearn.metrics.auc(false_positive_rate, correct_rate)
    assert oscr(known_scores, known_correct, unknown_scores) == pytest.approx(expected)


def test_undefined_open_set_metrics_are_nan():
    assert math.isnan(auroc([0.1, 0.2], [0, 0]))
    assert math.isnan(auroc([0.1], [1]))
    assert math.isnan(fpr_at_95_tpr([0.1], [1]))
    assert math.isnan(oscr([0.1, 0.4], [1, 0], []))
    assert math.isnan(oscr([], [], [0.3]))
    assert math.isnan(error_detection_auroc([0.1, 0.2], [False, False]))
    assert area_under_risk_coverage([0.1, 0.2], [False, False]) == 0


def test_energy_score_is_that_of_the_paper():
    logits, _ = random_predictions(12, size=50)
    for temperature in (1.0, 0.5, 3.0):
        expected = -temperature * np.log(np.sum(np.exp(logits / temperature), axis=1))
        np.testing.assert_allclose(energy_score(logits, temperature), expected, rtol=1e-12)
    assert energy_score([[1000.0, 0.0]]).tolist() == [-1000.0]  # no overflow
    confident, flat = energy_score([[9.0, 0.0], [0.1, 0.0]])
    assert flat > confident


def test_knn_distance_matches_scikit_learn():
    generator = np.random.default_rng(13)
    train, features = generator.normal(size=(60, 5)), generator.normal(size=(20, 5))
    neighbours = sklearn.neighbors.NearestNeighbors().fit(sklearn.preprocessing.normalize(train))
    for k in (1, 7, 60):
        expected = neighbours.kneighbors(sklearn.preprocessing.normalize(features), k)[0][:, -1]
        np.testing.assert_allclose(knn_distance(train, features, k), expected, atol=TOLERANCE)
    # length does not matter, only direction; a training clip is at distance 0 from itself
    np.testing.assert_allclose(knn_distance(3 * train, 7 * features), knn_distance(train, features), atol=TOLERANCE)
    np.testing.assert_allclose(knn_distance(train, train, 1), 0, atol=TOLERANCE)


def test_knn_distance_of_few_clips_and_zeros():
    train = [[1.0, 0.0], [0.0, 1.0]]
    np.testing.assert_allclose(knn_distance(train, [[2.0, 0.0]]), [math.sqrt(2)])  # the farthest of two
    np.testing.assert_allclose(knn_distance(train, [[0.0, 0.0]], k=1), [1.0])
    np.testing.assert_allclose(knn_distance([[1.0, 0.0]], [[-1.0, 0.0]], k=1), [2.0])


# --- uncertainty -----------------------------------------------------------------------------------------------------


@properties
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
def test_risk_coverage_is_the_mean_over_orders_of_ties(rows):
    uncertainty, is_wrong = split(rows)
    curves = []
    for order in itertools.permutations(range(len(rows))):
        if all(uncertainty[i] <= uncertainty[j] for i, j in itertools.pairwise(order)):
            curves.append([sum(is_wrong[list(order[: k + 1])]) / (k + 1) for k in range(len(rows))])
    coverage, risk = risk_coverage_curve(uncertainty, is_wrong)
    np.testing.assert_allclose(coverage, [(k + 1) / len(rows) for k in range(len(rows))])
    np.testing.assert_allclose(risk, np.mean(curves, axis=0), atol=TOLERANCE)
    assert area_under_risk_coverage(uncertainty, is_wrong) == pytest.approx(np.mean(curves), abs=TOLERANCE)


def test_uncertainty_by_hand():
    is_wrong = [False, False, True, True]
    assert error_detection_auroc([0.1, 0.2, 0.3, 0.4], is_wrong) == 1
    assert error_detection_auroc([0.5] * 4, is_wrong) == 0.5
    # a constant uncertainty keeps random clips: the risk is the error rate at every coverage
    np.testing.assert_allclose(risk_coverage_curve([0.5] * 4, is_wrong)[1], 0.5)
    assert area_under_risk_coverage([0.1, 0.2, 0.3, 0.4], is_wrong) == pytest.approx((1 / 3 + 1 / 2) / 4)


def error_scores(seed, size=300, informative=(1.0, 1.0), constant=-1.0):
    """Two scores in (0, 1), and errors drawn with log-odds that depend on them as `informative` says."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(size, 2)) * [1.5, 0.7] - 1
    log_odds = scores @ np.array(informative) + constant
    return scores[:, 0], scipy.special.expit(scores[:, 1]), generator.random(size) < scipy.special.expit(log_odds)


def error_loss(doubt, uncertainty, is_wrong, weights):
    """What `fit_error_probability` minimises, without its bounds: log-loss and a unit prior around 1 - max."""
    log_odds = error_log_odds(doubt, uncertainty, weights)
    loss = np.logaddexp(0, np.where(is_wrong, -log_odds, log_odds)).sum()
    return loss + (np.square(np.subtract(weights, (1, 0, 0)))).sum() / 2


@pytest.mark.parametrize(("seed", "size"), [(0, 400), (1, 400), (2, 2000)])
def test_error_probability_is_a_logistic_regression(seed, size):
    """Against a search without gradients; where the head helps, it has a part."""
    doubt, uncertainty, is_wrong = error_scores(seed, size, (0.6, 1.5))
    weights = fit_error_probability(doubt, uncertainty, is_wrong)
    best = scipy.optimize.minimize(
        lambda weights: error_loss(doubt, uncertainty, is_wrong, weights),
        (0.3, 0.3, 0.3),
        method="Nelder-Mead",
        options={"xatol": 1e-6, "fatol": 1e-9, "maxiter": 4000},
    ).x
    assert min(best[:2]) > 0.1  # else the bounds would tell them apart
    np.testing.assert_allclose(weights, best, atol=2e-3)
    probabilities = scipy.special.expit(error_log_odds(doubt, uncertainty, weights))
    assert probabilities.mean() == pytest.approx(is_wrong.mean(), abs=0.01)
    assert error_detection_auroc(probabilities, is_wrong) > error_detection_auroc(doubt, is_wrong) + 0.02
    again = fit_error_probability(torch.tensor(doubt), uncertainty.tolist(), is_wrong, current=weights)
    np.testing.assert_allclose(again, weights, atol=1e-6)


@pytest.mark.parametrize("misled", [-1.5, 0.0])
def test_a_head_that_misleads_has_no_part(misled):
    """Then errors are told apart exactly as by 1 - max probability, whatever else is fitted."""
    doubt, uncertainty, is_wrong = error_scores(3, 400, (0.5, misled))
    weights = fit_error_probability(doubt, uncertainty, is_wrong)
    assert weights[1] == 0 and 0.3 < weights[0] < 0.8
    combined = error_log_odds(doubt, uncertainty, weights)
    assert error_detection_auroc(combined, is_wrong) == error_detection_auroc(doubt, is_wrong)


@pytest.mark.parametrize("size", [10, 30, 100, 500])
@pytest.mark.parametrize("informative", [(1.0, 0.0), (1.0, 1.0), (0.3, 1.5)], ids=["doubt", "both", "head"])
def test_few_errors_do_not_make_the_uncertainty_worse_than_one_minus_max(informative, size):
    """By simulation, on fresh clips: neither its ranking of errors nor its log-loss."""
    fresh = error_scores(100, 4000, informative, constant=-2.0)

    def log_loss(weights):
        log_odds = error_log_odds(*fresh[:2], weights)
        return np.logaddexp(0, np.where(fresh[2], -log_odds, log_odds)).mean()

    found = [fit_error_probability(*error_scores(seed, size, informative, constant=-2.0)) for seed in range(8)]
    areas = np.array([error_detection_auroc(error_log_odds(*fresh[:2], weights), fresh[2]) for weights in found])
    gained = areas - error_detection_auroc(fresh[0], fresh[2])
    losses = np.array([log_loss(weights) for weights in found]) - log_loss((1, 0, 0))
    for better in (gained, -losses):
        assert better.mean() >= -2 * better.std(ddof=1) / math.sqrt(len(found)) - 1e-9
    assert gained.min() >= -0.02
    if size == 500 and informative == (0.3, 1.5):
        assert gained.mean() > 0.1


def test_without_errors_the_uncertainty_stays_as_it_was():
    doubt, uncertainty, _ = error_scores(0, 50, (1, 1))
    for wrong in (False, True):
        is_wrong = np.full(50, wrong)
        assert fit_error_probability(doubt, uncertainty, is_wrong).tolist() == [1, 0, 0]
        assert fit_error_probability(doubt, uncertainty, is_wrong, current=(0.5, 2, 1)).tolist() == [0.5, 2, 1]
    assert fit_error_probability([-3.0], [0.2], [False]).tolist() == [1, 0, 0]


@properties
@given(
    st.lists(st.tuples(st.floats(-700, 700), st.floats(0, 1), st.booleans()), min_size=1, max_size=20),
)
def test_the_weights_of_any_scores_are_finite_and_keep_the_order_of_the_doubt(rows):
    """Also with certain scores, ties and single errors."""
    doubt, uncertainty, is_wrong = (np.array([*column]) for column in zip(*rows, strict=True))
    weights = fit_error_probability(doubt, uncertainty, is_wrong)
    assert np.isfinite(weights).all() and weights[0] >= 0.1 and weights[1] >= 0


def test_doubt_does_not_round():
    """It is the log-odds of 1 - max probability, and still tells apart answers whose probability rounds to 1."""
    logits = np.random.default_rng(0).normal(size=(50, 4))
    expected = scipy.special.logit(1 - softmax(logits).max(axis=1))
    np.testing.assert_allclose(doubt_log_odds(logits), expected, rtol=1e-9)
    assert doubt_log_odds([[0.0, 200.0], [0.0, 100.0]]).tolist() == [-200, -100]


def test_error_log_odds_by_hand():
    log_odds = error_log_odds([-2.0, 0.5, -30.0], [0.5, 0.75, 1.0], [2.0, 3.0, -1.0])
    limit = math.log((1 - 1e-6) / 1e-6)
    np.testing.assert_allclose(log_odds, [-5, 1 + 3 * math.log(3) - 1, -60 + 3 * limit - 1], rtol=1e-9)


# --- test-time augmentation ------------------------------------------------------------------------------------------


def test_average_passes_averages_probabilities():
    generator = np.random.default_rng(14)
    outputs = {
        "logits": 5 * generator.normal(size=(12, 4)).astype(np.float32),
        "labels": np.repeat([3, 0, -1, 2], 3),
        "uncertainty": generator.random(12).astype(np.float32),
        "features": generator.normal(size=(12, 6)).astype(np.float32),
        "is_unknown": np.array([1, 1, 0, 1, 0, 0, 0, 0, 0, 1, 1, 1], dtype=bool),
    }
    averaged = average_passes(outputs, 3)
    for clip in range(4):
        rows = slice(3 * clip, 3 * clip + 3)
        expected = torch.softmax(torch.tensor(outputs["logits"][rows]).double(), dim=1).mean(0)
        np.testing.assert_allclose(scipy.special.softmax(averaged["logits"][clip]), expected, atol=TOLERANCE)
        np.testing.assert_allclose(np.exp(averaged["logits"][clip]), expected, atol=TOLERANCE)
        assert averaged["uncertainty"][clip] == pytest.approx(outputs["uncertainty"][rows].mean(), abs=TOLERANCE)
        np.testing.assert_allclose(averaged["features"][clip], outputs["features"][rows].mean(0), atol=TOLERANCE)
    assert averaged["labels"].tolist() == [3, 0, -1, 2]
    assert averaged["is_unknown"].tolist() == [True, False, False, True] and averaged["is_unknown"].dtype == bool


def test_average_of_one_pass_and_of_certain_passes():
    outputs = {
        "logits": np.float32([[1, 2], [3, -4]]),
        "labels": np.array([1, 0]),
        "is_unknown": np.array([True, False]),
    }
    same = average_passes(outputs, 1)
    assert all(np.array_equal(same[name], values) for name, values in outputs.items())
    certain = average_passes({"logits": np.array([[2000.0, 0.0], [2000.0, 0.0]])}, 2)["logits"]
    assert np.isfinite(certain).all()  # the logarithm of a probability that is 0 in floating point


# --- report ----------------------------------------------------------------------------------------------------------


def test_bootstrap_interval_of_a_mean():
    values = np.random.default_rng(0).normal(loc=2.0, size=400)
    low, high = bootstrap_interval(np.mean, values, seed=1)
    half_width = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half_width, abs=0.015)
    assert high == pytest.approx(values.mean() + half_width, abs=0.015)
    assert (low, high) == bootstrap_interval(np.mean, torch.tensor(values), seed=1)
    assert (low, high) != bootstrap_interval(np.mean, values, seed=2)
    narrow = bootstrap_interval(np.mean, values, level=0.5, seed=1)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_interval_keeps_rows_together_and_skips_nan():
    generator = np.random.default_rng(0)
    first = generator.normal(size=(50, 3))
    same = bootstrap_interval(lambda a, b: np.abs(a.sum(1) - b).max(), first, first.sum(1), num_samples=50)
    assert same == (0, 0)
    assert bootstrap_interval(np.mean, [3.0], num_samples=10) == (3, 3)
    low, high = bootstrap_interval(auroc, [0.1, 0.2, 0.9], [0, 0, 1], num_samples=100)
    assert (low, high) == (1, 1)  # resamples without an unknown clip do not count
    undefined = bootstrap_interval(auroc, [0.1, 0.2], [0, 0], num_samples=10)
    assert all(math.isnan(bound) for bound in undefined)


def test_grouped_metrics():
    logits, labels = random_predictions(5)
    predictions = logits.argmax(1)
    languages = np.random.default_rng(5).choice(["en", "de", "zh"], len(labels))
    report = grouped_metrics(predictions, labels, languages, LABEL_NAMES)
    assert list(report) == ["de", "en", "zh"]
    assert sum(metrics["count"] for metrics in report.values()) == len(labels)
    for language, metrics in report.items():
        rows = languages == language
        expected = sklearn.metrics.f1_score(labels[rows], predictions[rows], average="weighted")
        assert metrics["weighted_f1"] == pytest.approx(expected, abs=TOLERANCE)
        assert metrics["count"] == rows.sum()
        expected = bootstrap_classification(predictions[rows], labels[rows], LABEL_NAMES)["weighted_f1"]
        assert metrics["weighted_f1_interval"] == expected
        assert "rejected" not in metrics and "mean_confidence" not in metrics
    assert list(grouped_metrics([0, 0], [0, 1], [None, 3], LABEL_NAMES)) == ["3", "None"]
    assert list(grouped_metrics([0, 0], [0, 1], torch.tensor([2, 1]), LABEL_NAMES)) == ["1", "2"]


def test_grouped_metrics_of_scores_and_rejection():
    logits, labels = random_predictions(15)
    probabilities, predictions = softmax(logits), logits.argmax(1)
    is_unknown = np.random.default_rng(15).random(len(labels)) < 0.2
    groups = np.arange(len(labels)) % 3
    report = grouped_metrics(predictions, labels, groups, LABEL_NAMES, probabilities, is_unknown)
    for group, metrics in report.items():
        rows = groups == int(group)
        assert metrics["mean_confidence"] == pytest.approx(probabilities[rows].max(1).mean())
        expected = expected_calibration_error(probabilities[rows], labels[rows])
        assert metrics["expected_calibration_error"] == pytest.approx(expected)
        assert metrics["rejected"] == pytest.approx(is_unknown[rows].mean())
    one = grouped_metrics([1], [1], ["x"], ["a", "b"], [[0.2, 0.8]], [False])["x"]
    assert (one["count"], one["weighted_f1"], one["rejected"], one["mean_confidence"]) == (1, 1.0, 0.0, 0.8)


def test_group_gap_compares_large_groups():
    def group(count, f1, recall):
        return {"count": count, "weighted_f1": f1, "unweighted_average_recall": recall}

    groups = {
        "de": group(30, 0.5, 0.6),
        "en": group(90, 0.75, 0.6),
        "fr": group(29, 0.1, 0.1),
        "tr": group(40, 0.7, 0.4),
    }
    gap = group_gap(groups)
    assert gap["weighted_f1"] == {"gap": 0.25, "highest": "en", "lowest": "de"}
    assert gap["unweighted_average_recall"]["lowest"] == "tr"
    assert gap["unweighted_average_recall"]["gap"] == pytest.approx(0.2)
    assert group_gap(groups, ["weighted_f1"], min_count=1)["weighted_f1"]["lowest"] == "fr"
    assert group_gap({"en": groups["en"], "fr": groups["fr"]}) == {}


def test_format_table():
    rows = [
        {"group": "en", "count": 12, "f1": np.float32(0.5)},
        {"group": "a|b\nc", "count": None, "f1": float("nan")},
        {"group": None},
    ]
    assert format_table(rows, ["group", "count", "f1"]).split("\n") == [
        "| group  | count |     f1 |",
        "| ------ | ----: | -----: |",
        "| en     |    12 | 0.5000 |",
        "| a\\|b c |       |    n/a |",
        "|        |       |        |",
    ]
    assert format_table([{}], ["x"]) == "| x   |\n| --- |\n|     |"
    assert format_table([], ["x"]) == ""


# --- bad input -------------------------------------------------------------------------------------------------------

GOOD = [[0.7, 0.3], [0.4, 0.6]]
BAD_CALLS = [
    (lambda: auroc([0.1, float("nan"), 0.3], [0, 1, 0]), r"`scores` must be finite, got nan at index 1"),
    (lambda: auroc([0.1, float("inf")], [0, 1]), r"`scores` must be finite, got inf at index 1"),
    (lambda: auroc([], []), r"`scores` is empty"),
    (lambda: auroc([0.1, 0.2], [0, 2]), r"`is_unknown` must hold True/False or 1/0, got 2 at index 1"),
    (lambda: auroc([0.1, 0.2], [0]), r"same length, got `scores` 2, `is_unknown` 1"),
    (lambda: auroc([[0.1], [0.2]], [0, 1]), r"`scores` must have 1 dimension\(s\), got shape \(2, 1\)"),
    (lambda: auroc(["a", "b"], [0, 1]), r"`scores` must hold real numbers"),
    (lambda: auroc([1j, 0j], [0, 1]), r"`scores` must hold real numbers"),
    (lambda: fpr_at_95_tpr([], []), r"`scores` is empty"),
    (lambda: oscr([], [], []), r"both empty"),
    (lambda: oscr([0.1], [1], [float("nan")]), r"`unknown_scores` must be finite, got nan at index 0"),
    (lambda: oscr([0.1], [1, 0], [0.2]), r"`known_scores` 1, `known_correct` 2"),
    (lambda: error_detection_auroc([0.1], []), r"`is_wrong` is empty"),
    (lambda: risk_coverage_curve([float("nan")], [1]), r"`uncertainty` must be finite, got nan at index 0"),
    (lambda: softmax([[1.0, float("nan")]]), r"`logits` must be finite, got nan at index \(0, 1\)"),
    (lambda: softmax([[1.0], [1.0, 2.0]]), r"`logits` must be a rectangular array"),
    (lambda: softmax([1.0, 2.0]), r"`logits` must have 2 dimension\(s\)"),
    (lambda: fit_temperature(GOOD, [0, 2]), r"`labels` must hold class indices from 0 to 1 .*got 2 at index 1"),
    (lambda: fit_temperature(np.zeros((0, 4)), []), r"`logits` is empty"),
    (lambda: fit_temperature(GOOD, [0]), r"`logits` 2, `labels` 1"),
    (lambda: negative_log_likelihood(GOOD, [0, 1], 0), r"`temperature` must be positive"),
    (lambda: expected_calibration_error([[2.0, 1.0]], [0]), r"sum to 1 .* row 0 .*softmax"),
    (lambda: expected_calibration_error(GOOD, [0, -1]), r"from 0 to 1 .*got -1 at index 1"),
    (lambda: expected_calibration_error(GOOD, [0, 1], 0), r"`num_bins` must be a positive integer, got 0"),
    (lambda: confusion_matrix([0, 1], [0.0, 1.0], 2), r"`references` must hold integer class indices"),
    (lambda: confusion_matrix([], [], 2), r"`predictions` is empty"),
    (lambda: confusion_matrix([0], [0, 1], 2), r"`predictions` 1, `references` 2"),
    (lambda: confusion_matrix([[0]], [0], 2), r"`predictions` must have 1 dimension"),
    (lambda: compute_classification_metrics([0], [0], ["a", "a"]), r"distinct names"),
    (
        lambda: compute_classification_metrics([0], [5], ["a", "b"]),
        r"class indices from 0 to 1 .*got 5 at index 0",
    ),
    (lambda: grouped_metrics([0], [0], [], ["a"]), r"`groups` 0"),
    (lambda: bootstrap_interval(np.mean), r"at least one array"),
    (lambda: bootstrap_interval(np.mean, []), r"at least one row"),
    (lambda: bootstrap_interval(np.mean, [1, 2], [1]), r"`arrays\[0\]` 2, `arrays\[1\]` 1"),
    (lambda: bootstrap_interval(np.mean, [1], level=95), r"`level` must be between 0 and 1, got 95"),
    (lambda: bootstrap_interval(np.mean, [1], num_samples=0), r"`num_samples`"),
    (lambda: format_table([], []), r"`columns`"),
    (lambda: energy_score([[1.0, float("nan")]]), r"`logits` must be finite, got nan at index \(0, 1\)"),
    (lambda: energy_score([[1.0, 2.0]], 0.0), r"`temperature` must be positive"),
    (lambda: knn_distance(GOOD, [[1.0]]), r"same width, got 2 and 1"),
    (lambda: knn_distance(np.zeros((0, 2)), GOOD), r"`train_features` is empty"),
    (lambda: knn_distance(GOOD, GOOD, 0), r"`k` must be a positive integer, got 0"),
    (lambda: average_passes({"logits": GOOD}, 0), r"`num_passes` must be a positive integer, got 0"),
    (lambda: average_passes({"logits": np.zeros((5, 2))}, 2), r"`logits` must have 2 rows for each clip"),
    (lambda: bootstrap_classification([], [], ["a", "b"]), r"`predictions` is empty"),
    (lambda: bootstrap_classification([0], [0], ["a"], num_samples=0), r"`num_samples`"),
    (lambda: bootstrap_classification([0], [0], ["a"], level=1), r"`level` must be between 0 and 1"),
    (lambda: grouped_metrics([0], [0], ["x"], ["a"], [[1.0], [1.0]]), r"`probabilities` 2"),
    (lambda: grouped_metrics([0], [0], ["x"], ["a"], None, [2]), r"`is_unknown` must hold True/False"),
    (lambda: fit_error_probability([0.1, 0.2], [0.1], [0, 1]), r"`doubt` 2, `uncertainty` 1"),
    (lambda: fit_error_probability([0.1, 0.2], [-1, 0.1], [0, 1]), r"`uncertainty` must be in \[0, 1\]"),
    (lambda: fit_error_probability([0.1, float("nan")], [0.3, 0.1], [1, 0]), r"`doubt` must be finite"),
    (lambda: fit_error_probability([], [], []), r"`doubt` is empty"),
]


@pytest.mark.parametrize("call, message", BAD_CALLS, ids=[message for _, message in BAD_CALLS])
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_of_any_type_are_accepted(dtype):
    logits = torch.tensor([[2.0, 0.0], [0.5, 1.0], [0.0, 4.0]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([0, 0, 1])
    exact = logits.detach().double().numpy()
    assert fit_temperature(logits, labels) == fit_temperature(exact, labels.numpy())
    probabilities = torch.softmax(logits, dim=1)
    expected = expected_calibration_error(softmax(exact), labels)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-2)
    assert auroc(logits[:, 0], labels == 0) == 1
