# SPDX-License-Identifier: Apache-2.0
"""`MMSERStream`: sound as it comes in, a few samples at a time, to `StreamEvent`s: what the model says of each piece.

The pieces are those of the pipeline with `chunk_length_s`, so the scores of a piece are those of a recording as a
whole. Pieces without speech, by `mmser.voice_activity`, are not classified.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import soxr
import torch
from transformers import Pipeline

from audio_mmser import MIN_SECONDS, check_rate, load_audio
from configuration_mmser import MODALITIES, reason_unused
from mmser.timed_files import clock
from mmser.voice_activity import VoiceActivity
from pipeline_mmser import AudioClassificationTask, Chunk, Chunker, MMSEROnnxConfig, chunk_sizes

CHUNK_SECONDS = 4.0
BLOCK_SECONDS = 10  # the most of a long push that is worked on at once
MAX_CHANNELS = 32  # with more of them, an array is (channels, time)


@dataclass(frozen=True)
class StreamEvent:
    """
    What was heard in a piece of a stream. The pieces follow each other without a gap.

    Args:
        start, end (`float`, seconds): the piece, since the start of the stream.
        speech (`float`, seconds): how much of it is speech.
        scores (`dict[str, float]`): by label, best first; empty if the piece was not classified, as it has no speech.
        uncertainty, unknown_probability (`float`), is_unknown (`bool`): as of the pipeline with
            `return_uncertainty=True`: look at `is_unknown` first. None if the piece was not classified; the last two
            also while OpenMax is not fitted.
    """

    start: float
    end: float
    speech: float
    scores: dict[str, float] = field(default_factory=dict)
    uncertainty: float | None = None
    unknown_probability: float | None = None
    is_unknown: bool | None = None

    @property
    def has_speech(self) -> bool:
        """Whether there is any speech in the piece."""
        return self.speech > 0

    @property
    def label(self) -> str | None:
        """The best label; None if the piece was not classified. Where `is_unknown` is True, only the nearest class."""
        return next(iter(self.scores), None)

    def __str__(self) -> str:
        """One line, such as `0:02.7 - 0:05.3  happy 0.87, uncertainty 0.10`."""
        times = f"{clock(self.start, 1):>9} - {clock(self.end, 1)}"
        if self.label is None:
            return f"{times}  silence"
        numbers = f"{self.scores[self.label]:.2f}, uncertainty {self.uncertainty:.2f}"
        answer = f"none of these (nearest: {self.label})" if self.is_unknown else self.label
        return f"{times}  {answer} {numbers}"


class MMSERStream:
    """
    Classifies sound while it comes in.

    The events depend on the samples alone, not on how they are cut into pushes. An event comes as soon as the model
    has heard its piece and the context behind it, which is `stride_length_s` long. Little more than two chunks are
    held, however long the stream is. A model that takes texts is asked without one.

    A stream has no lock: push from one thread at a time. Several streams, each in its thread, may share a pipeline.

    Example:
        >>> stream = MMSERStream(classifier, sampling_rate=48000)
        >>> for samples in microphone:
        ...     for event in stream.push(samples):
        ...         print(event.start, event.end, event.label)
        >>> stream.flush()  # the last event

    Args:
        model (`MMSERPipeline` or `MMSERForAudioClassification`): the pipeline, of an exported model too, or a model.
        processor (`MMSERProcessor`): that of a model; by default the one beside its weights.
        sampling_rate (`int`, Hz): rate of the samples; other rates than the model's are resampled.
        chunk_length_s (`float`, seconds): how much the model hears at a time.
        stride_length_s (`float` or pair, seconds): how much of that, on its left and right, is context of a piece; by
            default a sixth on each side, so pieces are two thirds of a chunk.
        skip_silence (`bool`): do not classify pieces without speech; False classifies all.

    Raises:
        ValueError: no `sampling_rate`, one that is none, or times that make no pieces; a model without audio, or one
            that is not MMSER.
        TypeError: `model` is neither a pipeline nor a model.
    """

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        *,
        sampling_rate: int | None = None,
        chunk_length_s: float = CHUNK_SECONDS,
        stride_length_s: float | tuple[float, float] | None = None,
        skip_silence: bool = True,
    ):
        if sampling_rate is None:
            raise ValueError("`sampling_rate` is required: samples do not carry the rate, in Hz, that they have")
        check_rate(sampling_rate, "stream")
        self.sampling_rate, self.skip_silence = sampling_rate, skip_silence
        self._classifier = _make_pipeline(model, processor)
        extractor = self._classifier.processor.feature_extractor
        self._rate: int = extractor.sampling_rate
        self._sizes = chunk_sizes(extractor, chunk_length_s, stride_length_s)
        self.reset()

    def reset(self) -> None:
        """Forget all that was heard: the next samples are the first of a new stream, at 0 s."""
        self._resampler = None
        if self.sampling_rate != self._rate:
            self._resampler = soxr.ResampleStream(self.sampling_rate, self._rate, 1, dtype="float32", quality="HQ")
        self._activity, self._chunker = VoiceActivity(self._rate), Chunker(*self._sizes)
        self._due: deque[Chunk] = deque()  # whole, and not classified
        self._events: list[StreamEvent] = []  # not returned
        self._flags: list[bool] = []  # of frames, the first of them at `_flags_start`: whether they are speech
        self._flags_start = 0
        self._received, self._channels, self._has_ended = 0, 0, False

    def push(self, samples: np.ndarray | torch.Tensor) -> list[StreamEvent]:
        """
        Take in what comes next.

        Args:
            samples (`np.ndarray` or `torch.Tensor` of shape (time,) or (time, channels)): any number of them, also
                none. Floats in [-1, 1], or integers, which are scaled as by [`load_audio`]; channels are averaged.

        Returns:
            The events that are complete now, in order; most often none.

        Raises:
            ValueError: NaN or infinite samples, or of a dtype or shape that has no clear meaning: nothing of this push
                is taken in then. A push after `flush`.
            TypeError: no array and no tensor.
        """
        if self._has_ended:
            raise ValueError("the stream has ended with `flush`: call `reset` to start a new one")
        mono = self._as_mono(samples)
        self._received += len(mono)
        size = round(BLOCK_SECONDS * self.sampling_rate)
        for start in range(0, len(mono), size):
            self._hear(self._resample(mono[start : start + size]))
        return self._take_events()

    def flush(self) -> list[StreamEvent]:
        """
        End the stream. A second call returns nothing.

        Returns:
            The events of what is left, in order. The last chunk reaches back, as in the pipeline, to be whole.
        """
        if not self._has_ended:
            self._has_ended = True
            self._hear(self._resample(np.zeros(0, dtype=np.float32), last=True))
            self._flags += self._activity.flush()
            last = self._chunker.flush()
            if last is not None:
                self._due.append(last)
        return self._take_events()

    def _as_mono(self, samples: Any) -> np.ndarray:
        """Samples as a user gives them -> float32 of shape (time,)."""
        name = f"samples after {self._received / self.sampling_rate:.2f} s"
        if not isinstance(samples, (np.ndarray, torch.Tensor)):
            raise TypeError(f"{name}: expected an array or a tensor, got {type(samples).__name__}")
        shape = tuple(samples.shape)
        channels = shape[1] if len(shape) == 2 else 1
        if len(shape) not in (1, 2) or not 1 <= channels <= MAX_CHANNELS:
            raise ValueError(f"{name}: a stream takes (time,) or (time, channels), got an array of shape {shape}")
        if self._channels not in (0, channels):
            raise ValueError(f"{name}: {channels} channel(s) in shape {shape}, but there were {self._channels} before")
        if shape[0] == 0:
            return np.zeros(0, dtype=np.float32)
        columns = [samples] if len(shape) == 1 else [samples[:, channel] for channel in range(channels)]
        mono = [load_audio(column, self.sampling_rate, self.sampling_rate, name=name) for column in columns]
        self._channels = channels
        return mono[0] if channels == 1 else np.stack(mono).mean(axis=0, dtype=np.float32)

    def _resample(self, samples: np.ndarray, last: bool = False) -> np.ndarray:
        return samples if self._resampler is None else self._resampler.resample_chunk(samples, last=last)

    def _hear(self, samples: np.ndarray) -> None:
        """Take in samples at the model's rate."""
        self._flags += self._activity.push(samples)
        self._due.extend(self._chunker.push(samples))

    def _take_events(self) -> list[StreamEvent]:
        """
        Classify what is due. Should the model fail, or the user interrupt it, the next call takes up from there.
        """
        while self._due and (self._has_ended or self._frame_at(self._due[0].stop) <= self._decided):
            chunk = self._due[0]
            self._events.append(self._classify(chunk))
            self._due.popleft()
            del self._flags[: self._frame_at(chunk.stop) - self._flags_start]
            self._flags_start = self._frame_at(chunk.stop)
        events, self._events = self._events, []
        return events

    @property
    def _decided(self) -> int:
        """How many frames are known to be speech or none."""
        return self._flags_start + len(self._flags)

    def _frame_at(self, sample: int) -> int:
        """The first frame that begins there or later."""
        return math.ceil(sample / self._activity.frame_length)

    def _classify(self, chunk: Chunk) -> StreamEvent:
        """One at a time: the scores do not depend on what else is due."""
        length = self._activity.frame_length * sum(self._flags[: self._frame_at(chunk.stop) - self._flags_start])
        speech = min(length, chunk.stop - chunk.start) / self._rate
        event = StreamEvent(chunk.start / self._rate, chunk.stop / self._rate, speech)
        is_too_short = len(chunk.samples) < MIN_SECONDS * self._rate
        if is_too_short or (self.skip_silence and not event.has_speech):
            return event
        clip = {"raw": chunk.samples, "sampling_rate": self._rate}
        results = self._classifier(clip, chunk_length_s=None, top_k=None, return_uncertainty=True)
        scores = {result["label"]: result["score"] for result in results}
        names = ("uncertainty", "unknown_probability", "is_unknown")
        return StreamEvent(event.start, event.end, speech, scores, *(results[0][name] for name in names))


def _make_pipeline(model: Any, processor: Any) -> Any:
    """The pipeline of a model, or the one that was given, which hears audio."""
    if not hasattr(model, "config") and not isinstance(model, Pipeline):
        raise TypeError(f"`model` must be a pipeline or a model of MMSER, got {type(model).__name__}")
    classifier = model
    config = model.model.config if isinstance(model, Pipeline) else model.config
    if getattr(config, "model_type", None) not in ("mmser", MMSEROnnxConfig.model_type):
        raise ValueError(f"`model` must be one of MMSER, got {config.model_type!r}")
    modalities = getattr(config, "modalities", list(MODALITIES))  # the code of a checkpoint may be older
    if "audio" not in getattr(config, "used_modalities", modalities):
        raise ValueError(f"{reason_unused('audio', modalities)}, so there is nothing that it could hear")
    if not isinstance(model, Pipeline):
        classifier = AudioClassificationTask(False)(model, processor, device=model.device)
    if getattr(classifier, "processor", None) is None:
        raise ValueError("`model` must be the pipeline of MMSER: the one of Transformers has no processor")
    return classifier
