# SPDX-License-Identifier: Apache-2.0
"""Augmentation of waveforms. Random numbers come from a generator seeded for each example.

1. What can happen to a clip, one function each: another speed, a room, noise, a microphone, a codec
2. `Augmenter`, which does some of it at random
"""

import io
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr
from scipy.signal import fftconvolve

DEFAULT_EFFECTS = ("speed", "noise")
EFFECTS = (*DEFAULT_EFFECTS, "room", "equalizer", "level", "codec")
# Format, subtype, sampling rate and `compression_level` of soundfile (None: it has none): fixed lines, mobile phones,
# voice messages (10 to 15 kbit/s), small MP3 files (about 30 kbit/s)
CODECS: dict[str, tuple[str, str, int, float | None]] = {
    "g711": ("WAV", "ULAW", 8000, None),
    "gsm": ("WAV", "GSM610", 8000, None),
    "opus": ("OGG", "OPUS", 16000, 0.98),
    "mp3": ("MP3", "MPEG_LAYER_III", 16000, 0.9),
}
EARLY_SECONDS = (0.005, 0.05)  # between the sound itself and the first reflections, and the last that are heard apart
NUM_EARLY = 8
EQUALIZER_HZ = (60, 125, 250, 500, 1000, 2000, 4000, 8000)


def augmentation_generator(seed: int, epoch: int, index: int, repeat: int = 0) -> np.random.Generator:
    """
    The random generator of one example in one epoch: the same in any batch, worker or process. `repeat` counts how
    often the example has come before in this epoch.
    """
    return np.random.default_rng([seed, epoch, index, *([repeat] if repeat else [])])


# ---------------------------------------------------------------------------------------- 1. what can happen to a clip


def change_speed(waveform: np.ndarray, factor: float) -> np.ndarray:
    """Play a clip `factor` times as fast; its pitch moves by the same factor, as on a tape.

    Args:
        waveform: [T] float32 samples.
        factor: speed, > 0. 1.1 is faster, shorter and higher.

    Returns:
        [round(T / factor)] float32 samples.
    """
    # as if the clip had been recorded at `factor` times the rate
    return soxr.resample(waveform, factor, 1.0, quality="HQ").astype(np.float32)


def add_noise(waveform: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """Add white noise, scaled to exactly a signal-to-noise ratio. Silence stays silent.

    Args:
        waveform: [T] float32 samples.
        snr_db: power of the clip over power of the noise, in dB.
        rng: source of the noise.

    Returns:
        [T] float32 samples.
    """
    signal_power = _power(waveform)
    if signal_power == 0:
        return waveform
    noise = rng.standard_normal(len(waveform))
    noise_power = signal_power / 10 ** (snr_db / 10)
    return (waveform + noise * np.sqrt(noise_power / np.mean(np.square(noise)))).astype(np.float32)


def room_response(
    rng: np.random.Generator, sampling_rate: int = 16_000, decay_seconds: float = 0.6, wet_energy: float = 1.0
) -> np.ndarray:
    """The impulse response of a room: the sound itself, early reflections, a tail of noise that falls evenly in dB.

    Args:
        rng: source of the reflections.
        sampling_rate: of the response, in Hz.
        decay_seconds: until the tail is 60 dB quieter. 0.6 is a living room or an office. At least 0.06.
        wet_energy: energy of all that comes after the sound, over that of the sound.

    Returns:
        [decay_seconds * sampling_rate] float64; the sound itself is 1 at time 0.
    """
    time = np.arange(round(decay_seconds * sampling_rate)) / sampling_rate
    decay = 10 ** (-3 * time / decay_seconds)
    first, last = (round(seconds * sampling_rate) for seconds in EARLY_SECONDS)
    response = np.where(time > EARLY_SECONDS[0], rng.standard_normal(len(time)), 0) * decay
    places = rng.integers(first, last, NUM_EARLY)
    response[places] += rng.choice([-1, 1], NUM_EARLY) * rng.uniform(3, 10, NUM_EARLY) * decay[places]
    response *= np.sqrt(wet_energy / np.square(response).sum())
    response[0] = 1
    return response


def reverberate(waveform: np.ndarray, response: np.ndarray) -> np.ndarray:
    """A clip [T] in a room with an impulse response, as loud and as long as before. Silence stays silent."""
    wet = fftconvolve(waveform, response)[: len(waveform)]
    return wet * np.sqrt(_power(waveform) / max(_power(wet), 1e-20))


def equalize(waveform: np.ndarray, gains_db: np.ndarray, sampling_rate: int) -> np.ndarray:
    """What another microphone or loudspeaker does: it makes some frequencies louder than others.

    Args:
        waveform: [T] samples.
        gains_db: [8] gain at each frequency of `EQUALIZER_HZ`, in dB. Between them, the gain is linear in the octaves.
        sampling_rate: in Hz.

    Returns:
        [T] float32 samples. No frequency is delayed.
    """
    # padded, as what the filter smears past one end of the clip would come round to the other
    padded = len(waveform) + sampling_rate // 10
    frequencies = np.fft.rfftfreq(padded, 1 / sampling_rate)
    octaves = np.log2(np.maximum(frequencies, EQUALIZER_HZ[0]))
    gains = np.interp(octaves, np.log2(EQUALIZER_HZ), gains_db)
    spectrum = np.fft.rfft(waveform, padded) * 10 ** (gains / 20)
    return np.fft.irfft(spectrum, padded)[: len(waveform)].astype(np.float32)


def change_level(waveform: np.ndarray, gain_db: float) -> np.ndarray:
    """A clip [T] louder by `gain_db`, or by as much as its highest peak allows."""
    gain = 10 ** (gain_db / 20)
    peak = np.abs(waveform).max(initial=0.0)
    return (waveform * min(gain, max(1.0, 1.0 / max(peak, 1e-9)))).astype(np.float32)


def through_codec(waveform: np.ndarray, codec: str, sampling_rate: int) -> np.ndarray:
    """A clip as it sounds after it has been stored or sent with a lossy codec.

    Args:
        waveform: [T] samples. Peaks above 1 are clipped.
        codec: a name of `CODECS`.
        sampling_rate: in Hz.

    Returns:
        [T] float32 samples.
    """
    container, subtype, rate, level = CODECS[codec]
    narrow = np.clip(soxr.resample(waveform, sampling_rate, rate, quality="HQ"), -1, 1)
    options = {} if level is None else {"compression_level": level}
    file = io.BytesIO()
    soundfile.write(file, narrow, rate, format=container, subtype=subtype, **options)
    file.seek(0)
    decoded = soxr.resample(soundfile.read(file, dtype="float32")[0], rate, sampling_rate, quality="HQ")
    return np.pad(decoded[: len(waveform)], (0, max(0, len(waveform) - len(decoded)))).astype(np.float32)


def _power(waveform: np.ndarray) -> float:
    return float(np.mean(np.square(waveform, dtype=np.float64)))


# --------------------------------------------------------------------------------------------- 2. some of it at random


@dataclass
class Augmenter:
    """Random effects, each with probability `probability`: those that a voice meets on its way, in that order.

    "speed", then the "room", "noise", the "equalizer" of a microphone, its "level", and a "codec" of `CODECS`.

    Args:
        speed_range: lowest and highest speed factor, > 0.
        snr_db_range: lowest and highest signal-to-noise ratio of the noise, in dB.
        probability: of each effect, in [0, 1].
        effects: names out of `EFFECTS`.
        decay_seconds_range: of the room, see `room_response`; the reverberation has up to the energy of the sound.
        equalizer_db: standard deviation of the gains of `equalize`, in dB.
        level_db_range: lowest and highest gain of the level, in dB.
        sampling_rate: of the clips, in Hz.

    Raises:
        ValueError: if an effect is unknown, a range is not (low, high), or a number is not possible.
    """

    speed_range: tuple[float, float] = (0.9, 1.1)
    snr_db_range: tuple[float, float] = (10.0, 20.0)
    probability: float = 0.5
    effects: tuple[str, ...] = DEFAULT_EFFECTS
    decay_seconds_range: tuple[float, float] = (0.1, 0.8)
    equalizer_db: float = 4.0
    level_db_range: tuple[float, float] = (-20.0, 10.0)
    sampling_rate: int = 16_000

    def __post_init__(self):
        lowest = {"speed_range": 1e-3, "snr_db_range": -np.inf, "decay_seconds_range": 0.06, "level_db_range": -np.inf}
        for name, least in lowest.items():
            low, high = getattr(self, name)
            if not least <= low <= high:
                above = f", low at least {least}" if least > -np.inf else ""
                raise ValueError(f"{name} must be (low, high) with low <= high{above}, got {(low, high)}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in [0, 1], got {self.probability}")
        if not self.equalizer_db >= 0:
            raise ValueError(f"equalizer_db must be at least 0, got {self.equalizer_db}")
        if unknown := [name for name in self.effects if name not in EFFECTS]:
            raise ValueError(f"Unknown effects of augmentation: {', '.join(unknown)}. There are {', '.join(EFFECTS)}.")

    def __call__(self, waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return an augmented copy of `waveform` ([T] float32), with random numbers from `rng` alone."""
        # The numbers of speed and noise are drawn whether or not they are used, and first: they are the published
        # augmentation, which other effects must not change
        apply_speed, apply_noise = rng.random(2) < self.probability
        factor = rng.uniform(*self.speed_range)
        if apply_speed and "speed" in self.effects:
            waveform = change_speed(waveform, factor)
        if self._draw("room", rng):
            decay_seconds, wet_energy = rng.uniform(*self.decay_seconds_range), rng.uniform(0, 1)
            response = room_response(rng, self.sampling_rate, decay_seconds, wet_energy)
            waveform = reverberate(waveform, response).astype(np.float32)
        if apply_noise and "noise" in self.effects:
            waveform = add_noise(waveform, rng.uniform(*self.snr_db_range), rng)
        if self._draw("equalizer", rng):
            gains_db = rng.normal(0, self.equalizer_db, len(EQUALIZER_HZ))
            waveform = equalize(waveform, gains_db, self.sampling_rate)
        if self._draw("level", rng):
            waveform = change_level(waveform, rng.uniform(*self.level_db_range))
        if self._draw("codec", rng):
            waveform = through_codec(waveform, str(rng.choice(list(CODECS))), self.sampling_rate)
        return waveform

    def _draw(self, effect: str, rng: np.random.Generator) -> bool:
        return effect in self.effects and bool(rng.random() < self.probability)
