# SPDX-License-Identifier: Apache-2.0
"""What MMSER has to beat on real speech: the largest class, hand-made features, a linear probe, fine-tuned Whisper.

Read: `majority`, `hand_made_features` (needs librosa, ISC licence; openSMILE's own licence is for research only),
`linear_probe` (for hand-made features and for pooled states of a frozen encoder), `fine_tune_whisper`.
Choices are made on validation clips alone. Classes are ids from 0; probabilities are float64 [clips, classes].
"""

import copy
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import (
    AutoFeatureExtractor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    WhisperForAudioClassification,
    set_seed,
)
from transformers.utils import logging

from mmser.examples import EmotionDataset

logger = logging.get_logger(__name__)

# ---- the largest class


def majority(train_labels: Sequence[int] | np.ndarray, num_clips: int) -> np.ndarray:
    """Predicts the most frequent training label (the smallest of several) for every clip: int [num_clips]."""
    return np.full(num_clips, np.bincount(train_labels).argmax())


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

    Returns:
        float64 [73], named by `FEATURE_NAMES`; always finite. Frequencies are in Hz, but range and standard deviation
        of the pitch in semitones, and energies in dB.

    Raises:
        ImportError: librosa is not installed.
        ValueError: the waveform is empty or not one-dimensional.
    """
    try:
        import librosa
    except ImportError as error:
        raise ImportError("hand-made features need librosa: pip install librosa") from error
    if np.ndim(waveform) != 1 or not len(waveform):
        raise ValueError(f"the waveform must be one-dimensional and not empty, got the shape {np.shape(waveform)}")
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
    frames = np.concatenate(
        (
            mfcc,
            librosa.feature.delta(mfcc, mode="nearest"),
            energy,
            librosa.feature.delta(energy, mode="nearest"),
            zero_crossings,
            librosa.feature.spectral_centroid(**shape),
            librosa.feature.spectral_bandwidth(**shape),
            librosa.feature.spectral_rolloff(**shape),
            librosa.feature.spectral_flatness(S=spectrum),
        )
    ).astype(np.float64)  # [33, frames]
    pitch = librosa.yin(
        audio, fmin=LOWEST, fmax=HIGHEST, sr=sampling_rate, frame_length=2 * longest, hop_length=hop
    )  # [frames]
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


def extract_hand_made_features(dataset: EmotionDataset) -> np.ndarray:
    """`hand_made_features` of every clip, float64 [clips, 73], with a progress bar."""
    clips = logging.tqdm(range(len(dataset)), "hand-made features")
    return np.stack([hand_made_features(dataset[index]["audio"], dataset.reader.sampling_rate) for index in clips])


# ---- linear probe

COSTS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C of logistic regression: the inverse of its regularisation


def mean_and_std(states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Pools the states of an encoder over time.

    Args:
        states: float [clips, frames, layers, D].
        attention_mask: [clips, frames], 1 for frames of the clip; at least one each.

    Returns:
        float32 [clips, layers, 2 D]: the mean, then the standard deviation, over the frames of each clip.
    """
    mask = attention_mask.to(torch.float32)[:, :, None, None]
    states, count = states.float(), mask.sum(1)
    mean = (states * mask).sum(1) / count
    variance = ((states - mean[:, None]) ** 2 * mask).sum(1) / count
    return torch.cat((mean, variance.sqrt()), -1)


def linear_probe(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    validation_features: np.ndarray,
    validation_labels: np.ndarray,
    evaluation_features: np.ndarray,
    costs: Sequence[float] = COSTS,
) -> tuple[np.ndarray, dict[str, float]]:
    """Standardises features by the training clips and fits a logistic regression.

    Args:
        train_features: float [clips, D], or [clips, layers, D] to choose one layer.
        train_labels: int [clips]; every class must occur.
        validation_features, validation_labels: the layer and C with the best weighted F1 here are chosen.
        evaluation_features: of the clips to predict.
        costs: candidates for C.

    Returns:
        Probabilities [clips, classes] of the evaluation clips, and a dict with the chosen `layer` and `cost` and their
        `validation_weighted_f1`.

    Raises:
        ValueError: the features do not fit together, or a class has no training clip.
    """
    features = [np.asarray(part) for part in (train_features, validation_features, evaluation_features)]
    features = [part[:, None] if part.ndim == 2 else part for part in features]
    if any(part.ndim != 3 or part.shape[1:] != features[0].shape[1:] for part in features):
        raise ValueError(
            f"features must be [clips, D] or [clips, layers, D] alike, got {[part.shape for part in features]}"
        )
    missing = np.flatnonzero(np.bincount(train_labels, minlength=1 + max(validation_labels)) == 0)
    if len(missing):
        raise ValueError(f"no training clip has the label {', '.join(map(str, missing))}")
    train, validation, evaluation = features
    best, chosen = None, {"validation_weighted_f1": -1.0}
    for layer in range(train.shape[1]):
        for cost in costs:
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=cost, max_iter=1000))
            probe.fit(train[:, layer], train_labels)
            score = f1_score(validation_labels, probe.predict(validation[:, layer]), average="weighted")
            if score > chosen["validation_weighted_f1"]:
                best, chosen = probe, {"layer": layer, "cost": cost, "validation_weighted_f1": float(score)}
    return best.predict_proba(evaluation[:, chosen["layer"]]), chosen


# ---- Transformers' own audio classifier

SECONDS_PER_POSITION = 0.02  # of Whisper's encoder
NOT_PREDICTIONS = ["hidden_states", "attentions"]  # with a weighted sum of layers the model returns all their states


def load_whisper_classifier(
    encoder: str, label_names: Sequence[str], window_seconds: int = 8, use_weighted_layer_sum: bool = True
) -> tuple[WhisperForAudioClassification, Any]:
    """Transformers' own classifier on a pretrained Whisper encoder, for a window shorter than 30 seconds.

    Whisper pads every clip to its window. Its positions are sinusoidal, so the first rows are those of a shorter one.

    Args:
        encoder: name on the Hub, or a folder with the encoder's weights; a decoder is not needed.
        label_names: in the order of their ids.
        window_seconds: whole seconds; what a clip has beyond them is cut off.
        use_weighted_layer_sum: classify a learned mix of the layers instead of the last one.

    Returns:
        The model, in float32 and with a random head, and its feature extractor.

    Raises:
        ValueError: the window is too long, or the encoder's weights are not there.
    """
    model, info = WhisperForAudioClassification.from_pretrained(
        encoder,
        num_labels=len(label_names),
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
        use_weighted_layer_sum=use_weighted_layer_sum,
        dtype=torch.float32,
        output_loading_info=True,
    )
    missing = sorted(key for key in info["missing_keys"] if key.startswith("encoder."))
    if missing:
        raise ValueError(f"{encoder} lacks {len(missing)} weights of the encoder: {', '.join(missing[:3])}, ...")
    positions, longest = round(window_seconds / SECONDS_PER_POSITION), model.config.max_source_positions
    if window_seconds != int(window_seconds) or not 0 < positions <= longest:
        raise ValueError(
            f"window_seconds must be a whole number from 1 to {longest * SECONDS_PER_POSITION:g}, got {window_seconds}"
        )
    weight = model.encoder.embed_positions.weight[:positions].detach().clone()
    model.encoder.embed_positions = nn.Embedding.from_pretrained(weight, freeze=True)
    model.config.max_source_positions = model.encoder.max_source_positions = positions
    return model, AutoFeatureExtractor.from_pretrained(encoder, chunk_length=int(window_seconds))


class _Collator:
    """Log-mel features and labels of a batch of examples."""

    def __init__(self, feature_extractor):
        self.feature_extractor = feature_extractor

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.feature_extractor(
            [example["audio"] for example in examples],
            sampling_rate=self.feature_extractor.sampling_rate,
            return_tensors="pt",
        )
        return {
            "input_features": batch["input_features"],
            "labels": torch.tensor([example["labels"] for example in examples]),
        }


class _TrainingClock(TrainerCallback):
    """Adds up the seconds of training without the evaluation between epochs, and stops when they are used up."""

    def __init__(self, budget: float | None = None):
        self.budget = budget
        self.seconds = 0.0
        self.step_ends: list[float] = []
        self.used_up = False

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.step_ends.append(time.perf_counter())
        elapsed = self.seconds + self.step_ends[-1] - self._begin
        if self.budget is not None and elapsed >= self.budget and state.global_step < state.max_steps:
            control.should_training_stop = self.used_up = True

    def on_epoch_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self._begin


def _weighted_f1(prediction) -> dict[str, float]:
    predicted = prediction.predictions.argmax(-1)
    return {"weighted_f1": float(f1_score(prediction.label_ids, predicted, average="weighted"))}


def _seconds_per_step(model: nn.Module, num_steps: int, arguments: dict[str, Any], **trainer_options) -> float:
    """The median time of a step, reading of the data included, of a copy of the model that is thrown away."""
    clock = _TrainingClock()
    plain = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "max_steps": num_steps}
    trainer = Trainer(
        copy.deepcopy(model), TrainingArguments(**{**arguments, **plain}), callbacks=[clock], **trainer_options
    )
    trainer.train()
    return float(np.median(np.diff(clock.step_ends)))


def fine_tune_whisper(
    encoder: str,
    train: EmotionDataset,
    validation: EmotionDataset,
    evaluation: Mapping[str, EmotionDataset],
    label_names: Sequence[str],
    *,
    window_seconds: int = 8,
    use_weighted_layer_sum: bool = True,
    freeze_encoder: bool = False,
    learning_rate: float = 5e-5,
    num_epochs: float = 10,
    batch_size: int = 16,
    seed: int = 42,
    max_seconds_of_training: float | None = None,
    measured_steps: int = 8,
    **training_arguments,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Fine-tunes `WhisperForAudioClassification` with `transformers.Trainer`, keeping the epoch best on validation.

    Args:
        encoder, label_names, window_seconds, use_weighted_layer_sum: of `load_whisper_classifier`.
        train, validation: clips with audio, at the sampling rate of the encoder; no crop or augmentation is added.
        evaluation: names and clips to predict.
        freeze_encoder: train the head and the weights of the layers alone.
        learning_rate: reached after a tenth of the steps, then falling to 0 at the last one.
        num_epochs: at most; fewer if `max_seconds_of_training` does not last.
        batch_size: clips per step.
        seed: of the head and the order of the clips.
        max_seconds_of_training: the number of steps, and with it the course of the learning rate, is chosen for this
            time from that of `measured_steps` steps; when it is used up nevertheless, training stops.
        measured_steps: at least 3; their time and that of evaluation do not count.
        **training_arguments: of `transformers.TrainingArguments`, such as bf16, disable_tqdm or output_dir.

    Returns:
        Probabilities [clips, classes] of each entry of `evaluation`, and a dict: seconds (of training), steps,
        planned_steps, epochs, out_of_time, seconds_per_step (None if not measured), evaluation_seconds (predicting
        all of `evaluation`), validation_weighted_f1 (of the epoch that was kept), parameters, trainable_parameters.

    Raises:
        ValueError: an argument is not usable.
    """
    if max_seconds_of_training is not None and (max_seconds_of_training <= 0 or measured_steps < 3):
        raise ValueError(
            "max_seconds_of_training must be positive and measured_steps at least 3, got "
            f"{max_seconds_of_training} and {measured_steps}"
        )
    set_seed(seed)
    model, feature_extractor = load_whisper_classifier(encoder, label_names, window_seconds, use_weighted_layer_sum)
    if freeze_encoder:
        model.freeze_encoder()
    data = {"train_dataset": train, "data_collator": _Collator(feature_extractor)}
    steps = math.ceil(num_epochs * math.ceil(len(train) / batch_size))
    with tempfile.TemporaryDirectory() as folder:
        arguments: dict[str, Any] = {
            "output_dir": folder,
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": batch_size,
            "learning_rate": learning_rate,
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
        seconds_per_step = None
        if max_seconds_of_training is not None:
            seconds_per_step = _seconds_per_step(model, measured_steps, arguments, **data)
            steps = min(steps, max(1, int(max_seconds_of_training / seconds_per_step)))
        clock = _TrainingClock(max_seconds_of_training)
        trainer = Trainer(
            model,
            TrainingArguments(**{**arguments, "max_steps": steps}),
            eval_dataset=validation,
            compute_metrics=_weighted_f1,
            callbacks=[clock],
            **data,
        )
        trainer.train(ignore_keys_for_eval=NOT_PREDICTIONS)
        begin = time.perf_counter()
        logits = {
            name: trainer.predict(dataset, ignore_keys=NOT_PREDICTIONS).predictions
            for name, dataset in evaluation.items()
        }
        evaluation_seconds = time.perf_counter() - begin
    probabilities = {name: torch.tensor(row).double().softmax(-1).numpy() for name, row in logits.items()}
    return probabilities, {
        "seconds": clock.seconds,
        "steps": trainer.state.global_step,
        "planned_steps": steps,
        "epochs": trainer.state.epoch,
        "out_of_time": clock.used_up,
        "seconds_per_step": seconds_per_step,
        "evaluation_seconds": evaluation_seconds,
        "validation_weighted_f1": trainer.state.best_metric,
        "parameters": model.num_parameters(),
        "trainable_parameters": model.num_parameters(only_trainable=True),
    }
