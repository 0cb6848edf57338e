"""Clients and servers that die between and inside statements. What was acknowledged is there, and all of it once."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy import exc

from parallel import PATIENCE_S, assert_ledger_consistent, waiting_for_a_lock
from servers import pg_bin
from tallystick import Consume, CreditTransaction, migrate
from tallystick.database import connect, transaction
from tallystick.dev.postgres import Server
from tallystick.dev.throwaway import FOLDER_PREFIX
from tallystick.errors import Conflict, DatabaseError, DatabaseUnavailable, Key, OutcomeUnknown
from worlds import SHAPES, World


@pytest.fixture(autouse=True)
def _ledger_is_consistent(request: pytest.FixtureRequest) -> Iterator[None]:
    own = [name for name in ("durable", "cramped") if name in request.fixturenames]
    world = request.getfixturevalue(own[0] if own else "world")
    yield
    assert_ledger_consistent(world)


def until_answered(world: World, call: Callable[[sa.Connection], Any]) -> Any:
    """As an app does it: the same call with the same key, until there is an answer."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            with transaction(world.engine, isolation="AUTOCOMMIT") as conn:
                return call(conn)
        except DatabaseError as error:
            assert error.retryable or error.outcome_unknown
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def keys_of(world: World, user: Key) -> list[str]:
    row = world.schema.credit_transactions.c
    with world.engine.connect() as conn:
        return list(
            conn.scalars(
                sa.select(row.idempotency_key)
                .where(row.user_id == user, row.type == "consumption")
                .order_by(row.sequence)
            )
        )


@contextmanager
def held(world: World, user: Key) -> Iterator[None]:
    """Whoever wants to write to the user's row waits inside of the statement meanwhile."""
    users = world.schema.users
    with world.engine.begin() as conn:
        conn.execute(sa.select(users.c.key).where(users.c.key == user).with_for_update())
        yield


# --- the client dies ---


def spend_until_killed(url: str, host: Any, user: Key, acknowledged: Any) -> None:
    """A client that unlocks workshops it creates, each pair in a transaction, and says what it was told is done."""
    world = World(url, host)
    workshops = world.schema.workshops
    assert workshops is not None
    with world.engine.connect() as conn:
        for n in range(10_000):
            with conn.begin():
                workshop = uuid4()
                conn.execute(sa.insert(workshops).values(key=workshop, owner=user, title="Made and paid at once"))
                world.ledger.consume(conn, user, workshop=workshop, key=f"both {n}")
            acknowledged.send(f"both {n}")
            with conn.begin():
                world.ledger.consume(conn, user, key=f"alone {n}")
            acknowledged.send(f"alone {n}")


class Client:
    """A process that spends until it is killed."""

    def __init__(self, world: World, user: Key) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe(duplex=False)
        given = world.url, world.config.host, user, end
        self.process = context.Process(target=spend_until_killed, args=given, daemon=True)
        self.process.start()
        end.close()
        self.acknowledged: list[str] = []

    def listen(self, count: int) -> None:
        for _ in range(count):
            assert self.pipe.poll(PATIENCE_S)
            self.acknowledged.append(self.pipe.recv())

    def kill(self) -> None:
        self.process.kill()
        self.process.join(PATIENCE_S)
        try:
            while True:  # what it still said before it died
                self.acknowledged.append(self.pipe.recv())
        except EOFError:
            self.pipe.close()


@pytest.mark.parametrize("seed", range(4))
def test_a_client_killed_anywhere(world: World, seed: int) -> None:
    """Every acknowledged call is there, and at most the interrupted one besides; repeating all adds nothing."""
    rng = random.Random(seed)
    user = world.user(credits=100_000)
    client = Client(world, user)
    client.listen(rng.randrange(1, 40))
    time.sleep(rng.random() * 0.02)
    client.kill()
    settled = keys_of_settled(world, user)
    acknowledged = client.acknowledged
    assert settled[: len(acknowledged)] == acknowledged
    assert len(settled) - len(acknowledged) in (0, 1)
    for key in acknowledged:
        if key.startswith("alone"):
            assert until_answered(world, lambda conn, key=key: world.ledger.consume(conn, user, key=key)).replayed
    assert keys_of(world, user) == settled
    assert world.schema.workshops is not None
    with world.engine.connect() as conn:  # no workshop without its payment
        marks = conn.scalars(sa.select(world.schema.workshops.c.credit_consumed_at)).all()
    assert None not in marks


def keys_of_settled(world: World, user: Key) -> list[str]:
    """The keys once nobody else is connected any more: a statement sent before a death may still be under way."""
    world.engine.dispose()  # what the test itself keeps open
    others = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    deadline = time.monotonic() + PATIENCE_S
    with world.autocommit.connect() as conn:
        while conn.scalar(others):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    return keys_of(world, user)


def test_a_client_killed_inside_of_its_statement(world: World) -> None:
    user = world.user(credits=100_000)  # more than it spends before we hold its row
    client = Client(world, user)
    client.listen(2)
    with held(world, user):
        waiting_for_a_lock(world, 1)
        client.kill()
    settled = keys_of_settled(world, user)
    acknowledged = client.acknowledged
    # Its statement goes on without it and commits only in autocommit; here the transaction died with the client.
    assert settled == acknowledged
    key = f"alone {len(acknowledged)}"
    again = [until_answered(world, lambda conn: world.ledger.consume(conn, user, key=key)) for _ in range(2)]
    assert [row.replayed for row in again] == [False, True]
    assert again[0].balance_after == 100_000 - len(acknowledged) - 1


# --- the connection dies ---


def backend_of_the_waiting(world: World, function: str) -> None:
    with world.autocommit.connect() as conn:
        conn.execute(
            sa.text(
                f"SELECT {function}(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
        )


def error_of_signalled(
    world: World, user: Key, function: str, call: Callable[[sa.Connection], Any]
) -> BaseException | None:
    """The error of a call whose backend gets a signal while it waits for the user's row."""

    def attempt() -> Any:
        with world.autocommit.connect() as conn:
            return call(conn)

    with ThreadPoolExecutor(1) as pool, held(world, user):
        future = pool.submit(attempt)
        waiting_for_a_lock(world, 1)
        backend_of_the_waiting(world, function)
        return future.exception(PATIENCE_S)


def test_a_backend_terminated_under_a_call_leaves_its_outcome_unknown(world: World) -> None:
    user = world.user(credits=1)
    spend = lambda conn: world.ledger.consume(conn, user, key="once")  # noqa: E731
    error = error_of_signalled(world, user, "pg_terminate_backend", spend)
    assert isinstance(error, OutcomeUnknown)
    assert error.outcome_unknown
    assert not error.retryable
    assert error.sqlstate == "57P01"
    assert [until_answered(world, spend).replayed for _ in range(2)] == [False, True]


def test_every_operation_says_so_when_its_backend_is_terminated(world: World) -> None:
    """And each of them, made again with the same key, happens once."""
    ledger, user = world.ledger, world.user(credits=20)
    workshop = world.workshop(user)
    with world.engine.begin() as conn:
        bought = world.buy(conn, user, 5)
        pending = ledger.start_purchase(conn, user, credits=7, description="A pack")
    for call, change in (
        (lambda conn: ledger.consume(conn, user, workshop=workshop, key="w"), -1),
        (lambda conn: ledger.consume(conn, user, credits=3, key="c"), -3),
        (lambda conn: ledger.complete_purchase(conn, user, purchase=pending.id), +7),
        (lambda conn: ledger.refund(conn, user, bought.id, credits=2, key="r"), -2),
    ):
        with world.engine.connect() as conn:
            before = ledger.balance(conn, user)
        assert isinstance(error_of_signalled(world, user, "pg_terminate_backend", call), OutcomeUnknown)
        assert [until_answered(world, call).replayed for _ in range(2)] == [False, True]
        with world.engine.connect() as conn:
            assert ledger.balance(conn, user) == before + change


def test_a_connection_terminated_while_idle(world: World) -> None:
    """The client cannot know that nothing was sent, so the next call's outcome is unknown to it, too."""
    user = world.user(credits=1)
    with world.autocommit.connect() as conn:
        pid = conn.scalar(sa.text("SELECT pg_backend_pid()"))
        with world.autocommit.connect() as another:
            another.execute(sa.text("SELECT pg_terminate_backend(:pid, 10000)"), {"pid": pid})
        with pytest.raises(OutcomeUnknown):
            world.ledger.consume(conn, user, key="once")
    assert not until_answered(world, lambda conn: world.ledger.consume(conn, user, key="once")).replayed


def test_a_cancelled_statement_was_not_written(world: World) -> None:
    user = world.user(credits=1)
    spend = lambda conn: world.ledger.consume(conn, user, key="once")  # noqa: E731
    error = error_of_signalled(world, user, "pg_cancel_backend", spend)
    assert isinstance(error, Conflict)
    assert error.retryable
    assert not error.outcome_unknown
    assert error.sqlstate == "57014"
    assert not until_answered(world, spend).replayed


@pytest.mark.parametrize(("setting", "state"), [("lock_timeout", "55P03"), ("statement_timeout", "57014")])
def test_a_timeout_was_not_written(world: World, setting: str, state: str) -> None:
    user = world.user(credits=1)
    with world.autocommit.connect() as conn:
        conn.exec_driver_sql(f"SET {setting} = '50ms'")
        with held(world, user), pytest.raises(Conflict) as caught:
            world.ledger.consume(conn, user, key="once")
        assert caught.value.sqlstate == state
        assert caught.value.retryable
        conn.exec_driver_sql(f"RESET {setting}")
        assert not world.ledger.consume(conn, user, key="once").replayed  # the connection is fine


# --- the server dies ---


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[World]:
    """A server that syncs to a disk, as in production: what it acknowledged must outlive it."""
    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
    try:
        with disk_server(folder, {}) as world:
            yield world
    finally:
        shutil.rmtree(folder)


@contextmanager
def disk_server(folder: Path, settings: dict[str, str]) -> Iterator[World]:
    settings = {"max_connections": "40", "shared_buffers": "16MB"} | settings
    with Server(folder, settings=settings, bin_dir=pg_bin()) as server:
        url = server.create_database("app")
        world = World(url, SHAPES["uuid"].host)
        with world.engine.begin() as conn:
            conn.exec_driver_sql(SHAPES["uuid"].ddl)
        migrate.apply(url, world.config)
        world.server = server
        yield world


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 128 MB."""
    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128m,mode=0755", "tmpfs", folder], capture_output=True, check=False
    )
    try:
        if mounted.returncode != 0:
            pytest.skip("only root can mount a small file system to fill, and not in every container")
        yield folder
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()


@pytest.fixture
def small_disk_world(small_disk: Path) -> Iterator[World]:
    with disk_server(small_disk, {"max_wal_size": "32MB", "min_wal_size": "32MB"}) as world:
        yield world


@pytest.mark.one_server
def test_a_full_disk_loses_nothing_that_was_acknowledged(small_disk: Path, small_disk_world: World) -> None:
    """A table that cannot grow fails its statement; a log that cannot stops the server. Neither takes a row back."""
    ledger, ballast = small_disk_world.ledger, small_disk / "ballast"
    user, acknowledged, refused = small_disk_world.user(credits=1_000_000), {}, []
    with ballast.open("wb") as file:
        file.write(bytes(shutil.disk_usage(small_disk).free - 2_000_000))
    for turn in range(2_000):
        items = [Consume(user, key=f"{turn} {n}") for n in range(200)]
        try:
            with transaction(small_disk_world.engine, isolation="AUTOCOMMIT") as conn:
                acknowledged |= {row.idempotency_key: row.balance_after for row in ledger.consume_many(conn, items)}
        except DatabaseError as error:
            assert error.retryable or error.outcome_unknown
            refused.append(error.sqlstate)
            if len(refused) == 20:
                break
    assert acknowledged
    assert "53100" in refused

    ballast.unlink()
    if not small_disk_world.server.running:
        small_disk_world.server.start()
    row = small_disk_world.schema.credit_transactions.c
    with transaction(small_disk_world.engine, isolation="AUTOCOMMIT") as conn:
        assert not ledger.consume(conn, user, key="after").replayed
        there = dict(conn.execute(sa.select(row.idempotency_key, row.balance_after)).all())
    assert acknowledged.items() <= there.items()


def kill_server(server: Server, how: signal.Signals) -> None:
    """SIGKILL of the whole server, as when the machine loses power, or its own immediate shutdown."""
    pid = int((server.folder / "server" / "data" / "postmaster.pid").read_text().split()[0])
    os.kill(pid, how)
    deadline = time.monotonic() + PATIENCE_S
    while server.running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGQUIT], ids=lambda s: s.name)
def test_a_killed_server_lost_nothing_that_it_acknowledged(durable: World, how: signal.Signals) -> None:
    world, rng = durable, random.Random(how)
    users = [world.user(credits=500) for _ in range(3)]
    over = threading.Event()
    troubles: list[DatabaseError] = []

    def client(number: int) -> list[tuple[Key, str, CreditTransaction]]:
        mine, done = random.Random(number), []
        while not over.is_set():
            user, key = mine.choice(users), f"{number}-{len(done)}"
            spend = lambda conn, user=user, key=key: world.ledger.consume(conn, user, key=key)  # noqa: E731
            try:
                with transaction(world.engine, isolation="AUTOCOMMIT") as conn:
                    row = spend(conn)
            except DatabaseError as error:
                troubles.append(error)
                row = until_answered(world, spend)
            done.append((user, key, row))
        return done

    with ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(client, number) for number in range(6)]
        for kills in range(30):
            if kills >= 3 and any(isinstance(trouble, OutcomeUnknown) for trouble in troubles):
                break  # also a statement was hit, not only clients that were about to connect
            time.sleep(0.2 + rng.random() * 0.3)
            kill_server(world.server, how)
            world.server.start()
        time.sleep(0.1)
        over.set()
        acknowledged = [entry for future in clients for entry in future.result(PATIENCE_S)]

    assert {type(trouble) for trouble in troubles} <= {OutcomeUnknown, DatabaseUnavailable}
    assert OutcomeUnknown in {type(trouble) for trouble in troubles}
    assert not [told for told in map(str, troubles) if "probably" in told or ".." in told]
    for user in users:
        mine = sorted((row.sequence, key) for whose, key, row in acknowledged if whose == user)
        assert keys_of(world, user) == [key for _, key in mine]  # each once, in the order that each was told
        assert [sequence for sequence, _ in mine] == list(range(2, len(mine) + 2))


def test_without_a_server_the_error_says_that_nothing_was_sent(durable: World) -> None:
    kill_server(durable.server, signal.SIGKILL)
    with pytest.raises(DatabaseUnavailable) as caught, connect(durable.url) as conn:
        durable.ledger.balance(conn, uuid4())
    assert caught.value.retryable
    with pytest.raises(exc.OperationalError):  # the caller's own engine speaks for itself
        durable.engine.connect()
    durable.server.start()


def test_a_storm_of_connections_beyond_what_the_server_takes(durable: World) -> None:
    """Those that find no place were not served, and are told so; when they come again all is exact."""
    world, turned_away = durable, []
    user = world.user(credits=1_000)
    gate = threading.Barrier(80)

    def spend(number: int) -> int:
        gate.wait(PATIENCE_S)
        try:
            with transaction(world.engine, isolation="AUTOCOMMIT") as conn:
                world.ledger.consume(conn, user, key=f"{number}")
                time.sleep(0.2)  # so that all of them want to be there at once
        except DatabaseUnavailable as error:
            turned_away.append(error)
        return until_answered(world, lambda conn: world.ledger.consume(conn, user, key=f"{number}")).sequence

    with ThreadPoolExecutor(80) as pool:
        sequences = list(pool.map(spend, range(80)))
    assert sorted(sequences) == list(range(2, 82))
    assert turned_away
    assert {error.sqlstate for error in turned_away} <= {"53300", None}


# --- time goes backwards ---
