# SPDX-License-Identifier: Apache-2.0
"""Short summaries of what `train_hf.py` and `eval_hf.py` wrote about one run, and their tables for the docs.

    python benchmarks/judged.py demo demo_output/model/eval_results.json
    python benchmarks/judged.py demo_judgement demo_output/report/report.json
    python benchmarks/judged.py --from_results --write_docs

The first word is the name of the summary in `benchmarks/results`.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.tables import RESULTS, Row, publish, read_results, table

NAMES = ("demo", "demo_judgement", "ser4_judgement", "full_size_steps")
ROWS = ("model", "audio_only", "log_mel_probe", "text_only", "linear_probe", "majority")
METRICS = (
    *("clips", "weighted_f1", "weighted_f1_interval", "unweighted_average_recall", "accuracy"),
    *("expected_calibration_error", "negative_log_likelihood"),
    *("error_auroc_of_uncertainty", "error_auroc_of_max_probability", "area_under_risk_coverage"),
)
SCORES = {
    "openmax": "OpenMax",
    "max_softmax": "1 - max probability",
    "knn": "kNN distance, fused vectors (k = 10)",
    "knn_features": "kNN distance, features (k = 10)",
}
KEPT = ("command", "environment", "training", "temperature", "calibration", "fitted_calibration", "rejection")


def pick(values: Mapping[str, Any]) -> Row:
    return {name: values[name] for name in METRICS if values.get(name) is not None}


def summarise(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What the docs cite of an `eval_results.json` or of a `report.json`, one row a line."""
    summary = {name: stored[name] for name in KEPT if stored.get(name) is not None}
    summary["clips"] = {**stored["data"]["clips"], **stored.get("unknown_clips", {})}
    if "parameters" in stored:
        summary["parameters"] = {part["part"]: part["parameters"] for part in stored["parameters"]}
    names = (stored["split"],) if "rows" in stored else ("validation", "test")
    splits = {name: stored["rows"] if "rows" in stored else stored.get(name, {}) for name in names}
    summary["rows"] = [
        {"split": split, "row": row, **pick(rows[row])}
        for split, rows in splits.items()
        for row in ROWS
        if row in rows
    ]
    sets = stored.get("open_set", {})
    if sets and "auroc" in next(iter(sets.values())):  # of a training: one set, without a name
        sets = {"unknown": sets}
    summary["open_set"] = [
        {"set": name, "score": s, **values} for name, own in sets.items() for s, values in own.items()
    ]
    passes = stored.get("test_time_augmentation", [])
    summary["test_time_augmentation"] = [
        {"passes": row["passes"], "seconds": row["seconds"], **pick(row)} for row in passes
    ]
    return {name: value for name, value in summary.items() if value != []}


def make_tables(name: str, report: Mapping[str, Any]) -> dict[str, str]:
    """Scores of the test clips; with unknown clips also the mean over their sets, beside the AUROC of each set."""
    rows = [
        {
            "test clips": row["row"].replace("_", " "),
            "clips": row["clips"],
            "weighted F1": row["weighted_f1"],
            "95 % interval": "{:.3f} to {:.3f}".format(*row["weighted_f1_interval"]),
            "unweighted recall": row["unweighted_average_recall"],
        }
        for row in report["rows"]
        if row["split"] == "test" and "weighted_f1_interval" in row
    ]
    tables = {name: table(rows)} if rows else {}
    found: dict[str, Row] = {}
    for row in sorted(report.get("open_set", []), key=lambda row: row["set"] != "mean"):
        own = found.setdefault(row["score"], {"score": SCORES.get(row["score"], row["score"])})
        if row["set"] == "mean":
            own |= {"AUROC, mean": row["auroc"], "FPR95, mean": row["fpr_at_95_tpr"], "OSCR, mean": row["oscr"]}
        else:
            own[f"AUROC, {row['set'].replace('_', ' ')}"] = row["auroc"]
    rows = [row for row in found.values() if "AUROC, mean" in row]
    if rows:
        tables[f"{name}:open_set"] = table(sorted(rows, key=lambda row: -row["AUROC, mean"]))
    passes = [
        {
            "passes over each test clip": row["passes"],
            "weighted F1": row["weighted_f1"],
            "ECE": row["expected_calibration_error"],
            "NLL": row["negative_log_likelihood"],
            "ms per clip": f"{1000 * row['seconds'] / row['clips']:.0f}",
        }
        for row in report.get("test_time_augmentation", [])
    ]
    return tables | ({f"{name}:passes": table(passes)} if passes else {})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=NAMES)
    parser.add_argument("file", nargs="?", type=Path, help="eval_results.json or report.json")
    parser.add_argument("--from_results", action="store_true", help="show the tables of all summaries")
    parser.add_argument("--write_docs", action="store_true", help="put the tables into docs/results.md and its like")
    options = parser.parse_args(arguments)
    if not options.from_results and options.file is None:
        parser.error("give the name of a summary and the file that it is made of, or --from_results")
    for name in NAMES if options.from_results else [options.name]:
        options.output = RESULTS / f"{name}.json"
        if options.from_results:
            report, _ = read_results(options.output)
        else:
            report = summarise(json.loads(options.file.read_text(encoding="utf-8")))
        publish(make_tables(name, report), report, [], options)


if __name__ == "__main__":
    main()
