"""A client far away: a proxy on loopback that holds every byte for a while, in both directions."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

Pipe = queue.Queue[tuple[float, bytes]]


@contextmanager
def far_away(target: Path, *, one_way_s: float, port: int = 0) -> Iterator[int]:
    """The port on 127.0.0.1 that leads to the socket ``target``; any free one unless given."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        threading.Thread(target=_accept, args=(listener, target, one_way_s), daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, target: Path, one_way_s: float) -> None:
    with suppress(OSError):  # the listener was closed
        while True:
            near, _ = listener.accept()
            threading.Thread(target=_connection, args=(near, target, one_way_s), daemon=True).start()


def _connection(near: socket.socket, target: Path, one_way_s: float) -> None:
    with near, socket.socket(socket.AF_UNIX) as far:
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        far.connect(str(target))
        threads = []
        for source, sink in ((near, far), (far, near)):
            pipe: Pipe = queue.Queue()
            threads.append(threading.Thread(target=_receive, args=(source, pipe, one_way_s), daemon=True))
            threads.append(threading.Thread(target=_send, args=(pipe, sink), daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _receive(source: socket.socket, pipe: Pipe, one_way_s: float) -> None:
    data = b"more"
    while data:
        try:
            data = source.recv(65536)
        except OSError:
            data = b""
        pipe.put((time.monotonic() + one_way_s, data))


def _send(pipe: Pipe, sink: socket.socket) -> None:
    with suppress(OSError):
        while True:
            at, data = pipe.get()
            time.sleep(max(0, at - time.monotonic()))
            if not data:
                sink.shutdown(socket.SHUT_WR)
                return
            sink.sendall(data)
