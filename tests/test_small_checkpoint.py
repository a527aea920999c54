# SPDX-License-Identifier: Apache-2.0
"""Tests of the checkpoint that MMSER ships: what is in its folder, and what a newcomer gets from it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from huggingface_hub import ModelCard

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "checkpoints" / "mmser-small"
LANGUAGES = {"de", "en", "es", "fi", "fr", "pl", "pt", "ru", "tr", "zh"}
# As in the README: nothing of MMSER is imported, nothing was trained
NEWCOMER = """
import json, sys
from transformers import pipeline

classifier = pipeline("audio-classification", model=sys.argv[1], trust_remote_code=True)
answers = classifier(["clip.wav", {"text": "I hate you, get out of here!"}], return_uncertainty=True)
json.dump(answers, open("answers.json", "w"))
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


def test_its_code_is_the_code_of_today():
    for path in CHECKPOINT.glob("*.py"):
        same = path.read_text(encoding="utf-8") == (ROOT / path.name).read_text(encoding="utf-8")
        assert same, f"{path.name} has changed: python benchmarks/small_model.py --code_only"


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Of a new process, in a folder without this package, for a second of a tone and a sentence."""
    folder = tmp_path_factory.mktemp("newcomer")
    tone = 0.1 * np.sin(2 * np.pi * 220 * np.arange(16_000) / 16_000)
    soundfile.write(folder / "clip.wav", tone, 16_000)
    subprocess.run([sys.executable, "-c", NEWCOMER, str(CHECKPOINT)], cwd=folder, check=True, capture_output=True)
    return json.loads((folder / "answers.json").read_text())


def test_a_newcomer_gets_all_labels_with_scores(answers):
    for entries in answers:
        assert {entry["label"] for entry in entries} == {"neutral", "happy", "sad", "angry"}
        assert sum(entry["score"] for entry in entries) == pytest.approx(1, abs=1e-5)
        assert all(0 <= entry["uncertainty"] <= 1 and isinstance(entry["is_unknown"], bool) for entry in entries)


def test_it_reads_words(answers):
    assert answers[1][0]["label"] == "angry"
