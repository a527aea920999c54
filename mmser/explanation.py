# SPDX-License-Identifier: Apache-2.0
"""`explain`: which seconds of a clip and which of its words moved the answer of a model, by occlusion.

A piece is taken away and the clip is classified again: what the score loses is what the piece said for the answer
(Zeiler and Fergus 2014, "Visualizing and Understanding Convolutional Networks", who cover pieces of pictures). This
needs only the answers, so every checkpoint and export can be explained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.utils import logging

from mmser.prediction_arguments import LONG_SECONDS

if TYPE_CHECKING:  # a command imports this before it knows that it needs torch
    from processing_mmser import MMSERPipeline

MIN_WINDOW = 0.05  # seconds; each silence is a classification of the whole clip
FADE_SECONDS = 0.01  # so that silence does not begin with a click


@dataclass(frozen=True)
class Effect:
    """
    What a piece of a clip did to the score of the answer.

    Args:
        change (`float`): the score with the piece minus the score without it, in [-1, 1]. Above 0 it speaks for the
            answer, below 0 against it.
        start, end (`float`, seconds): of a piece of sound.
        word (`str`): of a text.
    """

    change: float
    start: float = 0.0
    end: float = 0.0
    word: str = ""


@dataclass(frozen=True)
class Explanation:
    """
    An answer, and what moved it.

    Args:
        label (`str`): the class that is explained.
        score (`float`): its score for the whole clip.
        sound (`list` of [`Effect`]): of consecutive pieces of the sound; empty without sound.
        words (`list` of [`Effect`]): of each word; empty without text.
    """

    label: str
    score: float
    sound: list[Effect] = field(default_factory=list)
    words: list[Effect] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each piece, for a table."""
        sound = [
            {"start": f"{one.start:.2f}", "end": f"{one.end:.2f}", "word": "", "change": one.change}
            for one in self.sound
        ]
        return [*sound, *({"start": None, "end": None, "word": one.word, "change": one.change} for one in self.words)]


def split_words(text: str) -> list[str]:
    """The words of a text; its characters, where the script has no spaces between words."""
    words = text.split()
    return list(words[0]) if len(words) == 1 and _is_unspaced(words[0]) else words


def _is_unspaced(text: str) -> bool:
    """Whether a text is written in Chinese, Japanese or Thai characters."""
    return any("\u0e00" <= c <= "\u0e7f" or "\u3040" <= c <= "\u30ff" or "\u4e00" <= c <= "\u9fff" for c in text)


def without_word(text: str, index: int) -> str:
    """A text without one of `split_words`."""
    words = split_words(text)
    joiner = "" if len(text.split()) == 1 and len(words) > 1 else " "
    return joiner.join(words[:index] + words[index + 1 :])


def silence(waveform: np.ndarray, sampling_rate: int, start: float, end: float) -> np.ndarray:
    """A copy of `waveform` [T] that is silent from `start` to `end` (seconds), with short fades inside that time."""
    first, last = round(start * sampling_rate), min(round(end * sampling_rate), len(waveform))
    fade = min(round(FADE_SECONDS * sampling_rate), (last - first) // 2)
    gain = np.zeros(last - first, dtype=np.float32)
    ramp = 0.5 * (1 + np.cos(np.pi * (np.arange(fade) + 1) / (fade + 1)))
    gain[:fade], gain[len(gain) - fade :] = ramp, ramp[::-1]
    result = np.array(waveform, dtype=np.float32)
    result[first:last] *= gain
    return result


def explain(
    classifier: "MMSERPipeline",
    waveform: np.ndarray | None = None,
    sampling_rate: int = 16_000,
    text: str | None = None,
    label: str | None = None,
    window_s: float = 0.5,
    batch_size: int = 8,
) -> Explanation:
    """
    Classify a clip, and again without each of its pieces.

    Args:
        classifier: the pipeline of a checkpoint or of an export.
        waveform: mono [T] in [-1, 1], at most 30 s; None for a text alone.
        sampling_rate: of the waveform, in Hz.
        text: what is said; None for a sound alone.
        label: the class to explain; by default the one with the highest score.
        window_s: the length of a silence, in seconds, at least `MIN_WINDOW`. Silences begin every half of it; a piece
            of that half has the mean of those that cover it.
        batch_size: clips at a time.

    Raises:
        ValueError: there is nothing to explain, the clip is too long, or the model has no such label.
    """
    if waveform is None and not text:
        raise ValueError("There is nothing to explain: give a sound, a text, or both.")
    if not window_s >= MIN_WINDOW:
        raise ValueError(f"The window lasts at least {MIN_WINDOW} s, got {window_s}.")
    seconds = 0.0 if waveform is None else len(waveform) / sampling_rate
    if seconds > LONG_SECONDS:
        raise ValueError(
            f"The clip lasts {seconds:.0f} s; at most {LONG_SECONDS:.0f} s can be explained: cut it first."
        )

    def item(sound: np.ndarray | None, words: str | None) -> dict[str, Any]:
        audio = {} if sound is None else {"raw": sound, "sampling_rate": sampling_rate}
        return {**audio, **({"text": words} if words else {})}

    whole = _scores(classifier, [item(waveform, text)], 1)[0]
    label = max(whole, key=lambda name: whole[name]) if label is None else label
    if label not in whole:
        raise ValueError(f"The model has no label {label}; there are {', '.join(whole)}.")
    windows: list[tuple[float, float]] = []
    clips: list[dict[str, Any]] = []
    if waveform is not None:
        hop = window_s / 2
        pieces = max(1, int(np.ceil(seconds / hop - 1e-9)))
        windows = [(max(0.0, i * hop), min((i + 2) * hop, seconds)) for i in range(-1, pieces)]
        clips = [item(silence(waveform, sampling_rate, *window), text) for window in windows]
    words = split_words(text) if text else []
    # The one word of a text without sound cannot be taken away: nothing would be left
    removable = words if waveform is not None or len(words) > 1 else []
    clips += [item(waveform, without_word(text or "", index)) for index in range(len(removable))]
    changes = [whole[label] - scores[label] for scores in _scores(classifier, clips, batch_size)]
    by_window, by_word = changes[: len(windows)], changes[len(windows) :]
    sound = [
        Effect((before + after) / 2, start, min(start + window_s / 2, seconds))
        for before, after, (start, _) in zip(by_window, by_window[1:], windows[1:], strict=False)
    ]
    return Explanation(
        label,
        whole[label],
        sound,
        [Effect(change, word=word) for word, change in zip(removable, by_word, strict=True)],
    )


def _scores(classifier: "MMSERPipeline", clips: Sequence[dict[str, Any]], batch_size: int) -> list[dict[str, float]]:
    """The score of each label, for each clip."""
    found: list[dict[str, float]] = []
    starts = range(0, len(clips), batch_size)
    for start in logging.tqdm(starts, desc="Explaining", leave=False, disable=len(starts) < 3 or None):
        batch = list(clips[start : start + batch_size])
        for answers in classifier(batch, batch_size=len(batch), top_k=None):
            found.append({one["label"]: float(one["score"]) for one in answers})
    return found
