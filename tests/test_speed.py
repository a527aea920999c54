# SPDX-License-Identifier: Apache-2.0
"""Tests of `benchmarks/speed.py`: what is compared takes turns, and what is told of it, on a tiny model."""

import json
import mmap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_corpus import write_corpus

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "speed.py"
CPU = torch.device("cpu")


def test_turns_are_interleaved_and_the_first_is_not_counted(script):
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = script.in_turns(functions, 4, CPU)
    assert {len(values) for values in seconds.values()} == {4} and min(map(np.min, seconds.values())) >= 0
    turns = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    assert len(turns) == 5 and all(sorted(turn) == list("abc") for turn in turns)
    assert {turn[0] for turn in turns[1:]} == set("abc")  # none of them always comes after the same other


def test_seconds_and_ratios(script):
    assert 0.02 <= script.seconds_of(lambda: time.sleep(0.02), CPU) < 0.2
    assert script.ratio(np.array([2.0, 9.0, 4.0]), np.array([1.0, 3.0, 4.0])) == 2.0  # not 4/3, that of the medians


def test_the_peak_is_counted_from_where_it_is_told_to(script):
    # Pages straight from the system: an allocator may hand out some that the process has held since another test
    with mmap.mmap(-1, 60_000_000) as pages:
        touch(pages)
    before = script.start_peak(CPU)
    with mmap.mmap(-1, 40_000_000) as pages:
        touch(pages)
    assert script.peak_memory(CPU) - before == pytest.approx(40, abs=10)


def touch(pages):
    """Bring every page into memory."""
    pages[:: mmap.PAGESIZE] = b"1" * len(range(0, len(pages), mmap.PAGESIZE))


def test_floor_and_ours_are_of_the_same_encoders(script):
    arguments = script.parse_flags(["--size", "tiny", "--device", "cpu"])
    floor, ours = script.build_model(script.FLOOR, arguments), script.build_model(script.OURS, arguments)
    for own, part in zip(floor, (ours.mmser.audio_encoder, ours.mmser.text_encoder), strict=True):
        shapes = [{name: p.shape for name, p in encoder.named_parameters()} for encoder in (own, part)]
        assert {name: shape for name, shape in shapes[0].items() if not name.startswith("pooler")} == shapes[1]


@pytest.mark.parametrize("section", ["forward", "lengths", "cache", "live"])
def test_sections(script, section, tmp_path, capsys):
    output = tmp_path / "speed.json"
    output.write_text('{"cache": {"rows": [{"before": 1}]}, "other": {"rows": [{"before": 1}]}}')
    write_corpus(tmp_path / "corpus")
    flags = ["--size", "tiny", "--repeats", "2", "--device", "cpu", "--threads", "1"]
    flags += ["--batch_sizes", "1", "2", "--data_dir", str(tmp_path / "corpus")]
    script.main([*flags, "--sections", section, "--output", str(output)])
    results = json.loads(output.read_text())
    name = "forward, batch 1 2" if section == "forward" else section
    assert results["other"] == {"rows": [{"before": 1}]} and results[name]["setting"]["repeats"] == 2
    rows = results[name]["rows"]
    if section == "forward":
        assert len(rows) == 2 * 2 * 4
        assert all(row["times the floor"] == 1 for row in rows if row["model"] == script.FLOOR)
        assert len(script.forward_table(rows)) == 2 * 2
    elif section == "lengths":
        assert [row["clips"] for row in rows] == [16, 16, 16]
        assert max(row["largest difference of a score"] for row in rows) < 1e-5
    elif section == "live":
        assert [row["chunk, s"] for row in rows] == [2, 4, 8, 4]
        assert [row["piece, s"] for row in rows] == pytest.approx([4 / 3, 8 / 3, 16 / 3, 8 / 3], abs=1e-3)
        assert all(row["ms per event"] > 2 * rows[3]["ms per event"] > 0 for row in rows[:3])
    else:
        assert rows[0]["cached epoch, s"] > 0 and rows[0]["clips"] > 0
    assert f"## speed:{name.replace(', ', '_').replace(' ', '_')}" in capsys.readouterr().out


def test_children_report_their_own_memory():
    from benchmarks import speed  # `script` has a name that a new process cannot import

    arguments = speed.parse_flags(["--size", "tiny", "--device", "cpu", "--threads", "1"])
    row = speed.in_child(speed.forward_memory, arguments, name=speed.OURS, dtype="fp32")
    assert row["what"] == "MMSER, forward, batch 8" and row["peak MB"] > row["before MB"] > 50
