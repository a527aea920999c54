# SPDX-License-Identifier: Apache-2.0
"""Tests of `benchmarks/real_speech.py`: what is run, in which order and with which data, and what is told of it."""

import csv
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_corpus import AUDIO, JOINT, TEXT, tiny_tokenizer, write_corpus, write_table
from transformers import BertConfig, BertModel, Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

from mmser.arguments import TRAINING_ARGUMENTS, parse_arguments
from mmser.export import export_checkpoint
from mmser.loading import load_emotion_dataset
from modeling_mmser import MMSERForAudioClassification
from processing_mmser import MMSERPipeline, MMSERProcessor

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "real_speech.py"
STAGE_1 = {
    "freeze_audio": True,
    "freeze_text": True,
    "config_overrides": {**JOINT, "classifier_dropout": 0.25},
    "lr_multipliers": {"classifier": 3.0},
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "dataloader_num_workers": 0,
    "save_strategy": "no",
    "use_cpu": True,
}
STAGE_2 = {**{name: STAGE_1[name] for name in STAGE_1 if name != "freeze_audio"}, "learning_rate": 1e-5}
SPOKEN_CORPUS = "XED-spoken"


@pytest.fixture(scope="module")
def given(tmp_path_factory, script):
    """Two small corpora, two small encoders and the recipes; the folder that holds them."""
    folder = tmp_path_factory.mktemp("given")
    write_corpus(folder / "speech")
    write_corpus(folder / "spoken")
    for path in (folder / "spoken").glob("*/metadata.csv"):
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        write_table(path, [{**row, "corpus": SPOKEN_CORPUS} for row in rows])
    write_corpus(folder / "wide")
    shutil.rmtree(folder / "wide" / "test")
    torch.manual_seed(0)
    Wav2Vec2Model(Wav2Vec2Config(**AUDIO)).save_pretrained(folder / "audio")
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder / "audio")
    BertModel(BertConfig(vocab_size=len(tiny_tokenizer()), **TEXT)).save_pretrained(folder / "text")
    tiny_tokenizer().save_pretrained(folder / "text")
    (folder / "recipes").mkdir()
    for name in script.RECIPES:
        recipe = STAGE_2 if name in (script.STAGE_2, script.WIDE_2) else STAGE_1
        (folder / "recipes" / name).write_text(json.dumps(recipe))
    return folder


@pytest.fixture
def flags(given, tmp_path):
    places = {"data_dir": "speech", "spoken_text_dir": "spoken", "wide_data_dir": "wide"}
    places |= {"audio_encoder": "audio", "text_encoder": "text"}
    words = [word for name, value in places.items() for word in (f"--{name}", str(given / value))]
    words += ["--work_dir", str(tmp_path / "work"), "--recipes", str(given / "recipes"), "--threads", "1"]
    return [*words, "--output", str(tmp_path / "results.json")]


@pytest.fixture
def options(script, flags):
    return script.parse_flags(flags)


# ---- the study


@pytest.fixture
def done(script, monkeypatch):
    """Functions that score without any model; the list has the runs in order, and `x` of a row's changes fails."""
    runs = []

    def act(study, run):
        runs.append((run.row.name, run.seed))
        if run.row.changes.get("x") == "fails":
            raise RuntimeError("what went wrong")
        (study.folder(run) / "model").mkdir()
        (study.folder(run) / "model" / "config.json").touch()
        values = dict.fromkeys(script.METRICS, 0.5 + run.seed / 10)
        return {"training_seconds": 2.0, "scores": [{"score": "model", "group": "all", "clips": 4, **values}]}

    monkeypatch.setitem(script.FUNCTIONS, "act", act)
    return runs


def do_all(script, options, rows):
    study = script.Study(options, rows)
    return study.execute(study.plan(study.rows))


def test_what_is_finished_is_not_done_again_unless_its_settings_change(script, done, options):
    rows = [script.Row("a", "study", function="act"), script.Row("b", "study", function="act", changes={"x": 1})]
    assert do_all(script, options, rows) == []
    assert sorted(done) == [(name, seed) for name in "ab" for seed in (0, 1, 2)]
    done.clear()
    rows[0] = dataclasses.replace(rows[0], note="words change nothing")
    rows[1] = dataclasses.replace(rows[1], changes={"x": 2})
    report, lines = script.collect(script.Study(options, rows))
    assert [row["seeds"] for row in report["rows"]] == [[0, 1, 2], []]  # results of earlier settings are not reported
    assert {line["row"] for line in lines} == {"a"}
    assert do_all(script, options, rows) == [] and done == [("b", 0), ("b", 1), ("b", 2)]
    options.seeds = [1, 3]
    done.clear()
    assert do_all(script, options, rows) == [] and sorted(done) == [("a", 3), ("b", 3)]


def test_a_changed_recipe_is_another_setting_also_for_what_starts_from_it(script, done, options, tmp_path):
    options.recipes = tmp_path
    (tmp_path / script.RECIPE).write_text('{"learning_rate": 1}')
    first = script.Row("first", "study", script.RECIPE)
    study = script.Study(options, [first, script.Row("next", "study", function="act", starts_from="first")])
    before = [study.fingerprint(row) for row in study.rows.values()]
    (tmp_path / script.RECIPE).write_text('{"learning_rate": 2}')
    assert all(study.fingerprint(row) != old for row, old in zip(study.rows.values(), before, strict=True))
    with pytest.raises(ValueError, match=r"real_speech_audio.json does not exist: --recipes must be a folder with"):
        study.settings(script.Row("other", "study", script.STAGE_1))


def test_needed_rows_come_first_and_are_done_although_not_asked_for(script, done, options):
    rows = [
        script.Row("last", "parts", function="act", needs=("second", "once")),
        script.Row("second", "study", function="act", starts_from="first", averages=2),
        script.Row("first", "study", function="act", keep=True),
        script.Row("once", "study", function="act", once=True),
    ]
    options.seeds = [0, 1]
    study = script.Study(options, rows)
    study.execute(study.plan(["last"]))
    order = {run: position for position, run in enumerate(done)}
    assert len(order) == len(done) == 9  # the first row with seeds 0, 1, 10 and 11
    for seed in (0, 1):
        assert order["first", seed] < order["second", seed] < order["last", seed]
        assert order["first", seed + script.SEED_STEP] < order["second", seed]
        assert order["once", 0] < order["last", seed]
    # a checkpoint that is gone is made again only for a run that starts from it
    (study.folder(script.Run(rows[2], 0)) / "model" / "config.json").unlink()
    assert study.plan(study.rows) == []
    (study.folder(script.Run(rows[1], 0)) / "result.json").unlink()
    assert [str(run) for run in study.plan(study.rows)] == ["study / first, seed 0", "study / second, seed 0"]


def test_runs_that_are_averaged_can_start_from_one_checkpoint(script, done, options):
    rows = [
        script.Row("last", "study", function="act", starts_from="second", averages=3),
        script.Row("second", "study", function="act", starts_from="first", common_start=True, keep=True),
        script.Row("first", "study", function="act", keep=True),
    ]
    options.seeds = [0, 1]
    study = script.Study(options, rows)
    study.execute(study.plan(["last"]))
    assert sorted(seed for name, seed in done if name == "first") == [0, 1]
    assert sorted(seed for name, seed in done if name == "second") == [0, 1, 10, 11, 20, 21]
    assert [start.seed for start in study.starts(script.Run(rows[1], 21))] == [1]


def test_a_failure_is_told_and_stops_only_what_needs_it(script, done, flags, monkeypatch, capsys):
    rows = [
        script.Row("bad", "study", function="act", changes={"x": "fails"}),
        script.Row("next", "study", function="act", needs=("bad",)),
        script.Row("good", "study", function="act"),
    ]
    study = script.Study
    monkeypatch.setattr(script, "Study", lambda options: study(options, rows))
    assert script.main([*flags, "--seeds", "0", "2"]) == 1
    assert done == [("bad", 0), ("bad", 2), ("good", 0), ("good", 2)]
    printed = capsys.readouterr()
    assert "study / bad, seed 2: RuntimeError: what went wrong" in printed.err
    assert "study / next, seed 0: RuntimeError: not done, because this failed: study / bad, seed 0" in printed.err
    assert "Not finished: bad; next" in printed.out and "0.600 ± 0.141" in printed.out
    output = Path(flags[-1])
    assert [row["seeds"] for row in json.loads(output.read_text(encoding="utf-8"))["rows"]] == [[], [], [0, 2]]
    assert script.main([*flags, "--list", "--rows", "go*"]) == 0
    assert "0, 2" in capsys.readouterr().out
    # the tables come from the two files alone
    monkeypatch.setattr(script, "Study", None)
    assert script.main(["--from_results", "--output", str(output)]) == 0
    assert capsys.readouterr().out in printed.out
    with pytest.raises(SystemExit):
        script.main(["--data_dir", "somewhere"])
    assert "--audio_encoder, --text_encoder must be given" in capsys.readouterr().err


def test_a_second_command_in_a_folder_is_refused(script, done, flags, monkeypatch):
    """It would remove what the first one is at: a run that is not finished is done anew."""
    work, study = Path(flags[flags.index("--work_dir") + 1]), script.Study
    monkeypatch.setattr(script, "PATIENCE", 0.3)
    monkeypatch.setattr(script, "Study", lambda options: study(options, [script.Row("good", "study", function="act")]))
    with script.alone_in(work):
        with pytest.raises(ValueError, match=r"--work_dir .*work: another command works there\. Wait .*, or give"):
            script.main([*flags, "--seeds", "0"])
        assert script.main([*flags, "--list"]) == 0 and not done
    assert script.main([*flags, "--seeds", "0"]) == 0 and done == [("good", 0)]


# ---- the rows and their data


def test_every_row_of_a_recipe_is_a_command_that_is_understood(script, options, tmp_path):
    study = script.Study(options)
    assert {row.table for row in study.rows.values()} == set(script.TABLES)
    for row in (row for row in study.rows.values() if row.recipe):
        run = script.Run(row, 7)
        for start in study.starts(run):  # finished before, as in a run of the study
            folder = study.folder(start) / "model"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text("{}")
        recipe = tmp_path / "recipe.json"
        recipe.write_text(json.dumps(study.recipe(run)))
        model, data, training = parse_arguments(TRAINING_ARGUMENTS, [str(recipe)])
        assert (training.seed, training.data_seed) == (7, script.DATA_SEED)
        named = [name for name in (model.model_name_or_path, *model.average_with) if name]
        assert named == [str(study.folder(start) / "model") for start in study.starts(run)]
        assert [start.seed for start in study.starts(run)] == [7, 17, 27][: row.averages if row.starts_from else 0]
        assert [start.seed for start in study.starts(script.Run(row, 17))][:1] == (
            [] if row.starts_from is None else [7] if row.common_start else [17]
        )
        assert data.cache_encoder_states is not None  # the text encoder is frozen in all recipes
        # dictionaries of the recipe are merged with those of the row
        assert model.config_overrides["classifier_dropout"] == 0.25
        assert training.lr_multipliers["classifier"] == 3.0
        for name, value in row.changes.get("config_overrides", {}).items():
            assert model.config_overrides[name] == value
    options.spoken_text_dir = None
    assert not {"trained on both", "trained on spoken text"} & set(script.Study(options).rows)


def test_every_part_changes_the_recipe(script):
    recipe = json.loads((script.ROOT / "recipes" / script.RECIPE).read_text())
    for row in script.PARTS:
        assert {**recipe, **row.changes} != recipe, row.name


def clips_of(folder):
    return {name: list(split) for name, split in load_emotion_dataset(folder, test_fraction=0)[0].items()}


def test_a_fold_tests_on_all_of_what_it_never_heard(script, given, options):
    whole = [clip for split in clips_of(given / "speech").values() for clip in split]
    folds = script.fold_rows(options.data_dir)
    assert [dict(row.leaves_out) for row in folds] == [
        {"corpus": "sine"},
        {"corpus": "tone"},
        {"language": "en"},
        {"language": "zxx"},
    ]
    study = script.Study(options)
    for row in folds[:2]:
        splits, value = clips_of(study.data_folder(row)), row.leaves_out["corpus"]
        assert all(clip["corpus"] != value for name in ("train", "validation") for clip in splits[name])
        held_out = {clip["audio"] for clip in whole if clip["corpus"] == value}
        assert {clip["audio"] for clip in splits["test"]} == held_out and len(splits["test"]) == len(held_out)


def test_a_language_of_one_corpus_is_one_fold(script, monkeypatch):
    clips = [("one", "de"), ("two", "en"), ("three", "en"), ("one", "de")]
    split = [{"audio": str(i), "corpus": corpus, "language": language} for i, (corpus, language) in enumerate(clips)]
    monkeypatch.setattr(script, "read_splits", lambda folder: ({"test": split}, []))
    assert {row.name: dict(row.leaves_out) for row in script.fold_rows("")} == {
        "without one = de": {"corpus": "one", "language": "de"},
        "without three": {"corpus": "three"},
        "without two": {"corpus": "two"},
        "without en": {"language": "en"},
    }


@pytest.mark.parametrize(("data", "second"), [("mix", "spoken"), ("wide", "wide")])
def test_both_data_sets_are_joined_split_by_split(script, given, options, data, second):
    row = next(row for row in (*script.TEXT, *script.WIDE_ROWS) if row.data == data)
    folders = (script.Study(options).data_folder(row), given / "speech", given / second)
    both, speech, others = (clips_of(folder) for folder in folders)
    assert ("test" in others) == (data == "mix")
    for split in ("train", "validation", "test"):
        for key in ("audio", "text", "labels", "speaker", "corpus", "language"):
            expected = [clip[key] for clip in (*speech[split], *others.get(split, []))]
            assert [clip[key] for clip in both[split]] == expected


def test_trials_of_both_sets_hold_out_speakers_of_both(script, given, options):
    """All rows have the same clips, none of the test split; the folds of one set alone have other folders."""
    study = script.Study(options)
    folder = study.data_folder(script.WIDE_TRIALS[0])
    assert {study.data_folder(row) for row in script.WIDE_TRIALS} == {folder} != {study.data_folder(script.FOLDS[0])}
    splits = clips_of(folder)
    speakers = [{(clip["corpus"], clip["speaker"]) for clip in splits[name]} for name in ("train", "test")]
    assert speakers[0] and speakers[1] and not speakers[0] & speakers[1]
    read = {name: clips_of(given / name) for name in ("speech", "wide")}
    expected = [clip["audio"] for own in read.values() for name in ("train", "validation") for clip in own[name]]
    assert sorted(clip["audio"] for own in splits.values() for clip in own) == sorted(expected)


def test_what_is_swapped_stays_in_its_language_and_differs(script):
    swap = sys.modules[script.examine_checkpoint.__module__].swap_within_language
    rng = np.random.default_rng(0)
    languages = rng.choice(["de", "en", "tr"], 200).tolist()
    texts = [f"{language} {rng.integers(5)}" if rng.random() < 0.8 else "" for language in languages]
    swapped = swap(texts, languages, seed=1)
    assert swapped == swap(texts, languages, seed=1) != swap(texts, languages, seed=2)
    for text, other, language in zip(texts, swapped, languages, strict=True):
        assert (other is None) == (text == "")
        assert other is None or (other.startswith(language) and other != text and other in texts)
    assert swap(["only", "only", "x"], ["en", "en", "de"], 0) == [None] * 3


# ---- what a run does, with real models


def scores_of(result):
    return {(line["score"], line["group"]): line for line in result["scores"]}


@pytest.fixture
def no_onnx(script, monkeypatch):
    """PyTorch in place of onnxruntime: an export to ONNX takes as long as all else. `test_export.py` has it."""

    def export(checkpoint, folder, **options):
        report = export_checkpoint(checkpoint, folder, formats=["safetensors"], **options)
        report.sizes["model.onnx"] = report.sizes.pop("model.safetensors")
        return report

    def load(folder, **options):
        model, processor = (part.from_pretrained(folder) for part in (MMSERForAudioClassification, MMSERProcessor))
        return MMSERPipeline(model, processor=processor, device="cpu", **options)

    monkeypatch.setattr(script, "export_checkpoint", export)
    monkeypatch.setattr(script.MMSERPipeline, "from_onnx", load)


def test_stages_modalities_and_exports(script, options, quiet, no_onnx):
    """Two stages, what is said of their modalities, a model of both data sets, and an export."""
    study = script.Study(options)
    study.rows[script.BEST] = dataclasses.replace(study.rows[script.BEST], starts_from=script.HEARD, averages=1)
    names = (script.HEARD, script.BEST, "trained on speech, all stages", "trained on both")
    results = {}
    for name in (*names, script.COMPACT[0].name):
        run = script.Run(study.rows[name], 0)
        results[name] = script.do_run(study, run)
        assert study.result(run) is not None
        assert (study.folder(run) / "model" / "config.json").is_file() == run.row.keep
    whole, speech, both, small = (
        scores_of(results[name]) for name in (script.BEST, *names[2:], script.COMPACT[0].name)
    )
    parts = {"part=acted speech", "part=spoken text"}
    assert {score for score, _ in both} == {"model", "audio_only", "text_only", "linear_probe", "majority"} | {
        "swapped_text",
        "swapped_audio",
    }
    assert {group for score, group in both if score == "model" and group.startswith("part=")} == parts
    assert {group for score, group in both if score == "swapped_audio"} & parts == {"part=spoken text"}
    assert ("swapped_audio", "all") not in speech
    assert both["model", "part=acted speech"]["clips"] == 16
    assert all(0 < both["model", part]["audio_share"] < 1 for part in parts)
    # the checkpoint, loaded again or exported with fewer tokens, says what it said after training
    for score in ("model", "audio_only"):
        for metric in script.METRICS:
            assert speech[score, "all"][metric] == pytest.approx(whole[score, "all"][metric])
            assert small[score, "all"][metric] == pytest.approx(whole[score, "all"][metric])
    assert results[script.COMPACT[0].name]["parameters"] <= results[script.BEST]["parameters"]
    for score in ("model", "audio_only"):  # as the training measured them
        line = whole[score, "all"]
        assert line["weighted_f1_low"] <= line["weighted_f1"] <= line["weighted_f1_high"]
    tables = script.make_tables(*script.collect(study))
    assert tables.keys() == {"real_speech:study", "real_speech:text", "real_speech:compact"}
    assert "spoken text" in tables["real_speech:text"]
    assert f"| {results[script.COMPACT[0].name]['megabytes']:.1f} " in tables["real_speech:compact"]


def test_whisper_gets_the_seconds_of_all_stages(script, options, monkeypatch):
    study = script.Study(options)
    run = script.Run(study.rows["WhisperForAudioClassification, fine-tuned"], 1)
    for needed, seconds in zip(study.needed(run), (30.0, 12.0, 0.5), strict=True):
        assert needed.seed == 1
        study.folder(needed).mkdir(parents=True)
        result = {"settings": study.fingerprint(needed.row), "training_seconds": seconds}
        (study.folder(needed) / "result.json").write_text(json.dumps(result))
    monkeypatch.setattr(script.baselines, "whisper", lambda *arguments: arguments)
    assert script.whisper(study, run)[2:] == (42.5, 1)


# ---- the tables


@pytest.fixture
def tables(script):
    return sys.modules[script.make_tables.__module__]


def test_the_seconds_of_a_row_are_those_of_all_its_stages(script, tables):
    rows = [{"table": row.table, "row": row.name, "seeds": [0]} for row in script.STUDY]
    for row, own in zip(rows, script.STUDY, strict=True):
        row |= {"starts_from": own.starts_from, "averages": own.averages} if own.starts_from else {}
        row |= {"common_start": True} if own.common_start else {}
    empty = {"score": "audio_only", "group": "all", "clips": 1, "seed": 0}
    seconds = {script.HEARD: 1.0, script.TUNED: 10.0, script.BEST: 100.0}
    seconds |= {script.ALL_HEARD: 1.0, script.ALL_TUNED: 10.0, script.ALL_BEST: 100.0}
    results = tables.Results(rows, [{"row": name, "training_seconds": s, **empty} for name, s in seconds.items()])
    assert results.seconds_of_training(script.BEST) == 133  # three times the first and the second
    assert results.seconds_of_training(script.ALL_BEST) == 131  # the first once, as the three second ones share it
    assert results.seconds_of_training(script.TUNED) == results.seconds_of_training(script.ALL_TUNED) == 11
    assert results.seconds_of_training(script.ALONE) is None


def test_scores_of_another_row_are_subtracted_seed_by_seed(tables):
    def lines(row, values):
        line = {"row": row, "score": "model", "group": "all", "clips": 9, "table": "parts"}
        return [{**line, "seed": seed, "weighted_f1": value} for seed, value in values.items()]

    rows = [{"table": "parts", "row": name, "seeds": [0, 1, 2]} for name in ("one", tables.FROZEN)]
    values = lines("one", {0: 0.5, 1: 0.7, 3: 0.9}) + lines(tables.FROZEN, {1: 0.6, 0: 0.3, 2: 0.0})
    row = tables.compared(tables.Results(rows, values), "one", tables.FROZEN)
    assert row["difference"] == "+0.150 ± 0.071" and row["weighted F1"] == "0.700 ± 0.200"
    assert row["difference, audio alone"] == row["audio alone: weighted F1"] == "-"


def test_an_interval_is_shown_where_it_was_measured(tables):
    name = tables.FROZEN
    line = {"row": name, "score": "audio_only", "group": "all", "clips": 9, "weighted_f1": 0.5}
    low, high = tables.BOUNDS
    rows, column = [{"table": "study", "row": name, "seeds": [0, 1]}], "95 % interval"
    bounds = [{"seed": 0, low: 0.4, high: 0.6}, {"seed": 1, low: 0.3, high: 0.7}]
    results = tables.Results(rows, [{**line, **own} for own in bounds])
    assert results.interval(name, "audio_only") == "0.350 to 0.650" and results.interval(name, "model") == "-"
    assert column in tables.models_table(results, [name])
    of_before = tables.Results(rows, [{**line, "seed": seed, low: None, high: None} for seed in (0, 1)])
    assert column not in tables.models_table(of_before, [name])
