# SPDX-License-Identifier: Apache-2.0
"""What `MMSERTrainer` does where the weights are shared out over processes: FSDP through Accelerate, and DeepSpeed."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from configuration_mmser import MODALITIES
from modeling_mmser import MODALITY_BIASES


def make_shardable(plugin: Any, model: Any) -> set[str]:
    """
    Prepare a model for FSDP: each layer of the encoders is a block of its own, whose weights are gathered only while
    it computes, unless the settings of FSDP name other blocks. Accelerate would take `_no_split_modules`, and refuses
    a name that is not in the model.

    Returns: the names of the parameters that were single numbers. PyTorch shards no such tensor, so that they have the
        shape (1,) now.
    """
    if plugin.transformer_cls_names_to_wrap is None:
        layers = {type(each).__name__ for each in model.modules() if isinstance(each, GradientCheckpointingLayer)}
        plugin.transformer_cls_names_to_wrap = sorted(layers)
    if getattr(model.base_model, "text_encoder", None) is None:
        model.get_input_embeddings = lambda: None  # Accelerate asks for the table of tokens, and there is none
    scalars = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 0}
    for name, parameter in scalars.items():
        part, _, own = name.rpartition(".")
        one = nn.Parameter(parameter.detach().reshape(1), requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(part), own, one)
    return set(scalars)


def gathered(weight: torch.Tensor) -> torch.Tensor:
    """A whole tensor of one that is shared out, on the processor; all processes must ask for it."""
    return weight.full_tensor().cpu() if isinstance(weight, DTensor) else weight


def whole_weights(weights: dict[str, torch.Tensor], scalars: set[str]) -> dict[str, torch.Tensor]:
    """Weights as a model on one device has them; `scalars` of `make_shardable` are single numbers again."""
    whole = {name: gathered(weight) for name, weight in weights.items()}
    return {name: weight.reshape(()) if name in scalars else weight for name, weight in whole.items()}


def check_resumable(optimizer: torch.optim.Optimizer) -> None:
    """
    Refuse checkpoints that nobody could go on from.

    Raises:
        ValueError: an optimiser that keeps nothing of a parameter, which PyTorch cannot load where FSDP2 is.
    """
    if isinstance(optimizer, torch.optim.SGD) and not any(group["momentum"] for group in optimizer.param_groups):
        raise ValueError(
            "PyTorch cannot resume an `sgd` without momentum under FSDP: give `--optim_args momentum=0.9`, another "
            "`--optim`, or `--save_strategy no`."
        )


@contextlib.contextmanager
def own_class(model: nn.Module) -> Iterator[None]:
    """FSDP gives a model another class, in a module of PyTorch: what is saved is named after its own."""
    wrapped = type(model)
    own: Any = next(each for each in wrapped.__mro__ if each.__name__ == wrapped.__name__.removeprefix("FSDP"))
    model.__class__ = own
    try:
        yield
    finally:
        model.__class__ = wrapped


@torch.no_grad()
def note_untrained_modalities(model: Any) -> None:
    """`MMSERPreTrainedModel.note_untrained_modalities` of a model whose weights FSDP2 shares out, on all processes."""
    names = [f"mmser.{bias.format(kind)}" for bias in MODALITY_BIASES for kind in MODALITIES]
    weights = {name: parameter for name, parameter in model.named_parameters() if name in names}
    model.note_untrained_modalities({name: gathered(weight) for name, weight in weights.items()})


def agree_on_modalities(config: Any) -> None:
    """
    What the first process wrote into the configuration as it saved holds for all: else the others would run an encoder
    that it ignores, and wait for its share of the weights for ever.
    """
    config.untrained_modalities = broadcast_object_list([config.untrained_modalities])[0]
