# SPDX-License-Identifier: Apache-2.0
"""How good is the model on recordings that it never heard, before and after it adapts to 20 clips of each class?

    python benchmarks/never_heard.py --data_dir ser4 --wide_data_dir ser4wide --audio_encoder openai/whisper-base \
        --cache_dir runs/parts_states

Each corpus of both sets is held out once, and each language that several corpora share. The model, with every part on,
is trained on all others (`pooled_states.py`: audio alone, frozen encoder), calibrated as after a training, and asked
about the clips that were held out. Then it adapts to clips drawn of them, as `train_hf.py --adapt` does, and is asked
about the rest. Of a run that was stopped, what is done is kept: give the same command again.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.pooled_states import FIELDS, Batches, Clips, add_flags, encode_as_two_frames, join, predict, train
from benchmarks.tables import (
    Row,
    cell,
    difference,
    mean,
    parse_arguments,
    publish,
    read_csv,
    read_results,
    table,
    write_csv,
)
from benchmarks.wide import BLOCKS, EQUAL_LAYERS
from mmser.adapted_layers import ClassifierFit, Fit, OutputFit, cross_fit, fold_temperature
from mmser.calibration import error_detection_auroc, expected_calibration_error
from mmser.loading import load_emotion_dataset, load_emotion_split
from mmser.metrics import bootstrap_classification, compute_classification_metrics, softmax
from mmser.model_calibration import calibrate_outputs, reset_calibration
from mmser.open_set import auroc
from mmser.results import environment

LABELS = ("neutral", "happy", "sad", "angry")
SHOTS, DRAWS = 20, 3  # clips of each class; repetitions
TRAINED, CENTRE, LAYER, WHOLE = "as trained", "centre, without labels", "output layer", "classifier, by steps"
BOTH = "centre, then classifier"
SCORES = {  # in the tables: what each is the mean of
    "weighted_f1": "weighted F1",
    "ece": "ECE",
    "error_auroc": "AUROC of errors",
    "rejected": "rejected",
    "known_weighted_f1": "known: F1",
    "known_ece": "known: ECE",
}
Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class HeldOut:
    """What is held out: its name, and the corpora of that name or of that language."""

    name: str
    kind: str  # "corpus" or "language"
    corpora: tuple[str, ...]


def all_held_out(languages: Mapping[str, str]) -> list[HeldOut]:
    """Each corpus, and each language of two corpora or more, by the language of each corpus."""
    found = [HeldOut(corpus, "corpus", (corpus,)) for corpus in sorted(languages)]
    for language in sorted(set(languages.values())):
        own = tuple(sorted(corpus for corpus in languages if languages[corpus] == language))
        if len(own) > 1:
            found.append(HeldOut(language, "language", own))
    return found


@dataclass(frozen=True)
class Division:
    """Clips of all other corpora, by their splits, and those that were held out, which come once each.

    Args:
        train, validation, test: the others; `test` is of speakers that no clip of the first two is of.
        never_heard: all clips of the corpora that are held out.
        unknown: their clips of none of the classes.
    """

    train: Clips
    validation: Clips
    test: Clips
    never_heard: Clips
    unknown: Clips


def divide(clips: Mapping[str, Clips], held_out: HeldOut) -> Division:
    """
    Args:
        clips: "train", "validation", "test" and "ood" of the first set, "wide train" and "wide validation" of the
            second, which has clips of the first again: a corpus of both is asked about by those of the first alone.
    """

    def others(*names: str) -> Clips:
        return join(*(clips[name].take(~np.isin(clips[name].corpora, held_out.corpora)) for name in names))

    first, second = ("train", "validation", "test"), ("wide train", "wide validation")
    of_first = np.unique(np.concatenate([clips[name].corpora for name in first]))
    own = []
    for corpus in held_out.corpora:
        names = first if corpus in of_first else second
        own += [clips[name].take(clips[name].corpora == corpus) for name in names]
    return Division(
        others("train", "wide train"),
        others("validation", "wide validation"),
        others("test"),
        join(*own),
        clips["ood"].take(np.isin(clips["ood"].corpora, held_out.corpora)),
    )


def ask(model: Any, clips: Clips) -> Outputs:
    """`predict`, as `MMSERTrainer.predict_outputs` gives it."""
    found = predict(model, clips)
    for name in ("uncertainty", "rejection_score"):
        if name in found:
            found[name] = found[name][:, 0]
    return {**found, "labels": clips.labels.numpy()}


def train_and_calibrate(division: Division, seed: int) -> Any:
    """The model of all other corpora, finished as `MMSERTrainer.finalize` does."""
    model = train(division.train, BLOCKS, seed, EQUAL_LAYERS)
    reset_calibration(model)
    known, held_out = ask(model, division.train), ask(model, division.validation)
    calibrate_outputs(model, held_out, division.validation.speakers.tolist(), train=known)
    return model


# ---- the ways to adapt: `--adapt_to_inputs`, `train_hf.py --adapt --adapt_layers output`, and `train_hf.py --adapt`

ADAPTING: dict[str, Callable[[Any, Outputs], Fit] | None] = {
    CENTRE: None,
    LAYER: OutputFit,
    WHOLE: ClassifierFit,
    BOTH: ClassifierFit,
}


def adapt(model: Any, shown: Clips, variant: str) -> None:
    """Move the centre of a model to a few clips, without their labels; or fit it to them and calibrate it anew, as the
    command does."""
    if variant in (CENTRE, BOTH):
        model.adapt_to(list(Batches(shown)))
    make_fit = ADAPTING[variant]
    if make_fit is None:
        return
    weights, speakers = fold_temperature(model), shown.speakers.tolist()
    outputs = ask(model, shown)
    outputs, _ = cross_fit(make_fit(model, outputs), outputs, speakers)
    calibrate_outputs(model, outputs, speakers, (1.0, weights))


# ---- what is measured


def draw(labels: np.ndarray, seed: int) -> np.ndarray:
    """Rows of `SHOTS` clips of each class, drawn by chance; at most half the clips of a class."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    return np.concatenate([own[: min(SHOTS, len(own) // 2)] for own in rows])


def score(
    never_heard: Outputs, known: Outputs, unknown: Outputs | None, speakers: Sequence[str] | None = None
) -> dict[str, float]:
    """
    The scores of a model on clips never heard, and on known corpora.

    Args:
        speakers: of the clips never heard, for the interval.
    Returns: of clips never heard: `weighted_f1`, `ece`, `error_rate`, `uncertainty` (the mean probability of an
        error), `error_auroc`, and the share `rejected` as none of the classes; `known_...` of the known corpora;
        `weighted_f1_low` and `weighted_f1_high`, the 95 % interval of clips never heard;
        `new_auroc`: how well the uncertainty tells a clip never heard from one of a known corpus, `new_auroc_openmax`
        the same by OpenMax; `unknown_auroc`: OpenMax on clips of none of the classes, all never heard.
    """
    found: dict[str, float] = {}
    for prefix, outputs in (("", never_heard), ("known_", known)):
        answers, labels = outputs["logits"].argmax(axis=1), outputs["labels"]
        wrong = answers != labels
        found[f"{prefix}weighted_f1"] = compute_classification_metrics(answers, labels, LABELS)["weighted_f1"]
        found[f"{prefix}ece"] = expected_calibration_error(softmax(outputs["logits"].astype(np.float64)), labels)
        found[f"{prefix}error_rate"] = float(wrong.mean())
        found[f"{prefix}uncertainty"] = float(outputs["uncertainty"].mean())
        found[f"{prefix}error_auroc"] = error_detection_auroc(outputs["uncertainty"], wrong)
        found[f"{prefix}rejected"] = float(outputs["is_unknown"].mean())
    answers, labels = never_heard["logits"].argmax(axis=1), never_heard["labels"]
    interval = bootstrap_classification(answers, labels, LABELS, speakers=speakers)["weighted_f1"]
    found["weighted_f1_low"], found["weighted_f1_high"] = interval
    is_new = np.repeat([True, False], [len(never_heard["labels"]), len(known["labels"])])
    for name, key in (("new_auroc", "uncertainty"), ("new_auroc_openmax", "rejection_score")):
        found[name] = auroc(np.concatenate([never_heard[key], known[key]]), is_new)
    if unknown is not None:
        scores = np.concatenate([unknown["rejection_score"], never_heard["rejection_score"]])
        is_unknown = np.repeat([True, False], [len(unknown["labels"]), len(never_heard["labels"])])
        found["unknown_auroc"] = auroc(scores, is_unknown)
    return found


def mean_over_draws(draws: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """The mean of each score over the draws that have it, else None: where nothing is wrong, no AUROC of errors is."""
    means: dict[str, float | None] = {}
    for name in draws[0]:
        values = [own[name] for own in draws if not np.isnan(own[name])]
        means[name] = float(np.mean(values)) if values else None
    return means


def measure_one(division: Division, seed: int) -> dict[str, dict[str, float | None]]:
    """Variant -> the mean of its scores over the draws. All variants are asked about the same clips."""
    trained = train_and_calibrate(division, seed)
    labels = division.never_heard.labels.numpy()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (TRAINED, *ADAPTING)}
    for number in range(DRAWS):
        rows = draw(labels, number)
        shown = division.never_heard.take(rows)
        rest = division.never_heard.take(np.setdiff1d(np.arange(len(labels)), rows))
        for variant in found:
            model, start = copy.deepcopy(trained), time.process_time()
            if variant != TRAINED:
                adapt(model, shown, variant)
            seconds = time.process_time() - start
            unknown = ask(model, division.unknown) if len(division.unknown) else None
            scores = score(ask(model, rest), ask(model, division.test), unknown, rest.speakers.tolist())
            found[variant].append({**scores, "clips": len(rest), "seconds": seconds})
    return {variant: mean_over_draws(draws) for variant, draws in found.items()}


# ---- running and showing


def load_clips(options: argparse.Namespace) -> tuple[dict[str, Clips], dict[str, str]]:
    """All clips by set and split, and the language of each corpus."""
    tables: dict[str, datasets.Dataset] = dict(load_emotion_dataset(options.data_dir, label_names=LABELS)[0])
    tables["ood"] = load_emotion_split(Path(options.data_dir) / "ood", label_names=LABELS)
    wide = load_emotion_dataset(options.wide_data_dir, label_names=LABELS, test_fraction=0)[0]
    tables |= {f"wide {name}": split for name, split in wide.items()}
    languages = {
        corpus: language
        for split in tables.values()
        for corpus, language in zip(split["corpus"], split["language"], strict=True)
    }
    return encode_as_two_frames(tables, options.audio_encoder, options.cache_dir), languages


def measure(clips: Mapping[str, Clips], languages: Mapping[str, str], seeds: Sequence[int], path: Path) -> list[Row]:
    """All that is held out, with all seeds. What `path` has already, from a run that was stopped, is not repeated."""
    lines = read_csv(path) if path.is_file() else []
    done = {(line["held_out"], line["seed"]) for line in lines}
    jobs = [(own, seed) for seed in seeds for own in all_held_out(languages) if (own.name, seed) not in done]
    for held_out, seed in logging.tqdm(jobs, desc="held out"):
        found = measure_one(divide(clips, held_out), seed)
        language = held_out.name if held_out.kind == "language" else languages[held_out.name]
        about = {"held_out": held_out.name, "kind": held_out.kind, "language": language, "seed": seed}
        lines += [{**about, "variant": variant, **scores} for variant, scores in found.items()]
        write_csv(path, lines)
    return lines


def by_seed(lines: Sequence[Row], variant: str, name: str, held_out: str | None = None) -> dict[int, float]:
    """Seed -> the score `name`; without `held_out` its mean over all corpora that were held out with this seed."""
    own = [line for line in lines if line["variant"] == variant and line.get(name) is not None]
    own = [line for line in own if (line["kind"] == "corpus" if held_out is None else line["held_out"] == held_out)]
    seeds = sorted({line["seed"] for line in own})
    return {seed: float(np.mean([line[name] for line in own if line["seed"] == seed])) for seed in seeds}


def make_tables(lines: Sequence[Row]) -> dict[str, str]:
    """`never_heard:corpora`, a row for all that was held out; `never_heard:adapted`, the means over corpora."""
    rows = []
    for name in dict.fromkeys(line["held_out"] for line in lines):
        first = next(line for line in lines if line["held_out"] == name)

        def of(score: str, variant: str = TRAINED, name: str = name) -> str:
            return cell(by_seed(lines, variant, score, name))

        low, high = (mean(by_seed(lines, TRAINED, f"weighted_f1_{bound}", name)) for bound in ("low", "high"))
        gain = difference(by_seed(lines, WHOLE, "weighted_f1", name), by_seed(lines, TRAINED, "weighted_f1", name))
        rows.append(
            {
                "held out": name if first["kind"] == "corpus" else f"all corpora of {name}",
                "language": first["language"],
                "F1": of("weighted_f1"),
                "95 % interval": "-" if low is None or high is None else f"{low:.3f} to {high:.3f}",
                "no labels": of("weighted_f1", CENTRE),
                "adapted": of("weighted_f1", WHOLE),
                "gain": gain,
                "ECE": of("ece"),
                "ECE, no labels": of("ece", CENTRE),
                "ECE, adapted": of("ece", WHOLE),
                "errors": of("error_rate"),
                "uncertainty": of("uncertainty"),
                "of known": of("known_uncertainty"),
                "told from known": of("new_auroc"),
                "by OpenMax": of("new_auroc_openmax"),
                "other emotions": of("unknown_auroc"),
                "rejected": of("rejected"),
            }
        )
    means = [
        {
            "variant": variant,
            **{title: cell(by_seed(lines, variant, score)) for score, title in SCORES.items()},
            "seconds": cell(by_seed(lines, variant, "seconds")),
        }
        for variant in (TRAINED, *ADAPTING)
        if any(line["variant"] == variant for line in lines)
    ]
    return {"never_heard:corpora": table(rows), "never_heard:adapted": table(means)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--wide_data_dir", type=Path, help="ser4wide, the second set")
    options = parse_arguments(parser, "never_heard", arguments, required=("data_dir", "wide_data_dir"))
    if options.from_results:
        report, lines = read_results(options.output)
    else:
        torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
        clips, languages = load_clips(options)
        lines = measure(clips, languages, range(options.seeds), options.output.with_suffix(".csv"))
        settings = {"seeds": options.seeds, "shots": SHOTS, "draws": DRAWS, **FIELDS, **BLOCKS, **asdict(EQUAL_LAYERS)}
        sizes = {name: len(own) for name, own in clips.items()}
        report = {"environment": environment(), "settings": settings, "clips": sizes}
    publish(make_tables(lines), report, lines, options)


if __name__ == "__main__":
    main()
