# SPDX-License-Identifier: Apache-2.0
"""Tests of the model where it is run in another way than alone, in float32, on one processor: other attention kernels,
replicas of `nn.DataParallel`, autocast, offloaded weights, several devices, gradients that an input asks for.
"""

import contextlib
import copy

import accelerate  # type: ignore[import-untyped]
import pytest
import torch
import torch.nn.functional as F
from tiny import (
    AUDIO_CONFIGS,
    NO_DROPOUT,
    NO_ENCODER_DROPOUT,
    fit_openmax_by_chance,
    tiny_batch,
    tiny_config,
    tiny_model,
)
from torch import nn
from transformers.modeling_flash_attention_utils import _pad_input, _unpad_input, _upad_input
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from losses_mmser import (
    check_finite_losses,
    class_balanced_focal_loss,
    clustering_loss,
    distillation_loss,
    prototype_loss,
    supervised_contrastive_loss,
    uncertainty_loss,
)
from modeling_mmser import ClassAnchorClustering, MMSERForAudioClassification, PrototypeMemory
from openmax_mmser import OpenMax

OUTPUTS = ("logits", "uncertainty", "anchor_distances", "features", "fused", "open_set_probabilities")
LABELS = torch.tensor([0, 1, 2, 3])

pytestmark = pytest.mark.usefixtures("seeded")


def batch_for(model):
    lengths = [100, 57, 20, 0] if model.config.uses_log_mel else [4000, 2100, 3205, 0]
    return tiny_batch(model, lengths, [9, 4, 0, 6])


def audio_name(model):
    return "input_features" if model.config.uses_log_mel else "input_values"


# Attention kernels


def varlen_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """FlashAttention as Transformers calls it, its kernel for sequences of any lengths replaced by a loop."""
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # (B, T, heads, head_size)
    batch_size, query_length = query.shape[:2]
    if attention_mask is None:
        attention_mask = torch.ones(key.shape[:2], dtype=torch.bool)
    query, key, value, indices, (query_ends, key_ends), _ = _upad_input(
        query, key, value, attention_mask, query_length, _unpad_input
    )
    attended = []
    for i in range(batch_size):
        rows, seen = slice(query_ends[i], query_ends[i + 1]), slice(key_ends[i], key_ends[i + 1])
        scores = torch.einsum("qhd,khd->hqk", query[rows], key[seen]) * scaling
        attended.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value[seen]))
    return _pad_input(torch.cat(attended), indices, batch_size, query_length), None


def use_attention(model, implementation):
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = implementation


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in AUDIO_CONFIGS if kind != "wavlm"])  # it has an attention of its own
def test_flash_attention_gives_what_eager_attention_gives(kind, monkeypatch):
    """The encoders unpad their queries by their own mask; the attention between the modalities cannot."""
    calls = []
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping,
        "flash_attention_2",
        lambda *args, **kwargs: calls.append(0) or varlen_attention(*args, **kwargs),
    )
    model = tiny_model(kind)
    fit_openmax_by_chance(model)
    batch = batch_for(model)
    use_attention(model, "eager")
    expected = model(**batch)
    assert not calls
    use_attention(model, "flash_attention_2")
    outputs = model(**batch)
    assert len(calls) == 4  # two layers of each encoder
    for name in OUTPUTS:
        torch.testing.assert_close(outputs[name], expected[name], rtol=0, atol=1e-5, msg=name)


# Replicas


def replicas_of(model, number):
    """What `torch.nn.parallel.replicate` makes, on the processor: modules whose parameters are plain tensors."""
    modules = list(model.modules())
    index = {module: i for i, module in enumerate(modules)}
    result = []
    for _ in range(number):
        copies = [module._replicate_for_data_parallel() for module in modules]
        for module, replica in zip(modules, copies, strict=True):
            replica._former_parameters = {}
            for name, child in module._modules.items():
                setattr(replica, name, None if child is None else copies[index[child]])
            for name, parameter in module._parameters.items():
                if parameter is None:
                    replica._parameters[name] = None
                    continue
                # Broadcasting keeps the graph of those that are trained
                tensor = parameter.view_as(parameter) if parameter.requires_grad else parameter.detach()
                setattr(replica, name, tensor)
                replica._former_parameters[name] = tensor
            for name, buffer in module._buffers.items():
                replica._buffers[name] = buffer
        result.append(copies[0])
    return result


class Replicated(nn.Module):
    """`nn.DataParallel` on the processor: each replica gets its share of the rows, and the outputs are gathered."""

    def __init__(self, module, number=2):
        super().__init__()
        self.module, self.number = module, number

    def forward(self, **inputs):
        parts = {name: values.chunk(self.number) for name, values in inputs.items()}
        outputs = [
            replica(**{name: values[i] for name, values in parts.items()})
            for i, replica in enumerate(replicas_of(self.module, self.number))
        ]
        return self.gather(outputs)

    def gather(self, outputs):
        """As `torch.nn.parallel.gather`: a scalar becomes a vector with an entry for each replica."""
        first = outputs[0]
        if isinstance(first, torch.Tensor):
            return torch.stack(outputs) if first.ndim == 0 else torch.cat(outputs)
        return type(first)((name, self.gather([output[name] for output in outputs])) for name in first)


@torch.no_grad()
@pytest.mark.parametrize("kind", AUDIO_CONFIGS)
def test_replicas_classify_as_the_model_does(kind):
    model = tiny_model(kind)
    fit_openmax_by_chance(model)
    batch = batch_for(model)
    expected, outputs = model(**batch), Replicated(model)(**batch)
    for name in (*OUTPUTS, "is_unknown"):
        torch.testing.assert_close(outputs[name], expected[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("frozen", ["none", "audio", "text"])
def test_replicas_train_as_the_model_does(frozen):
    dropout = {"audio": NO_ENCODER_DROPOUT["wav2vec2"] | {"mask_time_prob": 0.0}, "text": NO_ENCODER_DROPOUT["bert"]}
    model = tiny_model(**dropout, **NO_DROPOUT)
    if frozen != "none":
        getattr(model, f"freeze_{frozen}_encoder")()
    batch = batch_for(model) | {"labels": LABELS}
    reference = copy.deepcopy(model).train()
    reference(**batch).loss.backward()
    outputs = Replicated(model.train())(**batch)
    outputs.loss.mean().backward()  # as the Trainer does
    assert outputs.loss.shape == (2,) and outputs.losses["focal"].shape == (2,)
    check_finite_losses(outputs.losses)
    with pytest.raises(FloatingPointError, match="focal=nan"):
        check_finite_losses(outputs.losses | {"focal": torch.tensor([1.0, torch.nan])})
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    trained = {name for name, gradient in expected.items() if gradient is not None}
    assert any("text_encoder" in name for name in trained) == (frozen != "text")
    assert any("audio_encoder" in name for name in trained) == (frozen != "audio")
    for name, parameter in model.named_parameters():
        if name not in trained:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


# Autocast


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(
    "loss",
    [
        lambda features, logits, labels: class_balanced_focal_loss(logits, labels, torch.tensor([0.5, 1.0, 1.0, 1.5])),
        lambda features, logits, labels: clustering_loss(logits, logits.sigmoid(), labels),
        lambda features, logits, labels: uncertainty_loss(logits[:, :1].sigmoid(), logits, labels),
        lambda features, logits, labels: prototype_loss(logits, labels),
        lambda features, logits, labels: supervised_contrastive_loss(features, labels),
        lambda features, logits, labels: distillation_loss(logits, logits.flip(1)),
    ],
    ids=["focal", "clustering", "uncertainty", "prototype", "contrastive", "distillation"],
)
def test_losses_are_not_rounded_by_autocast(loss):
    labels = torch.randint(4, (64,))
    results = []
    for region in (contextlib.nullcontext(), autocast()):
        torch.manual_seed(1)
        features, logits = (torch.randn(64, size).requires_grad_(True) for size in (32, 4))
        with region:
            value = loss(features, logits, labels)
        value.backward()
        results.append([value, logits.grad, features.grad])
    assert results[1][0].dtype == torch.float32
    for plain, in_autocast in zip(*results, strict=True):
        assert (plain is None) == (in_autocast is None)
        assert plain is None or torch.equal(plain, in_autocast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [ClassAnchorClustering, PrototypeMemory])
def test_distances_are_not_rounded_by_autocast(part, dtype):
    """Features of layers under autocast come in bfloat16: what is measured between them is still exact."""
    module = part(tiny_config(feature_size=256, anchor_size=128))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    features = (torch.randn(256) + 0.05 * torch.randn(400, 256)).to(dtype)  # clips of one class lie close together
    expected = module(features.float())
    with autocast():
        outputs = module(features)
    for value, exact in zip(*(o if isinstance(o, tuple) else (o,) for o in (outputs, expected)), strict=True):
        assert value.dtype == torch.float32 and torch.equal(value, exact)
        assert len(value[:, 0].unique()) > 380
    (outputs[0] if isinstance(outputs, tuple) else outputs).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for name, p in module.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("level", ["activation", "probability"])
@pytest.mark.parametrize("centroids", [0, 8])
def test_openmax_is_not_rounded_by_autocast(centroids, level):
    labels = torch.arange(200) % 4
    fused = F.one_hot(labels, 32) + 0.1 * torch.randn(200, 32)
    logits, distances = 4 * F.one_hot(labels, 4) + torch.randn(200, 4), 0.5 + 0.1 * torch.rand(200, 4)
    results = []
    for region in (contextlib.nullcontext(), autocast()):
        openmax = OpenMax(4, 3, level, centroids, 32)
        with region:
            outputs = {"logits": logits, "fused": fused, "anchor_distances": distances, "labels": labels}
            openmax.fit_outputs(outputs, outputs, acceptance=0.9)
            measured = openmax.distances(fused, distances)
            scores, probabilities = openmax.rejection_scores(logits, measured), openmax(logits, measured)
            rejected = openmax.reject(scores, probabilities, logits.argmax(dim=-1), 0.3)
        assert len(measured[:, 0].unique()) > 190
        results.append([*openmax.buffers(), measured, openmax.cdf(measured), scores, probabilities, rejected])
    assert results[1][-1].any() and all(torch.equal(*pair) for pair in zip(*results, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("distance", ["anchor", "centroid"])
def test_what_the_model_measures_under_autocast_is_exact_for_its_features(distance):
    model = tiny_model(openmax_distance=distance)
    fit_openmax_by_chance(model)
    with autocast():
        outputs = model(**batch_for(model))
    assert outputs.features.dtype == torch.bfloat16
    _, anchor_distances = model.anchors(outputs.features.float())
    assert torch.equal(outputs.anchor_distances, anchor_distances)
    measured = model.openmax.distances(outputs.fused, anchor_distances)
    assert torch.equal(outputs.open_set_probabilities, model.openmax(outputs.logits, measured))


# Offload, several devices


@pytest.mark.parametrize("kind", [kind for kind in AUDIO_CONFIGS if kind != "wavlm"])  # fails in the library itself
@pytest.mark.parametrize("where", ["cpu", "cpu with buffers", "disk", "disk in part"])
def test_offloaded_weights_are_there_when_they_are_read(kind, where, tmp_path):
    """Accelerate brings the weights of a part when the `forward` of this part runs, and takes them away after it."""
    model = tiny_model(kind)
    fit_openmax_by_chance(model)
    batch = batch_for(model)
    with torch.no_grad():
        expected = model(**batch)
    model.save_pretrained(tmp_path)
    if where.startswith("cpu"):
        model = MMSERForAudioClassification.from_pretrained(tmp_path)
        accelerate.cpu_offload(model, execution_device="cpu", offload_buffers="buffers" in where)
    else:
        kept = dict.fromkeys(["classifier", "openmax", "temperature", "prediction_sets"], "cpu")
        parts = dict.fromkeys(["mmser", "anchors", "uncertainty", "prototypes"], "disk") | kept
        device_map = parts if where == "disk in part" else {"": "disk"}
        model = MMSERForAudioClassification.from_pretrained(
            tmp_path, device_map=device_map, offload_folder=tmp_path / "offloaded"
        )
    assert model.device.type == "meta"
    with torch.no_grad():
        outputs = model(**batch, labels=LABELS)
    assert outputs.loss.isfinite()
    for name in (*OUTPUTS, "is_unknown"):
        torch.testing.assert_close(outputs[name], expected[name], rtol=0, atol=1e-6, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_map_of_its_own_keeps_the_answers_and_float32_where_it_is_needed(dtype, tmp_path):
    """`device_map="auto"` with less memory than the model needs: the rest lies on the disk."""
    model = tiny_model("whisper", classifier_num_layers=6)
    fit_openmax_by_chance(model)
    model.save_pretrained(tmp_path)
    plain = MMSERForAudioClassification.from_pretrained(tmp_path, dtype=dtype)
    size = sum(each.numel() * each.element_size() for each in plain.state_dict().values())
    options = {"device_map": "auto", "max_memory": {"cpu": size // 2, "disk": 10 * size}}
    laid_out = MMSERForAudioClassification.from_pretrained(
        tmp_path, dtype=dtype, offload_folder=tmp_path / "offloaded", **options
    )
    assert set(laid_out.hf_device_map.values()) == {"cpu", "disk"}
    expected, outputs = (each(**batch_for(model)) for each in (plain, laid_out))
    for name in (*OUTPUTS, "is_unknown"):
        torch.testing.assert_close(outputs[name], expected[name], rtol=0, atol=1e-6, msg=name)
        assert outputs[name].dtype == expected[name].dtype
    for name, buffer in plain.named_buffers():
        if name.startswith(("openmax", "temperature", "uncertainty.error")):
            assert buffer.dtype == torch.float32, name
            placed = dict(laid_out.named_buffers())[name]
            assert placed.dtype == torch.float32, name
    whole = MMSERForAudioClassification.from_pretrained(tmp_path, dtype=dtype, device_map="auto")
    assert whole.device.type != "meta"
    torch.testing.assert_close(whole(**batch_for(model)).logits, expected.logits, rtol=0, atol=1e-6)


def test_offloaded_models_can_be_fitted():
    model = tiny_model()
    batch = batch_for(model)
    fitted = []
    for fit in (model, accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")):
        fit.mmser.fit_standardization([batch])
        fitted.append(fit.mmser.state_norm.mean)
    assert fitted[0].any() and torch.equal(*fitted)


@pytest.mark.parametrize("kind", AUDIO_CONFIGS)
def test_no_block_is_split_over_devices(kind):
    model = tiny_model(kind, classifier_num_layers=20)
    names = model._no_split_modules
    whole = [name for name, module in model.named_modules() if type(module).__name__ in names]
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    memory = {0: size // 3, 1: size // 3, "cpu": size, "disk": 10 * size}
    devices = accelerate.infer_auto_device_map(model, memory, no_split_module_classes=list(names))
    assert len(set(devices.values())) > 1
    for name in devices:  # no entry lies inside a block
        assert not [block for block in whole if name.startswith(f"{block}.")], name
    blocks = {type(model.get_submodule(name)).__name__ for name in whole}
    assert {type(model.mmser.audio_encoder).__name__, "CrossModalAttention", "ResidualBlock", "OpenMax"} <= blocks


# Gradients of inputs


@pytest.mark.parametrize("kind", AUDIO_CONFIGS)
@pytest.mark.parametrize("training", [False, True])
def test_an_input_that_asks_for_a_gradient_gets_it_through_a_frozen_encoder(kind, training):
    """Saliency maps and adversarial examples; the gradient is that of a model with nothing frozen."""
    model = tiny_model(kind, **NO_DROPOUT)
    batch, name = batch_for(model), audio_name(model)
    model.mmser.text_encoder.eval()
    gradients = []
    for frozen in (False, True):
        if frozen:
            model.freeze_audio_encoder()
            model.freeze_text_encoder()
            model.train(training)
            model.zero_grad()
        audio = batch[name].clone().requires_grad_(True)
        model(**batch | {name: audio}).logits[:, 0].sum().backward()
        gradients.append(audio.grad)
    assert gradients[1][:3].abs().amax() > 0 and gradients[1][3].abs().max() == 0  # the last row has no audio
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is None for parameter in model.mmser.audio_encoder.parameters())
