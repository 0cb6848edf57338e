"""The parts of the demo: an app without credits, its live traffic, and concurrent customers."""

from __future__ import annotations

import itertools
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self
from uuid import UUID

import psycopg
import sqlalchemy as sa

from tallystick.config import Config
from tallystick.database import connect
from tallystick.dev.seed import DEFAULT_PACKS
from tallystick.errors import InsufficientCredits
from tallystick.ledger import CreditTransaction, Ledger

HOST_APP = """
CREATE TABLE public.users (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  email text NOT NULL UNIQUE,
  name text NOT NULL DEFAULT '',
  created_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE public.workshops (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id uuid NOT NULL REFERENCES public.users (id),
  title text NOT NULL,
  step integer NOT NULL DEFAULT 1,
  created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX workshops_user_id ON public.workshops (user_id);
"""
"""The tables of an app without credits."""

_FILL_USERS = """
INSERT INTO public.users (email, name, created_at)
SELECT 'user' || n || '@example.com', 'User ' || n, now() - n * interval '1 minute' FROM generate_series(1, %s) n
"""
_FILL_WORKSHOPS = """
WITH owner AS (SELECT id, row_number() OVER () AS n FROM public.users), size AS (SELECT count(*) AS users FROM owner)
INSERT INTO public.workshops (user_id, title, created_at)
SELECT owner.id, 'Workshop ' || w, now() - w * interval '1 minute'
FROM generate_series(1, %s) w, size, owner WHERE owner.n = 1 + w %% size.users
"""

LEAST_STEPS = 20  # of each customer, even on a slow machine

OLD_APP = (
    "SELECT id, email, name FROM users WHERE id = %(user)s",
    "SELECT id, title, step FROM workshops WHERE user_id = %(user)s ORDER BY created_at DESC LIMIT 20",
    "UPDATE workshops SET step = step + 1 WHERE id = %(workshop)s",
    "INSERT INTO workshops (user_id, title) VALUES (%(user)s, 'New idea')",
    "UPDATE users SET name = name || '' WHERE id = %(user)s",
    "INSERT INTO users (email, name) VALUES (gen_random_uuid()::text, 'Newcomer')",
)
"""Statements of the app's old code, sent before, during and after the migration."""


LOOK_EVERY_S = 0.02

_WAITED_MS = """
SELECT max(extract(epoch FROM clock_timestamp() - l.waitstart)) * 1000
FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
WHERE NOT l.granted AND l.locktype = 'relation' AND a.application_name <> 'tallystick migrate'
  AND a.backend_type = 'client backend' AND l.relation IN ('public.users'::regclass, 'public.workshops'::regclass)
"""


def build_host_app(url: str, *, users: int, workshops: int) -> None:
    """Make the app's tables as they were before Tallystick, and fill them.

    Raises:
        psycopg.errors.DuplicateTable: the database has such tables already.
    """
    with connect(url) as conn:
        conn.exec_driver_sql(HOST_APP)
        conn.exec_driver_sql(_FILL_USERS, (users,))
        conn.exec_driver_sql(_FILL_WORKSHOPS, (workshops,))
    with psycopg.connect(url.replace("+psycopg", "", 1), autocommit=True) as conn:
        conn.execute("VACUUM (ANALYZE) public.users, public.workshops")


@dataclass
class Traffic:
    """Threads that use the tables as the old app does. Latencies are in milliseconds from a statement's due time.

    Statements are due at fixed times, even if the one before has not returned: so a stall counts for all statements
    that it would have delayed. ``waits_ms`` are how long statements had waited for a table, by the server's clock, at
    each look: a machine that is busy with other work does not lengthen these.
    """

    url: str
    users: list[UUID]
    workshops: list[UUID]
    threads: int = 4
    per_second: int = 200
    latencies_ms: list[tuple[float, float]] = field(default_factory=list)
    waits_ms: list[tuple[float, float]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, url: str) -> Self:
        """Traffic on some of the existing rows."""
        with connect(url) as conn:
            users = [row[0] for row in conn.exec_driver_sql("SELECT id FROM public.users LIMIT 1000")]
            workshops = [row[0] for row in conn.exec_driver_sql("SELECT id FROM public.workshops LIMIT 1000")]
        return cls(url, users, workshops)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the traffic during the block."""
        stop = threading.Event()
        pool = [threading.Thread(target=self._work, args=(stop, number), daemon=True) for number in range(self.threads)]
        pool.append(threading.Thread(target=self._watch, args=(stop,), daemon=True))
        for thread in pool:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in pool:
                thread.join()

    def _work(self, stop: threading.Event, number: int) -> None:
        choose = random.Random(number)  # noqa: S311 - traffic, not secrets
        pause = self.threads / self.per_second
        with psycopg.connect(self.url.replace("+psycopg", "", 1), autocommit=True) as conn:
            due = time.perf_counter() + pause * number / self.threads
            while not stop.is_set():
                time.sleep(max(0.0, due - time.perf_counter()))
                values = {"user": choose.choice(self.users), "workshop": choose.choice(self.workshops)}
                try:
                    conn.execute(choose.choice(OLD_APP), values)
                except psycopg.Error as error:
                    self.errors[f"{error.sqlstate} {str(error).splitlines()[0]}"] += 1
                now = time.perf_counter()
                self.latencies_ms.append((now, (now - due) * 1000))
                due += pause

    def _watch(self, stop: threading.Event) -> None:
        with psycopg.connect(self.url.replace("+psycopg", "", 1), autocommit=True) as conn:
            while not stop.wait(LOOK_EVERY_S):
                (waited_ms,) = conn.execute(_WAITED_MS).fetchone() or (None,)
                if waited_ms is not None:
                    self.waits_ms.append((time.perf_counter(), float(waited_ms)))

    def waited_ms(self, since: float = 0.0) -> float:
        """The longest time for which a statement was seen to wait for a table, from the moment ``since`` on."""
        return max((ms for moment, ms in self.waits_ms if moment >= since), default=0.0)

    def worst_ms(self, since: float = 0.0) -> float:
        """The longest latency from the moment ``since`` (of time.perf_counter) on."""
        return max((ms for moment, ms in self.latencies_ms if moment >= since), default=0.0)

    def median_ms(self) -> float:
        """The median latency."""
        return statistics.median(ms for _, ms in self.latencies_ms)


@dataclass(frozen=True)
class TradeCounts:
    """The counts of many concurrent purchases, unlocks, retries and overdrafts."""

    seconds: float
    bought: int
    unlocked: int
    replayed: int
    refused: int
    refunded: int


def trade_concurrently(pool: sa.Engine, config: Config, *, threads: int = 16, seconds: float = 3.0) -> TradeCounts:
    """Buy and spend on a few accounts from ``threads`` threads, as customers with two tabs and bad networks do."""
    with pool.connect() as conn:
        users = list(conn.scalars(sa.text("SELECT id FROM public.users WHERE email LIKE 'user%' LIMIT 8")))
        of_user = "SELECT id FROM public.workshops WHERE user_id = %s"
        workshops = {user: [row[0] for row in conn.exec_driver_sql(of_user, (user,))] for user in users}
    all_there = threading.Barrier(threads)
    customers = [_Customer(number, Ledger(config), workshops) for number in range(threads)]
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as workers:
        for outcome in [workers.submit(customer.work, pool, all_there, seconds) for customer in customers]:
            outcome.result()
    counts = sum((customer.counts for customer in customers), Counter[str]())
    names = ("bought", "unlocked", "replayed", "refused", "refunded")
    return TradeCounts(seconds=time.perf_counter() - started, **{name: counts[name] for name in names})


class _Customer:
    """A customer who buys, unlocks and spends at random, and repeats most requests."""

    def __init__(self, number: int, ledger: Ledger, workshops: dict[UUID, list[UUID]]) -> None:
        self.number = number
        self.ledger = ledger
        self.workshops = workshops
        self.counts: Counter[str] = Counter()
        self.choose = random.Random(number)  # noqa: S311 - a demo, not secrets

    def work(self, pool: sa.Engine, all_there: threading.Barrier, seconds: float) -> None:
        """Work for ``seconds`` once all are connected, and at least for ``LEAST_STEPS``."""
        with pool.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            all_there.wait()
            until = time.perf_counter() + seconds
            for step in itertools.count():
                if step >= LEAST_STEPS and time.perf_counter() > until:
                    return
                user, key = self.choose.choice(list(self.workshops)), f"demo-{self.number}-{step}"
                act = self.choose.choices((self.buy, self.unlock, self.spend), (2, 2, 6))[0]
                try:
                    act(conn, user, key)
                except InsufficientCredits:
                    self.counts["refused"] += 1

    def buy(self, conn: sa.Connection, user: UUID, key: str) -> None:
        pack = self.choose.choice(DEFAULT_PACKS)
        started = self.ledger.start_purchase(
            conn, user, credits=pack.credits, description=f"Purchased {pack.name} pack", key=key
        )
        session = f"cs_{started.id}"
        self.ledger.attach_session(conn, user, started.id, stripe_session_id=session)
        for _ in range(2):  # the webhook, delivered twice
            paid = self.ledger.complete_purchase(
                conn, user, stripe_session_id=session, amount_paid=pack.amount, currency=pack.currency
            )
            self.count(paid, "bought")
        if self.choose.randrange(10) == 0:  # one buyer in ten gets a refund
            self.count(self.ledger.refund(conn, user, started.id, key=f"refund-{key}"), "refunded")

    def unlock(self, conn: sa.Connection, user: UUID, key: str) -> None:
        if owned := self.workshops[user]:
            self.count(self.ledger.consume(conn, user, workshop=self.choose.choice(owned), key=key), "unlocked")

    def spend(self, conn: sa.Connection, user: UUID, key: str) -> None:
        for _ in range(2):  # a double click
            self.count(self.ledger.consume(conn, user, key=key), "unlocked")

    def count(self, done: CreditTransaction, what: str) -> None:
        self.counts["replayed" if done.replayed else what] += 1
