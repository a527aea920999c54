# SPDX-License-Identifier: Apache-2.0
"""The encoders: Transformers' own, made independent of padding; their states; loading and cutting them.

Read in this order: the layers that keep padding out of the results, masks, SpecAugment, the states (standardised,
summed over the layers), then building and loading.
Shape letters: B clips, T audio samples or mel frames, Ta audio states, L layers, D the width of an encoder.
"""

import contextlib
import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, WhisperModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


@contextlib.contextmanager
def _load(module: nn.Module, hook: Any) -> Iterator[None]:
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def loaded(module: nn.Module) -> contextlib.AbstractContextManager:
    """
    A region in which the tensors of a part can be read outside its own `forward`. Where Accelerate offloads them, they
    are on the meta device otherwise.
    """
    hook = getattr(module, "_hf_hook", None)
    return contextlib.nullcontext() if hook is None else _load(module, hook)


class MaskedGroupNormConvLayer(GradientCheckpointingLayer):
    """
    First convolution of a GroupNorm feature encoder (wav2vec2-base), normalised over the valid frames of each clip.

    The stock layer normalises each channel over time, padding included, so that a clip's result depends on its batch.
    The sample mask arrives as a second row under the waveform, [B, 1, 2, T]: with no state kept between calls the
    layer is safe to checkpoint, compile and export. Without a mask ([B, 1, T]) it is the stock layer. Parameter names
    are kept.
    """

    conv: nn.Conv1d
    activation: nn.Module
    layer_norm: nn.GroupNorm

    def __init__(self, layer: Any):
        super().__init__()
        self.conv = layer.conv
        self.activation = layer.activation
        self.layer_norm = layer.layer_norm

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dim() == 3:
            return self.activation(self.layer_norm(self.conv(hidden_states)))
        waveform, mask = hidden_states[:, :, 0], hidden_states[:, 0, 1]
        mask = valid_frames(mask > 0.5, self.conv.kernel_size[0], self.conv.stride[0])[:, None]
        # In place, as this is the largest tensor of all; the convolution's backward pass does not need it
        hidden_states = self.conv(waveform).mul_(mask)  # (B, channels, frames), 0 where padded
        # Sums over all frames are sums over the valid ones; `torch.var_mean` takes ten times as long on a CPU
        count = mask.float().sum(dim=-1, keepdim=True).clamp(min=1)
        mean = hidden_states.sum(dim=-1, keepdim=True, dtype=torch.float32) / count
        norm = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=torch.float32)
        second_moment = norm**2 / count
        scale = torch.rsqrt((second_moment - mean**2).clamp(min=0) + self.layer_norm.eps)
        with loaded(self.layer_norm):
            scale = scale * self.layer_norm.weight[:, None]
            shift = self.layer_norm.bias[:, None] - mean * scale
        return self.activation(torch.addcmul(shift.to(hidden_states), hidden_states, scale.to(hidden_states)))


class MaskedPositionalConvEmbedding(nn.Module):
    """
    Stacked positional convolutions (data2vec-audio) with the padding set to zero between them.

    A clip on its own sees zeros beyond its end at every convolution; the stock stack lets them fill up in a padded
    batch. The encoder zeroes padded states before this module, so they are recognised by being exactly 0.
    """

    layers: nn.ModuleList

    def __init__(self, pos_conv_embed: Any):
        super().__init__()
        self.layers = pos_conv_embed.layers

    def forward(self, hidden_states: Tensor) -> Tensor:
        mask = (hidden_states != 0).any(dim=-1)[:, None]  # (B, 1, Ta)
        hidden_states = hidden_states.transpose(1, 2)
        for layer in self.layers:
            hidden_states = layer(hidden_states) * mask
        return hidden_states.transpose(1, 2)


class MaskedWhisperEncoder(WhisperEncoder):
    """
    Whisper's encoder on clips of any length up to its maximum: sinusoidal positions are sliced to the clip, so 3 s
    cost 3 s and not 30, and padded frames are masked. Parameter names are those of `WhisperEncoder`.
    """

    @classmethod
    def is_custom_code(cls) -> bool:
        """See `MMSERPreTrainedModel.is_custom_code`: here it would leave the positions without their sinusoids."""
        return False

    def train(self, mode: bool = True):
        """The positions never learn: loading weights replaces them by a parameter that would."""
        self.embed_positions.requires_grad_(False)
        return super().train(mode)

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, input_features: Tensor, attention_mask: Tensor | None = None, **kwargs) -> BaseModelOutput:
        """Encode log-mel frames [B, mels, T] with mask [B, T] (1 = valid) to states [B, ceil(T / 2), D]."""
        if input_features.shape[1] != self.num_mel_bins:
            raise ValueError(
                f"`input_features` has {input_features.shape[1]} mel bands; this encoder takes {self.num_mel_bins} "
                "(`feature_size` of the feature extractor)."
            )
        max_frames = self.max_source_positions * self.conv2.stride[0]
        if input_features.shape[-1] > max_frames:
            raise ValueError(
                f"`input_features` has {input_features.shape[-1]} frames; this encoder takes at most {max_frames}. "
                "Cut the clip into windows first."
            )
        if attention_mask is None:
            attention_mask = input_features.new_ones(input_features[:, 0].shape, dtype=torch.long)
        mask = attention_mask[:, None].to(input_features)
        # The convolutions pad with zeros at the end of a clip, so the padding of a batch must be zero at each of them
        hidden_states = F.gelu(self.conv1(input_features * mask)) * mask
        hidden_states = F.gelu(self.conv2(hidden_states)).transpose(1, 2).contiguous()  # (B, Ta, D)
        with loaded(self.embed_positions):
            hidden_states = hidden_states + self.embed_positions.weight[: hidden_states.shape[1]]
        hidden_states = F.dropout(hidden_states, p=self.dropout, training=self.training)
        layer_mask = create_bidirectional_mask(self.config, hidden_states, valid_frames(attention_mask, 1, 2))
        for layer in self.layers:
            hidden_states = layer(hidden_states, layer_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layer_norm(hidden_states))


def valid_frames(mask: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Mask of an unpadded convolution's output, [B, T] -> [B, frames]: valid where the last sample seen is valid."""
    # Not by a slice with steps: for one, export cannot tell that its length is that of the convolution's output
    num_frames = (mask.shape[1] - kernel_size) // stride + 1
    last_seen = torch.arange(num_frames, device=mask.device) * stride + kernel_size - 1
    return mask[:, last_seen]


def time_mask(mask: Tensor, probability: float, length: int, min_masks: int) -> Tensor:
    """
    Spans of a time mask (SpecAugment, Park et al. 2019), drawn on the device and only inside each clip.

    Args:
        mask: valid frames, bool [B, Ta].
        probability: expected share of frames in a span, before overlaps.
        length: frames per span. A clip shorter than one span is left alone.
        min_masks: least number of spans per clip.
    Returns: bool [B, Ta], True where masked.
    """
    num_frames = mask.sum(dim=1, keepdim=True)
    max_spans = max(min_masks, int(probability * mask.shape[1] / length) + 1)
    num_spans = probability * num_frames / length + torch.rand_like(num_frames, dtype=torch.float)
    num_spans = num_spans.floor().clamp(min=min_masks) * (num_frames >= length)
    start = torch.rand(len(mask), max_spans, device=mask.device) * (num_frames - length + 1)
    frame = torch.arange(mask.shape[1], device=mask.device)
    start = start.floor()[:, :, None]
    inside = (frame >= start) & (frame < start + length)
    chosen = torch.arange(max_spans, device=mask.device) < num_spans
    return (inside & chosen[:, :, None]).any(dim=1)


def waveform_frames(mask: Tensor, config: PreTrainedConfig) -> Tensor:
    """
    Follow the sample mask, bool [B, T], through the convolutions of a waveform encoder to its states, bool [B, Ta].

    Raises:
        ValueError: the audio is too short for one state.
    """
    for kernel_size, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        if mask.shape[1] < kernel_size:
            raise ValueError("The audio is too short for one frame of the encoder (400 samples, 25 ms at 16 kHz).")
        mask = valid_frames(mask, kernel_size, stride)
    return mask


def state_mask(frame_mask: Tensor, config: PreTrainedConfig) -> Tensor | None:
    """
    Time mask of SpecAugment for a waveform encoder in training, bool [B, Ta]; None if the encoder has none. The stock
    mask is drawn on the host, and fails on clips shorter than one span.
    """
    if not (getattr(config, "apply_spec_augment", True) and config.mask_time_prob > 0):
        return None
    return time_mask(frame_mask, config.mask_time_prob, config.mask_time_length, config.mask_time_min_masks)


def mask_log_mel(input_features: Tensor, mask: Tensor, config: PreTrainedConfig) -> Tensor:
    """
    SpecAugment for log-mel frames [B, mels, T] with mask [B, T], in training: spans of frames and of mel bands become
    the clip's mean. In the paper they become 0, the mean of its spectrograms (Park et al. 2019, section 2); the mean
    of Whisper's is not 0.
    """
    if not config.apply_spec_augment:
        return input_features
    masked = torch.zeros_like(mask)[:, None]
    if config.mask_time_prob > 0:
        spans = time_mask(mask, config.mask_time_prob, config.mask_time_length, config.mask_time_min_masks)
        masked = masked | spans[:, None]
    if config.mask_feature_prob > 0:
        bands = torch.ones_like(input_features[..., 0], dtype=torch.bool)
        bands = time_mask(bands, config.mask_feature_prob, config.mask_feature_length, config.mask_feature_min_masks)
        masked = masked | bands[..., None]
    mean = (input_features * mask[:, None]).mean(dim=(1, 2)) / mask.float().mean(dim=1).clamp(min=1e-6)
    return torch.where(masked, mean[:, None, None].to(input_features), input_features)


class Standardization(nn.Module):
    """
    `(x - mean) * scale`, with the mean and deviation of each dimension over training clips as buffers.

    A LayerNorm divides all dimensions by one number, which the largest of them decide: the small ones drown. Here each
    dimension has its own mean and deviation. Unlike a BatchNorm, this never mixes the clips of a batch.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., *shape] -> the same."""
        return ((hidden_states.float() - self.mean) * self.scale).to(hidden_states.dtype)

    def fit(self, moments: "Moments") -> None:
        """Take over the gathered mean and deviation; vectors that are all alike change nothing."""
        if moments.count == 0:
            return
        mean = moments.total / moments.count
        deviation = (moments.square / moments.count - mean**2).clamp(min=0).sqrt()
        if deviation.mean() <= 1e-4 * mean.abs().mean():  # one clip, or one sentence over and over
            return
        self.mean.copy_(mean)
        # A dimension that hardly moves carries nothing: keep it small, or its noise grows to the size of the others
        self.scale.copy_(1 / deviation.clamp(min=1e-2 * deviation.mean().item() + 1e-12))


def weighted_layer_sum(offset: Tensor, factors: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """
    `offset + sum_l factors[l] * layers[l]`, with an offset [D], factors [L, D] and L layers [..., D]. The layers take
    the type of the offset one by one, so that there is never a converted copy of all of them, and its device.
    """
    states = torch.addcmul(offset, factors[0], layers[0].to(offset))
    for factor, layer in zip(factors[1:], layers[1:], strict=True):
        states.addcmul_(factor, layer.to(offset))
    return states


class WeightedLayerSum(torch.autograd.Function):
    """
    `weighted_layer_sum` with a derivative of its own. That of addcmul multiplies each gradient by its constant 1 too,
    one more pass over memory for each layer: a training step on cached states would take a fifth longer.
    """

    @staticmethod
    def forward(ctx: Any, offset: Tensor, factors: Tensor, *layers: Tensor) -> Tensor:
        ctx.save_for_backward(factors, *layers)
        return weighted_layer_sum(offset, factors, layers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (factors, *layers) = grads, ctx.saved_tensors
        rows = grad.flatten(0, -2)
        return (
            rows.sum(dim=0),
            torch.stack([(rows * layer.flatten(0, -2).to(grad.dtype)).sum(dim=0) for layer in layers]),
            *(
                grad * factor if is_needed else None
                for factor, is_needed in zip(factors, ctx.needs_input_grad[2:], strict=True)
            ),
        )


class Moments:
    """Count, sum and sum of squares, in float64, of vectors that come in parts."""

    def __init__(self):
        self.count = 0
        self.total: Any = 0.0
        self.square: Any = 0.0

    def add(self, vectors: Tensor) -> None:
        """Add vectors [N, ...]."""
        vectors = vectors.double()
        self.count += len(vectors)
        self.total = self.total + vectors.sum(dim=0)
        self.square = self.square + (vectors**2).sum(dim=0)


def parameters_of(module: nn.Module) -> Iterator[Tensor]:
    """The parameters of a module, also of a replica of `nn.DataParallel`, which holds them as plain tensors."""
    if not getattr(module, "_is_replica", False):
        return module.parameters()
    parts: Any = module.modules()
    return (parameter for part in parts for parameter in part._former_parameters.values())


def is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in parameters_of(module))


def build_audio_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the audio encoder of `config`, randomly started, its padding-dependent layers replaced by masked ones."""
    if config.model_type == "whisper":
        return MaskedWhisperEncoder._from_config(config)
    encoder = AutoModel.from_config(config)
    first_layer = encoder.feature_extractor.conv_layers[0]
    if isinstance(getattr(first_layer, "layer_norm", None), nn.GroupNorm):
        encoder.feature_extractor.conv_layers[0] = MaskedGroupNormConvLayer(first_layer)
    if config.model_type == "data2vec-audio":
        encoder.encoder.pos_conv_embed = MaskedPositionalConvEmbedding(encoder.encoder.pos_conv_embed)
    return encoder


def build_text_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the text encoder of `config`, randomly started and without the pooler, which nothing here would use."""
    return AutoModel.from_config(config, **without_pooler(config))


def without_pooler(config: PreTrainedConfig) -> dict[str, bool]:
    model_class: Any = AutoModel._model_mapping[type(config)]
    takes_argument = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if takes_argument else {}


def build_encoder(kind: str, config: PreTrainedConfig) -> PreTrainedModel:
    """`build_audio_encoder` or `build_text_encoder`, for `kind` "audio" or "text"."""
    return build_audio_encoder(config) if kind == "audio" else build_text_encoder(config)


def load_encoder(encoder: PreTrainedModel, name_or_path: str, **kwargs) -> None:
    """Copy the pretrained weights of `name_or_path` into `encoder`; refuse a checkpoint that lacks some of them."""
    is_whisper = encoder.config.model_type == "whisper"
    source_class: Any = WhisperModel if is_whisper else AutoModel
    kwargs |= {} if is_whisper else without_pooler(encoder.config)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no report of unused heads; missing weights are checked below
    try:
        source, report = source_class.from_pretrained(
            name_or_path, dtype=torch.float32, output_loading_info=True, **kwargs
        )
    finally:
        logging.set_verbosity(verbosity)
    prefix = "encoder." if is_whisper else ""
    missing = {key.removeprefix(prefix) for key in report["missing_keys"] if key.startswith(prefix)}
    missing -= {"masked_spec_embed"}  # drawn at random where the checkpoint was trained without SpecAugment
    if missing & set(encoder.state_dict()):
        raise ValueError(f"{name_or_path!r} lacks weights of {type(encoder).__name__}: {sorted(missing)[:5]}...")
    wanted = encoder.state_dict()  # an encoder with fewer layers leaves the others where they are
    state_dict = (source.encoder if is_whisper else source).state_dict()
    encoder.load_state_dict({key: value for key, value in state_dict.items() if key in wanted})


@dataclass(frozen=True)
class LayerNames:
    """Where an encoder has its layers, and what a layer calls its matrices."""

    layers: str
    attention: tuple[str, ...]  # query, key, value, output; empty where heads cannot be removed
    feed_forward: tuple[str, str]
    width: str  # the field of the configuration with the columns between the two matrices of the feed-forward part


_WAV2VEC2 = LayerNames(
    "encoder.layers",
    tuple(f"attention.{name}_proj" for name in ("q", "k", "v", "out")),
    ("feed_forward.intermediate_dense", "feed_forward.output_dense"),
    "intermediate_size",
)
_BERT = LayerNames(
    "encoder.layer",
    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    ("intermediate.dense", "output.dense"),
    "intermediate_size",
)
_WHISPER = LayerNames(
    "layers", tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), ("fc1", "fc2"), "encoder_ffn_dim"
)
# The encoders that can be pruned, by model type. WavLM's heads share one table of positions with all layers
LAYER_NAMES = {
    **dict.fromkeys(("wav2vec2", "hubert", "data2vec-audio"), _WAV2VEC2),
    "wavlm": replace(_WAV2VEC2, attention=()),
    "whisper": _WHISPER,
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _BERT),
}


def layer_names(config: PreTrainedConfig) -> LayerNames:
    """The names of an encoder's parts; `ValueError` for an encoder that cannot be pruned."""
    if config.model_type not in LAYER_NAMES:
        raise ValueError(f"A {config.model_type} encoder cannot be pruned; these can: {', '.join(LAYER_NAMES)}.")
    return LAYER_NAMES[config.model_type]


def keep_heads(encoder: Any, num_heads: int | None) -> None:
    """
    Give each attention layer of a new encoder `num_heads` heads, as wide as before; None leaves it as it is. The
    configurations of Transformers have no word for it: there the heads always share out the whole width.

    Raises:
        ValueError: more heads than there are, or an encoder whose heads cannot be removed.
    """
    if num_heads is None:
        return
    config = encoder.config
    names = layer_names(config)
    if not names.attention or num_heads > config.num_attention_heads:
        most = config.num_attention_heads if names.attention else "none but all of its"
        raise ValueError(f"A {config.model_type} encoder with {num_heads} attention heads: at most {most} can stay.")
    size = num_heads * (config.hidden_size // config.num_attention_heads)
    for layer in encoder.get_submodule(names.layers):
        for number, name in enumerate(names.attention):
            old = layer.get_submodule(name)
            sizes = (size, old.out_features) if number == 3 else (old.in_features, size)
            new = nn.Linear(*sizes, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
            layer.set_submodule(name, new)
            encoder._init_weights(new)
        set_num_heads(layer.get_submodule(names.attention[0].rpartition(".")[0]), num_heads)


def set_num_heads(attention: Any, num_heads: int) -> None:
    """Tell an attention layer how many heads it has, where it keeps that."""
    for name in ("num_heads", "num_attention_heads"):
        if hasattr(attention, name):
            setattr(attention, name, num_heads)
    if hasattr(attention, "all_head_size"):
        attention.all_head_size = num_heads * attention.attention_head_size


def freeze_convolutions(encoder: Any) -> None:
    """Freeze the convolutions in front of an audio encoder's attention layers."""
    if hasattr(encoder, "feature_extractor"):
        encoder.feature_extractor._freeze_parameters()
    else:
        encoder.conv1.requires_grad_(False)
        encoder.conv2.requires_grad_(False)


def freeze_first_layers(encoder: Any, num_layers: int) -> None:
    """
    Freeze the first attention layers of an audio encoder, and all that comes before them. Their dropout stays on.

    Raises:
        ValueError: if not one layer or more would be left to learn.
    """
    stack = getattr(encoder, "encoder", encoder)
    if not 1 <= num_layers < len(stack.layers):
        raise ValueError(
            f"{num_layers} of the {len(stack.layers)} layers of the audio encoder cannot be frozen: freeze at least "
            "one and not all, or all of it with `freeze_audio_encoder`."
        )
    freeze_convolutions(encoder)
    frozen = list(stack.layers[:num_layers])
    if stack is not encoder:
        frozen += [encoder.feature_projection, stack.pos_conv_embed]
        if not getattr(encoder.config, "do_stable_layer_norm", False):  # else this norm is the last of all
            frozen.append(stack.layer_norm)
        if hasattr(encoder, "masked_spec_embed"):  # a gradient for it would go back through all layers
            encoder.masked_spec_embed.requires_grad_(False)
    else:
        frozen.append(encoder.embed_positions)
    for module in frozen:
        module.requires_grad_(False)


def keep_layers(config: PreTrainedConfig, kind: str, num_layers: int) -> PreTrainedConfig:
    """A copy of the configuration of an encoder ("audio" or "text") that has the first `num_layers` of its layers."""
    available = config.num_hidden_layers
    if not 1 <= num_layers <= available:
        raise ValueError(f"`{kind}_num_hidden_layers` must be from 1 to {available}, got {num_layers}.")
    config = copy.deepcopy(config)
    config.num_hidden_layers = num_layers
    return config
