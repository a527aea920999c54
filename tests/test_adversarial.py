# SPDX-License-Identifier: Apache-2.0
"""Tests of `adversarial`. The references take the gradient of a model's inputs: where neither layers are weighed nor
states standardised, the states that are given are those that enter the fusion."""

import copy
import math
import os
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from test_trainer import (
    DETERMINISTIC,
    flat_parameters,
    load_splits,
    make_trainer,
    resumable,
    training_lines,
    training_losses,
    with_training_clips,
)
from tiny_corpus import NAMES, tiny_model, write_corpus
from torch import nn

from mmser.adversarial import PROBE, DomainHead, StatePerturbation, reversal_strength
from mmser.caching import CachedStatesDataset, EncoderStateCache
from mmser.examples import EmotionDataset
from mmser.training_arguments import MMSERTrainingArguments
from modeling_mmser import MMSERForAudioClassification

pytestmark = pytest.mark.usefixtures("seeded")
KINDS = ("fgm", "vat")


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return load_splits(write_corpus(tmp_path_factory.mktemp("corpus")))


def model_of_states(dropout=False, **overrides):
    """A model whose fusion gets the states as they are given."""
    model = tiny_model(dropout=dropout, use_weighted_layer_sum=False, class_counts=[4, 3, 2, 1], **overrides)
    model.freeze_audio_encoder()
    model.freeze_text_encoder()
    for parameter in model.parameters():  # the zeros that it starts with would hide much
        if parameter.requires_grad and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
    return model.train()


def batch_of_states(rows=6, audio_lengths=(5, 3, 4, 5, 0, 1), text_lengths=(3, 0, 2, 3, 1, 3)):
    def masked(lengths, *shape):
        mask = torch.arange(max(1, *lengths))[None] < torch.tensor(lengths)[:, None]
        states = torch.randn(rows, mask.shape[1], *shape)
        return states * mask.view(*mask.shape, *[1] * len(shape)), mask.long()

    audio, audio_mask = masked(audio_lengths, 1, 16)
    text, text_mask = masked(text_lengths, 16)
    labels = torch.arange(rows) % 4
    return {
        "audio_states": audio,
        "attention_mask": audio_mask,
        "text_states": text,
        "text_attention_mask": text_mask,
        "labels": labels,
    }


def adversarial_gradients(model, batch, splits, folder, kind, **arguments):
    """The gradients and the loss of one step of the trainer."""
    own = copy.deepcopy(model)
    trainer = make_trainer(own, splits, folder, adversarial=kind, **arguments)
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    torch.manual_seed(7)
    loss = trainer.training_step(own.train(), dict(batch))
    return gradients_of(own), loss, torch.get_rng_state()


def gradients_of(model):
    return {name: own.grad.clone() for name, own in model.named_parameters() if own.grad is not None}


def longest(states, gradient, epsilon):
    """One clip at a time in float64: the gradient, `epsilon` times as long as the states."""
    rows = []
    for own, direction in zip(states.double(), gradient.double(), strict=True):
        length = direction.norm()
        rows.append(epsilon * own.norm() * direction / length if length > 0 else torch.zeros_like(own))
    return torch.stack(rows).float()


def perturbed(batch, audio_gradient, text_gradient, epsilon):
    return batch | {
        "audio_states": batch["audio_states"] + longest(batch["audio_states"], audio_gradient, epsilon),
        "text_states": batch["text_states"] + longest(batch["text_states"], text_gradient, epsilon),
    }


def divergence(logits, reference):
    """KL(reference || logits), mean over the rows, in float64."""
    p, q = reference.double().log_softmax(dim=1), logits.double().log_softmax(dim=1)
    return (p.exp() * (p - q)).sum(dim=1).mean()


def test_fgm_adds_the_gradient_of_the_loss_and_learns_from_both(splits, tmp_path):
    model, batch = model_of_states(), batch_of_states()
    arguments = {"adversarial_epsilon": 0.3, "adversarial_weight": 0.7}
    found, loss, _ = adversarial_gradients(model, batch, splits, tmp_path, "fgm", **arguments)
    inputs = [batch[name].clone().requires_grad_() for name in ("audio_states", "text_states")]
    clean = model(**batch | {"audio_states": inputs[0], "text_states": inputs[1]}).loss
    gradients = torch.autograd.grad(clean, inputs, retain_graph=True)
    attacked = model(**perturbed(batch, *gradients, 0.3)).loss
    assert attacked > clean
    (clean + 0.7 * attacked).backward()
    assert loss.item() == pytest.approx((clean + 0.7 * attacked).item(), rel=1e-5)
    expected = gradients_of(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def vat_direction(model, batch, seed):
    """Gradients of the divergence at a small random perturbation of both states."""
    torch.manual_seed(seed)
    names, masks = ("audio_states", "text_states"), ("attention_mask", "text_attention_mask")
    noise = [
        torch.randn_like(batch[name].flatten(2)) * batch[mask][..., None]
        for name, mask in zip(names, masks, strict=True)
    ]
    shaped = [noise[0][:, :, None], noise[1]]
    with torch.no_grad():
        reference = model(**batch).logits
    probes = [longest(batch[name], own, PROBE).requires_grad_() for name, own in zip(names, shaped, strict=True)]
    moved = [batch[name] + probe for name, probe in zip(names, probes, strict=True)]
    logits = model(**batch | {"audio_states": moved[0], "text_states": moved[1]}).logits
    return torch.autograd.grad(divergence(logits, reference), probes), reference


def test_vat_adds_what_changes_the_prediction_most(splits, tmp_path):
    model, batch = model_of_states(), batch_of_states()
    arguments = {"adversarial_epsilon": 0.3, "adversarial_weight": 0.7}
    found, loss, _ = adversarial_gradients(model, batch, splits, tmp_path, "vat", **arguments)
    direction, reference = vat_direction(model, batch, seed=7)
    model.zero_grad()
    clean = model(**batch).loss
    attacked = divergence(model(**perturbed(batch, *direction, 0.3)).logits, reference).float()
    (clean + 0.7 * attacked).backward()
    assert loss.item() == pytest.approx((clean + 0.7 * attacked).item(), rel=1e-4)
    expected = gradients_of(model)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-3, msg=name)
    by_chance = []
    for seed in range(20):
        torch.manual_seed(seed)
        noise = torch.randn_like(batch["audio_states"]), torch.randn_like(batch["text_states"])
        with torch.no_grad():
            by_chance.append(divergence(model(**perturbed(batch, *noise, 0.3)).logits, reference).item())
    assert attacked.item() > 2 * np.mean(by_chance)


@pytest.mark.parametrize("kind", KINDS)
def test_both_passes_drop_out_the_same_units_and_draw_as_many_numbers_as_one(kind, splits, tmp_path):
    """Without a perturbation worth the name, FGM doubles the gradient, and VAT adds nothing to it."""
    model, batch = model_of_states(dropout=True), batch_of_states()
    found, loss, random_state = adversarial_gradients(
        model, batch, splits, tmp_path, kind, adversarial_epsilon=1e-12, adversarial_weight=1.0
    )
    torch.manual_seed(7)
    plain = model(**batch).loss
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model(**batch).loss.item() != pytest.approx(plain.item(), rel=1e-3)  # other units
    plain.backward()
    factor = 2 if kind == "fgm" else 1
    assert loss.item() == pytest.approx(factor * plain.item(), rel=1e-5)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(found[name], factor * gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_is_attacked_alone_whatever_its_padding(kind):
    """What is added is that of each clip, none to padding or to a missing modality."""
    model, batch = model_of_states(), batch_of_states()
    own = StatePerturbation(model.mmser, kind, 0.3)
    passes = []

    def backward():
        model.mmser.state_perturbation = own if not passes else spy
        output = model(**batch)
        loss = own.loss(output.loss, output.logits)
        loss.backward()
        passes.append(loss.detach())
        return passes[-1]

    added = {}

    def spy(name, states, mask):
        moved = own(name, states, mask)
        added[name] = (moved - states).detach()
        return moved

    own.step(backward, nullcontext(), lambda: model(**{k: v for k, v in batch.items() if k != "labels"}).logits)
    assert model.mmser.state_perturbation is None and len(passes) == 2
    for name, mask_name in (("audio", "attention_mask"), ("text", "text_attention_mask")):
        states, mask = batch[f"{name}_states"].flatten(2), batch[mask_name].bool()
        lengths, expected = added[name].flatten(1).norm(dim=1), 0.3 * states.flatten(1).norm(dim=1)
        torch.testing.assert_close(lengths, expected, rtol=1e-4, atol=1e-6)
        assert (added[name][~mask] == 0).all() and (lengths > 0).sum() == mask.any(dim=1).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_reaches_the_deviation_of_the_layers(kind):
    model, batch = model_of_states(pooling_type="layer_statistics"), batch_of_states()
    own, pooled = StatePerturbation(model.mmser, kind, 0.3), []
    model.mmser.register_forward_hook(lambda module, args, output: pooled.append(output.audio_embeds.detach()))

    def backward():
        output = model(**batch)
        loss = own.loss(output.loss, output.logits)
        loss.backward()
        return loss.detach()

    own.step(backward, nullcontext(), lambda: model(**{k: v for k, v in batch.items() if k != "labels"}).logits)
    half = pooled[0].shape[1] // 2
    has_frames = batch["attention_mask"].sum(dim=1) > 1  # a single one has no deviation
    moved = (pooled[-1] - pooled[0])[has_frames, half:].norm(dim=1)
    assert (moved > 0.01).all() and (pooled[-1][:, half:] >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_mixtures_and_teachers_are_the_same_in_all_passes(kind, splits, tmp_path):
    """VAT asks for the prediction of the same mixture: without a perturbation there is nothing to ask for."""
    model, batch = model_of_states(dropout=True, mixup_alpha=0.5, distillation_loss_weight=0.5), batch_of_states()
    arguments = {"adversarial_epsilon": 1e-12, "teacher": tiny_model(use_weighted_layer_sum=False)}
    _, loss, random_state = adversarial_gradients(model, batch, splits, tmp_path, kind, **arguments)
    with torch.no_grad():
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        batch |= {"teacher_logits": arguments["teacher"].eval()(**inputs).logits}
    torch.manual_seed(7)
    plain = model(**batch).loss
    assert torch.equal(torch.get_rng_state(), random_state)
    assert loss.item() == pytest.approx((2 if kind == "fgm" else 1) * plain.item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_any_text_is_attacked_by_its_audio(kind, splits, tmp_path):
    model, batch = model_of_states(), batch_of_states(audio_lengths=(5, 3, 4, 5, 2, 1), text_lengths=(0,) * 6)
    found, loss, _ = adversarial_gradients(model, batch, splits, tmp_path, kind)
    assert math.isfinite(loss.item()) and all(gradient.isfinite().all() for gradient in found.values())


# --- in the trainer --------------------------------------------------------------------------------------------------


def same_for_each_clip(states):
    """In place of the probe of VAT, which is drawn for a whole batch."""
    return torch.linspace(-1, 1, states.shape[-1]).expand_as(states)


@pytest.mark.parametrize("kind", KINDS)
def test_two_accumulated_batches_are_one(kind, splits, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", same_for_each_clip)
    start, results = tiny_model(dropout=False), []
    for batch_size, accumulated in ((8, 1), (4, 2)):
        model = MMSERForAudioClassification(start.config)
        model.load_state_dict(start.state_dict())
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulated}
        trainer = make_trainer(model, splits, tmp_path, **DETERMINISTIC, **sizes, adversarial=kind)
        trainer.train()
        results.append((flat_parameters(model), training_losses(trainer)))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=0)
    assert results[1][1] == pytest.approx(results[0][1], abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_on_cached_states_in_mixed_precision(kind, splits, tmp_path):
    model = tiny_model()
    model.freeze_audio_encoder()
    model.freeze_text_encoder()
    trainer = make_trainer(model, splits, tmp_path, adversarial=kind, bf16=True, eval_strategy="epoch", max_steps=4)
    cache = EncoderStateCache(tmp_path / "states", model, trainer.processing_class, autocast=torch.bfloat16)
    trainer.train_dataset = CachedStatesDataset(trainer.train_dataset, cache)
    before = flat_parameters(model.mmser.fusion)
    trainer.train()
    assert not torch.equal(flat_parameters(model.mmser.fusion), before)
    assert model.mmser.state_perturbation is None
    lines = training_lines(trainer)
    assert all(line["loss_adversarial"] > 0 for line in lines)
    for line in lines:
        parts = sum(value for name, value in line.items() if name.startswith("loss_"))
        assert line["loss"] == pytest.approx(parts, abs=2e-3)
    evaluated = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert evaluated and not any("adversarial" in name for line in evaluated for name in line)


def test_the_gradient_behind_the_head_is_reversed():
    torch.manual_seed(0)
    head = DomainHead(5, 3)
    features, domains = torch.randn(7, 5), torch.tensor([0, 1, 2, 2, -1, 0, 1])
    plain, reversed_features = (features.clone().requires_grad_() for _ in range(2))
    known = domains >= 0
    layers = [own.detach().double() for own in (head.hidden.weight, head.hidden.bias, head.output.weight)]
    hidden = (plain.double() @ layers[0].T + layers[1]).clamp(min=0)
    logits = hidden @ layers[2].T + head.output.bias.detach().double()
    expected = -(logits.log_softmax(dim=1)[known].gather(1, domains[known][:, None])).mean()
    loss = head(reversed_features, domains, 0.3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(reversed_features.grad, -0.3 * plain.grad, rtol=1e-4, atol=1e-7)
    bias = (logits.softmax(dim=1)[known] - nn.functional.one_hot(domains[known], 3)).mean(dim=0)
    torch.testing.assert_close(head.output.bias.grad.double(), bias.detach(), rtol=1e-4, atol=1e-7)  # not reversed
    assert head(features, torch.full((7,), -1), 1.0).item() == 0


def test_the_reversal_begins_at_zero_and_ends_near_one():
    assert reversal_strength(0) == 0
    assert reversal_strength(1) == pytest.approx(math.tanh(5))  # 2 / (1 + exp(-10)) - 1
    assert np.all(np.diff([reversal_strength(p) for p in np.linspace(0, 1, 11)]) > 0)


@pytest.mark.parametrize("column", ["corpus", "speaker"])
def test_a_head_learns_beside_the_model_and_is_in_no_model(column, splits, tmp_path):
    model = tiny_model()
    trainer = make_trainer(
        model, splits, tmp_path, adversarial_head=column, save_strategy="steps", save_steps=2, max_steps=4
    )
    head = trainer.accelerator.unwrap_model(trainer._domain_head)
    assert len(head.output.bias) == {"corpus": 2, "speaker": 4}[column]
    before = flat_parameters(head)
    trainer.train()
    assert not torch.equal(flat_parameters(head), before)
    lines = training_lines(trainer)
    assert all(line["loss_adversarial_head"] > 0 for line in lines)
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / DomainHead.file_name).is_file()
    loaded = MMSERForAudioClassification.from_pretrained(checkpoint)
    assert loaded.state_dict().keys() == model.state_dict().keys() == tiny_model().state_dict().keys()
    trainer.predict_outputs(trainer.train_dataset)  # whose examples have ids that the model does not know


def test_the_features_hide_what_the_head_looks_for():
    """Features that could tell the domain stop doing so; without the reversal they go on."""
    losses = {}
    for strength in (1.0, 0.0):
        torch.manual_seed(0)
        inputs, domains = torch.randn(64, 4), torch.arange(64) % 2
        inputs[:, 0] += 4 * domains
        layer, head = nn.Linear(4, 3), DomainHead(3, 2)
        optimizer = torch.optim.SGD([*layer.parameters(), *head.parameters()], lr=0.06)
        steps = []
        for _ in range(400):
            optimizer.zero_grad()
            loss = head(layer(inputs), domains, strength)
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        losses[strength] = np.mean(steps[200:])
    assert losses[1.0] > 0.5 and losses[0.0] < 0.2  # log 2 by chance


def test_a_run_with_a_head_resumes_as_if_it_had_not_stopped(splits, tmp_path):
    arguments = {"adversarial_head": "corpus", "adversarial": "vat"}
    start = tiny_model()
    whole = resumable(splits, tmp_path / "whole", start, **arguments)
    whole.train()
    resumed = resumable(splits, tmp_path / "resumed", start, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert training_losses(resumed) == pytest.approx(training_losses(whole), abs=1e-5)
    torch.testing.assert_close(flat_parameters(resumed.model), flat_parameters(whole.model), atol=1e-6, rtol=0)
    torch.testing.assert_close(flat_parameters(resumed._domain_head), flat_parameters(whole._domain_head))
    without = resumable(splits, tmp_path / "without", start)
    with pytest.raises(ValueError, match="was trained with an `adversarial_head`"):
        without.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))


VARIANTS = {
    "vat": {"adversarial": "vat"},
    "fgm": {"adversarial": "fgm", "adversarial_head": "corpus", "gradient_accumulation_steps": 2},
}


def prepare_processes(corpus, folder):
    tiny_model(dropout=False).save_pretrained(folder / "start")


def run_process(corpus, folder):
    for name in VARIANTS:
        model = MMSERForAudioClassification.from_pretrained(folder / "start")
        weights, losses = run_variant(name, model, load_splits(corpus), folder, per_device_train_batch_size=4)
        np.savez(folder / f"{name}{os.environ['RANK']}.npz", weights=weights, losses=losses)


def run_variant(name, model, splits, folder, **arguments):
    arguments = {**DETERMINISTIC, **VARIANTS[name], **arguments}
    randn_like, torch.randn_like = torch.randn_like, same_for_each_clip
    try:
        torch.manual_seed(0)
        # Four clips are left for the last batches of an epoch, so that one of two processes has none
        trainer = make_trainer(model, with_training_clips(splits, 12), folder, max_steps=2, **arguments)
        trainer.train()
    finally:
        torch.randn_like = randn_like
    return flat_parameters(trainer.accelerator.unwrap_model(trainer.model)).numpy(), training_losses(trainer)


def test_two_processes_train_as_one(two_processes, splits, tmp_path):
    for name in VARIANTS:
        model = MMSERForAudioClassification.from_pretrained(two_processes / "start")
        start = flat_parameters(model).numpy()
        weights, losses = run_variant(name, model, splits, tmp_path, per_device_train_batch_size=8)
        assert np.abs(weights - start).max() > 1e-3
        for rank in (0, 1):
            found = np.load(two_processes / f"{name}{rank}.npz")
            np.testing.assert_allclose(found["losses"], losses, atol=2e-4, err_msg=name)
            np.testing.assert_allclose(found["weights"], weights, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"adversarial": "pgd"}, "`adversarial` must be one of none, fgm, vat, got 'pgd'"),
        ({"adversarial_head": "sex"}, "`adversarial_head` must be one of none, corpus, speaker, got 'sex'"),
        ({"adversarial": "fgm", "adversarial_epsilon": 0.0}, "`adversarial_epsilon` must be greater than 0"),
        ({"adversarial_head": "corpus", "adversarial_head_weight": -1.0}, "must be greater than 0, got -1.0"),
    ],
)
def test_arguments_that_train_against_nothing_are_refused(arguments, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        MMSERTrainingArguments(output_dir=str(tmp_path), **arguments)


def test_what_the_head_cannot_learn_is_refused(splits, tmp_path):
    one = splits["train"].filter(lambda row: row["corpus"] == "tone")
    for train, said in ((one, "only 'tone' in the column 'corpus'"), (one.remove_columns("corpus"), "have none in")):
        with pytest.raises(ValueError, match=said):
            make_trainer(tiny_model(), {**splits, "train": train}, tmp_path, adversarial_head="corpus")
    with pytest.raises(ValueError, match="does not go with `torch_compile`"):
        make_trainer(tiny_model(), splits, tmp_path, adversarial="fgm", torch_compile=True)


def test_examples_say_where_they_are_from(splits):
    dataset = EmotionDataset(splits["train"])
    assert "corpus_ids" not in dataset[0]
    assert dataset.add_ids("corpus") == ["sine", "tone"] and len(NAMES) == 4
    ids = [dataset[index]["corpus_ids"] for index in range(len(dataset))]
    assert [["sine", "tone"][number] for number in ids] == list(splits["train"]["corpus"])
