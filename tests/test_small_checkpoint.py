# SPDX-License-Identifier: Apache-2.0
"""Tests of the checkpoint that MMSER ships: what is in its folder, and what a newcomer gets from it."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from huggingface_hub import ModelCard

from mmser.export import export_checkpoint
from mmser.prediction_run import load_classifier
from mmser.publishing import without_local_paths
from mmser.stream import MMSERStream

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "checkpoints" / "mmser-small"
LANGUAGES = {"de", "en", "es", "fi", "fr", "pl", "pt", "ru", "tr", "zh"}
# As in the README, and as an endpoint does: nothing of MMSER is imported, nothing was trained
NEWCOMER = """
import base64, importlib.util, json, sys
from transformers import pipeline

classifier = pipeline("audio-classification", model=sys.argv[1], trust_remote_code=True)
answers = classifier(["clip.wav", {"text": "I hate you, get out of here!"}], return_uncertainty=True)
json.dump(answers, open("answers.json", "w"))

specification = importlib.util.spec_from_file_location("handler", sys.argv[1] + "/handler.py")
module = importlib.util.module_from_spec(specification)
specification.loader.exec_module(module)
handler = module.EndpointHandler(sys.argv[1])
sound = open("clip.wav", "rb").read()
coded = base64.b64encode(sound).decode()
given = [
    {"inputs": sound},
    {"inputs": coded, "parameters": {"top_k": 1}},
    {"inputs": {"audio": coded, "text": "I hate you, get out of here!"}},
    {"inputs": [{"text": "I hate you, get out of here!"}, {"audio": coded}], "parameters": {"return_uncertainty": 0}},
    {"inputs": "clip.wav"},
    {"inputs": {"path": "clip.wav"}},
    {"inputs": {"audio": "http://127.0.0.1/clip.wav"}},
    {"inputs": sound, "parameters": {"num_workers": 2}},
    {"parameters": {}},
]
said = []
for data in given:
    try:
        said.append(handler(data))
    except ValueError as error:
        said.append(str(error))
json.dump(said, open("endpoint.json", "w"))
print(sorted(name for name in sys.modules if name.split(".")[0] in ("mmser", "pipeline_mmser", "onnxruntime")))
"""


def test_it_is_small_and_has_its_card_and_notices():
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    notice = (CHECKPOINT / "NOTICE").read_text(encoding="utf-8")
    for name in ("Whisper", "multilingual-e5-small", "MIT License", "CREMA-D", "ODbL", "XED", "Creative Commons"):
        assert name in notice
    card = ModelCard.load(CHECKPOINT / "README.md")
    assert set(card.data.language) == LANGUAGES and card.data.pipeline_tag == "audio-classification"
    assert card.data.library_name == "transformers" and card.data.license == "apache-2.0"
    for word in ("CREMA-D", "XED", "never heard", "ECE"):
        assert word in card.text


def test_it_names_no_folder_of_the_machine_that_made_it():
    for path in CHECKPOINT.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert without_local_paths(content) == content, path.name


def test_its_code_is_the_code_of_today():
    for path in CHECKPOINT.glob("*.py"):
        same = path.read_text(encoding="utf-8") == (ROOT / path.name).read_text(encoding="utf-8")
        assert same, f"{path.name} has changed: python benchmarks/small_model.py --code_only"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a new process, without this package, has asked a copy of the checkpoint about a second of a tone."""
    folder = tmp_path_factory.mktemp("newcomer")
    copy = shutil.copytree(CHECKPOINT, folder / "copy")
    shutil.copy(ROOT / "mmser" / "handler.py", copy)
    tone = 0.1 * np.sin(2 * np.pi * 220 * np.arange(16_000) / 16_000)
    soundfile.write(folder / "clip.wav", tone, 16_000)
    done = subprocess.run([sys.executable, "-c", NEWCOMER, str(copy)], cwd=folder, check=True, capture_output=True)
    assert done.stdout == b"[]\n"
    return folder


@pytest.fixture(scope="module")
def answers(folder):
    return json.loads((folder / "answers.json").read_text())


def test_a_newcomer_gets_all_labels_with_scores(answers):
    for entries in answers:
        assert {entry["label"] for entry in entries} == {"neutral", "happy", "sad", "angry"}
        assert sum(entry["score"] for entry in entries) == pytest.approx(1, abs=1e-5)
        assert all(0 <= entry["uncertainty"] <= 1 and isinstance(entry["is_unknown"], bool) for entry in entries)


def test_it_reads_words(answers):
    assert answers[1][0]["label"] == "angry"


def test_an_endpoint_answers_as_the_pipeline_does(folder, answers):
    """A text is never taken for a path, and what it does not know is a sentence."""
    sound, best, both, several, *refused = json.loads((folder / "endpoint.json").read_text())
    assert sound == answers[0] and best == [answers[0][0]]
    assert both != answers[0] and len(both) == 4 and "uncertainty" in both[0]
    assert [[entry["label"] for entry in entries] for entries in several] == [
        [entry["label"] for entry in entries] for entries in (answers[1], answers[0])
    ]
    assert all(set(entry) == {"label", "score"} for entries in several for entry in entries)
    assert all(one.startswith("inputs: ") and "base64" in one for one in (*refused[:3], refused[4])), refused
    assert refused[3].startswith("parameters: there is no 'num_workers'; there are top_k")


# ---- what it says

HEARD, READ = [0.033, 0.062, 0.854, 0.051], [0.662, 0.277, 0.039, 0.022]


def voice(seconds):
    """A hum of 130 to 190 Hz in syllables, as loud as speech and the same on every machine. float32 (time,)"""
    times = np.arange(round(16_000 * seconds)) / 16_000
    phase = 2 * np.pi * (160 * times - 30 / (2 * np.pi * 0.7) * np.cos(2 * np.pi * 0.7 * times))
    hum = sum(np.sin(harmonic * phase) / harmonic for harmonic in range(1, 12))
    return (0.1 * (0.55 + 0.45 * np.sin(2 * np.pi * 4 * times)) * hum).astype(np.float32)


@pytest.fixture(scope="module")
def classifier():
    return load_classifier(str(CHECKPOINT), device="cpu")


def scores_of(entries):
    return {entry["label"]: entry["score"] for entry in entries}


def test_its_scores_stay(classifier):
    """Of one clip, alone and with words: stored, for changes of the code that change what it says."""
    clip = {"raw": voice(3), "sampling_rate": 16_000}
    for given, stored in ((clip, HEARD), ({"text": "I am so glad you came"}, READ)):
        scores = scores_of(classifier(given, top_k=None))
        # Processors with products of int8 round the states too
        assert [scores[name] for name in ("neutral", "happy", "sad", "angry")] == pytest.approx(stored, abs=0.03)


def test_a_stream_says_what_the_pipeline_says(classifier):
    pieces = {"chunk_length_s": 4.0, "stride_length_s": 0.5}
    samples = voice(9)
    whole = classifier({"raw": samples, "sampling_rate": 16_000}, return_uncertainty=True, **pieces)["chunks"]
    stream = MMSERStream(classifier, sampling_rate=16_000, skip_silence=False, **pieces)
    events = [event for block in np.array_split(samples, 20) for event in stream.push(block)] + stream.flush()
    assert [(event.start, event.end) for event in events] == [chunk["timestamp"] for chunk in whole] and len(whole) > 2
    for event, chunk in zip(events, whole, strict=True):
        assert event.scores == pytest.approx(scores_of(chunk["scores"]), abs=0.02)  # batches round differently
        assert event.uncertainty == pytest.approx(chunk["scores"][0]["uncertainty"], abs=0.02)


def test_it_answers_in_a_moment(classifier):
    """A bound for the slowest machine: three seconds take about 50 ms of a core."""
    classifier({"raw": voice(3), "sampling_rate": 16_000})
    start = time.perf_counter()
    classifier({"raw": voice(3), "sampling_rate": 16_000})
    assert time.perf_counter() - start < 3


def test_it_cannot_be_exported_again_and_says_what_can(tmp_path):
    with pytest.raises(ValueError, match="is in int8: export the checkpoint that it was made from"):
        export_checkpoint(CHECKPOINT, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())
