# SPDX-License-Identifier: Apache-2.0
"""`OpenMax`: an extra class "unknown" for clips that are none of the classes (Bendale & Boult 2016).

Read in this order: what is stored, `fit_outputs` (all that is fitted, in one call), its three steps (centroids,
Weibulls, thresholds), then what happens to a clip: `distances`, `hazard`, `log_probabilities`, `reject`.
Shape letters: B or N clips, C classes, K centroids per class, D the width of the vectors.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from scipy.optimize import brentq
from torch import Tensor, nn
from transformers.utils import logging

try:
    from .conformal_mmser import conformal_threshold
except ImportError:
    if __package__:  # beside a checkpoint a failed import is a real error, not a reason to take an installed copy
        raise
    from conformal_mmser import conformal_threshold

logger = logging.get_logger(__name__)

Array = np.ndarray | Tensor


class OpenMaxFitError(ValueError):
    """The clips cannot determine a fit: too few are classified correctly, or they are all alike."""


class OpenMax(nn.Module):
    """
    OpenMax (Bendale & Boult 2016): the farther a clip is from a class, compared with the members of that class, the
    more of its probability goes to "unknown". w_c is the share of the members of class c that are nearer.

    At the level of activations it is as published (algorithms 1 and 2, with the rank weights of the authors' code):
    "unknown" takes omega_r w_c of the activation of the class of rank r, before the softmax. The published rule
    presumes activations of at least 0, so the activations of each row are shifted to start at 0.
    At the level of probabilities "unknown" takes w_c of the probability of each class, after the softmax: a confident
    classifier then cannot outvote the distance. At both levels more distance can only mean more "unknown".

    The distance is that to the nearest of `centroids_per_class` k-means centroids of the class, on the unit sphere.
    With `centroids_per_class=0` it is any distance that is given, such as that to the class anchors.

    Args:
        num_labels: C.
        alpha: number of top-ranked classes to revise, at the level of activations.
        level: "activation" or "probability".
        centroids_per_class: K; 0 keeps none.
        embedding_size: D, width of the vectors that the centroids are of.
    """

    min_tail = 5  # a Weibull fitted on fewer distances says next to nothing
    # No score exceeds it, so no clip is rejected. It is finite: tools that compare checkpoints subtract the weights
    no_threshold = torch.finfo(torch.float32).max
    weibull_shape: Tensor
    weibull_scale: Tensor
    weibull_shift: Tensor
    fitted: Tensor
    rejection_thresholds: Tensor
    centroids: Tensor

    def __init__(
        self,
        num_labels: int,
        alpha: int,
        level: str = "activation",
        centroids_per_class: int = 0,
        embedding_size: int = 0,
    ):
        super().__init__()
        self.alpha = alpha
        self.level = level
        for name in ("weibull_shape", "weibull_scale", "weibull_shift"):
            self.register_buffer(name, torch.ones(num_labels, dtype=torch.float32))
        # A float, as `_keep_in_fp32_modules_strict` would turn a bool into one. One entry for each class: loading with
        # another number of labels then leaves it out, together with the fit that it stands for
        self.register_buffer("fitted", torch.zeros(num_labels, dtype=torch.float32))
        thresholds = torch.full((num_labels,), self.no_threshold, dtype=torch.float32)
        self.register_buffer("rejection_thresholds", thresholds)
        if centroids_per_class:
            shape = (num_labels, centroids_per_class, embedding_size)
            self.register_buffer("centroids", torch.zeros(shape, dtype=torch.float32))
        # What `fitted` holds after a fit: 1 anchors, 2 centroids at the level of activations, 3 and 4 the same at the
        # level of probabilities. A checkpoint that was fitted for another kind then counts as not fitted
        self.kind = 1.0 + self.has_centroids + 2 * (level == "probability")
        self._known_fits: tuple[bool, bool] | None = None

    @property
    def has_centroids(self) -> bool:
        """Whether distances are to centroids of the classes."""
        return hasattr(self, "centroids")

    @property
    def is_fitted(self) -> bool:
        """Whether the Weibulls are fitted."""
        return self._fits[0]

    @property
    def has_thresholds(self) -> bool:
        """Whether thresholds of rejection are fitted."""
        return self._fits[1]

    @property
    def _fits(self) -> tuple[bool, bool]:
        """Read from the buffers once, so that a forward pass neither waits for the device nor depends on data."""
        if self._known_fits is None:
            is_fitted = bool((self.fitted == self.kind).all())
            if self.has_centroids:  # a checkpoint with another number of centroids leaves them unloaded
                is_fitted = is_fitted and bool(self.centroids.any())
            if not is_fitted and bool(self.fitted.any()):
                logger.warning_once(
                    "This OpenMax was fitted with another `openmax_distance`, `openmax_level` or number of centroids "
                    "than its configuration asks for. It counts as not fitted, and nothing is rejected."
                )
            self._known_fits = is_fitted, bool((self.rejection_thresholds < self.no_threshold).any())
        return self._known_fits

    def _read_fits(self) -> None:
        self._known_fits = None
        self._known_fits = self._fits

    def train(self, mode: bool = True):
        """Also read which fits there are: loading ends with `eval()`, and an export must not branch on data."""
        if not mode and not self.fitted.is_meta:
            self._read_fits()
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs):
        self._known_fits = None
        super()._load_from_state_dict(*args, **kwargs)

    def reset(self) -> None:
        """Forget every fit."""
        for buffer in (self.weibull_shape, self.weibull_scale, self.weibull_shift):
            buffer.fill_(1.0)
        self.rejection_thresholds.fill_(self.no_threshold)
        self.fitted.fill_(0.0)
        if self.has_centroids:
            self.centroids.fill_(0.0)
        self._known_fits = None

    def fit_outputs(
        self,
        train: Mapping[str, Any] | None,
        held_out: Mapping[str, Any] | None = None,
        temperature: float = 1.0,
        tail_size: int = 20,
        acceptance: float | None = None,
        label_names: Sequence[str] | None = None,
    ) -> None:
        """
        Fit everything to the outputs of a model.

        The centroids are those of the training clips; a module that has centroids keeps them. Training clips lie
        nearer to centroids, which are means of them, than new clips do: with centroids, the Weibulls are fitted on
        the held-out clips, if enough of them are classified correctly. Otherwise, and with anchors, they are fitted
        on the training clips, as published. The thresholds are those of the held-out clips.

        Args:
            train, held_out: arrays or tensors `logits` [N, C], made at temperature 1, `fused` [N, D],
                `anchor_distances` [N, C] and `labels` [N] of training clips and of clips that were not trained on;
                `held_out` may also have `speakers`, N names, for `fit_thresholds`.
            temperature: that the model divides its logits by.
            tail_size: see `fit`.
            acceptance: see `fit_thresholds`; None fits no thresholds.
            label_names: see `fit`.
        Raises:
            OpenMaxFitError: there are no centroids and no training clips, too few clips are classified correctly and
                nothing was fitted before, or the clips are all alike.
            ValueError: values that are not finite, or shapes that do not match.
        """
        if self.has_centroids and not self.centroids.any():
            if train is None:
                raise OpenMaxFitError("OpenMax has no centroids: they come from training clips, and none are given.")
            self.fit_centroids(train["fused"], train["labels"], label_names=label_names)
        enough = self.min_tail * len(self.weibull_shape)
        sources = [held_out, train] if self.has_centroids else [train]
        source = next((outputs for outputs in sources if outputs and _num_correct(outputs) >= enough), None)
        if source is not None:
            predictions = as_array(source["logits"]).argmax(axis=1)
            self.fit(self._distances_of(source), source["labels"], predictions, tail_size, label_names)
        elif not self.is_fitted:
            raise OpenMaxFitError(f"OpenMax needs at least {enough} correctly classified clips, and there are fewer.")
        if held_out is not None and acceptance is not None:
            logits = torch.as_tensor(held_out["logits"]).float().to(self.fitted.device) / temperature
            scores = self.rejection_scores(logits, self._distances_of(held_out))
            self.fit_thresholds(scores, logits.argmax(dim=-1), acceptance, held_out.get("speakers"), label_names)

    def _distances_of(self, outputs: Mapping[str, Any]) -> Tensor:
        fused, anchor_distances = (
            torch.as_tensor(outputs[name]).float().to(self.fitted.device) for name in ("fused", "anchor_distances")
        )
        return self.distances(fused, anchor_distances)

    def fit_centroids(
        self, embeddings: Array, labels: Array, seed: int = 0, label_names: Sequence[str] | None = None
    ) -> None:
        """
        Place the centroids of each class by k-means (k-means++ start) over its L2-normalised members.

        A distinct centroid has at least four members on average, so that few clips do not become centroids of their
        own. Where that leaves fewer than K centroids, they are repeated. A class without members takes the centroids
        of all clips; a warning names it. Earlier fits are forgotten.

        Args:
            embeddings: [N, D], of training clips.
            labels: class ids, [N].
            seed: of the k-means++ start.
            label_names: for the warning, in the order of the class ids.
        Raises:
            ValueError: shapes that do not match, no clip, or values that are not finite.
        """
        embeddings, labels = as_array(embeddings), as_array(labels)
        num_labels, _, size = self.centroids.shape
        if embeddings.ndim != 2 or embeddings.shape[1] != size or labels.shape != embeddings.shape[:1]:
            raise ValueError(
                f"`embeddings` must be [N, {size}] and `labels` [N]; got {embeddings.shape} and {labels.shape}."
            )
        if not len(labels) or not np.isfinite(embeddings).all():
            raise ValueError("`embeddings` must hold at least one clip and finite values only.")
        directions = _normalized(embeddings.astype(np.float64))
        self.reset()
        for label in range(num_labels):
            members = directions[labels == label]
            if not len(members):
                name = _named([label], label_names)
                logger.warning(f"OpenMax: {name} has no training clips; the centroids of all clips stand in.")
                members = directions
            self.centroids[label] = torch.from_numpy(self._k_means(members, seed))

    def _k_means(self, members: np.ndarray, seed: int) -> np.ndarray:
        """Unit vectors [K, D]."""
        members = np.unique(members, axis=0)
        number = min(self.centroids.shape[1], max(1, len(members) // 4))
        centroids, _ = kmeans2(members, number, minit="++", rng=seed)
        return _normalized(np.resize(centroids, self.centroids.shape[1:]))

    def fit(
        self,
        distances: Array,
        labels: Array,
        predictions: Array,
        tail_size: int = 20,
        label_names: Sequence[str] | None = None,
    ) -> None:
        """
        Fit one Weibull per class on the largest distances between correctly classified clips and their own class.

        As in libmr, a tail t is moved to t - min(t) + 1 before a maximum likelihood fit with location 0. A class with
        fewer than 5 correct clips, or without spread in its tail, takes the fit over the clips of all classes; a
        warning names it. Earlier thresholds of rejection are forgotten.

        Args:
            distances: to each class, [N, C].
            labels, predictions: class ids, [N].
            tail_size: number of largest distances used per class, at least 5.
        Raises:
            ValueError: shapes that do not match, values that are not finite, a tail below 5, or too few correct clips
                over all classes.
        """
        distances, labels, predictions = (as_array(values) for values in (distances, labels, predictions))
        distances = distances.astype(np.float64)
        num_labels = len(self.weibull_shape)
        if distances.shape != (len(labels), num_labels) or labels.shape != predictions.shape or labels.ndim != 1:
            raise ValueError(
                f"`distances` must be [N, {num_labels}] and `labels`, `predictions` [N]; got {distances.shape}, "
                f"{labels.shape}, {predictions.shape}."
            )
        if not np.isfinite(distances).all():
            raise ValueError("`distances` has values that are not finite.")
        if tail_size < self.min_tail:
            raise ValueError(f"`tail_size` must be at least {self.min_tail}, got {tail_size}.")
        correct = labels == predictions
        own_distance = distances[np.arange(len(labels))[correct], labels[correct]]
        tails = [own_distance[labels[correct] == label] for label in range(num_labels)]
        fits = [self._fit_tail(tail, tail_size) for tail in tails]
        pooled = self._fit_tail(own_distance, tail_size)
        if pooled is None and None in fits:
            raise OpenMaxFitError(
                f"OpenMax needs at least {self.min_tail} correctly classified clips with different distances, "
                f"got {len(own_distance)} correct of {len(labels)}."
            )
        if lacking := [label for label, fit in enumerate(fits) if fit is None]:
            logger.warning(
                f"OpenMax: too few clips of {_named(lacking, label_names)} are classified correctly, or they are too "
                f"alike, for a Weibull of their own, which takes {self.min_tail}; the fit over all classes stands in."
            )
        for label, fit in enumerate(fits):
            shape, scale, shift = fit or cast(tuple[float, float, float], pooled)
            self.weibull_shape[label], self.weibull_scale[label], self.weibull_shift[label] = shape, scale, shift
        self.fitted.fill_(self.kind)
        self.rejection_thresholds.fill_(self.no_threshold)
        self._read_fits()

    def _fit_tail(self, distances: np.ndarray, tail_size: int) -> tuple[float, float, float] | None:
        """Shape, scale and shift; None for a tail that is too short or without spread."""
        tail = np.sort(distances)[-tail_size:]
        if len(tail) < self.min_tail or tail[-1] - tail[0] < 1e-4:
            return None
        logs = np.log1p(tail - tail[0])

        def derivative(shape: float) -> float:
            """Of the mean log-likelihood by the shape, at its best scale, negated: it crosses 0 once, upwards."""
            weights = np.exp(shape * (logs - logs[-1]))
            return float(weights @ logs / weights.sum() - logs.mean() - 1 / shape)

        # A bracketed root: scipy's general `weibull_min.fit` stops far from the maximum on some ordinary tails
        low = high = 1 / (logs[-1] - logs.mean())
        while derivative(high) < 0:
            high *= 2
        shape = brentq(derivative, low, high)
        scale = math.exp(logs[-1] + math.log(np.exp(shape * (logs - logs[-1])).mean()) / shape)
        return shape, scale, tail[0]

    def fit_thresholds(
        self,
        rejection_scores: Array,
        predictions: Array,
        acceptance: float = 0.95,
        speakers: Sequence[str] | None = None,
        label_names: Sequence[str] | None = None,
    ) -> None:
        """
        Choose for each predicted class the smallest threshold that accepts the share `acceptance` of known clips.

        The threshold is the ceil((n + 1) acceptance)-th smallest score of the n clips with this prediction, as in
        split conformal prediction (Vovk et al. 2005): it accepts a new known clip with at least that probability, if
        new clips are like these. Clips of one speaker are alike, and those of a new speaker are not like them. So
        where speakers are known they take the place of the clips: each counts as one, however many clips it has, and
        the promise is for a clip of a new speaker (hierarchical conformal prediction, Lee et al. 2023). 19 of them
        are the fewest for 95 %. With fewer, a warning says that the promise is for further clips of these alone.
        Predicted classes with too few clips share a threshold over all clips.

        Args:
            rejection_scores: of held-out clips of the known classes, [N]; see the method of this name.
            predictions: their predicted class ids, [N].
            acceptance: in (0, 1).
            speakers: N names, or None if they are not known.
            label_names: for the warnings, in the order of the class ids.
        Raises:
            ValueError: shapes that do not match, scores that are not finite, a share outside (0, 1).
        """
        scores, predictions = as_array(rejection_scores), as_array(predictions)
        if scores.ndim != 1 or scores.shape != predictions.shape or not np.isfinite(scores).all():
            raise ValueError(
                f"`rejection_scores` and `predictions` must be [N], finite; got {scores.shape}, {predictions.shape}."
            )
        if not 0 < acceptance < 1:
            raise ValueError(f"`acceptance` must be between 0 and 1, got {acceptance!r}.")
        _, units = np.unique(np.arange(len(scores)) if speakers is None else speakers, return_inverse=True)
        if units.shape != scores.shape:
            raise ValueError(f"`speakers` must be {len(scores)} names, got {len(units)}.")
        pooled = conformal_threshold(scores, acceptance, units)
        fewest = math.ceil(acceptance / (1 - acceptance) - 1e-9)
        if pooled is None and speakers is not None:
            logger.warning(
                f"OpenMax: {units.max() + 1} held-out speakers are too few to accept {100 * acceptance:g} % of the "
                f"clips of new speakers, which takes {fewest}. The thresholds of rejection are made for clips of "
                "these speakers: expect them to reject more clips of others."
            )
            units = np.arange(len(scores))
            pooled = conformal_threshold(scores, acceptance, units)
        too_few = []
        for label in range(len(self.rejection_thresholds)):
            own = predictions == label
            threshold = conformal_threshold(scores[own], acceptance, units[own])
            if threshold is None:
                too_few.append(label)
                threshold = self.no_threshold if pooled is None else pooled
            self.rejection_thresholds[label] = threshold
        if too_few:
            instead = "the one over all classes stands in"
            if pooled is None:
                instead = "the probability of unknown decides, and no share of acceptance is promised"
            what = "clips" if len(units) == len(np.unique(units)) else "speakers"
            logger.warning(
                f"OpenMax: too few of the {len(scores)} held-out clips are predicted as "
                f"{_named(too_few, label_names)} for a rejection threshold of their own, which takes {fewest} {what}; "
                f"{instead}."
            )
        self._read_fits()

    def distances(self, embeddings: Tensor, anchor_distances: Tensor | None = None) -> Tensor:
        """
        The distances [B, C] that OpenMax goes by: Euclidean, on the unit sphere, from `embeddings` [B, D] to the
        nearest centroid of each class. Without centroids they are `anchor_distances` [B, C].
        """
        if not self.has_centroids:
            return cast(Tensor, anchor_distances)
        directions = F.normalize(embeddings.float(), dim=-1)
        # Not by a matrix product: autocast would round the similarities to bfloat16
        distances = torch.cdist(
            directions, self.centroids.float().flatten(0, 1), compute_mode="donot_use_mm_for_euclid_dist"
        )
        return distances.unflatten(1, self.centroids.shape[:2]).amin(dim=-1)

    def hazard(self, distances: Tensor) -> Tensor:
        """-log of the share of members of each class that lie farther than `distances` [B, C]; 0 below the tail."""
        # (1 + d)^shape by its logarithm: d is small and the shape of a narrow tail large, so 1 + d would round d away
        log_moved = torch.log1p((distances.float() - self.weibull_shift).clamp(min=-1))
        return torch.exp((self.weibull_shape * (log_moved - self.weibull_scale.log())).clamp(max=69))  # up to 1e30

    def cdf(self, distances: Tensor) -> Tensor:
        """Share of the members of each class that lie nearer than `distances` [B, C]; 0 below the tail's support."""
        return -torch.expm1(-self.hazard(distances))

    def forward(self, logits: Tensor, distances: Tensor) -> Tensor:
        """
        Args:
            logits: [B, C].
            distances: to each class, [B, C].
        Returns: probabilities of the C classes and of "unknown" (last), float32 [B, C + 1].
        Raises:
            ValueError: OpenMax is not fitted.
        """
        return self.log_probabilities(logits, distances).exp()

    def log_probabilities(self, logits: Tensor, distances: Tensor) -> Tensor:
        """The logarithm of `forward`. It stays exact for a class whose probability is next to 0."""
        if not self.is_fitted:
            raise ValueError(
                "OpenMax is not fitted: call `model.fit_openmax(dataloader)` first, or pass `use_openmax=False`."
            )
        logits, hazard = logits.float(), self.hazard(distances)
        taken_share = -torch.expm1(-hazard)
        if self.level == "probability":
            known = F.log_softmax(logits, dim=-1)
            unknown = (known.exp() * taken_share).sum(dim=-1, keepdim=True)
            return torch.cat([known - hazard, unknown.clamp(min=1e-38, max=1.0).log()], dim=-1)
        activations = logits - logits.amin(dim=-1, keepdim=True)
        rank = logits.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)  # 0 is the top class
        omega = ((self.alpha - rank) / self.alpha).clamp(min=0)  # (alpha + 1 - r) / alpha with r = rank + 1
        taken = activations * omega * taken_share
        return F.log_softmax(torch.cat([activations - taken, taken.sum(dim=-1, keepdim=True)], dim=-1), dim=-1)

    def rejection_scores(self, logits: Tensor, distances: Tensor) -> Tensor:
        """
        -log of the largest probability that is left to a class, [B] from [B, C] and [B, C]. It is high for a clip far
        from all classes and for one that lies between them: the two reasons to reject of Bendale & Boult (2016).
        """
        return -self.log_probabilities(logits, distances)[:, :-1].amax(dim=-1)

    def reject(
        self, scores: Tensor, probabilities: Tensor, predictions: Tensor, threshold: float, use_fitted: bool = True
    ) -> Tensor:
        """
        Decide which clips are none of the classes.

        Args:
            scores: of `rejection_scores`, [B].
            probabilities: of `forward`, [B, C + 1].
            predictions: predicted class ids, [B].
            threshold: reject when "unknown" wins or is more probable than this; used without fitted thresholds.
            use_fitted: go by the scores and the thresholds of `fit_thresholds`, if there are any.
        Returns: bool [B].
        """
        if use_fitted and self.has_thresholds:
            return scores > self.rejection_thresholds[predictions]
        wins = probabilities.argmax(dim=-1) == probabilities.shape[-1] - 1
        return wins | (probabilities[:, -1] > threshold)


def as_array(values: Array) -> np.ndarray:
    """A numpy array of an array or a tensor on any device."""
    return np.asarray(torch.as_tensor(values).detach().cpu())


def _normalized(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _named(labels: Sequence[int], label_names: Sequence[str] | None) -> str:
    """Classes in a message."""
    return ", ".join(str(label_names[label]) if label_names else f"class {label}" for label in labels)


def _num_correct(outputs: Mapping[str, Any]) -> int:
    return int((as_array(outputs["logits"]).argmax(axis=1) == as_array(outputs["labels"])).sum())
