# SPDX-License-Identifier: Apache-2.0
"""Tests from a folder to a batch: `sources`, `labels`, `splits`, `loading`, `augmentation`, `examples`, `batches`.

All data are tiny WAV files made here; nothing needs the network.
"""

import csv
import io
import json
import logging as python_logging
import re

import datasets
import fsspec
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import BertTokenizer, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor
from transformers.utils import logging

from mmser.augmentation import Augmenter, augmentation_generator
from mmser.bad_rows import BadRows
from mmser.batches import MMSERDataCollator
from mmser.examples import EmotionDataset, EmotionIterableDataset, class_counts, drop_unreadable
from mmser.groups import duration_bands, speakers_of
from mmser.loading import load_emotion_dataset, load_emotion_split
from mmser.sources import DataColumns
from processing_mmser import MMSERProcessor

RATE = 16_000
NAMES = ["neutral", "happy", "sad", "angry"]


def sine(seconds=0.1, frequency=440.0, rate=RATE):
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_wav(path, seconds=0.1, frequency=440.0, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sine(seconds, frequency, rate), rate, subtype="FLOAT")


def write_table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def clips(folder, count=4, speaker="s{}", **extra):
    """Write `count` clips and return the rows of their table, with labels 0, 1, 2, 3, 0, ..."""
    rows = []
    frequency = {"test": 440.0, "train": 220.0}.get(folder.name, 330.0)  # no clip is in two splits
    for index in range(count):
        write_wav(folder / f"{index}.wav", 0.05 + 0.01 * index, frequency)
        row = {"file_name": f"{index}.wav", "label": index % 4, "transcription": f"text {index}"}
        rows.append({**row, "speaker": speaker.format(index), **extra})
    return rows


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "validation", "test"):
        write_table(tmp_path / split / "metadata.csv", clips(tmp_path / split, speaker=split + "{}", language="de"))
    return tmp_path


@pytest.fixture
def log(caplog):
    logging.enable_propagation()
    with caplog.at_level(python_logging.WARNING):
        yield caplog
    logging.disable_propagation()


def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "text", "0", "1", "2", "3"]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)})


@pytest.fixture(scope="module")
def processor():
    return MMSERProcessor(Wav2Vec2FeatureExtractor(return_attention_mask=True), tokenizer())


# ---------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("validation", ["validation", "valid", "val", "dev", "eval"])
def test_folder_with_a_table_per_split(tmp_path, suffix, validation):
    for split in ("train", validation, "test"):
        write_table(tmp_path / split / f"metadata{suffix}", clips(tmp_path / split, speaker=split + "{}"))
    data, names = load_emotion_dataset(tmp_path)
    assert names == NAMES
    assert list(data) == ["train", "validation", "test"]
    row = data["validation"][2]
    assert row["audio"] == str(tmp_path / validation / "2.wav")
    assert (row["text"], row["labels"], row["speaker"]) == ("text 2", 2, f"{validation}2")
    # the row number is the line of the file; line 1 of a CSV is its header
    assert row["row"] == f"{validation}/metadata{suffix} row {3 if suffix == '.jsonl' else 4}"
    assert not {"language", "corpus", "sex"} & set(row)


@pytest.mark.parametrize("as_manifest", [False, True])
def test_one_table_with_a_split_column(tmp_path, as_manifest):
    rows = clips(tmp_path, 6)
    for row, split in zip(rows, ["Train", "train", "dev", "test", "train", "dev"], strict=True):
        row["split"] = split
    table = tmp_path / ("list.jsonl" if as_manifest else "metadata.csv")
    write_table(table, rows)
    source = {"manifest": table} if as_manifest else {"data_dir": tmp_path}
    data, _ = load_emotion_dataset(**source, label_names=NAMES)
    assert {split: part["text"][:] for split, part in data.items()} == {
        "train": ["text 0", "text 1", "text 4"],
        "validation": ["text 2", "text 5"],
        "test": ["text 3"],
    }
    rows[3]["split"] = "tset"
    write_table(table, rows)
    with pytest.raises(ValueError, match=r"row \d: split 'tset' is none of train, dev"):
        load_emotion_dataset(**({"manifest": table} if as_manifest else {"data_dir": tmp_path}))


def test_text_only_tables_named_after_splits(tmp_path):
    for split in ("train", "validation", "test"):
        write_table(
            tmp_path / f"{split}.csv", [{"transcription": 'a "quoted", line', "label": label} for label in range(4)]
        )
    with pytest.raises(ValueError, match=r"no audio column 'file_name'.*\['transcription', 'label'\].*--audio_column"):
        load_emotion_dataset(tmp_path)
    data, _ = load_emotion_dataset(tmp_path, columns=DataColumns(audio=None))
    assert data["test"][3] == {"text": 'a "quoted", line', "labels": 3, "row": "test.csv row 5"}
    example = EmotionDataset(data["train"])[0]
    assert example == {"labels": 0, "length": 0, "text": 'a "quoted", line'}


def test_audio_only_and_other_column_names(tmp_path):
    rows = [{"path": f"{i}.wav", "emotion": NAMES[i], "who": f"s{i}"} for i in range(4)]
    clips(tmp_path)
    write_table(tmp_path / "list.csv", rows)
    columns = DataColumns(speaker="who")
    data, names = load_emotion_dataset(manifest=tmp_path / "list.csv", columns=columns)
    assert names == NAMES
    assert sorted(label for part in data.values() for label in part["labels"]) == [0, 1, 2, 3]
    assert "text" not in data["train"].column_names
    assert set(EmotionDataset(data["train"])[0]) == {"audio", "labels", "length"}


def test_strange_text_survives(tmp_path):
    rows = clips(tmp_path)
    for row, text in zip(rows, ["NA", "null", "", "  ሰላም, nan\n2 "], strict=True):
        row["transcription"] = text
    write_table(tmp_path / "metadata.csv", rows)
    data = load_emotion_split(tmp_path)
    assert data["text"][:] == ["NA", "null", "", "ሰላም, nan\n2"]


def test_what_does_not_go_together(tmp_path):
    with pytest.raises(ValueError, match=r"give a source of data: data_dir .* or dataset_name"):
        load_emotion_dataset()
    with pytest.raises(ValueError, match="streaming reads one Hub data set"):
        load_emotion_dataset(data_dir=tmp_path, streaming=True)
    with pytest.raises(ValueError, match="sum to less than 1"):
        load_emotion_dataset(data_dir=tmp_path, test_fraction=0.9)


def test_split_names_given_by_the_user(folder):
    data, _ = load_emotion_dataset(folder, train_split="test", validation_split="train", test_split="validation")
    assert data["train"]["speaker"][0] == "test0" and data["test"]["speaker"][0] == "validation0"
    with pytest.raises(
        ValueError, match=r"no split 'fold1' \(--train_split\); it has: \['test', 'train', 'validation'\]"
    ):
        load_emotion_dataset(folder, train_split="fold1")
    write_table(folder / "dev" / "metadata.csv", clips(folder / "dev"))
    with pytest.raises(ValueError, match=r"two validation splits, \['dev', 'validation'\]"):
        load_emotion_dataset(folder)
    write_table(folder / "dev.jsonl", [{"transcription": "text", "label": 0}])
    with pytest.raises(ValueError, match=r"found both \S*/dev/metadata.csv and \S*/dev.jsonl"):
        load_emotion_dataset(folder, validation_split="dev")


def test_a_split_named_by_the_user_must_be_in_undivided_data_too(tmp_path):
    write_table(tmp_path / "clips.csv", clips(tmp_path))
    with pytest.raises(ValueError, match=r"no split 'foo' \(--test_split\); it has: \['train'\]"):
        load_emotion_dataset(manifest=tmp_path / "clips.csv", test_split="foo")


def test_folder_without_metadata(tmp_path):
    (tmp_path / "happy").mkdir()
    with pytest.raises(ValueError, match=r"no metadata: expected metadata.csv .* the folder has happy"):
        load_emotion_dataset(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        load_emotion_dataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="does not exist"):
        load_emotion_dataset(manifest=tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match=r"expected a file ending in .csv, .tsv, .jsonl"):
        load_emotion_dataset(manifest=tmp_path / "nowhere.xlsx")


def test_a_class_that_is_rather_a_misspelt_label_is_told(tmp_path, log):
    labels = ["happy"] * 300 + ["sad"] * 300 + ["hapy"] * 12 + ["surprised"] * 300 + ["surprise"] * 200
    for number in range(len(labels)):
        (tmp_path / f"{number}.wav").touch()
    rows = [{"file_name": f"{number}.wav", "label": label} for number, label in enumerate(labels)]
    write_table(tmp_path / "table.csv", [{**row, "split": "train"} for row in rows])
    source = {"manifest": tmp_path / "table.csv", "validation_fraction": 0, "test_fraction": 0}
    _, names = load_emotion_dataset(**source)
    assert names == ["happy", "sad", "hapy", "surprise", "surprised"]
    told = [record.getMessage() for record in log.records if "nearly" in record.getMessage()]
    assert told == [
        "The label 'hapy' (12 training clips) is nearly 'happy' (300), and a class of its own. Is it misspelt? "
        "--label_map joins the two."
    ]


def test_a_class_that_is_wholly_held_out_is_refused(tmp_path):
    """As one clip of a class is, whose speaker is drawn for the test: no model can learn it."""
    rows = [
        {"file_name": f"{number}.wav", "label": "ab"[number % 2], "speaker": f"s{number % 10}"} for number in range(60)
    ]
    for row in rows:
        (tmp_path / row["file_name"]).touch()
    refused = 0
    for speaker in range(10):
        write_table(tmp_path / "table.csv", [*rows[:-1], {**rows[-1], "label": "rare", "speaker": f"s{speaker}"}])
        try:
            splits, names = load_emotion_dataset(manifest=tmp_path / "table.csv", validation_fraction=0.2)
        except ValueError as error:
            refused += 1
            assert re.match(
                r"The only clip of 'rare' is held out for (validation|test), .*Add clips of 'rare' by more speakers, "
                "join it with another class or leave it out by --label_map, or give splits of your own",
                str(error),
            )
        else:
            assert names.index("rare") in splits["train"]["labels"]
    assert 0 < refused < 10
    splits, _ = load_emotion_dataset(
        manifest=tmp_path / "table.csv", validation_fraction=0.2, label_names=["a", "b", "rare"], for_training=False
    )
    assert sum(map(len, splits.values())) == 60, "an evaluation divides them as it is told"


def test_a_place_that_is_nearly_right_is_named(tmp_path):
    """A table for a folder, a folder for a table, a misspelt name, a spreadsheet, a table with a name of its own."""
    folder = tmp_path / "calls"
    write_table(folder / "anrufe.csv", [{"Datei": "a.mp3", "Stimmung": "froh"}])
    (folder / "a.mp3").touch()
    with pytest.raises(
        ValueError, match=r"If anrufe\.csv lists the clips, give that: --manifest \S*calls/anrufe\.csv"
    ):
        load_emotion_dataset(folder)
    with pytest.raises(
        ValueError, match=r"It is a folder: give the table in it, \S*calls/anrufe\.csv, or give the folder"
    ):
        load_emotion_dataset(manifest=folder)
    with pytest.raises(ValueError, match=r"does not exist\. Did you mean \S*calls/anrufe\.csv\?"):
        load_emotion_dataset(manifest=folder / "anruf.csv")
    with pytest.raises(ValueError, match=r"is not a folder\. Did you mean \S*/calls\?"):
        load_emotion_dataset(tmp_path / "cals")
    for wrong in ("cals/anrufe.csv", "cals/anruf.csv"):
        with pytest.raises(ValueError, match=r"does not exist\. Did you mean \S*/calls/anrufe\.csv\?"):
            load_emotion_dataset(manifest=tmp_path / wrong)
    with pytest.raises(ValueError, match=r"does not exist\. There is no folder \S*/elsewhere\."):
        load_emotion_dataset(manifest=tmp_path / "elsewhere" / "below" / "table.csv")
    with pytest.raises(ValueError, match=r"does not exist\. It is looked for in \S*/calls\."):
        load_emotion_dataset(manifest=folder / "xyzzy.csv")
    write_table(
        tmp_path / "anrufe.csv", [{"file_name": f"{number}.mp3", "label": "ab"[number % 2]} for number in range(4)]
    )
    with pytest.raises(
        ValueError, match=r"(?s)4 bad rows.*0\.mp3 does not exist\. None of the files is there: paths are rel"
    ):
        load_emotion_dataset(manifest=tmp_path / "anrufe.csv", allow_speaker_overlap=True)
    with pytest.raises(ValueError, match="Save a spreadsheet as CSV"):
        load_emotion_dataset(manifest=folder / "anrufe.xlsx")


# ------------------------------------------------------------------------------- tables and files of other systems


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("suffix", [".csv", ".TSV"])
def test_delimiter_and_encoding_are_found(tmp_path, delimiter, encoding, suffix, caplog):
    rows = clips(tmp_path)
    rows[1]["transcription"] = "für; a, b | c\td"
    with open(tmp_path / f"list{suffix}", "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    logging.enable_propagation()
    with caplog.at_level(python_logging.INFO, logger="mmser"):
        data = load_emotion_split(tmp_path / f"list{suffix}", allow_unknown=False)
    logging.disable_propagation()
    assert data["text"][:] == ["text 0", "für; a, b | c\td", "text 2", "text 3"]
    assert data["labels"][:] == [0, 1, 2, 3] and data["row"][0].endswith(f"list{suffix} row 2")
    usual = "\t" if suffix == ".TSV" else ","
    words = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
    said = f"list{suffix} are separated by {words[delimiter]}" in caplog.text
    assert said == (delimiter != usual) and ("is in UTF-16" in caplog.text) == (encoding == "utf-16")


@pytest.mark.parametrize("line_end", ["\r", "\n", "\r\n"])
def test_any_line_end_is_read(tmp_path, line_end):
    rows = clips(tmp_path)
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    (tmp_path / "list.csv").write_bytes(line_end.join(lines).encode())
    assert load_emotion_split(tmp_path / "list.csv", allow_unknown=False)["labels"][:] == [0, 1, 2, 3]


def test_utf_16_without_a_mark_is_named(tmp_path):
    rows = clips(tmp_path)
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    (tmp_path / "list.csv").write_bytes("\n".join(lines).encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"list\.csv holds zero bytes \(perhaps it is UTF-16"):
        load_emotion_split(tmp_path / "list.csv")


def test_tables_as_spreadsheets_write_them(tmp_path):
    clips(tmp_path, 2)
    table = tmp_path / "list.csv"
    table.write_text(
        "sep=;\r\n\r\n File_Name ;Label; Transcription\r\n0.wav;0;a\r\n1.wav;1;b\r\n", encoding="utf-8-sig"
    )
    data = load_emotion_split(table)
    assert data["text"][:] == ["a", "b"] and data["row"][1].endswith("list.csv row 5")
    table.write_text("file_name,label,label\n0.wav,0,1\n")
    with pytest.raises(ValueError, match=r"list.csv has two columns 'label': rename one of them"):
        load_emotion_split(table)
    table.write_bytes("file_name,label,text\n0.wav,0,a\n1.wav,1,für\n".encode("cp1252"))
    with pytest.raises(
        ValueError, match=r"list.csv is not UTF-8 text \(row 3 has the byte 0xfc; .*Windows-1252.*save"
    ):
        load_emotion_split(table)


COMPOSED, DECOMPOSED = "gl\u00fccklich", "glu\u0308cklich"


@pytest.mark.parametrize(
    ("on_disk", "written"),
    [
        (f"clips/{COMPOSED}.wav", f"clips/{DECOMPOSED}.wav"),
        (f"clips/{DECOMPOSED}.wav", f"clips/{COMPOSED}.wav"),
        (f"{COMPOSED}/{DECOMPOSED}.wav", f"{DECOMPOSED}/{COMPOSED}.wav"),
        ("clips/a/1.wav", r"clips\a\1.wav"),
        ("clips/a/1.wav", r".\clips\a\1.wav"),
        ("clips/a/1.wav", r"..\{folder}\clips\a\1.wav"),
        ("Clips/A/1.WAV", "clips/a/1.wav"),
        ("clips/a/1.wav", r"C:\Users\Anna\data\clips\a\1.wav"),
        ("clips/a/1.wav", "/home/anna/data/clips/a/1.wav"),
        ("1.wav", "/home/anna/data/clips/a/1.wav"),
        ("clips/a/1.wav", r"\\server\share\clips\a\1.wav"),
    ],
)
def test_files_named_as_another_system_writes_them(tmp_path, log, on_disk, written):
    write_wav(tmp_path / on_disk)
    written = written.replace("{folder}", tmp_path.name)
    write_table(tmp_path / "list.csv", [{"file_name": written, "label": 0}])
    data = load_emotion_split(tmp_path / "list.csv")
    assert (tmp_path / on_disk).samefile(data["audio"][0])
    assert (
        "list.csv: 1 of 1 files are found only if names are read as another system" in log.text
        and repr(on_disk)[1:-1] in log.text
    )


def test_a_file_is_not_guessed_where_two_are_meant(tmp_path, log):
    for name in ("a.WAV", "A.wav", "b.wav"):
        write_wav(tmp_path / name)
    for written in (["a.wav"], ["/x/happy/b.wav", "/x/sad/b.wav"], ["B.WAV", "b.wav"], ["/x/c/"], ["../none/b.wav"]):
        write_table(tmp_path / "list.csv", [{"file_name": name, "label": 0} for name in written])
        with pytest.raises(ValueError, match=r"list.csv row 2: audio file \S* does not exist"):
            load_emotion_split(tmp_path / "list.csv")
    assert "another system" not in log.text
    (tmp_path / r"odd\name.wav").write_bytes((tmp_path / "b.wav").read_bytes())
    write_table(tmp_path / "list.csv", [{"file_name": r"odd\name.wav", "label": 0}])
    assert load_emotion_split(tmp_path / "list.csv")["audio"][:] == [str(tmp_path / r"odd\name.wav")]


# ---------------------------------------------------------------------------------------------- folders of classes


def class_folders(folder, *classes, number=1):
    for index, name in enumerate(classes):
        write_wav(folder / name / "x.wav", 0.1 + 0.05 * number, 200.0 + 100 * index)
        write_wav(folder / name / "Y.FLAC.wav", 0.1 + 0.05 * number, 250.0 + 100 * index)
        (folder / name / ".DS_Store").write_text("")
        (folder / name / "._x.wav").write_text("")


def test_folders_of_classes_with_splits(tmp_path, log):
    for number, split in enumerate(("train", "dev", "Test")):
        class_folders(tmp_path / split, "sad", "happy", number=number)
    class_folders(tmp_path / "ood", "fear", number=5)
    data, names = load_emotion_dataset(tmp_path)
    assert names == ["happy", "sad"] and list(data) == ["train", "validation", "test"]
    assert data["validation"]["row"][:] == [f"dev/{x}" for x in ("happy/Y.FLAC.wav", "happy/x.wav")] + [
        f"dev/{x}" for x in ("sad/Y.FLAC.wav", "sad/x.wav")
    ]
    assert data["test"]["labels"][:] == [0, 0, 1, 1]
    assert data["test"]["audio"][3] == str(tmp_path / "Test" / "sad" / "x.wav")
    assert set(data["test"].column_names) == {"audio", "labels", "row"}
    assert "speakers of all clips are unknown" in log.text and "no text column" not in log.text
    with pytest.raises(ValueError, match=r"folder without metadata, has no speaker column 'who'"):
        load_emotion_dataset(tmp_path, columns=DataColumns(speaker="who"))
    with pytest.raises(ValueError, match="no split 'fold1'"):
        load_emotion_dataset(tmp_path, train_split="fold1")
    assert load_emotion_split(tmp_path / "ood")["labels"][:] == [-1, -1]
    write_wav(tmp_path / "train" / "loose.wav")
    with pytest.raises(
        ValueError, match=r"train/loose.wav is not in the folder of a class: expected train/happy/x.wav"
    ):
        load_emotion_dataset(tmp_path)


def test_folders_of_classes_without_splits(tmp_path):
    class_folders(tmp_path, *(f"{number}" for number in (1, 2, 10)))
    with pytest.raises(ValueError, match=r"must be held out .*no speaker column.*--allow_speaker_overlap"):
        load_emotion_dataset(tmp_path)
    data, names = load_emotion_dataset(tmp_path, validation_fraction=0, test_fraction=0)
    assert names == ["1", "2", "10"] and data["train"]["labels"][:] == [0, 0, 2, 2, 1, 1]
    assert data["train"]["row"][0] == "1/Y.FLAC.wav"
    with pytest.raises(ValueError, match="no split 'fold1'"):
        load_emotion_dataset(tmp_path, train_split="fold1")
    class_folders(tmp_path / "training", "1", number=2)  # no usual name of a split: it must not become a class
    with pytest.raises(ValueError, match=r"training/1/\S* is not in the folder of a class"):
        load_emotion_dataset(tmp_path, validation_fraction=0, test_fraction=0)


def test_loose_clips_are_none_of_the_classes(tmp_path):
    write_wav(tmp_path / "ood" / "a.wav")
    class_folders(tmp_path / "ood", "sad", "fear")
    data = load_emotion_split(tmp_path / "ood")
    assert data["row"][:] == ["a.wav", "fear/Y.FLAC.wav", "fear/x.wav", "sad/Y.FLAC.wav", "sad/x.wav"]
    assert data["labels"][:] == [-1, -1, -1, 2, 2]
    with pytest.raises(ValueError, match=r"a.wav is not in the folder of a class"):
        load_emotion_split(tmp_path / "ood", allow_unknown=False)


def test_a_split_without_a_table_is_named(folder, log):
    (folder / "validation" / "metadata.csv").unlink()
    load_emotion_dataset(folder, validation_fraction=0)
    assert "validation has no metadata.csv (or .tsv, .jsonl) and is not read" in log.text


# -------------------------------------------------------------------------------------------- columns for groups


@pytest.mark.parametrize("name", ["SpeakerID", "Speaker ID", "speaker-id", "person", "sid", "Client Id"])
def test_speakers_are_found_however_their_column_is_spelt(tmp_path, name):
    rows = [{**row, name: row["speaker"]} for row in clips(tmp_path)]
    for row in rows:
        del row["speaker"]
    write_table(tmp_path / "list.csv", rows)
    assert load_emotion_split(tmp_path / "list.csv")["speaker"][:] == ["s0", "s1", "s2", "s3"]


@pytest.mark.parametrize("name", ["sex", "gender"])
@pytest.mark.parametrize("as_manifest", [False, True])
def test_sex_is_kept_as_it_was_written(tmp_path, name, as_manifest):
    rows = [{**row, name: sex} for row, sex in zip(clips(tmp_path), [" Female", "männlich ", "", "x"], strict=True)]
    table = tmp_path / ("list.jsonl" if as_manifest else "metadata.csv")
    write_table(table, [{**row, "split": "train"} for row in rows])
    source = {"manifest": table} if as_manifest else {"data_dir": tmp_path}
    data, _ = load_emotion_dataset(**source, validation_fraction=0, test_fraction=0)
    for part in (data["train"], load_emotion_split(table)):
        assert part["sex"][:] == ["Female", "männlich", "", "x"] and "gender" not in part.column_names
    switched_off = load_emotion_split(table, columns=DataColumns(sex=None))
    assert "sex" not in switched_off.column_names
    with pytest.raises(ValueError, match=r"no sex column 'who'; its columns are .*--sex_column"):
        load_emotion_split(table, columns=DataColumns(sex="who"))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_extra_columns_are_strings_under_their_own_names(tmp_path, suffix):
    rows = clips(tmp_path, corpus="A", gender="f")
    for row, age, room in zip(rows, [30, 41, " 7 ", "" if suffix == ".csv" else None], "abcd", strict=True):
        row.update(age=age, room=room, split="train", empty="")
    write_table(tmp_path / f"metadata{suffix}", rows)
    plain = load_emotion_split(tmp_path)
    # columns of the table, our own names for columns, and columns that we have under another name as well
    extra = ["age", "corpus", "label", "labels", "row", "split", "text", "gender", "sex", "age", "empty"]
    part = load_emotion_split(tmp_path, extra_columns=extra)
    assert set(part.column_names) - set(plain.column_names) == {"age", "label", "split", "gender", "empty"}
    assert (
        part["age"][:] == ["30", "41", "7", ""] and part["label"][:] == list("0123") and part["empty"][:] == [""] * 4
    )
    assert part["split"][:] == ["train"] * 4 and part["gender"][:] == part["sex"][:] == ["f"] * 4
    assert part.select_columns(plain.column_names)[:] == plain[:]
    data, _ = load_emotion_dataset(tmp_path, extra_columns=("room",), validation_fraction=0.25, test_fraction=0.25)
    rooms = {text: room for part in data.values() for text, room in zip(part["text"], part["room"], strict=True)}
    assert rooms == {"text 0": "a", "text 1": "b", "text 2": "c", "text 3": "d"} and len(data) == 3


def test_extra_column_that_is_one_of_our_own_is_kept_when_empty(folder):
    for split in ("train", "validation", "test"):
        write_table(folder / split / "metadata.csv", clips(folder / split, speaker=split + "{}", corpus=""))
    data, _ = load_emotion_dataset(folder)
    assert "corpus" not in data["test"].column_names
    data, _ = load_emotion_dataset(folder, extra_columns=["corpus"])
    assert data["test"]["corpus"][:] == [""] * 4


def test_missing_extra_column_lists_the_columns(folder):
    columns = r"\['file_name', 'label', 'transcription', 'speaker', 'language'\]"
    with pytest.raises(
        ValueError, match=rf"train/metadata.csv has no column 'age', 'room'; its columns are {columns}"
    ):
        load_emotion_dataset(folder, extra_columns=["language", "age", "room"], on_bad_example="skip")
    with pytest.raises(ValueError, match=rf"metadata.csv has no column 'sex'; its columns are {columns}"):
        load_emotion_split(folder / "test", extra_columns=["sex"])
    write_table(folder / "test" / "metadata.csv", [{**row, "text": "b"} for row in clips(folder / "test")])
    with pytest.raises(ValueError, match="'text' cannot be an extra column, as --text_column is none"):
        load_emotion_split(folder / "test", columns=DataColumns(text=None), extra_columns=["text"])


def test_duration_bands_hold_their_lower_bound_and_sort():
    seconds = [0, 0.999, 1, 1.999, 2, 3.999, 4, 7.999, 8, 3600]
    expected = [band for band in ("0-1 s", "1-2 s", "2-4 s", "4-8 s", "8+ s") for _ in range(2)]
    assert duration_bands(seconds) == duration_bands(np.float32(seconds)) == expected == sorted(expected)
    assert duration_bands(seconds[::-1]) == expected[::-1] and duration_bands([]) == []
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"finite and >= 0, got {bad} at index 1"):
            duration_bands([1.0, bad, -1.0])


# ----------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("written", "given", "expected_names", "expected_ids"),
    [
        ([0, 1, 3, 2], None, NAMES, [0, 1, 3, 2]),
        (["3.0", "2", " 1 ", "0"], None, NAMES, [3, 2, 1, 0]),
        ([0, 1, 0], None, ["0", "1"], [0, 1, 0]),
        ([1, 2, 3], None, ["1", "2", "3"], [0, 1, 2]),
        ([1, 2, 3, 4], None, ["1", "2", "3", "4"], [0, 1, 2, 3]),
        ([0, 1, 2, 3, 4], None, ["0", "1", "2", "3", "4"], [0, 1, 2, 3, 4]),
        (["10", "9", "9.0", "-3", "09"], None, ["-3", "9", "10"], [2, 1, 1, 0, 1]),
        (["2", "2.0", " 1 "], None, ["1", "2"], [1, 1, 0]),
        (["sad", "Happy", "happy"], None, ["happy", "sad"], [1, 0, 0]),
        (["ANGRY", "sad", "neutral", "happy"], None, NAMES, [3, 2, 0, 1]),
        (["angry", "fear", "Neutral", "bored"], None, ["neutral", "angry", "bored", "fear"], [1, 3, 0, 2]),
        (["joy", "anger", "joy"], None, ["anger", "joy"], [1, 0, 1]),
        (["w\u00fctend", "froh", "wu\u0308tend"], None, ["froh", "w\u00fctend"], [1, 0, 1]),
        (["very  Sad", "glad"], ["Very sad", "glad"], ["Very sad", "glad"], [0, 1]),
        (["-1", "1", "0"], ["-1", "0", "1"], ["-1", "0", "1"], [0, 2, 1]),
        (["joy", "anger", "0"], ["joy", "anger"], ["joy", "anger"], [0, 1, 0]),
        ([5, 0, 4], list("abcdef"), list("abcdef"), [5, 0, 4]),
    ],
)
def test_labels_by_name_or_id(tmp_path, written, given, expected_names, expected_ids):
    rows = clips(tmp_path, len(written))
    for row, label in zip(rows, written, strict=True):
        row["label"] = label
        row["split"] = "train"
    write_wav(tmp_path / "other.wav", 0.3)
    rows.append({**rows[0], "file_name": "other.wav", "speaker": "other", "split": "validation"})
    write_table(tmp_path / "list.csv", rows)
    data, names = load_emotion_dataset(manifest=tmp_path / "list.csv", label_names=given)
    assert names == expected_names
    assert data["train"]["labels"][:] == expected_ids


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (4, r"test/metadata.csv row 3: label 4 is out of range: ids start at 0; allowed: 0 to 3 \(neut"),
        (-4511, "row 3: label -4511 is out of range"),
        (-1, "row 3: label '-1' .* an open-set folder goes to --ood_dir"),
        ("unknown", "row 3: label 'unknown' .* --ood_dir"),
        ("hapy", "row 3: unknown label 'hapy'; allowed: neutral, happy, sad, angry"),
        (0.5, "row 3: unknown label '0.5'"),
    ],
)
@pytest.mark.parametrize("on_bad_example", ["error", "skip"])
def test_a_class_that_is_not_known_is_never_a_bad_row(folder, label, message, on_bad_example):
    rows = clips(folder / "test", speaker="test{}")
    rows[1]["label"] = label
    write_table(folder / "test" / "metadata.csv", rows)
    message = (
        rf"1 label cannot be used:\n.*{message}.* \(1 row with this label\)\n.*correct the labels, or .*--ood_dir"
    )
    with pytest.raises(ValueError, match=message):
        load_emotion_dataset(folder, label_names=NAMES, on_bad_example=on_bad_example)


@pytest.mark.parametrize("label", ["", "nan", " NaN "])
def test_a_row_without_a_label_is_a_bad_row(folder, label):
    rows = clips(folder / "test", speaker="test{}")
    rows[1]["label"] = label
    write_table(folder / "test" / "metadata.csv", rows)
    with pytest.raises(ValueError, match=r"1 bad row.*\n.*test/metadata.csv row 3 has no label"):
        load_emotion_dataset(folder)
    data, names = load_emotion_dataset(folder, on_bad_example="skip")
    assert names == NAMES and data["test"]["labels"][:] == [0, 2, 3]


def relabel(folder, **labels):
    """Write the four labels of each of these splits anew."""
    for split, written in labels.items():
        rows = clips(folder / split, speaker=split + "{}")
        write_table(
            folder / split / "metadata.csv", [{**row, "label": x} for row, x in zip(rows, written, strict=True)]
        )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"test": [0, 1, 2, 4]}, r"test/metadata.csv row 5: label '4' is in no training row \(1 row"),
        ({"test": ["x"] * 4, "train": ["y", "z", "y", "z"], "validation": ["y"] * 4}, r"label 'x' .* \(4 rows with"),
        ({"train": [0, 1, 2, -1]}, r"train/metadata.csv row 5: label '-1' \(none of the classes\).* \(1 row with"),
        ({"train": ["happy", "sad", "sad", 1]}, r"names, 'sad' \(2 rows, first train/metadata.csv row 3\).*numbers"),
        ({"test": ["happy", "sad", "sad", "sad"]}, r"names, 'sad' \(3 rows.*numbers, '0' \(2 rows, first train"),
        ({"train": [0, 1, 2.5, 3]}, r"labels are classes, but there is '2.5' \(1 row, first train/metadata.csv row 4"),
        (
            dict.fromkeys(("train", "validation", "test"), ["x"] * 4),
            r"two or more different names, got \['x'\]\. A model needs two",
        ),
        (dict.fromkeys(("train", "validation", "test"), [""] * 4), "no row has a label that is a class"),
    ],
)
def test_labels_that_do_not_go_together(folder, labels, message):
    relabel(folder, **labels)
    for on_bad_example in ("error", "skip"):
        with pytest.raises(ValueError, match=message):
            load_emotion_dataset(folder, on_bad_example=on_bad_example)


def test_two_spellings_of_a_label_name_their_rows(folder, log):
    spelt = {split: ["calm", "Very furious", "very  furious", "calm"] for split in ("train", "validation", "test")}
    relabel(folder, **spelt)
    message = r"'Very furious' \(3 rows, first train/metadata.csv row 3\), 'very  furious' \(3 rows, first .* row 4\)"
    with pytest.raises(ValueError, match=rf"differ only in case or spaces: {message}"):
        load_emotion_dataset(folder)
    data, names = load_emotion_dataset(folder, label_names=["calm", "very furious"])
    assert data["train"]["labels"][:] == [0, 1, 1, 0] and names == ["calm", "very furious"]


def test_what_numbers_mean_is_said(folder, caplog):
    logging.enable_propagation()
    with caplog.at_level(python_logging.INFO, logger="mmser"):
        load_emotion_dataset(folder)
        assert "labels 0, 1, 2, 3 are taken as neutral, happy, sad, angry. --labels" in caplog.text
        caplog.clear()
        relabel(folder, train=[1, 2, 3, 3], validation=[1, 2, 3, 3], test=[2, 2, 3, 3])
        assert load_emotion_dataset(folder)[1] == ["1", "2", "3"]
        assert load_emotion_dataset(folder, label_names=list("abcd"))[0]["train"]["labels"][:] == [1, 2, 3, 3]
    logging.disable_propagation()
    assert "Labels that are numbers are ids: 0 a, 1 b, 2 c, 3 d" in caplog.text
    assert "labels are numbers: the classes are called 1, 2, 3" in caplog.text


@pytest.mark.parametrize(
    ("written", "checkpoint", "expected_names", "expected_ids"),
    [
        (["sad", "happy", "happy", "sad"], NAMES, NAMES, [2, 1, 1, 2]),
        (["a", "c", "a", "c"], ["c", "b", "a"], ["c", "b", "a"], [2, 0, 2, 0]),
        ([0, 1, 2, 3], [*NAMES, "fear"], [*NAMES, "fear"], [0, 1, 2, 3]),
        ([1, 3, 1, 3], ["1", "2", "3"], ["1", "2", "3"], [0, 2, 0, 2]),
        ([1, 3, 1, 3], NAMES, ["1", "3"], [0, 1, 0, 1]),  # ids of the checkpoint would be a guess
        (["sad", "joy", "sad", "joy"], NAMES, ["sad", "joy"], [0, 1, 0, 1]),
    ],
)
def test_labels_of_a_checkpoint_that_is_trained_further(
    folder, log, written, checkpoint, expected_names, expected_ids
):
    relabel(folder, **dict.fromkeys(("train", "validation", "test"), written))
    data, names = load_emotion_dataset(folder, checkpoint_names=checkpoint)
    assert names == expected_names and data["train"]["labels"][:] == data["test"]["labels"][:] == expected_ids
    absent = [name for name in names if names.index(name) not in expected_ids]
    assert (f"No training row has the label {', '.join(absent)}:" in log.text) == bool(absent)
    given = list(dict.fromkeys(map(str, written)))
    assert load_emotion_dataset(folder, label_names=given, checkpoint_names=checkpoint)[1] == given


def test_names_that_are_numbers_are_not_ids(tmp_path):
    rows = clips(tmp_path, 3)
    for row, label in zip(rows, ["3.0", "1", "01"], strict=True):
        row["label"] = label
    write_table(tmp_path / "metadata.csv", rows)
    data = load_emotion_split(tmp_path, label_names=["1", "3"], allow_unknown=False)
    assert data["labels"][:] == [1, 0, 0]
    rows[1]["label"] = "0"  # no name; as an id it would be the class "1"
    write_table(tmp_path / "metadata.csv", rows)
    with pytest.raises(ValueError, match="row 3: unknown label '0'; allowed: 1, 3"):
        load_emotion_split(tmp_path, label_names=["1", "3"], allow_unknown=False)
    assert load_emotion_split(tmp_path, label_names=["1", "3"])["labels"][:] == [1, -1, 0]


def test_a_label_is_one_value(tmp_path):
    rows = [{**row, "label": [0, 1]} for row in clips(tmp_path)]
    write_table(tmp_path / "metadata.jsonl", rows)
    with pytest.raises(ValueError, match=r"metadata.jsonl row 1: a label is one name or number, got \[0, 1\]"):
        load_emotion_dataset(tmp_path)


@pytest.mark.parametrize("names", [NAMES, ["a", "b", "c", "d"], ["0", "1", "2", "3"]])
def test_a_class_without_a_training_row_is_an_error(folder, names):
    relabel(folder, train=[*names[:3], names[2]], validation=names, test=names)
    with pytest.raises(
        ValueError, match=f"label '{names[3]}' is in no training row .*\n.*name all classes with --label"
    ):
        load_emotion_dataset(folder)


def test_evaluation_takes_ids_as_those_of_the_model(folder, log):
    relabel(folder, train=[1, 2, 3, 3], validation=[1, 2, 3, 3], test=[1, 2, 3, 3])
    data, _ = load_emotion_dataset(folder, label_names=NAMES, for_training=False)
    assert data["test"]["labels"][:] == [1, 2, 3, 3]
    assert "No clip has the label neutral. Ids start at 0, which is neutral" in log.text
    assert "learn" not in log.text
    relabel(folder, train=[1, 2, 3, 4], validation=[1, 2, 3, 4], test=[1, 2, 3, 4])
    for for_training in (True, False):
        with pytest.raises(ValueError, match="label 4 is out of range: ids start at 0; allowed: 0 to 3") as raised:
            load_emotion_dataset(folder, label_names=NAMES, for_training=for_training)
        assert "--labels" not in str(raised.value)


def test_a_class_without_a_training_row_is_named(folder, log):
    relabel(folder, train=[0, 1, 2, 2])
    assert load_emotion_dataset(folder, label_names=NAMES)[1] == NAMES
    assert "No training row has the label angry: the model cannot learn it" in log.text
    log.clear()
    assert load_emotion_dataset(folder, label_names=[*NAMES, "joy"])[1] == [*NAMES, "joy"]
    assert "No training row has the label angry, joy:" in log.text


def test_label_names_must_differ(folder):
    with pytest.raises(ValueError, match="two or more different names"):
        load_emotion_dataset(folder, label_names=["sad", "Sad"])


def test_open_set_folder(tmp_path):
    rows = clips(tmp_path / "ood", 5)
    for row, label in zip(rows, [-1, "unknown", "fear", "sad", 3], strict=True):
        row["label"] = label
    write_table(tmp_path / "ood" / "metadata.csv", rows)
    data = load_emotion_split(tmp_path / "ood")
    assert data["labels"][:] == [-1, -1, -1, 2, 3]
    assert data["row"][0] == "ood/metadata.csv row 2"
    assert class_counts(data, 4) == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"3 labels cannot be used:\n.*row 2: label '-1'"):
        load_emotion_split(tmp_path / "ood", allow_unknown=False)
    for row in rows:
        del row["label"]
    write_table(tmp_path / "ood" / "metadata.csv", rows)
    assert set(load_emotion_split(tmp_path / "ood")["labels"]) == {-1}
    with pytest.raises(ValueError, match="no label column 'klass'"):
        load_emotion_split(tmp_path / "ood", columns=DataColumns(label="klass"))


# ------------------------------------------------------------------------------------------------- error messages


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (DataColumns(label="klass"), r"no label column 'klass'; its columns are \['file_name', .*--label_column"),
        (DataColumns(speaker="who"), "no speaker column 'who'.*--speaker_column"),
        (DataColumns(text="words"), "no text column 'words'.*--text_column"),
        (DataColumns(audio="sound"), "no audio column 'sound'.*--audio_column"),
        (DataColumns(audio=None, text=None), "neither an audio column None nor a text column None; its columns"),
    ],
)
def test_missing_column_lists_the_columns(folder, columns, message):
    with pytest.raises(ValueError, match=message):
        load_emotion_dataset(folder, columns=columns)


def test_missing_files_are_found_at_once(folder, log):
    for index in range(4):
        (folder / "train" / f"{index}.wav").unlink()
    with pytest.raises(ValueError) as error:
        load_emotion_dataset(folder)
    message = str(error.value)
    assert "4 bad rows" in message and "and 1 more" in message and "--on_bad_example skip" in message
    assert re.findall(r"row (\d): audio file \S*/train/(\d).wav does not exist", message) == [
        ("2", "0"), ("3", "1"), ("4", "2"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"no usable row is left in .* train"):
        load_emotion_dataset(folder, on_bad_example="skip")
    clips(folder / "train", 3)
    data, _ = load_emotion_dataset(folder, on_bad_example="skip")
    assert len(data["train"]) == 3
    assert "skipped 1 bad row" in log.text and "3.wav" in log.text
    with pytest.raises(ValueError, match="'error' or 'skip'"):
        load_emotion_dataset(folder, on_bad_example="ignore")


def test_bad_rows_are_listed_and_too_many_end_the_run_before_all_are_read(folder, tmp_path, monkeypatch):
    """Half of the files are no sound. A share of that is allowed; less ends the run, and at once."""
    write_table(folder / "train" / "metadata.csv", clips(folder / "train", 40, "train{}"))
    for index in range(0, 40, 2):
        (folder / "train" / f"{index}.wav").write_bytes(b"not a sound")
    (folder / "train" / "1.wav").unlink()
    rule = BadRows("skip", 0.6)
    rule.list_in(tmp_path / "out")
    data, _ = load_emotion_dataset(folder, on_bad_example=rule)
    assert len(drop_unreadable(data["train"], rule)) == 19
    path = rule.write()
    with path.open(encoding="utf-8", newline="") as file:
        listed = [row["problem"] for row in csv.DictReader(file)]
    assert path == tmp_path / "out" / "bad_examples.csv" and len(listed) == 21
    assert "1.wav does not exist" in listed[0]  # then the files that were opened, in the order of the table
    assert [int(re.search(r"/(\d+)\.wav", problem)[1]) for problem in listed[1:]] == list(range(0, 40, 2))

    opened = []
    read = EmotionDataset.__getitem__
    monkeypatch.setattr(EmotionDataset, "__getitem__", lambda self, index: opened.append(index) or read(self, index))
    strict = BadRows("skip", 0.1)
    strict.list_in(tmp_path / "strict")
    message = r"bad rows of 39 are more than the share of 0.1 .*--max_bad_examples.* in \S*strict/bad_examples.csv"
    with pytest.raises(ValueError, match=message):
        drop_unreadable(data["train"], strict)
    assert len(opened) < 39 and len((tmp_path / "strict" / "bad_examples.csv").read_text().splitlines()) < 21
    loading = BadRows("skip", 0.0)
    with pytest.raises(ValueError, match=r"1 bad rows of 48 are more than the share of 0 "):
        load_emotion_dataset(folder, on_bad_example=loading)

    rule.problems.clear()
    assert rule.write() is None and not path.exists()  # what an earlier run listed is not true of this one
    with pytest.raises(ValueError, match=r"max_bad_examples must be a share from 0 to 1, got 20"):
        BadRows("skip", 20)


@pytest.mark.parametrize(("line", "message"), [('{"label": 0,', "valid JSON"), ("[1, 2]", "not a JSON object")])
def test_malformed_json_line(tmp_path, line, message):
    write_table(tmp_path / "metadata.jsonl", clips(tmp_path))
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    (tmp_path / "metadata.jsonl").write_text("\n".join([lines[0], "", line, *lines[1:]]))
    with pytest.raises(ValueError, match=rf"metadata.jsonl row 3 is not {message}|metadata.jsonl row 3 is {message}"):
        load_emotion_split(tmp_path)
    assert len(load_emotion_split(tmp_path, on_bad_example="skip")) == 4


def test_malformed_csv(tmp_path):
    write_table(tmp_path / "metadata.csv", clips(tmp_path))
    good = (tmp_path / "metadata.csv").read_text()
    (tmp_path / "metadata.csv").write_text(good + "\n4.wav,0,too,many,fields\n")
    with pytest.raises(ValueError, match="row 7 has 5 fields, but the header has 4"):
        load_emotion_split(tmp_path)
    (tmp_path / "metadata.csv").write_text(good + '4.wav,0,"an open quote,s4\n5.wav,0,text,s5\n')
    with pytest.raises(ValueError, match="row 7 is malformed"):
        load_emotion_split(tmp_path)
    (tmp_path / "metadata.csv").write_text(good.replace("text 0", "für"), encoding="latin-1")
    with pytest.raises(ValueError, match="is not UTF-8"):
        load_emotion_split(tmp_path)
    (tmp_path / "metadata.csv").write_text(good.splitlines()[0])
    with pytest.raises(ValueError, match="has no rows"):
        load_emotion_split(tmp_path)
    (tmp_path / "metadata.csv").write_text("\ufeff" + good, encoding="utf-8")  # as spreadsheets save it
    assert len(load_emotion_split(tmp_path)) == 4


def test_row_without_audio_and_text(folder):
    rows = clips(folder / "test", speaker="test{}")
    rows[0].update(file_name="", transcription=" ")
    rows[1].update(file_name="")
    write_table(folder / "test" / "metadata.csv", rows)
    with pytest.raises(ValueError, match=r"1 bad row in.*\n.*test/metadata.csv row 2 has neither audio nor text"):
        load_emotion_dataset(folder)


# --------------------------------------------------------------------------------------------------------- splits


def test_speaker_in_two_splits_is_refused(folder, log):
    write_table(folder / "test" / "metadata.csv", clips(folder / "test", speaker="train{}"))
    with pytest.raises(
        ValueError, match=r"4 speakers .*: train0 \(train and test\), train1 .*--allow_speaker_overlap"
    ):
        load_emotion_dataset(folder)
    data, _ = load_emotion_dataset(folder, allow_speaker_overlap=True)
    assert len(data["test"]) == 4
    assert "4 speakers are in more than one split" in log.text


@pytest.mark.parametrize("name", ["spk", "SPK_ID", "Speaker", "speaker_id", "actor", "Client_ID", "subject"])
def test_usual_speaker_columns_are_recognised(folder, name, caplog):
    for split in ("train", "validation", "test"):
        rows = clips(folder / split, speaker="train{}" if split == "test" else split + "{}")
        renamed = [{name if key == "speaker" else key: value for key, value in row.items()} for row in rows]
        write_table(folder / split / "metadata.csv", renamed)
    with pytest.raises(ValueError, match=r"4 speakers .*: train0 \(train and test\)"):
        load_emotion_dataset(folder)
    logging.enable_propagation()
    with caplog.at_level(python_logging.INFO, logger="mmser"):
        data, _ = load_emotion_dataset(folder, allow_speaker_overlap=True)
    logging.disable_propagation()
    assert data["test"]["speaker"][:] == [f"train{index}" for index in range(4)]
    assert f"The speakers are in the column {name!r}" in caplog.text and "are unknown" not in caplog.text


def test_the_usual_name_wins_over_others(tmp_path):
    write_table(tmp_path / "metadata.csv", clips(tmp_path, SPEAKER="no", actor="no", spk="no"))
    assert load_emotion_split(tmp_path)["speaker"][:] == ["s0", "s1", "s2", "s3"]


def test_one_speaker_in_two_spellings_is_one(folder):
    for split, name in (("train", "Jo\u0308rg"), ("validation", "x"), ("test", "j\u00f6rg")):
        write_table(folder / split / "metadata.csv", clips(folder / split, speaker=name))
    with pytest.raises(ValueError, match=r"1 speaker is in more than one split: J\S* \(train and test\)"):
        load_emotion_dataset(folder)


def test_unknown_speakers_are_said(folder, log):
    for split in ("train", "validation", "test"):
        rows = clips(folder / split, speaker=split + "{}")
        rows[0]["speaker"] = ""
        write_table(folder / split / "metadata.csv", rows)
    load_emotion_dataset(folder)
    assert log.text.count("The speakers of 3 of 12 clips are unknown") == 1 and "--speaker_column" in log.text
    log.clear()
    for split in ("train", "validation", "test"):
        rows = [{k: v for k, v in row.items() if k != "speaker"} for row in clips(folder / split)]
        write_table(folder / split / "metadata.csv", rows)
    load_emotion_dataset(folder)
    assert log.text.count("The speakers of all clips are unknown") == 1


def test_the_same_clip_in_two_splits_is_refused(folder, log):
    (folder / "test" / "1.wav").write_bytes((folder / "train" / "2.wav").read_bytes())
    write_wav(folder / "train" / "3.wav", 1.0)
    changed = bytearray((folder / "train" / "3.wav").read_bytes())
    changed[5000] ^= 1  # of the same size, and the same in the places that are looked at first
    assert len(changed) > 50_000
    (folder / "test" / "3.wav").write_bytes(changed)
    message = r"The same audio is in more than one split in 1 case: train/metadata.csv row 4 \(train\) and "
    with pytest.raises(ValueError, match=message + r"test/metadata.csv row 3 \(test\)\. .*--allow_speaker_overlap"):
        load_emotion_dataset(folder)
    data, _ = load_emotion_dataset(folder, allow_speaker_overlap=True)
    assert len(data["test"]) == 4 and "The same audio is in more than one split in 1 case" in log.text


def test_one_file_in_two_splits_of_one_table_is_refused(tmp_path):
    rows = [{**row, "split": split} for split in ("train", "test") for row in clips(tmp_path, speaker=split + "{}")]
    write_table(tmp_path / "metadata.csv", rows)
    with pytest.raises(
        ValueError,
        match=r"more than one split in 4 cases: .*row 2 \(train\) and metadata.csv row 6 \(test\)",
    ):
        load_emotion_dataset(tmp_path, validation_fraction=0)


def test_copies_with_different_labels_are_named(folder, log):
    for copy in ("0", "3"):
        (folder / "train" / f"{copy}.wav").write_bytes((folder / "train" / "1.wav").read_bytes())
    for split in ("test", "validation"):  # these are no copies of a clip: whoever reads them says what is wrong
        (folder / split / "2.wav").write_bytes(b"")
        (folder / split / "3.wav").write_bytes(b"<html>404 Not Found</html>")
    load_emotion_dataset(folder)
    message = "The same audio has different labels in 1 case: train/metadata.csv row 2 (0) and "
    assert message + "train/metadata.csv row 3 (1)" in log.text


def test_same_name_in_two_corpora_is_two_people(tmp_path):
    for split, corpus in (("train", "A"), ("validation", "B"), ("test", "C")):
        write_table(tmp_path / split / "metadata.csv", clips(tmp_path / split, corpus=corpus))
    data, _ = load_emotion_dataset(tmp_path)
    assert data["train"]["speaker"][:] == data["test"]["speaker"][:]


def text_manifest(path, speakers, labels, corpora=None):
    rows = [
        {"text": f"row {index}", "label": label, "speaker": speaker, "corpus": corpora[index] if corpora else ""}
        for index, (speaker, label) in enumerate(zip(speakers, labels, strict=True))
    ]
    write_table(path, rows)
    return path


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.sampled_from("AB")), min_size=20, max_size=60),
    st.integers(0, 1000),
)
def test_own_split_is_speaker_disjoint_and_complete(tmp_path, rows, seed):
    # three sure speakers, so that three splits are possible
    rows = [*rows, (10, 0, "A"), (11, 1, "A"), (12, 2, "B")]
    speakers, labels, corpora = zip(*rows, strict=True)
    path = text_manifest(tmp_path / "list.csv", speakers, labels, corpora)
    data, _ = load_emotion_dataset(manifest=path, seed=seed, columns=DataColumns(audio=None))
    again, _ = load_emotion_dataset(manifest=path, seed=seed, columns=DataColumns(audio=None))
    people = {split: set(zip(part["corpus"], part["speaker"], strict=True)) for split, part in data.items()}
    assert list(data) == ["train", "validation", "test"] and all(people.values())
    assert not people["train"] & people["test"]
    assert not people["train"] & people["validation"]
    assert not people["test"] & people["validation"]
    texts = [text for part in data.values() for text in part["text"]]
    assert sorted(texts) == sorted(f"row {index}" for index in range(len(rows)))
    assert all(data[split]["text"][:] == again[split]["text"][:] for split in data)


def test_own_split_keeps_label_shares(tmp_path):
    rng = np.random.default_rng(0)
    speakers = rng.integers(0, 30, 900)
    labels = np.where(rng.random(900) < 0.6, 0, rng.integers(1, 4, 900))
    path = text_manifest(tmp_path / "list.csv", speakers, labels)
    data, _ = load_emotion_dataset(manifest=path, columns=DataColumns(audio=None))
    expected = np.bincount(labels) / 900
    for split, share in (("train", 0.7), ("validation", 0.15), ("test", 0.15)):
        counts = np.array(class_counts(data[split], 4))
        assert abs(counts.sum() / 900 - share) < 0.05
        np.testing.assert_allclose(counts / counts.sum(), expected, atol=0.06)


def test_only_missing_splits_are_held_out(folder, tmp_path_factory):
    (folder / "validation" / "metadata.csv").unlink()
    data, _ = load_emotion_dataset(folder, validation_fraction=0.25)
    assert len(data["test"]) == 4 and len(data["train"]) == 3 and len(data["validation"]) == 1
    data, _ = load_emotion_dataset(folder, validation_fraction=0)
    assert list(data) == ["train", "test"] and len(data["train"]) == 4


def test_split_without_speakers_needs_permission(tmp_path, log):
    path = text_manifest(tmp_path / "list.csv", [""] * 40, [0] * 20 + [1] * 20)
    with pytest.raises(
        ValueError, match=r"no speaker column: add a column .*--speaker_column.*--allow_speaker_overlap"
    ):
        load_emotion_dataset(columns=DataColumns(audio=None), manifest=path)
    data, _ = load_emotion_dataset(columns=DataColumns(audio=None), manifest=path, allow_speaker_overlap=True)
    assert {split: class_counts(part, 2) for split, part in data.items()} == {
        "train": [14, 14],
        "validation": [3, 3],
        "test": [3, 3],
    }
    assert "speakers may leak" in log.text
    two = text_manifest(tmp_path / "two.csv", list("ab") * 20, [0] * 20 + [1] * 20)
    with pytest.raises(
        ValueError, match=r"has only 2 speakers: add recordings of others \(3 speakers are the least\)"
    ):
        load_emotion_dataset(manifest=two, columns=DataColumns(audio=None))


# -------------------------------------------------------------------------------------------------------- Hub data


def wav_bytes(seconds=0.1, frequency=440.0):
    buffer = io.BytesIO()
    soundfile.write(buffer, sine(seconds, frequency), RATE, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


@pytest.fixture
def hub(tmp_path):
    """A folder as it lies on the Hub: Parquet files with embedded audio and a ClassLabel in an order of its own."""
    # made with pyarrow: `datasets` encodes audio only where torchcodec is installed
    import pyarrow
    import pyarrow.parquet

    features = datasets.Features(
        {
            "audio": datasets.Audio(),
            "label": datasets.ClassLabel(names=["angry", "happy", "neutral"]),
            "sentence": datasets.Value("string"),
            "speaker": datasets.Value("int64"),
            "gender": datasets.ClassLabel(names=["male", "female"]),
            "age": datasets.Value("int64"),
        }
    )
    root = tmp_path / "hub"
    root.mkdir()
    for number, split in enumerate(("train", "test")):
        table = pyarrow.table(
            {
                "audio": [
                    {"bytes": wav_bytes(0.05 + 0.01 * i + 0.1 * number), "path": f"{split}{i}.wav"} for i in range(8)
                ],
                "label": [i % 3 for i in range(8)],
                "sentence": [None if i == 0 else f"{split} {i}" for i in range(8)],
                "speaker": [10 * number + i for i in range(8)],
                "gender": [None if i == 3 else i % 2 for i in range(8)],
                "age": [None if i == 0 else 20 + i for i in range(8)],
            },
            schema=features.arrow_schema,
        )
        pyarrow.parquet.write_table(table, root / f"{split}-00000-of-00001.parquet")
    return root


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_hub_data_with_embedded_audio(hub, cache):
    data, names = load_emotion_dataset(dataset_name=str(hub), validation_fraction=0.25)
    assert names == ["neutral", "happy", "angry"]  # those that are declared, in the order of the default ones
    assert {split: len(part) for split, part in data.items()} == {"train": 6, "validation": 2, "test": 8}
    assert data["test"]["labels"][:] == [2, 1, 0, 2, 1, 0, 2, 1]
    assert data["test"]["text"][:3] == ["", "test 1", "test 2"]
    assert data["test"]["row"][3] == f"{hub} test row 3"
    assert set(data["test"][0]["audio"]) == {"bytes", "path"}
    examples = EmotionDataset(data["test"])
    np.testing.assert_array_equal(examples[2]["audio"], sine(0.17))
    assert examples.lengths == [len(sine(0.15 + 0.01 * i)) for i in range(8)]
    # audio and labels still belong together after rows were selected
    train = EmotionDataset(data["train"])
    for example, speaker in zip((train[i] for i in range(6)), data["train"]["speaker"], strict=True):
        assert example["length"] == len(sine(0.05 + 0.01 * int(speaker)))


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_for_groups_from_the_hub(hub, cache, streaming):
    plain, _ = load_emotion_dataset(dataset_name=str(hub), streaming=streaming)
    extra = ["age", "label", "sentence", "audio", "sex"]
    data, _ = load_emotion_dataset(dataset_name=str(hub), streaming=streaming, extra_columns=extra)
    row = next(iter(data["test"]))
    assert set(row) - set(next(iter(plain["test"]))) == {"age", "label", "sentence"} and row["audio"]["bytes"]
    rows = list(data["test"])
    assert [row["sex"] for row in rows][:5] == ["male", "female", "male", "", "male"]  # names, not ids
    assert [row["age"] for row in rows][:3] == ["", "21", "22"]
    assert [row["label"] for row in rows][:4] == ["angry", "happy", "neutral", "angry"]
    assert all(row["sentence"] == row["text"] for row in rows) and rows[1]["text"] == "test 1"
    with pytest.raises(ValueError, match=r"has no column 'room'; its columns are \['audio', 'label', 'sentence', "):
        load_emotion_dataset(dataset_name=str(hub), streaming=streaming, extra_columns=["room"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_hub_data_streamed(hub, cache, log, processor, num_workers):
    data, names = load_emotion_dataset(
        dataset_name=str(hub), streaming=True, label_names=["neutral", "happy", "angry"]
    )
    assert names == ["neutral", "happy", "angry"] and set(data) == {"train", "test"}
    assert "The data set also has" not in log.text
    assert "cannot be checked" in log.text
    stream = EmotionIterableDataset(data["test"], training=True, augmenter=Augmenter(probability=1.0))
    collator = MMSERDataCollator(processor)
    loader = DataLoader(stream, 3, collate_fn=collator, num_workers=num_workers, persistent_workers=num_workers > 0)
    with pytest.raises(TypeError, match="random access"):
        class_counts(stream, 3)
    passes = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        batches = list(loader)
        passes.append(torch.cat([batch["input_values"].flatten() for batch in batches]))
        assert [batch["labels"].tolist() for batch in batches] == [[2, 1, 0], [2, 1, 0], [2, 1]]
    assert torch.equal(passes[0], passes[2])
    assert passes[0].shape != passes[1].shape or not torch.equal(passes[0], passes[1])


def test_workers_count_what_a_stream_skips():
    rows = datasets.Dataset.from_dict(
        {"text": [str(i) for i in range(8)], "labels": [None, 1] * 4, "row": [f"row {i}" for i in range(8)]}
    )
    stream = EmotionIterableDataset(rows.to_iterable_dataset(num_shards=2), on_bad_example="skip")
    texts = [
        example["text"] for batch in DataLoader(stream, 2, num_workers=2, collate_fn=identity) for example in batch
    ]
    assert sorted(texts) == ["1", "3", "5", "7"]
    assert stream.num_skipped == 4


def test_stream_seeds_by_content_and_skips(hub, cache, log):
    data, _ = load_emotion_dataset(
        dataset_name=str(hub), streaming=True, label_names=["neutral", "happy"], on_bad_example="skip"
    )
    assert "The data set also has the classes angry, which are none of neutral, happy" in log.text
    options = {"training": True, "augmenter": Augmenter(probability=1.0), "on_bad_example": "skip"}
    stream = EmotionIterableDataset(data["test"], **options)
    examples = list(stream)
    assert [example["labels"] for example in examples] == [1, 0, 1, 0, 1]  # "angry" is none of the two
    assert stream.num_skipped == 3
    moved = list(EmotionIterableDataset(data["test"].skip(3), **options))
    np.testing.assert_array_equal(moved[-1]["audio"], examples[-1]["audio"])
    strict, _ = load_emotion_dataset(dataset_name=str(hub), streaming=True, label_names=["neutral", "happy"])
    with pytest.raises(ValueError, match="test row 0: unknown label 'angry'; allowed: neutral, happy"):
        list(EmotionIterableDataset(strict["test"]))


def test_the_same_embedded_clip_in_two_splits_is_refused(hub, cache, log):
    import pyarrow.parquet

    train, test = (pyarrow.parquet.read_table(hub / f"{split}-00000-of-00001.parquet") for split in ("train", "test"))
    rows = test.to_pylist()
    rows[5]["audio"] = {"bytes": train["audio"][2]["bytes"].as_py(), "path": "other.wav"}
    changed = pyarrow.Table.from_pylist(rows, schema=test.schema)
    pyarrow.parquet.write_table(changed, hub / "test-00000-of-00001.parquet")
    message = r"same audio is in more than one split in 1 case: \S* train row 2 \(train\) and \S* test row 5 \(test\)"
    with pytest.raises(ValueError, match=message):
        load_emotion_dataset(dataset_name=str(hub), validation_fraction=0)
    load_emotion_dataset(dataset_name=str(hub), validation_fraction=0, allow_speaker_overlap=True)
    assert "The same audio is in more than one split in 1 case" in log.text


def test_what_a_stream_cannot_know_is_said(tmp_path, cache, log):
    write_table(tmp_path / "data" / "train.csv", [{"path": str(tmp_path / "data" / "a.wav"), "label": 1, "text": "a"}])
    data, names = load_emotion_dataset(dataset_name=str(tmp_path / "data"), streaming=True)
    assert names == NAMES and next(iter(data["train"]))["labels"] == 1
    assert "The labels of a stream are not known beforehand: they are taken as neutral, happy, sad, angry" in log.text
    assert "whether a speaker or a clip is in two" in log.text
    source = {"dataset_name": str(tmp_path / "data"), "streaming": True}
    assert load_emotion_dataset(**source, checkpoint_names=["a", "b"])[1] == ["a", "b"]
    assert load_emotion_dataset(**source, label_names=["x", "y"], checkpoint_names=["a", "b"])[1] == ["x", "y"]


def test_audio_behind_an_address():
    with fsspec.open("memory://clips/a.wav", "wb") as file:
        file.write(wav_bytes(0.2))
    data = datasets.Dataset.from_dict({"audio": ["memory://clips/a.wav"], "labels": [0], "row": ["row 0"]})
    np.testing.assert_array_equal(EmotionDataset(data)[0]["audio"], sine(0.2))


# -------------------------------------------------------------------------------------------------------- examples


def identity(examples):
    return examples


def all_examples(dataset, num_workers, epochs):
    loader = DataLoader(
        dataset, batch_size=2, num_workers=num_workers, collate_fn=identity, persistent_workers=num_workers > 0
    )
    result = []
    for epoch in epochs:
        dataset.set_epoch(epoch)
        result.append([example for batch in loader for example in batch])
    return result


def test_examples_repeat_whatever_the_workers_and_change_with_the_epoch(folder):
    data, _ = load_emotion_dataset(folder)
    options = {"training": True, "augmenter": Augmenter(probability=1.0), "max_seconds": 0.06}
    alone = all_examples(EmotionDataset(data["train"], seed=1, **options), 0, [0, 1])
    workers = all_examples(EmotionDataset(data["train"], seed=1, **options), 2, [0, 1, 0])
    other_seed = all_examples(EmotionDataset(data["train"], seed=2, **options), 0, [0])
    for index in range(4):
        np.testing.assert_array_equal(alone[0][index]["audio"], workers[0][index]["audio"])
        np.testing.assert_array_equal(alone[1][index]["audio"], workers[1][index]["audio"])
        np.testing.assert_array_equal(alone[0][index]["audio"], workers[2][index]["audio"])
        assert not np.array_equal(alone[0][index]["audio"], alone[1][index]["audio"])
        assert not np.array_equal(alone[0][index]["audio"], other_seed[0][index]["audio"])


def test_evaluation_examples_are_the_clips_themselves(folder):
    write_wav(folder / "test" / "0.wav", 0.2, rate=8000)
    data, _ = load_emotion_dataset(folder)
    examples = EmotionDataset(data["test"], augmenter=Augmenter(probability=1.0), text_dropout=1.0)
    assert len(examples) == 4
    np.testing.assert_array_equal(examples[1]["audio"], sine(0.06))
    np.testing.assert_array_equal(examples[-1]["audio"], sine(0.08))
    assert examples[1]["text"] == "text 1" and examples[1]["labels"] == 1 and examples[1]["length"] == len(sine(0.06))
    assert examples[0]["length"] == 3200  # 0.2 s at 16 kHz, from 8 kHz
    assert examples.lengths == [3200, *(len(sine(0.05 + 0.01 * i)) for i in (1, 2, 3))]


def test_long_clips_are_cropped(tmp_path):
    ramp = np.linspace(0, 1, RATE, dtype=np.float32)
    soundfile.write(tmp_path / "a.wav", ramp, RATE, subtype="FLOAT")
    data = datasets.Dataset.from_dict({"audio": [str(tmp_path / "a.wav")], "labels": [0], "row": ["row 0"]})
    middle = EmotionDataset(data, max_seconds=0.5)
    np.testing.assert_array_equal(middle[0]["audio"], ramp[4000:12000])
    assert middle.lengths == [8000]
    training = EmotionDataset(data, max_seconds=0.5, training=True)
    starts = set()
    for epoch in range(20):
        training.set_epoch(epoch)
        clip = training[0]["audio"]
        start = int(np.argmin(np.abs(ramp - clip[0])))
        np.testing.assert_array_equal(clip, ramp[start : start + 8000])
        starts.add(start)
    assert len(starts) > 10
    slow = EmotionDataset(data, max_seconds=0.5, training=True, augmenter=Augmenter((0.9, 0.9), probability=1.0))
    assert slow[0]["length"] == 8000
    with pytest.raises(ValueError, match="max_seconds must be at least"):
        EmotionDataset(data, max_seconds=0.001)


def test_modality_dropout_drops_one_of_two(folder):
    rows = clips(folder / "train", 6, speaker="train{}")
    rows[4]["transcription"] = ""
    rows[5]["file_name"] = ""
    write_table(folder / "train" / "metadata.csv", rows)
    data, _ = load_emotion_dataset(folder)
    dataset = EmotionDataset(data["train"], training=True, text_dropout=0.3, audio_dropout=0.2)
    texts, audios = [], []
    for epoch in range(100):
        dataset.set_epoch(epoch)
        both = [dataset[index] for index in range(4)]
        texts += [example["text"] is None for example in both]
        audios += [example["audio"] is None for example in both]
        assert dataset[4]["audio"] is not None and dataset[5]["text"] == "text 5"
    assert 0.22 < np.mean(texts) < 0.38 and 0.13 < np.mean(audios) < 0.27
    assert not np.any(np.logical_and(texts, audios))
    with pytest.raises(ValueError, match="sum to at most 1"):
        EmotionDataset(data["train"], text_dropout=0.6, audio_dropout=0.6)


def test_one_modality_alone(folder, processor):
    data, _ = load_emotion_dataset(folder)
    audio_only, text_only = EmotionDataset(data["test"], use_text=False), EmotionDataset(data["test"], use_audio=False)
    assert audio_only[1]["text"] is None and len(audio_only[1]["audio"]) == audio_only.lengths[1] > 0
    assert text_only[1]["audio"] is None and text_only[1]["text"] == "text 1" and text_only.lengths == [0] * 4
    batch = MMSERDataCollator(processor)([text_only[0], text_only[1]])
    assert not batch["attention_mask"].any() and batch["text_attention_mask"].all()
    with pytest.raises(ValueError, match=r"test/metadata.csv row 2 has no text, and nothing else is used"):
        EmotionDataset(data["test"], use_audio=False, use_text=False)[0]


def test_waveform_and_content_of_a_row(folder):
    data, _ = load_emotion_dataset(folder)
    dataset = EmotionDataset(
        data["train"], training=True, augmenter=Augmenter(probability=1.0), max_seconds=0.06, text_dropout=1.0
    )
    row = data["train"][3]
    waveform = dataset.reader.waveform(row, augmentation_generator(42, 0, 3))
    np.testing.assert_array_equal(waveform, dataset[3]["audio"])
    assert dataset.reader.content(row) == (folder / "train" / "3.wav").read_bytes()
    assert EmotionDataset(data["train"], use_audio=False).reader.content(row) is None
    (folder / "train" / "3.wav").unlink()
    with pytest.raises(ValueError, match=r"csv row 5: audio '\S*3.wav': there is no such file$"):
        dataset.reader.content(row)


def break_files(folder, indices):
    for index in indices:
        (folder / "train" / f"{index}.wav").write_bytes(b"this is not audio")


def test_unreadable_file_is_named(folder):
    break_files(folder, [1])
    write_wav(folder / "train" / "2.wav", 0.01)
    data, _ = load_emotion_dataset(folder)
    dataset = EmotionDataset(data["train"])
    with pytest.raises(ValueError, match=r"^train/metadata.csv row 3: audio '\S*/train/1.wav': cannot be read"):
        dataset[1]
    with pytest.raises(ValueError, match=r"row 3: audio '\S*/train/1.wav': cannot be read"):
        dataset.lengths  # noqa: B018
    with pytest.raises(ValueError, match=r"row 4: \S*/train/2.wav is too short, 160 samples at 16000 Hz"):
        dataset[2]
    with pytest.raises(IndexError):
        dataset[4]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_files_are_skipped_and_counted(folder, processor, num_workers, log):
    break_files(folder, [1, 2, 3])
    data, _ = load_emotion_dataset(folder)
    dataset = EmotionDataset(data["train"], on_bad_example="skip")
    loader = DataLoader(dataset, batch_size=2, num_workers=num_workers, collate_fn=MMSERDataCollator(processor))
    for _ in range(2):
        # the second batch has no good example and takes the next good one, which is row 0 again
        assert [batch["labels"].tolist() for batch in loader] == [[0], [0]]
    assert dataset.num_skipped == 3
    assert dataset.skipped.tolist() == [False, True, True, True]
    assert dataset.lengths == [len(sine(0.05)), 0, 0, 0]
    assert dataset[1] is None
    assert "skipped: train/metadata.csv row 3" in log.text
    break_files(folder, [0])
    with pytest.raises(ValueError, match="none of the 4 examples can be read"):
        next(iter(DataLoader(dataset, batch_size=2, collate_fn=MMSERDataCollator(processor))))


# --------------------------------------------------------------------------------------------------------- batches


def example(audio=True, text="text 1", label=0, seconds=0.05):
    return {"audio": sine(seconds) if audio else None, "text": text, "labels": label, "length": 0}


def test_batch_with_missing_modalities(processor):
    examples = [example(seconds=0.05), example(audio=False), example(text=None, seconds=0.1, label=3), None]
    batch = MMSERDataCollator(processor)(examples)
    assert batch["input_values"].shape == (3, 1600) and batch["input_values"].dtype == torch.float32
    assert batch["attention_mask"].sum(1).tolist() == [800, 0, 1600]
    assert batch["input_ids"].shape == batch["text_attention_mask"].shape == (3, 4)
    assert batch["text_attention_mask"].sum(1).tolist() == [4, 4, 0]
    assert batch["labels"].tolist() == [0, 0, 3] and batch["labels"].dtype == torch.int64


def test_all_batches_have_the_same_keys(processor):
    collator = MMSERDataCollator(processor)
    full = collator([example(), example()])
    no_text = collator([example(text=None), example(text="")])
    no_audio = collator([example(audio=False), example(audio=False)])
    assert set(full) == set(no_text) == set(no_audio)
    assert no_text["input_ids"].shape == (2, 1) and no_text["input_ids"].dtype == full["input_ids"].dtype
    assert not no_text["text_attention_mask"].any() and not no_audio["attention_mask"].any()
    assert no_audio["input_values"].shape == no_audio["attention_mask"].shape == (2, 400)
    assert not no_audio["input_values"].any()
    audio_data = collator([{"audio": sine(), "labels": 1, "length": 1600}])
    assert set(audio_data) == {"input_values", "attention_mask", "labels"}
    text_data = collator([{"text": "text", "labels": 1, "length": 0}])
    assert set(text_data) == {"input_ids", "text_attention_mask", "labels"}
    with pytest.raises(ValueError, match="at least one readable example"):
        collator([None])


def test_log_mel_batches():
    collator = MMSERDataCollator(MMSERProcessor(WhisperFeatureExtractor(feature_size=8), tokenizer()))
    full, no_audio = collator([example(), example()]), collator([example(audio=False)])
    assert full["input_features"].shape[:2] == (2, 8)
    assert set(full) == set(no_audio)
    assert no_audio["input_features"].shape == (1, 8, 2) and no_audio["attention_mask"].shape == (1, 2)


def states(rows, *shape):
    return np.arange(rows * np.prod(shape), dtype=np.float16).reshape(rows, *shape) + 1


def test_states_are_padded_as_they_are(processor):
    collator = MMSERDataCollator(processor)
    rows = [(3, 0), (0, 2), (1, 4)]
    examples = [
        {"audio_states": states(frames, 2, 5), "text_states": states(tokens, 6), "labels": label, "length": 0}
        for label, (frames, tokens) in enumerate(rows)
    ]
    batch = collator([*examples, None])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert batch["text_attention_mask"].tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["attention_mask"].dtype == batch["text_attention_mask"].dtype == torch.int64
    assert batch["audio_states"].dtype == torch.float16 and batch["audio_states"].shape == (3, 3, 2, 5)
    assert batch["text_states"].shape == (3, 4, 6) and batch["labels"].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(batch["audio_states"][0], examples[0]["audio_states"])
    np.testing.assert_array_equal(batch["text_states"][1, :2], examples[1]["text_states"])
    assert not batch["audio_states"][2, 1:].any() and not batch["text_states"][0].any()
    no_audio = collator([examples[1]])
    assert set(no_audio) == set(batch)
    assert no_audio["audio_states"].shape == (1, 1, 2, 5) and not no_audio["attention_mask"].any()


def test_states_beside_raw_text_or_audio(processor):
    collator = MMSERDataCollator(processor)
    texts = [None, "text 1", " "]
    examples = [{"audio_states": states(2, 1, 5), "text": text, "labels": 0, "length": 0} for text in texts]
    batch = collator(examples)
    alone = processor(text=["text 1"])
    assert set(batch) == {"audio_states", "attention_mask", "input_ids", "text_attention_mask", "labels"}
    assert batch["text_attention_mask"].sum(1).tolist() == [0, 4, 0]
    torch.testing.assert_close(batch["input_ids"][1:2], alone["input_ids"])
    assert (batch["input_ids"][[0, 2]] == processor.tokenizer.pad_token_id).all()
    no_text = collator(examples[:1])
    assert set(no_text) == set(batch) and no_text["input_ids"].shape == (1, 1)

    clips = [sine(0.05), None, sine(0.1)]
    batch = collator([{"audio": clip, "text_states": states(2, 6), "labels": 0, "length": 0} for clip in clips])
    assert set(batch) == {"input_values", "attention_mask", "text_states", "text_attention_mask", "labels"}
    assert batch["attention_mask"].sum(1).tolist() == [800, 0, 1600] and batch["text_attention_mask"].all()
    alone = processor(audio=[clips[2]], sampling_rate=RATE)
    torch.testing.assert_close(batch["input_values"][2:], alone["input_values"])


def test_class_counts(folder):
    data, _ = load_emotion_dataset(folder)
    assert class_counts(data["train"], 4) == class_counts(EmotionDataset(data["train"]), 4) == [1, 1, 1, 1]
    assert class_counts(data["train"], 6) == [1, 1, 1, 1, 0, 0]
    with pytest.raises(ValueError, match="label 3 is out of range; allowed: 0 to 2"):
        class_counts(data["train"], 3)


def test_speakers_of_clips_are_the_same_as_in_splits():
    """Spelt in another case "anna" is one speaker; in another corpus she is another."""
    columns = {"speaker": ["Anna", "anna", "anna", ""], "corpus": ["x", "x", "y", "x"], "row": list("0123")}
    table = datasets.Dataset.from_dict({**columns, "text": ["a"] * 4, "labels": [0, 1, 0, 1]})
    assert speakers_of(EmotionDataset(table)) == ["x/anna", "x/anna", "y/anna", "clip 3"]
