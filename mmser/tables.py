# SPDX-License-Identifier: Apache-2.0
"""Write Markdown tables, words of others so that they do nothing, and JSON that every reader accepts."""

import json
import math
import numbers
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")  # all but line breaks
ACTIVE = re.compile(r"<(?=[A-Za-z/!?])|!(?=\[)")  # where HTML begins in Markdown, or a picture


def format_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], titles: Mapping[str, str] | None = None
) -> str:
    """Markdown table, padded so that it also reads well on a console.

    Args:
        rows: one mapping per line; a missing key or None gives an empty cell, floats have 4 decimals, nan is `n/a`.
        columns: the keys to show, in this order; they are the header.
        titles: other words for some of them in the header.
    Returns: The table as one string without a trailing line break; an empty string without rows. Columns of numbers
        are right-aligned.
    """
    if isinstance(columns, str) or not len(columns):
        raise ValueError(f"`columns` must be a non-empty list of names, got {columns!r}.")
    if not len(rows):
        return ""
    table = []  # column by column
    for column in columns:
        values = [row.get(column) for row in rows]
        cells = [_format_cell(value) for value in ((titles or {}).get(column, column), *values)]
        width = max(3, *map(_columns, cells))
        given = [value for value in values if value is not None]
        blanks = [" " * (width - _columns(cell)) for cell in cells]
        if given and all(map(_is_number, given)):
            padded, rule = [blank + cell for cell, blank in zip(cells, blanks, strict=True)], "-" * (width - 1) + ":"
        else:
            padded, rule = [cell + blank for cell, blank in zip(cells, blanks, strict=True)], "-" * width
        table.append([padded[0], rule, *padded[1:]])
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*table, strict=True))


def without_controls(text: str) -> str:
    """A text without characters that steer a terminal (colours, titles, the direction of writing)."""
    return CONTROLS.sub(" ", text)


def harmless(value: Any) -> Any:
    """
    Words of others (labels, speakers, names of files) as a page in Markdown can show them: on one line, without HTML,
    pictures and control characters. Mappings and lists: with all of their words made so.
    """
    if isinstance(value, Mapping):
        return {harmless(key): harmless(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(harmless(item) for item in value)
    if not isinstance(value, str):
        return value
    return ACTIVE.sub(lambda found: "&lt;" if found[0] == "<" else "&#33;", on_one_line(value))


def shown_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """`harmless`; but a `command` stands in a block of code, where "<" is only "<"."""
    return {name: on_one_line(value) if name == "command" else harmless(value) for name, value in results.items()}


def on_one_line(text: str) -> str:
    """A text without line breaks and control characters."""
    return without_controls(text).replace("\n", " ")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def _columns(text: str) -> int:
    """How many columns of a console a text takes: Chinese and Japanese characters are two wide."""
    return len(text) + sum(unicodedata.east_asian_width(character) in "WF" for character in text)


def _format_cell(value: Any) -> str:
    if value is None:
        return ""
    if _is_number(value) and not isinstance(value, numbers.Integral):
        return "n/a" if math.isnan(value) else f"{value:.4f}"
    return " ".join(without_controls(str(value)).split()).replace("|", "\\|")


def strict_json(value: Any) -> str:
    """JSON text of numbers, names, lists and mappings. A number that is not finite (an undefined score) is null."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def json_line(value: Any) -> str:
    """The same on one line, as JSONL has it."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """`value` in the types that `json` knows, with null for a number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    torch = sys.modules.get("torch")  # not imported here: a table of words does not wait for it
    if isinstance(value, np.generic) or (torch is not None and isinstance(value, torch.Tensor)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
