"""Hosts that bend rules: triggers, policies and stale writes that would make the ledger say what is not so."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from psycopg import sql

from tallystick import Config, Consume, HostMapping, UsersTable, WorkshopsTable, errors, migrate
from tallystick.audit import audit
from worlds import World

PATIENCE = "SET statement_timeout = '60s'"  # no call of these tests goes on for ever


def everything(world: World) -> list[Any]:
    """All rows, but for when one was touched last: a consumption may move a balance and take that back."""
    tables = (world.schema.users, world.schema.workshops, world.schema.credit_transactions)
    with world.engine.connect() as conn:
        return [
            sorted(map(tuple, conn.execute(sa.select(*(c for c in table.c if c.name != "updated_at")))), key=repr)
            for table in tables
            if table is not None
        ]


class Case:
    """A user with a purchase in each state, a workshop, and their like that are deleted."""

    def __init__(self, world: World) -> None:
        self.world, self.ledger, self.accounts = world, world.ledger, world.accounts
        self.user, self.gone = world.user(credits=9), world.user(credits=9)
        self.workshop, self.closed = world.workshop(self.user), world.workshop(self.user)
        with world.engine.begin() as conn:
            self.bought = self.ledger.history(conn, self.user)[0].id
            self.pending = self.ledger.start_purchase(conn, self.user, credits=5, description="x").id
            self.ledger.refund(conn, self.user, self.bought, credits=2, key="r")
            self.accounts.complete_onboarding(conn, self.gone)
            self.accounts.delete_user(conn, self.gone)
            self.accounts.delete_workshop(conn, self.closed)

    def moves(self) -> dict[str, Callable[[sa.Connection], Any]]:
        """The operations that move a balance."""
        led, user = self.ledger, self.user
        return {
            "consume": lambda c: led.consume(c, user, key="k"),
            "unlock": lambda c: led.consume(c, user, workshop=self.workshop, key="k"),
            "consume_many": lambda c: led.consume_many(c, [Consume(user, key="k"), Consume(user, key="l")]),
            "refund": lambda c: led.refund(c, user, self.bought, credits=1, key="k"),
            "reinstate": lambda c: led.reinstate(c, user, self.bought, credits=1, key="k"),
            "grant": lambda c: led.grant(c, user, credits=1, key="k", description="x"),
            "complete_purchase": lambda c: led.complete_purchase(c, user, purchase=self.pending),
        }

    def accounts_written(self) -> dict[str, Callable[[sa.Connection], Any]]:
        acc, user, gone = self.accounts, self.user, self.gone
        return {
            "complete_onboarding": lambda c: acc.complete_onboarding(c, user),
            "reset_onboarding": lambda c: acc.reset_onboarding(c, gone),
            "set_plan_tier": lambda c: acc.set_plan_tier(c, user, "pro"),
            "set_stripe_customer": lambda c: acc.set_stripe_customer(c, user, "cus_1"),
            "delete_user": lambda c: acc.delete_user(c, user),
            "restore_user": lambda c: acc.restore_user(c, gone),
        }

    def workshops_written(self) -> dict[str, Callable[[sa.Connection], Any]]:
        led, acc, user = self.ledger, self.accounts, self.user
        return {
            "unlock": lambda c: led.consume(c, user, workshop=self.workshop, key="k"),
            "unlock in a list": lambda c: led.consume_many(c, [Consume(user, workshop=self.workshop, key="k")]),
            "delete_workshop": lambda c: acc.delete_workshop(c, self.workshop),
            "restore_workshop": lambda c: acc.restore_workshop(c, self.closed),
        }

    def refuse(self, calls: dict[str, Callable[[sa.Connection], Any]], *kinds: type[Exception]) -> None:
        """Each is one of these errors, and wrote nothing."""
        before = everything(self.world)
        for name, call in calls.items():
            with self.world.engine.connect() as conn:
                conn.exec_driver_sql(PATIENCE)
                try:
                    results = call(conn)
                except errors.TallystickError as error:
                    results = [error]
                conn.commit()
            assert isinstance(results, list), (name, results)
            assert {type(each) for each in results} <= set(kinds), (name, results)
        assert everything(self.world) == before


def trigger(world: World, table: str, body: str) -> None:
    create = sql.SQL("CREATE FUNCTION bend() RETURNS trigger LANGUAGE plpgsql AS {}").format(f"BEGIN {body} END")
    with world.engine.begin() as conn:
        conn.exec_driver_sql(create.as_string().replace("%", "%%"))
        conn.execute(
            sa.text(
                f"CREATE TRIGGER bend BEFORE UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION bend()"  # a test's own
            )
        )


@pytest.mark.parametrize("body", ["RETURN NULL;", "RETURN OLD;", "NEW := OLD; RETURN NEW;"])
def test_a_trigger_that_swallows_or_undoes_what_is_written_to_users(world: World, body: str) -> None:
    case = Case(world)
    trigger(world, "users", body)
    case.refuse(case.moves() | case.accounts_written(), errors.HostInterfered)


@pytest.mark.parametrize(
    "body",
    [
        "NEW.credit_balance := OLD.credit_balance; RETURN NEW;",
        "NEW.credit_balance := 1000000; RETURN NEW;",
        "NEW.credit_sequence := OLD.credit_sequence; RETURN NEW;",
    ],
)
def test_a_trigger_that_changes_a_balance(world: World, body: str) -> None:
    case = Case(world)
    trigger(world, "users", body)
    case.refuse(case.moves(), errors.HostInterfered)


@pytest.mark.parametrize("body", ["RETURN NULL;", "RETURN OLD;"])
def test_a_trigger_that_swallows_or_undoes_what_is_written_to_workshops(world: World, body: str) -> None:
    case = Case(world)
    trigger(world, "workshops", body)
    case.refuse(case.workshops_written(), errors.HostInterfered)


@pytest.mark.parametrize("policy", ["FOR ALL USING (false)", "FOR SELECT USING (true)"])
def test_row_level_security_that_hides_the_users_row(world: World, policy: str) -> None:
    """From the owner, as whom the functions run: to be read, or only to be changed."""
    case, owner = Case(world), f"owner_{uuid.uuid4().hex}"
    with world.engine.begin() as conn:
        conn.exec_driver_sql(f"CREATE ROLE {owner}")
        conn.exec_driver_sql(f"GRANT ALL ON SCHEMA public, tallystick TO {owner}")
        for name in ("users", "workshops", "credit_transactions"):
            conn.exec_driver_sql(f"ALTER TABLE {name} OWNER TO {owner}")
        functions = sa.text(
            "SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'tallystick'::regnamespace"
        )
        for function in conn.scalars(functions).all():
            conn.exec_driver_sql(f"ALTER FUNCTION {function} OWNER TO {owner}")
        conn.exec_driver_sql("ALTER TABLE users ENABLE ROW LEVEL SECURITY")
        conn.exec_driver_sql("ALTER TABLE users FORCE ROW LEVEL SECURITY")
        conn.exec_driver_sql(f"CREATE POLICY hide ON users {policy}")
    try:
        case.refuse(case.moves(), errors.UnknownUser, errors.HostInterfered)
    finally:
        with world.engine.begin() as conn:
            conn.exec_driver_sql(f"REASSIGN OWNED BY {owner} TO CURRENT_USER")
            conn.exec_driver_sql(f"DROP OWNED BY {owner}")
            conn.exec_driver_sql(f"DROP ROLE {owner}")


def test_a_users_row_behind_its_ledger_is_one_outcome(world: World) -> None:
    """An ORM wrote back what it had read before."""
    case = Case(world)
    with world.engine.begin() as conn:
        conn.exec_driver_sql(f"UPDATE users SET credit_balance = 9, credit_sequence = 1 WHERE id = '{case.user}'")
    case.refuse(case.moves(), errors.LedgerInconsistent)


def test_the_hosts_own_advisory_locks_are_not_the_ledgers(world: World) -> None:
    user = world.user(credits=5)
    with world.engine.begin() as host, world.engine.begin() as conn:
        host.exec_driver_sql(f"SELECT pg_advisory_xact_lock(hashtextextended('{user}', 0))")
        conn.exec_driver_sql("SET LOCAL lock_timeout = '10s'")
        assert world.ledger.consume(conn, user, key="a").balance_after == 4
        many = world.ledger.consume_many(conn, [Consume(user, key="b"), Consume(user, key="c")])
        assert [row.balance_after for row in many] == [3, 2]


def test_two_spellings_of_one_key_are_charged_once(
    needs_icu: Callable[[], None], fresh_database: Callable[..., str]
) -> None:
    """Under a collation that is not deterministic, texts that differ are equal."""
    needs_icu()
    url = fresh_database()
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as conn:
        conn.exec_driver_sql(
            "CREATE COLLATION folded (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
        )
        conn.exec_driver_sql("CREATE TABLE users (id text COLLATE folded PRIMARY KEY, email text)")
        conn.exec_driver_sql(
            "CREATE TABLE workshops (id text COLLATE folded PRIMARY KEY, title text,"
            " user_id text COLLATE folded NOT NULL REFERENCES users)"
        )
        conn.exec_driver_sql("INSERT INTO users VALUES ('Ada', 'a@example.com')")
        conn.exec_driver_sql("INSERT INTO workshops VALUES ('Maths', 'Mathematics', 'Ada')")
    folded = ("public", "folded")
    host = HostMapping(
        users=UsersTable(key_type="text", key_collation=folded),
        workshops=WorkshopsTable(key_type="text", key_collation=folded, created_at=None),
    )
    migrate.apply(url, Config(database_url=url, host=host))
    world = World(url, host)
    with world.engine.begin() as conn:
        conn.exec_driver_sql(PATIENCE)
        world.ledger.grant(conn, "ADA", credits=9, key="g", description="x")
        items = [
            Consume("Ada", key="a"), Consume("ADA", key="a"), Consume("ada", key="b"),
            Consume("aDa", workshop="Maths", key="c"), Consume("Ada", workshop="MATHS", key="d"),
        ]  # fmt: skip
        results = world.ledger.consume_many(conn, items)
        assert [row.replayed for row in results] == [False, True, False, False, True]
        assert world.ledger.balance(conn, "adA") == 6
        assert world.ledger.consume(conn, "ADA", workshop="maths", key="e").replayed
    with world.engine.connect() as conn:
        assert audit(conn, world.config).findings == ()


AFTER_BALANCE = "AFTER UPDATE OF credit_balance ON users FOR EACH ROW WHEN ({})"
AFTER_ROW = "AFTER INSERT OR UPDATE ON credit_transactions FOR EACH ROW WHEN ({})"
GIVES = "PERFORM tallystick.grant({}, 3, 'bonus-' || clock_timestamp(), 'Bonus')"


def calling_trigger(world: World, when: str, body: str) -> None:
    """A trigger of the host's that calls the ledger, as for a bonus, or credits that are topped up."""
    with world.engine.begin() as conn:
        conn.exec_driver_sql(
            f"CREATE FUNCTION bonus() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body}; RETURN NULL; END $$"
        )
        conn.exec_driver_sql(f"CREATE TRIGGER bonus {when} EXECUTE FUNCTION bonus()")


def without_a_fault(world: World) -> None:
    with world.engine.connect() as conn:
        found = audit(conn, world.config)
        assert found.clean, found.findings


LATER = {
    "consume": lambda led, c, user, of: led.consume(c, user, key="k"),
    "grant": lambda led, c, user, of: led.grant(c, user, credits=1, key="k", description="x"),
    "hold": lambda led, c, user, of: led.hold(c, user, credits=1, key="k"),
    "refund": lambda led, c, user, of: led.refund(c, user, of, credits=1, key="k"),
    "complete_purchase": lambda led, c, user, of: led.complete_purchase(
        c, user, purchase=led.start_purchase(c, user, credits=1, description="x").id
    ),
}


@pytest.mark.parametrize("kind", LATER)
def test_a_trigger_that_gives_credits_when_others_expire(world: World, kind: str) -> None:
    ledger, user = world.ledger, world.user(credits=5)
    with world.engine.begin() as conn:
        of = ledger.history(conn, user)[0].id
        soon = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
        ledger.grant(conn, user, credits=4, key="g", description="x", expires_at=soon)
    calling_trigger(world, AFTER_BALANCE.format("NEW.credit_balance = 5"), GIVES.format("NEW.id"))
    world.pass_time(days=2)
    with world.engine.begin() as conn:
        LATER[kind](ledger, conn, user, of)
        given = sum(row.amount for row in ledger.history(conn, user) if row.status == "completed")
        assert ledger.balance(conn, user) == given
        assert sum(row.description == "Bonus" for row in ledger.history(conn, user)) == 1
    without_a_fault(world)


def test_a_trigger_that_gives_credits_when_credits_that_expire_are_given(world: World) -> None:
    ledger, user = world.ledger, world.user(credits=5)
    calling_trigger(world, AFTER_BALANCE.format("NEW.credit_balance = 9"), GIVES.format("NEW.id"))
    with world.engine.begin() as conn:
        soon = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
        ledger.grant(conn, user, credits=4, key="g", description="x", expires_at=soon)
        assert ledger.balance(conn, user) == 12
        assert [lot.remaining for lot in ledger.lots(conn, user)] == [4]
    without_a_fault(world)


HELD = {
    "hold": ("pending", lambda led, c, user, held: led.hold(c, user, credits=1, key="k")),
    "release": ("failed", lambda led, c, user, held: led.release(c, user, held)),
}


@pytest.mark.parametrize("body", [GIVES.format("NEW.user_id"), "PERFORM tallystick.hold(NEW.user_id, 1, 'bonus')"])
@pytest.mark.parametrize("kind", HELD)
def test_a_trigger_that_calls_the_ledger_in_the_middle_of_a_hold(world: World, kind: str, body: str) -> None:
    """The operation would undo what the trigger wrote."""
    ledger, user = world.ledger, world.user(credits=9)
    status, call = HELD[kind]
    with world.engine.begin() as conn:
        held = ledger.hold(conn, user, credits=2, key="h").id
    when = f"NEW.status = '{status}' AND NEW.idempotency_key <> 'bonus'"
    calling_trigger(world, AFTER_ROW.format(when), body)
    before = everything(world)
    with world.engine.connect() as conn, pytest.raises(errors.HostInterfered):
        call(ledger, conn, user, held)
    assert everything(world) == before


def test_a_trigger_that_calls_the_ledger_before_a_workshop_is_found_taken(world: World) -> None:
    """The balance cannot be put back under what the trigger wrote."""
    user = world.user(credits=9)
    workshop = world.workshop(user)
    gone = GIVES.format("NEW.id") + "; UPDATE workshops SET deleted_at = now()"
    calling_trigger(world, AFTER_BALANCE.format("NEW.credit_balance = 8"), gone)
    before = everything(world)
    with world.engine.connect() as conn, pytest.raises(errors.HostInterfered):
        world.ledger.consume(conn, user, workshop=workshop, key="k")
    assert everything(world) == before
