# SPDX-License-Identifier: Apache-2.0
"""Tests of temperature sampling: the formula, the draws, and training with them, resumed and by two processes."""

import math
from collections import Counter

import datasets
import numpy as np
import pytest
from test_trainer import (
    NOISY,
    flat_parameters,
    load_splits,
    make_trainer,
    resumable,
    training_losses,
)
from tiny_corpus import tiny_model, tiny_processor, write_corpus

from mmser.batches import LengthGroupedSampler
from mmser.caching import CachedStatesDataset, EncoderStateCache
from mmser.examples import EmotionDataset, EmotionIterableDataset, Repeat, class_counts
from mmser.sampling import (
    TemperatureSampler,
    describe_draws,
    expected_draws,
    number_groups,
    number_repeats,
    sampling_weights,
)
from mmser.training_arguments import MMSERTrainingArguments
from modeling_mmser import MMSERForAudioClassification

SIZES = [1, 3, 40, 200, 7]
GROUPS = np.random.default_rng(0).permutation(np.repeat(np.arange(len(SIZES)), SIZES))
N = len(GROUPS)


def sampler_of(temperature, seed=0, groups=GROUPS):
    return TemperatureSampler(groups, sampling_weights(groups, temperature), seed)


def clips_of(order):
    return [entry.clip if isinstance(entry, Repeat) else entry for entry in order]


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return load_splits(write_corpus(tmp_path_factory.mktemp("corpus")))


# --- the formula -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1 / 0.7, 1 / 0.3, 5.0, 1e3])
def test_weights_are_powers_of_the_sizes_of_the_groups(temperature):
    """Of a clip: n^(1/T - 1) of its group, so that the weights of all clips sum to N. In float64, clip by clip."""
    powers = [math.pow(SIZES[group], 1 / temperature - 1) for group in GROUPS]
    expected = [N * power / math.fsum(powers) for power in powers]
    weights = sampling_weights(GROUPS, temperature)
    assert weights.dtype == np.float64
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert math.fsum(weights) == pytest.approx(N, rel=1e-12)


def test_a_temperature_of_one_is_natural_and_a_large_one_uniform_over_groups():
    np.testing.assert_allclose(sampling_weights(GROUPS, 1.0), 1.0, rtol=1e-12)
    of_groups = np.bincount(GROUPS, weights=sampling_weights(GROUPS, 1e9))
    np.testing.assert_allclose(of_groups, N / len(SIZES), rtol=1e-6)
    assert np.isfinite(sampling_weights(GROUPS, 1e-3)).all()  # no power that is too large


def test_groups_are_the_classes_of_the_corpora():
    table = datasets.Dataset.from_dict({"labels": [1, 0, 1, 1], "corpus": ["b", "b", "a", "b"]})
    assert number_groups(table).tolist() == [2, 1, 0, 2]
    assert number_groups(table.remove_columns("corpus")).tolist() == [1, 0, 1, 1]
    draws = expected_draws(table, 1e9)
    np.testing.assert_allclose(draws, [2 / 3, 4 / 3, 4 / 3, 2 / 3], rtol=1e-6)
    rows = describe_draws(table, draws, ["x", "y"])
    found = [(row["corpus"], row["class"], row["clips"]) for row in rows]
    assert found == [
        ("a", "y", 1),
        ("b", "x", 1),
        ("b", "y", 2),
    ]
    assert [round(row["draws"], 3) for row in rows] == [1.333] * 3 and rows[2]["times"] == pytest.approx(2 / 3)
    assert expected_draws(table, None) is None


# --- the draws -------------------------------------------------------------------------------------------------------


def test_an_epoch_is_as_long_as_ever_and_no_clip_and_no_group_is_a_time_off():
    sampler = sampler_of(3.0)
    of_groups = np.bincount(GROUPS, weights=sampler.weights)
    for epoch in range(50):
        sampler.set_epoch(epoch)
        drawn = sampler.draw()
        assert len(drawn) == len(sampler) == N
        assert (np.abs(np.bincount(drawn, minlength=N) - sampler.weights) < 1).all()
        assert (np.abs(np.bincount(GROUPS[drawn], minlength=len(SIZES)) - of_groups) < 1 + 1e-9).all()


def test_clips_are_drawn_as_often_as_their_weights_say():
    """Over 3000 epochs the mean of a clip is within 5 deviations; p (1 - p) is the variance of one epoch."""
    epochs, sampler = 3000, sampler_of(2.0, seed=7)
    counts = np.zeros(N)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        counts += np.bincount(sampler.draw(), minlength=N)
    rest = sampler.weights % 1
    deviation = np.sqrt(rest * (1 - rest) / epochs)
    assert (np.abs(counts / epochs - sampler.weights) < 5 * deviation + 1e-9).all()
    assert deviation.max() < 0.02 < np.ptp(sampler.weights)


def test_a_temperature_of_one_takes_each_clip_once():
    sampler = sampler_of(1.0)
    for epoch in range(20):
        sampler.set_epoch(epoch)
        assert sorted(sampler) == list(range(N))


def test_draws_depend_on_the_seed_and_the_epoch_alone():
    sampler, same, other = sampler_of(3.0), sampler_of(3.0), sampler_of(3.0, seed=1)
    first = list(sampler)
    np.random.random(3)
    assert list(sampler) == first == list(same) != list(other)
    sampler.set_epoch(1)
    assert list(sampler) != first
    order = clips_of(first)
    assert order != sorted(order, key=lambda clip: GROUPS[clip])  # groups are mixed


def test_repeats_are_numbered():
    assert number_repeats([4, 2, 4, 4, 2]) == [4, 2, Repeat(4, 1), Repeat(4, 2), Repeat(2, 1)]
    numbers = Counter(entry.clip for entry in sampler_of(3.0) if isinstance(entry, Repeat))
    counts = Counter(sampler_of(3.0).draw().tolist())
    assert numbers == {clip: count - 1 for clip, count in counts.items() if count > 1}
    assert max(numbers.values()) > 10


def test_batches_of_similar_length_hold_what_was_drawn():
    lengths = np.random.default_rng(1).integers(1000, 90_000, N)
    drawn = sampler_of(3.0)
    sampler = LengthGroupedSampler(8, lengths.tolist(), seed=0, drawn=drawn)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(clips_of(order)) == sorted(drawn.draw().tolist()) and drawn.epoch == epoch
        assert order == number_repeats(clips_of(order))
        batches = [clips_of(order[start : start + 8]) for start in range(0, N, 8)]
        assert all((np.diff(lengths[batch]) <= 0).all() for batch in batches)


# --- examples --------------------------------------------------------------------------------------------------------


def test_a_clip_that_comes_again_is_augmented_in_another_way(splits):
    dataset = EmotionDataset(splits["train"], training=True, **{**NOISY, "text_dropout": 0.0, "audio_dropout": 0.0})
    plain, again, third = dataset.__getitems__([3, Repeat(3, 1), Repeat(3, 2)])
    assert plain["labels"] == again["labels"] == third["labels"] and plain["text"] == again["text"]
    waves = [example["audio"].tobytes() for example in (plain, again, third)]
    assert len(set(waves)) == 3
    assert dataset[3]["audio"].tobytes() == waves[0] and dataset[Repeat(3, 1)]["audio"].tobytes() == waves[1]
    dataset.set_epoch(1)
    assert dataset[Repeat(3, 1)]["audio"].tobytes() not in waves


def test_a_clip_that_comes_again_reads_the_next_copy_of_the_cache(splits, tmp_path):
    model = tiny_model().eval()
    model.freeze_audio_encoder()
    cache = EncoderStateCache(tmp_path, model, tiny_processor())
    options = {**NOISY, "text_dropout": 0.0, "audio_dropout": 0.0}
    dataset = EmotionDataset(splits["train"].select(range(8)), training=True, **options)
    cached = CachedStatesDataset(dataset, cache, augmented_copies=3)
    copies = []
    for epoch in range(3):
        cached.set_epoch(epoch)
        copies.append(cached[5]["audio_states"].tobytes())
    assert len(set(copies)) == 3
    for epoch in range(3):
        cached.set_epoch(epoch)
        states = [cached[Repeat(5, number)]["audio_states"].tobytes() for number in (1, 2, 3)]
        assert states == [copies[(epoch + number) % 3] for number in (1, 2, 3)]


def test_class_counts_are_those_of_the_draws():
    table = datasets.Dataset.from_dict({"labels": [0] * 90 + [1] * 9 + [2], "corpus": ["a"] * 100})
    draws = expected_draws(table, 2.0)
    powers = np.sqrt([90, 9, 1])
    assert class_counts(table, 4, draws) == [*np.rint(100 * powers / powers.sum()).astype(int).tolist(), 0]
    assert class_counts(table, 4) == [90, 9, 1, 0]
    assert class_counts(table, 4, expected_draws(table, 0.2)) == [100, 1, 1, 0]  # none is lost
    shares = [[0.5, 0.5]] * 3 + [[0.0, 1.0]]
    voted = datasets.Dataset.from_dict({"labels": [0, 0, 0, 1], "class_shares": shares})
    weights = expected_draws(voted, 1e9)
    np.testing.assert_allclose(weights, [2 / 3] * 3 + [2], rtol=1e-6)
    assert class_counts(voted, 2, weights) == [1, 3] and class_counts(voted, 2) == [2, 2]


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven(splits):
    """Most clips of one class of one corpus are gone."""
    keep = [
        index
        for index, (corpus, label) in enumerate(zip(splits["train"]["corpus"], splits["train"]["labels"], strict=True))
        if (corpus, label) != ("sine", 0) or index < 8
    ]
    return {**splits, "train": splits["train"].select(keep)}


@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
def test_a_run_resumed_within_an_epoch_draws_the_same_clips(strategy, uneven, tmp_path):
    start = tiny_model()
    arguments = {"train_sampling_strategy": strategy, "sampling_temperature": 5.0, "eval_strategy": "no"}
    whole = resumable(uneven, tmp_path / "whole", start, **arguments, save_steps=6)
    whole.train()
    drawn = whole._get_train_sampler()
    assert len(drawn) == len(uneven["train"]) and any(isinstance(entry, Repeat) for entry in drawn)
    resumed = resumable(uneven, tmp_path / "resumed", start, **arguments, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert training_losses(resumed) == pytest.approx(training_losses(whole), abs=1e-5)
    np.testing.assert_allclose(flat_parameters(resumed.model), flat_parameters(whole.model), atol=1e-5)
    counts = class_counts(uneven["train"], 4, expected_draws(uneven["train"], 5.0))
    assert list(whole.model.config.class_counts) == counts != class_counts(uneven["train"], 4)


STRATEGIES = ("random", "group_by_length")


def numbered(entries):
    """A number for each entry of an order: a clip that comes again is negative."""
    return [entry if isinstance(entry, int) else -1000 * entry[1] - entry[0] for entry in entries]


def prepare_processes(corpus, folder):
    tiny_model().save_pretrained(folder / "start")


def run_process(corpus, folder):
    asked, stock = [], EmotionDataset.__getitems__
    EmotionDataset.__getitems__ = lambda self, indices: asked.append(list(indices)) or stock(self, indices)
    model, splits = MMSERForAudioClassification.from_pretrained(folder / "start"), load_splits(corpus)
    for strategy in STRATEGIES:
        asked.clear()
        arguments = {"sampling_temperature": 5.0, "train_sampling_strategy": strategy, "max_steps": 6}
        trainer = make_trainer(model, splits, folder, **arguments, per_device_train_batch_size=4)
        assert trainer.args.world_size == 2
        trainer.train()
        found = [numbered(batch) for batch in asked]
        np.save(folder / f"{strategy}{trainer.args.process_index}.npy", np.array(found[:6]))


def test_each_process_takes_its_share_of_one_order(two_processes, splits, tmp_path):
    for strategy in STRATEGIES:
        ranks = [np.load(two_processes / f"{strategy}{rank}.npy") for rank in (0, 1)]
        together = np.concatenate(ranks, axis=1).reshape(-1)  # a step of both is a batch of eight
        one = make_trainer(
            tiny_model(), splits, tmp_path / "one", sampling_temperature=5.0, train_sampling_strategy=strategy
        )
        expected = []
        for epoch in (0, 1):
            sampler = one._get_train_sampler()
            sampler.set_epoch(epoch)
            expected += numbered(sampler)
        assert together.tolist() == expected[: together.size]


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_none_is_refused(temperature, tmp_path):
    with pytest.raises(ValueError, match="must be a number greater than 0, got"):
        MMSERTrainingArguments(str(tmp_path), use_cpu=True, sampling_temperature=temperature)


def test_what_draws_no_clips_at_random_is_refused(splits, tmp_path):
    with pytest.raises(ValueError, match="which `train_sampling_strategy` sequential does not"):
        MMSERTrainingArguments(
            str(tmp_path), use_cpu=True, sampling_temperature=2.0, train_sampling_strategy="sequential"
        )
    stream = EmotionIterableDataset(splits["train"].to_iterable_dataset(), training=True)
    arguments = MMSERTrainingArguments(str(tmp_path), use_cpu=True, sampling_temperature=2.0, max_steps=1)
    trainer = make_trainer(tiny_model(), splits, tmp_path)
    with pytest.raises(ValueError, match="does not go with a stream"):
        type(trainer)(tiny_model(), arguments, train_dataset=stream, data_collator=trainer.data_collator)
