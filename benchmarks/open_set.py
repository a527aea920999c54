# SPDX-License-Identifier: Apache-2.0
"""Which score tells best that a clip is none of the classes? OpenMax in a few forms, and what it has to beat.

    python benchmarks/open_set.py --checkpoint runs/ser4 --data_dir ser4 --ood_dir ser4/ood --use_amp

Forms are chosen on the validation split, on unknown emotions of its speakers and on noise of another seed than in the
test; the test has other clips and speakers.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.spatial.distance import cdist
from sklearn.covariance import LedoitWolf

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.tables import Row, parse_arguments, publish, read_results, table
from configuration_mmser import MMSERConfig
from demo import synthesize_non_speech
from mmser.evaluation_run import load_trainer
from mmser.examples import EmotionDataset
from mmser.loading import load_emotion_dataset, load_emotion_split
from mmser.model_loading import load_label_names
from mmser.open_set import auroc, fpr_at_95_tpr, knn_distance, oscr
from mmser.results import environment
from mmser.scores import open_set_scores, predict_clips
from mmser.training_arguments import MMSERTrainingArguments
from modeling_mmser import register_auto_classes
from openmax_mmser import OpenMax
from processing_mmser import MMSERProcessor

Outputs = dict[str, np.ndarray]  # of one set of clips
Scores = dict[str, np.ndarray]  # of each set of clips: [N], higher = more unknown

METRICS = ("AUROC", "FPR95", "OSCR")
CHOOSING = ("emotions, validation speakers", "no speech, seed 1")
FINAL = ("emotions, other speakers", "no speech, seed 0")
WHOLE = "emotions, all"  # those of validation speakers took part in the choice
NON_SPEECH = {CHOOSING[1]: (30, 1), FINAL[1]: (50, 0)}  # clips of each kind, seed
# The known and the unknown clips of each measurement
PAIRS = [*(("validation", name) for name in CHOOSING), *(("test", name) for name in (*FINAL, WHOLE))]
AS_STORED = "OpenMax as the checkpoint has it"


class Form(NamedTuple):
    """A form of OpenMax; the defaults are those of `MMSERConfig` and `MMSERTrainer.finalize`."""

    distance: str = MMSERConfig.openmax_distance  # "centroid" is of the fused vectors
    centroids: int = MMSERConfig.openmax_centroids_per_class
    fitted_on: str = "validation"
    tail_size: int = MMSERConfig.openmax_tail_size
    level: str = MMSERConfig.openmax_level
    alpha: int = MMSERConfig.openmax_alpha  # at the level of activations
    score: str = "rejection score"


SHIPPED = "OpenMax, shipped form"
FORMS = {
    SHIPPED: Form(),
    "OpenMax, published form": Form("anchor", 0, "train", 20, "activation", 3, "unknown probability"),
    "shipped, but distance to the anchor": Form("anchor"),
    "shipped, but 16 centroids": Form(centroids=16),
    "shipped, but 64 centroids": Form(centroids=64),
    "shipped, but fitted on training clips": Form(fitted_on="train"),
    "shipped, but tail 10": Form(tail_size=10),
    "shipped, but tail 50": Form(tail_size=50),
    "shipped, but at the level of activations": Form(level="activation"),
}
SEEDS = (0, 1, 2)  # of k-means


# ---- predictions


def load_tables(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All sets of clips by name; those that are no speech are made in `folder`."""
    label_names = load_label_names(str(arguments.checkpoint))
    tables = dict(load_emotion_dataset(arguments.data_dir, label_names=label_names)[0])
    unknown = load_emotion_split(arguments.ood_dir, label_names=label_names)
    tables[WHOLE] = unknown.select([i for i, label in enumerate(unknown["labels"]) if label < 0])
    for name, (clips, seed) in NON_SPEECH.items():
        synthesize_non_speech.synthesize(folder / name, clips, seed)
        tables[name] = load_emotion_split(folder / name, label_names=label_names)
    return tables


def predict(arguments: argparse.Namespace) -> tuple[dict[str, Outputs], dict[str, Any]]:
    """What the model says of every clip, by set, and what it said it with."""
    register_auto_classes()
    processor = MMSERProcessor.from_pretrained(arguments.checkpoint)
    clips: dict[str, Outputs] = {}
    with tempfile.TemporaryDirectory() as folder:
        options = MMSERTrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=arguments.batch_size,
            use_amp=arguments.use_amp,
            report_to="none",
            eval_strategy="no",
            save_strategy="no",
        )
        trainer = load_trainer(str(arguments.checkpoint), processor, options)
        for name, rows in load_tables(arguments, Path(folder)).items():
            dataset = EmotionDataset(rows, sampling_rate=processor.feature_extractor.sampling_rate)
            clips[name] = predict_clips(trainer, dataset, rows["row"])
            for column in ("corpus", "speaker"):
                clips[name][column] = np.array(rows[column] if column in rows.column_names else [""] * len(rows))
    model: Any = trainer.model
    dtype = f"{'bfloat16' if options.bf16 else 'float16'} autocast" if arguments.use_amp else "float32"
    settings = {name: value for name, value in vars(model.config).items() if name.startswith("openmax_")}
    made_with = {"dtype": dtype, "batch_size": arguments.batch_size, "temperature": model.temperature.item()}
    return clips, {**environment(options.device), **made_with, "openmax": settings}


def divide_unknown(clips: dict[str, Outputs]) -> None:
    """Divide the unknown emotions into those to choose by, of validation speakers, and those to judge by."""

    def speakers(outputs: Outputs) -> list[tuple[str, str]]:
        return list(zip(outputs["corpus"].tolist(), outputs["speaker"].tolist(), strict=True))

    known = {pair for pair in speakers(clips["validation"]) if pair[1]}
    to_choose_by = np.array([pair in known for pair in speakers(clips[WHOLE])], dtype=bool)
    if to_choose_by.all() or not to_choose_by.any():
        raise ValueError(
            f"{to_choose_by.sum()} of the {len(to_choose_by)} clips of --ood_dir are by speakers of the validation "
            "split: there must be some to choose by, and others to judge by."
        )
    for name, rows in ((CHOOSING[0], to_choose_by), (FINAL[0], ~to_choose_by)):
        clips[name] = {key: values[rows] for key, values in clips[WHOLE].items()}


# ---- scores


def baseline_scores(clips: Mapping[str, Outputs], temperature: float) -> dict[str, Scores]:
    """What OpenMax has to beat, and OpenMax as the checkpoint has it."""
    train = clips["train"]
    embeddings, labels = train["fused"].astype(np.float64), train["labels"]
    means = np.stack([embeddings[labels == label].mean(axis=0) for label in np.unique(labels)])
    within = embeddings - means[np.searchsorted(np.unique(labels), labels)]
    precision = LedoitWolf(assume_centered=True).fit(within).precision_
    found: dict[str, Scores] = {}
    for name, outputs in clips.items():
        scores = open_set_scores(outputs, temperature=temperature)
        for space in ("fused", "features"):
            for k in (1, 10):
                scores[f"kNN on {space}, k={k}"] = knn_distance(train[space], outputs[space], k)
        # Lee et al. 2018, equation 2, on one layer
        distances = cdist(outputs["fused"].astype(np.float64), means, "mahalanobis", VI=precision)
        scores["Mahalanobis on fused"] = distances.min(axis=1)
        for method, values in scores.items():
            found.setdefault(AS_STORED if method == "openmax" else method, {})[name] = values
    return found


def form_scores(form: Form, clips: Mapping[str, Outputs], seed: int) -> Scores:
    """OpenMax of a form, fitted and applied to every set; `seed` is that of its centroids."""
    train = clips["train"]
    centroids = form.centroids if form.distance == "centroid" else 0
    openmax = OpenMax(train["logits"].shape[1], form.alpha, form.level, centroids, train["fused"].shape[1])
    if form.distance == "centroid":
        openmax.fit_centroids(train["fused"], train["labels"], seed)

    def distances(outputs: Outputs) -> torch.Tensor:
        if form.distance == "centroid":
            return openmax.distances(torch.from_numpy(outputs["fused"]))
        return torch.from_numpy(outputs["anchor_distances"])

    source = clips[form.fitted_on]
    openmax.fit(distances(source), source["labels"], source["logits"].argmax(axis=1), form.tail_size)
    scores = {}
    for name, outputs in clips.items():
        inputs = torch.from_numpy(outputs["logits"]), distances(outputs)
        rejection = form.score == "rejection score"
        values = openmax.rejection_scores(*inputs) if rejection else openmax(*inputs)[:, -1]
        scores[name] = values.double().numpy()
    return scores


# ---- what the scores are worth


def measure_pair(known: np.ndarray, correct: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """The three `METRICS` of scores of known clips, classified right or not, and of unknown ones."""
    both = np.concatenate([known, unknown])
    is_unknown = np.arange(len(both)) >= len(known)
    return np.array([auroc(both, is_unknown), fpr_at_95_tpr(both, is_unknown), oscr(-known, correct, -unknown)])


def is_correct(outputs: Outputs) -> np.ndarray:
    return outputs["logits"].argmax(axis=1) == outputs["labels"]


def quality(metrics: np.ndarray) -> np.ndarray:
    """One number [...] of the metrics [..., 3], to choose by: the mean of AUROC, 1 - FPR95 and OSCR."""
    return (metrics[..., 0] + 1 - metrics[..., 1] + metrics[..., 2]) / 3


def measure(method: str, scored: Sequence[Scores], clips: Mapping[str, Outputs]) -> Row:
    """A row of the table: means over seeds, and over unknown emotions and clips that are no speech."""
    correct = {known: is_correct(clips[known]) for known, _ in PAIRS}
    values = np.array([[measure_pair(s[a], correct[a], s[b]) for a, b in PAIRS] for s in scored])  # [seeds, 5, 3]
    chosen, final = quality(values[:, :2].mean(axis=1)), values[:, 2:4].mean(axis=(0, 1))
    row = {"score": method, "seeds": len(scored), "validation": chosen.mean(), "spread": np.ptp(chosen)}
    row |= {"test": quality(final), **dict(zip(METRICS, final, strict=True))}
    row |= {"AUROC, emotions": values[:, 2, 0].mean(), "AUROC, no speech": values[:, 3, 0].mean()}
    return {**row, "AUROC, all emotions": values[:, 3:, 0].mean()}


def compare(ours: Scores, rivals: Mapping[str, Scores], correct: np.ndarray, num_samples: int = 500) -> list[Row]:
    """By how much a score is better than its rivals on the mean of the final sets (positive = better).

    Args:
        ours, rivals: scores of the test clips and of the sets of `FINAL`.
        correct: whether a test clip is classified right.
        num_samples: resamples of the clips of each set, the same for all scores, for the 95 % percentile interval.
    Returns: a row for each rival; of each metric [gain, low, high].
    """
    rng = np.random.default_rng(0)
    sets = ("test", *FINAL)
    whole = [np.arange(len(ours[name])) for name in sets]
    draws = [whole, *([rng.integers(len(rows), size=len(rows)) for rows in whole] for _ in range(num_samples))]

    def metrics(scores: Scores) -> np.ndarray:
        """[1 + num_samples, 3]"""
        measured = []
        for rows in draws:
            known, *unknown = (scores[name][own] for name, own in zip(sets, rows, strict=True))
            measured.append(np.mean([measure_pair(known, correct[rows[0]], own) for own in unknown], axis=0))
        return np.stack(measured)

    own, table_rows = metrics(ours), []
    for rival, scores in rivals.items():
        gains = (own - metrics(scores)) * (1, -1, 1)
        ends = np.stack([gains[0], *np.percentile(gains[1:], [2.5, 97.5], axis=0)], axis=-1)
        table_rows.append({"rival": rival, **{m: e.tolist() for m, e in zip(METRICS, ends, strict=True)}})
    return table_rows


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    clips, made_with = predict(arguments)
    divide_unknown(clips)
    baselines = baseline_scores(clips, made_with["temperature"])
    forms = {}
    for name, form in FORMS.items():
        seeds = SEEDS if form.distance == "centroid" else SEEDS[:1]
        forms[name] = [form_scores(form, clips, seed) for seed in seeds]
    rows = [measure(name, scored, clips) for name, scored in forms.items()]
    rows += [measure(name, [scores], clips) for name, scores in baselines.items()]
    rivals = {name: scores for name, scores in baselines.items() if name != AS_STORED}
    return {
        "predictions": made_with,
        "data": {name: getattr(arguments, name).resolve().name for name in ("checkpoint", "data_dir", "ood_dir")},
        "clips": {name: len(outputs["labels"]) for name, outputs in clips.items()},
        "rows": sorted(rows, key=lambda row: -row["validation"]),
        "shipped_form_against": compare(forms[SHIPPED][0], rivals, is_correct(clips["test"])),
    }


def make_tables(report: Mapping[str, Any]) -> dict[str, str]:
    rows = [{name: row[name] for name in row if name != "AUROC, all emotions"} for row in report["rows"]]
    rows = [{**row, "spread": row["spread"] if row["seeds"] > 1 else None} for row in rows]
    against = [
        {"shipped form against": row["rival"]}
        | {f"{m}, gain (95 % interval)": "{:+.3f} ({:+.3f} to {:+.3f})".format(*row[m]) for m in METRICS}
        for row in report["shipped_form_against"]
    ]
    return {"open_set": table(rows), "open_set:against": table(against)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="folder of a finished checkpoint")
    parser.add_argument("--data_dir", type=Path, help="data with train, validation and test splits")
    parser.add_argument("--ood_dir", type=Path, help="clips of emotions that are none of the classes")
    parser.add_argument("--use_amp", action="store_true", help="mixed precision")
    parser.add_argument("--batch_size", type=int, default=16)
    options = parse_arguments(parser, "open_set", arguments, ("checkpoint", "data_dir", "ood_dir"))
    report = read_results(options.output)[0] if options.from_results else run(options)
    publish(make_tables(report), report, [], options)


if __name__ == "__main__":
    main()
