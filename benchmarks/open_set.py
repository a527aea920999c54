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
from configuration_mmser import OPENMAX_LEVELS, MMSERConfig
from demo import synthesize_non_speech
from mmser.arguments import MMSERTrainingArguments
from mmser.batches import MMSERDataCollator
from mmser.evaluation_run import load_label_names
from mmser.examples import EmotionDataset
from mmser.loading import load_emotion_dataset, load_emotion_split
from mmser.open_set import auroc, fpr_at_95_tpr, knn_distance, oscr
from mmser.results import environment
from mmser.scores import open_set_scores, predict_clips
from mmser.tables import format_table, strict_json
from mmser.trainer import MMSERTrainer
from modeling_mmser import MMSERForAudioClassification, register_auto_classes
from openmax_mmser import OpenMax
from processing_mmser import MMSERProcessor

Outputs = dict[str, np.ndarray]

METRICS = ("auroc", "fpr95", "oscr")
CHOOSING = ("emotions, validation speakers", "non-speech, seed 1")
FINAL = ("emotions, other speakers", "non-speech, seed 0")
WHOLE = ("emotions, all", FINAL[1])  # as issues and papers name it; its validation speakers took part in the choice
NON_SPEECH = {CHOOSING[1]: (30, 1), FINAL[1]: (50, 0)}  # clips of each kind, seed
NUM_FOLDS = 4
# name: the rows of `evaluate` whose mean it is, emotions first
PURPOSES = {"validation": [0, 1], "cross_fitted": [5, 6], "test": [2, 3], "test_whole": [4, 3]}

UNKNOWN_PROBABILITY, REJECTION_SCORE = "unknown probability", "rejection score"
# The defaults of the configuration are always among them
CENTROIDS = sorted({1, 8, 16, 32, 64, MMSERConfig.openmax_centroids_per_class})
TAIL_SIZES = sorted({5, 10, 20, 50, MMSERConfig.openmax_tail_size})
ALPHAS = sorted({1, 3, 4, MMSERConfig.openmax_alpha})
FORMS = [("probability", None), *(("activation", alpha) for alpha in ALPHAS)]
SEEDS = (0, 1, 2)  # of k-means


class Method(NamedTuple):
    """What a row of the table is; all but the name for OpenMax only."""

    name: str
    centroids: int | None = None
    fitted_on: str = ""
    tail_size: int | None = None
    level: str = ""
    alpha: int | None = None  # at the level of activations
    score: str = ""
    combined_with: str = ""

    def __str__(self) -> str:
        if not self.fitted_on:
            return self.name
        distance = self.name if self.centroids is None else f"{self.centroids} centroids of {self.name}"
        alpha = "" if self.alpha is None else f" alpha {self.alpha}"
        score = f"{self.score} & {self.combined_with}" if self.combined_with else self.score
        return f"OpenMax: {distance}, {self.fitted_on}, tail {self.tail_size}, {self.level}{alpha}, {score}"


# A scorer gives the scores [N] of clips by several methods (higher = more unknown); a family makes one of held-out
# clips of the known classes.
Scorer = Callable[[Outputs], dict[Method, np.ndarray]]
Family = Callable[[Outputs], Scorer]

PUBLISHED = Method("anchor", None, "training", 20, "activation", 3, UNKNOWN_PROBABILITY)
AS_STORED = Method("OpenMax as the checkpoint has it")


def shipped_default(level: str = MMSERConfig.openmax_level) -> Method:
    """What `MMSERConfig` and `MMSERTrainer.finalize` do unless told otherwise, or the same at another level."""
    config = MMSERConfig
    centroids = config.openmax_centroids_per_class if config.openmax_distance == "centroid" else None
    name, fitted_on = ("anchor", "training") if centroids is None else ("fused", "held-out")
    alpha = config.openmax_alpha if level == "activation" else None
    return Method(name, centroids, fitted_on, config.openmax_tail_size, level, alpha, REJECTION_SCORE)


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
    """Name, number of centroids, and function to distances [N, C] of clips to each class; once for each seed."""
    yield "anchor", None, lambda outputs: outputs["anchor_distances"]
    num_labels = train["logits"].shape[1]
    correct = train["logits"].argmax(axis=1) == train["labels"]
    members = [train["features"][correct & (train["labels"] == label)] for label in range(num_labels)]
    means = np.stack([own.mean(axis=0) for own in members])  # mean activation vectors, Bendale & Boult 2016
    yield "class means of features", None, lambda outputs: cdist(outputs["features"], means)
    for space in ("features", "fused"):
        for number in CENTROIDS:
            for seed in SEEDS[:1] if number == 1 else SEEDS:
                openmax = OpenMax(num_labels, 1, centroids_per_class=number, embedding_size=train[space].shape[1])
                openmax.fit_centroids(train[space], train["labels"], seed)
                yield space, number, lambda o, s=space, m=openmax: m.distances(torch.from_numpy(o[s])).numpy()


def openmax_family(train: Outputs, method: Method) -> Family:
    """OpenMax on `distances` among the outputs, with tail and source of `method`, in all `FORMS`, with both scores."""

    def fit(held_out: Outputs) -> Scorer:
        source = train if method.fitted_on == "training" else held_out
        openmax = OpenMax(source["logits"].shape[1], alpha=1)
        openmax.fit(source["distances"], source["labels"], source["logits"].argmax(axis=1), method.tail_size)

        def score(outputs: Outputs) -> dict[Method, np.ndarray]:
            inputs = [torch.from_numpy(outputs[name]) for name in ("logits", "distances")]
            scores = {}
            for level, alpha in FORMS:
                openmax.level, openmax.alpha = level, alpha  # the fit is the same for all of them
                own = method._replace(level=level, alpha=alpha)
                scores[own._replace(score=UNKNOWN_PROBABILITY)] = openmax(*inputs)[:, -1].double().numpy()
                scores[own._replace(score=REJECTION_SCORE)] = openmax.rejection_scores(*inputs).double().numpy()
            return scores

        return score

    return fit


def rank_among(scores: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Share of the `known` scores [K] below each of `scores` [N], ties counting one half."""
    known = np.sort(known)
    return (np.searchsorted(known, scores, "left") + np.searchsorted(known, scores, "right")) / (2 * len(known))


def with_combinations(family: Family, temperature: float) -> Family:
    """The scores of `family`, also with each of three others: mean of ranks among known clips, and noisy or."""

    def partners(outputs: Outputs) -> dict[str, np.ndarray]:
        scores = open_set_scores(outputs, temperature=temperature)
        return {name: scores[name].astype(np.float64) for name in ("max_softmax", "energy", "uncertainty")}

    def minus_log(probabilities: np.ndarray) -> np.ndarray:
        return -np.log(np.maximum(probabilities, 1e-12))

    def fit(held_out: Outputs) -> Scorer:
        scorer = family(held_out)
        known, known_partners = scorer(held_out), partners(held_out)

        def score(outputs: Outputs) -> dict[Method, np.ndarray]:
            scores, others = scorer(outputs), partners(outputs)
            other_ranks = {name: rank_among(values, known_partners[name]) for name, values in others.items()}
            others["energy"] = other_ranks["energy"]  # for the noisy or: energy is no probability
            combined = {}
            for method, values in scores.items():
                ranks = rank_among(values, known[method])
                surprise = values if method.score == REJECTION_SCORE else minus_log(1 - values)
                for name, other in others.items():
                    both = (ranks + other_ranks[name]) / 2
                    combined[method._replace(combined_with=f"{name}, mean of ranks")] = both
                    # -log((1 - a)(1 - b)) has the order of 1 - (1 - a)(1 - b), and keeps its digits next to 1
                    noisy_or = surprise + minus_log(1 - other)
                    combined[method._replace(combined_with=f"{name}, noisy or")] = noisy_or
            return {**scores, **combined}

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
    for name, number, distance in logging.tqdm(list(class_distances(clips["train"])), desc="distances"):
        measured = with_distances(clips, distance)
        for fitted_on in ("training", "held-out"):
            for tail_size in TAIL_SIZES:
                family = openmax_family(measured["train"], Method(name, number, fitted_on, tail_size))
                for method, values in evaluate(with_combinations(family, temperature), measured).items():
                    results[method].append(values)
    return {method: np.stack(values) for method, values in results.items()}


# ---- report


def means(values: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics [..., 3] by `PURPOSES` of the rows [..., 7, 3] of `evaluate`."""
    return {name: values[..., rows, :].mean(axis=-2) for name, rows in PURPOSES.items()}


def quality(metrics: np.ndarray) -> np.ndarray:
    """One number [...] of the metrics [..., 3], to choose by: the mean of AUROC, 1 - FPR95 and OSCR."""
    return (metrics[..., 0] + 1 - metrics[..., 1] + metrics[..., 2]) / 3


def describe(method: Method, values: np.ndarray) -> dict[str, Any]:
    """By purpose: quality, its spread (highest minus lowest of the seeds), metrics of the mean and of each set."""
    row = {"method": str(method), "seeds": len(values)}
    for purpose, metrics in means(values).items():
        row |= {purpose: quality(metrics).mean(), f"{purpose} spread": np.ptp(quality(metrics))}
        emotions, non_speech = (values[:, index] for index in PURPOSES[purpose])
        for name, own in {"mean": metrics, "emotions": emotions, "non-speech": non_speech}.items():
            row |= {f"{purpose} {name} {m}": v for m, v in zip(METRICS, own.mean(axis=0), strict=True)}
    return row


def best(methods: Iterable[Method], rows: Mapping[Method, dict], purpose: str) -> list[Method]:
    return sorted(methods, key=lambda method: -rows[method][purpose])


def compare(scores: Mapping[Method, list[np.ndarray]], correct: np.ndarray, num_samples: int = 500) -> dict:
    """
    By how much the first method is better than each other on the mean of the final sets (positive = better).

    Args:
        scores: of each method, those of the known clips and of each unknown set.
        correct: whether a known clip is classified right.
        num_samples: resamples of the clips of each set, the same for all methods, for the 95 % percentile interval.
    Returns: for each other method the gain in each metric, and the ends of its interval, [3, 3].
    """
    rng = np.random.default_rng(0)
    first, *others = scores
    sizes = [len(values) for values in scores[first]]

    def metrics(rows: list[np.ndarray]) -> np.ndarray:
        """[M, 3], on these rows of each set."""
        drawn = [[values[own] for values, own in zip(sets, rows, strict=True)] for sets in scores.values()]
        hits = correct[rows[0]]
        return np.stack([np.mean([measure(known, hits, own) for own in unknown], axis=0) for known, *unknown in drawn])

    samples = [[rng.integers(size, size=size) for size in sizes] for _ in range(num_samples)]
    measured = np.stack([metrics(rows) for rows in ([np.arange(size) for size in sizes], *samples)])
    gains = (measured[:, :1] - measured[:, 1:]) * (1, -1, 1)
    low, high = np.percentile(gains[1:], [2.5, 97.5], axis=0)
    return dict(zip(others, np.stack([gains[0], low, high], axis=-1), strict=True))


def compare_shipped(clips: dict[str, Outputs], temperature: float, rivals: list[Method]) -> dict[Method, np.ndarray]:
    """`compare` for the shipped default (first seed) and each of the `rivals`, which are baselines."""
    ours = shipped_default()
    distance = next(d for name, number, d in class_distances(clips["train"]) if (name, number) == ours[:2])
    clips = with_distances(clips, distance)
    train, held_out = clips["train"], clips["validation"]
    scorers = [openmax_family(train, ours)(held_out), baseline_family(train, temperature)(held_out)]
    scored = [{**scorers[0](clips[name]), **scorers[1](clips[name])} for name in ("test", *FINAL)]
    return compare({m: [scores[m] for scores in scored] for m in (ours, *rivals)}, is_correct(clips["test"]))


def verdict(rows: Mapping[Method, dict], grid: list[Method], combined: list[Method], gains: dict) -> list[str]:
    """What the numbers say, in sentences."""
    ours, rivals = shipped_default(), list(gains)
    own = rows[ours]
    qualities = ", ".join(
        f"{purpose} {own[purpose]:.4f} (spread {own[f'{purpose} spread']:.4f})" for purpose in PURPOSES
    )
    lines = [f"Shipped default: {ours}. Quality: {qualities}."]
    for purpose in ("validation", "cross_fitted"):
        ranked = best(grid, rows, purpose)
        first = rows[ranked[0]]
        lines.append(
            f"{purpose}: it is number {ranked.index(ours) + 1} of {len(grid)} forms of OpenMax; the best is "
            f"{first['method']}, from the default {first[purpose] - own[purpose]:+.4f}, on test "
            f"{first['test'] - own['test']:+.4f}."
        )
    other_level = next(level for level in OPENMAX_LEVELS if level != ours.level)
    alternatives = {
        "Fitted on training clips instead": ours._replace(fitted_on="training"),
        "At the other level": shipped_default(other_level),
        "The best combination on validation": combined[0],
    }
    for title, method in alternatives.items():
        changes = [f"{purpose} {rows[method][purpose] - own[purpose]:+.4f}" for purpose in PURPOSES]
        lines.append(f"{title} ({method}), from the default: {', '.join(changes)}.")
    for column in ("test", "test_whole", "test emotions auroc", "test non-speech auroc"):
        strongest = max(rivals, key=lambda rival: rows[rival][column])
        word = "at least as good as" if own[column] >= rows[strongest][column] else "worse than"
        lines.append(
            f"{column}: the default is {word} the best baseline ({strongest}): {own[column]:.4f} against "
            f"{rows[strongest][column]:.4f}."
        )
    for rival, gain in gains.items():
        texts = [f"{m} {v:+.3f} [{low:+.3f}, {high:+.3f}]" for m, (v, low, high) in zip(METRICS, gain, strict=True)]
        lines.append(f"test: with the first seed better than {rival} by (95 % interval): {', '.join(texts)}.")
    return lines


def make_table(rows: list[dict[str, Any]], purpose: str) -> str:
    """The qualities, and for `purpose` the metrics of the mean and the sets."""
    columns = ["method", "validation", "cross_fitted", purpose]
    columns += [f"{purpose} {name} {metric}" for name in ("mean", "emotions", "non-speech") for metric in METRICS]
    short = {column: column.removeprefix(f"{purpose} ") for column in columns}
    return format_table([{short[column]: row[column] for column in columns} for row in rows], list(short.values()))


def write(report: dict[str, Any], tables: dict[str, list[list]], path: Path) -> None:
    """Write JSON; in the `tables` a row is a line, and numbers have four decimals."""

    def plain(value: Any) -> Any:
        return value if not isinstance(value, float) else round(float(value), 4) if np.isfinite(value) else None

    text = strict_json(report).removesuffix("\n}\n")
    for name, rows in tables.items():
        lines = [json.dumps([plain(value) for value in row], separators=(",", ":")) for row in rows]
        text += f',\n"{name}": [\n' + ",\n".join(lines) + "\n]"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n}\n", encoding="utf-8")


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
    rows = {method: describe(method, values) for method, values in evaluate_all(clips, temperature).items()}
    grid = best((m for m in rows if m.fitted_on and not m.combined_with), rows, "validation")
    combined = best((m for m in rows if m.combined_with), rows, "validation")
    baselines = [method for method in rows if not method.fitted_on]
    gains = compare_shipped(clips, temperature, [method for method in baselines if method != AS_STORED])
    sentences = verdict(rows, grid, combined, gains)
    cross_fitted = best(grid, rows, "cross_fitted")[0]
    shown = {*baselines, PUBLISHED, shipped_default(), grid[0], cross_fitted, combined[0]}
    table = [rows[method] for method in best(shown, rows, "validation")]
    print("Final table: test clips against unknown emotions of other than the validation speakers, and non-speech\n")
    print(make_table(table, "test"))
    print("\nThe same with all unknown emotions, of which those of validation speakers took part in the choice\n")
    print(make_table(table, "test_whole"))
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
            "grid": f"by quality on validation, the mean over the seeds; of {len(combined)} combinations the best 20",
        },
        "sizes": describe_sizes(clips),
        "verdict": sentences,
    }
    numbers = [*PURPOSES, "validation spread", *(f"test mean {metric}" for metric in METRICS)]
    tables = {
        "shipped_default_against": [["method", *(f"{m} {end}" for m in METRICS for end in ("gain", "low", "high"))]]
        + [[str(rival), *gain.ravel()] for rival, gain in gains.items()],
        "table": [list(table[0]), *(list(row.values()) for row in table)],
        "grid": [[*Method._fields, *numbers]]
        + [[*method, *(rows[method][name] for name in numbers)] for method in grid + combined[:20]],
    }
    write(report, tables, arguments.output)


if __name__ == "__main__":
    main()
