"""Balances in a table of their own: it is named before anybody begins with 0, and takes the users' place."""

from __future__ import annotations

import json
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
import sqlalchemy as sa
from hosts import App
from test_adopt import drift, faults

from tallystick import HostMapping, Ledger, UsersTable, WorkshopsTable, migrate
from tallystick.errors import HostMismatch, MigrationError, TallystickError, UnknownUser

USERS = """
    CREATE TABLE users (id uuid PRIMARY KEY, email text NOT NULL UNIQUE);
    CREATE TABLE app_workshop (
      id serial PRIMARY KEY, member uuid NOT NULL REFERENCES users ON DELETE CASCADE, title text,
      created_at timestamptz NOT NULL DEFAULT now());
    INSERT INTO users SELECT lpad(to_hex(i), 32, '0')::uuid, i || '@example.com' FROM generate_series(1, 9) i;
    INSERT INTO app_workshop (member) SELECT id FROM users WHERE email < '5';
"""
OF_KEY = f"""{USERS}
    CREATE TABLE wallets (
      user_id uuid PRIMARY KEY REFERENCES users ON DELETE CASCADE ON UPDATE CASCADE,
      balance integer NOT NULL DEFAULT 0 CHECK (balance >= 0), updated_at timestamptz NOT NULL DEFAULT now());
"""
OF_ITS_OWN = f"""{USERS}
    CREATE TABLE user_credits (
      id serial PRIMARY KEY, user_id uuid NOT NULL UNIQUE REFERENCES users ON DELETE CASCADE ON UPDATE CASCADE,
      currency text, balance numeric(12,2) NOT NULL DEFAULT 0, updated_at timestamp NOT NULL DEFAULT now());
"""
HOSTS = {"keyed by the user": (OF_KEY, "wallets"), "with a key of its own": (OF_ITS_OWN, "user_credits")}
WORKSHOPS = WorkshopsTable(table="app_workshop", key_type="integer", owner="member")


def user(number: int) -> UUID:
    return UUID(int=number)


def apart(app: App) -> list[migrate.BalancesApart]:
    with app.engine.connect() as conn:
        return migrate.balances_apart(conn, migrate.propose(conn))


@pytest.mark.parametrize("name", HOSTS)
def test_what_is_told_maps_the_table(name: str, make_app: Callable[..., App]) -> None:
    ddl, table = HOSTS[name]
    app = make_app(ddl, HostMapping(users=UsersTable(email="email"), workshops=WORKSHOPS))
    [found] = apart(app)
    assert (found.column, found.key, found.obstacle) == (f"public.{table}.balance", "user_id", None)
    asked = {option.removeprefix("--").replace("-", "_"): to for option, to in found.options.items()}
    with app.engine.connect() as conn:
        mapping = migrate.propose(conn, **asked)
        reported = [note.text for note in migrate.plan(conn, app.config).findings]
        assert migrate.balances_apart(conn, mapping) == []
    assert mapping == HostMapping(users=UsersTable(table=table, key="user_id", balance="balance"), workshops=WORKSHOPS)
    assert found.sentence() in reported


FREE = "CREATE TABLE users (id uuid PRIMARY KEY, outside text UNIQUE NOT NULL);"
OWNED = "CREATE TABLE workshops (id uuid PRIMARY KEY, {} uuid REFERENCES users, title text);"
OTHERS = {
    "a usual name in another spelling": (
        'CREATE TABLE "Wallet" ("userId" uuid PRIMARY KEY REFERENCES users, "availableBalance" integer)',
        None,
    ),
    "a key that refers to what refers to users": (
        """
        CREATE TABLE profiles (id uuid PRIMARY KEY REFERENCES users);
        CREATE TABLE wallets (profile uuid NOT NULL UNIQUE REFERENCES profiles, balance integer)""",
        None,
    ),
    "an owner of the workshops by a foreign key alone": (
        f"{OWNED.format('member')} CREATE TABLE wallets (user_id uuid PRIMARY KEY, balance integer)",
        None,
    ),
    "a column of the users": ("ALTER TABLE users ADD balance bigint", None),
    "a column of the users of another type": (
        "ALTER TABLE users ADD credits smallint",
        "credits is smallint: it has to be integer, bigint or numeric",
    ),
    "a domain": (
        "CREATE DOMAIN amount AS integer; CREATE TABLE wallets (user_id uuid PRIMARY KEY, balance amount)",
        "balance is public.amount: it has to be",
    ),
    "no whole numbers": (
        "CREATE TABLE wallets (user_id uuid PRIMARY KEY, balance double precision)",
        "balance is double precision: it has to be",
    ),
    "a generated column": (
        "CREATE TABLE wallets (user_id uuid PRIMARY KEY, a int, balance int GENERATED ALWAYS AS (a) STORED)",
        "balance is generated: it has to be a column that can be written",
    ),
    "a partitioned table": (
        """
        CREATE TABLE wallets (user_id uuid PRIMARY KEY, balance integer) PARTITION BY HASH (user_id);
        CREATE TABLE wallets_0 PARTITION OF wallets FOR VALUES WITH (MODULUS 1, REMAINDER 0)""",
        "public.wallets is partitioned",
    ),
    "a view": ("CREATE VIEW wallets AS SELECT id AS user_id, 3 AS balance FROM users", "public.wallets is a view"),
    "a view of the table": (
        """
        CREATE TABLE wallets (user_id uuid PRIMARY KEY, balance integer);
        CREATE VIEW balances AS SELECT * FROM wallets""",
        None,
    ),
    "one for each currency": (
        "CREATE TABLE wallets (user_id uuid, currency text, balance integer, PRIMARY KEY (user_id, currency))",
        "user_id is not both NOT NULL and UNIQUE",
    ),
    "a table that users refer to": (
        "CREATE TABLE wallets (id serial PRIMARY KEY, balance int); ALTER TABLE users ADD its int REFERENCES wallets",
        "public.wallets has no column with the user's key",
    ),
    "a key of another type than the owner's": (
        f"{OWNED.format('user_id')} CREATE TABLE wallets (user_id text PRIMARY KEY, balance integer)",
        "user_id is text, and the workshops name their owner by user_id, which is uuid",
    ),
    "a key without a foreign key": ('CREATE TABLE "Wallet" ("userId" uuid UNIQUE NOT NULL, balance bigint)', None),
    "any name, one for each user": ("CREATE TABLE plans (of uuid PRIMARY KEY REFERENCES users, credits integer)", None),
    "a key that is not unique": (
        "CREATE TABLE wallets (id serial PRIMARY KEY, user_id uuid REFERENCES users, balance integer)",
        "user_id is not both NOT NULL and UNIQUE",
    ),
    "another key than the workshops'": (
        """
        CREATE TABLE workshops (id uuid PRIMARY KEY, user_id text REFERENCES users (outside), title text);
        CREATE TABLE wallets (user_id uuid PRIMARY KEY REFERENCES users, balance integer)""",
        "user_id refers to public.users.id, and the workshops name their owner by outside",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_shapes_are_named_with_what_is_in_the_way(name: str, make_app: Callable[..., App]) -> None:
    ddl, obstacle = OTHERS[name]
    app = make_app(f"{FREE} {ddl}")
    [found] = apart(app)
    assert (found.obstacle or "").startswith(obstacle or "")
    assert bool(found.obstacle) == bool(obstacle)
    assert ("It cannot serve yet" in found.sentence()) == bool(obstacle)
    if obstacle is None:
        asked = {option.removeprefix("--").replace("-", "_"): to for option, to in found.options.items()}
        with app.engine.connect() as conn:
            mapping = migrate.propose(conn, **asked)
            migrate.plan(conn, app.config.model_copy(update={"host": mapping}))
        assert f"{mapping.users.schema}.{mapping.users.table}.{mapping.users.balance}" == found.column


def test_a_mapping_that_is_wrong_is_for_others_to_refuse(make_app: Callable[..., App]) -> None:
    mapping = HostMapping(users=UsersTable(), workshops=WorkshopsTable(owner="nobody"))
    app = make_app(f"{FREE} {OWNED.format('user_id')} CREATE TABLE wallets (user_id uuid PRIMARY KEY, balance integer)")
    with app.engine.connect() as conn:
        assert [one.column for one in migrate.balances_apart(conn, mapping)] == ["public.wallets.balance"]


NOBODYS = {
    "rows of many kinds": "CREATE TABLE invoices (id serial, user_id uuid REFERENCES users, balance integer)",
    "an account at a bank": "CREATE TABLE banks (id uuid PRIMARY KEY, balance integer)",
    "words": "CREATE TABLE wallets (user_id uuid PRIMARY KEY REFERENCES users, balance text)",
    "users with credits": """
        ALTER TABLE users ADD credits integer;
        CREATE TABLE wallets (user_id uuid PRIMARY KEY REFERENCES users, balance integer)""",
}


@pytest.mark.parametrize("name", NOBODYS)
def test_what_holds_nobodys_credits_is_not_named(name: str, make_app: Callable[..., App]) -> None:
    assert apart(make_app(f"{FREE} {NOBODYS[name]}")) == []


@contextmanager
def old_code(app: App, table: str) -> Iterator[list[tuple[int, int]]]:
    """It sells and spends by itself, of users 1 to 8, until the end; the list has what it did."""
    did: list[tuple[int, int]] = []
    errors: list[psycopg.Error] = []
    stop = threading.Event()
    url = sa.make_url(app.url).set(drivername="postgresql").render_as_string(hide_password=False)

    def write() -> None:
        with psycopg.connect(url, autocommit=True) as conn:
            while not stop.is_set():
                number, change = len(did) % 8 + 1, (3, -1, -2)[len(did) % 3]
                try:
                    done = conn.execute(
                        f"UPDATE {table} SET balance = balance + %s, updated_at = now()"  # type: ignore[arg-type]
                        " WHERE user_id = %s AND balance + %s >= 0",
                        (change, user(number), change),
                    )
                except psycopg.Error as error:
                    errors.append(error)
                    return
                did.append((number, change if done.rowcount else 0))
                time.sleep(0.002)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield did
    finally:
        stop.set()
        thread.join()
        assert errors == []


@pytest.mark.parametrize("name", HOSTS)
def test_there_and_back_with_old_code_writing(name: str, make_app: Callable[..., App]) -> None:
    ddl, table = HOSTS[name]
    mapping = HostMapping(users=UsersTable(table=table, key="user_id", balance="balance"), workshops=WORKSHOPS)
    app = make_app(
        f"""{ddl}
        INSERT INTO {table} (user_id, balance) SELECT id, left(email, 1)::integer FROM users WHERE email < '9';
        CREATE TABLE credit_history (id serial PRIMARY KEY, user_id uuid, amount integer);
        INSERT INTO credit_history (user_id, amount) SELECT user_id, balance FROM {table};
        UPDATE credit_history SET amount = 1 WHERE user_id = '{user(2)}';
        """,
        mapping,
    )
    shape = app.shape()
    expected = {number: number for number in range(1, 9)}
    with app.engine.connect() as conn:
        before = migrate.look_at_own_credits(conn, app.config)
        rules = [note.text for note in migrate.plan(conn, app.config).findings if "leaves a debt" in note.text]
    assert (before.column, before.users, before.credits) == (f"public.{table}.balance", 8, 36)
    assert before.history is not None
    assert [(one.user, one.by) for one in before.history.differences] == [(user(2), 1)]
    assert len(rules) == ddl.count("CHECK")

    with old_code(app, table) as did:
        migrate.apply(app.url, app.config)
        ledger = Ledger(app.engine)
        seen = len(did)
        with app.engine.begin() as conn:
            ledger.grant(conn, user(1), credits=5, key="a", description="welcome")
            ledger.consume(conn, user(1), key="b", workshop=1)
            hold = ledger.hold(conn, user(1), credits=2, key="c")
            ledger.capture(conn, user(1), hold.id, credits=1)
            purchase = ledger.start_purchase(conn, user(1), credits=4, key="p", description="pack")
            ledger.complete_purchase(conn, user(1), purchase=purchase.id)
            ledger.refund(conn, user(1), purchase.id, key="r")
            with pytest.raises(UnknownUser, match="in the mapped table"):
                ledger.balance(conn, user(9))
        deadline = time.monotonic() + 60
        while len(did) < seen + 8 and time.monotonic() < deadline:
            time.sleep(0.01)
    expected[1] += 3
    for number, change in did:
        expected[number] += change
    assert {row[0].int: int(row[1]) for row in app.rows(f"SELECT user_id, balance FROM {table}")} == expected
    assert migrate.adopt(app.url, app.config).left == 0
    assert drift(app) == faults(app) == []

    with pytest.raises(sa.exc.DBAPIError, match=f"user {user(1)} has credit transactions, and history stays"):
        app.run(f"DELETE FROM users WHERE id = '{user(1)}'")
    app.run(  # a user who gets a row later, and one whose key changes
        f"INSERT INTO {table} (user_id) SELECT id FROM users ON CONFLICT DO NOTHING",
        f"UPDATE users SET id = '{user(80)}' WHERE id = '{user(8)}'",
    )
    with app.engine.begin() as conn:
        assert ledger.grant(conn, user(9), credits=1, key="a", description="welcome").balance == 1
        assert ledger.balance(conn, user(80)) == expected[8]
    migrate.cut_over(app.url, app.config)
    assert drift(app) == faults(app) == []
    kept = app.rows(f"SELECT user_id, balance, updated_at FROM {table} ORDER BY 1")
    migrate.undo(app.url, app.config, discard_ledger=True)
    assert app.shape() == shape
    assert app.rows(f"SELECT user_id, balance, updated_at FROM {table} ORDER BY 1") == kept


def test_a_rule_of_the_apps_against_debts(make_app: Callable[..., App]) -> None:
    """The plan says what it costs, and names what takes it away."""
    mapping = HostMapping(users=UsersTable(table="wallets", key="user_id", balance="balance"), workshops=WORKSHOPS)
    app = make_app(f"{OF_KEY} INSERT INTO wallets VALUES ('{user(1)}')", mapping)
    with app.engine.connect() as conn:
        [output] = [note.text for note in migrate.plan(conn, app.config).findings if "leaves a debt" in note.text]
    assert "wallets_balance_check on public.wallets, CHECK (balance >= 0), also holds" in output
    migrate.apply(app.url, app.config)
    ledger = Ledger(app.engine)
    with app.engine.begin() as conn:
        purchase = ledger.start_purchase(conn, user(1), credits=4, key="p", description="pack")
        ledger.complete_purchase(conn, user(1), purchase=purchase.id)
        ledger.consume(conn, user(1), key="c", credits=3)
    with app.engine.begin() as conn, pytest.raises((TallystickError, sa.exc.IntegrityError), match="balance_check"):
        ledger.refund(conn, user(1), purchase.id, key="r")
    app.run(output[output.index("ALTER TABLE") :])
    with app.engine.begin() as conn:
        assert ledger.refund(conn, user(1), purchase.id, key="r").balance == -3
    assert faults(app) == []


def test_nobody_begins_with_0_without_a_word(make_app: Callable[..., App]) -> None:
    """Not before the migration, and not after it."""
    app = make_app(OF_KEY, HostMapping(users=UsersTable(email="email"), workshops=WORKSHOPS))
    command = "--users public.wallets --users-key user_id --balance balance --workshops public.app_workshop"
    with (
        app.engine.connect() as conn,
        pytest.raises(HostMismatch, match=rf"has no column credit_balance\. public\.wallets\.balance .*{command}$"),
    ):
        migrate.look_at_own_credits(conn, app.config)
    migrate.apply(app.url, app.config)
    with pytest.raises(MigrationError, match=rf"begins with 0 .*run: tallystick migrate undo, and .*{command}$"):
        migrate.adopt(app.url, app.config)
    with app.engine.connect() as conn:
        assert [note for note in migrate.plan(conn, app.config).findings if "begins with 0" in note.text] == []


def test_before_init_no_workshops_are_named_that_are_not_there(make_app: Callable[..., App]) -> None:
    app = make_app(OF_KEY, HostMapping())
    command = "tallystick init --force --users public.wallets --users-key user_id --balance balance"
    with app.engine.connect() as conn, pytest.raises(HostMismatch, match=rf"another column\. If so, run: {command}$"):
        migrate.look_at_own_credits(conn, app.config)
    with app.engine.connect() as conn:
        found = migrate.propose(conn, "public.wallets", users_key="user_id", balance="balance")
    assert (found.users.balance, found.workshops and found.workshops.table) == ("balance", "app_workshop")


def test_each_command_names_the_real_column(
    make_app: Callable[..., App], tallystick: Callable[..., tuple[int, str, str]]
) -> None:
    app = make_app(f"{OF_KEY} INSERT INTO wallets VALUES ('{user(1)}', 4)")
    [beside] = json.loads(tallystick(app, "init", "--json")[1])["balances_apart"]
    assert (beside["column"], beside["options"]["--balance"]) == ("public.wallets.balance", "balance")
    said = " ".join(tallystick(app, "migrate", "apply")[2].split())
    assert "Warning: public.wallets.balance may hold the credits" in said
    assert "run: tallystick migrate undo, and tallystick init --force --users public.wallets --users-key" in said
    assert tallystick(app, "migrate", "apply")[2].count("Warning") == 0
    assert tallystick(app, "migrate", "undo")[0] == 0
    tallystick(app, "init", "--force", *(part for pair in beside["options"].items() for part in pair))
    named = ": public.wallets.balance (as credit_balance), public.wallets.updated_at."
    for command in ("plan", "apply", "status"):
        said = tallystick(app, "migrate", command)[1]
        assert (command, named in said) == (command, True), said
    app.run("SET session_replication_role = replica", "UPDATE wallets SET balance = 9")
    said = tallystick(app, "audit")[1]
    assert ("credit_balance" in said, "found         balance 9" in said) == (False, True), said


def test_the_section_of_the_page(make_app: Callable[..., App], tallystick: Callable[..., tuple[int, str, str]]) -> None:
    """Its table, its commands and its statements, in their order."""
    page = (Path(__file__).parents[2] / "docs" / "existing-credits.md").read_text(encoding="utf-8")
    section = page.partition("\n## Balances in a table of their own\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```(sh|sql)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks] == ["sql", "sh", "sql", "sql"]
    (_, table), (_, commands), (_, fill), (_, mend) = blocks
    app = make_app(
        f"""{USERS.replace("app_workshop", "workshops").replace("member", "user_id")} {table}
        INSERT INTO wallets (user_id, balance) SELECT id, 4 FROM users WHERE email < '9';"""
    )

    def typed(command: str) -> tuple[int, str, str]:
        program, *arguments = shlex.split(command)
        assert program == "tallystick"
        return tallystick(app, *arguments)

    output = {command: typed(command) for command in commands.splitlines()}
    assert {command: err for command, (code, _, err) in output.items() if code} == {}
    first, reported, *_ = output
    assert (first, reported in output[first][1]) == ("tallystick init", True)
    assert "public.wallets.balance: 32 credits of 8 users" in output["tallystick adopt"][1]
    assert "Opened the balances of 8 users" in output["tallystick migrate apply"][1]
    assert app.value("SELECT count(*) FROM wallets") == 8
    app.psql(fill)
    assert app.value("SELECT count(*) FROM wallets") == 9
    code, _, err = tallystick(app, "balance", "1@example.com")
    assert (code, "no column with e-mail addresses is mapped" in err) == (1, True)
    assert tallystick(app, "balance", str(user(9)))[1] == "0 credits\n"

    loose = make_app(f"{USERS} CREATE TABLE wallets (user_id uuid REFERENCES users, balance integer)")
    assert apart(loose)[0].obstacle is not None
    loose.psql(mend)
    assert apart(loose)[0].obstacle is None
