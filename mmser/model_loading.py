# SPDX-License-Identifier: Apache-2.0
"""The model and the processor that a training starts from: two encoders, or an MMSER checkpoint."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer, PreTrainedConfig, Wav2Vec2FeatureExtractor

from configuration_mmser import MMSERConfig
from mmser.arguments import SPEC_AUGMENT, DataArguments, ModelArguments
from mmser.averaging import average_checkpoints
from modeling_mmser import MMSERForAudioClassification, register_auto_classes
from processing_mmser import MMSERProcessor


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
    """The model to train, with the label names of the data, and with the parts frozen that the flags name."""
    labels = {
        "id2label": dict(enumerate(label_names)),
        "label2id": {label: i for i, label in enumerate(label_names)},
    }
    start = _from_checkpoint if arguments.model_name_or_path else _from_encoders
    model = start(arguments, labels, processor)
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


def _from_checkpoint(arguments: ModelArguments, labels: dict, processor: MMSERProcessor) -> Any:
    names = [str(arguments.model_name_or_path), *arguments.average_with]
    overrides: Any = arguments.config_overrides
    model = MMSERForAudioClassification.from_pretrained(
        names[0],
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # another label set gets new output layers; the loading report names them
        # The class counts of the checkpoint are those of its own training clips
        **{"class_counts": None, **labels, **overrides},
    )
    average_checkpoints(model, names)
    return model


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
    name = Path(name).name if Path(name).exists() else name
    if not getattr(arguments, f"random_{kind}_encoder"):
        return name
    changed = " with other sizes" if getattr(arguments, f"{kind}_config_overrides") else ""
    return f"{name} architecture{changed}, started at random"


def load_teacher(arguments: ModelArguments, data_arguments: DataArguments) -> MMSERForAudioClassification | None:
    """The model to distil from, if there is one."""
    if arguments.teacher_name_or_path is None:
        return None
    if data_arguments.cache_encoder_states:
        raise ValueError("--cache_encoder_states keeps states of this model's encoders: a teacher has its own.")
    return MMSERForAudioClassification.from_pretrained(arguments.teacher_name_or_path)


def limit_tokens(processor: MMSERProcessor, model: MMSERForAudioClassification) -> None:
    """Let the tokenizer cut what the text encoder has no position embedding for."""
    positions = getattr(model.config.text_config, "max_position_embeddings", None)
    if positions is not None:
        processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, positions)
