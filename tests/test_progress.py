# SPDX-License-Identifier: Apache-2.0
"""Tests of `mmser.progress`: what is seen of a training, on a terminal and in a log file, and its curves."""

import io
import logging as python_logging
import re
import sys
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState
from transformers.utils import logging

from mmser import console, progress
from mmser.progress import (
    TrainingBar,
    TrainingLines,
    describe_evaluation,
    describe_losses,
    draw_curves,
    duration,
    stage,
)

DRAWS = True  # see the fixture `pictures`


def test_losses_and_evaluations_in_words():
    parts = {"loss_cross_entropy": 0.92, "loss_anchor": 0.39}
    assert describe_losses({"loss": 1.3123, **parts}) == "loss 1.31 (cross entropy 0.92, anchor 0.39)"
    assert describe_losses({"loss": 0.5, "loss_cross_entropy": 0.5}) == "loss 0.5"
    logs = {"loss": 1.5, "loss_small": 0.001, "loss_large": 1.2, "loss_some": 0.3}
    whole = "loss 1.5 (small 0.001, large 1.2, some 0.3)"
    for width, words in ((len(whole), whole), (len(whole) - 1, "loss 1.5 (large 1.2, some 0.3, …)")):
        assert describe_losses(logs, width) == words
    assert describe_losses(logs, 25) == "loss 1.5 (large 1.2, …)" and describe_losses(logs, 9) == "loss 1.5"
    scores = {"eval_weighted_f1": 0.7123, "eval_loss": 0.9, "eval_runtime": 3.0}
    assert describe_evaluation(scores) == "validation: weighted F1 0.712, loss 0.900"
    assert describe_evaluation({"train_runtime": 9.0}) == ""


@pytest.mark.parametrize(
    "seconds, words", [(0, "0 s"), (45.2, "45 s"), (89.6, "90 s"), (720, "12 min"), (11_100, "3 h 05 min")]
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


@pytest.fixture
def state():
    return TrainerState(max_steps=4, epoch=0.5, is_world_process_zero=True)


def run(callback, state):
    """Two steps of training with a report, an evaluation of three batches, and two steps more."""
    call = {"args": None, "state": state, "control": TrainerControl()}
    callback.on_train_begin(**call)
    for step in range(1, 5):
        state.global_step = step
        callback.on_step_end(**call)
        if step == 2:
            callback.on_log(**call, logs={"loss": 1.5, "loss_a": 1.0, "loss_b": 0.5, "grad_norm": 3.0})
            for _ in range(3):
                callback.on_prediction_step(**call, eval_dataloader=[0, 1, 2])
            callback.on_log(**call, logs={"eval_loss": 0.5, "eval_weighted_f1": 0.75, "eval_runtime": 1.0})
            callback.on_evaluate(**call)
    callback.on_log(**call, logs={"train_runtime": 5.0})
    callback.on_train_end(**call)


def test_one_bar_with_the_parts_of_the_loss(state, monkeypatch):
    screen = io.StringIO()
    bar = progress.tqdm
    monkeypatch.setattr(progress, "tqdm", lambda **options: bar(file=screen, mininterval=0, miniters=1, **options))
    write = classmethod(lambda cls, text, **options: screen.write(f"\n{text}\n"))
    monkeypatch.setattr("tqdm.std.tqdm.write", write)
    logging.enable_progress_bar()
    run(TrainingBar(), state)
    shown = screen.getvalue()
    assert "Training     100%" in shown and "4/4" in shown
    assert "evaluating 3/3, loss 1.5 (a 1, b 0.5)" in shown
    assert "\nEpoch 0.5, validation: weighted F1 0.750, loss 0.500\n" in shown
    assert "Predicting" not in shown and "{" not in shown and "grad_norm" not in shown


def test_a_run_that_goes_on_starts_its_bar_there(state, monkeypatch):
    bars = []
    monkeypatch.setattr(progress, "tqdm", lambda **options: bars.append(options) or SimpleNamespace())
    state.global_step = 3
    TrainingBar().on_train_begin(None, state, TrainerControl())
    assert bars[0]["initial"] == 3 and bars[0]["total"] == 4


def test_predictions_outside_training_have_a_bar(state, monkeypatch):
    bars = []
    monkeypatch.setattr(progress, "tqdm", lambda **options: bars.append(options) or SimpleNamespace(update=int))
    TrainingBar().on_prediction_step(None, state, TrainerControl(), eval_dataloader=[0, 1])
    assert bars == [{"total": 2, "desc": "Predicting", "leave": False, "dynamic_ncols": True, "disable": False}]


class Loader(list):
    """Batches of a data set of `clips` clips."""

    def __init__(self, batches, clips):
        super().__init__(range(batches))
        self.dataset = range(clips)


def predict(callback, state, batches, clips):
    call = {"args": None, "state": state, "control": TrainerControl()}
    for _ in range(batches):
        callback.on_prediction_step(**call, eval_dataloader=Loader(batches, clips))
    callback.on_predict(**call, metrics={})


def trainer_with(callback):
    handler = SimpleNamespace(callbacks=[callback])
    return SimpleNamespace(callback_handler=handler, is_world_process_zero=lambda: True)


def test_a_stage_of_several_predictions_has_one_bar(state, monkeypatch):
    screen, bar = io.StringIO(), progress.tqdm
    monkeypatch.setattr(progress, "tqdm", lambda **options: bar(file=screen, mininterval=0, miniters=1, **options))
    monkeypatch.setattr(logging, "_tqdm_active", False)  # as while a model is exported: other bars are off
    shown = TrainingBar()
    with stage(trainer_with(shown), "Evaluating", 20):
        predict(shown, state, 2, 7)
        assert "7/20" in screen.getvalue() and "100%" not in screen.getvalue()
        predict(shown, state, 3, 13)
        assert "\n" in screen.getvalue(), "what is logged after the last clip is not to share its line with the bar"
    seen = screen.getvalue()
    assert seen.count("\n") == 1 and "Evaluating   100%" in seen and "20/20" in seen and "Predicting" not in seen
    predict(shown, state, 1, 5)
    assert "Predicting" in screen.getvalue(), "outside a stage a prediction has a bar of its own"


def test_a_stage_that_ends_early_ends_its_bar(state, monkeypatch):
    screen, bar = io.StringIO(), progress.tqdm
    monkeypatch.setattr(progress, "tqdm", lambda **options: bar(file=screen, mininterval=0, miniters=1, **options))
    logging.enable_progress_bar()
    shown = TrainingBar()
    with pytest.raises(ValueError, match="stop"), stage(trainer_with(shown), "Evaluating", 20):
        predict(shown, state, 2, 7)
        raise ValueError("stop")
    assert screen.getvalue().endswith("\n") and "100%" not in screen.getvalue()


def test_a_stage_is_a_line_in_a_log_file(state, capsys):
    with stage(trainer_with(TrainingLines()), "Evaluating", 20):
        pass
    assert capsys.readouterr().out == "Evaluating: 20 clips\n"


def test_a_stage_of_nobody_knows_how_many_clips(state, capsys, monkeypatch):
    """Of a stream: each prediction has its own bar, if any."""
    bars = []
    bar = SimpleNamespace(update=int, close=int)
    monkeypatch.setattr(progress, "tqdm", lambda **options: bars.append(options["desc"]) or bar)
    for shown in (TrainingBar(), TrainingLines()):
        with stage(trainer_with(shown), "Evaluating", None):
            if isinstance(shown, TrainingBar):
                predict(shown, state, 2, 7)
    assert bars == ["Predicting"] and capsys.readouterr().out == ""
    with stage(SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[])), "Evaluating", 3):
        pass  # a Trainer of the user's own


@pytest.mark.parametrize(
    "disabled, is_terminal, kind", [(False, True, "Bar"), (True, True, "Lines"), (False, False, "Lines")]
)
def test_a_bar_moves_where_somebody_sees_it(disabled, is_terminal, kind, monkeypatch):
    added = []
    trainer = SimpleNamespace(
        remove_callback=lambda kind: None, add_callback=added.append, args=SimpleNamespace(disable_tqdm=disabled)
    )
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    progress.calm(trainer)
    assert [type(callback).__name__ for callback in added] == [f"Training{kind}"]


def test_a_message_leaves_a_moving_bar_whole(capsys):
    """It takes the line of the bar, which moves on below; news are plain, a warning says what it is and whose."""
    handler = console.BesideBars()
    for name, level, message in (
        ("mmser.x", python_logging.INFO, "Labels: a, b"),
        ("mmser.x", python_logging.INFO, "Labels: a, b"),
        ("openmax_mmser", python_logging.WARNING, "too few"),
        ("torch.x", python_logging.WARNING, "no GPU"),
    ):
        handler.handle(python_logging.LogRecord(name, level, "x.py", 1, message, (), None))
    bar = logging.tqdm(total=2, desc="Training", file=sys.stderr, mininterval=0)
    handler.handle(python_logging.LogRecord("mmser.x", python_logging.INFO, "x.py", 1, "in between", (), None))
    bar.close()
    shown = capsys.readouterr().err
    assert shown.startswith("Labels: a, b\nwarning: too few\nwarning (torch.x): no GPU\n")
    assert "\rin between\n" in shown


def test_lines_for_a_log_file(state, capsys):
    run(TrainingLines(), state)
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Step 2 of 4, epoch 0.5, \d+ s left: loss 1.5 \(a 1, b 0.5\)", first)
    assert second == "Step 2 of 4, epoch 0.5, validation: weighted F1 0.750, loss 0.500"


def test_curves_are_drawn_where_there_is_something_to_draw(tmp_path, monkeypatch, caplog):
    pytest.importorskip("matplotlib")
    line = {"epoch": 1.0, "loss": 1.0, "loss_a": 0.5}
    draw_curves([line], tmp_path)
    assert not list(tmp_path.iterdir())
    draw_curves([line, {"epoch": 1.0, "eval_loss": 0.5, "eval_weighted_f1": 0.7}, {**line, "epoch": 2.0}], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [progress.CURVES_NAME]
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    draw_curves([line, line], tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
