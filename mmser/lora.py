# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA, Hu et al. 2022) in the encoders, made by PEFT: `add_adapters`.

How they are saved and loaded is in `adapters_mmser.py`, which needs no PEFT.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from adapters_mmser import fingerprint_weights
from configuration_mmser import MODALITIES, check_names
from encoders_mmser import is_frozen
from mmser.arguments import check_peft

logger = logging.get_logger(__name__)

# Layers whose weights an encoder reads without calling the layer: an adapter in them would do nothing
NEVER_CALLED = {"wavlm": ("q_proj", "k_proj", "v_proj", "out_proj")}


def add_adapters(
    model: Any,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    target: Sequence[str] = ("all",),
    save: str = "merged",
    bases: Mapping[str, str | os.PathLike] | None = None,
) -> None:
    """
    Put adapters into the encoders that are not frozen: of these, only the adapters are trained from then on. The rest
    of the model is trained in full.

    Args:
        model (`MMSERForAudioClassification`): changed in place. At first it computes what it did before.
        rank: width of the adapters.
        alpha: they count alpha / rank times; default 2 * rank.
        dropout: of their inputs, in training.
        target: last names of the linear layers to adapt, such as "q_proj"; "all" for every linear layer.
        save: what `MMSERTrainer` leaves at the end: "merged", a model without adapters, or "adapter", the adapters and
            the rest of MMSER without the encoders in `bases`.
        bases: "audio" and "text" -> the name of that encoder, or of the MMSER checkpoint that it is from. What has no
            name is saved whole.
    Raises:
        ImportError: PEFT is not installed.
        ValueError: there is nothing to adapt, or `target` names no layer.
    """
    check_peft()
    import peft

    backbone = model.base_model
    encoders = {kind: getattr(backbone, f"{kind}_encoder") for kind in MODALITIES}
    encoders = {kind: encoder for kind, encoder in encoders.items() if encoder is not None}
    adapted = {kind: encoder for kind, encoder in encoders.items() if not is_frozen(encoder)}
    if not adapted:
        raise ValueError("Every encoder is frozen, so that adapters have nothing to adapt.")
    check_target(adapted, target)
    layers = {kind: find_layers(encoder, kind, target) for kind, encoder in adapted.items()}
    alpha = 2.0 * rank if alpha is None else alpha
    named = {kind: _absolute(name) for kind, name in (bases or {}).items() if kind in encoders}
    model.config.lora = {
        **{"rank": rank, "alpha": alpha, "dropout": dropout, "target": list(target), "save": save},
        "bases": {
            kind: {"name": name, "fingerprint": fingerprint_weights(encoders[kind])} for kind, name in named.items()
        },
    }
    for kind, encoder in adapted.items():
        encoder.requires_grad_(False)
        options: Any = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": layers[kind]}
        config = peft.LoraConfig(**options)  # alpha may be a fraction, whatever its declared type
        peft.inject_adapter_in_model(config, encoder)
        logger.info(f"Adapters of rank {rank} in {len(layers[kind])} layers of the {kind} encoder.")
    for kind, name in named.items():
        if save == "adapter" and Path(name).is_dir():
            logger.warning(
                f"The checkpoint will hold adapters for the {kind} encoder in {name}, a folder of this machine: "
                "elsewhere it loads only with that encoder. `--lora_save merged` saves a model of its own."
            )


def find_layers(encoder: nn.Module, kind: str, target: Sequence[str]) -> list[str]:
    """
    The linear layers of an encoder that `target` of `add_adapters` means.

    Raises:
        ValueError: there is none, or an adapter in one of them would do nothing.
    """
    config: Any = encoder.config
    never_called = NEVER_CALLED.get(config.model_type, ())
    layers = {name: name.rsplit(".")[-1] for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    known = sorted(set(layers.values()) - set(never_called))
    if list(target) == ["all"]:
        return [name for name, last in layers.items() if last in known]
    useless = [name for name in target if name in never_called]
    if useless:
        raise ValueError(
            f"A {config.model_type} encoder reads the weights of {useless[0]} without calling it: an adapter there "
            f"would do nothing. `--lora_target` may name {', '.join(known)}."
        )
    found = [name for name, last in layers.items() if last in target]
    if not found:
        raise ValueError(
            f"`--lora_target` {' '.join(target)} names no linear layer of the {kind} encoder, which has "
            f"{', '.join(known)}. Name some of them too, or freeze this encoder with --freeze_{kind}."
        )
    return found


def check_target(encoders: Mapping[str, nn.Module], target: Sequence[str]) -> None:
    """Raise ValueError for a name in `target` that is in none of the encoders; it suggests the nearest."""
    known = {
        name.rsplit(".")[-1]
        for encoder in encoders.values()
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear)
    }
    try:
        check_names(target, {*known, "all"}, "linear layer of the encoders")
    except TypeError as error:
        raise ValueError(f"--lora_target: {error}") from error


def _absolute(name: str | os.PathLike) -> str:
    """A folder as it is found from anywhere; a name on the Hub as it is."""
    return str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else str(name)
