"""A receiver of webhooks as a process of its own: it answers as it is told, and writes down what it was sent.

    python tests/webhook_receiver.py FOLDER

What is sent to ``/NAME/…`` is of the folder ``FOLDER/NAME``. Its ``answers`` holds what is answered, a status a line,
the last one for ever: ``200``, ``500``, ``302``, ``hang``, ``drip`` for a 200 whose headers come bit by bit for some
seconds, or ``close`` for a connection that ends without an answer. Its ``received`` gets a line of JSON for each
request. The port is written to stdout.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(sys.argv[1])
TURN = threading.Lock()


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        headers = {name.lower(): value for name, value in self.headers.items()}
        folder = FOLDER / self.path.split("/")[1]
        with TURN:  # two endpoints may be sent to at the same moment
            answers = (folder / "answers").read_text().split()
            with (folder / "received").open("a") as received:
                received.write(json.dumps({"headers": headers, "body": body, "answer": answers[0]}) + "\n")
            if len(answers) > 1:
                (folder / "answers").write_text("\n".join(answers[1:]))
        if answers[0] == "hang":
            time.sleep(60)
        if answers[0] == "drip":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            with suppress(OSError):  # the sender has enough of it
                for _ in range(50):
                    self.wfile.write(b".")
                    time.sleep(0.1)
                self.wfile.write(b"\r\n\r\n")
            self.close_connection = True
            return
        if answers[0] == "close":
            self.close_connection = True
            return
        self.send_response(int(answers[0]))
        if answers[0] == "302":
            self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()
