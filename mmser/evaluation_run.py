# SPDX-License-Identifier: Apache-2.0
"""The steps of `eval_hf.py`: clips, groups, what the model says of them, calibration."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers.utils import logging

from configuration_mmser import MMSERConfig
from mmser.arguments import COMPARED_GROUPS, SPLITS, EvaluationArguments, SourceArguments
from mmser.bad_rows import BadRows
from mmser.batches import MMSERDataCollator
from mmser.console import without_bars_of_weights
from mmser.division import divide_again, learnt_validation
from mmser.examples import EmotionDataset, drop_unreadable
from mmser.files import files_together
from mmser.groups import duration_bands, split_groups, split_speakers
from mmser.loading import draw_clips, load_emotion_dataset, load_emotion_split
from mmser.log_mel_probe import log_mel_probe
from mmser.model_loading import let_go_of_files
from mmser.names import Named, reading
from mmser.progress import calm, stage
from mmser.report import Measured
from mmser.results import describe_data, environment, reproducible
from mmser.scores import audio_alone, evaluate_augmentation, number_predictions, predict_clips, predict_rows
from mmser.sources import OTHER
from mmser.targets import derive_targets, split_targets
from mmser.trainer import WEIGHT_FILES, MMSERTrainer
from mmser.training_arguments import MMSERTrainingArguments
from modeling_mmser import MMSERForAudioClassification
from processing_mmser import MMSERProcessor

logger = logging.get_logger(__name__)
ALL = "all"  # what the only split of undivided data is called here
MIN_CALIBRATION_CLIPS = 19  # with fewer there is no threshold that accepts 95 % of the clips to come


@dataclass
class Clips:
    """The tables that one evaluation needs: `evaluated` is the split `split`; the others may be missing."""

    split: str
    evaluated: datasets.Dataset
    train: datasets.Dataset | None
    calibration: datasets.Dataset | None
    unknown: dict[str, datasets.Dataset]


def load_clips(
    source: SourceArguments, arguments: EvaluationArguments, label_names: list[str], config: MMSERConfig | None = None
) -> Clips:
    """
    Load what is needed, and nothing else; what is missing or does not fit is an error here. The targets of the tasks
    of `config` are loaded as far as the data have them; what was derived from the emotion in training is here too.
    """
    tasks = {} if config is None else config.auxiliary_tasks
    wanted = [name for name in arguments.group_by or [] if name != "duration"]

    def load(rule: BadRows, **division: Any) -> Any:
        options: Any = {"extra_columns": wanted, "auxiliary_tasks": tasks, "for_training": False, **division}
        given = {**source.source, "on_bad_example": rule}
        return load_emotion_dataset(**given, label_names=label_names, **options)[0]

    with reading(source.on_the_hub):
        splits = load(source.bad_rows, validation_fraction=0.0, test_fraction=0.0)
        known = {name: table for name, table in splits.items() if name != OTHER}
        learnt = learnt_validation(arguments.model_name_or_path)
        if set(known) == {"train"} or learnt:
            again = partial(load, BadRows(source.on_bad_example))  # the bad rows are noted by now
            undivided = datasets.concatenate_datasets(list(known.values()))
            divided = divide_again(undivided, arguments.model_name_or_path, again)
            if divided is None and learnt and "validation" in known:
                logger.warning(
                    f"{arguments.model_name_or_path} learnt from the validation clips of its data too. These "
                    "are not all of the same clips: if its validation clips are among them, scores and calibration "
                    "on these are too good."
                )
            splits = divided or splits
    if tasks and config is not None:
        splits, _ = derive_targets(splits, label_names, tasks, config.auxiliary_label_maps, has_default=False)
    other = splits.pop(OTHER, None)
    if arguments.split is None and list(splits) == ["train"]:  # not divided into splits
        splits = {ALL: splits["train"]}
    split = arguments.split or next(name for name in (*SPLITS, ALL) if name in splits)
    if split not in splits:
        raise ValueError(f"{source.name} has no {split} split (--split); it has: {', '.join(splits)}.")
    calibration = None
    if arguments.calibrate:
        calibration = splits.get(arguments.calibration_split)
        if calibration is None:
            raise ValueError(
                f"--calibrate needs held-out clips, but {source.name} has no {arguments.calibration_split} split "
                f"(--calibration_split); it has: {', '.join(splits)}."
            )
        if arguments.calibration_split == split:
            raise ValueError(
                f"--calibrate must not use the clips that are evaluated, and both are the {split} split: choose "
                "another one with --split or --calibration_split."
            )
        if len(calibration) < MIN_CALIBRATION_CLIPS:
            raise ValueError(
                f"--calibrate needs {MIN_CALIBRATION_CLIPS} clips or more; the {arguments.calibration_split} split of "
                f"{source.name} has {len(calibration)}."
            )
    train = splits.get("train") if split != "train" else None
    if arguments.log_mel_probe:
        check_log_mel_probe(splits[split], train, source.name)
    unknown = load_unknown(arguments.ood_dir or [], source, label_names)
    if OTHER in unknown and other is not None:
        raise ValueError(f"--ood_dir: the name {OTHER!r} is that of the clips which --label_map takes out; rename it.")
    unknown |= {} if other is None else {OTHER: other}
    return Clips(
        split=split,
        evaluated=draw_clips(splits[split], source.max_eval_samples, arguments.seed),
        train=None if train is None else draw_clips(train, arguments.max_train_samples, arguments.seed),
        calibration=calibration,
        unknown={name: draw_clips(table, source.max_eval_samples, arguments.seed) for name, table in unknown.items()},
    )


def check_log_mel_probe(evaluated: datasets.Dataset, train: datasets.Dataset | None, name: str) -> None:
    """Refuse --log_mel_probe where there is nothing to learn from or to hear."""
    if train is None:
        raise ValueError(f"--log_mel_probe learns from training clips, and {name} has none beside the evaluated ones.")
    for split in (train, evaluated):
        if "audio" not in split.column_names or not any(split["audio"]):
            raise ValueError(f"--log_mel_probe needs audio in the training and the evaluated clips of {name}.")
    heard = {label for label, audio in zip(train["labels"], train["audio"], strict=True) if audio}
    if len(heard) < 2:
        raise ValueError(f"--log_mel_probe needs training clips with audio of two classes; {name} has {len(heard)}.")


def load_unknown(folders: list[str], source: SourceArguments, label_names: list[str]) -> dict[str, datasets.Dataset]:
    """One table for each open-set folder, named after it; clips in them that have one of the classes are left out."""
    paths = [Path(folder).resolve() for folder in folders]
    tables = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"--ood_dir {path} does not exist.")
        is_alone = sum(other.name == path.name for other in paths) == 1
        name = path.name if is_alone else "/".join(path.parts[-2:])
        if name in tables or name == "mean":  # the report has a row of that name
            raise ValueError(f"--ood_dir {path}: the name {name!r} is taken in the report; rename the folder.")
        table = load_emotion_split(path, label_names=label_names, **source.of_further_clips)
        rows = [index for index, label in enumerate(table["labels"]) if label < 0]
        if not rows:
            raise ValueError(f"--ood_dir {path}: all of its clips have one of the classes {', '.join(label_names)}.")
        if len(rows) < len(table):
            logger.warning(f"{path}: left out {len(table) - len(rows)} clips that have one of the classes.")
        tables[name] = table.select(rows)
    return tables


def check_clips(clips: Clips, on_bad_example: BadRows, **reader_options) -> Clips:
    """Try every clip once: unreadable ones are an error, or are left out (`on_bad_example`)."""

    def check(table: datasets.Dataset | None) -> datasets.Dataset | None:
        return None if table is None else drop_unreadable(table, on_bad_example=on_bad_example, **reader_options)

    unknown = {name: check(table) for name, table in clips.unknown.items()}
    return Clips(clips.split, check(clips.evaluated), check(clips.train), check(clips.calibration), unknown)


def group_clips(dataset: EmotionDataset, names: list[str] | None) -> dict[str, list[str]]:
    """The groups to compare: those that were asked for, or those in which the clips differ."""
    groups = split_groups(dataset.dataset, names or COMPARED_GROUPS)
    has_audio = "audio" in dataset.dataset.column_names
    if "duration" in (names or ()) and not has_audio:
        raise ValueError("--group_by duration needs audio, and these data have none.")
    if "duration" in (names or COMPARED_GROUPS) and has_audio:
        rate = dataset.reader.sampling_rate
        lengths = dataset.lengths
        bands = duration_bands([length / rate for length in lengths])
        groups["duration"] = [band if length else "no audio" for band, length in zip(bands, lengths, strict=True)]
    order = names or COMPARED_GROUPS
    return {name: groups[name] for name in order if name in groups and (names or len(set(groups[name])) > 1)}


@without_bars_of_weights()
def store_calibration(
    model: MMSERForAudioClassification, processor: MMSERProcessor, arguments: EvaluationArguments, changed: bool = True
) -> Path:
    """
    Save the calibrated model: into the checkpoint's own folder, or into the output folder if it is on the Hub. The
    checkpoint's own folder stays as it is if calibrating has not `changed` the model.
    """
    folder = Path(arguments.model_name_or_path)
    if not folder.is_dir():
        folder = Path(str(arguments.output_dir)) / "checkpoint"
        with files_together(folder, last=WEIGHT_FILES) as hidden:
            model.save_pretrained(hidden)
            processor.save_pretrained(hidden)
        return folder
    if not changed:
        logger.info(f"Calibrating changed nothing: {folder} is as it was.")
        return folder
    let_go_of_files(model)  # of the one that is about to be replaced
    # The code too: older code might read the calibration in another way
    with files_together(folder, last=WEIGHT_FILES) as hidden, tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(hidden)
        processor.save_pretrained(temporary)  # of this only the code
        for file in Path(temporary).glob("*.py"):
            shutil.copy(file, hidden)
    logger.info(f"The calibrated checkpoint is in {folder}")
    return folder


def notes_on(clips: Clips, source: SourceArguments, arguments: EvaluationArguments) -> list[str]:
    """What a reader must know to understand the numbers."""
    notes = []
    if arguments.calibrate and arguments.calibration_split == "train":
        notes.append("Calibrated on the train split: if the model was trained on it, it is now too sure of itself.")
    if clips.split == "validation":
        notes.append("There is no test split here: the validation clips may have chosen the checkpoint.")
    if clips.split in ("train", ALL):
        notes.append("If the model was trained on clips among these, the scores are too good.")
    if clips.train is None:
        notes.append("Without training clips there is no linear probe and no kNN distance.")
    if source.allow_speaker_overlap:
        notes.append("Speakers may be in two splits (--allow_speaker_overlap): the scores may be too good.")
    return notes


def make_training_arguments(arguments: EvaluationArguments) -> MMSERTrainingArguments:
    """The flags that evaluation shares with training, as the trainer takes them."""
    names = ("output_dir", "per_device_eval_batch_size", "dataloader_num_workers", "use_amp", "use_cpu", "seed")
    shared = {name: getattr(arguments, name) for name in names}
    return MMSERTrainingArguments(**shared, report_to="none", eval_strategy="no", save_strategy="no")


def measure(
    trainer: MMSERTrainer,
    clips: Clips,
    make_dataset: Callable[..., EmotionDataset],
    groups: dict[str, list[str]],
    label_names: list[str],
) -> Measured:
    """Run the model over everything that the report needs."""

    def predict(table: datasets.Dataset) -> dict:
        return predict_clips(trainer, make_dataset(table), table["row"])

    names = {clips.split: clips.evaluated, **clips.unknown, **({} if clips.train is None else {"train": clips.train})}
    logger.info(f"Clips: {', '.join(f'{len(table)} of {name}' for name, table in names.items())}")
    others = [*clips.unknown.values(), *([] if clips.train is None else [clips.train])]
    with stage(trainer, "Evaluating", (number_predictions(trainer, clips.evaluated) or 0) + sum(map(len, others))):
        rows = predict_rows(trainer, clips.evaluated, make_dataset)
        unknown_sets = {name: predict(table) for name, table in clips.unknown.items()}
        train_outputs = None if clips.train is None else predict(clips.train)
    return Measured(
        label_names=label_names,
        rows=rows,
        groups=groups,
        speakers=split_speakers(clips.evaluated),
        unknown_sets=unknown_sets,
        train_outputs=train_outputs,
        class_counts=trainer.model.config.class_counts,
        temperature=trainer.model.temperature.item(),
        prediction_sets=trainer.model.prediction_sets if trainer.model.prediction_sets.is_fitted else None,
        tasks=trainer.model.config.auxiliary_tasks,
        targets=split_targets(clips.evaluated),
    )


def try_log_mel_probe(
    clips: Clips, make_dataset: Callable[..., EmotionDataset], arguments: EvaluationArguments
) -> dict[str, dict[str, Any]]:
    """The row of `log_mel_probe`, over the clips that have audio, if it was asked for."""
    if not arguments.log_mel_probe or clips.train is None:
        return {}
    logger.info(f"A logistic regression learns from the log-mel bands of {len(clips.train)} training clips")
    heard = [
        split.select(np.flatnonzero([bool(audio) for audio in split["audio"]]))
        for split in (clips.train, clips.evaluated)
    ]
    return {"log_mel_probe": log_mel_probe(*(make_dataset(split, use_audio=True, use_text=False) for split in heard))}


def load_processor(checkpoint: str) -> MMSERProcessor:
    """The processor of the checkpoint."""
    with reading([Named("--checkpoint", checkpoint)]):
        return MMSERProcessor.from_pretrained(checkpoint)


@without_bars_of_weights()
def load_trainer(checkpoint: str, processor: MMSERProcessor, arguments: MMSERTrainingArguments) -> MMSERTrainer:
    """A trainer that only predicts, with the model of the checkpoint."""
    with reading([Named("--checkpoint", checkpoint)]):
        model = MMSERForAudioClassification.from_pretrained(checkpoint)
    trainer = MMSERTrainer(model, arguments, data_collator=MMSERDataCollator(processor), processing_class=processor)
    calm(trainer)
    return trainer


def calibrate(
    trainer: MMSERTrainer, clips: Clips, make_dataset: Callable[..., EmotionDataset], arguments: EvaluationArguments
) -> dict[str, Any] | None:
    """Calibrate the model on the clips that were asked for. Returns what was fitted; None if nothing was asked for."""
    if clips.calibration is None:
        return None
    clips_alone = audio_alone(trainer, clips.calibration, make_dataset)
    before = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}  # what is fitted is one of them
    tables = [clips.calibration, *([] if clips_alone is None else [clips_alone[0]])]
    with stage(trainer, "Calibrating", sum(map(len, tables))):
        fitted = trainer.calibrate(make_dataset(clips.calibration), clips_alone)
    changed = any(not torch.equal(buffer, before[name]) for name, buffer in trainer.model.named_buffers())
    return {"split": arguments.calibration_split, **fitted, "changed": changed}


def try_augmentation(
    trainer: MMSERTrainer, dataset: EmotionDataset, arguments: EvaluationArguments, label_names: list[str]
) -> list[dict[str, Any]]:
    """The scores with test-time augmentation, for each number of passes that was asked for."""
    if not arguments.tta:
        return []
    passes = arguments.tta
    with stage(trainer, "Test-time augmentation", len(dataset) * sum(passes)):
        return evaluate_augmentation(
            trainer, dataset, passes, label_names, arguments.seed, arguments.bootstrap_samples
        )


def describe_evaluation(
    clips: Clips, source: SourceArguments, arguments: EvaluationArguments, command: list[str], device: torch.device
) -> dict[str, Any]:
    """What the report says of an evaluation besides its numbers: model, data, notes, command, machine."""
    checkpoint = arguments.model_name_or_path
    tables = {clips.split: clips.evaluated, **({} if clips.train is None else {"train": clips.train})}
    return {
        "model_name": Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint,
        "data": {
            **describe_data(source.name, tables, is_hub=source.is_hub),
            "languages": describe_data(source.name, {clips.split: clips.evaluated})["languages"],
        },
        "split": clips.split,
        "unknown_clips": {name: len(table) for name, table in clips.unknown.items()},
        "notes": notes_on(clips, source, arguments),
        "command": reproducible(["python", "eval_hf.py", *command]),
        "environment": environment(device),
    }
