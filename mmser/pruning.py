# SPDX-License-Identifier: Apache-2.0
"""Smaller encoders: `prune` removes attention heads, feed-forward columns and whole layers.

A head, or a column between the two matrices of a feed-forward part, is a unit: a few inputs of one matrix. What a unit
is worth is the mean squared change of that matrix's output without it, over the positions of calibration clips. The
units that stay take over what they can: least squares fit the matrix to what it gave before (He et al. 2017, "Channel
pruning for accelerating very deep neural networks", section 3.2). Every layer keeps as many units as the others, so
that the configuration describes the smaller encoder and it loads as always.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from encoders_mmser import LayerNames, layer_names, set_num_heads
from modeling_mmser import MMSERForAudioClassification

MULTIPLE = 8  # of the columns that stay: what processors and GPUs multiply fast
RIDGE = 1e-3  # of the mean square of an input: how far the least squares are held back
LAYER_CLIPS = 64  # that decide which layers go, at most
INPUTS = {"audio": ("input_values", "input_features", "attention_mask"), "text": ("input_ids", "text_attention_mask")}


@dataclass
class Units:
    """
    The units that a matrix reads.

    Args:
        before: the matrices whose rows make the units.
        after: the matrix whose columns read them.
        size: columns of a unit, those of a head or 1.
        attention: the module that counts its heads, if the units are heads.
    """

    before: list[nn.Linear]
    after: nn.Linear
    size: int
    attention: nn.Module | None = None
    positions: int = 0
    moments: Any = 0.0  # sum of the products of all inputs, with a last one that is 1, [F + 1, F + 1]

    def __len__(self) -> int:
        return self.after.in_features // self.size

    def see(self, inputs: Tensor) -> None:
        """Add positions [..., F]."""
        rows = inputs.flatten(0, -2)
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        self.moments = self.moments + rows.T @ rows
        self.positions += len(rows)

    def importance(self) -> Tensor:
        """Mean over the positions of the squared change of the output without a unit, float64 [units]."""
        weight = self.after.weight.detach().double().unflatten(1, (-1, self.size))
        products = torch.einsum("oui,ouj->uij", weight, weight)
        moments = self.moments[:-1, :-1].double().unflatten(0, (-1, self.size)).unflatten(2, (-1, self.size))
        own = moments.diagonal(dim1=0, dim2=2)  # (size, size, units)
        return torch.einsum("uij,iju->u", products, own) / max(self.positions, 1)

    @torch.no_grad()
    def keep(self, units: Tensor) -> None:
        """Remove all units but these, which are in ascending order; the output changes as little as they allow."""
        columns = (units[:, None] * self.size + torch.arange(self.size, device=units.device)).flatten()
        gone = torch.ones(self.after.in_features, dtype=torch.bool)
        gone[columns] = False
        weight, moments = self.after.weight.double(), self.moments.double()
        known = torch.cat([columns, columns.new_tensor([self.after.in_features])])  # and the constant
        matrix = moments[known][:, known]
        ridge = RIDGE * matrix.diagonal()[:-1].mean() + torch.finfo(torch.float32).tiny
        matrix.diagonal()[:-1].add_(ridge)
        missing = weight[:, gone] @ moments[:-1][gone][:, known]
        correction = torch.linalg.solve(matrix, missing, left=False)
        _replace(self.after, (weight[:, columns] + correction[:, :-1]), correction[:, -1])
        for linear in self.before:
            _replace(linear, linear.weight[columns], rows=columns)
        if self.attention is not None:
            set_num_heads(self.attention, len(units))


def _replace(linear: Any, weight: Tensor, shift: Tensor | None = None, rows: Tensor | None = None) -> None:
    """Give a layer a smaller matrix; its bias is moved by `shift`, or keeps its `rows`."""
    old = linear.weight
    linear.weight = nn.Parameter(weight.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
    linear.out_features, linear.in_features = weight.shape
    if linear.bias is not None:
        bias = linear.bias if rows is None else linear.bias[rows]
        bias = bias if shift is None else bias + shift.to(bias.dtype)
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=linear.bias.requires_grad)


def units_of(encoder: Any) -> tuple[list[Units], list[Units]]:
    """The heads and the feed-forward columns of each layer of an encoder."""
    names, config = layer_names(encoder.config), encoder.config
    heads, columns = [], []
    for layer in encoder.get_submodule(names.layers):
        first, second = (layer.get_submodule(name) for name in names.feed_forward)
        columns.append(Units([first], second, 1))
        if names.attention:
            *before, after = (layer.get_submodule(name) for name in names.attention)
            attention = layer.get_submodule(names.attention[0].rpartition(".")[0])
            heads.append(Units(before, after, config.hidden_size // config.num_attention_heads, attention))
    return heads, columns


def units_to_keep(number: int, share: float, multiple: int = 1) -> int:
    """How many of `number` units stay without a `share` of them: at least one, rounded up to a `multiple`."""
    kept = max(1, round(number * (1 - share)))
    return min(number, math.ceil(kept / multiple) * multiple)


@dataclass
class Pruned:
    """What `prune` removed: parameters before and after, and each encoder in words."""

    parameters_before: int
    parameters_after: int = 0
    encoders: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        share = 1 - self.parameters_after / self.parameters_before
        numbers = f"{self.parameters_before:,} -> {self.parameters_after:,} parameters ({share:.0%} less)"
        return f"pruned: {numbers}\n" + "\n".join(f"  {line}" for line in self.encoders)


def prune(
    model: MMSERForAudioClassification,
    clips: Iterable[Mapping[str, Any]],
    share: float,
    layer_share: float = 0.0,
) -> Pruned:
    """
    Make the encoders smaller, in place. The configuration says so: what is saved loads as always.

    Args:
        model: in float32, on any device.
        clips: calibration clips as inputs of the model, one in each: nothing is padded. A mask of zeros means that a
            modality is missing; other keys are ignored.
        share: of the attention heads and of the feed-forward columns, to remove from each layer, in [0, 1).
        layer_share: of the layers of each encoder, to remove before that, in [0, 1). Those go first without which the
            probabilities of the classes change least.

    Returns: what was removed.
    Raises:
        ValueError: shares out of range, an encoder that cannot be pruned, a batch of several clips or with padding, or
            clips that all lack a modality which the model uses.
    """
    for name, value in (("share", share), ("layer_share", layer_share)):
        if not 0 <= value < 1:
            raise ValueError(f"`{name}` must be in [0, 1), got {value}.")
    report = Pruned(model.num_parameters())
    used = model.config.used_modalities
    encoders = {name: getattr(model.base_model, f"{name}_encoder") for name in used}
    names = {name: layer_names(encoder.config) for name, encoder in encoders.items()}  # refuses before work is done
    was_training = model.training
    model.eval()
    inputs = [_inputs_of(clip) for clip in clips]
    for name in used:
        if not any(INPUTS[name][-1] in clip for clip in inputs):
            raise ValueError(f"None of the {len(inputs)} calibration clips has {name}, which the model uses.")
    for name, encoder in encoders.items():
        layers = encoder.config.num_hidden_layers
        if layers - units_to_keep(layers, layer_share):
            remove_layers(model, name, least_needed_layers(model, name, layer_share, inputs[:LAYER_CLIPS]))
    plans = {name: _plan(encoder, share) for name, encoder in encoders.items()}
    _watch([units for plan in plans.values() for units, _ in plan], model, inputs)
    for name, encoder in encoders.items():
        for units, kept in plans[name]:
            units.keep(units.importance().topk(kept).indices.sort().values)
        _write_down(model, name, encoder, names[name])
        report.encoders.append(_describe(name, encoder, names[name]))
    report.parameters_after = model.num_parameters()
    model.train(was_training)
    return report


def _inputs_of(clip: Mapping[str, Any]) -> dict[str, Tensor]:
    """The modalities that a clip has, with their masks."""
    inputs: dict[str, Tensor] = {}
    for name, (*values, mask) in INPUTS.items():
        own = {key: clip[key] for key in values if clip.get(key) is not None}
        if any(len(value) != 1 for value in own.values()):
            raise ValueError("Calibration clips come one by one, but a batch holds several.")
        valid = clip.get(mask)
        if own and valid is None:
            valid = next(iter(own.values())).new_ones(1, next(iter(own.values())).shape[-1], dtype=torch.long)
        if not own or valid is None or not valid.any():
            continue
        if not valid.all():
            raise ValueError(f"A calibration clip has padding in its {name}: give each as long as it is.")
        inputs |= {**own, mask: valid}
    return inputs


def _plan(encoder: Any, share: float) -> list[tuple[Units, int]]:
    """Which units lose some, and how many stay."""
    heads, columns = units_of(encoder)
    plan = [(units, units_to_keep(len(units), share)) for units in heads]
    plan += [(units, units_to_keep(len(units), share, MULTIPLE)) for units in columns]
    return [(units, kept) for units, kept in plan if kept < len(units)]


@torch.no_grad()
def _watch(all_units: Sequence[Units], model: Any, inputs: Iterable[dict[str, Tensor]]) -> None:
    """Let units see what they get of the clips."""
    if not all_units:
        return
    hooks = [
        units.after.register_forward_pre_hook(lambda _, arguments, units=units: units.see(arguments[0]))
        for units in all_units
    ]
    try:
        for clip in inputs:
            model.base_model.encode(**{key: value.to(model.device) for key, value in clip.items()})
    finally:
        for hook in hooks:
            hook.remove()


def _write_down(model: Any, modality: str, encoder: Any, names: LayerNames) -> None:
    """Put the sizes of a pruned encoder into the configuration."""
    heads, columns = units_of(encoder)
    setattr(encoder.config, names.width, len(columns[0]))
    setattr(getattr(model.config, f"{modality}_config"), names.width, len(columns[0]))
    if heads and len(heads[0]) < encoder.config.num_attention_heads:
        setattr(model.config, f"{modality}_attention_heads", len(heads[0]))


def _describe(modality: str, encoder: Any, names: LayerNames) -> str:
    heads, columns = units_of(encoder)
    number = len(heads[0]) if heads else encoder.config.num_attention_heads
    note = "" if heads else " (all of them: they cannot be removed)"
    return f"{modality}: {len(columns)} layers, each with {number} heads{note} and {len(columns[0])} columns"


def remove_layers(model: Any, modality: str, gone: Iterable[int]) -> None:
    """Remove the layers with these numbers from an encoder, and their states from the weighted sum of all layers."""
    encoder = getattr(model.base_model, f"{modality}_encoder")
    path = layer_names(encoder.config).layers
    layers = encoder.get_submodule(path)
    kept = [number for number in range(len(layers)) if number not in set(gone)]
    encoder.set_submodule(path, nn.ModuleList(layers[number] for number in kept))
    for config in (encoder.config, getattr(model.config, f"{modality}_config")):
        config.num_hidden_layers = len(kept)
    base: Any = model.base_model
    if modality == "audio" and base.layer_weights is not None:
        rows = torch.tensor([0, *(number + 1 for number in kept)])
        if _has_final_norm(encoder.config):  # the last state is behind that norm, whichever layer it comes from
            rows[-1] = len(layers)
        base.layer_weights = nn.Parameter(
            base.layer_weights.detach()[rows].clone(), requires_grad=base.layer_weights.requires_grad
        )
        base.state_norm.mean, base.state_norm.scale = base.state_norm.mean[rows], base.state_norm.scale[rows]


def _has_final_norm(config: Any) -> bool:
    return config.model_type == "whisper" or getattr(config, "do_stable_layer_norm", False)


@contextlib.contextmanager
def without_layer(model: Any, modality: str, number: int) -> Iterator[None]:
    """A region in which an encoder lacks one layer."""
    base: Any = model.base_model
    encoder = getattr(base, f"{modality}_encoder")
    path = layer_names(encoder.config).layers
    layers, weights = encoder.get_submodule(path), base.layer_weights
    norm = None if base.state_norm is None else (base.state_norm.mean, base.state_norm.scale)
    remove_layers(model, modality, [number])
    try:
        yield
    finally:
        encoder.set_submodule(path, layers)
        for config in (encoder.config, getattr(model.config, f"{modality}_config")):
            config.num_hidden_layers = len(layers)
        if norm is not None:
            base.layer_weights = weights
            base.state_norm.mean, base.state_norm.scale = norm


@torch.no_grad()
def layer_importance(model: Any, modality: str, inputs: Sequence[dict[str, Tensor]]) -> Tensor:
    """
    How far the probabilities move without each layer: mean Kullback-Leibler divergence in nats, [layers]. Infinity for
    WavLM's first layer, which must stay.
    """
    clips = [{key: value.to(model.device) for key, value in clip.items()} for clip in inputs]
    before = [model(**clip, use_openmax=False).logits.log_softmax(dim=-1) for clip in clips]
    found: list[Tensor] = []
    encoder = getattr(model.base_model, f"{modality}_encoder")
    for number in range(encoder.config.num_hidden_layers):
        if number == 0 and encoder.config.model_type == "wavlm":  # it has the table of positions of all layers
            found.append(torch.tensor(torch.inf))
            continue
        with without_layer(model, modality, number):
            after = [model(**clip, use_openmax=False).logits.log_softmax(dim=-1) for clip in clips]
        pairs = zip(before, after, strict=True)
        found.append(torch.stack([(old.exp() * (old - new)).sum() for old, new in pairs]).mean().cpu())
    return torch.stack(found)


def least_needed_layers(model: Any, modality: str, share: float, inputs: Sequence[dict[str, Tensor]]) -> list[int]:
    """The numbers of the layers to remove."""
    importance = layer_importance(model, modality, inputs)
    number = len(importance) - units_to_keep(len(importance), share)
    return importance.topk(number, largest=False).indices.tolist()
