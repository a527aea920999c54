# SPDX-License-Identifier: Apache-2.0
"""From a trained model to its report: the scores of every split, the summary table, `eval_results.json` and the card.

`evaluate_split` gives the rows (both modalities, one alone, a linear probe, the majority class), `evaluate_open_set`
the rejection of clips that are none of the classes, `write_results` the files. All numbers are measured.
"""

import json
import math
import platform
import re
import shlex
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers.utils import logging

from evaluation_mmser import (
    area_under_risk_coverage,
    auroc,
    compute_classification_metrics,
    confusion_matrix,
    error_detection_auroc,
    expected_calibration_error,
    format_table,
    fpr_at_95_tpr,
    grouped_metrics,
    negative_log_likelihood,
    oscr,
    softmax,
)
from training_mmser import MMSERTrainer

logger = logging.get_logger(__name__)

CARD_NAME = "model_card.md"
RESULTS_NAME = "eval_results.json"
GROUPS = ("corpus", "language")
NO_LANGUAGE = {"mis", "mul", "und", "zxx"}  # ISO 639-2: no code, several, not determined, none


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


def describe_predictions(
    outputs: Mapping[str, np.ndarray], label_names: list[str], groups: Mapping[str, list] | None = None
) -> dict[str, Any]:
    """
    Everything that is said about one pass over one split.

    Args:
        outputs: of `MMSERTrainer.predict_outputs`.
        label_names: C names, in the order of the class ids.
        groups: name of a grouping (`"corpus"`) -> the group of each clip, N names.
    Returns: closed-set metrics, calibration, how well the uncertainty spots errors, the confusion matrix, and
        `by_<grouping>`.
    """
    logits, labels = outputs["logits"].astype(np.float64), outputs["labels"]
    predictions, probabilities = logits.argmax(axis=1), softmax(logits)
    wrong = predictions != labels
    result = {
        "clips": len(labels),
        **compute_classification_metrics(predictions, labels, label_names),
        "expected_calibration_error": expected_calibration_error(probabilities, labels),
        "negative_log_likelihood": negative_log_likelihood(logits, labels),
        "error_auroc_of_uncertainty": error_detection_auroc(outputs["uncertainty"], wrong),
        "error_auroc_of_max_probability": error_detection_auroc(1 - probabilities.max(axis=1), wrong),
        "area_under_risk_coverage": area_under_risk_coverage(outputs["uncertainty"], wrong),
        "confusion_matrix": confusion_matrix(predictions, labels, len(label_names)).tolist(),
    }
    for name, values in (groups or {}).items():
        result[f"by_{name}"] = grouped_metrics(predictions, labels, values, label_names)
    return result


def linear_probe(train_outputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Class ids [N] from a logistic regression on the standardised fused vectors: what the deep head has to beat."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(train_outputs["fused"], train_outputs["labels"])
    return probe.predict(outputs["fused"])


def evaluate_split(
    trainer: MMSERTrainer,
    split: datasets.Dataset | datasets.IterableDataset,
    make_dataset: Callable[..., torch.utils.data.Dataset],
    label_names: list[str],
) -> dict[str, dict[str, Any]]:
    """
    Score one split in every way that the data allow.

    Args:
        trainer: with `train_outputs` from `finalize`.
        split: a table of `load_emotion_dataset`; all of its clips must be readable (`drop_unreadable`).
        make_dataset: makes examples of a table; takes `use_audio` and `use_text`.
        label_names: in the order of the class ids.
    Returns: row name -> metrics; rows `model`, `audio_only` and `text_only` (if the data have both), `linear_probe`,
        `majority`.
    """
    outputs = trainer.predict_outputs(make_dataset(split))
    rows = {"model": describe_predictions(outputs, label_names, _groups(split))}
    columns = split.column_names or []
    if isinstance(split, datasets.Dataset) and {"audio", "text"} <= set(columns):
        for name, column, other in (("audio_only", "audio", "use_text"), ("text_only", "text", "use_audio")):
            present = split.select([i for i, value in enumerate(split[column]) if value])
            if len(present):
                alone = make_dataset(present, **{other: False})
                rows[name] = describe_predictions(trainer.predict_outputs(alone), label_names, _groups(present))
    train_outputs = trainer.train_outputs
    majority = np.full(len(outputs["labels"]), np.bincount(train_outputs["labels"]).argmax())
    references = {"majority": majority}
    if len(np.unique(train_outputs["labels"])) > 1:
        references = {"linear_probe": linear_probe(train_outputs, outputs), **references}
    for name, predictions in references.items():
        rows[name] = {
            "clips": len(predictions),
            **compute_classification_metrics(predictions, outputs["labels"], label_names),
        }
    return rows


def _groups(split: datasets.Dataset | datasets.IterableDataset) -> dict[str, list[str]]:
    """The groupings that the data have."""
    if not isinstance(split, datasets.Dataset):
        return {}
    return {name: [value or "unknown" for value in split[name]] for name in GROUPS if name in split.column_names}


def evaluate_open_set(
    trainer: MMSERTrainer,
    known: datasets.Dataset,
    unknown: datasets.Dataset,
    make_dataset: Callable[..., torch.utils.data.Dataset],
) -> dict[str, dict[str, float]]:
    """
    How well clips that are none of the classes are told apart, unknown being the positive class: OpenMax, if it is
    fitted, against one minus the largest probability of the same model.

    Returns: score name -> `auroc`, `fpr_at_95_tpr` and `oscr`.
    """
    known_outputs = trainer.predict_outputs(make_dataset(known))
    unknown_outputs = trainer.predict_outputs(make_dataset(unknown))
    scores = {"max_softmax": [1 - softmax(o["logits"]).max(axis=1) for o in (known_outputs, unknown_outputs)]}
    if "unknown_probability" in known_outputs:
        scores["openmax"] = [o["unknown_probability"] for o in (known_outputs, unknown_outputs)]
    correct = known_outputs["logits"].argmax(axis=1) == known_outputs["labels"]
    rows = {}
    for name, (known_scores, unknown_scores) in scores.items():
        both = np.concatenate([known_scores, unknown_scores])
        is_unknown = np.arange(len(both)) >= len(known_scores)
        rows[name] = {
            "clips": len(both),
            "auroc": auroc(both, is_unknown),
            "fpr_at_95_tpr": fpr_at_95_tpr(both, is_unknown),
            "oscr": oscr(-known_scores, correct, -unknown_scores),
        }
    return rows


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


SUMMARY_COLUMNS = (
    *("split", "row", "clips", "weighted_f1", "unweighted_average_recall", "accuracy"),
    *("expected_calibration_error", "error_auroc_of_uncertainty"),
)


def format_results(results: Mapping[str, Any]) -> dict[str, str]:
    """
    Tables of `results` in Markdown.

    Returns: `summary`, `classes`, `confusion`, `open_set`, `parameters`, `corpus` and `language`; a table without rows
        is an empty string.
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


def write_results(
    results: dict[str, Any],
    output_dir: str | Path,
    command: list[str] | None = None,
    device: torch.device | None = None,
) -> str:
    """
    Write `eval_results.json` and the model card `README.md` into `output_dir`.

    Returns: the tables, to print at the end of a run.
    """
    folder = Path(output_dir)
    results = {**results, "environment": environment(device), "command": shlex.join(command or sys.argv)}
    text = json.dumps(_plain(results), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / RESULTS_NAME).write_text(text + "\n", encoding="utf-8")
    write_model_card(results, folder)
    tables = format_results(results)
    titles = {
        "summary": "Summary",
        "classes": "F1 of each class",
        "confusion": "Confusion matrix",
        "corpus": "By corpus",
        "language": "By language",
        "open_set": "Clips that are none of the classes",
    }
    parts = [f"{title}\n{tables[name]}" for name, title in titles.items() if tables[name]]
    return "\n\n".join([*parts, f"Checkpoint, eval_results.json and README.md (the model card): {folder}"])


def _plain(value: Any) -> Any:
    """What strict JSON can hold: numbers that are not finite (a score that is not defined) become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.generic, torch.Tensor)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _language_codes(names: Iterable[str]) -> list[str] | None:
    """The names that are codes of a language as a model card takes them: two or three letters, without a region."""
    codes = {name.replace("_", "-").split("-")[0].lower() for name in names}
    return sorted(code for code in codes - NO_LANGUAGE if re.fullmatch("[a-z]{2,3}", code)) or None


def model_card_template() -> Path:
    """`model_card.md`, beside this file in a clone or under `share/mmser` of an installation."""
    candidates = [Path(__file__).parent / CARD_NAME, Path(sysconfig.get_path("data")) / "share" / "mmser" / CARD_NAME]
    found = [path for path in candidates if path.exists()]
    if not found:
        raise FileNotFoundError(f"{CARD_NAME} is at none of: {', '.join(map(str, candidates))}")
    return found[0]


def write_model_card(results: Mapping[str, Any], output_dir: str | Path) -> Path:
    """Fill `model_card.md` with `results` (as in `eval_results.json`) and write it as `README.md`."""
    folder = Path(output_dir)
    split = "test" if "test" in results else "validation"
    scores = results.get(split, {}).get("model", {})
    name = results.get("model_name") or folder.resolve().name
    evaluated = (
        [
            EvalResult(
                task_type="audio-classification",
                dataset_type=results["data"]["type"],
                dataset_name=f"{results['data']['name']} ({split})",
                metric_type="f1",
                metric_name="Weighted F1",
                metric_value=round(scores["weighted_f1"], 4),
            )
        ]
        if scores
        else []
    )
    card_data = ModelCardData(
        language=_language_codes(results["data"]["languages"]),
        license=results.get("license"),
        library_name="transformers",
        pipeline_tag="audio-classification",
        tags=["speech-emotion-recognition", "multimodal", "mmser", "audio", "text"],
        model_name=name,
        eval_results=evaluated or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(model_card_template()),
        name=name,
        results=results,
        scores=scores,
        split=split,
        tables=format_results(results),
    )
    card.save(folder / "README.md")
    return folder / "README.md"
