# SPDX-License-Identifier: Apache-2.0
"""The command `mmser`: its subcommands, each imported when it is called."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import mmser
from mmser.console import run_command
from mmser.flags import split_debug

# name: (module with a `main`, what it does)
COMMANDS = {
    "predict": ("predict_hf", "classify a clip, a folder of clips, or a long recording over time"),
    "explain": ("mmser.explain_command", "show which seconds and words of a clip moved the answer"),
    "train": ("train_hf", "fine-tune a model on your recordings"),
    "eval": ("eval_hf", "judge a checkpoint on labelled clips, and calibrate it"),
    "export": ("export_hf", "make a checkpoint portable (ONNX) or small (int8, fewer languages)"),
    "app": ("mmser.app_command", "classify recordings on a page in the browser"),
    "push": ("mmser.push_command", "push a checkpoint to the Hub, as a complete page"),
    "serve": ("mmser.serve_command", "answer requests over HTTP: POST a recording, get JSON"),
    "corpus": ("mmser.corpus_command", "make training data of a known corpus, such as RAVDESS or MELD"),
}
HELP = f"""usage: mmser COMMAND [flags]

Recognise emotions in speech: neutral, happy, sad, angry, or your own labels.

{chr(10).join(f"  {name:<9} {job}" for name, (_, job) in COMMANDS.items())}

  mmser predict clip.wav
  mmser predict recordings --output answers.csv
  mmser train --data_dir my_data --output_dir runs/mine

`mmser COMMAND --help` shows the flags of a command; also: `mmser --version`.
A mistake ends in one sentence and exit code 2, with --debug in a traceback.
"""


def main(arguments: Sequence[str] | None = None) -> Any:
    """
    Run the subcommand that the first word names. Returns what its `main` returns.

    Raises:
        ValueError: there is no such command.
    """
    words, _ = split_debug(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if words else 2
    if words[0] == "--version":
        print(f"mmser {mmser.__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        raise ValueError(f"Unknown command {name}: {_hint(name)}")
    module, _ = COMMANDS[name]
    before = sys.argv[0]
    sys.argv[0] = f"mmser {name}"  # what the help calls the program
    try:
        return importlib.import_module(module).main(rest)
    finally:
        sys.argv[0] = before


def _hint(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, 1)
    if near:
        return f"did you mean mmser {near[0]}?"
    if os.path.exists(name):
        return f"did you mean mmser predict {name}?"
    return f"there are {', '.join(COMMANDS)}."


def command() -> None:
    """`mmser`."""
    run_command(main)
