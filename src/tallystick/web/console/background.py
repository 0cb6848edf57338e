"""Work that is too slow for a request: one run at a time, on a thread, with progress; its last result is kept."""

from __future__ import annotations

import datetime as dt
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from tallystick.errors import TallystickError
from tallystick.progress import OnProgress, Progress

log = logging.getLogger(__name__)

Result = TypeVar("Result")

REST = 20
"""A result is kept at least this many times as long as it took, to limit the load of the database."""


@dataclass(frozen=True, slots=True)
class State(Generic[Result]):
    """The state of the work: the last result with its time, and the present run, if any."""

    result: Result | None
    at: dt.datetime | None
    seconds: float
    running: bool
    done: int
    total: int
    error: str | None

    @property
    def percent(self) -> int | None:
        """The percentage of the run that is done, or None while it is unknown."""
        return min(100 * self.done // self.total, 100) if self.total else None


class Background(Generic[Result]):
    """``work(progress)`` on a thread of its own. Runs only when asked for, never twice at a time."""

    def __init__(self, name: str, work: Callable[[OnProgress], Result], *, keep_s: float = 60) -> None:
        self._name = name
        self._work = work
        self._keep_s = keep_s
        self._lock = threading.Lock()
        self._idle = threading.Event()
        self._idle.set()
        self._tried: dt.datetime | None = None
        self._state: State[Result] = State(None, None, 0, running=False, done=0, total=0, error=None)

    @property
    def state(self) -> State[Result]:
        """The present state."""
        return self._state

    def start(self) -> bool:
        """Run now, unless it runs already. True if this call started it."""
        with self._lock:
            if self._state.running:
                return False
            self._idle.clear()
            self._state = replace(self._state, running=True, done=0, total=0, error=None)
        threading.Thread(target=self._run, name=f"tallystick-{self._name}", daemon=True).start()
        return True

    def fresh(self, *, wait_s: float) -> State[Result]:
        """The last result; starts a new run if it is old. Waits at most ``wait_s`` for a first result."""
        state = self._state
        # from the last try, so that requests do not retry at once after a failure
        age = (dt.datetime.now(dt.UTC) - self._tried).total_seconds() if self._tried else float("inf")
        if age > max(self._keep_s, REST * state.seconds):
            self.start()
        if state.result is None:
            self._idle.wait(wait_s)
        return self._state

    def wait(self, seconds: float) -> bool:
        """Wait until nothing runs. False after ``seconds``."""
        return self._idle.wait(seconds)

    def _progress(self, now: Progress) -> None:
        self._state = replace(self._state, done=int(now.done), total=int(now.total or 0))

    def _run(self) -> None:
        started = time.perf_counter()
        done = replace(self._state, error="it broke; the console's log says where")
        try:
            done = replace(done, result=self._work(self._progress), at=dt.datetime.now(dt.UTC), error=None)
        except (TallystickError, SQLAlchemyError) as caught:
            log.warning("%s failed: %s", self._name, caught)
            done = replace(done, error=_message(caught))
        finally:  # an unexpected error is raised, and reported by the thread
            self._state = replace(done, seconds=time.perf_counter() - started, running=False, done=0, total=0)
            self._tried = dt.datetime.now(dt.UTC)
            self._idle.set()


def _message(error: Exception) -> str:
    return error.message if isinstance(error, TallystickError) else str(error).splitlines()[0]
