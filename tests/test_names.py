# SPDX-License-Identifier: Apache-2.0
"""Tests of mmser.names: a folder, a file beside it, a name on the Hub, and what is said when there is none of them."""

import http.server
import threading
import time

import pytest
from huggingface_hub import constants
from tiny_corpus import tiny_model, tiny_processor

from mmser import model_loading, names
from mmser.arguments import TRAINING_ARGUMENTS, EvaluationArguments, ExportArguments, ModelArguments, parse_arguments
from mmser.evaluation_run import load_trainer
from mmser.export import export_checkpoint
from mmser.model_loading import load_label_names
from mmser.names import Named, checkpoint_folder, reading
from mmser.prediction_inputs import find_inputs
from mmser.training_run import load_data

AUDIO, TEXT = "--audio_model_name_or_path", "--text_model_name_or_path"
RANDOM = ("--random_audio_encoder", "--random_text_encoder")


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A machine whose network does not answer, with an empty cache; counts the attempts."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise ConnectionError("Temporary failure in name resolution")

    monkeypatch.setattr(names, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return attempts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


# --- folders and files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["best_model.pt", "model.safetensors", "pytorch_model.bin"])
def test_a_file_means_the_folder_around_it(file, checkpoint):
    """As the design document writes it; whether the file is there or not."""
    with pytest.warns(UserWarning, match=f"--checkpoint .*{file}: a checkpoint is a folder. Taking {checkpoint}"):
        options = EvaluationArguments(model_name_or_path=str(checkpoint / file))
    assert options.model_name_or_path == str(checkpoint)
    assert options.output_dir == str(checkpoint / "evaluation")
    with pytest.warns(UserWarning, match="Taking"):
        assert ExportArguments(str(checkpoint / file), "out").model_name_or_path == str(checkpoint)
    with pytest.warns(UserWarning, match="--model_name_or_path"):
        assert ModelArguments(model_name_or_path=str(checkpoint / file)).model_name_or_path == str(checkpoint)


def test_a_file_may_stand_for_the_folder_of_its_name(checkpoint):
    with pytest.warns(UserWarning, match="Taking"):
        assert checkpoint_folder(f"{checkpoint}.pt", "--checkpoint") == str(checkpoint)


def test_folders_and_names_stay_as_they_are(checkpoint, recwarn):
    assert checkpoint_folder(str(checkpoint), "--checkpoint") == str(checkpoint)
    for name in ("me/model", "model", "me/model-1.5"):
        assert checkpoint_folder(name, "--checkpoint") == name
    assert not recwarn.list


def test_what_is_no_checkpoint_is_said(tmp_path, checkpoint):
    def error_of(name, message):
        with pytest.raises(FileNotFoundError, match=message):
            checkpoint_folder(str(name), "--checkpoint")

    error_of("./gone", r"^--checkpoint ./gone does not exist")
    error_of(tmp_path / "gone", "gone does not exist; a checkpoint is a folder, or a name on the Hub")
    error_of("a/b/c", "^--checkpoint a/b/c does not exist")
    error_of("./checkpoints/best_model.pt", "best_model.pt does not exist")
    (tmp_path / "notes.txt").write_text("")
    error_of(tmp_path / "notes.txt", "notes.txt is a file; a checkpoint is a folder with config.json")
    error_of(checkpoint.parent, f"is no model: it has no config.json. Is {checkpoint} meant?")
    (tmp_path / "empty").mkdir()
    error_of(tmp_path / "empty", r"empty is no model: it has no config.json.$")


def test_damaged_weights_are_named(tmp_path, checkpoint):
    tiny_model().save_pretrained(tmp_path / "half")
    weights = tmp_path / "half" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match=f"--checkpoint {tmp_path}/half cannot be read: ") as raised:
        export_checkpoint(tmp_path / "half", tmp_path / "out")
    assert "\n" not in str(raised.value)
    weights.unlink()
    with pytest.raises(OSError, match=f"--checkpoint {tmp_path}/half cannot be read: .*model.safetensors"):
        load_trainer(str(tmp_path / "half"), None, None)


# --- the Hub ---------------------------------------------------------------------------------------------------------


def training(*words):
    return parse_arguments(TRAINING_ARGUMENTS, [*words, "--use_cpu"])[0]


def test_without_a_network_a_name_fails_at_once_and_the_cause_is_said(no_hub):
    start = time.monotonic()
    with pytest.raises(FileNotFoundError) as raised:
        load_label_names("me/model")
    assert str(raised.value) == (
        "--checkpoint me/model is neither a folder nor in the cache of the Hub, and the Hub cannot be reached "
        "(ConnectionError)."
    )
    with (
        pytest.raises(FileNotFoundError, match="--teacher_name_or_path"),
        reading([Named("--teacher_name_or_path", "a")]),
    ):
        pass
    assert time.monotonic() - start < 3 and len(no_hub) == 2
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("words", "flag", "advice"),
    [
        ((), f"{AUDIO} facebook/wav2vec2-base", "start the audio encoder at random with --random_audio_encoder"),
        (
            RANDOM[:1],
            f"{TEXT} google-bert/bert-base-multilingual-cased",
            "start the text encoder at random with --random_text_encoder and give a folder with a tokenizer",
        ),
        (RANDOM, TEXT, "give a folder with a tokenizer in --tokenizer_name"),
        (("--model_name_or_path", "me/model"), "--model_name_or_path me/model", ""),
    ],
)
def test_a_missing_encoder_says_how_to_do_without(words, flag, advice, no_hub):
    with pytest.raises(FileNotFoundError) as raised:
        model_loading.load_processor(training(*words))
    assert str(raised.value).startswith(flag) and advice in str(raised.value) and "\n" not in str(raised.value)


def test_two_random_encoders_and_a_tokenizer_need_no_hub(no_hub, checkpoint):
    words = ("--random_audio_encoder", "--random_text_encoder", "--tokenizer_name", str(checkpoint))
    assert model_loading.load_processor(training(*words)).tokenizer is not None
    assert no_hub == []


@pytest.mark.parametrize("status", [407, 429, 502, 503])
def test_a_hub_that_does_not_work_is_asked_once(status, monkeypatch, tmp_path):
    """Libraries try such an address again and again, for each file: that takes minutes."""
    asked = []

    class Broken(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    template = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    try:
        said = f"--checkpoint me/absent is neither a folder nor .* the Hub cannot be reached .*answers {status}"
        with pytest.raises(FileNotFoundError, match=said), reading([Named("--checkpoint", "me/absent")]):
            pass
    finally:
        server.shutdown()
        server.server_close()
    assert len(asked) == 1


def test_the_cache_is_read_when_the_hub_cannot_be_reached(no_hub, monkeypatch):
    monkeypatch.setattr(names, "try_to_load_from_cache", lambda *_: "somewhere/config.json")
    with reading([Named("--checkpoint", "me/model")]):
        assert constants.HF_HUB_OFFLINE is True  # no attempt for each file
    assert constants.HF_HUB_OFFLINE is False and len(no_hub) == 1


def test_a_data_set_that_cannot_be_reached_is_said_at_once(no_hub):
    _, data, _ = parse_arguments(TRAINING_ARGUMENTS, ["--dataset_name", "me/nothing", "--use_cpu"])
    start = time.monotonic()
    with pytest.raises(OSError, match="--dataset_name me/nothing cannot be read: Couldn't reach") as raised:
        load_data(data, 0)
    assert time.monotonic() - start < 5 and "\n" not in str(raised.value) and len(no_hub) == 1


def test_a_user_who_is_offline_is_not_asked_for_a_network(no_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="in the cache of the Hub, and HF_HUB_OFFLINE is set"):
        load_label_names("me/model")
    assert no_hub == [] and constants.HF_HUB_OFFLINE is True


def test_errors_of_other_kinds_pass(checkpoint):
    with pytest.raises(KeyError), reading([Named("--checkpoint", str(checkpoint))]):
        {}["key"]


def test_a_folder_of_nearly_that_name_is_asked_about(tmp_path, monkeypatch):
    """A checkpoint that is misspelt looks like a name on the Hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "calls").mkdir(parents=True)
    (tmp_path / "runs" / "calls" / "clip.wav").touch()
    for name in ("runs/cals", "run/calls"):
        error = Named("--checkpoint", name).error("is neither a folder nor on the Hub.")
        assert str(error) == f"--checkpoint {name} is neither a folder nor on the Hub. Did you mean runs/calls?"
    error = Named("--checkpoint", "user/other").error("is neither a folder nor on the Hub.")
    assert str(error) == "--checkpoint user/other is neither a folder nor on the Hub."
    with pytest.raises(FileNotFoundError, match=r"a name on the Hub\. Did you mean runs/calls\?"):
        checkpoint_folder("./runs/cals", "--checkpoint")
    with pytest.raises(FileNotFoundError, match=r"no such file or folder\. Did you mean runs/calls/clip\.wav\?"):
        find_inputs(["runs/calls/klip.wav"])
