"""A host app's own traffic, in its old way: short transactions that know nothing of credits, at a fixed rate.

The load is open: each transaction is due at a moment fixed before, and its latency counts from then. So a stall is
not hidden by clients that politely wait with sending.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psycopg

READ = "SELECT u.email, w.title FROM users u JOIN workshops w ON w.user_id = u.id WHERE u.email = %s"
WRITE_USER = "UPDATE users SET email = email WHERE email = %s"
WRITE_BOTH = (
    "WITH u AS (UPDATE users SET email = email WHERE email = %s RETURNING id)"
    " UPDATE workshops w SET title = w.title FROM u WHERE w.user_id = u.id"
)


@dataclass
class Traffic:
    """The results of the clients: latencies in milliseconds, and errors."""

    latencies_ms: list[tuple[float, float]] = field(default_factory=list)  # (due, latency)
    errors: list[psycopg.Error] = field(default_factory=list)

    @property
    def worst_ms(self) -> float:
        return max((latency for _, latency in self.latencies_ms), default=0.0)


@contextmanager
def traffic(url: str, *, clients: int = 8, per_second: float = 100, users: int = 500) -> Iterator[Traffic]:
    """Run it in the background; ``url`` is libpq's."""
    seen = Traffic()
    due: queue.Queue[float | None] = queue.Queue()
    stop = threading.Event()
    ready = threading.Barrier(clients + 2)

    def schedule() -> None:
        ready.wait()
        at = time.monotonic()
        while not stop.is_set():
            due.put(at)
            at += 1 / per_second
            time.sleep(max(0, at - time.monotonic()))
        for _ in range(clients):
            due.put(None)

    def client() -> None:
        with psycopg.connect(url, autocommit=True, application_name="app") as conn:
            conn.execute(READ, ("user 1",))
            ready.wait()
            while (at := due.get()) is not None:
                try:
                    email = f"user {random.randrange(users) + 1}"
                    conn.execute(random.choice((READ, READ, WRITE_USER, WRITE_BOTH)), (email,))
                except psycopg.Error as error:
                    seen.errors.append(error)
                seen.latencies_ms.append((at, (time.monotonic() - at) * 1000))

    threads = [threading.Thread(target=schedule), *(threading.Thread(target=client) for _ in range(clients))]
    for thread in threads:
        thread.start()
    ready.wait()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()
