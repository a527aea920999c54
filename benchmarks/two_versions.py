# SPDX-License-Identifier: Apache-2.0
"""Is the default model as fast as it was? Another version of this repository against this one, in turns.

    git worktree add ../before 60fcec9
    python benchmarks/two_versions.py --before ../before

Each version is a process of its own with the default configuration at full size, random weights and the same batch.
They alternate, first one, then the other; what counts is the processor time of one thread, so that other work on the
machine disturbs less. The ratio is that of the medians.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
BATCH_SIZE, SECONDS, TOKENS = 2, 3, 24
KINDS = ("a forward pass", "a training step")


def answer() -> None:
    """Time what each line of the standard input names, with the modules of the working folder."""
    sys.path.insert(0, str(Path.cwd()))
    import torch

    from configuration_mmser import MMSERConfig
    from modeling_mmser import MMSERForAudioClassification

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MMSERForAudioClassification(MMSERConfig())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6)
    samples = 16000 * SECONDS
    batch = {
        "input_values": torch.randn(BATCH_SIZE, samples),
        "attention_mask": torch.ones(BATCH_SIZE, samples, dtype=torch.long),
        "input_ids": torch.randint(5, 1000, (BATCH_SIZE, TOKENS)),
        "text_attention_mask": torch.ones(BATCH_SIZE, TOKENS, dtype=torch.long),
    }
    for line in sys.stdin:
        start = time.process_time()
        if line.strip() == KINDS[0]:
            with torch.no_grad():
                model.eval()(**batch)
        else:
            model.train()(**batch, labels=torch.arange(BATCH_SIZE)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(time.process_time() - start, flush=True)


def measure(before: Path, turns: int) -> list[dict]:
    """A row for each kind of work."""
    command = [sys.executable, "-c", f"import runpy; runpy.run_path({str(Path(__file__).resolve())!r})['answer']()"]
    folders = (before, Path(__file__).parent.parent)
    pipe = subprocess.PIPE
    versions: list[Any] = [subprocess.Popen(command, cwd=f, stdin=pipe, stdout=pipe, text=True) for f in folders]

    def ask(version: int, kind: str) -> float:
        process = versions[version]
        print(kind, file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the version in {folders[version]} failed: its error stands above")
        return float(line)

    rows = []
    for kind in KINDS:
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(turns + 1):  # the first one warms up
            for version in (0, 1) if turn % 2 else (1, 0):
                times[version].append(ask(version, kind))
        old, new = (statistics.median(own[1:]) for own in times)
        rows.append({"of": kind, "before, s": old, "now, s": new, "ratio": new / old})
    for process in versions:
        process.stdin.close()
        process.wait()
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    from benchmarks.tables import parse_arguments, publish, read_results, table
    from mmser.results import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a folder with another version of this repository")
    parser.add_argument("--turns", type=int, default=15)
    options = parse_arguments(parser, "two_versions", arguments, required=("before",))
    if options.from_results:
        report, _ = read_results(options.output)
    else:
        commit = ["git", "-C", str(options.before), "rev-parse", "--short", "HEAD"]
        settings = {"batch": BATCH_SIZE, "seconds": SECONDS, "tokens": TOKENS, "threads": 1, "turns": options.turns}
        settings["before"] = subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip()
        rows = measure(options.before, options.turns)
        report = {"settings": settings, "environment": environment(), "rows": rows}
    publish({"two_versions": table(report["rows"])}, report, [], options)


if __name__ == "__main__":
    main()
