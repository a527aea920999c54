# SPDX-License-Identifier: Apache-2.0
"""What is done about a bad row of the data: it ends the run ("error"), or it is left out with a warning ("skip")."""

from transformers.utils import logging

logger = logging.get_logger(__name__)


def check_on_bad_example(on_bad_example: str) -> None:
    """Refuse any other rule than "error" and "skip"."""
    if on_bad_example not in ("error", "skip"):
        raise ValueError(f"on_bad_example must be 'error' or 'skip', got {on_bad_example!r}")


def skip_or_raise(error: ValueError, on_bad_example: str) -> None:
    """Raise the error of one bad row, or warn that the row is skipped."""
    if on_bad_example == "error":
        raise error
    logger.warning_once(f"skipped: {error}")


def report_problems(problems: list[str], on_bad_example: str) -> None:
    """Raise, or warn about, all bad rows at once: how many there are, and the first three."""
    if not problems:
        return
    count = "1 bad row" if len(problems) == 1 else f"{len(problems)} bad rows"
    listed = "".join(f"\n  {problem}" for problem in problems[:3])
    if len(problems) > 3:
        listed += f"\n  and {len(problems) - 3} more"
    if on_bad_example == "error":
        raise ValueError(f"{count} in the data (--on_bad_example skip leaves them out):{listed}")
    logger.warning(f"skipped {count}:{listed}")
