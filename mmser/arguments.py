# SPDX-License-Identifier: Apache-2.0
"""The arguments of all commands, and how they are parsed: flags after an optional JSON recipe."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmser.flags import FlagParser, parse_json, split_debug, with_trainer_flags
from mmser.names import Named, checkpoint_folder
from mmser.table_files import near_name, read_content
from mmser.training_flags import TrainingFlags

if TYPE_CHECKING:  # what imports torch or datasets is imported when it is needed: `--help` does not need it
    from mmser.bad_rows import BadRows
    from mmser.sources import DataColumns

DTYPES = ("float32", "float16", "int8")
FORMATS = ("onnx", "safetensors")
OPSET = 20  # the first with Gelu; onnxruntime reads it since 1.17


@dataclass
class ModelArguments:
    """Which model to start from."""

    _argument_group_name = "Model"
    _essentials = {  # noqa: RUF012 (no field: what `train_hf.py --help` shows, the flags that most runs need)
        "Data": ("data_dir", "dataset_name", "label_map", "label_column", "text_column", "max_seconds"),
        "Model": (
            *("audio_model_name_or_path", "text_model_name_or_path", "model_name_or_path"),
            *("freeze_audio", "freeze_text", "cache_encoder_states"),
        ),
        "Training": ("output_dir", "overwrite_output_dir", "epochs", "batch_size", "lr", "use_amp", "push_to_hub"),
    }

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "MMSER checkpoint (Hub name or folder) to go on from, instead of two encoders."},
    )
    average_with: list[str] = field(
        default_factory=list,
        metadata={
            "help": "More MMSER checkpoints, fine-tuned from the same one: start from the mean of their weights and "
            "those of --model_name_or_path (a model soup)."
        },
    )
    audio_model_name_or_path: str | None = field(
        default="facebook/wav2vec2-base",
        metadata={"help": "Audio encoder: Hub name or folder; none: a model of text alone."},
    )
    text_model_name_or_path: str | None = field(
        default="google-bert/bert-base-multilingual-cased",
        metadata={"help": "Text encoder: Hub name or folder; none: a model of audio alone."},
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not beside the text encoder."})
    random_audio_encoder: bool = field(
        default=False, metadata={"help": "Start the audio encoder at random: only its configuration is read."}
    )
    random_text_encoder: bool = field(
        default=False, metadata={"help": "Start the text encoder at random: only its configuration is read."}
    )
    audio_config_overrides: dict | str | None = field(
        default=None,
        metadata={"help": "JSON: fields of the audio encoder's configuration; with --random_audio_encoder."},
    )
    text_config_overrides: dict | str | None = field(
        default=None,
        metadata={"help": "JSON: fields of the text encoder's configuration; with --random_text_encoder."},
    )
    audio_num_hidden_layers: int | None = field(
        default=None, metadata={"help": "Keep only that many layers of the pretrained audio encoder, the first ones."}
    )
    text_num_hidden_layers: int | None = field(
        default=None, metadata={"help": "Keep only that many layers of the pretrained text encoder, the first ones."}
    )
    config_overrides: dict | str | None = field(
        default=None, metadata={"help": "JSON: fields of MMSERConfig, e.g. '{\"classifier_num_layers\": 5}'."}
    )
    freeze_audio: bool = field(default=False, metadata={"help": "Freeze the audio encoder."})
    freeze_text: bool = field(default=False, metadata={"help": "Freeze the text encoder."})
    freeze_feature_encoder: bool = field(
        default=False, metadata={"help": "Freeze only the convolutions in front of the audio encoder."}
    )
    freeze_audio_layers: int | None = field(
        default=None,
        metadata={"help": "Freeze the first layers of the audio encoder, so many, and what comes before them."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention of all parts: sdpa (the default), flash_attention_2, or eager (trains faster on CPUs)."
        },
    )
    apply_spec_augment: bool | None = field(
        default=None,
        metadata={"help": "SpecAugment while the audio encoder learns; by default as the encoder is configured."},
    )
    mask_time_prob: float | None = field(default=None, metadata={"help": "SpecAugment: share of frames in a span."})
    mask_time_length: int | None = field(
        default=None, metadata={"help": "Frames per span: 10 ms each for log-mel encoders, 20 ms for others."}
    )
    mask_feature_prob: float | None = field(
        default=None, metadata={"help": "SpecAugment: share of mel bands (of a wav2vec2's features) in a span."}
    )
    mask_feature_length: int | None = field(default=None, metadata={"help": "Mel bands, or features, per span."})
    license: str | None = field(
        default=None, metadata={"help": "Licence of the checkpoint for its card, as the encoders and the data allow."}
    )
    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "MMSER checkpoint to distil from; set distillation_loss_weight as well."}
    )

    lora_rank: int | None = field(
        default=None,
        metadata={"help": "Train adapters of that rank (LoRA) in encoders that are not frozen, not their weights."},
    )
    lora_target: list[str] = field(
        default_factory=lambda: ["all"],
        metadata={"help": "Linear layers that get an adapter, by their last names, such as q_proj v_proj."},
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Adapters count alpha / rank times. Default: twice the rank."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of what enters an adapter, in training."})
    lora_save: str = field(
        default="merged",
        metadata={
            "help": "merged: the checkpoint is a model without adapters; adapter: it holds them in place of the "
            "encoders, which must be where they were when it is loaded.",
        },
    )

    def __post_init__(self):
        for name in ("audio_config_overrides", "text_config_overrides", "config_overrides"):
            value = getattr(self, name)
            setattr(self, name, parse_json(value, f"--{name}") if isinstance(value, str) else value or {})
        for name in ("model_name_or_path", "teacher_name_or_path"):
            if getattr(self, name):
                setattr(self, name, checkpoint_folder(getattr(self, name), f"--{name}"))
        self.average_with = [checkpoint_folder(name, "--average_with") for name in self.average_with]
        for kind in ("audio", "text"):
            name = f"{kind}_model_name_or_path"
            if str(getattr(self, name)).lower() == "none":
                setattr(self, name, None)
                self._check_without(kind)
            if getattr(self, f"{kind}_config_overrides") and not getattr(self, f"random_{kind}_encoder"):
                raise ValueError(f"--{kind}_config_overrides changes the architecture: add --random_{kind}_encoder.")
            if getattr(self, f"{kind}_num_hidden_layers") is not None and (
                self.model_name_or_path or getattr(self, f"random_{kind}_encoder")
            ):
                raise ValueError(
                    f"--{kind}_num_hidden_layers cuts a pretrained {kind} encoder: give it when starting from one."
                )
        if self.average_with and self.model_name_or_path is None:
            raise ValueError("--average_with needs a first checkpoint: add --model_name_or_path.")
        moot = [name for name in NEW_MODEL if getattr(self, name)] if self.model_name_or_path else []
        if moot:
            raise ValueError(
                f"--{moot[0]} is for a new model: that of --model_name_or_path has its encoders. Leave it out."
            )
        if self.freeze_audio and self.freeze_audio_layers is not None:
            raise ValueError("--freeze_audio freezes all layers: leave out --freeze_audio_layers.")
        if self.freeze_audio and any(getattr(self, name) for name in SPEC_AUGMENT):
            raise ValueError("SpecAugment masks what an encoder learns from: it has no effect with --freeze_audio.")

        self._check_lora()

    def _check_lora(self) -> None:
        if self.lora_rank is None:
            changed = [name for name, default in LORA.items() if getattr(self, name) != default]
            if changed:
                raise ValueError(f"--{changed[0]} is about adapters: add --lora_rank, such as --lora_rank 16.")
            return
        if self.freeze_audio_layers is not None:
            raise ValueError("--lora_rank freezes the weights of all layers: leave out --freeze_audio_layers.")
        if self.lora_rank < 1:
            raise ValueError(f"--lora_rank must be 1 or more, got {self.lora_rank}.")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"--lora_alpha must be greater than 0, got {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout must be in [0, 1), got {self.lora_dropout}.")
        if self.lora_save not in ("merged", "adapter"):
            raise ValueError(f"--lora_save must be merged or adapter, got {self.lora_save}.")
        check_peft()

    def _check_without(self, kind: str) -> None:
        """Refuse flags that need the encoder `kind`, "audio" or "text", which there is none of."""
        about = [f"random_{kind}_encoder", f"{kind}_config_overrides", f"{kind}_num_hidden_layers", f"freeze_{kind}"]
        about += ["tokenizer_name"] if kind == "text" else ["freeze_feature_encoder", "freeze_audio_layers"]
        about += SPEC_AUGMENT if kind == "audio" else ()
        given = {name: getattr(self, name) for name in about}
        useless = [name for name, value in given.items() if value is not None and value is not False and value != {}]
        flag = f"--{kind}_model_name_or_path none"
        if useless:
            raise ValueError(f"{flag} leaves out the {kind} encoder: --{useless[0]} has nothing to act on.")
        if self.model_name_or_path is not None:
            raise ValueError(f"{flag} is for a new model: that of --model_name_or_path has the encoders that it has.")
        if self.audio_model_name_or_path is None and self.text_model_name_or_path is None:
            raise ValueError("A model needs an encoder: both --audio_ and --text_model_name_or_path are none.")


def check_peft() -> None:
    """Raise ImportError, with what to do, where the library that makes adapters is missing."""
    if importlib.util.find_spec("peft") is None:
        raise ImportError("Adapters (--lora_rank) need PEFT: pip install 'mmser[lora]', or pip install peft.")


LORA: dict[str, Any] = {"lora_target": ["all"], "lora_alpha": None, "lora_dropout": 0.0, "lora_save": "merged"}
NEW_MODEL = (
    *("random_audio_encoder", "audio_config_overrides", "random_text_encoder", "text_config_overrides"),
    "tokenizer_name",
)
SPEC_AUGMENT = ("apply_spec_augment", "mask_time_prob", "mask_time_length", "mask_feature_prob", "mask_feature_length")


def _several(text: str) -> dict[str, Any]:
    """What a flag takes that has one value, which stays a plain string, or several."""
    return {"nargs": "+", "help": text}


PLACES = ("data_dir", "manifest", "dataset_name")
ONE_OR_EACH = (
    *("train_split", "validation_split", "test_split", "audio_column", "label_column", "text_column"),
    *("speaker_column", "language_column", "corpus_column", "sex_column"),
)


@dataclass
class SourceArguments:
    """
    Where the clips come from. Give data_dir, manifest or dataset_name, with one source or several; names of splits and
    columns are for all of them, or one for each.
    """

    _argument_group_name = "Data"

    data_dir: list[str] | str | None = field(
        default=None,
        metadata=_several(
            "Folders with train/, validation/, test/, each with metadata.csv, or with folders of classes; or tables."
        ),
    )
    manifest: list[str] | str | None = field(
        default=None, metadata=_several("One CSV or JSONL file that lists all clips.")
    )
    dataset_name: list[str] | str | None = field(default=None, metadata=_several("Name of a data set on the Hub."))
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    label_map: str | None = field(
        default=None,
        metadata={
            "help": "Table with the columns corpus (or *), label and target: one of our labels, `other` for clips of "
            "none of them, or nothing to leave clips out."
        },
    )
    train_split: list[str] | str | None = field(
        default=None, metadata=_several("Name of the training split in the source.")
    )
    validation_split: list[str] | str | None = field(default=None, metadata=_several("Name of the validation split."))
    test_split: list[str] | str | None = field(default=None, metadata=_several("Name of the test split."))
    audio_column: list[str] | str | None = field(default="file_name", metadata=_several("Column with the audio file."))
    label_column: list[str] | str | None = field(
        default="label", metadata=_several("Column with the label, a name or an id.")
    )
    text_column: list[str] | str | None = field(
        default="transcription", metadata=_several("Column with the transcript.")
    )
    speaker_column: list[str] | str | None = field(default="speaker", metadata=_several("Column with the speaker."))
    language_column: list[str] | str | None = field(default="language", metadata=_several("Column with the language."))
    corpus_column: list[str] | str | None = field(default="corpus", metadata=_several("Column with the corpus."))
    sex_column: list[str] | str | None = field(default="sex", metadata=_several("Column with the speaker's sex."))
    label_distribution_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Votes of annotators or shares of the classes, in place of one label: a column for each class "
            "(its name, or class=column), or one column with a list of votes in each row."
        },
    )
    allow_speaker_overlap: bool = field(
        default=False,
        metadata={"help": "Accept speakers and clips that are in two splits. The scores will be too good."},
    )
    on_bad_example: str = field(
        default="error",
        metadata={
            "choices": ["error", "skip"],
            "help": "error, or skip: leave out bad rows, and list them in bad_examples.csv beside the results.",
        },
    )
    max_bad_examples: float = field(
        default=0.2,
        metadata={"help": "With --on_bad_example skip: more of the rows than this share end the run at once."},
    )
    allow_urls: bool = field(
        default=False,
        metadata={"help": "Fetch audio from addresses that the data name. Without it such a row is a bad row."},
    )
    allow_outside_files: bool = field(
        default=False,
        metadata={
            "help": "Read files outside of the folder of the data that they name or link to. A table given by "
            "its name may name any file."
        },
    )
    max_seconds: float = field(default=30.0, metadata={"help": "Longer clips are cropped, at random in training."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate each split on that many clips, drawn at random."}
    )

    def __post_init__(self):
        for name in (*PLACES, *ONE_OR_EACH):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) == 1:
                setattr(self, name, value[0])

    @property
    def columns(self) -> "DataColumns | list[DataColumns]":
        """Of all sources, or of each if one of them has names of its own."""
        from mmser.sources import DataColumns

        given = {column.name: _as_list(getattr(self, f"{column.name}_column")) for column in fields(DataColumns)}
        number = max(map(len, given.values()))
        for role, names in given.items():
            if len(names) not in (1, number):
                raise ValueError(f"--{role}_column: give one name, or one for each source; got {' '.join(names)}.")
        each = [
            DataColumns(**{role: _column(names[index % len(names)]) for role, names in given.items()})
            for index in range(number)
        ]
        return each if number > 1 else each[0]

    @property
    def common_columns(self) -> "DataColumns":
        """For clips that are in none of the sources: the names given once, and the usual ones of other columns."""
        from mmser.sources import DataColumns

        given = {column.name: getattr(self, f"{column.name}_column") for column in fields(DataColumns)}
        return DataColumns(**{role: _column(name) for role, name in given.items() if isinstance(name, str)})

    @property
    def source(self) -> dict:
        """The same as keyword arguments of `load_emotion_dataset`."""
        names = (
            *("data_dir", "manifest", "dataset_name", "dataset_config_name", "train_split", "validation_split"),
            *("test_split", "label_distribution_columns", "allow_speaker_overlap", "columns"),
            *("label_map", "allow_urls", "allow_outside_files"),
        )
        return {name: getattr(self, name) for name in names} | {"on_bad_example": self.bad_rows}

    @property
    def of_further_clips(self) -> dict:
        """Keyword arguments of `load_emotion_split`, for clips that are in none of the sources."""
        reach = {"allow_urls": self.allow_urls, "allow_outside_files": self.allow_outside_files}
        return {"columns": self.common_columns, "on_bad_example": self.bad_rows, **reach}

    @cached_property
    def bad_rows(self) -> "BadRows":
        """The rule for bad rows, and what this run left out so far."""
        from mmser.bad_rows import BadRows  # here: `--help` does not wait for transformers

        try:
            return BadRows(self.on_bad_example, self.max_bad_examples)
        except ValueError as error:
            raise ValueError(f"--{error}") from error

    @property
    def flags(self) -> list[str]:
        """Those that name the same clips to `eval_hf.py`."""
        words = []
        for item in fields(SourceArguments):
            value = getattr(self, item.name)
            if value != item.default and item.name != "max_eval_samples":
                words += [f"--{item.name}", *([] if value is True else map(str, _as_list(value)))]
        return words

    @property
    def places(self) -> list[str]:
        """Where all sources are."""
        return [place for kind in PLACES for place in _as_list(getattr(self, kind))]

    @property
    def on_the_hub(self) -> list[Named]:
        """The data sets on the Hub, for `mmser.names.reading`, as far as any are named."""
        return [Named("--dataset_name", name, is_dataset=True) for name in _as_list(self.dataset_name)]

    @property
    def is_hub(self) -> bool:
        """Whether all clips are of one data set on the Hub."""
        return self.dataset_name is not None and len(self.places) == 1

    @property
    def name(self) -> str:
        """What the source is called, or all of them together; empty if none was given."""
        if len(self.places) > 1:
            return " + ".join(Path(place).resolve().name for place in self.places)
        return next(iter(self.places), "")


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _column(name: str) -> str | None:
    return None if name.lower() == "none" else name


@dataclass
class DataArguments(SourceArguments):
    """Which data to train and evaluate on."""

    _argument_group_name = "Data"

    streaming: bool = field(default=False, metadata={"help": "Read the Hub data set while training; set --max_steps."})
    ood_dir: str | None = field(
        default=None, metadata={"help": "Folder of clips that are none of the classes, for the open-set check."}
    )
    labels: list[str] | None = field(default=None, metadata={"help": "Class names, in the order of their ids."})
    auxiliary_tasks: dict | str | None = field(
        default=None,
        metadata={
            "help": "JSON: tasks to learn beside the emotion, each from the column of its name: a list of classes, or "
            '"regression". E.g. \'{"sentiment": ["negative", "neutral", "positive"], "arousal": '
            '"regression"}\'. Default: those of --model_name_or_path, if any.'
        },
    )
    auxiliary_label_maps: dict | str | None = field(
        default=None,
        metadata={
            "help": 'JSON: tasks without a column that follow from the emotion, e.g. \'{"arousal": {"sad": 1, '
            '"angry": 5}}\'. `sentiment` needs no map.'
        },
    )
    auxiliary_weight: float | None = field(
        default=None, metadata={"help": "Weight of the loss of each of these tasks. Default: 0.3."}
    )
    validation_fraction: float = field(default=0.15, metadata={"help": "Share of speakers to hold out if not given."})
    test_fraction: float = field(default=0.15, metadata={"help": "Share of speakers to hold out if not given."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on that many clips, drawn at random."}
    )
    standardize_clips: int = field(
        default=500,
        metadata={
            "help": "Training clips whose mean and deviation standardise the states of a pretrained audio encoder "
            "before training; 0: leave them as they are."
        },
    )
    augment: bool = field(default=True, metadata={"help": "Augment the clips in training, by --augmentations."})
    augmentations: list[str] = field(
        default_factory=lambda: ["speed", "noise"],
        metadata={
            "help": "What happens to a training clip, each with probability 0.5: speed, room (reverberation), noise, "
            "equalizer (other microphones), level, codec (telephone, GSM, Opus, MP3)."
        },
    )
    cache_encoder_states: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the states of frozen encoders: computed once, read in every later epoch and run."
        },
    )
    augmented_copies: int = field(
        default=4, metadata={"help": "Augmented copies of each clip in that folder; epochs take turns with them."}
    )
    text_dropout: float = field(default=0.1, metadata={"help": "Share of training clips that lose their text."})
    audio_dropout: float = field(default=0.1, metadata={"help": "Share of training clips that lose their audio."})

    @property
    def flags(self) -> list[str]:
        """As of the clips, with those that are none of the classes."""
        return [*super().flags, *(["--ood_dir", self.ood_dir] if self.ood_dir else [])]

    def __post_init__(self):
        super().__post_init__()
        from mmser.augmentation import EFFECTS  # here: `--help` does not wait for scipy

        if unknown := [name for name in self.augmentations if name not in EFFECTS]:
            raise ValueError(f"--augmentations {' '.join(unknown)}: unknown. There are {', '.join(EFFECTS)}.")
        for name in ("auxiliary_tasks", "auxiliary_label_maps"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, parse_json(getattr(self, name), f"--{name}"))


COMPARED_GROUPS = ("sex", "language", "corpus", "duration")
CHECKPOINT_HELP = "MMSER checkpoint: folder or Hub name. A file in it, such as model.safetensors, means the folder."
TTA_PASSES = 5  # of a `--tta` without a number
SPLITS = ("test", "validation", "train")  # the first that is there is evaluated


def _same_flag(name: str, *aliases: str):
    """The flag `name` as training has it, with its default and its help text."""
    flag = TrainingFlags.__dataclass_fields__[name]
    return field(default=flag.default, metadata={**flag.metadata, **({"aliases": list(aliases)} if aliases else {})})


@dataclass
class EvaluationArguments:
    """What to judge, and how."""

    _argument_group_name = "Evaluation"
    _essentials = {  # noqa: RUF012
        "What to evaluate": (
            *("checkpoint", "data_dir", "dataset_name", "split", "ood_dir", "label_column", "text_column"),
        ),
        "How": ("output_dir", "calibrate", "tta", "group_by", "batch_size", "use_cpu"),
    }

    model_name_or_path: str = field(metadata={"aliases": ["--checkpoint"], "help": CHECKPOINT_HELP})
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
        default=None,
        metadata={
            "help": "Test-time augmentation: numbers of passes over each clip, e.g. 1 5 10. Without a number: "
            f"{TTA_PASSES}."
        },
    )
    group_by: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns to compare groups by, or duration. Default: those present of "
            f"{', '.join(COMPARED_GROUPS)}."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Training clips for the linear probe and the kNN distance, drawn at random."}
    )
    log_mel_probe: bool = field(
        default=False,
        metadata={
            "help": "Add a row to the report: a logistic regression on the mean and deviation of 40 log-mel bands, "
            "which audio alone has to beat."
        },
    )
    bootstrap_samples: int = field(default=1000, metadata={"help": "Resamples for the 95 %% intervals."})
    per_device_eval_batch_size: int = _same_flag("per_device_eval_batch_size", "--batch_size")
    dataloader_num_workers: int = _same_flag("dataloader_num_workers")
    use_amp: bool = _same_flag("use_amp")
    use_cpu: bool = field(default=False, metadata={"help": "Compute on the CPU even where there is a GPU."})
    seed: int = field(default=42, metadata={"help": "Seed of the clips that are drawn and of the augmentation."})

    def __post_init__(self):
        self.model_name_or_path = checkpoint_folder(self.model_name_or_path, "--checkpoint")
        if self.output_dir is None:
            checkpoint = Path(self.model_name_or_path)
            self.output_dir = str(checkpoint / "evaluation") if checkpoint.is_dir() else "runs/eval"
        if self.tta == []:
            self.tta = [TTA_PASSES]
        if min(self.tta or [1]) < 1:
            raise ValueError(f"--tta takes numbers of passes of at least 1, got {self.tta}.")
        for name in ("bootstrap_samples", "max_train_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")


@dataclass
class ExportArguments:
    """What to export, and how."""

    _argument_group_name = "Export"
    _essentials = {  # noqa: RUF012
        "What to export": ("checkpoint", "output_dir", "overwrite_output_dir", "format", "dtype"),
        "Make it smaller": ("vocabulary_text", "languages", "prune", "prune_layers", "recovery_epochs", "data_dir"),
    }

    model_name_or_path: str = field(metadata={"aliases": ["--checkpoint"], "help": CHECKPOINT_HELP})
    output_dir: str = field(metadata={"aliases": ["--save_dir"], "help": "Folder to write."})
    format: list[str] = field(
        default_factory=lambda: ["onnx"],
        metadata={"help": f"One or more of {', '.join(FORMATS)}: for onnxruntime, for PyTorch."},
    )
    dtype: str = field(
        default="float32",
        metadata={"choices": list(DTYPES), "help": "Of the weights. float16 is for GPUs, int8 for processors."},
    )
    languages: list[str] | None = field(
        default=None,
        metadata={
            "help": "Keep the tokens that the scripts of these languages need (ISO 639-1 codes). Languages of one "
            "script are not told apart: give texts for that."
        },
    )
    vocabulary_text: list[str] | None = field(
        default=None,
        metadata={
            "help": "Keep the tokens of the texts in these files (.txt, or .csv, .tsv, .jsonl with a text column, "
            "found as in training data), and single characters for all other words."
        },
    )
    vocabulary_size: int | None = field(
        default=None,
        metadata={"help": "Of the tokens of --vocabulary_text, keep that many: special ones, then the most frequent."},
    )
    prune: float = field(
        default=0.0,
        metadata={
            "help": "Share of the attention heads and feed-forward columns to remove from each layer of the encoders, "
            "such as 0.3; those that training clips need least. Needs data."
        },
    )
    prune_layers: float = field(
        default=0.0, metadata={"help": "Share of the layers of each encoder to remove. Needs data."}
    )
    calibration_clips: int = field(default=200, metadata={"help": "Training clips that decide what is removed."})
    recovery_epochs: float = field(
        default=0.0, metadata={"help": "Epochs to train what pruning left, on the same data."}
    )
    freeze_audio: bool = field(default=False, metadata={"help": "Train without the audio encoder in these epochs."})
    freeze_text: bool = field(default=False, metadata={"help": "Train without the text encoder in these epochs."})
    learning_rate: float = _same_flag("learning_rate", "--lr")
    per_device_train_batch_size: int = _same_flag("per_device_train_batch_size", "--batch_size")
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU even where there is a GPU."})
    seed: int = field(default=42, metadata={"help": "Seed of the clips that are drawn and of these epochs."})
    check: bool = field(
        default=True, metadata={"help": "Compare the export with PyTorch, and write nothing if they differ."}
    )
    tolerance: float | None = field(
        default=None,
        metadata={"help": "Largest difference of a probability to let through. Default: depends on --dtype."},
    )
    opset: int = field(default=OPSET, metadata={"help": "Version of the ONNX operators."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace what is in --output_dir."})

    def __post_init__(self):
        self.model_name_or_path = checkpoint_folder(self.model_name_or_path, "--checkpoint")
        for name in ("prune", "prune_layers"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} is a share, from 0 to below 1, got {getattr(self, name)}.")
        if self.vocabulary_size is not None and self.vocabulary_text is None:
            raise ValueError("--vocabulary_size chooses among the tokens of texts: add --vocabulary_text.")
        if self.calibration_clips < 1 or self.recovery_epochs < 0:
            raise ValueError("--calibration_clips must be at least 1, and --recovery_epochs 0 or more.")
        if self.recovery_epochs and not (self.prune or self.prune_layers):
            raise ValueError("--recovery_epochs trains what pruning left: add --prune or --prune_layers.")


TRAINING_ARGUMENTS = (ModelArguments, DataArguments, TrainingFlags)
EVALUATION_ARGUMENTS = (EvaluationArguments, SourceArguments)
EXPORT_ARGUMENTS = (ExportArguments, DataArguments)
NEGATIVE_HELP = {
    "augment": "Train on the clips as they are.",
    "check": "Write the export without comparing it with PyTorch.",
    "load_best_model_at_end": "Keep the weights of the last step.",
}
OPTIONAL_VALUES = ("tta",)


def command_parser(kinds: Sequence[Any], description: str | None = None) -> FlagParser:
    """A parser that knows all flags of a command, for `--help` and for wrong flags: it imports no torch."""
    shown = [with_trainer_flags(kind) if kind is TrainingFlags else kind for kind in kinds]
    about = {name: getattr(kinds[0], f"_{name}") for name in ("essentials", "usage") if hasattr(kinds[0], f"_{name}")}
    return FlagParser(shown, description, NEGATIVE_HELP, OPTIONAL_VALUES, **about)


def parse_arguments(kinds: Sequence[Any], arguments: Sequence[str], description: str | None = None) -> tuple:
    """
    Parse the flags of a command, after an optional JSON recipe whose keys are the names of the flags.

    Args:
        kinds: dataclasses with the fields that are flags, such as `TRAINING_ARGUMENTS`.
        arguments: the words of the command line.
        description: what `--help` says of the command.
    Returns: an object of each kind; `MMSERTrainingArguments` for `TrainingFlags`.
    Raises:
        ValueError: a word or a key of the recipe that is no flag, or values that do not go together.
    """
    words, _ = split_debug(arguments)
    recipe: dict[str, Any] = {}
    path = ""
    if words and words[0].endswith(".json"):
        path = words.pop(0)
        recipe = read_recipe(path)
    parser = command_parser(kinds, description)
    parser.set_recipe(recipe, path)
    parser.check(words)
    if TrainingFlags in kinds:  # only now, as this imports torch
        from mmser.training_arguments import MMSERTrainingArguments

        parser = FlagParser([MMSERTrainingArguments if kind is TrainingFlags else kind for kind in kinds])
        parser.set_recipe(recipe, path)
    return parser.parse_args_into_dataclasses(words, look_for_args_file=False)


def read_recipe(path: str) -> dict[str, Any]:
    """The flags of a JSON file; ValueError or FileNotFoundError if it has none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"The recipe {path} does not exist.{near_name(Path(path))}")
    try:
        content = read_content(Path(path), f"The recipe {path}").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"The recipe {path} is not UTF-8 text: save it as UTF-8.") from error
    return parse_json(content, f"The recipe {path}")
