# SPDX-License-Identifier: Apache-2.0
"""Tests of what all benchmarks share, of the committed results, and of `open_set.py`, `head_depth.py`, `judged.py`,
`compatibility.py`, `bad_data.py`, `faults.py`."""

import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.torch
import torch

from benchmarks import bad_data
from configuration_mmser import MMSERConfig
from mmser.bad_rows import BadRows
from mmser.examples import drop_unreadable
from mmser.loading import load_emotion_dataset
from openmax_mmser import OpenMax

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "open_set.py"
RESULTS = SCRIPT.parent / "results"
DOCS = SCRIPT.parents[1] / "docs" / "results.md"


@pytest.fixture(scope="module")
def shared(script):
    """`benchmarks/tables.py`"""
    return sys.modules[script.publish.__module__]


# ---- what all benchmarks share


def test_cells_and_differences_are_numpys(shared):
    values = {0: 0.5, 1: 0.75, 2: 0.7}
    numbers = np.array(list(values.values()))
    assert shared.cell(values) == f"{numbers.mean():.3f} ± {numbers.std(ddof=1):.3f}" == "0.650 ± 0.132"
    assert (shared.cell({None: 0.3}), shared.cell({})) == ("0.300", "-")
    one, other = {0: 0.5, 1: 0.7, 3: 0.9}, {1: 0.6, 0: 0.3, 2: 0.0}  # seeds 0 and 1 are in both
    assert shared.difference(one, other) == "+0.150 ± 0.071" and shared.difference(other, one) == "-0.150 ± 0.071"
    assert shared.difference(one, {5: 0.1}) == "-"
    assert [shared.three_digits(value) for value in (13834.2, 424.46, 40.79, 0.0119, 1.0)] == [
        *("13834", "424", "40.8", "0.0119", "1"),
    ]


def test_results_survive_being_written(shared, tmp_path):
    report = {
        "setting": {"a": 1},
        "rows": [{"x": 0.1 + 0.2, "of": [1, 2]}, {"x": float("nan")}],
        "deep": {"b": {"c": 1}},
    }
    lines = [{"row": "a, b", "seed": None, "x": 0.1 + 0.2}, {"row": "c", "seed": 3, "x": 1e-17, "y": "z"}]
    (tmp_path / "r.json").write_text(shared.short_json(report), encoding="utf-8")
    shared.write_csv(tmp_path / "r.csv", lines)
    stored, read = shared.read_results(tmp_path / "r.json")
    assert stored == {**report, "rows": [report["rows"][0], {"x": None}]}
    assert len((tmp_path / "r.json").read_text().splitlines()) == 10
    assert read == [{**lines[0], "y": None}, lines[1]]
    with pytest.raises(ValueError, match=r"nothing\.json does not exist: run the benchmark"):
        shared.read_results(tmp_path / "nothing.json")


def test_tables_go_between_their_markers(shared, tmp_path):
    first, second = tmp_path / "first.md", tmp_path / "second.md"
    text = "# {}\n<!-- {name} -->\nold\n<!-- /{name} -->\nafter\n"
    first.write_text(text.format("One", name="a:b"))
    second.write_text(text.format("Two", name="c") + text.format("Three", name="a:b"))
    files = [first, second, tmp_path / "none.md"]
    assert shared.write_tables({"a:b": "| new |"}, files) == ["first.md: a:b", "second.md: a:b"]
    new = "<!-- a:b -->\n\n| new |\n\n<!-- /a:b -->\nafter\n"
    assert first.read_text() == f"# One\n{new}"
    assert second.read_text() == text.format("Two", name="c") + f"# Three\n{new}"
    shared.write_tables({"a:b": "| new |"}, files)
    assert first.read_text() == f"# One\n{new}"
    for wrong in ("<!-- a:b -->\n", "<!-- /a:b --> <!-- a:b -->", 2 * "<!-- a:b --><!-- /a:b -->"):
        second.write_text(wrong)
        with pytest.raises(ValueError, match="once after it"):
            shared.write_tables({"a:b": "| newer |"}, files)
        assert first.read_text() == f"# One\n{new}"


# ---- what is committed


def committed_tables():
    from benchmarks import (
        adapters,
        auxiliary_tasks,
        compatibility,
        distillation,
        fusion,
        head_depth,
        judged,
        load,
        never_heard,
        noise,
        open_set,
        parts,
        prediction_sets,
        real_speech_tables,
        serving,
        small_model,
        soft_targets,
        speed,
        wide,
    )
    from benchmarks.tables import read_results, table, three_digits

    report, lines = read_results(RESULTS / "real_speech.json")
    tables = real_speech_tables.make_tables(report, lines)
    tables |= open_set.make_tables(read_results(RESULTS / "open_set.json")[0])
    tables |= speed.make_tables(read_results(RESULTS / "speed.json")[0])
    tables |= compatibility.make_tables(read_results(RESULTS / "compatibility.json")[0])
    tables |= head_depth.make_tables(read_results(RESULTS / "head_depth.json")[1])
    tables |= prediction_sets.make_tables(*read_results(RESULTS / "prediction_sets.json"))
    tables |= noise.make_tables(read_results(RESULTS / "noise.json")[1])
    tables |= auxiliary_tasks.make_tables(read_results(RESULTS / "auxiliary_tasks.json")[1])
    tables |= fusion.make_tables(read_results(RESULTS / "fusion.json")[1])
    tables |= parts.make_tables(read_results(RESULTS / "parts.json")[1])
    tables |= distillation.make_tables(*read_results(RESULTS / "distillation.json"))
    tables |= small_model.make_tables(read_results(RESULTS / "small_model.json")[1])
    tables |= serving.make_tables(read_results(RESULTS / "serving.json")[0])
    tables |= never_heard.make_tables(read_results(RESULTS / "never_heard.json")[1])
    tables |= wide.make_tables(read_results(RESULTS / "wide.json")[1])
    tables |= soft_targets.make_tables(read_results(RESULTS / "soft_targets.json")[1])
    tables |= {"adapters": adapters.make_table(read_results(RESULTS / "adapters.json")[1])}
    tables |= {"bad_data": table(read_results(RESULTS / "bad_data.json")[0]["rows"], str)}
    tables |= {"faults": table(read_results(RESULTS / "faults.json")[0]["rows"], three_digits)}
    tables |= {"fuzz": table(read_results(RESULTS / "fuzz.json")[0]["rows"], str)}
    tables |= {"load": load.make_table(read_results(RESULTS / "load.json")[0]["rows"])}
    tables |= {"two_versions": table(read_results(RESULTS / "two_versions.json")[0]["rows"])}
    tables |= {"smaller": table(read_results(RESULTS / "smaller.json")[0]["rows"], str)}
    for name in judged.NAMES:
        tables |= judged.make_tables(name, read_results(RESULTS / f"{name}.json")[0])
    return tables


def test_the_docs_have_the_tables_of_the_committed_results():
    text, tables = DOCS.read_text(encoding="utf-8"), committed_tables()
    found = re.findall(r"<!-- (\S+) -->\n\n(.*?)\n\n<!-- /\1 -->", text, re.DOTALL)
    assert len(found) == text.count("<!-- /") == len(re.findall(r"<!-- [^/]", text)) > 15
    for name, shown in found:
        assert shown == tables[name], f"{name}: run the benchmark with --from_results --write_docs"


def test_the_summaries_are_short_and_belong_to_the_measurements(shared):
    for path in RESULTS.glob("*.json"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 200, path
    report, lines = shared.read_results(RESULTS / "real_speech.json")
    for row in report["rows"]:
        for score, key in (("model", "weighted_f1"), ("audio_only", "audio_alone_weighted_f1")):
            own = [x for x in lines if (x["row"], x["score"], x["group"]) == (row["row"], score, "all")]
            assert [line["seed"] for line in own] in ([], row["seeds"])
            assert not own or row[key] == pytest.approx(np.mean([line["weighted_f1"] for line in own]))
    report, lines = shared.read_results(RESULTS / "head_depth.json")
    from benchmarks.head_depth import summarise

    assert report["summary"] == summarise(lines)


def test_summaries_of_runs_hold_what_the_docs_cite(script):
    from benchmarks.judged import make_tables, summarise

    score = {"clips": 8, "weighted_f1": 0.5, "weighted_f1_interval": [0.4, 0.6], "unweighted_average_recall": 0.25}
    sets = {"noise": {"knn": {"auroc": 0.9, "fpr_at_95_tpr": 0.2, "oscr": 0.8}}}
    stored = {"command": "eval", "data": {"clips": {"test": 8}}, "split": "test", "unknown_clips": {"noise": 3}}
    report = {
        **stored,
        "rows": {"model": {**score, "by_corpus": {"a": score}}},
        "open_set": {**sets, "mean": sets["noise"]},
    }
    summary = summarise(report)
    assert summary["clips"] == {"test": 8, "noise": 3} and "by_corpus" not in summary["rows"][0]
    tables = make_tables("x", summary)
    assert "0.400 to 0.600" in tables["x"] and "| AUROC, noise" in tables["x:open_set"]
    trained = {"data": {"clips": {"train": 4}}, "validation": {"model": score}, "test": {"model": score}}
    assert [row["split"] for row in summarise(trained)["rows"]] == ["validation", "test"]


# ---- open_set.py


def clips(count, rng, unknown=False, speakers=6):
    """Outputs of clips of 3 classes in 8 dimensions, most of them classified right; the unknown ones lie elsewhere."""
    labels = rng.integers(3, size=count)
    vectors = (3 * np.eye(8)[labels + 4 * unknown] + rng.standard_normal((count, 8))).astype(np.float32)
    return {
        "logits": vectors[:, :3],
        "fused": vectors,
        "features": vectors + 1,
        "anchor_distances": np.linalg.norm(vectors[:, None] - 3 * np.eye(3, 8)[None], axis=-1).astype(np.float32),
        "uncertainty": rng.random(count).astype(np.float32),
        "rejection_score": rng.random(count).astype(np.float32),
        "labels": labels,
        "corpus": np.array(["a"] * count),
        "speaker": rng.integers(speakers, size=count).astype(str),
    }


@pytest.fixture
def sets(script):
    rng = np.random.default_rng(0)
    known = {name: clips(count, rng) for name, count in (("train", 200), ("validation", 120), ("test", 60))}
    unknown = {name: clips(30, rng, unknown=True) for name in script.NON_SPEECH}
    return known | unknown | {script.WHOLE: clips(60, rng, unknown=True, speakers=12)}


def test_unknown_clips_are_divided_by_speaker(script, sets):
    sets[script.WHOLE]["speaker"][:3] = ["", "1", "99"]
    script.divide_unknown(sets)
    known = set(sets["validation"]["speaker"])
    assert set(sets[script.CHOOSING[0]]["speaker"]) <= known and not set(sets[script.FINAL[0]]["speaker"]) & known
    assert "" in sets[script.FINAL[0]]["speaker"]
    assert len(sets[script.CHOOSING[0]]["labels"]) + len(sets[script.FINAL[0]]["labels"]) == 60
    sets["validation"]["speaker"] = np.array(["nobody"] * 120)
    with pytest.raises(ValueError, match="0 of the 60 clips of --ood_dir are by speakers"):
        script.divide_unknown(sets)


def test_the_shipped_form_is_what_the_configuration_says(script, sets):
    config, form = MMSERConfig(), script.FORMS[script.SHIPPED]
    train, held_out, unknown = (sets[name] for name in ("train", "validation", script.FINAL[1]))
    openmax = OpenMax(3, config.openmax_alpha, config.openmax_level, config.openmax_centroids_per_class, 8)
    openmax.fit_centroids(train["fused"], train["labels"])
    fused = torch.from_numpy(held_out["fused"])
    tail = config.openmax_tail_size
    openmax.fit(openmax.distances(fused), held_out["labels"], held_out["logits"].argmax(axis=1), tail)
    logits, fused = (torch.from_numpy(unknown[name]) for name in ("logits", "fused"))
    expected = openmax.rejection_scores(logits, openmax.distances(fused))
    np.testing.assert_allclose(script.form_scores(form, sets, 0)[script.FINAL[1]], expected, rtol=1e-6)


def test_the_comparison_is_paired_and_signed(script):
    rng = np.random.default_rng(0)
    names = ("test", *script.FINAL)
    known, unknown = rng.standard_normal(60), rng.standard_normal(40) + 1
    good, same, bad = (
        dict(zip(names, values, strict=True))
        for values in (
            [known, unknown + 2, unknown + 2],
            [np.exp(known), np.exp(unknown + 2), np.exp(unknown + 2)],
            [known, unknown, unknown],
        )
    )
    rows = script.compare(good, {"same": same, "bad": bad}, known < 1, num_samples=20)
    assert all(rows[0][metric] == [0, 0, 0] for metric in script.METRICS)  # the same order of the same clips
    for gain, low, high in (rows[1][metric] for metric in script.METRICS):
        assert gain > 0 and 0 < low <= gain <= high


def test_every_form_and_rival_is_measured(script, sets, monkeypatch):
    monkeypatch.setattr(script, "predict", lambda arguments: (sets, {"temperature": 1.5}))
    compare = script.compare
    monkeypatch.setattr(script, "compare", lambda *arguments: compare(*arguments, num_samples=3))
    arguments = type("Options", (), dict.fromkeys(("checkpoint", "data_dir", "ood_dir"), Path("x")))
    report = script.run(arguments)
    rows = {row["score"]: row for row in report["rows"]}
    assert set(script.FORMS) < set(rows) and script.AS_STORED in rows
    assert [row["seeds"] for row in (rows[script.SHIPPED], rows["max_softmax"])] == [3, 1]
    assert {row["rival"] for row in report["shipped_form_against"]} == set(rows) - set(script.FORMS) - {
        script.AS_STORED
    }
    knn = (
        script.open_set_scores(sets["test"], sets["train"])["knn"],
        script.open_set_scores(sets[script.FINAL[1]], sets["train"])["knn"],
    )
    expected = script.auroc(np.concatenate(knn), np.arange(90) >= 60)
    assert rows["kNN on fused, k=10"]["AUROC, no speech"] == pytest.approx(expected)
    assert script.make_tables(report).keys() == {"open_set", "open_set:against"}


# ---- head_depth.py


def test_the_variants_of_the_head_are_fields_of_the_configuration(script):
    from benchmarks.head_depth import VARIANTS

    for fields in VARIANTS.values():
        MMSERConfig(**fields)
    assert VARIANTS["neither (as published)"].keys() == {"zero_init_branches", "scale_branches_by_depth"}


# ---- real_speech.py


def test_the_published_settings_switch_nothing_off():
    recipe = json.loads((Path(__file__).parents[1] / "recipes" / "real_speech_published.json").read_text())
    config = MMSERConfig(**recipe["config_overrides"])
    parts = ("cross_entropy", "focal", "anchor", "uncertainty", "prototype")
    assert [getattr(config, f"{part}_loss_weight") for part in parts] == [1.0, 0.3, 0.1, 0.05, 0.01]
    assert (config.label_smoothing, config.class_balanced_beta, config.focal_gamma) == (0.1, 0.9999, 2.0)
    assert (config.classifier_num_layers, config.openmax_threshold, config.openmax_acceptance) == (35, 0.3, None)
    assert (config.openmax_distance, config.openmax_level) == ("anchor", "activation")
    assert recipe["augment"]


# ---- compatibility.py


QUICK_GROUPS = ["files", "arrays", "arguments", "precision", "modalities", "checkpoints", "offline"]


@pytest.mark.parametrize("group", QUICK_GROUPS)
def test_situations_are_right_or_end_in_a_clear_error(group):
    """The other groups start processes and trainings: `python benchmarks/compatibility.py` runs all of them."""
    from benchmarks import compatibility

    rows = compatibility.run([group])
    assert rows and [row for row in rows if row["outcome"].startswith("WRONG")] == []


def test_all_situations_are_in_the_committed_table():
    from benchmarks import compatibility
    from benchmarks.tables import read_results

    situations = compatibility.common.SITUATIONS
    rows = read_results(RESULTS / "compatibility.json")[0]["rows"]
    assert [(row["group"], row["situation"]) for row in rows] == [(row.group, row.name) for row in situations]
    assert len({(row.group, row.name) for row in situations}) == len(situations) >= 60


def test_a_wrong_situation_is_told(monkeypatch, capsys, tmp_path):
    from benchmarks import compatibility

    def check(world):
        compatibility.common.close(1.0, 2.0)

    def refused(world):
        with compatibility.common.error(ValueError, "name"):
            raise ValueError("something is wrong")

    def missing(world):
        compatibility.common.need("no_such_package")

    made = [("unequal", "right", check), ("unclear", "error", refused), ("absent", "right", missing)]
    made += [("silent", "error", lambda world: None), ("good", "right", lambda world: None)]
    rows = [compatibility.common.Situation("files", *row) for row in made]
    monkeypatch.setattr(compatibility.common, "SITUATIONS", rows)
    assert compatibility.main(["--group", "files"]) == 1
    text = capsys.readouterr().out
    assert text.count("WRONG") == 2 and "lacks ['name']" in text and "no_such_package is not installed" in text
    monkeypatch.setattr(compatibility.common, "SITUATIONS", rows[2:])
    assert compatibility.main(["--group", "files"]) == 0


def test_both_fusions_are_trained_on_speech_and_spoken_text(monkeypatch):
    from benchmarks import fusion

    monkeypatch.setattr(fusion, "STEPS", 1)
    generator = torch.Generator().manual_seed(0)

    def clips(size):
        audio = [torch.randn(2 + i % 3, 2, 16, generator=generator).half() for i in range(size)]
        return [fusion.Clip(audio[i], torch.randn(i % 3, 24, generator=generator), i % 4) for i in range(size)]

    parts = {f"{part} {split}": clips(8) for part in ("speech", "spoken text") for split in fusion.SPLITS}
    lines = fusion.measure(parts, seeds=1)
    assert [(line["trained on"], line["fusion"]) for line in lines[:2]] == [
        ("speech", "gated"),
        ("speech", "transformer"),
    ]
    assert len(lines) == 6 and "spoken text test" in lines[-1] and "spoken text test" not in lines[0]
    tables = fusion.make_tables(lines)
    assert tables["fusion"].count("\n") == 5 and "transformer" in tables["fusion_cost"]
    assert len(fusion.mean_of_frames(np.zeros((33, 2, 16)))) == 3


# ---- auxiliary_tasks.py


@pytest.mark.parametrize("frequency", [80, 120, 220, 350])
def test_the_pitch_of_a_voice_is_its_fundamental_frequency(frequency):
    from benchmarks.auxiliary_tasks import pitch_of

    time = np.arange(16_000) / 16_000
    voice = sum(np.sin(2 * np.pi * frequency * number * time) / number for number in range(1, 9))
    assert pitch_of(voice, 16_000) == pytest.approx(12 * np.log2(frequency / 60), abs=0.3)
    assert np.isnan(pitch_of(np.random.default_rng(0).normal(size=16_000), 16_000))


def test_the_sex_of_a_speaker_is_that_of_its_code():
    from auxiliary_mmser import NO_CLASS
    from benchmarks.auxiliary_tasks import sex_of

    codes = {"RAVDESS_02": 0, "RAVDESS_13": 1, "EMO-DB_09": 0, "EMO-DB_15": 1, "URDU_SF3": 0, "URDU_SM21": 1}
    codes |= {"TESS_OAF": 0, "ASED_04": NO_CLASS}
    assert {speaker: sex_of(speaker.split("_")[0], speaker) for speaker in codes} == codes


# ---- soft_targets.py


def test_raters_are_wrong_as_often_and_as_the_probe_is():
    from benchmarks.soft_targets import RATERS, simulate_votes, wrong_answers

    labels, answers = np.array([0, 0, 0, 0, 1, 1, 2, 3]), np.array([0, 1, 1, 2, 1, 0, 3, 0])
    confusion = wrong_answers(answers, labels)
    np.testing.assert_allclose(confusion, [[0, 2 / 3, 1 / 3, 0], [1, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]])
    with pytest.raises(ValueError, match="never wrong about a class"):
        wrong_answers(np.arange(4), np.arange(4))
    truth = np.repeat(np.arange(4), 1000)
    votes = simulate_votes(truth, confusion, 0.3, seed=0)
    assert votes.shape == (4000, RATERS) and np.mean(votes != truth[:, None]) == pytest.approx(0.3, abs=0.015)
    of_first = votes[truth == 0]
    assert np.mean(of_first[of_first != 0] == 1) == pytest.approx(2 / 3, abs=0.04)
    assert (simulate_votes(truth, confusion, 0.3, seed=1) != votes).any()


def test_votes_are_read_by_the_flag_and_shares_reach_the_model(corpus, monkeypatch):
    from benchmarks import pooled_states, soft_targets
    from mmser.loading import load_emotion_dataset

    split = load_emotion_dataset(corpus, label_names=soft_targets.LABELS)[0]["train"]
    truth = np.array(split["labels"])
    votes = np.stack([truth, truth, truth, (truth + 1) % 4, (truth + 2) % 4], axis=1)
    majority, shares = soft_targets.read_votes(split, votes)
    assert majority.tolist() == truth.tolist()
    expected = np.apply_along_axis(np.bincount, 1, votes, minlength=4) / 5
    np.testing.assert_allclose(shares, expected, atol=1e-6)
    states = [torch.randn(2, 2, 8) for _ in truth]
    names = np.array(["a"] * len(truth))
    clips = pooled_states.Clips(states, majority, names, names, shares=shares).take(truth < 3)
    batch = pooled_states.batch(clips, torch.tensor([3, 0]))
    assert torch.equal(batch["class_shares"], clips.shares[[3, 0]])
    model = pooled_states.build(clips, {"classifier_num_layers": 0})
    assert model.config.class_counts == np.rint(expected[truth < 3].sum(axis=0)).astype(int).tolist()
    monkeypatch.setattr(pooled_states, "EPOCHS", 1)
    monkeypatch.setattr(pooled_states, "FIELDS", {**pooled_states.FIELDS, "classifier_num_layers": 0})
    everyone = dict.fromkeys(("train", "validation", "test"), pooled_states.Clips(states, majority, names, names))
    confusion = np.full((4, 4), 1 / 3) - np.eye(4) / 3
    lines = soft_targets.measure(everyone, split, confusion, [0])
    assert [line["learnt"] for line in lines] == [
        soft_targets.TRUTH,
        *2 * [soft_targets.MAJORITY, soft_targets.SHARES],
    ]
    assert lines[0]["right"] == 1 and lines[3]["right"] == lines[4]["right"] < 1
    assert lines[3]["test_log_loss"] != lines[4]["test_log_loss"]
    assert soft_targets.make_tables(lines)["soft_targets"].count("\n") == 6


# ---- distillation.py


@pytest.fixture
def teacher_and_students(corpus, tmp_path):
    """A trained teacher of both modalities, small recipes for its students, and the flags of the benchmark."""
    from tiny_corpus import AUDIO, JOINT, TEXT, tiny_tokenizer
    from transformers import BertConfig, BertModel, Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    import train_hf

    torch.manual_seed(0)
    Wav2Vec2Model(Wav2Vec2Config(**{**AUDIO, "num_hidden_layers": 2})).save_pretrained(tmp_path / "audio")
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(tmp_path / "audio")
    BertModel(BertConfig(vocab_size=len(tiny_tokenizer()), **TEXT)).save_pretrained(tmp_path / "text")
    tiny_tokenizer().save_pretrained(tmp_path / "text")
    short = {"max_steps": 2, "dataloader_num_workers": 0, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    frozen = {**short, "freeze_audio": True, "freeze_text": True, "config_overrides": JOINT}
    (tmp_path / "recipes").mkdir()
    for name, recipe in (("all_parts", frozen), ("finetune", {**short, "freeze_text": True})):
        (tmp_path / "recipes" / f"real_speech_{name}.json").write_text(json.dumps(recipe))
    encoders = {f"{kind}_model_name_or_path": str(tmp_path / kind) for kind in ("audio", "text")}
    recipe = {**frozen, **encoders, "data_dir": str(corpus), "output_dir": str(tmp_path / "teacher")}
    (tmp_path / "teacher.json").write_text(json.dumps(recipe))
    train_hf.main([str(tmp_path / "teacher.json")])
    places = {"data_dir": corpus, "audio_encoder": tmp_path / "audio", "teacher": tmp_path / "teacher"}
    places |= {"recipes": tmp_path / "recipes", "work_dir": tmp_path / "work", "output": tmp_path / "out.json"}
    return [word for name, value in places.items() for word in (f"--{name}", str(value))]


def test_students_differ_by_the_teacher_alone(shared, teacher_and_students, tmp_path, capsys):
    from benchmarks import distillation

    flags = [*teacher_and_students, "--seeds", "0", "--layers", "1", "--blocks", "1", "--threads", "1"]
    assert distillation.main(flags) == 0
    report, _ = shared.read_results(tmp_path / "out.json")
    students = [row["row"] for row in report["rows"]]
    assert len(students) == 4 and all(row["seeds"] == [0] for row in report["rows"])
    results = json.loads((tmp_path / "teacher" / "eval_results.json").read_text())
    assert report["teacher"]["test_weighted_f1"] == results["test"]["model"]["weighted_f1"]
    recipes = {
        path.parts[-3]: json.loads(path.read_text())
        for path in (tmp_path / "work").glob("distillation/*/*/recipe.json")
    }
    for encoder in distillation.ENCODERS:
        alone, taught = (recipes[f"{encoder}_encoder_labels_{rest}"] for rest in ("alone", "and_teacher"))
        assert alone["config_overrides"].pop("distillation_loss_weight") == 0
        assert taught["config_overrides"].pop("distillation_loss_weight") == 1
        assert taught.pop("teacher_name_or_path") == str(tmp_path / "teacher")
        for recipe in (alone, taught):
            del recipe["output_dir"]
            assert ("cache_encoder_states" in recipe) == (encoder == "frozen")
            start = recipe.pop("model_name_or_path", None)
            assert (start is None) == (encoder == "frozen")
        assert alone == taught
    assert list((tmp_path / "work" / "states").glob("teacher-*/*.safetensors"))  # its answers are kept
    shown = capsys.readouterr().out
    assert shown.count("| frozen encoder, ") == shown.count("| tuned encoder, ") == 2
    assert distillation.main(["--from_results", "--output", str(tmp_path / "out.json")]) == 0
    assert capsys.readouterr().out in shown
    results["data"]["clips"]["test"] += 1
    (tmp_path / "teacher" / "eval_results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="--teacher was judged on"):
        distillation.main(flags)


# ---- bad_data.py


def test_of_spoilt_files_those_that_cannot_be_used_are_left_out(tmp_path):
    """All kinds that the campaign counts as bad are bad to the loader, and the others are not."""
    spoilt = bad_data.make_corpus(tmp_path / "corpus", 140, 32 / 140)
    kinds = list(spoilt.values())
    assert {kinds.count(kind) for kind in (*bad_data.UNREADABLE, *bad_data.READABLE)} == {4}
    rule = BadRows("skip", 1.0)
    source = {"on_bad_example": rule, "label_names": bad_data.LABELS}
    splits, _ = load_emotion_dataset(manifest=tmp_path / "corpus" / "metadata.csv", **source)
    left = {Path(clip).name for split in splits.values() for clip in drop_unreadable(split, rule)["audio"]}
    bad = {name for name, kind in spoilt.items() if kind in bad_data.UNREADABLE}
    assert left == {f"{number}.wav" for number in range(140)} - bad and len(rule.problems) == len(bad) == 20


def test_few_labels_of_no_class_are_bad_rows(tmp_path):
    spoilt = bad_data.make_corpus(tmp_path / "corpus", 600, 0.02, [bad_data.OF_NO_CLASS])
    source = {"manifest": tmp_path / "corpus" / "metadata.csv", "label_names": bad_data.LABELS}
    with pytest.raises(ValueError, match=r"labels? cannot be used"):
        load_emotion_dataset(**source)
    rule = BadRows("skip", 1.0)
    splits, _ = load_emotion_dataset(**source, on_bad_example=rule)
    left = {Path(clip).name for split in splits.values() for clip in split["audio"]}
    assert len(spoilt) == len(rule.problems) == 12 and left == {f"{number}.wav" for number in range(600)} - set(spoilt)
    assert all("unknown label" in problem for problem in rule.problems)


def test_many_labels_of_no_class_are_no_bad_rows(tmp_path):
    """They may be a whole class, which would be lost: the run ends before a clip is read."""
    spoilt = bad_data.make_corpus(tmp_path / "corpus", 40, 0.2, [bad_data.OF_NO_CLASS])
    assert len(spoilt) == 8
    source = {"manifest": tmp_path / "corpus" / "metadata.csv", "on_bad_example": BadRows("skip", 1.0)}
    with pytest.raises(
        ValueError, match=r"\d labels cannot be used:\n  metadata\.csv row \d+: unknown label '\w+'"
    ) as refused:
        load_emotion_dataset(**source, label_names=bad_data.LABELS)
    assert "A whole class is no bad row, and is not skipped: correct the labels" in str(refused.value)


# ---- faults.py


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forks")


@needs_fork
@pytest.mark.parametrize(
    ("now", "wrong"),
    [
        ({}, []),
        ({"a.png": "old", "report.md": "old"}, []),
        ({"a.png": "new", "report.md": "new", ".report.md.pc-1.tmp": "half", "checkpoint-2/x": "half"}, []),
        ({"a.png": "new"}, []),
        ({"a.png": "half"}, ["a.png"]),
        ({"a.png": "new", "report.md": "old"}, ["a.png of report.md"]),
        ({"report.md": "new"}, ["a.png of report.md"]),
    ],
)
def test_what_a_user_would_take_for_whole(now, wrong):
    from benchmarks import faults

    campaign = faults.Campaign(print, lambda folder: [], {"report.md": ("*.png",)})
    before, after = ({"a.png": age, "report.md": age} for age in ("old", "new"))
    assert faults.half_written(campaign, before, now, after) == wrong


@needs_fork
def test_a_command_that_was_killed_ends_as_one_that_was_not(tmp_path):
    names = ["train, frozen, cached", "predict in parts"]
    command = [sys.executable, SCRIPT.parent / "faults.py", "--cases", "1", "--commands", *names]
    command += ["--kinds", "operation", "--output", tmp_path / "faults.json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=600)
    rows = json.loads((tmp_path / "faults.json").read_text())["rows"]
    assert [row["command"] for row in rows] == names
    assert all(row["cases"] == row["hit"] == 1 for row in rows)
    assert not any(row[problem] for row in rows for problem in ("lost", "wrong", "hung"))
    assert rows[0]["largest difference"] == 0


@needs_fork
def test_rows_that_are_not_measured_again_stay():
    from benchmarks import faults

    earlier = [{"command": name, "fault": "moment", "cases": 1} for name in ("a", "b", "c")]
    new = [{"command": "b", "fault": fault, "cases": 2} for fault in ("read-only", "moment")]
    rows = faults.in_place_of(earlier, new, ["a", "b", "c"])
    found = [(row["command"], row["fault"], row["cases"]) for row in rows]
    assert found == [("a", "moment", 1), ("b", "moment", 2), ("b", "read-only", 2), ("c", "moment", 1)]


@needs_fork
def test_the_end_of_a_search_is_checked(tmp_path):
    from benchmarks import faults

    search = tmp_path / "search"
    (search / "trial-1").mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(search / "search.db")) as database:
        database.execute("CREATE TABLE trials (trial_id, number, state)")
        database.execute("CREATE TABLE trial_values (trial_id, value)")
        database.executemany("INSERT INTO trials VALUES (?, ?, ?)", [(1, 0, "COMPLETE"), (2, 1, "COMPLETE")])
        database.executemany("INSERT INTO trial_values VALUES (?, ?)", [(1, 0.25), (2, 0.5)])
        database.commit()
    for name, folder in (("best_recipe", "best"), ("trial-1", "trial-1")):
        (search / f"{name}.json").write_text(json.dumps({"learning_rate": 0.1, "output_dir": folder}))
    results = {"validation": {"model": {"weighted_f1": 0.5}}}
    (search / "trial-1" / "eval_results.json").write_text(json.dumps(results))
    safetensors.torch.save_file({"a": torch.zeros(2)}, search / "trial-1" / "model.safetensors")
    assert faults.not_best(tmp_path, 2) == []
    assert faults.not_best(tmp_path, 3) == ["2 of 3 trials are done"]
    (search / "trial-0").mkdir()
    results["validation"]["model"]["weighted_f1"] = 0.25
    (search / "trial-1" / "eval_results.json").write_text(json.dumps(results))
    safetensors.torch.save_file({"a": torch.full((2,), torch.nan)}, search / "trial-1" / "model.safetensors")
    (search / "best_recipe.json").write_text('{"learning_rate": 0.2, "output_dir": "best"}')
    assert faults.not_best(tmp_path, 2) == ["the folders", "the recipe", "the score", "the weights"]


@needs_fork
def test_answers_in_parts_are_checked(tmp_path):
    from benchmarks import faults

    folder = tmp_path / "answers"
    (folder / "parts").mkdir(parents=True)
    assert faults.makes_the_rest(tmp_path, 2) == " 1 of 2 to make\n"
    for number in range(2):
        (folder / "parts" / f"part-{number}").touch()
        (tmp_path / f"{number}.wav").touch()
    assert faults.makes_the_rest(tmp_path, 2) == "Written: "
    clips = [str(tmp_path / f"{number}.wav") for number in range(2)]
    assert faults.not_each_once(tmp_path, tmp_path), "there is no file of all answers"
    for answered, is_right in ((clips, True), (clips[:1], False), ([*clips, clips[0]], False), (clips[::-1], False)):
        pyarrow.parquet.write_table(pyarrow.table({"file": answered}), folder / "answers.parquet")
        assert (not faults.not_each_once(tmp_path, tmp_path)) == is_right
