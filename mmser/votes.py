# SPDX-License-Identifier: Apache-2.0
"""Votes of several annotators, or shares of the classes, in place of one label.

Read in this order: `vote_columns` (which columns hold them), `read_votes` (one row), `normalise_votes` (its shares and
its majority).
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from configuration_mmser import check_depth
from mmser.labels import is_missing, is_no_class, label_id

FLAG = "--label_distribution_columns"
SEPARATORS = r"[;|,]"  # between the votes of a cell that is no JSON

VoteColumns = Mapping[str, str | None]  # column -> its class; None: a column whose cells hold all votes of a row
Votes = dict[str, float]  # class, as it is written -> its votes, or its share


def vote_columns(given: Sequence[str] | None) -> dict[str, str | None]:
    """
    What `--label_distribution_columns` names.

    Args:
        given: one column that holds lists of votes, or a column for each class: its name if that is the class, else
            `class=column`.
    Raises:
        ValueError: no column, two for a class or one for two, or a class for the column of lists.
    """
    if given is None:
        return {}
    if len(given) == 1 and "=" not in given[0]:
        return {given[0]: None}
    pairs = [tuple(entry.split("=", 1)) if "=" in entry else (entry, entry) for entry in given]
    classes, columns = [name.strip() for name, _ in pairs], [column.strip() for _, column in pairs]
    is_unique = len(set(classes)) == len(set(columns)) == len(pairs)
    if len(pairs) < 2 or not is_unique or "" in classes or "" in columns:
        raise ValueError(
            f"{FLAG} takes one column of votes, or two or more columns, one for each class (`class=column`, or the "
            f"column alone where it is called like its class), got {list(given)}."
        )
    return dict(zip(columns, classes, strict=True))


def read_votes(cells: Mapping[str, Any], columns: VoteColumns, row: str) -> Votes:
    """
    The votes of one row. A vote for "unknown" or -1, and an empty one, does not count.

    Args:
        cells: column -> its value: a number; for the column of lists also a list of labels, a dictionary of numbers,
            the JSON of either, or labels with `;`, `|` or `,` between them.
        columns: of `vote_columns`.
        row: where it is, for messages.
    Returns: all classes that have a number, 0 included.
    Raises:
        ValueError: naming the row and the column: a number that is negative or none, a list of shares, or no vote.
    """
    votes: Votes = {}
    for column, name in columns.items():
        found = _listed(cells.get(column), f"{row}: {column!r}") if name is None else {name: cells.get(column)}
        for label, value in found.items():
            if not (is_missing(label) or is_no_class(label)):
                votes[label] = votes.get(label, 0.0) + _number(value, f"{row}: {column!r}")
    total = sum(votes.values())
    if not 0 < total < math.inf:
        reason = "no vote that counts" if total == 0 else "votes that are too many to add up"
        raise ValueError(f"{row} has {reason} in {', '.join(map(repr, columns))}")
    return votes


def _listed(value: Any, where: str) -> dict[str, Any]:
    """The classes in a cell of the column of lists, and the number of each as it is written."""
    if isinstance(value, str):
        text = value.strip()
        try:
            value = json.loads(text) if text[:1] in ("[", "{") else re.split(SEPARATORS, text)
            check_depth(value, "it")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is no JSON ({error}): {text!r:.60}") from error
    if isinstance(value, Mapping):
        return {str(label).strip(): number for label, number in value.items()}
    if value is None:
        return {}
    labels = list(value) if isinstance(value, list | tuple) else [value]
    counted: dict[str, Any] = {}
    for label in labels:
        if isinstance(label, list | tuple | Mapping) or (isinstance(label, float) and not label.is_integer()):
            raise ValueError(
                f"{where}: a list holds votes, each the name of a class or its id, got {label!r:.60}; write shares as "
                'an object, {"happy": 0.7, "sad": 0.3}'
            )
        name = "" if label is None else str(int(label) if isinstance(label, float) else label).strip()
        counted[name] = counted.get(name, 0) + 1
    return counted


def _number(value: Any, where: str) -> float:
    if value is None or str(value).strip() == "":  # tables leave a cell without votes empty
        return 0.0
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(value, bool) or not 0 <= number < math.inf:
        raise ValueError(f"{where}: votes and shares are numbers of 0 or more, or empty for 0, got {value!r:.60}")
    return number


def normalise_votes(votes: Votes, label: Any, label_names: Sequence[str], row: str) -> tuple[list[float], int]:
    """
    The shares of the classes in the votes of a row, and the class with the largest one.

    Of classes with equally many votes, it is the one that the row's own label names, else the first one in the order
    of the ids.

    Args:
        votes: of `read_votes`.
        label: the row's own label as it is written, "" if it has none. It need not be one of the classes.
        label_names: in the order of their ids.
        row: where it is, for messages.
    Returns: shares [C] that sum to 1, and the id of the majority.
    Raises:
        ValueError: a vote for none of the classes.
    """
    sums = [0.0] * len(label_names)
    for name, number in votes.items():
        if number:
            sums[label_id(name, label_names, row)] += number
    total, most = sum(sums), max(sums)
    tied = [index for index, number in enumerate(sums) if math.isclose(number, most, rel_tol=1e-9)]
    try:
        own = label_id(label, label_names, row) if len(tied) > 1 else None
    except ValueError:  # "no agreement" and the like
        own = None
    return [number / total for number in sums], own if own in tied else tied[0]
