# SPDX-License-Identifier: Apache-2.0
"""Tests of train_hf: `main` as the command line calls it, on a tiny corpus with a tiny model.

Order: what a run leaves behind, the flags, kinds of data, starting points, errors before any work.
"""

import json
import logging as python_logging
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tiny import AUDIO_CONFIGS, fit_openmax_by_chance
from tiny_corpus import (
    AUDIO,
    JOINT,
    NAMES,
    WORDS,
    bring,
    parse_strict_json,
    read_rows,
    tiny_flags,
    tiny_model,
    tiny_processor,
    write_table,
)
from transformers import WhisperConfig, WhisperModel, pipeline

import train_hf
from mmser import model_loading, training_run
from mmser.arguments import TRAINING_ARGUMENTS, parse_arguments
from mmser.augmentation import Augmenter
from mmser.caching import EncoderStateCache
from mmser.examples import EmotionDataset
from mmser.model_loading import check_spec_augment, load_model
from mmser.trainer import last_complete_checkpoint
from modeling_mmser import MMSERForAudioClassification
from processing_mmser import MMSERProcessor

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy"}


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def run(corpus, tokenizer, tmp_path):
    """Run `main` with the tiny model into `tmp_path / "out"`; flags are added or changed."""

    def call(*words, **flags):
        flags = {"data_dir": corpus, "output_dir": tmp_path / "out", **flags}
        places = flags.pop("data_dir"), flags.pop("output_dir"), tokenizer
        return train_hf.main([*words, *tiny_flags(*places, **flags)])

    return call


@pytest.fixture(scope="module")
def unjudged(corpus, tmp_path_factory):
    """Flags of the training clips alone: a run that holds none out judges none, which is half of its time."""
    table = tmp_path_factory.mktemp("unjudged") / "train.csv"
    write_table(table, read_rows(corpus, "train"))
    return {"data_dir": None, "manifest": table, "validation_fraction": 0, "test_fraction": 0}


def log_lines(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line for line in history if "loss" in line]


def losses(folder):
    return [line["loss"] for line in log_lines(folder)]


# --- what a run leaves behind ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(corpus, tokenizer, tmp_path_factory):
    """A whole run with checkpoints, open-set clips and a secret: its folder, what `main` returned and printed."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    flags = {
        "max_steps": None,
        "num_train_epochs": 15,
        "eval_strategy": "steps",
        "eval_steps": 20,
        "save_steps": 20,
        "learning_rate": 5e-3,
        "lr_multipliers": {"audio_encoder": 1, "text_encoder": 1},
        "ood_dir": corpus / "ood",
        "save_strategy": "steps",
        "hub_token": "hf_secret",
    }
    results = train_hf.main(tiny_flags(corpus, folder, tokenizer, **flags))
    return folder, results


def test_main_returns_what_it_writes(finished):
    folder, results = finished
    text = (folder / "eval_results.json").read_text()

    written = parse_strict_json(text)
    for split in ("validation", "test"):
        assert set(written[split]) == {"model", "audio_only", "text_only", "linear_probe", "majority"}
        for row, values in results[split].items():
            assert written[split][row]["weighted_f1"] == values["weighted_f1"]
    assert written["label_names"] == NAMES
    assert written["data"]["clips"] == {"train": 32, "validation": 8, "test": 16}
    assert {"openmax", "max_softmax", "energy", "knn", "uncertainty"} <= set(written["open_set"])
    assert written["training"]["skipped_clips"] == 0
    assert results["test"]["model"]["weighted_f1"] > 0.9  # the pitch and the words tell the class
    assert results["test"]["majority"]["accuracy"] == 0.25


def test_the_folder_has_everything_and_no_pickle(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= names
    assert {"configuration_mmser.py", "modeling_mmser.py", "processing_mmser.py"} <= names
    assert {"README.md", "eval_results.json", "training_args.json", "trainer_state.json"} <= names
    assert not [name for name in names if Path(name).suffix in PICKLES]
    checkpoints = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert checkpoints and all(name.startswith("checkpoint-") for name in checkpoints)
    for checkpoint in checkpoints:
        pickles = {path.name for path in (folder / checkpoint).iterdir() if path.suffix in PICKLES}
        assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}  # the state that resuming needs


@pytest.mark.skipif(os.name != "posix", reason="there are no modes")
def test_weights_can_be_read_by_whom_the_umask_lets_read(run, unjudged, tmp_path):
    """Of a group folder: safetensors alone would let their owner alone read them."""
    earlier = os.umask(0o002)
    try:
        flags = {"weight_averaging": 0.5, "adversarial_head": "corpus"}
        flags |= {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"}
        run(**unjudged, **FROZEN, **flags, cache_encoder_states=tmp_path / "states")
    finally:
        os.umask(earlier)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.safetensors")}
    assert set(modes.values()) == {0o664} and len(modes) >= 5  # a model, what it goes on from, states of two kinds


def test_no_secret_is_written(finished):
    folder, _ = finished
    for path in folder.iterdir():
        if path.suffix in (".json", ".md"):
            assert "hf_secret" not in path.read_text(), path


def test_the_model_loads_and_classifies(finished, corpus):
    folder, results = finished
    model = MMSERForAudioClassification.from_pretrained(folder)
    assert model.openmax.is_fitted
    assert model.temperature.item() == pytest.approx(results["calibration"]["temperature"])
    assert model.config.class_counts == [8, 8, 8, 8]
    assert MMSERProcessor.from_pretrained(folder).tokenizer.model_max_length == 16  # the encoder's positions
    classify = pipeline("audio-classification", model=str(folder), trust_remote_code=True)
    clip = {"path": str(corpus / "test" / "5_1.wav"), "text": WORDS["happy"]}
    result = classify(clip, return_uncertainty=True)
    assert result[0]["label"] == "happy" and 0 <= result[0]["uncertainty"] <= 1
    assert sorted(entry["label"] for entry in result) == sorted(NAMES)
    assert sum(entry["score"] for entry in result) == pytest.approx(1, abs=1e-5)


def test_the_best_checkpoint_is_what_is_kept(finished):
    folder, results = finished
    state = json.loads((folder / "trainer_state.json").read_text())
    scores = [line["eval_weighted_f1"] for line in state["log_history"] if "eval_weighted_f1" in line]
    assert len(scores) == 3
    assert state["best_metric"] == max(scores) == pytest.approx(results["validation"]["model"]["weighted_f1"])


def test_the_card_is_filled(finished):
    folder, results = finished
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert card.data.pipeline_tag == "audio-classification"
    assert card.data.eval_results[0].metric_value == round(results["test"]["model"]["weighted_f1"], 4)
    assert "{{" not in card.text and "{%" not in card.text
    assert "train_hf.py --data_dir" in card.text


def test_a_second_call_goes_on_from_the_last_checkpoint(run, unjudged, tmp_path, caplog):
    whole = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no", "save_total_limit": 9}
    whole |= unjudged
    run(**whole)
    expected = losses(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    (tmp_path / "out" / "checkpoint-5").mkdir()  # killed while it was written
    (tmp_path / "out" / "checkpoint-5" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "out" / "trainer_state.json").unlink()
    results = run(**{**whole, "save_total_limit": 1})
    assert f"Resuming from {tmp_path / 'out' / 'checkpoint-4'}." in caplog.text
    assert not (tmp_path / "out" / "checkpoint-4").exists()  # what it went on from has made room for later ones
    assert losses(tmp_path / "out") == pytest.approx(expected, abs=1e-5)
    assert len(expected) == 6 and results["training"]["epoch"] == 1.5


def test_what_is_no_checkpoint_is_told_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(training_run, "load_data", lambda *_: pytest.fail("The data were loaded."))
    with pytest.raises(FileNotFoundError, match=r"--resume_from_checkpoint: .*nowhere is no checkpoint"):
        run(resume_from_checkpoint=tmp_path / "nowhere")


# --- flags -----------------------------------------------------------------------------------------------------------


def test_short_spellings_of_the_flags(monkeypatch):
    monkeypatch.setattr("mmser.training_arguments.processor_has_bf16", lambda: True)
    words = ["--data_dir", "d", "--save_dir", "s", "--epochs", "3", "--batch_size", "5", "--lr", "0.5"]
    words += ["--use_amp", "--no_augment", "--use_cpu"]
    _, data, training = parse_arguments(TRAINING_ARGUMENTS, words)
    assert (data.data_dir, data.augment) == ("d", False)
    assert (training.output_dir, training.num_train_epochs, training.per_device_train_batch_size) == ("s", 3, 5)
    assert (training.learning_rate, training.use_amp, training.bf16) == (0.5, True, True)
    assert parse_arguments(TRAINING_ARGUMENTS, ["--augment", "--use_cpu"])[1].augment is True


def test_flags_win_over_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.json"
    content = {"data_dir": "d", "lr": 0.5, "epochs": 3, "use_cpu": True, "augment": False, "labels": ["a", "b"]}
    recipe.write_text(json.dumps({**content, "config_overrides": {"feature_size": 7}}))
    model, data, training = parse_arguments(TRAINING_ARGUMENTS, [str(recipe), "--epochs", "9"])
    assert (data.data_dir, data.augment, data.labels) == ("d", False, ["a", "b"])
    assert (training.learning_rate, training.num_train_epochs) == (0.5, 9)
    assert model.config_overrides == {"feature_size": 7}
    for wrong in ("learning_rat", "no_augment"):
        recipe.write_text(json.dumps({wrong: True}))
        with pytest.raises(ValueError, match=f"recipe.json has the unknown key {wrong}: did you mean"):
            parse_arguments(TRAINING_ARGUMENTS, [str(recipe)])


def test_the_recipes_parse():
    recipes = sorted((Path(train_hf.__file__).parent / "recipes").glob("*.json"))
    assert recipes
    for recipe in recipes:
        parse_arguments(TRAINING_ARGUMENTS, [str(recipe), "--use_cpu"])


def test_overrides_without_a_random_encoder_are_an_error():
    with pytest.raises(ValueError, match="add --random_audio_encoder"):
        parse_arguments(TRAINING_ARGUMENTS, ["--audio_config_overrides", '{"hidden_size": 16}'])


@pytest.mark.parametrize(
    "words",
    [
        ["--random_audio_encoder"],
        ["--random_text_encoder"],
        ["--random_audio_encoder", "--audio_config_overrides", '{"hidden_size": 16}'],
        ["--tokenizer_name", "somewhere"],
    ],
)
def test_flags_for_a_new_model_are_refused_when_going_on(checkpoint, words):
    with pytest.raises(ValueError, match=f"{words[0]} is for a new model"):
        parse_arguments(TRAINING_ARGUMENTS, ["--model_name_or_path", str(checkpoint), "--use_cpu", *words])


@pytest.mark.parametrize("kind", ["audio", "text"])
def test_a_misspelt_field_of_a_random_encoder_is_refused(kind):
    words = [f"--random_{kind}_encoder", f"--{kind}_config_overrides", '{"hiden_size": 16}', "--use_cpu"]
    arguments, _, _ = parse_arguments(TRAINING_ARGUMENTS, words)
    with pytest.raises(
        ValueError, match=f"--{kind}_config_overrides: `hiden_size` is no .*did you mean `hidden_size`"
    ):
        model_loading.random_encoder_config(kind, arguments)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--augmented_copies", "2"], "--augmented_copies has no effect without --cache_encoder_states"),
        (["--augmented_copies", "2", "--cache_encoder_states", "states"], None),
        (["--random_audio_encoder", "--standardize_clips", "9"], "--standardize_clips has no effect"),
        (["--standardize_clips", "9"], None),
        (["--text_model_name_or_path", "none", "--text_dropout", "0.5"], "--text_dropout has no effect"),
        (["--audio_model_name_or_path", "none", "--audio_dropout", "0.5"], "--audio_dropout has no effect"),
        (["--text_dropout", "0.5", "--audio_dropout", "0.5"], None),
        (["--text_model_name_or_path", "none", "--random_audio_encoder"], None),
    ],
)
def test_a_setting_without_effect_is_told(caplog, words, said):
    model_arguments, data_arguments, _ = parse_arguments(TRAINING_ARGUMENTS, [*words, "--use_cpu"])
    training_run.warn_of_moot_settings(model_arguments, data_arguments)
    assert caplog.text.count("has no effect") == bool(said) and (said or "") in caplog.text


def test_the_layers_of_an_encoder_can_be_cut_only_when_it_starts_pretrained(corpus, tokenizer, unjudged, tmp_path):
    torch.manual_seed(0)
    sizes = {"encoder_layers": 3, "num_mel_bins": 16, "max_source_positions": 64}
    encoder = WhisperModel(WhisperConfig(**{**AUDIO_CONFIGS["whisper"], **sizes}))
    encoder.save_pretrained(tmp_path / "whisper")
    tiny_processor(whisper=True).feature_extractor.save_pretrained(tmp_path / "whisper")
    random_audio = {"random_audio_encoder": None, "audio_config_overrides": None}
    flags = {"audio_model_name_or_path": tmp_path / "whisper", "audio_num_hidden_layers": 2, **random_audio}
    flags |= {**unjudged, "max_seconds": 1, "max_steps": 1, "freeze_audio": True}
    train_hf.main(tiny_flags(corpus, tmp_path / "out", tokenizer, **flags))
    model = MMSERForAudioClassification.from_pretrained(tmp_path / "out")
    assert len(model.mmser.audio_encoder.layers) == model.config.audio_config.encoder_layers == 2
    for name, weight in model.mmser.audio_encoder.state_dict().items():
        assert torch.equal(weight, encoder.encoder.state_dict()[name]), name
    for norm in (model.mmser.state_norm, model.mmser.fusion.audio_norm, model.mmser.fusion.text_norm):
        assert norm.mean.any() and (norm.scale != 1).any()  # standardised, as every pretrained encoder
    for kind in ("audio", "text"):
        for flag in (["--model_name_or_path", "somewhere"], [f"--random_{kind}_encoder"]):
            with pytest.raises(ValueError, match=f"--{kind}_num_hidden_layers cuts a pretrained {kind} encoder"):
                parse_arguments(TRAINING_ARGUMENTS, [f"--{kind}_num_hidden_layers", "2", "--use_cpu", *flag])


def test_the_attention_of_all_parts_can_be_chosen_and_changes_little(run, unjudged, monkeypatch):
    implementations, results = {}, {}

    def remember(arguments, *others, **options):
        model = load_model(arguments, *others, **options)
        configs = (model.config, model.config.audio_config, model.config.text_config)
        implementations[arguments.attn_implementation] = {config._attn_implementation for config in configs}
        return model

    monkeypatch.setattr(model_loading, "load_model", remember)
    for name in ("sdpa", "eager"):
        results[name] = run("--overwrite_output_dir", **unjudged, attn_implementation=name)
    assert implementations == {"sdpa": {"sdpa"}, "eager": {"eager"}}
    losses = [results[name]["training"]["train_loss"] for name in ("sdpa", "eager")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_spec_augment_can_be_set_for_any_encoder_that_learns(run, unjudged, tmp_path):
    flags = {"apply_spec_augment": True, "mask_time_prob": 0.3, "mask_feature_prob": 0.2, "mask_feature_length": 4}
    run(**unjudged, **flags, max_steps=1)
    config = MMSERForAudioClassification.from_pretrained(tmp_path / "out").config.audio_config
    assert {name: getattr(config, name) for name in flags} == flags
    with pytest.raises(ValueError, match="no effect with --freeze_audio"):
        parse_arguments(TRAINING_ARGUMENTS, ["--mask_time_prob", "0.1", "--freeze_audio", "--use_cpu"])


def test_spec_augment_that_cannot_work_is_an_error_and_what_it_lacks_is_made():
    whisper = tiny_model(whisper=True)
    whisper.config.audio_config.mask_time_prob = 0.1
    with pytest.raises(ValueError, match="no effect without --apply_spec_augment"):
        check_spec_augment(whisper)
    model = tiny_model()
    encoder, config = model.mmser.audio_encoder, model.config.audio_config
    del encoder.masked_spec_embed  # as where the share was 0 when it was made
    config.mask_time_prob = 0.1
    check_spec_augment(model)
    assert encoder.masked_spec_embed.shape == (config.hidden_size,) and encoder.masked_spec_embed.requires_grad


FROZEN = {"freeze_audio": True, "freeze_text": True}


def scores(results):
    """All numbers of a split's rows, by name: scores and entries of the confusion matrix."""
    numbers = {}
    for row, values in results.items():
        for name, value in values.items():
            if isinstance(value, (int, float)):
                numbers[row, name] = value
        for i, counts in enumerate(values.get("confusion_matrix", ())):
            numbers |= {(row, i, j): count for j, count in enumerate(counts)}
    return numbers


def test_cached_states_give_the_scores_of_a_run_without_cache(run, finished, corpus, tmp_path, monkeypatch):
    """Also a second run, which encodes nothing; for the whole model, the open set and each modality alone."""
    flags = {**continued(finished[0]), **FROZEN, "learning_rate": 1e-4, "max_steps": 4, "ood_dir": corpus / "ood"}
    expected = run("--no_augment", **flags)
    plain_losses, encoded, encode = losses(tmp_path / "out"), [], EncoderStateCache.encode
    monkeypatch.setattr(
        EncoderStateCache,
        "encode",
        lambda self, kind, clips: (encoded.append(len(clips)), encode(self, kind, clips))[1],
    )
    for number_encoded in (32 + 8 + 16 + 6 + 4, 0):  # clips and sentences
        encoded.clear()
        results = run("--overwrite_output_dir", "--no_augment", **flags, cache_encoder_states=tmp_path / "cache")
        assert sum(encoded) == number_encoded
        assert losses(tmp_path / "out") == pytest.approx(plain_losses, abs=2e-3)
        for split in ("validation", "test"):
            assert scores(results[split]) == pytest.approx(scores(expected[split]), abs=5e-3, nan_ok=True), split
        known, reference = (r["open_set"]["max_softmax"] for r in (results, expected))
        assert known["auroc"] == pytest.approx(reference["auroc"], abs=0.02) and known["clips"] == reference["clips"]
    model = MMSERForAudioClassification.from_pretrained(tmp_path / "out")
    assert not [name for name in model.state_dict() if "states" in name]  # it takes audio, as any other


@pytest.mark.parametrize("copies", [None, 2])
def test_augmented_copies_in_the_cache(run, unjudged, tmp_path, caplog, copies):
    with caplog.at_level(python_logging.INFO, logger="mmser.caching"):
        flags = {**unjudged, **FROZEN, "max_steps": 1}
        run(**flags, cache_encoder_states=tmp_path / "cache", augmented_copies=copies)
    lines = [record.getMessage() for record in caplog.records if record.name == "mmser.caching"]
    assert any(
        f"Encoder states of 32 clips: {32 * (copies or 4)} of audio encoded, 0 reused" in line for line in lines
    )
    states = {path.parent.name.split("-")[0] for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert states == {"audio", "text"}


def test_what_cannot_be_cached_is_refused(run, corpus, checkpoint, tmp_path):
    cache = {"cache_encoder_states": tmp_path / "cache"}
    with pytest.raises(ValueError, match="States can only be kept of encoders that are frozen"):
        run(**cache)
    overrides = {**JOINT, "distillation_loss_weight": 0.5}
    with pytest.raises(ValueError, match="the audio encoder must be frozen too: add --freeze_audio"):
        run(**cache, freeze_text=True, teacher_name_or_path=checkpoint, config_overrides=overrides)
    for split in ("train", "validation"):
        write_table(tmp_path / "data" / f"{split}.csv", read_rows(corpus, split))
    with pytest.raises(ValueError, match="it cannot with --streaming"):
        run(data_dir=None, dataset_name=tmp_path / "data", streaming=True, **FROZEN, **cache)
    assert not (tmp_path / "cache").exists()


def test_a_recipe_runs_with_amp_frozen_encoders_and_supervised_contrast(run, unjudged, monkeypatch, tmp_path):
    monkeypatch.setattr("mmser.training_arguments.processor_has_bf16", lambda: True)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"freeze_audio": True, "freeze_text": True, "use_amp": True, "augment": False}))
    overrides = {**JOINT, "supervised_contrastive_loss_weight": 0.1}
    results = run(str(recipe), **unjudged, config_overrides=overrides, max_steps=3)
    parameters = {row["part"]: row["trainable"] for row in results["parameters"]}
    assert parameters["audio_encoder"] == parameters["text_encoder"] == 0 < parameters["fusion"]
    lines = log_lines(tmp_path / "out")
    assert len(lines) == 3 and all(line["loss_supervised_contrastive"] > 0 for line in lines)
    assert json.loads((tmp_path / "out" / "training_args.json").read_text())["bf16"] is True


def test_freezing_the_feature_encoder_alone(run, unjudged):
    results = run(**unjudged, freeze_feature_encoder=True, max_steps=1)
    parameters = {row["part"]: row for row in results["parameters"]}
    assert 0 < parameters["audio_encoder"]["trainable"] < parameters["audio_encoder"]["parameters"]


def test_freezing_the_first_layers_of_the_audio_encoder(run, unjudged, tmp_path):
    two_layers = {**AUDIO, "num_hidden_layers": 2}
    results = run(**unjudged, freeze_audio_layers=1, audio_config_overrides=two_layers, max_steps=2)
    trained = next(row["trainable"] for row in results["parameters"] if row["part"] == "audio_encoder")
    model = MMSERForAudioClassification.from_pretrained(tmp_path / "out")
    own = sum(parameter.numel() for parameter in model.mmser.audio_encoder.encoder.layers[1].parameters())
    assert trained == own > 0
    identity = json.loads((tmp_path / "out" / "run_identity.json").read_text())
    assert identity["fixed"]["frozen"] == ["1 audio layers"]
    no_audio = {"audio_model_name_or_path": "none", "random_audio_encoder": None, "audio_config_overrides": None}
    for also in ({"freeze_audio": True}, {"lora_rank": 2}, no_audio):
        with pytest.raises(ValueError, match="freeze_audio_layers"):
            run(**unjudged, freeze_audio_layers=1, **also)
    with pytest.raises(ValueError, match="freeze_audio_layers has nothing to act on"):
        run(**unjudged, freeze_audio_layers=0, **no_audio)


def test_augmentation_changes_the_clips_and_can_be_switched_off(run, tmp_path, monkeypatch):
    made = []
    original = EmotionDataset

    def remember(*args, **kwargs):
        made.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr("mmser.training_run.EmotionDataset", remember)
    run(max_steps=1, text_dropout=0.3, audio_dropout=0.2, max_seconds=0.3, seed=7)
    training = [kwargs for kwargs in made if kwargs.get("training")]
    assert len(training) == 1 and training[0]["augmenter"] == Augmenter(effects=("speed", "noise"))
    assert (training[0]["text_dropout"], training[0]["audio_dropout"]) == (0.3, 0.2)
    assert all(kwargs["max_seconds"] == 0.3 and kwargs["seed"] == 7 for kwargs in made)
    assert all("augmenter" not in kwargs for kwargs in made if not kwargs.get("training"))

    def stop(*_):
        raise InterruptedError("all is made")

    monkeypatch.setattr(training_run, "train", stop)
    chosen = ["--augmentations", "speed", "level"], Augmenter(effects=("speed", "level"))
    for words, augmenter in (chosen, (["--no_augment"], None)):
        made.clear()
        with pytest.raises(InterruptedError):
            run("--overwrite_output_dir", *words)
        assert [kwargs["augmenter"] for kwargs in made if kwargs.get("training")] == [augmenter]


def test_the_run_tells_what_it_does(run, corpus, tmp_path, caplog, capsys):
    with caplog.at_level(python_logging.INFO, logger="root"):
        run(max_steps=1)
    assert "Training clips per class: neutral 8, happy 8, sad 8, angry 8\n" in caplog.text
    assert re.search(r"Parameters: [\d,]+, of which [\d,]+ are trained\n", caplog.text)
    assert "Parameter group" not in caplog.text and "| part" not in caplog.text  # details are for --log_level debug
    printed = capsys.readouterr().out
    assert f"mmser eval --checkpoint {tmp_path / 'out'} --data_dir {corpus}\n" in printed
    assert "Summary\n| split" in printed and "linear_probe" in printed and "README.md (the model card)" in printed


# --- kinds of data ---------------------------------------------------------------------------------------------------


def test_class_counts_come_from_the_training_set(run, corpus, tmp_path):
    rows = [
        row for row in read_rows(corpus, "train", "validation") if row["split"] != "train" or row["label"] != "sad"
    ]
    rows += [row for row in read_rows(corpus, "train") if row["label"] == "sad"][:3]
    write_table(tmp_path / "all.csv", rows)
    run(data_dir=None, manifest=tmp_path / "all.csv", max_steps=1)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["class_counts"] == [8, 8, 3, 8]
    assert config["id2label"] == {str(index): name for index, name in enumerate(NAMES)}


def test_a_manifest_without_splits_is_split_by_speaker(run, corpus, tmp_path):
    rows = read_rows(corpus, "train", "validation", "test")
    write_table(tmp_path / "all.csv", [{key: value for key, value in row.items() if key != "split"} for row in rows])
    results = run(data_dir=None, manifest=tmp_path / "all.csv", max_steps=1)
    assert sum(results["data"]["clips"].values()) == len(rows)
    assert min(results["data"]["clips"].values()) >= 8
    assert not results["data"]["overlap"]
    assert "none in two splits" in (tmp_path / "out" / "README.md").read_text()


def test_nothing_held_out(run, corpus, tmp_path):
    write_table(tmp_path / "all.csv", read_rows(corpus, "train"))
    flags = {"validation_fraction": 0, "test_fraction": 0, "save_strategy": "epoch"}
    results = run(data_dir=None, manifest=tmp_path / "all.csv", **flags)
    assert results["calibration"] == {"temperature": 1.0}
    assert "validation" not in results and "test" not in results
    card = (tmp_path / "out" / "README.md").read_text()
    assert "nothing was measured" in card and "{{" not in card
    assert ModelCard.load(tmp_path / "out" / "README.md", ignore_metadata_errors=False).data.eval_results is None


def test_without_a_test_split_the_validation_split_is_reported(run, corpus, tmp_path):
    write_table(tmp_path / "all.csv", read_rows(corpus, "train", "validation"))
    results = run(data_dir=None, manifest=tmp_path / "all.csv", ood_dir=corpus / "ood")
    assert "test" not in results and results["open_set"]["max_softmax"]["clips"] == 8 + 6
    card = ModelCard.load(tmp_path / "out" / "README.md", ignore_metadata_errors=False)
    assert card.data.eval_results[0].metric_value == round(results["validation"]["model"]["weighted_f1"], 4)
    assert "F1 of each class on the validation split" in card.text


@pytest.mark.parametrize("kept", ["file_name", "transcription"])
def test_one_modality_alone(kept, run, corpus, tmp_path):
    rows = read_rows(corpus, "train", "validation", "test")
    columns = (kept, "label", "speaker", "split")
    write_table(tmp_path / "all.csv", [{column: row[column] for column in columns} for row in rows])
    only = {"ood_dir": corpus / "ood"} if kept == "file_name" else {"audio_column": "none", "ood_dir": None}
    results = run(data_dir=None, manifest=tmp_path / "all.csv", **only)
    assert set(results["test"]) == {"model", "linear_probe", "majority"}
    assert "by_language" not in results["test"]["model"]
    assert len(losses(tmp_path / "out")) == 2
    assert "{{" not in (tmp_path / "out" / "README.md").read_text()


def test_without_an_accelerator_no_memory_is_pinned(monkeypatch):
    """torch would warn of it in each loader, and nobody could do anything about that."""
    monkeypatch.setattr("mmser.training_arguments.has_accelerator", lambda: False)
    assert parse_arguments(TRAINING_ARGUMENTS, [])[2].dataloader_pin_memory is False


def test_unreadable_clips_are_skipped_and_counted(run, corpus, tmp_path):
    broken = tmp_path / "corpus"
    shutil.copytree(corpus, broken)
    for name in ("train/0_0.wav", "train/1_3.wav", "test/5_0.wav", "test/5_1.wav", "test/5_2.wav", "ood/0.wav"):
        (broken / name).write_bytes(b"not a sound")
    flags = {"data_dir": broken, "ood_dir": broken / "ood", "per_device_eval_batch_size": 2}
    with pytest.raises(ValueError, match=r"train/metadata.csv row 2: audio '\S*0_0.wav': cannot be read"):
        run(**flags)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    with pytest.raises(ValueError, match=r"[45] bad rows of 62 are more (.|\n)*out/bad_examples.csv"):
        run(**flags, on_bad_example="skip", max_bad_examples=0.05)
    results = run(**flags, on_bad_example="skip")
    listed = (tmp_path / "out" / "bad_examples.csv").read_text().splitlines()
    assert len(listed) == 1 + 6 and "0_0.wav" in listed[1] and "ood" in listed[-1]
    assert results["training"]["skipped_clips"] == 5
    assert results["data"]["clips"] == {"train": 30, "validation": 8, "test": 13}
    assert results["test"]["model"]["clips"] == results["test"]["majority"]["clips"] == 13
    assert results["open_set"]["max_softmax"]["clips"] == 13 + 5
    assert sum(group["count"] for group in results["test"]["model"]["by_language"].values()) == 13
    assert json.loads((tmp_path / "out" / "config.json").read_text())["class_counts"] == [7, 8, 8, 7]


def test_the_same_command_again_evaluates_and_keeps_what_was_measured(run, tmp_path, caplog):
    whole = {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1}
    first = run(**whole)
    with caplog.at_level(python_logging.INFO):
        again = run(**whole)
    assert "The run is finished (1 of 1 epochs): it is evaluated again. More --epochs trains on." in caplog.text
    assert again["training"] == first["training"]  # no step was run: nothing new was measured
    assert again["test"]["model"]["confusion_matrix"] == first["test"]["model"]["confusion_matrix"]
    last = last_complete_checkpoint(tmp_path / "out")
    assert run(**whole, resume_from_checkpoint=last + "/")["training"] == first["training"]
    caplog.clear()
    anew = run("--overwrite_output_dir", **whole)
    assert "The run is finished" not in caplog.text
    assert anew["training"]["train_runtime"] != first["training"]["train_runtime"]


def test_a_training_split_that_is_not_there_is_named_before_a_model_is_built(run, corpus, tmp_path, monkeypatch):
    shutil.copytree(corpus, tmp_path / "data")
    (tmp_path / "data" / "train" / "metadata.csv").rename(tmp_path / "data" / "train" / "metadata.xlsx")
    monkeypatch.setattr("mmser.model_loading.load_processor", None)
    with pytest.raises(ValueError, match=r"data has no training split.*it has validation, test.*--train_split"):
        run(data_dir=tmp_path / "data")


def test_sample_limits(run):
    results = run(max_train_samples=12, max_eval_samples=5)
    assert results["data"]["clips"] == {"train": 12, "validation": 5, "test": 5}
    assert results["test"]["model"]["clips"] == 5


@pytest.fixture
def streamed(corpus, tmp_path):
    data = tmp_path / "data"
    for split in ("train", "validation"):  # nothing says what paths of such a table are relative to
        rows = bring(read_rows(corpus, split), data)
        write_table(data / f"{split}.csv", [{**row, "file_name": str(data / row["file_name"])} for row in rows])
    return data


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_stream_goes_on_where_it_was_stopped(run, streamed, tmp_path, strategy):
    """In the first pass, at its end and in a later one, which the steps alone do not tell: a pass is four steps."""
    steps = {"steps": (2, 4, 6), "epoch": (8,)}[strategy]
    flags = {"data_dir": None, "dataset_name": streamed, "streaming": True, "save_steps": 2, "save_total_limit": 9}
    flags |= {
        "max_steps": steps[-1] + 1,
        "eval_strategy": "epoch",
        "save_strategy": strategy,
        "load_best_model_at_end": False,
    }
    run(**flags)

    def log(folder):
        lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        times = ("runtime", "per_second")
        return [{name: line[name] for name in line if not name.endswith(times)} for line in lines]

    for step in steps:
        stopped = tmp_path / f"stopped at {step}"
        stopped.mkdir()
        shutil.copy(tmp_path / "out" / "run_identity.json", stopped)
        shutil.copytree(tmp_path / "out" / f"checkpoint-{step}", stopped / f"checkpoint-{step}")
        run(**flags, output_dir=stopped)
        assert log(stopped) == log(tmp_path / "out"), step


def test_a_streamed_data_set(run, streamed, tmp_path):
    data = streamed
    with open(data / "train.csv", "a", encoding="utf-8") as file:
        file.write(f"{data / 'gone.wav'},happy,words,one,en,sine,train\n")
    flags = {"data_dir": None, "dataset_name": tmp_path / "data", "streaming": True, "max_steps": 6}
    results = run(**flags, on_bad_example="skip", text_dropout=0, audio_dropout=0)
    assert len(losses(tmp_path / "out")) == 6
    assert results["training"]["skipped_clips"] == 2  # once in each pass
    assert results["validation"]["model"]["clips"] == 8
    assert json.loads((tmp_path / "out" / "config.json").read_text())["class_counts"] is None
    assert "clips for training were streamed" in (tmp_path / "out" / "README.md").read_text()


# --- starting points -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A finished checkpoint with class counts, a temperature and a fitted OpenMax of its own."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint") / "earlier"
    model = tiny_model(class_counts=[1, 2, 3, 4])
    fit_openmax_by_chance(model)
    model.temperature.fill_(2.0)
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def continued(checkpoint):
    """Flags for going on from `checkpoint`: its architecture is its own."""
    architecture = ("tokenizer_name", "random_audio_encoder", "audio_config_overrides", "random_text_encoder")
    none = dict.fromkeys((*architecture, "text_config_overrides", "config_overrides"))
    return {**none, "model_name_or_path": checkpoint}


def test_going_on_from_a_checkpoint_keeps_its_weights(run, checkpoint, tmp_path):
    results = run(**continued(checkpoint), learning_rate=0.0, max_steps=1)
    earlier = MMSERForAudioClassification.from_pretrained(checkpoint)
    later = MMSERForAudioClassification.from_pretrained(tmp_path / "out")
    for (name, before), after in zip(earlier.named_parameters(), later.parameters(), strict=True):
        assert torch.equal(before, after), name
    assert later.config.class_counts == [8, 8, 8, 8]
    assert later.temperature.item() == pytest.approx(results["calibration"]["temperature"])
    assert results["encoders"] == {"audio": "as in earlier", "text": "as in earlier"}


@pytest.mark.parametrize("goes_on", [True, False])
def test_two_of_four_names(run, corpus, checkpoint, tmp_path, goes_on):
    rows = [row for row in read_rows(corpus, "train", "validation", "test") if row["label"] in ("happy", "sad")]
    write_table(tmp_path / "all.csv", rows)
    source = {"data_dir": None, "manifest": tmp_path / "all.csv", "max_steps": 1}
    results = run(**(continued(checkpoint) if goes_on else {}), **source)
    names = NAMES if goes_on else ["happy", "sad"]  # an earlier model keeps what it knows
    assert results["label_names"] == names
    model = MMSERForAudioClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == dict(enumerate(names)) and model.classifier.output.out_features == len(names)
    assert model.config.class_counts == ([0, 8, 8, 0] if goes_on else [8, 8])


def test_going_on_with_another_label_set(run, corpus, checkpoint, tmp_path):
    rows = [row for row in read_rows(corpus, "train", "validation", "test") if row["label"] != "angry"]
    renamed = {"neutral": "calm", "happy": "glad", "sad": "blue"}
    write_table(tmp_path / "all.csv", [{**row, "label": renamed[row["label"]]} for row in rows])
    source = {"data_dir": None, "manifest": tmp_path / "all.csv"}
    results = run(**continued(checkpoint), **source, learning_rate=0.0)
    assert results["label_names"] == ["blue", "calm", "glad"]
    model = MMSERForAudioClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "blue", 1: "calm", 2: "glad"}
    assert model.config.class_counts == [8, 8, 8]
    assert model.classifier.output.out_features == 3
    assert not model.openmax.is_fitted or model.openmax.weibull_shape.shape == (3,)
    earlier = MMSERForAudioClassification.from_pretrained(checkpoint)
    assert torch.equal(model.classifier.feature_projection.weight, earlier.classifier.feature_projection.weight)
    arguments, _, _ = parse_arguments(TRAINING_ARGUMENTS, ["--model_name_or_path", str(checkpoint), "--use_cpu"])
    started = load_model(arguments, ["a", "b", "c"], MMSERProcessor.from_pretrained(checkpoint))
    assert started.config.class_counts is None and started.config.num_labels == 3  # a stream's clips cannot be counted


@pytest.fixture(scope="module", params=[False, True], ids=["one", "averaged"])
def going_on(request, checkpoint, tmp_path_factory):
    """What goes on from `checkpoint`, or from its mean with another: flags, processor, the model with its classes."""
    words = ["--model_name_or_path", str(checkpoint), "--use_cpu"]
    words += ["--average_with", save_another(tmp_path_factory.mktemp("other"), 5)] if request.param else []
    processor = MMSERProcessor.from_pretrained(checkpoint)
    arguments, _, _ = parse_arguments(TRAINING_ARGUMENTS, words)
    return arguments, processor, load_model(arguments, NAMES, processor)


@pytest.mark.parametrize(
    ("names", "places"),
    [
        (["angry", "sad", "happy", "neutral"], [3, 2, 1, 0]),
        (["calm", "joy", "grief", "rage"], [None] * 4),
        (["Sad", "joy", "neutral"], [2, None, 0]),
        ([*NAMES, "fear"], [0, 1, 2, 3, None]),
        (["neutral", "Happy", "sad", "angry"], [0, 1, 2, 3]),
    ],
)
def test_a_class_keeps_its_weights_at_its_new_id(going_on, tmp_path, caplog, names, places):
    arguments, processor, earlier = going_on
    with caplog.at_level(python_logging.INFO, logger="mmser"):
        model = load_model(arguments, names, processor)
    is_same = places == [0, 1, 2, 3]
    assert model.config.id2label == dict(enumerate(names)) and model.config.num_labels == len(names)
    assert model.config.label2id == {name: index for index, name in enumerate(names)}
    heads = ("classifier.output.weight", "classifier.output.bias", "anchors.anchors", "prototypes.prototypes")
    before, after = earlier.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        if name in heads:
            assert len(after[name]) == len(names)
            for index, place in enumerate(places):
                if place is not None:
                    assert torch.equal(after[name][index], before[name][place]), name
                elif not name.endswith("bias"):
                    assert all(not torch.equal(after[name][index], row) for row in before[name]), name
        elif is_same or not name.startswith("openmax."):
            assert torch.equal(after[name], before[name]), name
    assert model.openmax.is_fitted == is_same and model.openmax.fitted.shape == (len(names),)
    kept = [name for name, place in zip(names, places, strict=True) if place is not None]
    anew = [name for name in names if name not in kept]
    said = f"kept: of {', '.join(kept) or 'none'}; started anew: of {', '.join(anew) or 'none'}."
    assert (said in caplog.text) != is_same
    model.save_pretrained(tmp_path / "saved")
    again = MMSERForAudioClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.classifier.output.weight, model.classifier.output.weight)


def save_another(folder, seed, **overrides):
    """A checkpoint with the architecture of `checkpoint` and other weights."""
    torch.manual_seed(seed)
    tiny_model(**overrides).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


def test_averaged_checkpoints_are_the_mean_of_all(run, unjudged, checkpoint, tmp_path):
    others = [save_another(tmp_path / str(seed), seed) for seed in (5, 6)]
    run("--average_with", *others, **unjudged, **continued(checkpoint), learning_rate=0.0, max_steps=1)
    weights = [
        dict(MMSERForAudioClassification.from_pretrained(name).named_parameters()) for name in (checkpoint, *others)
    ]
    later = MMSERForAudioClassification.from_pretrained(tmp_path / "out")
    for name, parameter in later.named_parameters():
        mean = torch.stack([own[name].double() for own in weights]).mean(dim=0)
        torch.testing.assert_close(parameter, mean.float(), atol=1e-6, rtol=0, msg=name)
    assert not torch.equal(
        weights[0]["classifier.blocks.0.down.weight"], weights[1]["classifier.blocks.0.down.weight"]
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"classifier_num_layers": 1}, "weights are not in both with the same shape, such as"),
        ({"fusion_hidden_size": 24}, "weights are not in both with the same shape, such as"),
        ({"id2label": {0: "sad", 1: "neutral", 2: "happy", 3: "angry"}}, "its labels are {0: 'sad'"),
    ],
)
def test_what_cannot_be_averaged_is_named(run, checkpoint, tmp_path, overrides, said):
    other = save_another(tmp_path / "other", 5, **overrides)
    with pytest.raises(ValueError, match=re.escape(f"{other} cannot be averaged with {checkpoint}: ")) as raised:
        run("--average_with", other, **continued(checkpoint))
    assert said in str(raised.value)


def test_averaging_needs_a_first_checkpoint(run, checkpoint):
    with pytest.raises(ValueError, match="add --model_name_or_path"):
        run("--average_with", str(checkpoint))


def test_distillation_from_a_teacher(run, unjudged, checkpoint, tmp_path):
    """Live, and with its logits in the cache: the same losses."""
    overrides = {**JOINT, "distillation_loss_weight": 0.5}
    flags = {**unjudged, **FROZEN, "config_overrides": overrides, "teacher_name_or_path": checkpoint}
    run("--no_augment", **flags)
    live = losses(tmp_path / "out")
    assert all(line["loss_distillation"] > 0 for line in log_lines(tmp_path / "out"))
    run("--no_augment", "--overwrite_output_dir", **flags, cache_encoder_states=tmp_path / "cache")
    assert losses(tmp_path / "out") == pytest.approx(live, abs=2e-3)
    assert [path.name for path in (tmp_path / "cache").glob("teacher-*/*.safetensors")]


def test_a_teacher_of_other_labels_or_another_tokenizer_is_refused(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("mmser.training_run.make_trainer", lambda *_: pytest.fail("Training was prepared."))
    flags = {"config_overrides": {**JOINT, "distillation_loss_weight": 0.5}, "teacher_name_or_path": checkpoint}
    with pytest.raises(ValueError, match=r"labels: .*'neutral', 'happy', 'sad', 'angry'.* \(teacher\)"):
        run("--labels", *reversed(NAMES), **flags)
    processor = tiny_processor()
    processor.tokenizer.add_tokens(["more"])
    processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer: 17 tokens .* \(teacher\), 18 tokens .* \(model\)"):
        run(**{**flags, "tokenizer_name": tmp_path / "tokenizer"})


# --- errors before any work ------------------------------------------------------------------------------------------


def test_errors_come_before_any_work(run, corpus, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was built")

    monkeypatch.setattr(model_loading, "load_model", refuse)
    rows = read_rows(corpus, "train", "validation")
    manifest = tmp_path / "all.csv"

    def error_of(changed, message, **flags):
        write_table(manifest, changed)
        with pytest.raises(ValueError, match=message):
            run(data_dir=None, manifest=manifest, **flags)

    error_of(rows, "no label column 'mood'", label_column="mood")
    error_of([{**rows[0], "file_name": "gone.wav"}, *rows[1:]], r"all.csv row 2: audio file .*gone.wav does not exist")
    error_of([{**row, "speaker": "one"} for row in rows], "are in more than one split: sine/one")
    error_of([{**rows[0], "label": 4}, *rows[1:]], r"some are numbers, '4' \(1 row, first all.csv row 2\)")
    with pytest.raises(ValueError, match="give a source of data"):
        run(data_dir=None)
    assert not (tmp_path / "out").exists()


def test_the_command_line(tmp_path, monkeypatch, capsys):
    """As a program, with its arguments from the command line."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["train_hf.py", "--data_dir", str(tmp_path / "empty"), "--use_cpu"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(train_hf.__file__, run_name="__main__")
    assert ended.value.code == 2
    assert f"error: {tmp_path}/empty has no metadata" in capsys.readouterr().err
