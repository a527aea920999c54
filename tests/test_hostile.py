# SPDX-License-Identifier: Apache-2.0
"""Tests of what a checkpoint of a stranger, or a damaged one, cannot do: see SECURITY.md."""

import contextlib
import errno
import itertools
import json
import multiprocessing.reduction
import os
import pickle
import re
import sys
import time

import numpy as np
import pytest
import soundfile
import tiny_corpus
import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from test_corpus_command import emodb
from tiny import tiny_config, tiny_model
from transformers import (
    AutoModelForAudioClassification,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    pipeline,
)

import audio_mmser
import eval_hf
import export_hf
import predict_hf
import train_hf
from audio_mmser import audio_length, load_audio, stream_audio, why_silent
from configuration_mmser import MMSERConfig
from mmser import corpus_command, explain_command
from mmser.app_answers import Answers
from mmser.arguments import ModelArguments, read_recipe
from mmser.division import divide_again
from mmser.examples import EmotionDataset, ExampleReader, content_sample
from mmser.handler import EndpointHandler
from mmser.label_map import read_label_map
from mmser.loading import load_emotion_dataset, load_emotion_split
from mmser.model_loading import load_model, load_processor, random_encoder_config
from mmser.names import Named, reading
from mmser.prediction_arguments import default_checkpoint
from mmser.prediction_inputs import find_inputs
from mmser.prediction_run import load_classifier
from mmser.publishing import complete_page, publish
from mmser.timed_files import read_rttm, read_srt
from mmser.vocabulary import read_texts
from modeling_mmser import MMSERForAudioClassification, MMSERModel
from processing_mmser import MMSERPipeline, MMSERProcessor, load_feature_extractor

BOX = str(default_checkpoint())
ONE_STEP = ("--max_steps", "1", "--save_strategy", "no")
ALONE = ("--use_cpu", "--dataloader_num_workers", "0")  # workers get their tensors from each other by pickle


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of a tiny model."""
    tiny_model(classifier_num_layers=3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder, *path, to):
    """Write another value into `config.json`."""
    config = json.loads((folder / "config.json").read_text())
    part = config
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = to
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("classifier_num_layers",), 10**6),
        (("classifier_hidden_size",), 10**8),
        (("feature_size",), 10**9),
        (("prototypes_per_class",), 10**9),
        (("openmax_centroids_per_class",), 10**9),
        (("num_labels",), 10**9),
        (("audio_config", "hidden_size"), 10**8),
        (("audio_config", "conv_dim"), [10**8] * 7),
        (("audio_config", "num_hidden_layers"), 10**6),
        (("text_config", "vocab_size"), 10**12),
    ],
)
def test_a_configuration_that_fills_the_memory_is_refused_by_name(folder, path, value):
    change(folder, *path, to=value)
    start = time.monotonic()
    with pytest.raises((ValueError, StrictDataclassError), match=rf"`{re.escape('.'.join(path))}` must be at most"):
        MMSERForAudioClassification.from_pretrained(folder)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        (
            {"classifier_hidden_size": 65_536, "classifier_num_layers": 1024},
            ("classifier_num_layers", "classifier_hidden_size", "classifier_bottleneck"),
        ),
        ({"feature_size": 65_536, "anchor_size": 65_536}, ("feature_size", "anchor_size")),
        ({"feature_size": 65_536, "uncertainty_hidden_size": 65_536}, ("feature_size", "uncertainty_hidden_size")),
        ({"feature_size": 65_536, "classifier_hidden_size": 65_536}, ("classifier_hidden_size", "feature_size")),
        (
            {"openmax_centroids_per_class": 65_536, "fusion_hidden_size": 8_192},
            ("num_labels", "openmax_centroids_per_class", "fusion_hidden_size"),
        ),
        (
            {"num_labels": 65_536, "id2label": None, "prototypes_per_class": 64, "feature_size": 4096},
            ("num_labels", "prototypes_per_class", "feature_size"),
        ),
        (
            {"fusion_hidden_size": 65_536, "audio_config": {"model_type": "wav2vec2", "hidden_size": 8_192}},
            ("fusion_hidden_size", "audio_config.hidden_size"),
        ),
        (
            {"fusion_type": "transformer", "fusion_hidden_size": 65_536, "fusion_num_layers": 1024},
            ("fusion_num_layers", "fusion_hidden_size"),
        ),
        ({"auxiliary_tasks": {"age": "regression"}, "feature_size": 65_536, "auxiliary_hidden_size": 65_536}, ()),
        (
            {"audio_config": {"model_type": "wav2vec2", "num_hidden_layers": 1000, "hidden_size": 65_536}},
            ("audio_config.num_hidden_layers", "audio_config.hidden_size", "audio_config.intermediate_size"),
        ),
        (
            {"audio_config": {"model_type": "whisper", "encoder_layers": 1000, "d_model": 65_536}},
            ("audio_config.num_hidden_layers", "audio_config.hidden_size", "audio_config.encoder_ffn_dim"),
        ),
        (
            {"audio_config": {"model_type": "wav2vec2", "num_conv_pos_embeddings": 2**24}},
            ("audio_config.num_conv_pos_embeddings", "audio_config.hidden_size"),
        ),
        (
            {"audio_config": {"model_type": "wav2vec2", "conv_dim": [65_536] * 7}},
            ("audio_config.conv_dim", "audio_config.conv_kernel"),
        ),
        (
            {"text_config": {"model_type": "bert", "max_position_embeddings": 2**24}},
            ("text_config.max_position_embeddings", "text_config.hidden_size"),
        ),
        (
            {"text_config": {"model_type": "bert", "vocab_size": 2**24, "hidden_size": 8_192}},
            ("text_config.vocab_size", "text_config.hidden_size"),
        ),
    ],
)
def test_sizes_that_fill_the_memory_together_are_refused_by_name(given, fields):
    """Each of them alone is within its bound."""
    said = ", ".join(f"`{field}`" for field in fields)
    with pytest.raises(
        (ValueError, StrictDataclassError), match=rf"{re.escape(said)}.* together ask for [\d,]+ weights"
    ):
        MMSERConfig.from_dict({**tiny_config().to_dict(), **given})


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("classifier_num_layers",), 5, r"has none for classifier\.blocks\.3\."),
        (("classifier_num_layers",), 2, r"also has weights for classifier\.blocks\.2\."),
        (("text_config", "num_hidden_layers"), 5, r"has none for mmser\.text_encoder\."),
    ],
)
def test_layers_that_the_weights_do_not_have_are_an_error_and_never_random(folder, path, value, said):
    change(folder, *path, to=value)
    with pytest.raises(ValueError, match=f"The configuration of .* is not that of its weights: the file {said}"):
        MMSERForAudioClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    ("path", "value", "name", "stored", "asked"),
    [
        (("feature_size",), 24, "anchors.projection.weight", [8, 16], [8, 24]),
        (("anchor_size",), 12, "anchors.anchors", [4, 8], [4, 12]),
        (("text_config", "vocab_size"), 90, "mmser.text_encoder.embeddings.word_embeddings.weight", None, None),
    ],
)
def test_training_refuses_sizes_that_nobody_asked_for(folder, path, value, name, stored, asked):
    """Else the layers would start at random; with --config_overrides it is what the user asks for."""
    labels = ["neutral", "happy", "sad", "angry"]
    overrides = {path[0]: value} if len(path) == 1 else {"feature_size": 24}
    arguments = ModelArguments(model_name_or_path=str(folder), config_overrides=overrides)
    model = load_model(arguments, labels, tiny_corpus.tiny_processor())
    assert all(getattr(model.config, key) == size for key, size in overrides.items())
    change(folder, *path, to=value)
    shapes = rf"{re.escape(str(stored))} in the weights and {re.escape(str(asked))} by config" if stored else ""
    for given in ({}, {"fusion_dropout": 0.2}, {"uncertainty_hidden_size": 12}):
        arguments = ModelArguments(model_name_or_path=str(folder), config_overrides=given)
        with pytest.raises(ValueError, match=rf"is not that of its weights: {re.escape(name)} is {shapes}"):
            load_model(arguments, [*labels, "bored"], tiny_corpus.tiny_processor())


def test_a_backbone_gets_a_new_head_and_a_model_without_head_takes_a_checkpoint_with_one(folder, tmp_path):
    backbone = MMSERModel.from_pretrained(folder)
    backbone.save_pretrained(tmp_path / "backbone")
    whole = MMSERForAudioClassification.from_pretrained(tmp_path / "backbone")
    for name, weight in backbone.state_dict().items():
        assert torch.equal(weight, whole.state_dict()[f"mmser.{name}"])
    model, report = MMSERForAudioClassification.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, MMSERForAudioClassification) and not report["missing_keys"]


def loads(folder):
    """The ways that read a folder of a model, each with its name."""
    config, other = MMSERConfig.from_pretrained(folder), folder.with_name("other")
    yield "model", lambda: MMSERForAudioClassification.from_pretrained(folder)
    yield "model with its configuration", lambda: MMSERForAudioClassification.from_pretrained(folder, config=config)
    yield "subfolder", lambda: MMSERForAudioClassification.from_pretrained(folder.parent, subfolder=folder.name)
    yield "configuration", lambda: MMSERConfig.from_pretrained(folder)
    yield "processor", lambda: MMSERProcessor.from_pretrained(folder)
    yield "encoder", lambda: MMSERForAudioClassification.from_backbones(str(folder), None)
    yield "pipeline", lambda: load_classifier(str(folder))
    yield "export", lambda: MMSERPipeline.from_onnx(folder)
    yield "page", lambda: complete_page(folder, other, "me/model")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "notes.txt"]
)
@pytest.mark.parametrize("kind", ["file", "device", "pipe"])
def test_a_file_of_a_model_is_no_link_out_of_its_folder(folder, tmp_path_factory, name, kind):
    """It could be private, and go to the Hub with the model; or one that never ends."""
    tiny_corpus.tiny_processor().save_pretrained(folder)
    ways = list(loads(folder))
    inside, target = folder / name, tmp_path_factory.mktemp("private") / "file"
    (folder / "notes.txt").write_text("mine")
    os.replace(inside, target)
    if kind == "pipe":
        os.mkfifo(inside)
    else:
        inside.symlink_to(target if kind == "file" else "/dev/zero")
    said = "is a folder, a device or a pipe" if kind == "pipe" else r"is a link out of its folder, to .*, and is not"
    for way, load in ways:
        if way == "page" and name == "config.json" and kind != "file":
            continue  # it says that there is none
        with pytest.raises(ValueError, match=rf"^{re.escape(str(inside))} {said}"):
            load()


def test_a_picture_of_a_model_is_no_link_out_of_its_folder_either(folder, tmp_path):
    (tmp_path / "private.png").write_bytes(b"mine")
    (folder / "evaluation" / "plots").mkdir(parents=True)
    (folder / "evaluation" / "plots" / "a.png").symlink_to(tmp_path / "private.png")
    with pytest.raises(ValueError, match=r"plots/a\.png is a link out of its folder"):
        complete_page(folder, tmp_path / "page", "me/model")


def shard(folder, prefix=""):
    """Let an index name the weights, under another name."""
    names = load_file(folder / "model.safetensors")
    (folder / "sub").mkdir(exist_ok=True)
    os.replace(folder / "model.safetensors", folder / "sub" / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, f"{prefix}sub/part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_links_within_a_folder_and_parts_of_weights_below_it_are_read(folder, tmp_path, monkeypatch):
    (folder / "blob").mkdir()
    os.replace(folder / "config.json", folder / "blob" / "a")
    (folder / "config.json").symlink_to("blob/a")
    assert MMSERForAudioClassification.from_pretrained(folder)
    shard(folder)
    (tmp_path / "link").symlink_to(folder)
    assert MMSERForAudioClassification.from_pretrained(tmp_path / "link")
    part = folder / "sub" / "part.safetensors"
    os.replace(part, tmp_path / "a")
    part.symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match=r"part\.safetensors is a link out of its folder"):
        MMSERForAudioClassification.from_pretrained(folder)
    (tmp_path / "cache").mkdir()  # of the Hub, into which older versions of its library made links
    os.replace(tmp_path / "a", tmp_path / "cache" / "a")
    part.unlink()
    part.symlink_to(tmp_path / "cache" / "a")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert MMSERForAudioClassification.from_pretrained(folder)


def test_a_snapshot_of_the_hub_holds_links(folder, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        os.replace(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert MMSERForAudioClassification.from_pretrained(snapshot)
    (blobs / "model.safetensors").replace(tmp_path / "elsewhere")
    (blobs / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"model\.safetensors is a link out of its folder"):
        MMSERForAudioClassification.from_pretrained(snapshot)


@pytest.mark.parametrize("prefix", ["../model/", "{}/", "sub/../../model/", "..\\model\\", "C:\\", "C:"])
def test_an_index_names_no_weights_outside_of_its_folder(folder, prefix):
    ways = list(loads(folder))
    shard(folder, prefix.format(folder))
    for _, load in ways:
        with pytest.raises(
            ValueError, match=r"model\.safetensors\.index\.json names '.*' for weights, which is not in its folder"
        ):
            load()


@pytest.mark.parametrize(
    "content",
    ["[", "[" * 100_000, "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ""}}'],
)
def test_an_index_that_is_none_is_named(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is no index of weights: "):
        MMSERForAudioClassification.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_brackets_without_end_are_an_error_that_names_the_file(folder, name):
    tiny_corpus.tiny_processor().save_pretrained(folder)
    (folder / name).write_text("[" * 100_000)
    with pytest.raises(OSError, match=rf"^--checkpoint .* cannot be read: .*{re.escape(name)} is nested too deep\.$"):
        load_classifier(str(folder))


def test_an_endless_recursion_of_the_program_is_not_blamed_on_a_file(folder):
    with pytest.raises(RecursionError), reading([Named("--checkpoint", str(folder))]):
        raise RecursionError


def test_cut_weights_are_an_error_in_a_sentence(folder):
    tiny_corpus.tiny_processor().save_pretrained(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(
        OSError, match=r"^--checkpoint .* cannot be read: its weights \(\.safetensors\) are cut or damaged"
    ):
        load_classifier(str(folder))


@pytest.mark.parametrize(
    ("lora", "field"),
    [
        ({"audio": {"base": "/etc"}}, "bases"),
        ({"bases": ["audio"], "rank": 2, "alpha": 4}, "bases"),
        ({"bases": {"video": {"name": "x", "fingerprint": "y"}}, "rank": 2, "alpha": 4}, "bases"),
        ({"bases": {"audio": {"name": "x"}}, "rank": 2, "alpha": 4}, "bases"),
        ({"bases": {"audio": {"name": "x", "fingerprint": 3}}, "rank": 2, "alpha": 4}, "bases"),
        ({"bases": {}, "rank": 0, "alpha": 4}, "rank"),
        ({"bases": {}, "alpha": 4}, "rank"),
        ({"bases": {}, "rank": 2, "alpha": "4"}, "alpha"),
    ],
)
def test_adapters_that_say_nothing_of_their_encoders_are_refused_by_name(folder, lora, field):
    change(folder, "lora", to=lora)
    with pytest.raises(ValueError, match=rf"`lora\.{field}` in config\.json of .* must "):
        MMSERForAudioClassification.from_pretrained(folder)


def test_a_pipeline_says_why_a_checkpoint_does_not_load(folder):
    """And not that the original errors, which are a traceback, say so."""
    tiny_corpus.tiny_processor().save_pretrained(folder)
    change(folder, "lora", to={"bases": None})
    with pytest.raises(ValueError, match=r"^`lora\.bases` in config\.json of .* must have") as caught:
        load_classifier(str(folder))
    assert "Traceback" not in str(caught.value)


def refuse(*_, **__):
    raise AssertionError("something was unpickled")


watched: list[bool] = []  # whether a class that a pickle names is an error now


def watch(event, arguments):
    if watched and event == "pickle.find_class":  # whatever name the function has that unpickles
        raise AssertionError(f"something was unpickled: {arguments}")


@pytest.fixture(scope="module")
def watcher():
    sys.addaudithook(watch)  # it stays, as Python has it


@pytest.fixture
def without_pickle(watcher, monkeypatch):
    """From its call on nothing can be unpickled, neither by `pickle` nor by another library's name for it."""

    def start():
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(pickle, name, refuse)
        watched.append(True)

    yield start
    watched.clear()


def test_the_watch_sees_pickles(without_pickle, tmp_path):
    """Else the next tests could not fail."""
    content, unpickle = pickle.dumps(tmp_path), pickle.loads
    torch.save(torch.ones(1), tmp_path / "a.pt")
    np.save(tmp_path / "a.npy", np.array([tmp_path]), allow_pickle=True)
    ways = [
        lambda: pickle.loads(content),
        lambda: unpickle(content),
        lambda: torch.load(tmp_path / "a.pt", weights_only=False),
        lambda: np.load(tmp_path / "a.npy", allow_pickle=True),
        lambda: multiprocessing.reduction.ForkingPickler.loads(content),
    ]
    assert unpickle(content) == tmp_path
    without_pickle()
    for way in ways:
        with pytest.raises((AssertionError, TypeError)):
            way()
    assert torch.load(tmp_path / "a.pt", weights_only=True) == 1


def test_nothing_is_unpickled(tmp_path, corpus, tokenizer, without_pickle, quiet):
    """Training, going on from a checkpoint on the way, loading and classifying need no pickle."""
    flags = {
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "no",
        "dataloader_num_workers": 0,
    }
    train_hf.main(tiny_corpus.tiny_flags(corpus, tmp_path / "run", tokenizer, **flags))
    without_pickle()
    train_hf.main(tiny_corpus.tiny_flags(corpus, tmp_path / "run", tokenizer, **{**flags, "max_steps": 3}))
    classify = pipeline("audio-classification", model=str(tmp_path / "run"), trust_remote_code=True)
    assert classify(str(next((corpus / "test").glob("*.wav"))))
    assert AutoModelForAudioClassification.from_pretrained(tmp_path / "run", trust_remote_code=True)


def run_predict(corpus, folder, _):
    assert predict_hf.main([str(corpus / "test"), "--checkpoint", BOX, "--output", str(folder / "a.parquet")]) == 0
    assert predict_hf.main([str(corpus / "test"), "--checkpoint", BOX, "--output_dir", str(folder / "parts")]) == 0


def run_explain(corpus, folder, _):
    explain_command.main([str(corpus / "test" / "5_1.wav"), "--checkpoint", BOX, "--window", "0.2"])


def run_eval(corpus, folder, _):
    given = ["--checkpoint", BOX, "--data_dir", str(corpus), "--ood_dir", str(corpus / "ood")]
    eval_hf.main([*given, "--output_dir", str(folder / "report"), "--bootstrap_samples", "5", *ALONE])


def in_floats(folder):
    """A checkpoint that can be exported and trained; that in the box is in int8."""
    for part in (tiny_corpus.tiny_model(), tiny_corpus.tiny_processor()):
        part.save_pretrained(folder / "floats")
    return str(folder / "floats")


def run_export(corpus, folder, _):
    export_hf.main(["--checkpoint", in_floats(folder), "--output_dir", str(folder / "x"), "--format", "safetensors"])
    assert load_classifier(str(folder / "x"))(str(corpus / "test" / "5_1.wav"))


def run_serve(corpus, folder, _):
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from mmser.serving import Limits, create_app

    client = TestClient(create_app(load_classifier(BOX), Limits(), BOX))
    answer = client.post("/classify", files={"file": (corpus / "test" / "5_1.wav").read_bytes()}, data={"text": "no"})
    assert answer.status_code == 200 and answer.json()["label"]


def run_cache(corpus, folder, _):
    given = ["--model_name_or_path", in_floats(folder), "--data_dir", str(corpus), *ALONE]
    given += ["--freeze_audio", "--freeze_text", "--cache_encoder_states", str(folder / "states"), *ONE_STEP]
    for name in ("first", "second"):  # which reads what the first has kept
        train_hf.main([*given, "--output_dir", str(folder / name)])


def run_search(corpus, folder, tokenizer):
    pytest.importorskip("optuna")
    for trials in (1, 2):  # the second goes on
        train_hf.main(tiny_corpus.tiny_flags(corpus, folder / "runs", tokenizer, max_steps=1, hp_search=trials))


def run_corpus(corpus, folder, _):
    emodb(folder / "emodb")
    words = ["emodb", "--input", str(folder / "emodb"), "--output", str(folder / "data")]
    assert corpus_command.main(words) == 0
    assert load_emotion_dataset(folder / "data", allow_outside_files=True)


def run_adapt(corpus, folder, _):
    given = ["--adapt", "--model_name_or_path", BOX, "--data_dir", str(corpus), "--output_dir", str(folder / "own")]
    train_hf.main([*given, *ALONE])


def run_push(corpus, folder, _):
    assert publish(BOX, "me/model", dry_run=True)


def run_page(corpus, folder, _):
    pytest.importorskip("matplotlib")
    assert Answers(load_classifier(BOX), BOX, 60.0).many([str(path) for path in (corpus / "test").glob("*.wav")])


COMMANDS = {name.removeprefix("run_"): function for name, function in globals().items() if name.startswith("run_")}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_unpickles(command, tmp_path, corpus, tokenizer, without_pickle, quiet, capsys):
    without_pickle()
    COMMANDS[command](corpus, tmp_path, tokenizer)


def test_an_export_to_onnx_is_used_without_pickle(corpus, shared, without_pickle):
    """It is made of what the export to safetensors reads as well."""
    pytest.importorskip("onnxscript")
    import test_export

    if torch.__version__ < test_export.EXPORTS_SINCE:
        pytest.skip(f"needs torch {test_export.EXPORTS_SINCE}")
    folder = shared("export_wav2vec2", test_export.make_wav2vec2)
    without_pickle()
    assert load_classifier(str(folder / "onnx"))(str(corpus / "test" / "5_1.wav"))


def onnx_file(path, inputs=("x",), place=None):
    """A graph that adds weights, which are in another file if there is a `place`, and the notes of an export."""
    onnx = pytest.importorskip("onnx")
    kind = onnx.TensorProto.FLOAT
    weights = onnx.numpy_helper.from_array(np.zeros(4, dtype=np.float32), "w")
    if place is not None:
        weights.ClearField("raw_data")
        weights.data_location = onnx.TensorProto.EXTERNAL
        weights.external_data.add(key="location", value=str(place))
    nodes = [onnx.helper.make_node("Add", [inputs[0], "w"], ["y"])]
    given, made = ([onnx.helper.make_tensor_value_info(name, kind, [4]) for name in names] for names in (inputs, "y"))
    graph = onnx.helper.make_graph(nodes, "g", given, made, [weights])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.helper.set_model_props(model, {"config": "{}"})
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("kind", ["empty", "junk", "cut", "weights above", "weights behind a link", "other inputs"])
def test_an_export_that_is_damaged_or_reads_other_files_is_one_sentence(tmp_path, kind):
    pytest.importorskip("onnxruntime")
    (folder := tmp_path / "onnx").mkdir()
    path, said = folder / "model.onnx", r"model\.onnx cannot be read as an ONNX model: \S[^\n]*$"
    (tmp_path / "private").write_bytes(bytes(16))
    if kind in ("empty", "junk"):
        path.write_bytes(b"" if kind == "empty" else bytes(range(200)))
    elif kind.startswith("weights"):
        onnx_file(path, place="../private" if kind == "weights above" else "link")
        if kind == "weights behind a link":
            (folder / "link").symlink_to(tmp_path / "private")
            said = "link is a link out of its folder"
    else:
        onnx_file(path)
        said = r"The model is damaged: its inputs are \['x'\], and none of input_values, "
        if kind == "cut":
            path.write_bytes(path.read_bytes()[:-40])
            said = r"model\.onnx cannot be read as an ONNX model: \S[^\n]*$"
    with pytest.raises(ValueError, match=said):
        MMSERPipeline.from_onnx(folder)


def foreign_code(folder, where):
    """Let a checkpoint or an encoder name code of its own in one of its files; returns what that code would write."""
    names = ("Config", "Model", "ModelForAudioClassification", "Processor", "FeatureExtractor")
    auto_map = {**{f"Auto{name}": "evil.Evil" for name in names}, "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    task = {"impl": "evil.Evil", "pt": ["AutoModelForAudioClassification"], "type": "audio"}
    file, change = {
        "model": ("config", {"auto_map": auto_map}),
        "encoder": ("config", {"auto_map": auto_map, "model_type": "evil"}),
        "pipeline": ("config", {"custom_pipelines": {"audio-classification": task}}),
        "processor": ("processor_config", {"auto_map": auto_map, "processor_class": "Evil"}),
        "feature extractor": (
            "processor_config",
            {"feature_extractor": {"auto_map": auto_map, "feature_extractor_type": "Evil"}},
        ),
        "tokenizer": ("tokenizer_config", {"auto_map": auto_map, "tokenizer_class": "Evil"}),
    }[where]
    path, owned = folder / f"{file}.json", folder / "owned"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **change}))
    (folder / "evil.py").write_text(f"open({str(owned)!r}, 'w').close()\nclass Evil:\n    pass\n")
    return owned


@pytest.mark.parametrize("where", ["model", "encoder", "pipeline", "processor", "feature extractor", "tokenizer"])
def test_code_in_a_folder_is_neither_run_nor_asked_about(folder, where, monkeypatch, quiet):
    """Transformers asks on the terminal whether it may run, where it is not told: one key away from running it."""

    asked = []
    tiny_corpus.tiny_processor().save_pretrained(folder)
    ways = [load for name, load in loads(folder) if name not in ("export", "page")]
    given = {"audio_model_name_or_path": str(folder), "text_model_name_or_path": str(folder)}
    given |= {"tokenizer_name": str(folder)}
    ways.append(lambda: load_processor(ModelArguments(**given)))
    ways.append(lambda: load_processor(ModelArguments(model_name_or_path=str(folder))))
    ways.append(lambda: random_encoder_config("audio", ModelArguments(**given)))
    owned = foreign_code(folder, where)
    monkeypatch.setattr("builtins.input", lambda words: asked.append(words) or "y")
    for load in ways:
        with contextlib.suppress(ValueError, OSError, StrictDataclassError):  # it may be refused
            load()
        assert not asked and not owned.exists()


def test_weights_in_a_pickle_run_nothing(folder, tmp_path):
    """A checkpoint whose weights are a pickle that would write a file."""

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    (folder / "model.safetensors").unlink()
    torch.save({"classifier.output.weight": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises((pickle.UnpicklingError, OSError, ValueError)):
        MMSERForAudioClassification.from_pretrained(folder)
    assert not (tmp_path / "owned").exists()


def test_a_huge_number_of_labels_is_refused():
    with pytest.raises(ValueError, match="`num_labels` must be at most 65,536, got 1,000,000,000"):
        MMSERConfig(num_labels=10**9)


@pytest.mark.parametrize(("rate", "length"), [(16_000, 300_000), (1_000, 30_000), (96_000, 300_000)])
@pytest.mark.parametrize("way", ["libsndfile", "PyAV"])
@pytest.mark.parametrize("form", ["file", "bytes"])
def test_a_small_file_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch, rate, length, way, form):
    """An hour of silence in FLAC, also one of few samples at a low rate; as long as a clip it may be all silence."""
    path = tmp_path / "a.flac"
    if way == "libsndfile":
        soundfile.write(path, np.zeros(length, dtype=np.float32), rate)
    else:
        av = pytest.importorskip("av")
        path = tmp_path / "a.m4a"
        with av.open(str(path), "w") as output:
            stream = output.add_stream("alac", rate=rate, layout="mono", format="s16p")
            for start in range(0, length, 4096):
                silence = np.zeros((1, min(4096, length - start)), dtype=np.int16)
                frame = av.AudioFrame.from_ndarray(silence, "s16p", "mono")
                frame.sample_rate, frame.pts = rate, start
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
    audio = path if form == "file" else path.read_bytes()
    expected = length * 16_000 // rate
    assert len(load_audio(audio)) == pytest.approx(expected, abs=1)
    monkeypatch.setattr(audio_mmser, "MANY_SAMPLES", 200_000)
    with pytest.raises(ValueError, match=r"more than 256 times as many become.*chunk_length_s"):
        load_audio(audio)
    blocks = list(stream_audio(audio))
    assert sum(map(len, blocks)) == pytest.approx(expected, abs=1)
    assert max(map(len, blocks)) <= 161_000  # a block at a time, of 10 s


READERS = [load_audio, audio_length, why_silent, lambda audio: list(stream_audio(audio))]


@pytest.mark.parametrize("read", READERS, ids=["load", "length", "silent", "stream"])
def test_a_device_or_a_pipe_is_never_read(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "device.wav").symlink_to("/dev/zero")
    for name in ("pipe.wav", "device.wav"):
        with pytest.raises(ValueError, match=rf"{re.escape(name)}': this is a device or a pipe, not an audio file"):
            read(tmp_path / name)


def test_the_pipeline_and_the_rows_of_data_read_no_pipe_either(tmp_path):
    classifier = MMSERPipeline(tiny_corpus.tiny_model().eval(), processor=tiny_corpus.tiny_processor(), device="cpu")
    os.mkfifo(tmp_path / "pipe.wav")
    for options in ({}, {"chunk_length_s": 1.0}):
        with pytest.raises(ValueError, match="this is a device or a pipe"):
            classifier(str(tmp_path / "pipe.wav"), **options)
    row = {"row": "row 1", "audio": str(tmp_path / "pipe.wav"), "labels": 0}
    for read in (lambda row: EmotionDataset([row])[0], ExampleReader().content, content_sample):
        with pytest.raises(ValueError, match=r"row 1: .*this is a device or a pipe"):
            read(row)


@pytest.mark.skipif(os.name == "nt", reason="a file of Windows is not sparse by itself")
def test_a_file_longer_than_any_memory_is_refused_and_is_a_bad_row(tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, np.zeros(1600), 16_000)
    os.truncate(path, 200 * 2**30)
    with pytest.raises(ValueError, match=r"long\.wav': of 214,748,364,800 bytes, and at most 4,294,967,296 are read"):
        load_audio(path)
    with pytest.raises(ValueError, match=r"row 1: .*long\.wav.* are read whole"):
        EmotionDataset([{"row": "row 1", "audio": str(path), "labels": 0}])[0]


def test_a_file_that_cannot_be_mapped_is_refused_by_name(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", np.zeros(1600), 16_000)

    def fail(*_, **__):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(audio_mmser.mmap, "mmap", fail)
    for read in (audio_length, lambda audio: list(stream_audio(audio))):
        with pytest.raises(ValueError, match=r"a\.wav': of 3,244 bytes, which do not fit into memory"):
            read(tmp_path / "a.wav")


def test_predict_says_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(ValueError, match=r"pipe\.wav: this is a device or a pipe, and is never read as audio"):
        find_inputs([str(tmp_path)])
    soundfile.write(tmp_path / "a.wav", np.zeros(1600), 16_000)
    assert [one.error for one in find_inputs([str(tmp_path)])] == [
        "",
        "this is a device or a pipe, and is never read as audio",
    ]


@pytest.fixture
def whole(tmp_path):
    """Writes a checkpoint with its processor."""

    def write(whisper=False):
        tiny_corpus.tiny_model(whisper=whisper).save_pretrained(tmp_path / "whole")
        tiny_corpus.tiny_processor(whisper).save_pretrained(tmp_path / "whole")
        return tmp_path / "whole"

    return write


def rewrite(path, *keys, to):
    """Write another value into a JSON file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    part = values
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = to
    path.write_text(json.dumps(values), encoding="utf-8")


WRONG = [
    *(("wav2vec2", "sampling_rate", value) for value in (10**7, 10**9, 10**12, 0, -1, "x", float("nan"), None, True)),
    *(("wav2vec2", "padding_value", value) for value in (float("nan"), "0", 1e300)),
    ("wav2vec2", "do_normalize", "no"),
    ("wav2vec2", "feature_size", 10**9),
    *(("whisper", "n_fft", value) for value in (10**9, 0, 400.0)),
    *(("whisper", "feature_size", value) for value in (10**9, 0, "16")),
    *(("whisper", "hop_length", value) for value in (0, 1, -160, 10**9)),
    *(("whisper", "chunk_length", value) for value in (10**15, 0)),
    *(("whisper", "dither", value) for value in (1e300, float("nan"), -1)),
    ("whisper", "sampling_rate", 10**9),
]


@pytest.mark.parametrize("older", [False, True], ids=["processor_config", "preprocessor_config"])
@pytest.mark.parametrize(("kind", "field", "value"), WRONG)
def test_a_feature_extractor_that_no_model_has_is_refused_by_name(whole, kind, field, value, older):
    folder = whole(kind == "whisper")
    file = folder / "processor_config.json"
    rewrite(file, "feature_extractor", field, to=value)
    if older:  # as Transformers 4 wrote it
        values = json.loads(file.read_text(encoding="utf-8"))
        file.unlink()
        file = folder / "preprocessor_config.json"
        file.write_text(json.dumps(values["feature_extractor"]), encoding="utf-8")
    said = rf"`feature_extractor\.{field}` of {re.escape(str(file))} must be .*, got"
    with pytest.raises(ValueError, match=said) as caught:
        MMSERProcessor.from_pretrained(folder)
    assert str(caught.value).count(". ") == 0  # one sentence
    with pytest.raises(ValueError, match=rf"`feature_extractor\.{field}`"):
        load_feature_extractor(folder)


def test_a_feature_extractor_is_looked_at_when_a_processor_is_made_of_it():
    for wrong in (10**9, float("nan")):
        extractor = Wav2Vec2FeatureExtractor(sampling_rate=wrong)
        with pytest.raises(ValueError, match=r"`feature_extractor\.sampling_rate` must be a whole number of 1,000 to"):
            MMSERProcessor(extractor)


@pytest.mark.parametrize("extractor", [WhisperFeatureExtractor(), WhisperFeatureExtractor(128, chunk_length=300)])
def test_those_of_models_are_taken(extractor):
    assert MMSERProcessor(extractor).sampling_rate == 16_000


@pytest.mark.parametrize("value", [-5, 0, "x", float("nan"), None, True])
def test_a_tokenizer_that_takes_no_token_is_refused_by_name(whole, value):
    folder = whole()
    rewrite(folder / "tokenizer_config.json", "model_max_length", to=value)
    if value is None:  # which Transformers takes for "no limit"
        assert MMSERProcessor.from_pretrained(folder)(text="so happy")["input_ids"].shape[0] == 1
        return
    with pytest.raises(ValueError, match=r"`model_max_length` of tokenizer_config\.json must be at least 1, got"):
        MMSERProcessor.from_pretrained(folder)


@pytest.mark.parametrize("pattern", [{"String": "a"}, {"Regex": "a"}])
def test_a_normalizer_that_fills_the_memory_is_refused(whole, pattern):
    folder = whole()
    rewrite(folder / "tokenizer_config.json", "tokenizer_class", to="TokenizersBackend")  # of which the file says all
    doubling = {"type": "Replace", "pattern": pattern, "content": "aa"}
    nested = {"type": "Sequence", "normalizers": [doubling] * 20}
    rewrite(folder / "tokenizer.json", "normalizer", to={"type": "Sequence", "normalizers": [nested, doubling]})
    with pytest.raises(ValueError, match="the normalizer of the tokenizer makes a text over 64 times as long"):
        MMSERProcessor.from_pretrained(folder)
    rewrite(folder / "tokenizer.json", "normalizer", to=doubling)  # as those of some models write a space otherwise
    MMSERProcessor.from_pretrained(folder)


def test_a_regular_expression_that_never_ends_is_one_sentence(whole):
    folder = whole()
    rewrite(folder / "tokenizer_config.json", "tokenizer_class", to="TokenizersBackend")
    split = {"type": "Split", "pattern": {"Regex": "(a|aa|a?a)+$"}, "behavior": "Isolated", "invert": False}
    rewrite(folder / "tokenizer.json", "pre_tokenizer", to=split)
    with pytest.raises(ValueError, match=r"the tokenizer cannot read .*aaa.*retry-limit"):
        MMSERProcessor.from_pretrained(folder)(text="a" * 40 + "!")


def test_a_token_beyond_the_embeddings_is_one_sentence(whole):
    folder = whole()
    rewrite(folder / "tokenizer.json", "model", "vocab", "joy", to=10**6)
    model, processor = MMSERForAudioClassification.from_pretrained(folder), MMSERProcessor.from_pretrained(folder)
    said = r"`input_ids` has a token of id 1,000,000, but the text encoder has \d+ embeddings .*of another model\.$"
    with pytest.raises(ValueError, match=said):
        MMSERPipeline(model.eval(), processor=processor, device="cpu")({"text": "what a joy"})
    with pytest.raises(ValueError, match=said):
        model(**processor(text="what a joy"))


def test_mel_bands_that_the_encoder_does_not_take_are_one_sentence(whole):
    folder = whole(whisper=True)
    rewrite(folder / "processor_config.json", "feature_extractor", "feature_size", to=17)
    model, processor = MMSERForAudioClassification.from_pretrained(folder), MMSERProcessor.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"`input_features` has 17 mel bands; this encoder takes 16 \(`feature_size`"):
        model(**processor(np.random.default_rng(0).normal(0, 0.1, 16_000), sampling_rate=16_000))


def with_holes(path, size=200 * 10**9):
    """A file that takes no room on the disk, and says that it has 200 GB."""
    path.touch()
    os.truncate(path, size)
    return path


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.tsv", "metadata.jsonl"])
def test_a_table_that_would_fill_the_memory_is_refused_by_its_size(tmp_path, name):
    said = rf"{re.escape(name)} has 200,000,000,000 bytes, and at most 2,147,483,648 of a table or a text are read"
    table = with_holes(tmp_path / name)
    for place in ({"data_dir": tmp_path}, {"manifest": table}):
        with pytest.raises(ValueError, match=said):
            load_emotion_dataset(**place)
    for read in (read_label_map, load_emotion_split, lambda path: list(read_texts([path]))):
        with pytest.raises(ValueError, match=said):
            read(table)


@pytest.mark.parametrize(("name", "read"), [("a.srt", read_srt), ("a.rttm", read_rttm), ("recipe.json", read_recipe)])
def test_so_are_subtitles_turns_and_recipes(tmp_path, name, read):
    path = with_holes(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} has 200,000,000,000 bytes, and at most 2,147,483,648"):
        read(path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "vocab.txt", "model.safetensors.index.json"])
def test_so_are_the_files_of_a_model_that_are_read_whole(folder, name):
    tiny_corpus.tiny_processor().save_pretrained(folder)
    ways = list(loads(folder))
    with_holes(folder / name)
    for _, load in ways:
        with pytest.raises(
            ValueError, match=rf"{name} has 200,000,000,000 bytes, and at most 268,435,456 of such a file"
        ):
            load()


DIVISION = {"fractions": {"test_fraction": 0.1}, "seed": 1, "clips": "x", "splits": {}}


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "[]",
        "{",
        *(
            json.dumps({"division": division})
            for division in (
                [1],
                {**DIVISION, "fractions": {"allow_urls": True}},
                {**DIVISION, "fractions": {"test_fraction": []}},
                {**DIVISION, "seed": "1"},
                {**DIVISION, "clips": None},
            )
        ),
    ],
)
def test_what_a_checkpoint_says_of_its_training_is_no_fault_of_the_program(tmp_path, content):
    (tmp_path / "run_identity.json").write_text(content)
    with pytest.raises(ValueError, match=r"run_identity\.json is damaged: "):
        divide_again(None, tmp_path, refuse)


@pytest.mark.parametrize("name", ["config.json", "eval_results.json", "trainer_state.json"])
def test_a_page_is_made_of_files_that_are_whole(folder, tmp_path, name):
    for content in ("[" * 100_000, "[]", "{"):
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name} is damaged: it "):
            complete_page(folder, tmp_path / f"page{len(content)}", "me/model")


def test_a_card_that_names_its_own_lists_for_ever_fills_no_memory(folder, tmp_path):
    """Nine times nine times nine ... words of a hundred bytes."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise("abcdefghij")]
    (folder / "README.md").write_text("\n".join(["---", *lines, "language: *j", "---", "# A model"]))
    with pytest.raises(ValueError, match=r"The metadata of README\.md hold more than 10,000 values"):
        complete_page(folder, tmp_path / "page", "me/model")


@pytest.mark.parametrize("parameters", [5, "top_k", ["top_k"], {"model": "other"}])
def test_an_endpoint_says_what_parameters_it_takes(parameters):
    handler = EndpointHandler.__new__(EndpointHandler)
    handler.classifier = refuse
    with pytest.raises(ValueError, match=r"^parameters: (send an object|there is no 'model'; there are top_k)"):
        handler({"inputs": {"text": "no"}, "parameters": parameters})
    for inputs in (5, None, "/etc/passwd", "https://a.b/c.wav", {"audio": "/etc/passwd"}, [{"path": "/etc/passwd"}]):
        with pytest.raises(ValueError, match=r"^inputs: (send|this is no base64)"):
            handler({"inputs": inputs})
