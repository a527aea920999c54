# SPDX-License-Identifier: Apache-2.0
"""Tests of several sources in one command: how they are joined, label maps, what is refused, scores."""

import csv
import json
import logging as python_logging
from collections import Counter

import datasets
import numpy as np
import pytest
import soundfile
from sklearn.metrics import f1_score, recall_score
from test_trainer import make_trainer
from tiny_corpus import parse_strict_json, read_rows, tiny_flags, tiny_model, write_table
from tiny_corpus import write_corpus as write_sines
from transformers.utils import logging

import eval_hf
import train_hf
from mmser import report
from mmser.arguments import TRAINING_ARGUMENTS, parse_arguments
from mmser.examples import EmotionDataset
from mmser.groups import MEAN_OVER_CORPORA, compute_corpus_metrics, with_mean
from mmser.label_map import read_label_map
from mmser.loading import load_emotion_dataset
from mmser.sources import DataColumns

NAMES = ["neutral", "happy", "sad", "angry"]
TEXT_ALONE = DataColumns(audio=None)


def rows_of(labels, speakers, label="label", **more):
    """One row for each label and speaker."""
    return [
        {"transcription": f"{name} said by {speaker}", label: name, "speaker": speaker, **more}
        for speaker in speakers
        for name in labels
    ]


def source(folder, splits=("train", "validation", "test"), labels=NAMES, label="label", **more):
    """A folder with a table for each split; two speakers in each, called alike in all sources."""
    for number, split in enumerate(splits):
        speakers = [f"s{2 * number}", f"s{2 * number + 1}"]
        write_table(folder / f"{split}.csv", rows_of(labels, speakers, label, **more))
    return folder


def write_map(path, *rows):
    write_table(path, [dict(zip(("corpus", "label", "target"), row, strict=True)) for row in rows])
    return path


def load(*folders, **options):
    return load_emotion_dataset(list(folders), **{"columns": TEXT_ALONE, **options})


def counts(data, names):
    """(split, corpus, class) -> clips."""
    found = Counter()
    for split, table in data.items():
        for corpus, label in zip(table["corpus"], table["labels"], strict=True):
            found[split, corpus, names[label] if label >= 0 else "none"] += 1
    return dict(found)


@pytest.fixture
def log(caplog):
    logging.enable_propagation()
    with caplog.at_level(python_logging.INFO):
        yield caplog
    logging.disable_propagation()


# --- joining ---------------------------------------------------------------------------------------------------------


def test_sources_are_joined_split_by_split(tmp_path, log):
    one, two = source(tmp_path / "one"), source(tmp_path / "two", labels=NAMES[:2])
    data, names = load(one, two)
    assert names == NAMES
    expected = {(split, "one", name): 2 for split in ("train", "validation", "test") for name in NAMES}
    expected |= {(split, "two", name): 2 for split in ("train", "validation", "test") for name in NAMES[:2]}
    assert counts(data, names) == expected
    assert data["train"]["row"][0] == "one/train.csv row 2" and data["train"]["row"][-1] == "two/train.csv row 5"
    table = next(record.message for record in log.records if record.message.startswith("Clips:"))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]
    assert lines[0] == ["corpus", "split", *NAMES, "other", "left out"]
    assert ["two", "validation", "2", "2", "0", "0", "0", "0"] in lines
    assert len(lines) == 2 + 6


def test_one_source_is_as_it_was(tmp_path):
    """In a list or not: no corpus, and no name in front of the rows."""
    one = source(tmp_path / "one")
    alone, names = load_emotion_dataset(one, columns=TEXT_ALONE)
    listed, listed_names = load(one)
    assert names == listed_names and {split: list(table) for split, table in alone.items()} == {
        split: list(table) for split, table in listed.items()
    }
    assert "corpus" not in alone["train"].column_names and alone["train"]["row"][0] == "train.csv row 2"


def test_a_corpus_column_stays_and_its_empty_cells_get_the_source(tmp_path):
    one = source(tmp_path / "one", corpus="A")
    rows = rows_of(NAMES, ["s0"], corpus="B") + rows_of(NAMES, ["s1"], corpus="")
    write_table(tmp_path / "two" / "train.csv", rows)
    data, _ = load(one, tmp_path / "two")
    assert Counter(data["train"]["corpus"]) == {"A": 8, "B": 4, "two": 4}
    data, _ = load(one, tmp_path / "two", columns=DataColumns(audio=None, corpus=None))
    assert Counter(data["train"]["corpus"]) == {"one": 8, "two": 8}


def test_the_same_speaker_in_two_corpora_is_two_speakers_and_in_one_corpus_a_leak(tmp_path):
    """s0 trains in one and tests in the other."""
    one = source(tmp_path / "one", splits=("train", "validation", "test"))
    two = source(tmp_path / "two", splits=("test", "validation", "train"))
    data, _ = load(one, two)
    assert {*data["train"]["speaker"]} & {*data["test"]["speaker"]} == {"s0", "s1", "s4", "s5"}
    for folder in (one, two):
        source(folder, splits=("train", "validation", "test")[:: 1 if folder is one else -1], corpus="same")
    with pytest.raises(ValueError, match="4 speakers are in more than one split: same/s0"):
        load(one, two)


def test_each_source_has_its_own_columns_and_splits(tmp_path):
    one = source(tmp_path / "one")
    two = source(tmp_path / "two", splits=("fold1", "fold2"), label="feeling")
    columns = [TEXT_ALONE, DataColumns(audio=None, label="feeling")]
    splits = {"train_split": ["none", "fold1"], "test_split": ["test", "fold2"]}
    data, names = load(one, two, columns=columns, **splits)
    assert {key: number for key, number in counts(data, names).items() if key[1] == "two"} == {
        (split, "two", name): 2 for split in ("train", "test") for name in NAMES
    }
    with pytest.raises(ValueError, match="columns: give one name for all 3 sources, or one for each; got 2"):
        load(one, two, source(tmp_path / "three"), columns=columns)


def test_kinds_of_sources_may_be_mixed_and_embedded_audio_stays(tmp_path):
    """A folder, a table and a data set with embedded audio: examples have their own waveform and text."""
    rng = np.random.default_rng(0)
    waves = {name: rng.uniform(-0.5, 0.5, 3200 + 160 * number) for number, name in enumerate("abcdef")}
    for name, wave in waves.items():
        soundfile.write(tmp_path / f"{name}.wav", wave, 16_000, subtype="FLOAT")
    rows = [
        {"file_name": f"{name}.wav", "label": label, "speaker": name} for name, label in zip("ab", NAMES, strict=False)
    ]
    write_table(tmp_path / "metadata.csv", rows)
    write_table(
        tmp_path / "list.csv", [{"file_name": "c.wav", "label": "happy"}, {"file_name": "d.wav", "label": "neutral"}]
    )
    embedded = datasets.Dataset.from_dict(
        {
            "audio": [{"bytes": (tmp_path / f"{name}.wav").read_bytes(), "path": None} for name in "ef"],
            "label": [0, 1],
            "text": ["", "hello"],
        }
    )
    embedded = embedded.cast_column("label", datasets.ClassLabel(names=["happy", "neutral"]))
    embedded = embedded.cast_column("audio", datasets.Audio(decode=False))
    (tmp_path / "hub").mkdir()
    embedded.to_parquet(tmp_path / "hub" / "train.parquet")
    data, names = load_emotion_dataset(
        data_dir=tmp_path,
        manifest=[tmp_path / "list.csv"],
        dataset_name=str(tmp_path / "hub"),
        validation_fraction=0,
        test_fraction=0,
    )
    table = data["train"]
    assert table["corpus"][:] == [tmp_path.name] * 2 + ["list"] * 2 + ["hub"] * 2
    assert [names[label] for label in table["labels"]] == ["neutral", "happy", "happy", "neutral", "happy", "neutral"]
    examples = EmotionDataset(table)
    for index, name in enumerate("abcdef"):
        np.testing.assert_allclose(examples[index]["audio"], waves[name], atol=1e-6)
    assert examples[5]["text"] == "hello" and examples[0]["text"] is None


def test_a_table_may_stand_in_the_place_of_a_folder(tmp_path):
    write_table(tmp_path / "clips.csv", [{**row, "split": "train"} for row in rows_of(NAMES, ["s0"])])
    data, _ = load(source(tmp_path / "one"), tmp_path / "clips.csv")
    assert Counter(data["train"]["corpus"]) == {"one": 8, "clips": 4}


# --- splits that are missing -----------------------------------------------------------------------------------------


def test_a_source_without_validation_trains_if_another_has_it(tmp_path):
    one, two = source(tmp_path / "one"), source(tmp_path / "two", splits=("train",))
    data, _ = load(one, two)
    assert {split: set(table["corpus"]) for split, table in data.items()} == {
        "train": {"one", "two"},
        "validation": {"one"},
        "test": {"one"},
    }


def test_where_none_has_validation_speakers_are_held_out_of_each_corpus(tmp_path, log):
    for name, number in (("large", 40), ("small", 4), ("tiny", 2)):
        write_table(tmp_path / name / "train.csv", rows_of(NAMES, [f"s{speaker}" for speaker in range(number)]))
    data, _ = load(*(tmp_path / name for name in ("large", "small", "tiny")), seed=3)
    speakers = {
        split: {(corpus, speaker) for corpus, speaker in zip(table["corpus"], table["speaker"], strict=True)}
        for split, table in data.items()
    }
    assert sum(map(len, speakers.values())) == len(set.union(*speakers.values())) == 46
    found = {split: Counter(corpus for corpus, _ in own) for split, own in speakers.items()}
    assert found == {
        "train": {"large": 28, "small": 2, "tiny": 2},
        "validation": {"large": 6, "small": 1},
        "test": {"large": 6, "small": 1},
    }
    assert "hold some of them out of tiny: all of these clips train" in log.text
    again, _ = load(*(tmp_path / name for name in ("large", "small", "tiny")), seed=3)
    assert again["test"]["row"][:] == data["test"]["row"][:]
    other, _ = load(*(tmp_path / name for name in ("large", "small", "tiny")), seed=4)
    assert other["test"]["row"][:] != data["test"]["row"][:]


def test_corpora_of_one_speaker_each_are_divided_together(tmp_path):
    for name in "abcdef":
        write_table(tmp_path / name / "train.csv", rows_of(NAMES, [name]))
    data, _ = load(*(tmp_path / name for name in "abcdef"))
    assert sorted(corpus for table in data.values() for corpus in set(table["corpus"])) == list("abcdef")
    assert list(data) == ["train", "validation", "test"]


# --- labels ----------------------------------------------------------------------------------------------------------


def test_a_map_gives_labels_takes_clips_out_and_leaves_some_out(tmp_path, log):
    one = source(tmp_path / "one")
    two = source(tmp_path / "two", labels=["NEU", "hap", "Fear", "calm", "angry"])
    path = write_map(
        tmp_path / "map.csv",
        ("two", "neu", "neutral"),
        ("*", "Hap", "happy"),
        ("two", "fear", "other"),
        ("TWO", "calm", ""),
    )
    data, names = load(one, two, label_map=path)
    assert names == NAMES
    found = counts(data, names)
    for split in ("train", "validation", "test"):
        assert {key[2]: number for key, number in found.items() if key[:2] == (split, "two")} == {
            "neutral": 2,
            "happy": 2,
            "angry": 2,
        }
    assert found["other", "two", "none"] == 4  # the training speakers' two are not used
    assert set(data["other"]["speaker"]) == {"s2", "s3", "s4", "s5"} and set(data["other"]["labels"]) == {-1}
    assert (
        "Of 6 clips that --label_map maps to other, 2 are by speakers of training clips and are not used" in log.text
    )
    table = next(record.message for record in log.records if record.message.startswith("Clips:"))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert ["two", "train", "2", "2", "0", "2", "2", "2"] in lines


def test_a_row_for_a_corpus_counts_before_one_for_its_source_and_that_before_all(tmp_path):
    one = source(tmp_path / "one")
    rows = rows_of(["x"], ["s0"], corpus="a") + rows_of(["x"], ["s1"], corpus="b")
    write_table(tmp_path / "two" / "train.csv", rows)
    write_table(tmp_path / "three" / "train.csv", rows_of(["x"], ["s0"]))
    path = write_map(tmp_path / "map.csv", ("*", "x", "neutral"), ("two", "x", "sad"), ("b", "x", "angry"))
    data, names = load(one, tmp_path / "two", tmp_path / "three", label_map=path)
    found = {key[1:] for key in counts(data, names) if key[0] == "train" and key[1] != "one"}
    assert found == {("a", "sad"), ("b", "angry"), ("three", "neutral")}


def test_one_source_can_have_a_map_too(tmp_path):
    folder = source(tmp_path / "one", labels=["0", "1", "-1"])
    path = write_map(tmp_path / "map.csv", ("one", "0", "calm"), ("one", "1", "loud"), ("*", "-1", "other"))
    data, names = load(folder, label_map=path)
    assert names == ["calm", "loud"]
    assert {split: len(table) for split, table in data.items()} == {"train": 4, "validation": 4, "test": 4, "other": 4}


def test_unknown_clips_of_known_voices_are_used_where_there_are_no_others(tmp_path, log):
    write_table(tmp_path / "clips.csv", rows_of([*NAMES, "fear"], ["s0", "s1"]))
    path = write_map(tmp_path / "map.csv", ("*", "fear", "other"))
    options = {"validation_fraction": 0, "test_fraction": 0, "label_map": path}
    data, _ = load(tmp_path / "clips.csv", **options)
    assert len(data["other"]) == 2
    assert "all are by speakers of training clips, whose voices the model knows" in log.text


def test_numbers_of_one_source_are_the_default_names_beside_names(tmp_path):
    one, two = source(tmp_path / "one"), source(tmp_path / "two", labels=["0", "1", "2", "3"])
    data, names = load(one, two)
    assert names == NAMES
    expected = Counter((corpus, name) for corpus in ("one", "two") for name in NAMES for _ in range(2))
    assert (
        Counter(key[1:] for key, number in counts(data, names).items() if key[0] == "test" for _ in range(number))
        == expected
    )


def test_numbers_in_all_sources_are_taken_to_mean_the_same(tmp_path, log):
    one, two = source(tmp_path / "one", labels=["0", "1", "2", "3"]), source(tmp_path / "two", labels=["0", "3"])
    assert load(one, two)[1] == NAMES
    assert "labels of all sources are numbers, taken to mean the same in each" in log.text


@pytest.mark.parametrize("others", [["hap", "neutral"], ["neutral", "fear"]])
def test_labels_that_clash_are_refused_with_a_way_out(tmp_path, others):
    one, two = source(tmp_path / "one", labels=["neutral", "happy"]), source(tmp_path / "two", labels=others)
    own = next(label for label in others if label != "neutral")
    with pytest.raises(ValueError, match=rf"clash: only one has 'happy'; only two has '{own}'. Say with --label_map"):
        load(one, two)
    names = ["neutral", "happy", own]
    assert load(one, two, label_names=names)[1] == names
    path = write_map(tmp_path / "map.csv", ("two", own, "happy"))
    assert load(one, two, label_map=path)[1] == ["neutral", "happy"]


def test_a_source_may_have_more_classes_than_the_others(tmp_path):
    one, two = source(tmp_path / "one", labels=[*NAMES, "fear"]), source(tmp_path / "two")
    assert load(one, two)[1] == [*NAMES, "fear"]


def test_labels_that_are_none_of_the_classes_are_told_by_source_before_any_row_is_checked(tmp_path):
    one = source(tmp_path / "one", labels=[*NAMES, "calm"])
    two = source(tmp_path / "two", labels=[*NAMES, "disgust", "calm"])
    write_table(tmp_path / "one" / "test.csv", [{"transcription": "", "label": "neutral", "speaker": "s9"}])
    with pytest.raises(ValueError) as raised:
        load(one, two, label_names=NAMES)
    message = str(raised.value)
    assert "one has 'calm' (4 clips); two has 'disgust' (6 clips), 'calm' (6 clips)" in message
    assert "\n" not in message and "--label_map" in message and "to other" in message and "to nothing" in message


def test_sources_that_do_not_exist_or_are_given_twice(tmp_path):
    one = source(tmp_path / "one")
    with pytest.raises(ValueError, match=r"data_dir '\S*nowhere' is not a folder"):
        load(one, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"someone/data' is not a folder. A data set on the Hub goes to dataset_name"):
        load(one, "someone/data")
    with pytest.raises(ValueError, match=r"the source \S*one is given twice"):
        load(one, tmp_path / "one" / ".." / "one")
    data, _ = load(source(tmp_path / "x" / "one"), one)
    assert set(data["train"]["corpus"]) == {"x/one", f"{tmp_path.name}/one"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"corpus": "*", "label": "fear"}], r"has no column 'target': it needs corpus, label, target, and has \['co"),
        ([{"corpus": "", "label": "fear", "target": ""}], r"map.csv row 2 \(, fear\) needs a corpus"),
        (
            [{"corpus": "A", "label": "fear", "target": "sad"}, {"corpus": "a", "label": "Fear", "target": "other"}],
            r"row 3 \(a, Fear\) says 'other', but map.csv row 2 \(A, fear\) says 'sad'",
        ),
    ],
)
def test_a_map_that_cannot_be_used(tmp_path, rows, said):
    write_table(tmp_path / "map.csv", rows)
    with pytest.raises(ValueError, match=said):
        read_label_map(tmp_path / "map.csv")
    with pytest.raises(ValueError, match="does not exist"):
        read_label_map(tmp_path / "none.csv")


def test_a_target_that_is_no_class_and_rows_that_fit_no_clip(tmp_path, log):
    one = source(tmp_path / "one", labels=[*NAMES, "fear"])
    path = write_map(tmp_path / "map.csv", ("*", "fear", "hapy"))
    with pytest.raises(ValueError, match=r"row 2 \(\*, fear\): the target 'hapy' \(is 'happy' meant\?\) is none of"):
        load(one, label_map=path, label_names=NAMES)
    path = write_map(tmp_path / "map.csv", ("*", "fear", "Other"), ("oen", "sad", ""))
    load(one, label_map=path)
    assert "--label_map: 1 row fits no clip (is a corpus or a label misspelt?): map.csv row 3 (oen, sad)" in log.text
    with pytest.raises(ValueError, match="the target 'other' means none of the classes"):
        load(one, label_map=path, label_names=[*NAMES, "other"])
    with pytest.raises(ValueError, match="leaves no clip of a class"):
        load(one, label_map=write_map(tmp_path / "map.csv", *(("*", name, "") for name in [*NAMES, "fear"])))


def test_a_map_goes_with_labels_that_are_all_there_before_training(tmp_path):
    path = write_map(tmp_path / "map.csv", ("*", "fear", "other"))
    with pytest.raises(ValueError, match="not for label_distribution_columns"):
        load(source(tmp_path / "one"), label_map=path, label_distribution_columns=["votes"])
    with pytest.raises(ValueError, match=r"label_map .* leave out --streaming"):
        load_emotion_dataset(dataset_name="a/b", streaming=True, label_map=path)
    with pytest.raises(ValueError, match="streaming reads one Hub data set"):
        load_emotion_dataset(dataset_name=["a/b", "c/d"], streaming=True)
    with pytest.raises(ValueError, match=r"dataset_config_name \(x\) is of one data set on the Hub"):
        load(tmp_path / "one", dataset_config_name="x")


def test_a_map_is_written_as_spreadsheets_do(tmp_path):
    with open(tmp_path / "map.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerows([["Target", " Label ", "CORPUS"], ["sad", " trauer ", "emo"]])
    assert read_label_map(tmp_path / "map.csv").targets == {("emo", "trauer"): "sad"}


# --- scores by corpus ------------------------------------------------------------------------------------------------


def test_the_mean_over_corpora_counts_each_corpus_once():
    rng = np.random.default_rng(0)
    corpora = np.repeat(["a", "b b", "c"], [200, 20, 5])
    references, predictions = rng.integers(0, 4, 225), rng.integers(0, 4, 225)
    predictions[:200] = references[:200]
    metrics = compute_corpus_metrics(predictions, references, corpora.tolist(), NAMES)
    scores = []
    for corpus, count in (("a", 200), ("b b", 20), ("c", 5)):
        own = references[corpora == corpus], predictions[corpora == corpus]
        scores.append(f1_score(*own, average="weighted", zero_division=0))
        assert metrics[f"corpus_{corpus}_weighted_f1"] == pytest.approx(scores[-1])
        present = np.unique(own[0])
        recall = recall_score(*own, labels=present, average="macro", zero_division=0)
        assert metrics[f"corpus_{corpus}_unweighted_average_recall"] == pytest.approx(recall)
        assert metrics[f"corpus_{corpus}_count"] == count
    assert metrics[MEAN_OVER_CORPORA] == pytest.approx(np.mean(scores)) and len(metrics) == 10
    assert compute_corpus_metrics(predictions, references, ["a"] * 225, NAMES) == {}
    lines = {"a": {"weighted_f1": 1.0, "unweighted_average_recall": 0.5}}
    assert with_mean(lines, "corpus") == lines == with_mean(lines, "language")
    more = with_mean({**lines, "b": {"weighted_f1": 0.5, "unweighted_average_recall": 0.0}}, "corpus")
    assert more["mean over corpora"] == {"weighted_f1": 0.75, "unweighted_average_recall": 0.25}


@pytest.fixture(scope="module")
def sines(tmp_path_factory):
    """Two folders: the tiny corpus without its column `corpus`, and another with labels of its own and fear."""
    folder = tmp_path_factory.mktemp("sines")
    write_sines(folder / "one", validation=(7,))
    write_sines(folder / "two", train=(9, 10), validation=(8,))
    other = {"happy": "joy", "sad": "fear"}
    for name in ("one", "two"):
        for split in ("train", "validation", "test"):
            rows = read_rows(folder / name, split)
            if name == "two":
                rows = [{**row, "label": other.get(row["label"], row["label"])} for row in rows]
                for row in rows:  # the two tiny corpora are the same sounds: here they are not
                    sound, rate = soundfile.read(row["file_name"])
                    soundfile.write(row["file_name"], 0.5 * sound, rate)
            rows = [{key: cell for key, cell in row.items() if key not in ("corpus", "split")} for row in rows]
            write_table(folder / name / split / "metadata.csv", rows)
    write_map(folder / "map.csv", ("two", "joy", "happy"), ("two", "fear", "other"))
    return folder


def test_an_evaluation_scores_each_corpus_on_its_own_clips(sines, tmp_path):
    """In the order of the evaluation, from long to short, each answer still belongs to its corpus."""
    data, _ = load_emotion_dataset([sines / "one", sines / "two"], label_map=sines / "map.csv")
    trainer = make_trainer(tiny_model(), data, tmp_path, per_device_eval_batch_size=3)
    table = data["train"]
    outputs = trainer.predict_outputs(EmotionDataset(table))
    metrics = trainer.evaluate(EmotionDataset(table))
    corpora, predictions = np.array(table["corpus"]), outputs["logits"].argmax(axis=1)
    for corpus in ("one", "two"):
        own = np.array(table["labels"])[corpora == corpus], predictions[corpora == corpus]
        assert metrics[f"eval_corpus_{corpus}_weighted_f1"] == pytest.approx(f1_score(*own, average="weighted"))
        assert metrics[f"eval_corpus_{corpus}_count"] == len(own[0])
    alone = table.select(np.flatnonzero(corpora == "one"))
    assert not [name for name in trainer.evaluate(EmotionDataset(alone)) if "corpus" in name or "corpora" in name]
    arguments = {"metric_for_best_model": MEAN_OVER_CORPORA, "load_best_model_at_end": True, "save_strategy": "steps"}
    with pytest.raises(ValueError, match="needs validation clips of two corpora or more; these are of one"):
        make_trainer(
            tiny_model(), {**data, "validation": alone}, tmp_path, eval_strategy="steps", eval_steps=500, **arguments
        )


def test_a_run_on_two_corpora(sines, tokenizer, tmp_path, monkeypatch, log):
    recipe = tmp_path / "recipe.json"
    content = {"data_dir": [str(sines / "one"), str(sines / "two")], "label_map": str(sines / "map.csv")}
    recipe.write_text(json.dumps(content))
    flags = {
        "data_dir": None,
        "max_steps": 6,
        "sampling_temperature": 3,
        "metric_for_best_model": MEAN_OVER_CORPORA,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 3,
        "ood_dir": sines / "one" / "ood",
    }
    results = train_hf.main([str(recipe), *tiny_flags(None, tmp_path / "out", tokenizer, **flags)])
    assert results["data"]["name"] == "one + two"
    assert results["data"]["clips"] == {"train": 68, "validation": 28, "test": 28}
    model = results["test"]["model"]
    assert {name: own["count"] for name, own in model["by_corpus"].items()} == {"one": 16, "two": 12}
    scores = [own["weighted_f1"] for own in model["by_corpus"].values()]
    assert model[MEAN_OVER_CORPORA] == pytest.approx(np.mean(scores))
    # The test clips, those of --ood_dir, and fear by the speakers that are not trained on
    assert results["open_set"]["max_softmax"]["clips"] == 28 + 6 + 8
    state = parse_strict_json((tmp_path / "out" / "trainer_state.json").read_text())
    found = [line[f"eval_{MEAN_OVER_CORPORA}"] for line in state["log_history"] if "eval_loss" in line]
    assert len(found) == 2 and state["best_metric"] == max(found)
    best = results["validation"]["model"][MEAN_OVER_CORPORA]
    assert best == pytest.approx(max(found))
    assert "mean over corpora" in (tmp_path / "out" / "README.md").read_text()
    assert "Sampling:" in log.text and "Draws of an epoch per class" in log.text

    monkeypatch.setattr(report, "draw", lambda *arguments: {})
    monkeypatch.setattr(report, "write_report", lambda judged, plots, folder: folder)
    words = ["--checkpoint", tmp_path / "out", "--data_dir", sines / "one", sines / "two", "--use_cpu"]
    words += ["--label_map", sines / "map.csv", "--ood_dir", sines / "one" / "ood", "--bootstrap_samples", "5"]
    judged = eval_hf.main([*map(str, words), "--dataloader_num_workers", "0", "--output_dir", str(tmp_path / "eval")])
    assert judged["rows"]["model"][MEAN_OVER_CORPORA] == pytest.approx(model[MEAN_OVER_CORPORA])
    assert judged["unknown_clips"] == {"ood": 6, "other": 8}
    assert "| mean over corpora " in report._tables(judged)["groups"]["corpus"]


def test_flags_with_one_value_stay_plain_and_with_several_are_lists():
    words = ["--data_dir", "a", "b", "--label_column", "label", "feeling", "--text_column", "none", "--use_cpu"]
    data = parse_arguments(TRAINING_ARGUMENTS, words)[1]
    assert data.data_dir == ["a", "b"] and data.text_column == "none" and data.name == "a + b"
    assert [(columns.label, columns.text) for columns in data.columns] == [("label", None), ("feeling", None)]
    assert (data.common_columns.label, data.common_columns.text) == ("label", None)
    data = parse_arguments(TRAINING_ARGUMENTS, ["--data_dir", "a", "--use_cpu"])[1]
    assert (data.data_dir, data.name, data.columns) == ("a", "a", DataColumns())
    words = ["--label_column", "a", "b", "--text_column", "a", "b", "c", "--use_cpu"]
    with pytest.raises(ValueError, match="--label_column: give one name, or one for each source; got a b"):
        parse_arguments(TRAINING_ARGUMENTS, words)[1].columns  # noqa: B018
