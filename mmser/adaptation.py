# SPDX-License-Identifier: Apache-2.0
"""`train_hf.py --adapt`: fit a checkpoint to a few labelled clips of new recordings, in half a minute.

The classifier is fitted, or its output layer alone, and what says how far to trust an answer; all else stays as it is.
Read in this order: `check_arguments` and `take_all_clips` (what is refused, and the clips), `choose_layers`, `adapt`.
How the layers are fitted is in `adapted_layers.py`.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch

from mmser.adapted_layers import ClassifierFit, Fit, OutputFit, cross_fit, fold_temperature
from mmser.arguments import SPEC_AUGMENT, DataArguments, ModelArguments
from mmser.calibration import expected_calibration_error
from mmser.groups import speakers_of
from mmser.metrics import compute_classification_metrics, softmax
from mmser.model_calibration import calibrate_outputs
from mmser.model_loading import label_names_of, load_label_names
from mmser.trainer import MMSERTrainer
from mmser.training_arguments import MMSERTrainingArguments
from mmser.training_flags import CLASSIFIER, OUTPUT

STRENGTH = 2.0  # of the prior of the output layer
LEAST_CLIPS = 5  # of each class: with fewer there is next to nothing to fit, and to cross-fit
# Flags of a training by steps, which this is not; besides those of `MMSERTrainingArguments`
OTHER_MODEL_FLAGS = ("average_with", "teacher_name_or_path", "lora_rank", "config_overrides", *SPEC_AUGMENT)
OTHER_DATA_FLAGS = (
    *("streaming", "auxiliary_tasks", "auxiliary_label_maps", "auxiliary_weight", "label_distribution_columns"),
    *("validation_fraction", "augmentations", "augmented_copies", "text_dropout", "audio_dropout"),
)


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
                    f"--{name} does not go with --adapt, which is no training of all weights: leave it out."
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


def choose_layers(model: Any, arguments: MMSERTrainingArguments) -> str:
    """
    What is fitted: `--adapt_layers`, or else the whole classifier of a model where that changes its answers alone.

    Returns: `CLASSIFIER` or `OUTPUT`.
    Raises:
        ValueError: the whole classifier is asked for, and cannot learn or answers other tasks too.
    """
    reason = None
    if model.config.int8_weights:
        reason = "is in int8, of which the output layer alone can learn"
    elif model.auxiliary.tasks:
        reason = f"also answers {', '.join(model.auxiliary.tasks)}, and these answers would move"
    if arguments.adapt_layers == CLASSIFIER and reason:
        raise ValueError(f"--adapt_layers {CLASSIFIER}: the checkpoint {reason}. Give --adapt_layers {OUTPUT}.")
    if arguments.adapt_layers is not None:
        return arguments.adapt_layers
    return OUTPUT if reason or arguments.adapt_strength is not None else CLASSIFIER


def freeze_all_else(model: Any, layers: str) -> None:
    """Leave nothing of a model to be learnt but the layers of `choose_layers`."""
    model.requires_grad_(False)
    (model.classifier.output if layers == OUTPUT else model.classifier).requires_grad_(True)


@torch.no_grad()
def adapt(
    trainer: MMSERTrainer,
    dataset: Any,
    audio_alone: tuple[Any, np.ndarray] | None = None,
    layers: str = CLASSIFIER,
    strength: float = STRENGTH,
    rehearsal: float = 1.0,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Adapt the model of a trainer to a few clips: fit its classifier, then calibrate it anew.

    The temperature becomes part of the output layer first: so the prior and what is rehearsed are calibrated answers.

    Args:
        trainer: with the model; it need not have anything to train on.
        dataset: the clips, as they are for evaluation.
        audio_alone: of `audio_alone` in `mmser.scores`, for OpenMax.
        layers: `CLASSIFIER` or `OUTPUT`.
        strength, rehearsal: of `OutputFit`; the rehearsal also of `ClassifierFit`.
    Returns: `clips`, `speakers` (None if not known), weighted F1 and expected calibration error on these clips
        `_before` and, cross-fitted, `_after`, and the `seconds` of it all; and the report of `calibrate_outputs`.
    """
    start = time.perf_counter()
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    weights = fold_temperature(model)
    before = trainer.predict_outputs(dataset)
    speakers = speakers_of(dataset)
    alone = trainer.predict_audio_alone(before, audio_alone)
    if layers == OUTPUT:
        fit: Fit = OutputFit(model, before, strength, rehearsal)
    else:
        fit = ClassifierFit(model, before, rehearsal)
    after, alone = cross_fit(fit, before, speakers, alone)
    calibration = calibrate_outputs(model, after, speakers, (1.0, weights), audio_alone=alone)
    report: dict[str, Any] = {
        "clips": len(before["labels"]),
        "speakers": None if speakers is None else len(set(speakers)),
        "layers": layers,
        **({"strength": strength} if layers == OUTPUT else {}),
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
    left_out = "it" if report["speakers"] in (None, 1) else "its speaker"
    what = "a layer" if report["layers"] == OUTPUT else "a classifier"
    return (
        f"On your {report['clips']} clips, the weighted F1 was {report['weighted_f1_before']:.3f} and is "
        f"{report['weighted_f1_after']:.3f}, the calibration error was {report['ece_before']:.3f} and is "
        f"{report['ece_after']:.3f} (each clip answered by {what} that was fitted without {left_out})."
    )
