"""The host's engine, sync or async, with one interface to run the ledger's functions."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import sqlalchemy as sa
from anyio import CancelScope
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util.concurrency import greenlet_spawn

from tallystick.database import refuse_other_than
from tallystick.ledger.connections import SyncConnection, autocommitting

THREADS_MAX = 40
"""The most requests that use a sync engine at once, as many as Starlette lets use threads; and as many to Stripe."""

T = TypeVar("T")


class Database:
    """A runner of functions of a connection or an engine that does not block the event loop.

    A sync engine is used in a thread of an executor, which takes less CPU than Starlette's threads. An async one stays
    on the event loop: the function runs in a greenlet, and its queries are awaited. Either way it is the host's own
    engine and pool, as ``autocommitting`` uses them.
    """

    def __init__(self, engine: sa.Engine | AsyncEngine) -> None:
        refuse_other_than(engine, (sa.Engine, AsyncEngine), "the pages take SQLAlchemy's Engine or AsyncEngine")
        self._engine = engine
        # started as they are needed; two pools, so that none waits for its balance while Stripe is slow
        self._threads, self._stripe_threads = (
            ThreadPoolExecutor(THREADS_MAX, thread_name_prefix=name) for name in ("tallystick", "tallystick-stripe")
        )

    async def run(self, work: Callable[[SyncConnection], T]) -> T:
        """The result of ``work``, which gets a connection on which each statement is a transaction.

        Every writing call of the ledger is one statement, so this saves the round trips of BEGIN and COMMIT, and no
        lock is held while Python runs.

        Raises:
            DatabaseUnavailable: no connection could be made; and what ``work`` raises.
        """
        return await self._run_in(self._threads, partial(_run, work))

    async def run_on_engine(self, work: Callable[[sa.Engine], T]) -> T:
        """The result of ``work``, which gets the engine and opens transactions of its own around requests to Stripe."""
        return await self._run_in(self._stripe_threads, work)

    async def _run_in(self, threads: ThreadPoolExecutor, work: Callable[[sa.Engine], T]) -> T:
        engine = self._engine
        if isinstance(engine, AsyncEngine):
            return await greenlet_spawn(work, engine.sync_engine)
        in_context = partial(contextvars.copy_context().run, work, engine)
        # a thread cannot be cancelled; after it, its connection is back in the pool
        with CancelScope(shield=True):
            found = await asyncio.get_running_loop().run_in_executor(threads, in_context)
        return found  # noqa: RET504 - in the block, mypy would miss a return


def _run(work: Callable[[SyncConnection], T], engine: sa.Engine) -> T:
    with autocommitting(engine) as conn:
        return work(conn)
