# SPDX-License-Identifier: Apache-2.0
"""What is seen while a model works: one bar a stage on a terminal, one line a report in a log file.

The callbacks stand in for those of the Trainer, which print dictionaries and a bar for each evaluation. `calm` puts
them in, `stage` joins the predictions of a stage.
"""

import contextlib
import importlib.util
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
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
LAYOUT = "{desc:<12} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
BESIDE_LOSSES = len("Training     100%|          | / [<, ]")  # letters, without the steps and the times
EVALUATED = {"weighted_f1": "weighted F1", MEAN_OVER_CORPORA: "mean of corpora", "loss": "loss"}


def describe_losses(logs: Mapping[str, Any], width: int = 1000) -> str:
    """
    "loss 1.31 (cross entropy 0.92, anchor 0.39)", of what a Trainer logs; no parts if there is only one. Of more than
    fit into so many letters, the largest.
    """
    parts = {name.removeprefix(PART): float(value) for name, value in logs.items() if name.startswith(PART)}
    words = [f"{name.replace('_', ' ')} {value:.3g}" for name, value in parts.items()]
    order = sorted(range(len(words)), key=lambda index: -list(parts.values())[index])  # stable where it is the same
    loss = f"loss {float(logs['loss']):.3g}"
    for number in range(len(words), 0, -1) if len(words) > 1 else ():
        shown = [words[index] for index in sorted(order[:number])] + ["…"] * (number < len(words))
        if len(described := f"{loss} ({', '.join(shown)})") <= width:
            return described
    return loss


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
    """
    One bar: steps, time left and the parts of the loss. Evaluations are told in it, and leave one line of words. So do
    all predictions of a stage share one.
    """

    def __init__(self):
        super().__init__()
        self._losses = ""
        self._evaluated = 0  # batches of the prediction that has not ended
        self._stage: Any = None  # its bar
        self._done = 0  # clips of the stage, of the predictions that have ended
        self._clips = 0  # of the one that has not

    def begin_stage(self, title: str, clips: int) -> None:
        """Show one bar until so many clips are predicted."""
        self._stage = tqdm(total=clips, desc=title, unit="clip", dynamic_ncols=True, bar_format=LAYOUT)
        self._done = self._clips = 0

    def end_stage(self, is_done: bool = True) -> None:
        """End its bar, if it has not ended by itself. What is done needed no more than it has seen."""
        if self._stage is not None:
            if is_done:
                self._stage.total = self._stage.n
                self._stage.refresh()
            self._stage.close()
            self._stage = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="Training",
                unit="step",
                dynamic_ncols=True,
                bar_format=LAYOUT,
            )
        self.current_step = state.global_step  # more than 0 in a run that goes on

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not state.is_world_process_zero or not has_length(eval_dataloader):
            return
        if self._stage is not None:
            self._evaluated += 1
            self._clips = len(eval_dataloader.dataset)
            clips = self._done + round(self._evaluated / len(eval_dataloader) * self._clips)
            self._stage.update(clips - self._stage.n)
            return
        if self.prediction_bar is None:  # a silent one during training: it counts the batches alone
            inside = self.training_bar is not None
            self.prediction_bar = tqdm(
                total=len(eval_dataloader), desc="Predicting", leave=False, dynamic_ncols=True, disable=inside
            )
            self._evaluated = 0
        self.prediction_bar.update(1)
        self._evaluated += 1
        if self.training_bar is not None:
            self._tell(f"evaluating {self._evaluated}/{len(eval_dataloader)}")

    def on_predict(self, args, state, control, **kwargs):
        super().on_predict(args, state, control, **kwargs)
        self._evaluated = 0
        self._done += self._clips
        if self._stage is not None and self._done >= self._stage.total:
            self.end_stage()  # before anything is said of the results

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or logs is None:
            return
        if "loss" in logs:
            self._losses = describe_losses(logs, self._room(state))
            self._tell()
        if evaluation := describe_evaluation(logs):
            self.training_bar.write(f"Epoch {state.epoch:.3g}, {evaluation}")
            self._tell()

    def _room(self, state) -> int:
        """Letters of the line that are left for the losses."""
        bar: Any = self.training_bar
        whole = bar.format_dict["elapsed"] * state.max_steps / max(1, state.global_step)  # no time shown is longer
        taken = BESIDE_LOSSES + 2 * len(str(state.max_steps)) + 2 * len(bar.format_interval(whole))
        return shutil.get_terminal_size().columns - taken

    def _tell(self, more: str = "") -> None:
        bar: Any = self.training_bar
        bar.set_postfix_str(", ".join(part for part in (more, self._losses) if part))


class TrainingLines(TrainerCallback):
    """A line for each report, with the time left, where nobody looks at a terminal (also `--disable_tqdm`)."""

    def begin_stage(self, title: str, clips: int) -> None:
        """A line of it too."""
        print(f"{title}: {clips} clips", flush=True)

    def end_stage(self, is_done: bool = True) -> None:
        """There is nothing to say."""

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
    """Replace what a Trainer shows of its progress by the callback that fits its arguments, and who may be looking."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    is_watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    trainer.add_callback(TrainingBar() if is_watched and not trainer.args.disable_tqdm else TrainingLines())


@contextlib.contextmanager
def stage(trainer, title: str, clips: int | None) -> Iterator[None]:
    """
    Show all predictions inside, of so many clips together, as one: in a bar or in a line. Of None, a number that
    nobody knows, each prediction shows itself.
    """
    shown = [each for each in trainer.callback_handler.callbacks if isinstance(each, TrainingBar | TrainingLines)]
    if clips is None or not shown:
        yield
        return
    if trainer.is_world_process_zero():
        shown[0].begin_stage(title, clips)
    is_done = False
    try:
        yield
        is_done = True
    finally:
        shown[0].end_stage(is_done)


def draw_curves(history: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """`plot_training_curves` of a Trainer's `log_history`, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        logger.info(f"{CURVES_NAME} is not drawn: it needs matplotlib, `pip install .[report]`.")
    else:
        plot_training_curves(history, folder / CURVES_NAME)
