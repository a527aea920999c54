# SPDX-License-Identifier: Apache-2.0
"""`--hp_search N`: trains N times with other settings, by the scores on the validation clips, and keeps the best.

Read in this order: `search`, `suggest` (what is tried), `given_flags` (a command as a recipe). A trial is a run of its
own with a recipe of its own. Optuna, of the extra `search`, chooses the settings and keeps them in a database, so that
the same command goes on where an earlier one was stopped.
"""

import argparse
import contextlib
import json
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mmser.arguments import TRAINING_ARGUMENTS, command_parser, read_recipe
from mmser.files import write_atomically
from mmser.flags import parse_json, split_debug
from mmser.progress import duration

STUDY = "mmser"
DATABASE = "search.db"
BEST_RECIPE = "best_recipe.json"
BEST_FOLDER = "best"
RATE_FACTOR = 5.0  # the learning rate is searched from a fifth of the given one to five times it
WEIGHT_DECAYS = (0.001, 0.01, 0.1)
BATCH_SIZES = (8, 16, 32)
DROPOUTS = (0.0, 0.1, 0.2, 0.3, 0.4)
OF_THE_SEARCH = ("hp_search", "output_dir", "overwrite_output_dir", "push_to_hub", "resume_from_checkpoint")
AS_GIVEN = "as given"


def import_optuna() -> ModuleType:
    """Optuna; the ImportError says how to get it."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError('--hp_search needs Optuna: `pip install "mmser[search]"`') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def given_flags(words: Sequence[str]) -> dict[str, Any]:
    """The flags of a training command, those of its recipe among them, as a recipe has them: name -> value."""
    words, _ = split_debug(words)
    recipe = read_recipe(words.pop(0)) if words and words[0].endswith(".json") else {}
    parser = command_parser(TRAINING_ARGUMENTS)
    destinations = parser.destinations()
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    given, _ = parser.parse_known_args(words)
    flags = {destinations.get(name, name): value for name, value in recipe.items()} | vars(given)
    for name in ("config_overrides", "lr_multipliers"):
        if isinstance(flags.get(name), str):
            flags[name] = parse_json(flags[name], f"--{name}")
    return flags


def suggest(trial: Any, flags: dict[str, Any], learning_rate: float, batch_size: int) -> dict[str, Any]:
    """
    The flags of a trial.

    Args:
        trial: of Optuna.
        flags: of the command.
        learning_rate, batch_size: that the command has; the first trial takes them.
    """
    own = {name: value for name, value in flags.items() if name not in OF_THE_SEARCH}
    lowest, highest = learning_rate / RATE_FACTOR, learning_rate * RATE_FACTOR
    own["learning_rate"] = trial.suggest_float("learning_rate", lowest, highest, log=True)
    sizes = sorted({*BATCH_SIZES, batch_size})
    own["per_device_train_batch_size"] = trial.suggest_categorical("batch_size", sizes)
    decay = trial.suggest_categorical("weight_decay", [AS_GIVEN, *WEIGHT_DECAYS])
    if decay != AS_GIVEN:
        own["weight_decay"] = decay
    if flags.get("model_name_or_path") is None:  # a checkpoint keeps its configuration
        dropout = trial.suggest_categorical("dropout", [AS_GIVEN, *DROPOUTS])
        if dropout != AS_GIVEN:
            changed = {"fusion_dropout": dropout, "classifier_dropout": dropout}
            own["config_overrides"] = {**own.get("config_overrides", {}), **changed}
    return own


def search_with_data(
    words: Sequence[str], model_arguments: Any, data_arguments: Any, arguments: Any, train: Any
) -> Any:
    """[`search`] after a look at the data: without validation clips there is nothing to choose by."""
    from mmser import training_run

    import_optuna()  # before the data are read
    seed, checkpoint = training_run.data_seed(arguments), model_arguments.model_name_or_path
    if "validation" not in training_run.load_data(data_arguments, seed, checkpoint).splits:
        raise ValueError("--hp_search chooses by validation clips, and there are none: add --validation_fraction 0.2.")
    return search(words, arguments, train)


def search(words: Sequence[str], arguments: Any, train: Callable[[list[str]], dict[str, Any]]) -> dict[str, Any]:
    """
    Train as often as `--hp_search` says, fewer times what an earlier call has done, and print how it went.

    Args:
        words: of the command line.
        arguments: `MMSERTrainingArguments` of the command.
        train: trains as the words of a command line say, and returns its results.

    Returns: `trials` (how many are done), `weighted_f1` (on the validation clips, of the best), `settings` (what was
        chosen for it) and `recipe` (the file that trains with them).

    Raises:
        ImportError: Optuna is missing.
        ValueError: the folder holds a search with other flags.
    """
    optuna = import_optuna()
    folder, flags = Path(arguments.output_dir), given_flags(words)
    if arguments.world_size > 1:
        raise ValueError("--hp_search runs in one process: leave out the launcher.")
    study = _open_study(optuna, folder, flags, arguments)
    number = len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE]))
    while number < arguments.hp_search:
        trial = study.ask()
        own = suggest(trial, flags, arguments.learning_rate, arguments.per_device_train_batch_size)
        score = _run(trial, own, folder, train, study, optuna)
        if score is None:
            number_failed = len(study.get_trials(states=[optuna.trial.TrialState.FAIL]))
            if number_failed > arguments.hp_search:
                raise ValueError(f"--hp_search: {number_failed} trials failed, the last one as said above.")
            continue
        number += 1
        best = study.best_trial
        for other in folder.glob("trial-*"):
            if other.is_dir() and other.name != f"trial-{best.number}":
                shutil.rmtree(other)
        told = f"best so far {best.value:.3f}" if best.number != trial.number else "the best so far"
        print(f"Trial {number} of {arguments.hp_search}: weighted F1 {score:.3f} ({told}); {_listed(trial.params)}")
    return _finish(study, folder, number)


def _open_study(optuna: ModuleType, folder: Path, flags: dict[str, Any], arguments: Any) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.overwrite_output_dir:
        (folder / DATABASE).unlink(missing_ok=True)
    fixed = json.dumps({name: value for name, value in flags.items() if name not in OF_THE_SEARCH}, sort_keys=True)
    storage = f"sqlite:///{(folder / DATABASE).resolve()}"
    study = optuna.create_study(storage=storage, study_name=STUDY, direction="maximize", load_if_exists=True)
    trials = study.get_trials(deepcopy=False)
    study.sampler = optuna.samplers.TPESampler(seed=arguments.seed + len(trials))
    before = study.user_attrs.get("flags", fixed)
    if before != fixed:
        raise ValueError(
            f"{folder} holds a search with other flags. Give another --output_dir, or --overwrite_output_dir to start "
            f"anew. It was begun with {before}."
        )
    study.set_user_attr("flags", fixed)
    states = optuna.trial.TrialState
    for trial in trials:  # of a call that was stopped
        if trial.state == states.RUNNING:
            study.tell(trial.number, state=states.FAIL)
    if not study.get_trials(deepcopy=False, states=[states.COMPLETE, states.WAITING]):
        first = {"learning_rate": arguments.learning_rate, "batch_size": arguments.per_device_train_batch_size}
        study.enqueue_trial({**first, "weight_decay": AS_GIVEN, "dropout": AS_GIVEN}, user_attrs={AS_GIVEN: True})
    return study


def _run(trial: Any, own: dict[str, Any], folder: Path, train: Any, study: Any, optuna: ModuleType) -> float | None:
    """The score of a trial; None, and its reason is told, for one that fails where another has not."""
    place = folder / f"trial-{trial.number}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    recipe, log = folder / f"trial-{trial.number}.json", folder / f"trial-{trial.number}.txt"
    write_atomically(recipe, json.dumps({**own, "output_dir": str(place)}, indent=2) + "\n")
    start = time.monotonic()
    try:
        with log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            results = train([str(recipe)])
        score = results["validation"]["model"]["weighted_f1"]
    except (ValueError, RuntimeError) as error:  # such as a loss that is not finite, or too little memory
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        if not study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
            raise
        print(f"A trial failed after {duration(time.monotonic() - start)}: {error}; {_listed(trial.params)}")
        return None
    study.tell(trial, score)
    return score


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.2g}" if isinstance(value, float) else f"{name} {value}" for name, value in settings.items()
    )


def _finish(study: Any, folder: Path, number: int) -> dict[str, Any]:
    """Write the recipe of the best trial, and say what it is and what to do with it."""
    best, path = study.best_trial, folder / BEST_RECIPE
    recipe = {**read_recipe(str(folder / f"trial-{best.number}.json")), "output_dir": str(folder / BEST_FOLDER)}
    write_atomically(path, json.dumps(recipe, indent=2) + "\n")
    given = [trial.value for trial in study.get_trials(deepcopy=False) if AS_GIVEN in trial.user_attrs and trial.value]
    told = f"; with the settings of the command it was {given[0]:.3f}" if given else ""
    model = folder / f"trial-{best.number}"
    lines = [
        f"Best of {number} trials: weighted F1 {best.value:.3f} on the validation clips{told}.",
        *(f"  {name:<14} {value:.3g}" if isinstance(value, float) else f"  {name:<14} {value}"
          for name, value in best.params.items()),
        "It was chosen among several on these clips, so expect less on others: the test clips chose nothing.",
        "",
        "What comes next",
        f"  use its model:      mmser predict clip.wav --checkpoint {shlex.quote(str(model))}",
        f"  train with them:    mmser train {shlex.quote(str(path))}",
        "  go on searching:    the same command with a larger --hp_search",
    ]  # fmt: skip
    print("\n".join(lines))
    return {"trials": number, "weighted_f1": best.value, "settings": best.params, "recipe": str(path)}
