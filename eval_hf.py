# SPDX-License-Identifier: Apache-2.0
# /// script
# dependencies = [
#     "accelerate", "datasets", "evaluate", "matplotlib", "scikit-learn", "scipy", "soundfile", "soxr", "torch",
#     "transformers>=5.20",
# ]
# ///
"""Judge an MMSER checkpoint: is it right, does its score mean what it says, does it know what it does not know.

python eval_hf.py --checkpoint runs/mine --data_dir my_data
python eval_hf.py --checkpoint runs/mine --data_dir my_data --ood_dir my_data/ood noise --calibrate --tta 1 5 10
python eval_hf.py --checkpoint me/model --dataset_name me/my_data --group_by language sex duration
"""

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets
from transformers import HfArgumentParser, set_seed
from transformers.utils import logging

from configuration_mmser import MMSERConfig
from data_mmser import (
    EmotionDataset,
    MMSERDataCollator,
    drop_unreadable,
    duration_bands,
    load_emotion_dataset,
    load_emotion_split,
)
from judgement_mmser import Measured, console_summary, draw, judge, reproducible, write_report
from modeling_mmser import MMSERForAudioClassification, register_auto_classes
from plots_mmser import check_matplotlib
from processing_mmser import MMSERProcessor
from reporting_mmser import (
    describe_data,
    environment,
    evaluate_augmentation,
    predict_clips,
    predict_rows,
    split_groups,
)
from train_hf import SourceArguments, draw_clips, set_up_logging
from training_mmser import MMSERTrainer, MMSERTrainingArguments, leave_process_group

logger = logging.get_logger("eval_hf")

GROUPS = ("sex", "language", "corpus", "duration")
SPLITS = ("test", "validation", "train")  # the first that is there is evaluated
ALL = "all"  # what the only split of undivided data is called here
MIN_CALIBRATION_CLIPS = 19  # with fewer there is no threshold that accepts 95 % of the clips to come


def _same_flag(name: str, *aliases: str):
    """The flag `name` as training has it, with its default and its help text."""
    flag = MMSERTrainingArguments.__dataclass_fields__[name]
    return field(default=flag.default, metadata={**flag.metadata, **({"aliases": list(aliases)} if aliases else {})})


@dataclass
class EvaluationArguments:
    """What to judge, and how."""

    model_name_or_path: str = field(
        metadata={"aliases": ["--checkpoint"], "help": "MMSER checkpoint: folder or Hub name."}
    )
    output_dir: str | None = field(
        default=None,
        metadata={
            "aliases": ["--save_dir"],
            "help": "Folder for report.md, report.json and plots/. Default: `evaluation` in the checkpoint, or "
            "runs/eval for a checkpoint from the Hub.",
        },
    )
    split: str | None = field(
        default=None,
        metadata={"choices": list(SPLITS), "help": "What to evaluate. Default: test, else validation, else train."},
    )
    ood_dir: list[str] | None = field(
        default=None, metadata={"help": "Folders of clips that are none of the classes, each a set of its own."}
    )
    calibrate: bool = field(
        default=False, metadata={"help": "Fit temperature and rejection on held-out clips; store them."}
    )
    calibration_split: str = field(
        default="validation",
        metadata={
            "choices": ["validation", "train"],
            "help": "Clips for --calibrate; train only if the model was not trained on them.",
        },
    )
    tta: list[int] | None = field(
        default=None, metadata={"help": "Test-time augmentation: numbers of passes over each clip, e.g. 1 5 10."}
    )
    group_by: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Columns to compare groups by, or duration. Default: those present of {', '.join(GROUPS)}."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Training clips for the linear probe and the kNN distance, drawn at random."}
    )
    bootstrap_samples: int = field(default=1000, metadata={"help": "Resamples for the 95 %% intervals."})
    per_device_eval_batch_size: int = _same_flag("per_device_eval_batch_size", "--batch_size")
    dataloader_num_workers: int = _same_flag("dataloader_num_workers")
    use_amp: bool = _same_flag("use_amp")
    use_cpu: bool = _same_flag("use_cpu")
    seed: int = field(default=42, metadata={"help": "Seed of the clips that are drawn and of the augmentation."})

    def __post_init__(self):
        if self.output_dir is None:
            checkpoint = Path(self.model_name_or_path)
            self.output_dir = str(checkpoint / "evaluation") if checkpoint.is_dir() else "runs/eval"
        if min(self.tta or [1]) < 1:
            raise ValueError(f"--tta takes numbers of passes of at least 1, got {self.tta}.")
        for name in ("bootstrap_samples", "max_train_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")


@dataclass
class Clips:
    """The tables that one evaluation needs: `evaluated` is the split `split`; the others may be missing."""

    split: str
    evaluated: datasets.Dataset
    train: datasets.Dataset | None
    calibration: datasets.Dataset | None
    unknown: dict[str, datasets.Dataset]


def load_label_names(checkpoint: str) -> list[str]:
    """The classes of an MMSER checkpoint, in the order of their ids, from its configuration alone."""
    content, _ = MMSERConfig.get_config_dict(checkpoint)
    if content.get("model_type") != MMSERConfig.model_type:
        found = f"model type {content['model_type']!r}" if content.get("model_type") else "no config.json with a type"
        raise ValueError(f"{checkpoint} is not an MMSER checkpoint: it has {found}.")
    id2label = MMSERConfig.from_dict(content).id2label
    return [id2label[index] for index in range(len(id2label))]


def load_clips(source: SourceArguments, arguments: EvaluationArguments, label_names: list[str]) -> Clips:
    """Load what is needed, and nothing else; what is missing or does not fit is an error here."""
    wanted = [name for name in arguments.group_by or [] if name != "duration"]
    splits, _ = load_emotion_dataset(
        **source.source, label_names=label_names, extra_columns=wanted, validation_fraction=0.0, test_fraction=0.0
    )
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
    unknown = load_unknown(arguments.ood_dir or [], source, label_names)
    return Clips(
        split=split,
        evaluated=draw_clips(splits[split], source.max_eval_samples, arguments.seed),
        train=None if train is None else draw_clips(train, arguments.max_train_samples, arguments.seed),
        calibration=calibration,
        unknown={name: draw_clips(table, source.max_eval_samples, arguments.seed) for name, table in unknown.items()},
    )


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
        table = load_emotion_split(
            path, columns=source.columns, label_names=label_names, on_bad_example=source.on_bad_example
        )
        rows = [index for index, label in enumerate(table["labels"]) if label < 0]
        if not rows:
            raise ValueError(f"--ood_dir {path}: all of its clips have one of the classes {', '.join(label_names)}.")
        if len(rows) < len(table):
            logger.warning(f"{path}: left out {len(table) - len(rows)} clips that have one of the classes.")
        tables[name] = table.select(rows)
    return tables


def check_clips(clips: Clips, on_bad_example: str, **reader_options) -> Clips:
    """Try every clip once: unreadable ones are an error, or are left out (`on_bad_example`)."""

    def check(table: datasets.Dataset | None) -> datasets.Dataset | None:
        return None if table is None else drop_unreadable(table, on_bad_example=on_bad_example, **reader_options)

    unknown = {name: check(table) for name, table in clips.unknown.items()}
    return Clips(clips.split, check(clips.evaluated), check(clips.train), check(clips.calibration), unknown)


def group_clips(dataset: EmotionDataset, names: list[str] | None) -> dict[str, list[str]]:
    """The groups to compare: those that were asked for, or those in which the clips differ."""
    groups = split_groups(dataset.dataset, names or GROUPS)
    has_audio = "audio" in dataset.dataset.column_names
    if "duration" in (names or ()) and not has_audio:
        raise ValueError("--group_by duration needs audio, and these data have none.")
    if "duration" in (names or GROUPS) and has_audio:
        rate = dataset.reader.sampling_rate
        lengths = dataset.lengths
        bands = duration_bands([length / rate for length in lengths])
        groups["duration"] = [band if length else "no audio" for band, length in zip(bands, lengths, strict=True)]
    order = names or GROUPS
    return {name: groups[name] for name in order if name in groups and (names or len(set(groups[name])) > 1)}


def store_calibration(
    model: MMSERForAudioClassification, processor: MMSERProcessor, arguments: EvaluationArguments
) -> Path:
    """Save the calibrated model: into the checkpoint's own folder, or into the output folder if it is on the Hub."""
    folder = Path(arguments.model_name_or_path)
    if not folder.is_dir():
        folder = Path(arguments.output_dir) / "checkpoint"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder
    # Never half a file: each takes its place whole, the weights (with the calibration) last. The code too, as older
    # code might read the calibration in another way
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)  # of this only the code
        weights = sorted(Path(temporary).glob("model*.safetensors*"))
        for file in (*sorted(Path(temporary).glob("*.py")), Path(temporary) / "config.json", *weights):
            os.replace(file, folder / file.name)
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

    def predict(name: str, table: datasets.Dataset) -> dict:
        logger.info(f"Running the model over {len(table)} clips: {name}")
        return predict_clips(trainer, make_dataset(table), table["row"])

    logger.info(f"Running the model over {len(clips.evaluated)} clips: {clips.split}, and with each modality alone")
    return Measured(
        label_names=label_names,
        rows=predict_rows(trainer, clips.evaluated, make_dataset),
        groups=groups,
        unknown_sets={name: predict(name, table) for name, table in clips.unknown.items()},
        train_outputs=None if clips.train is None else predict("train", clips.train),
        class_counts=trainer.model.config.class_counts,
        temperature=trainer.model.temperature.item(),
    )


def main(arguments: list[str] | None = None) -> dict:
    """Evaluate as the flags say. Returns what is written to `report.json`."""
    command = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser((EvaluationArguments, SourceArguments), description=__doc__)
    arguments, source = parser.parse_args_into_dataclasses(command)
    training_arguments = make_training_arguments(arguments)
    set_up_logging(training_arguments)
    set_seed(arguments.seed)
    check_matplotlib()
    checkpoint = arguments.model_name_or_path
    label_names = load_label_names(checkpoint)
    clips = load_clips(source, arguments, label_names)
    register_auto_classes()  # the code of MMSER is here: what the checkpoint carries is not run
    processor = MMSERProcessor.from_pretrained(checkpoint)
    options = {"sampling_rate": processor.feature_extractor.sampling_rate, "max_seconds": source.max_seconds}
    clips = check_clips(clips, source.on_bad_example, **options)
    make_dataset = partial(EmotionDataset, seed=arguments.seed, **options)
    evaluated = make_dataset(clips.evaluated)
    groups = group_clips(evaluated, arguments.group_by)

    model = MMSERForAudioClassification.from_pretrained(checkpoint)
    trainer = MMSERTrainer(
        model, training_arguments, data_collator=MMSERDataCollator(processor), processing_class=processor
    )
    fitted = None
    if clips.calibration is not None:
        logger.info(f"Calibrating on {len(clips.calibration)} clips: {arguments.calibration_split}")
        fitted = {"split": arguments.calibration_split, **trainer.calibrate(make_dataset(clips.calibration))}
    measured = measure(trainer, clips, make_dataset, groups, label_names)
    augmented = []
    if arguments.tta:
        logger.info(f"Test-time augmentation, passes: {', '.join(map(str, arguments.tta))}")
        augmented = evaluate_augmentation(
            trainer, evaluated, arguments.tta, label_names, arguments.seed, arguments.bootstrap_samples
        )

    if fitted is not None and trainer.is_world_process_zero():  # not before everything has worked with it
        fitted["stored_in"] = str(store_calibration(model, processor, arguments))
        logger.info(f"The calibrated checkpoint is in {fitted['stored_in']}")

    tables = {clips.split: clips.evaluated, **({} if clips.train is None else {"train": clips.train})}
    report = {
        "model_name": Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint,
        "data": {
            **describe_data(source.name, tables, is_hub=source.dataset_name is not None),
            "languages": describe_data(source.name, {clips.split: clips.evaluated})["languages"],
        },
        "split": clips.split,
        "unknown_clips": {name: len(table) for name, table in clips.unknown.items()},
        **judge(measured, arguments.bootstrap_samples),
        "fitted_calibration": fitted,
        "test_time_augmentation": augmented,
        "notes": notes_on(clips, source, arguments),
        "command": reproducible(["python", "eval_hf.py", *command]),
        "environment": environment(training_arguments.device),
    }
    if trainer.is_world_process_zero():
        plots = draw(measured, report, Path(arguments.output_dir) / "plots")
        path = write_report(report, plots, arguments.output_dir)
        print(f"{console_summary(report)}\n\nThe report with its plots: {path}")
    return report


def command() -> None:
    """`mmser-eval`."""
    main()
    leave_process_group()


if __name__ == "__main__":
    command()
