# SPDX-License-Identifier: Apache-2.0
"""Tests of whole commands in two processes (DDP, Gloo, on the CPU) against one process.

The trainer alone is in `test_trainer.py`, FSDP2 in `test_distributed.py`, prediction in `test_prediction_parts.py`.
"""

import itertools
import os
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from test_distributed import files, largest_difference, like, read
from test_trainer import DETERMINISTIC
from tiny_corpus import (
    AUDIO,
    AUDIO_WITHOUT_DROPOUT,
    JOINT,
    NO_DROPOUT,
    TEXT,
    TEXT_WITHOUT_DROPOUT,
    read_rows,
    tiny_flags,
    tiny_processor,
    tiny_tokenizer,
)
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

import eval_hf
import train_hf
from mmser.batches import WEIGHT_NAME, MMSERDataCollator
from mmser.examples import EmotionIterableDataset
from mmser.streams import SpareBatch, fill_up, share_out
from modeling_mmser import MMSERForAudioClassification

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = (
    0.2  # s; for 5 s it waits for Arrow's threads, at the end of each pass
)
CLIPS = 29  # of the last five of an epoch, the first of two processes has four and the second one
STREAMED = 25  # of the thirteen and twelve clips of two processes, in fours, the second has none in the last step
TOLERANCE = 1e-4  # of weights; losses and scores are compared to the four digits of the log


def prepare_processes(corpus, folder):
    """An encoder whose states are standardised, as it is not new, and the clips as a data set of the Hub."""
    torch.manual_seed(0)
    Wav2Vec2Model(Wav2Vec2Config(**AUDIO, **AUDIO_WITHOUT_DROPOUT)).save_pretrained(folder / "encoder")
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder / "encoder")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    for split in ("train", "validation", "test"):
        rows = read_rows(corpus, split)[:STREAMED]
        table = {
            "audio": [{"bytes": Path(row["file_name"]).read_bytes(), "path": None} for row in rows],
            "label": [row["label"] for row in rows],
            "transcription": [row["transcription"] for row in rows],
        }
        (folder / "hub").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(table).to_parquet(folder / "hub" / f"{split}-00000-of-00001.parquet")


def train(corpus, folder, output_dir, **flags):
    """`train_hf.py` of a new model. `flags` say the batch."""
    given = {
        **DETERMINISTIC,
        "learning_rate": 5e-3,
        "random_audio_encoder": None,
        "audio_config_overrides": None,
        "audio_model_name_or_path": folder / "encoder",
        "text_config_overrides": {**TEXT, **TEXT_WITHOUT_DROPOUT},
        "config_overrides": {**JOINT, **NO_DROPOUT},
        "ood_dir": Path(corpus) / "ood",
        "max_train_samples": CLIPS,
        "standardize_clips": 20,
        "per_device_eval_batch_size": 3,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "augment": False,
        "text_dropout": 0,
        "audio_dropout": 0,
        **flags,
    }
    return train_hf.main(tiny_flags(corpus, output_dir, folder / "tokenizer", **given))


def stream(corpus, folder, output_dir, **flags):
    """The same of a stream, twice through its clips."""
    given = {"data_dir": None, "dataset_name": folder / "hub", "streaming": True, "ood_dir": None}
    given |= {"learning_rate": 1e-3}  # the gradients are large, and their rounding grows from step to step
    given |= {"max_train_samples": None, "save_strategy": "no", "eval_strategy": "no", "train_sampling_strategy": None}
    return train(corpus, folder, output_dir, **{**given, **flags})


def judge(corpus, checkpoint, output_dir):
    flags = {"checkpoint": checkpoint, "data_dir": corpus, "ood_dir": corpus / "ood", "output_dir": output_dir}
    flags |= {"per_device_eval_batch_size": 3, "dataloader_num_workers": 0, "bootstrap_samples": 20, "use_cpu": True}
    eval_hf.main([word for name, value in flags.items() for word in (f"--{name}", str(value))])


def run_process(corpus, folder):
    rank = os.environ["RANK"]
    for step in (4, 8) if rank == "1" else ():  # else Transformers takes it that there is no best checkpoint
        (folder / "rank1" / f"checkpoint-{step}").mkdir(parents=True)
    train(corpus, folder, folder / f"rank{rank}", per_device_train_batch_size=4)
    assert torch.distributed.get_world_size() == 2
    torch.distributed.barrier()
    judge(corpus, folder / "rank0", folder / f"report{rank}")
    stream(corpus, folder, folder / f"stream{rank}", per_device_train_batch_size=4)


@pytest.mark.parametrize(("files", "processes"), [(4, 2), (1, 2), (3, 2), (1, 8)])
def test_the_shares_of_a_stream_have_each_row_once(files, processes):
    """By whole files if these go round evenly, else row by row; with more processes than rows, some have none."""
    table = datasets.Dataset.from_dict({"row": [f"row {i}" for i in range(7)], "text": ["a"] * 7, "labels": [0] * 7})
    stream = EmotionIterableDataset(table.to_iterable_dataset(num_shards=files))
    shares = []
    for rank in range(processes):
        own = share_out(stream, SimpleNamespace(process_index=rank, num_processes=processes))
        own.set_epoch(2)
        assert int(stream._epoch) == 2  # shared, as the count of bad rows is
        shares.append([row["row"] for row in own.dataset])
    assert sorted(itertools.chain(*shares)) == table["row"][:] and (processes == 8) == ([] in shares)


def test_a_process_without_a_clip_takes_part_in_a_step():
    table = datasets.Dataset.from_dict({"row": ["row 0"], "text": ["what a joy"], "labels": [1]})
    stream = EmotionIterableDataset(table.to_iterable_dataset(), use_audio=False)
    spare = SpareBatch(stream, MMSERDataCollator(tiny_processor()))
    others = SimpleNamespace(num_processes=2, device=torch.device("cpu"), reduce=lambda own, _: own + 1)
    nobody = SimpleNamespace(num_processes=2, device=torch.device("cpu"), reduce=lambda own, _: own)
    batches = fill_up([], 2, spare, others)
    assert [batch["labels"].tolist() for batch in batches] == [[1], [1]]
    assert [batch[WEIGHT_NAME] for batch in batches] == [0.0, 0.0]
    assert fill_up([], 2, spare, nobody) == []


@pytest.fixture(scope="module")
def runs(two_processes, shared):
    """What each process wrote, in `rank0` and `rank1` and so on, and beside them what one process did."""
    corpus = two_processes.parent / "corpus"

    def make(folder):
        train(corpus, two_processes, folder / "one", per_device_train_batch_size=4, gradient_accumulation_steps=2)
        judge(corpus, two_processes / "rank0", folder / "report")
        stream(corpus, two_processes, folder / "stream", per_device_train_batch_size=8)
        stream(corpus, two_processes, folder / "s2", per_device_train_batch_size=4, gradient_accumulation_steps=2)

    return two_processes, shared("one_process", make)


def history(folder):
    return read(folder / "trainer_state.json")["log_history"]


def test_two_processes_train_as_one_that_accumulates_two_batches(runs):
    two, one = runs
    assert sum("loss" in line for line in history(one / "one")) == 8
    assert history(two / "rank0") == like(history(one / "one"))
    for name in ("checkpoint-4", "checkpoint-8", "."):  # the last one with all that is fitted to outputs
        assert largest_difference(two / "rank0" / name, one / "one" / name) < TOLERANCE
    start, end = (MMSERForAudioClassification.from_pretrained(two / "rank0" / name) for name in ("checkpoint-4", "."))
    assert start.base_model.state_norm.mean.abs().max() > 0 and end.openmax.is_fitted
    assert sum(end.config.class_counts) == CLIPS


def test_results_are_of_all_clips_and_written_once(runs):
    two, one = runs
    results, expected = (read(folder / "eval_results.json") for folder in (two / "rank0", one / "one"))
    assert {"test", "calibration", "open_set"} <= expected.keys() and results == like(expected)
    states = {f"checkpoint-{step}/rng_state_1.pth" for step in (4, 8)}
    assert files(two / "rank1") == states
    own = {"rng_state.pth", "rng_state_0.pth"}
    first, whole = (
        {name for name in files(folder) if Path(name).name not in own} for folder in (two / "rank0", one / "one")
    )
    assert first == whole


def test_a_report_is_of_all_clips_and_written_once(runs):
    two, one = runs
    assert not (two / "report1").exists() or not files(two / "report1")
    assert files(two / "report0") == files(one / "report")
    assert read(two / "report0" / "report.json") == like(read(one / "report" / "report.json"))


def test_a_stream_is_shared_out_and_a_share_may_end_early(runs):
    two, one = runs
    expected = history(one / "stream")
    assert sum("loss" in line for line in expected) == 8
    for name, folder in (("stream0", two), ("s2", one)):
        assert history(folder / name)[:-1] == like(expected[:-1]), name
        assert largest_difference(folder / name, one / "stream") < TOLERANCE
    assert read(two / "stream0" / "eval_results.json") == like(read(one / "stream" / "eval_results.json"))
