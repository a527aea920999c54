# SPDX-License-Identifier: Apache-2.0
"""Training against an adversary, of which no checkpoint holds anything.

1. `StatePerturbation`: what is added to the states of the encoders, by FGM or VAT
2. `DomainHead`: tells corpora or speakers apart, behind a reversed gradient; `FreshGradients` is for its steps
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from losses_mmser import distillation_loss

# xi of VAT, the length of the random perturbation that its direction is found from, as a share of that of the states:
# large enough that a prediction in bfloat16 changes by more than it is rounded
PROBE = 0.05
HEAD_SIZE = 128


class StatePerturbation:
    """
    Adds to the states of the encoders what harms most, so that the model learns from it too.

    "fgm" follows the gradient of the loss (Miyato et al. 2017, eq. 5). "vat" goes where the prediction changes most,
    by one step of the power iteration, and holds the prediction where it was (Miyato et al. 2018, section 3.3). The
    states are those that enter the fusion: the layers of the audio encoder are standardised and summed, so frozen
    encoders and cached states are no obstacle. Of each clip and modality the perturbation is `epsilon` times as long
    as all states together. All passes of a step drop out the same units.

    Args:
        backbone: the `MMSERModel`.
        kind: "fgm" or "vat".
        epsilon: greater than 0.
    """

    def __init__(self, backbone: Any, kind: str, epsilon: float):
        self.backbone = backbone
        self.kind = kind
        self.epsilon = epsilon
        self.is_attacking = False  # in the last pass of a step
        self._clean_logits: Tensor | None = None
        self._is_first_pass = False
        self._states: dict[str, Tensor] = {}  # of the first pass, 0 where there is nothing
        self._masks: dict[str, Tensor] = {}
        self._added: dict[str, Tensor] = {}

    def __call__(self, name: str, states: Tensor, mask: Tensor) -> Tensor:
        """States [B, T, D] of the modality `name` with their mask [B, T] -> the same with what is added to them."""
        valid = mask[..., None]
        if self._is_first_pass:
            self._masks[name], self._states[name] = valid, (states.detach() * valid).float()
            self._added[name] = torch.zeros_like(self._states[name], requires_grad=self.kind == "fgm")
        return states + (self._added[name] * valid).to(states)

    def step(
        self, backward: Callable[[], Tensor], first_context: AbstractContextManager, predict: Callable[[], Tensor]
    ) -> Tensor:
        """
        Make a step of training: one pass as it is, one with what the adversary adds. Their gradients are summed.

        Args:
            backward: the forward and the backward pass over a batch, which returns the loss.
            first_context: around the first pass.
            predict: the model's logits [B, C] for the same batch.
        Returns: the sum of both losses.
        """
        device = self.backbone.device
        self.backbone.state_perturbation, self._is_first_pass = self, True
        try:
            random_state = _random_state(device)
            with first_context:
                loss = backward()
            self._is_first_pass = False
            if self.kind == "fgm":
                directions = {name: cast(Tensor, added.grad) for name, added in self._added.items()}
            else:
                noise = {name: torch.randn_like(own) * self._masks[name] for name, own in self._states.items()}
                self._added = {name: own.requires_grad_() for name, own in self._scaled(noise, PROBE).items()}
                _set_random_state(device, random_state)
                divergence = self.divergence(predict())
                found = torch.autograd.grad(divergence, list(self._added.values()))
                directions = dict(zip(self._added, found, strict=True))
            self._added = self._scaled(directions, self.epsilon)
            _set_random_state(device, random_state)
            self.is_attacking = True
            return loss + backward()
        finally:
            self.backbone.state_perturbation, self.is_attacking, self._is_first_pass = None, False, False
            self._states, self._masks, self._added, self._clean_logits = {}, {}, {}, None

    def _scaled(self, directions: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        """The directions [B, T, D] with a length, for each clip, that is a share of that of its states."""
        return {name: share * _length(own) * _unit(directions[name]) for name, own in self._states.items()}

    def loss(self, loss: Tensor, logits: Tensor) -> Tensor:
        """The loss of a pass, of the model's own loss and logits [B, C] in it."""
        if not self.is_attacking:
            self._clean_logits = logits.detach()
            return loss
        # Parts that count for nothing: without them DDP would wait for the gradients of their parameters
        return loss if self.kind == "fgm" else self.divergence(logits) + 0 * loss

    def divergence(self, logits: Tensor) -> Tensor:
        """KL(clean || perturbed) of the predictions, mean over the batch."""
        if self._clean_logits is None:
            raise RuntimeError("the first pass gave no logits: call `loss` in it")
        return distillation_loss(logits, self._clean_logits, temperature=1.0)


def _length(states: Tensor) -> Tensor:
    """[B, T, D] -> the Euclidean length of all that is of one clip, [B, 1, 1]."""
    return states.flatten(1).norm(dim=1)[:, None, None]


def _unit(direction: Tensor) -> Tensor:
    """The direction with length 1 for each clip; 0 where it has none, as for a clip without the modality."""
    direction = direction.float()
    largest = direction.abs().amax(dim=(1, 2), keepdim=True)  # squares of gradients may be too small for a float
    scaled = direction / torch.where(largest > 0, largest, 1)
    return torch.where(largest.isfinite() & (largest > 0), F.normalize(scaled.flatten(1)).view_as(scaled), 0.0)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Of the host, and of the device if it has its own."""
    return torch.get_rng_state(), None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.get_device_module(device).set_rng_state(state[1])


class _ReverseGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by `-strength` (Ganin & Lempitsky 2015, eq. 11)."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


class FreshGradients(TrainerCallback):
    """The trainer forgets the gradients of its model after a step; this does it for another module."""

    def __init__(self, module: nn.Module):
        self.module = module

    def on_step_end(self, args, state, control, **kwargs):
        self.module.zero_grad()


class DomainHead(nn.Module):
    """
    Learns which corpus or speaker the features [B, D] come from, while what is before it learns to hide that.

    Args:
        feature_size: D.
        num_domains: corpora or speakers.
    """

    file_name = "adversarial_head.safetensors"  # in a checkpoint: what training goes on from

    def __init__(self, feature_size: int, num_domains: int):
        super().__init__()
        self.hidden = nn.Linear(feature_size, HEAD_SIZE)
        self.output = nn.Linear(HEAD_SIZE, num_domains)

    def forward(self, features: Tensor, domains: Tensor, strength: float) -> Tensor:
        """
        The mean cross-entropy over the clips whose domain is known; 0 without any.

        Args:
            features: [B, D].
            domains: int64 [B], -1 where it is not known.
            strength: of the reversed gradient.
        """
        logits = self.output(F.relu(self.hidden(_ReverseGradient.apply(features, strength))))
        total = F.cross_entropy(logits.float(), domains, ignore_index=-1, reduction="sum")
        return total / (domains >= 0).sum().clamp(min=1)


def reversal_strength(progress: float) -> float:
    """From 0 at the start to 1 at the end of training (progress 0 to 1), by eq. 14 of Ganin & Lempitsky 2015."""
    return 2 / (1 + math.exp(-10 * progress)) - 1
