"""The host's engine, sync or async, behind one way to run the ledger's functions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from starlette.concurrency import run_in_threadpool

from tallystick.database import transaction, translated

T = TypeVar("T")


class Database:
    """Runs functions of a connection or of an engine, so that the event loop goes on meanwhile.

    A sync engine is used in a thread. An async one stays on the event loop: the function runs in a greenlet, and its
    queries are awaited. It is the host's own engine either way, with its ``connect_args``, creators and event hooks.
    """

    def __init__(self, engine: sa.Engine | AsyncEngine) -> None:
        self._engine = engine
        self._autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")

    async def run(self, work: Callable[[sa.Connection], T]) -> T:
        """The result of ``work`` for a connection of its own, on which each statement is a transaction.

        Every call of the ledger that writes is one statement, so this saves the round trips of BEGIN and COMMIT and
        holds no lock while Python thinks.

        Raises:
            DatabaseUnavailable: no connection could be had; and what ``work`` raises.
        """
        engine = self._autocommit
        if not isinstance(engine, AsyncEngine):
            return await run_in_threadpool(_run, engine, work)
        with translated(connecting=True):
            conn = await engine.connect()
        try:
            return await conn.run_sync(work)
        finally:
            await asyncio.shield(conn.close())  # a client that hangs up cancels us, not the connection's return

    async def run_on_engine(self, work: Callable[[sa.Engine], T]) -> T:
        """The result of ``work`` for the engine: it opens transactions of its own, around requests to Stripe."""
        engine = self._engine
        if not isinstance(engine, AsyncEngine):
            return await run_in_threadpool(work, engine)
        async with AsyncSession() as greenlet:  # opens no connection: run_sync is what is wanted of it
            return await greenlet.run_sync(lambda _: work(engine.sync_engine))


def _run(engine: sa.Engine, work: Callable[[sa.Connection], T]) -> T:
    with transaction(engine, isolation="AUTOCOMMIT") as conn:
        return work(conn)
