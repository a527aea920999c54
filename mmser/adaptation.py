# SPDX-License-Identifier: Apache-2.0
"""`train_hf.py --adapt`: fit a checkpoint to a few labelled clips of new recordings, in seconds.

The output layer alone is fitted, and what says how far to trust an answer; all else stays as it is. Read in this
order: `check_arguments` and `take_all_clips` (what is refused, and the clips), `fit_output_layer`, `adapt_outputs`,
`adapt`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import datasets
import numpy as np
import scipy.optimize
import scipy.special
import torch
from transformers.utils import logging

from mmser.arguments import SPEC_AUGMENT, DataArguments, ModelArguments
from mmser.calibration import expected_calibration_error, folds_by_group
from mmser.groups import speakers_of
from mmser.metrics import compute_classification_metrics, softmax
from mmser.model_calibration import calibrate_outputs, reset_calibration
from mmser.model_loading import label_names_of, load_label_names
from mmser.trainer import MMSERTrainer

logger = logging.get_logger(__name__)
LEAST_CLIPS = 5  # of each class: with fewer there is next to nothing to fit, and to cross-fit
# Flags of a training by steps, which this is not; besides those of `MMSERTrainingArguments`
OTHER_MODEL_FLAGS = ("average_with", "teacher_name_or_path", "lora_rank", "config_overrides", *SPEC_AUGMENT)
OTHER_DATA_FLAGS = (
    *("streaming", "auxiliary_tasks", "auxiliary_label_maps", "auxiliary_weight", "label_distribution_columns"),
    *("validation_fraction", "augmentations", "augmented_copies", "text_dropout", "audio_dropout"),
)
Outputs = Mapping[str, np.ndarray]  # of `MMSERTrainer.predict_outputs`: name -> one row per clip


def check_arguments(model_arguments: ModelArguments, data_arguments: DataArguments) -> None:
    """
    Refuse flags that do not go with `--adapt`, and hold no speakers out unless `--test_fraction` asks for it.

    Raises:
        ValueError: there is no checkpoint to start from, or a flag is of a training by steps.
    """
    if model_arguments.model_name_or_path is None:
        raise ValueError("--adapt needs a trained checkpoint to start from: add --model_name_or_path.")
    for arguments, names in ((model_arguments, OTHER_MODEL_FLAGS), (data_arguments, OTHER_DATA_FLAGS)):
        defaults = type(arguments)()
        for name in names:
            if getattr(arguments, name) != getattr(defaults, name):
                raise ValueError(
                    f"--{name} does not go with --adapt, which fits the output layer alone: leave it out."
                )
    data_arguments.validation_fraction = 0.0
    if data_arguments.test_fraction == DataArguments.test_fraction:
        data_arguments.test_fraction = 0.0


def take_all_clips(splits: dict[str, Any], label_names: Sequence[str], checkpoint: str) -> None:
    """
    Put the validation clips of `splits` to the training clips: what they are for is done by cross-fitting here.

    Raises:
        ValueError: other classes than those of the checkpoint, or fewer than `LEAST_CLIPS` clips of one.
    """
    checkpoint_names = load_label_names(checkpoint, "--model_name_or_path")
    if list(label_names) != checkpoint_names:
        raise ValueError(
            f"--adapt keeps the classes of {checkpoint}, {', '.join(checkpoint_names)}, but those of the clips are "
            f"{', '.join(label_names)}: give them these names with --label_map, or train without --adapt."
        )
    if "validation" in splits:
        splits["train"] = datasets.concatenate_datasets([splits["train"], splits.pop("validation")])
    counts = np.bincount(splits["train"]["labels"], minlength=len(label_names))
    few = [f"{name} has {count}" for name, count in zip(label_names, counts, strict=True) if count < LEAST_CLIPS]
    if few:
        raise ValueError(f"--adapt needs at least {LEAST_CLIPS} clips of each class, 20 are better: {', '.join(few)}.")


def freeze_all_else(model: Any) -> None:
    """Leave nothing of a model to be learnt but its output layer."""
    model.requires_grad_(False)
    model.classifier.output.requires_grad_(True)


class OutputLayer(NamedTuple):
    """The last layer of the classifier: `weight` [C, F] and `bias` [C], float64."""

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features [N, F] -> logits [N, C]."""
        return features @ self.weight.T + self.bias


class Rehearsed(NamedTuple):
    """What the checkpoint knew: `features` [R, F] of clips that it learnt from, and its own answers [R, C] to them."""

    features: np.ndarray
    answers: np.ndarray


def output_layer_of(model: Any) -> OutputLayer:
    """The last layer of a model whose temperature is 1."""
    layer = model.classifier.output
    return OutputLayer(*(values.detach().cpu().numpy().astype(np.float64) for values in (layer.weight, layer.bias)))


def fit_output_layer(
    start: OutputLayer,
    features: np.ndarray,
    labels: np.ndarray,
    rehearsed: Rehearsed | None = None,
    strength: float = 2.0,
    rehearsal: float = 1.0,
) -> OutputLayer:
    """
    Logistic regression with a Gaussian prior whose mean is `start` (adaptation by maximum a posteriori).

    All classes count the same, however many clips they have. The prior is as wide for each weight and bias, so that
    it gives the logits of a clip of average length a standard deviation of `strength` around those of `start`.

    Args:
        start: the layer so far.
        features: float [N, F], of the clips.
        labels: class ids, [N].
        rehearsed: answers to keep; None for none.
        strength: how far the logits may move, greater than 0.
        rehearsal: how much all of `rehearsed` counts together, as a share of all clips.
    """
    num_labels, size = start.weight.shape
    counts = np.bincount(labels, minlength=num_labels)
    weights = len(labels) / (counts > 0).sum() / counts[labels]
    inputs, targets = features.astype(np.float64), np.eye(num_labels)[labels]
    square_length = 1 + np.square(inputs).sum(axis=1).mean()  # with the 1 that the bias is multiplied by
    if rehearsed is not None and rehearsal > 0:
        share = rehearsal * len(labels) / len(rehearsed.features)
        inputs, targets = (
            np.concatenate(pair) for pair in ((inputs, rehearsed.features), (targets, rehearsed.answers))
        )
        weights = np.concatenate([weights, np.full(len(rehearsed.features), share)])
    inputs = np.column_stack([inputs, np.ones(len(inputs))])
    before = np.column_stack([start.weight, start.bias])

    def loss(moved: np.ndarray) -> tuple[float, np.ndarray]:
        moved = moved.reshape(before.shape)
        log_probabilities = scipy.special.log_softmax(inputs @ (before + moved).T, axis=1)
        gradient = ((np.exp(log_probabilities) - targets) * weights[:, None]).T @ inputs
        prior = moved * square_length / strength**2
        value = -(weights[:, None] * targets * log_probabilities).sum() + (prior * moved).sum() / 2
        return value, (gradient + prior).ravel()

    found = scipy.optimize.minimize(
        loss, np.zeros(before.size), jac=True, method="L-BFGS-B", options={"maxiter": 1000, "gtol": 1e-6}
    )
    layer = before + found.x.reshape(before.shape)
    return OutputLayer(layer[:, :size], layer[:, size])


def scaled_centroids(model: Any, fused: np.ndarray) -> torch.Tensor | None:
    """
    The centroids [R, D] of a model's OpenMax, each once. They are directions, and get the median length of the fused
    vectors [N, D] of the clips at hand. None for a model without.
    """
    openmax, weight = model.openmax, model.classifier.output.weight
    if not openmax.has_centroids or not openmax.centroids.any():
        return None
    centroids = openmax.centroids.flatten(0, 1).unique(dim=0) * float(np.median(np.linalg.norm(fused, axis=1)))
    return centroids.to(weight.device, weight.dtype)


@torch.no_grad()
def what_it_knew(model: Any, fused: np.ndarray) -> Rehearsed | None:
    """
    What stands for the training clips of a model (`scaled_centroids`), and its answers; None, with a warning, if
    nothing does. `fused` [N, D] are the fused vectors of the clips at hand.
    """
    centroids = scaled_centroids(model, fused)
    if centroids is None:
        logger.warning(
            "The checkpoint has no centroids of the clips that it was trained on (its OpenMax has none, or is not "
            "fitted), so its earlier answers are not rehearsed: it may lose more of what it knew."
        )
        return None
    logits, features = model.eval().classifier(centroids)
    answers = softmax(logits.float().cpu().numpy().astype(np.float64))
    return Rehearsed(features.float().cpu().numpy().astype(np.float64), answers)


@torch.no_grad()
def adapt_outputs(
    model: Any,
    outputs: Outputs,
    speakers: Sequence[str] | None = None,
    audio_alone: Outputs | None = None,
    strength: float = 2.0,
    rehearsal: float = 1.0,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    """
    Fit the output layer of `model`, whose temperature is 1, to outputs for a few clips.

    Args:
        model: gets the new layer.
        outputs: `features`, `fused`, `labels` and all else that `calibrate_outputs` reads.
        speakers: N names, or None if they are not known.
        audio_alone: the same of clips without their text, with the `index` of each among `outputs`.
        strength, rehearsal: see `fit_output_layer`.
    Returns: `outputs` and `audio_alone` with other `logits`, as for clips of speakers that were not seen: each clip is
        answered by a layer that was fitted without its speaker (without it, if there is one speaker).
    """
    labels, features = outputs["labels"], outputs["features"].astype(np.float64)
    fit: Callable[..., OutputLayer] = partial(
        fit_output_layer,
        output_layer_of(model),
        rehearsed=what_it_knew(model, outputs["fused"]) if rehearsal > 0 else None,
        strength=strength,
        rehearsal=rehearsal,
    )
    logits = np.empty(outputs["logits"].shape)
    alone = None if audio_alone is None else {**audio_alone, "logits": np.empty(audio_alone["logits"].shape)}
    for fold in folds_by_group(len(labels), speakers)[0]:
        others = np.setdiff1d(np.arange(len(labels)), fold)
        layer = fit(features[others], labels[others])
        logits[fold] = layer(features[fold])
        if alone is not None:
            rows = np.isin(alone["index"], fold)
            alone["logits"][rows] = layer(alone["features"][rows])
    layer, output = fit(features, labels), model.classifier.output
    output.weight.copy_(torch.from_numpy(layer.weight))
    output.bias.copy_(torch.from_numpy(layer.bias))
    return {**outputs, "logits": logits}, alone


@torch.no_grad()
def fold_temperature(model: Any) -> list[float]:
    """
    Make a model's temperature part of its output layer: what it answers stays. The rest of its calibration is
    forgotten, but for OpenMax. Returns: the weights of its error probability, for `calibrate_outputs`.
    """
    temperature, weights = reset_calibration(model)
    model.classifier.output.weight.div_(temperature)
    model.classifier.output.bias.div_(temperature)
    return weights


@torch.no_grad()
def adapt(
    trainer: MMSERTrainer,
    dataset: Any,
    audio_alone: tuple[Any, np.ndarray] | None = None,
    strength: float = 2.0,
    rehearsal: float = 1.0,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Adapt the model of a trainer to a few clips: fit its output layer, then calibrate it anew.

    The temperature becomes part of the layer first: so the prior and what is rehearsed are calibrated answers.

    Args:
        trainer: with the model; it need not have anything to train on.
        dataset: the clips, as they are for evaluation.
        audio_alone: of `audio_alone` in `mmser.scores`, for OpenMax.
        strength, rehearsal: see `fit_output_layer`.
    Returns: `clips`, `speakers` (None if not known), weighted F1 and expected calibration error on these clips
        `_before` and, cross-fitted, `_after`, and the `seconds` of it all; and the report of `calibrate_outputs`.
    """
    start = time.perf_counter()
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    weights = fold_temperature(model)
    before = trainer.predict_outputs(dataset)
    speakers = speakers_of(dataset)
    alone = trainer.predict_audio_alone(before, audio_alone)
    after, alone = adapt_outputs(model, before, speakers, alone, strength, rehearsal)
    calibration = calibrate_outputs(model, after, speakers, (1.0, weights), audio_alone=alone)
    report: dict[str, Any] = {
        "clips": len(before["labels"]),
        "speakers": None if speakers is None else len(set(speakers)),
        "strength": strength,
        "rehearsal": rehearsal,
    }
    names = label_names_of(model.config)
    scaled = after["logits"] / calibration["temperature"]
    for name, logits in (("before", before["logits"].astype(np.float64)), ("after", scaled)):
        answers = logits.argmax(axis=1)
        report[f"weighted_f1_{name}"] = compute_classification_metrics(answers, before["labels"], names)["weighted_f1"]
        report[f"ece_{name}"] = expected_calibration_error(softmax(logits), before["labels"])
    report["seconds"] = round(time.perf_counter() - start, 1)
    return report, calibration


def describe(report: Mapping[str, Any]) -> str:
    """What `adapt` reports, in a sentence."""
    left_out = "its clip" if report["speakers"] in (None, 1) else "its speaker"
    return (
        f"On your {report['clips']} clips, the weighted F1 was {report['weighted_f1_before']:.3f} and is "
        f"{report['weighted_f1_after']:.3f}, the calibration error was {report['ece_before']:.3f} and is "
        f"{report['ece_after']:.3f} (each clip answered by a layer that was fitted without {left_out})."
    )
