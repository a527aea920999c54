# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint learns from a few clips: what is fitted, what keeps it near what it knew, and honest answers.

1. `OutputFit`: the output layer alone, by logistic regression with a prior
2. `ClassifierFit`: the whole classifier, by a few steps of gradient descent
3. `cross_fit`: either of them, with answers for each clip by what was fitted without its speaker
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import scipy.optimize
import scipy.special
import torch
import torch.nn.functional as F
from transformers.utils import logging

from mmser.calibration import folds_by_group
from mmser.metrics import softmax
from mmser.model_calibration import reset_calibration

logger = logging.get_logger(__name__)
# Of `ClassifierFit`. Chosen on corpora that were held out of training (`benchmarks/never_heard.py`)
STEPS, LEARNING_RATE = 40, 3e-4
Outputs = Mapping[str, np.ndarray]  # of `MMSERTrainer.predict_outputs`: name -> one row per clip


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


class Fit(Protocol):
    """What is fitted to some rows of the outputs for a few clips. It changes the model, whose temperature is 1."""

    def fit(self, rows: np.ndarray) -> None:
        """Start from the checkpoint, and fit to these rows."""

    def answer(self, outputs: Outputs) -> dict[str, np.ndarray]:
        """Those outputs of any clips that the fit changes."""


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


class OutputFit:
    """
    Fits the output layer alone; see `fit_output_layer`.

    Args:
        model: gets the new layer.
        outputs: `features`, `fused` and `labels` of the clips.
        strength, rehearsal: see `fit_output_layer`.
    """

    def __init__(self, model: Any, outputs: Outputs, strength: float = 2.0, rehearsal: float = 1.0):
        self.output = model.classifier.output
        self.features, self.labels = outputs["features"].astype(np.float64), outputs["labels"]
        self.start = output_layer_of(model)
        self.rehearsed = what_it_knew(model, outputs["fused"]) if rehearsal > 0 else None
        self.strength, self.rehearsal = strength, rehearsal

    @torch.no_grad()
    def fit(self, rows: np.ndarray) -> None:
        chosen = self.features[rows], self.labels[rows]
        self.layer = fit_output_layer(self.start, *chosen, self.rehearsed, self.strength, self.rehearsal)
        self.output.weight.copy_(torch.from_numpy(self.layer.weight))
        self.output.bias.copy_(torch.from_numpy(self.layer.bias))

    def answer(self, outputs: Outputs) -> dict[str, np.ndarray]:
        return {"logits": self.layer(outputs["features"].astype(np.float64))}


class ClassifierFit:
    """
    Trains all layers of the classifier, by `STEPS` steps over all clips at once.

    All classes count the same. The few steps at a low learning rate keep the classifier near where it starts.

    Args:
        model: gets the new classifier.
        outputs: `fused` and `labels` of the clips.
        rehearsal: how much the answers to `scaled_centroids` count, as a share of all clips.
    """

    def __init__(self, model: Any, outputs: Outputs, rehearsal: float = 1.0):
        self.model = model
        weight = model.classifier.output.weight
        self.fused = torch.from_numpy(outputs["fused"]).to(weight.device, weight.dtype)
        self.labels = torch.from_numpy(outputs["labels"]).to(weight.device)
        self.start = copy.deepcopy(model.classifier.state_dict())
        self.rehearsal = rehearsal
        knew = what_it_knew(model, outputs["fused"]) if rehearsal > 0 else None
        self.centroids = weight.new_empty((0, self.fused.shape[1]))
        if knew is not None:
            self.centroids = scaled_centroids(model, outputs["fused"])
            self.answers = torch.from_numpy(knew.answers).to(weight.device, weight.dtype)

    @torch.enable_grad()
    def fit(self, rows: np.ndarray) -> None:
        classifier, chosen = self.model.classifier, torch.from_numpy(rows)
        classifier.load_state_dict(self.start)
        labels = self.labels[chosen]
        weights = 1 / torch.bincount(labels, minlength=self.model.config.num_labels).clamp(min=1)
        inputs = torch.cat([self.fused[chosen], self.centroids])
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        classifier.train()
        with torch.random.fork_rng():  # each fit drops out the same units, and nothing else notices
            torch.manual_seed(0)
            for _ in range(STEPS):
                own, known = classifier(inputs)[0].split([len(labels), len(self.centroids)])
                loss = F.cross_entropy(own, labels, weights.to(own))
                if len(known):
                    loss = loss + self.rehearsal * F.cross_entropy(known, self.answers)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        classifier.eval()

    @torch.no_grad()
    def answer(self, outputs: Outputs) -> dict[str, np.ndarray]:
        logits, features = self.model.classifier(torch.from_numpy(outputs["fused"]).to(self.fused))
        found = {
            "logits": logits,
            "features": features,
            "uncertainty": self.model.uncertainty(features)[:, 0],
            "anchor_distances": self.model.anchors(features)[1],
        }
        return {name: values.float().cpu().numpy() for name, values in found.items()}


def cross_fit(
    fit: Fit, outputs: Outputs, speakers: Sequence[str] | None = None, audio_alone: Outputs | None = None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    """
    Fit to a few clips, and answer them as if they were not known.

    Args:
        fit: of these clips. In the end it is fitted to all of them.
        outputs: `labels`, and what `calibrate_outputs` reads.
        speakers: N names, or None if they are not known.
        audio_alone: the same of clips without their text, with the `index` of each among `outputs`.
    Returns: `outputs` and `audio_alone` with what the fit changes, as for clips of speakers that were not seen: each
        clip is answered by what was fitted without its speaker (without it, if there is one speaker).
    """
    number = len(outputs["labels"])
    after = dict(outputs)
    alone = None if audio_alone is None else dict(audio_alone)
    for fold in folds_by_group(number, speakers)[0]:
        fit.fit(np.setdiff1d(np.arange(number), fold))
        _answer(fit, outputs, after, fold)
        if alone is not None and audio_alone is not None:
            _answer(fit, audio_alone, alone, np.flatnonzero(np.isin(alone["index"], fold)))
    fit.fit(np.arange(number))
    return after, alone


def _answer(fit: Fit, outputs: Outputs, after: dict[str, np.ndarray], rows: np.ndarray) -> None:
    """Put the answers to some rows of `outputs` into `after`."""
    for name, values in fit.answer({key: value[rows] for key, value in outputs.items()}).items():
        if after[name] is outputs[name]:
            after[name] = np.empty(outputs[name].shape, dtype=values.dtype)
        after[name][rows] = values


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
