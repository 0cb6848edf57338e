"""Live traffic during the migration: never an error, never a deadlock; the worst stall is recorded, and shown."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from hosts import HOSTS, App
from traffic import Traffic, traffic

from delay import far_away
from tallystick import migrate

USERS = 20_000


@pytest.fixture
def busy(make_app: Callable[..., App]) -> App:
    """Enough rows for a scan or a rewrite under the lock to be felt."""
    app = make_app(HOSTS["uuid"].ddl.replace("(1, 500)", f"(1, {USERS})") + "CREATE INDEX ON workshops (user_id)")
    app.run("VACUUM ANALYZE")
    return app


def libpq(app: App) -> str:
    return sa.make_url(app.url).set(drivername="postgresql").render_as_string(hide_password=False)


def check(app: App, seen: Traffic, receipt: migrate.Receipt, request: pytest.FixtureRequest) -> None:
    step = receipt
    # shown at the end of the test run: numbers for a person, since a loaded machine makes bad thresholds
    felt = f"worst stall {seen.worst_ms:.0f} ms in {len(seen.latencies_ms)} transactions"
    felt += f", locked for {step.locked_ms:.1f} ms, attempts: {step.attempts}"
    request.node.user_properties.append(("traffic", felt))
    assert seen.errors == []
    assert len(seen.latencies_ms) > 20
    with app.engine.connect() as conn:
        assert migrate.status(conn, app.config).healthy
    assert app.rows("SELECT DISTINCT credit_balance, onboarding_complete FROM users") == [(0, False)]


@contextmanager
def reader(app: App, seconds: float) -> Iterator[None]:
    """A transaction that holds the table for a while; it has begun when the block does."""
    begun = threading.Event()

    def read() -> None:
        with psycopg.connect(libpq(app), application_name="a long report") as conn:
            conn.execute("SELECT count(*) FROM users")
            begun.set()
            conn.execute("SELECT pg_sleep(%s)", (seconds,))

    with ThreadPoolExecutor(1) as pool:
        reading: Future[None] = pool.submit(read)
        assert begun.wait(60)
        yield
        reading.result(60)


WAITS_BEHIND_IT = """
    WITH locks AS MATERIALIZED (
      SELECT l.granted, a.application_name FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
      WHERE l.relation = 'users'::regclass
    )
    SELECT ours.* FROM locks ours, locks report
    WHERE NOT ours.granted AND ours.application_name = 'tallystick migrate'
      AND report.granted AND report.application_name = 'a long report'
"""


def test_a_reader_of_ten_seconds(busy: App, request: pytest.FixtureRequest) -> None:
    asked = []
    with traffic(libpq(busy), users=USERS) as seen, reader(busy, 10), ThreadPoolExecutor(1) as pool:
        time.sleep(0.3)  # until it is no longer any young transaction
        run = pool.submit(migrate.apply, busy.url, busy.config)
        while not run.done():
            asked += busy.rows(WAITS_BEHIND_IT)
            time.sleep(0.02)
        receipt = run.result()
    check(busy, seen, receipt, request)
    assert [blocker.application for blocker in receipt.waited_for] == ["a long report"]
    # what is asked for and waited for stalls everyone who comes later
    assert asked == []
    assert seen.worst_ms < 5000


def test_a_writer_that_idles_in_its_transaction(busy: App, request: pytest.FixtureRequest) -> None:
    forgotten = "UPDATE workshops SET title = 'x' WHERE title = 'of user 1'"
    with traffic(libpq(busy), users=USERS) as seen, psycopg.connect(libpq(busy), application_name="forgotten") as idle:
        idle.execute(forgotten)

        def commit_once_waited_for(now: migrate.MigrationProgress) -> None:
            if any(blocker.application == "forgotten" for blocker in now.blockers):
                idle.commit()

        receipt = migrate.apply(busy.url, busy.config, progress=commit_once_waited_for)
    check(busy, seen, receipt, request)
    assert "forgotten" in {blocker.application for blocker in receipt.waited_for}


def test_many_busy_clients(busy: App, request: pytest.FixtureRequest) -> None:
    with traffic(libpq(busy), clients=24, per_second=300, users=USERS) as seen:
        time.sleep(0.5)
        receipt = migrate.apply(busy.url, busy.config)
        time.sleep(0.2)
    check(busy, seen, receipt, request)


def test_an_autovacuum_that_is_running(busy: App, request: pytest.FixtureRequest) -> None:
    busy.run(
        # one page, then a pause: it holds its lock for minutes unless it is made to yield
        "ALTER TABLE users SET (autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1,"
        " autovacuum_vacuum_threshold = 1, autovacuum_vacuum_scale_factor = 0)",
        "ALTER SYSTEM SET autovacuum_naptime = 1",
        "SELECT pg_reload_conf()",
        "UPDATE users SET email = email",
    )
    try:
        deadline = time.monotonic() + 90
        while not busy.value("SELECT count(*) FROM pg_stat_progress_vacuum WHERE relid = 'users'::regclass"):
            assert time.monotonic() < deadline, "autovacuum did not come"
            time.sleep(0.1)
        with traffic(libpq(busy), users=USERS, per_second=50) as seen:
            receipt = migrate.apply(busy.url, busy.config)
        check(busy, seen, receipt, request)
    finally:
        busy.run("ALTER SYSTEM RESET autovacuum_naptime", "SELECT pg_reload_conf()")


def test_a_client_far_away(busy: App, request: pytest.FixtureRequest) -> None:
    env = busy.server.env
    socket = Path(env["PGHOST"]) / f".s.PGSQL.{env['PGPORT']}"
    with far_away(socket, one_way_s=0.02) as port, traffic(libpq(busy), users=USERS) as seen:
        url = sa.make_url(busy.url).set(host="127.0.0.1", port=port, query={})
        receipt = migrate.apply(url.render_as_string(hide_password=False), busy.config)
    check(busy, seen, receipt, request)
    # the network is not allowed under the lock: a round trip takes 40 ms, and twenty statements take twenty
    assert receipt.locked_ms < 400
