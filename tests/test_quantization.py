# SPDX-License-Identifier: Apache-2.0
"""Tests of `quantization_mmser`: int8 in PyTorch against float64, alone and in a batch, saved and loaded."""

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import AUDIO_CONFIGS, alone, tiny_batch, tiny_model
from tiny_corpus import tiny_flags, tiny_processor, write_corpus
from tiny_corpus import tiny_model as tiny_corpus_model
from transformers import pipeline
from transformers.models.whisper.modeling_whisper import sinusoids

import quantization_mmser
import train_hf
from mmser.export import export_checkpoint
from modeling_mmser import MMSERForAudioClassification, MMSERModel
from processing_mmser import MMSERPipeline
from quantization_mmser import Int8Embedding, Int8Linear, quantize_dynamic

AUDIO_LENGTHS = {"whisper": [100, 60, 0]}


def batch_of(model, kind):
    return tiny_batch(model, AUDIO_LENGTHS.get(kind, [3200, 2000, 0]), [5, 0, 7])


def slow_rounded(values):
    """One number at a time: to the nearest of 127 steps of the largest, in float64."""
    scale = max(max(abs(float(value)) for value in values) / 127, float(np.finfo(np.float32).tiny))
    return [round(float(value) / scale) for value in values], scale


@pytest.fixture
def layer():
    """An `Int8Linear` of random weights, and the weights."""
    torch.manual_seed(0)
    weight, bias = torch.randn(7, 24), torch.randn(7)
    weight[3] = 0
    linear = torch.nn.Linear(24, 7)
    linear.weight.data, linear.bias.data = weight, bias
    layer = Int8Linear(24, 7)
    with torch.no_grad():
        layer.fill(linear)
    return layer, weight, bias


@pytest.fixture(params=[True, False], ids=["products of int8", "no products of int8"])
def processor(request, monkeypatch):
    """Both kinds of processors, on any."""
    monkeypatch.setattr(quantization_mmser, "processor_multiplies_int8", lambda: request.param)
    return request.param


def test_the_product_is_that_of_whole_numbers(layer, monkeypatch):
    """Each output is sum_k q_k w_k times both scales, with q and w rounded one by one."""
    monkeypatch.setattr(quantization_mmser, "processor_multiplies_int8", lambda: True)
    layer, weight, bias = layer
    inputs = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(1))
    inputs[0, 1] = 0
    outputs = layer(inputs)
    for index in np.ndindex(2, 3):
        row, scale = slow_rounded(inputs[index])
        for unit in range(7):
            column, weight_scale = slow_rounded(weight[unit])
            expected = scale * weight_scale * sum(q * w for q, w in zip(row, column, strict=True)) + float(bias[unit])
            assert outputs[index][unit].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    exact = F.linear(inputs.double(), weight.double(), bias.double())
    assert 1e-4 < (outputs - exact).norm() / exact.norm() < 0.02


def test_where_there_are_no_such_products_the_weights_are_converted_back(layer, monkeypatch):
    monkeypatch.setattr(quantization_mmser, "processor_multiplies_int8", lambda: False)
    monkeypatch.setattr(torch, "_int_mm", None)  # not called
    layer, _, bias = layer
    inputs = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(1))
    expected = F.linear(inputs, layer.weight * layer.weight_scale[:, None], bias)
    torch.testing.assert_close(layer(inputs), expected)


def test_on_other_devices_the_weights_are_converted_back(layer, monkeypatch):
    layer, weight, bias = layer
    inputs = torch.randn(4, 24, generator=torch.Generator().manual_seed(1))
    cpu = torch.device("cpu")

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    elsewhere = layer(inputs.as_subclass(Elsewhere)).as_subclass(torch.Tensor)
    assert elsewhere.device == cpu
    expected = F.linear(inputs, layer.weight * layer.weight_scale[:, None], bias)
    torch.testing.assert_close(elsewhere, expected)
    assert (elsewhere - F.linear(inputs, weight, bias)).norm() < 0.01 * elsewhere.norm()


def test_a_table_has_a_scale_for_each_row():
    table = torch.randn(9, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 9)[:, None]
    quantised = Int8Embedding(9, 16)
    quantised.fill(torch.nn.Embedding.from_pretrained(table))
    ids = torch.tensor([[8, 0], [3, 3]])
    error = (quantised(ids) - table[ids]).norm(dim=-1) / table[ids].norm(dim=-1)
    assert quantised(ids).shape == (2, 2, 16) and 0 < error.max() < 0.01


@pytest.mark.parametrize("kind", AUDIO_CONFIGS)
@torch.no_grad()
def test_a_model_in_int8_is_close_and_saved_as_it_is(kind, tmp_path, processor):
    model = tiny_model(kind)
    batch = batch_of(model, kind)
    expected = model(**batch).logits.softmax(-1)
    assert quantize_dynamic(model) is model
    outputs = model(**batch)
    assert 1e-7 < (outputs.logits.softmax(-1) - expected).abs().max() < 0.1
    model.save_pretrained(tmp_path)
    loaded, report = MMSERForAudioClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(loaded(**batch).logits, outputs.logits)
    types = {value.dtype for name, value in loaded.state_dict().items() if name.endswith("weight_scale")}
    assert types == {torch.float32}
    half = MMSERForAudioClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {value.dtype for name, value in half.state_dict().items() if name.endswith("weight_scale")} == types
    assert (half(**batch).logits.float().softmax(-1) - expected).abs().max() < 0.2
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("kind", AUDIO_CONFIGS)
@torch.no_grad()
def test_a_clip_alone_is_the_clip_in_a_padded_batch(kind, processor):
    """Up to a state that lies at the border between two numbers, which padding can move by 1e-7."""
    model = quantize_dynamic(tiny_model(kind))
    batch = batch_of(model, kind)
    together = model(**batch).logits.softmax(-1)
    for row in range(3):
        torch.testing.assert_close(model(**alone(batch, row)).logits.softmax(-1)[0], together[row], rtol=0, atol=5e-3)


def test_what_is_in_int8_and_what_is_not():
    model = quantize_dynamic(tiny_model("whisper"))
    quantised = {name.split(".")[1] for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert quantised == {
        *("audio_encoder", "text_encoder", "audio_attention", "text_attention", "audio_pooling", "text_pooling")
    }
    assert isinstance(model.get_input_embeddings(), Int8Embedding)
    left = {
        name for name, module in model.mmser.named_modules() if type(module) in (torch.nn.Linear, torch.nn.Embedding)
    }
    assert left == {
        *("audio_pooling.score", "text_pooling.score", "fusion.audio", "fusion.text", "fusion.gate"),
        *("audio_encoder.embed_positions", "text_encoder.embeddings.position_embeddings"),
        "text_encoder.embeddings.token_type_embeddings",
    }
    attention = quantize_dynamic(tiny_model("wavlm")).mmser.audio_encoder.encoder.layers[0]
    assert type(attention.attention.q_proj) is torch.nn.Linear
    assert type(attention.feed_forward.output_dense) is Int8Linear


@torch.no_grad()
def test_a_transformer_as_the_fusion_is_in_int8_too(tmp_path):
    model = tiny_model("whisper", fusion_type="transformer")
    batch = batch_of(model, "whisper")
    expected = model(**batch).logits.softmax(-1)
    quantize_dynamic(model).save_pretrained(tmp_path)
    assert any(isinstance(module, Int8Linear) for module in model.mmser.joint_encoder.modules())
    given = MMSERForAudioClassification.from_pretrained(tmp_path)(**batch).logits.softmax(-1)
    torch.testing.assert_close(given, expected, rtol=0, atol=0.1)


def test_a_base_model_alone_is_quantised_too():
    model = quantize_dynamic(tiny_model("whisper").mmser)
    assert isinstance(model, MMSERModel) and model.config.int8_weights
    assert any(isinstance(module, Int8Linear) for module in model.modules())


@pytest.fixture(scope="module")
def checkpoint(shared):
    def make(folder):
        torch.manual_seed(0)
        tiny_corpus_model(whisper=True).save_pretrained(folder / "float32")
        tiny_processor(True).save_pretrained(folder / "float32")
        export_checkpoint(folder / "float32", folder / "int8", formats=["safetensors"], dtype="int8")

    return shared("int8", make)


def test_an_export_is_used_like_a_checkpoint(checkpoint, tmp_path):
    """`pipeline(...)` of Transformers; `test_small_checkpoint.py` has it where MMSER is not installed."""
    sound = 0.1 * np.random.default_rng(0).standard_normal(8000)
    soundfile.write(tmp_path / "clip.wav", sound, 16000)
    clips = [str(tmp_path / "clip.wav"), {"text": "what a joy"}]
    classifier = pipeline("audio-classification", str(checkpoint / "int8"), trust_remote_code=True, device="cpu")
    results = classifier(clips, return_uncertainty=True)
    model = MMSERForAudioClassification.from_pretrained(checkpoint / "float32")
    # the second changes the first; the file has the matrices of the head in float16
    for own, tolerance in ((model, 0.03), (quantize_dynamic(model), 2e-3)):
        classifier = MMSERPipeline(own, processor=tiny_processor(True), device="cpu")
        for clip, given in zip(classifier(clips), results, strict=True):
            scores = {entry["label"]: entry["score"] for entry in given}
            assert all(scores[entry["label"]] == pytest.approx(entry["score"], abs=tolerance) for entry in clip)


@torch.no_grad()
@pytest.mark.parametrize("are_sinusoids", [True, False])
def test_sinusoids_are_not_stored_and_other_positions_are(are_sinusoids, tmp_path, caplog):
    """Exactly the same answers; `AutoModel` and a process without MMSER: `test_small_checkpoint.py`."""
    model, processor = tiny_corpus_model(whisper=True), tiny_processor(True)
    positions = model.mmser.audio_encoder.embed_positions.weight
    positions.copy_(positions.half() if are_sinusoids else positions.flip(0))  # OpenAI's are in float16
    for name, part in (("float32", model), ("float32", processor)):
        part.save_pretrained(tmp_path / name)
    export_checkpoint(tmp_path / "float32", tmp_path / "int8", formats=["safetensors"], dtype="int8")
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    name = "mmser.audio_encoder.embed_positions.weight"
    assert (name not in stored) is are_sinusoids
    caplog.clear()
    loaded = [cls.from_pretrained(tmp_path / "int8") for cls in (MMSERForAudioClassification, MMSERModel)]
    assert "MISSING" not in caplog.text
    expected = sinusoids(*positions.shape) if are_sinusoids else positions.half().float()
    for own in (loaded[0].mmser, loaded[1]):
        assert own.audio_encoder.embed_positions.weight.equal(expected)
    # A file of before, with the table, answers as one without
    save_file({**stored, name: expected.contiguous()}, tmp_path / "int8" / "model.safetensors", {"format": "pt"})
    before = MMSERForAudioClassification.from_pretrained(tmp_path / "int8")
    features = {"input_features": torch.randn(2, model.config.audio_config.num_mel_bins, 40)}
    assert before(**features).logits.equal(loaded[0](**features).logits)


def test_the_weights_take_a_quarter(tmp_path):
    """Of the parts that are in int8; what is left of this tiny model is small."""
    model = tiny_model("whisper")
    before = sum(
        4 * value.numel()
        for name, module in model.mmser.named_modules()
        if type(module) is torch.nn.Linear and name.split(".")[0].endswith("encoder")
        for value in (module.weight,)
    )
    quantize_dynamic(model)
    encoders = (model.mmser.audio_encoder, model.mmser.text_encoder)
    after = sum(
        layer.weight.nbytes for encoder in encoders for layer in encoder.modules() if isinstance(layer, Int8Linear)
    )
    assert after * 4 == before


def test_int8_does_not_learn_and_is_not_quantised_again(checkpoint, tmp_path):
    model = MMSERForAudioClassification.from_pretrained(checkpoint / "int8")
    with pytest.raises(ValueError, match="in int8 already"):
        quantize_dynamic(model)
    with pytest.raises(ValueError, match="export the checkpoint that it was made from"):
        export_checkpoint(checkpoint / "int8", tmp_path / "out")
    batch = tiny_batch(tiny_model("whisper"), [100, 60], [5, 7])
    batch["input_features"] = batch["input_features"][:, :16]
    batch["input_ids"] = batch["input_ids"] % 10
    with pytest.raises(RuntimeError, match="does not learn"):
        model.train()(**batch, labels=torch.tensor([0, 1])).loss.backward()


def test_training_from_int8_is_refused(checkpoint, tmp_path):
    write_corpus(tmp_path / "corpus")
    flags = tiny_flags(
        tmp_path / "corpus",
        tmp_path / "out",
        None,
        model_name_or_path=checkpoint / "int8",
        random_audio_encoder=None,
        random_text_encoder=None,
        audio_config_overrides=None,
        text_config_overrides=None,
        config_overrides=None,
    )
    with pytest.raises(ValueError, match=r"does not learn, but for its last layer \(--adapt\): train the checkpoint"):
        train_hf.main(flags)
