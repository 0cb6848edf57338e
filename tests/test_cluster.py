"""The journey of an app on a whole cluster: migration, every kind of credit transaction, races, an audit, and back.

``TALLYSTICK_TEST_URL`` names a database of the cluster, as that of a Citus coordinator, in which nothing of Tallystick
is; it is left as it was found. ``TALLYSTICK_TEST_CRASH`` is a shell command that kills one of its machines, which then
comes back by itself or by the end of the command. Without them the suite runs in a database of the tests' own server.
"""

from __future__ import annotations

import datetime as dt
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa

from servers import pg_bin
from tallystick import Consume, HostMapping, UsersTable, WorkshopsTable, audit, backup, migrate
from tallystick.config import Config
from tallystick.database import engine, transaction
from tallystick.errors import (
    Conflict,
    DatabaseUnavailable,
    IdempotencyKeyReused,
    InsufficientCredits,
    OutcomeUnknown,
)
from worlds import World

SCHEMA = "tallystick_journey"
HOST = HostMapping(users=UsersTable(schema=SCHEMA, email="email"), workshops=WorkshopsTable(schema=SCHEMA))
DDL = f"""
CREATE SCHEMA {SCHEMA};
CREATE TABLE {SCHEMA}.users (id uuid PRIMARY KEY, email text NOT NULL UNIQUE);
CREATE TABLE {SCHEMA}.workshops (
  id uuid PRIMARY KEY, user_id uuid NOT NULL REFERENCES {SCHEMA}.users (id), title text,
  created_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE {SCHEMA}.visits (user_id uuid NOT NULL, number bigint NOT NULL, PRIMARY KEY (user_id, number));
"""
CLIENTS = 16
GONE = (OutcomeUnknown, DatabaseUnavailable, Conflict)  # the connection, or the server
DISTRIBUTED = "SELECT logicalrelid::regclass::text FROM pg_dist_partition WHERE partmethod = 'h'"


class Site(World):
    """A host app on the cluster; ``citus`` where that can distribute tables."""

    citus: bool | None = None


@pytest.fixture(scope="module")
def cluster(server: Any) -> Iterator[str]:
    """The address of an empty database."""
    named = os.environ.get("TALLYSTICK_TEST_URL")
    if named is None:
        url = server.create_database("journey")
        with sa.create_engine(url, poolclass=sa.NullPool).begin() as conn:  # which is off for speed, and loses commits
            conn.exec_driver_sql("ALTER DATABASE journey SET synchronous_commit = on")
        yield url
        server.drop_database("journey")
    else:
        yield str(Config(database_url=named).database_url)


@pytest.fixture(scope="module")
def app(cluster: str) -> Iterator[Site]:
    """A host app on it, with a table that is distributed where the cluster can do that; gone afterwards."""
    world = Site(cluster, HOST)
    with world.engine.begin() as conn:
        conn.exec_driver_sql(DDL)
        world.citus = conn.scalar(sa.text("SELECT true FROM pg_extension WHERE extname = 'citus'"))
        if world.citus:
            conn.exec_driver_sql(f"SELECT create_distributed_table('{SCHEMA}.visits', 'user_id')")
    try:
        with world.engine.connect() as conn:
            assert [note.text for note in migrate.plan(conn, world.config).findings if note.severity == "stop"] == []
        migrate.apply(world.url, world.config)
        yield world
        migrate.undo(world.url, world.config, discard_ledger=True)
        with world.engine.connect() as conn:
            assert conn.scalar(sa.text("SELECT to_regnamespace('tallystick') IS NULL"))
    finally:
        with world.engine.begin() as conn:
            conn.exec_driver_sql(f"DROP SCHEMA {SCHEMA} CASCADE")


def clean(world: World) -> audit.AuditReport:
    with world.engine.connect() as conn:
        report = audit.audit(conn, world.config)
    assert report.findings == ()
    return report


def until_answered(pool: sa.Engine, call: Callable[[sa.Connection], Any]) -> Any:
    """The answer to ``call``, asked again as the errors say while its connection is taken away."""
    while True:
        try:
            with transaction(pool) as conn:
                return call(conn)
        except GONE:
            continue


def audited(app: Site, running: threading.Event) -> int:
    """Audits again and again while clients run, and gives the number of audits that were finished."""
    audits = 0
    while running.is_set():
        try:
            clean(app)
        except (*GONE, sa.exc.DBAPIError):
            continue
        audits += 1
    return audits


def overspend(app: Site, pool: sa.Engine, *, between: Callable[[], None] | None = None) -> None:
    """Sixteen clients spend more than three users have; an audit runs beside them.

    One client does what is to happen ``between`` its calls.
    """
    users, gate = [app.user(credits=10) for _ in range(3)], threading.Barrier(CLIENTS)

    def client(number: int) -> list[bool]:
        gate.wait()
        spent = []
        for turn in range(4):
            for user in users:
                try:
                    until_answered(pool, lambda conn: app.ledger.consume(conn, user, key=f"{number} {turn}"))  # noqa: B023
                    spent.append(True)
                except InsufficientCredits:
                    spent.append(False)
                if between is not None and number == 0:
                    between()
        return spent

    running = threading.Event()
    running.set()
    with ThreadPoolExecutor(CLIENTS + 1) as threads:
        audits = threads.submit(audited, app, running)
        try:
            answers = [one for some in threads.map(client, range(CLIENTS)) for one in some]
        finally:
            running.clear()
    assert audits.result()
    assert answers.count(True) == 30
    with app.engine.begin() as conn:
        assert [app.ledger.balance(conn, user) for user in users] == [0, 0, 0]


def test_the_journey(app: Site, tmp_path: Any) -> None:
    with app.engine.connect() as conn:
        assert migrate.status(conn, app.config).healthy
        if app.citus:
            assert conn.scalars(sa.text(DISTRIBUTED)).all() == [f"{SCHEMA}.visits"]
    ledger, user, other = app.ledger, app.user(credits=10), app.user()
    workshop = app.workshop(user)
    with app.engine.begin() as conn:
        conn.execute(sa.text(f"INSERT INTO {SCHEMA}.visits VALUES (:user, 1)"), {"user": user})
        unlocked = ledger.consume(conn, user, workshop=workshop, key="unlock")
        assert ledger.access(conn, workshop).open
    with app.engine.begin() as conn:
        conn.execute(sa.text(f"INSERT INTO {SCHEMA}.visits VALUES (:user, 2)"), {"user": user})
        assert ledger.consume(conn, user, workshop=workshop, key="unlock").replayed
        ledger.reverse(conn, user, unlocked.id, key="undo")
        hold = ledger.hold(conn, user, credits=4, key="hold", expires_in=dt.timedelta(hours=1))
        assert ledger.standing(conn, user).available == 6
        ledger.capture(conn, user, hold.id, credits=3)
        ledger.grant(conn, user, credits=5, key="gift", description="Gift", expires_at=_in(1))
        [lot] = ledger.lots(conn, user)
        assert lot.remaining == 5
    app.pass_time(hours=2)
    with app.engine.begin() as conn:
        assert ledger.balance(conn, user) == 7
        assert ledger.sweep(conn) == 1
        purchase = next(row for row in ledger.history(conn, user) if row.type == "purchase")
        ledger.refund(conn, user, purchase.id, credits=2, key="back")
        many = ledger.consume_many(conn, [Consume(user, key="a"), Consume(user, key="b"), Consume(other, key="c")])
        assert [getattr(one, "amount", None) for one in many] == [-1, -1, None]
        ledger.merge(conn, user, into=other, key="one person")
    with app.engine.begin() as conn:
        assert (ledger.balance(conn, user), ledger.balance(conn, other)) == (0, 3)
    assert clean(app).rows >= 10
    assert backup.backup(app.url, tmp_path / "app.dump", bin_dir=pg_bin()).path.exists()


def _in(hours: float) -> dt.datetime:
    return dt.datetime.now(dt.UTC) + dt.timedelta(hours=hours)


def test_sixteen_clients_race_for_the_last_credits(app: Site) -> None:
    overspend(app, app.engine)

    user = app.user(credits=10)
    with ThreadPoolExecutor(CLIENTS) as pool:
        rows = [
            *pool.map(
                lambda _: until_answered(app.engine, lambda c: app.ledger.consume(c, user, key="one")), range(CLIENTS)
            )
        ]
    assert len({row.id for row in rows}) == 1
    assert [row.replayed for row in rows].count(False) == 1
    with pytest.raises(IdempotencyKeyReused), app.engine.begin() as conn:
        app.ledger.consume(conn, user, credits=2, key="one")
    clean(app)


KILL = sa.text("""
    SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
    WHERE datname = current_database() AND usename = current_user AND application_name = :name
""")


def test_sixteen_clients_race_while_their_sessions_are_killed(app: Site) -> None:
    """Each call is made again with its key: what was written before the session died is not written twice."""
    killed = []

    def kill() -> None:
        with app.engine.begin() as conn:
            killed.append(conn.scalar(KILL, {"name": "race"}))

    pool = engine(app.url, pool_size=CLIENTS, connect_args={"application_name": "race"})
    try:
        overspend(app, pool, between=kill)
    finally:
        pool.dispose()
    assert killed[0]  # of the client's own session at least, which it had back
    clean(app)


A_PROCESS = sa.text("SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'")


def test_sixteen_clients_race_while_a_machine_is_killed(app: Site) -> None:
    command, crashes = os.environ.get("TALLYSTICK_TEST_CRASH"), 0
    if command is None and "TALLYSTICK_TEST_URL" in os.environ:
        pytest.skip("set TALLYSTICK_TEST_CRASH to a command that kills a machine of this cluster")

    def crash() -> None:
        nonlocal crashes
        if crashes < 3:
            if command is not None:
                subprocess.run(command, shell=True, check=True)
            while command is None:
                with suppress(ProcessLookupError):  # it ended just now, with the crash before
                    os.kill(until_answered(app.engine, lambda c: c.scalar(A_PROCESS)), signal.SIGKILL)
                    break
            crashes += 1

    pool = engine(app.url, pool_size=CLIENTS)
    try:
        overspend(app, pool, between=crash)
    finally:
        pool.dispose()
    assert crashes == 3
    clean(app)
