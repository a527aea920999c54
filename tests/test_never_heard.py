# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/never_heard.py."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

from benchmarks import never_heard, pooled_states
from benchmarks.never_heard import LAYER, TRAINED, HeldOut, all_held_out, divide
from benchmarks.pooled_states import Clips
from benchmarks.tables import read_csv

SMALL_PARTS = {"classifier_num_layers": 2, "classifier_hidden_size": 32, "fusion_hidden_size": 32, "feature_size": 16}


def made_clips(corpora, seed, number=32):
    """Clips of four classes, two frames each; all of the corpus "new" sound more like the first class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(number * len(corpora)) % 4
    names = np.repeat(corpora, number)
    speakers = np.array([f"{name}/{seed}-{row % number // 8}" for row, name in enumerate(names)])
    states = rng.normal(0, 0.4, (len(labels), 2, 2, 8)) + 2 * np.eye(8)[labels][:, None, None]
    states[names == "new", ..., 0] += 2.2
    return Clips(list(torch.from_numpy(states).float()), torch.from_numpy(labels), names, speakers)


@pytest.fixture
def clips():
    """A first set of a, b and new, a second one of a, new and c; clips of none of the classes of new."""
    first, second = ("a", "b", "new"), ("a", "new", "c")
    names = {"train": first, "validation": first, "test": first, "wide train": second, "wide validation": second}
    found = {name: made_clips(corpora, seed) for seed, (name, corpora) in enumerate(names.items())}
    other = made_clips(["new"], 9, 12)
    return {**found, "ood": Clips(other.states, torch.full((12,), -1), other.corpora, other.speakers)}


def test_each_corpus_and_each_shared_language_is_held_out():
    found = all_held_out({"a": "en", "c": "de", "b": "en"})
    assert found == [
        HeldOut("a", "corpus", ("a",)),
        HeldOut("b", "corpus", ("b",)),
        HeldOut("c", "corpus", ("c",)),
        HeldOut("en", "language", ("a", "b")),
    ]


def test_what_is_held_out_is_nowhere_else_and_comes_once(clips):
    division = divide(clips, HeldOut("x", "language", ("new", "c")))
    for part in (division.train, division.validation, division.test):
        assert not {"new", "c"} & set(part.corpora)
    assert len(division.train) == 3 * 32  # a and b of the first set, a of the second
    # `new` is in both sets: its clips are those of the first; `c` has only the second
    seeds = {speaker.split("-")[0] for speaker in division.never_heard.speakers}
    assert seeds == {"new/0", "new/1", "new/2", "c/3", "c/4"}
    assert len(division.unknown) == 12 and not len(divide(clips, HeldOut("b", "corpus", ("b",))).unknown)


def test_a_draw_has_as_many_of_each_class_and_leaves_half():
    labels = np.repeat([0, 1, 3], [100, 30, 50])
    rows = never_heard.draw(labels, 0)
    assert np.bincount(labels[rows]).tolist() == [20, 15, 0, 20] and len(set(rows)) == len(rows)
    assert set(rows) == set(never_heard.draw(labels, 0)) != set(never_heard.draw(labels, 1))


def test_scores_are_scikit_learns():
    rng = np.random.default_rng(0)

    def outputs(number):
        return {
            "logits": rng.normal(size=(number, 4)),
            "labels": rng.integers(0, 4, number),
            "uncertainty": rng.uniform(size=number),
            "rejection_score": rng.uniform(size=number),
            "is_unknown": rng.uniform(size=number) > 0.7,
        }

    new, known, other = outputs(50), outputs(30), outputs(20)
    found = never_heard.score(new, known, other)
    for prefix, own in (("", new), ("known_", known)):
        answers = own["logits"].argmax(axis=1)
        assert found[f"{prefix}weighted_f1"] == pytest.approx(f1_score(own["labels"], answers, average="weighted"))
        wrong = answers != own["labels"]
        assert found[f"{prefix}error_auroc"] == pytest.approx(roc_auc_score(wrong, own["uncertainty"]))
        assert found[f"{prefix}rejected"] == own["is_unknown"].mean()
    both = np.concatenate([new["uncertainty"], known["uncertainty"]])
    assert found["new_auroc"] == pytest.approx(roc_auc_score(np.arange(80) < 50, both))
    both = np.concatenate([other["rejection_score"], new["rejection_score"]])
    assert found["unknown_auroc"] == pytest.approx(roc_auc_score(np.arange(70) < 20, both))
    assert found["weighted_f1_low"] < found["weighted_f1"] < found["weighted_f1_high"]
    assert "unknown_auroc" not in never_heard.score(new, known, None)


def test_the_interval_draws_speakers():
    """Speakers whose clips are all right or all wrong: as wide as if each were one clip, not ten."""
    right = np.repeat(np.arange(20) < 14, 10)
    labels = np.tile(np.arange(4), 50)
    logits = np.eye(4)[np.where(right, labels, (labels + 1) % 4)]
    own = {"logits": logits, "labels": labels, "uncertainty": np.linspace(0, 1, 200), "rejection_score": np.zeros(200)}
    own["is_unknown"] = np.zeros(200, dtype=bool)

    def width(**options):
        found = never_heard.score(own, own, None, **options)
        return found["weighted_f1_high"] - found["weighted_f1_low"]

    by_speaker = width(speakers=[str(clip // 10) for clip in range(200)])
    assert by_speaker == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 20), rel=0.15)  # of a share of 20 speakers
    assert by_speaker > 2.5 * width()


def test_a_score_that_a_draw_has_not_is_left_out_of_its_mean():
    """Where no answer is wrong nothing tells wrong ones apart."""
    draws = [{"f1": 1.0, "auroc": np.nan, "none": np.nan}, {"f1": 0.5, "auroc": 0.75, "none": np.nan}]
    assert never_heard.mean_over_draws(draws) == {"f1": 0.75, "auroc": 0.75, "none": None}


def test_adapting_helps_where_classes_sound_otherwise_and_a_stopped_run_goes_on(clips, monkeypatch, tmp_path):
    monkeypatch.setattr(pooled_states, "FIELDS", {**pooled_states.FIELDS, **SMALL_PARTS})
    monkeypatch.setattr(never_heard, "EQUAL_LAYERS", replace(never_heard.EQUAL_LAYERS, epochs=20, batch_size=16))
    monkeypatch.setattr(never_heard, "DRAWS", 1)
    monkeypatch.setattr(never_heard, "all_held_out", lambda languages: [HeldOut("new", "corpus", ("new",))])
    lines = never_heard.measure(clips, {"new": "xx"}, [0], tmp_path / "lines.csv")
    found = {line["variant"]: line for line in lines}
    assert set(found) == {TRAINED, *never_heard.ADAPTING}
    assert found[TRAINED]["known_weighted_f1"] > 0.9
    for variant in never_heard.ADAPTING:
        assert found[variant]["weighted_f1"] > found[TRAINED]["weighted_f1"] + 0.05
        assert found[variant]["unknown_auroc"] >= 0
    monkeypatch.setattr(never_heard, "measure_one", lambda *_: pytest.fail("measured again"))
    assert never_heard.measure(clips, {"new": "xx"}, [0], tmp_path / "lines.csv") == read_csv(tmp_path / "lines.csv")
    tables = never_heard.make_tables(lines)
    assert "| new " in tables["never_heard:corpora"] and LAYER in tables["never_heard:adapted"]
