"""The run in two transactions, for a database too busy for one: only when asked, and resumable between them."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest
import sqlalchemy as sa
from hosts import HOSTS, App
from processes import PROCESSES

from tallystick import Config, HostMapping, UsersTable, migrate
from tallystick.errors import HostMismatch, LedgerNotEmpty, MigrationBlocked, MigrationError, SchemaTooNew
from tallystick.migrate.revisions import revisions
from tallystick.schema import HEAD

EVERY = [revision.revision for revision in revisions()]


def run_until_prepared(url: str, config: Config) -> None:
    """Kills its own process where the new objects are committed and nothing else."""

    def progress(now: migrate.MigrationProgress) -> None:
        if now.phase == "prepared":
            os.kill(os.getpid(), signal.SIGKILL)

    migrate.apply(url, config, two_transactions=True, progress=progress)


def prepare(app: App) -> None:
    process = PROCESSES.Process(target=run_until_prepared, args=(app.url, app.config), daemon=True)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def status(app: App) -> migrate.Status:
    with app.engine.connect() as conn:
        return migrate.status(conn, app.config)


COLUMNS = [
    ("users", "id"),
    ("users", "email"),
    *(("workshops", name) for name in ("id", "user_id", "title", "created_at")),
]


def columns(app: App) -> list[tuple[object, ...]]:
    """Those of the app's tables."""
    return app.rows(
        "SELECT attrelid::regclass::text, attname::text FROM pg_attribute WHERE attnum > 0 AND NOT attisdropped"
        " AND attrelid IN ('users'::regclass, 'workshops'::regclass) ORDER BY attrelid::regclass::text, attnum"
    )


def plan(app: App) -> migrate.Plan:
    with app.engine.connect() as conn:
        return migrate.plan(conn, app.config)


@contextmanager
def contended_table(app: App) -> Iterator[None]:
    """Two clients that hand the table to each other: nobody holds it for long, and it is never free."""
    url = sa.make_url(app.url).set(drivername="postgresql").render_as_string(hide_password=False)
    stop, begun = threading.Event(), threading.Event()

    def hand_over() -> None:
        with psycopg.connect(url) as one, psycopg.connect(url) as other:
            turns = itertools.cycle((one, other))
            holder = next(turns)
            while not stop.is_set():
                following = next(turns)
                following.execute("SELECT FROM users LIMIT 1")
                holder.commit()
                holder = following
                begun.set()
                time.sleep(0.05)

    thread = threading.Thread(target=hand_over)
    thread.start()
    assert begun.wait(60)
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("name", ["uuid", "quoted, reserved and in schemas", "with every column already"])
def test_it_ends_as_the_usual_run(name: str, make_app: Callable[..., App]) -> None:
    app = make_app(HOSTS[name].ddl, HOSTS[name].mapping)
    before = app.shape()
    migrate.apply(app.url, app.config)
    usual = app.shape()
    migrate.undo(app.url, app.config)

    receipt = migrate.apply(app.url, app.config, two_transactions=True)

    assert app.shape() == usual
    assert receipt.two_transactions
    assert receipt.locked_ms > 0
    assert app.rows("SELECT revision, direction FROM tallystick.migration_log ORDER BY id") == [
        (revision, "apply") for revision in EVERY
    ]
    assert status(app).healthy
    assert not migrate.apply(app.url, app.config, two_transactions=True).changed
    migrate.undo(app.url, app.config)
    assert app.shape() == before


def test_the_usual_run_is_one_transaction(app: App) -> None:
    seen = []
    receipt = migrate.apply(app.url, app.config, progress=lambda now: seen.append(now.phase))
    assert "prepared" not in seen
    assert not receipt.two_transactions
    assert len(app.rows("SELECT DISTINCT applied_at FROM tallystick.migration_log")) == 1


@pytest.fixture(params=[None, *EVERY[:-1]])
def before(app: App, request: pytest.FixtureRequest) -> str | None:
    """The revision that the database is at before the run."""
    if request.param:
        migrate.apply(app.url, app.config)
        migrate.undo(app.url, app.config, to=request.param)
    return request.param


class TestKilledBetween:
    def test_what_is_there_is_named(self, app: App, before: str | None) -> None:
        prepare(app)
        found = status(app)
        assert (found.revision, found.prepared, found.healthy) == (before, HEAD, False)
        planned = plan(app)
        [note] = [finding.text for finding in planned.findings if "interrupted" in finding.text]
        assert f"revision {HEAD}" in note
        assert not [one for one in planned.statements if one.sql.startswith("CREATE TABLE")]
        if before is None:
            assert columns(app) == COLUMNS

    @pytest.mark.parametrize("two_transactions", [False, True])
    def test_the_next_run_goes_on(self, app: App, before: str | None, two_transactions: bool) -> None:
        migrate.apply(app.url, app.config)
        usual = app.shape()
        migrate.undo(app.url, app.config, to=before)
        prepare(app)

        receipt = migrate.apply(app.url, app.config, two_transactions=two_transactions)

        assert list(receipt.revisions) == EVERY[[None, *EVERY].index(before) :]
        assert receipt.two_transactions
        assert app.shape() == usual
        assert status(app).healthy

    @pytest.mark.usefixtures("before")
    def test_undo_brings_back_exactly_what_was(self, make_app: Callable[..., App], app: App) -> None:
        prepare(app)
        receipt = migrate.undo(app.url, app.config)
        assert list(receipt.revisions) == list(reversed(EVERY))
        assert app.dump("--schema-only") == make_app().dump("--schema-only")
        assert not migrate.undo(app.url, app.config).changed


def test_what_was_prepared_goes_alone_and_leaves_no_mark(migrated: App) -> None:
    """The revision stays, with what the ledger holds; and none is taken for prepared afterwards."""
    usual = migrated.shape()
    migrate.undo(migrated.url, migrated.config, to=EVERY[2])
    migrated.run(
        "INSERT INTO users (email) VALUES ('buyer')",
        "SELECT tallystick.grant(user_id => id, amount => 1, key => 'a', description => 'b') FROM users"
        " WHERE email = 'buyer'",
    )
    prepare(migrated)
    receipt = migrate.undo(migrated.url, migrated.config, to=EVERY[2])
    assert (receipt.before, receipt.after, receipt.revisions) == (EVERY[2], EVERY[2], tuple(reversed(EVERY[3:])))
    assert status(migrated).prepared is None
    prepare(migrated)
    migrate.undo(migrated.url, migrated.config, to=EVERY[1], discard_ledger=True)
    assert status(migrated).prepared is None
    migrate.apply(migrated.url, migrated.config)
    assert migrated.shape() == usual
    with pytest.raises(MigrationError, match="there is no revision '9'"):
        migrate.undo(migrated.url, migrated.config, to="9")


def test_a_column_of_ours_that_the_app_adds_in_between_is_adopted(app: App) -> None:
    prepare(app)
    app.run("ALTER TABLE users ADD deleted_at timestamptz")
    assert migrate.apply(app.url, app.config).adopted == ("users.deleted_at",)
    assert status(app).healthy
    migrate.undo(app.url, app.config)
    assert app.value("SELECT count(*) FROM pg_attribute WHERE attname = 'deleted_at'") == 1


def test_undo_in_between_leaves_the_apps_columns_and_locks_none_of_its_tables(app: App) -> None:
    prepare(app)
    app.run("ALTER TABLE users ADD deleted_at timestamptz")
    with app.engine.connect() as reader:
        reader.exec_driver_sql("SELECT FROM users, workshops LIMIT 1")
        migrate.undo(app.url, app.config, give_up_after_s=30)
    assert columns(app) == sorted([*COLUMNS, ("users", "deleted_at")], key=lambda column: column[0])


def test_rows_that_somebody_put_there_are_not_thrown_away_unasked(app: App) -> None:
    prepare(app)
    app.run(
        "INSERT INTO credit_transactions (id, user_id, type, status, amount, description)"
        " SELECT gen_random_uuid(), id, 'purchase', 'pending', 1, 'by hand' FROM users LIMIT 1"
    )
    with pytest.raises(LedgerNotEmpty):
        migrate.undo(app.url, app.config)
    assert migrate.undo(app.url, app.config, discard_ledger=True).changed


def test_another_mapping_in_between_is_refused(app: App) -> None:
    prepare(app)
    app.run("CREATE SCHEMA other", "CREATE TABLE other.users (id uuid PRIMARY KEY)")
    elsewhere = Config(database_url=app.url, host=HostMapping(users=UsersTable(schema="other"), workshops=None))
    with pytest.raises(HostMismatch, match=r"host\.users\.schema is 'other', in the database 'public'"):
        migrate.apply(app.url, elsewhere)
    with pytest.raises(HostMismatch, match=r"host\.users\.schema is 'other', in the database 'public'"):
        migrate.undo(app.url, elsewhere)


def test_the_objects_of_a_later_package_are_refused(migrated: App) -> None:
    migrated.run("INSERT INTO tallystick.migration_log (revision, direction) VALUES ('9999', 'prepare')")
    with pytest.raises(SchemaTooNew, match="on the way to revision 9999"):
        migrate.apply(migrated.url, migrated.config)


def test_a_saturated_database_is_told_of_it(app: App) -> None:
    """The advice, what asking for it leaves behind where it does not help either, and the way out."""
    before = app.shape()
    message = ""
    deadline = time.monotonic() + 120
    with contended_table(app):
        # a starved machine makes the short transactions look long, which is another cause with other advice
        while "--two-transactions" not in message:
            assert time.monotonic() < deadline, message
            with pytest.raises(MigrationBlocked) as caught:
                migrate.apply(app.url, app.config, stall_budget_ms=20, give_up_after_s=1)
            message = str(caught.value)
        assert "Nothing was changed" in message
        assert app.shape() == before

        with pytest.raises(MigrationBlocked) as caught:
            migrate.apply(app.url, app.config, stall_budget_ms=20, give_up_after_s=1, two_transactions=True)
        assert f"The new objects of revision {HEAD} are there and nothing uses them" in str(caught.value)
        assert "--two-transactions" not in str(caught.value)
        assert status(app).prepared == HEAD

    assert migrate.apply(app.url, app.config).after == HEAD
    migrate.undo(app.url, app.config)
    assert app.shape() == before
