# SPDX-License-Identifier: Apache-2.0
"""Pictures as dots: most of the time of a small training or evaluation would go into plots that no test looks at."""

import base64
import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

DOT = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@contextlib.contextmanager
def pictures_are_dots() -> Iterator[None]:
    """Figures are made, but a PNG of one pixel is written for each."""
    if importlib.util.find_spec("matplotlib") is None:
        yield
        return
    from matplotlib.figure import Figure

    def save_dot(figure, path, **options):
        Path(path).write_bytes(DOT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save_dot)
        yield
