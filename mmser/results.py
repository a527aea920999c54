# SPDX-License-Identifier: Apache-2.0
"""`eval_results.json` of a training run, its summary tables, and what they say about data and machine."""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from mmser.groups import GROUPS
from mmser.tables import format_table

RESULTS_NAME = "eval_results.json"
SUMMARY_COLUMNS = (
    *("split", "row", "clips", "weighted_f1", "unweighted_average_recall", "accuracy"),
    *("expected_calibration_error", "error_auroc_of_uncertainty"),
)


def describe_data(
    name: str, splits: Mapping[str, datasets.Dataset | datasets.IterableDataset], is_hub: bool = False
) -> dict[str, Any]:
    """Name, clips per split, languages, and whether speakers are shared between splits, as far as the data say."""
    result: dict[str, Any] = {
        "name": name if is_hub else Path(name).resolve().name,
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
                corpora = table["corpus"] if "corpus" in table.column_names else [""] * len(table)
                speakers[split] = {pair for pair in zip(corpora, table["speaker"], strict=True) if pair[1]}
    if speakers:
        counts = ", ".join(f"{len(names)} in {split}" for split, names in speakers.items())
        pairs = [(a, b) for a in speakers for b in speakers if a < b]
        result["overlap"] = any(speakers[a] & speakers[b] for a, b in pairs)
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


def format_results(results: Mapping[str, Any]) -> dict[str, str]:
    """
    Tables of `results` in Markdown.

    Returns: `summary`, `classes`, `confusion`, `open_set`, `parameters`, `corpus`, `language` and `sex`; a table
        without rows is an empty string.
    """
    names = results["label_names"]
    split = "test" if "test" in results else "validation"
    scored = [name for name in ("validation", "test") if name in results]
    summary = [{"split": name, "row": row, **values} for name in scored for row, values in results[name].items()]
    tables = {"summary": format_table(summary, SUMMARY_COLUMNS) if summary else ""}
    rows = results.get(split, {})
    per_class = [{"row": row, **{name: values[f"f1_{name}"] for name in names}} for row, values in rows.items()]
    tables["classes"] = format_table(per_class, ["row", *names]) if per_class else ""
    model = rows.get("model", {})
    matrix = model.get("confusion_matrix", [])
    confusion = [
        {"true \\ predicted": name, **dict(zip(names, row, strict=True))}
        for name, row in zip(names, matrix, strict=False)
    ]
    tables["confusion"] = format_table(confusion, ["true \\ predicted", *names]) if confusion else ""
    for group in GROUPS:
        metrics = ["count", "weighted_f1", "unweighted_average_recall", *(f"f1_{name}" for name in names)]
        grouped = [{group: name, **values} for name, values in model.get(f"by_{group}", {}).items()]
        tables[group] = format_table(grouped, [group, *metrics]) if grouped else ""
    open_set = [{"score": name, **values} for name, values in results.get("open_set", {}).items()]
    tables["open_set"] = (
        format_table(open_set, ["score", "clips", "auroc", "fpr_at_95_tpr", "oscr"]) if open_set else ""
    )
    tables["parameters"] = format_table(results["parameters"], ["part", "parameters", "trainable"])
    return tables


def earlier_training(output_dir: str | Path) -> dict[str, Any] | None:
    """What `eval_results.json` says of the training: for a run that is only evaluated again, as it was finished."""
    path = Path(output_dir) / RESULTS_NAME
    return json.loads(path.read_text(encoding="utf-8"))["training"] if path.exists() else None
