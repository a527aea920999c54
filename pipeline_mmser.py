# SPDX-License-Identifier: Apache-2.0
"""`MMSERPipeline`: anything to labelled scores, with a PyTorch model or an exported one.

Read in this order: `MMSEROnnxForAudioClassification` (an exported model, run by onnxruntime), `Chunker` (a long
recording in pieces), `MMSERPipeline`, `AudioClassificationTask` (which of them `pipeline` makes). The pipeline is
handed its processor: this file does not import it.
"""

import contextlib
import copy
import itertools
import json
import os
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import (
    AudioClassificationPipeline,
    AutoConfig,
    AutoFeatureExtractor,
    BatchFeature,
    Pipeline,
    PreTrainedConfig,
)
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator
from transformers.utils import ModelOutput, cached_file, logging

try:
    from .audio_mmser import (
        AUDIO_KEYS,
        MIN_SECONDS,
        audio_length,
        download,
        load_audio,
        pad_and_stack,
        stream_audio,
        unwrap_audio,
        warn_if_silent,
    )
    from .configuration_mmser import (
        MODALITIES,
        check_depth,
        check_names,
        check_own_files,
        check_token_ids,
        ignored_modality,
        reason_unused,
    )
    from .conformal_mmser import PredictionSets, check_coverage
except ImportError:
    if __package__:  # beside a checkpoint a failed import is a real error, not a reason to take an installed copy
        raise
    from audio_mmser import (
        AUDIO_KEYS,
        MIN_SECONDS,
        audio_length,
        download,
        load_audio,
        pad_and_stack,
        stream_audio,
        unwrap_audio,
        warn_if_silent,
    )
    from configuration_mmser import (
        MODALITIES,
        check_depth,
        check_names,
        check_own_files,
        check_token_ids,
        ignored_modality,
        reason_unused,
    )
    from conformal_mmser import PredictionSets, check_coverage

logger = logging.get_logger(__name__)
TEXT_KEYS = ("text", "transcription")
PROCESS = SimpleNamespace(number=os.getpid())  # that imported this module, or its fork that has computed since
ADAPTING_CLIPS = 200  # of `MMSERPipeline.adapt_to`
SINGLE = str, bytes, bytearray, memoryview, tuple, Mapping, np.ndarray, torch.Tensor  # one input of the pipeline
AUXILIARY = "auxiliary_"  # in front of the name of a task, where its output has to have a name of its own


def _import_onnxruntime() -> Any:
    """onnxruntime without its telemetry, which calls a host outside since 1.32, unless a user has chosen it."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when it is imported
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("An exported model needs onnxruntime: `pip install onnxruntime`") from error
    if os.environ["ORT_DISABLE_TELEMETRY"] != "0" and hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()  # it may have been imported before
    return onnxruntime


def _is_pytorch_checkpoint(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") == "mmser"


class MMSEROnnxConfig(PreTrainedConfig):
    """
    The configuration that `export_hf.py` stored in an ONNX file: labels, thresholds, and what the model takes.

    Args:
        modalities, untrained_modalities (`list[str]`): as of `MMSERConfig`.
        prediction_set_thresholds (`list[float]`, *optional*): one for each coverage; None if they are not fitted.
        auxiliary_tasks (`dict`): as of `MMSERConfig`.
    """

    model_type = "mmser-onnx"

    modalities: list[str] = field(default_factory=lambda: list(MODALITIES))
    untrained_modalities: list[str] = field(default_factory=list)
    prediction_set_thresholds: list[float] | None = None
    auxiliary_tasks: dict[str, Any] = field(default_factory=dict)

    @property
    def used_modalities(self) -> list[str]:
        """As of `MMSERConfig`: the modalities that the graph has inputs for."""
        return [modality for modality in self.modalities if modality not in self.untrained_modalities]

    is_registered = False  # as in `MMSERConfig`

    def __post_init__(self, **kwargs):
        if self.is_registered:
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)


@dataclass
class MMSEROnnxOutput(ModelOutput):
    """
    Output of an exported model, as of `MMSERForAudioClassification`. Those of OpenMax are None if it was not fitted.

    Args:
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`): divided by the temperature.
        probabilities (`torch.FloatTensor` of shape `(batch_size, num_labels)`): their softmax.
        uncertainty (`torch.FloatTensor` of shape `(batch_size, 1)`): the probability that the prediction is wrong.
        unknown_probability (`torch.FloatTensor` of shape `(batch_size, 1)`): of being none of the classes.
        open_set_probabilities (`torch.FloatTensor` of shape `(batch_size, num_labels + 1)`): "unknown" last.
        rejection_score (`torch.FloatTensor` of shape `(batch_size, 1)`): what rejection goes by.
        is_unknown (`torch.BoolTensor` of shape `(batch_size,)`): which clips are rejected.
        auxiliary (`dict[str, torch.FloatTensor]`): by task beside the emotion, logits of shape `(batch_size,
            num_classes)` or values of shape `(batch_size,)`; None without tasks.
    """

    logits: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None
    uncertainty: torch.Tensor | None = None
    unknown_probability: torch.Tensor | None = None
    open_set_probabilities: torch.Tensor | None = None
    rejection_score: torch.Tensor | None = None
    is_unknown: torch.Tensor | None = None
    auxiliary: dict[str, torch.Tensor] | None = None


def _noted_config(note: str) -> MMSEROnnxConfig:
    """The configuration that is noted in an exported model."""
    try:
        content = json.loads(note)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            "The model is damaged: what it notes of its configuration is not JSON, or too deep."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"The model is damaged: it notes {content!r:.80} in place of a configuration.")
    check_depth(content, "What the model notes of its configuration")
    return MMSEROnnxConfig(**content)


class MMSEROnnxForAudioClassification:
    """
    A model that `export_hf.py` wrote, run by onnxruntime. It is called like the PyTorch model, with the output of
    `MMSERProcessor`, and holds none of its weights.

    Args:
        session (`onnxruntime.InferenceSession`): the opened ONNX file.
        config (`MMSEROnnxConfig`): by default what is noted in the file.
    """

    config_class = MMSEROnnxConfig
    file_name = "model.onnx"
    # A pipeline asks for these. Tensors come and go as float32 on the CPU, wherever onnxruntime computes
    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, session, config: MMSEROnnxConfig | None = None):
        self.session = session
        self.notes = session.get_modelmeta().custom_metadata_map
        self.config = _noted_config(self.notes["config"]) if config is None else config
        self.prediction_sets = PredictionSets(self.config.prediction_set_thresholds)
        self.inputs = {node.name: node.shape for node in session.get_inputs()}
        self.output_names = [node.name for node in session.get_outputs()]
        names = ("input_values", "input_features", "input_ids")  # one of audio comes first, if there is one
        inputs = [name for name in names if name in self.inputs]
        if not inputs:
            raise ValueError(
                f"The model is damaged: its inputs are {list(self.inputs)}, and none of {', '.join(names)}."
            )
        self.main_input_name = inputs[0]
        self.input_modalities = tuple(self.config.used_modalities)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike, config=None, providers: Sequence[str] | None = None, **kwargs
    ):
        """
        Open an exported model.

        Args:
            name_or_path: a folder or Hub repository with `model.onnx`, or such a file.
            config (`MMSEROnnxConfig`): by default what is noted in the file.
            providers: execution providers of onnxruntime in order of preference; CUDA, if there, then CPU by default.
            kwargs: `revision`, `token`, `cache_dir`... for a repository; what only PyTorch models take is passed over.

        Raises:
            ImportError: onnxruntime is not installed.
            ValueError: an ONNX file of something else or a damaged one, or a PyTorch checkpoint.
        """
        onnxruntime = _import_onnxruntime()
        names = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
        path: Any = name_or_path
        check_own_files(path, kwargs.get("subfolder") or "")
        if not Path(path).is_file():
            options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            try:
                path = cached_file(os.fspath(name_or_path), cls.file_name, **options)
            except OSError as error:
                if not _is_pytorch_checkpoint(Path(name_or_path)):
                    raise
                raise ValueError(
                    f"{os.fspath(name_or_path)!r} is a PyTorch checkpoint, without {cls.file_name}: load it with "
                    f'pipeline("audio-classification", model={os.fspath(name_or_path)!r}, trust_remote_code=True)'
                ) from error
        if providers is None:
            available = onnxruntime.get_available_providers()
            providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            session = onnxruntime.InferenceSession(os.fspath(path), options, providers=list(providers))
        except Exception as error:  # its own kinds have no base of theirs
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            raise ValueError(f"{path} cannot be read as an ONNX model: {str(error).splitlines()[0]}") from error
        if "config" not in session.get_modelmeta().custom_metadata_map:
            raise ValueError(f"{os.fspath(name_or_path)!r} was not written by export_hf.py: it lacks its notes")
        return cls(session, config)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModelForAudioClassification") -> None:
        """Does nothing: the `Auto*` classes call it, and an exported folder names its code already."""

    def to(self, *args, **kwargs):
        """Does nothing: `providers` say where the model runs."""
        return self

    def eval(self):
        """An exported model is always in eval mode."""
        return self

    def can_generate(self) -> bool:
        return False

    def __call__(
        self,
        input_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        text_attention_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
    ) -> MMSEROnnxOutput:
        """
        Args:
            input_values, attention_mask, input_ids, text_attention_mask, input_features: tensors or arrays, as
                `MMSERProcessor` makes them. Either modality may be left out; one that the model does not use is
                ignored.

        Raises:
            ValueError: nothing that the model uses, or the wrong kind of audio.
        """
        if len(self.input_modalities) == 1:
            audio = input_features if input_values is None else input_values
            return self._run_alone(audio, attention_mask, input_ids, text_attention_mask)
        audio, wrong = input_values, input_features
        if self.main_input_name == "input_features":
            audio, wrong = wrong, audio
        if wrong is not None:
            raise ValueError(f"The audio of this model is `{self.main_input_name}`")
        if audio is None and input_ids is None:
            raise ValueError(f"Give audio (`{self.main_input_name}`), `input_ids`, or both")
        audio, attention_mask = self._with_mask(self.main_input_name, audio, attention_mask, like=input_ids)
        input_ids, text_attention_mask = self._with_mask("input_ids", input_ids, text_attention_mask, like=audio)
        feeds = {
            self.main_input_name: _as_array(audio, np.float32),
            "attention_mask": _as_array(attention_mask, np.int64),
            "input_ids": _as_array(input_ids, np.int64),
            "text_attention_mask": _as_array(text_attention_mask, np.int64),
        }
        return self._run(feeds)

    def _run_alone(self, audio, attention_mask, input_ids, text_attention_mask) -> MMSEROnnxOutput:
        """A graph that has the inputs of one modality."""
        audio, input_ids = used_inputs(audio, input_ids, self.config)
        is_audio = self.main_input_name != "input_ids"
        values, mask = (audio, attention_mask) if is_audio else (input_ids, text_attention_mask)
        if values is None:
            raise ValueError(f"Give `{self.main_input_name}`")
        values, mask = self._with_mask(self.main_input_name, values, mask, like=None)
        return self._run(
            {
                self.main_input_name: _as_array(values, np.float32 if is_audio else np.int64),
                "attention_mask" if is_audio else "text_attention_mask": _as_array(mask, np.int64),
            }
        )

    def _run(self, feeds: dict[str, np.ndarray]) -> MMSEROnnxOutput:
        outputs = map(torch.from_numpy, self.session.run(self.output_names, feeds))
        named = dict(zip(self.output_names, outputs, strict=True))
        tasks = {name: named.pop(f"{AUXILIARY}{name}") for name in self.config.auxiliary_tasks}
        return MMSEROnnxOutput(**named, auxiliary=ModelOutput(tasks) if tasks else None)

    def _with_mask(self, name: str, values, mask, like) -> tuple[Any, Any]:
        """One modality and its mask. A missing one is the shortest possible input, masked, for the batch `like`."""
        if values is not None:
            return values, np.ones((values.shape[0], values.shape[-1])) if mask is None else mask
        if name == "input_ids":
            return np.full((len(like), 1), int(self.notes["pad_token_id"])), np.zeros((len(like), 1))
        length = int(self.notes["min_audio_length"])
        return np.zeros((len(like), *self.inputs[name][1:-1], length)), np.zeros((len(like), length))


def used_inputs(audio: Any, text: Any, config: Any) -> tuple[Any, Any]:
    """
    Audio and text, None for what is not given, without that which the model of `config` does not use. What is ignored
    is reported once; alone it is a ValueError.
    """
    given = [name for name, value in (("audio", audio), ("text", text)) if value is not None]
    # The model of a checkpoint brings its own code, which may be older
    modalities = getattr(config, "modalities", list(MODALITIES))
    ignored = ignored_modality(given, getattr(config, "used_modalities", modalities), modalities)
    worker = torch.utils.data.get_worker_info()
    if ignored and (worker is None or worker.id == 0):
        logger.warning_once(f"{reason_unused(ignored, modalities)}: its {ignored} input is ignored.")
    return None if ignored == "audio" else audio, None if ignored == "text" else text


def _as_array(values, dtype) -> np.ndarray:
    return np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values, dtype=dtype)


@dataclass
class Chunk:
    """
    A piece of a recording.

    Args:
        samples (`np.ndarray` of shape (time,)): what is classified, with what lies around the piece as context.
        start, stop (`int`, samples): the piece; those of all chunks tile the recording.
        first (`int`, samples): where `samples` begins.
    """

    samples: np.ndarray
    start: int
    stop: int
    first: int


class Chunker:
    """
    Cuts samples that come bit by bit into overlapping chunks, and holds little more than two chunks.

    Args:
        length (`int`, samples): length of each chunk. The last one reaches back to have it too; only a recording
            shorter than that is shorter.
        left, right (`int`, samples): context on each side of a chunk's piece, less at the ends of the recording.
    """

    def __init__(self, length: int, left: int, right: int):
        self._length, self._right, self._step = length, right, length - left - right
        self._first, self._done = 0, 0
        self._buffer, self._previous = np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.float32)

    def push(self, samples: np.ndarray) -> list[Chunk]:
        """The chunks that are whole with the next samples, of shape (time,)."""
        buffer, start, chunks = np.concatenate([self._buffer, samples]), 0, []
        while len(buffer) - start > self._length:  # so that this chunk is not the last
            stop = self._first + self._length - self._right
            chunks.append(Chunk(buffer[start : start + self._length], self._done, stop, self._first))
            self._first, self._done, start = self._first + self._step, stop, start + self._step
        if start:  # copies, which do not keep the memory of what is done
            self._previous, buffer = buffer[start - self._step : start].copy(), buffer[start:].copy()
        self._buffer = buffer
        return chunks

    def flush(self) -> Chunk | None:
        """The last chunk; None if there were no samples."""
        end = self._first + len(self._buffer)
        if not end:
            return None
        missing = min(self._length - len(self._buffer), len(self._previous))
        samples = np.concatenate([self._previous[len(self._previous) - missing :], self._buffer])
        return Chunk(samples, self._done, end, self._first - missing)


def split_into_chunks(blocks: Iterable[np.ndarray], length: int, left: int, right: int) -> Iterator[Chunk]:
    """
    Cut a stream into overlapping chunks, holding little more than two chunks and one block.

    Args:
        blocks: samples of shape (time,), in order, of any lengths.
        length, left, right (`int`, samples): as of [`Chunker`].
    """
    chunker = Chunker(length, left, right)
    for block in blocks:
        yield from chunker.push(block)
    last = chunker.flush()
    if last is not None:
        yield last


def chunk_sizes(extractor: Any, seconds: Any, stride: Any) -> tuple[int, int, int]:
    """
    What the options of the pipeline for long recordings mean.

    Args:
        extractor: feature extractor of the model.
        seconds (`float`): `chunk_length_s`.
        stride (`float`, pair or None, seconds): `stride_length_s`.

    Returns:
        Samples of a chunk, of its left and of its right context.

    Raises:
        ValueError: times that make no chunks.
    """
    limit = extractor.n_samples / extractor.sampling_rate if hasattr(extractor, "n_samples") else 3600.0
    if not isinstance(seconds, (int, float)) or not MIN_SECONDS <= seconds <= limit:
        raise ValueError(f"`chunk_length_s` must be a number from {MIN_SECONDS} to {limit:g} s, got {seconds!r}")
    strides = seconds / 6 if stride is None else stride
    strides = list(strides) if isinstance(strides, (list, tuple)) else [strides] * 2
    is_number = all(isinstance(value, (int, float)) for value in strides)
    if len(strides) != 2 or not (is_number and min(strides) >= 0 and sum(strides) < seconds):
        raise ValueError(
            f"`stride_length_s` is one number or a left and a right one, from 0 up and together less than "
            f"`chunk_length_s` ({seconds}), got {stride!r}"
        )
    length, left, right = (round(value * extractor.sampling_rate) for value in (seconds, *strides))
    return length, min(left, length - 1), min(right, length - 1 - left)


def text_of_chunk(words: Sequence[dict], start: float, stop: float) -> str | None:
    """
    What is said between two times.

    Args:
        words: pieces of a transcript, as speech recognition pipelines return them as `chunks` when asked for
            timestamps: `{"text": str, "timestamp": (start, end)}`, in seconds; the last end may be None.
        start, stop (`float`, seconds): what is said between them is what fills half of this time, or lies between
            them by half.
    """
    inside = []
    for word in words:
        begin, end = word["timestamp"]
        if end is None or end == begin:
            is_inside = start <= begin < stop
        else:
            is_inside = min(stop, end) - max(start, begin) >= min(stop - start, end - begin) / 2
        if is_inside:
            inside.append(word["text"].strip())
    return " ".join(inside) or None


class _Piece(dict):
    """An input that is a piece of a recording: a pause in it is nothing to warn of."""


class _Rows(torch.utils.data.Dataset):
    """A sequence that is no list, such as a column of `datasets`, which decodes a clip when it is asked for."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class _Named(_Rows):
    """Items of a sequence, each with what an error calls it."""

    def __getitem__(self, index):
        return f"input {index}", self.items[index]


def _first(item: dict, keys: tuple[str, ...]) -> Any:
    """The value of the first of the keys that has one, or None."""
    return next((item[key] for key in keys if item.get(key) is not None), None)


def _size(item) -> tuple[float, int]:
    """(seconds of audio, characters of text) of a pipeline's input, from headers if possible; 0 if unreadable."""
    seconds, characters = 0.0, 0
    # Sizes only decide the order. An error in an input is reported, with its name, when its turn comes
    with contextlib.suppress(Exception):
        audio, words, rate = item, "", None
        if isinstance(item, dict):
            audio, words, rate = _first(item, AUDIO_KEYS), _first(item, TEXT_KEYS) or "", item.get("sampling_rate")
        characters = len(words)
        if hasattr(audio, "metadata"):  # a decoder of torchcodec, which would decode all of it
            seconds = audio.metadata.duration_seconds
        elif audio is not None:
            audio, rate = unwrap_audio(audio, rate)
            is_file = isinstance(audio, (str, os.PathLike, bytes, bytearray))
            seconds = audio_length(audio) / 16000 if is_file else max(np.shape(audio)) / (rate or 16000)
    return seconds, characters


def compute_in_a_fork() -> None:
    """
    Let a process that was forked compute with one thread, from its first call on and until it says otherwise.

    GNU OpenMP does not survive a fork: where the parent has computed with several threads, a fork that does so too
    hangs (https://github.com/pytorch/pytorch/issues/17199). The workers of a DataLoader have one thread as well.
    """
    if os.getpid() == PROCESS.number:
        return
    PROCESS.number = os.getpid()
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        logger.warning(
            "This process was forked, and with several threads of torch it might hang: it computes with one. Start "
            "workers by spawning them where each of them is to have more."
        )


class MMSERPipeline(Pipeline):
    """Audio classification with optional text: `pipeline("audio-classification", model, trust_remote_code=True)`.

    Example:
        >>> classifier("clip.wav")
        >>> classifier({"path": "clip.wav", "text": "I am so glad you came"}, return_uncertainty=True)
        >>> classifier(["a.wav", "b.mp3"], batch_size=2, allowed_labels=["happy", "sad"])
        >>> classifier("meeting.flac", chunk_length_s=8, stride_length_s=1, batch_size=4)  # of any length

    Args:
        model (`MMSERForAudioClassification` or `MMSEROnnxForAudioClassification`): `pipeline` takes its name too.
        local_files_only (`bool`, *optional*): ignored; `pipeline` has loaded everything when it passes it on.
        kwargs: as of Transformers' `Pipeline`: `processor`, `device`, `batch_size`, and the options of a call.
    """

    processor: Any
    processor_class: Any = None  # `MMSERProcessor`, once `processing_mmser` is imported
    # The base class types these as None
    _load_processor: Any = True
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = False

    functions = ("softmax", "sigmoid", "none")
    preprocess_options = ("sampling_rate", "chunk_length_s", "stride_length_s")
    postprocess_options = (
        *("top_k", "allowed_labels", "return_uncertainty", "return_set", "return_auxiliary", "function_to_apply"),
    )

    def __init__(self, model, *args, local_files_only=None, **kwargs):
        # `pipeline` of Transformers leaves `local_files_only` in here when everything is loaded
        super().__init__(model, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save the model and its processor, with the code of both."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_onnx(cls, name_or_path: str | os.PathLike, providers: Sequence[str] | None = None, **kwargs):
        """
        The pipeline of a folder or Hub repository that `export_hf.py` wrote; needs onnxruntime, and loads no PyTorch
        weights. Elsewhere `pipeline("audio-classification", model, trust_remote_code=True)` does the same.

        Args:
            name_or_path, providers: see [`MMSEROnnxForAudioClassification.from_pretrained`].
            kwargs: `revision`, `token`... for a repository; otherwise as for any pipeline, e.g. `top_k`.
        """
        if cls.processor_class is None:
            raise ImportError("Import MMSERPipeline from `mmser` or `processing_mmser`, which bring its processor.")
        AutoConfig.register(MMSEROnnxConfig.model_type, MMSEROnnxConfig, exist_ok=True)  # loading a tokenizer asks
        hub_kwargs = {name: kwargs.pop(name) for name in ("cache_dir", "revision", "token") if name in kwargs}
        model: Any = MMSEROnnxForAudioClassification.from_pretrained(name_or_path, providers=providers, **hub_kwargs)
        processor = cls.processor_class.from_pretrained(name_or_path, **hub_kwargs)
        return cls(model=model, processor=processor, task="audio-classification", device=model.device, **kwargs)

    def __call__(self, inputs, **kwargs):
        """Classify one clip, or a list, generator or torch dataset of clips.

        Args:
            inputs: a path, an http(s) URL, the bytes of a file, an array or tensor of samples, a pair (sampling rate,
                samples), a decoder of torchcodec, or a dict with one of these under `raw`, `array`, `bytes`, `path`,
                `file` or `audio`, and optionally `sampling_rate` and `text` (or `transcription`); a dict with text
                alone is classified from its words. A column of `datasets` is a list of clips.
            sampling_rate (`int`, Hz): rate of arrays that do not come with one.
            top_k (`int`): number of labels to return; all by default.
            allowed_labels (`list[str]`): keep only these labels; softmax scores then sum to one over them.
            return_uncertainty (`bool`): also give `uncertainty`, `unknown_probability` and `is_unknown` in each dict,
                properties of the clip, the same for all of its labels. Look at `is_unknown` first: where it is True,
                the answer is "unknown" and the label only the nearest class, however high its score. That is so if
                OpenMax leaves no class as much as the threshold fitted for the predicted one, which known clips seldom
                miss (`config.openmax_acceptance`). With a number as `config.openmax_threshold`, it is so if "unknown"
                comes first or exceeds that; with None never. The last two are None while OpenMax is not fitted.
            return_set (`bool` or `float`): also give `prediction_set` in each dict, the labels that the clip may have,
                likeliest first, the same for all of its labels. The right one is among them with the probability that
                is asked for, 0.5 to 0.99 (True is 0.9), for new clips that are like the held-out ones which the model
                was calibrated on. A recording as a whole has no such set, its chunks have.
            return_auxiliary (`bool`): also give `auxiliary` in each dict, the answers to `config.auxiliary_tasks`: by
                task, the probability of each class, or a number. They belong to the clip too.
            function_to_apply (`str`): "softmax", "sigmoid" or "none"; follows `config.problem_type` by default.
            batch_size, num_workers (`int`): as in every pipeline; results do not depend on them. In a list, clips of
                similar length share a batch.
            chunk_length_s (`float`, seconds): take each input for a recording of any length and classify it in chunks
                of this length, `batch_size` at a time. Files are read as they are needed and never held in memory
                (what is behind an address is downloaded first).
                In place of `text` a dict may hold `chunks`, a transcript with times, as speech recognition pipelines
                return it for `return_timestamps="word"`: each chunk is given what was said in it.
            stride_length_s (`float` or pair, seconds): how much of a chunk, on its left and right, is context shared
                with its neighbours; by default a sixth of a chunk on each side.

        Returns:
            `list` of `{"label": str, "score": float}`, best first; a list of such lists for a list of clips. With
            `chunk_length_s`, a dict for each recording: `chunks`, a list of `{"timestamp": (start, end), "scores":
            list}` whose times (seconds, without context) tile the recording, and `scores`, their mean over time
            (`is_unknown` if most of the time is).

        Raises:
            ValueError, TypeError, FileNotFoundError: an unusable input (the message names it) or option.
            TypeError: an option that does not exist; the message has the nearest one.
        """
        if isinstance(inputs, list) and not inputs:
            return []
        if isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes, bytearray, memoryview, list, tuple)):
            return list(super().__call__(_Rows(inputs), **kwargs))
        is_single = not isinstance(inputs, (list, Generator, torch.utils.data.Dataset))
        if is_single and kwargs.get("chunk_length_s", self._preprocess_params.get("chunk_length_s")) is not None:
            return super().__call__([inputs], **kwargs)[0]
        return super().__call__(inputs, **kwargs)

    def adapt_to(
        self,
        recordings: Any,
        num_clips: int = ADAPTING_CLIPS,
        batch_size: int = 8,
        skip_unreadable: bool = False,
        **options: Any,
    ) -> int:
        """
        Adapt the model to the voices, microphones and rooms of your recordings, without labels:
        `MMSERForAudioClassification.adapt_to`. `save_pretrained` keeps the adapted model.

        Args:
            recordings: one clip or recording, or several, as of a call. The emotions in them should be mixed: what all
                clips have in common is taken for the place, and no longer heard.
            num_clips (`int`): the first so many clips, or chunks of recordings, are used; 50 do nearly as well as all.
            skip_unreadable (`bool`): leave out what cannot be read, in place of an error.
            batch_size, options: of a call: `sampling_rate`, `chunk_length_s`, `stride_length_s`.
        Returns: how many clips were used.
        Raises:
            ValueError: no clip has audio, or the model hears none, was trained with another norm, or was exported.
            ValueError, TypeError, FileNotFoundError: an unusable recording (the message names it) or option.
        """
        model: Any = self.model
        if not hasattr(model, "adapt_to"):
            raise ValueError("an exported model cannot be adapted: adapt the checkpoint that it was made from")
        check_names(options, self.preprocess_options, "option of `adapt_to`")
        preprocess, _, _ = self._sanitize_parameters(**options)
        chunking, preprocess = self._chunking({**self._preprocess_params, **preprocess})
        is_list = isinstance(recordings, Iterable) and not isinstance(recordings, SINGLE)
        rows: list[dict[str, np.ndarray]] = []
        for index, item in enumerate(recordings if is_list else [recordings]):
            name = f"input {index}"
            pieces = [(name, item)] if chunking is None else self._pieces(name, item, chunking, preprocess)
            prepared = (self._preprocess_named(piece, **preprocess) for piece in pieces)
            try:
                rows += itertools.islice(prepared, num_clips - len(rows))
            except (ValueError, OSError) as error:
                if not skip_unreadable:
                    raise
                logger.info(f"not adapted to what cannot be read: {error}")
            if len(rows) >= num_clips:
                break
        rows.sort(key=lambda row: max(values.shape[-1] for values in row.values()))  # little padding
        parts = (self._collate(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size))
        return model.adapt_to(
            [BatchFeature(part, tensor_type="pt").to(self.device, dtype=self.dtype).data for part in parts]
        )

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        _, preprocess_params = self._chunking(preprocess_params)
        return super().run_single(inputs, preprocess_params, forward_params, postprocess_params)

    @property
    def labels(self) -> list[str]:
        """Label names in the order of the logits."""
        id2label: Any = self.model.config.id2label
        return [id2label[index] for index in range(len(id2label))]

    @property
    def _prediction_sets(self) -> PredictionSets:
        """Those of the model. One that brings older code has none: they are not fitted then."""
        return getattr(self.model, "prediction_sets", None) or PredictionSets()

    def _sanitize_parameters(self, **kwargs):
        known = (*self.preprocess_options, *self.postprocess_options, "batch_size", "num_workers")
        check_names(kwargs, known, "option of the pipeline")
        top_k = kwargs.get("top_k")
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"`top_k` must be a positive integer or None, got {top_k!r}")
        function = kwargs.get("function_to_apply")
        if function is not None and function not in self.functions:
            raise ValueError(f"`function_to_apply` must be one of {list(self.functions)}, got {function!r}")
        allowed = kwargs.get("allowed_labels")
        is_list = isinstance(allowed, Collection) and not isinstance(allowed, str) and len(allowed) > 0
        if allowed is not None and not (is_list and all(label in self.labels for label in allowed)):
            raise ValueError(f"`allowed_labels` must be a non-empty list out of {self.labels}, got {allowed!r}")
        if kwargs.get("return_set"):
            self._prediction_sets.threshold(check_coverage(kwargs["return_set"]))
            if {**getattr(self, "_postprocess_params", {}), **kwargs}.get("allowed_labels") is not None:
                raise ValueError("`return_set` speaks of all labels: leave out `allowed_labels`")
        if kwargs.get("return_auxiliary") and not getattr(self.model.config, "auxiliary_tasks", None):
            raise ValueError("`return_auxiliary` needs a model with `auxiliary_tasks`, and this one has none")
        if kwargs.get("stride_length_s") is not None:
            options = {**getattr(self, "_preprocess_params", {}), **kwargs}
            if options.get("chunk_length_s") is None:
                raise ValueError("`stride_length_s` needs `chunk_length_s`")
        preprocess = {key: value for key, value in kwargs.items() if key in self.preprocess_options}
        postprocess = {key: value for key, value in kwargs.items() if key in self.postprocess_options}
        return preprocess, {}, postprocess

    def preprocess(self, inputs, sampling_rate: int | None = None) -> dict[str, Any]:  # type: ignore[override]
        """One input of any kind -> model inputs with a batch axis of 1, as NumPy arrays."""
        compute_in_a_fork()
        audio, text, own_rate, name = _unpack(inputs, TEXT_KEYS)
        sampling_rate = own_rate or sampling_rate
        has_words = text is not None and not (isinstance(text, str) and not text.strip())
        audio, words = used_inputs(audio, text if has_words else None, self.model.config)
        text = None if has_words and words is None else text
        if audio is not None:
            rate = self.processor.feature_extractor.sampling_rate
            samples = load_audio(audio, sampling_rate, rate, name=name)
            if not isinstance(inputs, _Piece):
                warn_if_silent(samples, audio, sampling_rate, name)
            audio, sampling_rate = [samples], rate
        options: dict[str, Any] = {"sampling_rate": sampling_rate, "return_tensors": "np"}
        prepared = dict(self.processor(audio, text, **options))
        if "input_ids" in prepared:  # here, as on a GPU the embedding would end the process
            check_token_ids(prepared["input_ids"], getattr(self.model.config, "text_config", None))
        return prepared

    def _preprocess_named(self, named, **preprocess_params):
        """`preprocess` for one (name, item), whose errors give the name."""
        name, item = named
        with _errors_named(name):
            return self.preprocess(item, **preprocess_params)

    def _collate(self, rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Pad single clips to one batch; a modality that a clip lacks is padding with a mask of zeros."""
        batch = {}
        for key in self.processor.model_input_names:
            values = [row[key][0] if key in row else None for row in rows]
            if any(value is not None for value in values):
                padding_value = self.processor.tokenizer.pad_token_id if key == "input_ids" else 0
                batch[key] = pad_and_stack(values, padding_value)
        return batch

    def get_iterator(
        self, inputs: Any, num_workers: int, batch_size: int, preprocess_params, forward_params, postprocess_params
    ):
        """In place of the base method, which cannot batch clips with a missing modality."""
        chunking, preprocess_params = self._chunking(preprocess_params)
        params = preprocess_params, forward_params, postprocess_params
        if chunking is not None:
            # By index: iterating over a data set need not end at its length
            indices: Any = range(len(inputs)) if isinstance(inputs, Sized) else None
            recordings = enumerate(inputs) if indices is None else ((index, inputs[index]) for index in indices)
            return (self._classify_recording(i, item, chunking, batch_size, *params) for i, item in recordings)
        if isinstance(inputs, list) and batch_size > 1:
            # Clips of similar length together; the longest first, so that memory that is too small fails at once
            order = sorted(range(len(inputs)), key=lambda index: _size(inputs[index]), reverse=True)
            items = [(f"input {index}", inputs[index]) for index in order]
            outputs = dict(zip(order, self._classify_clips(items, num_workers, batch_size, *params), strict=True))
            return iter([outputs[index] for index in range(len(inputs))])
        if isinstance(inputs, Sized):
            return self._classify_clips(_Named(inputs), num_workers, batch_size, *params)
        # A generator cannot be shared among worker processes
        named = ((f"input {index}", item) for index, item in enumerate(inputs))
        return self._classify_clips(named, 0, batch_size, *params)

    def _classify_clips(
        self, named, num_workers: int, batch_size: int, preprocess_params, forward_params, postprocess_params
    ):
        """The labels of each (name, clip), in order."""
        kind: Any = PipelineDataset if isinstance(named, Sized) else PipelineIterator
        reader: Any = copy.copy(self)
        # Worker processes need no weights, and those of wav2vec2 cannot be sent to spawned ones
        reader.model = SimpleNamespace(config=self.model.config)
        loader: Any = torch.utils.data.DataLoader(
            kind(named, reader._preprocess_named, preprocess_params),
            num_workers=num_workers,
            batch_size=batch_size,
            collate_fn=reader._collate,
        )
        outputs = PipelineIterator(loader, self.forward, forward_params, loader_batch_size=batch_size)
        return PipelineIterator(outputs, self.postprocess, postprocess_params)

    def _chunking(self, preprocess_params: dict) -> tuple[tuple[int, int, int] | None, dict]:
        """(samples of a chunk, of its left and of its right context) or None, and the options of single clips."""
        options = dict(preprocess_params)
        seconds, stride = options.pop("chunk_length_s", None), options.pop("stride_length_s", None)
        if seconds is None:
            return None, options
        extractor = self.processor.feature_extractor
        if extractor is None:
            raise ValueError("`chunk_length_s` is for audio, and this model has no audio encoder")
        return chunk_sizes(extractor, seconds, stride), options

    def _classify_recording(
        self, index: int, item, chunking, batch_size: int, preprocess_params, forward_params, postprocess_params
    ) -> dict[str, list]:
        """A recording of any length -> its chunks, with times and scores, and their mean over time."""
        whole = {**postprocess_params, "top_k": None}  # labels that come last in one chunk may be first in the mean
        name = f"input {index}"
        chunks = list(
            self._classify_chunks(name, item, chunking, batch_size, preprocess_params, forward_params, whole)
        )
        top_k = postprocess_params.get("top_k")
        return {
            "scores": mean_over_time(chunks)[:top_k],
            "chunks": [{**chunk, "scores": chunk["scores"][:top_k]} for chunk in chunks],
        }

    def iterate_chunks(self, recording, batch_size: int = 1, **options) -> Iterator[dict[str, Any]]:
        """
        What `classifier(recording, chunk_length_s=...)` gives under `chunks`, one by one as they are classified.

        Args:
            recording, batch_size, options: as of a call; `chunk_length_s` is needed. The labels of all chunks, with
                [`mean_over_time`], give the `scores` of a call.

        Returns:
            Iterator over `{"timestamp": (start, end), "scores": list}`.

        Raises:
            As a call does; what is wrong with the recording shows when it is reached.
        """
        preprocess, _, postprocess = self._sanitize_parameters(**options)
        chunking, preprocess = self._chunking({**self._preprocess_params, **preprocess})
        if chunking is None:
            raise ValueError("`chunk_length_s` is needed: it says how long a chunk is")
        params = preprocess, self._forward_params, {**self._postprocess_params, **postprocess}
        return self._classify_chunks("recording", recording, chunking, batch_size, *params)

    def _classify_chunks(
        self, title: str, item, chunking, batch_size: int, preprocess_params, forward_params, postprocess_params
    ) -> Iterator[dict[str, Any]]:
        """The chunks of a recording, which errors call `title`, with times and scores."""
        times: list[tuple[float, float]] = []
        pieces = self._pieces(title, item, chunking, preprocess_params, times)
        scores = self._classify_clips(pieces, 0, batch_size, preprocess_params, forward_params, postprocess_params)
        for number, labels in enumerate(scores):
            yield {"timestamp": times[number], "scores": labels}

    def _pieces(
        self, title: str, item, chunking, preprocess_params: dict, times: list[tuple[float, float]] | None = None
    ) -> Iterator[tuple[str, _Piece]]:
        """The chunks of a recording, each with its name for errors; their times, in seconds, are added to `times`."""
        rate, times = self.processor.feature_extractor.sampling_rate, [] if times is None else times
        with _errors_named(title):
            audio, words, own_rate, name = _unpack(item, ("chunks",))
            if audio is None:
                raise ValueError("a recording is needed: there are no chunks of text alone")
            words = _check_words(words)
            blocks = stream_audio(audio, own_rate or preprocess_params.get("sampling_rate"), rate, name=name)
            for chunk in split_into_chunks(blocks, *chunking):
                times.append((chunk.start / rate, chunk.stop / rate))
                end = chunk.first + len(chunk.samples)
                text = text_of_chunk(words, chunk.first / rate, end / rate)
                yield f"{title} at {times[-1][0]:.2f} s", _Piece(raw=chunk.samples, sampling_rate=rate, text=text)
            if not times:
                raise ValueError(f"{name}: empty, it holds no samples")

    def _forward(self, input_tensors, **forward_parameters):
        compute_in_a_fork()
        inputs = BatchFeature(input_tensors, tensor_type="pt").to(self.device, dtype=self.dtype)
        outputs = self.model(**inputs)
        names = ("logits", "uncertainty", "unknown_probability", "is_unknown")
        tasks = getattr(outputs, "auxiliary", None) or {}
        flat = {f"{AUXILIARY}{task}": values for task, values in tasks.items()}  # a dict breaks the batches
        return {**{name: getattr(outputs, name, None) for name in names}, **flat}

    def postprocess(  # type: ignore[override]  # options by name, as in the library's own pipelines
        self,
        model_outputs,
        top_k=None,
        allowed_labels=None,
        return_uncertainty=False,
        return_set=False,
        function_to_apply=None,
        return_auxiliary=False,
    ) -> list[dict]:
        """Outputs for one clip -> its labels with their scores, best first."""
        if function_to_apply is None:
            by_problem = {"regression": "none", "multi_label_classification": "sigmoid"}
            function_to_apply = by_problem.get(self.model.config.problem_type or "", "softmax")
        labels = self.labels
        kept = [index for index, label in enumerate(labels) if allowed_labels is None or label in allowed_labels]
        scores = model_outputs["logits"][0].float()[kept]  # softmax over these is the renormalised probability
        if function_to_apply == "softmax":
            scores = scores.softmax(-1)
        elif function_to_apply == "sigmoid":
            scores = scores.sigmoid()
        _check_finite(scores, "scores are")
        best = scores.argsort(descending=True)[:top_k].tolist()
        results = [{"label": labels[kept[index]], "score": scores[index].item()} for index in best]
        if return_uncertainty:
            values = {name: model_outputs[name] for name in ("uncertainty", "unknown_probability", "is_unknown")}
            for name, value in values.items():
                if value is not None:
                    _check_finite(value, f"{name} is")
            values = {name: None if value is None else value.flatten()[0].item() for name, value in values.items()}
            if values["unknown_probability"] is not None and values["is_unknown"] is None:
                values["is_unknown"] = False  # rejection is switched off
            for result in results:
                result.update(values)
        if return_set:
            probabilities = model_outputs["logits"][0].float().softmax(-1)
            members = self._prediction_sets(probabilities.cpu(), check_coverage(return_set))
            order = probabilities.argsort(descending=True).tolist()
            for result in results:
                result["prediction_set"] = [labels[index] for index in order if members[index]]
        if return_auxiliary:
            answers = self._auxiliary_answers(model_outputs)
            for result in results:
                result["auxiliary"] = answers
        return results

    def _auxiliary_answers(self, model_outputs) -> dict[str, Any]:
        """Of one clip, by task: class -> probability, or a number."""
        answers: dict[str, Any] = {}
        for task, kind in self.model.config.auxiliary_tasks.items():
            values = model_outputs[f"{AUXILIARY}{task}"][0].float()
            _check_finite(values, f"{task} is")
            is_number = isinstance(kind, str)
            answers[task] = values.item() if is_number else dict(zip(kind, values.softmax(-1).tolist(), strict=True))
        return answers


def _check_finite(values: torch.Tensor, what: str) -> None:
    """Raise `ValueError` for an answer that is no number; `what` begins the sentence."""
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"the {what} not finite (NaN): the model overflowed, as in float16, or its weights are damaged. "
            "Load it with dtype=torch.float32"
        )


class AudioClassificationTask:
    """
    Stands for the task "audio-classification" in Transformers, whose own pipeline would drop the text: models of MMSER
    get `MMSERPipeline`, all others what they always got.
    """

    # Whether `pipeline` loads them before it calls this: True, if it can (None), or not (False)
    _load_feature_extractor = None  # a model in memory may come with its processor alone
    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False

    def __init__(self, loads_processor: bool):
        self._load_processor = None if loads_processor else False

    def __call__(self, model, processor=None, feature_extractor=None, tokenizer=None, **kwargs) -> Pipeline:
        if getattr(model.config, "model_type", None) in ("mmser", MMSEROnnxConfig.model_type):
            processor = self._find_processor(model, processor, feature_extractor, tokenizer)
            # Several copies of this file may be loaded, one for each checkpoint: that of the processor
            return processor.pipeline_class(model=model, processor=processor, **kwargs)
        if feature_extractor is None:  # loading it once more says why it could not be loaded
            if not model.name_or_path:
                raise ValueError("`feature_extractor` is needed: the model was not loaded from a folder that has one")
            feature_extractor = AutoFeatureExtractor.from_pretrained(model.name_or_path)
        return AudioClassificationPipeline(
            model=model, feature_extractor=feature_extractor, tokenizer=tokenizer, **kwargs
        )

    @staticmethod
    def _find_processor(model, processor, feature_extractor, tokenizer):
        """The processor as it was given, or made of its two parts, or the one beside the weights."""
        if processor is not None and not isinstance(processor, (str, os.PathLike)):
            return processor
        parts = {"audio": feature_extractor, "text": tokenizer}
        if processor is None and all(
            parts[modality] is not None for modality in getattr(model.config, "modalities", MODALITIES)
        ):
            return MMSERPipeline.processor_class(feature_extractor, tokenizer)
        name = processor or getattr(model, "name_or_path", None)
        if not name:
            raise ValueError(
                "`processor` is needed: the model was not loaded from a folder that has one; pass `processor=`"
            )
        return MMSERPipeline.processor_class.from_pretrained(name)

    @classmethod
    def install(cls, loads_processor: bool = False) -> None:
        """Let `pipeline("audio-classification", ...)` ask here; `loads_processor` for models given by name."""
        tasks = PIPELINE_REGISTRY.supported_tasks
        tasks["audio-classification"] = {**tasks["audio-classification"], "impl": cls(loads_processor)}


def _unpack(item, text_keys: tuple[str, ...]) -> tuple[Any, Any, int | None, str]:
    """A pipeline's input -> (audio or None, what is under one of `text_keys`, sampling rate, the audio's name)."""
    audio, words, sampling_rate, name = item, None, None, "audio"
    if isinstance(item, dict):
        unknown = [key for key in item if key not in (*AUDIO_KEYS, *text_keys, "sampling_rate")]
        if unknown:
            raise ValueError(
                f"unknown keys {unknown} in the input; allowed are {[*AUDIO_KEYS, *text_keys]} and sampling_rate"
            )
        audio, words = _first(item, AUDIO_KEYS), _first(item, text_keys)
        sampling_rate = item.get("sampling_rate")
    if isinstance(audio, str) and audio.startswith(("http://", "https://")):
        name, audio = f"audio '{audio}'", download(audio)
    return audio, words, sampling_rate, name


@contextlib.contextmanager
def _errors_named(name: str) -> Iterator[None]:
    """Errors about an input begin with its name."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        kinds = (ValueError, TypeError, FileNotFoundError, OSError)
        raise next(kind for kind in kinds if isinstance(error, kind))(f"{name}: {error}") from error


def _check_words(words) -> list[dict]:
    """A transcript with times, as a list of `{"text": str, "timestamp": (start, end)}`."""
    for index, word in enumerate(words or []):
        try:
            start, end = word["timestamp"]
            is_valid = isinstance(word["text"], str) and start >= 0 and (end is None or end >= start)
        except (TypeError, KeyError, ValueError):
            is_valid = False
        if not is_valid:
            raise ValueError(
                f"`chunks` row {index} must be {{'text': str, 'timestamp': (start, end)}} in seconds, got {word!r}"
            )
    return words or []


def mean_over_time(chunks: Sequence[dict[str, Any]]) -> list[dict]:
    """
    Mean of the labels' scores, and of what else is told of each chunk.

    Args:
        chunks: at least one `{"timestamp": (start, end), "scores": list}` as a call with `chunk_length_s` gives them,
            with all labels. Each counts by its time.

    Returns:
        `list` of a dict for each label, best first. `is_unknown` is True if most of the time is.
    """
    results = [chunk["scores"] for chunk in chunks]
    lengths = np.array([end - start for start, end in (chunk["timestamp"] for chunk in chunks)])
    shares = lengths / lengths.sum()
    own = ("label", "score", "prediction_set")  # a set has its coverage over clips, and a recording is none
    extras = {name: value for name, value in results[0][0].items() if name not in own}
    tasks = extras.pop("auxiliary", None)
    means: dict[str, Any] = {name: None if value is None else 0.0 for name, value in extras.items()}
    scores = dict.fromkeys((result["label"] for result in results[0]), 0.0)
    for labels, share in zip(results, shares.tolist(), strict=True):
        for result in labels:
            scores[result["label"]] += share * result["score"]
        for name in means:
            if means[name] is not None:
                means[name] += share * labels[0][name]
    if means.get("is_unknown") is not None:
        means["is_unknown"] = means["is_unknown"] > 0.5
    if tasks is not None:
        means["auxiliary"] = _mean_answers([labels[0]["auxiliary"] for labels in results], shares)
    best = sorted(scores, key=lambda label: scores[label], reverse=True)
    return [{"label": label, "score": scores[label], **means} for label in best]


def _mean_answers(answers: list[dict], shares: np.ndarray) -> dict[str, Any]:
    """Mean of the probabilities and numbers of each task, weighted by `shares`, which sum to 1."""

    def mean(values: list) -> Any:
        if isinstance(values[0], dict):
            return {name: mean([value[name] for value in values]) for name in values[0]}
        return float(np.dot(shares, values))

    return mean(answers)


__all__ = [
    "AudioClassificationTask",
    "Chunk",
    "Chunker",
    "MMSEROnnxConfig",
    "MMSEROnnxForAudioClassification",
    "MMSEROnnxOutput",
    "MMSERPipeline",
    "chunk_sizes",
    "mean_over_time",
    "split_into_chunks",
    "text_of_chunk",
]
