# SPDX-License-Identifier: Apache-2.0
"""Tests of `demo/synthesize_corpus.py`: what is planned, written and refused, and what an interruption leaves.

A corpus of two languages is written by the command line in fresh processes (`corpora`, skipped without the engine);
everything else runs in this process, without the engine.
"""

import csv
import os
import shutil
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from scipy.signal import hilbert, welch

SCRIPT = Path(__file__).resolve().parents[1] / "demo" / "synthesize_corpus.py"
LABELS = ["neutral", "happy", "sad", "angry"]
SPLITS = ["train", "validation", "test", "ood"]
LANGUAGES = ["en", "hi"]
CLIPS_PER_CELL = 2


def run_script(output, *arguments):
    command = [sys.executable, SCRIPT, output, "--clips_per_cell", str(CLIPS_PER_CELL), "--languages", *LANGUAGES]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*map(str, command), *arguments], capture_output=True, encoding="utf-8", env=environment, timeout=120
    )


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """The same tiny corpus twice, each from a fresh process that started in another second of the clock."""
    pytest.importorskip("espeakng_loader", reason="espeakng-loader (pip install .[demo]) is not installed")
    folders = [tmp_path_factory.mktemp("first") / "corpus", tmp_path_factory.mktemp("second") / "corpus"]
    for folder in folders:
        started = int(time.time())
        result = run_script(folder)
        assert result.returncode == 0, result.stderr
        while int(time.time()) == started:
            time.sleep(0.05)
    return folders


def read_rows(corpus, split):
    with (corpus / split / "metadata.csv").open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_seed_gives_the_same_bytes_in_fresh_processes(corpora):
    first, second = map(contents, corpora)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_every_split_has_its_columns_and_files(corpora):
    expected = {"file_name", "label", "transcription", "speaker", "language", "corpus", "license", "emotion"}
    for split in SPLITS:
        rows = read_rows(corpora[0], split)
        assert set(rows[0]) == expected
        assert all(rows[0][name] for name in ("speaker", "language", "corpus", "license"))
        names = [row["file_name"] for row in rows]
        assert names == [f"{index:05d}.flac" for index in range(len(rows))]
        assert {path.name for path in (corpora[0] / split).iterdir()} == {*names, "metadata.csv"}


def test_labels_are_balanced_over_languages_and_emotions(corpora):
    for split, count in (("train", 2), ("validation", 1), ("test", 1)):
        cells = Counter((row["language"], row["label"]) for row in read_rows(corpora[0], split))
        assert cells == {(language, label): count for language in LANGUAGES for label in LABELS}


def test_ood_holds_fear_and_non_speech_without_a_label(corpora):
    rows = read_rows(corpora[0], "ood")
    assert {row["label"] for row in rows} == {"-1"}
    fear = [row for row in rows if row["emotion"] == "fear"]
    assert sorted(row["language"] for row in fear) == LANGUAGES
    assert all(row["transcription"] for row in fear)
    sounds = Counter(row["emotion"] for row in rows if row["emotion"] != "fear")
    assert {"white_noise", "pink_noise", "babble", "chords", "melody", "tone", "sweep"} == set(sounds)
    assert len(set(sounds.values())) == 1
    assert not any(row["transcription"] for row in rows if row["emotion"] != "fear")


def test_speakers_and_sentences_are_in_one_split_only(corpora):
    speakers, sentences = {}, {}
    for split in SPLITS[:3]:
        for row in read_rows(corpora[0], split):
            assert row["speaker"].startswith(row["language"])
            assert speakers.setdefault(row["speaker"], split) == split
            assert sentences.setdefault(row["transcription"], split) == split
    in_train = {speaker for speaker, split in speakers.items() if split == "train"}
    assert in_train.isdisjoint(row["speaker"] for row in read_rows(corpora[0], "ood"))


def test_audio_is_short_16_khz_mono_and_audible(corpora):
    for split in SPLITS:
        for row in read_rows(corpora[0], split):
            path = corpora[0] / split / row["file_name"]
            info = soundfile.info(path)
            assert (info.samplerate, info.channels, info.format, info.subtype) == (16_000, 1, "FLAC", "PCM_16"), path
            assert 0.8 <= info.duration <= 2.5, path
            audio, _ = soundfile.read(path)
            assert audio.std() > 0.005 and np.abs(audio).max() < 0.99, path


def test_readme_and_help_say_that_it_is_synthetic(corpora, script, capsys):
    assert "say nothing about how well a model recognises human emotion" in " ".join(
        (corpora[0] / "README.md").read_text(encoding="utf-8").replace("**", "").split()
    )
    with pytest.raises(SystemExit):
        script.main(["--help"])
    assert "say nothing about human emotion" in " ".join(capsys.readouterr().out.split())


def test_an_untouched_corpus_is_replaced_and_the_summary_is_right(corpora, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(corpora[0], folder)
    result = run_script(folder, "--seed", "1")
    assert result.returncode == 0, result.stderr
    assert contents(folder) != contents(corpora[0])
    assert os.listdir(tmp_path) == ["corpus"]
    seconds = sum(soundfile.info(path).duration for path in (folder / "train").glob("*.flac"))
    line = next(line for line in result.stdout.splitlines() if "train" in line)
    assert line.strip("| ").replace(" ", "").split("|") == ["train", "4", "4", "4", "4", "0", "16", f"{seconds:.0f}"]


@pytest.mark.parametrize("change", ["a file is added", "a folder is added", "audio is edited", "a label is edited"])
def test_a_changed_corpus_is_refused(corpora, script, tmp_path, change):
    folder = tmp_path / "corpus"
    shutil.copytree(corpora[0], folder)
    script.check_output_folder(folder)  # untouched
    if change == "a file is added":
        (folder / "train" / "notes.txt").write_text("mine")
    elif change == "a folder is added":
        (folder / "mine").mkdir()
    elif change == "audio is edited":
        soundfile.write(folder / "test" / "00000.flac", np.zeros(16_000), 16_000)
    else:
        table = folder / "test" / "metadata.csv"
        table.write_bytes(table.read_bytes().replace(b"angry", b"happy"))
    before = contents(folder)
    with pytest.raises(FileExistsError, match="was changed"):
        script.synthesize_corpus(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("readme", [None, "# My own data\n"])
def test_a_foreign_folder_is_refused_and_kept(script, tmp_path, capsys, readme):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    if readme:
        (folder / "README.md").write_text(readme)
    before = contents(folder)
    assert script.main([str(folder)]) == 1
    error = capsys.readouterr().err
    assert str(folder) in error and "new or empty folder" in error
    assert contents(folder) == before and os.listdir(tmp_path) == ["mine"]


def test_a_file_or_a_link_as_output_is_refused(script, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError, match="not a folder"):
            script.synthesize_corpus(tmp_path / name)


def test_missing_engine_is_one_clear_error(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    assert script.main([str(tmp_path / "corpus")]) == 1
    error = capsys.readouterr().err.strip()
    assert "espeakng-loader" in error and "pip install .[demo]" in error and "\n" not in error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("earlier", [False, True])
def test_an_interrupted_run_leaves_what_was_there(script, tmp_path, monkeypatch, earlier):
    rendered = []

    def render(clip, engine, rng):
        if len(rendered) == limit:
            raise KeyboardInterrupt
        rendered.append(clip)
        return 0.1 * rng.normal(size=16_000)

    monkeypatch.setattr(script, "Espeak", lambda: None)
    monkeypatch.setattr(script, "render_clip", render)
    folder = tmp_path / "corpus"
    if earlier:
        limit = None
        script.synthesize_corpus(folder, clips_per_cell=1, languages=["en"])
    before = contents(tmp_path)
    limit = len(rendered) + 6  # some way into the second split
    with pytest.raises(KeyboardInterrupt):
        script.synthesize_corpus(folder, seed=1, clips_per_cell=1, languages=["en"])
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == (["corpus"] if earlier else [])


def test_default_plan_has_the_promised_size_and_balance(script):
    plan = script.plan_corpus(tuple(script.SENTENCES), 20, seed=0)
    assert len(script.SENTENCES) >= 8
    assert {split: len(clips) for split, clips in plan.items()} == dict(zip(SPLITS, (800, 160, 240, 96), strict=True))
    for split in SPLITS[:3]:
        by_label = Counter((clip.speaker, clip.label) for clip in plan[split])
        assert len(set(by_label.values())) == 1  # every speaker acts every emotion equally often
        labels = [clip.label for clip in plan[split]]
        changes = sum(a != b for a, b in pairwise(labels))
        assert changes > len(labels) / 2  # shuffled: 3/4 expected, a sorted list has 3 changes


@pytest.mark.parametrize("clips_per_cell", [1, 3, 7])
def test_voices_do_not_tell_the_emotion_in_plans_of_any_size(script, clips_per_cell):
    plan = script.plan_corpus(["de", "fr", "ru"], clips_per_cell, seed=3)
    for split in SPLITS[:3]:
        used = {label: Counter(c.speaker for c in plan[split] if c.label == label) for label in LABELS}
        assert all(used[label] == used["neutral"] for label in LABELS)


def test_plan_depends_on_the_seed(script):
    assert script.plan_corpus(["en"], 4, seed=0) == script.plan_corpus(["en"], 4, seed=0)
    assert script.plan_corpus(["en"], 4, seed=0) != script.plan_corpus(["en"], 4, seed=1)


def test_words_of_test_sentences_are_heard_in_train_but_not_their_combination(script):
    for language in script.SENTENCES:
        for emotion in LABELS:
            parts = {split: script.sentences_of(language, emotion, split) for split in SPLITS[:3]}
            assert len({text for texts in parts.values() for text in texts}) == sum(map(len, parts.values())) == 30
            words = {
                split: {word.strip("!.,¡।").lower() for text in parts[split] for word in text.split()}
                for split in parts
            }
            assert words["test"] <= words["train"] and words["validation"] <= words["train"]


@pytest.mark.parametrize("language, alphabet", [("ru", "CYRILLIC"), ("hi", "DEVANAGARI"), ("en", "LATIN")])
def test_sentences_are_in_native_script(script, language, alphabet):
    texts = [text for emotion in (*LABELS, "fear") for text in script.sentences_of(language, emotion, "ood")]
    letters = {letter for text in texts for letter in text if letter.isalpha()}
    assert all(unicodedata.name(letter).startswith(alphabet) for letter in letters)
    assert all(unicodedata.is_normalized("NFC", text) for text in texts)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["en", "tlh"], 2, 0), "tlh"),
        (([], 2, 0), "languages"),
        ((["en", "en"], 2, 0), "distinct"),
        ((["en"], 0, 0), "clips_per_cell.*0"),
        ((["en"], 2, -1), "seed.*-1"),
    ],
)
def test_bad_arguments_are_named(script, arguments, message):
    with pytest.raises(ValueError, match=message):
        script.plan_corpus(*arguments)


def slope_in_decibels_per_octave(audio, low=600.0, high=3000.0):
    frequency, power = welch(audio, 16_000, nperseg=1024)
    band = (frequency > low) & (frequency < high)
    return np.polyfit(np.log2(frequency[band]), 10 * np.log10(power[band]), 1)[0]


def test_spectral_tilt_and_pink_noise_have_their_slopes(script):
    noise = np.random.default_rng(0).normal(size=160_000)
    assert slope_in_decibels_per_octave(script._colour(noise, -4.0)) == pytest.approx(-4.0, abs=0.4)
    assert script._colour(noise, 3.0).std() == pytest.approx(noise.std(), rel=1e-3)
    pink = script._pink(160_000, np.random.default_rng(1))
    assert slope_in_decibels_per_octave(pink, 50.0, 7000.0) == pytest.approx(-10 * np.log10(2), abs=0.3)


def test_fear_trembles_in_pitch_and_loudness(script):
    time_axis = np.arange(32_000) / 16_000
    audio = script._tremble(np.sin(2 * np.pi * 200 * time_axis), np.random.default_rng(0))
    analytic = hilbert(audio)[1600:-1600]
    pitch = np.convolve(np.diff(np.unwrap(np.angle(analytic))) * 16_000 / (2 * np.pi), np.ones(160) / 160, "valid")
    assert 0.03 < pitch.std() * np.sqrt(2) / 200 < 0.05
    for track in (pitch, np.abs(analytic)):
        spectrum = np.abs(np.fft.rfft((track - track.mean()) * np.hanning(len(track))))
        assert 5.5 < spectrum.argmax() * 16_000 / len(track) < 9.5


def test_fade_and_emphasis_shape_the_loudness(script):
    plain = script.PROSODY["neutral"]._replace(tilt=0.0, fade=0.0, emphasis=0.0)
    noise = np.random.default_rng(0).normal(size=32_000)
    np.testing.assert_allclose(script._shape(noise, plain), noise, atol=1e-9)
    faded = script._shape(noise, plain._replace(fade=-6.0))
    drop = 20 * np.log10(faded[-3200:].std() / faded[:3200].std())
    unfaded = 20 * np.log10(noise[-3200:].std() / noise[:3200].std())
    assert drop - unfaded == pytest.approx(-5.4, abs=0.2)  # -6 dB from end to end, 0.9 of it between these two windows
    loud_then_soft = noise * np.repeat([1.0, 0.5], 16_000)
    punched = script._shape(loud_then_soft, plain._replace(emphasis=1.0))
    assert punched[:14_000].std() / punched[18_000:].std() == pytest.approx(4.0, rel=0.1)
