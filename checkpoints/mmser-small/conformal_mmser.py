# SPDX-License-Identifier: Apache-2.0
"""Sets of labels that hold the right one as often as was asked for: split conformal prediction.

`likelier_mass` is the score of each label, `conformal_threshold` the score that enough held-out clips stay below, and
`PredictionSets` keeps such a threshold for each of `COVERAGES`, with the weights of a model.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

COVERAGES = tuple(percent / 100 for percent in range(50, 100))  # that a set can be asked for
DEFAULT_COVERAGE = 0.9  # of `return_set=True`


def likelier_mass(probabilities: Tensor) -> Tensor:
    """
    The probability of all labels that are likelier than each one: [..., C] -> the same shape, 0 for the likeliest.

    The labels with no more than a threshold are the likeliest ones, down to the one with which their probability first
    exceeds it: the sets of Romano et al. 2020 (section 2.1) without their randomisation, which are never empty.
    """
    is_likelier = probabilities[..., None, :] > probabilities[..., :, None]
    return (probabilities[..., None, :] * is_likelier).sum(dim=-1)


def conformal_threshold(scores: np.ndarray, coverage: float, units: np.ndarray) -> float | None:
    """
    The smallest score below which lies the share `coverage` of the K `units`, with one more above all; None where K is
    too small for it. If each score is a unit of its own, it is the ceil((K + 1) coverage)-th smallest.

    Args:
        scores: float [N].
        coverage: in (0, 1).
        units: N ids: clips, or the speakers of the clips (Lee et al. 2023).
    """
    _, own, sizes = np.unique(units, return_inverse=True, return_counts=True)
    order = np.argsort(scores, kind="stable")
    reached = np.cumsum(1 / sizes[own][order])
    index = int(np.searchsorted(reached, (len(sizes) + 1) * coverage - 1e-9))
    return float(scores[order[index]]) if index < len(scores) else None


def check_coverage(coverage: bool | float) -> float:
    """A coverage that was asked for, True for the default one. Raises `ValueError` for one that no set can have."""
    asked = DEFAULT_COVERAGE if coverage is True else coverage
    if isinstance(asked, bool) or not isinstance(asked, (int, float)) or not COVERAGES[0] <= asked <= COVERAGES[-1]:
        raise ValueError(
            f"`return_set` must be True ({DEFAULT_COVERAGE}) or a coverage from {COVERAGES[0]} to {COVERAGES[-1]}, "
            f"got {coverage!r}"
        )
    return float(asked)


class PredictionSets(nn.Module):
    """
    Thresholds of `likelier_mass` for each of `COVERAGES`: a label whose likelier ones have no more than the threshold
    is in the set.

    Args:
        thresholds: those fitted earlier; by default none are.
    """

    not_fitted = -1.0
    thresholds: Tensor

    def __init__(self, thresholds: Sequence[float] | None = None):
        super().__init__()
        values = [self.not_fitted] * len(COVERAGES) if thresholds is None else list(thresholds)
        self.register_buffer("thresholds", torch.tensor(values, dtype=torch.float32))

    @property
    def is_fitted(self) -> bool:
        return bool(self.thresholds[0] != self.not_fitted)

    def reset(self) -> None:
        self.thresholds.fill_(self.not_fitted)

    def fit(self, probabilities: np.ndarray, labels: np.ndarray, speakers: Sequence[str] | None = None) -> float:
        """
        Fit to held-out clips. A set of a new clip then holds its label with at least the probability asked for, if the
        new clip is like the held-out ones: one of a new speaker where speakers are known and enough, else one of the
        same speakers. Where even the clips are too few, all labels are in the set.

        Args:
            probabilities: float [N, C], as the model gives them in use.
            labels: int [N].
            speakers: N names, or None if they are not known.
        Returns: the largest coverage for which there were units enough: speakers, or clips without them.
        """
        mass = likelier_mass(torch.from_numpy(np.asarray(probabilities, dtype=np.float64))).numpy()
        scores = mass[np.arange(len(labels)), labels]
        clips = np.arange(len(scores))
        units = clips if speakers is None else np.unique(np.asarray(speakers), return_inverse=True)[1]
        values = []
        for coverage in COVERAGES:
            found = [conformal_threshold(scores, coverage, kind) for kind in (units, clips)]
            values.append(next((value for value in found if value is not None), 1.0))
        # A larger coverage never has the smaller set, also where it is the first without enough speakers
        rounded = np.maximum.accumulate(values).astype(np.float32)
        rounded = np.where(rounded < np.maximum.accumulate(values), np.nextafter(rounded, np.float32(2)), rounded)
        self.thresholds.copy_(torch.from_numpy(rounded))
        count = int(units.max()) + 1
        return count / (count + 1)

    def threshold(self, coverage: float) -> float:
        """For the coverage asked for, or the next larger one. Raises `ValueError` if there is none, or none fitted."""
        place = math.ceil(100 * check_coverage(coverage) - 1e-6) - round(100 * COVERAGES[0])
        if not self.is_fitted:
            raise ValueError(
                "`return_set` needs thresholds, and this model has none: calibrate it on held-out clips, with "
                "`eval_hf.py --calibrate` (docs/evaluate.md)"
            )
        return self.thresholds[place].item()

    def forward(self, probabilities: Tensor, coverage: float) -> Tensor:
        """Which labels are in the set of each clip: [..., C] -> bool, the same shape."""
        return likelier_mass(probabilities.double()) <= self.threshold(coverage)
