# SPDX-License-Identifier: Apache-2.0
"""Any file, bytes, array or stream to mono float32 samples at one sampling rate.

Read `load_audio` (a whole clip) first, then `stream_audio` (a long recording, a block at a time). `pad_and_stack`
makes one array of several clips.
"""

import contextlib
import io
import mmap
import numbers
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)
MIN_SECONDS = 0.025  # 400 samples at 16 kHz: the receptive field of one wav2vec2 frame, and one Whisper STFT window
MIN_SAMPLING_RATE = 1000  # Hz; below this the caller has most likely given kHz
UNKNOWN_WAV_SIZE = 0x7FFF0000  # programs that write WAV to a pipe put a size from here up: "until the end of the file"
MP3_FRAME = 1152  # samples; MP3 headers may be wrong by the encoder's delay
INTEGER_FORMATS = {"int16": (0, 2**15), "int32": (0, 2**31), "uint8": (128, 2**7)}  # dtype: (zero level, full scale)
READABLE_FORMATS = (
    "WAV, FLAC, OGG (Vorbis, Opus), MP3, AIFF and AU can be read; convert others (m4a, aac, webm, mp4, wma) with "
    "`ffmpeg -i INPUT -ac 1 -ar 16000 OUTPUT.wav`"
)


def load_audio(
    audio, sampling_rate: int | None = None, target_sampling_rate: int = 16000, name: str = "audio"
) -> np.ndarray:
    """Bring one clip of any kind to mono float32 at one sampling rate.

    Args:
        audio (`str`, `os.PathLike`, `bytes`, `np.ndarray`, `torch.Tensor` or list of numbers): a file, the content of
            a file, or samples of shape (time,), (channels, time) or (time, channels); channels are the smaller axis.
            int16, int32 and uint8 samples are scaled to [-1, 1), floating samples are kept; channels are averaged.
        sampling_rate (`int`, Hz): rate of `audio`; required for samples, ignored for files, which carry their own.
        target_sampling_rate (`int`, Hz): rate of the result.
        name (`str`): what error messages call this clip.

    Returns:
        `np.ndarray` of shape (time,), float32, contiguous.

    Raises:
        FileNotFoundError: no such file.
        ValueError: empty, NaN or infinite samples; a file that is unreadable or cut short; samples without a rate or
            of a dtype or shape that has no clear meaning.
        TypeError: `audio` is none of the above.
    """
    if isinstance(audio, (str, os.PathLike)):
        name = f"{name} '{os.fspath(audio)}'"
        _check_is_file(Path(audio), name)
        audio = Path(audio).read_bytes()
    if isinstance(audio, (bytes, bytearray)):
        samples, sampling_rate = _decode(bytes(audio), name)
    else:
        samples = _samples_to_mono(audio, name)
    if sampling_rate is None:
        raise ValueError(
            f"{name}: `sampling_rate` is required with an array of samples: the same numbers at another rate are "
            "another sound, and the array does not carry its rate"
        )
    _check_rate(sampling_rate, name)
    bad = np.flatnonzero(~np.isfinite(samples))
    if bad.size:
        raise ValueError(f"{name}: {bad.size} of {samples.size} samples are NaN or infinite, the first at {bad[0]}")
    if samples.size and sampling_rate != target_sampling_rate:
        samples = soxr.resample(samples, sampling_rate, target_sampling_rate, quality="HQ")
    if samples.size == 0:
        raise ValueError(f"{name}: empty, it holds no samples at {target_sampling_rate} Hz")
    return np.ascontiguousarray(samples, dtype=np.float32)


def stream_audio(
    audio,
    sampling_rate: int | None = None,
    target_sampling_rate: int = 16000,
    name: str = "audio",
    block_seconds: float = 10.0,
) -> Iterator[np.ndarray]:
    """
    [`load_audio`] a block at a time: a file of any length is never held in memory.

    Args:
        audio, sampling_rate, target_sampling_rate, name: as in [`load_audio`].
        block_seconds (`float`): length of what is read at once.

    Yields:
        `np.ndarray` of shape (time,), float32; joined, they are what [`load_audio`] returns.

    Raises:
        As [`load_audio`]; NaN samples, or that a FLAC or MP3 file is cut short, show only when they are reached.
    """
    if isinstance(audio, (str, os.PathLike)):
        name, path = f"{name} '{os.fspath(audio)}'", Path(audio)
        _check_is_file(path, name)
        if not path.stat().st_size:
            raise ValueError(f"{name}: empty file")
        file: Any = path.open("rb")
        # Only the header is read through the map. The source is neither the path nor the file: their extension counts
        content: bytes | mmap.mmap = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        source: Any = file.fileno()
    elif isinstance(audio, (bytes, bytearray)):
        source, content = io.BytesIO(audio), bytes(audio)
        file = source
    else:
        yield load_audio(audio, sampling_rate, target_sampling_rate, name=name)
        return
    with file, _opened(source, content, name) as sound:
        rate = sound.samplerate
        _check_rate(rate, name)
        resampler = None
        if rate != target_sampling_rate:
            resampler = soxr.ResampleStream(rate, target_sampling_rate, 1, dtype="float32", quality="HQ")
        for samples in _blocks(sound, name, max(1, round(block_seconds * rate))):
            if not np.isfinite(samples).all():
                raise ValueError(f"{name}: samples are NaN or infinite")
            yield samples if resampler is None else resampler.resample_chunk(samples)
        if resampler is not None:
            yield resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True)


def _check_rate(sampling_rate: Any, name: str) -> None:
    if isinstance(sampling_rate, bool) or not isinstance(sampling_rate, numbers.Real):
        raise TypeError(f"{name}: `sampling_rate` must be a number in Hz, got {sampling_rate!r}")
    if not MIN_SAMPLING_RATE <= float(sampling_rate) < float("inf"):
        raise ValueError(f"{name}: `sampling_rate` is in Hz and at least {MIN_SAMPLING_RATE}, got {sampling_rate}")


def _check_is_file(path: Path, name: str) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{name}: there is no such file")
    if path.is_dir():
        raise ValueError(f"{name}: this is a folder, not an audio file")


def _decode(content: bytes, name: str) -> tuple[np.ndarray, int]:
    """Decode the bytes of an audio file to (mono float32 samples, sampling rate in Hz)."""
    with _opened(io.BytesIO(content), content, name) as file:
        blocks = [*_blocks(file, name, size=max(file.frames, 1)), np.zeros(0, dtype=np.float32)]
        return np.concatenate(blocks), file.samplerate


@contextlib.contextmanager
def _opened(file, content: bytes | mmap.mmap, name: str) -> Iterator[soundfile.SoundFile]:
    """An audio file opened for reading; `content` is the whole of it."""
    try:
        with soundfile.SoundFile(file, closefd=False) as opened:
            promised, held = _wav_data_size(content)
            if held < promised < UNKNOWN_WAV_SIZE:
                raise ValueError(
                    f"{name}: truncated, the header promises {promised} bytes of samples but only {held} are there"
                )
            yield opened
    except soundfile.SoundFileError as error:
        reason = str(getattr(error, "error_string", error))
        raise ValueError(f"{name}: cannot be read as audio ({reason}) {READABLE_FORMATS}") from error


def _blocks(file: soundfile.SoundFile, name: str, size: int) -> Iterator[np.ndarray]:
    """The samples of an opened file, mono float32, `size` at a time."""
    held = 0
    # Not `file.blocks`: it fills what a truncated file lacks with whatever is in memory
    while len(samples := file.read(size, dtype="float32", always_2d=True)):  # (time, channels)
        held += len(samples)
        yield samples.mean(axis=1)
    if held < file.frames - (MP3_FRAME if file.format == "MP3" else 0):
        raise ValueError(f"{name}: truncated, the header promises {file.frames} samples but only {held} are there")


def _wav_data_size(content: bytes | mmap.mmap) -> tuple[int, int]:
    """(bytes of samples a WAV header promises, bytes there); libsndfile hides the difference. (0, 0) if not WAV."""
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        return 0, 0
    position = 12
    while position + 8 <= len(content):
        chunk, size = struct.unpack_from("<4sI", content, position)
        position += 8
        if chunk == b"data":
            return size, len(content) - position
        position += size + size % 2  # chunks are padded to an even size
    return 0, 0


def _samples_to_mono(audio, name: str) -> np.ndarray:
    """Samples of any allowed dtype and layout -> float32 of shape (time,)."""
    if isinstance(audio, torch.Tensor):
        audio = audio.detach().cpu()
        audio = audio.float() if audio.is_floating_point() else audio  # NumPy has no bfloat16
    elif not isinstance(audio, (np.ndarray, list, tuple)):
        raise TypeError(
            f"{name}: expected a path, the bytes of a file, or an array, tensor or list of samples, got "
            f"{type(audio).__name__}"
        )
    try:
        samples = np.asarray(audio)
    except ValueError as error:
        raise ValueError(f"{name}: the list of samples is ragged ({error})") from error
    if samples.dtype.name in INTEGER_FORMATS:
        zero, scale = INTEGER_FORMATS[samples.dtype.name]
        samples = (samples.astype(np.float32) - zero) / scale
    elif np.issubdtype(samples.dtype, np.floating):
        with np.errstate(over="ignore"):  # what overflows is reported as infinite by the caller
            samples = samples.astype(np.float32)
    else:
        raise ValueError(
            f"{name}: samples of dtype {samples.dtype} are not audio; floats, {', '.join(INTEGER_FORMATS)} are allowed"
        )
    if samples.ndim == 1 or samples.size == 0:
        return samples.reshape(-1)
    if samples.ndim != 2 or samples.shape[0] == samples.shape[1] > 1:
        raise ValueError(
            f"{name}: cannot tell time from channels in shape {samples.shape}; give (time,), (channels, time) or "
            "(time, channels) with fewer channels than samples"
        )
    return samples.mean(axis=int(np.argmin(samples.shape)), dtype=np.float32)


def pad_and_stack(rows: list[np.ndarray | None], padding_value: float = 0, multiple_of: int | None = None):
    """Stack arrays that differ in their last axis, padded at its end; None becomes a row of padding.

    Args:
        rows (list of `np.ndarray` of shape (..., length_i) or None): at least one is an array.
        padding_value (`float`): value of the padding.
        multiple_of (`int`): round the common length up to a multiple of this.

    Returns:
        `np.ndarray` of shape (rows, ..., length), of the dtype of the rows.
    """
    first = next(row for row in rows if row is not None)
    length = max(row.shape[-1] for row in rows if row is not None)
    if multiple_of:
        length += -length % multiple_of
    stacked = np.full((len(rows), *first.shape[:-1], length), padding_value, dtype=first.dtype)
    for target, row in zip(stacked, rows, strict=True):
        if row is not None:
            target[..., : row.shape[-1]] = row
    return stacked
