# SPDX-License-Identifier: Apache-2.0
"""Tests of what a checkpoint of a stranger, or a damaged one, cannot do: see SECURITY.md."""

import io
import json
import pickle
import re
import time

import numpy as np
import pytest
import soundfile
import tiny_corpus
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import tiny_model
from transformers import AutoModelForAudioClassification, pipeline

import audio_mmser
import train_hf
from audio_mmser import load_audio, stream_audio
from configuration_mmser import MMSERConfig
from modeling_mmser import MMSERForAudioClassification, MMSERModel


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


def test_a_backbone_gets_a_new_head_and_a_model_without_head_takes_a_checkpoint_with_one(folder, tmp_path):
    backbone = MMSERModel.from_pretrained(folder)
    backbone.save_pretrained(tmp_path / "backbone")
    whole = MMSERForAudioClassification.from_pretrained(tmp_path / "backbone")
    for name, weight in backbone.state_dict().items():
        assert torch.equal(weight, whole.state_dict()[f"mmser.{name}"])
    model, report = MMSERForAudioClassification.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, MMSERForAudioClassification) and not report["missing_keys"]


def test_nothing_is_unpickled(tmp_path, corpus, tokenizer, monkeypatch, quiet):
    """Training, going on from a checkpoint on the way, loading and classifying need no pickle."""

    def refuse(*_, **__):
        raise AssertionError("something was unpickled")

    flags = {
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "no",
        "dataloader_num_workers": 0,
    }
    train_hf.main(tiny_corpus.tiny_flags(corpus, tmp_path / "run", tokenizer, **flags))
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    train_hf.main(tiny_corpus.tiny_flags(corpus, tmp_path / "run", tokenizer, **{**flags, "max_steps": 3}))
    classify = pipeline("audio-classification", model=str(tmp_path / "run"), trust_remote_code=True)
    assert classify(str(next((corpus / "test").glob("*.wav"))))
    assert AutoModelForAudioClassification.from_pretrained(tmp_path / "run", trust_remote_code=True)


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


def test_a_small_file_that_would_fill_the_memory_is_refused(monkeypatch):
    """An hour of silence in FLAC; a file that is no longer than a clip may be all silence."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(300_000, dtype=np.float32), 16_000, format="FLAC")
    assert len(load_audio(file.getvalue())) == 300_000
    monkeypatch.setattr(audio_mmser, "MANY_SAMPLES", 200_000)
    with pytest.raises(ValueError, match=r"more than 256 times as many become.*chunk_length_s"):
        load_audio(file.getvalue())
    assert sum(map(len, stream_audio(file.getvalue()))) == 300_000  # which holds a block at a time
