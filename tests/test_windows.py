# SPDX-License-Identifier: Apache-2.0
"""Tests that nothing on a user's path needs Linux, by a simulated Windows, and of `oldest_versions.py`."""

import ast
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import test_network
from oldest_versions import FIRST_WHEELS, oldest_versions
from packaging.version import Version
from windows import MISSING_CALLS, MISSING_MODULES, refusal

ROOT = Path(__file__).parents[1]
CODE = sorted([*ROOT.glob("*.py"), *ROOT.glob("mmser/*.py"), *ROOT.glob("demo/*.py")])
OF_POSIX = {f"os.{name}" for name in (*MISSING_CALLS, "symlink", "readlink")} | {
    *("signal.SIGKILL", "signal.SIGHUP", "signal.SIGALRM", "signal.alarm", "signal.pause", "signal.setitimer"),
    *("select.poll", "select.epoll", "time.tzset", "os.O_DIRECTORY", "os.O_NOFOLLOW", "os.WNOHANG"),
}
OPENERS = ("open", "read_text", "write_text", "fdopen", "NamedTemporaryFile", "TemporaryFile")


def test_no_module_uses_what_windows_lacks():
    found = []
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            used = isinstance(node, ast.Attribute) and ast.unparse(node) in OF_POSIX
            if used or set(names) & set(MISSING_MODULES):
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert found == [] and len(CODE) > 80


def opens_text_without_encoding(call):
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    if name not in OPENERS or owner in ("os", "soundfile", "webbrowser", "fsspec", "av", "zipfile", "Image"):
        return False
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    if name in ("read_text", "write_text"):
        return len(call.args) < (1 if name == "read_text" else 2)
    place = (
        0 if name in ("NamedTemporaryFile", "TemporaryFile") or owner else 1
    )  # of the mode; that of a path is first
    modes = [word.value for word in call.keywords if word.arg == "mode"] or call.args[place : place + 1]
    mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else None
    binary_by_default = name in ("NamedTemporaryFile", "TemporaryFile")
    return not binary_by_default and (mode is None or "b" not in str(mode))


def test_text_is_opened_with_its_encoding():
    found = [
        f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and opens_text_without_encoding(node)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("/runs/mine/report.md", ""),
        ("/runs/a:b.png", "a:b.png"),
        ("/runs/con.txt", "con.txt"),
        ("/what?", "what?"),
        ("/a./b", "a."),
        ("/" + 300 * "a", "more than 260 letters"),
    ],
)
def test_names_that_windows_refuses(name, part):
    assert refusal(name) == part


def test_the_commands_work_on_a_simulated_windows(shared):
    done = json.loads((shared("windows", test_network.tell_story) / "done.json").read_text())
    assert done["code"] == 0 and done["stdout"].endswith("WORKED\n"), done["stderr"][-4000:]


def test_the_oldest_versions_are_those_of_setup_cfg():
    """`make test-oldest` installs the lower bound of each package that the code imports."""
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    versions = oldest_versions(text)
    assert {"torch", "transformers", "pyarrow", "onnxruntime", "peft", "gradio", "uvicorn"} <= versions.keys()
    assert f"    transformers>={versions['transformers']}\n" in text and len(versions) > 25
    with pytest.raises(ValueError, match=r"'psutil' has no lower bound, such as psutil>=1\.0"):
        oldest_versions(text.replace(f"psutil>={versions['psutil']}", "psutil"))


@pytest.mark.parametrize("python", FIRST_WHEELS)
def test_a_newer_python_gets_the_first_wheels_for_it(python):
    """They are newer than the lower bounds, and than those of the Python before; all others stay."""
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    bounds, versions = oldest_versions(text), oldest_versions(text, python)
    assert versions.keys() == bounds.keys()
    changed = {name for name in versions if versions[name] != bounds[name]}
    assert changed == FIRST_WHEELS[python].keys()
    assert all(Version(versions[name]) > Version(bounds[name]) for name in changed)
    before = FIRST_WHEELS.get((python[0], python[1] - 1), {})
    assert all(Version(versions[name]) > Version(version) for name, version in before.items())


def test_each_python_of_setup_cfg_was_tried():
    """The table of contributing.md says with which torch; `python_requires` is the oldest of them."""
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    promised = re.findall(r"Programming Language :: Python :: (3\.\d+)\n", text)
    rows = re.findall(
        r"^\| (3\.\d+)\.\d+ \| ([\d.]+)", (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8"), re.M
    )
    assert {python for python, _ in rows} == set(promised)
    assert f"python_requires = >={promised[0]}\n" in text
    assert oldest_versions(text)["torch"] in {".".join(torch.split(".")[:2]) for _, torch in rows}


@pytest.mark.parametrize("target", ["installed", "-oldest/installed"])
def test_make_takes_torch_from_the_system(target, tmp_path):
    """`TORCH=` installs none, and keeps the one that is there; else the one that it names is installed."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    folder = f"{tmp_path}/venv"
    goal = f"{folder}/installed" if target == "installed" else f"{folder}{target}"
    lines = {}
    for torch in ("", "torch==2.7.1"):
        command = ["make", "--dry-run", f"TORCH={torch}", f"VENV={folder}", "PYTHON=python3.99", goal]
        lines[torch] = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "python3.99 -m venv --system-site-packages " in lines[""] and 'pip install --quiet "torch' not in lines[""]
    assert "--system-site-packages" not in lines["torch==2.7.1"]
    assert 'pip install --quiet "torch==2.7.1"' in lines["torch==2.7.1"]
    for text in lines.values():
        assert "grep '^torch=='" in text and re.search(r"--constraint \S+/constraints\.txt", text)
