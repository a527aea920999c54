# SPDX-License-Identifier: Apache-2.0
"""Tests of mmser.publishing and mmser.push_command: a run becomes a page on a Hub of this machine."""

import ast
import configparser
import functools
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import test_hub
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard
from pictures import DOT

from mmser import cli, publishing
from mmser.model_card import is_own_card
from mmser.publishing import check_metadata, complete_page, publish

ROOT = Path(__file__).parents[1]
SMALL = ROOT / "checkpoints" / "mmser-small"
GOOD = {"license": "cc-by-4.0", "language": ["de", "en"], "pipeline_tag": "audio-classification"}


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as hub:
        api = functools.partial(HfApi, endpoint=hub.endpoint)
        monkeypatch.setattr(publishing, "HfApi", lambda token: api(token=token or "hf_any"))
        yield hub
        assert hub.unknown_requests == []


@pytest.fixture
def run(shared, tmp_path):
    """The folder of a finished run, with the plots of an evaluation."""
    finished = shared("hub", test_hub.tell_story) / "author" / "run"
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "evaluation" / "plots").mkdir(parents=True)
    (folder / "evaluation" / "plots" / "confusion_matrix.png").write_bytes(DOT)
    (folder / "evaluation" / "report.md").write_text("# Report\n")
    for name in ("optimizer.pt", "weights.bin", ".secret", "_draft.md"):
        (folder / name).write_bytes(b"no")
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def card_of(files):
    return ModelCard(files["README.md"].decode(), ignore_metadata_errors=False)


def test_a_run_becomes_a_complete_page(hub, run):
    before = contents(run)
    metadata = {"license": "cc-by-nc-4.0", "language": ["de", "en"]}
    sizes, notes, address = publish(run, "me/page", metadata, private=True)
    assert contents(run) == before
    files = hub.files("me/page")
    assert {path: len(content) for path, content in files.items()} == sizes and address.endswith("/me/page")
    assert hub.repositories["model", "me/page"].is_private and notes == []
    assert {"model.safetensors", "processor_config.json", "eval_results.json", *test_hub.CODE_FILES} <= files.keys()
    assert files["handler.py"] == (ROOT / "mmser" / "handler.py").read_bytes()
    assert not any(path.endswith(test_hub.PICKLES) or "checkpoint-" in path for path in files)
    assert not {".secret", "_draft.md"} & files.keys()
    assert files["evaluation/plots/confusion_matrix.png"] == DOT and "evaluation/report.md" in files

    card, results = card_of(files), json.loads(files["eval_results.json"])
    data = card.data
    assert (data.license, data.language, data.library_name) == ("cc-by-nc-4.0", ["de", "en"], "transformers")
    assert data.pipeline_tag == "audio-classification" and data.metrics == ["f1", "recall", "accuracy"]
    assert data.datasets == ["me/data"] and data.base_model is None  # the encoders started at random
    scores = {result.metric_type: result.metric_value for result in data.eval_results}
    row = results["test"]["model"]
    expected = {"f1": "weighted_f1", "recall": "unweighted_average_recall", "accuracy": "accuracy"}
    assert scores == {kind: pytest.approx(row[name], abs=1e-4) for kind, name in expected.items()}
    assert {result.dataset_split for result in data.eval_results} == {"test"} and data.model_name == "me/page"
    assert 'model="me/page"' in card.text and "me/mmser-tiny" not in card.text.split("## Training")[0]
    assert "![confusion matrix](evaluation/plots/confusion_matrix.png)" in card.text
    (run / "README.md").write_bytes(files["README.md"])
    assert is_own_card(run / "README.md")


def test_the_curves_of_the_training_are_on_the_page(run, tmp_path):
    (run / "training_curves.png").write_bytes(DOT)
    page = complete_page(run, tmp_path / "page", "me/page")
    files = contents(page.folder)
    assert files["training_curves.png"] == DOT
    shown = card_of(files).text.split("## Plots")[1]
    assert shown.index("(training_curves.png)") < shown.index("(evaluation/plots/confusion_matrix.png)")
    shutil.rmtree(run / "evaluation")
    page = complete_page(run, tmp_path / "other", "me/page")
    assert any(note.startswith("no plots") for note in page.notes), "of an evaluation there are none"


def test_files_of_a_run_name_no_folders_of_this_machine(hub, run):
    for name in ("trainer_state.json", "training_args.json"):
        content = {"best_model_checkpoint": str(run / "checkpoint-8"), "more": [{"output_dir": str(run)}], "step": 3}
        (run / name).write_text(json.dumps(content))
    publish(run, "me/page")
    files = hub.files("me/page")
    for name in ("trainer_state.json", "training_args.json"):
        expected = {"best_model_checkpoint": "checkpoint-8", "more": [{"output_dir": run.name}], "step": 3}
        assert json.loads(files[name]) == expected
    assert not [path for path, content in files.items() if str(run.parent).encode() in content]


def test_pushing_a_page_again_changes_nothing(hub, run, tmp_path):
    publish(run, "me/page", {"license": "mit"})
    first = hub.files("me/page")
    for path, content in first.items():
        (tmp_path / "again" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "again" / path).write_bytes(content)
    publish(tmp_path / "again", "me/page", {"license": "mit"})
    assert hub.files("me/page") == first


def test_what_a_person_wrote_stays(run, tmp_path):
    (run / "README.md").write_text('---\ntags: [mine]\n---\n\n# My words\n\nmodel="run"\n')
    page = complete_page(run, tmp_path / "page", "me/page")
    card = card_of(contents(page.folder))
    assert card.text.strip() == '# My words\n\nmodel="me/page"'
    assert card.data.tags == ["mine", "speech-emotion-recognition", "mmser"]
    assert card.data.pipeline_tag == "audio-classification" and len(card.data.eval_results) == 3
    assert any(note.startswith("no license") for note in page.notes)


def test_without_results_there_is_a_short_card(run, tmp_path):
    for name in ("README.md", "eval_results.json"):
        (run / name).unlink()
    shutil.rmtree(run / "evaluation")
    config = json.loads((run / "config.json").read_text())
    config["audio_config"]["_name_or_path"], config["text_config"]["_name_or_path"] = "/home/me/x", "user/encoder"
    del config["id2label"], config["label2id"]
    (run / "config.json").write_text(json.dumps(config))
    (run / "modeling_mmser.py").unlink()
    page = complete_page(run, tmp_path / "page", "me/page")
    written = json.loads((page.folder / "config.json").read_text())
    assert "_name_or_path" not in written["audio_config"]
    assert written["text_config"]["_name_or_path"] == "user/encoder"
    said = [note.split(":")[0].split(",")[0] for note in page.notes]
    assert said == [
        *("no code", "the labels have no names", "no license", "no language", "no data set", "no results"),
        "no plots",
    ]
    assert 'model="me/page"' in card_of(contents(page.folder)).text


def test_the_small_model_makes_a_page(tmp_path):
    page = complete_page(SMALL, tmp_path / "page", "me/small")
    assert not any("code" in note or "labels" in note or "license" in note for note in page.notes)
    files = contents(page.folder)
    assert files["NOTICE"] == (SMALL / "NOTICE").read_bytes() and b'"/' not in files["config.json"]
    card, written = card_of(files), ModelCard.load(SMALL / "README.md")
    assert card.data.base_model == written.data.base_model and card.data.language == written.data.language
    assert card.text == written.text.replace(f'model="{SMALL.relative_to(ROOT)}"', 'model="me/small"')


def test_a_dry_run_uploads_nothing(hub, run, capsys):
    assert cli.main(["push", str(run), "me/page", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert hub.repositories == {} and "nothing was uploaded" in shown
    assert "MB  model.safetensors" in shown and "The page lacks: no license" in shown


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (
            "train_hf.py --data_dir 'my data' --text_column words --epochs 3",
            "--data_dir 'my data' --text_column words",
        ),
        ("train_hf.py recipe.json --ood_dir noise", "--dataset_name me/data --train_split a --ood_dir noise"),
        ("train_hf.py --manifest a.csv b.csv --allow_urls", "--manifest a.csv b.csv --allow_urls"),
        ("train_hf.py gone.json", "--data_dir DATA"),
        (None, "--data_dir DATA"),
    ],
)
def test_the_command_for_plots_names_the_data_of_the_run(hub, run, capsys, command, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.json").write_text('{"dataset_name": "me/data", "train_split": "a", "epochs": 2}')
    shutil.rmtree(run / "evaluation")
    results = json.loads((run / "eval_results.json").read_text())
    (run / "eval_results.json").write_text(json.dumps({**results, "command": command}))
    if command is None:
        (run / "eval_results.json").unlink()
    assert cli.main(["push", str(run), "me/page", "--dry_run"]) == 0
    assert f"no plots: mmser eval --checkpoint {run} {named} draws them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("./gone", r"^mmser push \./gone does not exist"),
        ("me/gone", "^me/gone is no checkpoint: there is no such folder.$"),
        (".", r"^mmser push \. is no model: it has no config.json"),
    ],
)
def test_a_folder_that_is_none_is_called_as_the_user_did(folder, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=said):
        cli.main(["push", folder, "me/page"])


def test_the_command_pushes(hub, run, capsys):
    words = ["--license", "mit", "--language", "en", "--datasets", "me/other"]
    assert cli.main(["push", str(run), "me/page", *words]) == 0
    data = card_of(hub.files("me/page")).data
    assert (data.license, data.language, data.datasets) == ("mit", ["en"], ["me/other"])
    shown = capsys.readouterr().out
    assert "The page is complete." in shown and f"Pushed: {hub.endpoint}/me/page" in shown


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"license": "Apache 2"}, "license: 'Apache 2' is not one of the Hub"),
        ({"license": "other"}, "license: other needs `license_name`"),
        ({"language": "english"}, "language: 'english' is no code"),
        ({"datasets": ["my data"]}, "datasets: 'my data' is no name"),
        ({"base_model": "/home/me/encoder"}, "base_model: "),
        ({"pipeline_tag": "text-classification"}, "pipeline_tag: "),
        ({"model-index": [{"name": "x", "results": [{"metrics": []}]}]}, "model-index: 'task' is missing"),
    ],
)
def test_metadata_that_the_hub_refuses(change, said):
    check_metadata(GOOD)
    with pytest.raises(ValueError, match=re.escape(said)):
        check_metadata({**GOOD, **change})


def test_what_is_wrong_is_told_before_anything_is_uploaded(hub, run, tmp_path):
    for folder, name, metadata, error in (
        (run, "me/page", {"license": "wrong"}, ValueError),
        (run, "page", {}, ValueError),
        (tmp_path, "me/page", {}, FileNotFoundError),
    ):
        with pytest.raises(error):
            publish(folder, name, metadata)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type 'bert'"):
        publish(tmp_path, "me/page")
    assert hub.repositories == {}


def test_the_requirements_are_what_the_code_imports():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert set(publishing.REQUIREMENTS) <= set(setup["options"]["install_requires"].split())
    assert publishing.ONNX_REQUIREMENT in setup["options.extras_require"]["onnx"].split()
    names = {re.split("[>=]", line)[0] for line in publishing.REQUIREMENTS}
    imported = set()
    for path in (*ROOT.glob("*_mmser.py"), publishing.HANDLER):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names - {path.stem for path in ROOT.glob("*_mmser.py")} <= names
