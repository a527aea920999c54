# SPDX-License-Identifier: Apache-2.0
"""Tests of `mmser/augmentation.py`."""

import io

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import welch

from mmser.augmentation import (
    CODECS,
    EFFECTS,
    EQUALIZER_HZ,
    Augmenter,
    add_noise,
    augmentation_generator,
    change_level,
    change_speed,
    equalize,
    reverberate,
    room_response,
    through_codec,
)

RATE = 16_000


def sine(seconds, frequency=440.0):
    return np.sin(2 * np.pi * frequency * np.arange(round(seconds * RATE)) / RATE).astype(np.float32)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def decibels(power):
    return 10 * np.log10(power)


def test_a_room_decays_by_sixty_decibels_and_leaves_the_loudness(rng):
    responses = np.stack([room_response(np.random.default_rng(seed)) for seed in range(50)])
    assert (responses[:, 0] == 1).all() and (responses[:, 1:40] == 0).all()
    tail = np.square(responses[:, round(0.06 * RATE) :]).mean(axis=0).reshape(-1, 432).mean(axis=1)
    time = 0.06 + 432 / RATE * (np.arange(len(tail)) + 0.5)
    slope = np.polyfit(time, decibels(tail), 1)[0]
    assert slope * 0.6 == pytest.approx(-60, abs=1)
    np.testing.assert_allclose(np.square(responses).sum(axis=1), 2, rtol=1e-6)
    clip = 0.1 * rng.standard_normal(RATE)
    wet = reverberate(clip, responses[0])
    assert len(wet) == len(clip) and np.mean(wet**2) == pytest.approx(np.mean(clip**2))
    slow = np.convolve(clip, responses[0])[: len(clip)]
    assert np.corrcoef(slow, wet)[0, 1] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("factor", [0.9, 0.97, 1.0, 1.1])
def test_speed_changes_length_and_pitch(factor):
    fast = change_speed(sine(1.0, 1000.0), factor)
    assert fast.dtype == np.float32
    assert abs(len(fast) - RATE / factor) <= 1
    spectrum = np.abs(np.fft.rfft(fast * np.hanning(len(fast))))
    peak = spectrum.argmax() * RATE / len(fast)
    assert abs(peak - 1000 * factor) <= RATE / len(fast)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.floats(10, 20), st.floats(1e-3, 1.0), st.integers(0, 2**32 - 1))
def test_noise_has_the_ratio_asked_for(snr_db, gain, seed):
    clean = gain * sine(0.2)
    noisy = add_noise(clean, snr_db, np.random.default_rng(seed))
    noise = noisy.astype(np.float64) - clean
    measured = 10 * np.log10(np.mean(clean.astype(np.float64) ** 2) / np.mean(noise**2))
    assert noisy.dtype == np.float32 and len(noisy) == len(clean)
    assert abs(measured - snr_db) < 0.5


def test_noise_is_white_and_silence_stays_silent():
    noise = add_noise(np.full(2**16, 0.1, dtype=np.float32), 10.0, np.random.default_rng(0)) - 0.1
    power = np.abs(np.fft.rfft(noise)[1:-1]) ** 2
    bands = np.array([band.mean() for band in np.array_split(power, 8)])
    np.testing.assert_allclose(bands / bands.mean(), 1.0, atol=0.1)
    silence = np.zeros(1000, dtype=np.float32)
    np.testing.assert_array_equal(add_noise(silence, 10.0, np.random.default_rng(0)), silence)


def test_augmenter_applies_each_half_of_the_time():
    augmenter, clean = Augmenter(), sine(0.05)
    results = [augmenter(clean, augmentation_generator(0, 0, index)) for index in range(400)]
    longer_or_shorter = np.mean([len(result) != len(clean) for result in results])
    untouched = np.mean([np.array_equal(result, clean) for result in results])
    assert 0.4 < longer_or_shorter < 0.6
    assert 0.18 < untouched < 0.32
    lengths = [len(result) for result in results]
    assert min(lengths) >= len(clean) / 1.1 - 1 and max(lengths) <= len(clean) / 0.9 + 1
    same = augmenter(clean, augmentation_generator(0, 0, 7))
    np.testing.assert_array_equal(same, results[7])


@pytest.mark.parametrize(
    "options",
    [
        {"speed_range": (0.0, 1.0)},
        {"speed_range": (1.1, 0.9)},
        {"snr_db_range": (20, 10)},
        {"probability": 2},
        {"decay_seconds_range": (0.01, 0.5)},
        {"level_db_range": (3, -3)},
        {"equalizer_db": -1},
        {"effects": ("echo",)},
    ],
)
def test_augmenter_refuses_bad_ranges(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Augmenter(**options)


@pytest.mark.parametrize("sampling_rate, decay_seconds, wet_energy", [(8_000, 0.2, 0.5), (16_000, 0.8, 0.1)])
def test_a_room_has_the_decay_and_the_energy_asked_for(sampling_rate, decay_seconds, wet_energy):
    responses = [room_response(np.random.default_rng(n), sampling_rate, decay_seconds, wet_energy) for n in range(50)]
    energy = np.square(responses)
    np.testing.assert_allclose(energy[:, 1:].sum(axis=1), wet_energy, rtol=0.02)  # a reflection at 0 is overwritten
    # Schroeder (1965): what is still to come of the energy falls as the sound does in a room
    tail = energy.mean(axis=0)[round(0.06 * sampling_rate) :]
    to_come = decibels(np.cumsum(tail[::-1])[::-1])
    time = np.arange(len(tail)) / sampling_rate
    early = to_come > to_come[0] - 20
    slope = np.polyfit(time[early], to_come[early], 1)[0]
    assert slope * decay_seconds == pytest.approx(-60, rel=0.06)


def test_a_microphone_changes_each_band_by_its_gain(rng):
    gains = np.array([-6, 3, 0, 5, -4, 2, -8, 6.0])
    noise = (0.1 * rng.standard_normal(20 * RATE)).astype(np.float32)
    changed = equalize(noise, gains, RATE)
    assert changed.dtype == np.float32 and changed.shape == noise.shape
    frequencies, before = welch(noise, RATE, nperseg=2048)
    after = welch(changed, RATE, nperseg=2048)[1]
    for gain, frequency in list(zip(gains, EQUALIZER_HZ, strict=True))[1:-1]:
        measured = decibels(after / before)[np.abs(frequencies - frequency).argmin()]
        assert measured == pytest.approx(gain, abs=1.0), frequency
    between = np.abs(frequencies - 500 * 2**0.5).argmin()  # half an octave from one to the next
    assert decibels(after / before)[between] == pytest.approx((gains[3] + gains[4]) / 2, abs=1.0)
    np.testing.assert_allclose(equalize(noise, np.zeros(8), RATE), noise, atol=1e-6)


def test_a_microphone_does_not_move_sound_from_the_end_to_the_start():
    clip = np.zeros(RATE, dtype=np.float32)
    clip[-1] = 1
    assert np.abs(equalize(clip, np.linspace(-8, 8, 8), RATE)[: RATE // 2]).max() < 1e-3


def test_the_level_changes_by_decibels_until_the_peak_is_full():
    clip = 0.1 * sine(0.1)
    for gain_db in (-20.0, -3.0, 6.0):
        louder = change_level(clip, gain_db)
        assert louder.dtype == np.float32
        assert decibels(np.mean(louder**2) / np.mean(clip**2)) == pytest.approx(gain_db, abs=1e-3)
    assert np.abs(change_level(clip, 40.0)).max() == pytest.approx(1)
    np.testing.assert_allclose(change_level(3 * sine(0.1), 10.0), 3 * sine(0.1))  # too loud already: left as it is
    np.testing.assert_array_equal(change_level(np.zeros(5, dtype=np.float32), 10.0), np.zeros(5))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("sampling_rate", [16_000, 22_050])
def test_a_codec_keeps_place_and_tone_and_loses_what_it_cannot_hold(codec, sampling_rate, rng):
    time = np.arange(sampling_rate) / sampling_rate
    tone = (0.3 * np.sin(2 * np.pi * 700 * time) + 0.1 * np.sin(2 * np.pi * 5000 * time)).astype(np.float32)
    coded = through_codec(tone, codec, sampling_rate)
    assert coded.dtype == np.float32 and coded.shape == tone.shape and np.isfinite(coded).all()
    before, after = (np.abs(np.fft.rfft(clip * np.hanning(len(clip)))) for clip in (tone, coded))
    assert 0.8 < after[700] / before[700] < 1.25
    if CODECS[codec][2] == 8000:  # a telephone ends below 4 kHz
        assert after[5000] < 0.01 * before[5000]
    burst = np.zeros(sampling_rate, dtype=np.float32)
    burst[sampling_rate // 2 :][:2000] = tone[:2000]
    heard = np.abs(through_codec(burst, codec, sampling_rate))
    assert abs(int(np.argmax(heard > 0.1)) - sampling_rate // 2) < 0.005 * sampling_rate


@pytest.mark.parametrize("codec", ["opus", "mp3"])
def test_codecs_have_few_bits_a_second(codec, rng):
    """So many that the loss can be heard: voice messages, small files."""
    container, subtype, rate, level = CODECS[codec]
    speech_like = np.convolve(rng.standard_normal(4 * rate), np.ones(20) / 20, "same") * 0.1
    file = io.BytesIO()
    soundfile.write(file, speech_like, rate, format=container, subtype=subtype, compression_level=level)
    assert 8_000 < 8 * len(file.getvalue()) / 4 < 40_000


@pytest.mark.parametrize("effect", EFFECTS)
def test_each_effect_is_applied_to_half_of_the_clips_and_repeats_by_its_seed(effect):
    augmenter, clip = Augmenter(effects=(effect,)), 0.1 * sine(0.2)
    results = [augmenter(clip, augmentation_generator(0, 0, index)) for index in range(60)]
    changed = [len(result) != len(clip) or not np.array_equal(result, clip) for result in results]
    assert 15 < sum(changed) < 45
    assert all(result.dtype == np.float32 and np.isfinite(result).all() for result in results)
    again = augmenter(clip, augmentation_generator(0, 0, changed.index(True)))
    np.testing.assert_array_equal(again, results[changed.index(True)])


def test_new_effects_leave_the_random_numbers_of_the_published_ones():
    """A clip that only gets another speed has the same one, whatever else may happen to it."""
    clip = sine(0.2)
    for index in range(20):
        speed, all_of_them = (
            Augmenter(effects=effects, probability=1.0)(clip, augmentation_generator(0, 0, index))
            for effects in (("speed",), EFFECTS)
        )
        assert len(speed) == len(all_of_them)


def test_silence_stays_silent():
    silence = np.zeros(RATE, dtype=np.float32)
    loud = Augmenter(effects=EFFECTS, probability=1.0)
    for index in range(8):
        assert np.abs(loud(silence, augmentation_generator(0, 0, index))).max() < 2e-3  # GSM hums at -60 dB
