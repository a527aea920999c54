# SPDX-License-Identifier: Apache-2.0
"""A web server on this machine whose answers never end, lie, or lead elsewhere: `with unkind_server() as address:`."""

import contextlib
import http.server
import threading
import time

FINE = b"fine" * 1000
METADATA = "http://169.254.169.254/latest/meta-data/"
ELSEWHERE = {
    "to_fine": "/fine",
    "to_file": "file:///etc/passwd",
    "to_ftp": "ftp://127.0.0.1/a.wav",
    "to_metadata": METADATA,
    "to_metadata_in_disguise": "http://2852039166/",  # the same number, as whole
    "to_metadata_in_ipv6": "http://[::ffff:169.254.169.254]/",
    "to_private": "http://10.0.0.1/a.wav",
    "in_circles": "/in_circles",
}


class Unkind(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = self.path.strip("/")
        with contextlib.suppress(OSError):  # the client has gone
            getattr(self, name, self.elsewhere)()
        self.close_connection = True

    def answer(self, status=200, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()

    def fine(self):
        self.answer(Content_Length=len(FINE))
        self.wfile.write(FINE)

    def without_length(self):
        self.answer(Connection="close")
        self.wfile.write(FINE)

    def in_chunks(self):
        self.answer(Transfer_Encoding="chunked")
        self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(FINE), FINE))

    def elsewhere(self):
        name = self.path.strip("/")
        self.answer(302, Location=ELSEWHERE[name], Content_Length=0)

    def to_fine_with_words_without_end(self):
        self.answer(302, Location="/fine")
        self.write_for_ever()

    def endless(self):
        self.answer(Connection="close")
        self.write_for_ever()

    def endless_chunks(self):
        self.answer(Transfer_Encoding="chunked")
        self.write_for_ever(b"100000\r\n%s\r\n" % bytes(2**20))

    def write_for_ever(self, piece=bytes(2**20)):
        for _ in range(1000):  # and no longer: a client that fails would hang
            self.wfile.write(piece)

    def huge(self):
        self.answer(Content_Length=10**15)
        self.wfile.write(FINE)

    def cut(self):
        self.answer(Content_Length=10 * len(FINE))
        self.wfile.write(FINE)

    def more_than_it_says(self):
        self.answer(Content_Length=len(FINE))
        self.wfile.write(2 * FINE)

    def slow(self):
        self.answer(Content_Length=len(FINE))
        self.write_slowly()

    def slow_in_its_headers(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        self.write_slowly()

    def write_slowly(self):
        for byte in FINE[:100]:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            time.sleep(0.05)

    def no_answer(self):
        self.wfile.write(b"nothing of HTTP\r\n\r\n")

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def unkind_server():
    """Its address, without a slash at the end."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unkind) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
