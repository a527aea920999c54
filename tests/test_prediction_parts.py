# SPDX-License-Identifier: Apache-2.0
"""Tests of bulk prediction (`mmser predict --output_dir`): each file once, whatever is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas  # type: ignore[import-untyped]
import pytest
import soundfile
import torch
from tiny import fit_openmax_by_chance, randomize
from tiny_corpus import RATE, tiny_model, tiny_processor

import predict_hf
from mmser import prediction_parts, prediction_run
from mmser.arguments import parse_arguments
from mmser.prediction_arguments import LAUNCHED, PREDICTION_ARGUMENTS, Share

CLIPS = 11
PART_SIZE = 2  # the last part has one clip
BAD = ("04.wav", "05.wav")  # all of the third part
READERS = {
    "csv": pandas.read_csv,
    "jsonl": lambda path: pandas.read_json(path, lines=True),
    "parquet": pandas.read_parquet,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint with a task beside the emotion, and clips of which two are corrupt."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(3)
    model = randomize(tiny_model(dropout=False, auxiliary_tasks={"arousal": "regression"})).eval()
    fit_openmax_by_chance(model)
    for part in (model, tiny_processor()):
        part.save_pretrained(folder / "model")
    (folder / "clips").mkdir()
    for number in range(CLIPS):
        time = np.arange(3200 + 160 * number) / RATE
        soundfile.write(folder / "clips" / f"{number:02d}.wav", 0.3 * np.sin(800 * (1 + number) * time), RATE)
    for name in BAD:
        (folder / "clips" / name).write_bytes(b"RIFF, but nothing of the kind")
    lines = [f"{number:02d}.wav,words {number}" for number in range(0, CLIPS, 3)]
    (folder / "words.csv").write_text("\n".join(["file_name,transcription", *lines]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def loaded(place):
    """The checkpoint, loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        classifier = prediction_run.load_classifier(str(place / "model"))
        patch.setattr(prediction_run, "load_classifier", lambda *_: classifier)
        yield


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


def words(folder, *more, format="parquet"):
    common = ["clips", "--checkpoint", "model", "--output_dir", str(folder), "--part_size", str(PART_SIZE)]
    return [*common, "--format", format, "--transcripts", "words.csv", *map(str, more)]


def in_a_fork(*arguments, **options):
    """How the process of `fork` ended, as of `os.waitstatus_to_exitcode`."""
    return code_of(fork(*arguments, **options))


def code_of(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def fork(folder, rank=0, processes=1, killed_at=None, format="parquet"):
    """The command as a process of a launcher, killed by SIGKILL while it writes its file `killed_at`: of each part
    that of its check and its own. Returns: its number."""
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank))
        replace, written = os.replace, 0

        def replace_or_die(source, target):
            nonlocal written
            if Path(target).name.startswith("part-") or Path(target).stem == prediction_parts.MERGED:
                if written == killed_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                written += 1
            replace(source, target)

        os.replace = replace_or_die
        code = predict_hf.main(words(folder, format=format))
    finally:
        os._exit(code)


def parts(folder):
    return sorted(path.name for path in (folder / "parts").iterdir() if not path.name.startswith("."))


def names(folder, format="parquet"):
    return [Path(name).name for name in READERS[format](folder / f"answers.{format}")["file"]]


ALL = [f"{number:02d}.wav" for number in range(CLIPS)]


@pytest.mark.parametrize("format", READERS)
def test_the_parts_together_are_the_answers_of_one_run(place, tmp_path, format, capsys):
    assert predict_hf.main(words(tmp_path / "parts", format=format)) == 1  # two clips are bad
    assert f"the answers to {CLIPS} inputs, {len(BAD)} with an error" in capsys.readouterr().out
    whole = tmp_path / f"whole.{format}"
    predict_hf.main(["clips", "--checkpoint", "model", "--transcripts", "words.csv", "--output", str(whole)])
    merged, expected = READERS[format](tmp_path / "parts" / f"answers.{format}"), READERS[format](whole)
    assert names(tmp_path / "parts", format) == ALL
    pandas.testing.assert_frame_equal(merged, expected, check_exact=False, atol=1e-5)
    assert len(parts(tmp_path / "parts")) == 6 and merged["text"].notna().sum() >= 4


def test_a_run_that_is_killed_at_any_part_goes_on_and_each_file_is_there_once(place, tmp_path):
    kills = 0
    for killed_at in range(13):  # six parts with their checks, and what they are merged to
        folder = tmp_path / str(killed_at)
        assert in_a_fork(folder, killed_at=killed_at) == -signal.SIGKILL
        kills += 1
        assert len(parts(folder)) == killed_at // 2 and not (folder / "answers.parquet").exists()
        before = {name: (folder / "parts" / name).stat().st_mtime_ns for name in parts(folder)}
        assert in_a_fork(folder) == 1
        assert names(folder) == ALL
        assert all((folder / "parts" / name).stat().st_mtime_ns == time for name, time in before.items())
        left = [path for path in folder.rglob("*") if path.name.startswith(".")]
        assert not left, "what a killed process left is removed by the next"
    assert kills == 13


@pytest.mark.parametrize("killed_at", [0, 2])
def test_processes_share_the_parts_and_one_of_them_may_be_killed(place, tmp_path, killed_at):
    assert in_a_fork(tmp_path / "x", 0, 2, 2 * killed_at + 1) == -signal.SIGKILL
    assert in_a_fork(tmp_path / "x", 1, 2) == 0
    done = parts(tmp_path / "x")
    assert [int(name[5:10]) for name in done] == sorted([*range(0, 2 * killed_at, 2), 1, 3, 5])
    assert not (tmp_path / "x" / "answers.parquet").exists()
    # Again, with another number of processes
    assert [in_a_fork(tmp_path / "x", rank, 3) for rank in range(3)] == [0, 0, 0]
    assert names(tmp_path / "x") == ALL


def test_a_finished_run_does_nothing_again(place, tmp_path, capsys, monkeypatch):
    predict_hf.main(words(tmp_path / "x"))
    monkeypatch.setattr(prediction_run, "load_classifier", lambda *_: pytest.fail("no model is needed"))
    assert predict_hf.main(words(tmp_path / "x")) == 1
    assert names(tmp_path / "x") == ALL


DAMAGES = {
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a line less": lambda data: b"".join(data.splitlines(keepends=True)[:-1]),
    "another's line": lambda data: data.replace(b"02.wav", b"99.wav"),
    "a hole": lambda data: data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("format", READERS)
def test_a_damaged_part_is_made_again(place, tmp_path, format, damage, capsys):
    """As a full disk, a copy that was stopped or a hand leaves it."""
    predict_hf.main(words(tmp_path, format=format))
    merged = tmp_path / f"answers.{format}"
    before = merged.read_bytes()
    part = tmp_path / "parts" / f"part-00001-of-00006.{format}"
    whole = part.read_bytes()
    part.write_bytes(DAMAGES[damage](whole))
    merged.unlink()
    capsys.readouterr()
    assert predict_hf.main(words(tmp_path, format=format)) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "again" in line]
    assert told == [f"{part} is made again: it is damaged"]
    assert part.read_bytes() == whole and merged.read_bytes() == before


def test_a_damaged_part_of_another_process_is_not_merged(place, tmp_path):
    predict_hf.main(words(tmp_path, format="csv"))
    (tmp_path / "parts" / "part-00001-of-00006.csv").write_bytes(b"")
    (tmp_path / "answers.csv").unlink()
    assert in_a_fork(tmp_path, 0, 2, format="csv") == 0 and not (tmp_path / "answers.csv").exists()
    assert in_a_fork(tmp_path, 1, 2, format="csv") == 0 and names(tmp_path, "csv") == ALL


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_parts_by_segment_that_are_cut_at_the_end_of_a_line_are_made_again(place, tmp_path, format, monkeypatch):
    """An input has several rows there: how many, no reader of the part can tell."""
    (tmp_path / "long").mkdir()
    soundfile.write(tmp_path / "long" / "a.wav", 0.3 * np.sin(np.arange(4 * RATE) / 9), RATE)
    command = ["--checkpoint", "model", "--output_dir", str(tmp_path / "x"), "--format", format, "--segments"]
    command = [str(tmp_path / "long"), *command, "--chunk_length_s", "1"]
    predict_hf.main(command)
    part = tmp_path / "x" / "parts" / f"part-00000-of-00001.{format}"
    whole = part.read_bytes()
    assert len(whole.splitlines()) > 3
    part.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    predict_hf.main(command)
    assert part.read_bytes() == whole
    monkeypatch.setattr(prediction_run, "load_classifier", lambda *_: pytest.fail("no model is needed"))
    predict_hf.main(command)


def test_parts_whose_inputs_changed_are_made_again(place, tmp_path, capsys, monkeypatch):
    clips, folder = Path(shutil.copytree("clips", tmp_path / "clips")), tmp_path / "x"
    command = [str(clips) if word == "clips" else word for word in words(folder)]
    predict_hf.main(command)
    before = {name: (folder / "parts" / name).stat().st_mtime_ns for name in parts(folder)}
    with monkeypatch.context() as patch:  # the same files again, as after a copy
        patch.setattr(prediction_run, "load_classifier", lambda *_: pytest.fail("no model is needed"))
        os.utime(clips / "01.wav", (0, 0))
        predict_hf.main(command)
    shutil.copyfile(clips / "10.wav", clips / "02.wav")
    soundfile.write(clips / "07.wav", np.full(3200 + 160 * 7, 0.01), RATE)  # as long as before
    capsys.readouterr()
    predict_hf.main(command)
    again = [folder / "parts" / f"part-0000{number}-of-00006.parquet" for number in (1, 3)]
    told = [line for line in capsys.readouterr().err.splitlines() if "again" in line]
    changed = zip(again, ("02.wav", "07.wav"), strict=True)
    assert told == [f"{part} is made again: {clips / name} has changed since" for part, name in changed]
    newer = {name for name, time in before.items() if (folder / "parts" / name).stat().st_mtime_ns != time}
    assert newer == {path.name for path in again}
    answers = pandas.read_parquet(folder / "answers.parquet").set_index("file")
    assert answers.loc[str(clips / "02.wav"), "seconds"] == answers.loc[str(clips / "10.wav"), "seconds"]


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"digest": 1, "inputs": [1]}'])
def test_a_part_without_what_it_was_made_of_is_made_again(place, tmp_path, content, capsys):
    predict_hf.main(words(tmp_path))
    check = tmp_path / "checks" / "part-00002-of-00006.json"
    whole = check.read_bytes()
    check.unlink() if content is None else check.write_bytes(content)
    capsys.readouterr()
    assert predict_hf.main(words(tmp_path)) == 1 and check.read_bytes() == whole
    assert capsys.readouterr().err.count("part-00002-of-00006.parquet is made again: ") == 1


@pytest.mark.parametrize("content", ['{"checkpo', "", "[1]", "\x00"])
def test_what_a_folder_is_of_may_be_damaged(place, tmp_path, content):
    predict_hf.main(words(tmp_path))
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is damaged, so whose answers .* give another --output_dir"):
        predict_hf.main(words(tmp_path))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--part_size", "3"], "differs in its flags"),
        (["--segments_above", "5"], "differs in its flags"),
        (["clips/00.wav"], None),  # it is among them
        (["model/../words.csv"], "differs in its inputs"),
        (["--transcripts", "other.csv"], "differs in its transcripts or speakers"),
        (["--checkpoint", "other"], "differs in its checkpoint"),
    ],
)
def test_the_answers_of_another_run_are_not_gone_on_with(place, tmp_path, more, said, monkeypatch):
    predict_hf.main(words(tmp_path / "x"))
    before = (tmp_path / "x" / "answers.parquet").read_bytes()
    (place / "other.csv").write_text("file_name,transcription\n00.wav,other words", encoding="utf-8")
    if not (place / "other").exists():
        model = tiny_model(dropout=False)
        model.save_pretrained(place / "other")
    if said is None:
        assert predict_hf.main(words(tmp_path / "x", *more)) == 1
        return
    with pytest.raises(ValueError, match=said):
        predict_hf.main(words(tmp_path / "x", *more))
    assert (tmp_path / "x" / "answers.parquet").read_bytes() == before


def test_a_folder_with_something_else_is_left_alone(place, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt, which is no part of answers"):
        predict_hf.main(words(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--output", "x.csv"], "leave out --output"),
        (["--plot", "x.png"], "leave out --plot"),
        (["--format", "json"], "the --format of its parts is parquet, jsonl, csv"),
        (["--part_size", "0"], "--part_size must be at least 1"),
        (["--output_dir", "words.csv"], "is a file: name a folder"),
    ],
)
def test_wrong_flags_are_named(place, more, said):
    with pytest.raises(ValueError, match=said):
        parse_arguments(PREDICTION_ARGUMENTS, words("x", *more))


def test_several_processes_need_a_folder_of_parts(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes would each classify all: give --output_dir"):
        parse_arguments(PREDICTION_ARGUMENTS, ["clips", "--checkpoint", "model"])
    for rank, said in (("1", None), ("2", "RANK=2, WORLD_SIZE=2"), ("x", "RANK=x")):
        monkeypatch.setenv("RANK", rank)
        if said:
            with pytest.raises(ValueError, match=said):
                Share.of_environment()
        else:
            assert Share.of_environment() == Share(1, 2, 0)


def test_each_process_has_its_own_gpu(monkeypatch):
    assert [Share(rank, 4, rank % 2).device(wanted) for rank, wanted in ((0, None), (1, "cpu"))] == [None, "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [Share(rank, 4, rank % 2).device(None) for rank in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert Share(1, 4, 1).device("cuda:7") == "cuda:7" and Share().device("cuda") == "cuda"


def test_two_processes_at_once(place, tmp_path, capfd):
    both = [fork(tmp_path / "x", rank, 2) for rank in (0, 1)]
    assert [code_of(process) for process in both] == [0, 0]
    assert names(tmp_path / "x") == ALL and "process 1: part 2, 1 of 3" in capfd.readouterr().err
    assert json.loads((tmp_path / "x" / "run.json").read_text())["flags"]["part_size"] == PART_SIZE


def test_under_torchrun(tmp_path):
    """Each process knows which it is. Torch is imported by the launcher alone: the command would do it twice more."""
    try:
        torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, use_libuv=True)
    except RuntimeError as error:
        assert "without libuv" in str(error)
        pytest.skip("this torch was built without what torchrun needs, as Debian's 2.6 is")
    # The launcher's processes share an output without buffers, where `print` writes a line and its end apart
    (tmp_path / "program.py").write_text(
        "import sys\nfrom mmser.prediction_arguments import Share\nsys.stdout.write(f'{Share.of_environment()}\\n')\n",
        encoding="utf-8",
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", tmp_path / "program.py"]
    environment = {**os.environ, "PYTHONPATH": str(Path(predict_hf.__file__).parent)}
    done = subprocess.run(launcher, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.splitlines()) == [str(Share(rank, 2, rank)) for rank in (0, 1)]
