# SPDX-License-Identifier: Apache-2.0
"""Tests of `benchmarks/load.py`: a small part of its calls, on a tiny model, and the faults that the whole found."""

import json
import multiprocessing

import numpy as np
import pytest
import torch
from tiny import randomize
from tiny_corpus import tiny_model, tiny_processor

import pipeline_mmser
from benchmarks import load
from mmser.prediction_run import load_classifier


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load")
    torch.manual_seed(1)
    for part in (randomize(tiny_model(dropout=False)).eval(), tiny_processor()):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def known(checkpoint, tmp_path_factory):
    """Calls, and what each is to give."""
    calls = load.make_calls(tmp_path_factory.mktemp("calls"))
    classifier = load_classifier(checkpoint, "cpu")
    return calls, [load.answer(classifier, call) for call in calls]


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(load, "HUNG", 60)
    monkeypatch.setattr(load, "FRESH", 1)


def good(row):
    return (row["wrong"], row["hung"]) == (0, 0) and row["calls"] > 0


def test_calls_are_of_all_kinds_and_errors_are_documented(known):
    calls, expected = known
    refused = {call.kind for call, found in zip(calls, expected, strict=True) if isinstance(found, str)}
    assert refused == {call.kind for call in calls if call.kind.startswith("error")} and len(refused) == 7
    assert len({call.kind for call in calls}) == 15


def test_threads_give_the_answers_of_one(checkpoint, known):
    rows = load.measure_threads(checkpoint, *known, 3)
    assert all(map(good, rows)) and [row["calls"] for row in rows] == [48, 96, 48]


@pytest.mark.parametrize("threads", [1, 2])
def test_forked_workers_give_the_answers_of_their_parent(checkpoint, known, threads):
    """With two threads of torch in the parent, a worker hung in its first parallel loop."""
    row = load.measure_processes(checkpoint, *known, 4, "fork", threads)
    assert good(row) and row["calls"] == 16
    assert torch.get_num_threads() == 1


def tell_threads(pipe, classifier, clip):
    torch.set_num_threads(3)
    classifier(clip)
    told = torch.get_num_threads()
    torch.set_num_threads(2)
    pipeline_mmser.compute_in_a_fork()  # no more than that: the process that runs the tests may have had two threads
    pipe.send((told, torch.get_num_threads()))


def test_a_forked_worker_computes_with_one_thread_until_it_is_told_otherwise(checkpoint):
    classifier, clip = load_classifier(checkpoint, "cpu"), {"text": "what a joy"}
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=tell_threads, args=(theirs, classifier, clip))
    worker.start()
    assert ours.poll(60) and ours.recv() == (1, 2)
    worker.join()
    torch.set_num_threads(2)
    try:
        classifier(clip)
        assert torch.get_num_threads() == 2, "this process is no fork"
    finally:
        torch.set_num_threads(1)
    assert pipeline_mmser.PROCESS.number == multiprocessing.current_process().pid


def test_memory_is_watched_and_streams_are_compared(checkpoint, known, monkeypatch):
    monkeypatch.setattr(load, "SAMPLES", 10)
    monkeypatch.setattr(load, "THREADS", 4)  # as many streams as threads
    row = load.measure_calls(checkpoint, *known, 40)
    assert good(row) and {"MB per 1,000 calls", "MB at the end"} <= row.keys()
    first, second = load.measure_stream(checkpoint, 12)
    assert good(first) and good(second) and second["calls"] == 4 * 9


def test_a_slope_is_that_of_the_line_after_the_warm_up():
    sizes = iter([100.0] * 7 + [100 + 0.5 * step for step in range(33)])
    memory = load.Memory(40, lambda: next(sizes))
    for done in range(1, 41):
        memory.after(done)
    assert memory.columns() == {"MB per 1,000 calls": 500, "MB after warm-up": 100, "MB at the end": 116}


def test_what_differs_is_counted(capsys):
    tally = load.Tally()
    call = load.Call("file", "x", {})
    for found in ([{"label": "a", "score": 0.5 + 1e-6}], [{"label": "b", "score": 0.5}], [], "ValueError: no"):
        tally.count(call, found, [{"label": "a", "score": 0.5}])
    row = tally.row("x", 1, 1.0)
    assert (row["calls"], row["wrong"], row["refused"]) == (4, 3, 1)
    assert row["largest difference"] == pytest.approx(1e-6, rel=1e-3) and "WRONG, x: file" in capsys.readouterr().out
    assert np.isinf(load.difference({"a": True}, {"a": 1.5}))
    assert json.loads((load.ROOT / "benchmarks" / "results" / "load.json").read_text())["rows"]


def test_memory_that_is_held_is_seen():
    before = load.own_memory()
    held = np.ones(6_000_000)
    assert load.own_memory() - before == pytest.approx(held.nbytes / 1e6, abs=10)
