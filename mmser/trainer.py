# SPDX-License-Identifier: Apache-2.0
"""`MMSERTrainer`: Transformers' own trainer plus what this model needs.

That is: the published parameter groups, every part of the loss in the log, an error in place of a loss that is not
finite, and `finalize`, which calibrates the model and fits its OpenMax.
"""

import contextlib
import functools
import json
import os
import shutil
import time
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers.trainer
from huggingface_hub import upload_folder
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    HubStrategy,
    IntervalStrategy,
    SaveStrategy,
    has_length,
)
from transformers.utils import PushInProgress, is_torch_xla_available, logging

from adapters_mmser import broken_weights, merged_weights
from losses_mmser import check_finite_losses
from mmser import sharding
from mmser.adversarial import DomainHead, FreshGradients, StatePerturbation, reversal_strength
from mmser.averaging import WeightAverage
from mmser.batches import (
    ID_NAMES,
    ROW_IDS,
    WEIGHT_NAME,
    LengthGroupedSampler,
    MMSERDataCollator,
    count_own_clips,
    evaluation_order,
    first_clips,
    is_filled_up,
    weigh_batches,
)
from mmser.console import without_bars_of_weights
from mmser.contrastive import ContrastivePool
from mmser.examples import EmotionDataset, EmotionIterableDataset, class_counts
from mmser.files import files_together, naming_full_disk, usual_mode, whole_file, write_atomically
from mmser.groups import MEAN_OVER_CORPORA, compute_corpus_metrics, corpora_of, speakers_of
from mmser.metrics import build_compute_metrics
from mmser.model_calibration import calibrate_outputs, fit_openmax, join_audio_alone, reset_calibration
from mmser.model_card import CARD_NAME, sign_card
from mmser.model_loading import check_teacher, label_names_of
from mmser.numerics import Watch
from mmser.optimizer import parameter_groups
from mmser.sampling import TemperatureSampler, expected_draws, number_groups
from mmser.streams import SpareBatch, fill_up, is_shared_out, share_of, share_out
from mmser.targets import split_targets
from mmser.training_arguments import MMSERTrainingArguments
from modeling_mmser import MMSERForAudioClassification, MMSEROutput
from processing_mmser import MMSERProcessor

logger = logging.get_logger(__name__)
NO_INPUTS = ("speaker_ids", ROW_IDS, WEIGHT_NAME)  # of a batch: what the model does not take, even in training
# Of a batch: what the model learns from, and is no input
TARGET_NAMES = ("labels", "class_shares", "auxiliary_targets", "teacher_logits", WEIGHT_NAME)
# Of a saved model
WEIGHT_FILES = ("model.safetensors*", "model-*-of-*.safetensors", "adapter_model.safetensors")
# Share of the answers right with the text. With 0.92 (real speech) OpenMax gained by it; with 0.90 (the demo) it no
# longer rejected other emotions: 16 % in place of 98 %
RIGHT_WITHOUT_TEXT = 0.91


class _SetEpoch(TrainerCallback):
    """Tells the training set and its sampler which epoch it is: accelerate does so for some of them only."""

    def __init__(self):
        self.targets = []

    def on_epoch_begin(self, args, state, control, **kwargs):
        for target in self.targets:
            target.set_epoch(int(state.epoch))


class TrainingTime(TrainerCallback, ExportableState):
    """
    The seconds of a training with all its parts: each checkpoint holds those until then, and a resumed run goes on
    from there. What a stop lost is not counted.
    """

    def __init__(self):
        self.seconds_before = 0.0
        self.start: float | None = None  # while training

    @property
    def seconds(self) -> float:
        return self.seconds_before + (0.0 if self.start is None else time.monotonic() - self.start)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds_before": 0.0 if self.start is None else self.seconds}}

    def on_train_begin(self, args, state, control, **kwargs):
        # A checkpoint of an earlier version has no such entry, and the trainer wants one when it saves
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.seconds_before = saved["attributes"]["seconds_before"]
        self.start = time.monotonic()

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds_before, self.start = self.seconds, None


class CheckpointFiles(TrainerCallback, ExportableState):
    """
    Each checkpoint says in its state, which is written last, which files it has and how large they are: one that lost
    some of them, as it was being deleted or copied, is not taken for whole.
    """

    def __init__(self):
        self.folder: Path | None = None  # of the checkpoint that is being saved

    def state(self) -> dict[str, Any]:
        paths = [] if self.folder is None else sorted(path for path in self.folder.rglob("*") if path.is_file())
        files = {path.relative_to(cast(Path, self.folder)).as_posix(): path.stat().st_size for path in paths}
        return {"args": {}, "attributes": {"files": files}}

    def on_train_begin(self, args, state, control, **kwargs):
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())


class StreamPlace(TrainerCallback, ExportableState):
    """
    How far a stream is read, for a run that goes on: nobody knows how long it is, so the steps do not tell.

    `passes` that are over, and the `batches` of the present one; `start` has both as the run began or went on. They
    are 0 where it went on from a checkpoint of an earlier version, which has no such entry.
    """

    def __init__(self):
        self.passes = self.batches = 0
        self.start = (0, 0)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"passes": self.passes, "batches": self.batches}}

    def on_train_begin(self, args, state, control, **kwargs):
        new = {"args": {}, "attributes": {"passes": 0, "batches": 0}}
        saved = state.stateful_callbacks.setdefault(type(self).__name__, new)["attributes"]
        self.passes, self.batches = self.start = saved["passes"], saved["batches"]

    def on_epoch_end(self, args, state, control, **kwargs):
        self.passes, self.batches = self.passes + 1, 0


class _LogAtSave(TrainerCallback):
    """
    A line of the log before each checkpoint: what was summed up for the next line is in no checkpoint, and the first
    line of a run that goes on would be about other steps than without the stop.
    """

    def on_step_end(self, args, state, control, **kwargs):
        saves = control.should_save or (args.save_strategy == SaveStrategy.BEST and control.should_evaluate)
        control.should_log |= saves and args.logging_strategy != IntervalStrategy.NO

    on_epoch_end = on_step_end


class MMSERTrainer(Trainer):
    """
    `transformers.Trainer` for `MMSERForAudioClassification`.

    Args:
        model (`MMSERForAudioClassification`): gets the class counts of the training set, if it has none.
        args (`MMSERTrainingArguments`): by default with all its defaults.
        teacher (`MMSERForAudioClassification`, *optional*): for `config.distillation_loss_weight`, on the same inputs.
        teacher_processor (`MMSERProcessor`, *optional*): that of the teacher, to be compared with the model's.
        kwargs: as for `Trainer`. `compute_metrics` defaults to the metrics of `mmser.metrics`, which also warn when
            all predictions are of one class, `processing_class` to the processor of an `MMSERDataCollator`. Call
            `finalize` after `train`.
    Raises:
        TypeError: other training arguments, whose defaults would undo the parameter groups and drop the audio.
        ValueError: a teacher without `config.distillation_loss_weight`, or the other way round, or one with other
            labels or another input than the model.
    """

    model: Any  # `MMSERForAudioClassification`, wrapped or not
    args: MMSERTrainingArguments

    def __init__(
        self,
        model=None,
        args=None,
        teacher: MMSERForAudioClassification | None = None,
        teacher_processor: MMSERProcessor | None = None,
        **kwargs,
    ):
        args = MMSERTrainingArguments() if args is None else args
        if not isinstance(args, MMSERTrainingArguments):
            raise TypeError(f"`args` must be MMSERTrainingArguments, got {type(args).__name__}.")
        collator = kwargs.get("data_collator")
        if kwargs.get("processing_class") is None and isinstance(collator, MMSERDataCollator):
            kwargs["processing_class"] = collator.processor  # what is saved without a processor cannot be used
        if kwargs.get("train_dataset") is not None and has_length(kwargs["train_dataset"]):
            args.choose_epochs(len(kwargs["train_dataset"]))
        if model is not None:
            if (teacher is None) != (model.config.distillation_loss_weight == 0):
                raise ValueError(
                    "Distillation needs both a teacher and a `distillation_loss_weight` in the configuration; got "
                    f"{'no teacher' if teacher is None else 'a teacher'} and {model.config.distillation_loss_weight}."
                )
            if teacher is not None:
                check_teacher(model.config, teacher.config, kwargs.get("processing_class"), teacher_processor)
            kwargs.setdefault("compute_metrics", build_compute_metrics(label_names_of(model.config)))
            draws = None
            if kwargs.get("train_dataset") is not None:
                draws = expected_draws(getattr(kwargs["train_dataset"], "dataset", None), args.sampling_temperature)
            if isinstance(kwargs.get("train_dataset"), EmotionDataset):
                counts = class_counts(kwargs["train_dataset"], model.config.num_labels, draws)
                if model.config.class_counts is None:
                    model.config.class_counts = counts
                elif list(model.config.class_counts) != counts:
                    logger.warning(
                        f"The focal loss weighs the classes by `config.class_counts`, {model.config.class_counts}, "
                        f"but the training set has {counts}. Set `config.class_counts = None` to have them counted."
                    )
                _fit_targets(model, kwargs["train_dataset"])
        super().__init__(model, args, **kwargs)
        self.teacher = (
            None if teacher is None else cast(Any, teacher).to(self.args.device).requires_grad_(False).eval()
        )
        self.train_outputs: dict[str, np.ndarray] | None = None
        self._loss_parts: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._is_predicting = False
        self._is_saving_checkpoint = False
        self._scalars: set[str] = set()  # parameters that FSDP wants in another shape
        self._pool: ContrastivePool | None = None  # while training with a contrastive loss
        self._spare: SpareBatch | None = None  # while training on a stream
        self._set_epoch = _SetEpoch()
        self.add_callback(self._set_epoch)
        self.training_time = TrainingTime()
        self.add_callback(self.training_time)
        self._stream_place = StreamPlace()
        self.add_callback(self._stream_place)
        self._checkpoint_files = CheckpointFiles()
        self.add_callback(self._checkpoint_files)
        self.add_callback(_LogAtSave())
        if hasattr(self.train_dataset, "set_epoch"):
            self._set_epoch.targets.append(self.train_dataset)
        self._average: WeightAverage | None = None  # while training with `args.weight_averaging`
        self._check_whole_model()
        if self.is_fsdp_enabled and model is not None:
            self._scalars = sharding.make_shardable(self.accelerator.state.fsdp_plugin, model)
        self._watch = Watch(self.train_dataset, lambda: last_complete_checkpoint(self.args.output_dir))
        self._adversary: StatePerturbation | None = None
        if self.args.adversarial != "none":
            backbone = self.accelerator.unwrap_model(self.model).base_model
            self._adversary = StatePerturbation(backbone, self.args.adversarial, self.args.adversarial_epsilon)
        self._domain_head: Any = None  # `DomainHead`, wrapped or not
        self._number_domains()
        self._check_best_metric()

    def _check_whole_model(self) -> None:
        """Refuse what is done to the weights of one model that is whole on each process, where there is none."""
        wanted = {
            "weight_averaging": self.args.weight_averaging > 0,
            "adversarial": self.args.adversarial != "none",
            "adversarial_head": self.args.adversarial_head != "none",
        }
        names = [name for name, is_wanted in wanted.items() if is_wanted]
        if names and (self._shares_weights_out or self.model_init is not None):
            raise ValueError(
                f"`{names[0]}` needs whole weights on each process, of one model from the start: it does not go "
                "with DeepSpeed, FSDP or `model_init`."
            )
        if wanted["adversarial"] and (self.args.torch_compile or self.args.n_gpu > 1):
            raise ValueError(
                "`adversarial` does not go with `torch_compile`, nor with several GPUs in one process: start one "
                "process for each, with `accelerate launch` or `torchrun`."
            )

    def _number_domains(self) -> None:
        """Let the training examples say which corpus or speaker they are from, where something asks for it."""
        config, head = getattr(self.model, "config", None), self.args.adversarial_head
        columns = {head} - {"none"}
        if config is not None and config.supervised_contrastive_loss_weight:
            columns |= {"corpus"} if config.contrastive_other_corpus_weight != 1 else set()
        for column in sorted(columns):
            if not isinstance(self.train_dataset, EmotionDataset):
                raise ValueError(
                    f"Training by {column} needs an EmotionDataset to train on, got "
                    f"{type(self.train_dataset).__name__}: the values in a stream are not known beforehand."
                )
            names = self.train_dataset.add_ids(column)
            if column == head:
                self._domain_head = self.accelerator.prepare_model(
                    DomainHead(cast(Any, config).feature_size, len(names))
                )
                self.add_callback(FreshGradients(self._domain_head))

    def train(self, *args, **kwargs):
        """
        As usual; with `args.weight_averaging` the model ends with the average (or the best of them, if wanted).

        A calibration that the model brought is forgotten: it is not that of the weights to come. See `finalize`.
        """
        self._forget_calibration()
        if self.args.should_save and self.args.save_total_limit:
            remove_half_deleted(self.args.output_dir)
        self._watch.begin()
        try:
            with self._contrastive_pool():
                train = self._train_averaged if self.args.weight_averaging else super().train
                output = train(*args, **kwargs)
        finally:
            self._watch.end()
        self._check_weights()
        if self.args.should_save:  # a run that was killed after it saved the last one has not come to that
            self._delete_older(self.args.output_dir)
        self._note_untrained_modalities()
        return output

    @contextlib.contextmanager
    def _contrastive_pool(self):
        """The contrastive loss compares more than the clips of a batch, where a step has more."""
        model = self.accelerator.unwrap_model(self.model)
        args = self.args
        is_larger = args.world_size > 1 or args.gradient_accumulation_steps > 1 or args.contrastive_memory > 0
        has_loss = model is not None and model.config.supervised_contrastive_loss_weight > 0
        if not has_loss or not is_larger or args.n_gpu > 1:
            if args.contrastive_memory:
                raise ValueError(
                    "`contrastive_memory` needs a `supervised_contrastive_loss_weight` in the configuration, and one "
                    "process for each GPU."
                )
            yield
            return
        pool = model.contrastive_pool = self._pool = ContrastivePool(args.contrastive_memory)
        self.add_callback(pool)
        try:
            yield
        finally:
            self.remove_callback(pool)
            model.contrastive_pool = self._pool = None

    def _train_averaged(self, *args, **kwargs):
        model = self.accelerator.unwrap_model(self.model).to(self.args.device)
        self._average = WeightAverage(model.parameters(), self.args.weight_averaging)
        self.add_callback(self._average)
        try:
            output = super().train(*args, **kwargs)
            if self._average is not None:
                self._average.put(self._average.averages)
        finally:
            self.remove_callback(WeightAverage)
            self._average = None
        return output

    def _with_average(self):
        """Evaluate and save what the training is for: the average, where there is one."""
        return contextlib.nullcontext() if self._average is None else self._average.applied()

    @property
    def used_modalities(self) -> list[str]:
        """Those of "audio" and "text" that decide the model's answers."""
        return self.accelerator.unwrap_model(self.model).config.used_modalities

    def _note_untrained_modalities(self) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if not self._shares_weights_out:
            model.note_untrained_modalities()
        elif self.accelerator.is_fsdp2:
            sharding.note_untrained_modalities(model)

    @property
    def _shares_weights_out(self) -> bool:
        """Whether each process holds a part of the weights."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As usual; with FSDP what is for use is saved whole, whatever checkpoints on the way are."""
        if self.is_fsdp_enabled and not self._is_saving_checkpoint:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir, _internal_call)
        if self._shares_weights_out:
            sharding.agree_on_modalities(self.accelerator.unwrap_model(self.model).config)

    def evaluation_loop(self, dataloader, *args, **kwargs):
        """As usual; the metrics have those of each corpus too, where the clips are of two or more."""
        if self.is_in_train:
            self._note_untrained_modalities()
        with self._with_average():
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        if self.compute_metrics is not None and output.predictions is not None and not self._is_predicting:
            prefix = kwargs.get("metric_key_prefix", "eval")
            own = self._corpus_metrics(dataloader.dataset, output.predictions, output.label_ids)
            output.metrics.update({f"{prefix}_{name}": value for name, value in own.items()})
        return output

    def _corpus_metrics(self, dataset, predictions, references) -> dict[str, float]:
        """`compute_corpus_metrics` of an evaluation, whose clips come in the order of `_evaluation_order`."""
        corpora = corpora_of(dataset)
        if len(set(corpora)) < 2 or not self.args.eval_do_concat_batches:
            return {}
        skipped, order = dataset.skipped, self._evaluation_order(dataset) or range(len(dataset))
        seen = [corpora[index] for index in order if not skipped[index]]
        logits = predictions[0] if isinstance(predictions, tuple) else predictions
        if len(logits) != len(seen):
            logger.warning_once(f"{len(seen)} clips but {len(logits)} answers: there are no metrics by corpus.")
            return {}
        names = label_names_of(self.accelerator.unwrap_model(self.model).config)
        return compute_corpus_metrics(logits.argmax(axis=-1), references, seen, names)

    def _check_best_metric(self) -> None:
        """Refuse a mean over corpora to choose the checkpoint by, where there are none: not after an epoch's work."""
        wanted = str(self.args.metric_for_best_model).removeprefix("eval_")
        is_used = self.args.load_best_model_at_end or self.args.save_strategy == "best"
        if wanted == MEAN_OVER_CORPORA and is_used and isinstance(self.eval_dataset, EmotionDataset):
            corpora = set(corpora_of(self.eval_dataset))
            if len(corpora) < 2:
                raise ValueError(
                    f"`metric_for_best_model` {wanted} needs validation clips of two corpora or more; these are of "
                    f"{', '.join(sorted(corpora)) or 'none that is named'}."
                )

    def _run_epoch(self, *args, **kwargs) -> None:
        """As usual; a run that goes on from its last step takes no further one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if isinstance(self.train_dataset, EmotionIterableDataset):
            self._spare = SpareBatch(self.train_dataset, self.data_collator)
            passes, batches = self._stream_place.start
            if kwargs["epoch"] < passes:
                return
            if passes or batches:
                batches = 0 if self.args.ignore_data_skip else batches
                kwargs |= {"epochs_trained": passes, "steps_trained_in_current_epoch": batches}
        super()._run_epoch(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """As usual; of a stream each process reads its own share."""
        if not is_shared_out(self.train_dataset, self.accelerator):
            return super().get_train_dataloader()
        args, own = self.args, share_out(cast(EmotionIterableDataset, self.train_dataset), self.accelerator)
        loader = DataLoader(
            own,
            self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
        )
        return self.accelerator.prepare(share_of(loader, self.accelerator))

    def _check_weights(self) -> None:
        """Raise FloatingPointError for weights that are not finite: they are never saved."""
        names = [] if self._shares_weights_out else broken_weights(self.accelerator.unwrap_model(self.model))
        if names:
            raise self._watch.weights(self.state.global_step, names)

    def _save_checkpoint(self, model, trial) -> None:
        """As usual; a checkpoint that is replaced counts as half-written from the start."""
        self._check_weights()
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
            for path in folder.glob(".tmp*"):  # of safetensors, when it was killed
                path.unlink()
        self._is_saving_checkpoint, self._checkpoint_files.folder = True, folder
        try:
            with self._with_average(), naming_full_disk(folder), without_stock_rotation():
                super()._save_checkpoint(model, trial)
        finally:
            self._is_saving_checkpoint, self._checkpoint_files.folder = False, None
        if self.args.should_save:
            self._delete_older(folder.parent)

    def _delete_older(self, output_dir: str | os.PathLike) -> None:
        """
        Delete the oldest checkpoints beyond `save_total_limit`, neither the best nor the last one; no other folder.

        The library goes by the times of folders, and takes `checkpoint-mine` for one of them.
        """
        folders, limit = checkpoints_of(output_dir), self.args.save_total_limit or 0
        kept = {folders[0]} if folders else set()
        kept |= {folder for folder in folders if str(folder) == str(Path(self.state.best_model_checkpoint or ""))}
        excess = len(folders) - max(limit, len(kept)) if limit > 0 else 0
        for folder in [each for each in reversed(folders) if each not in kept][: max(excess, 0)]:
            shutil.rmtree(folder, ignore_errors=True)

    def _save_rng_state(self, output_dir: str) -> None:
        """As usual; the files of all processes are there when the state is written, which says that they are."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def save_state(self) -> None:
        """As usual, as a whole or not at all."""
        if self.args.should_save:
            with whole_file(Path(self.args.output_dir) / TRAINER_STATE_NAME) as hidden:
                self.state.save_to_json(str(hidden))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save what is for resuming only; to it belong the weights that the optimiser last had."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self._average is not None and self.args.should_save:
            last = {str(index): weight.contiguous() for index, weight in enumerate(self._average.last)}
            with usual_mode(Path(output_dir) / WeightAverage.file_name):
                save_file(last, Path(output_dir) / WeightAverage.file_name)
        if self._domain_head is not None and self.args.should_save:
            head = self.accelerator.unwrap_model(self._domain_head)
            with usual_mode(Path(output_dir) / DomainHead.file_name):
                save_file(head.state_dict(), Path(output_dir) / DomainHead.file_name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        labels = labels_of(resume_from_checkpoint)
        own = label_names_of(self.accelerator.unwrap_model(self.model).config)
        if labels not in (None, own):
            raise ValueError(
                f"{resume_from_checkpoint} was trained on the labels {labels}, not on {own}: training "
                "cannot go on from it. Give another `output_dir`, or start from its weights with `from_pretrained`."
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        head_file = Path(resume_from_checkpoint) / DomainHead.file_name
        if head_file.exists() != (self._domain_head is not None):
            raise ValueError(
                f"{resume_from_checkpoint} was trained {'with' if head_file.exists() else 'without'} an "
                "`adversarial_head`: go on from it in the same way, or give another `output_dir`."
            )
        if self._domain_head is not None:
            self.accelerator.unwrap_model(self._domain_head).load_state_dict(load_file(head_file))
        if self._average is not None:
            self._average.restart()
            file = Path(resume_from_checkpoint) / WeightAverage.file_name
            if file.exists():  # else the checkpoint was made without an average, which begins here
                last = load_file(file)
                self._average.put(last[str(index)] for index in range(len(last)))

    def _issue_warnings_after_load(self, load_result) -> None:
        """As usual; a checkpoint with adapters leaves out the encoders, which the model already has."""
        if self.accelerator.unwrap_model(self.model).config.lora is not None:
            missing = [name for name in load_result.missing_keys if "_encoder." not in name or ".lora_" in name]
            load_result = load_result._replace(missing_keys=missing)
        super()._issue_warnings_after_load(load_result)

    def _load_best_model(self) -> None:
        if self._average is not None:  # the best checkpoint is one too, and stays if it is found
            self._average.put(self._average.averages)
            self._average = None
        super()._load_best_model()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build AdamW (or `args.optim`) over the published parameter groups and log their sizes."""
        if self.optimizer is None:
            model = cast(PreTrainedModel, self.model if model is None else model)
            groups = parameter_groups(
                model,
                learning_rate=self.args.learning_rate,
                lr_multipliers=getattr(self.args, "lr_multipliers", None),
                weight_decay=self.args.weight_decay,
            )
            for name in dict.fromkeys(group["name"] for group in groups):
                own = [group for group in groups if group["name"] == name]
                size = sum(parameter.numel() for group in own for parameter in group["params"])
                decay = max(group["weight_decay"] for group in own)
                logger.debug(
                    f"Parameter group {name}: {size:,} parameters, lr {own[0]['lr']:.2e}, weight decay {decay}"
                )
            if self._domain_head is not None:
                own = list(self._domain_head.parameters())
                lr = self.args.learning_rate
                groups.append({"name": "adversarial_head", "params": own, "lr": lr, "weight_decay": 0.0})
            optimizer_class, optimizer_kwargs = cast(Any, self).optimizer_cls_and_kwargs or (
                self.get_optimizer_cls_and_kwargs(self.args, model)
            )
            self.optimizer = optimizer_class(groups, **optimizer_kwargs)
            if self.is_fsdp_enabled and self.args.save_strategy != "no":
                sharding.check_resumable(self.optimizer)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As usual; each clip of a step counts once, and as much as any other. A loss of the user's own sees to it."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if isinstance(self.train_dataset, EmotionIterableDataset):
            batches = [] if self._spare is None else fill_up(batches, num_batches, self._spare, self.accelerator)
            self._spare = self._spare if batches else None  # the epoch has ended, on all processes
            self._stream_place.batches += len(batches)
        loader = self.accelerator.gradient_state.active_dataloader
        if loader is not None and loader.remainder < 0 and has_length(self.train_dataset):
            # Accelerate does not know it in the epoch within which a run goes on
            size = self._train_batch_size * self.args.world_size
            loader.remainder = 0 if self.args.dataloader_drop_last else len(self.train_dataset) % size
        if self.compute_loss_func is None:
            weigh_batches(batches, self.accelerator)
        self._watch.batches = batches
        return batches, num_items_in_batch

    def _clip_grad_norm(self, model):
        """As usual; gradients that are not finite stay as they are, to be told apart."""
        norm = self._own_norm(model)
        if norm is None:
            return super()._clip_grad_norm(model)
        if norm.isfinite():
            nn.utils.clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model, grad_norm=None):
        """As usual; a gradient that is not finite is an error before it changes a weight."""
        own = self._own_norm(model) if grad_norm is None else None
        norm = super()._get_grad_norm(model, grad_norm if own is None else own)
        if not self.is_deepspeed_enabled:  # it scales the loss itself
            unwrapped, scaler = self.accelerator.unwrap_model(self.model), self.accelerator.scaler
            error = self._watch.gradient(float(norm), self.state.global_step + 1, unwrapped, scaler is not None)
            if error is not None:
                raise error
        return norm

    def _own_norm(self, model) -> torch.Tensor | None:
        """The norm of the gradient, without any change to it; None if other code has to find it."""
        if self._shares_weights_out or is_torch_xla_available() or self._has_mixed_mesh_grads(model):
            return None
        self.accelerator.unscale_gradients()
        return nn.utils.get_total_norm([weight.grad for weight in model.parameters() if weight.grad is not None])

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As usual; with `args.adversarial` two passes, see `StatePerturbation`."""
        if self._adversary is None:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._with_teacher_logits(self._prepare_inputs(inputs))
        step = functools.partial(super().training_step, model, inputs, num_items_in_batch)

        def predict() -> torch.Tensor:  # with labels too: all that is drawn at random is drawn as in the other passes
            own = {name: value for name, value in inputs.items() if name not in NO_INPUTS}
            with self.compute_loss_context_manager():
                return self.accelerator.unwrap_model(model)(**own).logits

        # The gradients over processes are reduced once, after the second pass
        return self._adversary.step(step, self.accelerator.no_sync(model), predict)

    @torch.no_grad()
    def _with_teacher_logits(self, inputs):
        if self.teacher is None or "teacher_logits" in inputs:
            return inputs
        own = {name: value for name, value in inputs.items() if name not in (*TARGET_NAMES, *ID_NAMES)}
        return {**inputs, "teacher_logits": self.teacher(**own).logits}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss; its parts are kept for the log, and a part that is not finite is an error naming it."""
        domains = {name: inputs[name] for name in ID_NAMES if name in inputs}
        weight = inputs.get(WEIGHT_NAME, 1.0)
        batch, inputs = inputs, {name: value for name, value in inputs.items() if name not in NO_INPUTS}
        if self._pool is not None:
            self._pool.is_spare = weight == 0
        inputs = self._with_teacher_logits(inputs)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        parts = outputs.get("losses") or {"loss": loss.detach()}  # a `compute_loss_func` makes a loss without parts
        if model.training and self._adversary is not None:
            loss = self._adversary.loss(loss, outputs["logits"])
            if self._adversary.is_attacking:
                loss = self.args.adversarial_weight * loss
                parts = {"adversarial": loss.detach()}
        if model.training and self._domain_head is not None and "adversarial" not in parts:
            strength = reversal_strength(self.state.global_step / max(1, self.state.max_steps))
            strength *= self.args.adversarial_head_weight
            own = self._domain_head(outputs["features"], domains[f"{self.args.adversarial_head}_ids"], strength)
            loss, parts = loss + own, parts | {"adversarial_head": own.detach()}
        try:
            check_finite_losses(parts)
        except FloatingPointError as error:
            raise self._explained(error, batch, inputs, outputs.get("logits")) from error
        if model.training and "losses" in outputs:
            for name, value in parts.items():
                self._loss_parts[name].append(weight * value)
        loss = weight * loss
        return (loss, outputs) if return_outputs else loss

    def _explained(self, error: FloatingPointError, batch, inputs, logits) -> FloatingPointError:
        """The error of a loss that is not finite, with where it comes from."""
        model, step = self.accelerator.unwrap_model(self.model), self.state.global_step + 1

        def run() -> None:
            with self.compute_loss_context_manager():
                model(**inputs)

        return self._watch.loss(str(error), step, model, batch, logits, run)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each part of the loss since the last log line."""
        if "loss" in logs and self._loss_parts:
            for name, values in self._loss_parts.items():
                mean = self.accelerator.reduce(torch.stack(values).mean(), reduction="mean")
                logs[f"loss_{name}"] = round(mean.item(), 4)
            self._loss_parts.clear()
        if "train_loss" in logs:
            logs["train_loss"] = self._whole_train_loss(logs["train_loss"])
        super().log(logs, start_time)

    def _whole_train_loss(self, mean: float) -> float:
        """The mean loss of all steps, by that of the steps since a checkpoint and by the lines of the log before."""
        before, step = self._initial_global_step, 0.0
        total = mean * (self.state.global_step - before)
        for entry in self.state.log_history:
            if "loss" in entry and entry["step"] <= before:
                total += entry["loss"] * (entry["step"] - step)
                step = entry["step"]
        counted = self.state.global_step - before + step  # of a run without a log, the steps since the checkpoint
        return round(total / max(counted, 1), 6)

    def _get_train_sampler(self, train_dataset=None):
        """
        Group clips of similar length without reading them twice: their lengths come from the file headers. A data set
        that has no `lengths` is shuffled. All processes have the same order, of which each takes its share.
        """
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        drawn = None
        if self.args.sampling_temperature is not None:
            table = getattr(dataset, "dataset", None)
            weights = cast(np.ndarray, expected_draws(table, self.args.sampling_temperature))
            drawn = TemperatureSampler(number_groups(table), weights, seed)
        if self.args.train_sampling_strategy != "group_by_length":
            if drawn is not None:
                self._set_epoch.targets.append(drawn)
            return super()._get_train_sampler(train_dataset) if drawn is None else drawn
        if not hasattr(dataset, "lengths"):
            return RandomSampler(dataset) if has_length(dataset) else None
        # All that one step of the optimiser sees, so that it does not matter by how many processes it is seen
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        sampler = LengthGroupedSampler(batch_size, dataset.lengths, seed, drawn=drawn)
        self._set_epoch.targets.append(sampler)
        return sampler

    def _get_eval_sampler(self, eval_dataset):
        return self._evaluation_order(eval_dataset)

    def _evaluation_order(self, dataset) -> list[int] | None:
        """
        From the longest clip to the shortest: hardly any padding, and memory that is too small fails at once. None
        for the order of the data set: if no lengths are known, or the results are to be left in batches or in part.
        """
        if not self.args.eval_do_concat_batches or self.args.dataloader_drop_last:
            return None
        return evaluation_order(dataset)

    def predict(self, test_dataset, *args, **kwargs):
        """
        As usual, in the order of the data set, which is not that in which its clips are evaluated: `compute_metrics`
        gets them from the longest to the shortest. Rows that could not be read are left out.
        """
        output = super().predict(test_dataset, *args, **kwargs)
        order = self._evaluation_order(test_dataset)
        if order is None:
            return output
        skipped = getattr(test_dataset, "skipped", np.zeros(len(order), dtype=bool))
        place = np.argsort([index for index in order if not skipped[index]])

        def reordered(values):
            if values is None or isinstance(values, tuple):
                return None if values is None else tuple(map(reordered, values))
            if isinstance(values, dict):
                return {name: reordered(value) for name, value in values.items()}
            if len(values) != len(place):
                raise ValueError(
                    f"{len(place)} of {len(order)} clips could be read but there are {len(values)} results, which "
                    "cannot be told apart. Leave bad rows out first, with `drop_unreadable`."
                )
            return values[place]

        return output._replace(predictions=reordered(output.predictions), label_ids=reordered(output.label_ids))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """
        Save as usual, with the training arguments as JSON in place of a pickle. What training goes on from keeps its
        adapters; a model for use has them merged, if `config.lora` says so, and replaces an earlier one when all of it
        is written, the weights last.
        """
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if self._is_saving_checkpoint:  # its state, which comes last, says that it is whole
            self._write_model(folder, state_dict)
        else:
            with files_together(folder, last=WEIGHT_FILES) as hidden:
                self._write_model(hidden, state_dict)

    def _write_model(self, folder: Path, state_dict: dict | None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if state_dict is not None and self.is_fsdp_enabled:
            state_dict = sharding.whole_weights(state_dict, self._scalars)
        adapters = getattr(model.config, "lora", None)
        if adapters is not None and adapters["save"] == "merged" and not self._is_saving_checkpoint:
            weights = model.state_dict() if state_dict is None else state_dict
            state_dict = merged_weights(weights, adapters["alpha"] / adapters["rank"])
        with sharding.own_class(model), without_bars_of_weights():
            super()._save(str(folder), state_dict)
        if self.processing_class is None:
            logger.warning_once(
                "Checkpoints are saved without a processor, and pipelines cannot load them: give the trainer "
                "`processing_class=processor`, or call `processor.save_pretrained` with the same folder."
            )
        if self.args.should_save:
            (folder / "training_args.bin").unlink(missing_ok=True)
            (folder / "training_args.json").write_text(self.args.to_json_string(), encoding="utf-8")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a new checkpoint in the background, as usual, but with its code and without a pickle of arguments."""
        args, previous = self.args, cast(Any, self).push_in_progress
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        running: Any = [job for job in previous.jobs if not job.done()] if previous is not None else []
        if running and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        for file in Path(checkpoint_folder).iterdir():
            # Those that are left out are for resuming only
            resuming_only = (WeightAverage.file_name, DomainHead.file_name)
            if file.is_file() and file.suffix not in (".bin", ".pt", ".pth") and file.name not in resuming_only:
                shutil.copy(file, args.output_dir)
        # The pickle may be there for a moment: `_save` lets the stock method write it first
        uploads: list[tuple[Any, str | None, list[str] | None]] = [
            (args.output_dir, None, ["_*", ".*", f"{PREFIX_CHECKPOINT_DIR}-*", "training_args.bin"])
        ]
        if args.hub_strategy == HubStrategy.CHECKPOINT:
            uploads.append((checkpoint_folder, "last-checkpoint", None))
        elif args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
            uploads.append((checkpoint_folder, Path(checkpoint_folder).name, None))
        for folder, path_in_repo, ignored in uploads:
            job = upload_folder(
                repo_id=str(self.hub_model_id),
                folder_path=folder,
                path_in_repo=path_in_repo,
                ignore_patterns=ignored,
                commit_message=f"Training in progress, step {self.state.global_step}",
                token=args.hub_token,
                revision=args.hub_revision,
                run_as_future=True,
            )
            running.append(job)
        cast(Any, self).push_in_progress = PushInProgress(running)  # the library types it as None

    def create_model_card(self, *args, **kwargs) -> None:
        """Keep the card that `train_hf.py` writes; without one, let Transformers write its own."""
        path = Path(self.args.output_dir) / CARD_NAME
        if self.is_world_process_zero() and not path.exists():
            super().create_model_card(*args, **kwargs)
            write_atomically(path, sign_card(path.read_text(encoding="utf-8")))  # the card of a run may replace it

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As usual; while `predict_outputs` runs, labels pass by the model, so they may be -1 (no known class)."""
        inputs = {name: value for name, value in inputs.items() if name not in ID_NAMES}
        labels = inputs.pop("labels") if self._is_predicting else None
        if self._is_predicting:
            for name in TARGET_NAMES:
                inputs.pop(name, None)
        loss, outputs, model_labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if loss is not None and is_filled_up(self.accelerator):  # the outputs are told apart later, a mean cannot be
            own = first_clips(inputs, count_own_clips(inputs, self.accelerator))
            loss = super().prediction_step(model, own, True)[0]
        return loss, outputs, model_labels if labels is None else labels

    def predict_outputs(self, dataset) -> dict[str, np.ndarray]:
        """
        Run the model over a data set, on all processes.

        Returns: `logits` [N, C], `uncertainty` [N], `features` [N, F], `fused` [N, D], `anchor_distances` [N, C],
            `labels` [N] and, once OpenMax is fitted, `unknown_probability` [N], `rejection_score` [N] and, if it
            rejects, `is_unknown` [N]; for each task beside the emotion `auxiliary_<task>`, logits [N, K] or values
            [N]; all in the order of the data set.
        """
        model = self.accelerator.unwrap_model(self.model)
        wanted = ["logits", "uncertainty", "features", "fused", "anchor_distances"]
        if model.openmax.is_fitted and model.config.use_openmax:
            wanted += ["unknown_probability", "rejection_score"]
            if model.config.openmax_threshold is not None:
                wanted.append("is_unknown")
        wanted += ["auxiliary"] if model.config.auxiliary_tasks else []
        ignored = [output.name for output in fields(MMSEROutput) if output.name not in wanted]
        # What is fitted and scored needs every clip, in one piece, whatever the batches of the training are
        drop_last, concatenate = self.args.dataloader_drop_last, self.args.eval_do_concat_batches
        self.args.dataloader_drop_last, self.args.eval_do_concat_batches = False, True
        compute_metrics, self.compute_metrics, self._is_predicting = self.compute_metrics, None, True
        # The trackers of --report_to would take it for a run of its own, after that of the training
        callbacks, trackers = (
            self.callback_handler.callbacks,
            tuple(get_reporting_integration_callbacks(self.args.report_to)),
        )
        self.callback_handler.callbacks = [each for each in callbacks if not isinstance(each, trackers)]
        try:
            prediction = self.predict(dataset, ignore_keys=ignored)
        finally:
            self.callback_handler.callbacks = callbacks
            self.compute_metrics, self._is_predicting = compute_metrics, False
            self.args.dataloader_drop_last, self.args.eval_do_concat_batches = drop_last, concatenate
        outputs = dict(zip(wanted, prediction.predictions, strict=True))
        outputs |= {f"auxiliary_{task}": values for task, values in outputs.pop("auxiliary", {}).items()}
        for name in ("uncertainty", "unknown_probability", "rejection_score"):
            if name in outputs:
                outputs[name] = outputs[name][:, 0]
        outputs["labels"] = prediction.label_ids
        return outputs

    def fit_standardization(self, dataset) -> None:
        """`MMSERModel.fit_standardization` over a data set, the same on every process."""
        collate, batch_size = self.data_collator, self.args.per_device_eval_batch_size
        workers, order = self.args.dataloader_num_workers, evaluation_order(dataset)
        loader = DataLoader(dataset, batch_size, sampler=order, collate_fn=collate, num_workers=workers)
        backbone = self.accelerator.unwrap_model(self.model).base_model
        backbone.to(self.args.device).fit_standardization(loader)

    def finalize(
        self,
        train_dataset,
        calibration_dataset=None,
        train_audio_alone: tuple[Any, np.ndarray] | None = None,
        calibration_audio_alone: tuple[Any, np.ndarray] | None = None,
    ) -> dict[str, float]:
        """
        Make the trained model ready for use: OpenMax from the training clips, the rest from held-out ones.

        The training clips' outputs are kept in `train_outputs`, for a linear probe on the same features.

        Args:
            train_dataset: the training clips without augmentation.
            calibration_dataset: held-out clips (never the test split); without them the temperature stays 1, the
                uncertainty is the head's own, and OpenMax knows only how far training clips lie from their class.
            train_audio_alone, calibration_audio_alone: of `audio_alone` in `mmser.scores`, the same clips without
                their text and their positions. Without them, OpenMax rejects what comes without its transcript.

        Returns: as `calibrate`.
        """
        self._forget_calibration()
        self.train_outputs = self.predict_outputs(train_dataset)
        if calibration_dataset is not None:
            return self.calibrate(calibration_dataset, calibration_audio_alone, train_audio_alone)
        alone = self.predict_audio_alone(self.train_outputs, train_audio_alone)
        model = self.accelerator.unwrap_model(self.model)
        fit_openmax(model, join_audio_alone(self.train_outputs, None, alone), None, 1.0)
        return {"temperature": 1.0}

    def calibrate(
        self,
        calibration_dataset,
        audio_alone: tuple[Any, np.ndarray] | None = None,
        train_audio_alone: tuple[Any, np.ndarray] | None = None,
    ) -> dict[str, float]:
        """
        Fit to held-out clips what says how far to trust an answer: the temperature, the probability of an error, the
        prediction sets, the distances at which OpenMax begins to doubt, and the thresholds of rejection.

        Args:
            calibration_dataset: clips that were not trained on, and are not those of the final evaluation. What they
                cannot show to be better keeps its former value: at first a temperature of 1, and an uncertainty of
                1 - max probability.
            audio_alone, train_audio_alone: of `audio_alone` in `mmser.scores`, for OpenMax. Whether clips without
                their text count as known is decided by the held-out ones, where there are some.

        Returns: `temperature`; `clips`, `speakers` (None if not known) and `errors`, and the `error_rate_interval`
            that these allow; the `largest_set_coverage` that these speakers (or clips) allow for prediction sets; NLL
            and expected calibration error `_before` and `_after` on these clips; whether the
            uncertainty `uses_one_minus_max`; the AUROC with which wrong answers are told from right ones, by the
            uncertainty before and after, and by 1 - max probability.
        """
        model = self.accelerator.unwrap_model(self.model)
        earlier = reset_calibration(model)
        outputs = self.predict_outputs(calibration_dataset)
        # All that OpenMax is fitted to is predicted before there is a temperature
        alone, train = self.predict_audio_alone(outputs, audio_alone), self.train_outputs
        if train is not None:
            is_known = None if audio_alone is None else alone is not None
            train = join_audio_alone(train, None, self.predict_audio_alone(train, train_audio_alone, is_known))
        return calibrate_outputs(model, outputs, speakers_of(calibration_dataset), earlier, train, alone)

    def predict_audio_alone(
        self,
        outputs: dict[str, np.ndarray],
        audio_alone: tuple[Any, np.ndarray] | None,
        is_known: bool | None = None,
    ) -> dict[str, np.ndarray] | None:
        """
        Outputs of clips without their text, and the `index` of each among `outputs`, which are those with it.

        Args:
            is_known: whether such clips are examples of what is known; None if these are to decide it: they are if the
                model is right without the text nearly as often as with it.

        Returns: None without such clips, and where they are no examples.
        """
        if audio_alone is None or is_known is False:
            return None
        dataset, index = audio_alone
        alone = self.predict_outputs(dataset)
        if is_known is None:
            right, right_alone = (each["logits"].argmax(axis=1) == each["labels"] for each in (outputs, alone))
            is_known = right_alone.mean() >= RIGHT_WITHOUT_TEXT * right[index].mean()
        return {**alone, "index": index} if is_known else None

    def _forget_calibration(self) -> None:
        """Forget all that was fitted to outputs: a model may bring it from an earlier training."""
        model = self.accelerator.unwrap_model(self.model)
        reset_calibration(model)
        model.openmax.reset()
        self.train_outputs = None


def _fit_targets(model: MMSERForAudioClassification, dataset: EmotionDataset) -> None:
    """Tell the heads of tasks beside the emotion the unit of their targets; warn of a task without any."""
    targets = split_targets(dataset.dataset)
    model.auxiliary.fit_targets(targets)
    missing = [task for task in model.config.auxiliary_tasks if task not in targets]
    if missing:
        logger.warning(
            f"The training set has no targets of {', '.join(missing)}, which the model will not learn: load it with "
            "`auxiliary_tasks=model.config.auxiliary_tasks`, and see `derive_targets` of `mmser.targets`."
        )


@contextlib.contextmanager
def without_stock_rotation():
    """Let the library save a checkpoint without deleting others."""
    stock = transformers.trainer.rotate_checkpoints
    transformers.trainer.rotate_checkpoints = lambda *_, **__: None
    try:
        yield
    finally:
        transformers.trainer.rotate_checkpoints = stock


def checkpoints_of(output_dir: str | os.PathLike) -> list[Path]:
    """The folders of checkpoints, whole or not, the newest first."""
    folders = {
        int(step): folder
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (step := folder.name.rsplit("-", 1)[1]).isdigit()
    }
    return [folders[step] for step in sorted(folders, reverse=True)]


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has its state, which the trainer writes last, and the files that this names."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        callbacks = state.get("stateful_callbacks", {})  # without the files if an earlier version wrote it
        files = callbacks.get(CheckpointFiles.__name__, {}).get("attributes", {}).get("files", {})
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError):
        return False


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest whole checkpoint in `output_dir`: a run may be killed while it saves or deletes one."""
    return next((str(folder) for folder in checkpoints_of(output_dir) if is_complete(folder)), None)


def remove_half_deleted(output_dir: str | os.PathLike) -> None:
    """Delete the rest of checkpoints whose deletion was interrupted: those before a whole one that are not whole."""
    folders = checkpoints_of(output_dir)
    newest = next((place for place, folder in enumerate(folders) if is_complete(folder)), len(folders))
    for folder in folders[newest + 1 :]:
        if not is_complete(folder):
            logger.info(f"{folder} was being deleted when its run was stopped: the rest of it is deleted.")
            shutil.rmtree(folder)


def labels_of(checkpoint: str | os.PathLike) -> list[str] | None:
    """The labels of a saved model in the order of their ids; None if its folder does not tell."""
    try:
        names = json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))["id2label"]
    except (OSError, ValueError, KeyError):
        return None
    return [names[key] for key in sorted(names, key=int)]
