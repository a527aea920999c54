# SPDX-License-Identifier: Apache-2.0
"""The steps of `predict_hf.py`: the model, and what it says of clips, of recordings over time, and of speakers' turns.

One input that cannot be read never stops the others: it gets its reason, in `Prediction.error`.
"""

import itertools
import logging as python_logging
import math
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import pipeline
from transformers.utils import logging

from audio_mmser import MIN_SECONDS, SILENT, stream_audio
from configuration_mmser import MMSERConfig
from mmser.console import without_bars_of_weights
from mmser.model_loading import load_config
from mmser.names import Named, reading
from mmser.prediction_arguments import PredictionArguments
from mmser.prediction_inputs import Input, add_texts, find_inputs, measure, reason, speaker_turns
from mmser.timed_files import Span
from mmser.voice_activity import Silence
from modeling_mmser import register_auto_classes
from pipeline_mmser import MMSEROnnxConfig, mean_over_time, text_of_chunk
from processing_mmser import MMSERPipeline

UNHEARD = "nothing can be heard in it"


@dataclass
class Segment:
    """
    A piece of a recording, what is said in it, and what the model says of it.

    Args:
        start, end (`float`, seconds): its times.
        scores (`list`): a dict for each label, best first, as the pipeline gives them with `return_uncertainty=True`;
            empty with an error, and in silence.
        speaker, text, error (`str`): as far as there is one.
        is_silent (`bool`): nothing can be heard in it, and nothing is known to be said.
    """

    start: float
    end: float
    scores: list[dict] = field(default_factory=list)
    speaker: str = ""
    text: str = ""
    error: str = ""
    is_silent: bool = False


@dataclass
class Prediction:
    """
    What the model says of an input.

    Args:
        input (`Input`): what was classified.
        scores (`list`): as of `Segment`; of a recording in segments their mean over time.
        segments (`list`): in the order of their start; empty for what was classified as a whole.
    """

    input: Input
    scores: list[dict] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    @property
    def error(self) -> str:
        return self.input.error


@dataclass
class Job:
    """What is to be done: `turns` are those of each input, if any; `by_segment` says what the results are about."""

    inputs: list[Input]
    turns: list[list[Span]]
    notes: list[str]
    by_segment: bool


def find_job(options: PredictionArguments) -> Job:
    """All that is wrong with what was given, and can be seen without the model, is an error here."""
    inputs = find_inputs(options.inputs, options.allow_outside_files) or [Input("", text=options.text)]
    if options.needs_one_recording and len(inputs) > 1:
        raise ValueError(f"{options.needs_one_recording} is for one recording, and there are {len(inputs)} inputs.")
    measure(inputs)
    notes = add_texts(inputs, options)
    turns = speaker_turns(inputs, Path(options.speakers)) if options.speakers else []
    long = [one for one in inputs if _is_long(one, options)]
    if options.text is not None and long:
        raise ValueError(
            f"--text has no times, and {long[0].name} lasts {long[0].seconds:.0f} s, so it is cut into segments: give "
            "subtitles (--transcripts words.srt), or raise --segments_above."
        )
    without_times = leave_long_texts_out(inputs, options)
    if without_times:
        notes.append(
            f"recordings above {options.segments_above:g} s, whose texts have no times and are left out, as they are "
            f"cut into segments: {without_times}"
        )
    return Job(inputs, turns, notes, options.by_segment or (len(inputs) == 1 and bool(long)))


def leave_long_texts_out(inputs: Sequence[Input], options: PredictionArguments) -> int:
    """Take the texts of recordings that are cut away: nothing says which words belong to which segment."""
    with_text = [one for one in inputs if _is_long(one, options) and one.text is not None]
    for one in with_text:
        one.text = None
    return len(with_text)


def _is_long(one: Input, options: PredictionArguments) -> bool:
    return one.seconds is not None and one.seconds > options.segments_above


HIDDEN_ERROR = re.compile(r"an error is thrown:\nTraceback .*?^ValueError: (.*?)$", re.DOTALL | re.MULTILINE)


def load_classifier(checkpoint: str, device: str | None = None) -> MMSERPipeline:
    """
    The pipeline of a checkpoint, or of an exported model.

    Args:
        checkpoint: a folder or a name on the Hub.
        device: such as "cpu" or "cuda:1"; by default the GPU, if there is one.

    Raises:
        ValueError: what is no MMSER model, or a device that is not there.
        OSError: what cannot be read.
    """
    python_logging.getLogger("transformers.pipelines.base").setLevel(python_logging.ERROR)  # advice for programmers
    logging.set_verbosity_warning()
    register_auto_classes()  # the code of MMSER is here: the code that the checkpoint carries is not run
    flag = [Named("--checkpoint", checkpoint)]
    with reading(flag):
        content, _ = MMSERConfig.get_config_dict(checkpoint)
    if content.get("model_type") == MMSEROnnxConfig.model_type:
        providers = _providers(device)
        with reading(flag):
            return MMSERPipeline.from_onnx(checkpoint, providers=providers)
    load_config(checkpoint)  # refuses other models
    if device is not None:
        _check_device(device)
    with reading(flag), without_bars_of_weights():
        try:
            options: Any = {
                "device": device,
                "trust_remote_code": False,
            }  # and not None, with which the terminal is asked
            return pipeline("audio-classification", model=checkpoint, **options)
        except ValueError as error:  # in which Transformers hides the one of loading, as the end of a traceback
            if found := HIDDEN_ERROR.search(str(error)):
                raise ValueError(found[1]) from error
            raise


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error


def _providers(device: str | None) -> list[str] | None:
    """The execution providers of onnxruntime for a device."""
    if device is None:
        return None
    kinds = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
    if device not in kinds:
        raise ValueError(f"--device {device}: an exported model runs on {' or '.join(kinds)}.")
    import onnxruntime

    if kinds[device][0] not in onnxruntime.get_available_providers():
        raise ValueError(f"--device {device}: onnxruntime is installed here without {kinds[device][0]}.")
    return kinds[device]


def asked_of(classifier: MMSERPipeline, options: PredictionArguments) -> dict[str, Any]:
    """
    The options of the pipeline for what the flags ask. The answers to tasks beside the emotion are given by every
    model that has them.

    Raises:
        ValueError: a label that the model does not have, or sets that it cannot give.
    """
    asked: dict[str, Any] = {"return_uncertainty": True}
    if options.allowed_labels is not None:
        unknown = [label for label in options.allowed_labels if label not in classifier.labels]
        if unknown:
            raise ValueError(
                f"--allowed_labels: this model has no {unknown[0]!r}; its labels are {', '.join(classifier.labels)}."
            )
        asked["allowed_labels"] = options.allowed_labels
    if options.return_set is not None:
        asked["return_set"] = options.return_set
        try:
            classifier._sanitize_parameters(**asked)
        except ValueError as error:
            raise ValueError(f"--return_set {options.return_set:g}: {error}") from error
    if getattr(classifier.model.config, "auxiliary_tasks", None):
        asked["return_auxiliary"] = True
    return asked


def labels_of(classifier: MMSERPipeline, options: PredictionArguments) -> list[str]:
    """The labels that have a score, in the order of their ids."""
    allowed = options.allowed_labels
    return [label for label in classifier.labels if allowed is None or label in allowed]


def adapt(classifier: MMSERPipeline, inputs: Sequence[Input], options: PredictionArguments) -> str:
    """
    Adapt the model to recordings, without labels (`MMSERPipeline.adapt_to`): to `ADAPTING_CLIPS` clips or segments of
    inputs in an order by chance, which is the same for all processes. Returns what to tell of it.

    Raises:
        ValueError: no input can be read, or the model cannot be adapted.
    """
    chosen = [{"path": one.source} for one in inputs if one.source and not one.error]
    random.Random(0).shuffle(chosen)
    cut = {"chunk_length_s": options.chunk_length_s, "stride_length_s": options.stride_length_s}
    try:
        clips = classifier.adapt_to(chosen, skip_unreadable=True, **cut)
    except ValueError as error:
        raise ValueError(f"--adapt_to_inputs: {error}") from error
    return f"the model was adapted to {clips} clips of the inputs, without labels; its calibration is that of before"


def classify(classifier: MMSERPipeline, job: Job, options: PredictionArguments) -> list[Prediction]:
    """
    What the model says of each input, in their order. With some of the labels only there is no uncertainty: it is that
    of the likeliest of all labels.
    """
    asked = asked_of(classifier, options)
    if job.turns and classifier.processor.feature_extractor is None:
        raise ValueError("--speakers is about audio, and this model has no audio encoder.")
    predictions = [Prediction(one) for one in job.inputs]
    turns = job.turns or [[]] * len(predictions)
    whole: list[tuple[Prediction, list[Span]]] = []
    timed: list[tuple[Prediction, list[Span]]] = []
    for prediction, spans in zip(predictions, turns, strict=True):
        if not prediction.error:
            is_timed = options.by_segment or _is_long(prediction.input, options)
            (timed if is_timed else whole).append((prediction, spans))
    with _progress([one for one, _ in whole], [one for one, _ in timed], options) as bar:
        _classify_clips(classifier, [prediction for prediction, _ in whole], options.batch_size, asked, bar)
        for prediction, spans in timed:
            _classify_recording(classifier, prediction, spans if job.turns else None, options, asked, bar)
    hide_moot_unknown(classifier, predictions)
    if options.allowed_labels is not None:
        for entry in itertools.chain.from_iterable(map(_entries, predictions)):
            entry["uncertainty"] = None
    return predictions


def hide_moot_unknown(classifier: MMSERPipeline, predictions: Iterable[Prediction]) -> None:
    """Take `unknown_probability` out of the answers of a model that rejects nothing, where it would mislead."""
    if getattr(classifier.model.config, "openmax_threshold", "fitted") is None:
        for one in predictions:
            for entry in _entries(one):
                entry["unknown_probability"] = None


def _entries(one: Prediction) -> Iterator[dict]:
    """The scores of an input and of its segments."""
    return itertools.chain(one.scores, *(segment.scores for segment in one.segments))


def _progress(whole: Sequence[Prediction], timed: Sequence[Prediction], options: PredictionArguments) -> Any:
    """A bar over clips or, where recordings are cut, over seconds of audio; none for one clip, or in a file."""
    seconds = sum(one.input.seconds or 0.0 for one in (*whole, *timed))
    is_shown = len(whole) + len(timed) > 1 or seconds > options.segments_above
    unit, total = (" s of audio", math.ceil(seconds)) if timed else (" clips", len(whole))
    layout = "{percentage:3.0f} % |{bar}| {n:.0f} of {total:.0f}{unit}, {remaining} left"
    # None: not where it would go into a file
    disable = None if is_shown else True
    bar: Any = tqdm(total=total, unit=unit, disable=disable, leave=False, bar_format=layout, file=sys.stderr)
    bar.counts_seconds = bool(timed)
    return bar


def _classify_clips(
    classifier: MMSERPipeline, predictions: Iterable[Prediction], batch_size: int, asked: dict[str, Any], bar: Any
) -> None:
    """Clips of similar length together, the longest first; where one of them is bad, one by one."""
    order = sorted(predictions, key=lambda one: one.input.seconds or 0, reverse=True)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        try:
            results = classifier([_item(one.input) for one in batch], batch_size=len(batch), **asked)
        except (ValueError, OSError) as error:
            if len(batch) == 1:
                batch[0].input.error = reason(error, batch[0].input)
                results = [[]]
            else:
                results = [_try(classifier, one.input, asked) for one in batch]
        for one, scores in zip(batch, results, strict=True):
            one.scores = scores
            bar.update((one.input.seconds or 0) if bar.counts_seconds else 1)


def _try(classifier: MMSERPipeline, one: Input, asked: dict[str, Any]) -> list[dict]:
    """The scores of one clip; none, and its error is set, if it cannot be read."""
    try:
        return classifier([_item(one)], batch_size=1, **asked)[0]
    except (ValueError, OSError) as error:
        one.error = reason(error, one)
        return []


def _item(one: Input) -> dict[str, Any]:
    """An input as the pipeline takes it."""
    return {**({"path": one.source} if one.source else {}), **({"text": one.text} if one.text else {})}


def _classify_recording(
    classifier: MMSERPipeline,
    prediction: Prediction,
    turns: list[Span] | None,
    options: PredictionArguments,
    asked: dict[str, Any],
    bar: Any,
) -> None:
    one = prediction.input
    segments = (
        _chunks(classifier, one, options, asked)
        if turns is None
        else _turns(classifier, one, _pieces(turns, options.chunk_length_s), options.batch_size, asked)
    )
    done: list[Segment] = []
    try:
        for segment in segments:
            done.append(segment)
            bar.update(min(segment.end - segment.start, bar.total - bar.n))
    except (ValueError, OSError) as error:
        one.error = reason(error, one)
        return
    if turns is None:
        take_silence_out(done, one.source, classifier.processor.feature_extractor.sampling_rate)
    scores = mean_scores(done)
    if not scores:
        one.error = (done[0].error or UNHEARD) if done else "no turn of a speaker lies in it"
        return
    prediction.segments, prediction.scores = done, scores
    one.seconds = one.seconds or done[-1].end


def mean_scores(segments: Iterable[Segment]) -> list[dict]:
    """The mean over time of the segments that have scores; empty if none has."""
    spans = [{"timestamp": (one.start, one.end), "scores": one.scores} for one in segments if one.scores]
    return mean_over_time(spans) if spans else []


def take_silence_out(segments: Sequence[Segment], audio: Any, rate: int) -> None:
    """Drop what the model says of the segments of a recording in which nothing is heard: it is as sure of silence as
    of speech. What is said in a segment, as far as it is known, has an answer without any sound."""
    silence = Silence(stream_audio(audio, None, rate), rate)
    for segment in segments:
        if not segment.text and silence.holds(segment.start, segment.end):
            segment.scores, segment.is_silent = [], True


def _chunks(
    classifier: MMSERPipeline, one: Input, options: PredictionArguments, asked: dict[str, Any]
) -> Iterator[Segment]:
    """The chunks of the pipeline, as they are classified."""
    recording = {"path": one.source, **({"chunks": one.words} if one.words else {})}
    chunks = classifier.iterate_chunks(  # what is wrong with the options is an error here
        recording,
        batch_size=options.batch_size,
        chunk_length_s=options.chunk_length_s,
        stride_length_s=options.stride_length_s,
        **asked,
    )

    def segment(chunk: dict[str, Any]) -> Segment:
        start, end = chunk["timestamp"]
        return Segment(start, end, chunk["scores"], text=text_of_chunk(one.words, start, end) or "")

    return map(segment, chunks)


def _pieces(turns: Iterable[Span], limit: float) -> list[Span]:
    """Turns in equal pieces of at most `limit` seconds, sorted by their start."""
    pieces = []
    for turn in turns:
        number = max(1, math.ceil((turn.end - turn.start) / limit - 1e-9))
        edges = [float(edge) for edge in np.linspace(turn.start, turn.end, number + 1)]
        pieces += [Span(*times, speaker=turn.speaker) for times in itertools.pairwise(edges)]
    return sorted(pieces, key=lambda piece: piece.start)


def _turns(
    classifier: MMSERPipeline, one: Input, pieces: Sequence[Span], batch_size: int, asked: dict[str, Any]
) -> Iterator[Segment]:
    """What the model says of each piece of a speaker's turn, heard by itself."""
    rate = classifier.processor.feature_extractor.sampling_rate
    waiting: list[Segment] = []  # in their order; those with an error are not classified

    def clips() -> Iterator[dict[str, Any]]:
        blocks = stream_audio(one.source, None, rate)
        for piece, samples in zip(pieces, cut_out(blocks, pieces, rate), strict=True):
            text = text_of_chunk(one.words, piece.start, piece.end)
            segment = Segment(piece.start, piece.end, speaker=piece.speaker, text=text or "")
            waiting.append(segment)
            if len(samples) < MIN_SECONDS * rate:
                is_outside = not len(samples)
                segment.error = "begins after the recording" if is_outside else f"shorter than {MIN_SECONDS} s"
            elif np.abs(samples).max() <= SILENT:
                segment.error = UNHEARD
            else:
                yield {"raw": samples, "sampling_rate": rate, "text": text}

    for scores in classifier(clips(), batch_size=batch_size, **asked):
        while waiting and waiting[0].error:
            yield waiting.pop(0)
        segment = waiting.pop(0)
        segment.scores = scores
        yield segment
    yield from waiting


def cut_out(blocks: Iterable[np.ndarray], spans: Sequence[Span], rate: int) -> Iterator[np.ndarray]:
    """
    Cut spans out of a stream, holding little more than the longest of them and one block.

    Args:
        blocks: samples of shape (time,), in order, of any lengths.
        spans: sorted by their start; they may overlap.
        rate (`int`, Hz): of the samples.

    Yields:
        `np.ndarray` of shape (time,), the samples of each span, in their order; fewer or none past the end.
    """
    stream = iter(blocks)
    buffer, first, is_over = np.zeros(0, dtype=np.float32), 0, False
    for span in spans:
        start, stop = round(span.start * rate), round(span.end * rate)
        while not is_over and first + len(buffer) < stop:
            kept = buffer[max(0, start - first) :]  # what lies before is not needed any more
            first += len(buffer) - len(kept)
            block = next(stream, None)
            is_over = block is None
            buffer = kept if block is None else np.concatenate([kept, block])
        yield buffer[max(0, start - first) : max(0, stop - first)]
