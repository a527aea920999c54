# SPDX-License-Identifier: Apache-2.0
"""What `fuzz.py` draws: input that is in order but for a thing or two, so that most of it comes far, and some that is
of no use at all.

Read in this order: odd values, audio, then what each target is fed. What is in order is made by `random.Random` of a
seed that Hypothesis draws, as that is fast; what is odd in it is drawn by Hypothesis.
"""

import io
import json
import random
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from functools import cache
from typing import Any

import numpy as np
import soundfile
from hypothesis import strategies as st

from configuration_mmser import POOLINGS, MMSERConfig
from mmser.arguments import EVALUATION_ARGUMENTS, EXPORT_ARGUMENTS, TRAINING_ARGUMENTS
from mmser.flags import POSITIONAL
from mmser.prediction_arguments import PredictionArguments

RATE = 16_000
NAMES = ("neutral", "happy", "sad", "angry")

# --- odd values ------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(-3, 3), st.integers(), st.floats(), st.sampled_from([1e-300, 1e300, 2**31, -(2**63)]))
TEXTS = st.one_of(
    st.text(max_size=20), st.sampled_from(["", " ", "\0", "happy", "1", "nan", "\ud800", "a\tb", "é" * 99])
)
JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "bool", "U3")
SHAPES = st.one_of(
    st.integers(0, 3000).map(lambda size: (size,)),
    st.tuples(st.integers(0, 3), st.integers(0, 2000)),
    st.tuples(st.integers(0, 2000), st.integers(0, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)),
    st.just(()),
)
SPECIAL = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 1e13, 3.4e38, -1.0, 32767.0])
SEEDS = st.integers(0, 2**32 - 1)
PIECES = st.sampled_from(
    [b'"', b",", b";", b"\t", b"\n", b"\r", b"{", b"-", b"0", b"-->", b"9" * 30, b" ", b"nan", b":", b"\\"]
)
WRONG_BYTES = st.one_of(st.binary(max_size=4), st.sampled_from([b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe"]))


def one_in(draw: Any, number: int) -> bool:
    """Whether something happens that happens once in `number` times. The ends of a range are drawn more often."""
    return draw(st.integers(0, number - 1)) == number // 2


@st.composite
def changed(draw: Any, content: bytes, most: int = 2) -> bytes:
    """Bytes that are cut, doubled, or have others in them, in up to `most` places."""
    for _ in range(draw(st.integers(1, most))):
        place, size = draw(st.integers(0, len(content))), draw(st.integers(0, 12))
        kind = draw(st.integers(0, 4))
        if kind == 0:
            content = content[:place] + content[place + size :]
        elif kind == 1:
            content = content[:place] + content[max(0, place - size) :]
        else:
            piece = draw(WRONG_BYTES if one_in(draw, 6) else PIECES)
            content = content[:place] + piece + content[place + (size if kind == 2 else 0) :]
    return content


# --- audio -----------------------------------------------------------------------------------------------------------


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
        return array.astype(draw(st.sampled_from([*DTYPES, "complex64"])))


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
WORDINGS = st.one_of(st.none(), TEXTS, st.just("what a joy " * 30))


def in_form(samples: np.ndarray, rate: Any, form: str) -> Any:
    """A clip in one of the forms that a user may give it in."""
    if form == "pair":
        return rate, samples
    if form == "stereo":
        return {"raw": np.stack([samples, -0.5 * samples]), "sampling_rate": rate}
    if form == "list":
        return {"raw": samples.tolist(), "sampling_rate": rate}
    if form in DTYPES:
        return {"array": samples.astype(form), "sampling_rate": rate}
    return {form: samples, "sampling_rate": rate}


@st.composite
def files_of_sound(draw: Any, samples: np.ndarray, rate: int) -> bytes:
    """The content of a file, which is spoilt at times."""
    file = io.BytesIO()
    container, subtype = draw(
        st.sampled_from([("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("WAV", "FLOAT"), ("OGG", "VORBIS")])
    )
    soundfile.write(file, samples.clip(-1, 1), rate, format=container, subtype=subtype)
    content = file.getvalue()
    return draw(changed(content, 1)) if one_in(draw, 5) else content


@st.composite
def clips(draw: Any) -> Any:
    """A clip that is in order, as a rule; at times one value, the dtype or the rate is not."""
    samples, rate = draw(speech()), draw(st.sampled_from([8000, RATE, 44_100]))
    kind = draw(st.integers(0, 19))
    if kind == 17:
        samples[draw(st.integers(0, len(samples) - 1))] = draw(SPECIAL)
    elif kind == 18:
        return in_form(samples, draw(RATES), "raw")
    elif kind in (1, 2):
        with np.errstate(all="ignore"):
            return in_form(samples, rate, draw(st.sampled_from(DTYPES)))
    elif kind in (3, 4, 5, 6):
        return draw(files_of_sound(samples, rate))
    return in_form(samples, rate, draw(st.sampled_from(["raw", "array", "pair", "stereo", "list"])))


@st.composite
def processor_inputs(draw: Any) -> tuple[Any, Any, Any, bool]:
    """(audio, text, rate, whether both come as lists)"""
    if one_in(draw, 6):
        return draw(st.tuples(AUDIO, TEXT_INPUTS, RATES, st.booleans()))
    audio = draw(clips()) if not one_in(draw, 8) else None
    text = draw(TEXT_INPUTS) if one_in(draw, 8) else draw(WORDINGS)
    return audio, text, draw(RATES) if one_in(draw, 8) else RATE, draw(st.booleans())


# --- the pipeline and the collator -----------------------------------------------------------------------------------

PIPELINE_OPTIONS = {
    "top_k": st.one_of(st.integers(-2, 6), JSON_VALUES),
    "allowed_labels": st.one_of(st.lists(st.sampled_from(["happy", "sad", "x"]), max_size=3), JSON_VALUES),
    "return_set": st.one_of(NUMBERS, TEXTS),
    "chunk_length_s": st.one_of(st.sampled_from([0, 0.05, 0.1, 1]), NUMBERS, TEXTS),
    "stride_length_s": st.one_of(st.sampled_from([0, 0.01, 0.5]), NUMBERS, TEXTS),
    "function_to_apply": TEXTS,
    "batch_size": st.integers(1, 3),
    "sampling_rate": RATES,
}
GOOD_OPTIONS = st.fixed_dictionaries(
    {"return_uncertainty": st.booleans()},
    optional={
        "top_k": st.integers(1, 6),
        "return_set": st.sampled_from([True, 0.5, 0.99]),
        "return_auxiliary": st.booleans(),
        "function_to_apply": st.sampled_from(["softmax", "sigmoid", "none"]),
        "batch_size": st.integers(1, 3),
    },
)
CHUNKS = st.fixed_dictionaries(
    {"chunk_length_s": st.sampled_from([0.05, 0.1, 1])},
    optional={"stride_length_s": st.sampled_from([0, 0.01, [0.01, 0.0]]), "batch_size": st.integers(1, 3)},
)
LABELS_ALLOWED = st.fixed_dictionaries(
    {"allowed_labels": st.lists(st.sampled_from(NAMES), min_size=1, max_size=4)}, optional={"top_k": st.integers(1, 3)}
)


@st.composite
def named_clips(draw: Any) -> dict[str, Any]:
    """A clip as a dict, with or without what is said in it."""
    clip = draw(clips())
    named = clip if isinstance(clip, dict) else {"audio": clip}
    if draw(st.booleans()):
        named = {**named, "text": draw(WORDINGS)}
    return {**named, draw(TEXTS): draw(JSON_VALUES)} if one_in(draw, 15) else named


@st.composite
def transcripts(draw: Any) -> list[Any]:
    """Words with times, some of which are none."""
    starts = sorted(draw(st.lists(st.floats(0, 0.3), max_size=4)))
    words: list[Any] = [{"text": "joy", "timestamp": (start, start + 0.02)} for start in starts]
    if words and one_in(draw, 4):
        words[0] = draw(st.one_of(JSON_VALUES, st.builds(lambda times: {**words[0], "timestamp": times}, JSON_VALUES)))
    return words


@st.composite
def pipeline_calls(draw: Any) -> tuple[Any, dict[str, Any]]:
    """(what is classified, options)"""
    kind = draw(st.integers(0, 12))
    options = draw(CHUNKS if kind in (1, 7) else LABELS_ALLOWED if kind == 2 else GOOD_OPTIONS)
    if kind == 7:
        item: Any = {**draw(named_clips()), "chunks": draw(transcripts())}
        item.pop("text", None)
    elif kind == 3:
        item = {"text": draw(WORDINGS)}
    elif kind in (4, 5):
        item = draw(st.lists(named_clips(), min_size=1, max_size=3))
    elif kind == 6:
        item = draw(st.one_of(AUDIO, st.lists(AUDIO, max_size=2), JSON_VALUES))
    else:
        item = draw(st.one_of(clips(), named_clips()))
    if draw(st.integers(0, 6)) == 3:
        name = draw(st.sampled_from(sorted(PIPELINE_OPTIONS)))
        options = {**options, name: draw(PIPELINE_OPTIONS[name])}
    return item, options


@st.composite
def examples(draw: Any) -> list[Any]:
    """Examples as `EmotionDataset` makes them, of any length and loudness, with modalities that are missing."""
    keys = draw(st.sampled_from([("audio", "text"), ("audio", "text"), ("audio",), ("text",)]))
    more = draw(st.sampled_from([(), (), ("class_shares",), ("teacher_logits",), ("corpus_ids", "speaker_ids")]))
    rows: list[Any] = []
    for number in range(draw(st.integers(0, 4))):
        row: dict[str, Any] = {"audio": draw(speech()), "text": draw(WORDINGS)}
        if len(keys) > 1 and one_in(draw, 4):
            row["audio"] = None
        row["text"] = row["text"] or "what" if not one_in(draw, 6) else row["text"]
        row |= {"class_shares": np.full(4, 0.25, np.float32), "teacher_logits": np.arange(4.0), "corpus_ids": number}
        row |= {"speaker_ids": number, "labels": draw(st.integers(0, 3))}
        rows.append({name: row[name] for name in (*keys, *more, "labels")})
    return [*rows, *[None] * draw(st.integers(0, 1))]


# --- the configuration -----------------------------------------------------------------------------------------------

FIELDS = {one.name: one for one in fields(MMSERConfig) if not one.name.startswith("_")}
FIELD_VALUES = st.one_of(
    JSON_VALUES, st.integers(0, 64), st.floats(0, 2), st.sampled_from(["none", "gated", "centroid"])
)
SIZES: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
AUDIO_ENCODER: Any = {
    **{"model_type": "wav2vec2", "conv_dim": [8, 8], "conv_kernel": [96, 20], "conv_stride": [16, 20]},
    **{"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, **SIZES},
}
TEXT_ENCODER: Any = {"model_type": "bert", "vocab_size": 8, "max_position_embeddings": 16, **SIZES}
SMALL: Any = {
    **{"classifier_num_layers": 1, "classifier_hidden_size": 16, "fusion_hidden_size": 16, "feature_size": 16},
    **{"cross_attention_hidden_size": 16, "cross_attention_heads": 2, "pooling_hidden_size": 8, "anchor_size": 8},
}
CHOICES = {
    "pooling_type": POOLINGS,
    "fusion_type": ("gated", "transformer"),
    "fusion_norm": ("standardization", "layer_norm"),
    "openmax_distance": ("centroid", "anchor"),
    "openmax_level": ("probability", "activation"),
    "openmax_threshold": ("fitted", None, 0.5),
    "openmax_acceptance": (None, 0.5, 0.95),
    "openmax_tail_size": (5, 20),
    "openmax_alpha": (1, 3, 9),
    "class_counts": (None, [3, 4, 5, 6]),
    "modalities": (["audio", "text"], ["audio"], ["text"]),
    "untrained_modalities": ([], ["audio"], ["text"]),
    "audio_attention_heads": (None, 1, 2),
    "text_attention_heads": (None, 1, 2),
    "auxiliary_tasks": ({}, {"arousal": "regression"}, {"sex": ["f", "m"]}),
    "problem_type": (None, "single_label_classification"),
}


def good_value(name: str, rng: random.Random) -> Any:
    """A value that the field of a configuration may have, or its default."""
    default = FIELDS[name].default
    if name in CHOICES:
        return rng.choice(CHOICES[name])
    if isinstance(default, bool):
        return rng.random() < 0.5
    if isinstance(default, int) and default >= 1 and name != "format_version":
        return rng.choice([1, 2, 4, 8, 16])
    if isinstance(default, float):
        return rng.choice([0.0, 0.1, 0.5, 0.9]) if default < 1 else rng.choice([0.5, 1.0, 2.0])
    return SMALL.get(name, default if default is not MISSING else None)


def like(default: Any) -> st.SearchStrategy:
    """Values of the same type as a default, which need not make sense."""
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.one_of(st.integers(-1, 64), st.integers())
    if isinstance(default, float):
        return st.one_of(st.floats(-0.5, 2), NUMBERS)
    return TEXTS if isinstance(default, str) else FIELD_VALUES


@st.composite
def configurations(draw: Any) -> dict[str, Any]:
    """Fields of a small model, of which most are in order, and some are new."""
    rng = random.Random(draw(SEEDS))
    values = {**SMALL, "audio_config": {**AUDIO_ENCODER}, "text_config": {**TEXT_ENCODER}}
    own = [name for name in FIELDS if name in MMSERConfig.__annotations__ and not name.endswith("_config")]
    for name in rng.sample(own, rng.randint(0, 4)):
        values[name] = good_value(name, rng)
    for modality in ("audio", "text"):
        if modality not in values.get("modalities", (modality,)):
            values[f"{modality}_config"] = None
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        if one_in(draw, 4):
            name = draw(st.sampled_from(["audio_config", "text_config"]))
            encoder = values.get(name)
            if isinstance(encoder, dict):
                values[name] = {**encoder, draw(st.sampled_from(sorted(encoder))): draw(FIELD_VALUES)}
        else:
            name = draw(st.sampled_from(sorted(FIELDS)))
            values[name] = draw(FIELD_VALUES if one_in(draw, 4) else like(FIELDS[name].default))
    return values


# --- tables ----------------------------------------------------------------------------------------------------------

Cells = dict[str, Callable[[random.Random, int], str]]
TABLE_CELLS = st.one_of(
    TEXTS,
    st.sampled_from(["happy", "sad", "0", "1", "-1", "other", "*", "a.wav", '"', "../x", "joy", "nan", "unknown"]),
)
MAP_CELLS: Cells = {
    "corpus": lambda rng, row: rng.choice(["a", "b", "*"]),
    "label": lambda rng, row: (
        f"{rng.choice(['happy', 'Joy', 'sad', 'anger', '3'])}{row if rng.random() < 0.7 else ''}"
    ),
    "target": lambda rng, row: rng.choice(["happy", "sad", "other", ""]),
}
DATA_CELLS: Cells = {
    "file_name": lambda rng, row: f"{row % 12}.wav",
    "label": lambda rng, row: ("happy", "sad")[row % 2] if row < 4 else rng.choice(["happy", "sad", "Happy "]),
    "transcription": lambda rng, row: rng.choice(["", "what a joy", "nein, danke", "1"]),
    "speaker": lambda rng, row: f"s{row // 2}",
    "split": lambda rng, row: ("train", "train", "train", "train", "test", "test")[row % 6],
    "arousal": lambda rng, row: rng.choice(["", "0.5", "1", "-3e2"]),
    "votes": lambda rng, row: rng.choice(["happy;sad", "sad", "happy|happy", '{"sad": 2}', "[]"]),
    "corpus": lambda rng, row: rng.choice(["a", "b"]),
}


def written_table(suffix: str, rows: Sequence[dict[str, Any]], header: Sequence[str], rng: random.Random) -> bytes:
    """A table with a line for each row, as some program writes it."""
    if suffix == ".jsonl":
        lines = [json.dumps(row) for row in rows]
    else:
        delimiter = rng.choice([",", ";", "\t", "|"])
        quoted = [[str(row.get(name, "")) for name in header] for row in rows]
        lines = [delimiter.join(f'"{cell.replace(chr(34), 2 * chr(34))}"' for cell in row) for row in quoted]
        lines = [delimiter.join(header), *lines]
    text = rng.choice(["\n", "\n", "\r\n", "\r" if suffix != ".jsonl" else "\n"]).join(lines)
    encoding = rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16"])
    return text.encode(encoding, "surrogatepass")


@st.composite
def tables(draw: Any, cells: Cells, needed: Sequence[str], least: int = 1, most: int = 6) -> tuple[str, bytes]:
    """(suffix, content) of a table in which a cell, a name of a column or some bytes are odd, or nothing is."""
    rng = random.Random(draw(SEEDS))
    suffix = rng.choice([".csv", ".csv", ".tsv", ".jsonl"])
    header = [*needed, *(name for name in cells if name not in needed and rng.random() < 0.5)]
    rng.shuffle(header)
    rows: list[dict[str, Any]] = [
        {name: cells[name](rng, row) for name in header} for row in range(rng.randint(least, most))
    ]
    kind = draw(st.integers(0, 19))
    if kind == 19:
        return suffix, draw(st.binary(max_size=200))
    if kind in (1, 2, 3, 4, 5, 6):
        for _ in range(draw(st.integers(1, 2))):
            value = draw(JSON_VALUES if suffix == ".jsonl" else TABLE_CELLS)
            rows[draw(st.integers(0, len(rows) - 1))][draw(st.sampled_from(header))] = value
    elif kind == 7:
        old, new = draw(st.sampled_from(header)), draw(st.one_of(TEXTS, st.sampled_from([*cells, "file", "emotion"])))
        header = [new if name == old else name for name in header]
        rows = [{new if name == old else name: value for name, value in row.items()} for row in rows]
    content = written_table(suffix, rows, header, rng)
    return suffix, draw(changed(content)) if kind in (8, 9, 10, 11) else content


@st.composite
def data_options(draw: Any) -> dict[str, Any]:
    """How a table of data is read."""
    options: dict[str, Any] = {"on_bad_example": draw(st.sampled_from(["skip", "skip", "error"]))}
    kind = draw(st.integers(0, 9))
    if kind == 0:
        options["auxiliary_tasks"] = {"arousal": "regression"}
    elif kind == 1:
        options["label_names"] = draw(st.sampled_from([["happy", "sad"], ["sad", "happy", "other"], ["0", "1"]]))
    elif kind == 2:
        options |= {"validation_fraction": draw(st.sampled_from([0.0, 0.3])), "test_fraction": 0.3}
    elif kind == 3:
        options["extra_columns"] = ["corpus"]
    return options


# --- labels, subtitles, turns ----------------------------------------------------------------------------------------

FAMILIES = (
    ("happy", "sad", "Happy ", "neutral"),
    ("0", "1", "2", "3"),
    (0, 1, 2.0, "3"),
    ("joy", "fear", "disgust", "calm"),
    ("1", "10", "007", "2.0"),
    ("Ärger", "Freude", "A\u0308rger", "unknown"),
)
ANY_LABELS = st.lists(st.one_of(TEXTS, NUMBERS, st.sampled_from(["happy", "sad", "other"]), st.none()), max_size=6)


@st.composite
def labels(draw: Any) -> tuple[list[Any], list[Any] | None]:
    """(labels of rows, names of the classes or None)"""
    rng = random.Random(draw(SEEDS))
    family = rng.choice(FAMILIES)
    chosen: list[Any] = [*family[:2], *(rng.choice(family) for _ in range(rng.randint(0, 4)))]
    names = None if rng.random() < 0.6 else [str(name) for name in family[: rng.randint(2, 4)]]
    kind = draw(st.integers(0, 7))
    if kind in (0, 1, 2):
        chosen[draw(st.integers(0, len(chosen) - 1))] = draw(st.one_of(TEXTS, NUMBERS, JSON_VALUES))
    elif kind == 3:
        chosen = draw(ANY_LABELS)
    elif kind == 4 and names:
        names[draw(st.integers(0, len(names) - 1))] = draw(TEXTS)
    return chosen, names


@st.composite
def timed_files(draw: Any) -> tuple[str, bytes]:
    """(kind, content) of subtitles, or of turns of speakers."""
    rng = random.Random(draw(SEEDS))
    kind = rng.choice(["srt", "rttm"])
    starts = sorted(round(rng.uniform(0, 9), 3) for _ in range(rng.randint(1, 5)))
    if kind == "srt":
        times = [
            f"00:00:{start:06.3f} --> 00:00:{start + 0.5:06.3f}".replace(".", rng.choice(",.")) for start in starts
        ]
        words = ["what a joy", "<i>nein</i>", "1", "{\\an8}so", "two\nlines"]
        blocks = [f"{number}\n{time}\n{rng.choice(words)}" for number, time in enumerate(times, 1)]
    else:
        blocks = [
            f"SPEAKER a 1 {start} {rng.choice([0.5, 1.25, 0])} <NA> <NA> {rng.choice('bc')} <NA> <NA>"
            for start in starts
        ]
        blocks.insert(0, rng.choice([";; a comment", "SPKR-INFO a 1 <NA> <NA> <NA> unknown b <NA>", "", blocks[0]]))
    odd = draw(st.integers(0, 11))
    if odd in (1, 2):
        blocks.insert(
            draw(st.integers(0, len(blocks))), draw(st.one_of(TEXTS, st.sampled_from(["--> x", "SPEAKER a"])))
        )
    text = ("\n\n" if kind == "srt" else "\n").join(blocks)
    content = text.encode(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16"]), "surrogatepass")
    if odd == 11:
        return kind, draw(st.binary(max_size=100))
    return kind, draw(changed(content)) if odd in (3, 4, 5, 6) else content


# --- commands and recipes --------------------------------------------------------------------------------------------

COMMANDS: dict[str, Any] = {
    "train": TRAINING_ARGUMENTS[:2],
    "eval": EVALUATION_ARGUMENTS,
    "export": EXPORT_ARGUMENTS,
    "predict": (PredictionArguments,),
}
NEEDED: dict[str, dict[str, Any]] = {
    "train": {"data_dir": ["my_data"]},
    "eval": {"checkpoint": "me/model"},
    "export": {"checkpoint": "me/model", "output_dir": "out"},
    "predict": {"text": "what a joy"},
}
GOOD_WORDS = {
    "augmentations": ["speed", "noise", "codec"],
    "format": ["onnx", "safetensors"],
    "on_bad_example": ["error", "skip"],
    "lora_save": ["merged", "adapter"],
    "output": ["x.csv", "x.json", "x.jsonl"],
    "plot": ["x.png"],
    "allowed_labels": ["happy", "sad"],
}
OBJECTS = (
    "config_overrides",
    "audio_config_overrides",
    "text_config_overrides",
    "auxiliary_tasks",
    "auxiliary_label_maps",
)


@cache
def flags_of(command: str) -> dict[str, tuple[Field, Any]]:
    """By name: the field of each flag, and its type."""
    return {
        one.name: (one, typing.get_type_hints(kind)[one.name])
        for kind in COMMANDS[command]
        for one in fields(kind)
        if POSITIONAL not in one.metadata
    }


def good_flag(command: str, name: str, rng: random.Random) -> Any:
    """A value that a flag takes: a plain one, a list, or a dictionary."""
    one, hint = flags_of(command)[name]
    kinds = typing.get_args(hint) or (hint,)
    if name in OBJECTS:
        return rng.choice([{}, {"fusion_dropout": 0.2}, {"arousal": "regression"}])
    is_list = "list" in str(hint)
    if one.metadata.get("choices") or name in GOOD_WORDS:
        word = rng.choice(list(one.metadata.get("choices") or GOOD_WORDS[name]))
        return [word] if is_list else word
    if bool in kinds:
        return rng.random() < 0.7
    if is_list:
        return [rng.choice([1, 5])] if "int" in str(hint) else [rng.choice(["a", "b/c", "label"])]
    if int in kinds and float not in kinds:
        return rng.choice([1, 2, 8, 100])
    return rng.choice([0.1, 0.5, 2.0]) if float in kinds else rng.choice(["a", "me/model", "x.csv", "none"])


def as_words(name: str, value: Any) -> list[str]:
    """A flag on the command line."""
    if isinstance(value, bool):
        return [f"--{name}", str(value).lower()]
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *(json.dumps(one) if isinstance(one, dict) else str(one) for one in values)]


def good_flags(command: str, rng: random.Random) -> dict[str, Any]:
    """Some flags of a command, with values that they take."""
    chosen = rng.sample(sorted(flags_of(command)), rng.randint(0, 4))
    return {**NEEDED[command], **{name: good_flag(command, name, rng) for name in chosen}}


@st.composite
def command_lines(draw: Any) -> tuple[str, list[str]]:
    """(command, words)"""
    rng = random.Random(draw(SEEDS))
    command = rng.choice(sorted(COMMANDS))
    given = good_flags(command, rng)
    kind = draw(st.integers(0, 9))
    if kind in (0, 1, 2):  # another value of the right kind, as far as words have kinds
        name = draw(st.sampled_from(sorted(flags_of(command))))
        hint = str(flags_of(command)[name][1])
        odd = NUMBERS if "float" in hint else st.integers(-5, 5) if "int" in hint else TEXTS
        given[name] = draw(st.one_of(odd, st.sampled_from(["{}", "[1]", "true", "a=b"]) if "str" in hint else odd))
    words = [word for name, value in given.items() for word in as_words(name, value)]
    if kind == 3:
        words.insert(draw(st.integers(0, len(words))), draw(TEXTS))
    elif kind == 4 and words:
        del words[draw(st.integers(0, len(words) - 1))]
    elif kind == 5:
        words += as_words(draw(st.sampled_from(sorted(given))), draw(TEXTS))
    return command, words


@st.composite
def recipes(draw: Any) -> tuple[str, bytes]:
    """(command, content of its recipe)"""
    rng = random.Random(draw(SEEDS))
    command = rng.choice(sorted(COMMANDS))
    given = good_flags(command, rng)
    kind = draw(st.integers(0, 15))
    if kind == 15:
        return command, draw(
            st.one_of(
                st.binary(max_size=80), st.just(b"[" * 100_000), JSON_VALUES.map(lambda one: json.dumps(one).encode())
            )
        )
    if kind in (1, 2, 3):
        given[draw(st.sampled_from(sorted(flags_of(command))))] = draw(JSON_VALUES)
    elif kind == 8:
        given[draw(TEXTS)] = draw(JSON_VALUES)
    content = json.dumps(given).encode()
    return command, draw(changed(content, 1)) if kind == 9 else content
