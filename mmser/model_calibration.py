# SPDX-License-Identifier: Apache-2.0
"""What is fitted to the outputs of a trained model, so that its answers can be trusted as far as they go.

`reset_calibration` forgets it, `calibrate_outputs` fits it to held-out clips: the temperature, the probability of an
error, the prediction sets and OpenMax. `fit_openmax` fits OpenMax alone. The models are
`MMSERForAudioClassification`; the outputs those of `MMSERTrainer.predict_outputs`, made after `reset_calibration`.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from mmser.calibration import (
    ONE_MINUS_MAX,
    describe_fit,
    doubt_log_odds,
    error_detection_auroc,
    error_log_odds,
    error_rate_interval,
    expected_calibration_error,
    fit_error_probability,
    fit_temperature,
    negative_log_likelihood,
)
from mmser.metrics import softmax
from mmser.model_loading import label_names_of
from openmax_mmser import OpenMaxFitError

logger = logging.get_logger(__name__)
Fit = tuple[float, list[float]]  # the temperature, and the weights of `fit_error_probability`


def reset_calibration(model: Any) -> Fit:
    """Forget all but OpenMax. Returns: what was fitted before, as `calibrate_outputs` takes it."""
    temperature, weights = model.temperature.item(), model.uncertainty.error_calibration.tolist()
    if weights == list(model.uncertainty.uncalibrated):
        weights = list(ONE_MINUS_MAX)
    model.temperature.fill_(1.0)
    model.prediction_sets.reset()
    model.uncertainty.error_calibration.copy_(torch.tensor(model.uncertainty.uncalibrated))
    return temperature, weights


def calibrate_outputs(
    model: Any,
    outputs: Mapping[str, np.ndarray],
    speakers: Sequence[str] | None = None,
    earlier: Fit = (1.0, list(ONE_MINUS_MAX)),
    train: Mapping[str, np.ndarray] | None = None,
    audio_alone: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """
    Fit a model's calibration, and OpenMax where it can be, to outputs for held-out clips.

    Args:
        model: gets what is fitted.
        outputs: `logits` and `uncertainty` as the network gives them, `fused`, `anchor_distances` and `labels`.
        speakers: N names, or None if they are not known.
        earlier: of `reset_calibration`; kept where these clips do not show that another is better.
        train: outputs of the training clips, for OpenMax.
        audio_alone: outputs of clips without their text, for OpenMax, with the `index` of each among `outputs`.
    Returns: see `MMSERTrainer.calibrate`.
    """
    logits, labels = outputs["logits"].astype(np.float64), outputs["labels"]
    wrong = logits.argmax(axis=1) != labels
    model.temperature.fill_(fit_temperature(logits, labels, speakers, earlier[0]))
    temperature = model.temperature.item()  # as the model rounds it
    doubt = doubt_log_odds(logits / temperature)
    fitted = fit_error_probability(doubt, outputs["uncertainty"], wrong, speakers, earlier[1])
    weights = model.uncertainty.error_calibration.copy_(torch.from_numpy(fitted)).tolist()
    report: dict[str, Any] = {
        "temperature": temperature,
        "clips": len(labels),
        "speakers": None if speakers is None else len(set(speakers)),
        "errors": int(wrong.sum()),
        "error_rate_interval": error_rate_interval(int(wrong.sum()), len(labels)),
        "uses_one_minus_max": weights == list(ONE_MINUS_MAX),
        "largest_set_coverage": model.prediction_sets.fit(softmax(logits / temperature), labels, speakers),
    }
    for name, divisor in (("before", 1.0), ("after", temperature)):
        report[f"nll_{name}"] = negative_log_likelihood(logits, labels, divisor)
        report[f"ece_{name}"] = expected_calibration_error(softmax(logits / divisor), labels)
    if wrong.any() and not wrong.all():
        combined = error_log_odds(doubt, outputs["uncertainty"], weights)
        report["error_auroc_before"] = error_detection_auroc(outputs["uncertainty"], wrong)
        report["error_auroc_of_max_probability"] = error_detection_auroc(doubt, wrong)
        report["error_auroc_after"] = error_detection_auroc(combined, wrong)
    logger.info(describe_fit(report))
    fit_openmax(model, train, join_audio_alone(outputs, speakers, audio_alone), temperature)
    return report


def fit_openmax(
    model: Any,
    train: Mapping[str, np.ndarray] | None,
    held_out: Mapping[str, np.ndarray] | None,
    temperature: float,
) -> None:
    """
    `OpenMax.fit_outputs` with the settings of the model; what cannot be fitted is left as it is, with a warning. Of a
    model that rejects nothing there is nothing to warn of.
    """
    tail_size, acceptance = model.config.openmax_tail_size, model.config.openmax_acceptance
    label_names = label_names_of(model.config)
    rejects = model.config.use_openmax and model.config.openmax_threshold is not None
    with contextlib.nullcontext() if rejects else _without_warnings(type(model.openmax).__module__):
        try:
            model.openmax.fit_outputs(train, held_out, temperature, tail_size, acceptance, label_names)
        except OpenMaxFitError as error:  # no reason to lose a trained model
            (logger.warning if rejects else logger.info)(f"OpenMax is left as it is: {error}")


@contextlib.contextmanager
def _without_warnings(module: str) -> Iterator[None]:
    """Of the logger of a module."""
    own = logging.get_logger(module)
    before = own.level
    own.setLevel(logging.ERROR)
    try:
        yield
    finally:
        own.setLevel(before)


def join_audio_alone(
    outputs: Mapping[str, np.ndarray],
    speakers: Sequence[str] | None = None,
    alone: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Outputs for OpenMax: clips as they are, and without their text. Both of a clip count as one speaker's."""
    if alone is None:
        return {**outputs} if speakers is None else {**outputs, "speakers": np.array(speakers)}
    names = np.array(speakers or [f"clip {index}" for index in range(len(outputs["labels"]))])
    wanted = ("logits", "fused", "anchor_distances", "labels")
    joined = {name: np.concatenate([outputs[name], alone[name]]) for name in wanted}
    return {**joined, "speakers": np.concatenate([names, names[alone["index"]]])}
