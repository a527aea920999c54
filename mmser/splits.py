# SPDX-License-Identifier: Apache-2.0
"""Training, validation and test clips by different speakers: leaks are refused, missing splits are held out."""

from typing import Any

import numpy as np
from sklearn.model_selection import GroupShuffleSplit
from transformers.utils import logging

logger = logging.get_logger(__name__)


def _speaker(record: dict[str, Any]) -> str:
    """A speaker's name with its corpus: the same name in two corpora is two people."""
    return f"{record['corpus']}/{record['speaker']}" if record["corpus"] else record["speaker"]


def check_speaker_overlap(records: list[dict], splits: dict[str, list[int]], allow: bool) -> None:
    """Refuse, or warn about, speakers that are in two of the given splits. Rows without a speaker say nothing."""
    where: dict[str, list[str]] = {}
    for split, indices in splits.items():
        for speaker in {_speaker(records[index]) for index in indices if records[index]["speaker"]}:
            where.setdefault(speaker, []).append(split)
    shared = sorted(speaker for speaker, names in where.items() if len(names) > 1)
    if not shared:
        return
    listed = ", ".join(f"{speaker} ({' and '.join(where[speaker])})" for speaker in shared[:5])
    message = f"{len(shared)} speakers are in more than one split: {listed}{', ...' if len(shared) > 5 else ''}"
    if not allow:
        raise ValueError(
            f"{message}. Scores on known voices are too good: give each speaker to one split, or pass "
            "--allow_speaker_overlap"
        )
    logger.warning(f"{message}. Allowed by --allow_speaker_overlap; the scores will be too good for new voices.")


def hold_out_missing_splits(
    records: list[dict], splits: dict[str, list[int]], fractions: dict[str, float], seed: int, allow_overlap: bool
) -> dict[str, list[int]]:
    """Hold the missing splits out of the training data. A source with its own validation split is left as it is."""
    if "validation" in splits or not splits.get("train"):
        return splits
    missing = {split: fraction for split, fraction in fractions.items() if split not in splits and fraction > 0}
    if not missing:
        return splits
    speakers = np.array([_speaker(records[index]) for index in splits["train"]])
    have_speakers = any(records[index]["speaker"] for index in splits["train"])
    enough = len(set(speakers)) > len(missing)
    if not (have_speakers and enough):
        reason = f"has only {len(set(speakers))} speakers" if have_speakers else "has no speaker column"
        if not allow_overlap:
            raise ValueError(
                f"{' and '.join(missing)} data must be held out of the training data, which {reason}: add a column "
                "with the speakers (--speaker_column) or splits of your own, or pass --allow_speaker_overlap to "
                "split at random"
            )
        logger.warning(f"The training data {reason}: split at random, speakers may leak from training into test data.")
    remaining = np.array(splits["train"])
    labels = np.array([records[index]["labels"] for index in remaining])
    splits, left = dict(splits), 1.0
    for number, (split, fraction) in enumerate(missing.items()):
        share = fraction / left
        if have_speakers and enough:
            held_out = _hold_out_groups(speakers, labels, share, seed + number)
        else:
            held_out = _hold_out_per_label(labels, share, seed + number)
        splits[split] = remaining[held_out].tolist()
        remaining, labels, speakers = remaining[~held_out], labels[~held_out], speakers[~held_out]
        left -= fraction
    splits["train"] = remaining.tolist()
    return splits


def _hold_out_groups(groups: np.ndarray, labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Hold out whole groups: of 64 random draws, the one whose label counts are nearest to `fraction` of all.

    Args:
        groups: [N] names of the groups.
        labels: [N] ids >= 0.
        fraction: share to hold out, in (0, 1).
        seed: seed of the draws.

    Returns:
        [N] bool, True where held out.
    """
    counts = np.bincount(labels)
    draws = GroupShuffleSplit(n_splits=64, test_size=fraction, random_state=seed).split(labels, groups=groups)
    candidates = [held_out for _, held_out in draws]
    distances = [
        np.abs(np.bincount(labels[held_out], minlength=len(counts)) - fraction * counts).sum()
        for held_out in candidates
    ]
    mask = np.zeros(len(labels), dtype=bool)
    mask[candidates[int(np.argmin(distances))]] = True
    return mask


def _hold_out_per_label(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Hold out `fraction` of the rows of each label, at random. Arguments and result as in `_hold_out_groups`."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        indices = rng.permutation(np.flatnonzero(labels == label))
        mask[indices[: round(fraction * len(indices))]] = True
    return mask
