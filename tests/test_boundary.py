# SPDX-License-Identifier: Apache-2.0
"""Tests of `mmser.boundary`: which files the data of a stranger may name."""

import csv
import os
import shutil
from pathlib import Path

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import tiny_corpus
from test_loading import clips, write_table, write_wav

import predict_hf
import train_hf
from mmser.boundary import Boundary, Reach, is_elsewhere, of_folder, of_hub
from mmser.corpus_conversion import CORPORA, Conversion, Options
from mmser.examples import EmotionDataset
from mmser.loading import load_emotion_dataset, load_emotion_split
from mmser.prediction_arguments import default_checkpoint
from mmser.prediction_inputs import find_inputs

BOX = str(default_checkpoint())
SPLITS = ("train", "validation", "test")
OUTSIDE = r"row 2: .* is not in the folder of the data, .*--allow_outside_files"


@pytest.fixture
def folder(tmp_path):
    for split in SPLITS:
        rows = clips(tmp_path / "data" / split, 5, speaker=split + "{}")  # two of the first class
        write_table(tmp_path / "data" / split / "metadata.csv", rows)
    return tmp_path / "data"


@pytest.fixture
def secret(tmp_path):
    """A recording that the data have no business with."""
    write_wav(tmp_path / "private" / "voice.wav", 0.3, 500.0)
    return tmp_path / "private" / "voice.wav"


def name_in_table(folder, name, split="train"):
    """Let the first row of a split name another file."""
    table = folder / split / "metadata.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("0.wav", str(name), 1), encoding="utf-8")


@pytest.mark.parametrize(
    "way", ["absolute", "upwards", "windows", "link to a file", "link to a folder", "its own link"]
)
def test_a_folder_does_not_lead_out_of_itself(folder, secret, way):
    name = {"absolute": secret, "upwards": "../../private/voice.wav", "windows": r"..\..\Private\VOICE.wav"}.get(way)
    if way == "link to a file":
        (folder / "train" / (name := "link.wav")).symlink_to(secret)
    if way == "link to a folder":
        (folder / "train" / "deep").symlink_to("../../private")
        name = "deep/voice.wav"
    if way == "its own link":  # the table names its own file, which is a link
        (folder / "train" / "0.wav").unlink()
        (folder / "train" / (name := "0.wav")).symlink_to(secret)
    name_in_table(folder, name)
    with pytest.raises(ValueError, match=OUTSIDE):
        load_emotion_dataset(folder)
    data, _ = load_emotion_dataset(folder, on_bad_example="skip")
    assert len(data["train"]) == 4
    trusted = load_emotion_dataset(folder, allow_outside_files=True)[0]["train"]
    assert EmotionDataset(trusted)[0]["length"] == 0.3 * 16_000


def test_what_lies_in_the_folder_is_read_however_it_is_named(folder):
    for name in ("../test/0.wav", folder / "test" / "0.wav"):
        copy = folder.with_name("copy")
        shutil.copytree(folder, copy)
        name_in_table(copy, str(name).replace(str(folder), str(copy)))
        (copy / "train" / "1.wav").unlink()
        (copy / "train" / "1.wav").symlink_to("2.wav")
        assert len(load_emotion_dataset(copy, allow_speaker_overlap=True)[0]["train"]) == 5
        shutil.rmtree(copy)


def test_the_folder_may_be_a_link_itself_and_a_snapshot_of_the_hub_holds_links(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert len(load_emotion_dataset(tmp_path / "link")[0]["train"]) == 5
    blobs, snapshot = tmp_path / "datasets--a--b" / "blobs", tmp_path / "datasets--a--b" / "snapshots" / "123"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        shutil.copy(path, blobs / str(number))
        (place := snapshot / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(blobs / str(number), place.parent))
    assert len(load_emotion_dataset(snapshot)[0]["train"]) == 5


def test_tables_and_folders_of_classes_are_no_links_out_either(folder, secret, tmp_path):
    (folder / "train" / "metadata.csv").rename(tmp_path / "elsewhere.csv")
    (folder / "train" / "metadata.csv").symlink_to(tmp_path / "elsewhere.csv")
    with pytest.raises(ValueError, match=r"the table .* is not in the folder of the data"):
        load_emotion_dataset(folder)
    classes = tmp_path / "classes"
    for number, name in enumerate(("happy", "sad", "happy", "sad")):
        write_wav(classes / name / f"{number}.wav", 0.1 + 0.01 * number)
    (classes / "sad" / "5.wav").symlink_to(secret)
    with pytest.raises(ValueError, match=r"sad/5\.wav, which is .*voice\.wav, is not in the folder of the data"):
        load_emotion_dataset(classes, allow_speaker_overlap=True)


def test_a_table_that_the_user_names_names_any_file(folder, secret):
    name_in_table(folder, secret)
    table = folder / "train" / "metadata.csv"
    for place in ({"manifest": table}, {"data_dir": table}):
        data, _ = load_emotion_dataset(**place, allow_speaker_overlap=True)
        assert sum(map(len, data.values())) == 5
    assert len(load_emotion_split(table)) == 5
    with pytest.raises(ValueError, match=OUTSIDE):
        load_emotion_split(folder / "train")
    assert len(load_emotion_split(folder / "train", allow_outside_files=True)) == 5


@pytest.mark.parametrize("named_by", ["folder", "table"])
def test_addresses_are_not_fetched_unless_asked(folder, named_by, monkeypatch):
    asked = []
    monkeypatch.setattr(fsspec, "open", lambda *args, **_: asked.append(args))
    for name in ("https://example.invalid/a.wav", "file:///etc/passwd", "zip://a.wav::https://example.invalid/a.zip"):
        copy = folder.with_name("copy")
        shutil.copytree(folder, copy)
        name_in_table(copy, name)
        place = {"data_dir": copy} if named_by == "folder" else {"manifest": copy / "train" / "metadata.csv"}
        with pytest.raises(ValueError, match=r"row 2: .* is an address, and is not fetched: .* --allow_urls"):
            load_emotion_dataset(**place, allow_speaker_overlap=True)
        if not name.startswith("file"):
            load_emotion_dataset(**place, allow_speaker_overlap=True, allow_urls=True)
        shutil.rmtree(copy)
    assert asked == []  # loading alone fetches nothing


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_what_is_no_file_is_never_read(folder, kind):
    name = "/dev/zero" if kind == "device" else "special.wav"
    if kind == "pipe":
        os.mkfifo(folder / "train" / name)
    if kind == "folder":
        (folder / "train" / name).mkdir()
    name_in_table(folder, name)
    with pytest.raises(ValueError, match="is no file, but a folder, a device or a pipe"):
        load_emotion_dataset(folder, allow_outside_files=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_of_the_hub_names_its_own_files_alone(tmp_path, secret, streaming, monkeypatch):
    """Rows without bytes have a path, which may be any: of this machine, or an address."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"audio": datasets.Audio(), "label": datasets.ClassLabel(names=["happy", "sad"])})
    own = tmp_path / "hub" / "own.wav"
    write_wav(own, 0.2)

    def load(path, **options):
        rows = [{"bytes": secret.read_bytes(), "path": "voice.wav"}, {"bytes": None, "path": str(path)}]
        table = pyarrow.table({"audio": rows, "label": [0, 1]}, schema=features.arrow_schema)
        pyarrow.parquet.write_table(table, tmp_path / "hub" / "train-00000-of-00001.parquet")
        given = {"dataset_name": str(tmp_path / "hub"), "streaming": streaming, "allow_speaker_overlap": True}
        data, _ = load_emotion_dataset(**given, validation_fraction=0, test_fraction=0, **options)
        return list(data["train"])

    assert len(load(own)) == 2
    for path in (secret, "https://example.invalid/a.wav"):
        with pytest.raises(ValueError, match=r"train row 1: .*(allow_urls|allow_outside_files)"):
            load(path)
        skipped = load(path, on_bad_example="skip")
        assert [row["labels"] for row in skipped] == ([0, None] if streaming else [0])
        assert len(load(path, allow_urls=True, allow_outside_files=True)) == 2


def test_addresses_of_the_data_set_itself_and_archives_in_its_cache_are_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    own = of_hub("user/data", Reach())
    fine = [
        "hf://datasets/user/data@abc/a.wav",
        f"zip://a.wav::{tmp_path}/b.zip",
        "zip://a.wav::hf://datasets/user/data/b",
    ]
    assert [own.refusal(path) for path in fine] == [""] * 3
    bad = ["hf://datasets/user/data2/a.wav", "zip://a.wav::/etc/b.zip", f"reference://x::{tmp_path}/b.json"]
    assert all(own.refusal(path) for path in bad)


@pytest.mark.parametrize("reach", [Reach(allow_urls=True), Reach(allow_urls=True, allow_outside_files=True)])
@pytest.mark.parametrize("folders", [[Path("data")], None])
def test_addresses_that_are_allowed_do_not_lead_back_to_this_machine(reach, folders):
    """They are no way around --allow_outside_files, and a `file://` may be a device."""
    there = ["https://a.b/c.wav", "S3://bucket/a.wav", "hf://datasets/a/b/c.wav", "zip://a.wav::https://a.b/c.zip"]
    assert [Boundary(reach, folders).refusal(path) for path in there] == [""] * len(there)
    here = ["file:///etc/passwd", "FILE:///etc/passwd", "local:///etc/passwd", "dir://passwd::/etc", "memory://a.wav"]
    here += ["zip://a.wav::file:///b.zip", "simplecache::file:///etc/passwd", "reference://a::https://a.b/c.json"]
    here += ["https://a.b/c.wav::/etc/passwd", "generic://file:///etc/passwd", "filecache::/etc/passwd::dir://x"]
    for path in here:
        assert "is an address of a kind that data may not name" in Boundary(reach, folders).refusal(path)


@pytest.fixture
def calls(tmp_path, secret):
    """A folder of recordings, with links: out of it, within it, and to a folder elsewhere."""
    folder = tmp_path / "calls"
    write_wav(folder / "deep" / "a.wav", 0.2)
    (folder / "b.wav").symlink_to("deep/a.wav")
    (folder / "c.wav").symlink_to(secret)
    (folder / "deeper").symlink_to(secret.parent)
    return folder


def test_predict_follows_no_link_out_of_a_folder(calls, monkeypatch):
    said = "this is a link out of calls, and is not followed: name the file itself, or give --allow_outside_files"
    monkeypatch.chdir(calls.parent)
    for words in (["calls"], ["calls/**/*.wav"], ["calls/*"]):
        found = {one.source: one.error for one in find_inputs(words)}
        assert found.pop("calls/c.wav") == said
        if words != ["calls"]:  # patterns find what is behind a link to a folder
            assert found.pop("calls/deeper/voice.wav") == said
        assert found == {"calls/b.wav": "", "calls/deep/a.wav": ""}
        assert not any(one.error for one in find_inputs(words, allow_outside_files=True))
    for words in (["calls/c.wav"], ["calls", "calls/c.wav"], ["calls/c.wav", "calls"]):  # one that is named itself
        assert not any(one.error for one in find_inputs(words))
    (calls / "b.wav").unlink()
    (calls / "deep" / "a.wav").unlink()
    with pytest.raises(ValueError, match=rf"^calls/c\.wav: {said}\.$"):
        find_inputs(["calls"])


def test_predict_may_be_given_a_folder_that_is_a_link_or_a_snapshot_of_the_hub(calls, tmp_path):
    (calls / "c.wav").unlink()
    (tmp_path / "link").symlink_to(calls)
    assert [one.error for one in find_inputs([str(tmp_path / "link")])] == ["", ""]
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "123"
    write_wav(tmp_path / "datasets--a--b" / "blobs" / "0.wav", 0.2)
    snapshot.mkdir(parents=True)
    (snapshot / "a.wav").symlink_to("../../blobs/0.wav")
    assert [one.error for one in find_inputs([str(snapshot)])] == [""]


@pytest.mark.parametrize("way", ["--output", "--output_dir"])
def test_the_flag_reaches_predict(calls, tmp_path, way, capsys):
    """The other recordings get their answers, and the link its sentence; with the flag it gets an answer too."""
    for flags, errors in (([], 1), (["--allow_outside_files"], 0)):
        place = tmp_path / f"answers{errors}{'.csv' if way == '--output' else ''}"
        words = [str(calls), "--checkpoint", BOX, way, str(place), "--format", "csv", *flags]
        assert predict_hf.main(words) == bool(errors)
        written = (place if way == "--output" else place / "answers.csv").read_text(encoding="utf-8")
        rows = list(csv.DictReader(written.splitlines()))
        assert [bool(row["error"]) for row in rows] == [False, bool(errors), False]
        assert all(("link out of" in row["error"]) == bool(row["error"]) == (not row["score"]) for row in rows)


def test_a_share_of_another_machine_is_an_address(monkeypatch):
    """On Windows a look at such a path sends the user's password, hashed, to that machine."""
    import ntpath

    monkeypatch.setattr("mmser.boundary.os.path.splitdrive", ntpath.splitdrive)
    assert is_elsewhere(r"\\evil.example\share\a.wav") and not is_elsewhere(r"C:\data\a.wav")
    assert "--allow_urls" in Boundary(Reach(), None).refusal(r"\\evil.example\share\a.wav")


def test_the_flags_reach_training(corpus, tokenizer, tmp_path, secret, quiet):
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    first = next(iter(sorted((copy / "train").glob("*.wav"))))
    os.replace(first, tmp_path / "moved.wav")
    first.symlink_to(tmp_path / "moved.wav")
    flags = tiny_corpus.tiny_flags(copy, tmp_path / "run", tokenizer, max_steps=1, eval_strategy="no")
    with pytest.raises(ValueError, match="--allow_outside_files"):
        train_hf.main(flags)
    train_hf.main([*flags, "--allow_outside_files"])


def test_a_converted_corpus_says_that_its_files_lie_elsewhere(tmp_path):
    given = {"corpus": CORPORA["ravdess"], "folder": tmp_path, "clips": [], "left_out": []}
    assert "--allow_outside_files" in Conversion(options=Options(), **given).training_command
    assert "--allow_outside_files" not in Conversion(options=Options(copy=True), **given).training_command
    assert of_folder(tmp_path, Reach()).refusal(str(tmp_path / "a.wav")) == ""
