# SPDX-License-Identifier: Apache-2.0
"""What the rows of `compatibility.py` share: a tiny model, and what it should say, computed in another way.

`World` holds the model, its processor and folders; a row is a function of it, named by `situation`. A row that returns
is right, one that raises is wrong; `Missing` says that it needs what is not installed.
"""

import contextlib
import functools
import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tiny import fit_openmax_by_chance, tiny_model
from tiny_corpus import tiny_processor, write_corpus

from mmser.console import OWN_LOGGERS
from modeling_mmser import MMSERForAudioClassification
from processing_mmser import MMSERPipeline

ROOT = Path(__file__).resolve().parents[2]
RATE = 16000
pipeline: Any = transformers.pipeline  # its types know no models by other people
TEXT = "what a joy"


class Missing(Exception):
    """A row needs a package that is not installed."""


@dataclass(frozen=True)
class Situation:
    """One row: `expectation` begins with "error" where a clear error is what one wants."""

    group: str
    name: str
    expectation: str
    check: Callable[["World"], None]


SITUATIONS: list[Situation] = []


def situation(group: str, name: str, expectation: str):
    def add(check):
        SITUATIONS.append(Situation(group, name, expectation, check))
        return check

    return add


def need(name: str) -> Any:
    """A package that not everybody has."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(name) from error


@contextlib.contextmanager
def error(kind: type[Exception] | tuple[type[Exception], ...], *words: str) -> Iterator[None]:
    """The block raises an error of this kind, whose message holds all of the words."""
    try:
        yield
    except kind as caught:
        absent = [word for word in words if word.lower() not in str(caught).lower()]
        if absent:
            raise AssertionError(f"the message lacks {absent}: {caught}") from caught
        return
    raise AssertionError(f"no error: one was expected that says {words}")


@contextlib.contextmanager
def without(name: str) -> Iterator[None]:
    """As if a package was not installed."""
    before = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]  # this is how Python is told
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


@contextlib.contextmanager
def warnings_of() -> Iterator[list[str]]:
    """What Transformers and MMSER log meanwhile."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("transformers", *OWN_LOGGERS)]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield messages
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=0, atol=tolerance)


def normalised(samples: np.ndarray) -> torch.Tensor:
    """[T] -> [1, T], zero mean and unit variance, as wav2vec2 wants it."""
    samples = np.asarray(samples, dtype=np.float64)
    return torch.tensor((samples - samples.mean()) / np.sqrt(samples.var() + 1e-7), dtype=torch.float32)[None]


class World:
    """A tiny model with random weights in which everything matters, and OpenMax fitted at random."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0

    @functools.cached_property
    def model(self) -> MMSERForAudioClassification:
        return self.new_model()

    @functools.cached_property
    def processor(self):
        return tiny_processor()

    @functools.cached_property
    def classifier(self) -> MMSERPipeline:
        return MMSERPipeline(model=self.model, processor=self.processor, device="cpu")

    @functools.cached_property
    def checkpoint(self) -> Path:
        folder = self.new_folder()
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        return folder

    @functools.cached_property
    def corpus(self) -> Path:
        return write_corpus(self.new_folder())

    def new_model(self, **overrides) -> MMSERForAudioClassification:
        model = tiny_model(seed=1, **overrides)
        fit_openmax_by_chance(model)
        return model

    def new_folder(self) -> Path:
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        return folder

    @functools.cached_property
    def clips(self) -> list[np.ndarray]:
        """Noise of three lengths."""
        rng = np.random.default_rng(0)
        return [0.1 * rng.standard_normal(length).astype(np.float32) for length in (8000, 5200, 3000)]

    def inputs(self, row: int = 0, text: str | None = TEXT) -> dict[str, torch.Tensor]:
        """What the processor should make of clip `row`, without it."""
        values = normalised(self.clips[row])
        inputs = {"input_values": values, "attention_mask": torch.ones_like(values, dtype=torch.long)}
        if text is not None:
            tokens = self.processor.tokenizer(text, return_tensors="pt")
            inputs |= {"input_ids": tokens["input_ids"], "text_attention_mask": tokens["attention_mask"]}
        return inputs

    def batch(self, labels: bool = False) -> dict[str, torch.Tensor]:
        """Clips 0 and 1 with texts, padded by hand."""
        rows = [self.inputs(0, TEXT), self.inputs(1, "stop it now")]
        batch = {}
        for name in rows[0]:
            values = [row[name][0] for row in rows]
            batch[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
        return batch | ({"labels": torch.tensor([1, 3])} if labels else {})

    def logits(self, row: int = 0, text: str | None = TEXT, model=None) -> torch.Tensor:
        with torch.no_grad():
            return (self.model if model is None else model)(**self.inputs(row, text)).logits[0]

    def check_scores(self, entries: Sequence[Mapping], row: int = 0, text: str | None = TEXT, tolerance=1e-5) -> None:
        """A pipeline's answer is the softmax of the model's logits, best first."""
        expected = self.logits(row, text).softmax(-1).tolist()
        labels = [self.model.config.id2label[index] for index in range(len(expected))]
        found = {entry["label"]: entry["score"] for entry in entries}
        close([found[label] for label in labels], expected, tolerance)
        assert [entry["score"] for entry in entries] == sorted(found.values(), reverse=True), "not the best first"

    def clip(self, row: int = 0, text: str | None = TEXT) -> dict[str, Any]:
        return {"raw": self.clips[row], "sampling_rate": RATE, "text": text}

    def run(self, code: str, *arguments: object, knows_mmser: bool = True, **environment: str) -> str:
        """What a fresh process prints. `knows_mmser=False`: with what is in a checkpoint alone."""
        folder = self.new_folder()
        if not knows_mmser:
            names = [path.stem for path in ROOT.glob("*_mmser.py")] + ["mmser"]
            code = BLOCK.format(names=names) + code
        variables = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        variables |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}" if knows_mmser else "", **environment}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        run = subprocess.run(
            command, env=variables, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
        )
        assert run.returncode == 0, run.stderr[-1500:]
        return run.stdout


BLOCK = """
import sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name in {names}:
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, NotInstalled())
"""
