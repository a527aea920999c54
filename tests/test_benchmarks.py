# SPDX-License-Identifier: Apache-2.0
"""Tests of `benchmarks/open_set.py`: who is chosen by and who judged by, what is fitted, the report."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from configuration_mmser import MMSERConfig
from mmser.metrics import softmax
from mmser.open_set import auroc
from openmax_mmser import OpenMax

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "open_set.py"


def clips(speakers, rng):
    """Random outputs of clips by these (corpus, speaker) pairs."""
    count = len(speakers)
    return {
        "logits": rng.standard_normal((count, 3)),
        "labels": rng.integers(3, size=count),
        "corpus": np.array([corpus for corpus, _ in speakers]),
        "speaker": np.array([speaker for _, speaker in speakers]),
    }


def test_unknown_clips_are_divided_by_speaker_within_a_corpus(script, tmp_path):
    rng = np.random.default_rng(0)
    known = clips([("a", "1"), ("b", "2"), ("b", "")], rng)
    unknown = clips([("a", "1"), ("a", "2"), ("b", "2"), ("b", ""), ("a", "1")], rng)
    assert script.spoken_by(unknown, known).tolist() == [True, False, True, False, True]
    for name, outputs in (("validation", known), (script.WHOLE[0], unknown)):
        np.savez(tmp_path / f"{name}.npz", **outputs)
    loaded = script.load_clips(tmp_path)
    assert script.speakers(loaded[script.CHOOSING[0]]) == [("a", "1"), ("b", "2"), ("a", "1")]
    assert script.speakers(loaded[script.FINAL[0]]) == [("a", "2"), ("b", "")]
    np.savez(tmp_path / "validation.npz", **clips([("c", "1")], rng))
    with pytest.raises(ValueError, match=r"0 of the 5 clips of --ood_dir are by speakers"):
        script.load_clips(tmp_path)


def test_folds_keep_speakers_together_and_cover_every_clip_once(script):
    speakers = [("a", str(index % 5)) for index in range(30)] + [("b", "0")] * 7 + [("b", "")] * 3
    folds = script.speaker_folds(clips(speakers, np.random.default_rng(0)))
    assert (np.sum(folds, axis=0) == 1).all()
    for name in {pair for pair in speakers if pair[1]}:
        assert sum(any(pair == name for pair, own in zip(speakers, fold, strict=True) if own) for fold in folds) == 1


def test_cross_fitting_changes_nothing_for_a_score_that_is_not_fitted(script):
    rng = np.random.default_rng(0)
    speakers = [("a", str(index)) for index in rng.integers(9, size=80)]
    sets = {name: clips(speakers, rng) for name in ("validation", "test", *script.CHOOSING, *script.FINAL)}
    sets[script.WHOLE[0]] = clips(speakers, rng)
    method = script.Method("rounded")  # with ties
    family = lambda held_out: lambda outputs: {method: outputs["logits"][:, 0].round(1)}  # noqa: E731
    values = script.means(script.evaluate(family, sets)[method])
    np.testing.assert_allclose(values["cross_fitted"], values["validation"], atol=1e-12)


def test_ranks_count_ties_one_half(script):
    assert script.rank_among(np.array([0, 1, 2, 9]), np.array([2, 1, 1, 3])).tolist() == [0, 0.25, 0.625, 1]


def emotions(count, rng, unknown=False):
    """Outputs of clips of 3 classes in 8 dimensions, most of them classified right; the unknown ones lie elsewhere."""
    labels = rng.integers(3, size=count)
    vectors = (3 * np.eye(8)[labels + 4 * unknown] + rng.standard_normal((count, 8))).astype(np.float32)
    return {
        "logits": vectors[:, :3],
        "fused": vectors,
        "features": vectors + 1,
        "anchor_distances": np.linalg.norm(vectors[:, None] - 3 * np.eye(3, 8)[None], axis=-1).astype(np.float32),
        "uncertainty": rng.random(count).astype(np.float32),
        "labels": labels,
        "corpus": np.array(["a"] * count),
        "speaker": rng.integers(6, size=count).astype(str),
    }


@pytest.fixture(scope="module")
def sets(script):
    rng = np.random.default_rng(0)
    known = {name: emotions(count, rng) for name, count in (("train", 200), ("validation", 120), ("test", 60))}
    unknown = {name: emotions(30, rng, unknown=True) for name in (*script.CHOOSING, *script.FINAL, script.WHOLE[0])}
    return known | unknown


def test_the_shipped_default_is_what_the_configuration_says(script, sets):
    config = MMSERConfig()
    method = script.shipped_default()
    assert (method.centroids, method.tail_size, method.level) == (
        config.openmax_centroids_per_class,
        config.openmax_tail_size,
        config.openmax_level,
    )
    train, held_out, unknown = (sets[name] for name in ("train", "validation", script.FINAL[0]))
    openmax = OpenMax(3, config.openmax_alpha, config.openmax_level, config.openmax_centroids_per_class, 8)
    openmax.fit_centroids(train["fused"], train["labels"])
    fused = torch.from_numpy(held_out["fused"])
    openmax.fit(openmax.distances(fused), held_out["labels"], held_out["logits"].argmax(axis=1), method.tail_size)
    logits, fused = (torch.from_numpy(unknown[name]) for name in ("logits", "fused"))
    expected = openmax.rejection_scores(logits, openmax.distances(fused))

    distance = next(d for name, number, d in script.class_distances(train) if (name, number) == method[:2])
    measured = script.with_distances(sets, distance)
    scores = script.openmax_family(measured["train"], method)(measured["validation"])(measured[script.FINAL[0]])
    np.testing.assert_allclose(scores[method], expected, rtol=1e-6)
    assert len(scores) == 2 * len(script.FORMS) and sum(own.level == "probability" for own in scores) == 2


def test_the_noisy_or_has_the_order_of_its_definition(script, sets):
    method = script.Method("x", score=script.UNKNOWN_PROBABILITY)
    rejection = method._replace(score=script.REJECTION_SCORE)
    probability = np.linspace(0, 0.9, 30)

    def score(outputs):
        own = np.resize(probability, len(outputs["labels"]))
        return {method: own, rejection: -np.log(1 - own)}

    outputs = sets[script.FINAL[0]]
    scores = script.with_combinations(lambda held_out: score, 1.0)(sets["validation"])(outputs)
    assert len(scores) == 2 + 2 * 6
    expected = 1 - (1 - probability) * (1 - outputs["uncertainty"])
    for own in (method, rejection):
        combined = scores[own._replace(combined_with="uncertainty, noisy or")]
        np.testing.assert_allclose(1 - np.exp(-combined), expected, atol=1e-6)


def test_the_comparison_is_paired_and_signed(script):
    rng = np.random.default_rng(0)
    known, unknown = rng.standard_normal(60), rng.standard_normal(40) + 1
    good, same = [known, unknown + 2, unknown + 2], [np.exp(known), np.exp(unknown + 2), np.exp(unknown + 2)]
    gains = script.compare({"good": good, "same": same, "bad": [known, unknown, unknown]}, known < 1, num_samples=20)
    assert (gains["same"] == 0).all()  # the same order of the same resampled clips
    gain, low, high = gains["bad"].T
    assert (gain > 0).all() and (low > 0).all() and (low <= gain).all() and (gain <= high).all()


def test_the_report_is_of_every_form_and_strict_json(script, sets, tmp_path, monkeypatch, capsys):
    default = script.shipped_default()
    reduced = {"CENTROIDS": [default.centroids], "TAIL_SIZES": [default.tail_size], "SEEDS": (0,)}
    reduced |= {"FORMS": [("probability", None), ("activation", 3)], "cache_key": lambda arguments: "key"}
    reduced["compare"] = functools.partial(script.compare, num_samples=5)
    for name, value in reduced.items():
        monkeypatch.setattr(script, name, value)
    folder, written = tmp_path / "key", tmp_path / "out" / "open_set.json"
    folder.mkdir()
    rng = np.random.default_rng(1)
    unknown = emotions(60, rng, unknown=True)
    unknown["speaker"] = rng.integers(3, 9, size=60).astype(str)  # those of the validation clips are 0 to 5
    for name, outputs in {**sets, script.WHOLE[0]: unknown}.items():
        if name not in (script.CHOOSING[0], script.FINAL[0]):  # these are parts of the whole
            np.savez(folder / f"{name}.npz", **outputs, rejection_score=outputs["uncertainty"])
    (folder / "predictions.json").write_text('{"temperature": 1.5}', encoding="utf-8")
    places = ["--checkpoint", "a", "--data_dir", "b", "--ood_dir", "c", "--cache_dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["open_set.py", *places, "--output", str(written)])
    script.main()
    printed = capsys.readouterr().out

    def refuse(name):
        raise ValueError(f"{name} is not strict JSON")

    report = json.loads(written.read_text(encoding="utf-8"), parse_constant=refuse)
    assert report["sizes"]["test"]["clips"] == 60
    names, *grid = report["grid"]
    settings = {tuple(row[: len(script.Method._fields)]) for row in grid}
    # two scores of two forms at two sources, for the anchors, the class means, and centroids in two spaces
    assert len(settings) == len(grid) == 4 * 2 * 2 * 2 + 20
    assert tuple(default) in settings and tuple(script.PUBLISHED) in settings
    assert all(len(row) == len(names) for row in grid)
    names, *table = report["table"]
    stored = next(row for row in table if row[0] == str(script.AS_STORED))
    assert stored[names.index("cross_fitted")] is None and stored[names.index("test")] is not None
    # the same clips and scores, so the same numbers as by the functions of the package
    test, unknown = (np.load(folder / f"{name}.npz") for name in ("test", script.FINAL[1]))
    doubt = 1 - np.concatenate([softmax(outputs["logits"]).max(axis=1) for outputs in (test, unknown)])
    expected = auroc(doubt, np.arange(len(doubt)) >= 60)
    row = next(row for row in table if row[0] == "max_softmax")
    assert row[names.index("test non-speech auroc")] == pytest.approx(expected, abs=1e-4)
    baselines = {row[0] for row in table if "OpenMax" not in row[0]}
    assert {row[0] for row in report["shipped_default_against"][1:]} == baselines
    assert all(line in printed for line in report["verdict"]) and str(default) in report["verdict"][0]
