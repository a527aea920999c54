# SPDX-License-Identifier: Apache-2.0
"""Tests of mmser.serving and mmser.serve_command over sockets of this machine, with a tiny model."""

import configparser
import contextlib
import http.client
import io
import json
import re
import socket
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import uvicorn
from tiny import fit_openmax_by_chance, tiny_model
from tiny_corpus import tiny_processor

from mmser import cli, serve_command, serving
from mmser.serving import Limits, create_app
from processing_mmser import MMSERPipeline

ROOT = Path(__file__).parents[1]
BOUNDARY = "boundary"
URLENCODED = {"Content-Type": "application/x-www-form-urlencoded"}
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def wav(seconds=0.5, frequency=300.0, level=0.3, channels=(1.0,)):
    """The bytes of a wav file with a tone, whose channels differ by a factor."""
    file = io.BytesIO()
    tone = level * np.sin(frequency * np.arange(round(16000 * seconds)) / 2000)
    soundfile.write(file, tone[:, None] * np.array(channels), 16000, format="WAV")
    return file.getvalue()


def form(file=None, text=None, other=None):
    """The body of a form; `other`: fields by their names, as bytes."""
    parts = []
    if file is not None:
        head = b'Content-Disposition: form-data; name="file"; filename="../a clip.wav"\r\nContent-Type: audio/wav'
        parts.append(head + b"\r\n\r\n" + file)
    if text is not None:
        parts.append(b'Content-Disposition: form-data; name="text"\r\n\r\n' + text.encode())
    for name, content in (other or {}).items():
        parts.append(f'Content-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + content)
    start = f"--{BOUNDARY}\r\n".encode()
    return b"".join(start + part + b"\r\n" for part in parts) + f"--{BOUNDARY}--\r\n".encode()


@pytest.fixture(scope="module")
def classifier():
    model = tiny_model()
    fit_openmax_by_chance(model)
    return MMSERPipeline(model=model, processor=tiny_processor(), task="audio-classification")


class Slow:
    """A pipeline that answers when it is let."""

    def __init__(self, classifier):
        self._classifier, self.may_answer, self.calls = classifier, threading.Event(), 0

    def __getattr__(self, name):
        return getattr(self._classifier, name)

    def __call__(self, item, **options):
        if "raw" not in item:  # that is the one that warms up
            self.calls += 1
            assert self.may_answer.wait(10)
        return self._classifier(item, **options)


@contextlib.contextmanager
def server_of(classifier, **limits):
    """A server on a free port, in a thread; yields its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(classifier, Limits(**limits), "tiny"), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield SimpleNamespace(port=listener.getsockname()[1], server=server, thread=thread)
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive()


def ask(port, method="POST", path="/classify", body=None, headers=FORM):
    """(status, JSON or text, headers) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    is_json = response.headers["content-type"] == "application/json"
    return response.status, json.loads(content) if is_json else content.decode(), response.headers


@pytest.fixture(scope="module")
def port(classifier):
    with server_of(classifier, max_megabytes=2.0, max_seconds=40) as running:
        yield running.port


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "text"), [(wav(), None), (wav(), "what a joy"), (None, "what a joy")])
def test_an_answer_is_that_of_the_pipeline(port, classifier, file, text):
    status, answer, _ = ask(port, body=form(file, text))
    assert status == 200
    item = {**({"bytes": file} if file else {}), **({"text": text} if text else {})}
    expected = classifier(item, return_uncertainty=True)
    assert answer["scores"] == pytest.approx({entry["label"]: entry["score"] for entry in expected}, abs=1e-5)
    for name in ("uncertainty", "unknown_probability"):
        assert answer[name] == pytest.approx(expected[0][name], abs=1e-5)
    assert (answer["label"], answer["is_unknown"]) == (expected[0]["label"], expected[0]["is_unknown"])
    assert answer["answer"] == ("unknown" if answer["is_unknown"] else answer["label"])
    assert answer["seconds"] == (0.5 if file else None) and answer["segments"] is None


def test_a_long_recording_has_segments(port, classifier, monkeypatch):
    monkeypatch.setattr(serving, "LONG_SECONDS", 1.0)
    monkeypatch.setattr(serving, "CHUNK_SECONDS", 0.6)
    sound = wav(1.5)
    status, answer, _ = ask(port, body=form(sound))
    assert status == 200
    expected = classifier({"bytes": sound}, chunk_length_s=0.6, return_uncertainty=True)
    assert len(expected["chunks"]) > 2
    assert [(part["start"], part["end"]) for part in answer["segments"]] == [
        chunk["timestamp"] for chunk in expected["chunks"]
    ]
    assert answer["scores"] == pytest.approx(
        {entry["label"]: entry["score"] for entry in expected["scores"]}, abs=1e-5
    )


def test_silence_in_a_long_recording_has_no_answer(port, monkeypatch):
    monkeypatch.setattr(serving, "LONG_SECONDS", 1.0)
    monkeypatch.setattr(serving, "CHUNK_SECONDS", 0.6)
    samples, file = soundfile.read(io.BytesIO(wav(1.2)))[0], io.BytesIO()
    soundfile.write(file, np.concatenate([samples, np.zeros(24_000)]), 16000, format="WAV")
    status, answer, _ = ask(port, body=form(file.getvalue()))
    assert status == 200
    assert [part["answer"] == "silence" for part in answer["segments"]] == [
        part["start"] > 1.5 for part in answer["segments"]
    ]
    soundfile.write(file := io.BytesIO(), np.random.default_rng(0).normal(0, 0.001, 24_000), 16000, format="WAV")
    status, answer, _ = ask(port, body=form(file.getvalue()))
    assert (status, answer["detail"]) == (422, "file: nothing can be heard in it.")


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "headers", "expected", "said"),
    [
        (form(b"this is no sound"), FORM, 422, "cannot be read as audio"),
        (form(b""), FORM, 422, "empty"),
        (form(wav(level=0)), FORM, 422, r"^file: nothing can be heard in it: all samples are 0\.$"),
        (form(wav(channels=(1, -1)), "words"), FORM, 422, "its channels cancel each other"),
        (form(wav(41)), FORM, 422, "lasts 41 s, and this server takes 40 s"),
        (form(wav(31), "words"), FORM, 422, "The text has no times"),
        (form(other={"txt": b"words"}), FORM, 422, "There is no field 'txt': a form has the fields file and text"),
        (form(wav(), other={"größe": b"1"}), FORM, 422, "There is no field 'größe'"),
        (form(None, "words", {"text": b"more"}), FORM, 422, "text is there 2 times"),
        (form(None, other={"text": "größe".encode("cp1252")}), FORM, 422, "^text: it is not in UTF-8"),
        (b"text=gr%F6%DFe", URLENCODED, 422, "^text: it is not in UTF-8"),
        (form(None, other={"file": b"clip.wav"}), FORM, 422, "^file: this is a text, where the content of a file"),
        (form(None, other={'text"; filename="a.txt': b"words"}), FORM, 422, "^text: this is a file; send the words"),
        (form(), FORM, 422, "nothing to classify"),
        (form(None, "  "), FORM, 422, "nothing to classify"),
        (b"file=clip.wav", URLENCODED, 422, "file: this is a text.*curl -F file=@clip"),
        (b"not a form", FORM, 400, ""),
        (wav(), {"Content-Type": "audio/wav"}, 415, "Send a form with a file"),
        (b"{}", {}, 415, "Send a form with a file"),
    ],
)
def test_what_cannot_be_used_gets_a_sentence(port, body, headers, expected, said):
    status, answer, _ = ask(port, body=body, headers=headers)
    assert status == expected and re.search(said, answer["detail"]) and "\n" not in answer["detail"]
    assert ask(port, body=form(wav()))[0] == 200  # and the next request is answered


@pytest.mark.parametrize(
    ("query", "said"), [("?text=words", "text is in the address"), ("?language=de", "There is no field 'language'")]
)
def test_what_stands_in_the_address_is_not_ignored(port, query, said):
    status, answer, _ = ask(port, path=f"/classify{query}", body=form(wav()))
    assert status == 422 and said in answer["detail"]


@pytest.mark.parametrize("charset", ["utf-8", "iso-8859-1", None])
def test_texts_are_read_in_the_encoding_that_is_named(port, charset, monkeypatch):
    text, heard = "größe", []
    classify = serving.classify_upload
    monkeypatch.setattr(serving, "classify_upload", lambda *args: heard.append(args[2]) or classify(*args))
    kind = FORM["Content-Type"] + (f"; charset={charset}" if charset else "")
    body = form(None, other={"text": text.encode(charset or "utf-8")})
    assert ask(port, body=body, headers={"Content-Type": kind})[0] == 200 and heard == [text]


def head_of(length):
    kind = f"Content-Type: {FORM['Content-Type']}\r\n"
    return f"POST /classify HTTP/1.1\r\nHost: here\r\n{kind}{length}\r\n\r\n".encode()


def test_a_body_that_is_too_large_is_not_awaited(port):
    """Its length is told before it; a client that sends on is cut off."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(head_of("Content-Length: 10000000000"))
        assert client.recv(10_000).startswith(b"HTTP/1.1 413 ")
        client.settimeout(5)
        sent = 0
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                client.sendall(bytes(1_000_000))
                sent += 1
        assert sent < 50


def test_a_body_without_a_length_is_read_to_the_limit(port):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(head_of("Transfer-Encoding: chunked"))
        start = form(b"")[: -len("--boundary--\r\n\r\n")]
        client.sendall(f"{len(start):x}\r\n".encode() + start + b"\r\n")
        for _ in range(3):
            client.sendall(b"f4240\r\n" + bytes(1_000_000) + b"\r\n")
        answer = client.recv(10_000)
    assert answer.startswith(b"HTTP/1.1 413 ") and b"connection: close" in answer.lower()


def test_a_slow_request_is_ended(classifier):
    with (
        server_of(classifier, timeout=0.3) as running,
        socket.create_connection(("127.0.0.1", running.port), timeout=10) as client,
    ):
        client.sendall(head_of("Content-Length: 1000") + b"--bound")
        assert client.recv(10_000).startswith(b"HTTP/1.1 408 ")


# --- load ------------------------------------------------------------------------------------------------------------


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def busy(port):
    return ask(port, "GET", "/health")[1]["busy"]


def test_requests_beyond_the_queue_are_told_to_come_later(classifier):
    slow = Slow(classifier)
    with server_of(slow, waiting=1) as running:
        results = []
        threads = [threading.Thread(target=lambda: results.append(ask(running.port, body=form(wav())))) for _ in "ab"]
        for thread in threads:
            thread.start()
        until(lambda: busy(running.port) == 2)
        status, answer, headers = ask(running.port, body=form(wav()))
        assert status == 429 and int(headers["Retry-After"]) >= 1 and "try again" in answer["detail"]
        slow.may_answer.set()
        for thread in threads:
            thread.join(10)
        assert [status for status, _, _ in results] == [200, 200]
        assert ask(running.port, body=form(wav()))[0] == 200 and busy(running.port) == 0


def test_a_model_that_takes_too_long_keeps_its_place_until_it_is_done(classifier):
    slow = Slow(classifier)
    with server_of(slow, waiting=1, timeout=0.4) as running:
        assert ask(running.port, body=form(wav()))[0] == 504
        assert busy(running.port) == 1  # the thread works still
        assert ask(running.port, body=form(wav()))[0] == 504
        assert busy(running.port) == 1 and slow.calls == 1  # the second has never begun
        slow.may_answer.set()
        until(lambda: busy(running.port) == 0)
        assert ask(running.port, body=form(wav()))[0] == 200


def test_a_client_that_goes_is_not_worked_for(classifier):
    slow = Slow(classifier)
    with server_of(slow, waiting=3) as running:
        first = threading.Thread(target=ask, args=(running.port,), kwargs={"body": form(wav())})
        first.start()
        until(lambda: slow.calls == 1)
        with socket.create_connection(("127.0.0.1", running.port)) as client:
            body = form(wav())
            client.sendall(head_of(f"Content-Length: {len(body)}") + body)
            until(lambda: busy(running.port) == 2)
        until(lambda: busy(running.port) == 1)
        slow.may_answer.set()
        first.join(10)
        assert slow.calls == 1


def test_a_stop_waits_for_the_answer_that_is_being_made(classifier):
    slow = Slow(classifier)
    with server_of(slow) as running:
        results = []
        client = threading.Thread(target=lambda: results.append(ask(running.port, body=form(wav()))[0]))
        client.start()
        until(lambda: slow.calls == 1)
        running.server.should_exit = True
        threading.Timer(0.3, slow.may_answer.set).start()
        running.thread.join(10)
        client.join(10)
        assert results == [200]


# --- what it says of itself ------------------------------------------------------------------------------------------


def test_health(port, classifier):
    status, health, _ = ask(port, "GET", "/health")
    assert status == 200 and health["status"] == "ok" and health["checkpoint"] == "tiny"
    assert health["labels"] == classifier.labels and (health["busy"], health["places"]) == (0, 17)


def test_the_api_describes_itself_and_loads_nothing_from_elsewhere(port):
    _, description, _ = ask(port, "GET", "/openapi.json")
    assert set(description["paths"]) == {"/classify", "/health"}
    responses = description["paths"]["/classify"]["post"]["responses"]
    assert {"200", "408", "413", "415", "422", "429", "504"} == set(responses)
    status, page, headers = ask(port, "GET", "/docs")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "<script" not in page and not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", page)
    for path, methods in description["paths"].items():
        assert f"{next(iter(methods)).upper()} {path}" in page
    for name in (
        "file",
        "text",
        "uncertainty",
        "is_unknown",
        "segments",
        "429",
        *description["components"]["schemas"],
    ):
        assert name in page or name.startswith("Body_") or name in ("HTTPValidationError", "ValidationError")
    assert "file or null" in page and "object of number" in page and "list of SegmentVerdict or null" in page


def test_limits_that_make_no_sense_are_refused():
    for wrong in ({"max_megabytes": 0}, {"timeout": float("nan")}, {"waiting": -1}, {"max_seconds": float("inf")}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"--{name} must be"):
            Limits(**wrong)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_serves_a_checkpoint(classifier, tmp_path, monkeypatch, capsys):
    classifier.save_pretrained(tmp_path / "model")
    runs = {}

    class Server(uvicorn.Server):
        """Asks for an answer, then ends as by SIGTERM."""

        def run(self, sockets=None):
            def talk():
                port = sockets[0].getsockname()[1]
                until(lambda: self.started)
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as response:
                    runs["health"] = json.load(response)
                self.should_exit = True

            thread = threading.Thread(target=talk)
            thread.start()
            super().run(sockets)
            thread.join(10)
            raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn, "Server", Server)
    monkeypatch.setattr(serve_command.signal, "signal", lambda *_: None)
    assert cli.main(["serve", "--checkpoint", str(tmp_path / "model"), "--port", "0", "--waiting", "2"]) == 0
    assert runs["health"]["checkpoint"] == str(tmp_path / "model") and runs["health"]["places"] == 3
    assert re.search(r"listens on http://127\.0\.0\.1:\d+/docs", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (["--checkpoint", "gone/model/x"], FileNotFoundError, "--checkpoint gone/model/x"),
        (["--timeout", "-1"], ValueError, "--timeout must be more than 0"),
        (["--port", "TAKEN"], ValueError, r"--host 127.0.0.1 --port \d+ cannot be listened on: "),
        (["--port", "70000"], ValueError, "--port 70000 cannot be listened on: "),
    ],
)
def test_the_command_refuses_before_it_loads(words, error, said):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [str(taken.getsockname()[1]) if word == "TAKEN" else word for word in words]
        with pytest.raises(error, match=said):
            serve_command.main(words)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(serve_command.sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"pip install \"mmser\[serve\]\""):
        serve_command.main([])


# --- the image -------------------------------------------------------------------------------------------------------


def test_the_image_has_what_an_installation_needs():
    """The Dockerfile is not built here: what it names exists and is enough for setup.cfg, and its flags are ours."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    kinds = [kind for kind, _ in steps]
    assert steps[0] == ["FROM", "python:3.11-slim"] and kinds.count("FROM") == 1
    sources = [source for kind, rest in steps if kind == "COPY" for source in rest.split()[:-1]]
    copied = {path.relative_to(ROOT) for source in sources for path in ROOT.glob(source)}
    assert all(any(ROOT.glob(source)) for source in sources)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    needed = {Path(f"{name}.py") for name in setup["options"]["py_modules"].split()}
    needed |= {Path(name) for name in ("mmser", "checkpoints", "README.md", "LICENSE", "setup.cfg", "pyproject.toml")}
    assert needed <= copied
    sent = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{source}" for source in sources} == {line for line in sent if line.startswith("!")}
    assert kinds.index("USER") > max(number for number, kind in enumerate(kinds) if kind == "RUN")
    words = json.loads(dict(steps)["ENTRYPOINT"])
    assert words[:2] == ["mmser", "serve"]
    options = serve_command.make_parser().parse_args([*words[2:], "--checkpoint", "/model"])
    assert options.host == "0.0.0.0" and dict(steps)["EXPOSE"] == str(options.port)
    check = json.loads(dict(steps)["HEALTHCHECK"].split("CMD ", 1)[1])
    compile(check[-1], "HEALTHCHECK", "exec")
    assert f"127.0.0.1:{options.port}/health" in check[-1]
    assert "[serve]" in " ".join(rest for kind, rest in steps if kind == "RUN")
    assert {"fastapi", "uvicorn", "python-multipart"} == {
        line.split(">")[0] for line in setup["options.extras_require"]["serve"].split()
    }
