# SPDX-License-Identifier: Apache-2.0
"""Weights in int8 for PyTorch on processors, without another library: `quantize_dynamic`.

"Dynamic" means that the states are quantised while the model runs, so that no calibration is needed. PyTorch's own
function of this name is deprecated, stores pickles, and takes one scale for the states of a whole batch: a clip's
result would depend on its batch. Here each position has its own.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Parts of `MMSERModel` that work on sequences. From the fusion on a rounding error would reach the answer, and there
# is little to gain: one vector for each clip
PARTS = (
    *("audio_encoder", "text_encoder", "audio_attention", "text_attention", "joint_encoder"),
    *("audio_pooling", "text_pooling"),
)
# Modules that read the weights of their linear layers themselves
READ_WEIGHTS = ("WavLMAttention", "MultiheadAttention")


@cache
def processor_multiplies_int8() -> bool:
    """
    Whether the processor has instructions for products of int8 (x86: VNNI). Without them they took 23 times as long as
    in float32 (AVX2), and float32 with the weights converted back each time took 1.1 times as long.
    """
    return torch.cpu._is_vnni_supported()


def rounded(values: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [..., D] -> int8 [..., D] and the scale of each, float32 [..., 1], which multiplies it back."""
    scale = torch.linalg.vector_norm(values, ord=torch.inf, dim=-1, keepdim=True) / 127
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.round(values / scale).to(torch.int8), scale


class Int8Linear(nn.Module):
    """
    A linear layer with weights in int8 and a scale for each output.

    On a processor that can do so, the inputs are rounded to int8 too, with a scale for each position, and multiplied
    in integers. Elsewhere the weights are converted back: that saves memory, not time. It does not learn.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Any

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] of the same type."""
        if inputs.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("A model in int8 does not learn: train the checkpoint that it was made from.")
        if inputs.device.type != "cpu" or not processor_multiplies_int8():
            weight = self.weight.to(inputs.dtype) * self.weight_scale[:, None].to(inputs.dtype)
            return F.linear(inputs, weight, None if self.bias is None else self.bias.to(inputs.dtype))
        rows, scale = rounded(inputs.flatten(0, -2).float())
        outputs = torch._int_mm(rows, self.weight.t()).float().mul_(scale)  # (rows, out_features)
        if self.bias is None:
            outputs = outputs.mul_(self.weight_scale.float())
        else:
            outputs = torch.addcmul(self.bias.float(), outputs, self.weight_scale.float())
        return outputs.unflatten(0, inputs.shape[:-1]).to(inputs.dtype)

    def fill(self, layer: nn.Linear) -> None:
        """Take over the weights of a layer, rounded."""
        self.weight, scale = rounded(layer.weight.float())
        self.weight_scale = scale[:, 0]
        if self.bias is not None:
            self.bias.copy_(layer.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Embedding(nn.Module):
    """A table of vectors in int8 with a scale for each, of the type that the model computes in."""

    weight: Tensor
    row_scale: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.register_buffer("weight", torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8))
        self.register_buffer("row_scale", torch.ones(num_embeddings))

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [...] -> vectors [..., embedding_dim] of the type of the scales."""
        return self.weight[ids].to(self.row_scale.dtype) * self.row_scale[ids][..., None]

    def fill(self, table: nn.Embedding) -> None:
        """Take over the vectors of a table, rounded."""
        self.weight, scale = rounded(table.weight.float())
        self.row_scale = scale[:, 0].to(table.weight.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


@torch.no_grad()
def _converted(old: Any, new: Any, with_weights: bool) -> Any:
    """`new` in place of `old`: with its weights, rounded, or still empty."""
    if with_weights:
        new.fill(old)
    return new.to(old.weight.device).train(old.training)


def _replace_linear(parent: nn.Module, with_weights: bool) -> None:
    """Put `Int8Linear` in place of the linear layers within a module."""
    if type(parent).__name__ in READ_WEIGHTS:
        return
    for name, module in list(parent.named_children()):
        # A subclass with a forward of its own does more
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and module.out_features > 1:
            new = Int8Linear(module.in_features, module.out_features, module.bias is not None)
            setattr(parent, name, _converted(module, new, with_weights))
        else:
            _replace_linear(module, with_weights)


def use_int8(base_model: Any, with_weights: bool = False) -> None:
    """
    Put the parts of an `MMSERModel` that work on sequences into int8, in place.

    Args:
        base_model: in float32.
        with_weights: round the weights that are there; otherwise they are still to be loaded.
    """
    for name in PARTS:
        if getattr(base_model, name) is not None:
            _replace_linear(getattr(base_model, name), with_weights)
    encoder = base_model.text_encoder
    table = None if encoder is None else encoder.get_input_embeddings()
    if type(table) is nn.Embedding:
        encoder.set_input_embeddings(_converted(table, Int8Embedding(*table.weight.shape), with_weights))


def quantize_dynamic(model: Any) -> Any:
    """
    Round the weights of a model to int8, in place: a quarter of the size, and faster on processors.

    The linear layers of the encoders, of the attention between the modalities and of the pooling, and the table of
    tokens; convolutions, norms and all that follows the fusion stay as they are. `save_pretrained` then writes int8 to
    safetensors, and `from_pretrained` reads it.

    Args:
        model: `MMSERForAudioClassification` or `MMSERModel`, in float32.

    Returns: the model itself, in eval mode. It does not learn any more.
    Raises:
        ValueError: the model is in int8 already.
    """
    if model.config.int8_weights:
        raise ValueError("The model is in int8 already: there is nothing to quantise.")
    use_int8(model.base_model, with_weights=True)
    model.config.int8_weights = True
    return model.eval()


__all__ = ["Int8Embedding", "Int8Linear", "quantize_dynamic"]
