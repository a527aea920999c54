# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001 -- sentences as they are written, with typographic apostrophes
"""Tests of `benchmarks/speak_text.py`: nothing but the words tells the label; what is chosen, written and refused."""

import csv
import importlib.util
import inspect
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mmser.examples import EmotionDataset
from mmser.loading import load_emotion_dataset

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "speak_text.py"
EMOTIONS = ("neutral", "happy", "sad", "angry")
SENTENCES = [
    ("en", "I don’t know what to do"),
    ("en", "We are going home"),
    ("en", "This is my brother's well-known house"),
    ("de", "Wir gehen jetzt nach Hause"),
    ("de", "Das ist ja schön"),
    ("zh", "我今天回家"),
    ("zh", "你好"),
    ("en", "Nothing at all"),
]
SPLITS = {"train": SENTENCES, "validation": SENTENCES[:4], "test": SENTENCES[2:6]}


def write_tables(folder, ending, shift):
    """All splits, with other labels and another ending of the sentences."""
    folder.mkdir()
    for split, sentences in SPLITS.items():
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["transcription", "label", "emotion", "language", "corpus", "license"])
            for index, (language, text) in enumerate(sentences):
                label = (index + shift) % 4
                writer.writerow([text + ending, label, EMOTIONS[label], language, "Films", "CC BY 4.0"])
    return folder


def speak(tables, output, *options):
    """In a process of its own: only a fresh engine speaks the same bytes again."""
    command = [sys.executable, str(SCRIPT), str(tables), str(output), *options]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


def audio_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.flac")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    folder = tmp_path_factory.mktemp("spoken")
    done = speak(write_tables(folder / "tables", ".", 0), folder / "corpus")
    assert done.returncode == 0, done.stderr
    assert "train: 8 clips" in done.stdout
    return folder / "corpus"


# ---- how a sentence is said


@pytest.mark.parametrize(
    "text",
    ["What, you?!", "What you.", "- What… you", "♪ What you ♪", '"What" (you)!!!', "What\nyou;", "'What' you -"],
)
def test_punctuation_is_not_spoken(script, text):
    assert script.spoken_words(text) == "What you"


def test_words_are_kept_as_they_are_written(script):
    assert script.spoken_words("Don’t, rock-n-roll 25!") == "Don't rock-n-roll 25"
    assert script.spoken_words("Du\u0308n, ÉTÉ? 我回家。Да!") == "Dün ÉTÉ 我回家 Да"
    assert script.spoken_words("नमस्ते!") == "नमस्ते"
    assert script.spoken_words("… - ' !?") == ""


def test_settings_cannot_depend_on_the_label_and_no_voice_is_in_two_splits(script):
    assert list(inspect.signature(script.draw_settings).parameters) == ["split", "rng"]
    assert list(inspect.signature(script.render).parameters) == ["words", "language", "settings", "engine"]
    voices = {}
    for split in script.SPLITS:
        drawn = [script.draw_settings(split, np.random.default_rng((1, index))) for index in range(300)]
        voices[split] = {settings.voice for settings in drawn}
        for name, (low, high) in {"rate": script.RATES, "pitch": script.PITCHES, "level": script.LEVELS}.items():
            values = np.array([getattr(settings, name) for settings in drawn])
            assert low <= values.min() and values.max() <= high
            assert values.mean() == pytest.approx((low + high) / 2, abs=0.1 * (high - low))
    assert sum(map(len, voices.values())) == len(set().union(*voices.values()))


def test_other_labels_and_punctuation_leave_the_audio_identical(corpus, tmp_path):
    output = tmp_path / "corpus"
    # One label for each sentence in both: groups of the same sizes, so the same sentences in the same order
    done = speak(write_tables(tmp_path / "tables", "?!", 1), output)
    assert done.returncode == 0, done.stderr
    assert audio_of(output) == audio_of(corpus)
    rows = list(csv.DictReader((output / "train" / "metadata.csv").open(encoding="utf-8")))
    assert {row["transcription"] for row in rows} == {text + "?!" for _, text in SENTENCES}


def test_level_and_pitch_are_what_was_drawn(script):
    pytest.importorskip("espeakng_loader")
    engine = script.Espeak()
    words = "I am going home today and tomorrow"
    for pitch, level in ((25, -30.0), (75, -20.0)):
        settings = script.Settings("shelby", 160.0, pitch, level, 0.1, 0.05)
        audio = script.render(words, "en", settings, engine)
        assert (audio[:1600] == 0).all() and (audio[-800:] == 0).all()
        speech = audio[1600:-800]
        assert 10 * np.log10(np.mean(speech**2)) == pytest.approx(level, abs=1e-6)
    slow = script.render(words, "en", settings._replace(rate=140.0), engine)
    fast = script.render(words, "en", settings._replace(rate=200.0), engine)
    assert len(slow) > 1.2 * len(fast)


def test_a_sentence_that_is_too_long_is_left_out(script):
    pytest.importorskip("espeakng_loader")
    settings = script.Settings("m2", 140.0, 50.0, -25.0, 0.1, 0.1)
    assert script.render("one two three four five six " * 12, "en", settings, script.Espeak()) is None


# ---- which sentences


def test_the_choice_is_as_even_as_the_groups_allow(script):
    sizes = {("en", "0"): 100, ("en", "1"): 40, ("de", "1"): 7, ("zh", "2"): 30}
    rows = [
        {"language": language, "label": label, "id": i} for (language, label), n in sizes.items() for i in range(n)
    ]
    chosen = script.choose(rows, 67, np.random.default_rng(0))
    counts = Counter((row["language"], row["label"]) for row in chosen)
    assert counts == {("en", "0"): 20, ("en", "1"): 20, ("de", "1"): 7, ("zh", "2"): 20}
    assert len({(row["language"], row["label"], row["id"]) for row in chosen}) == 67
    assert [row["label"] for row in chosen] != sorted(row["label"] for row in chosen)
    assert chosen == script.choose(rows, 67, np.random.default_rng(0))
    assert chosen != script.choose(rows, 67, np.random.default_rng(1))
    everything = script.choose(rows, 10_000, np.random.default_rng(0))
    assert len(everything) == len(rows) and {id(row) for row in everything} == {id(row) for row in rows}


# ---- what is written


def test_our_loader_reads_it(corpus):
    splits, label_names = load_emotion_dataset(str(corpus), extra_columns=["license"])
    assert label_names == list(EMOTIONS)
    speakers = []
    for split, sentences in SPLITS.items():
        rows = splits[split].to_list()
        assert {(row["language"], row["text"].removesuffix(".")) for row in rows} == set(sentences)
        for row in rows:
            assert row["corpus"] == "Films-spoken" and row["license"] == "CC BY 4.0"
            assert row["labels"] == sentences.index((row["language"], row["text"].removesuffix("."))) % 4
            assert row["speaker"].startswith(f"{row['language']}+")
        speakers.append({row["speaker"] for row in rows})
        example = EmotionDataset(splits[split])[0]
        assert 0.2 * 16_000 < len(example["audio"]) < 12.5 * 16_000 and np.abs(example["audio"]).max() > 0.01
    assert not speakers[0] & speakers[1] and not speakers[0] & speakers[2] and not speakers[1] & speakers[2]
    assert soundfile.info(next((corpus / "train").glob("*.flac"))).samplerate == 16_000


def test_sentences_without_words_are_counted_and_left_out(script, tmp_path):
    pytest.importorskip("espeakng_loader")
    tables = write_tables(tmp_path / "tables", ".", 0)
    with (tables / "test.csv").open("a", encoding="utf-8") as file:
        file.write('"...!",0,neutral,en,Films,CC BY 4.0\n')
    summary = script.speak_text(tables, tmp_path / "corpus", dict.fromkeys(script.SPLITS, 100))
    assert "test: 4 clips" in summary and "{'nothing to say': 1}" in summary
    assert len(list((tmp_path / "corpus" / "test").glob("*.flac"))) == 4


# ---- what is refused


def test_errors_name_the_file_and_what_is_allowed(script, tmp_path, capsys):
    tables = write_tables(tmp_path / "tables", ".", 0)
    output = tmp_path / "corpus"
    assert script.main([str(tmp_path / "none"), str(output)]) == 1
    assert "train.csv does not exist" in capsys.readouterr().err
    text = (tables / "test.csv").read_text(encoding="utf-8")
    for changed, message in (
        (text.replace(",language", ",tongue"), r"test.csv has no column language; its columns are transcription"),
        (text.replace(",de,", ",xx,", 1), "no voice for 'xx', only en, de"),
    ):
        (tables / "test.csv").write_text(changed, encoding="utf-8")
        assert script.main([str(tables), str(output)]) == 1
        assert message in capsys.readouterr().err
    (tables / "test.csv").write_text(text, encoding="utf-8")
    assert not output.exists()
    if importlib.util.find_spec("espeakng_loader"):
        output.mkdir()
        (output / "precious").write_text("mine")
        assert script.main([str(tables), str(output)]) == 1
        assert "is not empty" in capsys.readouterr().err
        assert [path.name for path in output.iterdir()] == ["precious"]
