"""Balance and unlock over HTTP: requests per second and p99 through uvicorn, on a sync and an async engine.

Two floors stand in the same app: a route that does nothing, and a route as a host would write it that makes the one
SELECT of a balance. Server and clients share the machine: the ratios say more than the numbers, and the CPU that the
web server takes for a request (PostgreSQL's is not in it) is the same beside other work.
With --parts, the CPU of each part of a balance instead: routes in the same app, each with one part more than the one
before.
Run: python benchmarks/web.py [--seconds 10] [--quick] [--parts]

No ``from __future__ import annotations`` here: FastAPI reads the signatures at run time.
"""

import argparse
import asyncio
import gc
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy as sa
import uvicorn
from fastapi import Depends, FastAPI, Header
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import greenlet_spawn
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from stage import HOST, Timing, app, server
from tallystick import Config, Pack
from tallystick.web import router

USERS = 1_000
ROWS_EACH = 20
CONNECTIONS = 16
POOL = 16
BALANCE = "SELECT credit_balance FROM users WHERE id = %s"


async def current_user(x_user: Annotated[int | None, Header()] = None) -> int | None:
    return x_user


def serve(url: str, listening: socket.socket, *, asynchronous: bool) -> None:
    config = Config(database_url=url, host=HOST, packs=(Pack(name="One", credits=1, amount=7900),))
    pool = {"pool_size": POOL, "max_overflow": 0}
    engine: sa.Engine | AsyncEngine = (
        create_async_engine(url, **pool) if asynchronous else sa.create_engine(url, **pool)
    )
    application = FastAPI()
    application.include_router(router(config, engine=engine, current_user=current_user), prefix="/billing")

    @application.get("/nothing")
    async def nothing() -> dict[str, int]:
        return {"balance": 0}

    add_parts(application, engine)
    asked = sa.text("SELECT credit_balance FROM users WHERE id = :id")
    if isinstance(engine, AsyncEngine):
        made = engine.execution_options(isolation_level="AUTOCOMMIT")

        @application.get("/select")
        async def select(user: Annotated[int, Depends(current_user)]) -> dict[str, int]:
            async with made.connect() as conn:
                return {"balance": (await conn.execute(asked, {"id": user})).scalar_one()}
    else:
        pooled = engine.execution_options(isolation_level="AUTOCOMMIT")

        @application.get("/select")
        def select_in_a_thread(user: Annotated[int, Depends(current_user)]) -> dict[str, int]:
            with pooled.connect() as conn:
                return {"balance": conn.execute(asked, {"id": user}).scalar_one()}

    gc.collect()
    # A full collection walks all that was imported, and every connection waits for it.
    gc.freeze()
    uvicorn.Server(uvicorn.Config(application, log_level="warning", access_log=False)).run(sockets=[listening])


def add_parts(application: FastAPI, engine: sa.Engine | AsyncEngine) -> None:
    """Routes with the parts of a balance, without code of ours."""
    pool = engine.sync_engine if isinstance(engine, AsyncEngine) else engine

    async def away(work: Callable[[], int]) -> Response:
        done = greenlet_spawn(work) if isinstance(engine, AsyncEngine) else run_in_threadpool(work)
        return Response(f'{{"balance": {await done}}}', media_type="application/json")

    def from_the_pool() -> int:
        pool.raw_connection().close()
        return 0

    def by_the_driver(user: int) -> int:
        pooled = pool.raw_connection()
        driver: Any = pooled.dbapi_connection
        driver.autocommit = True
        if isinstance(engine, AsyncEngine):
            found = await_only(fetched(driver.driver_connection, user))
        else:
            with driver.cursor() as cursor:
                found = cursor.execute(BALANCE, [user]).fetchone()
        driver.autocommit = False
        pooled.close()
        return int(found[0])

    @application.get("/user", dependencies=[Depends(current_user)])
    async def user_alone() -> Response:
        return Response('{"balance": 0}', media_type="application/json")

    @application.get("/away", dependencies=[Depends(current_user)])
    async def user_and_thread() -> Response:
        return await away(lambda: 0)

    @application.get("/pool", dependencies=[Depends(current_user)])
    async def user_thread_and_pool() -> Response:
        return await away(from_the_pool)

    @application.get("/driver")
    async def user_thread_pool_and_query(user: Annotated[int, Depends(current_user)]) -> Response:
        return await away(lambda: by_the_driver(user))


async def fetched(driver: Any, user: int) -> Any:
    async with driver.cursor() as cursor:
        await cursor.execute(BALANCE, [user])
        return await cursor.fetchone()


@dataclass(frozen=True)
class Load:
    """The request to repeat: request ``n``, counted over the whole benchmark."""

    name: str
    request: Callable[[int], bytes]
    status: int = 200


def request(method: str, path: str, user: int) -> bytes:
    length = "" if method == "GET" else "Content-Length: 0\r\n"
    return f"{method} {path} HTTP/1.1\r\nHost: bench\r\nX-User: {user}\r\n{length}\r\n".encode()


NOTHING = Load("nothing", lambda _: request("GET", "/nothing", 1))
LOADS = (
    NOTHING,
    Load("one SELECT", lambda n: request("GET", "/select", n % USERS + 1)),
    Load("balance", lambda n: request("GET", "/billing/api/balance", n % USERS + 1)),
    Load("unlock", lambda n: request("POST", f"/billing/api/workshops/{n}/unlock", n % USERS + 1)),
)

PARTS = (
    NOTHING,
    Load("and the user's dependency", lambda n: request("GET", "/user", n % USERS + 1)),
    Load("and a thread or greenlet", lambda n: request("GET", "/away", n % USERS + 1)),
    Load("and a connection of the pool", lambda n: request("GET", "/pool", n % USERS + 1)),
    Load("and one SELECT by the driver", lambda n: request("GET", "/driver", n % USERS + 1)),
    Load("balance", lambda n: request("GET", "/billing/api/balance", n % USERS + 1)),
)
ROUNDS = 5


async def press(port: int, load: Load, numbers: Iterator[int], until: float, seconds: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    expected = f"HTTP/1.1 {load.status} ".encode()
    began = 0.0
    while began < until:  # one at least, on a machine that is slow
        began = time.perf_counter()
        writer.write(load.request(next(numbers)))
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
        if not head.startswith(expected):
            raise SystemExit(f"{load.name}: {head!r} {body!r}")
        seconds.append(time.perf_counter() - began)
    writer.close()
    await writer.wait_closed()


async def measure(port: int, load: Load, numbers: Iterator[int], duration_s: float) -> Timing:
    seconds: list[float] = []
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(press(port, load, numbers, began + duration_s, seconds))
    return Timing.of(seconds, time.perf_counter() - began)


def cpu_s(pid: int | None) -> float:
    """The CPU time that a process has taken, in and out of the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def add_workshops(url: str, count: int) -> None:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as conn:
        conn.exec_driver_sql(
            f"INSERT INTO workshops (id, user_id) SELECT n, n %% {USERS} + 1 FROM generate_series(1, {count}) AS n"
        )
        conn.exec_driver_sql("ANALYZE workshops")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short: to see that it runs")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each is asked for")
    parser.add_argument("--parts", action="store_true", help="the CPU of each part of a balance")
    given = parser.parse_args()
    duration_s = 0.05 if given.quick else given.seconds
    with server() as running:
        site = app(running, "web", users=USERS, rows_each=ROWS_EACH)
        add_workshops(site.url, 200_000 if duration_s > 1 else 4_000)
        numbers = {load.name: iter(range(1, 10**9)) for load in LOADS}  # each workshop is unlocked once in all
        print(f"{CONNECTIONS} connections, {duration_s:g} s each\n")
        if given.parts:
            print("| engine | request | CPU µs | more than the one before |")
            print("| --- | --- | ---: | ---: |")
            for asynchronous in (False, True):
                with serving(site.url, asynchronous=asynchronous) as (process, port):
                    print_parts(process.pid, port, "async" if asynchronous else "sync", duration_s)
            return
        print("| engine | request | a second | of nothing | of one SELECT | median ms | p99 ms | CPU µs |")
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for asynchronous in (False, True):
            with serving(site.url, asynchronous=asynchronous) as (process, port):
                rates: dict[str, float] = {}
                for load in LOADS:
                    asyncio.run(measure(port, load, numbers[load.name], duration_s / 5))  # warm
                    began_s = cpu_s(process.pid)
                    timing = asyncio.run(measure(port, load, numbers[load.name], duration_s))
                    taken_us = (cpu_s(process.pid) - began_s) / (timing.per_second * duration_s) * 1e6
                    rates[load.name] = timing.per_second
                    of_nothing = timing.per_second / rates["nothing"]
                    of_select = f"{timing.per_second / rates['one SELECT']:.0%}" if "one SELECT" in rates else ""
                    name = "async" if asynchronous else "sync"
                    print(
                        f"| {name} | {load.name} | {timing.per_second:,.0f} | {of_nothing:.0%} "
                        f"| {of_select} | {timing.median_ms:.1f} | {timing.p99_ms:.1f} | {taken_us:,.0f} |"
                    )


@contextmanager
def serving(url: str, *, asynchronous: bool) -> Iterator[tuple[Any, int]]:
    """A web server in a process of its own, and its port."""
    listening = socket.socket()
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as tallystick serve does
    listening.bind(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=serve, args=(url, listening), kwargs={"asynchronous": asynchronous}, daemon=True)
    process.start()
    wait_for(port)
    yield process, port
    process.terminate()
    process.join()
    listening.close()


def print_parts(pid: int | None, port: int, name: str, duration_s: float) -> None:
    """The median CPU of each request, in rounds, so that a neighbour's load meets all of them."""
    taken: dict[str, list[float]] = {load.name: [] for load in PARTS}
    numbers = iter(range(1, 10**9))
    for each in range(ROUNDS + 1):
        for load in PARTS:
            began_s = cpu_s(pid)
            timing = asyncio.run(measure(port, load, numbers, duration_s / ROUNDS))
            if each:  # the first warms
                taken[load.name].append((cpu_s(pid) - began_s) / (timing.per_second * duration_s / ROUNDS) * 1e6)
    before = 0.0
    for load in PARTS:
        median = statistics.median(taken[load.name])
        print(f"| {name} | {load.name} | {median:,.0f} | {median - before:+,.0f} |")
        before = median


def wait_for(port: int) -> None:
    for _ in range(600):
        with socket.socket() as probe:
            probe.settimeout(0.5)
            try:
                probe.connect(("127.0.0.1", port))
                probe.sendall(request("GET", "/nothing", 1))
                if probe.recv(1):
                    return
            except OSError:
                time.sleep(0.1)
    raise SystemExit("uvicorn did not start")


if __name__ == "__main__":
    main()
