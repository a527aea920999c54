# SPDX-License-Identifier: Apache-2.0
"""Which modality a checkpoint listens to: tested with one missing, and with that of another clip in its place."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from benchmarks.speak_text import CORPUS as SPOKEN
from mmser.batches import MMSERDataCollator
from mmser.examples import EmotionDataset
from mmser.loading import load_emotion_dataset
from mmser.metrics import compute_classification_metrics
from mmser.model_loading import load_label_names
from modeling_mmser import MMSERForAudioClassification, register_auto_classes
from processing_mmser import MMSERProcessor

Lines = list[dict[str, Any]]  # one score of one run on one group of clips each

METRICS = ("weighted_f1", "unweighted_average_recall", "accuracy")
EXAMINED = ("model", "audio_only", "text_only", "swapped_text", "swapped_audio")
SPEECH_PART, SPOKEN_PART = "acted speech", "spoken text"


def score(
    name: str,
    predictions: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    label_names: Sequence[str],
    groups: Mapping[str, Sequence[str]],
) -> Lines:
    """The `METRICS` of class ids [N] over all clips and over each of their `groups` (column -> value of each clip)."""
    true, lines = np.array(labels), []
    chosen = {"all": np.ones(len(true), dtype=bool)}
    chosen |= {f"{key}={value}": np.array(own) == value for key, own in groups.items() for value in sorted(set(own))}
    for group, rows in chosen.items():
        metrics = compute_classification_metrics(predictions[rows], true[rows], list(label_names))
        lines.append({"score": name, "group": group, "clips": int(rows.sum()), **{m: metrics[m] for m in METRICS}})
    return lines


def groups_of(clips: datasets.Dataset) -> dict[str, list[str]]:
    return {name: list(clips[name]) for name in ("corpus", "language") if name in clips.column_names}


def swap_within_language(values: Sequence[str], languages: Sequence[str], seed: int) -> list[str | None]:
    """For each value that of a random other clip of the same language; it differs, or is None if there is no other."""
    rng = np.random.default_rng(seed)
    pools = defaultdict(list)
    for value, language in zip(values, languages, strict=True):
        if value:
            pools[language].append(value)
    swapped: list[str | None] = []
    for value, language in zip(values, languages, strict=True):
        others = [other for other in pools[language] if other != value] if value else []
        swapped.append(others[rng.integers(len(others))] if others else None)
    return swapped


def conditions(test: datasets.Dataset, seed: int) -> Iterator[tuple[str, datasets.Dataset, dict[str, bool]]]:
    """What a model is shown: name, clips, and arguments of `EmotionDataset`. Audio is swapped for spoken text only."""
    yield "model", test, {}
    yield "audio_only", test, {"use_text": False}
    if "text" not in test.column_names:
        return
    languages = list(test["language"]) if "language" in test.column_names else [""] * len(test)
    yield "text_only", test.select([i for i, text in enumerate(test["text"]) if text]), {"use_audio": False}
    parts = parts_of(test)
    for name, column, part in (("swapped_text", "text", None), ("swapped_audio", "audio", SPOKEN_PART)):
        of_interest = [value if part in (None, own) else "" for value, own in zip(test[column], parts, strict=True)]
        swapped = swap_within_language(of_interest, languages, seed)
        chosen = [i for i, value in enumerate(swapped) if value is not None]
        if chosen:
            clips = test.select(chosen).remove_columns(column)
            yield name, clips.add_column(column, [swapped[i] for i in chosen]), {}


def parts_of(clips: datasets.Dataset) -> list[str]:
    corpora = clips["corpus"] if "corpus" in clips.column_names else [""] * len(clips)
    return [SPOKEN_PART if corpus.split("-")[-1] == SPOKEN else SPEECH_PART for corpus in corpora]


def autocast_of(model_dir: Path) -> torch.dtype | None:
    """The precision that a checkpoint was trained with."""
    arguments = json.loads((model_dir / "training_args.json").read_text(encoding="utf-8"))
    return torch.bfloat16 if arguments.get("bf16") else torch.float16 if arguments.get("fp16") else None


@torch.no_grad()
def examine_checkpoint(model_dir: Path, data_dir: str) -> Lines:
    """Which modality a checkpoint listens to, in the precision of its training, on the test split of `data_dir`.

    Returns: a line for each of `EXAMINED` that the data allow, each part (spoken text or not), corpus and language.
        Those of "model" have `audio_share` as well: the mean share of the audio in the fused vector, over the clips
        with both modalities.
    """
    register_auto_classes()
    processor = MMSERProcessor.from_pretrained(model_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MMSERForAudioClassification.from_pretrained(model_dir, dtype=torch.float32).eval().to(device)
    label_names, precision = load_label_names(str(model_dir)), autocast_of(model_dir)
    test = load_emotion_dataset(data_dir, label_names=label_names)[0]["test"]
    lines = []
    for name, clips, modalities in conditions(test, seed=0):
        options: dict[str, Any] = {"sampling_rate": processor.feature_extractor.sampling_rate, **modalities}
        dataset = EmotionDataset(clips, **options)
        predicted, gates = [], []
        for batch in torch.utils.data.DataLoader(dataset, 32, collate_fn=MMSERDataCollator(processor)):
            inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            with torch.autocast(device, precision, enabled=precision is not None):
                output = model.base_model(**inputs)
                predicted.append(model.classifier(output.pooler_output)[0].argmax(dim=-1).cpu())
            gates.append(output.gate.float().mean(dim=-1).cpu())
        groups = groups_of(clips) | {"part": parts_of(clips)}
        lines += score(name, torch.cat(predicted).numpy(), clips["labels"], label_names, groups)
        if name == "model" and "text" in clips.column_names:
            gate, has_both = torch.cat(gates).numpy(), np.array([bool(text) for text in clips["text"]])
            for line in (line for line in lines if line["group"] != "all"):
                column, value = line["group"].split("=", 1)
                own = gate[has_both & (np.array(groups[column]) == value)]
                line["audio_share"] = float(own.mean()) if len(own) else None
    return lines
