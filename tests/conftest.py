# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test files ask for by name, and the set-up of each test process."""

import contextlib
import gc
import importlib.util
import logging as python_logging
import os
import shutil
import signal
import sys
from pathlib import Path

# Before torch is imported, and for child processes: for tensors this small more threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # tests import onnxruntime themselves

import pytest
import torch
from filelock import FileLock
from transformers.utils import logging

from mmser.console import OWN_LOGGERS

torch.set_num_threads(1)


def pytest_configure():
    """An interrupt stops the tests, and each worker, also where a shell in the background has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """Take the imported modules out of the garbage collector's sight: the Trainer has it collect after each training,
    which costs 0.3 s as long as it looks at all of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def pictures(request):
    """No picture is drawn, except in a test file that says DRAWS."""
    from pictures import pictures_are_dots

    with contextlib.nullcontext() if hasattr(request.module, "DRAWS") else pictures_are_dots():
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """
    `shared(name, make)`: the folder `name`, filled by `make(folder)` once in the whole run.

    Every worker of pytest-xdist gets the same folder, so that what is expensive is made by the first that asks for it.
    Tests only read it.
    """
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    (root / "shared").mkdir(exist_ok=True)

    def get(name, make) -> Path:
        folder, complete = root / "shared" / name, root / "shared" / f"{name}.complete"
        with FileLock(f"{folder}.lock"):
            if not complete.exists():
                shutil.rmtree(folder, ignore_errors=True)  # half of it, from a worker that failed
                folder.mkdir()
                make(folder)
                complete.touch()
        return folder

    return get


@pytest.fixture(scope="module")
def two_processes(request, shared):
    """The folder with what two processes left, see `two_processes.py`. The first that asks runs those of all files."""
    asking = {item.module for item in request.session.items if "two_processes" in item.fixturenames}

    def make(folder):
        from tiny_corpus import write_corpus
        from two_processes import run_pairs

        corpus, modules = write_corpus(folder / "corpus"), {module.__name__: module for module in asking}
        for name, module in sorted(modules.items()):
            (folder / name).mkdir()
            module.prepare_processes(corpus, folder / name)
        run_pairs(sorted(modules), corpus, folder)

    folder = shared("two_processes", make) / request.module.__name__
    failed = folder / "failed"
    assert not failed.exists(), failed.read_text(errors="replace")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder of the tiny corpus."""
    from tiny_corpus import write_corpus

    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with the tokenizer of the tiny models."""
    from tiny_corpus import tiny_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def script(request):
    """The program that a test file names in SCRIPT, as a module."""
    specification = importlib.util.spec_from_file_location(request.module.SCRIPT.stem, request.module.SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    yield module
    del sys.modules[specification.name]


@pytest.fixture
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def quiet():
    """`main` sets levels of logging; leave them as they were."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    for name in OWN_LOGGERS:
        python_logging.getLogger(name).setLevel(python_logging.NOTSET)
