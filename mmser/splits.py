# SPDX-License-Identifier: Apache-2.0
"""Training, validation and test clips by different speakers: leaks are refused, missing splits are held out.

`divide_by_speaker` is the entry; its three steps follow it.
"""

import unicodedata
from collections.abc import Sequence

import datasets
import numpy as np
from sklearn.model_selection import GroupShuffleSplit
from transformers.utils import logging

from mmser.duplicates import find_copies
from mmser.sources import SPLIT_NAMES, Record

logger = logging.get_logger(__name__)

DRAWS = 64  # random divisions of the speakers, of which the one with the best label shares is taken
FEW = 5  # speakers or clips that a message lists


def divide_by_speaker(
    records: Sequence[Record],
    usable: Sequence[int],
    fractions: dict[str, float],
    seed: int,
    allow_overlap: bool,
    audio: datasets.Dataset | None = None,
    by_corpus: bool = False,
) -> dict[str, list[int]]:
    """Divide records into splits: those of the source, and those that it lacks, held out of its training data.

    Args:
        records: all rows of the source.
        usable: indices of the good ones.
        fractions: split -> share of the training data to hold out if the source lacks it, in the order of drawing.
        seed: seed of the draws.
        allow_overlap: accept a speaker or a clip in two splits, and a random division of data without speakers.
        audio: embedded audio of the records, if there is such.
        by_corpus: hold out of each corpus by itself, so that each is in every split. One with too few speakers for
            that stays in the training data.

    Returns:
        Split -> indices of its usable records; a split of the source that has no usable record is empty.

    Raises:
        ValueError: if a speaker or a clip is in two splits, or a split must be held out and there are too few
            speakers.
    """
    named = {record.split for record in records if not record.role}
    splits: dict[str, list[int]] = {split: [] for split in SPLIT_NAMES if split in named}
    for index in usable:
        splits[str(records[index].split)].append(index)
    _check_overlap(records, splits, allow_overlap)
    if "validation" not in splits and splits.get("train"):
        missing = {split: share for split, share in fractions.items() if split not in splits and share > 0}
        parts, splits["train"] = [splits["train"]], []
        if by_corpus and missing:
            parts, splits["train"] = _corpora_to_divide(records, parts[0], len(missing))
        for part in parts:
            for split, indices in _hold_out(records, part, missing, seed, allow_overlap).items():
                splits[split] = sorted([*splits.get(split, []), *indices]) if by_corpus else indices
    _check_copies(records, audio, splits, allow_overlap)
    return {split: splits[split] for split in SPLIT_NAMES if split in splits}


def full_name(speaker: str, corpus: str | None) -> str:
    """A speaker's name with its corpus: the same name in two corpora is two people."""
    return f"{corpus}/{speaker}" if corpus else speaker


def speaker_key(speaker: str, corpus: str | None) -> str:
    """What all spellings of a speaker's name have in common: case and Unicode normal forms do not count."""
    return unicodedata.normalize("NFC", full_name(speaker, corpus)).casefold()


def _check_overlap(records: Sequence[Record], splits: dict[str, list[int]], allow: bool) -> None:
    """Refuse, or warn about, speakers that are in two splits. Rows without a speaker are not compared."""
    if len(splits) < 2:
        return
    where: dict[str, dict[str, str]] = {}
    for split, indices in splits.items():
        for record in (records[index] for index in indices):
            if record.speaker:
                name = full_name(record.speaker, record.corpus)
                where.setdefault(speaker_key(record.speaker, record.corpus), {})[split] = name
    num_clips = sum(map(len, splits.values()))
    unknown = sum(not records[index].speaker for indices in splits.values() for index in indices)
    if unknown:
        logger.warning(
            f"The speakers of {'all' if unknown == num_clips else f'{unknown} of {num_clips}'} clips are unknown: "
            "whether their speakers are in two splits cannot be checked. --speaker_column names the column."
        )
    shared = [
        f"{next(iter(names.values()))} ({' and '.join(names)})" for _, names in sorted(where.items()) if len(names) > 1
    ]
    if shared:
        who = "1 speaker is" if len(shared) == 1 else f"{len(shared)} speakers are"
        _refuse_leak(f"{who} in more than one split: {_listed(shared)}", "voice", allow)


def _check_copies(
    records: Sequence[Record], audio: datasets.Dataset | None, splits: dict[str, list[int]], allow: bool
) -> None:
    """Refuse, or warn about, clips whose content is in two splits; warn where copies in one have different labels."""
    split_of = {index: split for split, indices in splits.items() for index in indices}
    shared, contradictory = [], []
    for copies in find_copies(records, audio, split_of):
        first = copies[0]
        elsewhere = next((index for index in copies if split_of[index] != split_of[first]), None)
        other = next((index for index in copies if records[index].labels != records[first].labels), None)
        if elsewhere is not None:
            rows = [f"{records[index].row} ({split_of[index]})" for index in (first, elsewhere)]
            shared.append(" and ".join(rows))
        elif other is not None:
            rows = [f"{records[index].row} ({records[index].label})" for index in (first, other)]
            contradictory.append(" and ".join(rows))
    if contradictory:
        logger.warning(f"The same audio has different labels in {_number(contradictory)}: {_listed(contradictory)}")
    if shared:
        message = f"The same audio is in more than one split in {_number(shared)}: {_listed(shared)}"
        _refuse_leak(message, "clip", allow)


def _number(cases: list[str]) -> str:
    return "1 case" if len(cases) == 1 else f"{len(cases)} cases"


def _listed(entries: list[str]) -> str:
    return ", ".join(entries[:FEW]) + (", ..." if len(entries) > FEW else "")


def _refuse_leak(message: str, what: str, allow: bool) -> None:
    """Raise, or warn if it is allowed. `what` is a voice or a clip."""
    if not allow:
        raise ValueError(
            f"{message}. Scores on known {what}s are too good: give each {'speaker' if what == 'voice' else what} to "
            "one split, or pass --allow_speaker_overlap"
        )
    logger.warning(f"{message}. Allowed by --allow_speaker_overlap; the scores will be too good for new {what}s.")


def _corpora_to_divide(
    records: Sequence[Record], training: Sequence[int], num_missing: int
) -> tuple[list[list[int]], list[int]]:
    """The indices of each corpus with speakers enough to hold out, and all others, which stay in training. If no
    corpus has enough, all of them are one."""
    corpora: dict[str, list[int]] = {}
    for index in training:
        corpora.setdefault(speaker_key("", records[index].corpus), []).append(index)
    parts: list[list[int]] = []
    whole: list[list[int]] = []
    for own in corpora.values():
        speakers = {speaker_key(records[index].speaker, None) for index in own} - {""}
        (parts if len(speakers) > num_missing else whole).append(own)
    if not parts:
        return [list(training)], []
    if whole:
        names = _listed([records[own[0]].corpus for own in whole])
        logger.warning(f"Too few speakers are known to hold some of them out of {names}: all of these clips train.")
    return parts, [index for own in whole for index in own]


def _hold_out(
    records: Sequence[Record], training: Sequence[int], missing: dict[str, float], seed: int, allow_overlap: bool
) -> dict[str, list[int]]:
    """Divide the indices in `training` into the missing splits, whole speakers at a time, and the rest."""
    remaining = np.array(training)
    labels = np.array([records[index].labels for index in training])
    speakers = np.array([speaker_key(records[index].speaker, records[index].corpus) for index in training])
    num_speakers = len(set(speakers)) if any(records[index].speaker for index in training) else 0
    by_speaker = num_speakers > len(missing)
    if missing and not by_speaker:
        count = "1 speaker" if num_speakers == 1 else f"{num_speakers} speakers"
        reason = f"has only {count}" if num_speakers else "has no speaker column"
        if not allow_overlap:
            needed = f"add recordings of others ({len(missing) + 1} speakers are the least)"
            advice = needed if num_speakers else "add a column with the speakers (--speaker_column)"
            raise ValueError(
                f"{' and '.join(missing)} data must be held out of the training data, which {reason}: {advice} or "
                "splits of your own, or pass --allow_speaker_overlap to split at random"
            )
        logger.warning(f"The training data {reason}: split at random, speakers may leak from training into test data.")
    splits, left = {}, 1.0
    for number, (split, fraction) in enumerate(missing.items()):
        share = fraction / left  # of what is left
        if by_speaker:
            mask = _draw_speakers(speakers, labels, share, seed + number)
        else:
            mask = _draw_per_label(labels, share, seed + number)
        splits[split] = remaining[mask].tolist()
        remaining, labels, speakers = remaining[~mask], labels[~mask], speakers[~mask]
        left -= fraction
    return {**splits, "train": remaining.tolist()}


def _draw_speakers(speakers: np.ndarray, labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Draw whole speakers: of `DRAWS` draws, the one whose label counts are nearest to `share` of all.

    Args:
        speakers: [N] names.
        labels: [N] ids >= 0.
        share: of the speakers, in (0, 1).
        seed: seed of the draws.

    Returns:
        [N] bool, True where drawn.
    """
    wanted = share * np.bincount(labels)
    draws = GroupShuffleSplit(n_splits=DRAWS, test_size=share, random_state=seed).split(labels, groups=speakers)
    candidates = [drawn for _, drawn in draws]
    distances = [np.abs(np.bincount(labels[drawn], minlength=len(wanted)) - wanted).sum() for drawn in candidates]
    mask = np.zeros(len(labels), dtype=bool)
    mask[candidates[int(np.argmin(distances))]] = True
    return mask


def _draw_per_label(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Draw `share` of the rows of each label. Arguments and result as of `_draw_speakers`."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        indices = rng.permutation(np.flatnonzero(labels == label))
        mask[indices[: round(share * len(indices))]] = True
    return mask
