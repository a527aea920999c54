# SPDX-License-Identifier: Apache-2.0
"""Tests of `processing_mmser`: decoding, processor, pipeline.

References are independent: known sine frequencies, `scipy` for WAV bytes, the library's own feature extractors and
tokenizer. The pipeline runs a small stand-in model whose result depends on every unmasked value of its inputs.
"""

import functools
import http.server
import io
import json
import logging
import threading
import tracemalloc

import numpy as np
import pytest
import scipy.io.wavfile
import soundfile
import torch
from hypothesis import given, strategies
from transformers import (
    ASTFeatureExtractor,
    AutoFeatureExtractor,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    PreTrainedModel,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)
from transformers.utils import ModelOutput

import audio_mmser
from audio_mmser import load_audio, stream_audio
from pipeline_mmser import mean_over_time, split_into_chunks, text_of_chunk
from processing_mmser import MMSERPipeline, MMSERProcessor, pad_and_stack

RATE = 16000
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "i", "am", "so", "glad", "you", "came", "##s", "sad", "no"]
LABELS = ["neutral", "happy", "sad", "angry"]


def sine(seconds=0.5, rate=RATE, frequency=440.0):
    return (0.4 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def noise(samples, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def peak_frequency(samples, rate=RATE):
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return np.argmax(spectrum) * rate / len(samples)


def encoded(samples, rate=RATE, **options):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **{"format": "WAV", **options})
    return file.getvalue()


@pytest.fixture(autouse=True)
def fresh_warnings():
    audio_mmser._warned.clear()


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}, model_max_length=512)


@pytest.fixture(scope="module", params=["raw", "log-mel"])
def processor(request, tokenizer):
    extractor = {"raw": Wav2Vec2FeatureExtractor, "log-mel": WhisperFeatureExtractor}[request.param]
    return MMSERProcessor(extractor(), tokenizer)


@pytest.fixture(scope="module")
def raw_processor(tokenizer):
    return MMSERProcessor(Wav2Vec2FeatureExtractor(), tokenizer)


@pytest.fixture(scope="module")
def mel_processor(tokenizer):
    return MMSERProcessor(WhisperFeatureExtractor(), tokenizer)


@pytest.fixture
def warnings_of(caplog):
    """Messages that `warn_once` logged."""
    return lambda: [record.getMessage() for record in caplog.records if record.name == "audio_mmser"]


class TestLoadAudio:
    @pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
    @pytest.mark.parametrize("options", [{"format": "WAV"}, {"format": "FLAC"}, {"format": "OGG"}, {"format": "MP3"}])
    def test_formats_and_rates_keep_pitch_and_duration(self, tmp_path, rate, options):
        path = tmp_path / "clip.audio"  # the content decides, not the name
        path.write_bytes(encoded(sine(1.0, rate), rate, **options))
        samples = load_audio(path)
        assert samples.dtype == np.float32 and samples.ndim == 1
        assert peak_frequency(samples) == pytest.approx(440, abs=2)
        assert len(samples) == pytest.approx(RATE, abs=2 * 1152 * RATE / rate if options["format"] == "MP3" else 2)
        assert np.abs(samples).max() == pytest.approx(0.4, abs=0.05)
        np.testing.assert_array_equal(samples, load_audio(path.read_bytes()))
        np.testing.assert_array_equal(samples, load_audio(str(path)))

    @pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
    def test_resampled_sine_is_the_sine(self, rate):
        samples = load_audio(sine(1.0, rate, 1000), rate)
        inner = slice(500, -500)  # the filter rings at the ends
        assert len(samples) == RATE
        np.testing.assert_allclose(samples[inner], sine(1.0, RATE, 1000)[inner], atol=1e-3)

    @pytest.mark.parametrize("dtype", ["int16", "int32", "uint8", "float32", "float64"])
    def test_wav_sample_formats(self, dtype):
        clip = sine()
        if dtype.startswith("float"):
            samples = clip.astype(dtype)
        else:
            zero, scale = {"int16": (0, 2**15), "int32": (0, 2**31), "uint8": (128, 128)}[dtype]
            samples = np.round(clip.astype(np.float64) * scale + zero).astype(dtype)
        file = io.BytesIO()
        scipy.io.wavfile.write(file, RATE, samples)
        tolerance = 1 / 128 if dtype == "uint8" else 1e-4
        np.testing.assert_allclose(load_audio(file.getvalue()), clip, atol=tolerance)
        np.testing.assert_allclose(load_audio(samples, RATE), clip, atol=tolerance)
        np.testing.assert_array_equal(load_audio(samples, RATE), load_audio(torch.from_numpy(samples), RATE))

    def test_other_sample_containers(self):
        clip = sine()
        np.testing.assert_array_equal(load_audio(clip.tolist(), RATE), clip)
        np.testing.assert_allclose(load_audio(torch.from_numpy(clip).bfloat16(), RATE), clip, atol=2e-3)
        np.testing.assert_array_equal(load_audio(clip.astype(">f4"), RATE), clip)

    @pytest.mark.parametrize("channels", [1, 2, 5])
    def test_channels_are_averaged(self, channels):
        clips = np.stack([sine(frequency=200 * (k + 1)) for k in range(channels)])
        mean = clips.mean(axis=0)
        np.testing.assert_allclose(load_audio(clips, RATE), mean, atol=1e-6)
        np.testing.assert_allclose(load_audio(clips.T, RATE), mean, atol=1e-6)
        np.testing.assert_allclose(load_audio(encoded(clips.T, subtype="FLOAT")), mean, atol=1e-6)

    @pytest.mark.parametrize("samples", [np.zeros((300, 300)), np.zeros((2, 2, 900)), np.array(3.0)])
    def test_ambiguous_shapes_are_refused(self, samples):
        with pytest.raises(ValueError, match="time from channels"):
            load_audio(samples, RATE)

    @pytest.mark.parametrize(
        ("samples", "reason"),
        [
            (np.zeros(0, "float32"), "empty"),
            (np.zeros((2, 0), "float32"), "empty"),
            (np.array([0, np.nan, 0]), "NaN or infinite, the first at 1"),
            (np.array([0, 0, -np.inf]), "NaN or infinite, the first at 2"),
            (np.array([1e300]), "NaN or infinite"),
            (np.zeros(500, "complex64"), "complex64"),
            (np.zeros(500, "bool"), "bool"),
            (np.zeros(500, "int64"), "int64.*int16"),
            ([[0.0, 1.0], [0.0]], "ragged"),
        ],
    )
    def test_bad_samples(self, samples, reason):
        with pytest.raises(ValueError, match=f"clip 7.*{reason}"):
            load_audio(samples, RATE, name="clip 7")

    def test_rate_of_samples_is_required_and_checked(self):
        with pytest.raises(ValueError, match=r"`sampling_rate` is required.*does not carry"):
            load_audio(sine())
        with pytest.raises(ValueError, match="in Hz"):
            load_audio(sine(), 16)
        with pytest.raises(TypeError, match="number in Hz"):
            load_audio(sine(), "16000")
        with pytest.raises(ValueError, match="empty"):
            load_audio(np.ones(1, "float32"), 48000)
        assert load_audio(np.ones(1, "float32"), RATE).shape == (1,)

    def test_bad_files(self, tmp_path):
        garbage = tmp_path / "garbage.wav"
        garbage.write_bytes(np.random.default_rng(0).bytes(5000))
        (tmp_path / "empty.wav").write_bytes(b"")
        (tmp_path / "none.wav").write_bytes(encoded(np.zeros(0, "float32")))
        for name, reason in {"garbage": "cannot be read", "empty": "empty", "none": "empty"}.items():
            with pytest.raises(ValueError, match=rf"{name}\.wav.*{reason}"):
                load_audio(tmp_path / f"{name}.wav")
        with pytest.raises(FileNotFoundError, match=r"missing\.wav"):
            load_audio(tmp_path / "missing.wav")
        with pytest.raises(ValueError, match="folder"):
            load_audio(tmp_path)
        with pytest.raises(TypeError, match="NoneType"):
            load_audio(None)

    @pytest.mark.parametrize("head", [b"\0\0\0\x20ftypM4A ", b"\x1aE\xdf\xa3"], ids=["m4a", "webm"])
    def test_unsupported_container_says_how_to_convert(self, head):
        with pytest.raises(ValueError, match=r"cannot be read as audio.*PyAV.*ffmpeg -i"):
            load_audio(head + bytes(1000))

    @pytest.mark.parametrize("format_", ["WAV", "FLAC", "OGG", "MP3"])
    def test_truncated_file(self, tmp_path, format_):
        content = encoded(noise(RATE), format=format_)
        path = tmp_path / "cut.bin"
        reason = {"WAV": "truncated", "OGG": "cannot be read|empty"}.get(format_, "truncated|cannot be read")
        for share in (0.3, 0.6, 0.9):
            path.write_bytes(content[: int(share * len(content))])
            with pytest.raises(ValueError, match=rf"cut\.bin.*({reason})"):
                load_audio(path)

    def test_wav_header_only_is_truncated(self):
        with pytest.raises(ValueError, match=r"truncated.*1000 bytes"):
            load_audio(encoded(noise(500))[:44])

    @pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF])
    def test_wav_written_to_a_pipe_has_no_known_size(self, size):
        clip = noise(2000)
        content = bytearray(encoded(clip))
        content[40:44] = size.to_bytes(4, "little")
        np.testing.assert_allclose(load_audio(bytes(content)), clip, atol=1e-4)

    def test_wav_with_chunks_around_the_samples(self):
        clip = noise(1001)  # an odd number of bytes
        content = encoded(clip, subtype="PCM_U8")
        note = b"note" + (3).to_bytes(4, "little") + b"abc\0"
        np.testing.assert_allclose(load_audio(content[:36] + note + content[36:] + note), clip, atol=1 / 128)
        with pytest.raises(ValueError, match=r"truncated.*1001 bytes"):
            load_audio(content[:36] + note + content[36:-100])


class TestProcessor:
    def test_audio_equals_the_feature_extractor(self, raw_processor, mel_processor):
        clips = [noise(9000, 1), 3 * noise(5000, 2)]
        extractor = raw_processor.feature_extractor
        theirs = extractor(clips, sampling_rate=RATE, padding=True, return_attention_mask=True, return_tensors="pt")
        ours = raw_processor(clips, sampling_rate=RATE)
        assert set(ours) == {"input_values", "attention_mask"}
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)
        theirs = mel_processor.feature_extractor(clips[0], sampling_rate=RATE, padding=False, return_tensors="pt")
        ours = mel_processor(clips[0], sampling_rate=RATE)
        assert set(ours) == {"input_features", "attention_mask"}
        torch.testing.assert_close(ours["input_features"], theirs["input_features"], rtol=0, atol=0)

    def test_text_equals_the_tokenizer(self, processor, tokenizer):
        texts = ["i am so glad you came", "no"]
        ours, theirs = processor(text=texts), tokenizer(texts, padding=True, return_tensors="pt")
        assert set(ours) == {"input_ids", "text_attention_mask"}
        torch.testing.assert_close(ours["input_ids"], theirs["input_ids"])
        torch.testing.assert_close(ours["text_attention_mask"], theirs["attention_mask"])

    def test_raw_clips_have_zero_mean_and_unit_variance(self, raw_processor):
        batch = raw_processor([5 * noise(4000) + 1, noise(8000)], sampling_rate=RATE)
        for row, length in enumerate([4000, 8000]):
            values = batch["input_values"][row]
            assert batch["attention_mask"][row].sum() == length and (values[length:] == 0).all()
            assert values[:length].mean().abs() < 1e-5 and (values[:length].std() - 1).abs() < 1e-3

    @pytest.mark.parametrize("samples", [400, 401, 559, 560, 4000, 4159])
    def test_log_mel_frames(self, mel_processor, samples):
        batch = mel_processor([noise(samples), noise(6400)], sampling_rate=RATE)
        assert batch["input_features"].shape == (2, 80, 40)
        assert batch["attention_mask"].sum(-1).tolist() == [samples // 160, 40]

    def test_clip_alone_equals_clip_in_any_batch(self, processor):
        clips = [noise(length, length) * scale for length, scale in [(700, 1), (8000, 9), (4321, 0.01), (16000, 1)]]
        name = processor.audio_input_name
        batch = processor(clips, sampling_rate=RATE)
        for row, clip in enumerate(clips):
            alone = processor(clip, sampling_rate=RATE)
            length = alone["attention_mask"].shape[-1]
            assert alone["attention_mask"].all() and batch["attention_mask"][row].sum() == length
            assert torch.equal(alone[name][0], batch[name][row][..., :length])
            assert not batch[name][row][..., length:].any() and not batch["attention_mask"][row, length:].any()

    def test_every_kind_of_clip_in_one_call(self, processor, tmp_path):
        clip = sine()
        soundfile.write(tmp_path / "a.wav", clip, RATE, subtype="FLOAT")
        stereo = np.stack([clip, clip])
        kinds = [clip, clip.tolist(), torch.from_numpy(clip), stereo, stereo.T, tmp_path / "a.wav"]
        rows = processor([*kinds, (clip * 2**15).astype(np.int16)], sampling_rate=RATE)[processor.audio_input_name]
        for row in rows[:-1]:
            torch.testing.assert_close(row, rows[0], atol=1e-5, rtol=0)
        # rounding to 16 bits is all that quiet mel bands hold
        torch.testing.assert_close(rows[-1], rows[0], atol=0.05, rtol=0)

    def test_one_clip_may_come_without_a_list(self, raw_processor):
        clip = sine()
        for audio in (clip, clip.tolist(), torch.from_numpy(clip), clip[None], clip[:, None], np.stack([clip] * 2, 1)):
            assert raw_processor(audio, "no", sampling_rate=RATE)["input_values"].shape == (1, len(clip))
        with pytest.raises(ValueError, match="2 clips or 2 channels"):
            raw_processor(np.stack([clip, clip]), sampling_rate=RATE)

    def test_rates(self, processor):
        with pytest.raises(ValueError, match=r"audio row 0.*`sampling_rate` is required"):
            processor([sine()])
        with pytest.raises(ValueError, match=r"audio row 0.*`sampling_rate` is required"):
            processor(sine(), "i am")
        batch = processor([sine(1.0, 44100)], sampling_rate=44100)
        assert batch["attention_mask"].sum() == processor([sine(1.0)], sampling_rate=RATE)["attention_mask"].sum()

    def test_too_short(self, processor):
        with pytest.raises(ValueError, match=r"audio row 1: too short, 399 samples.*minimum is 400"):
            processor([noise(400), noise(399)], sampling_rate=RATE)
        with pytest.raises(ValueError, match=r"audio row 0.*NaN"):
            processor([np.full(800, np.nan)], sampling_rate=RATE)

    def test_silence_is_finite(self, processor):
        batch = processor([np.zeros(8000, "float32"), noise(4000)], sampling_rate=RATE)
        assert torch.isfinite(batch[processor.audio_input_name]).all() and batch["attention_mask"][0].all()

    def test_ten_minutes(self, raw_processor):
        batch = raw_processor(noise(600 * RATE), sampling_rate=RATE)
        assert batch["input_values"].shape == batch["attention_mask"].shape == (1, 600 * RATE)

    def test_log_mel_limit_is_reported_once(self, mel_processor, warnings_of):
        long = noise(42 * RATE)
        batch = mel_processor([noise(800), long], sampling_rate=RATE)
        assert batch["attention_mask"].sum(-1).tolist() == [5, 3000]
        head = mel_processor(long[: 30 * RATE], sampling_rate=RATE)
        assert torch.equal(batch["input_features"][1], head["input_features"][0])
        mel_processor(long, sampling_rate=RATE)
        (message,) = warnings_of()
        assert "audio row 1: 42.0 s" in message and "the last 12.0 s were cut" in message

    def test_long_text_is_cut_and_reported_once(self, processor, tokenizer, warnings_of):
        texts = ["no " * 600, "no", "sad " * 511, "so " * 510]
        batch = processor(text=texts)
        processor(text=texts)
        assert batch["input_ids"].shape == (4, 512)
        assert batch["input_ids"][:, -1].tolist() == [tokenizer.sep_token_id, 0, tokenizer.sep_token_id, 3]
        (message,) = warnings_of()
        assert message.startswith("2 of 4 texts are longer than 512 tokens")

    def test_tokenizer_limit_below_512(self, tokenizer):
        small = BertTokenizer(vocab=tokenizer.get_vocab(), model_max_length=16)
        processor = MMSERProcessor(Wav2Vec2FeatureExtractor(), small)
        assert processor(text="no " * 40)["input_ids"].shape == (1, 16)
        assert processor(text="no", max_length=8, padding="max_length")["input_ids"].shape == (1, 8)

    def test_text_options_leave_the_audio_alone(self, processor):
        options = {"sampling_rate": RATE, "padding": "max_length", "max_length": 8, "truncation": True}
        batch = processor([noise(4000), noise(800)], ["no", "sad"], **options)
        assert batch["input_ids"].shape == (2, 8) and batch["attention_mask"].sum(-1)[0] in (4000, 25)
        padded = processor([noise(4000)], sampling_rate=RATE, pad_to_multiple_of=1024)
        assert padded[processor.audio_input_name].shape[-1] % 1024 == 0 == padded["attention_mask"].shape[-1] % 1024

    def test_missing_rows(self, processor, tokenizer):
        texts = ["i am so glad", None, "", " \t\n", "no"]
        clips = [None, noise(4000), noise(800), noise(900), None]
        batch = processor(clips, texts, sampling_rate=RATE)
        assert batch["text_attention_mask"].sum(-1).tolist() == [6, 0, 0, 0, 3]
        assert (batch["input_ids"][1:4] == tokenizer.pad_token_id).all()
        assert (batch["attention_mask"].sum(-1) > 0).tolist() == [False, True, True, True, False]
        assert not batch[processor.audio_input_name][[0, 4]].any()
        assert list(batch) == processor.model_input_names
        expected = processor(text=["i am so glad", "no"])
        assert torch.equal(batch["input_ids"][[0, 4]], expected["input_ids"])

    def test_modality_missing_everywhere_is_left_out(self, processor):
        audio_only = processor([noise(800)] * 2, [None, " "], sampling_rate=RATE)
        assert set(audio_only) == {processor.audio_input_name, "attention_mask"}
        assert set(processor([None, None], ["no", "sad"])) == {"input_ids", "text_attention_mask"}

    @pytest.mark.parametrize(
        ("audio", "text", "reason"),
        [
            (None, None, "nothing to process"),
            ([noise(800), None], ["no", " "], "row 1 has neither"),
            (None, ["no", None], "row 1 has neither"),
            ([noise(800), None], None, "row 1 has neither"),
            ([noise(800)], ["no", "sad"], "`audio` has 1 rows but `text` has 2"),
            ([], None, "empty list"),
            (None, [], "empty list"),
            ({}, None, r"a dict needs one of \['raw'"),
        ],
    )
    def test_rows_that_do_not_match(self, raw_processor, audio, text, reason):
        with pytest.raises(ValueError, match=reason):
            raw_processor(audio, text, sampling_rate=RATE)

    @pytest.mark.parametrize(("audio", "text"), [(3.5, None), (None, 3.5), (None, ["no", 7])])
    def test_wrong_types(self, raw_processor, audio, text):
        with pytest.raises(TypeError, match="must be"):
            raw_processor(audio, text, sampling_rate=RATE)

    def test_return_tensors(self, processor):
        clips, texts = [noise(4000), noise(800)], ["no", None]
        pt = processor(clips, texts, sampling_rate=RATE)
        arrays = processor(clips, texts, sampling_rate=RATE, return_tensors="np")
        for key in processor.model_input_names:
            assert isinstance(pt[key], torch.Tensor) and isinstance(arrays[key], np.ndarray)
            np.testing.assert_array_equal(pt[key].numpy(), arrays[key])

    def test_what_is_saved_does_not_depend_on_the_last_call(self, processor, tmp_path):
        saved = []
        for _ in range(2):
            processor.save_pretrained(tmp_path)
            saved.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
            processor(text=["no", "sad and long"])  # leaves its padding and truncation in a fast tokenizer
        assert saved[0] == saved[1]

    def test_save_and_load(self, processor, tmp_path):
        processor.save_pretrained(tmp_path)
        again = MMSERProcessor.from_pretrained(tmp_path)
        assert again.to_dict() == processor.to_dict() and type(again.tokenizer) is type(processor.tokenizer)
        call = {"audio": [noise(4000), None], "text": ["no", "sad"], "sampling_rate": RATE}
        before, after = processor(**call), again(**call)
        assert all(torch.equal(before[key], after[key]) for key in processor.model_input_names)
        saved = json.loads((tmp_path / "processor_config.json").read_text())
        assert saved["auto_map"]["AutoProcessor"] == "processing_mmser.MMSERProcessor"
        assert (tmp_path / "processing_mmser.py").exists()
        assert AutoFeatureExtractor.from_pretrained(tmp_path).to_dict() == processor.feature_extractor.to_dict()
        assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == processor.tokenizer.get_vocab()

    def test_raw_extractor_alone_returns_the_mask_too(self, raw_processor):
        assert "attention_mask" in raw_processor.feature_extractor([noise(800)], sampling_rate=RATE, padding=True)

    def test_other_feature_extractors_are_refused(self, tokenizer):
        with pytest.raises(ValueError, match=r"Wav2Vec2FeatureExtractor.*got ASTFeatureExtractor"):
            MMSERProcessor(ASTFeatureExtractor(num_mel_bins=16), tokenizer)

    def test_pad_and_stack(self):
        rows = [np.ones((2, 3), "float32"), None, np.ones((2, 1), "float32")]
        stacked = pad_and_stack(rows, padding_value=-1, multiple_of=4)
        assert stacked.shape == (3, 2, 4) and stacked.dtype == np.float32
        assert (stacked == 1).sum(axis=(1, 2)).tolist() == [6, 0, 2] and (stacked[1] == -1).all()


class StandIn(PreTrainedModel):
    """Masked means of audio and text through a fixed matrix: any masked value or wrong mask changes the logits."""

    config_class = BertConfig
    main_input_name = "input_values"

    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.tensor([[2.0, -3.0, 0.2, 0.9], [0.3, 0.1, -0.4, 0.2]]))
        self.openmax_fitted = False
        self.rejects = True
        self.batch_sizes = []
        self.post_init()

    def forward(
        self,
        input_values=None,
        attention_mask=None,
        input_ids=None,
        text_attention_mask=None,
        labels=None,
        use_openmax=None,
        input_features=None,
    ):
        def masked_mean(values, mask):
            mask = mask.to(self.dtype)
            return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)

        audio = input_features.mean(1) if input_features is not None else input_values
        if audio is not None:
            assert audio.dtype == self.dtype
        sound = 0 if audio is None else masked_mean(audio.abs(), attention_mask)
        words = 0 if input_ids is None else masked_mean(input_ids.to(self.dtype), text_attention_mask)
        size = len(audio if audio is not None else input_ids)
        self.batch_sizes.append(size)
        features = torch.stack([torch.zeros(size, dtype=self.dtype) + sound, torch.zeros(size) + words], -1)
        logits = features.to(self.dtype) @ self.weight
        unknown = logits[:, 1:2].sigmoid() if self.openmax_fitted else None
        return ModelOutput(
            logits=logits,
            uncertainty=logits[:, :1].sigmoid(),
            unknown_probability=unknown,
            is_unknown=unknown[:, 0] > 0.3 if self.openmax_fitted and self.rejects else None,
            hidden_states=(features, features),
        )


@pytest.fixture
def classifier(processor):
    config = BertConfig(id2label=dict(enumerate(LABELS)), label2id={label: i for i, label in enumerate(LABELS)})
    return MMSERPipeline(model=StandIn(config), processor=processor, task="audio-classification", device="cpu")


def assert_same(first, second, tolerance=1e-5):
    assert [entry["label"] for entry in first] == [entry["label"] for entry in second]
    for one, other in zip(first, second, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=tolerance)


class TestPipeline:
    def test_result_is_the_softmax_of_the_logits(self, classifier, processor):
        clip = noise(8000)
        result = classifier({"raw": clip, "sampling_rate": RATE, "text": "i am so glad"})
        with torch.no_grad():
            logits = classifier.model(**processor(clip, "i am so glad", sampling_rate=RATE)).logits[0]
        expected = dict(zip(LABELS, logits.softmax(-1).tolist(), strict=True))
        assert [set(entry) for entry in result] == [{"label", "score"}] * 4
        assert {entry["label"]: entry["score"] for entry in result} == pytest.approx(expected, abs=1e-6)
        assert [entry["score"] for entry in result] == sorted(expected.values(), reverse=True)
        assert sum(entry["score"] for entry in result) == pytest.approx(1)

    def test_input_kinds(self, classifier, tmp_path):
        clip = noise(8000)
        path = tmp_path / "clip.wav"
        soundfile.write(path, clip, RATE, subtype="FLOAT")
        expected = classifier({"raw": clip, "sampling_rate": RATE})
        content = path.read_bytes()
        for inputs in (path, str(path), content, {"path": path}, {"file": str(path)}, {"bytes": content}):
            assert_same(classifier(inputs), expected)
        stereo = np.stack([clip, clip])
        for array in (clip, torch.from_numpy(clip), clip.astype("float64"), stereo, stereo.T):
            assert_same(classifier(array, sampling_rate=RATE), expected)
            assert_same(classifier({"array": array, "sampling_rate": RATE}), expected)
        assert_same(classifier({"bytes": None, "path": str(path), "text": None}), expected)
        assert_same(classifier({"array": clip, "path": "gone.wav", "sampling_rate": RATE}), expected)

    def test_url(self, classifier, tmp_path):
        soundfile.write(tmp_path / "clip.flac", noise(8000), RATE)
        handler = functools.partial(QuietHandler, directory=str(tmp_path))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            root = f"http://127.0.0.1:{server.server_port}"
            result = classifier(f"{root}/clip.flac")
            with pytest.raises(ValueError, match=r"gone\.flac.*cannot be downloaded.*404"):
                classifier(f"{root}/gone.flac")
            server.shutdown()
        assert_same(result, classifier(tmp_path / "clip.flac"))

    def test_any_rate(self, classifier):
        expected = classifier({"raw": sine(1.0), "sampling_rate": RATE})
        for rate in (8000, 44100):
            assert_same(classifier({"raw": sine(1.0, rate), "sampling_rate": rate}), expected, tolerance=0.02)

    def test_text_matters_and_may_come_alone(self, classifier):
        clip = {"raw": noise(8000), "sampling_rate": RATE}
        happy, sad = classifier({**clip, "text": "glad"}), classifier({**clip, "transcription": "no no"})
        assert happy != sad != classifier(clip)
        assert classifier({**clip, "text": " "}) == classifier(clip)
        assert len(classifier({"text": "so glad"})) == 4

    @pytest.mark.parametrize("batch_size", [2, 3, 8])
    def test_result_does_not_depend_on_the_batch(self, classifier, batch_size):
        inputs = [
            {"raw": noise(8000, 1), "sampling_rate": RATE},
            {"raw": noise(700, 2), "sampling_rate": RATE, "text": "i am so glad you came"},
            {"text": "no"},
            {"text": "so sad"},
            {"raw": 3 * noise(5000, 3), "sampling_rate": 8000, "text": "no"},
        ]
        alone = [classifier(entry, return_uncertainty=True) for entry in inputs]
        for form in (inputs, iter_of(inputs), torch_dataset(inputs)):
            classifier.model.batch_sizes.clear()
            batched = list(classifier(form, batch_size=batch_size, return_uncertainty=True))
            assert max(classifier.model.batch_sizes) == min(batch_size, 5)
            assert len(batched) == 5
            for one, other in zip(alone, batched, strict=True):
                assert_same(one, other)
                assert one[0]["uncertainty"] == pytest.approx(other[0]["uncertainty"], abs=1e-5)

    def test_clips_of_similar_length_share_a_batch(self, classifier, tmp_path, monkeypatch):
        lengths = [500, 9000, 700, 8000, 600, 8500]
        inputs = [{"raw": noise(length, length), "sampling_rate": RATE} for length in lengths]
        soundfile.write(tmp_path / "a.wav", noise(9000, 9000), RATE, subtype="FLOAT")
        inputs[1] = tmp_path / "a.wav"
        inputs[2]["text"] = "no"
        padding, collate = [], classifier._collate

        def spy(rows):
            batch = collate(rows)
            padding.append(1 - batch["attention_mask"].mean())
            return batch

        monkeypatch.setattr(classifier, "_collate", spy)
        results = classifier(inputs, batch_size=3)
        assert len(padding) == 2 and max(padding) < 0.2
        for item, result in zip(inputs, results, strict=True):
            assert_same(classifier(item), result)

    def test_what_has_no_length_is_named_in_its_turn(self, classifier):
        for bad in (np.float32(1), torch.tensor(1.0), {"raw": noise(900), "sampling_rate": "16000"}):
            with pytest.raises((TypeError, ValueError), match=r"input 1: "):
                classifier([{"text": "no"}, bad], batch_size=2)

    def test_workers(self, classifier):
        inputs = [{"text": "no"}, {"text": "glad"}, {"raw": noise(800), "sampling_rate": RATE}]
        for one, other in zip(classifier(inputs), classifier(inputs, num_workers=1, batch_size=2), strict=True):
            assert_same(one, other)

    def test_empty_list(self, classifier):
        assert classifier([]) == []

    def test_top_k(self, classifier):
        whole = classifier({"text": "no"})
        assert classifier({"text": "no"}, top_k=2) == whole[:2]
        assert classifier({"text": "no"}, top_k=9) == classifier({"text": "no"}, top_k=None) == whole
        for bad in (0, -1, 1.5, True):
            with pytest.raises(ValueError, match="top_k"):
                classifier({"text": "no"}, top_k=bad)

    def test_allowed_labels(self, classifier):
        whole = {entry["label"]: entry["score"] for entry in classifier({"text": "no"})}
        result = classifier({"text": "no"}, allowed_labels=["sad", "happy"])
        some = {entry["label"]: entry["score"] for entry in result}
        total = whole["sad"] + whole["happy"]
        assert some == pytest.approx({label: whole[label] / total for label in ("sad", "happy")}, abs=1e-6)
        for bad in (["joy"], [], "sad", [["sad"]], 5):
            with pytest.raises(ValueError, match=r"neutral.*happy.*sad.*angry"):
                classifier({"text": "no"}, allowed_labels=bad)

    def test_uncertainty(self, classifier):
        (entry,) = classifier({"text": "no"}, return_uncertainty=True, top_k=1)
        assert set(entry) == {"label", "score", "uncertainty", "unknown_probability", "is_unknown"}
        assert 0 < entry["uncertainty"] < 1
        assert entry["unknown_probability"] is None and entry["is_unknown"] is None
        classifier.model.openmax_fitted = True
        result = classifier([{"text": "no"}, {"text": "sad"}], return_uncertainty=True, batch_size=2)
        assert all(0 < entry["unknown_probability"] < 1 for entries in result for entry in entries)
        json.dumps(result)  # plain numbers

    def test_rejection_is_the_model_s(self, classifier):
        def is_unknown():
            inputs = [{"text": "no"}, {"raw": noise(8000), "sampling_rate": RATE}]
            results = classifier(inputs, return_uncertainty=True, batch_size=2, top_k=2)
            assert all(one["is_unknown"] is other["is_unknown"] for one, other in results)
            return [entries[0]["is_unknown"] for entries in results]

        assert is_unknown() == [None, None]  # OpenMax is not fitted
        classifier.model.openmax_fitted = True
        answers = is_unknown()
        assert sorted(answers) == [False, True] and all(type(answer) is bool for answer in answers)
        with torch.no_grad():
            classifier.model.weight[:, 1] = -100.0
        assert is_unknown() == [False, False]
        with torch.no_grad():
            classifier.model.weight[:, 1] = 100.0
        assert is_unknown() == [True, True]
        classifier.model.rejects = False  # rejection is switched off
        assert is_unknown() == [False, False]

    def test_function_to_apply(self, classifier):
        def scores(**options):
            return {entry["label"]: entry["score"] for entry in classifier({"text": "no"}, **options)}

        logits = torch.tensor([scores(function_to_apply="none")[label] for label in LABELS])
        for name, function in {"sigmoid": torch.sigmoid, "softmax": lambda x: x.softmax(-1)}.items():
            expected = dict(zip(LABELS, function(logits).tolist(), strict=True))
            assert scores(function_to_apply=name) == pytest.approx(expected, abs=1e-6)
        assert scores(function_to_apply="none", allowed_labels=["sad"])["sad"] == pytest.approx(logits[2].item())
        with pytest.raises(ValueError, match=r"softmax.*sigmoid.*none"):
            classifier({"text": "no"}, function_to_apply="tanh")

    def test_options_at_construction(self, classifier):
        options = {"model": classifier.model, "processor": classifier.processor, "device": "cpu"}
        short = MMSERPipeline(**options, top_k=1, sampling_rate=RATE)
        assert len(short(noise(800))) == 1 and len(short(noise(800), top_k=None)) == 4
        with pytest.raises(TypeError, match=r"`topk` is no option of the pipeline: did you mean `top_k`\?"):
            classifier({"text": "no"}, topk=1)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_model(self, classifier, dtype):
        inputs = [{"raw": noise(800), "sampling_rate": RATE, "text": "no"}, {"text": "sad"}]
        expected = classifier(inputs)
        classifier.model.to(dtype)
        for one, other in zip(classifier(inputs, batch_size=2), expected, strict=True):
            assert {entry["label"]: entry["score"] for entry in one} == pytest.approx(
                {entry["label"]: entry["score"] for entry in other}, abs=0.05
            )

    @pytest.mark.parametrize(
        ("inputs", "reason"),
        [
            (sine(), "`sampling_rate` is required"),
            ({"raw": sine()}, "`sampling_rate` is required"),
            ({"raw": noise(399), "sampling_rate": RATE}, "too short"),
            ({"raw": np.full(800, np.nan), "sampling_rate": RATE}, "NaN"),
            ({"text": ""}, "neither audio nor text"),
            ({}, "nothing to process"),
            ({"text": "no", "speaker": 3}, "speaker.*allowed are.*transcription"),
            (b"garbage", "cannot be read as audio"),
        ],
    )
    def test_refusals_name_the_element(self, classifier, inputs, reason):
        with pytest.raises(ValueError, match=reason):
            classifier(inputs)
        for batch_size in (1, 2):
            with pytest.raises(ValueError, match=f"input 1: .*{reason}"):
                classifier([{"text": "no"}, inputs, {"text": "no"}], batch_size=batch_size)

    def test_refusals_name_the_file_and_keep_the_type(self, classifier, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"input 1: .*gone\.wav"):
            classifier([{"text": "no"}, str(tmp_path / "gone.wav")])
        (tmp_path / "bad.wav").write_bytes(encoded(noise(800))[:500])
        with pytest.raises(ValueError, match=r"input 0: .*bad\.wav.*truncated"):
            classifier([tmp_path / "bad.wav"])
        with pytest.raises(ValueError, match=r"input 1: .*neither"):
            list(classifier(iter_of([{"text": "no"}, {"text": ""}])))
        with pytest.raises(TypeError, match=r"input 0: .*float"):
            classifier(noise(800).tolist(), sampling_rate=RATE)

    def test_no_message_about_an_unsupported_model(self, classifier, caplog):
        options = {"model": classifier.model, "processor": classifier.processor, "device": "cpu"}
        with caplog.at_level(logging.WARNING):
            MMSERPipeline(**options)({"text": "no"})
        assert not caplog.records


class TestStreamAudio:
    @pytest.mark.parametrize("format_", ["WAV", "FLAC", "OGG", "MP3"])
    @pytest.mark.parametrize("rate", [8000, 16000, 44100])
    def test_joined_blocks_are_the_whole(self, tmp_path, rate, format_):
        (tmp_path / "a.raw").write_bytes(
            encoded(np.stack([noise(5 * rate), noise(5 * rate, 1)], axis=1), rate, format=format_)
        )
        whole = load_audio(tmp_path / "a.raw")
        for audio in (tmp_path / "a.raw", (tmp_path / "a.raw").read_bytes()):
            blocks = list(stream_audio(audio, block_seconds=0.7))
            assert len(blocks) > 5 and all(block.dtype == np.float32 for block in blocks)
            np.testing.assert_allclose(np.concatenate(blocks), whole, atol=1e-6)

    def test_samples_come_whole(self):
        (block,) = stream_audio(noise(9000), sampling_rate=8000)
        np.testing.assert_array_equal(block, load_audio(noise(9000), sampling_rate=8000))

    def test_bad_files(self, tmp_path):
        for format_ in ("WAV", "FLAC"):
            path = tmp_path / f"cut.{format_}"
            path.write_bytes(encoded(noise(RATE), format=format_)[:12000])
            with pytest.raises(ValueError, match=rf"cut\.{format_}.*(truncated|cannot be read)"):
                list(stream_audio(path, block_seconds=0.1))
        (tmp_path / "nan.wav").write_bytes(encoded(np.full(RATE, np.nan, dtype=np.float32), subtype="FLOAT"))
        (tmp_path / "none.wav").write_bytes(b"")
        (tmp_path / "slow.wav").write_bytes(encoded(noise(100), rate=1))
        for name, reason in (("nan.wav", "NaN"), ("none.wav", "empty"), ("slow.wav", "at least 1000")):
            with pytest.raises(ValueError, match=rf"{name}.*{reason}"):
                list(stream_audio(tmp_path / name))
        with pytest.raises(FileNotFoundError, match=r"gone\.wav"):
            list(stream_audio(tmp_path / "gone.wav"))


class TestSplitIntoChunks:
    @given(
        total=strategies.integers(0, 60),
        length=strategies.integers(1, 20),
        context=strategies.tuples(strategies.floats(0, 0.49), strategies.floats(0, 0.49)),
        cuts=strategies.lists(strategies.integers(0, 60), max_size=5),
    )
    def test_pieces_tile_the_recording(self, total, length, context, cuts):
        left, right = (int(share * length) for share in context)
        samples = np.arange(total, dtype=np.float32)
        chunks = list(split_into_chunks(np.split(samples, sorted(cuts)), length, left, right))
        assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])][: len(chunks)]
        assert (chunks[-1].stop if chunks else 0) == total
        for index, chunk in enumerate(chunks):
            assert len(chunk.samples) == min(length, total)
            np.testing.assert_array_equal(chunk.samples, samples[chunk.first : chunk.first + length])
            assert chunk.start < chunk.stop
            assert chunk.first <= max(0, chunk.start - left)
            assert index == len(chunks) - 1 or chunk.first + length == chunk.stop + right

    def test_words_belong_to_where_their_middle_lies(self):
        words = [
            {"text": " i am", "timestamp": (0.0, 1.0)},
            {"text": " so glad", "timestamp": (1.0, 2.5)},
            {"text": "came", "timestamp": (2.5, None)},
        ]
        assert text_of_chunk(words, 0, 1) == "i am"
        assert text_of_chunk(words, 0, 2) == "i am so glad"
        assert text_of_chunk(words, 1, 9) == "so glad came"
        assert text_of_chunk(words, 3, 9) is None and text_of_chunk([], 0, 9) is None

    def test_segments_longer_than_a_chunk_and_past_the_end(self):
        long = [{"text": "a", "timestamp": (0.0, 20.0)}]
        assert text_of_chunk(long, 0, 8) == text_of_chunk(long, 6, 14) == text_of_chunk(long, 12, 20) == "a"
        assert text_of_chunk(long, 18, 26) is None
        assert text_of_chunk([{"text": "a", "timestamp": (58.0, 62.0)}], 52, 60) == "a"


class RowsByNumber(torch.utils.data.Dataset):
    """A data set that does not say where it ends but by its length."""

    def __init__(self, rows):
        self.rows = dict(enumerate(rows))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class TestRecordings:
    """The pipeline with `chunk_length_s`."""

    words = ({"text": "i am so", "timestamp": (0.0, 0.9)}, {"text": "glad", "timestamp": (2.0, 2.4)})

    def test_chunks_are_as_classified_one_by_one(self, classifier, tmp_path):
        samples = np.linspace(0.1, 3, int(2.6 * RATE), dtype=np.float32) * noise(int(2.6 * RATE))
        soundfile.write(tmp_path / "long.wav", samples, RATE, subtype="FLOAT")
        item = {"path": tmp_path / "long.wav", "chunks": list(self.words)}
        options = {"chunk_length_s": 1.0, "stride_length_s": (0.1, 0.2), "return_uncertainty": True}
        # (piece, what is classified, what is said in it), in seconds
        expected = [
            ((0, 0.8), (0, 1), "i am so"),
            ((0.8, 1.5), (0.7, 1.7), None),
            ((1.5, 2.2), (1.4, 2.4), "glad"),
            ((2.2, 2.6), (1.6, 2.6), "glad"),
        ]
        for batch_size in (1, 2, 5):
            result = classifier(item, batch_size=batch_size, **options)
            assert [chunk["timestamp"] for chunk in result["chunks"]] == [
                pytest.approx(times, abs=1e-4) for times, _, _ in expected
            ]
            for chunk, (_, (first, last), text) in zip(result["chunks"], expected, strict=True):
                part = samples[round(first * RATE) : round(last * RATE)]
                alone = classifier({"raw": part, "sampling_rate": RATE, "text": text}, return_uncertainty=True)
                assert_same(chunk["scores"], alone)
                assert chunk["scores"][0]["uncertainty"] == pytest.approx(alone[0]["uncertainty"], abs=1e-5)
            seconds = [stop - start for (start, stop), _, _ in expected]
            for entry in result["scores"]:
                same = [
                    next(other for other in chunk["scores"] if other["label"] == entry["label"])
                    for chunk in result["chunks"]
                ]
                for name in ("score", "uncertainty"):
                    mean = np.average([other[name] for other in same], weights=seconds)
                    assert entry[name] == pytest.approx(mean, abs=1e-5)

    def test_options(self, classifier):
        recording = {"raw": noise(3 * RATE), "sampling_rate": RATE}
        result = classifier(recording, chunk_length_s=1.2, top_k=1)  # so that the context is 0.2 s on each side
        assert len(result["scores"]) == 1 and {len(chunk["scores"]) for chunk in result["chunks"]} == {1}
        assert [chunk["timestamp"][0] for chunk in result["chunks"]] == pytest.approx([0, 1, 1.8, 2.6])
        allowed = classifier(recording, chunk_length_s=1, allowed_labels=["sad", "angry"])["scores"]
        assert sum(entry["score"] for entry in allowed) == pytest.approx(1)
        classifier.model.openmax_fitted = True
        scores = classifier(recording, chunk_length_s=1, return_uncertainty=True)["scores"]
        assert isinstance(scores[0]["is_unknown"], bool)

    def test_chunks_come_as_they_are_classified(self, classifier):
        samples = noise(3 * RATE)
        recording = {"raw": samples, "sampling_rate": RATE}
        whole = classifier(recording, chunk_length_s=1.2, batch_size=2, return_uncertainty=True)
        options = {"batch_size": 2, "chunk_length_s": 1.2, "return_uncertainty": True}
        chunks = list(classifier.iterate_chunks(recording, **options))
        assert chunks == whole["chunks"] and len(chunks) == 4
        assert mean_over_time(chunks) == whole["scores"]
        with pytest.raises(ValueError, match="`chunk_length_s` is needed"):
            classifier.iterate_chunks(recording)
        with pytest.raises(ValueError, match="together less than"):  # at once, not when the first is taken
            classifier.iterate_chunks(recording, chunk_length_s=1, stride_length_s=1)
        with pytest.raises(FileNotFoundError, match=r"recording: .*there is no such file"):
            next(classifier.iterate_chunks("gone.wav", chunk_length_s=1))

    def test_lists_and_construction(self, classifier, processor):
        options = {"chunk_length_s": 1, "stride_length_s": 0.1}
        streaming = MMSERPipeline(model=classifier.model, processor=processor, device="cpu", **options)
        recordings = [{"raw": noise(seconds * RATE, seconds), "sampling_rate": RATE} for seconds in (2, 1, 3)]
        results = streaming(recordings, batch_size=2)
        assert [result["chunks"][-1]["timestamp"][1] for result in results] == [2, 1, 3]
        numbered = RowsByNumber(recordings)
        assert (
            list(streaming(numbered))
            == list(streaming(iter_of(recordings)))
            == [streaming(recording) for recording in recordings]
        )
        assert_same(streaming(recordings[1], chunk_length_s=None), classifier(recordings[1]))

    @pytest.mark.parametrize(
        ("item", "options", "reason"),
        [
            (noise(RATE), {"chunk_length_s": 0}, "`chunk_length_s` must be a number from"),
            (noise(RATE), {"chunk_length_s": "8"}, "`chunk_length_s` must be a number from"),
            (noise(RATE), {"chunk_length_s": float("inf")}, "`chunk_length_s` must be a number from"),
            (noise(RATE), {"chunk_length_s": 1, "stride_length_s": float("nan")}, "from 0 up"),
            (noise(RATE), {"chunk_length_s": 1, "stride_length_s": 0.5}, "together less than"),
            (noise(RATE), {"chunk_length_s": 1, "stride_length_s": (0.1, -0.1)}, "from 0 up"),
            (noise(RATE), {"stride_length_s": 0.1}, "needs `chunk_length_s`"),
            ({"raw": noise(RATE), "text": "no"}, {"chunk_length_s": 1}, "unknown keys.*text.*chunks"),
            ({"raw": noise(RATE), "chunks": [{"text": "no"}]}, {"chunk_length_s": 1}, "`chunks` row 0"),
            ({"chunks": []}, {"chunk_length_s": 1}, "a recording is needed"),
            (np.zeros(0), {"chunk_length_s": 1}, "empty"),
            (noise(300), {"chunk_length_s": 1}, r"input 0 at 0\.00 s: .*too short"),
        ],
    )
    def test_refusals(self, classifier, item, options, reason):
        with pytest.raises(ValueError, match=reason):
            classifier(item, sampling_rate=RATE, **options)

    def test_chunks_longer_than_the_encoder_takes(self, classifier, processor):
        if processor.audio_input_name == "input_features":
            with pytest.raises(ValueError, match="to 30 s, got 31"):
                classifier(noise(RATE), sampling_rate=RATE, chunk_length_s=31)

    def test_memory_does_not_grow_with_the_recording(self, classifier, tmp_path):
        peaks = []
        for minutes in (1, 8):
            with soundfile.SoundFile(tmp_path / "long.flac", "w", 8000, 1) as file:
                for minute in range(minutes):
                    file.write(noise(60 * 8000, minute))
            tracemalloc.start()
            result = classifier(tmp_path / "long.flac", chunk_length_s=10, stride_length_s=0, batch_size=2)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert len(result["chunks"]) == 6 * minutes
        assert peaks[1] < 1.3 * peaks[0]  # the samples alone are 4 and 31 MB


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def iter_of(items):
    yield from items


def torch_dataset(items):
    methods = {"__len__": lambda self: len(items), "__getitem__": lambda self, index: items[index]}
    return type("Items", (torch.utils.data.Dataset,), methods)()
