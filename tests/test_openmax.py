# SPDX-License-Identifier: Apache-2.0
"""Tests of what MMSER adds to OpenMax: centroids, distances to them, thresholds of rejection, what counts as a fit.

References are derived here with numpy and exact fractions. The Weibull fit and the revised probabilities have
`test_losses.py` and `test_properties.py`.
"""

import copy
import json
import logging as python_logging
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import fit_openmax_by_chance, slow_openmax, tiny_batch, tiny_config, tiny_model

import openmax_mmser
from modeling_mmser import MMSERForAudioClassification
from openmax_mmser import OpenMax, OpenMaxFitError

SIZE = 6  # width of the vectors
LEVELS = ("activation", "probability")
NO_THRESHOLD = torch.finfo(torch.float32).max  # nothing exceeds it
properties = settings(max_examples=50, deadline=None, derandomize=True, database=None)


pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(openmax_mmser.logger, "warning", messages.append)
    return messages


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def with_centroids(embeddings, labels, num_labels=3, centroids_per_class=8, **options):
    openmax = OpenMax(num_labels, 2, centroids_per_class=centroids_per_class, embedding_size=np.shape(embeddings)[1])
    openmax.fit_centroids(embeddings, labels, **options)
    return openmax


def distinct(centroids):
    """The different rows of one class [K, D]."""
    return np.unique(np.asarray(centroids, dtype=np.float32), axis=0)


# --- centroids -------------------------------------------------------------------------------------------------------


def test_centroids_are_unit_vectors_one_for_four_clips_at_most(rng):
    sizes = {0: 1, 1: 3, 2: 7, 3: 8, 4: 31, 5: 32, 6: 300}
    labels = rng.permutation(np.repeat(list(sizes), list(sizes.values())))
    openmax = with_centroids(rng.normal(2, 5, (len(labels), SIZE)), labels, num_labels=7)
    assert openmax.centroids.shape == (7, 8, SIZE) and openmax.centroids.dtype == torch.float32
    torch.testing.assert_close(openmax.centroids.norm(dim=-1), torch.ones(7, 8), rtol=0, atol=1e-6)
    assert [len(distinct(centroids)) for centroids in openmax.centroids] == [1, 1, 1, 2, 7, 8, 8]
    for centroids in openmax.centroids:  # repeated in turn
        assert torch.equal(centroids, centroids[torch.arange(8) % len(distinct(centroids))])


def test_a_class_with_few_clips_has_its_mean_direction(rng):
    embeddings = rng.normal(size=(7, SIZE)) * rng.uniform(0.1, 50, (7, 1))
    openmax = with_centroids(embeddings, [0, 0, 0, 1, 2, 2, 2])
    for label, rows in enumerate(([0, 1, 2], [3], [4, 5, 6])):
        expected = unit(unit(embeddings[rows]).mean(axis=0))  # each clip counts the same, however long its vector
        np.testing.assert_allclose(openmax.centroids[label], np.tile(expected, (8, 1)), atol=1e-6)


def test_each_group_of_a_class_has_a_centroid_that_is_its_mean(rng):
    """Groups far from each other are found whatever their sizes; a centroid is the mean of those nearest to it."""
    directions = np.eye(SIZE)[[0, 1, 2, 3, 4, 5]]
    groups = np.repeat(np.arange(6), [4, 5, 9, 12, 20, 4])  # the first three of class 0, the others of class 1
    embeddings = directions[groups] + 0.05 * rng.normal(size=(len(groups), SIZE))
    openmax = with_centroids(embeddings, (groups > 2).astype(int), num_labels=2, centroids_per_class=3)
    for label in (0, 1):
        expected = [unit(unit(embeddings[groups == group]).mean(axis=0)) for group in range(3 * label, 3 * label + 3)]
        order = np.argmax(openmax.centroids[label].numpy() @ np.array(expected).T, axis=1)
        assert sorted(order) == [0, 1, 2]
        np.testing.assert_allclose(openmax.centroids[label], np.array(expected)[order], atol=1e-6)


def test_centroids_repeat_and_do_not_depend_on_order_length_or_copies(rng):
    embeddings, labels = rng.normal(size=(120, SIZE)).astype(np.float32), np.arange(120) % 3
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    expected = with_centroids(embeddings, labels).centroids
    assert torch.equal(with_centroids(torch.tensor(embeddings), torch.tensor(labels)).centroids, expected)
    assert torch.equal(torch_state, torch.get_rng_state()) and np.random.get_state()[1].tolist() == numpy_state
    order = rng.permutation(np.repeat(np.arange(120), rng.integers(1, 4, 120)))
    assert torch.equal(with_centroids(embeddings[order], labels[order]).centroids, expected)
    assert torch.equal(with_centroids(embeddings * 4, labels).centroids, expected)
    assert not torch.equal(with_centroids(embeddings, labels, seed=1).centroids, expected)
    copies = with_centroids(np.repeat(embeddings[:3], 20, axis=0), np.repeat(labels[:3], 20))
    assert [len(distinct(centroids)) for centroids in copies.centroids] == [1, 1, 1]


def test_a_class_without_clips_takes_those_of_all_and_is_named(rng, warnings):
    embeddings, labels = rng.normal(size=(50, SIZE)), np.arange(50) % 2 * 2
    openmax = with_centroids(embeddings, labels)
    assert len(warnings) == 1 and "class 1 has no training clips" in warnings[0]
    with_centroids(embeddings, labels, label_names=["calm", "sad", "glad"])
    assert "sad has no training clips" in warnings[1]
    assert torch.equal(openmax.centroids[1], with_centroids(embeddings, np.ones(50, dtype=int)).centroids[1])
    assert len(distinct(openmax.centroids[1])) == 8 and not torch.equal(openmax.centroids[0], openmax.centroids[1])


def test_new_centroids_void_the_fits_on_the_old_ones_and_bad_input_does_not(rng):
    embeddings, labels = rng.normal(size=(90, SIZE)), np.arange(90) % 3
    openmax = with_centroids(embeddings, labels)
    assert not openmax.is_fitted
    openmax.fit(openmax.distances(torch.tensor(embeddings)), labels, labels)
    openmax.fit_thresholds(rng.random(90), labels)
    assert openmax.is_fitted and openmax.has_thresholds
    before = copy.deepcopy(openmax.state_dict())
    for bad, message in (
        ((embeddings[:, 1:], labels), r"must be \[N, 6\] and `labels` \[N\]; got \(90, 5\) and \(90,\)"),
        ((embeddings, labels[1:]), r"got \(90, 6\) and \(89,\)"),
        ((embeddings[0], labels), r"got \(6,\)"),
        ((np.where(np.arange(SIZE) == 2, np.nan, embeddings), labels), "finite values only"),
        ((embeddings[:0], labels[:0]), "at least one clip"),
    ):
        with pytest.raises(ValueError, match=message):
            openmax.fit_centroids(*bad)
    assert openmax.is_fitted and all(torch.equal(before[name], value) for name, value in openmax.state_dict().items())
    openmax.fit_centroids(-embeddings, labels)
    assert not openmax.is_fitted and not openmax.has_thresholds and (openmax.weibull_shape == 1).all()
    assert (openmax.rejection_thresholds == NO_THRESHOLD).all()


# --- distances -------------------------------------------------------------------------------------------------------


def test_distances_are_to_the_nearest_centroid_of_each_class(rng):
    openmax = with_centroids(rng.normal(size=(200, SIZE)), rng.integers(0, 3, 200))
    clips = rng.normal(size=(20, SIZE)) * rng.uniform(0.01, 100, (20, 1))
    clips[0], clips[1] = 7 * openmax.centroids[2, 5].numpy(), -openmax.centroids[2, 5].numpy()
    distances = openmax.distances(torch.tensor(clips))
    assert distances.dtype == torch.float32 and ((distances >= 0) & (distances <= 2)).all()
    for clip, row in zip(clips, distances, strict=True):
        for centroids, distance in zip(openmax.centroids.double().numpy(), row, strict=True):
            expected = min(math.dist(clip / np.linalg.norm(clip), centroid) for centroid in centroids)
            assert distance.item() == pytest.approx(expected, abs=2e-6)
    assert distances[0, 2] < 1e-3


@properties
@given(st.integers(1, 9), st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_distances_depend_on_the_direction_of_the_clip_alone(num_clips, seed, scale):
    """Not on its length, the other clips of the batch, or the order of a class's centroids; nearer means less."""
    rng = np.random.default_rng(seed)
    openmax = with_centroids(rng.normal(size=(60, SIZE)), np.arange(60) % 3, centroids_per_class=4)
    clips = torch.tensor(rng.normal(size=(num_clips, SIZE)), dtype=torch.float32)
    expected = openmax.distances(clips)
    for index, clip in enumerate(clips):
        torch.testing.assert_close(openmax.distances(clip[None]), expected[index : index + 1], rtol=0, atol=1e-6)
    torch.testing.assert_close(openmax.distances(scale * clips), expected, rtol=0, atol=1e-5)
    directions = torch.nn.functional.normalize(clips, dim=-1)
    best = torch.einsum("bd,ckd->bck", directions, openmax.centroids).argmax(dim=-1)
    label = int(rng.integers(3))
    nearer = openmax.distances(directions + openmax.centroids[label, best[:, label]])[:, label]
    assert (nearer <= expected[:, label] + 1e-6).all()
    openmax.centroids.copy_(openmax.centroids[:, rng.permutation(4)])
    assert torch.equal(openmax.distances(clips), expected)


def test_distances_keep_their_digits_under_autocast(rng):
    openmax = with_centroids(rng.normal(size=(60, SIZE)), np.arange(60) % 3)
    clips = openmax.centroids[0] + 0.02 * torch.randn(8, SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distances = openmax.distances(clips)
    assert distances.dtype == torch.float32 and torch.equal(distances, openmax.distances(clips))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fitted_openmax_works_in_half_precision(rng, dtype):
    """After `model.half()`, which rounds the centroids, the vectors come in either precision."""
    openmax = with_centroids(rng.normal(size=(60, SIZE)), np.arange(60) % 3)
    clips = torch.randn(8, SIZE)
    expected = openmax.distances(clips)
    openmax.to(dtype)
    assert openmax.centroids.dtype == dtype
    for vectors in (clips, clips.to(dtype)):
        distances = openmax.distances(vectors)
        assert distances.dtype == torch.float32
        torch.testing.assert_close(distances, expected, rtol=0, atol=0.03)
    model = tiny_model()
    fit_openmax_by_chance(model)
    model.to(dtype)
    distances = model.openmax.distances(torch.randn(2, 32, dtype=dtype), torch.rand(2, 4, dtype=dtype))
    assert distances.shape == (2, 4) and distances.isfinite().all()


# --- thresholds ------------------------------------------------------------------------------------------------------


def conformal_threshold(scores, acceptance):
    """The smallest score that at least (n + 1) * acceptance of the n scores do not exceed, None if there is none."""
    wanted = (len(scores) + 1) * Fraction(str(acceptance))
    return next((t for t in sorted(scores) if sum(score <= t for score in scores) >= wanted), None)


# 64ths, so that ties are common and float32 holds every score
scored = st.lists(st.tuples(st.integers(0, 63).map(lambda x: x / 64), st.integers(0, 2)), min_size=1, max_size=70)
ACCEPTANCE = st.sampled_from([0.1, 0.5, 0.75, 0.8, 0.9, 0.95])


@properties
@given(scored, ACCEPTANCE)
def test_thresholds_accept_at_least_the_share_of_each_predicted_class(rows, acceptance):
    scores, predictions = (np.array(values) for values in zip(*rows, strict=True))
    openmax = OpenMax(3, alpha=2)
    openmax.fit_thresholds(torch.tensor(scores), torch.tensor(predictions), acceptance)
    pooled = conformal_threshold(scores.tolist(), acceptance)
    for label in range(3):
        own = scores[predictions == label]
        expected = conformal_threshold(own.tolist(), acceptance)
        threshold = openmax.rejection_thresholds[label].item()
        assert threshold == (expected if expected is not None else NO_THRESHOLD if pooled is None else pooled)
        if expected is not None:
            accepted = Fraction(int((own <= threshold).sum()), len(own))
            assert accepted >= Fraction(str(acceptance))
    assert openmax.has_thresholds == (pooled is not None)
    order = np.random.default_rng(0).permutation(len(scores))
    other = OpenMax(3, alpha=2)
    other.fit_thresholds(scores[order], predictions[order], acceptance)
    assert torch.equal(other.rejection_thresholds, openmax.rejection_thresholds)


@pytest.mark.parametrize(("size", "acceptance"), [(30, 0.9), (25, 0.95), (7, 0.5)])
def test_new_clips_are_accepted_with_at_least_the_share(rng, size, acceptance):
    """Split conformal prediction: ceil((n + 1) a) / (n + 1) on average, whatever the scores' distribution."""
    openmax, accepted = OpenMax(2, alpha=1), []
    predictions = np.repeat([0, 1], size)
    for _ in range(400):
        held_out, new = (np.stack([rng.beta(0.5, 3, n), rng.random(n) ** 4]) for n in (size, 200))
        openmax.fit_thresholds(held_out.ravel(), predictions, acceptance)
        accepted.append((new <= openmax.rejection_thresholds[:, None].numpy()).mean(axis=1))
    expected = math.ceil((size + 1) * acceptance) / (size + 1)
    assert expected >= acceptance
    np.testing.assert_allclose(np.mean(accepted, axis=0), expected, atol=0.015)


def test_classes_without_a_weibull_of_their_own_are_named_once(rng, warnings):
    distances, labels = rng.random((60, 3)), np.repeat([0, 1, 2], 20)
    OpenMax(3, alpha=2).fit(distances, labels, np.repeat([0, 0, 2], 20), label_names=["calm", "sad", "glad"])
    assert len(warnings) == 1 and "too few clips of sad are classified correctly" in warnings[0]
    OpenMax(3, alpha=2).fit(distances, labels, np.zeros(60, dtype=int))
    assert len(warnings) == 2 and "of class 1, class 2 are" in warnings[1] and "which takes 5;" in warnings[1]


def test_predicted_classes_with_too_few_clips_share_a_threshold_and_are_named(warnings):
    scores, predictions = np.linspace(0.01, 0.5, 50), np.repeat([0, 1], [40, 10])
    openmax = OpenMax(3, alpha=2)
    openmax.fit_thresholds(scores, predictions, 0.95)
    # ceil(41 * 0.95) = 39th of 40 and ceil(51 * 0.95) = 49th of 50
    np.testing.assert_allclose(openmax.rejection_thresholds, [0.39, 0.49, 0.49], rtol=1e-6)
    assert (
        len(warnings) == 1 and "predicted as class 1, class 2 for" in warnings[0] and "over all classes" in warnings[0]
    )
    openmax.fit_thresholds(scores[:18], predictions[:18], 0.95)
    assert (openmax.rejection_thresholds == NO_THRESHOLD).all() and not openmax.has_thresholds
    assert "class 0, class 1, class 2 for" in warnings[1] and "the probability of unknown decides" in warnings[1]
    openmax.fit_thresholds(scores[:19], predictions[:19], 0.95)  # 19 is the smallest number for 95 %
    assert openmax.has_thresholds and openmax.rejection_thresholds[0].item() == pytest.approx(0.19)
    openmax.fit_thresholds(np.zeros(30), np.zeros(30, dtype=int), 0.95)
    assert (openmax.rejection_thresholds == 0).all() and "over all classes" in warnings[-1]
    openmax.fit_thresholds(scores, predictions, 0.95, label_names=["calm", "sad", "glad"])
    assert "predicted as sad, glad for a rejection threshold of their own, which takes 19 clips;" in warnings[-1]
    openmax.fit_thresholds(scores, predictions, 0.9, np.arange(50) // 2)
    assert "class 1, class 2" in warnings[-1] and "which takes 9 speakers;" in warnings[-1]


@pytest.mark.parametrize(
    ("scores", "predictions", "acceptance", "message"),
    [
        ([0.1, 0.2], [0], 0.9, r"must be \[N\], finite; got \(2,\), \(1,\)"),
        ([[0.1], [0.2]], [[0], [1]], 0.9, r"must be \[N\], finite; got \(2, 1\), \(2, 1\)"),
        ([0.1, math.nan], [0, 1], 0.9, "finite"),
        ([0.1, math.inf], [0, 1], 0.9, "finite"),
        ([0.1, 0.2], [0, 1], 1.0, "`acceptance` must be between 0 and 1, got 1.0"),
        ([0.1, 0.2], [0, 1], 0, "`acceptance` must be between 0 and 1, got 0"),
        ([0.1, 0.2], [0, 1], math.nan, "`acceptance` must be between 0 and 1, got nan"),
    ],
)
def test_thresholds_refuse_what_they_cannot_use(scores, predictions, acceptance, message):
    openmax = OpenMax(2, alpha=1)
    with pytest.raises(ValueError, match=message):
        openmax.fit_thresholds(torch.tensor(scores), torch.tensor(predictions), acceptance)
    assert not openmax.has_thresholds and (openmax.rejection_thresholds == NO_THRESHOLD).all()


def test_a_new_fit_voids_the_thresholds(rng):
    distances, labels = rng.uniform(0, 2, (60, 3)), np.arange(60) % 3
    openmax = OpenMax(3, alpha=2)
    openmax.fit(distances, labels, labels)
    openmax.fit_thresholds(rng.random(60), labels, 0.5)
    assert openmax.has_thresholds
    openmax.fit(distances / 2, labels, labels)
    assert not openmax.has_thresholds and (openmax.rejection_thresholds == NO_THRESHOLD).all()


# --- rejection -------------------------------------------------------------------------------------------------------


@st.composite
def rejection_inputs(draw):
    """
    Open-set probabilities [B, C + 1] in 32nds, with ties; scores, which go beyond them; predicted classes that need
    not be the likeliest; thresholds, of which some classes may have none.
    """
    num_rows, num_labels = draw(st.integers(1, 8)), draw(st.integers(2, 4))
    rows = []
    for _ in range(num_rows):
        cuts = draw(st.lists(st.integers(0, 32), min_size=num_labels, max_size=num_labels).map(sorted))
        rows.append([(b - a) / 32 for a, b in zip([0, *cuts], [*cuts, 32], strict=True)])
    score = st.one_of(st.integers(0, 32).map(lambda x: x / 4), st.sampled_from([1e4, 2.0**99]))
    scores = st.lists(score, min_size=num_rows, max_size=num_rows)
    predictions = st.lists(st.integers(0, num_labels - 1), min_size=num_rows, max_size=num_rows)
    thresholds = st.lists(st.one_of(score, st.just(NO_THRESHOLD)), min_size=num_labels, max_size=num_labels)
    return rows, draw(scores), draw(predictions), draw(thresholds)


@properties
@given(rejection_inputs(), st.integers(0, 32))
def test_rejection_follows_its_rule(inputs, threshold):
    rows, scores, predictions, fitted = inputs
    openmax, threshold = OpenMax(len(fitted), alpha=1), threshold / 32
    clips = torch.tensor(scores), torch.tensor(rows), torch.tensor(predictions)
    published = [row[-1] > max(row[:-1]) or row[-1] > threshold for row in rows]
    assert openmax.reject(*clips, threshold).tolist() == published
    openmax.rejection_thresholds.copy_(torch.tensor(fitted))
    openmax.eval()
    assert openmax.has_thresholds == (min(fitted) < NO_THRESHOLD)
    expected = [score > fitted[label] for score, label in zip(scores, predictions, strict=True)]
    if openmax.has_thresholds:
        assert openmax.reject(*clips, threshold).tolist() == expected
    assert openmax.reject(*clips, threshold, use_fitted=False).tolist() == published


def slow_threshold(scores, speakers, acceptance):
    """The lowest score at which the mean over speakers, and one who is never accepted, of their shares is enough."""
    names = set(speakers)
    for threshold in sorted(scores):
        shares = [
            np.mean([s <= threshold for s, who in zip(scores, speakers, strict=True) if who == n]) for n in names
        ]
        if sum(shares) / (len(names) + 1) >= acceptance - 1e-12:
            return threshold
    return None


@properties
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 30), st.sampled_from([0.5, 0.8, 0.9]))
def test_a_threshold_counts_speakers_where_they_are_known(seed, size, num_speakers, acceptance):
    generator = np.random.default_rng(seed)
    scores, speakers = generator.integers(0, 30, size) / 8, generator.integers(num_speakers, size=size)
    names = [f"speaker {i}" for i in speakers]
    for units in (names, None):
        openmax = OpenMax(2, alpha=1)
        openmax.fit_thresholds(scores, np.zeros(size, dtype=int), acceptance, units)
        expected = slow_threshold(scores, names, acceptance) if units else None
        if expected is None:  # by clips: split conformal prediction
            rank = math.ceil((size + 1) * acceptance - 1e-9)
            expected = np.sort(scores)[rank - 1] if rank <= size else np.float32(NO_THRESHOLD)
        assert openmax.rejection_thresholds.tolist() == [expected] * 2
    with pytest.raises(ValueError, match="`speakers` must be"):
        openmax.fit_thresholds(scores, np.zeros(size, dtype=int), acceptance, [*names, "one more"])


def test_the_share_is_kept_on_clips_of_new_speakers():
    """By simulation, with speakers that differ more than their clips do: by clips, too few are accepted."""
    generator = np.random.default_rng(0)

    def draw(num_speakers, clips=8):
        shift = np.repeat(generator.normal(size=num_speakers), clips)
        scores = np.exp(shift + 0.3 * generator.normal(size=num_speakers * clips))
        return scores, np.repeat(np.arange(num_speakers), clips)

    accepted = {"speakers": [], "clips": []}
    fresh, _ = draw(4000)
    for _ in range(150):
        scores, speakers = draw(20)
        for units, names in (("speakers", speakers), ("clips", None)):
            openmax = OpenMax(2, alpha=1)
            openmax.fit_thresholds(scores, np.zeros(len(scores), dtype=int), 0.9, names)
            accepted[units].append((fresh <= openmax.rejection_thresholds[0].item()).mean())
    error = np.std(accepted["speakers"]) / math.sqrt(150)
    assert np.mean(accepted["speakers"]) >= 0.9 - 2 * error
    assert np.mean(accepted["clips"]) < 0.9 - 2 * error


def test_too_few_speakers_are_no_promise_for_new_ones(warnings):
    """18 of them: 19 are the fewest for 95 %. The thresholds are then those of their clips, and a warning says so."""
    scores, predictions = np.arange(190) / 10, np.zeros(190, dtype=int)
    openmax = OpenMax(2, alpha=1)
    openmax.fit_thresholds(scores, predictions, 0.95, np.arange(190) % 19)
    assert not any("are too few to accept" in message for message in warnings)
    assert openmax.rejection_thresholds.tolist() == [pytest.approx(18.9)] * 2  # the last but ten speakers' last clips
    openmax.fit_thresholds(scores, predictions, 0.95, np.arange(190) % 18)
    assert openmax.rejection_thresholds.tolist() == [pytest.approx(18.1)] * 2  # the 182nd of 190
    said = [
        message for message in warnings if "18 held-out speakers are too few to accept 95 % of the clips" in message
    ]
    assert len(said) == 1 and "of new speakers, which takes 19." in said[0]


def test_thresholds_reach_scores_beyond_every_probability(rng):
    """Clips so far off that no probability is left still have an order, and the share is accepted by it."""
    openmax = OpenMax(2, 2, "probability")
    openmax.fit(rng.uniform(0.1, 0.2, (60, 2)), np.arange(60) % 2, np.arange(60) % 2)
    logits, distances = torch.randn(400, 2), torch.from_numpy(rng.uniform(1, 2, (400, 2))).float()
    scores, probabilities = openmax.rejection_scores(logits, distances), openmax(logits, distances)
    assert (probabilities[:, :-1] == 0).all() and scores.isfinite().all() and len(scores.unique()) > 390
    openmax.fit_thresholds(scores, logits.argmax(dim=-1), 0.9)
    rejected = openmax.reject(scores, probabilities, logits.argmax(dim=-1), 0.3)
    assert 0.08 < rejected.float().mean() <= 0.1
    assert openmax.reject(scores, probabilities, logits.argmax(dim=-1), 0.3, use_fitted=False).all()


@torch.no_grad()
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("distance", ["centroid", "anchor"])
def test_the_model_says_which_clips_it_rejects(distance, level):
    model = tiny_model(openmax_distance=distance, openmax_level=level)
    batch, config = tiny_batch(model, [800] * 12, [3] * 12), model.config
    assert model(**batch).is_unknown is None  # not fitted
    fit_openmax_by_chance(model)
    outputs = model(**batch)

    def published(threshold):
        return [row[-1] > max(row[:-1]) or row[-1] > threshold for row in outputs.open_set_probabilities.tolist()]

    assert outputs.is_unknown.dtype == torch.bool and outputs.is_unknown.tolist() == published(0.3)
    assert outputs.rejection_score.shape == (12, 1)
    scores, predictions = outputs.rejection_score[:, 0], outputs.logits.argmax(dim=-1)
    middle = scores.median().item()
    model.openmax.fit_thresholds(np.tile([middle, 0.0], 8), np.repeat(np.arange(4), 4), 0.7)
    assert model.openmax.rejection_thresholds.tolist() == pytest.approx([middle] * 4)
    fitted = (scores > model.openmax.rejection_thresholds[predictions]).tolist()
    assert model(**batch).is_unknown.tolist() == fitted != published(0.3) and 4 < sum(fitted) < 8
    assert model(**batch, use_openmax=False).is_unknown is None
    config.openmax_acceptance = None  # the published rule
    assert model(**batch).is_unknown.tolist() == published(0.3)
    config.openmax_acceptance = 0.9
    rejected = []
    for threshold in (0.3, 0.45, 1, 0):  # what a user sets wins over what is fitted
        config.openmax_threshold = threshold
        rejected.append(model(**batch).is_unknown.tolist())
        assert rejected[-1] == published(threshold) != fitted
    assert sum(rejected[3]) == 12
    config.openmax_threshold = None
    outputs = model(**batch)
    assert outputs.is_unknown is None and outputs.unknown_probability is not None


@torch.no_grad()
def test_a_threshold_that_a_user_sets_is_kept_and_that_of_an_old_file_is_the_fitted_one(tmp_path):
    """Old files hold 0.3, the default that had no effect beside fitted thresholds; in new ones it is a user's."""
    model = tiny_model(openmax_threshold=0.3)
    fit_openmax_by_chance(model)
    model.openmax.rejection_thresholds.fill_(1e30)  # reject nothing
    model.eval()
    batch = tiny_batch(model, [800] * 12, [3] * 12)
    chosen = model(**batch).is_unknown
    assert chosen.any()
    model.save_pretrained(tmp_path)
    load = MMSERForAudioClassification.from_pretrained
    assert torch.equal(load(tmp_path)(**batch).is_unknown, chosen)
    assert not load(tmp_path, openmax_threshold="fitted")(**batch).is_unknown.any()
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    del saved["format_version"]
    file.write_text(json.dumps(saved))
    old = load(tmp_path)
    assert old.config.openmax_threshold == "fitted" and not old(**batch).is_unknown.any()
    assert torch.equal(load(tmp_path, openmax_threshold=0.3)(**batch).is_unknown, chosen)
    file.write_text(json.dumps(saved | {"openmax_threshold": None}))
    assert load(tmp_path)(**batch).is_unknown is None


# --- what counts as a fit --------------------------------------------------------------------------------------------

KINDS = [(distance, level) for distance in ("centroid", "anchor") for level in LEVELS]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def saved(request, tmp_path_factory):
    """A checkpoint whose OpenMax is fitted, thresholds and all, on one kind of distance and for one level."""
    distance, level = request.param
    folder = tmp_path_factory.mktemp(distance)
    model = tiny_model(openmax_distance=distance, openmax_level=level)
    fit_openmax_by_chance(model)
    model.openmax.fit_thresholds(np.linspace(0.2, 0.6, 80), np.arange(80) % 4)
    model.save_pretrained(folder)
    return request.param, folder, model


@torch.no_grad()
@pytest.mark.parametrize("wanted", KINDS, ids="-".join)
def test_a_fit_of_another_kind_does_not_count(saved, wanted):
    kind, folder, model = saved
    batch = tiny_batch(model, [800] * 3, [3] * 3)
    loaded = MMSERForAudioClassification.from_pretrained(folder, openmax_distance=wanted[0], openmax_level=wanted[1])
    assert loaded.openmax.has_centroids == (wanted[0] == "centroid") and loaded.openmax.level == wanted[1]
    if kind == wanted:
        assert loaded.openmax.is_fitted and loaded.openmax.has_thresholds
        for name, buffer in model.openmax.named_buffers():
            assert torch.equal(loaded.openmax.get_buffer(name), buffer), name
        outputs, expected = loaded(**batch), model(**batch)
        for name in ("open_set_probabilities", "rejection_score", "is_unknown"):
            assert torch.equal(outputs[name], expected[name]), name
        return
    assert not loaded.openmax.is_fitted
    outputs = loaded(**batch)
    assert outputs.unknown_probability is None and outputs.rejection_score is None and outputs.is_unknown is None
    assert torch.equal(outputs.logits, model(**batch).logits)
    with pytest.raises(ValueError, match="OpenMax is not fitted"):
        loaded(**batch, use_openmax=True)
    fit_openmax_by_chance(loaded)  # and the old thresholds do not come back with a new fit
    assert loaded.openmax.is_fitted and not loaded.openmax.has_thresholds


@pytest.mark.parametrize("wanted", KINDS, ids="-".join)
def test_a_fit_of_another_kind_is_warned_of_once(saved, wanted, warnings):
    kind, folder, _ = saved
    python_logging.Logger.warning_once.cache_clear()  # of the tests before
    options = {"openmax_distance": wanted[0], "openmax_level": wanted[1]}
    for _ in range(2):
        loaded = MMSERForAudioClassification.from_pretrained(folder, **options)
        loaded(**tiny_batch(loaded, [800], [3]))
    said = [message for message in warnings if "This OpenMax was fitted with another" in message]
    assert len(said) == (kind != wanted)
    MMSERForAudioClassification(loaded.config).eval()  # never fitted: nothing to warn of
    fit_openmax_by_chance(loaded)
    loaded.eval()
    assert len([message for message in warnings if "This OpenMax was fitted" in message]) == len(said)


def test_buffers_are_looked_at_by_eval_and_not_by_train(rng):
    """Each look waits for the device; training calls `train()` over and over, and loading ends with `eval()`."""
    openmax, labels = OpenMax(3, alpha=2), np.arange(60) % 3
    openmax.train()
    openmax.fit(rng.uniform(0, 2, (60, 3)), labels, labels)
    openmax.fit_thresholds(rng.random(60), labels, 0.5)
    assert openmax.is_fitted and openmax.has_thresholds  # what the fits themselves change counts at once
    openmax.rejection_thresholds.fill_(NO_THRESHOLD)
    openmax.train()
    assert openmax.has_thresholds
    openmax.eval()
    assert openmax.is_fitted and not openmax.has_thresholds


def test_a_fit_counts_for_its_own_kind_alone(rng):
    """As `state_dict`s, too; the marks that tell the kinds apart stay what checkpoints hold."""
    embeddings, labels, modules = rng.normal(size=(60, SIZE)), np.arange(60) % 3, []
    for distance, level in KINDS:
        centroids = {"centroids_per_class": 4, "embedding_size": SIZE} if distance == "centroid" else {}
        modules.append(OpenMax(3, 2, level, **centroids))
        if centroids:
            modules[-1].fit_centroids(embeddings, labels)
        modules[-1].fit(rng.uniform(0, 2, (60, 3)), labels, labels)
    assert [openmax.fitted.tolist() for openmax in modules] == [[mark] * 3 for mark in (2.0, 4.0, 1.0, 3.0)]
    for i, source in enumerate(modules):
        for j, target in enumerate(copy.deepcopy(modules)):
            target.load_state_dict(source.state_dict(), strict=False)
            assert target.is_fitted == (i == j), (KINDS[i], KINDS[j])


@torch.no_grad()
@pytest.mark.parametrize("level", LEVELS)
def test_a_fit_without_thresholds_survives_saving(level, tmp_path):
    """None is a number that is finite and that every format keeps; also where fp16 makes infinity of it."""
    model = tiny_model(openmax_level=level, openmax_threshold=0.45)
    fit_openmax_by_chance(model)
    batch = tiny_batch(model, [800] * 6, [3] * 6)
    expected = model(**batch)
    model.save_pretrained(tmp_path)
    loaded = MMSERForAudioClassification.from_pretrained(tmp_path)
    assert loaded.openmax.is_fitted and not loaded.openmax.has_thresholds
    assert (loaded.openmax.rejection_thresholds == NO_THRESHOLD).all()
    assert torch.equal(loaded(**batch).is_unknown, expected.is_unknown)
    half = copy.deepcopy(loaded.openmax).half()
    half.eval()
    assert not half.has_thresholds and half.is_fitted


@torch.no_grad()
def test_the_published_form_is_a_matter_of_the_configuration(tmp_path):
    """Distance to the anchors, activations revised, "unknown" wins or exceeds the threshold; also once saved."""
    published = {"openmax_distance": "anchor", "openmax_level": "activation", "openmax_acceptance": None}
    model = tiny_model(**published, openmax_threshold=0.45, openmax_alpha=2)
    fit_openmax_by_chance(model)
    model.save_pretrained(tmp_path)
    loaded = MMSERForAudioClassification.from_pretrained(tmp_path)
    outputs = loaded(**tiny_batch(model, [800] * 12, [3] * 12))
    openmax = OpenMax(4, 2)  # published by default
    assert openmax.level == "activation" and not openmax.has_centroids
    openmax.load_state_dict(loaded.openmax.state_dict())
    expected, _ = slow_openmax(openmax, outputs.logits, outputs.anchor_distances)
    np.testing.assert_allclose(outputs.open_set_probabilities, expected, rtol=0, atol=2e-6)
    rejected = [row[-1] > max(row[:-1]) or row[-1] > 0.45 for row in outputs.open_set_probabilities.tolist()]
    assert outputs.is_unknown.tolist() == rejected and 0 < sum(rejected) < 12


@pytest.mark.parametrize("other", [{"num_labels": 3}, {"openmax_centroids_per_class": 5}])
def test_a_fit_of_other_shapes_does_not_count(saved, other):
    (distance, _), folder, _ = saved
    loaded = MMSERForAudioClassification.from_pretrained(folder, ignore_mismatched_sizes=True, **other)
    if distance == "anchor" and "num_labels" not in other:  # there are no centroids
        assert loaded.openmax.is_fitted and loaded.openmax.has_thresholds
        return
    assert not loaded.openmax.is_fitted
    if distance == "centroid":
        assert (loaded.openmax.centroids == 0).all()
    if "num_labels" in other:
        assert not loaded.openmax.has_thresholds and (loaded.openmax.rejection_thresholds == NO_THRESHOLD).all()
    fit_openmax_by_chance(loaded)
    assert loaded.openmax.is_fitted and not loaded.openmax.has_thresholds


def test_weibulls_without_centroids_are_no_fit(rng):
    """As in a checkpoint of a version without centroids, whose `fitted` is 1, and after `fit` alone."""
    openmax = OpenMax(3, 2, centroids_per_class=4, embedding_size=SIZE)
    labels = np.arange(60) % 3
    older = OpenMax(3, alpha=2)
    older.fit(rng.uniform(0, 2, (60, 3)), labels, labels)
    content = older.state_dict()
    del content["rejection_thresholds"]
    openmax.load_state_dict(content, strict=False)
    assert older.is_fitted and not openmax.is_fitted
    openmax.fit(rng.uniform(0, 2, (60, 3)), labels, labels)
    assert not openmax.is_fitted
    openmax.fit_centroids(rng.normal(size=(60, SIZE)), labels)
    openmax.fit(rng.uniform(0, 2, (60, 3)), labels, labels)
    assert openmax.is_fitted and copy.deepcopy(openmax).is_fitted
    openmax.reset()
    assert not openmax.is_fitted and (openmax.centroids == 0).all() and (openmax.fitted == 0).all()


def test_the_shapes_follow_the_configuration():
    model = MMSERForAudioClassification(tiny_config(openmax_centroids_per_class=5, fusion_hidden_size=24))
    assert model.openmax.centroids.shape == (4, 5, 24)
    assert "openmax.centroids" not in MMSERForAudioClassification(tiny_config(openmax_distance="anchor")).state_dict()


def outputs_of(rng, size=60, num_labels=3):
    labels = np.arange(size) % num_labels
    return {
        "logits": 4 * np.eye(num_labels)[labels] + rng.normal(size=(size, num_labels)),
        "fused": rng.normal(size=(size, SIZE)) + 3 * np.eye(SIZE)[labels],
        "anchor_distances": rng.uniform(0.2, 1.8, (size, num_labels)),
        "labels": labels,
    }


@pytest.mark.parametrize("bad", ["fused", "anchor_distances", "logits"])
def test_values_that_are_not_finite_are_never_taken_for_too_few_clips(bad, rng):
    """The trainer goes on after `OpenMaxFitError`: an error of another kind must end the run."""
    openmax = OpenMax(3, 2, centroids_per_class=8 if bad == "fused" else 0, embedding_size=SIZE)
    train, held_out = outputs_of(rng), outputs_of(rng)
    openmax.fit_outputs(train, held_out, acceptance=0.9)
    assert openmax.is_fitted and openmax.has_thresholds
    openmax.reset()
    (train if bad != "logits" else held_out)[bad][:] = np.nan
    with pytest.raises(ValueError) as error:
        openmax.fit_outputs(train, held_out, acceptance=0.9)
    assert not isinstance(error.value, OpenMaxFitError)


def test_a_fit_that_fails_leaves_the_earlier_one(rng):
    model = tiny_model(openmax_distance="anchor", openmax_level="activation")
    fit_openmax_by_chance(model)
    before = {name: value.clone() for name, value in model.openmax.named_buffers()}
    with torch.no_grad():
        batch = tiny_batch(model, [2000] * 4, [3] * 4)
        batch["labels"] = (model(**batch).logits.argmax(dim=-1) + 1) % 4  # all of them wrong
    with pytest.raises(OpenMaxFitError, match="got 0 correct of 4"):
        model.fit_openmax([batch])
    assert model.openmax.is_fitted
    assert all(torch.equal(value, before[name]) for name, value in model.openmax.named_buffers())
