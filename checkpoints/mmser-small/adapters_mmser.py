# SPDX-License-Identifier: Apache-2.0
"""Adapters (LoRA, Hu et al. 2022) in the encoders: their weights in a file, and joined with what they adapt.

A checkpoint with adapters holds the low-rank matrices of each encoder and all of MMSER after the encoders; its
configuration names the encoders. Loading joins them to plain weights, W + B A alpha / rank: the model computes as
without adapters, and needs no PEFT. Training them is in `mmser/lora.py`.
"""

import copy
import hashlib
import re
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

try:
    from .configuration_mmser import MODALITIES, MMSERConfig, check_own_files
    from .encoders_mmser import build_encoder, load_encoder
except ImportError:
    if __package__:  # beside a checkpoint a failed import is a real error, not a reason to take an installed copy
        raise
    from configuration_mmser import MODALITIES, MMSERConfig, check_own_files
    from encoders_mmser import build_encoder, load_encoder

WEIGHT_SAMPLES = 64  # numbers of each matrix that its checksum looks at
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "variant")
# As PEFT names the parts of a linear layer: its own weights, and the matrices of the adapter "default"
BASE, DOWN, UP = ".base_layer.", ".lora_A.", ".lora_B."
BASE_FIELDS = ("name", "fingerprint")  # of each encoder in `config.lora["bases"]`
HEAD, REPORTED = "classifier.", ("missing", "unexpected")
# Weights that a checkpoint has if its configuration says so: the head, and the numbered layers of the encoders
LAYERS = re.compile(rf"^{re.escape(HEAD)}|_encoder\..*layers?\.\d+\.")

THRESHOLDS = "openmax.rejection_thresholds"
POSITIVE = ("openmax.weibull_shape", "openmax.weibull_scale", "temperature")  # of fits: nothing else can be


class LoadsAdapters:
    """What `MMSERPreTrainedModel` has beside Transformers' own loading."""

    config: MMSERConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """
        As always. A checkpoint that holds adapters in place of its encoders is joined with them: the model computes as
        without adapters, and its `config.lora` is None.

        Args:
            audio_name_or_path, text_name_or_path: where the encoder of such adapters is, if not where it was.
        Raises:
            OSError: the encoder of the adapters cannot be read.
            ValueError: it has other weights, or an encoder is named for a checkpoint that has its own; or the
                configuration is not that of the weights: layers are missing, or there are others; or weights are NaN,
                or what was fitted is impossible; or files are not in the folder, see [`check_own_files`].
        """
        load = partial(_load_whole, super().from_pretrained)
        name = pretrained_model_name_or_path
        places = {kind: kwargs.pop(f"{kind}_name_or_path") for kind in MODALITIES if f"{kind}_name_or_path" in kwargs}
        hub_kwargs = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        own: Any = config
        if name is not None:
            check_own_files(name, kwargs.get("subfolder") or "")
        if not isinstance(config, PreTrainedConfig) and name is not None:
            content, _ = MMSERConfig.get_config_dict(name if config is None else config, **hub_kwargs)
            own = MMSERConfig.from_dict(content) if content.get("lora") else None
        if name is None or getattr(own, "lora", None) is None:
            if places:
                raise ValueError(f"{name} has encoders of its own: leave out {', '.join(map(str, places.values()))}.")
            return load(name, *model_args, config=config, **kwargs)
        weights = whole_weights(str(name), own, places, cls.from_pretrained, hub_kwargs)
        result = load(None, *model_args, config=config or name, state_dict=weights, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        model.config.lora = None
        model.config.name_or_path = model.name_or_path = str(name)
        return result


def _load_whole(
    load: Callable[..., Any], name: Any, *model_args, output_loading_info: bool = False, **kwargs
) -> PreTrainedModel | tuple[PreTrainedModel, dict[str, Any]]:
    """`from_pretrained`, but a layer that is new because the configuration is wrong is an error and no warning."""
    model, report = load(name, *model_args, output_loading_info=True, **kwargs)
    missing, unexpected = ({key for key in report[f"{kind}_keys"] if LAYERS.search(key)} for kind in REPORTED)
    keys = {key for key in model.state_dict() if LAYERS.search(key)}
    for part in {_part(key) for key in keys | unexpected}:
        own = {key for key in keys if _part(key) == part}
        if own <= missing:  # a backbone that gets a new head, say, or a model without a head of a checkpoint with one
            missing -= own
            unexpected = {key for key in unexpected if _part(key) != part}
    if missing or unexpected:
        first = min(missing or unexpected)
        what = "has none for" if missing else "also has weights for"
        raise ValueError(
            f"The configuration of {name} is not that of its weights: the file {what} {first} and "
            f"{len(missing | unexpected) - 1} others. Take config.json and the weights from one checkpoint."
        )
    # What the file lacks is told by Transformers; some of it starts as whatever the memory held
    if broken := [weight for weight in broken_weights(model) if weight not in report["missing_keys"]]:
        raise ValueError(
            f"{name} is damaged: {len(broken)} of its weights hold numbers that are NaN or infinite, the first is "
            f"{broken[0]}. Take another checkpoint, such as an earlier one of the same training."
        )
    fits = {key: values for key, values in model.named_buffers() if key in POSITIVE and not values.is_meta}
    for key, values in fits.items():
        if key not in report["missing_keys"] and not bool((values > 0).all()):
            raise ValueError(
                f"{name} is damaged: `{key}` must be greater than 0, got {values.min().item():g}. Take another "
                "checkpoint, or calibrate this one anew (docs/evaluate.md)."
            )
    return (model, report) if output_loading_info else model


def broken_weights(model: nn.Module) -> list[str]:
    """The names of a model's weights, and of what was fitted to it, that hold numbers which are NaN or infinite."""
    broken = []
    for name, weight in chain(model.named_parameters(), model.named_buffers()):
        if not weight.is_floating_point() or weight.is_meta:
            continue
        values = weight.detach()
        # A class without a threshold has the largest float32 there, which becomes infinite in half precision
        is_good = ~values.isnan() if name.endswith(THRESHOLDS) else values.isfinite()
        if not bool(is_good.all()):
            broken.append(name)
    return broken


def _part(key: str) -> str:
    """The head, or the encoder, that a weight of `LAYERS` is of."""
    return HEAD if key.startswith(HEAD) else key.split("_encoder.")[0]


def weights_to_save(model: Any, weights: dict[str, Tensor] | None) -> tuple[dict[str, Tensor], dict | None]:
    """
    What a checkpoint of a model with adapters holds: its weights without those that encoders started with, and its
    `config.lora`. Of `merged_weights` it holds all, and is one of a model without adapters.
    """
    weights = model.state_dict() if weights is None else weights
    if not any(DOWN in name for name in weights):
        return weights, None
    left_out = tuple(f"{kind}_encoder." for kind in model.config.lora["bases"])
    return {
        name: weight
        for name, weight in weights.items()
        if DOWN in name or UP in name or not name.removeprefix("mmser.").startswith(left_out)
    }, model.config.lora


def merged_weights(weights: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """
    Join adapters with what they adapt: W + scale * B A, in float64, as the names of a model without adapters have it.

    Args:
        weights: of a model, by name; the linear layers of the adapters as PEFT names them, or by their own names.
        scale: alpha / rank.
    """
    merged = {
        name.replace(BASE, "."): weight for name, weight in weights.items() if DOWN not in name and UP not in name
    }
    for name, down in weights.items():
        if DOWN in name:
            up, own = weights[name.replace(DOWN, UP)], f"{name.split(DOWN)[0]}.weight"
            change = scale * (up.double() @ down.double())
            merged[own] = (merged[own].double() + change.to(merged[own].device)).to(merged[own].dtype)
    return merged


def fingerprint_weights(module: nn.Module, leave_out: str | None = None) -> str:
    """
    A checksum of the names and shapes of all matrices, and of some numbers of each: two trainings never agree in them.

    Vectors are left out: some of those that a pretrained encoder lacks start at random. So are adapters.

    Args:
        module: whose parameters are looked at.
        leave_out: parameters with this in their name are not.
    """
    digest = hashlib.blake2b(digest_size=10)
    for name, parameter in sorted((name.replace(BASE, "."), each) for name, each in module.named_parameters()):
        is_adapter = DOWN in name or UP in name
        if parameter.ndim < 2 or is_adapter or (leave_out is not None and leave_out in name):
            continue
        values = parameter.detach().reshape(-1)
        count = min(len(values), WEIGHT_SAMPLES)
        places = torch.arange(count, device=values.device) * (len(values) - 1) // max(1, count - 1)
        digest.update(f"{name} {list(parameter.shape)}".encode())
        digest.update(values[places].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def whole_weights(
    name_or_path: str,
    config: MMSERConfig,
    encoder_names: dict[str, str],
    load_model: Callable[..., Any],
    hub_kwargs: dict[str, Any],
) -> dict[str, Tensor]:
    """
    The weights of a checkpoint with adapters, joined with those of the encoders that it was trained on.

    Args:
        name_or_path: of the checkpoint.
        config: its configuration.
        encoder_names: "audio" and "text" -> where that encoder is now; by default where it was.
        load_model: loads an MMSER checkpoint, for adapters that were trained on one.
        hub_kwargs: `revision`, `token`, `cache_dir`... as for `from_pretrained`.
    Raises:
        OSError: the checkpoint has no weights, or an encoder is not where it was.
        ValueError: an encoder has other weights than the one that was adapted, or `config.lora` lacks something.
    """
    _check_lora(config.lora, name_or_path)
    hub_kwargs = dict(hub_kwargs)
    variant = hub_kwargs.pop("variant", None)
    file = cached_file(name_or_path, f"model.{variant}.safetensors" if variant else "model.safetensors", **hub_kwargs)
    weights = load_file(str(file))
    adapters: Any = config.lora
    for name in ("revision", "subfolder"):  # of this checkpoint
        hub_kwargs.pop(name, None)
    prefix = "mmser." if any(name.startswith("mmser.") for name in weights) else ""
    for kind, base in adapters["bases"].items():
        source = encoder_names.get(kind, base["name"])
        encoder = _read_encoder(kind, config, source, load_model, hub_kwargs)
        if fingerprint_weights(encoder) != base["fingerprint"]:
            raise ValueError(
                f"{name_or_path} holds adapters for the {kind} encoder of {base['name']}, but {source} has other "
                f"weights. Give the right one as `{kind}_name_or_path`."
            )
        weights |= {f"{prefix}{kind}_encoder.{name}": weight for name, weight in encoder.state_dict().items()}
    return merged_weights(weights, adapters["alpha"] / adapters["rank"])


def _check_lora(lora: Any, name_or_path: str) -> None:
    """Raise `ValueError` for a description of adapters that cannot be joined with anything."""
    bases = lora.get("bases")
    are_bases = isinstance(bases, dict) and all(
        kind in MODALITIES and isinstance(base, dict) and all(isinstance(base.get(key), str) for key in BASE_FIELDS)
        for kind, base in bases.items()
    )
    if not are_bases:
        raise ValueError(
            f"`lora.bases` in config.json of {name_or_path} must have, for audio, text or both, a `name` and a "
            f"`fingerprint`, got {bases!r:.80}."
        )
    for field in ("rank", "alpha"):
        value = lora.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(
                f"`lora.{field}` in config.json of {name_or_path} must be greater than 0, got {value!r:.80}."
            )


def _read_encoder(
    kind: str, config: MMSERConfig, source: str, load_model: Callable[..., Any], hub_kwargs: dict[str, Any]
) -> nn.Module:
    check_own_files(source)
    try:
        content, _ = PreTrainedConfig.get_config_dict(source, **hub_kwargs)
        if content.get("model_type") == MMSERConfig.model_type:
            model = load_model(source, dtype=torch.float32, **hub_kwargs)
            return getattr(model.base_model, f"{kind}_encoder")
        encoder_config = copy.deepcopy(getattr(config, f"{kind}_config"))
        encoder_config.dtype = torch.float32
        encoder = build_encoder(kind, encoder_config)
        load_encoder(encoder, source, trust_remote_code=False, **hub_kwargs)
    except OSError as error:
        where = "is no folder here" if Path(source).is_absolute() else "cannot be read"
        raise OSError(
            f"These are adapters for the {kind} encoder of {source}, which {where}. Say where it is: "
            f"`from_pretrained(..., {kind}_name_or_path=...)`."
        ) from error
    return encoder
