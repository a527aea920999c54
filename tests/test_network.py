# SPDX-License-Identifier: Apache-2.0
"""With local folders no call leaves the machine: training, evaluation, export, pipelines in PyTorch and ONNX.

`windows.py` does all that, in a process whose Python sockets are watched (`network/sitecustomize.py`); under strace,
where there is one, the sockets of native code are watched as well. `test_windows.py` looks at the same run.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_corpus import write_corpus

import pipeline_mmser

ROOT = Path(__file__).parents[1]
WATCH = ROOT / "tests" / "network"
OUTSIDE = re.compile(
    r"(?:connect|sendto|sendmsg|sendmmsg)\(.*(?:inet_addr\(\"(?!127\.)|inet_pton\(AF_INET6, \"(?!::1\"))"
)


def watched(tmp_path, **more):
    """The environment of a new user without settings, in which calls are noted."""
    hidden = ("HF_", "TRANSFORMERS_", "ORT_", "DISABLE_TELEMETRY", "HUGGING_FACE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    path = os.pathsep.join([str(WATCH), str(ROOT)])
    home = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home" / "cache")}
    return {**kept, **home, "PYTHONPATH": path, "CALLS_FILE": str(tmp_path / "calls"), **more}


def noted(tmp_path):
    return (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []


def test_the_watch_sees_calls(tmp_path):
    """Else the next test could not fail."""
    code = "import socket, urllib.request\ntry: urllib.request.urlopen('http://example.org')\nexcept Exception: pass\n"
    code += "try: socket.create_connection(('10.0.0.1', 9), 1)\nexcept Exception: pass\n"
    code += "server = socket.create_server(('127.0.0.1', 0))\nsocket.create_connection(server.getsockname())"
    subprocess.run([sys.executable, "-c", code], env=watched(tmp_path), check=True, timeout=60)
    assert [line.split()[0] for line in noted(tmp_path)] == ["socket.getaddrinfo", "socket.getaddrinfo"]
    assert "example.org" in noted(tmp_path)[0] and "10.0.0.1" in noted(tmp_path)[1]
    assert OUTSIDE.search('connect(3, {sa_family=AF_INET, sin_port=htons(443), sin_addr=inet_addr("13.89.1.1")}, 16)')
    assert not OUTSIDE.search(
        'connect(3, {sa_family=AF_INET, sin_port=htons(9), sin_addr=inet_addr("127.0.0.1")}, 16)'
    )


def test_who_wants_the_telemetry_of_onnxruntime_keeps_it(monkeypatch):
    stopped = []
    monkeypatch.setitem(
        sys.modules, "onnxruntime", SimpleNamespace(disable_telemetry_events=lambda: stopped.append(1))
    )
    for chosen, expected in (("0", ("0", [])), (None, ("1", [1]))):
        monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
        if chosen is not None:
            monkeypatch.setenv("ORT_DISABLE_TELEMETRY", chosen)
        pipeline_mmser._import_onnxruntime()
        assert (os.environ["ORT_DISABLE_TELEMETRY"], stopped) == expected


def has_strace():
    return bool(shutil.which("strace")) and subprocess.run(["strace", "-o", os.devnull, "true"]).returncode == 0


def tell_story(folder):
    """Run `windows.py`, watched; `done.json` gets how it ended and what it said."""
    corpus = write_corpus(folder / "corpus", validation=(7, 8, 9))  # enough clips to calibrate on
    (folder / "own").mkdir()
    command = [sys.executable, ROOT / "tests" / "windows.py", corpus, folder / "own"]
    if has_strace():
        traced = ["-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o", folder / "trace"]
        command = ["strace", "-f", "--seccomp-bpf", "-qq", *traced, *command]
    done = subprocess.run(command, env=watched(folder), cwd=ROOT, capture_output=True, text=True, timeout=500)
    left = {"code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
    (folder / "done.json").write_text(json.dumps(left))


@pytest.fixture
def folder(shared):
    return shared("windows", tell_story)


def test_nothing_leaves_the_machine(folder):
    done, trace = json.loads((folder / "done.json").read_text()), folder / "trace"
    assert done["code"] == 0, done["stderr"][-3000:]
    assert noted(folder) == []
    assert done["stdout"].splitlines()[-5:-1] == ["4", "4", "4", "telemetry of onnxruntime: 1"]
    made = [str(path) for path in (folder / "home").rglob("*")]
    assert not [path for path in made if "icrosoft" in path]  # the data base of its telemetry, made at its import
    if trace.exists():
        assert [line for line in trace.read_text(errors="replace").splitlines() if OUTSIDE.search(line)] == []
