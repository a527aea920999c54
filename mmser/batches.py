# SPDX-License-Identifier: Apache-2.0
"""Examples to batches: which clips share a batch, how they are padded, and how much each batch counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import find_batch_size, slice_tensors
from transformers import BatchFeature

from audio_mmser import MIN_SECONDS
from mmser.sampling import TemperatureSampler, number_repeats
from mmser.targets import COLUMN as TARGETS
from processing_mmser import MMSERProcessor

MASK_NAMES = {"audio": "attention_mask", "text": "text_attention_mask"}
ROW_IDS = "row_ids"  # of `EmotionDataset.number_rows`
ID_NAMES = ("corpus_ids", "speaker_ids", ROW_IDS)  # of `EmotionDataset.add_ids`
WEIGHT_NAME = "batch_weight"  # of a batch of training: what its loss is multiplied by


@dataclass
class MMSERDataCollator:
    """Pads examples to a batch with the processor.

    All batches of a data set have the same keys, so that the ranks of a distributed run agree: a batch in which
    nobody has text still gets `input_ids` [B,1] with a mask of zeros, one without any audio a minimal silent
    `input_values` [B,400] (or `input_features` [B,mels,2]) with a mask of zeros. `audio_states` [Ta,layers,D] and
    `text_states` [L,D], in place of audio and text, are padded as they are; no rows mean that the modality is missing.
    """

    processor: MMSERProcessor

    def __call__(self, examples: Sequence[dict[str, Any] | None]) -> BatchFeature:
        """Make a batch of the examples of `EmotionDataset` or `CachedStatesDataset`; None (a skipped one) is left out.

        Returns:
            The tensors of the processor (`input_values` or `input_features`, `attention_mask`, `input_ids`,
            `text_attention_mask`), `labels` [B] int64, the ids of `EmotionDataset.add_ids` and, of examples that have
            them, `class_shares` and `teacher_logits` [B,C], and `auxiliary_targets`: by task, [B] int64 (classes)
            or float32 (numbers). For states: `audio_states` [B,Ta,layers,D] with `attention_mask` [B,Ta],
            `text_states` [B,L,D] with `text_attention_mask` [B,L], padded with zeros.

        Raises:
            ValueError: if no example is left.
        """
        rows = [example for example in examples if example is not None]
        if not rows:
            raise ValueError(f"a batch needs at least one readable example, got {len(examples)} bad ones")
        batch = self._process(rows)
        extractor = self.processor.feature_extractor
        if "text" in rows[0] and "input_ids" not in batch and "text" in self.processor.modalities:
            batch["input_ids"] = torch.full((len(rows), 1), self._pad_token_id)
            batch["text_attention_mask"] = torch.zeros(len(rows), 1, dtype=torch.long)
        if "audio" in rows[0] and "attention_mask" not in batch and extractor is not None:
            name = extractor.model_input_names[0]
            samples = round(MIN_SECONDS * extractor.sampling_rate)
            shape = (samples,) if name == "input_values" else (extractor.feature_size, 2)
            batch[name] = torch.zeros(len(rows), *shape)
            batch["attention_mask"] = torch.zeros(len(rows), shape[-1], dtype=torch.long)
        for kind, mask_name in MASK_NAMES.items():
            name = f"{kind}_states"
            if name in rows[0]:
                batch[name], batch[mask_name] = pad_states([row[name] for row in rows])
        for name in ("labels", *(name for name in ID_NAMES if name in rows[0])):
            batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.long)
        if TARGETS in rows[0]:
            batch["auxiliary_targets"] = {
                task: torch.tensor([row[TARGETS][task] for row in rows]) for task in rows[0][TARGETS]
            }
        for name in ("class_shares", "teacher_logits"):
            if name in rows[0]:
                batch[name] = torch.from_numpy(np.stack([row[name] for row in rows]))
        return batch

    @property
    def _pad_token_id(self) -> int:
        return self.processor.tokenizer.pad_token_id or 0

    def _process(self, rows: list[dict[str, Any]]) -> BatchFeature:
        """The processor's tensors for the audio and text of a batch; empty if no row has either."""
        given = list(range(len(rows)))
        if "audio_states" in rows[0] or "text_states" in rows[0]:  # the processor refuses a row that has only states
            given = [i for i in given if rows[i].get("audio") is not None or (rows[i].get("text") or "").strip()]
            if not given:
                return BatchFeature()
        audio, text = ([rows[i].get(kind) for i in given] for kind in ("audio", "text"))
        batch = self.processor(  # type: ignore[call-arg]  # the base class routes flat keywords
            audio=audio if any(clip is not None for clip in audio) else None,
            text=text if any(text) else None,
            sampling_rate=self.processor.sampling_rate,
            padding=True,
            return_tensors="pt",
        )
        if len(given) < len(rows):
            for name, value in batch.items():
                fill = self._pad_token_id if name == "input_ids" else 0
                batch[name] = value.new_full((len(rows), *value.shape[1:]), fill)
                batch[name][given] = value
        return batch


def pad_states(states: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoder states [T_i, ...] -> [B, T, ...] of the same dtype, zero after their end, and the mask [B, T] int64."""
    lengths = torch.tensor([len(row) for row in states])
    mask = torch.arange(max(1, int(lengths.max()))) < lengths[:, None]
    padded = np.zeros((*mask.shape, *states[0].shape[1:]), dtype=states[0].dtype)
    for target, row in zip(padded, states, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(padded), mask.long()


class LengthGroupedSampler(torch.utils.data.Sampler):
    """Batches of clips of similar length, in an order that depends on the seed and the epoch alone.

    Transformers' sampler of this name sorts 50 batches at a time and goes through them from long to short. Clips of
    different emotions differ in length, so its neighbouring batches hold the same few emotions. This one sorts `pool`
    batches at a time, which saves most of the padding, and shuffles them.

    Args:
        batch_size: clips in a batch.
        lengths: [N] samples of each clip.
        seed: with the epoch it decides the order, also of a resumed run.
        pool: batches that are sorted together.
        drawn: draws the clips of an epoch, of which some may come again and others not at all; None: each once.
    """

    def __init__(
        self,
        batch_size: int,
        lengths: list[int],
        seed: int,
        pool: int = 8,
        drawn: TemperatureSampler | None = None,
    ):
        self.batch_size = batch_size
        self.lengths = torch.tensor(lengths)
        self.seed = seed
        self.pool = pool
        self.drawn = drawn
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self), generator=generator)
        if self.drawn is not None:
            order = torch.from_numpy(self.drawn.draw())
        whole, rest = [], []
        for members in order.split(self.pool * self.batch_size):
            batches = members[self.lengths[members].argsort(descending=True)].split(self.batch_size)
            for index in torch.randperm(len(batches), generator=generator).tolist():
                (whole if len(batches[index]) == self.batch_size else rest).append(batches[index])
        # The short batch last, or it would shift all after it
        return iter(number_repeats(torch.cat(whole + rest).tolist()))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if self.drawn is not None:
            self.drawn.set_epoch(epoch)


def evaluation_order(dataset) -> list[int] | None:
    """The clips of a data set from the longest to the shortest; None if their `lengths` are not known."""
    if not hasattr(dataset, "lengths"):
        return None
    return np.argsort(-np.asarray(dataset.lengths), kind="stable").tolist()


def is_filled_up(accelerator: Any) -> bool:
    """
    Whether the present batch has clips that are not its own, on some process: so that all have as many, Accelerate
    fills up the last batch of a data set with its first clips.
    """
    state = accelerator.gradient_state
    return accelerator.num_processes > 1 and state.end_of_dataloader and state.remainder > 0


def count_own_clips(batch: Any, accelerator: Any) -> int:
    """How many clips of a batch are its own, the first ones; of a batch that is filled up maybe none."""
    size = find_batch_size(batch)
    if not is_filled_up(accelerator):
        return size
    # The clips of all processes, in their order, are first those that remained
    return min(max(accelerator.gradient_state.remainder - accelerator.process_index * size, 0), size)


def first_clips(batch: Any, number: int) -> Any:
    """A batch of its first clips; of one at least, as nothing can be computed without any."""
    return batch if number == find_batch_size(batch) else slice_tensors(batch, slice(0, max(number, 1)))


def weigh_batches(batches: list[Any], accelerator: Any) -> None:
    """
    Make all clips of a step of the optimiser count alike, by however many batches and processes they are seen.

    The trainer takes the mean over the batches and processes, in which a short last batch would count as much as a
    whole one, and what it is filled up with a second time. All processes must call this.

    Args:
        batches: what this process sees in the step. Each gets its weight under `WEIGHT_NAME`, and the last one loses
            the clips that are not its own. If these are all, its weight is 0. So is that of a batch that already has
            a weight: it fills up a stream.
        accelerator: the `Accelerator` of the trainer.
    """
    if not batches:
        return
    sizes = [*map(find_batch_size, batches[:-1]), count_own_clips(batches[-1], accelerator)]
    batches[-1] = first_clips(batches[-1], sizes[-1])
    sizes = [0 if WEIGHT_NAME in batch else size for batch, size in zip(batches, sizes, strict=True)]
    total = float(sum(sizes))
    if accelerator.num_processes > 1:
        total = accelerator.reduce(torch.tensor(total, device=accelerator.device), "sum").item()
    for batch, size in zip(batches, sizes, strict=True):
        batch[WEIGHT_NAME] = size * len(batches) * accelerator.num_processes / total
