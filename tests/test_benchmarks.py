# SPDX-License-Identifier: Apache-2.0
"""Tests of `benchmarks/open_set.py`: who is chosen by and who is judged by, and what cross-fitting may not change."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "open_set.py"


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("open_set", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


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
