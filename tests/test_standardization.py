# SPDX-License-Identifier: Apache-2.0
"""Standardised audio states, per dimension and layer over valid frames only, and pooled vectors, per dimension over
the clips that have the modality; never dependent on a batch. The reference is numpy in float64, one clip at a time.
"""

import copy

import numpy as np
import pytest
import torch
from tiny import alone, fit_openmax_by_chance, randomize, tiny_batch, tiny_config, tiny_model
from torch import nn

from configuration_mmser import MMSERConfig
from modeling_mmser import MMSERForAudioClassification, Moments, Standardization

KINDS = ("wav2vec2", "whisper")
MODULES = ("state_norm", "fusion.audio_norm", "fusion.text_norm")
LENGTHS = {"wav2vec2": [6000, 3600, 2000], "whisper": [60, 37, 20]}


SOME_MISSING = ([[0, 1, 2], [0, None, 2], [None, 1, 0]], [[4, 3, 5], [0, 4, 5], [6, 5, 0]])


def some_missing(model):
    """Batches of three clips; some clips lack the audio, some the text."""
    lengths = LENGTHS["whisper" if model.config.uses_log_mel else "wav2vec2"]
    return [
        tiny_batch(model, [0 if i is None else lengths[i] for i in audio], text, seed=10 * seed + index)
        for seed in range(6)
        for index, (audio, text) in enumerate(zip(*SOME_MISSING, strict=True))
    ]


def pooled_of(model, batches):
    """Pooled audio and text of the clips that have them, one clip at a time, float64 [N, 2 D] each."""
    pooled = {"audio_embeds": [], "text_embeds": []}
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            clip = alone(batch, row)
            with torch.no_grad():
                output = model.mmser.eval()(**clip)
            has_text = "input_ids" in clip
            for name, is_there in (("audio_embeds", len(clip) > has_text), ("text_embeds", has_text)):
                if is_there:
                    pooled[name].append(output[name][0].double().numpy())
    return [np.stack(vectors) for vectors in pooled.values()]


def layers_of(model, batch):
    """All valid frames of each layer, float64 [layers, frames, D], one clip at a time."""
    backbone, frames = model.mmser.eval(), []
    name = "input_features" if model.config.uses_log_mel else "input_values"
    for row in range(len(batch["attention_mask"])):
        clip = alone(batch, row)
        with torch.no_grad():
            _, _, output = backbone._encode_audio(
                clip[name], clip.get("attention_mask"), output_hidden_states=True, output_attentions=False
            )
        frames.append(torch.stack(backbone._audio_layers(output))[:, 0].double().numpy())
    return np.concatenate(frames, axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_standardised_over_valid_frames(kind):
    model = tiny_model(kind, 0)
    batch = tiny_batch(model, LENGTHS[kind], [3, 4, 5])
    expected = layers_of(model, batch)
    model.mmser.fit_standardization([batch])
    np.testing.assert_allclose(model.mmser.state_norm.mean, expected.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(1 / model.mmser.state_norm.scale, expected.std(axis=1), rtol=1e-3)
    weights = torch.softmax(model.mmser.layer_weights, dim=0).detach().double().numpy()
    standardised = (expected - expected.mean(axis=1, keepdims=True)) / expected.std(axis=1, keepdims=True)
    clip = alone(batch, 0)
    name = "input_features" if model.config.uses_log_mel else "input_values"
    with torch.no_grad():
        states = model.mmser._weigh_layers(model.mmser._encode_audio(clip[name], None)[0])
    first = np.einsum("l,lfd->fd", weights, standardised)[: states.shape[1]]
    np.testing.assert_allclose(states[0], first, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_still_does_not_depend_on_its_batch(kind):
    model = tiny_model(kind, 1)
    batch = tiny_batch(model, LENGTHS[kind], [3, 4, 5])
    # Of three clips alone many a dimension would have a deviation near 0, and be blown up
    clips = [tiny_batch(model, LENGTHS[kind], [3, 4, 5], seed=seed) for seed in range(10)]
    model.mmser.fit_standardization(clips)
    with torch.no_grad():
        logits = model.eval()(**batch).logits
        for row in range(3):
            assert (model(**alone(batch, row)).logits[0] - logits[row]).abs().max() < 1e-4


def test_one_large_dimension_no_longer_hides_the_others():
    """What Whisper's layers 4 and 5 do to the LayerNorm behind them: a dimension 40 times as large as the rest."""
    model = tiny_model("wav2vec2", 2)
    batch = tiny_batch(model, LENGTHS["wav2vec2"], [3, 4, 5])
    norm = model.mmser.audio_encoder.encoder.layers[-1].final_layer_norm
    with torch.no_grad():
        norm.weight[0] = 40.0 * norm.weight.abs().mean()

    def share_of_dimension_0():
        with torch.no_grad():
            layers, mask, _ = model.mmser.eval()._encode_audio(batch["input_values"], batch["attention_mask"])
            states = model.mmser._weigh_layers(layers)
        variance = states[mask].var(dim=0)
        return (variance[0] / variance.sum()).item()

    before = share_of_dimension_0()
    model.mmser.fit_standardization([batch])
    assert before > 0.5 > 0.2 > share_of_dimension_0()


def test_saved_with_the_checkpoint_and_identity_until_fitted(tmp_path):
    model = tiny_model("wav2vec2", 3)
    norms = [model.mmser.get_submodule(name) for name in MODULES]
    for norm in norms:
        vectors = torch.randn(5, *norm.mean.shape)
        assert torch.equal(norm(vectors), vectors)
    batch = tiny_batch(model, LENGTHS["wav2vec2"], [3, 4, 5])
    model.train()
    model.mmser.fit_standardization([batch, {"input_ids": batch["input_ids"]}])
    assert model.training
    model.save_pretrained(tmp_path)
    loaded = MMSERForAudioClassification.from_pretrained(tmp_path)
    for name, norm in zip(MODULES, norms, strict=True):
        assert norm.mean.any() and (norm.scale != 1).any()
        assert torch.equal(loaded.mmser.get_submodule(name).mean, norm.mean)
        assert torch.equal(loaded.mmser.get_submodule(name).scale, norm.scale)
    with pytest.raises(ValueError, match="gave no batch"):
        model.mmser.fit_standardization([])


# --- pooled vectors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pooled_vectors_are_standardised_over_the_clips_that_have_them(kind):
    model = tiny_model(kind, 4)
    batches = some_missing(model)
    model.mmser.fit_standardization(batches)
    fusion = model.mmser.fusion
    for norm, vectors in zip((fusion.audio_norm, fusion.text_norm), pooled_of(model, batches), strict=True):
        assert len(vectors) == 42  # of 54; the others lack it
        assert vectors.std(axis=0).min() > 0.02 * vectors.std(axis=0).mean()  # no dimension stands still
        np.testing.assert_allclose(norm.mean, vectors.mean(axis=0), atol=1e-4)
        np.testing.assert_allclose(1 / norm.scale, vectors.std(axis=0), rtol=1e-2)
        standardised = norm(torch.from_numpy(vectors).float()).double().numpy()
        np.testing.assert_allclose(standardised.mean(axis=0), 0, atol=1e-2)
        np.testing.assert_allclose(standardised.std(axis=0), 1, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_fitting_on_states_is_fitting_on_what_they_were_encoded_from(kind):
    model, other = tiny_model(kind, 5), tiny_model(kind, 5)
    batches = some_missing(model)
    model.mmser.fit_standardization(batches)
    with torch.no_grad():
        states = [other.mmser.encode(**batch) | {"labels": torch.zeros(3)} for batch in batches]
    other.mmser.fit_standardization(states)
    expected, fitted = (dict(each.mmser.named_buffers()) for each in (model, other))
    names = {f"{module}.{name}" for module in MODULES for name in ("mean", "scale")}
    assert names <= set(fitted)
    for name in names:
        torch.testing.assert_close(fitted[name], expected[name], rtol=1e-3, atol=1e-5, msg=name)
        assert not torch.equal(fitted[name], torch.full_like(fitted[name], name.endswith("scale")))


@pytest.mark.parametrize("only", ["text", "audio"])
def test_batches_of_one_modality_leave_the_other_as_it_is(only):
    model = tiny_model("wav2vec2", 6)
    own = ("input_ids", "text_attention_mask") if only == "text" else ("input_values", "attention_mask")
    batches = [{name: batch[name] for name in own} for batch in some_missing(model)]
    model.mmser.fit_standardization(batches)
    fitted = {name for name in MODULES if (model.mmser.get_submodule(name).scale != 1).any()}
    assert fitted == ({"fusion.text_norm"} if only == "text" else {"state_norm", "fusion.audio_norm"})
    assert all(buffer.isfinite().all() for buffer in model.mmser.buffers())


def test_batches_without_masks_are_whole():
    model, other = tiny_model("wav2vec2", 7), tiny_model("wav2vec2", 7)
    batches = [tiny_batch(model, [4000] * 3, [5] * 3, seed=seed) for seed in range(8)]
    model.mmser.fit_standardization(batches)
    other.mmser.fit_standardization([{name: b[name] for name in ("input_values", "input_ids")} for b in batches])
    for (name, expected), buffer in zip(model.mmser.named_buffers(), other.mmser.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_layer_norm_as_published():
    model = tiny_model("wav2vec2", 8, fusion_norm="layer_norm")
    fusion = model.mmser.fusion
    assert type(fusion.audio_norm) is type(fusion.text_norm) is nn.LayerNorm
    before = {name: value.clone() for name, value in fusion.state_dict().items()}
    model.mmser.fit_standardization([tiny_batch(model, LENGTHS["wav2vec2"], [3, 4, 5])])
    assert all(torch.equal(value, before[name]) for name, value in fusion.state_dict().items())
    assert model.mmser.state_norm.mean.any()  # those of the encoder are standardised all the same


def test_the_fusion_sees_standardised_vectors():
    model, seen = tiny_model("wav2vec2", 9), []
    batches = some_missing(model)
    model.mmser.fit_standardization(batches)
    model.mmser.fusion.audio.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for batch in batches:
            model(**{name: value[batch["attention_mask"].any(dim=1)] for name, value in batch.items()})
    vectors = torch.cat(seen).double()
    torch.testing.assert_close(vectors.mean(dim=0), torch.zeros(32).double(), rtol=0, atol=1e-2)
    torch.testing.assert_close(vectors.std(dim=0, correction=0), torch.ones(32).double(), rtol=0, atol=1e-2)


# --- another place ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_centre_moves_to_other_clips(kind, tmp_path):
    """Over the clips that have audio, one at a time; everything else stays."""
    model = tiny_model(kind, 10)
    batches = some_missing(model)
    model.mmser.fit_standardization(batches[:9])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    audio, _ = pooled_of(model, batches[9:])
    model.train()
    assert model.mmser.recentre(batches[9:]) == len(audio) == 21 and model.training
    name = "mmser.fusion.audio_norm.mean"
    expected = (audio.sum(axis=0) + 5 * before[name].double().numpy()) / (len(audio) + 5)
    np.testing.assert_allclose(model.state_dict()[name], expected, atol=1e-5)
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])] == [name]
    model.save_pretrained(tmp_path)
    loaded = MMSERForAudioClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.mmser.fusion.audio_norm.mean, model.mmser.fusion.audio_norm.mean)


def test_a_place_that_moves_all_clips_alike_is_no_longer_heard():
    """Each state moved by one vector: the answers are those of before, up to what the former centre counts for."""
    config = tiny_config("wav2vec2", pooling_type="statistics", cross_attention_layer_norm=False).to_dict() | {
        "modalities": ["audio"],
        "text_config": None,
    }
    torch.manual_seed(11)
    model = randomize(MMSERForAudioClassification(MMSERConfig(**config))).eval()
    rng = torch.Generator().manual_seed(0)
    layers, size = model.mmser.state_norm.mean.shape
    states = torch.randn(200, 7, layers, size, generator=rng)
    moved = states + torch.randn(layers, size, generator=rng)
    model.mmser.fit_standardization([{"audio_states": states}])
    with torch.no_grad():
        at_home, abroad = (model(audio_states=own).logits for own in (states, moved))
        left = [(abroad - at_home).abs().mean().item()]
        for count in (5, 50, 200):
            own = copy.deepcopy(model)
            assert own.mmser.recentre({"audio_states": clip[None]} for clip in moved[:count]) == count
            left.append((own(audio_states=moved).logits - at_home).abs().mean().item())
    assert left == sorted(left, reverse=True) and left[-1] < 0.15 * left[0]


def test_what_is_heard_there_counts_as_known():
    """The thresholds rise until the share is accepted, and never fall."""
    model = tiny_model("wav2vec2", 13)
    fit_openmax_by_chance(model)
    batches = some_missing(model)
    openmax = model.openmax
    for former in (-1e3, 1e3):
        openmax.rejection_thresholds.fill_(former)
        own = copy.deepcopy(model).eval()  # reads that there are thresholds
        own.adapt_to(batches)
        with torch.no_grad():
            outputs = [own(**batch) for batch in batches]
        scores = torch.cat([output.rejection_score[:, 0] for output in outputs])
        accepted = 1 - torch.cat([output.is_unknown for output in outputs]).float().mean().item()
        if former < 0:
            assert 0.95 <= accepted < 0.95 + 1.5 / len(scores)
            assert (own.openmax.rejection_thresholds == own.openmax.rejection_thresholds[0]).all()
        else:
            assert accepted == 1 and (own.openmax.rejection_thresholds == former).all()
    openmax.reset()
    assert model.eval().adapt_to(batches) == 42 and not openmax.has_thresholds


def test_what_has_no_centre_is_refused():
    model = tiny_model("wav2vec2", 12)
    words = tiny_batch(model, LENGTHS["wav2vec2"], [3, 4, 5])
    words["attention_mask"] = torch.zeros_like(words["attention_mask"])
    before = model.mmser.fusion.audio_norm.mean.clone()
    for batches in ([], [words], [{"input_ids": words["input_ids"]}]):
        with pytest.raises(ValueError, match="no clip has audio"):
            model.mmser.recentre(batches)
    assert torch.equal(model.mmser.fusion.audio_norm.mean, before)
    published = tiny_model("wav2vec2", 12, fusion_norm="layer_norm")
    with pytest.raises(ValueError, match="has a centre to move"):
        published.mmser.recentre([tiny_batch(published, LENGTHS["wav2vec2"], [3, 4, 5])])


# --- the parts -------------------------------------------------------------------------------------------------------


def test_moments_come_in_parts():
    vectors = 1000 + np.random.default_rng(0).normal(size=(50, 2, 3))  # far from 0: cancellation would show
    moments, norm = Moments(), Standardization(2, 3)
    for part in np.split(vectors, [0, 1, 20, 20]):
        moments.add(torch.from_numpy(part))
    norm.fit(moments)
    assert moments.count == 50
    np.testing.assert_allclose(norm.mean, vectors.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(1 / norm.scale, vectors.std(axis=0), rtol=1e-5)


def test_what_does_not_move_is_not_blown_up():
    """A dimension that stands still beside others; and vectors that are all alike, which leave all as it is."""
    vectors = np.random.default_rng(1).normal(size=(50, 4)) * [1.0, 2.0, 1e-9, 0.0] + [0, 5, 3, 7]
    moments, norm = Moments(), Standardization(4)
    moments.add(torch.from_numpy(vectors))
    norm.fit(moments)
    scale = norm.scale.numpy()
    np.testing.assert_allclose(1 / scale[:2], vectors.std(axis=0)[:2], rtol=1e-5)
    assert (scale[2:] <= 100 / vectors.std(axis=0).mean() * 1.001).all() and np.isfinite(scale).all()
    for alike in (np.zeros((0, 4)), vectors[:1], np.full((5, 4), 0.1), vectors[:1] + 1e-8 * vectors, np.zeros((5, 4))):
        moments, norm = Moments(), Standardization(4)
        moments.add(torch.from_numpy(alike))
        norm.fit(moments)
        assert norm.mean.tolist() == [0] * 4 and norm.scale.tolist() == [1] * 4


def test_one_sentence_over_and_over():
    """As in a corpus that was read from one card: its text says nothing, and must not be made to."""
    model = tiny_model("wav2vec2", 10)
    with torch.no_grad():
        model.mmser.text_attention.output.weight.zero_()  # as it starts
    batches = [tiny_batch(model, LENGTHS["wav2vec2"], [5, 5, 5], seed=seed) for seed in range(3)]
    for batch in batches:
        batch["input_ids"] = torch.tensor([[5, 6, 7, 8, 9]] * 3)
    model.mmser.fit_standardization(batches)
    assert (model.mmser.fusion.text_norm.scale == 1).all() and (model.mmser.fusion.audio_norm.scale != 1).any()


def test_half_precision_goes_through_single():
    norm = Standardization(3)
    norm.mean.copy_(torch.tensor([100.0, 0.0, -3.0]))
    norm.scale.copy_(torch.tensor([2.0, 0.5, 1.0]))
    states = torch.tensor([[101.0, 4.0, -3.0]], dtype=torch.bfloat16)
    assert norm(states).dtype == torch.bfloat16 and norm(states).tolist() == [[2.0, 2.0, 0.0]]
