# SPDX-License-Identifier: Apache-2.0
"""What is seen while a model is trained: one line that moves on a terminal, one line a report in a log file.

The callbacks stand in for those of the Trainer, which print dictionaries and a second bar for each evaluation.
"""

import importlib.util
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import has_length
from transformers.utils import logging

from mmser.groups import MEAN_OVER_CORPORA
from mmser.plots import plot_training_curves

logger = logging.get_logger(__name__)
CURVES_NAME = "training_curves.png"
PART = "loss_"  # in front of the names of the parts of the loss
EVALUATION = "eval_"
EVALUATED = {"weighted_f1": "weighted F1", MEAN_OVER_CORPORA: "mean of corpora", "loss": "loss"}


def describe_losses(logs: Mapping[str, Any]) -> str:
    """ "loss 1.31 (cross entropy 0.92, anchor 0.39)", of what a Trainer logs; no parts if there is only one."""
    parts = {name.removeprefix(PART): float(value) for name, value in logs.items() if name.startswith(PART)}
    words = [f"{name.replace('_', ' ')} {value:.3g}" for name, value in parts.items()]
    return f"loss {float(logs['loss']):.3g}" + (f" ({', '.join(words)})" if len(words) > 1 else "")


def describe_evaluation(logs: Mapping[str, Any]) -> str:
    """ "validation: weighted F1 0.712, loss 0.9", of what a Trainer logs; "" if nothing was evaluated."""
    words = [
        f"{title} {float(logs[EVALUATION + name]):.3f}"
        for name, title in EVALUATED.items()
        if EVALUATION + name in logs
    ]
    return f"validation: {', '.join(words)}" if words else ""


def duration(seconds: float) -> str:
    """ "45 s", "12 min" or "3 h 05 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class TrainingBar(ProgressCallback):
    """One bar: steps, time left and the parts of the loss. Evaluations are told in it, and leave one line of words."""

    def __init__(self):
        super().__init__()
        self._losses = ""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = logging.tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="Training",
                unit="step",
                dynamic_ncols=True,
                bar_format="{l_bar}{bar:16}{r_bar}",  # the rest of the line is for the losses
            )
        self.current_step = state.global_step  # more than 0 in a run that goes on

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not state.is_world_process_zero or not has_length(eval_dataloader):
            return
        if self.prediction_bar is None:  # a silent one during training: it counts the batches alone
            inside = self.training_bar is not None
            self.prediction_bar = logging.tqdm(
                total=len(eval_dataloader), desc="Predicting", leave=False, dynamic_ncols=True, disable=inside
            )
            self._evaluated = 0
        self.prediction_bar.update(1)
        self._evaluated += 1
        if self.training_bar is not None:
            self._tell(f"evaluating {self._evaluated}/{len(eval_dataloader)}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or logs is None:
            return
        if "loss" in logs:
            self._losses = describe_losses(logs)
            self._tell()
        if evaluation := describe_evaluation(logs):
            self.training_bar.write(f"Epoch {state.epoch:.3g}, {evaluation}")
            self._tell()

    def _tell(self, more: str = "") -> None:
        bar: Any = self.training_bar
        bar.set_postfix_str(", ".join(part for part in (self._losses, more) if part))


class TrainingLines(TrainerCallback):
    """A line for each report, with the time left, where nobody looks at a terminal (`--disable_tqdm`)."""

    def on_train_begin(self, args, state, control, **kwargs):
        self._start, self._first = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or logs is None:
            return
        where = f"Step {state.global_step} of {state.max_steps}, epoch {state.epoch or 0:.3g}"
        if "loss" in logs and state.global_step > self._first:
            seconds = (time.monotonic() - self._start) / (state.global_step - self._first)
            left = duration(seconds * (state.max_steps - state.global_step))
            print(f"{where}, {left} left: {describe_losses(logs)}", flush=True)
        elif evaluation := describe_evaluation(logs):
            print(f"{where}, {evaluation}", flush=True)


def calm(trainer) -> None:
    """Replace what a Trainer shows of its progress by the callback that fits its arguments."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TrainingLines() if trainer.args.disable_tqdm else TrainingBar())


def draw_curves(history: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """`plot_training_curves` of a Trainer's `log_history`, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        logger.info(f"{CURVES_NAME} is not drawn: it needs matplotlib, `pip install .[report]`.")
    else:
        plot_training_curves(history, folder / CURVES_NAME)
