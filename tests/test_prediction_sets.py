# SPDX-License-Identifier: Apache-2.0
"""Tests of `conformal_mmser`: the sets against a loop, their thresholds against fractions, their coverage against
simulation; then the pipeline, the trainer's calibration, saving, and the table of the report.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from tiny import tiny_config
from tiny_corpus import NAMES, tiny_model, tiny_processor

from conformal_mmser import COVERAGES, PredictionSets, check_coverage, conformal_threshold, likelier_mass
from mmser.calibration import fit_temperature
from mmser.metrics import softmax
from mmser.scores import describe_sets
from modeling_mmser import MMSERForAudioClassification
from processing_mmser import MMSERPipeline


def simulate(rng, size, speakers=None):
    """Logits [N, 4] that are three times too sure, and labels drawn as the logits should be; a speaker shifts them."""
    logits = rng.normal(size=(size, 4))
    if speakers is not None:
        logits += 2 * rng.normal(size=(speakers.max() + 1, 4))[speakers]
        noise = 1.5 * rng.normal(size=(speakers.max() + 1, 4))[speakers]  # what the model does not hear of a speaker
    else:
        noise = 0.0
    gumbel = rng.gumbel(size=logits.shape)
    return 3 * logits, (logits + noise + gumbel).argmax(axis=1)


# --- the sets --------------------------------------------------------------------------------------------------------


def test_a_set_takes_the_likeliest_labels_until_their_mass_exceeds_the_threshold():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([0.5] * 5, size=200)
    sets = PredictionSets([0.7] * len(COVERAGES))
    members = sets(torch.from_numpy(probabilities), 0.9).numpy()
    for row, own in zip(probabilities, members, strict=True):
        expected, mass = set(), 0.0
        for label in sorted(range(5), key=lambda label: -row[label]):
            expected.add(label)
            mass += row[label]
            if mass > 0.7:
                break
        assert set(np.flatnonzero(own)) == expected
    assert members.sum(axis=1).min() == 1 and members.sum(axis=1).max() > 2  # never empty


def test_labels_that_tie_are_in_together():
    probabilities = torch.tensor([[0.4, 0.2, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25]])
    expected = torch.tensor([[0.0, 0.4, 0.4, 0.4], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(likelier_mass(probabilities), expected)


@pytest.mark.parametrize("grouped", [False, True])
def test_thresholds_against_fractions(grouped):
    """Each unit weighs 1 / (K + 1), shared out among its clips; the smallest score with that much weight below it."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        size = int(rng.integers(3, 40))
        scores = rng.choice(np.linspace(0, 1, 15), size)
        units = rng.integers(0, 6, size) if grouped else np.arange(size)
        counts = {unit: int((units == unit).sum()) for unit in units.tolist()}
        for percent in (50, 70, 80, 90, 95):
            expected, weight = None, Fraction(0)
            for score, unit in sorted(zip(scores.tolist(), units.tolist(), strict=True)):
                weight += Fraction(1, (len(counts) + 1) * counts[unit])
                if weight >= Fraction(percent, 100):
                    expected = score
                    break
            assert conformal_threshold(scores, percent / 100, units) == expected
    if not grouped:
        assert conformal_threshold(np.arange(19.0), 0.95, np.arange(19)) == 18.0
        assert conformal_threshold(np.arange(18.0), 0.95, np.arange(18)) is None


# --- coverage --------------------------------------------------------------------------------------------------------


def coverages(draws, size, seed, scale=1.0):
    """Mean coverage of new clips at 0.8, 0.9 and 0.95, and its standard error, over calibrations on `size` clips."""
    rng, seen = np.random.default_rng(seed), []
    new, new_labels = simulate(rng, 4000)
    for _ in range(draws):
        logits, labels = simulate(rng, size)
        temperature = fit_temperature(logits, labels) if scale is None else scale
        sets = PredictionSets()
        sets.fit(softmax(logits / temperature), labels)
        probabilities = torch.from_numpy(softmax(new / temperature))
        own = [sets(probabilities, coverage).numpy() for coverage in (0.8, 0.9, 0.95)]
        seen.append([members[np.arange(4000), new_labels].mean() for members in own])
    return np.mean(seen, axis=0), np.std(seen, axis=0) / math.sqrt(draws) + 0.5 / math.sqrt(4000)


@pytest.mark.parametrize("size", [49, 200])
def test_coverage_is_as_asked_whatever_the_model_is_worth(size):
    """Of exchangeable clips exactly ceil((n + 1) coverage) / (n + 1), also where the scores are far too sure."""
    found, error = coverages(150, size, seed=2)
    exact = np.array([math.ceil((size + 1) * c - 1e-9) / (size + 1) for c in (0.8, 0.9, 0.95)])
    assert (np.abs(found - exact) < 4 * error).all(), (found, exact, error)


def test_a_temperature_from_the_same_clips_costs_no_coverage():
    found, error = coverages(8, 200, seed=3, scale=None)
    assert (found > np.array([0.8, 0.9, 0.95]) - 4 * error - 0.01).all(), found


def test_coverage_of_new_speakers_whose_clips_are_alike():
    """29 speakers allow up to 29 / 30 for a new one; clip by clip, some speakers would decide for all."""
    rng, by_speaker, by_clip = np.random.default_rng(4), [], []
    for _ in range(200):
        calibration = np.repeat(np.arange(29), rng.integers(1, 40, 29))
        everyone = np.concatenate([calibration, np.full(20, 29)])
        logits, labels = simulate(rng, len(everyone), everyone)
        probabilities, is_new = softmax(logits / 3), everyone == 29
        for names, seen in ((everyone[~is_new], by_speaker), (None, by_clip)):
            sets = PredictionSets()
            most = sets.fit(probabilities[~is_new], labels[~is_new], names)
            assert most == pytest.approx(29 / 30 if names is not None else len(calibration) / (len(calibration) + 1))
            members = sets(torch.from_numpy(probabilities[is_new]), 0.9).numpy()
            seen.append(members[np.arange(20), labels[is_new]].mean())
    error = np.std(by_speaker) / math.sqrt(200)
    assert np.mean(by_speaker) > 0.9 - 3 * error and np.mean(by_speaker) > np.mean(by_clip)


def test_too_few_units_and_growing_sets():
    """Without speakers enough, the clips decide; without clips enough, all labels are in. A set never shrinks."""
    rng = np.random.default_rng(5)
    logits, labels = simulate(rng, 30)
    sets = PredictionSets()
    assert not sets.is_fitted
    sets.fit(softmax(logits), labels, [f"s{i % 5}" for i in range(30)])
    assert sets.is_fitted and (sets.thresholds.diff() >= 0).all()
    assert sets.threshold(0.99) == 1.0  # 30 clips allow up to 30 / 31
    assert sets(torch.tensor([[0.97, 0.01, 0.01, 0.01]]), 0.99).all()
    plain = PredictionSets()
    plain.fit(softmax(logits), labels)
    assert sets.threshold(0.95) >= plain.threshold(0.95)
    assert sets.threshold(0.801) == sets.threshold(0.81) and sets.threshold(0.8) == sets.thresholds[30].item()
    sets.reset()
    assert not sets.is_fitted


@pytest.mark.parametrize("coverage", [0.3, 1.0, 0.995, "0.9", float("nan"), [0.9]])
def test_a_coverage_that_no_set_has_is_refused(coverage):
    with pytest.raises(ValueError, match=r"`return_set` must be True \(0\.9\) or a coverage from 0\.5 to 0\.99"):
        check_coverage(coverage)
    assert check_coverage(True) == 0.9 and check_coverage(0.75) == 0.75


# --- in use ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    model = tiny_model().eval()
    model.prediction_sets.fit(*simulated_fit())
    return MMSERPipeline(model, processor=tiny_processor(), device="cpu")


def simulated_fit():
    logits, labels = simulate(np.random.default_rng(6), 300)
    return softmax(logits / 12), labels


def clip(seconds=0.4, seed=0):
    samples = 0.1 * np.random.default_rng(seed).standard_normal(round(16000 * seconds))
    return {"raw": samples, "sampling_rate": 16000, "text": "what a joy"}


def test_the_pipeline_gives_the_set_of_each_clip(classifier):
    for asked, coverage in ((True, 0.9), (0.6, 0.6), (0.95, 0.95)):
        results = classifier(clip(), return_set=asked)
        scores = {result["label"]: result["score"] for result in results}
        expected, mass = [], 0.0
        for label in sorted(scores, key=scores.__getitem__, reverse=True):
            if mass > classifier.model.prediction_sets.threshold(coverage):
                break
            expected.append(label)
            mass += scores[label]
        assert [result["prediction_set"] for result in results] == [expected] * len(NAMES)
    first = classifier(clip(), return_set=0.95, top_k=1, return_uncertainty=True)
    assert len(first) == 1 and first[0]["prediction_set"] == expected and "uncertainty" in first[0]
    for options in ({}, {"return_set": False}):
        assert "prediction_set" not in classifier(clip(), **options)[0]
    several = classifier([clip(), clip(0.9, 1)], batch_size=2, return_set=0.95)
    assert several[0][0]["prediction_set"] == expected


def test_a_recording_has_sets_of_its_chunks_only(classifier):
    recording = {name: value for name, value in clip(1.0).items() if name != "text"}
    result = classifier(recording, chunk_length_s=0.4, return_set=True)
    assert all(chunk["scores"][0]["prediction_set"] for chunk in result["chunks"])
    assert all(score.keys() == {"label", "score"} for score in result["scores"])


def test_what_cannot_be_is_refused(classifier):
    with pytest.raises(ValueError, match=r"got 0\.3"):
        classifier(clip(), return_set=0.3)
    with pytest.raises(ValueError, match="leave out `allowed_labels`"):
        classifier(clip(), return_set=True, allowed_labels=NAMES[:2])
    classifier.model.prediction_sets.reset()
    with pytest.raises(ValueError, match=r"`return_set` needs thresholds, and this model has none: calibrate it"):
        classifier(clip(), return_set=True)


def test_saved_loaded_and_kept_in_float32(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    thresholds = classifier.model.prediction_sets.thresholds
    for dtype in (torch.float32, torch.bfloat16):
        loaded = MMSERForAudioClassification.from_pretrained(tmp_path, dtype=dtype)
        assert torch.equal(loaded.prediction_sets.thresholds, thresholds)
    assert (tmp_path / "conformal_mmser.py").is_file()


def test_a_checkpoint_without_them_loads_in_silence(tmp_path):
    torch.manual_seed(0)
    model = MMSERForAudioClassification(tiny_config())
    state = model.state_dict()
    del state["prediction_sets.thresholds"]
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = MMSERForAudioClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not loaded.prediction_sets.is_fitted


def test_the_table_of_the_report_counts():
    logits, labels = simulate(np.random.default_rng(7), 500)
    sets = PredictionSets()
    sets.fit(*simulated_fit())
    described = describe_sets({"logits": logits / 12, "labels": labels}, sets)
    assert list(described) == ["80 %", "90 %", "95 %"]
    for name, row in described.items():
        threshold = sets.threshold(float(name.split()[0]) / 100)
        sizes, hits = [], []
        for p, label in zip(softmax(logits / 12), labels, strict=True):
            own = {c for c in range(4) if sum(x for x in p if x > p[c]) <= threshold}
            sizes.append(len(own))
            hits.append(label in own)
        assert row["mean_set_size"] == pytest.approx(np.mean(sizes)) and row["covered"] == np.mean(hits)
        assert row["one_label"] == np.mean(np.array(sizes) == 1)
        assert row["covered_interval"][0] < row["covered"] < row["covered_interval"][1]
    assert describe_sets({}, None) == {}
