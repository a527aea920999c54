# SPDX-License-Identifier: Apache-2.0
"""What a command tells on the console: what it does while it works, and what was wrong where it cannot."""

import contextlib
import errno
import gc
import linecache
import logging as python_logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mmser.flags import split_debug

if TYPE_CHECKING:  # `--help` does not wait for torch
    from transformers import TrainingArguments

OWN_LOGGERS = (
    "mmser",
    "audio_mmser",
    "decoding_mmser",
    "encoders_mmser",
    "modeling_mmser",
    "openmax_mmser",
    "processing_mmser",
)
# Libraries whose own exceptions are about what they were given: a file, a data set, an address
FOREIGN_ERRORS = (
    "datasets",
    "httpcore",
    "httpx",
    "httpx2",
    "huggingface_hub",
    "requests",
    "safetensors",
    "safetensors_rust",
)
WORKER_ERROR = re.compile(r"^Caught \w+ in .*Original Traceback.*\n(?:\w+\.)*\w+: ", re.DOTALL)
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
RANK_DELAY = 5  # seconds


class BesideBars(python_logging.Handler):
    """
    Messages on a line of their own, above a bar that moves. What we do is told as it is; warnings say that they are,
    and whose they are if not ours. What was told is not told again: an evaluation may read its table twice.
    """

    def __init__(self):
        super().__init__()
        self._told = set[str]()
        self.setFormatter(python_logging.Formatter("%(message)s"))

    def emit(self, record: python_logging.LogRecord) -> None:
        """Write one message."""
        from tqdm import tqdm

        from mmser.tables import without_controls  # here, as it imports NumPy

        kind, message = record.levelname.lower(), without_controls(self.format(record))
        if record.levelno == python_logging.INFO and message in self._told:
            return
        self._told.add(message)
        is_own = record.name.split(".")[0] in OWN_LOGGERS
        if not is_own:
            message = f"{kind} ({record.name}): {message}"
        elif record.levelno != python_logging.INFO:
            message = f"{kind}: {message}"
        tqdm.write(message, file=sys.stderr)


def set_up_logging(arguments: "TrainingArguments") -> None:
    """Our own modules tell what they do, on the main process; others warn only. `--log_level` sets both."""
    from transformers.utils import logging

    level = arguments.get_process_log_level()
    logging.set_verbosity(level)
    logging.enable_default_handler()
    logging.enable_explicit_format()
    python_logging.basicConfig(handlers=[BesideBars()])
    tells = arguments.log_level == "passive" and arguments.should_log
    for name in OWN_LOGGERS:
        python_logging.getLogger(name).setLevel(python_logging.INFO if tells else level)


@contextlib.contextmanager
def without_bars_of_weights() -> Iterator[None]:
    """Read or write a model: that takes a moment, and its bars say nothing. A download may take minutes: it shows."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    was_on, downloads_were_on = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()  # of both
    if downloads_were_on:
        enable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def run_command(main: Callable[[], Any]) -> None:
    """
    Run `main` as a program: a user's mistake ends in one sentence and exit code 2, with `--debug` in a traceback.
    A number that `main` returns is the exit code.

    What looks like a fault of the program itself ends in a traceback in any case, see `mistake`.
    """
    try:
        result = main()
        leave_process_group()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)  # as a shell says it: 128 + SIGINT
    except Exception as error:
        message = mistake(error)
        if message is None or split_debug(sys.argv[1:])[1]:
            raise
        if os.environ.get("RANK", "0") != "0":
            # All processes of a run fail for the same reason as a rule; the launcher ends this one when the first has
            # said so
            time.sleep(RANK_DELAY)
        from mmser.tables import without_controls  # here: it imports NumPy, and `--help` does not wait for that

        print(f"error: {without_controls(message)}", file=sys.stderr)
        sys.exit(2)
    if isinstance(result, int) and result:
        sys.exit(result)


def mistake(error: Exception) -> str | None:
    """
    What a user did wrong; None for an exception that looks like a fault of the program.

    A user's mistakes are files and addresses that cannot be read, packages that are missing, and values that some
    code refuses with `raise ValueError`. A ValueError of an operation, such as of an unpacking, is no refusal.
    """
    if isinstance(error, OSError) and error.filename and error.strerror:
        # Of a copy that failed, the second name is the one that was written
        message = f"{error.filename2 or error.filename}: {error.strerror}"
        advice = {number: "Free some, and give the same command again." for number in DISK_IS_FULL}
        advice[errno.EFBIG] = "The disk, or `ulimit -f`, takes no file of that size: give another folder."
        return f"{message}. {advice[error.errno]}" if error.errno in advice else message
    is_about_an_input = isinstance(error, OSError) or type(error).__module__.split(".")[0] in FOREIGN_ERRORS
    frame = _innermost_frame(error)
    kinds = (ValueError, ImportError, FloatingPointError)
    if is_about_an_input or (isinstance(error, kinds) and _is_at_a_raise(frame)):
        message = WORKER_ERROR.sub("", str(error)).strip()
        return message if _is_own(frame) else first_sentence(message)
    if type(error).__name__ == "OutOfMemoryError":
        return f"The device has not enough memory: lower --batch_size or --max_seconds. {error}".splitlines()[0]
    return None


def first_sentence(message: str) -> str:
    """What a library says is wrong, without the manual that follows: its first line, with what that announces."""
    lines = message.strip().splitlines() or [""]
    said = lines[0] if not lines[0].endswith(":") else " ".join(line.strip() for line in lines[:2])
    return said.partition(" If you were trying to load it from")[0]


def _innermost_frame(error: Exception) -> TracebackType | None:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame


def _is_at_a_raise(frame: TracebackType | None) -> bool:
    line = linecache.getline(frame.tb_frame.f_code.co_filename, frame.tb_lineno).strip() if frame else ""
    return not line or line.startswith("raise")


def _is_own(frame: TracebackType | None) -> bool:
    name = frame.tb_frame.f_globals.get("__name__", "") if frame else ""
    return name.split(".")[0] in ("mmser", "__main__") or name.endswith(("_mmser", "_hf"))


def leave_process_group() -> None:
    """
    End what a program shares with the other processes of its run: the last thing it does, its trainers out of scope.

    A thread of Gloo that lets go of a tensor while the interpreter ends aborts the process, and a run that has worked
    counts as failed (https://github.com/pytorch/pytorch/issues/190489). The threads end with the group, and the group
    with the last model that was wrapped for it: hence the collection.
    """
    if "torch" not in sys.modules:  # then there is no group, and a quick command does not wait for the import
        return
    import torch

    gc.collect()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
