# SPDX-License-Identifier: Apache-2.0
"""Rows about files, containers and arrays: what is heard must be what was written."""

import io
import struct
import unicodedata

import datasets
import numpy as np
import scipy.io.wavfile
import scipy.signal
import soundfile
import torch
from tiny_corpus import tiny_processor

from audio_mmser import load_audio
from benchmarks.situations.common import RATE, World, close, error, need, situation, warnings_of, without
from mmser.loading import load_emotion_dataset

# Louder at its end and rising: half of it, or a wrong rate, is another sound
SECONDS = 3.0
TIME = np.arange(int(SECONDS * RATE)) / RATE
SOUND = (0.5 * np.sin(2 * np.pi * (300 * TIME + 100 * TIME**2)) * (0.3 + 0.2 * TIME)).astype(np.float32)


def encode(samples=SOUND, rate=RATE, **options) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **{"format": "WAV", **options})
    return file.getvalue()


def heard(audio, tolerance: float, **options) -> None:
    """`load_audio` gives SOUND, sample by sample."""
    samples = load_audio(audio, **options)
    assert len(samples) == len(SOUND), f"{len(samples)} samples of {len(SOUND)}"
    close(samples, SOUND, tolerance)


def about(audio, reference=SOUND, longer: float = 0.2) -> None:
    """`load_audio` gives the reference, but for what a lossy codec changes and the samples it adds at the ends."""
    samples = load_audio(audio)
    assert len(reference) <= len(samples) + 64 <= len(reference) + longer * RATE, f"{len(samples) / RATE:.2f} s"
    lags = scipy.signal.correlate(samples, reference, mode="full")
    likeness = lags.max() / np.sqrt((samples**2).sum() * (reference**2).sum())
    assert likeness > 0.98, f"only alike by {likeness:.3f}"


def add_files(group, rows):
    for name, options, tolerance in rows:

        def check(world: World, options=options, tolerance=tolerance) -> None:
            content = encode(**options)
            path = world.new_folder() / "clip.audio"  # the content says what it is
            path.write_bytes(content)
            for audio in (content, path, str(path)):
                heard(audio, tolerance)

        situation(group, name, "the samples that were written")(check)


add_files(
    "files",
    [
        ("WAV, 16 bit", {"subtype": "PCM_16"}, 1e-4),
        ("WAV, 24 bit", {"subtype": "PCM_24"}, 1e-6),
        ("WAV, 32 bit integers", {"subtype": "PCM_32"}, 1e-6),
        ("WAV, 8 bit", {"subtype": "PCM_U8"}, 1e-2),
        ("WAV, float32", {"subtype": "FLOAT"}, 0),
        ("WAV, float64", {"subtype": "DOUBLE"}, 1e-7),
        ("WAV, mu-law, as telephones", {"subtype": "ULAW"}, 0.02),
        ("WAV extensible", {"format": "WAVEX", "subtype": "PCM_16"}, 1e-4),
        ("RF64 and W64, for more than 4 GB", {"format": "RF64", "subtype": "PCM_16"}, 1e-4),
        ("AIFF", {"format": "AIFF", "subtype": "PCM_16"}, 1e-4),
        ("AU", {"format": "AU", "subtype": "PCM_16"}, 1e-4),
        ("FLAC", {"format": "FLAC"}, 1e-4),
    ],
)


@situation("files", "OGG, Vorbis and Opus", "the sound, at its length")
def ogg(world: World) -> None:
    about(encode(format="OGG", subtype="VORBIS"))
    about(encode(format="OGG", subtype="OPUS"))


MP3_KILOBITS = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)  # of MPEG-2, by their index


def mp3(header: bool, mode: str = "VARIABLE") -> bytes:
    """An MP3 file; `header=False` takes away the first frame, which holds the Xing header alone."""
    content = encode(format="MP3", bitrate_mode=mode)
    length = 72 * 1000 * MP3_KILOBITS[content[2] >> 4] // RATE + (content[2] >> 1 & 1)
    assert b"Xing" in content[:length] or b"Info" in content[:length]
    assert content[length : length + 2] == content[:2], "the second frame is not where it was expected"
    return content if header else content[length:]


@situation("files", "MP3 with a Xing header", "the sound, at its length")
def mp3_with_header(world: World) -> None:
    about(mp3(header=True))


@situation("files", "MP3 without a Xing header, variable bit rate", "the sound, at its length")
def mp3_without_header(world: World) -> None:
    about(mp3(header=False))


@situation("files", "MP3 in a WAV file", "the sound, at its length")
def mp3_in_wav(world: World) -> None:
    content = mp3(header=False, mode="CONSTANT")
    header = struct.pack("<HHIIHHHHIHHH", 0x55, 1, RATE, 4000, 1, 0, 12, 1, 2, 72, 1, 0)
    fact = b"fact" + struct.pack("<II", 4, len(SOUND))
    body = b"WAVEfmt " + struct.pack("<I", len(header)) + header + fact + b"data" + struct.pack("<I", len(content))
    about(b"RIFF" + struct.pack("<I", len(body) + len(content)) + body + content)


def av_encode(container: str, codec: str) -> bytes:
    av = need("av")
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=RATE if codec == "aac" else 48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(SOUND[None], format="flt", layout="mono")
        frame.sample_rate = RATE
        resampler = av.AudioResampler(format=stream.format.name, layout="mono", rate=stream.rate)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            output.mux(stream.encode(part))
    return file.getvalue()


@situation("files", "m4a (AAC) with PyAV", "the sound, at its length")
def m4a(world: World) -> None:
    about(av_encode("ipod", "aac"))


@situation("files", "webm (Opus), as browsers record, with PyAV", "the sound, at its length")
def webm(world: World) -> None:
    about(av_encode("webm", "libopus"))


@situation("files", "m4a without PyAV", "error that says what to install")
def m4a_without_av(world: World) -> None:
    content = av_encode("ipod", "aac")
    with without("av"), error(ValueError, "av", "install"):
        load_audio(content)


@situation("files", "stereo at 44.1 kHz", "the mean of the channels, resampled")
def stereo_file(world: World) -> None:
    rate = 44100
    time = np.arange(rate) / rate
    left, right = np.sin(2 * np.pi * 440 * time), 0.5 * np.sin(2 * np.pi * 1000 * time)
    samples = load_audio(encode(np.stack([left, right], axis=1), rate, subtype="FLOAT"))
    expected = scipy.signal.resample((left + right) / 2, RATE)
    close(samples[400:-400], expected[400:-400].astype(np.float32), 2e-3)


@situation("files", "WAV written to a pipe (sizes 0xFFFFFFFF)", "all samples")
def streamed_wav(world: World) -> None:
    content = encode(subtype="PCM_16")
    assert content[36:40] == b"data"
    heard(content[:4] + b"\xff" * 4 + content[8:40] + b"\xff" * 4 + content[44:], 1e-4)


@situation("files", "WAV whose header says 0 bytes", "all samples")
def zero_wav(world: World) -> None:
    content = encode(subtype="PCM_16")
    heard(content[:4] + bytes(4) + content[8:40] + bytes(4) + content[44:], 1e-4)


@situation("files", "FLAC of unknown length, as from a pipe", "all samples")
def streamed_flac(world: World) -> None:
    content = bytearray(encode(format="FLAC"))
    content[21] &= 0xF0  # the count of samples is the last 36 bits of bytes 18 to 25
    content[22:26] = bytes(4)
    heard(bytes(content), 1e-4)


@situation("files", "WAV that is cut short", "error: truncated")
def cut_wav(world: World) -> None:
    path = world.new_folder() / "clip.wav"
    path.write_bytes(encode()[:-20000])
    with error(ValueError, "clip.wav", "truncated"):
        load_audio(path)


@situation("files", "FLAC that is cut short", "error: truncated")
def cut_flac(world: World) -> None:
    with error(ValueError, "truncated"):
        load_audio(encode(format="FLAC")[:-20000])


@situation("files", "zero bytes", "error: empty")
def empty_file(world: World) -> None:
    path = world.new_folder() / "clip.wav"
    path.write_bytes(b"")
    with error(ValueError, "clip.wav", "empty"):
        load_audio(path)
    with error(ValueError, "empty"):
        load_audio(encode(SOUND[:0]))


@situation("files", "a text, a folder, a path that is not there", "error that names it")
def no_audio(world: World) -> None:
    folder = world.new_folder()
    (folder / "notes.wav").write_text("not a sound " * 50)
    with error(ValueError, "notes.wav", "cannot be read as audio"):
        load_audio(folder / "notes.wav")
    with error(ValueError, "folder"):
        load_audio(folder)
    with error(FileNotFoundError, "gone.wav"):
        load_audio(folder / "gone.wav")


@situation("files", "a table that spells é otherwise than the disk (NFC, NFD)", "the file is found")
def unicode_names(world: World) -> None:
    folder = world.new_folder()
    rows = []
    for number, label in enumerate(("happy", "sad") * 4):
        name = f"caf\u00e9{number}.wav"
        soundfile.write(folder / unicodedata.normalize("NFD", name), SOUND[: 4000 + number], RATE)
        rows.append(f"{unicodedata.normalize('NFC', name)},{label},s{number // 2}")
    (folder / "metadata.csv").write_text("file_name,label,speaker\n" + "\n".join(rows), encoding="utf-8")
    data, _ = load_emotion_dataset(str(folder))
    assert sum(len(split) for split in data.values()) == 8


# ------------------------------------------------------------------------------------------------------------- arrays


@situation("arrays", "int16, int32, uint8", "scaled to [-1, 1)")
def integers(world: World) -> None:
    heard(np.round(SOUND * 2**15).astype(np.int16), 1e-4, sampling_rate=RATE)
    heard(np.round(SOUND.astype(np.float64) * 2**31).astype(np.int32), 1e-6, sampling_rate=RATE)
    heard(np.round(SOUND * 128 + 128).astype(np.uint8), 1e-2, sampling_rate=RATE)


@situation("arrays", "floats up to 32768 for a Whisper encoder", "scaled, or a warning that says so")
def wide_floats(world: World) -> None:
    whisper = tiny_processor(whisper=True)
    expected = whisper([SOUND], sampling_rate=RATE)["input_features"]
    with warnings_of() as messages:
        found = whisper([SOUND * 32768], sampling_rate=RATE)["input_features"]
    assert torch.allclose(found, expected, atol=1e-3) or any("32768" in message for message in messages), messages


@situation("arrays", "float64, float16, a list", "the samples")
def other_floats(world: World) -> None:
    heard(SOUND.astype(np.float64), 1e-6, sampling_rate=RATE)
    heard(SOUND.astype(np.float16), 1e-3, sampling_rate=RATE)
    heard(SOUND.tolist(), 1e-6, sampling_rate=RATE)


@situation("arrays", "tensors: float32, bfloat16, with a gradient", "the samples")
def tensors(world: World) -> None:
    heard(torch.from_numpy(SOUND), 0, sampling_rate=RATE)
    heard(torch.from_numpy(SOUND).bfloat16(), 1e-2, sampling_rate=RATE)
    heard(torch.from_numpy(SOUND.copy()).requires_grad_(), 0, sampling_rate=RATE)


@situation("arrays", "stereo as (2, time) and (time, 2)", "the mean of the channels")
def stereo(world: World) -> None:
    both = np.stack([1.5 * SOUND, 0.5 * SOUND])
    heard(both, 1e-6, sampling_rate=RATE)
    heard(both.T, 1e-6, sampling_rate=RATE)


@situation("arrays", "Gradio's (rate, int16 array)", "as the array with its rate")
def gradio(world: World) -> None:
    whole = np.round(world.clips[0] * 2**15).astype(np.int16)
    world.check_scores(world.classifier((RATE, whole)), text=None, tolerance=1e-3)
    world.check_scores(world.classifier({"audio": (RATE, whole), "text": "what a joy"}), tolerance=1e-3)


class Decoder:
    """Speaks as `datasets.features._torchcodec.AudioDecoder`, which a column holds where torchcodec is installed."""

    def __init__(self, samples):
        self._samples = torch.from_numpy(samples)[None]

    def get_all_samples(self):
        return type("AudioSamples", (), {"data": self._samples, "sample_rate": RATE})()

    def __getitem__(self, key):
        return {"array": self._samples[0].numpy(), "sampling_rate": RATE, "path": "clip.wav"}[key]


@situation("arrays", "the decoder objects of datasets >= 4", "as their samples")
def audio_decoder(world: World) -> None:
    world.check_scores(world.classifier(Decoder(world.clips[0])), text=None)
    world.check_scores(world.classifier({"audio": Decoder(world.clips[0]), "text": "what a joy"}))


@situation("arrays", 'a column ds["audio"] of files', "a list of clips")
def audio_column(world: World) -> None:
    contents = [{"bytes": encode(clip, subtype="FLOAT"), "path": None} for clip in world.clips]
    data = datasets.Dataset.from_dict({"audio": contents}).cast_column("audio", datasets.Audio(decode=False))
    for row, entries in enumerate(world.classifier(data["audio"], batch_size=2)):
        world.check_scores(entries, row, text=None)


@situation("arrays", "no sampling rate", "error that asks for it")
def no_rate(world: World) -> None:
    with error(ValueError, "sampling_rate"):
        world.classifier(SOUND)
    with error(ValueError, "sampling_rate"):
        world.processor(SOUND)


@situation("arrays", "NaN, 10 ms, booleans, a square, kHz for Hz", "error that says what is wrong")
def bad_arrays(world: World) -> None:
    for samples, rate, word in (
        (np.where(TIME < 0.1, np.nan, SOUND), RATE, "NaN"),
        (SOUND[:160], RATE, "too short"),
        (SOUND > 0, RATE, "bool"),
        (SOUND[:10000].reshape(100, 100), RATE, "shape"),
        (SOUND, 16, "Hz"),
    ):
        with error(ValueError, word):
            world.classifier(samples, sampling_rate=rate)


@situation("arrays", "8 kHz array", "resampled by its rate")
def low_rate(world: World) -> None:
    time = np.arange(8000) / 8000
    file = io.BytesIO()
    scipy.io.wavfile.write(file, 8000, np.sin(2 * np.pi * 440 * time).astype(np.float32))
    expected = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    for samples in (load_audio(file.getvalue()), load_audio(np.sin(2 * np.pi * 440 * time), 8000)):
        assert len(samples) == RATE
        close(samples[400:-400], expected[400:-400].astype(np.float32), 2e-3)
