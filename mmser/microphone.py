# SPDX-License-Identifier: Apache-2.0
"""The microphone: `listen`, what a stream makes of it, and `print_live`, what `mmser predict --live` prints."""

import contextlib
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers.utils import logging

from mmser import prediction_run
from mmser.stream import MMSERStream, StreamEvent

logger = logging.get_logger(__name__)
BLOCK_SECONDS = 0.1
WAITING_SECONDS = 30  # of sound that may wait for the model: a pause of the machine, not a model that is too slow
SILENT_SECONDS = 5  # without any block, even of silence: the microphone is gone


def listen(
    stream: MMSERStream, device: int | str | None = None, seconds: float | None = None
) -> Iterator[StreamEvent]:
    """
    Reset a stream and push the microphone into it, at its sampling rate, until the caller stops or time is over.

    The microphone is closed when the iteration ends, by Ctrl-C too; `stream.flush()` gives the last event then.

    Args:
        stream (`MMSERStream`): what classifies.
        device (`int` or `str`): number or name of the microphone, as `python -m sounddevice` lists them; by default
            that of the system.
        seconds (`float`): when to stop; the last event is given too. By default never.

    Yields:
        [`StreamEvent`], as they are complete.

    Raises:
        ImportError: sounddevice is not installed, or lacks the library PortAudio.
        OSError: a microphone that cannot be opened or stops; a model that takes longer than the sound lasts.
    """
    sounddevice = _import_sounddevice()
    stream.reset()
    rate = stream.sampling_rate
    left = None if seconds is None else round(seconds * rate)
    blocks: queue.Queue[np.ndarray] = queue.Queue(round(WAITING_SECONDS / BLOCK_SECONDS))
    is_behind = threading.Event()

    def receive(samples: np.ndarray, frames: int, time: Any, status: Any) -> None:  # in a thread of PortAudio
        if status:
            logger.warning_once(f"The microphone lost some sound ({status}). Further losses are not reported.")
        try:
            blocks.put_nowait(samples.copy())
        except queue.Full:
            is_behind.set()

    with _opened(sounddevice, rate, device, receive):
        while left is None or left > 0:
            if is_behind.is_set():
                raise OSError(
                    f"The model takes longer than the sound lasts, {WAITING_SECONDS} s of it are waiting: take a "
                    "smaller or an exported model, or a shorter `stride_length_s`."
                )
            try:
                samples = blocks.get(timeout=SILENT_SECONDS)[:left]
            except queue.Empty:
                raise OSError(f"The microphone gave nothing for {SILENT_SECONDS} s: is it still there?") from None
            left = None if left is None else left - len(samples)
            yield from stream.push(samples)
    yield from stream.flush()


def default_rate(device: int | str | None = None) -> int:
    """The sampling rate of a microphone in Hz: some systems refuse any other. Args and errors as of [`listen`]."""
    sounddevice = _import_sounddevice()
    try:
        return round(sounddevice.query_devices(device, "input")["default_samplerate"])
    except (sounddevice.PortAudioError, ValueError) as error:
        raise OSError(f"There is no such microphone: {error}") from error


def print_live(checkpoint: str, device: str | None, chunk_length_s: float, stride_length_s: float | None) -> int:
    """
    Listen until Ctrl-C, and print a line for each event, the last one too. Returns the exit code, 0.

    Args:
        checkpoint, device: as of [`load_classifier`].
        chunk_length_s, stride_length_s: as of [`MMSERStream`].
    """
    rate = default_rate()  # first: what is missing is told before a model is loaded
    classifier = prediction_run.load_classifier(checkpoint, device)
    options: dict[str, Any] = {"chunk_length_s": chunk_length_s, "stride_length_s": stride_length_s}
    stream = MMSERStream(classifier, sampling_rate=rate, **options)
    print("Listening. Ctrl-C ends it.", file=sys.stderr)
    try:
        for event in listen(stream):
            print(event, flush=True)
    except KeyboardInterrupt:
        for event in stream.flush():
            print(event, flush=True)
    return 0


def _import_sounddevice() -> Any:
    try:
        import sounddevice
    except ImportError as error:
        raise ImportError('The microphone needs sounddevice: `pip install "mmser[live]"`') from error
    except OSError as error:  # it comes without PortAudio on Linux
        raise ImportError(
            f"The microphone needs the library PortAudio: `apt install libportaudio2`, or its like ({error})"
        ) from error
    return sounddevice


@contextlib.contextmanager
def _opened(sounddevice: Any, rate: int, device: int | str | None, receive: Any) -> Iterator[None]:
    """While this lasts, `receive` is called with blocks of shape (time, 1)."""
    try:
        microphone = sounddevice.InputStream(
            samplerate=rate,
            blocksize=round(BLOCK_SECONDS * rate),
            device=device,
            channels=1,
            dtype="float32",
            callback=receive,
        )
        microphone.start()
    except (sounddevice.PortAudioError, ValueError) as error:
        raise OSError(f"The microphone cannot be opened at {rate} Hz: {error}") from error
    try:
        yield
    finally:
        microphone.close()  # stops it too
