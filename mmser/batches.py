# SPDX-License-Identifier: Apache-2.0
"""Examples to batches: which clips share a batch, and how they are padded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature

from audio_mmser import MIN_SECONDS
from processing_mmser import MMSERProcessor


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
            What the processor returns (`input_values` or `input_features`, `attention_mask`, `input_ids`,
            `text_attention_mask`) and `labels` [B] int64. For states: `audio_states` [B,Ta,layers,D] with
            `attention_mask` [B,Ta], `text_states` [B,L,D] with `text_attention_mask` [B,L], padded with zeros.

        Raises:
            ValueError: if no example is left.
        """
        rows = [example for example in examples if example is not None]
        if not rows:
            raise ValueError(f"a batch needs at least one readable example, got {len(examples)} bad ones")
        batch = self._process(rows)
        feature_extractor, tokenizer = self.processor.feature_extractor, self.processor.tokenizer
        if "text" in rows[0] and "input_ids" not in batch:
            batch["input_ids"] = torch.full((len(rows), 1), tokenizer.pad_token_id or 0)
            batch["text_attention_mask"] = torch.zeros(len(rows), 1, dtype=torch.long)
        if "audio" in rows[0] and "attention_mask" not in batch:
            name = feature_extractor.model_input_names[0]
            samples = round(MIN_SECONDS * feature_extractor.sampling_rate)
            shape = (samples,) if name == "input_values" else (feature_extractor.feature_size, 2)
            batch[name] = torch.zeros(len(rows), *shape)
            batch["attention_mask"] = torch.zeros(len(rows), shape[-1], dtype=torch.long)
        for name, mask_name in (("audio_states", "attention_mask"), ("text_states", "text_attention_mask")):
            if name in rows[0]:
                batch[name], batch[mask_name] = _pad_states([row[name] for row in rows])
        batch["labels"] = torch.tensor([row["labels"] for row in rows], dtype=torch.long)
        return batch

    def _process(self, rows: list[dict[str, Any]]) -> BatchFeature:
        """What the processor makes of the audio and text of a batch; empty if no row has either."""
        audio = [row.get("audio") for row in rows]
        text = [row.get("text") for row in rows]
        present = list(range(len(rows)))
        if "audio_states" in rows[0] or "text_states" in rows[0]:
            # A row that has nothing beside its states is nothing to the processor
            present = [index for index in present if audio[index] is not None or (text[index] or "").strip()]
            audio, text = [audio[index] for index in present], [text[index] for index in present]
            if not present:
                return BatchFeature()
        batch = self.processor(  # type: ignore[call-arg]  # the base class routes flat keywords
            audio=audio if any(clip is not None for clip in audio) else None,
            text=text if any(text) else None,
            sampling_rate=self.processor.feature_extractor.sampling_rate,
            padding=True,
            return_tensors="pt",
        )
        if len(present) < len(rows):
            for name, value in batch.items():
                fill = (self.processor.tokenizer.pad_token_id or 0) if name == "input_ids" else 0
                batch[name] = value.new_full((len(rows), *value.shape[1:]), fill)
                batch[name][present] = value
        return batch


def _pad_states(states: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoder states [T_i, ...] -> [B, T, ...] of the same dtype, zero after their end, and the mask [B, T] int64."""
    longest = max(1, *map(len, states))
    padded = np.zeros((len(states), longest, *states[0].shape[1:]), dtype=states[0].dtype)
    mask = np.zeros((len(states), longest), dtype=np.int64)
    for index, row in enumerate(states):
        padded[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return torch.from_numpy(padded), torch.from_numpy(mask)


class LengthGroupedSampler(torch.utils.data.Sampler):
    """
    Batches of clips of similar length, in an order drawn from the seed and the epoch alone, so that a resumed run goes
    on in it.

    Transformers' sampler of this name sorts 50 batches at a time and goes through them from long to short. Emotions
    differ in length, so neighbouring batches hold the same few of them. This one sorts `pool` batches at a time, which
    saves most of the padding, and shuffles them.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int, pool: int = 8):
        self.batch_size = batch_size
        self.lengths = torch.tensor(lengths)
        self.seed = seed
        self.pool = pool
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self), generator=generator)
        whole, rest = [], []
        for members in order.split(self.pool * self.batch_size):
            batches = members[self.lengths[members].argsort(descending=True)].split(self.batch_size)
            for index in torch.randperm(len(batches), generator=generator).tolist():
                (whole if len(batches[index]) == self.batch_size else rest).append(batches[index])
        return iter(torch.cat(whole + rest).tolist())  # the short batch last, or it would shift all after it

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def evaluation_order(dataset) -> list[int] | None:
    """The clips of a data set from the longest to the shortest; None if their `lengths` are not known."""
    if not hasattr(dataset, "lengths"):
        return None
    return np.argsort(-np.asarray(dataset.lengths), kind="stable").tolist()
