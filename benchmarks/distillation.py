# SPDX-License-Identifier: Apache-2.0
"""What a small student learns from a teacher on real speech, against the same student with the labels alone.

    python benchmarks/distillation.py --data_dir ser4 --audio_encoder openai/whisper-base --teacher runs/mine

The student is the first layers of the encoder and hears audio alone. First its encoder is frozen, so that the teacher
answers each clip once (`--cache_encoder_states`); then it learns too, and the teacher answers in every step. As in
`real_speech.py`, a run is `train_hf.py` with a recipe, and a run that was stopped goes on with the same command.
"""

import argparse
import fnmatch
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.real_speech import STAGE_2, Row, Run, Study, Tree, alone_in, collect, exit_status
from benchmarks.real_speech_tables import Results, millions
from benchmarks.tables import ROOT, BySeed, cell, difference, parse_arguments, publish, read_results, table
from mmser.loading import load_emotion_dataset
from mmser.results import RESULTS_NAME

FROZEN_RECIPE = "real_speech_all_parts.json"
ALONE, TAUGHT = "labels alone", "labels and teacher"
ENCODERS = "frozen", "tuned"


def name_of(encoder: str, learns_from: str) -> str:
    return f"{encoder} encoder, {learns_from}"


def rows_of(options: argparse.Namespace) -> list[Row]:
    """Each student with and without the teacher; a tuned one starts from the frozen one that had the same."""
    # What the recipes say of the text has nothing to act on
    fixed: Tree = {"freeze_text": False, "text_dropout": 0.0}
    small: Tree = {"audio_num_hidden_layers": options.layers, "augment": False}
    rows = []
    for learns_from in (ALONE, TAUGHT):
        taught: Tree = {}
        if learns_from == TAUGHT:
            taught["teacher_name_or_path"] = str(options.teacher)
        weight = {"distillation_loss_weight": options.weight if taught else 0.0}
        frozen = {**fixed, **small, **taught, "config_overrides": {**weight, "classifier_num_layers": options.blocks}}
        tuned = {**fixed, **taught, "config_overrides": weight, "num_train_epochs": options.epochs}
        first, then = (name_of(encoder, learns_from) for encoder in ENCODERS)
        rows.append(Row(first, "distillation", FROZEN_RECIPE, changes=frozen, keep=True))
        rows.append(Row(then, "distillation", STAGE_2, changes=tuned, starts_from=first))
    return rows


class Students(Study):
    """The study of the students."""

    def recipe(self, run: Run) -> Tree:
        recipe = super().recipe(run)
        if not recipe.get("freeze_audio"):
            del recipe["cache_encoder_states"]  # no encoder is frozen
        return recipe


def read_teacher(folder: Path, data_dir: str) -> Tree:
    """What the teacher's own run left of its size and its scores, which must be on the same number of clips."""
    path = folder / RESULTS_NAME
    if not path.is_file():
        raise ValueError(f"--teacher {folder} has no {RESULTS_NAME}: name a finished run of train_hf.py")
    stored = json.loads(path.read_text(encoding="utf-8"))
    clips = {name: len(split) for name, split in load_emotion_dataset(data_dir)[0].items()}
    if stored["data"]["clips"] != clips:
        raise ValueError(f"--teacher was judged on {stored['data']['clips']}, --data_dir has {clips}")
    parts = {part["part"]: part["parameters"] for part in stored["parameters"]}
    scores = {f"{split}_weighted_f1": stored[split]["model"]["weighted_f1"] for split in ("validation", "test")}
    sizes = {"parameters": parts["all"], "parameters_without_text_encoder": parts["all"] - parts["text_encoder"]}
    return {**sizes, **scores}


def make_tables(report: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The teacher, then each student; "by the teacher" is what it gained over the same student and seed without."""
    results, teacher = Results(report["rows"], [dict(line) for line in lines]), report["teacher"]
    scores = {split: teacher[f"{split}_weighted_f1"] for split in ("validation", "test")}
    shown: list[Tree] = [{"model": "teacher", "parameters": millions(teacher["parameters"]), **scores}]
    for name in (name_of(encoder, learns_from) for encoder in ENCODERS for learns_from in (ALONE, TAUGHT)):
        if results.seeds(name) == "-":
            continue
        parameters = results.run(name, "parameters") or 0.0
        row: Tree = {"model": name, "parameters": millions(parameters)}
        row["of the teacher's"] = f"{parameters / teacher['parameters']:.1%}"
        for split, score in scores.items():
            own, plain = (by_seed(results, each, split) for each in (name, name.replace(TAUGHT, ALONE)))
            row[split] = cell(own)
            row[f"{split}: to the teacher"] = difference(own, dict.fromkeys(own, score))
            row[f"{split}: by the teacher"] = difference(own, plain) if name.endswith(TAUGHT) else ""
        shown.append({**row, "seeds": results.seeds(name)})
    columns = dict.fromkeys(column for row in (*shown[1:], shown[0]) for column in row)  # a student has all of them
    return {"distillation": table([{column: row.get(column, "") for column in columns} for row in shown])}


def by_seed(results: Results, name: str, split: str) -> BySeed:
    """Weighted F1 of a row."""
    return results.of(name, "model") if split == "test" else results.values[name, "validation_weighted_f1"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status: 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="real speech: train, validation and test")
    parser.add_argument("--audio_encoder", default="openai/whisper-base", help="of which the student has some layers")
    parser.add_argument("--teacher", type=Path, help="a finished run of train_hf.py on the same data")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/distillation"), help="for runs and encoder states")
    parser.add_argument("--recipes", type=Path, default=ROOT / "recipes")
    parser.add_argument("--layers", type=int, default=3, help="of the encoder that the student keeps")
    parser.add_argument("--blocks", type=int, default=15, help="of the student's classifier")
    parser.add_argument("--weight", type=float, default=1.0, help="of the teacher's answers, beside the labels")
    parser.add_argument("--epochs", type=int, default=3, help="in which the encoder learns too")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="GLOB", help="such as 'frozen*'")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parse_arguments(parser, "distillation", arguments, required=("data_dir", "teacher"))
    if options.from_results:
        report, lines = read_results(options.output)
        publish(make_tables(report, lines), report, lines, options)
        return 0
    torch.set_num_threads(options.threads)
    options.text_encoder = "none"
    teacher = read_teacher(options.teacher, options.data_dir)
    study = Students(options, rows_of(options))
    names = [name for name in study.rows if any(fnmatch.fnmatchcase(name, glob) for glob in options.rows)]
    with alone_in(options.work_dir):
        failed = study.execute(study.plan(names))
    report, lines = collect(study)
    settings = {name: getattr(options, name) for name in ("layers", "blocks", "weight", "epochs", "threads")}
    report = {"settings": settings, "teacher": teacher, **report}
    lines = [line for line in lines if line["group"] == "all"]
    publish(make_tables(report, lines), report, lines, options)
    return exit_status(failed)


if __name__ == "__main__":
    sys.exit(main())
