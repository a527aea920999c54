# SPDX-License-Identifier: Apache-2.0
"""Label names and ids: which classes a data set has, and the id of a label as it is written in a row."""

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
    """Choose the class names: those given; else the default ones if the data's are among them; else the data's.

    Args:
        given: names given by the user.
        class_names: names that the data set declares, in the order of their ids.
        labels: labels of the training rows; their sorted names are used if the data set declares none.

    Raises:
        ValueError: if there are fewer than two names, or two are the same.
    """
    if given is not None:
        names = [str(name).strip() for name in given]
    else:
        written = {_written(label) for label in labels} - {""}
        names = list(class_names or sorted(n for n in written if _as_id(n) is None and n.casefold() != "unknown"))
        if {name.casefold() for name in names} <= set(DEFAULT_LABELS):
            names = list(DEFAULT_LABELS)
    if len({name.casefold() for name in names}) != len(names) or "" in names or len(names) < 2:
        raise ValueError(f"label names must be two or more different names, got {names}")
    return names


def warn_of_rare_labels(labels: Sequence[Any], label_names: Sequence[str]) -> None:
    """Warn about names that fewer than 5 of the training rows' labels have: most likely they are misspelt."""
    logger.info(f"Labels: {', '.join(label_names)}")
    counts = Counter(_written(label).casefold() for label in labels)
    rare = {name: counts[name.casefold()] for name in label_names if 0 < counts[name.casefold()] < 5}
    if rare and len(labels) >= 20 * len(label_names):
        logger.warning(f"Labels with fewer than 5 training clips: {rare} of {list(label_names)}. Is a name misspelt?")


def label_id(label: Any, label_names: Sequence[str], row: str, allow_unknown: bool = False) -> int:
    """The id of a label that is written as a name or as an id.

    Args:
        label: as it is written.
        label_names: class names in the order of their ids.
        row: where the label is, for messages.
        allow_unknown: open-set data: -1, "unknown" and any other name are `UNKNOWN_LABEL`.

    Raises:
        ValueError: naming the row and what is allowed.
    """
    written = _written(label)
    names = [name.casefold() for name in label_names]
    if written.casefold() in names:
        return names.index(written.casefold())
    if not written:
        raise ValueError(f"{row} has no label")
    number = _as_id(written)
    is_unknown = number == UNKNOWN_LABEL or written.casefold() == "unknown"
    if allow_unknown and (is_unknown or number is None):
        return UNKNOWN_LABEL
    if is_unknown:
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


def _written(label: Any) -> str:
    return "" if label is None else str(label).strip()


def _as_id(label: str) -> int | None:
    """The integer that a label spells (`"2"`, `"2.0"`, `"-1"`), or None if it is a name."""
    try:
        number = float(label)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None
