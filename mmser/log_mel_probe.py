# SPDX-License-Identifier: Apache-2.0
"""What ten lines hear: a logistic regression on the mean and deviation of log-mel bands. Speech models must beat it.

`log_mel_statistics` describes a clip, `log_mel_probe` learns from the training clips and answers for the others.
"""

from functools import cache
from typing import Any, cast

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers.audio_utils import mel_filter_bank

from mmser.examples import EmotionDataset, map_in_threads
from mmser.groups import speakers_of, split_speakers

BANDS = 40
WINDOW, HOP = 0.025, 0.010  # seconds
FLOOR = 1e-10  # of the power in a band, 100 dB below that of a full-scale sine: digital silence has a logarithm
COSTS = (0.01, 0.1, 1.0)  # of the logistic regression: the inverse of its regularisation
FOLDS = 3


@cache
def _filters(sampling_rate: int, size: int) -> np.ndarray:
    return mel_filter_bank(
        size // 2 + 1, BANDS, 0.0, sampling_rate / 2, sampling_rate, norm="slaney", mel_scale="slaney"
    )


def log_mel_statistics(waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
    """
    Mean and standard deviation over time of the log power in 40 mel bands.

    Args:
        waveform: float [T] in [-1, 1].
        sampling_rate: in Hz.
    Returns: float64 [80], the means first; always finite.
    """
    size, hop = round(WINDOW * sampling_rate), round(HOP * sampling_rate)
    audio = np.asarray(waveform, np.float64)
    audio = np.pad(audio, (0, max(0, size - len(audio))))
    frames = np.lib.stride_tricks.sliding_window_view(audio, size)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(size))) ** 2 / size
    bands = np.log(np.maximum(power @ _filters(sampling_rate, size), FLOOR))
    return np.concatenate([bands.mean(axis=0), bands.std(axis=0)])


def _statistics(dataset: EmotionDataset) -> np.ndarray:
    rate = dataset.reader.sampling_rate
    return np.stack(
        map_in_threads(
            lambda i: log_mel_statistics(cast(Any, dataset[i])["audio"], rate), len(dataset), "log-mel bands"
        )
    )


def _labels(dataset: EmotionDataset) -> np.ndarray:
    return np.array(dataset.dataset["labels"])


def log_mel_probe(train: EmotionDataset, evaluated: EmotionDataset) -> dict[str, Any]:
    """
    Answer with a logistic regression on `log_mel_statistics`; its cost is chosen by cross-validation over the speakers
    of the training clips, or over the clips where speakers are not known.

    Args:
        train, evaluated: clips that all have audio, of two classes or more for `train`.
    Returns: `predictions` and `labels` of the evaluated clips, class ids [N], and their `speakers`, N names or None.
    """
    features, labels = _statistics(train), _labels(train)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    speakers = speakers_of(train) or [str(row) for row in range(len(labels))]
    if min(len(set(speakers)), np.unique(labels, return_counts=True)[1].min()) >= FOLDS:
        folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
        probe = GridSearchCV(probe, {"logisticregression__C": COSTS}, scoring="f1_weighted", cv=folds)
        probe.fit(features, labels, groups=speakers)
    else:
        probe.fit(features, labels)
    judged = {"labels": _labels(evaluated), "speakers": split_speakers(evaluated.dataset)}
    return {"predictions": probe.predict(_statistics(evaluated)), **judged}
