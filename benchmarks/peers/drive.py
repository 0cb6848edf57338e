"""One candidate at work: an adapter, driven from as many threads as asked. It runs in the candidate's own venv.

    python drive.py ADAPTER ACTION URL '{"options": "as JSON"}'

Only the standard library and the adapter: the same driver for every candidate. The answer is one line of JSON.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, Protocol
from uuid import uuid4

PROCESSES = 2  # at more than one connection: as many as the cores that the tables were made on
WARM_UP = 20  # calls of each thread that are not timed


class Adapter(Protocol):
    """The same calls for each candidate. Accounts are 1, 2, …; its pool holds ``connections``."""

    def __init__(self, url: str, connections: int) -> None: ...
    def create(self) -> None:
        """Its tables, the way its documentation says."""

    def open(self, account: int, credits: int) -> None:
        """A new account that holds so many credits, recorded as the candidate records them."""

    def consume(self, account: int, key: str) -> bool:
        """Spend one credit, committed; False if it was refused for want of credits."""

    def consume_again(self, account: int, key: str) -> bool:
        """As ``consume`` by a client that may repeat itself under one key; False also for a repetition."""

    def close(self) -> None: ...


def adapter(name: str, url: str, connections: int) -> Adapter:
    made: Adapter = importlib.import_module(f"adapters.{name}").Adapter(url, connections)
    return made


def setup(name: str, url: str, *, accounts: int, credits: int) -> None:
    made = adapter(name, url, 1)
    made.create()
    for account in range(1, accounts + 1):
        made.open(account, credits)
    made.close()


_gate: Any = None


def _enter(gate: Any) -> None:
    global _gate  # noqa: PLW0603 - a barrier can be inherited by a process, not sent to it
    _gate = gate


def _spend_in_threads(name: str, url: str, accounts: int, seconds: float, threads: int) -> dict[str, Any]:
    """Each thread consumes for so long, once all others of all processes are ready as well."""
    made = adapter(name, url, threads)
    took: list[float] = []
    errors: Counter[str] = Counter()

    def one(seed: float) -> None:
        rng, tag = random.Random(seed), uuid4().hex
        for n in range(WARM_UP):
            made.consume(rng.randint(1, accounts), f"{tag} warm {n}")
        _gate.wait()
        until, n = time.perf_counter() + seconds, 0
        while (begun := time.perf_counter()) < until:
            n += 1
            try:
                done = made.consume(rng.randint(1, accounts), f"{tag} {n}")
            except Exception as error:  # noqa: BLE001 - an error is a result here, counted and shown
                errors[type(error).__name__] += 1
            else:
                took.append(time.perf_counter() - begun)
                errors["refused"] += not done

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, [random.random() for _ in range(threads)]))
    made.close()
    return {"took": took, "errors": +errors}


def spend(name: str, url: str, *, accounts: int, connections: int, seconds: float) -> dict[str, Any]:
    """Each call's seconds, and how often which error came."""
    processes = min(connections, PROCESSES)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _enter, (context.Barrier(connections),)) as pool:
        shares = [connections // processes] * processes
        runs = [pool.submit(_spend_in_threads, name, url, accounts, seconds, share) for share in shares]
        results = [run.result() for run in runs]
    return {
        "took": [took for result in results for took in result["took"]],
        "errors": sum((Counter(result["errors"]) for result in results), Counter()),
    }


def times(name: str, url: str, *, count: int) -> None:
    """So many consumptions on one connection, to count what reaches the server."""
    made = adapter(name, url, 1)
    tag = uuid4().hex
    for n in range(count):
        made.consume(1, f"{tag} {n}")
    made.close()


def race(name: str, url: str, *, account: int, credits: int, threads: int, tries: int, key: str | None) -> int:
    """A new account, and ``threads`` that spend from it at once, ``tries`` times each; how often it was granted.

    With a ``key`` they all repeat the same consumption, else each is one of its own.
    """
    made = adapter(name, url, threads)
    made.open(account, credits)
    gate = threading.Barrier(threads)

    def one(number: int) -> int:
        gate.wait()
        granted = 0
        for n in range(tries):
            if key is None:
                granted += made.consume(account, f"race {number} {n}")
            else:
                granted += made.consume_again(account, key)
        return granted

    with ThreadPoolExecutor(threads) as pool:
        granted = sum(pool.map(one, range(threads)))
    made.close()
    return granted


ACTIONS: dict[str, Callable[..., Any]] = {"setup": setup, "spend": spend, "times": times, "race": race}

if __name__ == "__main__":
    _, name, action, url, options = sys.argv
    print(json.dumps(ACTIONS[action](name, url, **json.loads(options))))
