# SPDX-License-Identifier: Apache-2.0
"""Which files data may name. A table of a stranger names files of its own folder, and no address.

`Reach` is what the user allows besides, `Boundary` the rule for one source of data.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
from huggingface_hub import constants

from configuration_mmser import whole_repository

ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "lzma", "zstd")  # what an address may look into: `zip://a.wav::FILE`
# Kinds of addresses that lead to another machine; others (`file`, `reference`, `dir`, ...) may lead back to this one
REMOTE = (
    *("http", "https", "hf", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "r2", "swift"),
    *("ftp", "sftp", "ssh", "smb", "webdav", "hdfs", "webhdfs", "dbfs", "lakefs", "dropbox", "gdrive", "box"),
)


@dataclass(frozen=True)
class Reach:
    """
    What data may name besides the files in their own folder.

    Args:
        allow_urls: addresses (`https://`, `s3://`, ...), and shares of another machine.
        allow_outside_files: files outside of the folder, by their path or behind a link.
    """

    allow_urls: bool = False
    allow_outside_files: bool = False


class Boundary:
    """
    The files that one source of data may name.

    Args:
        reach: what the user allows besides.
        folders: where they may lie, once all links are followed. None: anywhere, as in a table that the user named.
        addresses: beginnings of addresses that belong to the source.
    """

    def __init__(self, reach: Reach, folders: Sequence[Path] | None, addresses: Sequence[str] = ()):
        self.reach = reach
        self.name = "" if not folders else str(folders[0])
        self.addresses = tuple(addresses)
        self._roots = (
            None if folders is None else [_below(os.path.realpath(whole_repository(folder))) for folder in folders]
        )
        self._parents: dict[str, str] = {}  # followed before: many files lie in few folders

    def refusal(self, path: str) -> str:
        """What is wrong with a path or an address that data name, with what to do; "" if nothing is."""
        *outer, last = path.split("::")
        is_inside_archive = bool(outer) and all(part.split("://")[0] in ARCHIVES for part in outer)
        file = last if is_inside_archive else path
        if is_elsewhere(file):
            if file.startswith(self.addresses):
                return ""
            if not self.reach.allow_urls:
                return f"{path} is an address, and is not fetched: to read addresses that data name, give --allow_urls"
            if "://" not in file or ("::" not in file and file.partition("://")[0].casefold() in REMOTE):
                return ""
            return (
                f"{path} is an address of a kind that data may not name: write files of this machine as a path, and "
                f"others as {', '.join(REMOTE[:4])}, ..., perhaps in an archive (zip://a.wav::https://...)"
            )
        if self._roots is None or self.reach.allow_outside_files:
            return ""
        real = self._followed(file)
        if any(real.startswith(root) for root in self._roots):
            return ""
        leads = "" if real == os.path.normpath(file) else f", which is {real},"
        return (
            f"{file}{leads} is not in the folder of the data, {self.name}. If you trust them, give "
            "--allow_outside_files, or name the table itself (--manifest)"
        )

    def _followed(self, path: str) -> str:
        parent, name = os.path.split(path)
        if parent not in self._parents:
            self._parents[parent] = os.path.realpath(parent)
        whole = os.path.join(self._parents[parent], name)
        return os.path.realpath(whole) if name in ("", ".", "..") or os.path.islink(whole) else whole


def is_elsewhere(path: str) -> bool:
    """Whether a path is an address, or on a share of another machine (Windows): a look at it asks that machine."""
    return "://" in path or os.path.splitdrive(path)[0].startswith(("\\\\", "//"))


def of_folder(folder: Path, reach: Reach) -> Boundary:
    """The rule for a folder of data that the user named."""
    return Boundary(reach, [folder])


def of_hub(name: str, reach: Reach) -> Boundary:
    """The rule for a data set on the Hub, or a folder that `datasets` reads as one: its own files, in the caches."""
    caches = [constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH]
    folders = [Path(name)] if os.path.isdir(name) else []
    return Boundary(reach, [*folders, *map(Path, caches)], (f"hf://datasets/{name}@", f"hf://datasets/{name}/"))


def _below(folder: str) -> str:
    return folder if folder.endswith(os.sep) else folder + os.sep
