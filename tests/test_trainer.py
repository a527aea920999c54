# SPDX-License-Identifier: Apache-2.0
"""Tests of `trainer`, `optimizer` and `averaging`: groups, losses in the log, resuming, two processes, calibration.

References are independent: module membership, closed formulas, plain PyTorch, an uninterrupted run.
"""

import copy
import errno
import json
import logging as python_logging
import math
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import transformers
from datasets import concatenate_datasets
from safetensors.torch import load_file
from scipy.stats import beta
from sklearn.metrics import roc_auc_score
from tiny import fit_openmax_by_chance, slow_openmax, tiny_batch
from tiny_corpus import NAMES, RATE, tiny_model, tiny_processor, tiny_tokenizer, write_corpus
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler as StockSampler

from conformal_mmser import PredictionSets
from mmser import training_arguments
from mmser.augmentation import Augmenter
from mmser.averaging import WeightAverage
from mmser.batches import LengthGroupedSampler, MMSERDataCollator
from mmser.calibration import fit_temperature
from mmser.examples import EmotionDataset, drop_unreadable
from mmser.groups import speakers_of
from mmser.loading import load_emotion_dataset
from mmser.metrics import build_compute_metrics, softmax
from mmser.model_loading import check_teacher
from mmser.optimizer import PARAMETER_GROUPS, parameter_groups, parameter_table
from mmser.scores import audio_alone
from mmser.trainer import MMSERTrainer, last_complete_checkpoint
from mmser.training_arguments import MMSERTrainingArguments
from mmser.training_flags import MIN_STEPS
from modeling_mmser import MMSERForAudioClassification
from openmax_mmser import OpenMax
from processing_mmser import MMSERProcessor

# As published: learning rate multiplier and weight decay of each group.
PUBLISHED = {
    "audio_encoder": (0.1, 0.025),
    "text_encoder": (0.1, 0.025),
    "cross_modal_attention": (1.0, 0.05),
    "pooling": (1.0, 0.05),
    "layer_weights": (20.0, 0.0),  # not published
    "fusion": (1.0, 0.05),
    "classifier": (1.5, 0.06),
    "anchors": (2.0, 0.04),
    "uncertainty": (1.0, 0.05),
    "prototypes": (1.0, 0.05),
}
LOSSES = {"cross_entropy", "focal", "anchor", "uncertainty", "prototype"}
CLEAN = {"text_dropout": 0.0, "audio_dropout": 0.0}
NOISY = {"text_dropout": 0.2, "audio_dropout": 0.2, "augmenter": Augmenter()}


def load_splits(corpus):
    return load_emotion_dataset(corpus)[0]


def make_trainer(model, splits, output_dir, reader_options=CLEAN, **arguments):
    defaults = {
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "max_steps": 2,
    }
    teacher = arguments.pop("teacher", None)
    processor = tiny_processor(whisper=model.config.uses_log_mel)
    return MMSERTrainer(
        model=model,
        args=MMSERTrainingArguments(output_dir=str(output_dir), **{**defaults, **arguments}),
        train_dataset=EmotionDataset(splits["train"], training=True, **reader_options),
        eval_dataset=EmotionDataset(splits["validation"]),
        data_collator=MMSERDataCollator(processor),
        processing_class=processor,
        compute_metrics=build_compute_metrics(NAMES),
        teacher=teacher,
    )


def training_lines(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def training_losses(trainer):
    return [line["loss"] for line in training_lines(trainer)]


def training_parts(trainer):
    """The parts of the loss, line by line, in the order of their names."""
    return [[line[name] for name in sorted(line) if name.startswith("loss_")] for line in training_lines(trainer)]


def flat_parameters(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return load_splits(write_corpus(tmp_path_factory.mktemp("corpus")))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def log(caplog):
    with caplog.at_level(python_logging.INFO):
        yield caplog


# --- parameter groups ------------------------------------------------------------------------------------------------


def modules_of_groups(model):
    base = model.mmser
    return {
        "audio_encoder": [base.audio_encoder],
        "text_encoder": [base.text_encoder],
        "cross_modal_attention": [base.audio_attention, base.text_attention],
        "pooling": [base.audio_pooling, base.text_pooling],
        "layer_weights": [],
        "fusion": [base.fusion, base.missing_audio, base.missing_text],
        "classifier": [model.classifier],
        "anchors": [model.anchors],
        "uncertainty": [model.uncertainty],
        "prototypes": [model.prototypes],
    }


def members(groups, name):
    return {id(parameter) for group in groups if group["name"] == name for parameter in group["params"]}


@pytest.mark.parametrize("whisper", [False, True], ids=["wav2vec2", "whisper"])
def test_every_parameter_is_in_exactly_one_published_group(whisper):
    model = tiny_model(whisper=whisper)
    groups = parameter_groups(model, learning_rate=1e-3)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert list(dict.fromkeys(group["name"] for group in groups)) == list(PUBLISHED)
    assert [*PUBLISHED, "auxiliary"] == list(PARAMETER_GROUPS)  # its own tests are in test_auxiliary.py
    for name, modules in modules_of_groups(model).items():
        expected = {
            id(parameter) for module in modules for parameter in module.parameters() if parameter.requires_grad
        }
        expected |= {id(model.mmser.layer_weights)} if name == "layer_weights" else set()
        assert members(groups, name) == expected, name


@pytest.mark.parametrize("whisper", [False, True], ids=["wav2vec2", "whisper"])
def test_multipliers_and_decays_are_the_published_ones_and_vectors_are_not_decayed(whisper):
    model = tiny_model(whisper=whisper)
    groups = parameter_groups(model, learning_rate=0.01)
    decay_of = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for group in groups:
        multiplier, decay = PUBLISHED[group["name"]]
        assert group["lr"] == pytest.approx(0.01 * multiplier)
        assert group["weight_decay"] in (0.0, decay)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (name.endswith("bias") or parameter.ndim < 2):
            assert decay_of[id(parameter)] == 0, name
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            assert all(decay_of[id(parameter)] == 0 for parameter in module.parameters())
        elif isinstance(module, (nn.Linear, nn.Embedding)) and module.weight.requires_grad:
            assert decay_of[id(module.weight)] > 0


def test_multipliers_and_decay_can_be_overridden():
    model = tiny_model()
    multipliers = {"audio_encoder": 1.0, "anchors": 0.5}
    groups = parameter_groups(model, learning_rate=0.01, lr_multipliers=multipliers, weight_decay=0.3)
    for group in groups:
        multiplier = multipliers.get(group["name"], PUBLISHED[group["name"]][0])
        assert group["lr"] == pytest.approx(0.01 * multiplier)
        assert group["weight_decay"] in (0.0, 0.3)
    assert {group["weight_decay"] for group in parameter_groups(model, 0.01, weight_decay=0.0)} == {0.0}


def test_frozen_parameters_are_in_no_group():
    model = tiny_model()
    model.freeze_audio_encoder()
    groups = parameter_groups(model, learning_rate=1e-3)
    assert not members(groups, "audio_encoder")
    listed = {id(parameter) for group in groups for parameter in group["params"]}
    assert listed == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    table = {row["part"]: row for row in parameter_table(model)}
    assert table["audio_encoder"]["trainable"] == 0
    assert table["audio_encoder"]["parameters"] == model.mmser.audio_encoder.num_parameters()
    assert table["all"]["parameters"] == model.num_parameters()
    assert table["all"]["trainable"] == model.num_parameters(only_trainable=True)


def test_a_parameter_outside_the_groups_is_an_error():
    model = tiny_model()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'extra.weight' belongs to 0 groups"):
        parameter_groups(model, learning_rate=1e-3)


def test_an_unknown_group_name_is_an_error():
    with pytest.raises(ValueError, match=r"names \['encoder'\]; the groups are audio_encoder, text_encoder"):
        MMSERTrainingArguments(lr_multipliers='{"encoder": 1}', use_cpu=True)
    assert MMSERTrainingArguments(lr_multipliers='{"anchors": 3}', use_cpu=True).lr_multipliers == {"anchors": 3}


def test_the_optimiser_has_the_groups_and_the_log_their_names_and_sizes(splits, tmp_path, log):
    trainer = make_trainer(tiny_model(), splits, tmp_path, learning_rate=1e-3, lr_multipliers={"pooling": 7.0})
    log.set_level(python_logging.DEBUG, "mmser.trainer")
    optimizer = trainer.create_optimizer()
    assert {group["name"]: group["lr"] for group in optimizer.param_groups}["pooling"] == pytest.approx(7e-3)
    assert isinstance(optimizer, torch.optim.AdamW)
    lines = [record.message for record in log.records if record.name == "mmser.trainer"]
    for name, modules in modules_of_groups(trainer.model).items():
        size = sum(parameter.numel() for module in modules for parameter in module.parameters())
        size += trainer.model.mmser.layer_weights.numel() if name == "layer_weights" else 0
        line = next(line for line in lines if f"group {name}:" in line)
        assert f"{size:,} parameters" in line and f"weight decay {PUBLISHED[name][1]}" in line


# --- schedule, log, errors -------------------------------------------------------------------------------------------


def test_schedule_is_linear_warm_up_then_cosine_to_zero(splits, tmp_path):
    trainer = make_trainer(tiny_model(), splits, tmp_path, learning_rate=1e-3)
    steps, warm_up = 30, 3  # a tenth
    trainer.create_optimizer_and_scheduler(num_training_steps=steps)
    for step in range(steps + 1):
        cosine = (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2
        share = step / warm_up if step < warm_up else cosine
        for group in trainer.optimizer.param_groups:
            assert group["lr"] == pytest.approx(1e-3 * PUBLISHED[group["name"]][0] * share, abs=1e-12)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()


def test_every_part_of_the_loss_is_logged_and_the_parts_sum_to_the_loss(splits, tmp_path):
    model = tiny_model(supervised_contrastive_loss_weight=0.5, prototype_loss_weight=0.0)
    trainer = make_trainer(model, splits, tmp_path, max_steps=3, gradient_accumulation_steps=2)
    trainer.train()
    lines = training_lines(trainer)
    assert len(lines) == 3
    for line in lines:
        parts = {name.removeprefix("loss_"): value for name, value in line.items() if name.startswith("loss_")}
        assert set(parts) == (LOSSES - {"prototype"}) | {"supervised_contrastive"}
        assert all(value > 0 for value in parts.values())
        assert sum(parts.values()) == pytest.approx(line["loss"], abs=5e-4)


def test_a_line_of_the_log_holds_the_mean_of_the_parts_since_the_last_one(splits, tmp_path):
    rare = make_trainer(tiny_model(dropout=False), splits, tmp_path, max_steps=4, logging_steps=2, learning_rate=0.0)
    torch.manual_seed(0)
    every = make_trainer(tiny_model(dropout=False), splits, tmp_path, max_steps=4, learning_rate=0.0)
    every.model.load_state_dict(rare.model.state_dict())
    rare.train()
    every.train()
    for index, line in enumerate(training_lines(rare)):
        for name in LOSSES:
            pair = [single[f"loss_{name}"] for single in training_lines(every)[2 * index : 2 * index + 2]]
            assert line[f"loss_{name}"] == pytest.approx(sum(pair) / 2, abs=2e-4)


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_part(splits, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.prototypes.prototypes.fill_(float("nan"))
    trainer = make_trainer(model, splits, tmp_path)
    with pytest.raises(FloatingPointError, match="not finite: prototype=nan") as error:
        trainer.train()
    assert "cross_entropy" not in str(error.value)
    with torch.no_grad():
        model.classifier.output.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"cross_entropy=nan, focal=nan.* prototype=nan"):
        trainer.train()


# --- precision, freezing, distillation -------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["bf16", "use_amp"])
def test_mixed_precision_trains_on_the_processor(flag, splits, monkeypatch, tmp_path):
    monkeypatch.setattr(training_arguments, "processor_has_bf16", lambda: True)
    trainer = make_trainer(tiny_model(), splits, tmp_path, learning_rate=1e-2, max_steps=3, **{flag: True})
    assert trainer.accelerator.mixed_precision == "bf16"
    seen = []
    trainer.model.classifier.output.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    before = flat_parameters(trainer.model)
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert all(math.isfinite(loss) for loss in training_losses(trainer))
    assert (flat_parameters(trainer.model) - before).abs().max() > 1e-4
    assert trainer.predict_outputs(trainer.eval_dataset)["logits"].dtype == np.float32


def test_torchrun_on_a_processor_takes_gloo(monkeypatch, tmp_path):
    """With an MPI in torch, as in Debian's, Accelerate took that, and each process trained alone, into one folder."""
    options = {"output_dir": str(tmp_path), "use_cpu": True}
    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", lambda self: None)  # it waits for the others
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert MMSERTrainingArguments(**options).ddp_backend is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert MMSERTrainingArguments(**options).ddp_backend == "gloo"
    assert MMSERTrainingArguments(**options, ddp_backend="mpi").ddp_backend == "mpi"


@pytest.mark.parametrize("use_cpu", [False, True])
@pytest.mark.parametrize("has_bf16", [False, True])
@pytest.mark.parametrize("accelerator", [False, True])
def test_mixed_precision_is_that_of_the_device_which_stays(accelerator, has_bf16, use_cpu, monkeypatch, tmp_path):
    """Any kind of accelerator: MPS and XPU are no CUDA, and are not left for the processor."""
    assert not torch.cuda.is_available()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    monkeypatch.setattr(training_arguments, "processor_has_bf16", lambda: True)
    for module in (training_arguments, transformers.training_args):
        monkeypatch.setattr(module, "is_torch_bf16_gpu_available", lambda: accelerator and has_bf16)
    options = {"output_dir": str(tmp_path), "use_cpu": use_cpu}
    found = MMSERTrainingArguments(use_amp=True, **options)
    on_cpu = use_cpu or not accelerator
    assert found.use_cpu is on_cpu
    assert (found.bf16, found.fp16) == (on_cpu or has_bf16, not (on_cpu or has_bf16))
    if on_cpu:
        with pytest.raises(ValueError, match="--fp16 has no effect on a processor"):
            MMSERTrainingArguments(fp16=True, **options)
    else:
        assert MMSERTrainingArguments(fp16=True, **options).fp16
    if not on_cpu and not has_bf16:
        with pytest.raises(ValueError, match="doesn't support bf16"):
            MMSERTrainingArguments(bf16=True, **options)
    else:
        assert MMSERTrainingArguments(bf16=True, **options).use_cpu is on_cpu


def test_a_processor_without_bf16_trains_in_float32(monkeypatch, tmp_path, log):
    """Emulated bf16 takes tens of times as long: `--use_amp` leaves it, and `--bf16`, which asks for it, is told."""
    monkeypatch.setattr(training_arguments, "processor_has_bf16", lambda: False)
    found = MMSERTrainingArguments(use_amp=True, output_dir=str(tmp_path), use_cpu=True)
    assert not found.bf16 and not found.fp16 and "--use_amp: this processor has no bf16" in log.text
    log.clear()
    assert MMSERTrainingArguments(bf16=True, output_dir=str(tmp_path), use_cpu=True).bf16
    assert "--bf16: this processor has no bf16" in log.text
    monkeypatch.setattr(training_arguments, "processor_has_bf16", lambda: True)
    log.clear()
    assert MMSERTrainingArguments(use_amp=True, output_dir=str(tmp_path), use_cpu=True).bf16 and not log.text


def test_frozen_encoders_do_not_move(splits, tmp_path):
    model = tiny_model()
    model.freeze_audio_encoder()
    model.mmser.text_encoder.embeddings.requires_grad_(False)
    trainer = make_trainer(model, splits, tmp_path, learning_rate=0.1, max_steps=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith(("mmser.audio_encoder.", "mmser.text_encoder.embeddings.")) for name in moved)
    assert any(name.startswith("mmser.text_encoder.encoder.") for name in moved)
    assert any(name.startswith("classifier.") for name in moved)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"id2label": dict(enumerate(reversed(NAMES)))}, r"labels: \['angry', .*\] \(teacher\), \['neutral'"),
        ({"whisper": True}, r"audio input: 16 log-mel bands \(teacher\), waveform \(model\)"),
    ],
)
def test_a_teacher_that_means_something_else_is_refused(splits, tmp_path, changed, said):
    with pytest.raises(ValueError, match=said):
        make_trainer(tiny_model(distillation_loss_weight=0.5), splits, tmp_path, teacher=tiny_model(**changed))


def test_a_teacher_with_another_tokenizer_or_feature_extractor_is_refused():
    config, processor, other = tiny_model().config, tiny_processor(), tiny_processor()
    check_teacher(config, config, processor, other)
    other.feature_extractor.sampling_rate = 8000
    with pytest.raises(ValueError, match=r"feature extraction: .*8000.* \(teacher\), .*16000.* \(model\)"):
        check_teacher(config, config, processor, other)
    other = tiny_processor()
    other.tokenizer.add_tokens(["more"])
    with pytest.raises(ValueError, match=r"tokenizer: 18 tokens .* \(teacher\), 17 tokens .* \(model\)"):
        check_teacher(config, config, processor, other)


def test_distillation_from_an_equal_teacher_is_zero_and_from_another_is_the_divergence(splits, tmp_path):
    teacher = tiny_model(dropout=False)
    student = tiny_model(dropout=False, distillation_loss_weight=0.5)
    arguments = {"train_sampling_strategy": "sequential", "max_steps": 1, "teacher": teacher}
    equal = tiny_model(dropout=False, distillation_loss_weight=0.5)
    equal.load_state_dict(teacher.state_dict())
    trainer = make_trainer(equal, splits, tmp_path, **arguments)
    trainer.train()
    assert training_lines(trainer)[0]["loss_distillation"] == pytest.approx(0, abs=1e-4)

    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    with torch.no_grad():
        logits = [model.eval()(**batch, teacher_logits=torch.zeros(8, 4)).logits for model in (teacher, student)]
    probability, log_student = (logits[0] / 2).softmax(-1), (logits[1] / 2).log_softmax(-1)
    expected = 0.5 * 4 * (probability * (probability.log() - log_student)).sum(-1).mean()
    before = flat_parameters(teacher)
    trainer = make_trainer(student, splits, tmp_path, **arguments)
    trainer.train()
    assert training_lines(trainer)[0]["loss_distillation"] == pytest.approx(expected.item(), abs=1e-4)
    assert torch.equal(flat_parameters(teacher), before)
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    assert math.isfinite(trainer.evaluate()["eval_loss"])


# --- accumulation and processes --------------------------------------------------------------------------------------

DETERMINISTIC = {
    "train_sampling_strategy": "sequential",
    "optim": "sgd",  # linear in the gradient; and no clipping, which would hide a gradient that is twice too large
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 0.0,
}


def with_training_clips(splits, number):
    return {**splits, "train": splits["train"].select(range(number))}


def test_two_accumulated_batches_of_four_are_one_batch_of_eight(splits, tmp_path):
    start = tiny_model(dropout=False, class_counts=[10, 5, 5, 1])
    splits = with_training_clips(splits, 14)  # the second step has a batch of four and one of two
    results = []
    for batch_size, accumulated in ((8, 1), (4, 2)):
        model = MMSERForAudioClassification(start.config)
        model.load_state_dict(start.state_dict())
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulated}
        trainer = make_trainer(model, splits, tmp_path, **DETERMINISTIC, **sizes, max_steps=2)
        trainer.train()
        results.append((flat_parameters(model), training_losses(trainer)))
    (once, losses), (accumulated, accumulated_losses) = results
    assert (once - flat_parameters(start)).abs().max() > 1e-2
    torch.testing.assert_close(accumulated, once, atol=1e-5, rtol=0)
    assert accumulated_losses == pytest.approx(losses, abs=1e-5)


def prepare_processes(corpus, folder):
    tiny_model(dropout=False).save_pretrained(folder / "start")


def run_process(corpus, folder):
    splits = with_training_clips(load_splits(corpus), 26)  # of the last two of an epoch, one process has none
    model = MMSERForAudioClassification.from_pretrained(folder / "start")
    trainer = make_trainer(model, splits, folder, **DETERMINISTIC, per_device_train_batch_size=4, max_steps=5)
    assert trainer.args.world_size == 2
    trainer.train()
    outputs = trainer.predict_outputs(EmotionDataset(splits["test"].select(range(13))))
    log = {"losses": training_losses(trainer), "parts": training_parts(trainer)}
    weights = flat_parameters(trainer.model).numpy()
    np.savez(folder / f"rank{trainer.args.process_index}.npz", weights=weights, **log, **outputs)

    for strategy in ("random", "group_by_length"):
        arguments = {"per_device_train_batch_size": 4, "max_steps": 7, "train_sampling_strategy": strategy}
        arguments["eval_strategy"] = "no"
        whole = resumable(splits, folder / strategy, model, **arguments, save_steps=6)
        whole.train()
        resumed = resumable(splits, folder / "resumed", model, **arguments, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(folder / strategy / "checkpoint-6"))
        assert len(set(training_losses(whole))) == 7
        assert training_losses(resumed) == pytest.approx(training_losses(whole), abs=1e-5), strategy


def test_two_processes_train_as_one_with_two_fold_accumulation_and_resume(two_processes, splits, tmp_path):
    start = MMSERForAudioClassification.from_pretrained(two_processes / "start")
    splits = with_training_clips(splits, 26)
    ranks = [np.load(two_processes / f"rank{rank}.npz") for rank in (0, 1)]
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = make_trainer(start, splits, tmp_path, **DETERMINISTIC, **sizes, max_steps=5)
    trainer.train()
    outputs = trainer.predict_outputs(EmotionDataset(splits["test"].select(range(13))))
    for rank in ranks:
        np.testing.assert_allclose(rank["losses"], training_losses(trainer), atol=1e-4)
        np.testing.assert_allclose(rank["parts"], training_parts(trainer), atol=2e-4)
        np.testing.assert_allclose(rank["weights"], flat_parameters(start).numpy(), atol=1e-4)
        np.testing.assert_array_equal(rank["labels"], outputs["labels"])
        np.testing.assert_allclose(rank["logits"], outputs["logits"], atol=1e-3)


# --- resuming --------------------------------------------------------------------------------------------------------


def resumable(splits, folder, start, **arguments):
    torch.manual_seed(99)  # whatever ran before in the process must not matter
    model = MMSERForAudioClassification(start.config)
    model.load_state_dict(start.state_dict())
    defaults = {
        "learning_rate": 1e-3,
        "max_steps": 9,  # epochs of 4 steps
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": None,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "load_best_model_at_end": False,
    }
    return make_trainer(model, splits, folder, NOISY, **{**defaults, **arguments})


@pytest.fixture(scope="module")
def whole(splits, tmp_path_factory):
    """A run without a stop, whose checkpoints are read only: its start, trainer, folder, seconds by another clock."""
    torch.manual_seed(0)
    start, folder = tiny_model(), tmp_path_factory.mktemp("whole")
    trainer = resumable(splits, folder, start)
    began = time.monotonic()
    trainer.train()
    return SimpleNamespace(start=start, trainer=trainer, folder=folder, seconds=time.monotonic() - began)


def checkpoint_with(whole, folder, change):
    """A copy of its checkpoint of step 4, after `change(what its state says of the callbacks)`; returns the folder."""
    copied = Path(shutil.copytree(whole.folder / "checkpoint-4", folder / "checkpoint-4"))
    state = json.loads((copied / "trainer_state.json").read_text())
    change(state["stateful_callbacks"])
    (copied / "trainer_state.json").write_text(json.dumps(state))
    return copied


@pytest.mark.parametrize(
    ("strategy", "workers", "checkpoints"),
    [
        ("group_by_length", 0, (2, 4)),  # in the middle and at the end of an epoch
        ("group_by_length", 2, (6,)),
        ("random", 0, (6,)),
        ("sequential", 0, (6,)),
    ],
)
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(strategy, workers, checkpoints, splits, whole, tmp_path):
    """Also if the first one had no workers."""
    arguments = {"train_sampling_strategy": strategy, "dataloader_num_workers": workers}
    uninterrupted, folder = whole.trainer, whole.folder
    if strategy != "group_by_length":
        folder = tmp_path / "whole"
        uninterrupted = resumable(splits, folder, whole.start, **arguments)
        uninterrupted.train()
    losses = training_losses(uninterrupted)
    assert len(set(losses)) == len(losses) == 9
    for step in checkpoints:
        resumed = resumable(splits, tmp_path / "resumed", whole.start, **arguments, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert resumed.state.global_step == 9
        assert training_losses(resumed) == pytest.approx(losses, abs=1e-5), f"from step {step}"
        ends = flat_parameters(resumed.model), flat_parameters(uninterrupted.model)
        torch.testing.assert_close(*ends, atol=1e-5, rtol=0)


def test_resuming_in_the_middle_of_an_accumulated_epoch(splits, tmp_path):
    start = tiny_model()
    arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "max_steps": 6}
    whole = resumable(splits, tmp_path / "whole", start, **arguments)
    whole.train()
    resumed = resumable(splits, tmp_path / "resumed", start, **arguments, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert training_losses(resumed) == pytest.approx(training_losses(whole), abs=1e-5)


def test_a_resumed_run_counts_the_seconds_before_its_checkpoint(splits, whole, tmp_path):
    assert 0 < whole.trainer.training_time.seconds <= whole.seconds

    def took_long(callbacks):
        saved = callbacks["TrainingTime"]["attributes"]
        assert 0 < saved["seconds_before"] < whole.trainer.training_time.seconds
        saved["seconds_before"] = 1000.0

    checkpoint = checkpoint_with(whole, tmp_path, took_long)
    resumed = resumable(splits, tmp_path / "resumed", whole.start, save_strategy="no")
    began = time.monotonic()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert 1000 < resumed.training_time.seconds <= 1000 + time.monotonic() - began
    began = time.monotonic()
    resumed.train()  # anew
    assert 0 < resumed.training_time.seconds <= time.monotonic() - began


def test_a_checkpoint_of_an_earlier_version_has_no_seconds(splits, whole, tmp_path):
    checkpoint = checkpoint_with(whole, tmp_path, lambda callbacks: callbacks.pop("TrainingTime"))
    resumed = resumable(splits, tmp_path / "resumed", whole.start, max_steps=6)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    later = json.loads((tmp_path / "resumed" / "checkpoint-6" / "trainer_state.json").read_text())
    assert later["stateful_callbacks"]["TrainingTime"]["attributes"]["seconds_before"] > 0


# --- the average of the weights --------------------------------------------------------------------------------------


class RememberWeights(TrainerCallback):
    """The weights after each step, in float64."""

    def __init__(self, model):
        self.model = model
        self.weights = [flat_parameters(model).double()]

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.append(flat_parameters(self.model).double())


def averages_of(weights, decay):
    """What the average must be after each step, by its definition."""
    averages = [weights[0]]
    for step, last in enumerate(weights[1:], start=1):
        keep = min(decay, (1 + step) / (10 + step))
        averages.append(keep * averages[-1] + (1 - keep) * last)
    return averages


def test_the_average_of_the_weights_is_what_is_evaluated_saved_and_kept(splits, tmp_path):
    average = {"weight_averaging": 0.4}
    trainer = resumable(splits, tmp_path, tiny_model(), **average, eval_steps=3, save_steps=3, max_steps=7)
    remember = RememberWeights(trainer.model)
    trainer.add_callback(remember)
    trainer.train()
    expected = averages_of(remember.weights, 0.4)
    torch.testing.assert_close(flat_parameters(trainer.model).double(), expected[-1], atol=1e-6, rtol=0)
    assert not torch.allclose(expected[-1], remember.weights[-1], atol=1e-4)
    for line in trainer.state.log_history:
        if "eval_loss" in line:
            saved = MMSERForAudioClassification.from_pretrained(tmp_path / f"checkpoint-{line['step']}")
            torch.testing.assert_close(flat_parameters(saved).double(), expected[line["step"]], atol=1e-6, rtol=0)
            evaluated = make_trainer(saved, splits, tmp_path / "again").evaluate()
            assert evaluated["eval_loss"] == pytest.approx(line["eval_loss"], abs=1e-5)


def test_training_goes_its_way_whether_its_weights_are_averaged_or_not(splits, tmp_path):
    start = tiny_model()
    losses = []
    for decay in (0.0, 0.9):
        arguments = {"weight_averaging": decay, "eval_steps": 2, "max_steps": 5}
        trainer = resumable(splits, tmp_path / str(decay), start, **arguments)
        trainer.train()
        losses.append(training_losses(trainer))
    assert losses[0] == losses[1]


def test_a_resumed_run_goes_on_with_its_average(splits, tmp_path):
    start = tiny_model()
    average = {"weight_averaging": 0.9}
    whole = resumable(splits, tmp_path / "whole", start, **average)
    whole.train()
    resumed = resumable(splits, tmp_path / "resumed", start, **average, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert training_losses(resumed) == pytest.approx(training_losses(whole), abs=1e-5)
    torch.testing.assert_close(flat_parameters(resumed.model), flat_parameters(whole.model), atol=1e-5, rtol=0)


def test_a_checkpoint_without_an_average_begins_one(splits, whole, tmp_path):
    """Resumed with `weight_averaging` that the run did not have before."""
    checkpoint = whole.folder / "checkpoint-6"
    resumed = resumable(splits, tmp_path / "resumed", whole.start, weight_averaging=0.9, save_strategy="no")
    remember = RememberWeights(resumed.model)
    resumed.add_callback(remember)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert training_losses(resumed) == pytest.approx(training_losses(whole.trainer), abs=1e-5)
    average = flat_parameters(MMSERForAudioClassification.from_pretrained(checkpoint)).double()
    for step, last in enumerate(remember.weights[1:], start=7):
        keep = min(0.9, (1 + step) / (10 + step))
        average = keep * average + (1 - keep) * last
    torch.testing.assert_close(flat_parameters(resumed.model).double(), average, atol=1e-6, rtol=0)


def test_accumulated_steps_are_averaged_once(splits, tmp_path):
    arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "max_steps": 5}
    trainer = resumable(splits, tmp_path, tiny_model(), **arguments, weight_averaging=0.9, save_strategy="no")
    remember = RememberWeights(trainer.model)
    trainer.add_callback(remember)
    trainer.train()
    assert len(remember.weights) == 6
    expected = averages_of(remember.weights, 0.9)[-1]
    torch.testing.assert_close(flat_parameters(trainer.model).double(), expected, atol=1e-6, rtol=0)


def test_the_best_checkpoint_is_an_average_and_what_it_is_resumed_from_stays_beside_it(splits, tmp_path):
    arguments = {"save_steps": 2, "eval_steps": 2, "max_steps": 6, "load_best_model_at_end": True}
    trainer = resumable(splits, tmp_path, tiny_model(), **arguments, weight_averaging=0.9)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    saved = MMSERForAudioClassification.from_pretrained(best)
    assert torch.equal(flat_parameters(trainer.model), flat_parameters(saved))
    last = load_file(best / WeightAverage.file_name)
    trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert [last[str(index)].shape for index in range(len(last))] == [parameter.shape for parameter in trainable]
    trainer.save_model(tmp_path / "final")
    assert not (tmp_path / "final" / WeightAverage.file_name).exists()


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_that_averages_nothing_is_an_error(decay):
    with pytest.raises(ValueError, match=r"`weight_averaging` must be in \[0, 1\)"):
        MMSERTrainingArguments(weight_averaging=decay)


def test_the_weights_of_a_model_that_is_made_anew_cannot_be_averaged(tmp_path):
    arguments = MMSERTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, eval_strategy="no", weight_averaging=0.9
    )
    with pytest.raises(ValueError, match="does not go with DeepSpeed, FSDP or `model_init`"):
        MMSERTrainer(args=arguments, model_init=lambda: tiny_model())


def test_epochs_differ_in_order_and_seeds_differ(splits, tmp_path):
    grouped = {"train_sampling_strategy": "group_by_length"}
    trainer = make_trainer(tiny_model(), splits, tmp_path, data_seed=0, **grouped)
    sampler = trainer._get_train_sampler()
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == list(range(len(splits["train"])))
    other = make_trainer(tiny_model(), splits, tmp_path, data_seed=7, **grouped)._get_train_sampler()
    assert list(other) != orders[0]


def test_clips_are_grouped_by_length_unless_told_otherwise(splits, tmp_path):
    trainer = make_trainer(tiny_model(), splits, tmp_path)
    lengths = np.array(trainer.train_dataset.lengths)
    whole = len(lengths) // trainer.args.train_batch_size * trainer.args.train_batch_size

    def padding(order):
        batches = lengths[np.array(list(order))[:whole]].reshape(-1, trainer.args.train_batch_size)
        return 1 - (batches / batches.max(axis=1, keepdims=True)).mean()

    assert padding(trainer._get_train_sampler()) < 0.7 * padding(range(len(lengths)))
    plain = [trainer.train_dataset[index] for index in range(6)]  # a data set whose lengths are not known is shuffled
    assert isinstance(trainer._get_train_sampler(plain), torch.utils.data.RandomSampler)
    assert trainer._get_eval_sampler(plain) is None


def test_evaluation_goes_from_long_to_short_and_answers_in_order(splits, tmp_path):
    trainer = make_trainer(tiny_model(), splits, tmp_path, per_device_eval_batch_size=3)
    dataset = EmotionDataset(splits["train"])
    seen, collate = [], trainer.data_collator

    def spy(examples):
        seen.extend(example["length"] for example in examples)
        return collate(examples)

    trainer.data_collator = spy
    outputs = trainer.predict_outputs(dataset)
    assert seen == sorted(dataset.lengths, reverse=True) != dataset.lengths
    trainer.data_collator = collate
    plain = trainer.predict_outputs([dataset[index] for index in range(len(dataset))])
    assert outputs["labels"].tolist() == plain["labels"].tolist() == [example["labels"] for example in dataset]
    for name in ("logits", "fused", "uncertainty"):
        np.testing.assert_allclose(outputs[name], plain[name], atol=1e-5)
    metrics = trainer.evaluate(dataset)
    accuracy = (plain["logits"].argmax(axis=1) == plain["labels"]).mean()
    assert metrics["eval_accuracy"] == pytest.approx(accuracy)


def test_bad_rows_are_left_out_and_the_rest_keeps_its_order(splits, tmp_path):
    table = splits["train"].select(range(9))
    audio = list(table["audio"])
    audio[4] = str(tmp_path / "none.wav")
    trainer = make_trainer(tiny_model(), splits, tmp_path, per_device_eval_batch_size=5)
    whole = trainer.predict_outputs(EmotionDataset(table))
    bad = EmotionDataset(table.remove_columns("audio").add_column("audio", audio), on_bad_example="skip")
    rest = trainer.predict_outputs(bad)
    kept = [index for index in range(9) if index != 4]
    np.testing.assert_allclose(rest["logits"], whole["logits"][kept], atol=1e-5)
    # Alone in its batch it would be replaced by another clip, whose result would count twice
    trainer.args.per_device_eval_batch_size = 4
    bad = EmotionDataset(table.remove_columns("audio").add_column("audio", audio), on_bad_example="skip")
    with pytest.raises(ValueError, match=r"8 of 9 clips could be read but there are 9 results"):
        trainer.predict(bad)


@pytest.mark.parametrize("option", [{"eval_do_concat_batches": False}, {"dataloader_drop_last": True}])
def test_results_in_batches_or_in_part_are_in_the_order_of_the_data_set(splits, tmp_path, option):
    trainer = make_trainer(tiny_model(), splits, tmp_path, per_device_eval_batch_size=4, **option)
    trainer.compute_metrics = None  # which would want them in one piece
    dataset = EmotionDataset(splits["train"])
    predictions = trainer.predict(dataset).predictions
    in_batches = "eval_do_concat_batches" in option
    logits = np.concatenate(predictions) if in_batches else predictions
    plain = make_trainer(tiny_model(), splits, tmp_path, per_device_eval_batch_size=4)
    plain.model.load_state_dict(trainer.model.state_dict())
    np.testing.assert_allclose(logits, plain.predict(dataset).predictions[: len(logits)], atol=1e-5)


@pytest.mark.parametrize("option", [{"eval_do_concat_batches": False}, {"dataloader_drop_last": True}])
def test_what_is_fitted_sees_every_clip(splits, tmp_path, option):
    """Also those of the last batch, which training may leave out."""
    trainer = make_trainer(tiny_model(), splits, tmp_path, per_device_eval_batch_size=5, **option)
    outputs = trainer.predict_outputs(EmotionDataset(splits["train"]))
    assert len(outputs["labels"]) == len(outputs["logits"]) == len(splits["train"]) == 32
    assert outputs["labels"].tolist() == splits["train"]["labels"]
    assert all(getattr(trainer.args, name) == value for name, value in option.items())


def test_groups_of_length_are_what_one_step_sees(splits, tmp_path, monkeypatch):
    """So that N processes see the batches that one process with N-fold accumulation sees."""
    sizes = {}
    for processes, accumulation in ((2, 1), (1, 2), (1, 1)):
        monkeypatch.setattr(MMSERTrainingArguments, "world_size", processes)
        trainer = make_trainer(tiny_model(), splits, tmp_path, gradient_accumulation_steps=accumulation)
        sizes[processes, accumulation] = trainer._get_train_sampler().batch_size
    assert sizes == {(2, 1): 16, (1, 2): 16, (1, 1): 8}


def test_a_checkpoint_is_only_complete_with_its_last_file(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nothing") is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-100", "checkpoint-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    assert last_complete_checkpoint(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best"):
        (tmp_path / name / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-100" / "trainer_state.json").write_text('{"epoch": 1, "glo')  # killed while writing
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_the_trainer_writes_its_state_last(splits, tmp_path, monkeypatch):
    """What `last_complete_checkpoint` relies on: killed before any file is written, the checkpoint has no state."""
    trainer = make_trainer(tiny_model(), splits, tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / ".tmpx7Yz01").touch()  # of safetensors in a run that was killed
    written = []
    original = trainer.state.__class__.save_to_json

    def remember(state, path):
        written.append(sorted(file.name for file in Path(path).parent.iterdir()))
        original(state, path)

    monkeypatch.setattr(trainer.state.__class__, "save_to_json", remember)
    trainer.train()
    final = sorted(file.name for file in (tmp_path / "checkpoint-2").iterdir())
    assert sorted({*written[-1], "trainer_state.json"}) == final
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.json"} <= set(final)
    assert "training_args.bin" not in final and ".tmpx7Yz01" not in final


@pytest.mark.parametrize("change", ["lost", "cut"])
def test_a_checkpoint_with_a_file_lost_or_cut_is_not_taken_for_whole(splits, tmp_path, change):
    """It was being deleted or copied: without its optimiser, or its random numbers, training would quietly differ."""
    make_trainer(tiny_model(), splits, tmp_path, save_strategy="steps", save_steps=1, save_total_limit=9).train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    file = tmp_path / "checkpoint-2" / ("rng_state.pth" if change == "lost" else "optimizer.pt")
    if change == "lost":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_a_checkpoint_that_is_replaced_is_half_written_from_the_start(splits, tmp_path, monkeypatch):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
    make_trainer(tiny_model(), splits, tmp_path, **saving).train()
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args):
        raise full

    monkeypatch.setattr(MMSERTrainer, "_save_optimizer_and_scheduler", fail)
    trainer = make_trainer(tiny_model(), splits, tmp_path, **saving)
    with pytest.raises(OSError, match=r"No space left on device: .*checkpoint-2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_what_an_interrupted_deletion_left_is_deleted(splits, tmp_path, seconds):
    """Whatever the times of the folders are: one that is no checkpoint was deleted, or counted as the newest."""
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    first = make_trainer(tiny_model(), splits, tmp_path, save_total_limit=9, **saving)
    first.add_callback(Pause(seconds))
    first.train()
    (tmp_path / "checkpoint-1" / "optimizer.pt").unlink()  # killed while deleting it, and before deleting 2
    mine = ["checkpoint-2-mine", "checkpoint-mine"]
    for name in mine:
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / name)
    os.utime(tmp_path / "checkpoint-2-mine", (0, 0))
    trainer = make_trainer(tiny_model(), splits, tmp_path, save_total_limit=2, **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["checkpoint-3", "checkpoint-4", *mine])
    further = make_trainer(tiny_model(), splits, tmp_path, save_total_limit=2, **{**saving, "max_steps": 6})
    further.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["checkpoint-5", "checkpoint-6", *mine])


class Pause(TrainerCallback):
    """Waits after each checkpoint: a second between the first and the last makes the library trust their times."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_save(self, args, state, control, **kwargs):
        time.sleep(self.seconds)


def test_a_run_that_goes_on_from_its_last_step_takes_no_further_one(splits, tmp_path):
    """The last step is within an epoch, which has 4."""
    arguments = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    make_trainer(tiny_model(), splits, tmp_path, **arguments).train()
    model = tiny_model()
    trainer = make_trainer(model, splits, tmp_path, **arguments)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.state.global_step == 3 and [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in saved.items())


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_the_log_of_a_run_that_goes_on_is_that_of_one_without_a_stop(splits, tmp_path, strategy):
    """Also between two lines of the log: a line is the mean since the last one. So is the mean of the whole run."""
    arguments = {"save_strategy": strategy, "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2, "max_steps": 6}
    arguments |= {"logging_steps": 3, "save_total_limit": 9, "metric_for_best_model": "loss"}
    whole = make_trainer(tiny_model(), splits, tmp_path, **arguments)
    expected = whole.train().metrics
    rest = make_trainer(tiny_model(), splits, tmp_path, **arguments)
    metrics = rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")).metrics
    assert training_lines(whole) == training_lines(rest) and metrics["train_loss"] == expected["train_loss"]
    assert [line["step"] for line in training_lines(whole)] == [2, 3, 4, 6]


def test_the_model_is_saved_as_a_whole_or_not_at_all(splits, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_model(), splits, tmp_path)
    trainer.save_model()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert not (tmp_path / "training_args.bin").exists() and (tmp_path / "training_args.json").exists()
    with torch.no_grad():
        trainer.model.classifier.output.bias.add_(1)
    trainer.model.config.openmax_threshold = 0.5

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device"):
        patch.setattr(MMSERProcessor, "save_pretrained", fail)  # it comes after the weights
        trainer.save_model()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    trainer.save_model()
    changed = {path.name for path in before if path.read_bytes() != before[path]}
    assert {"model.safetensors", "config.json"} <= changed and {path for path in tmp_path.iterdir()} == {*before}


# --- batches of similar length ---------------------------------------------------------------------------------------


def clips_of_sentences():
    """Labels and lengths (samples) of 1920 clips of 32 sentences: each has one emotion and nearly one length."""
    rng = np.random.default_rng(0)
    sentences = np.repeat(np.arange(32), 60)
    seconds = np.geomspace(1.0, 5.0, 32)[sentences] * np.exp(0.01 * rng.standard_normal(len(sentences)))
    return rng.permutation(np.repeat(np.arange(4), 8))[sentences], (RATE * seconds).astype(int)


def batches_of(order, batch_size):
    order = np.array(list(order))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def label_entropy(labels, batches):
    """Mean over the batches of the entropy of their labels, in bits; at most 2 for four classes."""
    shares = np.array([np.bincount(labels[batch], minlength=4) / len(batch) for batch in batches])
    return -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(axis=1).mean()


@pytest.mark.parametrize(("size", "batch_size"), [(203, 8), (64, 8), (5, 8), (65, 8), (40, 1)])
def test_a_sampler_gives_every_clip_once_and_only_the_last_batch_is_short(size, batch_size):
    lengths = np.random.default_rng(size).integers(1000, 90000, size)
    sampler = LengthGroupedSampler(batch_size, lengths.tolist(), seed=3)
    orders = []
    for epoch in (0, 1, 2):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(size)) and len(sampler) == size
        torch.randperm(9)  # the state of the global generator does not matter
        assert list(sampler) == orders[-1]
        later = LengthGroupedSampler(batch_size, lengths.tolist(), seed=3)  # as after resuming
        later.set_epoch(epoch)
        assert list(later) == orders[-1]
        # A batch holds clips that are next to each other in length among some eight batches: sorted, and of one pool
        batches = batches_of(orders[-1], batch_size)
        assert all((np.diff(lengths[batch]) <= 0).all() for batch in batches)
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert size == 5 or orders[0] != orders[1] != orders[2]
    assert size == 5 or list(LengthGroupedSampler(batch_size, lengths.tolist(), seed=9)) != orders[0]


def test_the_pools_of_a_sampler():
    """Pools are drawn at random and sorted one by one; within each, the order of the batches is random."""
    lengths = np.random.default_rng(0).permutation(48)
    pools = batches_of(LengthGroupedSampler(4, lengths.tolist(), seed=0, pool=3), 12)
    for pool in pools:
        batches = [lengths[batch] for batch in batches_of(pool, 4)]
        ranked = sorted(batches, key=lambda batch: -batch[0])
        assert np.concatenate(ranked).tolist() == sorted(lengths[pool], reverse=True)
    firsts = [max(range(3), key=lambda i, pool=pool: lengths[pool[4 * i]]) for pool in pools]
    assert len(set(firsts)) > 1  # the longest batch of a pool is not always in the same place
    assert batches_of(LengthGroupedSampler(4, lengths.tolist(), seed=0, pool=1), 4)[0].tolist() == sorted(
        torch.randperm(48, generator=torch.Generator().manual_seed(0))[:4].tolist(), key=lambda i: -lengths[i]
    )


@pytest.mark.parametrize("batch_size", [8, 16])
def test_batches_have_little_padding_and_many_labels(batch_size):
    """Where length tells the emotion, Transformers' batches hold few emotions, and neighbours are alike as well."""
    labels, lengths = clips_of_sentences()
    stock = StockSampler(batch_size, lengths=lengths.tolist(), generator=torch.Generator().manual_seed(0))
    orders = {
        "ours": LengthGroupedSampler(batch_size, lengths.tolist(), seed=0),
        "stock": stock,
        "random": torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)),
    }
    batches = {name: batches_of(order, batch_size) for name, order in orders.items()}
    padding = {
        name: sum(lengths[batch].max() * len(batch) for batch in own) / lengths.sum() - 1
        for name, own in batches.items()
    }
    entropy = {name: label_entropy(labels, own) for name, own in batches.items()}
    assert padding["stock"] < padding["ours"] < padding["random"] / 3
    assert entropy["stock"] + 0.3 < entropy["ours"] < entropy["random"]
    correlation = {}
    for name, own in batches.items():
        means = [lengths[batch].mean() for batch in own]
        correlation[name] = np.corrcoef(means[:-1], means[1:])[0, 1]
    assert abs(correlation["ours"]) < 0.3 < 0.7 < correlation["stock"]


def test_the_stock_trainer_gets_the_logits_alone(tmp_path):
    """As tutorials have it: `np.argmax(eval_pred.predictions, axis=1)`."""
    model, seen = tiny_model(), []
    fit_openmax_by_chance(model)
    batch = tiny_batch(model, [3000, 2100, 3205, 2000, 1500], [9, 4, 5, 6, 3])
    batch["input_ids"] %= model.config.text_config.vocab_size
    rows = [{name: values[i] for name, values in batch.items()} | {"labels": i % 4} for i in range(5)]

    def accuracy(eval_pred):
        seen.append(eval_pred.predictions)
        return {"accuracy": float((np.argmax(eval_pred.predictions, axis=1) == eval_pred.label_ids).mean())}

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, per_device_eval_batch_size=2, report_to="none")
    trainer = Trainer(model, arguments, eval_dataset=rows, compute_metrics=accuracy)
    metrics = trainer.evaluate()
    with torch.no_grad():
        logits = model(**batch).logits.numpy()
    np.testing.assert_allclose(seen[0], logits, atol=1e-5)
    assert metrics["eval_accuracy"] == (logits.argmax(axis=1) == np.arange(5) % 4).mean()


# --- predictions, calibration, OpenMax -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(splits, tmp_path_factory):
    """A model that knows its training clips, and its trainer."""
    torch.manual_seed(0)
    flags = {"learning_rate": 5e-3, "max_steps": 60, "lr_multipliers": {"audio_encoder": 1.0, "text_encoder": 1.0}}
    trainer = make_trainer(tiny_model(), splits, tmp_path_factory.mktemp("trained"), **flags)
    trainer.train()
    return trainer


def test_predictions_come_in_the_order_of_the_data_and_without_a_loss(trained, splits, monkeypatch):
    table = splits["test"].select([9, 2, 5, 0, 14, 3, 8])
    labels = np.array([0, -1, 2, 3, -1, -1, 1])
    table = table.remove_columns("labels").add_column("labels", labels)
    dataset = EmotionDataset(table)

    def refuse(*args, **kwargs):
        raise AssertionError("a loss was computed")

    monkeypatch.setattr(MMSERForAudioClassification, "_weighted_losses", refuse)
    outputs = trained.predict_outputs(dataset)
    np.testing.assert_array_equal(outputs["labels"], labels)
    model = trained.model.eval()
    for index in range(len(dataset)):
        batch = trained.data_collator([dataset[index]])
        batch.pop("labels")
        with torch.no_grad():
            single = model(**batch)
        for name in ("logits", "fused", "anchor_distances"):
            np.testing.assert_allclose(outputs[name][index], single[name][0].numpy(), atol=1e-4)
        assert outputs["uncertainty"][index] == pytest.approx(single.uncertainty.item(), abs=1e-4)
    assert outputs["fused"].shape == (7, model.config.fusion_hidden_size)


def test_predictions_for_calibration_are_not_told_to_trackers(trained, splits, monkeypatch):
    """trackio would begin a second run for them after that of the training (`--report_to`)."""

    class Tracker(TrainerCallback):
        told = 0

        def on_predict(self, *args, **kwargs):
            self.told += 1

    monkeypatch.setattr("mmser.trainer.get_reporting_integration_callbacks", lambda names: [Tracker])
    tracker = Tracker()
    trained.add_callback(tracker)
    try:
        dataset = EmotionDataset(splits["test"])
        trained.predict_outputs(dataset)
        assert tracker.told == 0
        trained.predict(dataset)  # what a user predicts is told
        assert tracker.told == 1
    finally:
        trained.remove_callback(tracker)


def test_unreadable_clips_are_left_out_up_front_so_that_predictions_match_the_rows(trained, splits, tmp_path, log):
    table = splits["test"]
    paths = []
    for index, path in enumerate(table["audio"]):
        paths.append(str(tmp_path / f"{index}.wav"))
        shutil.copy(path, paths[-1])
    for bad in (4, 5, 6, 7):  # a whole batch
        Path(paths[bad]).write_bytes(b"RIFF is all there is")
    soundfile.write(paths[9], np.zeros(10), RATE)  # too short
    table = table.remove_columns("audio").add_column("audio", paths)
    trained.args.per_device_eval_batch_size = 4
    readable = drop_unreadable(table, sampling_rate=RATE)
    kept = [index for index in range(16) if index not in (4, 5, 6, 7, 9)]
    assert readable["row"] == [table["row"][index] for index in kept]
    assert "skipped 5 bad rows" in log.text
    outputs = trained.predict_outputs(EmotionDataset(readable, on_bad_example="skip"))
    whole = trained.predict_outputs(EmotionDataset(splits["test"]))
    np.testing.assert_array_equal(outputs["labels"], whole["labels"][kept])
    np.testing.assert_allclose(outputs["logits"], whole["logits"][kept], atol=1e-4)
    assert drop_unreadable(readable, sampling_rate=RATE) is readable
    with pytest.raises(ValueError, match="none of the 2 examples can be read"):
        drop_unreadable(table.select([4, 5]), sampling_rate=RATE)


def mean_nll(logits, labels, temperature):
    return nn.functional.cross_entropy(torch.tensor(logits / temperature).double(), torch.tensor(labels)).item()


@pytest.fixture
def training(splits):
    return EmotionDataset(splits["train"])


@pytest.fixture
def held_out(splits):
    """24 clips that were not trained on, and 12 of them again, labelled wrongly: for each speaker it is too sure."""
    table = concatenate_datasets([splits["test"], splits["validation"]])
    again = table.select(range(0, 24, 2))
    labels = (np.array(again["labels"]) + 1) % 4
    return EmotionDataset(concatenate_datasets([table, again.remove_columns("labels").add_column("labels", labels)]))


@pytest.fixture(params=[("centroid", "probability"), ("anchor", "activation")], ids=["default", "published"])
def either(request, trained, splits, tmp_path):
    """A trainer of the trained model with either kind of OpenMax; 70 % acceptance is to be had from six clips."""
    distance, level = request.param
    options = {"openmax_distance": distance, "openmax_level": level, "openmax_centroids_per_class": 2}
    options |= {"openmax_acceptance": 0.7, "openmax_tail_size": 10}
    model = tiny_model(class_counts=trained.model.config.class_counts, **options)
    fitted = ("openmax.", "temperature", "uncertainty.error_calibration", "prediction_sets.")  # maybe by another test
    weights = {name: value for name, value in trained.model.state_dict().items() if not name.startswith(fitted)}
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    return make_trainer(model, splits, tmp_path)


def distances_of(model, outputs):
    if model.config.openmax_distance == "anchor":
        return outputs["anchor_distances"]
    fused = outputs["fused"] / np.linalg.norm(outputs["fused"], axis=1, keepdims=True)
    return np.linalg.norm(fused[:, None, None] - model.openmax.centroids.numpy(), axis=-1).min(axis=-1)


def assert_tails(model, outputs):
    """The Weibulls are fitted on these clips: as in libmr the smallest distance of the tail is the shift."""
    labels, distances = outputs["labels"], distances_of(model, outputs)
    right = outputs["logits"].argmax(axis=1) == labels
    for label in range(4):
        tail = np.sort(distances[right & (labels == label), label])[-10:]
        assert len(tail) >= 5
        assert model.openmax.weibull_shift[label].item() == pytest.approx(tail[0], abs=1e-5)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, state):
    assert model.state_dict().keys() == state.keys()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}


def test_finalize_calibrates_on_held_out_clips(either, training, held_out, tmp_path, log):
    model = either.model
    raw = either.predict_outputs(held_out)
    logits, labels = raw["logits"], raw["labels"]
    assert (logits.argmax(axis=1) != labels).sum() == 12

    report = either.finalize(training, held_out)
    assert report["temperature"] == pytest.approx(fit_temperature(logits, labels, speakers_of(held_out)))
    assert model.temperature.item() == report["temperature"]
    assert report["nll_before"] == pytest.approx(mean_nll(logits, labels, 1.0), abs=1e-5)
    assert report["nll_after"] == pytest.approx(mean_nll(logits, labels, report["temperature"]), abs=1e-5)
    assert report["nll_after"] < report["nll_before"]
    speakers = {(row["corpus"], row["speaker"]) for row in held_out.dataset}
    assert (report["clips"], report["speakers"], report["errors"]) == (36, len(speakers), 12)
    expected = beta.ppf(0.025, 12, 25), beta.ppf(0.975, 13, 24)  # Clopper & Pearson
    assert report["error_rate_interval"] == pytest.approx(expected)
    sets = PredictionSets()
    most = sets.fit(softmax(logits.astype(np.float64) / report["temperature"]), labels, speakers_of(held_out))
    assert report["largest_set_coverage"] == most == len(speakers) / (len(speakers) + 1)
    torch.testing.assert_close(model.prediction_sets.thresholds, sets.thresholds)
    assert "36 held-out clips" in log.text and "18.6 to 51.0 % of the answers are wrong" in log.text

    # Centroids from the training clips, Weibulls from the held-out ones; with anchors, as published, from the former
    outputs = either.train_outputs
    np.testing.assert_array_equal(outputs["labels"], training.dataset["labels"])
    if model.config.openmax_distance == "centroid":
        expected = OpenMax(4, 3, centroids_per_class=2, embedding_size=16)
        expected.fit_centroids(outputs["fused"], outputs["labels"])
        assert torch.equal(model.openmax.centroids, expected.centroids)
    assert_tails(model, raw if model.config.openmax_distance == "centroid" else outputs)
    assert model.openmax.is_fitted and model.openmax.has_thresholds

    state = state_of(model)
    either.save_model(str(tmp_path))
    assert not changed(MMSERForAudioClassification.from_pretrained(tmp_path), state)
    assert either.finalize(training, held_out) == report  # what is there already does not count
    assert not changed(model, state)


def test_openmax_learns_from_clips_without_their_text_too(either, training, held_out, monkeypatch):
    """A recording without its transcript lies elsewhere among the fused vectors: it is no unknown clip."""
    model, names = either.model, ("logits", "fused", "anchor_distances", "labels")
    views = [audio_alone(either, dataset.dataset, EmotionDataset) for dataset in (training, held_out)]
    for (view, index), dataset in zip(views, (training, held_out), strict=True):
        has_text = [bool(text) for text in dataset.dataset["text"]]
        assert index.tolist() == np.flatnonzero(has_text).tolist() and len(view) == sum(has_text) > 0
        assert all("text" not in view[i] or not view[i]["text"] for i in range(len(view)))
    joined = []
    for (view, index), dataset in zip(views, (training, held_out), strict=True):
        outputs, own = either.predict_outputs(dataset), either.predict_outputs(view)
        joined.append({name: np.concatenate([outputs[name], own[name]]) for name in names})
        speakers = np.array(speakers_of(dataset))
        joined[-1]["speakers"] = np.concatenate([speakers, speakers[index]])
    monkeypatch.setattr("mmser.trainer.RIGHT_WITHOUT_TEXT", 99.0)  # a model that needs the text learns nothing of it
    either.finalize(training, held_out, *views)
    plain = copy.deepcopy(model.openmax.state_dict())
    either.finalize(training, held_out)
    for name, value in model.openmax.state_dict().items():
        torch.testing.assert_close(value, plain[name], msg=name, equal_nan=True)
    monkeypatch.setattr("mmser.trainer.RIGHT_WITHOUT_TEXT", 0.0)
    report = either.finalize(training, held_out, *views)
    assert report["clips"] == len(held_out)  # temperature and uncertainty are those of the clips as they are
    expected = copy.deepcopy(model.openmax)
    expected.reset()
    train = {name: joined[0][name] for name in names}
    tail_size, acceptance = model.config.openmax_tail_size, model.config.openmax_acceptance
    expected.fit_outputs(train, joined[1], report["temperature"], tail_size, acceptance)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.openmax.state_dict()[name], value, msg=name, equal_nan=True)
    np.testing.assert_array_equal(either.train_outputs["labels"], training.dataset["labels"])


def test_the_calibrated_model_says_what_was_fitted(either, training, held_out):
    """Temperature, probability of an error and rejection, in the outputs of the model, against their definitions."""
    raw = either.predict_outputs(held_out)
    assert not {"unknown_probability", "rejection_score", "is_unknown"} & set(raw)
    report = either.finalize(training, held_out)
    model, outputs = either.model, either.predict_outputs(held_out)
    np.testing.assert_allclose(outputs["logits"], raw["logits"] / report["temperature"], atol=1e-5)
    for name in ("features", "fused", "anchor_distances", "labels"):
        np.testing.assert_allclose(outputs[name], raw[name], atol=1e-6)
    assert outputs["features"].shape == (36, 16)
    assert all(outputs[name].shape == (36,) for name in ("unknown_probability", "rejection_score", "is_unknown"))
    probabilities, scores = slow_openmax(model.openmax, outputs["logits"], distances_of(model, outputs))
    np.testing.assert_allclose(outputs["unknown_probability"], probabilities[:, 4], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(outputs["rejection_score"], scores, rtol=1e-3, atol=1e-5)

    predictions = outputs["logits"].argmax(axis=1)
    wrong = predictions != outputs["labels"]
    confidence = torch.tensor(outputs["logits"]).double().softmax(dim=-1).numpy().max(axis=1)
    doubt, own = (np.log(score / (1 - score)) for score in (1 - confidence, raw["uncertainty"].astype(np.float64)))
    weights = model.uncertainty.error_calibration.tolist()
    expected = 1 / (1 + np.exp(-(weights[0] * doubt + weights[1] * own + weights[2])))
    np.testing.assert_allclose(outputs["uncertainty"], expected, atol=1e-5)
    assert outputs["uncertainty"].mean() == pytest.approx(wrong.mean(), abs=0.05)
    assert report["error_auroc_before"] == pytest.approx(roc_auc_score(wrong, raw["uncertainty"]))
    assert report["error_auroc_after"] == pytest.approx(roc_auc_score(wrong, expected))

    scores, speakers = outputs["rejection_score"], speakers_of(held_out)
    thresholds = model.openmax.rejection_thresholds.numpy()
    clear = np.abs(scores - thresholds[predictions]) > 1e-6  # on each threshold lies a clip
    np.testing.assert_array_equal(outputs["is_unknown"][clear], (scores > thresholds[predictions])[clear])
    for label in range(4):
        own = predictions == label
        expected = OpenMax(1, alpha=1)
        expected.fit_thresholds(scores[own], np.zeros(own.sum(), dtype=int), 0.7, np.array(speakers)[own])
        assert thresholds[label] == pytest.approx(expected.rejection_thresholds.item(), abs=1e-5)
    assert 0 < outputs["is_unknown"].sum() <= 0.3 * 36


def test_calibrating_again_changes_nothing(either, training, held_out, splits, tmp_path):
    """On the same clips, in the same trainer and from the checkpoint alone."""
    report = either.finalize(training, held_out)
    model, state = either.model, state_of(either.model)
    for _ in range(2):
        assert either.calibrate(held_out) == report
        assert not changed(model, state)
    model.save_pretrained(tmp_path / "saved")
    later = make_trainer(MMSERForAudioClassification.from_pretrained(tmp_path / "saved"), splits, tmp_path)
    assert later.train_outputs is None
    assert later.calibrate(held_out) == report
    assert not changed(later.model, state)


def test_calibrating_on_other_clips_leaves_what_was_learned(either, training, held_out):
    either.finalize(training, held_out)
    model, state = either.model, state_of(either.model)
    report = either.calibrate(EmotionDataset(held_out.dataset.select(range(2, 24))))  # all of them are right
    assert report["errors"] == 0 and report["temperature"] < state["temperature"].item()
    fitted = {"temperature", "openmax.rejection_thresholds", "prediction_sets.thresholds"}
    weibulls = {f"openmax.weibull_{name}" for name in ("shape", "scale", "shift")}
    assert changed(model, state) - weibulls == fitted
    assert bool(changed(model, state) & weibulls) == model.openmax.has_centroids


def test_few_held_out_clips_leave_the_weibulls_to_the_training_clips(either, training, held_out, log):
    few, config, openmax = (
        EmotionDataset(held_out.dataset.select(range(16))),
        either.model.config,
        either.model.openmax,
    )
    either.finalize(training, few)
    assert openmax.is_fitted and openmax.has_thresholds
    assert_tails(either.model, either.train_outputs)
    config.openmax_acceptance = 0.95
    either.finalize(training, few)
    assert openmax.is_fitted and not openmax.has_thresholds  # 19 clips is the smallest number for 95 %
    assert "the probability of unknown decides" in log.text
    config.openmax_acceptance = None
    either.finalize(training, held_out)
    assert openmax.is_fitted and not openmax.has_thresholds


def test_without_training_clips_openmax_is_left_unfitted(splits, held_out, tmp_path, log):
    """`calibrate` on a model that was never finalized still fits what does not need them."""
    for distance in ("centroid", "anchor"):
        log.clear()
        trainer = make_trainer(tiny_model(openmax_distance=distance), splits, tmp_path)
        report = trainer.calibrate(held_out)
        assert report["nll_after"] <= report["nll_before"]
        assert trainer.model.temperature.item() == report["temperature"]
        assert trainer.model.uncertainty.error_calibration.tolist() != [0, 1, 0]
        assert not trainer.model.openmax.is_fitted and "OpenMax is left as it is" in log.text


def test_without_held_out_clips_nothing_is_calibrated(either, training):
    either.model.temperature.fill_(3.0)
    either.model.uncertainty.error_calibration.fill_(3.0)
    assert either.finalize(training) == {"temperature": 1.0}
    assert either.model.temperature.item() == 1.0
    assert either.model.uncertainty.error_calibration.tolist() == [0, 1, 0]
    assert_tails(either.model, either.train_outputs)
    assert either.model.openmax.is_fitted and not either.model.openmax.has_thresholds


def test_few_held_out_clips_that_are_all_right_leave_the_temperature_at_one(trained, splits, log):
    """Their likelihood grows without end as the temperature falls: it says nothing about doubt on other clips."""
    held_out = EmotionDataset(splits["test"])
    outputs = trained.predict_outputs(held_out)
    right = np.flatnonzero(outputs["logits"].argmax(axis=1) == outputs["labels"])
    assert len(right) > 4
    report = trained.finalize(EmotionDataset(splits["train"]), EmotionDataset(splits["test"].select(right)))
    assert report["temperature"] == trained.model.temperature.item() == 1.0
    assert trained.model.uncertainty.error_calibration.tolist() == [1, 0, 0] and report["uses_one_minus_max"]
    assert trained.model.openmax.is_fitted
    assert "The temperature stays 1" in log.text and "0 error(s)" in log.text
    outputs = trained.predict_outputs(held_out)
    confidence = torch.tensor(outputs["logits"]).double().softmax(dim=-1).amax(dim=-1)
    np.testing.assert_allclose(outputs["uncertainty"], 1 - confidence, rtol=1e-3)


def test_what_held_out_clips_cannot_determine_stays_as_it_was(either, training, held_out, log):
    """All right: neither the temperature nor the probability of an error; all wrong: not the latter."""
    before = either.finalize(training, held_out)
    head = either.model.uncertainty
    weights = head.error_calibration.clone()
    assert abs(before["temperature"] - 1) > 0.01 and weights.tolist() not in ([0, 1, 0], [1, 0, 0])
    outputs = either.predict_outputs(held_out)
    right = np.flatnonzero(outputs["logits"].argmax(axis=1) == outputs["labels"])

    report = either.calibrate(EmotionDataset(held_out.dataset.select(right[:6])))
    assert report["temperature"] == either.model.temperature.item() == pytest.approx(before["temperature"])
    assert torch.equal(head.error_calibration, weights)
    assert "error_auroc_after" not in report
    table = held_out.dataset.select(right)
    labels = (np.array(table["labels"]) + 1) % 4
    report = either.calibrate(EmotionDataset(table.remove_columns("labels").add_column("labels", labels)))
    assert report["temperature"] > before["temperature"]
    assert torch.equal(head.error_calibration, weights) and "error_auroc_after" not in report


def test_clips_that_are_all_alike_leave_openmax_as_it_is(either, training, held_out, log):
    """They have no tail to fit; that is no reason to lose a model."""
    outputs = either.predict_outputs(training)
    right = int(np.flatnonzero(outputs["logits"].argmax(axis=1) == outputs["labels"])[0])
    alike = EmotionDataset(training.dataset.select([right] * 24))
    openmax = either.model.openmax
    assert either.finalize(alike) == {"temperature": 1.0}
    assert not openmax.is_fitted and "OpenMax is left as it is" in log.text

    either.finalize(training, held_out)
    fit = {name: value.clone() for name, value in openmax.state_dict().items() if name != "rejection_thresholds"}
    log.clear()
    either.calibrate(alike)
    assert (
        "OpenMax is left as it is" in log.text
    ) == openmax.has_centroids  # with anchors the fit is on training clips
    assert openmax.is_fitted and all(torch.equal(openmax.get_buffer(name), value) for name, value in fit.items())


def test_openmax_is_left_unfitted_with_a_warning_if_too_few_clips_are_right(splits, tmp_path, log):
    model = tiny_model()
    fit_openmax_by_chance(model)  # from an earlier training
    assert model.openmax.is_fitted
    with torch.no_grad():
        model.classifier.output.weight.zero_()
        model.classifier.output.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    trainer = make_trainer(model, splits, tmp_path)
    trainer.finalize(EmotionDataset(splits["train"]))
    assert not model.openmax.is_fitted
    assert "OpenMax is left as it is" in log.text
    assert "unknown_probability" not in trainer.predict_outputs(trainer.eval_dataset)


def test_a_collapsed_model_is_warned_of(splits, tmp_path, log):
    model = tiny_model()
    with torch.no_grad():
        model.classifier.output.weight.zero_()
        model.classifier.output.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    trainer = make_trainer(model, splits, tmp_path)
    metrics = trainer.evaluate()
    assert metrics["eval_num_predicted_classes"] == 1 and metrics["eval_recall_min"] == 0
    assert "Collapsed model: all 8 clips were classified as 'sad'" in log.text


def test_saved_arguments_are_json_and_have_no_token(splits, tmp_path):
    trainer = make_trainer(tiny_model(), splits, tmp_path, hub_token="hf_secret")
    trainer.save_model()
    text = (tmp_path / "training_args.json").read_text()
    assert json.loads(text)["learning_rate"] == trainer.args.learning_rate
    assert "hf_secret" not in text
    assert not [path.name for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


# --- what the base class offers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` has no effect here, got 0.1.*`label_smoothing`"),
        ({"label_names": ["classes"]}, "`label_names` has no effect here"),
        ({"length_column_name": "duration"}, "`length_column_name` has no effect here"),
        ({"prediction_loss_only": True}, "`prediction_loss_only` has no effect here"),
        ({"remove_unused_columns": True}, "`remove_unused_columns` has no effect here"),
    ],
)
def test_arguments_of_the_base_class_without_effect_are_refused(tmp_path, argument, said):
    with pytest.raises(ValueError, match=said):
        MMSERTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **argument)


def test_a_loss_of_the_users_own_is_what_is_minimised(splits, tmp_path):
    trainer = make_trainer(tiny_model(), splits, tmp_path)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.square().mean()
    trainer.train()
    line = training_lines(trainer)[0]
    assert not [name for name in line if name.startswith("loss_")] and line["loss"] > 0


def test_an_optimiser_of_the_users_own_gets_the_groups(splits, tmp_path):
    made = make_trainer(tiny_model(), splits, tmp_path)
    trainer = MMSERTrainer(made.model, made.args, optimizer_cls_and_kwargs=(torch.optim.SGD, {"momentum": 0.5}))
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.SGD and optimizer.defaults["momentum"] == 0.5
    assert {group["name"] for group in optimizer.param_groups} == set(PUBLISHED)


def test_a_checkpoint_has_its_processor_though_only_the_collator_knows_it(splits, tmp_path, caplog):
    made = make_trainer(tiny_model(), splits, tmp_path)
    options = {"train_dataset": made.train_dataset, "data_collator": made.data_collator}
    MMSERTrainer(made.model, made.args, **options).save_model(str(tmp_path / "model"))
    assert MMSERProcessor.from_pretrained(tmp_path / "model").tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert "without a processor" not in caplog.text
    options["data_collator"] = lambda examples: made.data_collator(examples)
    MMSERTrainer(made.model, made.args, **options).save_model(str(tmp_path / "without"))
    assert "saved without a processor" in caplog.text


def test_resuming_never_gives_old_weights_new_labels(splits, tmp_path):
    make_trainer(tiny_model(), splits, tmp_path, save_strategy="steps", save_steps=1).train()
    other = make_trainer(tiny_model(id2label=dict(enumerate("abcd"))), splits, tmp_path)
    with pytest.raises(ValueError, match=r"was trained on the labels \['neutral', .*not on \['a', 'b', 'c', 'd'\]"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("clips", "batch_size", "epochs"),
    [(20_000, 16, 10), (1866, 32, 15), (200, 16, 68), (200, 32, 126), (8, 16, 150)],
)
def test_few_clips_get_more_epochs_by_default(tmp_path, clips, batch_size, epochs):
    arguments = MMSERTrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=batch_size)
    arguments.choose_epochs(clips)
    assert arguments.num_train_epochs == epochs
    steps = epochs * math.ceil(clips / batch_size)
    assert steps >= MIN_STEPS or epochs == 150


def test_a_number_of_epochs_or_steps_that_was_given_stays(splits, tmp_path):
    assert make_trainer(tiny_model(), splits, tmp_path, max_steps=-1).args.num_train_epochs == 150  # 4 steps each
    for given in ({"num_train_epochs": 10}, {"num_train_epochs": 0.5}, {"max_steps": 3}):
        trainer = make_trainer(tiny_model(), splits, tmp_path, **{"max_steps": -1, **given})
        assert trainer.args.num_train_epochs == given.get("num_train_epochs", 10)
    assert MMSERTrainingArguments(output_dir=str(tmp_path), use_cpu=True).num_train_epochs == 10  # for any trainer


# --- what a model brings from an earlier training --------------------------------------------------------------------


def test_training_forgets_the_calibration_of_the_weights_before(splits, tmp_path):
    model = tiny_model()
    fit_openmax_by_chance(model)
    model.temperature.fill_(2.0)
    trainer = make_trainer(model, splits, tmp_path)
    trainer.train_outputs = {"logits": np.zeros((1, 4))}
    trainer.train()
    assert model.temperature.item() == 1 and not model.openmax.is_fitted and trainer.train_outputs is None


def test_class_counts_of_other_clips_are_told(splits, tmp_path, caplog):
    make_trainer(tiny_model(class_counts=[8, 8, 8, 8]), splits, tmp_path)
    assert "class_counts" not in caplog.text
    model = make_trainer(tiny_model(class_counts=[1, 2, 3, 4]), splits, tmp_path).model
    assert "`config.class_counts`, [1, 2, 3, 4], but the training set has [8, 8, 8, 8]" in caplog.text
    assert model.config.class_counts == [1, 2, 3, 4]  # the user may have meant them
