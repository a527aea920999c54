# SPDX-License-Identifier: Apache-2.0
"""Tests of `report`: the numbers, pictures and words of a report, from outputs that are known beforehand."""

import math
import re
import shlex

import jinja2
import numpy as np
import pytest
import scipy.special
import sklearn.metrics
from tiny_corpus import parse_strict_json

from mmser.report import Measured, draw, judge, verdict, write_report, write_with_plots
from mmser.results import reproducible

DRAWS = True  # see the fixture `pictures`
NAMES = ["neutral", "happy", "sad", "angry"]


def make_outputs(labels, seed=0, accuracy=0.7, fitted=True, shift=0.0):
    """Outputs as of `predict_outputs`, right about `accuracy` of the time; unknown clips lie `shift` further off."""
    generator, labels = np.random.default_rng(seed), np.asarray(labels)
    told = np.where(generator.random(len(labels)) < accuracy, labels, generator.integers(4, size=len(labels)))
    outputs = {
        "logits": (generator.normal(size=(len(labels), 4)) + 3 * np.eye(4)[told]).astype(np.float32),
        "uncertainty": generator.random(len(labels)).astype(np.float32),
        "fused": (np.eye(4)[labels] + 0.1 * generator.normal(size=(len(labels), 4))).astype(np.float32),
        "labels": labels,
        "index": np.arange(len(labels)),
    }
    if fitted:
        outputs["unknown_probability"] = np.clip(0.4 * generator.random(len(labels)) + shift, 0, 1)
        outputs["is_unknown"] = outputs["unknown_probability"] > 0.38
        outputs["rejection_score"] = 3 * outputs["unknown_probability"]
        outputs["rejection_score"][0] = 1e30  # there is no upper limit
    return outputs


def make_measured(size=120, **more):
    labels = np.arange(size) % 4
    content = {
        "label_names": NAMES,
        "rows": {"model": make_outputs(labels), "audio_only": make_outputs(labels[::2], 1)},
        "groups": {"language": ["en" if i % 3 else "de" for i in range(size)]},
        "unknown_sets": {"noise": make_outputs([0] * 40, 2, shift=0.3), "fear & awe": make_outputs([1] * 30, 3)},
        "train_outputs": make_outputs(np.arange(80) % 4, 4),
        "temperature": 2.0,
        **more,
    }
    content["rows"] = {
        name: {**outputs, "index": np.arange(size)[:: size // len(outputs["labels"])]}
        for name, outputs in content["rows"].items()
    }
    return Measured(**content)


def make_report(measured, **more):
    return {
        "model_name": "tiny",
        "split": "test",
        "data": {"name": "corpus", "languages": ["de", "en"]},
        "unknown_clips": {name: len(outputs["labels"]) for name, outputs in measured.unknown_sets.items()},
        **judge(measured, num_samples=30),
        "notes": [],
        "command": "python eval_hf.py --checkpoint tiny",
        "environment": {"device": "CPU", "threads": 1, "python": "3", "torch": "2", "transformers": "5"},
        **more,
    }


def write(measured, folder, **more):
    """The report as it is written: its text and its JSON, which must be strict."""
    report = make_report(measured, **more)
    path = write_report(report, draw(measured, report, folder / "plots"), folder)

    return path.read_text(encoding="utf-8"), parse_strict_json((folder / "report.json").read_text())


def test_a_report_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    """Also its pictures: what is in the folder belongs together."""
    report = make_report(make_measured())
    write_with_plots(make_measured(), report, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"report.md", "report.json"} < {path.name for path in before}
    other = make_measured(temperature=1.0, label_names=["a", "b", "c", "d"])
    with pytest.raises(jinja2.UndefinedError):  # after the pictures
        write_with_plots(other, {name: report[name] for name in report if name != "command"}, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("report")
    passes = [
        {"passes": n, "seconds": 0.5 * n, "clips": 120, "weighted_f1": 0.5, "expected_calibration_error": 0.1}
        | {"negative_log_likelihood": 1.0, "error_auroc_of_uncertainty": math.nan, "weighted_f1_interval": (0.4, 0.6)}
        for n in (1, 5)
    ]
    fitted = {"split": "validation", "stored_in": "runs/tiny", "ece_before": 0.25, "ece_after": 0.125}
    fitted |= {"nll_before": 1.5, "nll_after": 1.25}
    return folder, *write(make_measured(), folder, test_time_augmentation=passes, fitted_calibration=fitted)


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_calibration_before_is_that_of_the_raw_logits():
    measured = make_measured()
    calibration, outputs = judge(measured, num_samples=5)["calibration"], measured.rows["model"]
    for name, factor in (("before", 2.0), ("after", 1.0)):
        probabilities = scipy.special.softmax(factor * outputs["logits"].astype(np.float64), axis=1)
        expected = sklearn.metrics.log_loss(outputs["labels"], probabilities)
        assert calibration[name]["negative_log_likelihood"] == pytest.approx(expected)
        assert calibration[name]["mean_confidence"] == pytest.approx(probabilities.max(1).mean())
    assert set(judge(make_measured(temperature=1.0), num_samples=5)["calibration"]) == {"after"}


def test_the_numbers_of_one_clip_without_anything_else():
    report = judge(Measured(NAMES, {"model": make_outputs([2], fitted=False)}), num_samples=5)
    assert set(report["rows"]) == {"model"} and report["open_set"] == {} == report["gaps"]
    assert report["rejection"] is None


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_begins_with_what_and_three_lines(written):
    _, text, content = written
    title, what, lines = text.split("\n\n")[:3]
    assert title == "# How well does tiny judge?"
    assert what == (
        "`tiny` on corpus (split: test): 120 clips of neutral, happy, sad, angry; languages: de, en. Clips of none of "
        "these classes: 40 of noise, 30 of fear & awe."
    )
    assert lines.split("\n") == [f"- {line}" for line in content["verdict"]] and len(content["verdict"]) == 3


def test_every_picture_is_there_and_shown_once(written):
    folder, text, _ = written
    shown = re.findall(r"!\[[^]]+\]\((.+?)\)\n\n\*[^\n]+\.\*", text)  # with a caption below
    assert sorted(shown) == sorted(f"plots/{path.name}" for path in (folder / "plots").iterdir())
    names = {"rows", "confusion_matrix", "reliability", "risk_coverage", "by_language"}
    names |= {f"{kind}_{name}" for kind in ("roc", "oscr", "scores") for name in ("noise", "fear_awe")}
    assert {path.stem for path in (folder / "plots").iterdir()} == names
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in shown)


def test_the_tables_say_what_the_json_says(written):
    _, text, content = written
    model = content["rows"]["model"]
    low, high = model["weighted_f1_interval"]
    assert f"| the model       |   120 | {model['weighted_f1']:.3f} ({low:.3f} to {high:.3f}) |" in text
    for set_name in ("noise", "fear & awe", "mean"):
        for row in content["open_set"][set_name].values():
            line = next(
                line
                for line in text.splitlines()
                if line.startswith(f"| {set_name} ") and f"{row['oscr']:.4f}" in line
            )
            assert f" {row['auroc']:.3f}" in line and f" {row['fpr_at_95_tpr']:.4f} " in line
    for language, row in model["by_language"].items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {language} "))
        assert f"{row['weighted_f1']:.3f} (" in line and f" {row['rejected']:.4f} " in line
    gap = content["gaps"]["language"]["weighted_f1"]
    assert f"{gap['highest']} has the highest weighted F1" in text and f"{gap['gap']:.3f} apart" in text
    assert re.search(
        r"\| +5 \| 0\.500 \(0\.400 to 0\.600\) \| 0\.1000 \| 1\.0000 \| +n/a \| +2\.5000 \| +20\.8333 \|", text
    )
    fitted = (
        "It was fitted in this run, on the validation split, and stored in runs/tiny. On that split, ECE went from"
    )
    fitted += " 0.2500 to 0.1250 and NLL from 1.5000 to 1.2500."
    assert f"The temperature is 2.000. {fitted}\n\n| scaling |" in text
    accepted = content["rejection"]["known_accepted"]
    assert re.search(rf"\| known, accepted +\| {accepted:.4f} \|", text)
    for name, counts in content["rejection"]["answers"].items():  # "unknown" is the first answer
        assert re.search(rf"\| {name} +\| +" + r" \| +".join(map(str, counts)) + r" \|", text)
    assert re.search(r"\| clips \\ answer +\| +unknown \| +known: neutral \|", text)
    assert "python eval_hf.py --checkpoint tiny" in text


def test_no_unknown_clips_no_groups_and_all_right(tmp_path):
    pytest.importorskip("matplotlib")
    labels = np.arange(12) % 3  # no clip is angry
    outputs = {**make_outputs(labels, fitted=False), "logits": np.float32(5 * np.eye(4)[labels])}
    measured = make_measured(
        12, rows={"model": outputs}, unknown_sets={}, groups={}, train_outputs=None, temperature=1.0
    )
    text, content = write(measured, tmp_path)
    assert content["rows"]["model"]["error_auroc_of_uncertainty"] is None
    assert "Its answers are all right, so its uncertainty cannot be judged." in text
    assert "no folder of unknown clips was given" in text and "n/a" in text
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {
        *("rows", "confusion_matrix", "reliability", "risk_coverage")
    }


def test_one_clip_has_a_report(tmp_path):
    pytest.importorskip("matplotlib")
    measured = Measured(
        NAMES,
        {"model": make_outputs([2], accuracy=1.0)},
        {"sex": ["female"]},
        {"noise": make_outputs([0], 1)},
        class_counts=[1, 0, 0, 0],
    )
    text, content = write(measured, tmp_path)
    assert content["rows"]["majority"]["weighted_f1"] == 0
    assert content["gaps"] == {"sex": {}} and "## By sex" in text


def test_a_hundred_groups_have_a_table_and_no_picture(tmp_path):
    pytest.importorskip("matplotlib")
    measured = make_measured(groups={"speaker": [f"s{i % 100}" for i in range(120)]}, unknown_sets={})
    text, _ = write(measured, tmp_path)
    assert "| s99 " in text and "by_speaker" not in text


# --- the verdict -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accuracy", "few"), [(0.98, "2 answers are wrong"), (0.05, "5 answers are right")])
def test_a_handful_of_errors_is_not_taken_at_its_word(accuracy, few):
    report = make_report(make_measured())
    report["rows"]["model"] |= {"clips": 100, "accuracy": accuracy, "error_auroc_of_uncertainty": 0.99}
    assert "in 99 % of the pairs" in verdict(report)[2] and f"Only {few}: it may be chance." in verdict(report)[2]
    report["rows"]["model"]["accuracy"] = 0.9
    assert "chance" not in verdict(report)[2]


def test_the_verdict_follows_the_numbers():
    report = make_report(make_measured())
    report["rows"]["model"] |= {"accuracy": 0.7, "weighted_f1": 0.71, "weighted_f1_interval": (0.6, 0.8)}
    report["rows"]["linear_probe"]["weighted_f1"] = 0.75
    report["rows"]["majority"]["weighted_f1"] = 0.1
    report["rows"]["audio_only"]["weighted_f1"] = 0.99  # over other clips: no comparison
    report["calibration"]["after"] |= {"expected_calibration_error": 0.05, "mean_confidence": 0.8}
    report["calibration"]["before"]["expected_calibration_error"] = 0.2
    report["rejection"] |= {"known_accepted": 0.95, "unknown_rejected": {"noise": 0.5}}
    right, score, doubt = verdict(report)
    assert "For 70 % of 120 clips. Its weighted F1 is 0.710 (95 % interval 0.600 to 0.800)." in right
    assert "Always answering the most frequent class reaches 0.100." in right
    assert right.endswith("The best row is `linear probe`, with 0.750.")
    assert "off by 5.0 points (ECE). Without temperature scaling it would be off by 20.0." in score
    assert score.endswith("The model is too sure: its mean score is 80 %, and 70 % of its answers are right.")
    assert doubt.endswith("it accepts 95 % of the known clips and rejects 50 % of noise.")
    report["rows"]["linear_probe"]["weighted_f1"] = 0.5
    report["calibration"]["after"]["mean_confidence"] = 0.69
    right, score, _ = verdict(report)
    assert (
        right.endswith("No other row does better.") and "do not show that the scores are too high or too low" in score
    )
    report["calibration"]["after"]["mean_confidence"] = 0.5
    assert "The model is too modest" in verdict(report)[1]
    report["open_set"] = {"noise": {"openmax": {"auroc": 0.7}, "energy": {"auroc": 0.9}}}
    assert "in 70 % of the pairs (best: energy, 90 %)." in verdict(report)[2]
    report["open_set"] = {"noise": {"openmax": {"auroc": 0.9}, "energy": {"auroc": 0.7}}}
    assert "in 90 % of the pairs." in verdict(report)[2]


@pytest.mark.parametrize(
    ("clips", "confidence", "says"),
    [
        (18, 0.30, "do not show that the scores are too high or too low: its mean score is 30 %, and 17 % of its "),
        (18, 0.45, "The model is too sure: its mean score is 45 %"),
        (18, 0.02, "The model is too modest: its mean score is 2 %"),
        (180_000, 0.18, "The model is neither too sure nor too modest"),
        (180_000, 0.30, "The model is too sure: its mean score is 30 %"),
    ],
)
def test_a_few_clips_are_no_proof_that_scores_are_off(clips, confidence, says):
    """Of 18 answers, 3 right ones allow an accuracy from 3.6 to 41.4 % (Clopper & Pearson)."""
    report = make_report(make_measured())
    report["rows"]["model"] |= {"clips": clips, "accuracy": 1 / 6}
    report["calibration"]["after"]["mean_confidence"] = confidence
    score = verdict(report)[1]
    assert says in score
    assert ("(95 % interval 4 % to 41 %)." in score) == ("do not show" in says)


def test_a_command_names_no_folders_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    away = tmp_path.parent / "my data"
    words = [
        "/opt/bin/train_hf.py",
        str(tmp_path / "recipes" / "a.json"),
        "--data_dir",
        str(away),
        "runs/x",
        "http://a/b",
    ]
    words += [
        f"--output_dir={away}/run",
        "--label_map",
        f'{{"{tmp_path}/b": "c"}}',
        "--text_column",
        "a/b",
        "--lr=1e-3",
    ]
    told = shlex.split(reproducible(words))
    assert told[:6] == ["train_hf.py", "recipes/a.json", "--data_dir", "my data", "runs/x", "http://a/b"]
    assert told[6:] == ["--output_dir=run", "--label_map", '{"b": "c"}', "--text_column", "a/b", "--lr=1e-3"]


def test_the_command_can_be_pasted_and_has_no_token():
    token = "hf_" + "aB3" * 12
    command = reproducible(["eval_hf.py", "--data_dir", "my data", "--token", token, "--ood_dir", "hf_data"])
    assert command == "eval_hf.py --data_dir 'my data' --token hf_... --ood_dir hf_data"
