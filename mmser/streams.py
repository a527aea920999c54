# SPDX-License-Identifier: Apache-2.0
"""Streamed data sets in a run: clips to judge are read into a table, clips to train on are shared out over processes.

Nobody knows how long a stream is, and a process may come to the end of its share before the others. It then takes part
in their steps with `fill_up`: a clip that counts for nothing.
"""

from typing import Any

import datasets
import torch
from accelerate.data_loader import prepare_data_loader
from datasets.distributed import split_dataset_by_node

from mmser.batches import WEIGHT_NAME, first_clips
from mmser.examples import EmotionIterableDataset


def read_stream(split: Any) -> datasets.Dataset:
    """
    All rows of a stream as a table in memory, their audio still encoded; a row with a bad label is left out.

    Raises:
        ValueError: no row has a label.
    """
    rows = [row for row in split if row["labels"] is not None]
    if not rows:
        raise ValueError("A split of the streamed data set has no row with a label.")
    return datasets.Dataset.from_list(rows)


def is_shared_out(dataset: Any, accelerator: Any) -> bool:
    """Whether the processes of a run each read their own share of this data set."""
    return isinstance(dataset, EmotionIterableDataset) and accelerator.num_processes > 1


def share_out(stream: EmotionIterableDataset, accelerator: Any) -> EmotionIterableDataset:
    """
    What this process reads of a stream: its own files, if these go round evenly; else every n-th row, of which it
    decodes no other. Together the processes read each clip once.
    """
    own = EmotionIterableDataset.__new__(EmotionIterableDataset)
    own.__dict__ |= stream.__dict__  # the epoch and the count of bad rows are the same tensors
    own.dataset = split_dataset_by_node(stream.dataset, accelerator.process_index, accelerator.num_processes)
    return own


def share_of(loader: Any, accelerator: Any) -> Any:
    """A data loader over a share as Accelerate makes one, but that is not divided again."""
    rank = {"num_processes": 1, "process_index": 0}
    own: Any = prepare_data_loader(loader, accelerator.device, **rank, put_on_device=True, dispatch_batches=False)
    own._is_accelerate_prepared = True
    return own


def number_skipped(stream: EmotionIterableDataset, accelerator: Any) -> int:
    """How many rows of a stream were found bad so far, by all processes; all must call this."""
    own = torch.tensor(stream.num_skipped, device=accelerator.device)
    return int(accelerator.reduce(own, "sum").item()) if accelerator.num_processes > 1 else int(own)


class SpareBatch:
    """
    A batch of one clip that counts for nothing: the first one of the whole stream, read when it is wanted.

    Args:
        stream: not shared out.
        collator: makes a batch of examples.
    """

    def __init__(self, stream: EmotionIterableDataset, collator: Any):
        self.stream, self.collator = stream, collator
        self._batch: Any = None

    def __call__(self, device: torch.device) -> Any:
        """The batch, on a device, with a weight of 0."""
        if self._batch is None:
            self._batch = first_clips(self.collator([next(iter(self.stream))]), 1).to(device)
        return type(self._batch)({**self._batch, WEIGHT_NAME: 0.0})


def fill_up(batches: list[Any], number: int, spare: SpareBatch, accelerator: Any) -> list[Any]:
    """
    The batches of a step of the optimiser, `number` of them as long as any process has one; all must call this.

    Without it a process whose share has ended would leave the others waiting, and a step in the middle of an
    accumulation would never be taken.
    """
    own = torch.tensor(float(len(batches)), device=accelerator.device)
    total = accelerator.reduce(own, "sum").item() if accelerator.num_processes > 1 else own.item()
    if not total:
        return []
    return batches + [spare(accelerator.device) for _ in range(number - len(batches))]
