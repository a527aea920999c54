# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown, and JSON that every reader takes."""

import json
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def _format_cell(value: Any) -> str:
    if value is None:
        return ""
    if _is_number(value) and not isinstance(value, numbers.Integral):
        return "n/a" if math.isnan(value) else f"{value:.4f}"
    return " ".join(str(value).split()).replace("|", "\\|")


def format_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Markdown table, padded so that it also reads well on a console.

    Args:
        rows: one mapping per line; a missing key or None gives an empty cell, floats have 4 decimals, nan is `n/a`.
        columns: the keys to show, in this order; they are the header.

    Returns:
        The table as one string without a trailing line break; columns of numbers are right-aligned.
    """
    if isinstance(columns, str) or not len(columns):
        raise ValueError(f"`columns` must be a non-empty list of names, got {columns!r}.")
    table = [[_format_cell(column) for column in columns]]
    table += [[_format_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(3, *(len(line[i]) for line in table)) for i in range(len(columns))]
    values = [[row[column] for row in rows if row.get(column) is not None] for column in columns]
    numeric = [bool(cells) and all(_is_number(cell) for cell in cells) for cells in values]
    padded = [
        [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        for line in table
    ]
    rule = ["-" * (width - 1) + ":" if right else "-" * width for width, right in zip(widths, numeric, strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [padded[0], rule, *padded[1:]])


def strict_json(value: Any) -> str:
    """JSON text of numbers, names, lists and mappings; what is not finite (a score that is not defined) is null."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """What strict JSON can hold: numbers that are not finite (a score that is not defined) become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.generic, torch.Tensor)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
