"""Concurrent consumptions as one statement, without the callers knowing of each other.

A balance change costs one commit; a busy server's limit is commits, not rows. A ``Combiner`` takes ``consume`` calls
from any number of threads or asyncio tasks. Calls that arrive while a statement is in flight are sent together as one
``consume_many`` when it returns. A single call is sent at once; concurrent calls share a commit.

A statement that fails fails for all of its calls, so it is split: by user, then by call. A user whom another
transaction has locked is served by a second thread until all of that user's calls are answered.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
import time
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from types import TracebackType
from typing import Any, Required, Self, TypedDict, TypeVar, Unpack

import sqlalchemy as sa

from tallystick.database import refuse_other_than, translated
from tallystick.errors import (
    Conflict,
    DatabaseUnavailable,
    InvalidArgument,
    Key,
    LedgerError,
    OutcomeUnknown,
    TallystickError,
    shown,
)
from tallystick.ledger.connections import Call, send
from tallystick.ledger.operations import CreditTransaction, Ledger

BATCH_MAX = 1_000
"""The most calls in one statement: more gain nothing, and every caller waits for the last."""

SHARED_WAIT_S = 0.1
"""The lock timeout of a statement of several users, who all wait with it."""

TIMED_OUT = ("55P03", "57014")
"""SQLSTATEs of a lock timeout and of a statement timeout."""

_log = logging.getLogger(__name__)


class Options(TypedDict, total=False):
    """The arguments of ``Ledger.consume`` after the user."""

    workshop: Key | None
    credits: int
    key: Required[str]
    description: str | None
    metadata: Mapping[str, Any] | None


Outcome = CreditTransaction | Exception
E = TypeVar("E", bound=TallystickError)
_Future = Future[CreditTransaction] | asyncio.Future[CreditTransaction]


@dataclass(eq=False, slots=True)
class _QueuedCall:
    """A call of one caller, who waits for ``future``. ``unknown`` is the error of an attempt that may have written."""

    call: Call[CreditTransaction]
    future: _Future
    unknown: OutcomeUnknown | None = None

    @property
    def user(self) -> Key:
        key: Key = self.call.arguments["user_id"]
        return key

    def mark_sent(self) -> bool:
        """Mark it as sent. False if the caller has cancelled it."""
        if isinstance(self.future, Future):
            return self.future.running() or self.future.set_running_or_notify_cancel()
        return not self.future.cancelled()


@dataclass(eq=False, slots=True)
class _User:
    """The calls of one user that wait to be sent."""

    key: Key
    calls: OrderedDict[_QueuedCall, None] = field(default_factory=OrderedDict)
    apart_since: float | None = None


class _Worker:
    """A thread with a connection, the users who take turns in it, and the calls that it is sending."""

    def __init__(self, name: str, lock: threading.Lock) -> None:
        self.name = name
        self.users: deque[_User] = deque()
        self.wake = threading.Condition(lock)
        self.thread: threading.Thread | None = None
        self.in_flight: list[_QueuedCall] = []
        self.conn: sa.Connection | None = None

    def connected(self, engine: sa.Engine) -> sa.Connection:
        if self.conn is not None and self.conn.invalidated:
            self.disconnect()
        if self.conn is None:
            with translated(connecting=True):
                self.conn = engine.connect()
        return self.conn

    def disconnect(self) -> None:
        if self.conn is not None:
            conn, self.conn = self.conn, None
            with suppress(sa.exc.DBAPIError):
                conn.close()


class Combiner:
    """One thread and one connection that spend for all callers; a second pair while a user is locked.

    ::

        with Combiner(ledger, engine) as combiner:
            row = combiner.consume(user, workshop=workshop, key=key).result()    # in any thread
            row = await combiner.aconsume(user, workshop=workshop, key=key)      # in asyncio

    Each call is committed by itself: do not use it for a consumption that belongs in a transaction of yours, nor
    while a transaction of yours has changed or locked the same user. Such a call waits for its own caller, which
    PostgreSQL cannot detect; it ends with a Conflict after ``lock_timeout_s``.

    Users take turns: a statement takes one call of every waiting user before it takes a second of any. Calls that are
    waiting when the interpreter exits are still sent and answered. Make one per process, after any fork. Callbacks of
    the futures run in its threads, so keep them short.

    Args:
        engine: where the connections come from. They are kept until the Combiner is closed, and replaced when cut.
        batch_max: how many calls one statement may hold.
        waiting_max: how many calls may wait to be sent. Further callers wait until there are fewer.
        held_max_s: for how long such a caller waits, before DatabaseUnavailable.
        lock_timeout_s: for how long a call waits for its user while another transaction has that user locked, before
            Conflict; it replaces the connection's own lock_timeout, for these statements alone.
    """

    def __init__(
        self,
        ledger: Ledger,
        engine: sa.Engine,
        *,
        batch_max: int = BATCH_MAX,
        waiting_max: int = 10_000,
        held_max_s: float = 30.0,
        lock_timeout_s: float = 5.0,
    ) -> None:
        refuse_other_than(ledger, (Ledger,), "a Combiner takes a Ledger first")
        refuse_other_than(engine, (sa.Engine,), "a Combiner takes an Engine of SQLAlchemy")
        if engine.dialect.is_async:
            raise InvalidArgument(
                "a Combiner sends from threads of its own, and this Engine is an AsyncEngine's. Make another one for "
                "it: sa.create_engine(…)",
                argument="engine",
                value=engine,
            )
        self._ledger = ledger
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._batch_max = batch_max
        self._waiting_max = waiting_max
        self._held_max_s = held_max_s
        self._lock_timeout_s = lock_timeout_s
        self._process = os.getpid()
        self._closed = False
        self._lock = threading.Lock()  # guards all below
        self._room = threading.Condition(self._lock)
        self._users: dict[Key, _User] = {}
        self._waiting = 0
        self._common = _Worker("tallystick-combiner", self._lock)
        self._apart = _Worker("tallystick-combiner-locked", self._lock)
        _open.add(self)

    def consume(self, user: Key, **options: Unpack[Options]) -> Future[CreditTransaction]:
        """As ``Ledger.consume``; the future gets the row, or the error of this call.

        Returns at once, or waits for room where ``waiting_max`` calls wait already. Besides the errors of
        ``Ledger.consume``, OutcomeUnknown and DatabaseUnavailable go to all calls of a statement; the same call with
        the same key may be made again. The future can be cancelled until the call is sent.

        A call whose connection was lost is made once more, so its row may be marked ``replayed``. If that attempt gets
        no answer either, the error is the first one's OutcomeUnknown.

        Raises:
            InvalidArgument: nothing was written.
            DatabaseUnavailable: there was no room for ``held_max_s``. The call is not made.
            OutcomeUnknown: as before, but its connection was lost meanwhile.
            RuntimeError: the combiner is closed, or of another process.
        """
        future: Future[CreditTransaction] = Future()
        queued = _QueuedCall(self._ledger.consume.call(user, **options), future)
        try:
            self._enqueue(queued, block=True)
        except BaseException:
            future.cancel()  # a caller that is interrupted while it waits never gets the future
            raise
        return future

    async def aconsume(self, user: Key, **options: Unpack[Options]) -> CreditTransaction:
        """As ``consume``, for asyncio: a statement's results wake their event loop once, not once for each caller.

        It never waits for room, since a task has one call at a time. Cancelling the task before its call is sent
        withdraws the call; afterwards it still charges.
        """
        future: asyncio.Future[CreditTransaction] = asyncio.get_running_loop().create_future()
        queued = _QueuedCall(self._ledger.consume.call(user, **options), future)
        self._enqueue(queued, block=False)
        try:
            return await future
        finally:
            if future.cancelled():
                with self._lock:
                    self._withdraw(queued)

    def close(self) -> None:
        """Send the waiting calls, answer them, then return the connections. Closing again is harmless."""
        if os.getpid() != self._process:
            return
        with self._lock:
            self._closed = True
            self._common.wake.notify()
        for worker in (self._common, self._apart):
            with self._lock:
                thread = worker.thread
                worker.wake.notify()
            if thread is not None:
                thread.join()
            self._run(worker)  # its thread may have ended early, and none can be started at exit
        _open.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # --- the queue of calls; called with the lock, except _enqueue ---

    def _enqueue(self, queued: _QueuedCall, *, block: bool) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(f"this Combiner is of process {self._process}, before a fork; make one in each process")
        with self._lock:
            if self._closed:
                raise RuntimeError("this Combiner is closed; make another one")
            user = self._users.get(queued.user)
            worker = self._common if user is None or user.apart_since is None else self._apart
            self._start(worker)
            if user is None:
                user = self._users[queued.user] = _User(queued.user)
                worker.users.append(user)
            user.calls[queued] = None
            self._waiting += 1
            worker.wake.notify()
            if block:
                self._wait_for_room(user, queued)

    def _wait_for_room(self, user: _User, queued: _QueuedCall) -> None:
        """Wait for room. The call is in its user's queue meanwhile, and may be sent."""
        there_is_room = self._room.wait_for(
            lambda: self._waiting <= self._waiting_max or queued not in user.calls, self._held_max_s
        )
        if not there_is_room and self._withdraw(queued):
            if queued.unknown is not None:
                raise queued.unknown
            raise DatabaseUnavailable(
                f"more than {self._waiting_max} calls have been waiting for {self._held_max_s:g} s to be sent by this "
                "Combiner. This one was not made; make it again a little later",
            )

    def _withdraw(self, queued: _QueuedCall) -> bool:
        """Take a call out of the queue. False if it was sent already."""
        user = self._users.get(queued.user)
        if user is None or queued not in user.calls:
            return False
        del user.calls[queued]
        self._waiting -= 1
        self._room.notify_all()
        return True

    def _put_in_flight(self, worker: _Worker, user: _User, most: int) -> None:
        """Move calls of a user from the queue to those in flight; at no moment is a call in neither."""
        for queued in list(islice(user.calls, most)):
            if queued.mark_sent():
                worker.in_flight.append(queued)
            del user.calls[queued]
            self._waiting -= 1

    def _requeue(self, worker: _Worker, user: _User) -> None:
        """Give the user another turn, or forget a user without calls."""
        if user.calls:
            worker.users.append(user)
        elif self._users.get(user.key) is user:
            del self._users[user.key]

    def _start(self, worker: _Worker) -> None:
        """Start a worker's thread, also where the one before has ended."""
        if worker.thread is None:
            thread = threading.Thread(target=self._run, args=(worker,), name=worker.name, daemon=True)
            thread.start()
            worker.thread = thread

    # --- the threads ---

    def _run(self, worker: _Worker) -> None:
        serve = self._serve_all if worker is self._common else self._serve_one
        try:
            while self._wait_for_turn(worker):
                serve(worker)
                if worker is self._apart and not worker.users:
                    worker.disconnect()  # the engine's pool may be small
        except BaseException as error:
            self._give_up(worker, error)
            raise
        finally:
            worker.disconnect()

    def _wait_for_turn(self, worker: _Worker) -> bool:
        """Wait until a user has calls; False once the combiner is closed and none has."""
        with self._lock:
            while not worker.users:
                if self._closed:
                    return False
                worker.wake.wait()
        return True

    def _serve_all(self, worker: _Worker) -> None:
        """Send one call of each waiting user, then a second of each, and so on, in one statement."""
        with self._lock:
            while worker.users and len(worker.in_flight) < self._batch_max:
                user = worker.users.popleft()
                self._put_in_flight(worker, user, 1)
                self._requeue(worker, user)
            self._room.notify_all()
        self._send(worker, worker.in_flight, SHARED_WAIT_S)
        worker.in_flight = []

    def _serve_one(self, worker: _Worker) -> None:
        """Send all calls of one user. The lock timeout is less by the time that the user has waited for a turn."""
        with self._lock:
            user = worker.users.popleft()
            self._put_in_flight(worker, user, self._batch_max)
            self._room.notify_all()
        waited_s = time.monotonic() - (user.apart_since or 0)
        self._send(worker, worker.in_flight, max(SHARED_WAIT_S, self._lock_timeout_s - waited_s))
        worker.in_flight = []
        with self._lock:
            self._requeue(worker, user)

    def _send(self, worker: _Worker, calls: Sequence[_QueuedCall], wait_s: float, *, again: bool = True) -> None:
        """Send all as one statement, and give each its outcome."""
        if not calls:
            return
        try:
            outcomes = self._outcomes(worker, [each.call for each in calls], wait_s)
        except (OutcomeUnknown, DatabaseUnavailable) as error:
            worker.disconnect()
            if isinstance(error, OutcomeUnknown):
                for each in calls:
                    each.unknown = each.unknown or _copy(error)
            if again and isinstance(error, OutcomeUnknown):
                # most likely the connection was lost while it was idle; every call has a key
                self._send(worker, calls, wait_s, again=False)
            else:
                _resolve((each, _copy(error)) for each in calls)
        except Exception as error:  # noqa: BLE001 - any error is some caller's, and every caller waits
            self._split(worker, calls, wait_s, error)
        else:
            _resolve(zip(calls, outcomes, strict=True))

    def _outcomes(
        self, worker: _Worker, calls: Sequence[Call[CreditTransaction]], wait_s: float
    ) -> Sequence[CreditTransaction | LedgerError]:
        conn, lock_timeout_ms = worker.connected(self._engine), round(wait_s * 1_000)
        if len(calls) > 1:
            return send(conn, replace(self._ledger.together(calls), lock_timeout_ms=lock_timeout_ms))
        try:
            return [send(conn, replace(calls[0], lock_timeout_ms=lock_timeout_ms))]
        except LedgerError as refusal:
            return [refusal]

    def _split(self, worker: _Worker, calls: Sequence[_QueuedCall], wait_s: float, error: Exception) -> None:
        """Split a statement that failed and wrote nothing, until the call that is the cause is alone."""
        by_user: dict[Key, list[_QueuedCall]] = defaultdict(list)
        for each in calls:
            by_user[each.user].append(each)
        if worker.conn is None:
            _resolve((each, error) for each in calls)
        elif len(by_user) > 1:
            for some in by_user.values():
                self._send(worker, some, wait_s / 10)  # all of them have waited once for the locked user
        elif worker is self._common:
            self._set_apart(calls)
        elif isinstance(error, Conflict) and error.sqlstate in TIMED_OUT:
            user = shown(calls[0].user)
            message = (
                f"another transaction has locked user {user}, or a workshop of this call, for {self._lock_timeout_s:g} "
                "s. Nothing was written; make the call again. If its caller's own transaction has changed the user, "
                "spend in that one: ledger.consume(conn, …)"
            )
            _resolve((each, Conflict(message, sqlstate=error.sqlstate)) for each in calls)
        elif len(calls) > 1:
            for each in calls:
                self._send(worker, [each], wait_s)
        else:
            _resolve([(calls[0], error)])

    def _set_apart(self, calls: Sequence[_QueuedCall]) -> None:
        """Put calls back to the front of their user's queue, which the second worker serves from now on."""
        key = calls[0].user
        with self._lock:
            user = self._users.get(key)
            if user is None:
                user = self._users[key] = _User(key)
            if user.apart_since is None:
                with suppress(ValueError):
                    self._common.users.remove(user)
                user.apart_since = time.monotonic()
                self._apart.users.append(user)
            for each in reversed(calls):
                user.calls[each] = None
                user.calls.move_to_end(each, last=False)
            self._waiting += len(calls)
            if not self._closed:  # close() serves them itself, as no thread can be started at exit
                self._start(self._apart)
            self._apart.wake.notify()

    def _give_up(self, worker: _Worker, error: BaseException) -> None:
        """End the thread with an error for every caller; the next call starts another thread."""
        ended = f"{type(error).__name__} ended the thread of this Combiner"
        with self._lock:
            sent, worker.in_flight = worker.in_flight, []
            unsent = [queued for user in self._users.values() for queued in user.calls]
            for user in self._users.values():
                user.calls.clear()
            self._users.clear()
            self._common.users.clear()
            self._apart.users.clear()
            self._waiting = 0
            worker.thread = None
            self._room.notify_all()
        unknown = f"{ended} while this call was under way; make the same call again with the same key"
        _resolve((queued, OutcomeUnknown(unknown)) for queued in sent)
        unmade = f"{ended} before this call was sent; make it again"
        _resolve((queued, DatabaseUnavailable(unmade)) for queued in unsent)


def _copy(error: E) -> E:
    """A copy for another caller: an exception keeps the traceback of the place that raised it."""
    return type(error)(error.message, **error.fields)


def _resolve(results: Iterable[tuple[_QueuedCall, Outcome]]) -> None:
    """Give each caller its outcome; an event loop is woken once for all of its callers."""
    waiting: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[CreditTransaction], Outcome]]] = defaultdict(
        list
    )
    for queued, last in results:
        outcome = last
        if queued.unknown is not None and not isinstance(last, CreditTransaction | LedgerError):
            outcome = queued.unknown  # the last attempt tells nothing of the one before, which may have written
        if isinstance(queued.future, Future):
            try:
                _answer(queued.future, outcome)
            except InvalidStateError:
                pass  # cancelled before it was sent, or answered by a thread that ended
            except BaseException:
                if not queued.future.done():
                    raise
                _log.exception("a callback of a consumption's future failed")
        else:
            waiting[queued.future.get_loop()].append((queued.future, outcome))
    for loop, some in waiting.items():
        with suppress(RuntimeError):  # the loop was closed, and nobody waits
            loop.call_soon_threadsafe(_answer_waiting, some)


def _answer_waiting(some: Sequence[tuple[asyncio.Future[CreditTransaction], Outcome]]) -> None:
    for future, outcome in some:
        if not future.done():  # cancelled meanwhile
            _answer(future, outcome)


def _answer(future: _Future, outcome: Outcome) -> None:
    if isinstance(outcome, CreditTransaction):
        future.set_result(outcome)
    else:
        future.set_exception(outcome)


_open: weakref.WeakSet[Combiner] = weakref.WeakSet()


def _close_all() -> None:
    for combiner in list(_open):
        combiner.close()


# As concurrent.futures ends its pools: before other threads are joined, and also in a process of multiprocessing, where
# atexit does not run. The name is private, so atexit is the fallback.
getattr(threading, "_register_atexit", atexit.register)(_close_all)
