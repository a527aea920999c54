# SPDX-License-Identifier: Apache-2.0
"""Tests of `demo/train_tokenizer.py`: the same transcripts give the same pieces, and these cover all their words."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from demo.train_tokenizer import SPECIAL_TOKENS, learn_pieces

SCRIPT = Path(__file__).resolve().parents[1] / "demo" / "train_tokenizer.py"
SENTENCES = [
    "The window is open at work.",
    "La fenêtre est ouverte au travail.",
    "Das Fenster steht offen, wie üblich.",
    "我们 今天 回家。",
    "Окно на работе открыто.",
] * 2


@pytest.fixture
def corpus(tmp_path):
    table = tmp_path / "corpus" / "train" / "metadata.csv"
    table.parent.mkdir(parents=True)
    with table.open("w", encoding="utf-8", newline="") as file:
        rows = csv.DictWriter(file, ["transcription"])
        rows.writeheader()
        rows.writerows({"transcription": sentence} for sentence in SENTENCES)
    return table.parents[1]


def test_fresh_processes_learn_the_same_tokenizer(corpus, tmp_path):
    files = []
    for name, hashes in (("first", "1"), ("second", "2")):  # the trainer, in Rust, draws its own
        environment = {**os.environ, "PYTHONHASHSEED": hashes}
        subprocess.run([sys.executable, SCRIPT, corpus, tmp_path / name], check=True, env=environment)
        files.append((tmp_path / name / "tokenizer.json").read_bytes())
    assert files[0] == files[1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    for sentence in SENTENCES:
        assert tokenizer.unk_token_id not in tokenizer(sentence)["input_ids"]


def test_pieces_are_few_unique_and_merged_from_letters():
    pieces = learn_pieces(SENTENCES, vocab_size=2000)
    assert len(set(pieces)) == len(pieces)
    assert {"window", "ouverte", "Fenster"} <= set(pieces)  # whole words, as the vocabulary has room for them
    letters = {piece for piece in pieces if len(piece.removeprefix("##")) == 1}
    assert len(learn_pieces(SENTENCES, vocab_size=len(letters) + len(SPECIAL_TOKENS) + 10)) == len(letters) + 15
