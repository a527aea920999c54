# SPDX-License-Identifier: Apache-2.0
"""What does each part of the model pay? Each one is judged by what it exists for, and all of them by cross-validation.

    python benchmarks/parts.py --data_dir ser4 --new_data_dir ser4wide --audio_encoder openai/whisper-base \
        --cache_dir runs/parts_states

The encoder is frozen and the models hear audio alone (`pooled_states.py`), so a training takes seconds. Choices were
made by the ablations: cross-validation over train + validation, which does not read the test split. Of a run that was
stopped, the measurements that are done are kept: give the same command again.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.pooled_states import (
    FIELDS,
    Clips,
    Schedule,
    encode,
    every_fourth_frame,
    folds_by_corpus,
    folds_by_speaker,
    join,
    predict,
    train,
    train_small_network,
    two_frames,
)
from benchmarks.tables import Row, cell, difference, parse_arguments, publish, read_csv, read_results, table, write_csv
from configuration_mmser import POOLINGS, MMSERConfig
from mmser.calibration import doubt_log_odds, error_detection_auroc, error_log_odds, fit_error_probability
from mmser.loading import load_emotion_dataset, load_emotion_split
from mmser.metrics import compute_classification_metrics, softmax
from mmser.open_set import auroc, oscr
from mmser.results import environment
from openmax_mmser import OpenMax

LABELS = ("neutral", "happy", "sad", "angry")
RECIPE = Schedule(batch_size=32, weight_averaging=0.99)  # of `recipes/real_speech_all_parts.json`
ALL = "all parts"
WITHOUT: dict[str, dict[str, float]] = {  # what is switched off
    ALL: {},
    "no blocks": {"classifier_num_layers": 0},
    "5 blocks": {"classifier_num_layers": 5},
    "no anchors": {"anchor_loss_weight": 0.0},
    "no focal loss": {"focal_loss_weight": 0.0},
    "no class balancing": {"class_balanced_beta": 0.0},
    "no uncertainty head": {"uncertainty_loss_weight": 0.0},
    "no prototypes": {"prototype_loss_weight": 0.0},
    "none of these": {
        "classifier_num_layers": 0,
        "anchor_loss_weight": 0.0,
        "focal_loss_weight": 0.0,
        "uncertainty_loss_weight": 0.0,
        "prototype_loss_weight": 0.0,
    },
}
FUSED_SIZE = MMSERConfig.fusion_hidden_size
NEW_CORPORA, NEW_CLIPS = ("SER-ES", "CREMA-D"), 400  # of each, drawn by chance
RARE_SHARE, SHOTS, DRAWS = 20, 10, 20  # clips of the largest class to one of the rarest; clips a class; repetitions


def scores_of(answers: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return compute_classification_metrics(answers, labels, LABELS)


# ---- what each part exists for: (measure, variant, value) of one seed


Measured = list[tuple[str, str, float]]


def open_set(clips: Mapping[str, Clips], seed: int) -> Measured:
    """Anchors and OpenMax: telling other emotions of the test speakers from the four."""
    found: Measured = []
    test, unknown = clips["test"], clips["unknown"]
    is_unknown = np.repeat([False, True], [len(test), len(unknown)])
    for variant in (ALL, "no anchors"):
        model = train(clips["train"], WITHOUT[variant], seed, RECIPE)
        outputs = {name: predict(model, clips[name]) for name in ("train", "validation", "test", "unknown")}
        for name in ("train", "validation"):
            outputs[name]["labels"] = clips[name].labels.numpy()
        right = outputs["test"]["logits"].argmax(axis=1) == test.labels.numpy()
        scores = {"1 - max": [1 - softmax(outputs[name]["logits"]).max(axis=1) for name in ("test", "unknown")]}
        for form, centroids in (("OpenMax", model.config.openmax_centroids_per_class), ("OpenMax on anchors", 0)):
            openmax = OpenMax(len(LABELS), model.config.openmax_alpha, "probability", centroids, FUSED_SIZE)
            openmax.fit_outputs(outputs["train"], outputs["validation"])
            scores[form] = [_rejection(openmax, outputs[name]) for name in ("test", "unknown")]
        for form, (known, other) in scores.items():
            found.append(
                ("AUROC, other emotions", f"{variant}: {form}", auroc(np.concatenate([known, other]), is_unknown))
            )
            found.append(("OSCR, other emotions", f"{variant}: {form}", oscr(known, right, other)))
    return found


def _rejection(openmax: OpenMax, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    logits, fused, anchors = (torch.from_numpy(outputs[name]) for name in ("logits", "fused", "anchor_distances"))
    return openmax.rejection_scores(logits, openmax.distances(fused, anchors)).numpy()


def errors(clips: Mapping[str, Clips], seed: int) -> Measured:
    """The uncertainty head: telling wrong answers on test clips from right ones."""
    model = train(clips["train"], WITHOUT[ALL], seed, RECIPE)
    doubt, head, wrong = {}, {}, {}
    for name in ("validation", "test"):
        outputs = predict(model, clips[name])
        doubt[name], head[name] = doubt_log_odds(outputs["logits"]), outputs["uncertainty"][:, 0]
        wrong[name] = outputs["logits"].argmax(axis=1) != clips[name].labels.numpy()
    speakers = clips["validation"].speakers
    weights = fit_error_probability(doubt["validation"], head["validation"], wrong["validation"], speakers)
    scores = {
        "1 - max": doubt["test"],
        "uncertainty head alone": head["test"],
        "as finalize fits both": error_log_odds(doubt["test"], head["test"], weights),
    }
    return [
        ("AUROC of wrong answers", name, error_detection_auroc(score, wrong["test"])) for name, score in scores.items()
    ]


def imbalance(clips: Mapping[str, Clips], seed: int) -> Measured:
    """Focal loss and class balancing: the recall of a class that has 1 clip to 20 of the largest."""
    rare = 1 + seed % 3  # another class for each seed: happy, sad, angry
    labels = clips["train"].labels.numpy()
    of_rare = np.flatnonzero(labels == rare)
    kept = np.random.default_rng(seed).permutation(of_rare)[: np.bincount(labels).max() // RARE_SHARE]
    few = clips["train"].take(np.concatenate([np.flatnonzero(labels != rare), kept]))
    found: Measured = []
    variants = {name: WITHOUT[name] for name in (ALL, "no class balancing", "no focal loss")}
    variants["with logit adjustment"] = {"logit_adjustment": 1.0}
    for variant, overrides in variants.items():
        answers = predict(train(few, overrides, seed, RECIPE), clips["test"])["logits"].argmax(axis=1)
        truth = clips["test"].labels.numpy()
        found.append(("recall of the rarest class, 20:1", variant, float((answers == truth)[truth == rare].mean())))
        recall = scores_of(answers, truth)["unweighted_average_recall"]
        found.append(("unweighted recall, 20:1", variant, recall))
    return found


def few_shot(clips: Mapping[str, Clips], seed: int) -> Measured:
    """Prototypes and the contrastive loss: a corpus never heard, of which 10 clips a class are known."""
    found: Measured = []
    variants = {name: WITHOUT[name] for name in (ALL, "no prototypes")}
    contrastive = {"supervised_contrastive_loss_weight": 0.1}
    variants["with contrastive loss"] = contrastive
    variants["the same, negatives of one corpus"] = {**contrastive, "contrastive_other_corpus_weight": 0.0}
    for variant, overrides in variants.items():
        model = train(clips["train"], overrides, seed, RECIPE)
        for corpus in np.unique(clips["new"].corpora):
            own = clips["new"].take(clips["new"].corpora == corpus)
            features = F.normalize(torch.from_numpy(predict(model, own)["features"]), dim=-1).numpy()
            rng = np.random.default_rng(0)  # the same draws for each model
            draws = [_nearest_mean(features, own.labels.numpy(), rng) for _ in range(DRAWS)]
            found.append((f"weighted F1, 10 clips a class of {corpus}", variant, float(np.mean(draws))))
    return found


def _nearest_mean(features: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> float:
    """Weighted F1 of the nearest class mean of `SHOTS` clips a class, on the other clips."""
    shown = np.concatenate([rng.permutation(np.flatnonzero(labels == label))[:SHOTS] for label in range(len(LABELS))])
    others = np.setdiff1d(np.arange(len(labels)), shown)
    means = np.stack([features[shown[labels[shown] == label]].mean(axis=0) for label in range(len(LABELS))])
    distances = np.linalg.norm(features[others, None] - means, axis=-1)
    return scores_of(distances.argmin(axis=1), labels[others])["weighted_f1"]


def depth(clips: Mapping[str, Clips], seed: int) -> Measured:
    """The blocks: behind a weak encoder (the convolutions in front of Whisper's attention) and behind all of it."""
    found: Measured = []
    for encoder, layers in (("a weak encoder", 1), ("all layers", None)):
        own = {name: clips[name].layers(layers) for name in ("train", "test")}
        for variant in (ALL, "5 blocks", "no blocks"):
            model = train(own["train"], WITHOUT[variant], seed, RECIPE)
            answers = predict(model, own["test"])["logits"].argmax(axis=1)
            score = scores_of(answers, own["test"].labels.numpy())["weighted_f1"]
            found.append((f"weighted F1 behind {encoder}", variant, score))
    return found


PARTS: dict[str, Callable[[Mapping[str, Clips], int], Measured]] = {
    "anchors and OpenMax": open_set,
    "uncertainty head": errors,
    "focal loss, class balancing": imbalance,
    "prototypes, contrastive": few_shot,
    "blocks": depth,
}

# ---- all parts against each ablation, on clips that no choice is hidden from: the test split is not read here

SMALL = "small network"
LARGER_BATCHES = "batches of 64, last weights"  # all parts, trained otherwise
SCHEDULES = {LARGER_BATCHES: Schedule(batch_size=64)}
OF_POOLINGS = {f"pooling: {pooling}": {"pooling_type": pooling} for pooling in POOLINGS}
ALL_FRAMES = "pooling: layer_statistics", "pooling: statistics"  # two frames do not tell them apart
OVERRIDES: dict[str, dict[str, Any]] = {**WITHOUT, **OF_POOLINGS, LARGER_BATCHES: {}}


def answers_of(variant: str, shown: Clips, others: Clips, seed: int) -> np.ndarray:
    if variant == SMALL:
        return train_small_network(shown, seed)(others).argmax(axis=1)
    model = train(shown, OVERRIDES[variant], seed, SCHEDULES.get(variant, RECIPE))
    return predict(model, others)["logits"].argmax(axis=1)


def f1_on(name: str, clips: Mapping[str, Clips], variant: str, seed: int) -> float:
    """Weighted F1 on the clips of a split, of a model of the training clips."""
    answers = answers_of(variant, clips["train"], clips[name], seed)
    return scores_of(answers, clips[name].labels.numpy())["weighted_f1"]


def f1_on_speakers(both: Clips, variant: str, seed: int) -> float:
    """Weighted F1 over all clips, where each third of the speakers is held out once."""
    held_out = np.empty(len(both), dtype=np.int64)
    for shown, rows in folds_by_speaker(both):
        held_out[rows] = answers_of(variant, both.take(shown), both.take(rows), seed)
    return scores_of(held_out, both.labels.numpy())["weighted_f1"]


def f1_on_corpora(both: Clips, variant: str, seed: int) -> float:
    """The mean over the corpora of the weighted F1 on each one, held out."""
    scores = []
    for shown, rows in folds_by_corpus(both):
        answers = answers_of(variant, both.take(shown), both.take(rows), seed)
        scores.append(scores_of(answers, both.labels.numpy()[rows])["weighted_f1"])
    return float(np.mean(scores))


def ablations(clips: Mapping[str, Clips], seed: int) -> Measured:
    """Weighted F1 on validation, and over train + validation on speakers held out."""
    both, found = join(clips["train"], clips["validation"]), []
    for variant in (*WITHOUT, LARGER_BATCHES, SMALL):
        found.append(("validation", variant, f1_on("validation", clips, variant, seed)))
        found.append(("speakers held out", variant, f1_on_speakers(both, variant, seed)))
    return found


def against_small(clips: Mapping[str, Clips], seed: int) -> Measured:
    """The whole model, also in larger batches, and the small network: on corpora held out; without the batches on
    test."""
    both = join(clips["train"], clips["validation"])
    found = [("corpus held out", name, f1_on_corpora(both, name, seed)) for name in (ALL, LARGER_BATCHES, SMALL)]
    return found + [("test", name, f1_on("test", clips, name, seed)) for name in (ALL, SMALL)]


def poolings(clips: Mapping[str, Clips], seed: int) -> Measured:
    """Weighted F1 on speakers held out, of each pooling, on every fourth frame of the clips."""
    return _on_speakers("speakers held out, frames", clips["frames"], OF_POOLINGS, seed)


def poolings_of_all_frames(clips: Mapping[str, Clips], seed: int) -> Measured:
    """The same of the deviation of each layer and of that of their sum."""
    return _on_speakers("speakers held out, all frames", clips["all frames"], ALL_FRAMES, seed)


def _on_speakers(measure: str, both: Clips, variants: Iterable[str], seed: int) -> Measured:
    return [(measure, variant, f1_on_speakers(both, variant, seed)) for variant in variants]


MEASUREMENTS = {
    **PARTS,
    "poolings": poolings,
    "poolings, all frames": poolings_of_all_frames,
    "ablations": ablations,
    "against a small network": against_small,
}

# ---- running and showing


def load_clips(options: argparse.Namespace) -> dict[str, Clips]:
    tables = dict(load_emotion_dataset(options.data_dir, label_names=LABELS)[0])
    tables["unknown"] = load_emotion_split(Path(options.data_dir) / "ood", label_names=LABELS)
    new = load_emotion_dataset(options.new_data_dir, label_names=LABELS)[0]["train"]
    drawn = []
    for corpus in NEW_CORPORA:
        own = [row for row, name in enumerate(new["corpus"]) if name == corpus]
        drawn += sorted(np.random.default_rng(0).permutation(own)[:NEW_CLIPS].tolist())
    tables["new"] = new.select(drawn)
    whole = encode(tables, options.audio_encoder, options.cache_dir)
    clips = {name: two_frames(own) for name, own in whole.items()}
    both = join(whole["train"], whole["validation"])
    return {**clips, "all frames": both, "frames": every_fourth_frame(both)}


def measure(clips: Mapping[str, Clips], seeds: Sequence[int], path: Path) -> list[Row]:
    """All measurements of all seeds. Those that `path` has already, from a run that was stopped, are not repeated."""
    lines = read_csv(path) if path.is_file() else []
    done = {(line["part"], line["seed"]) for line in lines}
    jobs = [(part, seed) for seed in seeds for part in MEASUREMENTS if (part, seed) not in done]
    for part, seed in logging.tqdm(jobs, desc="measurements"):
        found = MEASUREMENTS[part](clips, seed)
        lines += [
            {"part": part, "measure": measure, "variant": variant, "seed": seed, "value": value}
            for measure, variant, value in found
        ]
        write_csv(path, lines)
    return lines


def summarise(lines: Sequence[Row]) -> list[Row]:
    """A row for each measure and variant; the difference is to the first variant of the measure, seed by seed."""
    rows = []
    for part in dict.fromkeys(line["part"] for line in lines):
        for name in dict.fromkeys(line["measure"] for line in lines if line["part"] == part):
            own = [line for line in lines if (line["part"], line["measure"]) == (part, name)]
            values: dict[str, dict[int, float]] = {}
            for line in own:
                values.setdefault(line["variant"], {})[line["seed"]] = line["value"]
            first = next(iter(values.values()))
            for variant, scores in values.items():
                change = "" if scores is first else difference(scores, first)
                row = {"part": part, "measure": name, "variant": variant}
                rows.append({**row, "mean of seeds": cell(scores), "difference": change})
    return rows


def make_tables(lines: Sequence[Row]) -> dict[str, str]:
    rows = summarise(lines)
    halves = {
        "parts:measures": [row for row in rows if row["part"] in PARTS],
        "parts:choice": [row for row in rows if row["part"] not in PARTS],
    }
    return {name: table(half) for name, half in halves.items() if half}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="ser4, with ood/")
    parser.add_argument("--new_data_dir", help="ser4wide, of which two corpora are new")
    parser.add_argument("--audio_encoder", default="openai/whisper-base")
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/parts_states"))
    parser.add_argument("--seeds", type=int, default=3)
    options = parse_arguments(parser, "parts", arguments, required=("data_dir", "new_data_dir"))
    if options.from_results:
        report, lines = read_results(options.output)
    else:
        torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
        clips = load_clips(options)
        sizes = {name: len(own) for name, own in clips.items()}
        lines = measure(clips, range(options.seeds), options.output.with_suffix(".csv"))
        settings = {"seeds": options.seeds, "clips": sizes, **asdict(RECIPE), **FIELDS}
        report = {"environment": environment(), "settings": settings, "summary": summarise(lines)}
    publish(make_tables(lines), report, lines, options)


if __name__ == "__main__":
    main()
