# SPDX-License-Identifier: Apache-2.0
"""Classify test clips of the demo corpus with the checkpoint that `make demo` trained.

python demo/classify.py demo_output/model demo_output/corpus

It runs the checkpoint's own code in another working directory, as on a machine without MMSER.
"""

import argparse
import csv
import os
import tempfile
from pathlib import Path

from transformers import pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--clips", type=int, default=4, help="clips of the test split to classify")
    arguments = parser.parse_args()
    checkpoint, corpus = arguments.checkpoint.resolve(), arguments.corpus.resolve()

    rows = []
    for split, count in (("test", arguments.clips), ("ood", 2)):
        with open(corpus / split / "metadata.csv", encoding="utf-8", newline="") as file:
            rows += [(split, row) for row in list(csv.DictReader(file))[:count]]

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # an empty folder: nothing of MMSER can be imported from it
        classifier = pipeline("audio-classification", model=str(checkpoint), trust_remote_code=True, device="cpu")
        for split, row in rows:
            clip = {"path": str(corpus / split / row["file_name"]), "text": row["transcription"] or None}
            best = classifier(clip, top_k=1, return_uncertainty=True)[0]
            unknown = best["unknown_probability"]
            rejected = " (rejected)" if best["is_unknown"] else ""
            print(
                f"{row['emotion']:>12} ({row['language']}) {row['transcription'] or '-'}\n"
                f"{'':>12} -> {best['label']} {best['score']:.2f}, uncertainty {best['uncertainty']:.2f}, "
                f"unknown {'not fitted' if unknown is None else f'{unknown:.2f}'}{rejected}"
            )
        os.chdir(checkpoint)
    print("\nThe corpus is synthetic speech from eSpeak NG: these scores say nothing about human emotion.")


if __name__ == "__main__":
    main()
