# SPDX-License-Identifier: Apache-2.0
"""Serve a model over HTTP: POST a recording, get JSON.

mmser serve                                   # the small model that comes with MMSER, on this machine alone
mmser serve --checkpoint runs/mine --port 9000
curl -F file=@clip.wav -F text='What a day!' http://127.0.0.1:8000/classify

/docs describes the API, /openapi.json does it for programs, and /health says what is running. There is no password:
let the server be reached from elsewhere only behind something that asks for one.
"""

import argparse
import contextlib
import signal
import socket
import sys
from types import ModuleType

from mmser.console import run_command
from mmser.prediction_arguments import chosen_checkpoint


def make_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = argparse.ArgumentParser(
        prog="mmser serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", metavar="NAME", help="MMSER checkpoint, or an export (default: the small one)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: the GPU, if there is one)")
    parser.add_argument(
        "--max_megabytes", type=float, default=25, metavar="MB", help="size of a request (default: 25)"
    )
    parser.add_argument(
        "--max_seconds", type=float, default=600, metavar="S", help="length of a recording (default: 600)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60,
        metavar="S",
        help="for a request to arrive, and to be answered (default: 60)",
    )
    parser.add_argument(
        "--waiting", type=int, default=16, metavar="N", help="requests that may wait for the model (default: 16)"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; requests that are being answered get their answer. Returns the exit status."""
    options = make_parser().parse_args(arguments)
    uvicorn = _import_uvicorn()
    checkpoint = chosen_checkpoint(options.checkpoint)

    # Late: --help does not wait for torch
    from mmser.prediction_run import load_classifier
    from mmser.serving import Limits, create_app

    limits = Limits(options.max_megabytes, options.max_seconds, options.timeout, options.waiting)
    with _listen(options.host, options.port) as listener:
        app = create_app(load_classifier(checkpoint, options.device), limits, checkpoint)
        host, port = listener.getsockname()[:2]
        print(
            f"MMSER listens on http://{f'[{host}]' if ':' in host else host}:{port}/docs; Ctrl-C stops it.", flush=True
        )
        settings = uvicorn.Config(app, timeout_graceful_shutdown=round(limits.timeout) + 1, server_header=False)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn ends well, and passes the signal on
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listener])
    return 0


def _import_uvicorn() -> ModuleType:
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ImportError('A server needs FastAPI and its like: `pip install "mmser[serve]"`') from error
    return uvicorn


def _listen(host: str, port: int) -> socket.socket:
    """Before the model is loaded: an address that is taken is told at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        told = str((isinstance(error, OSError) and error.strerror) or error).removesuffix(".")
        raise ValueError(
            f"--host {host} --port {port} cannot be listened on: {told}. --port 0 takes one that is free."
        ) from error


def command() -> None:
    """The command alone, without those beside it: `python -m mmser.serve_command`."""
    run_command(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    command()
