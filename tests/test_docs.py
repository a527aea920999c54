# SPDX-License-Identifier: Apache-2.0
"""README.md and docs/, executed: what they show must run, and what they name must exist.

One fresh process runs all snippets, page by page and in their order, with `hub_server.py` as its Hub; the encoders on
that Hub are tiny ones of the same kind. Commands run as written, only shorter (`SHORTER`), by the `main` of their
module; the launchers of several processes have tests of their own. `run_pages` is what that process does.
"""

import ast
import configparser
import contextlib
import csv
import dataclasses
import functools
import gc
import importlib
import importlib.util
import io
import json
import os
import pickle
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import soundfile
import transformers
from hub_server import HubServer, Repository
from pictures import pictures_are_dots
from tiny import fit_openmax_by_chance, random_predictions
from tiny_corpus import (
    AUDIO,
    JOINT,
    NAMES,
    TEXT,
    WHISPER,
    read_rows,
    tiny_processor,
    tiny_tokenizer,
    write_corpus,
    write_table,
)
from transformers import (
    BertConfig,
    BertForPreTraining,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForPreTraining,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from configuration_mmser import MMSERConfig
from mmser import cli
from mmser.app_arguments import APP_ARGUMENTS
from mmser.arguments import EVALUATION_ARGUMENTS, EXPORT_ARGUMENTS, TRAINING_ARGUMENTS, command_parser, parse_arguments
from mmser.loading import load_emotion_dataset
from mmser.metrics import softmax
from mmser.prediction_arguments import PREDICTION_ARGUMENTS
from modeling_mmser import MMSERForAudioClassification

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in [*sorted(ROOT.glob("docs/*.md")), README]
}
COMMANDS = {
    "train_hf": TRAINING_ARGUMENTS,
    "eval_hf": EVALUATION_ARGUMENTS,
    "export_hf": EXPORT_ARGUMENTS,
    "predict_hf": PREDICTION_ARGUMENTS,
    "app": APP_ARGUMENTS,
}
# Each page finds a finished model without checkpoints in `runs/mine`
SHORT_TRAINING = (
    "--overwrite_output_dir --max_steps 2 --save_strategy no --eval_strategy no --load_best_model_at_end false "
    "--use_cpu --dataloader_num_workers 0 --augmented_copies 1 --max_train_samples 16 --max_eval_samples 8 "
    "--disable_tqdm true"
)
SHORTER = {  # by the program, and a flag among its arguments
    "train_hf.py": SHORT_TRAINING,
    "train_hf.py --hp_search": f"{SHORT_TRAINING} --hp_search 2",
    "train_hf.py --adapt": "--overwrite_output_dir --use_cpu --dataloader_num_workers 0 --disable_tqdm true",
    "eval_hf.py": "--bootstrap_samples 5 --use_cpu --dataloader_num_workers 0",
    "export_hf.py": "",
    "export_hf.py calls/anrufe.csv": "--format safetensors",  # that of `docs/export.md` is to ONNX, which takes long
    "demo/synthesize_non_speech.py": "--clips_per_kind 2",
}
# What they run is this very suite, takes the network, a corpus or a browser, or does not end;
# `test_corpus_command.py`, `test_serving.py` and `test_app.py` have miniatures of these
NOT_RUN = ("make", "pip", "python -m pytest", "mmser corpus", "mmser serve", "mmser app", "python app.py")
SHELL_WORDS = ("make", "pip", "python", "accelerate", "torchrun", "hf", "mmser")
# Names in backquotes that are neither ours nor of Transformers
OUTSIDE = {"accelerate", "torchrun", "foreign_class", "pre", "sbatch"}
YOURS = re.compile(
    r"(runs|my_data|more_data|calls|anrufe|clip|doubtful|meeting|demo_output|states|train|validation|test|user|mmser-small)\b"
)  # a reader's own paths


# ------------------------------------------------------------------------------------------- what the pages consist of


def line_of(text, offset):
    return text.count("\n", 0, offset) + 1


def blocks(page, *languages):
    """The fenced blocks of a page in these languages: number of the first line, language, text."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)
    every = [(line_of(PAGES[page], block.start(2)), block[1], block[2]) for block in found]
    return [block for block in every if not languages or block[1] in languages]


def prose(page):
    """A page without its blocks, on the same lines."""
    return re.sub(r"^```.*?^```$", lambda block: re.sub(r"[^\n]", " ", block[0]), PAGES[page], flags=re.M | re.S)


def spans(page):
    """What stands between backquotes outside the blocks."""
    return [span[1] for span in re.finditer(r"`([^`\n]+)`", prose(page))]


def all_spans():
    return [(page, span) for page in PAGES for span in spans(page)]


def commands(block):
    """The commands of a shell block, word by word, as the shell expands them."""
    stubs = "".join(f"{name}() {{ printf '%s\\037' {name} \"$@\"; printf '\\n'; }}\n" for name in SHELL_WORDS)
    shell = subprocess.run(["bash", "-euc", stubs + block], capture_output=True, text=True, check=True)
    return [line.rstrip("\037").split("\037") for line in shell.stdout.splitlines()]


# ----------------------------------------------------------------------------------------- what the fresh process does


def run_pages(folder):
    """
    Run the snippets of all pages, each page in a folder of its own beside `start`. What they printed and the values
    of statements that are expressions go to `results.json`, by page and line.
    """
    gc.freeze()  # the trainers collect garbage often, and what was imported is none
    folder, results, done = Path(folder), {}, {}
    for page in PAGES:
        place = folder / Path(page).stem
        shutil.copytree(folder / "start", place, symlinks=True)
        os.chdir(place)
        namespace, results[page] = {"__name__": "__main__"}, {}
        for first_line, language, text in blocks(page, "python", "bash"):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                if language == "python":
                    run_python(text, first_line, page, namespace, results[page])
                else:
                    for words in commands(text):
                        # Who asks for a plot gets it; those of trainings and reports would take a fifth of the time
                        with contextlib.nullcontext() if "--plot" in words else pictures_are_dots():
                            run_command(words, done, place)
            results[page][first_line] = {"printed": printed.getvalue()}
    os.chdir(folder)
    text = json.dumps(results, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))
    (folder / "results.json").write_text(text, encoding="utf-8")


def run_python(code, first_line, page, namespace, results):
    """Run a block; the value of every statement that is an expression is put into `results`, by its last line."""
    tree = ast.increment_lineno(ast.parse(code), first_line - 1)  # so that a traceback shows the page
    for statement in tree.body:
        if isinstance(statement, ast.Expr):
            value = eval(compile(ast.Expression(statement.value), page, "eval"), namespace)
            results[f"value {statement.end_lineno}"] = value
        else:
            exec(compile(ast.Module([statement], []), page, "exec"), namespace)


def run_command(words, done, place):
    """
    Run a command in this process. One that has been run already, on another page or with the first of several seeds,
    leaves the same folder again.
    """
    if " ".join(words).startswith(NOT_RUN):
        return
    if words[0] == "mmser":
        module = cli.COMMANDS[words[1]][0]
        if f"{module}.py" not in SHORTER:
            cli.main(words[1:])
            return
        words = ["python", f"{module}.py", *words[2:]]
    program = next(index for index, word in enumerate(words) if word.endswith(".py"))  # after python or a launcher
    name, arguments = words[program], words[program + 1 :]
    key = re.sub(r"\b(seed |[a-z]+_)4[34]\b", r"\g<1>42", shlex.join(words[program:]))
    output = place / arguments[arguments.index("--output_dir") + 1] if "--output_dir" in arguments else place
    if key in done:
        earlier, text = done[key]
        if earlier != output:
            shutil.copytree(earlier, output, dirs_exist_ok=True)
    else:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            own = next((f"{name} {word}" for word in arguments if f"{name} {word}" in SHORTER), name)
            more = shallow(arguments) if name == "train_hf.py" else []
            run_program(name, [*arguments, *SHORTER[own].split(), *more])
        text = printed.getvalue()
        done[key] = (output, text)
    print(text)


def shallow(arguments):
    """
    The flag that gives a new model one layer in its classifier in place of 35, unless the command or its recipe says
    how many: what is adapted, evaluated and exported of it takes a fraction of the time.
    """
    recipe = json.loads(Path(arguments[0]).read_text(encoding="utf-8")) if arguments[0].endswith(".json") else {}
    if "--model_name_or_path" in arguments or "model_name_or_path" in recipe:
        return []
    overrides = {"classifier_num_layers": 1, **recipe.get("config_overrides", {})}
    if "--config_overrides" in arguments:
        overrides |= json.loads(arguments[arguments.index("--config_overrides") + 1])
    return ["--config_overrides", json.dumps(overrides)]


def run_program(name, arguments):
    if "/" in name:
        sys.argv = [name, *arguments]
        with contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / name), run_name="__main__")
    else:
        importlib.import_module(name.removesuffix(".py")).main(arguments)


# ------------------------------------------------------------------------------------------------- what it starts from


def block_that_starts(start):
    """The only block of all pages that starts like this."""
    (text,) = [text for page in PAGES for _, _, text in blocks(page) if text.startswith(start)]
    return text


def serve_encoders(hub, folder):
    """Put stand-ins for the encoders on the Hub: pretraining checkpoints, so that their heads must be ignored."""
    codevectors = {"num_codevectors_per_group": 4, "codevector_dim": 8, "proj_codevector_dim": 8}
    whisper = {**WHISPER, "encoder_layers": 4, "max_source_positions": 1500, "decoder_layers": 1}
    whisper |= {"decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 8}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
    bert = BertForPreTraining(BertConfig(vocab_size=len(tiny_tokenizer()), **TEXT))
    parts = {
        "facebook/wav2vec2-base": (
            Wav2Vec2ForPreTraining(Wav2Vec2Config(**AUDIO, **codevectors)),
            Wav2Vec2FeatureExtractor(return_attention_mask=False),
        ),
        "openai/whisper-base": (
            WhisperForConditionalGeneration(WhisperConfig(**whisper, **special)),
            WhisperFeatureExtractor(feature_size=16),
        ),
        "google-bert/bert-base-multilingual-cased": (bert, tiny_tokenizer()),
        "intfloat/multilingual-e5-small": (bert, tiny_tokenizer()),
    }
    for name, saved in parts.items():
        for part in saved:
            part.save_pretrained(folder / name)
        hub.repositories["model", name] = Repository()
        hub.repositories["model", name].add({path.name: path.read_bytes() for path in (folder / name).iterdir()})


def serve_data(hub, corpus, folder):
    """Put the corpus on the Hub, with the audio in its tables."""
    for split in ("train", "validation"):
        with open(corpus / split / "metadata.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            name = row.pop("file_name")
            row["audio"] = {"bytes": (corpus / split / name).read_bytes(), "path": name}
        table = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(decode=False))
        table.to_parquet(folder / f"{split}.parquet")
    hub.repositories["dataset", "user/data"] = Repository()
    hub.repositories["dataset", "user/data"].add({path.name: path.read_bytes() for path in folder.iterdir()})


def write_calls(folder, corpus):
    """The recordings of `docs/call_centre.md`: of several formats and rates, mono and stereo, and their table."""
    rows = []
    for number, row in enumerate(read_rows(corpus, "train", "validation", "test")):
        samples, rate = soundfile.read(row["file_name"])
        ending, rate = (("mp3", 44100), ("wav", 8000), ("flac", 16000))[number % 3]
        folder.mkdir(exist_ok=True)
        name = f"Anruf {number:04d}.{ending}"
        soundfile.write(folder / name, np.stack([samples, samples / 2], axis=1) if number % 2 else samples, rate)
        mood = {"happy": "zufrieden", "sad": "traurig", "angry": "verärgert"}.get(row["label"], row["label"])
        rows.append({"Datei": name, "Stimmung": mood, "Abschrift": row["transcription"], "Kunde": row["speaker"]})
    with open(folder / "anrufe.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=";")
        writer.writeheader()
        writer.writerows(rows)


def fill_start(folder, corpus):
    """What a reader has: recordings, data, the recipes, and a model in `runs/mine`."""
    folder.mkdir()
    for name, seconds in (("clip.wav", 0.5), ("doubtful.wav", 0.4), ("meeting.flac", 9.785875)):
        soundfile.write(folder / name, 0.3 * np.sin(np.arange(round(16000 * seconds)) / 10), 16000)
    (folder / "meeting.srt").write_text("1\n00:00:00,000 --> 00:00:02,000\nwhat a joy\n", encoding="utf-8")
    write_calls(folder / "calls", corpus)
    turns = ("0.0 4.5 <NA> <NA> anna", "4.0 5.5 <NA> <NA> ben")
    (folder / "meeting.rttm").write_text("".join(f"SPEAKER meeting 1 {turn} <NA> <NA>\n" for turn in turns))
    (folder / "my_data").symlink_to(corpus)
    for split in ("train", "validation", "test"):  # another corpus: other names of the labels, none of the corpus
        other = {"happy": "joy", "sad": "fear"}
        rows = [{**row, "label": other.get(row["label"], row["label"])} for row in read_rows(corpus, split)]
        rows = [{name: cell for name, cell in row.items() if name not in ("corpus", "split")} for row in rows]
        shutil.copytree(corpus / split, folder / "more_data" / "audio" / split)
        rows = [{**row, "file_name": f"audio/{split}/{Path(row['file_name']).name}"} for row in rows]
        write_table(folder / "more_data" / f"{split}.csv", rows)
    (folder / "labels.csv").write_text(block_that_starts("corpus,label,target"), encoding="utf-8")
    for name in ("recipes", "checkpoints"):
        (folder / name).symlink_to(ROOT / name)
    audio = WhisperConfig(**{**WHISPER, "max_source_positions": 1500})  # the fewest layers, so that the export is fast
    text = BertConfig(vocab_size=len(tiny_tokenizer()), **TEXT)
    tasks = {"sentiment": ["negative", "neutral", "positive"], "arousal": "regression"}
    for name, own in (("mine", {}), ("tasks", {"auxiliary_tasks": tasks})):
        model = MMSERForAudioClassification.from_backbones(audio, text, **JOINT | {"classifier_num_layers": 1} | own)
        fit_openmax_by_chance(model)
        model.temperature.fill_(1.7)
        logits, labels = random_predictions(0)
        model.prediction_sets.fit(softmax(logits), labels)
        for part in (model, tiny_processor(whisper=True)):
            part.save_pretrained(folder / "runs" / name)


def tell_story(folder):
    """Run the process; what it left on its Hub, and what it asked of it in vain, goes to `hub.pickle`."""
    corpus = write_corpus(folder / "corpus", validation=(7, 8))  # enough clips to calibrate on
    fill_start(folder / "start", corpus)
    with HubServer() as hub:
        serve_encoders(hub, folder / "encoders")
        serve_data(hub, corpus, folder / "data")
        process = subprocess.run(
            [sys.executable, "-c", "import sys, test_docs; test_docs.run_pages(sys.argv[1])", str(folder)],
            env=hub.environment(folder / "home")
            | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
            | {"ORT_DISABLE_TELEMETRY": "1"},  # as docs/export.md tells a reader: else onnxruntime calls its maker
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=600,
        )
        assert process.returncode == 0, process.stderr.decode()[-5000:]
    left = {"pushed": hub.files("user/name"), "unknown_requests": hub.unknown_requests}
    (folder / "hub.pickle").write_bytes(pickle.dumps(left))


@pytest.fixture(scope="module")
def story(shared):
    """What the process left: its folder, `pushed`, `unknown_requests`, and the results by page and line."""
    folder = shared("docs", tell_story)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return SimpleNamespace(folder=folder, results=results, **pickle.loads((folder / "hub.pickle").read_bytes()))


def values(story):
    """Every value of an expression: its page, its line, the line's text, the line after it, the value."""
    for page, results in story.results.items():
        lines = ["", *PAGES[page].splitlines()]
        for key, value in results.items():
            if key.startswith("value "):
                number = int(key.removeprefix("value "))
                yield page, number, lines[number], lines[number + 1], value


def values_of(story, fragment):
    """The values of the expressions with `fragment` in them."""
    found = [value for _, _, line, _, value in values(story) if fragment in line]
    assert found, f"no page has an expression with {fragment!r}: this test needs another"
    return found


# --------------------------------------------------------------------------------------------- what the snippets gave


def test_results_have_the_shapes_in_the_comments(story):
    """`# [2, C], ...` behind a tensor; a letter stands for any size."""
    shapes = {
        line: (np.shape(value), re.search(r"# \[([\dA-Z, ]+)\]", line)) for _, _, line, _, value in values(story)
    }
    shapes = {line: (shape, comment[1].split(", ")) for line, (shape, comment) in shapes.items() if comment}
    assert len(shapes) >= 8
    for line, (shape, expected) in shapes.items():
        assert len(shape) == len(expected), line
        for size, name in zip(shape, expected, strict=True):
            assert size > 0 and (name.isalpha() or int(name) == size), line


def test_results_look_like_the_comment_below(story):
    """The entry in `# [{...}]` has the keys of the real ones, and values of the same types."""
    shown = [(below, value) for _, _, _, below, value in values(story) if below.startswith("# [{")]
    assert shown
    for comment, value in shown:
        (example,) = ast.literal_eval(comment.removeprefix("# "))
        assert len(value) == 1
        assert [(name, type(entry)) for name, entry in example.items()] == [
            (name, type(entry)) for name, entry in value[0].items()
        ]
        assert {example["label"], value[0]["label"]} <= set(NAMES)


def pattern(line):
    """A line of output without what differs between models: numbers, labels, yes and no, widths."""
    line = re.sub(rf"\b({'|'.join(NAMES)})\b", "label", line)
    line = re.sub(r"\b(True|False)\b", "flag", re.sub(r"\d[\d.,]*(e-?\d+)?", "0", line))
    return re.sub(r"[\s-]+", " ", line).strip()


def test_the_output_that_is_shown_is_that_of_the_code(story):
    """Every line of a ```text block has its like, in this order, among what the block before it printed."""
    compared = 0
    for page in PAGES:
        for (first_line, _, _), (_, language, shown) in zip(blocks(page), blocks(page)[1:], strict=False):
            if language != "text":
                continue
            printed = iter([pattern(line) for line in story.results[page][str(first_line)]["printed"].splitlines()])
            for line in shown.splitlines():
                assert line == "..." or pattern(line) in printed, f"{page}: {line!r} was not printed"
                compared += 1
    assert compared > 15


def test_pipeline_arguments_do_what_the_comments_say(story):
    (whole,) = values_of(story, 'classifier("clip.wav")  # a path')
    assert sum(entry["score"] for entry in whole) == pytest.approx(1)
    scores = {entry["label"]: entry["score"] for entry in whole}
    assert list(scores.values()) == sorted(scores.values(), reverse=True) and set(scores) == set(NAMES)
    for best in values_of(story, "top_k=1"):
        assert len(best) == 1
    (alone,) = values_of(story, 'allowed_labels=["happy", "sad"]')
    assert {entry["label"] for entry in alone} == {"happy", "sad"}
    for entry in alone:
        assert entry["score"] == pytest.approx(scores[entry["label"]] / (scores["happy"] + scores["sad"]), abs=1e-5)
    ((batched, words_only),) = values_of(story, "batch_size=2")
    assert {entry["label"]: entry["score"] for entry in batched} == pytest.approx(scores, abs=1e-4)
    assert len(words_only) == len(NAMES)
    (times,) = values_of(story, '["timestamp"]  # start and end')
    assert times[0] == 0 and times[1] > 0


def test_the_training_commands_leave_what_the_page_says(story):
    for folder in (
        story.folder / "README/runs/mine",
        story.folder / "train/runs/mine",
        story.folder / "train/runs/best",
    ):
        names = {path.name for path in folder.iterdir()}
        assert {"config.json", "model.safetensors", "README.md", "training_args.json", "trainer_state.json"} <= names
        results = json.loads((folder / "eval_results.json").read_text())
        assert {"validation", "test", "calibration"} <= results.keys()
        assert {"model", "audio_only", "text_only", "linear_probe", "majority"} <= results["test"].keys()
    assert json.loads((story.folder / "train/runs/best/config.json").read_text())["classifier_num_layers"] == 0
    assert json.loads((story.folder / "train/runs/my_voices/eval_results.json").read_text())["adaptation"]["clips"] > 0
    assert [path.name for path in (story.folder / "train").glob("states/*")]


def test_the_evaluation_command_leaves_what_the_page_says(story):
    folder = story.folder / "evaluate" / "runs" / "mine" / "evaluation"
    assert {"report.md", "report.json", "plots"} <= {path.name for path in folder.iterdir()}
    report = json.loads((folder / "report.json").read_text())
    assert list(report["unknown_clips"]) == ["noise_and_music"]
    assert [row["passes"] for row in report["test_time_augmentation"]] == [1, 5]
    assert report["fitted_calibration"]["temperature"] > 0


def test_the_export_commands_leave_what_the_page_says(story):
    small, short = story.folder / "export" / "runs" / "small", story.folder / "export" / "runs" / "short"
    assert (small / "model.onnx").is_file() and not list(small.glob("*.safetensors"))
    assert (short / "model.safetensors").is_file() and not list(short.glob("*.onnx"))


def test_the_prediction_commands_leave_what_the_page_says(story):
    folder = story.folder / "use"
    with open(folder / "answers.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 and {row["answer"] for row in rows} <= {*NAMES, "unknown"}
    assert all(row["text"] and not row["error"] for row in rows)
    columns = [*rows[0], "start", "end", "speaker"]
    said = PAGES["docs/use.md"].split("The columns are", 1)[1].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", said)) - {"unknown", "silence"}
    assert named == {name for name in columns if not name.startswith("score_")}
    (meeting,) = json.loads((folder / "meeting.json").read_text(encoding="utf-8"))
    assert {segment["speaker"] for segment in meeting["segments"]} == {"anna", "ben"}
    assert (folder / "meeting.png").stat().st_size > 10_000 and (folder / "segments.csv").is_file()


def test_the_call_centre_commands_leave_what_the_page_says(story):
    folder = story.folder / "call_centre" / "runs"
    report = json.loads((folder / "calls" / "evaluation" / "report.json").read_text(encoding="utf-8"))
    assert report["split"] == "test"  # of a table without splits: what training held out
    assert set(report["label_names"]) == {"neutral", "verärgert", "traurig", "zufrieden"}
    assert (folder / "calls-small" / "model.safetensors").is_file()


def test_what_was_pushed_is_whole_and_everything_went_through_the_hub(story):
    files = story.pushed
    assert {"config.json", "model.safetensors", "processor_config.json", "modeling_mmser.py"} <= files.keys()
    # Downloaded. Its code is not run here: the pages call `register_auto_classes` before, see `test_hub.py`
    assert (story.folder / "home" / "hub" / "models--user--name").is_dir()
    assert story.unknown_requests == []


def test_every_shell_command_is_known():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    found = [words for page in PAGES for _, _, block in blocks(page, "bash") for words in commands(block)]
    assert len(found) > 15
    for words in found:
        if words[0] == "make":
            assert words[1:] and set(words[1:]) <= set(targets), words
        elif words[0] == "mmser":
            assert words[1] in cli.COMMANDS, words
        else:
            scripts = [word for word in words if word.endswith(".py")]
            assert scripts and all((ROOT / script).is_file() for script in scripts), words


def test_the_metadata_example_is_read_as_it_looks(tmp_path):
    table = block_that_starts("file_name,label,transcription")
    header, *rows = (line.split(",") for line in table.splitlines())
    rows = [dict(zip(header, row, strict=True)) for row in rows]
    for split in ("train", "validation", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "metadata.csv").write_text(table)
        for row in rows:
            soundfile.write(tmp_path / split / row["file_name"], np.zeros(8000), 16000)
    splits, label_names = load_emotion_dataset(tmp_path, allow_speaker_overlap=True)  # it is one table three times
    assert label_names == ["happy", "angry"]
    for split in ("train", "validation", "test"):
        assert len(splits[split]) == len(rows) > 1
        for read, row in zip(splits[split], rows, strict=True):
            assert label_names[read["labels"]] == row["label"]
            assert read["text"] == row["transcription"]
            assert Path(read["audio"]) == tmp_path / split / row["file_name"]
            assert (read["speaker"], read["language"]) == (row["speaker"], row["language"])


# ------------------------------------------------------------------------------------------------ what the pages name


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 180


def test_every_link_points_to_something():
    for page, text in PAGES.items():
        links = re.findall(r"\]\(([^)\s]+)\)", text)
        for link in links:
            path, _, anchor = link.partition("#")
            if "://" in link:
                continue
            target = ((ROOT / page).parent / path) if path else ROOT / page
            assert target.exists(), f"{page}: {link}"
            if anchor:
                titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, link


def known_flags():
    return {flag for kinds in COMMANDS.values() for flag in command_parser(kinds)._option_string_actions}


def test_every_flag_is_one_of_the_command_lines():
    own = {"--nproc_per_node", "--config_file"}  # of torchrun and of Accelerate
    own |= {
        "--nnodes",
        "--node_rank",
        "--master_addr",
        "--master_port",
        "--rdzv_id",
        "--rdzv_backend",
        "--rdzv_endpoint",
    }
    own |= {"--nodes", "--ntasks", "--gpus", "--cpus", "--time", "--requeue"}  # of SLURM, up to a hyphen
    for script in (*ROOT.glob("benchmarks/*.py"), *ROOT.glob("demo/*.py"), *ROOT.glob("mmser/*_command.py")):
        own |= set(re.findall(r'"(--\w+)"', script.read_text(encoding="utf-8")))
    for page, text in PAGES.items():
        flags = set(re.findall(r"(?<![\w-])--\w+", text))
        assert flags <= known_flags() | own, f"{page}: {flags - known_flags() - own}"


def test_arguments_in_the_prose_are_parsed(monkeypatch):
    monkeypatch.chdir(ROOT)
    required = {
        "train_hf": [],
        "eval_hf": ["--checkpoint", "x"],
        "export_hf": ["--checkpoint", "x", "--output_dir", "y"],
        "predict_hf": ["clip.wav", "--checkpoint", "x"],
        "app": ["--checkpoint", "x"],
    }
    parsers = {name: command_parser(kinds) for name, kinds in COMMANDS.items()}
    parsed = 0
    for page, span in all_spans():
        if page == "docs/results.md":  # its flags are those of the benchmarks
            continue
        words = shlex.split(span) if re.match(r"(python )?(--\w+ |\w+_hf\.py )", span) else []
        if not words or "--help" in words:
            continue
        words = words[words[0] == "python" :]
        command = Path(words[0]).stem if words[0].endswith(".py") else ""
        words = words[1:] if command else words
        names = (
            [command] if command else [name for name in parsers if words[0] in parsers[name]._option_string_actions]
        )
        assert names, span
        words = ["--adapt", *words] if words[0].startswith("--adapt_") else words
        arguments = [*words, *required[names[0]]] if words[0].endswith(".json") else [*required[names[0]], *words]
        parse_arguments(COMMANDS[names[0]], arguments)
        parsed += 1
    assert parsed > 15


@functools.cache
def source_code():
    folders = ("*.py", "mmser/*.py", "demo/*.py", "benchmarks/*.py", "tests/*.py", "docs/*.py", "recipes/*.json")
    files = [path for folder in folders for path in ROOT.glob(folder) if path != Path(__file__)]
    files += [ROOT / "Makefile", ROOT / "setup.cfg"]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def test_every_file_in_backquotes_exists():
    """In the repository, or as a name that the code writes or reads; a reader's own folders are left out."""
    source, checked = source_code(), 0
    for page, span in all_spans():
        if re.fullmatch(
            r"[\w./-]+(\.(py|md|json|csv|svg|yaml|safetensors|onnx|wav|flac)|/)", span
        ) and not YOURS.match(span):
            is_known = (ROOT / span).exists() or Path(span).name in source or (ROOT / "docs" / span).exists()
            assert is_known, f"{page}: {span}"
            checked += 1
    assert checked > 80


def test_every_name_in_backquotes_is_in_the_code():
    """Classes, functions, options: each word in backquotes must still be written in the source, or in Transformers."""
    names, written = {}, set(re.findall(r"\w+", source_code()))
    for page, span in all_spans():
        if re.fullmatch(r"\w+|\w+\.\w+(\(\))?", span) and not span.endswith((".py", ".md", ".json", ".wav", ".csv")):
            names.setdefault(span.removesuffix("()").split(".")[-1], page)
    assert len(names) > 100
    gone = [
        f"{page}: {name}"
        for name, page in names.items()
        if not (name in written or hasattr(transformers, name) or name in OUTSIDE)
    ]
    assert gone == []


def rows_of_files():
    """The tables of files in architecture.md: the file, the names that its job mentions, what it imports of ours."""
    for line in PAGES["docs/architecture.md"].splitlines():
        if re.match(r"\| `[\w/]+\.(py|md)` \|", line):
            cells = [re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split("|")]
            yield cells[0][0], cells[1], cells[2] if len(cells) > 2 else None


def test_the_table_of_files_is_complete_and_true():
    rows = list(rows_of_files())
    named = [name for name, _, _ in rows]
    existing = [*ROOT.glob("*.py"), *ROOT.glob("mmser/*.py"), *ROOT.glob("mmser/*.md")]
    assert sorted(named) == sorted(str(path.relative_to(ROOT)) for path in existing)
    for name, contents, _ in rows:
        if name.endswith(".py"):
            module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
            for word in contents:
                owned = word in source_code() if word.endswith((".py", ".md", ".json")) else hasattr(module, word)
                assert owned, f"{name}: {word}"


def test_the_imports_in_the_table_are_those_of_the_files():
    own = {path.stem for path in ROOT.glob("*.py")} | {"mmser"}
    for name, _, said in rows_of_files():
        if said is not None:
            tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
            modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            assert {module.split(".")[0] for module in modules} & own == set(said), name


def test_the_picture_is_that_of_the_default_configuration():
    specification = importlib.util.spec_from_file_location("draw_architecture", ROOT / "docs" / "draw_architecture.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert module.PICTURE.read_text(encoding="utf-8") == module.draw(module.MMSERConfig())


def test_what_is_said_about_installing():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    said = re.search(r"with extras\s(.*?)\.", prose("README.md"), re.DOTALL)[1]
    extras = re.findall(r"`(\w+)`", said)
    assert extras and set(extras) <= set(setup["options.extras_require"])
    assert re.search(r"Python ([\d.]+) or newer", PAGES["README.md"])[1] in setup["options"]["python_requires"]


def test_every_flag_of_training_is_in_one_table_with_its_cost_and_gain():
    page = PAGES["docs/train.md"].split("## Flags", 1)[1].split("\n## ", 1)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")
    ]
    assert all(len(row) == 4 for row in rows)
    of_others = [row for row in rows if re.fullmatch(r"`\w+_hf\.py`", row[1])]
    rows = [row for row in rows if row not in of_others]
    listed = [flag for row in rows for flag in re.findall(r"`--(\w+)`", row[0])]
    own = {field.name for group in TRAINING_ARGUMENTS for field in dataclasses.fields(group)}
    aliases = {"epochs", "batch_size", "lr"}
    assert own - set(listed) == set()
    assert set(listed) - own == aliases
    assert sorted(listed) == sorted({*own, *aliases})  # each once
    for flag, *others in rows:
        if "`" in flag:
            assert all(others), flag
    config = {field.name for field in dataclasses.fields(MMSERConfig)}
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert named and named <= config
    losses = {name for name in config if name.endswith("_loss_weight")}
    assert losses - named == {"auxiliary_loss_weight"}  # which is --auxiliary_weight
    assert of_others
    for flag, script, *others in of_others:
        fields = {field.name for group in COMMANDS[script.strip("`")[:-3]] for field in dataclasses.fields(group)}
        assert flag.strip("`").split()[0].removeprefix("--") in fields and all(others), flag
