# SPDX-License-Identifier: Apache-2.0
"""Tests of `mmser.voice_activity`: voices of eSpeak NG in noise are heard, the noise is not, however the samples come.

The reference is where the voices were put. The bounds have some room beneath what was measured: see `MEASURED`.
"""

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from benchmarks.noisy_speech import mix, pink_noise
from demo.synthesize_corpus import Espeak, Prosody
from mmser.voice_activity import FRAME_SECONDS, LEAD_FRAMES, START_FRAMES, Silence, VoiceActivity

RATE = 16000
FRAME = round(FRAME_SECONDS * RATE)
SENTENCES = ("Dogs are sitting by the door.", "I will see what we can do about it.", "No!", "What a day that was!")
NEUTRAL = Prosody(rate=160, pitch=50, pitch_range=50, volume=100, tilt=0, fade=0, emphasis=0)
SETTLED = 4.2  # seconds, until the floor of loud noise is known
# (noise, SNR in dB) -> share of the voices' frames that were heard, in ten sentences. In white noise of 0 dB it was
# 0.09: energy alone is not enough there
MEASURED = {
    ("white", 40): 1.0,
    ("white", 20): 1.0,
    ("white", 10): 0.997,
    ("white", 5): 0.582,
    ("pink", 10): 1.0,
    ("pink", 5): 0.997,
    ("hum", 5): 1.0,
}


def decide(samples, rate=RATE):
    """Of every frame, whether it is speech."""
    activity = VoiceActivity(rate)
    return np.array(activity.push(np.asarray(samples, dtype=np.float32)) + activity.flush())


def noise_of(kind, count):
    rng, time = np.random.default_rng(1), np.arange(count) / RATE
    if kind == "hum":  # the mains and an octave above, on an offset twice as strong
        hum = np.sin(2 * np.pi * 50 * time) + 0.3 * np.sin(2 * np.pi * 100 * time)
        return hum / hum.std() + 2
    return pink_noise(count, rng) if kind == "pink" else rng.standard_normal(count)


@pytest.fixture(scope="module")
def dialogue():
    """Ten sentences of four voices at -25 dB between pauses, (time,), and of each frame whether it holds a voice."""
    pytest.importorskip("espeakng_loader")
    engine, rng = Espeak(), np.random.default_rng(0)
    parts, is_voice = [], []
    for index in range(10):
        voice = engine.say(SENTENCES[index % 4], "en", ("f2", "m3", "f4", "m1")[index % 4], NEUTRAL)
        voice = np.pad(voice, (0, -len(voice) % FRAME)) * 10 ** (-25 / 20) / voice.std()
        pause = np.zeros(FRAME * round(rng.uniform(60, 200)))
        parts += [pause, voice]
        is_voice += [False] * (len(pause) // FRAME) + [True] * (len(voice) // FRAME)
    return np.concatenate([*parts, np.zeros(100 * FRAME)]), np.array(is_voice + [False] * 100)


@pytest.mark.parametrize(("kind", "snr"), MEASURED)
def test_voices_in_noise_are_heard_and_the_noise_is_not(dialogue, kind, snr):
    clean, is_voice = dialogue
    power = np.mean(clean[np.repeat(is_voice, FRAME)] ** 2)
    noisy = clean + noise_of(kind, len(clean)) * np.sqrt(power / 10 ** (snr / 10))
    found = decide(noisy)
    assert len(found) == len(is_voice)
    assert found[is_voice].mean() > MEASURED[kind, snr] - 0.03
    near = np.convolve(is_voice, np.ones(51), "same") > 0  # half a second: what is added before and after
    settled = np.arange(len(found)) * FRAME_SECONDS > SETTLED
    assert not found[~near & settled].any() and (~near & settled).sum() > 300
    if snr >= 40:
        assert not found[~near].any()


def test_the_start_of_a_stream_is_heard(dialogue):
    clean, is_voice = dialogue
    first = int(np.argmax(is_voice))
    assert decide(clean[first * FRAME :])[:20].all()


def test_speech_without_a_pause_does_not_become_noise(dialogue):
    """Twenty seconds of words: the floor stays beneath them."""
    clean, is_voice = dialogue
    words = np.resize(clean[np.repeat(is_voice, FRAME)], 20 * RATE)
    assert decide(mix(words, noise_of("pink", len(words)), 30)).mean() > 0.95


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros(5 * RATE),
        np.full(5 * RATE, 0.5),
        1e-4 * np.random.default_rng(0).standard_normal(5 * RATE),  # -80 dB
        np.eye(1, 5 * RATE, 2 * RATE)[0],  # a click
    ],
)
def test_what_is_silence_from_the_start(samples):
    assert not decide(samples).any()


def test_noise_that_begins_is_speech_only_until_the_floor_has_followed():
    quiet = 1e-3 * np.random.default_rng(0).standard_normal(16 * RATE)
    quiet[6 * RATE :] *= 30
    found = decide(quiet)
    start, end = round(6 / FRAME_SECONDS), round((6 + SETTLED) / FRAME_SECONDS)
    assert not found[: start - LEAD_FRAMES].any() and found[start : start + 100].all()
    assert not found[end + 15 :].any()
    assert VoiceActivity(RATE).frame_length == FRAME


@settings(max_examples=40, deadline=None)
@given(
    cuts=strategies.lists(strategies.integers(0, 3 * RATE), max_size=12),
    rate=strategies.sampled_from([8000, 16000, 44100]),
    loud=strategies.tuples(strategies.integers(0, 3 * RATE), strategies.integers(0, 3 * RATE)),
)
def test_how_samples_come_does_not_matter(cuts, rate, loud):
    samples = (1e-3 * np.random.default_rng(0).standard_normal(3 * RATE)).astype(np.float32)
    samples[slice(*sorted(loud))] *= 100
    activity, found = VoiceActivity(rate), []
    for block in np.split(samples, sorted(cuts)):
        found += activity.push(block)
    delay = 3 * RATE // activity.frame_length - len(found)
    assert delay == START_FRAMES + LEAD_FRAMES - 1
    assert found + activity.flush() == decide(samples, rate).tolist()


def test_a_recording_is_silent_where_nothing_is_said_and_nothing_is_loud():
    rng = np.random.default_rng(0)
    room = 10 ** (-60 / 20) * rng.standard_normal(6 * RATE)
    voice = 0.1 * rng.standard_normal(2 * RATE) * np.sin(np.arange(2 * RATE) * 6 * np.pi / RATE) ** 2  # six syllables
    fan = 0.05 * rng.standard_normal(8 * RATE)  # steady: it is no speech after four seconds, and yet no silence
    samples = np.concatenate([room, voice, room, fan, np.zeros(RATE + 7)]).astype(np.float32)
    silences = [Silence([samples], RATE), Silence(np.array_split(samples, [5, 5000, 5001, 99_999]), RATE)]
    assert not decide(samples)[round(20 / FRAME_SECONDS) : round(22 / FRAME_SECONDS)].any()
    for silence in silences:
        pieces = [(0, 2), (2, 5.5), (5, 7), (6, 8), (7.5, 9), (9, 13.8), (13, 15), (16, 18), (20, 22), (22, 23)]
        assert [silence.holds(*times) for times in pieces] == [True] * 2 + [False] * 3 + [True] + [False] * 3 + [True]
        assert not silence.holds(23.5, 24) and not Silence([], RATE).holds(0, 1)  # nothing is known of these
