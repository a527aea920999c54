# SPDX-License-Identifier: Apache-2.0
"""`MMSERConfig`: every number of the architecture and of its loss, nothing of the training run.

What is frozen, how long one trains and on which files belongs to `train_hf.py`; whatever a checkpoint needs to rebuild
the network and to explain its own labels is here.
"""

import copy
import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import field
from pathlib import Path
from typing import Any, cast

from huggingface_hub import constants
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto import AutoConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)
DTYPES = ("float32", "float16", "bfloat16", "float64", "float", "half", "double")

DEFAULT_LABELS = ("neutral", "happy", "sad", "angry")
DEFAULT_REJECTION = 0.3  # a larger probability of "unknown" rejects a clip, unless a threshold is set or fitted
MODALITIES = ("audio", "text")
POOLINGS = ("mean", "statistics", "layer_statistics", "attentive_statistics", "bounded_attentive_statistics")
REGRESSION = "regression"  # in `auxiliary_tasks`: a number; else a task has a list of classes

# Audio encoders whose output is shown by tests not to depend on the padding of a batch.
WAVEFORM_MODEL_TYPES = ("wav2vec2", "hubert", "wavlm", "data2vec-audio")
LOG_MEL_MODEL_TYPES = ("whisper",)
# Options of audio encoders that make a clip's result depend on its batch, and why
PADDING_DEPENDENT = {
    "conv_pos_batch_norm": "it mixes the clips of a batch",
    "add_adapter": "its convolutions mix padding into the clip",
}

# Bounds far above any network. A checkpoint of a stranger must not make a machine build one that fills its memory
LARGEST_SIZE, MOST_LAYERS, LARGEST_NUMBER = 2**16, 2**10, 2**24
MOST_TEXT, READ_WHOLE = 2**28, (".json", ".txt", ".model", ".jinja", ".py", ".md")  # bytes of files of a model
MOST_LEVELS = 64  # of lists and dicts in each other
MOST_WEIGHTS, MOST_ENCODER_WEIGHTS = 2**30, 2**33  # of all after the encoders; of one encoder
# Fields of encoders that PyTorch fails at with errors of its own, if they are 0
AT_LEAST_ONE = (
    *("hidden_size", "d_model", "intermediate_size", "encoder_ffn_dim", "num_attention_heads", "vocab_size"),
    *("encoder_attention_heads", "conv_dim", "conv_kernel", "conv_stride", "num_conv_pos_embeddings"),
    *("num_conv_pos_embedding_groups", "max_position_embeddings", "max_source_positions", "num_mel_bins"),
)

# Names of fields, what their values must fulfil, and the same in words
CHECKS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        (
            *("cross_attention_hidden_size", "cross_attention_heads", "pooling_hidden_size", "pooling_score_limit"),
            *("fusion_hidden_size",),
            *("classifier_hidden_size", "classifier_bottleneck", "classifier_checkpoint_interval", "feature_size"),
            *("anchor_size", "anchor_temperature", "uncertainty_hidden_size", "prototypes_per_class"),
            *("openmax_alpha", "openmax_centroids_per_class", "distillation_temperature", "format_version"),
            *("fusion_num_layers", "auxiliary_hidden_size"),
        ),
        lambda value: value > 0,
        "greater than 0",
    ),
    (
        (
            *("cross_entropy_loss_weight", "focal_loss_weight", "anchor_loss_weight", "uncertainty_loss_weight"),
            *("prototype_loss_weight", "supervised_contrastive_loss_weight", "distillation_loss_weight"),
            *("classifier_num_layers", "uncertainty_error_weight", "focal_gamma", "mixup_alpha"),
            *("auxiliary_loss_weight", "logit_adjustment"),
        ),
        lambda value: value >= 0,
        "0 or more",
    ),
    (
        (
            *("cross_attention_dropout", "fusion_dropout", "classifier_dropout", "classifier_drop_path_rate"),
            *("label_smoothing", "class_balanced_beta"),
        ),
        lambda value: 0 <= value < 1,
        "in [0, 1)",
    ),
    (
        (
            *("cross_attention_hidden_size", "cross_attention_heads", "pooling_hidden_size", "fusion_hidden_size"),
            *("classifier_hidden_size", "classifier_bottleneck", "feature_size", "anchor_size"),
            *("uncertainty_hidden_size", "auxiliary_hidden_size", "prototypes_per_class"),
            "openmax_centroids_per_class",
        ),
        lambda value: value <= LARGEST_SIZE,
        f"at most {LARGEST_SIZE:,}",
    ),
    (
        ("classifier_num_layers", "fusion_num_layers"),
        lambda value: value <= MOST_LAYERS,
        f"at most {MOST_LAYERS:,}",
    ),
    (("contrastive_other_corpus_weight",), lambda value: 0 <= value <= 1, "in [0, 1]"),
    (("openmax_tail_size",), lambda value: value >= 5, "at least 5"),
    (
        ("audio_attention_heads", "text_attention_heads"),
        lambda value: value is None or value > 0,
        "None or at least 1",
    ),
    (("openmax_acceptance",), lambda value: value is None or 0 < value < 1, "None or in (0, 1)"),
    (
        ("openmax_threshold",),
        lambda value: value in (None, "fitted") or (not isinstance(value, str) and 0 <= value <= 1),
        '"fitted", None or in [0, 1]',
    ),
    (
        ("modalities",),
        (["audio", "text"], ["audio"], ["text"]).__contains__,
        "['audio', 'text'], ['audio'] or ['text']",
    ),
    (("untrained_modalities",), ([], ["audio"], ["text"]).__contains__, "[], ['audio'] or ['text']"),
    (("pooling_type",), POOLINGS.__contains__, f"one of {', '.join(POOLINGS)}"),
    (("fusion_type",), ("gated", "transformer").__contains__, "one of gated, transformer"),
    (("fusion_norm",), ("standardization", "layer_norm").__contains__, "one of standardization, layer_norm"),
    (("openmax_distance",), ("centroid", "anchor").__contains__, "one of centroid, anchor"),
    (("openmax_level",), ("probability", "activation").__contains__, "one of probability, activation"),
)


def check_encoder_sizes(config: PreTrainedConfig | None, name: str) -> None:
    """
    Refuse an encoder that no machine can hold, or that has nothing to compute with.

    Args:
        config: of the encoder; None for none.
        name: of the field that it is in.
    Raises:
        ValueError: naming the field that is too large, or too small.
    """
    for key, values in ({} if config is None else config.to_dict()).items():
        is_width = key.endswith(("_size", "_dim", "d_model")) and key != "vocab_size"
        limit = MOST_LAYERS if key.endswith("_layers") else LARGEST_SIZE if is_width else LARGEST_NUMBER
        for value in values if isinstance(values, list | tuple) else [values]:
            if isinstance(value, int) and value > limit:
                raise ValueError(f"`{name}.{key}` must be at most {limit:,}, got {value:,}.")
            if key in AT_LEAST_ONE and isinstance(value, int) and value < 1:
                raise ValueError(f"`{name}.{key}` must be at least 1, got {value}.")
    if config is not None:
        check_number_of_weights(_encoder_weights(config), MOST_ENCODER_WEIGHTS, f"{name}.")


def check_number_of_weights(counts: dict[tuple[str, ...], int], most: int, prefix: str = "") -> None:
    """
    Raise `ValueError` if parts of a network have more weights together than `most`.

    Args:
        counts: weights of each part, by the fields that decide them.
        most: of all parts together.
        prefix: of the fields in the error, which names those of the largest part.
    """
    if sum(counts.values()) > most:
        fields = max(counts, key=lambda names: counts[names])
        raise ValueError(
            f"{', '.join(f'`{prefix}{field}`' for field in fields)} together ask for {counts[fields]:,} weights: at "
            f"most {most:,} can be."
        )


def _encoder_weights(config: PreTrainedConfig) -> dict[tuple[str, ...], int]:
    """About how many weights the parts of an encoder have, by the fields that decide them."""

    def number(name: str) -> int:
        value = getattr(config, name, 0)
        return value if isinstance(value, int) else 0

    width, layers, kernel = number("hidden_size"), number("num_hidden_layers"), number("num_conv_pos_embeddings")
    inner = "encoder_ffn_dim" if hasattr(config, "encoder_ffn_dim") else "intermediate_size"
    counts = {
        ("num_hidden_layers", "hidden_size", inner): layers * width * (4 * width + 2 * number(inner)),
        ("num_conv_pos_embeddings", "hidden_size"): kernel
        * width**2
        // max(1, number("num_conv_pos_embedding_groups")),
    }
    for name in ("vocab_size", "max_position_embeddings", "max_source_positions"):
        counts[name, "hidden_size"] = number(name) * width
    sizes, kernels = getattr(config, "conv_dim", None), getattr(config, "conv_kernel", None)
    if isinstance(sizes, list | tuple) and isinstance(kernels, list | tuple):
        layers_of = zip((1, *sizes), sizes, kernels, strict=False)
        counts["conv_dim", "conv_kernel"] = sum(before * after * length for before, after, length in layers_of)
    return counts


def check_token_ids(input_ids: Any, text_config: Any) -> None:
    """
    Refuse tokens that the text encoder has no embedding for: their tokenizer is that of another model.

    Args:
        input_ids: array or tensor of any shape.
        text_config: of the text encoder; None, or one without `vocab_size`, refuses nothing.
    Raises:
        ValueError: naming the largest id and the number of embeddings.
    """
    count = getattr(text_config, "vocab_size", None)
    if count is None or 0 in input_ids.shape:
        return
    largest = int(input_ids.max())
    if largest >= count:
        raise ValueError(
            f"`input_ids` has a token of id {largest:,}, but the text encoder has {count:,} embeddings "
            "(`text_config.vocab_size`): the tokenizer is that of another model."
        )


# Written unconditionally, without the `user/repo--` prefix that loading from the Hub adds: a checkpoint always points
# at the code beside it, also after it has been loaded from one repository and pushed to another.
AUTO_MAP = {
    "AutoConfig": "configuration_mmser.MMSERConfig",
    "AutoModel": "modeling_mmser.MMSERModel",
    "AutoModelForAudioClassification": "modeling_mmser.MMSERForAudioClassification",
    "AutoProcessor": "processing_mmser.MMSERProcessor",
}
CUSTOM_PIPELINES = {
    "audio-classification": {
        "impl": "processing_mmser.MMSERPipeline",
        "pt": ["AutoModelForAudioClassification"],
        "type": "audio",
    }
}


def check_names(given: Iterable[str], known: Iterable[str], kind: str) -> None:
    """Raise `TypeError` for the first of the `given` names that is not `known`; it suggests the nearest ones."""
    known = set(known)
    for name in given:
        if name not in known:
            nearest = [f"`{near}`" for near in difflib.get_close_matches(name, sorted(known), n=3, cutoff=0)]
            is_misspelt = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]}?" if is_misspelt else f"the nearest names are {', '.join(nearest)}."
            raise TypeError(f"`{name}` is no {kind}: {hint}")


def check_depth(value: Any, name: str) -> None:
    """Raise `ValueError` for lists and dicts that are nested deeper than `MOST_LEVELS`; Python fails at a thousand."""
    level, levels = [value], 0
    while level:
        if levels > MOST_LEVELS:
            raise ValueError(f"{name} is nested too deeply: at most {MOST_LEVELS} levels are read.")
        nested = {id(one): one for one in level if isinstance(one, dict | list | tuple)}.values()  # each once
        level = [inner for one in nested for inner in (one.values() if isinstance(one, dict) else one)]
        levels += 1


def whole_repository(folder: Path) -> Path:
    """A snapshot in the cache of the Hub holds links to files beside it: all of the repository is the folder there."""
    real = folder.absolute()
    is_snapshot = real.parent.name == "snapshots" and (real.parent.parent / "blobs").is_dir()
    return real.parent.parent if is_snapshot else real


def check_own_files(name_or_path: str | os.PathLike, subfolder: str = "", files: Iterable[Path] = ()) -> None:
    """
    Refuse a folder of a model whose files are elsewhere: by a link out of it, or by an index that names the parts of
    its weights; or would fill the memory before they are understood. Links into the cache of the Hub are fine. A name
    on the Hub is not looked at: it has its own files.

    Args:
        name_or_path, subfolder: where the model is.
        files: further ones of its, in folders below.

    Raises:
        ValueError: naming the file.
    """
    folder = Path(name_or_path, subfolder).expanduser()
    if not folder.is_dir():
        return
    places = (whole_repository(Path(name_or_path).expanduser()), constants.HF_HUB_CACHE)
    roots = [os.path.join(os.path.realpath(place), "") for place in places]
    for file in (*files, *sorted(path for path in folder.iterdir() if not path.is_dir())):
        _check_own_file(file, roots)
    for index in sorted([*folder.glob("*.index.json"), *folder.glob("*.index.*.json")]):
        for name in _parts_of_weights(index):
            parts = re.split(r"[\\/]", name)  # as each system has it
            if os.path.isabs(name) or ".." in parts or ":" in parts[0] or not parts[0]:
                raise ValueError(
                    f"{index} names {name!r} for weights, which is not in its folder: weights lie beside their index."
                )
            _check_own_file(folder / name, roots)


def _check_own_file(file: Path, roots: list[str]) -> None:
    real = os.path.realpath(file)
    if not real.startswith(tuple(roots)):
        raise ValueError(
            f"{file} is a link out of its folder, to {real}, and is not followed: if you trust it, put the file "
            "itself in its place."
        )
    if os.path.exists(real) and not os.path.isfile(real):
        raise ValueError(f"{file} is a folder, a device or a pipe, and no file of a model.")
    if file.suffix in READ_WHOLE and os.path.exists(real) and os.path.getsize(real) > MOST_TEXT:
        raise ValueError(
            f"{file} has {os.path.getsize(real):,} bytes, and at most {MOST_TEXT:,} of such a file are read."
        )


def _parts_of_weights(index: Path) -> set[str]:
    """The names of files that an index of weights has."""
    try:
        content = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index} is no index of weights: it is not JSON, or nested too deep.") from error
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) and name for name in names.values()):
        raise ValueError(f"{index} is no index of weights: its `weight_map` must have the name of a file for each.")
    return set(names.values())


def as_ids(values: Iterable[Any], name: str) -> list[int]:
    """The ids of classes as numbers, of the field `name`; `ValueError` for what is no whole number."""
    values = list(values)
    try:
        return [int(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"The ids of `{name}` must be whole numbers, got {values!s:.80}.") from error


def check_labels(id2label: dict) -> None:
    """Raise `ValueError` unless the ids are 0, 1, ... without a gap and no name is there twice."""
    ids, names = sorted(as_ids(id2label, "id2label")), list(id2label.values())
    if ids != list(range(len(ids))):
        raise ValueError(f"The ids of `id2label` must be 0 to {len(ids) - 1} without a gap, got {ids}.")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"`id2label` has the name {name!r} twice: give each class a name of its own.")


def check_auxiliary_tasks(tasks: dict[str, Any], label_maps: dict[str, Any]) -> None:
    """Raise `ValueError` for a task beside the emotion that cannot be, or a map to targets that it does not have."""
    for task, kind in tasks.items():
        if not re.fullmatch(r"[A-Za-z]\w*", task) or hasattr(dict, task):
            raise ValueError(f"`auxiliary_tasks`: {task!r} is no name of a task: give it letters, digits and _.")
        is_list = isinstance(kind, list) and len(kind) > 1 and len(set(kind)) == len(kind)
        if kind != REGRESSION and not is_list:
            raise ValueError(
                f"`auxiliary_tasks`: {task!r} must be {REGRESSION!r}, or a list of two or more different classes, got "
                f"{kind!r}."
            )
    check_names(label_maps, tasks, "task of `auxiliary_tasks`, but of `auxiliary_label_maps`")
    for task, targets in label_maps.items():
        if not isinstance(targets, dict):
            raise ValueError(f"`auxiliary_label_maps`: {task!r} must be a dict by emotion, got {targets!r}.")
        for label, target in targets.items():
            is_number = isinstance(target, int | float) and not isinstance(target, bool)
            if not (is_number if tasks[task] == REGRESSION else target in tasks[task]):
                allowed = "a number" if tasks[task] == REGRESSION else f"one of {', '.join(tasks[task])}"
                raise ValueError(f"`auxiliary_label_maps`: {task} of {label!r} must be {allowed}, got {target!r}.")


def _field_names(config_class: Any) -> set[str]:
    return {entry.name for entry in dataclasses.fields(config_class)}


def ignored_modality(given: list[str], used: list[str], modalities: list[str]) -> str | None:
    """
    The modality that is given to a model and plays no part in its answer, if there is one.

    Args:
        given: those of "audio" and "text" that are given.
        used: those that the model uses.
        modalities: those that it has an encoder for.
    Raises:
        ValueError: nothing else is given.
    """
    ignored = [modality for modality in given if modality not in used]
    if ignored and ignored == given:
        raise ValueError(f"{reason_unused(ignored[0], modalities)}: give {' or '.join(used)}.")
    return ignored[0] if ignored else None


def reason_unused(modality: str, modalities: list[str]) -> str:
    """Why a model that has the encoders of `modalities` ignores "audio" or "text", as a sentence without its end."""
    if modality not in modalities:
        return f"This model has no {modality} encoder"
    clips = "audio" if modality == "audio" else "transcripts"
    return f"This model was never trained with {modality} ({modality}_dropout 1.0, or training clips without {clips})"


@strict
class MMSERConfig(PreTrainedConfig):
    r"""
    Configuration of a multimodal speech emotion recogniser: an audio encoder, a text encoder, and what joins them.

    Args:
        audio_config (`dict` or `PreTrainedConfig`, *optional*):
            Audio encoder. Raw waveform (`wav2vec2`, `hubert`, `wavlm`, `data2vec-audio`) or log-mel (`whisper`, of
            which only the encoder is built). Default: the architecture of `facebook/wav2vec2-base`. Its layer dropping
            is switched off: the weighted layer sum and distributed training need every layer in every step.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Text encoder, any BERT-like `AutoModel`. Default: `google-bert/bert-base-multilingual-cased`.
        modalities (`list[str]`): which of "audio" and "text" the model takes. With one of them there is no encoder for
            the other, whose configuration is None, no attention between the two and no gate.
        untrained_modalities (`list[str]`): the one of them, if any, that no training example had so far. Outside
            training the model ignores it. Written when a model is saved, as its weights say.
        use_weighted_layer_sum (`bool`):
            Learn a softmax-weighted sum of all audio encoder layers instead of taking the last.
        cross_attention_hidden_size, cross_attention_heads, cross_attention_dropout:
            Shared width, head count and dropout probability of the two cross-modal attentions, or of the encoder that
            is in their place (`fusion_type`).
        cross_attention_layer_norm (`bool`): normalise each state after it, as published. Encoders that start at random
            need it; behind pretrained ones it takes away how strong a state is, which tells emotions apart.
        pooling_type (`str`): how states over time become one vector. "attentive_statistics", as published, takes their
            mean and deviation weighted by attention; "statistics" weighs all alike; "mean" leaves the deviation out.
            "layer_statistics" is "statistics", but the deviation of the audio is taken of each layer, and then summed
            by the layers' weights. "bounded_attentive_statistics" starts as "statistics" and stays near it: see
            `pooling_score_limit`.
        pooling_hidden_size (`int`): width of the attention scorer in the attentive statistics.
        pooling_score_limit (`float`): the scores of "bounded_attentive_statistics" stay within plus and minus this.
        fusion_type (`str`): how the modalities are joined: "gated", by attention from each to the other and a gate on
            the pooled vectors, as published, or "transformer", by a small encoder over both sequences and attention to
            the pooled vectors. In a model of one modality, that encoder runs over the one sequence.
        fusion_num_layers (`int`): layers of the encoder of the transformer fusion.
        fusion_hidden_size (`int`), fusion_dropout (`float`): width and dropout of the fusion.
        fusion_norm (`str`): what the pooled vectors pass before the fusion: "standardization", by mean and
            deviation over training clips (`MMSERModel.fit_standardization`), or "layer_norm", as published.
        classifier_num_layers (`int`): number of residual blocks, 0 or more.
        classifier_hidden_size, classifier_bottleneck, classifier_dropout:
            Width of the blocks, their inner width, and the dropout probability.
        classifier_drop_path_rate (`float`): probability with which a training clip passes a block by: stochastic depth
            (Huang et al. 2016). It keeps the deep classifier from learning the voices of the training by heart.
        classifier_norm_first (`bool`): normalise what the branch of a block reads. The blocks then start as if there
            were none, and what goes past them stays as it is. False normalises the sum after each block, as published.
        classifier_checkpoint_interval (`int`): residual blocks per group under gradient checkpointing.
        zero_init_branches (`bool`): start the last linear layer of each residual block and of the attention between
            the modalities at zero. False starts them at random, as published.
        scale_branches_by_depth (`bool`): scale the branches of the residual blocks by one over the square root of
            their number. False does not scale them, as published.
        feature_size (`int`): width of the feature vector before the last linear layer.
        anchor_size (`int`), anchor_temperature (`float`): width of the anchor space; initial (learnable) temperature.
        uncertainty_hidden_size (`int`): width of the uncertainty head.
        prototypes_per_class (`int`): prototypes kept for each class.
        use_openmax (`bool`): return open-set probabilities once OpenMax is fitted.
        openmax_distance (`str`): "centroid", to the nearest of several centroids of a class among the fused vectors,
            or "anchor", to the class anchor in anchor space, as published.
        openmax_centroids_per_class (`int`): number of these centroids.
        openmax_level (`str`): "probability", where "unknown" takes over probability after the softmax, or
            "activation", where it takes over activation before the softmax, as published.
        openmax_alpha (`int`): number of top-ranked classes that are revised at the level of activations.
        openmax_tail_size (`int`): number of largest distances per class that the Weibull is fitted on; at least 5.
        openmax_acceptance (`float` or `None`): share of known clips, of each predicted class, that the thresholds of
            rejection are made to accept, when they are fitted; `None` does not use them.
        openmax_threshold (`float`, `str` or `None`): when a clip is rejected. A number always counts: "unknown" wins,
            or its probability exceeds the number. "fitted" goes by the fitted thresholds, and by 0.3 as long as there
            are none. `None` rejects nothing.
        format_version (`int`): of the meaning of these fields in a saved file. Files of the first version have no such
            entry; in them 0.3, which had no effect beside fitted thresholds, means "fitted".
        audio_attention_heads, text_attention_heads (`int` or `None`): heads that pruning left in each layer of an
            encoder, as wide as they were; `None`: all of them.
        int8_weights (`bool`): the weights of encoders, attention and pooling are in int8; see `quantize_dynamic`.
        cross_entropy_loss_weight, focal_loss_weight, anchor_loss_weight, uncertainty_loss_weight,
        prototype_loss_weight, supervised_contrastive_loss_weight, distillation_loss_weight (`float`):
            Weights of the parts of the loss; a part with weight 0 is not computed.
        contrastive_other_corpus_weight (`float`): weight, in the denominator of the supervised contrastive loss, of
            negatives from another corpus than the clip's. 0 compares with those of its own corpus alone, of which the
            corpus tells nothing; 1 is the published loss. Below 1, training needs `corpus_ids`.
        label_smoothing (`float`): of the cross-entropy.
        class_balanced_beta, focal_gamma (`float`): of the class-balanced focal loss.
        logit_adjustment (`float`): 1 trains for the mean of the recalls where some classes are rare, by the logarithm
            of `class_counts` (Menon et al. 2021); 0, as published, leaves them to the focal loss.
        mixup_alpha (`float`): above 0, each training clip is mixed with another one of its batch after the fusion, and
            so are the losses (Verma et al. 2019, "Manifold mixup"); the shares are drawn from Beta(alpha, alpha). It
            lets the deep classifier learn from few clips. 0 mixes nothing, as published.
        class_counts (`list[int]`, *optional*):
            Clips of each class in the training set; `None` weighs all classes alike.
        uncertainty_error_weight (`float`):
            Weight of the wrong predictions in the uncertainty loss; 0 is the published form.
        distillation_temperature (`float`): softens teacher and student in the distillation part.
        lora (`dict`, *optional*): of a checkpoint that holds adapters in place of its encoders: `rank`, `alpha`,
            `dropout`, `target` (the adapted layers of each encoder) and `bases` (the name and a checksum of each
            encoder). Loading joins them; the model then has None here.
        auxiliary_tasks (`dict[str, list[str] | str]`):
            Tasks beside the emotion, by name: a list of classes, or "regression" for a number, as in `{"sentiment":
            ["negative", "neutral", "positive"], "arousal": "regression"}`. Each has a small head on the features.
        auxiliary_label_maps (`dict[str, dict]`): tasks whose targets follow from the emotion: by task and emotion,
            the class or the number.
        auxiliary_hidden_size (`int`): width of each of their heads.
        auxiliary_loss_weight (`float`): weight of the loss of each of them.

    Example:

    ```python
    >>> from configuration_mmser import MMSERConfig
    >>> from modeling_mmser import MMSERForAudioClassification

    >>> config = MMSERConfig(text_config={"model_type": "bert", "hidden_size": 64, "num_attention_heads": 4})
    >>> config.audio_config.model_type, config.num_labels
    ('wav2vec2', 4)
    ```"""

    model_type = "mmser"
    is_registered = False  # whether `register_auto_classes` made this code known to Transformers
    sub_configs_defaults = {
        "audio_config": SubConfigSpec(AutoConfig, model_type="wav2vec2", optional=True),
        "text_config": SubConfigSpec(AutoConfig, model_type="bert", init_kwargs={"vocab_size": 119547}, optional=True),
    }
    # Kept out of the predictions of `Trainer`: these are the logits alone, for `np.argmax(predictions, axis=1)`, and
    # per-clip vectors would fill the memory. `MMSERTrainer.predict_outputs` gives the rest.
    keys_to_ignore_at_inference = [
        "uncertainty",
        "losses",
        "anchor_loss",
        "features",
        "fused",
        "anchor_distances",
        "unknown_probability",
        "open_set_probabilities",
        "rejection_score",
        "is_unknown",
        "hidden_states",
        "attentions",
        "auxiliary",
    ]

    audio_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    modalities: list[str] = field(default_factory=lambda: list(MODALITIES))
    untrained_modalities: list[str] = field(default_factory=list)

    use_weighted_layer_sum: bool = True
    cross_attention_hidden_size: int = 256
    cross_attention_heads: int = 8
    cross_attention_dropout: float | int = 0.1
    cross_attention_layer_norm: bool = True
    pooling_type: str = "attentive_statistics"
    pooling_hidden_size: int = 128
    pooling_score_limit: float | int = 1.0
    fusion_type: str = "gated"
    fusion_num_layers: int = 2
    fusion_hidden_size: int = 512
    fusion_dropout: float | int = 0.1
    fusion_norm: str = "standardization"

    classifier_num_layers: int = 35
    classifier_hidden_size: int = 512
    classifier_bottleneck: int = 44  # 35 blocks of 512 -> 44 -> 512 make the whole classifier 2.0 M parameters
    classifier_dropout: float | int = 0.15
    classifier_drop_path_rate: float | int = 0.0
    classifier_norm_first: bool = False
    classifier_checkpoint_interval: int = 5
    zero_init_branches: bool = True
    scale_branches_by_depth: bool = True
    feature_size: int = 256

    anchor_size: int = 128
    anchor_temperature: float | int = 0.1
    uncertainty_hidden_size: int = 64
    prototypes_per_class: int = 4

    use_openmax: bool = True
    openmax_distance: str = "centroid"
    openmax_centroids_per_class: int = 32
    openmax_level: str = "probability"
    openmax_alpha: int = 3
    openmax_tail_size: int = 20
    openmax_acceptance: float | None = 0.95
    openmax_threshold: float | int | str | None = "fitted"
    format_version: int = 2
    audio_attention_heads: int | None = None
    text_attention_heads: int | None = None
    int8_weights: bool = False

    cross_entropy_loss_weight: float | int = 1.0
    label_smoothing: float | int = 0.1
    mixup_alpha: float | int = 0.0
    focal_loss_weight: float | int = 0.3
    class_balanced_beta: float | int = 0.9999
    focal_gamma: float | int = 2.0
    logit_adjustment: float | int = 0.0
    class_counts: list[int] | None = None
    anchor_loss_weight: float | int = 0.1
    uncertainty_loss_weight: float | int = 0.05
    uncertainty_error_weight: float | int = 1.0
    prototype_loss_weight: float | int = 0.01
    supervised_contrastive_loss_weight: float | int = 0.0
    contrastive_other_corpus_weight: float | int = 1.0
    distillation_loss_weight: float | int = 0.0
    distillation_temperature: float | int = 2.0
    lora: dict[str, Any] | None = None

    auxiliary_tasks: dict[str, list[str] | str] = field(default_factory=dict)
    auxiliary_label_maps: dict[str, dict[str, str | float | int]] = field(default_factory=dict)
    auxiliary_hidden_size: int = 64
    auxiliary_loss_weight: float | int = 0.3

    def __new__(cls, *args, **kwargs):
        """Looks at the values before their types are checked, which would recurse into them."""
        check_depth(kwargs, cls.__name__)
        return super().__new__(cls)

    def __post_init__(self, **kwargs):
        if kwargs.pop("supervised_contrastive_temperature", 0.1) != 0.1:
            raise ValueError("`supervised_contrastive_temperature` cannot be set any more: it is 0.1.")
        self._warn_of_misspelt(kwargs)
        if (kwargs.get("num_labels") or 0) > LARGEST_SIZE:  # Transformers would make a name for each
            raise ValueError(f"`num_labels` must be at most {LARGEST_SIZE:,}, got {kwargs['num_labels']:,}.")
        if self.dtype is not None and str(self.dtype).removeprefix("torch.") not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {self.dtype!r:.80}.")
        for name in ("id2label", "label2id"):
            if not isinstance(getattr(self, name), dict | None):
                raise TypeError(f"`{name}` must be a dict, got {getattr(self, name)!r:.80}.")
            if any(isinstance(value, list | dict) for value in (getattr(self, name) or {}).values()):
                raise TypeError(f"`{name}` must have one name for each id, got {getattr(self, name)!r:.80}.")
        if self.label2id is not None:
            self.label2id = dict(zip(self.label2id, as_ids(self.label2id.values(), "label2id"), strict=True))
        if self.id2label is None and self.label2id is not None:
            self.id2label = {i: label for label, i in self.label2id.items()}
        elif self.id2label is None and kwargs.get("num_labels") in (None, len(DEFAULT_LABELS)):
            self.id2label = dict(enumerate(DEFAULT_LABELS))
            self.label2id = {label: i for i, label in self.id2label.items()}
        elif self.id2label is not None and self.label2id is None:
            self.label2id = dict(zip(self.id2label.values(), as_ids(self.id2label, "id2label"), strict=True))
        if self.id2label is not None and self.transformers_version is None:  # else saved: old checkpoints must load
            check_labels(self.id2label)
        self._complete_encoders()
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        # With one, `pipeline` of Transformers insists on code from the checkpoint
        self.custom_pipelines = {} if self.is_registered else copy.deepcopy(CUSTOM_PIPELINES)
        for name in ("layerdrop", "encoder_layerdrop"):
            if getattr(self.audio_config, name, 0.0):
                setattr(self.audio_config, name, 0.0)

    @classmethod
    def _warn_of_misspelt(cls, names: Iterable[str]) -> None:
        """Transformers takes any name, and a checkpoint may hold fields of another version: no reason to refuse it."""
        own = sorted(_field_names(cls) - _field_names(PreTrainedConfig))
        for name in names:
            nearest = difflib.get_close_matches(name, own, n=1, cutoff=0.85)
            if nearest and name not in own:
                logger.warning_once(f"`{name}` is no field of MMSERConfig: did you mean `{nearest[0]}`?")

    def _complete_encoders(self) -> None:
        """None means the default encoder; the encoder of a modality that the model does not take stays None."""
        for modality in MODALITIES:
            name = f"{modality}_config"
            if modality in self.modalities and getattr(self, name) is None:
                setattr(self, name, dict(self.sub_configs_defaults[name].init_kwargs))
            elif modality not in self.modalities and getattr(self, name) is not None:
                raise ValueError(f"`{name}` is given, but `modalities` ({self.modalities}) has no {modality!r}.")

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As always, after a look at whether the files of a folder are its own: [`check_own_files`]."""
        check_own_files(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        return super().get_config_dict(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """
        As always; new labels may have strings as ids and need no `label2id`. With another number of labels than it was
        saved with, a checkpoint's class counts are dropped. For `openmax_threshold` see `format_version`.
        """
        cls._warn_of_misspelt(kwargs)
        if "format_version" not in config_dict and config_dict.get("openmax_threshold") == DEFAULT_REJECTION:
            config_dict = {**config_dict, "openmax_threshold": "fitted"}
        if kwargs.get("id2label"):
            ids = as_ids(kwargs["id2label"], "id2label")
            kwargs["id2label"] = dict(zip(ids, kwargs["id2label"].values(), strict=True))
            check_labels(kwargs["id2label"])
            kwargs.setdefault("label2id", {label: i for i, label in kwargs["id2label"].items()})
        num_labels = len(kwargs["id2label"]) if kwargs.get("id2label") else kwargs.get("num_labels")
        if num_labels not in (None, len(config_dict.get("class_counts") or ())):
            config_dict = {**config_dict, "class_counts": None}
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As always; `custom_pipelines` as a checkpoint needs it: `pipeline` of Transformers puts classes there."""
        return {**super().to_dict(), "custom_pipelines": copy.deepcopy(CUSTOM_PIPELINES)}

    @classmethod
    def check_fields(cls, names: Iterable[str]) -> None:
        """Raise `TypeError` for a name that is no field, with the nearest one. Transformers would keep it unused."""
        known = _field_names(cls) | {"num_labels", "attn_implementation", "torch_dtype"}
        check_names(names, known, "field of MMSERConfig")

    @property
    def uses_fitted_thresholds(self) -> bool:
        """Whether rejection goes by fitted thresholds, once there are some."""
        return self.openmax_threshold == "fitted" and self.openmax_acceptance is not None

    @property
    def rejection_probability(self) -> float | None:
        """Otherwise, the probability of "unknown" above which a clip is rejected; None rejects nothing."""
        self._check_values(("openmax_threshold",))  # it may have been set after the configuration was made
        threshold = self.openmax_threshold
        return DEFAULT_REJECTION if threshold == "fitted" else cast(float | None, threshold)

    @property
    def uses_log_mel(self) -> bool:
        """Whether the audio encoder takes `input_features` (log-mel frames) instead of `input_values` (a waveform)."""
        return getattr(self.audio_config, "model_type", None) in LOG_MEL_MODEL_TYPES

    @property
    def used_modalities(self) -> list[str]:
        """The modalities that decide an answer outside training: those with an encoder that were trained."""
        return [modality for modality in self.modalities if modality not in self.untrained_modalities]

    @property
    def main_input_name(self) -> str:
        """The first input of the model: `input_values`, `input_features` or, without an audio encoder, `input_ids`."""
        if "audio" not in self.modalities:
            return "input_ids"
        return "input_features" if self.uses_log_mel else "input_values"

    def _check_values(self, only: tuple[str, ...] | None = None) -> None:
        """Raise `ValueError` for a value that `CHECKS` forbids; `only` is one of its groups of names."""
        for names, is_allowed, allowed in CHECKS:
            for name in names if only in (None, names) else ():
                if not is_allowed(getattr(self, name)):
                    raise ValueError(f"`{name}` must be {allowed}, got {getattr(self, name)!r}.")

    def _head_weights(self) -> dict[tuple[str, ...], int]:
        """About how many weights the parts after the encoders have, by the fields that decide them."""
        blocks = ("classifier_num_layers", "classifier_hidden_size", "classifier_bottleneck")
        counts: dict[tuple[str, ...], int] = {
            blocks: 2 * math.prod(getattr(self, name) for name in blocks),
            ("auxiliary_tasks", "feature_size", "auxiliary_hidden_size"): (
                len(self.auxiliary_tasks) * self.feature_size * self.auxiliary_hidden_size
            ),
        }
        if self.fusion_type == "transformer":
            counts["fusion_num_layers", "fusion_hidden_size"] = (
                12 * self.fusion_num_layers * self.fusion_hidden_size**2
            )
        for modality in self.modalities:
            states = getattr(getattr(self, f"{modality}_config"), "hidden_size", 0)
            for name in ("cross_attention_hidden_size", "pooling_hidden_size", "fusion_hidden_size"):
                counts[name, f"{modality}_config.hidden_size"] = 3 * getattr(self, name) * states
        products: tuple[tuple[str, ...], ...] = (
            ("fusion_hidden_size", "classifier_hidden_size"),
            ("classifier_hidden_size", "feature_size"),
            ("feature_size", "anchor_size"),
            ("feature_size", "uncertainty_hidden_size"),
            ("num_labels", "prototypes_per_class", "feature_size"),
            ("num_labels", "anchor_size"),
        )
        if self.openmax_distance == "centroid":
            products += (("num_labels", "openmax_centroids_per_class", "fusion_hidden_size"),)
        return counts | {names: math.prod(getattr(self, name) for name in names) for names in products}

    def validate_architecture(self):
        """Raise `ValueError` for values that cannot make a network (part of the `@strict` validation)."""
        super().validate_architecture()
        self._check_values()
        check_encoder_sizes(self.audio_config, "audio_config")
        check_encoder_sizes(self.text_config, "text_config")
        check_auxiliary_tasks(self.auxiliary_tasks, self.auxiliary_label_maps)
        check_number_of_weights(self._head_weights(), MOST_WEIGHTS)
        if self.cross_attention_hidden_size % self.cross_attention_heads:
            raise ValueError(
                f"`cross_attention_hidden_size` ({self.cross_attention_hidden_size}) must be a multiple of "
                f"`cross_attention_heads` ({self.cross_attention_heads})."
            )
        if self.fusion_type == "transformer" and self.fusion_hidden_size % self.cross_attention_heads:
            raise ValueError(
                f"`fusion_hidden_size` ({self.fusion_hidden_size}) must be a multiple of `cross_attention_heads` "
                f"({self.cross_attention_heads}) in the transformer fusion."
            )
        if self.class_counts is not None and len(self.class_counts) != self.num_labels:
            raise ValueError(
                f"`class_counts` has {len(self.class_counts)} entries but the model has {self.num_labels} labels."
            )
        if self.audio_config is None:
            return
        model_type = getattr(self.audio_config, "model_type", None)
        if model_type not in WAVEFORM_MODEL_TYPES + LOG_MEL_MODEL_TYPES:
            raise ValueError(
                f"`audio_config` has model type {model_type!r}; supported are {', '.join(WAVEFORM_MODEL_TYPES)} "
                f"(raw waveform) and {', '.join(LOG_MEL_MODEL_TYPES)} (log-mel)."
            )
        for name, reason in PADDING_DEPENDENT.items():
            if getattr(self.audio_config, name, False):
                raise ValueError(f"`audio_config.{name}=True` is not supported: {reason}.")


MMSERConfig.register_for_auto_class()

__all__ = ["MMSERConfig", "ignored_modality", "reason_unused"]
