# SPDX-License-Identifier: Apache-2.0
"""The parts of the loss, as functions with their papers.

All take float tensors of any precision, compute in float32 and return a scalar. Shape letters: B clips, C classes,
D features.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """
    A region where products are not rounded to the type of autocast on the device of `tensor`. Distances are
    differences of numbers next to 1: of 400 that bfloat16 rounds, 4 are left.
    """
    device_type = tensor.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def class_balanced_weights(class_counts: Iterable[int], beta: float) -> list[float]:
    """
    Class weights by the effective number of samples, `(1 - beta) / (1 - beta^n)` (Cui et al. 2019, eq. 2), scaled to
    sum to C.

    Args:
        class_counts: clips of each class in the training set. A class without clips has weight 0.
        beta: in [0, 1); 0 weighs all classes alike, towards 1 the weights approach the inverse class frequency.
    Raises:
        ValueError: `beta` outside [0, 1), or a negative count.
    """
    class_counts = list(class_counts)
    if not 0 <= beta < 1:
        raise ValueError(f"`beta` must be in [0, 1), got {beta}.")
    if any(count < 0 for count in class_counts):
        raise ValueError(f"`class_counts` must not be negative, got {class_counts}.")
    if not any(class_counts):
        raise ValueError(f"`class_counts` has no clip at all: {class_counts}.")
    weights = [(1 - beta) / (1 - beta**count) if count else 0.0 for count in class_counts]
    return [weight * len(weights) / sum(weights) for weight in weights]


def adjusted_logits(logits: Tensor, class_counts: Iterable[int] | None, strength: float) -> Tensor:
    """
    Logits plus `strength` times the logarithm of the class shares (Menon et al. 2021, eq. 10). A loss on them teaches
    logits that are as if all classes were equally frequent. A class without clips counts as one with a single clip.

    Args:
        logits: [B, C].
        class_counts: clips of each class in the training set; None changes nothing.
        strength: 0 changes nothing, 1 is the adjustment for the mean of the recalls.
    Returns: float32 [B, C].
    """
    if class_counts is None or not strength:
        return logits.float()
    shares = torch.tensor([max(count, 1) for count in class_counts], dtype=torch.float32, device=logits.device)
    return logits.float() + strength * torch.log(shares / shares.sum())


def class_balanced_focal_loss(
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None = None,
    gamma: float = 2.0,
    class_shares: Tensor | None = None,
) -> Tensor:
    """
    Mean over the batch of `-w_y (1 - p_y)^gamma log p_y`: the focal loss of Lin et al. 2017 (eq. 5) with softmax
    probabilities and the class-balanced weights of Cui et al. 2019 as alpha.

    With a distribution q in place of one label y, it is the expectation over the labels that it would draw:
    `-sum_c q_c w_c (1 - p_c)^gamma log p_c`, so that each share is weighed as a label of its own class is.

    Args:
        logits: [B, C].
        labels: int64 [B].
        class_weights: [C], or None for no weighting.
        gamma: focusing parameter; 0 gives the weighted cross-entropy.
        class_shares: shares [B, C] that sum to 1, in place of the labels.
    """
    log_probability = F.log_softmax(logits.float(), dim=-1)
    if class_shares is None:
        log_probability = log_probability.gather(1, labels[:, None])[:, 0]
    # Kept off 0, where a power below 1 has an infinite slope
    error = (-torch.expm1(log_probability)).clamp(min=1e-12)
    loss = -(error**gamma) * log_probability
    if class_weights is not None:
        loss = loss * (class_weights.to(loss)[labels] if class_shares is None else class_weights.to(loss))
    if class_shares is not None:
        loss = (loss * class_shares.float()).sum(dim=-1)
    return loss.mean()


def clustering_loss(anchor_logits: Tensor, anchor_distances: Tensor, labels: Tensor) -> Tensor:
    """
    Pull each clip to the anchor of its label and away from the others: cross-entropy over the anchor logits plus the
    mean distance to the own anchor. After the class anchor clustering loss of Miller et al. 2021, whose anchors are
    fixed; ours are learned, on the unit sphere, with a learned temperature.

    Args:
        anchor_logits: similarity to each anchor over the temperature, [B, C].
        anchor_distances: distance to each anchor, [B, C].
        labels: int64 [B].
    """
    own_distance = anchor_distances.float().gather(1, labels[:, None])
    return F.cross_entropy(anchor_logits.float(), labels) + own_distance.mean()


def uncertainty_loss(uncertainty: Tensor, logits: Tensor, labels: Tensor, error_weight: float = 1.0) -> Tensor:
    """
    Mean of `u` over correct and `error_weight * (1 - u)` over wrong predictions, so that u is pushed to 0 where the
    prediction is right and to 1 where it is wrong. `error_weight=0` is the published form, which only learns a
    constant.

    Args:
        uncertainty: in [0, 1], [B, 1].
        logits: [B, C]; only their argmax is used.
        labels: int64 [B].
    """
    correct = (logits.argmax(dim=-1) == labels).float()
    uncertainty = uncertainty[:, 0].float()
    return (uncertainty * correct + error_weight * (1 - uncertainty) * (1 - correct)).mean()


def prototype_loss(prototype_logits: Tensor, labels: Tensor) -> Tensor:
    """
    Cross-entropy of the nearest-prototype classifier (Snell et al. 2017, eq. 2).

    Args:
        prototype_logits: soft-minimum negative squared distance to the prototypes of each class, [B, C].
        labels: int64 [B].
    """
    return F.cross_entropy(prototype_logits.float(), labels)


class ContrastiveRows(NamedTuple):
    """Clips of the contrastive loss: `features` [N, D], `labels` int64 [N], and `corpora` int64 [N], the number of the
    corpus of each, -1 where it is not known; None if nobody asks."""

    features: Tensor
    labels: Tensor
    corpora: Tensor | None = None


def supervised_contrastive_loss(
    features: Tensor,
    labels: Tensor,
    temperature: float = 0.1,
    corpora: Tensor | None = None,
    other_corpus_weight: float = 1.0,
    others: ContrastiveRows | None = None,
) -> Tensor:
    """
    Supervised contrastive loss, L_out (Khosla et al. 2020, eq. 2), over the L2-normalised features of one batch. A
    clip that shares its label with no other clip has no positive pair and does not count; a batch without any pair
    gives 0.

    A model that tells corpora apart pushes most negatives away for free. So a negative from another corpus than the
    clip's can count less: its term of the denominator is multiplied by `other_corpus_weight`. With 0 a clip is told
    from those of its own corpus alone, where the corpus helps nothing, while its positives come from all of them.

    Args:
        features: [B, D].
        labels: int64 [B].
        temperature: greater than 0.
        corpora: int64 [B], as in `ContrastiveRows`; a clip of an unknown corpus is compared as if all were of its own.
        other_corpus_weight: in [0, 1]; 1 is the published loss.
        others: more clips to compare each clip with, which are compared with nothing themselves.
    """
    rows, size = ContrastiveRows(features, labels, corpora), len(labels)
    if others is not None:
        is_known = rows.corpora is not None and others.corpora is not None
        names = torch.cat([cast(Tensor, rows.corpora), cast(Tensor, others.corpora)]) if is_known else None
        rows = ContrastiveRows(torch.cat([features, others.features]), torch.cat([labels, others.labels]), names)
    normalised = F.normalize(rows.features.float(), dim=-1)
    itself = torch.eye(size, len(normalised), dtype=torch.bool, device=labels.device)
    with without_autocast(normalised):
        similarity = (normalised[:size] @ normalised.T / temperature).masked_fill(itself, float("-inf"))
    has_same_label = labels[:, None] == rows.labels[None, :]
    positive, compared = has_same_label & ~itself, similarity
    if other_corpus_weight != 1 and rows.corpora is not None:
        own, other = rows.corpora[:size, None], rows.corpora[None, :]
        is_elsewhere = (own != other) & (own >= 0) & (other >= 0) & ~has_same_label
        if other_corpus_weight:
            compared = similarity + torch.where(is_elsewhere, math.log(other_corpus_weight), 0.0)
        else:
            compared = similarity.masked_fill(is_elsewhere, float("-inf"))
    log_probability = (similarity - compared.logsumexp(dim=1, keepdim=True)).masked_fill(~positive, 0.0)
    num_positive = positive.sum(dim=1)
    per_clip = -log_probability.sum(dim=1) / num_positive.clamp(min=1)
    return per_clip.sum() / (num_positive > 0).sum().clamp(min=1)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """
    `T^2 KL(teacher || student)` of the softened distributions (Hinton et al. 2015, section 2), mean over the batch.

    Args:
        logits, teacher_logits: [B, C].
        temperature: T, greater than 0.
    """
    student = F.log_softmax(logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def check_finite_losses(losses: dict[str, Tensor]) -> None:
    """Raise `FloatingPointError` naming every NaN or infinite part of the loss. Reads the values: synchronises."""
    # One wait for the device, not many. `nn.DataParallel` gives a value for each device
    values = torch.stack([value.float().mean() for value in losses.values()]).tolist()
    bad = {name: value for name, value in zip(losses, values, strict=True) if not math.isfinite(value)}
    if bad:
        raise FloatingPointError(
            f"The loss is not finite: {', '.join(f'{name}={value}' for name, value in bad.items())}. "
            "Look for bad rows in the data, a learning rate that is too high, or fp16 where bf16 is needed."
        )
