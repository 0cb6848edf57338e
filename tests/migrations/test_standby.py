"""Real standbys and subscribers: what the plan says of them, and what their readers feel of a migration."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from hosts import HOSTS, App

from servers import standby_of
from tallystick import Config, Ledger, migrate
from tallystick.dev.postgres import Server
from tallystick.dev.throwaway import FAST
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
        until(lambda: answers(there))
        wait_for_standby(app, there)
        yield app, there


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline, true
        time.sleep(0.05)


def answers(url: str) -> bool:
    """True once such a database exists."""
    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError:
        return False
    return True


def wait_for_standby(app: App, there: str) -> None:
    """Until it has repeated all that was done before."""
    mark = app.value("SELECT pg_logical_emit_message(true, 'test', 'so far')::text")
    with psycopg.connect(there, autocommit=True) as conn:
        until(lambda: conn.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", (mark,)).fetchone() == (True,))


def plan(app: App) -> migrate.Plan:
    with app.engine.connect() as conn:
        return migrate.plan(conn, app.config)


def readable(url: str) -> bool:
    """True if a reader of the standby gets the table in time."""
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("SET statement_timeout = '500ms'")
        try:
            conn.execute("SELECT count(*) FROM users")
        except psycopg.errors.QueryCanceled:
            return False
    return True


def allow_delay(url: str, setting: str) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(f"ALTER SYSTEM SET max_standby_streaming_delay = '{setting}'")
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
        assert receipt.waited_for == ()
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
    """Every commit waits for the standby, and a report on it holds up the replay of ours."""
    app, there = pair
    allow_delay(there, "-1")
    app.run(
        "ALTER SYSTEM SET synchronous_standby_names = 'reporting'",
        "SELECT pg_reload_conf()",
        "ALTER DATABASE app SET synchronous_commit = 'remote_apply'",
    )
    until(lambda: app.rows("SELECT sync_state FROM pg_stat_replication") == [("sync",)])
    applied = threading.Event()

    def progress(now: migrate.MigrationProgress) -> None:
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


def test_a_synchronous_standby_is_told(pair: tuple[App, str]) -> None:
    app, _ = pair
    app.run("ALTER SYSTEM SET synchronous_standby_names = 'reporting'", "SELECT pg_reload_conf()")
    until(lambda: plan(app).replicas[0].sync_state == "sync")
    [text] = [finding.text for finding in plan(app).findings if "sync_state" in finding.text]
    assert text.startswith("Commits here wait for the standby reporting (sync_state sync)")


@pytest.fixture
def subscribed(scratch: Path, server: Server) -> Iterator[Callable[[str], tuple[App, App]]]:
    """An app whose publication another database subscribes to, on a server of their own."""
    with Server(scratch, settings={**FAST, "wal_level": "logical"}, bin_dir=server.bin) as own:
        here, there = (
            App(url, Config(database_url=url, host=HOSTS["uuid"].mapping), own)
            for url in (own.create_database("app"), own.create_database("warehouse"))
        )

        def subscribe(publication: str) -> tuple[App, App]:
            for app in (here, there):
                app.run(*HOSTS["uuid"].ddl.split(";")[:2])  # the tables, without rows
            here.run(
                f"CREATE PUBLICATION p FOR {publication}",
                "SELECT pg_create_logical_replication_slot('sub', 'pgoutput')",
            )
            where = f"host={own.env['PGHOST']} port={own.env['PGPORT']} user=postgres dbname=app"
            there.run(
                f"CREATE SUBSCRIPTION sub CONNECTION '{where}' PUBLICATION p"
                " WITH (create_slot = false, slot_name = 'sub', copy_data = false)"
            )
            until(lambda: here.value("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"))
            return here, there

        yield subscribe
        there.run(
            "ALTER SUBSCRIPTION sub DISABLE", "ALTER SUBSCRIPTION sub SET (slot_name = NONE)", "DROP SUBSCRIPTION sub"
        )


def test_a_subscriber_that_has_the_columns_first(subscribed: Callable[[str], tuple[App, App]]) -> None:
    here, there = subscribed("TABLE users, workshops")
    found = plan(here)
    assert [(replica.name, replica.logical) for replica in found.replicas] == [("sub", True)]
    texts = [finding.text for finding in found.findings]
    assert any("sub (streaming) follows by logical replication: it repeats no lock" in text for text in texts)
    assert not any("standby" in text for text in texts)
    [warning] = [text for text in texts if "The publication p sends new columns" in text]
    there.run(*warning.partition("Run there first: ")[2].split("; "))
    migrate.apply(here.url, here.config)
    here.run("INSERT INTO users (email) VALUES ('afterwards')", "INSERT INTO workshops (user_id) SELECT id FROM users")
    until(lambda: there.value("SELECT count(*) FROM workshops"))
    assert there.rows("SELECT email, plan_tier FROM users") == [("afterwards", "free")]
    assert not [finding for finding in plan(here).findings if finding.severity == "warning"]


def test_a_subscriber_that_was_not_changed_stops(subscribed: Callable[[str], tuple[App, App]]) -> None:
    """The behaviour that the warning is about; if a server ever accepts the change, the warning is not needed."""
    here, there = subscribed("TABLE users, workshops")
    migrate.apply(here.url, here.config)
    here.run("INSERT INTO users (email) VALUES ('afterwards')")
    until(lambda: "is missing replicated column" in here.server.log.read_text())
    assert there.rows("SELECT email FROM users") == []


@pytest.mark.parametrize("publication", ["ALL TABLES", "TABLES IN SCHEMA public"])
def test_a_subscriber_to_new_tables_gets_balances_and_their_rows(
    publication: str, subscribed: Callable[[str], tuple[App, App]]
) -> None:
    """The way that the warning tells, from end to end."""
    here, there = subscribed(publication)
    here.run("INSERT INTO users (email) VALUES ('before')")
    [warning] = [finding.text for finding in plan(here).findings if "publication p" in finding.text]
    assert "new tables too (" in warning
    assert ("TRUNCATE tallystick.alembic_version" in warning) == (publication == "ALL TABLES")
    assert "run tallystick migrate apply with the address of each subscriber, then here" in warning
    migrate.apply(there.url, there.config)
    migrate.apply(here.url, here.config)
    ledger = Ledger(here.config)
    user = here.value("SELECT id FROM users")

    def grant(key: str) -> None:
        with here.engine.begin() as conn:
            ledger.grant(conn, user, credits=2, key=key, description="Welcome")

    grant("before the refresh")
    rest = warning.partition("until then is run there: ")[2].replace("SUBSCRIPTION …", "SUBSCRIPTION sub")
    there.run(*rest.split("; "))
    grant("after it")
    until(lambda: there.rows("SELECT max(balance_after), count(*) FROM credit_transactions") == [(4, 2)])
    until(lambda: there.rows("SELECT credit_balance FROM users") == [(4,)])
    until(lambda: not there.value("SELECT count(*) FROM pg_subscription_rel WHERE srsubstate <> 'r'"))
    with there.engine.connect() as conn:
        assert migrate.status(conn, there.config).healthy
    assert "duplicate key" not in here.server.log.read_text()


def test_a_standby_itself_is_refused(pair: tuple[App, str]) -> None:
    _, there = pair
    config = Config(database_url=there, host=HOSTS["uuid"].mapping)
    with pytest.raises(SchemaError, match="standby"):
        migrate.apply(there.replace("postgresql:", "postgresql+psycopg:"), config)
