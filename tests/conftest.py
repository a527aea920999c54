# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test files ask for by name."""

import importlib.util
import logging as python_logging
import sys

import pytest
import torch
from transformers.utils import logging

from mmser.console import OWN_LOGGERS


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
def one_thread_and_seed():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quiet():
    """`main` sets levels of logging; leave them as they were."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    for name in OWN_LOGGERS:
        python_logging.getLogger(name).setLevel(python_logging.NOTSET)
