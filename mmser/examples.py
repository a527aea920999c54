# SPDX-License-Identifier: Apache-2.0
"""Rows to examples: decode, crop and augment inside the DataLoader's workers.

Read `ExampleReader` first (one row), then `EmotionDataset`, `EmotionIterableDataset` (streams) and
`TestTimeAugmentation` (each clip several times), then `drop_unreadable` and `class_counts`.
"""

import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import datasets
import fsspec
import numpy as np
import torch
from transformers.utils import logging

from audio_mmser import MIN_SECONDS, audio_length, check_is_file, download, load_audio, read_bounded, read_whole
from mmser.augmentation import Augmenter, augmentation_generator
from mmser.bad_rows import BadRows, rule_of, skip_or_raise
from mmser.targets import COLUMN as TARGETS

logger = logging.get_logger(__name__)

NUM_THREADS = 8  # that read files
SAMPLE_BYTES = 4096  # of a file, to tell it from others
MAX_WORKERS = 256  # of a stream that count skipped rows, each in its own slot
MANY_ROWS = 2000  # from here on a progress bar is shown


def reading_options(modalities: Sequence[str], sampling_rate: int | None) -> dict[str, Any]:
    """
    Options of `ExampleReader` for a model.

    Args:
        modalities: those of "audio" and "text" that it takes.
        sampling_rate: of its audio, in Hz; None if it takes none.
    """
    rate = {} if sampling_rate is None else {"sampling_rate": sampling_rate}
    return {"use_audio": "audio" in modalities, "use_text": "text" in modalities, **rate}


@dataclass
class ExampleReader:
    """Makes an example from a row: decode, crop, augment. Random only if `training`.

    Args:
        sampling_rate: rate of the waveforms, in Hz.
        training: crop at random, augment and drop modalities; False takes the middle of a long clip as it is.
        augmenter: used in training only.
        text_dropout, audio_dropout: probability, in training, to hide the text or the audio (never both) of an
            example that has both.
        max_seconds: longer clips are cropped.
        use_audio, use_text: False hides that modality of every example, to score the other one alone.
    """

    sampling_rate: int = 16_000
    training: bool = False
    augmenter: Augmenter | None = None
    text_dropout: float = 0.0
    audio_dropout: float = 0.0
    max_seconds: float | None = None
    use_audio: bool = True
    use_text: bool = True
    min_samples: int = field(init=False)
    max_samples: int | None = field(init=False, default=None)

    def __post_init__(self):
        self.min_samples = round(MIN_SECONDS * self.sampling_rate)
        if min(self.text_dropout, self.audio_dropout) < 0 or self.text_dropout + self.audio_dropout > 1:
            raise ValueError(
                "text_dropout and audio_dropout must be >= 0 and sum to at most 1, got "
                f"{self.text_dropout} and {self.audio_dropout}"
            )
        if self.max_seconds is not None:
            self.max_samples = round(self.max_seconds * self.sampling_rate)
            if self.max_samples < self.min_samples:
                raise ValueError(f"max_seconds must be at least {MIN_SECONDS}, got {self.max_seconds}")

    def __call__(self, row: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Make the example of one row of `load_emotion_dataset`.

        Returns:
            `labels` (int), `class_shares` ([C] float32) and `auxiliary` (targets by task) if the data set has
            them, `length` (samples, 0 without audio), `audio` ([T] float32 or None) if it has an audio column, and
            `text` (str or None) if it has a text column.

        Raises:
            ValueError: naming the row, if its audio cannot be read or it has neither audio nor text.
        """
        source, text = self.draw_modalities(_audio_source(row), row.get("text"), rng)
        audio = self._waveform(source, row["row"], rng) if source else None
        if audio is None and text is None:
            raise ValueError(f"{row['row']} has {self._missing}")
        example = {**targets_of(row), "length": 0 if audio is None else len(audio)}
        return {**example, **{name: value for name, value in (("audio", audio), ("text", text)) if name in row}}

    @property
    def _missing(self) -> str:
        """What a row lacks that has no example."""
        if self.use_audio and self.use_text:
            return "neither audio nor text"
        return f"no {'audio' if self.use_audio else 'text'}, and nothing else is used"

    def draw_modalities(self, audio: Any, text: Any, rng: np.random.Generator) -> tuple[Any, Any]:
        """Hide the modalities of one example that are switched off or, in training, dropped at random.

        Args:
            audio, text: anything that stands for the two, falsy for a missing one.
            rng: drawn from once in training, if the example has both.

        Returns:
            (audio, text), with None for what is missing, hidden or dropped.
        """
        audio = (audio or None) if self.use_audio else None
        text = (text or None) if self.use_text else None
        if self.training and audio and text:
            draw = rng.random()
            if draw < self.text_dropout:
                text = None
            elif draw < self.text_dropout + self.audio_dropout:
                audio = None
        return audio, text

    def waveform(self, row: dict[str, Any], rng: np.random.Generator) -> np.ndarray | None:
        """The `audio` ([T] float32) that a row's example has when its audio is not dropped; None without audio."""
        source = _audio_source(row)
        self.draw_modalities(source, row.get("text"), rng)  # the crop and the augmentation are drawn after it
        return self._waveform(source, row["row"], rng) if source else None

    def _waveform(self, source: str | bytes, row: str, rng: np.random.Generator) -> np.ndarray:
        with _naming(row, source):
            audio = load_audio(_fetch(source), target_sampling_rate=self.sampling_rate, name=_title(source))
        if len(audio) < self.min_samples:
            raise ValueError(
                f"{row}: {_name(source)} is too short, {len(audio)} samples at {self.sampling_rate} Hz; the minimum "
                f"is {self.min_samples} ({MIN_SECONDS} s)"
            )
        spare = 0 if self.max_samples is None else max(0, len(audio) - self.max_samples)
        if spare:
            start = int(rng.integers(spare + 1)) if self.training else spare // 2
            audio = audio[start : len(audio) - spare + start]
        return self.augment(audio, self.augmenter, rng) if self.training and self.augmenter is not None else audio

    def augment(self, audio: np.ndarray, augmenter: Augmenter, rng: np.random.Generator) -> np.ndarray:
        """Augment a waveform ([T] float32) within the limits of its length; one that gets too short stays as it is."""
        augmented = augmenter(audio, rng)[: self.max_samples]  # slowed down, it can be longer again
        return augmented if len(augmented) >= self.min_samples else audio

    def content(self, row: dict[str, Any]) -> bytes | None:
        """The bytes of the encoded file of a row's audio; None without audio, or if audio is hidden."""
        source = _audio_source(row) if self.use_audio else None
        if source is None:
            return None
        with _naming(row["row"], source):
            content = _fetch(source)
            return content if isinstance(content, bytes) else read_whole(content, f"audio '{content}'")

    def length(self, row: dict[str, Any]) -> int:
        """Samples of a row's clip without augmentation, from the file's header where it is right; 0 without audio."""
        source = _audio_source(row) if self.use_audio else None
        if source is None:
            return 0
        with _naming(row["row"], source):
            samples = audio_length(_fetch(source), self.sampling_rate, name=_title(source))
        return samples if self.max_samples is None else min(samples, self.max_samples)


def targets_of(row: dict[str, Any]) -> dict[str, Any]:
    """What is to be learned of a row: `labels` (int), `class_shares` ([C] float32) of votes, and `auxiliary`."""
    targets: dict[str, Any] = {"labels": int(row["labels"])}
    if TARGETS in row:
        targets[TARGETS] = row[TARGETS]
    if row.get("class_shares") is not None:
        targets["class_shares"] = np.asarray(row["class_shares"], dtype=np.float32)
    return targets


def _audio_source(row: dict[str, Any]) -> str | bytes | None:
    """The audio of a row: encoded bytes if it has them, else a path, else None."""
    audio = row.get("audio")
    if isinstance(audio, dict):
        if audio.get("bytes") == b"":  # not a row without audio: the row would be taken for its text alone
            raise ValueError(f"{row['row']}: the embedded audio is empty, it holds no bytes")
        return audio.get("bytes") or audio.get("path") or None
    return audio or None


def content_sample(row: dict[str, Any]) -> bytes:
    """The size and the middle of the encoded audio of a row, which tell a clip from others; of an address, itself."""
    source = _audio_source(row)
    if source is None or (isinstance(source, str) and "://" in source):
        return (source or "").encode()
    with _naming(row["row"], source), io.BytesIO(source) if isinstance(source, bytes) else _opened(source) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - SAMPLE_BYTES) // 2)
        return size.to_bytes(8, "big") + file.read(SAMPLE_BYTES)


def _opened(path: str) -> BinaryIO:
    return check_is_file(Path(path), f"audio '{path}'")[0].open("rb")


def _fetch(source: str | bytes) -> str | bytes:
    """The bytes behind an address (`hf://`, `zip://`, ... in streamed data sets); paths and bytes as they are."""
    if isinstance(source, str) and "://" in source:
        if source.startswith(("http://", "https://")) and "::" not in source:
            return download(source)
        with fsspec.open(source, "rb") as file:
            return read_bounded(file.read)
    return source


def _name(source: str | bytes) -> str:
    return "embedded audio" if isinstance(source, bytes) else source


def _title(source: str | bytes) -> str:
    """What `load_audio` is to call a source in messages: it adds the path of a file itself."""
    return _name(source) if isinstance(source, bytes) or "://" in source else "audio"


@contextmanager
def _naming(row: str, source: str | bytes) -> Iterator[None]:
    """Errors of reading become ValueErrors that name the row and, once, the file."""
    try:
        yield
    except (ValueError, OSError) as error:
        reason = str(getattr(error, "strerror", None) or error)
        about = "" if _name(source) in reason else f"cannot read {_name(source)}: "
        raise ValueError(f"{row}: {about}{reason}") from error


def map_in_threads(function: Callable[[int], Any], number: int, description: str) -> list:
    """`[function(0), ..., function(number - 1)]`, computed by threads that wait for files, with a progress bar."""
    with ThreadPool(NUM_THREADS) as pool:
        results = pool.imap(function, range(number), chunksize=16)
        return list(logging.tqdm(results, description, number, disable=number <= MANY_ROWS))


class Repeat(NamedTuple):
    """In the place of an index: a clip that an epoch draws again, and how often it came before."""

    clip: int
    number: int


class _SeededExamples:
    """The base of data sets with random access and of streams: an epoch that all workers see, a count of bad rows."""

    _skipped: torch.Tensor

    def __init__(self, dataset: Any, seed: int = 42, on_bad_example: str = "error", **reader_options):
        BadRows(on_bad_example)  # refuses any other word
        self.dataset = dataset
        self.seed = seed
        self.on_bad_example = on_bad_example
        self.reader = ExampleReader(**reader_options)
        # tensors in shared memory: workers, also persistent ones, see a new epoch, and we see which rows they skipped
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw new augmentation from now on, in all workers."""
        self._epoch.fill_(int(epoch))

    @property
    def num_skipped(self) -> int:
        """How many rows were found bad so far; a stream counts them again in each pass."""
        return int(self._skipped.sum())


class EmotionDataset(_SeededExamples, torch.utils.data.Dataset):
    """Examples of a data set with random access. Decoding happens on access, so inside the DataLoader's workers.

    Args:
        dataset: a split of `load_emotion_dataset`.
        seed: with the epoch and the index it decides everything that is random in an example.
        on_bad_example: an unreadable file raises ("error") or is left out of its batch ("skip": a warning names the
            row, `skipped` marks it; `dataset[index]` is None).
        **reader_options: of `ExampleReader`: sampling_rate, training, augmenter, text_dropout, audio_dropout,
            max_seconds, use_audio, use_text.
    """

    def __init__(self, dataset: datasets.Dataset, seed: int = 42, on_bad_example: str = "error", **reader_options):
        super().__init__(dataset, seed, on_bad_example, **reader_options)
        self._skipped = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        self._lengths: list[int] | None = None
        self._ids: dict[str, np.ndarray] = {}  # what `add_ids` adds to each example

    def __len__(self) -> int:
        return len(self.dataset)

    def add_ids(self, column: str) -> list[str]:
        """
        From now on each example says, as `{column}_ids`, which of the values of a column it has; -1 for an empty one.

        Args:
            column: "corpus" or "speaker".

        Returns:
            The values, in the order of their numbers.

        Raises:
            ValueError: if the clips have no such column, or all the same value in it.
        """
        values = list(self.dataset[column]) if column in self.dataset.column_names else []
        names = sorted({value for value in values if value})
        if len(names) < 2:
            found = f"only {names[0]!r}" if names else "none"
            raise ValueError(
                f"The training clips have {found} in the column {column!r}, where at least two are needed. Name the "
                f"column of the table with --{column}_column."
            )
        numbers = {name: number for number, name in enumerate(names)}
        self._ids[f"{column}_ids"] = np.array([numbers.get(value, -1) for value in values], dtype=np.int64)
        return names

    def number_rows(self, is_wanted: bool) -> None:
        """From now on each example says, as `row_ids`, which row it is of; or no longer."""
        self._ids.pop("row_ids", None)
        if is_wanted:
            self._ids["row_ids"] = np.arange(len(self), dtype=np.int64)

    def __getitem__(self, index: int | Repeat) -> dict[str, Any] | None:
        """
        The example (see `ExampleReader`) at `index`, or None if it is bad and `on_bad_example` is "skip". A `Repeat`
        is augmented in another way than the clip itself.
        """
        index, number = index if isinstance(index, Repeat) else (index, 0)
        index, epoch = range(len(self))[index], int(self._epoch)
        try:
            rng = augmentation_generator(self.seed, epoch, index, number)
            example = self._example(index, rng, epoch + number)
        except ValueError as error:
            skip_or_raise(error, self.on_bad_example)
            self._skipped[index] = True
            return None
        return example | {name: int(ids[index]) for name, ids in self._ids.items()} if self._ids else example

    def _example(self, index: int, rng: np.random.Generator, turn: int) -> dict[str, Any]:
        """The example of a row. `turn` says which of several copies made beforehand it is to be."""
        return self.reader(self.dataset[index], rng)

    def __getitems__(self, indices: Sequence[int | Repeat]) -> list[dict[str, Any]]:
        """The good examples among `indices`; if none is good, the next good one, so that no batch is empty."""
        examples = [example for example in map(self.__getitem__, indices) if example is not None]
        for step in range(1, len(self)):
            if examples:
                break
            last = indices[-1].clip if isinstance(indices[-1], Repeat) else indices[-1]
            example = self[(last + step) % len(self)]
            examples = [] if example is None else [example]
        if not examples:
            raise ValueError(f"none of the {len(self)} examples can be read")
        return examples

    @property
    def skipped(self) -> np.ndarray:
        """[N] bool: the rows that were found bad so far."""
        return self._skipped.numpy().copy()

    @property
    def lengths(self) -> list[int]:
        """[N] samples of each clip before augmentation, read from the headers on first use; for length grouping."""
        if self._lengths is None:
            self._lengths = map_in_threads(self._length, len(self), "reading lengths")
        return self._lengths

    def _length(self, index: int) -> int:
        try:
            return self.reader.length(self.dataset[index])
        except ValueError as error:
            skip_or_raise(error, self.on_bad_example)
            return 0


class EmotionIterableDataset(_SeededExamples, torch.utils.data.IterableDataset):
    """Examples of a streamed data set. The workers share its shards.

    Args: as for `EmotionDataset`, with a split of `load_emotion_dataset(..., streaming=True)`. A checksum of the
    content seeds the augmentation of an example, as a stream has no index.
    """

    def __init__(
        self, dataset: datasets.IterableDataset, seed: int = 42, on_bad_example: str = "error", **reader_options
    ):
        super().__init__(dataset, seed, on_bad_example, **reader_options)
        # a slot for each worker: they count at the same time, and a lock could not travel to spawned workers
        self._skipped = torch.zeros(MAX_WORKERS, dtype=torch.int64).share_memory_()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = int(self._epoch)
        worker = torch.utils.data.get_worker_info()
        slot = worker.id % MAX_WORKERS if worker else 0
        for row in self.dataset:
            if row["labels"] is None:  # a bad label, reported when the row was read
                self._skipped[slot] += 1
                continue
            try:
                yield self.reader(row, augmentation_generator(self.seed, epoch, _checksum(row)))
            except ValueError as error:
                skip_or_raise(error, self.on_bad_example)
                self._skipped[slot] += 1

    def set_epoch(self, epoch: int) -> None:
        """Draw new augmentation (and a new order, if the stream is shuffled) from the next pass on."""
        super().set_epoch(epoch)
        self.dataset.set_epoch(epoch)


def _checksum(row: dict[str, Any]) -> int:
    source = _audio_source(row) or b""
    content = source if isinstance(source, bytes) else source.encode()
    return zlib.crc32((row.get("text") or "").encode(), zlib.crc32(content))


class TestTimeAugmentation(torch.utils.data.Dataset):
    """Every clip of a data set `num_passes` times in a row: as it is, then augmented, each time in another way.

    Item i is pass `i % num_passes` of clip `i // num_passes`; its augmentation depends on the seed, the pass and the
    clip alone. Clips without audio are the same in all passes. A clip that cannot be read raises: leave such clips out
    first, with `drop_unreadable`.

    Args:
        dataset: the clips, as they are for evaluation.
        num_passes: passes over each clip, >= 1.
        augmenter: makes passes 1, 2, ...; with a `probability` below 1 it leaves some of them as they are.
        seed: seed of the augmentation.

    Raises:
        TypeError: for a stream, which has no clip i.
        ValueError: if the data set is one for training, which is random itself, or `num_passes` is not positive.
    """

    __test__ = False  # or pytest takes it for a test, by its name

    def __init__(self, dataset: EmotionDataset, num_passes: int, augmenter: Augmenter, seed: int = 42):
        if not isinstance(dataset, EmotionDataset):
            raise TypeError(f"test-time augmentation needs an EmotionDataset, got {type(dataset).__name__}")
        if dataset.reader.training:
            raise ValueError("test-time augmentation needs a data set for evaluation, got one with training=True")
        if not isinstance(num_passes, int) or num_passes < 1:
            raise ValueError(f"num_passes must be an integer of at least 1, got {num_passes!r}")
        self.dataset = dataset
        self.num_passes = num_passes
        self.augmenter = augmenter
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset) * self.num_passes

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The example (see `ExampleReader`) at `index`."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The examples at `indices`; each clip among them is decoded once."""
        reader = self.dataset.reader
        clips: dict[int, dict[str, Any]] = {}
        examples = []
        for index in indices:
            clip, number = divmod(range(len(self))[index], self.num_passes)
            rng = augmentation_generator(self.seed, number, clip)  # the pass in the place of the epoch
            if clip not in clips:
                clips[clip] = reader(self.dataset.dataset[clip], rng)  # draws nothing: it is not for training
            example = dict(clips[clip])
            if number > 0 and example.get("audio") is not None:
                example["audio"] = reader.augment(example["audio"], self.augmenter, rng)
                example["length"] = len(example["audio"])
            examples.append(example)
        return examples

    @property
    def lengths(self) -> list[int]:
        """[N * num_passes] samples of each clip before augmentation, as `EmotionDataset.lengths`."""
        return [length for length in self.dataset.lengths for _ in range(self.num_passes)]


def drop_unreadable(
    dataset: datasets.Dataset, on_bad_example: str | BadRows = "skip", **reader_options
) -> datasets.Dataset:
    """Try to read each row once, and leave out the rows that cannot be read, with a warning that counts them.

    If every row is readable, all batches are whole: predictions line up with the rows, on any number of processes.

    Args:
        dataset: a split of `load_emotion_dataset`.
        on_bad_example: "skip", "error" to raise at the first bad row, or a `BadRows`, which takes note of them.
        **reader_options: of `ExampleReader`.

    Raises:
        ValueError: if no row is left, or naming the row, for "error"; or there are too many bad rows, which is said
            as soon as it is known.
    """
    rule, examples = rule_of(on_bad_example), EmotionDataset(dataset, **reader_options)
    problems: dict[int, str] = {}
    rule.rows = rule.rows or len(dataset)  # a table that was not loaded with this rule

    def check(index: int) -> None:
        if rule.are_too_many(len(problems)):
            return  # the run is at its end: no need to try the others
        try:
            examples[index]
        except ValueError as error:
            if rule.ends_run:
                raise
            problems[index] = str(error)

    map_in_threads(check, len(examples), "checking clips")
    rule.report(problems[index] for index in sorted(problems))
    if problems and len(problems) == len(dataset):
        raise ValueError(f"none of the {len(dataset)} examples can be read, the first is {dataset[0]['row']}")
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), list(problems))) if problems else dataset


def class_counts(
    dataset: datasets.Dataset | EmotionDataset, num_labels: int, draws: np.ndarray | None = None
) -> list[int]:
    """Number of rows of each class, [num_labels]; unknown rows (-1) are not counted.

    Rows with votes count for each class by their share of it; the sums are rounded. With `draws` ([N], how often an
    epoch takes each row on average) what is drawn is counted, but 1 at least for a class that has a row.

    Raises:
        TypeError: for a stream, whose rows cannot be counted before they are read.
        ValueError: if a label is not below `num_labels`.
    """
    table = dataset.dataset if isinstance(dataset, EmotionDataset) else dataset
    if not isinstance(table, datasets.Dataset):
        raise TypeError(f"class counts need a data set with random access, got {type(dataset).__name__}")
    labels = np.asarray(table["labels"], dtype=np.int64)
    if labels.size and labels.max() >= num_labels:
        raise ValueError(f"label {labels.max()} is out of range; allowed: 0 to {num_labels - 1}")
    shares = np.asarray(table["class_shares"]) if "class_shares" in table.column_names else None
    if shares is None:
        shares = (labels[:, None] == np.arange(num_labels)).astype(np.float64)
    counts = np.rint(shares.sum(axis=0))
    if draws is not None:
        counts = np.maximum(np.rint(draws @ shares), counts > 0)
    return counts.astype(int).tolist()
