# SPDX-License-Identifier: Apache-2.0
"""A parser of flags that answers at once: `--help` and a wrong flag must not wait for torch to be imported."""

import argparse
import ast
import copy
import dataclasses
import difflib
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any

from transformers.hf_argparser import HfArgumentParser, string_to_bool

EPILOG = "A mistake ends in one sentence and exit code 2, with --debug in a traceback."
POSITIONAL = "positional"  # in the metadata of a field: its values stand on the command line without a flag
# The least and the most that a number can be, where another one can only be a mistake, which would cost hours, the
# disk or the memory. Some are told where they belong
LIMITS: dict[str, tuple[float | None, float | None]] = {
    "augmented_copies": (0, 1_000),  # each is decoded, encoded and kept on the disk
    "batch_size": (1, 100_000),
    "bootstrap_samples": (1, 1_000_000),
    "contrastive_memory": (None, 1_000_000),
    "data_seed": (0, 2**32 - 1),
    "dataloader_num_workers": (0, 1_024),
    "gradient_accumulation_steps": (1, 100_000),
    "hp_search": (None, 10_000),
    "lora_rank": (None, 4_096),  # no layer is as wide
    "mask_feature_length": (1, 100_000),
    "mask_time_length": (1, 100_000),
    "max_eval_samples": (1, None),
    "max_steps": (None, 100_000_000),
    "max_train_samples": (1, None),
    "num_train_epochs": (None, 100_000),
    "per_device_eval_batch_size": (1, 100_000),
    "per_device_train_batch_size": (1, 100_000),
    "recovery_epochs": (None, 100_000),
    "seed": (0, 2**32 - 1),
    "standardize_clips": (0, None),
    "tta": (None, 1_000),
    "vocabulary_size": (1, None),
}
KINDS = {int: "a whole number", float: "a number", string_to_bool: "true or false", str: "a text"}


class FlagParser(HfArgumentParser):
    """
    A parser of dataclasses whose `--no_...` flags have a help text of their own, and which knows the nearest flag.

    `--help` shows the essential flags, and `--help_all` all of them, in a group for each dataclass that has a
    `_argument_group_name`.

    Args:
        kinds: the dataclasses whose fields are the flags. A field with `POSITIONAL` in its metadata has no flag.
        description: what `--help` says of the command; its lines stay as they are.
        negative_help: help texts of `--no_...` flags, by the name of the field.
        optional_values: names of the fields whose flag may stand without a value. It then gives an empty list.
        essentials: the flags that `--help` shows, without their dashes, by the title of their group. All by default.
        usage: what follows the name of the command.
    """

    def __init__(
        self,
        kinds: Iterable[Any],
        description: str | None = None,
        negative_help: dict[str, str] | None = None,
        optional_values: Iterable[str] = (),
        essentials: Mapping[str, Sequence[str]] | None = None,
        usage: str = "[recipe.json] [flags]",
    ):
        self._essentials = essentials or {}
        self._shows_all = not essentials
        self._is_intermixing = False
        kinds = list(kinds)
        self._texts = set().union(*map(_texts_of, kinds))
        super().__init__(
            kinds,
            prog=Path(sys.argv[0]).name,
            usage=f"%(prog)s {usage}",  # the list of all flags in front of their list is of no help
            description=description,
            epilog=EPILOG,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,  # a misspelt flag is no abbreviation
            add_help=False,
        )
        self.add_argument("-h", "--help", action="help", help="Show the flags that most runs need.")
        self.add_argument("--help_all", action=_HelpAll, help="Show all flags.")
        for action in self._actions:
            if action.const is False:
                action.help = (negative_help or {}).get(action.dest, f"Switch --{action.dest} off.")
                action.default = argparse.SUPPRESS  # the default of both flags is that of the field
            if action.dest in optional_values:
                action.nargs = "*"

    @staticmethod
    def _parse_dataclass_field(parser: Any, field: Any) -> None:
        if POSITIONAL in field.metadata:
            parser.add_argument(field.name, nargs="*", default=[], help=field.metadata["help"])
        else:
            HfArgumentParser._parse_dataclass_field(parser, field)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As always; flags may also stand between values that have none."""
        if self._is_intermixing or not self._get_positional_actions():
            return super().parse_known_args(args, namespace)
        self._is_intermixing = True  # the method below calls this one
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_intermixing = False

    def format_help(self) -> str:
        if self._shows_all:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        positional = self._get_positional_actions()
        for title, names in {"": [], **self._essentials}.items():
            formatter.start_section(title or None)
            formatter.add_arguments([_spelt(self._option_string_actions[f"--{name}"], name) for name in names])
            formatter.add_arguments([] if title else positional)
            formatter.end_section()
        formatter.add_text(f"--help_all shows all {self._count_flags()} flags.\n{self.epilog}")
        return formatter.format_help()

    def _count_flags(self) -> int:
        return len({action.dest for action in self._get_optional_actions()} - {"help", "help_all"})

    def error(self, message: str) -> Any:
        """Without the list of all flags, in which argparse drowns what is wrong."""
        self.exit(2, f"{self.prog}: error: {message}. --help_all shows all flags.\n")

    def check(self, words: Sequence[str]) -> None:
        """
        Raise ValueError, with the nearest flag, if a word is no flag and no value of one, and for a number beyond its
        `LIMITS`. Answers `--help`.
        """
        given, unknown = self.parse_known_args(list(words))
        if unknown:
            flag = unknown[0].split("=")[0]
            kind = "flag" if flag.startswith("-") else "argument"
            raise ValueError(f"Unknown {kind} {flag}: {_hint(flag, self._option_string_actions)}")
        for name, limits in LIMITS.items():
            value = getattr(given, name, None)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, (int, float)):
                    check_limits(self._spelling(name, words), number, *limits)

    def _spelling(self, name: str, words: Sequence[str]) -> str:
        """A flag as it was written on the command line, or its first spelling."""
        written = {word.split("=")[0] for word in words}
        options = [option for option in self._option_string_actions if option.startswith("--")]
        own = [option for option in options if self._option_string_actions[option].dest == name]
        return next((option for option in own if option in written), f"--{name}")

    def destinations(self) -> dict[str, str]:
        """The names that a recipe may use, each with the name of its field."""
        return {
            option.removeprefix("--"): action.dest
            for action in self._actions
            for option in action.option_strings
            if action.const is not False  # --no_augment and its like: in a recipe it is "augment": false
        }

    def set_recipe(self, recipe: dict[str, Any], name: str) -> None:
        """
        Take the values of a recipe as defaults.

        Raises:
            ValueError: a key is no flag, or a value of another kind than that of its flag.
        """
        destination = self.destinations()
        unknown = sorted(set(recipe) - set(destination))
        if unknown:
            raise ValueError(f"{name} has the unknown key {unknown[0]}: {_hint(unknown[0], destination)}")
        given = {destination[key]: value for key, value in recipe.items()}
        for key, value in recipe.items():
            _check_depth(value, f"{name}: {key}")
            self._check_kind(f"{name}: {key}", value, destination[key])
        self.set_defaults(**given)
        for action in self._actions:
            action.required = action.required and action.dest not in given

    def _check_kind(self, where: str, value: Any, destination: str) -> None:
        """Raise ValueError for a value of a recipe that its flag could not have."""
        action = next(one for one in self._actions if one.dest == destination and one.const is not False)
        kind: Any = action.type
        is_free = kind not in KINDS or (kind is str and destination not in self._texts)
        if is_free or (value is None and action.default in (None, argparse.SUPPRESS)):
            return
        several = action.nargs in ("+", "*") and isinstance(value, list)
        if several and all(_fits(one, kind) for one in value):
            return
        if not several and (isinstance(value, str) or _fits(value, kind)):  # a text is read as on the command line
            return
        what = f"{KINDS[kind]}, or a list of such" if action.nargs in ("+", "*") else KINDS[kind]
        raise ValueError(f"{where} must be {what}, got {json.dumps(value):.80}.")


def check_limits(flag: str, number: float, least: float | None, most: float | None) -> None:
    """Raise ValueError for a number that is none, or beyond a limit; None for no limit."""
    if least is not None and not number >= least:
        raise ValueError(f"{flag} must be at least {least:,}, got {number:,}.")
    if most is not None and not number <= most:
        raise ValueError(f"{flag} must be at most {most:,}, got {number:,}.")


def _texts_of(kind: type) -> set[str]:
    """The fields of ours that hold a text or texts, and no object of JSON; Transformers checks its own."""
    own = [base.__annotations__ for base in kind.__mro__ if base.__module__.startswith("mmser")]
    hints = {name: str(hint) for annotations in own for name, hint in annotations.items()}
    return {name for name, hint in hints.items() if "str" in hint and "dict" not in hint}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of the kind that `argparse` makes of a word by `kind`."""
    if kind is string_to_bool or isinstance(value, bool):
        return kind is string_to_bool and isinstance(value, bool)
    if kind is str:
        return isinstance(value, str)
    is_number = isinstance(value, (int, float))
    return is_number and (kind is float or isinstance(value, int) or value.is_integer())


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]}?" if near else "--help_all shows all flags."


class _HelpAll(argparse.Action):
    """`--help_all`."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):
        super().__init__(option_strings, dest=dest, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: Any, *_: Any) -> None:
        parser._shows_all = True
        parser.print_help()
        parser.exit()


def _spelt(action: argparse.Action, name: str) -> argparse.Action:
    """The flag with this one of its spellings."""
    action = copy.copy(action)
    action.option_strings = [f"--{name}"]
    return action


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """
    Defaults are shown where they say something, and the examples in the description keep their lines. Each flag is
    there in one way to write dashes, with a short name of its value: `--output_dir DIR`.
    """

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        spellings = [option for option in action.option_strings if "-" not in option[2:]]
        return f"{', '.join(spellings)} {self._value_name(action)}".rstrip()

    def _value_name(self, action: argparse.Action) -> str:
        if action.nargs in (0, "?"):  # a switch, which need not be given "true"
            return ""
        if action.choices is not None:
            return f"{{{','.join(map(str, action.choices))}}}"
        if action.type is string_to_bool:
            return "{true,false}"
        name = str(action.metavar or action.dest.rsplit("_", 1)[-1].upper())
        return f"{name} ..." if action.nargs in ("+", "*") else name

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default: Any = action.default
        is_nothing = default is None or default is False or default == []
        if is_nothing or default is argparse.SUPPRESS or "default:" in (action.help or "").lower():
            return action.help
        if default is True:
            return f"{action.help} (default: on)"
        return super()._get_help_string(action)


def split_debug(words: Sequence[str]) -> tuple[list[str], bool]:
    """The words without a bare `--debug` (with a value it is a flag of the Trainer), and whether there was one."""
    bare = [
        number
        for number, word in enumerate(words)
        if word == "--debug" and (number + 1 == len(words) or words[number + 1].startswith("--"))
    ]
    return [word for number, word in enumerate(words) if number not in bare], bool(bare)


def parse_json(text: str, name: str) -> dict[str, Any]:
    """The object that a JSON text holds; the ValueError says what `name` is wrong about."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error}. Names and texts need double quotes.") from error
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply.") from error
    if not isinstance(value, dict):
        raise ValueError(f'{name} must be a JSON object, as in {{"name": 1}}, got {text.strip()[:80]}.')
    _check_depth(value, name)
    return value


def _check_depth(value: Any, name: str) -> None:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if any(isinstance(one, dict | list) and one for one in inner):
        from configuration_mmser import check_depth  # here: it imports torch, for which few recipes need to wait

        check_depth(value, name)


def with_trainer_flags(own: type) -> type:
    """
    `own` with the fields that `transformers.TrainingArguments` has besides, for a parser that only shows and checks.

    They are read from the source of Transformers: importing it would import torch, which takes longer than all else
    that `--help` does. Types other than numbers, texts and booleans become texts.
    """
    specification = importlib.util.find_spec("transformers.training_args")
    tree = ast.parse(Path(str(specification.origin)).read_text(encoding="utf-8"))  # type: ignore[union-attr]
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    known = {field.name for field in dataclasses.fields(own)}
    fields = []
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id not in known:
            fields.append((node.target.id, _annotated_type(node.annotation), _declared_field(node.value)))
    return make_dataclass(own.__name__, fields, bases=(own,))


def _annotated_type(annotation: ast.expr) -> Any:
    """What `HfArgumentParser` makes of a type: of a union the first type, or the one beside a text."""
    names = ast.unparse(annotation).split(" | ")
    kinds = [name for name in names if name != "None"]
    if len(names) == 2 and len(kinds) == 2 and "str" in kinds:
        kinds.remove("str")
    if kinds[0].startswith("list["):
        return list[str]
    kind = {"bool": bool, "int": int, "float": float}.get(kinds[0], str)
    return kind | None if "None" in names else kind


def _declared_field(value: ast.expr | None) -> Any:
    """The `field(default=..., metadata={...})` of the source, without what is computed there."""
    given = {keyword.arg: keyword.value for keyword in value.keywords} if isinstance(value, ast.Call) else {}
    metadata = given.get("metadata")
    pairs = zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ()
    notes = {_literal(key): _literal(note) for key, note in pairs if key is not None}
    return field(
        default=_literal(given["default"]) if "default" in given else None,
        metadata={key: note for key, note in notes.items() if note is not argparse.SUPPRESS},
    )


def _literal(value: ast.expr) -> Any:
    """The value of an expression; SUPPRESS, which the help does not show, for one that is no literal."""
    try:
        return ast.literal_eval(value)
    except ValueError:
        return argparse.SUPPRESS
