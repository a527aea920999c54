# SPDX-License-Identifier: Apache-2.0
"""Tests of `benchmarks/baselines.py`: known signals, separable data, and what Transformers' Whisper really loads."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from tiny_corpus import AUDIO, tiny_tokenizer, write_corpus
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from audio_mmser import load_audio
from mmser.examples import EmotionDataset
from mmser.loading import load_emotion_dataset

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "baselines.py"
RATE = 16_000
LABELS = ["neutral", "happy"]


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
def test_features_are_finite_for_silence_clicks_and_noise(script):
    for count in (1, 1600):
        assert features_of(script, np.zeros(count, np.float32))["voiced_share"] == 0
        features_of(script, np.eye(1, count)[0])
    noise = features_of(script, np.random.default_rng(0).normal(size=8000).astype(np.float32) * 0.1)
    assert noise["seconds"] == 0.5 and noise["voiced_share"] < 0.1 and noise["flatness_mean"] > 0.3


def test_pitch_of_a_pulse_train(script):
    features = features_of(script, pulses(200.0, 1.0))
    assert features["pitch_mean"] == pytest.approx(200, rel=0.02)
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
    predictions, chosen = script.linear_probe(*train, *validation, evaluation[0])
    assert (predictions == evaluation[1]).all()
    assert chosen["layer"] == 2 and chosen["validation_weighted_f1"] == 1.0 and chosen["cost"] in script.COSTS


def test_the_probe_of_an_encoder_is_on_mean_and_deviation_of_each_layer(script, tmp_path, monkeypatch):
    seen = {}

    def linear_probe(train, train_labels, validation, validation_labels, test):
        seen.update(train=train, test=test)
        return np.ones(len(test), int), {"layer": 1, "cost": 0.1, "validation_weighted_f1": 0.5}

    monkeypatch.setattr(script, "linear_probe", linear_probe)
    write_corpus(tmp_path / "speech")
    torch.manual_seed(0)
    encoder = Wav2Vec2Model(Wav2Vec2Config(**AUDIO)).eval()
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    for part in (encoder, extractor):
        part.save_pretrained(tmp_path / "audio")
    tiny_tokenizer().save_pretrained(tmp_path / "text")
    result = script.probe_encoder(str(tmp_path / "speech"), str(tmp_path / "audio"), str(tmp_path / "text"))
    whole = result["scores"][0]
    assert (whole["score"], whole["group"], whole["clips"], whole["accuracy"]) == ("audio_only", "all", 16, 0.25)
    assert result["validation_weighted_f1"] == 0.5 and result["details"] == {"layer": 1, "cost": 0.1}
    assert {line["group"] for line in result["scores"]} > {"corpus=sine", "language=en"}
    splits = load_emotion_dataset(tmp_path / "speech")[0]
    for split in ("train", "test"):
        audio = load_audio(splits[split][3]["audio"])
        inputs = extractor(audio, sampling_rate=RATE, return_tensors="pt")["input_values"]
        with torch.no_grad():
            states = torch.stack(encoder(inputs, output_hidden_states=True).hidden_states)[:, 0]
        expected = torch.cat([states.mean(dim=1), states.std(dim=1, correction=0)], dim=-1)
        np.testing.assert_allclose(seen[split][3], expected, atol=1e-4)
    majority = script.majority(str(tmp_path / "speech"))["scores"]
    assert {line["accuracy"] for line in majority if line["group"] == "all"} == {0.25}


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


def test_an_encoder_without_all_of_its_weights_is_refused(script, encoder, tmp_path):
    model, feature_extractor = script.load_whisper_classifier(str(encoder), LABELS)
    weights = {key: value for key, value in model.state_dict().items() if "layers.1." not in key}
    model.save_pretrained(tmp_path, state_dict=weights)
    feature_extractor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \d+ weights of the encoder: encoder.layers.1"):
        script.load_whisper_classifier(str(tmp_path), LABELS)


def fine_tune(script, encoder, clips, seconds, **options):
    options = {"window_seconds": 1, "batch_size": 5, "use_cpu": True, "disable_tqdm": True, **options}
    return script.fine_tune_whisper(
        str(encoder), clips, clips, clips, LABELS, max_seconds_of_training=seconds, **options
    )


def test_fine_tuning_measures_a_step_plans_and_repeats(script, encoder, clips):
    predictions, done = fine_tune(script, encoder, clips, 600.0, num_epochs=1)
    assert predictions.shape == (10,) and set(predictions) <= {0, 1}
    assert done["steps"] == done["planned_steps"] == 2 and done["epochs"] == 1.0 and not done["out_of_time"]
    assert done["training_seconds"] > 0 and 0 < done["seconds_per_step"] < 60
    assert 0 <= done["validation_weighted_f1"] <= 1
    again, repeated = fine_tune(script, encoder, clips, 600.0, num_epochs=1)
    assert (again == predictions).all()  # the steps that were measured leave the model as it was
    assert repeated["validation_weighted_f1"] == done["validation_weighted_f1"]


def test_a_budget_plans_the_steps_and_stops_training_when_it_is_used_up(script, encoder, clips, monkeypatch):
    monkeypatch.setattr(script, "_seconds_per_step", lambda *arguments, **options: 10.0)
    _, done = fine_tune(script, encoder, clips, 35.0, num_epochs=50)
    assert done["planned_steps"] == done["steps"] == 3 and done["epochs"] == 1.5
    assert not done["out_of_time"] and done["seconds_per_step"] == 10.0
    monkeypatch.setattr(script, "_seconds_per_step", lambda *arguments, **options: 1e-6)
    _, done = fine_tune(script, encoder, clips, 1e-3, num_epochs=50)
    assert done["planned_steps"] == 100 and done["steps"] == 1 and done["out_of_time"]
