# SPDX-License-Identifier: Apache-2.0
"""Tests of mmser.search and of what --report_to asks for."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_corpus import tiny_flags

import train_hf
from mmser.arguments import TRAINING_ARGUMENTS, parse_arguments
from mmser.search import given_flags, search

RATE = 1e-3


def arguments_of(folder, trials, **more):
    own = {"learning_rate": RATE, "per_device_train_batch_size": 4, "seed": 3, "world_size": 1}
    own["overwrite_output_dir"] = False
    return SimpleNamespace(output_dir=str(folder), hp_search=trials, **{**own, **more})


class Trainings:
    """Stand in for trainings: the nearer the learning rate is to 3e-3 and the dropout to 0.2, the better."""

    def __init__(self, fails=lambda number: False):
        self.recipes, self.fails = [], fails

    def __call__(self, words):
        recipe = json.loads(Path(words[0]).read_text(encoding="utf-8"))
        self.recipes.append(recipe)
        if self.fails(len(self.recipes)):
            raise ValueError("The loss is not finite")
        print("tables of the run")
        dropout = recipe.get("config_overrides", {}).get("fusion_dropout", 0.9)
        score = 1 / (1 + abs(recipe["learning_rate"] - 3e-3) / 3e-3 + abs(dropout - 0.2))
        return {"validation": {"model": {"weighted_f1": score}}}


def test_a_command_is_a_recipe(tmp_path):
    (tmp_path / "r.json").write_text(
        '{"lr": 0.01, "epochs": 3, "config_overrides": {"feature_size": 8}, "augment": false}'
    )
    words = [
        str(tmp_path / "r.json"),
        "--epochs",
        "5",
        "--labels",
        "a",
        "b",
        "--freeze_audio",
        "--lr_multipliers",
        '{"audio_encoder": 1}',
    ]
    assert given_flags(words) == {
        "learning_rate": 0.01, "num_train_epochs": 5.0, "config_overrides": {"feature_size": 8}, "augment": False,
        "labels": ["a", "b"], "freeze_audio": True, "lr_multipliers": {"audio_encoder": 1},
    }  # fmt: skip


def test_the_best_settings_are_found_and_told(tmp_path, capsys):
    pytest.importorskip("optuna")
    train, words = Trainings(), ["--epochs", "5", "--config_overrides", '{"feature_size": 8}', "--hp_search", "12"]
    found = search(words, arguments_of(tmp_path, 12), train)
    shown = capsys.readouterr().out
    assert len(train.recipes) == found["trials"] == 12 and "tables of the run" not in shown
    first, scores = train.recipes[0], [RATE / 5 <= one["learning_rate"] <= RATE * 5 for one in train.recipes]
    assert first["learning_rate"] == pytest.approx(RATE) and "weight_decay" not in first and all(scores)
    assert first["per_device_train_batch_size"] == 4 and first["config_overrides"] == {"feature_size": 8}
    assert {one["num_train_epochs"] for one in train.recipes} == {5.0} and not any(
        "hp_search" in r for r in train.recipes
    )
    assert len({one["output_dir"] for one in train.recipes}) == 12
    recipe = json.loads((tmp_path / "best_recipe.json").read_text())
    best = next(one for one in train.recipes if one["learning_rate"] == recipe["learning_rate"])
    assert recipe == {**best, "output_dir": str(tmp_path / "best")}
    assert f"Best of 12 trials: weighted F1 {found['weighted_f1']:.3f}" in shown and "Trial 12 of 12" in shown
    assert (
        f"mmser train {tmp_path / 'best_recipe.json'}" in shown and "with the settings of the command it was" in shown
    )
    kept = [path.name for path in tmp_path.glob("trial-*") if path.is_dir()]
    assert (
        kept == [best["output_dir"].rpartition("/")[2]]
        and (tmp_path / "trial-0.txt").read_text() == "tables of the run\n"
    )
    parse_arguments(TRAINING_ARGUMENTS, [str(tmp_path / "best_recipe.json"), "--data_dir", str(tmp_path)])


def test_a_search_goes_on_where_it_was_stopped(tmp_path, capsys):
    pytest.importorskip("optuna")

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search([], arguments_of(tmp_path, 3), stop)
    train = Trainings()
    assert search([], arguments_of(tmp_path, 3), train)["trials"] == 3 == len(train.recipes)
    assert train.recipes[0]["learning_rate"] == pytest.approx(RATE)
    assert "with the settings of the command it was" in capsys.readouterr().out
    assert search([], arguments_of(tmp_path, 5), train)["trials"] == 5 == len(train.recipes)
    search([], arguments_of(tmp_path, 5), lambda _: pytest.fail("all is done"))
    with pytest.raises(ValueError, match="holds a search with other flags"):
        search(["--epochs", "3"], arguments_of(tmp_path, 5), train)
    again = search(["--epochs", "3"], arguments_of(tmp_path, 1, overwrite_output_dir=True), train)
    assert again["trials"] == 1


def test_a_trial_that_fails_is_left_out(tmp_path, capsys):
    pytest.importorskip("optuna")
    found = search([], arguments_of(tmp_path, 4), Trainings(lambda number: number == 2))
    assert (
        found["trials"] == 4
        and "A trial failed after 0 s: The loss is not finite; learning_rate" in capsys.readouterr().out
    )
    with pytest.raises(ValueError, match="not finite"):
        search([], arguments_of(tmp_path / "other", 4), Trainings(lambda number: True))


def test_a_checkpoint_keeps_its_dropout(tmp_path):
    pytest.importorskip("optuna")
    train = Trainings()
    search(["--model_name_or_path", "runs/x"], arguments_of(tmp_path, 6), train)
    assert not any("config_overrides" in one for one in train.recipes)


def test_the_command_searches(corpus, tokenizer, tmp_path, capsys):
    pytest.importorskip("optuna")
    out = tmp_path / "out"
    found = train_hf.main(tiny_flags(corpus, out, tokenizer, hp_search=1))
    assert found["trials"] == 1 and 0 <= found["weighted_f1"] <= 1
    (model,) = (path for path in out.glob("trial-*") if path.is_dir())
    assert (model / "model.safetensors").is_file() and (out / "search.db").is_file()
    assert "Summary" in (out / "trial-0.txt").read_text() and "Summary" not in capsys.readouterr().out


def test_what_is_missing_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ImportError, match=r"--hp_search needs Optuna: `pip install \"mmser\[search\]\"`"):
        train_hf.main(["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--hp_search", "2"])
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if "tensorboard" in name or name in ("wandb", "trackio") else find(name, *a),
    )
    for name in ("tensorboard", "trackio", "wandb"):
        with pytest.raises(ImportError, match=rf"--report_to {name} needs a package .*`pip install {name}`"):
            parse_arguments(
                TRAINING_ARGUMENTS, ["--data_dir", "x", "--output_dir", str(tmp_path), "--report_to", name]
            )
    with pytest.raises(ValueError, match="--hp_search is a number of trainings, without --adapt"):
        parse_arguments(TRAINING_ARGUMENTS, ["--output_dir", str(tmp_path), "--hp_search", "-1"])


def test_tensorboard_gets_the_parts_of_the_loss(corpus, tokenizer, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_hf.main(tiny_flags(corpus, tmp_path / "out", tokenizer, report_to="tensorboard", logging_steps=1))
    (written,) = {path.parent for path in (tmp_path / "out").rglob("events.out.tfevents.*")}
    told = EventAccumulator(str(written)).Reload().Tags()["scalars"]
    assert {"train/loss", "eval/weighted_f1"} <= set(told) and any(name.startswith("train/loss_") for name in told)
