# SPDX-License-Identifier: Apache-2.0
"""What MMSER has to beat on real speech: the largest class, hand-made features, a linear probe, fine-tuned Whisper.

Hand-made features need librosa (ISC licence; openSMILE's own licence is for research only). Choices are made on
validation clips alone. Classes are ids from 0. The last functions are rows of `real_speech.py`.
"""

import copy
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import (
    AutoFeatureExtractor,
    AutoTokenizer,
    BertConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    WhisperForAudioClassification,
    set_seed,
)
from transformers.utils import logging

from benchmarks.modalities import groups_of, score
from mmser.examples import EmotionDataset
from mmser.loading import load_emotion_dataset
from mmser.training_arguments import processor_has_bf16
from modeling_mmser import MMSERForAudioClassification
from processing_mmser import MMSERProcessor

# ---- hand-made features

LOWEST, HIGHEST = 60.0, 500.0  # Hz, of the fundamental frequency
FRAME_FEATURES = (
    *(f"mfcc{i}" for i in range(1, 14)),
    *(f"delta_mfcc{i}" for i in range(1, 14)),
    *("log_energy", "delta_log_energy", "zero_crossing_rate", "centroid", "bandwidth", "rolloff", "flatness"),
)
FEATURE_NAMES = (
    *(f"{name}_{statistic}" for statistic in ("mean", "std") for name in FRAME_FEATURES),
    *("log_energy_range", "pitch_mean", "pitch_std", "pitch_range", "pitch_slope", "voiced_share", "seconds"),
)


def hand_made_features(waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Prosody and spectrum of a clip: mean and standard deviation over frames of 33 measures, and seven of the whole.

    Args:
        waveform: float [T] in [-1, 1].
        sampling_rate: in Hz.
    Returns: float64 [73], named by `FEATURE_NAMES`; always finite. Frequencies are in Hz, but range and standard
        deviation of the pitch in semitones, and energies in dB.
    """
    import librosa  # not needed by the other baselines

    size, hop = round(0.032 * sampling_rate), round(0.010 * sampling_rate)  # 32 ms windows every 10 ms
    longest = 2 * math.ceil(sampling_rate / LOWEST)  # the window for the pitch holds two of its longest periods
    audio = np.asarray(waveform, np.float32)
    audio = np.pad(audio, (0, max(0, longest - len(audio))))
    spectrum = np.abs(librosa.stft(audio, n_fft=size, hop_length=hop))
    mels = librosa.feature.melspectrogram(S=spectrum**2, sr=sampling_rate, n_mels=40)
    mfcc = librosa.feature.mfcc(S=librosa.power_to_db(mels), n_mfcc=13)
    energy = librosa.power_to_db(librosa.feature.rms(S=spectrum, frame_length=size) ** 2, top_db=None)
    zero_crossings = librosa.feature.zero_crossing_rate(audio, frame_length=size, hop_length=hop)
    shape = {"S": spectrum, "sr": sampling_rate}
    parts = [part for own in (mfcc, energy) for part in (own, librosa.feature.delta(own, mode="nearest"))]
    parts += [
        zero_crossings,
        librosa.feature.spectral_centroid(**shape),
        librosa.feature.spectral_bandwidth(**shape),
        librosa.feature.spectral_rolloff(**shape),
        librosa.feature.spectral_flatness(S=spectrum),
    ]
    frames = np.concatenate(parts).astype(np.float64)  # [33, frames]
    pitch = librosa.yin(audio, fmin=LOWEST, fmax=HIGHEST, sr=sampling_rate, frame_length=2 * longest, hop_length=hop)
    quiet, loud = np.percentile(energy, (5, 95))
    # Voiced: loud enough, few zero crossings, and no pitch at the ends of the range, where YIN puts what has none
    voiced = (energy[0] > max(loud - 25.0, -70.0)) & (zero_crossings[0] < 0.2)
    voiced &= (pitch > 1.02 * LOWEST) & (pitch < 0.98 * HIGHEST)
    whole = [loud - quiet, *_pitch_statistics(pitch, voiced, hop / sampling_rate), len(waveform) / sampling_rate]
    return np.concatenate((frames.mean(1), frames.std(1), whole))


def _pitch_statistics(pitch: np.ndarray, voiced: np.ndarray, step: float) -> list[float]:
    """Mean in Hz, standard deviation and 5 to 95 % range in semitones, slope in semitones per second, voiced share."""
    if voiced.sum() < 2:
        return [0.0, 0.0, 0.0, 0.0, float(voiced.mean())]
    semitones = 12 * np.log2(pitch[voiced] / LOWEST)
    low, high = np.percentile(semitones, (5, 95))
    slope = np.polyfit(np.flatnonzero(voiced) * step, semitones, 1)[0]
    return [float(pitch[voiced].mean()), float(semitones.std()), high - low, float(slope), float(voiced.mean())]


# ---- linear probe

COSTS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C of logistic regression: the inverse of its regularisation


def mean_and_std(states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation [clips, layers, 2 D] over time of states [clips, frames, layers, D]; the mask is
    [clips, frames], 1 for frames of the clip."""
    mask = attention_mask.to(torch.float32)[:, :, None, None]
    states, count = states.float(), mask.sum(1)
    mean = (states * mask).sum(1) / count
    variance = ((states - mean[:, None]) ** 2 * mask).sum(1) / count
    return torch.cat((mean, variance.sqrt()), -1)


def linear_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    validation: np.ndarray,
    validation_labels: np.ndarray,
    test: np.ndarray,
) -> tuple[np.ndarray, dict[str, Any]]:
    """A logistic regression on one layer of features [clips, layers, D] that are standardised by the training clips.

    Returns: class ids [clips] of the test clips, and a dict with the `layer` and the `cost` that are best on the
        validation clips, and their `validation_weighted_f1`.
    """
    best: Any = None
    chosen: dict[str, Any] = {"validation_weighted_f1": -1.0}
    for layer in range(train.shape[1]):
        for cost in COSTS:
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=cost, max_iter=1000))
            probe.fit(train[:, layer], train_labels)
            score = f1_score(validation_labels, probe.predict(validation[:, layer]), average="weighted")
            if score > chosen["validation_weighted_f1"]:
                best, chosen = probe, {"layer": layer, "cost": cost, "validation_weighted_f1": float(score)}
    return best.predict(test[:, chosen["layer"]]), chosen


# ---- Transformers' own audio classifier

SECONDS_PER_POSITION = 0.02  # of Whisper's encoder
NOT_PREDICTIONS = ["hidden_states", "attentions"]  # with a weighted sum of layers the model returns all their states


def load_whisper_classifier(
    encoder: str, label_names: Sequence[str], window_seconds: int = 8
) -> tuple[WhisperForAudioClassification, Any]:
    """Transformers' own classifier on the weighted layers of a pretrained Whisper encoder, and its feature extractor.
    What a clip has beyond `window_seconds` is cut off.

    Whisper pads every clip to its window of 30 s. Its positions are sinusoidal: the first rows serve a shorter one.

    Raises:
        ValueError: the folder or the Hub's model lacks weights of the encoder.
    """
    loaded: Any = WhisperForAudioClassification.from_pretrained(
        encoder,
        num_labels=len(label_names),
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
        use_weighted_layer_sum=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    model, info = loaded
    missing = sorted(key for key in info["missing_keys"] if key.startswith("encoder."))
    if missing:
        raise ValueError(f"{encoder} lacks {len(missing)} weights of the encoder: {', '.join(missing[:3])}, ...")
    positions = round(window_seconds / SECONDS_PER_POSITION)
    weight = model.encoder.embed_positions.weight[:positions].detach().clone()
    model.encoder.embed_positions = nn.Embedding.from_pretrained(weight, freeze=True)
    model.config.max_source_positions = model.encoder.max_source_positions = positions
    return model, AutoFeatureExtractor.from_pretrained(encoder, chunk_length=window_seconds)


def collate(feature_extractor: Any, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Log-mel features and labels of a batch of examples."""
    audio = [example["audio"] for example in examples]
    batch = feature_extractor(audio, sampling_rate=feature_extractor.sampling_rate, return_tensors="pt")
    labels = torch.tensor([example["labels"] for example in examples])
    return {"input_features": batch["input_features"], "labels": labels}


class TrainingClock(TrainerCallback):
    """Seconds of each epoch without the evaluation after it; stops the training when `budget` seconds are used up."""

    def __init__(self, budget: float = math.inf):
        self.budget = budget
        self.epochs: list[float] = []
        self.step_ends: list[float] = []
        self.used_up = False

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.step_ends.append(time.perf_counter())
        elapsed = sum(self.epochs) + self.step_ends[-1] - self._begin
        if elapsed >= self.budget and state.global_step < state.max_steps:
            control.should_training_stop = self.used_up = True

    def on_epoch_end(self, args, state, control, **kwargs):
        self.epochs.append(time.perf_counter() - self._begin)


def _weighted_f1(prediction) -> dict[str, float]:
    predicted = prediction.predictions.argmax(-1)
    return {"weighted_f1": float(f1_score(prediction.label_ids, predicted, average="weighted"))}


def _seconds_per_step(model: nn.Module, arguments: dict[str, Any], **trainer_options) -> float:
    """The median time of a step, reading of the data included, of a copy of the model that is thrown away."""
    clock = TrainingClock()
    plain = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "max_steps": 8}
    options = TrainingArguments(**{**arguments, **plain})
    Trainer(copy.deepcopy(model), options, callbacks=[clock], **trainer_options).train()
    return float(np.median(np.diff(clock.step_ends)))


def fine_tune_whisper(
    encoder: str,
    train: EmotionDataset,
    validation: EmotionDataset,
    test: EmotionDataset,
    label_names: Sequence[str],
    *,
    max_seconds_of_training: float,
    window_seconds: int = 8,
    num_epochs: int = 40,
    batch_size: int = 16,
    seed: int = 42,
    **training_arguments,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Fine-tunes `WhisperForAudioClassification` with `transformers.Trainer`, keeping the epoch best on validation.

    The number of steps, and with it the course of the learning rate, is chosen for `max_seconds_of_training` from the
    time of a few steps, for `num_epochs` at most; training stops when the time is used up. Evaluation does not count.

    Returns: class ids [clips] of the test, and what the training took.
    """
    set_seed(seed)
    model, feature_extractor = load_whisper_classifier(encoder, label_names, window_seconds)
    data: dict[str, Any] = {"train_dataset": train, "data_collator": partial(collate, feature_extractor)}
    with tempfile.TemporaryDirectory() as folder:
        arguments: dict[str, Any] = {
            "output_dir": folder,
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": batch_size,
            "learning_rate": 5e-5,
            "warmup_steps": 0.1,  # a share
            "seed": seed,
            "eval_strategy": "epoch",
            "save_strategy": "best",
            "save_only_model": True,
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "weighted_f1",
            "remove_unused_columns": False,  # the collator needs the audio
            "report_to": "none",
            **training_arguments,
        }
        seconds_per_step = _seconds_per_step(model, arguments, **data)
        most = num_epochs * math.ceil(len(train) / batch_size)
        steps = min(most, max(1, int(max_seconds_of_training / seconds_per_step)))
        clock = TrainingClock(max_seconds_of_training)
        trainer = Trainer(
            model,
            TrainingArguments(**{**arguments, "max_steps": steps}),
            eval_dataset=validation,
            compute_metrics=_weighted_f1,
            callbacks=[clock],
            **data,
        )
        trainer.train(ignore_keys_for_eval=NOT_PREDICTIONS)
        logits = trainer.predict(test, ignore_keys=NOT_PREDICTIONS).predictions
    return np.asarray(logits).argmax(axis=-1), {
        "training_seconds": sum(clock.epochs),
        "steps": trainer.state.global_step,
        "planned_steps": steps,
        "epochs": trainer.state.epoch,
        "out_of_time": clock.used_up,
        "seconds_per_step": seconds_per_step,
        "validation_weighted_f1": trainer.state.best_metric,
        "parameters": model.num_parameters(),
        "trainable_parameters": model.num_parameters(only_trainable=True),
    }


# ---- the rows of `real_speech.py`: each returns what its `result.json` holds


def majority(data_dir: str) -> dict[str, Any]:
    """The most frequent training label (the smallest of several) for every clip."""
    splits, label_names = load_emotion_dataset(data_dir)
    test = splits["test"]
    predictions = np.full(len(test), np.bincount(splits["train"]["labels"]).argmax())
    scores = [score(n, predictions, test["labels"], label_names, groups_of(test)) for n in ("model", "audio_only")]
    return {"scores": scores[0] + scores[1]}


def _probe(data_dir: str, features_of: Callable[[datasets.Dataset], np.ndarray]) -> dict[str, Any]:
    """A logistic regression on features of the audio."""
    splits, label_names = load_emotion_dataset(data_dir)
    start = time.perf_counter()
    clips = [(features_of(splits[name]), np.array(splits[name]["labels"])) for name in ("train", "validation", "test")]
    (test, labels), groups = clips.pop(), groups_of(splits["test"])
    predictions, chosen = linear_probe(*clips[0], *clips[1], test)
    return {
        "training_seconds": time.perf_counter() - start,
        "validation_weighted_f1": chosen.pop("validation_weighted_f1"),
        "scores": score("audio_only", predictions, labels, label_names, groups),
        "details": chosen,
    }


def probe_hand_made_features(data_dir: str) -> dict[str, Any]:
    """73 measures of prosody and spectrum."""

    def features_of(clips: datasets.Dataset) -> np.ndarray:
        dataset: Any = EmotionDataset(clips, use_text=False)
        rows = (dataset[index]["audio"] for index in logging.tqdm(range(len(dataset)), "hand-made features"))
        return np.stack([[hand_made_features(audio, dataset.reader.sampling_rate)] for audio in rows])  # one layer

    return _probe(data_dir, features_of)


def probe_encoder(data_dir: str, audio_encoder: str, text_encoder: str) -> dict[str, Any]:
    """Mean and deviation over time of each layer of the frozen audio encoder; one layer is chosen."""
    tiny = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = MMSERForAudioClassification.from_backbones(audio_encoder, tiny).base_model
    extractor = AutoFeatureExtractor.from_pretrained(audio_encoder)
    processor: Any = MMSERProcessor(extractor, AutoTokenizer.from_pretrained(text_encoder))
    rate = extractor.sampling_rate

    @torch.no_grad()
    def features_of(clips: datasets.Dataset) -> np.ndarray:
        dataset: Any = EmotionDataset(clips, sampling_rate=rate, use_text=False)
        features = []
        for index in logging.tqdm(range(len(dataset)), "encoding"):
            states = model.encode(**processor(audio=[dataset[index]["audio"]], sampling_rate=rate))
            features.append(mean_and_std(states["audio_states"], states["attention_mask"])[0].numpy())
        return np.stack(features)

    return _probe(data_dir, features_of)


def whisper(data_dir: str, audio_encoder: str, seconds: float, seed: int) -> dict[str, Any]:
    """Transformers' own classifier, with so many seconds of training."""
    splits, label_names = load_emotion_dataset(data_dir)
    train, validation, test = (EmotionDataset(splits[n], use_text=False) for n in ("train", "validation", "test"))
    bf16 = torch.cuda.is_available() or processor_has_bf16()
    predictions, details = fine_tune_whisper(
        audio_encoder,
        train,
        validation,
        test,
        label_names,
        max_seconds_of_training=seconds,
        seed=seed,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),  # else bf16 is refused there
        disable_tqdm=True,
    )
    columns = ("training_seconds", "validation_weighted_f1", "parameters", "trainable_parameters")
    scores = score("audio_only", predictions, splits["test"]["labels"], label_names, groups_of(splits["test"]))
    result = {name: details.pop(name) for name in columns}
    return {**result, "scores": scores, "details": details, "dtype": "bfloat16 autocast" if bf16 else "float32"}
