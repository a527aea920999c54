# SPDX-License-Identifier: Apache-2.0
"""Tests of `mmser corpus`: miniature trees with the names that the authors of each corpus give their files.

What a name means is written here by hand, from the documentation of the corpora, and not taken from the entries.
"""
# ruff: noqa: RUF001  (words in Turkish, Persian and Chinese have letters that look like others)

import csv
import io
import json
import os
import re
import runpy
import shlex
import shutil
import struct
import sys
import unicodedata
import wave
import zlib
from collections import defaultdict
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest

from configuration_mmser import DEFAULT_LABELS
from mmser import corpus_command, corpus_conversion
from mmser.arguments import TRAINING_ARGUMENTS, parse_arguments
from mmser.corpus_tables import read_esd, read_shemo
from mmser.known_corpora import CORPORA, TUREV_WORDS, describe_corpus, table_of_known_corpora
from mmser.loading import load_emotion_dataset, load_emotion_split

ROOT = Path(__file__).parents[1]
SPLITS = ("train", "validation", "test")
MISFIT = "notes.wav"


# ------------------------------------------------------------------------------------------------ the miniature trees


def _silence():
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(bytes(3200))  # 0.1 s
    return buffer.getvalue()


SILENCE = _silence()


def write_clips(folder, names):
    """Clips of 0.1 s that differ in their first samples: the same audio in two splits would be refused."""
    for path in (folder / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(SILENCE[:44] + struct.pack("<I", zlib.crc32(str(path).encode())) + SILENCE[48:])


def write_text(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)


def ravdess(folder):
    names = [
        f"Actor_{actor:02}/03-01-{emotion:02}-01-{2 - actor % 2:02}-01-{actor:02}.wav"
        for actor in range(1, 8)
        for emotion in range(1, 9)
    ]
    others = [
        "Actor_01/03-02-03-01-01-01-01.wav",
        "Actor_01/01-01-03-01-01-01-01.mp4",
        "Actor_01/03-01-09-01-01-01-01.wav",
    ]
    write_clips(folder, [*names, "speech/Actor_01/03-01-03-01-01-01-01.wav", *others])  # one of them twice


def emodb(folder):
    speakers = ("03", "08", "09", "10", "11", "12", "13", "14", "15", "16")
    write_clips(folder, [f"wav/{speaker}a01{emotion}a.wav" for speaker in speakers for emotion in "WLEAFTN"])
    write_clips(folder, ["wav/03b10Nc.wav"])


def crema_d(folder):
    emotions = ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD")
    names = [f"{speaker}_ITS_{emotion}_XX" for speaker in range(1001, 1009) for emotion in emotions]
    write_clips(folder, [f"AudioMP3/{name}.mp3" for name in names[:2]])
    write_clips(folder, [f"AudioWAV/{name}.wav" for name in [*names, "1040_ITH_SAD_X", "1091_WSI_HAP_HI"]])


def tess(folder):
    emotions = ("angry", "disgust", "fear", "happy", "neutral", "ps", "sad")
    names = [f"{who}_{emotion}/{who}_back_{emotion}.wav" for who in ("OAF", "YAF") for emotion in emotions]
    write_clips(folder, [*names, "OAF_neutral/OA_bite_neutral.wav"])


def savee(folder):
    codes = ("a", "d", "f", "h", "n", "sa", "su")
    names = [f"AudioData/{who}/{code}01.wav" for who in ("DC", "JE", "JK") for code in codes]
    write_clips(folder, [*names, *(f"ALL/KL_{code}15.wav" for code in codes)])


def iemocap(folder):
    emotions = ("neu", "hap", "sad", "ang", "exc", "xxx")
    for session in range(1, 6):
        dialogue = f"Ses0{session}F_impro01"
        top = folder / f"Session{session}"
        turns = [(f"{dialogue}_{who}00{number}", emotions[number]) for who in "FM" for number in range(6)]
        clips = [f"sentences/wav/{dialogue}/{turn}.wav" for turn, _ in turns]
        write_clips(top, [*clips, f"dialog/wav/{dialogue}.wav"])
        labels = "".join(
            f"[6.2901 - 8.2357]\t{turn}\t{emotion}\t[2.5000, 3.0000, 3.5000]\nC-E2:\tNeutral;\t()\n"
            for turn, emotion in turns
        )
        write_text(
            top / f"dialog/EmoEvaluation/{dialogue}.txt", f"% [START_TIME - END_TIME] TURN_NAME EMOTION\n\n{labels}"
        )
        write_text(top / f"dialog/EmoEvaluation/Categorical/{dialogue}_e2_cat.txt", f"{turns[0][0]} :Anger; ()\n")
        words = "".join(f"{turn} [006.2901-008.2357]: Excuse me, {emotion}.\nM: Oh\n" for turn, emotion in turns)
        write_text(top / f"dialog/transcriptions/{dialogue}.txt", words)
    write_clips(folder, ["Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_FXX0.wav"])
    labels = folder / "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt"
    lost = "[9.1 - 9.9]\tSes01F_impro01_F099\tneu\t[2.5000, 2.5000, 2.5000]\n"
    labels.write_text(labels.read_text(encoding="utf-8") + lost, encoding="utf-8")


def meld(folder):
    emotions = ("neutral", "joy", "sadness", "anger", "fear")
    places = {"train": "train/train_splits", "dev": "dev_splits_complete", "test": "test/output_repeated_splits_test"}
    for split, place in places.items():
        rows = [
            {
                "Sr No.": index,
                "Utterance": f"Oh my God, he\x92s {emotion}, {split}.",
                "Speaker": ("Ross", "Phoebe")[index % 2],
                "Emotion": emotion,
                "Sentiment": "neutral",
                "Dialogue_ID": 0,
                "Utterance_ID": index,
            }
            for index, emotion in enumerate(emotions)
        ]
        write_clips(folder / place, [f"dia0_utt{index}.mp4" for index in range(5)])
        rows.append({**rows[0], "Utterance_ID": 7, "Utterance": "This one has no file."})
        path = folder / f"{split}_sent_emo.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    write_clips(folder, ["dev_splits_complete/dia9_utt9.mp4", "test/output_repeated_splits_test/._dia0_utt0.mp4"])
    write_clips(folder, ["test/output_repeated_splits_test/final_videos_testdia0_utt0.mp4"])


def nemo(folder):
    emotions = ("anger", "fear", "happiness", "neutral", "sadness", "surprised")
    names = [f"{speaker}_{emotion}_38" for speaker in ("EB0", "KS0", "MP0", "IC0") for emotion in emotions]
    write_clips(folder, [f"samples/{name}.wav" for name in names])
    rows = "".join(
        f"{name}.wav\t{name.split('_')[1]}\t„Ród smoka” to serial telewizyjny.\tród smoka\t        {name[:3]}\t"
        f"{'female' if name[:3] in ('EB0', 'IC0') else 'male'}\t23\n"
        for name in names
    )
    write_text(folder / "data.tsv", f"file_id\temotion\traw_text\tnormalized_text\tspeaker_id\tgender\tage\n{rows}")


def urdu(folder):
    names = [
        f"{emotion}/{speaker}_F1_{emotion[0]}0{number}.wav"
        for number, speaker in enumerate(("SM1", "SM2", "SF3", "SF4", "SM17"), 1)
        for emotion in ("Angry", "Happy", "Neutral", "Sad")
    ]
    write_clips(folder, [*names, "Sad/SM6_F4_S0100.wav"])


def emovo(folder):
    emotions = ("dis", "gio", "neu", "pau", "rab", "sor", "tri")
    write_clips(folder, [f"{who}/{emotion}-{who}-l3.wav" for who in ("f1", "f2", "m1", "m2") for emotion in emotions])


def cafe(folder):
    names = [
        # Folders as macOS writes them
        unicodedata.normalize("NFD", f"Colère/Faible/{actor:02}-{emotion}-{0 if emotion == 'N' else 1}-2.wav")
        for actor in range(1, 13)
        for emotion in "CDJNPST"
    ]
    write_clips(folder, names)


def aesdd(folder):
    words = {"a": "anger", "d": "disgust", "f": "fear", "h": "happiness", "s": "sadness"}
    names = [f"{word}/{code}03 ({speaker}).wav" for code, word in words.items() for speaker in range(1, 6)]
    write_clips(folder, [*names, "fear/f12 (01).wav"])


def esd(folder):
    words = ("Neutral", "Angry", "Happy", "Sad", "Surprise")
    for speaker in (1, 2, 11, 12, 13):
        first = f"{speaker:04}"
        numbers = [350 * block + 20 for block in range(5)]
        places = [f"{first}/{word}/{first}_{number:06}.wav" for word, number in zip(words, numbers, strict=True)]
        write_clips(folder, places)
        sentence = "打远一看，它们的确很是美丽，" if speaker < 11 else "The nine the eggs, I keep."
        lines = "".join(
            f"{first}_{number:06}\t{sentence}\t{word}\n" for word, number in zip(words, numbers, strict=True)
        )
        write_text(
            folder / first / f"{first}.txt", lines, {1: "gb18030", 2: "utf-16", 11: "utf-8"}.get(speaker, "utf-16")
        )
    write_clips(folder, ["0013/Happy/0013_000005.wav", "0011/Angry/train/0011_000351.wav"])


def shemo(folder):
    names = [f"{speaker}{emotion}01" for speaker in ("F01", "F21", "M05", "M28", "M47") for emotion in "AFHNSW"]
    write_clips(folder, [f"{'female' if name[0] == 'F' else 'male'}/{name}.wav" for name in names])
    entries = [{"id": name, "emotion": "angry", "transcript": "\ufeffفرانسه؟"} for name in names]
    write_text(folder / "shemo.json", json.dumps(entries))


def turev(folder):
    folders = {"kz": "Angry", "sk": "Calm", "mt": "Happy", "hl": "Sad"}
    names = [
        f"Sound Source/{word}/{speaker}_{code}_isirgan.wav"
        for speaker in (1157, 1234, 1358, 1984)
        for code, word in folders.items()
    ]
    write_clips(folder, [*names, "Sound Source/Sad/1984_hl_pas.wav"])


def ased(folder):
    folders = {"n1": "01Neutral", "f2": "02Fearful", "h3": "03Happy", "s4": "04Sad", "a5": "05Angry"}
    names = [
        f"{place}/{code}-01-01-{1 + speaker % 2:02}-{speaker:02}.wav"
        for speaker in (3, 4, 50, 51)
        for code, place in folders.items()
    ]
    write_clips(folder, [*names, "04Sad/S4-04-02-01-29.wav"])


TREES = {
    "ravdess": ravdess,
    "emodb": emodb,
    "crema-d": crema_d,
    "tess": tess,
    "savee": savee,
    "iemocap": iemocap,
    "meld": meld,
    "nemo": nemo,
    "urdu": urdu,
    "emovo": emovo,
    "cafe": cafe,
    "aesdd": aesdd,
    "esd": esd,
    "shemo": shemo,
    "turev": turev,
    "ased": ased,
}

# File -> emotion, label, transcription, speaker, sex, language
KIDS, DOGS = "Kids are talking by the door.", "Dogs are sitting by the door."
EXPECTED = {
    "ravdess": {
        "Actor_01/03-01-01-01-01-01-01.wav": ("neutral", "neutral", KIDS, "01", "male", "en"),
        "Actor_02/03-01-02-01-02-01-02.wav": ("calm", "unknown", DOGS, "02", "female", "en"),
        "Actor_02/03-01-03-01-02-01-02.wav": ("happy", "happy", DOGS, "02", "female", "en"),
        "Actor_03/03-01-04-01-01-01-03.wav": ("sad", "sad", KIDS, "03", "male", "en"),
        "Actor_03/03-01-05-01-01-01-03.wav": ("angry", "angry", KIDS, "03", "male", "en"),
        "Actor_03/03-01-06-01-01-01-03.wav": ("fearful", "unknown", KIDS, "03", "male", "en"),
    },
    "emodb": {
        "wav/03a01Wa.wav": ("anger", "angry", "Der Lappen liegt auf dem Eisschrank.", "03", "male", "de"),
        "wav/08a01La.wav": ("boredom", "unknown", "Der Lappen liegt auf dem Eisschrank.", "08", "female", "de"),
        "wav/16a01Aa.wav": ("fear", "unknown", "Der Lappen liegt auf dem Eisschrank.", "16", "female", "de"),
        "wav/10a01Fa.wav": ("happiness", "happy", "Der Lappen liegt auf dem Eisschrank.", "10", "male", "de"),
        "wav/11a01Ta.wav": ("sadness", "sad", "Der Lappen liegt auf dem Eisschrank.", "11", "male", "de"),
        "wav/03b10Nc.wav": (
            *("neutral", "neutral", "Die wird auf dem Platz sein, wo wir sie immer hinlegen.", "03", "male", "de"),
        ),
    },
    "crema-d": {
        "AudioWAV/1001_ITS_ANG_XX.wav": ("anger", "angry", "I think I've seen this before.", "1001", "male", "en"),
        "AudioWAV/1002_ITS_FEA_XX.wav": ("fear", "unknown", "I think I've seen this before.", "1002", "female", "en"),
        "AudioWAV/1040_ITH_SAD_X.wav": ("sad", "sad", "I think I have a doctor's appointment.", "1040", "male", "en"),
        "AudioWAV/1091_WSI_HAP_HI.wav": (
            "happy",
            "happy",
            "We'll stop in a couple of minutes.",
            "1091",
            "female",
            "en",
        ),
    },
    "tess": {
        "OAF_ps/OAF_back_ps.wav": ("pleasant surprise", "unknown", "Say the word back.", "OAF", "female", "en"),
        "YAF_angry/YAF_back_angry.wav": ("angry", "angry", "Say the word back.", "YAF", "female", "en"),
        "OAF_neutral/OA_bite_neutral.wav": ("neutral", "neutral", "Say the word bite.", "OAF", "female", "en"),
    },
    "savee": {
        "AudioData/DC/a01.wav": ("anger", "angry", "", "DC", "male", "en"),
        "AudioData/JE/sa01.wav": ("sadness", "sad", "", "JE", "male", "en"),
        "AudioData/JK/su01.wav": ("surprise", "unknown", "", "JK", "male", "en"),
        "ALL/KL_h15.wav": ("happiness", "happy", "", "KL", "male", "en"),
    },
    "iemocap": {
        "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav": (
            *("neutral", "neutral", "Excuse me, neu.", "Ses01F", "female", "en"),
        ),
        "Session3/sentences/wav/Ses03F_impro01/Ses03F_impro01_M001.wav": (
            *("happiness", "happy", "Excuse me, hap.", "Ses03M", "male", "en"),
        ),
        "Session5/sentences/wav/Ses05F_impro01/Ses05F_impro01_M004.wav": (
            *("excitement", "unknown", "Excuse me, exc.", "Ses05M", "male", "en"),
        ),
    },
    "meld": {
        "train/train_splits/dia0_utt1.mp4": ("joy", "happy", "Oh my God, he’s joy, train.", "Phoebe", "", "en"),
        "dev_splits_complete/dia0_utt2.mp4": ("sadness", "sad", "Oh my God, he’s sadness, dev.", "Ross", "", "en"),
        "test/output_repeated_splits_test/dia0_utt4.mp4": (
            *("fear", "unknown", "Oh my God, he’s fear, test.", "Ross", "", "en"),
        ),
    },
    "nemo": {
        "samples/EB0_happiness_38.wav": (
            *("happiness", "happy", "„Ród smoka” to serial telewizyjny.", "EB0", "female", "pl"),
        ),
        "samples/KS0_surprised_38.wav": (
            *("surprised", "unknown", "„Ród smoka” to serial telewizyjny.", "KS0", "male", "pl"),
        ),
    },
    "urdu": {
        "Angry/SM1_F1_A01.wav": ("angry", "angry", "", "SM1", "male", "ur"),
        "Happy/SF3_F1_H03.wav": ("happy", "happy", "", "SF3", "female", "ur"),
        "Sad/SM6_F4_S0100.wav": ("sad", "sad", "", "SM6", "male", "ur"),
    },
    "emovo": {
        "f1/gio-f1-l3.wav": (
            "joy",
            "happy",
            "Un attimo dopo s'è incamminato... ed è inciampato.",
            "f1",
            "female",
            "it",
        ),
        "m2/pau-m2-l3.wav": (
            "fear",
            "unknown",
            "Un attimo dopo s'è incamminato... ed è inciampato.",
            "m2",
            "male",
            "it",
        ),
    },
    "cafe": {
        "Colère/Faible/01-C-1-2.wav": ("anger", "angry", "Deux ânes aigris au pelage brun.", "01", "male", "fr"),
        "Colère/Faible/12-N-0-2.wav": ("neutral", "neutral", "Deux ânes aigris au pelage brun.", "12", "female", "fr"),
        "Colère/Faible/12-P-1-2.wav": ("fear", "unknown", "Deux ânes aigris au pelage brun.", "12", "female", "fr"),
    },
    "aesdd": {
        "anger/a03 (1).wav": ("anger", "angry", "", "1", "", "el"),
        "fear/f12 (01).wav": ("fear", "unknown", "", "1", "", "el"),
        "happiness/h03 (5).wav": ("happiness", "happy", "", "5", "", "el"),
    },
    "esd": {
        "0001/Neutral/0001_000020.wav": ("neutral", "neutral", "打远一看，它们的确很是美丽，", "0001", "female", "zh"),
        "0011/Angry/0011_000370.wav": ("angry", "angry", "The nine the eggs, I keep.", "0011", "male", "en"),
        "0011/Angry/train/0011_000351.wav": ("angry", "angry", "", "0011", "male", "en"),
        "0002/Surprise/0002_001420.wav": (
            "surprise",
            "unknown",
            "打远一看，它们的确很是美丽，",
            "0002",
            "female",
            "zh",
        ),
    },
    "shemo": {
        "female/F01A01.wav": ("anger", "angry", "فرانسه؟", "F01", "female", "fa"),
        "male/M28W01.wav": ("surprise", "unknown", "فرانسه؟", "M28", "male", "fa"),
    },
    "turev": {
        "Sound Source/Calm/1157_sk_isirgan.wav": ("calm", "neutral", "ısırgan", "1157", "", "tr"),
        "Sound Source/Sad/1984_hl_pas.wav": ("sad", "sad", "pas", "1984", "", "tr"),
    },
    "ased": {
        "02Fearful/f2-01-01-01-50.wav": ("fear", "unknown", "", "50", "female", "am"),
        "05Angry/a5-01-01-02-03.wav": ("angry", "angry", "", "03", "male", "am"),
        "04Sad/S4-04-02-01-29.wav": ("sad", "sad", "", "29", "female", "am"),
    },
}
LEFT_OUT = {  # beside the misfit that each tree has
    "ravdess": {
        "Actor_01/03-02-03-01-01-01-01.wav": "song",
        "Actor_01/01-01-03-01-01-01-01.mp4": "video",
        "Actor_01/03-01-09-01-01-01-01.wav": "the name is not as in RAVDESS",
        "speech/Actor_01/03-01-03-01-01-01-01.wav": "the same clip as Actor_01/03-01-03-01-01-01-01.wav",
    },
    "crema-d": {
        "AudioMP3/1001_ITS_ANG_XX.mp3": "the same clip as AudioWAV/1001_ITS_ANG_XX.wav",
        "AudioMP3/1001_ITS_DIS_XX.mp3": "the same clip as AudioWAV/1001_ITS_DIS_XX.wav",
    },
    "iemocap": {
        **{f"Session{number}/dialog/wav/Ses0{number}F_impro01.wav": "a whole dialogue" for number in range(1, 6)},
        **{
            f"Session{number}/sentences/wav/Ses0{number}F_impro01/Ses0{number}F_impro01_{who}005.wav": "no agreement"
            for number in range(1, 6)
            for who in "FM"
        },
        "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_FXX0.wav": "no row in dialog/EmoEvaluation/",
        "Ses01F_impro01_F099": "without a file",
    },
    "meld": {
        "train/dia0_utt7": "without a file",
        "validation/dia0_utt7": "without a file",
        "test/dia0_utt7": "without a file",
        "dev_splits_complete/dia9_utt9.mp4": "no row in train_sent_emo.csv",
        "test/output_repeated_splits_test/final_videos_testdia0_utt0.mp4": "a spare clip",
    },
    "esd": {"0013/Happy/0013_000005.wav": "it lies in the folder Happy, but has a number of neutral"},
}


def read_table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_result(folder):
    """All rows of all tables, by split."""
    return {path.parent.name: read_table(path) for path in sorted(folder.glob("*/metadata.csv"))}


def run(name, tree, output, *flags):
    assert corpus_command.main([name, "--input", str(tree), "--output", str(output), *flags]) == 0
    return read_result(output)


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """One tree of each corpus, each with a file that fits no name."""
    top = tmp_path_factory.mktemp("corpora")
    for name, write in TREES.items():
        write(top / name)
        (top / name / MISFIT).write_bytes(SILENCE)
    return top


@pytest.fixture(scope="module")
def results(trees, tmp_path_factory):
    """What the command makes of each tree."""
    top = tmp_path_factory.mktemp("results")
    for name in TREES:
        run(name, trees / name, top / name)
    return top


def test_a_conversion_that_fails_leaves_no_folder(trees, tmp_path, monkeypatch):
    """Half of the splits would be taken for a corpus without the others."""
    original, written = corpus_conversion._write_table, []

    def fail(path, *args):
        if written:
            raise OSError(28, "No space left on device", str(path))
        original(path, *args)
        written.append(path)

    monkeypatch.setattr(corpus_conversion, "_write_table", fail)
    with pytest.raises(OSError, match="No space left on device"):
        run("ravdess", trees / "ravdess", tmp_path / "out", "--copy")
    assert written and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- the entries


def test_every_corpus_has_a_tree_and_a_description():
    assert list(TREES) == list(CORPORA) == list(EXPECTED)
    for corpus in CORPORA.values():
        text = describe_corpus(corpus)
        for said in (corpus.made_by, corpus.paper, corpus.licence, corpus.download):
            assert said and said in text
        assert re.search(r"(19|20)\d\d", corpus.paper) and corpus.download.startswith("http")


def test_calm_is_never_happy_and_fear_never_sad():
    targets = {(name, emotion): corpus.targets.get(emotion, "other")
               for name, corpus in CORPORA.items() for emotion in corpus.emotions.values()}  # fmt: skip
    assert set(targets.values()) == {*DEFAULT_LABELS, "other", ""}
    assert {target for (_, emotion), target in targets.items() if "calm" in emotion} == {"other", "neutral"}
    for word in ("fear", "surprise", "disgust", "boredom", "excite", "frustr"):
        found = {target for (_, emotion), target in targets.items() if word in emotion}
        assert found == {"other"}, word


def test_no_name_is_that_of_two_corpora():
    """`such as` in an error, and the hint at another corpus, would be wrong."""
    for name, corpus in CORPORA.items():
        for example in corpus.example.split(" or "):
            knows = [other for other, entry in CORPORA.items() if entry.recognise(PurePosixPath("x") / example)]
            assert knows == [name], example


def test_a_word_of_turev_is_its_file_in_turkish_letters():
    assert len(TUREV_WORDS) == 82
    assert all(re.fullmatch("[a-z]+", name) for name in TUREV_WORDS)
    assert TUREV_WORDS["yigilmak"] == "yığılmak"


def test_the_table_in_the_docs_is_that_of_the_entries(capsys):
    assert table_of_known_corpora() in (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    assert corpus_command.main(["--list"]) == 0
    assert capsys.readouterr().out.strip() == table_of_known_corpora()


# ------------------------------------------------------------------------------------------- names, rows, left out


@pytest.mark.parametrize("name", TREES)
def test_rows_are_as_written_by_hand(name, trees, results):
    tree = trees / name
    rows = {row["file_name"]: row for split in read_result(results / name).values() for row in split}
    for file, expected in EXPECTED[name].items():
        path = next(path for path in (tree / file, tree / unicodedata.normalize("NFD", file)) if path.exists())
        row = rows[str(path)]
        columns = ("emotion", "label", "transcription", "speaker", "sex", "language")
        assert tuple(row[column] for column in columns) == expected, file
        assert row["corpus"] == CORPORA[name].name


@pytest.mark.parametrize("name", TREES)
def test_every_file_is_in_one_table_or_left_out_with_its_reason(name, trees, results):
    tree = trees / name
    listed = [row["file_name"] for split in read_result(results / name).values() for row in split]
    left_out = {row["file_name"]: row["reason"] for row in read_table(results / name / "left_out.csv")}
    assert len(set(listed)) == len(listed)
    expected = {**LEFT_OUT.get(name, {}), MISFIT: f"the name is not as in {CORPORA[name].name}, such as"}
    assert left_out.keys() == expected.keys()
    for file, reason in expected.items():
        assert reason in left_out[file]
    audio = {
        path.relative_to(tree).as_posix()
        for path in tree.rglob("*")
        if path.suffix in (".wav", ".mp3", ".mp4") and not path.name.startswith(".")
    }
    in_tables = {Path(file).relative_to(tree).as_posix() for file in listed}
    without_file = {file for file in left_out if not (tree / file).exists()}
    assert in_tables | (left_out.keys() - without_file) == audio and not in_tables & left_out.keys()
    assert {left_out[file] for file in without_file} <= {"a row of the corpus's tables without a file"}


def test_more_columns(results):
    rows = {Path(row["file_name"]).stem: row for rows in read_result(results / "iemocap").values() for row in rows}
    row = rows["Ses01F_impro01_F000"]
    assert (row["valence"], row["activation"], row["dominance"]) == ("2.5000", "3.0000", "3.5000")
    assert {row["sentiment"] for rows in read_result(results / "meld").values() for row in rows} == {"neutral"}


def test_empty_files_are_left_out(trees, tmp_path):
    tree = shutil.copytree(trees / "emodb", tmp_path / "emodb")
    (tree / "wav" / "03a01Wa.wav").write_bytes(b"")
    run("emodb", tree, tmp_path / "out")
    assert {"file_name": "wav/03a01Wa.wav", "reason": "an empty file"} in read_table(tmp_path / "out" / "left_out.csv")


def test_names_of_windows_and_of_macos():
    windows = CORPORA["savee"].recognise(
        PureWindowsPath(r"C:\Users\Jörg\SAVEE\AudioData\JE\SA01.wav".replace("SA", "sa"))
    )
    assert (windows["speaker"], windows["emotion"], windows["number"]) == ("JE", "sa", "01")
    path = PureWindowsPath(r"D:\MELD.Raw\dev_splits_complete\dia3_utt12.MP4")
    assert CORPORA["meld"].recognise(path)["utterance"] == "12"
    folder = unicodedata.normalize("NFD", "Tristesse/Modéré")
    assert CORPORA["cafe"].recognise(PurePosixPath(folder) / "02-T-2-6.aiff")["speaker"] == "02"
    assert CORPORA["cafe"].recognise(PurePosixPath("02-T-2-7.wav")) is None


def test_the_folder_itself_may_tell_something(trees, tmp_path):
    """A part of a corpus: one speaker of SAVEE, whose name is that of the folder."""
    result = run("savee", trees / "savee" / "AudioData" / "DC", tmp_path / "out")
    assert list(result) == ["ood_train", "train"]
    assert {row["speaker"] for rows in result.values() for row in rows} == {"DC"}


def test_links_to_folders_are_followed_once(trees, tmp_path):
    (tmp_path / "emodb").mkdir()
    (tmp_path / "emodb" / "wav").symlink_to(trees / "emodb" / "wav", target_is_directory=True)
    (tmp_path / "emodb" / "again").symlink_to(tmp_path / "emodb", target_is_directory=True)
    result = run("emodb", tmp_path / "emodb", tmp_path / "out")
    assert sum(map(len, result.values())) == 71
    assert not (tmp_path / "out" / "left_out.csv").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_no_table_can_hold_is_an_error(tmp_path):
    broken = tmp_path / os.fsdecode(b"Col\x82re")
    write_clips(tmp_path, ["cafe/01-C-1-1.wav"])
    shutil.copytree(tmp_path / "cafe", broken / "cafe")
    with pytest.raises(ValueError, match=r"Col\\udc82re/cafe/01-C-1-1.wav' is not in UTF-8: rename its folder"):
        run("cafe", tmp_path, tmp_path.parent / "out")


# ------------------------------------------------------------------------------------------------------ tables


def test_lines_of_esd_without_tabs_and_in_its_encodings(tmp_path):
    write_text(tmp_path / "0016.txt", "0016_000001\tIt\x92s caf\xe9.\tNeutral\n", "latin-1")
    write_text(tmp_path / "0012.txt", "0012_001355 The fisherman and his wife see George every day. Sad\n\n", "utf-16")
    write_text(tmp_path / "0003.txt", "0003_000351\t两片小嫩叶\t生气\n", "gb18030")
    words = {key: row["transcription"] for key, row in read_esd(sorted(tmp_path.iterdir())).items()}
    assert words == {
        "0016_000001": "It’s café.",
        "0012_001355": "The fisherman and his wife see George every day.",
        "0003_000351": "两片小嫩叶",
    }


def test_the_newer_table_of_shemo_and_a_broken_one(tmp_path):
    path = tmp_path / "shemo.json"
    write_text(path, json.dumps({"F01A01": {"speaker_id": "F01", "transcript": "کی این حرفو زده؟"}}))
    assert read_shemo([path]) == {"F01A01": {"transcription": "کی این حرفو زده؟"}}
    write_text(path, '{"F01A01": {}}')
    with pytest.raises(ValueError, match=r"shemo\.json is not the table of ShEMO"):
        read_shemo([path])


# ------------------------------------------------------------------------------------------------------ splits


@pytest.mark.parametrize("name", TREES)
def test_no_speaker_is_in_two_splits(name, results):
    rows = read_result(results / name)
    assert set(rows) >= ({"train", "validation"} if name == "tess" else set(SPLITS))
    speakers = {split: {row["speaker"] for row in own} for split, own in rows.items()}
    if name == "meld":
        assert speakers["train"] == speakers["validation"] == speakers["test"] == {"Ross", "Phoebe"}
        return
    where = defaultdict(set)
    for split in SPLITS:
        for speaker in speakers.get(split, ()):
            where[speaker].add(split)
    assert where and all(len(splits) == 1 for splits in where.values())
    assert not speakers.get("ood", set()) & speakers["train"]
    assert speakers.get("ood_train", set()) <= speakers["train"]
    if CORPORA[name].open_set:
        assert speakers["ood"] and speakers["ood_train"]


def test_the_languages_of_esd_are_in_each_split(tmp_path):
    words = ("Neutral", "Angry", "Happy", "Sad", "Surprise")
    write_clips(
        tmp_path / "esd",
        [f"{who:04}/{word}/{who:04}_{350 * n + 1:06}.wav" for who in range(1, 21) for n, word in enumerate(words)],
    )
    for rows in run("esd", tmp_path / "esd", tmp_path / "out").values():
        assert {row["language"] for row in rows} == {"zh", "en"} and {row["sex"] for row in rows} == {"female", "male"}


def test_splits_have_both_sexes_and_all_classes(results):
    for split in ("validation", "test"):
        rows = read_table(results / "cafe" / split / "metadata.csv")
        assert {row["label"] for row in rows} == set(DEFAULT_LABELS)
        assert {row["sex"] for row in rows} == {"female", "male"} and len({row["speaker"] for row in rows}) == 2


def test_splits_do_not_depend_on_the_order_of_files_and_the_seed_changes_them(trees, results, tmp_path):
    def by_speaker(rows):
        return {row["speaker"]: split for split, own in rows.items() if split in SPLITS for row in own}

    tree = tmp_path / "turned"
    for path in sorted((trees / "cafe").rglob("*.wav"), reverse=True):
        target = tree / path.stem[3] / path.name  # other folders, so another order
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    first = by_speaker(read_result(results / "cafe"))
    assert by_speaker(run("cafe", tree, tmp_path / "again")) == first
    assert by_speaker(run("cafe", tree, tmp_path / "other", "--seed", "1")) != first


def test_the_sessions_of_iemocap_are_folds(trees, results, tmp_path):
    def sessions(rows):
        return {split: {row["speaker"][:5] for row in rows[split]} for split in SPLITS}

    expected = {"train": {"Ses01", "Ses02", "Ses03"}, "validation": {"Ses04"}, "test": {"Ses05"}}
    assert sessions(read_result(results / "iemocap")) == expected
    expected = {"train": {"Ses02", "Ses03", "Ses04"}, "validation": {"Ses05"}, "test": {"Ses01"}}
    assert sessions(run("iemocap", trees / "iemocap", tmp_path / "out", "--fold", "1")) == expected


def test_meld_keeps_its_splits(trees, results):
    for split, rows in read_result(results / "meld").items():
        folder = {"train": "train_splits", "ood_train": "train_splits", "validation": "dev_splits_complete",
                  "test": "output_repeated_splits_test"}  # fmt: skip
        if split != "ood":
            assert {Path(row["file_name"]).parent.name for row in rows} == {folder[split]}
            assert {Path(row["file_name"]).is_relative_to(trees) for row in rows} == {True}


# ---------------------------------------------------------------------------------------------------- the result


@pytest.mark.parametrize("name", TREES)
def test_the_result_loads_with_the_four_classes(name, results):
    folder = results / name
    shared = name == "meld"
    splits, labels = load_emotion_dataset(folder, allow_speaker_overlap=shared, allow_outside_files=True)
    assert labels == [label for label in DEFAULT_LABELS if not (name == "aesdd" and label == "neutral")]
    written = read_result(folder)
    assert {split: len(rows) for split, rows in written.items() if split in SPLITS} == {
        split: len(table) for split, table in splits.items()
    }
    row = written["train"][0]
    read = splits["train"][0]
    assert (read["audio"], labels[read["labels"]]) == (row["file_name"], row["label"])
    assert (read["speaker"], read["language"], read["corpus"]) == (row["speaker"], row["language"], row["corpus"])
    if row["transcription"]:
        assert read["text"] == row["transcription"]
    if "ood" in written:
        unknown = load_emotion_split(folder / "ood", label_names=labels, allow_outside_files=True)
        assert len(unknown) == len(written["ood"]) and set(unknown["labels"]) == {-1}
    if shared:
        with pytest.raises(ValueError, match="more than one split"):
            load_emotion_dataset(folder, allow_outside_files=True)


def test_all_emotions_as_classes(trees, tmp_path):
    result = run("emodb", trees / "emodb", tmp_path / "out", "--labels", "all")
    assert list(result) == ["test", "train", "validation"]
    splits, labels = load_emotion_dataset(tmp_path / "out", allow_outside_files=True)
    assert labels == ["neutral", "anger", "boredom", "disgust", "fear", "happiness", "sadness"]
    assert sum(map(len, splits.values())) == 71


def test_emotions_can_be_mapped(trees, tmp_path):
    def labels(rows, emotion):
        return {row["label"] for own in rows.values() for row in own if row["emotion"] == emotion}

    result = run("iemocap", trees / "iemocap", tmp_path / "merged", "--map", "excitement=happy")
    assert labels(result, "excitement") == {"happy"} and "ood" not in result
    result = run("ravdess", trees / "ravdess", tmp_path / "ravdess", "--map", "calm=neutral", "fearful=")
    assert labels(result, "calm") == {"neutral"} and labels(result, "fearful") == set()
    reasons = [row["reason"] for row in read_table(tmp_path / "ravdess" / "left_out.csv")]
    assert reasons.count("the emotion is 'fearful', which is left out") == 7
    result = run("turev", trees / "turev", tmp_path / "turev", "--map", "calm=other")
    assert labels(result, "calm") == {"unknown"}


def test_a_copy_can_be_moved_and_read_with_other_slashes(trees, tmp_path):
    result = run("cafe", trees / "cafe", tmp_path / "copy", "--copy")
    moved = shutil.move(tmp_path / "copy", tmp_path / "moved")
    for split, rows in result.items():
        for row in rows:
            assert "\\" not in row["file_name"] and not Path(row["file_name"]).is_absolute()
            copied = moved / split / row["file_name"]
            assert copied.read_bytes() == (trees / "cafe" / row["file_name"]).read_bytes()
        table = moved / split / "metadata.csv"
        text = unicodedata.normalize("NFC", table.read_text(encoding="utf-8"))
        table.write_text(re.sub(r"^([^,]+)/([^,]+)/", r"\1\\\2\\", text, flags=re.M), encoding="utf-8")
    splits, _ = load_emotion_dataset(moved)
    assert all(Path(clip["audio"]).is_file() for split in splits.values() for clip in split)


def test_videos_are_copied_as_they_are(trees, tmp_path):
    result = run("meld", trees / "meld", tmp_path / "copy", "--copy")
    assert {Path(row["file_name"]).suffix for rows in result.values() for row in rows} == {".mp4"}
    assert len(list((tmp_path / "copy").rglob("*.mp4"))) == 15  # two splits have files of the same names in `ood`


def test_the_console_and_the_readme_tell_what_was_made(trees, tmp_path, capsys):
    output = tmp_path / "with spaces"
    run("ravdess", trees / "ravdess", output)
    said = capsys.readouterr().out
    assert "RAVDESS: 56 clips by 7 speakers" in said and "CC BY-NC-SA 4.0" in said
    assert "Left out 5, listed in" in said and "  1 x song, not speech" in said
    assert re.search(r"\| train +\| +4 \| +4 \| +4 \| +4 \| +0 \| +4 \|", said)
    readme = (output / "README.md").read_text(encoding="utf-8")
    assert describe_corpus(CORPORA["ravdess"]) in readme and "No speaker is in two splits" in readme
    (command,) = re.findall(r"python train_hf\.py (.*)", said)
    _, data, _ = parse_arguments(TRAINING_ARGUMENTS, shlex.split(command))
    assert data.data_dir == str(output) and data.ood_dir == str(output / "ood") and command in readme
    (tmp_path / "without").mkdir()
    shutil.copytree(trees / "nemo" / "samples", tmp_path / "without" / "samples")
    run("nemo", tmp_path / "without", tmp_path / "nemo")
    assert "There are no transcripts: they are in data.tsv" in capsys.readouterr().out
    run("meld", trees / "meld", tmp_path / "meld")
    assert "--allow_speaker_overlap" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- mistakes


MISTAKES = {
    "": "name a corpus: ravdess, emodb",
    "ravdes": "did you mean ravdess?",
    "casablanca": "the corpus casablanca is not known: there are ravdess",
    "ravdess --input ravdess": "give both --input",
    "ravdess --input nowhere --output out": "--input nowhere is not a folder",
    "ravdess --input empty --output out": "has no audio files; RAVDESS is downloaded by hand from https://zenodo.org",
    "ravdess --input packed --output out": "has no audio files: unpack Audio_Speech_Actors_01-24.zip first",
    "ravdess --input emodb --output out": (
        "none of the 72 audio files is named as in RAVDESS, such as 03-01-06-01-02-01-12.wav; the first is notes.wav; "
        "they look like EMO-DB (emodb in --list)"
    ),
    "meld --input meld/dev_splits_complete --output out": "lacks train_sent_emo.csv",
    "iemocap --input iemocap/Session1/sentences --output out": "lacks dialog/EmoEvaluation/*.txt",
    "iemocap --input iemocap/Session1 --output out": "but only 1 of IEMOCAP is here",
    "ravdess --input ravdess --output emodb": "--output emodb is not empty",
    "ravdess --input ravdess --output ravdess/tables": "lies within --input ravdess",
    "ravdess --input ravdess --output out --map calm": "--map calm: write EMOTION=CLASS",
    "ravdess --input ravdess --output out --map joy=happy": "RAVDESS has no such emotion; it has neutral, calm",
    "ravdess --input ravdess --output out --map calm=relaxed": "the class is one of neutral, happy, sad, angry",
    "ravdess --input ravdess --output out --map calm=neutral --labels all": "choose one",
    "ravdess --input ravdess --output out --fold 1": "RAVDESS has no such fold; no folds of it are in common use",
    "iemocap --input iemocap --output out --fold 6": "IEMOCAP has no such fold; its folds are 1, 2, 3, 4, 5",
    "emodb --input fear --output out": "no clip of neutral, happy, sad, angry is left",
    "nemo --input nemo_without --output out": "data.tsv has no column 'raw_text'",
}


@pytest.fixture(scope="module")
def mistakes(trees):
    (trees / "empty").mkdir()
    (trees / "packed").mkdir()
    (trees / "packed" / "Audio_Speech_Actors_01-24.zip").write_bytes(b"PK")
    write_clips(trees, ["fear/03a01Aa.wav", "nemo_without/EB0_fear_1.wav"])
    write_text(trees / "nemo_without" / "data.tsv", "file_id\temotion\tgender\nEB0_fear_1.wav\tfear\tfemale\n")
    return trees


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_sentence_and_writes_nothing(words, mistakes, monkeypatch):
    monkeypatch.chdir(mistakes)
    with pytest.raises(ValueError) as caught:
        corpus_command.main(shlex.split(words))
    message = str(caught.value)
    assert MISTAKES[words] in message and "\n" not in message
    assert not (mistakes / "out").exists() and not (mistakes / "ravdess" / "tables").exists()


def test_the_module_runs_as_a_program(mistakes, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mmser", "emodb"])
    monkeypatch.delitem(sys.modules, "mmser.corpus_command")
    runpy.run_module("mmser.corpus_command", run_name="__main__")
    assert "TU Berlin" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["mmser", "emodb", "--input", str(mistakes / "empty"), "--output", "out"])
    with pytest.raises(SystemExit) as stopped:
        corpus_command.command()
    assert stopped.value.code == 2
    assert re.fullmatch(r"error: --input .* has no audio files.*\n", capsys.readouterr().err)
