"""``tallystick.testing``: databases for the tests of an app, on any server; its users, its clock, its audit."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from uuid import uuid4

import psycopg
import psycopg.rows
import pytest
import sqlalchemy as sa

from caller_connections import asyncpg_bare, bare, psycopg2_bare, psycopg3, session, sqlalchemy
from tallystick import Config
from tallystick.audit import audit
from tallystick.dev.postgres import Server
from tallystick.errors import (
    DatabaseUnavailable,
    InsufficientCredits,
    InvalidArgument,
    Key,
    PermissionDenied,
    SeedImpossible,
)
from tallystick.testing import Databases, TestDatabase, assert_balanced
from worlds import SHAPES, World


def names(server: Server) -> set[str]:
    with psycopg.connect(server.url(driver="")) as conn:
        found = conn.execute("SELECT datname FROM pg_database WHERE starts_with(datname, 'tallystick_test_')")
        return {name for (name,) in found}


@contextmanager
def databases_of(server: Server, shape: str = "uuid", **more: Any) -> Iterator[Databases]:
    config = Config(host=SHAPES[shape].host)
    with Databases.on(server.url(), config, **{"schema": SHAPES[shape].ddl} | more) as made:
        yield made


@pytest.fixture(scope="module")
def databases(server: Server) -> Iterator[Databases]:
    with databases_of(server) as made:
        yield made


@pytest.fixture
def db(databases: Databases) -> Iterator[TestDatabase]:
    with databases.open() as made:
        yield made


def test_a_database_for_each_test_and_none_is_left(server: Server):
    before = names(server)
    with databases_of(server) as databases:
        with databases.open() as one, databases.open() as other:
            user = one.funded(credits=2)
            assert one.balance(user) == 2
            assert other.conn.scalar(sa.text("SELECT count(*) FROM users")) == 0
            assert len(names(server) - before) == 3  # and the template
        assert len(names(server) - before) == 1
    assert names(server) == before


@pytest.mark.parametrize("shape", SHAPES)
def test_users_of_every_shape_come_to_their_state(server: Server, shape: str):
    with databases_of(server, shape) as databases, databases.open() as db:
        funded, indebted, mine = db.funded(credits=5), db.indebted(credits=3), db.user()
        assert [db.balance(user) for user in (funded, indebted, mine)] == [5, -3, 0]
        assert db.indebted(2, user=db.funded(credits=7, user=mine)) == mine
        assert db.balance(mine) == -2
        db.funded(credits=3, user=mine)
        if SHAPES[shape].host.workshops is not None:
            workshop = db.workshop(mine)
            db.ledger.consume(db.conn, mine, workshop=workshop, key="unlock")
            assert db.ledger.access(db.conn, workshop).open
        db.assert_balanced()


def rows_of(db: TestDatabase, user: Key) -> int:
    return len(db.ledger.history(db.conn, user, limit=1000, include_failed=True))


def test_a_debt_is_as_large_as_it_says_whatever_the_user_had(db: TestDatabase):
    user = db.user()
    for credits in (1, 3, 3, 5):
        assert db.indebted(credits, user=user) == user
        assert db.balance(user) == -credits
    before = rows_of(db, user)
    with pytest.raises(InvalidArgument, match=f"credits=4: user {user} is 5 below zero already. Pass 5 or more"):
        db.indebted(4, user=user)
    with pytest.raises(InvalidArgument, match="credits=0"):
        db.indebted(0, user=user)
    assert (db.balance(user), rows_of(db, user)) == (-5, before)
    holds = db.expiring(3, user=db.holding(credits=4, held=2))
    assert db.indebted(6, user=holds) == holds
    now = db.ledger.standing(db.conn, holds)
    assert (now.balance, now.held) == (-6, 2)
    db.assert_balanced()


def test_a_hold_that_is_not_covered_is_refused_before_anything_is_written(db: TestDatabase):
    user = db.indebted(3)
    before = rows_of(db, user)
    with pytest.raises(InvalidArgument, match=f"held=2: user {user} would have -1 to set aside"):
        db.holding(credits=2, user=user)
    with pytest.raises(InvalidArgument, match="credits=0"):
        db.holding(credits=2, held=0, user=user)
    with pytest.raises(InvalidArgument, match="credits='2'"):
        db.holding(credits="2", held=2, user=user)  # type: ignore[arg-type]
    assert rows_of(db, user) == before
    with pytest.raises(InvalidArgument, match=r"held=3: user .* would have 2 to set aside"):
        db.holding(credits=2, held=3)
    db.holding(credits=5, held=2, user=user)
    assert db.ledger.standing(db.conn, user).available == 0
    db.assert_balanced()


def test_a_user_who_cannot_be_made_up_is_the_apps_own(server: Server):
    schema = SHAPES["uuid"].ddl.replace("email text NOT NULL UNIQUE", "email text, place point NOT NULL")
    with databases_of(server, schema=schema) as databases, databases.open() as db:
        with pytest.raises(SeedImpossible, match=r"public\.users\.place is NOT NULL without a default"):
            db.funded(credits=2)
        insert = "INSERT INTO users (id, place) VALUES (gen_random_uuid(), '(1, 2)') RETURNING id"
        mine = db.conn.execute(sa.text(insert)).scalar_one()
        assert db.balance(db.funded(credits=2, user=mine)) == 2


def test_a_balance_that_the_ledger_does_not_have_is_told_with_its_cause(db: TestDatabase):
    user = db.funded(credits=5)
    db.conn.execute(sa.text("UPDATE users SET credit_balance = 6"))
    with pytest.raises(AssertionError, match=f"faults that the audit finds: 1\n\n.*{user}"):
        db.assert_balanced()
    with pytest.raises(AssertionError, match="likely cause"):
        assert_balanced(db.conn)


def test_the_schema_may_be_pg_dumps_or_a_function_that_forgets_its_connection(
    server: Server, fresh_database: Callable[..., str]
):
    url = fresh_database()
    with psycopg.connect(bare(url)) as conn:
        conn.execute(SHAPES["quoted"].ddl)
    dumped = subprocess.run(
        server.command("pg_dump", "--schema-only", bare(url)),
        env=server.env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    with databases_of(server, "quoted", schema=dumped) as databases, databases.open() as db:
        assert db.balance(db.funded(credits=2)) == 2

    opened = []

    def schema(address: str) -> None:
        opened.append(psycopg.connect(address, autocommit=True))
        opened[0].execute(SHAPES["uuid"].ddl)

    with databases_of(server, schema=schema) as databases, databases.open() as db:
        assert db.balance(db.funded(credits=2)) == 2
    opened[0].close()


# --- the clock ---


def test_the_clock_of_the_database_goes_on_for_every_connection(db: TestDatabase):
    began = dt.datetime.now(dt.UTC)
    db.clock.advance(days=30, hours=1)
    db.clock.advance(minutes=1)
    user = db.funded(credits=1)
    (bought,) = db.ledger.history(db.conn, user)
    with psycopg.connect(db.url) as conn:
        conn.execute("SET timezone = 'America/New_York'")  # where a day may have 23 hours
        (now,) = conn.execute("SELECT now()").fetchone()
        (default,) = conn.execute("SELECT created_at FROM users").fetchone()
    ahead = dt.timedelta(days=30, hours=1, minutes=1)
    for moment in (bought.created_at, bought.completed_at, now, default, db.clock.now()):
        assert abs(moment - began - ahead) < dt.timedelta(minutes=1)
    db.assert_balanced()


def test_a_purchase_goes_stale_as_the_clock_goes_on(db: TestDatabase):
    def findings() -> list[str]:
        return [finding.check for finding in audit(db.conn, db.config).findings]

    db.ledger.start_purchase(db.conn, db.user(), credits=1, description="Purchased 1")
    assert findings() == []
    db.clock.advance(days=2)
    assert findings() == ["settled_within_a_day"]


def test_a_hold_ends_as_the_clock_goes_on(db: TestDatabase):
    user = db.holding(credits=5, held=2)
    hold = db.ledger.history(db.conn, user)[0]
    standing = db.ledger.standing(db.conn, user)
    assert (standing.balance, standing.held, hold.status) == (5, 2, "pending")
    with pytest.raises(InsufficientCredits):
        db.ledger.consume(db.conn, user, credits=4, key="all but one")
    db.clock.advance(minutes=16)
    assert db.ledger.standing(db.conn, user).held == 0
    db.ledger.consume(db.conn, user, credits=4, key="all but one")
    db.assert_balanced()
    with pytest.raises(InsufficientCredits):
        db.ledger.consume(db.conn, db.holding(credits=3), key="none is left")
    long = db.holding(credits=3, expires_in=dt.timedelta(days=2))
    db.clock.advance(days=1)
    assert db.ledger.standing(db.conn, long).held == 3
    db.assert_balanced()


def test_credits_expire_as_the_clock_goes_on(db: TestDatabase):
    user = db.funded(credits=2, user=db.expiring(credits=5))
    touched = db.expiring(credits=1, expires_in=dt.timedelta(days=40))
    assert [db.balance(each) for each in (user, touched)] == [7, 1]
    db.clock.advance(days=29)
    assert db.balance(user) == 7
    db.clock.advance(days=2)
    assert [db.balance(each) for each in (user, touched)] == [2, 1]
    db.assert_balanced()
    assert db.ledger.sweep(db.conn) == 1
    assert [row.type for row in db.ledger.history(db.conn, user)] == ["expiry", "purchase", "grant"]
    db.assert_balanced()


def test_a_clock_goes_forward_only_and_where_it_can(db: TestDatabase, world: World):
    with pytest.raises(InvalidArgument, match="forward"):
        db.clock.advance(days=-1)
    with world.engine.connect() as conn, pytest.raises(PermissionDenied, match="superuser"):
        TestDatabase(conn, world.config).clock.advance(days=1)


# --- connections ---

BORROWED = {
    "psycopg": psycopg3,
    "psycopg, dict_row": partial(psycopg3, row_factory=psycopg.rows.dict_row),
    "psycopg, ClientCursor": partial(psycopg3, cursor_factory=psycopg.ClientCursor),
    "psycopg2": psycopg2_bare,
    "Session": session,
    "SQLAlchemy Connection, psycopg2": partial(sqlalchemy, driver="psycopg2"),
}


@pytest.mark.parametrize("kind", BORROWED)
def test_what_is_done_is_part_of_the_callers_transaction(db: TestDatabase, kind: str):
    with BORROWED[kind](db.url) as caller:
        mine = TestDatabase(caller.conn, db.config)
        user = mine.indebted(2, user=mine.funded(credits=3))
        mine.workshop(user)
        mine.clock.advance(days=3)
        mine.assert_balanced()
        assert mine.balance(user) == -2
        assert mine.clock.now() - db.clock.now() > dt.timedelta(days=2)
        assert db.conn.scalar(sa.text("SELECT count(*) FROM users")) == 0
        caller.rollback()
    assert db.conn.scalar(sa.text("SELECT count(*) FROM users")) == 0
    assert abs(db.clock.now() - dt.datetime.now(dt.UTC)) < dt.timedelta(minutes=1)


def test_a_connection_that_is_none_of_these_is_refused(db: TestDatabase):
    with asyncpg_bare(db.url) as caller, pytest.raises(InvalidArgument, match=r"asyncpg.*synchronous"):
        TestDatabase(caller.conn, db.config).user()


# --- servers ---


@pytest.fixture
def as_role(server: Server) -> Iterator[Callable[[str], str]]:
    """The address of the server for a new role with these options."""
    role = f"role_{uuid4().hex[:8]}"

    def make(options: str) -> str:
        with psycopg.connect(server.url(driver=""), autocommit=True) as conn:
            conn.execute(f"CREATE ROLE {role} LOGIN {options}")
        return server.url().replace("postgres@", f"{role}@")

    yield make
    with psycopg.connect(server.url(driver=""), autocommit=True) as conn:
        conn.execute(f"DROP ROLE {role}")


def test_without_a_superuser_there_is_all_but_the_clock(as_role: Callable[[str], str]):
    config = Config(host=SHAPES["uuid"].host)
    with Databases.on(as_role("CREATEDB"), config, schema=SHAPES["uuid"].ddl) as databases, databases.open() as db:
        assert db.balance(db.funded(credits=2)) == 2
        db.assert_balanced()
        with pytest.raises(PermissionDenied, match="superuser"):
            db.clock.advance(days=1)


def test_a_role_that_may_make_no_databases_is_told_so(as_role: Callable[[str], str]):
    with (
        Databases.on(as_role(""), Config(host=SHAPES["uuid"].host), schema="") as databases,
        pytest.raises(PermissionDenied, match=r"ALTER ROLE .* CREATEDB"),
    ):
        databases.create()


def test_a_server_that_is_not_there(server: Server):
    with pytest.raises(DatabaseUnavailable), Databases.on(server.url("not there"), Config(), schema=""):
        pass


KILLED = """
import os, sys
from tallystick import Config
from tallystick.testing import Databases

with Databases.on(sys.argv[1], Config(), schema=sys.argv[2]) as databases:
    print(databases.create(), flush=True)
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_run_left_is_dropped_and_what_another_run_uses_is_not(server: Server):
    with databases_of(server) as living:
        kept = sa.make_url(living.create()).database
        command = [sys.executable, "-c", KILLED, server.url(), SHAPES["uuid"].ddl]
        killed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        assert killed.returncode == -9
        left = sa.make_url(killed.stdout.strip()).database
        assert {left, kept} <= names(server)
        for _ in range(100):  # the server notices in its own time that the connection is gone
            with databases_of(server):
                pass
            if left not in names(server):
                break
            time.sleep(0.1)
        assert left not in names(server)
        assert kept in names(server)
