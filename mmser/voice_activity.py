# SPDX-License-Identifier: Apache-2.0
"""`VoiceActivity`: which moments of a stream are loud enough, against the noise of the place, to be speech; `Silence`:
where a recording has none.

Energy with two thresholds (Rabiner & Sambur 1975, An algorithm for determining the endpoints of isolated utterances,
Bell System Technical Journal 54(2)) above a noise floor that follows the place: the minimum of the smoothed power over
the last seconds (Martin 2001, Noise power spectral density estimation based on optimal smoothing and minimum
statistics, IEEE Transactions on Speech and Audio Processing 9(5), here for the power as a whole). It knows nothing of
voices: music, or other people, are speech to it.
"""

import math
from collections import deque
from collections.abc import Iterable

import numpy as np
from scipy.signal import butter, sosfilt, sosfilt_zi

FRAME_SECONDS = 0.02
HIGH_PASS = 150  # Hz: an offset, hum and rumble are below, and most of the energy of voices is above
SMOOTHING = 0.8  # of the power whose minimum is the floor: a time constant of 5 frames
SUBWINDOWS, SUBWINDOW_FRAMES = 8, 25  # the minimum is that of the last 3.5 to 4 s, as if speech never lasts longer
FIRST_FLOOR, LOWEST_FLOOR = -55.0, -70.0  # dB full scale: at most at the start, and at least
ON, OFF = 9.0, 5.0  # dB above the floor
START_FRAMES = 3  # as many in a row above ON start speech: a click is shorter
LEAD_FRAMES = 5  # before them are speech too: a word may begin softly
LOUD = 0.01  # -40 dB full scale: what is louder is no silence of a recording, even if it is steady as noise is
HANGOVER_FRAMES = 15  # as many in a row below OFF end it: a pause between words is shorter


def _ratio(decibels: float) -> float:
    """Of powers."""
    return 10 ** (decibels / 10)


def _cut_into_frames(rest: np.ndarray, samples: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """What was left and what comes next -> the frames [N, length] that are whole, and what is left now."""
    samples = np.concatenate([rest, samples])
    whole, rest = np.split(samples, [len(samples) // length * length])
    return whole.reshape(-1, length), rest.copy()


class VoiceActivity:
    """
    Tells of each frame of `FRAME_SECONDS` whether it is speech, `START_FRAMES + LEAD_FRAMES - 1` frames later.

    What it tells depends on the samples alone, and not on how they are cut into pushes.

    Args:
        sampling_rate (`int`, Hz): of the samples.
    """

    def __init__(self, sampling_rate: int):
        self.frame_length = round(FRAME_SECONDS * sampling_rate)
        self._filter = butter(2, HIGH_PASS, "highpass", fs=sampling_rate, output="sos")
        self._filter_state: np.ndarray | None = None
        self._rest = np.zeros(0, dtype=np.float32)  # less than a frame
        self._power = 0.0
        self._minimum = np.inf  # of the power in this subwindow, of which `_count` frames have come
        self._count = 0
        self._minima = deque([_ratio(FIRST_FLOOR)] * (SUBWINDOWS - 1), SUBWINDOWS - 1)  # of those before it
        self._lowest = min(self._minima)
        self._is_speech, self._loud, self._quiet = False, 0, 0
        self._undecided: deque[bool] = deque()

    def push(self, samples: np.ndarray) -> list[bool]:
        """
        Args:
            samples (`np.ndarray` of shape (time,), float): what comes next, any length, in [-1, 1].

        Returns:
            Of the next frames that are decided now, in order, whether they are speech.
        """
        frames, self._rest = _cut_into_frames(self._rest, samples, self.frame_length)
        whole, count = frames.ravel(), len(frames)
        if not count:
            return []
        if self._filter_state is None:  # as if the first sample had lasted for ever: an offset is no click
            self._filter_state = sosfilt_zi(self._filter) * float(whole[0])
        filtered, self._filter_state = sosfilt(self._filter, whole.astype(np.float64), zi=self._filter_state)
        powers = np.square(filtered).reshape(count, self.frame_length).mean(axis=1)
        return [decided for power in powers.tolist() for decided in self._add(power)]

    def flush(self) -> list[bool]:
        """The last frames, with what has been heard so far; a rest of less than a frame is left out."""
        decided = list(self._undecided)
        self._undecided.clear()
        return decided

    def _add(self, power: float) -> list[bool]:
        """One frame -> the frame that it decides, if any."""
        floor = self._follow_floor(power)
        self._loud = self._loud + 1 if power > floor * _ratio(ON) else 0
        self._quiet = 0 if power > floor * _ratio(OFF) else self._quiet + 1
        has_started = not self._is_speech and self._loud >= START_FRAMES
        if has_started:
            self._is_speech = True
        elif self._quiet >= HANGOVER_FRAMES:
            self._is_speech = False
        self._undecided.append(self._is_speech)
        if has_started:
            self._undecided = deque([True] * len(self._undecided))
        return [self._undecided.popleft()] if len(self._undecided) >= START_FRAMES + LEAD_FRAMES else []

    def _follow_floor(self, power: float) -> float:
        """The noise floor, a power, with this frame."""
        is_first = self._minimum == np.inf
        self._power = power if is_first else SMOOTHING * self._power + (1 - SMOOTHING) * power
        if self._count == SUBWINDOW_FRAMES:
            self._minima.append(self._minimum)
            self._lowest = min(self._minima)
            self._minimum, self._count = self._power, 0
        self._minimum = min(self._minimum, self._power)
        self._count += 1
        return max(min(self._minimum, self._lowest), _ratio(LOWEST_FLOOR))


class Silence:
    """
    Where a whole recording is silent: no speech is heard, and nothing is louder than `LOUD`.

    The second keeps speech in a loud and steady noise, which `VoiceActivity` may take for the noise.

    Args:
        blocks: the samples of shape (time,), in order, of any lengths.
        sampling_rate (`int`, Hz): of the samples.
    """

    def __init__(self, blocks: Iterable[np.ndarray], sampling_rate: int):
        activity, flags, peaks, rest = VoiceActivity(sampling_rate), [], [], np.zeros(0, dtype=np.float32)
        self.sampling_rate, self.frame_length = sampling_rate, activity.frame_length
        for block in blocks:
            flags += activity.push(block)
            frames, rest = _cut_into_frames(rest, block, self.frame_length)
            peaks.append(np.abs(frames).max(axis=1, initial=0.0))
        self._is_speech = np.array(flags + activity.flush(), dtype=bool)
        self._peaks = np.concatenate(peaks) if peaks else np.zeros(0)

    def holds(self, start: float, end: float) -> bool:
        """Whether there is nothing but silence between two times, in seconds."""
        first, last = (math.ceil(round(time * self.sampling_rate) / self.frame_length) for time in (start, end))
        peaks = self._peaks[first:last]
        return len(peaks) > 0 and not self._is_speech[first:last].any() and bool(peaks.max() <= LOUD)
