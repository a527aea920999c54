# SPDX-License-Identifier: Apache-2.0
"""The parameter groups of the published optimiser, each with its learning rate multiplier and weight decay."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the names of the groups are also those of a flag, and `--help` does not wait for torch
    from torch import nn

# name: (prefixes of the parameters, learning rate multiplier, weight decay), as published but for the layer weights
PARAMETER_GROUPS = {
    "audio_encoder": (("mmser.audio_encoder.",), 0.1, 0.025),
    "text_encoder": (("mmser.text_encoder.",), 0.1, 0.025),
    "cross_modal_attention": (("mmser.audio_attention.", "mmser.text_attention.", "mmser.joint_encoder."), 1.0, 0.05),
    "pooling": (("mmser.audio_pooling.", "mmser.text_pooling.", "mmser.layer_norm."), 1.0, 0.05),
    # Not published. A dozen numbers for all dimensions: at the learning rate of the others they stay where they are
    "layer_weights": (("mmser.layer_weights",), 20.0, 0.0),
    "fusion": (("mmser.fusion.", "mmser.missing_audio.", "mmser.missing_text."), 1.0, 0.05),
    "classifier": (("classifier.",), 1.5, 0.06),
    "anchors": (("anchors.",), 2.0, 0.04),
    "uncertainty": (("uncertainty.",), 1.0, 0.05),
    "prototypes": (("prototypes.",), 1.0, 0.05),
    "auxiliary": (("auxiliary.",), 1.0, 0.05),  # not published; empty without tasks beside the emotion
}

# Learning rate multiplier of an encoder of which only adapters are trained, ten times that of all its weights
ADAPTER_MULTIPLIER = 1.0


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    lr_multipliers: dict[str, float] | None = None,
    weight_decay: float | None = None,
) -> list[dict]:
    """
    Split the trainable parameters into the published groups; each group is split again, as biases, norms and other
    vectors are not decayed.

    Args:
        model: `MMSERForAudioClassification`.
        learning_rate: multiplied by each group's multiplier.
        lr_multipliers: multipliers that differ from the published ones, by group name.
        weight_decay: one value for all groups in place of the published ones.
    Returns: groups for a `torch.optim` optimiser, with a `name`.
    Raises:
        ValueError: a trainable parameter that belongs to no group.
    """
    multipliers = {name: multiplier for name, (_, multiplier, _) in PARAMETER_GROUPS.items()}
    for name, (prefixes, _, _) in PARAMETER_GROUPS.items():
        if any(key.startswith(prefixes) and ".lora_" in key for key, _ in model.named_parameters()):
            multipliers[name] = ADAPTER_MULTIPLIER
    multipliers |= lr_multipliers or {}
    groups: dict[tuple[str, bool], dict] = {}
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        names = [name for name, (prefixes, _, _) in PARAMETER_GROUPS.items() if parameter_name.startswith(prefixes)]
        if len(names) != 1:
            raise ValueError(f"Parameter {parameter_name!r} belongs to {len(names)} groups; it must belong to one.")
        decayed = parameter.ndim > 1
        published = PARAMETER_GROUPS[names[0]][2] if weight_decay is None else weight_decay
        group = groups.setdefault(
            (names[0], decayed),
            {
                "name": names[0],
                "params": [],
                "lr": learning_rate * multipliers[names[0]],
                "weight_decay": published if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: (list(PARAMETER_GROUPS).index(key[0]), not key[1]))]


def parameter_table(model: nn.Module) -> list[dict]:
    """Count the parameters, all and trainable, of each group of `MMSERForAudioClassification` and of the whole."""
    rows = []
    for name, prefixes in [*((name, group[0]) for name, group in PARAMETER_GROUPS.items()), ("all", ("",))]:
        own = [parameter for key, parameter in model.named_parameters() if key.startswith(prefixes)]
        rows.append(
            {
                "part": name,
                "parameters": sum(parameter.numel() for parameter in own),
                "trainable": sum(parameter.numel() for parameter in own if parameter.requires_grad),
            }
        )
    return rows
