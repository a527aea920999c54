# SPDX-License-Identifier: Apache-2.0
"""How many requests `mmser serve` answers on this machine, what overload looks like, and whether its memory grows.

    python benchmarks/serving.py
    python benchmarks/serving.py --checkpoint runs/mine --seconds 30 --requests 2000

Clients are threads that send one clip of 3 s with its text over loopback and wait for the answer. Processor time is
that of the server, which other work on the machine hardly changes; latencies and rates are of the machine as it was,
whose load is noted. Updates `benchmarks/results/serving.json`.
"""

import argparse
import contextlib
import http.client
import io
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.tables import ROOT, Row, parse_arguments, publish, read_results, table, three_digits
from mmser.prediction_run import load_classifier
from mmser.results import environment

RATE, SECONDS, TEXT = 16_000, 3.0, "Dogs are sitting by the door."
CLIENTS = (1, 2, 4, 8)
WAITING = 8  # requests that may wait, in all sections
OVERLOAD_CLIENTS, PAUSE_SECONDS = 32, 0.5  # what a refused client waits before it asks again
TICKS = os.sysconf("SC_CLK_TCK")


def make_clip() -> bytes:
    """A wav file: noise that swells four times a second, as syllables do."""
    times = np.arange(round(RATE * SECONDS)) / RATE
    noise = np.random.default_rng(0).normal(size=len(times))
    file = io.BytesIO()
    soundfile.write(file, 0.1 * noise * np.sin(4 * np.pi * times) ** 2, RATE, format="WAV")
    return file.getvalue()


def make_request(clip: bytes) -> tuple[bytes, dict[str, str]]:
    """The body and the headers of a form with the clip and its text."""
    part = "--b\r\nContent-Disposition: form-data; name="
    sound = f'{part}"file"; filename="clip.wav"\r\nContent-Type: audio/wav\r\n\r\n'.encode() + clip
    return (
        sound + f'\r\n{part}"text"\r\n\r\n{TEXT}\r\n--b--\r\n'.encode(),
        {"Content-Type": "multipart/form-data; boundary=b"},
    )


class Server:
    """`mmser serve` in a process of its own; its port, and what the system says of it."""

    def __init__(self, process: subprocess.Popen, port: int):
        self.process, self.port = process, port

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS  # in user code and in the system

    def memory(self) -> float:
        """Megabytes of its own, in memory or swapped out where other work needs the room."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return sum(int(size) for size in re.findall(r"(?:RssAnon|VmSwap):\s+(\d+) kB", status)) / 1000


@contextlib.contextmanager
def serve(checkpoint: str, waiting: int) -> Iterator[Server]:
    """Start the server, wait until it answers, and stop it at the end, as a service manager does."""
    words = ["--checkpoint", checkpoint, "--port", "0", "--waiting", str(waiting), "--timeout", "120"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mmser", "serve", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        port = 0
        for line in process.stdout or ():
            if said := re.search(r"http://127\.0\.0\.1:(\d+)/", line):
                port = int(said[1])
                break
        if not port:
            raise RuntimeError(f"mmser serve ended with code {process.wait()} and said nothing of its address")
        threading.Thread(target=lambda: list(process.stdout or ()), daemon=True).start()  # its log goes on
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        connection.request("GET", "/health")
        connection.getresponse().read()
        yield Server(process, port)
    finally:
        process.terminate()
        process.wait(timeout=150)


def ask_for(
    port: int, clients: int, request: tuple[bytes, dict[str, str]], seconds: float | None = None, number: int = 0
) -> tuple[list[tuple[int, float]], float]:
    """
    Let clients ask, for some seconds or until they have `number` answers together.

    Returns:
        (status, seconds) of each request, and the seconds that all took.
    """
    results: list[tuple[int, float]] = []
    start = time.perf_counter()

    def goes_on() -> bool:
        return len(results) < number if seconds is None else time.perf_counter() - start < seconds

    def client() -> None:
        while goes_on():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
            begin = time.perf_counter()
            connection.request("POST", "/classify", *request)
            response = connection.getresponse()
            response.read()
            connection.close()
            results.append((response.status, time.perf_counter() - begin))
            if response.status == 429:
                time.sleep(PAUSE_SECONDS)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, time.perf_counter() - start


def quantiles(results: Sequence[tuple[int, float]], status: int) -> dict[str, float | None]:
    """The median and the 95th percentile, in ms, of the requests with this status."""
    times = [1000 * seconds for given, seconds in results if given == status]
    return {
        "p50, ms": float(np.median(times)) if times else None,
        "p95, ms": float(np.quantile(times, 0.95)) if times else None,
    }


def measure_load(server: Server, request: tuple[bytes, dict[str, str]], seconds: float) -> list[Row]:
    """As many clients as fit into the queue."""
    rows = []
    for clients in CLIENTS:
        before = server.cpu_seconds()
        results, took = ask_for(server.port, clients, request, seconds)
        answered = sum(status == 200 for status, _ in results)
        rows.append(
            {
                "clients": clients,
                "answered": answered,
                "others": len(results) - answered,
                "requests per s": answered / took,
                **quantiles(results, 200),
                "processor ms per request": 1000 * (server.cpu_seconds() - before) / answered,
            }
        )
    return rows


def measure_overload(server: Server, request: tuple[bytes, dict[str, str]], seconds: float) -> list[Row]:
    """More clients than the queue has places."""
    before = server.memory()
    results, took = ask_for(server.port, OVERLOAD_CLIENTS, request, seconds)
    count = Counter(status for status, _ in results)
    return [
        {
            "status": status,
            "requests": count[status],
            "per s": count[status] / took,
            **quantiles(results, status),
            "memory, MB": f"{before:.0f} -> {server.memory():.0f}",
        }
        for status in sorted(count)
    ]


def measure_memory(server: Server, request: tuple[bytes, dict[str, str]], requests: int) -> list[Row]:
    """The memory of the server over many requests of four clients, and the line through its second half."""
    done, sizes = [0], [server.memory()]
    while done[-1] < requests:
        results, _ = ask_for(server.port, 4, request, number=max(1, requests // 20))
        done.append(done[-1] + len(results))
        sizes.append(server.memory())
    half = len(done) // 2
    slope = float(np.polyfit(done[half:], sizes[half:], 1)[0])
    return [
        {
            "requests": done[-1],
            "before, MB": sizes[0],
            "half-way, MB": sizes[half],
            "after, MB": sizes[-1],
            "slope of the second half, kB per request": round(1000 * slope, 3),
        }
    ]


def measure_pipeline(checkpoint: str, clip: bytes, repeats: int) -> list[Row]:
    """The same clip in a process without a server."""
    classifier = load_classifier(checkpoint, "cpu")
    times, before = [], 0.0
    for repeat in range(repeats + 1):  # the first warms up
        before = time.process_time() if repeat == 1 else before
        begin = time.perf_counter()
        classifier({"bytes": clip, "text": TEXT}, return_uncertainty=True)
        times.append(1000 * (time.perf_counter() - begin))
    spent = 1000 * (time.process_time() - before) / repeats
    return [{"clips": repeats, "p50, ms": float(np.median(times[1:])), "processor ms per clip": spent}]


def make_tables(report: dict) -> dict[str, str]:
    """A table for each section that was measured."""
    names = ("pipeline", "load", "overload", "memory")
    return {f"serving:{name}": table(report[name], three_digits) for name in names if name in report}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(ROOT / "checkpoints" / "mmser-small"), help="what is served")
    parser.add_argument("--seconds", type=float, default=20, help="how long each number of clients asks")
    parser.add_argument("--requests", type=int, default=1000, help="over which the memory is watched")
    options = parse_arguments(parser, "serving", arguments)
    report = read_results(options.output)[0] if options.from_results else {}
    if not options.from_results:
        clip = make_clip()
        request = make_request(clip)
        setting = {"clip, s": SECONDS, "model": Path(options.checkpoint).name, "waiting": WAITING, **environment()}
        report["setting"] = setting | {"load of the machine before": os.getloadavg()[0]}
        report["pipeline"] = measure_pipeline(options.checkpoint, clip, 20)
        with serve(options.checkpoint, WAITING) as server:
            ask_for(server.port, 1, request, number=3)
            report["load"] = measure_load(server, request, options.seconds)
            report["overload"] = measure_overload(server, request, options.seconds)
            report["memory"] = measure_memory(server, request, options.requests)
        report["setting"]["load of the machine after"] = os.getloadavg()[0]
    publish(make_tables(report), report, [], options)


if __name__ == "__main__":
    main()
