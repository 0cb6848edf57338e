"""Each type of key that a host may have: proposed, migrated, used, audited, undone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy as sa
from hosts import App

from tallystick import Config, Ledger, migrate
from tallystick.accounts import Accounts
from tallystick.audit import audit
from tallystick.config import to_toml
from tallystick.errors import HostMismatch, InvalidArgument, Key, UnknownUser, UserDeleted

HOST = """
    {before}
    CREATE TABLE users (id {type} PRIMARY KEY, email text);
    CREATE TABLE workshops (
      id {type} PRIMARY KEY, user_id {type} NOT NULL REFERENCES users, title text, created_at timestamptz);
    INSERT INTO users VALUES ({one}), ({two});
    INSERT INTO workshops VALUES ({one}, {two});
"""

ULID = "01J9ZK3V5Q8W2E4R6T8Y0U1I3O"
CI = "CREATE COLLATION {} (provider = icu, locale = 'und-u-ks-level2', deterministic = false);"

# DDL before, type, two keys, and what the mapping says
KEYS: dict[str, tuple[str, str, tuple[Key, Key], dict[str, object]]] = {
    "char(26)": ("", "char(26)", (ULID, ULID[:-1] + "P"), {"key_type": "char"}),
    "smallint": ("", "smallint", (1, -2), {"key_type": "smallint"}),
    "citext": (
        "CREATE EXTENSION citext;",
        "citext",
        ("Ada", "bob"),
        {"key_type": "citext", "key_type_schema": "public"},
    ),
    "citext elsewhere": (
        'CREATE SCHEMA "My Extensions"; CREATE EXTENSION citext SCHEMA "My Extensions";',
        '"My Extensions".citext',
        ("Ada", "bob"),
        {"key_type": "citext", "key_type_schema": "My Extensions"},
    ),
    "domain over a domain": (
        "CREATE DOMAIN small AS integer CHECK (VALUE > 0); CREATE DOMAIN smaller AS small CHECK (VALUE < 99);",
        "smaller",
        (1, 2),
        {"key_type": "integer"},
    ),
    "another collation": (
        "",
        'text COLLATE "C"',
        ("a", "B"),
        {"key_type": "text", "key_collation": ("pg_catalog", "C")},
    ),
    "a collation of the app's": (
        """CREATE COLLATION "c %s" (locale = 'C');""",
        'text COLLATE "c %s"',
        ("a", "B"),
        {"key_type": "text", "key_collation": ("public", "c %s")},
    ),
    "a collation that is not deterministic": (
        CI.format('"ci %s"'),
        'varchar(9) COLLATE "ci %s"',
        ("Ada", "bob"),
        {"key_type": "text", "key_collation": ("public", "ci %s")},
    ),
}


@pytest.mark.parametrize("name", KEYS)
def test_a_host_with_such_keys(name: str, needs_icu: Callable[[], None], make_app: Callable[..., App]) -> None:
    before, declared, keys, expected = KEYS[name]
    if "deterministic" in name:
        needs_icu()
    one, two = (f"'{key}'" for key in keys)
    app = make_app(HOST.format(before=before, type=declared, one=one, two=two))
    with app.engine.connect() as conn:
        mapping = migrate.propose(conn)
    for table in (mapping.users, mapping.workshops):
        assert table is not None
        assert {setting: getattr(table, setting) for setting in expected} == expected
    config = Config(database_url=app.url, host=mapping)
    shape = app.shape()

    migrate.apply(app.url, config)
    with app.engine.connect() as conn:
        assert migrate.status(conn, config).drift == ()
    ledger = Ledger(config)
    with app.engine.begin() as conn:
        ledger.grant(conn, keys[1], credits=2, key="welcome", description="Welcome")
        spent = ledger.consume(conn, keys[1], workshop=keys[0], key="spend")
        assert ledger.balance(conn, keys[1]) == 1
        assert (spent.user_id, spent.workshop_id) == (keys[1], keys[0])
        if expected["key_type"] == "citext":
            again = ledger.consume(conn, keys[1], workshop=str(keys[0]).swapcase(), key="spend")
            assert (again.replayed, again.workshop_id) == (True, keys[0])
            assert a_hold_replays(app, config, conn, user=keys[1])
        assert audit(conn, config).clean
    with app.engine.begin() as conn, pytest.raises(InvalidArgument, match=r"is no .* key"):
        ledger.balance(conn, 2**70 if isinstance(keys[0], int) else 7)
    people_change(app, config, duplicate=keys[1], user=keys[0], renamed=3 if isinstance(keys[0], int) else "Zoe")
    migrate.undo(app.url, config, discard_ledger=True)
    assert app.shape() == shape


def a_hold_replays(app: App, config: Config, conn: sa.Connection, *, user: Key) -> bool:
    """True if a hold's key may be used again with the workshop's key in other letters."""
    ledger = Ledger(config)
    conn.execute(sa.text("INSERT INTO workshops VALUES ('Held', :user)"), {"user": user})
    held = ledger.hold(conn, user, credits=1, workshop="Held", key="hold")
    again = ledger.hold(conn, user, credits=1, workshop="hELD", key="hold")
    ledger.release(conn, user, held.id)
    return again.replayed


def people_change(app: App, config: Config, *, duplicate: Key, user: Key, renamed: Key) -> None:
    """An account is merged into another, whose key then changes, and whose person is erased."""
    ledger, accounts = Ledger(config), Accounts(config)
    with app.engine.begin() as conn:
        assert ledger.merge(conn, duplicate, into=user, key="ticket 7").balance == 1
        with pytest.raises(UserDeleted):
            ledger.consume(conn, duplicate, key="too late")
        conn.execute(sa.text("UPDATE users SET id = :renamed WHERE id = :user"), {"renamed": renamed, "user": user})
        with pytest.raises(UnknownUser):
            ledger.balance(conn, user)
        [moved] = ledger.history(conn, renamed)
        assert (str(moved.user_id).rstrip(), moved.type, moved.balance_after) == (str(renamed), "transfer", 1)
        assert ledger.consume(conn, renamed, key="after").balance_after == 0
        assert accounts.erase(conn, renamed).deleted_at is not None
        assert {row.description for row in ledger.history(conn, renamed)} == {"Erased"}
        assert audit(conn, config).clean


@pytest.mark.parametrize("name", KEYS)
def test_the_audit_tells_what_is_wrong_with_such_keys(
    name: str, needs_icu: Callable[[], None], make_app: Callable[..., App]
) -> None:
    before, declared, keys, _ = KEYS[name]
    if "deterministic" in name:
        needs_icu()
    app = make_app(HOST.format(before=before, type=declared, one=f"'{keys[0]}'", two=f"'{keys[1]}'"))
    with app.engine.connect() as conn:
        config = Config(database_url=app.url, host=migrate.propose(conn))
    migrate.apply(app.url, config)
    with app.engine.begin() as conn:
        conn.exec_driver_sql("UPDATE users SET credit_balance = 7")
        conn.exec_driver_sql("UPDATE workshops SET credit_consumed_at = now()")
    with app.engine.connect() as conn:
        assert len([finding for finding in audit(conn, config).findings if finding.fault]) == 3


@pytest.mark.parametrize("name", KEYS)
def test_what_init_writes_is_read_again(
    name: str, needs_icu: Callable[[], None], make_app: Callable[..., App], tmp_path
) -> None:
    before, declared, keys, _ = KEYS[name]
    if "deterministic" in name:
        needs_icu()
    app = make_app(HOST.format(before=before, type=declared, one=f"'{keys[0]}'", two=f"'{keys[1]}'"))
    with app.engine.connect() as conn:
        mapping = migrate.propose(conn)
    (tmp_path / "t.toml").write_text(to_toml(mapping))
    assert Config.load(tmp_path / "t.toml", environ={}).host == mapping


def test_an_address_as_the_key(make_app: Callable[..., App]) -> None:
    app = make_app("CREATE TABLE users (email text PRIMARY KEY); INSERT INTO users VALUES ('a@example.com')")
    with app.engine.connect() as conn:
        mapping = migrate.propose(conn)
    assert (mapping.users.key, mapping.users.email) == ("email", "email")
    config = Config(database_url=app.url, host=mapping)
    migrate.apply(app.url, config)
    ledger = Ledger(config)
    with app.engine.begin() as conn:
        ledger.grant(conn, "a@example.com", credits=2, key="welcome", description="Welcome")
        assert audit(conn, config).clean
        assert migrate.status(conn, config).healthy


@pytest.mark.parametrize(
    ("ddl", "message"),
    [
        (
            "CREATE TABLE users (id numeric PRIMARY KEY, email text NOT NULL UNIQUE)",
            r"its primary key id \(numeric\) cannot be a key here .*Choose one: --users-key email",
        ),
        (
            "CREATE TABLE users (org int, n int, email text NOT NULL UNIQUE, PRIMARY KEY (org, n))",
            r"its primary key org \(integer\), n \(integer\) cannot",
        ),
        (
            'CREATE TABLE users ("the id" uuid NOT NULL UNIQUE, email text NOT NULL UNIQUE)',
            "it has no primary key. Choose one: --users-key 'the id' or --users-key email",
        ),
    ],
)
def test_no_other_column_takes_the_place_of_the_primary_key_in_silence(
    ddl: str, message: str, make_app: Callable[..., App]
) -> None:
    app = make_app(ddl)
    with app.engine.connect() as conn:
        with pytest.raises(HostMismatch, match=message):
            migrate.propose(conn)
        found = migrate.propose(conn, users_key="email")
        assert found.users.key == "email"
        assert migrate.other_than_primary(conn, found) != "email"
        with pytest.raises(HostMismatch, match="it has no column mail"):
            migrate.propose(conn, users_key="mail")
    migrate.apply(app.url, Config(database_url=app.url, host=found))


def test_owners_are_named_by_a_key_of_the_same_collation(make_app: Callable[..., App]) -> None:
    app = make_app("""
        CREATE TABLE users (id text COLLATE "C" PRIMARY KEY);
        CREATE TABLE workshops (id uuid PRIMARY KEY, user_id text COLLATE "POSIX", title text, created_at timestamptz);
    """)
    with app.engine.connect() as conn:
        mapping = migrate.propose(conn)
        with pytest.raises(HostMismatch, match=r"user_id is text COLLATE pg_catalog.POSIX, but users are keyed by id"):
            migrate.examine(conn, Config(database_url=app.url, host=mapping))
    assert sa.make_url(app.url).database
