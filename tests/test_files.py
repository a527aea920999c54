# SPDX-License-Identifier: Apache-2.0
"""Tests of `files`: a file, a folder or files that belong together are whole or not there, whatever happens."""

import errno
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

import eval_hf
import export_hf
import predict_hf
from mmser.arguments import parse_arguments
from mmser.caching import StateStore
from mmser.files import (
    check_writable,
    computer,
    files_together,
    naming_full_disk,
    remove_remains,
    usual_mode,
    whole_file,
    whole_folder,
    write_atomically,
)
from mmser.prediction_arguments import PREDICTION_ARGUMENTS

SMALL = Path(__file__).parent.parent / "checkpoints" / "mmser-small"


class Stop(Exception):
    """What ends a block before its end."""


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def gone():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in its folders")
def test_a_pipe_is_not_replaced(tmp_path):
    path = tmp_path / "pipe.csv"
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"pipe\.csv is a device or a pipe, which a file would replace: name a file"):
        write_atomically(path, "new")
    flags = ["x.wav", "--checkpoint", str(SMALL), "--output", str(path), "--overwrite"]
    with pytest.raises(ValueError, match="is a device or a pipe"):
        parse_arguments(PREDICTION_ARGUMENTS, flags)
    assert path.is_fifo()


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "scores[1].json"
    write_atomically(path, "old")
    with pytest.raises(Stop), whole_file(path) as hidden:
        hidden.write_text("ne")
        raise Stop
    assert path.read_text() == "old" and names(tmp_path) == [path.name]
    write_atomically(path, b"new")
    assert path.read_text() == "new" and names(tmp_path) == [path.name]


def test_what_a_killed_process_left_is_removed(tmp_path, gone):
    host = computer()
    kept = [f".a.txt.{host}-{os.getppid()}.tmp", f".b.txt.{host}-{gone}.tmp", ".a.txt.other-computer-1.tmp"]
    for name in (*kept, f".a.txt.{host}-{gone}.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / f".a.txt.old-computer-{gone}.tmp").mkdir()
    os.utime(tmp_path / f".a.txt.old-computer-{gone}.tmp", (0, 0))
    write_atomically(tmp_path / "a.txt", "whole")
    assert names(tmp_path) == sorted([*kept, "a.txt"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "a.txt"])


@pytest.mark.parametrize("earlier", [None, {}, {"a": "old", "only here": "old"}])
def test_a_folder_is_replaced_as_a_whole(tmp_path, earlier):
    folder = tmp_path / "deep" / "export"
    if earlier is not None:
        folder.mkdir(parents=True)
        for name, text in earlier.items():
            (folder / name).write_text(text)
    with pytest.raises(Stop), whole_folder(folder) as hidden:
        (hidden / "a").write_text("new")
        raise Stop
    assert names(folder) == sorted(earlier or {})
    with whole_folder(folder) as hidden:
        (hidden / "a").write_text("new")
        assert names(folder) == sorted(earlier or {})
    assert names(tmp_path) == ["deep/export/a"] and (folder / "a").read_text() == "new"


def test_a_folder_that_was_about_to_be_replaced_comes_back(tmp_path, gone):
    """Killed between the two renames: nothing else is left of it."""
    old = tmp_path / f".export.replaced.{computer()}-{gone}.tmp"
    old.mkdir()
    (old / "a").write_text("old")
    with pytest.raises(Stop), whole_folder(tmp_path / "export"):
        raise Stop
    assert names(tmp_path) == ["export/a"]


def test_files_that_belong_together_take_their_places_at_the_end(tmp_path):
    for name in ("config.json", "model-1.safetensors", "mine.txt"):
        (tmp_path / name).write_text("old")
    with pytest.raises(Stop), files_together(tmp_path, last=("model*",)) as hidden:
        (hidden / "config.json").write_text("new")
        raise Stop
    assert (tmp_path / "config.json").read_text() == "old"
    with files_together(tmp_path, last=("model*",)) as hidden:
        (hidden / "plots").mkdir()
        for name in ("model.safetensors", "config.json", "plots/z.png"):
            (hidden / name).write_text("new")
    assert names(tmp_path) == ["config.json", "mine.txt", "model.safetensors", "plots/z.png"]
    assert (tmp_path / "config.json").read_text() == "new"


@pytest.mark.parametrize("afresh", [False, True])
def test_the_last_file_says_that_the_others_are_there(tmp_path, monkeypatch, afresh):
    """Ended at any of the renames: with `afresh` the file that tells is never beside the others of another set."""
    original, seen = os.replace, []

    def watch(source, target):
        told = tmp_path / "report.md"
        parts = {name: (tmp_path / name).read_text() for name in names(tmp_path) if not name.startswith(".")}
        seen.append((told.read_text() if told.exists() else None, parts))
        original(source, target)

    for turn in ("first", "second"):
        if turn == "second":
            monkeypatch.setattr(os, "replace", watch)
        with files_together(tmp_path, last=("report.md",), afresh=afresh) as hidden:
            for name in ("a.png", "report.md", "z.png"):
                (hidden / name).write_text(turn)
    assert [told for told, _ in seen] == ([None] * 3 if afresh else ["first"] * 3)
    assert seen[-1][1]["a.png"] == seen[-1][1]["z.png"] == "second"


def test_an_error_names_what_the_user_named(tmp_path):
    path = tmp_path / "runs" / "report.md"  # there is no such folder
    with pytest.raises(FileNotFoundError) as raised:
        write_atomically(path, "x")
    assert raised.value.filename == str(path)


@pytest.mark.parametrize(
    "said",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "read.py", None, "runs/.a.pc-1.tmp/read.py"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 28544 vs 28436"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
)
def test_a_full_disk_is_said_in_one_way(said, tmp_path):
    with pytest.raises(OSError, match="No space left on device") as raised, naming_full_disk(tmp_path):
        raise said
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(tmp_path)
    with pytest.raises(OSError, match=f"File too large: '{tmp_path}'"), naming_full_disk(tmp_path):
        raise OSError(errno.EFBIG, "File too large")
    with pytest.raises(RuntimeError, match="another"), naming_full_disk(tmp_path):
        raise RuntimeError("another")


@pytest.mark.skipif(os.name != "posix", reason="there are no modes")
@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_what_a_library_writes_has_the_mode_of_any_new_file(umask, tmp_path):
    earlier = os.umask(umask)
    try:
        with usual_mode(tmp_path / "a"):
            (tmp_path / "b").touch(0o600)
            os.replace(tmp_path / "b", tmp_path / "a")
    finally:
        os.umask(earlier)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())

    def fail(dir):
        raise OSError(errno.EROFS, "Read-only file system", f"{dir}/tmpx")

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    with pytest.raises(OSError, match="Read-only file system") as raised:
        check_writable(tmp_path)
    assert raised.value.filename == str(tmp_path)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (eval_hf, "--checkpoint {checkpoint} --data_dir nowhere --output_dir {out}"),
        (export_hf, "--checkpoint nowhere --format safetensors --output_dir {out}/export"),
        (predict_hf, "nowhere.wav --checkpoint nowhere --output {out}/answers.csv"),
    ],
)
def test_a_command_finds_a_read_only_folder_first(command, arguments, tmp_path, monkeypatch):
    def fail(dir):
        raise OSError(errno.EROFS, "Read-only file system", f"{dir}/tmpx")

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    with pytest.raises(OSError, match="Read-only file system"):
        command.main(arguments.format(checkpoint=SMALL, out=tmp_path).split())


def test_a_living_process_keeps_what_it_writes(tmp_path):
    with whole_file(tmp_path / "a") as hidden:
        hidden.write_text("half")
        remove_remains(tmp_path / "*")
        assert hidden.exists()
    with whole_folder(tmp_path / "b") as hidden, files_together(tmp_path) as other:
        remove_remains(tmp_path / "*")
        assert hidden.exists() and other.exists()
    store = StateStore(tmp_path / "states", (2,), "float32", 100)
    store.add("key", np.zeros((1, 2)), 1, "a clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: StateStore(tmp_path / "states", (2,), "float32", 100))
        store.flush()
    assert store.find(["key"])


def left(folder, name, number):
    """What a process with this number left of a folder."""
    hidden = folder / f".{name}.{computer()}-{number}.tmp"
    hidden.mkdir(parents=True)
    (hidden / "a").write_text("left")
    return hidden


WRITERS = {
    "folder": lambda place: whole_folder(place / "report"),
    "files": lambda place: files_together(place / "report"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_remains_with_our_own_number_are_removed(writer, tmp_path):
    """A container that starts again has the same host name and the same process number 1."""
    for hidden in ((tmp_path, "report"), (tmp_path / "report", "new")):
        left(*hidden, os.getpid())
    with WRITERS[writer](tmp_path) as hidden:
        (hidden / "b").write_text("new")
    assert names(tmp_path / "report")[-1] == "b"
    assert not left_of(tmp_path if writer == "folder" else tmp_path / "report")


def left_of(folder):
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def test_what_our_own_number_set_aside_comes_back(tmp_path):
    left(tmp_path, "report.replaced", os.getpid())
    with pytest.raises(Stop), whole_folder(tmp_path / "report"):
        raise Stop
    assert names(tmp_path) == ["report/a"]


def test_what_is_older_than_the_process_with_its_number_is_abandoned(tmp_path, monkeypatch):
    """A number comes back after a restart: that of our parent is living, but has not written this."""
    left(tmp_path, "report.replaced", os.getppid())
    remove_remains(tmp_path / "report")
    assert names(tmp_path) == [f".report.replaced.{computer()}-{os.getppid()}.tmp/a"]
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: time.time() + 3600)
    remove_remains(tmp_path / "report")
    assert names(tmp_path) == ["report/a"]


HOLD = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from mmser.files import whole_folder
with whole_folder(Path({folder!r})) as hidden:
    print(hidden.name, flush=True)
    sys.stdin.read()
"""
IN_A_SPACE_OF_ITS_OWN = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "sh", "-c"]
CHOOSE_NUMBER = "echo {last} > /proc/sys/kernel/ns_last_pid"


def can_be_in_a_space_of_its_own():
    try:
        command = [*IN_A_SPACE_OF_ITS_OWN, CHOOSE_NUMBER.format(last=100)]
        return not subprocess.run(command, stderr=subprocess.DEVNULL).returncode
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not can_be_in_a_space_of_its_own(), reason="no space of process numbers of its own can be made")
def test_what_a_container_of_the_same_name_writes_is_kept(tmp_path, gone):
    """The number of its process is there that of a living one, and here that of one that has ended."""
    program = HOLD.format(path=sys.path, folder=str(tmp_path / "report"))
    command = f'{CHOOSE_NUMBER.format(last=gone - 1)}; "$0" -c "$1"; true'
    process = subprocess.Popen(
        [*IN_A_SPACE_OF_ITS_OWN, command, sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        hidden = tmp_path / process.stdout.readline().decode().strip()
        assert hidden.name.endswith(f"-{gone}.tmp")
        remove_remains(tmp_path / "report")
        assert hidden.is_dir()
        process.communicate()
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    hidden.mkdir()
    os.utime(hidden, (0, 0))
    remove_remains(tmp_path / "report")
    assert not hidden.exists()


@pytest.mark.parametrize("at", [0, 1])
def test_a_folder_comes_back_if_its_replacement_is_interrupted(at, tmp_path, monkeypatch):
    """Ctrl-C before or after the first of the two renames."""
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "a").write_text("earlier")
    original, calls = os.replace, []

    def interrupt(source, target):
        calls.append(target)
        if len(calls) == 2 and at == 0:
            raise KeyboardInterrupt
        original(source, target)
        if len(calls) == 1 and at == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "report"):
        pass
    assert names(tmp_path) == ["report/a"]
