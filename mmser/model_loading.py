# SPDX-License-Identifier: Apache-2.0
"""The model and the processor that a training starts from: two encoders, or an MMSER checkpoint."""

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, Wav2Vec2FeatureExtractor
from transformers.utils import logging

from auxiliary_mmser import AuxiliaryHead
from configuration_mmser import MODALITIES, MMSERConfig, check_names
from mmser.arguments import SPEC_AUGMENT, ModelArguments
from mmser.averaging import average_checkpoints
from mmser.console import without_bars_of_weights
from mmser.labels import match_label_names
from mmser.lora import add_adapters
from mmser.names import Named, reading
from modeling_mmser import (
    ClassAnchorClustering,
    MMSERForAudioClassification,
    PrototypeMemory,
    register_auto_classes,
)
from pipeline_mmser import MMSEROnnxConfig
from processing_mmser import MMSERProcessor, load_feature_extractor

logger = logging.get_logger(__name__)


def load_label_names(checkpoint: str, flag: str = "--checkpoint") -> list[str]:
    """The classes of an MMSER checkpoint, in the order of their ids, from its configuration alone. `flag` named it."""
    return label_names_of(load_config(checkpoint, flag))


def load_config(checkpoint: str, flag: str = "--checkpoint") -> MMSERConfig:
    """The configuration of an MMSER checkpoint that `flag` named."""
    with reading([Named(flag, checkpoint)]):
        content, _ = MMSERConfig.get_config_dict(checkpoint)
    if content.get("model_type") == MMSEROnnxConfig.model_type:
        raise ValueError(
            f"{checkpoint} is an export, without PyTorch weights: give {flag} the checkpoint that it was made from."
        )
    if content.get("model_type") != MMSERConfig.model_type:
        found = f"model type {content['model_type']!r}" if content.get("model_type") else "no config.json with a type"
        raise ValueError(f"{checkpoint} is not an MMSER checkpoint: it has {found}.")
    return MMSERConfig.from_dict(content)


def random_encoder_config(kind: str, arguments: ModelArguments) -> PreTrainedConfig:
    """Configuration of an encoder (`kind` "audio" or "text") to start at random; the default ones need no download."""
    name = getattr(arguments, f"{kind}_model_name_or_path")
    if name == ModelArguments.__dataclass_fields__[f"{kind}_model_name_or_path"].default:
        config = getattr(MMSERConfig(), f"{kind}_config")
    else:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    flag = f"{kind}_config_overrides"
    try:
        check_names(
            getattr(arguments, flag), {*config.to_dict(), *config.attribute_map}, f"field of {type(config).__name__}"
        )
    except TypeError as error:
        raise ValueError(f"--{flag}: {error}") from error
    return type(config)(**{**config.to_dict(), **getattr(arguments, flag)})


def load_processor(arguments: ModelArguments) -> MMSERProcessor:
    """The processor of the checkpoint, or one joined from the feature extractor and tokenizer of the two encoders."""
    if arguments.model_name_or_path:
        register_auto_classes()  # else loading the tokenizer asks whether to run the code in the checkpoint
        with reading(models_of(arguments)):
            return MMSERProcessor.from_pretrained(arguments.model_name_or_path)
    with reading(models_of(arguments)):
        return _join_processor(arguments)


def models_of(arguments: ModelArguments) -> list[Named]:
    """The checkpoints, encoders and tokenizers that a training starts from, as far as they must be read."""
    if arguments.model_name_or_path:
        others = [Named("--average_with", name) for name in arguments.average_with]
        return [Named("--model_name_or_path", arguments.model_name_or_path), *others]
    models = []
    for kind in ("audio", "text"):
        flag = f"{kind}_model_name_or_path"
        name, is_random = getattr(arguments, flag), getattr(arguments, f"random_{kind}_encoder")
        is_enough = is_random and name == getattr(ModelArguments, flag)  # the default architectures are known
        has_tokenizer = kind == "audio" or arguments.tokenizer_name is not None
        if name is None or (is_enough and has_tokenizer):
            continue
        start = "" if is_random else f"start the {kind} encoder at random with --random_{kind}_encoder"
        tokenizer = "" if has_tokenizer else "give a folder with a tokenizer in --tokenizer_name"
        advice = " and ".join(part for part in (start, tokenizer) if part)
        models.append(Named(f"--{flag}", name, f"Give a folder, or {advice}." if advice else "Give a folder."))
    if arguments.tokenizer_name:
        models.append(Named("--tokenizer_name", arguments.tokenizer_name))
    return models


def _join_processor(arguments: ModelArguments) -> MMSERProcessor:
    name = arguments.audio_model_name_or_path
    feature_extractor = tokenizer = None
    if name is None:
        pass
    elif arguments.random_audio_encoder and name == ModelArguments.audio_model_name_or_path:
        feature_extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    else:
        feature_extractor = load_feature_extractor(name)
    if arguments.text_model_name_or_path is not None:
        name = arguments.tokenizer_name or arguments.text_model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return MMSERProcessor(feature_extractor, tokenizer)


@without_bars_of_weights()
def load_model(
    arguments: ModelArguments,
    label_names: list[str],
    processor: MMSERProcessor,
    auxiliary: dict[str, Any] | None = None,
    allow_int8: bool = False,
) -> MMSERForAudioClassification:
    """
    The model to train, with the label names of the data, and with the parts frozen that the flags name.

    Args:
        auxiliary: `TrainingData.auxiliary`, the tasks beside the emotion.
        allow_int8: whether only layers learn that an int8 model has in floats, such as the last.
    """
    labels = {
        "id2label": dict(enumerate(label_names)),
        "label2id": {label: i for i, label in enumerate(label_names)},
    }
    overrides: Any = arguments.config_overrides
    try:
        MMSERConfig.check_fields(overrides)
    except TypeError as error:
        raise ValueError(f"--config_overrides: {error}") from error
    if moot := sorted({"auxiliary_tasks", "auxiliary_label_maps", *(auxiliary or {})} & set(overrides)):
        raise ValueError(f"--config_overrides cannot set {moot[0]}: the flags --auxiliary_... also read the targets.")
    labels |= auxiliary or {}
    start = _from_checkpoint if arguments.model_name_or_path else _from_encoders
    with reading(models_of(arguments)):
        model = start(arguments, labels, processor)
    if model.config.int8_weights and not allow_int8:
        raise ValueError(
            f"{arguments.model_name_or_path} is in int8 and does not learn, but for its last layer (--adapt): train "
            "the checkpoint that it was made from."
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
    if arguments.freeze_audio_layers is not None:
        model.freeze_audio_layers(arguments.freeze_audio_layers)
    if arguments.lora_rank is not None:
        add_adapters(
            model,
            arguments.lora_rank,
            arguments.lora_alpha,
            arguments.lora_dropout,
            arguments.lora_target,
            arguments.lora_save,
            adapter_bases(arguments),
        )
    return model


def adapter_bases(arguments: ModelArguments) -> dict[str, str]:
    """Where each encoder can be read again when adapters of it are loaded; an average of checkpoints is nowhere."""
    if arguments.average_with:
        return {}
    names = {kind: getattr(arguments, f"{kind}_model_name_or_path") for kind in MODALITIES}
    if arguments.model_name_or_path:
        return dict.fromkeys(names, arguments.model_name_or_path)
    return {
        kind: name
        for kind, name in names.items()
        if name is not None and not getattr(arguments, f"random_{kind}_encoder")
    }


def _from_checkpoint(arguments: ModelArguments, labels: dict, processor: MMSERProcessor) -> Any:
    names = [str(arguments.model_name_or_path), *arguments.average_with]
    tasks = {name: value for name, value in labels.items() if name.startswith("auxiliary_")}
    overrides: Any = arguments.config_overrides
    model, report = MMSERForAudioClassification.from_pretrained(
        names[0],
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # of what --config_overrides resizes; the loading report names it
        output_loading_info=True,
        # The class counts of the checkpoint are those of its own training clips
        **{"class_counts": None, **overrides, **tasks},
    )
    check_mismatches(names[0], report["mismatched_keys"])
    average_checkpoints(model, names)
    change_labels(model, list(labels["label2id"]))
    _restart_changed_tasks(model, load_config(names[0]).auxiliary_tasks)
    return model


def check_mismatches(checkpoint: str, mismatched: Collection[tuple[str, Sequence[int], Sequence[int]]]) -> None:
    """
    Refuse weights that start anew although nothing but the checkpoint itself asks for another size.

    Args:
        checkpoint: a folder, or a name on the Hub.
        mismatched: name, shape in the file and shape in the model, of weights that did not fit.
    Raises:
        ValueError: the configuration of the checkpoint is not that of its weights; it names the first and its shapes.
    """
    if not mismatched:
        return
    with torch.device("meta"):
        own = MMSERForAudioClassification(load_config(checkpoint)).state_dict()
    wrong = [
        f"{name} is {list(stored)} in the weights and {list(own[name].shape)} by config.json"
        for name, stored, _ in sorted(mismatched)
        if name in own and own[name].shape != torch.Size(stored)
    ]
    if wrong:
        others = f" ({len(wrong) - 1} others differ too)" if len(wrong) > 1 else ""
        raise ValueError(
            f"The configuration of {checkpoint} is not that of its weights: {wrong[0]}{others}. Take config.json and "
            "the weights from one checkpoint."
        )


def _restart_changed_tasks(model: MMSERForAudioClassification, earlier: dict[str, Any]) -> None:
    """Start the heads of tasks anew whose classes, or their order, are not those of the checkpoint."""
    for task, kind in model.config.auxiliary_tasks.items():
        if task in earlier and earlier[task] != kind:
            logger.warning(f"{task} was {earlier[task]} in the checkpoint and is {kind} now: its head starts anew.")
            head = AuxiliaryHead(model.config, kind)
            for module in head.modules():
                model._init_weights(module)
            model.auxiliary.add_module(f"{task}_head", head)


@torch.no_grad()
def change_labels(model: MMSERForAudioClassification, label_names: list[str]) -> None:
    """
    Give a model other classes: one that keeps its name keeps its weights, at its new id; the others start anew.

    A row for each class have the output layer, the anchors, the prototypes and OpenMax, which must be fitted anew.
    """
    earlier = label_names_of(model.config)
    places = match_label_names(label_names, earlier)
    config: Any = model.config
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: index for index, name in enumerate(label_names)}
    if places == list(range(len(earlier))):
        return
    output = nn.Linear(config.feature_size, len(label_names))
    anchors, prototypes = ClassAnchorClustering(config), PrototypeMemory(config)
    for part in (output, anchors, prototypes):
        model._init_weights(part)
    for old, new in (
        (model.classifier.output.weight, output.weight),
        (model.classifier.output.bias, output.bias),
        (model.anchors.anchors, anchors.anchors),
        (model.prototypes.prototypes, prototypes.prototypes),
    ):
        for index, place in enumerate(places):
            if place is not None:
                new[index] = old[place]
        old.data = new.data
    model.classifier.output.out_features = len(label_names)
    for name, buffer in list(model.openmax.named_buffers()):
        setattr(model.openmax, name, buffer.new_zeros(len(label_names), *buffer.shape[1:]))
    model.openmax.reset()
    kept = [name for name, place in zip(label_names, places, strict=True) if place is not None]
    new_names = [name for name, place in zip(label_names, places, strict=True) if place is None]
    logger.warning(
        f"The classes of the checkpoint are {', '.join(earlier)}; now they are {', '.join(label_names)}. Output "
        f"weights kept: of {', '.join(kept) or 'none'}; started anew: of {', '.join(new_names) or 'none'}."
    )


def _from_encoders(arguments: ModelArguments, labels: dict, processor: MMSERProcessor) -> Any:
    sources: dict[str, Any] = {
        "audio": arguments.audio_model_name_or_path,
        "text": arguments.text_model_name_or_path,
    }
    overrides: Any = arguments.config_overrides
    if arguments.random_text_encoder:
        text_overrides: Any = arguments.text_config_overrides
        text_overrides.setdefault("vocab_size", len(processor.tokenizer))
    for kind in sources:
        if getattr(arguments, f"random_{kind}_encoder"):
            sources[kind] = random_encoder_config(kind, arguments)
    return MMSERForAudioClassification.from_backbones(
        sources["audio"],
        sources["text"],
        audio_num_hidden_layers=arguments.audio_num_hidden_layers,
        text_num_hidden_layers=arguments.text_num_hidden_layers,
        **labels,
        **overrides,
    )


def check_spec_augment(model: MMSERForAudioClassification) -> None:
    """Refuse settings of SpecAugment without effect; make the embedding that a waveform encoder needs for it."""
    config: Any = model.config.audio_config
    encoder: Any = model.base_model.audio_encoder
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
    if name is None:
        return "none"
    name = Path(name).name if Path(name).exists() else name
    if not getattr(arguments, f"random_{kind}_encoder"):
        return name
    changed = " with other sizes" if getattr(arguments, f"{kind}_config_overrides") else ""
    return f"{name} architecture{changed}, started at random"


@without_bars_of_weights()
def load_teacher(
    arguments: ModelArguments, model: MMSERForAudioClassification, processor: MMSERProcessor
) -> MMSERForAudioClassification | None:
    """The model to distil from, if there is one: with the labels and the inputs of `model`, which learns from it."""
    name = arguments.teacher_name_or_path
    if name is None:
        return None
    register_auto_classes()
    with reading([Named("--teacher_name_or_path", name)]):
        teacher_processor = MMSERProcessor.from_pretrained(name)
        check_teacher(model.config, MMSERConfig.from_pretrained(name), processor, teacher_processor)
        return MMSERForAudioClassification.from_pretrained(name)


def check_teacher(
    config: MMSERConfig,
    teacher_config: MMSERConfig,
    processor: MMSERProcessor | None = None,
    teacher_processor: MMSERProcessor | None = None,
) -> None:
    """
    Refuse a teacher that means something else by a class, or by a number of the input, than the model does.

    Args:
        config, teacher_config: of the two models.
        processor, teacher_processor: of the two models, as far as they are known.
    Raises:
        ValueError: naming what differs, of both.
    """
    configs = (teacher_config, config)
    pairs: dict[str, list[Any]] = {"labels": [label_names_of(each) for each in configs]}
    # One of them may take a modality that the other does not
    common = [modality for modality in config.modalities if modality in teacher_config.modalities]
    if not common:
        raise ValueError(
            f"The teacher takes {teacher_config.modalities[0]} alone and the model {config.modalities[0]}: they see "
            "nothing in common. Take another teacher."
        )
    if "audio" in common:
        pairs["audio input"] = [_audio_input(each) for each in configs]
    if processor is not None and teacher_processor is not None:
        processors = (teacher_processor, processor)
        if "audio" in common:
            pairs["feature extraction"] = [feature_settings(each) for each in processors]
        if "text" in common:
            pairs["tokenizer"] = [_vocabulary(each) for each in processors]
    for what, (theirs, own) in pairs.items():
        if theirs != own:
            raise ValueError(
                f"The teacher and the model see the same batches, but differ in their {what}: {theirs} (teacher), "
                f"{own} (model). Train the model with what the teacher has, or take another teacher."
            )


def let_go_of_files(model: MMSERForAudioClassification) -> MMSERForAudioClassification:
    """Copy weights that are mapped from files into memory, in place: Windows replaces and removes no mapped file."""
    return model._apply(torch.clone)


def label_names_of(config: Any) -> list[str]:
    """The label names of a configuration in the order of their ids."""
    return [config.id2label[index] for index in range(config.num_labels)]


def _audio_input(config: Any) -> str:
    return f"{config.audio_config.num_mel_bins} log-mel bands" if config.uses_log_mel else "waveform"


def feature_settings(processor: MMSERProcessor) -> dict[str, Any]:
    """What decides the numbers that the audio encoder gets of a clip."""
    extractor: Any = processor.feature_extractor
    names = ("sampling_rate", "feature_size", "do_normalize", "n_fft", "hop_length")
    settings = {name: getattr(extractor, name) for name in names if hasattr(extractor, name)}
    return {"type": type(extractor).__name__, **settings}


def vocabulary_checksum(processor: MMSERProcessor) -> str | None:
    """A checksum of the tokens and their ids; None without a tokenizer."""
    if "text" not in processor.modalities:
        return None
    vocabulary = sorted(processor.tokenizer.get_vocab().items())
    return hashlib.blake2b(json.dumps(vocabulary).encode(), digest_size=10).hexdigest()


def _vocabulary(processor: MMSERProcessor) -> str:
    return f"{len(processor.tokenizer)} tokens with the checksum {vocabulary_checksum(processor)}"


def limit_tokens(processor: MMSERProcessor, model: MMSERForAudioClassification) -> None:
    """Let the tokenizer cut what the text encoder has no position embedding for."""
    positions = getattr(model.config.text_config, "max_position_embeddings", None)
    if positions is not None and "text" in processor.modalities:
        processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, positions)
