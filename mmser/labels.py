# SPDX-License-Identifier: Apache-2.0
"""Label names and ids: which classes a data set has, and the id of a label as it was written."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from transformers.utils import logging

from configuration_mmser import DEFAULT_LABELS

logger = logging.get_logger(__name__)
UNKNOWN_LABEL = -1  # "none of the known classes": only in open-set data


def choose_label_names(
    given: Sequence[str] | None, class_names: Sequence[str] | None = None, labels: Iterable[Any] = ()
) -> list[str]:
    """The class names: those given; else the default ones if the data's are among them; else the data's.

    Args:
        given: names given by the user.
        class_names: names that the data set declares, in the order of their ids.
        labels: labels of the training rows, to collect names from if nobody declares any.
    """
    if given is not None:
        names = [str(name).strip() for name in given]
    else:
        written = {str(label).strip() for label in labels if label is not None}
        found = sorted(name for name in written if name and _as_id(name) is None and name.casefold() != "unknown")
        names = list(class_names or found)
        if {name.casefold() for name in names} <= set(DEFAULT_LABELS):
            names = list(DEFAULT_LABELS)
    if len({name.casefold() for name in names}) != len(names) or "" in names or len(names) < 2:
        raise ValueError(f"label names must be two or more different names, got {names}")
    return names


def warn_of_rare_labels(records: Sequence[dict], label_names: Sequence[str]) -> None:
    """A name that hardly any clip has, among names taken from the data, is most likely misspelt."""
    logger.info(f"Labels: {', '.join(label_names)}")
    counts = Counter(str(record["label"]).strip().casefold() for record in records)
    rare = {name: counts[name.casefold()] for name in label_names if 0 < counts[name.casefold()] < 5}
    if rare and len(records) >= 20 * len(label_names):
        logger.warning(f"Labels with fewer than 5 training clips: {rare} of {list(label_names)}. Is a name misspelt?")


def _as_id(label: str) -> int | None:
    """The integer that a label spells (`"2"`, `"2.0"`, `"-1"`), or None if it is a name."""
    try:
        number = float(label)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def label_id(label: Any, label_names: Sequence[str], row: str, allow_unknown: bool = False) -> int:
    """The id of a label that is written as a name or as an id.

    Raises:
        ValueError: naming the row and what is allowed.
    """
    written = "" if label is None else str(label).strip()
    names = [name.casefold() for name in label_names]
    if written.casefold() in names:
        return names.index(written.casefold())
    if not written:
        raise ValueError(f"{row} has no label")
    number = _as_id(written)
    if number == UNKNOWN_LABEL or written.casefold() == "unknown" or (number is None and allow_unknown):
        if allow_unknown:
            return UNKNOWN_LABEL
        raise ValueError(
            f"{row}: label {written!r} (none of the classes) is not for training, validation or test; an open-set "
            "folder goes to --ood_dir"
        )
    if number is None:
        raise ValueError(f"{row}: unknown label {written!r}; allowed: {', '.join(label_names)}")
    if not 0 <= number < len(names):
        raise ValueError(
            f"{row}: label {written} is out of range; allowed: 0 to {len(names) - 1} ({', '.join(label_names)}). "
            "For another label set give --labels."
        )
    return number
