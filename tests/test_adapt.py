# SPDX-License-Identifier: Apache-2.0
"""Tests of `train_hf.py --adapt`, `mmser/adaptation.py` and `mmser/adapted_layers.py`: fits, rehearsal, the whole
command, refusals."""

import copy
import json

import numpy as np
import pytest
import tiny_corpus
import torch
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression
from tiny import fit_openmax_by_chance, tiny_model
from tiny_corpus import NAMES, WORDS, read_rows, tiny_flags, write_table
from transformers import pipeline

import train_hf
from mmser import adaptation
from mmser.adapted_layers import (
    LEARNING_RATE,
    STEPS,
    ClassifierFit,
    OutputFit,
    OutputLayer,
    Rehearsed,
    cross_fit,
    fit_output_layer,
    output_layer_of,
    scaled_centroids,
    what_it_knew,
)
from mmser.arguments import EVALUATION_ARGUMENTS, TRAINING_ARGUMENTS, parse_arguments
from mmser.calibration import folds_by_group
from mmser.evaluation_run import load_clips
from mmser.model_calibration import fit_openmax
from modeling_mmser import MMSERForAudioClassification
from quantization_mmser import quantize_dynamic

pytestmark = pytest.mark.usefixtures("quiet")
SIZE = 6


@pytest.fixture
def clips():
    """60 feature vectors of unequal classes, and their labels."""
    rng = np.random.default_rng(0)
    labels = rng.choice(4, 60, p=[0.5, 0.2, 0.2, 0.1])
    return rng.normal(0, 1, (60, SIZE)) + np.eye(4, SIZE)[labels], labels


# --- the fit ---------------------------------------------------------------------------------------------------------


def test_from_nothing_it_is_scikit_learns_balanced_logistic_regression(clips):
    features, labels = clips
    start = OutputLayer(np.zeros((4, SIZE)), np.zeros(4))
    layer = fit_output_layer(start, features, labels, strength=2.0)
    inputs = np.column_stack([features, np.ones(60)])  # the bias has the prior too
    inverse = 2.0**2 / np.square(inputs).sum(axis=1).mean()
    reference = LogisticRegression(C=inverse, class_weight="balanced", fit_intercept=False, tol=1e-8, max_iter=5000)
    reference.fit(inputs, labels)
    # The sum of the rows over classes has no effect on the answers, and the prior makes it 0
    np.testing.assert_allclose(np.column_stack(layer), reference.coef_, atol=2e-4)


def test_the_layer_stays_near_where_it_started(clips):
    features, labels = clips
    rng = np.random.default_rng(1)
    start = OutputLayer(rng.normal(0, 1, (4, SIZE)), rng.normal(0, 1, 4))
    moved = {}
    for strength in (1e-4, 0.5, 2.0, 50.0):
        layer = fit_output_layer(start, features, labels, strength=strength)
        moved[strength] = np.abs(layer(features) - start(features)).max()
    assert moved[1e-4] < 1e-6 and sorted(moved.values()) == list(moved.values())


def test_it_is_the_minimum_of_what_is_said(clips):
    """No step in any direction is better, by a loss that is written out clip by clip."""
    features, labels = clips
    rng = np.random.default_rng(2)
    start = OutputLayer(rng.normal(0, 1, (4, SIZE)), rng.normal(0, 1, 4))
    rehearsed = Rehearsed(rng.normal(0, 1, (7, SIZE)), softmax(rng.normal(0, 2, (7, 4)), axis=1))

    def loss(layer):
        value = 0.0
        for vector, label in zip(features, labels, strict=True):
            value -= 60 / 4 / (labels == label).sum() * log_softmax(layer(vector))[label]
        for vector, answer in zip(*rehearsed, strict=True):
            value -= 0.7 * 60 / 7 * (answer * log_softmax(layer(vector))).sum()
        width = 1.5**2 / np.mean([1 + vector @ vector for vector in features])
        moved = np.column_stack(layer) - np.column_stack(start)
        return value + (moved**2).sum() / (2 * width)

    layer = fit_output_layer(start, features, labels, rehearsed, strength=1.5, rehearsal=0.7)
    best = loss(layer)
    for _ in range(20):
        step = 0.01 * rng.normal(size=(4, SIZE)), 0.01 * rng.normal(size=4)
        assert loss(OutputLayer(layer.weight + step[0], layer.bias + step[1])) > best


def test_what_is_rehearsed_is_kept(clips):
    """Clips of one corner are learnt; the answers in another corner stay, with rehearsal and only then."""
    features, labels = clips
    rng = np.random.default_rng(3)
    start = OutputLayer(rng.normal(0, 1, (4, SIZE)), np.zeros(4))
    elsewhere = rng.normal(0, 1, (20, SIZE)) - 1
    rehearsed = Rehearsed(elsewhere, softmax(start(elsewhere), axis=1))
    changes = {
        rehearsal: np.abs(
            softmax(fit_output_layer(start, features, labels, rehearsed, 2.0, rehearsal)(elsewhere), axis=1)
            - rehearsed.answers
        ).mean()
        for rehearsal in (0.0, 1.0, 20.0)
    }
    assert changes[20.0] < changes[1.0] < 0.6 * changes[0.0]


# --- with a model ----------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    model = tiny_model()
    fit_openmax_by_chance(model)
    return model


def outputs_of(model, number=48):
    """Outputs for clips whose fused vectors are drawn by chance."""
    rng = np.random.default_rng(4)
    labels = np.arange(number) % 4
    fused = (3 * rng.normal(size=(number, 32)) + 4 * np.eye(4, 32)[labels]).astype(np.float32)
    with torch.no_grad():
        logits, features = model.classifier(torch.from_numpy(fused))
    distances = rng.random(size=(number, 4), dtype=np.float32)
    named = {"fused": fused, "features": features.numpy(), "logits": logits.numpy(), "labels": labels}
    return {**named, "anchor_distances": distances}


def test_the_rehearsed_answers_are_the_models_own(model):
    outputs = outputs_of(model)
    rehearsed = what_it_knew(model, outputs["fused"])
    length = np.median(np.linalg.norm(outputs["fused"], axis=1))
    wanted = np.unique(model.openmax.centroids.flatten(0, 1).numpy(), axis=0) * length
    with torch.no_grad():
        logits, features = model.classifier(torch.from_numpy(wanted).float())
    order = np.lexsort(features.numpy().T)
    found = np.lexsort(rehearsed.features.T)
    np.testing.assert_allclose(rehearsed.features[found], features.numpy()[order], atol=1e-5)
    np.testing.assert_allclose(rehearsed.answers[found], softmax(logits.numpy(), axis=1)[order], atol=1e-5)


def test_without_centroids_the_loss_of_rehearsal_is_told(model, caplog):
    model.openmax.reset()
    assert what_it_knew(model, outputs_of(model)["fused"]) is None
    assert "earlier answers are not rehearsed" in caplog.text


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({}, True),
        ({"openmax_threshold": 0.5}, True),
        ({"openmax_threshold": None}, False),
        ({"use_openmax": False}, False),
    ],
)
def test_a_model_that_rejects_nothing_is_not_warned_of_its_rejection(model, settings, warns, monkeypatch, caplog):
    for name, value in settings.items():
        monkeypatch.setattr(model.config, name, value)
    outputs = {**outputs_of(model, 12), "speakers": ["one", "two"] * 6}
    fit_openmax(model, None, outputs, 1.0)
    assert [record.name for record in caplog.records if record.levelname == "WARNING"][:1] == ["openmax_mmser"] * warns


@pytest.mark.parametrize("with_speakers", [True, False])
def test_no_clip_is_answered_by_a_layer_that_was_fitted_to_its_speaker(model, with_speakers):
    outputs = outputs_of(model)
    speakers = [f"speaker {row // 8}" for row in range(48)] if with_speakers else None
    alone = {**{name: values[::3] for name, values in outputs.items()}, "index": np.arange(0, 48, 3)}
    start, rehearsed = output_layer_of(model), what_it_knew(model, outputs["fused"])
    earlier = {name: value.clone() for name, value in model.state_dict().items()}
    answered, answered_alone = cross_fit(OutputFit(model, outputs), outputs, speakers, alone)
    features = outputs["features"].astype(np.float64)
    folds = folds_by_group(48, speakers)[0]
    assert len(folds) == 5
    for fold in folds:
        others = np.setdiff1d(np.arange(48), fold)
        if with_speakers:
            assert not {speakers[row] for row in fold} & {speakers[row] for row in others}
        layer = fit_output_layer(start, features[others], outputs["labels"][others], rehearsed)
        np.testing.assert_allclose(answered["logits"][fold], layer(features[fold]))
    np.testing.assert_allclose(answered_alone["logits"], answered["logits"][::3])
    final = fit_output_layer(start, features, outputs["labels"], rehearsed)
    np.testing.assert_allclose(output_layer_of(model).weight, final.weight, atol=1e-6)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, earlier[name])]
    assert changed == ["classifier.output.weight", "classifier.output.bias"]


def test_the_classifier_is_trained_by_steps_of_what_is_said(model):
    """Against steps that are written out, without dropout: the mean of the classes, and the answers rehearsed."""
    model.config.classifier_dropout = 0.0
    for module in model.classifier.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    outputs = outputs_of(model)
    rows = np.arange(30)  # unequal classes: 8, 8, 7, 7
    reference = copy.deepcopy(model.classifier)
    centroids = scaled_centroids(model, outputs["fused"])
    answers = reference(centroids)[0].softmax(dim=-1).detach()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for _ in range(STEPS):
        log_probabilities = reference(torch.from_numpy(outputs["fused"][rows]))[0].log_softmax(dim=-1)
        of_class = [-log_probabilities[outputs["labels"][rows] == label, label].mean() for label in range(4)]
        known = -(answers * reference(centroids)[0].log_softmax(dim=-1)).sum(dim=-1).mean()
        loss = sum(of_class) / 4 + 0.5 * known
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fit = ClassifierFit(model, outputs, rehearsal=0.5)
    before = torch.get_rng_state()
    fit.fit(np.arange(48))  # forgotten: each fit starts from the checkpoint
    fit.fit(rows)
    assert torch.equal(torch.get_rng_state(), before)
    for (name, expected), found in zip(reference.named_parameters(), model.classifier.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3, msg=name)


def test_no_clip_is_answered_by_a_classifier_that_was_trained_on_its_speaker(model, monkeypatch):
    monkeypatch.setattr("mmser.adapted_layers.STEPS", 3)
    outputs = outputs_of(model)
    with torch.no_grad():
        features = torch.from_numpy(outputs["features"])
        outputs |= {"uncertainty": model.uncertainty(features)[:, 0].numpy()}
        outputs |= {"anchor_distances": model.anchors(features)[1].numpy()}
    speakers = [f"speaker {row // 8}" for row in range(48)]
    alone = {**{name: values[::3] for name, values in outputs.items()}, "index": np.arange(0, 48, 3)}
    earlier = {name: value.clone() for name, value in model.state_dict().items()}
    fit = ClassifierFit(model, outputs)
    answered, answered_alone = cross_fit(fit, outputs, speakers, alone)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, earlier[name])}
    assert changed and all(name.startswith("classifier.") for name in changed) and not model.classifier.training
    final = fit.answer(outputs)
    for fold in folds_by_group(48, speakers)[0]:
        fit.fit(np.setdiff1d(np.arange(48), fold))
        for name, values in fit.answer({key: value[fold] for key, value in outputs.items()}).items():
            np.testing.assert_allclose(answered[name][fold], values, atol=1e-5)
            assert np.abs(values - final[name][fold]).max() > 1e-6
    for name in ("logits", "features", "uncertainty", "anchor_distances"):
        np.testing.assert_allclose(answered_alone[name], answered[name][::3], atol=1e-5)
    assert answered["fused"] is outputs["fused"]


# --- the command -----------------------------------------------------------------------------------------------------

NEW_MODEL = (
    *("tokenizer_name", "random_audio_encoder", "audio_config_overrides", "random_text_encoder"),
    *("text_config_overrides", "config_overrides", "max_steps", "save_strategy"),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that learnt nothing, with a temperature: what enters its last layer tells words and tones apart."""
    torch.manual_seed(0)
    model = tiny_corpus.tiny_model()
    fit_openmax_by_chance(model)
    model.temperature.fill_(2.0)
    folder = tmp_path_factory.mktemp("adapt") / "earlier"
    model.save_pretrained(folder)
    tiny_corpus.tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def run(corpus, tokenizer, checkpoint, tmp_path):
    def call(*words, **flags):
        flags = {**dict.fromkeys(NEW_MODEL), "data_dir": corpus, "model_name_or_path": checkpoint, **flags}
        return train_hf.main(
            ["--adapt", *words, *tiny_flags(flags.pop("data_dir"), tmp_path / "out", tokenizer, **flags)]
        )

    return call


def test_a_few_clips_change_what_it_answers_and_the_checkpoint_is_whole(run, checkpoint, corpus, tmp_path, capsys):
    results = run(adapt_strength=20, adapt_rehearsal=0)
    adapted = results["adaptation"]
    said = f"was {adapted['weighted_f1_before']:.3f} and is {adapted['weighted_f1_after']:.3f}"
    shown = capsys.readouterr().out
    assert f"On your 40 clips, the weighted F1 {said}" in shown and "make it small:" in shown
    assert adapted["clips"] == 40 and adapted["speakers"] == 10  # two corpora: the speakers of each are its own
    assert adapted["weighted_f1_before"] < 0.3 < 0.8 < adapted["weighted_f1_after"]
    assert results["test"]["model"]["weighted_f1"] > 0.6
    folder = tmp_path / "out"
    assert {path.name for path in checkpoint.iterdir() if path.is_file()} <= {path.name for path in folder.iterdir()}
    earlier, later = (MMSERForAudioClassification.from_pretrained(path) for path in (checkpoint, folder))
    for (name, before), after in zip(earlier.named_parameters(), later.parameters(), strict=True):
        assert torch.equal(before, after) != name.startswith("classifier.output"), name
    assert torch.equal(earlier.openmax.centroids, later.openmax.centroids)
    assert later.temperature.item() == pytest.approx(results["calibration"]["temperature"])
    written = json.loads((folder / "eval_results.json").read_text())
    assert written["adaptation"] == adapted and str(tmp_path) not in written["command"]
    card = (folder / "README.md").read_text()
    assert "40 clips to adapt to" in card and "without its speaker" in card and "validation split" not in card
    assert "{{" not in card and "Epochs" not in card
    classify = pipeline("audio-classification", model=str(folder), trust_remote_code=True)
    clip = {"path": str(corpus / "test" / "5_3.wav"), "text": WORDS["angry"]}
    assert classify(clip)[0]["label"] == "angry"
    with pytest.raises(ValueError, match="holds a finished run"):
        run()
    asked = ["--checkpoint", str(folder), "--data_dir", str(corpus), "--split"]
    evaluation, source = parse_arguments(EVALUATION_ARGUMENTS, [*asked, "test"])
    clips = load_clips(source, evaluation, NAMES)
    assert len(clips.train) == 40  # with the validation clips, from which it learnt too
    evaluation, source = parse_arguments(EVALUATION_ARGUMENTS, [*asked, "validation"])
    with pytest.raises(ValueError, match="no validation split"):
        load_clips(source, evaluation, NAMES)


def test_a_model_in_int8_can_be_adapted_and_stays_in_int8(run, checkpoint, tmp_path, capsys):
    small = tmp_path / "int8"
    model = quantize_dynamic(MMSERForAudioClassification.from_pretrained(checkpoint))
    model.save_pretrained(small)
    tiny_corpus.tiny_processor().save_pretrained(small)
    adapted = run(model_name_or_path=small, adapt_strength=20, adapt_rehearsal=0)["adaptation"]
    assert adapted["weighted_f1_before"] < 0.3 < 0.8 < adapted["weighted_f1_after"]
    earlier, later = (
        MMSERForAudioClassification.from_pretrained(path).state_dict() for path in (small, tmp_path / "out")
    )
    changed = {name for name, value in earlier.items() if not torch.equal(value, later[name])}
    assert {name for name in changed if "classifier" in name} == {"classifier.output.weight", "classifier.output.bias"}
    int8 = {name for name, value in later.items() if value.dtype == torch.int8}
    assert int8 and not int8 & changed
    said = capsys.readouterr().out
    assert "judge it:" in said and "make it small:" not in said


def test_the_whole_classifier_is_trained_unless_something_speaks_against_it(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("mmser.adapted_layers.LEARNING_RATE", 0.02)  # the checkpoint knows nothing to stay near to
    monkeypatch.setattr("mmser.adapted_layers.STEPS", 20)
    results = run(adapt_rehearsal=0)
    adapted = results["adaptation"]
    assert adapted["layers"] == "classifier" and "strength" not in adapted
    assert adapted["weighted_f1_before"] < 0.3 < 0.6 < adapted["weighted_f1_after"]
    earlier, later = (MMSERForAudioClassification.from_pretrained(path) for path in (checkpoint, tmp_path / "out"))
    for (name, before), after in zip(earlier.named_parameters(), later.parameters(), strict=True):
        assert torch.equal(before, after) or name.startswith("classifier"), name
    assert not torch.equal(earlier.classifier.feature_projection.weight, later.classifier.feature_projection.weight)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "its classifier was trained on them by a few steps" in card and "answered by a classifier that" in card


def test_what_is_fitted_goes_by_the_checkpoint(model):
    def chosen(**flags):
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        arguments = parse_arguments(TRAINING_ARGUMENTS, ["--adapt", "--use_cpu", *words])[2]
        return adaptation.choose_layers(model, arguments)

    assert (chosen(), chosen(adapt_strength=3), chosen(adapt_layers="output")) == ("classifier", "output", "output")
    model.config.int8_weights = True
    assert chosen() == "output"
    with pytest.raises(ValueError, match="--adapt_layers classifier: the checkpoint is in int8, of which the output"):
        chosen(adapt_layers="classifier")
    model = tiny_model(auxiliary_tasks={"arousal": "regression"})
    assert chosen() == "output"
    with pytest.raises(ValueError, match="the checkpoint also answers arousal, and these answers would move"):
        chosen(adapt_layers="classifier")


def test_a_temperature_of_the_checkpoint_is_where_it_starts(run, checkpoint, tmp_path):
    """With a prior that allows nothing, the answers are those of the checkpoint, with its temperature in the layer."""
    states = {"cache_encoder_states": tmp_path / "states"}
    run(adapt_strength=1e-6, **states)
    earlier = MMSERForAudioClassification.from_pretrained(checkpoint)
    later = MMSERForAudioClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(later.classifier.output.weight, earlier.classifier.output.weight / 2)
    assert list((tmp_path / "states").glob("audio-*/*.safetensors"))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--adapt", "--epochs", "3"], "--num_train_epochs is for a training of all weights"),
        (["--adapt", "--adversarial", "vat"], "--adversarial is for a training of all weights"),
        (["--adapt", "--adapt_strength", "0"], "--adapt_strength must be a number greater than 0, got 0"),
        (["--adapt", "--adapt_rehearsal", "-1"], "--adapt_rehearsal must be a number of 0 or more, got -1"),
        (["--adapt_strength", "3"], "--adapt_strength is about adapting a checkpoint: add --adapt"),
        (["--adapt_layers", "output"], "--adapt_layers is about adapting a checkpoint: add --adapt"),
        (
            ["--adapt", "--adapt_layers", "classifier", "--adapt_strength", "3"],
            "--adapt_strength is of the output layer",
        ),
        (["--adapt"], "--adapt needs a trained checkpoint to start from: add --model_name_or_path"),
        (["--adapt", "--model_name_or_path", "x/y", "--streaming"], "--streaming does not go with --adapt"),
        (["--adapt", "--model_name_or_path", "x/y", "--text_dropout", "0.5"], "--text_dropout does not go with"),
        (["--adapt", "--model_name_or_path", "x/y", "--average_with", "x/z"], "--average_with does not go with"),
    ],
)
def test_flags_that_contradict_it_are_refused(words, said):
    with pytest.raises(ValueError, match=said):
        adaptation.check_arguments(*parse_arguments(TRAINING_ARGUMENTS, [*words, "--use_cpu"])[:2])


def test_clips_that_cannot_be_adapted_to_are_refused_before_any_work(run, corpus, tmp_path, monkeypatch):
    rows = read_rows(corpus, "train")
    few = [row for row in rows if row["label"] != "sad"] + [row for row in rows if row["label"] == "sad"][:3]
    fear = [{**row, "label": "fear" if row["label"] == "sad" else row["label"]} for row in rows]
    monkeypatch.setattr("mmser.model_loading.load_model", lambda *_: pytest.fail("a model was loaded"))
    for changed, said in (
        (few, "at least 5 clips of each class, 20 are better: sad has 3"),
        (fear, f"keeps the classes of .*, {', '.join(NAMES)}, but those of the clips are .*fear"),
    ):
        write_table(tmp_path / "all.csv", changed)
        with pytest.raises(ValueError, match=said):
            run(data_dir=None, manifest=tmp_path / "all.csv")
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-3" / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a training, which --adapt does not go on with"):
        run()
