# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/parts.py and the small trainings that it measures with."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from sklearn.neighbors import NearestCentroid

from benchmarks import parts, pooled_states
from benchmarks.pooled_states import Clips, Schedule
from benchmarks.tables import ROOT, read_csv

SMALL_PARTS = {"classifier_num_layers": 2, "classifier_hidden_size": 32, "fusion_hidden_size": 32, "feature_size": 16}


@pytest.fixture
def clips():
    """48 clips of four classes that differ in the mean of their states, of three corpora and twelve speakers."""
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 4
    states = [
        torch.tensor(rng.normal(0, 0.3, (rng.integers(3, 9), 2, 8)) + 2 * np.eye(8)[label], dtype=torch.float32)
        for label in labels
    ]
    corpora = np.array([f"corpus{row // 4 % 3}" for row in range(48)])
    speakers = np.array([f"{corpus}/{row // 4}" for row, corpus in enumerate(corpora)])
    return Clips(states, torch.tensor(labels), corpora, speakers)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(pooled_states, "FIELDS", {**pooled_states.FIELDS, **SMALL_PARTS})
    monkeypatch.setattr(parts, "RECIPE", Schedule(30, 16, weight_averaging=0.9))
    monkeypatch.setattr(pooled_states, "SMALL_NETWORK_STEPS", 400)


def test_two_frames_have_the_mean_and_the_deviation_of_all(clips):
    for own, two in zip(clips.states, pooled_states.two_frames(clips).states, strict=True):
        assert two.shape == (2, 2, 8)
        np.testing.assert_allclose(two.numpy().mean(axis=0), own.numpy().mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(two.numpy().std(axis=0), own.numpy().std(axis=0), atol=1e-6)


def test_two_frames_stand_for_a_clip_where_each_layer_is_pooled(clips):
    """The whole model answers as it does for the clip itself, and as with plain statistics of the two frames."""
    two = pooled_states.two_frames(clips)
    model = pooled_states.build(clips, {**SMALL_PARTS, "pooling_type": "layer_statistics"}).eval()
    with torch.no_grad():
        model.mmser.layer_weights.copy_(torch.tensor([0.7, -0.4]))
        model.mmser.state_norm.scale.uniform_(0.5, 2)
    answers = pooled_states.predict(model, clips)["logits"]
    np.testing.assert_allclose(pooled_states.predict(model, two)["logits"], answers, atol=1e-4)
    model.config.pooling_type = "statistics"
    np.testing.assert_allclose(pooled_states.predict(model, two)["logits"], answers, atol=1e-4)
    assert np.abs(pooled_states.predict(model, clips)["logits"] - answers).max() > 1e-3


def test_folds_share_no_speaker_and_hold_each_clip_out_once(clips):
    for folds, groups in (
        (pooled_states.folds_by_speaker(clips), clips.speakers),
        (pooled_states.folds_by_corpus(clips), clips.corpora),
    ):
        assert sorted(row for _, held_out in folds for row in held_out) == list(range(48))
        assert all(not set(groups[shown]) & set(groups[held_out]) for shown, held_out in folds)


def test_take_join_and_layers_keep_clips_together(clips):
    chosen = clips.take(np.arange(48) % 4 == 1)
    assert set(chosen.labels.tolist()) == {1} and len(chosen.states) == len(chosen) == 12
    both = pooled_states.join(chosen, clips.take([0, 5]))
    assert both.labels.tolist()[-2:] == [0, 1] and both.states[-1] is clips.states[5]
    assert clips.layers(1).states[3].shape[1] == 1 and clips.layers(None).states[3].shape[1] == 2


@pytest.mark.parametrize("variant", [parts.ALL, "none of these", parts.SMALL])
def test_a_training_learns_and_a_clip_does_not_depend_on_its_batch(clips, quick, variant):
    clips = clips if variant != parts.SMALL else pooled_states.two_frames(clips)
    assert (parts.answers_of(variant, clips, clips, 0) == clips.labels.numpy()).mean() > 0.9
    if variant == parts.ALL:
        model = pooled_states.train(clips, {}, 0, parts.RECIPE)
        together = pooled_states.predict(model, clips)["logits"]
        alone = [pooled_states.predict(model, clips.take([row]))["logits"][0] for row in range(6)]
        np.testing.assert_allclose(together[:6], alone, atol=1e-4)


def test_no_clip_is_answered_by_a_model_of_its_speaker_or_its_corpus(clips, monkeypatch):
    seen = []

    def answers(variant, shown, others, seed):
        seen.append((variant, shown, others))
        return others.labels.numpy()

    monkeypatch.setattr(parts, "answers_of", answers)
    split = {"train": clips.take(np.arange(36)), "validation": clips.take(np.arange(36, 48))}
    split["test"] = clips.take(np.arange(12))
    by_speaker, by_corpus = parts.ablations(split, 0), parts.against_small(split, 0)
    assert {value for _, _, value in by_speaker + by_corpus} == {1.0}
    assert len(by_speaker) == 2 * (len(parts.WITHOUT) + 2) and len(by_corpus) == 5
    for variant in (parts.ALL, parts.LARGER_BATCHES, parts.SMALL):
        on_validation, *held_out = [pair[1:] for pair in seen if pair[0] == variant]
        assert on_validation[0] is split["train"] and on_validation[1] is split["validation"]
        of_speakers, of_corpora = held_out[:3], held_out[3:6]
        assert all(not set(shown.speakers) & set(others.speakers) for shown, others in of_speakers)
        assert all(not set(shown.corpora) & set(others.corpora) for shown, others in of_corpora)
        for folds in (of_speakers, of_corpora):
            assert sum(len(others) for _, others in folds) == 48
        # The test clips are read for the whole model and the small network alone
        assert (held_out[6:] != []) == (variant != parts.LARGER_BATCHES)


def test_all_variants_are_trained_by_the_schedule_of_the_recipe(clips, monkeypatch):
    recipe = json.loads((ROOT / "recipes" / "real_speech_all_parts.json").read_text(encoding="utf-8"))
    assert (
        Schedule(
            epochs=recipe["num_train_epochs"],
            batch_size=recipe["per_device_train_batch_size"],
            learning_rate=recipe["learning_rate"],
            weight_averaging=recipe["weight_averaging"],
        )
        == parts.RECIPE
    )
    assert recipe["config_overrides"] == pooled_states.FIELDS
    assert recipe["lr_multipliers"] == pooled_states.LR_MULTIPLIERS
    assert recipe["weight_decay"] == pooled_states.WEIGHT_DECAY
    seen = []
    monkeypatch.setattr(parts, "train", lambda *given: seen.append(given))
    monkeypatch.setattr(parts, "predict", lambda model, others: {"logits": np.eye(4)[others.labels.numpy()]})
    for variant in (parts.ALL, "no blocks", parts.LARGER_BATCHES):
        parts.answers_of(variant, clips, clips, 5)
    assert [given[1] for given in seen] == [{}, {"classifier_num_layers": 0}, {}]
    assert [given[3] for given in seen] == [parts.RECIPE, parts.RECIPE, Schedule(batch_size=64)]


def test_few_shots_against_scikit_learn():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 25)
    features = rng.normal(0, 1, (100, 6)) + labels[:, None] * 0.5
    score = parts._nearest_mean(features, labels, np.random.default_rng(3))
    draws = np.random.default_rng(3)
    shown = np.concatenate([draws.permutation(np.flatnonzero(labels == label))[:10] for label in range(4)])
    others = np.setdiff1d(np.arange(100), shown)
    answers = NearestCentroid().fit(features[shown], labels[shown]).predict(features[others])
    assert score == pytest.approx(f1_score(labels[others], answers, average="weighted"))


def test_a_stopped_run_goes_on(monkeypatch, tmp_path):
    done = []
    monkeypatch.setattr(
        parts,
        "MEASUREMENTS",
        {name: lambda clips, seed, name=name: done.append((name, seed)) or [("m", "v", 0.5)] for name in "ab"},
    )
    parts.measure({}, [0], tmp_path / "lines.csv")
    lines = parts.measure({}, [0, 1], tmp_path / "lines.csv")
    assert done == [("a", 0), ("b", 0), ("a", 1), ("b", 1)] and lines == read_csv(tmp_path / "lines.csv")


def test_differences_are_to_the_first_variant():
    line = {"part": "blocks", "measure": "m", "seed": 0}
    lines = [{**line, "variant": "all parts", "value": 0.7}, {**line, "variant": "no blocks", "value": 0.6}]
    assert [row["difference"] for row in parts.summarise(lines)] == ["", "-0.100"]
    assert "no blocks" in parts.make_tables(lines)["parts:measures"]
