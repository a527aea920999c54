# SPDX-License-Identifier: Apache-2.0
"""With local folders no call leaves the machine: training, evaluation, export, pipelines in PyTorch and ONNX.

They run in a process whose Python sockets are watched (`network/sitecustomize.py`); under strace, where there is one,
the sockets of native code are watched as well.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from tiny_corpus import tiny_flags, tiny_tokenizer, write_corpus

import pipeline_mmser

ROOT = Path(__file__).parents[1]
WATCH = ROOT / "tests" / "network"
EVERYTHING = """
import json, os, sys
import eval_hf, export_hf, train_hf
train, evaluate, export, clip, model, exported = map(json.loads, sys.argv[1:])
train_hf.main(train)
eval_hf.main(evaluate)
export_hf.main(export)
from transformers import pipeline
from mmser import MMSERPipeline
clip = {"path": clip, "text": "what a joy"}
for classify in (pipeline("audio-classification", model=model, trust_remote_code=True),
                 pipeline("audio-classification", model=exported, trust_remote_code=True),
                 MMSERPipeline.from_onnx(exported)):
    print(len(classify(clip)))
print("telemetry of onnxruntime:", os.environ["ORT_DISABLE_TELEMETRY"])
"""
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


def test_nothing_leaves_the_machine(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    model, exported = str(tmp_path / "model"), str(tmp_path / "onnx")
    train = tiny_flags(corpus, model, tmp_path / "tokenizer", report_to=None, dataloader_num_workers=1)
    evaluate = ["--checkpoint", model, "--data_dir", str(corpus), "--bootstrap_samples", "5", "--use_cpu"]
    evaluate += ["--dataloader_num_workers", "0", "--ood_dir", str(corpus / "ood")]
    export = ["--checkpoint", model, "--output_dir", exported]
    words = [train, evaluate, export, str(corpus / "test" / "5_1.wav"), model, exported]
    command = [sys.executable, "-c", EVERYTHING, *map(json.dumps, words)]
    trace = tmp_path / "trace"
    if has_strace():
        command = [
            "strace",
            "-f",
            "--seccomp-bpf",
            "-qq",
            "-e",
            "trace=connect,sendto,sendmsg,sendmmsg",
            "-o",
            trace,
            *command,
        ]
    done = subprocess.run(command, env=watched(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert noted(tmp_path) == []
    assert done.stdout.splitlines()[-4:] == ["4", "4", "4", "telemetry of onnxruntime: 1"]
    made = [str(path) for path in (tmp_path / "home").rglob("*")]
    assert not [path for path in made if "icrosoft" in path]  # the data base of its telemetry, made at its import
    if trace.exists():
        assert [line for line in trace.read_text(errors="replace").splitlines() if OUTSIDE.search(line)] == []
