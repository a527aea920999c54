# SPDX-License-Identifier: Apache-2.0
# /// script
# dependencies = [
#     "accelerate", "datasets", "evaluate", "scikit-learn", "scipy", "soundfile", "soxr", "torch",
#     "transformers>=5.20",
# ]
# ///
"""Fine-tune MMSER on emotional speech, evaluate it and save a checkpoint that explains itself.

python train_hf.py --data_dir my_data --output_dir runs/mine --epochs 10
python train_hf.py recipes/demo.json --learning_rate 5e-4      # flags win over the recipe
accelerate launch train_hf.py --dataset_name me/my_data --use_amp --push_to_hub
"""

import dataclasses
import json
import logging as python_logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    Wav2Vec2FeatureExtractor,
    set_seed,
)
from transformers.utils import logging

from caching_mmser import CachedStatesDataset, EncoderStateCache
from configuration_mmser import MMSERConfig
from data_mmser import (
    Augmenter,
    DataColumns,
    EmotionDataset,
    EmotionIterableDataset,
    MMSERDataCollator,
    class_counts,
    drop_unreadable,
    load_emotion_dataset,
    load_emotion_split,
)
from evaluation_mmser import format_table
from modeling_mmser import MMSERForAudioClassification, register_auto_classes
from processing_mmser import MMSERProcessor
from reporting_mmser import (
    describe_data,
    describe_rows,
    earlier_training,
    evaluate_open_set,
    predict_clips,
    predict_rows,
    split_groups,
    write_results,
)
from training_mmser import (
    MMSERTrainer,
    MMSERTrainingArguments,
    average_checkpoints,
    last_complete_checkpoint,
    leave_process_group,
    parameter_table,
)

logger = logging.get_logger("train_hf")
OWN_LOGGERS = ("train_hf", "eval_hf")
OWN_LOGGERS += tuple(
    f"{name}_mmser" for name in ("caching", "data", "evaluation", "modeling", "processing", "training")
)

SPEC_AUGMENT = ("apply_spec_augment", "mask_time_prob", "mask_time_length", "mask_feature_prob", "mask_feature_length")
STREAM_BUFFER = 1000  # clips held to shuffle a stream
STREAM_SAMPLE = 2000  # clips of a stream that OpenMax is fitted on


@dataclass
class ModelArguments:
    """Which model to start from."""

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
    audio_model_name_or_path: str = field(
        default="facebook/wav2vec2-base", metadata={"help": "Audio encoder: Hub name or folder."}
    )
    text_model_name_or_path: str = field(
        default="google-bert/bert-base-multilingual-cased", metadata={"help": "Text encoder: Hub name or folder."}
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
    config_overrides: dict | str | None = field(
        default=None, metadata={"help": "JSON: fields of MMSERConfig, e.g. '{\"classifier_num_layers\": 5}'."}
    )
    freeze_audio: bool = field(default=False, metadata={"help": "Freeze the audio encoder."})
    freeze_text: bool = field(default=False, metadata={"help": "Freeze the text encoder."})
    freeze_feature_encoder: bool = field(
        default=False, metadata={"help": "Freeze only the convolutions in front of the audio encoder."}
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

    def __post_init__(self):
        for name in ("audio_config_overrides", "text_config_overrides", "config_overrides"):
            value = getattr(self, name)
            setattr(self, name, json.loads(value) if isinstance(value, str) else value or {})
        for kind in ("audio", "text"):
            if getattr(self, f"{kind}_config_overrides") and not getattr(self, f"random_{kind}_encoder"):
                raise ValueError(f"--{kind}_config_overrides changes the architecture: add --random_{kind}_encoder.")
        if self.average_with and self.model_name_or_path is None:
            raise ValueError("--average_with needs a first checkpoint: add --model_name_or_path.")
        if self.audio_num_hidden_layers is not None and (self.model_name_or_path or self.random_audio_encoder):
            raise ValueError(
                "--audio_num_hidden_layers cuts a pretrained audio encoder: give it when starting from one."
            )
        if self.freeze_audio and any(getattr(self, name) for name in SPEC_AUGMENT):
            raise ValueError("SpecAugment masks what an encoder learns from: it has no effect with --freeze_audio.")


@dataclass
class SourceArguments:
    """Where the clips come from. Give one of data_dir, manifest and dataset_name."""

    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with train/, validation/, test/, each with metadata.csv or .jsonl."}
    )
    manifest: str | None = field(default=None, metadata={"help": "One CSV or JSONL file that lists all clips."})
    dataset_name: str | None = field(default=None, metadata={"help": "Name of a data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_split: str | None = field(default=None, metadata={"help": "Name of the training split in the source."})
    validation_split: str | None = field(default=None, metadata={"help": "Name of the validation split."})
    test_split: str | None = field(default=None, metadata={"help": "Name of the test split."})
    audio_column: str = field(default="file_name", metadata={"help": "Column with the audio file."})
    label_column: str = field(default="label", metadata={"help": "Column with the label, a name or an id."})
    text_column: str = field(default="transcription", metadata={"help": "Column with the transcript."})
    speaker_column: str = field(default="speaker", metadata={"help": "Column with the speaker."})
    language_column: str = field(default="language", metadata={"help": "Column with the language."})
    corpus_column: str = field(default="corpus", metadata={"help": "Column with the corpus."})
    sex_column: str = field(default="sex", metadata={"help": "Column with the speaker's sex."})
    allow_speaker_overlap: bool = field(
        default=False, metadata={"help": "Accept speakers that are in two splits. The scores will be too good."}
    )
    on_bad_example: str = field(
        default="error", metadata={"help": "error, or skip: leave out bad rows and count them."}
    )
    max_seconds: float = field(default=30.0, metadata={"help": "Longer clips are cropped, at random in training."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate each split on that many clips, drawn at random."}
    )

    @property
    def columns(self) -> DataColumns:
        names = [column.name for column in dataclasses.fields(DataColumns)]
        given = {name: getattr(self, f"{name}_column") for name in names}
        return DataColumns(**{name: None if column.lower() == "none" else column for name, column in given.items()})

    @property
    def source(self) -> dict:
        """The same as keyword arguments of `load_emotion_dataset`."""
        names = ("data_dir", "manifest", "dataset_name", "dataset_config_name", "train_split", "validation_split")
        names += ("test_split", "allow_speaker_overlap", "on_bad_example", "columns")
        return {name: getattr(self, name) for name in names}

    @property
    def name(self) -> str:
        """What the source is called."""
        return self.data_dir or self.manifest or self.dataset_name


@dataclass
class DataArguments(SourceArguments):
    """Which data to train and evaluate on."""

    streaming: bool = field(default=False, metadata={"help": "Read the Hub data set while training; set --max_steps."})
    ood_dir: str | None = field(
        default=None, metadata={"help": "Folder of clips that are none of the classes, for the open-set check."}
    )
    labels: list[str] | None = field(default=None, metadata={"help": "Class names, in the order of their ids."})
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
    augment: bool = field(default=True, metadata={"help": "Speed and noise augmentation in training."})
    augment_noise: bool = field(
        default=True, metadata={"help": "Noise too; without it, augmentation changes the speed alone."}
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


def parse_arguments(arguments: list[str]) -> tuple[ModelArguments, DataArguments, MMSERTrainingArguments]:
    """Parse flags, after an optional JSON recipe whose keys are the names of the flags."""
    parser = HfArgumentParser((ModelArguments, DataArguments, MMSERTrainingArguments), description=__doc__)
    if arguments and arguments[0].endswith(".json"):
        recipe = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
        destination = {
            option.removeprefix("--"): action.dest
            for action in parser._actions
            for option in action.option_strings
            if action.const is not False  # --no_augment and its like: in a recipe it is "augment": false
        }
        unknown = sorted(set(recipe) - set(destination))
        if unknown:
            raise ValueError(f"{arguments[0]} has unknown keys: {', '.join(unknown)}. See `train_hf.py --help`.")
        parser.set_defaults(**{destination[key]: value for key, value in recipe.items()})
        arguments = arguments[1:]
    return parser.parse_args_into_dataclasses(arguments)


def random_encoder_config(kind: str, arguments: ModelArguments) -> PreTrainedConfig:
    """Configuration of an encoder (`kind` "audio" or "text") to start at random; the default ones need no download."""
    name = getattr(arguments, f"{kind}_model_name_or_path")
    if name == ModelArguments.__dataclass_fields__[f"{kind}_model_name_or_path"].default:
        config = getattr(MMSERConfig(), f"{kind}_config")
    else:
        config = AutoConfig.from_pretrained(name)
    return type(config)(**{**config.to_dict(), **getattr(arguments, f"{kind}_config_overrides")})


def load_processor(arguments: ModelArguments) -> MMSERProcessor:
    """The processor of the checkpoint, or one joined from the feature extractor and tokenizer of the two encoders."""
    if arguments.model_name_or_path:
        register_auto_classes()  # else loading the tokenizer asks whether to run the code in the checkpoint
        return MMSERProcessor.from_pretrained(arguments.model_name_or_path)
    name = arguments.audio_model_name_or_path
    if arguments.random_audio_encoder and name == ModelArguments.audio_model_name_or_path:
        feature_extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    else:
        feature_extractor = AutoFeatureExtractor.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer_name or arguments.text_model_name_or_path)
    return MMSERProcessor(feature_extractor, tokenizer)


def load_model(
    arguments: ModelArguments, label_names: list[str], processor: MMSERProcessor
) -> MMSERForAudioClassification:
    """The model to train, with the label names of the data and what is to be frozen frozen."""
    labels = {
        "id2label": dict(enumerate(label_names)),
        "label2id": {label: i for i, label in enumerate(label_names)},
    }
    if arguments.model_name_or_path:
        model = MMSERForAudioClassification.from_pretrained(
            arguments.model_name_or_path,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # another label set gets new output layers; the loading report names them
            # those of the earlier training set, as many as it had labels, say nothing about this one
            **{"class_counts": None, **labels, **arguments.config_overrides},
        )
        average_checkpoints(model, [arguments.model_name_or_path, *arguments.average_with])
    else:
        sources = {"audio": arguments.audio_model_name_or_path, "text": arguments.text_model_name_or_path}
        if arguments.random_text_encoder:
            arguments.text_config_overrides.setdefault("vocab_size", len(processor.tokenizer))
        for kind in sources:
            if getattr(arguments, f"random_{kind}_encoder"):
                sources[kind] = random_encoder_config(kind, arguments)
        model = MMSERForAudioClassification.from_backbones(
            sources["audio"],
            sources["text"],
            audio_num_hidden_layers=arguments.audio_num_hidden_layers,
            **labels,
            **arguments.config_overrides,
        )
    if arguments.attn_implementation is not None:
        model.set_attn_implementation(arguments.attn_implementation)
    spec_augment = {name: getattr(arguments, name) for name in SPEC_AUGMENT if getattr(arguments, name) is not None}
    if spec_augment:
        model.config.audio_config.update(spec_augment)
        check_spec_augment(model)
    if arguments.freeze_audio:
        model.freeze_audio_encoder()
    if arguments.freeze_text:
        model.freeze_text_encoder()
    if arguments.freeze_feature_encoder:
        model.freeze_feature_encoder()
    return model


def check_spec_augment(model: MMSERForAudioClassification) -> None:
    """What SpecAugment needs, if it was off when the encoder was made or is set only now."""
    config, encoder = model.config.audio_config, model.base_model.audio_encoder
    is_masked = config.mask_time_prob > 0 or config.mask_feature_prob > 0
    if is_masked and not config.apply_spec_augment:
        raise ValueError("Shares and lengths of SpecAugment have no effect without --apply_spec_augment.")
    if is_masked and not model.config.uses_log_mel and not hasattr(encoder, "masked_spec_embed"):
        encoder.masked_spec_embed = torch.nn.Parameter(torch.rand(config.hidden_size))


def encoder_name(arguments: ModelArguments, kind: str) -> str:
    """What the model card calls an encoder: the checkpoint's own name, and whether it started at random."""
    if arguments.model_name_or_path:
        return f"as in {Path(arguments.model_name_or_path).name}"
    name = getattr(arguments, f"{kind}_model_name_or_path")
    name = Path(name).name if Path(name).exists() else name
    if not getattr(arguments, f"random_{kind}_encoder"):
        return name
    changed = " with other sizes" if getattr(arguments, f"{kind}_config_overrides") else ""
    return f"{name} architecture{changed}, started at random"


def encoder_cache(
    arguments: DataArguments, training_arguments: MMSERTrainingArguments, model, processor: MMSERProcessor
) -> EncoderStateCache | None:
    """The cache for the states of the frozen encoders, if one is wanted."""
    if arguments.cache_encoder_states is None:
        return None
    if arguments.streaming:
        raise ValueError("--cache_encoder_states goes over the clips before training; it cannot with --streaming.")
    precision = torch.bfloat16 if training_arguments.bf16 else torch.float16 if training_arguments.fp16 else None
    model.to(training_arguments.device)
    return EncoderStateCache(arguments.cache_encoder_states, model, processor, autocast=precision)


def load_data(arguments: DataArguments, seed: int):
    """The splits, the label names, and the open-set clips if there are any."""
    splits, label_names = load_emotion_dataset(
        **arguments.source,
        label_names=arguments.labels,
        streaming=arguments.streaming,
        validation_fraction=arguments.validation_fraction,
        test_fraction=arguments.test_fraction,
        seed=seed,
    )
    for name in splits:
        limit = arguments.max_train_samples if name == "train" else arguments.max_eval_samples
        splits[name] = draw_clips(splits[name], limit, seed)
    unknown = None
    if arguments.ood_dir:
        unknown = load_emotion_split(
            arguments.ood_dir,
            columns=arguments.columns,
            label_names=label_names,
            on_bad_example=arguments.on_bad_example,
        )
    return splits, label_names, unknown


def draw_clips(split, limit: int | None, seed: int):
    """At most `limit` clips, drawn at random; all of them by default."""
    if limit is None:
        return split
    if limit < 1:
        raise ValueError(f"The number of clips to draw must be at least 1, got {limit}.")
    shuffled = split.shuffle(seed=seed)
    if isinstance(split, datasets.IterableDataset):
        return shuffled.take(limit)
    return shuffled.select(range(min(limit, len(shuffled))))


def some_clips(split, number: int):
    """Clips from all over a split, the same on every process; the first ones of a stream."""
    if isinstance(split, datasets.IterableDataset):
        return split.take(number)
    return split.select(np.unique(np.linspace(0, len(split) - 1, min(number, len(split))).round().astype(int)))


def checkpoint_to_resume(arguments: MMSERTrainingArguments) -> str | None:
    """The checkpoint that was asked for; by default the last complete one in the output folder, if there is any."""
    wanted = str(arguments.resume_from_checkpoint)
    if wanted.lower() in ("false", "no"):
        return None
    if wanted.lower() not in ("none", "true"):
        if not (Path(wanted) / "trainer_state.json").is_file():
            raise FileNotFoundError(f"--resume_from_checkpoint: {wanted} is no checkpoint (no trainer_state.json).")
        return wanted
    checkpoint = last_complete_checkpoint(arguments.output_dir)
    if checkpoint:
        logger.info(f"Resuming from {checkpoint}. Choose another --output_dir to start anew.")
    return checkpoint


def step_of(checkpoint: str) -> int:
    """The training step that a checkpoint was saved at."""
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]


def set_up_logging(arguments: MMSERTrainingArguments) -> None:
    """Our own modules tell what they do, on the main process; others warn only. `--log_level` sets both."""
    level = arguments.get_process_log_level()
    logging.set_verbosity(level)
    logging.enable_default_handler()
    logging.enable_explicit_format()
    python_logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    tells = arguments.log_level == "passive" and arguments.should_log
    for name in OWN_LOGGERS:
        python_logging.getLogger(name).setLevel(python_logging.INFO if tells else level)


def main(arguments: list[str] | None = None) -> dict:
    """Train, evaluate and save as the flags say. Returns what is written to `eval_results.json`."""
    command = sys.argv[1:] if arguments is None else arguments
    model_arguments, data_arguments, training_arguments = parse_arguments(command)
    set_up_logging(training_arguments)
    set_seed(training_arguments.seed)

    checkpoint = checkpoint_to_resume(training_arguments)
    first_step = step_of(checkpoint) if checkpoint else 0  # now: `save_total_limit` may delete the checkpoint
    data_seed = training_arguments.seed if training_arguments.data_seed is None else training_arguments.data_seed
    splits, label_names, unknown = load_data(data_arguments, data_seed)
    processor = load_processor(model_arguments)
    model = load_model(model_arguments, label_names, processor)
    # Token positions that the encoder has no embedding for must be cut by the tokenizer
    positions = getattr(model.config.text_config, "max_position_embeddings", None)
    if positions is not None:
        processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, positions)
    teacher = None
    if model_arguments.teacher_name_or_path:
        if data_arguments.cache_encoder_states:
            raise ValueError("--cache_encoder_states keeps states of this model's encoders: a teacher has its own.")
        teacher = MMSERForAudioClassification.from_pretrained(model_arguments.teacher_name_or_path)
    reader_options = {
        "sampling_rate": processor.feature_extractor.sampling_rate,
        "max_seconds": data_arguments.max_seconds,
    }
    if data_arguments.streaming:
        # A stream comes in stored order, which often is by class
        splits["train"] = splits["train"].shuffle(seed=data_seed, buffer_size=STREAM_BUFFER)
        logger.warning("The clips of a stream are not counted beforehand: the focal loss weighs all classes alike.")
    else:
        num_clips = sum(map(len, splits.values()))
        check = {"on_bad_example": data_arguments.on_bad_example, **reader_options}
        splits = {name: drop_unreadable(split, **check) for name, split in splits.items()}
        unknown = None if unknown is None else drop_unreadable(unknown, **check)
        num_skipped = num_clips - sum(map(len, splits.values()))
        model.config.class_counts = class_counts(splits["train"], len(label_names))
        logger.info(f"Training clips per class: {dict(zip(label_names, model.config.class_counts, strict=True))}")
    parameters = parameter_table(model)
    logger.info("Parameters:\n" + format_table(parameters, ["part", "parameters", "trainable"]))

    dataset_class = EmotionIterableDataset if data_arguments.streaming else EmotionDataset
    options = {"seed": data_seed, "on_bad_example": data_arguments.on_bad_example, **reader_options}

    cache = encoder_cache(data_arguments, training_arguments, model, processor)

    def cached(dataset, copies: int = 0):
        if cache is None:
            return dataset
        with training_arguments.main_process_first():
            return CachedStatesDataset(dataset, cache, copies)

    def evaluation_dataset(split, **more):
        return cached(dataset_class(split, **options, **more))

    augmenter = Augmenter() if data_arguments.augment_noise else Augmenter(snr_db_range=None)
    train_dataset = dataset_class(
        splits["train"],
        training=True,
        augmenter=augmenter if data_arguments.augment else None,
        text_dropout=data_arguments.text_dropout,
        audio_dropout=data_arguments.audio_dropout,
        **options,
    )
    train_dataset = cached(train_dataset, data_arguments.augmented_copies if data_arguments.augment else 0)
    if "validation" not in splits:  # nothing to evaluate on while training, so no best checkpoint either
        training_arguments.eval_strategy, training_arguments.load_best_model_at_end = "no", False
    trainer = MMSERTrainer(
        model=model,
        args=training_arguments,
        teacher=teacher,
        train_dataset=train_dataset,
        eval_dataset=evaluation_dataset(splits["validation"]) if "validation" in splits else None,
        data_collator=MMSERDataCollator(processor),
        processing_class=processor,
    )
    results = {
        "model_name": trainer.hub_model_id or Path(training_arguments.output_dir).resolve().name,
        "label_names": label_names,
        "encoders": {
            "audio": encoder_name(model_arguments, "audio"),
            "text": encoder_name(model_arguments, "text"),
        },
        "parameters": parameters,
        "data": describe_data(data_arguments.name, splits, is_hub=data_arguments.dataset_name is not None),
        "license": model_arguments.license,
    }

    is_new = checkpoint is None and model_arguments.model_name_or_path is None
    if is_new and not model_arguments.random_audio_encoder and data_arguments.standardize_clips:
        some = some_clips(splits["train"], data_arguments.standardize_clips)
        trainer.fit_standardization(evaluation_dataset(some))
    results["training"] = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if checkpoint and trainer.state.global_step == first_step:  # it was finished before
        results["training"] = earlier_training(training_arguments.output_dir) or results["training"]
    results["training"]["skipped_clips"] = train_dataset.num_skipped if data_arguments.streaming else num_skipped

    held_out = splits.get("validation")
    known_clips = splits["train"].take(STREAM_SAMPLE) if data_arguments.streaming else splits["train"]
    results["calibration"] = trainer.finalize(
        evaluation_dataset(known_clips), None if held_out is None else evaluation_dataset(held_out)
    )
    trainer.save_model()
    trainer.save_state()
    known = None
    for name in ("validation", "test"):
        if name in splits:
            rows = predict_rows(trainer, splits[name], evaluation_dataset)
            results[name] = describe_rows(rows, label_names, split_groups(splits[name]), trainer.train_outputs)
            known = rows["model"]
    if unknown is not None and known is not None:
        sets = {"unknown": predict_clips(trainer, evaluation_dataset(unknown), unknown["row"])}
        temperature = model.temperature.item()
        results["open_set"] = evaluate_open_set(known, sets, trainer.train_outputs, temperature)["unknown"]
    if trainer.is_world_process_zero():
        token = training_arguments.hub_token  # what is written here is for everyone to read
        command = [argument.replace(token, "...") if token else argument for argument in command]
        print(
            write_results(results, training_arguments.output_dir, ["train_hf.py", *command], training_arguments.device)
        )
    if training_arguments.push_to_hub:
        trainer.push_to_hub()
    return results


def command() -> None:
    """`mmser-train`."""
    main()
    leave_process_group()


if __name__ == "__main__":
    command()
