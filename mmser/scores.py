# SPDX-License-Identifier: Apache-2.0
"""Run a model over a split and score it.

`predict_*` run the model: over clips as they are, with one modality hidden, or over augmented passes. `describe_*`
score closed-set answers, beside a linear probe and the majority class. `evaluate_open_set` and `describe_rejection`
score how well the model tells that a clip is none of the classes.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import datasets
import numpy as np
import scipy.special
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from conformal_mmser import PredictionSets
from mmser.augmentation import Augmenter
from mmser.calibration import (
    area_under_risk_coverage,
    error_detection_auroc,
    error_rate_interval,
    expected_calibration_error,
    negative_log_likelihood,
)
from mmser.checks import check_positive_integer, to_numpy
from mmser.examples import EmotionDataset, TestTimeAugmentation
from mmser.groups import MEAN_OVER_CORPORA, grouped_metrics, with_mean
from mmser.metrics import (
    bootstrap_classification,
    bootstrap_interval,
    compute_classification_metrics,
    compute_regression_metrics,
    concordance_correlation,
    confusion_matrix,
    draws_speakers,
    softmax,
)
from mmser.open_set import auroc, energy_score, fpr_at_95_tpr, knn_distance, oscr
from mmser.targets import Tasks, no_target
from mmser.trainer import MMSERTrainer

SET_COVERAGES = (0.8, 0.9, 0.95)  # of prediction sets, that are reported
Outputs = Mapping[str, np.ndarray]  # of `MMSERTrainer.predict_outputs`: name -> one row per clip


def predict_clips(trainer: MMSERTrainer, dataset: torch.utils.data.Dataset, rows: list[str]) -> dict[str, np.ndarray]:
    """
    `trainer.predict_outputs`, checked: a number that is not finite is an error that names the clip.

    Args:
        trainer: with the model.
        dataset: examples; all of them must be readable.
        rows: where each example comes from, for the error.
    """
    outputs = trainer.predict_outputs(dataset)
    for name, values in outputs.items():
        bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if bad.any():
            raise ValueError(
                f"the model's `{name}` is not finite for {bad.sum()} of {len(bad)} clips, the first is "
                f"{rows[int(bad.argmax())]}; if the precision is half, evaluate without --use_amp"
            )
    return outputs


def audio_alone(
    trainer: MMSERTrainer,
    split: datasets.Dataset | datasets.IterableDataset | None,
    make_dataset: Callable[..., torch.utils.data.Dataset],
) -> tuple[torch.utils.data.Dataset, np.ndarray] | None:
    """
    The examples of the clips that have audio and text, without their text, and the position of each in the split.

    Args: as of `predict_rows`.
    Returns: None if there are no such clips, the model does not use both modalities, or the split is a stream or None.
    """
    if not isinstance(split, datasets.Dataset) or not {"audio", "text"} <= set(split.column_names):
        return None
    index = np.flatnonzero([bool(audio and text) for audio, text in zip(split["audio"], split["text"], strict=True)])
    if len(trainer.used_modalities) < 2 or not len(index):
        return None
    return make_dataset(split.select(index), use_text=False), index


def predict_rows(
    trainer: MMSERTrainer,
    split: datasets.Dataset | datasets.IterableDataset,
    make_dataset: Callable[..., torch.utils.data.Dataset],
) -> dict[str, dict[str, np.ndarray]]:
    """
    Run the model over one split with all that each clip has, and with each modality alone.

    Args:
        trainer: with the model.
        split: a table of `load_emotion_dataset`; all of its clips must be readable (`drop_unreadable`).
        make_dataset: makes examples of a table; takes `use_audio` and `use_text`.
    Returns: row name -> outputs of `predict_outputs` and `index` [M], the position of each clip in the split. The
        rows are `model` and, if the data have both modalities and the model uses both, `audio_only` and `text_only`,
        over the clips that have that modality.
    """
    if not isinstance(split, datasets.Dataset):
        outputs = trainer.predict_outputs(make_dataset(split))
        return {"model": {**outputs, "index": np.arange(len(outputs["labels"]))}}
    rows = {}
    for name, (index, hidden) in _rows_of(trainer, split).items():
        table = split.select(index) if hidden else split
        outputs = predict_clips(trainer, make_dataset(table, **dict.fromkeys(hidden, False)), table["row"])
        rows[name] = {**outputs, "index": index}
    return rows


def _rows_of(trainer: MMSERTrainer, split: datasets.Dataset) -> dict[str, tuple[np.ndarray, list[str]]]:
    """The rows of `predict_rows`: the positions of their clips, and which of `use_audio` and `use_text` is off."""
    rows: dict[str, tuple[np.ndarray, list[str]]] = {"model": (np.arange(len(split)), [])}
    if {"audio", "text"} <= set(split.column_names) and len(trainer.used_modalities) > 1:
        for name, column, hidden in (("audio_only", "audio", "use_text"), ("text_only", "text", "use_audio")):
            index = np.flatnonzero([bool(value) for value in split[column]])
            if len(index):
                rows[name] = (index, [hidden])
    return rows


def number_predictions(trainer: MMSERTrainer, split: datasets.Dataset | datasets.IterableDataset) -> int | None:
    """How many clips `predict_rows` predicts, a clip once for each row; None of a stream."""
    if not isinstance(split, datasets.Dataset):
        return None
    return sum(len(index) for index, _ in _rows_of(trainer, split).values())


def predict_passes(
    trainer: MMSERTrainer, dataset: EmotionDataset, passes: int, seed: int = 42
) -> dict[str, np.ndarray]:
    """
    `predict_clips` with test-time augmentation: the mean over several passes of each clip.

    All passes but the first play the clip at another speed. No noise is added: averaging over noisy copies as well did
    worse on held-out real speech.
    """
    several = TestTimeAugmentation(dataset, passes, Augmenter(effects=("speed",), probability=1.0), seed)
    rows = [row for row in dataset.dataset["row"] for _ in range(passes)]
    return average_passes(predict_clips(trainer, several, rows), passes)


def average_passes(outputs: Mapping[str, Any], num_passes: int) -> dict[str, np.ndarray]:
    """Average several passes over each clip: probabilities are averaged, not logits.

    Args:
        outputs: arrays with one row per pass; the passes of one clip are together, as `TestTimeAugmentation` orders
            them: `logits` [N * P, C] and any others with N * P rows.
        num_passes: P.

    Returns:
        The same arrays with one row per clip. `logits` is the logarithm of the mean of softmax(logits), so that its
        softmax is that mean. `labels` is that of the first pass. A flag (bool) is set if it is set in more than half
        of the passes. Everything else is the mean. With one pass, the values stay as they are.

    Raises:
        ValueError: `num_passes` < 1, or an array whose number of rows is not a multiple of it.
    """
    num_passes = check_positive_integer(num_passes, "num_passes")
    averaged = {}
    for name, values in outputs.items():
        array = to_numpy(values, name)
        if array.ndim == 0 or len(array) % num_passes:
            raise ValueError(f"`{name}` must have {num_passes} rows for each clip, got shape {array.shape}.")
        array = array.reshape(len(array) // num_passes, num_passes, *array.shape[1:])
        if num_passes == 1 or name == "labels":
            averaged[name] = array[:, 0]
        elif name == "logits":
            log_probabilities = scipy.special.log_softmax(array.astype(np.float64), axis=2)
            averaged[name] = scipy.special.logsumexp(log_probabilities, axis=1) - math.log(num_passes)
        else:
            mean = array.mean(axis=1, dtype=np.float64)
            averaged[name] = mean > 0.5 if array.dtype == bool else mean
    return averaged


def describe_decisions(
    predictions: np.ndarray,
    labels: np.ndarray,
    label_names: list[str],
    num_samples: int = 1000,
    speakers: list[str] | None = None,
) -> dict[str, Any]:
    """
    Closed-set metrics of class ids [N] against the true ones [N], with 95 % intervals as `<metric>_interval`.

    Where the intervals draw speakers, as `bootstrap_classification` says, `speakers` is how many there are.
    """
    intervals = bootstrap_classification(predictions, labels, label_names, num_samples, speakers=speakers)
    return {
        "clips": len(labels),
        **({"speakers": len(set(speakers))} if speakers is not None and draws_speakers(speakers) else {}),
        **compute_classification_metrics(predictions, labels, label_names),
        **{f"{name}_interval": interval for name, interval in intervals.items()},
    }


def describe_calibration(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Whether softmax(logits) [N, C] means what it says of the true classes [N]."""
    probabilities = softmax(logits)
    return {
        "expected_calibration_error": expected_calibration_error(probabilities, labels),
        "negative_log_likelihood": negative_log_likelihood(logits, labels),
        "mean_confidence": float(probabilities.max(axis=1).mean()),
    }


def describe_sets(outputs: Outputs, prediction_sets: PredictionSets | None) -> dict[str, dict[str, Any]]:
    """
    How often the prediction sets of clips hold their label, and how large they are.

    Args:
        outputs: of `MMSERTrainer.predict_outputs`, calibrated.
        prediction_sets: of the model; None if they are not fitted.
    Returns: coverage asked for ("80 %") -> the share `covered`, its 95 % `covered_interval` for independent clips, the
        `mean_set_size`, and the share of sets with `one_label`. Empty without prediction sets.
    """
    if prediction_sets is None:
        return {}
    probabilities, labels = torch.from_numpy(softmax(outputs["logits"].astype(np.float64))), outputs["labels"]
    described = {}
    for coverage in SET_COVERAGES:
        members = prediction_sets(probabilities, coverage).numpy()
        sizes, covered = members.sum(axis=1), members[np.arange(len(labels)), labels]
        missed_least, missed_most = error_rate_interval(int((~covered).sum()), len(labels))
        described[f"{100 * coverage:.0f} %"] = {
            "covered": float(covered.mean()),
            "covered_interval": (1 - missed_most, 1 - missed_least),
            "mean_set_size": float(sizes.mean()),
            "one_label": float((sizes == 1).mean()),
        }
    return described


def describe_predictions(
    outputs: Outputs,
    label_names: list[str],
    groups: Mapping[str, list] | None = None,
    num_samples: int = 1000,
    speakers: list[str] | None = None,
) -> dict[str, Any]:
    """
    All metrics of one pass over one split.

    Args:
        outputs: of `MMSERTrainer.predict_outputs`.
        label_names: C names, in the order of the class ids.
        groups: name of a grouping (`"corpus"`) -> the group of each clip, N names.
        num_samples, speakers: as of `bootstrap_classification`, for the intervals.
    Returns: closed-set metrics, calibration, how well the uncertainty finds errors, the confusion matrix,
        `by_<grouping>` and, of two or more corpora, `mean_over_corpora_weighted_f1`.
    """
    logits, labels = outputs["logits"].astype(np.float64), outputs["labels"]
    predictions, probabilities = logits.argmax(axis=1), softmax(logits)
    wrong = predictions != labels
    result = {
        **describe_decisions(predictions, labels, label_names, num_samples, speakers),
        **describe_calibration(logits, labels),
        "error_auroc_of_uncertainty": error_detection_auroc(outputs["uncertainty"], wrong),
        "error_auroc_of_max_probability": error_detection_auroc(1 - probabilities.max(axis=1), wrong),
        "area_under_risk_coverage": area_under_risk_coverage(outputs["uncertainty"], wrong),
        "confusion_matrix": confusion_matrix(predictions, labels, len(label_names)).tolist(),
    }
    for name, values in (groups or {}).items():
        result[f"by_{name}"] = grouped_metrics(
            predictions, labels, values, label_names, probabilities, outputs.get("is_unknown"), num_samples, speakers
        )
    corpora = with_mean(result.get("by_corpus", {}), "corpus")
    if "mean over corpora" in corpora:
        result[MEAN_OVER_CORPORA] = corpora["mean over corpora"]["weighted_f1"]
    return result


def linear_probe(train_outputs: Outputs, outputs: Outputs) -> np.ndarray:
    """Class ids [N] from a logistic regression on the standardised fused vectors: the deep head has to beat it."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(train_outputs["fused"], train_outputs["labels"])
    return probe.predict(outputs["fused"])


def describe_rows(
    rows: Mapping[str, Outputs],
    label_names: list[str],
    groups: Mapping[str, list] | None = None,
    train_outputs: Outputs | None = None,
    class_counts: list[int] | None = None,
    num_samples: int = 1000,
    speakers: list[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """
    Score every row, and the simple answers that the model has to beat on the same clips.

    Args:
        rows: of `predict_rows`.
        label_names: in the order of the class ids.
        groups: name of a grouping -> the group of each clip of the split.
        train_outputs: of the training clips, for the row `linear_probe`, which is left out without them.
        class_counts: training clips per class, for the row `majority`; by default those of `train_outputs`.
        num_samples: resamples for the intervals.
        speakers: of each clip of the split, for the intervals, as of `bootstrap_classification`.
    Returns: row name -> metrics.
    """

    def of_row(values: list, outputs: Outputs) -> list:
        return [values[index] for index in outputs["index"]]

    described, speakers_of_row = {}, {}
    for name, outputs in rows.items():
        own = {key: of_row(values, outputs) for key, values in (groups or {}).items()}
        speakers_of_row[name] = None if speakers is None else of_row(speakers, outputs)
        described[name] = describe_predictions(outputs, label_names, own, num_samples, speakers_of_row[name])
    labels = rows["model"]["labels"]
    others = {}
    if train_outputs is not None:
        if len(np.unique(train_outputs["labels"])) > 1:
            others["linear_probe"] = linear_probe(train_outputs, rows["model"])
        class_counts = class_counts or np.bincount(train_outputs["labels"], minlength=len(label_names)).tolist()
    if class_counts:
        others["majority"] = np.full(len(labels), np.argmax(class_counts))
    for name, predictions in others.items():
        described[name] = describe_decisions(predictions, labels, label_names, num_samples, speakers_of_row["model"])
    return described


def describe_tasks(
    outputs: Outputs, targets: Mapping[str, Any], tasks: Tasks, num_samples: int = 1000
) -> dict[str, dict[str, Any]]:
    """
    Score the tasks beside the emotion, each over the clips that have a target of it.

    Args:
        outputs: of `predict_outputs`, for all clips of a split.
        targets: of `split_targets`, for the same clips.
        tasks: name -> list of classes, or "regression".
        num_samples: resamples for the intervals.
    Returns: task -> `clips` and, for classes, `compute_classification_metrics` with intervals and `majority_f1`, the
        weighted F1 of the most frequent class; for numbers `compute_regression_metrics`, `ccc_interval`, and
        `deviation_of_targets`. A task of which no clip has a target is left out.
    """
    described: dict[str, dict[str, Any]] = {}
    for task, kind in tasks.items():
        values = np.asarray(targets.get(task, []), dtype=np.float64)
        known = ~np.isnan(values) & (values != no_target(kind))
        if not known.any():
            continue
        predicted, true = outputs[f"auxiliary_{task}"][known].astype(np.float64), values[known]
        if isinstance(kind, str):
            described[task] = {
                "clips": len(true),
                **compute_regression_metrics(predicted, true),
                "ccc_interval": bootstrap_interval(concordance_correlation, predicted, true, num_samples=num_samples),
                "deviation_of_targets": float(true.std()),
            }
        else:
            classes = true.astype(np.int64)
            majority = np.full(len(classes), np.bincount(classes).argmax())
            described[task] = {
                **describe_decisions(predicted.argmax(axis=1), classes, kind, num_samples),
                "majority_f1": compute_classification_metrics(majority, classes, kind)["weighted_f1"],
            }
    return described


def open_set_scores(
    outputs: Outputs, train_outputs: Outputs | None = None, temperature: float = 1.0
) -> dict[str, np.ndarray]:
    """
    All scores [N] of how unknown a clip is (higher = more unknown) that the outputs allow, the model's own first.

    Args:
        outputs: of `predict_outputs`.
        train_outputs: of the training clips, for `knn` (on the fused vectors) and `knn_features`.
        temperature: that the model divides its logits by; the energy takes the logits before this division.
    Returns: `openmax` if it is fitted, `max_softmax`, `energy`, `knn`, `knn_features`, `uncertainty`.
    """
    scores = {"openmax": outputs["rejection_score"]} if "rejection_score" in outputs else {}
    logits = outputs["logits"].astype(np.float64)
    scores["max_softmax"] = 1 - softmax(logits).max(axis=1)
    scores["energy"] = energy_score(logits * temperature)
    for name, key in (("knn", "fused"), ("knn_features", "features")):
        if train_outputs is not None and key in train_outputs and key in outputs:
            scores[name] = knn_distance(train_outputs[key], outputs[key])
    return {**scores, "uncertainty": outputs["uncertainty"]}


def evaluate_open_set(
    known: Outputs,
    unknown_sets: Mapping[str, Outputs],
    train_outputs: Outputs | None = None,
    temperature: float = 1.0,
    num_samples: int = 1000,
) -> dict[str, dict[str, dict[str, Any]]]:
    """
    How well clips that are none of the classes are told apart; unknown is the positive class.

    Args:
        known: outputs of `predict_outputs` for the known clips.
        unknown_sets: name -> outputs for a set of unknown clips.
        train_outputs, temperature: see `open_set_scores`.
        num_samples: resamples for the intervals.
    Returns: set name -> score name -> `clips`, `auroc`, `auroc_interval`, `fpr_at_95_tpr` and `oscr`; with more than
        one set also `mean`, over the sets.
    """
    correct = known["logits"].argmax(axis=1) == known["labels"]
    known_scores = open_set_scores(known, train_outputs, temperature)
    report: dict[str, dict[str, dict[str, Any]]] = {}
    for set_name, outputs in unknown_sets.items():
        report[set_name] = {}
        for name, scores in open_set_scores(outputs, train_outputs, temperature).items():
            both = np.concatenate([known_scores[name], scores])
            is_unknown = np.arange(len(both)) >= len(correct)
            report[set_name][name] = {
                "clips": len(both),
                "auroc": auroc(both, is_unknown),
                "auroc_interval": bootstrap_interval(auroc, both, is_unknown, num_samples=num_samples),
                "fpr_at_95_tpr": fpr_at_95_tpr(both, is_unknown),
                "oscr": oscr(-known_scores[name], correct, -scores),
            }
    if len(report) > 1:
        metrics = ("auroc", "fpr_at_95_tpr", "oscr")
        report["mean"] = {
            name: {metric: float(np.mean([rows[name][metric] for rows in report.values()])) for metric in metrics}
            for name in known_scores
        }
    return report


def describe_rejection(
    known: Outputs, unknown_sets: Mapping[str, Outputs], label_names: list[str]
) -> dict[str, Any] | None:
    """
    What the model's own rule does: the clips that it accepts as one of the classes, and those that it rejects.

    Args:
        known, unknown_sets: as for `evaluate_open_set`.
        label_names: in the order of the class ids.
    Returns: shares `known_accepted`, `accepted_by_class` (nan for a class without clips), `accuracy` of all known
        clips and `accuracy_of_accepted`, and `unknown_rejected` by set; `answers`: class or set -> the clips whose
        answer is "unknown" (first) and each of the classes; None for a model that rejects nothing.
    """
    if "is_unknown" not in known:
        return None
    accepted, labels = ~known["is_unknown"].astype(bool), known["labels"]
    correct = known["logits"].argmax(axis=1) == labels

    def share(values: np.ndarray) -> float:
        return float(values.mean()) if len(values) else math.nan

    def answers(outputs: Outputs, rows: Any = slice(None)) -> list[int]:
        answer = np.where(outputs["is_unknown"].astype(bool), 0, 1 + outputs["logits"].argmax(axis=1))[rows]
        return np.bincount(answer, minlength=1 + len(label_names)).tolist()

    return {
        "known_accepted": share(accepted),
        "accepted_by_class": {name: share(accepted[labels == label]) for label, name in enumerate(label_names)},
        "accuracy": share(correct),
        "accuracy_of_accepted": share(correct[accepted]),
        "unknown_rejected": {name: share(outputs["is_unknown"]) for name, outputs in unknown_sets.items()},
        "answers": {
            **{name: answers(known, labels == label) for label, name in enumerate(label_names)},
            **{f"unknown: {name}": answers(outputs) for name, outputs in unknown_sets.items()},
        },
    }


def evaluate_augmentation(
    trainer: MMSERTrainer,
    dataset: EmotionDataset,
    num_passes: Iterable[int],
    label_names: list[str],
    seed: int = 42,
    num_samples: int = 1000,
) -> list[dict[str, Any]]:
    """
    Score test-time augmentation (see `predict_passes`).

    Args:
        trainer: with the model.
        dataset: the clips, as they are for evaluation.
        num_passes: the numbers of passes to try; 1 is the clip as it is.
        label_names: in the order of the class ids.
        seed: of the augmentation.
        num_samples: resamples for the intervals.
    Returns: for each number `passes`, `seconds` (decoding included), and the metrics of `describe_predictions`.
    """
    report = []
    for passes in num_passes:
        start = time.perf_counter()
        outputs = predict_passes(trainer, dataset, passes, seed)
        seconds = time.perf_counter() - start
        metrics = describe_predictions(outputs, label_names, num_samples=num_samples)
        report.append({"passes": passes, "seconds": seconds, **metrics})
    return report
