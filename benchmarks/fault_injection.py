# SPDX-License-Identifier: Apache-2.0
"""A command in a fork of this process, which is killed at a chosen moment. For `faults.py`.

Changes of the disk are counted by Python's audit events. Libraries in C and Rust raise none, but their files end where
a limit of the system on the size of files says so: the signal that it sends ends the process on the spot.
"""

import functools
import os
import re
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mmser.console import run_command

HUNG = 300  # seconds, several times what any run takes here
# The events that change a disk: which of their arguments is the path
CHANGES = {"open": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0, "os.truncate": 0, "os.link": 1}


class Fault(NamedTuple):
    """`kind`, and where: the number of a change of the disk, with the bytes of the file it ends in; or seconds."""

    kind: str
    at: float
    size: int = 0


class Run(NamedTuple):
    """How a command ended: exit code (negative: a signal; None: it hung), seconds, output and changes of the disk."""

    code: int | None
    seconds: float
    said: str
    changes: int


def run(main: Callable, arguments: list[str], folder: Path, fault: Fault | None = None) -> Run:
    """Run a command in a fork of this process, which is killed as `fault` says."""
    start, reader_writer = time.monotonic(), os.pipe()
    process = os.fork()
    if not process:
        for target in (1, 2):
            os.dup2(reader_writer[1], target)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.closerange(3, 1024)
        os._exit(_be_child(main, arguments, str(folder), fault))
    os.close(reader_writer[1])
    said, end = b"", start + (fault.at if fault and fault.kind == "moment" else HUNG)
    is_hung = False
    with open(reader_writer[0], "rb", buffering=0) as output:
        while True:
            if select.select([output], [], [], max(0.0, end - time.monotonic()))[0]:
                part = output.read(2**16)
                said += part
                if not part:
                    break
            elif time.monotonic() >= end:
                is_hung = end >= start + HUNG
                os.kill(process, signal.SIGKILL)
                end += HUNG
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    text = said.decode(errors="replace")
    counted = re.findall(r"^changes (\d+)", text, re.MULTILINE)
    return Run(None if is_hung else code, time.monotonic() - start, text, int(counted[-1]) if counted else 0)


def _be_child(main: Callable, arguments: list[str], folder: str, fault: Fault | None) -> int:
    changes = 0

    def count(event: str, values: tuple) -> None:
        nonlocal changes
        if event not in CHANGES or (event == "open" and not (values[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
            return
        path = str(values[CHANGES[event]])
        if not path.startswith(folder) and event not in ("os.remove", "os.rmdir"):  # these may be relative to a folder
            return
        changes += 1
        if fault is not None and changes == fault.at:
            if fault.kind == "operation":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault.kind == "within a file":
                resource.setrlimit(resource.RLIMIT_FSIZE, (fault.size, fault.size))

    sys.addaudithook(count)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.argv = [f"{main.__module__}.py", *arguments]
    try:
        run_command(functools.partial(main, arguments))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    print(f"\nchanges {changes}", flush=True)
    sys.stderr.flush()
    return code
