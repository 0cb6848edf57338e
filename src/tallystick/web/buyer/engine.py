"""The host's engine, sync or async, behind one way to run the ledger's functions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.concurrency import run_in_threadpool

from tallystick.database import translated

T = TypeVar("T")


class Database:
    """Runs what takes a connection, off the event loop.

    Each statement is its own transaction: every call of the ledger that writes is one statement, so this saves the
    round trips of BEGIN and COMMIT and holds no lock while Python thinks.
    """

    def __init__(self, engine: sa.Engine | AsyncEngine) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        # Selling opens its own short transactions around slow requests to Stripe, in threads: it takes a sync engine.
        # An async one gets a small companion, which connects when something is sold and not before.
        self.selling = sa.create_engine(engine.url, pool_size=2) if isinstance(engine, AsyncEngine) else engine

    async def run(self, work: Callable[[sa.Connection], T]) -> T:
        """What ``work`` returns for a connection of its own.

        Raises:
            DatabaseUnavailable: no connection could be had; what ``work`` raises.
        """
        if not isinstance(self._engine, AsyncEngine):
            return await run_in_threadpool(_run, self._engine, work)
        with translated(connecting=True):
            conn = await self._engine.connect()
        try:
            return await conn.run_sync(work)
        finally:
            await asyncio.shield(conn.close())  # a client that hangs up cancels us, not the connection's return


def _run(engine: sa.Engine, work: Callable[[sa.Connection], T]) -> T:
    with translated(connecting=True):
        conn = engine.connect()
    with conn:
        return work(conn)
