# SPDX-License-Identifier: Apache-2.0
"""Tests of the transformer fusion of `fusion_mmser`: against `torch.nn.TransformerEncoderLayer` and a loop, and in
whole models what holds for the gated fusion: padding, missing modalities, checkpointing, saving, groups. The export is
in `test_export.py`.
"""

import copy
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from test_one_modality import only, sole_model
from tiny import NO_DROPOUT, alone, fit_openmax_by_chance, tiny_batch, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForAudioClassification

from configuration_mmser import MMSERConfig
from fusion_mmser import AttentionFusion, FusionLayer, JointEncoder, JointEncoderLayer
from mmser.optimizer import PARAMETER_GROUPS, parameter_groups
from modeling_mmser import MMSERForAudioClassification

LENGTHS = {"wav2vec2": [6000, 2101, 3205, 0], "whisper": [100, 57, 20, 0]}
TEXT_LENGTHS = [9, 4, 0, 6]
OUTPUTS = ("logits", "uncertainty", "features", "fused", "open_set_probabilities", "rejection_score")

pytestmark = pytest.mark.usefixtures("seeded")


def joint_model(kind="wav2vec2", **overrides):
    model = tiny_model(kind, fusion_type="transformer", **overrides)
    fit_openmax_by_chance(model)
    return model


def joint_batch(model, **options):
    return tiny_batch(model, LENGTHS["whisper" if model.config.uses_log_mel else "wav2vec2"], TEXT_LENGTHS, **options)


# --- the parts -------------------------------------------------------------------------------------------------------


def stock_layer(layer: JointEncoderLayer, size: int, heads: int) -> nn.TransformerEncoderLayer:
    """PyTorch's own encoder layer with the weights of ours, in float64."""
    stock = nn.TransformerEncoderLayer(
        size, heads, 4 * size, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    with torch.no_grad():
        query, key, value = layer.query, layer.key, layer.value
        stock.self_attn.in_proj_weight.copy_(torch.cat([query.weight, key.weight, value.weight]))
        stock.self_attn.in_proj_bias.copy_(torch.cat([query.bias, torch.zeros(size), value.bias]))
        for own, theirs in (
            (layer.output, stock.self_attn.out_proj),
            (layer.attention_norm, stock.norm1),
            (layer.feed_forward_norm, stock.norm2),
            (layer.up, stock.linear1),
            (layer.down, stock.linear2),
        ):
            theirs.weight.copy_(own.weight)
            theirs.bias.copy_(own.bias)
    return stock.train()  # in eval mode it takes a fast path that drops padding


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_joint_encoder_is_a_stock_encoder_over_both_sequences(implementation, layer_norm):
    """Each clip by itself, without padding, in float64."""
    model = tiny_model(fusion_type="transformer", cross_attention_layer_norm=layer_norm, **NO_DROPOUT)
    model.set_attn_implementation(implementation)
    encoder, config = model.mmser.joint_encoder, model.config
    width = (config.cross_attention_hidden_size, config.cross_attention_heads)
    stock = [stock_layer(layer, *width) for layer in encoder.layers]
    audio, text = torch.randn(3, 7, 16), torch.randn(3, 5, 16)
    lengths = {"audio": [7, 3, 1], "text": [2, 5, 1]}
    masks = {
        name: torch.arange(states.shape[1]) < torch.tensor(lengths[name])[:, None]
        for name, states in (("audio", audio), ("text", text))
    }
    present = {"audio": torch.tensor([True, True, False]), "text": torch.tensor([True, False, True])}
    results = encoder({"audio": audio, "text": text}, masks, present)
    double = copy.deepcopy(encoder).double()
    for row in range(3):
        presence = sum(
            (double.presence_embeddings[i] for i, name in enumerate(("audio", "text")) if present[name][row]),
            torch.zeros(width[0], dtype=torch.float64),
        )
        own = {name: s[row, : lengths[name][row]].double() for name, s in (("audio", audio), ("text", text))}
        sequence = torch.cat(
            [double.inputs[n](own[n]) + double.modality_embeddings[i] + presence for i, n in enumerate(own)]
        )[None]
        for layer in stock:
            sequence = layer(sequence)
        parts = double.layer_norm(sequence[0]).split([len(states) for states in own.values()])
        for (name, states), part, result in zip(own.items(), parts, results, strict=True):
            expected = double.output_norms[name](states + double.outputs[name](part))
            torch.testing.assert_close(result[row, : len(states)].double(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_fused_vector_is_attention_to_the_two_pooled_vectors():
    """One head and one clip at a time: a softmax over the scores of a learned query, of what is there."""
    config = tiny_config(fusion_type="transformer")
    fusion = AttentionFusion(config, 6, 10).eval()
    fusion.queries.normal_(std=3)
    audio, text = torch.randn(4, 6), torch.randn(4, 10)
    has_audio, has_text = torch.tensor([True, True, False, True]), torch.tensor([True, False, True, True])
    fused, gate = fusion(audio, text, has_audio, has_text)
    size = config.fusion_hidden_size // config.cross_attention_heads
    for row in range(4):
        values = [torch.tanh(fusion.audio(audio[row])).tolist(), torch.tanh(fusion.text(text[row])).tolist()]
        there = [i for i, present in enumerate((has_audio, has_text)) if present[row]]
        for head, query in enumerate(fusion.queries.tolist()):
            own = [value[head * size : (head + 1) * size] for value in values]
            scores = [math.exp(sum(q * v for q, v in zip(query, o, strict=True)) / math.sqrt(size)) for o in own]
            shares = [scores[i] / sum(scores[j] for j in there) if i in there else 0.0 for i in range(2)]
            for d in range(size):
                column = head * size + d
                assert gate[row, column] == pytest.approx(shares[0], abs=1e-6)
                assert fused[row, column] == pytest.approx(
                    sum(s * o[d] for s, o in zip(shares, own, strict=True)), abs=1e-5
                )


@torch.no_grad()
def test_it_starts_as_plain_pooling_with_equal_shares():
    """A new encoder adds nothing to the states, and both modalities have the same say."""
    torch.manual_seed(0)
    config = tiny_config(fusion_type="transformer", cross_attention_layer_norm=False)
    model = MMSERForAudioClassification(config).eval().mmser
    batch = tiny_batch(model, [6000, 2101], [9, 4])
    states = model.encode(**batch)
    output = model(**batch)
    assert (output.gate == 0.5).all()
    mask = states["text_attention_mask"].bool()
    torch.testing.assert_close(output.text_embeds, model.text_pooling(states["text_states"], mask))


def test_published_is_the_default_and_has_none_of_it():
    model = tiny_model()
    assert MMSERConfig().fusion_type == "gated" and model.mmser.joint_encoder is None
    assert type(model.mmser.fusion) is FusionLayer
    assert not [name for name, _ in model.named_parameters() if "joint" in name or "queries" in name]
    with pytest.raises(
        StrictDataclassClassValidationError, match="`fusion_type` must be one of gated, transformer, got 'sum'"
    ):
        tiny_config(fusion_type="sum")
    with pytest.raises(StrictDataclassClassValidationError, match="`fusion_num_layers` must be greater than 0"):
        tiny_config(fusion_num_layers=0)
    with pytest.raises(StrictDataclassClassValidationError, match="`fusion_hidden_size` \\(31\\) must be a multiple"):
        tiny_config(fusion_type="transformer", fusion_hidden_size=31)


# --- the whole model -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
def test_a_clip_alone_equals_the_clip_in_a_padded_batch(kind):
    model = joint_model(kind)
    batch = joint_batch(model, extra=15)
    together = model(**batch)
    assert together.logits.std(dim=0).min() > 1e-3
    for row in range(4):
        single = model(**alone(batch, row))
        for name in OUTPUTS:
            torch.testing.assert_close(together[name][row : row + 1], single[name], rtol=0, atol=1e-4, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
def test_either_modality_may_be_missing(kind):
    model = joint_model(kind)
    batch = joint_batch(model)
    gated = tiny_model(kind).mmser(**batch)
    output = model.mmser(**batch)
    for name in ("pooler_output", "audio_embeds", "text_embeds", "gate"):
        assert output[name].shape == gated[name].shape, name
    gate = output.gate
    assert ((gate[:2] > 0) & (gate[:2] < 1)).all() and (gate[2] == 1).all() and (gate[3] == 0).all()
    before = model(**batch).logits
    other = {name: value.clone() for name, value in batch.items()}
    audio_name = "input_features" if kind == "whisper" else "input_values"
    other[audio_name][3] = torch.randn_like(other[audio_name][3])
    other["input_ids"][2] = 7
    torch.testing.assert_close(model(**other).logits, before, rtol=0, atol=1e-6)
    model.mmser.missing_text.embedding.add_(1.0)
    changed = (model(**batch).logits - before).abs().amax(dim=1)
    assert changed[2] > 1e-3 and changed[[0, 1, 3]].max() < 1e-5
    before = model(**batch).logits
    model.mmser.joint_encoder.presence_embeddings[1].add_(torch.randn(16))
    changed = (model(**batch).logits - before).abs().amax(dim=1)
    assert changed[2] < 1e-5 < 1e-3 < changed[[0, 1, 3]].min()  # row 2 has no text


@pytest.mark.parametrize("untrained", ["audio", "text"])
def test_a_modality_that_was_never_trained_is_known(untrained, tmp_path):
    """Its biases stay at zero: no gradient, no decay. Loaded again, the model ignores it."""
    torch.manual_seed(0)
    model = MMSERForAudioClassification(tiny_config(fusion_type="transformer")).train()
    batch = tiny_batch(model, [6000, 2101], [9, 4])
    mask = "attention_mask" if untrained == "audio" else "text_attention_mask"
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3))
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch | {mask: torch.zeros_like(batch[mask])}, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    assert MMSERForAudioClassification.from_pretrained(tmp_path).config.untrained_modalities == [untrained]


def test_checkpointing_gives_the_same_gradients(monkeypatch):
    """Each layer runs again in the backward pass, with the same dropout."""
    model = joint_model().train()
    batch, labels = joint_batch(model), torch.tensor([0, 1, 2, 3])
    calls = []
    attend = JointEncoderLayer.attend
    monkeypatch.setattr(JointEncoderLayer, "attend", lambda self, *args: calls.append(1) or attend(self, *args))

    def step():
        calls.clear()
        model.zero_grad()
        torch.manual_seed(1)
        model(**batch, labels=labels).loss.backward()
        return len(calls), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    once, plain = step()
    model.activation_checkpointing_enable()
    twice, recomputed = step()
    assert (once, twice) == (2, 4)
    assert plain.keys() == recomputed.keys() and any("joint_encoder" in name for name in plain)
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-4, atol=1e-7, msg=name)


def test_gradients_reach_every_part_and_each_has_one_group():
    torch.manual_seed(0)
    model = MMSERForAudioClassification(tiny_config(fusion_type="transformer")).train()
    batch = joint_batch(model)
    groups = parameter_groups(model, 1e-3)
    assert {group["name"] for group in groups} == PARAMETER_GROUPS.keys() - {"auxiliary"}  # this model has no tasks
    own = {id(p): group["name"] for group in groups for p in group["params"]}
    assert len(own) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    optimizer = torch.optim.AdamW(groups)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
        optimizer.step()
    parts = {name: p for name, p in model.named_parameters() if ".joint_encoder." in name or ".fusion." in name}
    assert {own[id(p)] for p in parts.values()} == {"cross_modal_attention", "fusion"}
    assert not [name for name, p in parts.items() if p.grad is None or p.grad.norm() < 1e-12]


@torch.no_grad()
@pytest.mark.parametrize("modality", ["audio", "text"])
def test_a_model_of_one_modality_has_the_encoder_over_its_sequence(modality):
    model = sole_model(modality, fusion_type="transformer")
    batch = tiny_batch(tiny_model(), [3200, 2000, 2600], [5, 3, 7], extra=400)
    together = model(**only(batch, modality)).logits
    assert isinstance(model.mmser.joint_encoder, JointEncoder) and list(model.mmser.joint_encoder.inputs) == [modality]
    for row in range(3):
        single = model(**only(alone(batch, row), modality)).logits
        torch.testing.assert_close(single[0], together[row], rtol=0, atol=1e-4)
    for layer in model.mmser.joint_encoder.layers:
        layer.down.weight.zero_()
    assert (model(**only(batch, modality)).logits - together).abs().min() > 1e-6
    parameter_groups(model, 1e-3)


def test_all_beyond_the_encoders_compiles_to_one_graph():
    model = joint_model()
    with torch.no_grad():
        states = model.mmser.encode(**joint_batch(model))
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(**states, labels=torch.tensor([0, 1, 2, 3]))
    assert explained.graph_count == 1, explained.break_reasons


@torch.no_grad()
def test_half_precision_and_the_code_that_travels(tmp_path):
    """What `save_pretrained` copied runs by itself; bfloat16 stays near float32."""
    model = joint_model()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "fusion_mmser.py").is_file()
    batch = joint_batch(model)
    loaded = AutoModelForAudioClassification.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    half = MMSERForAudioClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    difference = half(**batch).logits.float().softmax(-1) - model(**batch).logits.softmax(-1)
    assert difference.abs().mean() < 0.1
