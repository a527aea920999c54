# SPDX-License-Identifier: Apache-2.0
"""Which score tells best that a clip is none of the classes? OpenMax in many forms, and what it has to beat.

    python benchmarks/open_set.py --checkpoint runs/ser4 --data_dir ser4 --ood_dir ser4/ood --use_amp

Read: the predictions (cached), the methods, `evaluate`, the report. What is chosen is chosen on the validation split,
on unknown emotions of its speakers and on non-speech of another seed than in the final table.
Writes `benchmarks/results/open_set.json`.
"""

import argparse
import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.spatial.distance import cdist
from sklearn.covariance import LedoitWolf
from sklearn.model_selection import GroupKFold
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from configuration_mmser import MMSERConfig
from data_mmser import EmotionDataset, MMSERDataCollator, load_emotion_dataset, load_emotion_split
from demo import synthesize_non_speech
from eval_hf import load_label_names
from evaluation_mmser import auroc, format_table, fpr_at_95_tpr, knn_distance, oscr
from modeling_mmser import MMSERForAudioClassification, OpenMax, register_auto_classes, rejection_scores
from processing_mmser import MMSERProcessor
from reporting_mmser import environment, open_set_scores, predict_clips, strict_json
from training_mmser import MMSERTrainer, MMSERTrainingArguments

Outputs = dict[str, np.ndarray]

METRICS = ("auroc", "fpr_at_95_tpr", "oscr")
CHOOSING = ("emotions, validation speakers", "non-speech, seed 1")
FINAL = ("emotions, other speakers", "non-speech, seed 0")
WHOLE = ("emotions, all", FINAL[1])  # as issues and papers name it; its validation speakers took part in the choice
NON_SPEECH = {CHOOSING[1]: (30, 1), FINAL[1]: (50, 0)}  # clips of each kind, seed
NUM_FOLDS = 4
# name: the rows of `evaluate` whose mean it is, emotions first
PURPOSES = {"validation": [0, 1], "cross_fitted": [5, 6], "test": [2, 3], "test_whole": [4, 3]}

UNKNOWN_PROBABILITY, NOT_KNOWN = "unknown probability", "1 - largest known"
# The defaults of the configuration are always among them
CENTROIDS = sorted({1, 8, 16, 32, 64, MMSERConfig.openmax_centroids_per_class})
TAIL_SIZES = sorted({5, 10, 20, 50, MMSERConfig.openmax_tail_size})
ALPHAS = sorted({1, 3, 4, MMSERConfig.openmax_alpha})
SEEDS = (0, 1, 2)  # of k-means


class Method(NamedTuple):
    """What a row of the table is; all but the name for OpenMax only."""

    name: str
    centroids: int | None = None
    fitted_on: str = ""
    tail_size: int | None = None
    alpha: int | None = None
    score: str = ""
    combined_with: str = ""

    def __str__(self) -> str:
        if not self.fitted_on:
            return self.name
        centroids = "" if self.centroids is None else f" K={self.centroids}"
        combined = f" & {self.combined_with}" if self.combined_with else ""
        settings = f"{self.fitted_on}, tail {self.tail_size}, alpha {self.alpha}, {self.score}"
        return f"OpenMax: {self.name}{centroids}, {settings}{combined}"


# A scorer gives the scores [N] of clips by several methods (higher = more unknown); a family makes one of held-out
# clips of the known classes.
Scorer = Callable[[Outputs], dict[Method, np.ndarray]]
Family = Callable[[Outputs], Scorer]

PUBLISHED = Method("anchor", None, "training", 20, 3, UNKNOWN_PROBABILITY)
AS_STORED = Method("OpenMax as the checkpoint has it")


def shipped_default() -> Method:
    """What `MMSERConfig` and `MMSERTrainer.finalize` do unless told otherwise."""
    config = MMSERConfig
    centroids = config.openmax_centroids_per_class if config.openmax_distance == "centroid" else None
    name, fitted_on = ("anchor", "training") if centroids is None else ("centroids of fused", "held-out")
    return Method(name, centroids, fitted_on, config.openmax_tail_size, config.openmax_alpha, NOT_KNOWN)


# ---- predictions


def cache_key(arguments: argparse.Namespace) -> str:
    """A hash of all that the predictions depend on: the checkpoint, the precision, and the listing of the data."""
    digest = hashlib.sha256(f"amp {arguments.use_amp}".encode())
    patterns = ("config.json", "processor_config.json", "tokenizer*", "model*.safetensors")
    read = {file for pattern in patterns for file in arguments.checkpoint.glob(pattern)}
    read.add(Path(synthesize_non_speech.__file__))
    for root in (arguments.data_dir, arguments.ood_dir):
        for file in sorted(root.rglob("*")):
            if file.suffix in (".csv", ".tsv", ".jsonl"):
                read.add(file)
            elif file.is_file():
                digest.update(f"{file.relative_to(root)} {file.stat().st_size}\n".encode())
    for file in sorted(read):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def load_tables(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All clips, by name; those that are not speech are made where they are missing."""
    label_names = load_label_names(str(arguments.checkpoint))
    tables, _ = load_emotion_dataset(arguments.data_dir, label_names=label_names)
    missing = {"train", "validation", "test"} - set(tables)
    if missing:
        raise ValueError(f"--data_dir has no {', '.join(sorted(missing))} split.")
    tables = dict(tables)
    unknown = load_emotion_split(arguments.ood_dir, label_names=label_names)
    tables[WHOLE[0]] = unknown.select([i for i, label in enumerate(unknown["labels"]) if label < 0])
    for name, (clips, seed) in NON_SPEECH.items():
        target = folder / f"non_speech_{seed}"
        if not target.exists():
            synthesize_non_speech.synthesize(target, clips, seed)
        tables[name] = load_emotion_split(target, label_names=label_names)
    return tables


def predict(arguments: argparse.Namespace, folder: Path) -> None:
    """Run the model over all clips; each set becomes one `.npz` file, what it was done with `predictions.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = load_tables(arguments, folder)
    register_auto_classes()
    processor = MMSERProcessor.from_pretrained(arguments.checkpoint)
    model = MMSERForAudioClassification.from_pretrained(arguments.checkpoint)
    training_arguments = MMSERTrainingArguments(
        output_dir=str(folder),
        per_device_eval_batch_size=arguments.batch_size,
        use_amp=arguments.use_amp,
        report_to="none",
        eval_strategy="no",
        save_strategy="no",
    )
    trainer = MMSERTrainer(
        model, training_arguments, data_collator=MMSERDataCollator(processor), processing_class=processor
    )
    start = time.perf_counter()
    for name, table in logging.tqdm(tables.items(), desc="sets of clips"):
        dataset = EmotionDataset(table, sampling_rate=processor.feature_extractor.sampling_rate)
        outputs = predict_clips(trainer, dataset, table["row"])
        for column in ("corpus", "speaker"):
            outputs[column] = np.array(table[column] if column in table.column_names else [""] * len(table))
        np.savez(folder / f"{name}.npz", **outputs)
    dtype = str(model.dtype).removeprefix("torch.")
    if arguments.use_amp:
        dtype = f"{'bfloat16' if training_arguments.bf16 else 'float16'} autocast"
    made_with = {
        **environment(training_arguments.device),
        "dtype": dtype,
        "batch_size": arguments.batch_size,
        "seconds": time.perf_counter() - start,
        "temperature": model.temperature.item(),
        "openmax": {name: value for name, value in vars(model.config).items() if name.startswith("openmax_")},
    }
    (folder / "predictions.json").write_text(strict_json(made_with), encoding="utf-8")  # last: all is there


def select(outputs: Outputs, rows: np.ndarray) -> Outputs:
    return {name: values[rows] for name, values in outputs.items()}


def speakers(outputs: Outputs) -> list[tuple[str, str]]:
    return list(zip(outputs["corpus"].tolist(), outputs["speaker"].tolist(), strict=True))


def spoken_by(unknown: Outputs, known: Outputs) -> np.ndarray:
    """Bool [N]: which unknown clips are by a speaker (of a corpus) of the known ones; without a name, by none."""
    names = {pair for pair in speakers(known) if pair[1]}
    return np.array([pair in names for pair in speakers(unknown)], dtype=bool)


def load_clips(folder: Path) -> dict[str, Outputs]:
    """All sets of clips; the unknown emotions divided into those to choose by and those to judge by."""
    clips = {file.stem: dict(np.load(file)) for file in sorted(folder.glob("*.npz"))}
    is_for_choosing = spoken_by(clips[WHOLE[0]], clips["validation"])
    if is_for_choosing.all() or not is_for_choosing.any():
        raise ValueError(
            f"{is_for_choosing.sum()} of the {len(is_for_choosing)} clips of --ood_dir are by speakers of the "
            "validation split: there must be some to choose by, and others to judge by."
        )
    clips[CHOOSING[0]] = select(clips[WHOLE[0]], is_for_choosing)
    clips[FINAL[0]] = select(clips[WHOLE[0]], ~is_for_choosing)
    return clips


# ---- methods


def baseline_family(train: Outputs, temperature: float) -> Family:
    """
    What OpenMax has to beat, and OpenMax as the checkpoint has it. Nothing is fitted to the clips that are held out
    here; the uncertainty is the model's output, in which calibration mixed the head's with max-softmax.
    """
    embeddings, labels = train["fused"].astype(np.float64), train["labels"]
    means = np.stack([embeddings[labels == label].mean(axis=0) for label in np.unique(labels)])
    within = embeddings - means[np.searchsorted(np.unique(labels), labels)]
    precision = LedoitWolf(assume_centered=True).fit(within).precision_

    def score(outputs: Outputs) -> dict[Method, np.ndarray]:
        scores = open_set_scores(outputs, temperature=temperature)
        methods = {AS_STORED if name == "openmax" else Method(name): values for name, values in scores.items()}
        for space in ("fused", "features"):
            for k in (1, 10):
                methods[Method(f"kNN on {space}, k={k}")] = knn_distance(train[space], outputs[space], k)
        # Lee et al. 2018, equation 2, on one layer
        distances = cdist(outputs["fused"].astype(np.float64), means, "mahalanobis", VI=precision)
        return {**methods, Method("Mahalanobis on fused"): distances.min(axis=1)}

    return lambda held_out: score


def class_distances(train: Outputs) -> Iterator[tuple[str, int | None, Callable[[Outputs], np.ndarray]]]:
    """Name, number of centroids, and function to the distances [N, C] of clips to each class; once for each seed."""
    yield "anchor", None, lambda outputs: outputs["anchor_distances"]
    num_labels = train["logits"].shape[1]
    correct = train["logits"].argmax(axis=1) == train["labels"]
    members = [train["features"][correct & (train["labels"] == label)] for label in range(num_labels)]
    means = np.stack([own.mean(axis=0) for own in members])  # mean activation vectors, Bendale & Boult 2016
    yield "class means of features", None, lambda outputs: cdist(outputs["features"], means)
    for space in ("features", "fused"):
        for number in CENTROIDS:
            for seed in SEEDS[:1] if number == 1 else SEEDS:
                openmax = OpenMax(num_labels, 1, number, train[space].shape[1])
                openmax.fit_centroids(train[space], train["labels"], seed)
                name = f"centroids of {space}"
                yield name, number, lambda o, s=space, m=openmax: m.distances(torch.from_numpy(o[s])).numpy()


def openmax_family(train: Outputs, method: Method) -> Family:
    """OpenMax on `distances` among the outputs, with the tail and source of `method`, all alphas and both scores."""

    def fit(held_out: Outputs) -> Scorer:
        source = train if method.fitted_on == "training" else held_out
        openmax = OpenMax(source["logits"].shape[1], alpha=1)
        openmax.fit(source["distances"], source["labels"], source["logits"].argmax(axis=1), method.tail_size)

        def score(outputs: Outputs) -> dict[Method, np.ndarray]:
            logits, distances = (torch.from_numpy(outputs[name]) for name in ("logits", "distances"))
            scores = {}
            for alpha in ALPHAS:
                openmax.alpha = alpha
                probabilities = openmax(logits, distances)
                own = method._replace(alpha=alpha)
                scores[own._replace(score=UNKNOWN_PROBABILITY)] = probabilities[:, -1].double().numpy()
                scores[own._replace(score=NOT_KNOWN)] = rejection_scores(probabilities).double().numpy()
            return scores

        return score

    return fit


def rank_among(scores: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Share of the `known` scores [K] below each of `scores` [N], ties counting one half."""
    known = np.sort(known)
    return (np.searchsorted(known, scores, "left") + np.searchsorted(known, scores, "right")) / (2 * len(known))


def combined_family(family: Family, temperature: float) -> Family:
    """Each score of `family` with each of max-softmax, energy and uncertainty: mean of ranks, and the noisy or."""

    def partners(outputs: Outputs) -> dict[str, np.ndarray]:
        scores = open_set_scores(outputs, temperature=temperature)
        return {name: scores[name] for name in ("max_softmax", "energy", "uncertainty")}

    def fit(held_out: Outputs) -> Scorer:
        scorer = family(held_out)
        known, known_partners = scorer(held_out), partners(held_out)

        def score(outputs: Outputs) -> dict[Method, np.ndarray]:
            scores = {}
            others = partners(outputs)
            other_ranks = {name: rank_among(values, known_partners[name]) for name, values in others.items()}
            for method, values in scorer(outputs).items():
                ranks = rank_among(values, known[method])
                for name, other in others.items():
                    mean = method._replace(combined_with=f"{name}, mean of ranks")
                    scores[mean] = (ranks + other_ranks[name]) / 2
                    probability = other_ranks[name] if name == "energy" else other
                    noisy_or = method._replace(combined_with=f"{name}, 1-(1-a)(1-b)")
                    scores[noisy_or] = 1 - (1 - values) * (1 - probability)
            return scores

        return score

    return fit


# ---- evaluation


def measure(known: np.ndarray, correct: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """The three `METRICS` of scores of known clips, classified right or not, and of unknown ones."""
    both = np.concatenate([known, unknown])
    is_unknown = np.arange(len(both)) >= len(known)
    return np.array([auroc(both, is_unknown), fpr_at_95_tpr(both, is_unknown), oscr(-known, correct, -unknown)])


def is_correct(outputs: Outputs) -> np.ndarray:
    return outputs["logits"].argmax(axis=1) == outputs["labels"]


def measure_sets(scorer: Scorer, known: Outputs, unknown_sets: list[Outputs]) -> dict[Method, np.ndarray]:
    """Metrics [U, 3] of each method on the same known clips and each of U unknown sets."""
    known_scores, correct = scorer(known), is_correct(known)
    unknown_scores = [scorer(outputs) for outputs in unknown_sets]
    return {
        method: np.stack([measure(scores, correct, unknown[method]) for unknown in unknown_scores])
        for method, scores in known_scores.items()
    }


def speaker_folds(outputs: Outputs) -> list[np.ndarray]:
    """Bool [N] for each fold, whole speakers at a time; a clip without a speaker is one of its own."""
    names = [pair if pair[1] else index for index, pair in enumerate(speakers(outputs))]
    if len(set(names)) < NUM_FOLDS:
        raise ValueError(f"The validation split has {len(set(names))} speakers; {NUM_FOLDS} folds need as many.")
    groups = [names.index(name) for name in names]
    folds = GroupKFold(NUM_FOLDS).split(groups, groups=groups)
    return [np.isin(np.arange(len(groups)), rows) for _, rows in folds]


def evaluate(family: Family, clips: Mapping[str, Outputs]) -> dict[Method, np.ndarray]:
    """
    Metrics [7, 3] of each method, the rows of `PURPOSES`: fitted to all held-out clips and judged by them and the
    sets of `CHOOSING`, by the test clips and those of `FINAL` and all unknown emotions, and cross-fitted.

    Cross-fitted: held-out clips are scored by what was fitted to other speakers, as a fit looks better on its own
    clips. All three metrics are means over the known clips, so the mean over the folds, weighted by their clips, is
    what comes out without folds where nothing is fitted.
    """
    held_out, test = clips["validation"], clips["test"]
    choosing = [clips[name] for name in CHOOSING]
    scorer = family(held_out)
    chosen = measure_sets(scorer, held_out, choosing)
    final = measure_sets(scorer, test, [clips[name] for name in (*FINAL, WHOLE[0])])
    crossed: dict[Method, np.ndarray] = defaultdict(lambda: np.zeros((len(CHOOSING), len(METRICS))))
    for fold in speaker_folds(held_out):
        for method, values in measure_sets(family(select(held_out, ~fold)), select(held_out, fold), choosing).items():
            crossed[method] += fold.mean() * values
    return {method: np.concatenate([chosen[method], final[method], crossed[method]]) for method in chosen}


def with_distances(clips: Mapping[str, Outputs], distance: Callable[[Outputs], np.ndarray]) -> dict[str, Outputs]:
    return {name: {**outputs, "distances": distance(outputs)} for name, outputs in clips.items()}


def evaluate_all(clips: dict[str, Outputs], temperature: float) -> dict[Method, np.ndarray]:
    """Metrics [S, 7, 3] of every method, for each of its S seeds."""
    results = defaultdict(list)
    for method, values in evaluate(baseline_family(clips["train"], temperature), clips).items():
        if method == AS_STORED:
            values[PURPOSES["cross_fitted"]] = np.nan  # its fit is there, and saw all held-out clips
        results[method].append(values)
    count = 2 + 2 * sum(1 if number == 1 else len(SEEDS) for number in CENTROIDS)
    for name, number, distance in logging.tqdm(class_distances(clips["train"]), desc="distances", total=count):
        measured = with_distances(clips, distance)
        for fitted_on in ("training", "held-out"):
            for tail_size in TAIL_SIZES:
                family = openmax_family(measured["train"], Method(name, number, fitted_on, tail_size))
                for one in (family, combined_family(family, temperature)):
                    for method, values in evaluate(one, measured).items():
                        results[method].append(values)
    return {method: np.stack(values) for method, values in results.items()}


# ---- report


def means(values: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics [..., 3] by `PURPOSES` of the rows [..., 7, 3] of `evaluate`."""
    return {name: values[..., rows, :].mean(axis=-2) for name, rows in PURPOSES.items()}


def quality(metrics: np.ndarray) -> np.ndarray:
    """One number [...] of the metrics [..., 3], to choose by: the mean of AUROC, 1 - FPR95 and OSCR."""
    return (metrics[..., 0] + 1 - metrics[..., 1] + metrics[..., 2]) / 3


def qualities(results: Mapping[Method, np.ndarray], purpose: str) -> dict[Method, float]:
    """The quality of each method, mean over the seeds."""
    return {method: quality(means(values)[purpose]).mean() for method, values in results.items()}


def best(methods: Iterable[Method], scores: Mapping[Method, float]) -> list[Method]:
    return sorted(methods, key=lambda method: -scores[method])


def describe(values: np.ndarray) -> dict[str, Any]:
    """By purpose: `quality`, its `spread` (highest minus lowest of the seeds) and the metrics of the mean and sets."""
    row = {}
    for purpose, metrics in means(values).items():
        sets = {"mean": metrics} | {
            name: values[:, index] for name, index in zip(("emotions", "non_speech"), PURPOSES[purpose], strict=True)
        }
        row[purpose] = {"quality": quality(metrics).mean(), "spread": np.ptp(quality(metrics))}
        row[purpose] |= {
            name: dict(zip(METRICS, own.mean(axis=0).tolist(), strict=True)) for name, own in sets.items()
        }
    return row


def final_scores(family: Family, clips: Mapping[str, Outputs], methods: list[Method]) -> dict[Method, list]:
    """Scores of the test clips and of each set of `FINAL`, fitted to all held-out clips."""
    scorer = family(clips["validation"])
    scored = [scorer(clips[name]) for name in ("test", *FINAL)]
    return {method: [scores[method] for scores in scored] for method in methods}


def compare(ours: list[np.ndarray], other: list[np.ndarray], correct: np.ndarray, num_samples: int = 500) -> dict:
    """
    By how much `ours` is better than `other` on the mean of the final sets, in each metric (positive = better).

    Args:
        ours, other: scores of the known clips, and of each unknown set.
        correct: whether a known clip is classified right.
        num_samples: resamples of the clips of each set, the same for both, for the 95 % percentile interval.
    """
    rng = np.random.default_rng(0)

    def gain(rows: list[np.ndarray]) -> np.ndarray:
        both = []
        for scores in (ours, other):
            known, *unknown = (values[chosen] for values, chosen in zip(scores, rows, strict=True))
            both.append(np.mean([measure(known, correct[rows[0]], own) for own in unknown], axis=0))
        return (both[0] - both[1]) * (1, -1, 1)

    sizes = [len(values) for values in ours]
    observed = gain([np.arange(size) for size in sizes])
    drawn = [gain([rng.integers(size, size=size) for size in sizes]) for _ in range(num_samples)]
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return {name: {"gain": observed[i], "interval": [low[i], high[i]]} for i, name in enumerate(METRICS)}


def compare_shipped(clips: dict[str, Outputs], temperature: float, rivals: list[Method]) -> dict[str, dict]:
    """`compare` for the shipped default (first seed) and each baseline."""
    ours = shipped_default()
    baselines = final_scores(baseline_family(clips["train"], temperature), clips, rivals)
    distance = next(d for name, number, d in class_distances(clips["train"]) if (name, number) == ours[:2])
    measured = with_distances(clips, distance)
    family = openmax_family(measured["train"], ours._replace(alpha=None, score=""))
    scores = final_scores(family, measured, [ours])[ours]
    correct = is_correct(clips["test"])
    return {
        str(method): compare(scores, baselines[method], correct)
        for method in logging.tqdm(rivals, desc="bootstrap against the baselines")
    }


def verdict(results: dict[Method, np.ndarray], grid: list[Method], rivals: list[Method], gains: dict) -> list[str]:
    """What the numbers say, in sentences."""
    ours = shipped_default()
    score = {purpose: qualities(results, purpose) for purpose in PURPOSES}
    spread = describe(results[ours])["validation"]["spread"]
    lines = [f"Shipped default: {ours}. Quality on validation {score['validation'][ours]:.4f} (spread {spread:.4f})."]
    for purpose in ("validation", "cross_fitted"):
        ranked = best(grid, score[purpose])
        first, behind = ranked[0], score[purpose][ranked[0]] - score[purpose][ours]
        place = "the best" if behind == 0 else f"number {ranked.index(ours) + 1}, {behind:.4f} behind the best,"
        lines.append(
            f"{purpose}: it is {place} of {len(grid)} forms of OpenMax; the best is {first}, on test "
            f"{score['test'][first] - score['test'][ours]:+.4f} from the default."
        )
    alternatives = {
        "Fitted on training clips instead": ours._replace(fitted_on="training"),
        "The best combination on validation": best((m for m in results if m.combined_with), score["validation"])[0],
    }
    for title, method in alternatives.items():
        changes = [f"{purpose} {score[purpose][method] - score[purpose][ours]:+.4f}" for purpose in PURPOSES]
        lines.append(f"{title} ({method}), from the default: {', '.join(changes)}.")
    for purpose in ("test", "test_whole"):
        strongest = best(rivals, score[purpose])[0]
        word = "at least as good as" if score[purpose][ours] >= score[purpose][strongest] else "worse than"
        lines.append(
            f"{purpose}: it is {word} the best of max-softmax, energy and kNN ({strongest}): quality "
            f"{score[purpose][ours]:.4f} against {score[purpose][strongest]:.4f}."
        )
    rows = {method: describe(results[method])["test"] for method in (ours, *rivals)}
    for name in ("emotions", "non_speech"):
        strongest = max(rivals, key=lambda rival: rows[rival][name]["auroc"])
        lines.append(
            f"test, {name} alone: AUROC {rows[ours][name]['auroc']:.4f} against {rows[strongest][name]['auroc']:.4f} "
            f"of the best of them there ({strongest})."
        )
    for rival in rivals:
        own = gains[str(rival)]
        texts = [
            f"{m} {own[m]['gain']:+.3f} [{own[m]['interval'][0]:+.3f}, {own[m]['interval'][1]:+.3f}]" for m in own
        ]
        lines.append(f"test: with the first seed better than {rival} by (95 % interval): {', '.join(texts)}.")
    return lines


def make_table(rows: list[dict[str, Any]], purpose: str) -> str:
    """The qualities on validation and for `purpose`, and the metrics of its mean and sets."""
    lines = []
    for row in rows:
        line = {"method": row["method"]}
        line |= {name: row[name]["quality"] for name in ("validation", "cross_fitted", purpose)}
        for own in ("mean", "emotions", "non_speech"):
            line |= {f"{own} {name.split('_')[0]}": value for name, value in row[purpose][own].items()}
        lines.append(line)
    return format_table(lines, list(lines[0]))


def write(report: dict[str, Any], results: dict[Method, np.ndarray], methods: list[Method], path: Path) -> None:
    """Write JSON; of the many `methods` the means alone, one a line and to four decimals."""
    names = ("quality", "spread", *METRICS)
    columns = [*Method._fields, "seeds", *(f"{purpose}_{name}" for purpose in PURPOSES for name in names)]
    lines = []
    for method in methods:
        row = describe(results[method])
        numbers = [{**row[purpose], **row[purpose]["mean"]}[name] for purpose in PURPOSES for name in names]
        lines.append(json.dumps([*method, len(results[method]), *(round(float(number), 4) for number in numbers)]))
    text = strict_json({**report, "grid_columns": columns}).removesuffix("\n}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + ',\n  "grid": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}\n", encoding="utf-8")


def describe_sizes(clips: Mapping[str, Outputs]) -> dict[str, Any]:
    """Clips and speakers of each set, and how many clips of the unknown sets are by speakers of the training split."""
    sizes: dict[str, Any] = {}
    for name, outputs in clips.items():
        sizes[name] = {"clips": len(outputs["labels"]), "speakers": len({p for p in speakers(outputs) if p[1]})}
        if name in (*CHOOSING, *FINAL, *WHOLE):
            sizes[name]["clips_of_training_speakers"] = int(spoken_by(outputs, clips["train"]).sum())
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a finished checkpoint")
    parser.add_argument("--data_dir", type=Path, required=True, help="data with train, validation and test splits")
    parser.add_argument("--ood_dir", type=Path, required=True, help="clips of emotions that are none of the classes")
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/open_set"), help="for the model's outputs")
    parser.add_argument("--use_amp", action="store_true", help="mixed precision")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "open_set.json")
    arguments = parser.parse_args()

    folder = arguments.cache_dir / cache_key(arguments)
    if not (folder / "predictions.json").exists():
        predict(arguments, folder)
    clips = load_clips(folder)
    made_with = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))
    temperature = made_with["temperature"]
    start = time.perf_counter()
    results = evaluate_all(clips, temperature)

    on_validation = qualities(results, "validation")
    grid = best((method for method in results if method.fitted_on and not method.combined_with), on_validation)
    combined = best((method for method in results if method.combined_with), on_validation)
    baselines = [method for method in results if not method.fitted_on]
    rivals = [m for m in baselines if m.name in ("max_softmax", "energy") or m.name.startswith("kNN")]
    cross_fitted = best(grid, qualities(results, "cross_fitted"))[0]
    shown = {*baselines, PUBLISHED, shipped_default(), grid[0], cross_fitted, combined[0]}
    rows = [
        {"method": str(method), "seeds": len(results[method]), **describe(results[method])}
        for method in best(shown, on_validation)
    ]
    gains = compare_shipped(clips, temperature, [method for method in baselines if method != AS_STORED])
    sentences = verdict(results, grid, rivals, gains)
    print("Final table: test clips against unknown emotions of other than the validation speakers, and non-speech\n")
    print(make_table(rows, "test"))
    print("\nThe same with all unknown emotions, of which those of validation speakers took part in the choice\n")
    print(make_table(rows, "test_whole"))
    print("\n" + "\n".join(sentences))

    report = {
        "environment": environment(),
        "seconds": time.perf_counter() - start,
        "predictions": made_with,
        "settings": {
            "checkpoint": arguments.checkpoint.resolve().name,
            "data_dir": arguments.data_dir.resolve().name,
            "ood_dir": arguments.ood_dir.resolve().name,
            "quality": "mean of AUROC, 1 - FPR95 and OSCR; means are over unknown emotions and non-speech",
            "validation": "held-out clips, also those that a method is fitted to",
            "cross_fitted": f"{NUM_FOLDS} folds by speaker: each is scored by what was fitted to the others",
            "test_whole": "all unknown emotions, of which those of validation speakers took part in the choice",
            "grid": f"by quality on validation; of {len(combined)} combinations the best 50",
        },
        "sizes": describe_sizes(clips),
        "verdict": sentences,
        "shipped_default_against": gains,
        "table": rows,
    }
    write(report, results, grid + combined[:50], arguments.output)


if __name__ == "__main__":
    main()
