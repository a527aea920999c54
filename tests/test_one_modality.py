# SPDX-License-Identifier: Apache-2.0
"""Tests of models with one encoder, and of a modality that was never trained.

Neither may have a say: an input that is not used changes nothing and is reported, alone it is an error.
"""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from tiny import _SMALL_PARTS as SMALL_PARTS
from tiny import AUDIO_CONFIGS, TEXT_CONFIG, alone, randomize, tiny_batch, tiny_config, tiny_model
from tiny_corpus import JOINT, TEXT, tiny_flags, tiny_processor
from tiny_corpus import tiny_model as tiny_corpus_model
from transformers import AutoProcessor, BertConfig

import audio_mmser
import eval_hf
import modeling_mmser
import pipeline_mmser
import train_hf
from configuration_mmser import MMSERConfig
from mmser.arguments import ModelArguments
from mmser.batches import MMSERDataCollator
from mmser.export import export_checkpoint
from modeling_mmser import MMSERForAudioClassification
from processing_mmser import MMSERPipeline, MMSERProcessor

AUDIO_LENGTHS = {"wav2vec2": [3200, 2000], "whisper": [100, 60]}
INPUTS = {
    "audio": {"input_values", "input_features", "attention_mask"},
    "text": {"input_ids", "text_attention_mask"},
}
OTHER = {"audio": "text", "text": "audio"}


def sole_config(modality, kind="wav2vec2", **overrides):
    encoder = AUDIO_CONFIGS[kind] if modality == "audio" else TEXT_CONFIG
    return MMSERConfig(**{f"{modality}_config": encoder}, modalities=[modality], **(SMALL_PARTS | overrides))


def sole_model(modality, kind="wav2vec2", seed=0, **overrides):
    torch.manual_seed(seed)
    return randomize(MMSERForAudioClassification(sole_config(modality, kind, **overrides))).eval()


def both(kind="wav2vec2"):
    """A batch of two clips with audio and text."""
    return tiny_batch(tiny_model(kind), AUDIO_LENGTHS[kind], [5, 3])


def only(batch, modality):
    return {name: value for name, value in batch.items() if name in INPUTS[modality]}


def train_on(model, batch, steps=2):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        model(**batch, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture
def warnings_of_the_model(monkeypatch):
    seen = []
    monkeypatch.setattr(modeling_mmser.logger, "warning_once", lambda message, *args: seen.append(message))
    return seen


# --- a model without an encoder --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
@pytest.mark.parametrize("modality", ["audio", "text"])
def test_a_model_of_one_modality_has_no_part_of_the_other(modality, kind):
    model = sole_model(modality, kind)
    missing = OTHER[modality]
    assert not [name for name, _ in model.named_parameters() if missing in name or "attention." in name.split(".")[1]]
    assert getattr(model.config, f"{missing}_config") is None
    assert {name for name, _ in model.mmser.named_children()} == {
        *(["state_norm"] if modality == "audio" else []),
        f"{modality}_encoder",
        "layer_norm",
        f"{modality}_pooling",
        "fusion",
    }
    assert (
        model.main_input_name
        == (("input_features" if kind == "whisper" else "input_values", "input_ids"))[modality == "text"]
    )
    assert model.input_modalities == (modality,)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
@pytest.mark.parametrize("modality", ["audio", "text"])
def test_a_model_of_one_modality_ignores_the_other_with_a_warning(modality, kind, warnings_of_the_model):
    model, batch, missing = sole_model(modality, kind), both(kind), OTHER[modality]
    expected = model(**only(batch, modality))
    assert not warnings_of_the_model
    assert torch.equal(model(**batch).logits, expected.logits)
    assert warnings_of_the_model == [f"This model has no {missing} encoder: its {missing} input is ignored."]
    with pytest.raises(ValueError, match=f"has no {missing} encoder: give {modality}"):
        model(**only(batch, missing))
    with pytest.raises(ValueError, match=f"has no {missing} encoder"):
        model.train()(**only(batch, missing))


@torch.no_grad()
@pytest.mark.parametrize("modality", ["audio", "text"])
def test_the_result_of_a_clip_does_not_depend_on_its_batch(modality):
    model = sole_model(modality)
    batch = tiny_batch(tiny_model(), [3200, 2000, 2600], [5, 3, 7], extra=400)
    together = model(**only(batch, modality)).logits
    assert together.std(dim=0).min() > 1e-3
    for row in range(3):
        inputs = {name: value for name, value in alone(batch, row).items() if name in INPUTS[modality]}
        assert torch.allclose(model(**inputs).logits[0], together[row], atol=1e-4)


@pytest.mark.parametrize("modality", ["audio", "text"])
def test_every_parameter_of_one_modality_learns(modality):
    model = sole_model(modality).train()
    model(**only(both(), modality), labels=torch.tensor([0, 1])).loss.backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert without in ([], ["mmser.audio_encoder.masked_spec_embed"])


@torch.no_grad()
@pytest.mark.parametrize("modality", ["audio", "text"])
def test_states_and_frozen_encoders_of_one_modality(modality, tmp_path):
    model, batch = sole_model(modality), both()
    inputs = only(batch, modality)
    states = model.mmser.encode(**inputs)
    assert torch.allclose(model(**states).logits, model(**inputs).logits, atol=1e-5)
    getattr(model, f"freeze_{modality}_encoder")()
    assert model.mmser.frozen_encoders() == {modality}
    model.train()
    assert not getattr(model.mmser, f"{modality}_encoder").training
    with pytest.raises(NotImplementedError, match=f"no {OTHER[modality]} encoder"):
        getattr(model, f"freeze_{OTHER[modality]}_encoder")()
    model.mmser.fit_standardization([inputs])
    assert (model.mmser.fusion.norm.mean != 0).any()
    model.save_pretrained(tmp_path)
    again = MMSERForAudioClassification.from_pretrained(tmp_path)
    assert again.config.modalities == [modality]
    assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize("modality", ["audio", "text"])
def test_from_backbones_with_one_encoder(modality):
    config = tiny_config()
    encoders = {name: getattr(config, f"{name}_config") if name == modality else None for name in OTHER}
    model = MMSERForAudioClassification.from_backbones(encoders["audio"], encoders["text"], **SMALL_PARTS)
    assert model.config.modalities == [modality]
    assert model(**only(both(), modality)).logits.shape == (2, 4)


def test_a_model_needs_an_encoder():
    with pytest.raises(ValueError, match="both are None"):
        MMSERForAudioClassification.from_backbones(None, None)
    with pytest.raises(ValueError, match="`text_config` is given, but `modalities`"):
        MMSERConfig(modalities=["audio"], text_config=TEXT_CONFIG)
    with pytest.raises(StrictDataclassClassValidationError, match="modalities"):
        MMSERConfig(modalities=["audio", "video"])


# --- a modality that was never trained -------------------------------------------------------------------------------


@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("untrained", ["audio", "text"])
def test_a_saved_model_knows_what_it_was_never_trained_with(untrained, is_masked, tmp_path, warnings_of_the_model):
    """`is_masked`: the batches have the other input, with a mask of zeros, as the collator makes them."""
    trained, batch = OTHER[untrained], both()
    example = only(batch, trained)
    if is_masked:
        mask = "attention_mask" if untrained == "audio" else "text_attention_mask"
        example = {**batch, mask: torch.zeros_like(batch[mask])}
    model = train_on(MMSERForAudioClassification(tiny_config()), example)
    model.save_pretrained(tmp_path)
    again = MMSERForAudioClassification.from_pretrained(tmp_path)
    assert again.config.untrained_modalities == [untrained]
    assert again.config.used_modalities == [trained]
    with torch.no_grad():
        expected = again(**only(batch, trained)).logits
        assert not warnings_of_the_model
        assert torch.equal(again(**batch).logits, expected)
        assert torch.equal(again.mmser(**batch).pooler_output, again.mmser(**only(batch, trained)).pooler_output)
    assert set(warnings_of_the_model) == {
        f"This model was never trained with {untrained} ({untrained}_dropout 1.0, or training clips without "
        f"{'audio' if untrained == 'audio' else 'transcripts'}): its {untrained} input is ignored."
    }
    with pytest.raises(ValueError, match=f"never trained with {untrained} .*: give {trained}"):
        again(**only(batch, untrained))


def test_a_masked_input_is_not_reported(warnings_of_the_model):
    model, batch = tiny_model(untrained_modalities=["text"]), both()
    model(**{**batch, "text_attention_mask": torch.zeros_like(batch["text_attention_mask"])})
    assert not warnings_of_the_model


def test_in_training_every_modality_is_used():
    model, batch = tiny_model(untrained_modalities=["text"], **{"classifier_dropout": 0.0}), both()
    model.train()(**batch, labels=torch.tensor([0, 1])).loss.backward()
    assert model.mmser.text_encoder.get_input_embeddings().weight.grad.abs().max() > 0


def test_a_fine_tune_with_text_makes_it_trained_and_one_without_leaves_it_so(tmp_path):
    batch = both()
    model = train_on(MMSERForAudioClassification(tiny_config()), only(batch, "audio"))
    for name, example, untrained in (("a", None, ["text"]), ("b", batch, []), ("c", only(batch, "audio"), [])):
        if example is not None:
            model = train_on(model, example)
        model.save_pretrained(tmp_path / name)
        model = MMSERForAudioClassification.from_pretrained(tmp_path / name)
        assert model.config.untrained_modalities == untrained


def test_a_model_that_was_not_trained_uses_all_it_has(tmp_path):
    model = MMSERForAudioClassification(tiny_config())
    model.save_pretrained(tmp_path)
    assert model.config.untrained_modalities == []


def test_a_checkpoint_without_the_entries_is_loaded_as_before(tmp_path):
    model, batch = tiny_model(), both()
    del model.config.untrained_modalities, model.config.modalities
    config = {name: value for name, value in model.config.to_dict().items() if "modalities" not in name}
    again = MMSERConfig.from_dict(config)
    assert again.modalities == ["audio", "text"] and again.untrained_modalities == []
    again = MMSERForAudioClassification(again)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(**batch).logits, tiny_model()(**batch).logits)


@torch.no_grad()
def test_standardisation_covers_what_is_to_be_trained_now():
    model, batch = tiny_model(untrained_modalities=["text"]), both()
    model.mmser.fit_standardization([batch])
    assert (model.mmser.fusion.text_norm.scale != 1).any()
    assert model.config.untrained_modalities == ["text"]


# --- processor, pipeline, export -------------------------------------------------------------------------------------


def parts(modality):
    """A processor of one modality."""
    whole = tiny_processor()
    if modality == "audio":
        return MMSERProcessor(whole.feature_extractor)
    return MMSERProcessor(tokenizer=whole.tokenizer)


@pytest.fixture
def fresh_warnings(monkeypatch):
    """Warnings that were given once are given again."""
    monkeypatch.setattr(audio_mmser, "_warned", set())
    seen = []
    for module in (modeling_mmser, pipeline_mmser):
        monkeypatch.setattr(module.logger, "warning_once", lambda message, *args: seen.append(message))
    return seen


def test_a_processor_needs_a_part():
    with pytest.raises(ValueError, match="both are None"):
        MMSERProcessor()


@pytest.mark.parametrize("modality", ["audio", "text"])
def test_a_processor_of_one_modality_is_saved_and_loaded(modality, tmp_path):
    processor = parts(modality)
    assert processor.modalities == [modality]
    assert set(processor.model_input_names) == INPUTS[modality] - {"input_features"}
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists() == (modality == "text")
    loaded = MMSERProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict() and loaded.modalities == [modality]
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.to_dict() == processor.to_dict() and loaded.modalities == [modality]


@pytest.mark.parametrize("modality", ["audio", "text"])
def test_a_processor_of_one_modality_ignores_the_other(modality, fresh_warnings, caplog):
    processor, clips, texts = parts(modality), [np.ones(800), np.ones(900)], ["what a joy", "i miss it"]
    inputs = processor(audio=clips, text=texts, sampling_rate=16000)
    own = processor(**({"audio": clips, "sampling_rate": 16000} if modality == "audio" else {"text": texts}))
    assert inputs.keys() == own.keys() and all(torch.equal(inputs[name], own[name]) for name in own)
    rows = {"audio": [clips[0], None], "text": [None, texts[1]]}
    with pytest.raises(ValueError, match=f"row {1 if modality == 'audio' else 0} has no {modality}"):
        processor(**rows, sampling_rate=16000)


@pytest.mark.parametrize("modality", ["audio", "text"])
def test_a_batch_of_one_modality(modality):
    rows = [{"audio": np.ones(800, np.float32), "text": "what a joy", "labels": 0}] * 2
    batch = MMSERDataCollator(parts(modality))(rows)
    assert set(batch) == (INPUTS[modality] - {"input_features"}) | {"labels"}


@pytest.mark.parametrize("modality", ["audio", "text"])
def test_a_pipeline_of_one_modality(modality, tmp_path, fresh_warnings):
    sole_model(modality).save_pretrained(tmp_path)
    parts(modality).save_pretrained(tmp_path)
    classifier = MMSERPipeline(
        model=MMSERForAudioClassification.from_pretrained(tmp_path),
        processor=MMSERProcessor.from_pretrained(tmp_path),
        task="audio-classification",
    )
    clip = {"array": np.random.default_rng(0).normal(size=4000), "sampling_rate": 16000}
    words = {"text": "what a joy"}
    own, other = (clip, words) if modality == "audio" else (words, clip)
    expected = classifier(own)
    assert not fresh_warnings
    for scores in classifier([{**clip, **words}, own], batch_size=2):
        assert [(entry["label"], pytest.approx(entry["score"], abs=1e-5)) for entry in scores] == [
            (entry["label"], entry["score"]) for entry in expected
        ]
    assert set(fresh_warnings) == {
        f"This model has no {OTHER[modality]} encoder: its {OTHER[modality]} input is ignored."
    }
    with pytest.raises(ValueError, match=f"input 1: This model has no {OTHER[modality]} encoder: give {modality}"):
        classifier([own, other])


def test_a_pipeline_ignores_a_text_that_its_model_was_never_trained_with(fresh_warnings):
    model = tiny_corpus_model(untrained_modalities=["text"])
    classifier = MMSERPipeline(model=model, processor=tiny_processor(), task="audio-classification")
    clip = {"array": np.random.default_rng(0).normal(size=4000), "sampling_rate": 16000}
    assert classifier({**clip, "text": "what a joy"}) == classifier(clip)
    assert len(set(fresh_warnings)) == 1 and "text_dropout 1.0" in fresh_warnings[0]
    with pytest.raises(ValueError, match="never trained with text"):
        classifier({"text": "what a joy"})


@pytest.mark.parametrize("case", ["text", "untrained"])
def test_an_export_has_the_inputs_that_are_used(case, tmp_path, fresh_warnings):
    """The text alone in float32; the audio alone in int8, of a model that has both encoders and uses one."""
    modality = "text" if case == "text" else "audio"
    if case == "untrained":
        model, processor = tiny_corpus_model(whisper=True, untrained_modalities=["text"]), tiny_processor(whisper=True)
    else:
        model = MMSERForAudioClassification.from_backbones(None, BertConfig(vocab_size=30, **TEXT), **JOINT)
        processor = parts(modality)
    model = randomize(model).eval()
    trained = only_bias_of(model, modality) if case == "untrained" else model
    trained.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    export_checkpoint(tmp_path / "model", tmp_path / "onnx", dtype="int8" if case == "untrained" else "float32")
    classifier = MMSERPipeline.from_onnx(tmp_path / "onnx")
    other_encoder = "input_values" if case == "untrained" else "input_features"
    assert set(classifier.model.inputs) == INPUTS[modality] - {other_encoder}
    clip, words = {"array": np.random.default_rng(0).normal(size=4000), "sampling_rate": 16000}, {"text": "what a joy"}
    own, other = (clip, words) if modality == "audio" else (words, clip)
    assert classifier({**clip, **words}) == classifier(own)
    assert len(set(fresh_warnings)) == 1
    with pytest.raises(ValueError, match=f"give {modality}"):
        classifier(other)


def only_bias_of(model, modality):
    """The weights as of a training without the other modality."""
    with torch.no_grad():
        for bias in modeling_mmser.MODALITY_BIASES:
            model.mmser.get_parameter(bias.format(OTHER[modality])).zero_()
    return model


# --- training --------------------------------------------------------------------------------------------------------


def without(modality):
    """Flags that leave out an encoder."""
    names = ["random_{}_encoder", "{}_config_overrides", *(["tokenizer_name"] if modality == "text" else [])]
    return {f"{modality}_model_name_or_path": "none", **{name.format(modality): None for name in names}}


@pytest.mark.parametrize("modality", ["audio", "text"])
def test_train_with_one_encoder(modality, corpus, tokenizer, tmp_path):
    flags = {"freeze_audio": True, "cache_encoder_states": tmp_path / "cache"} if modality == "audio" else {}
    results = train_hf.main(tiny_flags(corpus, tmp_path / "run", tokenizer, **without(OTHER[modality]), **flags))
    assert set(results["test"]) == {"model", "linear_probe", "majority"}
    counted = {row["part"] for row in results["parameters"] if row["parameters"]}
    assert f"{modality}_encoder" in counted and not counted & {f"{OTHER[modality]}_encoder", "cross_modal_attention"}
    assert results["encoders"][OTHER[modality]] == "none"
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert f"It has no {OTHER[modality]} encoder" in card
    again = train_hf.main(
        tiny_flags(
            corpus,
            tmp_path / "again",
            None,
            model_name_or_path=tmp_path / "run",
            **dict.fromkeys(
                [
                    *("random_audio_encoder", "audio_config_overrides", "random_text_encoder"),
                    *("text_config_overrides", "config_overrides"),
                ]
            ),
        )
    )
    assert set(again["test"]) == {"model", "linear_probe", "majority"}
    flags = ["--checkpoint", str(tmp_path / "run"), "--data_dir", str(corpus), "--save_dir", str(tmp_path / "report")]
    report = eval_hf.main([*flags, "--use_cpu", "--bootstrap_samples", "10"])
    assert set(report["rows"]) == {"model", "linear_probe", "majority"}


def test_a_training_that_drops_every_text_leaves_a_checkpoint_that_ignores_it(corpus, tokenizer, tmp_path):
    run = tmp_path / "run"
    flags = {"text_dropout": 1.0, "audio_dropout": 0.0, "eval_strategy": "steps", "eval_steps": 1}
    results = train_hf.main(tiny_flags(corpus, run, tokenizer, **flags))
    assert set(results["test"]) == {"model", "linear_probe", "majority"}
    assert MMSERConfig.from_pretrained(run).untrained_modalities == ["text"]
    model = MMSERForAudioClassification.from_pretrained(run)
    batch = MMSERDataCollator(tiny_processor())(
        [{"audio": np.random.default_rng(0).normal(size=4000), "text": "what a joy", "labels": 0}]
    )
    with torch.no_grad():
        given, alone_ = model(**batch), model(**{name: batch[name] for name in ("input_values", "attention_mask")})
    assert torch.equal(given.logits, alone_.logits)
    # A fine-tune with text makes it trained, at once also for its own evaluations
    start = dict.fromkeys(
        [
            *("random_audio_encoder", "audio_config_overrides", "random_text_encoder", "text_config_overrides"),
            *("config_overrides", "tokenizer_name"),
        ]
    )
    results = train_hf.main(tiny_flags(corpus, tmp_path / "next", tokenizer, model_name_or_path=run, **start))
    assert {"audio_only", "text_only"} <= set(results["test"])
    assert MMSERConfig.from_pretrained(tmp_path / "next").untrained_modalities == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"text_model_name_or_path": "none", "freeze_text": True}, "--freeze_text has nothing"),
        ({"text_model_name_or_path": "None", "tokenizer_name": "x"}, "--tokenizer_name has nothing"),
        ({"audio_model_name_or_path": "none", "text_model_name_or_path": "none"}, "needs an encoder"),
        ({"audio_model_name_or_path": "none", "mask_time_prob": 0.1}, "--mask_time_prob has nothing"),
        ({"text_model_name_or_path": "none", "model_name_or_path": "x"}, "has the encoders that it has"),
    ],
)
def test_flags_of_an_encoder_that_is_left_out_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        ModelArguments(**flags)
