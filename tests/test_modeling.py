# SPDX-License-Identifier: Apache-2.0
"""Tests of the network in modeling_mmser: independence of the batch, missing modalities, freezing, the deep
classifier, gradients, checkpointing, saving and loading. The losses and OpenMax have `test_losses.py`.
"""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import (
    AUDIO_CONFIGS,
    NO_DROPOUT,
    TEXT_CONFIG,
    WAVEFORM_KINDS,
    alone,
    fit_openmax_by_chance,
    randomize,
    tiny_batch,
    tiny_config,
    tiny_model,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModel, BertModel, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import modeling_mmser
from configuration_mmser import MMSERConfig
from encoders_mmser import time_mask
from modeling_mmser import (
    AttentiveStatsPooling,
    CrossModalAttention,
    DeepClassifier,
    MMSERForAudioClassification,
    MMSERModel,
    ResidualBlock,
    StatisticsPooling,
    UncertaintyHead,
    WeightedLayerSum,
    weighted_layer_sum,
)
from openmax_mmser import OpenMax

AUDIO_LENGTHS = {"waveform": [16000, 9001, 3205, 0], "whisper": [100, 57, 20, 0]}
TEXT_LENGTHS = [9, 4, 0, 6]
OUTPUTS = (
    *("logits", "uncertainty", "anchor_distances", "features", "fused"),
    *("open_set_probabilities", "unknown_probability", "rejection_score", "is_unknown"),
)
OPENMAX_BUFFERS = ("weibull_shape", "weibull_scale", "weibull_shift", "fitted", "centroids", "rejection_thresholds")
FITTED = (
    *("temperature", "uncertainty.error_calibration", "prediction_sets.thresholds"),
    *(f"openmax.{name}" for name in OPENMAX_BUFFERS),
)
NO_THRESHOLD = torch.finfo(torch.float32).max


def lengths_for(kind):
    return AUDIO_LENGTHS["whisper" if kind == "whisper" else "waveform"]


pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(scope="module")
def models():
    """One model in eval mode for each audio encoder, for tests that leave it as it is."""
    built = {kind: tiny_model(kind) for kind in AUDIO_CONFIGS}
    for model in built.values():
        fit_openmax_by_chance(model)
    return built


@pytest.fixture
def model(models):
    return models["wav2vec2"]


@pytest.fixture(scope="module")
def batch(models):
    """A padded batch of four clips: two complete, one without text, one without audio."""
    return tiny_batch(models["wav2vec2"], [3000, 2100, 2500, 0], TEXT_LENGTHS)


def difference(one, other):
    return (one - other).abs().max().item()


# A clip's result never depends on its batch


@torch.no_grad()
@pytest.mark.parametrize("longer", [False, True])
@pytest.mark.parametrize("kind", AUDIO_CONFIGS)
def test_a_clip_alone_equals_the_clip_in_a_padded_batch(models, kind, longer):
    """Four clips of different lengths, one without text and one without audio; all that the model says about each."""
    extra = longer * (20 if kind == "whisper" else 1850)  # padding behind the longest clip too
    batch = tiny_batch(models[kind], lengths_for(kind), TEXT_LENGTHS, extra=extra)
    together = models[kind](**batch)
    for row in range(4):
        single = models[kind](**alone(batch, row))
        for name in OUTPUTS:
            assert difference(single[name][0].float(), together[name][row].float()) <= 1e-4, (name, row)
        assert difference(single.logits[0], together.logits[row]) <= 5e-5
    assert together.logits.std(dim=0).mean() > 0.1  # the clips do differ


@torch.no_grad()
@pytest.mark.parametrize("kind", ["wav2vec2", "data2vec-audio"])
def test_the_stock_encoder_does_depend_on_the_batch(models, kind):
    """So the test above can fail: with the stock layer put back it does, by a hundred times its tolerance."""
    model = copy.deepcopy(models[kind])
    stock = AutoModel.from_config(model.config.audio_config)
    stock.load_state_dict(model.mmser.audio_encoder.state_dict())
    model.mmser.audio_encoder = stock.eval()
    batch = tiny_batch(model, lengths_for(kind), TEXT_LENGTHS)
    together = model(**batch).logits
    assert max(difference(model(**alone(batch, row)).logits[0], together[row]) for row in (1, 2)) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("kind", ["wav2vec2", "wav2vec2-layer", "whisper"])
def test_what_fills_the_padding_does_not_matter(models, kind):
    batch = tiny_batch(models[kind], lengths_for(kind), TEXT_LENGTHS)
    name = "input_features" if kind == "whisper" else "input_values"
    padding = (batch["attention_mask"] == 0).view(4, *[1] * (batch[name].ndim - 2), -1)
    filled = batch | {name: torch.where(padding, 100 * torch.randn(batch[name].shape), batch[name])}
    torch.testing.assert_close(models[kind](**filled).logits, models[kind](**batch).logits, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", WAVEFORM_KINDS)
def test_unpadded_waveform_encoders_are_the_stock_ones(models, kind):
    """Same parameter names, and the same states of every layer with the same weights."""
    ours = models[kind]
    stock = AutoModel.from_config(ours.config.audio_config).eval()
    stock.load_state_dict(ours.mmser.audio_encoder.state_dict(), strict=True)
    audio = {"input_values": torch.randn(2, 6000)}
    expected = stock(**audio, output_hidden_states=True).hidden_states
    whole = {"attention_mask": torch.ones(2, 6000, dtype=torch.long)}
    for mask in ({}, whole):  # nothing is padded, so nothing is computed in another way
        states = ours(**audio, **mask, output_hidden_states=True).hidden_states
        assert len(states) == len(expected) == 3
        for state, reference in zip(states, expected, strict=True):
            assert torch.equal(state, reference)


@torch.no_grad()
def test_masked_group_norm_layer_against_float64(models):
    """Every clip of a padded batch, and a batch without padding, as the stock layer has it of the clip alone."""
    model = models["wav2vec2"]
    ours = model.mmser.audio_encoder.feature_extractor.conv_layers[0]
    stock = AutoModel.from_config(model.config.audio_config).feature_extractor.conv_layers[0].double()
    stock.load_state_dict(ours.state_dict())
    clips = torch.randn(3, 5000) + torch.tensor([[0.0], [0.3], [-2.0]])  # also with a constant offset
    for lengths in ([5000, 5000, 5000], [5000, 2113, 405]):
        mask = torch.arange(5000) < torch.tensor(lengths)[:, None]
        result = ours(torch.stack([clips * mask, mask.float()], dim=1)[:, None])
        for row, length in enumerate(lengths):
            expected = stock(clips[row, None, None, :length].double())[0]
            assert difference(result[row, :, : expected.shape[1]], expected) <= 2e-6 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("frames", [120, 46])
def test_whisper_encoder_is_the_stock_one_with_positions_sliced_to_the_clip(models, frames):
    """At full length as it is; on a shorter clip it equals a stock encoder built for that length."""
    ours = models["whisper"]
    config = copy.deepcopy(ours.config.audio_config)
    config.max_source_positions = frames // 2
    stock = WhisperEncoder(config).eval()
    weights = ours.mmser.audio_encoder.state_dict()
    weights["embed_positions.weight"] = weights["embed_positions.weight"][: frames // 2]
    stock.load_state_dict(weights, strict=True)
    features = torch.randn(2, 20, frames)
    expected = stock(features, output_hidden_states=True).hidden_states
    states = ours(input_features=features, output_hidden_states=True).hidden_states
    assert states[-1].shape == (2, frames // 2, 16) and len(states) == len(expected)
    for state, reference in zip(states, expected, strict=True):
        assert difference(state, reference) <= 2e-6 * reference.abs().max()


def test_whisper_positions_are_sinusoids_and_stay():
    positions = MMSERForAudioClassification(tiny_config("whisper")).mmser.audio_encoder.embed_positions.weight
    assert not positions.requires_grad
    angle = torch.arange(60)[:, None] * torch.exp(-math.log(10000) / 7 * torch.arange(8))
    torch.testing.assert_close(positions, torch.cat([angle.sin(), angle.cos()], dim=1), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["wav2vec2", "wav2vec2-layer", "whisper"])
def test_weighted_layer_sum(models, kind):
    """The text attends to the softmax-weighted sum of the stock encoder's layers, the last one after its norm."""
    ours, seen = models[kind], []
    hook = ours.mmser.text_attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    if kind == "whisper":
        stock, audio = WhisperEncoder(ours.config.audio_config), {"input_features": torch.randn(1, 20, 120)}
    else:
        stock, audio = AutoModel.from_config(ours.config.audio_config), {"input_values": torch.randn(1, 4000)}
    stock.load_state_dict(ours.mmser.audio_encoder.state_dict())
    output = stock.eval()(**audio, output_hidden_states=True)
    layers = torch.stack([*output.hidden_states[:-1], output.last_hidden_state])
    weights = torch.softmax(ours.mmser.layer_weights, dim=0)
    ours(**audio, input_ids=torch.tensor([[5, 6, 7]]))
    hook.remove()
    assert len(weights) == 3 and weights.std() > 0.01
    torch.testing.assert_close(seen[0], torch.einsum("l,lbtd->btd", weights, layers), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_of_the_weighted_layer_sum(frozen):
    """Against finite differences, and with the forward pass of evaluation."""
    offset, factors = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4,), (3, 4)))
    layers = [torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=not frozen) for _ in range(3)]
    assert torch.autograd.gradcheck(WeightedLayerSum.apply, (offset, factors, *layers))
    assert torch.autograd.gradgradcheck(WeightedLayerSum.apply, (offset, factors, *layers))
    trained, evaluated = (function(offset, factors, *layers) for function in (WeightedLayerSum.apply, _evaluated))
    assert torch.equal(trained, evaluated)
    torch.testing.assert_close(evaluated, offset + torch.einsum("ld,lbtd->btd", factors, torch.stack(layers)))


def test_weighted_layer_sum_of_long_states():
    """More rows than are gone through at once, in half precision and not contiguous, as a cache gives them."""
    states = torch.randn(3, 333, 4, 8).half()
    offset, factors = (torch.randn(*shape, requires_grad=True) for shape in ((8,), (4, 8)))
    weight = torch.randn(3, 333, 8)
    for compute in (
        lambda: WeightedLayerSum.apply(offset, factors, *states.unbind(dim=2)),
        lambda: weighted_layer_sum(offset, factors, states.unbind(dim=2)),
    ):
        result = compute()
        gradients = torch.autograd.grad((weight * result).sum(), (offset, factors))
        exact = offset.double() + torch.einsum("ld,btld->btd", factors.double(), states.double())
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(
            gradients, torch.autograd.grad((weight * exact).sum(), (offset, factors)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def _evaluated(offset, factors, *layers):
    return weighted_layer_sum(offset, factors, layers)


# What goes in


@torch.no_grad()
@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
def test_either_modality_may_be_missing(models, kind):
    """Not given at all is the same as a mask of zeros; the gate knows which modality is there."""
    model, batch = models[kind], tiny_batch(models[kind], lengths_for(kind), TEXT_LENGTHS)
    audio = {name: batch[name] for name in batch if name.startswith("input_") and name != "input_ids"}
    audio["attention_mask"] = batch["attention_mask"]
    text = {name: batch[name] for name in ("input_ids", "text_attention_mask")}
    no_text = batch | {"text_attention_mask": torch.zeros_like(batch["text_attention_mask"])}
    no_audio = batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])}
    torch.testing.assert_close(model(**audio).logits[:3], model(**no_text).logits[:3], rtol=0, atol=2e-5)
    torch.testing.assert_close(model(**text).logits[:2], model(**no_audio).logits[:2], rtol=0, atol=2e-5)
    assert difference(model(**audio).logits[:3], model(**batch).logits[:3]) > 1e-2

    gate = model.mmser(**batch).gate
    assert ((gate[:2] > 0) & (gate[:2] < 1)).all() and (gate[2] == 1).all() and (gate[3] == 0).all()
    assert (model.mmser(**audio).gate[:3] == 1).all() and (model.mmser(**text).gate[:2] == 0).all()


@torch.no_grad()
def test_a_missing_modality_is_its_embedding_and_nothing_else(models, batch):
    """What lies in a row without audio or without text changes nothing; the learned embedding does."""
    model = copy.deepcopy(models["wav2vec2"])
    before = model(**batch).logits
    other = {name: value.clone() for name, value in batch.items()}
    other["input_values"][3] = torch.randn(3000)
    other["input_ids"][2] = 7
    torch.testing.assert_close(model(**other).logits, before, rtol=0, atol=1e-6)
    model.mmser.missing_text.embedding.add_(1.0)
    after = model(**batch).logits
    assert difference(after[2], before[2]) > 1e-3 and difference(after[[0, 1, 3]], before[[0, 1, 3]]) < 1e-6


@pytest.mark.parametrize("of", ["classifier", "base model"])
def test_an_unknown_keyword_is_refused_and_the_nearest_name_suggested(model, batch, of):
    """Swallowed, the mask would be left out: the clip would be another one."""
    model = model if of == "classifier" else model.mmser
    mask, batch = batch["attention_mask"], {name: batch[name] for name in batch.keys() - {"attention_mask"}}
    with pytest.raises(TypeError, match=r"`atention_mask` is no argument of .*forward: did you mean `attention_mask`"):
        model(**batch, atention_mask=mask)
    with pytest.raises(TypeError, match=r"`zzz` is no argument of .*: the nearest names are `\w+`, `\w+`, `\w+`\.$"):
        model(**batch, zzz=0)


@torch.no_grad()
@pytest.mark.parametrize("of", ["classifier", "base model"])
def test_keywords_of_the_library_are_accepted(model, batch, of):
    """PEFT, the Trainer and pipelines pass these to any model."""
    model = model if of == "classifier" else model.mmser
    general = {"inputs_embeds": None, "position_ids": None, "num_items_in_batch": torch.tensor(4)}
    outputs = model(**batch, **general, return_dict=True, output_attentions=False, output_hidden_states=False)
    for value, expected in zip(outputs.to_tuple(), model(**batch, return_dict=False), strict=True):
        assert torch.equal(value, expected)


@torch.no_grad()
def test_uncertainty_is_returned_unless_it_is_not_wanted(model, batch):
    outputs = model(**batch)
    assert torch.equal(model(**batch, return_uncertainty=True).uncertainty, outputs.uncertainty)
    without = model(**batch, return_uncertainty=False)
    assert without.keys() == outputs.keys() - {"uncertainty"} and torch.equal(without.logits, outputs.logits)


@torch.no_grad()
def test_each_output_without_labels_has_a_row_for_each_clip(model, batch):
    """A stock pipeline takes batches apart by rows: a scalar among the outputs breaks it."""
    assert {len(value) for value in model(**batch).values()} == {len(batch["input_ids"])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_values": None, "input_ids": None}, "Give audio .*`input_ids`, or both"),
        (
            {"input_values": None, "input_features": torch.zeros(4, 20, 30)},
            "wav2vec2 .*`input_values`, not",
        ),
        ({"input_values": torch.zeros(4, 3000, dtype=torch.int16)}, "must be floating point, got torch.int16"),
        ({"input_values": torch.zeros(4, 399), "attention_mask": None}, "too short for one frame"),
        ({"labels": torch.tensor([0, 1, 4, 0])}, r"`labels` must be in \[0, 3\], got \[0, 1, 4, 0\]"),
        ({"labels": torch.tensor([0, -1, 2, 0])}, r"`labels` must be in \[0, 3\]"),
        ({"labels": torch.zeros(4)}, r"`labels` must be a tensor of whole numbers .* torch.float32"),
        ({"labels": torch.zeros(4, dtype=torch.bool)}, r"`labels` must be a tensor of whole numbers .* torch.bool"),
        ({"labels": torch.eye(4, dtype=torch.long)}, r"shape \(4,\).*got .*\(4, 4\)"),
        ({"labels": torch.zeros(1, dtype=torch.long)}, r"shape \(4,\).*got .*\(1,\)"),
        ({"labels": [0, 1, 2, 3]}, r"`labels` must be a tensor .* got list"),
        ({"attention_mask": torch.ones(4, 2600)}, r"`attention_mask` must have the shape \(4, 3000\).*\(4, 2600\)"),
        ({"attention_mask": torch.ones(1, 3000)}, r"`attention_mask` must have the shape \(4, 3000\).*\(1, 3000\)"),
        ({"text_attention_mask": torch.ones(4, 1)}, r"`text_attention_mask` must have the shape \(4, \d+\).*\(4, 1\)"),
        (
            {"input_ids": torch.full((1, 3), 7), "text_attention_mask": None},
            "audio has 4 rows, but the text has 1",
        ),
    ],
)
def test_bad_input_is_refused_with_its_reason(model, batch, change, message):
    with pytest.raises(ValueError, match=message):
        model(**(batch | change))


def test_bad_log_mel_input_is_refused_with_its_reason(models):
    model = models["whisper"]
    with pytest.raises(ValueError, match="whisper encoder takes `input_features`, not `input_values`"):
        model(input_values=torch.zeros(1, 4000))
    with pytest.raises(ValueError, match="has 121 frames; this encoder takes at most 120"):
        model(input_features=torch.zeros(1, 20, 121))
    with pytest.raises(ValueError, match="must be floating point"):
        model(input_features=torch.zeros(1, 20, 100, dtype=torch.long))


@pytest.mark.parametrize("kind", AUDIO_CONFIGS)
def test_silence_is_finite(models, kind):
    model = copy.deepcopy(models[kind]).train()
    batch = tiny_batch(model, lengths_for(kind)[:2], [4, 3])
    name = "input_features" if kind == "whisper" else "input_values"
    outputs = model(**(batch | {name: torch.zeros_like(batch[name])}), labels=torch.tensor([0, 1]))
    outputs.loss.backward()
    assert outputs.logits.isfinite().all() and outputs.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", AUDIO_CONFIGS)
def test_a_clip_of_50_ms_trains(kind):
    """Shorter than one span of SpecAugment (10 frames of 20 ms), which the stock code refuses."""
    model = tiny_model(kind).train()
    length = 5 if kind == "whisper" else 800
    model(**tiny_batch(model, [length, length], [3, 0]), labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_hidden_states_and_attentions(models, batch):
    model = tiny_model(audio={"num_hidden_layers": 3})
    model.set_attn_implementation("eager")
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in outputs.hidden_states] == [(4, 9, 16)] * 4
    assert [attention.shape for attention in outputs.attentions] == [(4, 2, 9, 9)] * 3
    text = {name: batch[name] for name in ("input_ids", "text_attention_mask")}
    assert [state.shape for state in model(**text, output_hidden_states=True).hidden_states] == [(4, 9, 16)] * 3
    some = model(**batch, output_hidden_states=[0, -1]).hidden_states
    assert some[1] is None and some[2] is None and torch.equal(some[3], outputs.hidden_states[3])
    assert model(**batch).hidden_states is None


def test_outputs_as_a_tuple(model, batch):
    with torch.no_grad():
        outputs = model(**batch)
        assert torch.equal(model(**batch, return_dict=False)[0], outputs.logits)
    assert outputs.features.shape == (4, 16) and outputs.fused.shape == (4, 32)
    assert outputs.uncertainty.shape == (4, 1) and ((outputs.uncertainty >= 0) & (outputs.uncertainty <= 1)).all()


# States of the encoders, computed beforehand

AUDIO_INPUTS = {"input_values", "input_features", "attention_mask", "audio_states"}


def audio_of(batch):
    return {name: value for name, value in batch.items() if name in AUDIO_INPUTS}


def text_of(batch):
    return {name: value for name, value in batch.items() if name not in AUDIO_INPUTS}


@torch.no_grad()
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("kind", AUDIO_CONFIGS)
def test_states_stand_for_what_they_were_encoded_from(kind, weighted):
    """Both modalities, one of them, one as states beside the other as it is; two rows lack one."""
    model, labels = tiny_model(kind, use_weighted_layer_sum=weighted), torch.tensor([0, 1, 2, 3])
    fit_openmax_by_chance(model)
    model.mmser.state_norm.mean.normal_()
    model.mmser.state_norm.scale.uniform_(0.5, 2)
    batch = tiny_batch(model, lengths_for(kind), TEXT_LENGTHS)
    states = model.mmser.encode(**batch)
    num_states = states["attention_mask"].shape[1]
    assert states["audio_states"].shape == (4, num_states, 3 if weighted else 1, 16)
    assert states["attention_mask"].dtype == torch.long
    assert states["attention_mask"].any(dim=1).tolist() == [True, True, True, False]
    assert states["text_states"].shape == (4, 9, 16)
    assert torch.equal(states["text_attention_mask"], batch["text_attention_mask"])
    assert set(model.mmser.encode(**audio_of(batch))) == {"audio_states", "attention_mask"}
    assert set(model.mmser.encode(**text_of(batch))) == {"text_states", "text_attention_mask"}
    for raw, kept in (
        (batch, states),
        (batch, audio_of(batch) | text_of(states)),
        (batch, audio_of(states) | text_of(batch)),
        (audio_of(batch), audio_of(states)),
        (text_of(batch), text_of(states)),
    ):
        expected, outputs = model(**raw, labels=labels), model(**kept, labels=labels)
        for name in (*OUTPUTS, "loss"):
            assert difference(outputs[name].float(), expected[name].float()) <= 1e-5, (set(kept), name)
        torch.testing.assert_close(outputs.losses, expected.losses, rtol=0, atol=1e-5)
    assert outputs.hidden_states is None


@pytest.mark.skipif(torch.__version__ < "2.13", reason="in 2.7 the library's configurations break the graph")
@pytest.mark.parametrize("training", [True, False])
def test_all_beyond_the_encoders_compiles_to_one_graph(training):
    """Losses, OpenMax and all; what the library's encoders do while they train is theirs."""
    model = tiny_model("wav2vec2").train(training)
    fit_openmax_by_chance(model)
    with torch.no_grad():
        states = model.mmser.encode(**tiny_batch(model, lengths_for("wav2vec2"), TEXT_LENGTHS))
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(**states, labels=torch.tensor([0, 1, 2, 3]))
    assert explained.graph_count == 1, explained.break_reasons


@torch.no_grad()
@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
def test_padding_of_states_does_not_matter(models, kind):
    """Neither what fills it nor how much there is of it, and states without masks are valid throughout."""
    model, lengths = models[kind], lengths_for(kind)
    batch = tiny_batch(model, lengths, TEXT_LENGTHS)
    states = model.mmser.encode(**batch)
    filled = {}
    for name, mask_name in (("audio_states", "attention_mask"), ("text_states", "text_attention_mask")):
        more = states[name].new_zeros(4, 5, *states[name].shape[2:])
        mask = torch.cat([states[mask_name], states[mask_name].new_zeros(4, 5)], dim=1)
        value = torch.cat([states[name], more], dim=1)
        filled[name] = torch.where(mask.view(*mask.shape, *[1] * (value.ndim - 2)) == 1, value, 100.0)
        filled[mask_name] = mask
    expected = model(**batch).logits
    torch.testing.assert_close(model(**filled).logits, expected, rtol=0, atol=2e-5)
    for row in (0, 1):
        clip = {
            name: states[name][row : row + 1, : int(states[mask_name][row].sum())]
            for name, mask_name in (("audio_states", "attention_mask"), ("text_states", "text_attention_mask"))
        }
        assert difference(model(**clip).logits[0], expected[row]) <= 2e-5


@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
def test_training_on_states_has_the_gradients_of_training_on_the_input(kind):
    model = tiny_model(kind, **NO_DROPOUT)
    model.freeze_audio_encoder()
    model.freeze_text_encoder()
    model.train()
    batch = tiny_batch(model, lengths_for(kind), TEXT_LENGTHS)
    gradients = []
    for inputs in (batch, model.mmser.encode(**batch)):
        model.zero_grad()
        assert not any(value.requires_grad for value in inputs.values())
        train_step(model, inputs)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and "mmser.layer_weights" in gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@torch.no_grad()
def test_states_of_half_precision(models, batch):
    """As a cache keeps them, in a model of full precision; and states of full precision in a model of half."""
    model = copy.deepcopy(models["wav2vec2"])
    expected, states = model(**batch).logits, model.mmser.encode(**batch)
    half = {name: value.half() if value.is_floating_point() else value for name, value in states.items()}
    logits = model(**half).logits
    assert logits.dtype == torch.float32
    assert 0 < difference(logits, expected) < 0.01 * expected.abs().max()
    model.to(torch.bfloat16)
    logits = model(**half).logits
    assert logits.dtype == torch.bfloat16 and difference(logits.float(), expected) < 0.2 * expected.abs().max()


@pytest.mark.parametrize("weighted", [True, False])
def test_bad_states_are_refused_with_their_reason(models, batch, weighted):
    model = models["wav2vec2"] if weighted else tiny_model(use_weighted_layer_sum=False)
    states, layers = model.mmser.encode(**batch), 3 if weighted else 1
    for wrong in (batch | audio_of(states), batch | text_of(states)):
        with pytest.raises(ValueError, match="`audio_states` in place of audio and `text_states` in place of"):
            model(**wrong)
    audio, text = states["audio_states"], states["text_states"]
    for name, value in (
        ("audio_states", audio[:, :, 0]),
        ("audio_states", audio[..., :-1]),
        ("audio_states", torch.cat([audio, audio], dim=2)),
        ("text_states", text[..., :-1]),
        ("text_states", text[:, :, None]),
        ("text_states", text[:, 0]),
    ):
        expected = f"{layers}, 16" if name == "audio_states" else "16"
        with pytest.raises(ValueError) as error:
            model(**(states | {name: value}))
        assert f"`{name}` must have the shape (batch, time, {expected})" in str(error.value)
        assert str(tuple(value.shape)) in str(error.value)
    with pytest.raises(ValueError, match="takes `input_values`, not `input_features`"):
        model.mmser.encode(input_features=torch.zeros(1, 20, 30))


def test_frozen_encoders_are_those_without_a_trainable_parameter():
    model = tiny_model()
    model.freeze_feature_encoder()
    assert model.mmser.frozen_encoders() == set()
    model.freeze_text_encoder()
    assert model.mmser.frozen_encoders() == {"text"}
    model.freeze_audio_encoder()
    assert model.mmser.frozen_encoders() == {"audio", "text"}
    model.mmser.audio_encoder.encoder.layers[1].final_layer_norm.bias.requires_grad_(True)
    assert model.mmser.frozen_encoders() == {"text"}


# Attention and pooling


@torch.no_grad()
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cross_modal_attention_against_a_loop(implementation, layer_norm):
    config = tiny_config(cross_attention_layer_norm=layer_norm, **NO_DROPOUT)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    attention = randomize(CrossModalAttention(config, query_size=6, context_size=10)).eval()
    states, context = torch.randn(2, 3, 6), torch.randn(2, 5, 10)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    with sdpa_kernel(SDPBackend.MATH):
        result = attention(states, context, mask)
    reference = copy.deepcopy(attention).double()
    for b in range(2):
        valid = context[b, mask[b]].double()
        query, key, value = reference.query(states[b].double()), reference.key(valid), reference.value(valid)
        heads = []
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            scores = query[:, part] @ key[:, part].T / math.sqrt(8)
            heads.append(torch.softmax(scores, dim=-1) @ value[:, part])
        attended = reference.output(torch.cat(heads, dim=-1))
        expected = states[b].double() + attended
        if layer_norm:
            weight, bias = reference.layer_norm.weight, reference.layer_norm.bias
            expected = F.layer_norm(expected, (6,), weight, bias)
        torch.testing.assert_close(result[b].double(), expected, rtol=0, atol=2e-6)


def test_cross_modal_attention_starts_at_zero():
    """At first each modality passes as it is, whatever the other one is; one step lets the other one in."""
    torch.manual_seed(0)
    model = MMSERModel(tiny_config(text={"hidden_size": 24}, **NO_DROPOUT))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    for attention, sizes in ((model.audio_attention, (16, 24)), (model.text_attention, (24, 16))):
        states, target = torch.randn(2, 3, sizes[0]), torch.randn(2, 3, sizes[0])
        contexts = [scale * torch.randn(2, 5, sizes[1]) for scale in (1, 10)]
        for context in contexts:
            assert torch.equal(attention(states, context, mask), F.layer_norm(states, sizes[:1]))
        optimizer = torch.optim.SGD(attention.parameters(), lr=0.1)
        (attention(states, contexts[0], mask) * target).sum().backward()
        assert (attention.output.weight.grad.norm(dim=1) > 0).all() and (attention.output.bias.grad != 0).all()
        optimizer.step()
        assert difference(*(attention(states, context, mask) for context in contexts)) > 1e-2
        optimizer.zero_grad()
        (attention(states, contexts[0], mask) * target).sum().backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in attention.parameters())


@torch.no_grad()
def test_statistics_pooling_against_a_loop():
    torch.manual_seed(0)
    pooling = randomize(AttentiveStatsPooling(5, 7))
    states, lengths = torch.randn(4, 6, 5), [6, 3, 1, 0]
    pooled = pooling(states, torch.arange(6) < torch.tensor(lengths)[:, None])
    reference = copy.deepcopy(pooling).double()
    for row, length in enumerate(lengths):
        if length == 0:
            assert (pooled[row] == 0).all()
            continue
        valid = states[row, :length].double()
        scores = [reference.score(torch.tanh(reference.hidden(x))).item() for x in valid]
        total = sum(math.exp(score) for score in scores)
        weights = [math.exp(score) / total for score in scores]
        mean = sum(weight * x for weight, x in zip(weights, valid, strict=True))
        variance = sum(weight * (x - mean) ** 2 for weight, x in zip(weights, valid, strict=True))
        torch.testing.assert_close(pooled[row].double(), torch.cat([mean, variance.sqrt()]), rtol=0, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize("deviation", [True, False])
def test_plain_pooling_against_numpy(deviation):
    torch.manual_seed(0)
    states, lengths = torch.randn(4, 6, 5), [6, 3, 1, 0]
    pooled = StatisticsPooling(5, deviation)(states, torch.arange(6) < torch.tensor(lengths)[:, None])
    assert pooled.shape == (4, 10 if deviation else 5) and (pooled[3] == 0).all()
    for row, length in enumerate(lengths[:3]):
        valid = states[row, :length].double().numpy()
        expected = np.concatenate([valid.mean(axis=0), valid.std(axis=0)] if deviation else [valid.mean(axis=0)])
        np.testing.assert_allclose(pooled[row], expected, atol=1e-6)


def test_bounded_pooling_starts_as_plain_statistics_and_stays_near_them():
    torch.manual_seed(0)
    config = tiny_config(pooling_type="bounded_attentive_statistics", pooling_score_limit=0.5)
    pooling = MMSERForAudioClassification(config).mmser.audio_pooling
    size = pooling.hidden.in_features
    states, mask = torch.randn(3, 8, size), torch.arange(8) < torch.tensor([[8], [5], [1]])
    torch.testing.assert_close(pooling(states, mask), StatisticsPooling(size)(states, mask))
    pooling(states, mask).square().sum().backward()
    assert pooling.score.weight.grad.abs().max() > 0  # it can learn from there
    with torch.no_grad():
        pooling.score.weight.normal_(std=100)
        weights = pooling.weights(states, mask)
        for row, length in enumerate((8, 5, 1)):
            valid = weights[row, :length]
            torch.testing.assert_close(valid.sum(), torch.tensor(1.0))
            assert valid.max() / valid.min() <= math.exp(2 * 0.5) * (1 + 1e-5) and (weights[row, length:] == 0).all()
        assert weights[0].max() / weights[0].min() > math.exp(0.9)


@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
def test_layer_statistics_sum_the_deviations_of_the_layers(kind):
    """Against float64, from the audio and from its cached states, and with text that the audio attends to."""
    model = tiny_model(kind, pooling_type="layer_statistics")
    with torch.no_grad():
        model.mmser.layer_weights.copy_(torch.linspace(-1, 1, len(model.mmser.layer_weights)))
    batch = tiny_batch(model, lengths_for(kind), TEXT_LENGTHS)
    model.mmser.fit_standardization([batch])
    model.eval()
    with torch.no_grad():
        output = model.mmser(**batch)
        audio = {name: batch[name] for name in batch if not name.startswith(("input_ids", "text"))}
        states = model.mmser.encode(**audio)
        text = {name: batch[name] for name in ("input_ids", "text_attention_mask")}
        cached = model.mmser(audio_states=states["audio_states"], attention_mask=states["attention_mask"], **text)
        without_audio = model.mmser(**text).audio_embeds
    size = model.config.audio_config.hidden_size
    weights = torch.softmax(model.mmser.layer_weights, dim=0).detach().double().numpy()
    scale = model.mmser.state_norm.scale.double().numpy()
    for row, valid in enumerate(states["attention_mask"].bool()):
        layers = states["audio_states"][row, valid].double().numpy()
        expected = np.einsum("l,ld,ld->d", weights, scale, layers.std(axis=0)) if valid.any() else np.zeros(size)
        np.testing.assert_allclose(output.audio_embeds[row, size:], expected, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(cached.audio_embeds, output.audio_embeds, rtol=1e-4, atol=1e-4)
    assert output.audio_embeds[:3, size:].min() > 0 and (without_audio[:, size:] == 0).all()
    # The mean is that of what has attended to the text; of the text there is one layer
    plain = MMSERForAudioClassification(copy.deepcopy(model.config)).eval()
    plain.load_state_dict(model.state_dict())
    plain.config.pooling_type = plain.mmser.config.pooling_type = "statistics"
    with torch.no_grad():
        of_plain = plain.mmser(**batch)
    torch.testing.assert_close(output.audio_embeds[:, :size], of_plain.audio_embeds[:, :size])
    torch.testing.assert_close(output.text_embeds, of_plain.text_embeds)
    assert (output.audio_embeds - of_plain.audio_embeds)[:3, size:].abs().max() > 0.01


def test_layer_statistics_do_not_depend_on_how_large_states_are():
    model = tiny_model("wav2vec2", pooling_type="layer_statistics")
    shape = model.mmser.state_norm.mean.shape
    torch.manual_seed(0)
    states = torch.randn(3, 40, *shape)
    deviations = []
    for own in (states, 1e-5 * states):
        model.mmser.fit_standardization([{"audio_states": own}])
        with torch.no_grad():
            deviations.append(model.eval().mmser(audio_states=own).audio_embeds[:, shape[1] :])
    assert deviations[0].min() > 0.1
    torch.testing.assert_close(*deviations, rtol=1e-2, atol=1e-3)


def test_layer_statistics_of_one_layer_are_plain_statistics():
    parts = {"modalities": ["audio"], "use_weighted_layer_sum": False, "cross_attention_layer_norm": False}
    logits = []
    for pooling_type in ("statistics", "layer_statistics"):
        torch.manual_seed(0)
        config = MMSERConfig(audio_config=AUDIO_CONFIGS["wav2vec2"], pooling_type=pooling_type, **parts)
        model = MMSERForAudioClassification(config).eval()
        batch = tiny_batch(model, [3000, 2100], [1, 1])
        with torch.no_grad():
            logits.append(model(**{name: batch[name] for name in ("input_values", "attention_mask")}).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling_type", ["mean", "statistics", "layer_statistics", "bounded_attentive_statistics"])
def test_every_pooling_trains_saves_and_does_not_depend_on_padding(pooling_type, tmp_path):
    model = tiny_model(pooling_type=pooling_type)
    batch = tiny_batch(model, [3000, 2100, 2500, 0], TEXT_LENGTHS)
    model.train()(**batch, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    learns = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert {"mmser.fusion.audio.weight", "mmser.fusion.text.weight"} <= set(learns)
    assert ("mmser.audio_pooling.score.weight" in learns) == (pooling_type == "bounded_attentive_statistics")
    model.eval().save_pretrained(tmp_path)
    loaded = MMSERForAudioClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.untrained_modalities == []
    with torch.no_grad():
        together = model(**batch).logits
        assert difference(loaded(**batch).logits, together) <= 1e-6
        for row in range(4):
            assert difference(model(**alone(batch, row)).logits[0], together[row]) <= 1e-4
    assert together.std(dim=0).mean() > 0.1


@pytest.mark.parametrize("pooling_type", ["statistics", "layer_statistics", "bounded_attentive_statistics"])
def test_a_model_of_one_modality_takes_every_pooling(pooling_type):
    parts = {"audio_config": AUDIO_CONFIGS["wav2vec2"], "pooling_hidden_size": 8, "fusion_hidden_size": 16}
    config = MMSERConfig(**parts, modalities=["audio"], pooling_type=pooling_type, classifier_num_layers=1)
    model = MMSERForAudioClassification(config).eval()
    batch = tiny_batch(model, [3000, 2100], [1, 1])
    assert model(**{name: batch[name] for name in ("input_values", "attention_mask")}).logits.shape == (2, 4)


def test_a_checkpoint_with_plain_pooling_knows_its_untrained_modality(tmp_path):
    torch.manual_seed(0)
    model = MMSERForAudioClassification(tiny_config(pooling_type="statistics"))
    with torch.no_grad():
        model.mmser.fusion.audio.bias.fill_(0.1)
    model.save_pretrained(tmp_path)
    assert MMSERConfig.from_pretrained(tmp_path).untrained_modalities == ["text"]


def test_gradients_of_statistics_pooling():
    """Against those of the deviation as the root of the mean square minus the square of the mean."""
    torch.manual_seed(0)
    pooling = randomize(AttentiveStatsPooling(5, 7)).double()
    states, mask = torch.randn(3, 6, 5, dtype=torch.float64), torch.arange(6) < torch.tensor([[6], [4], [2]])

    def pool_otherwise(states):
        scores = pooling.score(torch.tanh(pooling.hidden(states))).masked_fill(~mask[..., None], -torch.inf)
        weights = scores.softmax(dim=1)
        mean, square = (torch.einsum("bti,btd->bd", weights, x) for x in (states, states**2))
        return torch.cat([mean, (square - mean**2).sqrt()], dim=1)

    weight, gradients = torch.randn(3, 10, dtype=torch.float64), []
    for pool in (lambda states: pooling(states, mask), pool_otherwise):
        leaf = states.clone().requires_grad_()
        gradients.append(torch.autograd.grad((weight * pool(leaf)).sum(), [leaf, *pooling.parameters()]))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [[1, 1], [0, 0], [6, 0], [2, 1]])
@pytest.mark.parametrize("constant", [False, True])
def test_statistics_pooling_has_finite_gradients(lengths, constant):
    """Also where the deviation is 0: one valid position, none, or all of them alike."""
    torch.manual_seed(0)
    pooling = randomize(AttentiveStatsPooling(5, 7))
    states = torch.randn(2, 1 if constant else 6, 5).expand(2, 6, 5).clone().requires_grad_()
    pooled = pooling(states, torch.arange(6) < torch.tensor(lengths)[:, None])
    pooled.square().sum().backward()
    assert pooled.isfinite().all() and states.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in pooling.parameters())


# SpecAugment


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=5), st.floats(0, 0.9), st.integers(1, 12), st.integers(0, 4))
def test_time_mask_stays_inside_the_clip(lengths, probability, length, min_masks):
    torch.manual_seed(sum(lengths))
    valid = torch.arange(60) < torch.tensor(lengths)[:, None]
    masked = time_mask(valid, probability, length, min_masks)
    assert masked.shape == valid.shape and masked.dtype == torch.bool
    assert not (masked & ~valid).any()
    for row, num_frames in zip(masked, lengths, strict=True):
        if num_frames < length:
            assert not row.any()  # a clip shorter than one span is left alone
        elif min_masks:
            assert row.sum() >= length
        # Nothing but whole spans: every masked frame lies in a run of at least `length`
        runs = "".join("x" if frame else " " for frame in row.tolist()).split()
        assert all(len(run) >= length for run in runs)


def test_time_mask_share_and_number_of_spans():
    """The share of masked frames is what the probability says, for long and short clips of one batch alike."""
    torch.manual_seed(0)
    lengths = torch.tensor([400, 100]).repeat(1500)
    valid = torch.arange(400) < lengths[:, None]
    masked = time_mask(valid, 0.1, 5, 0)
    for num_frames in (400, 100):
        rows = masked[lengths == num_frames, :num_frames].float()
        # spans are drawn independently: of k = 0.1 n / 5 of them, 1 - (1 - 5 / n)^k of the frames are covered
        expected = 1 - (1 - 5 / num_frames) ** (0.1 * num_frames / 5)
        assert rows.mean().item() == pytest.approx(expected, rel=0.05)
    for probability, min_masks, expected in ((0.0, 0, 0), (0.0, 1, 5), (1e-6, 1, 5)):
        assert (time_mask(valid, probability, 5, min_masks).sum(dim=1) == expected).all()


def test_time_mask_reaches_every_frame():
    torch.manual_seed(0)
    masked = time_mask(torch.ones(4000, 20, dtype=torch.bool), 0.0, 4, 1)
    first = masked.float().argmax(dim=1)
    counts = torch.bincount(first, minlength=17)
    assert len(counts) == 17 and counts.min() > 150  # 4000 / 17 = 235 starts each


LOG_MEL_MASKS = {"apply_spec_augment": True, "mask_time_prob": 0.3, "mask_time_length": 4, "mask_time_min_masks": 1}
LOG_MEL_MASKS |= {"mask_feature_prob": 0.3, "mask_feature_length": 3}


def masked_log_mel(frozen=False, training=True, **audio):
    """What the Whisper encoder is given as the clip's mean, bool [B, mels, T]; and the lengths of the clips."""
    model, seen = tiny_model("whisper", audio=audio), []
    if frozen:
        model.freeze_audio_encoder()
    model.train(training)
    model.mmser.audio_encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    lengths = [60, 31, 12, 3, 0] * 20
    batch = tiny_batch(model, lengths, [2] * 100)
    given = batch["input_features"]
    given[:, ::2], given[:, 1::2] = 0.5, 1.5  # mean 1
    given.masked_fill_(batch["attention_mask"][:, None] == 0, 9.0)
    before = given.clone()
    torch.manual_seed(0)
    model(**batch)
    assert torch.equal(given, before)  # the caller's tensor is left alone
    masked = (seen[0] - 1).abs() < 1e-5
    masked[torch.tensor(lengths) == 0] = seen[0][torch.tensor(lengths) == 0] != 9.0
    assert torch.equal(seen[0][~masked], before[~masked])
    return masked, torch.tensor(lengths)


def runs(row):
    return [len(run) for run in "".join("x" if value else " " for value in row.tolist()).split()]


def test_log_mel_masks_are_spans_of_frames_and_of_mel_bands():
    masked, lengths = masked_log_mel(**LOG_MEL_MASKS)
    assert masked.shape == (100, 20, 60)
    frames, bands = masked.all(dim=1), masked.all(dim=2)
    assert torch.equal(masked, frames[:, None] | bands[:, :, None])  # nothing but whole frames and whole bands
    assert not (frames & (torch.arange(60) >= lengths[:, None])).any()
    assert torch.equal(frames.any(dim=1), lengths >= 4)  # a clip shorter than one span is left alone
    assert min(run for row in frames for run in runs(row)) == 4
    assert min(run for row in bands for run in runs(row)) == 3
    assert len({tuple(row.tolist()) for row in bands}) > 50 and bands.any(dim=0).all()
    assert len({tuple(row.tolist()) for row in frames[lengths == 60]}) == 20
    share = 1 - (1 - 3 / 20) ** (0.3 * 20 / 3)  # two spans of bands, drawn independently
    assert bands.float().mean().item() == pytest.approx(share, rel=0.1)


def test_log_mel_masks_can_be_had_one_by_one():
    frames, lengths = masked_log_mel(**(LOG_MEL_MASKS | {"mask_feature_prob": 0.0}))
    assert (frames.any(dim=2) == (lengths >= 4)[:, None]).all() and not frames.all(dim=2).any()
    bands, _ = masked_log_mel(**(LOG_MEL_MASKS | {"mask_time_prob": 0.0}))
    assert bands.any() and torch.equal(bands.any(dim=2), bands.all(dim=2))


@pytest.mark.parametrize(
    "options",
    [{"training": False}, {"frozen": True}, {"apply_spec_augment": False}, {"mask_time_prob": 0.0}],
    ids=["evaluation", "frozen", "switched off", "no share"],
)
def test_log_mel_frames_are_as_they_are_outside_of_training(options):
    masks = LOG_MEL_MASKS | ({"mask_feature_prob": 0.0} if "mask_time_prob" in options else {})
    assert not masked_log_mel(**(masks | options))[0].any()
    assert not tiny_config("whisper").audio_config.apply_spec_augment  # nor by default


# Frozen means frozen


def train_step(model, batch, seed=0):
    torch.manual_seed(seed)
    outputs = model(**batch, labels=torch.tensor([0, 1, 2, 3]), output_hidden_states=True)
    outputs.loss.backward()
    return outputs


@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
@pytest.mark.parametrize("which", ["audio", "text"])
def test_a_frozen_encoder_is_frozen(kind, which):
    model = tiny_model(kind, audio={"dropout": 0.2} if kind == "whisper" else {"mask_time_prob": 0.5})
    batch = tiny_batch(model, [120, 57, 100, 0] if kind == "whisper" else [3000, 2100, 5500, 0], TEXT_LENGTHS)
    getattr(model, f"freeze_{which}_encoder")()
    model.eval()
    model.train()
    frozen, other = model.mmser.audio_encoder, model.mmser.text_encoder
    if which == "text":
        frozen, other = other, frozen
    assert not any(module.training for module in frozen.modules())
    assert all(module.training for module in other.modules()) and model.classifier.training
    seen, builds_graph = [], {frozen: [], other: []}
    for encoder in (frozen, other):
        encoder.register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state))
        encoder.register_forward_hook(lambda module, *_: builds_graph[module].append(torch.is_grad_enabled()))
    train_step(model, batch, seed=0)
    train_step(model, batch, seed=1)
    assert builds_graph == {frozen: [False, False], other: [True, True]}
    order = [0, 2] if which == "audio" else [1, 3]
    states = [seen[i] for i in order]
    assert not any(state.requires_grad for state in states)
    assert torch.equal(*states)  # no dropout and no SpecAugment
    moving = [seen[i] for i in range(4) if i not in order]
    assert all(state.requires_grad for state in moving) and not torch.equal(*moving)
    assert all(p.grad is None for p in frozen.parameters())
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trainable if p.ndim > 1)
    assert not {id(p) for p in trainable} & {id(p) for p in frozen.parameters()}


def test_layer_weights_learn_over_a_frozen_encoder(batch):
    model = tiny_model()
    model.freeze_audio_encoder()
    train_step(model.train(), batch)
    assert model.mmser.layer_weights.grad.abs().min() > 0


@pytest.mark.parametrize("kind", ["wav2vec2", "wav2vec2-layer", "whisper"])
def test_freezing_only_the_feature_encoder(kind):
    model = tiny_model(kind)
    model.freeze_feature_encoder()
    model.train()
    train_step(model, tiny_batch(model, [80] * 4 if kind == "whisper" else [6000] * 4, TEXT_LENGTHS))
    convolutions = ("conv1", "conv2") if kind == "whisper" else ("feature_extractor",)
    for name, parameter in model.mmser.audio_encoder.named_parameters():
        if name.startswith(convolutions):
            assert parameter.grad is None and not parameter.requires_grad, name
        elif "attention" in name or "attn" in name:
            assert parameter.grad is not None, name
    assert model.mmser.audio_encoder.training


def test_whispers_positions_never_learn(tmp_path):
    """Not after loading either, nor after all was told to learn: they are sinusoids."""
    model = tiny_model("whisper", use_weighted_layer_sum=False)
    model.save_pretrained(tmp_path)
    loaded = MMSERForAudioClassification.from_pretrained(tmp_path)
    again = copy.deepcopy(loaded).requires_grad_(True)
    for own in (model, loaded, again):
        train_step(own.train(), tiny_batch(own, [80] * 4, TEXT_LENGTHS))
        parameters = dict(own.mmser.audio_encoder.named_parameters())
        learns = {name for name, parameter in parameters.items() if parameter.requires_grad}
        assert learns == {name for name, parameter in parameters.items() if parameter.grad is not None}
        assert parameters.keys() - learns == {"embed_positions.weight"}


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("kind", AUDIO_CONFIGS)
def test_freezing_the_first_layers(kind, is_loaded, tmp_path):
    """A gradient reaches the last layer and what comes after it, and nothing before."""
    model = tiny_model(kind, audio={} if kind == "whisper" else {"layerdrop": 0.0})
    if is_loaded:
        model.save_pretrained(tmp_path)
        model = MMSERForAudioClassification.from_pretrained(tmp_path)
    for wrong in (0, 2, -1):
        with pytest.raises(ValueError, match=f"{wrong} of the 2 layers of the audio encoder cannot be frozen"):
            model.freeze_audio_layers(wrong)
    model.freeze_audio_layers(1)
    encoder = model.mmser.audio_encoder
    if kind == "whisper":
        learns = {*encoder.layers[1].parameters(), *encoder.layer_norm.parameters()}
    else:
        last_norm = (
            encoder.encoder.layer_norm.parameters() if getattr(encoder.config, "do_stable_layer_norm", False) else []
        )
        learns = {*encoder.encoder.layers[1].parameters(), *last_norm}
    assert {parameter for parameter in encoder.parameters() if parameter.requires_grad} == learns
    encoder.config.apply_spec_augment, encoder.config.mask_time_prob = True, 0.5
    train_step(model.train(), tiny_batch(model, [80] * 4 if kind == "whisper" else [6000] * 4, TEXT_LENGTHS))
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == (parameter in learns), name
    assert model.mmser.frozen_encoders() == set() and encoder.training


# The deep classifier


@pytest.fixture(scope="module")
def default_config():
    return MMSERConfig()


def build_head(config, seed=0):
    """The deep classifier of the default size, started as the full model starts it."""
    torch.manual_seed(seed)
    head = DeepClassifier(config)
    model = MMSERForAudioClassification(tiny_config())
    head.apply(model._init_weights)
    return head


def four_classes(seed, shares, size=400):
    """Four classes that a linear layer separates, in the range of the fused vector; `shares` of the clips each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([round(share * size) for share in shares]))
    labels = labels[torch.randperm(size, generator=generator)]
    centres = 0.1 * torch.randn(4, 512, generator=generator)
    return torch.tanh(centres[labels] + 0.5 * torch.randn(size, 512, generator=generator)), labels


def train_head(head, inputs, labels, seed=0, max_steps=300):
    """Train until 99 % of the clips are right; return the steps, the accuracy and the recall of each class."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for step in range(1, max_steps + 1):
        rows = torch.randint(0, len(labels), (32,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(head.train()(inputs[rows])[0], labels[rows]).backward()
        optimizer.step()
        if step % 20 == 0:
            with torch.no_grad():
                correct = head.eval()(inputs)[0].argmax(dim=-1) == labels
            accuracy = correct.float().mean().item()
            if accuracy >= 0.99:
                break
    return step, accuracy, [correct[labels == label].float().mean().item() for label in range(4)]


def test_size_of_the_default_classifier(default_config):
    assert len(DeepClassifier(default_config).blocks) == 35
    assert 1.9e6 < sum(p.numel() for p in DeepClassifier(default_config).parameters()) < 2.1e6


@torch.no_grad()
def test_the_classifier_against_its_formula():
    head = tiny_model(classifier_num_layers=4).classifier
    inputs = torch.randn(5, 32)
    logits, features = head(inputs)
    reference = copy.deepcopy(head).double()
    states = F.relu(reference.input_norm(reference.input_projection(inputs.double())))
    for block in reference.blocks:
        states = block.layer_norm(states + block.up(F.relu(block.down(states))) / math.sqrt(4))
    expected = F.relu(reference.feature_projection(states))
    torch.testing.assert_close(features.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits.double(), reference.output(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("seed", "shares"), [(0, (0.25, 0.25, 0.25, 0.25)), (1, (0.7, 0.1, 0.1, 0.1)), (2, (0.7, 0.1, 0.1, 0.1))]
)
def test_the_classifier_learns_separable_classes(default_config, seed, shares):
    inputs, labels = four_classes(seed, shares)
    _, accuracy, recall = train_head(build_head(default_config, seed), inputs, labels, seed)
    assert accuracy >= 0.99
    assert min(recall) > 0.8


def test_the_published_classifier_collapses(default_config):
    """Without the start at zero and the scaled branches, on the same problem and twice as long: one class for all."""
    head = build_head(default_config)
    for block in head.blocks:
        nn.init.xavier_uniform_(block.up.weight)
        block.branch_scale = 1.0
    _, accuracy, recall = train_head(head, *four_classes(0, (0.7, 0.1, 0.1, 0.1)), max_steps=80)
    assert accuracy < 0.9 and min(recall) == 0


def test_blocks_start_at_zero_in_the_full_model(tmp_path):
    """Through the library's own initialisation, directly and when the head is new beside a loaded base model."""
    torch.manual_seed(0)
    fresh = MMSERForAudioClassification(tiny_config(classifier_num_layers=6))
    fresh.mmser.save_pretrained(tmp_path)
    for model in (fresh, MMSERForAudioClassification.from_pretrained(tmp_path)):
        assert len(model.classifier.blocks) == 6
        for block in model.classifier.blocks:
            assert (block.up.weight == 0).all() and (block.up.bias == 0).all()
            assert block.down.weight.std() > 0.1
        inputs = torch.randn(5, 32)
        before = model.classifier.eval()(inputs)[0]
        model.classifier.blocks = model.classifier.blocks[:0]
        # each block passes its input through, but for the repeated LayerNorm of what is normalised already
        projected = F.relu(model.classifier.input_norm(model.classifier.input_projection(inputs)))
        normalised = F.layer_norm(projected, (32,))
        features = F.relu(model.classifier.feature_projection(normalised))
        torch.testing.assert_close(model.classifier.output(features), before, rtol=0, atol=1e-4)


def test_trained_blocks_are_not_set_to_zero_again_by_loading(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = MMSERForAudioClassification.from_pretrained(tmp_path)
    for block, other in zip(model.classifier.blocks, loaded.classifier.blocks, strict=True):
        assert block.up.weight.std() > 0.1 and torch.equal(block.up.weight, other.up.weight)


def test_training_equals_evaluation_without_dropout():
    model = tiny_model(**NO_DROPOUT)
    inputs = torch.randn(5, 32)
    assert torch.equal(model.classifier.train()(inputs)[0], model.classifier.eval()(inputs)[0])
    noisy = tiny_model(classifier_dropout=0.5).classifier
    assert not torch.equal(noisy.train()(inputs)[0], noisy.eval()(inputs)[0])


def test_every_layer_of_the_classifier_learns(default_config):
    """The first step moves the zero weights, so from the second on the gradient reaches all 35 blocks."""
    head = build_head(default_config).train()
    inputs, labels = four_classes(0, (0.25,) * 4)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(head(inputs[:64])[0], labels[:64]).backward()
        optimizer.step()
    norms = {name: p.grad.norm().item() for name, p in head.named_parameters()}
    assert min(norms.values()) > 0, [name for name, norm in norms.items() if norm == 0]
    assert norms["blocks.0.down.weight"] > 0.01 * norms["blocks.34.down.weight"]


def test_blocks_with_the_norm_first_start_as_if_there_were_none():
    torch.manual_seed(0)
    head = MMSERForAudioClassification(tiny_config(classifier_num_layers=6, classifier_norm_first=True)).classifier
    inputs = torch.randn(5, 32)
    logits, features = head.eval()(inputs)
    head.blocks = head.blocks[:0]
    assert torch.equal(head(inputs)[0], logits) and torch.equal(head(inputs)[1], features)


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_block_against_its_formula(norm_first):
    """In float64, with numpy: x + s W2 relu(W1 x), with the norm before the branch or after the sum."""
    torch.manual_seed(0)
    options = {"zero_init_branches": False, "classifier_norm_first": norm_first}
    block = ResidualBlock(tiny_config(classifier_num_layers=4, **options))
    for parameter in block.layer_norm.parameters():
        nn.init.normal_(parameter)
    block, inputs = block.double().eval(), torch.randn(5, 32, dtype=torch.float64)
    value = {name: parameter.detach().numpy() for name, parameter in block.named_parameters()}

    def norm(rows):
        rows = (rows - rows.mean(axis=1, keepdims=True)) / np.sqrt(rows.var(axis=1, keepdims=True) + 1e-5)
        return rows * value["layer_norm.weight"] + value["layer_norm.bias"]

    rows = inputs.numpy()
    hidden = np.maximum((norm(rows) if norm_first else rows) @ value["down.weight"].T + value["down.bias"], 0)
    expected = rows + (hidden @ value["up.weight"].T + value["up.bias"]) / 2  # one over the root of four blocks
    np.testing.assert_allclose(block(inputs).detach(), expected if norm_first else norm(expected), rtol=0, atol=1e-10)


def test_stochastic_depth_drops_the_branch_of_whole_clips_and_keeps_its_mean():
    torch.manual_seed(0)
    options = {"zero_init_branches": False, "classifier_norm_first": True, "classifier_dropout": 0.0}
    block = ResidualBlock(tiny_config(classifier_drop_path_rate=0.25, **options))
    inputs = torch.randn(1, 32).expand(40_000, 32)
    branch = block.eval()(inputs)[0] - inputs[0]
    found = block.train()(inputs) - inputs
    dropped = (found == 0).all(dim=1)
    assert 0.24 < dropped.float().mean() < 0.26  # 4.6 standard deviations on each side
    torch.testing.assert_close(
        found[~dropped], (branch / 0.75).expand(int((~dropped).sum()), 32), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(found.mean(dim=0), branch, rtol=0.05, atol=1e-3)


def test_blocks_with_the_norm_first_and_stochastic_depth_are_saved_and_checkpointed(tmp_path):
    options = {"classifier_norm_first": True, "classifier_drop_path_rate": 0.5, "classifier_num_layers": 7}
    model = tiny_model(**options)
    batch = tiny_batch(model, [6000, 2100, 5500, 0], TEXT_LENGTHS)
    model.save_pretrained(tmp_path)
    loaded = MMSERForAudioClassification.from_pretrained(tmp_path)
    assert loaded.config.classifier_norm_first and loaded.config.classifier_drop_path_rate == 0.5
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    model.train()
    plain_loss = train_step(model, batch).loss
    model.activation_checkpointing_enable()
    assert torch.equal(train_step(model, batch).loss, plain_loss)


@pytest.mark.parametrize("num_layers", [0, 1, 7])
def test_number_of_blocks_is_free(num_layers):
    model = tiny_model(classifier_num_layers=num_layers)
    assert len(model.classifier.blocks) == num_layers
    assert model(**tiny_batch(model, [2000], [3])).logits.isfinite().all()


# Gradient checkpointing


@pytest.mark.parametrize("kind", ["wav2vec2", "data2vec-audio", "whisper"])
def test_checkpointing_gives_the_same_gradients(kind):
    """With dropout and SpecAugment on: the recomputation draws the same random numbers."""
    model = tiny_model(kind, classifier_num_layers=7, classifier_checkpoint_interval=3).train()
    batch = tiny_batch(model, [120, 57, 100, 0] if kind == "whisper" else [6000, 2100, 5500, 0], TEXT_LENGTHS)
    plain_loss = train_step(model, batch).loss
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.activation_checkpointing_enable()
    assert model.classifier.gradient_checkpointing
    assert model.classifier._gradient_checkpointing_func.keywords["use_reentrant"] is False
    assert torch.equal(train_step(model, batch).loss, plain_loss)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in plain), name
        if name in plain:
            torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize(("num_layers", "interval", "groups"), [(35, 5, 7), (35, 35, 1), (7, 3, 3), (0, 5, 0)])
def test_checkpointing_recomputes_groups_of_blocks(monkeypatch, num_layers, interval, groups):
    sizes = {"classifier_num_layers": num_layers, "classifier_checkpoint_interval": interval}
    model = tiny_model(**sizes).train()
    starts, run_group = [], DeepClassifier._run_group
    monkeypatch.setattr(DeepClassifier, "_run_group", lambda *args: (starts.append(args[-1]), run_group(*args))[1])

    def count():
        starts.clear()
        model.classifier(torch.randn(2, 32, requires_grad=True))[0].sum().backward()
        return list(starts)

    forward = [interval * group for group in range(groups)]
    assert count() == forward
    model.activation_checkpointing_enable()
    assert count() == forward + forward[::-1]
    model.eval()
    assert count() == forward
    model.train().activation_checkpointing_disable()
    assert count() == forward


def saved_bytes(function, parameters):
    """Bytes that autograd keeps for the backward pass of `function`, each storage once, parameters left out."""
    storages, own = {}, {p.untyped_storage().data_ptr() for p in parameters}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function()
    del kept
    return sum(storages.values())


def test_checkpointing_lowers_the_memory(default_config):
    model = MMSERForAudioClassification(tiny_config()).train()
    model.classifier = build_head(default_config).train()
    inputs = torch.randn(64, 512, requires_grad=True)
    parameters = list(model.parameters())
    plain = saved_bytes(lambda: model.classifier(inputs), parameters)
    model.activation_checkpointing_enable()
    assert saved_bytes(lambda: model.classifier(inputs), parameters) < plain / 3

    tiny = tiny_model(classifier_num_layers=7).train()
    batch = tiny_batch(tiny, [6000] * 4, TEXT_LENGTHS) | {"labels": torch.tensor([0, 1, 2, 3])}
    plain = saved_bytes(lambda: tiny(**batch).loss, list(tiny.parameters()))
    tiny.activation_checkpointing_enable()
    assert saved_bytes(lambda: tiny(**batch).loss, list(tiny.parameters())) < 0.8 * plain


# Gradients of the whole model


@pytest.mark.parametrize("kind", AUDIO_CONFIGS)
def test_gradients_reach_every_trainable_parameter(kind):
    """After one step, as the residual blocks start at zero; one row lacks the text and one the audio."""
    torch.manual_seed(0)
    audio = {} if kind == "whisper" else {"mask_time_prob": 0.3, "mask_time_length": 2}
    model = MMSERForAudioClassification(tiny_config(kind, audio=audio)).train()
    batch = tiny_batch(model, [120, 57, 100, 0] if kind == "whisper" else [6000, 3100, 5500, 0], TEXT_LENGTHS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        train_step(model, batch, seed=step)
        optimizer.step()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, gradient in gradients.items() if gradient is None]
    norms = {name: gradient.norm().item() for name, gradient in gradients.items()}
    assert all(math.isfinite(norm) for norm in norms.values())
    # A bias of the keys adds the same to all scores of a query, which the softmax takes out again: rounding is left
    key_biases = {name for name in norms if name.endswith(("k_proj.bias", "attention.self.key.bias"))}
    assert key_biases and all(norms[name] < 1e-3 * norms[name.replace(".bias", ".weight")] for name in key_biases)
    silent = {name for name, norm in norms.items() if norm < 1e-12} - key_biases
    assert not silent
    assert norms["mmser.missing_audio.embedding"] > 0 and norms["mmser.missing_text.embedding"] > 0


def test_loss_is_a_mean_and_the_trainer_is_told():
    assert MMSERForAudioClassification.accepts_loss_kwargs is False
    model = tiny_model(supervised_contrastive_loss_weight=0.0)
    batch = tiny_batch(model, [3000, 2100, 2500, 0], TEXT_LENGTHS)
    labels = torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(4)]
        single = [model(**row, labels=labels[i : i + 1]).loss.item() for i, row in enumerate(rows)]
        assert model(**batch, labels=labels).loss.item() == pytest.approx(sum(single) / 4, rel=1e-5)


# Saving and loading


def distinct(model):
    """Give every piece of fitted or learned state a value that no initialisation gives."""
    fit_openmax_by_chance(model, seed=3)
    model.openmax.fit_thresholds(torch.linspace(0.3, 0.8, 80), torch.arange(80) % 4)
    model.temperature.fill_(1.7)
    model.uncertainty.error_calibration.copy_(torch.tensor([0.6, 0.9, -0.4]))
    with torch.no_grad():
        model.anchors.log_temperature.fill_(-1.3)
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", ["wav2vec2", "data2vec-audio", "whisper"])
def test_saving_and_loading_is_bit_exact(kind, tmp_path):
    model = distinct(tiny_model(kind))
    model.save_pretrained(tmp_path)
    loaded, report = MMSERForAudioClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert not loaded.training and loaded.openmax.is_fitted and loaded.temperature.item() == pytest.approx(1.7)
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert {"anchors.anchors", "prototypes.prototypes", *FITTED} <= set(state)
    assert loaded.openmax.has_thresholds
    batch = tiny_batch(model, lengths_for(kind), TEXT_LENGTHS)
    outputs, reference = loaded(**batch), model(**batch)
    for name in OUTPUTS:
        assert torch.equal(outputs[name], reference[name]), name


def test_the_folder_holds_safetensors_json_and_code(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "configuration_mmser.py", "modeling_mmser.py"} <= names
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".py"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForAudioClassification", "AutoProcessor"}
    assert config["custom_pipelines"]["audio-classification"]["impl"] == "processing_mmser.MMSERPipeline"
    assert config["architectures"] == ["MMSERForAudioClassification"]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
def test_bfloat16(kind, tmp_path):
    """All weights in bf16, what was fitted in fp32; close to fp32 and not NaN; the same after saving and loading."""
    model = distinct(tiny_model(kind))
    model.save_pretrained(tmp_path / "fp32")
    half, report = MMSERForAudioClassification.from_pretrained(
        tmp_path / "fp32", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report.values()), report
    half.save_pretrained(tmp_path / "bf16")
    again = MMSERForAudioClassification.from_pretrained(tmp_path / "bf16")  # the dtype of the checkpoint
    batch = tiny_batch(model, lengths_for(kind), TEXT_LENGTHS)
    reference, outputs = model(**batch), half(**batch)
    for loaded in (half, again):
        for name, tensor in (*loaded.named_parameters(), *loaded.named_buffers()):
            if not tensor.is_floating_point():
                continue
            fitted = name in FITTED or name == "anchors.log_temperature"
            assert tensor.dtype == (torch.float32 if fitted else torch.bfloat16), name
        for name in FITTED:
            assert torch.equal(loaded.get_buffer(name), model.get_buffer(name)), name
    for name in OUTPUTS:
        assert outputs[name].isfinite().all(), name
        assert torch.equal(again(**batch)[name], outputs[name]), name
    assert outputs.logits.dtype == torch.bfloat16
    assert difference(outputs.logits.float(), reference.logits) < 0.2 * reference.logits.abs().max()


def test_bfloat16_trains(tmp_path):
    model = tiny_model(audio={"mask_time_prob": 0.3}).to(torch.bfloat16).train()
    batch = tiny_batch(model, [6000, 3100, 5500, 0], TEXT_LENGTHS)
    assert train_step(model, batch).loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_model_on_the_meta_device(tmp_path):
    """Nothing in the constructor needs a value, and loading fills all that the constructor left empty."""
    model = distinct(tiny_model())
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = MMSERForAudioClassification(model.config)
    with_values = {name for name, tensor in empty.state_dict().items() if not tensor.is_meta}
    assert with_values <= {"mmser.audio_encoder.masked_spec_embed"}  # wav2vec2's own constructor
    assert all(tensor.is_meta for tensor in empty.buffers())
    assert empty.state_dict().keys() == model.state_dict().keys()
    empty.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    assert torch.equal(empty.anchors.anchors, model.anchors.anchors) and empty.openmax.is_fitted


def test_a_new_head_beside_a_loaded_base_model_is_initialised(tmp_path):
    """What a checkpoint lacks is built on the meta device: nothing of it may be left as garbage memory."""
    base = tiny_model().mmser
    base.save_pretrained(tmp_path)
    model = MMSERForAudioClassification.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), model.mmser.parameters(), strict=True))
    assert model.temperature.item() == 1 and not model.openmax.is_fitted
    for name, buffer in model.openmax.named_buffers():
        expected = {"fitted": 0, "centroids": 0, "rejection_thresholds": NO_THRESHOLD}.get(name, 1)
        assert (buffer == expected).all(), name
    assert model.uncertainty.error_calibration.tolist() == [0, 1, 0]
    assert model.anchors.log_temperature.item() == pytest.approx(math.log(0.1))
    torch.testing.assert_close(model.anchors.anchors @ model.anchors.anchors.T, torch.eye(4), rtol=0, atol=1e-5)
    assert 0.5 < model.prototypes.prototypes.std() < 1.5
    assert not model.openmax.has_thresholds
    state = model.state_dict()
    assert (state.pop("openmax.rejection_thresholds") == NO_THRESHOLD).all()
    assert all(tensor.isfinite().all() and tensor.abs().max() < 10 for tensor in state.values())
    assert isinstance(MMSERModel.from_pretrained(tmp_path), MMSERModel)


@torch.no_grad()
def test_the_base_model_loads_from_a_classifier(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    base = MMSERModel.from_pretrained(tmp_path)
    batch = tiny_batch(model, [3000, 2100, 2500, 0], TEXT_LENGTHS)
    assert torch.equal(base(**batch).pooler_output, model(**batch).fused)


@torch.no_grad()
def test_deepcopy_and_state_dict_carry_everything(batch):
    model, other = distinct(tiny_model()), tiny_model(seed=1)
    assert other(**batch).unknown_probability is None
    other.load_state_dict(model.state_dict())
    for equal in (other, copy.deepcopy(model)):
        for name in OUTPUTS:
            assert torch.equal(equal(**batch)[name], model(**batch)[name]), name


# Pretrained encoders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of tiny encoders, saved as their own authors would."""
    root, saved = tmp_path_factory.mktemp("encoders"), {}
    torch.manual_seed(0)
    for kind in ("wav2vec2", "wav2vec2-layer", "data2vec-audio"):
        fields = dict(AUDIO_CONFIGS[kind])
        saved[kind] = AutoModel.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    saved["whisper"] = WhisperForConditionalGeneration(
        AutoConfig.for_model(**{k: v for k, v in AUDIO_CONFIGS["whisper"].items()})
    )
    saved["bert"] = BertModel(AutoConfig.for_model(**TEXT_CONFIG))
    for name, model in saved.items():
        randomize(model).save_pretrained(root / name)
    return root


def small_parts():
    fields = tiny_config().to_diff_dict()
    return {name: fields[name] for name in fields if name.startswith(("cross", "pool", "fus", "class", "feat"))}


@pytest.mark.parametrize("kind", ["wav2vec2", "wav2vec2-layer", "data2vec-audio", "whisper"])
def test_from_backbones_copies_the_weights(folders, kind):
    parts = small_parts() | {"num_labels": 7, "classifier_num_layers": 2}
    model = MMSERForAudioClassification.from_backbones(str(folders / kind), str(folders / "bert"), **parts)
    audio, text = AutoModel.from_pretrained(folders / kind), AutoModel.from_pretrained(folders / "bert")
    if kind == "whisper":
        audio = audio.encoder
    for ours, pretrained in ((model.mmser.audio_encoder, audio), (model.mmser.text_encoder, text)):
        state, expected = ours.state_dict(), pretrained.state_dict()
        assert set(expected) - set(state) <= {"pooler.dense.weight", "pooler.dense.bias"}
        assert set(state) <= set(expected)
        assert all(torch.equal(state[name], expected[name]) for name in state)
    assert model.config.num_labels == 7 and not model.training
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all((block.up.weight == 0).all() for block in model.classifier.blocks)
    assert model(**tiny_batch(model, [100 if kind == "whisper" else 2000], [3])).logits.isfinite().all()


def test_from_backbones_starts_a_configuration_at_random(folders):
    audio_config = AutoConfig.from_pretrained(folders / "wav2vec2")
    models = [
        MMSERForAudioClassification.from_backbones(audio_config, str(folders / "bert"), **small_parts())
        for _ in range(2)
    ]
    weights = [model.mmser.audio_encoder.feature_projection.projection.weight for model in models]
    pretrained = AutoModel.from_pretrained(folders / "wav2vec2").feature_projection.projection.weight
    assert not torch.equal(*weights) and not torch.equal(weights[0], pretrained)
    words = [model.get_input_embeddings().weight for model in models]
    pretrained = AutoModel.from_pretrained(folders / "bert").get_input_embeddings().weight
    assert torch.equal(words[0], pretrained) and torch.equal(words[1], pretrained)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["wav2vec2", "wav2vec2-layer", "data2vec-audio", "whisper"])
def test_from_backbones_keeps_the_first_layers(folders, tmp_path, kind):
    """Their states are those of the stock encoder; the last one passes the final norm where the encoder has one."""
    sources = str(folders / kind), str(folders / "bert")
    stock = AutoModel.from_pretrained(folders / kind).eval()
    if kind == "whisper":
        stock, audio, final_norm = stock.encoder, {"input_features": torch.randn(2, 20, 120)}, stock.encoder.layer_norm
    else:
        audio = {"input_values": torch.randn(2, 4000)}
        final_norm = stock.encoder.layer_norm if kind == "wav2vec2-layer" else nn.Identity()
    output = stock(**audio, output_hidden_states=True)
    whole = MMSERModel.from_backbones(*sources, audio_num_hidden_layers=2, **small_parts())
    expected = torch.stack([*output.hidden_states[:2], output.last_hidden_state], dim=2)
    torch.testing.assert_close(whole.encode(**audio)["audio_states"], expected, rtol=1e-5, atol=2e-5)

    cut = MMSERModel.from_backbones(*sources, audio_num_hidden_layers=1, **small_parts())
    cut.save_pretrained(tmp_path)
    expected = torch.stack([output.hidden_states[0], final_norm(output.hidden_states[1])], dim=2)
    for model in (cut, MMSERModel.from_pretrained(tmp_path)):
        encoder = model.audio_encoder if kind == "whisper" else model.audio_encoder.encoder
        assert model.config.audio_config.num_hidden_layers == len(encoder.layers) == 1
        assert model.layer_weights.shape == (2,) and model.state_norm.mean.shape == (2, 16)
        torch.testing.assert_close(model.encode(**audio)["audio_states"], expected, rtol=1e-5, atol=2e-5)
    for number in (0, 3, -1):
        with pytest.raises(ValueError, match=f"`audio_num_hidden_layers` must be from 1 to 2, got {number}"):
            MMSERModel.from_backbones(*sources, audio_num_hidden_layers=number, **small_parts())


@torch.no_grad()
def test_from_backbones_keeps_the_first_layers_of_the_text(folders, tmp_path):
    stock = AutoModel.from_pretrained(folders / "bert", add_pooling_layer=False).eval()
    text = {"input_ids": torch.tensor([[2, 5, 6, 7]]), "text_attention_mask": torch.ones(1, 4, dtype=torch.long)}
    expected = stock(text["input_ids"], output_hidden_states=True).hidden_states[1]
    sources = str(folders / "wav2vec2"), str(folders / "bert")
    MMSERModel.from_backbones(*sources, text_num_hidden_layers=1, **small_parts()).save_pretrained(tmp_path)
    cut = MMSERModel.from_pretrained(tmp_path)
    assert cut.config.text_config.num_hidden_layers == len(cut.text_encoder.encoder.layer) == 1
    torch.testing.assert_close(cut.encode(**text)["text_states"], expected, rtol=1e-5, atol=2e-5)
    available = len(stock.encoder.layer)
    with pytest.raises(ValueError, match=f"`text_num_hidden_layers` must be from 1 to {available}, got 9"):
        MMSERModel.from_backbones(*sources, text_num_hidden_layers=9, **small_parts())


def test_from_backbones_refuses_an_unknown_field(folders):
    with pytest.raises(TypeError, match="`clasifier_dropout` is no field of MMSERConfig: did you mean `classifier_dr"):
        MMSERForAudioClassification.from_backbones(folders / "wav2vec2", folders / "bert", clasifier_dropout=0.5)


def test_from_backbones_cuts_a_copy_of_the_configuration(folders):
    audio_config = AutoConfig.from_pretrained(folders / "wav2vec2")
    for number in (1, 2):
        model = MMSERModel.from_backbones(
            audio_config, str(folders / "bert"), audio_num_hidden_layers=number, **small_parts()
        )
        assert len(model.audio_encoder.encoder.layers) == number and audio_config.num_hidden_layers == 2


def test_from_backbones_keeps_the_log_level(folders):
    modeling_mmser.logging.set_verbosity_info()
    try:
        MMSERModel.from_backbones(str(folders / "wav2vec2"), str(folders / "bert"), **small_parts())
        assert modeling_mmser.logging.get_verbosity() == modeling_mmser.logging.INFO
    finally:
        modeling_mmser.logging.set_verbosity_warning()


@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        ("wav2vec2", "encoder.layers.1.attention.q_proj.weight"),
        ("whisper", "model.encoder.layers.1.fc1.weight"),
        ("bert", "encoder.layer.0.intermediate.dense.weight"),
    ],
)
def test_from_backbones_refuses_a_checkpoint_without_the_encoder(folders, tmp_path, kind, lost):
    weights = load_file(folders / kind / "model.safetensors")
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folders / kind / "config.json").read_text())
    audio, text = (folders / "wav2vec2", tmp_path) if kind == "bert" else (tmp_path, folders / "bert")
    with pytest.raises(ValueError, match=f"lacks weights of .*{lost.removeprefix('model.encoder.')}"):
        MMSERForAudioClassification.from_backbones(str(audio), str(text), **small_parts())


# Calibration and the OpenMax pass


def test_temperature_divides_the_logits_outside_training_only():
    model = tiny_model(**NO_DROPOUT)
    batch = tiny_batch(model, [3000, 2100], [4, 3])
    with torch.no_grad():
        raw = model(**batch).logits
        model.temperature.fill_(2.0)
        outputs = model(**batch)
        assert torch.equal(outputs.logits, raw / 2)
        assert outputs.logits.argmax(-1).tolist() == raw.argmax(-1).tolist()
        model.train()
        model.mmser.eval()
        assert torch.equal(model(**batch).logits, raw)


def test_temperature_is_not_in_the_loss(batch):
    model, labels = tiny_model(), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        before = model(**batch, labels=labels).loss
        model.temperature.fill_(3.0)
        assert torch.equal(model(**batch, labels=labels).loss, before)


@torch.no_grad()
def test_calibrated_uncertainty(batch):
    """The head's own value until it is fitted; then a logistic regression in eval mode, and never in the loss."""
    model, labels = tiny_model(**NO_DROPOUT), torch.tensor([0, 1, 2, 3])
    model.temperature.fill_(1.5)
    before = model(**batch, labels=labels)
    head = model.uncertainty(before.features)
    torch.testing.assert_close(before.uncertainty, head, rtol=0, atol=1e-6)
    model.uncertainty.error_calibration.copy_(torch.tensor([0.8, 0.3, -0.7]))
    after = model(**batch, labels=labels)
    assert difference(after.uncertainty, before.uncertainty) > 0.01
    for logits, own, value in zip(after.logits.double(), head.double(), after.uncertainty, strict=True):
        confidence = logits.softmax(dim=-1).max().item()
        odds = ((1 - confidence) / confidence) ** 0.8 * (own / (1 - own)).item() ** 0.3 * math.exp(-0.7)
        assert value.item() == pytest.approx(odds / (1 + odds), abs=1e-6)
    assert after.losses["uncertainty"] == before.losses["uncertainty"] and after.loss == before.loss
    model.train()
    model.mmser.eval()
    assert torch.equal(model(**batch).uncertainty, head)


@torch.no_grad()
def test_calibrated_uncertainty_grows_with_both_scores_and_is_finite():
    head = UncertaintyHead(tiny_config())
    steps = torch.linspace(0, 1, 41)[:, None]
    torch.testing.assert_close(head.calibrated(steps, torch.randn(41, 4)), steps, rtol=0, atol=1.1e-6)
    half = steps.to(torch.bfloat16)
    assert torch.equal(head.calibrated(half, torch.randn(41, 4).bfloat16())[1:-1], half[1:-1])
    head.error_calibration.copy_(torch.tensor([0.5, 0.7, 0.1]))
    certain = torch.tensor([[200.0, 0.0, 0.0, 0.0]])
    for extreme in (certain, 0 * certain):
        values = head.calibrated(steps, extreme.expand(41, 4))
        assert values.isfinite().all() and (values.diff(dim=0) > 0).all()
    logits = torch.linspace(6, 0, 41)[:, None] * torch.tensor([1.0, 0.0, 0.0, 0.0])
    for own in (0.0, 0.2, 1.0):
        values = head.calibrated(torch.full((41, 1), own), logits)
        assert values.isfinite().all() and (values.diff(dim=0) > 0).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("distance", "level"), [("centroid", "probability"), ("centroid", "activation"), ("anchor", "activation")]
)
def test_fit_openmax_makes_the_whole_pass(training, distance, level):
    model = tiny_model(openmax_distance=distance, openmax_level=level, openmax_centroids_per_class=2)
    loader = [tiny_batch(model, [2000 + 50 * i] * 8, [3] * 8, seed=i) for i in range(5)]
    with torch.no_grad():
        passed = [model(**batch) for batch in loader]
    predictions = torch.cat([outputs.logits.argmax(dim=-1) for outputs in passed])
    labels = torch.where(torch.arange(40) % 4 == 0, (predictions + 1) % 4, predictions)
    for i, batch in enumerate(loader):
        batch["labels"] = labels[8 * i : 8 * i + 8]
    names = [set(batch) for batch in loader]
    model.train(training)
    model.fit_openmax(loader, tail_size=10)
    assert model.training is training and model.mmser.audio_encoder.training is training
    assert [set(batch) for batch in loader] == names
    distances = torch.cat([outputs.anchor_distances for outputs in passed])
    if distance == "centroid":  # of all clips of a class, also those that the model gets wrong
        fused = torch.cat([outputs.fused for outputs in passed])
        expected = OpenMax(4, 3, level, centroids_per_class=2, embedding_size=32)
        expected.fit_centroids(fused, labels)
        distances = expected.distances(fused)
    else:
        expected = OpenMax(4, 3, level)
    expected.fit(distances, labels, predictions, tail_size=10)
    assert {name for name, _ in expected.named_buffers()} == {name for name, _ in model.openmax.named_buffers()}
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(model.openmax.get_buffer(name), buffer, rtol=1e-5, atol=1e-5, msg=name)
    assert model.eval()(**tiny_batch(model, [2000], [3])).unknown_probability.shape == (1, 1)


def test_fit_openmax_restores_the_mode_when_a_batch_is_bad(model):
    model = copy.deepcopy(model).train()
    with pytest.raises(ValueError, match="gave no batch"):
        model.fit_openmax([])
    with pytest.raises(ValueError, match="Give audio"):
        model.fit_openmax([{"labels": torch.tensor([0])}])
    assert model.training


# Export


@pytest.mark.skipif(torch.__version__ < "2.13", reason="in 2.7 torch takes the bounds of the sizes for too tight")
@torch.no_grad()
def test_export_of_the_eval_forward(tmp_path):
    """No branch on data: one graph for every batch size and length, with masks, equal to the model that was loaded."""
    one_layer = {"num_hidden_layers": 1}
    distinct(tiny_model(audio=one_layer, text=one_layer, classifier_num_layers=1)).save_pretrained(tmp_path)
    model = MMSERForAudioClassification.from_pretrained(tmp_path)
    batch = tiny_batch(model, [3000, 2100, 2500], [4, 3, 2])
    lengths = {4: torch.export.Dim("text", max=40), 3000: torch.export.Dim("audio", min=720)}
    dynamic = {
        name: {0: torch.export.Dim("batch", max=64), 1: lengths[value.shape[1]]} for name, value in batch.items()
    }
    program = torch.export.export(model, (), batch, dynamic_shapes=dynamic).module()
    for other in (
        tiny_batch(model, [3000, 1000, 2100, 0, 2500], [4, 3, 0, 2, 1], seed=1),
        tiny_batch(model, [4321, 2000], [6, 7], seed=2),
        tiny_batch(model, [1234], [2], seed=3),
    ):
        outputs, expected = program(**other), model(**other)
        for name in OUTPUTS:
            torch.testing.assert_close(outputs[name], expected[name], rtol=0, atol=2e-5)
