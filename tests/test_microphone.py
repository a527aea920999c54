# SPDX-License-Identifier: Apache-2.0
"""Tests of `mmser.microphone`, with a sounddevice that plays a recording: a thread calls back, as PortAudio's does."""

import queue
import sys
import threading
import time
import types

import numpy as np
import pytest
from tiny import tiny_model
from tiny_corpus import tiny_processor

import predict_hf
from mmser import microphone
from mmser.microphone import listen
from mmser.stream import MMSERStream
from processing_mmser import MMSERPipeline

RATE = 48000
SOUND = (0.1 * np.random.default_rng(0).standard_normal(round(2.5 * RATE))).astype(np.float32)


class PortAudioError(Exception):
    pass


class FakeInput:
    """Gives `SOUND`, then silence, block by block until it is closed."""

    made: list["FakeInput"] = []  # noqa: RUF012
    starts, delay = True, 0.002  # seconds between blocks

    def __init__(self, samplerate, blocksize, device, channels, dtype, callback):
        if device == "none":
            raise ValueError("No input device matching 'none'")
        self.options = samplerate, blocksize, device, channels, dtype
        self.callback, self.blocksize, self.is_closed = callback, blocksize, threading.Event()
        self.thread = threading.Thread(target=self.play, daemon=True)
        self.made.append(self)

    def start(self):
        if not self.starts:
            raise PortAudioError("Invalid sample rate")
        self.thread.start()

    def play(self):
        shared = np.zeros((self.blocksize, 1), dtype=np.float32)  # PortAudio's memory is used again as well
        for start in range(0, 10_000 * self.blocksize, self.blocksize):
            if self.is_closed.wait(self.delay):
                return
            block = SOUND[start : start + self.blocksize]
            shared[:] = 0
            shared[: len(block), 0] = block
            self.callback(shared, self.blocksize, None, "input overflow" if start == 0 else "")
            shared[:] = 9

    def close(self):
        self.is_closed.set()
        self.thread.join()


@pytest.fixture
def sounddevice(monkeypatch):
    microphone.logger.warning_once.cache_clear()  # another test of this process may have warned
    module = types.ModuleType("sounddevice")
    module.InputStream = type("InputStream", (FakeInput,), {"made": []})
    module.PortAudioError = PortAudioError
    module.query_devices = lambda device, kind: {"default_samplerate": float(RATE)}
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    return module.InputStream


def refuse(device, kind):
    raise PortAudioError(f"Error querying device {device}")


@pytest.fixture(scope="module")
def stream():
    options = {"sampling_rate": RATE, "chunk_length_s": 1.0, "stride_length_s": 0.1}
    return MMSERStream(tiny_model(), tiny_processor(), **options)


def test_the_events_are_those_of_what_was_said(stream, sounddevice, caplog):
    stream.reset()
    expected = stream.push(SOUND[: round(2.42 * RATE)]) + stream.flush()
    assert [event.has_speech for event in expected] == [True, True, True]
    assert list(listen(stream, device=3, seconds=2.42)) == expected  # not a whole number of blocks
    (opened,) = sounddevice.made
    assert opened.options == (RATE, RATE // 10, 3, 1, "float32") and opened.is_closed.is_set()
    assert "The microphone lost some sound (input overflow)" in caplog.text


def test_who_stops_closes_the_microphone_and_may_have_the_last_event(stream, sounddevice):
    events = listen(stream)
    first = next(events)
    assert (first.start, first.end) == (0.0, 0.9) and not sounddevice.made[0].is_closed.is_set()
    events.close()  # as a `for` does that is left, by Ctrl-C too
    assert sounddevice.made[0].is_closed.is_set()
    assert stream.flush()[0].start == 0.9


def test_what_goes_wrong_is_one_sentence(stream, sounddevice, monkeypatch):
    with pytest.raises(OSError, match="cannot be opened at 48000 Hz: No input device matching 'none'"):
        next(listen(stream, device="none"))
    monkeypatch.setattr(sys.modules["sounddevice"], "query_devices", refuse)
    with pytest.raises(OSError, match="There is no such microphone: Error querying device -1"):
        microphone.default_rate(-1)
    monkeypatch.setattr(sounddevice, "starts", False)
    with pytest.raises(OSError, match="cannot be opened at 48000 Hz: Invalid sample rate"):
        next(listen(stream))
    monkeypatch.setattr(sounddevice, "starts", True)
    monkeypatch.setattr(sounddevice, "delay", 60)
    monkeypatch.setattr(microphone, "SILENT_SECONDS", 0.05)
    with pytest.raises(OSError, match="gave nothing for"):
        next(listen(stream))


def test_the_command_prints_a_line_for_each_event_until_it_is_interrupted(
    sounddevice, stream, tmp_path, monkeypatch, capsys
):
    model, processor = tiny_model(), tiny_processor()
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    classifier = MMSERPipeline(model=model, processor=processor, device="cpu", task="audio-classification")
    monkeypatch.setattr(microphone.prediction_run, "load_classifier", lambda *_: classifier)
    flags = ["--chunk_length_s", "1", "--stride_length_s", "0.1", "--checkpoint", str(tmp_path)]
    receive = queue.Queue.get
    got = []

    def interrupted(self, *args, **kwargs):
        got.append(1)
        if len(got) == 25:  # after 2.4 s
            raise KeyboardInterrupt
        return receive(self, *args, **kwargs)

    monkeypatch.setattr(queue.Queue, "get", interrupted)
    assert predict_hf.main(["--live", *flags]) == 0
    stream.reset()
    expected = stream.push(SOUND[: round(2.4 * RATE)]) + stream.flush()
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(event) for event in expected] and len(expected) == 3
    assert printed.err.endswith("Listening. Ctrl-C ends it.\n") and sounddevice.made[0].is_closed.is_set()
    for words, said in ((["clip.wav"], "leave out an input"), (["--output", "a.csv"], "leave out --output")):
        with pytest.raises(ValueError, match=said):
            predict_hf.main([*words, "--live", *flags])


def test_a_model_that_is_too_slow_is_told(stream, sounddevice, monkeypatch):
    monkeypatch.setattr(sounddevice, "delay", 0.0001)
    monkeypatch.setattr(microphone, "WAITING_SECONDS", 1)
    monkeypatch.setattr(stream, "push", lambda samples: time.sleep(0.2) or [])
    with pytest.raises(OSError, match="longer than the sound lasts, 1 s of it are waiting"):
        next(listen(stream))
    assert sounddevice.made[0].is_closed.is_set()


def test_a_missing_package_is_named(stream, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(ImportError, match=r'pip install "mmser\[live\]"'):
        microphone.default_rate()
    with pytest.raises(ImportError, match=r'pip install "mmser\[live\]"'):
        next(listen(stream))
    monkeypatch.delitem(sys.modules, "sounddevice")
    (tmp_path / "sounddevice.py").write_text("raise OSError('PortAudio library not found')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="needs the library PortAudio"):
        next(listen(stream))
