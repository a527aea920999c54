# SPDX-License-Identifier: Apache-2.0
"""The content of an audio file to blocks of samples: libsndfile first, PyAV (if installed) for what it cannot open.

A header's count of samples is a claim, not a limit: files are read to their end, and a count that is missing, or one
that a program wrote before it knew better, cuts nothing. Read `decode_channels` first, then the functions about one
container each (WAV, MP3, Ogg, FLAC), then PyAV, then `count_samples`.
"""

import contextlib
import mmap
import os
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import soundfile
from transformers.utils import logging

logger = logging.get_logger(__name__)
Content = bytes | mmap.mmap  # of a whole file
BLOCK = 2**18  # samples, of all channels together, that are decoded at once
FAR = 2**50  # bytes; no file is as long
UNKNOWN_FRAMES = 2**40  # samples; libsndfile gives more for "until the end"
TEXT_CHUNKS = (
    b"LIST",
    b"id3 ",
    b"ID3 ",
    b"bext",
    b"iXML",
    b"_PMX",
    b"cue ",
    b"smpl",
)  # that follow the samples of a WAV
UNKNOWN_SIZE = 0x7F000000  # programs that write to a pipe put a size from here up: "until the end of the file"
MP3_FRAME = 1152  # samples; MP3 headers may be wrong by the encoder's delay
AV_SLACK = 0.2  # s; delay and padding of an encoder, which some containers count and some do not
# What PyAV may open. Not playlists: they make FFmpeg fetch other files and addresses
AV_FORMATS = "mov,matroska,webm,aac,asf,ogg,mp3,flac,wav,w64,aiff,au,caf,amr,ac3,eac3,avi,flv,mpegts,mpeg,wv,ape,tta"
CONVERSION = "`ffmpeg -i INPUT -ac 1 -ar 16000 OUTPUT.wav` converts other formats"
READABLE_FORMATS = (
    "WAV, FLAC, OGG (Vorbis, Opus), MP3, AIFF and AU can be read; m4a, aac, webm, mp4 and wma too once PyAV is "
    f'installed (`pip install av`, or the extra: `pip install "mmser[av]"`). {CONVERSION}'
)


class Window:
    """A part of a file's content, which decoders read like a file of its own.

    Args:
        content: of the whole file.
        start, stop (`int`, bytes): the part; to the end by default.
        patch: (offset in the part, bytes that are read in place of those that are there).
        is_endless: the end is far away. The MP3 decoder estimates how long a file is from its size, and stops there.
    """

    def __init__(
        self,
        content: Content,
        start: int = 0,
        stop: int | None = None,
        patch: tuple[int, bytes] | None = None,
        is_endless: bool = False,
    ):
        self.content = content
        self.start = start
        self.size = (len(content) if stop is None else stop) - start
        self.patch = patch
        self.end = FAR if is_endless else self.size
        self.position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.end}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        if self.end - 128 <= self.position < self.end == FAR:
            return bytes(max(0, size))  # where the MP3 decoder looks for a tag
        begin = self.position
        stop = self.size if size < 0 else min(self.size, begin + size)
        data = self.content[self.start + begin : self.start + stop] if begin < stop else b""
        self.position += len(data)
        if self.patch is not None:
            offset, new = self.patch
            first, last = max(offset, begin), min(offset + len(new), stop)
            if first < last:
                data = data[: first - begin] + new[first - offset : last - offset] + data[last - begin :]
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _ForwardFile(soundfile.SoundFile):
    """Read from start to end only: soundfile would seek after each block, which fails where no length is known."""

    def seekable(self):
        return False


def decode(content: Content, source: Any, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Decode an audio file to the mean of its channels, a block at a time.

    Args: as of [`decode_channels`].

    Yields:
        (sampling rate in Hz, `np.ndarray` of shape (time,), mono float32); nothing for a file without samples.

    Raises:
        ValueError: as [`decode_channels`].
    """
    for rate, rows in decode_channels(content, source, name):
        yield rate, rows.mean(axis=1)


def decode_channels(content: Content, source: Any, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Decode an audio file, a block at a time.

    Args:
        content: the whole file, as bytes or a map.
        source: the same for libsndfile: a file object or descriptor.
        name (`str`): what messages call the file.

    Yields:
        (sampling rate in Hz, `np.ndarray` of shape (time, channels), float32); nothing for a file without samples.

    Raises:
        ValueError: empty, unreadable, or cut short: its header promises more than is there, and not because it was
            written to a pipe.
    """
    if not len(content):
        raise ValueError(f"{name}: empty, the file holds no bytes")
    rate = None
    try:
        for part, promised in _parts(content, source, name):
            with _ForwardFile(part, closefd=False) as sound:
                if rate not in (None, sound.samplerate):
                    raise ValueError(
                        f"{name}: several files in one, of {rate} and {sound.samplerate} Hz; bring them to one rate"
                    )
                rate = sound.samplerate
                for rows in _blocks(sound, promised, name):
                    yield rate, rows
        return
    except soundfile.SoundFileError as error:
        reason = _reason(error)
        if rate is not None:
            raise ValueError(f"{name}: cannot be read as audio to its end ({reason})") from error
    yield from _decode_with_av(content, name, reason)


def _blocks(sound: soundfile.SoundFile, promised: int | None, name: str) -> Iterator[np.ndarray]:
    """The samples [T, channels] of an opened file. `promised`: what its header counts; None: as libsndfile says."""
    is_limited = sound.frames < UNKNOWN_FRAMES
    if promised is None:
        promised = sound.frames if is_limited else 0
    size, held, reason = max(1, BLOCK // sound.channels), 0, ""
    while not reason and (not is_limited or held < sound.frames):
        size = min(size, promised - held) if held < promised else size
        # Where the end is not known, the decoder may fail at what follows it: the marks show what it filled before
        rows = np.full((size, sound.channels), 0 if is_limited else np.nan, dtype=np.float32)
        try:
            rows = sound.read(out=rows)  # (time, channels)
        except soundfile.SoundFileError as error:
            rows = rows[: 0 if is_limited else np.argmax(np.isnan(rows[:, 0]))]
            if not held + len(rows):
                raise
            reason = _reason(error)
        held += len(rows)
        if not len(rows):
            break
        yield rows
    if held < promised - (MP3_FRAME if "MPEG" in sound.subtype else 0):
        raise ValueError(
            f"{name}: truncated, the header promises {promised} samples but only {held} are there"
            + (f" ({reason})" if reason else "")
        )
    if reason and not promised:
        _warn_of_the_rest(name, held / sound.samplerate, reason)


def _reason(error: soundfile.SoundFileError) -> str:
    return str(getattr(error, "error_string", error)).rstrip(".")


def _warn_of_the_rest(name: str, seconds: float, reason: str) -> None:
    logger.warning_once(f"{name}: the file goes on after {seconds:.2f} s, but what follows is not read ({reason})")


def _parts(content: Content, source: Any, name: str) -> Iterator[tuple[Any, int | None]]:
    """What libsndfile is to open, part after part, each with the samples that its header counts (0: none)."""
    start = _after_id3(content, 0)
    magic = bytes(content[start : start + 4])
    if magic == b"OggS":
        links = _ogg_links(content, start, name)
        yield from [(source, None)] if len(links) < 2 else [(Window(content, *link), None) for link in links]
    elif magic == b"fLaC":
        # The count is hidden: libsndfile would stop there, and fails for a count of 0, which means unknown
        information, count = _flac_information(content, start)
        yield Window(content, patch=(start + 18, information.to_bytes(8, "big"))), count
    elif _starts_mpeg(content, start) or (start and magic not in (b"RIFF", b"FORM")):
        yield from _mpeg_parts(content, 0, len(content), name)
    elif magic == b"RIFF" and content[8:12] == b"WAVE":
        yield from _wav_parts(content, source, name)
    else:
        _check_size(content, name)
        yield source, None


# --- WAV and its relatives -------------------------------------------------------------------------------------------


def _wav_parts(content: Content, source: Any, name: str) -> Iterator[tuple[Any, int | None]]:
    position, promised, is_mpeg = _wav_data(content)
    held = len(content) - position
    if not position:
        yield source, None
        return
    end = position + promised + promised % 2
    follows_no_chunk = end < len(content) and not _are_chunks(content, end)
    is_stream = promised >= UNKNOWN_SIZE or (promised == 0 and follows_no_chunk)
    # Some writers count the header as samples, or all of the file but its first 8 bytes
    counts_header = promised - held in (position, position - 8, 44, 36)
    if held < promised and not is_stream and not counts_header:
        raise ValueError(
            f"{name}: truncated, the header promises {promised} bytes of samples but only {held} are there"
        )
    if follows_no_chunk and not is_stream and bytes(content[end : end + 4096]).strip(b"\0"):
        logger.warning_once(
            f"{name}: after the {promised} bytes of samples that its header counts, {len(content) - end} bytes follow "
            "that are not read. If they are samples (of a recording that was interrupted, or of more than 4 GB), have "
            "the header written anew: `ffmpeg -ignore_length 1 -i INPUT OUTPUT.wav`"
        )
    stop = _start_of_last_chunks(content, position) if is_stream else min(end, len(content))
    if is_mpeg:
        yield from _mpeg_parts(content, position, stop, name)
    elif is_stream:
        yield Window(content, stop=stop, patch=(position - 4, b"\xff\xff\xff\xff")), None
    else:
        yield source, None


def _wav_data(content: Content) -> tuple[int, int, bool]:
    """(where a WAV file's samples begin, how many bytes its header promises, are they MPEG audio); 0 if none."""
    position, is_mpeg = 12, False
    while position + 8 <= len(content):
        chunk, size = struct.unpack_from("<4sI", content, position)
        position += 8
        if chunk == b"data":
            return position, size, is_mpeg
        if chunk == b"fmt ":
            is_mpeg = content[position : position + 2] in (b"\x50\0", b"\x55\0")
        position += size + size % 2  # chunks are padded to an even size
    return 0, 0, False


def _are_chunks(content: Content, position: int) -> bool:
    """Whether all that follows is chunks of a RIFF file, by their names and sizes."""
    while position + 8 <= len(content):
        chunk, size = struct.unpack_from("<4sI", content, position)
        if not all(32 <= letter < 127 for letter in chunk):
            return False
        position += 8 + size + size % 2
    return position in (len(content), len(content) + 1)


def _start_of_last_chunks(content: Content, position: int) -> int:
    """Where the samples of a WAV file of unknown length end: at chunks that fill the rest of it, or with the file."""
    found = []
    for chunk in TEXT_CHUNKS:
        start = content.find(chunk, position)
        while start >= 0:
            if _are_chunks(content, start):
                found.append(start)
                break
            start = content.find(chunk, start + 1)
    return min(found, default=len(content))


def _check_size(content: Content, name: str) -> None:
    """Refuse an AIFF, AU, RF64 or W64 file that is shorter than its header says; libsndfile would not."""
    magic, promised = bytes(content[:4]), 0
    if len(content) < 28:
        return
    if magic in (b"FORM", b"RIFX"):
        size = struct.unpack_from(">I", content, 4)[0]
        promised = 8 + size if 0 < size < UNKNOWN_SIZE else 0
    elif magic == b".snd":
        offset, size = struct.unpack_from(">II", content, 4)
        promised = offset + size if size < UNKNOWN_SIZE else 0
    elif magic in (b"RF64", b"riff"):
        size = struct.unpack_from("<Q", content, 20 if magic == b"RF64" else 16)[0]
        promised = size if size < FAR else 0
    if len(content) + 1 < promised:  # the last chunk may lack its padding
        raise ValueError(f"{name}: truncated, the header promises {promised} bytes but only {len(content)} are there")


# --- MP3 -------------------------------------------------------------------------------------------------------------


def _mpeg_parts(content: Content, start: int, stop: int, name: str) -> Iterator[tuple[Any, int | None]]:
    """The MP3 files in a part of a file: speech services and `cat` put one after the other."""
    stop = _before_tags(content, start, stop)
    while start < stop:
        begin, count, size = _mpeg_header(content, start)
        # With a far end, a header's mention of the size would be told to be wrong, on the terminal
        window = Window(content, start, stop, is_endless=not count)
        yield window, None
        position = start + window.position
        rest = 4 * (position - begin) / max(1, count)  # frames that hold nothing but the encoder's padding
        if not count or stop - position <= rest:
            return
        start = begin + size if position <= begin + size <= position + rest else position
        if content[start : start + 3] == b"TAG":
            start += 128
        if not _starts_mpeg(content, _after_id3(content, start)):
            _warn_of_the_rest(name, 0, "it is not MP3")
            return


def _mpeg_header(content: Content, start: int) -> tuple[int, int, int]:
    """(where the first frame is, frames and bytes that its Xing or Info header counts; 0 if it does not)."""
    start = _after_id3(content, start)
    if _starts_mpeg(content, start):
        is_mpeg_1, is_mono = content[start + 1] >> 3 & 1, content[start + 3] >> 6 == 3
        begin = start + 4 + ((17 if is_mono else 32) if is_mpeg_1 else (9 if is_mono else 17))  # side information
        is_silent = not any(content[start + 4 : begin])  # or it is a frame of sound, for the decoder
        if is_silent and content[begin : begin + 4] in (b"Xing", b"Info") and begin + 16 <= len(content):
            flags, first, second = struct.unpack_from(">III", content, begin + 4)
            count = first if flags & 1 else 0
            return start, count, (second if flags & 1 else first) if flags & 2 else 0
    return start, 0, 0


def _starts_mpeg(content: Content, position: int) -> bool:
    """Whether a frame of MPEG audio (not AAC) begins here, by its header."""
    if position + 4 > len(content):
        return False
    first, second, third = content[position], content[position + 1], content[position + 2]
    layer, bit_rate, rate = second >> 1 & 3, third >> 4, third >> 2 & 3
    return first == 0xFF and second >= 0xE0 and layer != 0 and bit_rate != 15 and rate != 3


def _after_id3(content: Content, position: int) -> int:
    """Where a file goes on after the ID3 tags at its begin."""
    while content[position : position + 3] == b"ID3" and position + 10 <= len(content):
        size = 0
        for byte in content[position + 6 : position + 10]:
            size = size << 7 | byte & 127
        position += 10 + size
    return position


def _before_tags(content: Content, start: int, stop: int) -> int:
    """Where MP3 ends, before the ID3 and APE tags behind it: they are no frames, and the decoder fails at them."""
    if content[max(start, stop - 128) : stop][:3] == b"TAG":
        stop -= 128
    footer = content[max(start, stop - 32) : stop]
    if footer[:8] == b"APETAGEX" and len(footer) == 32:
        size, _, flags = struct.unpack_from("<III", footer, 12)
        stop = max(start, stop - size - (32 if flags >> 31 else 0))
    return stop


# --- Ogg and FLAC ----------------------------------------------------------------------------------------------------


def _ogg_links(content: Content, position: int, name: str) -> list[tuple[int, int]]:
    """(start, stop) of the Ogg files in a file: radio recorders and `cat` chain them, libsndfile reads the first."""
    starts: list[int] = []
    is_first, is_last = False, True
    while content[position : position + 4] == b"OggS" and position + 27 <= len(content):
        flags, segments = content[position + 5], content[position + 26]
        if flags & 2 and not is_first:
            starts.append(position)
        is_first, is_last = bool(flags & 2), bool(flags & 4)
        position += 27 + segments + sum(content[position + 27 : position + 27 + segments])
    if not is_last or position > len(content):
        logger.warning_once(f"{name}: an Ogg file without its end; it may be cut short. What is there is read")
    return list(zip(starts, [*starts[1:], len(content)], strict=False))


def _flac_information(content: Content, start: int) -> tuple[int, int]:
    """(the 64 bits of rate, channels and count, with a count of 0; the samples that a FLAC file's header counts)."""
    number = int.from_bytes(content[start + 18 : start + 26], "big")
    count = number & (2**36 - 1)
    return number - count, count


# --- PyAV ------------------------------------------------------------------------------------------------------------


def _decode_with_av(content: Content, name: str, reason: str) -> Iterator[tuple[int, np.ndarray]]:
    """As `decode_channels`. `reason`: why libsndfile cannot open the file."""
    try:
        import av
    except ImportError:
        raise ValueError(f"{name}: cannot be read as audio ({reason}). {READABLE_FORMATS}") from None
    try:
        with av.open(Window(content), options={"format_whitelist": AV_FORMATS}) as container:
            stream = container.streams.best("audio")
            if stream is None:
                raise ValueError(f"{name}: holds no audio")
            if stream.codec_context is None:
                raise ValueError(f"{name}: cannot be read as audio ({reason}; no codec is known). {CONVERSION}")
            yield from _av_blocks(container, stream, name)
    except av.FFmpegError as error:
        what = f"{reason}; PyAV: {error.strerror}"
        raise ValueError(f"{name}: cannot be read as audio ({what}). {CONVERSION}") from error


def _av_blocks(container: Any, stream: Any, name: str) -> Iterator[tuple[int, np.ndarray]]:
    import av

    resampler = av.AudioResampler(format="fltp")  # which also keeps one rate and layout
    rate, held, damaged = 0, 0, 0
    rows: list[np.ndarray] = []
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            damaged += 1
            continue
        for resampled in [part for frame in frames for part in resampler.resample(frame)]:
            rate = resampled.sample_rate  # the stream's own may be half of it, for HE-AAC
            rows.append(resampled.to_ndarray().T)  # (time, channels)
        if sum(map(len, rows)) >= BLOCK:
            held += sum(map(len, rows))
            yield rate, np.concatenate(rows)
            rows = []
    if rate:
        rows += [frame.to_ndarray().T for frame in resampler.resample(None)]
    held += sum(map(len, rows))
    if rows:
        yield rate, np.concatenate(rows)
    promised, seconds = _av_promised(container, stream), held / (rate or 1)
    if seconds < promised - AV_SLACK:
        raise ValueError(f"{name}: truncated, the header promises {promised:.2f} s but only {seconds:.2f} s are there")
    if damaged:
        logger.warning_once(f"{name}: {damaged} packets are damaged and left out")


def _av_promised(container: Any, stream: Any) -> float:
    """Seconds of audio that the header counts; 0 if it does not, or FFmpeg only estimates them."""
    if "mov" in container.format.name and stream.duration:
        return float(stream.duration * stream.time_base)
    if "matroska" in container.format.name and container.duration and len(container.streams) == 1:
        return container.duration / 1_000_000
    return 0.0


# --- length ----------------------------------------------------------------------------------------------------------


def count_samples(content: Content, source: Any, name: str) -> tuple[int, int]:
    """(samples, sampling rate in Hz) that `decode` gives, by the header if that can be believed, else by decoding.

    Args: as for `decode`.

    Raises:
        ValueError: as `decode`; but that a file with a believable header is cut may show only when it is decoded.
    """
    if len(content) and _is_believed(content):
        # `decode` tries PyAV, or says what is wrong
        with contextlib.suppress(soundfile.SoundFileError):
            total = 0
            for part, promised in _parts(content, source, name):
                with _ForwardFile(part, closefd=False) as sound:
                    total += promised or sound.frames
                    rate = sound.samplerate
                if isinstance(part, Window):
                    part.seek(0, os.SEEK_END)  # as if it had been read
            if total < UNKNOWN_FRAMES:
                return total, rate
    blocks = [(len(rows), rate) for rate, rows in decode_channels(content, source, name)]
    return sum(length for length, _ in blocks), blocks[0][1] if blocks else 1


def _is_believed(content: Content) -> bool:
    """Whether the count of samples in a file's header can be true, and libsndfile goes by it."""
    start = _after_id3(content, 0)
    if content[start : start + 4] == b"fLaC":
        return _is_plausible_flac(content, start)
    if _starts_mpeg(content, start):
        begin, count, size = _mpeg_header(content, 0)
        return bool(count and size) and 0 <= _before_tags(content, 0, len(content)) - begin - size < size / count
    return not start and not (content[:4] == b"RIFF" and _wav_data(content)[2])


def _is_plausible_flac(content: Content, start: int) -> bool:
    """Whether a FLAC file's count of samples can be true: its frames are not larger than the samples as they are."""
    number, count = _flac_information(content, start)
    bytes_per_sample = ((number >> 41 & 7) + 1) * ((number >> 36 & 31) + 1) / 8
    position, is_last = start + 4, False
    while not is_last and position + 4 <= len(content):  # the blocks before the frames: tags, pictures
        is_last = content[position] >= 128
        position += 4 + int.from_bytes(content[position + 1 : position + 4], "big")
    return count > 0 and len(content) - position <= 1024 + 1.02 * count * bytes_per_sample
