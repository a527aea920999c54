# SPDX-License-Identifier: Apache-2.0
"""What the tests of training share: a learnable corpus of sines and a model that trains on it in seconds.

`write_corpus` makes the files, `tiny_processor` and `tiny_model` the model, `tiny_flags` the same model as flags.
`read_rows` and `parse_strict_json` read what was written.
"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import soundfile
from transformers import (
    BertConfig,
    BertTokenizer,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from modeling_mmser import MMSERForAudioClassification
from processing_mmser import MMSERProcessor

RATE = 16_000
NAMES = ["neutral", "happy", "sad", "angry"]
WORDS = {"neutral": "the table is here", "happy": "what a joy", "sad": "i miss it", "angry": "stop it now"}
SPLITS = {"train": (0, 1, 2, 3), "validation": (4,), "test": (5, 6)}  # speakers
CLIPS_PER_SPEAKER = 2  # of each class

AUDIO = {
    # Two convolutions that see as many samples as the usual seven, and move as far: an export costs half as much
    "conv_dim": [8, 8],
    "conv_kernel": [96, 20],
    "conv_stride": [16, 20],
    "num_feat_extract_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "num_mel_bins": 16,
    "max_source_positions": 64,
}
JOINT = {
    "cross_attention_hidden_size": 16,
    "cross_attention_heads": 2,
    "pooling_hidden_size": 8,
    "fusion_hidden_size": 16,
    "classifier_num_layers": 2,
    "classifier_hidden_size": 16,
    "classifier_bottleneck": 4,
    "feature_size": 16,
    "anchor_size": 8,
    "uncertainty_hidden_size": 8,
    "prototypes_per_class": 2,
}
NO_DROPOUT = {"cross_attention_dropout": 0.0, "fusion_dropout": 0.0, "classifier_dropout": 0.0}
AUDIO_WITHOUT_DROPOUT = dict.fromkeys(
    ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "mask_time_prob"), 0.0
)
TEXT_WITHOUT_DROPOUT = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)


def clip(label, number, rng):
    """0.2 to 0.4 s of a tone, whose pitch tells the class, in a little noise."""
    time = np.arange(rng.integers(3200, 6400)) / RATE
    tone = np.sin(2 * np.pi * (200 * 2**label + 5 * number) * time)
    return (0.4 * tone + 0.02 * rng.standard_normal(len(time))).astype(np.float32)


def write_table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_corpus(folder, **more_speakers):
    """
    Fill `folder` with train, validation and test, and with `ood`: noise, which is none of the classes.

    Speakers can be added to a split: eight clips each.
    """
    rng = np.random.default_rng(0)
    for split, speakers in SPLITS.items():
        rows = []
        for speaker in (*speakers, *more_speakers.get(split, ())):
            for number in range(CLIPS_PER_SPEAKER * len(NAMES)):
                label = number % len(NAMES)
                name = f"{speaker}_{number}.wav"
                (folder / split).mkdir(parents=True, exist_ok=True)
                soundfile.write(folder / split / name, clip(label, speaker, rng), RATE)
                rows.append(
                    {
                        "file_name": name,
                        "label": NAMES[label],
                        "transcription": WORDS[NAMES[label]],
                        "speaker": f"speaker{speaker}",
                        "language": ("en", "zxx")[speaker % 2],
                        "corpus": ("sine", "tone")[number // len(NAMES) % 2],
                    }
                )
        write_table(folder / split / "metadata.csv", rows)
    rows = []
    (folder / "ood").mkdir()
    for number in range(6):
        soundfile.write(folder / "ood" / f"{number}.wav", rng.uniform(-0.5, 0.5, 4000), RATE)
        rows.append({"file_name": f"{number}.wav", "label": "unknown", "transcription": ""})
    write_table(folder / "ood" / "metadata.csv", rows)
    return folder


def tiny_tokenizer():
    words = sorted({word for text in WORDS.values() for word in text.split()})
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    return BertTokenizer(vocab={name: index for index, name in enumerate(names)})


def tiny_processor(whisper=False):
    if whisper:
        feature_extractor = WhisperFeatureExtractor(feature_size=16, return_attention_mask=True)
    else:
        feature_extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    return MMSERProcessor(feature_extractor, tiny_tokenizer())


def tiny_model(dropout=True, whisper=False, **overrides):
    """A model of a few thousand parameters, at random. `dropout=False` switches everything random off."""
    audio = Wav2Vec2Config(**AUDIO, **({} if dropout else AUDIO_WITHOUT_DROPOUT))
    audio = WhisperConfig(**WHISPER) if whisper else audio
    text = BertConfig(vocab_size=len(tiny_tokenizer()), **TEXT, **({} if dropout else TEXT_WITHOUT_DROPOUT))
    overrides = {**JOINT, **({} if dropout else NO_DROPOUT), **overrides}
    return MMSERForAudioClassification.from_backbones(audio, text, **overrides)


def tiny_flags(corpus, output_dir, tokenizer, **more):
    """Arguments of `train_hf.main`: the tiny model, two steps. `more` adds flags; None leaves one out."""
    flags = {
        "data_dir": corpus,
        "output_dir": output_dir,
        "tokenizer_name": tokenizer,
        "random_audio_encoder": True,
        "audio_config_overrides": AUDIO,
        "random_text_encoder": True,
        "text_config_overrides": TEXT,
        "config_overrides": JOINT,
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 32,
        "disable_tqdm": True,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        **more,
    }
    arguments = []
    for name, value in flags.items():
        if value is not None:
            value = json.dumps(value) if isinstance(value, dict) else str(value)
            arguments += [f"--{name}", value]
    return arguments


def read_rows(corpus, *splits):
    """Rows of the corpus with the path of each clip and its split."""
    rows = []
    for split in splits:
        with open(corpus / split / "metadata.csv", newline="", encoding="utf-8") as file:
            rows += [
                {**row, "file_name": str(corpus / split / row["file_name"]), "split": split}
                for row in csv.DictReader(file)
            ]
    return rows


def bring(rows, folder):
    """Copy the clips of rows into a folder, beside the table that will name them; returns the rows for that table."""
    folder.mkdir(parents=True, exist_ok=True)
    return [{**row, "file_name": Path(shutil.copy(row["file_name"], folder)).name} for row in rows]


def parse_strict_json(text):
    """JSON without NaN and infinity, which `json.loads` would let through."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)
