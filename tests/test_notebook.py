# SPDX-License-Identifier: Apache-2.0
"""`docs/mmser.ipynb`: it runs from top to bottom, and shows what it gave."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
PATH = ROOT / "docs" / "mmser.ipynb"


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def shown(cell):
    """The texts of a cell's outputs, without the digits, which may differ in their last places, and the labels."""
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)?|neutral|happy|sad|angry", "0", "".join(texts)))


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(PATH, as_version=4)


def test_the_notebook_is_valid_and_names_no_folder_of_a_machine(stored):
    nbformat.validate(stored)
    assert not re.search(r"/(tmp|home|root|work|Users)/", PATH.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", PATH.read_text(encoding="utf-8")):
        assert (PATH.parent / link).exists(), link


def test_it_shows_the_outputs_of_a_run_in_order(stored):
    cells = code_cells(stored)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)
    assert [output.output_type for cell in cells for output in cell.outputs if output.output_type == "error"] == []


def test_it_runs_from_top_to_bottom_and_gives_what_it_shows(stored, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    book = nbformat.read(PATH, as_version=4)
    for cell in code_cells(book):
        cell.outputs, cell.execution_count = [], None
    place = {"metadata": {"path": str(PATH.parent)}}
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3", coalesce_streams=True, resources=place).execute()
    for fresh, before in zip(code_cells(book), code_cells(stored), strict=True):
        assert [output.output_type for output in fresh.outputs] == [output.output_type for output in before.outputs]
        assert shown(fresh)[:60] == shown(before)[:60]
    pictures = [
        output for cell in code_cells(book) for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 1
