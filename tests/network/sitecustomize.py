# SPDX-License-Identifier: Apache-2.0
"""Imported by every Python that starts with this folder on its path: no call leaves the machine, and each is noted.

An audit hook sees what Python code does with the module `socket`. Native code that opens sockets itself is not seen.
"""

import os
import socket
import sys

CALLS = {"socket.connect": 1, "socket.sendto": 1, "socket.sendmsg": 1, "socket.getaddrinfo": 0}
CALLS |= {"socket.gethostbyname": 0, "socket.gethostbyaddr": 0}


def _note(event, arguments):
    if event not in CALLS:
        return
    address = arguments[CALLS[event]]
    if event == "socket.connect" and arguments[0].family == socket.AF_UNIX:
        return
    host = address[0] if isinstance(address, tuple) else address
    host = host.decode() if isinstance(host, bytes) else host
    if (
        host in (None, "", "localhost", "::1", "0.0.0.0")
        or str(host).startswith("127.")
        or host == socket.gethostname()
    ):
        return
    with open(os.environ["CALLS_FILE"], "a", encoding="utf-8") as file:
        file.write(f"{event} {address}\n")
    raise AssertionError(f"a call leaves the machine: {event} {address}")


sys.addaudithook(_note)
