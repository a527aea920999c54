# SPDX-License-Identifier: Apache-2.0
"""What joins the two modalities: attention between them, what stands for a missing one, and the fusion.

`config.fusion_type` "gated" is two `CrossModalAttention` and a `FusionLayer`; "transformer" is a `JointEncoder` and an
`AttentionFusion`.

Shape letters as in `modeling_mmser.py`: B clips, T positions, D the width of the states.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

try:
    from .configuration_mmser import MMSERConfig
    from .encoders_mmser import Standardization
except ImportError:
    if __package__:  # beside a checkpoint a failed import is a real error, not a reason to take an installed copy
        raise
    from configuration_mmser import MMSERConfig
    from encoders_mmser import Standardization

# What `create_bidirectional_mask` reads of a configuration, for each implementation of the cross-modal attention
_ATTENTION_MASKS: Any = {name: SimpleNamespace(_attn_implementation=name) for name in ("eager", "sdpa")}


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Plain attention with the weights returned; the other implementations come from Transformers."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ZeroLinear(nn.Linear):
    """A Linear that `_init_weights` starts at zero, so that a branch which ends in it adds nothing at first."""


def branch_output(config: MMSERConfig, input_size: int, output_size: int) -> nn.Linear:
    """The last linear layer of a branch: it starts at zero, or at random, as published."""
    return (ZeroLinear if config.zero_init_branches else nn.Linear)(input_size, output_size)


class MultiHeadAttention(nn.Module):
    """
    Attention in the width `config.cross_attention_hidden_size`, with its heads and dropout.

    It runs "eager" where the model does and "sdpa" elsewhere, whatever the encoders run: FlashAttention unpads queries
    and keys by one mask, but here they may be of two modalities.

    Args:
        config: gives the shared width, heads and dropout.
        query_size: width of the attending states.
        context_size: width of the states attended to.
        output: projects the shared width to that of the result.
    """

    def __init__(self, config: MMSERConfig, query_size: int, context_size: int, output: nn.Linear):
        super().__init__()
        self.config = config
        self.is_causal = False
        shared_size = config.cross_attention_hidden_size
        self.head_size = shared_size // config.cross_attention_heads
        self.query = nn.Linear(query_size, shared_size)
        self.key = nn.Linear(context_size, shared_size, bias=False)  # a key bias cancels out in the softmax
        self.value = nn.Linear(context_size, shared_size)
        self.output = output
        self.dropout = nn.Dropout(config.cross_attention_dropout)

    def attend(self, hidden_states: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
        """From `hidden_states` [B, Tq, query_size] to `context` [B, Tk, context_size], mask bool [B, Tk]."""
        query, key, value = (
            projection(states).unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # (B, heads, T, head_size)
            for projection, states in ((self.query, hidden_states), (self.key, context), (self.value, context))
        )
        implementation = "eager" if self.config._attn_implementation == "eager" else "sdpa"
        attention_mask = create_bidirectional_mask(
            _ATTENTION_MASKS[implementation], hidden_states, context_mask, encoder_hidden_states=context
        )
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attended, _ = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.head_size**-0.5,
            dropout=self.dropout.p if self.training else 0.0,
        )
        return self.dropout(self.output(attended.flatten(2)))


class CrossModalAttention(MultiHeadAttention):
    """
    One modality attends to the other: multi-head attention in a shared width, then residual and LayerNorm
    (if `config.cross_attention_layer_norm`).

    Its output projection starts at zero (`branch_output`): at first each modality passes unchanged, and training lets
    the other one in as far as it helps.

    Args:
        config: gives the shared width, heads and dropout.
        query_size: width of the attending states, which is also the width of the result.
        context_size: width of the states attended to.
    """

    def __init__(self, config: MMSERConfig, query_size: int, context_size: int):
        output = branch_output(config, config.cross_attention_hidden_size, query_size)
        super().__init__(config, query_size, context_size, output)
        self.layer_norm = nn.LayerNorm(query_size) if config.cross_attention_layer_norm else nn.Identity()

    def forward(self, hidden_states: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
        """Attend from `hidden_states` [B, Tq, query_size] to `context` [B, Tk, context_size], mask bool [B, Tk]."""
        return self.layer_norm(hidden_states + self.attend(hidden_states, context, context_mask))


class JointEncoderLayer(GradientCheckpointingLayer, MultiHeadAttention):
    """A layer of a Transformer encoder, with the norms before the branches (Xiong et al. 2020)."""

    def __init__(self, config: MMSERConfig):
        size = config.cross_attention_hidden_size
        super().__init__(config, size, size, nn.Linear(size, size))
        self.attention_norm = nn.LayerNorm(size)
        self.feed_forward_norm = nn.LayerNorm(size)
        self.up = nn.Linear(size, 4 * size)
        self.down = nn.Linear(4 * size, size)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """States [B, T, cross_attention_hidden_size] -> the same; they attend where `mask`, bool [B, T], is True."""
        normed = self.attention_norm(hidden_states)
        hidden_states = hidden_states + self.attend(normed, normed, mask)
        inner = self.dropout(F.gelu(self.up(self.feed_forward_norm(hidden_states))))
        return hidden_states + self.dropout(self.down(inner))


class JointEncoder(nn.Module):
    """
    A small Transformer encoder over the states of all modalities in one sequence.

    Each state is projected to `config.cross_attention_hidden_size` and gets two embeddings: of its modality, and of
    the modalities that the clip has. Positions get none: the states of both encoders know theirs. What comes out is
    projected back and added to the states, and normalised if `config.cross_attention_layer_norm`. These last
    projections start at zero (`branch_output`), as that of `CrossModalAttention`.

    Args:
        config: gives the width, heads, dropout and number of layers.
        sizes: "audio" and "text", or one of them -> the width of its states.
    """

    def __init__(self, config: MMSERConfig, sizes: dict[str, int]):
        super().__init__()
        shared_size = config.cross_attention_hidden_size
        self.inputs = nn.ModuleDict({name: nn.Linear(size, shared_size, bias=False) for name, size in sizes.items()})
        self.modality_embeddings = nn.Parameter(torch.zeros(len(sizes), shared_size))
        self.presence_embeddings = nn.Parameter(torch.zeros(len(sizes), shared_size))
        self.layers = nn.ModuleList(JointEncoderLayer(config) for _ in range(config.fusion_num_layers))
        self.layer_norm = nn.LayerNorm(shared_size)
        self.outputs = nn.ModuleDict({name: branch_output(config, shared_size, size) for name, size in sizes.items()})
        norm = nn.LayerNorm if config.cross_attention_layer_norm else nn.Identity
        self.output_norms = nn.ModuleDict({name: norm(size) for name, size in sizes.items()})

    def forward(self, states: dict[str, Tensor], masks: dict[str, Tensor], present: dict[str, Tensor]) -> list[Tensor]:
        """
        Args:
            states: of each modality, [B, T, D]; T and D may differ between them.
            masks: of the states, bool [B, T].
            present: which clips have the modality, bool [B].
        Returns: the states that have seen each other, of the shapes of `states`, in the order of the modalities.
        """
        presence = torch.stack([present[name] for name in self.inputs], dim=1)  # (B, modalities)
        presence = presence.to(self.presence_embeddings.dtype) @ self.presence_embeddings
        parts = [
            projection(states[name]) + self.modality_embeddings[i] + presence[:, None]
            for i, (name, projection) in enumerate(self.inputs.items())
        ]
        lengths = [part.shape[1] for part in parts]
        mask = attend_somewhere(torch.cat([masks[name] for name in self.inputs], dim=1))
        hidden_states = torch.cat(parts, dim=1)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask)
        parts = self.layer_norm(hidden_states).split(lengths, dim=1)
        return [
            self.output_norms[name](states[name] + self.outputs[name](part))
            for name, part in zip(self.inputs, parts, strict=True)
        ]


class FusionLayer(nn.Module):
    """
    Gated multimodal unit (Arevalo et al. 2017, section 3.1) that knows which modality is there: a missing one gets
    gate 0.
    """

    audio_norm: nn.Module
    text_norm: nn.Module

    def __init__(self, config: MMSERConfig, audio_size: int, text_size: int):
        super().__init__()
        norm = Standardization if config.fusion_norm == "standardization" else nn.LayerNorm
        self.audio_norm = norm(audio_size)
        self.text_norm = norm(text_size)
        self.audio = nn.Linear(audio_size, config.fusion_hidden_size)
        self.text = nn.Linear(text_size, config.fusion_hidden_size)
        self.gate = nn.Linear(audio_size + text_size, config.fusion_hidden_size)
        self.dropout = nn.Dropout(config.fusion_dropout)

    def forward(self, audio: Tensor, text: Tensor, has_audio: Tensor, has_text: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            audio, text: pooled vectors, [B, audio_size] and [B, text_size].
            has_audio, has_text: bool [B].
        Returns: the fused vector [B, fusion_hidden_size] and the share of the audio in it, same shape, in [0, 1].
        """
        audio, text = self.dropout(self.audio_norm(audio)), self.dropout(self.text_norm(text))
        audio_value, text_value = torch.tanh(self.audio(audio)), torch.tanh(self.text(text))
        gate = self.audio_share(audio, text, audio_value, text_value)
        gate = torch.where((has_audio & ~has_text)[:, None], 1.0, gate)
        gate = torch.where((has_text & ~has_audio)[:, None], 0.0, gate)
        return gate * audio_value + (1 - gate) * text_value, gate

    def audio_share(self, audio: Tensor, text: Tensor, audio_value: Tensor, text_value: Tensor) -> Tensor:
        """The share [B, fusion_hidden_size] of rows with both, from normalised vectors and what they are mapped to."""
        return torch.sigmoid(self.gate(torch.cat([audio, text], dim=-1)))


class AttentionFusion(FusionLayer):
    """
    A learned query for each of `config.cross_attention_heads` attends to the two pooled vectors (Lee et al. 2019,
    section 3.2, with the values as keys). A softmax over two scores is a sigmoid of their difference: the share of the
    audio is a gate, one for all dimensions of a head. The queries start at zero, where both get the same share.
    """

    def __init__(self, config: MMSERConfig, audio_size: int, text_size: int):
        super().__init__(config, audio_size, text_size)
        del self.gate
        heads = config.cross_attention_heads
        self.queries = nn.Parameter(torch.zeros(heads, config.fusion_hidden_size // heads))

    def audio_share(self, audio: Tensor, text: Tensor, audio_value: Tensor, text_value: Tensor) -> Tensor:
        heads, head_size = self.queries.shape
        difference = (audio_value - text_value).unflatten(-1, (heads, head_size))
        scores = (difference * self.queries).sum(dim=-1, keepdim=True) * head_size**-0.5
        return torch.sigmoid(scores).expand(-1, -1, head_size).flatten(1)


class SoleModality(nn.Module):
    """What is left of the fusion in a model of one modality: norm and projection, as if the gate gave it all."""

    norm: nn.Module

    def __init__(self, config: MMSERConfig, size: int):
        super().__init__()
        self.norm = (Standardization if config.fusion_norm == "standardization" else nn.LayerNorm)(size)
        self.projection = nn.Linear(size, config.fusion_hidden_size)
        self.dropout = nn.Dropout(config.fusion_dropout)

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled vectors [B, size] -> the fused vector [B, fusion_hidden_size]."""
        return torch.tanh(self.projection(self.dropout(self.norm(pooled))))


class MissingModality(nn.Module):
    """The learned state that stands for a modality that is not there."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Put the embedding in place of the rows of `hidden_states` [B, T, D] whose bool mask [B, T] has no valid
        position.

        Returns: the states, their mask (one valid position in such a row), and which rows are present, bool [B].
        """
        present = mask.any(dim=1)
        states = torch.where(present[:, None, None], hidden_states, self.embedding.to(hidden_states))
        return states, attend_somewhere(mask), present


def attend_somewhere(mask: Tensor) -> Tensor:
    """Mark the first position of rows without any valid one, so that no softmax runs over nothing. Bool [B, T]."""
    first = F.pad(~mask.any(dim=1, keepdim=True), (0, mask.shape[1] - 1))
    return mask | first
