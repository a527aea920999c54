# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test files ask for by name."""

import logging as python_logging

import pytest
import torch
from transformers.utils import logging

import train_hf


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
    for name in train_hf.OWN_LOGGERS:
        python_logging.getLogger(name).setLevel(python_logging.NOTSET)
