"""A proxy between a client and PostgreSQL that knows where one protocol message ends, and does harm there."""

from __future__ import annotations

import contextlib
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import sqlalchemy as sa

Side = Literal["to the server", "to the client"]
Harm = Literal["cut", "cut for good", "cut in the middle", "twice", "delay"]
SOCKET = ".s.PGSQL.5432"


@dataclass
class Fault:
    """Harm at the ``number``-th message of one side, counted from when it is set; ``done`` once it was done.

    After ``cut for good`` the proxy takes no new connection.
    """

    side: Side
    number: int
    harm: Harm
    done: threading.Event = field(default_factory=threading.Event)


class Proxy:
    """Listens on a socket of its own. ``seen`` counts the messages of each side since the last ``watch()``, and
    ``round_trips`` how often the server was done and waited for the client."""

    def __init__(self, url: str) -> None:
        address = sa.make_url(url)
        self.upstream = str(Path(str(address.query["host"]), SOCKET))
        self.folder = tempfile.mkdtemp(prefix="tallystick-wire-")
        self.url = f"{url.split('?', maxsplit=1)[0]}?host={quote(self.folder, safe='')}&port=5432"
        self.lock = threading.Lock()
        self.watch(None)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(Path(self.folder, SOCKET)))
        self.listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        shutil.rmtree(self.folder)

    def watch(self, fault: Fault | None) -> None:
        with self.lock:
            self.fault, self.seen, self.round_trips = fault, {"to the server": 0, "to the client": 0}, 0

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self.upstream)
            for source, target, side in ((client, server, "to the server"), (server, client, "to the client")):
                threading.Thread(target=self._pump, args=(source, target, side), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, side: Side) -> None:
        try:
            for message in _messages(source, begins_untyped=side == "to the server"):
                leaving = side == "to the server" and message[:1] == b"X"  # nobody waits for an answer
                harm = None if leaving else self._harm(side)
                if harm == "cut for good":
                    Path(self.folder, SOCKET).unlink()
                    return
                if harm in ("cut", "cut in the middle"):
                    target.sendall(b"" if harm == "cut" else message[: len(message) // 2])
                    return
                if harm == "delay":
                    threading.Event().wait(0.05)
                if side == "to the client" and message[:1] == b"Z":  # ready for the next query
                    with self.lock:
                        self.round_trips += 1
                target.sendall(message * 2 if harm == "twice" else message)
        except OSError:
            pass  # the other direction was cut
        finally:
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def _harm(self, side: Side) -> Harm | None:
        with self.lock:
            number = self.seen[side]
            self.seen[side] += 1
            fault = self.fault
            if fault is None or (fault.side, fault.number) != (side, number):
                return None
            fault.done.set()
            return fault.harm


def _messages(source: socket.socket, *, begins_untyped: bool) -> Iterator[bytes]:
    """Whole messages: a type, a length that counts itself, a body. A client's first one has no type."""
    pending, typed = b"", not begins_untyped
    while chunk := source.recv(65536):
        pending += chunk
        while len(pending) >= (5 if typed else 4):
            length = struct.unpack_from("!I", pending, int(typed))[0] + int(typed)
            if len(pending) < length:
                break
            yield pending[:length]
            pending, typed = pending[length:], True
