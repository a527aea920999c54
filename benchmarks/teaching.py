# SPDX-License-Identifier: Apache-2.0
"""What clips can teach beside their own labels: the answers of small networks, which the trials of `wide.py` compare.

Each function takes clips to learn from and a seed, and returns them with other targets. No other clip is looked at.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.pooled_states import NUM_LABELS, Clips, folds_by_speaker, train_small_network
from mmser.metrics import softmax

TEACHERS = 3  # of an ensemble
OF_THE_TEACHER = 0.5  # of a target; the rest is the label's
CALM_CORPORA, NEUTRAL = ("EmoSpeechCmd", "TurEV-DB"), 0  # what is neutral here is "calm" in their own labels


def with_cross_fitted_targets(clips: Clips, seed: int) -> Clips:
    """Soft targets: half the label, half what a small network says that learned from other speakers."""
    answers = np.empty((len(clips), NUM_LABELS), dtype=np.float32)
    for shown, rows in folds_by_speaker(clips):
        answers[rows] = softmax(train_small_network(clips.take(shown), seed)(clips.take(rows)))
    return _with_shares(clips, torch.from_numpy(answers))


def with_targets_of_an_ensemble(clips: Clips, seed: int) -> Clips:
    """Half the label, half the mean answer of small networks that learned from the same clips (Hinton et al. 2015)."""
    return _with_shares(clips, torch.from_numpy(_answers_of_an_ensemble(clips, clips, seed)))


def with_pseudo_labels(clips: Clips, seed: int) -> Clips:
    """Clips that are neutral only because their corpus calls them calm have the label that an ensemble gives them.

    The ensemble learns from all other clips (Lee 2013).
    """
    is_calm = np.isin(clips.corpora, CALM_CORPORA) & (clips.labels.numpy() == NEUTRAL)
    labels = clips.labels.clone()
    if is_calm.any():
        answers = _answers_of_an_ensemble(clips.take(~is_calm), clips.take(is_calm), seed)
        labels[torch.from_numpy(is_calm)] = torch.from_numpy(answers.argmax(axis=1))
    return replace(clips, labels=labels)


def _answers_of_an_ensemble(shown: Clips, others: Clips, seed: int) -> np.ndarray:
    """Mean probabilities [N, C] of small networks with seeds of their own."""
    seeds = range(TEACHERS * seed, TEACHERS * (seed + 1))
    return np.mean([softmax(train_small_network(shown, own)(others)) for own in seeds], axis=0)


def _with_shares(clips: Clips, answers: Tensor) -> Clips:
    of_label = F.one_hot(clips.labels, NUM_LABELS).float()
    return replace(clips, shares=OF_THE_TEACHER * answers + (1 - OF_THE_TEACHER) * of_label)
