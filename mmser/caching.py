# SPDX-License-Identifier: Apache-2.0
"""States of frozen encoders, computed once and kept on disk: an epoch then costs only the parts that are trained.

1. `StateStore`: the arrays of one encoder, in safetensors files that are checked before they are used
2. `EncoderStateCache`: the stores of a model's frozen encoders, and how they are filled
3. `CachedStatesDataset`: an `EmotionDataset` whose examples have states in place of the audio, the text or both
"""

import hashlib
import json
import os
import shutil
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
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from mmser.augmentation import augmentation_generator
from mmser.bad_rows import skip_or_raise
from mmser.batches import MASK_NAMES
from mmser.examples import NUM_THREADS, EmotionDataset, map_in_threads, targets_of
from mmser.files import hidden_path, kept, naming_full_disk, remove_remains, usual_mode
from mmser.targets import COLUMN as TARGETS
from processing_mmser import MAX_TEXT_TOKENS, MMSERProcessor

logger = logging.get_logger(__name__)

FORMAT_VERSION = 2  # raise it whenever the same inputs would give other states
TEXT_BUDGET = 2**14  # letters in a batch of texts, padding included
BATCHES_AHEAD = 2  # that are read while one is encoded


def _checksum(content: Any) -> str:
    return hashlib.blake2b(content, digest_size=20).hexdigest()


def hash_of(*parts: Any) -> str:
    """The checksum of values that JSON can write."""
    return _checksum(json.dumps(parts, sort_keys=True, default=str).encode())


class Place(NamedTuple):
    """Where the states of a clip are: file (-1: they are nowhere), first row, rows; and the samples of the clip."""

    shard: int = -1
    start: int = 0
    rows: int = 0
    samples: int = 0


class StateStore:
    """Arrays [rows, *row_shape] by key, many to a file, read through memory maps.

    A file gets the checksum of its bytes as its name once it is complete. So a damaged file is noticed, and processes
    that write at the same time cannot overwrite each other. A store takes no arrays along when it is sent to a
    DataLoader worker: each worker maps the files itself.

    Args:
        folder: made if it does not exist.
        row_shape: shape of one row.
        dtype: "float16" or "float32".
        shard_bytes: largest size of a file with more than one clip. Twice as much memory is needed to write it.
    """

    def __init__(self, folder: str | os.PathLike, row_shape: tuple[int, ...], dtype: str, shard_bytes: int):
        self.folder = Path(folder)
        self.row_shape = row_shape
        self.dtype = np.dtype(dtype)
        self.shard_bytes = shard_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_remains(self.folder / "*")
        self._names: list[str] = []  # a shard's number is its index here
        self._indices: dict[int, dict[str, Place]] = {}  # what each shard holds
        self._verified: set[int] = set()
        self._maps: dict[int, np.ndarray] = {}
        self._pending: dict[str, tuple[np.ndarray, int]] = {}  # states and samples, not yet written
        self._pending_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_indices": {}, "_maps": {}, "_pending": {}}

    def find(self, keys: Iterable[str]) -> dict[str, Place]:
        """Look for keys, also in files that another process has added meanwhile.

        Files that hold one of the keys are compared with their checksum, once in the life of this object; a damaged
        one is deleted with a warning.
        """
        self._look_for_shards()
        keys = set(keys)
        holding = [shard for shard, index in self._indices.items() if keys & index.keys()]
        unverified = [shard for shard in holding if shard not in self._verified]
        with ThreadPool(NUM_THREADS) as pool:
            checksums = pool.map(self._checksum_of, unverified)
        for shard, checksum in zip(unverified, checksums, strict=True):
            if checksum == self._names[shard]:
                self._verified.add(shard)
            else:
                self._discard(self._names[shard])
                del self._indices[shard]
        return {key: index[key] for index in self._indices.values() for key in keys & index.keys()}

    def read(self, place: Place) -> np.ndarray:
        """A view [rows, *row_shape] of the file; nothing is read before it is looked at."""
        if place.rows == 0:
            return self.empty()
        if place.shard not in self._maps:
            with safe_open(self._path(self._names[place.shard]), "pt") as file:
                states = file.get_tensor("states").numpy()
            states.flags.writeable = False
            self._maps[place.shard] = states
        return self._maps[place.shard][place.start : place.start + place.rows]

    def empty(self) -> np.ndarray:
        """The array of what is missing: no rows."""
        return np.empty((0, *self.row_shape), dtype=self.dtype)

    def add(self, key: str, states: np.ndarray, samples: int, name: str) -> None:
        """Keep an array; it is on disk after `flush` at the latest. An error calls it `name`."""
        largest, limit = np.abs(states).max(initial=0), np.finfo(self.dtype).max
        if not largest <= limit:
            reason = "NaN or infinite" if not np.isfinite(largest) else f"as large as {largest:g}"
            advice = f'; {self.dtype} ends at {limit:g}: use dtype="float32"' if np.isfinite(largest) else ""
            raise ValueError(f"{name}: the states of its encoder are {reason}{advice}.")
        if self._pending and self._pending_bytes + states.size * self.dtype.itemsize > self.shard_bytes:
            self.flush()
        self._pending[key] = (states.astype(self.dtype), samples)
        self._pending_bytes += self._pending[key][0].nbytes

    def flush(self) -> None:
        """Write the arrays that were added since the last call to one file."""
        if not self._pending:
            return
        index, start = {}, 0
        for key, (states, samples) in self._pending.items():
            index[key] = [start, len(states), samples]
            start += len(states)
        # A folder: safetensors first writes a file of its own beside, and leaves it there when it is killed
        hidden = hidden_path(self.folder / uuid.uuid4().hex)
        temporary = hidden / "states.safetensors"
        try:
            with kept(hidden), naming_full_disk(self.folder):
                hidden.mkdir()
                states = np.concatenate([states for states, _ in self._pending.values()])
                with usual_mode(temporary):
                    save_file({"states": states}, temporary, {"index": json.dumps(index)})
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, self._path(_checksum(np.memmap(temporary, np.uint8, "r"))))
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
        self._pending, self._pending_bytes = {}, 0

    def num_bytes(self) -> int:
        """Size of all files, in bytes."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _look_for_shards(self) -> None:
        known = {self._names[shard] for shard in self._indices}
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.stem in known:
                continue
            shard = len(self._names)
            try:
                with safe_open(path, "np") as file:
                    stored = json.loads(file.metadata()["index"])
                    fits = file.get_slice("states").get_shape()[1:] == list(self.row_shape)
                index = {key: Place(shard, *place) for key, place in stored.items()}
            except FileNotFoundError:  # another process found it damaged
                continue
            except (SafetensorError, ValueError, KeyError, TypeError, AttributeError):  # damaged
                fits = False
            if fits:
                self._indices[shard] = index
                self._names.append(path.stem)
            else:
                self._discard(path.stem)

    def _checksum_of(self, shard: int) -> str | None:
        try:
            return _checksum(np.memmap(self._path(self._names[shard]), np.uint8, "r"))
        except FileNotFoundError:
            return None

    def _discard(self, name: str) -> None:
        logger.warning(f"{self._path(name)} is damaged: it is deleted, and its clips are encoded again.")
        self._path(name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Clip:
    """The audio or text of row `index`, to be encoded: copy number `copy` of its augmented copies (None: as it is)."""

    key: str
    row: str  # where it is, for messages
    index: int
    copy: int | None
    length: int  # samples or letters: clips of about the same length share a batch


class EncoderStateCache:
    """The states of a model's frozen encoders on disk: `folder/audio-<hash>` and `folder/text-<hash>`.

    The hash covers everything that decides the states of a clip: the encoder's weights and configuration, the
    precision, the settings of the feature extractor or the tokenizer. So states of another encoder are never used.

    Args:
        folder: where the cache is; many models and data sets may share it.
        model: `MMSERForAudioClassification` or `MMSERModel`. Its frozen encoders run on the device that it is on when
            a data set is made, and must stay as they are.
        processor: the processor of the model.
        dtype: precision of the states on disk, "float16" or "float32".
        autocast: `torch.bfloat16` or `torch.float16` to run the encoders in mixed precision.
        batch_seconds: audio in a batch, padding included, in seconds; it bounds the memory.
        shard_bytes: size of a file.

    Raises:
        ValueError: if no encoder is frozen, or for another `dtype`.
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
        self.processor = processor
        self.autocast = autocast
        self.batch_seconds = batch_seconds
        frozen = self.model.frozen_encoders()
        kinds = [kind for kind in MASK_NAMES if kind in frozen and kind in processor.modalities]
        if not kinds:
            raise ValueError("States can only be kept of encoders that are frozen: freeze one or both of them first.")
        row_shapes: dict[str, tuple[int, ...]] = {}
        if "audio" in kinds:
            row_shapes["audio"] = tuple(self.model.state_norm.mean.shape)  # layers, size
        if "text" in kinds:
            row_shapes["text"] = (cast(Any, model.config).text_config.hidden_size,)
        precision = [self.model.dtype, autocast, dtype]
        self.stores: dict[str, StateStore] = {}
        for kind in kinds:
            encoder = weights_hash(getattr(self.model, f"{kind}_encoder"))
            settings = processor.feature_extractor.to_dict() if kind == "audio" else _text_settings(processor)
            name = hash_of(FORMAT_VERSION, kind, encoder, row_shapes[kind], precision, settings)[:20]
            self.stores[kind] = StateStore(Path(folder) / f"{kind}-{name}", row_shapes[kind], dtype, shard_bytes)
        self.told = set[str]()  # what was said once: the first, the training clips, are the most

    def fill(self, kind: str, clips: Sequence[Clip], read: Callable[[Clip], Any]) -> int:
        """Encode clips and put them into the store; states that were computed stay there if this is interrupted.

        Args:
            kind: "audio" or "text".
            clips: the clips to encode.
            read: gives the waveform or the text of a clip, or None to leave the clip out. Runs in threads.

        Returns:
            How many clips were encoded.
        """
        store = self.stores[kind]
        budget: float = TEXT_BUDGET
        if kind == "audio":
            budget = self.batch_seconds * self.processor.feature_extractor.sampling_rate
        was_training, done = self.model.training, 0
        self.model.eval()
        try:
            with logging.tqdm(desc=f"Encoding {kind}", total=len(clips), leave=False) as progress:
                for batch, contents in read_ahead(in_batches(clips, budget), read):
                    pairs = [pair for pair in zip(batch, contents, strict=True) if pair[1] is not None]
                    states = self.encode(kind, [content for _, content in pairs]) if pairs else []
                    if pairs and not done:
                        self._check_space(kind, states, [clip for clip, _ in pairs], clips)
                    for (clip, content), array in zip(pairs, states, strict=True):
                        store.add(clip.key, array, len(content) if kind == "audio" else 0, clip.row)
                    done += len(pairs)
                    progress.update(len(batch))
        finally:
            store.flush()
            self.model.train(was_training)
        return done

    def _check_space(self, kind: str, states: list[np.ndarray], encoded: list[Clip], clips: Sequence[Clip]) -> None:
        """Before anything is written, say how large the states of all clips will be, by those of the first batch."""
        store = self.stores[kind]
        size = float(sum(array.size for array in states) * store.dtype.itemsize)
        size *= sum(clip.length for clip in clips) / max(1, sum(clip.length for clip in encoded))
        free = shutil.disk_usage(store.folder).free
        if kind not in self.told:
            logger.info(
                f"The states of {len(clips)} {kind} clips take about {size / 1e6:,.0f} MB in {store.folder.parent}"
            )
            self.told.add(kind)
        if size > free:
            raise ValueError(
                f"The encoder states of {len(clips)} {kind} clips take about {size / 1e9:.1f} GB, but the disk of "
                f"{store.folder} has only {free / 1e9:.1f} GB left. Take fewer augmented copies (--augmented_copies), "
                "another folder (--cache_encoder_states) or none."
            )

    @torch.no_grad()
    def encode(self, kind: str, contents: list) -> list[np.ndarray]:
        """Waveforms or texts -> the states of each, without padding, float32."""
        if kind == "audio":
            rate = self.processor.feature_extractor.sampling_rate
            inputs: Any = self.processor(audio=contents, sampling_rate=rate)  # type: ignore[call-arg]
        else:
            inputs = self.processor(text=contents)
        device = self.model.device
        # not around the processor: Whisper's log-mel frames are computed by torch too
        with nullcontext() if self.autocast is None else torch.autocast(device.type, self.autocast):
            outputs = self.model.encode(**inputs.to(device))
        states, mask = outputs[f"{kind}_states"], outputs[MASK_NAMES[kind]].bool()
        ends = mask.sum(dim=1).cumsum(dim=0).tolist()
        return np.split(states[mask].float().cpu().numpy(), ends[:-1])


def in_batches(clips: Sequence[Clip], budget: float) -> Iterator[list[Clip]]:
    """Batches of similar length, the longest first; with padding, none but a single clip is larger than `budget`."""
    batch: list[Clip] = []
    for clip in sorted(clips, key=lambda clip: (-clip.length, clip.key)):
        if batch and (len(batch) + 1) * batch[0].length > budget:
            yield batch
            batch = []
        batch.append(clip)
    if batch:
        yield batch


def read_ahead(batches: Iterable[list[Clip]], read: Callable[[Clip], Any]) -> Iterator[tuple[list[Clip], list]]:
    """Each batch with the contents of its clips; threads read the next ones meanwhile."""
    with ThreadPool(NUM_THREADS) as pool:
        waiting: deque = deque()
        for batch in batches:
            waiting.append((batch, pool.map_async(read, batch)))
            if len(waiting) > BATCHES_AHEAD:
                batch, result = waiting.popleft()
                yield batch, result.get()
        for batch, result in waiting:
            yield batch, result.get()


def weights_hash(encoder: PreTrainedModel) -> str:
    """The hash of the configuration, and of the name, type, shape and content of every parameter and buffer."""
    digest = hashlib.blake2b(digest_size=20)
    config = {name: value for name, value in encoder.config.to_dict().items() if name != "_name_or_path"}
    digest.update(hash_of(type(encoder).__name__, config).encode())
    module: nn.Module = encoder
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(hash_of(name, str(tensor.dtype), list(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _text_settings(processor: MMSERProcessor) -> Any:
    """All that decides the tokens of a text."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        for name in ("truncation", "padding"):  # left there by the last call
            rules.pop(name, None)
    else:
        with tempfile.TemporaryDirectory() as folder:
            files = tokenizer.save_vocabulary(folder)
            rules = {Path(file).name: _checksum(Path(file).read_bytes()) for file in files}
    limit = min(tokenizer.model_max_length, MAX_TEXT_TOKENS)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return [type(tokenizer).__name__, rules, limit, tokenizer.truncation_side, special, tokenizer.get_added_vocab()]


class CachedStatesDataset(EmotionDataset):
    """The examples of an `EmotionDataset`, with states of frozen encoders in place of audio and text.

    `audio_states` ([Ta, layers, D]) replace `audio`, `text_states` ([L, D]) replace `text`; no rows mean that the clip
    lacks the modality. A modality whose encoder is not frozen stays as it was.

    The constructor encodes the clips that the cache lacks. The key of a clip is the hash of its file or text and of
    all that is done to it, so a changed file is encoded again. In a distributed run let the main process construct it
    first (`accelerator.main_process_first()`).

    Modalities are dropped on reading, as in the data set given. Augmentation and random crops are made beforehand:
    copy c is the clip as the data set given has it in epoch c, and epoch e reads copy `e % augmented_copies`. With as
    many copies as epochs, training is the same as without a cache. A clip that comes again in an epoch reads the next
    copy each time.

    Args:
        dataset: examples for training or evaluation. It is not changed.
        cache: the cache of the model that will see the examples.
        augmented_copies: number of copies of each clip, for training; 0 takes the clips as they are, and the middle of
            long ones.

    Raises:
        TypeError: for a stream, which has no clip i.
        ValueError: if `augmented_copies` is negative, the sampling rate is not the model's, a clip cannot be read
            (unless the data set skips bad examples), or states are too large for the precision of the cache.
    """

    def __init__(self, dataset: EmotionDataset, cache: EncoderStateCache, augmented_copies: int = 0):
        if not isinstance(dataset, EmotionDataset):
            raise TypeError(f"cached states need an EmotionDataset, got {type(dataset).__name__}")
        if augmented_copies < 0:
            raise ValueError(f"augmented_copies must be at least 0, got {augmented_copies}")
        rate = cache.processor.sampling_rate
        if rate is not None and dataset.reader.sampling_rate != rate:
            raise ValueError(f"the model takes audio of {rate} Hz, the data set has {dataset.reader.sampling_rate} Hz")
        super().__init__(dataset.dataset, dataset.seed, dataset.on_bad_example)
        self.reader = dataset.reader
        is_random = self.reader.training and (self.reader.augmenter is not None or self.reader.max_samples is not None)
        self.augmented_copies = augmented_copies if is_random else 0
        self.columns = [kind for kind in MASK_NAMES if kind in dataset.dataset.column_names]
        self.stores = {kind: store for kind, store in cache.stores.items() if kind in self.columns}
        names = [name for name in ("labels", "class_shares", TARGETS) if name in dataset.dataset.column_names]
        self._targets = [targets_of(row) for row in dataset.dataset.select_columns(names)]
        self._bad = np.zeros(len(self), dtype=bool)
        self._present = np.zeros((len(self), 2), dtype=bool)  # has audio, has text

        start = time.perf_counter()
        self.contents = map_in_threads(self._hash_row, len(self), "hashing clips")  # checksums by kind, or None
        self._places: dict[str, np.ndarray] = {}  # of each kind [copies, N, 4], see `Place`
        reports = [self._encode_missing(kind, cache, [row[kind] for row in self.contents]) for kind in self.stores]
        self._skipped |= torch.from_numpy(self._bad)
        seconds = time.perf_counter() - start
        if "report" not in cache.told or not all(each.startswith("0 of") for each in reports):
            logger.info(f"Encoder states of {len(self)} clips: {'; '.join(reports)}; {seconds:.1f} s")
            cache.told.add("report")

    def _example(self, index: int, rng: np.random.Generator, turn: int) -> dict[str, Any]:
        if self._bad[index]:
            raise ValueError(f"{self.dataset[index]['row']} could not be encoded")
        if "audio" in self.columns and "audio" not in self.stores:
            example = self.reader(self.dataset[index], rng)
            has_audio, has_text = example["audio"] is not None, example.pop("text", None) is not None
        else:
            audio, text = self._present[index].tolist()
            has_audio, has_text = self.reader.draw_modalities(audio, text, rng)
            example = {**self._targets[index], "length": 0}
            if not has_audio and not has_text:
                raise ValueError(f"{self.dataset[index]['row']} has neither audio nor text")
        for kind, is_seen in (("audio", has_audio), ("text", has_text)):
            if kind in self.stores:
                copy = turn % len(self._places[kind])
                place = Place(*self._places[kind][copy, index].tolist()) if is_seen else Place()
                example[f"{kind}_states"] = self.stores[kind].read(place)
                example["length"] = max(example["length"], place.samples)
        if "text" in self.columns and "text" not in self.stores:
            example["text"] = self.dataset[index]["text"] if has_text else None
        return example

    def _hash_row(self, index: int) -> dict[str, str | None]:
        """Hashes of the audio and the text of a row, None if there is nothing to encode."""
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

    def _encode_missing(self, kind: str, cache: EncoderStateCache, hashes: list[str | None]) -> str:
        """Encode the clips that the cache lacks, note where the states of all are, and report the numbers."""
        store = self.stores[kind]
        copies = range(self.augmented_copies) if kind == "audio" and self.augmented_copies else (None,)
        keys = [[self._key(kind, index, copy, content) for index, content in enumerate(hashes)] for copy in copies]
        wanted = {
            key: (index, copy) for copy, row in zip(copies, keys, strict=True) for index, key in enumerate(row) if key
        }
        places = store.find(wanted)
        missing = {key: clip for key, clip in wanted.items() if key not in places}
        num_found, num_encoded = len(places), 0
        if missing:
            rows = list(self.dataset["row"])
            lengths = self.lengths if kind == "audio" else [len(text or "") for text in self.dataset["text"]]
            clips = [Clip(key, rows[index], index, copy, lengths[index]) for key, (index, copy) in missing.items()]
            num_encoded = cache.fill(kind, clips, lambda clip: self.read_content(kind, clip))
            places = store.find(wanted)
        found = [[places.get(key or "", Place()) for key in row] for row in keys]
        self._places[kind] = np.array(found, dtype=np.int64).reshape(len(keys), len(self), len(Place._fields))
        has_content = np.array([content is not None for content in hashes], dtype=bool)
        self._bad |= has_content & (self._places[kind][..., 0] < 0).any(axis=0)
        return f"{num_encoded} of {kind} encoded, {num_found} reused, {store.num_bytes() / 1e6:.1f} MB"

    def _key(self, kind: str, index: int, copy: int | None, content: str | None) -> str | None:
        if content is None or kind == "text":
            return content
        settings = [content, self.reader.sampling_rate, self.reader.max_samples]
        if copy is not None:
            draws_dropout = self.reader.use_text and bool(self._present[index].all())  # it is drawn first
            settings += [repr(self.reader.augmenter), self.seed, copy, index, draws_dropout]
        return hash_of(*settings)

    def read_content(self, kind: str, clip: Clip) -> Any:
        """The waveform or the text of a clip; None if its audio cannot be read, which is noted."""
        return self._read_audio(clip) if kind == "audio" else self.dataset[clip.index]["text"]

    def _read_audio(self, clip: Clip) -> np.ndarray | None:
        reader = replace(self.reader, training=False) if clip.copy is None else self.reader
        rng = augmentation_generator(self.seed, clip.copy or 0, clip.index)
        try:
            return reader.waveform(self.dataset[clip.index], rng)
        except ValueError as error:
            self._note_bad(clip.index, error)
            return None

    def _note_bad(self, index: int, error: ValueError) -> None:
        skip_or_raise(error, self.on_bad_example)
        self._bad[index] = True
