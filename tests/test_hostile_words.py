# SPDX-License-Identifier: Apache-2.0
"""Tests of words of a stranger: labels, corpora, transcripts and recipes are shown and read, and never run."""

import csv
import html.parser
import io
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from huggingface_hub import ModelCard
from test_model_card import make_results, scores, train_table
from test_report import make_measured, write
from tiny import tiny_model

import predict_hf
import train_hf
from mmser import app_html
from mmser.arguments import DataArguments
from mmser.bad_rows import BadRows
from mmser.console import BesideBars
from mmser.flags import FlagParser, parse_json
from mmser.labels import choose_label_names, gather_labels, label_key
from mmser.loading import load_emotion_dataset
from mmser.model_card import write_model_card
from mmser.prediction_arguments import default_checkpoint
from mmser.prediction_files import content as file_of
from mmser.prediction_inputs import Input
from mmser.prediction_run import Prediction, Segment
from mmser.prediction_screen import Screen, show
from mmser.results import describe_data, environment
from mmser.sources import DataColumns
from mmser.table_files import as_text, from_text, read_rows
from mmser.tables import format_table, harmless

DRAWS = True  # see the fixture `pictures`
EVIL = [
    "{{ 7 * 7 }}{% raw %}{{ cycler.__init__.__globals__.os.system('x') }}",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "x\n---\nlicense: evil\n---\n# Taken over\n```\n![p](https://example.invalid/p.png)",
    "$\\frac{a$ | !!python/object/apply:os.system ['x'] \x1b]0;title\x07\x1b[31m ${7*7} %(x)s {0.__class__}",
]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def check_page(text):
    """No tag, picture, heading or fence comes of the words, and nothing that a template would make of them."""
    prose = re.sub(r"<!-- Written by MMSER .*-->", "", text)
    assert not re.search(r"<[a-zA-Z/!?]", prose), re.search(r".*<[a-zA-Z/!?].*", prose)
    assert "![p]" not in text and "\x1b" not in text and "\x07" not in text
    assert "# Taken over" not in [line.strip() for line in text.splitlines()]
    assert text.count("\n```") % 2 == 0
    assert "{{ 7 * 7 }}" in text and "cycler.__init__" in text  # as they are written, and not what they would be


@pytest.mark.parametrize("place", ["labels", "groups and names"])
def test_a_model_card_holds_words_and_runs_none(tmp_path, place):
    model = tiny_model(num_labels=4)
    if place == "labels":
        results = make_results(model, EVIL)
    else:
        data = describe_data(EVIL[1], {"train": train_table(42, language=[EVIL[0], "en"] * 21)})
        rows = scores(["a", "b", "c", "d"], language=EVIL[:2] * 21, corpus=[EVIL[2], EVIL[3], "z"] * 14)
        results = make_results(model, ["a", "b", "c", "d"], data=data, test=rows, model_name=EVIL[0])
        results |= {"license": EVIL[2], "encoders": {"audio": EVIL[3], "text": EVIL[2]}}
    model.save_pretrained(tmp_path)
    text = write_model_card({**results, "command": "mmser train", "environment": environment()}, tmp_path).read_text(
        encoding="utf-8"
    )
    body = re.fullmatch(r"---\n.*?\n---\n(.*)", text, re.DOTALL)[1]
    metadata = ModelCard(text).data.to_dict()
    assert metadata["library_name"] == "transformers" and metadata["license"] != "evil"
    check_page(body)


@pytest.mark.parametrize("place", ["labels", "groups and names"])
def test_a_report_holds_words_and_runs_none(tmp_path, place):
    pytest.importorskip("matplotlib")
    if place == "labels":
        text, stored = write(make_measured(label_names=EVIL), tmp_path)
        assert stored["label_names"] == EVIL  # for programs, as they are
    else:
        unknown = {
            name: outputs for name, outputs in zip(EVIL[1:3], make_measured().unknown_sets.values(), strict=True)
        }
        measured = make_measured(groups={"language": EVIL * 30}, unknown_sets=unknown)
        text, _ = write(measured, tmp_path, data={"name": EVIL[0], "languages": EVIL}, model_name=EVIL[1])
    check_page(text)
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert pictures and [name for name in pictures if not (tmp_path / name).is_file()] == []
    assert {(tmp_path / name).resolve().parent for name in pictures} == {tmp_path / "plots"}


class Tags(html.parser.HTMLParser):
    """All tags of a page, and the names of their attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


@pytest.mark.parametrize("word", EVIL)
def test_the_page_shows_labels_names_transcripts_and_errors_as_text(word):
    scores = [{"label": word, "score": 0.7}, {"label": "b", "score": 0.3}]
    scores = [{**one, "uncertainty": 0.2, "unknown_probability": 0.1, "is_unknown": False} for one in scores]
    segment = Segment(0.0, 1.0, scores, text=word)
    predictions = [Prediction(Input(word, text=word), scores, [segment]), Prediction(Input("b", error=word))]
    pages = [
        app_html.answer_to_one(predictions[0], True, [word]),
        app_html.over_time(predictions[0], b"", b""),
        app_html.table_of_many(predictions, b""),
        app_html.error(word),
    ]
    for page in pages:
        found = Tags(page)
        assert not found.tags & {"script", "iframe", "object", "svg", "form"}
        assert not {name for name in found.attributes if name.startswith("on")}
        assert ("img" in found.tags) == (page is pages[1])
        assert "{{" not in page and "${" not in page  # nothing for a template of the page either


def test_words_cannot_steer_a_terminal():
    scores = [{"label": EVIL[3], "score": 1.0, "uncertainty": 0.2, "unknown_probability": 0.1, "is_unknown": False}]
    clip = Prediction(Input("a\x1b]0;t\x07\x9b31m.wav"), scores, [])
    shown = [show([clip], False, Screen(80, True)), show([clip, clip], False, Screen(80, True))]
    shown.append(format_table([{"a": EVIL[3]}], ["a"]))
    assert all("31m" in text and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text) for text in shown)


def test_harmless_keeps_what_can_be_read():
    for word in ("very_happy", "a < b", "R&B", "*", "می‌خواهم", "喜び", "👨‍👩‍👧", "x | y", "50 %"):
        assert harmless(word) == word
    assert harmless({"a<b>": ["<i>", 1, None]}) == {"a&lt;b>": ["&lt;i>", 1, None]}
    assert harmless(harmless("<i>")) == harmless("<i>")


@pytest.mark.parametrize(
    "word", ["__import__('os').system('touch {}')", "!!python/object/apply:os.system ['touch {}']"]
)
def test_a_recipe_is_read_and_never_run(tmp_path, word, quiet):
    """Neither as a value, nor as a key, nor as the recipe itself."""
    owned = tmp_path / "owned"
    word = word.format(owned)
    recipe = tmp_path / "recipe.json"
    words = [{"output_dir": word}, {"config_overrides": word}, {"lr": word}, {word: 1}, word]
    for content in (
        *words,
        {"labels": [word, "b"], "data_dir": str(tmp_path / "none"), "output_dir": str(tmp_path / "o")},
    ):
        recipe.write_text(content if content is word else json.dumps(content), encoding="utf-8")
        with pytest.raises((ValueError, SystemExit, OSError)):
            train_hf.main([str(recipe)])
        assert not owned.exists()
        if content is word:
            with pytest.raises(ValueError, match="is not JSON"):
                parse_json(recipe.read_text(), "recipe.json")
    parser = FlagParser([DataArguments])
    with pytest.raises(ValueError, match="unknown key"):
        parser.set_recipe({word: 1}, "recipe.json")


FORMULAS = ["=1+1", "+A1", "-A1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "'=1", "''-x", "\uff1d1+1", "=", "-1 apple"]
NO_FORMULAS = ["-1", "+1.5e3", "-inf", "a=b", "'tis", "''", "", "don't - really", "1-1", " "]


@pytest.mark.parametrize("word", FORMULAS + NO_FORMULAS)
def test_words_are_no_formula_in_a_spreadsheet_and_are_read_as_they_were(word, tmp_path):
    cell = as_text(word)
    assert (cell == word) == (word in NO_FORMULAS) and from_text(cell) == word
    assert cell.startswith("'") or word in NO_FORMULAS
    scores = [{"label": "=b", "score": 1.0, "uncertainty": 0.2, "unknown_probability": 0.1, "is_unknown": False}]
    prediction = Prediction(Input(word, text=word, seconds=-2.0, error=word), scores, [])
    (tmp_path / "a.csv").write_bytes(file_of([prediction], ["=b"], "csv", False))
    (row,) = csv.DictReader(io.StringIO((tmp_path / "a.csv").read_bytes().decode(), newline=""))
    assert [row[name] for name in ("file", "text", "error", "label", "seconds")] == [cell, cell, cell, "'=b", "-2.0"]
    ((_, read),) = read_rows(tmp_path / "a.csv", "a.csv", [])
    assert [read[name] for name in ("file", "text", "error", "label")] == [word, word, word, "=b"]
    rule = BadRows("skip", 1.0)
    rule.list_in(tmp_path)
    rule.report([f"{word} row 3"], loaded=1)
    listed = list(csv.reader(io.StringIO(rule.write().read_bytes().decode(), newline="")))
    assert listed == [["problem"], [as_text(f"{word} row 3")]]


def test_answers_about_files_with_such_names_are_found_again(tmp_path, monkeypatch, capsys):
    """By --output_dir, which looks at its parts, and as --transcripts."""
    monkeypatch.chdir(tmp_path)
    names = ["=1+1.wav", "-a.wav", "'=b.wav"]
    for number, name in enumerate(names):
        soundfile.write(tmp_path / name, 0.1 * np.sin((1 + number) * np.arange(8000)), 16_000)
    (tmp_path / "words.jsonl").write_text("\n".join(json.dumps({"file_name": name, "text": name}) for name in names))
    common = ["*.wav", "--checkpoint", str(default_checkpoint()), "--format", "csv"]
    words = [*common, "--output_dir", "out", "--transcripts", "words.jsonl"]
    predict_hf.main(words)
    assert "note" not in capsys.readouterr().err
    predict_hf.main(words)
    assert "made again" not in capsys.readouterr().err
    predict_hf.main([*common, "--output", "again.csv", "--transcripts", "out/answers.csv", "--audio_column", "file"])
    assert "without a text" not in capsys.readouterr().err
    first, second = ([row for _, row in read_rows(Path(name), name, [])] for name in ("out/answers.csv", "again.csv"))
    assert [row["file"] for row in first] == [row["text"] for row in second] == sorted(names)
    assert first == second


@pytest.mark.parametrize("mark", ["\u202e", "\u200b", "\n", "\u2028", "\x1b[31m", "\ufeff", "\u00ad"])
def test_a_label_holds_nothing_that_cannot_be_seen(tmp_path, mark, quiet):
    said = rf"'hap{re.escape(repr(mark)[1:-1])}py' holds U\+{ord(mark[0]):04X}, which cannot be seen: remove it"
    rows = [{"file_name": f"{n}.wav", "label": ("sad", f"hap{mark}py")[n % 2], "text": "a"} for n in range(8)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = DataColumns(audio=None, text="text")
    with pytest.raises(ValueError, match=rf"metadata\.jsonl row 2: the label {said}"):
        load_emotion_dataset(tmp_path, columns=columns)
    with pytest.raises(ValueError, match=rf"^the label name {said}"):
        choose_label_names(["sad", f"hap{mark}py"])
    tasks = json.dumps({"mood": ["low", f"hap{mark}py"]})
    with pytest.raises(ValueError, match=rf"^--auxiliary_tasks: mood has a class, and its name {said}$"):
        train_hf.main(["--data_dir", str(tmp_path), "--auxiliary_tasks", tasks, "--output_dir", str(tmp_path / "o")])


def test_words_that_are_joined_by_a_mark_are_labels_once():
    word = "می\u200cخواهم"  # noqa: RUF001
    assert gather_labels([(word, "row 1")]) and label_key(word) == label_key(word.replace("\u200c", ""))
    with pytest.raises(ValueError, match="labels differ only in case or spaces"):
        choose_label_names(None, found={"glu\u200dm": ["row 1"], "glum": ["row 2"], "x": ["row 3"]})


def test_what_is_logged_cannot_steer_a_terminal(capsys):
    record = logging.LogRecord("mmser.loading", logging.WARNING, "", 0, "speaker %s", ("a\x1b]0;t\x07\u202eb",), None)
    BesideBars().emit(record)
    assert capsys.readouterr().err.strip() == "warning: speaker a ]0;t b"
