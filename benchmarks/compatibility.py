# SPDX-License-Identifier: Apache-2.0
"""What works with MMSER, and what ends in a clear error: files, arrays, Transformers, devices, exports, processes.

    python benchmarks/compatibility.py [--group files] [--write_docs]

Each row compares with a reference that does not pass through the code under test. The exit code is 1 if one is wrong.
Everything is tiny, on one processor core, and needs no network.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from benchmarks.situations import audio, common, library, networks, processes  # noqa: F401  # each adds its rows
from benchmarks.tables import Row, parse_arguments, publish, read_results, table

GROUPS = list(dict.fromkeys(row.group for row in common.SITUATIONS))


def judge(situation: common.Situation, world: common.World, debug: bool = False) -> Row:
    """Run one row: its outcome in words, and its seconds."""
    start = time.perf_counter()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            situation.check(world)
        outcome = "clear error" if situation.expectation.startswith("error") else "right"
    except common.Missing as missing:
        outcome = f"{missing} is not installed"
    except Exception as error:
        outcome = f"WRONG: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if debug:
            traceback.print_exc()
    seconds = round(time.perf_counter() - start, 2)
    return {
        "group": situation.group,
        "situation": situation.name,
        "expected": situation.expectation,
        "outcome": outcome,
        "seconds": seconds,
    }


def run(groups: Sequence[str], word: str = "", debug: bool = False) -> list[Row]:
    """The rows of these groups whose names have `word`."""
    chosen = [row for row in common.SITUATIONS if row.group in groups and word in row.name]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        world = common.World(Path(folder))
        return [judge(situation, world, debug) for situation in logging.tqdm(chosen, desc="situations", leave=False)]


def summarise(rows: Sequence[Row]) -> list[Row]:
    """A line for each group."""
    lines = []
    for group in dict.fromkeys(row["group"] for row in rows):
        outcomes = [row["outcome"] for row in rows if row["group"] == group]
        line = {"group": group, "situations": len(outcomes)}
        line |= {name: outcomes.count(name) for name in ("right", "clear error")}
        line["not installed"] = sum(outcome.endswith("not installed") for outcome in outcomes)
        lines.append(line | {"wrong": sum(outcome.startswith("WRONG") for outcome in outcomes)})
    total = {name: sum(line[name] for line in lines) for name in lines[0] if name != "group"}
    return [*lines, {"group": "all", **total}]


def make_tables(report: Row) -> dict[str, str]:
    details = [{name: value for name, value in row.items() if name != "seconds"} for row in report["rows"]]
    return {"compatibility": table(report["summary"]), "compatibility:rows": table(details)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=GROUPS, help="only these groups")
    parser.add_argument("--word", default="", help="only rows whose name has it")
    parser.add_argument("--debug", action="store_true", help="the traceback of what is wrong")
    options = parse_arguments(parser, "compatibility", arguments)
    if options.from_results:
        report = read_results(options.output)[0]
    else:
        torch.set_num_threads(1)
        logging.set_verbosity_error()
        rows = run(options.group, options.word, options.debug)
        report = {"summary": summarise(rows), "rows": rows}
        if options.group != GROUPS or options.word:
            options.output = Path(os.devnull)  # a part is shown and not kept
    publish(make_tables(report), report, [], options)
    return int(any(row["outcome"].startswith("WRONG") for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
