"""The feed of events, for a program that waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import sqlalchemy as sa

from tallystick.config import Config
from tallystick.database import connect_with_retries, driver, engine, translated
from tallystick.errors import DatabaseUnavailable, OutcomeUnknown
from tallystick.ledger import Event, Ledger
from tallystick.schema import verify, with_stored_mapping

PAGE = 500
LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True, slots=True)
class Feed:
    """The feed on a connection of its own in autocommit, woken by ``NOTIFY tallystick_events``."""

    conn: sa.Connection
    ledger: Ledger

    def page(self, after: str | None) -> list[Event]:
        """The next events, at most ``PAGE``."""
        return self.ledger.events(self.conn, after=after, limit=PAGE)

    def wait(self, seconds: float) -> None:
        """Wait for a notification, at most so long; events behind an open transaction were notified before it ends."""
        with translated():
            for _ in driver(self.conn).notifies(timeout=seconds, stop_after=1):
                pass


@contextmanager
def listening(url: str | sa.URL, config: Config) -> Iterator[Feed]:
    """A feed, on a direct connection: a transaction pooler passes on no notifications.

    Raises:
        DatabaseUnavailable: there is no connection, or it ended.
        NotMigrated, HostMismatch, PermissionDenied: see the message.
    """
    pool = engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with translated(connecting=True):
        conn = connect_with_retries(pool)
    try:
        verify(conn)
        found = Feed(conn, Ledger(with_stored_mapping(conn, config)))
        with translated():
            conn.exec_driver_sql("LISTEN tallystick_events")
        yield found
    finally:
        with suppress(sa.exc.DBAPIError):  # the connection may be dead
            conn.close()


def follow(
    url: str | sa.URL,
    config: Config,
    *,
    after: str | None = None,
    poll_s: float = 1.0,
    lost: Callable[[str], None] = lambda _: None,
) -> Iterator[Event]:
    """All events after the cursor ``after``, then each new one, for ever; it reconnects after a lost connection.

    It polls every ``poll_s`` seconds, and at once after a notification. ``lost`` is called with the reason for which a
    connection ended.

    Raises:
        DatabaseUnavailable: the first connection failed.
        InvalidArgument: ``after`` is no cursor.
        NotMigrated, HostMismatch, PermissionDenied: see the message.
    """
    begun, pause_s = False, poll_s
    while True:
        try:
            with listening(url, config) as feed:
                while True:
                    page = feed.page(after)
                    begun, pause_s = True, poll_s
                    for event in page:
                        after = event.cursor
                        yield event
                    if len(page) < PAGE:
                        feed.wait(poll_s)
        except (DatabaseUnavailable, OutcomeUnknown) as error:  # it only reads, so no outcome is unknown
            if not begun:
                raise
            lost(error.message)
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
