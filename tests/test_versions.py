"""Packages and databases of two versions: which work together, and which side is told to upgrade.

The newer version here is made of today's functions as a later revision would change them: ``consume`` takes one more
parameter at its end, and each answer has one more attribute.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from psycopg.sql import SQL, Composable

from tallystick import CreditTransaction, HostMapping, Ledger
from tallystick.audit import audit
from tallystick.errors import Conflict, InsufficientCredits, Key, NotMigrated, OutcomeUnknown, SchemaTooNew
from tallystick.ledger import Consume
from tallystick.ledger.connections import Call, Operation, Rows
from tallystick.migrate.revisions import HostNames
from tallystick.schema import HEAD, verify
from worlds import World

ADDED = "more text"


def newer(host: HostMapping) -> Iterator[Composable]:
    """The statements that a later revision would run, in one transaction."""
    yield SQL(f"ALTER TYPE tallystick.answer ADD ATTRIBUTE {ADDED} CASCADE")
    for statement in HostNames.of(host).functions(HEAD):
        text = statement.as_string()
        if not text.startswith("CREATE OR REPLACE FUNCTION"):
            continue  # the types, which are there
        if "FUNCTION tallystick.consume(" in text:
            # of another signature, so it would stand beside the one that is there, and a call would fit both
            yield SQL("DROP FUNCTION tallystick.consume(uuid, text, uuid, integer, text, jsonb)")
            text = text.replace(
                "metadata jsonb DEFAULT NULL\n)", f"metadata jsonb DEFAULT NULL, {ADDED} DEFAULT NULL\n)", 1
            )
            text, count = re.subn(
                r"account.held, NULL\s+INTO answer", "account.held, NULL, consume.more INTO answer", text
            )
            assert count
        if re.match(r"CREATE OR REPLACE FUNCTION tallystick.(history|lots)\(", text):
            text, count = re.subn(r"([tl]\.expires_at)(?=\n    +FROM)", r"\1, NULL::text", text)
            assert count
        if "FUNCTION tallystick.consume_many(" in text:
            text, count = re.subn(r"item, 0, NULL\)", "item, 0, NULL, NULL)", text)
            assert count
        yield SQL(text.replace("{", "{{").replace("}", "}}"))
    yield SQL("REVOKE ALL ON ALL FUNCTIONS IN SCHEMA tallystick FROM PUBLIC")
    yield SQL("UPDATE tallystick.alembic_version SET version_num = '9002'")
    yield SQL("INSERT INTO tallystick.migration_log (revision, direction, kind) VALUES ('9002', 'apply', 'expand')")


def upgrade(world: World) -> None:
    with psycopg.connect(world.url.replace("+psycopg", "")) as conn:
        for statement in newer(world.config.host):
            conn.execute(statement)


class NewerLedger(Ledger):
    """The client of the newer version."""

    @Operation
    def consume_with_more(self, user: Key, *, key: str, more: str) -> Call[str]:
        def read(rows: Rows) -> str:
            return f"{rows[0][0]} {rows[0][5]}"

        return Call("consume", {"user_id": self.keys.user_key(user), "key": key, "more": more}, read)


@pytest.fixture(params=["psycopg", "SQLAlchemy"])
def connect(request: pytest.FixtureRequest, world: World) -> Callable[[], Any]:
    """A connection of a kind, in autocommit: its driver prepares what it sends five times."""
    if request.param == "psycopg":
        return lambda: psycopg.connect(world.url.replace("+psycopg", ""), autocommit=True)
    return world.autocommit.connect


def test_an_old_client_works_with_newer_functions(world: World, connect: Callable[[], Any]) -> None:
    """On a connection that was open before, with its statements prepared, and on a new one."""
    user = world.user(credits=20)
    with connect() as before:
        for number in range(7):
            world.ledger.consume(before, user, key=f"{number}")
            world.ledger.history(before, user)
            world.ledger.consume_many(before, [Consume(user, key=f"{number} of many")])
        upgrade(world)
        with connect() as after:
            for conn in (before, after, before):
                for number in range(7):
                    assert world.ledger.consume(conn, user, key=f"{number}").replayed
                assert len(world.ledger.history(conn, user)) == 15
                [refused] = world.ledger.consume_many(conn, [Consume(user, credits=9, key="too many")])
                assert isinstance(refused, InsufficientCredits)
        with world.engine.connect() as conn:
            verify(conn, world.config.host)  # it may start anew, as in a rolling deployment
            assert Ledger(world.engine).config.host == world.config.host


def test_a_newer_client_is_refused_by_older_functions(world: World, connect: Callable[[], Any]) -> None:
    """With the command to run, and nothing is written: it lacks a parameter, a function, or a part of the answer."""
    user = world.user(credits=5)
    ledger = NewerLedger(world.config)
    with connect() as conn:
        with pytest.raises(NotMigrated, match=r"older than this package\. Run: tallystick migrate apply"):
            ledger.consume_with_more(conn, user, key="a", more="text")
        with world.autocommit.connect() as owner:
            owner.exec_driver_sql("DROP FUNCTION tallystick.reinstate(uuid, uuid, text, integer, text, jsonb)")
            owner.exec_driver_sql("ALTER TYPE tallystick.account_answer DROP ATTRIBUTE detail CASCADE")
        with pytest.raises(NotMigrated, match=r"older than this package\. Run: tallystick migrate apply"):
            ledger.reinstate(conn, user, ledger.history(conn, user)[0].id, key="r")
        with pytest.raises(NotMigrated, match="Run: tallystick migrate apply"):
            world.accounts.get(conn, user)
        assert ledger.balance(conn, user) == 5
        upgraded = ledger.consume(conn, user, key="b")  # what it has in common still works
        assert upgraded.balance_after == 4


def test_a_rolling_deployment_of_two_versions(world: World) -> None:
    """The database first, under traffic of the old version; then clients of both; each key is spent once."""
    users = [world.user(credits=10_000) for _ in range(3)]
    migrated, done = threading.Event(), threading.Event()
    reported: list[str] = []

    def old(number: int) -> int:
        spent = 0
        with psycopg.connect(world.url.replace("+psycopg", ""), autocommit=True) as conn:
            while not done.is_set() or spent < 20:
                spent += 1
                again(lambda: world.ledger.consume(conn, users[number], key=f"old {spent}"))  # noqa: B023
        return spent

    def new(number: int) -> int:
        assert migrated.wait(60)
        with world.autocommit.connect() as conn:
            for count in range(100):
                call = NewerLedger(world.config).consume_with_more
                answer = again(lambda: call(conn, users[number], key=f"new {count}", more="x"))  # noqa: B023
                assert answer in ("completed -1", "replayed -1")
        return 100

    def again(call: Callable[[], CreditTransaction | str]) -> CreditTransaction | str:
        while True:
            try:
                return call()
            except (OutcomeUnknown, Conflict) as error:  # whose cure is the same call with the same key
                reported.append(str(error))

    with ThreadPoolExecutor(6) as pool:
        olds, news = [pool.submit(old, n) for n in range(3)], [pool.submit(new, n) for n in range(3)]
        try:
            with psycopg.connect(world.url.replace("+psycopg", ""), autocommit=True) as conn:
                refused = NewerLedger(world.config)
                with pytest.raises(NotMigrated, match="tallystick migrate apply"):
                    refused.consume_with_more(conn, users[0], key="too early", more="x")
            upgrade(world)
            migrated.set()
            spent = [one.result(120) for one in news]
        finally:
            migrated.set()
            done.set()
        spent = [spent[n] + olds[n].result(120) for n in range(3)]
    with world.engine.connect() as conn:
        assert [world.ledger.balance(conn, user) for user in users] == [10_000 - each for each in spent]
        assert audit(conn, world.config).clean
    assert len(reported) <= 6, reported  # at most what was on its way when the functions changed


def test_a_contraction_tells_the_old_package_to_upgrade(world: World) -> None:
    with world.engine.begin() as conn:
        for revision, kind in (("9002", "expand"), ("9003", "contract")):
            conn.exec_driver_sql(f"UPDATE tallystick.alembic_version SET version_num = '{revision}'")
            conn.exec_driver_sql(
                "INSERT INTO tallystick.migration_log (revision, direction, kind)"
                f" VALUES ('{revision}', 'apply', '{kind}')"
            )
            if kind == "expand":
                verify(conn, world.config.host)
        with pytest.raises(SchemaTooNew, match="pip install -U tallystick"):
            verify(conn, world.config.host)


def test_a_mapping_of_a_later_version(world: World) -> None:
    """A setting that this package does not know is left to the functions; a value is not guessed at."""
    with world.engine.connect() as conn:
        conn.execute(sa.text('UPDATE tallystick.mapping SET host = host || \'{"tenants": "public.tenants"}\''))
        assert Ledger(conn).config.host == world.config.host
        conn.execute(sa.text("UPDATE tallystick.mapping SET host = jsonb_set(host, '{users,key_type}', '\"ulid\"')"))
        with pytest.raises(SchemaTooNew, match="pip install -U tallystick"):
            Ledger(conn)


def test_an_answer_that_the_package_does_not_know(world: World) -> None:
    user = world.user()
    with world.engine.begin() as conn:
        body = conn.scalar(sa.text("SELECT pg_get_functiondef('tallystick.balance(uuid)'::regprocedure)"))
        conn.exec_driver_sql(body.replace("'completed'", "'asleep'"))
        with pytest.raises(SchemaTooNew, match="answers 'asleep'"):
            world.ledger.balance(conn, user)
