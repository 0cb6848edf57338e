"""Concurrent consumptions as one statement, without the callers knowing of each other.

A balance change costs one commit; a busy server's limit is commits, not rows. A ``Combiner`` takes ``consume`` calls
from any number of threads or asyncio tasks. While one statement is in flight the next calls gather, and go out
together as ``Ledger.consume_many`` when it returns: alone a call waits for nobody, in a crowd all share a commit.
"""

from __future__ import annotations

import asyncio
import logging
import os
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
from tallystick.errors import Conflict, DatabaseError, DatabaseUnavailable, Key, OutcomeUnknown, TallystickError
from tallystick.ledger import Consume, CreditTransaction, Ledger

MOST = 1_000  # calls in one statement; more gain nothing and make everybody wait for the last


TIMED_OUT = ("55P03", "57014")
"""What the server says at a lock timeout or a statement timeout."""

Outcome = CreditTransaction | Exception

_log = logging.getLogger(__name__)


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
    one per process, after any fork. Callbacks of the futures run in its thread, so keep them short.

    A user who is held by a transaction of the host's makes all wait that share a statement with that user. Where
    transactions hold users for long, give the engine a ``lock_timeout``: then the calls for that user get a Conflict,
    after that time, and the others their rows.

    Args:
        engine: where the connection comes from; one is kept as long as the combiner is open, and replaced when it is
            cut.
        most: how many calls one statement may hold.
    """

    def __init__(self, ledger: Ledger, engine: sa.Engine, *, most: int = MOST) -> None:
        self._ledger = ledger
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._most = most
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._process = os.getpid()
        self._conn: sa.Connection | None = None
        self._thread = threading.Thread(target=self._work, name="tallystick-combiner", daemon=True)
        self._thread.start()

    def consume(
        self,
        user: Key,
        *,
        workshop: Key | None = None,
        credits: int = 1,
        key: str,
        description: str | None = None,
    ) -> Future[CreditTransaction]:
        """As ``Ledger.consume``; its row or its error arrives in the future, and nobody else's does.

        Besides the errors of ``Ledger.consume``: OutcomeUnknown and DatabaseUnavailable reach all whose statement was
        under way; the same call with the same key may be made again. Cancelling the future works until it is sent.

        A call whose connection was cut is made once more, so its row may be marked ``replayed``.

        Raises:
            RuntimeError: the combiner is closed, or of another process.
        """
        future: Future[CreditTransaction] = Future()
        item = Consume(user, workshop=workshop, credits=credits, key=key, description=description)
        self._ask(_Call(item, future))
        return future

    async def aconsume(
        self,
        user: Key,
        *,
        workshop: Key | None = None,
        credits: int = 1,
        key: str,
        description: str | None = None,
    ) -> CreditTransaction:
        """As ``consume``, for asyncio: a statement's results wake their event loop once, not once for each caller."""
        future: asyncio.Future[CreditTransaction] = asyncio.get_running_loop().create_future()
        item = Consume(user, workshop=workshop, credits=credits, key=key, description=description)
        self._ask(_Call(item, future))
        return await future

    def _ask(self, call: _Call) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(f"this Combiner is of process {self._process}, before a fork; make one in each process")
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
        try:
            more = True
            while more:
                calls, more = self._gathered()
                going = [call for call in calls if call.wanted()]
                if going:
                    self._settle(going)
        finally:
            self._disconnect()
            self._turn_away()

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

    def _settle(self, calls: Sequence[_Call], *, again: bool = True) -> None:
        """Send all calls as one, and tell each what became of it."""
        try:
            conn = self._connected()
            outcomes = self._ledger.consume_many(conn, [call.item for call in calls])
        except (OutcomeUnknown, DatabaseUnavailable) as error:
            self._disconnect()
            if again and isinstance(error, OutcomeUnknown):
                # most likely the connection was cut while nobody needed it; every call has a key
                self._settle(calls, again=False)
            else:
                _tell((call, _another(error)) for call in calls)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to one caller, and every caller waits
            if self._conn is None or (len(calls) == 1 and not isinstance(error, DatabaseError)):
                _tell((call, error) for call in calls)
            else:
                self._settle_each(calls)
        else:
            _tell(zip(calls, outcomes, strict=True))

    def _settle_each(self, calls: Sequence[_Call]) -> None:
        """Somebody's call made the statement fail: each by itself, so that it fails alone.

        Whoever cannot have a user in time, is not waited for again by that user's other calls.
        """
        busy: list[tuple[Key, Conflict]] = []
        for call in calls:
            outcome: Outcome | None = next((_another(error) for user, error in busy if user == call.item.user), None)
            if outcome is None:
                outcome = self._outcome(call.item)
                if isinstance(outcome, Conflict) and outcome.sqlstate in TIMED_OUT:
                    busy.append((call.item.user, outcome))
            _tell([(call, outcome)])

    def _outcome(self, item: Consume) -> Outcome:
        try:
            return self._ledger.consume(
                self._connected(),
                item.user,
                workshop=item.workshop,
                credits=item.credits,
                key=item.key,
                description=item.description,
            )
        except Exception as error:  # noqa: BLE001 - it is the caller's to handle, in the caller's thread
            if self._conn is not None and self._conn.invalidated:
                self._disconnect()
            return error

    def _connected(self) -> sa.Connection:
        if self._conn is not None and self._conn.invalidated:
            self._disconnect()
        if self._conn is None:
            with translated(connecting=True):
                self._conn = self._engine.connect()
        return self._conn

    def _disconnect(self) -> None:
        if self._conn is not None:
            conn, self._conn = self._conn, None
            with suppress(sa.exc.DBAPIError):
                conn.close()

    def _turn_away(self) -> None:
        """After the last call there is nobody; where the thread was ended from outside, nobody may wait for ever."""
        with self._closing:
            self._closed = True
        with suppress(queue.Empty):
            while True:
                if call := self._calls.get(block=False):
                    _tell([(call, RuntimeError("this Combiner's thread has ended; make another one"))])


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
            try:
                _answer(call.future, outcome)
            except BaseException:  # noqa: BLE001 - of a callback of its caller's, and others wait behind it
                _log.exception("a callback of a consumption's future failed")
        else:
            waiting[call.future.get_loop()].append((call.future, outcome))
    for loop, some in waiting.items():
        with suppress(RuntimeError):  # the loop was closed, and nobody waits
            loop.call_soon_threadsafe(_answer_waiting, some)


def _answer_waiting(some: Sequence[tuple[asyncio.Future[CreditTransaction], Outcome]]) -> None:
    for future, outcome in some:
        if not future.done():  # cancelled meanwhile
            _answer(future, outcome)


def _answer(future: Future[CreditTransaction] | asyncio.Future[CreditTransaction], outcome: Outcome) -> None:
    if isinstance(outcome, CreditTransaction):
        future.set_result(outcome)
    else:
        future.set_exception(outcome)
