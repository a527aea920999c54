# SPDX-License-Identifier: Apache-2.0
"""Tests of `mmser predict`: its numbers are those of the pipeline, other readers understand its files, and every way
to end has its exit code."""

import contextlib
import csv
import json
import os
import re
import subprocess
import sys
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas  # type: ignore[import-untyped]
import pyarrow.parquet
import pytest
import soundfile
import torch
from tiny import fit_openmax_by_chance, randomize
from tiny_corpus import NAMES, RATE, tiny_model, tiny_processor
from transformers import pipeline

import predict_hf
from mmser import cli, prediction_arguments, prediction_run, prediction_screen
from mmser.arguments import parse_arguments
from mmser.prediction_arguments import PREDICTION_ARGUMENTS
from mmser.prediction_inputs import find_inputs
from mmser.prediction_run import cut_out
from mmser.timed_files import Span, clock, format_rttm, format_srt, read_rttm, read_srt
from modeling_mmser import register_auto_classes
from pipeline_mmser import mean_over_time
from processing_mmser import MMSERPipeline

ROOT = Path(__file__).parents[1]
DRAWS = True  # see the fixture `pictures`
LONG = ("--segments_above", "1.5", "--chunk_length_s", "1.2", "--stride_length_s", "0.2")
CHUNKS = {"chunk_length_s": 1.2, "stride_length_s": 0.2, "return_uncertainty": True}
WORDS = [("what a joy", 0.1, 0.9), ("stop it now", 1.2, 1.9)]
TURNS = [(0.0, 0.7, "anna"), (0.5, 1.5, "ben"), (1.6, 1.605, "anna"), (2.0, 2.4, "anna"), (30.0, 31.0, "ben")]


def tone(seconds, pitch):
    return (0.4 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, its pipeline, a folder of clips of which one is corrupt, and a long recording."""
    folder = tmp_path_factory.mktemp("predict")
    torch.manual_seed(3)
    model = randomize(tiny_model(dropout=False)).eval()
    fit_openmax_by_chance(model)
    for part in (model, tiny_processor()):
        part.save_pretrained(folder / "model")
    (folder / "clips" / "düşünce").mkdir(parents=True)
    for number, name in enumerate(["a.wav", "b.flac", "düşünce/情感.wav"]):
        soundfile.write(folder / "clips" / name, tone(0.2 + 0.1 * number, 200 * 2**number), RATE)
    (folder / "clips" / "broken.wav").write_bytes(b"RIFF, but nothing of the kind")
    (folder / "clips" / ".hidden.wav").write_bytes(b"no")
    (folder / "clips" / "notes.txt").write_text("no audio")
    soundfile.write(folder / "long.wav", np.concatenate([tone(1, 200), tone(1, 900), tone(0.7, 400)]), RATE)
    lines = [f"{n}\n{srt(start)} --> {srt(end)}\n{text}\n" for n, (text, start, end) in enumerate(WORDS, 1)]
    (folder / "long.srt").write_text("\n".join(lines), encoding="utf-8")
    lines = [f"SPEAKER long 1 {start} {end - start:.3f} <NA> <NA> {name} <NA> <NA>" for start, end, name in TURNS]
    (folder / "long.rttm").write_text("\n".join([";; turns", "SPKR-INFO long 1", *lines]), encoding="utf-8")
    register_auto_classes()
    classifier = pipeline("audio-classification", model=str(folder / "model"))
    return SimpleNamespace(folder=folder, clips=folder / "clips", long=folder / "long.wav", classifier=classifier)


def srt(seconds):
    return f"00:00:{seconds:06.3f}".replace(".", ",")


@pytest.fixture
def predict(place, monkeypatch, capsysbinary):
    """Run the command with the checkpoint: its exit code, what it printed, and its errors."""
    monkeypatch.chdir(place.folder)
    monkeypatch.setattr(prediction_run, "load_classifier", lambda *_: place.classifier)

    def run(*words):
        code = predict_hf.main([*map(str, words), "--checkpoint", "model"])
        printed = capsysbinary.readouterr()
        return SimpleNamespace(code=code, out=printed.out.decode(), err=printed.err.decode())

    return run


def table(scores):
    """The columns of a row that say what the pipeline said."""
    best = scores[0]
    about = {name: best[name] for name in ("label", "score", "uncertainty", "unknown_probability", "is_unknown")}
    return {**about, **{f"score_{entry['label']}": entry["score"] for entry in scores}}


def assert_row(row, scores):
    for name, value in table(scores).items():
        assert row[name] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value), name
    assert row["answer"] == ("unknown" if scores[0]["is_unknown"] else scores[0]["label"])


# --- clips -----------------------------------------------------------------------------------------------------------


def test_one_clip_is_as_the_pipeline_says(predict, place):
    done = predict("clips/a.wav", "--text", "what a joy")
    scores = place.classifier({"path": str(place.clips / "a.wav"), "text": "what a joy"}, return_uncertainty=True)
    assert done.code == 0 and done.err == ""
    for entry in scores:
        assert re.search(rf"^  {entry['label']} +{entry['score']:.3f}$", done.out, re.MULTILINE)
    assert f"uncertainty  {scores[0]['uncertainty']:.3f}" in done.out
    nearest = f"none of these (nearest: {scores[0]['label']})"
    assert done.out.startswith(f"clips/a.wav: {nearest if scores[0]['is_unknown'] else scores[0]['label']}\n")
    assert not re.search(r"[█▏▎▍▌▋▊▉\x1b]", done.out)  # it is not a terminal


def test_a_model_that_rejects_nothing_says_nothing_of_the_unknown(predict, place, monkeypatch):
    monkeypatch.setattr(place.classifier.model.config, "openmax_threshold", None)
    assert place.classifier(str(place.clips / "a.wav"), return_uncertainty=True)[0]["unknown_probability"] is not None
    done = predict("clips/a.wav")
    assert "This model does not tell what is none of its classes." in done.out and "unknown" not in done.out
    (row,) = json.loads(predict("clips/a.wav", "--format", "json").out)
    assert (row["unknown_probability"], row["is_unknown"]) == (None, False)
    (recording,) = json.loads(predict("long.wav", *LONG, "--format", "json").out)
    found = [row["unknown_probability"] for row in recording["segments"]]
    assert len(found) > 1 and set(found) == {None}


def test_words_alone(predict, place):
    scores = place.classifier({"text": "stop it now"}, return_uncertainty=True)
    (row,) = json.loads(predict("--text", "stop it now", "--format", "json").out)
    assert (row["file"], row["text"], row["seconds"]) == ("", "stop it now", None)
    assert row["scores"] == pytest.approx({entry["label"]: entry["score"] for entry in scores}, abs=1e-5)
    assert predict("--text", "stop it now").out.startswith('"stop it now": ')


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_folder_is_a_table_that_other_readers_understand(predict, place, ending):
    output = place.folder / "new folder" / f"out.{ending}"
    done = predict("clips", "--output", output, "--batch_size", 2, "--overwrite")
    assert done.code == 1
    read = {
        "csv": pandas.read_csv,
        "jsonl": lambda path: pandas.read_json(path, lines=True),
        "parquet": lambda path: pyarrow.parquet.read_table(path).to_pandas(),
    }
    found = read[ending](output)
    rows = {Path(row["file"]).as_posix(): row for row in found.to_dict("records")}
    assert list(rows) == ["clips/a.wav", "clips/b.flac", "clips/broken.wav", "clips/düşünce/情感.wav"]
    assert list(found.columns) == [
        *("file", "seconds", "text", "answer", "label", "score", "uncertainty", "unknown_probability", "is_unknown"),
        *(f"score_{label}" for label in NAMES),
        "error",
    ]
    bad = rows.pop("clips/broken.wav")
    assert "cannot be read as audio" in bad["error"] and pandas.isna(bad["score"])
    for number, (name, row) in enumerate(rows.items()):
        assert row["seconds"] == pytest.approx(0.2 + 0.1 * number, abs=1e-3)
        assert_row(row, place.classifier(str(place.folder / name), return_uncertainty=True))
    if ending == "parquet":
        kinds = {field.name: str(field.type) for field in pyarrow.parquet.read_schema(output)}
        assert (kinds["is_unknown"], kinds["score"], kinds["error"]) == ("bool", "double", "string")
    assert "1 input could not be classified:\n  clips" in done.err.replace("\\", "/")
    assert f"Written: {output}" in done.out and "3 inputs classified" in done.out


def test_patterns_folders_and_files_may_be_mixed_and_each_counts_once(place, monkeypatch):
    monkeypatch.chdir(place.clips)
    names = [Path(one.source).as_posix() for one in find_inputs(["a.wav", "./*.wav", "**/*.flac", "düşünce", "a.wav"])]
    assert names == ["a.wav", "broken.wav", "b.flac", "düşünce/情感.wav"] or names == [
        *("a.wav", "./broken.wav", "b.flac", "düşünce/情感.wav"),
    ]
    first, gone = find_inputs(["a.wav", "gone.wav"])
    assert (first.error, gone.error) == ("", "there is no such file")
    with pytest.raises(FileNotFoundError, match=r"gone\.wav: there is no such file"):
        find_inputs(["gone.wav"])
    with pytest.raises(ValueError, match=r"No audio file matches \*\.xyz"):
        find_inputs(["*.xyz"])
    (place.clips / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no audio files"):
        find_inputs(["empty"])


def test_a_clip_that_only_decoding_shows_to_be_bad_does_not_stop_its_batch(predict, place, tmp_path):
    short = tmp_path / "short.wav"  # its header is fine
    soundfile.write(short, 0.1 * np.ones(100), RATE)
    done = predict("clips/a.wav", short, "clips/b.flac", "--format", "csv")
    rows = list(csv.DictReader(done.out.splitlines()))
    assert done.code == 1 and [bool(row["error"]) for row in rows] == [False, True, False]
    assert rows[1]["error"].startswith("too short, 100 samples")
    assert predict(short).code == 1


def silences(folder):
    """Files in which nothing can be heard, each with what is said of it."""
    left, rate = tone(0.3, 300), 44100
    made = {
        "zeros.wav": (np.zeros(4000), RATE, "all samples are 0"),
        "hiss.flac": (1e-4 * np.sign(left), RATE, "its loudest sample has -80 dB of full scale"),
        "against.wav": (np.stack([left, -left], axis=1), rate, "its channels cancel each other"),
    }
    for name, (samples, own_rate, _) in made.items():
        soundfile.write(folder / name, samples, own_rate, subtype="PCM_24")
    return {folder / name: f"nothing can be heard in it: {reason}" for name, (_, _, reason) in made.items()}


def test_a_clip_in_which_nothing_can_be_heard_is_not_classified(predict, place, tmp_path):
    said = silences(tmp_path)
    for path, reason in said.items():
        done = predict(path)
        assert done.code == 1 and not done.out and f"{path.name}: {reason}" in done.err
    done = predict("clips/a.wav", *said, "--format", "csv")
    rows = list(csv.DictReader(done.out.splitlines()))
    assert done.code == 1 and rows[0]["answer"] and not rows[0]["error"]
    assert [row["answer"] for row in rows[1:]] == [""] * 3
    assert all(row["error"].startswith(reason) for row, reason in zip(rows[1:], said.values(), strict=True))


def test_a_turn_in_which_nothing_can_be_heard_is_not_classified(predict, tmp_path):
    soundfile.write(tmp_path / "pause.wav", np.concatenate([tone(1, 200), np.zeros(RATE)]), RATE)
    turns = [Span(0, 1, "", "anna"), Span(1, 2, "", "ben")]
    lines = [f"SPEAKER pause 1 {one.start} {one.end - one.start} <NA> <NA> {one.speaker} <NA> <NA>" for one in turns]
    (tmp_path / "pause.rttm").write_text("\n".join(lines))
    done = predict(tmp_path / "pause.wav", "--speakers", tmp_path / "pause.rttm", "--format", "json")
    segments = json.loads(done.out)[0]["segments"]
    assert [one["error"] for one in segments] == ["", "nothing can be heard in it"] and done.code == 1
    assert segments[0]["answer"] and not segments[1]["answer"]


# --- some of the labels, sets of labels, other tasks -----------------------------------------------------------------


def test_some_of_the_labels_are_as_the_pipeline_says(predict, place):
    expected = place.classifier(str(place.clips / "a.wav"), allowed_labels=["sad", "happy"])
    words = ("clips/a.wav", "--allowed_labels", "sad", "happy")
    (row,) = csv.DictReader(predict(*words, "--format", "csv").out.splitlines())
    found = {name: float(value) for name, value in row.items() if name.startswith("score_")}
    assert found == {f"score_{one['label']}": pytest.approx(one["score"], abs=1e-5) for one in expected}
    assert row["uncertainty"] == ""  # that of the likeliest of all labels, which may be none of these
    shown = predict(*words).out
    assert "  happy" in shown and "  angry" not in shown and "uncertainty" not in shown
    chunks = place.classifier(str(place.long), allowed_labels=["sad", "happy"], **CHUNKS)["chunks"]
    (found,) = json.loads(predict("long.wav", *LONG, *words[1:], "--format", "json").out)
    for segment, chunk in zip(found["segments"], chunks, strict=True):
        assert segment["scores"] == {e["label"]: pytest.approx(e["score"], abs=1e-5) for e in chunk["scores"]}


@pytest.fixture
def other(place, monkeypatch):
    """A classifier with prediction sets and other tasks, in place of the plain one."""
    torch.manual_seed(4)
    tasks = {"sentiment": ["negative", "positive"], "arousal": "regression"}
    model = randomize(tiny_model(dropout=False, auxiliary_tasks=tasks)).eval()
    rng = np.random.default_rng(0)
    model.prediction_sets.fit(rng.dirichlet(np.ones(len(NAMES)), 400), rng.integers(len(NAMES), size=400))
    classifier = MMSERPipeline(model=model, processor=tiny_processor(), task="audio-classification")
    monkeypatch.setattr(place, "classifier", classifier)
    return classifier


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_sets_and_other_tasks_are_columns(predict, place, other, tmp_path, format):
    out = tmp_path / f"answers.{format}"
    assert predict("clips", "--return_set", "0.8", "--output", out).code == 1
    table = pandas.read_csv(out) if format == "csv" else pandas.read_parquet(out)
    assert len(table) == 4 and list(table.columns)[-1] == "error"
    for row in table.to_dict("records"):
        if row["file"].endswith("broken.wav"):
            assert not isinstance(row["prediction_set"], str) and not row["auxiliary_arousal"] > -np.inf
            continue
        best = other(row["file"], return_set=0.8, return_auxiliary=True)[0]
        assert row["prediction_set"] == ", ".join(best["prediction_set"])
        sentiment = best["auxiliary"]["sentiment"]
        assert row["auxiliary_sentiment"] == max(sentiment, key=sentiment.get)
        for name, probability in sentiment.items():
            assert row[f"auxiliary_sentiment_{name}"] == pytest.approx(probability, abs=1e-5)
        assert row["auxiliary_arousal"] == pytest.approx(best["auxiliary"]["arousal"], abs=1e-5)


def test_sets_and_other_tasks_in_json_and_on_the_screen(predict, place, other):
    best = other("clips/a.wav", return_set=0.8, return_auxiliary=True)[0]
    (found,) = json.loads(predict("clips/a.wav", "--return_set", "0.8", "--format", "json").out)
    assert found["prediction_set"] == best["prediction_set"] and "auxiliary_arousal" not in found
    assert found["auxiliary"]["sentiment"] == pytest.approx(best["auxiliary"]["sentiment"], abs=1e-5)
    shown = predict("clips/a.wav", "--return_set", "0.8").out
    assert re.search(rf"  may be +{', '.join(best['prediction_set'])}\n", shown)
    assert re.search(r"  sentiment +(negative|positive)  0\.\d{3}\n", shown) and "  arousal" in shown
    head = predict("clips/a.wav", "clips/b.flac", "--return_set", "0.8").out.splitlines()[0]
    assert re.sub(" +", " ", head) == "| file | answer | score | uncertainty | may be | sentiment | arousal |"
    (long,) = json.loads(predict("long.wav", *LONG, "--return_set", "0.8", "--format", "json").out)
    assert "prediction_set" not in long and "prediction_set" in long["segments"][0]  # a set is that of a clip
    assert set(long["auxiliary"]) == {"sentiment", "arousal"} == set(long["segments"][0]["auxiliary"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--allowed_labels", "sad", "glad"], "--allowed_labels: this model has no 'glad'; its labels are .*sad"),
        (["--return_set", "0.9"], "^--return_set 0.9: "),
        (["--return_set", "2"], "--return_set is a probability from 0.5 to 0.99, got 2"),
        (["--return_set", "0.9", "--allowed_labels", "sad"], "--return_set speaks of all labels"),
    ],
)
def test_labels_and_sets_that_the_model_lacks(predict, words, said):
    with pytest.raises(ValueError, match=said):
        predict("clips/a.wav", *words)


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "file_name,transcription\nclips/a.wav,what a joy\nclips/b.flac,\n",
        "\ufeffPath;Transcript\nA.WAV;what a joy\nx.wav;no\n",  # of another system, beside neither
        "sep=;\nfile_name;text\nclips\\a.wav;what a joy\n",
    ],
)
def test_transcripts_are_found_as_in_data_sets(predict, place, content):
    (place.folder / "texts.csv").write_text(content, encoding="utf-8")
    done = predict("clips/a.wav", "clips/b.flac", "--transcripts", "texts.csv", "--format", "jsonl")
    first, second = map(json.loads, done.out.splitlines())
    assert (first["text"], second["text"]) == ("what a joy", "")
    item = {"path": str(place.clips / "a.wav"), "text": "what a joy"}
    assert_row(first, place.classifier(item, return_uncertainty=True))
    assert_row(second, place.classifier(str(place.clips / "b.flac"), return_uncertainty=True))
    assert "inputs without a text in texts.csv, whose audio alone counts: 1 of 2" in done.err
    assert ("not among the inputs: 1" in done.err) == ("x.wav" in content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("file_name,words\na.wav,x\n", "no text column 'transcription'; its columns are file_name, words"),
        ("file_name,text\nc.wav,x\n", "names none of the 2 inputs: it has 'c.wav'"),
        ("file_name,text\na.wav,x\na.wav,y\n", "rows 2 and 3 say different things of "),
        ("file_name,text\na.wav,x,y\n", "texts.csv row 2 has 3 fields"),
        ("file_name,text\nsame.wav,x\n", "'same.wav' may be "),
    ],
)
def test_transcripts_that_do_not_fit_are_named(predict, place, tmp_path, content, said):
    (place.folder / "texts.csv").write_text(content, encoding="utf-8")
    inputs = ["clips/a.wav", "clips/b.flac"]
    if "same" in content:
        inputs = [tmp_path / "one" / "same.wav", tmp_path / "two" / "same.wav"]
        for path in inputs:
            path.parent.mkdir()
            soundfile.write(path, tone(0.2, 200), RATE)
    with pytest.raises(ValueError, match=re.escape(said)):
        predict(*inputs, "--transcripts", "texts.csv")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", "file_name;text\na.wav;für\n".encode("cp1252"), r"^t.csv is not UTF-8 text \(row 2 .* as UTF-8$"),
        ("t.tsv", "file_name\ttext\na.wav\tžluť\n".encode("cp1250"), "^t.tsv is not UTF-8 text"),
        ("t.csv", "file_name,text\na.wav,so\n".encode("utf-32"), "^t.csv holds zero bytes .* save it as UTF-8$"),
        ("t.csv", "file_name,text\na.wav,so\n".encode("utf-16")[:-1], "^t.csv begins like UTF-16, but is not"),
        ("t.jsonl", b'{"file_name": "a.wav", "text": "' + b"x" * 2000 + b'\0"}', "^t.jsonl holds zero bytes"),
        ("t.srt", "1\n00:00:00,100 --> 00:00:00,900\nça\n".encode("latin-1"), r"^t.srt is not UTF-8 text \(row 3"),
    ],
)
def test_texts_in_another_encoding_are_named(predict, place, name, content, said):
    (place.folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        predict("clips/a.wav", "--transcripts", name)


# --- long recordings -------------------------------------------------------------------------------------------------


def expected_segments(place):
    words = [{"text": text, "timestamp": times} for text, *times in WORDS]
    return place.classifier({"path": str(place.long), "chunks": words}, **CHUNKS)


def test_segments_are_the_chunks_of_the_pipeline(predict, place):
    expected = expected_segments(place)
    (found,) = json.loads(predict("long.wav", "--transcripts", "long.srt", "--format", "json", *LONG).out)
    assert found["scores"] == pytest.approx({e["label"]: e["score"] for e in expected["scores"]}, abs=1e-5)
    assert len(found["segments"]) == len(expected["chunks"]) > 2
    for segment, chunk in zip(found["segments"], expected["chunks"], strict=True):
        assert [segment["start"], segment["end"]] == pytest.approx(list(chunk["timestamp"]))
        assert segment["scores"] == pytest.approx({e["label"]: e["score"] for e in chunk["scores"]}, abs=1e-5)
        assert segment["uncertainty"] == pytest.approx(chunk["scores"][0]["uncertainty"], abs=1e-5)
    assert [segment["text"] for segment in found["segments"]][:2] == ["what a joy", "stop it now"]


def test_a_long_recording_is_cut_and_among_others_it_is_one_row(predict, place):
    alone = predict("long.wav", *LONG, "--format", "jsonl").out.splitlines()
    assert len(alone) > 2 and {"start", "end"} <= json.loads(alone[0]).keys()
    assert len(predict("long.wav", "--format", "jsonl").out.splitlines()) == 1  # 2.7 s are a clip by default
    rows = predict("long.wav", "clips/a.wav", *LONG, "--format", "jsonl").out.splitlines()
    first, second = map(json.loads, rows)
    assert_row(first, place.classifier(str(place.long), **CHUNKS)["scores"])
    assert_row(second, place.classifier(str(place.clips / "a.wav"), return_uncertainty=True))
    both = predict("long.wav", "clips/a.wav", *LONG, "--segments", "--format", "jsonl").out.splitlines()
    assert [Path(json.loads(line)["file"]).name for line in both] == ["long.wav"] * len(alone) + ["a.wav"]


def test_silence_in_a_long_recording_has_no_emotion(predict, place, tmp_path):
    path = tmp_path / "pauses.wav"
    soundfile.write(path, np.concatenate([tone(1, 200), np.zeros(2 * RATE), tone(1, 900), np.zeros(2 * RATE)]), RATE)
    (found,) = json.loads(predict(path, *LONG, "--format", "json").out)
    chunks = place.classifier(str(path), **CHUNKS)["chunks"]
    silent = [segment["answer"] == "silence" for segment in found["segments"]]
    assert silent == [all(1.3 < time < 3 or time > 4.3 for time in chunk["timestamp"]) for chunk in chunks]
    assert sum(silent) >= 2 and len(silent) - sum(silent) >= 2
    heard = [chunk for chunk, is_silent in zip(chunks, silent, strict=True) if not is_silent]
    expected = {entry["label"]: entry["score"] for entry in mean_over_time(heard)}
    assert found["scores"] == pytest.approx(expected, abs=1e-5)
    for segment, is_silent in zip(found["segments"], silent, strict=True):
        assert (segment["label"] == "") == (segment["uncertainty"] is None) == is_silent and segment["error"] == ""
    done = predict(path, *LONG, "--plot", tmp_path / "over_time.png")
    assert done.code == 0 and done.out.count("| silence ") == sum(silent) and re.search(r"silence \d+ %", done.out)
    for name in ("srt", "rttm", "audacity"):
        assert "silence" not in predict(path, *LONG, "--format", name).out
    words = tmp_path / "pauses.srt"  # who knows what is said there is not told that nothing is
    words.write_text(f"1\n{srt(1.9)} --> {srt(2.3)}\nstop it now\n", encoding="utf-8")
    (told,) = json.loads(predict(path, "--transcripts", words, *LONG, "--format", "json").out)
    answers = {segment["text"]: segment["answer"] for segment in told["segments"]}
    assert answers["stop it now"] not in ("", "silence")


def test_a_recording_of_a_quiet_room_is_not_classified(predict, tmp_path):
    path = tmp_path / "room.wav"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.001, 3 * RATE), RATE)
    done = predict(path, *LONG)
    assert done.code == 1 and f"{path}: nothing can be heard in it" in done.err + done.out


def test_a_text_without_times_is_not_shared_out_over_segments(predict, place):
    (place.folder / "texts.csv").write_text("file_name,text\nlong.wav,what a joy\nclips/a.wav,stop\n")
    done = predict("long.wav", "clips/a.wav", *LONG, "--transcripts", "texts.csv", "--format", "jsonl")
    first, second = map(json.loads, done.out.splitlines())
    assert (first["text"], second["text"]) == ("", "stop") and "whose texts have no times and are left out" in done.err
    assert_row(first, place.classifier(str(place.long), **CHUNKS)["scores"])


def rttm_fields(text):
    return [line.split(" ") for line in text.splitlines()]


def test_times_are_read_back(predict, place):
    """SRT, RTTM and Audacity's labels, parsed here."""
    chunks = expected_segments(place)["chunks"]
    answers = ["unknown" if c["scores"][0]["is_unknown"] else c["scores"][0]["label"] for c in chunks]
    times = [chunk["timestamp"] for chunk in chunks]
    texts = {name: predict("long.wav", "--transcripts", "long.srt", *LONG, "--format", name).out for name in FORMATS}
    blocks = [block.splitlines() for block in texts["srt"].strip().split("\n\n")]
    assert [int(block[0]) for block in blocks] == list(range(1, len(chunks) + 1))
    for block, answer, (start, end) in zip(blocks, answers, times, strict=True):
        assert block[1] == f"{srt(start)} --> {srt(end)}" and block[2].split()[0] == answer
    assert blocks[0][3] == "what a joy"
    rows = rttm_fields(texts["rttm"])
    assert [len(fields) for fields in rows] == [10] * len(chunks)
    assert [(fields[0], fields[1], fields[7]) for fields in rows] == [("SPEAKER", "long", name) for name in answers]
    assert [float(fields[3]) for fields in rows] == pytest.approx([start for start, _ in times], abs=1e-3)
    assert [float(fields[4]) for fields in rows] == pytest.approx([end - start for start, end in times], abs=2e-3)
    labels = [line.split("\t") for line in texts["audacity"].splitlines()]
    assert [(float(start), float(end), name) for start, end, name in labels] == [
        (pytest.approx(start, abs=1e-5), pytest.approx(end, abs=1e-5), name)
        for (start, end), name in zip(times, answers, strict=True)
    ]


FORMATS = ("srt", "rttm", "audacity")


def test_each_speaker_has_a_timeline(predict, place):
    """Turns are heard by themselves: the pipeline says the same of what is cut out of the file."""
    samples, _ = soundfile.read(place.long, dtype="float32")
    words = ("long.wav", "--speakers", "long.rttm", "--transcripts", "long.srt", *LONG)
    done = predict(*words, "--format", "json")
    (found,) = json.loads(done.out)
    segments = found["segments"]
    assert [(one["speaker"], one["start"], one["end"]) for one in segments] == [
        (name, pytest.approx(start), pytest.approx(end, abs=1e-3)) for start, end, name in TURNS
    ]
    for one in segments[:2] + segments[3:4]:
        cut = samples[round(one["start"] * RATE) : round(one["end"] * RATE)]
        item = {"raw": cut, "sampling_rate": RATE, "text": one["text"] or None}
        scores = place.classifier(item, return_uncertainty=True)
        assert one["scores"] == pytest.approx({e["label"]: e["score"] for e in scores}, abs=1e-5)
    assert segments[0]["text"] == "what a joy"
    assert [segments[2]["error"], segments[4]["error"]] == ["shorter than 0.025 s", "begins after the recording"]
    assert done.code == 1 and "2 segments could not be classified" in done.err
    names = [fields[7] for fields in rttm_fields(predict(*words, "--format", "rttm").out)]
    assert [name.split("/")[0] for name in names] == ["anna", "ben", "anna"]
    shown = predict(*words).out
    assert "| anna" in shown and "| ben" in shown and "shorter than" in shown


def test_long_turns_are_cut_into_equal_pieces(predict, place, tmp_path):
    (tmp_path / "one.rttm").write_text("SPEAKER other 1 0.0 2.7 <NA> <NA> anna <NA> <NA>\n")
    rows = predict("long.wav", "--speakers", tmp_path / "one.rttm", *LONG, "--format", "jsonl").out.splitlines()
    assert [json.loads(row)["start"] for row in rows] == pytest.approx([0, 0.9, 1.8])


def test_spans_are_cut_out_of_a_stream():
    samples = np.arange(1000, dtype=np.float32)
    spans = [Span(0, 0.5), Span(0.2, 0.3), Span(2, 4), Span(9.5, 11), Span(12, 13)]
    for size in (7, 100, 1000):
        blocks = [samples[start : start + size] for start in range(0, 1000, size)]
        for span, cut in zip(spans, cut_out(blocks, spans, 100), strict=True):
            np.testing.assert_array_equal(cut, samples[round(span.start * 100) : round(span.end * 100)])


def test_the_picture_is_one(predict, place, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    for speakers in ([], ["--speakers", "long.rttm"]):
        predict("long.wav", *LONG, *speakers, "--plot", "plots/timeline.png", "--overwrite")
        with image.open(place.folder / "plots" / "timeline.png") as picture:
            assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 20)) > 4
    assert [path.name for path in (place.folder / "plots").iterdir()] == ["timeline.png"]
    with pytest.raises(ValueError, match=r"timeline.png exists: choose another name, or add --overwrite"):
        predict("long.wav", *LONG, "--plot", "plots/timeline.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="matplotlib"):
        predict("long.wav", "--plot", "new.png")


# --- the screen ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("screen", [prediction_screen.Screen(80), prediction_screen.Screen(80, has_blocks=False)])
def test_a_terminal_of_80_columns_is_enough(predict, place, monkeypatch, screen):
    monkeypatch.setattr(prediction_screen.Screen, "of", classmethod(lambda *_: screen))
    long_name = place.folder / "names" / f"{'a_name_of_many_words_' * 6}.wav"
    long_name.parent.mkdir(exist_ok=True)
    soundfile.write(long_name, tone(0.2, 300), RATE)
    for words in (
        ["clips/a.wav"],
        ["clips/a.wav", "--top_k", "2"],
        ["clips", long_name.relative_to(place.folder)],
        ["long.wav", *LONG, "--transcripts", "long.srt"],
        ["long.wav", *LONG, "--transcripts", "long.srt", "--speakers", "long.rttm"],
        ["clips", "long.wav", *LONG, "--segments"],
    ):
        lines = predict(*words).out.splitlines()
        too_long = [line for line in lines if len(line) > 80 and str(long_name) not in line]
        assert too_long == [] and len(lines) > 5, words
        blocks = any(character in "\n".join(lines) for character in "█▇▆▅▄▃▂▁")
        assert blocks == (screen.has_blocks and "clips" not in words), words
        if words == ["clips/a.wav", "--top_k", "2"]:
            assert sum(line.startswith("  ") and ("█" in line or "#" in line) for line in lines) == 2
    assert "not classified" in predict("clips").out


def test_a_long_table_is_left_to_the_file(predict, monkeypatch, tmp_path):
    monkeypatch.setattr(prediction_screen, "MANY_ROWS", 2)
    assert "| clips" in predict("clips").out
    done = predict("clips", "--output", tmp_path / "out.csv")
    assert "|" not in done.out and "3 inputs classified" in done.out


def test_bars_are_as_long_as_their_share():
    screen = prediction_screen.Screen(80)
    assert [len(prediction_screen._bar(share, 40, screen)) for share in (0, 1e-6, 0.25, 0.5, 1)] == [0, 1, 10, 20, 40]
    assert prediction_screen._bar(0.5, 40, prediction_screen.Screen(80, has_blocks=False)) == "#" * 20


# --- files with times ------------------------------------------------------------------------------------------------


def test_subtitles_as_programs_write_them(tmp_path):
    text = (
        "1\r\n00:00:01,5 --> 00:00:02,250\r\n<i>First</i> line\r\nand second\r\n\r\n"
        "2\r\n01:02:03.004 --> 01:02:04.000 X1:40\r\n1984\r\n\r\n3\r\n1:00:00,000 --> 1:00:00,000\r\n"
    )
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "a.srt").write_bytes(text.encode(encoding))
        assert read_srt(tmp_path / "a.srt") == [
            {"text": "First line and second", "timestamp": (1.5, 2.25)},
            {"text": "1984", "timestamp": (3723.004, 3724.0)},
            {"text": "", "timestamp": (3600.0, 3600.0)},
        ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no lines of times"),
        ("hello\n", "line 1: subtitles begin with a number"),
        ("1\n00:01 --> x\n", "line 2: expected times such as"),
        ("1\n00:00:02,000 --> 00:00:01,000\nx\n", "line 2: the end comes before the start"),
    ],
)
def test_what_are_no_subtitles_is_named(tmp_path, text, said):
    (tmp_path / "a.srt").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_srt(tmp_path / "a.srt")


def test_turns_are_read_and_written(tmp_path):
    spans = [Span(0, 1.5, "happy", "anna b", 0.25), Span(3661.25, 3662, "sad")]
    (tmp_path / "a.rttm").write_text(format_rttm(spans, "my file"), encoding="utf-8")
    assert read_rttm(tmp_path / "a.rttm") == {
        "my_file": [Span(0, 1.5, speaker="anna_b/happy"), Span(3661.25, 3662, speaker="sad")]
    }
    assert "anna b: happy 0.25" in format_srt(spans) and "01:01:01,250 --> 01:01:02,000\nsad\n" in format_srt(spans)
    for line in ("SPEAKER a 1 x 1 <NA> <NA> b", "SPEAKER a 1 1 -1 <NA> <NA> b", "SPEAKER a 1 1"):
        (tmp_path / "a.rttm").write_text(line)
        with pytest.raises(ValueError, match=r"a\.rttm line 1: expected SPEAKER"):
            read_rttm(tmp_path / "a.rttm")


def test_clock():
    assert [clock(0), clock(65), clock(3599.96, 1), clock(3725.25, 1)] == ["0:00", "1:05", "1:00:00.0", "1:02:05.2"]


# --- adapted without labels ------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(place):
    """The pipeline of the checkpoint, loaded anew: adapting changes it."""
    return pipeline("audio-classification", model=str(place.folder / "model"))


def centre_of(classifier):
    return classifier.model.mmser.fusion.audio_norm.mean.clone()


def test_inputs_of_any_kind_move_the_centre(fresh, place):
    before, sizes = centre_of(fresh), []
    samples = [tone(0.3, 300), tone(0.5, 500)]
    with torch.no_grad():
        embeds = [fresh.model.mmser(**fresh.processor(own, sampling_rate=RATE)).audio_embeds for own in samples]
    assert fresh.adapt_to([{"raw": own} for own in samples], sampling_rate=RATE, batch_size=1) == 2
    torch.testing.assert_close(centre_of(fresh), (5 * before + sum(embeds)[0]) / 7)
    sizes.append(fresh.adapt_to(str(place.clips / "a.wav")))  # one, which is no list
    sizes.append(fresh.adapt_to(iter([samples[0], samples[1], samples[0]]), num_clips=2, sampling_rate=RATE))
    cut = {name: CHUNKS[name] for name in ("chunk_length_s", "stride_length_s")}
    sizes.append(fresh.adapt_to(place.long, **cut))
    assert sizes == [1, 2, len(list(fresh.iterate_chunks(place.long, **cut)))]


def test_what_cannot_be_adapted_to_is_named(fresh, place):
    before = centre_of(fresh)
    broken = [place.clips / "a.wav", place.clips / "broken.wav"]
    with pytest.raises(ValueError, match=r"input 1: .*broken\.wav"):
        fresh.adapt_to(broken)
    with pytest.raises(ValueError, match="no clip has audio"):
        fresh.adapt_to({"text": "what a joy"})
    with pytest.raises(TypeError, match="chunk_length_s"):
        fresh.adapt_to(broken, chunk_length=3)
    assert torch.equal(centre_of(fresh), before)
    assert fresh.adapt_to(broken, skip_unreadable=True) == 1
    fresh.model = SimpleNamespace(config=fresh.model.config)
    with pytest.raises(ValueError, match="an exported model cannot be adapted"):
        fresh.adapt_to(broken)


def test_an_adapted_model_is_saved(fresh, place, tmp_path):
    fresh.adapt_to(place.long)
    fresh.save_pretrained(tmp_path)
    assert pipeline("audio-classification", model=str(tmp_path))(place.long) == fresh(place.long)


@pytest.mark.parametrize("in_parts", [False, True])
def test_the_command_adapts_to_its_inputs(predict, place, fresh, monkeypatch, tmp_path, in_parts):
    expected = pipeline("audio-classification", model=str(place.folder / "model"))
    names = ["a.wav", "b.flac", "düşünce/情感.wav"]
    assert expected.adapt_to([place.clips / name for name in names]) == 3
    monkeypatch.setattr(prediction_run, "load_classifier", lambda *_: fresh)
    where = ["--output_dir", tmp_path / "x", "--format", "jsonl"] if in_parts else ["--output", tmp_path / "x.jsonl"]
    done = predict("clips", "--adapt_to_inputs", *where)
    assert "adapted to 3 clips of the inputs" in done.err
    written = tmp_path / "x" / "answers.jsonl" if in_parts else tmp_path / "x.jsonl"
    rows = {Path(row["file"]).name: row for row in map(json.loads, written.read_text(encoding="utf-8").splitlines())}
    assert len(rows) == 4 and [name for name, row in rows.items() if row["error"]] == ["broken.wav"]
    for name in names:
        assert_row(rows[Path(name).name], expected(str(place.clips / name), return_uncertainty=True))


# --- wrong usage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to classify"),
        (["gone.wav"], "gone.wav: there is no such file"),
        (["clips", "--text", "x"], "--text is for one recording, and there are 4 inputs"),
        (["clips", "--plot", "x.png"], "--plot is for one recording"),
        (["clips", "--format", "srt"], "The format srt is for one recording"),
        (["clips", "--transcripts", "long.srt"], "--transcripts with subtitles is for one recording"),
        (["clips", "--output", "x.docx"], "ending must be one of .csv"),
        (["clips", "--output", "clips"], "the ending must be one of"),
        (["clips", "--output", "long.srt"], "exists: choose another name, or add --overwrite"),
        (["clips", "--format", "parquet"], "is no text: name a file"),
        (["long.wav", "--plot", "x.pdf"], "must end in .png"),
        (["long.wav", "--text", "x", *LONG], "--text has no times, and long.wav lasts 3 s"),
        (["long.wav", "--text", "x", "--segments"], "--text has no times"),
        (["long.wav", "--text", "x", "--transcripts", "long.srt"], "give one of them"),
        (["long.wav", "--transcripts", "gone.csv"], "--transcripts gone.csv does not exist"),
        (["--text", "x", "--adapt_to_inputs"], "--adapt_to_inputs adapts the model to recordings"),
        (["--text", "x", "--segments"], "Segments are those of a recording"),
        (["--text", "caf\udce9"], "--text: the text is not in UTF-8"),
        (["clips", "--batch_size", "0"], "--batch_size must be at least 1"),
        (["clips", "--segments_above", "0"], "--segments_above is a time in seconds"),
        (["clips", "--speakers", "long.rttm"], "has no turns of clips.a.wav: it names long"),
        (["long.wav", "--chunk_length_s", "1", "--stride_length_s", "1", "--segments"], "together less than"),
    ],
)
def test_wrong_usage_is_a_sentence_before_any_work(predict, words, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        predict(*words)


def test_without_a_checkpoint_the_sentence_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(prediction_arguments, "BOXES", (tmp_path / "installed", tmp_path))
    with pytest.raises(ValueError, match=r"--checkpoint is needed: name the folder .*`mmser train` makes one"):
        parse_arguments(PREDICTION_ARGUMENTS, ["clip.wav"])
    (tmp_path / "config.json").write_text("{}")
    assert parse_arguments(PREDICTION_ARGUMENTS, ["clip.wav"])[0].model_name_or_path == str(tmp_path)


def test_flags_may_stand_between_inputs():
    words = ["a.wav", "--text", "x", "b.wav", "--checkpoint", "me/model", "c.wav"]
    assert parse_arguments(PREDICTION_ARGUMENTS, words)[0].inputs == ["a.wav", "b.wav", "c.wav"]


def test_models_and_devices_that_are_none_are_named(place, tmp_path):
    with pytest.raises(ValueError, match="--device tpu9 cannot be used"):
        prediction_run.load_classifier(str(place.folder / "model"), "tpu9")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is not an MMSER checkpoint: it has model type 'bert'"):
        prediction_run.load_classifier(str(tmp_path))
    loaded = prediction_run.load_classifier(str(place.folder / "model"), "cpu")
    clip = str(place.clips / "a.wav")
    assert loaded(clip)[0] == place.classifier(clip)[0] and loaded.device.type == "cpu"


def test_a_fault_of_the_program_is_not_taken_for_a_bad_file(predict, place, monkeypatch):
    def fail(*_, **__):
        return int("one")

    monkeypatch.setattr(place.classifier, "forward", fail)
    with pytest.raises(ValueError, match="invalid literal"):
        predict("clips")


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["clips/a.wav", "--format", "csv"], 0),
        (["clips", "--format", "csv"], 1),
        (["long.wav", "--speakers", "long.rttm", *LONG], 1),
        (["clips", "--output", "x.docx"], 2),
        (["clips", "--pleas"], 2),
        (["clips", "--batch_size", "many"], 2),
    ],
)
def test_exit_codes_are_for_scripts(place, monkeypatch, capfd, words, code):
    monkeypatch.chdir(place.folder)
    monkeypatch.setattr(prediction_run, "load_classifier", lambda *_: place.classifier)
    monkeypatch.setattr(sys, "argv", ["mmser", "predict", *words, "--checkpoint", "model"])
    with pytest.raises(SystemExit) if code else contextlib.nullcontext(SystemExit()) as ended:
        cli.command()
    assert (ended.value.code if code else 0) == code
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err and "\x1b" not in printed.out + printed.err
    assert " % |" not in printed.err  # no bar where there is no terminal
    assert ("error: " in printed.err) == (code == 2)


def test_as_a_program(place):
    """Without torch, as a mistake is told before it is imported."""
    command = [sys.executable, "-m", "mmser", "predict", "gone.wav", "--output", "long.srt"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=place.folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: --output long.srt exists")


def test_the_help_of_the_command_fits_a_screen_and_imports_no_torch():
    code = "import sys; from mmser.cli import main; print(main(['--help'])); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    *shown, result, has_torch = done.stdout.splitlines()
    assert (result, has_torch) == ("0", "False"), done.stderr
    assert len(shown) <= 24 and max(map(len, shown)) <= 80
    for name, (module, _) in cli.COMMANDS.items():
        assert any(line.startswith(f"  {name} ") for line in shown)
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


def test_subcommands(capsys, monkeypatch):
    assert cli.main([]) == 2 and cli.main(["--version"]) == 0
    assert re.search(r"^mmser \d", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(ValueError, match="Unknown command predcit: did you mean mmser predict"):
        cli.main(["predcit"])
    with pytest.raises(ValueError, match=r"did you mean mmser predict README.md\?"):
        monkeypatch.chdir(ROOT)
        cli.main(["README.md"])
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        assert ended.value.code == 0 and capsys.readouterr().out.startswith(f"usage: mmser {name} ")


def test_a_wave_file_of_the_standard_library(predict, tmp_path):
    """What any recorder writes: 8 kHz, two channels, 16 bits."""
    with wave.open(str(tmp_path / "phone.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes((3000 * np.sin(np.arange(8000))).astype("<i2").tobytes())
    (row,) = csv.DictReader(predict(tmp_path / "phone.wav", "--format", "csv").out.splitlines())
    assert float(row["seconds"]) == pytest.approx(0.5) and row["answer"] and not row["error"]
