# SPDX-License-Identifier: Apache-2.0
"""Rows about the model itself: its arguments, precision, devices and exports."""

import io
import warnings

import torch
from tiny import NO_DROPOUT, NO_ENCODER_DROPOUT, tiny_config

from benchmarks.situations.common import World, close, error, need, pipeline, situation
from modeling_mmser import MMSERForAudioClassification, register_auto_classes
from processing_mmser import MMSERPipeline

# ---------------------------------------------------------------------------------------------------------- arguments


@situation("arguments", "forward with a keyword that does not exist", "error with the nearest name")
def unknown_keyword(world: World) -> None:
    with error(TypeError, "atention_mask", "attention_mask"):
        world.model(**world.inputs(), atention_mask=1)
    with error(TypeError, "speaker"):
        world.model(**world.inputs(), speaker=1)


@situation("arguments", "return_uncertainty=True of forward", "accepted")
def return_uncertainty(world: World) -> None:
    with torch.no_grad():
        output = world.model(**world.inputs(), return_uncertainty=True)
    assert output.uncertainty.shape == (1, 1)
    close(output.logits[0], world.logits(), 0)


@situation("arguments", "input_values in float64, float16; masks of bool; labels of int32", "as usual, or an error")
def dtypes(world: World) -> None:
    inputs, expected = world.inputs(), world.logits()
    for dtype in (torch.float64, torch.float16):
        with torch.no_grad():
            found = world.model(**{**inputs, "input_values": inputs["input_values"].to(dtype)})
        close(found.logits[0].float(), expected, 2e-2 if dtype == torch.float16 else 1e-5)
    masks = {name: inputs[name].bool() for name in ("attention_mask", "text_attention_mask")}
    with torch.no_grad():
        close(world.model(**{**inputs, **masks}).logits[0], expected)
        batch = world.batch(labels=True)
        close(world.model(**{**batch, "labels": batch["labels"].int()}).loss, world.model(**batch).loss)


@situation("arguments", "labels out of range, audio and text missing", "error that says what is allowed")
def bad_arguments(world: World) -> None:
    with error(ValueError, "[0, 3]"):
        world.model(**world.inputs(), labels=torch.tensor([4]))
    with error(ValueError, "input_values", "input_ids"):
        world.model()


@situation("arguments", "return_dict=False, labels first in the tuple", "loss, then logits")
def tuples(world: World) -> None:
    batch = world.batch(labels=True)
    with torch.no_grad():
        expected, found = world.model(**batch), world.model(**batch, return_dict=False)
    close(found[0], expected.loss)
    close(found[1], expected.logits)


@situation("arguments", "gradients of the input through frozen encoders (saliency)", "those of a finite difference")
def saliency(world: World) -> None:
    model = world.new_model().double()
    for encoder in (model.base_model.audio_encoder, model.base_model.text_encoder):
        encoder.requires_grad_(False)
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in world.inputs(2).items()}
    values = inputs.pop("input_values").requires_grad_()
    (gradient,) = torch.autograd.grad(model(input_values=values, **inputs).logits[0, 1], [values])
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ends = [model(input_values=values + step * direction, **inputs).logits[0, 1] for step in (1e-4, -1e-4)]
    assert abs((ends[0] - ends[1]) / 2e-4 / gradient.norm() - 1) < 0.01


@situation("arguments", "gradient checkpointing", "the gradients without it")
def checkpointing(world: World) -> None:
    gradients = []
    for enabled in (False, True):
        model = world.new_model(**NO_DROPOUT, audio=NO_ENCODER_DROPOUT["wav2vec2"], text=NO_ENCODER_DROPOUT["bert"])
        model.config.audio_config.apply_spec_augment = False
        if enabled:
            model.gradient_checkpointing_enable()
        model.train()(**world.batch(labels=True)).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 50
    for name in gradients[0]:
        close(gradients[1][name], gradients[0][name], 1e-4)


@situation("arguments", "resize_token_embeddings", "the old tokens as before")
def resize(world: World) -> None:
    model = world.new_model()
    model.resize_token_embeddings(150)
    assert model.get_input_embeddings().num_embeddings == 150 == model.config.text_config.vocab_size
    close(world.logits(model=model), world.logits())
    folder = world.new_folder()
    model.save_pretrained(folder)
    close(world.logits(model=MMSERForAudioClassification.from_pretrained(folder).eval()), world.logits())


# ---------------------------------------------------------------------------------------------------------- precision


@situation("precision", "weights in bfloat16 and float16", "near float32; open-set numbers stay float32")
def half(world: World) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = MMSERForAudioClassification.from_pretrained(world.checkpoint, dtype=dtype).eval()
        inputs = world.inputs()
        inputs["input_values"] = inputs["input_values"].to(dtype)
        with torch.no_grad():
            output = model(**inputs)
        close(output.logits[0].float().softmax(-1), world.logits().softmax(-1), 0.1)
        assert output.anchor_distances.dtype == output.unknown_probability.dtype == torch.float32


@situation("precision", "autocast in bfloat16", "distances are not rounded: as many values as clips")
def autocast(world: World) -> None:
    features = torch.randn(400, world.model.config.feature_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        distances = world.model.anchors(features)[1]
    assert distances.dtype == torch.float32 and len(distances[:, 0].unique()) > 390
    with torch.no_grad():
        close(distances, world.model.anchors(features)[1], 1e-5)


@situation("precision", "a pipeline with dtype=bfloat16 by name", "near float32")
def half_pipeline(world: World) -> None:
    register_auto_classes()
    classifier = pipeline("audio-classification", model=str(world.checkpoint), dtype=torch.bfloat16)
    assert classifier.model.dtype == torch.bfloat16
    scores = {entry["label"]: entry["score"] for entry in classifier(world.clip())}
    expected = world.logits().softmax(-1)
    close([scores[world.model.config.id2label[index]] for index in range(4)], expected, 0.1)


@situation("precision", "dynamic quantisation of torch (int8)", "near float32")
def quantised(world: World) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(world.new_model().eval(), {torch.nn.Linear}, torch.qint8)
    close(world.logits(model=model).softmax(-1), world.logits().softmax(-1), 0.15)


# ------------------------------------------------------------------------------------------------------------ devices


@situation("devices", "accelerate.cpu_offload", "the same logits")
def cpu_offload(world: World) -> None:
    import accelerate

    model = accelerate.cpu_offload(world.new_model().eval(), execution_device=torch.device("cpu"))
    close(world.logits(model=model), world.logits())


@situation("devices", 'device_map={"": "disk"}', "the same logits")
def disk_offload(world: World) -> None:
    model = MMSERForAudioClassification.from_pretrained(
        world.checkpoint, device_map={"": "disk"}, offload_folder=str(world.new_folder())
    ).eval()
    close(world.logits(model=model), world.logits())


@situation("devices", 'device_map={"": "cpu"} and "auto"', "the same logits")
def device_map(world: World) -> None:
    for where in ({"": "cpu"}, "auto"):
        model = MMSERForAudioClassification.from_pretrained(world.checkpoint, device_map=where).eval()
        close(world.logits(model=model.cpu() if where == "auto" else model), world.logits())


@situation("devices", "replicas of nn.DataParallel", "the same logits and gradients")
def replicas(world: World) -> None:
    from test_devices import Replicated

    model, batch = world.new_model().eval(), world.batch()
    output = Replicated(model)(**batch)
    close(output["logits"] if isinstance(output, dict) else output.logits, world.model(**batch).logits.detach())


@situation("devices", "torch.compile", "the same logits")
def compiled(world: World) -> None:
    model = torch.compile(world.new_model().eval(), backend="aot_eager")
    close(world.logits(model=model), world.logits())
    torch.compiler.reset()


# ------------------------------------------------------------------------------------------------------------ exports


@situation("exports", "torch.export, with lengths that may change", "the same logits at another length")
def exported(world: World) -> None:
    model, batch = world.new_model().eval(), world.batch()
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (), batch, dynamic_shapes=dict.fromkeys(batch, dynamic))
    longer = {name: torch.cat([values, values]).repeat(2, 1) for name, values in batch.items()}
    longer = {name: torch.cat([values, values], dim=1) for name, values in longer.items()}
    with torch.no_grad():
        close(program.module()(**longer).logits, model(**longer).logits)


@situation("exports", "ONNX, run by the same pipeline", "the same scores")
def onnx(world: World) -> None:
    need("onnxruntime")
    need("onnxscript")
    from mmser.export import export_checkpoint

    folder = world.new_folder() / "onnx"
    export_checkpoint(str(world.checkpoint), folder, formats=("onnx",), check=False)
    classifier = MMSERPipeline.from_onnx(folder)
    for row, entries in enumerate(classifier([world.clip(row) for row in range(3)], batch_size=2)):
        world.check_scores(entries, row, tolerance=1e-4)


@situation("exports", "safetensors there and back, in shards", "bit-identical weights")
def safetensors(world: World) -> None:
    folder = world.new_folder()
    world.model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded = MMSERForAudioClassification.from_pretrained(folder).state_dict()
    expected = world.model.state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


@situation("exports", "state_dict through torch.save, weights_only", "bit-identical weights")
def torch_save(world: World) -> None:
    file = io.BytesIO()
    torch.save(world.model.state_dict(), file)
    file.seek(0)
    model = world.new_model()
    model.load_state_dict(torch.load(file, weights_only=True))
    close(world.logits(model=model), world.logits(), 0)


# --------------------------------------------------------------------------------------------------------- modalities


@situation("modalities", "a model without a text encoder", "fewer weights; text changes nothing; alone it is refused")
def audio_only(world: World) -> None:
    audio, _ = encoders()
    model = MMSERForAudioClassification.from_backbones(audio, None).eval()
    assert not any("text_encoder" in name for name, _ in model.named_parameters())
    folder = world.new_folder()
    model.save_pretrained(folder)
    loaded = MMSERForAudioClassification.from_pretrained(folder).eval()
    close(world.logits(text=None, model=loaded), world.logits(text=None, model=model))
    close(world.logits(model=model), world.logits(text=None, model=model), 0)
    with error(ValueError, "no text encoder"):
        model(**words(world))


@situation("modalities", "a model without an audio encoder", "the words alone count; audio alone is refused")
def text_only(world: World) -> None:
    _, text = encoders()
    model = MMSERForAudioClassification.from_backbones(None, text).eval()
    assert not any("audio_encoder" in name for name, _ in model.named_parameters())
    inputs = words(world)
    with torch.no_grad():
        one, other = model(**inputs), model(**{**inputs, "input_ids": inputs["input_ids"].flip(1)})
    assert one.logits.shape == (1, 4) and not torch.allclose(one.logits, other.logits)
    close(world.logits(model=model), one.logits[0], 0)
    with error(ValueError, "no audio encoder"):
        world.logits(text=None, model=model)


def words(world: World):
    return {name: world.inputs()[name] for name in ("input_ids", "text_attention_mask")}


def encoders():
    config = tiny_config()
    return config.audio_config, config.text_config
