# SPDX-License-Identifier: Apache-2.0
"""Tests of `mmser.numerics`: what is told of a NaN or an infinity in a clip, a weight or a gradient. Determinism."""

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny_corpus
import torch
from safetensors.torch import load_file, save_file
from test_trainer import flat_parameters, load_splits, make_trainer
from tiny_corpus import tiny_model, tiny_processor

import train_hf
from audio_mmser import MAX_SAMPLE
from mmser.console import mistake
from mmser.numerics import MOST_SKIPPED
from mmser.trainer import last_complete_checkpoint
from modeling_mmser import MMSERForAudioClassification
from processing_mmser import MMSERPipeline

NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return load_splits(tiny_corpus.write_corpus(tmp_path_factory.mktemp("numerics") / "corpus"))


def train_until_error(trainer):
    """The error, as a command tells it, and the weights before and after."""
    before = flat_parameters(trainer.model)
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()
    assert mistake(caught.value) == str(caught.value)  # one sentence or more, and no traceback
    return str(caught.value), before, flat_parameters(trainer.model)


def plant(trainer, step, what):
    """Do `what(model)` when a step begins, from 0."""
    original = trainer.training_step

    def training_step(model, *args, **kwargs):
        if trainer.state.global_step == step:
            what(trainer.accelerator.unwrap_model(model))
        return original(model, *args, **kwargs)

    trainer.training_step = training_step


def set_weight(name, value):
    def change(model):
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] = value

    return change


def set_gradient(name, value):
    return lambda model: model.get_parameter(name).register_hook(lambda gradient: torch.full_like(gradient, value))


# --- the clip --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_clip_with_one_bad_sample_is_named_with_its_file(tmp_path, value, tokenizer, quiet):
    corpus = tiny_corpus.write_corpus(tmp_path / "corpus")
    path = sorted((corpus / "train").glob("*.wav"))[3]
    samples, rate = soundfile.read(path, dtype="float32")
    samples[100] = value
    soundfile.write(path, samples, rate, subtype="FLOAT")
    with pytest.raises(ValueError, match=rf"train/metadata\.csv row \d+: .*{path.name}.* 1 of \d+ samples are NaN"):
        train_hf.main(tiny_corpus.tiny_flags(corpus, tmp_path / "run", tokenizer, max_steps=1, eval_strategy="no"))


@pytest.mark.parametrize("level", [1e-40, 1e-20, 1.0, 1e6, 9e11, 1e13, 1e30, 3e38])
def test_samples_of_any_finite_size_give_finite_input_or_are_refused(level):
    """Their squares overflow float32."""
    samples = (level * np.sin(np.arange(480_000, dtype=np.float64))).astype(np.float32)
    for processor in (tiny_processor(), tiny_processor(whisper=True)):
        if level > MAX_SAMPLE:
            with pytest.raises(ValueError, match="which is no sound"):
                processor(audio=[samples], sampling_rate=16_000, return_tensors="pt")
            continue
        batch = processor(audio=[samples], sampling_rate=16_000, return_tensors="pt")
        values = batch[processor.feature_extractor.model_input_names[0]]
        assert values.isfinite().all(), level


# --- the weight ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", ["classifier.output.bias", "mmser.audio_encoder.encoder.layers.1.layer_norm.weight"])
def test_a_weight_that_breaks_in_training_is_named_with_the_clips_and_the_last_checkpoint(
    splits, tmp_path, name, value
):
    trainer = make_trainer(tiny_model(), splits, tmp_path, save_strategy="steps", save_steps=1, max_steps=4)
    name = next(own for own, _ in trainer.model.named_parameters() if own.endswith(name.rpartition("layers")[2]))
    plant(trainer, 2, set_weight(name, value))
    said, _, _ = train_until_error(trainer)
    assert f"At step 3, weights of the model are not finite: {name}." in said
    assert len(re.findall(r"row \d+ \(.*?\.wav\)", said)) == 5 and "and 3 more" in said  # all 8 of the batch
    assert f"The last good checkpoint is {tmp_path / 'checkpoint-2'}." in said
    assert not (tmp_path / "checkpoint-3").exists()
    model = MMSERForAudioClassification.from_pretrained(last_complete_checkpoint(tmp_path))
    assert flat_parameters(model).isfinite().all()


def test_weights_that_a_step_breaks_are_not_saved(splits, tmp_path):
    """A checkpoint that is written right after the step would be the last one."""
    trainer = make_trainer(tiny_model(), splits, tmp_path, save_strategy="steps", save_steps=1, max_steps=4)
    optimizer = trainer.create_optimizer()
    original = optimizer.step

    def step(*args, **kwargs):
        original(*args, **kwargs)
        if trainer.state.global_step == 1:
            set_weight("classifier.output.weight", INF)(trainer.model)

    optimizer.step = step
    said, _, _ = train_until_error(trainer)
    assert "After step 2, weights of the model are not finite: classifier.output.weight. They are not saved." in said
    assert Path(last_complete_checkpoint(tmp_path)).name == "checkpoint-1" and not (tmp_path / "checkpoint-2").exists()


def test_a_checkpoint_with_a_broken_weight_does_not_load(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["classifier.output.bias"][1] = NAN
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"is damaged: 1 of its weights .* the first is classifier\.output\.bias"):
        MMSERForAudioClassification.from_pretrained(tmp_path)


def with_buffer(folder, name, value):
    """A checkpoint in which one number of a buffer is another one."""
    tiny_model().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", [name for name, buffer in tiny_model().named_buffers() if buffer.is_floating_point()])
def test_a_checkpoint_whose_fits_are_not_finite_does_not_load(tmp_path, name, value):
    """Else a NaN would be an uncertainty, or a probability of unknown."""
    folder = with_buffer(tmp_path, name, value)
    if name == "openmax.rejection_thresholds" and value == INF:  # as the bound of half precision has it
        assert not MMSERForAudioClassification.from_pretrained(folder).openmax.has_thresholds
        return
    with pytest.raises(ValueError, match=rf"is damaged: 1 of its weights .* the first is {re.escape(name)}\."):
        MMSERForAudioClassification.from_pretrained(folder)


@pytest.mark.parametrize("value", [0.0, -1.0])
@pytest.mark.parametrize("name", ["openmax.weibull_shape", "openmax.weibull_scale", "temperature"])
def test_a_checkpoint_whose_fits_are_impossible_does_not_load(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"is damaged: `{name}` must be greater than 0, got {value:g}\."):
        MMSERForAudioClassification.from_pretrained(with_buffer(tmp_path, name, value))


def test_a_finite_weight_that_overflows_gives_an_error_and_no_uncertainty(tmp_path):
    folder = with_buffer(tmp_path, "uncertainty.error_calibration", 0.0)
    weights = load_file(folder / "model.safetensors")
    weights["uncertainty.hidden.weight"].fill_(1e38)
    signs = torch.arange(weights["uncertainty.output.weight"].shape[1]) % 2 * 2 - 1
    weights["uncertainty.output.weight"].copy_(1e38 * signs)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    classify = MMSERPipeline(MMSERForAudioClassification.from_pretrained(folder), processor=tiny_processor())
    clip = {"raw": np.random.default_rng(0).normal(0, 0.1, 8000), "sampling_rate": 16_000, "text": "good"}
    assert len(classify(clip)) == 4
    with pytest.raises(ValueError, match=r"the uncertainty is not finite \(NaN\)"):
        classify(clip, return_uncertainty=True)


def test_a_score_is_never_a_nan():
    model = tiny_model()
    set_weight("classifier.output.bias", NAN)(model)
    pipe = MMSERPipeline(model, processor=tiny_processor(), device="cpu")
    with pytest.raises(ValueError, match="scores are not finite"):
        pipe({"raw": np.ones(4000, dtype=np.float32), "sampling_rate": 16_000})


# --- the gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("arguments", [{}, {"max_grad_norm": 0.0}, {"bf16": True}, {"gradient_accumulation_steps": 2}])
def test_a_gradient_that_is_not_finite_changes_no_weight(splits, tmp_path, value, arguments, monkeypatch):
    monkeypatch.setattr("mmser.training_arguments.processor_has_bf16", lambda: True)
    trainer = make_trainer(tiny_model(), splits, tmp_path, **arguments)
    plant(trainer, 0, set_gradient("classifier.output.weight", value))
    said, before, after = train_until_error(trainer)
    assert said.startswith("The gradient is not finite. At step 1, it is so of 1 weights: classifier.output.weight. ")
    assert f"and {8 * arguments.get('gradient_accumulation_steps', 1) - 5} more" in said
    assert "There is no checkpoint of this run yet." in said
    assert torch.equal(before, after)


@pytest.mark.parametrize("max_grad_norm", [0.05, 0.0])
def test_clipping_is_that_of_torch(splits, tmp_path, max_grad_norm):
    trainer = make_trainer(tiny_model(), splits, tmp_path, max_grad_norm=max_grad_norm, max_steps=1)
    seen = []

    def look(*args, **kwargs):
        seen.append([p.grad.clone() for p in trainer.model.parameters() if p.grad is not None])

    trainer.create_optimizer().register_step_pre_hook(look)
    trainer.train()
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in seen[0]]))
    told = next(line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line)
    assert norm.item() == pytest.approx(max_grad_norm or told, rel=1e-3) and told > 0.05


# --- fp16 ------------------------------------------------------------------------------------------------------------


def in_fp16(trainer, scale=2.0**16):
    """Let a trainer on the processor scale its loss and compute in fp16, as it does on a GPU without bf16."""
    accelerator = trainer.accelerator
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator.autocast = lambda *_, **__: torch.autocast("cpu", dtype=torch.float16)
    trainer.compute_loss_context_manager = accelerator.autocast
    return trainer


def test_fp16_skips_steps_that_overflow_until_the_scale_fits(splits, tmp_path):
    trainer = in_fp16(make_trainer(tiny_model(), splits, tmp_path, max_steps=16), scale=2.0**20)
    before = flat_parameters(trainer.model)
    trainer.train()
    after = flat_parameters(trainer.model)
    assert after.isfinite().all() and not torch.equal(before, after)
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    finite = [math.isfinite(norm) for norm in norms]
    assert not finite[0] and any(finite)
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (20 - finite.count(False))


def test_fp16_ends_where_no_scale_helps(splits, tmp_path):
    trainer = in_fp16(make_trainer(tiny_model(), splits, tmp_path, max_steps=100))
    plant(trainer, 0, set_gradient("classifier.output.weight", NAN))
    said, before, after = train_until_error(trainer)
    assert f"not finite for {MOST_SKIPPED + 1} steps in a row, however the loss was scaled." in said
    assert "classifier.output.weight" in said and torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_overflow_names_the_part_and_the_clips(splits, tmp_path, dtype, monkeypatch):
    """70,000 is too large for fp16, and not for bf16."""
    monkeypatch.setattr("mmser.training_arguments.processor_has_bf16", lambda: True)
    model = tiny_model()
    with torch.no_grad():
        model.classifier.output.bias.fill_(70_000.0)
    if dtype == torch.bfloat16:
        make_trainer(model, splits, tmp_path, max_steps=1, bf16=True).train()
        return
    trainer = in_fp16(make_trainer(model, splits, tmp_path, max_steps=1))
    said, before, after = train_until_error(trainer)
    assert "At step 1, the first part of the model whose output is not finite is classifier.output." in said
    assert "Clips: train/metadata.csv row" in said and torch.equal(before, after)


# --- determinism -----------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_files_on_the_same_machine(corpus, tokenizer, tmp_path, quiet):
    """With augmentation, dropout, workers and an evaluation."""

    def run(name):
        flags = {"max_steps": 3, "dataloader_num_workers": 1, "eval_strategy": "steps", "eval_steps": 3}
        train_hf.main(tiny_corpus.tiny_flags(corpus, tmp_path / name, tokenizer, **flags))
        results = json.loads((tmp_path / name / "eval_results.json").read_text())
        digest = hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest()
        return digest, {split: results[split] for split in ("validation", "test")}

    assert run("first") == run("second")
