# SPDX-License-Identifier: Apache-2.0
"""The report of `eval_hf.py`: the numbers of a checkpoint on one split, its pictures, and `report.md`.

`Measured` holds the model's outputs. `judge` turns them into numbers, `draw` into pictures. `verdict` says in words
what the numbers say. `write_report` fills `report_template.md` with all of it and writes the numbers to `report.json`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from conformal_mmser import PredictionSets
from mmser.calibration import area_under_risk_coverage, error_rate_interval
from mmser.files import files_together, write_atomically
from mmser.groups import FEW_CLIPS, group_gap, with_mean
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
from mmser.scores import (
    describe_calibration,
    describe_decisions,
    describe_rejection,
    describe_rows,
    describe_sets,
    describe_tasks,
    evaluate_open_set,
    open_set_scores,
)
from mmser.tables import format_table, harmless, shown_results, strict_json

TEMPLATE = Path(__file__).parent / "report_template.md"
ROW_NAMES = {
    "model": "the model",
    "audio_only": "its audio alone",
    "log_mel_probe": "log-mel probe",
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
TITLES = {  # of the columns of the tables; a score that is missing here has its own name
    "count": "clips",
    "weighted_f1": "weighted F1",
    "unweighted_average_recall": "unweighted average recall",
    "expected_calibration_error": "ECE",
    "negative_log_likelihood": "NLL",
    "mean_confidence": "mean score",
    "error_auroc_of_uncertainty": "error AUROC",
    "area_under_risk_coverage": "area under risk-coverage",
    "auroc": "AUROC",
    "fpr_at_95_tpr": "FPR95",
    "oscr": "OSCR",
    "ms_per_clip": "ms per clip",
    "mean_set_size": "labels in a set",
    "one_label": "sets of one label",
    "majority_f1": "F1 of the majority class",
    "ccc": "CCC",
    "mean_absolute_error": "mean absolute error",
    "deviation_of_targets": "deviation of the targets",
}
FEW_ANSWERS = 10  # wrong or right ones; with fewer, how well they are told apart may be chance
MAX_BARS = 40  # groups in one picture; the table has them all

# --- Numbers and pictures --------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """
    The model's outputs for the clips of one split and for clips that are none of its classes.

    Args:
        label_names: C names, in the order of the class ids.
        rows: of `predict_rows`.
        groups: name of a grouping -> the group of each clip.
        unknown_sets: outputs for each set of unknown clips, by name.
        train_outputs: outputs for training clips, if there are any.
        class_counts: training clips per class, if known without them.
        baselines: row name -> `predictions`, `labels` (class ids) and `speakers` of what the model is compared with.
        temperature: that the model divides its logits by.
        prediction_sets: of the model, if they are fitted.
        tasks, targets: the tasks beside the emotion, and the target of each clip, by task.
        speakers: of each clip, for the intervals; None where they are not known.
    """

    label_names: list[str]
    rows: dict[str, dict[str, np.ndarray]]
    groups: dict[str, list[str]] = field(default_factory=dict)
    unknown_sets: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    train_outputs: dict[str, np.ndarray] | None = None
    class_counts: list[int] | None = None
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)
    temperature: float = 1.0
    prediction_sets: PredictionSets | None = None
    tasks: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, list] = field(default_factory=dict)
    speakers: list[str] | None = None

    @property
    def outputs(self) -> dict[str, np.ndarray]:
        """The outputs for the clips of the split, with all that each clip has."""
        return self.rows["model"]

    @property
    def is_wrong(self) -> np.ndarray:
        """Whether the answer is wrong, bool [N]."""
        return self.outputs["logits"].argmax(axis=1) != self.outputs["labels"]

    @property
    def scaled(self) -> dict[str, np.ndarray]:
        """The model's logits [N, C] `before` and `after` its temperature divided them; only `after` if that is 1."""
        logits = self.outputs["logits"].astype(np.float64)
        return {"after": logits} if self.temperature == 1 else {"before": logits * self.temperature, "after": logits}

    @property
    def error_scores(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The scores that may tell wrong answers from right ones: name -> (score [N], `is_wrong` [N])."""
        doubt = 1 - softmax(self.outputs["logits"]).max(axis=1)
        return {"uncertainty": (self.outputs["uncertainty"], self.is_wrong), "max_softmax": (doubt, self.is_wrong)}

    def open_set_scores(self, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """How unknown each clip of `outputs` is, by each score."""
        return open_set_scores(outputs, self.train_outputs, self.temperature)


def judge(measured: Measured, num_samples: int = 1000) -> dict[str, Any]:
    """
    All numbers of the report.

    Args:
        measured: the model's outputs.
        num_samples: resamples for the 95 % intervals.
    Returns: `label_names`, `rows` (row name -> metrics, and `by_<grouping>` of the model), `temperature`,
        `calibration` (without and with the temperature), `prediction_sets` (by the coverage asked for),
        `risk_coverage` (area by score), `gaps` (by grouping), `open_set` (set -> score -> metrics), `rejection`
        (None for a model that rejects nothing) and `auxiliary` (task -> metrics).
    """
    outputs, names, sets = measured.outputs, measured.label_names, measured.unknown_sets
    training = measured.train_outputs
    rows = describe_rows(
        measured.rows, names, measured.groups, training, measured.class_counts, num_samples, measured.speakers
    )
    for name, baseline in measured.baselines.items():
        rows[name] = describe_decisions(**baseline, label_names=names, num_samples=num_samples)
    rows = {name: rows[name] for name in ROW_NAMES if name in rows}
    scaled = measured.scaled.items()
    return {
        "label_names": names,
        "rows": rows,
        "temperature": measured.temperature,
        "calibration": {name: describe_calibration(logits, outputs["labels"]) for name, logits in scaled},
        "prediction_sets": describe_sets(outputs, measured.prediction_sets),
        "risk_coverage": {name: area_under_risk_coverage(*arrays) for name, arrays in measured.error_scores.items()},
        "gaps": {name: group_gap(rows["model"][f"by_{name}"]) for name in measured.groups},
        "open_set": evaluate_open_set(outputs, sets, training, measured.temperature, num_samples),
        "rejection": describe_rejection(outputs, sets, names),
        "auxiliary": describe_tasks(outputs, measured.targets, measured.tasks, num_samples),
    }


def draw(measured: Measured, report: Mapping[str, Any], folder: str | Path) -> dict[str, str]:
    """Every picture of the report, as PNG files in `folder`. Returns: name of the picture -> name of its file."""
    folder = Path(folder)
    model = report["rows"]["model"]
    titles = {"before": "without temperature scaling", "after": f"the model (temperature {measured.temperature:.2f})"}
    probabilities = {titles[name]: softmax(logits) for name, logits in measured.scaled.items()}
    errors = {SCORE_NAMES[name]: arrays for name, arrays in measured.error_scores.items()}
    rows = {ROW_NAMES[name]: {"count": row["clips"], **row} for name, row in report["rows"].items()}
    matrix = model["confusion_matrix"], measured.label_names
    paths = {
        "rows": plot_group_bars(rows, folder / "rows.png", title="The model and what it has to beat"),
        "confusion": plot_confusion_matrix(*matrix, folder / "confusion_matrix.png"),
        "reliability": plot_reliability(probabilities, measured.outputs["labels"], folder / "reliability.png"),
        "risk_coverage": plot_risk_coverage(errors, folder / "risk_coverage.png"),
    }
    for name in measured.groups:
        groups = model[f"by_{name}"]
        if len(groups) <= MAX_BARS:
            path = folder / f"by_{_file_name(name)}.png"
            paths[f"by_{name}"] = plot_group_bars(groups, path, title=f"By {name}", overall=model["weighted_f1"])
    if measured.unknown_sets:
        known = measured.open_set_scores(measured.outputs)
        for name, outputs in measured.unknown_sets.items():
            unknown = measured.open_set_scores(outputs)
            paths.update(_draw_open_set(name, known, unknown, ~measured.is_wrong, folder))
    return {name: path.name for name, path in paths.items()}


def _draw_open_set(
    name: str, known: dict[str, np.ndarray], unknown: dict[str, np.ndarray], is_right: np.ndarray, folder: Path
) -> dict[str, Path]:
    """ROC, OSCR and histogram of one set of unknown clips, against the known ones."""
    is_unknown = np.repeat([False, True], [len(known["energy"]), len(unknown["energy"])])
    detected = {SCORE_NAMES[key]: (np.concatenate([known[key], unknown[key]]), is_unknown) for key in known}
    accepted = {SCORE_NAMES[key]: (-known[key], is_right, -unknown[key]) for key in known}
    own = next(iter(known))  # OpenMax, if it is fitted
    title, shown = SCORE_NAMES[own], (known[own], unknown[own])
    if own == "openmax":  # a logarithm without bounds; as a probability it can be drawn
        title = "1 - largest class probability after OpenMax"
        shown = (1 - np.exp(-known[own]), 1 - np.exp(-unknown[own]))
    paths = {kind: folder / f"{kind}_{_file_name(name)}.png" for kind in ("roc", "oscr", "scores")}
    return {
        f"roc_{name}": plot_open_set_roc(detected, paths["roc"], f"Detection of the unknown: {name}"),
        f"oscr_{name}": plot_oscr(accepted, paths["oscr"], f"Right and accepted: {name}"),
        f"scores_{name}": plot_score_histograms(*shown, paths["scores"], title, f"Known and unknown: {name}"),
    }


def _file_name(name: str) -> str:
    """`name` with the characters that every file system allows."""
    return re.sub(r"[^\w.-]+", "_", name) or "_"


# --- The verdict -----------------------------------------------------------------------------------------------------


def verdict(report: Mapping[str, Any]) -> list[str]:
    """Three lines in plain words: is it right, does its score mean what it says, does it know its limits."""
    return [
        f"**Is it right?** {_verdict_on_answers(report)}",
        f"**Does its score mean what it says?** {_verdict_on_scores(report)}",
        f"**Does it know what it does not know?** {_verdict_on_doubt(report)} {_verdict_on_unknown(report)}",
    ]


def _verdict_on_answers(report: Mapping[str, Any]) -> str:
    rows, model = report["rows"], report["rows"]["model"]
    low, high = model["weighted_f1_interval"]
    text = (
        f"For {_percent(model['accuracy'])} of {model['clips']} clips. Its weighted F1 is {model['weighted_f1']:.3f} "
        f"(95 % interval {low:.3f} to {high:.3f}{_drawn(model)})."
    )
    if "majority" in rows:
        text += f" Always answering the most frequent class reaches {rows['majority']['weighted_f1']:.3f}."
    # Only rows over the same clips can be compared
    same = {name: row["weighted_f1"] for name, row in rows.items() if row["clips"] == model["clips"]}
    best = max(same, key=same.__getitem__)
    if best == "model":
        return f"{text} No other row does better." if len(same) > 1 else text
    return f"{text} The best row is `{ROW_NAMES[best]}`, with {same[best]:.3f}."


def _drawn(row: Mapping[str, Any]) -> str:
    return f", over {row['speakers']} speakers" if "speakers" in row else ""


def _verdict_on_scores(report: Mapping[str, Any]) -> str:
    points = {name: 100 * row["expected_calibration_error"] for name, row in report["calibration"].items()}
    text = f"On average, the score of an answer is off by {points['after']:.1f} points (ECE)."
    if "before" in points:
        text += f" Without temperature scaling it would be off by {points['before']:.1f}."
    model, confidence = report["rows"]["model"], report["calibration"]["after"]["mean_confidence"]
    accuracy, clips = model["accuracy"], model["clips"]
    means = f"its mean score is {_percent(confidence)}, and {_percent(accuracy)} of its answers are right"
    most, least = (1 - rate for rate in error_rate_interval(round(clips * (1 - accuracy)), clips))
    if least <= confidence <= most:
        return (
            f"{text} These clips do not show that the scores are too high or too low: {means} (95 % interval "
            f"{_percent(least)} to {_percent(most)})."
        )
    excess = confidence - accuracy
    leaning = "neither too sure nor too modest" if abs(excess) < 0.02 else "too sure" if excess > 0 else "too modest"
    return f"{text} The model is {leaning}: {means}."


def _verdict_on_doubt(report: Mapping[str, Any]) -> str:
    model = report["rows"]["model"]
    own, other = model["error_auroc_of_uncertainty"], model["error_auroc_of_max_probability"]
    if math.isnan(own):
        return f"Its answers are all {'right' if model['accuracy'] else 'wrong'}, so its uncertainty cannot be judged."
    wrong = round(model["clips"] * (1 - model["accuracy"]))
    text = (
        f"A wrong answer is more uncertain than a right one in {_percent(own)} of the pairs (by 1 - max probability: "
        f"{_percent(other)})."
    )
    kind, few = min(("wrong", wrong), ("right", model["clips"] - wrong), key=lambda pair: pair[1])
    return f"{text} Only {few} answers are {kind}: it may be chance." if few < FEW_ANSWERS else text


def _verdict_on_unknown(report: Mapping[str, Any]) -> str:
    if not report["open_set"]:
        return "No unknown clips were given (--ood_dir), so whether it notices them was not measured."
    scores = report["open_set"].get("mean") or next(iter(report["open_set"].values()))
    areas = {name: row["auroc"] for name, row in scores.items()}
    first, best = next(iter(areas)), max(areas, key=areas.__getitem__)
    better = "" if best == first else f" (best: {SCORE_NAMES[best]}, {_percent(areas[best])})"
    text = (
        f"An unknown clip has a higher score by {SCORE_NAMES[first]} than a known one in {_percent(areas[first])} of "
        f"the pairs{better}."
    )
    rejection = report["rejection"]
    if not rejection:
        return text
    rejected = ", ".join(f"{_percent(share)} of {name}" for name, share in rejection["unknown_rejected"].items())
    accepted = _percent(rejection["known_accepted"])
    return f"{text} By its own rule it accepts {accepted} of the known clips and rejects {rejected}."


def _percent(share: float) -> str:
    return "n/a" if math.isnan(share) else f"{100 * share:.0f} %"


# --- The tables ------------------------------------------------------------------------------------------------------


def _table(entries: Iterable[tuple[Any, Mapping[str, Any]]], title: str, scores: Iterable[str]) -> str:
    """Table with a line for each of `entries` (name and scores), empty without any; `title` heads the names.

    A score is shown with its interval, if an entry has one.
    """
    entries, columns = list(entries), {score: TITLES.get(score, score.removeprefix("f1_")) for score in scores}
    wide = {score for score in columns if any(f"{score}_interval" in values for _, values in entries)}
    rows = []
    for name, values in entries:
        cells = {score: _with_interval(values, score) if score in wide else values.get(score) for score in columns}
        rows.append({title: name, **{columns[score]: cell for score, cell in cells.items()}})
    return format_table(rows, [title, *columns.values()])


def _with_interval(values: Mapping[str, Any], score: str) -> str:
    """`0.712 (0.680 to 0.741)`: a score and its 95 % interval, if it has one."""
    low, high = values.get(f"{score}_interval", (math.nan, math.nan))
    if math.isnan(values[score]):
        return "n/a"
    return f"{values[score]:.3f}" + ("" if math.isnan(low) else f" ({low:.3f} to {high:.3f})")


def _tables(report: Mapping[str, Any]) -> dict[str, Any]:
    """All tables of the report by name; `groups` has one for each grouping. A table without lines is empty."""
    model, rejection = report["rows"]["model"], report["rejection"]
    rows = [(ROW_NAMES[name], row) for name, row in report["rows"].items()]
    error_auroc = {
        "uncertainty": model["error_auroc_of_uncertainty"],
        "max_softmax": model["error_auroc_of_max_probability"],
    }
    doubts = [
        (SCORE_NAMES[name], {"error_auroc_of_uncertainty": error_auroc[name], "area_under_risk_coverage": area})
        for name, area in report["risk_coverage"].items()
    ]
    unknown = [
        (set_name, {"score": SCORE_NAMES[name], **row})
        for set_name, scores in report["open_set"].items()
        for name, row in scores.items()
    ]
    passes = [
        (row["passes"], {**row, "ms_per_clip": 1000 * row["seconds"] / row["clips"]})
        for row in report.get("test_time_augmentation", [])
    ]
    tasks = report.get("auxiliary", {}).items()
    task_scores = [row for row in tasks if "ccc" not in row[1]], [row for row in tasks if "ccc" in row[1]]
    classes = [f"f1_{name}" for name in report["label_names"]]
    f1, recall = "weighted_f1", "unweighted_average_recall"
    ece, nll, confidence = "expected_calibration_error", "negative_log_likelihood", "mean_confidence"
    per_group = ["count", f1, recall, ece, confidence, *(["rejected"] if rejection else [])]
    per_pass = [f1, ece, nll, "error_auroc_of_uncertainty", "seconds", "ms_per_clip"]
    return {
        "summary": _table(rows, "row", ["clips", f1, recall, "accuracy"]),
        "classes": _table(rows, "row", classes),
        "calibration": _table(report["calibration"].items(), "scaling", [ece, nll, confidence]),
        "sets": _table(report["prediction_sets"].items(), "asked for", ["covered", "mean_set_size", "one_label"]),
        "uncertainty": _table(doubts, "score", ["error_auroc_of_uncertainty", "area_under_risk_coverage"]),
        "open_set": _table(unknown, "set", ["score", "auroc", "fpr_at_95_tpr", "oscr"]),
        "rejection": _table(_rejection_shares(rejection), "clips", ["share"]) if rejection else "",
        "answers": _answers(rejection, report["label_names"]) if rejection else "",
        "groups": {
            name: _table(with_mean(model[f"by_{name}"], name).items(), name, per_group) for name in report["gaps"]
        },
        "augmentation": _table(passes, "passes", per_pass),
        "tasks": _table(task_scores[0], "task", ["clips", f1, recall, "accuracy", "majority_f1"]),
        "tasks_of_numbers": _table(
            task_scores[1], "task", ["clips", "ccc", "pearson", "mean_absolute_error", "deviation_of_targets"]
        ),
    }


def _rejection_shares(rejection: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
    shares = {"known, accepted": rejection["known_accepted"]}
    shares |= {f"known, {name}, accepted": share for name, share in rejection["accepted_by_class"].items()}
    shares |= {f"unknown, {name}, rejected": share for name, share in rejection["unknown_rejected"].items()}
    return [(clips, {"share": share}) for clips, share in shares.items()]


def _answers(rejection: Mapping[str, Any], label_names: list[str]) -> str:
    """How often each answer is given to the clips of each class and set; "unknown" is the first answer."""
    corner, columns = "clips \\ answer", ["unknown", *(f"known: {name}" for name in label_names)]
    rows = [{corner: name, **dict(zip(columns, counts, strict=True))} for name, counts in rejection["answers"].items()]
    return format_table(rows, [corner, *columns])


# --- The files -------------------------------------------------------------------------------------------------------


def _subject(report: Mapping[str, Any]) -> str:
    """Which checkpoint was judged, on which clips."""
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
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = _percent
    shown = shown_results(report)
    words = {"fitted_calibration": None, **shown, "subject": _subject(shown), "few_clips": FEW_CLIPS}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(**words, verdict=verdict(shown), tables=_tables(shown), plots=harmless(plots))
    content = {**report, "verdict": verdict(report)}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.json", strict_json(content))
    write_atomically(folder / "report.md", text + "\n")
    return folder / "report.md"


def write_with_plots(measured: Measured, report: Mapping[str, Any], output_dir: str | Path) -> Path:
    """
    `draw` and `write_report`, all of it or nothing: what is in `output_dir` belongs together.

    Args:
        measured: of the clips, for `draw`.
        report, output_dir: as of `write_report`.
    Returns: the path of `report.md`.
    """
    with files_together(Path(output_dir), last=("report.json", "report.md"), afresh=True) as hidden:
        write_report(report, draw(measured, report, hidden / "plots"), hidden)
    return Path(output_dir) / "report.md"


def console_summary(report: Mapping[str, Any]) -> str:
    """The end of the console's output: the verdict and the main tables."""
    report = harmless(report)
    titles = {"summary": "Scores", "open_set": "Unknown clips", "augmentation": "Test-time augmentation"}
    tables = _tables(report)
    lines = [line.replace("**", "") for line in verdict(report)]
    shown = [f"{title}\n{tables[name]}" for name, title in titles.items() if tables[name]]
    return "\n\n".join([_subject(report), *lines, *shown])
