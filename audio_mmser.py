# SPDX-License-Identifier: Apache-2.0
"""Any file, bytes, array or stream to mono float32 samples at one sampling rate.

Read `load_audio` (a whole clip) first, then `stream_audio` (a long recording, a block at a time), `audio_length` and
`why_silent`. `download` brings what is behind an address, `pad_and_stack` makes one array of several clips. Files are
decoded in `decoding_mmser`.
"""

import contextlib
import http.client
import io
import ipaddress
import mmap
import numbers
import os
import socket
import stat
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import soxr
import torch
from transformers.utils import logging

try:
    from .decoding_mmser import Content, count_samples, decode, decode_channels
except ImportError:
    if __package__:  # beside a checkpoint a failed import is a real error, not a reason to take an installed copy
        raise
    from decoding_mmser import Content, count_samples, decode, decode_channels

logger = logging.get_logger(__name__)
MIN_SECONDS = 0.025  # 400 samples at 16 kHz: the receptive field of one wav2vec2 frame, and one Whisper STFT window
MIN_SAMPLING_RATE = 1000  # Hz; below this the caller has most likely given kHz
MAX_SAMPLING_RATE = 10_000_000  # Hz; above it a header is broken, and resampling would take seconds
MAX_SAMPLE = 1e12  # above it squares and their sums overflow, and no sound is meant
MANY_SAMPLES, MAX_GROWTH = 2**26, 256  # a file beyond both is not read whole; Opus of speech grows 100-fold
MAX_BYTES = 2**32  # nor is a file of more, which no WAV holds
MAX_DOWNLOAD, MAX_WAIT = 2**30, 600  # bytes and seconds of what is behind an address
SILENCE_OF_SERVER = 30  # seconds that it may take until it says something
PIECE = 2**20  # bytes that are read at once
MOST_REDIRECTIONS = 6
SECRETS = ("fd00:ec2::254", "100.100.100.200")  # where clouds tell machines their passwords, as link-local ones do
LOUD = 10.0  # floats lie in [-1, 1]; samples of 16 bits that were only cast reach some thousands
SILENT = 10 ** (-61 / 20)  # -61 dB of full scale: what is no louder is silence, as in `mmser.voice_activity`
INTEGER_FORMATS = {  # dtype: (zero level, full scale)
    "int8": (0, 2**7),
    "int16": (0, 2**15),
    "int32": (0, 2**31),
    "uint8": (128, 2**7),
    "uint16": (2**15, 2**15),
}
AUDIO_KEYS = ("raw", "array", "bytes", "path", "file", "audio")  # what a dict may hold, in this order
MOST_WRAPPINGS = 8  # dicts around a clip
_warned: set[str] = set()


def warn_once(topic: str, message: str) -> None:
    """Log `message` unless something was already logged on `topic`: one cut clip is news, ten thousand are noise."""
    if topic not in _warned:
        _warned.add(topic)
        logger.warning(message)


def load_audio(
    audio, sampling_rate: int | None = None, target_sampling_rate: int = 16000, name: str = "audio"
) -> np.ndarray:
    """Bring one clip of any kind to mono float32 at one sampling rate.

    Args:
        audio (`str`, `os.PathLike`, `bytes`, `np.ndarray`, `torch.Tensor` or list of numbers): a file, the content of
            a file, or samples of shape (time,), (channels, time) or (time, channels); channels are the smaller axis.
            int16, int32, int8, uint16 and uint8 samples are scaled to [-1, 1), floating samples are kept; channels are
            averaged. Also a dict with one of these under `raw`, `array`, `bytes`, `path`, `file` or `audio`, and
            perhaps `sampling_rate`; a pair (sampling rate, samples), as Gradio gives it; a decoder of torchcodec, as
            `datasets` gives it, or its samples.
        sampling_rate (`int`, Hz): rate of `audio`; required for samples, ignored for what carries its own: files,
            dicts with a rate, pairs and decoders.
        target_sampling_rate (`int`, Hz): rate of the result.
        name (`str`): what error messages call this clip.

    Returns:
        `np.ndarray` of shape (time,), float32, contiguous.

    Raises:
        FileNotFoundError: no such file.
        ValueError: empty, NaN or infinite samples, or ones beyond all sound; a file that is unreadable or cut short;
            samples without a rate or of a dtype or shape that has no clear meaning.
        TypeError: `audio` is none of the above.
    """
    audio, sampling_rate = unwrap_audio(audio, sampling_rate, name)
    if _is_file(audio):
        name = _file_name(audio, name)
        samples, sampling_rate = _decode_whole(audio, target_sampling_rate, name)
    else:
        samples = _samples_to_mono(audio, name)
    if sampling_rate is None:
        raise ValueError(
            f"{name}: `sampling_rate` is required with an array of samples: the same numbers at another rate are "
            "another sound, and the array does not carry its rate"
        )
    check_rate(sampling_rate, name)
    _check_samples(samples, name)
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
        block_seconds (`float`): the most that comes at once.

    Yields:
        `np.ndarray` of shape (time,), float32; joined, they are what [`load_audio`] returns.

    Raises:
        As [`load_audio`]; NaN samples, or that a FLAC or MP3 file is cut short, show only when they are reached.
    """
    audio, sampling_rate = unwrap_audio(audio, sampling_rate, name)
    if not _is_file(audio):
        yield load_audio(audio, sampling_rate, target_sampling_rate, name=name)
        return
    name, resampler, done = _file_name(audio, name), None, 0
    with _opened(audio, name) as (content, source):
        for rate, decoded in decode(content, source, name):
            check_rate(rate, name)
            if rate != target_sampling_rate and resampler is None:
                resampler = soxr.ResampleStream(rate, target_sampling_rate, 1, dtype="float32", quality="HQ")
            _check_samples(decoded, name, done)
            done += len(decoded)
            size = max(1, round(block_seconds * rate))
            for samples in (decoded[start : start + size] for start in range(0, len(decoded), size)):
                yield samples if resampler is None else resampler.resample_chunk(samples)
        if not done:
            raise ValueError(f"{name}: empty, the file holds no samples")
        if resampler is not None:
            yield resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True)


def audio_length(audio, target_sampling_rate: int = 16000, name: str = "audio") -> int:
    """
    How many samples [`load_audio`] gives for a file: by its header if that can be believed, else by decoding it.

    Args:
        audio (`str`, `os.PathLike` or `bytes`): a file, or the content of a file.
        target_sampling_rate, name: as in [`load_audio`].

    Raises:
        As [`load_audio`], but for what shows only when the samples are reached.
    """
    name = _file_name(audio, name)
    with _opened(audio, name) as (content, source):
        samples, rate = count_samples(content, source, name)
    return int(samples * target_sampling_rate / rate + 0.5)  # as the resampler rounds


def why_silent(audio, sampling_rate: int | None = None, name: str = "audio") -> str:
    """
    Why nothing can be heard in a recording: no sample of it is louder than -61 dB of full scale.

    A file is read until something can be heard, which is soon as a rule, and is never held in memory.

    Args:
        audio, sampling_rate, name: as in [`load_audio`].

    Returns:
        What is said of the recording, as "nothing can be heard in it: ..."; "" where something can be heard.

    Raises:
        As [`load_audio`], as far as it is read.
    """
    loudest = 0.0  # of a channel; that of their mean is at most `SILENT` until this returns
    for rows in _channels(audio, sampling_rate, name):
        if rows.size and _peak(rows.mean(axis=1, dtype=np.float32)) > SILENT:
            return ""
        loudest = max(loudest, _peak(rows))
    if loudest > SILENT:
        return (
            "nothing can be heard in it: its channels cancel each other, and the model hears their mean. Give one of "
            "them: `ffmpeg -i INPUT -af 'pan=mono|c0=c0' OUTPUT.wav`"
        )
    what = (
        "all samples are 0" if not loudest else f"its loudest sample has {20 * np.log10(loudest):.0f} dB of full scale"
    )
    return f"nothing can be heard in it: {what}"


def warn_if_silent(samples: np.ndarray, audio, sampling_rate: int | None = None, name: str = "audio") -> None:
    """Warn once of a clip in which nothing can be heard; `samples` (time,) are what [`load_audio`] made of it."""
    if "silent" not in _warned and _peak(samples) <= SILENT and (reason := why_silent(audio, sampling_rate, name)):
        name = _file_name(audio, name) if _is_file(audio) else name
        warn_once("silent", f"{name}: {reason}. Its answer means nothing. Further clips like this are not reported.")


def _channels(audio, sampling_rate: int | None, name: str) -> Iterator[np.ndarray]:
    """Blocks of shape (time, channels), float32, at their own rate."""
    audio, _ = unwrap_audio(audio, sampling_rate, name)
    if _is_file(audio):
        name = _file_name(audio, name)
        with _opened(audio, name) as (content, source):
            held = 0
            for _, rows in decode_channels(content, source, name):
                held += len(rows)
                yield rows
        if not held:
            raise ValueError(f"{name}: empty, the file holds no samples")
    else:
        yield _samples_by_channel(audio, name)


def _peak(samples: np.ndarray) -> float:
    return max(float(samples.max()), -float(samples.min())) if samples.size else 0.0


def unwrap_audio(audio, sampling_rate: int | None = None, name: str = "audio") -> tuple[Any, Any]:
    """
    What carries its own rate -> (a file or samples, their sampling rate); anything else as it is.

    Args:
        audio, sampling_rate, name: as in [`load_audio`].
    """
    for _ in range(MOST_WRAPPINGS):
        if hasattr(audio, "get_all_samples"):  # torchcodec's AudioDecoder, which `datasets` gives
            try:
                audio = audio.get_all_samples()
            except RuntimeError as error:  # its own kind of error
                raise ValueError(f"{name}: cannot be decoded by torchcodec ({error})") from error
        if _is_pair(audio):
            return audio[1], audio[0]
        if hasattr(audio, "sample_rate"):  # torchcodec's AudioSamples
            return audio.data, audio.sample_rate
        if not isinstance(audio, dict):
            return audio, sampling_rate
        held = next((audio[key] for key in AUDIO_KEYS if audio.get(key) is not None), None)
        if held is None:
            raise ValueError(f"{name}: a dict needs one of {list(AUDIO_KEYS)}, got {list(audio)}")
        audio, sampling_rate = held, audio.get("sampling_rate") or sampling_rate
    raise ValueError(f"{name}: dicts in dicts, deeper than {MOST_WRAPPINGS} levels, are no clip")


def has_own_rate(audio) -> bool:
    """Whether this is one clip that [`unwrap_audio`] takes out of what it comes in."""
    return (
        isinstance(audio, dict)
        or hasattr(audio, "get_all_samples")
        or hasattr(audio, "sample_rate")
        or _is_pair(audio)
    )


def _is_pair(audio) -> bool:
    """Whether this is (sampling rate, samples) of one clip, as Gradio's microphone gives it."""
    if not isinstance(audio, (tuple, list)) or len(audio) != 2:
        return False
    return (
        isinstance(audio[0], numbers.Real) and isinstance(audio[1], (np.ndarray, torch.Tensor)) and audio[1].ndim > 0
    )


def _is_file(audio) -> bool:
    return isinstance(audio, (str, os.PathLike, bytes, bytearray))


def _file_name(audio, name: str) -> str:
    return name if isinstance(audio, (bytes, bytearray)) else f"{name} '{os.fspath(audio)}'"


@contextlib.contextmanager
def _opened(audio, name: str) -> Iterator[tuple[Content, Any]]:
    """(content, source) of a file, as `decode` takes them; a file on the disk is mapped, not read."""
    if isinstance(audio, (bytes, bytearray)):
        yield bytes(audio), io.BytesIO(audio)
        return
    path, size = check_is_file(Path(audio), name)
    if not size:
        yield b"", io.BytesIO()
        return
    with path.open("rb") as file:
        try:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ValueError(f"{name}: of {size:,} bytes, which do not fit into memory ({error.strerror})") from error
        with content:  # the source is neither the path nor the file: their extension would count
            yield content, file.fileno()


def _decode_whole(audio, target_sampling_rate: int, name: str) -> tuple[np.ndarray, int]:
    """A file, or its content -> (mono float32 samples, sampling rate in Hz), if it fits at `target_sampling_rate`."""
    content = bytes(audio) if isinstance(audio, (bytes, bytearray)) else read_whole(audio, name)
    decoded, held = [], 0
    for rate, block in decode(content, io.BytesIO(content), name):
        check_rate(rate, name)
        decoded.append(block)
        held += len(block)
        becomes = held * max(1.0, target_sampling_rate / rate)  # samples: a low rate grows again when resampled
        if becomes > MANY_SAMPLES and becomes * block.itemsize > MAX_GROWTH * len(content):
            raise ValueError(
                f"{name}: of {len(content):,} bytes more than {MAX_GROWTH} times as many become, which is silence or "
                "made to fill the memory. Cut it, or read it in pieces (`chunk_length_s`)"
            )
    if not decoded:
        raise ValueError(f"{name}: empty, the file holds no samples")
    return np.concatenate(decoded), rate


def read_whole(path, name: str = "audio") -> bytes:
    """
    The content of a file, `b""` of an empty one.

    Args:
        path (`str` or `os.PathLike`): the file.
        name (`str`): what error messages call it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, a device or a pipe, or more than `MAX_BYTES` long.
    """
    path, size = check_is_file(Path(path), name)
    if size > MAX_BYTES:
        raise ValueError(
            f"{name}: of {size:,} bytes, and at most {MAX_BYTES:,} are read whole. Cut it, or read it in pieces "
            "(`chunk_length_s`)"
        )
    return path.read_bytes() if size else b""


def download(address: str) -> bytes:
    """
    The content behind an address.

    Args:
        address (`str`): it begins with `http://` or `https://`.

    Raises:
        ValueError: it cannot be read, has more than `MAX_DOWNLOAD` bytes or takes longer than `MAX_WAIT` seconds; or
            it leads to where clouds keep passwords, from the internet into the own network, or to no such address.
    """
    end, sockets = time.monotonic() + MAX_WAIT, list[socket.socket]()
    limit = threading.Timer(MAX_WAIT, _hang_up, [sockets])  # a server may send byte by byte
    limit.daemon = True
    limit.start()
    try:
        with _open_address(address, sockets) as response:
            claimed = response.headers.get("Content-Length") or ""
            length = int(claimed) if claimed.isdecimal() and not response.chunked else None
            return read_bounded(response.read1, length, end)
    except (OSError, http.client.HTTPException, ValueError) as error:  # urllib's errors are OSErrors
        reason = _too_slow() if time.monotonic() >= end else " ".join(str(error).split())
        raise ValueError(f"audio '{address}': cannot be downloaded ({reason})") from error
    finally:
        limit.cancel()
        _hang_up(sockets)


def read_bounded(read: Callable[[int], bytes], length: int | None = None, end: float | None = None) -> bytes:
    """
    All that `read`, which is asked for some bytes at a time, gives from elsewhere.

    Args:
        read: gives `b""` at the end.
        length (`int`): how much there should be, if that is known.
        end (`float`): when it must be there, by `time.monotonic`; `MAX_WAIT` from now by default.

    Raises:
        ValueError: it is more than `MAX_DOWNLOAD` bytes, less than `length`, or too slow.
    """
    end = time.monotonic() + MAX_WAIT if end is None else end
    pieces, held = list[bytes](), 0
    while (length is None or held < length) and max(held, length or 0) <= MAX_DOWNLOAD:
        piece = read(PIECE if length is None else min(PIECE, length - held))
        if time.monotonic() >= end:
            raise ValueError(_too_slow())
        if not piece:
            break
        pieces.append(piece)
        held += len(piece)
    if max(held, length or 0) > MAX_DOWNLOAD:
        raise ValueError(f"it is larger than {MAX_DOWNLOAD:,} bytes: download it, cut it, and give the files")
    if length is not None and held < length:
        raise ValueError(f"it is cut short: {held:,} of {length:,} bytes came")
    return b"".join(pieces)


def _too_slow() -> str:
    return f"it takes longer than {MAX_WAIT:g} s"


def _hang_up(connections: list[socket.socket]) -> None:
    for connection in connections:
        with contextlib.suppress(OSError):  # it has ended by itself
            connection.shutdown(socket.SHUT_RDWR)


def _open_address(address: str, sockets: list[socket.socket]) -> Any:
    """The answer of the server at an address, or of that to which it leads; its connections are added to `sockets`."""
    ask = urllib.request.build_opener(_Http(sockets), _Https(sockets), _Redirection()).open
    before = ""
    for _ in range(MOST_REDIRECTIONS):
        _check_host(address, before)
        try:
            return ask(address, timeout=SILENCE_OF_SERVER)
        except _Moved as moved:
            address, before = moved.address, address
    raise ValueError("it leads from address to address")


class _Moved(Exception):
    """What is behind an address is at another one."""

    def __init__(self, address: str):
        super().__init__(address)
        self.address = address


class _Redirection(urllib.request.HTTPRedirectHandler):
    """Tells of the other address: urllib's own would read all that comes with it."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        fp.close()
        raise _Moved(newurl)


class _Watched(http.client.HTTPConnection):
    sockets: list[socket.socket]

    def connect(self) -> None:
        super().connect()
        self.sockets.append(self.sock)
        _refuse_secret(self.sock.getpeername()[0])  # a name may mean another machine than a moment ago


class _WatchedTLS(_Watched, http.client.HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def __init__(self, sockets: list[socket.socket]):
        super().__init__()
        self.sockets = sockets

    def http_open(self, request):
        return self.do_open(self.watched(_Watched), request)

    def watched(self, kind: type[_Watched]) -> Any:
        return type(kind.__name__, (kind,), {"sockets": self.sockets})


class _Https(_Http, urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(self.watched(_WatchedTLS), request)


def _check_host(address: str, before: str) -> None:
    """Refuse an address that is none, or that of another one leads to and should not."""
    if urlsplit(address).scheme not in ("http", "https"):
        raise ValueError(f"it leads to {address!r:.200}, and only http:// and https:// are read")
    numbers = _numbers(address)
    for number in numbers:
        _refuse_secret(number)
    if not before or urlsplit(address).hostname == urlsplit(before).hostname:
        return
    if not all(map(_is_public, numbers)) and all(map(_is_public, _numbers(before))):
        raise ValueError(f"it leads to {address!r:.200}, a machine that the internet does not reach")


def _numbers(address: str) -> list[str]:
    """The numbers of the machines that an address may mean; none if nobody here knows it, but perhaps a proxy."""
    host = urlsplit(address).hostname
    if not host:
        raise ValueError(f"{address!r:.200} names no machine")
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except OSError:
        return []


def _as_number(number: str) -> Any:
    found = ipaddress.ip_address(number.partition("%")[0])
    return getattr(found, "ipv4_mapped", None) or found


def _is_public(number: str) -> bool:
    return _as_number(number).is_global


def _refuse_secret(number: str) -> None:
    if _as_number(number).is_link_local or str(_as_number(number)) in SECRETS:
        raise ValueError(f"{number} is where clouds tell machines their passwords, and is not read")


def _check_samples(samples: np.ndarray, name: str, start: int = 0) -> None:
    """Refuse NaN and infinite samples (time,), of which `start` is the first; tell of those far outside [-1, 1]."""
    if not samples.size:
        return
    peak = _peak(samples)
    if not np.isfinite(peak):
        bad = np.flatnonzero(~np.isfinite(samples))
        raise ValueError(
            f"{name}: {bad.size} of {samples.size} samples are NaN or infinite, the first at {start + bad[0]}"
        )
    if peak > MAX_SAMPLE:
        raise ValueError(f"{name}: samples reach {peak:.0e}, which is no sound: floating samples lie in [-1, 1]")
    if peak > LOUD:
        warn_once(
            "loud",
            f"{name}: samples reach {peak:.0f}, but floating samples lie in [-1, 1]; give 16-bit samples as int16, or "
            "divide them by 32768. They are used as they are. Further clips like this are not reported.",
        )


def check_rate(sampling_rate: Any, name: str) -> None:
    """Refuse what is no sampling rate in Hz; `name` is what it is the rate of."""
    if isinstance(sampling_rate, bool) or not isinstance(sampling_rate, numbers.Real):
        raise TypeError(f"{name}: `sampling_rate` must be a number in Hz, got {sampling_rate!r}")
    if not MIN_SAMPLING_RATE <= float(sampling_rate) <= MAX_SAMPLING_RATE:
        raise ValueError(
            f"{name}: `sampling_rate` is in Hz, at least {MIN_SAMPLING_RATE} and at most {MAX_SAMPLING_RATE}, got "
            f"{sampling_rate}"
        )


def check_is_file(path: Path, name: str) -> tuple[Path, int]:
    """(the path, its size in bytes). Opening a pipe may wait for ever, and a device may have no end."""
    if not path.exists():
        raise FileNotFoundError(f"{name}: there is no such file")
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{name}: this is a folder, not an audio file")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{name}: this is a device or a pipe, not an audio file")
    return path, status.st_size


def _samples_to_mono(audio, name: str) -> np.ndarray:
    """Samples of any allowed dtype and layout -> float32 of shape (time,)."""
    rows = _samples_by_channel(audio, name)
    return rows[:, 0] if rows.shape[1] == 1 else rows.mean(axis=1, dtype=np.float32)


def _samples_by_channel(audio, name: str) -> np.ndarray:
    """Samples of any allowed dtype and layout -> float32 of shape (time, channels)."""
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
        return samples.reshape(-1, 1)
    if samples.ndim != 2 or samples.shape[0] == samples.shape[1] > 1:
        raise ValueError(
            f"{name}: cannot tell time from channels in shape {samples.shape}; give (time,), (channels, time) or "
            "(time, channels) with fewer channels than samples"
        )
    return samples.T if np.argmin(samples.shape) == 0 else samples


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
