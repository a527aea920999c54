# SPDX-License-Identifier: Apache-2.0
"""Tests of `mmser.progress`: what is seen of a training, on a terminal and in a log file, and its curves."""

import io
import re
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState
from transformers.utils import logging

from mmser import progress
from mmser.progress import TrainingBar, TrainingLines, describe_evaluation, describe_losses, draw_curves, duration


def test_losses_and_evaluations_in_words():
    parts = {"loss_cross_entropy": 0.92, "loss_anchor": 0.39}
    assert describe_losses({"loss": 1.3123, **parts}) == "loss 1.31 (cross entropy 0.92, anchor 0.39)"
    assert describe_losses({"loss": 0.5, "loss_cross_entropy": 0.5}) == "loss 0.5"
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
    bar = logging.tqdm
    monkeypatch.setattr(progress.logging, "tqdm", lambda **options: bar(file=screen, mininterval=0, **options))
    write = classmethod(lambda cls, text, **options: screen.write(f"\n{text}\n"))
    monkeypatch.setattr("tqdm.std.tqdm.write", write)
    logging.enable_progress_bar()
    run(TrainingBar(), state)
    shown = screen.getvalue()
    assert "Training: 100%" in shown and "4/4" in shown
    assert "loss 1.5 (a 1, b 0.5), evaluating 3/3" in shown
    assert "\nEpoch 0.5, validation: weighted F1 0.750, loss 0.500\n" in shown
    assert "Predicting" not in shown and "{" not in shown and "grad_norm" not in shown


def test_a_run_that_goes_on_starts_its_bar_there(state, monkeypatch):
    bars = []
    monkeypatch.setattr(progress.logging, "tqdm", lambda **options: bars.append(options) or SimpleNamespace())
    state.global_step = 3
    TrainingBar().on_train_begin(None, state, TrainerControl())
    assert bars[0]["initial"] == 3 and bars[0]["total"] == 4


def test_predictions_outside_training_have_a_bar(state, monkeypatch):
    bars = []
    monkeypatch.setattr(
        progress.logging, "tqdm", lambda **options: bars.append(options) or SimpleNamespace(update=int)
    )
    TrainingBar().on_prediction_step(None, state, TrainerControl(), eval_dataloader=[0, 1])
    assert bars == [{"total": 2, "desc": "Predicting", "leave": False, "dynamic_ncols": True, "disable": False}]


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
