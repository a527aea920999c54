# SPDX-License-Identifier: Apache-2.0
"""Tests of `benchmarks/noisy_speech.py`, and of the table of `benchmarks/noise.py`."""

import numpy as np
import pytest
import soundfile
from scipy.signal import welch
from tiny_corpus import NAMES, write_corpus

from benchmarks.noisy_speech import (
    CONDITIONS,
    RATE,
    SNRS,
    babble,
    choose_clips,
    mix,
    pink_noise,
    write_noisy_split,
)
from mmser.loading import load_emotion_dataset, load_emotion_split


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def decibels(power):
    return 10 * np.log10(power)


@pytest.mark.parametrize("snr", SNRS)
def test_the_noise_is_as_loud_as_asked_for(snr, rng):
    clip, voices = 0.1 * rng.standard_normal(RATE), [rng.standard_normal(n) for n in (500, 40_000, RATE)]
    for noise in (pink_noise(RATE, rng), babble(voices, RATE, rng)):
        added = mix(clip, noise, snr) - clip
        assert decibels(np.mean(clip**2) / np.mean(added**2)) == pytest.approx(snr, abs=0.01)


def test_pink_noise_falls_by_three_decibels_an_octave(rng):
    frequencies, power = welch(pink_noise(60 * RATE, rng), RATE, nperseg=4096)
    own = (frequencies > 100) & (frequencies < 6000)
    slope = np.polyfit(np.log2(frequencies[own]), decibels(power[own]), 1)[0]
    assert slope == pytest.approx(-3.01, abs=0.1)


def test_a_split_in_noise_has_the_same_clips_and_is_written_once(tmp_path):
    splits = load_emotion_dataset(write_corpus(tmp_path / "corpus"))[0]
    clips = choose_clips(splits["test"], 8)
    assert (
        sorted(clips["labels"]) == [0, 0, 1, 1, 2, 2, 3, 3] and sorted(clips["corpus"]) == ["sine"] * 4 + ["tone"] * 4
    )
    folders = [write_noisy_split(tmp_path / name, "5 dB", clips, splits["train"], NAMES) for name in ("a", "b")]
    loaded = [load_emotion_split(folder, label_names=NAMES, allow_unknown=False) for folder in folders]
    for column in ("labels", "text", "speaker", "corpus"):
        assert list(loaded[0][column]) == list(clips[column])
    for original, first, second in zip(clips, *loaded, strict=True):
        clean, noisy, again = (soundfile.read(row["audio"])[0] for row in (original, first, second))
        np.testing.assert_array_equal(noisy, again)
        added = noisy - clean
        assert decibels(np.mean(clean**2) / np.mean(added**2)) == pytest.approx(5, abs=0.01)
    (folders[0] / "0000.wav").unlink()
    assert write_noisy_split(tmp_path / "a", "5 dB", clips, splits["train"], NAMES) == folders[0]
    assert not (folders[0] / "0000.wav").exists()
    assert list(CONDITIONS) == ["clean", "20 dB", "10 dB", "5 dB", "0 dB", "reverberation"]
