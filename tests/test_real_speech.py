# SPDX-License-Identifier: Apache-2.0
"""Tests of `benchmarks/real_speech.py`: what is run, in which order and with which data, and what is told of it."""

import csv
import dataclasses
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_config
from tiny_corpus import AUDIO, JOINT, NAMES, TEXT, tiny_tokenizer, write_corpus, write_table
from transformers import BertConfig, BertModel, Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

from audio_mmser import load_audio
from mmser.arguments import TRAINING_ARGUMENTS, parse_arguments
from mmser.loading import load_emotion_dataset
from mmser.sources import DataColumns
from modeling_mmser import AttentiveStatsPooling, DeepClassifier, MMSERForAudioClassification

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "real_speech.py"
STAGE_1 = {
    "weight_decay": 0.5,
    "freeze_audio": True,
    "freeze_text": True,
    "config_overrides": {**JOINT, "classifier_dropout": 0.25},
    "lr_multipliers": {"classifier": 3.0},
    "augmented_copies": 1,
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "dataloader_num_workers": 0,
    "save_strategy": "no",
    "use_cpu": True,
}
STAGE_2 = {**{name: STAGE_1[name] for name in STAGE_1 if name != "freeze_audio"}, "learning_rate": 1e-5}
SPOKEN_CORPUS = "XED-spoken"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Two small corpora, two small encoders and the four recipes; the folder that holds them."""
    folder = tmp_path_factory.mktemp("given")
    write_corpus(folder / "speech")
    write_corpus(folder / "spoken")
    for path in (folder / "spoken").glob("*/metadata.csv"):
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        write_table(path, [{**row, "corpus": SPOKEN_CORPUS} for row in rows])
    torch.manual_seed(0)
    Wav2Vec2Model(Wav2Vec2Config(**AUDIO)).save_pretrained(folder / "audio")
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder / "audio")
    BertModel(BertConfig(vocab_size=len(tiny_tokenizer()), **TEXT)).save_pretrained(folder / "text")
    tiny_tokenizer().save_pretrained(folder / "text")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "real_speech.json").write_text(json.dumps(STAGE_1))
    (folder / "recipes" / "real_speech_finetune.json").write_text(json.dumps(STAGE_2))
    for name in ("audio", "fuse"):
        (folder / "recipes" / f"real_speech_{name}.json").write_text(json.dumps(STAGE_1))
    return folder


@pytest.fixture
def arguments(script, given, tmp_path):
    return script.parse_arguments(flags_of(given, tmp_path))


def flags_of(given, work):
    flags = {"data_dir": "speech", "spoken_text_dir": "spoken", "audio_encoder": "audio", "text_encoder": "text"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(given / value))]
    words += ["--work_dir", str(work / "work"), "--recipes", str(given / "recipes")]
    return [*words, "--output", str(work / "results.json")]


# ---- the study


@pytest.fixture
def workers(script, monkeypatch):
    """Processes that write results without doing anything; `started` has the runs in order, `broken` names rows."""

    class Workers:
        def __init__(self):
            self.started, self.broken, self.rows = [], set(), []

        def command(self, run, arguments):
            self.started.append((run.row.name, run.seed))
            if run.row.name in self.broken:
                return [sys.executable, "-c", "import sys; print('what went wrong'); sys.exit(3)"]
            result = {
                "settings": script.fingerprint(run.row, self.rows, arguments),
                "seed": None if run.row.same_for_all_seeds else run.seed,
                "scores": {"model": {"weighted_f1": 0.5 + run.seed / 10}},
                "command": "python train_hf.py",
                "environment": {},
            }
            folder = script.run_folder(run, arguments)
            (folder / "model").mkdir(exist_ok=True)
            (folder / "model" / "config.json").touch()
            write = "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"
            return [sys.executable, "-c", write, str(folder / "result.json"), json.dumps(result)]

    workers = Workers()
    monkeypatch.setattr(script, "worker_command", workers.command)
    return workers


def study_of(script, workers, arguments, rows):
    workers.rows = rows
    workers.started.clear()
    return script.Study(script.plan(rows, rows, arguments), rows, arguments).execute(poll_seconds=0.01)


def test_what_is_finished_is_not_done_again_unless_its_settings_change(script, workers, arguments):
    rows = [script.Row("a", "study", function="a"), script.Row("b", "study", function="b", changes={"x": 1})]
    assert study_of(script, workers, arguments, rows) == []
    assert sorted(workers.started) == [(name, seed) for name in "ab" for seed in (0, 1, 2)]
    assert study_of(script, workers, arguments, rows) == [] and workers.started == []
    rows[1] = dataclasses.replace(rows[1], note="words change nothing")
    assert script.plan(rows, rows, arguments) == []
    rows[1] = dataclasses.replace(rows[1], changes={"x": 2})
    assert script.collect(rows, arguments)["b"] == []  # results of earlier settings are not reported
    study_of(script, workers, arguments, rows)
    assert sorted(workers.started) == [("b", 0), ("b", 1), ("b", 2)]


def test_a_changed_recipe_is_another_setting_also_for_what_starts_from_it(script, workers, arguments, tmp_path):
    arguments.recipes = tmp_path
    for name in (script.RECIPE, *script.STAGES):
        (tmp_path / name).write_text('{"learning_rate": 1}')
    first = script.Row("first", "study", script.RECIPE, keep=True)
    rows = [first, script.Row("second", "study", script.STAGE_2, starts_from="first")]
    rows.append(script.Row("third", "study", function="third"))
    study_of(script, workers, arguments, rows)
    (tmp_path / script.RECIPE).write_text('{"learning_rate": 2}')
    assert {run.row.name for run in script.plan(rows, rows, arguments)} == {"first", "second"}


def test_needed_rows_come_first_and_are_done_although_not_asked_for(script, workers, arguments):
    rows = [
        script.Row("last", "parts", function="x", needs=("second", "once")),
        script.Row("second", "study", function="x", starts_from="first"),
        script.Row("first", "study", function="x", keep=True),
        script.Row("once", "study", function="x", same_for_all_seeds=True),
    ]
    arguments.seeds, arguments.jobs, workers.rows = [0, 1], 3, rows
    script.Study(script.plan(rows[:1], rows, arguments), rows, arguments).execute(poll_seconds=0.01)
    order = {run: position for position, run in enumerate(workers.started)}
    assert len(order) == len(workers.started) == 7
    for seed in (0, 1):
        assert order["first", seed] < order["second", seed] < order["last", seed]
        assert order["once", 0] < order["last", seed]
    # a checkpoint that is gone is made again only for a run that starts from it
    (script.run_folder(script.Run(rows[2], 0), arguments) / "model" / "config.json").unlink()
    assert script.plan(rows, rows, arguments) == []
    (script.run_folder(script.Run(rows[1], 0), arguments) / "result.json").unlink()
    assert [str(run) for run in script.plan(rows, rows, arguments)] == [
        "study / first, seed 0",
        "study / second, seed 0",
    ]


def test_a_failure_is_told_and_stops_only_what_needs_it(script, workers, arguments, capsys):
    rows = [
        script.Row("bad", "study", function="x"),
        script.Row("next", "study", function="x", needs=("bad",)),
        script.Row("good", "study", function="x"),
    ]
    arguments.seeds = [0]
    workers.broken = {"bad"}
    failed = study_of(script, workers, arguments, rows)
    assert len(failed) == 2 and "exit status 3" in failed[0] and "bad failed" in failed[1]
    log = script.run_folder(script.Run(rows[0], 0), arguments) / "log.txt"
    assert str(log) in failed[0] and "what went wrong" in log.read_text()
    assert [len(script.collect(rows, arguments)[name]) for name in ("bad", "next", "good")] == [0, 0, 1]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and any("good, seed 0: weighted F1 0.500" in line for line in lines)
    workers.broken = set()
    assert study_of(script, workers, arguments, rows) == []
    assert workers.started == [("bad", 0), ("next", 0)]


def test_main_returns_1_after_a_failure_and_reports_the_rest(script, workers, given, tmp_path, monkeypatch, capsys):
    rows = [script.Row("bad", "study", function="x"), script.Row("good", "study", function="x")]
    monkeypatch.setattr(script, "all_rows", lambda arguments: rows)
    workers.rows, workers.broken = rows, {"bad"}
    flags = flags_of(given, tmp_path)
    assert script.main([*flags, "--seeds", "0", "2"]) == 1
    printed = capsys.readouterr()
    assert "study / bad, seed 2" in printed.err
    assert "Not finished: bad" in printed.out and "0.600 ± 0.141" in printed.out
    stored = json.loads((tmp_path / "results.json").read_text())["tables"]["study"]
    assert list(stored) == ["good"] and stored["good"]["seeds"] == [0, 2]
    with pytest.raises(ValueError, match="no row of parts is like nothing"):
        script.main([*flags, "--tables", "parts", "--rows", "nothing"])
    with pytest.raises(ValueError, match="no row 'nobody'"):
        script.main([*flags, "--worker", "nobody"])


# ---- the rows


def test_every_row_of_a_recipe_is_a_command_that_is_understood(script, arguments):
    rows = script.all_rows(arguments)
    for row in (row for row in rows if row.recipe):
        flags = script.train_flags(script.Run(row, 7), rows, arguments)
        model, data, training = parse_arguments(TRAINING_ARGUMENTS, flags)
        assert (training.seed, training.data_seed) == (7, script.DATA_SEED)
        starts = [run for run in script.needed_runs(script.Run(row, 7), rows) if run.row.name == row.starts_from]
        named = [name for name in (model.model_name_or_path, *model.average_with) if name]
        assert named == [str(script.run_folder(run, arguments) / "model") for run in starts]
        assert [run.seed for run in starts] == [7, 17, 27][: row.averages if row.starts_from else 0]
        assert data.cache_encoder_states is not None  # the text encoder is frozen in all recipes
        published = row.name == "MMSER, published settings"
        # dictionaries of the recipe are merged with those of the row
        assert model.config_overrides["classifier_dropout"] == (0.15 if published else 0.25), row.name
        assert training.lr_multipliers["classifier"] == (1.5 if published else 3.0)
    by_name = {row.name: row for row in rows}
    model, data, training = parse_arguments(
        TRAINING_ARGUMENTS, script.train_flags(script.Run(by_name["MMSER, published settings"], 0), rows, arguments)
    )
    assert (data.augment, data.standardize_clips, data.text_dropout, training.learning_rate) == (False, 0, 0, 1e-4)
    assert training.weight_decay is None  # although the recipe has one
    assert model.audio_num_hidden_layers == AUDIO["num_hidden_layers"]
    assert model.config_overrides["classifier_num_layers"] == 35


def test_parts_that_change_nothing_are_left_out(script, arguments, tmp_path):
    names = {row.name for row in script.all_rows(arguments)}
    assert {"35 blocks", "5 blocks", "no text dropout", "mean pooling"} <= names
    arguments.recipes = tmp_path
    (tmp_path / script.RECIPE).write_text(json.dumps({"text_dropout": 0.0, "config_overrides": {"feature_size": 8}}))
    for name in script.STAGES:
        (tmp_path / name).write_text("{}")
    assert names - {row.name for row in script.all_rows(arguments)} == {"35 blocks", "no text dropout"}
    arguments.spoken_text_dir = None
    assert not {"trained on both", "trained on spoken text"} & {row.name for row in script.all_rows(arguments)}
    with pytest.raises(ValueError, match=r"nowhere.*does not exist"):
        arguments.recipes = tmp_path / "nowhere"
        script.all_rows(arguments)


# ---- data


def clips_of(folder):
    return {name: list(split) for name, split in load_emotion_dataset(folder)[0].items()}


def test_a_fold_tests_on_all_of_what_it_never_heard(script, given, arguments):
    whole = [clip for split in clips_of(given / "speech").values() for clip in split]
    folds = [row for row in script.all_rows(arguments) if row.table == "generalisation"]
    assert [row.leaves_out for row in folds] == [
        {column: value}
        for column, value in (("corpus", "sine"), ("corpus", "tone"), ("language", "en"), ("language", "zxx"))
    ]
    for row in folds:
        ((column, value),) = row.leaves_out.items()
        if column == "language":
            continue  # there is one validation speaker, so one language has none
        splits = clips_of(script.data_folder(row, arguments))
        assert all(clip[column] != value for name in ("train", "validation") for clip in splits[name])
        held_out = {clip["audio"] for clip in whole if clip[column] == value}
        assert {clip["audio"] for clip in splits["test"]} == held_out and len(splits["test"]) == len(held_out)


def test_a_language_of_one_corpus_is_one_fold(script, tmp_path):
    for split, speakers in {"train": "ab", "validation": "cd", "test": "ef"}.items():
        write_table(
            tmp_path / f"{split}.csv",
            [
                {
                    "label": NAMES[i % 4],
                    "text": f"{speaker}{i}",
                    "speaker": speaker,
                    "corpus": corpus,
                    "language": lang,
                }
                for speaker in speakers
                for i, (corpus, lang) in enumerate([("one", "de"), ("two", "en"), ("three", "en"), ("one", "de")])
            ],
        )
    splits, _ = script.load_emotion_dataset(tmp_path, columns=DataColumns(audio=None))
    script_rows = {name: [{**clip, "audio": clip["row"]} for clip in split] for name, split in splits.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "read_rows", lambda folder: (script_rows, NAMES))
        folds = {row.name: dict(row.leaves_out) for row in script.fold_rows(tmp_path)}
    assert folds == {
        "without one = de": {"corpus": "one", "language": "de"},
        "without three": {"corpus": "three"},
        "without two": {"corpus": "two"},
        "without en": {"language": "en"},
    }


def test_the_mix_has_both_data_sets(script, given, arguments):
    row = next(row for row in script.TEXT if row.data == "mix")
    mix, speech, spoken = (
        clips_of(folder) for folder in (script.data_folder(row, arguments), given / "speech", given / "spoken")
    )
    for split in ("train", "validation", "test"):
        for key in ("audio", "text", "labels", "speaker", "corpus", "language"):
            expected = [clip[key] for clip in (*speech[split], *spoken[split])]
            assert [clip[key] for clip in mix[split]] == expected


def test_what_is_swapped_stays_in_its_language_and_differs(script):
    rng = np.random.default_rng(0)
    languages = rng.choice(["de", "en", "tr"], 200).tolist()
    texts = [f"{language} {rng.integers(5)}" if rng.random() < 0.8 else "" for language in languages]
    swapped = script.swap_within_language(texts, languages, seed=1)
    assert swapped == script.swap_within_language(texts, languages, seed=1)
    assert swapped != script.swap_within_language(texts, languages, seed=2)
    for text, other, language in zip(texts, swapped, languages, strict=True):
        assert (other is None) == (text == "")
        assert other is None or (other.startswith(language) and other != text and other in texts)
    assert script.swap_within_language(["only", "only", "x"], ["en", "en", "de"], 0) == [None] * 3


# ---- patches


def test_poolings_without_attention_are_mean_and_deviation(script):
    torch.manual_seed(0)
    pooling = AttentiveStatsPooling(6, 4)
    states = torch.randn(3, 7, 6)
    mask = torch.arange(7) < torch.tensor([7, 4, 0])[:, None]
    expected = torch.zeros(3, 12)
    for row, length in enumerate((7, 4)):
        expected[row, :6] = states[row, :length].mean(dim=0)
        expected[row, 6:] = states[row, :length].std(dim=0, correction=0)
    with script.PATCHES["statistics pooling"]():
        torch.testing.assert_close(pooling(states, mask), expected)
    with script.PATCHES["mean pooling"]():
        torch.testing.assert_close(pooling(states, mask), expected * (torch.arange(12) < 6))
    assert not torch.allclose(pooling(states, mask), expected, atol=1e-3)
    single = states[:, :1].requires_grad_()
    with script.PATCHES["statistics pooling"]():
        pooling(single, mask[:, :1]).sum().backward()
    assert single.grad.isfinite().all()


def test_published_blocks_start_at_random_and_are_not_scaled(script):
    config = tiny_config(classifier_dropout=0.0)
    with script.PATCHES["published blocks"]():
        model = MMSERForAudioClassification(config).eval()
        block = model.classifier.blocks[0]
        assert all(block.up.weight.abs().max() > 0.01 for block in model.classifier.blocks)
        states = torch.randn(2, config.classifier_hidden_size)
        branch = block.up(torch.relu(block.down(states)))
        expected = torch.nn.functional.layer_norm(states + branch, states.shape[-1:])
        torch.testing.assert_close(block(states), expected)
        assert not model.mmser.audio_attention.output.weight.any()
    for name in ("published architecture", "attention starts at random"):
        with script.PATCHES[name]():
            model = MMSERForAudioClassification(config)
        assert model.mmser.audio_attention.output.weight.any() and model.mmser.text_attention.output.weight.any()
        assert model.classifier.blocks[0].up.weight.any() == (name == "published architecture")
    ours = MMSERForAudioClassification(config).classifier
    assert isinstance(ours, DeepClassifier) and all(not block.up.weight.any() for block in ours.blocks)
    assert not torch.allclose(block(states), expected, atol=1e-3)


# ---- what a run does, with real models


def test_the_stages_and_what_is_said_of_their_modalities(script, given, arguments, tmp_path, quiet, capsys):
    """Stage 1, what starts from it, and a model of the mix, as the workers do them."""
    rows = script.all_rows(arguments)
    by_name = {row.name: row for row in rows}
    results = {}
    chains = [(name, seed) for seed in (0, 10, 20) for name in (script.HEARD, script.TUNED)]
    others = (script.FROZEN, script.BEST, "trained on speech", "trained on both", "mean pooling")
    for name, seed in (*chains, *((name, 0) for name in others)):
        run = script.Run(by_name[name], seed)
        results[name] = script.run_worker(run, rows, arguments)
        assert script.read_result(run, rows, arguments) is not None
        assert script.has_model(run, arguments) == run.row.keep
        assert results[name]["seconds"]["total"] > 0 and results[name]["environment"]["dtype"] == "float32"
    speech, both = results["trained on speech"], results["trained on both"]
    parts = {script.SPEECH_PART, script.SPOKEN_PART}
    assert both["scores"].keys() >= set(script.EXAMINED) and both["gate"]["by_part"].keys() == parts
    assert "swapped_audio" not in speech["scores"] and speech["gate"]["by_part"].keys() == {script.SPEECH_PART}
    assert both["scores"]["model"]["by_part"][script.SPEECH_PART]["clips"] == 16
    assert both["scores"]["swapped_audio"]["by_part"].keys() == {script.SPOKEN_PART}
    assert all(0 < value["gate"] < 1 for value in both["gate"]["by_corpus"].values())
    # the checkpoint of stage 1, loaded again, says what it said after training
    trained = results[script.FROZEN]["scores"]
    for condition in ("model", "audio_only", "text_only"):
        for metric in script.METRICS:
            assert speech["scores"][condition][metric] == pytest.approx(trained[condition][metric])
    commands = "".join(result["command"] for result in results.values())
    assert str(tmp_path) not in commands and str(given) not in commands
    assert shlex.split(results[script.FROZEN]["command"])[:2] == ["python", "train_hf.py"]
    assert shlex.split(results["mean pooling"]["command"])[1:4] == [
        "benchmarks/real_speech.py",
        "--worker",
        "mean pooling",
    ]

    found = script.aggregate(rows, script.collect(rows, arguments), arguments)
    assert str(tmp_path) not in json.dumps(found) and str(given) not in json.dumps(found)
    assert json.loads(script.short_json(found)) == json.loads(script.strict_json(found))
    tables = script.tables_of(found)
    assert tables.keys() == {"study", "parts", "text"}
    assert "mean pooling" in tables["parts"] and script.SPOKEN_PART in tables["text"]


def test_what_is_made_of_a_checkpoint_is_tested_as_it_is(script, given, arguments, quiet):
    pytest.importorskip("onnxruntime")
    rows = script.all_rows(arguments)
    by_name = {row.name: row for row in rows}
    small = script.COMPACT[0].name
    best = dataclasses.replace(by_name[script.BEST], averages=1)
    rows = [best if row.name == best.name else row for row in rows]
    stages = (by_name[script.HEARD], by_name[script.TUNED], best)
    runs = [script.Run(row, 0) for row in (*stages, by_name[small])]
    whole, result = [script.run_worker(run, rows, arguments) for run in runs][-2:]
    assert result["scores"].keys() == {"model", "audio_only"} and result["parameters"] <= whole["parameters"]
    for condition in ("model", "audio_only"):  # the same weights, for the tokens that are there
        for metric in script.METRICS:
            assert result["scores"][condition][metric] == pytest.approx(whole["scores"][condition][metric])
    assert 0 < result["megabytes"]["model"] < result["megabytes"]["folder"]
    table = script.tables_of(script.aggregate(rows, script.collect(rows, arguments), arguments))["compact"]
    assert f"| {result['megabytes']['model']:.1f} " in table and f"Not finished: {script.COMPACT[1].name}" in table


def test_the_linear_probe_is_on_mean_and_deviation_of_each_layer(script, given, arguments, monkeypatch):
    seen = {}

    def linear_probe(train, train_labels, validation, validation_labels, test):
        seen.update(train=train, test=test)
        return np.eye(4)[[1] * len(test)], {"layer": 1, "cost": 0.1, "validation_weighted_f1": 0.5}

    monkeypatch.setattr(script.baselines, "linear_probe", linear_probe)
    row = next(row for row in script.STUDY if row.function == "linear probe")
    result = script.run_worker(script.Run(row, 0), script.all_rows(arguments), arguments)
    assert result["seed"] is None and result["validation"] == {"weighted_f1": 0.5}
    assert result["scores"]["audio_only"]["clips"] == 16 and result["scores"]["audio_only"]["accuracy"] == 0.25
    encoder = Wav2Vec2Model.from_pretrained(given / "audio").eval()
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(given / "audio")
    for split in ("train", "test"):
        clip = clips_of(given / "speech")[split][3]
        inputs = extractor(load_audio(clip["audio"]), sampling_rate=16_000, return_tensors="pt")["input_values"]
        with torch.no_grad():
            states = torch.stack(encoder(inputs, output_hidden_states=True).hidden_states)[:, 0]
        expected = torch.cat([states.mean(dim=1), states.std(dim=1, correction=0)], dim=-1)
        np.testing.assert_allclose(seen[split][3], expected, atol=1e-4)


def test_whisper_gets_the_seconds_of_all_stages(script, arguments, monkeypatch):
    rows = script.all_rows(arguments)
    by_name = {row.name: row for row in rows}
    run = script.Run(by_name["WhisperForAudioClassification, fine-tuned"], 1)
    with pytest.raises(ValueError, match="run them first"):
        script.whisper(run, rows, arguments)
    for needed, seconds in zip(script.needed_runs(run, rows), (30.0, 12.0, 0.5), strict=True):
        assert needed.seed == 1
        result = {"settings": script.fingerprint(needed.row, rows, arguments), "seconds": {"training": seconds}}
        script.write_atomically(script.run_folder(needed, arguments) / "result.json", json.dumps(result))
    asked = {}

    def fine_tune(encoder, train, validation, evaluation, label_names, **options):
        asked.update(options)
        details = dict.fromkeys(("validation_weighted_f1", "seconds", "parameters", "trainable_parameters"), 1)
        return {"test": np.eye(4)[[0] * len(evaluation["test"])]}, details

    monkeypatch.setattr(script.baselines, "fine_tune_whisper", fine_tune)
    result = script.run_worker(run, rows, arguments)
    assert (asked["max_seconds_of_training"], asked["seed"], asked["learning_rate"]) == (42.5, 1, 5e-5)
    assert result["scores"]["audio_only"]["accuracy"] == 0.25


# ---- what is told


def test_the_seconds_of_a_row_are_those_of_all_its_stages(script):
    seconds = {script.HEARD: 1.0, script.TUNED: 10.0, script.BEST: 100.0}
    entries = {name: {"seconds": {"training": {"mean": value}}} for name, value in seconds.items()}
    assert script._seconds_of_training(entries, script.BEST) == 133  # three times the first and the second
    assert script._seconds_of_training(entries, script.TUNED) == 11
    assert script._seconds_of_training(entries, script.ALONE_TUNED) is None


def test_each_environment_is_told_once(script, workers, arguments):
    rows = [script.Row("a", "study", function="a"), script.Row("b", "study", function="b")]
    study_of(script, workers, arguments, rows)
    path = script.run_folder(script.Run(rows[1], 1), arguments) / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "environment": {"dtype": "bfloat16"}}))
    found = script.aggregate(rows, script.collect(rows, arguments), arguments)
    assert found["environments"] == [{}, {"dtype": "bfloat16"}]


def test_means_and_deviations_are_numpys(script):
    values = [[0.5, 0.25], [0.75, 0.5], [0.7, 0.1]]
    trees = [{"a": {"f1": f1, "clips": 7}, "b": {"x": x}} for f1, x in values]
    trees[2]["only here"] = {"f1": 0.3}
    summary = script.summarise(trees)
    for got, column in ((summary["a"]["f1"], 0), (summary["b"]["x"], 1)):
        numbers = np.array(values)[:, column]
        assert got["values"] == numbers.tolist()
        assert got["mean"] == pytest.approx(np.mean(numbers)) and got["std"] == pytest.approx(np.std(numbers, ddof=1))
    assert summary["a"]["clips"] == 7
    assert summary["only here"]["f1"] == {"mean": 0.3, "std": None, "values": [0.3]}
    assert script.cell(summary["a"]["f1"]) == "0.650 ± 0.132"
    assert script.cell(summary["only here"]["f1"]) == "0.300" and script.cell(None) == "-"


def test_differences_are_taken_seed_by_seed(script):
    def entry(seeds, values):
        return {"seeds": seeds, "scores": script.summarise([{"model": {"f1": value}} for value in values])}

    one, other = entry([0, 1, 3], [0.5, 0.7, 0.9]), entry([1, 0, 2], [0.6, 0.3, 0.0])
    assert script.minus(one, other, "model", "f1") == "+0.150 ± 0.071"
    assert script.minus(other, one, "model", "f1") == "-0.150 ± 0.071"
    assert script.minus(one, entry([5], [0.1]), "model", "f1") == "-"


def test_tables_show_what_is_missing_as_missing(script, arguments):
    rows = script.all_rows(arguments)
    results = script.aggregate(rows, {}, arguments)
    assert script.tables_of(results) == {} and script.markdown_tables(results) == ""
    entry = {"seeds": [0], "scores": {"model": {"weighted_f1": {"mean": 0.8, "std": None, "values": [0.8]}}}}
    results["tables"]["study"][script.FROZEN] = entry
    study = script.study_table(results).splitlines()
    assert len(study) == 2 + len(script.STUDY)
    line = next(line for line in study if script.FROZEN in line)
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["0.800", "-", "-", "-", "-", "-", "1"]
    assert script.BEST in script.tables_of(results)["study"].split("Not finished: ")[1]
    results["tables"]["generalisation"]["without sine"] = {**entry, "leaves_out": {"corpus": "sine"}}
    assert "sine" in script.generalisation_table(
        results
    ) and "never heard: language" not in script.generalisation_table(results)


def test_tables_go_between_their_markers(script, tmp_path):
    readme, card = tmp_path / "README.md", tmp_path / "model_card.md"
    text = "# {}\n<!-- real_speech:{} -->\nold\n<!-- /real_speech:{} -->\nafter\n"
    readme.write_text(text.format("One", "study", "study"))
    card.write_text(text.format("Two", "parts", "parts") + text.format("Three", "study", "study"))
    written = script.write_docs({"study": "| new |"}, [readme, card])
    assert written == ["README.md: study", "model_card.md: study"]
    new = "<!-- real_speech:study -->\n\n| new |\n\n<!-- /real_speech:study -->\nafter\n"
    assert readme.read_text() == f"# One\n{new}"
    assert card.read_text() == text.format("Two", "parts", "parts") + f"# Three\n{new}"
    before = readme.read_text()
    script.write_docs({"study": "| new |"}, [readme])
    assert readme.read_text() == before
    for wrong, message in (
        ("nothing", "has no marker"),
        ("<!-- real_speech:study -->\n", "once after it"),
        ("<!-- /real_speech:study --> <!-- real_speech:study -->", "once after it"),
        ("<!-- real_speech:nonsense --><!-- /real_speech:nonsense -->", "the tables are study"),
    ):
        card.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            script.write_docs({"study": "| newer |"}, [readme, card])
        assert readme.read_text() == before
