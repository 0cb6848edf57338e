"""Balance and unlock over HTTP: requests per second and p99 through uvicorn, on a sync and an async engine.

Two floors stand in the same app: a route that does nothing, and a route as a host would write it that makes the one
SELECT of a balance. Server and clients share the machine: the ratios say more than the numbers, and the CPU that the
web server takes for a request (PostgreSQL's is not in it) is the same beside other work.
Run: python benchmarks/web.py [--seconds 10] [--quick]

No ``from __future__ import annotations`` here: FastAPI reads the signatures at run time.
"""

import argparse
import asyncio
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import sqlalchemy as sa
import uvicorn
from fastapi import Depends, FastAPI, Header
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from stage import HOST, Timing, app, server
from tallystick import Config, Pack
from tallystick.web import router

USERS = 1_000
ROWS_EACH = 20
CONNECTIONS = 16
POOL = 16


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

    uvicorn.Server(uvicorn.Config(application, log_level="warning", access_log=False)).run(sockets=[listening])


@dataclass(frozen=True)
class Load:
    """The request to repeat: request ``n``, counted over the whole benchmark."""

    name: str
    request: Callable[[int], bytes]
    status: int = 200


def request(method: str, path: str, user: int) -> bytes:
    length = "" if method == "GET" else "Content-Length: 0\r\n"
    return f"{method} {path} HTTP/1.1\r\nHost: bench\r\nX-User: {user}\r\n{length}\r\n".encode()


LOADS = (
    Load("nothing", lambda _: request("GET", "/nothing", 1)),
    Load("one SELECT", lambda n: request("GET", "/select", n % USERS + 1)),
    Load("balance", lambda n: request("GET", "/billing/api/balance", n % USERS + 1)),
    Load("unlock", lambda n: request("POST", f"/billing/api/workshops/{n}/unlock", n % USERS + 1)),
)


async def press(port: int, load: Load, numbers: Iterator[int], until: float, seconds: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    expected = f"HTTP/1.1 {load.status} ".encode()
    while time.perf_counter() < until:
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
    given = parser.parse_args()
    duration_s = 0.3 if given.quick else given.seconds
    spawn = multiprocessing.get_context("spawn")
    with server() as running:
        site = app(running, "web", users=USERS, rows_each=ROWS_EACH)
        add_workshops(site.url, 200_000 if duration_s > 1 else 20_000)
        numbers = {load.name: iter(range(1, 10**9)) for load in LOADS}  # each workshop is unlocked once in all
        print(f"{CONNECTIONS} connections, {duration_s:g} s each\n")
        print("| engine | request | a second | of nothing | of one SELECT | median ms | p99 ms | CPU µs |")
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for asynchronous in (False, True):
            listening = socket.socket()
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as tallystick serve does
            listening.bind(("127.0.0.1", 0))
            port = listening.getsockname()[1]
            process = spawn.Process(target=serve, args=(site.url, listening), kwargs={"asynchronous": asynchronous})
            process.start()
            wait_for(port)
            rates: dict[str, float] = {}
            for load in LOADS:
                asyncio.run(measure(port, load, numbers[load.name], duration_s / 5))  # warm
                began_s = cpu_s(process.pid)
                timing = asyncio.run(measure(port, load, numbers[load.name], duration_s))
                taken_us = (cpu_s(process.pid) - began_s) / (timing.per_second * duration_s) * 1e6
                rates[load.name] = timing.per_second
                of_select = f"{timing.per_second / rates['one SELECT']:.0%}" if "one SELECT" in rates else ""
                name = "async" if asynchronous else "sync"
                print(
                    f"| {name} | {load.name} | {timing.per_second:,.0f} | {timing.per_second / rates['nothing']:.0%} "
                    f"| {of_select} | {timing.median_ms:.1f} | {timing.p99_ms:.1f} | {taken_us:,.0f} |"
                )
            process.terminate()
            process.join()
            listening.close()


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
