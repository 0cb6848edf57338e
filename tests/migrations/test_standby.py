"""A real standby: what the plan says of it, and what its readers feel of a migration."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from hosts import HOSTS, App

from servers import FAST, standby_of
from tallystick import Config, migrate
from tallystick.devdb import Server
from tallystick.errors import SchemaError


@pytest.fixture
def pair(scratch: Path, server: Server) -> Iterator[tuple[App, str]]:
    """An app on a primary, and the address of the same database on its standby."""
    with (
        Server(scratch / "primary", settings=FAST, bin_dir=server.bin) as primary,
        standby_of(primary, scratch / "standby", name="reporting") as standby,
    ):
        url = primary.create_database("app")
        app = App(url, Config(database_url=url, host=HOSTS["uuid"].mapping), primary)
        app.run(*HOSTS["uuid"].ddl.split(";")[:-1])
        there = standby.url("app", driver="")
        wait_for_standby(app, there)
        yield app, there


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline, true
        time.sleep(0.05)


def wait_for_standby(app: App, there: str) -> None:
    """Until it has repeated all that was done before."""
    mark = app.value("SELECT pg_logical_emit_message(true, 'test', 'so far')::text")
    with psycopg.connect(there, autocommit=True) as conn:
        until(lambda: conn.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", (mark,)).fetchone() == (True,))


def plan(app: App) -> migrate.Plan:
    with app.engine.connect() as conn:
        return migrate.plan(conn, app.config)


def readable(url: str) -> bool:
    """Whether a reader of the standby gets the table in time."""
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("SET statement_timeout = '500ms'")
        try:
            conn.execute("SELECT count(*) FROM users")
        except psycopg.errors.QueryCanceled:
            return False
    return True


def allow_delay(url: str, setting: str) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(f"ALTER SYSTEM SET max_standby_streaming_delay = '{setting}'")  # type: ignore[call-overload]
        conn.execute("SELECT pg_reload_conf()")


def test_it_is_warned_of_and_felt_as_documented(pair: tuple[App, str]) -> None:
    app, there = pair
    [replica] = plan(app).replicas
    assert (replica.name, replica.state) == ("reporting", "streaming")
    [warning] = [finding for finding in plan(app).findings if "standby reporting" in finding.text]
    assert warning.severity == "warning"
    assert "max_standby_streaming_delay" in warning.text

    allow_delay(there, "-1")
    with psycopg.connect(there) as report:
        assert report.execute("SELECT count(*) FROM users").fetchone() == (500,)
        assert readable(there)

        receipt = migrate.apply(app.url, app.config, give_up_after_s=30)

        # where it was migrated nobody had to wait for the report
        assert receipt.steps[0].waited_for == ()
        assert app.value("SELECT sum(credit_balance) FROM users") == 0
        # there everyone who comes later waits for it, and the plan tells how far it is behind
        until(lambda: not readable(there))
        [behind] = plan(app).replicas
        assert behind.behind_bytes
        assert behind.behind_bytes > 0
        [text] = [finding.text for finding in plan(app).findings if "standby reporting" in finding.text]
        assert " MB behind)" in text
        report.rollback()

    wait_for_standby(app, there)
    with psycopg.connect(there) as conn:
        assert conn.execute("SELECT sum(credit_balance) FROM users").fetchone() == (0,)


def test_a_report_there_is_not_waited_for_with_the_tables_locked(pair: tuple[App, str]) -> None:
    """Where every commit is confirmed by the standby, and the report keeps it from repeating ours."""
    app, there = pair
    allow_delay(there, "-1")
    app.run(
        "ALTER SYSTEM SET synchronous_standby_names = 'reporting'",
        "SELECT pg_reload_conf()",
        "ALTER DATABASE app SET synchronous_commit = 'remote_apply'",
    )
    until(lambda: app.rows("SELECT sync_state FROM pg_stat_replication") == [("sync",)])
    applied = threading.Event()

    def progress(now: migrate.Progress) -> None:
        if now.phase == "applied":
            applied.set()

    with ThreadPoolExecutor(1) as pool, psycopg.connect(there) as report:
        report.execute("SELECT count(*) FROM users")
        run = pool.submit(migrate.apply, app.url, app.config, progress=progress)
        assert applied.wait(30)
        assert readable(app.url.replace("+psycopg", ""))
        until(lambda: not readable(there))
        assert not run.done()  # the receipt is written when the standby has all of it, and that commit locks nothing
        report.rollback()
        assert run.result(120).after == migrate.revisions()[-1].revision
    assert readable(there)


def test_a_query_there_is_cancelled_after_the_delay(pair: tuple[App, str]) -> None:
    app, there = pair
    allow_delay(there, "500ms")
    with psycopg.connect(there) as report, ThreadPoolExecutor(1) as pool:
        report.execute("SELECT count(*) FROM users")
        reading = pool.submit(report.execute, "SELECT pg_sleep(100)")
        migrate.apply(app.url, app.config)
        with pytest.raises(psycopg.OperationalError, match="conflict with recovery"):
            reading.result(120)
        report.rollback()
    wait_for_standby(app, there)
    assert readable(there)


def test_a_standby_itself_is_refused(pair: tuple[App, str]) -> None:
    _, there = pair
    config = Config(database_url=there, host=HOSTS["uuid"].mapping)
    with pytest.raises(SchemaError, match="standby"):
        migrate.apply(there.replace("postgresql:", "postgresql+psycopg:"), config)
