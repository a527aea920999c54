# SPDX-License-Identifier: Apache-2.0
"""The tables of `real_speech.py`, made from its two result files alone."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.modalities import EXAMINED
from benchmarks.tables import BySeed, Row, cell, difference, mean, table

TABLES = ("study", "wide", "folds", "wide_trials", "tuning", "parts", "text", "generalisation", "compact")
FROZEN, HEARD, TUNED = "MMSER, frozen encoder", "MMSER, first stage", "MMSER, second stage"
ALONE, BEST = "MMSER, tuned once", "MMSER"
PLAIN_HEAD, ALL_ON = "plain head", "every part on"
FOLD_STAGES = "first stage", "second stage"
ALL_HEARD, ALL_TUNED, ALL_BEST = (f"{ALL_ON}, {name}" for name in (*FOLD_STAGES, "third stage"))
WIDE, WIDE_TUNED = "MMSER, frozen encoder, both sets", "MMSER, both sets"
LORA = "MMSER, second stage, LoRA of rank 16"
BOUNDS = "weighted_f1_low", "weighted_f1_high"  # 95 % interval of a score; runs of before these were kept have none
# What a run has besides scores; in the CSV file it stands on the run's first line
RUN_COLUMNS = ("validation_weighted_f1", "training_seconds", "parameters", "trainable_parameters", "megabytes")


class Results:
    """Values by seed, of the lines of the CSV file and of the rows of the summary (in the order of the tables)."""

    def __init__(self, rows: Sequence[Row], lines: Sequence[Row]):
        self.rows = {row["row"]: row for row in rows}
        self.groups: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)  # (row, score) -> group -> clips
        self.values: dict[tuple, dict[Any, float]] = defaultdict(dict)
        for line in lines:
            row, seed, score, group = (line[name] for name in ("row", "seed", "score", "group"))
            self.groups[row, score][group] = line["clips"]
            for name, value in line.items():
                if value is not None:
                    key = (row, name) if name in RUN_COLUMNS else (row, score, name, group)
                    self.values[key][seed] = value

    def of(self, row: str, score: str, metric: str = "weighted_f1", group: str = "all") -> BySeed:
        return self.values.get((row, score, metric, group), {})

    def run(self, row: str, name: str) -> float | None:
        """The mean of a column of `RUN_COLUMNS`."""
        return mean(self.values.get((row, name), {}))

    def names(self, kind: str) -> list[str]:
        return [name for name, row in self.rows.items() if row["table"] == kind]

    def seeds(self, row: str) -> str:
        return str(len(self.rows[row]["seeds"])) if row in self.rows and self.rows[row]["seeds"] else "-"

    def two(self, row: str, score: str, prefix: str = "") -> Row:
        """Weighted F1 and unweighted average recall, under the names of their columns."""
        metrics = {"weighted F1": "weighted_f1", "unweighted recall": "unweighted_average_recall"}
        return {prefix + name: cell(self.of(row, score, metric)) for name, metric in metrics.items()}

    def interval(self, row: str, score: str) -> str:
        """The 95 % interval of the weighted F1 over all clips, each bound the mean over seeds; "-" without one."""
        low, high = (mean(self.of(row, score, bound)) for bound in BOUNDS)
        return "-" if low is None or high is None else f"{low:.3f} to {high:.3f}"

    def seconds_of_training(self, row: str, runs: int = 1) -> float | None:
        """Of so many runs of a row, and of those whose checkpoints they start from."""
        own, entry = self.run(row, "training_seconds"), self.rows[row]
        if own is None or "starts_from" not in entry:
            return None if own is None else runs * own
        starts = entry["averages"] * (1 if entry.get("common_start") else runs)
        earlier = self.seconds_of_training(entry["starts_from"], starts)
        return None if earlier is None else runs * own + earlier


def millions(parameters: float | None) -> str:
    return "-" if parameters is None else f"{parameters / 1e6:.1f} M"


def models_table(results: Results, names: Sequence[str]) -> str:
    """Scores, size and seconds of training of some rows."""
    rows = []
    for name in names:
        seconds = results.seconds_of_training(name)
        heard_no_text = name in (HEARD, TUNED, ALL_HEARD, ALL_TUNED)
        # A model that was never trained with text ignores it: its own scores are those of audio alone
        alone = "audio_only" if results.of(name, "audio_only") else "model"
        rows.append(
            {
                "model": name,
                **results.two("" if heard_no_text else name, "model"),
                **results.two(name, alone, "audio alone: "),
                "audio alone: 95 % interval": results.interval(name, alone),
                "parameters": millions(results.run(name, "parameters")),
                "seconds of training": "-" if seconds is None else f"{seconds:.0f}",
                "seeds": results.seeds(name),
            }
        )
    return table(without_empty(rows, "audio alone: 95 % interval"))


def without_empty(rows: list[Row], column: str) -> list[Row]:
    """Without a column that is "-" in each row: of runs that were made before it was measured."""
    if any(row[column] != "-" for row in rows):
        return rows
    return [{name: value for name, value in row.items() if name != column} for row in rows]


def groups_tables(results: Results, names: Sequence[str], audio_alone: str) -> list[str]:
    """The weighted F1 of some rows by corpus and by language; of one row with audio alone too."""
    tables = []
    for column in ("corpus", "language"):
        rows = []
        for group, clips in sorted(results.groups["majority", "model"].items()):
            if group.startswith(f"{column}="):
                row = {column: group.split("=", 1)[1], "clips": clips}
                row |= {name: cell(results.of(name, "model", group=group)) for name in names}
                row[f"{audio_alone}, audio alone"] = cell(results.of(audio_alone, "audio_only", group=group))
                rows.append(row)
        if rows:
            tables.append(f"Weighted F1 by {column}:\n\n{table(rows)}")
    return tables


def study_table(results: Results) -> str:
    tables = groups_tables(results, ("majority", FROZEN, BEST), BEST)
    return "\n\n".join([models_table(results, results.names("study")), *tables])


def wide_table(results: Results) -> str:
    """What is trained on both sets, beside the best of the study, which is trained on the first."""
    tables = groups_tables(results, (BEST, WIDE, WIDE_TUNED), WIDE_TUNED)
    return "\n\n".join([models_table(results, [FROZEN, BEST, *results.names("wide")]), *tables])


def folds_table(results: Results) -> str:
    """A row for each head and stage: the weighted F1 of each fold of the speakers, and the mean of the folds."""
    rows = []
    for stage in FOLD_STAGES:
        means: dict[str, BySeed] = {}
        for head in (PLAIN_HEAD, ALL_ON):
            prefix = f"{head}, {stage}, "
            names = [name for name in results.names("folds") if name.startswith(prefix)]
            if not names:
                continue
            folds = {name.removeprefix(prefix): results.of(name, "model") for name in names}
            finished = set.intersection(*(set(scores) for scores in folds.values()))
            means[head] = {seed: sum(own[seed] for own in folds.values()) / len(folds) for seed in finished}
            row = {"model": prefix.removesuffix(", "), **{fold: cell(scores) for fold, scores in folds.items()}}
            change = difference(means[head], means[PLAIN_HEAD]) if head != PLAIN_HEAD else ""
            rows.append({**row, "mean of folds": cell(means[head]), "difference": change, "seeds": len(finished)})
    return table(rows)


def tuning_table(results: Results) -> str:
    """The second stage with adapters, between the first, which it starts from, and the second with all weights."""
    rows = []
    for name in (HEARD, *results.names("tuning"), TUNED):
        # As in the study: a model that was never trained with text ignores it
        score = "audio_only" if results.of(name, "audio_only") else "model"
        row: Row = {"model": name, **results.two(name, score, "audio alone: ")}
        row["trained parameters"] = millions(results.run(name, "trainable_parameters"))
        rows.append({**row, "seeds": results.seeds(name)})
    return table(rows)


def wide_trials_table(results: Results) -> str:
    """Each trial that is finished; the difference is to the first."""
    names = [name for name in results.names("wide_trials") if results.seeds(name) != "-"]
    rows = []
    for name in names:
        row: Row = {"trial": name, "trained parameters": millions(results.run(name, "trainable_parameters"))}
        row["seconds of its own"] = f"{results.run(name, 'training_seconds'):.0f}"
        row["audio alone: 95 % interval"] = results.interval(name, "audio_only")
        rows.append(row | compared(results, name, names[0]))
    return table(without_empty(rows, "audio alone: 95 % interval"))


def compared(results: Results, name: str, base: str) -> Row:
    """Scores of a row, and what they differ by from those of another."""
    row: Row = {}
    for score, prefix, suffix in (("model", "", ""), ("audio_only", "audio alone: ", ", audio alone")):
        changed = "" if name == base else difference(results.of(name, score), results.of(base, score))
        row |= {**results.two(name, score, prefix), f"difference{suffix}": changed}
    return row | {"seeds": results.seeds(name)}


def parts_table(results: Results) -> str:
    names = {FROZEN: "none"} | {name: name for name in results.names("parts")}
    return table([{"change": shown, **compared(results, name, FROZEN)} for name, shown in names.items()])


def text_table(results: Results) -> str:
    titles = ("both modalities", "audio alone", "text alone", "transcript of another clip", "audio of another clip")
    rows = []
    for name in results.names("text"):
        parts = sorted(group for group in results.groups[name, "model"] if group.startswith("part=")) or ["-"]
        for part in parts:
            scores = {t: cell(results.of(name, s, group=part)) for t, s in zip(titles, EXAMINED, strict=True)}
            row = {"model": name, "tested on": part.removeprefix("part="), **scores}
            row["share of the audio"] = cell(results.of(name, "model", "audio_share", part))
            rows.append({**row, "seeds": results.seeds(name)})
    return table(rows)


def generalisation_table(results: Results) -> str:
    """By corpus, then by language; what is both is in both tables."""
    tables = []
    for column in ("corpus", "language"):
        rows = []
        for name in results.names("generalisation"):
            value = results.rows[name]["leaves_out"].get(column)
            if value is None:
                continue
            row = {f"never heard: {column}": value, "clips": results.groups[name, "model"].get("all", "-")}
            row |= {"majority: weighted F1": cell(results.of(name, "majority")), **results.two(name, "model")}
            row |= results.two(name, "audio_only", "audio alone: ")
            heard = results.of(FROZEN, "model", group=f"{column}={value}")
            rows.append(row | {"heard, other speakers: weighted F1": cell(heard), "seeds": results.seeds(name)})
        if rows:
            tables.append(table(rows))
    return "\n\n".join(tables)


def compact_table(results: Results) -> str:
    """Beside the checkpoints that they were made of, which have four bytes for each parameter."""
    made_of = {name: results.rows[name]["starts_from"] for name in results.names("compact")}
    rows = []
    for base in dict.fromkeys(made_of.values()):
        for name in [base, *(name for name in made_of if made_of[name] == base)]:
            parameters, megabytes = results.run(name, "parameters"), results.run(name, "megabytes")
            if name == base and parameters is not None:
                megabytes = 4e-6 * parameters
            row = {"model": name, "parameters": millions(parameters)}
            row["MB"] = "-" if megabytes is None else f"{megabytes:.1f}"
            rows.append(row | compared(results, name, base))
    return table(rows)


MAKERS: dict[str, Callable[[Results], str]] = {
    "study": study_table,
    "wide": wide_table,
    "folds": folds_table,
    "wide_trials": wide_trials_table,
    "tuning": tuning_table,
    "parts": parts_table,
    "text": text_table,
    "generalisation": generalisation_table,
    "compact": compact_table,
}


def make_tables(report: Mapping[str, Any], lines: Sequence[Row]) -> dict[str, str]:
    """Markdown of each table with at least one finished row, by the name of its markers; below it what is missing."""
    results = Results(report["rows"], lines)
    tables = {}
    for name, make in MAKERS.items():
        missing = [row for row in results.names(name) if not results.rows[row]["seeds"]]
        if len(missing) < len(results.names(name)):
            note = f" Not finished: {'; '.join(missing)}." if missing else ""
            tables[f"real_speech:{name}"] = f"{make(results)}\n\nMean ± standard deviation over seeds.{note}"
    return tables
