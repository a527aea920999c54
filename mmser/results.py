# SPDX-License-Identifier: Apache-2.0
"""`eval_results.json` of a training run: the data and the machine it describes, and its tables.

`describe_data` and `environment` also serve the report of `eval_hf.py`.
"""

import json
import math
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers

from mmser.groups import GROUPS, with_mean
from mmser.table_files import is_table
from mmser.tables import format_table
from mmser.training_flags import MIN_STEPS

RESULTS_NAME = "eval_results.json"
# Names of scores that fit a terminal and a page. The unweighted average recall is the mean of those of the classes
SHORT_TITLES = {
    "weighted_f1": "weighted F1",
    "unweighted_average_recall": "recall",
    "expected_calibration_error": "ECE",
    "error_auroc_of_uncertainty": "error AUROC",
    "auroc": "AUROC",
    "fpr_at_95_tpr": "FPR95",
    "oscr": "OSCR",
}
LEAST_GAP = 0.03  # of weighted F1 between a probe and the head that is worth a word


def describe_data(
    name: str, splits: Mapping[str, datasets.Dataset | datasets.IterableDataset], is_hub: bool = False
) -> dict[str, Any]:
    """
    Describe the clips of a run, as far as their columns allow. A stream is not counted.

    Args:
        name: of the folder or the table or, with `is_hub`, of the data set on the Hub.
        splits: split name -> table.
        is_hub: whether the data come from the Hub.
    Returns: `name`, `type`, `clips` per split, `speakers` (a sentence), `overlap` (whether a speaker is in two
        splits) and `languages`.
    """
    place = Path(name).resolve()
    place = place.parent if is_table(place) and place.stem == "metadata" else place
    result: dict[str, Any] = {
        "name": name if is_hub else place.name,
        "type": name if is_hub else "audiofolder",
        "clips": {},
        "speakers": "Speakers are not known.",
        "overlap": False,
        "languages": [],
    }
    speakers = {}
    for split, table in splits.items():
        if isinstance(table, datasets.Dataset):
            result["clips"][split] = len(table)
            if "language" in table.column_names:
                result["languages"] = sorted({*result["languages"], *table["language"]} - {""})
            if "speaker" in table.column_names:
                # A name in two corpora is two people
                corpora = table["corpus"] if "corpus" in table.column_names else [""] * len(table)
                speakers[split] = {pair for pair in zip(corpora, table["speaker"], strict=True) if pair[1]}
    if speakers:
        counts = ", ".join(f"{len(names)} in {split}" for split, names in speakers.items())
        result["overlap"] = any(speakers[a] & speakers[b] for a in speakers for b in speakers if a < b)
        result["speakers"] = f"Speakers: {counts}{'' if result['overlap'] else ', none in two splits'}."
    return result


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """The machine and the versions that numbers were measured with; `device` is the CPU by default."""
    is_cuda = device is not None and device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def earlier_training(output_dir: str | Path) -> dict[str, Any] | None:
    """The entry `training` of an `eval_results.json` that is already there: a finished run may be evaluated again."""
    path = Path(output_dir) / RESULTS_NAME
    return json.loads(path.read_text(encoding="utf-8"))["training"] if path.exists() else None


def advise(results: Mapping[str, Any]) -> list[str]:
    """
    Say what to do about a model that did not learn what it could, by the validation clips (else the test clips).

    Returns: sentences, none if the head is as good as a linear probe on its features and every class is predicted;
        none of a model that was adapted, which learnt by no steps.
    """
    if "adaptation" in results:
        return []
    split = "validation" if results.get("validation") else "test"
    rows = results.get(split) or {}
    advice = []
    if "model" in rows and "linear_probe" in rows:
        model, probe = (rows[name]["weighted_f1"] for name in ("model", "linear_probe"))
        error = math.sqrt(max(probe * (1 - probe), 0) / rows["model"]["clips"])  # of a share of that many clips
        if probe - model > max(LEAST_GAP, error):
            advice.append(
                f"On the {split} clips, the model (weighted F1 {model:.2f}) is below a linear probe on its own "
                f"features ({probe:.2f}): its head has not learnt what the encoders offer. "
                f"{_remedy(results['training'])}"
            )
    counts = np.array(rows.get("model", {}).get("confusion_matrix", []))  # [true, predicted]
    if counts.size:
        is_missing = (counts.sum(axis=0) == 0) & (counts.sum(axis=1) > 0)
        missing = [name for name, flag in zip(results["label_names"], is_missing, strict=True) if flag]
        if missing:
            advice.append(
                f"On the {split} clips, {', '.join(missing)} {'was' if len(missing) == 1 else 'were'} never predicted."
                f" {'' if advice else _remedy(results['training'])}".strip()
            )
    return advice


def next_steps(folder: str | Path, data: Sequence[str]) -> list[str]:
    """
    What can be done with a checkpoint or an export, a command a line. `data`: the flags that name its clips; an ONNX
    file alone cannot be judged by a command.
    """
    own = shlex.quote(str(folder))
    steps = [
        f"  use it:         mmser predict clip.wav --checkpoint {own}",
        f"  judge it:       mmser eval --checkpoint {own} {shlex.join(data)}",
    ]
    config = Path(folder) / "config.json"
    if any(Path(folder).glob("*.onnx")):
        return steps if any(Path(folder).glob("*.safetensors")) else steps[:1]
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("int8_weights"):
        return steps  # it is small
    small = shlex.quote(f"{folder}-int8")
    return [*steps, f"  make it small:  mmser export --checkpoint {own} --output_dir {small} --dtype int8"]


def reproducible(command: Sequence[str]) -> str:
    """
    A command as it can be pasted into a shell and shown to others, without what belongs to this machine alone.

    Absolute paths are written relative to the working folder or, outside it, by their last part. What looks like a
    Hub token is left out.
    """
    return shlex.join(re.sub(r"\bhf_[A-Za-z0-9]{20,}", "hf_...", _without_folders(word)) for word in command)


def _without_folders(word: str) -> str:
    """A word of a command, with any absolute path that it is, or that follows a "=" or a quote in it, made short."""
    flag, is_joined, value = word.partition("=")
    if is_joined and flag.startswith("-"):
        return f"{flag}={_without_folders(value)}"
    if Path(word).is_absolute():
        return _short(word)
    return re.sub(r'"(/[^"]+)"', lambda found: f'"{_short(found[1])}"', word)


def _short(path: str) -> str:
    """An absolute path without the folders of this machine."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else Path(path).name or path


def _remedy(training: Mapping[str, Any]) -> str:
    steps, epochs = training.get("steps"), training.get("epoch")
    if steps and epochs and steps < MIN_STEPS:
        longer = math.ceil(epochs * MIN_STEPS / steps)
        few = "step is" if steps == 1 else "steps are"
        return f"{steps} {few} few: train longer, with --epochs {longer} ({MIN_STEPS} steps)."
    return (
        "Try a lower --lr, frozen encoders as in recipes/real_speech.json, or a shorter head by --config_overrides "
        "'{\"classifier_num_layers\": 5}'."
    )


def task_tables(
    described: Mapping[str, Mapping[str, Mapping[str, Any]]], titles: Mapping[str, str] | None = None
) -> dict[str, str]:
    """
    The tables `tasks` and `tasks_of_numbers`, of the tasks beside the emotion.

    Args:
        described: split -> task -> metrics of `describe_tasks`.
        titles: of `format_table`.
    """
    rows = [
        {"split": split, "task": task, **values}
        for split, tasks in described.items()
        for task, values in tasks.items()
    ]
    classes = ["clips", "weighted_f1", "unweighted_average_recall", "accuracy", "majority_f1"]
    numbers = ["clips", "ccc", "pearson", "mean_absolute_error", "deviation_of_targets"]
    return {
        "tasks": format_table([row for row in rows if "ccc" not in row], ["split", "task", *classes], titles),
        "tasks_of_numbers": format_table([row for row in rows if "ccc" in row], ["split", "task", *numbers]),
    }


def format_results(results: Mapping[str, Any]) -> dict[str, str]:
    """
    Tables of `results` in Markdown.

    Returns: `summary`, `classes`, `confusion`, `corpus`, `language`, `sex`, `open_set`, `tasks`, `tasks_of_numbers`
        and `parameters`; a table without rows is an empty string.
    """
    names = results["label_names"]
    titles = SHORT_TITLES | {f"f1_{name}": f"F1 {name}" for name in names}
    splits = [split for split in ("validation", "test") if split in results]
    rows = results[splits[-1]] if splits else {}
    model = rows.get("model", {})
    main = ["weighted_f1", "unweighted_average_recall"]
    scores = [*main, "accuracy", "expected_calibration_error", "error_auroc_of_uncertainty"]
    summary = [{"split": split, "row": row, **values} for split in splits for row, values in results[split].items()]
    corner = "true \\ predicted"
    confusion = [
        {corner: name, **dict(zip(names, counts, strict=True))}
        for name, counts in zip(names, model.get("confusion_matrix", []), strict=False)
    ]

    def by_name(title: str, entries: Mapping[str, Mapping], columns: list[str]) -> str:
        return format_table([{title: name, **values} for name, values in entries.items()], [title, *columns], titles)

    classes = {row: {name: values[f"f1_{name}"] for name in names} for row, values in rows.items()}
    per_group = ["count", *main, *(f"f1_{name}" for name in names)]
    return {
        "summary": format_table(summary, ["split", "row", "clips", *scores], titles),
        "classes": by_name("row", classes, names),
        "confusion": format_table(confusion, [corner, *names]),
        **{group: by_name(group, with_mean(model.get(f"by_{group}", {}), group), per_group) for group in GROUPS},
        **task_tables(results.get("auxiliary", {}), titles),
        "open_set": by_name("score", results.get("open_set", {}), ["clips", "auroc", "fpr_at_95_tpr", "oscr"]),
        "parameters": format_table(results["parameters"], ["part", "parameters", "trainable"]),
    }
