# SPDX-License-Identifier: Apache-2.0
"""Tests of `mmser.pruning` and `mmser.pruning_run`: what a unit is worth, what is left, that it loads as always."""

import copy
import json

import numpy as np
import pytest
import torch
from tiny import AUDIO_CONFIGS, TEXT_CONFIG, alone, tiny_batch, tiny_config, tiny_model
from tiny_corpus import tiny_model as tiny_corpus_model
from tiny_corpus import tiny_processor, write_corpus

import export_hf
from benchmarks import smaller
from mmser.pruning import layer_importance, prune, remove_layers, units_of, units_to_keep
from modeling_mmser import MMSERForAudioClassification
from quantization_mmser import quantize_dynamic

KINDS = [*AUDIO_CONFIGS, "xlm-roberta"]


def model_of(kind, **overrides):
    if kind == "xlm-roberta":
        return tiny_model(text={"model_type": kind, "max_position_embeddings": 44, "pad_token_id": 1}, **overrides)
    return tiny_model(kind, **overrides)


def clips_of(model, number=6):
    longest = 100 if model.config.uses_log_mel else 3200
    return [tiny_batch(model, [longest - 11 * seed], [5 + seed % 3], seed) for seed in range(number)]


def batch_of(model):
    return tiny_batch(model, [100, 60, 0] if model.config.uses_log_mel else [3200, 2000, 0], [5, 0, 7], seed=9)


def encoders_of(model):
    return [model.mmser.audio_encoder, model.mmser.text_encoder]


def all_units(model):
    return [units for encoder in encoders_of(model) for each in units_of(encoder) for units in each]


def double_clips(model, number=6):
    return [
        {name: value.double() if value.is_floating_point() else value for name, value in clip.items()}
        for clip in clips_of(model, number)
    ]


# --- what is left ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pruning_nothing_changes_no_bit(kind):
    model = model_of(kind)
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    report = prune(model, clips_of(model), 0.0)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert model.config.to_dict() == config and report.parameters_before == report.parameters_after


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_units_without_weight_go_first_and_nothing_changes(kind):
    model = model_of(kind).double()
    rng = np.random.default_rng(0)
    for units in all_units(model):
        number = len(units) - units_to_keep(len(units), 0.4, 1 if units.attention else 8)
        for unit in rng.choice(len(units), number, replace=False):
            units.after.weight[:, unit * units.size : (unit + 1) * units.size] = 0
    clips = double_clips(model)
    expected = [model(**clip).logits for clip in clips]
    prune(model, clips, 0.4)
    assert model.config.text_config.intermediate_size == 24 and model.config.text_attention_heads == 1
    for clip, logits in zip(clips, expected, strict=True):
        torch.testing.assert_close(model(**clip).logits, logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_pruned_model_is_smaller_loads_and_ignores_padding(kind, tmp_path):
    model = model_of(kind)
    batch = batch_of(model)
    whole = model(**batch).logits
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    report = prune(model, clips_of(model), 0.4, layer_share=0.5)
    heads = model.config.audio_attention_heads
    assert heads == (None if kind == "wavlm" else 1) and model.config.text_attention_heads == 1
    assert len(units_of(model.mmser.audio_encoder)[1]) == len(units_of(model.mmser.text_encoder)[1]) == 1
    # Of a layer: 8 of 32 columns, and one of two heads of 8, each with its biases; then all of another layer
    lost = sum(8 * (16 + 1 + 16) for _ in range(2)) + sum(4 * 8 * 16 + 3 * 8 for _ in range(1 if heads is None else 2))
    lost -= 8 if kind == "whisper" else 0  # whose keys have no bias
    layers = [name for name in shapes if name not in model.state_dict() and ".layer" in name]
    whole_layers = sum(shapes[name].numel() for name in layers) + (model.mmser.layer_weights is not None)
    assert report.parameters_before - report.parameters_after == lost + whole_layers
    model.save_pretrained(tmp_path)
    loaded, problems = MMSERForAudioClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(problems[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    together = loaded(**batch).logits
    assert torch.equal(together, model(**batch).logits) and not torch.equal(together, whole)
    for row in range(3):
        torch.testing.assert_close(loaded(**alone(batch, row)).logits[0], together[row], rtol=1e-4, atol=1e-4)


# --- what decides ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
@torch.no_grad()
def test_importance_is_the_change_without_a_unit(kind):
    """In float64: every unit is masked alone, and the output of its matrix compared."""
    model = model_of(kind).double()
    clips = double_clips(model, 3)
    for units in all_units(model):
        seen = []
        hook = units.after.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[0][0]))
        for clip in clips:
            model.mmser.encode(**clip)
        hook.remove()
        rows = torch.cat(seen)
        expected = []
        for unit in range(len(units)):
            masked = rows.clone()
            masked[:, unit * units.size : (unit + 1) * units.size] = 0
            expected.append((units.after(rows) - units.after(masked)).square().sum(dim=1).mean().item())
        for part in seen:
            units.see(part)
        assert len(units) == (2 if units.attention else 32)
        np.testing.assert_allclose(units.importance().numpy(), expected, rtol=1e-9)


@torch.no_grad()
def test_what_stays_takes_over_by_least_squares():
    """Against `numpy.linalg.lstsq` on the rows themselves, with the ridge as more rows."""
    model = model_of("whisper").double()
    _, (units, *_) = units_of(model.mmser.audio_encoder)
    rows = torch.randn(200, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = rows @ torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 1
    units.see(rows)
    kept = torch.arange(0, 32, 2)
    wanted, weight, first = units.after(rows), units.after.weight.clone(), units.before[0].weight.clone()
    gone = torch.arange(1, 32, 2)
    ridge = 1e-3 * float((rows[:, kept] ** 2).sum(dim=0).mean())
    known = np.concatenate([rows[:, kept].numpy(), np.ones((200, 1))], axis=1)
    held_back = np.concatenate([np.sqrt(ridge) * np.eye(16), np.zeros((16, 1))], axis=1)
    target = np.concatenate([(rows[:, gone] @ weight[:, gone].T).numpy(), np.zeros((16, 16))])
    correction = np.linalg.lstsq(np.concatenate([known, held_back]), target, rcond=None)[0]
    units.keep(kept)
    np.testing.assert_allclose(units.after.weight - weight[:, kept], correction[:-1].T, atol=1e-8)
    torch.testing.assert_close(units.before[0].weight, first[kept])
    without = rows[:, kept] @ weight[:, kept].T + units.after.bias - torch.from_numpy(correction[-1])
    assert (units.after(rows[:, kept]) - wanted).norm() < 0.8 * (without - wanted).norm()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_layer_is_worth_what_its_absence_changes(kind):
    """Against a model that is built with fewer layers and given the weights by their names."""
    model = model_of(kind)
    clips = clips_of(model, 3)
    before = [model(**clip).logits.double().softmax(-1) for clip in clips]
    for modality, path in (("audio", "encoder.layers"), ("text", "encoder.layer")):
        path = "layers" if (kind, modality) == ("whisper", "audio") else path
        importance = layer_importance(model, modality, clips)
        for number in range(2):
            if kind == "wavlm" and modality == "audio" and number == 0:
                assert importance[0] == torch.inf
                continue
            config = copy.deepcopy(model.config)
            getattr(config, f"{modality}_config").num_hidden_layers = 1
            smaller = MMSERForAudioClassification(config).eval()
            prefix, state = f"mmser.{modality}_encoder.{path}.", {}
            for name, value in model.state_dict().items():
                if name.startswith(f"{prefix}{number}."):
                    continue
                state[name.replace(f"{prefix}{1 - number}.", f"{prefix}0.")] = value
            if modality == "audio":
                final_norm = kind in ("whisper", "wav2vec2-layer")
                rows = [0, 2] if final_norm or number == 0 else [0, 1]
                for name in ("mmser.layer_weights", "mmser.state_norm.mean", "mmser.state_norm.scale"):
                    state[name] = state[name][rows]
            smaller.load_state_dict(state)
            after = [smaller(**clip).logits.double().softmax(-1) for clip in clips]
            divergence = np.mean([(p * (p / q).log()).sum() for p, q in zip(before, after, strict=True)])
            assert importance[number].item() == pytest.approx(divergence, rel=1e-3, abs=1e-6)
    assert model.config.to_dict() == model_of(kind).config.to_dict()


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "clips", "message"),
    [
        (1.0, "good", r"`share` must be in \[0, 1\), got 1.0"),
        (0.3, "padded", "has padding in its audio"),
        (0.3, "two", "come one by one"),
        (0.3, "silent", "None of the 6 calibration clips has text"),
    ],
)
def test_clips_that_cannot_decide_are_refused(share, clips, message):
    model = tiny_model("whisper")
    good = clips_of(model)
    kinds = {
        "good": good,
        "padded": [tiny_batch(model, [50], [5], extra=4)],
        "two": [tiny_batch(model, [50, 50], [5, 5])],
        "silent": [{name: value for name, value in clip.items() if "text" not in name} for clip in good],
    }
    for clip in kinds["silent"]:
        clip.pop("input_ids")
    with pytest.raises(ValueError, match=message):
        prune(model, kinds[clips], share)


def test_encoders_that_cannot_be_pruned_are_refused():
    text = {"model_type": "distilbert", "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "vocab_size": 100}
    model = MMSERForAudioClassification(tiny_config("whisper", text=text))
    with pytest.raises(ValueError, match="A distilbert encoder cannot be pruned; these can: wav2vec2, hubert"):
        prune(model, clips_of(model), 0.3)
    with pytest.raises(ValueError, match="at most none but all of its can stay"):
        MMSERForAudioClassification(tiny_config("wavlm", audio_attention_heads=1))
    with pytest.raises(ValueError, match="at most 2 can stay"):
        MMSERForAudioClassification(tiny_config("whisper", text_attention_heads=3))
    assert TEXT_CONFIG["num_attention_heads"] == 2


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(shared):
    def make(folder):
        write_corpus(folder / "corpus")
        torch.manual_seed(0)
        tiny_corpus_model(whisper=True).save_pretrained(folder / "checkpoint")
        tiny_processor(True).save_pretrained(folder / "checkpoint")

    return shared("pruning", make)


def run(folder, output, *flags):
    words = ["--checkpoint", folder / "checkpoint", "--output_dir", output, "--use_cpu", *flags]
    return export_hf.main([str(word) for word in words])


def test_the_command_prunes_trains_and_exports_in_int8(folder, tmp_path):
    """The export itself compares what it wrote with the pruned model. `test_export.py` has ONNX of pruned heads."""
    data = ["--data_dir", folder / "corpus", "--calibration_clips", "8"]
    report = run(
        *(folder, tmp_path / "out", "--prune", "0.5", *data, "--recovery_epochs", "1", "--freeze_audio"),
        *("--format", "safetensors", "--dtype", "int8"),
    )
    assert "each with 1 heads and 8 columns" in str(report) and "trained again for 1 epochs" in str(report)
    assert report.comparisons.keys() == {"safetensors"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["audio_attention_heads"] == 1 and config["audio_config"]["encoder_ffn_dim"] == 8
    model = MMSERForAudioClassification.from_pretrained(tmp_path / "out")
    assert model.openmax.is_fitted or model.temperature.item() != 1.0  # fitted after the training


def test_the_file_shrinks_as_asked_and_in_int8_once_more(folder, tmp_path):
    sizes = {}
    for share in (0, 0.5):
        flags = ["--prune", share, "--data_dir", folder / "corpus"] if share else []
        run(folder, tmp_path / str(share), "--format", "safetensors", *flags)
        model = MMSERForAudioClassification.from_pretrained(tmp_path / str(share))
        sizes[share] = sum(
            matrix.weight.numel() for units in all_units(model) for matrix in (*units.before, units.after)
        )
        size = (tmp_path / str(share) / "model.safetensors").stat().st_size
        quantize_dynamic(model).save_pretrained(tmp_path / f"int8-{share}")
        assert (tmp_path / f"int8-{share}" / "model.safetensors").stat().st_size < size
    assert sizes[0.5] * 2 == sizes[0]
    files = [(tmp_path / str(share) / "model.safetensors").stat().st_size for share in sizes]
    assert files[1] < files[0] - 4 * (sizes[0] - sizes[0.5]) + 2000  # the header differs a little


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prune", "0.3"], "add --data_dir"),
        (["--prune", "1.5"], "--prune is a share"),
        (["--recovery_epochs", "2"], "add --prune or --prune_layers"),
        (["--data_dir", "data"], "Only pruning reads data"),
        (["--prune", "0.3", "--calibration_clips", "0"], "--calibration_clips must be at least 1"),
    ],
)
def test_flags_that_do_not_go_together(folder, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / "out", *flags)


def test_removing_layers_keeps_their_order():
    model = tiny_model("whisper", text={"num_hidden_layers": 5})
    layers = list(model.mmser.text_encoder.encoder.layer)
    remove_layers(model, "text", [3, 0])
    assert list(model.mmser.text_encoder.encoder.layer) == [layers[1], layers[2], layers[4]]
    assert model.config.text_config.num_hidden_layers == 3


def test_the_benchmark_compares_the_variants_on_the_same_clips(folder, tmp_path):
    flags = ["--checkpoint", folder / "checkpoint", "--data_dir", folder / "corpus", "--output", tmp_path / "r.json"]
    flags += ["--also", folder / "checkpoint"]
    report = smaller.main([str(flag) for flag in [*flags, "--shares", "0", "0.5", "--test_clips", "5"]])
    names = [(row["pruned"], row["weights"]) for row in report["rows"]]
    shown = ("0%", "50%", "checkpoint")
    assert names == [(share, weights) for share in shown for weights in (smaller.FLOAT32, smaller.INT8)]
    assert report["rows"][4] | {"times as fast": 1.0} == report["rows"][0] | {"pruned": "checkpoint"}
    assert report["settings"]["test_clips"] == 5 and report["rows"][0]["same answer"] == "100%"
    assert report["rows"][0]["times as fast"] == 1.0
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(report))
