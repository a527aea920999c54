# SPDX-License-Identifier: Apache-2.0
"""What the page does with a recording, without Gradio: `Answers.one` and `Answers.many` give what it shows."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audio_mmser import stream_audio
from mmser import app_html
from mmser.plots import check_matplotlib
from mmser.prediction_arguments import PredictionArguments
from mmser.prediction_files import content, draw
from mmser.prediction_inputs import RATE, Input, measure
from mmser.prediction_run import Job, Prediction, classify
from mmser.timed_files import clock
from processing_mmser import MMSERPipeline

SEGMENTS_ABOVE = 20.0  # seconds: longer ones are shown over time
FRAME = 0.02  # seconds, of the waveform that is drawn
POINTS = 900  # of the drawn waveform, at most


class Upload(Input):
    """A recording that came through the page, which keeps it in a folder that nobody wants to read the name of."""

    @property
    def name(self) -> str:
        return Path(super().name).name


@dataclass
class Answers:
    """
    The answers of a model as HTML.

    Args:
        classifier (`MMSERPipeline`): the model.
        checkpoint (`str`): what it was loaded from.
        max_seconds (`float`): longer recordings are refused.
    """

    classifier: MMSERPipeline
    checkpoint: str
    max_seconds: float

    def __post_init__(self):
        check_matplotlib()  # when the page starts, not with the first long recording
        self.options = PredictionArguments(["uploads"], self.checkpoint, segments_above=SEGMENTS_ABOVE)

    def one(self, path: str | None, text: str | None = None) -> str:
        """
        What the page says of one recording.

        Args:
            path: of the file; None for words alone.
            text: what is said in it, if that is known.
        """
        words = (text or "").strip() or None
        if path is None and words is None:
            return app_html.error("There is nothing to classify: record or upload a recording, or write what is said.")
        one, notes = Upload(path or "", text=words), []
        self._check([one])
        if words is not None and _is_long(one):
            one.text = None
            notes.append(
                f"What is said is left out: the recording is longer than {SEGMENTS_ABOVE:g} s, so it is cut into "
                "segments, and nothing tells which words belong to which."
            )
        (prediction,) = self._classify([one])
        if prediction.error:
            what = one.name or "What is said"
            return app_html.error(f"{what} cannot be classified: {prediction.error}")
        waveform = envelope(path) if path else None
        rejects = getattr(self.classifier.model.config, "openmax_threshold", "fitted") is not None
        parts = [app_html.answer_to_one(prediction, rejects, notes)]
        if prediction.segments:
            picture = self._picture(prediction, waveform)
            table = content([prediction], self.classifier.labels, "csv", by_segment=True)
            parts.append(app_html.over_time(prediction, picture, table))
        return "\n".join(parts)

    def many(self, paths: Sequence[str] | None) -> str:
        """What the page says of several recordings: a table, and the same as a CSV file with all scores."""
        if not paths:
            return app_html.error("There is nothing to classify: choose some recordings.")
        inputs = [Upload(path) for path in paths]
        self._check(inputs)
        predictions = self._classify(inputs)
        return app_html.table_of_many(predictions, content(predictions, self.classifier.labels, "csv", False))

    def _check(self, inputs: Sequence[Input]) -> None:
        """Measure recordings; one that is too long gets its error."""
        measure(inputs)
        for one in inputs:
            if one.seconds is not None and one.seconds > self.max_seconds:
                one.error = f"it lasts {clock(one.seconds)}, and this page takes at most {clock(self.max_seconds)}."

    def _classify(self, inputs: Sequence[Input]) -> list[Prediction]:
        return classify(self.classifier, Job(list(inputs), [], [], by_segment=False), self.options)

    def _picture(self, prediction: Prediction, waveform: np.ndarray | None) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "timeline.png"
            draw(prediction, self.classifier.labels, path, waveform)
            return path.read_bytes()


def _is_long(one: Input) -> bool:
    return one.seconds is not None and one.seconds > SEGMENTS_ABOVE


def envelope(path: str, points: int = POINTS) -> np.ndarray:
    """
    The outline of a recording of any length, which is not held in memory.

    Returns:
        `np.ndarray` of shape (at most `points`, 2): the lowest and the highest sample of equal times.
    """
    size = round(FRAME * RATE)
    rest, frames = np.zeros(0, dtype=np.float32), []
    for block in stream_audio(path, None, RATE):
        samples = np.concatenate([rest, block])
        whole = len(samples) // size * size
        frames.append(_outline(samples[:whole].reshape(-1, size)))
        rest = samples[whole:]
    if len(rest):
        frames.append(_outline(rest[None]))
    outline = np.concatenate(frames)  # [F, 2]
    starts = np.unique(np.linspace(0, len(outline), min(points, len(outline)), endpoint=False).astype(int))
    lowest, highest = (np.minimum.reduceat(outline[:, 0], starts), np.maximum.reduceat(outline[:, 1], starts))
    return np.stack([lowest, highest], axis=1)


def _outline(frames: np.ndarray) -> np.ndarray:
    """[F, samples] -> [F, 2]."""
    return np.stack([frames.min(axis=1), frames.max(axis=1)], axis=1)
