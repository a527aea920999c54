# SPDX-License-Identifier: Apache-2.0
"""Tests of `mmser.lora` and `adapters_mmser`: adapters in the encoders, from the flags to a loaded checkpoint.

References are independent: PEFT's own layers, the formula in float64, a model that was never adapted, a run that was
not interrupted.
"""

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import AUDIO_CONFIGS, tiny_batch
from tiny import tiny_model as wide_model
from tiny_corpus import AUDIO, JOINT, TEXT, WHISPER, tiny_flags, tiny_model, tiny_processor, tiny_tokenizer
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
    pipeline,
)

import train_hf
from adapters_mmser import fingerprint_weights, merged_weights
from mmser import training_run
from mmser.arguments import TRAINING_ARGUMENTS, parse_arguments
from mmser.export import export_checkpoint
from mmser.lora import add_adapters
from mmser.model_loading import load_model
from mmser.optimizer import parameter_groups
from modeling_mmser import MMSERForAudioClassification, MMSERModel
from processing_mmser import MMSERProcessor

pytestmark = pytest.mark.usefixtures("quiet")
ROOT = Path(__file__).parents[1]
SPECIAL = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders of pretrained encoders: "audio", "whisper" and "text"."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoders")
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 8}
    whisper = WhisperConfig(**{**WHISPER, "encoder_layers": 3, "max_source_positions": 1500}, **decoder, **SPECIAL)
    parts = {
        "audio": (Wav2Vec2Model(Wav2Vec2Config(**AUDIO)), Wav2Vec2FeatureExtractor(return_attention_mask=True)),
        "whisper": (WhisperModel(whisper), WhisperFeatureExtractor(feature_size=16)),
        "text": (BertModel(BertConfig(vocab_size=len(tiny_tokenizer()), **TEXT)), tiny_tokenizer()),
    }
    for name, saved in parts.items():
        for part in saved:
            part.save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(corpus, encoders, tmp_path):
    """Run `train_hf.main` with adapters in pretrained encoders into `tmp_path / "out"`; flags are added or changed."""

    def call(*words, audio="audio", **flags):
        named = {"audio_model_name_or_path": encoders / audio, "text_model_name_or_path": encoders / "text"}
        none = ("random_audio_encoder", "audio_config_overrides", "random_text_encoder", "text_config_overrides")
        flags = {**dict.fromkeys(none), **named, "lora_rank": 2, "learning_rate": 0.01, **flags}
        output_dir = flags.pop("output_dir", tmp_path / "out")
        return train_hf.main([*words, *tiny_flags(corpus, output_dir, encoders / "text", **flags)])

    return call


def adapted(kind="wav2vec2", rank=4, **options):
    """A model with adapters at random, so that they change what it computes."""
    model = wide_model(kind)
    add_adapters(model, rank, **options)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def batch_for(model):
    lengths = [100, 57, 20, 0] if model.config.uses_log_mel else [4000, 2100, 3205, 0]
    batch = tiny_batch(model, lengths, [9, 4, 0, 6])
    return batch | {"input_ids": batch["input_ids"] % model.config.text_config.vocab_size}


@torch.no_grad()
def logits_of(model, batch=None):
    return model.eval()(**(batch_for(model) if batch is None else batch)).logits


# --- the adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", AUDIO_CONFIGS)
def test_new_adapters_change_nothing_and_of_the_encoders_they_alone_learn(kind):
    model = wide_model(kind, classifier_dropout=0.0)
    before = logits_of(model)
    own = {name for name, parameter in model.named_parameters() if "_encoder." not in name}
    add_adapters(model, 4)
    assert torch.equal(logits_of(model), before)
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters() if "base_layer" in name}
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for _ in range(2):  # in the first step the matrix that starts at zero hides the other one
        model.zero_grad()
        model.eval()(**batch_for(model), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
        optimizer.step()
    with_gradient = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.any()}
    adapters = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapters and adapters <= with_gradient
    assert {name for name, each in model.named_parameters() if each.requires_grad} == own | adapters
    assert not [name for name in with_gradient if "_encoder." in name and ".lora_" not in name]
    assert frozen and all(torch.equal(dict(model.named_parameters())[name], each) for name, each in frozen.items())
    sizes = {name: tuple(each.shape) for name, each in model.named_parameters() if ".lora_" in name}
    assert all(4 in size for size in sizes.values())
    kinds = {name.split(".")[1] for name in adapters}
    assert kinds == {"audio_encoder", "text_encoder"}


@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
def test_merged_weights_are_the_formula_and_give_the_same_outputs(kind):
    model = adapted(kind, rank=4, alpha=6.0)
    batch = batch_for(model)
    merged = merged_weights(model.state_dict(), 6.0 / 4)
    plain = wide_model(kind)
    plain.load_state_dict(merged)  # strict: all names of a model without adapters, and no other
    parts = model.state_dict()
    names = [name.removesuffix(".base_layer.weight") for name in parts if name.endswith(".base_layer.weight")]
    for name in names:
        base, down, up = (
            parts[f"{name}.{part}.weight"].double() for part in ("base_layer", "lora_A.default", "lora_B.default")
        )
        change = torch.einsum("or,ri->oi", up, down) * 6.0 / 4
        assert change.abs().max() > 0.1
        torch.testing.assert_close(merged[f"{name}.weight"].double(), base + change, rtol=1e-6, atol=1e-6, msg=name)
    torch.testing.assert_close(logits_of(plain, batch), logits_of(model, batch), rtol=0, atol=1e-5)
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.merge()
    for name in names:
        own = model.get_submodule(name).get_base_layer().weight
        torch.testing.assert_close(own, merged[f"{name}.weight"], rtol=1e-6, atol=1e-6, msg=name)


def test_the_target_chooses_the_layers():
    def layers(**options):
        names = [name for name, _ in adapted(**options).named_parameters() if ".lora_A." in name]
        return sorted({name.split(".lora_A.")[0].rsplit(".")[-1] for name in names})

    assert layers(target=["q_proj", "value"]) == ["q_proj", "value"]
    audio = ["intermediate_dense", "k_proj", "out_proj", "output_dense", "projection", "q_proj", "v_proj"]
    assert layers() == sorted([*audio, "dense", "key", "query", "value"])
    # The attention of WavLM hands the weights of these layers to a function of PyTorch
    assert not {"q_proj", "k_proj", "v_proj", "out_proj"} & set(layers(kind="wavlm"))


@pytest.mark.parametrize(
    ("kind", "target", "freeze", "said"),
    [
        ("wavlm", ["q_proj"], "text", "reads the weights of q_proj without calling it"),
        ("wav2vec2", ["q_prj"], "", "`q_prj` is no linear layer of the encoders: did you mean `q_proj`?"),
        ("wav2vec2", ["q_proj"], "", "names no linear layer of the text encoder, which has dense, key, query, value"),
        ("wav2vec2", ["all"], "audio text", "adapters have nothing to adapt"),
    ],
)
def test_adapters_that_would_do_nothing_are_refused(kind, target, freeze, said):
    model = wide_model(kind)
    for modality in freeze.split():
        getattr(model, f"freeze_{modality}_encoder")()
    with pytest.raises(ValueError, match=said.replace("?", r"\?")):
        add_adapters(model, 4, target=target)


def test_a_frozen_encoder_gets_no_adapter():
    model = wide_model()
    model.freeze_text_encoder()
    add_adapters(model, 4)
    assert not [name for name, _ in model.mmser.text_encoder.named_parameters() if "lora" in name]
    assert model.mmser.frozen_encoders() == {"text"} and not model.train().mmser.text_encoder.training


def test_each_trained_parameter_is_in_one_group_and_adapters_learn_faster_than_whole_encoders():
    model = wide_model()
    model.freeze_text_encoder()
    add_adapters(model, 4)
    groups = parameter_groups(model, learning_rate=1e-3)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(map(id, trained)) == sorted(id(each) for group in groups for each in group["params"])
    assert {group["lr"] for group in groups if group["name"] == "audio_encoder"} == {1e-3}
    assert {group["weight_decay"] for group in groups if group["name"] == "audio_encoder"} == {0.025}
    assert "text_encoder" not in {group["name"] for group in groups}
    chosen = parameter_groups(model, 1e-3, {"audio_encoder": 0.5})
    assert {group["lr"] for group in chosen if group["name"] == "audio_encoder"} == {5e-4}


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for is_checkpointed in (False, True):
        model = tiny_model(dropout=False)
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        add_adapters(model, 4)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=0.3)
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        model.train()(**batch_for(model), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any(".lora_A." in name for name in gradients[0])
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)


# --- saved and loaded ------------------------------------------------------------------------------------------------


LOAD = """
import importlib.machinery, json, sys
class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in ("peft", "mmser") else super().find_spec(name, path, target)
stock = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
sys.meta_path = [Without if finder is importlib.machinery.PathFinder else finder for finder in stock]
import numpy as np, torch
from transformers import AutoModelForAudioClassification, pipeline
clip = {"raw": np.sin(np.arange(4000) / 9).astype(np.float32), "sampling_rate": 16_000, "text": "what a joy"}
seen = []
for folder in sys.argv[1:]:
    model = AutoModelForAudioClassification.from_pretrained(folder, trust_remote_code=True)
    classify = pipeline("audio-classification", model=folder, trust_remote_code=True)
    scores = [{each["label"]: each["score"] for each in classify(clip, top_k=None)}]
    classify = pipeline("audio-classification", model=model, processor=classify.processor)
    scores.append({each["label"]: each["score"] for each in classify(clip, top_k=None)})
    seen.append({"scores": scores, "module": type(model).__module__, "lora": model.config.lora})
print(json.dumps(seen))
"""


def load_elsewhere(tmp_path, *folders):
    """What a process says that has neither PEFT nor this package, only the folders and Transformers."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", LOAD, *map(str, folders)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout.decode().splitlines()[-1])


def test_trained_checkpoints_load_in_one_line_without_peft(run, encoders, tmp_path, monkeypatch):
    kept, stock = [], training_run.make_trainer
    monkeypatch.setattr(training_run, "make_trainer", lambda *args: kept.append(stock(*args)) or kept[-1])
    folders = {save: tmp_path / f"{save}_model" for save in ("adapter", "merged")}
    base = AutoModel.from_pretrained(encoders / "audio").state_dict()
    expected = []
    for save, folder in folders.items():
        run("--freeze_text", "--lora_save", save, output_dir=folder, max_steps=6)
        model = kept[-1].model  # with its adapters
        weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        if save == "adapter":
            assert not [name for name in weights if "_encoder." in name and ".lora_" not in name]
            assert config["lora"]["bases"]["audio"]["name"] == str(encoders / "audio")
            assert set(config["lora"]["bases"]) == {"audio", "text"}
        else:
            assert not [name for name in weights if "lora" in name] and config["lora"] is None
        loaded = MMSERForAudioClassification.from_pretrained(folder)
        assert loaded.config.lora is None and loaded.config.name_or_path == str(folder)
        assert not [name for name, _ in loaded.named_modules() if "lora" in name]
        torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=1e-5)
        name = "encoder.layers.0.attention.q_proj.weight"
        assert not torch.equal(loaded.mmser.audio_encoder.state_dict()[name], base[name])  # it was trained
        assert torch.equal(loaded.temperature, model.temperature)
        here = pipeline("audio-classification", model=loaded, processor=MMSERProcessor.from_pretrained(folder))
        clip = {"raw": np.sin(np.arange(4000) / 9).astype(np.float32), "sampling_rate": 16_000, "text": "what a joy"}
        expected.append({each["label"]: each["score"] for each in here(clip, top_k=None)})
    for seen, scores in zip(load_elsewhere(tmp_path, *folders.values()), expected, strict=True):
        assert seen["module"].startswith("transformers_modules.") and seen["lora"] is None
        for each in seen["scores"]:
            assert each == pytest.approx(scores, abs=1e-5)


def test_an_adapter_of_cut_whisper_layers_is_joined_with_the_layers_that_were_kept(run, tmp_path):
    flags = {"audio_num_hidden_layers": 2, "max_steps": 4, "lora_target": "all", "lora_save": "adapter"}
    run(audio="whisper", **flags)
    model = MMSERForAudioClassification.from_pretrained(tmp_path / "out")
    assert len(model.mmser.audio_encoder.layers) == 2
    backbone = MMSERModel.from_pretrained(tmp_path / "out")
    for name, weight in backbone.state_dict().items():
        assert torch.equal(weight, model.mmser.state_dict()[name]), name
    # Saved again it is whole, and the encoders are not needed any more
    model.save_pretrained(tmp_path / "whole")
    again = MMSERForAudioClassification.from_pretrained(tmp_path / "whole")
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.fixture
def saved(encoders, tmp_path):
    """A folder with adapters at random for encoders that can be moved: of the audio's, and of a frozen text's."""
    shutil.copytree(encoders, tmp_path / "encoders")
    names = {"audio": str(tmp_path / "encoders" / "audio"), "text": str(tmp_path / "encoders" / "text")}
    model = MMSERForAudioClassification.from_backbones(*names.values(), **JOINT)
    model.freeze_text_encoder()
    add_adapters(model, 2, save="adapter", bases=names)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters", model


def test_an_export_of_adapters_has_them_merged(saved, tmp_path):
    folder, model = saved
    tiny_processor().save_pretrained(folder)
    export_checkpoint(folder, tmp_path / "whole", formats=["safetensors"])
    (tmp_path / "encoders").rename(tmp_path / "elsewhere")  # the export needs them no more
    whole = MMSERForAudioClassification.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits_of(whole), logits_of(model), rtol=1e-5, atol=1e-5)


def test_encoders_that_moved_are_named(saved, tmp_path):
    folder, model = saved
    (tmp_path / "encoders").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"adapters for the audio encoder of .*no folder here.*audio_name_or_path"):
        MMSERForAudioClassification.from_pretrained(folder)
    names = {f"{kind}_name_or_path": str(tmp_path / "elsewhere" / kind) for kind in ("audio", "text")}
    loaded, report = MMSERForAudioClassification.from_pretrained(folder, **names, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=1e-5)
    classify = pipeline(
        "audio-classification",
        model=MMSERForAudioClassification.from_pretrained(folder, **names, dtype=torch.bfloat16),
        processor=tiny_processor(),
    )
    assert classify.model.dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="has encoders of its own: leave out"):
        MMSERForAudioClassification.from_pretrained(tmp_path / "whole", **names)


def test_adapters_are_not_joined_with_other_weights(saved, tmp_path):
    folder, _ = saved
    torch.manual_seed(5)
    Wav2Vec2Model(Wav2Vec2Config(**AUDIO)).save_pretrained(tmp_path / "encoders" / "audio")
    with pytest.raises(ValueError, match=r"has other weights\. Give the right one as `audio_name_or_path`"):
        MMSERForAudioClassification.from_pretrained(folder)


def test_an_encoder_without_a_name_is_saved_with_its_adapters(tmp_path):
    model = adapted(save="adapter")
    model.save_pretrained(tmp_path)
    loaded = MMSERForAudioClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=1e-5)


def test_an_adapted_model_is_the_one_that_a_fingerprint_knows(saved):
    _, model = saved
    plain = MMSERForAudioClassification.from_backbones(
        *(model.config.lora["bases"][kind]["name"] for kind in ("audio", "text")), **JOINT
    )
    assert fingerprint_weights(model.mmser.audio_encoder) == fingerprint_weights(plain.mmser.audio_encoder)


# --- training --------------------------------------------------------------------------------------------------------


def log_of(folder, key="loss"):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line[key] for line in history if key in line]


def test_an_interrupted_run_goes_on_as_if_it_was_not(run, tmp_path, caplog):
    flags = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "no", "lora_dropout": 0.1}
    run(output_dir=tmp_path / "whole", max_steps=4, **flags)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    shutil.copy(tmp_path / "whole" / "run_identity.json", tmp_path / "cut")
    run(output_dir=tmp_path / "cut", max_steps=4, **flags)
    assert log_of(tmp_path / "cut") == pytest.approx(log_of(tmp_path / "whole"), abs=1e-6)
    ends = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=0, atol=1e-6, msg=name)
    assert "missing keys" not in caplog.text
    # A checkpoint on the way holds adapters, and is a model too
    on_the_way = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    assert [name for name in on_the_way if ".lora_A." in name] and not [name for name in ends[0] if "lora" in name]
    last = MMSERForAudioClassification.from_pretrained(tmp_path / "whole" / "checkpoint-4").state_dict()
    for name, weight in ends[0].items():
        if not name.startswith(
            ("openmax", "temperature", "uncertainty.error", "prediction_sets")
        ):  # fitted after training
            torch.testing.assert_close(last[name], weight, rtol=0, atol=1e-6, msg=name)
    with pytest.raises(ValueError, match="LoRA: "):
        run(output_dir=tmp_path / "cut", max_steps=6, **{**flags, "lora_rank": 3})


def test_the_best_checkpoint_with_averaged_adapters_mixed_precision_and_checkpointing(run, tmp_path):
    flags = {
        **{"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
        **{"weight_averaging": 0.5, "use_amp": True, "gradient_checkpointing": True, "lora_save": "adapter"},
    }
    results = run(**flags)
    folder = tmp_path / "out"
    best = Path(json.loads((folder / "trainer_state.json").read_text())["best_model_checkpoint"])
    final, kept = load_file(folder / "model.safetensors"), load_file(best / "model.safetensors")
    assert final.keys() == kept.keys()
    for name, weight in kept.items():
        if ".lora_" in name:
            assert torch.equal(weight, final[name]) and weight.dtype == torch.float32, name
    assert results["test"]["model"]["weighted_f1"] >= 0
    trained = {row["part"]: row["trainable"] for row in results["parameters"]}
    encoders = [name for name, weight in final.items() if ".lora_" in name and "audio" in name]
    assert trained["audio_encoder"] == sum(final[name].numel() for name in encoders)


def test_only_what_is_frozen_is_cached(run, tmp_path):
    run("--freeze_text", cache_encoder_states=tmp_path / "states", max_steps=2)
    assert any((tmp_path / "states").rglob("*"))
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_adapters_of_a_checkpoint_and_soups_of_adapters(run, encoders, corpus, tmp_path):
    """Adapters are joined as they are loaded: checkpoints with them are averaged, and adapted, as any others."""
    for seed in (1, 2):
        run(output_dir=tmp_path / str(seed), seed=seed, lora_save="adapter")
    names = [str(tmp_path / str(seed)) for seed in (1, 2)]
    words = ["--model_name_or_path", names[0], "--average_with", names[1], "--lora_rank", "2", "--use_cpu"]
    arguments, _, _ = parse_arguments(TRAINING_ARGUMENTS, words)
    soup = load_model(arguments, ["neutral", "happy", "sad", "angry"], MMSERProcessor.from_pretrained(names[0]))
    own = [MMSERForAudioClassification.from_pretrained(name).state_dict() for name in names]
    mixed = merged_weights(soup.state_dict(), 2.0)
    name = "mmser.audio_encoder.encoder.layers.0.attention.q_proj.weight"
    torch.testing.assert_close(mixed[name], (own[0][name] + own[1][name]) / 2, rtol=0, atol=1e-6)
    soup.save_pretrained(tmp_path / "soup")  # its encoders are in no file but this
    torch.testing.assert_close(
        logits_of(MMSERForAudioClassification.from_pretrained(tmp_path / "soup")), logits_of(soup), rtol=0, atol=1e-5
    )
    none = dict.fromkeys(("audio_model_name_or_path", "text_model_name_or_path", "tokenizer_name", "config_overrides"))
    run(**none, model_name_or_path=names[0], output_dir=tmp_path / "second", lora_save="adapter")
    second = MMSERForAudioClassification.from_pretrained(tmp_path / "second")
    assert second.config.lora is None and logits_of(second).isfinite().all()


# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora_alpha", "8"], "--lora_alpha is about adapters: add --lora_rank"),
        (["--lora_save", "adapter"], "--lora_save is about adapters: add --lora_rank"),
        (["--lora_rank", "0"], "--lora_rank must be 1 or more, got 0"),
        (["--lora_rank", "4", "--lora_alpha", "0"], "--lora_alpha must be greater than 0"),
        (["--lora_rank", "4", "--lora_dropout", "1"], r"--lora_dropout must be in \[0, 1\)"),
        (["--lora_rank", "4", "--lora_save", "both"], "--lora_save must be merged or adapter, got both"),
    ],
)
def test_flags_that_do_not_fit_are_refused(words, said):
    with pytest.raises(ValueError, match=said):
        parse_arguments(TRAINING_ARGUMENTS, ["--data_dir", "x", *words])


def test_without_peft_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "peft" else find(name, *more))
    with pytest.raises(ImportError, match=r"^Adapters \(--lora_rank\) need PEFT: pip install 'mmser\[lora\]'"):
        parse_arguments(TRAINING_ARGUMENTS, ["--data_dir", "x", "--lora_rank", "4"])
    with pytest.raises(ImportError, match="need PEFT"):
        add_adapters(copy.deepcopy(wide_model()), 4)
