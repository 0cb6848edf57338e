"""Concurrent consumptions as one statement, without the callers knowing of each other.

A balance change costs one commit; a busy server's limit is commits, not rows. A ``Combiner`` takes ``consume`` calls
from any number of threads or asyncio tasks. While one statement is in flight the next calls gather, and go out
together as ``consume_many`` when it returns: alone a call waits for nobody, in a crowd all share a commit.

Calls that share a statement share its fate, so a statement that fails is taken apart: by user, then by call. A user
who is locked by another transaction is served apart, by a second thread, until that user's calls are all answered.
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
from typing import Any, Required, Self, TypedDict, Unpack

import sqlalchemy as sa

from tallystick.database import translated
from tallystick.errors import (
    Conflict,
    DatabaseUnavailable,
    Key,
    LedgerError,
    OutcomeUnknown,
    TallystickError,
    shown,
)
from tallystick.ledger.connections import Call, send
from tallystick.ledger.operations import CreditTransaction, Ledger

BATCH_MAX = 1_000
"""Calls in one statement; more gain nothing and make everybody wait for the last."""

SHARED_WAIT_S = 0.1
"""For how long a statement of several users waits for a lock: all of them wait with it."""

TIMED_OUT = ("55P03", "57014")
"""SQLSTATEs of a lock timeout and of a statement timeout."""

_log = logging.getLogger(__name__)


class Options(TypedDict, total=False):
    """The arguments of ``Ledger.consume`` behind the user."""

    workshop: Key | None
    credits: int
    key: Required[str]
    description: str | None
    metadata: Mapping[str, Any] | None


Outcome = CreditTransaction | Exception
_Future = Future[CreditTransaction] | asyncio.Future[CreditTransaction]


@dataclass(eq=False, slots=True)
class _Asked:
    """A call of one caller, who waits for ``future``."""

    call: Call[CreditTransaction]
    future: _Future

    @property
    def user(self) -> Key:
        key: Key = self.call.arguments["user_id"]
        return key

    def wanted(self) -> bool:
        """Tell that it is being sent. False if the caller has given up before."""
        if isinstance(self.future, Future):
            return self.future.running() or self.future.set_running_or_notify_cancel()
        return not self.future.cancelled()


@dataclass(eq=False, slots=True)
class _User:
    """The calls of one user that wait to be sent."""

    key: Key
    calls: OrderedDict[_Asked, None] = field(default_factory=OrderedDict)
    apart_since: float | None = None


class _Lane:
    """A thread with a connection, the users who take turns in it, and what it is sending."""

    def __init__(self, name: str, lock: threading.Lock) -> None:
        self.name = name
        self.turns: deque[_User] = deque()
        self.wake = threading.Condition(lock)
        self.thread: threading.Thread | None = None
        self.in_flight: list[_Asked] = []
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
    """One connection and one thread that spend for everybody; a second pair while a user is locked by somebody else.

    ::

        with Combiner(ledger, engine) as combiner:
            row = combiner.consume(user, workshop=workshop, key=key).result()    # in any thread
            row = await combiner.aconsume(user, workshop=workshop, key=key)      # in asyncio

    Each call is committed by itself: do not use it for a consumption that belongs into a transaction of yours, nor
    while a transaction of yours has changed or locked the same user. Such a call would wait for its own caller, and
    PostgreSQL cannot see that; it ends with a Conflict after ``lock_timeout_s``.

    Users take turns: with each statement, every user who waits gets one call in before anybody gets a second. Calls
    that are waiting when the interpreter exits are still sent, and every caller is told. Make one per process, after
    any fork. Callbacks of the futures run in its threads, so keep them short.

    Args:
        engine: where the connections come from. They are kept until the Combiner is closed, and replaced when cut.
        batch_max: how many calls one statement may hold.
        waiting_max: how many calls may wait to be sent. A caller who finds so many is held until there are fewer.
        held_max_s: for how long a caller is held, before DatabaseUnavailable.
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
        self._ledger = ledger
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._batch_max = batch_max
        self._waiting_max = waiting_max
        self._held_max_s = held_max_s
        self._lock_timeout_s = lock_timeout_s
        self._process = os.getpid()
        self._closed = False
        self._lock = threading.Lock()  # of all below
        self._room = threading.Condition(self._lock)
        self._users: dict[Key, _User] = {}
        self._waiting = 0
        self._common = _Lane("tallystick-combiner", self._lock)
        self._apart = _Lane("tallystick-combiner-locked", self._lock)
        _open.add(self)

    def consume(self, user: Key, **options: Unpack[Options]) -> Future[CreditTransaction]:
        """As ``Ledger.consume``; its row or its error arrives in the future, and nobody else's does.

        Returns at once, or waits for room where ``waiting_max`` calls wait already. Besides the errors of
        ``Ledger.consume``: OutcomeUnknown and DatabaseUnavailable reach all whose statement was under way; the same
        call with the same key may be made again. Cancelling the future works until it is sent.

        A call whose connection was cut is made once more, so its row may be marked ``replayed``.

        Raises:
            InvalidArgument: nothing was written.
            DatabaseUnavailable: there was no room for ``held_max_s``. The call is not made.
            RuntimeError: the combiner is closed, or of another process.
        """
        future: Future[CreditTransaction] = Future()
        asked = _Asked(self._ledger.consume.call(user, **options), future)
        try:
            self._ask(asked, hold=True)
        except BaseException:
            future.cancel()  # whoever was interrupted while held never learns of the future
            raise
        return future

    async def aconsume(self, user: Key, **options: Unpack[Options]) -> CreditTransaction:
        """As ``consume``, for asyncio: a statement's results wake their event loop once, not once for each caller.

        A task waits for its own call, so it cannot ask for a second one and is never held. A task that is cancelled
        before its call was sent takes it back.
        """
        future: asyncio.Future[CreditTransaction] = asyncio.get_running_loop().create_future()
        asked = _Asked(self._ledger.consume.call(user, **options), future)
        self._ask(asked, hold=False)
        try:
            return await future
        finally:
            if future.cancelled():
                with self._lock:
                    self._take_back(asked)

    def close(self) -> None:
        """Send what was asked for, tell everybody, then give the connections back. Again is harmless."""
        if os.getpid() != self._process:
            return
        with self._lock:
            self._closed = True
            self._common.wake.notify()
        for lane in (self._common, self._apart):
            with self._lock:
                thread = lane.thread
                lane.wake.notify()
            if thread is not None:
                thread.join()
            self._run(lane)  # a thread may have ended before its time, and none can be started at exit
        _open.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # --- the queue: what is waiting, in whose turn; called with the lock ---

    def _ask(self, asked: _Asked, *, hold: bool) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(f"this Combiner is of process {self._process}, before a fork; make one in each process")
        with self._lock:
            if self._closed:
                raise RuntimeError("this Combiner is closed; make another one")
            user = self._users.get(asked.user)
            lane = self._common if user is None or user.apart_since is None else self._apart
            self._start(lane)
            if user is None:
                user = self._users[asked.user] = _User(asked.user)
                lane.turns.append(user)
            user.calls[asked] = None
            self._waiting += 1
            lane.wake.notify()
            if hold:
                self._hold(user, asked)

    def _hold(self, user: _User, asked: _Asked) -> None:
        """The caller waits for room. The call stands in its user's line meanwhile, and so takes its turn."""
        there_is_room = self._room.wait_for(
            lambda: self._waiting <= self._waiting_max or asked not in user.calls, self._held_max_s
        )
        if not there_is_room and self._take_back(asked):
            raise DatabaseUnavailable(
                f"more than {self._waiting_max} calls have been waiting for {self._held_max_s:g} s to be sent by this "
                "Combiner. This one was not made; make it again a little later",
                sqlstate=None,
            )

    def _take_back(self, asked: _Asked) -> bool:
        """Take a call out of the queue. False if it was sent already."""
        user = self._users.get(asked.user)
        if user is None or asked not in user.calls:
            return False
        del user.calls[asked]
        self._waiting -= 1
        self._room.notify_all()
        return True

    def _take(self, lane: _Lane, user: _User, most: int) -> None:
        """Move calls of a user from the queue to what is in flight; at no moment is a call in neither."""
        for asked in list(islice(user.calls, most)):
            if asked.wanted():
                lane.in_flight.append(asked)
            del user.calls[asked]
            self._waiting -= 1

    def _put_back(self, lane: _Lane, user: _User) -> None:
        """The user's next turn, or none."""
        if user.calls:
            lane.turns.append(user)
        elif self._users.get(user.key) is user:
            del self._users[user.key]

    def _start(self, lane: _Lane) -> None:
        """A lane's thread runs, also where the one before has ended."""
        if lane.thread is None:
            thread = threading.Thread(target=self._run, args=(lane,), name=lane.name, daemon=True)
            thread.start()
            lane.thread = thread

    # --- the threads ---

    def _run(self, lane: _Lane) -> None:
        serve = self._serve_all if lane is self._common else self._serve_one
        try:
            while self._has_turn(lane):
                serve(lane)
                if lane is self._apart and not lane.turns:
                    lane.disconnect()  # the engine's pool may be small
        except BaseException as error:
            self._give_up(lane, error)
            raise
        finally:
            lane.disconnect()

    def _has_turn(self, lane: _Lane) -> bool:
        """Wait until somebody waits; False once there will be nobody."""
        with self._lock:
            while not lane.turns:
                if self._closed:
                    return False
                lane.wake.wait()
        return True

    def _serve_all(self, lane: _Lane) -> None:
        """One call of each user who waits, then a second of each, and so on, in one statement."""
        with self._lock:
            while lane.turns and len(lane.in_flight) < self._batch_max:
                user = lane.turns.popleft()
                self._take(lane, user, 1)
                self._put_back(lane, user)
            self._room.notify_all()
        self._send(lane, lane.in_flight, SHARED_WAIT_S)
        lane.in_flight = []

    def _serve_one(self, lane: _Lane) -> None:
        """All calls of one user. The time counts that the user has waited for others who are served apart."""
        with self._lock:
            user = lane.turns.popleft()
            self._take(lane, user, self._batch_max)
            self._room.notify_all()
        waited_s = time.monotonic() - (user.apart_since or 0)
        self._send(lane, lane.in_flight, max(SHARED_WAIT_S, self._lock_timeout_s - waited_s))
        lane.in_flight = []
        with self._lock:
            self._put_back(lane, user)

    def _send(self, lane: _Lane, asked: Sequence[_Asked], wait_s: float, *, again: bool = True) -> None:
        """Send all as one statement, and tell each what became of it."""
        if not asked:
            return
        try:
            outcomes = self._outcomes(lane, [each.call for each in asked], wait_s)
        except (OutcomeUnknown, DatabaseUnavailable) as error:
            lane.disconnect()
            if again and isinstance(error, OutcomeUnknown):
                # most likely the connection was cut while nobody needed it; every call has a key
                self._send(lane, asked, wait_s, again=False)
            else:
                _tell((each, _another(error)) for each in asked)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to some caller, and every caller waits
            self._part(lane, asked, wait_s, error)
        else:
            _tell(zip(asked, outcomes, strict=True))

    def _outcomes(
        self, lane: _Lane, calls: Sequence[Call[CreditTransaction]], wait_s: float
    ) -> Sequence[CreditTransaction | LedgerError]:
        conn, lock_timeout_ms = lane.connected(self._engine), round(wait_s * 1_000)
        if len(calls) > 1:
            return send(conn, replace(self._ledger.together(calls), lock_timeout_ms=lock_timeout_ms))
        try:
            return [send(conn, replace(calls[0], lock_timeout_ms=lock_timeout_ms))]
        except LedgerError as refusal:
            return [refusal]

    def _part(self, lane: _Lane, asked: Sequence[_Asked], wait_s: float, error: Exception) -> None:
        """A statement failed and wrote nothing. Somebody's call is the cause: part the calls until it is alone."""
        by_user: dict[Key, list[_Asked]] = defaultdict(list)
        for each in asked:
            by_user[each.user].append(each)
        if lane.conn is None:
            _tell((each, error) for each in asked)
        elif len(by_user) > 1:
            for some in by_user.values():
                self._send(lane, some, wait_s / 10)  # for whoever is locked they have all waited once
        elif lane is self._common:
            self._set_apart(asked)
        elif isinstance(error, Conflict) and error.sqlstate in TIMED_OUT:
            user = shown(asked[0].user)
            message = (
                f"another transaction has locked user {user}, or a workshop of this call, for {self._lock_timeout_s:g} "
                "s. Nothing was written; make the call again. If its caller's own transaction has changed the user, "
                "spend in that one: ledger.consume(conn, …)"
            )
            _tell((each, Conflict(message, sqlstate=error.sqlstate)) for each in asked)
        elif len(asked) > 1:
            for each in asked:
                self._send(lane, [each], wait_s)
        else:
            _tell([(asked[0], error)])

    def _set_apart(self, asked: Sequence[_Asked]) -> None:
        """Back to the front of their user's line, which the other thread serves from now on."""
        key = asked[0].user
        with self._lock:
            user = self._users.get(key)
            if user is None:
                user = self._users[key] = _User(key)
            if user.apart_since is None:
                with suppress(ValueError):
                    self._common.turns.remove(user)
                user.apart_since = time.monotonic()
                self._apart.turns.append(user)
            for each in reversed(asked):
                user.calls[each] = None
                user.calls.move_to_end(each, last=False)
            self._waiting += len(asked)
            if not self._closed:  # close() serves them itself, as no thread can be started at exit
                self._start(self._apart)
            self._apart.wake.notify()

    def _give_up(self, lane: _Lane, error: BaseException) -> None:
        """The thread ends. Everybody is told; the next call starts another one."""
        ended = f"{type(error).__name__} ended the thread of this Combiner"
        with self._lock:
            sent, lane.in_flight = lane.in_flight, []
            unsent = [asked for user in self._users.values() for asked in user.calls]
            for user in self._users.values():
                user.calls.clear()
            self._users.clear()
            self._common.turns.clear()
            self._apart.turns.clear()
            self._waiting = 0
            lane.thread = None
            self._room.notify_all()
        unknown = f"{ended} while this call was under way; make the same call again with the same key"
        _tell((asked, OutcomeUnknown(unknown, sqlstate=None)) for asked in sent)
        unmade = f"{ended} before this call was sent; make it again"
        _tell((asked, DatabaseUnavailable(unmade, sqlstate=None)) for asked in unsent)


def _another(error: TallystickError) -> TallystickError:
    """The same for another caller: a raised exception keeps the traceback of whoever raised it."""
    return type(error)(error.message, **error.fields)


def _tell(results: Iterable[tuple[_Asked, Outcome]]) -> None:
    """Each caller its own outcome; an event loop is woken once for all that wait in it."""
    waiting: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[CreditTransaction], Outcome]]] = defaultdict(
        list
    )
    for asked, outcome in results:
        if isinstance(asked.future, Future):
            try:
                _answer(asked.future, outcome)
            except InvalidStateError:
                pass  # cancelled before it was sent, or told by a thread that was ended
            except BaseException:
                if not asked.future.done():
                    raise
                _log.exception("a callback of a consumption's future failed")
        else:
            waiting[asked.future.get_loop()].append((asked.future, outcome))
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


# As concurrent.futures ends its pools: before other threads are joined, and also in a process of multiprocessing, which
# atexit does not see. The name is private, hence the other way behind it.
getattr(threading, "_register_atexit", atexit.register)(_close_all)
