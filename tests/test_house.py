# SPDX-License-Identifier: Apache-2.0
"""Tests of the house itself: what can be imported from where, which file imports which, and how long things are.

The rules are those of the layout: commands -> `mmser/` -> processing, modeling -> pipeline, losses, fusion, openmax
-> encoders, audio, configuration. The files are read with `ast`; only the public names are imported.
"""

import ast
import configparser
import functools
import graphlib
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import setuptools

import mmser

ROOT = Path(__file__).parents[1]
HUB_FLOORS = {
    "configuration_mmser": 0,
    "conformal_mmser": 0,
    "decoding_mmser": 0,
    "audio_mmser": 1,
    "adapters_mmser": 2,
    "encoders_mmser": 1,
    "losses_mmser": 1,
    "openmax_mmser": 1,
    "quantization_mmser": 1,
    "fusion_mmser": 2,
    "auxiliary_mmser": 2,
    "pipeline_mmser": 2,
    "modeling_mmser": 3,
    "processing_mmser": 3,
}
PACKAGE_FLOOR, COMMAND_FLOOR = 4, 5
FILES = {
    **{path.stem: path for path in ROOT.glob("*.py")},
    **{f"mmser.{path.stem}": path for path in (ROOT / "mmser").glob("*.py") if path.stem != "__init__"},
    "mmser": ROOT / "mmser" / "__init__.py",
}
COMMANDS = [name for name, path in FILES.items() if path.parent == ROOT and not name.endswith("_mmser")]
# Imports on the same floor, and why
NEIGHBOURS = {("modeling_mmser", "processing_mmser"): "`register_auto_classes` is there, and makes all of it known"}
# Longer than 250 lines, and why they are one class
LARGE_CLASSES = {
    "MMSERConfig": "a configuration is one class, and its docstring is the manual of every field",
    "MMSERTrainer": "overrides of the methods of Transformers' Trainer, which share its state",
    "MMSERModel": "a model of Transformers is one class: encoders, fusion, freezing and loading share its weights",
    "MMSERForAudioClassification": "a model of Transformers is one class: losses and what is fitted share its heads",
    "OpenMax": "its buffers are fitted, stored and applied by methods that must agree on every one of them",
    "MMSERPipeline": "a pipeline of Transformers is one class, and its docstrings are the manual of every option",
}
# What users import from the three modules that they know: a name that goes from here breaks their code
PUBLIC_NAMES = {
    "configuration_mmser": ["DEFAULT_LABELS", "MMSERConfig"],
    "modeling_mmser": [
        "MMSERForAudioClassification",
        "MMSERModel",
        "MMSEROutput",
        "MMSERPreTrainedModel",
        "OpenMax",
        "register_auto_classes",
    ],
    "processing_mmser": [
        "MMSEROnnxConfig",
        "MMSEROnnxForAudioClassification",
        "MMSEROnnxOutput",
        "MMSERPipeline",
        "MMSERProcessor",
        "load_audio",
        "stream_audio",
    ],
}
FRESH_IMPORT = """
import json, sys, time
start = time.process_time()
import mmser
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "listed": dir(mmser), "modules": sorted(sys.modules)}))
"""


# --- names -----------------------------------------------------------------------------------------------------------


def test_importing_the_package_is_quick_and_imports_nothing_else():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FRESH_IMPORT]
    seen = json.loads(subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60).stdout)
    assert seen["seconds"] < 0.2
    assert not {"torch", "transformers", "datasets", "numpy", *HUB_FLOORS} & set(seen["modules"])
    assert {*mmser.__all__, "__version__"} <= set(seen["listed"])


def test_the_package_gives_its_public_names():
    assert {"MMSERForAudioClassification", "MMSERProcessor", "MMSERTrainer", "MMSERPipeline"} <= set(mmser.__all__)
    for name in mmser.__all__:
        namespace = {}
        exec(f"from mmser import {name}", namespace)
        assert namespace[name].__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'MMSERTrainr'"):
        mmser.MMSERTrainr  # noqa: B018


@pytest.mark.parametrize("module", PUBLIC_NAMES)
def test_names_that_users_know_are_where_they_were(module):
    found = vars(importlib.import_module(module))
    assert [name for name in PUBLIC_NAMES[module] if name not in found] == []


# --- arrows ----------------------------------------------------------------------------------------------------------


@functools.cache
def nodes(path):
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def own_imports(path):
    """The modules of this project that a file imports anywhere in it, by their full names."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = f"{'mmser.' * (node.level > 0 and path.parent.name == 'mmser')}{node.module or ''}".strip(".")
            # `from mmser import trainer` imports a module, `from mmser import MMSERTrainer` the package
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names}
    return found & FILES.keys()


def floor(module):
    if module in HUB_FLOORS:
        return HUB_FLOORS[module]
    return PACKAGE_FLOOR if module.split(".")[0] == "mmser" else COMMAND_FLOOR


def test_every_file_has_its_floor():
    assert {name for name in FILES if name.endswith("_mmser")} == HUB_FLOORS.keys()
    assert {"train_hf", "eval_hf", "export_hf"} <= set(COMMANDS)


@pytest.mark.parametrize("module", FILES)
def test_arrows_point_down(module):
    """To a lower floor; inside the package also to a neighbour."""
    for imported in own_imports(FILES[module]):
        same_package = floor(module) == floor(imported) == PACKAGE_FLOOR
        is_lower = floor(imported) < floor(module) or same_package or (module, imported) in NEIGHBOURS
        assert is_lower, f"{module} imports {imported}"


def test_no_module_imports_itself_in_a_circle():
    graphlib.TopologicalSorter({module: own_imports(path) for module, path in FILES.items()}).prepare()


# --- lengths ---------------------------------------------------------------------------------------------------------


def definitions(kinds):
    """(file, name, lines) of every definition of these kinds, decorators not counted."""
    for module, path in FILES.items():
        for node in nodes(path):
            if isinstance(node, kinds):
                yield module, node.name, node.end_lineno - node.lineno + 1


def test_no_function_is_longer_than_a_screen():
    functions = list(definitions((ast.FunctionDef, ast.AsyncFunctionDef)))
    assert [entry for entry in functions if entry[2] > 80] == []
    mains = [entry for entry in functions if entry[0] in COMMANDS and entry[1] == "main"]
    assert len(mains) >= 3 and [entry for entry in mains if entry[2] > 60] == []


def test_a_large_class_has_a_reason():
    large = [entry for entry in definitions(ast.ClassDef) if entry[2] > 250 and entry[1] not in LARGE_CLASSES]
    assert large == []


def test_an_installation_has_every_file_of_the_package(monkeypatch):
    """Templates are read at the end of a run: a wheel without one would fail after all the work. By setuptools itself,
    for its settings are not parsed as they look."""
    monkeypatch.chdir(ROOT)
    distribution = setuptools.Distribution()
    distribution.parse_config_files()
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    installed = {Path(folder, name).resolve() for _, folder, _, names in command.data_files for name in names}
    files = [path for path in (ROOT / "mmser").iterdir() if path.suffix != ".py" and path.name != "__pycache__"]
    files += [path for path in (ROOT / "checkpoints" / "mmser-small").iterdir() if path.is_file()]
    assert len(files) >= 20
    assert sorted(path.name for path in files if path.resolve() not in installed) == []


def test_make_test_skips_nothing_for_want_of_a_package():
    """What a test asks for by `importorskip` is in the extra that `make` installs."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    installed = {line.split(">")[0].replace("-", "_") for line in settings["options.extras_require"]["dev"].split()}
    wanted = {
        node.args[0].value.split(".")[0]
        for path in (ROOT / "tests").glob("*.py")
        for node in nodes(path)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "importorskip"
    }
    assert {"librosa", "onnxruntime"} <= wanted
    assert wanted - installed <= {"PIL"}  # it comes with matplotlib


def test_an_interrupt_stops_the_tests_also_where_it_was_ignored(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        conftest.pytest_configure()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
