"""Concurrent consumptions as one statement, without the callers knowing of each other.

A balance change costs one commit; a busy server's limit is commits, not rows. A ``Combiner`` takes ``consume`` calls
from any number of threads or asyncio tasks. While one statement is in flight the next calls gather, and go out
together as ``Ledger.consume_many`` when it returns: alone a call waits for nobody, in a crowd all share a commit.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple, Self

import sqlalchemy as sa

from tallystick.database import translated
from tallystick.errors import DatabaseError, DatabaseUnavailable, Key, OutcomeUnknown, TallystickError
from tallystick.ledger import Consume, CreditTransaction, Ledger

MOST = 1_000  # calls in one statement; more gain nothing and make everybody wait for the last


Outcome = CreditTransaction | Exception


class _Call(NamedTuple):
    item: Consume
    future: Future[CreditTransaction] | asyncio.Future[CreditTransaction]

    def wanted(self) -> bool:
        """Nobody gave up waiting before it was sent."""
        if isinstance(self.future, Future):
            return self.future.set_running_or_notify_cancel()
        return not self.future.cancelled()


class Combiner:
    """One connection and one thread that spend for everybody.

    ::

        with Combiner(ledger, engine) as combiner:
            row = combiner.consume(user, workshop=workshop, key=key).result()    # in any thread
            row = await combiner.aconsume(user, workshop=workshop, key=key)      # in asyncio

    Each call is committed by itself: do not use it for a consumption that belongs into a transaction of yours. Make
    one per process, after any fork.

    Args:
        engine: where the connection comes from; one is kept as long as the combiner is open.
        most: how many calls one statement may hold.
    """

    def __init__(self, ledger: Ledger, engine: sa.Engine, *, most: int = MOST) -> None:
        self._ledger = ledger
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._most = most
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._conn: sa.Connection | None = None
        self._thread = threading.Thread(target=self._work, name="tallystick-combiner", daemon=True)
        self._thread.start()

    def consume(
        self,
        user: Key,
        *,
        workshop: Key | None = None,
        amount: int = 1,
        key: str,
        description: str | None = None,
    ) -> Future[CreditTransaction]:
        """As ``Ledger.consume``; its row or its error arrives in the future, and nobody else's does.

        Besides the errors of ``Ledger.consume``: OutcomeUnknown and DatabaseUnavailable reach all whose statement was
        under way; the same call with the same key may be made again. Cancelling the future works until it is sent.

        Raises:
            RuntimeError: the combiner is closed.
        """
        future: Future[CreditTransaction] = Future()
        item = Consume(user, workshop=workshop, amount=amount, key=key, description=description)
        self._ask(_Call(item, future))
        return future

    async def aconsume(
        self,
        user: Key,
        *,
        workshop: Key | None = None,
        amount: int = 1,
        key: str,
        description: str | None = None,
    ) -> CreditTransaction:
        """As ``consume``, for asyncio: a statement's results wake their event loop once, not once for each caller."""
        future: asyncio.Future[CreditTransaction] = asyncio.get_running_loop().create_future()
        item = Consume(user, workshop=workshop, amount=amount, key=key, description=description)
        self._ask(_Call(item, future))
        return await future

    def _ask(self, call: _Call) -> None:
        with self._closing:
            if self._closed:
                raise RuntimeError("this Combiner is closed; make another one")
            self._calls.put(call)

    def close(self) -> None:
        """Finish what was asked for, then give the connection back. Again is harmless."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._calls.put(None)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # --- the thread ---

    def _work(self) -> None:
        more = True
        while more:
            calls, more = self._gathered()
            going = [call for call in calls if call.wanted()]
            if going:
                _tell(zip(going, self._outcomes(going), strict=True))
        self._disconnect()

    def _gathered(self) -> tuple[list[_Call], bool]:
        """What is asked for now, at least one call; and whether there may be more."""
        calls: list[_Call] = []
        with suppress(queue.Empty):
            while len(calls) < self._most:
                call = self._calls.get(block=not calls)
                if call is None:
                    return calls, False
                calls.append(call)
        return calls, True

    def _outcomes(self, calls: Sequence[_Call]) -> Sequence[Outcome]:
        try:
            return self._ledger.consume_many(self._connected(), [call.item for call in calls])
        except (OutcomeUnknown, DatabaseUnavailable) as error:
            self._disconnect()
            return [_another(error) for _ in calls]
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to one caller, and every caller waits
            if len(calls) == 1 and not isinstance(error, DatabaseError):
                return [error]
            # Somebody's call made the statement fail: each by itself, so that it fails alone.
            return [self._outcome(call.item) for call in calls]

    def _outcome(self, item: Consume) -> Outcome:
        try:
            return self._ledger.consume(
                self._connected(),
                item.user,
                workshop=item.workshop,
                amount=item.amount,
                key=item.key,
                description=item.description,
            )
        except Exception as error:  # noqa: BLE001 - it is the caller's to handle, in the caller's thread
            if isinstance(error, OutcomeUnknown | DatabaseUnavailable):
                self._disconnect()
            return error

    def _connected(self) -> sa.Connection:
        if self._conn is None:
            with translated(connecting=True):
                self._conn = self._engine.connect()
        return self._conn

    def _disconnect(self) -> None:
        if self._conn is not None:
            conn, self._conn = self._conn, None
            with suppress(sa.exc.DBAPIError):
                conn.close()


def _another(error: TallystickError) -> TallystickError:
    """The same for another caller: a raised exception keeps the traceback of whoever raised it."""
    return type(error)(error.message, **error.fields)


def _tell(results: Iterable[tuple[_Call, Outcome]]) -> None:
    """Each caller its own outcome; an event loop is woken once for all that wait in it."""
    waiting: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[CreditTransaction], Outcome]]] = defaultdict(
        list
    )
    for call, outcome in results:
        if isinstance(call.future, Future):
            _settle(call.future, outcome)
        else:
            waiting[call.future.get_loop()].append((call.future, outcome))
    for loop, some in waiting.items():
        with suppress(RuntimeError):  # the loop was closed, and nobody waits
            loop.call_soon_threadsafe(_settle_waiting, some)


def _settle_waiting(some: Sequence[tuple[asyncio.Future[CreditTransaction], Outcome]]) -> None:
    for future, outcome in some:
        if not future.done():  # cancelled meanwhile
            _settle(future, outcome)


def _settle(future: Future[CreditTransaction] | asyncio.Future[CreditTransaction], outcome: Outcome) -> None:
    if isinstance(outcome, CreditTransaction):
        future.set_result(outcome)
    else:
        future.set_exception(outcome)
