"""No function acts on what another role put in the way: operators, functions, types and tables of the usual names.

A role that may CREATE in ``public`` plants all of them, each raising an error as soon as it is used. ``public`` is on
the path of those functions that set off the host's triggers, so that the triggers find the host's own names there.
"""

from __future__ import annotations

import datetime as dt
import re
import uuid
from collections.abc import Callable, Iterator

import psycopg
import pytest
import sqlalchemy as sa
from psycopg import sql

from tallystick import Config, HostMapping, UsersTable, WorkshopsTable, errors, migrate
from tallystick.accounts import Accounts
from tallystick.audit import audit
from tallystick.database import engine
from tallystick.ledger import Consume, Ledger
from tallystick.ledger.functions import statements
from tallystick.migrate.host import role
from tallystick.migrate.revisions import HostNames
from worlds import World

# Keys and columns of types that pg_catalog has no operators of their own for, so that a planted one fits better.
DDL = """
    CREATE TABLE users (
      id varchar(40) PRIMARY KEY, email varchar, plan_tier varchar(40), deleted_at timestamp, updated_at timestamp);
    CREATE TABLE workshops (
      id varchar(40) PRIMARY KEY, user_id varchar NOT NULL REFERENCES users, title varchar, created_at date_time);
"""
HOST = HostMapping(users=UsersTable(key_type="text"), workshops=WorkshopsTable(key_type="text"))
TYPES = (  # noqa: SIM905 - read as a list of words
    "text varchar bpchar name uuid int4 int8 numeric float8 bool jsonb timestamptz timestamp date interval "
    "public.credit_transaction_type public.credit_transaction_status"
).split()
OPERATORS = "= <> < > <= >= + - * / % || ~ -> ->> << |".split()  # noqa: SIM905

PLANTED = """
DO $plant$
DECLARE
  l text;
  r text;
  o text;
  body text := $$ BEGIN RAISE EXCEPTION 'hostile code ran as %', current_user; END $$;
BEGIN
  FOREACH l IN ARRAY {types}::text[] LOOP
    FOREACH r IN ARRAY {types}::text[] LOOP
      EXECUTE format('CREATE FUNCTION public.hostile(l %s, r %s) RETURNS boolean LANGUAGE plpgsql AS %L', l, r, body);
      EXECUTE format(
        'CREATE FUNCTION public.hostile_left(l %s, r %s) RETURNS %s LANGUAGE plpgsql AS %L', l, r, l, body);
      FOREACH o IN ARRAY {operators}::text[] LOOP
        EXECUTE format('CREATE OPERATOR public.%s (FUNCTION = public.%I, LEFTARG = %s, RIGHTARG = %s)',
          o, CASE WHEN o = ANY (ARRAY['=', '<>', '<', '>', '<=', '>=', '~']) THEN 'hostile' ELSE 'hostile_left' END,
          l, r);
      END LOOP;
    END LOOP;
    FOREACH o IN ARRAY {functions}::text[] LOOP
      EXECUTE format('CREATE FUNCTION public.%I(l %s) RETURNS %s LANGUAGE plpgsql AS %L', o, l, l, body);
    END LOOP;
  END LOOP;
  FOREACH o IN ARRAY {functions}::text[] LOOP
    EXECUTE format('CREATE FUNCTION public.%I() RETURNS timestamptz LANGUAGE plpgsql AS %L', o, body);
  END LOOP;
END $plant$
"""

IN_THE_SESSION = """
CREATE TEMPORARY TABLE users (id varchar, credit_balance integer DEFAULT 1000000, credit_sequence integer);
CREATE TEMPORARY TABLE workshops (id varchar, user_id varchar, credit_consumed_at timestamptz);
CREATE TEMPORARY TABLE credit_transactions (id uuid, user_id varchar, amount integer);
CREATE TEMPORARY TABLE mapping (host jsonb);
CREATE TYPE pg_temp.answer AS (outcome text);
CREATE DOMAIN pg_temp.text AS pg_catalog.text CHECK (VALUE IS NULL);
CREATE DOMAIN pg_temp.uuid AS pg_catalog.uuid CHECK (VALUE IS NULL);
CREATE DOMAIN pg_temp.jsonb AS pg_catalog.jsonb CHECK (VALUE IS NULL);
CREATE DOMAIN pg_temp.timestamptz AS pg_catalog.timestamptz CHECK (VALUE IS NULL);
CREATE DOMAIN pg_temp.int8 AS pg_catalog.int8 CHECK (VALUE IS NULL);
CREATE FUNCTION pg_temp.settle(varchar, integer, integer) RETURNS void LANGUAGE plpgsql AS
  $$ BEGIN RAISE EXCEPTION 'hostile code ran as %', current_user; END $$;
SET search_path = pg_temp, public, pg_catalog;
"""


def called() -> list[str]:
    """The functions of pg_catalog that ours may call by a bare name."""
    text = "\n".join(statement.as_string() for statement in statements(HostNames.of(HOST)))
    return sorted(
        set(re.findall(r"(?<![.\w])([a-z_]+[a-z])\(", text)) - {"values", "consume", "from", "in", "and", "any"}
    )


@pytest.fixture
def planted(fresh_database: Callable[..., str]) -> Iterator[tuple[World, str]]:
    """A host, and the name of a role that was given its ledger and has planted."""
    url = fresh_database()
    name = f"hostile_{uuid.uuid4().hex[:8]}"
    quoted = sql.Identifier(name).as_string()
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as owner:
        owner.execute(DDL.replace("date_time", "timestamp").encode())
        migrate.apply(url, Config(database_url=url, host=HOST))
        owner.execute(f"CREATE ROLE {quoted} LOGIN".encode())
        owner.execute(f"GRANT ALL ON users, workshops TO {quoted}".encode())
        owner.execute(role.grant(HOST, name).encode())
        owner.execute(f"GRANT CREATE ON SCHEMA public TO {quoted}".encode())
        names = owner.execute(
            "SELECT DISTINCT proname FROM pg_proc"
            " WHERE proname = ANY (%s) AND pronamespace = 'pg_catalog'::regnamespace",
            [called()],
        ).fetchall()
    planting = sql.SQL(PLANTED).format(
        types=sql.Literal(TYPES), operators=sql.Literal(OPERATORS), functions=sql.Literal([row[0] for row in names])
    )
    as_role = sa.make_url(url).set(username=name).render_as_string(hide_password=False).replace("+psycopg", "")
    with psycopg.connect(as_role, autocommit=True) as conn:
        conn.execute(planting)
    yield World(url, HOST), name
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as owner:
        owner.execute(f"DROP OWNED BY {quoted} CASCADE; DROP ROLE {quoted}".encode())


def every_operation(world: World, conn: psycopg.Connection | sa.Connection) -> None:
    ledger, accounts = Ledger(world.config), Accounts(world.config)
    user, other = world.user(), world.user()
    workshops = [world.workshop(user) for _ in range(3)]
    bought = ledger.start_purchase(conn, user, credits=9, description="A pack", key="p", metadata={"a": 1})
    ledger.attach_session(conn, user, bought.id, stripe_session_id=f"cs_{user}", stripe_payment_intent_id="pi_1")
    ledger.complete_purchase(conn, user, stripe_session_id=f"cs_{user}", amount_paid=7900, currency="USD")
    assert ledger.complete_purchase(conn, user, purchase=bought.id, amount_paid=7900, currency="usd").replayed
    failed = ledger.start_purchase(conn, user, credits=5, description="A pack")
    ledger.fail_purchase(conn, user, purchase=failed.id, reason="expired")
    ledger.complete_purchase(conn, user, purchase=failed.id)
    spent = ledger.consume(conn, user, workshop=workshops[0], key="c", description="Spent", metadata={"b": None})
    assert spent.balance_after == 13
    assert ledger.consume(conn, user, workshop=workshops[0], key="c").replayed
    assert ledger.consume(conn, user, workshop=workshops[0], key="again").id == spent.id
    with pytest.raises(errors.WorkshopNotOwned):
        ledger.consume(conn, other, workshop=workshops[0], key="c")
    with pytest.raises(errors.IdempotencyKeyReused):
        ledger.consume(conn, user, credits=2, key="c")
    items = [Consume(user, workshop=workshops[1], key="m"), Consume(other, key="m"), Consume(user, key="n")]
    first, refused, last = ledger.consume_many(conn, items)
    assert isinstance(refused, errors.InsufficientCredits)
    assert (first.balance_after, last.balance_after) == (12, 11)
    assert ledger.refund(conn, user, bought.id, credits=4, key="r").balance_after == 7
    assert ledger.reinstate(conn, user, bought.id, key="s").balance_after == 11
    assert ledger.grant(conn, user, credits=2, key="g", description="Welcome").balance_after == 13
    assert ledger.balance(conn, user) == ledger.lock(conn, user) == 13
    assert ledger.balance_at(conn, user, dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)) == 13
    rows = ledger.history(conn, user, include_failed=True)
    assert len(rows) == 8
    assert ledger.history(conn, user, before=rows[0].cursor) == rows[1:]
    assert [ledger.access(conn, one).open for one in workshops] == [True, True, False]
    accounts.delete_workshop(conn, workshops[1])
    assert not ledger.access(conn, workshops[1]).open
    accounts.restore_workshop(conn, workshops[1])
    assert ledger.access(conn, workshops[1]).open
    accounts.complete_onboarding(conn, user)
    accounts.reset_onboarding(conn, user)
    accounts.set_plan_tier(conn, user, "pro")
    accounts.set_stripe_customer(conn, user, f"cus_{user}")
    with pytest.raises(errors.StripeCustomerConflict):
        accounts.set_stripe_customer(conn, user, "cus_other")
    accounts.set_stripe_customer(conn, user, f"cus_{user} 2", replace=True)
    assert accounts.delete_user(conn, user).deleted_at is not None
    with pytest.raises(errors.UserDeleted):
        ledger.consume(conn, user, key="late")
    assert accounts.restore_user(conn, user).plan_tier == "pro"


def every_strict_function(world: World, conn: psycopg.Connection) -> None:
    user = str(world.user(credits=5))
    row = conn.execute(
        "SELECT outcome, balance_after FROM tallystick.consume_strict(user_id => %s, key => 'c')", [user]
    )
    assert row.fetchone() == ("completed", 4)
    found = conn.execute(
        "SELECT p.proname, p.pronargs - p.pronargdefaults FROM pg_catalog.pg_proc AS p"
        " WHERE p.proname OPERATOR(pg_catalog.~~) '%\\_strict'"
        " AND NOT p.proretset AND p.pronamespace OPERATOR(pg_catalog.=) 'tallystick'::pg_catalog.regnamespace"
    )
    for name, required in found.fetchall():
        call = sql.SQL("SELECT FROM tallystick.{}({})").format(
            sql.Identifier(name), sql.SQL(", ").join([sql.SQL("NULL")] * required)
        )
        with pytest.raises(psycopg.Error) as refused:
            conn.execute(call)
        assert str(refused.value.sqlstate).startswith("TS1"), (name, refused.value)


def test_nothing_that_a_role_planted_is_used(planted: tuple[World, str]) -> None:
    """Called by that role, its temporary objects first on its path; and by the owner, ``public`` first on its."""
    world, name = planted
    as_role = sa.make_url(world.url).set(username=name)
    with psycopg.connect(
        as_role.render_as_string(hide_password=False).replace("+psycopg", ""), autocommit=True
    ) as conn:
        conn.execute(IN_THE_SESSION.encode())
        for trap in (
            "SELECT 'a'::pg_catalog.varchar = 'b'::pg_catalog.text",
            "SELECT char_length('a'::pg_catalog.varchar)",
        ):
            with pytest.raises(psycopg.errors.RaiseException, match="hostile code ran"):
                conn.execute(trap)
        every_operation(world, conn)
        every_strict_function(world, conn)
    on_the_owners = world.autocommit.execution_options(tallystick_events=True)
    for how in (world.autocommit, on_the_owners):  # by the driver's cursor, and as SQLAlchemy's listeners see it
        with how.connect() as conn:
            conn.exec_driver_sql("SET search_path = public, pg_catalog")
            every_operation(world, conn)


def test_nothing_that_a_role_planted_runs_as_who_migrates(planted: tuple[World, str]) -> None:
    """Nor in what the owner runs: status, the role's script, the audit, undo, and apply again."""
    world, name = planted
    user = world.user(credits=5)
    with world.engine.connect() as conn:
        assert world.ledger.consume(conn, user, key="a").balance_after == 4
        conn.commit()
        found = migrate.status(conn, world.config)
        assert [(drift.where, drift.found) for drift in found.drift] == [(name, "may CREATE in SCHEMA public")]
    pool = engine(world.url, poolclass=sa.NullPool)  # as the command's
    with pool.connect() as conn:
        assert audit(conn, world.config).clean
    with psycopg.connect(world.url.replace("+psycopg", ""), autocommit=True) as owner:
        with pytest.raises(psycopg.errors.RaiseException, match="may CREATE in SCHEMA public"):
            owner.execute(role.grant(HOST, name).encode())
        owner.rollback()
        owner.execute(role.revoke(HOST, name).encode())
    with pytest.raises(errors.MigrationError, match="depends on what undo removes"):  # operators on our types
        migrate.undo(world.url, world.config, discard_ledger=True)
    assert not migrate.apply(world.url, world.config).changed
