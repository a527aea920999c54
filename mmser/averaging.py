# SPDX-License-Identifier: Apache-2.0
"""Averages of weights: along a training (`WeightAverage`) and over checkpoints (`average_checkpoints`)."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from transformers import TrainerCallback

from configuration_mmser import MMSERConfig
from modeling_mmser import MMSERForAudioClassification


class WeightAverage(TrainerCallback):
    """
    Exponential moving average of the trained weights (Polyak & Juditsky 1992), with the decay of its first steps
    lowered so that the start is soon forgotten (Tarvainen & Valpola 2017, section 2): min(decay, (1 + t) / (10 + t)).

    Args:
        parameters: those that are trained; each process averages its own copies, which are alike.
        decay: share of the average that a step keeps, in (0, 1).
    """

    file_name = "last_weights.safetensors"  # in a checkpoint: what training goes on from

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.decay = decay
        self.last: list[torch.Tensor] = []
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Begin the average at the present weights."""
        self.averages = [parameter.detach().float().clone() for parameter in self.parameters]

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        decay = min(self.decay, (1 + step) / (10 + step))
        last = [parameter.to(average) for parameter, average in zip(self.parameters, self.averages, strict=True)]
        torch._foreach_lerp_(self.averages, last, 1 - decay)

    @torch.no_grad()
    def put(self, weights: Iterable[torch.Tensor]) -> None:
        """Copy weights into the parameters."""
        for parameter, weight in zip(self.parameters, weights, strict=True):
            parameter.copy_(weight)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averages inside; the weights that it gets back after are in `last`."""
        self.last = [parameter.detach().clone() for parameter in self.parameters]
        self.put(self.averages)
        try:
            yield
        finally:
            self.put(self.last)
            self.last = []


@torch.no_grad()
def average_checkpoints(model: MMSERForAudioClassification, names: Sequence[str]) -> None:
    """
    Give a model the mean of the weights and buffers of checkpoints: a uniform soup (Wortsman et al. 2022), as good as
    an ensemble at the cost of one model, if all were fine-tuned from the same one.

    Args:
        model: loaded from the first of them.
        names: the checkpoints, Hub names or folders.
    Raises:
        ValueError: one has other labels, or other weights than the model.
    """
    own = model.state_dict()
    for count, name in enumerate(names[1:], 2):
        labels, first_labels = (MMSERConfig.from_pretrained(source).id2label for source in (name, names[0]))
        if labels != first_labels:
            raise ValueError(
                f"{name} cannot be averaged with {names[0]}: its labels are {labels}, not {first_labels}."
            )
        other = MMSERForAudioClassification.from_pretrained(name, dtype=torch.float32).state_dict()
        bad = [
            key for key in {**own, **other} if key not in own or key not in other or own[key].shape != other[key].shape
        ]
        if bad:
            raise ValueError(
                f"{name} cannot be averaged with {names[0]}: {len(bad)} weights are not in both with the same shape, "
                f"such as {bad[0]}."
            )
        for key, value in own.items():
            if value.is_floating_point():
                value.lerp_(other[key], 1 / count)
