# SPDX-License-Identifier: Apache-2.0
"""Tests that nothing on a user's path needs Linux, by a simulated Windows, and of `oldest_versions.py`."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from oldest_versions import oldest_versions
from tiny_corpus import write_corpus
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


def test_the_commands_work_on_a_simulated_windows(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", validation=(7, 8, 9))  # enough clips to calibrate on
    (tmp_path / "own").mkdir()
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "windows.py", corpus, tmp_path / "own"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=500,
    )
    assert done.returncode == 0 and b"WORKED" in done.stdout, done.stderr.decode(errors="replace")[-4000:]


def test_the_oldest_versions_are_those_of_setup_cfg():
    """`make test-oldest` installs the lower bound of each package that the code imports."""
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    versions = oldest_versions(text)
    assert {"torch", "transformers", "pyarrow", "onnxruntime", "peft", "gradio", "uvicorn"} <= versions.keys()
    assert f"    transformers>={versions['transformers']}\n" in text and len(versions) > 25
    with pytest.raises(ValueError, match=r"'psutil' has no lower bound, such as psutil>=1\.0"):
        oldest_versions(text.replace(f"psutil>={versions['psutil']}", "psutil"))
