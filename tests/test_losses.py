# SPDX-License-Identifier: Apache-2.0
"""Tests of `losses_mmser` and `openmax_mmser`, against derivations of their own in float64."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import rel_entr, softmax
from scipy.stats import beta as beta_distribution
from scipy.stats import weibull_min
from tiny import fit_openmax_by_chance, slow_openmax, tiny_batch, tiny_config, tiny_model

import modeling_mmser
import openmax_mmser
from losses_mmser import (
    adjusted_logits,
    check_finite_losses,
    class_balanced_focal_loss,
    class_balanced_weights,
    clustering_loss,
    distillation_loss,
    prototype_loss,
    supervised_contrastive_loss,
    uncertainty_loss,
)
from modeling_mmser import ClassAnchorClustering, MMSERForAudioClassification, PrototypeMemory
from openmax_mmser import OpenMax

PARTS = ("cross_entropy", "focal", "anchor", "uncertainty", "prototype", "supervised_contrastive", "distillation")
EXACT = {"rtol": 1e-6, "atol": 1e-6}


pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def clips(rng):
    """Logits, anchor logits, distances, uncertainty, features and labels of twelve clips, as float32 arrays."""
    values = {
        "logits": rng.normal(0, 3, (12, 4)),
        "anchor_logits": rng.normal(0, 5, (12, 4)),
        "distances": rng.uniform(0.1, 2, (12, 4)),
        "uncertainty": rng.uniform(0, 1, (12, 1)),
        "features": rng.normal(0, 1, (12, 6)),
    }
    return {k: v.astype(np.float32) for k, v in values.items()} | {"labels": np.arange(12) * 7 % 4}


def tensors(clips, *names):
    return [torch.from_numpy(clips[name]) for name in names]


def log_softmax(logits):
    logits = np.asarray(logits, dtype=np.float64)
    return np.stack([row - math.log(sum(math.exp(x - max(row)) for x in row)) - max(row) for row in logits])


def cross_entropy(logits, labels, smoothing=0.0):
    """-sum_k q_k log p_k with q = (1 - smoothing) onehot + smoothing / C, mean over the batch."""
    log_p, num_labels = log_softmax(logits), logits.shape[1]
    target = np.eye(num_labels)[labels] * (1 - smoothing) + smoothing / num_labels
    return -(target * log_p).sum(axis=1).mean()


# The single losses


def test_class_balanced_weights():
    counts, beta = [5000, 40, 7, 1], 0.999
    expected = [(1 - beta) / (1 - beta**n) for n in counts]
    expected = np.array(expected) * 4 / sum(expected)
    weights = class_balanced_weights(counts, beta)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert sum(weights) == pytest.approx(4, abs=1e-12)
    assert weights == sorted(weights)
    # The effective number of samples is also the sum 1 + beta + ... + beta^(n-1)
    effective = np.array([sum(beta**i for i in range(n)) for n in counts])
    np.testing.assert_allclose(weights, 4 / effective / sum(1 / effective), rtol=1e-9)


def test_class_balanced_weights_at_the_ends_of_beta():
    assert class_balanced_weights([10, 1000], 0.0) == [1.0, 1.0]
    weights = class_balanced_weights([10, 1000], 1 - 1e-9)
    assert weights[0] / weights[1] == pytest.approx(100, rel=1e-4)
    present = class_balanced_weights([7, 5], 0.9)
    absent = class_balanced_weights([7, 0, 5], 0.9)  # a class without clips takes no weight from the others
    assert absent == pytest.approx([1.5 * present[0], 0, 1.5 * present[1]])
    with pytest.raises(ValueError, match="no clip"):
        class_balanced_weights([0, 0], 0.9)
    for counts, beta in (([1, 2], 1.0), ([1, 2], -0.1), ([1, -2], 0.5)):
        with pytest.raises(ValueError, match="must"):
            class_balanced_weights(counts, beta)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weights", [None, [0.2, 0.7, 1.1, 2.0]])
def test_focal_loss(clips, gamma, weights):
    log_p = log_softmax(clips["logits"])
    expected = 0.0
    for row, label in zip(log_p, clips["labels"], strict=True):
        weight = 1.0 if weights is None else weights[label]
        expected -= weight * (1 - math.exp(row[label])) ** gamma * row[label] / len(log_p)
    class_weights = None if weights is None else torch.tensor(weights)
    loss = class_balanced_focal_loss(*tensors(clips, "logits", "labels"), class_weights, gamma)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_adjusted_logits_teach_as_if_all_classes_were_equally_frequent(clips):
    """Of clips whose classes overlap, the unadjusted loss is smallest at the posterior with the shares of the classes,
    and the adjusted one at the posterior without them: that is what the logits then hold."""
    counts = [900, 90, 9, 1]
    shares = np.array(counts) / 1000
    logits = torch.from_numpy(clips["logits"])
    for strength in (0.0, 0.5, 1.0):
        expected = clips["logits"].astype(np.float64) + strength * np.log(shares)
        np.testing.assert_allclose(adjusted_logits(logits, counts, strength).numpy(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(adjusted_logits(logits, None, 1.0), logits)
    assert adjusted_logits(logits.bfloat16(), [3, 0, 1, 1], 1.0).isfinite().all()
    labels = torch.arange(4).repeat_interleave(torch.tensor(counts))
    constant = torch.zeros(4, requires_grad=True)  # the best logits that do not look at the clip
    optimizer = torch.optim.LBFGS([constant], max_iter=200)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(adjusted_logits(constant.expand(1000, 4), counts, 1.0), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    np.testing.assert_allclose(constant.detach().softmax(0).numpy(), 0.25, atol=1e-3)


def test_focal_loss_of_sure_clips_has_a_finite_gradient():
    logits = torch.tensor([[60.0, -60.0], [-60.0, 60.0]], requires_grad=True)
    for gamma in (0.5, 2.0):
        loss = class_balanced_focal_loss(logits, torch.tensor([0, 0]), gamma=gamma)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and gradient.isfinite().all()


def test_clustering_loss(clips):
    own = clips["distances"].astype(np.float64)[np.arange(12), clips["labels"]]
    expected = cross_entropy(clips["anchor_logits"], clips["labels"]) + own.mean()
    loss = clustering_loss(*tensors(clips, "anchor_logits", "distances", "labels"))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("error_weight", [0.0, 1.0, 2.5])
def test_uncertainty_loss(clips, error_weight):
    terms = []
    for u, logits, label in zip(clips["uncertainty"][:, 0], clips["logits"], clips["labels"], strict=True):
        terms.append(float(u) if logits.argmax() == label else error_weight * (1 - float(u)))
    loss = uncertainty_loss(*tensors(clips, "uncertainty", "logits", "labels"), error_weight)
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-6)


def test_uncertainty_loss_pulls_to_the_truth():
    """The minimiser of the loss is the probability of being wrong; the published form only ever pulls u down."""
    logits, labels = torch.eye(2), torch.tensor([0, 0])  # the second clip is predicted wrong
    for error_weight, expected in ((1.0, [0.5, -0.5]), (0.0, [0.5, 0.0])):
        uncertainty = torch.full((2, 1), 0.5, requires_grad=True)
        (gradient,) = torch.autograd.grad(uncertainty_loss(uncertainty, logits, labels, error_weight), uncertainty)
        assert gradient[:, 0].tolist() == expected


def test_prototype_loss_and_memory(clips):
    torch.manual_seed(0)
    memory = PrototypeMemory(tiny_config(feature_size=6, prototypes_per_class=3))
    torch.nn.init.normal_(memory.prototypes)
    features = clips["features"].astype(np.float64)
    prototypes = memory.prototypes.detach().numpy().astype(np.float64)
    expected = np.zeros((12, 4))
    for i, feature in enumerate(features):
        for label in range(4):
            squared = [
                ((feature / np.linalg.norm(feature) - p / np.linalg.norm(p)) ** 2).sum() for p in prototypes[label]
            ]
            expected[i, label] = math.log(sum(math.exp(-d) for d in squared) / len(squared))
    logits = memory(torch.from_numpy(clips["features"]))
    np.testing.assert_allclose(logits.detach().numpy(), expected, **EXACT)
    loss = prototype_loss(logits, torch.from_numpy(clips["labels"]))
    assert loss.item() == pytest.approx(cross_entropy(expected, clips["labels"]), rel=1e-6)


def naive_supervised_contrastive(features, labels, temperature):
    features = features.astype(np.float64)
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    per_clip = []
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        if positives:
            total = sum(math.exp(features[i] @ features[j] / temperature) for j in others)
            terms = [math.log(math.exp(features[i] @ features[j] / temperature) / total) for j in positives]
            per_clip.append(-sum(terms) / len(positives))
    return np.mean(per_clip)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3] * 3, [0] * 6 + [1] * 5 + [2], [0] * 12])
def test_supervised_contrastive_loss(clips, labels):
    for temperature in (0.1, 1.0):
        loss = supervised_contrastive_loss(torch.from_numpy(clips["features"]), torch.tensor(labels), temperature)
        expected = naive_supervised_contrastive(clips["features"], labels, temperature)
        assert loss.item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("labels", [[0], [0, 1, 2, 3]])
def test_supervised_contrastive_loss_without_a_pair_is_zero(clips, labels):
    features = torch.from_numpy(clips["features"][: len(labels)]).requires_grad_()
    loss = supervised_contrastive_loss(features, torch.tensor(labels))
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.item() == 0 and (gradient == 0).all()


def test_distillation_loss(clips, rng):
    teacher = rng.normal(0, 3, (12, 4)).astype(np.float32)
    for temperature in (1.0, 3.0):
        p, q = (softmax(logits.astype(np.float64) / temperature, axis=1) for logits in (teacher, clips["logits"]))
        expected = temperature**2 * rel_entr(p, q).sum(axis=1).mean()
        loss = distillation_loss(torch.from_numpy(clips["logits"]), torch.from_numpy(teacher), temperature)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
    same = torch.from_numpy(teacher)
    assert distillation_loss(same, same).item() == pytest.approx(0, abs=1e-6)


def test_losses_compute_in_float32(clips):
    """Half-precision inputs give what their float32 copies give."""
    logits, labels = tensors(clips, "logits", "labels")
    distances, features = (torch.from_numpy(clips[name]).bfloat16() for name in ("distances", "features"))
    for half, full in (
        (logits.bfloat16(), class_balanced_focal_loss),
        (logits.bfloat16(), prototype_loss),
        (logits.bfloat16(), lambda x, y: clustering_loss(x, distances.to(x), y)),
        (logits.bfloat16(), lambda x, y: distillation_loss(x, x.roll(1, 0))),
        (features, supervised_contrastive_loss),
    ):
        assert full(half, labels).dtype == torch.float32
        assert full(half, labels).item() == full(half.float(), labels).item()


def test_check_finite_losses_names_the_parts():
    check_finite_losses({"cross_entropy": torch.tensor(1.0), "focal": torch.tensor(0.0)})
    bad = {"cross_entropy": torch.tensor(1.0), "focal": torch.tensor(math.nan), "anchor": torch.tensor(math.inf)}
    with pytest.raises(FloatingPointError, match=r"focal=nan, anchor=inf") as error:
        check_finite_losses(bad)
    assert "cross_entropy" not in str(error.value)


# The losses inside the model


@pytest.fixture(scope="module")
def model():
    return tiny_model(
        class_counts=[1000, 50, 20, 300],
        supervised_contrastive_loss_weight=0.7,
        distillation_loss_weight=0.4,
        uncertainty_error_weight=1.5,
        focal_gamma=1.5,
        distillation_temperature=3.0,
    )


@pytest.fixture(scope="module")
def batch(model):
    batch = tiny_batch(model, [3000, 2500, 3000, 1800, 2000, 2600], [5, 3, 6, 0, 4, 2])
    labels = model(**batch).logits.argmax(dim=-1)
    labels[:3] = (labels[:3] + 1) % 4  # three wrong predictions and three right ones
    return batch | {"labels": labels, "teacher_logits": torch.linspace(-2, 2, 24).view(6, 4).cos() * 3}


@torch.no_grad()
def test_every_part_of_the_loss(model, batch):
    """Each named part equals its weight times a derivation from the model's other outputs."""
    outputs, config = model(**batch), model.config
    anchor_logits, _ = model.anchors(outputs.features)
    prototype_logits = model.prototypes(outputs.features)
    labels = batch["labels"].numpy()
    log_p = log_softmax(outputs.logits)
    p_own = np.exp(log_p)[np.arange(6), labels]
    balance = np.array([(1 - 0.9999) / (1 - 0.9999**n) for n in config.class_counts])
    balance *= 4 / balance.sum()
    teacher, student = (softmax(x.double().numpy() / 3, axis=1) for x in (batch["teacher_logits"], outputs.logits))
    u, wrong = outputs.uncertainty[:, 0].double().numpy(), outputs.logits.argmax(-1).numpy() != labels
    anchor = cross_entropy(anchor_logits, labels) + outputs.anchor_distances.numpy()[np.arange(6), labels].mean()
    expected = {
        "cross_entropy": cross_entropy(outputs.logits, labels, smoothing=0.1),
        "focal": 0.3 * np.mean(-balance[labels] * (1 - p_own) ** 1.5 * np.log(p_own)),
        "anchor": 0.1 * anchor,
        "uncertainty": 0.05 * np.mean(np.where(wrong, 1.5 * (1 - u), u)),
        "prototype": 0.01 * cross_entropy(prototype_logits, labels),
        "supervised_contrastive": 0.7 * naive_supervised_contrastive(outputs.features.numpy(), labels, 0.1),
        "distillation": 0.4 * 9 * rel_entr(teacher, student).sum(axis=1).mean(),
    }
    assert tuple(outputs.losses) == PARTS
    assert wrong.any() and not wrong.all()  # both halves of the uncertainty loss
    for name in PARTS:
        assert outputs.losses[name].item() == pytest.approx(expected[name], rel=3e-6), name
    assert outputs.loss.item() == pytest.approx(sum(expected.values()), rel=3e-6)
    assert outputs.loss.item() == pytest.approx(sum(part.item() for part in outputs.losses.values()), rel=1e-6)
    assert outputs.anchor_loss.item() == pytest.approx(anchor, rel=3e-6)


def test_mixup_against_its_formula(batch, monkeypatch):
    """Each loss of the mixed clips is the loss against either label, in the shares of the mixture."""
    model = tiny_model(mixup_alpha=0.4, supervised_contrastive_loss_weight=0.1).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = {name: value for name, value in batch.items() if name != "teacher_logits"}
    labels, order, share = batch["labels"], torch.tensor([2, 0, 3, 5, 4, 1]), 0.7
    monkeypatch.setattr(model, "_draw_mixture", lambda size: (share, order))
    model.mmser.eval()
    outputs = model(**batch)
    with torch.no_grad():
        fused = outputs.fused.double()
        mixed = (share * fused + (1 - share) * fused[order]).float()
        logits, features = model.classifier(mixed)
        anchor_logits, distances = model.anchors(features)
    torch.testing.assert_close(outputs.logits, logits)
    config = model.config
    expected = {
        "cross_entropy": lambda y: cross_entropy(logits.numpy(), y.numpy(), config.label_smoothing),
        "anchor": lambda y: 0.1 * clustering_loss(anchor_logits, distances, y).item(),
        "prototype": lambda y: 0.01 * prototype_loss(model.prototypes(features), y).item(),
        "supervised_contrastive": lambda y: 0.1 * supervised_contrastive_loss(features, y).item(),
    }
    for name, loss in expected.items():
        value = share * loss(labels) + (1 - share) * loss(labels[order])
        assert outputs.losses[name].item() == pytest.approx(value, rel=1e-5), name
    assert outputs.loss.item() == pytest.approx(sum(part.item() for part in outputs.losses.values()), rel=1e-5)


def test_mixup_is_for_training_alone_and_draws_from_beta(batch):
    model = tiny_model(mixup_alpha=0.4)
    plain = MMSERForAudioClassification(tiny_config()).eval()
    plain.load_state_dict(model.state_dict())
    batch = {name: value for name, value in batch.items() if name != "teacher_logits"}
    for name, part in plain(**batch).losses.items():
        torch.testing.assert_close(model(**batch).losses[name], part)
    assert plain.train()._draw_mixture(4) is None and model._draw_mixture(4) is None
    model.train()
    shares, orders = zip(*(model._draw_mixture(4) for _ in range(3000)), strict=True)
    reference = beta_distribution(0.4, 0.4).expect(lambda x: max(x, 1 - x))
    assert np.mean(shares) == pytest.approx(reference, abs=0.01) and min(shares) >= 0.5
    assert all(sorted(order.tolist()) == [0, 1, 2, 3] for order in orders)


def test_parts_are_detached_and_loss_is_not(model, batch):
    outputs = model(**batch)
    assert outputs.loss.requires_grad and outputs.loss.ndim == 0
    assert not any(part.requires_grad for part in outputs.losses.values())


def test_without_labels_there_is_no_loss(model, batch):
    outputs = model(**{name: value for name, value in batch.items() if name not in ("labels", "teacher_logits")})
    assert outputs.loss is None and outputs.losses is None and outputs.anchor_loss is None


def with_weights(model, monkeypatch, **weights):
    for name, weight in weights.items():
        monkeypatch.setattr(model.config, f"{name}_loss_weight", weight)


def refuse(*args, **kwargs):
    raise RuntimeError("computed")


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("focal", "class_balanced_focal_loss"),
        ("uncertainty", "uncertainty_loss"),
        ("prototype", "prototype_loss"),
        ("supervised_contrastive", "supervised_contrastive_loss"),
        ("distillation", "distillation_loss"),
    ],
)
def test_a_weight_of_zero_skips_the_computation(model, batch, monkeypatch, name, function):
    before = model(**batch)
    monkeypatch.setattr(modeling_mmser, function, refuse)
    with pytest.raises(RuntimeError, match="computed"):
        model(**batch)
    with_weights(model, monkeypatch, **{name: 0.0})
    outputs = model(**batch)
    assert set(outputs.losses) == set(PARTS) - {name}
    assert outputs.loss.item() == pytest.approx(before.loss.item() - before.losses[name].item(), rel=1e-5)


def test_the_parts_that_every_output_needs_can_be_left_out_of_the_loss(model, batch, monkeypatch):
    """The logits and distances are outputs of their own; with weight 0 nothing of the loss is computed from them."""
    with_weights(model, monkeypatch, cross_entropy=0.0, anchor=0.0, distillation=0.0)
    outputs = model(**{name: value for name, value in batch.items() if name != "teacher_logits"})
    assert set(outputs.losses) == {"focal", "uncertainty", "prototype", "supervised_contrastive"}
    (gradient,) = torch.autograd.grad(outputs.loss, [model.anchors.anchors], allow_unused=True)
    assert gradient is None and outputs.anchor_loss.item() == 0


def test_distillation_needs_a_teacher(model, batch):
    with pytest.raises(ValueError, match="pass `teacher_logits`"):
        model(**{name: value for name, value in batch.items() if name != "teacher_logits"})


@torch.no_grad()
def test_class_weights_come_from_the_training_set_and_not_from_the_batch(model, batch, monkeypatch):
    """The focal part of one clip is the same whatever other labels its batch has, and follows `class_counts`."""
    with_weights(model, monkeypatch, distillation=0.0, supervised_contrastive=0.0)
    row = {name: value[3:4] for name, value in batch.items()}
    alike = {name: value.repeat(4, *[1] * (value.ndim - 1)) for name, value in row.items()}
    focal = model(**row).losses["focal"].item()
    assert model(**alike).losses["focal"].item() == pytest.approx(focal, rel=1e-5)
    label, old = row["labels"].item(), model.config.class_counts
    new = [1 if i == label else count for i, count in enumerate(old)]
    ratio = class_balanced_weights(new, 0.9999)[label] / class_balanced_weights(old, 0.9999)[label]
    assert ratio > 1.2
    monkeypatch.setattr(model.config, "class_counts", new)
    assert model(**row).losses["focal"].item() == pytest.approx(focal * ratio, rel=1e-5)


@torch.no_grad()
def test_values_that_are_not_finite_stay_so(model, batch):
    """A NaN is never turned into 0, neither in the outputs nor in the loss, and the check names the parts."""
    broken = copy.deepcopy(model)
    fit_openmax_by_chance(broken)
    broken.classifier.output.bias[1] = math.nan
    outputs = broken(**batch)
    assert outputs.logits[:, 1].isnan().all()
    assert outputs.open_set_probabilities.isnan().all() and outputs.rejection_score.isnan().all()
    assert outputs.loss.isnan()
    with pytest.raises(FloatingPointError, match=r"cross_entropy=nan.*focal=nan"):
        check_finite_losses(outputs.losses)
    broken = copy.deepcopy(model)
    broken.prototypes.prototypes[0, 0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="not finite: prototype=nan"):
        check_finite_losses(broken(**batch).losses)


# Class anchors


def test_anchors_are_measured_on_the_unit_sphere(clips):
    torch.manual_seed(0)
    config = tiny_config(feature_size=6, anchor_size=5, anchor_temperature=0.25)
    anchors = MMSERForAudioClassification(config).anchors
    assert anchors.log_temperature.exp().item() == pytest.approx(0.25, rel=1e-6)
    with torch.no_grad():
        anchors.anchors.mul_(torch.tensor([[1.0], [3.0], [0.2], [7.0]]))  # their length must not matter
        logits, distances = anchors(torch.from_numpy(clips["features"]))
        projected = anchors.projection(torch.from_numpy(clips["features"])).double().numpy()
    centres = anchors.anchors.detach().double().numpy()
    for i, z in enumerate(projected):
        for c, centre in enumerate(centres):
            z_unit, c_unit = z / np.linalg.norm(z), centre / np.linalg.norm(centre)
            assert distances[i, c].item() == pytest.approx(np.linalg.norm(z_unit - c_unit), rel=1e-5)
            assert logits[i, c].item() == pytest.approx(z_unit @ c_unit / 0.25, abs=2e-6)


def test_a_clip_on_its_anchor_has_a_finite_gradient():
    anchors = ClassAnchorClustering(tiny_config(feature_size=8, anchor_size=8))
    with torch.no_grad():
        anchors.projection.weight.copy_(torch.eye(8))
        anchors.projection.bias.zero_()
        anchors.anchors.copy_(torch.eye(4, 8))
    features = torch.eye(4, 8, requires_grad=True)
    loss = clustering_loss(*anchors(features), torch.arange(4))
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.isfinite() and gradient.isfinite().all()


# OpenMax


LEVELS = ("probability", "activation")


def hand_made_distances(rng, per_class=60):
    """Three classes whose clips lie at their own anchor with different spreads; a fifth of the clips is wrong."""
    labels = np.arange(3 * per_class) % 3
    distances = rng.uniform(0.5, 1.8, (len(labels), 3))
    own = np.select([labels == 0, labels == 1], [rng.gamma(3, 0.1, len(labels)), rng.weibull(2, len(labels))], 0)
    own[labels == 2] = rng.uniform(0.2, 0.9, per_class)
    distances[np.arange(len(labels)), labels] = own
    predictions = np.where(np.arange(len(labels)) % 5 == 0, (labels + 1) % 3, labels)
    return distances, labels, predictions


@pytest.mark.parametrize("tail_size", [8, 20, 1000])
def test_fit_is_a_weibull_on_the_largest_distances_of_correct_clips(rng, tail_size):
    distances, labels, predictions = hand_made_distances(rng)
    openmax = OpenMax(3, alpha=2)
    openmax.fit(distances, labels, predictions, tail_size)
    for label in range(3):
        correct = [d[label] for d, y, p in zip(distances, labels, predictions, strict=True) if y == p == label]
        tail = np.array(sorted(correct, reverse=True)[:tail_size])
        moved = tail - tail.min() + 1
        shape, location, scale = weibull_min.fit(moved, floc=0)
        assert location == 0
        assert openmax.weibull_shift[label].item() == pytest.approx(tail.min(), rel=1e-6)
        assert openmax.weibull_shape[label].item() == pytest.approx(shape, rel=1e-4)
        assert openmax.weibull_scale[label].item() == pytest.approx(scale, rel=1e-4)
        # The same from the likelihood equations: sum(x^k ln x) / sum(x^k) - 1 / k = mean(ln x), scale^k = mean(x^k)
        k = brentq(lambda k, x=moved: (x**k @ np.log(x)) / (x**k).sum() - 1 / k - np.log(x).mean(), 1e-2, 500)
        assert openmax.weibull_shape[label].item() == pytest.approx(k, rel=1e-3)
        assert openmax.weibull_scale[label].item() == pytest.approx((moved**k).mean() ** (1 / k), rel=1e-3)
    assert openmax.is_fitted and (openmax.fitted == 1).all()


def test_fit_takes_tensors(rng):
    arrays = hand_made_distances(rng)
    from_arrays, from_tensors = OpenMax(3, alpha=2), OpenMax(3, alpha=2)
    from_arrays.fit(*arrays)
    from_tensors.fit(*(torch.from_numpy(array) for array in arrays))
    for name, buffer in from_arrays.named_buffers():
        assert torch.equal(buffer, from_tensors.get_buffer(name))


def test_wrong_predictions_do_not_change_the_fit(rng):
    distances, labels, predictions = hand_made_distances(rng)
    one, two = OpenMax(3, alpha=2), OpenMax(3, alpha=2)
    one.fit(distances, labels, predictions)
    distances[labels != predictions] *= 10
    two.fit(distances, labels, predictions)
    assert torch.equal(one.weibull_shape, two.weibull_shape) and torch.equal(one.weibull_scale, two.weibull_scale)


@pytest.mark.parametrize("case", ["few", "alike"])
def test_a_class_without_a_fit_of_its_own_falls_back_and_is_named(rng, monkeypatch, case):
    distances, labels, predictions = hand_made_distances(rng)
    if case == "few":
        predictions[np.flatnonzero(labels == 1)[4:]] = 0
    else:
        distances[labels == 1, 1] = 0.5
    warnings = []
    monkeypatch.setattr(openmax_mmser.logger, "warning", warnings.append)
    openmax = OpenMax(3, alpha=2)
    openmax.fit(distances, labels, predictions)
    assert len(warnings) == 1 and "of class 1 " in warnings[0]
    OpenMax(3, alpha=2).fit(distances, labels, predictions, label_names=["neutral", "happy", "sad"])
    assert len(warnings) == 2 and "of happy " in warnings[1]
    own = distances[np.arange(len(labels)), labels][labels == predictions]
    tail = np.sort(own)[-20:]
    shape, _, scale = weibull_min.fit(tail - tail[0] + 1, floc=0)
    fitted = [openmax.weibull_shape[1].item(), openmax.weibull_scale[1].item(), openmax.weibull_shift[1].item()]
    assert fitted == pytest.approx([shape, scale, tail[0]], rel=1e-4)
    assert all(buffer.isfinite().all() for buffer in openmax.buffers())


def test_fit_refuses_what_it_cannot_use(rng):
    distances, labels, predictions = hand_made_distances(rng)
    openmax = OpenMax(3, alpha=2)
    for bad in (math.nan, math.inf):
        broken = distances.copy()
        broken[7, 1] = bad
        with pytest.raises(ValueError, match="not finite"):
            openmax.fit(broken, labels, predictions)
    with pytest.raises(ValueError, match=r"must be \[N, 3\]"):
        openmax.fit(distances[:, :2], labels, predictions)
    with pytest.raises(ValueError, match=r"must be \[N, 3\]"):
        openmax.fit(distances, labels, predictions[:-1])
    with pytest.raises(ValueError, match=r"at least 5 correctly classified clips.*got 0 correct of 180"):
        openmax.fit(distances, labels, (labels + 1) % 3)
    with pytest.raises(ValueError, match="`tail_size` must be at least 5, got 4"):
        openmax.fit(distances, labels, predictions, tail_size=4)
    assert not openmax.is_fitted and (openmax.fitted == 0).all()
    assert all((openmax.get_buffer(f"weibull_{name}") == 1).all() for name in ("shape", "scale", "shift"))


def fitted_openmax(
    alpha=2,
    level="activation",
    shape=(2.0, 5.0, 20.0, 0.7),
    scale=(1.2, 1.5, 1.1, 2.0),
    shift=(0.2, 0.5, 0.9, 0.0),
):
    openmax = OpenMax(len(shape), alpha, level)
    for name, values in (("shape", shape), ("scale", scale), ("shift", shift)):
        openmax.get_buffer(f"weibull_{name}").copy_(torch.tensor(values))
    openmax.fitted.fill_({"activation": 1.0, "probability": 3.0}[level])
    return openmax


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("alpha", [1, 2, 3, 4])
def test_forward_equals_the_algorithm(rng, alpha, level):
    logits = torch.from_numpy(rng.normal(0, 2, (50, 4))).float()
    distances = torch.from_numpy(rng.uniform(0, 2, (50, 4))).float()
    openmax = fitted_openmax(alpha, level)
    probabilities, scores = openmax(logits, distances), openmax.rejection_scores(logits, distances)
    assert probabilities.shape == (50, 5) and probabilities.dtype == torch.float32
    assert scores.shape == (50,) and scores.dtype == torch.float32
    expected, expected_scores = slow_openmax(openmax, logits, distances)
    np.testing.assert_allclose(probabilities.numpy(), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(scores.numpy(), expected_scores, rtol=1e-5, atol=1e-5)


def test_at_the_level_of_probabilities_unknown_takes_what_lies_nearer():
    """By hand: w is 0, 1/2, 3/4 and 1 of probabilities 1/2, 1/4, 1/8 and 1/8; `alpha` plays no part."""
    logits = torch.tensor([[4.0, 2.0, 1.0, 1.0]]).log() + 7
    for alpha in (1, 3):
        openmax = fitted_openmax(alpha, "probability", (1.0,) * 4, (1.0,) * 4, (1.0,) * 4)  # w = 1 - exp(-distance)
        distances = torch.tensor([[-5.0, math.log(2), math.log(4), 50.0]])
        expected = torch.tensor([[1 / 2, 1 / 8, 1 / 32, 0, 1 / 8 + 3 / 32 + 1 / 8]])
        torch.testing.assert_close(openmax(logits, distances), expected, rtol=0, atol=1e-6)
        assert openmax.rejection_scores(logits, distances).item() == pytest.approx(math.log(2))


def test_a_confident_classifier_outvotes_distance_only_as_published():
    """Sure of a class of whose members 3 in 10 lie nearer: "unknown" has that share, or next to nothing."""
    logits, distances = torch.tensor([[12.0, 0.0, 0.0, 0.0]]), torch.full((1, 4), -math.log(0.7))
    unknown = {}
    for level in LEVELS:
        openmax = fitted_openmax(3, level, (1.0,) * 4, (1.0,) * 4, (1.0,) * 4)
        unknown[level] = openmax(logits, distances)[0, -1].item()
    assert unknown["probability"] == pytest.approx(0.3, abs=1e-6)
    assert unknown["activation"] == pytest.approx(math.exp(3.6) / (math.exp(3.6) + math.exp(8.4) + 3), abs=1e-6)
    assert unknown["activation"] < 0.01


@pytest.mark.parametrize("level", LEVELS)
def test_forward_on_ties_and_below_the_support(level):
    openmax = fitted_openmax(2, level)
    logits = torch.tensor([[1.0, 1.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0], [3.0, 1.0, 0.0, -1.0]])
    distances = torch.tensor([[0.3, 1.9, 0.1, 0.1], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    expected, _ = slow_openmax(openmax, logits, distances)
    np.testing.assert_allclose(openmax(logits, distances).numpy(), expected, rtol=0, atol=1e-6)
    below = fitted_openmax(shift=(1.5, 1.5, 1.5, 1.5))  # the support starts at shift - 1
    assert (below.cdf(torch.full((1, 4), 0.4)) == 0).all() and (below.cdf(torch.full((1, 4), 0.6)) > 0).all()


LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=4, max_size=4)
DISTANCES = st.lists(st.floats(0, 2, width=32), min_size=4, max_size=4)
ALPHA, LEVEL = st.integers(1, 4), st.sampled_from(LEVELS)
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@PROPERTY
@given(ALPHA, LEVEL, st.lists(st.tuples(LOGITS, DISTANCES), min_size=1, max_size=6))
def test_probabilities_sum_to_one_and_rows_are_independent(alpha, level, rows):
    openmax = fitted_openmax(alpha, level)
    logits, distances = (torch.tensor(values) for values in zip(*rows, strict=True))
    probabilities = openmax(logits, distances)
    assert (probabilities >= 0).all()
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(len(rows)), rtol=0, atol=1e-6)
    for i in range(len(rows)):
        torch.testing.assert_close(openmax(logits[i : i + 1], distances[i : i + 1])[0], probabilities[i], **EXACT)


@PROPERTY
@given(ALPHA, LEVEL, LOGITS, DISTANCES, st.lists(st.floats(0, 2, width=32), min_size=4, max_size=4))
def test_more_distance_never_means_less_unknown(alpha, level, logits, distances, growth):
    """Neither for all distances together nor for any one of them."""
    openmax, logits, distances = fitted_openmax(alpha, level), torch.tensor([logits]), torch.tensor([distances])
    before = openmax(logits, distances)[0, -1]
    steps = torch.diag(torch.tensor(growth))
    for step in (*steps, steps.sum(dim=0)):
        assert openmax(logits, distances + step)[0, -1] >= before - 1e-6


@PROPERTY
@given(ALPHA, LEVEL, LOGITS, DISTANCES, st.floats(-50, 50))
def test_a_constant_added_to_the_logits_changes_nothing(alpha, level, logits, distances, constant):
    openmax, logits, distances = fitted_openmax(alpha, level), torch.tensor([logits]), torch.tensor([distances])
    torch.testing.assert_close(openmax(logits + constant, distances), openmax(logits, distances), rtol=0, atol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("distance", ["centroid", "anchor"])
def test_unfitted_openmax(batch, distance, level):
    """Each distance with each level; "anchor" and "activation" are the published form."""
    model = tiny_model(openmax_distance=distance, openmax_level=level)
    openmax_outputs = ("unknown_probability", "open_set_probabilities", "rejection_score", "is_unknown")
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "teacher_logits")}
    outputs = model(**inputs)
    assert all(getattr(outputs, name) is None for name in openmax_outputs)
    with pytest.raises(ValueError, match="OpenMax is not fitted"):
        model(**inputs, use_openmax=True)
    fit_openmax_by_chance(model)
    outputs = model(**inputs)
    assert outputs.open_set_probabilities.shape == (6, 5)
    assert torch.equal(outputs.unknown_probability, outputs.open_set_probabilities[:, 4:])
    distances = outputs.anchor_distances
    if distance == "centroid":  # to the nearest of each class, between unit vectors
        fused = F.normalize(outputs.fused.double(), dim=-1)[:, None, None]
        distances = (fused - model.openmax.centroids.double()).norm(dim=-1).amin(dim=-1)
    expected, scores = slow_openmax(model.openmax, outputs.logits, distances)
    np.testing.assert_allclose(outputs.open_set_probabilities.detach().numpy(), expected, rtol=0, atol=2e-6)
    assert outputs.rejection_score.shape == (6, 1)
    np.testing.assert_allclose(outputs.rejection_score[:, 0].detach().numpy(), scores, rtol=2e-5, atol=2e-6)
    without = model(**inputs, use_openmax=False)
    assert all(getattr(without, name) is None for name in openmax_outputs)
    model.config.use_openmax = False
    assert model(**inputs).unknown_probability is None
    assert model(**inputs, use_openmax=True).unknown_probability is not None


def test_fitted_state_is_part_of_the_weights(rng):
    openmax = OpenMax(3, alpha=2)
    openmax.fit(*hand_made_distances(rng))
    logits, distances = torch.randn(5, 3), torch.rand(5, 3)
    expected = openmax(logits, distances)
    assert torch.equal(copy.deepcopy(openmax)(logits, distances), expected)
    for assign in (False, True):
        other = OpenMax(3, alpha=2)
        assert not other.is_fitted  # asked before loading: the answer must not stick
        other.load_state_dict(openmax.state_dict(), assign=assign)
        assert other.is_fitted and torch.equal(other(logits, distances), expected)
    other.load_state_dict(OpenMax(3, alpha=2).state_dict())
    assert not other.is_fitted


def test_label_smoothing_reference():
    """The reference of this file agrees with the library where both exist."""
    logits, labels = torch.randn(7, 4, dtype=torch.float64), torch.arange(7) % 4
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1).item()
    assert cross_entropy(logits.numpy(), labels.numpy(), 0.1) == pytest.approx(expected, rel=1e-12)
