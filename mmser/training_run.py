# SPDX-License-Identifier: Apache-2.0
"""The steps of `train_hf.py` around the model, which `model_loading` makes.

Read in this order: `find_checkpoint` (to resume from), `load_data`, `Examples` (how clips become examples),
`make_trainer`, `train`, `evaluate`, `describe_run`, `write_results`.
"""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers.utils import logging

from configuration_mmser import MMSERConfig, check_auxiliary_tasks
from mmser import adaptation
from mmser.arguments import DataArguments, ModelArguments
from mmser.augmentation import Augmenter
from mmser.batches import MMSERDataCollator
from mmser.caching import CachedStatesDataset, EncoderStateCache
from mmser.distillation import NEEDS_FROZEN_AUDIO, DistilledDataset, TeacherLogits
from mmser.division import describe_division
from mmser.examples import EmotionDataset, EmotionIterableDataset, class_counts, drop_unreadable, reading_options
from mmser.files import read_json, write_atomically
from mmser.groups import split_groups, split_speakers
from mmser.labels import check_visible
from mmser.loading import draw_clips, load_emotion_dataset, load_emotion_split
from mmser.model_card import write_model_card
from mmser.model_loading import encoder_name, load_config, load_label_names
from mmser.names import reading
from mmser.optimizer import parameter_table
from mmser.progress import CURVES_NAME, calm, draw_curves, stage
from mmser.results import (
    RESULTS_NAME,
    advise,
    describe_data,
    earlier_training,
    environment,
    format_results,
    next_steps,
    reproducible,
)
from mmser.run_identity import changed_settings, holds_run, is_stopped
from mmser.sampling import describe_draws, expected_draws
from mmser.scores import (
    audio_alone,
    describe_rows,
    describe_tasks,
    evaluate_open_set,
    number_predictions,
    predict_clips,
    predict_rows,
)
from mmser.sources import OTHER
from mmser.streams import number_skipped, read_stream
from mmser.tables import format_table, strict_json
from mmser.targets import check_targets, derive_targets, split_targets
from mmser.trainer import MMSERTrainer, last_complete_checkpoint
from mmser.training_arguments import MMSERTrainingArguments
from modeling_mmser import MMSERForAudioClassification
from processing_mmser import MMSERProcessor

logger = logging.get_logger(__name__)
JUDGED = ("validation", "test")  # splits that the scores at the end are of
STREAM_BUFFER = 1000  # clips held to shuffle a stream
STREAM_SAMPLE = 2000  # clips of a stream that OpenMax is fitted on


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that training goes on from, and the step at which it was saved."""

    folder: str
    step: int


def find_checkpoint(arguments: MMSERTrainingArguments) -> Checkpoint | None:
    """
    The checkpoint that was asked for; by default the last complete one in the output folder, if there is one.

    Its step is read here: `save_total_limit` may delete the checkpoint while training goes on.

    Raises:
        ValueError: a run would be replaced, or what it is to go on from deleted.
        FileNotFoundError: what was asked for is no checkpoint.
    """
    wanted = str(arguments.resume_from_checkpoint)
    output_dir, last = Path(arguments.output_dir), last_complete_checkpoint(arguments.output_dir)
    if arguments.adapt and last is not None and not arguments.overwrite_output_dir:
        raise ValueError(
            f"{output_dir} holds a training, which --adapt does not go on with. Give another --output_dir, or "
            "--overwrite_output_dir to delete that run."
        )
    if last is None and not arguments.overwrite_output_dir and holds_run(output_dir) and not is_stopped(output_dir):
        raise ValueError(
            f"{output_dir} holds a finished run and no checkpoint to go on from, so this run would replace it. Give "
            "another --output_dir, or --overwrite_output_dir to delete that run and start anew."
        )
    if wanted.lower() in ("false", "no", "none", "true"):
        if last is None or arguments.overwrite_output_dir:
            return None
        if wanted.lower() in ("false", "no"):
            raise ValueError(
                f"--resume_from_checkpoint {wanted}: {output_dir} has checkpoints, which a later call would go on "
                "from. Add --overwrite_output_dir to delete them, or give another --output_dir."
            )
        folder = last
        logger.info(f"Resuming from {folder}. Choose another --output_dir, or --overwrite_output_dir, to start anew.")
    else:
        folder = wanted
        if arguments.overwrite_output_dir and output_dir.resolve() in Path(folder).resolve().parents:
            raise ValueError(
                f"--overwrite_output_dir would delete {folder}, which --resume_from_checkpoint goes on from. Leave "
                "one of the two out, or give another --output_dir."
            )
    state = Path(folder) / "trainer_state.json"
    if not state.is_file():
        raise FileNotFoundError(f"--resume_from_checkpoint: {folder} is no checkpoint (no trainer_state.json).")
    return Checkpoint(folder, json.loads(state.read_text(encoding="utf-8"))["global_step"])


def finish_earlier(
    arguments: MMSERTrainingArguments, identity: Mapping[str, Any], data: Sequence[str]
) -> dict[str, Any] | None:
    """
    Where an earlier run was stopped behind its last checkpoint, or had none: write the card that it lacks.

    Args:
        arguments: name the folder.
        identity: of `describe_identity`.
        data: the flags that name the clips.
    Returns: the results of that run; None where there is something to train.
    Raises:
        ValueError: the folder holds a model that was trained with other settings.
    """
    folder = Path(arguments.output_dir)
    if arguments.overwrite_output_dir or last_complete_checkpoint(folder) or not holds_run(folder):
        return None
    if changed := changed_settings(folder, identity):
        raise ValueError(
            f"{folder} holds the model of a run with other settings (before -> now): {'; '.join(changed)}; give the "
            "same ones to finish it, or another --output_dir, or --overwrite_output_dir to delete it and start anew."
        )
    if not (folder / RESULTS_NAME).is_file():
        logger.warning(f"The run in {folder} was stopped before its model was judged: it is trained anew.")
        return None
    results = read_json(folder / RESULTS_NAME)
    if arguments.process_index == 0:
        logger.info(f"The run in {folder} is finished, but for its model card.")
        print(write_card(results, folder, data))
        if arguments.push_to_hub:
            logger.warning(f"Its model is not on the Hub yet: mmser push {shlex.quote(str(folder))} pushes it.")
    return results


@dataclass
class TrainingData:
    """
    The clips of a run.

    Args:
        splits: "train" and, as far as there are any, "validation" and "test".
        label_names: in the order of the class ids.
        unknown: tables of clips that are none of the classes.
        skipped_clips: how many could not be read and were left out; of a stream those that are not trained on.
        auxiliary: fields of the configuration that say which tasks are learnt beside the emotion.
        division: of `describe_division`; None for a stream.
    """

    splits: dict[str, datasets.Dataset | datasets.IterableDataset]
    label_names: list[str]
    unknown: list[datasets.Dataset] = field(default_factory=list)
    skipped_clips: int = 0
    auxiliary: dict[str, Any] = field(default_factory=dict)
    division: dict[str, Any] | None = None


def warn_of_moot_settings(model_arguments: ModelArguments, arguments: DataArguments) -> None:
    """Name the settings of the data that were changed and that nothing reads. A recipe may bring them: no error."""
    is_new = model_arguments.model_name_or_path is None
    reasons = {}
    if arguments.cache_encoder_states is None:
        reasons["augmented_copies"] = "without --cache_encoder_states"
    if not is_new or model_arguments.random_audio_encoder:
        reasons["standardize_clips"] = "without a pretrained audio encoder that a new model starts from"
    for kind in ("audio", "text"):
        if getattr(model_arguments, f"{kind}_model_name_or_path") is None and is_new:
            reasons[f"{kind}_dropout"] = f"without {kind}"
    for name, reason in reasons.items():
        if getattr(arguments, name) not in (0, getattr(DataArguments, name)):
            logger.warning(f"--{name} has no effect {reason}.")


def load_data(
    arguments: DataArguments, seed: int, checkpoint: str | None = None, learns_tasks: bool = True
) -> TrainingData:
    """
    Load the clips that the flags name, and draw as many of them as the flags say.

    Args:
        arguments: of the data.
        seed: of what is drawn.
        checkpoint: the MMSER checkpoint that training starts from, if it does. Its classes stay if the data's are
            among them.
        learns_tasks: whether the tasks beside the emotion are learnt, and need targets.
    Raises:
        ValueError: there is nothing to train on, a cache is asked for a stream, or see `load_emotion_dataset`.
    """
    if arguments.streaming and arguments.cache_encoder_states is not None:
        raise ValueError("--cache_encoder_states reads the clips before training: it cannot with --streaming.")
    auxiliary = _auxiliary_fields(arguments, checkpoint)
    tasks = auxiliary["auxiliary_tasks"]
    fractions = {name: getattr(arguments, name) for name in ("validation_fraction", "test_fraction")}
    with reading(arguments.on_the_hub):
        splits, label_names = load_emotion_dataset(
            **arguments.source,
            auxiliary_tasks=tasks,
            label_names=arguments.labels,
            checkpoint_names=None if checkpoint is None else load_label_names(checkpoint, "--model_name_or_path"),
            streaming=arguments.streaming,
            **fractions,
            seed=seed,
        )
    other = splits.pop(OTHER, None)
    if "train" not in splits:
        raise ValueError(
            f"{arguments.name} has no training split that can be read: it has {', '.join(splits)}. Give it "
            "train/metadata.csv (or .tsv, .jsonl), or name the split with --train_split."
        )
    maps = auxiliary["auxiliary_label_maps"]
    if arguments.auxiliary_label_maps is None:  # those of the checkpoint, which may have had other classes
        maps = {task: {name: own[name] for name in own if name in label_names} for task, own in maps.items()}
    splits, auxiliary["auxiliary_label_maps"] = derive_targets(splits, label_names, tasks, maps)
    if learns_tasks:
        check_targets(splits["train"], tasks)
    limits = {name: arguments.max_eval_samples for name in splits} | {"train": arguments.max_train_samples}
    drawn = {name: draw_clips(split, limits[name], seed) for name, split in splits.items()}
    if arguments.streaming:
        drawn |= {name: read_stream(split) for name, split in drawn.items() if name != "train"}
    data = TrainingData(drawn, label_names)
    data.auxiliary = auxiliary
    data.division = None if arguments.streaming else describe_division(splits, fractions, seed)
    data.unknown = [] if other is None else [other]
    if arguments.ood_dir:
        data.unknown.append(
            load_emotion_split(arguments.ood_dir, label_names=label_names, **arguments.of_further_clips)
        )
    if arguments.streaming:
        # A stream comes in stored order, which often is by class
        data.splits["train"] = data.splits["train"].shuffle(seed=seed, buffer_size=STREAM_BUFFER)
        logger.warning("The clips of a stream are not counted beforehand: the focal loss weighs all classes alike.")
    return data


def _auxiliary_fields(arguments: DataArguments, checkpoint: str | None) -> dict[str, Any]:
    """
    The tasks to learn beside the emotion, as fields of `MMSERConfig`: those of the flags, else of the checkpoint.

    Raises:
        ValueError: flags about them without any, or that do not fit together.
    """
    config = MMSERConfig() if checkpoint is None else load_config(checkpoint, "--model_name_or_path")
    fields: dict[str, Any] = {
        "auxiliary_tasks": config.auxiliary_tasks,
        "auxiliary_label_maps": config.auxiliary_label_maps,
    }
    if arguments.auxiliary_tasks is not None:
        fields = {"auxiliary_tasks": arguments.auxiliary_tasks, "auxiliary_label_maps": {}}
    given = {
        "auxiliary_label_maps": arguments.auxiliary_label_maps,
        "auxiliary_loss_weight": arguments.auxiliary_weight,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if given and not fields["auxiliary_tasks"]:
        raise ValueError("--auxiliary_label_maps and --auxiliary_weight are of --auxiliary_tasks: give these too.")
    fields |= given
    try:
        check_auxiliary_tasks(fields["auxiliary_tasks"], fields["auxiliary_label_maps"])
        for task, kind in fields["auxiliary_tasks"].items():
            for name in kind if isinstance(kind, list) else ():
                check_visible(str(name), f"{task} has a class, and its name")
    except (TypeError, ValueError) as error:
        raise ValueError(f"--auxiliary_tasks: {error}") from error
    return fields


def leave_out_unreadable(data: TrainingData, arguments: DataArguments, processor: MMSERProcessor) -> None:
    """Try every clip once, before work is spent; those of a stream that are trained on while they are read."""
    options = reading_options(processor.modalities, processor.sampling_rate) | {"max_seconds": arguments.max_seconds}
    tables = {name: split for name, split in data.splits.items() if isinstance(split, datasets.Dataset)}
    num_clips = sum(map(len, tables.values()))
    tables = {name: drop_unreadable(split, arguments.bad_rows, **options) for name, split in tables.items()}
    data.splits |= tables
    data.skipped_clips = num_clips - sum(map(len, tables.values()))
    data.unknown = [drop_unreadable(table, arguments.bad_rows, **options) for table in data.unknown]


def some_clips(split, number: int):
    """Clips from all over a split, the same on every process; the first ones of a stream."""
    if isinstance(split, datasets.IterableDataset):
        return read_stream(split.take(number))
    return split.select(np.unique(np.linspace(0, len(split) - 1, min(number, len(split))).round().astype(int)))


class Examples:
    """
    Makes the examples of a run from its clips: decoded, or as states of frozen encoders from the cache.

    Args:
        arguments: of the data.
        training_arguments: say the precision and the seed.
        model: whose frozen encoders fill the cache.
        processor: of the model.
        teacher: whose logits are kept in the cache too.
    Raises:
        ValueError: a cache is asked for without a frozen encoder.
    """

    def __init__(
        self,
        arguments: DataArguments,
        training_arguments: MMSERTrainingArguments,
        model: MMSERForAudioClassification,
        processor: MMSERProcessor,
        teacher: MMSERForAudioClassification | None = None,
    ):
        self.arguments, self.training_arguments = arguments, training_arguments
        self.options = {
            "seed": data_seed(training_arguments),
            "on_bad_example": arguments.on_bad_example,
            "max_seconds": arguments.max_seconds,
            **reading_options(processor.modalities, processor.sampling_rate),
        }
        self.cache = self.teacher = None
        if arguments.cache_encoder_states is not None:
            backbone: Any = model.base_model
            if teacher is not None and {"audio"} & {*processor.modalities} - backbone.frozen_encoders():
                raise ValueError(NEEDS_FROZEN_AUDIO)
            bf16, fp16 = training_arguments.bf16, training_arguments.fp16
            precision = torch.bfloat16 if bf16 else torch.float16 if fp16 else None
            model.to(training_arguments.device)  # type: ignore[arg-type]  # the library's wrapper hides the signature
            self.cache = EncoderStateCache(arguments.cache_encoder_states, model, processor, autocast=precision)
            if teacher is not None:
                teacher.to(training_arguments.device)  # type: ignore[arg-type]
                self.teacher = TeacherLogits(arguments.cache_encoder_states, teacher, processor, autocast=precision)

    def for_training(self, split):
        """Examples with augmentation and with modalities dropped."""
        rate = self.options.get("sampling_rate", Augmenter.sampling_rate)  # a model of text alone has none
        augmenter = Augmenter(effects=tuple(self.arguments.augmentations), sampling_rate=rate)
        dataset = _examples_of(split)(
            split,
            training=True,
            augmenter=augmenter if self.arguments.augment else None,
            text_dropout=self.arguments.text_dropout,
            audio_dropout=self.arguments.audio_dropout,
            **self.options,
        )
        copies = self.arguments.augmented_copies if self.arguments.augment else 0
        return self._cached(dataset, copies, with_teacher=True)

    def for_evaluation(self, split, with_teacher: bool = False, **modalities):
        """
        Examples as the clips are; `use_audio=False` or `use_text=False` hides a modality. `with_teacher`: for the
        loss, in a run with a teacher.
        """
        return self._cached(_examples_of(split)(split, **{**self.options, **modalities}), 0, with_teacher)

    def readable(self, table: datasets.Dataset) -> datasets.Dataset:
        """The clips of a table that can be read, as far as the rest may be left out."""
        reading = {name: value for name, value in self.options.items() if name != "seed"}
        return drop_unreadable(table, **reading)

    def _cached(self, dataset, copies: int, with_teacher: bool):
        if self.cache is None:
            return dataset
        with self.training_arguments.main_process_first():
            if with_teacher and self.teacher is not None:
                return DistilledDataset(dataset, self.cache, copies, self.teacher)
            return CachedStatesDataset(dataset, self.cache, copies)


def _examples_of(split: datasets.Dataset | datasets.IterableDataset) -> type[EmotionDataset | EmotionIterableDataset]:
    return EmotionDataset if isinstance(split, datasets.Dataset) else EmotionIterableDataset


def data_seed(arguments: MMSERTrainingArguments) -> int:
    """The seed of everything that is drawn of the data."""
    return arguments.seed if arguments.data_seed is None else arguments.data_seed


def make_trainer(
    model: MMSERForAudioClassification,
    teacher: MMSERForAudioClassification | None,
    processor: MMSERProcessor,
    data: TrainingData,
    examples: Examples,
    arguments: MMSERTrainingArguments,
) -> MMSERTrainer:
    """The trainer, with class counts for class balancing; a run without validation clips has no best checkpoint."""
    if isinstance(data.splits["train"], datasets.Dataset) and not arguments.adapt:
        draws = expected_draws(data.splits["train"], arguments.sampling_temperature)
        counts = class_counts(data.splits["train"], len(data.label_names), draws)
        model.config.class_counts = counts
        what = "Training clips" if draws is None else "Draws of an epoch"
        each = [f"{name} {number:g}" for name, number in zip(data.label_names, counts, strict=True)]
        logger.info(f"{what} per class: {', '.join(each)}")
        if draws is not None:
            rows = describe_draws(data.splits["train"], draws, data.label_names)
            logger.info(f"Sampling:\n{format_table(rows, list(rows[0]))}")
    rows = parameter_table(model)
    logger.info(f"Parameters: {rows[-1]['parameters']:,}, of which {rows[-1]['trainable']:,} are trained")
    logger.debug(f"Parameters:\n{format_table(rows, ['part', 'parameters', 'trainable'])}")
    train_dataset = None if arguments.adapt else examples.for_training(data.splits["train"])
    held_out = data.splits.get("validation")
    if held_out is None:
        arguments.eval_strategy, arguments.load_best_model_at_end = "no", False
    trainer = MMSERTrainer(
        model=model,
        args=arguments,
        teacher=teacher,
        train_dataset=train_dataset,
        eval_dataset=None if held_out is None else examples.for_evaluation(held_out, with_teacher=True),
        data_collator=MMSERDataCollator(processor),
        processing_class=processor,
    )
    calm(trainer)
    return trainer


def train(
    trainer: MMSERTrainer, data: TrainingData, examples: Examples, standardize_clips: int, resumed: Checkpoint | None
) -> dict[str, Any]:
    """
    Train, then calibrate on the validation clips and save.

    Args:
        standardize_clips: how many training clips standardise the encoder's states before training; 0 for none.
        resumed: the checkpoint to go on from.
    Returns: `training` and `calibration`, for `eval_results.json`; of a run that adapts also `adaptation`.
    """
    if trainer.args.adapt:
        return _adapt(trainer, data, examples)
    if standardize_clips and resumed is None:
        trainer.fit_standardization(examples.for_evaluation(some_clips(data.splits["train"], standardize_clips)))
    training = trainer.train(resume_from_checkpoint=resumed.folder if resumed else None).metrics
    training["steps"] = trainer.state.global_step
    training["total_runtime"] = round(trainer.training_time.seconds, 4)
    if resumed and trainer.state.global_step == resumed.step:  # it was finished before
        logger.info(_describe_finished(trainer))
        training |= earlier_training(Path(resumed.folder).parent) or {}
    is_stream = isinstance(data.splits["train"], datasets.IterableDataset)
    train_dataset: Any = trainer.train_dataset
    training["skipped_clips"] = data.skipped_clips
    known_clips = data.splits["train"]
    if is_stream:
        training["skipped_clips"] += number_skipped(train_dataset, trainer.accelerator)
        known_clips = examples.readable(some_clips(known_clips, STREAM_SAMPLE))
    held_out = data.splits.get("validation")
    known = examples.for_evaluation(known_clips)
    held_out_examples = None if held_out is None else examples.for_evaluation(held_out)
    alone = [audio_alone(trainer, split, examples.for_evaluation) for split in (known_clips, held_out)]
    tables = [known, *([] if held_out is None else [held_out_examples]), *(pair[0] for pair in alone if pair)]
    with stage(trainer, "Calibrating", None if is_stream else sum(map(len, tables))):
        calibration = trainer.finalize(known, held_out_examples, *alone)
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        draw_curves(trainer.state.log_history, Path(trainer.args.output_dir))
    return {"training": training, "calibration": calibration}


def _adapt(trainer: MMSERTrainer, data: TrainingData, examples: Examples) -> dict[str, Any]:
    """Adapt to the training clips and save. Returns: as `train`."""
    shown, args = data.splits["train"], trainer.args
    alone = audio_alone(trainer, shown, examples.for_evaluation)
    dataset = examples.for_evaluation(shown)
    strength = adaptation.STRENGTH if args.adapt_strength is None else args.adapt_strength
    layers = str(args.adapt_layers)  # chosen when the model was loaded
    report, calibration = adaptation.adapt(trainer, dataset, alone, layers, strength, args.adapt_rehearsal)
    if trainer.is_world_process_zero():
        print(adaptation.describe(report))
    trainer.save_model()
    trainer.save_state()
    training = {"skipped_clips": data.skipped_clips, "total_runtime": report["seconds"]}
    return {"training": training, "calibration": calibration, "adaptation": report}


def _describe_finished(trainer: MMSERTrainer) -> str:
    state, arguments = trainer.state, trainer.args
    if arguments.max_steps > 0:
        done, more = f"{state.global_step} of {arguments.max_steps} steps", "A larger --max_steps"
    else:
        done, more = f"{state.epoch or 0:g} of {arguments.num_train_epochs:g} epochs", "More --epochs"
    return f"The run is finished ({done}): it is evaluated again. {more} trains on."


def evaluate(trainer: MMSERTrainer, data: TrainingData, examples: Examples) -> dict[str, Any]:
    """The scores on the validation and test clips, and on those that are none of the classes, by name."""
    tables = [data.splits[name] for name in JUDGED if name in data.splits]
    numbers = [number_predictions(trainer, table) for table in tables] + [len(table) for table in data.unknown]
    known = [number for number in numbers if number is not None]
    with stage(trainer, "Evaluating", sum(known) if tables and len(known) == len(numbers) else None):
        return _evaluate(trainer, data, examples)


def _evaluate(trainer: MMSERTrainer, data: TrainingData, examples: Examples) -> dict[str, Any]:
    results: dict[str, Any] = {}
    known = None
    for name in JUDGED:
        if name in data.splits:
            split = data.splits[name]
            rows = predict_rows(trainer, split, examples.for_evaluation)
            results[name] = describe_rows(
                rows, data.label_names, split_groups(split), trainer.train_outputs, speakers=split_speakers(split)
            )
            known = rows["model"]
            if tasks := trainer.model.config.auxiliary_tasks:
                described = describe_tasks(known, split_targets(split), tasks)
                results["auxiliary"] = {**results.get("auxiliary", {}), name: described}
    if data.unknown and known is not None:
        tables = [predict_clips(trainer, examples.for_evaluation(table), table["row"]) for table in data.unknown]
        outputs = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
        temperature = trainer.model.temperature.item()
        sets = evaluate_open_set(known, {"unknown": outputs}, trainer.train_outputs, temperature)
        results["open_set"] = sets["unknown"]
    return results


def describe_run(
    trainer: MMSERTrainer, data: TrainingData, model_arguments: ModelArguments, data_arguments: DataArguments
) -> dict[str, Any]:
    """What `eval_results.json` says of a run besides its scores."""
    return {
        "model_name": trainer.hub_model_id or Path(trainer.args.output_dir).resolve().name,
        "label_names": data.label_names,
        "encoders": {kind: encoder_name(model_arguments, kind) for kind in ("audio", "text")},
        "parameters": parameter_table(trainer.model),
        "data": describe_data(data_arguments.name, data.splits, is_hub=data_arguments.is_hub),
        "license": model_arguments.license,
    }


def write_results(
    results: dict[str, Any],
    output_dir: str | Path,
    command: list[str] | None = None,
    device: torch.device | None = None,
    data: Sequence[str] = ("--data_dir", "DATA"),
) -> str:
    """
    Write `eval_results.json` and the model card into `output_dir`. `data`: the flags that name the clips.

    Returns: the tables, to print at the end of a run.
    """
    folder = Path(output_dir)
    results = {**results, "environment": environment(device), "command": reproducible(command or sys.argv)}
    write_atomically(folder / RESULTS_NAME, strict_json(results))
    return write_card(results, folder, data)


def write_card(results: dict[str, Any], folder: Path, data: Sequence[str]) -> str:
    """Write the model card of a run that has its results. Returns: as `write_results`."""
    card = write_model_card(results, folder)
    tables = format_results(results)
    titles = {
        "summary": "Summary",
        "classes": "F1 of each class",
        "confusion": "Confusion matrix",
        "corpus": "By corpus",
        "language": "By language",
        "sex": "By sex",
        "open_set": "Clips that are none of the classes",
        "tasks": "Other tasks",
        "tasks_of_numbers": "Other tasks, of numbers",
    }
    parts = [f"{title}\n{tables[name]}" for name, title in titles.items() if tables[name]]
    if advice := advise(results):
        parts.append("\n".join(["What to do", *advice]))
    curves = f", {CURVES_NAME}" if (folder / CURVES_NAME).is_file() else ""
    parts.append(f"Checkpoint, eval_results.json{curves} and {card.name} (the model card): {folder}")
    return "\n\n".join([*parts, "\n".join(["What comes next", *next_steps(folder, data)])])
