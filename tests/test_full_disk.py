# SPDX-License-Identifier: Apache-2.0
"""Tests of all commands that write, on a disk that is really full: `tests/full_disk.py` in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_corpus import write_corpus

PROGRAM = Path(__file__).with_name("full_disk.py")
OF_ITS_OWN = ["unshare", "--user", "--map-root-user", "--mount"]


def why_no_disk(folder):
    """Why no disk can be mounted in a space of its own; empty if one can."""
    command = [*OF_ITS_OWN, "mount", "-t", "tmpfs", "tmpfs", folder]
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE)
    except FileNotFoundError:
        return "there is no program `unshare`"
    return done.stderr.decode().strip() if done.returncode else ""


@pytest.mark.skipif(sys.platform == "win32", reason="there are neither such disks nor such limits")
def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path):
    """Where no disk of its own can be had, a limit on the size of files stands for it."""
    corpus, folder = write_corpus(tmp_path / "corpus"), tmp_path / "disk"
    folder.mkdir()
    kind = "limit" if why_no_disk(folder) else "disk"
    command = [*(OF_ITS_OWN if kind == "disk" else []), sys.executable, PROGRAM, kind, corpus, folder]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    told = done.stdout.decode().splitlines()
    assert [line.split(":")[0] for line in told] == ["train_hf", "predict_hf", "eval_hf", "export_hf"]
    assert not (kind == "disk" and list(folder.iterdir()))  # it was on the disk, which is gone
