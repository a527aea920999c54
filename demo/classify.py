# SPDX-License-Identifier: Apache-2.0
"""Classify test clips of the demo corpus with the checkpoint that `make demo` trained.

python demo/classify.py demo_output/model demo_output/corpus

It runs the checkpoint's own code in another working directory, as on a machine without MMSER.
"""

import argparse
import csv
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import pipeline
from transformers.utils import logging


def describe(best: dict[str, Any]) -> str:
    """The answer to a clip in words, of the pipeline's best label: "unknown" first where the clip is rejected."""
    score = f"{best['label']} {best['score']:.3f}"  # two digits would call 0.996 a certainty
    if best["is_unknown"]:
        return f"unknown (nearest of the classes: {score})"
    return f"{score}, uncertainty {best['uncertainty']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--clips", type=int, default=10, help="clips of the test split to classify")
    parser.add_argument("--report", type=Path, help="report.json of eval_hf.py on the whole test split")
    arguments = parser.parse_args()
    checkpoint, corpus = arguments.checkpoint.resolve(), arguments.corpus.resolve()
    report = arguments.report and arguments.report.resolve()

    rows = []
    for split, count in (("test", arguments.clips), ("ood", 2)):
        with open(corpus / split / "metadata.csv", encoding="utf-8", newline="") as file:
            clips = list(csv.DictReader(file))
        rows += [(split, row) for row in clips[:: max(1, len(clips) // count)][:count]]  # from all over the split

    with tempfile.TemporaryDirectory() as folder:
        logging.disable_progress_bar()  # the weights take a moment
        os.chdir(folder)  # an empty folder: nothing of MMSER can be imported from it
        classifier = pipeline("audio-classification", model=str(checkpoint), trust_remote_code=True, device="cpu")
        for split, row in rows:
            clip = {"path": str(corpus / split / row["file_name"]), "text": row["transcription"] or None}
            best = classifier(clip, top_k=1, return_uncertainty=True)[0]
            print(
                f"{row['emotion']:>12} ({row['language']}) {row['transcription'] or '-'}\n{'':>12} -> {describe(best)}"
            )
        model: Any = classifier.model
        os.chdir(checkpoint)
    share = model.config.openmax_acceptance
    if share is not None and model.openmax.has_thresholds:
        print(f"\nThe thresholds are made to accept {100 * share:g} % of known clips: a few of them end as unknown.")
        if report is not None:
            accepted = json.loads(report.read_text(encoding="utf-8"))["rejection"]["known_accepted"]
            print(f"Of all known test clips they accept {100 * accepted:.1f} %.")
    print("\nThe corpus is synthetic speech from eSpeak NG: these scores say nothing about human emotion.")


if __name__ == "__main__":
    main()
