# SPDX-License-Identifier: Apache-2.0
"""Which clips an epoch draws, and how often: temperature sampling over the classes of each corpus.

Read in this order: `sampling_weights` (the formula), `expected_draws` (of a table), `TemperatureSampler` (the draws).
"""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import scipy.special
import torch

from mmser.examples import Repeat


def sampling_weights(groups: Sequence[int] | np.ndarray, temperature: float) -> np.ndarray:
    """
    How often N draws take each of N clips on average.

    Group g with n_g clips has the share p_g = n_g / N, and is drawn with probability
    q_g = p_g^(1/T) / sum_k p_k^(1/T), all of its clips alike: each of them N q_g / n_g times. This is the sampling of
    Lample & Conneau 2019 (section 3.1) and of XLM-R (Conneau et al. 2020), whose exponent alpha is 1/T, with groups
    in place of languages. T = 1 takes each clip once; the larger T, the more alike are the groups.

    Args:
        groups: [N] the number of each clip's group.
        temperature: T > 0.
    Returns: [N] float64, with the sum N.
    """
    _, group, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    shares = scipy.special.softmax(np.log(sizes / len(group)) / temperature)  # in logarithms: 1/T may be large
    return (len(group) * shares / sizes)[group]


def groups_of(table: datasets.Dataset) -> list[tuple[str, int]]:
    """The corpus ("" if it is not known) and the class of each clip."""
    corpora = table["corpus"] if "corpus" in table.column_names else [""] * len(table)
    return [(corpus or "", label) for corpus, label in zip(corpora, table["labels"], strict=True)]


def number_groups(table: datasets.Dataset) -> np.ndarray:
    """The number of each clip's group of `groups_of`, [N]."""
    groups = groups_of(table)
    numbers = {group: number for number, group in enumerate(sorted(set(groups)))}
    return np.array([numbers[group] for group in groups])


def expected_draws(table: Any, temperature: float | None) -> np.ndarray | None:
    """
    How often an epoch takes each clip of a table on average, [N] float64; None without a temperature: each once.

    Raises:
        ValueError: a stream, whose clips are not known beforehand.
    """
    if temperature is None:
        return None
    if not isinstance(table, datasets.Dataset):
        raise ValueError("`sampling_temperature` needs all clips before training: it does not go with a stream")
    return sampling_weights(number_groups(table), temperature)


def describe_draws(table: datasets.Dataset, draws: np.ndarray, label_names: Sequence[str]) -> list[dict[str, Any]]:
    """Of each group its `corpus` and `class`, its `clips`, its `draws` in an epoch, and `times`, one by the other."""
    groups = groups_of(table)
    rows = []
    for corpus, label in sorted(set(groups)):
        own = draws[[group == (corpus, label) for group in groups]]
        row = {"corpus": corpus, "class": label_names[label], "clips": len(own)}
        rows.append({**row, "draws": float(own.sum()), "times": float(own.mean())})
    return rows


class TemperatureSampler(torch.utils.data.Sampler):
    """
    The clips of an epoch, as many as there are, in an order that depends on the seed and the epoch alone.

    The draws are systematic (Madow 1949), over the clips sorted by group and shuffled within it: each clip is drawn as
    often as `weights` say on average, and in each epoch never more than one time off; nor is each group.

    Args:
        groups: [N] the number of each clip's group.
        weights: [N] of `sampling_weights`.
        seed: with the epoch it decides the draws and their order, also of a resumed run.
    """

    def __init__(self, groups: np.ndarray, weights: np.ndarray, seed: int):
        self.groups = groups
        self.weights = weights
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.weights)

    def draw(self) -> np.ndarray:
        """[N] clips."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self))
        order = order[np.argsort(self.groups[order], kind="stable")]
        ends = np.floor(np.cumsum(self.weights[order]) + rng.random()).astype(np.int64)
        ends[-1] = len(self)  # whatever the rounding of the sum
        return rng.permutation(np.repeat(order, np.diff(ends, prepend=0)))

    def __iter__(self):
        return iter(number_repeats(self.draw().tolist()))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def number_repeats(order: Sequence[int]) -> list[int | Repeat]:
    """Say of each clip that comes again how often it has come before: it gets other augmentation each time."""
    seen: dict[int, int] = {}
    numbered: list[int | Repeat] = []
    for clip in order:
        number = seen.get(clip, 0)
        numbered.append(Repeat(clip, number) if number else clip)
        seen[clip] = number + 1
    return numbered
