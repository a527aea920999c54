# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to a small or portable one: the work of `export_hf.py`.

Read in this order: the ONNX graph (any batch size, audio length and text length), the comparison with PyTorch, and
`export_checkpoint`, which writes a whole folder or nothing.
"""

import contextlib
import copy
import gc
import importlib.util
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder, sinusoids

from audio_mmser import MIN_SECONDS
from configuration_mmser import CUSTOM_PIPELINES
from mmser.arguments import DTYPES, FORMATS, OPSET
from mmser.console import without_bars_of_weights
from mmser.files import check_writable, whole_folder
from mmser.model_loading import label_names_of, let_go_of_files
from mmser.names import Named, reading
from mmser.quantization import quantize_onnx
from mmser.tables import format_table
from mmser.vocabulary import Trimmed, trim_vocabulary
from modeling_mmser import MMSERForAudioClassification, register_auto_classes
from pipeline_mmser import AUXILIARY, MMSEROnnxForAudioClassification
from processing_mmser import MAX_TEXT_TOKENS, MMSERProcessor
from quantization_mmser import quantize_dynamic

# Largest allowed difference to PyTorch in float32, of probabilities and of logits divided by the largest logit
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "int8": 0.15}
# An older torch does not name the axes of a graph
EXPORTS_SINCE = "2.7"
OLDEST_OPSET = 18  # that torch.onnx makes
# Where the `Auto*` classes find the code of an exported model
ONNX_AUTO_MAP = {
    "AutoConfig": "processing_mmser.MMSEROnnxConfig",
    "AutoModelForAudioClassification": "processing_mmser.MMSEROnnxForAudioClassification",
    "AutoProcessor": "processing_mmser.MMSERProcessor",
}
# The outputs of a graph. It has the open-set ones once OpenMax is fitted, and `is_unknown` only if rejection is on.
OUTPUTS = ("logits", "probabilities", "uncertainty")
OPEN_SET_OUTPUTS = ("unknown_probability", "open_set_probabilities", "rejection_score", "is_unknown")


class ExportedForward(nn.Module):
    """The forward pass with a graph's interface: tensors in, a tuple of tensors out, float32 on both sides."""

    def __init__(self, model: MMSERForAudioClassification):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor):
        """[B, T] or [B, mels, T], [B, T], [B, L], [B, L], those of `input_names` -> the tensors of `output_names`."""
        outputs = self.model(**dict(zip(input_names(self.model), inputs, strict=True)))
        logits = outputs.logits.float()
        results = {**outputs, **_flat(outputs), "logits": logits, "probabilities": logits.softmax(dim=-1)}
        tensors = (results[name] for name in output_names(outputs))
        return tuple(tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors)


def input_names(model: MMSERForAudioClassification) -> list[str]:
    """The inputs of the graph, those of the modalities that the model uses."""
    used = model.config.used_modalities
    audio = ["input_features" if model.config.uses_log_mel else "input_values", "attention_mask"]
    return [*(audio if "audio" in used else ()), *(("input_ids", "text_attention_mask") if "text" in used else ())]


def output_names(outputs) -> list[str]:
    """The names of the outputs that the model has: those of OpenMax are None until it is fitted."""
    return [*OUTPUTS, *(name for name in OPEN_SET_OUTPUTS if outputs.get(name) is not None), *_flat(outputs)]


def _flat(outputs) -> dict[str, Tensor]:
    """The outputs of the tasks beside the emotion, each under a name of its own; a graph has no dicts."""
    return {f"{AUXILIARY}{task}": values for task, values in (outputs.get("auxiliary") or {}).items()}


def min_audio_length(model: MMSERForAudioClassification) -> int:
    """The shortest audio for which the audio encoder has an output, in samples or mel frames."""
    if model.config.uses_log_mel:
        return 1
    length = 1
    config: Any = model.config.audio_config
    for kernel_size, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        length = (length - 1) * stride + kernel_size
    return length


def max_seconds(model: MMSERForAudioClassification, processor: MMSERProcessor) -> float:
    """The length of the longest clip that the audio encoder takes."""
    if not model.config.uses_log_mel:
        return float("inf")
    extractor = processor.feature_extractor
    return 2 * model.config.audio_config.max_source_positions * extractor.hop_length / extractor.sampling_rate


def example_inputs(
    model: MMSERForAudioClassification, processor: MMSERProcessor, seconds: float, batch_size: int, seed: int = 0
) -> dict[str, Tensor]:
    """
    A batch of random sounds (up to `seconds` long, or as long as the encoder takes) and tokens, as far as the model
    uses them.

    In a batch of two or more the last row has no text; in a batch of three or more the first row has no audio. A
    model that uses one modality gets it in every row.
    """
    rng = np.random.default_rng(seed)
    seconds = min(seconds, max_seconds(model, processor))
    used = model.config.used_modalities
    audio = _example_audio(processor, seconds, batch_size, rng) if "audio" in used else {}
    if batch_size > 2 and len(used) > 1:
        for value in audio.values():
            value[0] = 0
    text = _example_text(model, processor, seconds, batch_size, rng) if "text" in used else {}
    return {**audio, **text}


def _example_audio(
    processor: MMSERProcessor, seconds: float, batch_size: int, rng: np.random.Generator
) -> dict[str, Tensor]:
    rate = processor.feature_extractor.sampling_rate
    shortest = round(MIN_SECONDS * rate)
    longest = max(shortest, round(seconds * rate))
    lengths = [*rng.integers(shortest, longest + 1, batch_size - 1), longest]
    options: dict[str, Any] = {"sampling_rate": rate}
    inputs = dict(processor([_voice(length, rate, rng) for length in lengths], **options))
    inputs["attention_mask"] = inputs["attention_mask"].long()
    return inputs


def _example_text(
    model: MMSERForAudioClassification,
    processor: MMSERProcessor,
    seconds: float,
    batch_size: int,
    rng: np.random.Generator,
) -> dict[str, Tensor]:
    config: Any = model.config.text_config
    tokenizer = processor.tokenizer
    length = min(2 + int(4 * seconds), getattr(config, "max_position_embeddings", MAX_TEXT_TOKENS) - 2)
    special = set(tokenizer.all_special_ids)
    ordinary = [index for index in range(min(len(tokenizer), config.vocab_size)) if index not in special]
    input_ids = rng.choice(ordinary or [tokenizer.unk_token_id], (batch_size, length))
    text_lengths = rng.integers(1, length + 1, batch_size)
    text_lengths[0] = length
    if batch_size > 1 and len(model.config.used_modalities) > 1:
        text_lengths[-1] = 0
    mask = np.arange(length) < text_lengths[:, None]
    return {
        "input_ids": torch.from_numpy(np.where(mask, input_ids, tokenizer.pad_token_id)),
        "text_attention_mask": torch.from_numpy(mask.astype(np.int64)),
    }


def _voice(length: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """A hum with noise, in syllables and as loud as speech, float32 [length]."""
    time = np.arange(length) / rate
    pitch = rng.uniform(90, 250)
    hum = sum(np.sin(2 * np.pi * pitch * harmonic * time) / harmonic for harmonic in range(1, 12))
    syllables = 0.55 + 0.45 * np.sin(2 * np.pi * 4 * time + rng.uniform(0, 2 * np.pi))
    return (0.1 * syllables * (hum + 0.3 * rng.standard_normal(length))).astype(np.float32)


@torch.no_grad()
def export_onnx(
    model: MMSERForAudioClassification, processor: MMSERProcessor, path: str | os.PathLike, opset: int = OPSET
) -> None:
    """
    Write the forward pass of `model` as ONNX, for any batch size, audio length and text length.

    The metadata hold the labels, the temperature, the sampling rate and the padding. An ONNX file holds at most 2 GB:
    the weights of a larger model are in `model.onnx.data` beside it.

    Args:
        model: in float32 or float16; the inputs and outputs of the graph are float32 in both cases.
        processor: of the same checkpoint.
        opset: version of the ONNX operators.
    Raises:
        ImportError: onnx or onnxscript is not installed, or torch is too old.
    """
    check_onnx()
    forward = ExportedForward(model).eval()
    example = example_inputs(model, processor, seconds=1.0, batch_size=3)
    names = input_names(model)
    outputs = output_names(model(**example))
    # With named axes the exporter finds the constraints on the sizes itself; with bounds it asks for a proof of them
    axes = [
        {0: "batch", example[name].ndim - 1: "text" if name in ("input_ids", "text_attention_mask") else "audio"}
        for name in names
    ]
    with _quiet_exporter(), _naming_an_old_torch():
        program: Any = torch.onnx.export(
            forward,
            tuple(example[name] for name in names),
            dynamo=True,
            dynamic_shapes=(tuple(axes),),
            input_names=names,
            output_names=outputs,
            opset_version=opset,
            custom_translation_table={
                torch.ops.aten._cdist_forward.default: _translate_cdist,
                torch.ops.aten.sigmoid.default: _translate_sigmoid,
            },
            verbose=False,
        )
    model.eval()  # the exporter may leave it in training mode
    # The notes on the source line of each node are most of a small file, and full of paths
    graph = program.model.graph
    nodes = list(graph.all_nodes())
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in nodes for value in node.outputs)]
    for noted in (*nodes, *values, graph, program.model):
        noted.metadata_props.clear()
    program.model.producer_name = "mmser"
    program.model.metadata_props.update(notes_of(model, processor))
    program.save(os.fspath(path))


def check_onnx() -> None:
    """Raise ImportError, with the command to install them, if packages for an ONNX export are missing."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if not importlib.util.find_spec(name)]
    if missing:
        raise ImportError(f"An ONNX export needs {', '.join(missing)}: `pip install {' '.join(missing)}`")


def notes_of(model: MMSERForAudioClassification, processor: MMSERProcessor) -> dict[str, str]:
    """The metadata of the ONNX file. `config` holds the fields of `MMSEROnnxConfig`."""
    config: Any = model.config
    kept = ("id2label", "label2id", "problem_type", "openmax_threshold", "openmax_acceptance", "use_openmax")
    about = {name: getattr(config, name) for name in (*kept, "modalities", "untrained_modalities", "auxiliary_tasks")}
    if model.prediction_sets.is_fitted:
        about["prediction_set_thresholds"] = model.prediction_sets.thresholds.tolist()
    about |= {f"{name}_model_type": getattr(config, f"{name}_config").model_type for name in config.modalities}
    used = config.used_modalities
    audio: dict[str, str] = {}
    if "audio" in used:
        audio["sampling_rate"] = str(processor.feature_extractor.sampling_rate)
        audio["min_audio_length"] = str(min_audio_length(model))
    text: dict[str, str] = {}
    if "text" in used:
        text["max_text_length"] = str(min(processor.tokenizer.model_max_length, MAX_TEXT_TOKENS))
        text["pad_token_id"] = str(processor.tokenizer.pad_token_id)
    limit = {"max_audio_length": str(2 * config.audio_config.max_source_positions)} if config.uses_log_mel else {}
    return {
        "config": json.dumps(about),
        "labels": json.dumps(label_names_of(config)),
        "temperature": str(model.temperature.item()),
        "dtype": str(model.dtype).removeprefix("torch."),
        **audio,
        **limit,
        **text,
    }


def _operators() -> Any:
    from onnxscript import opset18

    return opset18


def _translate_cdist(x1, x2, p: float = 2.0, compute_mode: int | None = None):
    """Euclidean distances, for which ONNX has no operator: [B, D] and [N, D] -> [B, N]."""
    op = _operators()
    difference = op.Sub(op.Unsqueeze(x1, [-2]), op.Unsqueeze(x2, [-3]))
    return op.Sqrt(op.ReduceSumSquare(difference, [-1], keepdims=0))


def _translate_sigmoid(x):
    """The sigmoid by its formula. onnxruntime's own is off by 1e-7: the log-odds of 1e-6 would change by 10 %."""
    op = _operators()
    return op.Reciprocal(op.Add(op.CastLike(1.0, x), op.Exp(op.Neg(x))))


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Hide the exporter's warnings: they are about operators of other libraries and about its own deprecations."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _naming_an_old_torch() -> Iterator[None]:
    """The exporter fails over a page or two: where a newer torch is known to work, that is said instead."""
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        if torch.__version__ >= EXPORTS_SINCE:  # compared as versions, not as letters
            raise
        raise ImportError(
            f"torch {torch.__version__} cannot export this model to ONNX, {EXPORTS_SINCE} and newer can: "
            f"`pip install 'torch>={EXPORTS_SINCE}'`"
        ) from error


@dataclass
class Comparison:
    """One batch, and the largest difference of each output between PyTorch and the export."""

    batch_size: int
    audio_length: int
    text_length: int
    differences: dict[str, float]


@torch.no_grad()
def compare(model: MMSERForAudioClassification, exported: Any, processor: MMSERProcessor) -> list[Comparison]:
    """
    Run a model and its export on the same batches: three lengths, each as one clip with text and as a batch of three,
    in which one row has no audio and one has no text.

    Args:
        model: in float32.
        exported: `MMSEROnnxForAudioClassification`, or a model of the same class as `model`.
    """
    results, sizes = [], dict[str, float]()
    longest = min(2.4, max_seconds(model, processor))
    for number, seconds in enumerate((longest / 8, longest / 3, longest)):
        for batch_size in (1, 3):
            inputs = example_inputs(model, processor, seconds, batch_size, seed=number)
            names = (input_names(model)[0] if "audio" in model.config.used_modalities else "", "input_ids")
            audio_length, text_length = (inputs[name].shape[-1] if name in inputs else 0 for name in names)
            differences, own = _differences(model(**inputs), exported(**inputs))
            results.append(Comparison(batch_size, audio_length, text_length, differences))
            sizes = {name: max(value, sizes.get(name, 1.0)) for name, value in own.items()}
    for result in results:
        for name, size in sizes.items():
            result.differences[name] /= size
    return results


def _differences(expected, given) -> tuple[dict[str, float], dict[str, float]]:
    """
    The largest difference of each output; for `is_unknown`, the share of clips with another decision. And the largest
    value of those that are no probabilities: logits, rejection scores and the outputs of other tasks. Their
    differences are shares of the largest of all batches: a clip of which the model can tell nothing has small ones.
    """
    differences, sizes = {}, {}
    names = output_names(expected)
    if names != output_names(given):
        raise ValueError(f"The model has the outputs {names}, but its export has {output_names(given)}")
    for name in names:
        first, second = (
            (output.logits.float().softmax(dim=-1) if name == "probabilities" else {**output, **_flat(output)}[name])
            for output in (expected, given)
        )
        first, second = first.float(), second.float()
        difference = (first - second).abs()
        if name in ("logits", "rejection_score") or name.startswith(AUXILIARY):
            sizes[name] = first.abs().amax().item()
        differences[name] = (difference.mean() if name == "is_unknown" else difference.amax()).item()
    return differences, sizes


def check_tolerance(comparisons: Sequence[Comparison], tolerance: float) -> None:
    """
    Raise ValueError if an output differs by more than `tolerance`, or is not a number.

    The rejection score and the decision are not checked: the score is a logarithm without bounds, and the decision
    jumps at a threshold. Both follow from probabilities, which are checked.
    """
    for comparison in comparisons:
        for name, value in comparison.differences.items():
            if name not in ("rejection_score", "is_unknown") and not value <= tolerance:
                raise ValueError(
                    f"The export differs from PyTorch by {value:.2g} in `{name}` (tolerance {tolerance:g}), for a "
                    f"batch of {comparison.batch_size} with audio of length {comparison.audio_length} and "
                    f"{comparison.text_length} tokens. Nothing was written. Export in a larger --dtype, or let that "
                    "through with a larger --tolerance."
                )


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """The differences as a Markdown table: a line for each batch, and one for the largest of all."""
    names = list(comparisons[0].differences)
    rows: list[dict[str, Any]] = [
        {"batch": c.batch_size, "audio": c.audio_length, "tokens": c.text_length}
        | {name: f"{c.differences[name]:.1e}" for name in names}
        for c in comparisons
    ]
    rows.append({name: f"{max(c.differences[name] for c in comparisons):.1e}" for name in names} | {"tokens": "max"})
    return format_table(rows, ["batch", "audio", "tokens", *names])


@dataclass
class ExportReport:
    """The result of `export_checkpoint`: sizes of files in bytes, and the differences to PyTorch of each format."""

    folder: Path
    float32_size: int  # of the weights of the whole checkpoint
    sizes: dict[str, int]
    changed: str = ""  # what was done to the model before
    trimmed: Trimmed | None = None
    comparisons: dict[str, list[Comparison]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [str(note) for note in (self.changed, self.trimmed) if note]
        for name, comparisons in self.comparisons.items():
            lines += [f"largest differences to PyTorch, {name}:", comparison_table(comparisons)]
        for name, size in self.sizes.items():
            is_model = name.endswith((".onnx", ".onnx.data", ".safetensors"))
            share = f" ({size / self.float32_size:.0%} of the checkpoint in float32)" if is_model else ""
            lines.append(f"{size / 1e6:8.2f} MB  {name}{share}")
        return "\n".join(lines)


@without_bars_of_weights()
def export_checkpoint(
    name_or_path: str | os.PathLike,
    output_dir: str | os.PathLike,
    formats: Sequence[str] = ("onnx",),
    dtype: str = "float32",
    languages: Sequence[str] | None = None,
    texts: Iterable[str] | None = None,
    vocabulary_size: int | None = None,
    change: Callable[[MMSERForAudioClassification, MMSERProcessor], str] | None = None,
    check: bool = True,
    tolerance: float | None = None,
    opset: int = OPSET,
    overwrite: bool = False,
) -> ExportReport:
    """
    Export an MMSER checkpoint to a folder with the model, its processor and its code.

    Args:
        name_or_path: folder or Hub name of the checkpoint.
        output_dir: folder to write. It appears at the end, when everything in it is written and checked.
        formats: "onnx" (for onnxruntime), "safetensors" (for PyTorch), or both.
        dtype: "float32", "float16" (for GPUs) or "int8" (for processors).
        languages, texts, vocabulary_size: trim the vocabulary to them, see `choose_tokens`.
        change: called with the model and its processor before anything is written: it changes the model in place,
            and returns what it did in words. `mmser.pruning_run.pruner` makes one.
        check: compare with PyTorch.
        tolerance: largest allowed difference; by default that of `TOLERANCES`.
        opset: version of the ONNX operators.
        overwrite: replace `output_dir` if it is not empty.
    Raises:
        ValueError: options that exclude each other, a folder that is not empty, or a difference above the tolerance.
        ImportError: onnx, onnxruntime or onnxscript is missing.
    """
    output_dir = Path(output_dir).absolute()
    _check_options(formats, dtype, opset, output_dir, overwrite)
    source = Path(name_or_path).resolve()
    if source.exists() and output_dir.resolve() in (source, *source.parents):
        raise ValueError(f"The export would replace {output_dir}, where the checkpoint itself is: give another folder")
    check_writable(output_dir.parent)
    register_auto_classes()  # use this code of MMSER, not the copy in the checkpoint
    with reading([Named("--checkpoint", os.fspath(name_or_path))]):
        model = MMSERForAudioClassification.from_pretrained(name_or_path, dtype=torch.float32)
        processor = MMSERProcessor.from_pretrained(name_or_path)
    if model.config.int8_weights:
        raise ValueError(f"{name_or_path} is in int8: export the checkpoint that it was made from")
    report = ExportReport(output_dir, 4 * sum(value.numel() for value in model.state_dict().values()), {})
    if change is not None:
        report.changed = change(model, processor)
    if languages or texts is not None:
        processor, report.trimmed = trim_vocabulary(model, processor, texts, languages, vocabulary_size)
    with whole_folder(output_dir) as folder, tempfile.TemporaryDirectory(dir=folder) as temporary:
        scratch = Path(temporary)
        for name in sorted(formats, reverse=True):  # safetensors first: both then share its config.json
            if name == "safetensors":
                exported = _write_safetensors(model, processor, folder, scratch, dtype)
            else:
                exported = _write_onnx(model, processor, folder, scratch, dtype, opset)
            if check:
                report.comparisons[name] = compare(model, exported, processor)
                check_tolerance(report.comparisons[name], TOLERANCES[dtype] if tolerance is None else tolerance)
            del exported  # before the other format needs the memory
            gc.collect()  # models hold themselves in circles, and Windows moves no file that one of them has mapped
    report.sizes = {path.name: path.stat().st_size for path in sorted(output_dir.iterdir())}
    return report


def _check_options(formats: Sequence[str], dtype: str, opset: int, output_dir: Path, overwrite: bool) -> None:
    if not formats or not set(formats) <= set(FORMATS):
        raise ValueError(f"`formats` must be one or more of {', '.join(FORMATS)}, got {formats!r}")
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if "onnx" in formats:
        check_onnx()
        import onnx

        newest = onnx.defs.onnx_opset_version()
        if not OLDEST_OPSET <= opset <= newest:
            raise ValueError(f"--opset must be from {OLDEST_OPSET} to {newest}, which this onnx has, got {opset}.")
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"{output_dir} is a file; give a folder to write")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not overwrite:
        raise ValueError(f"{output_dir} is not empty; give another folder, or pass --overwrite_output_dir")


def _in_dtype(model: MMSERForAudioClassification, scratch: Path, dtype: str) -> MMSERForAudioClassification:
    """`model` itself in float32, else a copy loaded in `dtype`, in which some parts stay in float32."""
    if dtype == "float32":
        return model
    if dtype == "int8":
        return quantize_dynamic(copy.deepcopy(model))
    model.save_pretrained(scratch)
    converted = MMSERForAudioClassification.from_pretrained(scratch, dtype=getattr(torch, dtype))
    return let_go_of_files(converted)  # the scratch folder is about to go


def _write_safetensors(model, processor, folder: Path, scratch: Path, dtype: str):
    """Write a PyTorch checkpoint; return it loaded again, to compute in float32."""
    converted = _in_dtype(model, scratch, dtype)
    small = _in_few_bytes(converted) if dtype == "int8" else None
    converted.save_pretrained(folder, state_dict=small)
    processor.save_pretrained(folder)
    return MMSERForAudioClassification.from_pretrained(folder, dtype=torch.float32)


def _in_few_bytes(model: MMSERForAudioClassification) -> dict[str, Tensor]:
    """
    The weights of a model in int8 as they are stored: what is in floats is stored in float16, as in ONNX files, and
    computed in float32; vectors and scales stay. Whisper's positions are left out where they are the sinusoids (but
    for float16, in which OpenAI stores them): a model starts with these.
    """
    stored = {
        name: value.half() if value.is_floating_point() and value.ndim > 1 else value
        for name, value in model.state_dict().items()
    }
    for name, module in model.named_modules():
        if isinstance(module, WhisperEncoder):
            table = module.embed_positions.weight
            if torch.allclose(table, sinusoids(*table.shape).to(table), rtol=0, atol=torch.finfo(torch.float16).eps):
                del stored[f"{name}.embed_positions.weight"]
    return stored


def _write_onnx(model, processor, folder: Path, scratch: Path, dtype: str, opset: int):
    """Write the ONNX file, and processor and config unless a PyTorch checkpoint brought them; return it opened."""
    path = folder / MMSEROnnxForAudioClassification.file_name
    if dtype == "int8":
        export_onnx(model, processor, scratch / path.name, opset)
        quantize_onnx(scratch / path.name, path)
    else:
        export_onnx(_in_dtype(model, scratch, dtype), processor, path, opset)
    exported = MMSEROnnxForAudioClassification.from_pretrained(path, providers=["CPUExecutionProvider"])
    if not (folder / "config.json").exists():
        processor.save_pretrained(folder)
        config = exported.config
        config.architectures = [MMSEROnnxForAudioClassification.__name__]
        config.auto_map = {**ONNX_AUTO_MAP}
        config.custom_pipelines = CUSTOM_PIPELINES
        config.save_pretrained(folder)
    return exported
