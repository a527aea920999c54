# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks share: means over seeds, short result files, and tables between markers in the docs.

A benchmark writes `results/NAME.json` (a summary, one row a line) and, where it has seeds, `results/NAME.csv` (one
measurement a line). Its tables are made from these two files alone: `--from_results` prints them, `--write_docs` puts
each one between `<!-- NAME -->` and `<!-- /NAME -->` of the documents.
"""

import argparse
import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmser.tables import format_table, strict_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SMALL_CARD = "checkpoints/mmser-small/README.md"
DOCUMENTS = tuple(ROOT / name for name in ("docs/results.md", "README.md", "model_card.md", SMALL_CARD))

Row = dict[str, Any]
BySeed = Mapping[Any, float]  # seed -> value


def cell(values: BySeed) -> str:
    """Mean ± standard deviation (n - 1) over seeds; of one seed the value alone; "-" for none."""
    numbers = np.array(list(values.values()), dtype=np.float64)
    if not len(numbers):
        return "-"
    spread = f" ± {numbers.std(ddof=1):.3f}" if len(numbers) > 1 else ""
    return f"{numbers.mean():.3f}{spread}"


def difference(first: BySeed, second: BySeed) -> str:
    """First minus second over the seeds that both have, as in `cell` but with a sign."""
    differences = {seed: first[seed] - second[seed] for seed in first if seed in second}
    positive = bool(differences) and float(np.mean(list(differences.values()))) >= 0
    return ("+" if positive else "") + cell(differences)


def mean(values: BySeed) -> float | None:
    return float(np.mean(list(values.values()))) if values else None


def three_digits(value: float) -> str:
    """At least three significant digits, and no exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: Sequence[Row], form: Callable[[float], str] = "{:.3f}".format) -> str:
    """Markdown table with the keys of all rows as columns; `form` writes floats, and a mapping is one of shares."""

    def short(value: Any) -> Any:
        if isinstance(value, Mapping):
            return ", ".join(f"{name} {share:.0%}" for name, share in value.items())
        return form(value) if isinstance(value, float) else value

    columns = list(dict.fromkeys(name for row in rows for name in row))
    return format_table([{name: short(value) for name, value in row.items()} for row in rows], columns)


def short_json(report: Mapping[str, Any]) -> str:
    """Strict JSON in which a row of a list, and a mapping of plain values, has one line."""

    def text(value: Any, indent: str) -> str:
        deeper = indent + "  "
        if isinstance(value, dict) and (not indent or any(isinstance(item, (dict, list)) for item in value.values())):
            items = [f"{json.dumps(key, ensure_ascii=False)}: {text(item, deeper)}" for key, item in value.items()]
            return f"{{\n{deeper}" + f",\n{deeper}".join(items) + f"\n{indent}}}"
        if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
            items = [json.dumps(item, ensure_ascii=False) for item in value]
            return f"[\n{deeper}" + f",\n{deeper}".join(items) + f"\n{indent}]"
        return json.dumps(value, ensure_ascii=False)

    return text(json.loads(strict_json(report)), "") + "\n"


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Rows with the columns of all of them; None is an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _parse(text: str) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text


def read_csv(path: Path) -> list[Row]:
    """What `write_csv` wrote; numbers are numbers again."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: _parse(text) for name, text in row.items()} for row in csv.DictReader(file)]


def read_results(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The summary, and the measurements of the CSV file beside it (none if there is no such file)."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run the benchmark, or name its results with --output")
    beside = path.with_suffix(".csv")
    return json.loads(path.read_text(encoding="utf-8")), read_csv(beside) if beside.is_file() else []


def write_tables(tables: Mapping[str, str], files: Sequence[Path] = DOCUMENTS) -> list[str]:
    """Put tables between `<!-- NAME -->` and `<!-- /NAME -->`, in each file that exists and has these markers.

    Returns: what was written, as "FILE: NAME".
    Raises:
        ValueError: a marker stands twice, or is not closed; nothing is written then.
    """
    written, texts = [], {}
    for file in (file for file in files if file.is_file()):
        text = file.read_text(encoding="utf-8")
        for name in re.findall(r"<!-- (\S+) -->", text):
            if name not in tables:
                continue
            start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
            if text.count(start) != 1 or text.count(end) != 1 or text.index(end) < text.index(start):
                raise ValueError(f"{file} must have {start} once and {end} once after it")
            before, after = text.split(start)[0], text.split(end)[1]
            text = f"{before}{start}\n\n{tables[name]}\n\n{end}{after}"
            written.append(f"{file.name}: {name}")
        texts[file] = text
    for file, text in texts.items():
        file.write_text(text, encoding="utf-8")
    return written


def parse_arguments(
    parser: argparse.ArgumentParser, name: str, arguments: Sequence[str] | None, required: Sequence[str] = ()
) -> argparse.Namespace:
    """Parse the flags of a benchmark and those that `publish` reads; only measuring needs the `required` ones."""
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json", help="the summary")
    parser.add_argument("--from_results", action="store_true", help="measure nothing, show the tables of --output")
    parser.add_argument("--write_docs", action="store_true", help="put the tables into docs/results.md and its like")
    options = parser.parse_args(arguments)
    missing = [name for name in required if getattr(options, name) is None]
    if missing and not options.from_results:
        parser.error(f"--{', --'.join(missing)} must be given, unless --from_results shows what was measured before")
    return options


def publish(
    tables: Mapping[str, str], report: Mapping[str, Any], lines: Sequence[Row], arguments: argparse.Namespace
) -> None:
    """Print tables and write what was measured: the summary, the measurements if there are any, and the docs."""
    print("\n\n".join(f"## {name}\n\n{text}" for name, text in tables.items()))
    if not arguments.from_results:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(short_json(report), encoding="utf-8")
        if lines:
            write_csv(arguments.output.with_suffix(".csv"), lines)
    if arguments.write_docs:
        print("\n".join(write_tables(tables)))
