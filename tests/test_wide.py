# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/wide.py, and of the schedules that its trials change."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, log_loss

from benchmarks import pooled_states, teaching, wide
from benchmarks.pooled_states import Clips, Schedule
from benchmarks.tables import read_csv
from mmser.metrics import softmax
from mmser.optimizer import parameter_groups

SMALL_PARTS = {"classifier_num_layers": 2, "classifier_hidden_size": 32, "fusion_hidden_size": 32, "feature_size": 16}


@pytest.fixture
def clips():
    """60 clips of four classes that differ in the mean of their states, of five corpora, one with half the clips."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 4
    states = [
        torch.tensor(rng.normal(0, 0.3, (2, 3, 8)) + 2 * np.eye(8)[label], dtype=torch.float32) for label in labels
    ]
    corpora = np.array([f"corpus{max(0, row // 8 - 3)}" for row in range(60)])
    speakers = np.array([f"{corpus}/{row // 4}" for row, corpus in enumerate(corpora)])
    return Clips(states, torch.tensor(labels), corpora, speakers)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(pooled_states, "FIELDS", {**pooled_states.FIELDS, **SMALL_PARTS})


@pytest.mark.parametrize("changes", [{"hides_corpus": True}, {"sampling_temperature": 3.0}, {"weight_averaging": 0.9}])
def test_a_schedule_learns(clips, quick, changes):
    schedule = Schedule(20, 16, 3e-3, **changes)
    model = pooled_states.train(clips, {}, 0, schedule)
    answers = pooled_states.predict(model, clips)["logits"].argmax(axis=1)
    assert (answers == clips.labels.numpy()).mean() > 0.9
    counts = np.bincount(clips.labels, weights=schedule.draws(clips))
    np.testing.assert_allclose(model.config.class_counts, counts, atol=0.51)


def test_an_average_is_of_the_weights_of_all_steps(clips, quick, monkeypatch):
    """Of three steps, with the decay of the first ones: 2/11, 3/12 and then 4/13."""
    seen = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *args: (step(self, *args), seen.append(first(self)))[0]
    )

    def first(optimizer):
        return optimizer.param_groups[0]["params"][0].detach().double().clone()

    few = clips.take(np.arange(48))
    model = pooled_states.train(few, {}, 0, Schedule(1, 16, 3e-3, weight_averaging=0.9))
    torch.manual_seed(0)
    start = pooled_states.build(few, {}, np.ones(48))
    average = parameter_groups(start, 1.0)[0]["params"][0].detach().double()
    for weights, decay in zip(seen, (2 / 11, 3 / 12, 4 / 13), strict=True):
        average = decay * average + (1 - decay) * weights
    found = parameter_groups(model, 1.0)[0]["params"][0].detach().double()
    torch.testing.assert_close(found, average, rtol=1e-5, atol=1e-7)


def test_draws_are_those_of_the_classes_of_corpora(clips):
    np.testing.assert_array_equal(Schedule().draws(clips), 1)
    draws = Schedule(sampling_temperature=1e6).draws(clips)
    groups = {}
    for corpus, label, own in zip(clips.corpora, clips.labels.tolist(), draws, strict=True):
        groups[corpus, label] = groups.get((corpus, label), 0) + own
    np.testing.assert_allclose(list(groups.values()), 60 / 20, rtol=1e-4)  # each of 20 groups as often


def test_an_adversary_leaves_features_that_tell_less_of_the_corpus(clips, quick, monkeypatch):
    """The states say the corpus as loudly as the class; the features of a model that hides it say it less."""
    monkeypatch.setattr(pooled_states, "ADVERSARIAL_HEAD_WEIGHT", 1.0)
    _, corpora = np.unique(clips.corpora, return_inverse=True)
    states = [own + 2 * torch.eye(8)[4 + corpus % 4] for own, corpus in zip(clips.states, corpora, strict=True)]
    loud = Clips(states, clips.labels, clips.corpora, clips.speakers)

    def share_between_corpora(hides_corpus):
        model = pooled_states.train(loud, {}, 0, Schedule(20, 16, 3e-3, hides_corpus=hides_corpus))
        features = pooled_states.predict(model, loud)["features"]
        within = np.concatenate(
            [
                features[rows] - features[rows].mean(axis=0)
                for label in range(4)
                for corpus in range(len(set(corpora)))
                for rows in [(clips.labels.numpy() == label) & (corpora == corpus)]
            ]
        )
        of_class = np.concatenate(
            [features[rows] - features[rows].mean(axis=0) for rows in (clips.labels.numpy() == n for n in range(4))]
        )
        return 1 - within.var() / of_class.var()

    assert share_between_corpora(True) < share_between_corpora(False)


def test_corpora_are_held_out_whole_and_once(clips):
    folds = wide.folds_by_groups_of_corpora(clips)
    assert sorted(row for _, held_out in folds for row in held_out) == list(range(60))
    assert all(not set(clips.corpora[shown]) & set(clips.corpora[rows]) for shown, rows in folds)


def test_scores_against_scikit_learn(clips):
    logits = np.random.default_rng(1).normal(0, 2, (60, 4)).astype(np.float32)
    labels, answers = clips.labels.numpy(), logits.argmax(axis=1)
    found = wide.scores(logits, clips)
    assert found["weighted_f1"] == pytest.approx(f1_score(labels, answers, average="weighted"))
    own = [clips.corpora == name for name in set(clips.corpora)]
    means = [f1_score(labels[rows], answers[rows], average="weighted") for rows in own]
    assert found["by_corpus"] == pytest.approx(np.mean(means))
    assert found["nll"] == pytest.approx(log_loss(labels, softmax(logits.astype(np.float64))))


def test_a_trial_is_told_nothing_of_its_fold_nor_of_what_it_leaves_out(clips, monkeypatch):
    seen = []
    monkeypatch.setattr(wide, "train", lambda shown, *_: seen.append(shown))
    monkeypatch.setattr(wide, "predict", lambda model, others: {"logits": np.eye(4)[others.labels.numpy()]})
    folds = pooled_states.folds_by_speaker(clips)
    logits = wide.held_out_answers(wide.Trial(layers=2, leaves_out=("corpus1",)), clips, folds, 0)
    np.testing.assert_array_equal(logits.argmax(axis=1), clips.labels.numpy())
    for shown, (_, held_out) in zip(seen, folds, strict=True):
        assert not set(shown.speakers) & set(clips.speakers[held_out]) and "corpus1" not in shown.corpora
        assert {own.shape[1] for own in shown.states} == {2}


def test_validation_clips_are_judged_by_a_model_of_the_training_clips(clips, monkeypatch, tmp_path):
    """What is answered rightly is only in the validation clips, and these alone are scored."""
    shown = []

    def answers(trial, own, others, seed):
        shown.append(own)
        return np.eye(4)[others.labels.numpy() if len(others) == 20 else (others.labels.numpy() + 1) % 4]

    monkeypatch.setattr(wide, "answers_of", answers)
    lines = wide.measure(clips, np.arange(60) >= 40, [0], [wide.ALL], tmp_path / "lines.csv")
    assert (lines[0]["split"], lines[0]["weighted_f1"]) == (wide.VALIDATION, 1) and len(shown[0]) == 40
    assert set(shown[0].speakers) == set(clips.speakers[:40])


def test_a_stopped_run_goes_on(clips, monkeypatch, tmp_path):
    done = []

    def answers(trial, clips, folds, seed):
        done.append((len(folds), seed))
        return np.eye(4)[clips.labels.numpy()]

    monkeypatch.setattr(wide, "held_out_answers", answers)
    is_validation = np.arange(60) >= 40
    wide.measure(clips, is_validation, [0], [wide.ALL], tmp_path / "lines.csv")
    lines = wide.measure(clips, is_validation, [0, 1], [wide.ALL], tmp_path / "lines.csv")
    assert done == [(1, 0), (3, 0), (4, 0), (1, 1), (3, 1), (4, 1)] and lines == read_csv(tmp_path / "lines.csv")
    rows = wide.summarise(lines)
    assert [(row["split"], row["seeds"]) for row in rows] == [(split, 2) for split in wide.SPLITS]
    assert all(row["difference"] == "" for row in rows)


def test_cross_fitted_targets_are_of_teachers_that_heard_other_speakers(clips, monkeypatch):
    def teacher(shown, seed):
        def answers(others):
            assert not set(shown.speakers) & set(others.speakers)
            return np.log(np.tile([0.1, 0.2, 0.3, 0.4], (len(others), 1)))

        return answers

    monkeypatch.setattr(teaching, "train_small_network", teacher)
    shares = teaching.with_cross_fitted_targets(clips, 0).shares.numpy()
    np.testing.assert_allclose(shares, 0.5 * np.eye(4)[clips.labels] + 0.5 * np.array([0.1, 0.2, 0.3, 0.4]), rtol=1e-6)


def test_an_ensemble_teaches_the_mean_of_its_probabilities(clips, monkeypatch):
    seeds, rng = [], np.random.default_rng(0)
    logits = rng.normal(size=(6, len(clips), 4))
    monkeypatch.setattr(
        *(teaching, "train_small_network"), lambda shown, seed: seeds.append(seed) or (lambda others: logits[seed])
    )
    shares = teaching.with_targets_of_an_ensemble(clips, 1).shares.numpy()
    powers = np.exp(logits[3:])
    expected = (powers / powers.sum(axis=-1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(shares, 0.5 * np.eye(4)[clips.labels] + 0.5 * expected, rtol=1e-5)
    assert seeds == [3, 4, 5]


def test_pseudo_labels_are_of_calm_clips_alone(clips, monkeypatch):
    """Their teachers learn from all others; a corpus that has its own neutral keeps its labels."""
    monkeypatch.setattr(teaching, "CALM_CORPORA", ("corpus1",))
    is_calm = (clips.corpora == "corpus1") & (clips.labels.numpy() == 0)
    seen = []
    monkeypatch.setattr(
        *(teaching, "train_small_network"),
        lambda shown, seed: seen.append(len(shown)) or (lambda others: np.tile([0.0, 0, 9, 0], (len(others), 1))),
    )
    labels = teaching.with_pseudo_labels(clips, 0).labels.numpy()
    np.testing.assert_array_equal(labels, np.where(is_calm, 2, clips.labels.numpy()))
    assert is_calm.any() and seen == [60 - is_calm.sum()] * 3
    without = clips.take(~is_calm)
    assert teaching.with_pseudo_labels(without, 0).labels.equal(without.labels)


@pytest.mark.parametrize("trial", [wide.TRIALS["soft targets"], wide.TRIALS["taught by an ensemble"]])
def test_a_taught_model_learns(clips, quick, trial, monkeypatch):
    monkeypatch.setattr(pooled_states, "SMALL_NETWORK_STEPS", 50)
    taught = wide.Trial(teach=trial.teach, schedule=Schedule(20, 16, 3e-3))
    assert (wide.answers_of(taught, clips, clips, 0).argmax(axis=1) == clips.labels.numpy()).mean() > 0.9


def test_a_model_learns_the_sex_where_it_is_known(clips, quick, monkeypatch):
    sexes = torch.where(torch.arange(60) < 30, torch.arange(60) % 2, -100)
    own = replace(clips, targets={"sex": sexes})
    trial = replace(wide.TRIALS["learns the sex too"], schedule=Schedule(20, 16, 3e-3))
    learned = []
    train = pooled_states.train
    monkeypatch.setattr(wide, "train", lambda *given: learned.append(train(*given)) or learned[0])
    answers = wide.answers_of(trial, own, own, 0)
    assert (answers.argmax(axis=1) == clips.labels.numpy()).mean() > 0.9
    found = pooled_states.predict(learned[0], own)["auxiliary_sex"].argmax(axis=1)
    assert (found[:30] == sexes[:30].numpy()).mean() > 0.9


def test_copies_are_learned_from_beside_their_clips(clips):
    with pytest.raises(ValueError, match="no augmented copies"):
        clips.with_copies()
    own = replace(clips, augmented=[states + 1 for states in clips.states]).take(np.arange(10, 20))
    both = own.with_copies()
    assert len(both) == 20 and both.labels.equal(clips.labels[10:20].repeat(2))
    torch.testing.assert_close(torch.stack(both.states[10:]), torch.stack(both.states[:10]) + 1)
    assert list(both.speakers) == list(clips.speakers[10:20]) * 2 and own.layers(2).augmented is None


def test_an_ensemble_answers_with_the_mean_probability(clips, quick):
    schedule = Schedule(2, 16, 3e-3)
    alone = [wide.answers_of(wide.Trial(schedule=schedule), clips, clips, seed) for seed in (1, 11, 21)]
    together = wide.answers_of(wide.Trial(schedule=schedule, members=3), clips, clips, 1)
    expected = np.mean([softmax(logits.astype(np.float64)) for logits in alone], axis=0)
    np.testing.assert_allclose(softmax(together.astype(np.float64)), expected, rtol=1e-4)


def test_a_soup_is_the_mean_of_trainings_that_share_their_start(clips, quick):
    schedule = Schedule(4, 16, 3e-3)
    found = wide.soup(clips, {}, [0, 10], schedule).state_dict()
    start = pooled_states.train(clips, {}, 0, schedule)
    members = [
        pooled_states.train(clips, {}, seed, replace(schedule, epochs=2), start).state_dict() for seed in (0, 10)
    ]
    assert any(not value.equal(members[1][name]) for name, value in members[0].items())
    unmoved = pooled_states.train(clips, {}, 10, replace(schedule, epochs=0), start).state_dict()
    assert all(value.equal(unmoved[name]) for name, value in start.state_dict().items())
    for name, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (members[0][name] + members[1][name]) / 2)
