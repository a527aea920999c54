# SPDX-License-Identifier: Apache-2.0
"""The judgement of a checkpoint on one split: its numbers, its pictures and `report.md`, which explains both.

`Measured` is what the model said; `judge` turns it into numbers, `draw` into pictures, and `write_report` puts them
into `report.md` and `report.json`. The words of the report follow from the numbers (`verdict`).
"""

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmser.calibration import area_under_risk_coverage, expected_calibration_error, negative_log_likelihood
from mmser.groups import group_gap
from mmser.metrics import softmax
from mmser.plots import (
    plot_confusion_matrix,
    plot_group_bars,
    plot_open_set_roc,
    plot_oscr,
    plot_reliability,
    plot_risk_coverage,
    plot_score_histograms,
)
from mmser.scores import describe_rejection, describe_rows, evaluate_open_set, open_set_scores
from mmser.tables import format_table, strict_json

ROW_NAMES = {
    "model": "the model",
    "audio_only": "its audio alone",
    "text_only": "its text alone",
    "linear_probe": "linear probe",
    "majority": "majority class",
}
SCORE_NAMES = {
    "openmax": "OpenMax",
    "max_softmax": "1 - max probability",
    "energy": "energy",
    "knn": "kNN distance (fused)",
    "knn_features": "kNN distance (features)",
    "uncertainty": "uncertainty",
}
MAX_BARS = 40  # groups in one picture; the table has them all


@dataclass
class Measured:
    """
    What the model said about the clips of one split and about clips that are none of its classes.

    Args:
        label_names: C names, in the order of the class ids.
        rows: of `predict_rows`.
        groups: name of a grouping -> the group of each clip.
        unknown_sets: outputs for each set of unknown clips, by name.
        train_outputs: outputs for training clips, if there are any.
        class_counts: training clips per class, if known without them.
        temperature: that the model divides its logits by.
    """

    label_names: list[str]
    rows: dict[str, dict[str, np.ndarray]]
    groups: dict[str, list[str]] = field(default_factory=dict)
    unknown_sets: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    train_outputs: dict[str, np.ndarray] | None = None
    class_counts: list[int] | None = None
    temperature: float = 1.0

    @property
    def scaled(self) -> dict[str, np.ndarray]:
        """The model's logits [N, C] `before` and `after` its temperature divided them; only `after` if that is 1."""
        logits = self.rows["model"]["logits"].astype(np.float64)
        if self.temperature == 1:
            return {"after": logits}
        return {"before": logits * self.temperature, "after": logits}

    @property
    def error_scores(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """What may tell wrong answers from right ones: name -> (score [N], whether the answer is wrong [N])."""
        outputs = self.rows["model"]
        wrong = outputs["logits"].argmax(axis=1) != outputs["labels"]
        spread = 1 - softmax(outputs["logits"]).max(axis=1)
        return {"uncertainty": (outputs["uncertainty"], wrong), "max_softmax": (spread, wrong)}


def judge(measured: Measured, num_samples: int = 1000) -> dict[str, Any]:
    """
    All numbers of the report.

    Args:
        measured: what the model said.
        num_samples: resamples for the 95 % intervals.
    Returns: `label_names`, `rows` (row name -> metrics, and `by_<grouping>` of the model), `calibration` (without and
        with the temperature), `risk_coverage` (area by score), `gaps` (by grouping), `open_set` (set -> score ->
        metrics) and `rejection` (None for a model that rejects nothing).
    """
    labels = measured.rows["model"]["labels"]
    rows = describe_rows(
        measured.rows,
        measured.label_names,
        measured.groups,
        measured.train_outputs,
        measured.class_counts,
        num_samples,
    )
    calibration = {
        name: {
            "expected_calibration_error": expected_calibration_error(softmax(logits), labels),
            "negative_log_likelihood": negative_log_likelihood(logits, labels),
            "mean_confidence": softmax(logits).max(axis=1).mean(),
        }
        for name, logits in measured.scaled.items()
    }
    return {
        "label_names": measured.label_names,
        "rows": rows,
        "temperature": measured.temperature,
        "calibration": calibration,
        "risk_coverage": {name: area_under_risk_coverage(*arrays) for name, arrays in measured.error_scores.items()},
        "gaps": {name: group_gap(rows["model"][f"by_{name}"]) for name in measured.groups},
        "open_set": evaluate_open_set(
            measured.rows["model"],
            measured.unknown_sets,
            measured.train_outputs,
            measured.temperature,
            num_samples,
        ),
        "rejection": describe_rejection(measured.rows["model"], measured.unknown_sets, measured.label_names),
    }


def draw(measured: Measured, report: Mapping[str, Any], folder: str | Path) -> dict[str, str]:
    """Every picture of the report, as PNG files in `folder`. Returns: name of the picture -> name of its file."""
    folder = Path(folder)
    model, names = report["rows"]["model"], measured.label_names
    titles = {"before": "without temperature scaling", "after": f"the model (temperature {measured.temperature:.2f})"}
    probabilities = {titles[name]: softmax(logits) for name, logits in measured.scaled.items()}
    errors = {SCORE_NAMES[name]: arrays for name, arrays in measured.error_scores.items()}
    rows = {ROW_NAMES[name]: {"count": row["clips"], **row} for name, row in report["rows"].items()}
    paths = {
        "rows": plot_group_bars(rows, folder / "rows.png", title="The model and what it has to beat"),
        "confusion": plot_confusion_matrix(model["confusion_matrix"], names, folder / "confusion_matrix.png"),
        "reliability": plot_reliability(probabilities, measured.rows["model"]["labels"], folder / "reliability.png"),
        "risk_coverage": plot_risk_coverage(errors, folder / "risk_coverage.png"),
    }
    for name in measured.groups:
        groups = model[f"by_{name}"]
        if len(groups) <= MAX_BARS:
            path = folder / f"by_{_file_name(name)}.png"
            paths[f"by_{name}"] = plot_group_bars(groups, path, title=f"By {name}", overall=model["weighted_f1"])
    if measured.unknown_sets:
        known = open_set_scores(measured.rows["model"], measured.train_outputs, measured.temperature)
        for name in measured.unknown_sets:
            paths.update(_draw_open_set(measured, known, name, folder))
    return {name: path.name for name, path in paths.items()}


def _draw_open_set(measured: Measured, known: Mapping[str, np.ndarray], name: str, folder: Path) -> dict[str, Path]:
    """ROC, OSCR and histogram of one set of unknown clips against the scores of the known ones."""
    outputs, file_name = measured.rows["model"], _file_name(name)
    unknown = open_set_scores(measured.unknown_sets[name], measured.train_outputs, measured.temperature)
    correct = outputs["logits"].argmax(axis=1) == outputs["labels"]
    flags = np.arange(len(correct) + len(unknown["energy"])) >= len(correct)
    roc = {SCORE_NAMES[key]: (np.concatenate([known[key], unknown[key]]), flags) for key in known}
    accepted = {SCORE_NAMES[key]: (-known[key], correct, -unknown[key]) for key in known}
    own, title = next((key, SCORE_NAMES[key]) for key in known)  # OpenMax, if it is fitted
    if own == "openmax":  # a logarithm without bounds; as a probability it can be drawn
        title = "1 - largest class probability after OpenMax"
        known, unknown = ({own: 1 - np.exp(-scores[own])} for scores in (known, unknown))
    return {
        f"roc_{name}": plot_open_set_roc(roc, folder / f"roc_{file_name}.png", f"Detection of the unknown: {name}"),
        f"oscr_{name}": plot_oscr(accepted, folder / f"oscr_{file_name}.png", f"Right and accepted: {name}"),
        f"scores_{name}": plot_score_histograms(
            known[own],
            unknown[own],
            folder / f"scores_{file_name}.png",
            title,
            f"Known and unknown: {name}",
        ),
    }


def _file_name(name: str) -> str:
    """`name` as it can be part of the name of a file anywhere."""
    return re.sub(r"[^\w.-]+", "_", name) or "_"


def _percent(share: float) -> str:
    return "n/a" if math.isnan(share) else f"{100 * share:.0f} %"


def with_interval(values: Mapping[str, Any], metric: str) -> str:
    """`0.712 (0.680 to 0.741)`: a metric and its 95 % interval, if it has one."""
    low, high = values.get(f"{metric}_interval", (math.nan, math.nan))
    if math.isnan(values[metric]):
        return "n/a"
    return f"{values[metric]:.3f}" + ("" if math.isnan(low) else f" ({low:.3f} to {high:.3f})")


def verdict(report: Mapping[str, Any]) -> list[str]:
    """Three lines in plain words: is it right, does its score mean what it says, does it know its limits."""
    return [_verdict_on_answers(report), _verdict_on_scores(report), _verdict_on_doubt(report)]


def _verdict_on_answers(report: Mapping[str, Any]) -> str:
    rows, model = report["rows"], report["rows"]["model"]
    low, high = model["weighted_f1_interval"]
    text = (
        f"**Is it right?** For {_percent(model['accuracy'])} of {model['clips']} clips: weighted F1 "
        f"{model['weighted_f1']:.3f} (95 % interval {low:.3f} to {high:.3f})"
    )
    if "majority" in rows:
        text += f"; always giving the most frequent class has {rows['majority']['weighted_f1']:.3f}"
    # only rows over the same clips can be compared
    same = {name: row["weighted_f1"] for name, row in rows.items() if row["clips"] == model["clips"]}
    best = max(same, key=same.__getitem__)
    if best == "model":
        return f"{text}. No other row does better." if len(same) > 1 else f"{text}."
    return f"{text}. The best row is {ROW_NAMES[best]} with {same[best]:.3f}."


def _verdict_on_scores(report: Mapping[str, Any]) -> str:
    after = report["calibration"]["after"]
    text = (
        "**Does its score mean what it says?** The score of an answer is off by "
        f"{100 * after['expected_calibration_error']:.1f} points on average (ECE)"
    )
    if "before" in report["calibration"]:
        before = report["calibration"]["before"]["expected_calibration_error"]
        text += f"; without temperature scaling by {100 * before:.1f}"
    accuracy = report["rows"]["model"]["accuracy"]
    excess = after["mean_confidence"] - accuracy
    leaning = "neither too sure nor too modest" if abs(excess) < 0.02 else "too sure" if excess > 0 else "too modest"
    return f"{text}. It is {leaning}: mean score {_percent(after['mean_confidence'])}, right {_percent(accuracy)}."


def _verdict_on_doubt(report: Mapping[str, Any]) -> str:
    model = report["rows"]["model"]
    parts = ["**Does it know what it does not know?**"]
    own, other = model["error_auroc_of_uncertainty"], model["error_auroc_of_max_probability"]
    if math.isnan(own):
        everything = "right" if model["accuracy"] else "wrong"
        parts.append(f"Its answers are all {everything}, so its uncertainty cannot be judged.")
    else:
        parts.append(
            f"A wrong answer is more uncertain than a right one in {_percent(own)} of the pairs (by 1 - max "
            f"probability: {_percent(other)})."
        )
    if not report["open_set"]:
        parts.append("No unknown clips were given (--ood_dir), so whether it notices them was not measured.")
        return " ".join(parts)
    scores = report["open_set"].get("mean") or next(iter(report["open_set"].values()))
    areas = {name: row["auroc"] for name, row in scores.items()}
    first, best = next(iter(areas)), max(areas, key=areas.__getitem__)
    parts.append(
        f"An unknown clip has a higher score by {SCORE_NAMES[first]} than a known one in {_percent(areas[first])} of "
        "the pairs" + ("" if best == first else f" (best: {SCORE_NAMES[best]}, {_percent(areas[best])})") + "."
    )
    if report["rejection"]:
        rejected = ", ".join(
            f"{_percent(share)} of {name}" for name, share in report["rejection"]["unknown_rejected"].items()
        )
        accepted = _percent(report["rejection"]["known_accepted"])
        parts.append(f"By its own rule it accepts {accepted} of the known clips and rejects {rejected}.")
    return " ".join(parts)


def summary_table(report: Mapping[str, Any]) -> str:
    """The rows with their main scores."""
    metrics = {
        "weighted F1": "weighted_f1",
        "unweighted average recall": "unweighted_average_recall",
        "accuracy": "accuracy",
    }
    rows = [
        {
            "row": ROW_NAMES[name],
            "clips": row["clips"],
            **{title: with_interval(row, metric) for title, metric in metrics.items()},
        }
        for name, row in report["rows"].items()
    ]
    return format_table(rows, ["row", "clips", *metrics])


def open_set_table(report: Mapping[str, Any]) -> str:
    """AUROC, FPR95 and OSCR of every score on every set; empty without unknown clips."""
    rows = [
        {
            "set": set_name,
            "score": SCORE_NAMES[name],
            "AUROC": with_interval(row, "auroc"),
            "FPR95": row["fpr_at_95_tpr"],
            "OSCR": row["oscr"],
        }
        for set_name, scores in report["open_set"].items()
        for name, row in scores.items()
    ]
    return format_table(rows, ["set", "score", "AUROC", "FPR95", "OSCR"]) if rows else ""


def augmentation_table(report: Mapping[str, Any]) -> str:
    """One line for each number of passes; empty without test-time augmentation."""
    rows = [
        {
            "passes": row["passes"],
            "weighted F1": with_interval(row, "weighted_f1"),
            "ECE": row["expected_calibration_error"],
            "NLL": row["negative_log_likelihood"],
            "error AUROC": row["error_auroc_of_uncertainty"],
            "seconds": row["seconds"],
            "ms per clip": 1000 * row["seconds"] / row["clips"],
        }
        for row in report.get("test_time_augmentation", [])
    ]
    columns = ["passes", "weighted F1", "ECE", "NLL", "error AUROC", "seconds", "ms per clip"]
    return format_table(rows, columns) if rows else ""


def _scores_section(report: Mapping[str, Any], plots: Mapping[str, str]) -> list[str]:
    names = report["label_names"]
    per_class = [
        {"row": ROW_NAMES[name], **{label: row[f"f1_{label}"] for label in names}}
        for name, row in report["rows"].items()
    ]
    return [
        "## Is it right?",
        "In brackets 95 % bootstrap intervals; one without width only says that all or none of the clips are right. "
        "`its audio alone` and `its text alone` hide the other modality, over "
        "the clips that have this one; `linear probe` is a logistic regression on the model's fused vectors of "
        "training clips; `majority class` always gives the most frequent class of the training clips.",
        summary_table(report),
        _picture(plots, "rows", "Longer is better; where the black intervals overlap, the order may be chance."),
        "F1 of each class:",
        format_table(per_class, ["row", *names]),
        _picture(plots, "confusion", "Each line is a true class; bright cells off the diagonal are what it mixes up."),
    ]


def _calibration_section(report: Mapping[str, Any], plots: Mapping[str, str]) -> list[str]:
    rows = [
        {
            "scaling": name,
            "ECE": row["expected_calibration_error"],
            "NLL": row["negative_log_likelihood"],
            "mean score": row["mean_confidence"],
        }
        for name, row in report["calibration"].items()
    ]
    fitted = report.get("fitted_calibration")
    parts = ["## Does its score mean what it says?", f"Temperature {report['temperature']:.3f}."]
    if fitted:
        parts[-1] += (
            f" It was fitted in this run, on the {fitted['split']} split, and stored in {fitted['stored_in']}."
        )
        if "ece_before" in fitted:
            parts[-1] += (
                f" There ECE went from {fitted['ece_before']:.4f} to {fitted['ece_after']:.4f} and NLL from "
                f"{fitted['nll_before']:.4f} to {fitted['nll_after']:.4f}."
            )
    return [
        *parts,
        format_table(rows, ["scaling", "ECE", "NLL", "mean score"]),
        _picture(
            plots,
            "reliability",
            "On the dotted line, 70 of 100 answers with a score of 0.7 are right; below it the model is too sure; "
            "large points stand for many clips.",
        ),
    ]


def _uncertainty_section(report: Mapping[str, Any], plots: Mapping[str, str]) -> list[str]:
    model = report["rows"]["model"]
    areas = {
        "uncertainty": model["error_auroc_of_uncertainty"],
        "max_softmax": model["error_auroc_of_max_probability"],
    }
    rows = [
        {"score": SCORE_NAMES[name], "error AUROC": areas[name], "area under risk-coverage": area}
        for name, area in report["risk_coverage"].items()
    ]
    return [
        "## Does it know when it is wrong?",
        "Error AUROC is the share of pairs in which the wrong answer is the more uncertain one (0.5 is chance); the "
        "area is the mean error rate over all shares of clips that could be kept (lower is better).",
        format_table(rows, ["score", "error AUROC", "area under risk-coverage"]),
        _picture(plots, "risk_coverage", "Keeping only the surest clips should lower the errors: lower is better."),
    ]


def _open_set_section(report: Mapping[str, Any], plots: Mapping[str, str]) -> list[str]:
    parts = ["## Does it notice what is none of its classes?"]
    if not report["open_set"]:
        parts.append("Not measured: no folder of unknown clips was given (--ood_dir).")
    else:
        parts += [
            "AUROC: share of pairs in which the unknown clip has the higher score; FPR95: share of known clips lost "
            "when 95 % of the unknown are caught (lower is better); OSCR: like AUROC, with a known clip counting only "
            "if its answer is right. OpenMax is the model's own score.",
            open_set_table(report),
        ]
    rejection = report["rejection"]
    if rejection:
        rows = [{"clips": "known, accepted", "share": rejection["known_accepted"]}]
        rows += [
            {"clips": f"known, {name}, accepted", "share": share}
            for name, share in rejection["accepted_by_class"].items()
        ]
        rows += [
            {"clips": f"unknown, {name}, rejected", "share": share}
            for name, share in rejection["unknown_rejected"].items()
        ]
        parts += [
            "The model's own rule, as its users meet it. Of all known clips "
            f"{_percent(rejection['accuracy'])} are answered right, of the accepted ones "
            f"{_percent(rejection['accuracy_of_accepted'])}.",
            format_table(rows, ["clips", "share"]),
        ]
    for name in (name for name in report["open_set"] if f"roc_{name}" in plots):
        parts += [
            _picture(plots, f"roc_{name}", "A curve near the upper left corner tells the two apart."),
            _picture(
                plots, f"oscr_{name}", "High on the left: few unknown clips accepted, many known answered right."
            ),
            _picture(plots, f"scores_{name}", "The less the two overlap, the better a threshold can work."),
        ]
    return parts


def _group_sections(report: Mapping[str, Any], plots: Mapping[str, str]) -> list[str]:
    parts = []
    columns = {
        "weighted F1": lambda row: with_interval(row, "weighted_f1"),
        "average recall": lambda row: row["unweighted_average_recall"],
        "ECE": lambda row: row["expected_calibration_error"],
        "mean score": lambda row: row["mean_confidence"],
        "rejected": lambda row: row.get("rejected"),
    }
    if report["rejection"] is None:
        del columns["rejected"]
    for name, gap in report["gaps"].items():
        groups = report["rows"]["model"][f"by_{name}"]
        rows = [
            {name: group, "clips": row["count"], **{title: value(row) for title, value in columns.items()}}
            for group, row in groups.items()
        ]
        parts += [f"## By {name}", format_table(rows, [name, "clips", *columns])]
        if gap:
            values = gap["weighted_f1"]
            parts.append(
                f"Of the groups with 30 clips or more, {values['highest']} has the highest weighted F1 and "
                f"{values['lowest']} the lowest: {values['gap']:.3f} apart; in average recall the gap is "
                f"{gap['unweighted_average_recall']['gap']:.3f}."
            )
        if f"by_{name}" in plots:
            caption = "The dashed line is all clips together; pale bars have fewer than 30 clips and say little."
            parts.append(_picture(plots, f"by_{name}", caption))
    return parts


def _augmentation_section(report: Mapping[str, Any]) -> list[str]:
    table = augmentation_table(report)
    if not table:
        return []
    text = (
        "Probabilities averaged over several passes of the same clip, all but the first at another speed (0.9 to 1.1)."
    )
    return ["## Test-time augmentation", text, table]


def _origin_section(report: Mapping[str, Any]) -> list[str]:
    machine = report["environment"]
    return [
        "## How this was made",
        *([" ".join(report["notes"])] if report["notes"] else []),
        f"```\n{report['command']}\n```",
        f"{machine['device']} ({machine['threads']} threads), Python {machine['python']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}. All numbers are in `report.json`.",
    ]


def _picture(plots: Mapping[str, str], name: str, caption: str) -> str:
    return f"![{name.replace('_', ' ')}](plots/{plots[name]})\n\n*{caption}*"


def describe_what(report: Mapping[str, Any]) -> str:
    """One sentence: which checkpoint, on what."""
    data = report["data"]
    clips, languages = report["rows"]["model"]["clips"], ", ".join(data["languages"])
    text = f"`{report['model_name']}` on {data['name']} (split: {report['split']}): {clips} clips of "
    text += f"{', '.join(report['label_names'])}" + (f"; languages: {languages}" if languages else "") + "."
    unknown = ", ".join(f"{count} of {name}" for name, count in report["unknown_clips"].items())
    return text + (f" Clips of none of these classes: {unknown}." if unknown else "")


def write_report(report: Mapping[str, Any], plots: Mapping[str, str], output_dir: str | Path) -> Path:
    """
    Write `report.md` and `report.json` into `output_dir`.

    Args:
        report: of `judge`, and `model_name`, `split`, `data` (of `describe_data`), `unknown_clips` (by set), `notes`,
            `command`, `environment`; optional `fitted_calibration` and `test_time_augmentation`.
        plots: of `draw`, in the folder `plots` within `output_dir`.
    Returns: the path of `report.md`.
    """
    folder = Path(output_dir)
    parts = [
        f"# How well does {report['model_name']} judge?",
        describe_what(report),
        "\n".join(f"- {line}" for line in verdict(report)),
        *_scores_section(report, plots),
        *_calibration_section(report, plots),
        *_uncertainty_section(report, plots),
        *_open_set_section(report, plots),
        *_group_sections(report, plots),
        *_augmentation_section(report),
        *_origin_section(report),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(strict_json({**report, "verdict": verdict(report)}), encoding="utf-8")
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return folder / "report.md"


def console_summary(report: Mapping[str, Any]) -> str:
    """What the console shows at the end: the verdict and the main tables."""
    tables = {
        "Scores": summary_table(report),
        "Unknown clips": open_set_table(report),
        "Test-time augmentation": augmentation_table(report),
    }
    lines = [line.replace("**", "") for line in verdict(report)]
    return "\n\n".join(
        [describe_what(report), *lines, *(f"{title}\n{table}" for title, table in tables.items() if table)]
    )


def reproducible(command: list[str]) -> str:
    """The command as it can be pasted into a shell, without anything that looks like a Hub token."""
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}", "hf_...", shlex.join(command))
