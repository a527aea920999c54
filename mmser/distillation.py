# SPDX-License-Identifier: Apache-2.0
"""Logits of a teacher, computed once for each clip and kept beside the states of frozen encoders.

1. `TeacherLogits`: the logits of one teacher on disk, and how they are computed
2. `DistilledDataset`: a `CachedStatesDataset` whose examples have them
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from mmser.batches import MASK_NAMES, pad_states
from mmser.caching import (
    FORMAT_VERSION,
    TEXT_BUDGET,
    CachedStatesDataset,
    Clip,
    EncoderStateCache,
    StateStore,
    hash_of,
    in_batches,
    read_ahead,
    weights_hash,
)
from mmser.examples import EmotionDataset
from modeling_mmser import MMSERForAudioClassification
from processing_mmser import MMSERProcessor

logger = logging.get_logger(__name__)

VIEWS = ("both", "audio", "text")  # what a student may see of a clip, and its teacher with it
SHARD_BYTES = 2**24
NEEDS_FROZEN_AUDIO = (
    "With --cache_encoder_states a teacher answers each clip once, so the audio encoder must be frozen too: add "
    "--freeze_audio, or leave the cache out."
)


class View(NamedTuple):
    """A clip as the teacher sees it: the keys of its audio (of one augmented copy) and its text, None if unseen."""

    audio: str | None
    text: str | None
    number: int  # of the clip in its data set
    copy: int | None

    @property
    def key(self) -> str:
        return hash_of(self.audio, self.text)


class TeacherLogits:
    """
    The logits of a teacher on disk: `folder/teacher-<hash>`. The hash covers its weights, its configuration and all
    that decides its input. States of its encoders that an earlier run left in `folder` are used; none are added.

    Args:
        folder: where the states of the student are kept too.
        teacher: gets frozen.
        processor: that of the student, which the teacher shares (`check_teacher`).
        autocast: as in `EncoderStateCache`.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        teacher: MMSERForAudioClassification,
        processor: MMSERProcessor,
        autocast: torch.dtype | None = None,
    ):
        self.teacher: Any = teacher.requires_grad_(False).eval()
        self.states = EncoderStateCache(folder, teacher, processor, autocast=autocast)
        inputs = {kind: store.folder.name for kind, store in self.states.stores.items()}
        name = hash_of(FORMAT_VERSION, weights_hash(teacher), inputs)[:20]
        shape = (self.teacher.config.num_labels,)
        self.store = StateStore(Path(folder) / f"teacher-{name}", shape, "float32", SHARD_BYTES)

    def of(self, dataset: "DistilledDataset") -> np.ndarray:
        """
        The logits for all that a data set may show of its clips; what the folder lacks is computed.

        Returns: float32 [copies, N, views, C], nan for what is never shown. See `VIEWS`.
        Raises:
            ValueError: the student may see something that the teacher has no encoder for.
        """
        views = dataset.views()
        for view in VIEWS[1:]:
            is_seen = any(getattr(seen, view) is not None for seen in views.values())
            if is_seen and view not in self.states.stores:
                raise ValueError(f"The teacher takes no {view}, but the model does: take another teacher.")
        wanted = {seen.key: seen for seen in views.values()}
        missing = [wanted[key] for key in wanted.keys() - self.store.find(wanted).keys()]
        if missing:
            logger.info(f"The teacher answers {len(missing)} of {len(wanted)} clips and parts of clips")
            self._compute(dataset, missing)
        places = self.store.find(wanted)
        shape = (max(1, dataset.augmented_copies), len(dataset), len(VIEWS), *self.store.row_shape)
        logits = np.full(shape, np.nan, dtype=np.float32)
        for (copy, index, view), seen in views.items():
            if seen.key in places:  # else its file turned out to be unreadable
                logits[copy, index, VIEWS.index(view)] = self.store.read(places[seen.key])[0]
        return logits

    def _compute(self, dataset: "DistilledDataset", missing: Sequence[View]) -> None:
        """Answer views that the store lacks, all of one copy of a clip at once: its encoders run once for them."""
        together: dict[tuple[int, int | None], list[View]] = defaultdict(list)
        for seen in missing:
            together[seen.number, seen.copy].append(seen)
        found = {
            kind: store.find({key for seen in missing if (key := getattr(seen, kind)) is not None})
            for kind, store in self.states.stores.items()
        }
        has_audio = "audio" in self.states.stores
        lengths = dataset.lengths if has_audio else [len(text or "") for text in dataset.dataset["text"]]
        budget: float = TEXT_BUDGET
        if has_audio:
            budget = self.states.batch_seconds * self.states.processor.feature_extractor.sampling_rate
        rows = list(dataset.dataset["row"])
        clips = [Clip(f"{pair}", rows[pair[0]], *pair, lengths[pair[0]]) for pair in together]

        def read(clip: Clip) -> dict[str, tuple[str, Any]]:
            """Of each kind that is seen: its key, and its content unless its states are known."""
            contents = {}
            for kind in self.states.stores:
                key = next((key for seen in together[clip.index, clip.copy] if (key := getattr(seen, kind))), None)
                if key is not None:
                    contents[kind] = key, None if key in found[kind] else dataset.read_content(kind, clip)
            return contents

        with logging.tqdm(desc="Asking the teacher", total=len(clips), leave=False) as progress:
            for batch, contents in read_ahead(in_batches(clips, budget), read):
                states = {kind: self._states_of(kind, contents, found[kind]) for kind in self.states.stores}
                seen_here = [seen for clip in batch for seen in together[clip.index, clip.copy]]
                self._answer(seen_here, states)
                progress.update(len(batch))
        self.store.flush()

    def _states_of(self, kind: str, contents: list[dict], found: dict) -> dict[str, np.ndarray]:
        """Key -> states [T, ...], read or computed, in the precision of the store either way."""
        store, pairs = self.states.stores[kind], [each[kind] for each in contents if kind in each]
        states = {key: store.read(found[key]) for key, _ in pairs if key in found}
        new = {key: content for key, content in pairs if key not in found and content is not None}
        if new:
            encoded = self.states.encode(kind, list(new.values()))
            states |= {key: each.astype(store.dtype) for key, each in zip(new, encoded, strict=True)}
        return states

    @torch.no_grad()
    def _answer(self, views: list[View], states: dict[str, dict[str, np.ndarray]]) -> None:
        views = [seen for seen in views if all(self._is_known(seen, kind, states) for kind in states)]
        if not views:
            return
        inputs: dict[str, torch.Tensor] = {}
        for kind, known in states.items():
            nothing = self.states.stores[kind].empty()
            rows = [known.get(getattr(seen, kind) or "", nothing) for seen in views]
            inputs[f"{kind}_states"], inputs[MASK_NAMES[kind]] = pad_states(rows)
        device = self.teacher.device
        inputs = {name: value.to(device) for name, value in inputs.items()}
        logits = self.teacher(**inputs, use_openmax=False).logits.float().cpu().numpy()
        for seen, row in zip(views, logits, strict=True):
            self.store.add(seen.key, row[None], 0, f"clip {seen.number}")

    @staticmethod
    def _is_known(seen: View, kind: str, states: dict[str, dict[str, np.ndarray]]) -> bool:
        return getattr(seen, kind) is None or getattr(seen, kind) in states[kind]


class DistilledDataset(CachedStatesDataset):
    """
    `CachedStatesDataset` whose examples also have `teacher_logits` ([C] float32): what the teacher answers to exactly
    what the student sees, the same augmented copy without the modality that was dropped.

    Args:
        dataset, cache, augmented_copies: as in `CachedStatesDataset`.
        teacher: the teacher's logits.
    Raises:
        ValueError: the audio encoder of the student is not frozen: new augmentation in each epoch would need new
            logits; or the teacher lacks an encoder.
    """

    def __init__(
        self, dataset: EmotionDataset, cache: EncoderStateCache, augmented_copies: int, teacher: TeacherLogits
    ):
        super().__init__(dataset, cache, augmented_copies)
        if self.reader.use_audio and "audio" in self.columns and "audio" not in self.stores:
            raise ValueError(NEEDS_FROZEN_AUDIO)
        self._logits = teacher.of(self)

    def _example(self, index: int, rng: np.random.Generator, turn: int) -> dict[str, Any]:
        example = super()._example(index, rng, turn)
        has_audio, has_text = (self._shows(example, kind) for kind in MASK_NAMES)
        view = VIEWS.index("both" if has_audio and has_text else "audio" if has_audio else "text")
        return {**example, "teacher_logits": self._logits[turn % len(self._logits), index, view]}

    @staticmethod
    def _shows(example: dict[str, Any], kind: str) -> bool:
        if f"{kind}_states" in example:
            return len(example[f"{kind}_states"]) > 0
        return bool((example.get(kind) or "").strip())

    def views(self) -> dict[tuple[int, int, str], View]:
        """What may be shown of each clip: (copy, index, view) -> its view."""
        reader, views = self.reader, {}
        copies = range(self.augmented_copies) if self.augmented_copies else (None,)
        for copy in copies:
            for index, content in enumerate(self.contents):
                if self._bad[index]:
                    continue
                audio = self._key("audio", index, copy, content["audio"])
                text = content["text"]
                shown: dict[str, tuple] = {"both": (audio, text)} if audio and text else {}
                if audio and (not text or (reader.training and reader.text_dropout)):
                    shown["audio"] = audio, None
                if text and (not audio or (reader.training and reader.audio_dropout)):
                    shown["text"] = None, text
                for view, (own_audio, own_text) in shown.items():
                    views[copy or 0, index, view] = View(own_audio, own_text, index, copy)
        return views
