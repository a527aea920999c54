# SPDX-License-Identifier: Apache-2.0
"""Tests of eval_hf: `main` as the command line calls it, on a tiny corpus with a tiny checkpoint.

Order: what a run leaves behind, calibration, kinds of data, errors before the model runs.
"""

import dataclasses
import hashlib
import json
import logging as python_logging
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import datasets
import numpy as np
import pytest
import safetensors.torch
import sklearn.metrics
import soundfile
import torch
from tiny import fit_openmax_by_chance
from tiny_corpus import (
    NAMES,
    bring,
    parse_strict_json,
    read_rows,
    tiny_flags,
    tiny_model,
    tiny_processor,
    write_corpus,
    write_table,
)

import adapters_mmser
import eval_hf
import train_hf
from mmser import evaluation_run, report
from mmser.arguments import DataArguments, EvaluationArguments, SourceArguments
from mmser.division import describe_division, divide_again, learnt_validation
from mmser.evaluation_run import store_calibration
from mmser.trainer import MMSERTrainer
from modeling_mmser import MMSERForAudioClassification, register_auto_classes
from processing_mmser import MMSERProcessor

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The tiny corpus with the speakers' sex, and a second set of unknown clips."""
    folder = write_corpus(tmp_path_factory.mktemp("data") / "corpus", validation=(7, 8))  # 24 clips to calibrate on
    for split in ("train", "validation", "test"):
        rows = read_rows(folder, split)
        for row in rows:
            row["sex"] = "female" if int(row["speaker"][-1]) % 2 else "male"
            row["file_name"] = Path(row["file_name"]).name
            del row["split"]
        write_table(folder / split / "metadata.csv", rows)
    shutil.copytree(folder / "ood", folder / "hiss")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    model = tiny_model(dropout=False, class_counts=[8, 9, 7, 8])
    model.temperature.fill_(0.5)
    fit_openmax_by_chance(model)
    register_auto_classes()  # as training does: the checkpoint carries the code
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


pytestmark = pytest.mark.usefixtures("quiet")


def flags(**given):
    """Arguments of `eval_hf.main`; a list gives a flag several values, None leaves it out."""
    given = {"use_cpu": True, "dataloader_num_workers": 0, "batch_size": 32, "bootstrap_samples": 20, **given}
    arguments = []
    for name, value in given.items():
        if value is not None:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


@pytest.fixture
def run(corpus, checkpoint, tmp_path, monkeypatch):
    """Run `main` on the tiny corpus into `tmp_path / "out"`, without the pictures: drawing takes longest by far."""
    monkeypatch.setattr(report, "draw", lambda *arguments: defaultdict(str))

    def call(**given):
        given = {"checkpoint": checkpoint, "data_dir": corpus, "output_dir": tmp_path / "out", **given}
        return eval_hf.main(flags(**given))

    return call


def read_json(folder):
    return parse_strict_json((folder / "report.json").read_text(encoding="utf-8"))


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


# --- what a run leaves behind ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(corpus, checkpoint, tmp_path_factory):
    """A run with everything but calibration: its folder and what `main` returned."""
    folder = tmp_path_factory.mktemp("evaluation") / "report"
    before = digests(checkpoint)
    ood = [corpus / "ood", corpus / "hiss"]
    report = eval_hf.main(
        flags(model_name_or_path=checkpoint, data_dir=corpus, save_dir=folder, ood_dir=ood, tta=[1, 3], seed=1)
    )
    assert digests(checkpoint) == before  # nothing is stored without --calibrate
    return folder, report


def test_main_returns_what_it_writes(finished):
    folder, report = finished
    written = read_json(folder)
    assert set(written) == {*report, "verdict"}
    assert set(written["rows"]) == {"model", "audio_only", "text_only", "linear_probe", "majority"}
    for name, row in report["rows"].items():
        assert written["rows"][name]["weighted_f1"] == row["weighted_f1"]
        assert written["rows"][name]["weighted_f1_interval"] == list(row["weighted_f1_interval"])
    assert written["split"] == "test" and written["model_name"] == "tiny" and written["label_names"] == NAMES
    assert written["unknown_clips"] == {"ood": 6, "hiss": 6}
    assert set(written["open_set"]) == {"ood", "hiss", "mean"}
    for scores in written["open_set"].values():
        assert {"openmax", "max_softmax", "energy", "knn", "uncertainty"} <= set(scores)
    assert [row["passes"] for row in written["test_time_augmentation"]] == [1, 3]
    for name in ("weighted_f1", "weighted_f1_interval"):  # the intervals, too: of as many resamples
        assert written["test_time_augmentation"][0][name] == written["rows"]["model"][name]
    # durations are all of one band
    assert [name for name in written["rows"]["model"] if name.startswith("by_")] == [
        "by_sex",
        "by_language",
        "by_corpus",
    ]
    assert written["rows"]["model"]["by_sex"]["female"]["count"] == 8
    assert written["temperature"] == 0.5 and set(written["calibration"]) == {"before", "after"}


def test_the_scores_are_those_of_the_model(finished, corpus, checkpoint):
    """Against the model itself, one clip at a time."""
    _, report = finished
    model, processor = (
        MMSERForAudioClassification.from_pretrained(checkpoint),
        MMSERProcessor.from_pretrained(checkpoint),
    )
    rows, logits, rejected = read_rows(corpus, "test"), [], []
    for row in rows:
        audio = soundfile.read(row["file_name"], dtype="float32")[0]
        with torch.no_grad():
            outputs = model.eval()(**processor(audio, row["transcription"], sampling_rate=16_000))
        logits.append(outputs.logits[0])
        rejected.append(outputs.is_unknown.item())
    labels = np.array([NAMES.index(row["label"]) for row in rows])
    logits = torch.stack(logits)
    predictions = logits.argmax(-1).numpy()
    described = report["rows"]["model"]
    expected = sklearn.metrics.f1_score(labels, predictions, average="weighted")
    assert described["weighted_f1"] == pytest.approx(expected)
    assert described["confusion_matrix"] == sklearn.metrics.confusion_matrix(labels, predictions).tolist()
    for name, factor in (("after", 1.0), ("before", 0.5)):
        expected = torch.nn.functional.cross_entropy(logits * factor, torch.tensor(labels)).item()
        assert report["calibration"][name]["negative_log_likelihood"] == pytest.approx(expected, abs=1e-4)
    assert report["rejection"]["known_accepted"] == pytest.approx(1 - np.mean(rejected))
    german = [row["language"] == "en" for row in rows]
    accuracy = (predictions == labels)[german].mean()
    assert described["by_language"]["en"]["accuracy"] == pytest.approx(accuracy)


def test_the_report_shows_its_pictures(finished):
    folder, _ = finished
    text = (folder / "report.md").read_text(encoding="utf-8")
    pictures = sorted(path.name for path in (folder / "plots").iterdir())
    kinds = ["rows", "confusion_matrix", "reliability", "risk_coverage", "by_sex", "by_language", "by_corpus"]
    kinds += [f"{kind}_{name}" for kind in ("roc", "oscr", "scores") for name in ("ood", "hiss")]
    assert pictures == sorted(f"{kind}.png" for kind in kinds)
    for name in pictures:
        assert (folder / "plots" / name).read_bytes().startswith(b"\x89PNG") and f"(plots/{name})" in text
    assert text.startswith("# How well does tiny judge?\n\n`tiny` on corpus (split: test): 16 clips")
    assert "python eval_hf.py --use_cpu" in text and "nan" not in text.split()


def test_the_same_command_gives_the_same_numbers(run, corpus):
    first = run(tta=[2], ood_dir=corpus / "ood", max_eval_samples=6, max_train_samples=9)
    second = run(tta=[2], ood_dir=corpus / "ood", max_eval_samples=6, max_train_samples=9, batch_size=3)
    assert first["rows"]["model"]["clips"] == 6 and first["unknown_clips"] == {"ood": 6}
    assert first["data"]["clips"] == {"test": 6, "train": 9}
    for found in (first, second):
        del found["test_time_augmentation"][0]["seconds"], found["command"]
    assert json.dumps(first["rows"]["model"]["confusion_matrix"]) == json.dumps(
        second["rows"]["model"]["confusion_matrix"]
    )
    for name in ("negative_log_likelihood", "mean_confidence"):  # whatever the batches are
        values = [report["test_time_augmentation"][0][name] for report in (first, second)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_the_console_shows_the_verdict_and_the_way_to_the_report(run, corpus, capsys, tmp_path):
    run(ood_dir=corpus / "ood", tta=[1])
    printed = capsys.readouterr().out
    for said in ("Is it right? For", "Scores\n| row", "Unknown clips\n| set", "Test-time augmentation\n| passes"):
        assert said in printed, said
    assert printed.rstrip().endswith(f"The report with its plots: {tmp_path / 'out' / 'report.md'}")


# --- calibration -----------------------------------------------------------------------------------------------------


def test_calibration_is_stored_in_the_checkpoint(run, checkpoint, tmp_path):
    copy = tmp_path / "tiny"
    shutil.copytree(checkpoint, copy)
    files = set(digests(copy))
    before = safetensors.torch.load_file(copy / "model.safetensors")
    report = run(checkpoint=copy, calibrate=True, output_dir=None)
    fitted = report["fitted_calibration"]
    assert fitted["split"] == "validation" and fitted["stored_in"] == str(copy) and fitted["changed"] is True
    assert fitted["nll_after"] <= fitted["nll_before"] + 1e-9
    assert {path.name for path in copy.iterdir()} == {*files, "evaluation"}  # and no temporary file
    assert {path.name for path in (copy / "evaluation").iterdir()} == {"report.md", "report.json"}
    after = safetensors.torch.load_file(copy / "model.safetensors")
    assert after["temperature"].item() == pytest.approx(fitted["temperature"]) != before["temperature"].item()
    assert after["uncertainty.error_calibration"].tolist() != [0, 1, 0]
    parameters = dict(MMSERForAudioClassification.from_pretrained(copy).named_parameters())
    for name in (*parameters, "openmax.centroids"):
        assert torch.equal(before[name], after[name]), name
    # the numbers are those of the calibrated model: evaluated again without calibrating, they are the same
    again = run(checkpoint=copy)
    assert again["temperature"] == pytest.approx(fitted["temperature"])
    assert again["rows"]["model"]["negative_log_likelihood"] == report["rows"]["model"]["negative_log_likelihood"]


def test_the_code_of_the_checkpoint_is_replaced_with_the_calibration(run, checkpoint, tmp_path):
    """Older code might read the new numbers in another way."""
    copy = tmp_path / "tiny"
    shutil.copytree(checkpoint, copy)
    names = {"modeling_mmser.py", "configuration_mmser.py", "processing_mmser.py"}
    assert names <= {path.name for path in copy.glob("*.py")}
    for name in names:
        (copy / name).write_text("raise ImportError('of an older version')\n")
    run(checkpoint=copy, calibrate=True, output_dir=tmp_path / "out")
    for name in names:
        assert (copy / name).read_text() == (Path(eval_hf.__file__).parent / name).read_text()


def test_a_calibration_that_changes_nothing_says_so_and_writes_nothing(run, checkpoint, tmp_path, caplog, monkeypatch):
    copy = tmp_path / "tiny"
    shutil.copytree(checkpoint, copy)
    before = digests(copy)
    monkeypatch.setattr(MMSERTrainer, "calibrate", lambda *args: {"temperature": 1.0})
    with caplog.at_level(python_logging.INFO):
        report = run(checkpoint=copy, calibrate=True, output_dir=tmp_path / "out")
    assert report["fitted_calibration"]["changed"] is False and digests(copy) == before
    assert f"Calibrating changed nothing: {copy} is as it was" in caplog.text
    assert "The calibrated checkpoint is in" not in caplog.text
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Fitting it in this run, on the validation split, changed nothing." in text and "stored in" not in text


@pytest.mark.parametrize("step", ["measure", "try_augmentation"])
def test_nothing_is_stored_before_everything_is_measured(step, run, checkpoint, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    copy = tmp_path / "tiny"
    shutil.copytree(checkpoint, copy)
    monkeypatch.setattr(evaluation_run, step, fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(checkpoint=copy, calibrate=True, tta=[1])
    assert digests(copy) == digests(checkpoint)


def test_calibrating_on_the_training_clips_is_noted(run, checkpoint, tmp_path):
    copy = tmp_path / "tiny"
    shutil.copytree(checkpoint, copy)
    report = run(checkpoint=copy, calibrate=True, calibration_split="train")
    assert any(note.startswith("Calibrated on the train split") for note in report["notes"])
    report = run(checkpoint=copy, calibrate=True)
    assert not any("Calibrated on" in note for note in report["notes"])


def test_too_few_clips_to_calibrate_on_are_an_error_before_the_model_runs(run, corpus, checkpoint, tmp_path):
    copy = tmp_path / "tiny"
    shutil.copytree(checkpoint, copy)
    few, test = read_rows(corpus, "validation")[:19], read_rows(corpus, "test")
    given = {"checkpoint": copy, "data_dir": None, "manifest": tmp_path / "all.csv", "calibrate": True}
    write_table(tmp_path / "all.csv", few[1:] + test)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MMSERForAudioClassification, "from_pretrained", None)
        with pytest.raises(ValueError, match=r"--calibrate needs .*\b19\b clips.* validation split of .* has 18"):
            run(**given)
    write_table(tmp_path / "all.csv", few + test)
    assert run(**given)["fitted_calibration"]["stored_in"] == str(copy)


def test_a_checkpoint_from_the_hub_is_stored_in_the_output_folder(checkpoint, tmp_path):
    model, processor = tiny_model(), tiny_processor()
    model.temperature.fill_(3.0)
    arguments = EvaluationArguments("someone/model", output_dir=str(tmp_path / "out"))
    folder = store_calibration(model, processor, arguments)
    assert folder == tmp_path / "out" / "checkpoint"
    assert MMSERForAudioClassification.from_pretrained(folder).temperature.item() == 3.0
    assert MMSERProcessor.from_pretrained(folder).tokenizer.model_max_length
    assert EvaluationArguments("someone/model").output_dir == "runs/eval"


# --- kinds of data ---------------------------------------------------------------------------------------------------


def test_a_flat_folder_of_undivided_clips(run, corpus):
    report = run(data_dir=corpus / "test")
    assert report["split"] == "all" and report["rows"]["model"]["clips"] == 16
    assert set(report["rows"]) == {"model", "audio_only", "text_only", "majority"}  # of the checkpoint's class counts
    assert report["rows"]["majority"]["f1_happy"] > 0
    notes = " ".join(report["notes"])
    assert "no linear probe" in notes and "trained on clips among these" in notes
    assert report["open_set"] == {}


@pytest.fixture(scope="module")
def undivided(tmp_path_factory, corpus):
    """One table without splits, with foreign column names and semicolons, and a model that was trained on it."""
    folder = tmp_path_factory.mktemp("undivided")
    names = {"file_name": "Datei", "label": "Stimmung", "speaker": "Kunde"}
    rows = [{new: row[old] for old, new in names.items()} for row in read_rows(corpus, "train", "validation", "test")]
    write_table(folder / "calls.csv", rows)
    text = (folder / "calls.csv").read_text(encoding="utf-8").replace(",", ";")
    (folder / "calls.csv").write_text(text, encoding="utf-8-sig")
    tiny_processor().tokenizer.save_pretrained(folder / "tokenizer")
    columns = {"audio_column": "Datei", "label_column": "Stimmung", "speaker_column": "Kunde", "text_column": "none"}
    given = {"data_dir": None, "manifest": folder / "calls.csv", **columns, "seed": 5, "eval_strategy": "no"}
    given |= {"load_best_model_at_end": False, "validation_fraction": 0.4}
    train_hf.main(tiny_flags(corpus, folder / "run", folder / "tokenizer", **given))
    results = json.loads((folder / "run" / "eval_results.json").read_text(encoding="utf-8"))
    return folder, {"data_dir": None, "manifest": folder / "calls.csv", **columns}, results


def test_of_the_clips_that_a_model_was_trained_on_those_that_were_held_out_are_judged(run, undivided, caplog):
    folder, data, results = undivided
    report = run(checkpoint=folder / "run", **data)
    assert report["split"] == "test"
    assert report["rows"]["model"]["clips"] == results["data"]["clips"]["test"]
    assert report["rows"]["model"]["weighted_f1"] == pytest.approx(results["test"]["model"]["weighted_f1"])
    assert "was trained on these clips" in caplog.text
    held_out = results["data"]["clips"]["validation"]
    assert run(checkpoint=folder / "run", **data, split="validation")["rows"]["model"]["clips"] == held_out


def test_after_adapting_no_validation_clip_is_left_to_judge(tmp_path):
    """Adapting takes the validation clips of data with splits too."""
    splits = {
        name: datasets.Dataset.from_list([{"text": f"{name} {number}", "labels": number % 2} for number in range(4)])
        for name in ("train", "validation", "test")
    }
    assert not learnt_validation(tmp_path)
    identity = {"division": describe_division(splits, {}, 7), "settings": {"adapt": True}}
    (tmp_path / "run_identity.json").write_text(json.dumps(identity), encoding="utf-8")
    assert learnt_validation(tmp_path)
    everything = datasets.concatenate_datasets(list(splits.values()))
    divided = divide_again(everything, tmp_path, lambda **_: dict(splits))
    assert {name: len(split) for name, split in divided.items()} == {"train": 8, "test": 4}


def test_a_bad_row_is_listed_once_although_the_clips_are_divided_again(run, undivided, tmp_path):
    folder, data, results = undivided
    table = folder / "one_is_gone.csv"
    gone = f"{folder / 'gone.wav'};happy;nobody\n"
    table.write_text(data["manifest"].read_text(encoding="utf-8-sig") + gone, encoding="utf-8-sig")
    report = run(checkpoint=folder / "run", **{**data, "manifest": table}, on_bad_example="skip")
    assert report["rows"]["model"]["clips"] == results["data"]["clips"]["test"]
    (listed,) = (tmp_path / "out" / "bad_examples.csv").read_text().splitlines()[1:]
    assert "gone.wav does not exist" in listed


def test_clips_of_a_training_that_cannot_be_divided_as_there_are_an_error(run, undivided, corpus, tmp_path):
    folder, data, _ = undivided
    with pytest.raises(ValueError, match="speaker_column"):
        run(checkpoint=folder / "run", **data | {"speaker_column": "none"})
    rows = read_rows(corpus, "train", "validation", "test")
    for row in rows:
        del row["split"]
    write_table(tmp_path / "more.csv", rows[1:])  # not the same clips: all of them are judged
    report = run(checkpoint=folder / "run", data_dir=None, manifest=tmp_path / "more.csv", text_column="none")
    assert report["split"] == "all" and report["rows"]["model"]["clips"] == len(rows) - 1


@pytest.mark.parametrize("adapts", [False, True])
def test_a_division_is_made_again_as_far_as_clips_were_held_out(tmp_path, adapts):
    """Adapting learns from the validation clips too; texts alone tell clips apart where there is no audio."""
    rows = [{"text": f"text {number}", "row": str(number), "labels": number % 2} for number in range(6)]
    parts = {"train": rows[:3], "validation": rows[3:5], "test": rows[5:]}
    splits = {name: datasets.Dataset.from_list(part) for name, part in parts.items()}
    fractions = {"validation_fraction": 0.3, "test_fraction": 0.2}
    identity = {"division": describe_division(splits, fractions, 7), "settings": {"adapt": adapts}}
    (tmp_path / "run_identity.json").write_text(json.dumps(identity), encoding="utf-8")
    asked = []

    def load(**given):
        asked.append(given)
        return splits

    everything = datasets.Dataset.from_list(rows[::-1])
    divided = divide_again(everything, tmp_path, load)
    expected = {"train": 5, "test": 1} if adapts else {"train": 3, "validation": 2, "test": 1}
    assert {name: len(split) for name, split in divided.items()} == expected
    assert asked == [{**fractions, "seed": 7}]
    assert divide_again(everything.select(range(5)), tmp_path, load) is None
    assert divide_again(everything, tmp_path / "elsewhere", load) is None
    splits["train"], splits["test"] = splits["test"], splits["train"]
    with pytest.raises(ValueError, match="divided otherwise than in its training: name the columns"):
        divide_again(everything, tmp_path, load)


def test_a_manifest_with_a_class_missing_and_other_columns(run, corpus, tmp_path, caplog):
    rows = [row for row in read_rows(corpus, "train", "test") if row["label"] not in ("sad", "angry")]
    for number, row in enumerate(rows):
        row["room"] = ("kitchen", "hall", "")[number % 3]
        row["emotion_"] = row.pop("label").upper()
    write_table(tmp_path / "all.csv", rows)
    given = {"data_dir": None, "manifest": tmp_path / "all.csv", "label_column": "emotion_"}
    report = run(**given, group_by=["room", "duration", "speaker"])
    assert "No clip has the label sad, angry" in caplog.text and "learn it" not in caplog.text
    model = report["rows"]["model"]
    assert [name for name in model if name.startswith("by_")] == ["by_room", "by_duration", "by_speaker"]
    assert set(model["by_room"]) == {"kitchen", "hall", "unknown"} and set(model["by_duration"]) == {"0-1 s"}
    assert sum(row["count"] for row in model["by_room"].values()) == model["clips"] == 8
    assert model["f1_angry"] == 0 and 0 <= model["unweighted_average_recall"] <= 1


def test_the_log_mel_probe_stands_beside_the_audio(run, corpus, tmp_path):
    report = run(log_mel_probe=True)
    assert list(report["rows"])[:3] == ["model", "audio_only", "log_mel_probe"]
    probe = report["rows"]["log_mel_probe"]
    assert probe["clips"] == report["rows"]["audio_only"]["clips"] == 16
    assert probe["weighted_f1"] > 0.8  # every class of the tiny corpus is a tone of its own
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| log-mel probe " in text and "what `its audio alone` has to beat" in text
    assert read_json(tmp_path / "out")["rows"]["log_mel_probe"]["accuracy"] == probe["accuracy"]


def test_a_log_mel_probe_without_something_to_hear_is_refused(run, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_run, "measure", None)  # the model does not run
    with pytest.raises(ValueError, match=r"--log_mel_probe learns from training clips, and .* has none beside"):
        run(log_mel_probe=True, data_dir=corpus / "test")
    rows = read_rows(corpus, "train", "test")
    write_table(tmp_path / "all.csv", [{key: row[key] for key in row if key != "file_name"} for row in rows])
    with pytest.raises(ValueError, match="--log_mel_probe needs audio in the training and the evaluated clips"):
        run(log_mel_probe=True, data_dir=None, manifest=tmp_path / "all.csv", audio_column="none")
    write_table(tmp_path / "one.csv", [row for row in rows if row["split"] == "test" or row["label"] == "sad"])
    with pytest.raises(ValueError, match=r"of two classes; .* has 1\."):
        run(log_mel_probe=True, data_dir=None, manifest=tmp_path / "one.csv")


def test_one_clip(run, corpus, tmp_path):
    write_table(tmp_path / "one.csv", read_rows(corpus, "test")[:1])
    report = run(data_dir=None, manifest=tmp_path / "one.csv", ood_dir=corpus / "ood", tta=[2], use_amp=True)
    assert report["rows"]["model"]["clips"] == 1
    assert read_json(tmp_path / "out")["rows"]["model"]["error_auroc_of_uncertainty"] is None


def test_languages_are_those_of_the_evaluated_clips(run, corpus, tmp_path):
    rows = [{**row, "language": "de"} for row in read_rows(corpus, "train")] + read_rows(corpus, "test")
    write_table(tmp_path / "all.csv", rows)
    report = run(data_dir=None, manifest=tmp_path / "all.csv")
    assert report["data"]["clips"] == {"test": 16, "train": 32} and report["data"]["languages"] == ["en", "zxx"]


def test_text_alone(run, corpus, tmp_path):
    rows = [
        {key: row[key] for key in ("transcription", "label", "speaker", "split")} for row in read_rows(corpus, "test")
    ]
    write_table(tmp_path / "all.csv", rows)
    given = {"data_dir": None, "manifest": tmp_path / "all.csv", "audio_column": "none", "split": "test"}
    report = run(**given)
    assert set(report["rows"]) == {"model", "majority"} and report["gaps"] == {}
    with pytest.raises(ValueError, match="--group_by duration needs audio"):
        run(**given, group_by=["duration"])


def test_the_validation_split_stands_in_for_the_test_split(run, corpus, tmp_path):
    write_table(tmp_path / "all.csv", read_rows(corpus, "train", "validation"))
    report = run(data_dir=None, manifest=tmp_path / "all.csv")
    assert report["split"] == "validation" and "no test split" in " ".join(report["notes"])
    report = run(data_dir=None, manifest=tmp_path / "all.csv", split="train")
    assert report["split"] == "train" and "linear_probe" not in report["rows"]


def test_unreadable_clips_are_skipped(run, corpus, tmp_path):
    broken = tmp_path / "corpus"
    shutil.copytree(corpus, broken)
    for name in ("test/5_0.wav", "train/0_1.wav", "ood/0.wav"):
        (broken / name).write_bytes(b"not a sound")
    with pytest.raises(ValueError, match=r"test/metadata.csv row 2: audio '\S*5_0.wav': cannot be read"):
        run(data_dir=broken)
    report = run(data_dir=broken, ood_dir=broken / "ood", on_bad_example="skip")
    assert report["data"]["clips"] == {"test": 15, "train": 31} and report["unknown_clips"] == {"ood": 5}
    listed = next(tmp_path.rglob("bad_examples.csv")).read_text().splitlines()
    assert len(listed) == 1 + 3 and {line.split(".wav")[0][-3:] for line in listed[1:]} == {"5_0", "0_1", "d/0"}


def test_known_clips_among_the_unknown_are_left_out(run, corpus, tmp_path, caplog):
    clips = str(corpus / "test" / "5_0.wav"), str(corpus / "ood" / "0.wav")
    rows = [{"file_name": clips[0], "label": "happy"}, {"file_name": clips[1], "label": "fear"}]
    write_table(tmp_path / "a" / "ood" / "metadata.csv", bring(rows, tmp_path / "a" / "ood"))
    report = run(ood_dir=[tmp_path / "a" / "ood", corpus / "ood"])
    assert report["unknown_clips"] == {"a/ood": 1, "corpus/ood": 6}
    assert "left out 1 clips that have one of the classes" in caplog.text


# --- errors before the model runs ------------------------------------------------------------------------------------


def test_errors_come_before_the_model_runs(run, corpus, checkpoint, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(MMSERForAudioClassification, "from_pretrained", refuse)

    def error_of(message, **given):
        with pytest.raises(ValueError, match=message):
            run(**given)

    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "wav2vec2"}')
    error_of(r"other is not an MMSER checkpoint: it has model type 'wav2vec2'", checkpoint=other)
    (other / "config.json").write_text('{"model_type": "mmser-onnx"}')
    error_of("other is an export.*: give --checkpoint the checkpoint that it was made from", checkpoint=other)
    error_of("give a source of data", data_dir=None)
    error_of("has no validation split .--split.; it has: train", data_dir=corpus / "test", split="validation")
    error_of("has no validation split .--calibration_split.; it has: all", data_dir=corpus / "test", calibrate=True)
    error_of("both are the validation split", calibrate=True, split="validation")
    error_of("no column 'room'", group_by=["room"])
    error_of("--ood_dir .*nowhere does not exist", ood_dir=[corpus / "ood", tmp_path / "nowhere"])
    error_of("all of its clips have one of the classes neutral, happy, sad, angry", ood_dir=corpus / "test")
    error_of("the name 'corpus/ood' is taken", ood_dir=[corpus / "ood", corpus / "ood"])
    shutil.copytree(corpus / "ood", tmp_path / "mean")  # the report has a row of that name
    error_of("the name 'mean' is taken", ood_dir=[corpus / "ood", tmp_path / "mean"])
    error_of(r"at least 1, got \[1, 0\]", tta=[1, 0])
    for name in ("bootstrap_samples", "max_train_samples"):
        error_of(f"--{name} must be at least 1, got 0", **{name: 0})
    error_of("--max_eval_samples must be at least 1, got 0", max_eval_samples=0)
    rows = read_rows(corpus, "test")
    write_table(tmp_path / "all.csv", [{**rows[0], "label": "bored"}, *rows[1:]])
    error_of("row 2: unknown label 'bored'; allowed: neutral, happy", data_dir=None, manifest=tmp_path / "all.csv")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install \.\[report\]"):
        run()
    assert not (tmp_path / "out").exists()


def test_a_model_that_gives_nan_is_an_error(run, corpus, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(adapters_mmser, "broken_weights", lambda model: [])  # else it is not even loaded
    copy = tmp_path / "tiny"
    shutil.copytree(checkpoint, copy)
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    weights["uncertainty.output.bias"].fill_(torch.nan)
    safetensors.torch.save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"`uncertainty` is not finite for 16 of 16 clips, the first is test/metadata.csv row 2"
    ):
        run(checkpoint=copy)


def test_help_and_shared_flags(capsys):
    with pytest.raises(SystemExit) as finished:
        eval_hf.main(["--help_all"])
    assert finished.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--checkpoint", "--ood_dir", "--calibrate", "--tta", "--group_by", "--save_dir", "--sex_column"):
        assert flag in shown, flag
    assert "95 % intervals" in shown
    own = {field.name for field in dataclasses.fields(SourceArguments)}
    assert own < {field.name for field in dataclasses.fields(DataArguments)}
