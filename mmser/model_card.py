# SPDX-License-Identifier: Apache-2.0
"""The model card of a checkpoint: `model_card_template.md`, filled with what is true of that checkpoint.

Three sources say what is true: the results of the run, the configuration beside the weights, and the weights (what is
fitted, which modalities were trained). `write_model_card` is the entry; `checkpoint_state` reads the weights.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from transformers.utils import logging

from configuration_mmser import MMSERConfig
from mmser import __version__
from mmser.files import write_atomically
from mmser.results import format_results
from mmser.tables import format_table, harmless, shown_results
from modeling_mmser import MODALITY_BIASES, MMSERForAudioClassification

logger = logging.get_logger(__name__)
CARD_NAME = "README.md"
CARD_PATTERNS = (CARD_NAME, "model_card*.md")  # the second where the first is someone's own
# The last line of a card that we wrote, with a checksum of what is above it
SIGNATURE = "\n<!-- Written by MMSER ({}). A card that was changed is kept, the next one goes beside it. -->\n"
TEMPLATE = Path(__file__).parent / "model_card_template.md"
NO_LANGUAGE = {"mis", "mul", "und", "zxx"}  # ISO 639-2: no code, several, not determined, none
ENCODERS = {"audio_encoder": "audio", "text_encoder": "text"}  # part of the parameter table: its modality
# In `eval_results.json`: what the Hub calls the metric, and its title
CARD_METRICS = {
    "weighted_f1": ("f1", "Weighted F1"),
    "unweighted_average_recall": ("recall", "Unweighted average recall"),
    "accuracy": ("accuracy", "Accuracy"),
}
COMPANIONS = {"anchors": "anchor", "uncertainty": "uncertainty", "prototypes": "prototype"}  # part: its loss


@dataclass(frozen=True)
class CheckpointState:
    """
    What the weights of a checkpoint say.

    Args:
        modalities: those of "audio" and "text" that were trained, in this run or in an earlier one.
        has_openmax: OpenMax is fitted and switched on.
        has_thresholds: rejection goes by thresholds that were fitted to held-out clips.
    """

    modalities: list[str]
    has_openmax: bool
    has_thresholds: bool


def checkpoint_state(folder: str | Path, config: MMSERConfig) -> CheckpointState:
    """
    Read from the weights in `folder` what the configuration cannot tell. Only the tensors needed are read.

    Raises:
        FileNotFoundError: the folder has no `model*.safetensors`.
    """
    with torch.device("meta"):  # the module knows its own rules, and takes no memory here
        openmax = MMSERForAudioClassification(config).openmax
    biases = {name: [f"mmser.{bias.format(name)}" for bias in MODALITY_BIASES] for name in ENCODERS.values()}
    buffers = [f"openmax.{name}" for name in openmax.state_dict()]
    weights = _read_tensors(Path(folder), [*biases["audio"], *biases["text"], *buffers])
    openmax.load_state_dict({name.removeprefix("openmax."): weights[name] for name in buffers}, assign=True)
    has_openmax = config.use_openmax and openmax.is_fitted
    return CheckpointState(
        modalities=[
            name for name, own in biases.items() if any(bool(weights[bias].any()) for bias in own if bias in weights)
        ],
        has_openmax=has_openmax,
        has_thresholds=has_openmax and config.uses_fitted_thresholds and openmax.has_thresholds,
    )


def _read_tensors(folder: Path, names: list[str]) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no model.safetensors: save the checkpoint before its card.")
    tensors = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in set(names) & set(file.keys())})
    return tensors


def _language_codes(names: Iterable[str]) -> list[str] | None:
    """The names that are codes of a language as a model card takes them: two or three letters, without a region."""
    codes = {name.replace("_", "-").split("-")[0].lower() for name in names}
    return sorted(code for code in codes - NO_LANGUAGE if re.fullmatch("[a-z]{2,3}", code)) or None


def _loss_table(config: MMSERConfig) -> str:
    """The parts of the loss that have a weight, in Markdown."""
    balanced = "class-balanced (Cui et al. 2019), " if config.class_counts and config.class_balanced_beta else ""
    parts = {
        "cross_entropy": f"cross-entropy, label smoothing {config.label_smoothing:g}",
        "focal": f"focal loss (Lin et al. 2017), {balanced}gamma {config.focal_gamma:g}",
        "anchor": "class anchor clustering",
        "uncertainty": "uncertainty",
        "prototype": "prototypes",
        "supervised_contrastive": "supervised contrastive loss (Khosla et al. 2020)",
        "distillation": "distillation from a teacher (Hinton et al. 2015)",
        **({"auxiliary": f"each of {', '.join(config.auxiliary_tasks)}"} if config.auxiliary_tasks else {}),
    }
    weights = {text: getattr(config, f"{name}_loss_weight") for name, text in parts.items()}
    rows = [{"part of the loss": text, "weight": f"{weight:g}"} for text, weight in weights.items() if weight]
    return format_table(harmless(rows), ["part of the loss", "weight"])


def card_metadata(
    results: Mapping[str, Any], name: str, config: Mapping[str, Any], modalities: Sequence[str] = ()
) -> ModelCardData:
    """
    The metadata of a card, as far as they are known.

    Args:
        results: as in `eval_results.json`.
        name: of the model.
        config: fields of the configuration.
        modalities: those that were trained; tags.
    """
    split = "test" if "test" in results else "validation"
    scores, data = results.get(split, {}).get("model"), results["data"]
    evaluated = scores and [
        EvalResult(
            task_type="audio-classification",
            task_name="Speech emotion recognition",
            dataset_type=data["type"],
            dataset_name=f"{data['name']} ({split})",
            dataset_split=split,
            metric_type=kind,
            metric_name=title,
            metric_value=round(scores[key], 4),
        )
        for key, (kind, title) in CARD_METRICS.items()
        if scores.get(key) is not None
    ]
    return ModelCardData(
        language=_language_codes(data["languages"]),
        license=results.get("license"),
        library_name="transformers",
        pipeline_tag="audio-classification",
        tags=["speech-emotion-recognition", "mmser", *(["multimodal"] if len(modalities) > 1 else []), *modalities],
        datasets=[data["name"]] if data["type"] == data["name"] else None,
        metrics=list(dict.fromkeys(kind for kind, _ in CARD_METRICS.values())) if evaluated else None,
        base_model=_encoders_on_the_hub(config, results.get("encoders", {})) or None,
        model_name=name,
        eval_results=evaluated,
    )


def _encoders_on_the_hub(config: Mapping[str, Any], encoders: Mapping[str, str]) -> list[str]:
    """The encoders that a model started from, by their names on the Hub."""
    names = [
        str((config.get(f"{modality}_config") or {}).get("_name_or_path") or "")
        for modality in ENCODERS.values()
        if "at random" not in encoders.get(modality, "")
    ]
    return [name for name in names if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists()]


def sign_card(text: str) -> str:
    """Add the line that tells a card of ours from one that somebody wrote or changed; Markdown does not show it."""
    return text + SIGNATURE.format(hashlib.blake2b(text.encode(), digest_size=10).hexdigest())


def without_signature(text: str) -> str:
    """A card without the line that `sign_card` added."""
    return text.rpartition(SIGNATURE.split("(")[0])[0] or text


def is_own_card(path: Path, may_be_changed: bool = False) -> bool:
    """Whether we wrote this file, and nobody changed it since, or only above the line that says so."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    body, line, _ = text.rpartition(SIGNATURE.split("(")[0])
    return bool(line) and (may_be_changed or sign_card(body) == text)


def _free_path(folder: Path) -> Path:
    """Where a card may be written: a README.md of the user's own is kept."""
    readme = folder / CARD_NAME
    names = itertools.chain([CARD_NAME, "model_card.md"], (f"model_card_{number}.md" for number in itertools.count(2)))
    path = next(path for name in names if not (path := folder / name).exists() or is_own_card(path))
    if path != readme:
        logger.warning(f"{readme} was written or changed by somebody else: it is kept, and the card is {path.name}.")
    return path


def write_model_card(results: Mapping[str, Any], output_dir: str | Path) -> Path:
    """
    Fill `model_card_template.md` and write it as `README.md` beside a saved checkpoint.

    A `README.md` that is not a card of ours, or was changed, is kept, with a warning: the card is `model_card.md`.

    Args:
        results: as in `eval_results.json`.
        output_dir: folder with the checkpoint's `config.json` and weights.
    Returns: the path of the card.
    Raises:
        FileNotFoundError: the folder has no checkpoint.
    """
    folder = Path(output_dir)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: save the checkpoint before its card.")
    results = shown_results(results)
    config = MMSERConfig.from_pretrained(folder)
    state = checkpoint_state(folder, config)
    split = "test" if "test" in results else "validation"
    name = results.get("model_name") or folder.resolve().name
    trainable = {row["part"]: row["trainable"] for row in results["parameters"]}
    # A name that is not there is an error, not an empty place in the card
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=card_metadata(results, name, config.to_dict(), state.modalities).to_yaml(),
        name=name,
        version=__version__,
        config=config,
        state=state,
        results=results,
        split=split,
        rows=results.get(split, {}),
        losses=_loss_table(config),
        frozen=[
            f"the {modality} encoder"
            for part, modality in ENCODERS.items()
            if modality in state.modalities and trainable.get(part) == 0
        ],
        untrained=[part for part, loss in COMPANIONS.items() if not getattr(config, f"{loss}_loss_weight")],
        tables=format_results(results),
    )
    path = _free_path(folder)
    write_atomically(path, sign_card(ModelCard(text).content))
    return path
