# SPDX-License-Identifier: Apache-2.0
"""What a training does with bad files among thousands: are all of them found and listed, how long does it take?

    python benchmarks/bad_data.py --files 5000

Makes recordings, spoils some in several ways and trains a small model for a few steps with `--on_bad_example skip`, in
a process of its own: with few bad files, which must finish, and with many, which must stop early. Clips that are
silent or clipped can be read, and a label may be written otherwise: these are no bad rows, and must not be listed. At
last with labels of no class: few of each, which are left out and listed, and many, which must be refused before a clip
is read, as they may be a class that would be lost.
"""

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.tables import ROOT, Row, parse_arguments, publish, read_csv, read_results, table
from mmser.bad_rows import BAD_EXAMPLES
from mmser.results import environment

RATE = 16_000
LABELS = ("neutral", "happy", "sad", "angry")
UNREADABLE = ("corrupt", "empty", "cut in the header", "missing", "without a label")
READABLE = ("silent", "clipped", "another spelling")
KINDS = (*UNREADABLE, *READABLE)
OF_NO_CLASS = "a label of no class"
FEW, MANY = 0.02, 0.4  # of the files, three eighths of which can be used
MODEL = {
    "audio_model_name_or_path": str(ROOT / "demo" / "log_mel_encoder"),
    "random_audio_encoder": True,
    "text_model_name_or_path": "none",
    "config_overrides": {"classifier_num_layers": 5},
    "max_steps": 20,
    "save_strategy": "no",
    "eval_strategy": "no",
    "dataloader_num_workers": 0,
    "use_cpu": True,
    "on_bad_example": "skip",
    "labels": LABELS,
}


def make_corpus(
    folder: Path, files: int, bad_share: float, kinds: Sequence[str] = KINDS, seed: int = 0
) -> dict[str, str]:
    """
    Write `metadata.csv` and its clips, one to three seconds of a tone whose pitch goes by the class.

    Returns: what is wrong with each spoilt file, by its name: as many of each kind.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    spoilt = rng.permutation(files)[: round(files * bad_share)]
    found = {f"{number}.wav": kinds[place % len(kinds)] for place, number in enumerate(spoilt)}
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as table_file:
        writer = csv.writer(table_file)
        writer.writerow(["file_name", "label", "speaker", "split"])
        for number in range(files):
            label, speaker = number % len(LABELS), number // 100
            name = f"{number}.wav"
            write_clip(folder / name, label, found.get(name), rng)
            spellings = {"without a label": "", "another spelling": f" {LABELS[label].upper()} "}
            spellings[OF_NO_CLASS] = LABELS[label][:-1]
            named = spellings.get(found.get(name, ""), LABELS[label])
            writer.writerow([name, named, f"speaker {speaker}", "train" if speaker % 10 else "validation"])
    return found


def write_clip(path: Path, label: int, kind: str | None, rng: np.random.Generator) -> None:
    """One clip, spoilt in the way that `kind` names."""
    if kind == "missing":
        return
    time_axis = np.arange(int(RATE * rng.uniform(1, 3))) / RATE
    tone = np.sin(2 * np.pi * 150 * (label + 1) * rng.uniform(0.9, 1.1) * time_axis)
    loudness = {"silent": 0.0, "clipped": 20.0}.get(str(kind), 0.3)
    soundfile.write(path, np.clip(loudness * (tone + rng.normal(0, 0.1, len(tone))), -1, 1), RATE)
    if kind == "corrupt":
        path.write_bytes(rng.bytes(path.stat().st_size))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut in the header":
        path.write_bytes(path.read_bytes()[:20])


def train(corpus: Path, output: Path) -> tuple[int, str, float, float]:
    """Train in a process of its own. Returns: exit status, what it wrote to stderr, seconds, and peak MB of memory."""
    recipe = corpus / "recipe.json"
    recipe.write_text(json.dumps({**MODEL, "manifest": str(corpus / "metadata.csv"), "output_dir": str(output)}))
    start = time.perf_counter()
    with (corpus / "errors.txt").open("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train_hf.py"), str(recipe)],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        said = errors.read()
    return process.returncode, said, time.perf_counter() - start, usage.ru_maxrss / 1e3


def measure(files: int, bad_share: float, folder: Path, kinds: Sequence[str] = KINDS) -> Row:
    """A row of the table: one corpus, one training."""
    spoilt = make_corpus(folder / "corpus", files, bad_share, kinds)
    unreadable = {name for name, kind in spoilt.items() if kind in (*UNREADABLE, OF_NO_CLASS)}
    status, said, seconds, megabytes = train(folder / "corpus", folder / "run")
    problems = [row["problem"] for row in read_csv(path)] if (path := folder / "run" / BAD_EXAMPLES).is_file() else []
    numbers = [int(re.findall(r" row (\d+)", problem)[0]) - 2 for problem in problems]  # the header is row 1
    listed = {f"{number}.wav" for number in numbers}
    return {
        "files": files,
        "spoilt": len(spoilt),
        "of no class": list(spoilt.values()).count(OF_NO_CLASS),
        "cannot be used": len(unreadable),
        "listed": len(listed),
        "listed wrongly": len(listed - unreadable),
        "exit status": status,
        "says": next(line for line in said.splitlines()[::-1] if line.startswith("error: "))[:70] if status else "",
        "seconds": round(seconds, 1),
        "peak MB": round(megabytes),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=5000)
    options = parse_arguments(parser, "bad_data", arguments)
    report: Mapping[str, Any]
    if options.from_results:
        report, _ = read_results(options.output)
    else:
        rows = []
        for share, kinds in ((0.0, KINDS), (FEW, KINDS), (MANY, KINDS), (FEW, (OF_NO_CLASS,)), (MANY, (OF_NO_CLASS,))):
            folder = Path(tempfile.mkdtemp(prefix="bad_data_"))
            try:
                rows.append(measure(options.files, share, folder, kinds))
            finally:
                shutil.rmtree(folder)
        report = {"environment": environment(), "rows": rows}
    publish({"bad_data": table(report["rows"], str)}, report, [], options)
    return dict(report)


if __name__ == "__main__":
    main()
