# SPDX-License-Identifier: Apache-2.0
"""States of frozen encoders, computed once and kept on disk: epochs then cost only what is trained.

1. `StateStore`: arrays of one encoder in memory-mapped safetensors files that are checked before they are believed
2. `EncoderStateCache`: the stores of a model's frozen encoders, and how they are filled
3. `CachedStatesDataset`: an `EmotionDataset` whose examples have states in place of the audio, the text or both
"""

import hashlib
import json
import os
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from mmser.augmentation import augmentation_generator
from mmser.examples import EmotionDataset
from processing_mmser import MAX_TEXT_TOKENS, MMSERProcessor

logger = logging.get_logger(__name__)
FORMAT_VERSION = 1  # raise it whenever the same inputs would give other states
MASK_NAMES = {"audio": "attention_mask", "text": "text_attention_mask"}
NUM_THREADS = 8


class Place(NamedTuple):
    """Where the states of a clip are: file (-1: nowhere, there are none), first row, rows; and its samples."""

    shard: int = -1
    start: int = 0
    rows: int = 0
    samples: int = 0


class StateStore:
    """
    Arrays [rows, *row_shape] by key, many to a file, read through memory maps.

    A file is named after the checksum of all its bytes and gets that name when it is whole. So a file that was cut
    short or changed is found out, and processes that write at once cannot overwrite each other. Travels to DataLoader
    workers as a few numbers: each maps the files anew.

    Args:
        folder: made if it does not exist.
        row_shape: shape of one row.
        dtype: "float16" or "float32".
        shard_bytes: largest size of a file with more than one clip. So much is held in memory before it is written.
    """

    def __init__(self, folder: str | os.PathLike, row_shape: tuple[int, ...], dtype: str, shard_bytes: int):
        self.folder = Path(folder)
        self.row_shape = row_shape
        self.dtype = np.dtype(dtype)
        self.shard_bytes = shard_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._names: list[str] = []  # a shard's number is its index here
        self._indices: dict[int, dict[str, list[int]]] = {}  # of each shard: start, rows and samples by key
        self._verified: set[int] = set()
        self._maps: dict[int, np.ndarray] = {}
        self._pending: dict[str, tuple[np.ndarray, int]] = {}  # states and samples, not yet written
        self._pending_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_indices": {}, "_maps": {}, "_pending": {}}

    def find(self, keys: Iterable[str]) -> dict[str, Place]:
        """
        Look for keys, also in files that another process has added meanwhile.

        Files that hold one of the keys are compared with their checksum, once in the life of this object; a damaged
        one is deleted with a warning.
        """
        self._look_for_shards()
        keys = set(keys)
        while True:
            found = {
                key: Place(shard, *index[key]) for shard, index in self._indices.items() for key in keys & index.keys()
            }
            unverified = sorted({place.shard for place in found.values()} - self._verified)
            if not unverified:
                return found
            with ThreadPool(NUM_THREADS) as pool:
                checksums = pool.map(self._checksum_of, unverified)
            for shard, checksum in zip(unverified, checksums, strict=True):
                if checksum == self._names[shard]:
                    self._verified.add(shard)
                else:
                    self._discard(self._names[shard])
                    del self._indices[shard]

    def read(self, place: Place) -> np.ndarray:
        """A view [rows, *row_shape] of the file; nothing is read before it is looked at."""
        if place.rows == 0:
            return np.empty((0, *self.row_shape), dtype=self.dtype)
        if place.shard not in self._maps:
            path = self._path(self._names[place.shard])
            header, size = _read_header(path)
            self._maps[place.shard] = np.asarray(
                np.memmap(path, self.dtype, "r", offset=size, shape=tuple(header["states"]["shape"]))
            )
        return self._maps[place.shard][place.start : place.start + place.rows]

    def add(self, key: str, states: np.ndarray, samples: int, name: str) -> None:
        """Put an array away; it is on disk after `flush` at the latest. Errors call it `name`."""
        largest, limit = np.abs(states).max(initial=0), np.finfo(self.dtype).max
        if not largest <= limit:
            reason = "NaN or infinite" if not np.isfinite(largest) else f"as large as {largest:g}"
            advice = f'; {self.dtype} ends at {limit:g}: use dtype="float32"' if np.isfinite(largest) else ""
            raise ValueError(f"{name}: the states of its encoder are {reason}{advice}.")
        if self._pending and self._pending_bytes + states.size * self.dtype.itemsize > self.shard_bytes:
            self.flush()
        self._pending[key] = (states.astype(self.dtype, order="C"), samples)
        self._pending_bytes += self._pending[key][0].nbytes

    def flush(self) -> None:
        """Write what is waiting."""
        if not self._pending:
            return
        arrays = [states for states, _ in self._pending.values()]
        parts: list[Any] = [*_write_header(self._pending, arrays), *arrays]
        digest = _new_hash()
        for part in parts:
            digest.update(part)
        temporary = self.folder / f"{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path(digest.hexdigest()))
        finally:
            temporary.unlink(missing_ok=True)
        self._pending, self._pending_bytes = {}, 0

    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _look_for_shards(self) -> None:
        known = {self._names[shard] for shard in self._indices}
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.stem in known:
                continue
            try:
                header, _ = _read_header(path)
                stored = json.loads(header["__metadata__"]["index"])
                index = {key: [start, rows, samples] for key, (start, rows, samples) in stored.items()}
                fits = header["states"]["shape"][1:] == list(self.row_shape)
            except FileNotFoundError:  # another process found it damaged
                continue
            except (ValueError, KeyError, TypeError, AttributeError):  # as the checksum is not yet looked at
                fits = False
            if not fits:
                self._discard(path.stem)
                continue
            self._indices[len(self._names)] = index
            self._names.append(path.stem)

    def _checksum_of(self, shard: int) -> str | None:
        try:
            content = np.memmap(self._path(self._names[shard]), np.uint8, "r")
        except (FileNotFoundError, ValueError):  # it is gone, or empty
            return None
        return _checksum(content)

    def _discard(self, name: str) -> None:
        logger.warning(f"{self._path(name)} is damaged: it is deleted, and its clips are encoded again.")
        self._path(name).unlink(missing_ok=True)


def _write_header(clips: dict[str, tuple[np.ndarray, int]], arrays: list[np.ndarray]) -> tuple[bytes, bytes]:
    """Length and header of a safetensors file with the rows of all arrays as one tensor, `states`."""
    index, rows = {}, 0
    for key, (array, samples) in clips.items():
        index[key] = [rows, len(array), samples]
        rows += len(array)
    states = {
        "dtype": {"float16": "F16", "float32": "F32"}[arrays[0].dtype.name],
        "shape": [rows, *arrays[0].shape[1:]],
        "data_offsets": [0, sum(array.nbytes for array in arrays)],
    }
    header = json.dumps({"__metadata__": {"index": json.dumps(index)}, "states": states}).encode()
    header += b" " * (-len(header) % 8)  # aligned, as the format wants the data to be
    return len(header).to_bytes(8, "little"), header


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and where its data begin. Raises ValueError if it has none."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path} is cut short")
        return json.loads(file.read(length)), 8 + length


def _new_hash() -> Any:
    return hashlib.blake2b(digest_size=20)


def _checksum(content: Any) -> str:
    digest = _new_hash()
    digest.update(content)
    return digest.hexdigest()


def _hash(*parts: Any) -> str:
    """Of values that JSON can write."""
    return _checksum(json.dumps(parts, sort_keys=True, default=str).encode())


@dataclass(frozen=True)
class _Clip:
    """Something to encode: the audio or text of row `index`, `copy` of its augmented copies (None: as it is)."""

    key: str
    row: str  # what messages call it
    index: int
    copy: int | None
    length: int  # samples or letters: batches are made of what is about as long


class EncoderStateCache:
    """
    The states of a model's frozen encoders on disk: `folder/audio-<hash>` and `folder/text-<hash>`.

    The hash is that of all that decides the states of a clip: the encoder's weights and configuration, precision, the
    settings of the feature extractor or the tokenizer. So states of another encoder are never used.

    Args:
        folder: of the cache; may be shared by many models and data sets.
        model: `MMSERForAudioClassification` or `MMSERModel`. Its frozen encoders are run on the device that it is on
            when a data set is made, and must stay as they are.
        processor: the processor of the model.
        dtype: precision in which states are kept, "float16" or "float32".
        autocast: `torch.bfloat16` or `torch.float16` to run the encoders in mixed precision.
        batch_seconds: audio per batch, padding included; it bounds the memory.
        shard_bytes: size of the files.

    Raises:
        ValueError: no encoder is frozen, or another `dtype`.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        model: PreTrainedModel,
        processor: MMSERProcessor,
        dtype: str = "float16",
        autocast: torch.dtype | None = None,
        batch_seconds: float = 160.0,
        shard_bytes: int = 2**28,
    ):
        if dtype not in ("float16", "float32"):
            raise ValueError(f'`dtype` must be "float16" or "float32", got {dtype!r}.')
        self.model = cast(Any, model.base_model)
        config = cast(Any, model.config)
        self.processor = processor
        self.autocast = autocast
        self.batch_seconds = batch_seconds
        frozen = self.model.frozen_encoders()
        kinds = [kind for kind in MASK_NAMES if kind in frozen]
        if not kinds:
            raise ValueError("States can only be kept of encoders that are frozen: freeze one or both of them first.")
        num_layers, audio_size = self.model.state_norm.mean.shape
        row_shapes = {"audio": (num_layers, audio_size), "text": (config.text_config.hidden_size,)}
        self.stores: dict[str, StateStore] = {}
        for kind in kinds:
            encoder = getattr(self.model, f"{kind}_encoder")
            settings = _audio_settings(processor) if kind == "audio" else _text_settings(processor)
            precision = [self.model.dtype, autocast, dtype]
            name = _hash(FORMAT_VERSION, kind, _encoder_hash(encoder), row_shapes[kind], precision, settings)[:20]
            self.stores[kind] = StateStore(Path(folder) / f"{kind}-{name}", row_shapes[kind], dtype, shard_bytes)

    def fill(self, kind: str, clips: Sequence[_Clip], read: Callable[[_Clip], Any]) -> int:
        """
        Encode clips and put them into the store; what was encoded stays there if this is interrupted.

        Args:
            read: gives the waveform or the text of a clip, or None for one that is to be left out. Runs in threads.
        Returns: how many clips were encoded.
        """
        store = self.stores[kind]
        budget = self.batch_seconds * self.processor.feature_extractor.sampling_rate if kind == "audio" else 2**14
        was_training, done = self.model.training, 0
        self.model.eval()
        progress = logging.tqdm(desc=f"Encoding {kind}", total=len(clips), leave=False)
        try:
            for batch, contents in _read_ahead(_batches(clips, budget), read):
                pairs = [pair for pair in zip(batch, contents, strict=True) if pair[1] is not None]
                if pairs:
                    states = self._encode(kind, [content for _, content in pairs])
                    for (clip, content), array in zip(pairs, states, strict=True):
                        store.add(clip.key, array, len(content) if kind == "audio" else 0, clip.row)
                done += len(pairs)
                progress.update(len(batch))
        finally:
            progress.close()
            store.flush()
            self.model.train(was_training)
        return done

    @torch.no_grad()
    def _encode(self, kind: str, contents: list) -> list[np.ndarray]:
        """Waveforms or texts -> the states of each, without padding, in the precision of the store."""
        if kind == "audio":
            rate = self.processor.feature_extractor.sampling_rate
            inputs: Any = self.processor(audio=contents, sampling_rate=rate)  # type: ignore[call-arg]
        else:
            inputs = self.processor(text=contents)
        device = self.model.device
        # Not around the processor: Whisper's log-mel frames are computed by torch too
        with nullcontext() if self.autocast is None else torch.autocast(device.type, self.autocast):
            outputs = self.model.encode(**inputs.to(device))
        states, mask = outputs[f"{kind}_states"], outputs[MASK_NAMES[kind]].bool()
        valid = states[mask].float().cpu().numpy()
        ends = mask.sum(dim=1).cumsum(dim=0).tolist()
        return np.split(valid, ends[:-1])


def _batches(clips: Sequence[_Clip], budget: float) -> Iterator[list[_Clip]]:
    """Batches of similar length, the longest first, none of which is larger than `budget` when padded, if it can."""
    batch: list[_Clip] = []
    for clip in sorted(clips, key=lambda clip: (-clip.length, clip.key)):
        if batch and (len(batch) + 1) * batch[0].length > budget:
            yield batch
            batch = []
        batch.append(clip)
    if batch:
        yield batch


def _read_ahead(batches: Iterable[list[_Clip]], read: Callable[[_Clip], Any]) -> Iterator[tuple[list[_Clip], list]]:
    """Each batch with what was read of its clips; threads read the next two meanwhile."""
    with ThreadPool(NUM_THREADS) as pool:
        waiting: deque = deque()
        for batch in batches:
            waiting.append((batch, pool.map_async(read, batch)))
            if len(waiting) > 2:
                batch, result = waiting.popleft()
                yield batch, result.get()
        for batch, result in waiting:
            yield batch, result.get()


def _encoder_hash(encoder: PreTrainedModel) -> str:
    """Over the configuration, and the name, type, shape and content of every parameter and buffer."""
    digest = _new_hash()
    config = {name: value for name, value in encoder.config.to_dict().items() if name != "_name_or_path"}
    digest.update(_hash(type(encoder).__name__, config).encode())
    module: nn.Module = encoder
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(_hash(name, str(tensor.dtype), list(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _audio_settings(processor: MMSERProcessor) -> Any:
    return processor.feature_extractor.to_dict()


def _text_settings(processor: MMSERProcessor) -> Any:
    """What decides the tokens of a text."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # these are left there by the last call
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        with tempfile.TemporaryDirectory() as folder:
            files = tokenizer.save_vocabulary(folder)
            rules = {Path(file).name: _checksum(Path(file).read_bytes()) for file in files}
    limit = min(tokenizer.model_max_length, MAX_TEXT_TOKENS)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return [type(tokenizer).__name__, rules, limit, tokenizer.truncation_side, special, tokenizer.get_added_vocab()]


class CachedStatesDataset(EmotionDataset):
    """
    The examples of an `EmotionDataset` with states of frozen encoders: `audio_states` ([Ta, layers, D]) in place of
    `audio`, `text_states` ([L, D]) in place of `text`. No rows mean that the clip lacks the modality. With one encoder
    frozen the other modality stays as it was.

    Making one encodes what the cache lacks: a key is the hash of the encoded file or the text and of all that is done
    to it, so that a changed file is encoded anew. In a distributed run let the main process make it first
    (`accelerator.main_process_first()`).

    Modalities are dropped in reading, as in the data set given. Augmentation and random crops are made beforehand:
    epoch e of a data set for training reads copy `e % augmented_copies`, which is what the data set given has in epoch
    `e % augmented_copies`. So with as many copies as epochs, training is the same as without a cache.

    Args:
        dataset: examples for training or evaluation. It is not changed.
        cache: of the model that is to see the examples.
        augmented_copies: of each clip, for training; 0 takes the clips as they are, and the middle of long ones.

    Raises:
        TypeError: for a stream, which has no clip i.
        ValueError: negative `augmented_copies`; another sampling rate than the model's; a clip that cannot be read
            (unless `on_bad_example` of the data set is "skip"); states too large for the precision of the cache.
    """

    def __init__(self, dataset: EmotionDataset, cache: EncoderStateCache, augmented_copies: int = 0):
        if not isinstance(dataset, EmotionDataset):
            raise TypeError(f"cached states need an EmotionDataset, got {type(dataset).__name__}")
        if augmented_copies < 0:
            raise ValueError(f"augmented_copies must be at least 0, got {augmented_copies}")
        rate = cache.processor.feature_extractor.sampling_rate
        if dataset.reader.sampling_rate != rate:
            raise ValueError(f"the model takes audio of {rate} Hz, the data set has {dataset.reader.sampling_rate} Hz")
        super().__init__(dataset.dataset, dataset.seed, dataset.on_bad_example)
        self.reader = dataset.reader
        is_random = self.reader.training and (self.reader.augmenter is not None or self.reader.max_samples is not None)
        self.augmented_copies = augmented_copies if is_random else 0
        self.columns = [kind for kind in MASK_NAMES if kind in dataset.dataset.column_names]
        self.stores = {kind: store for kind, store in cache.stores.items() if kind in self.columns}
        self._labels = np.asarray(dataset.dataset["labels"], dtype=np.int64)
        self._bad = np.zeros(len(self), dtype=bool)
        self._present = np.zeros((len(self), 2), dtype=bool)  # has audio, has text
        self._places: dict[str, np.ndarray] = {}  # of each kind [copies, N, 4], see `Place`
        self._build(cache)

    def _example(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        if self._bad[index]:
            raise ValueError(f"{self.dataset[index]['row']} could not be encoded")
        if "audio" in self.columns and "audio" not in self.stores:
            example = self.reader(self.dataset[index], rng)
            has_audio, has_text = example["audio"] is not None, example.pop("text", None) is not None
        else:
            audio, text = self._present[index].tolist()
            has_audio, has_text = self.reader.draw_modalities(audio, text, rng)
            example = {"labels": int(self._labels[index]), "length": 0}
            if not has_audio and not has_text:
                raise ValueError(f"{self.dataset[index]['row']} has neither audio nor text")
        for kind, is_seen in (("audio", has_audio), ("text", has_text)):
            if kind in self.stores:
                copy = int(self._epoch) % len(self._places[kind])
                place = Place(*self._places[kind][copy, index].tolist()) if is_seen else Place()
                example[f"{kind}_states"] = self.stores[kind].read(place)
                example["length"] = max(example["length"], place.samples)
        if "text" in self.columns and "text" not in self.stores:
            example["text"] = self.dataset[index]["text"] if has_text else None
        return example

    def _build(self, cache: EncoderStateCache) -> None:
        """Encode what is missing and note where everything is."""
        start = time.perf_counter()
        with ThreadPool(NUM_THREADS) as pool:
            hashes = pool.imap(self._hash_row, range(len(self)), chunksize=16)
            progress = logging.tqdm(hashes, "hashing clips", len(self), disable=len(self) <= 2000)
            content = list(progress)
        reports = []
        for kind, store in self.stores.items():
            copies = range(self.augmented_copies) if kind == "audio" and self.augmented_copies else (None,)
            keys = [
                [self._key(kind, index, copy, hashes[kind]) for index, hashes in enumerate(content)] for copy in copies
            ]
            wanted = {
                key: (i, copy) for copy, row in zip(copies, keys, strict=True) for i, key in enumerate(row) if key
            }
            places = store.find(wanted)
            num_found, num_encoded = len(places), 0
            missing = {key: clip for key, clip in wanted.items() if key not in places}
            if missing:
                num_encoded = cache.fill(kind, self._clips(kind, missing), getattr(self, f"_read_{kind}"))
                places = store.find(wanted)
            found = [[places.get(key or "", Place()) for key in row] for row in keys]
            self._places[kind] = np.array(found, dtype=np.int64).reshape(len(keys), len(self), len(Place._fields))
            for row in keys:
                self._bad |= np.array([key is not None and key not in places for key in row], dtype=bool)
            reports.append(f"{num_encoded} of {kind} encoded, {num_found} reused, {store.num_bytes() / 1e6:.1f} MB")
        self._skipped |= torch.from_numpy(self._bad)
        seconds = time.perf_counter() - start
        logger.info(f"Encoder states of {len(self)} clips: {'; '.join(reports)}; {seconds:.1f} s")

    def _hash_row(self, index: int) -> dict[str, str | None]:
        """Hashes of the audio and the text of a row, None where there is nothing to encode."""
        row = self.dataset[index]
        text = row.get("text") or ""
        hashes: dict[str, str | None] = {"audio": None, "text": None}
        if text.strip() and self.reader.use_text:
            hashes["text"] = _checksum(text.encode("utf-8", "surrogatepass"))
        if "audio" in self.stores:
            try:
                audio = self.reader.content(row)
                hashes["audio"] = None if audio is None else _checksum(audio)
            except ValueError as error:
                self._note_bad(index, error)
        self._present[index] = hashes["audio"] is not None, bool(text)
        return hashes

    def _key(self, kind: str, index: int, copy: int | None, content: str | None) -> str | None:
        if content is None or kind == "text":
            return content
        settings = [content, self.reader.sampling_rate, self.reader.max_samples]
        if copy is not None:
            # Whether there is a draw for the dropout decides what the augmentation draws
            draws = self.reader.use_text and bool(self._present[index].all())
            settings += [repr(self.reader.augmenter), self.seed, copy, index, draws]
        return _hash(*settings)

    def _clips(self, kind: str, missing: dict[str, tuple[int, int | None]]) -> list[_Clip]:
        rows = list(self.dataset["row"])
        lengths = self.lengths if kind == "audio" else [len(text or "") for text in self.dataset["text"]]
        return [_Clip(key, rows[index], index, copy, lengths[index]) for key, (index, copy) in missing.items()]

    def _read_audio(self, clip: _Clip) -> np.ndarray | None:
        reader = replace(self.reader, training=False) if clip.copy is None else self.reader
        try:
            return reader.waveform(
                self.dataset[clip.index], augmentation_generator(self.seed, clip.copy or 0, clip.index)
            )
        except ValueError as error:
            self._note_bad(clip.index, error)
            return None

    def _read_text(self, clip: _Clip) -> str:
        return self.dataset[clip.index]["text"]

    def _note_bad(self, index: int, error: ValueError) -> None:
        if self.on_bad_example == "error":
            raise error
        self._bad[index] = True
        logger.warning_once(f"skipped: {error}")
