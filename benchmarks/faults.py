# SPDX-License-Identifier: Apache-2.0
"""What is left when a command is killed at any moment, or its disk is full or read-only: does the same command, given
again, end as if nothing had happened, and is a half-written file ever taken for a whole one?

    python benchmarks/faults.py --cases 30

Each campaign runs a command of the project on a tiny corpus, first undisturbed, then once for each fault, and again
after it. Processes are forked from this one, which has imported all they need. The full disk is a tmpfs, which only
root can mount; others go without these rows.
"""

import argparse
import contextlib
import fnmatch
import functools
import gc
import hashlib
import importlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow.parquet
import safetensors.torch
import soundfile
import torch
from transformers import BertConfig, BertModel, Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import tiny_corpus  # type: ignore[import-not-found]
from tiny import fit_openmax_by_chance  # type: ignore[import-not-found]

import eval_hf
import export_hf
import predict_hf
import train_hf
from benchmarks.fault_injection import Fault, Run, run
from benchmarks.tables import Row, parse_arguments, publish, read_results, table, three_digits
from mmser import corpus_command
from mmser.results import environment
from mmser.trainer import last_complete_checkpoint
from modeling_mmser import register_auto_classes

# What the commands import late, so that the forks have it
LATE = (
    *("mmser.adaptation", "mmser.corpus_conversion", "mmser.distillation", "mmser.evaluation_run", "mmser.export"),
    *("mmser.lora", "mmser.microphone", "mmser.prediction_parts", "mmser.prediction_run", "mmser.prediction_screen"),
    *("mmser.pruning_run", "mmser.publishing", "mmser.report", "mmser.search", "mmser.training_run"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "optuna", "peft"),
)
KINDS = ("operation", "within a file", "moment", "full disk", "read-only")
# Not compared: seconds and what is made of them, and whether a calibration was stored by this run or by the one that
# was killed
TIMES = re.compile(
    r"^.*(runtime|_per_second|seconds|^It took|Written by MMSER|\"changed\":|^The temperature is).*$", re.MULTILINE
)


class Campaign(NamedTuple):
    """
    A command that writes into a folder.

    Args:
        main: of the command.
        arguments: by the name of the folder.
        parts: by the name of a file that says that something is whole: patterns of what it is made of.
        earlier: arguments of the run that was there before; None for none.
        start: a folder with what was there before both.
        goes_on: from the folder after a fault, what the command must say when it is given again.
        check: of the folder at the end: what is wrong with it.
        varies: patterns of files that no two runs make alike, which only `check` looks at.
        when_whole: what the command says, and does nothing, where an earlier run has made all of it.
    """

    main: Callable[[list[str]], Any]
    arguments: Callable[[Path], list[str]]
    parts: Mapping[str, Sequence[str]]
    earlier: Callable[[Path], list[str]] | None = None
    start: Path | None = None
    goes_on: Callable[[Path], str] = lambda folder: ""
    check: Callable[[Path], list[str]] = lambda folder: []
    varies: Sequence[str] = ()
    when_whole: str | None = None


# ---- what is in a folder -------------------------------------------------------------------------------------------


def contents(folder: Path, varies: Sequence[str] = ()) -> dict[str, str]:
    """The checksum of each file by its name, without seconds in JSON and Markdown. A cache is its checked files."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, data = str(path.relative_to(folder)), path.read_bytes()
        if any(fnmatch.fnmatch(name, pattern) for pattern in varies):
            continue
        if path.suffix in (".json", ".md"):
            data = TIMES.sub("", data.decode(errors="replace")).encode()
        if name.startswith("states") and path.suffix == ".safetensors":
            is_whole = hashlib.blake2b(data, digest_size=20).hexdigest() == path.stem
            name, data = f"{path.parent.relative_to(folder)}/{'whole' if is_whole else path.name}", b""
        found[name] = hashlib.blake2b(data, digest_size=10).hexdigest()
    return found


def losses(folder: Path) -> dict[tuple[int, str], float]:
    """All that was logged of each step, times apart."""
    path = folder / "trainer_state.json"
    history = json.loads(path.read_text(encoding="utf-8"))["log_history"] if path.is_file() else []
    return {
        (entry["step"], name): value
        for entry in history
        for name, value in entry.items()
        if not TIMES.match(name) and isinstance(value, float)
    }


def half_written(campaign: Campaign, before: Mapping, now: Mapping, after: Mapping) -> list[str]:
    """Files that a user would take for whole ones, and that are neither those of before nor those of a whole run."""
    seen = {name: now[name] for name in now if not re.search(r"(^|/)(\.|checkpoint-)|\.tmp$", name)}
    wrong = [name for name in seen if seen[name] not in (before.get(name), after.get(name))]
    for marker, patterns in campaign.parts.items():
        for whole, other in ((before, after), (after, before)):
            for name in fnmatch.filter(whole, marker):
                if now.get(name) == whole[name] != other.get(name):
                    parts = {part for pattern in patterns for part in fnmatch.filter({*whole, *seen}, pattern)}
                    wrong += [f"{part} of {name}" for part in parts if whole.get(part) != now.get(part)]
    return sorted(set(wrong))


# ---- the campaigns -------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What one fault did: whether it hit, what is wrong (of the kinds "lost", "wrong" and "hung") and the seconds."""

    hit: bool
    problems: list[tuple[str, str]]
    difference: float
    seconds: float


def start_over(campaign: Campaign, folder: Path) -> dict[str, str]:
    """Leave in the folder what was there before the command. Returns: its `contents`."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if campaign.start is not None:
        shutil.copytree(campaign.start, folder, dirs_exist_ok=True)
    return contents(folder)


def suffer(campaign: Campaign, folder: Path, fault: Fault, whole: Mapping, curve: Mapping) -> Outcome:
    """One fault, and the same command again."""
    before = start_over(campaign, folder)
    arguments, problems = campaign.arguments(folder), []
    with scarce(folder, fault):
        first = run(campaign.main, arguments, folder, fault)
        now = contents(folder, campaign.varies)
        problems += [("wrong", name) for name in half_written(campaign, before, now, whole)]
    is_refused = fault.kind in ("full disk", "read-only")
    if is_refused and first.code and (first.said.count("error: ") != 1 or "Traceback" in first.said):
        problems.append(("wrong", f"no clear error: {first.said[-2000:]}"))
    must_say = campaign.goes_on(folder)
    again = run(campaign.main, arguments, folder)
    for one in (first, again):
        problems += [("hung", one.said[-300:])] if one.code is None else []
    is_over = campaign.when_whole is not None and campaign.when_whole in again.said and now == whole
    if not is_over and (again.code or must_say not in again.said):
        problems.append(("lost", again.said[-2000:]))
    now, own = contents(folder, campaign.varies), losses(folder)
    problems += [("wrong", f"{name} at the end") for name in {*now, *whole} if now.get(name) != whole.get(name)]
    problems += [("wrong", f"step and name {key} at the end") for key in own.keys() ^ curve.keys()]
    problems += [("wrong", problem) for problem in campaign.check(folder)] if is_over or not again.code else []
    difference = max((abs(own[key] - curve[key]) for key in own.keys() & curve.keys()), default=0.0)
    return Outcome(first.code != 0, problems, difference, first.seconds + again.seconds)


@contextlib.contextmanager
def scarce(folder: Path, fault: Fault) -> Iterator[None]:
    """A folder on a disk that is too small, or read-only."""
    if fault.kind == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    elif fault.kind == "full disk":
        subprocess.run(["mount", "-o", f"remount,size={int(fault.size)}", folder], check=True)
    try:
        yield
    finally:
        if fault.kind in ("full disk", "read-only"):
            subprocess.run(["mount", "-o", "remount,rw,size=4G", folder], check=True)


def plan(kind: str, cases: int, calm: Run, before: int, after: int, rng: np.random.Generator) -> list[Fault]:
    """Faults of one kind, spread evenly over a run, each at random within its share."""
    shares = (np.arange(cases) + rng.random(cases)) / cases
    if kind == "moment":
        return [Fault(kind, share * calm.seconds) for share in shares]
    if kind == "full disk":
        return [Fault(kind, 0, before + share * after) for share in shares]
    sizes = 10 ** rng.uniform(2, 5, cases)
    numbers = 1 + (shares * calm.changes).astype(int)
    return [Fault(kind, int(number), int(size)) for number, size in zip(numbers, sizes, strict=True)]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def undisturbed(name: str, campaign: Campaign, arguments: Callable[[Path], list[str]], folder: Path) -> Run:
    """A run without a fault, whose results stay in the folder."""
    start_over(campaign, folder)
    done = run(campaign.main, arguments(folder), folder)
    if done.code:
        raise RuntimeError(f"{name} fails without a fault: {done.said[-3000:]}")
    if problems := campaign.check(folder):
        raise RuntimeError(f"{name} is wrong without a fault: {', '.join(problems)}")
    return done


def measure(name: str, campaign: Campaign, folder: Path, cases: Mapping[str, int]) -> list[Row]:
    """The rows of a campaign: `cases` of each kind of fault."""
    if campaign.earlier is not None:
        undisturbed(name, campaign, campaign.earlier, folder)
        campaign = campaign._replace(start=folder.parent / f"earlier {name}")
        shutil.copytree(folder, cast(Path, campaign.start))
    # Twice where the seconds matter: the first run of a process is slower
    turns = range(2 if "moment" in cases else 1)
    calm = min((undisturbed(name, campaign, campaign.arguments, folder) for _ in turns), key=lambda run: run.seconds)
    before = size_of(campaign.start) if campaign.start else 0
    whole, curve, after = contents(folder, campaign.varies), losses(folder), size_of(folder)
    rows, rng = [], np.random.default_rng(0)
    for kind, number in cases.items():
        if kind in ("full disk", "read-only") and not folder.is_mount():
            continue
        outcomes = []
        for fault in plan(kind, number, calm, before, after, rng):
            outcomes.append(outcome := suffer(campaign, folder, fault, whole, curve))
            for problem in outcome.problems:
                print(f"{name}, {fault}: {': '.join(problem)}", file=sys.stderr, flush=True)
        kinds = [{problem for problem, _ in one.problems} for one in outcomes]
        rows.append(
            {
                "command": name,
                "fault": kind,
                "cases": len(outcomes),
                "hit": sum(one.hit for one in outcomes),
                **{problem: sum(problem in own for own in kinds) for problem in ("lost", "wrong", "hung")},
                "largest difference": max(one.difference for one in outcomes) if curve else "-",
                "seconds a case": round(float(np.mean([one.seconds for one in outcomes])), 1),
                "changes": calm.changes,
                "MB": round(after / 1e6, 2),
            }
        )
    return rows


def flags(**given: Any) -> list[str]:
    """Arguments of a command; a tuple gives a flag several values."""
    values = {name: value if isinstance(value, tuple) else (value,) for name, value in given.items()}
    return [part for name, own in values.items() for part in (f"--{name}", *map(str, own))]


def make_models(folders: Sequence[str]) -> None:
    """A checkpoint with weights by chance, for what is done with one, and encoders that get adapters."""
    torch.manual_seed(3)
    encoders = Path(folders[1])
    audio, text = cast(Any, tiny_corpus.AUDIO), cast(Any, tiny_corpus.TEXT)
    Wav2Vec2Model(Wav2Vec2Config(**audio)).save_pretrained(encoders / "audio")
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(encoders / "audio")
    words = len(tiny_corpus.tiny_tokenizer())
    BertModel(BertConfig(vocab_size=words, **text)).save_pretrained(encoders / "text")
    tiny_corpus.tiny_tokenizer().save_pretrained(encoders / "text")
    model = tiny_corpus.tiny_model(dropout=False, class_counts=[8, 9, 7, 8])
    fit_openmax_by_chance(model)
    register_auto_classes()
    model.save_pretrained(folders[0])
    tiny_corpus.tiny_processor().save_pretrained(folders[0])


def resumes(folder: Path) -> str:
    """What a training says that goes on from a checkpoint; nothing where there is none."""
    checkpoint = last_complete_checkpoint(folder)
    return f"Resuming from {checkpoint}" if checkpoint else ""


def makes_the_rest(folder: Path, parts: int) -> str:
    """What a prediction in parts says that makes those alone that are not there."""
    missing = parts - len(list(folder.glob("answers/parts/part-*")))
    return f" 1 of {missing} to make\n" if missing else "Written: "


def not_each_once(folder: Path, clips: Path) -> list[str]:
    """Clips that are not there once, and in their order, in the one file of all answers."""
    path = folder / "answers" / "answers.parquet"
    answers = pyarrow.parquet.read_table(path)["file"].to_pylist() if path.is_file() else []
    expected = sorted(str(path) for path in clips.glob("*.wav"))
    return [] if answers == expected else [f"the answers are to {answers}, not to {expected}"]


def write_downloaded(folder: Path) -> None:
    """A corpus as its authors give it: RAVDESS, of seven actors, in clips that differ."""
    rng = np.random.default_rng(5)
    for actor in range(1, 8):
        place = folder / f"Actor_{actor:02}"
        place.mkdir(parents=True)
        for emotion in range(1, 9):
            name = f"03-01-{emotion:02}-01-{2 - actor % 2:02}-01-{actor:02}.wav"
            soundfile.write(place / name, rng.uniform(-0.1, 0.1, 800), tiny_corpus.RATE)


def write_streamed(corpus: Path, folder: Path) -> None:
    """The clips of a corpus as a data set that can be streamed: its tables say where each file is."""
    for split in ("train", "validation", "test"):
        rows = tiny_corpus.bring(tiny_corpus.read_rows(corpus, split), folder)
        named = [{**row, "file_name": str(folder / row["file_name"])} for row in rows]
        tiny_corpus.write_table(folder / f"{split}.csv", named)


def not_best(folder: Path, trials: int) -> list[str]:
    """What is wrong with a search that has ended: trials that are missing, or a best one without its whole model."""
    search = folder / "search"
    with contextlib.closing(sqlite3.connect(search / "search.db")) as database:
        scores = dict(
            database.execute(
                "SELECT trials.number, value FROM trials JOIN trial_values USING (trial_id) WHERE state = 'COMPLETE'"
            )
        )
    if len(scores) != trials:
        return [f"{len(scores)} of {trials} trials are done"]
    best = max(scores, key=lambda number: (scores[number], -number))
    kept = sorted(path.name for path in search.glob("trial-*") if path.is_dir())
    recipe = json.loads((search / "best_recipe.json").read_bytes())
    own = json.loads((search / f"trial-{best}.json").read_bytes())
    results = json.loads((search / f"trial-{best}" / "eval_results.json").read_bytes())
    # Read, not mapped: a file that is deleted and still mapped keeps its disk from becoming read-only
    weights = safetensors.torch.load((search / f"trial-{best}" / "model.safetensors").read_bytes())
    seen = {
        "the folders": kept == [f"trial-{best}"],
        "the recipe": {**recipe, "output_dir": ""} == {**own, "output_dir": ""},
        "the score": results["validation"]["model"]["weighted_f1"] == scores[best],
        "the weights": all(bool(weight.isfinite().all()) for weight in weights.values()),
    }
    return [name for name, is_right in seen.items() if not is_right]


STEPS = {"eval_strategy": "steps", "save_strategy": "steps", "learning_rate": 1e-3}
USABLE = ("config.json", "processor_config.json", "tokenizer*", "*.py")


def training(base: Path, **more: Any) -> Campaign:
    """A training whose flags are changed; the folders of these names lie in its own."""

    def arguments(folder: Path) -> list[str]:
        named = {name: folder / value if name == "cache_encoder_states" else value for name, value in more.items()}
        corpus = base / "corpus"
        own = {**STEPS, "ood_dir": corpus / "ood", **named}
        return tiny_corpus.tiny_flags(corpus, folder, base / "tokenizer", **own)

    whole = {"model.safetensors": USABLE, "adapter_model.safetensors": USABLE, "README.md": ("*",)}
    return Campaign(train_hf.main, arguments, whole, goes_on=resumes)


def trainings(base: Path) -> dict[str, Campaign]:
    """Those that are trained; `base` has what `campaigns` needs."""
    checkpoint, encoders = base / "start" / "checkpoint", base / "encoders"
    train = functools.partial(training, base)
    frozen = {"freeze_audio": True, "freeze_text": True, "cache_encoder_states": "states", "augmented_copies": 2}
    rare = {"max_steps": 9, "eval_steps": 3, "save_steps": 3, "save_total_limit": 2}
    distilled = {"config_overrides": {**tiny_corpus.JOINT, "distillation_loss_weight": 0.5}}
    new = ("random_audio_encoder", "audio_config_overrides", "random_text_encoder", "text_config_overrides")
    no_new = dict.fromkeys(new)
    pretrained = {"audio_model_name_or_path": encoders / "audio", "text_model_name_or_path": encoders / "text"}
    # Of a checkpoint, in half a minute: its steps are not saved
    adapting = {**no_new, "tokenizer_name": None, "config_overrides": None, "model_name_or_path": checkpoint}
    adapting |= dict.fromkeys(("max_steps", "eval_strategy", "learning_rate", "save_strategy"))
    return {
        "train, frozen, cached": train(**frozen, **rare),
        "train, all parts": train(
            max_steps=12, eval_steps=4, save_steps=4, logging_steps=3, save_total_limit=1, weight_averaging=0.9
        ),
        "train, two workers": train(dataloader_num_workers=2, **rare),
        "train --streaming": train(data_dir=None, dataset_name=base / "streamed", streaming=True, **rare),
        "train, distilled, cached": train(teacher_name_or_path=checkpoint, **frozen, **distilled, **rare),
        "train, LoRA": train(**no_new, **pretrained, lora_rank=2, lora_save="adapter", **rare),
        "train --adapt": train(adapt=True, **adapting)._replace(when_whole="holds a finished run"),
        "train --hp_search": Campaign(
            train_hf.main,
            lambda folder: training(base, hp_search=2, **rare).arguments(folder / "search"),
            {},
            check=functools.partial(not_best, trials=2),
            varies=("*",),
        ),
    }


def campaigns(base: Path) -> dict[str, Campaign]:
    """All of them; `base` has the corpus, the tokenizer, a checkpoint, encoders and a corpus of others."""
    corpus, checkpoint = base / "corpus", base / "start" / "checkpoint"

    def evaluate(folder: Path, **more: Any) -> list[str]:
        return flags(
            **{"checkpoint": folder / "checkpoint", "output_dir": folder / "report", "data_dir": corpus},
            **{
                "ood_dir": corpus / "ood",
                "use_cpu": True,
                "dataloader_num_workers": 0,
                "bootstrap_samples": 20,
                **more,
            },
        )

    def to_export(folder: Path, **more: Any) -> list[str]:
        own = {"format": ("onnx", "safetensors"), **more}
        return flags(checkpoint=checkpoint, output_dir=folder / "export", overwrite_output_dir=True, **own)

    def predict(folder: Path, split: str = "test") -> list[str]:
        own = flags(checkpoint=checkpoint, output=folder / "answers.csv", overwrite=True, device="cpu")
        return [str(corpus / split), *own]

    def predict_in_parts(folder: Path) -> list[str]:
        own = flags(checkpoint=checkpoint, output_dir=folder / "answers", part_size=2, device="cpu")
        return [str(corpus / "test"), *own]

    def convert(folder: Path) -> list[str]:
        return ["ravdess", "--copy", *flags(input=base / "downloaded", output=folder / "ravdess")]

    pruned: dict[str, Any] = {
        "prune": 0.5,
        "recovery_epochs": 1,
        "calibration_clips": 8,
        "data_dir": corpus,
        "use_cpu": True,
    }
    part = functools.partial
    return {
        **trainings(base),
        "eval": Campaign(
            eval_hf.main,
            evaluate,
            {"report/report.md": ("report/*",)},
            part(evaluate, bootstrap_samples=10),
            base / "start",
        ),
        "eval --calibrate": Campaign(
            eval_hf.main,
            part(evaluate, calibrate=True),
            {"report/report.md": ("report/*",)},
            evaluate,
            base / "start",
        ),
        "export": Campaign(
            export_hf.main,
            to_export,
            {"export/*": ("export/*",)},
            part(to_export, format="safetensors", dtype="float16"),
        ),
        "export --prune": Campaign(
            export_hf.main,
            part(to_export, format="safetensors", **pruned),
            {"export/*": ("export/*",)},
            part(to_export, format="safetensors", dtype="float16"),
        ),
        "corpus": Campaign(
            corpus_command.main, convert, {"ravdess/*": ("ravdess/*",)}, when_whole="ravdess is not empty"
        ),
        "predict": Campaign(predict_hf.main, predict, {}, part(predict, split="validation")),
        "predict in parts": Campaign(
            predict_hf.main,
            predict_in_parts,
            {"answers/answers.parquet": ("answers/run.json", "answers/parts/*")},
            goes_on=part(makes_the_rest, parts=8),
            check=part(not_each_once, clips=corpus / "test"),
        ),
    }


def measure_all(cases: int, names: Sequence[str], kinds: Sequence[str]) -> list[Row]:
    """The rows of the campaigns with these names: `cases` operations, a third of each other kind, read-only once."""
    rows, base = [], Path(tempfile.mkdtemp(prefix="faults_"))
    folder = base / "run"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4G", "tmpfs", folder], check=False, stderr=subprocess.DEVNULL)
    for module in LATE:
        importlib.import_module(module)
    gc.freeze()  # trainers collect garbage often, and what was imported is none
    try:
        tiny_corpus.write_corpus(base / "corpus", validation=(7, 8))
        tiny_corpus.tiny_tokenizer().save_pretrained(base / "tokenizer")
        write_streamed(base / "corpus", base / "streamed")
        write_downloaded(base / "downloaded")
        made = run(make_models, [str(base / "start" / "checkpoint"), str(base / "encoders")], folder)
        if made.code:
            raise RuntimeError(f"The models cannot be made: {made.said}")
        numbers = {kind: 1 if kind == "read-only" else cases if kind == KINDS[0] else -(-cases // 3) for kind in kinds}
        for name in names:
            rows += measure(name, campaigns(base)[name], folder, numbers)
    finally:
        if folder.is_mount():
            subprocess.run(["umount", "--lazy", folder], check=True)
        shutil.rmtree(base)
    return rows


def in_place_of(earlier: Sequence[Row], new: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Rows in the order of the commands and kinds, new ones in place of earlier ones of the same command and fault."""
    rows = {(row["command"], row["fault"]): row for row in (*earlier, *new)}
    return [rows[pair] for pair in sorted(rows, key=lambda pair: (names.index(pair[0]), KINDS.index(pair[1])))]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(campaigns(Path()))
    parser.add_argument("--cases", type=int, default=30, help="kills of each command at a change of the disk")
    parser.add_argument("--commands", nargs="+", choices=names, default=names)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of faults")
    parser.add_argument(
        "--add_to_results", action="store_true", help="keep the rows of --output that are not measured"
    )
    options = parse_arguments(parser, "faults", arguments)
    report: Mapping[str, Any]
    if options.from_results:
        report, _ = read_results(options.output)
    else:
        rows = measure_all(options.cases, options.commands, options.kinds)
        if options.add_to_results:
            rows = in_place_of(read_results(options.output)[0]["rows"], rows, names)
        report = {"environment": environment(), "rows": rows}
    publish({"faults": table(report["rows"], three_digits)}, report, [], options)
    return dict(report)


if __name__ == "__main__":
    main()
