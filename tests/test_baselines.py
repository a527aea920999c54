# SPDX-License-Identifier: Apache-2.0
"""Tests of `benchmarks/baselines.py`: known signals, separable data, and what Transformers' Whisper really loads."""

import sys
import types
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForAudioClassification, WhisperModel

from mmser.examples import EmotionDataset

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "baselines.py"
RATE = 16_000
LABELS = ["neutral", "happy"]


# ---- the largest class


def test_majority(script):
    assert script.majority([2, 0, 2, 1, 0, 2], 4).tolist() == [2, 2, 2, 2]
    assert script.majority(np.array([1, 0]), 0).shape == (0,)


# ---- hand-made features


def pulses(pitch, seconds):
    """What the vocal folds make: harmonics up to 4 kHz of a pitch in Hz, a number or [T]."""
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(pitch, round(seconds * RATE))) / RATE
    harmonics = np.arange(1, 4000 // np.max(pitch) + 1)
    return 0.2 * (np.cos(phase[:, None] * harmonics) / harmonics).sum(1)


def features_of(script, audio, rate=RATE):
    pytest.importorskip("librosa")
    values = script.hand_made_features(audio, rate)
    assert values.shape == (len(script.FEATURE_NAMES),) and values.dtype == np.float64 and np.isfinite(values).all()
    return dict(zip(script.FEATURE_NAMES, values, strict=True))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [1, 100, 1600, 8000])
def test_features_are_finite_for_silence_clicks_and_noise(script, count):
    rng = np.random.default_rng(0)
    assert features_of(script, np.zeros(count, np.float32))["voiced_share"] == 0
    features_of(script, np.eye(1, count)[0])
    noise = features_of(script, rng.normal(size=count).astype(np.float32) * 0.1)
    assert noise["seconds"] == count / RATE
    if count == 8000:
        assert noise["voiced_share"] < 0.1 and noise["flatness_mean"] > 0.3


@pytest.mark.parametrize("pitch", [110.0, 200.0, 330.0])
def test_pitch_of_a_pulse_train(script, pitch):
    features = features_of(script, pulses(pitch, 1.0))
    assert features["pitch_mean"] == pytest.approx(pitch, rel=0.02)
    assert features["pitch_range"] < 0.5 and abs(features["pitch_slope"]) < 0.5
    assert features["voiced_share"] > 0.9
    assert features["seconds"] == 1.0


def test_pitch_that_rises_an_octave_in_a_second(script):
    features = features_of(script, pulses(150 * 2 ** np.linspace(0, 1, RATE), 1.0))
    assert features["pitch_slope"] == pytest.approx(12, abs=1)
    assert features["pitch_range"] == pytest.approx(0.9 * 12, abs=1)  # 5 to 95 %
    assert features["pitch_std"] == pytest.approx(12 / np.sqrt(12), abs=0.4)  # of a uniform distribution


def test_level_and_pauses_are_measured(script):
    speech = pulses(200.0, 0.5)
    loud, soft = features_of(script, speech), features_of(script, 0.1 * speech)
    assert loud["log_energy_mean"] - soft["log_energy_mean"] == pytest.approx(20, abs=0.5)
    assert loud["centroid_mean"] == pytest.approx(soft["centroid_mean"], rel=1e-3)
    paused = features_of(script, np.concatenate((speech, np.zeros(len(speech)))))
    assert paused["voiced_share"] == pytest.approx(0.5, abs=0.06)
    assert paused["log_energy_range"] > loud["log_energy_range"] + 30


def test_centroid_of_a_tone_at_two_rates(script):
    for rate in (8_000, 16_000):
        tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(rate) / rate)
        features = features_of(script, tone, rate)
        assert features["centroid_mean"] == pytest.approx(1000, rel=0.05)
        assert features["zero_crossing_rate_mean"] == pytest.approx(2000 / rate, rel=0.05)


def test_bad_waveforms_and_a_missing_library_are_named(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(ImportError, match="pip install librosa"):
        script.hand_made_features(np.zeros(1600), RATE)
    monkeypatch.setitem(sys.modules, "librosa", types.ModuleType("librosa"))
    for wrong in (np.zeros(0), np.zeros((2, 1600))):
        with pytest.raises(ValueError, match=r"one-dimensional and not empty, got the shape \("):
            script.hand_made_features(wrong, RATE)


# ---- linear probe


def test_pooling_ignores_padding_and_equals_numpy(script):
    states = torch.randn(2, 5, 3, 4, generator=torch.manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    pooled = script.mean_and_std(states, mask)
    assert pooled.shape == (2, 3, 8)
    for row, frames in enumerate((3, 5)):
        clip = states[row, :frames].numpy()
        assert np.allclose(pooled[row], np.concatenate((clip.mean(0), clip.std(0)), -1), atol=1e-6)


def test_probe_is_perfect_on_separable_data_and_finds_the_layer_that_tells(script):
    rng = np.random.default_rng(0)

    def clips(count):
        labels = rng.integers(3, size=count)
        features = rng.normal(size=(count, 4, 6))
        features[:, 2] += 8 * np.eye(3, 6)[labels]
        return 1e3 * features + 5, labels  # standardisation takes scale and offset away

    train, validation, evaluation = clips(90), clips(40), clips(50)
    probabilities, chosen = script.linear_probe(*train, *validation, evaluation[0])
    assert (probabilities.argmax(1) == evaluation[1]).all()
    assert np.allclose(probabilities.sum(1), 1)
    assert chosen["layer"] == 2 and chosen["validation_weighted_f1"] == 1.0 and chosen["cost"] in script.COSTS
    flat = [part[:, 2] for part in (train[0], validation[0], evaluation[0])]
    again, _ = script.linear_probe(flat[0], train[1], flat[1], validation[1], flat[2])
    assert np.allclose(again, probabilities)


def test_probe_refuses_what_does_not_fit(script):
    labels = np.array([0, 1, 0, 1])
    with pytest.raises(ValueError, match="alike, got"):
        script.linear_probe(np.zeros((4, 3)), labels, np.zeros((4, 2)), labels, np.zeros((4, 3)))
    with pytest.raises(ValueError, match="no training clip has the label 1"):
        script.linear_probe(np.zeros((3, 2)), np.array([0, 2, 0]), np.zeros((1, 2)), np.array([2]), np.zeros((1, 2)))


# ---- Transformers' own classifier


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny random Whisper without its decoder, as fp16 weights named `encoder.*`."""
    folder = tmp_path_factory.mktemp("encoder")
    config = WhisperConfig(
        **dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim", "classifier_proj_size"), 16),
        **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2),
        num_mel_bins=8,
        max_source_positions=1500,
        max_target_positions=8,
        vocab_size=20,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
    )
    torch.manual_seed(0)
    model = WhisperModel(config).to(torch.float16)
    weights = {key: value for key, value in model.state_dict().items() if key.startswith("encoder.")}
    model.save_pretrained(folder, state_dict=weights)
    WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    rows = []
    for index in range(10):
        path = folder / f"{index}.wav"
        soundfile.write(path, 0.1 * rng.normal(size=4000 + 2000 * index), RATE)
        rows.append({"audio": str(path), "labels": index % 2, "row": f"row {index}"})
    return EmotionDataset(datasets.Dataset.from_list(rows))


def test_the_pretrained_encoder_is_loaded_and_its_positions_are_sliced(script, encoder):
    model, feature_extractor = script.load_whisper_classifier(str(encoder), LABELS, window_seconds=2)
    stored, loaded = load_file(encoder / "model.safetensors"), model.state_dict()
    assert {key for key in loaded if key.startswith("encoder.")} == set(stored)
    for key, value in stored.items():
        expected = value[:100] if key == "encoder.embed_positions.weight" else value
        assert torch.equal(loaded[key], expected.float()), key
    assert model.dtype == torch.float32 and model.config.id2label == {0: "neutral", 1: "happy"}
    assert not model.encoder.embed_positions.weight.requires_grad
    batch = feature_extractor([np.zeros(1000), np.zeros(50_000)], sampling_rate=RATE, return_tensors="pt")
    assert batch["input_features"].shape == (2, 8, 200)
    assert model(**batch).logits.shape == (2, 2)


def test_a_window_of_30_seconds_is_the_stock_model(script, encoder):
    torch.manual_seed(1)
    ours, _ = script.load_whisper_classifier(str(encoder), LABELS, 30, use_weighted_layer_sum=False)
    torch.manual_seed(1)
    stock = WhisperForAudioClassification.from_pretrained(encoder, num_labels=2, dtype=torch.float32)
    features = torch.randn(1, 8, 3000)
    with torch.no_grad():
        assert torch.equal(ours.eval()(features).logits, stock.eval()(features).logits)


def test_a_window_or_weights_that_cannot_be_are_refused(script, encoder, tmp_path):
    for window in (0, 31, 2.5):
        with pytest.raises(ValueError, match=f"from 1 to 30, got {window}"):
            script.load_whisper_classifier(str(encoder), LABELS, window)
    model, feature_extractor = script.load_whisper_classifier(str(encoder), LABELS)
    weights = {key: value for key, value in model.state_dict().items() if "layers.1." not in key}
    model.save_pretrained(tmp_path, state_dict=weights)
    feature_extractor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \d+ weights of the encoder: encoder.layers.1"):
        script.load_whisper_classifier(str(tmp_path), LABELS)


def fine_tune(script, encoder, clips, **options):
    options = {"window_seconds": 1, "batch_size": 5, "use_cpu": True, "disable_tqdm": True} | options
    return script.fine_tune_whisper(str(encoder), clips, clips, {"test": clips, "again": clips}, LABELS, **options)


def test_fine_tuning_returns_probabilities_and_what_it_took(script, encoder, clips, capfd):
    probabilities, done = fine_tune(script, encoder, clips, num_epochs=1)
    assert set(probabilities) == {"test", "again"}
    assert probabilities["test"].shape == (10, 2) and np.allclose(probabilities["test"].sum(1), 1)
    assert (probabilities["test"] == probabilities["again"]).all()
    assert done["steps"] == done["planned_steps"] == 2 and done["epochs"] == 1.0 and not done["out_of_time"]
    assert done["seconds"] > 0 and done["seconds_per_step"] is None
    assert 0 <= done["validation_weighted_f1"] <= 1
    again, _ = fine_tune(script, encoder, clips, num_epochs=1)
    assert np.allclose(again["test"], probabilities["test"])
    other, _ = fine_tune(script, encoder, clips, num_epochs=1, seed=1)
    assert not np.allclose(other["test"], probabilities["test"])


def test_a_frozen_encoder_stays_and_the_head_learns(script, encoder, clips, monkeypatch):
    models = []

    def load(*arguments):
        models.append(original(*arguments))
        return models[-1]

    original = script.load_whisper_classifier
    monkeypatch.setattr(script, "load_whisper_classifier", load)
    _, done = fine_tune(script, encoder, clips, num_epochs=1, freeze_encoder=True, learning_rate=0.1)
    torch.manual_seed(42)
    model, start = models[0][0], load_file(encoder / "model.safetensors")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"layer_weights", "projector.weight", "projector.bias", "classifier.weight", "classifier.bias"}
    assert done["trainable_parameters"] == sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    assert torch.equal(model.encoder.layers[0].fc1.weight, start["encoder.layers.0.fc1.weight"].float())
    assert not torch.allclose(model.layer_weights, torch.full((3,), 1 / 3))


def test_a_budget_plans_the_steps_and_stops_training_when_it_is_used_up(script, encoder, clips, monkeypatch):
    monkeypatch.setattr(script, "_seconds_per_step", lambda *arguments, **options: 10.0)
    schedules = []
    original = script.Trainer.create_scheduler

    def create_scheduler(trainer, num_training_steps, optimizer=None):
        schedules.append(num_training_steps)
        return original(trainer, num_training_steps, optimizer)

    monkeypatch.setattr(script.Trainer, "create_scheduler", create_scheduler)
    _, done = fine_tune(script, encoder, clips, num_epochs=50, max_seconds_of_training=35.0)
    assert done["planned_steps"] == done["steps"] == 3 and schedules == [3] and done["epochs"] == 1.5
    assert not done["out_of_time"] and done["seconds_per_step"] == 10.0
    _, done = fine_tune(script, encoder, clips, num_epochs=2, max_seconds_of_training=1000.0)
    assert done["planned_steps"] == 4  # the epochs are enough
    monkeypatch.setattr(script, "_seconds_per_step", lambda *arguments, **options: 1e-6)
    _, done = fine_tune(script, encoder, clips, num_epochs=50, max_seconds_of_training=1e-3)
    assert done["planned_steps"] == 100 and done["steps"] == 1 and done["out_of_time"]


def test_measuring_leaves_the_model_as_it_was(script, encoder, clips):
    probabilities, _ = fine_tune(script, encoder, clips, num_epochs=1)
    measured, done = fine_tune(script, encoder, clips, num_epochs=1, max_seconds_of_training=600.0, measured_steps=3)
    assert 0 < done["seconds_per_step"] < 60 and done["steps"] == 2
    assert np.allclose(measured["test"], probabilities["test"])
    for wrong in ({"max_seconds_of_training": 0.0}, {"max_seconds_of_training": 1.0, "measured_steps": 2}):
        with pytest.raises(ValueError, match="must be positive and measured_steps at least 3"):
            fine_tune(script, encoder, clips, **wrong)
