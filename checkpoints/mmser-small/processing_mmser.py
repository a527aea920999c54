# SPDX-License-Identifier: Apache-2.0
"""`MMSERProcessor`: audio and text to the inputs of the model.

Every clip is computed alone, so that no value depends on its batch.
"""

import json
import numbers
import os
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    FeatureExtractionMixin,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack

try:
    from .audio_mmser import (
        MIN_SAMPLING_RATE,
        MIN_SECONDS,
        has_own_rate,
        load_audio,
        pad_and_stack,
        stream_audio,
        warn_once,
    )
    from .configuration_mmser import MMSERConfig, check_names, check_own_files, reason_unused
    from .pipeline_mmser import (
        AudioClassificationTask,
        Chunk,
        MMSEROnnxConfig,
        MMSEROnnxForAudioClassification,
        MMSEROnnxOutput,
        MMSERPipeline,
        split_into_chunks,
        text_of_chunk,
    )
except ImportError:
    if __package__:  # beside a checkpoint a failed import is a real error, not a reason to take an installed copy
        raise
    from audio_mmser import (
        MIN_SAMPLING_RATE,
        MIN_SECONDS,
        has_own_rate,
        load_audio,
        pad_and_stack,
        stream_audio,
        warn_once,
    )
    from configuration_mmser import MMSERConfig, check_names, check_own_files, reason_unused
    from pipeline_mmser import (
        AudioClassificationTask,
        Chunk,
        MMSEROnnxConfig,
        MMSEROnnxForAudioClassification,
        MMSEROnnxOutput,
        MMSERPipeline,
        split_into_chunks,
        text_of_chunk,
    )

MAX_TEXT_TOKENS = 512  # position table of BERT-like encoders
# Fields of a feature extractor, their least and their most: around all models. A stranger must not fill the memory
EXTRACTOR_BOUNDS: dict[str, tuple[int, int]] = {
    "sampling_rate": (MIN_SAMPLING_RATE, 384_000),  # Hz
    "feature_size": (1, 1024),
    "n_fft": (2, 2**13),
    "hop_length": (1, 2**13),
    "chunk_length": (1, 3600),  # s
}
EXTRACTOR_FRACTIONS = {"padding_value": (-1e6, 1e6), "dither": (0, 1)}
MOST_GROWTH = 64  # times that a normalizer may make a text longer; those of models stay below 4
MOST_CELLS = 2**24  # frames of the longest clip times frequencies; Whisper has 1.2 million


class MMSERAudioKwargs(TypedDict, total=False):
    """Audio options. `max_length` and `truncation` are left out on purpose: given flat, they speak of text tokens."""

    sampling_rate: int | None
    pad_to_multiple_of: int | None
    return_tensors: str | None


class MMSERProcessorKwargs(ProcessingKwargs, total=False):
    audio_kwargs: MMSERAudioKwargs  # type: ignore[misc]  # the library declares its own kind here


# Names that the processor takes, in one of the groups (`text_kwargs`...) or by themselves
PROCESSOR_OPTIONS = {
    "common_kwargs",
    *MMSERProcessorKwargs.__annotations__,
    *TextKwargs.__annotations__,
    *MMSERAudioKwargs.__annotations__,
}


def check_feature_extractor(fields: Any, where: str = "") -> None:
    """
    Refuse the values of a feature extractor that no model has, before anything is computed from them.

    Args:
        fields (`dict`): as in the file of a feature extractor; what is not there is not looked at.
        where: the file, for messages.
    Raises:
        ValueError: naming the file, the field and its bounds.
    """
    of_file = f" of {where}" if where else ""
    if not isinstance(fields, dict):
        raise ValueError(f"`feature_extractor`{of_file} must be a dict, got {fields!r:.80}.")
    for bounds, kind in ((EXTRACTOR_BOUNDS, numbers.Integral), (EXTRACTOR_FRACTIONS, numbers.Real)):
        for name, (least, most) in bounds.items():
            value = fields.get(name, least)
            is_number = isinstance(value, kind) and not isinstance(value, bool)
            if not is_number or not least <= value <= most:  # NaN is not
                what = "a whole number" if kind is numbers.Integral else "a number"
                raise ValueError(
                    f"`feature_extractor.{name}`{of_file} must be {what} of {least:,} to {most:,}, got {value!r:.80}."
                )
    for name in ("do_normalize", "return_attention_mask"):
        if not isinstance(fields.get(name), bool | None):
            raise ValueError(f"`feature_extractor.{name}`{of_file} must be true or false, got {fields[name]!r:.80}.")
    if all(name in fields for name in ("n_fft", "hop_length", "chunk_length", "sampling_rate")):
        cells = fields["chunk_length"] * fields["sampling_rate"] * max(fields["n_fft"], fields.get("feature_size", 1))
        least = -(-cells // MOST_CELLS)
        if fields["hop_length"] < least:
            raise ValueError(
                f"`feature_extractor.hop_length`{of_file} must be at least {least:,} with this `chunk_length`, "
                f"`sampling_rate` and `n_fft`, got {fields['hop_length']:,}."
            )


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse a tokenizer whose normalizer makes far more of a text than it is: a few doublings fill any memory."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    growth, steps = 1, [] if normalizer is None else [json.loads(normalizer.__getstate__())]
    while steps:
        step = steps.pop()
        steps += step.get("normalizers") or []
        if step.get("type") == "Replace":
            replaced = step["pattern"].get("String") or "?"  # a regular expression may find a single letter
            growth *= max(1, -(-len(step["content"]) // len(replaced)))
        if growth > MOST_GROWTH:
            raise ValueError(
                f"the normalizer of the tokenizer makes a text over {MOST_GROWTH} times as long, as that of no model."
            )


def load_feature_extractor(name_or_path: str | os.PathLike, **kwargs) -> Any:
    """
    `AutoFeatureExtractor.from_pretrained`, after a look at the values: Whisper's computes tables as it is made.

    Args:
        name_or_path, kwargs: as of `AutoFeatureExtractor.from_pretrained`.
    Raises:
        ValueError: as [`check_feature_extractor`].
    """
    fields, _ = FeatureExtractionMixin.get_feature_extractor_dict(name_or_path, **kwargs)
    check_feature_extractor(fields, f"{name_or_path}/preprocessor_config.json")
    return AutoFeatureExtractor.from_pretrained(name_or_path, **{"trust_remote_code": False, **kwargs})


class NoTokenizer:
    """
    The tokenizer of a processor that has none. It is not None, as Transformers' Trainer asks the tokenizer of every
    processor for these.
    """

    eos_token_id = bos_token_id = pad_token_id = None

    def __bool__(self) -> bool:
        return False


class _PresentParts:
    """`get_attributes` of the class gives both parts of a processor, that of an object the parts that it has."""

    names = ("feature_extractor", "tokenizer")

    def __get__(self, processor, owner):
        return lambda: [name for name in self.names if processor is None or self._has(processor, name)]

    @staticmethod
    def _has(processor, name: str) -> bool:
        part = getattr(processor, name)
        return part is not None and not isinstance(part, NoTokenizer)


class MMSERProcessor(ProcessorMixin):
    """Turns audio clips and their transcripts into the inputs of an MMSER model.

    Args:
        feature_extractor (`Wav2Vec2FeatureExtractor` or `WhisperFeatureExtractor`): the raw-waveform family (wav2vec2,
            HuBERT, WavLM, data2vec-audio, XLS-R) or the log-mel family. None for a model without an audio encoder.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer of the text encoder. None for a model without one;
            the attribute is a `NoTokenizer` then, which is false.
    """

    get_attributes: Any = _PresentParts()

    pipeline_class = MMSERPipeline
    valid_processor_kwargs: Any = MMSERProcessorKwargs
    text_kwargs = {"padding": True, "return_tensors": "pt"}  # noqa: RUF012 (read and copied by ProcessorMixin)
    audio_kwargs = {"return_tensors": "pt"}  # noqa: RUF012

    def __init__(self, feature_extractor=None, tokenizer=None):
        self.feature_extractor = feature_extractor
        self.tokenizer: Any = NoTokenizer() if tokenizer is None else tokenizer
        if feature_extractor is None and tokenizer is None:
            raise ValueError("Give `feature_extractor`, `tokenizer` or both; both are None.")
        limit = MAX_TEXT_TOKENS if tokenizer is None else tokenizer.model_max_length
        if isinstance(limit, bool) or not isinstance(limit, numbers.Real) or not limit >= 1:
            raise ValueError(f"`model_max_length` of tokenizer_config.json must be at least 1, got {limit!r:.80}.")
        check_tokenizer(tokenizer)
        super().__init__(**{name: getattr(self, name) for name in self.get_attributes()})
        if feature_extractor is None:
            return
        if not isinstance(feature_extractor, (Wav2Vec2FeatureExtractor, WhisperFeatureExtractor)):
            raise ValueError(
                "`feature_extractor` must be a Wav2Vec2FeatureExtractor (raw waveform) or a WhisperFeatureExtractor "
                f"(log-mel), got {type(feature_extractor).__name__}"
            )
        check_feature_extractor(vars(feature_extractor))
        if self.audio_input_name == "input_values":
            # Many checkpoints say False; whoever loads the extractor alone must get the mask as well.
            feature_extractor.return_attention_mask = True

    @property
    def modalities(self) -> list[str]:
        """Which of "audio" and "text" can be processed."""
        names = {"feature_extractor": "audio", "tokenizer": "text"}
        return [names[part] for part in self.get_attributes()]

    @property
    def sampling_rate(self) -> int | None:
        """Of the audio of the model, in Hz; None for a model without an audio encoder."""
        return None if self.feature_extractor is None else self.feature_extractor.sampling_rate

    @property
    def audio_input_name(self) -> str:
        """`input_values` for the raw-waveform family, `input_features` for the log-mel family."""
        return self.feature_extractor.model_input_names[0]

    @property
    def model_input_names(self) -> list[str]:
        audio = [] if self.feature_extractor is None else [self.audio_input_name, "attention_mask"]
        return [*audio, *(["input_ids", "text_attention_mask"] if "text" in self.modalities else [])]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        As always, after a look at whether the files of a folder are its own: [`check_own_files`]. Code in it is run
        with `trust_remote_code=True` alone: without it, Transformers would ask on the terminal.
        """
        check_own_files(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        """As always, but a part that `processor_config.json` has as null does not exist."""
        parts = processor_dict or {}
        missing = [name for name in cls.get_attributes() if parts.get(name, ...) is None]
        if "feature_extractor" not in missing:
            fields, file = parts.get("feature_extractor"), "processor_config.json"
            if fields is None:  # an older checkpoint has a file of its own for it
                fields, _ = FeatureExtractionMixin.get_feature_extractor_dict(pretrained_model_name_or_path, **kwargs)
                file = "preprocessor_config.json"
            check_feature_extractor(fields, f"{pretrained_model_name_or_path}/{file}")
        if not missing:
            return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
        loaders = {"feature_extractor": AutoFeatureExtractor, "tokenizer": AutoTokenizer}
        return [
            None if name in missing else loaders[name].from_pretrained(pretrained_model_name_or_path, **kwargs)
            for name in cls.get_attributes()
        ]

    def to_dict(self) -> dict[str, Any]:
        """
        As always, less the `auto_map` that saving puts on the feature extractor, a class of the library. A part that
        does not exist is None.
        """
        output = super().to_dict()
        (output["feature_extractor"] or {}).pop("auto_map", None)
        return output if "text" in self.modalities else {**output, "tokenizer": None}

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> list[str]:
        """As always; afterwards the object still equals its reloaded copy, and nothing of its last call is saved."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:  # a call leaves its truncation and padding there
            backend.no_truncation()
            backend.no_padding()
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        for part in (self, *([] if self.feature_extractor is None else [self.feature_extractor])):
            vars(part).pop("auto_map", None)  # meant for the files, the library leaves it on the objects
        return files

    def __call__(self, audio=None, text=None, **kwargs: Unpack[MMSERProcessorKwargs]) -> BatchFeature:
        """Prepare a batch. Row i is clip i with text i; either may be None (text also blank), not both.

        A processor without one of its parts ignores that modality, with one warning.

        Args:
            audio: one clip or a list of clips (or a column of `datasets`), each as in [`load_audio`] or None. A bare
                2-D array of shape (few, many) could be a batch or channels and is refused: wrap it in a list, or make
                it one.
            text (`str` or list of `str | None`): transcripts, cut to 512 tokens or the tokenizer's own limit.
            sampling_rate (`int`, Hz): rate of the clips given as arrays; other rates than the model's are resampled.
            return_tensors (`str`, defaults to `"pt"`), padding, max_length, ...: as for any tokenizer. Clips are
                always padded to the longest, with zeros.

        Returns:
            [`BatchFeature`] with `input_values` (batch, time) or `input_features` (batch, mels, frames), float32, and
            `attention_mask` (batch, time or frames), unless no row has audio; `input_ids` and `text_attention_mask`
            (batch, tokens), unless no row has text. In a row that lacks a modality its mask is all zero.

        Raises:
            ValueError: a row without audio and text, lists of different length, or a clip that [`load_audio`] refuses
                or that is shorter than 25 ms; the message names the row.
            TypeError: a text that is not a string, or an option that does not exist.
        """
        check_names(kwargs, ("audio", "text", *PROCESSOR_OPTIONS), "argument of the processor")
        clips, texts = _as_clips(audio), _as_texts(text)
        if clips is None and texts is None:
            raise ValueError("Give `audio`, `text` or both: there is nothing to process")
        if clips is not None and texts is not None and len(clips) != len(texts):
            raise ValueError(f"`audio` has {len(clips)} rows but `text` has {len(texts)}; row i of both is one clip")
        count = len(clips or texts or [])
        clips, texts = clips or [None] * count, texts or [None] * count
        clips, texts = self._without_missing_part(clips, texts)
        for row, (clip, words) in enumerate(zip(clips, texts, strict=True)):
            if clip is None and words is None:
                if len(self.modalities) == 1:
                    raise ValueError(f"row {row} has no {self.modalities[0]}; this processor takes nothing else")
                raise ValueError(f"row {row} has neither audio nor text; at least one is needed")

        init_kwargs = self.tokenizer.init_kwargs if "text" in self.modalities else None
        options = self._merge_kwargs(tokenizer_init_kwargs=init_kwargs, **kwargs)
        inputs = BatchFeature()
        if any(clip is not None for clip in clips):
            inputs.update(self._process_clips(clips, **options["audio_kwargs"]))
        if any(words is not None for words in texts):
            inputs.update(self._process_texts(texts, **options["text_kwargs"]))
        return inputs

    def _without_missing_part(self, clips: list, texts: list[str | None]) -> tuple[list, list[str | None]]:
        """The rows without what there is no part for; told once."""
        for modality, rows in (("audio", clips), ("text", texts)):
            if modality not in self.modalities and any(row is not None for row in rows):
                warn_once(
                    f"no {modality}", f"{reason_unused(modality, self.modalities)}: its {modality} input is ignored."
                )
        nothing: list = [None] * len(clips)
        return (clips if "audio" in self.modalities else nothing), (texts if "text" in self.modalities else nothing)

    def _process_clips(self, clips: list, sampling_rate=None, pad_to_multiple_of=None, return_tensors=None):
        """List of clips (None = missing) -> padded features and their mask."""
        rate = self.feature_extractor.sampling_rate
        rows = [
            None
            if clip is None
            else self._extract(load_audio(clip, sampling_rate, rate, name=f"audio row {row}"), f"audio row {row}")
            for row, clip in enumerate(clips)
        ]
        # int32 is what the library's feature extractors return
        masks = [None if features is None else np.ones(features.shape[-1], dtype=np.int32) for features in rows]
        data = {
            self.audio_input_name: pad_and_stack(rows, multiple_of=pad_to_multiple_of),
            "attention_mask": pad_and_stack(masks, multiple_of=pad_to_multiple_of),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def _extract(self, waveform: np.ndarray, name: str) -> np.ndarray:
        """One clip at the model's rate, (time,) -> normalised waveform (time,) or log-mel (mels, frames).

        Each clip is extracted alone and unpadded. The library's Whisper extractor pads before the Fourier transform:
        the last frames and the floor of the logarithm would depend on the batch, and 3 s would cost 30 s.
        """
        rate = self.feature_extractor.sampling_rate
        minimum = round(MIN_SECONDS * rate)
        if len(waveform) < minimum:
            raise ValueError(
                f"{name}: too short, {len(waveform)} samples at {rate} Hz; the minimum is {minimum} ({MIN_SECONDS} s)"
            )
        if self.audio_input_name == "input_features" and len(waveform) > (limit := self.feature_extractor.n_samples):
            warn_once(
                "audio",
                f"{name}: {len(waveform) / rate:.1f} s is longer than the {limit / rate:.0f} s this audio encoder "
                f"takes; the last {(len(waveform) - limit) / rate:.1f} s were cut. Further cuts are not reported.",
            )
            waveform = waveform[:limit]
        features = self.feature_extractor(
            waveform, sampling_rate=rate, padding=False, truncation=False, return_attention_mask=False
        )
        return np.asarray(features[self.audio_input_name][0], dtype=np.float32)

    def _tokenize(self, words: list[str], **options) -> Any:
        try:
            return self.tokenizer(words, **options)
        except BaseException as error:
            # What its Rust code says of a regular expression that never comes to an end is no `Exception`
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"the tokenizer cannot read {words!s:.80}: {error}") from error

    def _process_texts(self, texts: list[str | None], return_tensors=None, **text_kwargs):
        """List of texts (None = missing) -> `input_ids` and `text_attention_mask`."""
        limit = min(self.tokenizer.model_max_length, MAX_TEXT_TOKENS, text_kwargs.get("max_length") or MAX_TEXT_TOKENS)
        words = [text or "" for text in texts]
        whole = self._tokenize(words, **{**text_kwargs, "padding": False, "truncation": False, "verbose": False})
        too_long = sum(len(ids) > limit for ids in whole["input_ids"])
        if too_long:
            warn_once(
                "text",
                f"{too_long} of {len(texts)} texts are longer than {limit} tokens and were cut there. "
                "Further cuts are not reported.",
            )
        encoded = self._tokenize(words, **{**text_kwargs, "truncation": True, "max_length": limit})
        encoded.pop("token_type_ids", None)
        encoded["text_attention_mask"] = encoded.pop("attention_mask")
        for row, text in enumerate(texts):
            if text is None:
                length = len(encoded["input_ids"][row])
                encoded["input_ids"][row] = [self.tokenizer.pad_token_id] * length
                encoded["text_attention_mask"][row] = [0] * length
        return BatchFeature(dict(encoded), tensor_type=return_tensors)


def _as_clips(audio) -> list | None:
    """`audio` as the caller wrote it -> list with one entry per row, or None."""
    if audio is None or isinstance(audio, (str, bytes, bytearray, os.PathLike)):
        return None if audio is None else [audio]
    if isinstance(audio, (np.ndarray, torch.Tensor)):
        if audio.ndim == 2 and 1 < audio.shape[0] <= audio.shape[1]:
            raise ValueError(
                f"`audio` of shape {tuple(audio.shape)} is either {audio.shape[0]} clips or {audio.shape[0]} channels "
                "of one clip; pass `list(audio)` for clips, `[audio]` for channels"
            )
        return [audio]
    if has_own_rate(audio):
        return [audio]
    if not isinstance(audio, Sequence):
        raise TypeError(f"`audio` must be a clip or a list of clips, got {type(audio).__name__}")
    if len(audio) == 0:
        raise ValueError("`audio` is an empty list")
    return [audio] if isinstance(audio[0], numbers.Number) else list(audio)


def _as_texts(text) -> list[str | None] | None:
    """`text` as the caller wrote it -> list with one entry per row, blank ones as None, or None."""
    if text is None:
        return None
    if not isinstance(text, (str, list, tuple)):
        raise TypeError(f"`text` must be a string or a list of strings, got {type(text).__name__}")
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("`text` is an empty list")
    for row, entry in enumerate(texts):
        if entry is not None and not isinstance(entry, str):
            raise TypeError(f"text row {row} must be a string or None, got {type(entry).__name__}")
    return [entry if entry and entry.strip() else None for entry in texts]


def register_processor() -> None:
    """The part of `register_auto_classes` that concerns processors, pipelines and exported models."""
    for config_class in (MMSERConfig, MMSEROnnxConfig):
        config_class.is_registered = True
        AutoProcessor.register(config_class, MMSERProcessor, exist_ok=True)
    AutoConfig.register(MMSEROnnxConfig.model_type, MMSEROnnxConfig, exist_ok=True)
    AutoModelForAudioClassification.register(MMSEROnnxConfig, MMSEROnnxForAudioClassification, exist_ok=True)
    AudioClassificationTask.install(loads_processor=True)


MMSERProcessor.register_for_auto_class("AutoProcessor")
MMSERPipeline.processor_class = MMSERProcessor
AudioClassificationTask.install()

__all__ = [
    "MIN_SECONDS",
    "Chunk",
    "MMSEROnnxConfig",
    "MMSEROnnxForAudioClassification",
    "MMSEROnnxOutput",
    "MMSERPipeline",
    "MMSERProcessor",
    "load_audio",
    "register_processor",
    "split_into_chunks",
    "stream_audio",
    "text_of_chunk",
]
