# SPDX-License-Identifier: Apache-2.0
"""Tests of `contrastive` and of the loss that it is for, against two loops in float64: over the clips of a batch, and
over all that each of them is compared with."""

import math
import os

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer import (
    DETERMINISTIC,
    flat_parameters,
    load_splits,
    make_trainer,
    training_lines,
    with_training_clips,
)
from tiny import tiny_batch
from tiny import tiny_model as wide_model
from tiny_corpus import tiny_model, write_corpus

from configuration_mmser import MMSERConfig
from losses_mmser import ContrastiveRows, supervised_contrastive_loss
from mmser.contrastive import ContrastivePool
from mmser.examples import EmotionIterableDataset
from modeling_mmser import MMSERForAudioClassification

pytestmark = pytest.mark.usefixtures("seeded")
CONTRASTIVE = {"supervised_contrastive_loss_weight": 1.0, "contrastive_other_corpus_weight": 0.2}
ENDS = (None, None, None)  # arguments of a callback that are not looked at


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return load_splits(write_corpus(tmp_path_factory.mktemp("corpus")))


def slow_loss(features, labels, corpora, weight, size, temperature=0.1):
    """Khosla et al. 2020, eq. 2, over the first `size` clips; each is compared with all others."""
    features = np.asarray(features, dtype=np.float64)
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    losses = []
    for i in range(size):
        positives, total = [], 0.0
        for j in range(len(features)):
            if j == i:
                continue
            term = math.exp(features[i] @ features[j] / temperature)
            if labels[j] == labels[i]:
                positives.append(term)
            elif corpora is not None and min(corpora[i], corpora[j]) >= 0 and corpora[i] != corpora[j]:
                term *= weight
            total += term
        if positives:
            losses.append(-sum(math.log(term / total) for term in positives) / len(positives))
    return np.mean(losses) if losses else 0.0


def clips(seed, size, earlier=0, corpora=3):
    rng = np.random.default_rng(seed)
    total = size + earlier
    return (
        rng.normal(size=(total, 6)).astype(np.float32),
        rng.integers(3, size=total),
        rng.integers(-1, corpora, total),
    )


def loss_of(features, labels, corpora, weight, size):
    first, rest = (
        ContrastiveRows(*(torch.as_tensor(own[part]) for own in (features, labels, corpora)))
        for part in (slice(size), slice(size, None))
    )
    others = rest if len(rest.labels) else None
    return supervised_contrastive_loss(*first[:2], corpora=first[2], other_corpus_weight=weight, others=others)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 9), st.integers(0, 7), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_the_loss_is_that_of_two_loops(seed, size, earlier, weight):
    features, labels, corpora = clips(seed, size, earlier)
    found = loss_of(features, labels, corpora, weight, size).item()
    assert found == pytest.approx(slow_loss(features, labels, corpora, weight, size), rel=1e-5, abs=1e-6)


def test_with_a_weight_of_zero_clips_of_other_corpora_and_classes_do_not_count():
    features, labels, corpora = clips(0, 8)
    corpora = np.abs(corpora)
    moved = torch.from_numpy(features).requires_grad_()
    supervised_contrastive_loss(  # of the first clip alone, compared with all others
        moved[:1],
        torch.from_numpy(labels[:1]),
        corpora=torch.from_numpy(corpora[:1]),
        other_corpus_weight=0.0,
        others=ContrastiveRows(moved[1:], *(torch.from_numpy(own[1:]) for own in (labels, corpora))),
    ).backward()
    counts = (moved.grad[1:] != 0).any(dim=1).numpy()
    assert (labels[1:] == labels[0]).any() and (corpora[1:] != corpora[0]).any()
    np.testing.assert_array_equal(counts, (labels[1:] == labels[0]) | (corpora[1:] == corpora[0]))


def test_the_corpus_alone_does_not_lower_the_loss():
    """Where each corpus has classes of its own, features that tell only the corpus look good to the published loss."""
    corpora = torch.arange(40) % 2
    labels = 2 * corpora + torch.arange(40) // 20
    by_corpus, all_alike = torch.eye(2)[corpora], torch.ones(40, 2)
    gain = {}
    for weight in (1.0, 0.0):
        losses = [
            supervised_contrastive_loss(own, labels, corpora=corpora, other_corpus_weight=weight).item()
            for own in (by_corpus, all_alike)
        ]
        gain[weight] = losses[1] - losses[0]
    assert gain[1.0] > 0.5 and gain[0.0] == pytest.approx(0, abs=1e-5)


def test_without_corpora_or_with_a_weight_of_one_it_is_the_published_loss():
    features, labels, corpora = (torch.as_tensor(own) for own in clips(1, 9))
    published = supervised_contrastive_loss(features, labels)
    assert supervised_contrastive_loss(features, labels, corpora=corpora).item() == published.item()
    unknown = supervised_contrastive_loss(features, labels, corpora=corpora * 0 - 1, other_corpus_weight=0.0)
    assert unknown.item() == published.item()
    assert supervised_contrastive_loss(features, labels, other_corpus_weight=0.0).item() == published.item()


def test_the_weight_is_a_share():
    for wrong in (-0.1, 1.5):
        with pytest.raises(StrictDataclassError, match="contrastive_other_corpus_weight"):
            MMSERConfig(contrastive_other_corpus_weight=wrong)
    assert MMSERConfig().contrastive_other_corpus_weight == 1


def test_the_model_takes_the_corpora_and_needs_them_in_training_alone():
    model = wide_model(**CONTRASTIVE)
    batch = tiny_batch(model, [4000, 3000, 2000, 4000], [3, 4, 2, 3])
    labels, corpora = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    output = model(**batch, labels=labels, corpus_ids=corpora)
    expected = slow_loss(output.features.detach().numpy(), labels.tolist(), corpora.tolist(), 0.2, 4)
    assert output.losses["supervised_contrastive"].item() == pytest.approx(expected, rel=1e-5)
    plain = model(**batch, labels=labels)
    assert plain.losses["supervised_contrastive"].item() != pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match="pass `corpus_ids`"):
        model.train()(**batch, labels=labels)
    off = wide_model()
    assert torch.equal(off(**batch, corpus_ids=corpora).logits, off(**batch).logits)


# --- more than a batch -----------------------------------------------------------------------------------------------


def rows_of(value, size=2):
    return ContrastiveRows(torch.full((size, 3), float(value), requires_grad=True), torch.arange(size), None)


def test_a_pool_compares_with_the_batches_of_the_same_step():
    pool = ContrastivePool()
    assert pool(rows_of(1))[1] is None
    assert pool(rows_of(-9))[1] is None  # what an adversary made of the same batch
    pool.on_substep_end(*ENDS)
    rows, earlier = pool(rows_of(2))
    assert rows.features.requires_grad and not earlier.features.requires_grad
    torch.testing.assert_close(earlier.features, torch.full((2, 3), 3**-0.5))
    pool.on_substep_end(*ENDS)
    assert len(pool(rows_of(3))[1].labels) == 4
    pool.on_step_end(*ENDS)
    assert pool(rows_of(4))[1] is None


def test_a_pool_keeps_the_newest_clips_of_earlier_steps():
    pool = ContrastivePool(num_earlier=3)
    for label in range(3):
        rows = rows_of(1)
        pool(rows._replace(labels=torch.tensor([2 * label, 2 * label + 1])))
        pool.on_step_end(*ENDS)
    assert pool(rows_of(1))[1].labels.tolist() == [3, 4, 5]


def watched(trainer):
    """What the model's loss saw and gave in each batch: features, labels, corpora, value."""
    seen, model = [], trainer.model
    own = model._contrastive_loss

    def watch(features, labels, corpus_ids):
        loss = own(features, labels, corpus_ids)
        if model.training:
            seen.append((features.detach().numpy(), labels.numpy(), corpus_ids.numpy(), loss.item()))
        return loss

    model._contrastive_loss = watch
    return seen


@pytest.mark.parametrize(("memory", "reach"), [(0, "step"), (6, "memory")])
def test_accumulated_batches_are_compared_with_those_before(memory, reach, splits, tmp_path):
    model = tiny_model(dropout=False, **CONTRASTIVE)
    trainer = make_trainer(
        model,
        splits,
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        max_steps=2,
        contrastive_memory=memory,
    )
    seen = watched(trainer)
    trainer.train()
    assert len(seen) == 6 and model.contrastive_pool is None
    for number, (features, labels, corpora, loss) in enumerate(seen):
        first = number // 3 * 3
        earlier = seen[first:number]
        columns = [
            np.concatenate([own, *(row[i] for row in earlier)]) for i, own in enumerate((features, labels, corpora))
        ]
        if reach == "memory" and number >= 3:  # six clips of the first step, the newest
            kept = [np.concatenate([row[i] for row in seen[:3]])[-6:] for i in range(3)]
            columns = [np.concatenate([own, more]) for own, more in zip(columns, kept, strict=True)]
        assert loss == pytest.approx(slow_loss(*columns, 0.2, len(labels)), rel=1e-4)


def test_what_a_pool_is_of_no_use_for_is_refused(splits, tmp_path):
    trainer = make_trainer(tiny_model(), splits, tmp_path, contrastive_memory=5)
    with pytest.raises(ValueError, match="`contrastive_memory` needs a `supervised_contrastive_loss_weight`"):
        trainer.train()
    with pytest.raises(ValueError, match="`contrastive_memory` must be 0 or more clips, got -1"):
        make_trainer(tiny_model(), splits, tmp_path, contrastive_memory=-1)


def prepare_processes(corpus, folder):
    tiny_model(dropout=False, **CONTRASTIVE).save_pretrained(folder / "start")


def run_process(corpus, folder):
    rank = int(os.environ["RANK"])
    model = MMSERForAudioClassification.from_pretrained(folder / "start")
    weights, losses = run(model, load_splits(corpus), folder, 4)
    loss, gradient = gathered_gradient(slice(0, 5) if rank == 0 else slice(5, 8))
    np.savez(folder / f"rank{rank}.npz", weights=weights, losses=losses, loss=loss, gradient=gradient)


def run(model, splits, folder, batch_size):
    trainer = make_trainer(
        model,
        with_training_clips(splits, 18),  # the last two of an epoch are a step, in which one process has none
        folder,
        **DETERMINISTIC,
        per_device_train_batch_size=batch_size,
        max_steps=3,
        contrastive_memory=5,
    )
    trainer.train()
    losses = [line["loss_supervised_contrastive"] for line in training_lines(trainer)]
    return flat_parameters(trainer.accelerator.unwrap_model(trainer.model)).numpy(), losses


def gathered_gradient(own):
    """
    The loss of eight clips, and its gradient to the weights that make their features: averaged as DDP does, of losses
    that are weighed as the trainer does.
    """
    features, labels, corpora = (torch.as_tensor(column) for column in clips(3, 8))
    weights = torch.eye(6, requires_grad=True)
    rows, _ = ContrastivePool()(ContrastiveRows(features[own] @ weights, labels[own], corpora[own]))
    loss = supervised_contrastive_loss(*rows[:2], corpora=rows.corpora, other_corpus_weight=0.2)
    (loss * 2 * len(labels[own]) / 8 if torch.distributed.is_initialized() else loss).backward()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(weights.grad)
        weights.grad /= 2
    return loss.item(), weights.grad.numpy()


def test_two_processes_are_one_with_the_whole_batch(two_processes, splits, tmp_path):
    model = MMSERForAudioClassification.from_pretrained(two_processes / "start")
    start = flat_parameters(model).numpy()
    weights, losses = run(model, splits, tmp_path, 8)
    loss, gradient = gathered_gradient(slice(0, 8))
    assert loss == pytest.approx(slow_loss(*clips(3, 8), 0.2, 8), rel=1e-5)
    assert np.abs(weights - start).max() > 1e-3
    for rank in (0, 1):
        found = np.load(two_processes / f"rank{rank}.npz")
        assert found["loss"] == pytest.approx(loss, abs=1e-6)  # five clips and three
        np.testing.assert_allclose(found["gradient"], gradient, atol=1e-6)
        np.testing.assert_allclose(found["losses"], losses, atol=1e-4)  # the log has four digits
        np.testing.assert_allclose(found["weights"], weights, atol=1e-5)


def test_a_stream_has_no_numbered_corpora(splits, tmp_path):
    trainer = make_trainer(tiny_model(**CONTRASTIVE), splits, tmp_path)
    stream = EmotionIterableDataset(splits["train"].to_iterable_dataset(), training=True)
    with pytest.raises(ValueError, match="needs an EmotionDataset to train on, got EmotionIterableDataset"):
        type(trainer)(trainer.model, trainer.args, train_dataset=stream, data_collator=trainer.data_collator)
