"""Some seconds of ``deadlocks.py``, and the kinds of deadlock that an app can still cause."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from deadlocks import AFTER_SPENDING, MIX, ready, run
from parallel import PATIENCE_S, assert_ledger_consistent, waiting_for_a_lock
from tallystick.database import translated
from tallystick.dev.postgres import Server
from tallystick.errors import Conflict
from worlds import World


def test_nothing_that_an_app_does_beside_the_ledger_deadlocks(server: Server, fresh_database: Callable[[], str]):
    report = run(server, ready(fresh_database()), MIX, seconds=5)
    assert (report.deadlocks, report.failed, report.findings) == (0, 0, ())
    assert min(report.done.values()) > 0
    assert set(report.rows) == {"purchase", "consumption", "refund", "grant"}


# --- what locks a user harder, after the same transaction has spent ---


class RetriedTransaction:
    """A host's transaction, run again as a whole when it was in the way of another, as ``retryable`` says."""

    def __init__(self, world: World, work: Callable[[sa.Connection], object]) -> None:
        self.world, self.work, self.conflicts = world, work, list[Conflict]()

    def __call__(self) -> None:
        while True:
            try:
                with translated(), self.world.engine.begin() as conn:
                    self.work(conn)
            except Conflict as conflict:
                assert conflict.retryable
                self.conflicts.append(conflict)
            else:
                return


def conflicts_between(world: World, *works: Callable[[sa.Connection], None]) -> set[str | None]:
    """The SQLSTATEs that made these transactions, which run at once, be repeated."""
    members = [RetriedTransaction(world, work) for work in works]
    with ThreadPoolExecutor(len(works)) as pool:
        for each in [pool.submit(member) for member in members]:
            each.result(PATIENCE_S)
    return {conflict.sqlstate for member in members for conflict in member.conflicts}


@pytest.mark.parametrize("lock", ["a unique column is changed", "FOR UPDATE"])
@pytest.mark.parametrize("first", ["spend", "lock"])
def test_a_user_is_locked_harder_before_it_spends_and_otherwise_at_the_price_of_a_retry(
    world: World, first: str, lock: str
):
    user, users, ledger = world.user(credits=10), world.schema.users, world.ledger
    workshop = world.key("uuid")
    referred, begun = threading.Event(), threading.Event()

    def spend(conn: sa.Connection) -> None:
        ledger.consume(conn, user, key="of the locked")

    def lock_harder(conn: sa.Connection) -> None:
        if lock == "FOR UPDATE":
            conn.execute(sa.select(users.c.key).where(users.c.key == user).with_for_update())
        conn.execute(sa.update(users).where(users.c.key == user).values(email="new@example.com"))

    def refer_then_spend(conn: sa.Connection) -> None:
        conn.execute(sa.insert(world.schema.workshops).values(key=workshop, owner=user, title="x"))
        referred.set()
        assert begun.wait(PATIENCE_S)
        ledger.consume(conn, user, key="of the new workshop", workshop=workshop)

    def spend_then_lock(conn: sa.Connection) -> None:
        assert referred.wait(PATIENCE_S)
        spend(conn)
        if not begun.is_set():
            begun.set()
            waiting_for_a_lock(world, 1)
        lock_harder(conn)

    def lock_then_spend(conn: sa.Connection) -> None:
        assert referred.wait(PATIENCE_S)
        with ThreadPoolExecutor(1) as watch:  # it lets the other go on once this one waits for it
            watch.submit(waiting_for_a_lock, world, 1).add_done_callback(lambda _: begun.set())
            lock_harder(conn)
        spend(conn)

    other = {"spend": spend_then_lock, "lock": lock_then_spend}[first]
    assert conflicts_between(world, refer_then_spend, other) == ({"40P01"} if first == "spend" else set())
    with world.engine.connect() as conn:
        assert ledger.balance(conn, user) == 8
        assert {row.idempotency_key for row in ledger.history(conn, user)} > {"of the locked", "of the new workshop"}
        assert conn.scalar(sa.select(users.c.email).where(users.c.key == user)) == "new@example.com"
    assert_ledger_consistent(world)


@pytest.mark.parametrize("first", ["user", "workshop"])
def test_a_workshop_is_locked_after_its_user_and_otherwise_at_the_price_of_a_retry(world: World, first: str):
    user, workshops, ledger = world.user(credits=10), world.schema.workshops, world.ledger
    workshop = world.workshop(user)
    locked = threading.Event()

    def lock_then_spend(conn: sa.Connection) -> None:
        if first == "user":
            ledger.lock(conn, user)
        conn.execute(sa.select(workshops.c.key).where(workshops.c.key == workshop).with_for_update())
        if not locked.is_set():
            locked.set()
            waiting_for_a_lock(world, 1)
        ledger.consume(conn, user, key="beside it")

    def unlock(conn: sa.Connection) -> None:
        assert locked.wait(PATIENCE_S)
        ledger.consume(conn, user, key="unlock", workshop=workshop)

    assert conflicts_between(world, lock_then_spend, unlock) == ({"40P01"} if first == "workshop" else set())
    with world.engine.connect() as conn:
        assert ledger.balance(conn, user) == 8
    assert_ledger_consistent(world)


def test_what_is_retried_after_such_deadlocks_is_done_once(server: Server, fresh_database: Callable[[], str]):
    world = ready(fresh_database())
    twice = "refer, then spend twice"
    report = run(server, world, {twice: MIX[twice], "change after": AFTER_SPENDING}, seconds=5, tries=0)
    assert report.rows["consumption"] == 2 * report.done[twice] + report.done["change after"] > 0
    assert report.findings == ()
