# SPDX-License-Identifier: Apache-2.0
"""Tests of `decoding_mmser` and the inputs of `audio_mmser`: files whose headers lie, and what carries its own rate.

References are independent: the length of what was encoded, soundfile's own reading of an ordinary file, and PyAV.
"""

import io
import struct
import tracemalloc

import av
import datasets
import numpy as np
import pytest
import soundfile
import torch
from test_processing import LABELS, StandIn, encoded, noise, peak_frequency, sine, tokenizer  # noqa: F401
from transformers import BertConfig, Wav2Vec2FeatureExtractor
from transformers.utils import logging

import audio_mmser
from audio_mmser import audio_length, load_audio, stream_audio, why_silent
from mmser.examples import ExampleReader
from mmser.voice_activity import LOWEST_FLOOR, ON
from pipeline_mmser import MMSERPipeline
from processing_mmser import MMSERProcessor

RATE = 16000
FRAME = 576  # samples of an MP3 frame at 16 kHz
# The variable bit rate falls in the second half, so that a length estimated from the first bytes is far too short
CLIP = np.concatenate([noise(3 * RATE), 0.1 * sine(3.0)])


@pytest.fixture(autouse=True)
def fresh_warnings():
    audio_mmser._warned.clear()
    logging.get_logger("decoding_mmser").warning_once.cache_clear()


@pytest.fixture
def warnings_of(caplog):
    names = ("audio_mmser", "decoding_mmser")
    return lambda: [record.getMessage() for record in caplog.records if record.name in names]


@pytest.fixture
def without_av(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)


def every_form(content, tmp_path):
    """The samples of a file by its path, by its content and as a stream, which must agree; and its length."""
    path = tmp_path / "clip.bin"
    path.write_bytes(content)
    samples = load_audio(path)
    np.testing.assert_array_equal(load_audio(content), samples)
    for audio in (path, content):
        np.testing.assert_array_equal(np.concatenate(list(stream_audio(audio, block_seconds=0.7))), samples)
        assert audio_length(audio) == len(samples)
    return samples


def refused(content, reason, tmp_path):
    path = tmp_path / "bad.bin"
    path.write_bytes(content)
    for read in (load_audio, lambda audio: list(stream_audio(audio))):
        with pytest.raises(ValueError, match=rf"bad\.bin.*{reason}"):
            read(path)


def patched(content, offset, new):
    return content[:offset] + new + content[offset + len(new) :]


def av_encoded(samples, container, codec, rate=RATE, options=None, file=None):
    file = file or io.BytesIO()
    with av.open(file, "w", format=container, options=options or {}) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
        frame.sample_rate = RATE
        resampler = av.AudioResampler(format=stream.format.name, layout="mono", rate=rate)
        frames = resampler.resample(frame) + resampler.resample(None)
        for packet in [packet for one in [*frames, None] for packet in stream.encode(one)]:
            output.mux(packet)
    return file.getvalue() if isinstance(file, io.BytesIO) else file.read_bytes()


def av_decoded(content):
    with av.open(io.BytesIO(content)) as container:
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
    return np.concatenate(frames, axis=1).mean(axis=0)


def mp3(samples=CLIP, rate=RATE, **options):
    return encoded(samples, rate, format="MP3", **options)


def without_xing(content):
    """An MP3 file less its first frame, which holds no sound but the Xing header."""
    position = content.find(content[:3], 36)
    assert content.find(b"Xing") < position or content.find(b"Info") < position
    return content[position:]


ID3V2 = b"ID3\x03\0\0\0\0\x02\0" + bytes(256)
ID3V1 = b"TAG" + b"title".ljust(125)
APE = b"abcdefgh" * 500 + b"APETAGEX" + struct.pack("<IIII", 2000, 4032, 1, 0) + bytes(8)


class TestMP3:
    def test_ordinary_files_are_bit_identical(self, tmp_path, warnings_of, capfd):
        for mode in ("CONSTANT", "VARIABLE"):
            content = mp3(bitrate_mode=mode)
            with soundfile.SoundFile(io.BytesIO(content)) as file:
                expected = file.read(dtype="float32")
            for before, after in ((b"", b""), (ID3V2, b""), (b"", ID3V1), (ID3V2, APE + ID3V1)):
                np.testing.assert_array_equal(every_form(before + content + after, tmp_path), expected)
        assert warnings_of() == [] and capfd.readouterr().err == ""

    @pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
    def test_no_xing_header(self, tmp_path, warnings_of, mode):
        content = without_xing(mp3(bitrate_mode=mode))
        samples = every_form(content, tmp_path)
        assert len(samples) == -(-(len(CLIP) + 1105) // FRAME) * FRAME  # all frames, with the encoder's delay
        np.testing.assert_allclose(samples, av_decoded(content), atol=1e-4)
        for before, after in ((ID3V2, b""), (b"", ID3V1), (b"", APE), (ID3V2, APE + ID3V1)):
            np.testing.assert_array_equal(every_form(before + content + after, tmp_path), samples)
        assert warnings_of() == []

    def test_xing_header_without_a_count(self, tmp_path):
        content = mp3()
        samples = every_form(patched(content, content.find(b"Xing") + 4, bytes(4)), tmp_path)
        assert len(CLIP) <= len(samples) <= len(CLIP) + 4 * FRAME

    def test_xing_header_with_a_wrong_count(self, tmp_path):
        content = mp3()
        position = content.find(b"Xing") + 8
        refused(patched(content, position, struct.pack(">I", 10**5)), "truncated", tmp_path)
        # of a recording that went on, and one that nothing can be as long as
        for counts in (struct.pack(">II", 20, 4000), struct.pack(">I", 2**32 - 1)):
            samples = every_form(patched(content, position, counts), tmp_path)
            assert len(samples) == pytest.approx(len(CLIP), abs=4 * FRAME)
        samples = load_audio(patched(content, position, struct.pack(">I", 20)))
        assert len(samples) == pytest.approx(len(CLIP), abs=4 * FRAME)

    def test_the_first_bytes_are_lost(self, tmp_path):
        samples = every_form(mp3()[100:], tmp_path)  # inside of the Xing header; PyAV finds the next frame
        assert len(CLIP) <= len(samples) <= len(CLIP) + 4 * FRAME

    @pytest.mark.parametrize("between", [b"", ID3V2, ID3V1 + ID3V2])
    def test_files_one_after_the_other(self, tmp_path, between):
        for first, second in ((mp3(), mp3(sine(2.0))), (mp3(sine(0.3)), mp3(0.01 * sine(0.1)))):
            samples = every_form(first + between + second, tmp_path)
            np.testing.assert_array_equal(samples, np.concatenate([load_audio(first), load_audio(second)]))
        assert len(every_form(mp3() + between + mp3(), tmp_path)) == 2 * len(CLIP)

    def test_files_of_two_rates_are_refused(self, tmp_path):
        refused(mp3() + mp3(sine(2.0, 44100), 44100), "of 16000 and 44100 Hz", tmp_path)

    def test_a_cut_is_an_error_if_the_header_tells(self, tmp_path):
        refused(mp3()[:-5000], "truncated|cannot be read", tmp_path)

    def test_a_cut_without_a_header_is_told_once(self, tmp_path, warnings_of):
        content = without_xing(mp3())
        whole = load_audio(content)
        samples = every_form(content[: len(content) // 2 + 77], tmp_path)
        np.testing.assert_array_equal(samples, whole[: len(samples)])
        (by_path,) = [message for message in warnings_of() if "clip.bin" in message]
        assert "not read" in by_path
        assert len(samples) > len(CLIP) / 4

    @pytest.mark.parametrize("has_header", [True, False])
    @pytest.mark.parametrize("count", [None, 100, 10**7])
    def test_in_wav(self, tmp_path, has_header, count):
        data = mp3() if has_header else without_xing(mp3())
        header = struct.pack("<HHIIHHHHIHHH", 0x55, 1, RATE, 4000, 1, 0, 12, 1, 2, 288, 1, 1393)
        chunks = [(b"fmt ", header), (b"data", data), (b"LIST", b"abcd")]
        if count:
            chunks.insert(1, (b"fact", struct.pack("<I", count)))
        body = b"WAVE" + b"".join(name + struct.pack("<I", len(part)) + part for name, part in chunks)
        samples = every_form(b"RIFF" + struct.pack("<I", len(body)) + body, tmp_path)
        np.testing.assert_array_equal(samples, load_audio(data))
        refused((b"RIFF" + struct.pack("<I", len(body)) + body)[:-3000], "truncated", tmp_path)


def flac_count(content, count):
    number = int.from_bytes(content[18:26], "big") >> 36 << 36
    return patched(content, 18, (number | count).to_bytes(8, "big"))


class TestFLAC:
    content = encoded(CLIP, format="FLAC")

    @pytest.mark.parametrize("count", [len(CLIP), 0, 1000, len(CLIP) - 1])
    def test_the_count_cuts_nothing(self, tmp_path, count, warnings_of):
        expected, _ = soundfile.read(io.BytesIO(self.content), dtype="float32")
        content = flac_count(self.content, count)
        path = tmp_path / "clip.flac"
        path.write_bytes(content)
        np.testing.assert_array_equal(load_audio(path), expected)
        if count != len(CLIP) - 1:
            np.testing.assert_array_equal(every_form(content, tmp_path), expected)
        assert warnings_of() == []

    def test_a_tag_behind_the_samples(self, tmp_path, warnings_of):
        expected = load_audio(self.content)
        np.testing.assert_array_equal(every_form(self.content + ID3V1, tmp_path), expected)
        np.testing.assert_array_equal(every_form(ID3V2 + self.content, tmp_path), expected)
        assert warnings_of() == []
        np.testing.assert_array_equal(every_form(flac_count(self.content, 0) + ID3V1, tmp_path), expected)

    def test_a_count_that_is_too_large(self, tmp_path):
        refused(flac_count(self.content, len(CLIP) + 1), f"truncated.*{len(CLIP)} are there", tmp_path)
        tracemalloc.start()
        refused(flac_count(self.content, 2**36 - 1), "truncated", tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2e7  # not 275 GB
        tracemalloc.stop()

    def test_a_cut(self, tmp_path, warnings_of):
        refused(self.content[:60000], "truncated", tmp_path)
        samples = every_form(flac_count(self.content, 0)[:60000], tmp_path)
        np.testing.assert_array_equal(samples, load_audio(self.content)[: len(samples)])
        assert len(samples) > RATE and len([message for message in warnings_of() if "clip.bin" in message]) == 1


class TestWAV:
    content = encoded(CLIP)

    @pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0x7F000000, 0x80000000])
    def test_written_to_a_pipe(self, tmp_path, size, warnings_of):
        for riff in (0, size, 0xFFFFFFFF):
            content = patched(patched(self.content, 40, struct.pack("<I", size)), 4, struct.pack("<I", riff))
            np.testing.assert_array_equal(every_form(content, tmp_path), load_audio(self.content))
        assert warnings_of() == []

    @pytest.mark.parametrize("extra", [44, 36])
    def test_the_size_counts_the_header(self, tmp_path, extra):
        content = patched(self.content, 40, struct.pack("<I", 2 * len(CLIP) + extra))
        np.testing.assert_array_equal(every_form(content, tmp_path), load_audio(self.content))

    def test_nothing_but_chunks(self, tmp_path):
        empty = patched(encoded(np.zeros(0)), 40, bytes(4))
        for content in (empty, empty + b"LIST" + struct.pack("<I", 4) + b"abcd"):
            refused(content, "empty", tmp_path)

    def test_a_large_size_is_not_allocated(self, tmp_path):
        tracemalloc.start()
        for size in (0xFFFFFFFF, 0):
            every_form(patched(self.content, 40, struct.pack("<I", size)), tmp_path)
        refused(patched(self.content, 40, struct.pack("<I", 0x7E000000)), "truncated", tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2e7
        tracemalloc.stop()

    def test_an_unknown_codec_and_an_impossible_rate(self, tmp_path):
        refused(patched(self.content, 20, b"\x77\x77"), "cannot be read as audio", tmp_path)
        refused(encoded(CLIP, 2**31 - 1, format="AU"), "at most 10000000", tmp_path)

    def test_more_than_the_header_counts(self, tmp_path, warnings_of):
        content = patched(self.content, 40, struct.pack("<I", RATE))
        assert len(every_form(content, tmp_path)) == RATE // 2
        (message,) = [message for message in warnings_of() if "clip.bin" in message]
        assert f"{2 * len(CLIP) - RATE} bytes follow" in message

    @pytest.mark.parametrize("format_", ["AIFF", "AU", "W64", "RF64", "WAVEX"])
    def test_relatives(self, tmp_path, format_):
        content = encoded(CLIP, format=format_)
        np.testing.assert_array_equal(every_form(content, tmp_path), load_audio(self.content))
        refused(content[:-9000], "truncated", tmp_path)

    def test_au_of_unknown_size(self, tmp_path):
        content = patched(encoded(CLIP, format="AU"), 8, b"\xff" * 4)
        np.testing.assert_array_equal(every_form(content, tmp_path), load_audio(self.content))

    @pytest.mark.parametrize("subtype", ["ULAW", "IMA_ADPCM", "MS_ADPCM", "GSM610", "PCM_24", "DOUBLE"])
    def test_other_codecs(self, tmp_path, subtype):
        content = encoded(CLIP, subtype=subtype)
        expected, _ = soundfile.read(io.BytesIO(content), dtype="float32")
        np.testing.assert_array_equal(every_form(content, tmp_path), expected)
        refused(content[:-5000], "truncated", tmp_path)


class TestOgg:
    @pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
    def test_chained(self, tmp_path, subtype, warnings_of):
        first, second = (encoded(clip, format="OGG", subtype=subtype) for clip in (CLIP, sine(2.0)))
        expected, _ = soundfile.read(io.BytesIO(first), dtype="float32")
        np.testing.assert_array_equal(every_form(first, tmp_path), expected)
        samples = every_form(first + second, tmp_path)
        np.testing.assert_array_equal(samples, np.concatenate([load_audio(first), load_audio(second)]))
        assert len(samples) == len(CLIP) + 2 * RATE and warnings_of() == []

    @pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
    def test_a_cut_is_told_once(self, tmp_path, subtype, warnings_of):
        content = encoded(CLIP, format="OGG", subtype=subtype)
        samples = every_form(content[: int(0.7 * len(content))], tmp_path)
        (message,) = [message for message in warnings_of() if "clip.bin" in message]
        assert 0 < len(samples) < len(CLIP) and "cut" in message


AV_FILES = {
    "m4a": ("ipod", "aac", RATE),
    "mp4": ("mp4", "aac", 44100),
    "mov": ("mov", "alac", RATE),
    "aac": ("adts", "aac", RATE),
    "webm": ("webm", "libopus", 48000),
    "mkv": ("matroska", "aac", RATE),
}


class TestPyAV:
    @pytest.mark.parametrize("kind", AV_FILES)
    def test_containers(self, tmp_path, kind, monkeypatch, warnings_of):
        monkeypatch.setenv("PATH", "")  # no ffmpeg
        container, codec, rate = AV_FILES[kind]
        samples = every_form(av_encoded(sine(2.0), container, codec, rate), tmp_path)
        assert len(samples) == pytest.approx(2 * RATE, abs=2 * 1024 + 512)  # the delay and padding of AAC
        assert peak_frequency(samples) == pytest.approx(440, abs=2)
        assert np.abs(samples[RATE // 2 : RATE]).max() == pytest.approx(0.4, abs=0.02)
        assert warnings_of() == []

    def test_channels_are_averaged(self):
        file = io.BytesIO()
        with av.open(file, "w", format="mov") as output:
            stream = output.add_stream("alac", rate=RATE, layout="stereo")
            both = np.stack([sine(1.0, frequency=300), sine(1.0, frequency=900)])
            frame = av.AudioFrame.from_ndarray(both, format="fltp", layout="stereo")
            frame.sample_rate = RATE
            frames = av.AudioResampler(format=stream.format.name, layout="stereo", rate=RATE).resample(frame)
            for packet in [packet for one in [*frames, None] for packet in stream.encode(one)]:
                output.mux(packet)
        np.testing.assert_allclose(load_audio(file.getvalue()), both.mean(axis=0), atol=1e-4)

    @pytest.mark.parametrize("kind", ["m4a", "webm", "aac"])
    def test_without_it_the_extra_is_named(self, kind, without_av, tmp_path):
        container, codec, rate = AV_FILES[kind]
        refused(av_encoded(sine(1.0), container, codec, rate), r'pip install "mmser\[av\]"', tmp_path)

    def test_a_cut(self, tmp_path, warnings_of):
        whole = av_encoded(CLIP, "mp4", "aac", options={"movflags": "faststart"}, file=tmp_path / "a.mp4")
        assert whole.find(b"moov") < whole.find(b"mdat")
        refused(whole[: int(0.6 * len(whole))], "truncated", tmp_path)
        refused(av_encoded(CLIP, "webm", "libopus", 48000)[:-9000], "truncated", tmp_path)
        stream = av_encoded(CLIP, "adts", "aac")  # which has no header
        samples = every_form(stream[: int(0.6 * len(stream))], tmp_path)
        assert len(samples) > len(CLIP) / 4
        assert len([message for message in warnings_of() if "clip.bin" in message]) == 1

    def test_of_unknown_length(self, tmp_path):
        class Pipe(io.RawIOBase):
            """As a browser's recorder writes: it cannot go back."""

            def __init__(self):
                self.data = b""

            def writable(self):
                return True

            def write(self, data):
                self.data += bytes(data)
                return len(data)

        pipe = Pipe()
        with av.open(pipe, "w", format="webm", options={"live": "1"}) as output:
            stream = output.add_stream("libopus", rate=48000, layout="mono")
            frame = av.AudioFrame.from_ndarray(sine(2.0, 48000)[None], format="flt", layout="mono")
            frame.sample_rate = 48000
            for packet in [packet for one in (frame, None) for packet in stream.encode(one)]:
                output.mux(packet)
        samples = every_form(pipe.data, tmp_path)
        assert len(samples) == pytest.approx(2 * RATE, abs=400)

    @pytest.mark.parametrize(
        "content",
        [
            b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
            b"ffconcat version 1.0\nfile '/etc/hostname'\n",
            b"some words, no audio " * 50,
            b"\x89PNG\r\n\x1a\n" + bytes(500),
        ],
    )
    def test_what_is_no_audio(self, content, tmp_path):
        refused(content, r"cannot be read as audio \(.*PyAV: .*\)\. `ffmpeg", tmp_path)  # PyAV is installed: no advice

    def test_pictures_that_move_without_a_sound(self, tmp_path):
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as output:
            stream = output.add_stream("mpeg4", rate=10)
            stream.width = stream.height = 32
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))
            for packet in [packet for one in (frame, None) for packet in stream.encode(one)]:
                output.mux(packet)
        refused(file.getvalue(), "holds no audio", tmp_path)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000])
def test_the_length_is_that_of_the_samples(rate):
    for samples in (400, 401, 4801, 9999, 10001, 16001):
        content = encoded(noise(samples), rate)
        assert audio_length(content) == len(load_audio(content))


def test_the_length_of_a_row_agrees_with_its_samples(tmp_path):
    paths = {
        "a.mp3": without_xing(mp3()),
        "b.flac": flac_count(TestFLAC.content, 0),
        "c.wav": patched(TestWAV.content, 40, bytes(4)),
        "d.mp3": mp3() + mp3(),
    }
    reader = ExampleReader()
    for name, content in paths.items():
        (tmp_path / name).write_bytes(content)
        for audio in (str(tmp_path / name), {"bytes": content, "path": None}):
            row = {"audio": audio, "row": "row 3", "labels": 0}
            assert reader.length(row) == reader(row, np.random.default_rng())["length"]


def test_empty_files_are_empty(tmp_path):
    refused(b"", "empty, the file holds no bytes", tmp_path)
    for read in (load_audio, audio_length, lambda audio: list(stream_audio(audio))):
        with pytest.raises(ValueError, match="empty, the file holds no bytes"):
            read(b"")
    (tmp_path / "none.wav").write_bytes(b"")
    for audio in (str(tmp_path / "none.wav"), {"bytes": b"", "path": None}, {"bytes": b"", "path": "a.wav"}):
        row = {"audio": audio, "text": "no", "row": "row 3", "labels": 0}
        for method in (lambda row: ExampleReader()(row, np.random.default_rng()), ExampleReader().length):
            with pytest.raises(ValueError, match=r"row 3: .*empty"):
                method(row)


# --- what carries its own rate ---------------------------------------------------------------------------------------


class Decoder:
    """As torchcodec's `AudioDecoder`, which needs FFmpeg on the machine: samples (channels, time) and their rate."""

    def __init__(self, samples, rate, error=None):
        self.samples, self.rate, self.error = samples, rate, error
        self.metadata = type("Metadata", (), {"duration_seconds": samples.shape[-1] / rate})()

    def get_all_samples(self):
        if self.error:
            raise RuntimeError(self.error)
        values = {"data": torch.from_numpy(self.samples), "sample_rate": self.rate}
        return type("AudioSamples", (), values)()


@pytest.fixture
def forms(tmp_path):
    """One clip of 22,050 Hz in every form that carries its rate."""
    clip = noise(11025)
    content = encoded(clip, 22050, subtype="FLOAT")
    path = tmp_path / "clip.wav"
    path.write_bytes(content)
    stereo = np.stack([clip, clip])
    return {
        "path": path,
        "bytes": content,
        "bytes of a data set": {"bytes": content, "path": "gone.wav"},
        "path of a data set": {"bytes": None, "path": str(path)},
        "decoded by datasets 3": {"array": clip, "path": "gone.wav", "sampling_rate": 22050},
        "raw": {"raw": clip, "sampling_rate": 22050},
        "decoder": Decoder(stereo, 22050),
        "samples of a decoder": Decoder(stereo, 22050).get_all_samples(),
        "Gradio": (22050, clip),
        "Gradio, stereo": (22050, stereo.T),
        "nested": {"audio": {"array": clip, "sampling_rate": 22050}},
        "nested decoder": {"audio": Decoder(stereo, 22050)},
    }


@pytest.fixture
def processor(tokenizer):  # noqa: F811
    return MMSERProcessor(Wav2Vec2FeatureExtractor(), tokenizer)


@pytest.fixture
def classifier(processor):
    config = BertConfig(id2label=dict(enumerate(LABELS)), label2id={label: i for i, label in enumerate(LABELS)})
    return MMSERPipeline(model=StandIn(config), processor=processor, task="audio-classification", device="cpu")


class TestForms:
    def test_every_form_is_the_same_clip_everywhere(self, forms, processor, classifier):
        expected = load_audio(forms["path"])
        values = processor(expected, sampling_rate=RATE)["input_values"]
        answer = classifier({"raw": expected, "sampling_rate": RATE})
        for form in forms.values():
            np.testing.assert_allclose(load_audio(form, 8000), expected, atol=1e-6)  # its own rate counts
            np.testing.assert_allclose(np.concatenate(list(stream_audio(form))), expected, atol=1e-6)
            torch.testing.assert_close(processor(form)["input_values"], values, atol=1e-5, rtol=0)
            torch.testing.assert_close(processor([form, form])["input_values"][1:], values, atol=1e-5, rtol=0)
            for result in (classifier(form), *classifier([form] * 2, batch_size=2)):
                assert result[0]["label"] == answer[0]["label"]
                assert result[0]["score"] == pytest.approx(answer[0]["score"], abs=1e-5)
            chunked = classifier(form, chunk_length_s=1.0)
            assert chunked["scores"][0]["score"] == pytest.approx(answer[0]["score"], abs=1e-5)

    def test_integers_of_gradio_are_scaled(self):
        clip = sine()
        samples = (clip * 32767).astype(np.int16)
        np.testing.assert_allclose(load_audio((RATE, samples)), clip, atol=1e-4)
        np.testing.assert_allclose(load_audio((RATE, np.stack([samples] * 2, axis=1))), clip, atol=1e-4)

    @pytest.mark.parametrize(("dtype", "zero", "scale"), [("int8", 0, 2**7), ("uint16", 2**15, 2**15)])
    def test_other_integers_are_scaled(self, dtype, zero, scale):
        samples = np.round(sine() * scale * 0.9 + zero).astype(dtype)
        np.testing.assert_allclose(load_audio(samples, RATE), 0.9 * sine(), atol=1 / scale)

    def test_columns_of_datasets(self, processor, classifier):
        contents = [encoded(noise(9000, seed)) for seed in range(3)]
        table = datasets.Dataset.from_dict({"audio": [{"bytes": content, "path": None} for content in contents]})
        table = table.cast_column("audio", datasets.Audio(decode=False))
        column = table["audio"]
        assert not isinstance(column, list)
        expected = processor(contents)["input_values"]
        assert torch.equal(processor(column)["input_values"], expected)
        assert torch.equal(processor(column[:2])["input_values"], expected[:2])
        for options in ({}, {"batch_size": 2}, {"chunk_length_s": 1.0}):
            assert classifier(column, **options) == classifier(contents, **options)

    def test_what_is_wrong_is_named(self, processor, classifier):
        broken = Decoder(noise(900)[None], RATE, error="no packets")
        with pytest.raises(ValueError, match=r"audio row 1: cannot be decoded by torchcodec \(no packets\)"):
            processor([noise(900), broken], sampling_rate=RATE)
        for batch_size in (1, 2):
            with pytest.raises(ValueError, match=r"input 1: .*no packets"):
                classifier([{"text": "no"}, broken], batch_size=batch_size)
        with pytest.raises(ValueError, match=r"a dict needs one of.*'raw'.*got \['sampling_rate'\]"):
            load_audio({"sampling_rate": RATE})
        with pytest.raises(ValueError, match="`sampling_rate` is required"):
            load_audio({"array": noise(900)})


class TestLoudness:
    @pytest.mark.parametrize("form", ["array", "file", "stream", "pair"])
    def test_16_bit_samples_as_floats_are_told_once(self, form, warnings_of):
        loud = np.round(sine() * 32767).astype(np.float32)
        content = encoded(loud, subtype="FLOAT")
        read = {
            "array": lambda: load_audio(loud, RATE, name="clip 7"),
            "file": lambda: load_audio(content, name="clip 7"),
            "stream": lambda: np.concatenate(list(stream_audio(content, name="clip 7"))),
            "pair": lambda: load_audio((RATE, loud), name="clip 7"),
        }[form]
        for _ in range(3):
            np.testing.assert_array_equal(read(), loud)  # told, not changed
        (message,) = warnings_of()
        assert message.startswith("clip 7: samples reach 13107") and "32768" in message

    def test_the_processor_names_the_row(self, processor, warnings_of):
        processor([noise(900), 20000 * noise(900)], sampling_rate=RATE)
        (message,) = warnings_of()
        assert message.startswith("audio row 1: samples reach")

    def test_usual_samples_are_not_told_of(self, warnings_of):
        load_audio(5 * sine(), RATE)
        load_audio((sine() * 32767).astype(np.int16), RATE)
        load_audio(np.random.default_rng(0).standard_normal(RATE), RATE)
        assert warnings_of() == []


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
@pytest.mark.parametrize(
    "tail",
    [b"", b"LIST\4\0\0\0INFO", b"id3 " + struct.pack("<I", 2000) + bytes(range(200)) * 10, b"LIST of sounds"],
    ids=["none", "LIST", "id3", "samples that look like a chunk"],
)
def test_chunks_after_the_samples_of_a_stream_are_no_sound(size, tail):
    samples = sine(0.5)
    content = bytearray(encoded(samples, subtype="PCM_16"))
    position = content.find(b"data") + 4
    content[position : position + 4] = struct.pack("<I", size)
    audio = load_audio(bytes(content + tail), target_sampling_rate=16000)
    extra = len(tail) // 2 if tail.endswith(b"sounds") else 0
    assert len(audio) == len(samples) + extra
    np.testing.assert_allclose(audio[: len(samples)], samples, atol=1e-4)


# --- silence ---------------------------------------------------------------------------------------------------------


def test_the_level_of_silence_is_that_of_voice_activity():
    assert 20 * np.log10(audio_mmser.SILENT) == pytest.approx(LOWEST_FLOOR + ON)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "MP3", "MP4"])
def test_what_cancels_is_told_whatever_the_format(kind):
    against = np.stack([CLIP, -CLIP], axis=1)
    content = with_av(against, 48000) if kind == "MP4" else encoded(against, 48000, format=kind)
    assert "its channels cancel each other" in why_silent(content)


def with_av(samples, rate):
    """Samples [T, 2] as an MP4 file with ALAC, which loses nothing."""
    file = io.BytesIO()
    with av.open(file, "w", "mp4") as container:
        stream = container.add_stream("alac", rate=rate, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T.astype(np.float32)), "fltp", "stereo")
        frame.sample_rate = rate
        resampler = av.AudioResampler("s16p", "stereo", rate, stream.codec_context.frame_size or 4096)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    ("audio", "rate", "reason"),
    [
        (np.zeros(RATE), RATE, "all samples are 0"),
        (np.full(RATE, 128, dtype=np.uint8), RATE, "all samples are 0"),
        (1e-4 * np.sign(sine(1.0)), RATE, "its loudest sample has -80 dB of full scale"),
        (torch.stack([torch.ones(500), -torch.ones(500)]), 8000, "its channels cancel each other"),
        ({"raw": np.zeros(RATE), "sampling_rate": RATE}, None, "all samples are 0"),
        (np.stack([sine(1.0), 0.9 * -sine(1.0)]), RATE, ""),
        (np.concatenate([np.zeros(30 * RATE), sine(0.1)]), RATE, ""),
    ],
)
def test_why_nothing_can_be_heard(audio, rate, reason):
    assert why_silent(audio, rate) == (reason and why_silent(audio, rate)) and reason in why_silent(audio, rate)


def test_a_file_is_read_until_something_is_heard(monkeypatch):
    """A folder of long recordings is not decoded twice."""
    read = []
    decode = audio_mmser.decode_channels
    monkeypatch.setattr(
        audio_mmser,
        "decode_channels",
        lambda *args: (read.append(len(rows)) or (rate, rows) for rate, rows in decode(*args)),
    )
    assert why_silent(encoded(noise(60 * RATE), format="FLAC")) == ""
    assert sum(read) <= 2**18


def test_the_pipeline_answers_silence_with_one_warning(warnings_of, classifier):
    silent = {"raw": np.zeros(RATE), "sampling_rate": RATE}
    against = {"raw": np.stack([sine(1.0), -sine(1.0)]), "sampling_rate": RATE}
    assert len(classifier(against)) == len(classifier.labels)
    assert len(classifier([silent, against], batch_size=2)) == 2
    (said,) = warnings_of()
    assert said.startswith("audio: nothing can be heard in it: its channels cancel each other")
    assert said.endswith("Its answer means nothing. Further clips like this are not reported.")


def test_a_pause_of_a_recording_is_nothing_to_warn_of(warnings_of, classifier):
    recording = np.concatenate([sine(1.0), np.zeros(2 * RATE)])
    assert classifier({"raw": recording, "sampling_rate": RATE}, chunk_length_s=1.0)["chunks"]
    assert not warnings_of()
