# SPDX-License-Identifier: Apache-2.0
"""Tests of `demo/synthesize_corpus.py`: the corpus, its plan, and the folders that it replaces or refuses.

The command line writes a corpus of two languages in fresh processes (`corpora`, skipped without the engine).
Everything else runs in this process, without the engine.
"""

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tiny_corpus import tiny_tokenizer

from mmser.arguments import TRAINING_ARGUMENTS, parse_arguments
from mmser.model_loading import load_model, load_processor

SCRIPT = Path(__file__).resolve().parents[1] / "demo" / "synthesize_corpus.py"
LABELS = ["neutral", "happy", "sad", "angry"]
SPLITS = ["train", "validation", "test", "ood"]
LANGUAGES = ["en", "hi"]


def run_script(output, *arguments):
    command = [sys.executable, SCRIPT, output, "--clips_per_cell", 1, "--languages", *LANGUAGES, *arguments]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8", env=environment, timeout=120)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """The same tiny corpus twice, each from a fresh process: the second starts in another second of the clock."""
    pytest.importorskip("espeakng_loader", reason="espeakng-loader (pip install .[demo]) is not installed")
    folders = [tmp_path_factory.mktemp("first") / "corpus", tmp_path_factory.mktemp("second") / "corpus"]
    for folder in folders:
        result = run_script(folder)
        assert result.returncode == 0, result.stderr
        assert "say nothing about human emotion" in result.stdout
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


def test_every_row_has_its_columns_and_an_audible_file(corpora):
    expected = {"file_name", "label", "transcription", "speaker", "language", "corpus", "license", "emotion"}
    for split in SPLITS:
        rows = read_rows(corpora[0], split)
        assert set(rows[0]) == expected
        assert {path.name for path in (corpora[0] / split).iterdir()} == {
            "metadata.csv",
            *(row["file_name"] for row in rows),
        }
        for row in rows:
            assert row["speaker"] and row["language"] and row["corpus"] and row["license"]
            info = soundfile.info(corpora[0] / split / row["file_name"])
            assert (info.samplerate, info.channels, info.format, info.subtype) == (16_000, 1, "FLAC", "PCM_16")
            assert 0.8 <= info.duration <= 2.5
            audio, _ = soundfile.read(corpora[0] / split / row["file_name"])
            assert audio.std() > 0.005 and np.abs(audio).max() < 0.99
    assert "say nothing about how well" in (corpora[0] / "README.md").read_text(encoding="utf-8")


def test_labels_are_balanced_and_ood_has_none(corpora):
    for split in SPLITS[:3]:
        cells = Counter((row["language"], row["label"]) for row in read_rows(corpora[0], split))
        assert cells == {(language, label): 1 for language in LANGUAGES for label in LABELS}
    rows = read_rows(corpora[0], "ood")
    assert {row["label"] for row in rows} == {"-1"}
    assert sorted(row["language"] for row in rows if row["emotion"] == "fear") == LANGUAGES
    sounds = {"white_noise", "pink_noise", "babble", "chords", "melody", "tone", "sweep"}
    assert {row["emotion"] for row in rows} == {"fear", *sounds}
    assert all(bool(row["transcription"]) == (row["emotion"] == "fear") for row in rows)


def test_an_unchanged_corpus_is_replaced_and_the_summary_is_right(corpora, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(corpora[0], folder)
    result = run_script(folder, "--seed", 1)
    assert result.returncode == 0, result.stderr
    assert contents(folder) != contents(corpora[0])
    assert os.listdir(tmp_path) == ["corpus"]
    seconds = sum(soundfile.info(path).duration for path in (folder / "train").glob("*.flac"))
    line = next(line for line in result.stdout.splitlines() if "train" in line)
    assert line.strip("| ").replace(" ", "").split("|") == ["train", "2", "2", "2", "2", "0", "8", f"{seconds:.0f}"]


@pytest.mark.parametrize("change", ["a file is added", "a folder is added", "a label is edited"])
def test_a_changed_corpus_is_refused(corpora, script, tmp_path, change):
    folder = tmp_path / "corpus"
    shutil.copytree(corpora[0], folder)
    script.check_output_folder(folder)  # not changed yet
    if change == "a file is added":
        (folder / "train" / "notes.txt").write_text("mine")
    elif change == "a folder is added":
        (folder / "mine").mkdir()
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
def test_an_interrupted_run_leaves_the_folder_as_it_was(script, tmp_path, monkeypatch, earlier):
    rendered, limit = [], None

    def render(clip, engine, rng):
        if len(rendered) == limit:
            raise KeyboardInterrupt
        rendered.append(clip)
        return 0.1 * rng.normal(size=16_000)

    monkeypatch.setattr(script, "Espeak", lambda: None)
    monkeypatch.setattr(script, "render_clip", render)
    folder = tmp_path / "corpus"
    if earlier:
        script.synthesize_corpus(folder, clips_per_cell=1, languages=["en"])
    before = contents(tmp_path)
    limit = len(rendered) + 6  # in the second split
    with pytest.raises(KeyboardInterrupt):
        script.synthesize_corpus(folder, seed=1, clips_per_cell=1, languages=["en"])
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == (["corpus"] if earlier else [])


@pytest.mark.parametrize(("languages", "clips_per_cell"), [(None, 40), (["de", "fr", "ru"], 3), (["de", "fr"], 7)])
def test_speakers_and_sentences_are_in_one_split_and_voices_do_not_tell_the_emotion(script, languages, clips_per_cell):
    plan = script.plan_corpus(languages or tuple(script.SENTENCES), clips_per_cell, seed=3)
    speakers, sentences = {}, {}
    for split in SPLITS[:3]:
        for clip in plan[split]:
            assert speakers.setdefault(clip.speaker, split) == split
            assert sentences.setdefault((clip.language, clip.text), split) == split
        used = {label: Counter(clip.speaker for clip in plan[split] if clip.label == label) for label in LABELS}
        assert all(used[label] == used["neutral"] for label in LABELS)
        labels = [clip.label for clip in plan[split]]
        assert sum(a != b for a, b in pairwise(labels)) > len(labels) / 2  # shuffled
    assert {speaker for speaker, split in speakers.items() if split == "train"}.isdisjoint(
        clip.speaker for clip in plan["ood"]
    )
    if languages is None:
        assert len(script.SENTENCES) == 10
        assert [len(plan[split]) for split in SPLITS] == [1600, 320, 480, 192]
        # 19 speakers are the fewest that thresholds of 95 % can be promised by, and a voice is not ten of them
        assert len({clip.speaker for clip in plan["validation"]}) >= 2 * 19
        assert len({clip.voice for clip in plan["validation"]}) >= 8
    assert plan == script.plan_corpus(languages or tuple(script.SENTENCES), clips_per_cell, seed=3)
    assert plan != script.plan_corpus(languages or tuple(script.SENTENCES), clips_per_cell, seed=4)


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


@pytest.mark.parametrize(
    ("languages", "clips_per_cell", "seed", "message"),
    [
        (["en", "tlh"], 2, 0, "tlh"),
        ([], 2, 0, "languages"),
        (["en", "en"], 2, 0, "distinct"),
        (["en"], 0, 0, "clips_per_cell.* 0 "),
        (["en"], 2, -1, "seed.*-1"),
    ],
)
def test_bad_arguments_are_named(script, languages, clips_per_cell, seed, message):
    with pytest.raises(ValueError, match=message):
        script.plan_corpus(languages, clips_per_cell, seed)


def test_an_unknown_clip_of_the_demo_is_called_unknown_first():
    specification = importlib.util.spec_from_file_location(
        "classify", Path(__file__).parents[1] / "demo" / "classify.py"
    )
    classify = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(classify)
    best = {"label": "happy", "score": 0.998, "uncertainty": 0.0123, "is_unknown": True}
    assert classify.describe(best) == "unknown (nearest of the classes: happy 0.998)"
    assert classify.describe({**best, "is_unknown": False}) == "happy 0.998, uncertainty 0.01"
    assert classify.describe({**best, "is_unknown": None}) == "happy 0.998, uncertainty 0.01"  # OpenMax is not fitted


@pytest.mark.parametrize(
    ("recipe", "audio_input", "shape"),
    [("demo", "input_features", (1, 40, 100)), ("demo_wav2vec2", "input_values", (1, 32_000))],
)
def test_the_recipes_of_the_demo_differ_in_the_audio_encoder(recipe, audio_input, shape, tmp_path, monkeypatch):
    monkeypatch.chdir(SCRIPT.parents[1])  # as `make` does: the recipe names a folder of the repository
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    words = [f"recipes/{recipe}.json", "--tokenizer_name", str(tmp_path / "tokenizer")]
    model_arguments, data_arguments, training_arguments = parse_arguments(TRAINING_ARGUMENTS, words)
    processor = load_processor(model_arguments)
    model = load_model(model_arguments, LABELS, processor).eval()
    inputs = processor(audio=[np.random.default_rng(0).normal(size=32_000)], sampling_rate=16_000, text=["I am happy"])
    assert inputs[audio_input].shape == shape and processor.audio_input_name == audio_input
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    assert model.config.classifier_num_layers == 35 and sum(p.numel() for p in model.parameters()) < 1_000_000
    assert (data_arguments.data_dir, training_arguments.output_dir) == ("demo_output/corpus", "demo_output/model")
