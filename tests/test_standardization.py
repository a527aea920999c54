# SPDX-License-Identifier: Apache-2.0
"""Standardised audio states: per dimension and layer, over valid frames only, and never dependent on a batch."""

import numpy as np
import pytest
import torch
from tiny import alone, tiny_batch, tiny_model

from modeling_mmser import MMSERForAudioClassification

KINDS = ("wav2vec2", "whisper")
LENGTHS = {"wav2vec2": [6000, 3600, 2000], "whisper": [60, 37, 20]}


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
    assert not model.mmser.state_norm.mean.any() and (model.mmser.state_norm.scale == 1).all()
    batch = tiny_batch(model, LENGTHS["wav2vec2"], [3, 4, 5])
    model.train()
    model.mmser.fit_standardization([batch, {"input_ids": batch["input_ids"]}])
    assert model.training
    model.save_pretrained(tmp_path)
    loaded = MMSERForAudioClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.mmser.state_norm.mean, model.mmser.state_norm.mean)
    assert torch.equal(loaded.mmser.state_norm.scale, model.mmser.state_norm.scale)
    with pytest.raises(ValueError, match="gave no batch"):
        model.mmser.fit_standardization([])
