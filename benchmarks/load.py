# SPDX-License-Identifier: Apache-2.0
"""Many callers and many calls: threads and processes give the answers of one thread, and the memory does not grow.

    python benchmarks/load.py
    python benchmarks/load.py --sections threads forked spawned

The calls are a mixture of clips (files, bytes, arrays), texts, both, lists of clips, long recordings and errors. A
first pass in one thread says what each is to give: every later call is compared with it. Slopes are those of a line
through the memory of the process after a warm-up of a fifth. Updates `benchmarks/results/load.json`.
"""

import argparse
import gc
import http.client
import io
import json
import multiprocessing
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil  # type: ignore[import-untyped]
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.serving import make_request, serve
from benchmarks.tables import ROOT, Row, parse_arguments, publish, read_results, table, three_digits
from mmser.prediction_run import load_classifier
from mmser.results import environment
from mmser.stream import MMSERStream
from processing_mmser import MMSERPipeline

RATE = 16_000
THREADS, WORKERS = 16, 4
CALLS = 10_000  # of one caller whose memory is watched
FRESH = 5  # pipelines that all threads call at once before anybody else has
TOLERANCE = 1e-5  # of a score: a batch of another width may be added up in another order
HUNG = 300  # seconds, many times what a worker takes
WARM_UP = 0.2  # share of the calls
SAMPLES = 40  # times that the memory is read
WORDS = ("Dogs are sitting by the door.", "what a joy", "", "nobody told me, and now it is too late")


class Call(NamedTuple):
    """What is given to the pipeline."""

    kind: str
    given: Any
    options: dict[str, Any]


def sound(seconds: float, number: int) -> np.ndarray:
    """Noise that swells as syllables do, another one for each number."""
    rng, times = np.random.default_rng(number), np.arange(round(seconds * RATE)) / RATE
    return (0.1 * rng.normal(size=len(times)) * np.sin((3 + number % 3) * np.pi * times) ** 2).astype(np.float32)


def make_calls(folder: Path) -> list[Call]:
    """One of each kind, and of most kinds some; files go into a folder."""
    asked = {"return_uncertainty": True}
    calls = []
    for number in range(6):
        samples = sound(0.4 + 0.2 * number, number)
        path = folder / f"{number}.{('wav', 'flac', 'ogg')[number % 3]}"
        soundfile.write(path, samples, RATE)
        array = {"array": samples, "sampling_rate": RATE}
        words = WORDS[number % len(WORDS)]
        calls += [
            Call("file", str(path), asked),
            Call("file and text", {"path": str(path), "text": words}, asked),
            Call("bytes", path.read_bytes(), {}),
            Call("array", array, asked),
            Call("stereo of 44.1 kHz", {"array": np.stack([samples, -0.5 * samples]), "sampling_rate": 44100}, {}),
        ]
        if words:
            calls.append(Call("text", {"text": words}, asked))
    calls.append(Call("list of clips", [str(folder / f"{number}.flac") for number in (1, 4)], {"batch_size": 2}))
    recording = np.concatenate([sound(1.0, number) for number in range(8)])
    soundfile.write(folder / "long.flac", recording, RATE)
    calls.append(Call("long recording", str(folder / "long.flac"), {"chunk_length_s": 2, **asked}))
    (folder / "broken.wav").write_bytes(b"RIFF, but nothing of the kind")
    wrong = {
        "no such file": str(folder / "gone.wav"),
        "broken file": str(folder / "broken.wav"),
        "broken bytes": b"ID3 and no more",
        "empty array": {"array": np.zeros(0, np.float32), "sampling_rate": RATE},
        "NaN": {"array": np.full(8000, np.nan, np.float32), "sampling_rate": RATE},
        "no rate": {"array": recording[:8000]},
        "nothing": {},
    }
    return [*calls, *(Call(f"error: {kind}", given, {}) for kind, given in wrong.items())]


def answer(classifier: MMSERPipeline, call: Call) -> Any:
    """What the pipeline says; of an error that is documented its words."""
    given = dict(call.given) if isinstance(call.given, dict) else call.given  # pipelines take values out
    try:
        return classifier(given, **call.options)
    except (ValueError, TypeError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def difference(found: Any, expected: Any) -> float:
    """The largest difference of two numbers in the same place; infinite where anything else differs."""
    if isinstance(expected, dict) and isinstance(found, dict) and expected.keys() == found.keys():
        return max((difference(found[name], value) for name, value in expected.items()), default=0.0)
    if isinstance(expected, (list, tuple)) and isinstance(found, (list, tuple)) and len(expected) == len(found):
        return max((difference(*pair) for pair in zip(found, expected, strict=True)), default=0.0)
    is_number = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (found, expected))
    return abs(found - expected) if is_number else 0.0 if found == expected else float("inf")


class Tally:
    """What came of calls; several threads may count."""

    def __init__(self) -> None:
        self.calls, self.refused, self.wrong, self.largest, self.told = 0, 0, 0, 0.0, ""
        self._lock = threading.Lock()

    def count(self, call: Call, found: Any, expected: Any) -> None:
        """Compare an answer with what it is to be."""
        apart = difference(found, expected)
        with self._lock:
            self.calls += 1
            self.refused += isinstance(found, str)
            self.largest = max(self.largest, apart if np.isfinite(apart) else 0.0)
            if not apart <= TOLERANCE:
                self.wrong += 1
                self.told = self.told or f"{call.kind}: {str(found)[:200]} in place of {str(expected)[:200]}"

    def row(self, what: str, workers: int, seconds: float, hung: int = 0, **more: Any) -> Row:
        """A line of the table."""
        if self.told:
            print(f"WRONG, {what}: {self.told}", flush=True)
        counts = {"calls": self.calls, "refused": self.refused, "wrong": self.wrong, "hung": hung}
        measured = {"largest difference": self.largest, "seconds": round(seconds, 1)}
        return {"what": what, "workers": workers, **counts, **measured, **more}


def order(calls: Sequence[Call], number: int, seed: int) -> Iterator[int]:
    """Which calls to make: long recordings and lists one time in 40, the others alike."""
    rng = np.random.default_rng(seed)
    weights = np.array([0.02 if call.kind.startswith(("long", "list")) else 1.0 for call in calls])
    return iter(rng.choice(len(calls), size=number, p=weights / weights.sum()).tolist())


# --- threads ---------------------------------------------------------------------------------------------------------


def in_threads(work: Callable[[int], None], number: int) -> int:
    """Let threads work at once. Returns: how many have not ended, or ended with an error that nobody expects."""
    barrier, failed = threading.Barrier(number), []

    def run(index: int) -> None:
        try:
            barrier.wait()
            work(index)
        except BaseException as error:
            failed.append(error)
            print(f"A thread failed: {type(error).__name__}: {error}", flush=True)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HUNG)
    return len(failed) + sum(thread.is_alive() for thread in threads)


def measure_threads(checkpoint: str, calls: Sequence[Call], expected: Sequence[Any], number: int) -> list[Row]:
    """Threads that share a pipeline: one that is in use, and some that nobody has called yet."""
    rows = []
    for what, pipelines, each in (("threads, one pipeline", 1, number), ("threads, pipelines just loaded", FRESH, 6)):
        tally, hung, start = Tally(), 0, time.perf_counter()
        for turn in range(pipelines):
            classifier = load_classifier(checkpoint, "cpu")
            if what.endswith("one pipeline"):
                answer(classifier, calls[0])

            hung += in_threads(partial(answer_some, classifier, calls, expected, each, 100 * turn, tally), THREADS)
        rows.append(tally.row(what, THREADS, time.perf_counter() - start, hung))
    return [*rows, measure_model_in_threads(checkpoint, number)]


def answer_some(
    classifier: MMSERPipeline,
    calls: Sequence[Call],
    expected: Sequence[Any],
    number: int,
    seed: int,
    tally: Tally,
    index: int,
) -> None:
    """What one thread does."""
    for place in order(calls, number, seed + index):
        tally.count(calls[place], answer(classifier, calls[place]), expected[place])


def measure_model_in_threads(checkpoint: str, number: int) -> Row:
    """The bare model and processor, without a pipeline."""
    classifier = load_classifier(checkpoint, "cpu")
    model, processor, tally = classifier.model, classifier.processor, Tally()

    def logits(place: int) -> list[float]:
        inputs = processor(audio=[sound(0.5 + 0.1 * place, place)], text=[WORDS[0]], sampling_rate=RATE)
        with torch.inference_mode():
            return model(**inputs).logits[0].tolist()

    expected = [logits(place) for place in range(6)]

    def work(index: int) -> None:
        for turn in range(number):
            place = (index + turn) % len(expected)
            tally.count(Call("model", place, {}), logits(place), expected[place])

    start = time.perf_counter()
    hung = in_threads(work, THREADS)
    return tally.row("threads, model and processor", THREADS, time.perf_counter() - start, hung)


# --- processes -------------------------------------------------------------------------------------------------------


def answer_in_process(source: Any, calls: Sequence[Call], places: Sequence[int], results: Any) -> None:
    """A worker: `source` is the pipeline of the parent (forked), or the checkpoint (spawned)."""
    classifier = load_classifier(source, "cpu") if isinstance(source, str) else source
    results.put([(place, answer(classifier, calls[place])) for place in places])


def measure_processes(
    checkpoint: str, calls: Sequence[Call], expected: Sequence[Any], number: int, method: str, threads: int = 1
) -> Row:
    """Workers that answer by a pipeline that their parent has already used, or that they load."""
    context: Any = multiprocessing.get_context(method)
    classifier, before = load_classifier(checkpoint, "cpu"), torch.get_num_threads()
    torch.set_num_threads(threads)
    answer(classifier, calls[0])
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # large enough for several threads
    tally, start, results = Tally(), time.perf_counter(), context.Queue()
    source = classifier if method == "fork" else checkpoint
    places = [list(order(calls, number, seed)) for seed in range(WORKERS)]
    workers = [
        context.Process(target=answer_in_process, args=(source, calls, own, results), daemon=True) for own in places
    ]
    for worker in workers:
        worker.start()
    done = collect(results, workers)
    torch.set_num_threads(before)
    for place, found in (pair for answers in done for pair in answers):
        tally.count(calls[place], found, expected[place])
    what = "spawned workers" if method == "spawn" else f"forked workers, parent with {threads} thread(s)"
    return tally.row(what, WORKERS, time.perf_counter() - start, hung=WORKERS - len(done))


def collect(results: Any, workers: Sequence[Any]) -> list[Any]:
    """What the workers put, as far as they come to it; none is left behind."""
    done: list[Any] = []
    end = time.monotonic() + HUNG
    while len(done) < len(workers) and time.monotonic() < end:
        try:
            done.append(results.get(timeout=1))
        except queue.Empty:
            if not any(worker.is_alive() for worker in workers):
                break
    for worker in workers:
        worker.join(10 if len(done) == len(workers) else 0)
        if worker.is_alive():
            worker.kill()
    return done


# --- memory ----------------------------------------------------------------------------------------------------------


class Memory:
    """The memory of a process over many calls, in MB (10^6 bytes)."""

    def __init__(self, total: int, read: Callable[[], float]):
        self.every, self.total, self._read = max(1, total // SAMPLES), total, read
        self.done: list[int] = []
        self.sizes: list[float] = []

    def after(self, calls: int) -> None:
        """Read it now and then."""
        if calls % self.every == 0:
            self.done.append(calls)
            self.sizes.append(self._read())

    def columns(self) -> Row:
        """The slope of a line through all after the warm-up, and what was there then and at the end."""
        first = next(place for place, done in enumerate(self.done) if done >= WARM_UP * self.total)
        slope = float(np.polyfit(self.done[first:], self.sizes[first:], 1)[0])
        ends = {"MB after warm-up": round(self.sizes[first], 1), "MB at the end": round(self.sizes[-1], 1)}
        return {"MB per 1,000 calls": round(1000 * slope, 3) + 0.0, **ends}


def own_memory() -> float:
    """Of this process, without what is garbage."""
    gc.collect()
    return psutil.Process().memory_info().rss / 1e6


def measure_calls(checkpoint: str, calls: Sequence[Call], expected: Sequence[Any], number: int) -> Row:
    """One caller, one pipeline."""
    classifier, tally, memory, start = (
        load_classifier(checkpoint, "cpu"),
        Tally(),
        Memory(number, own_memory),
        time.time(),
    )
    for done, place in enumerate(order(calls, number, seed=1), start=1):
        tally.count(calls[place], answer(classifier, calls[place]), expected[place])
        memory.after(done)
    return tally.row("pipeline, mixed calls", 1, time.time() - start, **memory.columns())


def measure_server(checkpoint: str, number: int) -> Row:
    """`mmser serve` over loopback: clips with a text, without one, text alone, a long recording, broken sound."""
    requests = server_requests()
    tally, start = Tally(), time.time()
    with serve(checkpoint, waiting=THREADS) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=HUNG)

        def ask(place: int) -> Any:
            connection.request("POST", "/classify", *requests[place][1])
            response = connection.getresponse()
            body = json.loads(response.read())
            return body if response.status == 200 else f"{response.status}: {body}"

        expected = [ask(place) for place in range(len(requests))]
        memory = Memory(number, server.memory)
        for done, place in enumerate(np.random.default_rng(2).integers(len(requests), size=number).tolist(), start=1):
            tally.count(Call(requests[place][0], None, {}), ask(place), expected[place])
            memory.after(done)
    return tally.row("server, mixed requests", 1, time.time() - start, **memory.columns())


def server_requests() -> list[tuple[str, tuple[bytes, dict[str, str]]]]:
    """Names, bodies and headers."""
    requests = []
    for number in range(6):
        file = io.BytesIO()
        soundfile.write(file, sound(0.4 + 0.2 * number, number), RATE, format=("WAV", "FLAC", "OGG")[number % 3])
        requests.append((f"clip {number}", make_request(file.getvalue())))
    text = {"Content-Type": "application/x-www-form-urlencoded"}
    requests.append(("text", (b"text=what+a+joy", text)))
    broken = [("broken sound", make_request(b"RIFF, but nothing of the kind")), ("nothing", (b"", text))]
    return requests + broken + [("no form", (b"{}", {"Content-Type": "application/json"}))]


def measure_stream(checkpoint: str, number: int) -> list[Row]:
    """One stream of `number` pieces, which repeat; and a stream in each of the threads, all of one pipeline."""
    classifier = load_classifier(checkpoint, "cpu")
    options: dict[str, Any] = {"sampling_rate": RATE, "chunk_length_s": 1.0, "stride_length_s": 0.0}
    loop = np.concatenate([sound(1.0, 0), sound(1.0, 1), np.zeros(RATE, np.float32)])  # what repeats after 3 pieces

    def events(stream: MMSERStream, turns: int) -> Iterator[Any]:
        for turn in range(turns):
            for piece in np.array_split(loop, 7 + turn % 3):  # pushes of several lengths
                yield from stream.push(piece)
        yield from stream.flush()

    def shown(event: Any) -> Any:
        return [event.speech > 0, event.scores, event.uncertainty]

    expected = [shown(event) for event in events(MMSERStream(classifier, **options), 2)][3:6]
    tally, memory, start = Tally(), Memory(number, own_memory), time.time()
    for done, event in enumerate(events(MMSERStream(classifier, **options), -(-number // 3)), start=1):
        if done > 3:  # the voice activity is still getting used to the noise
            tally.count(Call(f"piece {done % 3}", None, {}), shown(event), expected[(done - 1) % 3])
        memory.after(done)
    rows = [tally.row("live stream, pieces", 1, time.time() - start, **memory.columns())]
    tally, start = Tally(), time.time()

    def work(_: int) -> None:
        for done, event in enumerate(events(MMSERStream(classifier, **options), 4)):
            if done >= 3:
                tally.count(Call(f"piece {done % 3}", None, {}), shown(event), expected[done % 3])

    hung = in_threads(work, THREADS)
    return [*rows, tally.row("live streams in threads, one pipeline", THREADS, time.time() - start, hung)]


# ---------------------------------------------------------------------------------------------------------------------


def make_table(rows: Sequence[Row]) -> str:
    """The rows of all sections; what falls by less than is shown does not fall."""
    return table([{name: abs(value) if value == 0 else value for name, value in row.items()} for row in rows], short)


def short(value: float) -> str:
    """Of a float; a whole number as such."""
    return f"{value:.0f}" if value == int(value) else three_digits(value)


SECTIONS = ("threads", "forked", "spawned", "calls", "server", "stream")


def measure(checkpoint: str, number: int, sections: Sequence[str]) -> list[Row]:
    """The rows of these sections."""
    rows: list[Row] = []
    each = max(2, number // 250)  # of each thread and worker
    with tempfile.TemporaryDirectory(prefix="load_") as folder:
        calls = make_calls(Path(folder))
        expected = [answer(load_classifier(checkpoint, "cpu"), call) for call in calls]
        measured: dict[str, Callable[[], list[Row]]] = {
            "threads": lambda: measure_threads(checkpoint, calls, expected, each),
            "forked": lambda: [
                measure_processes(checkpoint, calls, expected, each, "fork", threads) for threads in (1, 2)
            ],
            "spawned": lambda: [measure_processes(checkpoint, calls, expected, each, "spawn")],
            "calls": lambda: [measure_calls(checkpoint, calls, expected, number)],
            "server": lambda: [measure_server(checkpoint, number)],
            "stream": lambda: measure_stream(checkpoint, number),
        }
        for section in sections:
            new = measured[section]()
            rows += new
            print(make_table(new), flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(ROOT / "checkpoints" / "mmser-small"))
    parser.add_argument("--calls", type=int, default=CALLS, help="over which the memory is watched")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    options = parse_arguments(parser, "load", arguments)
    report: Row = read_results(options.output)[0] if options.from_results else {}
    if not options.from_results:
        torch.set_num_threads(1)
        setting = {"model": Path(options.checkpoint).name, "tolerance": TOLERANCE, **environment()}
        setting["load of the machine before"] = os.getloadavg()[0]
        report = {"setting": setting, "rows": measure(options.checkpoint, options.calls, options.sections)}
    publish({"load": make_table(report["rows"])}, report, [], options)
    return report


if __name__ == "__main__":
    main()
