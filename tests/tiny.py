# SPDX-License-Identifier: Apache-2.0
"""Tiny MMSER configurations, models and batches that several tests share: `tiny_config`, `tiny_model`, `tiny_batch`;
`slow_openmax`, what OpenMax has to give; `random_predictions`.

The weights are drawn wide enough that every layer matters: with the library's narrow initialisation most mistakes
would stay below any tolerance.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configuration_mmser import MMSERConfig
from modeling_mmser import MMSERForAudioClassification

WAVEFORM = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
AUDIO_CONFIGS = {
    "wav2vec2": WAVEFORM | {"model_type": "wav2vec2"},
    "wav2vec2-layer": WAVEFORM
    | {"model_type": "wav2vec2", "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
    "hubert": WAVEFORM | {"model_type": "hubert"},
    "wavlm": WAVEFORM | {"model_type": "wavlm"},
    "data2vec-audio": WAVEFORM
    | {"model_type": "data2vec-audio", "num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 7},
    "whisper": {
        "model_type": "whisper",
        "d_model": 16,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
        "num_mel_bins": 20,
        "max_source_positions": 60,
        "vocab_size": 100,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
}
WAVEFORM_KINDS = [kind for kind in AUDIO_CONFIGS if kind != "whisper"]
TEXT_CONFIG = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 100,
    "max_position_embeddings": 40,
}
_SMALL_PARTS = {
    "cross_attention_hidden_size": 16,
    "cross_attention_heads": 2,
    "pooling_hidden_size": 8,
    "fusion_hidden_size": 32,
    "classifier_num_layers": 3,
    "classifier_hidden_size": 32,
    "classifier_bottleneck": 8,
    "feature_size": 16,
    "anchor_size": 8,
    "uncertainty_hidden_size": 8,
    "prototypes_per_class": 2,
}
NO_DROPOUT = {"cross_attention_dropout": 0.0, "fusion_dropout": 0.0, "classifier_dropout": 0.0}
NO_ENCODER_DROPOUT = {
    "wav2vec2": {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def tiny_config(kind: str = "wav2vec2", audio: dict | None = None, text: dict | None = None, **overrides):
    """`MMSERConfig` on the audio encoder `kind`; `audio` and `text` change fields of the encoders."""
    return MMSERConfig(
        audio_config=AUDIO_CONFIGS[kind] | (audio or {}),
        text_config=TEXT_CONFIG | (text or {}),
        **(_SMALL_PARTS | overrides),
    )


def tiny_model(kind: str = "wav2vec2", seed: int = 0, **overrides) -> MMSERForAudioClassification:
    """A model in eval mode whose every weight is drawn at random, as wide as those of a trained one."""
    torch.manual_seed(seed)
    return randomize(MMSERForAudioClassification(tiny_config(kind, **overrides))).eval()


@torch.no_grad()
def randomize(model: Any) -> Any:
    """Draw every trainable weight: matrices with a gain of 1.5, norms around 1, biases and embeddings around 0."""
    for name, parameter in model.named_parameters():
        if "parametrizations" in name or not parameter.requires_grad or parameter.ndim == 0:
            continue
        if parameter.ndim > 1:
            parameter.normal_(std=1.5 * (parameter.numel() / len(parameter)) ** -0.5)
        elif name.endswith("weight"):
            parameter.normal_(1.0, 0.2)
        else:
            parameter.normal_(0.0, 0.1)
    return model


def tiny_batch(model, audio_lengths, text_lengths, seed: int = 0, extra: int = 0) -> dict[str, Tensor]:
    """
    A padded batch; length 0 means that the row lacks the modality. Padding is `extra` samples or frames longer than
    needed, and is filled with 0 for the audio and with arbitrary tokens for the text.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    audio_lengths, text_lengths = torch.tensor(audio_lengths), torch.tensor(text_lengths)
    batch_size, length = len(audio_lengths), int(audio_lengths.max()) + extra
    mask = torch.arange(length) < audio_lengths[:, None]
    text_mask = torch.arange(int(text_lengths.max()) + min(extra, 3)) < text_lengths[:, None]
    if config.uses_log_mel:
        shape = (batch_size, config.audio_config.num_mel_bins, length)
        audio = {"input_features": torch.randn(shape, generator=generator) * mask[:, None]}
    else:
        audio = {"input_values": torch.randn(batch_size, length, generator=generator) * mask}
    return audio | {
        "attention_mask": mask.long(),
        "input_ids": torch.randint(5, 100, text_mask.shape, generator=generator),
        "text_attention_mask": text_mask.long(),
    }


def alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Row `row` of a padded batch by itself: no padding, no masks, and without the modality that it lacks."""
    inputs = {}
    for names, mask_name in (
        (("input_values", "input_features"), "attention_mask"),
        (("input_ids",), "text_attention_mask"),
    ):
        length = int(batch[mask_name][row].sum())
        for name in names:
            if length and name in batch:
                inputs[name] = batch[name][row : row + 1, ..., :length]
    return inputs


def random_predictions(seed, size=200, num_labels=4):
    """Overconfident logits that are right about two times out of three, and their labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(num_labels, size=size)
    logits = generator.normal(size=(size, num_labels))
    logits[np.arange(size), labels] += 1.3
    return 3 * logits, labels


def fit_openmax_by_chance(model: MMSERForAudioClassification, seed: int = 0) -> None:
    """Fit OpenMax on random centroids and on random distances in the range of those on the unit sphere."""
    rng, num_labels = np.random.default_rng(seed), model.config.num_labels
    labels = np.arange(30 * num_labels) % num_labels
    if model.openmax.has_centroids:
        model.openmax.fit_centroids(rng.normal(size=(len(labels), model.config.fusion_hidden_size)), labels)
    model.openmax.fit(rng.uniform(0.2, 1.6, (len(labels), num_labels)), labels, labels)


def slow_openmax(openmax, logits, distances) -> tuple[np.ndarray, np.ndarray]:
    """
    Probabilities [N, C + 1] and rejection scores [N] of a fitted OpenMax, one clip and one class at a time in float64.

    "activation" is Bendale & Boult 2016, algorithm 2. At the level of probabilities P_c (1 - w_c) is left to class c,
    where 1 - w_c = exp(-hazard_c) by the definition of the Weibull distribution.
    """
    parameters = [openmax.get_buffer(f"weibull_{name}").tolist() for name in ("shape", "scale", "shift")]
    rows, scores = [], []
    for row, distance in zip(logits.tolist(), distances.tolist(), strict=True):
        moved = [d - shift + 1 for d, shift in zip(distance, parameters[2], strict=True)]
        hazards = [
            (x / scale) ** shape if x > 0 else 0.0
            for x, shape, scale in zip(moved, parameters[0], parameters[1], strict=True)
        ]
        if openmax.level == "probability":
            known = [x - log_sum_exp(row) for x in row]
            left = [x - hazard for x, hazard in zip(known, hazards, strict=True)]
            unknown = sum(math.exp(x) * -math.expm1(-hazard) for x, hazard in zip(known, hazards, strict=True))
            rows.append([*map(math.exp, left), unknown])
        else:
            revised, unknown = [x - min(row) for x in row], 0.0
            ranked = sorted(range(len(row)), key=row.__getitem__, reverse=True)
            for rank, c in enumerate(ranked[: openmax.alpha], start=1):
                taken = revised[c] * (openmax.alpha + 1 - rank) / openmax.alpha * -math.expm1(-hazards[c])
                revised[c] -= taken
                unknown += taken
            left = [x - log_sum_exp([*revised, unknown]) for x in revised]
            rows.append([math.exp(x) for x in (*left, unknown - log_sum_exp([*revised, unknown]))])
        scores.append(-max(left))
    return np.array(rows), np.array(scores)


def log_sum_exp(values: list[float]) -> float:
    return max(values) + math.log(math.fsum(math.exp(x - max(values)) for x in values))
