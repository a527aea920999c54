# SPDX-License-Identifier: Apache-2.0
"""Tests of `mmser app`: what the page says is what the pipeline says, and every mistake is a sentence in it.

Most need no browser and no Gradio. The last ones serve the page: to a client of Gradio and, where playwright and
Chromium are installed, to a real browser (`pip install playwright`, `apt install chromium`).
"""

import base64
import csv
import importlib.util
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
import torch
from tiny import fit_openmax_by_chance, randomize
from tiny_corpus import RATE, tiny_model, tiny_processor
from transformers import pipeline

from audio_mmser import load_audio
from mmser import app_examples, app_html, app_page, cli
from mmser.app_answers import Answers, envelope
from mmser.app_arguments import APP_ARGUMENTS
from mmser.arguments import parse_arguments
from modeling_mmser import register_auto_classes

DRAWS = True  # see the fixture `pictures`
TEXT = "what a joy"
CHUNKS = {"chunk_length_s": 6, "stride_length_s": 1, "return_uncertainty": True}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def tone(seconds, pitch, level=0.4, rate=RATE):
    return (level * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, its pipeline, what the page answers with it, and recordings."""
    folder = tmp_path_factory.mktemp("app")
    torch.manual_seed(3)
    model = randomize(tiny_model(dropout=False)).eval()
    fit_openmax_by_chance(model)
    for part in (model, tiny_processor()):
        part.save_pretrained(folder / "model")
    recordings = {
        "clip.wav": tone(0.4, 300),
        "other.wav": tone(0.3, 900),
        "<b>${1+1} {{x}}.wav": tone(0.3, 500),
        "long.wav": np.concatenate([tone(9, 200), tone(9, 900, 0.1), tone(3.3, 400)]),
        "endless.wav": tone(31, 200),
        "empty.wav": np.zeros(0),
        "silent.wav": tone(1, 200, 1e-4),
        "against.wav": np.stack([tone(1, 200), -tone(1, 200)], axis=1),
    }
    for name, samples in recordings.items():
        soundfile.write(folder / name, samples, RATE, subtype="FLOAT")
    (folder / "notes.wav").write_text("no audio, but words")
    register_auto_classes()
    classifier = pipeline("audio-classification", model=str(folder / "model"))
    answers = Answers(classifier, str(folder / "model"), max_seconds=30)
    return SimpleNamespace(folder=folder, classifier=classifier, answers=answers)


def read(html):
    """The answer as XML, which it also is; nothing that came from a user may break it."""
    return ElementTree.fromstring(f"<page>{html}</page>")


def words(element):
    return " ".join("".join(element.itertext()).split())


def rows(page, caption):
    """The cells of the body of a table."""
    (table,) = [table for table in page.iter("table") if table.findtext("caption") == caption]
    return [[words(cell) for cell in row if "aria-hidden" not in cell.attrib] for row in table.find("tbody")]


def shown(scores):
    return [[entry["label"], f"{entry['score']:.3f}"] for entry in scores]


def link(page, name):
    """The rows of the CSV file that a link holds."""
    (found,) = [element for element in page.iter("a") if element.get("download") == name]
    kind, _, content = found.get("href").partition(",")
    assert kind == "data:text/csv;base64"
    return list(csv.DictReader(io.StringIO(base64.b64decode(content).decode())))


# --- one recording ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "text"), [("clip.wav", TEXT), ("clip.wav", None), (None, f" {TEXT} ")])
def test_the_scores_are_those_of_the_pipeline(place, name, text):
    path = str(place.folder / name) if name else None
    item = {**({"path": path} if path else {}), **({"text": text.strip()} if text else {})}
    scores = place.classifier(item, return_uncertainty=True)
    page = read(place.answers.one(path, text))
    assert rows(page, "Scores") == shown(scores)
    best = scores[0]
    answer = f"none of these (nearest: {best['label']})" if best["is_unknown"] else best["label"]
    assert words(page.find(".//h2")) == f"{name or f'“{TEXT}”'}: {answer}"
    said = words(page)
    assert f"Uncertainty {best['uncertainty']:.3f}: of 100 answers" in said
    assert f"{best['unknown_probability']:.3f}" in said


def test_none_of_these_in_words(place, monkeypatch):
    config, path = place.classifier.model.config, str(place.folder / "clip.wav")
    probability = place.classifier(path, return_uncertainty=True)[0]["unknown_probability"]
    said = {}
    for threshold in (0.0, None):
        monkeypatch.setattr(config, "openmax_threshold", threshold)
        said[threshold] = words(read(place.answers.one(path)))
    assert f"None of these: yes, with probability {probability:.3f}." in said[0.0]
    assert re.search(r"clip\.wav: none of these \(nearest: \w+\)", said[0.0])
    assert "this model does not tell (rejection is switched off)" in said[None]
    entry = {"label": "happy", "unknown_probability": None, "is_unknown": None}
    assert "it was never fitted to" in app_html.about_unknown([entry, {"label": "sad"}], rejects=True)
    entry |= {"unknown_probability": 0.25, "is_unknown": False}
    no = app_html.about_unknown([entry, {"label": "sad"}], rejects=True)
    assert no == "None of these: no. The probability that it is none of happy and sad is 0.250."


def test_a_long_recording_over_time(place):
    path = str(place.folder / "long.wav")
    expected = place.classifier(path, **CHUNKS)
    page = read(place.answers.one(path, TEXT))
    assert rows(page, "Mean scores over time") == shown(expected["scores"])
    segments, table = rows(page, "Segments"), link(page, "segments.csv")
    assert len(segments) == len(table) == len(expected["chunks"]) > 3
    for row, line, chunk in zip(segments, table, expected["chunks"], strict=True):
        best = chunk["scores"][0]
        assert best["label"] in row[2] and row[3:] == [f"{best['score']:.3f}", f"{best['uncertainty']:.3f}"]
        assert [float(line["start"]), float(line["end"])] == pytest.approx(chunk["timestamp"])
        for entry in chunk["scores"]:
            assert float(line[f"score_{entry['label']}"]) == pytest.approx(entry["score"], abs=1e-5)
    assert "What is said is left out" in words(page)
    picture = page.find(".//img")
    assert picture.get("alt").startswith("Timeline of long.wav. Of the time: ")
    assert base64.b64decode(picture.get("src").partition("base64,")[2]).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (None, "There is nothing to classify: record or upload a recording, or write what is said."),
        ("notes.wav", r"notes.wav cannot be classified: cannot be read as audio \(.*\.\Z"),
        ("empty.wav", "empty.wav cannot be classified: empty, the file holds no samples."),
        ("silent.wav", "silent.wav cannot be classified: nothing can be heard in it: .* -80 dB of full scale."),
        ("against.wav", "against.wav cannot be classified: nothing can be heard in it: its channels cancel .*"),
        ("endless.wav", "endless.wav cannot be classified: it lasts 0:31, and this page takes at most 0:30."),
    ],
)
def test_a_mistake_is_a_sentence(place, name, said):
    page = read(place.answers.one(str(place.folder / name) if name else None, "  "))
    (alert,) = page.iter("p")
    assert alert.get("role") == "alert" and re.fullmatch(said, words(alert))
    assert str(place.folder) not in words(page)


def test_names_and_words_are_no_code(place):
    html = place.answers.one(str(place.folder / "<b>${1+1} {{x}}.wav"), "<i>")
    assert words(read(html).find(".//h2")).startswith("<b>${1+1} {{x}}.wav: ")
    assert "${" not in html and "{{" not in html
    assert words(read(place.answers.one(None, "<i>{{x}}")).find(".//h2")).startswith("“<i>{{x}}”: ")


# --- many recordings -------------------------------------------------------------------------------------------------


def test_many_recordings_are_a_table_and_a_file(place):
    names = ["clip.wav", "notes.wav", "long.wav", "endless.wav", "other.wav"]
    page = read(place.answers.many([str(place.folder / name) for name in names]))
    shown_rows, table = rows(page, "Answers"), link(page, "answers.csv")
    assert [row[0] for row in shown_rows] == [line["file"] for line in table] == names
    for name, row, line in zip(names, shown_rows, table, strict=True):
        if name in ("notes.wav", "endless.wav"):
            assert row[1].rstrip(".") == f"not classified: {line['error']}".rstrip(".") and line["label"] == ""
            continue
        path = str(place.folder / name)
        scores = (
            place.classifier(path, **CHUNKS)["scores"]
            if name == "long.wav"
            else place.classifier(path, return_uncertainty=True)
        )
        assert row[2:] == [f"{scores[0]['score']:.3f}", f"{scores[0]['uncertainty']:.3f}"]
        assert line["label"] == scores[0]["label"] and not line["error"]
    assert re.search(r"3 inputs classified: .*; 2 could not be classified\.", words(page))
    assert "choose some recordings" in words(read(place.answers.many([])))


# --- its parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_the_outline_is_that_of_the_samples(tmp_path, rate):
    rng = np.random.default_rng(0)
    samples = rng.normal(size=round(11.03 * rate)) * np.linspace(0.01, 0.2, round(11.03 * rate))
    soundfile.write(tmp_path / "x.wav", samples, rate, subtype="FLOAT")
    whole = load_audio(tmp_path / "x.wav")
    exact = envelope(str(tmp_path / "x.wav"), points=10**6)
    frames = [whole[start : start + 320] for start in range(0, len(whole), 320)]
    np.testing.assert_allclose(exact, [(frame.min(), frame.max()) for frame in frames], atol=1e-6)
    few = envelope(str(tmp_path / "x.wav"), points=100)
    assert few.shape == (100, 2) and few[:, 0].min() == exact[:, 0].min() and few[:, 1].max() == exact[:, 1].max()
    quarters = few[:, 1].reshape(4, 25).max(axis=1)
    assert (np.diff(quarters) > 0).all()  # it gets louder


def test_examples_are_made_of_the_synthetic_corpus():
    pytest.importorskip("espeakng_loader")
    with app_examples.made() as (examples, reason):
        assert reason == ""
        titles = [example.title for example in examples]
        assert titles == ["acted angry", "acted happy", "acted neutral", "acted sad", "noise", "a long recording"]
        seconds = [soundfile.info(example.path).duration for example in examples]
        assert max(seconds[:-1]) < 3 and 20 < seconds[-1] < 60
        assert [bool(example.text) for example in examples] == [True] * 4 + [False] * 2
    assert not any(Path(example.path).exists() for example in examples)


def test_without_examples_there_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(app_examples, "SCRIPT", tmp_path / "synthesize_corpus.py")
    with app_examples.made() as (examples, reason):
        assert examples == [] and "this is an installation alone" in reason
    (tmp_path / "synthesize_corpus.py").write_text(
        "import sys; sys.exit('error: the engine is missing: pip install x')"
    )
    with app_examples.made() as (examples, reason):
        assert (examples, reason) == ([], "There are no examples: the engine is missing: pip install x.")


def test_the_command_says_what_is_missing(monkeypatch, place):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"The page needs Gradio: `pip install \"mmser\[app\]\"`"):
        cli.main(["app", "--checkpoint", str(place.folder / "model")])


@pytest.mark.parametrize(("flag", "value"), [("--port", "70000"), ("--max_minutes", "0")])
def test_flags_that_make_no_sense(flag, value, place):
    with pytest.raises(ValueError, match=rf"{flag} must be .*, got {value}"):
        parse_arguments(APP_ARGUMENTS, ["--checkpoint", str(place.folder / "model"), flag, value])


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(place):
    """Where the page is served."""
    pytest.importorskip("gradio")
    example = app_examples.Example("a clip", str(place.folder / "clip.wav"), TEXT)
    with app_page.own_folder():
        page = app_page.make_page(place.answers, [example])
        _, address, _ = page.launch(**app_page.settings(), server_name="127.0.0.1")
        yield address
        page.close()
        kept = Path(os.environ[app_page.FOLDER])
    assert not kept.exists()


def test_the_page_answers_as_its_functions_do(place, address):
    import gradio_client

    client = gradio_client.Client(address, verbose=False, analytics_enabled=False)
    files = [str(place.folder / name) for name in ("clip.wav", "notes.wav")]
    clip, notes = map(gradio_client.handle_file, files)
    assert client.predict(clip, TEXT, api_name="/classify") == place.answers.one(files[0], TEXT)
    assert client.predict(None, "", api_name="/classify") == place.answers.one(None)
    assert client.predict([clip, notes], api_name="/classify_many") == place.answers.many(files)


def test_the_page_takes_no_file_without_end(place, monkeypatch):
    pytest.importorskip("gradio")
    import httpx

    monkeypatch.setattr(app_page, "MAX_UPLOAD", 5000)
    with app_page.own_folder():
        page = app_page.make_page(place.answers)
        _, address, _ = page.launch(**app_page.settings(), server_name="127.0.0.1")
        found = [
            httpx.post(f"{address}gradio_api/upload", files={"files": ("a.wav", bytes(size))}, trust_env=False)
            for size in (4000, 6000)
        ]
        page.close()
    assert [answer.status_code for answer in found] == [200, 413]


@pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None, reason="there is no Chromium, or no playwright"
)
def test_in_a_browser_by_the_keyboard_on_a_phone(place, address):
    """Nothing is asked of other machines, nothing is wider than the screen, and the numbers are the pipeline's."""
    from playwright.sync_api import sync_playwright

    asked = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.on("request", lambda request: asked.append(request.url))
        page.on("filechooser", lambda chooser: chooser.set_files(str(place.folder / "long.wav")))
        page.goto(address)
        page.get_by_role("button", name="Classify", exact=True).wait_for()

        def answer(start):
            page.wait_for_function(f"document.querySelector('#answer')?.innerText.startsWith({json.dumps(start)})")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            return (
                page.locator("#answer table")
                .first.locator("tr")
                .evaluate_all("rows => rows.map(row => [row.cells[0].innerText, row.cells[2].innerText])")
            )

        def press(name, key="Enter"):
            for _ in range(40):
                page.keyboard.press("Tab")
                focus = "(e => e.getAttribute('aria-label') || e.innerText)(document.activeElement)"
                if page.evaluate(focus).startswith(name):
                    page.keyboard.press(key)
                    return
            pytest.fail(f"the keyboard does not reach {name}")

        press("Classify")
        page.get_by_role("alert").wait_for()
        assert page.get_by_role("alert").inner_text().startswith("There is nothing to classify")
        press("Drop an audio file")
        page.get_by_label("Clear").wait_for()
        press("Classify")
        assert answer("long.wav: ") == shown(place.classifier(str(place.folder / "long.wav"), **CHUNKS)["scores"])
        assert page.get_by_role("region", name="Timeline").get_by_role("img").is_visible()
        press("A clip", "Space")
        clip = {"path": str(place.folder / "clip.wav"), "text": TEXT}
        assert answer("clip.wav: ") == shown(place.classifier(clip))
        browser.close()
    assert len(asked) > 10
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
