# SPDX-License-Identifier: Apache-2.0
"""Tests of mmser.flags and mmser.console: flags that are wrong, help, and how a command ends when it cannot work."""

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError

from mmser import console
from mmser.app_arguments import APP_ARGUMENTS
from mmser.arguments import (
    EVALUATION_ARGUMENTS,
    EXPORT_ARGUMENTS,
    TRAINING_ARGUMENTS,
    DataArguments,
    ModelArguments,
    command_parser,
    parse_arguments,
    read_recipe,
)
from mmser.flags import LIMITS, FlagParser, split_debug
from mmser.prediction_arguments import PREDICTION_ARGUMENTS
from mmser.training_arguments import MMSERTrainingArguments

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "train_hf": TRAINING_ARGUMENTS,
    "eval_hf": EVALUATION_ARGUMENTS,
    "export_hf": EXPORT_ARGUMENTS,
    "predict_hf": PREDICTION_ARGUMENTS,
    "app": APP_ARGUMENTS,
}
WITHOUT_TORCH = """
import importlib, json, sys
for command, words in json.loads(sys.argv[1]):
    try:
        importlib.import_module(command).main(words)
    except (SystemExit, ValueError) as error:
        print(getattr(error, "code", error))
    print("heavy:", sorted({"torch", "datasets", "scipy"} & set(sys.modules)), end="\\f")
"""
AS_PROGRAMS = """
import json, runpy, sys
for program, words in json.loads(sys.argv[1]):
    sys.argv = [program, *words]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as error:
        print("code", error.code, end="\\f", file=sys.stderr)
"""
NO_MEMORY = "The device has not enough memory: lower --batch_size or --max_seconds."
NO_SPACE = "Free some, and give the same command again."
FROM_A_WORKER = """Caught ValueError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "x.py", line 1, in f
    raise ValueError("clip.wav: empty")
ValueError: clip.wav: empty
"""


# --- flags -----------------------------------------------------------------------------------------------------------


def test_the_quick_parser_has_the_flags_of_the_real_one():
    """Those of the Trainer are read from its source: each with its name, its number of values and its help."""
    quick = command_parser(TRAINING_ARGUMENTS)._option_string_actions
    real = FlagParser([ModelArguments, DataArguments, MMSERTrainingArguments])._option_string_actions
    assert quick.keys() == real.keys() and len(quick) > 200
    for flag, action in quick.items():
        assert (action.dest, action.nargs, action.const) == (real[flag].dest, real[flag].nargs, real[flag].const), flag
        if action.const is not False:
            assert action.help == real[flag].help, flag
    defaults = {flag for flag in quick if quick[flag].default != real[flag].default}
    assert defaults <= {"--optim", "--include_for_metrics", "--include-for-metrics"}  # computed in the source


def test_help_and_wrong_flags_do_not_wait_for_torch():
    """One process asks all commands, one after the other: what one of them imports stays."""
    asked, said = [], []
    for command in COMMANDS:
        needs = command in ("eval_hf", "export_hf")
        required = ["--checkpoint", "x", "--output_dir", "y"] if needs else []
        for words, answer in ((["--help"], "usage: "), (["--pleas"], "Unknown flag --pleas")):
            asked.append([command, [*required, *words]])
            said.append(answer)
    words = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(asked)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    answers = done.stdout.split("\f")[:-1] if done.returncode == 0 else []
    assert len(answers) == len(asked), done.stderr
    for (command, _), answer, expected in zip(asked, answers, said, strict=True):
        assert expected in answer and answer.endswith("heavy: []"), f"{command}: {answer}"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--learning_rat", "Unknown flag --learning_rat: did you mean --learning_rate?"),
        ("--chekpoint=x", "Unknown flag --chekpoint: did you mean --checkpoint?"),
        ("--xyzzy", "Unknown flag --xyzzy: --help_all shows all flags."),
        ("data", "Unknown argument data: "),
    ],
)
def test_the_nearest_flag_is_named(wrong, said):
    kinds, required = (TRAINING_ARGUMENTS, []) if "rat" in wrong else (EVALUATION_ARGUMENTS, ["--checkpoint", "x"])
    with pytest.raises(ValueError) as raised:
        parse_arguments(kinds, [wrong, *required])
    assert str(raised.value).startswith(said)


# Of these any number is right, or what it has to fit to is known later
NOT_LIMITED = {
    *("audio_num_hidden_layers", "text_num_hidden_layers", "opset", "save_total_limit", "calibration_clips"),
    *("part_size", "top_k", "port", "freeze_audio_layers"),
}


def test_each_whole_number_has_its_limits():
    kinds = (*TRAINING_ARGUMENTS, *EVALUATION_ARGUMENTS, *EXPORT_ARGUMENTS, *PREDICTION_ARGUMENTS, *APP_ARGUMENTS)
    own = [field for kind in kinds for field in dataclasses.fields(kind)]
    whole = {field.name for field in own if str(field.type).split(" |")[0] in ("int", "<class 'int'>")}
    assert whole - NOT_LIMITED <= LIMITS.keys() and whole >= NOT_LIMITED


@pytest.mark.parametrize(
    ("kinds", "words", "said"),
    [
        (TRAINING_ARGUMENTS, "--augmented_copies 1000000000", "--augmented_copies must be at most 1,000, got 1,000,0"),
        (
            TRAINING_ARGUMENTS,
            "--dataloader_num_workers=1000000",
            "--dataloader_num_workers must be at most 1,024, got",
        ),
        (TRAINING_ARGUMENTS, "--batch_size 1000000000", "--batch_size must be at most 100,000, got 1,000,000,000."),
        (
            TRAINING_ARGUMENTS,
            "--per_device_train_batch_size 0",
            "--per_device_train_batch_size must be at least 1, got",
        ),
        (TRAINING_ARGUMENTS, "--epochs 1e9", "--epochs must be at most 100,000, got 1,000,000,000."),
        (TRAINING_ARGUMENTS, "--epochs nan", "--epochs must be at most 100,000, got nan."),
        (TRAINING_ARGUMENTS, "--max_steps 1000000000", "--max_steps must be at most 100,000,000, got"),
        (TRAINING_ARGUMENTS, "--max_train_samples -1", "--max_train_samples must be at least 1, got -1."),
        (TRAINING_ARGUMENTS, "--gradient_accumulation_steps 1000000", "--gradient_accumulation_steps must be at most"),
        (TRAINING_ARGUMENTS, "--lora_rank 1000000", "--lora_rank must be at most 4,096, got 1,000,000."),
        (TRAINING_ARGUMENTS, "--seed -1", "--seed must be at least 0, got -1."),
        (EVALUATION_ARGUMENTS, "--tta 2 1000000", "--tta must be at most 1,000, got 1,000,000."),
        (EVALUATION_ARGUMENTS, "--bootstrap_samples 1000000000", "--bootstrap_samples must be at most 1,000,000, got"),
        (EXPORT_ARGUMENTS, "--recovery_epochs 1e9", "--recovery_epochs must be at most 100,000, got"),
        (PREDICTION_ARGUMENTS, "a.wav --batch_size 1000000000", "--batch_size must be at most 100,000, got"),
    ],
)
def test_a_number_that_no_machine_can_do_is_named_before_any_work(kinds, words, said, tmp_path):
    needed = {TRAINING_ARGUMENTS: "--data_dir x", EVALUATION_ARGUMENTS: "--checkpoint x --data_dir x"}
    needed[EXPORT_ARGUMENTS] = "--checkpoint x --output_dir y"
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_arguments(kinds, [*needed.get(kinds, "").split(), *words.split()])


def test_a_number_in_a_recipe_has_the_same_limits(tmp_path):
    (tmp_path / "recipe.json").write_text('{"data_dir": "x", "epochs": 1e9}')
    with pytest.raises(ValueError, match="--num_train_epochs must be at most 100,000, got 1,000,000,000"):
        parse_arguments(TRAINING_ARGUMENTS, [str(tmp_path / "recipe.json")])


def test_the_clips_of_a_training_are_named_to_an_evaluation():
    """`mmser train` ends with the command that judges the model, to be copied."""
    given = (
        "--manifest calls/a b.csv|--audio_column|Datei|--text_column|none|--allow_speaker_overlap|--max_seconds|9.5"
    )
    words = [
        *given.replace("--manifest ", "--manifest|").split("|"),
        "--ood_dir",
        "x",
        "--epochs",
        "3",
        "--output_dir",
        "y",
    ]
    _, data, _ = parse_arguments(TRAINING_ARGUMENTS, words)
    _, source = parse_arguments(EVALUATION_ARGUMENTS, ["--checkpoint", "y", *data.flags])
    assert source.flags == data.flags[:-2] and data.flags[-2:] == ["--ood_dir", "x"]
    assert (source.manifest, source.audio_column, source.max_seconds) == ("calls/a b.csv", "Datei", 9.5)
    assert source.allow_speaker_overlap and source.columns == data.columns
    several = ["--data_dir", "a", "b", "--label_column", "x", "y", "--max_eval_samples", "5"]
    _, data, _ = parse_arguments(TRAINING_ARGUMENTS, [*several, "--output_dir", "y"])
    assert data.flags == several[:-2]


def test_a_wrong_value_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(TRAINING_ARGUMENTS, ["--lr", "fast"])
    shown = capsys.readouterr().err
    assert ended.value.code == 2
    assert shown.count("\n") == 1 and "error: argument" in shown and "invalid float value: 'fast'" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_the_essentials_and_help_all_everything(command, monkeypatch, capsys):
    """Two screens of 30 lines and 80 columns, but for the examples."""
    monkeypatch.setenv("COLUMNS", "80")
    parser = command_parser(COMMANDS[command], "What it does.")
    flags = {flag for flag in parser._option_string_actions if "-" not in flag[2:] and flag != "-h"}
    short = parser.format_help()
    assert short.count("\n") <= 60 and max(map(len, short.splitlines())) <= 80
    shown = set(re.findall(r"^  (--\w+)", short, re.MULTILINE))
    assert shown < flags and "--help_all shows all " in short
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help_all"])
    assert ended.value.code == 0
    every = capsys.readouterr().out
    assert set(re.findall(r"(?<![\w-])--\w+", every)) >= flags
    assert "(default: None)" not in every and not re.search(r"--\w+-\w", every.split("options:")[-1])
    number = int(re.search(r"shows all (\d+) flags", short)[1])
    assert number == len({parser._option_string_actions[flag].dest for flag in flags} - {"help", "help_all"})


def test_defaults_are_told_where_they_say_something():
    text = command_parser(TRAINING_ARGUMENTS).format_help()
    assert "--batch_size SIZE" in text and "(default: 16)" in text and "--use_amp  " in text
    parser = command_parser(EXPORT_ARGUMENTS)
    parser._shows_all = True
    text = " ".join(parser.format_help().split())
    assert "of each encoder to remove. Needs data. (default: 0.0)" in text and "if they differ. (default: on)" in text
    assert "{float32,float16,int8}" in text


def test_a_number_that_a_command_returns_is_its_exit_code(monkeypatch, capsys):
    assert end_of(lambda: 1, monkeypatch, capsys) == (1, "")
    for result in (0, None, {"loss": 1}):
        console.run_command(lambda result=result: result)


def test_every_no_flag_says_what_it_does():
    for kinds in COMMANDS.values():
        actions = command_parser(kinds)._option_string_actions
        for flag in (flag for flag in actions if flag.startswith("--no_") and actions[flag].const is False):
            positive = actions[f"--{flag.removeprefix('--no_')}"]
            assert actions[flag].help and actions[flag].help != positive.help, flag
    assert "without comparing" in command_parser(EXPORT_ARGUMENTS)._option_string_actions["--no_check"].help


def test_the_flags_of_the_design():
    """`--tta` and `--calibrate` may stand alone."""
    options, _ = parse_arguments(
        EVALUATION_ARGUMENTS, ["--checkpoint", "x", "--tta", "--calibrate", "--data_dir", "d"]
    )
    assert options.tta == [5] and options.calibrate is True
    options, _ = parse_arguments(EVALUATION_ARGUMENTS, ["--checkpoint", "x", "--calibrate", "--tta", "1", "3"])
    assert options.tta == [1, 3] and options.calibrate is True
    assert parse_arguments(EVALUATION_ARGUMENTS, ["--checkpoint", "x"])[0].tta is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config_overrides", "{a: 1}"], r"--config_overrides is not JSON: .* double quotes"),
        (["--lr_multipliers", "{a}", "--use_cpu"], r"--lr_multipliers is not JSON"),
        (["--config_overrides", "[1]"], r"--config_overrides must be a JSON object"),
    ],
)
def test_what_is_no_json_is_named(words, said):
    with pytest.raises(ValueError, match=said):
        parse_arguments(TRAINING_ARGUMENTS, words)


def test_a_recipe_in_another_encoding_is_named(tmp_path):
    (tmp_path / "recipe.json").write_bytes('{"data_dir": "Gespräche"}'.encode("cp1252"))
    with pytest.raises(ValueError, match=r"recipe\.json is not UTF-8 text: save it as UTF-8"):
        read_recipe(str(tmp_path / "recipe.json"))


def test_a_recipe_that_is_none_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"The recipe .*gone.json does not exist"):
        parse_arguments(TRAINING_ARGUMENTS, [str(tmp_path / "gone.json")])
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"The recipe .*list.json must be a JSON object"):
        parse_arguments(TRAINING_ARGUMENTS, [str(tmp_path / "list.json")])


@pytest.mark.parametrize(
    ("kinds", "recipe", "said"),
    [
        (TRAINING_ARGUMENTS, {"lora_rank": {"a": 1}}, r"lora_rank must be a whole number, got {\"a\": 1}\."),
        (TRAINING_ARGUMENTS, {"lora_rank": 2.5}, r"lora_rank must be a whole number, got 2\.5\."),
        (TRAINING_ARGUMENTS, {"lr": [1]}, r"lr must be a number, got \[1\]\."),
        (TRAINING_ARGUMENTS, {"augment": 1}, "augment must be true or false, got 1"),
        (TRAINING_ARGUMENTS, {"augmentations": None}, "augmentations must be a text, or a list of such, got null"),
        (TRAINING_ARGUMENTS, {"data_dir": [1]}, r"data_dir must be a text, or a list of such, got \[1\]"),
        (EVALUATION_ARGUMENTS, {"tta": ["x"]}, r"tta must be a whole number, or a list of such, got \[\"x\"\]"),
        (EXPORT_ARGUMENTS, {"prune": None}, "prune must be a number, got null"),
        (EXPORT_ARGUMENTS, {"output_dir": 5}, "output_dir must be a text, got 5"),
    ],
)
def test_a_value_of_another_kind_in_a_recipe_is_named(kinds, recipe, said, tmp_path):
    """As a word on the command line would be; it was an error of Python's, such as "'<' not supported"."""
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=rf"recipe\.json: {said}"):
        parse_arguments(kinds, [str(tmp_path / "recipe.json")])


def test_values_of_the_right_kinds_in_a_recipe_are_taken(tmp_path):
    recipe = {"data_dir": "x", "label_column": ["a", "b"], "lora_rank": None, "max_steps": 1e3, "epochs": "3"}
    recipe |= {"config_overrides": {"fusion_dropout": 0.2}, "lr_scheduler_kwargs": {"num_cycles": 1}, "use_cpu": True}
    (tmp_path / "recipe.json").write_text(json.dumps({**recipe, "lr_scheduler_type": "cosine"}))
    model, data, training = parse_arguments(TRAINING_ARGUMENTS, [str(tmp_path / "recipe.json")])
    assert (model.config_overrides, data.data_dir) == ({"fusion_dropout": 0.2}, "x")
    assert (data.label_column, training.max_steps, training.num_train_epochs) == (["a", "b"], 1000, 3.0)
    assert training.lr_scheduler_kwargs == {"num_cycles": 1}


def test_debug_alone_is_ours_and_with_a_value_the_trainers():
    assert split_debug(["--a", "--debug"]) == (["--a"], True)
    assert split_debug(["--debug", "--a", "1"]) == (["--a", "1"], True)
    assert split_debug(["--debug", "underflow_overflow"]) == (["--debug", "underflow_overflow"], False)
    *_, training = parse_arguments(TRAINING_ARGUMENTS, ["--debug", "--use_cpu"])
    assert training.debug == []
    *_, training = parse_arguments(TRAINING_ARGUMENTS, ["--debug", "underflow_overflow", "--use_cpu"])
    assert [option.value for option in training.debug] == ["underflow_overflow"]


# --- how a command ends ----------------------------------------------------------------------------------------------


def end_of(main, monkeypatch, capsys, *words):
    """Exit code and stderr of `main` as a program."""
    monkeypatch.setattr(sys, "argv", ["command.py", *words])
    with pytest.raises(SystemExit) as ended:
        console.run_command(main)
    return ended.value.code, capsys.readouterr().err


def failing(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("row 3: no label"), "row 3: no label"),
        (FileNotFoundError(2, "No such file or directory", "gone.csv"), "gone.csv: No such file or directory"),
        (
            OSError(errno.ENOSPC, "No space left", "read.py", None, "runs/a.py"),
            f"runs/a.py: No space left. {NO_SPACE}",
        ),
        (
            OSError(errno.EFBIG, "File too large", "runs/a.py"),
            "runs/a.py: File too large. The disk, or `ulimit -f`, takes no file of that size: give another folder.",
        ),
        (OSError("no checkpoint"), "no checkpoint"),
        (ImportError("Pictures need matplotlib"), "Pictures need matplotlib"),
        (HFValidationError("Repo id must be"), "Repo id must be"),
        (SafetensorError("header too large"), "header too large"),
        (torch.OutOfMemoryError("CUDA\nmore"), f"{NO_MEMORY} CUDA"),
        (ValueError(FROM_A_WORKER), "clip.wav: empty"),
    ],
)
def test_a_mistake_is_a_sentence(error, said, monkeypatch, capsys):
    assert end_of(failing(error), monkeypatch, capsys) == (2, f"error: {said}\n")
    with pytest.raises(type(error)):
        monkeypatch.setattr(sys, "argv", ["command.py", "--debug"])
        console.run_command(failing(error))


def test_of_a_library_the_first_line_is_enough(monkeypatch, capsys):
    library = {"__name__": "transformers.hub"}
    exec("def fail():\n    raise OSError('No weights.\\nPlease read the manual at length.')", library)
    assert end_of(library["fail"], monkeypatch, capsys) == (2, "error: No weights.\n")
    said = "Can't load the tokenizer for 'x'. If you were trying to load it from 'https://huggingface.co/models', make"
    assert console.first_sentence(said) == "Can't load the tokenizer for 'x'."
    assert console.first_sentence("Bad field 'a':\n    expected int\nmore") == "Bad field 'a': expected int"
    own = {"__name__": "mmser.loading"}
    exec("def fail():\n    raise ValueError('2 bad rows:\\n  row 3: no label')", own)
    assert end_of(own["fail"], monkeypatch, capsys) == (2, "error: 2 bad rows:\n  row 3: no label\n")


def test_a_chain_of_errors_is_one_sentence(monkeypatch, capsys):
    def main():
        try:
            soundfile.read(__file__)
        except soundfile.LibsndfileError as error:
            raise ValueError("clip.wav: cannot be read as audio") from error

    assert end_of(main, monkeypatch, capsys) == (2, "error: clip.wav: cannot be read as audio\n")


@pytest.mark.parametrize(
    "fault",
    [
        lambda: dict([(1, 2, 3)]),  # type: ignore[arg-type]
        lambda: len(3),  # type: ignore[arg-type]
        lambda: {1: 2}[3],
        lambda: int("one"),
        lambda: torch.zeros(2) @ torch.zeros(3),
        lambda: list(zip([1], [], strict=True)),
    ],
)
def test_a_fault_of_the_program_keeps_its_traceback(fault, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command.py"])
    with pytest.raises((TypeError, KeyError, ValueError, RuntimeError)):
        console.run_command(fault)


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    assert end_of(failing(KeyboardInterrupt()), monkeypatch, capsys) == (130, "error: interrupted\n")


def test_other_processes_let_the_first_speak(monkeypatch, capsys):
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(console.time, "sleep", waited.append)
    assert end_of(failing(ValueError("no data")), monkeypatch, capsys) == (2, "error: no data\n")
    monkeypatch.setenv("RANK", "0")
    end_of(failing(ValueError("no data")), monkeypatch, capsys)
    assert waited == [console.RANK_DELAY]


def test_the_programs_end_with_a_sentence(tmp_path):
    """
    As a user calls them; `main` called from Python raises, as all other tests of the commands see. One process runs
    all, one after the other: it imports torch once.
    """
    asked = []
    for command in COMMANDS:
        flags = ["--checkpoint", str(tmp_path / "gone")] if command != "train_hf" else ["--use_cpu"]
        if command != "app":
            flags += ["--output_dir", str(tmp_path / "out")] if command != "predict_hf" else ["clip.wav"]
        if command in ("train_hf", "eval_hf"):
            flags += ["--data_dir", str(tmp_path)]
        asked.append([str(ROOT / f"{command}.py"), flags])
    done = subprocess.run(
        [sys.executable, "-c", AS_PROGRAMS, json.dumps(asked)], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip
    answers = done.stderr.split("\f")[:-1]
    assert len(answers) == len(asked) and "Traceback" not in done.stderr, done.stderr
    for command, answer in zip(COMMANDS, answers, strict=True):
        *_, sentence, code = answer.splitlines()
        assert sentence.startswith("error: ") and str(tmp_path) in sentence and code == "code 2", (
            f"{command}: {answer}"
        )
