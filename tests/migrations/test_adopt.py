"""Apps that have credits already: their balances are kept, and the chain holds from the first row on."""

from __future__ import annotations

import datetime as dt
import random
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from hosts import App
from processes import PROCESSES

from tallystick import CreditTransaction, HostMapping, Ledger, UsersTable, WorkshopsTable, migrate
from tallystick.accounts import Accounts
from tallystick.audit import audit
from tallystick.errors import (
    HostMismatch,
    IncompatibleColumn,
    InsufficientCredits,
    LedgerInconsistent,
    MigrationBlocked,
    MigrationError,
    UnknownUser,
)
from tallystick.ledger import Consume
from tallystick.web.buyer.paywall import Paywall
from tallystick.web.console.queries import Queries

BEFORE = """
    CREATE TABLE users (
      id uuid PRIMARY KEY DEFAULT gen_random_uuid(), clerk_user_id text NOT NULL UNIQUE, email text NOT NULL);
    CREATE TABLE workshops (
      id uuid PRIMARY KEY DEFAULT gen_random_uuid(), clerk_user_id text NOT NULL, title text,
      created_at timestamp(3) NOT NULL DEFAULT now());
    INSERT INTO users (clerk_user_id, email) SELECT 'user_' || i, i || '@example.com' FROM generate_series(1, 40) i;
    INSERT INTO workshops (clerk_user_id, title) SELECT clerk_user_id, 'of ' || email FROM users;
"""
"""The founding app before its own credits."""

AFTER = f"""
    {BEFORE}
    ALTER TABLE users ADD credit_balance integer DEFAULT 0, ADD onboarding_complete boolean DEFAULT false,
      ADD stripe_customer_id text, ADD plan_tier text DEFAULT 'free';
    ALTER TABLE workshops ADD credit_consumed_at timestamp(3);
    CREATE TABLE credit_transactions (
      id text PRIMARY KEY, clerk_user_id text NOT NULL, type text NOT NULL, amount integer NOT NULL,
      balance_after integer NOT NULL, status text NOT NULL DEFAULT 'completed', description text, workshop_id text,
      stripe_session_id text UNIQUE, created_at timestamp(3) NOT NULL DEFAULT now());
    UPDATE users SET credit_balance = substr(clerk_user_id, 6)::integer % 7;
    UPDATE users SET credit_balance = NULL WHERE clerk_user_id = 'user_7';
    INSERT INTO credit_transactions (id, clerk_user_id, type, amount, balance_after, created_at)
      SELECT 'txn_' || clerk_user_id, clerk_user_id, 'purchase', credit_balance, credit_balance,
        now() - interval '2 days'
      FROM users WHERE credit_balance > 0;
    -- a purchase that completed with its placeholder, and two debits that read the same balance
    UPDATE credit_transactions SET balance_after = 0 WHERE clerk_user_id = 'user_2';
    INSERT INTO credit_transactions (id, clerk_user_id, type, amount, balance_after)
      VALUES ('txn_a', 'user_3', 'consumption', -1, 2), ('txn_b', 'user_3', 'consumption', -1, 2);
    UPDATE users SET credit_balance = 2 WHERE clerk_user_id = 'user_3';
    UPDATE workshops SET credit_consumed_at = now() - interval '1 day' WHERE clerk_user_id = 'user_3';
"""
"""The founding app after its own credits: a history whose balances are partly wrong, and a nullable column."""

FOUNDING = HostMapping(
    users=UsersTable(key="clerk_user_id", key_type="text", email="email"),
    workshops=WorkshopsTable(owner="clerk_user_id"),
)
KEPT_APART = HostMapping(users=FOUNDING.users, workshops=FOUNDING.workshops, ledger_schema="tallystick")


def faults(app: App) -> list[str]:
    with app.engine.connect() as conn:
        return [str(finding) for finding in audit(conn, app.config).findings if finding.fault]


def drift(app: App) -> list[str]:
    with app.engine.connect() as conn:
        return [str(one) for one in migrate.status(conn, app.config).drift]


def balances(app: App, column: str = "credit_balance") -> dict[str, int | None]:
    return dict(app.rows(f"SELECT clerk_user_id, {column} FROM users"))


def rows_of(app: App, user: str) -> list[tuple[object, ...]]:
    ledger = f"{app.config.host.schema_of_ledger}.credit_transactions"
    return app.rows(
        f"SELECT sequence, type::text, amount, balance_after, description FROM {ledger}"
        f" WHERE user_id = '{user}' ORDER BY sequence"
    )


def test_balances_are_kept_and_opened(make_app: Callable[..., App]) -> None:
    app = make_app(AFTER, KEPT_APART)
    before, history = balances(app), app.rows("SELECT * FROM credit_transactions ORDER BY id")
    receipt = migrate.apply(app.url, app.config)
    assert f"the balances of {sum(1 for b in before.values() if b)} users" in [one.name for one in receipt.online]
    assert balances(app) == before
    assert app.rows("SELECT * FROM credit_transactions ORDER BY id") == history
    assert rows_of(app, "user_5") == [(1, "grant", 5, 5, "Opening balance")]
    assert faults(app) == []
    assert drift(app) == []


def test_a_second_run_opens_nothing_twice(make_migrated: Callable[..., App]) -> None:
    app = make_migrated(AFTER, KEPT_APART)
    assert not migrate.apply(app.url, app.config).changed
    assert len(rows_of(app, "user_5")) == 1


def old_code(url: str, seen: OldCode, stop: threading.Event) -> None:
    """The founding app's own: a purchase and a debit, each a transaction, with a history row."""
    with psycopg.connect(url) as conn:
        while not stop.is_set():
            time.sleep(0.005)
            user = f"user_{random.randint(1, 40)}"
            change = random.choice((3, -1, -1))
            try:
                with conn.transaction():
                    row = conn.execute(
                        "UPDATE users SET credit_balance = coalesce(credit_balance, 0) + %s"
                        " WHERE clerk_user_id = %s AND coalesce(credit_balance, 0) + %s >= 0 RETURNING credit_balance",
                        (change, user, change),
                    ).fetchone()
                    if row is None:
                        continue
                    conn.execute(
                        "INSERT INTO credit_transactions (id, clerk_user_id, type, amount, balance_after)"
                        " VALUES (gen_random_uuid(), %s, %s, %s, %s)",
                        (user, "purchase" if change > 0 else "consumption", change, row[0]),
                    )
                    conn.execute(
                        "UPDATE workshops SET credit_consumed_at = now() WHERE clerk_user_id = %s"
                        " AND credit_consumed_at IS NULL AND %s < 0",
                        (user, change),
                    )
                seen.changes.append((user, change))
            except psycopg.Error as error:
                seen.errors.append(error)


@dataclass
class OldCode:
    changes: list[tuple[str, int]] = field(default_factory=list)
    errors: list[psycopg.Error] = field(default_factory=list)


@contextmanager
def running(app: App, clients: int = 4) -> Iterator[OldCode]:
    seen, stop = OldCode(), threading.Event()
    url = sa.make_url(app.url).set(drivername="postgresql").render_as_string(hide_password=False)
    threads = [threading.Thread(target=old_code, args=(url, seen, stop)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_old_code_goes_on_writing(make_app: Callable[..., App]) -> None:
    """Beside the migration and beside the new code, and every change of either is in the ledger."""
    app = make_app(AFTER, KEPT_APART)
    started = {user: balance or 0 for user, balance in balances(app).items()}
    spent: list[str] = []
    with running(app) as seen:
        migrate.apply(app.url, app.config)
        ledger = Ledger(app.engine)
        with app.engine.connect() as conn:
            for number in range(200):
                user = f"user_{number % 40 + 1}"
                with conn.begin():
                    try:
                        ledger.consume(conn, user, key=f"new {number}")
                    except InsufficientCredits:
                        continue
                spent.append(user)
                time.sleep(0.005)  # the old code goes on meanwhile
    assert seen.errors == []
    assert len(seen.changes) > 100
    assert len(spent) > 20
    for user, change in (*seen.changes, *((user, -1) for user in spent)):
        started[user] += change
    assert {user: balance or 0 for user, balance in balances(app).items()} == started
    migrate.apply(app.url, app.config)
    assert faults(app) == []
    assert drift(app) == []


def before_credits(url: str, made: list[str], errors: list[psycopg.Error], stop: threading.Event) -> None:
    """The founding app before it had credits: people sign up, change their address, and make workshops."""
    with psycopg.connect(url) as conn:
        while not stop.is_set():
            user = f"new_{random.getrandbits(60)}"
            try:
                with conn.transaction():
                    conn.execute("INSERT INTO users (clerk_user_id, email) VALUES (%s, %s)", (user, user))
                    conn.execute("INSERT INTO workshops (clerk_user_id, title) VALUES (%s, %s)", (user, user))
                    conn.execute("UPDATE users SET email = email || '.' WHERE clerk_user_id = %s", (user,))
                made.append(user)
            except psycopg.Error as error:
                errors.append(error)
            time.sleep(0.005)


def test_an_app_without_credits_goes_on_writing(make_app: Callable[..., App]) -> None:
    """Beside the migration and beside the first code that sells, and each of its rows is as it was written."""
    app = make_app(BEFORE, FOUNDING)
    made: list[str] = []
    errors: list[psycopg.Error] = []
    stop = threading.Event()
    url = sa.make_url(app.url).set(drivername="postgresql").render_as_string(hide_password=False)
    threads = [threading.Thread(target=before_credits, args=(url, made, errors, stop)) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        migrate.apply(app.url, app.config)
        with app.engine.begin() as conn:
            ledger = Ledger(conn)
            assert ledger.grant(conn, "user_5", credits=2, key="a", description="welcome").balance_after == 2
            assert ledger.consume(conn, "user_5", key="b").balance_after == 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []
    kept = app.rows(
        "SELECT u.clerk_user_id, u.email, u.credit_balance, w.title FROM users u JOIN workshops w USING"
        " (clerk_user_id) WHERE u.clerk_user_id LIKE 'new%%'"
    )
    assert sorted(kept) == sorted((user, f"{user}.", 0, user) for user in made)
    with app.engine.begin() as conn:
        assert Ledger(conn).grant(conn, made[0], credits=1, key="a", description="welcome").balance_after == 1
    assert faults(app) == []
    assert drift(app) == []


def test_what_old_code_writes_is_in_the_ledger(make_migrated: Callable[..., App]) -> None:
    app = make_migrated(AFTER, KEPT_APART)
    app.run(
        "UPDATE users SET credit_balance = credit_balance - 2 WHERE clerk_user_id = 'user_5'",
        "UPDATE users SET credit_balance = credit_balance + 4 WHERE clerk_user_id = 'user_5'",
        "UPDATE users SET credit_balance = credit_balance WHERE clerk_user_id = 'user_5'",
        "UPDATE users SET credit_balance = 1 WHERE clerk_user_id = 'user_7'",  # had none
        "INSERT INTO users (clerk_user_id, email, credit_balance) VALUES ('new', '', 6)",
    )
    assert rows_of(app, "user_5") == [
        (1, "grant", 5, 5, "Opening balance"),
        (2, "consumption", -2, 3, "Changed by the app"),
        (3, "grant", 4, 7, "Changed by the app"),
    ]
    assert rows_of(app, "user_7") == rows_of(app, "new") == []
    with app.engine.begin() as conn:
        assert Ledger(conn).consume(conn, "new", key="k").balance == 5
    assert [row[:4] for row in rows_of(app, "new")] == [(1, "grant", 6, 6), (2, "consumption", -1, 5)]
    assert faults(app) == []
    with app.engine.connect() as conn:
        [note] = audit(conn, app.config).findings
    assert (note.check, note.found) == ("balance_opened", "1 users without one")


def test_what_old_code_spends_of_credits_that_expire_is_no_fault(make_migrated: Callable[..., App]) -> None:
    app = make_migrated(AFTER, KEPT_APART)
    expires_at = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
    with app.engine.begin() as conn:
        ledger = Ledger(conn)
        for user in ("user_5", "user_6"):
            ledger.grant(conn, user, credits=4, key="g", description="x", expires_at=expires_at)
    app.run("UPDATE users SET credit_balance = 2 WHERE clerk_user_id = 'user_5'")  # old code knows of no lots
    assert faults(app) == []
    migrate.cut_over(app.url, app.config)
    assert faults(app) == []
    app.run("UPDATE tallystick.lots SET amount = 11, remaining = 11 WHERE user_id = 'user_6'")
    assert [fault.split()[0] for fault in faults(app)] == ["lot", "lots_covered"]


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE users SET credit_balance = -1 WHERE clerk_user_id = 'user_5'", "balance of user user_5 would be -1"),
        ("UPDATE users SET credit_balance = -1 WHERE clerk_user_id = 'user_7'", "balance of user user_7 would be -1"),
        (
            "INSERT INTO users (clerk_user_id, email, credit_balance) VALUES ('new', '', -1)",
            "balance of user new would be -1",
        ),
    ],
)
def test_old_code_spends_nothing_that_is_not_there(
    make_migrated: Callable[..., App], statement: str, message: str
) -> None:
    app = make_migrated(AFTER, KEPT_APART)
    with pytest.raises(sa.exc.IntegrityError, match=message):
        app.run(statement)
    assert faults(app) == []


def test_the_apps_own_triggers_see_each_change_once(make_app: Callable[..., App]) -> None:
    """And nothing that changes no balance: an opening, the ledger's row about a change, a hold."""
    app = make_app(
        """
        CREATE TABLE users (id integer PRIMARY KEY, credits integer NOT NULL DEFAULT 0);
        CREATE TABLE changes (id serial, amount integer NOT NULL CHECK (amount <> 0));
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN INSERT INTO public.changes (amount) VALUES (NEW.credits - OLD.credits); RETURN NULL; END $$;
        CREATE TRIGGER note AFTER UPDATE OF credits ON users FOR EACH ROW EXECUTE FUNCTION note();
        INSERT INTO users VALUES (1, 9);
        """,
        HostMapping(users=UsersTable(key_type="integer", balance="credits"), workshops=None),
    )
    migrate.apply(app.url, app.config)
    app.run("UPDATE users SET credits = credits - 1", "UPDATE users SET credits = credits + 2")
    ledger = Ledger(app.config)
    with app.engine.begin() as conn:
        ledger.release(conn, 1, ledger.hold(conn, 1, credits=3, key="a").id)
        ledger.capture(conn, 1, ledger.hold(conn, 1, credits=3, key="b").id)
        ledger.consume(conn, 1, key="c")
    assert [amount for (amount,) in app.rows("SELECT amount FROM changes ORDER BY id")] == [-1, 2, -3, -1]
    assert app.value("SELECT credits FROM users") == 6
    assert faults(app) == []


@pytest.mark.parametrize("kind", ["bigint", "numeric", "numeric(12,2)"])
def test_old_code_gives_no_more_than_the_ledger_can_hold(make_app: Callable[..., App], kind: str) -> None:
    app = make_app(
        f"CREATE TABLE users (id integer PRIMARY KEY, credits {kind}); INSERT INTO users VALUES (1, 5), (2, 0)",
        HostMapping(users=UsersTable(key_type="integer", balance="credits"), workshops=None),
    )
    migrate.apply(app.url, app.config)
    for statement in (
        "INSERT INTO users VALUES (3, 2147483648)",
        "UPDATE users SET credits = 2147483648 WHERE id = 2",
        "UPDATE users SET credits = 2147483648 WHERE id = 1",
    ):
        with pytest.raises(sa.exc.IntegrityError, match=r"would be 2147483648.*\n.*The largest balance is 2147483647"):
            app.run(statement)
    app.run("UPDATE users SET credits = 2147483647 WHERE id = 2")
    assert migrate.adopt(app.url, app.config).opened == 1
    assert faults(app) == []


@pytest.mark.parametrize("value", ["-2", "0.5", "3000000000", "'NaN'"])
def test_an_unfit_balance_that_is_written_while_the_migration_waits(make_app: Callable[..., App], value: str) -> None:
    """After the preflight and before the triggers: it is named, and the balances of others are opened."""
    app = make_app(
        """CREATE TABLE "us{e}rs %%" (id integer PRIMARY KEY, credits numeric);
        INSERT INTO "us{e}rs %%" VALUES (1, 5), (2, 5), (3, 5)""",
        HostMapping(
            users=UsersTable(table="us{e}rs %%", key_type="integer", balance="credits"),
            workshops=None,
            ledger_schema="tallystick",
        ),
    )
    url = sa.make_url(app.url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url) as late:
        late.execute(f'UPDATE "us{{e}}rs %%" SET credits = {value} WHERE id = 1'.encode())
        with pytest.raises(MigrationError, match=r"^1 user has a balance that a ledger cannot begin with") as refused:
            migrate.apply(app.url, app.config, progress=lambda now: late.commit() if now.phase == "waiting" else None)
        assert opened(app) == 2
        with pytest.raises(MigrationError, match="a ledger cannot begin with"):
            migrate.cut_over(app.url, app.config)
        with app.engine.connect() as conn:
            assert [one for one in migrate.status(conn, app.config).drift if one.kind == "trigger"] == []
        find = refused.value.message.partition("To find it: ")[2]
        assert [row[0] for row in late.execute(find.encode())] == [1]
        late.execute(b'UPDATE "us{e}rs %%" SET credits = 7 WHERE id = 1')
    migrate.apply(app.url, app.config)
    assert migrate.cut_over(app.url, app.config).left == 0
    assert opened(app) == 3
    assert faults(app) == []


def test_a_negative_balance_gets_no_credits_before_it_is_corrected(make_migrated: Callable[..., App]) -> None:
    """The app wrote it just before the triggers. No row explains it, so the sum of the first one would be wrong."""
    app = make_migrated(AFTER, KEPT_APART)
    ledger = Ledger(app.config)
    app.run(
        "ALTER TABLE users DISABLE TRIGGER ALL",
        "INSERT INTO users (clerk_user_id, email, credit_balance) VALUES ('late', '', -2)",
        "ALTER TABLE users ENABLE TRIGGER ALL",
    )
    with app.engine.begin() as conn:
        bought = ledger.start_purchase(conn, "late", credits=5, description="A pack")
    for call in (
        lambda conn: ledger.grant(conn, "late", credits=3, key="g", description="Welcome"),
        lambda conn: ledger.complete_purchase(conn, "late", purchase=bought.id),
        lambda conn: ledger.merge(conn, "late", into="user_1", key="m"),
        lambda conn: ledger.merge(conn, "user_1", into="late", key="m"),
    ):
        with app.engine.begin() as conn, pytest.raises(LedgerInconsistent, match=r"user late says 0 .* below 0"):
            call(conn)
    with app.engine.begin() as conn, pytest.raises(InsufficientCredits):
        ledger.consume(conn, "late", key="c")
    assert balances(app)["late"] == -2
    app.run("UPDATE users SET credit_balance = 0 WHERE clerk_user_id = 'late'")
    with app.engine.begin() as conn:
        ledger.complete_purchase(conn, "late", purchase=bought.id)
        assert ledger.grant(conn, "late", credits=3, key="g", description="Welcome").balance_after == 8
    assert faults(app) == []


@pytest.mark.parametrize("change", ["DELETE FROM users", "UPDATE users SET clerk_user_id = 'other'"])
def test_a_user_who_goes_while_the_first_call_waits(make_migrated: Callable[..., App], change: str) -> None:
    """A user without an opening balance may be deleted, or get another key."""
    app = make_migrated(AFTER, KEPT_APART)
    app.run("INSERT INTO users (clerk_user_id, email, credit_balance) VALUES ('new', '', 6)")
    answers: list[object] = []

    def call() -> None:
        with app.engine.begin() as conn:
            try:
                answers.append(Ledger(conn).consume(conn, "new", key="k"))
            except UnknownUser as unknown:
                answers.append(unknown.user)

    url = sa.make_url(app.url).set(drivername="postgresql").render_as_string(hide_password=False)
    caller = threading.Thread(target=call)
    with psycopg.connect(url) as goes:
        goes.execute(f"{change} WHERE clerk_user_id = 'new'".encode())
        caller.start()
        deadline = time.monotonic() + 30
        while not app.value("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    caller.join()
    assert answers == ["new"]
    assert faults(app) == []


SHAPES = {
    "bigint": ("credit_balance bigint NOT NULL DEFAULT 0", {}, {}),
    "bigint, in parts of a credit": ("credit_balance bigint NOT NULL DEFAULT 0", {}, {"credits": "bigint"}),
    "numeric": ("credit_balance numeric(12,2) NOT NULL DEFAULT 0", {}, {}),
    "numeric, in parts of a credit": ("credit_balance numeric", {}, {"credits": "bigint"}),
    "under another name": ('"creditsLeft" integer DEFAULT 0', {"balance": "creditsLeft"}, {}),
    "numeric under another name": ("credits numeric DEFAULT 3", {"balance": "credits"}, {}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_column_is_adopted_as_it_is(name: str, make_app: Callable[..., App]) -> None:
    column, of_users, of_all = SHAPES[name]
    mapping = HostMapping(
        users=UsersTable(key_type="integer", **of_users),
        workshops=WorkshopsTable(key_type="integer", title=None, created_at=None),
        **of_all,
    )
    app = make_app(
        f"""
        CREATE TABLE users (id serial PRIMARY KEY, {column});
        CREATE TABLE workshops (id serial PRIMARY KEY, user_id integer REFERENCES users);
        INSERT INTO users VALUES (1, 5), (2, 0), (3, 9);
        INSERT INTO workshops (user_id) VALUES (1), (2), (3);
        """,
        mapping,
    )
    kept = '"creditsLeft"' if "creditsLeft" in column else mapping.users.balance
    before = app.shape()
    migrate.apply(app.url, app.config)
    assert drift(app) == []
    app.run(f"INSERT INTO users (id, {kept}) VALUES (4, 7)", f"UPDATE users SET {kept} = {kept} - 1 WHERE id = 1")
    ledger = Ledger(app.engine)
    with app.engine.begin() as conn:
        assert ledger.consume(conn, 1, key="a", workshop=1).balance == 3
        assert ledger.consume(conn, 4, key="a").balance == 6
        assert ledger.grant(conn, 2, credits=2, key="b", description="welcome").balance == 2
        first, second = ledger.consume_many(conn, [Consume(3, key="a"), Consume(3, key="b")])
        assert [one.balance_after for one in (first, second) if isinstance(one, CreditTransaction)] == [8, 7]
        purchase = ledger.start_purchase(conn, 3, credits=10, key="p", description="pack")
        assert ledger.complete_purchase(conn, 3, purchase=purchase.id).balance == 17
        assert ledger.refund(conn, 3, purchase.id, key="r").balance == 7
        assert Accounts(conn).get(conn, 1).credit_balance == ledger.balance(conn, 1) == 3
        shown = Paywall(app.config).workshop_and_standing(conn, 1, 1)[1].balance
        assert (shown, type(shown)) == (3, int)
    queries = Queries(app.config, app.engine)
    assert [(row.key, str(row.credit_balance)) for row in queries.users().page().rows] == [
        (1, "3"),
        (2, "2"),
        (3, "7"),
        (4, "6"),
    ]
    assert queries.figures(dt.datetime.now(dt.UTC)).holdings.outstanding == 18
    assert app.rows(f"SELECT id, {kept} FROM users ORDER BY id") == [(1, 3), (2, 2), (3, 7), (4, 6)]
    assert faults(app) == []
    migrate.undo(app.url, app.config, discard_ledger=True)
    assert app.shape() == before
    assert app.rows(f"SELECT id, {kept} FROM users ORDER BY id") == [(1, 3), (2, 2), (3, 7), (4, 6)]


def test_undo_loses_nothing_that_the_column_has(make_app: Callable[..., App]) -> None:
    app = make_app(AFTER, KEPT_APART)
    shape, before = app.shape(), balances(app)
    migrate.apply(app.url, app.config)
    app.run("UPDATE users SET credit_balance = 9 WHERE clerk_user_id = 'user_5'")
    migrate.undo(app.url, app.config)
    assert app.shape() == shape
    assert balances(app) == before | {"user_5": 9}


def test_all_that_is_in_the_way_is_told_at_once(make_app: Callable[..., App]) -> None:
    """And a rename is not advised without what it breaks."""
    app = make_app(
        f"{AFTER} UPDATE users SET credit_balance = -2 WHERE clerk_user_id IN ('user_1', 'user_2');"
        "ALTER TABLE users ALTER plan_tier TYPE varchar(8);",
        FOUNDING,
    )
    with pytest.raises(IncompatibleColumn) as caught:
        migrate.apply(app.url, app.config)
    message = str(caught.value)
    assert "credit_balance: integer with balances that a ledger cannot begin with (below 0: 2)" in message
    assert "plan_tier: character varying(8)" in message
    assert 'has "public"."credit_transactions", "public"."credit_transactions_pkey", which Tallystick' in message
    assert 'set ledger_schema = "tallystick" under [host]' in message
    told = message.count("code that uses it breaks with ALTER TABLE public.users RENAME COLUMN")
    assert told == message.count("RENAME") == 2


def test_killed_while_balances_are_opened(make_app: Callable[..., App]) -> None:
    """Twenty times, anywhere, with old code writing: the next run goes on, and nobody's balance is opened twice."""
    more = "INSERT INTO users SELECT gen_random_uuid(), 'more_' || i, '', 3 FROM generate_series(1, 4000) i"
    app = make_app(f"{AFTER} {more}", KEPT_APART)
    found = []
    with running(app, clients=2) as seen:
        for _ in range(20):
            process = PROCESSES.Process(target=migrate.apply, args=(app.url, app.config), daemon=True)
            process.start()
            deadline = time.monotonic() + 30
            while not found and process.is_alive() and not opened(app):
                assert time.monotonic() < deadline
                time.sleep(0.002)
            time.sleep(random.uniform(0, 0.15))
            process.kill()
            process.join()
            found.append(opened(app))
        migrate.apply(app.url, app.config)
    assert seen.errors == []
    assert 0 < found[0] < 4000
    assert found == sorted(found)
    migrate.apply(app.url, app.config)
    assert opened(app) >= 4000
    assert faults(app) == []


def opened(app: App) -> int:
    if app.value("SELECT to_regclass('tallystick.credit_transactions')") is None:
        return 0
    return app.value("SELECT count(*) FROM tallystick.credit_transactions WHERE idempotency_key = 'tallystick:opening'")


def test_balances_and_history_are_held_against_each_other(make_app: Callable[..., App]) -> None:
    app = make_app(AFTER, KEPT_APART)
    with app.engine.connect() as conn:
        found = migrate.look_at_own_credits(conn, app.config)
    assert (found.column, found.users, found.migrated) == ("public.users.credit_balance", 35, False)
    assert found.history is not None
    assert found.history.table == "public.credit_transactions"
    # user_3 got 3 and spent 1 twice, but the second debit had read the balance before the first
    assert [(one.user, one.balance, one.history, one.by) for one in found.history.differences] == [("user_3", 2, 1, 1)]
    assert found.history.wrong_balances == 2  # the placeholder, and the second debit

    migrate.apply(app.url, app.config)
    with app.engine.begin() as conn:
        Ledger(conn).consume(conn, "user_5", key="a")  # which is in no history of the app's
        found = migrate.look_at_own_credits(conn, app.config)
    assert (found.opened, found.waiting, found.migrated, found.follows) == (35, 0, True, True)
    assert found.history is not None
    assert [one.user for one in found.history.differences] == ["user_3"]


@pytest.mark.parametrize(("table", "user"), [("credit_logs", "userId"), ("CreditTransaction", "accountId")])
def test_a_history_without_signs(make_app: Callable[..., App], table: str, user: str) -> None:
    app = make_app(
        f"""
        CREATE TABLE users (id uuid PRIMARY KEY, credits integer NOT NULL DEFAULT 0);
        CREATE TABLE "{table}" (id serial, "{user}" uuid, kind text, amount integer, status text);
        INSERT INTO users VALUES ('00000000-0000-0000-0000-000000000001', 4);
        INSERT INTO "{table}" ("{user}", kind, amount, status) SELECT id, k, a, s FROM users, (VALUES
          ('purchase', 5, 'COMPLETED'), ('USAGE', 1, 'COMPLETED'), ('purchase', 9, 'PENDING')) v (k, a, s);
        """,
        HostMapping(users=UsersTable(balance="credits"), workshops=None),
    )
    with app.engine.connect() as conn:
        found = migrate.look_at_own_credits(conn, app.config)
        with pytest.raises(HostMismatch, match=r"public\.users is no history of credits"):
            migrate.look_at_own_credits(conn, app.config, history="users")
    assert found.history is not None
    assert found.history.table == f"public.{table}"
    assert (found.history.signs_from_type, found.history.differing) == (True, 0)


@pytest.mark.parametrize("value", ["NaN", "-Infinity"])
def test_what_is_no_number_is_named_with_its_column(make_app: Callable[..., App], value: str) -> None:
    app = make_app(
        """
        CREATE TABLE users (id integer PRIMARY KEY, credits numeric NOT NULL DEFAULT 0);
        CREATE TABLE credit_logs (id serial, user_id integer, amount numeric);
        INSERT INTO users VALUES (1, 5);
        """,
        HostMapping(users=UsersTable(key_type="integer", balance="credits"), workshops=None),
    )
    app.run(f"INSERT INTO credit_logs (user_id, amount) VALUES (1, '{value}'), (1, 5)")
    with app.engine.connect() as conn, pytest.raises(HostMismatch, match=r"amount is NaN .* in 1 row, ") as refused:
        migrate.look_at_own_credits(conn, app.config)
    assert len(app.rows(refused.value.message.partition("first: ")[2])) == 1
    app.run("UPDATE credit_logs SET amount = 0", f"UPDATE users SET credits = '{value}'")
    with app.engine.connect() as conn, pytest.raises(HostMismatch, match=r"public\.users\.credits is NaN or infinite"):
        migrate.look_at_own_credits(conn, app.config)


def test_history_is_noted_in_the_opening_balance(make_migrated: Callable[..., App]) -> None:
    app = make_migrated(AFTER, KEPT_APART)
    assert migrate.adopt(app.url, app.config, note_history=True).noted == 35
    assert migrate.adopt(app.url, app.config, note_history=True).noted == 0
    rows = app.value(
        "SELECT metadata -> 'history' FROM tallystick.credit_transactions"
        " WHERE user_id = 'user_3' AND idempotency_key = 'tallystick:opening'"
    )
    assert [(row["id"], row["amount"]) for row in rows] == [("txn_user_3", 3), ("txn_a", -1), ("txn_b", -1)]
    assert faults(app) == []


def test_the_cut_over(make_migrated: Callable[..., App]) -> None:
    """Afterwards a balance that the app writes is a fault, as in any other app."""
    app = make_migrated(AFTER, KEPT_APART)
    app.run("INSERT INTO users (clerk_user_id, email, credit_balance) VALUES ('new', '', 6)")
    app.run("ALTER TABLE users ALTER credit_balance SET DEFAULT 3")
    with pytest.raises(MigrationError, match="gives new users 3 credits without a row"):
        migrate.cut_over(app.url, app.config)
    app.run("ALTER TABLE users ALTER credit_balance SET DEFAULT 0")
    with app.engine.connect() as conn:
        assert [w for w in migrate.status(conn, app.config).warnings if "tallystick adopt --cut-over" in w]
    assert migrate.cut_over(app.url, app.config).opened == 1
    assert migrate.cut_over(app.url, app.config).opened == 0
    assert faults(app) == []
    assert drift(app) == []
    with app.engine.connect() as conn:
        assert not [w for w in migrate.status(conn, app.config).warnings if "tallystick adopt" in w]
    app.run("UPDATE users SET credit_balance = 9 WHERE clerk_user_id IN ('user_5', 'user_14')")
    with app.engine.begin() as conn:
        Ledger(conn).consume(conn, "user_14", key="x")  # it never had a balance, and this one is nobody's grant
        wrong = {(f.check, f.user) for f in audit(conn, app.config).findings}
    assert wrong == {("user_balance", "user_5"), ("chain_arithmetic", "user_14")}


def test_the_cut_over_waits_until_its_record_is_on_disk(make_migrated: Callable[..., App]) -> None:
    """Opening balances does not: a crash of the server loses the last ones, and the next run opens them again."""
    app = make_migrated(AFTER, KEPT_APART)
    app.run(
        "CREATE TABLE seen (here text)",
        """CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS
          $$BEGIN INSERT INTO public.seen VALUES (current_setting('synchronous_commit')); RETURN NULL; END$$""",
        "CREATE TRIGGER see AFTER INSERT ON tallystick.migration_log EXECUTE FUNCTION public.see()",
        f'ALTER DATABASE "{app.value("SELECT current_database()")}" SET synchronous_commit = on',
    )
    migrate.cut_over(app.url, app.config)
    assert app.rows("SELECT here FROM seen") == [("on",)]


def test_a_cut_over_that_is_interrupted_is_no_fault(make_migrated: Callable[..., App]) -> None:
    """After it has dropped the triggers: a balance that it has not opened yet is still the app's."""
    app = make_migrated(AFTER, KEPT_APART)
    app.run(
        "INSERT INTO users (clerk_user_id, email, credit_balance) VALUES ('new', '', 6)",
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not now'; END $$",
        "CREATE TRIGGER refuse BEFORE UPDATE ON users FOR EACH ROW WHEN (OLD.clerk_user_id = 'new')"
        " EXECUTE FUNCTION refuse()",
    )
    with pytest.raises(MigrationError, match="not now"):
        migrate.cut_over(app.url, app.config)
    assert app.value("SELECT count(*) FROM pg_trigger WHERE tgname = 'tallystick_balance'") == 0
    assert faults(app) == []
    with app.engine.connect() as conn:
        [note] = audit(conn, app.config).findings
    assert (note.check, note.found) == ("balance_opened", "1 users without one")
    app.run("DROP TRIGGER refuse ON users")
    assert migrate.cut_over(app.url, app.config).opened == 1
    assert balances(app)["new"] == 6
    assert faults(app) == []


def test_the_history_of_an_erased_user_is_not_noted(make_migrated: Callable[..., App]) -> None:
    app = make_migrated(AFTER, KEPT_APART)
    with app.engine.begin() as conn:
        Accounts(app.config).erase(conn, "user_3")
    assert migrate.adopt(app.url, app.config, note_history=True).noted == 34
    assert app.rows("SELECT metadata FROM tallystick.credit_transactions WHERE user_id = 'user_3'") == [(None,)]


def test_the_history_of_a_user_erased_before_the_opening_is_not_noted(make_migrated: Callable[..., App]) -> None:
    """The user gets the opening balance when erased, so that it is erased with the rest."""
    app = make_migrated(AFTER, KEPT_APART)
    app.run("INSERT INTO users (clerk_user_id, email, credit_balance) VALUES ('new', '', 6)")
    app.run(
        "INSERT INTO credit_transactions (id, clerk_user_id, type, amount, balance_after)"
        " VALUES ('txn_new', 'new', 'purchase', 6, 6)"
    )
    with app.engine.begin() as conn:
        Accounts(app.config).erase(conn, "new")
    done = migrate.adopt(app.url, app.config, note_history=True)
    assert (done.opened, done.noted) == (0, 35)
    rows = app.rows("SELECT amount, description, metadata FROM tallystick.credit_transactions WHERE user_id = 'new'")
    assert rows == [(6, "Erased", None)]
    assert faults(app) == []


def test_the_history_of_an_erased_user_whom_old_code_gives_credits_is_not_noted(
    make_migrated: Callable[..., App],
) -> None:
    """The user had no credits when erased, and so no opening balance that says it."""
    app = make_migrated(AFTER, KEPT_APART)
    app.run("INSERT INTO users (clerk_user_id, email, credit_balance) VALUES ('new', '', 0)")
    app.run(
        "INSERT INTO credit_transactions (id, clerk_user_id, type, amount, balance_after)"
        " VALUES ('txn_new', 'new', 'purchase', 6, 6)"
    )
    with app.engine.begin() as conn:
        Accounts(app.config).erase(conn, "new")
    app.run("UPDATE users SET credit_balance = 4 WHERE clerk_user_id = 'new'")
    done = migrate.adopt(app.url, app.config, note_history=True)
    assert (done.opened, done.noted) == (1, 35)
    rows = app.rows("SELECT amount, metadata FROM tallystick.credit_transactions WHERE user_id = 'new'")
    assert rows == [(4, None)]
    assert faults(app) == []


def test_the_cut_over_notes_the_history_if_asked(
    make_app: Callable[..., App], tallystick: Callable[..., tuple[int, str, str]]
) -> None:
    app = make_app(AFTER, KEPT_APART)
    Path("tallystick.toml").write_text(
        '[host]\nledger_schema = "tallystick"\n[host.users]\nkey = "clerk_user_id"\nkey_type = "text"\n'
        '[host.workshops]\nowner = "clerk_user_id"\n',
        encoding="utf-8",
    )
    code, _, err = tallystick(app, "adopt", "--note-history")
    assert (code, "not migrated yet" in err) == (1, True)
    migrate.apply(app.url, app.config)
    app.run("INSERT INTO users (clerk_user_id, email, credit_balance) VALUES ('new', '', 6)")
    code, out, err = tallystick(app, "adopt", "--cut-over", "--note-history")
    assert code == 0, err
    assert "Opened the balances of 1 user.\n" in out
    assert "Noted the history in the opening balances of 36 users." in out
    assert "Only the ledger writes balances." in out


@pytest.mark.parametrize(
    ("kind", "default", "gives"),
    [
        ("numeric(10,2)", "0.00", False),
        ("bigint", "'0'::text::bigint", False),
        ("numeric(10,2)", "1.5 - 1.5", False),
        ("numeric(10,2)", "10 % 4", True),
    ],
)
def test_the_default_of_a_balance_is_worked_out(
    make_app: Callable[..., App], kind: str, default: str, gives: bool
) -> None:
    app = make_app(
        f"""CREATE TABLE users (id integer PRIMARY KEY, credits {kind} NOT NULL DEFAULT {default});
        INSERT INTO users VALUES (1, 5)""",
        HostMapping(users=UsersTable(key_type="integer", balance="credits"), workshops=None),
    )
    migrate.apply(app.url, app.config)
    if gives:
        with pytest.raises(MigrationError, match=r"gives new users .* credits without a row"):
            migrate.cut_over(app.url, app.config)
    else:
        migrate.cut_over(app.url, app.config)


def test_the_cut_over_waits_for_no_reader_at_the_apps_cost(make_migrated: Callable[..., App]) -> None:
    app = make_migrated(AFTER, KEPT_APART)
    with app.engine.connect() as conn:
        conn.exec_driver_sql("SELECT FROM users")
        with pytest.raises(
            MigrationBlocked, match=r"never free for 50 ms within 0\.3 s \(\d+ attempts\)\. In the way: pid \d+"
        ):
            migrate.cut_over(app.url, app.config, give_up_after_s=0.3)
    assert drift(app) == []


def test_an_app_that_had_none_has_nothing_to_adopt(make_app: Callable[..., App]) -> None:
    app = make_app(BEFORE, FOUNDING)
    with pytest.raises(MigrationError, match="not migrated yet"):
        migrate.adopt(app.url, app.config)
    migrate.apply(app.url, app.config)
    with pytest.raises(MigrationError, match="is Tallystick's own: the app had no balances"):
        migrate.adopt(app.url, app.config)
    assert app.value("SELECT count(*) FROM pg_proc WHERE proname IN ('open_balance', 'follow_balance')") == 0


def test_names_that_need_quoting(make_app: Callable[..., App]) -> None:
    users = UsersTable(schema="a s", table="User", key="a:key", key_type="text", balance='%s "c"')
    mapping = HostMapping(users=users, workshops=None)
    app = make_app(
        '''
        CREATE SCHEMA "a s";
        CREATE TABLE "a s"."User" ("a:key" text PRIMARY KEY, "%s ""c""" integer);
        CREATE TABLE "a s".credit_history ("a:key" text, amount integer, "100%" text);
        INSERT INTO "a s"."User" VALUES ('x%''y', 3), ('z', 2);
        INSERT INTO "a s".credit_history VALUES ('x%''y', 3, 'a');
        ''',
        mapping,
    )
    migrate.apply(app.url, app.config)
    assert migrate.adopt(app.url, app.config, note_history=True).noted == 2
    with app.engine.begin() as conn:
        assert Ledger(conn).consume(conn, "x%'y", key="k").balance == 2
        found = migrate.look_at_own_credits(conn, app.config)
        assert audit(conn, app.config).clean
    assert found.history is not None
    assert [one.user for one in found.history.differences] == ["z"]
    assert drift(app) == []


def test_the_page_runs_from_top_to_bottom(
    make_app: Callable[..., App], tallystick: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """Its commands in their order, on the founding app with old code that writes until the cut-over."""
    app = make_app(AFTER, KEPT_APART)
    page = (Path(__file__).parents[2] / "docs" / "existing-credits.md").read_text(encoding="utf-8")
    page = page.partition("## Balances in a table of their own")[0]
    commands = [
        line
        for block in re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    assert commands[0] == "tallystick init"

    def typed(command: str) -> str:
        program, *arguments = shlex.split(command)
        assert program == "tallystick"
        code, out, err = tallystick(app, *arguments)
        assert code == 0, f"{command}: {out}{err}"
        return out

    with running(app, clients=1) as seen:
        output = {command: typed(command) for command in commands if "--cut-over" not in command}
    assert seen.errors == []
    assert 'ledger_schema = "tallystick"' in (tmp_path / "tallystick.toml").read_text(encoding="utf-8")
    assert "credits of" in output["tallystick adopt"]
    assert re.search(r"Opened the balances of \d+ users", output["tallystick migrate apply"])
    for command in ("tallystick adopt --cut-over", "tallystick audit", "tallystick migrate status"):
        typed(command)
    assert faults(app) == []
