# SPDX-License-Identifier: Apache-2.0
"""Tests of `mmser.explanation` and `mmser explain`: what is known to have moved an answer is found."""

import itertools
import re

import numpy as np
import pytest
import soundfile

from mmser import cli
from mmser.explain_command import main
from mmser.explanation import Explanation, explain, silence, split_words, without_word

DRAWS = True  # see the fixture `pictures`
RATE = 16_000


class Additive:
    """A classifier whose score is a sum: 0.4 for the sounding share of the second second, and a part for each word."""

    def __init__(self):
        self.calls = 0

    def __call__(self, clips, **options):
        self.calls += len(clips)
        return [self.score(clip.get("raw"), clip.get("text") or "") for clip in clips]

    @staticmethod
    def score(raw, text):
        score = 0.1 + 0.3 * ("awful" in text) - 0.2 * ("fine" in text)
        if raw is not None:
            score += 0.4 * np.sum(np.abs(raw[RATE : 2 * RATE]) > 0.5) / RATE
        return [{"label": "angry", "score": score}, {"label": "happy", "score": 1 - score}]


@pytest.fixture
def classifier():
    return Additive()


def test_sound_and_words_get_what_they_add(classifier):
    found = explain(classifier, np.ones(3 * RATE, np.float32), RATE, "an awful fine day", label="angry")
    assert (found.label, found.score) == ("angry", pytest.approx(0.6))
    assert [(round(one.start, 2), round(one.end, 2)) for one in found.sound] == [
        (i / 4, (i + 1) / 4) for i in range(12)
    ]
    changes = np.array([one.change for one in found.sound])
    # a silence of 0.5 s takes half of the second away, and a piece has the mean of the two silences over it
    expected = [0, 0, 0, 0.05, 0.15, 0.2, 0.2, 0.15, 0.05, 0, 0, 0]
    np.testing.assert_allclose(changes, expected, atol=0.005)  # the fades
    assert {one.word: round(one.change, 6) for one in found.words} == {"an": 0, "awful": 0.3, "fine": -0.2, "day": 0}
    assert classifier.calls == 1 + 13 + 4


def test_the_answer_is_explained_unless_another_label_is_asked_for(classifier):
    quiet = np.zeros(RATE, np.float32)
    assert explain(classifier, quiet, RATE).label == "happy"
    with pytest.raises(ValueError, match="no label sad; there are angry, happy"):
        explain(classifier, quiet, RATE, label="sad")


def test_a_text_alone(classifier):
    found = explain(classifier, text="awful day", label="angry")
    assert found.sound == [] and [round(one.change, 6) for one in found.words] == [0.3, 0]
    assert explain(classifier, text="awful").words == []  # without its only word nothing is left to classify


@pytest.mark.parametrize("seconds", [0.05, 0.5, 0.75, 2.2])
def test_pieces_cover_a_clip_of_any_length(classifier, seconds):
    found = explain(classifier, np.ones(int(seconds * RATE), np.float32), RATE).sound
    assert found[0].start == 0 and found[-1].end == pytest.approx(seconds)
    assert all(one.end == pytest.approx(other.start) for one, other in itertools.pairwise(found))
    assert all(one.end > one.start for one in found)


def test_bad_input_is_told(classifier):
    with pytest.raises(ValueError, match="give a sound, a text, or both"):
        explain(classifier)
    with pytest.raises(ValueError, match="lasts 31 s; at most 30 s"):
        explain(classifier, np.zeros(31 * RATE, np.float32), RATE)
    with pytest.raises(ValueError, match=r"at least 0\.05 s, got 0"):
        explain(classifier, np.zeros(RATE, np.float32), RATE, window_s=0)
    assert classifier.calls == 0


def test_silence_fades_and_leaves_the_rest():
    wave = np.ones(RATE, np.float32)
    cut = silence(wave, RATE, 0.25, 0.5)
    assert np.array_equal(cut[: RATE // 4], wave[: RATE // 4]) and np.array_equal(cut[RATE // 2 :], wave[RATE // 2 :])
    assert not cut[RATE // 4 + 160 : RATE // 2 - 160].any()
    assert np.abs(np.diff(cut)).max() < 0.02  # no click
    assert wave.all()  # the original stays


@pytest.mark.parametrize(
    "text, words, without",
    [
        ("what a day", ["what", "a", "day"], "what day"),
        ("今天好", ["今", "天", "好"], "今好"),
        ("alone", ["alone"], None),
    ],
)
def test_words(text, words, without):
    assert split_words(text) == words
    if without is not None:
        assert without_word(text, 1) == without


# ---- the command, with the checkpoint that comes with MMSER


def test_the_command_explains_a_clip(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "clip.wav", rng.uniform(-0.3, 0.3, RATE), RATE)
    picture = tmp_path / "clip.png"
    words = ["explain", str(tmp_path / "clip.wav"), "--text", "so sad", "--plot", str(picture), "--window", "0.5"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 4 + 2 and "| so " in rows[4] and "| sad " in rows[5]
    assert picture.read_bytes().startswith(b"\x89PNG") and shown.endswith(f"\nWritten: {picture}\n")
    assert re.match(rf"{re.escape(words[1])}: \w+ 0\.\d\d\n\nWhat each piece adds to that score: ", shown)
    with pytest.raises(FileExistsError, match="exists: give another name, or --overwrite"):
        main(words[1:])


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "nothing to explain"),
        (["missing.wav"], "missing.wav does not exist"),
        (["--text", "caf\udce9"], "--text: the text is not in UTF-8"),
        (["--text", "a", "--batch_size", "0"], "--batch_size must be at least 1"),
        (["--text", "a", "--window", "0"], "--window is a time"),
        (["--text", "a b", "--plot", "a.jpg"], "is a .png file"),
        (["--text", "a", "--plot", "a.png"], "nothing to show for one word"),
        (["--text", "a b", "--plot", "absent/a.png"], "the folder absent does not exist"),
        (["."], "is a folder: name one audio file"),
        (["--text", "今天", "--plot", "a.jpg"], "is a .png file"),  # two words, without a space between them
    ],
)
def test_wrong_usage_of_the_command(words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(words)


def test_nothing_is_explained_of_silence(tmp_path):
    soundfile.write(tmp_path / "clip.wav", np.zeros(RATE), RATE)
    with pytest.raises(ValueError, match=r"clip.wav: nothing can be heard in it: all samples are 0\."):
        main([str(tmp_path / "clip.wav")])


def test_rows_of_a_table():
    assert Explanation("sad", 0.5).rows == []
