# SPDX-License-Identifier: Apache-2.0
"""A model behind HTTP: `create_app` makes the application that `mmser serve` runs.

Read in this order: `Limits`, `classify_upload` (the answer to one request), `Worker` (the thread with the model, and
who waits for it), `Gate` (who is let in), `create_app`. FastAPI and python-multipart come with the extra `serve`.
"""

import asyncio
import contextlib
import math
import re
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import jinja2
import numpy as np
from fastapi import FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from markupsafe import Markup, escape
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from audio_mmser import audio_length, why_silent
from mmser import __version__
from mmser.prediction_arguments import BATCH_SIZE, CHUNK_SECONDS, LONG_SECONDS
from mmser.prediction_files import nested
from mmser.prediction_inputs import Input, reason
from mmser.prediction_run import UNHEARD, Prediction, Segment, hide_moot_unknown, mean_scores, take_silence_out
from processing_mmser import MMSERPipeline

PAGE = Path(__file__).parent / "serving_page.html"
FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
SEND_A_FORM = "curl -F file=@clip.wav -F text='what is said' ADDRESS/classify"
MEGABYTE = 1_000_000
POLL_SECONDS = 0.25  # how often a waiting request looks whether its client is still there
LINGER_SECONDS = 2.0  # how long the body of a refused request is read on
RATE = 16_000  # Hz; lengths are counted at it
FIELDS = ("file", "text")
NOT_UTF8 = "it is not in UTF-8: save or send it as UTF-8."
READ_AS_LATIN = "mmser.latin"  # key of a scope: see `_read_as_latin`
WORK = "mmser.work"  # key of a request's future in its scope


@dataclass(frozen=True)
class Limits:
    """
    What a server lets in.

    Args:
        max_megabytes (`float`, 10^6 bytes): of the body of a request.
        max_seconds (`float`): of a recording.
        timeout (`float`, seconds): that a body may take to arrive, and then its answer to be there.
        waiting (`int`): requests that may wait while one is answered; those beyond are told to come later.
    """

    max_megabytes: float = 25.0
    max_seconds: float = 600.0
    timeout: float = 60.0
    waiting: int = 16

    def __post_init__(self):
        for name in ("max_megabytes", "max_seconds", "timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} must be more than 0, got {getattr(self, name)}.")
        if self.waiting < 0:
            raise ValueError(f"--waiting must be 0 or more, got {self.waiting}.")

    @property
    def max_bytes(self) -> int:
        return int(self.max_megabytes * MEGABYTE)


class Verdict(BaseModel):
    """What the model says of a piece of sound; the names are those of `mmser predict --format json`."""

    answer: str
    label: str
    score: float
    uncertainty: float | None
    unknown_probability: float | None
    is_unknown: bool | None
    scores: dict[str, float]


class SegmentVerdict(Verdict):
    """Of a segment; its times are in seconds. Where nothing is heard the answer is "silence", and scores are null."""

    start: float
    end: float
    score: float | None  # type: ignore[assignment]
    scores: dict[str, float | None]  # type: ignore[assignment]


class Answer(Verdict):
    """Of all that was sent. `seconds` is null for text alone, `segments` for what was classified as a whole."""

    seconds: float | None
    segments: list[SegmentVerdict] | None = None


class Problem(BaseModel):
    """Why there is no answer, in one sentence."""

    detail: str


class Health(BaseModel):
    """What is running; `busy` of the `places` are taken."""

    status: str
    version: str
    checkpoint: str
    labels: list[str]
    busy: int
    places: int


class GivenUp(Exception):
    """Nobody waits for the answer any more."""


def classify_upload(
    classifier: MMSERPipeline,
    sound: bytes | None,
    text: str | None,
    max_seconds: float = math.inf,
    given_up: threading.Event | None = None,
) -> dict[str, Any]:
    """
    The answer to one request, as `Answer` has it. A recording above 30 s is cut into segments of 6 s.

    Args:
        classifier: the pipeline of a checkpoint.
        sound (`bytes`): content of an audio file.
        text (`str`): what is said.
        max_seconds (`float`): of the recording.
        given_up: stops the work between two segments.

    Raises:
        ValueError: what cannot be used, in one sentence.
        GivenUp: as was asked for.
    """
    one = Input("upload", text=text)
    prediction = Prediction(one)
    if sound is not None:
        one.seconds = audio_length(sound, RATE) / RATE
        if one.seconds > max_seconds:
            raise ValueError(f"The recording lasts {one.seconds:.0f} s, and this server takes {max_seconds:g} s.")
        if silence := why_silent(sound):
            raise ValueError(f"file: {silence}.")
    is_long = one.seconds is not None and one.seconds > LONG_SECONDS
    if is_long and text is not None:
        raise ValueError(
            f"The text has no times, and the recording lasts {one.seconds:.0f} s, so it is cut into segments: leave "
            f"the text out, or send pieces of at most {LONG_SECONDS:g} s with their texts."
        )
    if is_long:
        chunks = classifier.iterate_chunks(
            {"bytes": sound}, batch_size=BATCH_SIZE, chunk_length_s=CHUNK_SECONDS, return_uncertainty=True
        )
        for chunk in chunks:
            start, end = chunk["timestamp"]
            prediction.segments.append(Segment(start, end, chunk["scores"]))
            if given_up is not None and given_up.is_set():
                raise GivenUp
        take_silence_out(prediction.segments, {"bytes": sound}, classifier.processor.feature_extractor.sampling_rate)
        prediction.scores = mean_scores(prediction.segments)
        if not prediction.scores:
            raise ValueError(f"file: {UNHEARD}.")
    else:
        item = {**({} if sound is None else {"bytes": sound}), **({} if text is None else {"text": text})}
        prediction.scores = classifier(item, return_uncertainty=True)
    hide_moot_unknown(classifier, [prediction])
    return nested(prediction, classifier.labels, by_segment=is_long)


class Worker:
    """
    The model in a thread of its own, which answers one request at a time, and the places for those that wait.

    Args:
        classifier: the pipeline of a checkpoint.
        limits: what is let in.
    """

    def __init__(self, classifier: MMSERPipeline, limits: Limits):
        self.classifier, self.limits = classifier, limits
        self.places, self.taken = limits.waiting + 1, 0  # both belong to the thread of the event loop
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._seconds = 1.0  # that an answer takes, a running mean

    def submit(self, file: BinaryIO | None, text: str | None, given_up: threading.Event) -> Future[dict[str, Any]]:
        """The answer to come for an uploaded file, its text or both."""
        return self._executor.submit(self._answer, file, text, given_up)

    def _answer(self, file: BinaryIO | None, text: str | None, given_up: threading.Event) -> dict[str, Any]:
        start = time.monotonic()
        sound = None if file is None else file.read()
        answer = classify_upload(self.classifier, sound, text, self.limits.max_seconds, given_up)
        self._seconds += 0.2 * (time.monotonic() - start - self._seconds)
        return answer

    def warm_up(self) -> None:
        """Classify something once: what does not work shows before the first request, which then is no slower."""
        extractor = self.classifier.processor.feature_extractor
        rate = 16_000 if extractor is None else extractor.sampling_rate
        sound = np.random.default_rng(0).normal(0, 0.1, rate).astype(np.float32)  # silence would be warned of
        item = {"text": "hello"} if extractor is None else {"raw": sound, "sampling_rate": rate}
        self.classifier(item)

    def retry_after(self) -> int:
        """Seconds until a place is free, as far as can be told."""
        return max(1, math.ceil(self._seconds))

    def close(self) -> None:
        """Finish what has begun; what waits is dropped."""
        self._executor.shutdown(wait=True, cancel_futures=True)


class Gate:
    """
    Lets at most `worker.places` requests in, each with a body that is not too large and arrives in time; a middleware.

    A request has its place until its answer is there, or until the model is done with it if nobody waits any more. A
    body is only read while it is within its limits; a client that is refused before it has sent all of its body is
    read on for a moment and at most once the limit, as otherwise it may never see the answer, then its connection is
    closed.
    """

    def __init__(self, app: ASGIApp, worker: Worker):
        self.app, self.worker, self.limits = app, worker, worker.limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        _read_as_latin(scope)
        body = _Body(receive, send, self.limits)
        refusal = self._refuse(Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, body.receive, body.send)
            return
        self.worker.taken += 1
        try:
            await self.app(scope, body.receive, body.send)
        finally:
            self._leave(scope.get(WORK))

    def _refuse(self, headers: Headers) -> JSONResponse | None:
        """What can be told without the body."""
        if headers.get("content-type", "").split(";")[0].strip().lower() not in FORMS:
            return _problem(415, f"Send a form with a file, as in: {SEND_A_FORM}")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.limits.max_bytes:
            return _problem(413, _too_large(self.limits))
        if self.worker.taken >= self.worker.places:
            wait = self.worker.retry_after()
            told = f"The server is busy, with {self.worker.taken} requests: try again in {wait} s."
            return _problem(429, told, {"Retry-After": str(wait)})
        return None

    def _leave(self, work: Future | None) -> None:
        def free() -> None:
            self.worker.taken -= 1

        if work is None or work.done():
            free()
        else:
            loop = asyncio.get_running_loop()
            work.add_done_callback(lambda _: loop.call_soon_threadsafe(free))


class _Body:
    """The body of one request within its limits, and the answer to one that has not arrived whole."""

    def __init__(self, receive: Receive, send: Send, limits: Limits):
        self._receive, self._send, self._limits = receive, send, limits
        self._size, self._is_whole = 0, False
        self._deadline = time.monotonic() + limits.timeout

    async def receive(self) -> Message:
        """Raises HTTPException for a body that is too large, 413, or too slow, 408."""
        if self._is_whole:  # what comes now is that the client has gone
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._deadline - time.monotonic())
        except TimeoutError as error:
            detail = f"The request did not arrive within {self._limits.timeout:g} s."
            raise HTTPException(408, detail) from error
        self._size += len(message.get("body", b""))
        self._is_whole = message["type"] == "http.disconnect" or not message.get("more_body", False)
        if self._size > self._limits.max_bytes:
            raise HTTPException(413, _too_large(self._limits))
        return message

    async def send(self, message: Message) -> None:
        """Where the body has not arrived whole, the connection ends with the answer."""
        if self._is_whole:
            await self._send(message)
        elif message["type"] == "http.response.start":
            await self._send({**message, "headers": [*message["headers"], (b"connection", b"close")]})
        else:
            await self._send({**message, "more_body": True})
            await self._linger()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _linger(self) -> None:
        end, size, is_over = time.monotonic() + LINGER_SECONDS, 0, False
        while not is_over and size <= self._limits.max_bytes and (left := end - time.monotonic()) > 0:
            try:
                message = await asyncio.wait_for(self._receive(), left)
            except TimeoutError:
                return
            size += len(message.get("body", b""))
            is_over = not message.get("more_body", False)


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)


def _too_large(limits: Limits) -> str:
    return f"The request is larger than {limits.max_megabytes:g} MB, which is what this server takes."


async def _wait(request: Request, work: Future, given_up: threading.Event, timeout: float) -> dict[str, Any]:
    """The result of the work; gives it up if it takes too long or the client goes."""
    waiting, deadline = asyncio.wrap_future(work), time.monotonic() + timeout
    while not waiting.done():
        await asyncio.wait([waiting], timeout=POLL_SECONDS)
        is_late = time.monotonic() > deadline
        if not waiting.done() and (is_late or await request.is_disconnected()):
            given_up.set()
            waiting.cancel()  # what has not begun does not begin
            raise HTTPException(504, f"There was no answer within {timeout:g} s: send less, or try again later.")
    return waiting.result()


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": description}
    for status, description in {
        408: "The request arrived too slowly.",
        413: "The request is too large; it is not read to its end.",
        415: "The request is no form.",
        422: "The file is no sound that can be read, the recording is too long, or there is nothing to classify.",
        429: "The server is busy. `Retry-After` says in how many seconds to try again.",
        504: "The answer took too long.",
    }.items()
}


def create_app(classifier: MMSERPipeline, limits: Limits | None = None, checkpoint: str = "") -> FastAPI:
    """
    The application: `POST /classify`, `GET /health`, its description at `/openapi.json`, and as a page at `/docs`.

    Args:
        classifier: the pipeline of a checkpoint, as `mmser.prediction_run.load_classifier` gives it.
        limits: what is let in.
        checkpoint: what `/health` calls the model.
    """
    worker = Worker(classifier, limits or Limits())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(worker.warm_up)
        yield
        worker.close()

    # Its own page of documentation loads scripts from another host: /docs is ours
    app = FastAPI(
        title="MMSER", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Emotions in speech: send a recording, its transcript or both, and get the class, its "
        "probability, an uncertainty and whether it is none of the classes.",
    )  # fmt: skip
    app.add_middleware(Gate, worker=worker)

    @app.exception_handler(RequestValidationError)
    async def refuse_fields(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        kinds = {
            "file": "this is a text, where the content of a file belongs",
            "text": "this is a file; send the words",
        }
        name = str(first["loc"][-1])
        return _problem(422, f"{name}: {kinds.get(name, first['msg'])}. Send it as in: {SEND_A_FORM}")

    @app.post("/classify", responses=RESPONSES, summary="Classify a recording, its text, or both")
    async def classify(
        request: Request,
        file: Annotated[
            UploadFile | None,
            File(description=f"Audio file of any format and sampling rate. Above {LONG_SECONDS:g} s it is cut."),
        ] = None,
        text: Annotated[str | None, Form(description="What is said, in any language that the model reads.")] = None,
    ) -> Answer:
        """One answer for all that is sent. Look at `answer` first: it is "unknown" where a clip is none of the
        classes, and `label` then only the nearest one. A recording above 30 s also has its `segments`."""
        await _check_fields(request)
        words = _as_utf8(text or "", request).strip() or None
        if file is None and words is None:
            raise HTTPException(422, f"There is nothing to classify. Send a file, a text or both: {SEND_A_FORM}")
        given_up = threading.Event()
        work = request.scope[WORK] = worker.submit(None if file is None else file.file, words, given_up)
        try:
            return Answer(**await _wait(request, work, given_up, worker.limits.timeout))
        except (ValueError, OSError) as error:
            raise HTTPException(422, reason(error, Input(""))) from error

    @app.get("/health", summary="What is running, and how busy it is")
    async def health() -> Health:
        """Answers at once, also while the model works."""
        return Health(
            status="ok", version=__version__, checkpoint=checkpoint, labels=classifier.labels,
            busy=worker.taken, places=worker.places,
        )  # fmt: skip

    @app.get("/docs", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(render_page(app.openapi()))

    return app


async def _check_fields(request: Request) -> None:
    """Raise HTTPException for what would be ignored: fields with other names, twice the same, and a query."""
    names = [name for name, _ in (await request.form()).multi_items()]
    allowed = "a form has the fields file and text"
    for name in (*names, *request.query_params):
        if name not in FIELDS:
            raise HTTPException(422, f"There is no field {_shown(name)!r}: {allowed}, as in: {SEND_A_FORM}")
        if names.count(name) != 1:
            problem = (
                f"{name} is in the address" if name not in names else f"{name} is there {names.count(name)} times"
            )
            raise HTTPException(422, f"{problem}: {allowed}, once each, as in: {SEND_A_FORM}")
    if request.query_params:
        raise HTTPException(422, f"{next(iter(request.query_params))} is in the address, too: {allowed} alone.")


def _shown(name: str) -> str:
    """The name of a field, which was read as Latin-1."""
    return name.encode("latin-1", "replace").decode("utf-8", "replace")[:100]


def _as_utf8(text: str, request: Request) -> str:
    """The text of a form, which was read as Latin-1 if the request names no encoding, so that no byte is lost."""
    try:
        decoded = text.encode("latin-1").decode("utf-8") if request.scope.get(READ_AS_LATIN) else text
    except UnicodeDecodeError as error:
        raise HTTPException(422, f"text: {NOT_UTF8}") from error
    if "\N{REPLACEMENT CHARACTER}" in decoded:
        raise HTTPException(422, f"text: {NOT_UTF8}")
    return decoded


def _read_as_latin(scope: Scope) -> None:
    """
    Let texts of a form be read as Latin-1, where the request says nothing else than UTF-8.

    Starlette reads what is not UTF-8 as Latin-1, and afterwards nothing tells which it was.
    """
    kind = Headers(scope=scope).get("content-type", "")
    parts = [part.strip() for part in kind.split(";")]
    charsets = [part.partition("=")[2].strip('" ').lower() for part in parts if part.lower().startswith("charset=")]
    if parts[0].lower() != FORMS[0] or any(name not in ("utf-8", "utf8") for name in charsets):
        return
    kept = [part for part in parts if not part.lower().startswith("charset=")]
    kind = "; ".join([*kept, "charset=latin-1"])
    scope["headers"] = [
        (name, kind.encode("latin-1") if name == b"content-type" else value) for name, value in scope["headers"]
    ]
    scope[READ_AS_LATIN] = True


def render_page(description: dict[str, Any]) -> str:
    """An OpenAPI description as a page that loads nothing from elsewhere."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["words"] = _words
    schemas = description["components"]["schemas"]

    def fields(schema: dict[str, Any]) -> list[tuple[str, str, str]]:
        """(name, type, description) of each field of a schema, or of what it refers to."""
        own = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        return [
            (name, _kind(field), field.get("description", "")) for name, field in own.get("properties", {}).items()
        ]

    template = environment.from_string(PAGE.read_text(encoding="utf-8"))
    return template.render(api=description, fields=fields, kind=_kind)


def _words(text: str) -> Markup:
    """What is between backquotes, set as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _kind(schema: dict[str, Any]) -> str:
    """The type of a field in a word or two."""
    if "anyOf" in schema:
        return " or ".join(_kind(option) for option in schema["anyOf"])
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_kind(schema['additionalProperties'])}"
    is_file = schema.get("format") == "binary" or "contentMediaType" in schema
    return "file" if is_file else schema.get("type", "value")
