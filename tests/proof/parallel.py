"""Parallel jobs: threads or processes that start together, and the check of the ledger afterwards."""

from __future__ import annotations

import multiprocessing
import queue
import re
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import sqlalchemy as sa

from tallystick.audit import audit
from tallystick.errors import LedgerError
from tallystick.ledger.functions import declared
from worlds import World

PATIENCE_S = 120  # a loaded machine is slow; only a deadlock is slower

Job = Callable[..., Any]
"""``job(world, conn, number, *args)``, run by one thread or process; returns its results."""


def outcome(call: Callable[[], Any]) -> Any:
    """The result of a call, or its refusal; anything else is raised."""
    try:
        return call()
    except LedgerError as refusal:
        return refusal


def threads(world: World, count: int, job: Job, *args: Any, isolation: str = "AUTOCOMMIT") -> list[Any]:
    """``job`` in ``count`` threads with a connection each, which start at the same moment."""
    gate = threading.Barrier(count)
    engine = world.engine.execution_options(isolation_level=isolation)

    def member(number: int) -> Any:
        with engine.connect() as conn:
            gate.wait(PATIENCE_S)
            return job(world, conn, number, *args)

    with ThreadPoolExecutor(count) as pool:
        return [future.result(PATIENCE_S) for future in [pool.submit(member, number) for number in range(count)]]


_gate: Any = None


def _enter(gate: Any) -> None:
    global _gate  # noqa: PLW0603 - a barrier can be inherited by a process, not sent to it
    _gate = gate


def _member(url: str, host: Any, job: Job, number: int, args: tuple[Any, ...]) -> Any:
    world = World(url, host)
    with world.autocommit.connect() as conn:
        _gate.wait(PATIENCE_S)
        return job(world, conn, number, *args)


def processes(world: World, count: int, job: Job, *args: Any) -> list[Any]:
    """``job`` in ``count`` processes; it must be a module-level function."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _enter, (context.Barrier(count),)) as pool:
        sent = [pool.submit(_member, world.url, world.config.host, job, number, args) for number in range(count)]
        return [future.result(PATIENCE_S) for future in sent]


def waiting_for_a_lock(world: World, count: int, which: str = "true") -> None:
    """Return once ``count`` connections of this database wait for a lock; ``which`` is a condition on pg_locks."""
    waiting = sa.text(
        "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)"
        f" WHERE datname = current_database() AND NOT granted AND ({which})"
    )
    pause = queue.SimpleQueue[None]()
    with world.autocommit.connect() as conn:
        for _ in range(PATIENCE_S * 20):
            if conn.scalar(waiting) >= count:
                return
            try:
                pause.get(timeout=0.05)
            except queue.Empty:
                continue
    raise AssertionError(f"fewer than {count} connections came to wait")


def assert_ledger_consistent(world: World) -> None:
    """Check that every user's chain is unbroken and ends in the balance, and every marked workshop was paid for once.

    It counts row by row, and then runs the audit, which must find nothing.
    """
    users, row, workshops = world.schema.users.c, world.schema.credit_transactions.c, world.schema.workshops
    with world.engine.connect() as conn:
        accounts = {
            key: (balance, last)
            for key, balance, last in conn.execute(sa.select(users.key, users.credit_balance, users.credit_sequence))
        }
        chains: dict[Any, tuple[int, int]] = dict.fromkeys(accounts, (0, 0))
        left: dict[Any, int] = {}
        paid_for: set[Any] = set()
        for entry in conn.execute(
            sa.select(world.schema.credit_transactions)
            .where(row.status == "completed")
            .order_by(row.user_id, row.sequence)
        ):
            balance, last = chains[entry.user_id]
            balance += entry.amount
            assert (entry.balance_after, entry.sequence) == (balance, last + 1), entry
            chains[entry.user_id] = balance, last + 1
            match entry.type:
                case "purchase":
                    left[entry.id] = entry.amount
                case "refund":
                    left[entry.refund_of] += entry.amount
                    assert left[entry.refund_of] >= 0, entry
                case "grant" if entry.refund_of:
                    left[entry.refund_of] += entry.amount
                case "grant" | "transfer":
                    left[entry.id] = entry.amount
                case "correction" | "expiry":
                    left[entry.refund_of] += entry.amount
                    assert left[entry.refund_of] >= 0, entry
                case "reversal":
                    left[entry.refund_of] -= entry.amount
                    assert left[entry.refund_of] >= 0, entry
                    paid_for -= {entry.workshop_id}
                case "consumption":
                    assert balance >= 0 or entry.held, entry
                    assert entry.workshop_id not in paid_for, entry
                    paid_for |= {entry.workshop_id} - {None}
                    left[entry.id] = -entry.amount
        assert chains == accounts
        if workshops is not None:
            unlocked = sa.select(workshops.c.key).where(workshops.c.credit_consumed_at.is_not(None))
            assert set(conn.scalars(unlocked)) == paid_for
        assert audit(conn, world.config).findings == ()


def functions_called(engine: sa.Engine) -> set[str]:
    """A set that gets the name of each function of the ledger that is called through ``engine`` from now on."""
    seen: set[str] = set()

    @sa.event.listens_for(engine, "before_cursor_execute")
    def listen(_conn: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        seen.update(re.findall(r"FROM tallystick\.(\w+)\(", statement))

    return seen


def declared_functions() -> set[str]:
    """The functions of the ledger about one user, without those of the accounts.

    Events are a feed of all: tests/test_events.py has them.
    """
    of_accounts = {"account", "complete_onboarding", "reset_onboarding", "set_plan_tier", "set_stripe_customer"}
    of_accounts |= {"erase", "set_low_balance", "events"}
    of_accounts |= {f"{verb}_{what}" for verb in ("delete", "restore") for what in ("user", "workshop")}
    return {function.name for function in declared()} - of_accounts
