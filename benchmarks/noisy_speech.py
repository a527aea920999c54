# SPDX-License-Identifier: Apache-2.0
"""Clips as they sound elsewhere: other people talking, pink noise, a room. All of it is made from a seed, without
other data than clips of the training.

1. `pink_noise`, `babble`: what happens to a waveform, beside the room of `mmser/augmentation.py`
2. `CONDITIONS`: their names in the tables
3. `choose_clips`, `write_noisy_split`: the clips that are measured, as a folder for each condition
"""

import csv
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import soundfile

from audio_mmser import load_audio
from mmser.augmentation import augmentation_generator, reverberate, room_response

RATE = 16_000
VOICES = 6  # that talk at the same time in babble
SNRS = (20, 10, 5, 0)  # dB


def pink_noise(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """[T] float64 noise of power 1 whose power falls by 3 dB an octave, from 20 Hz on."""
    frequencies = np.fft.rfftfreq(max(2, num_samples), 1 / RATE)
    shape = (2, len(frequencies))
    spectrum = (rng.standard_normal(shape) * [[1], [1j]]).sum(axis=0) / np.sqrt(np.maximum(frequencies, 20.0))
    spectrum[0] = 0
    return _unit_power(np.fft.irfft(spectrum, max(2, num_samples))[:num_samples])


def babble(voices: Sequence[np.ndarray], num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """[T] float64 of power 1: voices, all equally loud, each from a random place on and again from its start."""
    mixed = np.zeros(num_samples)
    for voice in voices:
        start = rng.integers(len(voice))
        mixed += np.resize(np.roll(_unit_power(voice), -start), num_samples)
    return _unit_power(mixed)


def mix(waveform: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """The clip [T] with noise [T] of power 1, at a signal-to-noise ratio in dB."""
    return waveform + noise * np.sqrt(_power(waveform) / 10 ** (snr_db / 10))


def _power(waveform: np.ndarray) -> float:
    return float(np.mean(np.square(waveform, dtype=np.float64)))


def _unit_power(waveform: np.ndarray) -> np.ndarray:
    return waveform / np.sqrt(max(_power(waveform), 1e-20))


Voices = Callable[[], list[np.ndarray]]  # draws `VOICES` clips
Change = Callable[[np.ndarray, Voices, np.random.Generator], np.ndarray]  # clip, voices, randomness


def _with_noise(snr_db: float) -> Change:
    def change(clip: np.ndarray, voices: Voices, rng: np.random.Generator) -> np.ndarray:
        is_babble = rng.random() < 0.5
        return mix(clip, babble(voices(), len(clip), rng) if is_babble else pink_noise(len(clip), rng), snr_db)

    return change


CONDITIONS: dict[str, Change] = {
    "clean": lambda clip, voices, rng: clip,
    **{f"{snr} dB": _with_noise(snr) for snr in SNRS},  # babble for one half of the clips, pink noise for the other
    "reverberation": lambda clip, voices, rng: reverberate(clip, room_response(rng)),
}


def choose_clips(split: datasets.Dataset, number: int) -> datasets.Dataset:
    """So many clips with audio, or all; each corpus and class has the same share of them as of the split."""
    rows = [index for index, audio in enumerate(split["audio"]) if audio]
    corpora = split["corpus"] if "corpus" in split.column_names else [""] * len(split)
    rows.sort(key=lambda index: (corpora[index], split["labels"][index]))
    places = np.linspace(0, len(rows) - 1, min(number, len(rows))).round().astype(int)
    return split.select([rows[place] for place in places])


def write_noisy_split(
    folder: Path, condition: str, clips: datasets.Dataset, voices: datasets.Dataset, label_names: Sequence[str]
) -> Path:
    """
    Write a folder that `load_emotion_split` reads: clips under one of the `CONDITIONS`.

    Args:
        folder: gets a folder of its own for the condition. A complete one is left as it is.
        condition: its name; the voices in it and its randomness depend on the clip's place and the condition alone.
        clips: those to change.
        voices: clips that babble is made of.
        label_names: in the order of the class ids.
    Returns: the folder of the condition.
    """
    own = folder / condition.replace(" ", "_")
    if (own / "metadata.csv").is_file():
        return own
    own.mkdir(parents=True, exist_ok=True)
    rows, number = [], list(CONDITIONS).index(condition)
    for index, clip in enumerate(clips):
        rng = augmentation_generator(0, number, index)
        draw = functools.partial(_draw_voices, voices, rng)
        waveform = load_audio(clip["audio"], target_sampling_rate=RATE)
        name = f"{index:04d}.wav"
        soundfile.write(own / name, CONDITIONS[condition](waveform, draw, rng), RATE, "FLOAT")
        row = {"file_name": name, "label": label_names[clip["labels"]], "transcription": clip.get("text") or ""}
        rows.append(row | {column: clip.get(column) or "" for column in ("speaker", "corpus", "language")})
    with open(own / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return own


def _draw_voices(clips: datasets.Dataset, rng: np.random.Generator) -> list[np.ndarray]:
    chosen = rng.choice(len(clips), VOICES, replace=False)
    return [load_audio(clips[int(index)]["audio"], target_sampling_rate=RATE) for index in chosen]
