# SPDX-License-Identifier: Apache-2.0
"""Checks of the arrays that the metrics take.

Each takes a list, a numpy array or a torch tensor and returns a numpy array. Malformed input is a `ValueError` that
names the argument and the first offending index.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np


def to_numpy(values: Any, name: str) -> np.ndarray:
    """Array from a list, numpy array or torch tensor (any device, any dtype, with or without gradient)."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        # numpy has no bfloat16
        values = (values.double() if values.is_floating_point() else values).numpy()
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(f"`{name}` must be a rectangular array, got rows of different lengths.") from error


def reject(array: np.ndarray, bad: np.ndarray, rule: str) -> None:
    """Raise "`rule`, got ..." about the first entry of `array` where `bad` is True; do nothing if there is none."""
    if bad.any():
        position = tuple(int(i) for i in np.argwhere(bad)[0])
        index = position[0] if array.ndim == 1 else position
        raise ValueError(f"{rule}, got {array[position]:g} at index {index}.")


def _check_array(values: Any, name: str, num_dimensions: int, kinds: str, content: str, allow_empty: bool):
    """`values` as an array with `num_dimensions` axes; `content` describes the allowed `kinds` of dtypes."""
    array = to_numpy(values, name)
    if array.ndim != num_dimensions:
        raise ValueError(f"`{name}` must have {num_dimensions} dimension(s), got shape {array.shape}.")
    if array.size == 0 and not allow_empty:
        raise ValueError(f"`{name}` is empty (shape {array.shape}); at least one example is needed.")
    if array.size and array.dtype.kind not in kinds:
        raise ValueError(f"`{name}` must hold {content}, got dtype {array.dtype}.")
    return array


def check_floats(values: Any, name: str, num_dimensions: int = 1, allow_empty: bool = False) -> np.ndarray:
    """`values` as a finite float64 array with `num_dimensions` axes."""
    array = _check_array(values, name, num_dimensions, "fiub", "real numbers", allow_empty).astype(np.float64)
    reject(array, ~np.isfinite(array), f"`{name}` must be finite")
    return array


def check_labels(values: Any, name: str, num_labels: int) -> np.ndarray:
    """`values` as an int64 vector with entries in [0, num_labels - 1]."""
    array = _check_array(values, name, 1, "iu", "integer class indices", allow_empty=False)
    rule = f"`{name}` must hold class indices from 0 to {num_labels - 1} (leave out unknown clips, -1)"
    reject(array, (array < 0) | (array >= num_labels), rule)
    return array.astype(np.int64)


def check_flags(values: Any, name: str, allow_empty: bool = False) -> np.ndarray:
    """`values` (booleans, or numbers 0 and 1) as a boolean vector."""
    array = check_floats(values, name, allow_empty=allow_empty)
    reject(array, (array != 0) & (array != 1), f"`{name}` must hold True/False or 1/0")
    return array.astype(bool)


def check_scores(scores: Any, flags: Any, score_name: str, flag_name: str) -> tuple[np.ndarray, np.ndarray]:
    """One finite score [N] and one flag [N] for each clip."""
    scores, flags = check_floats(scores, score_name), check_flags(flags, flag_name)
    check_same_length(**{score_name: scores, flag_name: flags})
    return scores, flags


def check_probabilities(values: Any, name: str = "probabilities") -> np.ndarray:
    """`values` as [N, C] rows of probabilities; the tolerance lets half-precision softmax outputs through."""
    array = check_floats(values, name, num_dimensions=2)
    bad = ((array < -1e-6) | (array > 1 + 1e-6)).any(axis=1) | (np.abs(array.sum(axis=1) - 1) > 1e-2)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"`{name}` must be in [0, 1] and sum to 1 in each row, got {array[row]} in row {row}"
            " (for logits, apply `softmax` first)."
        )
    return np.clip(array, 0.0, 1.0)


def check_same_length(**arrays: np.ndarray) -> None:
    """All `arrays` must have the same number of rows; the names of the arguments are those of the error."""
    if len({len(array) for array in arrays.values()}) > 1:
        lengths = ", ".join(f"`{name}` {len(array)}" for name, array in arrays.items())
        raise ValueError(f"All arrays must have the same length, got {lengths}.")


def check_label_names(label_names: Sequence[str]) -> list[str]:
    """`label_names` as a list of distinct names."""
    if isinstance(label_names, str) or not len(label_names) or len(set(label_names)) != len(label_names):
        raise ValueError(f"`label_names` must be a non-empty list of distinct names, got {label_names!r}.")
    return [str(name) for name in label_names]


def check_positive_integer(value: Any, name: str) -> int:
    """`value` as an int of at least 1."""
    if not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
    return int(value)


def check_temperature(temperature: float) -> None:
    """A temperature divides logits: it must be positive and finite."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"`temperature` must be positive and finite, got {temperature!r}.")
