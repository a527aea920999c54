# SPDX-License-Identifier: Apache-2.0
"""MMSER: multimodal speech emotion recognition. The public names, each imported when it is first used.

What travels with a checkpoint lies beside this package (`modeling_mmser.py` and its siblings); what trains, judges and
exports is in this package, one module a job.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_MODULES = {
    "MMSERConfig": "configuration_mmser",
    "MMSERForAudioClassification": "modeling_mmser",
    "MMSERModel": "modeling_mmser",
    "OpenMax": "modeling_mmser",
    "register_auto_classes": "modeling_mmser",
    "quantize_dynamic": "quantization_mmser",
    "MMSERPipeline": "processing_mmser",
    "MMSERProcessor": "processing_mmser",
    "Augmenter": "mmser.augmentation",
    "EmotionDataset": "mmser.examples",
    "MMSERDataCollator": "mmser.batches",
    "MMSERTrainer": "mmser.trainer",
    "MMSERTrainingArguments": "mmser.training_arguments",
    "export_checkpoint": "mmser.export",
    "load_emotion_dataset": "mmser.loading",
    "load_emotion_split": "mmser.loading",
    "prune": "mmser.pruning",
    "MMSERStream": "mmser.stream",
    "StreamEvent": "mmser.stream",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mmser' has no attribute {name!r}; it has {', '.join(_MODULES)}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
