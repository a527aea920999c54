# SPDX-License-Identifier: Apache-2.0
"""Tests of `mmser.results` and `mmser.scores`: what is said about the data and the predictions.

Scores are compared with scikit-learn; a stand-in for the trainer gives outputs that are known beforehand.
"""

import math

import datasets
import numpy as np
import pytest
import sklearn.metrics
import torch
from tiny_corpus import parse_strict_json

from mmser.groups import split_groups
from mmser.metrics import bootstrap_classification
from mmser.results import advise, describe_data, format_results
from mmser.scores import (
    describe_predictions,
    describe_rejection,
    describe_rows,
    evaluate_augmentation,
    evaluate_open_set,
    linear_probe,
    open_set_scores,
    predict_clips,
    predict_rows,
)
from mmser.tables import strict_json

NAMES = ["neutral", "happy", "sad", "angry"]


def fake_outputs(labels, seed=0, accuracy=0.7, fitted=True):
    """Outputs as of `predict_outputs`, right about `accuracy` of the time; `fused` tells the label."""
    rng = np.random.default_rng(seed)
    labels = np.asarray(labels)
    told = np.where(rng.random(len(labels)) < accuracy, labels, rng.integers(4, size=len(labels)))
    outputs = {
        "logits": (rng.normal(size=(len(labels), 4)) + 3 * np.eye(4)[told]).astype(np.float32),
        "uncertainty": rng.random(len(labels)).astype(np.float32),
        "fused": (np.eye(4)[labels] + 0.05 * rng.normal(size=(len(labels), 4))).astype(np.float32),
        "anchor_distances": rng.random((len(labels), 4)).astype(np.float32),
        "labels": labels,
    }
    if fitted:
        probabilities = rng.dirichlet(np.ones(5), len(labels)).astype(np.float32)
        outputs |= {
            "rejection_score": -np.log(probabilities[:, :4].max(axis=1)),
            "unknown_probability": probabilities[:, 4],
        }
    return outputs


class StandIn:
    """A trainer that remembers what it was asked to predict."""

    used_modalities = ("audio", "text")

    def __init__(self, fitted=True):
        self.train_outputs = fake_outputs([0] * 5 + [1] * 5 + [2] * 12 + [3] * 5, seed=1)
        self.fitted = fitted
        self.asked = []

    def predict_outputs(self, dataset):
        table, hidden = dataset
        self.asked.append((table["row"], hidden))
        return fake_outputs(np.maximum(table["labels"], 0), seed=len(self.asked), fitted=self.fitted)


def make_dataset(table, **hidden):
    return table, hidden


def table(size=20, **columns):
    rows = {"labels": [index % 4 for index in range(size)], "row": [f"row {index}" for index in range(size)]}
    return datasets.Dataset.from_dict({**rows, **columns})


# --- the data --------------------------------------------------------------------------------------------------------


def test_describe_data_counts_clips_speakers_and_languages():
    splits = {
        "train": table(4, speaker=["a", "b", "a", ""], corpus=["x", "x", "y", "x"], language=["en", "de", "en", ""]),
        "test": table(2, speaker=["b", "c"], corpus=["y", "x"], language=["fr", "en"]),
    }
    result = describe_data("some/where/my_data", splits)
    assert describe_data("some/where/my_data/metadata.csv", splits) == result
    assert result["name"] == "my_data"
    assert result["clips"] == {"train": 4, "test": 2}
    assert result["languages"] == ["de", "en", "fr"]
    # a name in two corpora is two people: x/a, x/b, y/a in training; y/b, x/c in test
    assert result["speakers"] == "Speakers: 3 in train, 2 in test, none in two splits."
    assert result["overlap"] is False


def test_describe_data_tells_of_shared_speakers():
    splits = {name: table(2, speaker=["a", name]) for name in ("train", "validation", "test")}
    result = describe_data("data", splits)
    assert result["overlap"] is True and "none in two splits" not in result["speakers"]


def test_describe_data_without_speakers_and_of_a_stream():
    assert describe_data("data", {"train": table(3)})["speakers"] == "Speakers are not known."
    stream = table(3, speaker=["a"] * 3).to_iterable_dataset()
    assert describe_data("data", {"train": stream})["clips"] == {}


# --- the scores ------------------------------------------------------------------------------------------------------


def test_describe_predictions_agrees_with_scikit_learn():
    labels = np.random.default_rng(3).integers(4, size=200)
    outputs = fake_outputs(labels)
    groups = {"language": ["en", "de"] * 100}
    result = describe_predictions(outputs, NAMES, groups)
    predictions = outputs["logits"].argmax(1)
    wrong = predictions != labels
    assert result["clips"] == 200
    assert result["weighted_f1"] == pytest.approx(sklearn.metrics.f1_score(labels, predictions, average="weighted"))
    assert result["accuracy"] == pytest.approx(1 - wrong.mean())
    assert result["confusion_matrix"] == sklearn.metrics.confusion_matrix(labels, predictions).tolist()
    logits = torch.tensor(outputs["logits"]).double()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item()
    assert result["negative_log_likelihood"] == pytest.approx(expected)
    expected = sklearn.metrics.roc_auc_score(wrong, outputs["uncertainty"])
    assert result["error_auroc_of_uncertainty"] == pytest.approx(expected)
    expected = sklearn.metrics.roc_auc_score(wrong, 1 - logits.softmax(-1).max(-1).values.numpy())
    assert result["error_auroc_of_max_probability"] == pytest.approx(expected)
    german = sklearn.metrics.accuracy_score(labels[1::2], predictions[1::2])
    assert result["by_language"]["de"]["accuracy"] == pytest.approx(german)
    assert result["by_language"]["en"]["count"] == 100


def test_intervals_draw_the_speakers_where_enough_are_known():
    outputs = fake_outputs(np.random.default_rng(3).integers(4, size=60))
    index = np.arange(60)[::-1]  # another order than that of the split
    split_order = [f"speaker {row // 5}" for row in range(60)]
    groups = {"language": ["en"] * 55 + ["de"] * 5}
    rows = describe_rows({"model": {**outputs, "index": index}}, NAMES, groups, outputs, speakers=split_order)
    own, predictions = [split_order[row] for row in index], outputs["logits"].argmax(1)
    expected = bootstrap_classification(predictions, outputs["labels"], NAMES, speakers=own)
    assert rows["model"]["weighted_f1_interval"] == expected["weighted_f1"]
    assert rows["model"]["speakers"] == rows["linear_probe"]["speakers"] == 12
    english = index < 55
    expected = bootstrap_classification(
        predictions[english], outputs["labels"][english], NAMES, speakers=np.array(own)[english].tolist()
    )
    assert rows["model"]["by_language"]["en"]["weighted_f1_interval"] == expected["weighted_f1"]
    few = describe_rows({"model": {**outputs, "index": index}}, NAMES, speakers=["one"] * 60)["model"]
    assert "speakers" not in few
    assert few == describe_rows({"model": {**outputs, "index": index}}, NAMES)["model"]


def test_the_linear_probe_reads_the_fused_vectors():
    train, test = fake_outputs([0, 1, 2, 3] * 5, seed=1), fake_outputs([3, 2, 1, 0, 0], seed=2, accuracy=0.0)
    assert linear_probe(train, test).tolist() == [3, 2, 1, 0, 0]


def test_a_split_is_scored_in_every_way_that_its_data_allow():
    audio = [f"{index}.wav" if index % 5 else "" for index in range(20)]
    text = [f"word {index}" if index % 2 else "" for index in range(20)]
    trainer = StandIn()
    split = table(audio=audio, text=text, language=["en", ""] * 10)
    outputs = predict_rows(trainer, split, make_dataset)
    rows = describe_rows(outputs, NAMES, split_groups(split), trainer.train_outputs)
    assert list(rows) == ["model", "audio_only", "text_only", "linear_probe", "majority"]
    with_audio = [index for index in range(20) if index % 5]
    with_text = [index for index in range(20) if index % 2]
    assert trainer.asked == [
        ([f"row {index}" for index in range(20)], {}),
        ([f"row {index}" for index in with_audio], {"use_text": False}),
        ([f"row {index}" for index in with_text], {"use_audio": False}),
    ]
    assert outputs["audio_only"]["index"].tolist() == with_audio
    assert [row["clips"] for row in rows.values()] == [20, len(with_audio), len(with_text), 20, 20]
    assert rows["majority"]["accuracy"] == 0.25 and rows["majority"]["f1_sad"] > 0 == rows["majority"]["f1_neutral"]
    assert rows["linear_probe"]["accuracy"] == 1.0
    assert set(rows["model"]["by_language"]) == {"en", "unknown"}
    assert rows["audio_only"]["by_language"]["en"]["count"] == sum(index % 2 == 0 for index in with_audio)
    assert "by_corpus" not in rows["model"]
    for row in rows.values():
        for name in ("weighted_f1", "accuracy", "unweighted_average_recall", "macro_f1"):
            low, high = row[f"{name}_interval"]
            assert 0 <= low <= row[name] <= high <= 1, name


@pytest.mark.parametrize("columns", [{"audio": ["a.wav"] * 20}, {"text": ["word"] * 20}])
def test_a_split_with_one_modality_has_no_rows_for_the_other(columns):
    outputs = predict_rows(StandIn(), table(**columns), make_dataset)
    assert set(outputs) == {"model"}
    assert set(describe_rows(outputs, NAMES)) == {"model"}  # without training clips, nothing to compare with
    assert set(describe_rows(outputs, NAMES, class_counts=[1, 2, 3, 0])) == {"model", "majority"}


def test_a_linear_probe_needs_two_classes():
    outputs = predict_rows(StandIn(), table(), make_dataset)
    rows = describe_rows(outputs, NAMES, train_outputs=fake_outputs([2, 2, 2]))
    assert set(rows) == {"model", "majority"} and rows["majority"]["accuracy"] == 0.25


def test_one_clip_and_a_missing_class_are_scored():
    row = describe_rows({"model": {**fake_outputs([3], accuracy=1.0), "index": np.arange(1)}}, NAMES, {"sex": ["f"]})
    assert row["model"]["weighted_f1"] == 1.0 and row["model"]["weighted_f1_interval"] == (1.0, 1.0)
    assert math.isnan(row["model"]["error_auroc_of_uncertainty"])
    assert row["model"]["by_sex"]["f"]["count"] == 1 and row["model"]["f1_sad"] == 0


def test_a_number_that_is_not_finite_names_the_clip():
    class Broken(StandIn):
        def predict_outputs(self, dataset):
            outputs = super().predict_outputs(dataset)
            outputs["logits"][[7, 9], 2] = np.nan
            return outputs

    with pytest.raises(ValueError, match=r"`logits` is not finite for 2 of 20 clips, the first is row 7"):
        predict_rows(Broken(), table(), make_dataset)
    with pytest.raises(ValueError, match=r"the first is row 7"):
        predict_clips(Broken(), make_dataset(table()), table()["row"])


def test_groups_have_names():
    split = table(4, language=["en", "", None, "de"], speaker=["", "", "", "a"])
    assert split_groups(split) == {"language": ["en", "unknown", "unknown", "de"]}
    assert split_groups(split, ["labels"]) == {"labels": ["0", "1", "2", "3"]}
    assert split_groups(split.to_iterable_dataset()) == {}


@pytest.mark.parametrize("fitted", [True, False])
def test_open_set_scores_have_the_unknown_as_the_positive_class(fitted):
    known, unknown = fake_outputs(np.arange(40) % 4, 1, fitted=fitted), fake_outputs([0] * 15, 2, fitted=fitted)
    train = fake_outputs(np.arange(60) % 4, 3)
    rows = evaluate_open_set(known, {"noise": unknown}, train, temperature=2.0, num_samples=50)
    assert set(rows) == {"noise"}
    assert next(iter(rows["noise"])) == ("openmax" if fitted else "max_softmax")
    is_unknown = [0] * 40 + [1] * 15
    logits = torch.tensor(np.concatenate([known["logits"], unknown["logits"]])).double()
    unit = torch.nn.functional.normalize
    fused = torch.tensor(np.concatenate([known["fused"], unknown["fused"]])).double()
    distances = torch.cdist(unit(fused), unit(torch.tensor(train["fused"]).double())).sort(dim=1).values
    scores = {
        "max_softmax": 1 - logits.softmax(-1).max(-1).values.numpy(),
        "energy": -torch.logsumexp(2 * logits, dim=1).numpy(),  # of the logits before the temperature divided them
        "knn": distances[:, 9].numpy(),
        "uncertainty": np.concatenate([known["uncertainty"], unknown["uncertainty"]]),
    }
    if fitted:
        scores["openmax"] = np.concatenate([known["rejection_score"], unknown["rejection_score"]])
    assert set(rows["noise"]) == set(scores)
    for name, row in rows["noise"].items():
        assert row["clips"] == 55
        assert row["auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(is_unknown, scores[name]))
        false_alarms, hits, _ = sklearn.metrics.roc_curve(is_unknown, scores[name], drop_intermediate=False)
        assert row["fpr_at_95_tpr"] == pytest.approx(false_alarms[hits >= 0.95].min())
        assert 0 <= row["oscr"] <= (known["logits"].argmax(1) == known["labels"]).mean() + 1e-9
        low, high = row["auroc_interval"]
        assert low <= row["auroc"] <= high


def test_the_mean_over_sets_and_the_scores_that_need_training_clips():
    known, sets = fake_outputs(np.arange(40) % 4), {"a": fake_outputs([0] * 9, 1), "b": fake_outputs([1] * 30, 2)}
    rows = evaluate_open_set(known, sets, num_samples=5)
    assert list(rows) == ["a", "b", "mean"] and "knn" not in rows["mean"]
    for name, row in rows["mean"].items():
        for metric, value in row.items():
            assert value == pytest.approx((rows["a"][name][metric] + rows["b"][name][metric]) / 2)
    assert evaluate_open_set(known, {}) == {}
    both = {**known, "features": known["fused"]}
    assert {"knn", "knn_features"} <= set(open_set_scores(both, both))
    assert "knn_features" not in open_set_scores(both, known)


def test_a_perfect_detector_of_the_unknown():
    known, unknown = fake_outputs(np.arange(40) % 4, 1), fake_outputs([0] * 15, 2)
    known["rejection_score"][:], unknown["rejection_score"][:] = 900, 901  # of probabilities that no float holds
    row = evaluate_open_set(known, {"noise": unknown})["noise"]["openmax"]
    accuracy = (known["logits"].argmax(1) == known["labels"]).mean()
    assert (row["auroc"], row["auroc_interval"], row["fpr_at_95_tpr"]) == (1.0, (1.0, 1.0), 0.0)
    assert row["oscr"] == pytest.approx(accuracy)


def test_rejection_is_counted():
    assert describe_rejection(fake_outputs([0, 1]), {}, NAMES) is None
    known = {
        "logits": np.eye(4)[[0, 0, 1, 2, 2]],
        "labels": np.array([0, 0, 0, 2, 2]),
        "is_unknown": np.array([False, False, True, True, False]),
    }
    noise = {"is_unknown": np.array([True, True, False, True]), "logits": np.eye(4)[[1, 1, 1, 3]]}
    report = describe_rejection(known, {"noise": noise}, NAMES)
    assert report["answers"] == {  # unknown first
        "neutral": [1, 2, 0, 0, 0],
        "happy": [0] * 5,
        "sad": [1, 0, 0, 1, 0],
        "angry": [0] * 5,
        "unknown: noise": [3, 0, 1, 0, 0],
    }
    assert report["known_accepted"] == 0.6 and report["unknown_rejected"] == {"noise": 0.75}
    assert report["accuracy"] == 0.8 and report["accuracy_of_accepted"] == 1.0
    assert report["accepted_by_class"]["neutral"] == pytest.approx(2 / 3)
    assert report["accepted_by_class"]["sad"] == 0.5 and math.isnan(report["accepted_by_class"]["happy"])
    known["is_unknown"][:] = True
    assert math.isnan(describe_rejection(known, {}, NAMES)["accuracy_of_accepted"])


def test_test_time_augmentation_is_averaged_by_clip(monkeypatch):
    """With a stand-in for the data set: pass 0 is right, the two others are wrong about clip 1."""
    labels = np.array([0, 1, 2])

    class Passes:
        def __init__(self, dataset, num_passes, augmenter, seed):
            self.size = (dataset.dataset.num_rows, num_passes, seed)

    class Trainer:
        def predict_outputs(self, dataset):
            clips, passes, seed = dataset.size
            assert (clips, seed) == (3, 7)
            logits = 4 * np.eye(4)[np.repeat(labels, passes)]
            for number in range(1, passes):
                logits[passes + number] = 4 * np.eye(4)[3]
            return {"logits": logits, "uncertainty": np.zeros(clips * passes), "labels": np.repeat(labels, passes)}

    monkeypatch.setattr("mmser.scores.TestTimeAugmentation", Passes)
    clips = type("Clips", (), {"dataset": table(3)})()
    report = evaluate_augmentation(Trainer(), clips, [1, 3], NAMES, seed=7)
    assert [(row["passes"], row["clips"]) for row in report] == [(1, 3), (3, 3)]
    assert [row["accuracy"] for row in report] == [1.0, pytest.approx(2 / 3)]
    assert all(row["seconds"] > 0 for row in report)


# --- the files -------------------------------------------------------------------------------------------------------


def test_strict_json_has_no_nan():
    value = {"a": np.float32(0.5), 1: (math.nan, np.int64(3)), "b": [np.inf, None, True], "ü": {"c": np.bool_(False)}}
    read_back = parse_strict_json(strict_json(value))
    assert read_back == {"a": 0.5, "1": [None, 3], "b": [None, None, True], "ü": {"c": False}}


def test_tables_without_rows_are_empty():
    tables = format_results(
        {"label_names": NAMES, "parameters": [{"part": "all", "parameters": 12345, "trainable": 12}]}
    )
    assert {name for name, text in tables.items() if text} == {"parameters"}


# --- what to do ------------------------------------------------------------------------------------------------------


def results_of(model, probe, confusion, steps=100, epochs=10):
    rows = {
        "model": {"weighted_f1": model, "clips": int(np.sum(confusion)), "confusion_matrix": confusion},
        "linear_probe": {"weighted_f1": probe},
    }
    good = {"model": {**rows["model"], "weighted_f1": 1.0}, "linear_probe": {"weighted_f1": 0.0}}
    training = {"steps": steps, "epoch": epochs}
    return {"label_names": ["a", "b", "c"], "validation": rows, "test": good, "training": training}


ALL = [[40, 30, 30], [30, 40, 30], [30, 30, 40]]


def test_the_summary_says_what_to_do_when_the_head_is_below_a_probe():
    assert advise(results_of(0.50, 0.52, ALL)) == []
    (short,) = advise(results_of(0.20, 0.38, ALL, steps=21, epochs=3))
    assert "weighted F1 0.20" in short and "(0.38)" in short and "--epochs 126 (880 steps)" in short
    (long,) = advise(results_of(0.20, 0.38, ALL, steps=900))
    assert "--epochs" not in long and "lower --lr" in long and "classifier_num_layers" in long
    few = [[4, 3, 3], [3, 4, 3], [3, 3, 4]]
    assert advise(results_of(0.34, 0.40, few)) == []  # 30 clips cannot tell
    without = results_of(0.2, 0.4, ALL)
    del without["validation"]["linear_probe"]
    assert advise(without) == [] == advise({"label_names": ["a"], "training": {}})


def test_the_summary_names_classes_that_are_never_predicted():
    (said,) = advise(results_of(0.5, 0.5, [[90, 10, 0], [10, 90, 0], [50, 50, 0]]))
    assert said.startswith("On the validation clips, c was never predicted. 100 steps are few")
    assert advise(results_of(0.5, 0.5, [[90, 10, 0], [10, 90, 0], [0, 0, 0]])) == []  # there is none
    both = advise(results_of(0.2, 0.5, [[100, 0, 0], [100, 0, 0], [100, 0, 0]]))
    assert len(both) == 2 and both[1] == "On the validation clips, b, c were never predicted."
