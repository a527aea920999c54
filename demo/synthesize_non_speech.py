# SPDX-License-Identifier: Apache-2.0
"""Writes clips without any speech, for `--ood_dir`: `python demo/synthesize_non_speech.py FOLDER`.

A model of speech emotions should answer "none of these" to every one of them. Read: helpers, `NOISES`, `TONES`, the
`INSTRUMENTS` and `music`, then `synthesize` (the files). A clip depends on the seed, its kind and its number alone, so
more clips keep the earlier ones as they are. Sounds are float64 [count] at no particular level until `_finish`.
"""

import argparse
import csv
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.random import Generator
from scipy.fft import irfft, next_fast_len, rfft, rfftfreq
from scipy.signal import butter, chirp, oaconvolve, sosfilt

SAMPLING_RATE = 16_000  # Hz
SHORTEST, LONGEST = 1.0, 6.0  # seconds, of a clip
QUIETEST, LOUDEST = -45.0, -12.0  # dBFS, root mean square of a clip
COLUMNS = ("file_name", "label", "emotion", "transcription", "speaker", "corpus", "language")
SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 3, 5, 7, 9, 10), (0, 2, 4, 7, 9), (0, 3, 5, 6, 7, 10))

Sound = Callable[[Generator, int], np.ndarray]  # (rng, count)
Instrument = Callable[[Generator, float, int], np.ndarray]  # (rng, frequency in Hz, count)


def _time(count: int) -> np.ndarray:
    """Seconds from 0, [count]."""
    return np.arange(count) / SAMPLING_RATE


def _log_uniform(rng: Generator, low: float, high: float, size: int | None = None) -> Any:
    """One number or [size] of them, uniform on a logarithmic scale."""
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def _rms(audio: np.ndarray) -> float:
    return float(np.sqrt(np.mean(audio**2)))


def _coloured(rng: Generator, count: int, exponent: float) -> np.ndarray:
    """Noise with power proportional to 1 / frequency**exponent above 20 Hz: 0 is white, 1 pink, 2 brown."""
    size = next_fast_len(count, real=True)
    spectrum = rfft(rng.standard_normal(size))
    return irfft(spectrum * np.maximum(rfftfreq(size, 1 / SAMPLING_RATE), 20.0) ** (-exponent / 2), size)[:count]


def _periodic(cycles: np.ndarray, partials: np.ndarray) -> np.ndarray:
    """A wave with the amplitudes `partials` of its harmonics, read from a table at a phase in cycles."""
    table = irfft(np.concatenate(([0.0], partials)), 8192) * 4096
    return table[(cycles % 1.0 * len(table)).astype(int)]


def _finish(rng: Generator, audio: np.ndarray) -> np.ndarray:
    """Adds 10 ms ramps, a faint noise floor (no digital silence) and a level at which nothing clips; float32."""
    position = np.arange(len(audio))
    audio = audio * np.minimum(np.minimum(position, position[::-1]) / 160, 1.0)
    floor = _coloured(rng, len(audio), rng.uniform(0.0, 2.0))
    audio = audio + floor * (_rms(audio) / _rms(floor) * 10 ** (-rng.uniform(40.0, 70.0) / 20))
    loudest = min(LOUDEST, 20 * np.log10(0.98 * _rms(audio) / np.abs(audio).max()))
    level = 10 ** (rng.uniform(QUIETEST, loudest) / 20)
    return (audio * (level / _rms(audio))).astype(np.float32)


# ---- noise


def _band(rng: Generator, count: int) -> np.ndarray:
    low = _log_uniform(rng, 60.0, 5000.0)
    edges = (low, min(low * 2 ** rng.uniform(0.3, 2.5), 7800.0))
    return sosfilt(butter(4, edges, "bandpass", fs=SAMPLING_RATE, output="sos"), rng.standard_normal(count))


def _hum(rng: Generator, count: int) -> np.ndarray:
    """Mains hum: 50 or 60 Hz with up to 40 harmonics over a little noise."""
    frequency = rng.choice((50.0, 60.0)) * rng.uniform(0.998, 1.002)
    harmonics = np.arange(1, rng.integers(5, 41))
    partials = harmonics ** -rng.uniform(0.3, 2.0) * np.exp(2j * np.pi * rng.random(len(harmonics)))
    hum = _periodic(np.arange(count) * frequency / SAMPLING_RATE, partials)
    noise = _coloured(rng, count, 1.0)
    return hum / _rms(hum) + noise / _rms(noise) * rng.uniform(0.01, 0.3)


def _wind(rng: Generator, count: int) -> np.ndarray:
    """Noise that comes and goes in gusts, 0.5 to 4 in a second."""
    gusts = np.arange(count / SAMPLING_RATE * rng.uniform(0.5, 4.0) + 1)
    loudness = np.interp(np.linspace(0, gusts[-1], count), gusts, rng.normal(size=len(gusts)))
    return _coloured(rng, count, rng.uniform(0.8, 2.0)) * np.exp(rng.uniform(0.4, 1.0) * loudness)


def _clicks(rng: Generator, count: int) -> np.ndarray:
    """Drops at random moments, from a few clicks to dense rain: each is a damped resonance."""
    number = max(5, rng.poisson(count / SAMPLING_RATE * _log_uniform(rng, 5.0, 3000.0)))
    drops = np.zeros(count)
    drops[rng.integers(count * 3 // 4 if number < 20 else count, size=number)] = rng.uniform(0.3, 1.0, number)
    time = _time(400)
    resonance = np.exp(-time / rng.uniform(0.001, 0.005)) * np.sin(2 * np.pi * _log_uniform(rng, 500.0, 7000.0) * time)
    return oaconvolve(drops, resonance)[:count]


NOISES: dict[str, Sound] = {
    "white": partial(_coloured, exponent=0.0),
    "pink": partial(_coloured, exponent=1.0),
    "brown": partial(_coloured, exponent=2.0),
    "band": _band,
    "hum": _hum,
    "wind": _wind,
    "clicks": _clicks,
}

# ---- tones


def _chord(rng: Generator, count: int, voices: int | None = None) -> np.ndarray:
    """Steady sines, one (`voices`) or two to five in simple ratios."""
    lowest = _log_uniform(rng, 80.0, 6000.0 if voices == 1 else 2000.0)
    ratios = np.array((1, 5 / 4, 3 / 2, 2, 5 / 2))[: voices or rng.integers(2, 6)]
    cycles = np.outer(lowest * ratios, _time(count))
    return rng.uniform(0.3, 1.0, len(ratios)) @ np.sin(2 * np.pi * cycles)


def _sweep(rng: Generator, count: int) -> np.ndarray:
    """A chirp, up or down, once or again and again as a siren."""
    period = count // rng.integers(1, 5)
    start, end = _log_uniform(rng, 80.0, 7500.0, 2)
    time = np.arange(count) % period / SAMPLING_RATE
    return chirp(time, start, period / SAMPLING_RATE, end, method=str(rng.choice(("linear", "logarithmic"))))


def _pattern(frequencies: np.ndarray, count: int, on: float, off: float) -> np.ndarray:
    """Plays the chords of `frequencies` [chords, voices] in turn, each for `on` seconds with a pause of `off`."""
    on, off = round(on * SAMPLING_RATE), round(off * SAMPLING_RATE)
    number, position = np.divmod(np.arange(count), on + off)
    cycles = frequencies[number % len(frequencies)].T * position / SAMPLING_RATE
    return np.sin(2 * np.pi * cycles).sum(axis=0) * np.clip(np.minimum(position, on - position) / 80, 0.0, 1.0)


def _beeps(rng: Generator, count: int) -> np.ndarray:
    pitches = _log_uniform(rng, 300.0, 4000.0, int(rng.integers(1, 4)))
    return _pattern(pitches[:, None], count, rng.uniform(0.05, 0.6), rng.uniform(0.02, 0.6))


def _dial(rng: Generator, count: int) -> np.ndarray:
    """Random telephone keys (DTMF, ITU-T Q.23)."""
    keys = np.array(list(product((697.0, 770.0, 852.0, 941.0), (1209.0, 1336.0, 1477.0, 1633.0))))
    return _pattern(keys[rng.integers(16, size=20)], count, rng.uniform(0.06, 0.25), rng.uniform(0.04, 0.2))


def _vibrato(rng: Generator, count: int) -> np.ndarray:
    """A tone with up to eight harmonics whose pitch swings 3 to 9 times in a second."""
    swing = 2 ** (rng.uniform(0.1, 1.0) / 12 * np.sin(2 * np.pi * rng.uniform(3.0, 9.0) * _time(count)))
    cycles = np.cumsum(_log_uniform(rng, 100.0, 800.0) * swing) / SAMPLING_RATE
    return _periodic(cycles, np.arange(1.0, rng.integers(2, 10)) ** -rng.uniform(0.5, 2.0))


TONES: dict[str, Sound] = {
    "sine": partial(_chord, voices=1),
    "chord": _chord,
    "sweep": _sweep,
    "beeps": _beeps,
    "dial": _dial,
    "vibrato": _vibrato,
}

# ---- music


def _additive(
    rng: Generator, frequency: float, count: int, slope: float, odd: bool, attack: float, decay: float
) -> np.ndarray:
    """A note of harmonics that weaken as 1 / number**slope, with an attack and a decay in seconds."""
    number = np.arange(1.0, min(16, 7500 // frequency) + 1)
    partials = number**-slope * ((number % 2 == 1) | (not odd))
    time = _time(count)
    return _periodic(frequency * time, partials) * np.minimum(time / attack, 1.0) * np.exp(-time / decay)


def _bell(rng: Generator, frequency: float, count: int) -> np.ndarray:
    """Frequency modulation with an irrational ratio (Chowning, 1973)."""
    phase = 2 * np.pi * frequency * np.arange(count) / SAMPLING_RATE
    fading = np.exp(-np.arange(count) / (0.6 * SAMPLING_RATE))
    return np.sin(phase + 2.0 * fading * np.sin(np.sqrt(2) * phase)) * fading


def _plucked(rng: Generator, frequency: float, count: int) -> np.ndarray:
    """A string (Karplus and Strong, 1983): noise in a loop that averages neighbours each time round.

    All rounds at once: averaging multiplies the spectrum by cos(angle / 2), without its delay of half a sample.
    """
    size = round(SAMPLING_RATE / frequency)
    spectrum = rfft(rng.standard_normal(size)) * (np.arange(size // 2 + 1) > 0)
    loss = 0.998 * np.cos(np.pi * np.arange(size // 2 + 1) / size)
    return irfft(spectrum * loss ** np.arange(-(-count // size))[:, None], size).ravel()[:count]


INSTRUMENTS: tuple[Instrument, ...] = (
    partial(_additive, slope=1.5, odd=False, attack=0.004, decay=0.4),  # like a piano
    partial(_additive, slope=0.8, odd=False, attack=0.02, decay=np.inf),  # an organ
    partial(_additive, slope=1.0, odd=True, attack=0.05, decay=np.inf),  # a clarinet
    partial(_additive, slope=2.5, odd=False, attack=0.08, decay=2.0),  # a flute
    _bell,
    _plucked,
    _plucked,
)


def _add(audio: np.ndarray, sound: np.ndarray, start: int) -> None:
    audio[start : start + len(sound)] += sound[: max(0, len(audio) - start)]


def _play(rng: Generator, notes: Sequence[tuple], pitch: Callable[[int], float], step: int, count: int) -> np.ndarray:
    """One random instrument plays `notes`: each a start and a length in steps (of `step` samples) and a degree."""
    instrument = INSTRUMENTS[rng.integers(len(INSTRUMENTS))]
    audio = np.zeros(count)
    for start, length, degree in notes:
        sound = instrument(rng, pitch(degree), length * step) * rng.uniform(0.6, 1.0)
        sound[-160:] *= np.linspace(1.0, 0.0, 160)
        _add(audio, sound, start * step)
    return audio


def _drums(rng: Generator, step: int, count: int) -> np.ndarray:
    """Kick and snare in turn on the beats, now and then another kick, and a hi-hat on most steps."""
    time = _time(SAMPLING_RATE // 4)
    kick = 2.0 * np.sin(2 * np.pi * (45 * time - 3.0 * np.exp(-time / 0.03))) * np.exp(-time / 0.08)
    burst = rng.standard_normal(len(time))
    snare = 0.6 * burst * np.exp(-time / rng.uniform(0.03, 0.08))
    hat = 0.2 * np.diff(burst, prepend=0.0) * np.exp(-time / rng.uniform(0.01, 0.03))
    audio = np.zeros(count)
    for number, start in enumerate(range(0, count, step)):
        _add(audio, hat * (rng.random() < 0.8), start)
        _add(audio, kick * (number % 4 == 0 or rng.random() < 0.1), start)
        _add(audio, snare * (number % 4 == 2), start)
    return audio


def _melody(rng: Generator, steps: int) -> list[tuple[int, int, int]]:
    """A random walk over the degrees of a scale with a rest now and then: starts and lengths in steps, degrees."""
    notes: list[tuple[int, int, int]] = []
    start, degree = 0, int(rng.integers(5, 13))
    while start < steps:
        length = int(rng.choice((1, 1, 2, 2, 3, 4)))
        if not notes or rng.random() > 0.15:  # else a rest
            notes.append((start, length, degree))
        start, degree = start + length, int(np.clip(degree + rng.integers(-3, 4), 3, 16))
    return notes


def music(rng: Generator, count: int) -> np.ndarray:
    """A random melody, alone or with chords, bass and drums, 70 to 160 beats a minute."""
    step = round(30 * SAMPLING_RATE / rng.uniform(70.0, 160.0))  # an eighth note, in samples
    steps = -(-count // step)
    scale, root = SCALES[rng.integers(len(SCALES))], rng.integers(45, 60)  # MIDI numbers, 69 is 440 Hz
    roots = rng.choice((0, 0, 3, 4, 5), size=steps // 8 + 1)  # of the chord of each bar

    def pitch(degree: int) -> float:
        octave, position = divmod(degree, len(scale))
        return 440.0 * 2 ** ((root + 12 * octave + scale[position] - 69) / 12)

    melody = _melody(rng, steps)
    chords = [(8 * bar, 8, chord + third) for bar, chord in enumerate(roots) for third in (0, 2, 4)]
    bass = [(start, 2, roots[start // 8] - len(scale)) for start in range(0, steps, 2)]
    parts = [_play(rng, melody, pitch, step, count)]
    parts += [_play(rng, notes, pitch, step, count) for notes in (chords, bass) if rng.random() < 0.6]
    parts += [_drums(rng, step, count)] if rng.random() < 0.5 else []
    return np.sum([part * (rng.uniform(0.4, 1.0) / _rms(part)) for part in parts], axis=0)


# ---- files


def _one_of(sounds: dict[str, Sound], rng: Generator, count: int) -> np.ndarray:
    return sounds[rng.choice(list(sounds))](rng, count)


# The place in this table is part of the seed: a new kind goes to the end
KINDS: dict[str, Sound] = {"noise": partial(_one_of, NOISES), "tones": partial(_one_of, TONES), "music": music}


def synthesize(folder: str | os.PathLike, clips_per_kind: int = 50, seed: int = 0) -> float:
    """Writes `metadata.csv` (label -1, `emotion` and `corpus` are the kind) and 16 kHz mono 16-bit FLAC files.

    The folder appears when all is written: an interrupted run leaves none.

    Args:
        folder: new or empty.
        clips_per_kind: clips of each of noise, tones and music, at least 1.
        seed: of everything random, at least 0.

    Returns:
        The seconds of audio.

    Raises:
        FileExistsError: `folder` is not empty or not a folder.
        ValueError: a number is out of range.
    """
    if clips_per_kind < 1 or seed < 0:
        raise ValueError(f"clips_per_kind must be >= 1 and seed >= 0, got {clips_per_kind} and {seed}")
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder; give a new or empty one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    samples, rows = 0, []
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        unfinished = Path(temporary) / "clips"
        unfinished.mkdir()
        for (number, (kind, make)), index in product(enumerate(KINDS.items()), range(clips_per_kind)):
            rng = np.random.default_rng((seed, number, index))
            audio = _finish(rng, make(rng, round(rng.uniform(SHORTEST, LONGEST) * SAMPLING_RATE)))
            name = f"{kind}_{index:05d}.flac"
            soundfile.write(unfinished / name, audio, SAMPLING_RATE, subtype="PCM_16")
            rows.append((name, -1, kind, "", "", kind, ""))
            samples += len(audio)
        with (unfinished / "metadata.csv").open("w", encoding="utf-8", newline="") as lines:
            csv.writer(lines, lineterminator="\n").writerows([COLUMNS, *rows])
        if folder.exists():
            folder.rmdir()  # the system refuses this if the folder is not empty any more
        unfinished.rename(folder)
    return samples / SAMPLING_RATE


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        description="Write clips without any speech (noise, tones, music), to be used as --ood_dir.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="new or empty folder to write")
    parser.add_argument("--clips_per_kind", type=int, default=50, help="clips of each of noise, tones and music")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same clips; more clips keep the earlier ones")
    options = parser.parse_args(arguments)
    try:
        seconds = synthesize(options.folder, options.clips_per_kind, options.seed)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(KINDS) * options.clips_per_kind} clips, {seconds:.0f} seconds without speech, in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
