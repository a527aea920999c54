# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are whole or not there: a run may be killed at any moment, and a later one reads them.

What is not whole yet has a hidden name, which says the computer, the container and the process that write it. When
that process is gone, the next one to write the same thing removes what is left of it. `locked` lets one process alone
write into a folder.
"""

import contextlib
import errno
import glob
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from filelock import FileLock, Timeout

from mmser.console import DISK_IS_FULL

DAY = 24 * 60 * 60  # seconds: what another computer or container has not touched for so long is no longer written
CLOCKS = 60  # seconds that the clocks of a computer and of its files may differ
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)  # said by file systems that have none
OLD = "replaced"  # in the hidden name of a folder that another one is about to replace
_being_written: set[str] = set()  # by this process, now


def computer() -> str:
    """
    Where numbers of processes mean the same: the name of the computer and, on Linux, of its space of such numbers.
    Containers may share a name, as with `--network host`, and still not see each other's processes.
    """
    space = Path("/proc/self/ns/pid")
    return f"{platform.node()}.{space.stat().st_ino}" if space.exists() else platform.node()


def hidden_path(path: Path) -> Path:
    """The name of `path` while this process writes it, in the same folder."""
    return path.with_name(f".{path.name}.{computer()}-{os.getpid()}.tmp")


def remove_remains(path: Path) -> None:
    """
    Remove what processes that were killed left of `path`, whose name may be a pattern.

    A folder that was about to be replaced comes back, if nothing has taken its place.
    """
    for remains in sorted(path.parent.glob(f".{path.name}.*-*.tmp")):
        if not _is_abandoned(remains):
            continue
        target = path.with_name(remains.name[1:].partition(f".{OLD}.")[0])
        with contextlib.suppress(FileNotFoundError):  # another process removes it too
            if f".{OLD}." in remains.name and not target.exists():
                os.replace(remains, target)
            elif remains.is_dir():
                shutil.rmtree(remains)
            else:
                remains.unlink()


def _is_abandoned(hidden: Path) -> bool:
    """
    Whether the process is gone that wrote this; of another computer or container, whether it has rested for a day.

    Numbers of processes come back, in a container that starts again even the first. So what has our own number
    is abandoned unless we write it now, and what is older than the process of its number was left by another one.
    """
    name, _, number = hidden.name.removesuffix(".tmp").rpartition("-")
    with contextlib.suppress(FileNotFoundError):
        status = hidden.stat()
        if not (name.endswith(f".{computer()}") and number.isdigit()):
            return time.time() - status.st_mtime > DAY
        if int(number) == os.getpid():
            return os.path.realpath(hidden) not in _being_written
        try:
            started = psutil.Process(int(number)).create_time()
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:  # of another user
            return False
        # A copy has the time of its original, but never the time at which it was made
        return max(status.st_mtime, status.st_ctime) + CLOCKS < started
    return False


@contextlib.contextmanager
def kept(*hidden: Path) -> Iterator[None]:
    """Let nobody in this process take these hidden names for remains while the block runs."""
    names = {os.path.realpath(path) for path in hidden}
    _being_written.update(names)
    try:
        yield
    finally:
        _being_written.difference_update(names)


@contextlib.contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """
    Let errors within the block name `path` where its hidden name, a disk that is full, or one that takes no file of
    that size, stopped a library.
    """
    try:
        yield
    except Exception as error:
        # Of torch, which does not tell the reason, when it writes an archive
        torch_says = isinstance(error, RuntimeError) and re.search(r"iostream|inline_container|file write", str(error))
        given = error.errno if isinstance(error, OSError) else None
        is_too_large = given == errno.EFBIG or os.strerror(errno.EFBIG) in str(error)
        if is_too_large or given in DISK_IS_FULL or torch_says or os.strerror(errno.ENOSPC) in str(error):
            number = errno.EFBIG if is_too_large else errno.ENOSPC
            # Of a copy that could not be written, `filename` is what was read
            name = getattr(error, "filename2", None) or getattr(error, "filename", None) or path
            raise OSError(number, os.strerror(number), os.fspath(_told(name, path))) from error
        if isinstance(error, OSError) and error.filename and _told(error.filename, path) is path:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def _told(name: str | os.PathLike, path: Path) -> str | os.PathLike:
    """A name as a user knows it: for a hidden one the `path` that it stands for."""
    return path if any(part.startswith(".") and part.endswith(".tmp") for part in Path(name).parts) else name


def locked(path: Path, patience: float) -> FileLock | None:
    """
    A lock, taken until it is released or this process ends, however that is. None on a file system without locks.

    Args:
        path: the file of the lock, which stays there: who waits for it has it open. Its folder is made.
        patience: seconds to wait for another process.
    Raises:
        filelock.Timeout: another process has it.
    """
    # A lock that is only a file would outlive its process
    options: dict[str, Any] = {"fallback_to_soft": False} if hasattr(FileLock, "fallback_to_soft") else {}
    try:
        with naming_full_disk(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path, timeout=patience, **options)
            lock.acquire(poll_interval=0.2)
            return lock
    except NotImplementedError:
        return None
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in WITHOUT_LOCKS:
            raise
        return None


@contextlib.contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """Let a file that a library writes have the mode of any new one: of safetensors its owner alone may read it."""
    path.touch()
    mode = path.stat().st_mode
    yield
    if path.stat().st_mode != mode:  # of some disks all files have one mode, and it cannot be changed
        path.chmod(mode)


def check_writable(folder: Path) -> None:
    """Find out before the work whether its results can be written, by a file that is there for a moment."""
    try:
        with tempfile.TemporaryFile(
            dir=next(place for place in (folder, *folder.absolute().parents) if place.exists())
        ):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(folder)) from error


def check_is_no_device(path: Path) -> None:
    """Refuse the name of a device or a pipe, which a file would replace. ValueError, naming it."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is a device or a pipe, which a file would replace: name a file.")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write, which takes the place of `path` if the block ends without an error."""
    check_is_no_device(path)
    remove_remains(path.with_name(glob.escape(path.name)))
    hidden = hidden_path(path)
    try:
        with kept(hidden), naming_full_disk(path):
            yield hidden
            with open(hidden, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that is large, damaged or a stranger's; ValueError, naming it, if it is none."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is no JSON, or nested too deeply.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it must hold a JSON object, got {content!r:.80}.")
    return content


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file as a whole or not at all."""
    with whole_file(path) as hidden:
        hidden.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """
    Yield an empty folder to fill, which takes the place of `path` if the block ends without an error.

    `path` may be there, with files in it or without: it is gone only when all of the new one is in its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_remains(path.with_name(glob.escape(path.name)))
    hidden, old = hidden_path(path), hidden_path(path.with_name(f"{path.name}.{OLD}"))
    try:
        with kept(hidden, old):
            with naming_full_disk(path):
                hidden.mkdir()
                yield hidden
            _replace_folder(path, hidden, old)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _replace_folder(path: Path, new: Path, old: Path) -> None:
    """Put a new folder in the place of `path`, which is `old` for a moment, and comes back if this is interrupted."""
    try:
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def files_together(folder: Path, last: Sequence[str] = (), afresh: bool = False) -> Iterator[Path]:
    """
    Yield an empty folder to fill, whose files take their places in `folder` if the block ends without an error.

    Args:
        folder: may have other files, which stay.
        last: patterns of names. These files come last, and say that the others are there. Files of such a name that
            are not among the new ones are removed.
        afresh: the files of such a name that are there are removed before the first new one takes its place: never do
            they stand beside new ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / "new"
    remove_remains(place)
    hidden = hidden_path(place)

    def is_last(name: Path) -> bool:
        return any(fnmatch(name.as_posix(), pattern) for pattern in last)

    try:
        with kept(hidden):
            with naming_full_disk(folder):
                hidden.mkdir()
                yield hidden
            names = sorted(path.relative_to(hidden) for path in hidden.rglob("*") if path.is_file())
            told = [path.relative_to(folder) for pattern in last for path in folder.glob(pattern)]
            for name in told if afresh else ():
                (folder / name).unlink()
            for name in sorted(names, key=is_last):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(hidden / name, folder / name)
            for name in set(told) - set(names):
                (folder / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
