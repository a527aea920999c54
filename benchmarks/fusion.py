# SPDX-License-Identifier: Apache-2.0
"""Gated or transformer fusion? On speech, on spoken text (`speak_text.py`), and on both, over three seeds.

    python benchmarks/fusion.py --data_dir ser4 --spoken_text_dir spoken --audio_encoder openai/whisper-base \
        --text_encoder intfloat/multilingual-e5-small --cache_dir runs/encoder_states

Both encoders are frozen, each audio state is the mean of sixteen (320 ms), and the trainings are short, so that one
takes half a minute.
All else is `recipes/real_speech.json` without augmentation, the same for both fusions.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoFeatureExtractor, AutoTokenizer, get_cosine_schedule_with_warmup
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.pooled_states import autocast_here
from benchmarks.tables import Row, cell, difference, mean, parse_arguments, publish, read_results, table
from configuration_mmser import MMSERConfig
from mmser.caching import CachedStatesDataset, EncoderStateCache
from mmser.examples import EmotionDataset
from mmser.loading import load_emotion_dataset
from mmser.metrics import compute_classification_metrics
from mmser.optimizer import parameter_groups
from mmser.results import environment
from modeling_mmser import MMSERForAudioClassification
from processing_mmser import MMSERProcessor

FUSIONS = ("gated", "transformer")
TRAINED_ON = {"speech": ("speech",), "spoken text": ("spoken text",), "both": ("speech", "spoken text")}
SPLITS = ("train", "validation", "test")
LABELS = ("neutral", "happy", "sad", "angry")
FRAMES = 16  # states of 20 ms that one mean stands for
STEPS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, TEXT_DROPOUT = 200, 32, 5e-4, 1.0, 0.5


class Clip(NamedTuple):
    """States of the audio, float16 [T, layers, D], and of the text [L, D], which has no rows if there is none."""

    audio: Tensor
    text: Tensor
    label: int


def encode(
    folders: Mapping[str, str], audio_encoder: str, text_encoder: str, cache_dir: Path
) -> dict[str, list[Clip]]:
    """The clips of each split of each folder, by "NAME SPLIT". Full states are computed once and kept on disk."""
    extractor, tokenizer = (
        AutoFeatureExtractor.from_pretrained(audio_encoder),
        AutoTokenizer.from_pretrained(text_encoder),
    )
    model = MMSERForAudioClassification.from_backbones(audio_encoder, text_encoder, audio_num_hidden_layers=4)
    model.freeze_audio_encoder()
    model.freeze_text_encoder()
    cache = EncoderStateCache(cache_dir, model, MMSERProcessor(extractor, tokenizer), autocast=autocast_here())
    clips = {}
    for name, folder in folders.items():
        tables = load_emotion_dataset(folder)[0]
        for split in SPLITS:
            dataset = EmotionDataset(tables[split], sampling_rate=extractor.sampling_rate)
            examples = CachedStatesDataset(dataset, cache)
            rows: Any = (examples[i] for i in logging.tqdm(range(len(examples)), desc=f"{name} {split}"))
            clips[f"{name} {split}"] = [
                Clip(mean_of_frames(row["audio_states"]), torch.tensor(row["text_states"]), row["labels"])
                for row in rows
            ]
    return clips


def mean_of_frames(states: np.ndarray) -> Tensor:
    """[T, ...] -> means of `FRAMES` each, [ceil(T / FRAMES), ...]."""
    parts = torch.tensor(states, dtype=torch.float32).split(FRAMES)
    return torch.stack([part.mean(dim=0) for part in parts]).half()


def collate(clips: Sequence[Clip], text_dropout: float = 0.0) -> dict[str, Tensor]:
    batch: dict[str, Tensor] = {"labels": torch.tensor([clip.label for clip in clips])}
    for kind, mask_name in (("audio", "attention_mask"), ("text", "text_attention_mask")):
        states = pad_sequence([getattr(clip, kind) for clip in clips], batch_first=True).float()
        lengths = torch.tensor([len(getattr(clip, kind)) for clip in clips])
        batch[f"{kind}_states"] = states if states.shape[1] else states.new_zeros(len(clips), 1, *states.shape[2:])
        batch[mask_name] = (torch.arange(batch[f"{kind}_states"].shape[1]) < lengths[:, None]).long()
    hidden = torch.rand(len(clips)) < text_dropout
    batch["text_attention_mask"][hidden] = 0
    return batch


def batches(clips: Sequence[Clip]) -> Iterator[list[Clip]]:
    """Endless: each pass in a new order, clips of similar length together."""
    while True:
        order = torch.randperm(len(clips)).split(8 * BATCH_SIZE)
        groups = [sorted(part.tolist(), key=lambda row: len(clips[row].audio)) for part in order]
        parts = [group[i : i + BATCH_SIZE] for group in groups for i in range(0, len(group), BATCH_SIZE)]
        for place in torch.randperm(len(parts)).tolist():
            yield [clips[row] for row in parts[place]]


def train(clips: Sequence[Clip], fusion_type: str, seed: int) -> MMSERForAudioClassification:
    torch.manual_seed(seed)
    num_layers, size = clips[0].audio.shape[1:]
    audio = {"model_type": "whisper", "d_model": size, "encoder_layers": num_layers - 1, "encoder_attention_heads": 1}
    text = {"model_type": "bert", "hidden_size": clips[0].text.shape[-1], "num_hidden_layers": 1, "vocab_size": 9}
    config = (
        MMSERConfig(  # the states are here already: the smallest encoders with such states stand for the real ones
            audio_config=audio,
            text_config=text,
            class_counts=np.bincount([clip.label for clip in clips], minlength=len(LABELS)).tolist(),
            fusion_type=fusion_type,
            fusion_dropout=0.4,
            cross_attention_layer_norm=False,
        )
    )
    model = MMSERForAudioClassification(config)
    model.freeze_audio_encoder()
    model.freeze_text_encoder()
    sample = [clips[row] for row in torch.randperm(len(clips))[:512].tolist()]
    model.mmser.fit_standardization([collate(sample[i : i + BATCH_SIZE]) for i in range(0, len(sample), BATCH_SIZE)])
    groups = parameter_groups(model, LEARNING_RATE, {"layer_weights": 60.0}, WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, fused=True)
    scheduler = get_cosine_schedule_with_warmup(optimizer, STEPS // 10, STEPS)
    model.train()
    autocast = autocast_here()
    for _, batch in zip(range(STEPS), batches(clips), strict=False):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = model(**collate(batch, TEXT_DROPOUT)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def weighted_f1(model: MMSERForAudioClassification, clips: Sequence[Clip]) -> float:
    answers = []
    for start in range(0, len(clips), BATCH_SIZE):
        batch = collate(clips[start : start + BATCH_SIZE])
        del batch["labels"]
        answers.append(model(**batch).logits.argmax(dim=-1))
    labels = [clip.label for clip in clips]
    return compute_classification_metrics(torch.cat(answers).numpy(), labels, list(LABELS))["weighted_f1"]


def measure(clips: Mapping[str, list[Clip]], seeds: int) -> list[Row]:
    lines = []
    for seed in range(seeds):
        for trained_on, parts in TRAINED_ON.items():
            for fusion_type in FUSIONS:
                start = time.process_time()
                model = train([clip for part in parts for clip in clips[f"{part} train"]], fusion_type, seed)
                line: Row = {"trained on": trained_on, "fusion": fusion_type, "seed": seed}
                line["seconds"] = round(time.process_time() - start, 1)
                line["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
                line |= {
                    f"{part} {split}": weighted_f1(model, clips[f"{part} {split}"])
                    for part in parts
                    for split in SPLITS[1:]
                }
                print(line, flush=True)
                lines.append(line)
    return lines


def make_tables(lines: Sequence[Row]) -> dict[str, str]:
    found: dict[tuple, dict[int, float]] = defaultdict(dict)
    for line in lines:
        for name in line:
            if line[name] is not None:
                found[(line["trained on"], line["fusion"], name)][line["seed"]] = line[name]
    rows: list[Row] = []
    for trained_on, parts in TRAINED_ON.items():
        for part in parts:
            row: Row = {"trained on": trained_on, "judged on": part}
            for split in SPLITS[1:]:
                values = [found[(trained_on, fusion, f"{part} {split}")] for fusion in FUSIONS]
                row |= {f"{fusion}, {split}": cell(own) for fusion, own in zip(FUSIONS, values, strict=True)}
                row[f"difference, {split}"] = difference(values[1], values[0])
            rows.append(row)
    costs: list[Row] = []
    for fusion in FUSIONS:
        seconds = [mean(values) or 0.0 for key, values in found.items() if key[1:] == (fusion, "seconds")]
        parameters = next(iter(found[("both", fusion, "parameters")].values()))
        costs.append(
            {
                "fusion": fusion,
                "trained parameters": f"{parameters / 1e6:.2f} M",
                "CPU seconds a training": f"{np.mean(seconds):.0f}",
            }
        )
    return {"fusion": table(rows), "fusion_cost": table(costs)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Gated against transformer fusion, on frozen encoders.")
    parser.add_argument("--data_dir", help="speech, with the columns of docs/train.md")
    parser.add_argument("--spoken_text_dir", help="of benchmarks/speak_text.py")
    parser.add_argument("--audio_encoder", default="openai/whisper-base")
    parser.add_argument("--text_encoder", default="intfloat/multilingual-e5-small")
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/encoder_states"))
    parser.add_argument("--seeds", type=int, default=3)
    options = parse_arguments(parser, "fusion", arguments, ("data_dir", "spoken_text_dir"))
    if options.from_results:
        report, lines = read_results(options.output)
    else:
        folders = {"speech": options.data_dir, "spoken text": options.spoken_text_dir}
        clips = encode(folders, options.audio_encoder, options.text_encoder, options.cache_dir)
        lines = measure(clips, options.seeds)
        report = {
            "clips": {name: len(own) for name, own in clips.items()},
            "settings": {
                "steps": STEPS,
                "batch_size": BATCH_SIZE,
                "text_dropout": TEXT_DROPOUT,
                "dtype": str(autocast_here() or torch.float32).removeprefix("torch."),
            },
            "threads": torch.get_num_threads(),
            "environment": environment(),
        }
    publish(make_tables(lines), report, lines, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
