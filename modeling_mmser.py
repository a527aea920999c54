# SPDX-License-Identifier: Apache-2.0
"""The MMSER network, top to bottom.

Pooling, the classifier and the heads beside it (anchors, uncertainty, prototypes), then `MMSERModel` (up to the fused
vector) and `MMSERForAudioClassification` (heads, loss, calibration). The encoders are in `encoders_mmser.py`, what
joins the modalities in `fusion_mmser.py`, the losses in `losses_mmser.py`, OpenMax in `openmax_mmser.py`, tasks
beside the emotion in `auxiliary_mmser.py`. Shape letters: B clips, T audio samples or mel frames, Ta audio states, L
tokens, D an encoder's width, C classes.
"""

import inspect
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput, can_return_tuple, logging
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, maybe_install_capturing_hooks

try:
    from .adapters_mmser import LoadsAdapters, weights_to_save
    from .auxiliary_mmser import NO_MOMENTS, AuxiliaryHead, AuxiliaryHeads
    from .configuration_mmser import (
        MODALITIES,
        MMSERConfig,
        check_names,
        check_own_files,
        check_token_ids,
        ignored_modality,
        reason_unused,
    )
    from .conformal_mmser import PredictionSets
    from .encoders_mmser import (
        MaskedGroupNormConvLayer,
        MaskedPositionalConvEmbedding,
        MaskedWhisperEncoder,
        Moments,
        Standardization,
        WeightedLayerSum,
        build_audio_encoder,
        build_text_encoder,
        freeze_convolutions,
        freeze_first_layers,
        is_frozen,
        keep_heads,
        keep_layers,
        load_encoder,
        loaded,
        mask_log_mel,
        parameters_of,
        state_mask,
        time_mask,
        valid_frames,
        waveform_frames,
        weighted_layer_sum,
    )
    from .fusion_mmser import (
        AttentionFusion,
        CrossModalAttention,
        FusionLayer,
        JointEncoder,
        MissingModality,
        SoleModality,
        ZeroLinear,
        attend_somewhere,
        branch_output,
    )
    from .losses_mmser import (
        ContrastiveRows,
        adjusted_logits,
        check_finite_losses,
        class_balanced_focal_loss,
        class_balanced_weights,
        clustering_loss,
        distillation_loss,
        prototype_loss,
        supervised_contrastive_loss,
        uncertainty_loss,
        without_autocast,
    )
    from .openmax_mmser import OpenMax
    from .quantization_mmser import use_int8
except ImportError:
    if __package__:  # beside a checkpoint a failed import is a real error, not a reason to take an installed copy
        raise
    from adapters_mmser import LoadsAdapters, weights_to_save
    from auxiliary_mmser import NO_MOMENTS, AuxiliaryHead, AuxiliaryHeads
    from configuration_mmser import (
        MODALITIES,
        MMSERConfig,
        check_names,
        check_own_files,
        check_token_ids,
        ignored_modality,
        reason_unused,
    )
    from conformal_mmser import PredictionSets
    from encoders_mmser import (
        MaskedGroupNormConvLayer,
        MaskedPositionalConvEmbedding,
        MaskedWhisperEncoder,
        Moments,
        Standardization,
        WeightedLayerSum,
        build_audio_encoder,
        build_text_encoder,
        freeze_convolutions,
        freeze_first_layers,
        is_frozen,
        keep_heads,
        keep_layers,
        load_encoder,
        loaded,
        mask_log_mel,
        parameters_of,
        state_mask,
        time_mask,
        valid_frames,
        waveform_frames,
        weighted_layer_sum,
    )
    from fusion_mmser import (
        AttentionFusion,
        CrossModalAttention,
        FusionLayer,
        JointEncoder,
        MissingModality,
        SoleModality,
        ZeroLinear,
        attend_somewhere,
        branch_output,
    )
    from losses_mmser import (
        ContrastiveRows,
        adjusted_logits,
        check_finite_losses,
        class_balanced_focal_loss,
        class_balanced_weights,
        clustering_loss,
        distillation_loss,
        prototype_loss,
        supervised_contrastive_loss,
        uncertainty_loss,
        without_autocast,
    )
    from openmax_mmser import OpenMax
    from quantization_mmser import use_int8

logger = logging.get_logger(__name__)

# Parameters of `MMSERModel`; a model has those that its parts have. Those of a modality start at zero, get no gradient
# from a clip that lacks it (it has a gate of 0 in the fusion) and no weight decay: they are zero until a training
# example has had the modality
FORMER_CLIPS = 5  # that the former centre counts for in `MMSERModel.recentre`
MODALITY_BIASES = ("fusion.{}.bias", "{}_pooling.hidden.bias")


class StatisticsPooling(nn.Module):
    """Mean and, unless `deviation` is False, standard deviation over time."""

    def __init__(self, input_size: int, deviation: bool = True):
        super().__init__()
        self.deviation = deviation
        self.output_size = input_size * (1 + deviation)

    def weights(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """How much each position counts, float32 [B, T]: 0 where it is not valid; the sum of a row is 1, or 0."""
        return mask / mask.sum(dim=1, keepdim=True).clamp(min=1).float()

    def forward(self, hidden_states: Tensor, mask: Tensor, deviation: Tensor | None = None) -> Tensor:
        """Pool states [B, T, D] over the valid positions of `mask`, bool [B, T], to [B, output_size]; no valid one
        gives 0. A `deviation`, [B, D], stands in place of that of the states."""
        weights = self.weights(hidden_states, mask).unsqueeze(-1)  # (B, T, 1)
        mean, own = mean_and_deviation(hidden_states, weights, self.deviation and deviation is None)
        pooled = [mean, own if deviation is None else deviation] if self.deviation else [mean]
        return torch.cat(pooled, dim=-1).to(hidden_states.dtype)


def mean_and_deviation(
    hidden_states: Tensor, weights: Tensor, with_deviation: bool = True, scale: Tensor | float = 1.0
) -> tuple[Tensor, Any]:
    """Of states [B, T, D] over time, with weights [B, T, 1] that add up to 1 or are 0: float32 [B, D] each. The
    deviation is multiplied by `scale`, and None unless asked for."""
    # As matrix products: each copy of the states is as large as they are
    states, weights = hidden_states.float(), weights.transpose(1, 2)
    with without_autocast(states):
        mean = (weights @ states)[:, 0]
        if not with_deviation:
            return mean, None
        # The derivative of the variance by the mean is 0: no gradient need pass through the mean
        variance = (weights @ (states - mean[:, None].detach()).square())[:, 0] * scale**2
    # The derivative of a square root is infinite at 0, and a single valid position has variance 0
    return mean, torch.where(variance > 1e-7, variance.clamp(min=1e-7).sqrt(), variance.new_zeros(()))


class AttentiveStatsPooling(StatisticsPooling):
    """
    Attention-weighted mean and standard deviation over time (Okabe et al. 2018, eqs. 3-6), [B, 2 D].

    With a `score_limit` it starts as plain statistics and stays near them: the scores start at zero, and
    `limit * tanh(score / limit)` keeps them within the limit, so that no position ever counts more than
    `exp(2 * limit)` times as much as another.
    """

    def __init__(self, input_size: int, hidden_size: int, score_limit: float | None = None):
        super().__init__(input_size)
        self.hidden = nn.Linear(input_size, hidden_size)
        # A bias cancels out in the softmax
        self.score = (nn.Linear if score_limit is None else ZeroLinear)(hidden_size, 1, bias=False)
        self.score_limit = score_limit

    def weights(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """As for `StatisticsPooling`, by attention."""
        scores = self.score(torch.tanh(self.hidden(hidden_states)))[..., 0].float()
        if self.score_limit is not None:
            scores = self.score_limit * torch.tanh(scores / self.score_limit)
        return F.softmax(scores.masked_fill(~mask, torch.finfo(torch.float32).min), dim=-1) * mask


def build_pooling(config: MMSERConfig, input_size: int) -> StatisticsPooling:
    """The pooling of `config.pooling_type` for states of a width."""
    if config.pooling_type in ("mean", "statistics", "layer_statistics"):
        return StatisticsPooling(input_size, deviation=config.pooling_type != "mean")
    limit = config.pooling_score_limit if config.pooling_type == "bounded_attentive_statistics" else None
    return AttentiveStatsPooling(input_size, config.pooling_hidden_size, limit)


class ResidualBlock(nn.Module):
    """
    Bottleneck residual block with LayerNorm, in a stack of `classifier_num_layers`.

    As published the norm is after each block; `classifier_norm_first` puts it at the beginning of the branch (Xiong et
    al. 2020, "On layer normalization in the transformer architecture"). In training `classifier_drop_path_rate` lets
    clips pass the branch by (Huang et al. 2016, "Deep networks with stochastic depth"), and scales it for the others.

    Two things make a deep stack of them train. The last Linear starts at zero: at first the block passes its input
    through (Zhang et al. 2019). And the branch is scaled by one over the square root of the depth (Hayou et al. 2021,
    "Stable ResNet"). Without the scale, each LayerNorm shrinks its input as soon as the branches have grown, and
    classes merge (`benchmarks/head_depth.py`).
    """

    def __init__(self, config: MMSERConfig):
        super().__init__()
        self.down = nn.Linear(config.classifier_hidden_size, config.classifier_bottleneck)
        self.up = branch_output(config, config.classifier_bottleneck, config.classifier_hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.layer_norm = nn.LayerNorm(config.classifier_hidden_size)
        self.branch_scale = config.classifier_num_layers**-0.5 if config.scale_branches_by_depth else 1.0
        self.drop_path_rate, self.norm_first = config.classifier_drop_path_rate, config.classifier_norm_first

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, classifier_hidden_size] -> the same."""
        inputs = self.layer_norm(hidden_states) if self.norm_first else hidden_states
        branch = self.dropout(self.up(F.relu(self.down(inputs))))
        if self.training and self.drop_path_rate:  # dropout of one number for each clip
            branch = branch * F.dropout(branch.new_ones(len(branch), 1), self.drop_path_rate)
        hidden_states = hidden_states + self.branch_scale * branch
        return hidden_states if self.norm_first else self.layer_norm(hidden_states)


class DeepClassifier(nn.Module):
    """Input projection, `classifier_num_layers` residual blocks, a feature layer and the output layer."""

    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, config: MMSERConfig):
        super().__init__()
        self.checkpoint_interval = config.classifier_checkpoint_interval
        self.input_projection = nn.Linear(config.fusion_hidden_size, config.classifier_hidden_size)
        self.input_norm = nn.LayerNorm(config.classifier_hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.blocks = nn.ModuleList(ResidualBlock(config) for _ in range(config.classifier_num_layers))
        self.feature_projection = nn.Linear(config.classifier_hidden_size, config.feature_size)
        self.output = nn.Linear(config.feature_size, config.num_labels)
        self.gradient_checkpointing = False  # switched, and given its function, by `activation_checkpointing_enable`

    def forward(self, fused: Tensor) -> tuple[Tensor, Tensor]:
        """Classify fused vectors [B, fusion_hidden_size]; return logits [B, C] and features [B, feature_size]."""
        hidden_states = self.dropout(F.relu(self.input_norm(self.input_projection(fused))))
        for start in range(0, len(self.blocks), self.checkpoint_interval):
            if self.gradient_checkpointing and self.training:
                hidden_states = self._gradient_checkpointing_func(self._run_group, hidden_states, start)
            else:
                hidden_states = self._run_group(hidden_states, start)
        features = F.relu(self.feature_projection(hidden_states))
        return self.output(self.dropout(features)), features

    def _run_group(self, hidden_states: Tensor, start: int) -> Tensor:
        for block in self.blocks[start : start + self.checkpoint_interval]:
            hidden_states = block(hidden_states)
        return hidden_states


class ClassAnchorClustering(nn.Module):
    """Projects features onto the unit sphere and measures how near each clip is to a learned anchor per class."""

    def __init__(self, config: MMSERConfig):
        super().__init__()
        self.initial_temperature = config.anchor_temperature
        self.projection = nn.Linear(config.feature_size, config.anchor_size)
        self.anchors = nn.Parameter(torch.zeros(config.num_labels, config.anchor_size))
        # The logarithm is learned: so the temperature is always positive
        self.log_temperature = nn.Parameter(torch.zeros((), dtype=torch.float32))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            features: [B, feature_size].

        Returns: anchor logits (cosine similarity over the temperature) and Euclidean distances on the unit sphere in
            [0, 2], both float32 [B, C].
        """
        with without_autocast(features):
            projected = F.normalize(self.projection(features.to(self.anchors.dtype)).float(), dim=-1)
            anchors = F.normalize(self.anchors.float(), dim=-1)
            similarity = projected @ anchors.T
        distances = (2 - 2 * similarity).clamp(min=1e-6).sqrt()
        return similarity * torch.exp(-self.log_temperature.float()), distances


class UncertaintyHead(nn.Module):
    """Predicts how likely the classifier is to be wrong about a clip."""

    uncalibrated = (0.0, 1.0, 0.0)  # the head's own uncertainty
    error_calibration: Tensor

    def __init__(self, config: MMSERConfig):
        super().__init__()
        self.hidden = nn.Linear(config.feature_size, config.uncertainty_hidden_size)
        self.output = nn.Linear(config.uncertainty_hidden_size, 1)
        # Weights of the classifier's doubt and of this head, and a constant
        self.register_buffer("error_calibration", torch.tensor(self.uncalibrated, dtype=torch.float32))

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, feature_size] -> uncertainty [B, 1] in [0, 1]."""
        return torch.sigmoid(self.output(F.relu(self.hidden(features))))

    def calibrated(self, uncertainty: Tensor, logits: Tensor) -> Tensor:
        """
        The probability of an error as held-out clips have it: a logistic regression on the log-odds of the largest
        class probability being wrong and of this head's uncertainty (Platt 1999, on two scores).

        Args:
            uncertainty: of `forward`, [B, 1].
            logits: divided by the temperature, [B, C].

        Returns: [B, 1] in [0, 1]; the head's own uncertainty as long as nothing is fitted.
        """
        # Log-odds of 1 - max probability from the logits: as a probability it rounds to 0 for a sure answer, and ties
        ordered = logits.float().sort(dim=-1, descending=True).values
        doubt = (ordered[..., 1:].logsumexp(dim=-1, keepdim=True) - ordered[..., :1]).clamp(-80, 80)
        with loaded(self):
            weights = self.error_calibration.to(logits.device)
        log_odds = weights[0] * doubt + weights[1] * uncertainty.float().logit(eps=1e-6) + weights[2]
        return torch.sigmoid(log_odds).to(uncertainty.dtype)


class PrototypeMemory(nn.Module):
    """Several learned prototypes per class in feature space; a class is as near as its nearest prototypes."""

    def __init__(self, config: MMSERConfig):
        super().__init__()
        self.prototypes = nn.Parameter(
            torch.zeros(config.num_labels, config.prototypes_per_class, config.feature_size)
        )

    def forward(self, features: Tensor) -> Tensor:
        """
        Soft-minimum (over the prototypes of a class) of the squared distance between L2-normalised features and
        prototypes, negated. Features [B, feature_size] -> prototype logits, float32 [B, C].
        """
        features = F.normalize(features.float(), dim=-1)
        prototypes = F.normalize(self.prototypes.float(), dim=-1)
        with without_autocast(features):
            squared_distance = 2 - 2 * torch.einsum("bd,ckd->bck", features, prototypes)
        return torch.logsumexp(-squared_distance, dim=-1) - math.log(prototypes.shape[1])


@dataclass
class MMSERModelOutput(ModelOutput):
    """
    Output of `MMSERModel`.

    Args:
        pooler_output (`torch.FloatTensor` of shape `(batch_size, fusion_hidden_size)`): the fused vector.
        audio_embeds (`torch.FloatTensor` of shape `(batch_size, 2 * audio width)`): pooled audio, mean then deviation.
        text_embeds (`torch.FloatTensor` of shape `(batch_size, 2 * text width)`): pooled text, mean then deviation.
        gate (`torch.FloatTensor` of shape `(batch_size, fusion_hidden_size)`): share of the audio in the fused vector.
            A model of one modality has no gate, and only the vector of that one.
        hidden_states, attentions: of the audio encoder (of the text encoder when there is no audio), if asked for.
    """

    pooler_output: Tensor | None = None
    audio_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    gate: Tensor | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class MMSEROutput(ModelOutput):
    """
    Output of `MMSERForAudioClassification`.

    Args:
        loss (`torch.FloatTensor` of shape `()`): weighted sum of the parts, if `labels` are given.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`): calibrated by the temperature in eval mode.
        uncertainty (`torch.FloatTensor` of shape `(batch_size, 1)`): in [0, 1], high where a prediction may be wrong;
            once it is calibrated, in eval mode, the probability that it is.
        anchor_loss (`torch.FloatTensor` of shape `()`): unweighted clustering loss, if `labels` are given; 0
            if it has no weight.
        losses (`dict[str, torch.FloatTensor]`): the weighted parts by name, detached; they sum to `loss`.
        features (`torch.FloatTensor` of shape `(batch_size, feature_size)`): input of the output layer.
        fused (`torch.FloatTensor` of shape `(batch_size, fusion_hidden_size)`): `pooler_output` of `MMSERModel`.
        anchor_distances (`torch.FloatTensor` of shape `(batch_size, num_labels)`): distance to each class anchor.
        unknown_probability (`torch.FloatTensor` of shape `(batch_size, 1)`): of OpenMax, once it is fitted.
        open_set_probabilities (`torch.FloatTensor` of shape `(batch_size, num_labels + 1)`): of OpenMax, once
            it is fitted: of the classes, then of "unknown".
        rejection_score (`torch.FloatTensor` of shape `(batch_size, 1)`): of OpenMax, once it is fitted: -log of
            the largest probability that it leaves to a class.
        is_unknown (`torch.BoolTensor` of shape `(batch_size,)`): of OpenMax, once it is fitted: which clips are
            rejected; None if `config.openmax_threshold` is None.
        auxiliary (`dict[str, torch.FloatTensor]`): of each of `config.auxiliary_tasks`, logits of shape
            `(batch_size, num_classes)` or values of shape `(batch_size,)`; None without tasks.
        hidden_states, attentions: of the audio encoder (of the text encoder when there is no audio), if asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    uncertainty: Tensor | None = None
    anchor_loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    features: Tensor | None = None
    fused: Tensor | None = None
    anchor_distances: Tensor | None = None
    unknown_probability: Tensor | None = None
    open_set_probabilities: Tensor | None = None
    rejection_score: Tensor | None = None
    is_unknown: Tensor | None = None
    auxiliary: dict[str, Tensor] | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MMSERPreTrainedModel(LoadsAdapters, PreTrainedModel):
    """Weight initialisation, loading, and what both models share."""

    config: MMSERConfig
    config_class = MMSERConfig
    base_model_prefix = "mmser"
    main_input_name = "input_values"
    input_modalities = MODALITIES  # type: ignore[assignment]  # typed as a list; a tuple cannot be changed
    supports_gradient_checkpointing = True
    # The loss is a mean over the batch: the Trainer must divide it by the number of accumulation steps
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Whisper's positions are sinusoids, with which it starts: an export in int8 does not store them
    _keys_to_ignore_on_load_missing = (r"audio_encoder\.embed_positions\.weight",)  # type: ignore[assignment]
    # Blocks that add up what several of their layers give: `device_map="auto"` keeps each on one device
    _no_split_modules = (  # type: ignore[assignment]  # typed as a list; a tuple cannot be changed
        *(
            "Standardization",
            "CrossModalAttention",
            "StatisticsPooling",
            "AttentiveStatsPooling",
            "FusionLayer",
            "SoleModality",
        ),
        *("JointEncoder", "AttentionFusion", "AuxiliaryHead"),
        *("ResidualBlock", "ClassAnchorClustering", "UncertaintyHead", "PrototypeMemory", "OpenMax"),
    )

    def __setstate__(self, state):
        """From a pickle of another process: Transformers learns in `__init__` which states its encoders can give."""
        super().__setstate__(state)
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                _CAN_RECORD_REGISTRY[module] = module._can_record_outputs

    @classmethod
    def is_custom_code(cls) -> bool:
        """
        False: for code that initialises weights in place, the library skips `_init_weights` on modules without tensors
        of their own. `_init_weights` below uses the guarded functions, so it may be called on every module.
        """
        return False

    # Those of the library look for parameters, which a replica of `nn.DataParallel` lacks
    @property
    def dtype(self) -> torch.dtype:
        """Type of the first weight that is floating point."""
        return next(parameter.dtype for parameter in parameters_of(self) if parameter.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Device of the first weight."""
        return next(parameter.device for parameter in parameters_of(self))

    def _placed(self, value: Tensor) -> Tensor:
        """An input on the device of the model. Where weights are offloaded, Accelerate places the inputs itself."""
        return value if self.device.type == "meta" else value.to(self.device)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear):
            if isinstance(module, ZeroLinear):
                init.zeros_(module.weight)
            else:
                init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Standardization):
            init.zeros_(module.mean)
            init.ones_(module.scale)
        elif isinstance(module, MissingModality):
            init.normal_(module.embedding, std=0.02)
        elif isinstance(module, JointEncoder):
            init.normal_(module.modality_embeddings, std=0.02)
            init.normal_(module.presence_embeddings, std=0.02)
        elif isinstance(module, AttentionFusion):
            init.zeros_(module.queries)
        elif isinstance(module, ClassAnchorClustering):
            init.orthogonal_(module.anchors)
            init.constant_(module.log_temperature, math.log(module.initial_temperature))
        elif isinstance(module, PrototypeMemory):
            init.normal_(module.prototypes)
        elif isinstance(module, OpenMax):
            for buffer in (module.weibull_shape, module.weibull_scale, module.weibull_shift):
                init.ones_(buffer)
            init.zeros_(module.fitted)
            init.constant_(module.rejection_thresholds, module.no_threshold)
            if module.has_centroids:
                init.zeros_(module.centroids)
        elif isinstance(module, PredictionSets):
            init.constant_(module.thresholds, module.not_fitted)
        elif isinstance(module, UncertaintyHead):
            init.copy_(module.error_calibration, torch.tensor(module.uncalibrated))
        elif isinstance(module, AuxiliaryHead):
            if module.num_classes is None:
                init.copy_(module.target_moments, torch.tensor(NO_MOMENTS))
        elif isinstance(module, MMSERModel):
            if module.layer_weights is not None:
                init.zeros_(module.layer_weights)
        elif isinstance(module, MMSERForAudioClassification):
            init.ones_(module.temperature)
        else:
            super()._init_weights(module)

    @classmethod
    def from_backbones(
        cls,
        audio_name_or_path: str | PreTrainedConfig | None,
        text_name_or_path: str | PreTrainedConfig | None,
        hub_kwargs: dict | None = None,
        audio_num_hidden_layers: int | None = None,
        text_num_hidden_layers: int | None = None,
        **config_overrides,
    ):
        """
        Start a fine-tune from pretrained encoders; everything else starts at random.

        Args:
            audio_name_or_path, text_name_or_path: Hub name or folder of each encoder. A config object instead starts
                that encoder at random. With None for one of them the model has only the other.
            hub_kwargs: `revision`, `token`, `cache_dir`... handed to both `from_pretrained` calls.
            audio_num_hidden_layers, text_num_hidden_layers: keep only that many of an encoder's layers, the first
                ones. The last ones of an audio encoder trained to transcribe tell words, not how they are said.
            config_overrides: fields of `MMSERConfig`, e.g. `num_labels=7` or `classifier_num_layers=5`.

        Returns: the model in float32 and eval mode.
        Raises:
            TypeError: an override that is no field of `MMSERConfig`.
            ValueError: a checkpoint that lacks weights of its encoder, or has files elsewhere; fewer layers in it than
                are to be kept, or no encoder at all.
        """
        MMSERConfig.check_fields(config_overrides)
        if audio_name_or_path is None and text_name_or_path is None:
            raise ValueError("Give an audio encoder, a text encoder or both; both are None.")
        hub_kwargs = {"trust_remote_code": False, **(hub_kwargs or {})}
        for source in (audio_name_or_path, text_name_or_path):
            if isinstance(source, str | os.PathLike):
                check_own_files(source, hub_kwargs.get("subfolder") or "")
        audio_config, text_config = (
            AutoConfig.from_pretrained(source, **hub_kwargs) if isinstance(source, str | os.PathLike) else source
            for source in (audio_name_or_path, text_name_or_path)
        )
        if audio_num_hidden_layers is not None and audio_config is not None:
            audio_config = keep_layers(audio_config, "audio", audio_num_hidden_layers)
        if text_num_hidden_layers is not None and text_config is not None:
            text_config = keep_layers(text_config, "text", text_num_hidden_layers)
        encoders = {"audio": audio_config, "text": text_config}
        config_overrides["modalities"] = [modality for modality in MODALITIES if encoders[modality] is not None]
        config = MMSERConfig(audio_config=audio_config, text_config=text_config, **config_overrides)
        for encoder_config in (config.audio_config, config.text_config):
            if encoder_config is not None:
                encoder_config.dtype = torch.float32
        model = cls(config)
        base_model = cast(MMSERModel, model.base_model)
        if isinstance(audio_name_or_path, str | os.PathLike):
            load_encoder(base_model.audio_encoder, str(audio_name_or_path), **hub_kwargs)
        if isinstance(text_name_or_path, str | os.PathLike):
            load_encoder(base_model.text_encoder, str(text_name_or_path), **hub_kwargs)
        return model.eval()

    def _check_keywords(self, kwargs: dict[str, Any]) -> None:
        """
        Refuse what `forward` would ignore. Those that are None, and `num_items_in_batch`, come from the library's own
        callers, which pass them to models of any kind.
        """
        given = [name for name, value in kwargs.items() if value is not None and name != "num_items_in_batch"]
        if given:
            names = inspect.signature(self.forward).parameters.keys() - {"kwargs"}
            check_names(given, names, f"argument of {type(self).__name__}.forward")

    def freeze_audio_encoder(self):
        """Freeze the audio encoder: no gradient; eval mode (no dropout, no SpecAugment) whatever `train()` says."""
        self._encoder("audio").requires_grad_(False).eval()

    def freeze_text_encoder(self):
        """Freeze the text encoder: no gradient, and eval mode whatever `train()` says."""
        self._encoder("text").requires_grad_(False).eval()

    def freeze_feature_encoder(self):
        """Freeze only the convolutions in front of the audio encoder's attention layers."""
        freeze_convolutions(self._encoder("audio"))

    def freeze_audio_layers(self, num_layers: int):
        """Freeze the first attention layers of the audio encoder and what comes before; their dropout stays on."""
        freeze_first_layers(self._encoder("audio"), num_layers)

    def get_input_embeddings(self) -> nn.Module:
        return self._encoder("text").get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self._encoder("text").set_input_embeddings(value)

    def _encoder(self, modality: str) -> Any:
        encoder = getattr(self.base_model, f"{modality}_encoder")
        if encoder is None:  # what the library raises, and expects, where a model has no table of tokens
            raise NotImplementedError(f"{reason_unused(modality, self.config.modalities)}.")
        return encoder

    def note_untrained_modalities(self, state_dict: dict[str, Tensor] | None = None) -> None:
        """
        Write into the configuration which modality no training example had so far, as the weights say
        (`MODALITY_BIASES`). A model that was not trained at all uses both. Weights that are not here, as those of an
        offloaded or sharded model, change nothing.

        Args:
            state_dict: the weights, if not those of this object.
        """
        base_model = cast(Any, self.base_model)
        weights: Any = base_model.state_dict() if state_dict is None else state_dict
        prefix = f"{self.base_model_prefix}." if state_dict is not None and base_model is not self else ""
        parameters = {name for name, _ in base_model.named_parameters()}
        names = {
            name: [prefix + bias.format(name) for bias in MODALITY_BIASES if bias.format(name) in parameters]
            for name in MODALITIES
        }
        found = [weights.get(bias) for biases in names.values() for bias in biases]
        if not all(names.values()) or any(bias is None or bias.is_meta or not bias.numel() for bias in found):
            return
        trained = [name for name, biases in names.items() if any(bool(weights[bias].any()) for bias in biases)]
        self.config.untrained_modalities = [name for name in MODALITIES if name not in trained] if trained else []

    def save_pretrained(self, save_directory, *args, **kwargs):
        """
        As always; the configuration then says which modality, if any, was never trained. A model with adapters is
        saved as these, without the encoders; `merged_weights` as its `state_dict` are saved whole.
        """
        self.note_untrained_modalities(kwargs.get("state_dict"))
        adapters = self.config.lora
        if adapters is not None:
            kwargs["state_dict"], self.config.lora = weights_to_save(self, kwargs.get("state_dict"))
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.lora = adapters
        if not Path(save_directory).is_dir() or not kwargs.get("is_main_process", True):
            return
        # safetensors lets the owner of its files alone read them, whom umask lets read the others too
        mode = (Path(save_directory) / "config.json").stat().st_mode
        for file in Path(save_directory).glob("model*.safetensors"):
            if file.stat().st_mode != mode:
                file.chmod(mode)
        # The configuration names the processor's code too, which no stock Trainer saves
        code = Path(__file__).with_name("processing_mmser.py")
        if code.is_file():
            for file in (code, *map(Path, get_relative_import_files(code))):
                if file.parent.resolve() != Path(save_directory).resolve():
                    shutil.copy(file, save_directory)


class MMSERModel(MMSERPreTrainedModel):
    """
    Both encoders, cross-modal attention, attentive statistics pooling, gated fusion; ends at the fused vector.

    With `config.fusion_type` "transformer", a small encoder over both sequences is in place of the cross-modal
    attention, and attention over the two pooled vectors in place of the gate. With one of `config.modalities` the
    parts of the other are None, and so are those that join the two.

    Args:
        config (`MMSERConfig`): the architecture. `from_pretrained` and `from_backbones` bring weights along.
    """

    # In training against an adversary: modality, states [B, T, D], bool mask [B, T] -> the states to go on with
    state_perturbation: Callable[[str, Tensor, Tensor], Tensor] | None = None
    audio_encoder: Any
    text_encoder: Any
    layer_weights: Any
    state_norm: Any
    missing_audio: Any
    missing_text: Any
    audio_attention: Any
    text_attention: Any
    joint_encoder: Any
    audio_pooling: Any
    text_pooling: Any
    fusion: Any

    def __init__(self, config: MMSERConfig):
        """Start with random weights."""
        super().__init__(config)
        self.main_input_name = config.main_input_name
        self.input_modalities = tuple(config.modalities)
        self.audio_encoder = self.text_encoder = self.layer_weights = self.state_norm = None
        self.missing_audio = self.missing_text = self.audio_attention = self.text_attention = None
        self.joint_encoder = None
        self.audio_pooling = self.text_pooling = None
        sizes = {name: getattr(config, f"{name}_config").hidden_size for name in config.modalities}
        if "audio" in sizes:
            self.audio_encoder = build_audio_encoder(config.audio_config)
            keep_heads(self.audio_encoder, config.audio_attention_heads)
        if "text" in sizes:
            self.text_encoder = build_text_encoder(config.text_config)
            keep_heads(self.text_encoder, config.text_attention_heads)
        if "audio" in sizes:
            if config.use_weighted_layer_sum:
                self.layer_weights = nn.Parameter(torch.zeros(config.audio_config.num_hidden_layers + 1))
            num_layers = 1 if self.layer_weights is None else len(self.layer_weights)
            self.state_norm = Standardization(num_layers, sizes["audio"])
        is_joint = config.fusion_type == "transformer"
        if is_joint:
            self.joint_encoder = JointEncoder(config, sizes)
        if len(sizes) > 1:
            audio_size, text_size = sizes.values()
            self.missing_audio = MissingModality(audio_size)
            self.missing_text = MissingModality(text_size)
            if not is_joint:
                self.audio_attention = CrossModalAttention(config, audio_size, text_size)
                self.text_attention = CrossModalAttention(config, text_size, audio_size)
            self.audio_pooling = build_pooling(config, audio_size)
            self.text_pooling = build_pooling(config, text_size)
            fusion = AttentionFusion if is_joint else FusionLayer
            self.fusion = fusion(config, self.audio_pooling.output_size, self.text_pooling.output_size)
        else:
            ((name, size),) = sizes.items()
            # In place of the one after the attention, which encoders that start at random need
            has_norm = config.cross_attention_layer_norm and not is_joint
            self.layer_norm = nn.LayerNorm(size) if has_norm else nn.Identity()
            pooling = build_pooling(config, size)
            setattr(self, f"{name}_pooling", pooling)
            self.fusion = SoleModality(config, pooling.output_size)
        if config.int8_weights:
            use_int8(self)
        if self.audio_encoder is not None:  # the library splits none of those for waveforms
            self._no_split_modules = (*self._no_split_modules, type(self.audio_encoder).__name__)  # type: ignore[assignment]
        self.post_init()

    def train(self, mode: bool = True):
        """Set training mode, except for a frozen encoder: frozen means no dropout and no SpecAugment either."""
        super().train(mode)
        for encoder in (self.audio_encoder, self.text_encoder):
            if encoder is not None and is_frozen(encoder):
                encoder.eval()
        return self

    def _replicate_for_data_parallel(self):
        """Set the hooks that record the layers' states first: replicas share hooks, and each would set its own."""
        for encoder in self.children():
            if isinstance(encoder, PreTrainedModel):
                maybe_install_capturing_hooks(encoder)
        return super()._replicate_for_data_parallel()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.FloatTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        text_attention_mask: torch.LongTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        audio_states: torch.FloatTensor | None = None,
        text_states: torch.FloatTensor | None = None,
        output_hidden_states: bool | Iterable[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> MMSERModelOutput:
        r"""
        Args:
            input_values (`torch.FloatTensor` of shape `(batch_size, num_samples)`): waveform from `MMSERProcessor`.
            attention_mask (`torch.LongTensor` of shape `(batch_size, num_samples)` or `(batch_size, num_frames)`):
                1 for audio, 0 for padding on the right. A row of zeros has no audio.
            input_ids (`torch.LongTensor` of shape `(batch_size, num_tokens)`): tokens of the transcript.
            text_attention_mask (`torch.LongTensor` of shape `(batch_size, num_tokens)`): the same for the text.
            input_features (`torch.FloatTensor` of shape `(batch_size, num_mels, num_frames)`): log-mel frames, in
                place of `input_values` for encoders that take them.
            audio_states (`torch.FloatTensor` of shape `(batch_size, num_states, num_layers, hidden_size)`): what
                `encode` returned earlier, in place of audio; `attention_mask` then is that of the states.
            text_states (`torch.FloatTensor` of shape `(batch_size, num_tokens, hidden_size)`): the same for
                the text.
            output_hidden_states, output_attentions (`bool`): return those of the audio encoder.

        Returns: `MMSERModelOutput`.
        Raises:
            TypeError: an unknown keyword; the message suggests the nearest one.
            ValueError: neither audio nor text given, the wrong kind of audio input, audio too short for one frame, or
                states beside the input that they are of, or of another shape.
        """
        self._check_keywords(kwargs)
        audio = self._audio_input(input_values, input_features)
        self._check_states(audio_states, text_states, audio, input_ids)
        ignored = self._ignored_modality(
            {"audio": (audio, audio_states, attention_mask), "text": (input_ids, text_states, text_attention_mask)}
        )
        if ignored == "audio":
            audio = audio_states = None
        elif ignored == "text":
            input_ids = text_states = None
        if output_hidden_states is None:
            output_hidden_states = getattr(self.config, "output_hidden_states", False)
        if output_attentions is None:
            output_attentions = getattr(self.config, "output_attentions", False)
        flags = {"output_hidden_states": bool(output_hidden_states), "output_attentions": bool(output_attentions)}
        audio_hidden, audio_mask, record, deviation = self._audio_states(audio, audio_states, attention_mask, flags)
        # The record is that of the audio encoder, unless there is none
        text_flags = flags if record is None else {}
        text_hidden, text_mask, text_record = self._text_states(
            input_ids, text_states, text_attention_mask, text_flags
        )
        record = record or text_record
        if self.state_perturbation is not None:
            if audio_hidden is not None:
                clean, audio_hidden = audio_hidden, self.state_perturbation("audio", audio_hidden, audio_mask)
                if deviation is not None:  # of the layers, which are not perturbed: what that of their sum gains
                    weights = self.audio_pooling.weights(clean, audio_mask).unsqueeze(-1)
                    before, after = (mean_and_deviation(states, weights)[1] for states in (clean, audio_hidden))
                    deviation = deviation + after - before
            if text_hidden is not None:
                text_hidden = self.state_perturbation("text", text_hidden, text_mask)
        join = self._join if len(self.config.modalities) > 1 else self._pass_on
        audio_embeds, text_embeds, fused, gate = join(audio_hidden, audio_mask, text_hidden, text_mask, deviation)
        return MMSERModelOutput(
            pooler_output=fused,
            audio_embeds=audio_embeds,
            text_embeds=text_embeds,
            gate=gate,
            hidden_states=_select_layers(record.hidden_states, output_hidden_states)
            if record and output_hidden_states
            else None,
            attentions=record.attentions if record and output_attentions else None,
        )

    def _ignored_modality(self, given: dict[str, tuple]) -> str | None:
        """
        The given modality that plays no part: it has no encoder, or outside training it was never trained. Reported
        once; an error if nothing else is given.

        Args:
            given: "audio" and "text" -> their input, their states and their mask, None for what is not given.
        """
        used = self.config.modalities if self.training else self.config.used_modalities
        names = [name for name, (inputs, states, _) in given.items() if inputs is not None or states is not None]
        ignored = ignored_modality(names, used, self.config.modalities)
        if ignored is None:
            return None
        mask = given[ignored][2]
        # Rows without the modality are masked; those of a graph that is being recorded cannot be read
        if not torch.compiler.is_compiling() and (mask is None or (not is_tracing(mask) and bool(mask.any()))):
            reason = reason_unused(ignored, self.config.modalities)
            logger.warning_once(f"{reason}: its {ignored} input is ignored.")
        return ignored

    def _pass_on(self, audio_hidden, audio_mask, text_hidden, text_mask, deviation) -> tuple[Any, Any, Tensor, None]:
        """As `_join`, for a model of one modality."""
        (name,) = self.config.modalities
        hidden, mask = (audio_hidden, audio_mask) if name == "audio" else (text_hidden, text_mask)
        if self.joint_encoder is not None:
            (hidden,) = self.joint_encoder({name: hidden}, {name: mask}, {name: mask.any(dim=1)})
        embeds = getattr(self, f"{name}_pooling")(self.layer_norm(hidden), mask, deviation)
        return *((embeds, None) if name == "audio" else (None, embeds)), self.fusion(embeds), None

    def _join(
        self, audio_hidden, audio_mask, text_hidden, text_mask, deviation: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States [B, T, D] and masks [B, T], None for what is not given, and the `_layer_deviation` of the audio ->
        pooled audio, pooled text, fused, gate."""
        if audio_hidden is None:
            audio_hidden, audio_mask = self._nothing(text_hidden, self.missing_audio)
        if text_hidden is None:
            text_hidden, text_mask = self._nothing(audio_hidden, self.missing_text)
        is_recorded = torch.compiler.is_compiling() or is_tracing(audio_hidden)
        if not is_recorded and len(audio_hidden) != len(text_hidden):  # one row would be broadcast
            raise ValueError(f"The audio has {len(audio_hidden)} rows, but the text has {len(text_hidden)}.")
        audio_hidden, audio_mask, has_audio = self.missing_audio(audio_hidden, audio_mask)
        text_hidden, text_mask, has_text = self.missing_text(text_hidden, text_mask)
        if self.joint_encoder is None:
            audio_attended = self.audio_attention(audio_hidden, text_hidden, text_mask)
            text_attended = self.text_attention(text_hidden, audio_hidden, audio_mask)
        else:
            states, masks = {"audio": audio_hidden, "text": text_hidden}, {"audio": audio_mask, "text": text_mask}
            audio_attended, text_attended = self.joint_encoder(states, masks, {"audio": has_audio, "text": has_text})
        audio_embeds = self.audio_pooling(audio_attended, audio_mask, deviation)  # (B, 2 D)
        text_embeds = self.text_pooling(text_attended, text_mask)
        return audio_embeds, text_embeds, *self.fusion(audio_embeds, text_embeds, has_audio, has_text)

    def _audio_states(self, audio, audio_states, attention_mask, flags: dict) -> tuple[Any, Any, Any, Any]:
        """States [B, Ta, D] and bool mask [B, Ta] of the audio, or of its `audio_states`, the encoder's output, and
        the `_layer_deviation`."""
        if audio is not None:
            layers, mask, record = self._encode_audio(audio, attention_mask, **flags)
            return self._weigh_layers(layers), mask, record, self._layer_deviation(layers, mask)
        if audio_states is not None:
            layers, mask = audio_states.unbind(dim=2), _as_mask(attention_mask, audio_states, "attention_mask")
            return self._weigh_layers(layers, self.dtype), mask, None, self._layer_deviation(layers, mask)
        return None, None, None, None

    def _text_states(self, input_ids, text_states, attention_mask, flags: dict) -> tuple[Any, Any, Any]:
        """States [B, L, D] and bool mask [B, L] of the text, or its `text_states`, and the encoder's output."""
        if input_ids is not None:
            return self._encode_text(input_ids, attention_mask, **flags)
        if text_states is not None:
            return text_states.to(self.dtype), _as_mask(attention_mask, text_states, "text_attention_mask"), None
        return None, None, None

    def encode(
        self,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        text_attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """
        Run the encoders only. Their states do not depend on what is trained after them: the states of frozen encoders
        can be kept, and given to `forward` in place of the audio and the text.

        Args:
            input_values, attention_mask, input_ids, text_attention_mask, input_features: see `forward`.

        Returns: `audio_states` [B, Ta, layers, D] (all layers with `use_weighted_layer_sum`, else the last) and their
            `attention_mask` int64 [B, Ta], if audio is given; `text_states` [B, L, D] and `text_attention_mask`
            int64 [B, L], if text is.
        """
        states: dict[str, Tensor] = {}
        audio = self._audio_input(input_values, input_features)
        if audio is not None:
            layers, mask, _ = self._encode_audio(audio, attention_mask)
            states |= {"audio_states": torch.stack(list(layers), dim=2), "attention_mask": mask.long()}
        if input_ids is not None:
            text_states, mask, _ = self._encode_text(input_ids, text_attention_mask)
            states |= {"text_states": text_states, "text_attention_mask": mask.long()}
        return states

    def frozen_encoders(self) -> set[str]:
        """Which of "audio" and "text" have an encoder without trainable parameters."""
        encoders = {"audio": self.audio_encoder, "text": self.text_encoder}
        return {name for name, encoder in encoders.items() if encoder is not None and is_frozen(encoder)}

    def _check_states(self, audio_states, text_states, audio: Tensor | None, input_ids: Tensor | None) -> None:
        if all(given is None for given in (audio, input_ids, audio_states, text_states)):
            raise ValueError("Give audio (`input_values` or `input_features`), `input_ids`, or both.")
        if (audio is not None and audio_states is not None) or (input_ids is not None and text_states is not None):
            raise ValueError("Give `audio_states` in place of audio and `text_states` in place of `input_ids`.")
        expected: dict[str, tuple] = {}
        if self.state_norm is not None:
            expected["audio_states"] = tuple(self.state_norm.mean.shape)
        if self.text_encoder is not None:
            expected["text_states"] = (self.config.text_config.hidden_size,)
        for name, states in (("audio_states", audio_states), ("text_states", text_states)):
            if states is not None and name in expected and tuple(states.shape[2:]) != expected[name]:
                raise ValueError(
                    f"`{name}` must have the shape (batch, time, {', '.join(map(str, expected[name]))}) for this "
                    f"model, got {tuple(states.shape)}."
                )

    def _audio_input(self, input_values: Tensor | None, input_features: Tensor | None) -> Tensor | None:
        if self.audio_encoder is None:  # of either kind, it is ignored
            return input_values if input_features is None else input_features
        expected, given = (
            ("input_features", "input_values") if self.config.uses_log_mel else ("input_values", "input_features")
        )
        audio, wrong = (input_features, input_values) if self.config.uses_log_mel else (input_values, input_features)
        if wrong is not None:
            raise ValueError(f"A {self.config.audio_config.model_type} encoder takes `{expected}`, not `{given}`.")
        if audio is not None and not audio.is_floating_point():
            raise ValueError(f"`{expected}` must be floating point, got {audio.dtype}: use `MMSERProcessor`.")
        return audio

    def _encode_audio(
        self,
        audio: Tensor,
        attention_mask: Tensor | None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> tuple[tuple[Tensor, ...], Tensor, BaseModelOutput]:
        """Return states [B, Ta, D], one or one per layer, their bool mask [B, Ta] (rows without audio all False), and
        the encoder's output."""
        encoder = self._encoder("audio")
        audio = audio.to(self.dtype)
        _check_mask(attention_mask, (audio.shape[0], audio.shape[-1]), "attention_mask")
        if attention_mask is None:
            attention_mask = torch.ones(audio.shape[0], audio.shape[-1], dtype=torch.long, device=audio.device)
        mask = attention_mask.bool()
        # Rows without audio are encoded as silence and their states replaced afterwards
        safe_mask = (mask | ~mask.any(dim=1, keepdim=True)).long()
        flags: dict[str, Any] = {
            "output_hidden_states": output_hidden_states or self.layer_weights is not None,
            "output_attentions": output_attentions,
            "return_dict": True,
        }
        # A frozen encoder builds no graph, unless the audio itself asks for a gradient: saliency, adversarial examples
        with torch.set_grad_enabled(torch.is_grad_enabled() and (audio.requires_grad or not is_frozen(encoder))):
            if self.config.uses_log_mel:
                frame_mask = valid_frames(mask, 1, 2)
                if encoder.training:
                    audio = mask_log_mel(audio, mask, self.config.audio_config)
                output = encoder(audio, attention_mask=safe_mask, **flags)
            else:
                frame_mask = waveform_frames(mask, self.config.audio_config)
                if encoder.training:
                    flags["mask_time_indices"] = state_mask(frame_mask, self.config.audio_config)
                is_masked = isinstance(encoder.feature_extractor.conv_layers[0], MaskedGroupNormConvLayer)
                if is_masked and not _is_known_to_be_full(mask):
                    audio = torch.stack([audio, safe_mask.to(audio)], dim=1)  # (B, 2, T)
                output = encoder(audio, attention_mask=safe_mask, **flags)
        return self._audio_layers(output), frame_mask, output

    def _weigh_layers(self, layers: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Standardise the layers' states, each [B, Ta, D], and sum them by their weights to [B, Ta, D], of their own
        or another type."""
        # sum_l w_l (layer_l - mean_l) scale_l, with all that does not depend on the clip taken together
        dtype = dtype or layers[0].dtype
        with loaded(self.state_norm):
            factors, mean = self.state_norm.scale.float(), self.state_norm.mean.float()
        if self.layer_weights is not None:
            factors = F.softmax(self.layer_weights.float(), dim=0)[:, None].to(factors.device) * factors
        offset = (factors * mean).sum(dim=0).to(layers[0].device, dtype)
        factors = factors.to(layers[0].device, dtype)
        if torch.is_grad_enabled() and factors.requires_grad:
            return cast(Tensor, WeightedLayerSum.apply(-offset, factors, *layers))
        return weighted_layer_sum(-offset, factors, layers)

    def _layer_deviation(self, layers: Sequence[Tensor], mask: Tensor) -> Tensor | None:
        """
        With the pooling "layer_statistics" the layers' deviations over time, standardised and summed by the layers'
        weights, float32 [B, D]. The deviation of the summed states also depends on how the layers move together.

        Args:
            layers: states [B, Ta, D] each.
            mask: bool [B, Ta].
        """
        if self.config.pooling_type != "layer_statistics":
            return None
        with loaded(self.state_norm):
            scales = self.state_norm.scale.float()
        shares = scales.new_ones(1)
        if self.layer_weights is not None:
            shares = F.softmax(self.layer_weights.float(), dim=0).to(scales.device)
        weights = self.audio_pooling.weights(layers[0], mask).unsqueeze(-1)
        deviations = [  # layers may lie on several devices
            share
            * mean_and_deviation(layer, weights.to(layer.device), scale=scale.to(layer.device))[1].to(share.device)
            for share, scale, layer in zip(shares, scales, layers, strict=True)
        ]
        return torch.stack(deviations).sum(dim=0)

    def _audio_layers(self, output: BaseModelOutput) -> tuple[Tensor, ...]:
        """The states that enter the weighted sum, one or one per layer, each [B, Ta, D]."""
        last: Any = output.last_hidden_state
        if self.layer_weights is None:
            return (last,)
        hidden_states: Any = output.hidden_states
        return (*hidden_states[:-1], last)  # pre-norm encoders record their last layer before its norm

    @torch.no_grad()
    def fit_standardization(self, dataloader: Iterable[dict]) -> None:
        """
        Standardise, over training clips, each dimension of each layer of the audio encoder and, where
        `config.fusion_norm` is "standardization", of the pooled vectors that enter the fusion.

        Pretrained encoders have a few dimensions that are tens of times larger than the others; a LayerNorm after them
        makes the others tiny. Mean and scale are buffers (0 and 1 until fitted): the result of a clip does not depend
        on other clips, in training or after it. Call it once, before training.

        Args:
            dataloader: batches of this model's inputs, read once or twice; other keys are ignored. Rows without audio
                do not count for the audio, rows without text do not count for the text.
        Raises:
            ValueError: there is no batch.
        """
        was_training, untrained = self.training, self.config.untrained_modalities
        self.eval()
        self.config.untrained_modalities = []  # they may be trained now
        states = Moments()
        is_empty = True
        try:
            for batch in self._inputs(dataloader, "Standardising audio states"):
                is_empty = False
                if self.state_norm is None:
                    break
                states.add(self._frames_of(batch))
            if self.state_norm is not None:
                self.state_norm.fit(states)
            if self.config.fusion_norm == "standardization":
                self._fit_fusion_norms(dataloader)
        finally:
            self.train(was_training)
            self.config.untrained_modalities = untrained
        if is_empty:
            raise ValueError("`dataloader` gave no batch.")

    def _fit_fusion_norms(self, dataloader: Iterable[dict]) -> None:
        """Standardise the pooled vectors of each modality over the rows that have it."""
        moments = {name: Moments() for name in self.config.modalities}
        inputs = {"audio": {"input_values", "input_features", "audio_states"}, "text": {"input_ids", "text_states"}}
        masks = {"audio": "attention_mask", "text": "text_attention_mask"}
        for batch in self._inputs(dataloader, "Standardising pooled vectors"):
            output = self(**batch)
            for name, own in moments.items():
                if inputs[name] & batch.keys():
                    embeds, mask = output[f"{name}_embeds"], batch.get(masks[name])
                    own.add(embeds if mask is None else embeds[mask.bool().any(dim=1)])
        for name, own in moments.items():
            (self.fusion.norm if len(moments) == 1 else getattr(self.fusion, f"{name}_norm")).fit(own)

    @torch.no_grad()
    def recentre(self, dataloader: Iterable[dict]) -> int:
        """
        Adapt a trained model to the voices, microphones and rooms of other recordings, without labels: move the centre
        of its pooled audio to theirs, `mean <- (N * their mean + 5 * mean) / (N + 5)` over N clips (`FORMER_CLIPS`).

        Studies across corpora normalise each corpus by itself (Schuller et al. 2010, "Cross-corpus acoustic emotion
        recognition"); Li et al. (2018, "Adaptive batch normalization") so adapt a network. The five clips that the
        former mean counts for let even one new clip help. The scale stays: theirs gained nothing.

        Args:
            dataloader: batches of this model's inputs, read once; rows without audio do not count.
        Returns: N.
        Raises:
            ValueError: no row has audio, or `config.fusion_norm` is not "standardization".
        """
        if self.config.fusion_norm != "standardization" or self.audio_encoder is None:
            raise ValueError('only a model that hears, with `fusion_norm` "standardization", has a centre to move')
        moments, was_training = Moments(), self.training
        self.eval()
        try:
            for batch in self._inputs(dataloader, "Pooling audio"):
                if {"input_values", "input_features", "audio_states"} & batch.keys():
                    embeds, mask = self(**batch).audio_embeds, batch.get("attention_mask")
                    moments.add(embeds if mask is None else embeds[mask.bool().any(dim=1)])
        finally:
            self.train(was_training)
        if moments.count == 0:
            raise ValueError("no clip has audio, so nothing says where the centre should be.")
        norm = self.fusion.norm if len(self.config.modalities) == 1 else self.fusion.audio_norm
        share = moments.count / (moments.count + FORMER_CLIPS)
        norm.mean.lerp_((moments.total / moments.count).to(norm.mean), share)
        return moments.count

    def _inputs(self, dataloader: Iterable[dict], description: str) -> Iterator[dict[str, Tensor]]:
        names = inspect.signature(self.forward).parameters
        for batch in logging.tqdm(dataloader, desc=description, leave=False):
            yield {name: self._placed(value) for name, value in batch.items() if name in names}

    def _frames_of(self, batch: dict[str, Tensor]) -> Tensor:
        """All valid frames of a batch, [frames, layers, D]; there may be none."""
        if "audio_states" in batch:
            states = batch["audio_states"].to(self.dtype)
            return states[_as_mask(batch.get("attention_mask"), states, "attention_mask")]
        audio = self._audio_input(batch.get("input_values"), batch.get("input_features"))
        if audio is None:
            return self.state_norm.mean.new_zeros(0, *self.state_norm.mean.shape)
        layers, mask, _ = self._encode_audio(audio, batch.get("attention_mask"))
        return torch.stack([layer[mask] for layer in layers], dim=1)

    def _encode_text(
        self, input_ids: Tensor, attention_mask: Tensor | None, **flags
    ) -> tuple[Tensor, Tensor, BaseModelOutput]:
        """Return states [B, L, D], their bool mask [B, L] (rows without text all False), and the encoder's output."""
        encoder = self._encoder("text")
        _check_mask(attention_mask, input_ids.shape, "text_attention_mask")
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling() and not is_tracing(input_ids):
            check_token_ids(input_ids, self.config.text_config)  # elsewhere a look would wait for the device
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen(self.text_encoder)):
            output = encoder(
                input_ids=input_ids, attention_mask=attend_somewhere(mask).long(), return_dict=True, **flags
            )
        return output.last_hidden_state, mask, output

    def _nothing(self, other: Tensor, missing: MissingModality) -> tuple[Tensor, Tensor]:
        """One empty position per clip of `other`: stands for a modality that the whole batch lacks."""
        states = other.new_zeros(len(other), 1, len(missing.embedding))
        return states, torch.zeros(len(other), 1, dtype=torch.bool, device=other.device)


def _select_layers(
    hidden_states: tuple[Tensor, ...], wanted: Literal[True] | Iterable[int]
) -> tuple[Tensor | None, ...]:
    """All states for True; for indices, as Transformers has it, None in place of the layers not asked for."""
    if wanted is True:
        return hidden_states
    kept = {index % len(hidden_states) for index in wanted}
    return tuple(states if index in kept else None for index, states in enumerate(hidden_states))


def _is_known_to_be_full(mask: Tensor) -> bool:
    """
    Whether nothing is padded, where that is free to know: reading the mask waits for another device, and breaks a
    compiled graph. The stock first convolution then saves 2 % of a forward pass of wav2vec2-base on a CPU.
    """
    return mask.device.type == "cpu" and not is_tracing(mask) and bool(mask.all())


def _check_mask(attention_mask: Tensor | None, shape: Iterable[int], name: str) -> None:
    """Refuse a mask of another shape than its input. A graph that is being recorded has no fixed shapes to compare."""
    if attention_mask is None or torch.compiler.is_compiling() or is_tracing(attention_mask):
        return
    if tuple(attention_mask.shape) != tuple(shape):
        raise ValueError(
            f"`{name}` must have the shape {tuple(shape)} of its input, got {tuple(attention_mask.shape)}."
        )


def _as_mask(attention_mask: Tensor | None, states: Tensor, name: str) -> Tensor:
    """The bool mask [B, T] of states [B, T, ...]: all valid by default."""
    if attention_mask is None:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    if attention_mask.shape != states.shape[:2]:
        raise ValueError(
            f"`{name}` must be that of the states, {tuple(states.shape[:2])}, got {tuple(attention_mask.shape)}."
        )
    return attention_mask.bool()


def mix(fused: Tensor, mixture: tuple[float, Tensor] | None) -> Tensor:
    """The vectors [B, D] of clips, each with the rest of another one: manifold mixup (Verma et al. 2019)."""
    if mixture is None:
        return fused
    share, order = mixture
    return share * fused + (1 - share) * fused[order]


class Targets(NamedTuple):
    """What the loss of a batch is against."""

    labels: Any  # class ids [B]
    class_shares: Any = None  # shares of the classes [B, C]
    teacher_logits: Any = None  # [B, C]
    corpus_ids: Any = None  # [B]


class MMSERForAudioClassification(MMSERPreTrainedModel):
    """
    `MMSERModel` with the deep classifier, class anchors, uncertainty head, prototypes, OpenMax and calibration.

    Args:
        config (`MMSERConfig`): the architecture. `from_pretrained` and `from_backbones` bring weights along.
    """

    temperature: Tensor
    # In training: what widens the batch of the contrastive loss, see `mmser/contrastive.py`
    contrastive_pool: Callable[[ContrastiveRows], tuple[ContrastiveRows, ContrastiveRows | None]] | None = None
    _keep_in_fp32_modules_strict = (  # type: ignore[assignment]  # typed as a list
        *("openmax", "temperature", "log_temperature", "error_calibration", "prediction_sets"),
    )
    _keys_to_ignore_on_load_missing = (  # type: ignore[assignment]
        *(MMSERPreTrainedModel._keys_to_ignore_on_load_missing or ()),
        r"prediction_sets\.thresholds",  # checkpoints of 0.1.0
    )

    def __init__(self, config: MMSERConfig):
        """Start with random weights."""
        super().__init__(config)
        self.main_input_name = config.main_input_name
        self.input_modalities = tuple(config.modalities)
        self.mmser = MMSERModel(config)
        self.classifier = DeepClassifier(config)
        self.anchors = ClassAnchorClustering(config)
        self.uncertainty = UncertaintyHead(config)
        self.prototypes = PrototypeMemory(config)
        self.auxiliary = AuxiliaryHeads(config)
        centroids = config.openmax_centroids_per_class if config.openmax_distance == "centroid" else 0
        self.openmax = OpenMax(
            config.num_labels, config.openmax_alpha, config.openmax_level, centroids, config.fusion_hidden_size
        )
        # Divides the logits outside training (Guo et al. 2017); 1 until it is fitted on held-out clips
        self.register_buffer("temperature", torch.ones((), dtype=torch.float32))
        self.prediction_sets = PredictionSets()  # not part of the forward pass: the pipeline asks for them
        buffers = {name.rpartition(".")[2] for name, _ in self.named_buffers()}
        of_some = [name for name in ("target_moments", "weight_scale") if name in buffers]
        self._keep_in_fp32_modules_strict = (*type(self)._keep_in_fp32_modules_strict, *of_some)  # type: ignore[assignment]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.FloatTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        text_attention_mask: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_openmax: bool | None = None,
        input_features: torch.FloatTensor | None = None,
        teacher_logits: torch.FloatTensor | None = None,
        audio_states: torch.FloatTensor | None = None,
        text_states: torch.FloatTensor | None = None,
        output_hidden_states: bool | Iterable[int] | None = None,
        output_attentions: bool | None = None,
        return_uncertainty: bool = True,
        auxiliary_targets: dict[str, Tensor] | None = None,
        corpus_ids: torch.LongTensor | None = None,
        class_shares: torch.FloatTensor | None = None,
        **kwargs,
    ) -> MMSEROutput:
        r"""
        Args:
            input_values, attention_mask, input_ids, text_attention_mask, input_features, audio_states, text_states:
                see `MMSERModel.forward`.
            labels (`torch.LongTensor` of shape `(batch_size,)`): class ids, for the loss.
            use_openmax (`bool`, *optional*): `None` returns open-set probabilities if OpenMax is fitted and
                `config.use_openmax`; `True` insists on them; `False` leaves them out.
            teacher_logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`): for the distillation part.
            output_hidden_states, output_attentions (`bool`): return those of the audio encoder.
            return_uncertainty (`bool`): `False` leaves `uncertainty` out.
            auxiliary_targets (`dict[str, torch.Tensor]` of shape `(batch_size,)`): targets of `auxiliary_tasks`, for
                the loss: class ids or numbers; -100 and nan where a clip has none.
            corpus_ids (`torch.LongTensor` of shape `(batch_size,)`): for the contrastive part; -1: not known.
            class_shares (`torch.FloatTensor` of shape `(batch_size, num_labels)`): of votes, shares that sum to
                1: for cross-entropy and focal loss. The other parts take `labels`, by default the largest share.

        Returns: `MMSEROutput`.
        Raises:
            TypeError: an unknown keyword; the message suggests the nearest one.
            ValueError: as `MMSERModel.forward`; labels or shares out of range; `use_openmax=True` before it is fitted.
        """
        self._check_keywords(kwargs)
        outputs = self.mmser(
            input_values=input_values,
            attention_mask=attention_mask,
            input_ids=input_ids,
            text_attention_mask=text_attention_mask,
            input_features=input_features,
            audio_states=audio_states,
            text_states=text_states,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        has_targets = any(target is not None for target in (labels, class_shares, auxiliary_targets))
        mixture = self._draw_mixture(len(outputs.pooler_output)) if has_targets else None
        raw_logits, features = self.classifier(mix(outputs.pooler_output, mixture))
        device = raw_logits.device  # the parts of a large model may be on several
        raw_uncertainty = self.uncertainty(features).to(device)
        anchor_logits, anchor_distances = (values.to(device) for values in self.anchors(features))
        logits, uncertainty = self._calibrated(raw_logits, raw_uncertainty)
        auxiliary = self.auxiliary(features)
        losses: dict[str, Any] = {}  # without labels none: a scalar breaks the batches of stock pipelines
        if has_targets:
            targets = self._targets(raw_logits, labels, class_shares, teacher_logits, corpus_ids)
            scores = (raw_logits, features, raw_uncertainty, anchor_logits, anchor_distances)
            losses = self._losses(mixture, scores, targets, auxiliary, auxiliary_targets)
        open_set: dict[str, Any] = self._open_set(use_openmax, logits, outputs.pooler_output, anchor_distances)
        return MMSEROutput(
            **losses,
            logits=logits,
            uncertainty=uncertainty if return_uncertainty else None,
            features=features,
            fused=outputs.pooler_output,
            anchor_distances=anchor_distances,
            **open_set,
            auxiliary=auxiliary,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _open_set(
        self, is_wanted: bool | None, logits: Tensor, fused: Tensor, anchor_distances: Tensor
    ) -> dict[str, Any]:
        """What OpenMax says of each clip; see `MMSEROutput`. Nothing if it is not wanted, or not fitted."""
        if not (is_wanted or (is_wanted is None and self.config.use_openmax and self.openmax.is_fitted)):
            return {}
        with loaded(self.openmax):
            device = self.openmax.fitted.device
            logits, fused, anchor_distances = logits.to(device), fused.to(device), anchor_distances.to(device)
            log_probabilities = self.openmax.log_probabilities(logits, self.openmax.distances(fused, anchor_distances))
            probabilities = log_probabilities.exp()
            score = -log_probabilities[:, :-1].amax(dim=-1)  # as `OpenMax.rejection_scores`
            open_set = {
                "unknown_probability": probabilities[:, -1:],
                "open_set_probabilities": probabilities,
                "rejection_score": score[:, None],
            }
            threshold = self.config.rejection_probability
            if threshold is not None:
                use_fitted, predictions = self.config.uses_fitted_thresholds, logits.argmax(dim=-1)
                open_set["is_unknown"] = self.openmax.reject(score, probabilities, predictions, threshold, use_fitted)
        return open_set

    def _checked(self, labels: Any, batch_size: int) -> Any:
        num_labels = self.config.num_labels
        is_tensor = isinstance(labels, Tensor)
        if not is_tensor or labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != (batch_size,):
            got = f"{labels.dtype} of shape {tuple(labels.shape)}" if is_tensor else type(labels).__name__
            raise ValueError(
                f"`labels` must be a tensor of whole numbers of shape ({batch_size},), class ids, got {got}."
            )
        # Reading labels on another device would wait for the device, and would break a compiled graph. There the loss
        # itself fails on a bad label
        looks = labels.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and ((labels < 0) | (labels >= num_labels)).any():
            raise ValueError(f"`labels` must be in [0, {num_labels - 1}], got {labels.tolist()}.")
        return labels.long()  # int32 is common in tables, and no loss of PyTorch takes it

    def _calibrated(self, logits: Tensor, uncertainty: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and uncertainty as they are in training; outside it, calibrated on held-out clips."""
        if self.training:
            return logits, uncertainty
        logits = (logits / self.temperature.to(logits.device)).to(logits.dtype)
        return logits, self.uncertainty.calibrated(uncertainty, logits)

    def _targets(self, logits: Tensor, labels: Any, shares: Any, *others: Tensor | None) -> Targets:
        """What the loss is against, checked and on the device of `logits`."""
        if labels is None and shares is None:
            raise ValueError("`auxiliary_targets` are for the loss: give `labels` too.")
        if shares is not None:
            shares = self._checked_distribution(shares, len(logits)).to(logits.device)
            labels = shares.argmax(dim=-1) if labels is None else labels
        labels = self._checked(labels, len(logits)).to(logits.device)
        return Targets(labels, shares, *others)

    def _checked_distribution(self, shares: Any, batch_size: int) -> Any:
        shape = (batch_size, self.config.num_labels)
        if not isinstance(shares, Tensor) or not shares.is_floating_point() or shares.shape != shape:
            got = f"{shares.dtype} of shape {tuple(shares.shape)}" if isinstance(shares, Tensor) else type(shares)
            raise ValueError(f"`class_shares` must be a float tensor of shape {shape}, got {got}.")
        if shares.device.type == "cpu" and not torch.compiler.is_compiling():  # as in `_checked`
            sums = shares.float().sum(dim=-1)
            if not ((shares >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-2)):
                raise ValueError(f"Each row of `class_shares` must be shares that sum to 1, got {shares.tolist()}.")
        return shares

    def _draw_mixture(self, batch_size: int) -> tuple[float, Tensor] | None:
        """The share of each clip of a training batch in its mixture, at least a half, and which clip has the rest."""
        alpha = float(self.config.mixup_alpha)
        if not self.training or not alpha:
            return None
        share = torch.distributions.Beta(alpha, alpha).sample().item()
        return max(share, 1 - share), torch.randperm(batch_size)

    def _losses(
        self, mixture: Any, scores: Any, targets: Targets, auxiliary: Any, auxiliary_targets: dict | None
    ) -> dict[str, Any]:
        """`loss`, `anchor_loss` and `losses` of `MMSEROutput`."""
        parts, anchor_loss = self._mixed_losses(mixture, scores, targets)
        weight = self.config.auxiliary_loss_weight
        if auxiliary_targets is not None and weight:
            others = self.auxiliary.losses(auxiliary or {}, auxiliary_targets, mixture)
            parts |= {name: weight * part.to(targets.labels.device) for name, part in others.items()}
        losses = {name: part.detach() for name, part in parts.items()}
        return {"loss": sum(parts.values()), "anchor_loss": anchor_loss, "losses": losses}

    def _mixed_losses(
        self,
        mixture: tuple[float, Tensor] | None,
        scores: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        targets: Targets,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """As `_weighted_losses`; of a mixture, against the labels of the one and of the other, in their shares."""
        parts, anchor_loss = self._weighted_losses(scores, targets)
        if mixture is None:
            return parts, anchor_loss
        share, order = mixture
        mixed = Targets(*(None if values is None else values[order] for values in targets))
        others, other_anchor_loss = self._weighted_losses(scores, mixed)
        parts = {name: share * part + (1 - share) * others[name] for name, part in parts.items()}
        return parts, share * anchor_loss + (1 - share) * other_anchor_loss

    def _weighted_losses(
        self, scores: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], targets: Targets
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The parts of the loss times their weights; a part with weight 0 is not computed. And the anchor loss."""
        labels, class_shares, teacher_logits, corpus_ids = targets
        config = self.config
        logits, features, uncertainty, anchor_logits, anchor_distances = scores
        if config.distillation_loss_weight and teacher_logits is None:
            raise ValueError("`distillation_loss_weight` is set: pass `teacher_logits`.")
        anchor_loss = logits.new_zeros((), dtype=torch.float32)
        if config.anchor_loss_weight:
            anchor_loss = clustering_loss(anchor_logits, anchor_distances, labels)
        class_weights = None
        if config.class_counts is not None:
            class_weights = logits.new_tensor(class_balanced_weights(config.class_counts, config.class_balanced_beta))
        adjusted = adjusted_logits(logits, config.class_counts, config.logit_adjustment)
        target = labels if class_shares is None else class_shares.float()
        parts = {
            "cross_entropy": lambda: F.cross_entropy(adjusted, target, label_smoothing=config.label_smoothing),
            "focal": lambda: class_balanced_focal_loss(
                adjusted, labels, class_weights, config.focal_gamma, class_shares
            ),
            "anchor": lambda: anchor_loss,
            "uncertainty": lambda: uncertainty_loss(uncertainty, logits, labels, config.uncertainty_error_weight),
            "prototype": lambda: prototype_loss(self.prototypes(features).to(labels.device), labels),
            "supervised_contrastive": lambda: self._contrastive_loss(features, labels, corpus_ids),
            "distillation": lambda: distillation_loss(
                logits, cast(Tensor, teacher_logits), config.distillation_temperature
            ),
        }
        weights = {name: getattr(config, f"{name}_loss_weight") for name in parts}
        return {name: weights[name] * part() for name, part in parts.items() if weights[name]}, anchor_loss

    def _contrastive_loss(self, features: Tensor, labels: Tensor, corpus_ids: Tensor | None) -> Tensor:
        """The supervised contrastive loss; in training over all that `contrastive_pool` adds to the batch."""
        weight = self.config.contrastive_other_corpus_weight
        if self.training and weight != 1 and corpus_ids is None:
            raise ValueError("`contrastive_other_corpus_weight` is below 1: pass `corpus_ids`.")
        rows, others = ContrastiveRows(features.to(labels.device), labels, corpus_ids), None
        if self.training and self.contrastive_pool is not None:
            rows, others = self.contrastive_pool(rows)
        return supervised_contrastive_loss(
            rows.features, rows.labels, corpora=rows.corpora, other_corpus_weight=weight, others=others
        )

    @torch.no_grad()
    def adapt_to(self, batches: Sequence[dict]) -> int:
        """
        Adapt to the place of recordings, without labels: [`MMSERModel.recentre`]. What is heard there counts as known:
        the thresholds of OpenMax, where they are fitted, rise until they accept the share `config.openmax_acceptance`
        of these clips. They were made for another place, and would reject most of them.

        Args:
            batches: of this model's inputs.
        Returns: how many clips have audio.
        Raises:
            ValueError: as `recentre`.
        """
        number, was_training = self.mmser.recentre(batches), self.training
        if self.openmax.has_thresholds:
            self.eval()
            scores = [self(**own).rejection_score for own in self.mmser._inputs(batches, "Raising thresholds")]
            self.train(was_training)
            share = 0.95 if self.config.openmax_acceptance is None else self.config.openmax_acceptance
            level = torch.cat(scores).float().quantile(share, interpolation="higher").item()
            self.openmax.rejection_thresholds.clamp_(min=level)
        return number

    @torch.no_grad()
    def fit_openmax(self, dataloader: Iterable[dict], tail_size: int | None = None) -> None:
        """
        Fit OpenMax, centroids and Weibulls, in one pass over the training clips. `MMSERTrainer.finalize` also uses
        held-out clips, which lie farther from the classes than training clips do.

        Args:
            dataloader: batches of this model's inputs with `labels`.
            tail_size: see `OpenMax.fit`; default `config.openmax_tail_size`.
        Raises:
            ValueError: there is no batch, or too few clips are classified correctly.
        """
        names = ("logits", "fused", "anchor_distances")
        outputs: dict[str, list[Tensor]] = {name: [] for name in (*names, "labels")}
        was_training = self.training
        self.eval()
        self.note_untrained_modalities()
        try:
            for batch in logging.tqdm(dataloader, desc="Fitting OpenMax", leave=False):
                batch = {name: self._placed(value) for name, value in batch.items() if name != "auxiliary_targets"}
                outputs["labels"].append(batch.pop("labels"))
                batch.pop("class_shares", None)
                output = self(**batch, use_openmax=False)
                for name in names:
                    outputs[name].append(output[name].float())
        finally:
            self.train(was_training)
        if not outputs["labels"]:
            raise ValueError("`dataloader` gave no batch.")
        logits, fused, anchor_distances, labels = (torch.cat(values) for values in outputs.values())
        if self.openmax.has_centroids:
            self.openmax.fit_centroids(fused, labels)
        distances = self.openmax.distances(fused, anchor_distances)
        label_names = [self.config.id2label[label] for label in range(self.config.num_labels)]
        tail_size = tail_size or self.config.openmax_tail_size
        self.openmax.fit(distances, labels, logits.argmax(dim=-1), tail_size, label_names)


def register_auto_classes() -> None:
    """
    Make Transformers know MMSER in this process: its `Auto*` classes and `pipeline` then need no `trust_remote_code`,
    and run this code instead of the one beside the weights.
    """
    from transformers import AutoModelForAudioClassification

    try:
        # Only here: a checkpoint's model, copied with this file, loads without the libraries that read audio
        from processing_mmser import register_processor
    except ImportError as error:
        raise ImportError(
            f"MMSER is not whole: {error}. Install it with `pip install`, or work in a clone."
        ) from error
    register_processor()
    AutoConfig.register("mmser", MMSERConfig, exist_ok=True)
    AutoModel.register(MMSERConfig, MMSERModel, exist_ok=True)
    AutoModelForAudioClassification.register(MMSERConfig, MMSERForAudioClassification, exist_ok=True)


MMSERModel.register_for_auto_class("AutoModel")
MMSERForAudioClassification.register_for_auto_class("AutoModelForAudioClassification")
__all__ = [
    "MMSERForAudioClassification",
    "MMSERModel",
    "MMSERModelOutput",
    "MMSEROutput",
    "MMSERPreTrainedModel",
    "MaskedPositionalConvEmbedding",
    "MaskedWhisperEncoder",
    "OpenMax",
    "check_finite_losses",
    "register_auto_classes",
    "time_mask",
]
