"""Connections of the CLI, the console and the audit, in databases whose settings or other roles are against them."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from starlette.testclient import TestClient

from tallystick import migrate
from tallystick.audit import audit
from tallystick.config import Config, to_toml
from tallystick.database import KNOWN_SETTINGS, connect, engine, with_known_settings
from tallystick.dev.postgres import Server
from tallystick.errors import LedgerError
from tallystick.events import enable
from tallystick.ledger.functions import HEAD, REVISIONS, _text
from tallystick.schema import ROW
from tallystick.web.console import LocalLink, console
from test_cli import Output, tally  # noqa: F401 - a fixture
from test_partitions import call_every_function
from worlds import SHAPES, World

CAUGHT = "code of a stranger ran"

# Every operator and some functions that fit a pair of types better than PostgreSQL's own, which is for each the one
# that a query of ours would run, were its schema in search_path. None of them is one of PostgreSQL's own.
PLANT = f"""
DO $plant$
DECLARE
  pair record;
  body text := 'BEGIN RAISE EXCEPTION ''{CAUGHT}''; END';
  of_types regtype[] := ARRAY['text', 'varchar', 'bpchar', 'name', '"char"', 'uuid', 'int2', 'int4', 'int8', 'numeric',
    'oid', 'regclass', 'regtype', 'bool', 'timestamp', 'timestamptz', 'date', 'interval', 'json', 'jsonb', 'text[]',
    'name[]', 'oid[]', 'int2[]', 'int2vector', 'public.credit_transaction_type', 'public.credit_transaction_status'];
BEGIN
  FOR pair IN SELECT l, r FROM unnest(of_types) l, unnest(of_types) r LOOP
    EXECUTE format('CREATE FUNCTION public.caught(%s, %s) RETURNS boolean LANGUAGE plpgsql AS %L',
      pair.l, pair.r, body);
  END LOOP;
  FOR pair IN
    SELECT o, l, r FROM unnest(ARRAY['=', '<>', '<', '>', '<=', '>=', '||', '~', '~~', '+', '-', '*', '/']) o,
      unnest(of_types) l, unnest(of_types) r
    WHERE NOT EXISTS (SELECT FROM pg_operator WHERE oprname = o AND oprleft = l AND oprright = r)
  LOOP
    EXECUTE format('CREATE OPERATOR public.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = public.caught)',
      pair.o, pair.l, pair.r);
  END LOOP;
  FOR pair IN SELECT f FROM unnest(ARRAY[
    'to_regclass(varchar)', 'to_regnamespace(varchar)', 'quote_ident(varchar)', 'quote_ident(name)', 'lower(varchar)',
    'set_config(varchar, varchar, boolean)', 'current_setting(varchar)', 'hashtextextended(varchar, bigint)',
    'concat(text, text)', 'concat(text, text, text)', 'format(text, name, name)', 'format(text, text, text)',
    'unnest(text[])', 'unnest(oid[])', 'unnest(int2vector)', 'unnest(name[])', 'array_to_string(text[], text)',
    'lag(integer)', 'lag(bigint)', 'array_agg(uuid)', 'array_agg(text)', 'max(uuid)', 'count(uuid)', 'count(integer)',
    'string_agg(name, text)', 'min(uuid)', 'jsonb_agg(text)', 'to_jsonb(text)'
  ]) f LOOP
    EXECUTE format('CREATE FUNCTION public.%s RETURNS text LANGUAGE plpgsql AS %L', pair.f, body);
  END LOOP;
END $plant$
"""


def run(url: str, script: str) -> None:
    with psycopg.connect(url.replace("+psycopg", "", 1), autocommit=True) as conn:
        conn.execute(script.encode())


@pytest.fixture
def plant(server: Server) -> Iterator[Callable[[str], None]]:
    """``plant(url)``: a role that may create in ``public``, as any could before PostgreSQL 15, has done its worst."""
    name = f"stranger_{uuid.uuid4().hex}"
    run(server.url(), f"CREATE ROLE {name} LOGIN")

    def do(url: str) -> None:
        run(url, f"GRANT CREATE, USAGE ON SCHEMA public TO {name}")
        script = PLANT
        if "credit_transaction_type" not in known_types(url):
            script = script.replace(", 'public.credit_transaction_type', 'public.credit_transaction_status'", "")
        run(sa.make_url(url).set(username=name).render_as_string(hide_password=False), script)

    yield do
    # the databases are gone by then, and its grants with them
    run(server.url(), f"DROP ROLE {name}")


def known_types(url: str) -> set[str]:
    with psycopg.connect(url.replace("+psycopg", "", 1)) as conn:
        return {row[0] for row in conn.execute("SELECT typname FROM pg_type")}


@pytest.fixture
def planted(plant: Callable[[str], None], make_world: Callable[..., World], request: Any) -> World:
    world = make_world(getattr(request, "param", "uuid"))
    world.engine = engine(world.url, poolclass=sa.NullPool)  # one of ours, or the test would run it
    plant(world.url)
    return world


@pytest.mark.parametrize("planted", ["uuid", "clerk"], indirect=True)
def test_no_command_runs_the_code_of_a_role_that_may_create_in_public(
    planted: World,
    tally: Callable[..., Output],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    world = planted
    assert world.config.host.workshops is not None
    user = world.user(credits=9)
    workshop = world.workshop(user)
    monkeypatch.setenv("DATABASE_URL", world.url)
    Path("tallystick.toml").write_text(to_toml(world.config.host), encoding="utf-8")
    with psycopg.connect(world.url.replace("+psycopg", "", 1)) as conn, pytest.raises(psycopg.Error, match=CAUGHT):
        conn.execute("SELECT 'a'::varchar = 'a'::text")  # so it is there, for whoever keeps the usual search_path

    with world.engine.connect() as conn:
        purchase = world.ledger.history(conn, user)[0].id
    for command in (
        ("balance", user),
        ("history", user),
        ("consume", user, "--workshop", workshop, "--key", "a"),
        ("grant", user, 2, "--key", "b"),
        ("refund", user, purchase, "--credits", 1, "--key", "c"),
        ("onboarding", user, "--complete"),
        ("audit",),
        ("audit", "--user", user, "--since", "2020-01-01"),
        ("seed",),
        ("migrate", "status"),
        ("migrate", "plan"),
        ("migrate", "sql"),
        ("backup", str(tmp_path / "a.backup")),
    ):
        output = tally(*command)
        assert output.code == 0, (command, output)
        assert CAUGHT not in output.out + output.err
    # a fault, so that the precise checks run as well
    with world.engine.begin() as conn:
        conn.execute(sa.update(world.schema.users).where(world.schema.users.c.key == user).values(credit_balance=99))
        conn.execute(sa.update(world.schema.workshops).values(credit_consumed_at=None))
    output = tally("audit", "--json")
    assert {finding["check"] for finding in output.json["findings"] if finding["fault"]} == {
        "user_balance",
        "workshop_marked",
    }


def test_no_page_of_the_console_does(planted: World) -> None:
    world = planted
    user = world.user(credits=3)
    link = LocalLink()
    with ExitStack() as stack:
        pool = sa.create_engine(world.url, use_native_hstore=False)  # the host's, with the usual search_path
        stack.callback(pool.dispose)
        app = console(world.config, engine=pool, sign_in=link, address="http://127.0.0.1:8420", allow_actions=True)
        visitor = TestClient(app, base_url="http://127.0.0.1:8420", client=("127.0.0.1", 50_000))
        visitor.get("/enter", params={"token": link.token})
        for path in ("/", "/users", "/users?q=a@example.com", "/users?q=exa", f"/user?key={user}", "/ledger", "/audit"):
            page = visitor.get(path)
            assert page.status_code in (200, 404), (path, page.text)
            assert "Something broke" not in page.text, path
        with pool.connect() as conn:  # the host's own transactions are as they were
            assert conn.scalar(sa.text("SHOW search_path")) == '"$user", public'


def test_no_migration_does(plant: Callable[[str], None], fresh_database: Callable[..., str]) -> None:
    url = fresh_database()
    run(url, SHAPES["uuid"].ddl + "INSERT INTO users (id, email) VALUES (gen_random_uuid(), 'a')")
    plant(url)
    config = Config(database_url=url, host=SHAPES["uuid"].host)
    with connect(url) as conn:
        proposed = migrate.propose(conn)
    assert (proposed.users.table, proposed.users.key) == ("users", "id")
    migrate.apply(url, config)
    with connect(url) as conn:
        assert migrate.status(conn, config).healthy
    migrate.undo(url, config)


@pytest.mark.parametrize("encoding", ["UTF8", "SQL_ASCII", "LATIN1"])
def test_settings_of_the_database_change_no_result(
    encoding: str,
    server: Server,
    tally: Callable[..., Output],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = f"odd_{uuid.uuid4().hex}"
    run(
        server.url(),
        f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'"
        + (" LOCALE_PROVIDER libc" if server.version >= "15" else ""),
    )
    try:
        url = server.url(name)
        for setting, value in (
            ("DateStyle", "SQL, DMY"),
            ("IntervalStyle", "sql_standard"),
            ("TimeZone", "Asia/Kolkata"),
            ("search_path", "nowhere"),
            ("quote_all_identifiers", "on"),
        ):
            run(server.url(), f"ALTER DATABASE {name} SET {setting} = '{value}'")
        run(url, "SET search_path = public;" + SHAPES["uuid"].ddl)
        config = Config(database_url=url, host=SHAPES["uuid"].host)
        migrate.apply(url, config)
        monkeypatch.setenv("DATABASE_URL", url)
        world = World(url, config.host)
        world.engine = engine(url, poolclass=sa.NullPool)  # one of ours
        user = world.user(credits=3)
        workshop = world.workshop(user, title="Überblick")
        assert tally("consume", user, "--workshop", workshop, "--key", "a").code == 0
        rows = tally("history", user, "--json").json
        assert rows[0]["description"].endswith("Überblick")
        assert rows[0]["completed_at"].endswith("+00:00")
        assert tally("audit").code == 0
        assert tally("migrate", "status").code == 0
    finally:
        server.drop_database(name)


@pytest.mark.parametrize("events", [False, True])
def test_every_check_of_plpgsql_is_on(events: bool, fresh_database: Callable[..., str]) -> None:
    """The app turned them on for its own functions: ours are created, and run, without a fault."""
    url = fresh_database()
    run(
        url,
        f'ALTER DATABASE "{sa.make_url(url).database}" SET plpgsql.extra_errors = "all"; {SHAPES["uuid"].ddl}',
    )
    migrate.apply(url, Config(database_url=url, host=SHAPES["uuid"].host))
    world = World(url, SHAPES["uuid"].host)
    if events:
        enable(world.engine, world.config)
    with world.engine.begin() as conn:
        assert conn.scalar(sa.text("SHOW plpgsql.extra_errors")) == "all"
        users = call_every_function(world, conn)
        ledger, user = world.ledger, users[0]
        for refused in (
            lambda: ledger.refund(conn, user, ledger.history(conn, user)[-1].id, credits=99, key="beyond"),
            lambda: ledger.consume(conn, user, workshop=world.key("uuid"), key="nobody's"),
            lambda: ledger.complete_purchase(conn, user, stripe_session_id="cs_unknown", amount_paid=1, currency="usd"),
            lambda: ledger.release(conn, user, world.key("uuid")),
        ):
            with pytest.raises(LedgerError):
                refused()
    user = world.user(credits=9)
    shop, other = world.workshop(user), world.workshop(user)
    with world.engine.begin() as conn:
        held = ledger.hold(conn, user, credits=2, workshop=other, key="hold")
        ledger.consume(conn, user, workshop=shop, key="once")
        ledger.consume(conn, user, workshop=other, key="first")
        # what is paid for already
        assert ledger.consume(conn, user, workshop=shop, key="twice").replayed
        assert ledger.hold(conn, user, credits=1, workshop=shop, key="held").replayed
        assert ledger.capture(conn, user, held.id).replayed
        assert audit(conn, world.config).findings == ()
    world.pass_time(days=2)
    with world.engine.begin() as conn:
        assert ledger.sweep(conn) == len(users)
        ledger.merge(conn, users[0], into=users[1], key="one person")
        world.accounts.erase(conn, users[1])
        assert len(ledger.events(conn, limit=1000)) > 0 or not events
        ledger.close_days(conn)


COUNTS = {"answer": 27, "account_answer": 9, "workshop_answer": 5}
OF_NAMES = {"{row}": len(ROW), "{account}": 7}
LISTS = re.compile(r"\b(?:SELECT|RETURNING)\s+((?:(?!\bSELECT\b|\bRETURNING\b|;).)*?)\s+INTO answer\b(?!\.)", re.DOTALL)


@pytest.mark.parametrize("name", sorted(name for names in REVISIONS.values() for name in names))
def test_an_answer_gets_a_value_for_each_of_its_attributes(name: str) -> None:
    """As strict_multi_assignment asks of every branch, also of those that no test above comes to."""
    text = _text(name, HEAD)
    made = re.search(r"\n  answer tallystick\.(\w+);", text)
    for found in LISTS.finditer(text):
        listed = found[1]
        while "(" in listed:
            listed = re.sub(r"\([^()]*\)", "", listed)
        counted = sum(OF_NAMES.get(item.strip(), 1) for item in listed.split(","))
        assert made
        assert counted == COUNTS[made[1]], found[0]


def test_settings_end_with_the_transaction(world: World) -> None:
    """Behind a transaction pooler, whoever gets the session next is not to find them."""
    show = "SELECT " + ", ".join(f"current_setting('{name}')" for name in KNOWN_SETTINGS)
    pool = sa.create_engine(world.url, pool_size=1, max_overflow=0)
    with pool.connect() as conn:
        before = conn.exec_driver_sql(show).one()
    ours = with_known_settings(pool)
    with ours.connect() as conn:
        for _ in range(12):  # a driver that prepared the settings as a statement would refuse them by now
            with conn.begin():
                assert tuple(conn.exec_driver_sql(show).one()) == tuple(KNOWN_SETTINGS.values())
        with conn.begin():  # SET is no query: what must come before any still can
            conn.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE, READ ONLY")
    with pool.connect() as conn:
        assert conn.exec_driver_sql(show).one() == before
    pool.dispose()


def test_an_audit_without_a_transaction_leaves_none(world: World) -> None:
    with world.engine.connect() as conn:
        assert audit(conn, world.config).clean
        assert not conn.in_transaction()
