"""A key that grows from integer to bigint after the migration: the ledger first, then the app's tables."""

from __future__ import annotations

import datetime as dt
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from hosts import HOSTS, App

from tallystick import Accounts, Config, HostMapping, Ledger, UsersTable, migrate
from tallystick.audit import audit
from tallystick.cli import main
from tallystick.errors import (
    Conflict,
    HostMismatch,
    InsufficientCredits,
    MigrationBlocked,
    MigrationError,
    OutcomeUnknown,
)
from tallystick.events import enable
from tallystick.ledger import Consume, close_all_days
from tallystick.migrate.revisions import HostNames
from tallystick.migrate.runner.widen import _Widening

LARGE = 5_000_000_000
EXPIRY = dt.datetime(2100, 1, 1, tzinfo=dt.UTC)
FOREIGN_KEYS = """
    SELECT conname, convalidated, pg_get_constraintdef(oid) FROM pg_constraint
    WHERE contype = 'f' AND conname ~ '^(credit_transactions_(user|workshop)|low_balances_user)_fk$' ORDER BY conname
"""
RIGHTS = """
    SELECT r.rolname, p.proname, a.is_grantable FROM pg_proc p CROSS JOIN LATERAL
      aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a LEFT JOIN pg_roles r ON r.oid = a.grantee
    WHERE p.pronamespace = 'tallystick'::regnamespace AND a.grantee <> p.proowner ORDER BY 1, 2, 3
"""
DAYS = "SELECT day, closed_at FROM tallystick.days ORDER BY day"
STAND_INS = "SELECT count(*) FROM pg_trigger WHERE tgname ~ '^A_tallystick_widening'"


@pytest.fixture
def app(make_app: Callable[..., App]) -> App:
    """Nine users with integer keys and a workshop each; the first has credits of two kinds and a threshold."""
    app = make_app(HOSTS["integer"].ddl, HOSTS["integer"].mapping)
    migrate.apply(app.url, app.config, stall_budget_ms=3000)
    ledger = Ledger(app.engine)
    with app.engine.begin() as conn:
        ledger.grant(conn, 1, credits=50, key="a", description="welcome")
        ledger.consume(conn, 1, key="w", workshop=1)
        Accounts(app.engine).set_low_balance(conn, 1, 3)
    return app


def with_keys(config: Config, **types: str) -> Config:
    """The settings with other types of keys."""
    host = config.host
    for word, key_type in types.items():
        host = replace(host, **{word: replace(getattr(host, word), key_type=key_type)})
    return Config(database_url=config.database_url, host=host)


def libpq(app: App) -> str:
    return app.url.replace("+psycopg", "")


def until(app: App, query: str) -> None:
    """Wait for a state of the server that a thread brings about."""
    deadline = time.monotonic() + 60
    while not app.value(query):
        assert time.monotonic() < deadline, f"never so: {query}"
        time.sleep(0.05)


WAITS = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted AND relation = '{}'::regclass"


@contextmanager
def holding(app: App, *tables: str) -> Iterator[psycopg.Connection]:
    """A session that has read the tables and not ended its transaction."""
    with psycopg.connect(libpq(app), application_name="a report") as conn:
        for table in tables:
            conn.execute(f"SELECT count(*) FROM {table}")
        yield conn


@pytest.fixture
def tallystick(
    app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """``tallystick("migrate status")``, in a folder of its own: its output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", app.url)
    monkeypatch.setenv("COLUMNS", "200")

    def run(line: str) -> str:
        monkeypatch.setattr(sys, "argv", ["tallystick", *line.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert ended.value.code in (None, 0), f"{line}: {out}{err}"
        return out

    return run


def test_the_ledger_goes_before_a_key_that_grows(app: App, tallystick: Callable[[str], str]) -> None:
    enable(app.url, app.config)
    ledger = Ledger(app.engine)
    with app.engine.begin() as conn:
        ledger.grant(conn, 1, credits=5, key="e", description="a month", expires_at=EXPIRY)
        held = ledger.hold(conn, 1, credits=1, key="h", description="work")
    close_all_days(app.engine, ledger)
    days = app.rows(DAYS)
    assert days
    keys = app.rows(FOREIGN_KEYS)
    assert len(keys) == 3
    widened = migrate.widen_key(app.url, "users")
    assert {"public.credit_transactions.user_id", "tallystick.lots.user_id", "tallystick.low_balances.user_id"} == set(
        widened.columns
    )
    assert widened.rewrite_ms > 0
    assert {step.name for step in widened.online} == {"credit_transactions_user_fk", "low_balances_user_fk"}
    assert app.rows(FOREIGN_KEYS) == keys
    assert app.value(STAND_INS) == 0
    assert app.rows(DAYS) == days
    close_all_days(app.engine, ledger)

    with app.engine.begin() as conn:  # before the app has followed
        assert ledger.consume(conn, 1, key="b").balance_after == 53
        assert [lot.remaining for lot in ledger.lots(conn, 1)] == [4]
        assert ledger.capture(conn, 1, held.id).balance_after == 52
        _, second = Ledger(conn).consume_many(conn, [Consume(1, key="c"), Consume(2, key="c")])
        assert isinstance(second, InsufficientCredits)
        recorded = "SELECT count(*) FROM tallystick.events WHERE kind = 'consumption.completed'"
        assert conn.exec_driver_sql(recorded).scalar() == 3
    before = app.config
    with app.engine.connect() as conn, pytest.raises(HostMismatch, match=r"host.users.key_type is 'integer', in the"):
        migrate.status(conn, before)
    with pytest.raises(HostMismatch, match=r"Correct \[host\] in tallystick\.toml"):
        migrate.undo(app.url, before, discard_ledger=True)
    assert "by id (bigint)" in tallystick("init --force")
    assert Config.load().host == widened.host
    app.config = with_keys(before, users="bigint")
    with app.engine.connect() as conn:
        assert migrate.status(conn, app.config).drift == ()
        assert audit(conn, app.config).clean

    app.run("ALTER TABLE workshops ALTER user_id TYPE bigint", "ALTER TABLE users ALTER id TYPE bigint")
    with pytest.raises(MigrationError, match="the key of users is of type bigint"):
        migrate.widen_key(app.url, "users")
    app.run(f"INSERT INTO users (id) VALUES ({LARGE})", f"INSERT INTO workshops (id, user_id) VALUES (99, {LARGE})")
    ledger = Ledger(app.engine)
    with app.engine.begin() as conn:
        assert ledger.grant(conn, LARGE, credits=2, key="a", description="welcome").balance_after == 2
        assert ledger.consume(conn, LARGE, key="b", workshop=99).balance_after == 1
        assert [row.user_id for row in ledger.history(conn, LARGE)] == [LARGE, LARGE]


def test_in_the_other_order_the_same_command_mends_it(app: App, tallystick: Callable[[str], str]) -> None:
    app.run("ALTER TABLE workshops ALTER id TYPE bigint", f"INSERT INTO workshops VALUES ({LARGE}, 1)")
    output = tallystick("migrate widen-key workshops")
    assert "bigint: public.credit_transactions.workshop_id" in output
    assert "renew every connection" in output
    app.config = with_keys(app.config, workshops="bigint")
    ledger = Ledger(app.engine)
    with app.engine.begin() as conn:
        assert ledger.consume(conn, 1, key="x", workshop=LARGE).balance_after == 48
        assert migrate.status(conn, app.config).drift == ()
        assert audit(conn, app.config).clean
    migrate.undo(app.url, app.config, discard_ledger=True, stall_budget_ms=3000)
    assert app.value("SELECT to_regnamespace('tallystick')") is None


def test_undo_between_the_ledger_and_the_app(app: App) -> None:
    migrate.widen_key(app.url, "workshops")
    app.config = with_keys(app.config, workshops="bigint")
    migrate.undo(app.url, app.config, discard_ledger=True, stall_budget_ms=3000)
    assert app.value("SELECT to_regnamespace('tallystick')") is None
    assert app.value("SELECT atttypid::regtype::text FROM pg_attribute WHERE attrelid = 'workshops'::regclass"
                     " AND attname = 'id'") == "integer"  # fmt: skip


def test_rights_are_those_of_before(app: App) -> None:
    with app.engine.connect() as conn:
        names = [f"widened_{conn.scalar(sa.text('SELECT pg_backend_pid()'))}_{each}" for each in ("one", "two", "new")]
    one, two, new = names
    app.run(*(f"CREATE ROLE {name}" for name in names))
    try:
        app.run(
            f"GRANT USAGE ON SCHEMA tallystick TO {one}",
            f"GRANT EXECUTE ON FUNCTION tallystick.balance(integer) TO {one}",
            f"GRANT EXECUTE ON FUNCTION tallystick.history TO {two} WITH GRANT OPTION",
            f"GRANT EXECUTE ON FUNCTION tallystick.sweep, tallystick.utc(timestamptz) TO {two}",
            f"ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON FUNCTIONS TO {new}",
        )
        rights = app.rows(RIGHTS)
        assert [row[:2] for row in rights if row[0] == one] == [(one, "balance")]
        assert (two, "history", True) in rights
        assert {row[0] for row in rights} == {one, two}
        for word in ("users", "workshops"):
            migrate.widen_key(app.url, word)
            assert app.rows(RIGHTS) == rights
        with app.engine.connect() as conn:
            conn.exec_driver_sql(f"SET ROLE {one}")
            assert conn.exec_driver_sql("SELECT balance FROM tallystick.balance(1)").scalar() == 49
            with pytest.raises(sa.exc.ProgrammingError, match="permission denied for function history"):
                conn.exec_driver_sql("SELECT * FROM tallystick.history(1)")
    finally:
        app.run(*(f"DROP OWNED BY {name}" for name in names), *(f"DROP ROLE {name}" for name in names))


def test_prepared_statements_of_before_fail_until_connections_are_renewed(app: App) -> None:
    ledger, pooled = Ledger(app.engine), sa.create_engine(app.url, connect_args={"prepare_threshold": 0})
    enable(app.url, app.config)

    def use(conn: psycopg.Connection, key: str) -> int | None:
        held = ledger.hold(conn, 1, credits=1, key=key)
        return ledger.capture(conn, 1, held.id).balance_after

    with (
        psycopg.connect(libpq(app), autocommit=True, prepare_threshold=0) as old,
        psycopg.connect(libpq(app), autocommit=True, prepare_threshold=None) as unprepared,
    ):
        assert ledger.balance(old, 1) == 49
        with pooled.begin() as conn:
            assert ledger.consume(conn, 1, key="p").balance_after == 48
        assert use(unprepared, "u") == 47
        migrate.widen_key(app.url, "users")
        assert use(unprepared, "v") == 46  # the plans of its triggers are not those of before
        for _ in range(2):
            with pytest.raises(Exception, match="cached plan must not change result type"):
                ledger.balance(old, 1)
        with psycopg.connect(libpq(app), autocommit=True, prepare_threshold=0) as renewed:
            assert ledger.balance(renewed, 1) == 46
            assert ledger.consume(renewed, 1, key="q").balance_after == 45
    pooled.dispose()
    with pooled.begin() as conn:
        assert ledger.consume(conn, 1, key="r").balance_after == 44
    pooled.dispose()


def test_the_app_goes_on_while_the_ledger_is_rewritten(app: App) -> None:
    """A session that reads ``lots`` keeps the run between its locks, the ledger's among them."""
    outcomes: list[object] = []

    def run(action: Callable[[], object]) -> threading.Thread:
        def record() -> None:
            try:
                outcomes.append(action())
            except Exception as error:  # noqa: BLE001 - looked at below
                outcomes.append(error)

        thread = threading.Thread(target=record)
        thread.start()
        return thread

    def consume() -> int | None:
        with app.engine.begin() as conn:
            return ledger.consume(conn, 1, key="waits").balance_after

    ledger = Ledger(app.engine)
    with holding(app, "tallystick.lots") as report:
        widening = run(lambda: migrate.widen_key(app.url, "users", lock_timeout_ms=60_000))
        until(app, WAITS.format("tallystick.lots"))
        assert app.value("SELECT count(*) FROM users") == 9
        app.run("UPDATE users SET plan_tier = 'gold' WHERE id = 2")
        app.run("INSERT INTO users VALUES (10)", "UPDATE workshops SET user_id = 10 WHERE id = 9")
        consuming = run(consume)
        until(app, WAITS.format("credit_transactions"))
        report.rollback()
    for thread in (widening, consuming):
        thread.join(60)
    (waited,) = [each for each in outcomes if not isinstance(each, migrate.Widened)]
    assert isinstance(waited, Conflict), outcomes  # the call that waited wrote nothing, and may be made again
    assert waited.retryable
    assert consume() == 48
    with app.engine.connect() as conn:
        assert audit(conn, with_keys(app.config, users="bigint")).clean


def test_whoever_holds_the_tables_is_named_and_nothing_is_left(app: App) -> None:
    keys, shape = app.rows(FOREIGN_KEYS), app.shape()
    with holding(app, "users") as reader, holding(app, "credit_transactions") as auditor:
        with pytest.raises(MigrationBlocked) as refused:
            migrate.widen_key(app.url, "users", give_up_after_s=0.2)
        for conn in (reader, auditor):
            assert f"pid {conn.info.backend_pid} (a report)" in str(refused.value)
        assert {blocker.pid for blocker in refused.value.blockers} >= {  # type: ignore[attr-defined]
            reader.info.backend_pid,
            auditor.info.backend_pid,
        }
    # of the ledger's own tables one is busy, after the foreign keys are gone
    with holding(app, "tallystick.lots") as report:
        with pytest.raises(MigrationBlocked) as refused:
            migrate.widen_key(app.url, "users", give_up_after_s=0.2)
        assert f"pid {report.info.backend_pid} (a report)" in str(refused.value)
    app.run("CREATE VIEW spent AS SELECT user_id FROM credit_transactions")
    with pytest.raises(MigrationError, match=r"on view (public\.)?spent depends on column .+ Drop that first"):
        migrate.widen_key(app.url, "users")
    app.run("DROP VIEW spent")
    assert app.rows(FOREIGN_KEYS) == keys
    assert app.shape() == shape


def test_a_run_that_was_ended_is_finished_by_the_next(app: App) -> None:
    failed: list[BaseException] = []

    def widen() -> None:
        try:
            migrate.widen_key(app.url, "users", lock_timeout_ms=60_000)
        except OutcomeUnknown as error:
            failed.append(error)

    keys = app.rows(FOREIGN_KEYS)
    with holding(app, "tallystick.lots"):
        run = threading.Thread(target=widen)
        run.start()
        until(app, WAITS.format("tallystick.lots"))
        app.run(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'tallystick migrate' AND datname = current_database()"
        )
        run.join(60)
    assert len(failed) == 1
    assert [row[0] for row in app.rows(FOREIGN_KEYS)] == ["credit_transactions_workshop_fk"]
    # what the foreign keys did is done
    app.run(
        "DELETE FROM workshops WHERE user_id = 2",
        "UPDATE users SET id = 100 WHERE id = 2",
        "INSERT INTO tallystick.low_balances VALUES (100, 5)",
    )
    app.run("UPDATE users SET id = 101 WHERE id = 100")
    assert app.value("SELECT threshold FROM tallystick.low_balances WHERE user_id = 101") == 5
    app.run("DELETE FROM users WHERE id = 101")
    assert app.rows("SELECT user_id FROM tallystick.low_balances") == [(1,)]
    with app.engine.connect() as conn:
        drift = migrate.status(conn, app.config).drift
    assert "tallystick migrate widen-key users" in {each.remedy for each in drift}
    for command in (migrate.apply, migrate.undo):
        with pytest.raises(MigrationError, match="To finish it: tallystick migrate widen-key users"):
            command(app.url, app.config)
    assert migrate.widen_key(app.url, "users").rewrite_ms > 0
    assert app.rows(FOREIGN_KEYS) == keys
    assert app.value(STAND_INS) == 0


def test_a_deleted_workshop_leaves_the_ledger_meanwhile(app: App) -> None:
    """Triggers do it, from the first step of the run to the third."""
    with app.engine.connect() as conn:
        names = HostNames.of(app.config.host)
        run = _Widening(conn.execution_options(isolation_level="AUTOCOMMIT"), "workshops", names, 1000, 10)
        run.open()
    assert "credit_transactions_workshop_fk" not in [row[0] for row in app.rows(FOREIGN_KEYS)]
    with pytest.raises(sa.exc.IntegrityError, match="workshop 1 has credit transactions"):
        app.run("UPDATE workshops SET id = 1000 WHERE id = 1")
    app.run("DELETE FROM workshops WHERE id = 1")
    assert app.rows("SELECT workshop_id FROM credit_transactions ORDER BY id") == [(None,), (None,)]
    migrate.widen_key(app.url, "workshops")
    assert app.value(STAND_INS) == 0


def test_apply_validates_what_a_run_left(app: App) -> None:
    migrate.widen_key(app.url, "users")
    app.config = with_keys(app.config, users="bigint")
    definition = app.rows(FOREIGN_KEYS)[0][2]
    app.run(
        "ALTER TABLE credit_transactions DROP CONSTRAINT credit_transactions_user_fk,"
        f" ADD CONSTRAINT credit_transactions_user_fk {definition} NOT VALID"
    )
    with app.engine.connect() as conn:
        (drift,) = migrate.status(conn, app.config).drift
    assert drift.remedy == "tallystick migrate apply"
    receipt = migrate.apply(app.url, app.config)
    assert [(step.name, step.outcome) for step in receipt.online] == [("credit_transactions_user_fk", "validated")]
    with app.engine.connect() as conn:
        assert migrate.status(conn, app.config).healthy


def test_an_app_without_workshops_that_had_balances(make_app: Callable[..., App]) -> None:
    """Of the ledger's own table of workshops, which is empty, the owner grows; the app's balances are followed."""
    mapping = HostMapping(users=UsersTable(table="user", key="order", key_type="smallint"), workshops=None)
    app = make_app(
        'CREATE TABLE "user" ("order" smallint PRIMARY KEY, credit_balance integer NOT NULL DEFAULT 0);'
        ' INSERT INTO "user" VALUES (1, 7), (2, 0);',
        mapping,
    )
    migrate.apply(app.url, app.config, stall_budget_ms=3000)
    ledger = Ledger(app.engine)
    with app.engine.connect() as conn, psycopg.connect(libpq(app), autocommit=True, prepare_threshold=None) as old:
        spend = 'UPDATE "user" SET credit_balance = credit_balance - 1 WHERE "order" = 1'
        old.execute(spend)  # its triggers are planned, for a smallint
        assert "tallystick.workshops.owner" in migrate.widen_key(app.url, "users").columns
        old.execute(spend)
        assert ledger.balance(conn, 1) == 5
        assert ledger.consume(conn, 1, key="a").balance_after == 4
        conn.commit()
        app.config = with_keys(app.config, users="bigint")
        assert migrate.status(conn, app.config).drift == ()
        assert audit(conn, app.config).clean
        with pytest.raises(MigrationError, match="no table of workshops is mapped"):
            migrate.widen_key(app.url, "workshops")
