# SPDX-License-Identifier: Apache-2.0
"""README.md, executed: what it shows must run, and what it names must exist.

Two fresh processes do the work, with `hub_server.py` as their Hub: one runs the Python blocks in their order, the
other the training command. The default encoders are on that Hub under their own names, as tiny ones of the same kind.
"""

import ast
import configparser
import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
import soundfile
from hub_server import HubServer, Repository
from tiny import fit_openmax_by_chance, tiny_model
from tiny_corpus import AUDIO, NAMES, TEXT, tiny_processor, tiny_tokenizer, write_corpus
from transformers import (
    BertConfig,
    BertForPreTraining,
    HfArgumentParser,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForPreTraining,
)

from mmser.arguments import EVALUATION_ARGUMENTS, TRAINING_ARGUMENTS, ExportArguments, parse_arguments
from mmser.loading import load_emotion_dataset
from processing_mmser import MMSERPipeline

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT_OF_README = README.read_text(encoding="utf-8")
LINES = ["", *TEXT_OF_README.splitlines()]  # counted from 1
SPEECH, WORDS = "facebook/wav2vec2-base", "google-bert/bert-base-multilingual-cased"


def blocks(language):
    """The fenced blocks in a language: number of the first line, text."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", TEXT_OF_README, re.MULTILINE | re.DOTALL)
    return [(line_of(block.start(2)), block[2]) for block in found if block[1] == language]


def code_spans():
    """What stands between backquotes outside the blocks: number of its line, text."""
    prose = re.sub(r"^```.*?^```$", lambda block: re.sub(r"[^\n]", " ", block[0]), TEXT_OF_README, flags=re.M | re.S)
    return [(line_of(span.start()), span[1]) for span in re.finditer(r"`([^`\n]+)`", prose)]


def line_of(offset):
    return TEXT_OF_README.count("\n", 0, offset) + 1


def shell_commands():
    """The commands of the shell blocks as lists of words, without their comments."""
    lines = (line for _, block in blocks("bash") for line in block.replace("\\\n", " ").splitlines())
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


# ------------------------------------------------------------------------------------------ what the two processes run


def serve_encoders(hub, folder):
    """Put stand-ins for the default encoders on the Hub: pretraining checkpoints, so their heads must be ignored."""
    codevectors = {"num_codevectors_per_group": 4, "codevector_dim": 8, "proj_codevector_dim": 8}
    speech = Wav2Vec2ForPreTraining(Wav2Vec2Config(**AUDIO, **codevectors))
    words = BertForPreTraining(BertConfig(vocab_size=len(tiny_tokenizer()), **TEXT))
    parts = {
        SPEECH: (speech, Wav2Vec2FeatureExtractor(return_attention_mask=False)),
        WORDS: (words, tiny_tokenizer()),
    }
    for name, saved in parts.items():
        for part in saved:
            part.save_pretrained(folder / name)
        hub.repositories["model", name] = Repository()
        hub.repositories["model", name].add({path.name: path.read_bytes() for path in (folder / name).iterdir()})


def start(hub, folder, *arguments):
    """Start Python in `folder`, with the package installed and nothing downloaded yet."""
    with open(folder / "errors.txt", "wb") as errors:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=hub.environment(folder / "home") | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )


def run_blocks(readme, blocks):
    """Run blocks in one namespace; the value of every statement that is an expression goes to values.json, by line."""
    import ast
    import json

    namespace, values = {"__name__": "__main__"}, {}
    for first_line, code in blocks:
        tree = ast.increment_lineno(ast.parse(code), first_line - 1)  # so that a traceback shows the README
        for statement in tree.body:
            if isinstance(statement, ast.Expr):
                value = eval(compile(ast.Expression(statement.value), readme, "eval"), namespace)
                values[statement.end_lineno] = value
            else:
                exec(compile(ast.Module([statement], []), readme, "exec"), namespace)
    with open("values.json", "w", encoding="utf-8") as file:
        json.dump(values, file, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))


def start_blocks(hub, folder):
    """Run the Python blocks, and after them the sentence that loads what they pushed."""
    soundfile.write(folder / "clip.wav", 0.3 * np.sin(np.arange(8000) / 10), 16000)
    model = tiny_model()
    fit_openmax_by_chance(model)
    model.temperature.fill_(1.7)
    for part in (model, tiny_processor()):
        part.save_pretrained(folder / "demo_output" / "model")
    loading = [(line, f"{span}('clip.wav')") for line, span in code_spans() if span.startswith("pipeline(")]
    assert loading
    script = f"{inspect.getsource(run_blocks)}\nimport json, sys\nrun_blocks(sys.argv[1], json.loads(sys.argv[2]))"
    return start(hub, folder, "-c", script, str(README), json.dumps(blocks("python") + loading))


def start_commands(hub, folder):
    """Run the commands that train and judge, word by word and one after the other, beside `my_data`."""
    commands = [words[1:] for words in shell_commands() if words[0] == "python"]
    write_corpus(folder / "my_data", validation=(7, 8))  # enough clips to calibrate on
    for script in {Path(words[0]).parts[0] for words in commands}:
        (folder / script).symlink_to(ROOT / script)
    run = "import subprocess, sys\nfor words in {}: subprocess.run([sys.executable, *words], check=True)"
    return start(hub, folder, "-c", run.format(commands))


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Both processes, at the same time: their folders, the Hub they shared, and the values of the expressions."""
    used, trained, encoders = (tmp_path_factory.mktemp(name) for name in ("used", "trained", "encoders"))
    with HubServer() as hub:
        serve_encoders(hub, encoders)
        processes = {used: start_blocks(hub, used), trained: start_commands(hub, trained)}
        try:
            for folder, process in processes.items():
                assert process.wait(timeout=300) == 0, (folder / "errors.txt").read_text()[-5000:]
        finally:
            for process in processes.values():
                process.kill()
                process.wait()
        values = {int(line): value for line, value in json.loads((used / "values.json").read_text()).items()}
        return SimpleNamespace(hub=hub, used=used, trained=trained, values=values)


@pytest.fixture
def values(story):
    return story.values


def values_of(values, fragment):
    """The values of the expressions with `fragment` in them."""
    found = [value for line, value in values.items() if fragment in LINES[line]]
    assert found, f"the README has no expression with {fragment!r}: this test needs another"
    return found


# --------------------------------------------------------------------------------------------------- the Python blocks


def test_results_have_the_shapes_in_the_comments(values):
    """`# [2, 4], ...` behind a tensor; a letter stands for any size."""
    shapes = {}
    for line, value in values.items():
        if comment := re.search(r"# \[([\dA-Z, ]+)\]", LINES[line]):
            shapes[line] = (np.shape(value), comment[1].split(", "))
    assert len(shapes) >= 4
    for line, (shape, expected) in shapes.items():
        assert len(shape) == len(expected), LINES[line]
        for size, name in zip(shape, expected, strict=True):
            assert size > 0 and (name.isalpha() or int(name) == size), LINES[line]


def test_pipeline_results_look_like_the_comment(values):
    """The entry in `# [{...}, ...]` has the keys of the real ones and values of the same types, in the same range."""
    shown = {line: LINES[line + 1] for line in values if LINES[line + 1].startswith("# [{")}
    assert shown
    for line, comment in shown.items():
        example = ast.literal_eval(comment.removeprefix("# "))[0]
        scores = [entry["score"] for entry in values[line]]
        assert scores == sorted(scores, reverse=True)  # best first
        assert {entry["label"] for entry in values[line]} == set(NAMES)
        for entry in [example, *values[line]]:
            assert [(name, type(entry[name])) for name in entry] == [(name, type(example[name])) for name in example]
            assert entry["label"] in NAMES
            assert all(0 < value < 1 for value in entry.values() if isinstance(value, float))


def test_pipeline_arguments_do_what_the_comments_say(values):
    (whole,) = values_of(values, 'classifier("clip.wav") ')
    assert sum(entry["score"] for entry in whole) == pytest.approx(1)
    for best in values_of(values, "top_k=1"):
        assert len(best) == 1
    for alone in values_of(values, 'allowed_labels=["happy", "sad"]'):
        scores = {entry["label"]: entry["score"] for entry in whole}
        both = scores["happy"] + scores["sad"]
        assert {entry["label"] for entry in alone} == {"happy", "sad"}
        for entry in alone:
            assert entry["score"] == pytest.approx(scores[entry["label"]] / both, abs=1e-5)
    ((batched, words_only),) = values_of(values, "batch_size=2")
    assert [entry["label"] for entry in batched] == [entry["label"] for entry in whole]
    for one, other in zip(batched, whole, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
    assert len(words_only) == len(NAMES)


def test_what_was_pushed_starts_from_the_encoders_on_the_hub(story, values):
    files = story.hub.files("user/name")
    assert {"config.json", "model.safetensors", "processor_config.json", "modeling_mmser.py"} <= files.keys()
    config = json.loads(files["config.json"])
    assert len(config["id2label"]) == 7
    pushed = safetensors.numpy.load(files["model.safetensors"])
    sources = {SPEECH: ("wav2vec2.", "mmser.audio_encoder."), WORDS: ("bert.", "mmser.text_encoder.")}
    for name, (prefix, own_prefix) in sources.items():
        weights = safetensors.numpy.load(story.hub.files(name)["model.safetensors"])
        encoder = [key for key in weights if key.startswith(prefix) and "pooler" not in key]
        assert len(encoder) > 20
        for key in encoder:
            np.testing.assert_array_equal(weights[key], pushed[own_prefix + key.removeprefix(prefix)])
    for result in values_of(values, '`pipeline("audio-classification", model="user/name", trust_remote_code=True)`'):
        assert {entry["label"] for entry in result} == set(config["id2label"].values())
    assert (story.used / "home" / "modules" / "transformers_modules" / "user" / "name").is_dir()


# ---------------------------------------------------------------------------------------------------- the shell blocks


def test_every_shell_command_is_known():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = shell_commands()
    assert commands
    for words in commands:
        if words[0] == "make":
            assert words[1:] and set(words[1:]) <= set(targets), words
        else:
            assert words[0] == "python" and (ROOT / words[1]).is_file(), words


def test_the_training_command_leaves_what_the_readme_says(story):
    folder = story.trained / "runs" / "mine"
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in folder.iterdir()}
    results = json.loads((folder / "eval_results.json").read_text())
    assert {"validation", "test", "calibration"} <= results.keys()
    assert results["calibration"]["temperature"] > 0
    state = json.loads((folder / "trainer_state.json").read_text())
    arguments = json.loads((folder / "training_args.json").read_text())
    assert state["epoch"] == 10
    assert arguments["per_device_train_batch_size"] == 16
    assert arguments["bf16"] or arguments["fp16"]
    card = (folder / "README.md").read_text()
    assert SPEECH in card and WORDS in card


def test_the_evaluation_command_leaves_what_the_readme_says(story):
    folder = story.trained / "runs" / "mine" / "evaluation"
    assert {"report.md", "report.json", "plots"} <= {path.name for path in folder.iterdir()}
    report = json.loads((folder / "report.json").read_text())
    assert report["unknown_clips"] == {"noise_and_music": 150}
    assert [row["passes"] for row in report["test_time_augmentation"]] == [1, 5]
    assert {"model", "audio_only", "text_only", "linear_probe", "majority"} <= report["rows"].keys()
    assert report["fitted_calibration"]["temperature"] > 0


def test_the_export_command_leaves_what_the_readme_says(story):
    folder = story.trained / "runs" / "small"
    assert not list(folder.glob("*.safetensors"))
    assert (folder / "model.onnx").stat().st_size < (folder.parent / "mine" / "model.safetensors").stat().st_size
    classifier = MMSERPipeline.from_onnx(folder)
    assert classifier.model.notes["dtype"] == "int8"
    results = classifier(str(story.used / "clip.wav"))
    assert {entry["label"] for entry in results} == set(NAMES)


def test_everything_went_through_the_hub(story):
    assert story.hub.unknown_requests == []
    for folder in (story.used, story.trained):
        for name in (SPEECH, WORDS):
            downloaded = folder / "home" / "hub" / f"models--{name.replace('/', '--')}"
            assert list(downloaded.glob("snapshots/*/model.safetensors"))


# ---------------------------------------------------------------------------------------------- the data and the prose


def test_the_metadata_example_is_read_as_it_looks(tmp_path):
    (_, table), *others = [block for block in blocks("") if "," in block[1].splitlines()[0]]
    assert others == []
    header, *rows = (line.split(",") for line in table.splitlines())
    rows = [dict(zip(header, row, strict=True)) for row in rows]
    for split in ("train", "validation", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "metadata.csv").write_text(table)
        for row in rows:
            soundfile.write(tmp_path / split / row["file_name"], np.zeros(8000), 16000)
    splits, label_names = load_emotion_dataset(tmp_path, allow_speaker_overlap=True)  # it is one table three times
    assert label_names == NAMES
    for split in ("train", "validation", "test"):
        assert len(splits[split]) == len(rows) > 1
        for read, row in zip(splits[split], rows, strict=True):
            assert NAMES[read["labels"]] == row["label"]
            assert read["text"] == row["transcription"]
            assert Path(read["audio"]) == tmp_path / split / row["file_name"]
            assert (read["speaker"], read["language"]) == (row["speaker"], row["language"])


def test_every_flag_is_one_of_the_command_lines():
    training = TRAINING_ARGUMENTS
    evaluation = EVALUATION_ARGUMENTS
    programs = (training, evaluation, (ExportArguments,))
    known = {flag for classes in programs for flag in HfArgumentParser(classes)._option_string_actions}
    flags = set(re.findall(r"(?<![\w-])--\w+", TEXT_OF_README))
    assert flags
    assert flags <= known


def test_arguments_in_the_prose_are_parsed(monkeypatch):
    monkeypatch.chdir(ROOT)
    spans = [shlex.split(span) for _, span in code_spans() if re.match(r"--\w+ |train_hf\.py ", span)]
    assert spans
    exporting = HfArgumentParser(ExportArguments)
    for words in spans:
        if words[0] in exporting._option_string_actions:
            exporting.parse_args_into_dataclasses(["--checkpoint", "runs/mine", "--output_dir", "runs/small", *words])
        else:
            parse_arguments(TRAINING_ARGUMENTS, words[1:] if words[0] == "train_hf.py" else words)


def test_the_table_of_files_is_complete_and_true():
    rows = [[re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:3]] for line in LINES if line[:3] == "| `"]
    named = [name for files, _ in rows for name in files]
    for name in named:
        path = ROOT / name
        assert path.is_dir() if name.endswith("/") else path.is_file(), name
    assert {path.name for path in ROOT.glob("*.py")} <= set(named)
    for files, contents in rows:
        for name in contents:
            assert hasattr(importlib.import_module(files[0].removesuffix(".py")), name), name


def test_every_name_in_the_prose_is_in_the_code():
    """Classes, functions, options: each word in backquotes must still be written in the source."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("demo/*.py"), ROOT / "Makefile", ROOT / "setup.cfg"]
    source = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    spans = {span for _, span in code_spans() if re.fullmatch(r"\w+|\w+\.\w+\(\)", span)}
    names = {span.removesuffix("()").split(".")[-1] for span in spans}
    assert len(names) > 10
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", source)] == []


def test_what_is_said_about_installing():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    (line,) = (line for line in LINES if "with extras" in line)
    extras = re.findall(r"`(\w+)`", line.split("with extras")[1])
    assert extras and set(extras) <= set(setup["options.extras_require"])
    assert re.search(r"Python ([\d.]+) or newer", TEXT_OF_README)[1] in setup["options"]["python_requires"]
    for pinned in re.findall(r"`(torch==[\d.]+)`", TEXT_OF_README):
        assert pinned in (ROOT / "Makefile").read_text()
