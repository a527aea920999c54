# SPDX-License-Identifier: Apache-2.0
"""`MMSERTrainingArguments`: the arguments of Transformers' Trainer with the defaults and the additions of MMSER."""

import importlib.util
import math
import os
from dataclasses import dataclass

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available, logging

from mmser.flags import parse_json
from mmser.optimizer import PARAMETER_GROUPS
from mmser.training_flags import CLASSIFIER, MAX_EPOCHS, MIN_EPOCHS, MIN_STEPS, OUTPUT, TrainingFlags

logger = logging.get_logger(__name__)


def has_accelerator() -> bool:
    """Whether there is a GPU or another device that trains: CUDA, ROCm, XPU, MPS, NPU, TPU and their like."""
    return torch.accelerator.is_available() or is_torch_xla_available()


def processor_has_bf16() -> bool:
    """
    Whether the processor computes in bfloat16 (x86: AVX-512). Others emulate it: a product of matrices took 86 times
    as long as in float32 with AVX2.
    """
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


# Arguments of the base class that do nothing here, or harm: what they may be, and what to do instead
WITHOUT_EFFECT = {
    "label_smoothing_factor": (
        (0, 0.0),
        "The model computes its own loss: set its field `label_smoothing`, as in --config_overrides "
        "'{\"label_smoothing\": 0.1}'.",
    ),
    "label_names": ((None, ["labels"]), "The labels of a batch are always `labels`; `--labels` names the classes."),
    "length_column_name": (("length",), "The lengths of clips are read from their files."),
    "prediction_loss_only": ((False,), "Scores and calibration need the predictions."),
    "remove_unused_columns": ((False,), "Clips are raw audio, which the model knows by no column."),
}

# What `--report_to` writes with; any of the packages does
REPORT_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}

# Arguments that say how all weights are learnt, which `--adapt` does in its own way
TRAINS_BY_STEPS = (
    *("num_train_epochs", "max_steps", "learning_rate", "lr_multipliers", "weight_decay", "weight_averaging"),
    *("lr_scheduler_type", "warmup_steps", "gradient_accumulation_steps", "resume_from_checkpoint"),
    *("adversarial", "adversarial_head", "contrastive_memory", "sampling_temperature"),
)


@dataclass
class MMSERTrainingArguments(TrainingFlags, TrainingArguments):  # type: ignore[misc]  # other types of some defaults
    """`TrainingArguments` with defaults for fine-tuning MMSER and the short spellings of the most used flags."""

    def __post_init__(self):
        for name, (allowed, advice) in WITHOUT_EFFECT.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` has no effect here, got {getattr(self, name)!r}. {advice}")
        self._check_adapting()
        self.has_default_epochs = self.num_train_epochs is None
        if self.num_train_epochs is None:
            self.num_train_epochs = float(MIN_EPOCHS)
        if isinstance(self.lr_multipliers, str):
            self.lr_multipliers = parse_json(self.lr_multipliers, "--lr_multipliers")
        unknown = set(self.lr_multipliers or {}) - set(PARAMETER_GROUPS)
        if unknown:
            raise ValueError(
                f"`lr_multipliers` names {sorted(unknown)}; the groups are {', '.join(PARAMETER_GROUPS)}."
            )
        if not 0 <= self.weight_averaging < 1:
            raise ValueError(f"`weight_averaging` must be in [0, 1), got {self.weight_averaging}.")
        if self.hp_search < 0 or (self.hp_search and self.adapt):
            raise ValueError(f"--hp_search is a number of trainings, without --adapt, got {self.hp_search}.")
        self._check_reporting()
        self._check_adversaries()
        self._check_sampling()
        on_cpu = self.use_cpu or not has_accelerator()
        is_slow = on_cpu and not processor_has_bf16()
        if self.use_amp and not (self.bf16 or self.fp16):
            if is_slow:
                logger.warning("--use_amp: this processor has no bf16 arithmetic, so all is computed in float32.")
            else:
                self.bf16 = on_cpu or is_torch_xla_available() or is_torch_bf16_gpu_available()
                self.fp16 = not self.bf16
        elif self.bf16 and is_slow:
            logger.warning("--bf16: this processor has no bf16 arithmetic. Without the flag it is many times as fast.")
        if self.fp16 and on_cpu:
            raise ValueError("--fp16 has no effect on a processor, which computes in bf16: give --use_amp or --bf16.")
        if self.bf16 and on_cpu:
            self.use_cpu = True  # it is what runs anyway, but unless it is said Transformers refuses bf16
        if on_cpu:
            self.dataloader_pin_memory = False  # it has no effect there, and torch warns of it
        if on_cpu and self.ddp_backend is None and "WORLD_SIZE" in os.environ:
            # Where torch was built with MPI, Accelerate takes that, which knows no process that torchrun started
            self.ddp_backend = "gloo"
        self.label_names = ["labels"]
        # A loss that is not finite is an error here, not something to be averaged away in the log
        self.logging_nan_inf_filter = False
        if self.eval_strategy == "no" or self.save_strategy == "no":
            self.load_best_model_at_end = False
        super().__post_init__()

    def _check_reporting(self) -> None:
        """What --report_to names is installed; the Trainer would say so after the data are read, with a traceback."""
        wanted = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        for name in wanted:
            packages = REPORT_PACKAGES.get(name, ())
            if packages and not any(importlib.util.find_spec(package) for package in packages):
                raise ImportError(
                    f"--report_to {name} needs a package that is not installed: `pip install {packages[0]}`"
                )

    def _check_sampling(self) -> None:
        temperature, strategy = self.sampling_temperature, str(self.train_sampling_strategy)
        if temperature is None:
            return
        if not 0 < temperature < math.inf:
            raise ValueError(f"`sampling_temperature` must be a number greater than 0, got {temperature}.")
        if strategy not in ("group_by_length", "random"):
            raise ValueError(
                f"`sampling_temperature` draws clips at random, which `train_sampling_strategy` {strategy} does not: "
                "choose group_by_length or random."
            )

    def _check_adapting(self) -> None:
        if not self.adapt:
            for name in ("adapt_layers", "adapt_strength", "adapt_rehearsal"):
                if getattr(self, name) != getattr(TrainingFlags, name):
                    raise ValueError(f"--{name} is about adapting a checkpoint: add --adapt, or leave it out.")
            return
        if self.adapt_strength is not None and not 0 < self.adapt_strength < math.inf:
            raise ValueError(f"--adapt_strength must be a number greater than 0, got {self.adapt_strength}.")
        if self.adapt_strength is not None and self.adapt_layers == CLASSIFIER:
            raise ValueError(f"--adapt_strength is of the output layer: give --adapt_layers {OUTPUT} or leave it out.")
        if not 0 <= self.adapt_rehearsal < math.inf:
            raise ValueError(f"--adapt_rehearsal must be a number of 0 or more, got {self.adapt_rehearsal}.")
        for name in TRAINS_BY_STEPS:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"--{name} is for a training of all weights, which --adapt is not: leave out one of the two."
                )
        self.eval_strategy = self.save_strategy = "no"

    def _check_adversaries(self) -> None:
        for name in ("adversarial", "adversarial_head"):
            allowed = TrainingFlags.__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        for name in ("adversarial_epsilon", "adversarial_weight", "adversarial_head_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be greater than 0, got {getattr(self, name)}.")
        if self.contrastive_memory < 0:
            raise ValueError(f"`contrastive_memory` must be 0 or more clips, got {self.contrastive_memory}.")
        for name, owner in (("epsilon", "adversarial"), ("weight", "adversarial"), ("weight", "adversarial_head")):
            name = f"{owner}_{name}"
            if getattr(self, owner) == "none" and getattr(self, name) != getattr(TrainingFlags, name):
                logger.warning(f"--{name} has no effect without --{owner}.")

    def choose_epochs(self, num_clips: int) -> None:
        """Where no number of epochs was given, choose it by the number of training clips: few clips need many."""
        if not self.has_default_epochs or self.num_train_epochs != MIN_EPOCHS or self.max_steps > 0:
            return
        clips_per_step = self.train_batch_size * self.world_size * self.gradient_accumulation_steps
        epochs = math.ceil(MIN_STEPS / max(1, math.ceil(num_clips / clips_per_step)))
        self.num_train_epochs = float(min(max(MIN_EPOCHS, epochs), MAX_EPOCHS))
        logger.info(f"{num_clips} training clips: {self.num_train_epochs:g} epochs. Give --epochs for another number.")
