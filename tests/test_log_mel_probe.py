# SPDX-License-Identifier: Apache-2.0
"""Tests of `log_mel_probe`: its features against SciPy's Fourier transform, its answers on clips that differ."""

import numpy as np
import pytest
import scipy.signal
import soundfile
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tiny_corpus import write_table
from transformers.audio_utils import mel_filter_bank

from mmser.examples import EmotionDataset
from mmser.loading import load_emotion_dataset
from mmser.log_mel_probe import log_mel_probe, log_mel_statistics

RATE = 16_000


def test_the_statistics_are_those_of_scipys_spectrogram():
    audio = np.random.default_rng(0).normal(size=RATE) * np.linspace(0.01, 1, RATE)
    window = np.hanning(400)
    _, _, power = scipy.signal.spectrogram(
        audio, RATE, window, nperseg=400, noverlap=240, detrend=False, scaling="spectrum", mode="psd"
    )
    # SciPy halves the energy of a real signal's two sides into one, and divides by the window's sum
    power = power * window.sum() ** 2 / 400
    power[1:-1] /= 2
    filters = mel_filter_bank(201, 40, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    bands = np.log(filters.T @ power)
    expected = np.concatenate([bands.mean(axis=1), bands.std(axis=1)])
    np.testing.assert_allclose(log_mel_statistics(audio.astype(np.float32), RATE), expected, atol=1e-4)


@pytest.mark.parametrize("audio", [np.zeros(RATE), np.zeros(3), np.ones(50)])
def test_silence_and_the_shortest_clip_have_finite_statistics(audio):
    assert np.isfinite(log_mel_statistics(audio, RATE)).all()
    assert log_mel_statistics(audio, 8_000).shape == (80,)


def test_ten_times_the_power_adds_the_same_to_every_mean_and_nothing_to_the_deviations():
    audio = np.random.default_rng(1).normal(size=RATE)
    difference = log_mel_statistics(np.sqrt(10) * audio, RATE) - log_mel_statistics(audio, RATE)
    np.testing.assert_allclose(difference, np.repeat([np.log(10), 0], 40), atol=1e-9)


def write_clips(folder, speakers):
    """Noise that differs in level (neutral, happy) or in colour (sad); every speaker says each class twice."""
    rng, rows = np.random.default_rng(2), []
    for speaker in speakers:
        for label in ("neutral", "happy", "sad") * 2:
            audio = rng.normal(size=4000) * (0.2 if label == "happy" else 0.01)
            audio = np.cumsum(audio) / 50 if label == "sad" else audio
            name = f"{speaker}_{len(rows)}.wav"
            soundfile.write(folder / name, np.clip(audio, -1, 1), RATE, subtype="FLOAT")
            split = "test" if speaker == speakers[-1] else "train"
            rows.append({"file_name": name, "label": label, "speaker": speaker, "split": split})
    write_table(folder / "all.csv", rows)


@pytest.mark.parametrize("num_speakers", [2, 7])
def test_the_probe_hears_what_differs_in_level_and_colour(tmp_path, num_speakers):
    """With one speaker to train on there is no cross-validation; with six there is."""
    write_clips(tmp_path, [f"s{i}" for i in range(num_speakers)])
    splits, names = load_emotion_dataset(manifest=tmp_path / "all.csv", validation_fraction=0.0)
    datasets = [EmotionDataset(splits[name], use_text=False) for name in ("train", "test")]
    answers = log_mel_probe(*datasets)
    assert answers["predictions"].tolist() == answers["labels"].tolist() == splits["test"]["labels"]
    assert len(answers["labels"]) == 6 and len(names) == 3


def test_one_speaker_is_answered_by_a_plain_regression(tmp_path):
    write_clips(tmp_path, ["s0", "s1"])
    splits, _ = load_emotion_dataset(manifest=tmp_path / "all.csv", validation_fraction=0.0)
    datasets = [EmotionDataset(splits[name], use_text=False) for name in ("train", "test")]
    features = [np.stack([log_mel_statistics(example["audio"], RATE) for example in data]) for data in datasets]
    scaler = StandardScaler().fit(features[0])
    regression = LogisticRegression(max_iter=2000).fit(scaler.transform(features[0]), splits["train"]["labels"])
    expected = regression.predict(scaler.transform(features[1]))
    assert log_mel_probe(*datasets)["predictions"].tolist() == expected.tolist()
