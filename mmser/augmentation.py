# SPDX-License-Identifier: Apache-2.0
"""Augmentation of waveforms: another speed, noise. Random numbers come from a generator seeded for each example."""

from dataclasses import dataclass

import numpy as np
import soxr


def augmentation_generator(seed: int, epoch: int, index: int, repeat: int = 0) -> np.random.Generator:
    """
    The random generator of one example in one epoch: the same in any batch, worker or process. `repeat` counts how
    often the example has come before in this epoch.
    """
    return np.random.default_rng([seed, epoch, index, *([repeat] if repeat else [])])


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
    signal_power = np.mean(np.square(waveform, dtype=np.float64))
    if signal_power == 0:
        return waveform
    noise = rng.standard_normal(len(waveform))
    noise_power = signal_power / 10 ** (snr_db / 10)
    return (waveform + noise * np.sqrt(noise_power / np.mean(np.square(noise)))).astype(np.float32)


@dataclass
class Augmenter:
    """Random speed and random noise, each with probability `probability`.

    Args:
        speed_range: lowest and highest speed factor, > 0.
        snr_db_range: lowest and highest signal-to-noise ratio, in dB; None adds no noise.
        probability: of each of the two, in [0, 1].
    """

    speed_range: tuple[float, float] = (0.9, 1.1)
    snr_db_range: tuple[float, float] | None = (10.0, 20.0)
    probability: float = 0.5

    def __post_init__(self):
        if not 0 < self.speed_range[0] <= self.speed_range[1]:
            raise ValueError(f"speed_range must be (low, high) with 0 < low <= high, got {self.speed_range}")
        if self.snr_db_range is not None and not self.snr_db_range[0] <= self.snr_db_range[1]:
            raise ValueError(f"snr_db_range must be (low, high) with low <= high, got {self.snr_db_range}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in [0, 1], got {self.probability}")

    def __call__(self, waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return an augmented copy of `waveform` ([T] float32), with random numbers from `rng` alone."""
        apply_speed, apply_noise = rng.random(2) < self.probability
        factor = rng.uniform(*self.speed_range)
        if apply_speed:
            waveform = change_speed(waveform, factor)
        if apply_noise and self.snr_db_range is not None:
            waveform = add_noise(waveform, rng.uniform(*self.snr_db_range), rng)
        return waveform
