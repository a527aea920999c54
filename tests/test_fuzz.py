# SPDX-License-Identifier: Apache-2.0
"""Tests of `benchmarks/fuzz.py`: a small part of its cases, and the faults that the whole of them found."""

import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pytest

from audio_mmser import load_audio
from configuration_mmser import MMSERConfig, check_depth
from mmser.arguments import DataArguments
from mmser.flags import FlagParser, parse_json
from mmser.labels import choose_label_names
from mmser.loading import load_emotion_dataset
from mmser.votes import read_votes
from pipeline_mmser import _noted_config

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import fuzz

CASES = 15  # of each target


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_generated_cases_are_answered_or_refused(name, tmp_path, monkeypatch, quiet):
    monkeypatch.chdir(tmp_path)  # a word that names a file here would be found
    outcome = fuzz.feed(fuzz.TARGETS[name], CASES, number=1)
    assert outcome.faults == [] and outcome.cases >= CASES
    assert outcome.answered + outcome.late >= 3, "some of them come to the work behind the first checks"


def test_spoilt_media_end_in_an_error_or_in_sound():
    outcome, _ = fuzz.feed_media(40, number=1, start_method="fork")  # which imports nothing anew
    assert outcome.faults == [] and outcome.cases == 40 and outcome.refused


def _crash(*_):
    import os

    os.abort()


def test_faults_crashes_and_numbers_that_are_not_finite_are_found(monkeypatch):
    """The benchmark itself: it would be of no use if it found nothing."""

    def run(case):
        if case == 0:
            raise KeyError(case)
        if case == 1:
            raise ValueError("refused")
        fuzz.check_finite({"a": [float("nan") if case == 2 else 0.5]}, "a number")

    outcome = fuzz.Outcome()
    for case in range(4):
        outcome.take(run, case, [])
    assert (outcome.cases, outcome.answered, outcome.refused, len(outcome.faults)) == (4, 1, 1, 2)
    monkeypatch.setattr(fuzz, "_media_process", _crash)
    outcome, _ = fuzz.feed_media(3, start_method="fork")
    assert len(outcome.faults) == 1 and "ended with" in outcome.faults[0]
    assert not multiprocessing.active_children()


def test_errors_of_python_and_how_far_a_case_came_are_told_apart():
    target = fuzz.Target(fuzz.run_labels, fuzz.st.none(), ("mmser.labels._check_names",))
    outcome = fuzz.Outcome()
    with fuzz.watched(target.behind) as reached:
        for case in ((["a", "b"], None), (["a", "a"], None), ([["a"]], None)):  # two names, one, and none
            outcome.take(target.run, case, reached)
        assert (outcome.answered, outcome.late, outcome.refused) == (1, 1, 2)
        outcome.take(lambda case: sorted(case), [1, "a"], reached)
        assert not fuzz.is_raised_on_purpose(_error(lambda: int("x")))
        assert fuzz.is_raised_on_purpose(_error(lambda: json.loads("x")))
    assert len(outcome.faults) == 1 and "TypeError" in outcome.faults[0]


def _error(function):
    with pytest.raises(ValueError) as raised:
        function()
    return raised.value


DEEP = "[" * 100_000


def test_what_is_nested_too_deeply_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"recipe\.json is nested too deeply"):
        parse_json(DEEP, "recipe.json")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": ' + DEEP + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"metadata\.jsonl row 1 is nested too deeply"):
        load_emotion_dataset(tmp_path / "metadata.jsonl")
    with pytest.raises(ValueError, match="row 1"):
        read_votes({"votes": DEEP}, {"votes": None}, "row 1")


def nested(kind, levels):
    """What JSON text could not be read to: as a caller in Python gives it."""
    value = {} if kind is dict else []
    for _ in range(levels):
        value = {"a": value} if kind is dict else [value]
    return value


@pytest.mark.parametrize("levels", [100, 950, 100_000])  # Python's own limit is 1,000, less what it is in already
@pytest.mark.parametrize("kind", [dict, list])
def test_values_that_are_nested_too_deeply_are_refused_in_python_too(kind, levels):
    deep, said = nested(kind, levels), "nested too deeply"
    fields = ("fusion_dropout", "audio_config", "id2label", "auxiliary_tasks", "auxiliary_label_maps", "class_counts")
    for field in (*fields, "lora", "modalities", "prediction_set_thresholds", "a_field_of_another_version"):
        for make in (lambda values: MMSERConfig(**values), MMSERConfig.from_dict):
            with pytest.raises(ValueError, match=f"MMSERConfig is {said}: at most 64 levels are read"):
                make({field: deep})
    with pytest.raises(ValueError, match=rf"label names \(--labels\) is {said}"):
        choose_label_names([deep, "a"])
    with pytest.raises(ValueError, match=f"r: labels is {said}"):
        FlagParser([DataArguments]).set_recipe({"labels": deep}, "r")
    with pytest.raises(
        ValueError, match=r"audio: (dicts in dicts, deeper than 8 levels,|the list of samples is ragged)"
    ):
        load_audio({"audio": deep} if kind is list else nested_clip(levels), 16_000)


def nested_clip(levels):
    clip = {"raw": [0.0]}
    for _ in range(levels):
        clip = {"audio": clip}
    return clip


@pytest.mark.parametrize("levels", [100, 950])
def test_json_that_python_reads_and_then_fails_at_is_refused(tmp_path, levels):
    text = json.dumps(nested(list, levels))
    with pytest.raises(ValueError, match=r"recipe\.json is nested too deeply"):
        parse_json(f'{{"labels": {text}}}', "recipe.json")
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.wav", "label": {text}}}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"metadata\.jsonl row 1 is nested too deeply"):
        load_emotion_dataset(tmp_path / "metadata.jsonl")
    with pytest.raises(ValueError, match=r"row 1: 'votes' is no JSON"):
        read_votes({"votes": text}, {"votes": None}, "row 1")


@pytest.mark.parametrize("note", ["[" * 100_000, "[", "3", "{" * 70 + "}" * 70, '{"a": ' * 70 + "1" + "}" * 70])
def test_the_notes_of_an_exported_model_are_json_of_few_levels(note):
    with pytest.raises(
        ValueError, match=r"^The model is damaged: |^What the model notes of its configuration is nested"
    ):
        _noted_config(note)


def test_what_holds_itself_or_the_same_again_and_again_is_no_endless_work():
    circle, doubled = {}, []
    circle["a"] = circle
    for _ in range(60):
        doubled = [doubled, doubled]
    with pytest.raises(ValueError, match="nested too deeply"):
        MMSERConfig(a_field_of_another_version=circle)
    check_depth(doubled, "it")  # of 2 to the 60th lists


def test_what_is_as_deep_as_a_network_is_read():
    assert MMSERConfig(a_field_of_another_version=nested(dict, 50)).a_field_of_another_version
    clip = {"audio": {"audio": {"array": np.ones(400), "sampling_rate": 16_000}}}
    assert len(load_audio(clip)) == 400


@pytest.mark.parametrize("name", ["id2label", "label2id"])
def test_labels_of_a_configuration_are_a_dict(name):
    with pytest.raises(TypeError, match=f"`{name}` must be a dict, got 0.5"):
        MMSERConfig(**{name: 0.5})


def test_a_dtype_of_a_configuration_is_one_of_torch():
    assert MMSERConfig(dtype="bfloat16").dtype is not None
    with pytest.raises(ValueError, match=r"`dtype` must be one of float32, .*, got 'none'"):
        MMSERConfig(dtype="none")
