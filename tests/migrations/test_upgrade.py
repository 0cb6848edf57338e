"""From a busy database of revision 0001 to today's: what ran before goes on, and nothing is lost or counted twice."""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
import sqlalchemy as sa
from hosts import HOSTS, App

from tallystick import Ledger, migrate
from tallystick.accounts import Accounts
from tallystick.audit import audit
from tallystick.errors import IncompatibleColumn, NotMigrated
from tallystick.migrate.revisions import revisions
from tallystick.migrate.runner import run as runner
from tallystick.schema import HEAD, verify

# as a client of revision 0001 sends them: its columns by name
ANSWER = "outcome, id, user_id, type, status, amount, balance_after, sequence, balance, required, remaining, item"
CALLS = {
    "consume": f"SELECT {ANSWER} FROM tallystick.consume(user_id => %(user)s, key => %(key)s)",
    "grant": f"SELECT {ANSWER} FROM tallystick.grant("
    "user_id => %(user)s, amount => 2, key => %(key)s, description => 'Given')",
    "history": f"SELECT {ANSWER} FROM tallystick.history(user_id => %(user)s)",
    "balance": f"SELECT {ANSWER} FROM tallystick.balance(user_id => %(user)s)",
    "many": f"SELECT {ANSWER} FROM tallystick.consume_many("
    "user_ids => ARRAY[%(user)s]::uuid[], keys => ARRAY[%(key)s])",
}
PASSING = ("40001", "40P01", "42804", "42846", "55P03", "0A000", "XX000")
"""Errors of a call that runs while the functions are replaced; the same call made again succeeds."""


@pytest.fixture
def old(migrated: App) -> App:
    """A database of revision 0001."""
    migrate.undo(migrated.url, migrated.config, to="0001")
    return migrated


def test_the_way_back_to_0001_is_what_0001_made(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runner, "after", lambda revision: revisions()[:1] if revision is None else ())
        patch.setattr(runner, "revisions", lambda: revisions()[:1])
        migrate.apply(app.url, app.config)
    first = app.shape()
    for _ in range(2):
        migrate.apply(app.url, app.config)
        assert app.shape() != first
        with app.engine.connect() as conn:
            assert migrate.status(conn, app.config).healthy
        migrate.undo(app.url, app.config, to="0001")
        assert app.shape() == first
    with app.engine.connect() as conn, pytest.raises(NotMigrated, match="tallystick migrate apply"):
        verify(conn)


def test_a_busy_database_is_upgraded_and_old_clients_go_on(old: App) -> None:
    users = [row[0] for row in old.rows("SELECT id FROM users ORDER BY id")]
    libpq = old.url.replace("+psycopg", "")
    done, errors = threading.Event(), []
    wanted: dict[str, int] = {}

    def client(number: int) -> None:
        names = itertools.cycle(CALLS)
        with psycopg.connect(libpq, autocommit=True, prepare_threshold=1) as conn:
            for count in itertools.count():
                if done.is_set() and count > 20:
                    return
                name, user = next(names), users[count % len(users)]
                key = f"{number} {count}"
                while True:
                    try:
                        rows = conn.execute(CALLS[name], {"user": user, "key": key}).fetchall()
                        break
                    except psycopg.Error as error:
                        if error.sqlstate not in PASSING:
                            errors.append(f"{name}: {error}")
                            return
                if name == "grant":
                    wanted[key] = 2
                elif name in ("consume", "many") and rows[0][0] in ("completed", "replayed"):
                    wanted[key] = -1

    with ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(client, number) for number in range(6)]
        receipt = migrate.apply(old.url, old.config)
        done.set()
        for one in clients:
            one.result(60)
    assert (receipt.before, receipt.after) == ("0001", HEAD)
    assert errors == []
    with old.engine.connect() as conn:
        assert audit(conn, old.config).findings == ()
        assert migrate.status(conn, old.config).healthy
        verify(conn)
    found = dict(old.rows("SELECT idempotency_key, amount FROM credit_transactions"))
    assert found == wanted


@pytest.fixture
def role(old: App) -> Iterator[str]:
    """An app's role with the rights that it had at revision 0001."""
    name = f"app_{uuid.uuid4().hex[:8]}"
    old.run(
        f"CREATE ROLE {name}",
        f"GRANT SELECT ON users, workshops, credit_transactions TO {name}",
        f"GRANT INSERT (id, email) ON users TO {name}",
        f"GRANT USAGE ON SCHEMA tallystick TO {name}",
    )
    for (function,) in old.rows(
        "SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'tallystick'::regnamespace AND prosecdef"
    ):
        old.run(f"GRANT EXECUTE ON FUNCTION {function} TO {name}")
    yield name
    old.run(f"DROP OWNED BY {name}", f"DROP ROLE {name}")


def test_an_apps_role_keeps_its_rights_and_gets_those_on_what_is_new(old: App, role: str) -> None:
    migrate.apply(old.url, old.config)
    user = old.value("SELECT id FROM users LIMIT 1")
    with old.engine.connect() as conn:
        assert migrate.status(conn, old.config).healthy
        conn.execute(sa.text(f'SET ROLE "{role}"'))
        ledger = Ledger(old.config)
        ledger.grant(conn, user, credits=2, key="g", description="Given")
        held = ledger.hold(conn, user, credits=1, key="h")
        assert ledger.capture(conn, user, held.id).balance_after == 1
        assert ledger.lots(conn, user) == []
        assert conn.scalar(sa.text("SELECT credit_held FROM users LIMIT 1")) == 0
        assert conn.scalar(sa.text("SELECT count(*) FROM tallystick.lots")) == 0
        assert ledger.events(conn) == []
        assert Accounts(old.config).set_low_balance(conn, user, 3).user == user
        assert ledger.close_days(conn) == 60  # in a transaction that wrote before
        of_events = ("events", "event_settings", "low_balances", "event_endpoints", "event_dead_letters")
        for table in (*of_events, "days", "daily_sums"):
            conn.execute(sa.text(f"SELECT FROM tallystick.{table}"))
        with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
            conn.execute(sa.text("UPDATE users SET credit_held = 0"))


def test_a_column_of_the_apps_own_is_adopted_where_it_fits_and_stays(old: App) -> None:
    old.run("ALTER TABLE users ADD COLUMN credit_due_at timestamptz")
    receipt = migrate.apply(old.url, old.config)
    assert receipt.adopted == ("users.credit_due_at",)
    with old.engine.connect() as conn:
        assert migrate.status(conn, old.config).adopted == ("users.credit_due_at",)
    migrate.undo(old.url, old.config)
    assert old.value(
        "SELECT count(*) FROM information_schema.columns WHERE table_name = 'users' AND column_name = 'credit_due_at'"
    )


def test_a_column_of_the_apps_own_that_does_not_fit_stops_the_run(old: App) -> None:
    old.run("ALTER TABLE users ADD COLUMN credit_held text")
    before = old.shape()
    with pytest.raises(IncompatibleColumn, match="credit_held: text"):
        migrate.apply(old.url, old.config)
    assert old.shape() == before


@pytest.mark.parametrize("name", ["integer", "quoted, reserved and in schemas", "balances in a table of their own"])
def test_every_kind_of_host_goes_up_and_back(name: str, make_app: Callable[..., App]) -> None:
    app = make_app(HOSTS[name].ddl, HOSTS[name].mapping)
    before = app.shape()
    migrate.apply(app.url, app.config)
    migrate.undo(app.url, app.config, to="0001")
    migrate.apply(app.url, app.config)
    with app.engine.connect() as conn:
        assert migrate.status(conn, app.config).healthy
    migrate.undo(app.url, app.config)
    assert app.shape() == before
