# SPDX-License-Identifier: Apache-2.0
"""The reference of `make docs`, built from docstrings: `docs/build_reference.py`."""

import html
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import mmser
from mmser import cli
from mmser.training_flags import TrainingFlags

ROOT = Path(__file__).parents[1]


def load_builder():
    specification = importlib.util.spec_from_file_location("build_reference", ROOT / "docs" / "build_reference.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


BUILDER = load_builder()
PUBLIC = {name: thing for _, name, thing in BUILDER.public_objects()}


def test_every_public_name_of_the_package_is_in_the_reference():
    assert set(mmser.__all__) <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_names_what_it_takes(name):
    """Of a class what its own `__init__`, or the dataclass, takes; what Transformers' classes take is told there."""
    thing = PUBLIC[name]
    said = inspect.cleandoc(thing.__doc__)
    assert re.match(r"\S.{10,}", said)
    if inspect.isclass(thing):
        taken = set(inspect.signature(thing.__init__).parameters) if "__init__" in vars(thing) else set()
        if hasattr(thing, "__dataclass_fields__"):
            taken &= set(inspect.get_annotations(thing))
    else:
        taken = set(inspect.signature(thing).parameters)
    missing = [word for word in taken - {"self", "args"} if not re.search(rf"\b{word}\b", said)]
    assert missing == [] and not (taken - {"self"} and "Args:" not in said and inspect.isfunction(thing))


@pytest.fixture(scope="module")
def pages(shared):
    pytest.importorskip("pdoc")
    folder = shared("reference", BUILDER.build)
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in folder.rglob("*.html")}


def test_every_name_has_its_entry_and_every_link_of_the_first_page_leads_to_one(pages):
    for module, name, _ in BUILDER.public_objects():
        assert f'id="{name}"' in pages[f"{module.replace('.', '/')}.html"]
    links = re.findall(r'<a href="([\w/]+\.html)#([\w.-]+)"', pages["index.html"])
    assert len(set(links)) >= len(PUBLIC) + len(cli.COMMANDS)
    assert not re.search(r"<a [^>]*><code><a ", pages["index.html"])  # a browser tears links within links apart
    for page, anchor in links:
        assert f'id="{anchor}"' in pages[page], (page, anchor)


def test_flags_that_are_arguments_have_their_help_texts(pages):
    page = html.unescape(re.sub(r"<[^>]+>", "", pages["mmser/training_arguments.html"]))
    for name, field in TrainingFlags.__dataclass_fields__.items():
        assert f"{name}:" in page and field.metadata["help"].split()[0] in page


def test_every_flag_of_every_command_is_there(pages):
    page = html.unescape(re.sub(r"<[^>]+>", "", pages["commands.html"]))
    for flag in (
        "--help_all",
        "--sampling_temperature",
        "--calibrate",
        "--vocabulary_text",
        "--transcripts",
        "--waiting",
    ):
        assert flag in page
    assert [name for name in cli.COMMANDS if f"usage: mmser {name}" not in page] == []


def test_pages_read_well_and_name_no_folder_of_the_machine(pages):
    for name, page in pages.items():
        said = html.unescape(re.sub(r"<[^>]+>", "", page))
        assert str(ROOT) not in page and str(Path.home()) + "/" not in page, name
        assert (
            not re.search(r"\[`\w+`\](?! or)", said)
            and "[<code>" not in page
            and not re.search(r"^ *(Args|Raises): *\S", said, re.MULTILINE)
        ), name
        assert not re.search(r'(src|href)="https?://(?!pdoc\.dev)', page), name  # works without a network


def test_building_leaves_the_modules_as_they_were(pages):
    import modeling_mmser

    assert not hasattr(modeling_mmser, "__all__")
