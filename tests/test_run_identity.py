# SPDX-License-Identifier: Apache-2.0
"""Tests of mmser.run_identity: when a run is continued, when it is refused, and what overwriting deletes.

Order: runs of `train_hf.main` in a folder that holds one, fingerprints, the folder.
"""

import errno
import json
import multiprocessing
import os
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from accelerate import PartialState
from filelock import FileLock
from tiny_corpus import (
    JOINT,
    NAMES,
    RATE,
    TEXT,
    bring,
    read_rows,
    tiny_flags,
    tiny_model,
    tiny_processor,
    write_table,
)

import train_hf
from mmser import run_identity, training_run
from mmser.arguments import DataArguments
from mmser.files import locked
from mmser.loading import load_emotion_dataset
from mmser.run_identity import (
    IDENTITY_NAME,
    delete_run,
    fingerprint_clips,
    fingerprint_weights,
    holds_run,
    lock_output_dir,
)
from mmser.trainer import last_complete_checkpoint

pytestmark = pytest.mark.usefixtures("quiet")


SAVING = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no"}


def train(data, folder, tokenizer, *words, **flags):
    return train_hf.main([*words, *tiny_flags(data, folder, tokenizer, **{**SAVING, **flags})])


@pytest.fixture(scope="module")
def run_a(corpus, tokenizer, tmp_path_factory):
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    train(corpus, folder, tokenizer)
    return folder


@pytest.fixture
def started(run_a, tmp_path):
    """A copy of that run, for a test to work on."""
    return Path(shutil.copytree(run_a, tmp_path / "run"))


def with_other_labels(corpus, folder):
    other = {"neutral": "calm", "happy": "glad", "sad": "blue", "angry": "cross"}
    for split in ("train", "validation", "test"):
        rows = [{**row, "label": other[row["label"]]} for row in read_rows(corpus, split)]
        write_table(folder / f"{split}.csv", bring(rows, folder))
    return folder


def labels_of(folder):
    return list(json.loads((folder / "config.json").read_text())["id2label"].values())


def steps_of(folder):
    return json.loads((folder / "trainer_state.json").read_text())["global_step"]


# --- runs ------------------------------------------------------------------------------------------------------------


def test_another_label_set_does_not_relabel_the_model_that_is_there(corpus, tokenizer, started, tmp_path):
    other = with_other_labels(corpus, tmp_path / "other")
    before = {path: path.read_bytes() for path in started.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a run that was started with something else") as refused:
        train(other, started, tokenizer)
    message = str(refused.value)
    assert f"labels: {NAMES} -> ['blue', 'calm', 'cross', 'glad']" in message
    assert "--overwrite_output_dir" in message and "another --output_dir" in message
    assert {path: path.read_bytes() for path in started.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match="labels: "):
        train(other, tmp_path / "new", tokenizer, resume_from_checkpoint=started / "checkpoint-2")
    assert not (tmp_path / "new" / "config.json").exists()

    results = train(other, started, tokenizer, "--overwrite_output_dir", max_steps=1)
    assert labels_of(started) == results["label_names"] == ["blue", "calm", "cross", "glad"]
    assert steps_of(started) == 1 and [path.name for path in started.glob("checkpoint-*")] == ["checkpoint-1"]
    results = train(other, started, tokenizer, max_steps=2)  # goes on from its own checkpoint
    assert steps_of(started) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("relabel", "train clips: 32 clips, "),
        ("rerecord", "validation clips: 8 clips, "),
        ("drop", "test clips: 16 clips, "),
        ("no test", "-> none"),
    ],
)
def test_other_clips_are_refused(corpus, tokenizer, started, tmp_path, change, said):
    data = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    if change == "rerecord":  # the same name and the same size
        path = data / "validation" / "4_0.wav"
        soundfile.write(path, np.random.default_rng(1).uniform(-0.1, 0.1, soundfile.info(path).frames), RATE)
    elif change == "no test":
        shutil.rmtree(data / "test")
    else:
        split = "train" if change == "relabel" else "test"
        rows = [{**row, "file_name": Path(row["file_name"]).name} for row in read_rows(data, split)]
        if change == "relabel":
            rows[0]["label"], rows[1]["label"] = rows[1]["label"], rows[0]["label"]
        write_table(data / split / "metadata.csv", rows if change == "relabel" else rows[1:])
    with pytest.raises(ValueError, match="before -> now") as refused:
        train(data, started, tokenizer)
    lines = [line for line in str(refused.value).splitlines() if line.startswith("  ")]
    assert len(lines) == 1 and said in lines[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"config_overrides": {**JOINT, "anchor_loss_weight": 0.2}}, "config.anchor_loss_weight: 0.1 -> 0.2"),
        ({"config_overrides": {**JOINT, "fusion_hidden_size": 24}}, "config.fusion_hidden_size: 16 -> 24"),
        ({"text_config_overrides": {**TEXT, "num_hidden_layers": 2}}, "config.text_config.num_hidden_layers: 1 -> 2"),
        ({"freeze_audio": True}, "frozen: [] -> ['audio']"),
    ],
)
def test_another_architecture_or_loss_is_refused(corpus, tokenizer, started, flags, said):
    with pytest.raises(ValueError, match="before -> now") as refused:
        train(corpus, started, tokenizer, **flags)
    assert said in str(refused.value)
    assert steps_of(started) == 2


def test_other_weights_under_the_same_name_are_refused(corpus, tokenizer, tmp_path):
    def start_from(seed):
        torch.manual_seed(seed)
        tiny_model().save_pretrained(tmp_path / "earlier")
        tiny_processor().save_pretrained(tmp_path / "earlier")

    none = dict.fromkeys(("tokenizer_name", "random_audio_encoder", "audio_config_overrides", "random_text_encoder"))
    flags = {**none, "text_config_overrides": None, "config_overrides": None}
    flags["model_name_or_path"] = tmp_path / "earlier"
    start_from(1)
    train(corpus, tmp_path / "run", tokenizer, **flags)
    start_from(2)
    with pytest.raises(ValueError, match=r"audio encoder: as in earlier \(weights ") as refused:
        train(corpus, tmp_path / "run", tokenizer, **flags)
    assert "other starting weights: " in str(refused.value) and "config." not in str(refused.value)


def test_moved_clips_another_order_and_other_settings_go_on(corpus, tokenizer, started, tmp_path, caplog):
    moved = tmp_path / "elsewhere"
    for split in ("train", "validation", "test"):
        shutil.copytree(corpus / split, moved / "audio" / split)
        names = [f"audio/{split}/{Path(row['file_name']).name}" for row in read_rows(corpus, split)]
        rows = [{**row, "file_name": name} for name, row in zip(names, read_rows(corpus, split), strict=True)]
        write_table(moved / f"{split}.csv", rows[::-1])
    train(moved, started, tokenizer, max_steps=3, learning_rate=0.01, augment=False, logging_steps=2)
    assert steps_of(started) == 3
    lines = [record.getMessage() for record in caplog.records if "other settings" in record.getMessage()]
    assert len(lines) == 1
    for said in ("learning_rate: 0.0001 -> 0.01", "max_steps: 2 -> 3", "augment: True -> False"):
        assert said in lines[0]
    assert "logging_steps" not in lines[0]


def test_a_run_from_before_identities_is_compared_by_its_labels(corpus, tokenizer, started, tmp_path, caplog):
    (started / IDENTITY_NAME).unlink()
    with pytest.raises(ValueError, match="labels: "):
        train(with_other_labels(corpus, tmp_path / "other"), started, tokenizer)
    assert not (started / IDENTITY_NAME).exists()
    caplog.clear()
    train(corpus, started, tokenizer, max_steps=3)
    assert caplog.text.count(f"has no {IDENTITY_NAME}") == 1 and steps_of(started) == 3
    caplog.clear()
    train(corpus, started, tokenizer, max_steps=3)
    assert IDENTITY_NAME not in caplog.text


def test_a_run_from_before_identities_is_compared_by_what_its_results_say_of_the_data(
    corpus, tokenizer, started, tmp_path
):
    (started / IDENTITY_NAME).unlink()
    other = Path(shutil.copytree(corpus, tmp_path / "other"))
    rows = [{**row, "file_name": Path(row["file_name"]).name} for row in read_rows(other, "test")]
    write_table(other / "test" / "metadata.csv", rows[1:])
    before = (started / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="before -> now") as refused:
        train(other, started, tokenizer)
    lines = [line.strip() for line in str(refused.value).splitlines() if line.startswith("  ")]
    assert lines == ["data: corpus -> other", "clips in test: 16 -> 15"]
    shutil.rmtree(other / "test")
    with pytest.raises(ValueError, match="clips in test: 16 -> none"):
        train(other, started, tokenizer)
    assert (started / "model.safetensors").read_bytes() == before and not (started / IDENTITY_NAME).exists()


def test_a_run_that_left_nothing_behind_holds_nobody_up(corpus, tokenizer, started):
    """It was killed before its first checkpoint was whole."""
    for path in started.iterdir():
        if path.name not in (IDENTITY_NAME, "checkpoint-1"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    state = started / "checkpoint-1" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:20])
    train(corpus, started, tokenizer, freeze_text=True, max_steps=1)
    assert steps_of(started) == 1
    assert json.loads((started / IDENTITY_NAME).read_text())["fixed"]["frozen"] == ["text"]


def test_starting_anew_beside_old_checkpoints_is_refused(corpus, tokenizer, started, tmp_path):
    with pytest.raises(
        ValueError, match=r"--resume_from_checkpoint no: .*run has checkpoints.*--overwrite_output_dir"
    ):
        train(corpus, started, tokenizer, resume_from_checkpoint="no")
    with pytest.raises(ValueError, match=r"--overwrite_output_dir would delete .*checkpoint-1"):
        train(corpus, started, tokenizer, "--overwrite_output_dir", resume_from_checkpoint=started / "checkpoint-1")
    train(corpus, tmp_path / "new", tokenizer, resume_from_checkpoint="no", max_steps=1)
    assert steps_of(tmp_path / "new") == 1


def test_going_on_from_the_checkpoint_of_another_folder(corpus, tokenizer, started, tmp_path):
    train(corpus, tmp_path / "new", tokenizer, resume_from_checkpoint=started / "checkpoint-1", max_steps=3)
    assert steps_of(tmp_path / "new") == 3
    names = sorted(path.name for path in (tmp_path / "new").glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-3"]


def test_a_finished_run_without_a_checkpoint_is_not_replaced_unasked(corpus, tokenizer, tmp_path):
    folder = tmp_path / "run"
    train(corpus, folder, tokenizer, save_strategy="no")
    assert not list(folder.glob("checkpoint-*"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for flags in ({}, {"max_steps": 3}, {"learning_rate": 0.01}):
        with pytest.raises(ValueError, match="holds a finished run and no checkpoint to go on from") as refused:
            train(corpus, folder, tokenizer, **{"save_strategy": "no", **flags})
        assert "--overwrite_output_dir" in str(refused.value) and "another --output_dir" in str(refused.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    train(corpus, folder, tokenizer, "--overwrite_output_dir", save_strategy="no", max_steps=1)
    assert steps_of(folder) == 1


def stop_at(monkeypatch, name):
    """Let the end of a training fail where it calls this function of `training_run`."""

    def stop(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "README.md")

    monkeypatch.setattr(training_run, name, stop)


def test_of_a_run_that_lacks_its_card_alone_the_card_is_written(corpus, tokenizer, tmp_path, monkeypatch):
    flags = {"save_strategy": "no", "use_cpu": True}
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        stop_at(patch, "write_model_card")
        train(corpus, tmp_path / "run", tokenizer, **flags)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for other in ({"learning_rate": 0.01}, {"max_steps": 3}):
        with pytest.raises(ValueError, match=r"holds the model of a run with other settings .* -> .*; give the same"):
            train(corpus, tmp_path / "run", tokenizer, **{**flags, **other})
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "train", lambda *_: pytest.fail("it is trained"))
        results = train(corpus, tmp_path / "run", tokenizer, **flags)
    assert results == json.loads((tmp_path / "run" / "eval_results.json").read_text())
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert set(after) - set(before) == {tmp_path / "run" / "README.md"} and before.items() <= after.items()
    card = after[tmp_path / "run" / "README.md"].decode()
    (tmp_path / "run" / "README.md").unlink()
    training_run.write_results(results, tmp_path / "run", shlex.split(results["command"]))
    assert card == (tmp_path / "run" / "README.md").read_text()
    for text in (card, card.replace("# ", "# My ", 1)):  # also where somebody changed it
        (tmp_path / "run" / "README.md").write_text(text)
        with pytest.raises(ValueError, match="holds a finished run and no checkpoint"):
            train(corpus, tmp_path / "run", tokenizer, **flags)


def test_a_run_that_was_stopped_before_it_was_judged_is_trained_anew(corpus, tokenizer, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        stop_at(patch, "evaluate")
        train(corpus, tmp_path / "run", tokenizer, save_strategy="no")
    assert (tmp_path / "run" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="holds the model of a run with other settings"):
        train(corpus, tmp_path / "run", tokenizer, save_strategy="no", learning_rate=0.01)
    train(corpus, tmp_path / "run", tokenizer, save_strategy="no")
    assert "stopped before its model was judged" in caplog.text and (tmp_path / "run" / "README.md").is_file()


def test_a_model_of_which_nothing_is_known_is_not_replaced_unasked(corpus, tokenizer, tmp_path, started):
    """Of somebody's own, or of an earlier version."""
    for name in ("README.md", "eval_results.json", IDENTITY_NAME):
        (started / name).unlink()
    for checkpoint in started.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match="holds a finished run and no checkpoint"):
        train(corpus, started, tokenizer)


def test_a_run_that_fails_its_checks_leaves_the_folder_as_it_was(corpus, tokenizer, started, tmp_path, caplog):
    before = {path: path.read_bytes() for path in started.rglob("*") if path.is_file()}
    for words in ((), ("--overwrite_output_dir",)):
        with pytest.raises(ValueError, match="text_dropout"):
            train(corpus, started, tokenizer, *words, text_dropout=1.5)
    assert {path: path.read_bytes() for path in started.rglob("*") if path.is_file()} == before
    caplog.clear()
    train(corpus, started, tokenizer)
    assert "other settings" not in caplog.text
    with pytest.raises(ValueError, match="text_dropout"):
        train(corpus, tmp_path / "new", tokenizer, text_dropout=1.5)
    assert not (tmp_path / "new" / IDENTITY_NAME).exists()


# --- fingerprints ----------------------------------------------------------------------------------------------------


def fingerprint_of(corpus):
    splits, _ = load_emotion_dataset(corpus)
    return fingerprint_clips(splits["train"], DataArguments(data_dir=str(corpus)))


def prepare_processes(corpus, folder):
    shutil.copytree(corpus, folder / "moved")


def run_process(corpus, folder):
    """With other hashes of strings; then both ask for a folder in which another training is."""
    rank = os.environ["RANK"]
    (folder / f"fingerprint{rank}").write_text(fingerprint_of(folder / "moved"))
    if rank == "0":
        held = locked(folder / "run" / run_identity.LOCK, 0)
        assert held
    PartialState(cpu=True).wait_for_everyone()
    run_identity.PATIENCE = 0.5
    try:
        with lock_output_dir(SimpleNamespace(output_dir=folder / "run", process_index=int(rank))):
            said = "locked"
    except ValueError as error:
        said = str(error)
    (folder / f"said{rank}").write_text(said)


def test_the_fingerprint_of_clips_is_the_same_in_another_process_and_another_folder(two_processes):
    expected = fingerprint_of(two_processes.parent / "corpus")
    assert expected.startswith("32 clips, ")
    assert (two_processes / "fingerprint0").read_text() == (two_processes / "fingerprint1").read_text() == expected


def test_the_fingerprint_of_embedded_audio_is_that_of_its_file(corpus):
    splits, _ = load_emotion_dataset(corpus)
    train_split = splits["test"]
    embedded = [{"bytes": Path(path).read_bytes(), "path": None} for path in train_split["audio"]]
    other = train_split.remove_columns("audio").add_column("audio", embedded)
    arguments = DataArguments(data_dir="anywhere")
    assert fingerprint_clips(other, arguments) == fingerprint_clips(train_split, arguments)


def test_the_fingerprint_of_weights_sees_a_training_step_and_no_vector():
    model = tiny_model()
    before = fingerprint_weights(model.mmser.audio_encoder)
    assert before != fingerprint_weights(tiny_model().mmser.audio_encoder)
    with torch.no_grad():
        model.mmser.audio_encoder.masked_spec_embed.add_(1)
        assert fingerprint_weights(model.mmser.audio_encoder) == before
        for parameter in model.mmser.audio_encoder.parameters():
            parameter.mul_(1.001)
    assert fingerprint_weights(model.mmser.audio_encoder) != before


# --- the folder ------------------------------------------------------------------------------------------------------


def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(started, tmp_path):
    mine = ["notes.txt", "evaluation/report.md", "checkpoint-best/weights", "data/train/metadata.csv", "model.onnx"]
    for name in (*mine, "elsewhere/file"):
        path = (tmp_path if name.startswith("elsewhere") else started) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    (started / "checkpoint-9").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    delete_run(started)
    left = {str(path.relative_to(started)) for path in started.rglob("*") if path.is_file()}
    assert {name for name in left if not name.endswith(".py")} == {*mine, run_identity.LOCK}  # that one is still held
    assert not holds_run(started) and not (started / "checkpoint-9").exists()
    assert (tmp_path / "elsewhere" / "file").read_text() == "mine"


def test_a_folder_without_a_run_is_left_alone(tmp_path):
    mine = {"README.md", "config.json", "tokenizer.json", "checkpoint-5/precious.bin", "elsewhere/file"}
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "checkpoint-6").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    delete_run(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == mine and (tmp_path / "checkpoint-6").is_symlink()


def test_a_folder_that_no_trainer_wrote_stays_beside_the_run_that_is_deleted(started, caplog):
    """Its name is that of a checkpoint."""
    (started / "checkpoint-5").mkdir()
    (started / "checkpoint-5" / "precious.bin").write_text("mine")
    (started / "checkpoint-2" / "trainer_state.json").unlink()  # a run that was killed while it saved
    caplog.set_level("INFO", logger="mmser")
    delete_run(started)
    assert [path.name for path in started.glob("checkpoint-*")] == ["checkpoint-5"]
    assert (started / "checkpoint-5" / "precious.bin").read_text() == "mine"
    told = [record.getMessage() for record in caplog.records if "--overwrite_output_dir" in record.getMessage()]
    assert len(told) == 1
    for name in ("checkpoint-1", "checkpoint-2", "model.safetensors", "eval_results.json", IDENTITY_NAME):
        assert name in told[0]
    assert "checkpoint-5" not in told[0]


def test_the_card_of_a_deleted_run_goes_unless_somebody_changed_it(started):
    (started / "model_card.md").write_text((started / "README.md").read_text())
    with open(started / "README.md", "a", encoding="utf-8") as file:
        file.write("mine\n")
    delete_run(started)
    assert [path.name for path in started.glob("*.md")] == ["README.md"]


def test_deleting_that_is_interrupted_leaves_no_checkpoint_that_looks_whole(started, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmser.run_identity.shutil.rmtree", interrupted)
    for _ in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            delete_run(started)
    newest = last_complete_checkpoint(started)
    assert newest is None or not (started / "checkpoint-2" / "trainer_state.json").exists()
    assert (started / IDENTITY_NAME).exists()


# ---- two trainings at once -----------------------------------------------------------------------------------------


def hold(folder, told):
    with lock_output_dir(SimpleNamespace(output_dir=folder, process_index=0)):
        told.set()
        signal.pause()


@pytest.fixture
def other_training(tmp_path):
    """A process that has locked the folder `run`, until it is killed. A fork imports nothing again."""
    fork = multiprocessing.get_context("fork")
    told = fork.Event()
    process = fork.Process(target=hold, args=(tmp_path / "run", told))
    process.start()
    assert told.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_second_training_in_a_folder_is_refused_until_the_first_is_gone(
    corpus, tokenizer, tmp_path, other_training, monkeypatch
):
    monkeypatch.setattr(run_identity, "PATIENCE", 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "load_data", lambda *_, **__: pytest.fail("it is refused before the work"))
        with pytest.raises(ValueError, match=r"run: another training writes into this folder\. Wait .* or give"):
            train(corpus, tmp_path / "run", tokenizer)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [run_identity.LOCK]
    other_training.kill()  # as a container or a user does it: what it leaves blocks nobody
    other_training.join()
    train(corpus, tmp_path / "run", tokenizer, max_steps=1)
    assert steps_of(tmp_path / "run") == 1
    train(corpus, tmp_path / "run", tokenizer, max_steps=2)  # nor does a training that has ended in this process
    assert steps_of(tmp_path / "run") == 2


def test_a_training_that_is_refused_leaves_no_folder(tokenizer, tmp_path):
    with pytest.raises((ValueError, OSError), match="nowhere"):
        train(tmp_path / "nowhere", tmp_path / "deep" / "run", tokenizer)
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("said", [OSError(errno.ENOSYS, "Function not implemented"), NotImplementedError("no flock")])
def test_a_file_system_without_locks_is_told(said, tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise said

    monkeypatch.setattr(FileLock, "acquire", fail)
    with lock_output_dir(SimpleNamespace(output_dir=tmp_path, process_index=0)):
        pass
    assert "is on a file system without locks" in caplog.text


def test_a_folder_that_cannot_be_locked_is_an_error_that_names_it(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / run_identity.LOCK))

    monkeypatch.setattr(FileLock, "acquire", fail)
    arguments = SimpleNamespace(output_dir=tmp_path, process_index=0)
    with pytest.raises(OSError, match="No space left"), lock_output_dir(arguments):
        pass


def test_only_the_main_process_locks(tmp_path):
    held = locked(tmp_path / "run" / run_identity.LOCK, 0)
    assert held
    with lock_output_dir(SimpleNamespace(output_dir=tmp_path / "run", process_index=1)):
        pass


def test_all_processes_of_a_second_training_are_refused(two_processes):
    """Only the first one asks for the lock: the others would wait for it."""
    said = [(two_processes / f"said{rank}").read_text() for rank in (0, 1)]
    assert all("another training writes into this folder" in line for line in said)
