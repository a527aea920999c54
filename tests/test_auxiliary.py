# SPDX-License-Identifier: Apache-2.0
"""Tests of tasks beside the emotion: `auxiliary_mmser`, `mmser/targets.py`, and the way through all commands.

Order: losses and heads, the model, reading targets, training, metrics, pipeline. ONNX is in `test_export.py`.
"""

import csv
import math

import datasets
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from tiny import _SMALL_PARTS as SMALL_PARTS
from tiny import AUDIO_CONFIGS, TEXT_CONFIG, alone, randomize, tiny_batch, tiny_config
from tiny import tiny_model as random_model
from tiny_corpus import (
    NAMES,
    parse_strict_json,
    tiny_flags,
    tiny_model,
    tiny_processor,
    write_table,
)
from transformers import AudioClassificationPipeline, AutoModelForAudioClassification, pipeline

import eval_hf
import train_hf
from auxiliary_mmser import NO_CLASS, AuxiliaryHeads, classification_loss, regression_loss
from configuration_mmser import MMSERConfig
from mmser.batches import MMSERDataCollator
from mmser.caching import CachedStatesDataset, EncoderStateCache
from mmser.examples import EmotionDataset
from mmser.loading import load_emotion_dataset
from mmser.metrics import compute_regression_metrics, concordance_correlation
from mmser.optimizer import parameter_groups
from mmser.scores import describe_tasks
from mmser.targets import derive_targets, read_target, split_targets
from mmser.trainer import TARGET_NAMES, MMSERTrainer
from mmser.training_arguments import MMSERTrainingArguments
from modeling_mmser import MMSERForAudioClassification
from pipeline_mmser import MMSERPipeline

SENTIMENT = ["negative", "neutral", "positive"]
TASKS = {"sentiment": SENTIMENT, "arousal": "regression"}
NAN = math.nan

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(0)


# --- losses and heads ------------------------------------------------------------------------------------------------


def test_the_loss_of_classes_is_the_log_loss_of_the_clips_with_a_target(rng):
    logits, targets = rng.normal(0, 2, (9, 3)).astype(np.float32), np.array([0, 2, -100, 1, 1, -100, 2, 0, 0])
    known = targets != NO_CLASS
    exponentials = np.exp(logits[known].astype(np.float64))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    expected = sklearn.metrics.log_loss(targets[known], probabilities, labels=[0, 1, 2])
    loss = classification_loss(torch.from_numpy(logits), torch.from_numpy(targets))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_loss_of_numbers_is_the_squared_error_of_the_clips_with_a_target(rng, scale):
    values, targets = rng.normal(3, 2, (2, 9)).astype(np.float32)
    targets[[1, 4]] = NAN
    known = ~np.isnan(targets)
    expected = sklearn.metrics.mean_squared_error(targets[known] / scale, values[known] / scale)
    loss = regression_loss(torch.from_numpy(values), torch.from_numpy(targets), scale)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("task", ["sentiment", "arousal"])
def test_a_clip_without_a_target_has_no_gradient(task):
    heads = AuxiliaryHeads(tiny_config(auxiliary_tasks=TASKS, classifier_dropout=0.0))
    features = torch.randn(4, heads.head(task).hidden.in_features, requires_grad=True)
    missing = NO_CLASS if task == "sentiment" else NAN
    targets = torch.tensor([1, missing, 2, missing])
    (loss,) = heads.losses(heads(features), {task: targets}).values()
    (gradient,) = torch.autograd.grad(loss, features)
    assert gradient.isfinite().all()
    assert (gradient.abs().sum(dim=1) > 0).tolist() == [True, False, True, False]


def test_a_batch_without_targets_has_a_loss_of_zero_and_every_head_in_its_graph():
    """In a distributed run a parameter without a gradient would stop all processes."""
    heads = AuxiliaryHeads(tiny_config(auxiliary_tasks=TASKS))
    features = torch.randn(3, heads.head("arousal").hidden.in_features)
    targets = {"sentiment": torch.full((3,), NO_CLASS), "arousal": torch.full((3,), NAN)}
    losses = heads.losses(heads(features), targets)
    assert set(losses) == {"auxiliary_sentiment", "auxiliary_arousal"}
    total = sum(losses.values())
    total.backward()
    assert total.item() == 0
    assert all(parameter.grad is not None and (parameter.grad == 0).all() for parameter in heads.parameters())


def test_the_unit_of_a_number_does_not_matter(rng):
    """Targets of mean 100 and deviation 40, or the same standardised: the same loss, and answers in their unit."""
    config = tiny_config(auxiliary_tasks={"age": "regression"}, classifier_dropout=0.0)
    targets = torch.from_numpy(rng.normal(100, 40, 50))
    heads = AuxiliaryHeads(config).eval()
    plain = AuxiliaryHeads(config).eval()
    plain.load_state_dict(heads.state_dict())
    heads.fit_targets({"age": [*targets.tolist(), NAN]})
    mean, deviation = targets.mean(), targets.std(unbiased=False)
    assert heads.head("age").target_moments.tolist() == pytest.approx([mean.item(), deviation.item()])
    features = torch.randn(50, config.feature_size)
    answers, standardised = heads(features)["age"], plain(features)["age"]
    torch.testing.assert_close(answers.double(), mean + deviation * standardised.double(), rtol=1e-5, atol=1e-4)
    losses = [
        heads.losses({"age": answers}, {"age": targets}),
        plain.losses({"age": standardised}, {"age": (targets - mean) / deviation}),
    ]
    assert losses[0]["auxiliary_age"].item() == pytest.approx(losses[1]["auxiliary_age"].item(), rel=1e-5)
    heads.fit_targets({"age": [1.0, 2.0]})  # a later training: the head has learnt in the first unit
    assert heads.head("age").target_moments[0].item() == pytest.approx(mean.item())
    plain.fit_targets({"age": [5.0, 5.0]})  # all alike: nothing to divide by
    assert plain.head("age").target_moments.tolist() == [5.0, 1.0]


def test_a_mixture_of_clips_has_the_targets_of_both():
    heads = AuxiliaryHeads(tiny_config(auxiliary_tasks=TASKS))
    outputs = heads(torch.randn(4, heads.head("arousal").hidden.in_features))
    order = torch.tensor([2, 0, 3, 1])
    mixed = heads.losses(outputs, with_targets(4), (0.7, order))
    own = heads.losses(outputs, with_targets(4))
    others = heads.losses(outputs, {name: values[order] for name, values in with_targets(4).items()})
    for name, loss in mixed.items():
        assert loss.item() == pytest.approx(0.7 * own[name].item() + 0.3 * others[name].item(), rel=1e-6)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ({"sentimant": torch.zeros(2)}, TypeError, "`sentimant` is no task of `auxiliary_tasks`: did you mean"),
        ({"sentiment": torch.tensor([0, 3])}, ValueError, r"'sentiment' must be in \[0, 2\], or -100 .* got 3"),
        ({"sentiment": torch.tensor([0.0, 1.0])}, ValueError, "'sentiment' must be a tensor of class ids"),
        ({"arousal": torch.zeros(3)}, ValueError, r"'arousal' must be a tensor of numbers of shape \(2,\), got .*3"),
        ({"arousal": [1.0, 2.0]}, ValueError, "'arousal' must be a tensor of numbers"),
    ],
)
def test_targets_that_do_not_fit_are_named(targets, error, message):
    heads = AuxiliaryHeads(tiny_config(auxiliary_tasks=TASKS))
    outputs = heads(torch.zeros(2, heads.head("arousal").hidden.in_features))
    with pytest.raises(error, match=message):
        heads.losses(outputs, targets)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"auxiliary_tasks": {"a b": SENTIMENT}}, "'a b' is no name of a task"),
        ({"auxiliary_tasks": {"items": SENTIMENT}}, "'items' is no name of a task"),  # it would hide a method
        ({"auxiliary_tasks": {"mood": ["good", "good"]}}, "'mood' must be 'regression', or a list of two"),
        ({"auxiliary_tasks": {"mood": ["good"]}}, "'mood' must be 'regression', or a list of two"),
        ({"auxiliary_tasks": {"mood": "number"}}, "'mood' must be 'regression'.*got 'number'"),
        ({"auxiliary_tasks": TASKS, "auxiliary_label_maps": {"sentiment": {"sad": "bad"}}}, "one of negative"),
        (
            {"auxiliary_tasks": TASKS, "auxiliary_label_maps": {"arousal": {"sad": "low"}}},
            "a number, got 'low'",
        ),
        ({"auxiliary_label_maps": {"sentiment": {}}}, "`sentiment` is no task of `auxiliary_tasks`"),
    ],
)
def test_tasks_that_cannot_be_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        MMSERConfig(**fields)


# --- the model -------------------------------------------------------------------------------------------------------


def with_targets(batch_size):
    return {
        "sentiment": torch.tensor([2, NO_CLASS, 0, 1][:batch_size]),
        "arousal": torch.tensor([NAN, 3.5, 1.0, 2.0][:batch_size]),
    }


INPUTS = {
    "audio": ("input_values", "input_features", "attention_mask"),
    "text": ("input_ids", "text_attention_mask"),
}
KINDS = [("wav2vec2", "audio text"), ("whisper", "audio text"), ("whisper", "audio"), ("wav2vec2", "text")]


@pytest.mark.parametrize(("kind", "modalities"), KINDS)
def test_the_loss_of_the_model_is_the_sum_of_its_weighted_parts(kind, modalities):
    modalities = modalities.split()
    encoders = {"audio_config": AUDIO_CONFIGS[kind], "text_config": TEXT_CONFIG}
    encoders = {name: own for name, own in encoders.items() if name.split("_")[0] in modalities}
    tasks = {"auxiliary_tasks": TASKS, "auxiliary_loss_weight": 0.7}
    config = MMSERConfig(**encoders, modalities=modalities, **(SMALL_PARTS | tasks))
    model = randomize(MMSERForAudioClassification(config)).eval()
    lengths = [100, 80, 90] if kind == "whisper" else [900, 700, 800]
    batch = tiny_batch(random_model(kind), lengths, [3, 2, 4])
    batch = {name: value for name, value in batch.items() if any(name in INPUTS[each] for each in modalities)}
    labels, targets = torch.tensor([0, 1, 2]), with_targets(3)
    output = model(**batch, labels=labels, auxiliary_targets=targets)
    plain = model(**batch, labels=labels)
    sentiment = classification_loss(output.auxiliary["sentiment"], targets["sentiment"])
    arousal = regression_loss(output.auxiliary["arousal"], targets["arousal"])
    assert output.losses["auxiliary_sentiment"].item() == pytest.approx(0.7 * sentiment.item(), rel=1e-6)
    assert output.losses["auxiliary_arousal"].item() == pytest.approx(0.7 * arousal.item(), rel=1e-6)
    assert set(output.losses) - set(plain.losses) == {"auxiliary_sentiment", "auxiliary_arousal"}
    assert output.loss.item() == pytest.approx(plain.loss.item() + 0.7 * (sentiment + arousal).item(), rel=1e-6)
    assert [output.auxiliary[name].shape for name in TASKS] == [(3, 3), (3,)]


def test_a_model_without_tasks_is_what_it_was():
    model = random_model()
    assert not [name for name in model.state_dict() if name.startswith("auxiliary")]
    assert model(**tiny_batch(model, [900], [3])).auxiliary is None
    with pytest.raises(TypeError, match="`sentiment` is no task"):
        model(
            **tiny_batch(model, [900], [3]),
            labels=torch.tensor([0]),
            auxiliary_targets={"sentiment": torch.tensor([0])},
        )


def test_targets_without_labels_and_a_weight_of_zero():
    model = random_model(auxiliary_tasks=TASKS)
    batch = tiny_batch(model, [900, 800], [3, 2])
    with pytest.raises(ValueError, match="`auxiliary_targets` are for the loss: give `labels` too"):
        model(**batch, auxiliary_targets=with_targets(2))
    model.config.auxiliary_loss_weight = 0
    losses = model(**batch, labels=torch.tensor([0, 1]), auxiliary_targets=with_targets(2)).losses
    assert not [name for name in losses if name.startswith("auxiliary")]


def test_an_answer_does_not_depend_on_the_batch():
    model = random_model("whisper", auxiliary_tasks=TASKS)
    batch = tiny_batch(model, [100, 70], [4, 2], extra=7)
    both, single = model(**batch).auxiliary, model(**alone(batch, 1)).auxiliary
    for task in TASKS:
        torch.testing.assert_close(both[task][1:], single[task], rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = random_model(auxiliary_tasks=TASKS, classifier_dropout=0.0).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        batch = tiny_batch(model, [900, 800], [3, 2])
        model.zero_grad()
        torch.manual_seed(0)
        model(**batch, labels=torch.tensor([0, 1]), auxiliary_targets=with_targets(2)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(name.startswith("auxiliary.sentiment_head") for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)


def test_heads_are_saved_and_loaded_and_old_checkpoints_get_new_ones(tmp_path):
    model = random_model(auxiliary_tasks=TASKS)
    model.auxiliary.fit_targets({"arousal": [1.0, 2.0, 6.0]})
    batch = tiny_batch(model, [900, 800], [3, 2])
    expected = model(**batch).auxiliary
    model.save_pretrained(tmp_path / "new")
    for dtype, tolerance in ((torch.float32, 0), (torch.bfloat16, 0.2)):
        loaded = AutoModelForAudioClassification.from_pretrained(
            tmp_path / "new", trust_remote_code=True, dtype=dtype
        ).eval()
        assert loaded.config.auxiliary_tasks == TASKS
        assert loaded.auxiliary.head("arousal").target_moments.dtype == torch.float32
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        answers = loaded(**inputs).auxiliary
        for task in TASKS:
            torch.testing.assert_close(
                answers[task].float(), expected[task], rtol=tolerance, atol=tolerance * 10, check_dtype=False
            )
    random_model().save_pretrained(tmp_path / "old")
    loaded, info = MMSERForAudioClassification.from_pretrained(
        tmp_path / "old", auxiliary_tasks=TASKS, output_loading_info=True
    )
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"auxiliary"}
    assert loaded.auxiliary.head("arousal").target_moments.tolist() == [0.0, 1.0]
    assert loaded.auxiliary.head("sentiment").hidden.weight.std() > 0


def test_the_heads_are_a_group_of_the_optimiser():
    model = random_model(auxiliary_tasks=TASKS)
    groups = [group for group in parameter_groups(model, 0.01) if group["name"] == "auxiliary"]
    listed = {id(parameter) for group in groups for parameter in group["params"]}
    assert listed == {id(parameter) for parameter in model.auxiliary.parameters()} and listed
    assert "auxiliary" not in {group["name"] for group in parameter_groups(random_model(), 0.01)}


# --- reading targets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "kind", "expected"),
    [
        ("positive", SENTIMENT, 2),
        (" Positive ", SENTIMENT, 2),
        ("1", SENTIMENT, 1),
        (0, SENTIMENT, 0),
        ("", SENTIMENT, NO_CLASS),
        (None, SENTIMENT, NO_CLASS),
        ("unknown", SENTIMENT, NO_CLASS),
        ("unknown", ["known", "unknown"], 1),
        ("-1", SENTIMENT, NO_CLASS),
        ("3.25", "regression", 3.25),
        (-2, "regression", -2.0),
        ("-1", "regression", -1.0),
        ("", "regression", NAN),
        ("nan", "regression", NAN),
        (NAN, "regression", NAN),
    ],
)
def test_a_cell_is_read(written, kind, expected):
    assert read_target(written, "task", kind, "x row 1") == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("written", "kind", "message"),
    [
        ("good", SENTIMENT, "x.csv row 7: mood must be one of negative, neutral, positive, or empty .* got 'good'"),
        ("3", SENTIMENT, "row 7: mood must be one of .* got '3'"),
        ("high", "regression", "row 7: mood must be a number, or empty where it is not known, got 'high'"),
        ("inf", "regression", "row 7: mood must be a number"),
    ],
)
def test_a_bad_cell_is_named_by_its_row(written, kind, message):
    with pytest.raises(ValueError, match=message):
        read_target(written, "mood", kind, "x.csv row 7")


@pytest.fixture(scope="module")
def annotated(corpus, tmp_path_factory):
    """The corpus as one table, with arousal for most clips, sex for some, and no sentiment."""
    path = tmp_path_factory.mktemp("annotated") / "clips.csv"
    rows = []
    for split in ("train", "validation", "test"):
        with open(corpus / split / "metadata.csv", newline="", encoding="utf-8") as file:
            rows += [
                {**row, "split": split, "file_name": str(corpus / split / row["file_name"])}
                for row in csv.DictReader(file)
            ]
    level = {"neutral": 2.0, "happy": 4.0, "sad": 1.0, "angry": 5.0}
    for number, row in enumerate(rows):
        row["Arousal"] = "" if number % 5 == 0 else str(level[row["label"]] + 0.1 * (number % 3))
        row["gender"] = ("female", "male", "")[int(row["speaker"][-1]) % 3]
    write_table(path, rows)
    return path


ALL_TASKS = {**TASKS, "sex": ["female", "male"]}


def test_targets_are_read_from_the_columns_of_their_names(annotated):
    splits, label_names = load_emotion_dataset(manifest=annotated, auxiliary_tasks=ALL_TASKS)
    with open(annotated, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    targets = split_targets(splits["train"])
    assert set(targets) == {"arousal", "sex"}  # no column is called sentiment
    assert targets["arousal"] == pytest.approx([float(row["Arousal"] or "nan") for row in rows], nan_ok=True)
    assert targets["sex"] == [{"female": 0, "male": 1, "": NO_CLASS}[row["gender"]] for row in rows]
    splits, used = derive_targets(splits, label_names, ALL_TASKS)
    expected = {"neutral": "neutral", "happy": "positive", "sad": "negative", "angry": "negative"}
    assert used == {"sentiment": expected}
    for name, split in splits.items():
        labels = [label_names[label] for label in split["labels"]]
        assert split_targets(split)["sentiment"] == [SENTIMENT.index(expected[label]) for label in labels], name
    assert split_targets(splits["train"])["sex"] == targets["sex"]
    assert "auxiliary" not in load_emotion_dataset(manifest=annotated)[0]["train"].column_names


def test_a_map_decides_what_follows_from_the_emotion(corpus, caplog):
    splits, label_names = load_emotion_dataset(data_dir=corpus, auxiliary_tasks=TASKS)
    maps = {"sentiment": {"happy": "negative", "sad": "positive"}, "arousal": {"angry": 5, "sad": 1.5}}
    derived, used = derive_targets(splits, label_names, TASKS, maps)
    assert used == maps
    values = {"neutral": (NO_CLASS, NAN), "happy": (0, NAN), "sad": (2, 1.5), "angry": (NO_CLASS, 5.0)}
    targets = split_targets(derived["test"])
    for label, sentiment, arousal in zip(derived["test"]["labels"], *targets.values(), strict=True):
        expected = values[label_names[label]]
        assert (sentiment, arousal) == pytest.approx(expected, nan_ok=True)
    with pytest.raises(ValueError, match="arousal is given for 'furious', which is none of the classes neutral"):
        derive_targets(splits, label_names, TASKS, {"arousal": {"furious": 5}})
    with pytest.raises(TypeError, match="`valence` is no task"):
        derive_targets(splits, label_names, TASKS, {"valence": {"happy": 5}})


def test_a_column_wins_over_a_map(annotated):
    splits, label_names = load_emotion_dataset(manifest=annotated, auxiliary_tasks=TASKS)
    derived, used = derive_targets(splits, label_names, TASKS, {"arousal": dict.fromkeys(NAMES, 9)})
    assert set(used) == {"sentiment"}
    assert split_targets(derived["train"])["arousal"] == pytest.approx(
        split_targets(splits["train"])["arousal"], nan_ok=True
    )


def test_a_bad_target_is_an_error_or_leaves_its_row_out(annotated, tmp_path):
    with open(annotated, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rows[3]["Arousal"], rows[8]["gender"] = "loud", "f"
    write_table(tmp_path / "bad.csv", rows)
    with pytest.raises(ValueError) as error:
        load_emotion_dataset(manifest=tmp_path / "bad.csv", auxiliary_tasks=ALL_TASKS)
    assert "bad.csv row 5: arousal must be a number" in str(error.value)
    assert "bad.csv row 10: sex must be one of female, male" in str(error.value)
    splits, _ = load_emotion_dataset(manifest=tmp_path / "bad.csv", auxiliary_tasks=ALL_TASKS, on_bad_example="skip")
    assert sum(map(len, splits.values())) == len(rows) - 2


def test_a_stream_has_targets_too(annotated, monkeypatch):
    def stream(name, config_name=None, streaming=False):
        with open(annotated, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
        return {"train": datasets.Dataset.from_list(rows).to_iterable_dataset()}

    monkeypatch.setattr(datasets, "load_dataset", stream)
    splits, label_names = load_emotion_dataset(
        dataset_name="me/data",
        streaming=True,
        label_names=NAMES,
        auxiliary_tasks=TASKS,
        allow_outside_files=True,
    )
    assert derive_targets({"train": iter(())}, label_names, {})[1] == {}  # no row of a stream is read without tasks
    splits, used = derive_targets(splits, label_names, TASKS)
    rows = list(splits["train"])
    assert set(used) == {"sentiment"}
    assert rows[1]["auxiliary"]["arousal"] == pytest.approx(float(rows[1]["auxiliary"]["arousal"]))
    whole, _ = load_emotion_dataset(manifest=annotated, auxiliary_tasks=TASKS)
    whole, _ = derive_targets(whole, label_names, TASKS)
    for name, values in split_targets(whole["train"]).items():
        assert [row["auxiliary"][name] for row in rows] == pytest.approx(values, nan_ok=True)


def test_examples_batches_and_cached_states_carry_the_targets(annotated, tmp_path):
    splits, label_names = load_emotion_dataset(manifest=annotated, auxiliary_tasks=TASKS)
    splits, _ = derive_targets(splits, label_names, TASKS)
    model = tiny_model(auxiliary_tasks=TASKS)
    model.freeze_audio_encoder()
    model.freeze_text_encoder()
    plain = EmotionDataset(splits["test"])
    cached = CachedStatesDataset(plain, EncoderStateCache(tmp_path, model, tiny_processor()))
    collate = MMSERDataCollator(tiny_processor())
    expected = split_targets(splits["test"])
    for examples in (plain, cached):
        targets = collate([examples[index] for index in range(len(examples))])["auxiliary_targets"]
        assert [targets[name].dtype for name in ("sentiment", "arousal")] == [torch.int64, torch.float32]
        for name, values in expected.items():
            assert targets[name].tolist() == pytest.approx(values, nan_ok=True)
    assert "auxiliary_targets" not in collate([EmotionDataset(load_emotion_dataset(manifest=annotated)[0]["test"])[0]])


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_the_concordance_correlation_is_that_of_lin(rng):
    """1 - E[(x - y)^2] / its value if x and y were independent (Lin 1989, section 2), by loops in float64."""
    for _ in range(5):
        true = rng.normal(2, 1.5, 40)
        predicted = 0.6 * true + rng.normal(0.5, 0.7, 40)
        squared = math.fsum((x - y) ** 2 for x, y in zip(predicted, true, strict=True)) / 40
        independent = math.fsum((x - y) ** 2 for x in predicted for y in true) / 40**2
        metrics = compute_regression_metrics(predicted, true)
        assert metrics["ccc"] == pytest.approx(1 - squared / independent, rel=1e-12)
        assert metrics["pearson"] == pytest.approx(scipy.stats.pearsonr(predicted, true)[0], rel=1e-12)
        error = sklearn.metrics.mean_absolute_error(true, predicted)
        assert metrics["mean_absolute_error"] == pytest.approx(error, rel=1e-12)
        assert abs(metrics["ccc"]) <= abs(metrics["pearson"])


def test_the_concordance_correlation_at_its_ends():
    true = np.arange(6.0)
    assert concordance_correlation(true, true) == 1
    assert concordance_correlation(-true, true - 5) == pytest.approx(-1)
    assert concordance_correlation(np.full(6, 2.5), true) == 0
    assert concordance_correlation(2 * true, true) < 1 and concordance_correlation(true + 1, true) < 1
    assert math.isnan(concordance_correlation([1, 1], [1, 1]))
    assert math.isnan(compute_regression_metrics([1, 1], [1, 2])["pearson"])
    with pytest.raises(ValueError, match="must be finite"):
        concordance_correlation([1, NAN], [1, 2])


def test_tasks_are_scored_over_the_clips_that_have_a_target(rng):
    logits, values = rng.normal(size=(50, 3)), rng.normal(size=50)
    classes, numbers = rng.integers(0, 3, 50), rng.normal(size=50)
    classes[::4], numbers[::3] = NO_CLASS, NAN
    outputs = {"auxiliary_sentiment": logits.astype(np.float32), "auxiliary_arousal": values.astype(np.float32)}
    targets = {"sentiment": classes.tolist(), "arousal": numbers.tolist()}
    tasks = {**TASKS, "valence": "regression"}
    described = describe_tasks(outputs, {**targets, "valence": [NAN] * 50}, tasks, num_samples=50)
    assert set(described) == {"sentiment", "arousal"}
    known = classes != NO_CLASS
    f1 = sklearn.metrics.f1_score(classes[known], logits[known].argmax(axis=1), average="weighted")
    assert described["sentiment"]["weighted_f1"] == pytest.approx(f1)
    assert described["sentiment"]["clips"] == known.sum()
    counts = np.bincount(classes[known])
    always = sklearn.metrics.f1_score(classes[known], np.full(known.sum(), counts.argmax()), average="weighted")
    assert described["sentiment"]["majority_f1"] == pytest.approx(always)
    known = ~np.isnan(numbers)
    assert described["arousal"]["clips"] == known.sum()
    assert described["arousal"]["ccc"] == pytest.approx(
        concordance_correlation(values.astype(np.float32)[known], numbers[known])
    )
    low, high = described["arousal"]["ccc_interval"]
    assert low < described["arousal"]["ccc"] < high


# --- training, evaluation, use ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(annotated, tokenizer, tmp_path_factory):
    """A run with three tasks: its folder and its results."""
    folder = tmp_path_factory.mktemp("runs") / "tasks"
    flags = {
        "data_dir": None,
        "manifest": annotated,
        "auxiliary_tasks": ALL_TASKS,
        "auxiliary_weight": 1,
        "max_steps": None,
        "num_train_epochs": 30,
        "learning_rate": 5e-3,
        "eval_strategy": "no",
        "lr_multipliers": {"audio_encoder": 1, "text_encoder": 1},
    }
    return folder, train_hf.main(tiny_flags(None, folder, tokenizer, **flags))


@pytest.mark.usefixtures("quiet")
class TestCommands:
    def test_training_learns_and_scores_the_tasks(self, trained):
        folder, results = trained
        written = parse_strict_json((folder / "eval_results.json").read_text())
        assert set(written["auxiliary"]) == {"validation", "test"}
        scores = results["auxiliary"]["test"]
        assert scores["sentiment"]["weighted_f1"] > 0.9  # it follows from the emotion, which is learnt
        assert scores["arousal"]["ccc"] > 0.8 and scores["arousal"]["clips"] < scores["sentiment"]["clips"]
        config = MMSERConfig.from_pretrained(folder)
        assert config.auxiliary_tasks == ALL_TASKS and config.auxiliary_loss_weight == 1
        assert set(config.auxiliary_label_maps) == {"sentiment"}
        log = parse_strict_json((folder / "trainer_state.json").read_text())["log_history"]
        lines = [line for line in log if "loss_auxiliary_arousal" in line]
        assert lines[-1]["loss_auxiliary_arousal"] < lines[0]["loss_auxiliary_arousal"]

    def test_evaluation_reports_the_tasks(self, trained, annotated, tmp_path):
        folder, results = trained
        words = ["--checkpoint", str(folder), "--manifest", str(annotated), "--output_dir", str(tmp_path), "--use_cpu"]
        judged = eval_hf.main([*words, "--dataloader_num_workers", "0", "--bootstrap_samples", "50"])
        for task, values in results["auxiliary"]["test"].items():
            name = "ccc" if task == "arousal" else "weighted_f1"
            assert judged["auxiliary"][task][name] == pytest.approx(values[name], abs=1e-6)
        report = (tmp_path / "report.md").read_text()
        assert "## Other tasks" in report and "| arousal" in report and "| sentiment" in report

    def test_evaluation_of_data_without_targets_has_none(self, trained, corpus, tmp_path):
        folder, _ = trained
        words = ["--checkpoint", str(folder), "--data_dir", str(corpus), "--output_dir", str(tmp_path), "--use_cpu"]
        judged = eval_hf.main([*words, "--dataloader_num_workers", "0", "--bootstrap_samples", "50"])
        assert set(judged["auxiliary"]) == {"sentiment"}  # which followed from the emotion in training

    def test_training_goes_on_with_the_tasks_of_a_checkpoint(self, trained, annotated, corpus, tokenizer, tmp_path):
        folder, _ = trained
        leave_out = dict.fromkeys(
            (
                *("random_audio_encoder", "random_text_encoder", "audio_config_overrides", "text_config_overrides"),
                *("config_overrides", "tokenizer_name", "data_dir"),
            )
        )
        flags = {**leave_out, "manifest": annotated, "model_name_or_path": folder, "eval_strategy": "no"}
        train_hf.main(tiny_flags(None, tmp_path / "on", tokenizer, **flags))
        model = MMSERForAudioClassification.from_pretrained(tmp_path / "on")
        first = MMSERForAudioClassification.from_pretrained(folder)
        assert model.config.auxiliary_tasks == ALL_TASKS
        moments = [each.auxiliary.head("arousal").target_moments for each in (model, first)]
        assert torch.equal(*moments)
        change = (model.auxiliary.head("arousal").output.weight - first.auxiliary.head("arousal").output.weight).abs()
        assert 0 < change.max() < 0.05
        flags |= {"data_dir": corpus, "manifest": None}
        with pytest.raises(ValueError, match="no training clip has a target of 'arousal'"):
            train_hf.main(tiny_flags(corpus, tmp_path / "none", tokenizer, **flags))
        flags["auxiliary_tasks"] = {}
        train_hf.main(tiny_flags(corpus, tmp_path / "without", tokenizer, **flags))
        assert MMSERConfig.from_pretrained(tmp_path / "without").auxiliary_tasks == {}
        flags["auxiliary_tasks"] = {"sentiment": SENTIMENT[::-1]}
        train_hf.main(tiny_flags(corpus, tmp_path / "other", tokenizer, **flags))
        other = MMSERForAudioClassification.from_pretrained(tmp_path / "other").auxiliary.head("sentiment")
        assert (other.output.weight - first.auxiliary.head("sentiment").output.weight).abs().max() > 0.1

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ({"auxiliary_tasks": {"arousal": "regression"}}, "no training clip has a target of 'arousal'"),
            ({"auxiliary_weight": 0.5}, "--auxiliary_weight are of --auxiliary_tasks"),
            ({"auxiliary_tasks": {"mood": "text"}}, "--auxiliary_tasks: .*'mood' must be 'regression'"),
            ({"auxiliary_tasks": "[1]"}, "--auxiliary_tasks must be a JSON object"),
            ({"config_overrides": {"auxiliary_tasks": TASKS}}, "--config_overrides cannot set auxiliary_tasks"),
        ],
    )
    def test_flags_that_do_not_fit_are_refused(self, corpus, tokenizer, tmp_path, flags, message):
        with pytest.raises(ValueError, match=message):
            train_hf.main(tiny_flags(corpus, tmp_path / "out", tokenizer, **flags))


def test_the_trainer_gathers_the_answers_in_the_order_of_the_data(annotated, tmp_path):
    splits, label_names = load_emotion_dataset(manifest=annotated, auxiliary_tasks=TASKS)
    splits, _ = derive_targets(splits, label_names, TASKS)
    model = tiny_model(auxiliary_tasks=TASKS)
    arguments = MMSERTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_eval_batch_size=3, dataloader_num_workers=0
    )
    train, test = EmotionDataset(splits["train"]), EmotionDataset(splits["test"])
    collate = MMSERDataCollator(tiny_processor())
    trainer = MMSERTrainer(model, arguments, train_dataset=train, eval_dataset=test, data_collator=collate)
    known = [value for value in split_targets(splits["train"])["arousal"] if not math.isnan(value)]
    moments = model.auxiliary.head("arousal").target_moments.tolist()
    assert moments == pytest.approx([np.mean(known), np.std(known)])
    outputs = trainer.predict_outputs(test)
    assert outputs["auxiliary_sentiment"].shape == (len(test), 3) and outputs["auxiliary_arousal"].shape == (
        len(test),
    )
    model.eval()
    for index in range(len(test)):
        with torch.no_grad():
            batch = collate([test[index]])
            alone = model(**{name: value for name, value in batch.items() if name not in TARGET_NAMES}).auxiliary
        for task in TASKS:
            np.testing.assert_allclose(outputs[f"auxiliary_{task}"][index], alone[task][0], rtol=1e-4, atol=1e-4)
    assert trainer.predict(test).predictions.shape == (len(test), 4)  # the logits alone, as ever
    assert {"eval_loss", "eval_weighted_f1"} <= set(trainer.evaluate())


def test_the_trainer_warns_of_a_task_without_targets(corpus, tmp_path, caplog):
    splits, _ = load_emotion_dataset(data_dir=corpus)
    arguments = MMSERTrainingArguments(output_dir=str(tmp_path), use_cpu=True, eval_strategy="no")
    MMSERTrainer(
        tiny_model(auxiliary_tasks=TASKS),
        arguments,
        train_dataset=EmotionDataset(splits["train"]),
        data_collator=MMSERDataCollator(tiny_processor()),
    )
    assert [record for record in caplog.records if "no targets of sentiment, arousal" in record.message]


# --- pipeline -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(1)
    model = tiny_model(auxiliary_tasks=TASKS).eval()
    model.auxiliary.fit_targets({"arousal": [1.0, 3.0, 5.0]})
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


CLIPS = [
    {"raw": 0.3 * np.sin(np.arange(n) / 9).astype(np.float32), "sampling_rate": 16000} for n in (9000, 5000, 7000)
]


def test_the_pipeline_returns_the_tasks_on_request(saved):
    classifier = pipeline("audio-classification", model=str(saved), trust_remote_code=True)
    inputs = [{**clip, "text": text} for clip, text in zip(CLIPS, ("what a joy", None, "stop it"), strict=True)]
    assert all("auxiliary" not in result for result in classifier(inputs[0]))
    batched = classifier(inputs, batch_size=3, return_auxiliary=True, return_uncertainty=True)
    for clip, results in zip(inputs, batched, strict=True):
        inputs_of_model = classifier.processor(clip["raw"], clip["text"], sampling_rate=16000)
        with torch.no_grad():
            expected = classifier.model(**inputs_of_model).auxiliary
        for result in results:
            answers = result["auxiliary"]
            assert list(answers["sentiment"]) == SENTIMENT and sum(answers["sentiment"].values()) == pytest.approx(1)
            probabilities = expected["sentiment"][0].softmax(-1).tolist()
            assert list(answers["sentiment"].values()) == pytest.approx(probabilities, abs=1e-4)
            assert answers["arousal"] == pytest.approx(expected["arousal"].item(), abs=1e-3)
            assert "uncertainty" in result


def test_a_recording_has_the_mean_of_its_chunks(saved):
    classifier = pipeline("audio-classification", model=str(saved), trust_remote_code=True)
    clip = {"raw": np.sin(np.arange(20000) ** 1.1).astype(np.float32), "sampling_rate": 16000}
    recording = classifier(clip, chunk_length_s=0.5, stride_length_s=0, return_auxiliary=True)
    chunks = recording["chunks"]
    shares = [(chunk["timestamp"][1] - chunk["timestamp"][0]) / (20000 / 16000) for chunk in chunks]
    parts = [chunk["scores"][0]["auxiliary"] for chunk in chunks]
    assert len(chunks) > 1
    for result in recording["scores"]:
        mean = sum(share * part["arousal"] for share, part in zip(shares, parts, strict=True))
        assert result["auxiliary"]["arousal"] == pytest.approx(mean)
        for name in SENTIMENT:
            mean = sum(share * part["sentiment"][name] for share, part in zip(shares, parts, strict=True))
            assert result["auxiliary"]["sentiment"][name] == pytest.approx(mean)


def test_a_model_without_tasks_refuses_to_return_them():
    classifier = MMSERPipeline(model=tiny_model(), processor=tiny_processor())
    with pytest.raises(ValueError, match="`return_auxiliary` needs a model with `auxiliary_tasks`"):
        classifier(CLIPS[0], return_auxiliary=True)


def test_the_stock_pipeline_takes_the_batches_apart(saved):
    """Any other entry of the output that is a dict would stop it."""
    model = MMSERForAudioClassification.from_pretrained(saved)
    classifier = AudioClassificationPipeline(model=model, feature_extractor=tiny_processor().feature_extractor)
    clips = [clip["raw"] for clip in CLIPS]
    results = classifier(clips, batch_size=3)
    alone = [classifier(clip) for clip in clips]
    for some, other in zip(results, alone, strict=True):
        assert [r["label"] for r in some] == [r["label"] for r in other]
