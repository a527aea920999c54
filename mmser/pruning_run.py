# SPDX-License-Identifier: Apache-2.0
"""`export_hf.py --prune`: the clips that decide what goes, and the training after it."""

import tempfile
from collections.abc import Callable
from typing import Any

from transformers import set_seed
from transformers.utils import logging

from mmser.arguments import DataArguments, ExportArguments
from mmser.batches import MMSERDataCollator
from mmser.examples import EmotionDataset
from mmser.pruning import prune
from mmser.training_arguments import MMSERTrainingArguments
from mmser.training_run import Examples, TrainingData, leave_out_unreadable, load_data, make_trainer, some_clips, train
from modeling_mmser import MMSERForAudioClassification
from processing_mmser import MMSERProcessor

logger = logging.get_logger(__name__)
Change = Callable[[MMSERForAudioClassification, MMSERProcessor], str]


def pruner(options: ExportArguments, data_arguments: DataArguments) -> Change:
    """
    What `export_checkpoint` is to do to the model before it is written.

    Raises:
        ValueError: pruning without data.
    """
    if not data_arguments.name:
        raise ValueError("--prune and --prune_layers choose by clips: add --data_dir, --manifest or --dataset_name.")
    if data_arguments.streaming:
        raise ValueError("--prune and --prune_layers choose clips from all over the data: leave out --streaming.")
    return lambda model, processor: prune_and_recover(model, processor, options, data_arguments)


def prune_and_recover(
    model: MMSERForAudioClassification,
    processor: MMSERProcessor,
    options: ExportArguments,
    data_arguments: DataArguments,
) -> str:
    """Prune in place by training clips, and train what is left for some epochs. Returns what was done, in words."""
    set_seed(options.seed)
    data = load_data(data_arguments, options.seed, options.model_name_or_path)
    data.splits.pop("test", None)
    if not options.recovery_epochs:
        data.splits = {"train": some_clips(data.splits["train"], options.calibration_clips)}
    leave_out_unreadable(data, data_arguments, processor)
    with tempfile.TemporaryDirectory() as folder:
        arguments = _training_arguments(options, folder)
        examples = Examples(data_arguments, arguments, model, processor)
        chosen = some_clips(data.splits["train"], options.calibration_clips)
        clips: Any = EmotionDataset(chosen, **examples.options)
        collate = MMSERDataCollator(processor)
        batches = (collate([clips[index]]) for index in range(len(clips)))
        report = prune(model, batches, options.prune, options.prune_layers)
        lines = [str(report), f"  by {len(clips)} clips of {data_arguments.name}"]
        if options.recovery_epochs:
            lines.append(_recover(model, processor, data, data_arguments, arguments, options))
    return "\n".join(lines)


def _training_arguments(options: ExportArguments, folder: str) -> MMSERTrainingArguments:
    shared: dict[str, Any] = {
        "learning_rate": options.learning_rate,
        "per_device_train_batch_size": options.per_device_train_batch_size,
        "use_cpu": options.use_cpu,
        "seed": options.seed,
    }
    return MMSERTrainingArguments(
        output_dir=folder,
        num_train_epochs=options.recovery_epochs,
        dataloader_num_workers=0,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        **shared,
    )


def _recover(
    model: MMSERForAudioClassification,
    processor: MMSERProcessor,
    data: TrainingData,
    data_arguments: DataArguments,
    arguments: MMSERTrainingArguments,
    options: ExportArguments,
) -> str:
    """Train the pruned model as `train_hf.py` would, then calibrate it and fit OpenMax anew."""
    if options.freeze_audio:
        model.freeze_audio_encoder()
    if options.freeze_text:
        model.freeze_text_encoder()
    weight, model.config.distillation_loss_weight = model.config.distillation_loss_weight, 0.0  # there is no teacher
    examples = Examples(data_arguments, arguments, model, processor)  # its cache is that of the pruned encoders
    trainer = make_trainer(model, None, processor, data, examples, arguments)
    results = train(trainer, data, examples, 0, None)
    model.config.distillation_loss_weight = weight
    model.requires_grad_(True).eval().to("cpu")
    loss = results["training"].get("train_loss")
    return f"  trained again for {options.recovery_epochs:g} epochs on {data_arguments.name}, mean loss {loss:.3f}"
