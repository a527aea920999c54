# SPDX-License-Identifier: Apache-2.0
"""Tasks beside the emotion, such as sentiment or arousal: one small head each on the features, and their losses.

A clip may lack the target of any of them. It is then `NO_CLASS` or not a number, and does not count. Shape letters: B
clips, F features, K classes of one task.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

try:
    from .configuration_mmser import REGRESSION, MMSERConfig, check_names
    from .encoders_mmser import loaded
except ImportError:
    if __package__:  # beside a checkpoint a failed import is a real error, not a reason to take an installed copy
        raise
    from configuration_mmser import REGRESSION, MMSERConfig, check_names
    from encoders_mmser import loaded

NO_CLASS = -100  # the target of a clip without one, in a task of classes; in one of numbers it is nan
NO_MOMENTS = (0.0, 1.0)  # the target as it is


def classification_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """
    Cross-entropy, mean over the clips that have a target; 0 without any.

    Args:
        logits: [B, K].
        targets: int64 [B], class ids or `NO_CLASS`.
    """
    total = F.cross_entropy(logits.float(), targets, ignore_index=NO_CLASS, reduction="sum")
    return total / (targets != NO_CLASS).sum().clamp(min=1)


def regression_loss(values: Tensor, targets: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """
    Squared error in units of `scale`, mean over the clips that have a target; 0 without any.

    Args:
        values: [B].
        targets: float [B], nan where there is none.
        scale: greater than 0, such as the deviation of the training targets: a task then weighs the same in any unit.
    """
    is_known = ~targets.isnan()
    error = torch.where(is_known, (values.float() - targets.float()) / scale, 0.0)
    return error.square().sum() / is_known.sum().clamp(min=1)


class AuxiliaryHead(nn.Module):
    """The answer to one task: logits of its classes, or a number."""

    target_moments: Tensor

    def __init__(self, config: MMSERConfig, kind: list[str] | str):
        super().__init__()
        self.num_classes = None if kind == REGRESSION else len(kind)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.hidden = nn.Linear(config.feature_size, config.auxiliary_hidden_size)
        self.output = nn.Linear(config.auxiliary_hidden_size, self.num_classes or 1)
        if self.num_classes is None:  # mean and deviation of the targets of training: the answer is in their unit
            self.register_buffer("target_moments", torch.tensor(NO_MOMENTS, dtype=torch.float32))

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, F] -> logits [B, K], or float32 values [B]."""
        output = self.output(F.relu(self.hidden(self.dropout(features))))
        if self.num_classes is not None:
            return output
        moments = self.target_moments
        return moments[0] + moments[1] * output[:, 0].float()

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """The loss of `output` of `forward` against the targets [B]."""
        if self.num_classes is not None:
            return classification_loss(output, targets)
        with loaded(self):
            scale = self.target_moments[1].to(output.device)
        return regression_loss(output, targets, scale)


class AuxiliaryHeads(nn.Module):
    """The heads of `config.auxiliary_tasks`. Without any it has no parameters, and nothing is computed."""

    def __init__(self, config: MMSERConfig):
        super().__init__()
        self.tasks = list(config.auxiliary_tasks)
        for task, kind in config.auxiliary_tasks.items():
            self.add_module(f"{task}_head", AuxiliaryHead(config, kind))  # a bare name may be one of nn.Module's own

    def head(self, task: str) -> AuxiliaryHead:
        return self.get_submodule(f"{task}_head")  # type: ignore[return-value]

    def forward(self, features: Tensor) -> ModelOutput | None:
        """Features [B, F] -> the output of each head by task: a dict that stock pipelines can take apart."""
        if not self.tasks:
            return None
        return ModelOutput({task: self.head(task)(features).to(features.device) for task in self.tasks})

    def losses(
        self,
        outputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        mixture: tuple[float, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """
        The loss of each task that has targets, by `auxiliary_<task>`.

        Args:
            outputs: of `forward`.
            targets: by task: class ids [B] or `NO_CLASS`, numbers [B] or nan. A task that is missing has no loss.
            mixture: the share of each clip in the clip that the outputs are of, and which clip [B] has the rest: the
                losses against the targets of both, in their shares.
        Raises:
            TypeError: a name that is no task.
            ValueError: targets of another shape or type, or a class that the task does not have.
        """
        check_names(targets, self.tasks, "task of `auxiliary_tasks`")
        checked = {task: self._checked(task, values, outputs[task]) for task, values in targets.items()}
        losses = {task: self.head(task).loss(outputs[task], values) for task, values in checked.items()}
        if mixture is not None:
            share, order = mixture
            for task, values in checked.items():
                other = self.head(task).loss(outputs[task], values[order.to(values.device)])
                losses[task] = share * losses[task] + (1 - share) * other
        return {f"auxiliary_{task}": loss for task, loss in losses.items()}

    def _checked(self, task: str, targets: Any, output: Tensor) -> Tensor:
        num_classes = self.head(task).num_classes
        is_tensor = isinstance(targets, Tensor) and targets.dtype != torch.bool
        if not is_tensor or targets.shape != output.shape[:1] or (num_classes and targets.is_floating_point()):
            got = f"{targets.dtype} of shape {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets)
            content = "numbers" if num_classes is None else "class ids"
            raise ValueError(
                f"The targets of {task!r} must be a tensor of {content} of shape ({len(output)},), got {got}."
            )
        # As for `labels`: on another device the loss itself fails on a bad class
        if num_classes and targets.device.type == "cpu" and not torch.compiler.is_compiling():
            is_bad = (targets != NO_CLASS) & ((targets < 0) | (targets >= num_classes))
            if is_bad.any():
                raise ValueError(
                    f"The targets of {task!r} must be in [0, {num_classes - 1}], or {NO_CLASS} where there is none, "
                    f"got {targets[is_bad][0].item()}."
                )
        return targets.to(output.device, torch.int64 if num_classes else torch.float32)

    @torch.no_grad()
    def fit_targets(self, targets: Mapping[str, Any]) -> None:
        """
        Take mean and deviation of the training targets of each task of numbers, so that its head has nothing to learn
        of their unit. A task that has them already, from an earlier training, keeps them.

        Args:
            targets: by task, the numbers of all training clips, nan where there is none.
        """
        for task in self.tasks:
            head = self.head(task)
            if head.num_classes is not None or task not in targets or head.target_moments.tolist() != list(NO_MOMENTS):
                continue
            values = torch.as_tensor(targets[task], dtype=torch.float64)
            values = values[~values.isnan()]
            if len(values):
                deviation = values.std(unbiased=False).item()
                head.target_moments.copy_(torch.tensor([values.mean().item(), deviation or 1.0]))


__all__ = ["AuxiliaryHead", "AuxiliaryHeads", "classification_loss", "regression_loss"]
