# SPDX-License-Identifier: Apache-2.0
"""Tests of words of a stranger: labels, corpora, transcripts and recipes are shown and read, and never run."""

import html.parser
import json
import re

import pytest
from huggingface_hub import ModelCard
from test_model_card import make_results, scores, train_table
from test_report import make_measured, write
from tiny import tiny_model

import train_hf
from mmser import app_html
from mmser.arguments import DataArguments
from mmser.flags import FlagParser, parse_json
from mmser.model_card import write_model_card
from mmser.prediction_inputs import Input
from mmser.prediction_run import Prediction, Segment
from mmser.prediction_screen import Screen, show
from mmser.results import describe_data, environment
from mmser.tables import format_table, harmless

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
