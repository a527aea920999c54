# SPDX-License-Identifier: Apache-2.0
"""Pairs of processes for the tests of distributed training, as torchrun starts them, but all from one: to import what
they need takes longer than to train.

A test file that has them asks for the fixture `two_processes`, a folder, and defines two functions:
`prepare_processes(corpus, folder)` writes what they start from, and `run_process(corpus, folder)` is what each of them
does. Its results go into `folder`.
"""

import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import torch
from pictures import pictures_are_dots

TIMEOUT = 600  # seconds, of all pairs


def run_pairs(names, corpus, folder):
    """Run `run_process` of each module (a name of a test file) in two processes; `folder / name` gets the results."""
    here = Path(__file__).parent
    subprocess.run(
        [sys.executable, Path(__file__), corpus, folder, *names],
        env={**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "PYTHONHASHSEED": "7"},
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=TIMEOUT,
    )


def fork_pair(module, corpus, folder):
    """The two processes of a module share what this one has imported; nothing has computed yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What torchrun sets, except for the ranks. The launcher only waits for its processes: the tests do without it
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    processes = []
    for rank in ("0", "1"):
        process = os.fork()
        if not process:
            os.environ.update(RANK=rank, LOCAL_RANK=rank)
            os._exit(run_rank(module, corpus, folder, folder / f"rank{rank}.log"))
        processes.append(process)
    for _ in range(2):
        process, status = os.wait()
        processes.remove(process)
        if status and processes:  # the other one would wait for it
            os.kill(processes[0], signal.SIGTERM)


def run_rank(module, corpus, folder, log):
    """What one process does, with its output in `log`. Returns: the exit code; a failure leaves a file `failed`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        module.run_process(corpus, folder)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        (folder / "failed").write_text(log.read_text(errors="replace")[-4000:])
        return 1
    return 0


if __name__ == "__main__":
    corpus, folder = map(Path, sys.argv[1:3])
    modules = {name: importlib.import_module(name) for name in sys.argv[3:]}
    gc.freeze()  # the trainers collect garbage often, and what was imported is none
    with pictures_are_dots():
        for name, module in modules.items():
            fork_pair(module, corpus, folder / name)
