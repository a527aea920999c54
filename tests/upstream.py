# SPDX-License-Identifier: Apache-2.0
"""Transformers' own test mixins, taken from the source distribution of exactly the installed version.

Wheels leave out the `tests/` folder, so `upstream_tests()` gets the source distribution (environment variable
`MMSER_TRANSFORMERS_SDIST`, else `.cache/` in the repository root, else `pip download`) and imports what we need of it.
The distribution itself lacks a few files that those modules import: small stand-ins for them come first below.
"""

import functools
import importlib
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import transformers
from filelock import FileLock

CACHE = Path(__file__).resolve().parent.parent / ".cache"
PACKAGE = "transformers_upstream_tests"  # any name that hides neither our `tests` nor an installed package
MODULES = ("test_modeling_common", "test_configuration_common", "test_processing_common")
DOWNLOAD_SECONDS = 300


class SourceDistributionUnavailable(RuntimeError):
    """The transformers source distribution is not on this machine and could not be downloaded."""


# --- stand-ins for the files that the source distribution lacks ---


class ExportTesterMixin:
    """Stands for `tests/exporters/test_export.py`: adds no test. Export of MMSER has tests of its own."""


class GenerationTesterMixin:
    """Stands for `tests/generation/test_utils.py`: adds no test. Models that generate text would need the real one."""


# `ConfigTester` builds a (non-composite) config with these and expects each value back: none may be the default.
config_common_kwargs = {
    "architectures": ["SomeModel"],
    "chunk_size_feed_forward": 3,
    "dtype": "float16",  # the tester compares this one with `torch.float16`
    "id2label": {0: "calm", 1: "loud", 2: "neither"},
    "is_encoder_decoder": True,
    "label2id": {"calm": 0, "loud": 1, "neither": 2},
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}


def url_to_local_path(url: str) -> str:
    """Stands for `utils/fetch_hub_objects_for_ci.py`, which maps a test file on the Hub to a copy if CI made one."""
    return url


STAND_INS: dict[str, dict[str, Any]] = {
    f"{PACKAGE}.exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
    f"{PACKAGE}.generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    f"{PACKAGE}.utils.test_configuration_utils": {"config_common_kwargs": config_common_kwargs},
    "fetch_hub_objects_for_ci": {"url_to_local_path": url_to_local_path},
}


# --- the source distribution ---


def find_source_distribution(version: str, cache: Path = CACHE) -> Path:
    """Find or download the source distribution of a transformers version.

    Args:
        version (`str`): Release of transformers, for example `"5.23.0"`.
        cache (`Path`): Folder that keeps downloads between runs.

    Returns:
        `Path`: The `.tar.gz` file.

    Raises:
        FileNotFoundError: `MMSER_TRANSFORMERS_SDIST` names a file that does not exist.
        SourceDistributionUnavailable: It is not in the cache and `pip download` failed.
    """
    given = os.environ.get("MMSER_TRANSFORMERS_SDIST")
    if given:
        if not Path(given).is_file():
            raise FileNotFoundError(f"MMSER_TRANSFORMERS_SDIST={given!r} is not a file")
        return Path(given)
    archive = cache / f"transformers-{version}.tar.gz"
    if not archive.is_file():
        download_source_distribution(version, archive)
    return archive


def download_source_distribution(version: str, archive: Path) -> None:
    """Download `transformers-<version>.tar.gz` with pip and move it to `archive` once it is complete.

    Raises:
        SourceDistributionUnavailable: pip failed or took longer than `DOWNLOAD_SECONDS`; the message quotes pip's.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--retries=1", "--no-deps", "--no-binary=transformers", f"transformers=={version}"]
    help_text = "set MMSER_TRANSFORMERS_SDIST to the path of its .tar.gz to run without a network"
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        try:
            subprocess.run(
                [*command, "--dest", folder], check=True, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS
            )
            os.replace(Path(folder) / archive.name, archive)
        except (subprocess.SubprocessError, OSError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
            raise SourceDistributionUnavailable(
                f"no source distribution of transformers {version}: {help_text} (pip download: {reason})"
            ) from error


def extract_tests(archive: Path, version: str, folder: Path) -> None:
    """Write the `tests/*.py` files of a source distribution to `folder`, all or nothing.

    Args:
        archive (`Path`): Source distribution of transformers.
        version (`str`): The release that it must be of.
        folder (`Path`): Where the files go, created here.

    Raises:
        ValueError: The archive is unreadable, of another release, or without the modules we need.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        staging = Path(temporary, "tests")
        staging.mkdir()
        try:
            with tarfile.open(archive) as tar:
                for member in tar:
                    root, _, name = member.name.partition("/tests/")
                    if member.isfile() and root == f"transformers-{version}" and "/" not in name:
                        Path(staging, name).write_bytes(cast(Any, tar.extractfile(member)).read())
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"{archive} is not a readable .tar.gz file, delete it and try again") from error
        missing = [name for name in MODULES if not Path(staging, f"{name}.py").is_file()]
        if missing:
            raise ValueError(
                f"{archive} is no source distribution of transformers {version}: it lacks tests/{missing}"
            )
        Path(staging, "__init__.py").touch()  # makes it a package, for the relative imports
        os.rename(staging, folder)


# --- the mixins ---


@functools.cache
def upstream_tests() -> SimpleNamespace:
    """Import transformers' test mixins.

    Returns:
        `SimpleNamespace`: `ModelTesterMixin`, `ConfigTester`, `ProcessorTesterMixin`, and the makers of inputs
        `ids_tensor(shape, vocab_size)`, `floats_tensor(shape)` and `random_attention_mask(shape)`.

    Raises:
        SourceDistributionUnavailable: The files are not here and cannot be downloaded.
    """
    version = transformers.__version__
    folder = CACHE / f"transformers-{version}-tests"
    CACHE.mkdir(exist_ok=True)
    with FileLock(CACHE / "transformers-tests.lock"):  # pytest-xdist starts several workers at once
        if not folder.is_dir():
            extract_tests(find_source_distribution(version), version, folder)
    modeling, configuration, processing = import_tests(folder)
    return SimpleNamespace(
        ModelTesterMixin=modeling.ModelTesterMixin,
        ConfigTester=configuration.ConfigTester,
        ProcessorTesterMixin=processing.ProcessorTesterMixin,
        ids_tensor=modeling.ids_tensor,
        floats_tensor=modeling.floats_tensor,
        random_attention_mask=modeling.random_attention_mask,
    )


def import_tests(folder: Path) -> list[ModuleType]:
    """Import `MODULES` from `folder` as the package `PACKAGE`, with the stand-ins in place."""
    for name, content in STAND_INS.items():
        sys.modules[name] = ModuleType(name, "Stand-in written in tests/upstream.py.")
        vars(sys.modules[name]).update(content)
    spec: Any = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    search_path = list(sys.path)
    try:
        with warnings.catch_warnings():
            # The marks on upstream tests are registered in a conftest.py that the distribution lacks
            warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
            return [importlib.import_module(f"{PACKAGE}.{name}") for name in MODULES]
    finally:
        sys.path[:] = search_path  # one of the modules appends a folder that only a checkout has


def upstream_or_skip() -> SimpleNamespace:
    """`upstream_tests()` for a test module to call at import: where it is unavailable the module is skipped.

    Raises:
        SourceDistributionUnavailable: It is unavailable and the environment variable `CI` is set.
    """
    try:
        return upstream_tests()
    except SourceDistributionUnavailable as error:
        if os.environ.get("CI", "").lower() not in ("", "0", "false"):
            raise
        pytest.skip(str(error), allow_module_level=True)
