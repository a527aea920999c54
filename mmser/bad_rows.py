# SPDX-License-Identifier: Apache-2.0
"""What is done about a bad row of the data: it ends the run ("error"), or it is left out with a warning ("skip").

`BadRows` is that rule for a whole run: it keeps what was left out, for a file, and says when it is too much.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from transformers.utils import logging

from mmser.files import write_atomically
from mmser.table_files import as_text, csv_line

logger = logging.get_logger(__name__)
BAD_EXAMPLES = "bad_examples.csv"
FEW = 3  # rows that a message names


class BadRows:
    """
    The rule for bad rows, and the rows that were left out.

    Args:
        on_bad_example: "error" or "skip".
        max_share: with "skip", more of all rows than this share end the run.
    Attributes:
        path: the file that lists them, which `list_in` chooses; None for no file.
        problems: what is wrong with each of them, in the order of the tables.
        rows: how many rows all tables had that were loaded so far.
    Raises:
        ValueError: another rule, or a share that is not in [0, 1].
    """

    def __init__(self, on_bad_example: str = "error", max_share: float = 1.0):
        if on_bad_example not in ("error", "skip"):
            raise ValueError(f"on_bad_example must be 'error' or 'skip', got {on_bad_example!r}")
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_bad_examples must be a share from 0 to 1, got {max_share}")
        self.on_bad_example = on_bad_example
        self.max_share = max_share
        self.path: Path | None = None
        self.problems: list[str] = []
        self.rows = 0

    def list_in(self, folder: str | os.PathLike) -> None:
        """List the bad rows in `BAD_EXAMPLES` of a folder."""
        self.path = Path(folder) / BAD_EXAMPLES

    @property
    def ends_run(self) -> bool:
        """Whether one bad row is an error."""
        return self.on_bad_example == "error"

    def are_too_many(self, further: int) -> bool:
        """Whether the bad rows so far and so many further ones end the run."""
        return len(self.problems) + further > (0 if self.ends_run else self.max_share * self.rows)

    def report(self, problems: Iterable[str], loaded: int = 0) -> None:
        """
        Take note of bad rows.

        Args:
            problems: what is wrong with each of them.
            loaded: how many rows were loaded, if they are those of another table.
        Raises:
            ValueError: there are bad rows and the rule is "error", or there are too many.
        """
        problems, self.rows = list(problems), self.rows + loaded
        if not problems:
            return
        self.problems += problems
        count = "1 bad row" if len(problems) == 1 else f"{len(problems):,} bad rows"
        listed = "".join(f"\n  {problem}" for problem in problems[:FEW])
        if len(problems) > FEW:
            listed += f"\n  and {len(problems) - FEW:,} more"
        if self.ends_run:
            raise ValueError(f"{count} in the data (--on_bad_example skip leaves them out):{listed}")
        if self.are_too_many(0):
            where = f" All that were found are in {self.write()}." if self.path else ""
            raise ValueError(
                f"{len(self.problems):,} bad rows of {self.rows:,} are more than the share of {self.max_share:g} that "
                f"may be left out (--max_bad_examples).{where} Mend them, or allow more:{listed}"
            )
        logger.warning(f"skipped {count}:{listed}")

    def write(self) -> Path | None:
        """Write `path`, one problem a line, and return it; without bad rows an earlier list is removed."""
        if self.path is None:
            return None
        if not self.problems:
            self.path.unlink(missing_ok=True)
            return None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, "".join(csv_line([as_text(line)]) for line in ("problem", *self.problems)))
        return self.path


def rule_of(on_bad_example: str | BadRows) -> BadRows:
    """The rule that a name, "error" or "skip", stands for."""
    return on_bad_example if isinstance(on_bad_example, BadRows) else BadRows(on_bad_example)


def skip_or_raise(error: ValueError, on_bad_example: str) -> None:
    """Raise the error of one bad row of a stream or a cache, or warn that the row is skipped."""
    if on_bad_example == "error":
        raise error
    logger.warning_once(f"skipped: {error}")
