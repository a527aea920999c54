# SPDX-License-Identifier: Apache-2.0
"""What the supervised contrastive loss compares a batch with, besides itself: the batches of other processes, and
earlier ones of its own."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist
from transformers import TrainerCallback

from losses_mmser import ContrastiveRows


class ContrastivePool(TrainerCallback):
    """
    Widens the batches of `supervised_contrastive_loss` in training.

    The clips that all processes have at the same time are one batch, with gradients to a process's own clips. Earlier
    clips are compared with as they were, without gradients (a cross-batch memory, Wang et al. 2020): those of the same
    step of the optimiser, from the same weights, and beyond them as many as asked for.

    Set it as `contrastive_pool` of an `MMSERForAudioClassification`, and make it a callback of the trainer, which
    tells it when a batch and when a step of the optimiser is over. Until then each call takes the same earlier clips.

    Args:
        num_earlier: clips of earlier steps to keep.
    """

    def __init__(self, num_earlier: int = 0):
        self.num_earlier = num_earlier
        self._earlier: ContrastiveRows | None = None
        self._present: ContrastiveRows | None = None
        self.is_spare = False  # whether the clips of this process count for nothing at present

    def __call__(self, rows: ContrastiveRows) -> tuple[ContrastiveRows, ContrastiveRows | None]:
        """The clips of a batch -> those of all processes (own ones with gradients), and the earlier ones."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            own = [None if column is None else column[:0] for column in rows] if self.is_spare else rows
            rows = gather_rows(ContrastiveRows(*own))
        if self._present is None:  # what an adversary makes of the batch later is not what is to be remembered
            self._present = ContrastiveRows(F.normalize(rows.features.detach().float(), dim=-1), *rows[1:])
        return rows, self._earlier

    def on_substep_end(self, args, state, control, **kwargs):
        """A batch is over, and the step goes on: the present clips become earlier ones."""
        self._remember()

    def on_step_end(self, args, state, control, **kwargs):
        """The weights have changed: keep the newest `num_earlier` clips."""
        self._remember()
        if self._earlier is not None:
            kept = ContrastiveRows(*(None if own is None else own[-self.num_earlier :] for own in self._earlier))
            self._earlier = kept if self.num_earlier else None

    def _remember(self) -> None:
        if self._present is not None:
            self._earlier = self._present if self._earlier is None else _joined(self._earlier, self._present)
        self._present = None


def _joined(first: ContrastiveRows, second: ContrastiveRows) -> ContrastiveRows:
    columns: list[Any] = [
        None if a is None or b is None else torch.cat([a, b]) for a, b in zip(first, second, strict=True)
    ]
    return ContrastiveRows(*columns)


def gather_rows(rows: ContrastiveRows) -> ContrastiveRows:
    """
    The clips of all processes in the order of their ranks; every process must call it, one of them with a clip.

    The gradient of a process's own features is divided by the share of the clips that they are. The trainer multiplies
    the loss of a process by this share and sums the gradients of all: so a loss over the gathered clips, which each
    process computes as a whole, has the gradient that it has on one process.
    """
    sizes = _gather(torch.tensor([len(rows.labels)], device=rows.labels.device))
    lengths = [int(size) for size in sizes]
    columns: list[Any] = [None if column is None else torch.cat(_gather(column, lengths)) for column in rows[1:]]
    return ContrastiveRows(_GatherRows.apply(rows.features, lengths), *columns)


def _gather(rows: Tensor, lengths: list[int] | None = None) -> list[Tensor]:
    """The rows [n, ...] of each process, `lengths` of them (None: as many as here)."""
    lengths = [len(rows)] * dist.get_world_size() if lengths is None else lengths
    padded = torch.zeros(max(lengths), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded)
    return [part[:length] for part, length in zip(gathered, lengths, strict=True)]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, lengths: list[int]) -> Tensor:
        ctx.start, ctx.size, ctx.total = sum(lengths[: dist.get_rank()]), len(features), sum(lengths)
        return torch.cat(_gather(features, lengths))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.start : ctx.start + ctx.size] * (ctx.total / max(ctx.size, 1)), None
