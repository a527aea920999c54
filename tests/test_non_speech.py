# SPDX-License-Identifier: Apache-2.0
"""Tests of `demo/synthesize_non_speech.py`: the sounds, the files, and the folders and numbers that it refuses."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mmser.examples import EmotionDataset
from mmser.loading import load_emotion_split

SCRIPT = Path(__file__).resolve().parents[1] / "demo" / "synthesize_non_speech.py"
KINDS = ["noise", "tones", "music"]
RATE = 16_000


@pytest.fixture(scope="module")
def corpus(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("non_speech") / "new" / "folder"
    script.synthesize(folder, clips_per_kind=3, seed=5)
    return folder


def level(audio):
    return 10 * np.log10(np.mean(np.square(audio, dtype=np.float64)))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_clips_are_in_range_and_differ_in_level(script, kind):
    levels = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        audio = script._finish(rng, script.KINDS[kind](rng, RATE))
        assert audio.dtype == np.float32 and audio.shape == (RATE,)
        assert np.isfinite(audio).all() and np.abs(audio).max() < 1.0
        levels.append(level(audio))
    assert min(levels) >= -45.01 and max(levels) <= -11.99
    assert np.ptp(levels) > 10.0  # dB


def test_every_sound_has_sound_throughout(script):
    for name, make in {**script.NOISES, **script.TONES}.items():
        for seed in range(3):
            audio = make(np.random.default_rng(seed), 3 * RATE)
            assert audio.shape == (3 * RATE,) and np.isfinite(audio).all(), name
            assert all(np.any(second) for second in audio.reshape(3, RATE)), name  # pauses are below 0.6 s


def test_every_instrument_sounds(script):
    for instrument in script.INSTRUMENTS:
        for frequency in (125.0, 500.0):
            audio = instrument(np.random.default_rng(1), frequency, RATE)
            assert audio.shape == (RATE,) and np.isfinite(audio).all() and audio.std() > 0.01


# ---- files


def test_the_folder_loads_as_open_set_data(corpus):
    table = load_emotion_split(corpus)
    assert table["labels"] == [-1] * 9
    assert Counter(table["corpus"]) == {kind: 3 for kind in KINDS}
    example = EmotionDataset(table)[0]
    assert example["labels"] == -1 and len(example["audio"]) >= RATE
    assert not example.get("text")


def test_metadata_and_files_agree(corpus):
    with (corpus / "metadata.csv").open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert list(rows[0]) == ["file_name", "label", "emotion", "transcription", "speaker", "corpus", "language"]
    assert {path.name for path in corpus.iterdir()} == {"metadata.csv", *(row["file_name"] for row in rows)}
    for row in rows:
        assert row["emotion"] == row["corpus"] and row["corpus"] in row["file_name"]
        assert row["transcription"] == row["speaker"] == row["language"] == ""
        info = soundfile.info(corpus / row["file_name"])
        assert (info.samplerate, info.channels, info.subtype) == (RATE, 1, "PCM_16")
        assert 1.0 <= info.duration <= 6.0
        audio, _ = soundfile.read(corpus / row["file_name"], dtype="int16")
        assert -45.1 <= level(audio / 32768) <= -11.9
        assert np.abs(audio.astype(int)).max() < 32767


def test_more_clips_keep_the_earlier_ones_and_another_seed_none(script, corpus, tmp_path):
    script.synthesize(tmp_path / "fewer", clips_per_kind=2, seed=5)
    script.synthesize(tmp_path / "other", clips_per_kind=2, seed=6)
    all_of, fewer, other = contents(corpus), contents(tmp_path / "fewer"), contents(tmp_path / "other")
    assert len(fewer) == len(other) == 7
    for name in fewer.keys() - {"metadata.csv"}:
        assert fewer[name] == all_of[name]
        assert other[name] != all_of[name]
    assert len(set(all_of.values())) == len(all_of)


@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_run_leaves_nothing(script, tmp_path, monkeypatch, existing):
    folder, write, written = tmp_path / "folder", soundfile.write, []
    if existing:
        folder.mkdir()

    def write_four(path, *arguments, **options):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *arguments, **options)

    monkeypatch.setattr(script.soundfile, "write", write_four)
    with pytest.raises(KeyboardInterrupt):
        script.synthesize(folder, clips_per_kind=3)
    assert list(tmp_path.rglob("*")) == ([folder] if existing else [])
    monkeypatch.undo()
    script.synthesize(folder, clips_per_kind=1)
    assert len(contents(folder)) == 4
    assert list(tmp_path.iterdir()) == [folder]


def test_other_files_are_never_replaced(script, corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    before = contents(corpus)
    for folder in (tmp_path / "file", tmp_path / "folder", corpus):
        with pytest.raises(FileExistsError, match="new or empty"):
            script.synthesize(folder, clips_per_kind=1)
        assert script.main([str(folder), "--clips_per_kind", "1"]) == 1
        assert str(folder) in capsys.readouterr().err
    assert contents(corpus) == before
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "notes.txt"]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("arguments", [{"clips_per_kind": 0}, {"clips_per_kind": -3}, {"seed": -1}])
def test_numbers_out_of_range_are_refused_before_anything_is_written(script, tmp_path, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        script.synthesize(tmp_path / "folder", **arguments)
    assert not any(tmp_path.iterdir())


def test_the_command_line_writes_the_same_folder(script, corpus, tmp_path, capsys):
    assert script.main([str(tmp_path), "--clips_per_kind", "3", "--seed", "5"]) == 0
    assert contents(tmp_path) == contents(corpus)
    assert capsys.readouterr().out.startswith("9 clips")
