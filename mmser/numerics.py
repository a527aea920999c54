# SPDX-License-Identifier: Apache-2.0
"""A number that is not finite (NaN, infinite) in training: in which part of the model, at which step, of which clips.

`Watch` is what a trainer asks; the functions above it look for the part.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters_mmser import broken_weights
from mmser.batches import ROW_IDS
from mmser.examples import EmotionDataset

FEW = 5  # clips or weights that a message names
MOST_SKIPPED = 24  # steps in a row: a scale of 65,536 is halved to 0.004, and no gradient overflows for it any more


def is_finite(values: Tensor) -> bool:
    return not values.is_floating_point() or bool(values.detach().isfinite().all())


def first_broken_part(model: nn.Module, run: Callable[[], Any]) -> str:
    """
    The first module of a model, in the order in which they compute, whose output is not finite; "" if there is none.

    Args:
        run: computes the model's outputs once more.
    """
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [output] if isinstance(output, Tensor) else list(_tensors(output))
            if not found and not all(map(is_finite, tensors)):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            run()
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else ""


def _tensors(output: Any) -> Iterable[Tensor]:
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return (value for value in values if isinstance(value, Tensor))


def broken_gradients(model: nn.Module) -> list[str]:
    """The names of the weights whose gradient is not finite."""
    own = ((name, weight.grad) for name, weight in model.named_parameters())
    return [name for name, gradient in own if gradient is not None and not is_finite(gradient)]


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - FEW:,} more" if len(names) > FEW else ""
    return f"{', '.join(names[:FEW])}{more}"


class Watch:
    """
    What is known of a step of training when a number is not finite.

    Args:
        dataset: that is trained on; None or a stream, whose clips are not told.
    Attributes:
        batches: of the step.
        checkpoint: finds the last whole checkpoint, None if there is none.
    """

    def __init__(self, dataset: Any, checkpoint: Callable[[], str | None]):
        self.dataset = dataset
        self.checkpoint = checkpoint
        self.batches: Sequence[Mapping[str, Any]] = ()
        self.skipped = 0

    def begin(self) -> None:
        """Let each example say from here on which row it is of."""
        if isinstance(self.dataset, EmotionDataset):
            self.dataset.number_rows(True)

    def end(self) -> None:
        self.batches = ()
        if isinstance(self.dataset, EmotionDataset):
            self.dataset.number_rows(False)

    def clips(self, batches: Iterable[Mapping[str, Any]], which: Tensor | None = None) -> str:
        """In words: the clips of some batches; of one batch perhaps only those that `which` ([B] bool) marks."""
        rows: list[int] = []
        for batch in batches:
            ids = batch[ROW_IDS].cpu() if ROW_IDS in batch else torch.zeros(0, dtype=torch.long)
            rows += (ids if which is None or len(ids) != len(which) else ids[which.cpu()]).tolist()
        return listed([self._named(row) for row in rows])

    def _named(self, row: int) -> str:
        entry = self.dataset.dataset[row]
        audio = entry.get("audio")
        path = audio.get("path") if isinstance(audio, dict) else audio
        return f"{entry['row']} ({path})" if path else str(entry["row"])

    def loss(
        self, said: str, step: int, model: nn.Module, inputs: Mapping[str, Any], logits: Any, run: Callable[[], Any]
    ) -> FloatingPointError:
        """
        The error of a loss that is not finite.

        Args:
            said: which parts of it.
            step: of the optimiser, from 1.
            model: as it is in training, not wrapped.
            inputs: of the batch.
            logits ([B, C]): what came out, if that is known.
            run: computes the loss of the batch once more.
        """
        which = None
        if isinstance(logits, Tensor) and not is_finite(logits):
            which = ~logits.detach().isfinite().all(dim=-1)
        bad_inputs = [name for name, value in inputs.items() if isinstance(value, Tensor) and not is_finite(value)]
        if bad_inputs:
            cause = f"the {' and '.join(bad_inputs)} of the batch are not finite"
        elif weights := broken_weights(model):
            cause = f"weights of the model are not finite: {listed(weights)}"
        elif part := first_broken_part(model, run):
            cause = f"the first part of the model whose output is not finite is {part}"
        else:
            cause = "all outputs of the model are finite, the loss of them is not"
        return self._error(f"{said} At step {step}, {cause}.", self.clips([inputs], which))

    def gradient(self, norm: float, step: int, model: nn.Module, has_scaler: bool) -> FloatingPointError | None:
        """
        The error of a gradient that is not finite; None if it is finite, or if the step is skipped, as fp16 does until
        the loss is scaled so that nothing overflows.

        Args:
            norm: of the gradient of all weights, before it is clipped.
            step: of the optimiser, from 1.
            model: not wrapped, with its gradients.
            has_scaler: whether the loss is scaled (fp16).
        """
        if torch.tensor(norm).isfinite():
            self.skipped = 0
            return None
        self.skipped += 1
        if has_scaler and self.skipped <= MOST_SKIPPED:
            return None
        names = broken_gradients(model)
        repeated = f" for {self.skipped} steps in a row, however the loss was scaled" if has_scaler else ""
        said = (
            f"The gradient is not finite{repeated}. At step {step}, it is so of {len(names)} weights: "
            f"{listed(names)}. Look for bad rows in the data, a learning rate that is too high, or fp16 where bf16 is "
            "needed."
        )
        return self._error(said, self.clips(self.batches))

    def weights(self, step: int, names: Sequence[str]) -> FloatingPointError:
        """The error of weights that are not finite and must not be saved."""
        said = (
            f"After step {step}, weights of the model are not finite: {listed(names)}. They are not saved. Lower the "
            "learning rate (--lr), or take bf16 in the place of fp16."
        )
        return self._error(said, self.clips(self.batches))

    def _error(self, said: str, clips: str) -> FloatingPointError:
        last = self.checkpoint()
        kept = f"The last good checkpoint is {Path(last)}." if last else "There is no checkpoint of this run yet."
        return FloatingPointError(" ".join(filter(None, [said, f"Clips: {clips}." if clips else "", kept])))
