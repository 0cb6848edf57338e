"""Webhooks: each event is POSTed to each endpoint, in order and at least once, signed by Standard Webhooks.

An endpoint's cursor moves after a 2xx answer. A deliverer killed before that sends the same event again, with the same
``webhook-id``. Only one deliverer at a time serves an endpoint, by an advisory lock of its session.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import quote, urlsplit

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from standardwebhooks import Webhook
from standardwebhooks.webhooks import EmptyWebhookSecretError

from tallystick.config import Config
from tallystick.database import DbConnection, connect, run, translated
from tallystick.declared_tables import event_dead_letters, event_endpoints
from tallystick.errors import (
    ConfigError,
    InvalidArgument,
    TallystickError,
    shown,
)
from tallystick.events.follow import LONGEST_PAUSE_S, PAGE, Feed, listening
from tallystick.events.switch import status
from tallystick.ledger import Event
from tallystick.schema import CreditTransactionType, verify

PAUSES_S = (5.0, 300.0, 1_800.0, 7_200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0)
"""The pauses after failed attempts, from the specification. After one more failure the event is a dead letter."""

KINDS = (
    *(f"{each}.completed" for each in CreditTransactionType),
    "purchase.failed",
    "consumption.held",
    "consumption.released",
    "consumption.expired",
    "balance.low",
    "balance.debt",
)
"""All kinds of events."""

_KINDS_EXPECTED = f"pass some of {', '.join(KINDS)}; leave it out for all"
_IN_ADDRESSES = "%:/?#[]@!$&'()*+,;=~"  # characters that stay as they are

TIMEOUT_S = 15.0
_LOCAL = ("localhost", "127.0.0.1", "::1")
_ERROR_MAX = 500


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A webhook and its position. ``attempts`` is the number of failed ones of the event after ``cursor``."""

    name: str
    url: str
    secret_variable: str
    kinds: Sequence[str] | None
    cursor: str | None
    attempts: int
    next_attempt_at: dt.datetime | None
    last_error: str | None


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An event that an endpoint did not accept in any attempt."""

    endpoint: str
    event_id: int
    kind: str
    attempts: int
    last_error: str
    failed_at: dt.datetime


@dataclass(frozen=True, slots=True)
class Sent:
    """One attempt: ``error`` is None if it was accepted; ``dead`` is true after the last failed one."""

    endpoint: str
    event_id: int
    kind: str
    error: str | None
    dead: bool = False


def add_endpoint(
    conn: DbConnection,
    name: str,
    url: str,
    *,
    secret_variable: str,
    kinds: Sequence[str] | None = None,
    after: str | None = None,
    from_oldest: bool = False,
) -> Endpoint:
    """Deliver events to ``url`` from now on: new ones, those after the cursor ``after``, or with ``from_oldest`` all.

    ``secret_variable`` names the deliverer's environment variable with the secret. ``kinds`` are those to send, all if
    left out. An existing endpoint of that name is changed to that, and an event that waits after failed attempts is
    tried again at once; only ``after`` and ``from_oldest`` change the position.

    Raises:
        InvalidArgument: ``url`` is neither https nor http on this machine, ``after`` is no cursor, or ``kinds`` has one
            that is not in ``KINDS``.
    """
    _check_endpoint(name, url, secret_variable=secret_variable, kinds=kinds, after=after)
    columns = event_endpoints.c
    there = run(conn, sa.select(event_endpoints).where(columns.name == name), {}).mappings().one_or_none()
    values: dict[str, Any] = {"url": url, "secret_variable": secret_variable, "kinds": kinds, "removed_at": None}
    values |= {"attempts": 0, "next_attempt_at": None, "last_error": None}
    if there is None or there["removed_at"] is not None or after is not None or from_oldest:
        values["cursor"] = after if after is not None or from_oldest else status(conn).cursor
        values |= {"created_at": sa.func.now()} if there is not None and there["removed_at"] is not None else {}
    if there is None:
        run(conn, sa.insert(event_endpoints).values(name=name, **values), {})
    else:
        run(conn, sa.update(event_endpoints).where(columns.name == name).values(**values), {})
    return next(endpoint for endpoint in endpoints(conn) if endpoint.name == name)


def _check_endpoint(
    name: str, url: str, *, secret_variable: str, kinds: Sequence[str] | None, after: str | None
) -> None:
    """Refuse what no event could be delivered with. Raises InvalidArgument."""
    unknown = next((kind for kind in kinds or () if kind not in KINDS), None)
    is_cursor = after is None or re.fullmatch("[0-9]{1,18}-[0-9]{1,18}", after)
    is_variable = re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", secret_variable)
    problems = (
        ("name", name, "pass a text without NUL characters" if not name or "\0" in name else None),
        ("url", url, _problem_of_address(url)),
        ("secret_variable", secret_variable, None if is_variable else "pass the name of an environment variable"),
        ("kinds", kinds if unknown is None else unknown, _KINDS_EXPECTED if unknown or kinds == [] else None),
        ("after", after, None if is_cursor else "pass the cursor of an event; the newest: tallystick events status"),
    )
    for argument, value, problem in problems:
        if problem is not None:
            raise InvalidArgument.of(argument, value, problem)


def _problem_of_address(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an address such as http://[::1, or a port that is none
        is_address = False
    if not is_address:
        return "pass an address that begins with https://, and a port from 1 to 65535 if it names one"
    if parts.username is not None:
        return "the database would store its password, and no request would use it. Check the signature in its place"
    if parts.scheme == "http" and parts.hostname not in _LOCAL:
        return "what it says could be read on the way. Pass an address that begins with https://"
    if not re.fullmatch("[!-~]+", url):
        return f"percent-encode all but the printable characters of ASCII, as {shown(quote(url, safe=_IN_ADDRESSES))}"
    return None


def remove_endpoint(conn: DbConnection, name: str) -> None:
    """Stop delivering to an endpoint. Raises InvalidArgument."""
    columns = event_endpoints.c
    gone = sa.update(event_endpoints).where(columns.name == name, columns.removed_at.is_(None))
    if not run(conn, gone.values(removed_at=sa.func.now()), {}).rowcount:
        raise _unknown(name)


def endpoints(conn: DbConnection) -> list[Endpoint]:
    """All endpoints, by name."""
    columns = [event_endpoints.c[name] for name in Endpoint.__dataclass_fields__]
    selected = sa.select(*columns).where(event_endpoints.c.removed_at.is_(None)).order_by(event_endpoints.c.name)
    return [Endpoint(*row) for row in run(conn, selected, {})]


def dead_letters(conn: DbConnection, endpoint: str | None = None) -> list[DeadLetter]:
    """Dead letters that were not replayed, oldest first."""
    columns = [event_dead_letters.c[name] for name in DeadLetter.__dataclass_fields__]
    selected = sa.select(*columns).where(event_dead_letters.c.replayed_at.is_(None))
    if endpoint is not None:
        selected = selected.where(event_dead_letters.c.endpoint == endpoint)
    return [DeadLetter(*row) for row in run(conn, selected.order_by(event_dead_letters.c.event_id), {})]


def replay(
    conn: DbConnection, endpoint: str, event_ids: Sequence[int] | None = None, *, timeout_s: float = TIMEOUT_S
) -> list[Sent]:
    """Send dead letters of an endpoint again, all or some; those that it accepts are removed from the list.

    Pass a connection in autocommit: each result then stays, whatever comes after it. In a transaction that has written
    the first result, readers of the feed would get no new events before the last answer.

    Raises:
        InvalidArgument: there is no such endpoint, or it has no such dead letter.
        ConfigError: the endpoint's secret is missing.
    """
    found = next((each for each in endpoints(conn) if each.name == endpoint), None)
    if found is None:
        raise _unknown(endpoint)
    signers = _signers(found)
    letters = event_dead_letters.c
    selected = sa.select(event_dead_letters).where(letters.endpoint == endpoint, letters.replayed_at.is_(None))
    rows = run(conn, selected.order_by(letters.event_id), {}).mappings().all()
    unknown = set(event_ids or ()) - {row["event_id"] for row in rows}
    if unknown:
        raise InvalidArgument(
            f"{endpoint} has no dead letter {min(unknown)}. List them with: tallystick events dead-letters",
            argument="event",
            value=min(unknown),
        )
    done = []
    for row in rows:
        if event_ids is None or row["event_id"] in event_ids:
            error = _post(found.url, signers, row["event_id"], row["body"], timeout_s)
            if error is None:
                values: dict[str, Any] = {"replayed_at": sa.func.clock_timestamp()}
            else:
                values = {"attempts": letters.attempts + 1, "last_error": error}
            this = letters.endpoint == endpoint, letters.event_id == row["event_id"]
            run(conn, sa.update(event_dead_letters).where(*this).values(**values), {})
            done.append(Sent(endpoint, row["event_id"], row["kind"], error, dead=error is not None))
    return done


def deliver(
    url: str,
    config: Config,
    *,
    once: bool = False,
    pauses_s: Sequence[float] = PAUSES_S,
    timeout_s: float = TIMEOUT_S,
    poll_s: float = 1.0,
    report: Callable[[Sent | str], None] = lambda _: None,
) -> None:
    """Deliver to all endpoints until interrupted, or with ``once`` all that can be delivered now.

    An event that fails once more after all ``pauses_s`` is a dead letter, and the next one follows. ``report`` is
    called with each ``Sent``, and with a sentence when a connection ends or an endpoint has a fault, from several
    threads. A fault of one endpoint stops no other; with ``once`` the first one is raised at the end.

    Raises:
        ConfigError: the secret of an endpoint is not in the environment; only with ``once``.
        DatabaseUnavailable, NotMigrated, HostMismatch, PermissionDenied: see the message.
    """
    _Deliverer(url, config, once=once, pauses_s=pauses_s, timeout_s=timeout_s, poll_s=poll_s, report=report).run()


class _Deliverer:
    """The threads of a delivery, one for each endpoint, so that none waits for another."""

    def __init__(
        self,
        url: str,
        config: Config,
        *,
        once: bool,
        pauses_s: Sequence[float],
        timeout_s: float,
        poll_s: float,
        report: Callable[[Sent | str], None],
    ) -> None:
        self.url, self.config, self.once, self.report = url, config, once, report
        self.pauses_s, self.timeout_s, self.poll_s = pauses_s, timeout_s, poll_s
        self.stopped = threading.Event()
        self.failed: list[Exception] = []

    def run(self) -> None:
        """Start a thread for each endpoint, also for those that are added later."""
        threads: dict[str, threading.Thread] = {}
        try:
            while True:
                with connect(self.url) as conn:
                    verify(conn)
                    there = endpoints(conn)
                for endpoint in there:
                    if endpoint.name not in threads or not threads[endpoint.name].is_alive():
                        threads[endpoint.name] = threading.Thread(
                            target=self._keep_delivering, args=(endpoint.name,), daemon=True
                        )
                        threads[endpoint.name].start()
                if self.once:
                    for thread in threads.values():
                        thread.join()
                    break
                self.stopped.wait(self.poll_s)
        finally:
            self.stopped.set()
            for thread in threads.values():
                thread.join(timeout=self.timeout_s + self.poll_s)
        if self.failed:
            raise self.failed[0]

    def _keep_delivering(self, name: str) -> None:
        pause_s = self.poll_s
        while not self.stopped.is_set():
            began = time.monotonic()
            try:
                with listening(self.url, self.config) as feed:
                    if feed.conn.scalar(_LOCK_ENDPOINT, {"name": name}):
                        self._deliver(feed, name)
                        return
                if self.once:
                    self.report(f"{name} is delivered by another process.")
                    return
            except Exception as error:  # noqa: BLE001 - it is reported or raised; the other endpoints go on
                self.report(f"{name}: {_told(error)}")
                if self.once:
                    self.failed.append(error)
                    return
            if time.monotonic() - began > LONGEST_PAUSE_S:  # it has worked for a while
                pause_s = self.poll_s
            self.stopped.wait(pause_s)
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    def _deliver(self, feed: Feed, name: str) -> None:
        """Deliver until the endpoint is removed, or with ``once`` until nothing is due."""
        while not self.stopped.is_set():
            with translated():
                row = feed.conn.execute(_READ_ENDPOINT, {"name": name}).one_or_none()
            if row is None:
                return
            *values, wait_s = row
            endpoint = Endpoint(*values)
            _signers(endpoint)  # a missing secret is an error before an event is due
            if wait_s > 0:
                if self.once:
                    return
                self.stopped.wait(min(wait_s, self.poll_s))
                continue
            page = feed.page(endpoint.cursor)
            self._deliver_page(feed, endpoint, page)
            if len(page) < PAGE:
                if self.once and not page:
                    return
                feed.wait(0 if self.once else self.poll_s)

    def _deliver_page(self, feed: Feed, endpoint: Endpoint, page: Sequence[Event]) -> None:
        """Deliver a page of events, up to the first that is not accepted."""
        signers, passed = _signers(endpoint), endpoint.cursor
        for event in page:
            if self.stopped.is_set():
                return
            if endpoint.kinds is None or event.kind in endpoint.kinds:
                body = _body(event)
                error = _post(endpoint.url, signers, event.id, body, self.timeout_s)
                dead = error is not None and endpoint.attempts >= len(self.pauses_s)
                if error is not None and not dead:
                    pause_s = self.pauses_s[endpoint.attempts] * random.uniform(1, 1.2)  # noqa: S311  # jitter
                    _run(feed, _postpone(endpoint, error, pause_s))
                    self.report(Sent(endpoint.name, event.id, event.kind, error))
                    return
                moved = _run(
                    feed,
                    _move_past_dead_letter(endpoint, event, body, error) if error else _move(endpoint, event.cursor),
                )
                self.report(Sent(endpoint.name, event.id, event.kind, error, dead))
                if not moved:  # the cursor was set meanwhile, or the endpoint removed
                    return
                endpoint = replace(endpoint, cursor=event.cursor, attempts=0)
            passed = event.cursor
        if passed is not None and passed != endpoint.cursor:  # events of other kinds
            _run(feed, _move(endpoint, passed))


def _run(feed: Feed, statement: sa.Executable) -> bool:
    """True if a row was written."""
    return run(feed.conn, statement, {}).rowcount > 0


def _moving(endpoint: Endpoint) -> sa.Update:
    """A change of the endpoint, if its cursor has not changed since it was read."""
    columns = event_endpoints.c
    return sa.update(event_endpoints).where(
        columns.name == endpoint.name,
        columns.cursor.is_not_distinct_from(endpoint.cursor),
        columns.removed_at.is_(None),
    )


def _move(endpoint: Endpoint, cursor: str) -> sa.Update:
    return _moving(endpoint).values(cursor=cursor, attempts=0, next_attempt_at=None, last_error=None)


def _postpone(endpoint: Endpoint, error: str, pause_s: float) -> sa.Update:
    at = sa.func.clock_timestamp() + dt.timedelta(seconds=pause_s)
    return _moving(endpoint).values(attempts=event_endpoints.c.attempts + 1, next_attempt_at=at, last_error=error)


def _move_past_dead_letter(endpoint: Endpoint, event: Event, body: str, error: str) -> pg.Insert:
    """Store the event as a dead letter, and move the cursor past it."""
    moved = _move(endpoint, event.cursor).returning(event_endpoints.c.name).cte("moved")
    letter = {"event_id": event.id, "kind": event.kind, "body": body, "attempts": endpoint.attempts + 1}
    columns = {name: sa.literal(value, event_dead_letters.c[name].type) for name, value in letter.items()}
    columns["last_error"] = sa.literal(error)
    insert = pg.insert(event_dead_letters).from_select(
        ["endpoint", *columns], sa.select(moved.c.name, *columns.values())
    )
    new = insert.excluded
    return insert.on_conflict_do_update(
        index_elements=["endpoint", "event_id"],
        set_={
            "attempts": event_dead_letters.c.attempts + new.attempts,
            "last_error": new.last_error,
            "failed_at": new.failed_at,
            "replayed_at": None,
        },
    )


_LOCK_ENDPOINT = sa.text("SELECT pg_try_advisory_lock(hashtextextended('tallystick.event_endpoints ' || :name, 0))")

_READ_ENDPOINT = sa.text("""
SELECT name, url, secret_variable, kinds, cursor, attempts, next_attempt_at, last_error,
  coalesce(extract(epoch FROM next_attempt_at - clock_timestamp()), 0)::float8 AS wait_s
FROM tallystick.event_endpoints WHERE name = :name AND removed_at IS NULL
""")


def _body(event: Event) -> str:
    data = {name: getattr(event, name) for name in Event.__dataclass_fields__ if name not in ("kind", "created_at")}
    payload = {"type": event.kind, "timestamp": event.created_at.isoformat(), "data": data}
    return json.dumps(payload, default=str, ensure_ascii=False, separators=(",", ":"))


def _signers(endpoint: Endpoint) -> list[Webhook]:
    """A signer for each secret: during a replacement the variable has both, and receivers accept either."""
    secrets = os.environ.get(endpoint.secret_variable, "").split()
    try:
        if secrets:
            return [Webhook(secret) for secret in secrets]
        problem = "is not set"
    except (ValueError, EmptyWebhookSecretError):
        problem = "holds no secret of the Standard Webhooks"
    raise ConfigError(
        f"{endpoint.secret_variable}, the secret of the endpoint {endpoint.name}, {problem}. It is whsec_ and 24 to 64 "
        "bytes in base64, as made by: echo whsec_$(openssl rand -base64 32)"
    )


class _WithinTimeout(HTTPConnection):
    """A connection whose timeout is for the whole attempt, since a socket's is for each of its packets."""

    _is_late = False

    def connect(self) -> None:
        """Connect; from now on the time runs."""
        self._timer = threading.Timer(self.timeout or TIMEOUT_S, self._cut)
        self._timer.daemon = True
        self._timer.start()
        super().connect()

    def getresponse(self) -> HTTPResponse:
        """The answer. Raises TimeoutError: its end, or the connection's, would otherwise look like a short answer."""
        try:
            return super().getresponse()
        finally:
            self._timer.cancel()
            if self._is_late:
                raise TimeoutError("timed out")

    def _cut(self) -> None:
        self._is_late = True
        if self.sock is not None:
            with suppress(OSError):  # closed meanwhile
                self.sock.shutdown(socket.SHUT_RDWR)


class _WithinTimeoutByTls(_WithinTimeout, HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(_WithinTimeout, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(_WithinTimeoutByTls, req)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A handler that follows no redirects, since a redirected POST would become a GET."""

    def redirect_request(self, *_: Any) -> None:
        """None: the answer is an error like any other."""


_OPENER = urllib.request.build_opener(_NoRedirect, _Http, _Https)


def _post(url: str, signers: Sequence[Webhook], event_id: int, body: str, timeout_s: float) -> str | None:
    """Send a request; None if it was accepted, else the error.

    The address is checked once more: an app's role may write the table of endpoints itself, and a file: address would
    be read here as if it had accepted the event.
    """
    if problem := _problem_of_address(url):
        return f"its address is not used: {problem}"[:_ERROR_MAX]
    name, now = f"evt_{event_id}", dt.datetime.now(dt.UTC)
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "tallystick",
        "webhook-id": name,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signer.sign(name, now, body) for signer in signers),
    }
    try:
        request = urllib.request.Request(url, data=body.encode(), headers=headers)  # noqa: S310 - checked above
        with _OPENER.open(request, timeout=timeout_s):
            return None
    except urllib.error.HTTPError as error:
        with error:
            problem = f"it answered {error.code} {error.reason}"
    except (OSError, HTTPException, ValueError) as error:  # a ValueError is about the address
        problem = f"it did not answer: {getattr(error, 'reason', None) or error or type(error).__name__}"
    return problem[:_ERROR_MAX].replace("\0", "�")  # PostgreSQL stores no NUL


def _told(error: Exception) -> str:
    return error.message if isinstance(error, TallystickError) else f"{type(error).__name__}: {error}"


def _unknown(name: str) -> InvalidArgument:
    return InvalidArgument(
        f"there is no endpoint {shown(name)}. List them with: tallystick events endpoint list",
        argument="endpoint",
        value=name,
    )
