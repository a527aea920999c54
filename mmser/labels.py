# SPDX-License-Identifier: Apache-2.0
"""Label names and ids: which classes a data set has, and the id of a label as it is written in a row.

Read in this order: `choose_label_names` (the classes), `check_labels` (no class is lost), `label_id` (one row).
"""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers.utils import logging

from configuration_mmser import DEFAULT_LABELS, check_depth

logger = logging.get_logger(__name__)

UNKNOWN_LABEL = -1  # "none of the known classes": only in open-set data
FEW = 5  # labels and rows that a message lists
ALIKE = 0.8  # of two names, as `difflib` counts it: "hapy" and "happy" have 0.89
FEW_BESIDE = 0.05  # of the clips of a class: a name with fewer is rather misspelt
FEW_PER_CLASS = 20  # training clips, on average: with fewer, a class that lacks some is no mistake but a try

HIDDEN = ("Cc", "Cf", "Zl", "Zp")  # categories of Unicode: controls, marks of a format, separators of lines
JOINERS = "\u200c\u200d"  # of this kind, but words of Persian and other languages are written with them
WITHOUT_JOINERS = str.maketrans("", "", JOINERS)

Found = Mapping[str, Sequence[str]]  # label as it is written -> where its rows are, for messages


def gather_labels(labelled_rows: Iterable[tuple[Any, str]]) -> Found:
    """The labels of (label, row) pairs, each with its rows. Rows without a label are left out.

    Raises:
        ValueError: if a label is a list or the like, or holds what cannot be seen.
    """
    found: dict[str, list[str]] = {}
    for label, row in labelled_rows:
        if isinstance(label, list | tuple | dict):
            raise ValueError(f"{row}: a label is one name or number, got {label!r:.60}")
        if not is_missing(written := written_label(label)):
            if written not in found:
                check_visible(written, f"{row}: the label")
            found.setdefault(written, []).append(row)
    return found


def check_visible(name: str, what: str) -> None:
    """Raise ValueError for a name with characters that nobody sees: line breaks, marks of direction, of no width."""
    hidden = [letter for letter in name if unicodedata.category(letter) in HIDDEN and letter not in JOINERS]
    if hidden:
        raise ValueError(f"{what} {name!r:.80} holds U+{ord(hidden[0]):04X}, which cannot be seen: remove it")


def choose_label_names(
    given: Sequence[str] | None,
    class_names: Sequence[str] | None = None,
    found: Found | None = None,
    checkpoint_names: Sequence[str] | None = None,
) -> list[str]:
    """Choose the class names: those given; else those that the data set declares; else those found in its rows.

    Found names are as many as there are: first those among neutral, happy, sad, angry, in this order, then the others,
    sorted. Found numbers are names too, in the order of their values; the numbers 0, 1, 2, 3, no more and no less,
    are neutral, happy, sad, angry.

    Args:
        given: names given by the user.
        class_names: names that the data set declares, in the order of their ids.
        found: labels of all rows, of all splits; None if they are not known beforehand (a stream).
        checkpoint_names: names of the checkpoint that is trained further. They are kept if the data's are among them.

    Raises:
        ValueError: if there are fewer than two names, two are the same, or they are not all of one kind.
    """
    if given is not None:
        check_depth(list(given), "label names (--labels)")
        names = _check_names([str(name).strip() for name in given])
        if not _have_numbers(tuple(names)) and any(_as_id(label) is not None for label in found or ()):
            logger.info(f"Labels that are numbers are ids: {', '.join(f'{i} {name}' for i, name in enumerate(names))}")
        _warn_of_other_declared_names(class_names, names)
        return names
    if class_names:
        names = _check_names(_default_order(class_names) if _are_default(class_names) else list(class_names))
    elif found is not None:
        names = _found_names(found)
    else:
        names = list(checkpoint_names or DEFAULT_LABELS)
        logger.warning(
            f"The labels of a stream are not known beforehand: they are taken as {', '.join(names)}, and ids as "
            f"0 to {len(names) - 1} in this order. --labels gives others."
        )
    if checkpoint_names and set(_keys(tuple(names))) <= set(_keys(tuple(checkpoint_names))):
        return list(checkpoint_names)
    return names


def match_label_names(names: Sequence[str], others: Sequence[str]) -> list[int | None]:
    """For each of the names its place among the others, in any spelling; None if it is not there."""
    places = {key: place for place, key in enumerate(_keys(tuple(others)))}
    return [places.get(key) for key in _keys(tuple(names))]


def _warn_of_other_declared_names(class_names: Sequence[str] | None, names: Sequence[str]) -> None:
    """Say before a stream is read which of the classes that it declares are none of the chosen ones."""
    others = [name for name in class_names or () if label_key(name) not in _keys(tuple(names))]
    if others:
        logger.warning(f"The data set also has the classes {', '.join(others)}, which are none of {', '.join(names)}")


def _check_names(names: list[str]) -> list[str]:
    for name in names:
        check_visible(name, "the label name")
    keys = _keys(tuple(names))
    if len(set(keys)) != len(keys) or "" in keys or len(keys) < 2:
        alone = (
            " A model needs two classes: --label_column names the column with the labels." if len(keys) == 1 else ""
        )
        raise ValueError(f"label names must be two or more different names, got {names}.{alone}")
    return names


def _found_names(found: Found) -> list[str]:
    """The names of the classes that rows have."""
    classes = {label: rows for label, rows in found.items() if not is_no_class(label)}
    numbers = [label for label in classes if _is_number(label)]
    if not classes:
        raise ValueError(f"no row has a label that is a class; found: {_list_labels(found) or 'nothing'}")
    if numbers and len(numbers) < len(classes):
        named = {label: rows for label, rows in classes.items() if label not in numbers}
        raise ValueError(
            f"some labels are names, {_list_labels(named)}, and some are numbers, "
            f"{_list_labels({label: classes[label] for label in numbers})}: write all of them in one way, or give the "
            "names in the order of their ids with --labels"
        )
    fractions = [label for label in numbers if _as_id(label) is None]
    if fractions:
        raise ValueError(
            f"labels are classes, but there is {_list_labels({label: classes[label] for label in fractions})}: give "
            "names or whole numbers, or name them with --labels"
        )
    if not numbers:
        _refuse_two_spellings(classes)
        return _check_names(_default_order(classes))
    ids = sorted({number for label in numbers if (number := _as_id(label)) is not None})
    if ids == list(range(len(DEFAULT_LABELS))):
        logger.info(f"The labels 0, 1, 2, 3 are taken as {', '.join(DEFAULT_LABELS)}. --labels gives other names.")
        return list(DEFAULT_LABELS)
    names = [str(number) for number in ids]
    logger.info(f"The labels are numbers: the classes are called {', '.join(names)}.")
    return _check_names(names)


def _refuse_two_spellings(found: Found) -> None:
    """Refuse labels that differ in case or spaces alone; of the default names each spelling is known."""
    spellings: dict[str, list[str]] = {}
    for label in found:
        spellings.setdefault(label_key(label), []).append(label)
    for key, labels in spellings.items():
        if len(labels) > 1 and key not in DEFAULT_LABELS:
            raise ValueError(
                f"labels differ only in case or spaces: {_list_labels({label: found[label] for label in labels})}. "
                "Write them in one way, or choose one with --labels"
            )


def _are_default(names: Iterable[str]) -> bool:
    return {label_key(name) for name in names} <= set(DEFAULT_LABELS)


def _default_order(names: Iterable[str]) -> list[str]:
    """The default names among these names in their order and spelling, then the others, sorted."""
    names = set(names)
    keys = {label_key(name) for name in names}
    others = sorted(name for name in names if label_key(name) not in DEFAULT_LABELS)
    return [name for name in DEFAULT_LABELS if name in keys] + others


def _list_labels(found: Found) -> str:
    listed = [
        f"{label!r} ({_count(rows)}, first {rows[0]})"
        for label, rows in sorted(found.items(), key=lambda item: -len(item[1]))[:FEW]
    ]
    return ", ".join(listed) + (f" and {len(found) - FEW} more" if len(found) > FEW else "")


def _count(rows: Sequence[str]) -> str:
    return f"{len(rows)} row{'s' * (len(rows) > 1)}"


def check_labels(
    found: Found,
    training: Found | None,
    label_names: Sequence[str],
    is_found: bool = False,
    for_training: bool = False,
    are_given: bool = True,
    may_skip: bool = False,
) -> None:
    """Refuse labels that are none of the classes, and classes that cannot be learned; warn about rare classes.

    Labels are checked before rows: a label that is not known may be a whole class, which is no bad row to leave out.

    Args:
        found: labels of all rows.
        training: labels of the training rows; None if there is no training split.
        label_names: names of the classes.
        is_found: whether these were found in the rows: then a class without a training row is an accident.
        for_training: False: the classes are those of a model, which is evaluated.
        are_given: whether the names are the user's or a model's: then advice to name others is no way out.
        may_skip: whether rows may be left out: then a label of so few that it is no class, but a slip, is no error
            here. Its rows are bad ones.

    Raises:
        ValueError: naming each label, how many rows have it, and what to do.
    """
    logger.info(f"Labels: {', '.join(label_names)}")
    problems, ids = [], {}
    of_a_class = sum(map(len, found.values())) / len(label_names)
    for label, rows in found.items():
        try:
            ids[label] = label_id(label, label_names, rows[0])
        except ValueError as error:
            if not may_skip or len(rows) >= FEW_BESIDE * of_a_class:
                problems.append(f"{error} ({_count(rows)} with this label)")
    counts = [0] * len(label_names)
    for label in ids.keys() & (training or {}).keys():
        counts[ids[label]] += len((training or {})[label])
    if training is not None and is_found:
        problems += [
            f"{found[label][0]}: label {label!r} is in no training row ({_count(found[label])} with it elsewhere)"
            for label, index in ids.items()
            if not counts[index]
        ]
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems[:FEW])
        naming = "" if are_given else "name all classes with --labels, "
        raise ValueError(
            f"{len(problems)} label{'s' * (len(problems) > 1)} cannot be used:{listed}"
            f"{f' and {len(problems) - FEW} more' if len(problems) > FEW else ''}\n"
            f"A whole class is no bad row, and is not skipped: correct the labels, {naming}"
            "or put clips that are none of the classes into a folder of their own for --ood_dir."
        )
    if for_training and training is not None:
        _warn_of_rare_labels(dict(zip(label_names, counts, strict=True)))
    elif not for_training:
        _warn_of_absent_labels(ids, label_names)


def _warn_of_absent_labels(ids: Mapping[str, int], label_names: Sequence[str]) -> None:
    """Warn about classes without a clip in an evaluation: perhaps the ids of the data start at 1."""
    absent = [name for index, name in enumerate(label_names) if index not in ids.values()]
    are_ids = not _have_numbers(tuple(label_names)) and any(_as_id(label) is not None for label in ids)
    if absent:
        hint = f". Ids start at 0, which is {label_names[0]}" if are_ids and 0 not in ids.values() else ""
        logger.warning(f"No clip has the label {', '.join(absent)}{hint}")


def _warn_of_rare_labels(counts: dict[str, int]) -> None:
    """Warn about classes without a training row, and about those with fewer than 5: likely these are misspelt."""
    absent = [name for name, count in counts.items() if not count]
    if absent:
        logger.warning(f"No training row has the label {', '.join(absent)}: the model cannot learn it")
    rare = {name: count for name, count in counts.items() if 0 < count < 5}
    if rare and sum(counts.values()) >= FEW_PER_CLASS * len(counts):
        logger.warning(
            f"Labels with fewer than 5 training clips: {rare} of {list(counts)}. Is a name misspelt? "
            "Otherwise collect more clips, or join the class with another one by --label_map."
        )
    for name, count in counts.items():
        others = [other for other in counts if 0 < count < FEW_BESIDE * counts[other]]
        for like in difflib.get_close_matches(name, others, 1, ALIKE):
            logger.warning(
                f"The label {name!r} ({count} training clips) is nearly {like!r} ({counts[like]}), and a class of its "
                "own. Is it misspelt? --label_map joins the two."
            )


def label_id(label: Any, label_names: Sequence[str], row: str, allow_unknown: bool = False) -> int:
    """The id of a label that is written as a name or as an id.

    Where the names themselves are numbers, a number is a name: ids are not read then.

    Args:
        label: as it is written.
        label_names: class names in the order of their ids.
        row: where the label is, for messages.
        allow_unknown: open-set data: -1, "unknown" and any other name are `UNKNOWN_LABEL`.

    Raises:
        ValueError: naming the row and what is allowed.
    """
    written = written_label(label)
    names = tuple(label_names)
    keys = _keys(names)
    if label_key(written) in keys:
        return keys.index(label_key(written))
    if is_missing(written):
        raise ValueError(f"{row} has no label")
    number = None if _have_numbers(names) else _as_id(written)
    is_unknown = is_no_class(written)
    if allow_unknown and (is_unknown or number is None):
        return UNKNOWN_LABEL
    if is_unknown:
        raise ValueError(
            f"{row}: label {written!r} (none of the classes) is not for training, validation or test; an open-set "
            "folder goes to --ood_dir"
        )
    if number is None:
        raise ValueError(f"{row}: unknown label {written!r}; allowed: {', '.join(label_names)}")
    if not 0 <= number < len(keys):
        raise ValueError(
            f"{row}: label {written} is out of range: ids start at 0; allowed: 0 to {len(keys) - 1} "
            f"({', '.join(label_names)})"
        )
    return number


def is_missing(written: str) -> bool:
    """Whether a label says that there is none: it is empty, or what tables write for a number that is missing."""
    return written.casefold() in ("", "nan")


def written_label(label: Any) -> str:
    return "" if label is None else unicodedata.normalize("NFC", str(label).strip())


def is_no_class(label: str) -> bool:
    """Whether a label is written as those of open-set clips: -1, or "unknown"."""
    return _as_id(label) == UNKNOWN_LABEL or label.casefold() == "unknown"


def label_key(name: str) -> str:
    """What two spellings of a label have in common: case, spaces, joiners and zeros do not count."""
    number = _as_id(name)
    if number is not None:
        return str(number)
    return " ".join(unicodedata.normalize("NFC", name).translate(WITHOUT_JOINERS).casefold().split())


@lru_cache(maxsize=16)
def _keys(label_names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(label_key(name) for name in label_names)


@lru_cache(maxsize=16)
def _have_numbers(label_names: tuple[str, ...]) -> bool:
    return any(map(_is_number, label_names))


def _is_number(label: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", label, re.IGNORECASE) is not None


def _as_id(label: str) -> int | None:
    """The integer that a label spells (`"2"`, `"2.0"`, `"-1"`), or None if it is a name or another number."""
    match = re.fullmatch(r"([+-]?\d+)(\.0*)?", label)
    return int(match[1]) if match else None
