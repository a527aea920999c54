# SPDX-License-Identifier: Apache-2.0
"""What comes of input that nobody would write: more than 20,000 generated cases, of which none may crash.

    python benchmarks/fuzz.py --cases 2500

Each target of `TARGETS` draws cases by Hypothesis and does with them what a user does. A case may be refused, by an
error that is documented for users; anything else is a fault, and so is a number that is not finite. Media run in a
process of its own whose memory is limited: files of each container that are cut, changed or lie about their size, and
some that are made to fill the memory. `tests/test_fuzz.py` runs a small part of it.
"""

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertTokenizer, Wav2Vec2Config, Wav2Vec2FeatureExtractor
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from audio_mmser import audio_length, load_audio, stream_audio, why_silent
from benchmarks.tables import Row, parse_arguments, publish, read_results, table
from configuration_mmser import MMSERConfig
from mmser.arguments import (
    EVALUATION_ARGUMENTS,
    EXPORT_ARGUMENTS,
    TRAINING_ARGUMENTS,
    read_recipe,
)
from mmser.arguments import (
    parse_arguments as parse_flags,
)
from mmser.batches import MMSERDataCollator
from mmser.label_map import read_label_map
from mmser.labels import choose_label_names, gather_labels, label_id
from mmser.loading import load_emotion_dataset
from mmser.prediction_arguments import PredictionArguments
from mmser.results import environment
from mmser.sources import Record
from mmser.timed_files import read_rttm, read_srt
from modeling_mmser import MMSERForAudioClassification
from processing_mmser import MMSERPipeline, MMSERProcessor

# What a user is told: a refusal (also of Transformers' configurations), a file that cannot be read, a wrong flag
DOCUMENTED = (ValueError, TypeError, OSError, StrictDataclassError)
MEMORY = 2**30  # bytes that the process with media may take beyond those that it begins with
SHOWN = 5  # faults of a target that are kept
RATE = 16_000
WORDS = ("what", "a", "joy")


class Fault(AssertionError):
    """What must not be: a NaN, a score that is none, a changed value."""


# --- what is drawn ---------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(-3, 3), st.integers(), st.floats(), st.sampled_from([1e-300, 1e300, 2**31, -(2**63)]))
TEXTS = st.one_of(
    st.text(max_size=20), st.sampled_from(["", " ", "\0", "happy", "1", "nan", "\ud800", "a\tb", "é" * 99])
)
JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
DTYPES = (
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "bool",
    "complex64",
    "U3",
)
SHAPES = st.one_of(
    st.integers(0, 3000).map(lambda size: (size,)),
    st.tuples(st.integers(0, 3), st.integers(0, 2000)),
    st.tuples(st.integers(0, 2000), st.integers(0, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)),
    st.just(()),
)
SPECIAL = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 1e13, 3.4e38, -1.0, 32767.0])


@st.composite
def arrays(draw: Any) -> np.ndarray:
    """Samples of any dtype and shape, loud or quiet, with values in them that are none."""
    values = np.random.default_rng(draw(st.integers(0, 99))).normal(
        0, draw(st.sampled_from([0, 1e-6, 0.3, 1e4])), 4096
    )
    shape = draw(SHAPES)
    array = np.resize(values, shape) if np.prod(shape) else np.zeros(shape)
    for place, value in draw(st.lists(st.tuples(st.integers(0, 4095), SPECIAL), max_size=2)):
        if array.size:
            array.flat[place % array.size] = value
    with np.errstate(all="ignore"):
        return array.astype(draw(st.sampled_from(DTYPES)))


@st.composite
def speech(draw: Any) -> np.ndarray:
    """Samples that are in order, of any loudness."""
    size, level = draw(st.integers(400, 4000)), draw(st.sampled_from([0.0, 1e-30, 1e-3, 0.3, 0.3, 1.0, 1e6, 1e11]))
    return (level * np.random.default_rng(size).normal(0, 1, size).clip(-3, 3)).astype(np.float32)


RATES = st.one_of(st.sampled_from([8000, 16_000, 44_100, 22_050.0]), st.none(), NUMBERS, TEXTS)
PLAIN_AUDIO = st.one_of(
    arrays(), arrays().map(lambda array: array.tolist()), TEXTS, st.binary(max_size=60), NUMBERS, st.none()
)
AUDIO = st.one_of(
    PLAIN_AUDIO,
    st.tuples(RATES, PLAIN_AUDIO),
    st.dictionaries(
        st.sampled_from(["raw", "array", "bytes", "path", "sampling_rate", "text"]), PLAIN_AUDIO, max_size=3
    ),
    st.builds(lambda raw, rate: {"raw": raw, "sampling_rate": rate}, arrays(), RATES),
)
TEXT_INPUTS = st.one_of(st.none(), TEXTS, JSON_VALUES)
CLIPS = st.builds(
    lambda raw, rate: {"raw": raw, "sampling_rate": rate}, speech(), st.sampled_from([8000, RATE, 44_100])
)
WORDINGS = st.one_of(st.none(), TEXTS, st.just("what a joy " * 30))


# --- what is done with it --------------------------------------------------------------------------------------------


@cache
def tiny_classifier() -> MMSERPipeline:
    """A model of a few thousand parameters, at random."""
    vocab = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = BertTokenizer(vocab=vocab, model_max_length=16)
    processor = MMSERProcessor(Wav2Vec2FeatureExtractor(return_attention_mask=True), tokenizer)
    sizes: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolutions: Any = {"conv_dim": [8, 8], "conv_kernel": [96, 20], "conv_stride": [16, 20]}
    convolutions |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    audio = Wav2Vec2Config(**convolutions, **sizes)
    text = BertConfig(vocab_size=len(vocab), max_position_embeddings=16, **sizes)
    torch.manual_seed(0)
    model = MMSERForAudioClassification.from_backbones(
        audio, text, classifier_num_layers=1, classifier_hidden_size=16, fusion_hidden_size=16,
        cross_attention_hidden_size=16, cross_attention_heads=2, feature_size=16,
    )  # fmt: skip
    return MMSERPipeline(model.eval(), processor=processor, device="cpu")


def check_finite(values: Any, what: str) -> None:
    """All numbers in tensors, lists and dicts are finite."""
    if isinstance(values, dict):
        for name, value in values.items():
            check_finite(value, f"{what} {name}")
    elif isinstance(values, (list, tuple)):
        for value in values:
            check_finite(value, what)
    elif isinstance(values, (torch.Tensor, np.ndarray, float)):
        tensor = torch.as_tensor(values)
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise Fault(f"{what} is not finite")


def run_processor(case: tuple[Any, Any, Any, bool]) -> None:
    audio, text, rate, is_list = case
    given = {"audio": [audio, audio] if is_list else audio, "text": [text, text] if is_list else text}
    batch = tiny_classifier().processor(**given, sampling_rate=rate, padding=True, return_tensors="pt")
    check_finite(dict(batch), "the batch")


def run_pipeline(case: tuple[Any, dict[str, Any]]) -> None:
    item, options = case
    answers = tiny_classifier()(item, **options)
    check_finite(answers, "an answer")
    for score in _scores(answers):
        if options.get("function_to_apply") != "none" and not 0 <= score <= 1 + 1e-6:
            raise Fault(f"a score is {score}")


def _scores(answers: Any) -> Iterator[float]:
    if isinstance(answers, list):
        for answer in answers:
            yield from _scores(answer)
    elif isinstance(answers, dict):
        yield from ([answers["score"]] if "score" in answers else _scores(list(answers.values())))


PIPELINE_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "top_k": st.one_of(st.integers(-2, 6), JSON_VALUES),
        "allowed_labels": st.one_of(st.lists(st.sampled_from(["happy", "sad", "x"]), max_size=3), JSON_VALUES),
        "return_uncertainty": st.booleans(),
        "chunk_length_s": st.one_of(st.sampled_from([0, 0.05, 0.1, 1]), NUMBERS, TEXTS),
        "stride_length_s": st.one_of(st.sampled_from([0, 0.01, 0.5]), NUMBERS, TEXTS),
        "function_to_apply": st.sampled_from(["softmax", "sigmoid", "none", "x"]),
        "batch_size": st.integers(1, 3),
    },
)
GOOD_OPTIONS = st.fixed_dictionaries(
    {"return_uncertainty": st.booleans()},
    optional={
        "top_k": st.integers(1, 4),
        "chunk_length_s": st.sampled_from([0.05, 0.1]),
        "batch_size": st.integers(1, 3),
    },
)
PIPELINE_INPUTS = st.one_of(
    CLIPS,
    st.lists(CLIPS, min_size=1, max_size=2),
    st.builds(lambda clip, text: {**clip, "text": text}, CLIPS, TEXTS),
    AUDIO,
    st.lists(AUDIO, max_size=2),
    st.builds(lambda raw, text: {"raw": raw, "sampling_rate": RATE, "text": text}, arrays(), TEXT_INPUTS),
    st.builds(lambda text: {"text": text}, TEXT_INPUTS),
    JSON_VALUES,
)


def run_collator(examples: list[dict[str, Any] | None]) -> None:
    batch = MMSERDataCollator(tiny_classifier().processor)(examples)
    check_finite(dict(batch), "the batch")
    own = {name: value for name, value in batch.items() if name not in ("labels", "class_shares")}
    with torch.no_grad():
        check_finite(tiny_classifier().model(**own).logits, "the logits")


@st.composite
def examples(draw: Any) -> list[Any]:
    """Examples as `EmotionDataset` makes them, of any length and loudness, with modalities that are missing."""
    keys = draw(st.sampled_from([("audio", "text"), ("audio",), ("text",)]))
    rows: list[Any] = []
    for _ in range(draw(st.integers(0, 4))):
        row = {"audio": draw(st.one_of(st.none(), speech())), "text": draw(WORDINGS)}
        rows.append({"labels": draw(st.integers(0, 3)), **{name: row[name] for name in keys}})
    return [*rows, *[None] * draw(st.integers(0, 1))]


FIELDS = [one.name for one in fields(MMSERConfig) if not one.name.startswith("_")]
FIELD_VALUES = st.one_of(
    JSON_VALUES, st.integers(0, 64), st.floats(0, 2), st.sampled_from(["none", "gated", "centroid"])
)


def run_config(values: dict[str, Any]) -> None:
    config = MMSERConfig(**values)
    again = MMSERConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    for name in ("id2label", "num_labels", "classifier_num_layers", "openmax_threshold", "modalities"):
        if getattr(again, name) != getattr(config, name):
            raise Fault(f"{name} is {getattr(config, name)!r}, and after saving {getattr(again, name)!r}")


TABLE_CELLS = st.one_of(
    TEXTS, st.sampled_from(["happy", "sad", "0", "1", "-1", "other", "*", "a.wav", '"', "../x", "joy"])
)
HEADERS = st.lists(
    st.one_of(st.sampled_from(["corpus", "label", "target", "file_name", "transcription", "speaker", "split"]), TEXTS),
    min_size=1,
    max_size=5,
)


GOOD_CELLS = {
    "corpus": st.sampled_from(["a", "b", "*"]),
    "label": st.sampled_from(["happy", "sad", "joy", "0"]),
    "target": st.sampled_from(["happy", "sad", "other", ""]),
    "file_name": st.just("a.wav"),
    "transcription": st.sampled_from(["", "what a joy"]),
    "speaker": st.sampled_from(["", "anna", "ben", "7"]),
    "split": st.just("train"),
}


@st.composite
def files(draw: Any, header: Sequence[str] = ()) -> tuple[str, bytes]:
    """A table, more or less: (suffix, content)."""
    suffix = draw(st.sampled_from([".csv", ".tsv", ".jsonl"]))
    kind = draw(st.integers(0, 4))
    if kind == 0:
        return suffix, draw(st.binary(max_size=200))
    names = list(header) if header and kind > 1 else draw(HEADERS)
    is_good = draw(st.booleans())  # then each cell fits its column
    columns = [GOOD_CELLS.get(name, TABLE_CELLS) if is_good else TABLE_CELLS for name in names]
    rows = draw(st.lists(st.tuples(*columns), max_size=6))
    if suffix == ".jsonl":
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    else:
        delimiter = draw(st.sampled_from([",", ";", "\t", "|"]))
        lines = [delimiter.join(row) for row in [names, *rows]]
    text = draw(st.sampled_from(["\n", "\r\n", "\r"])).join(lines)
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16", "utf-32", "latin-1"]))
    return suffix, text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")


@contextlib.contextmanager
def written(content: bytes, name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


def run_label_map(case: tuple[tuple[str, bytes], list[Any]]) -> None:
    (suffix, content), labels = case
    with written(content, f"map{suffix}") as path:
        mapping = read_label_map(path)
    records = [Record("row", "train", label, "", {}, corpus="a") for label in labels]
    mapping.apply(records)
    mapping.check_targets(["happy", "sad"])


def run_labels(case: tuple[list[Any], list[Any] | None]) -> None:
    labels, names = case
    found = gather_labels((label, f"row {number}") for number, label in enumerate(labels))
    names = choose_label_names(names, None, found)
    for label in labels:
        if not -1 <= label_id(label, names, "row 1", allow_unknown=True) < len(names):
            raise Fault(f"{label!r} has no id among {names}")


def run_data(case: tuple[str, bytes]) -> None:
    suffix, content = case
    with written(content, f"metadata{suffix}") as path:
        soundfile.write(path.parent / "a.wav", np.full(800, 0.1), RATE)
        splits, names = load_emotion_dataset(path, on_bad_example="skip", allow_speaker_overlap=True)
        for split in splits.values():
            if not all(-1 <= label < len(names) for label in split["labels"]):
                raise Fault("a label without a class")


def run_timed_files(case: tuple[str, bytes]) -> None:
    kind, content = case
    with written(content, f"a.{kind}") as path:
        (read_srt if kind == "srt" else read_rttm)(path)


TIMED = st.one_of(
    st.binary(max_size=100),
    st.lists(
        st.one_of(
            TEXTS, st.sampled_from(["1", "00:00:01,000 --> 00:00:02,5", "SPEAKER a 1 0.0 nan <NA> <NA> b <NA>"])
        ),
        max_size=6,
    ).map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")),
)
TURNS = st.lists(
    st.sampled_from(["SPEAKER a 1 0.0 1.5 <NA> <NA> b <NA>", "SPEAKER a 1 -1 x", "", ";"]), max_size=5
).map(lambda lines: ("rttm", "\n".join(lines).encode()))
SUBTITLES = st.lists(
    st.sampled_from(["1\n00:00:01,000 --> 00:00:02,500\nwhat", "2\n00:00:03.0 --> 00:00:02.0\njoy", "3\n--> x\n"]),
    max_size=4,
).map(lambda blocks: ("srt", "\n\n".join(blocks).encode()))
COMMANDS = {
    "train": TRAINING_ARGUMENTS[:2],
    "eval": EVALUATION_ARGUMENTS,
    "export": EXPORT_ARGUMENTS,
    "predict": (PredictionArguments,),
}


@cache
def flags_of(command: str) -> list[str]:
    return sorted({one.name for kind in COMMANDS[command] for one in fields(kind)})


@st.composite
def command_lines(draw: Any) -> tuple[str, list[str]]:
    command = draw(st.sampled_from(sorted(COMMANDS)))
    words: list[str] = []
    for _ in range(draw(st.integers(0, 4))):
        flag = draw(st.one_of(st.sampled_from(flags_of(command)), TEXTS))
        words.append(draw(st.sampled_from(["--", "--no_", "-", ""])) + flag)
        words += draw(
            st.lists(st.one_of(TEXTS, NUMBERS.map(str), st.sampled_from(["{}", "[1]", "true", "a=b"])), max_size=2)
        )
    return command, words


def run_command_line(case: tuple[str, list[str]]) -> None:
    command, words = case
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            parse_flags(COMMANDS[command], words)
        except SystemExit as error:
            if error.code not in (0, 2):
                raise Fault(f"exit code {error.code}") from error
            raise ValueError("a wrong flag, or --help") from error


def run_recipe(case: tuple[str, bytes]) -> None:
    command, content = case
    with written(content, "recipe.json") as path:
        read_recipe(str(path))
        run_command_line((command, [str(path)]))


@st.composite
def recipes(draw: Any) -> tuple[str, bytes]:
    command = draw(st.sampled_from(sorted(COMMANDS)))
    if draw(st.integers(0, 3)) == 0:
        return command, draw(st.one_of(st.binary(max_size=80), st.just(b"[" * 100_000), JSON_VALUES.map(_json)))
    keys = st.one_of(st.sampled_from(flags_of(command)), TEXTS)
    return command, _json(draw(st.dictionaries(keys, JSON_VALUES, max_size=4)))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


@dataclass
class Target:
    """What is fed, with which cases, and how many of the whole."""

    run: Callable[[Any], None]
    cases: st.SearchStrategy
    share: float = 1.0


GOOD_LABELS = st.lists(st.sampled_from(["happy", "sad", "Happy ", "neutral"]), min_size=1, max_size=6)
LABELS = st.lists(st.one_of(TEXTS, NUMBERS, st.sampled_from(["happy", "sad", "other"]), st.none()), max_size=6)
TARGETS = {
    "processor": Target(
        run_processor,
        st.one_of(
            st.tuples(CLIPS, WORDINGS, st.just(RATE), st.booleans()),
            st.tuples(AUDIO, TEXT_INPUTS, RATES, st.booleans()),
        ),
    ),
    "pipeline": Target(
        run_pipeline, st.tuples(PIPELINE_INPUTS, st.one_of(st.just({}), PIPELINE_OPTIONS, GOOD_OPTIONS))
    ),
    "collator": Target(run_collator, examples()),
    "configuration": Target(
        run_config, st.dictionaries(st.sampled_from(FIELDS), FIELD_VALUES, min_size=1, max_size=3)
    ),
    "label map": Target(run_label_map, st.tuples(files(("corpus", "label", "target")), LABELS)),
    "labels": Target(
        run_labels,
        st.tuples(st.one_of(GOOD_LABELS, LABELS), st.one_of(st.none(), GOOD_LABELS, st.lists(TEXTS, max_size=4))),
    ),
    "tables of data": Target(run_data, files(("file_name", "label", "transcription", "speaker", "split")), 0.4),
    "subtitles and turns": Target(run_timed_files, st.one_of(TIMED.map(lambda text: ("srt", text)), TURNS, SUBTITLES)),
    "command lines": Target(run_command_line, command_lines(), 0.4),
    "recipes": Target(run_recipe, recipes(), 0.4),
}


# --- one target, and all of them -------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of the cases of a target."""

    cases: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)

    def take(self, run: Callable[[Any], None], case: Any) -> None:
        self.cases += 1
        try:
            run(case)
        except DOCUMENTED:
            self.refused += 1
        except (Exception, RecursionError) as error:  # whatever it is, it is counted and shown
            where = traceback.extract_tb(error.__traceback__)[-1]
            told = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"[:200]
            shown = f"{len(case):,} bytes" if isinstance(case, bytes) else f"{case!r:.300}"
            self.faults.append(f"{told} by {shown}")


def feed(target: Target, cases: int, number: int = 0) -> Outcome:
    """Draw cases and run them."""
    outcome = Outcome()

    @seed(number)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.cases)
    def each(case: Any) -> None:
        outcome.take(target.run, case)

    each()
    return outcome


# --- media -----------------------------------------------------------------------------------------------------------

CONTAINERS = (
    ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("WAVEX", "PCM_24"), ("RF64", "PCM_16"),
    ("W64", "PCM_16"), ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("CAF", "PCM_16"), ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"),
)  # fmt: skip
AV_CONTAINERS = (
    ("mp4", "aac", RATE),
    ("webm", "libopus", 48_000),
    ("adts", "aac", RATE),
    ("matroska", "pcm_s16le", RATE),
)
MEDIA = ("spoilt media", "media that promise much")  # which are no targets of Hypothesis
LIES = (b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0" * 4, b"\0\0\0\x80", b"\xff" * 8, b"\x7f" + b"\xff" * 7)


@cache
def whole_files() -> dict[str, bytes]:
    """A third of a second in each container."""
    samples = 0.3 * np.sin(np.arange(5333) / 9) * np.linspace(0.2, 1, 5333)
    made = {}
    for container, subtype in CONTAINERS:
        file = io.BytesIO()
        soundfile.write(file, samples, RATE, format=container, subtype=subtype)
        made[f"{container} {subtype}"] = file.getvalue()
    with contextlib.suppress(ImportError):
        import av

        for container, codec, rate in AV_CONTAINERS:
            file = io.BytesIO()
            with av.open(file, "w", format=container) as output:
                stream: Any = output.add_stream(codec, rate=rate, layout="mono")
                frame = av.AudioFrame.from_ndarray(samples.astype(np.float32)[None], format="flt", layout="mono")
                frame.sample_rate = RATE
                resampler = av.AudioResampler(format=stream.format.name, layout="mono", rate=rate)
                frames = resampler.resample(frame) + resampler.resample(None)
                for packet in [packet for one in [*frames, None] for packet in stream.encode(one)]:
                    output.mux(packet)
            made[f"{container} {codec}"] = file.getvalue()
    return made


def spoilt(content: bytes, rng: np.random.Generator) -> bytes:
    """A file that is cut, changed, doubled, or says of itself what is not so."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(len(data) or 1))
        early = int(rng.integers(min(len(data), 64) or 1))
        kind = int(rng.integers(7))
        if kind == 0:
            del data[place:]
        elif kind == 1 and data:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            lie = LIES[int(rng.integers(len(LIES)))]
            data[early : early + len(lie)] = lie
        elif kind == 3:
            data[place:place] = data[: int(rng.integers(200))]
        elif kind == 4:
            data[early : early + 8] = rng.bytes(8)
        elif kind == 5:
            del data[early : early + int(rng.integers(1, 20))]
        else:
            data += data[place:]
    return bytes(data)


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files of hours of silence, and headers that promise more than there is."""
    for container, subtype, rate, hours in (("FLAC", "PCM_16", 44_100, 3), ("OGG", "VORBIS", 48_000, 1)):
        file = io.BytesIO()
        with soundfile.SoundFile(file, "w", rate, 1, subtype, format=container) as sound:
            for _ in range(hours * 3600):  # libsndfile crashes where it writes a minute of Vorbis at once
                sound.write(np.zeros(rate, dtype=np.float32))
        yield f"{hours} h of silence in {container}", file.getvalue()
    for name, content in whole_files().items():
        for size, place in itertools.product((4, 8), range(4, min(len(content) - 8, 64), 2)):
            yield f"{name} {place}", content[:place] + b"\x7f" + b"\xff" * (size - 1) + content[place + size :]


def run_media(content: bytes) -> None:
    """All that is done with a file: each part of it may refuse, and none may do anything else."""
    held: list[Callable[[], Any]] = [
        lambda: check_finite(load_audio(content), "a sample"),
        lambda: audio_length(content),
        lambda: why_silent(content),
        lambda: check_finite(list(itertools.islice(stream_audio(content), 50)), "a sample"),
    ]
    refused = None
    for step in held:
        try:
            step()
        except DOCUMENTED as error:
            refused = error
    if refused is not None:
        raise refused


def _media_process(cases: int, number: int, are_bombs: bool, answers: Any) -> None:
    """In a process of its own: any crash, or any memory beyond the limit, ends this one alone."""
    import resource

    logging.set_verbosity_error()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # MP3 and FFmpeg write what they think of the files
    originals, rng = whole_files(), np.random.default_rng(number)
    items: Any = (
        (content for _, content in bombs())
        if are_bombs
        else (spoilt(content, rng) for content in itertools.islice(itertools.cycle(originals.values()), cases))
    )
    status = (
        Path("/proc/self/status").read_text(encoding="utf-8") if Path("/proc/self/status").exists() else "VmSize: 0 kB"
    )
    size = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmSize"))
    first = next(items)  # what makes the bombs is made without the limit
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    before, outcome = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Outcome()
    for content in itertools.chain([first], items):
        outcome.take(run_media, content)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answers.put((outcome, (peak - before) / 1e3))


def feed_media(
    cases: int, number: int = 0, are_bombs: bool = False, seconds: float = 900, start_method: str = "spawn"
) -> tuple[Outcome, float]:
    """
    Feed files that are spoilt, or made to fill the memory, to a process whose memory is limited.

    Returns: what came of it, and the MB that its memory grew by. A process that crashed or hung is one fault.
    """
    context: Any = multiprocessing.get_context(start_method)
    answers = context.Queue()
    process = context.Process(target=_media_process, args=(cases, number, are_bombs, answers))
    process.start()
    end = time.monotonic() + seconds
    try:
        while process.is_alive() and time.monotonic() < end:
            with contextlib.suppress(queue.Empty):
                return answers.get(timeout=0.5)
        with contextlib.suppress(queue.Empty):
            return answers.get(timeout=0.5)
        ended = "hung" if process.is_alive() else f"ended with {process.exitcode}"
        return Outcome(cases, 0, [f"the process {ended}"]), 0.0
    finally:
        process.kill()
        process.join()


def measure(cases: int, number: int, names: Sequence[str]) -> tuple[list[Row], list[str]]:
    """A row for each of these targets, and the faults."""
    rows: list[Row] = []
    faults: list[str] = []
    for name in names:
        start, before = time.perf_counter(), resident()
        if name in TARGETS:
            outcome = feed(TARGETS[name], round(cases * TARGETS[name].share), number)
            megabytes = resident() - before
        else:
            outcome, megabytes = feed_media(2 * cases, number, are_bombs=name == MEDIA[1])
        rows.append(
            {"fed": name, "cases": outcome.cases, "refused": outcome.refused, "faults": len(outcome.faults)}
            | {"seconds": round(time.perf_counter() - start, 1), "MB": round(megabytes)}
        )
        faults.extend(f"{name}: {fault}" for fault in outcome.faults[:SHOWN])
        print(rows[-1], *outcome.faults[:SHOWN], sep="\n  ", file=sys.stderr, flush=True)
    return rows, faults


def with_total(rows: Sequence[Row]) -> list[Row]:
    """The rows, in the order of the targets, and what they come to."""
    order = [*TARGETS, *MEDIA]
    rows = sorted((row for row in rows if row["fed"] in order), key=lambda row: order.index(row["fed"]))
    total = {key: sum(row[key] for row in rows) for key in ("cases", "refused", "faults", "seconds")}
    most = max(row["MB"] for row in rows)
    return [*rows, {"fed": "all", **total, "seconds": round(total["seconds"], 1), "MB": most}]


def resident() -> float:
    """MB of memory that this process takes now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2500, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=[*TARGETS, *MEDIA],
        help="feed these alone, and keep the other rows of --output",
    )
    options = parse_arguments(parser, "fuzz", arguments)
    if options.from_results:
        report, _ = read_results(options.output)
    else:
        logging.set_verbosity_error()
        os.chdir(tempfile.mkdtemp(prefix="fuzz_"))  # a word that names a file here would be found
        kept, faults = [], []
        if options.targets and options.output.is_file():
            earlier, _ = read_results(options.output)
            kept = [row for row in earlier["rows"] if row["fed"] not in options.targets]
            faults = [fault for fault in earlier["faults"] if fault.split(": ")[0] not in options.targets]
        rows, new = measure(options.cases, options.seed, options.targets or [*TARGETS, *MEDIA])
        report = {"environment": environment(), "dtype": "float32", "seed": options.seed}
        report |= {"rows": with_total([*kept, *rows]), "faults": [*faults, *new]}
    publish({"fuzz": table(report["rows"], str)}, report, [], options)
    return dict(report)


if __name__ == "__main__":
    main()
