"""Healthy ledgers written by plain SQL, each broken by hand in one way, and what the audit says of it."""

from __future__ import annotations

import datetime as dt
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from tallystick import Config, Progress
from tallystick.audit import CHECKS, AuditReport, audit
from tallystick.declared_tables import daily_sums, days, event_settings, events, stripe_reversals
from tallystick.errors import InvalidArgument, NotMigrated, UnknownUser
from tallystick.schema import CHECKS as CONSTRAINTS
from tallystick.schema import LEDGER
from worlds import SHAPES, World

MONTH_AGO = dt.datetime.now(dt.UTC) - dt.timedelta(days=30)
HOUR_AGO = dt.datetime.now(dt.UTC) - dt.timedelta(hours=1)


class Healthy:
    """Three users whose rows, written without the ledger's code, are as they should be.

    ``ann`` bought 10, unlocked two workshops and got 4 refunded; one purchase failed, one waits. ``bob`` is newer,
    and in debt: he bought 2, unlocked a workshop and got both refunded. ``eve`` did nothing.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.schema = world.schema
        self.users = world.schema.users
        self.ledger = world.schema.credit_transactions
        key_type = world.config.host.users.key_type
        # created in the order of their keys, so that parts of them are in a known order
        self.ann, self.bob, self.eve = sorted(world.key(key_type) for _ in range(3))
        self.shops: dict[str, Any] = dict.fromkeys(["one", "two", "bobs", "locked"])
        self.rows: dict[str, uuid.UUID] = {}
        with self.broken() as conn:  # no triggers, so that the rows come as they are
            self._fill(conn)

    def _fill(self, conn: sa.Connection) -> None:
        for user, sequence, balance in ((self.ann, 4, 4), (self.bob, 3, -1), (self.eve, 0, 0)):
            values = {"key": user, "credit_sequence": sequence, "credit_balance": balance}
            email = {"email": f"{user}@example.com"} if "email" in self.users.c else {}
            conn.execute(sa.insert(self.users).values(**values, **email))
        if self.schema.workshops is not None:
            for name in self.shops:
                self.shops[name] = self.world.key(self.world.config.host.workshops.key_type)
                owner = self.bob if name == "bobs" else self.ann
                marked = None if name == "locked" else MONTH_AGO
                values = {"key": self.shops[name], "owner": owner, "title": name, "credit_consumed_at": marked}
                conn.execute(sa.insert(self.schema.workshops).values(**values))
        buy = {"amount_paid": 7900, "currency": "usd", "status": "completed"}
        self.add(conn, "bought", self.ann, "purchase", 10, 1, 10, stripe_session_id="cs_1", **buy)
        self.add(conn, "unlocked", self.ann, "consumption", -1, 2, 9, workshop="one", idempotency_key="u1")
        self.add(conn, "refunded", self.ann, "refund", -4, 3, 5, refund_of="bought", idempotency_key="r1")
        self.add(conn, "unlocked again", self.ann, "consumption", -1, 4, 4, workshop="two", idempotency_key="u2")
        self.add(conn, "failed", self.ann, "purchase", 3, status="failed")
        self.add(conn, "waiting", self.ann, "purchase", 3, status="pending", at=HOUR_AGO, stripe_session_id="cs_2")
        self.add(conn, "bob bought", self.bob, "purchase", 2, 1, 2, at=HOUR_AGO, **buy)
        self.add(conn, "bob unlocked", self.bob, "consumption", -1, 2, 1, at=HOUR_AGO, workshop="bobs")
        self.add(conn, "bob refunded", self.bob, "refund", -2, 3, -1, at=HOUR_AGO, refund_of="bob bought")

    def add(
        self,
        conn: sa.Connection,
        name: str,
        user: Any,
        type: str,  # noqa: A002  the column's name
        amount: int,
        sequence: int | None = None,
        balance_after: int | None = None,
        *,
        at: dt.datetime = MONTH_AGO,
        status: str = "completed",
        workshop: str | None = None,
        refund_of: str | None = None,
        **values: Any,
    ) -> None:
        self.rows[name] = uuid.uuid4()
        row = {
            "id": self.rows[name],
            "user_id": user,
            "type": type,
            "status": status,
            "amount": amount,
            "sequence": sequence,
            "balance_after": balance_after,
            "description": name,
            "workshop_id": workshop and self.shops[workshop],
            "refund_of": refund_of and self.rows[refund_of],
            "created_at": at,
            "completed_at": at if sequence is not None else None,
            "idempotency_key": None if type == "purchase" else f"{name} {self.rows[name]}",
        }
        conn.execute(sa.insert(self.ledger).values(**row | values))

    def named(self, name: str) -> Any:
        """The key of a row, workshop or user of ours; other names are themselves."""
        users = {"ann": self.ann, "bob": self.bob, "eve": self.eve}
        return {**users, **self.shops, **self.rows}.get(name, name)

    # --- how to break it ---

    def broken(self) -> Any:
        """A database transaction in which no trigger and no foreign key works."""
        return _WithoutTriggers(self.world.engine)

    def drop(self, conn: sa.Connection, *constraints: str) -> None:
        table = conn.dialect.identifier_preparer.format_table(self.ledger)
        for name in constraints:
            conn.exec_driver_sql(f"ALTER TABLE {table} DROP CONSTRAINT {LEDGER}_{name}")

    def drop_index(self, conn: sa.Connection, name: str) -> None:
        schema = conn.dialect.identifier_preparer.quote(self.ledger.schema)
        conn.exec_driver_sql(f"DROP INDEX {schema}.{LEDGER}_{name}")

    def row(self, conn: sa.Connection, name: str, **values: Any) -> None:
        conn.execute(sa.update(self.ledger).where(self.ledger.c.id == self.rows[name]).values(**values))

    def delete(self, conn: sa.Connection, name: str) -> None:
        conn.execute(sa.delete(self.ledger).where(self.ledger.c.id == self.rows[name]))

    def user(self, conn: sa.Connection, user: Any, **values: Any) -> None:
        conn.execute(sa.update(self.users).where(self.users.c.key == user).values(**values))

    def shop(self, conn: sa.Connection, name: str, **values: Any) -> None:
        shops = self.schema.workshops
        conn.execute(sa.update(shops).where(shops.c.key == self.shops[name]).values(**values))

    def audit(self, **arguments: Any) -> AuditReport:
        with self.world.autocommit.connect() as conn:
            return audit(conn, self.world.config, **arguments)


class _WithoutTriggers:
    def __init__(self, engine: sa.Engine) -> None:
        self.begun = engine.begin()

    def __enter__(self) -> sa.Connection:
        conn = self.begun.__enter__()
        conn.exec_driver_sql("SET LOCAL session_replication_role = replica")
        return conn

    def __exit__(self, *error: object) -> None:
        self.begun.__exit__(*error)


@pytest.fixture
def healthy(world: World) -> Healthy:
    return Healthy(world)


PARTS_OF_ONE = {"PART_ROWS": 1, "PARTS": 10**6}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to have every user in a part of its own."""

    def divide() -> None:
        for setting, value in PARTS_OF_ONE.items():
            monkeypatch.setattr(sys.modules[audit.__module__], setting, value)

    return divide


@dataclass(frozen=True)
class Fault:
    """One way to break a healthy ledger; ``at`` is the row, user or workshop that the only finding names."""

    check: str
    at: str
    do: Callable[[Healthy, sa.Connection], None]
    found: str
    title: str = ""


def _deleted_middle(h: Healthy, conn: sa.Connection) -> None:
    h.delete(conn, "refunded")


def _deleted_last(h: Healthy, conn: sa.Connection) -> None:
    h.delete(conn, "bob refunded")


def _deleted_whole_history(h: Healthy, conn: sa.Connection) -> None:
    for name in ("bob bought", "bob unlocked", "bob refunded"):
        h.delete(conn, name)
    if h.schema.workshops is not None:
        h.shop(conn, "bobs", credit_consumed_at=None)


def _repeated_number(h: Healthy, conn: sa.Connection) -> None:
    h.drop_index(conn, "sequence")
    h.add(conn, "again", h.ann, "refund", -4, 3, 5, refund_of="bought")
    h.rows["second"] = max(h.rows["refunded"], h.rows["again"])


def _overdrawn(h: Healthy, conn: sa.Connection) -> None:
    h.drop(conn, "type")
    h.add(conn, "overdrawn", h.bob, "consumption", -1, 4, -2, at=HOUR_AGO)
    h.user(conn, h.bob, credit_sequence=4, credit_balance=-2)


def _wrong_sign(h: Healthy, conn: sa.Connection) -> None:
    h.drop(conn, "type")
    h.add(conn, "backwards", h.ann, "consumption", 1, 5, 5)
    h.user(conn, h.ann, credit_sequence=5, credit_balance=5)


def _nothing(h: Healthy, conn: sa.Connection) -> None:
    h.drop(conn, "type")
    h.row(conn, "waiting", amount=0)


def _without_time(h: Healthy, conn: sa.Connection) -> None:
    h.drop(conn, "status")
    h.row(conn, "unlocked", completed_at=None)


def _failed_but_counted(h: Healthy, conn: sa.Connection) -> None:
    h.drop(conn, "status")
    h.add(conn, "ghost", h.ann, "purchase", 1, 5, 5, status="failed")
    h.user(conn, h.ann, credit_sequence=5, credit_balance=5)


def _numbered_zero(h: Healthy, conn: sa.Connection) -> None:
    h.drop(conn, "status")
    h.row(conn, "waiting", status="completed", sequence=0, balance_after=0, completed_at=HOUR_AGO)


def _waiting_consumption(h: Healthy, conn: sa.Connection) -> None:
    h.drop(conn, "type")
    h.add(conn, "half-done", h.ann, "consumption", -1, status="failed")


def _refund_of_nothing(h: Healthy, conn: sa.Connection) -> None:
    h.drop(conn, "type")
    h.row(conn, "refunded", refund_of=None)


def _purchase_of_purchase(h: Healthy, conn: sa.Connection) -> None:
    h.drop(conn, "type")
    h.row(conn, "waiting", refund_of=h.rows["bought"])


def _no_currency(h: Healthy, conn: sa.Connection) -> None:
    h.drop(conn, "paid")
    h.row(conn, "bought", currency=None)


def _shouted_currency(h: Healthy, conn: sa.Connection) -> None:
    h.drop(conn, "paid")
    h.row(conn, "bought", currency="USD")


def _negative_price(h: Healthy, conn: sa.Connection) -> None:
    h.drop(conn, "paid")
    h.row(conn, "bought", amount_paid=-1)


def _refunded_too_much(h: Healthy, conn: sa.Connection) -> None:
    h.add(conn, "greedy", h.ann, "refund", -7, 5, -3, refund_of="bought")
    h.user(conn, h.ann, credit_sequence=5, credit_balance=-3)


def _reversed_too_much(h: Healthy, conn: sa.Connection) -> None:
    h.add(conn, "reversed", h.ann, "reversal", 2, 5, 6, refund_of="unlocked")
    h.user(conn, h.ann, credit_sequence=5, credit_balance=6)


def _reversal_of_a_purchase(h: Healthy, conn: sa.Connection) -> None:
    h.add(conn, "wrong", h.ann, "reversal", 1, 5, 5, refund_of="bought")
    h.user(conn, h.ann, credit_sequence=5, credit_balance=5)


def _one_sided_merge(h: Healthy, conn: sa.Connection) -> None:
    h.add(conn, "left", h.ann, "transfer", -4, 5, 0, refund_of="bob bought")
    h.user(conn, h.ann, credit_sequence=5, credit_balance=0)


def _held_purchase(h: Healthy, conn: sa.Connection) -> None:
    h.drop(conn, "held")
    h.row(conn, "waiting", held=1)
    h.user(conn, h.ann, credit_held=1, credit_due_at=HOUR_AGO)


def _held_twice(h: Healthy, conn: sa.Connection) -> None:
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)
    h.add(conn, "hold", h.ann, "consumption", -2, status="pending", at=HOUR_AGO, held=2, expires_at=soon)
    h.user(conn, h.ann, credit_held=3, credit_due_at=soon)


SOON = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)


def _hold(
    amount: int, *, sequence: int | None = None, capture_limit: int | None = None
) -> Callable[[Healthy, sa.Connection], None]:
    def plant(h: Healthy, conn: sa.Connection) -> None:
        hold = {"held": 2, "capture_limit": capture_limit, "expires_at": SOON}
        if sequence is None:
            h.add(conn, "hold", h.ann, "consumption", amount, status="pending", at=HOUR_AGO, **hold)
            h.user(conn, h.ann, credit_held=2, credit_due_at=SOON)
        else:
            h.add(conn, "hold", h.ann, "consumption", amount, sequence, 4 + amount, **hold)
            h.user(conn, h.ann, credit_sequence=sequence, credit_balance=4 + amount)

    return plant


def _lot(
    *, amount: int = 3, remaining: int = 3, kept: bool = True, due: dt.datetime | None = SOON
) -> Callable[[Healthy, sa.Connection], None]:
    def plant(h: Healthy, conn: sa.Connection) -> None:
        h.add(conn, "gift", h.ann, "grant", 3, 5, 7, expires_at=SOON)
        h.user(conn, h.ann, credit_sequence=5, credit_balance=7, credit_due_at=due)
        if kept:
            lot = {"id": h.rows["gift"], "user_id": h.ann, "amount": amount, "remaining": remaining}
            conn.execute(sa.insert(h.schema.lots).values(**lot, expires_at=SOON))

    return plant


def _lot_without_end(h: Healthy, conn: sa.Connection) -> None:
    _lot()(h, conn)
    h.row(conn, "gift", expires_at=None)


def _moved(*, by: str) -> Callable[[Healthy, sa.Connection], None]:
    def plant(h: Healthy, conn: sa.Connection) -> None:
        _lot(remaining=1)(h, conn)
        move = {"transaction_id": h.rows.get(by, uuid.uuid4()), "lot_id": h.rows["gift"], "amount": 2}
        conn.execute(sa.insert(h.schema.lot_moves).values(**move))

    return plant


def _lot_not_spent(h: Healthy, conn: sa.Connection) -> None:
    _lot()(h, conn)
    h.add(conn, "spent", h.ann, "consumption", -6, 6, 1)
    h.user(conn, h.ann, credit_sequence=6, credit_balance=1)


def _lot_in_debt(h: Healthy, conn: sa.Connection) -> None:
    _lot()(h, conn)
    h.add(conn, "taken back", h.ann, "refund", -6, 6, 1, refund_of="bought")
    h.add(conn, "more", h.ann, "purchase", 5, 7, 6)
    h.add(conn, "more taken back", h.ann, "refund", -5, 8, 1, refund_of="more")
    h.add(conn, "lost", h.ann, "consumption", -2, 9, -1, held=2, expires_at=HOUR_AGO)
    h.user(conn, h.ann, credit_sequence=9, credit_balance=-1)


def _expired_early(h: Healthy, conn: sa.Connection) -> None:
    _lot(remaining=0)(h, conn)
    h.add(conn, "expired", h.ann, "expiry", -3, 6, 4, at=HOUR_AGO, refund_of="gift")
    move = {"transaction_id": h.rows["expired"], "lot_id": h.rows["gift"], "amount": 3}
    conn.execute(sa.insert(h.schema.lot_moves).values(**move))
    h.user(conn, h.ann, credit_sequence=6, credit_balance=4)


def _refund_of(name: str) -> Callable[[Healthy, sa.Connection], None]:
    return lambda h, conn: h.row(conn, "refunded", refund_of=h.rows[name])


def _refund_of_unknown(h: Healthy, conn: sa.Connection) -> None:
    h.row(conn, "refunded", refund_of=uuid.uuid4())


def _charged_twice(h: Healthy, conn: sa.Connection) -> None:
    h.add(conn, "twice", h.ann, "consumption", -1, 5, 3, at=HOUR_AGO, workshop="one")
    h.user(conn, h.ann, credit_sequence=5, credit_balance=3)


def _charged_two_users(h: Healthy, conn: sa.Connection) -> None:
    h.add(conn, "paid by ann too", h.ann, "consumption", -1, 5, 3, workshop="bobs")
    h.user(conn, h.ann, credit_sequence=5, credit_balance=3)


def _charged_two_before(h: Healthy, conn: sa.Connection) -> None:
    _charged_two_users(h, conn)
    h.shop(conn, "bobs", owner=h.eve)


def _said_by_stripe(name: str, **values: Any) -> Callable[[Healthy, sa.Connection], None]:
    def do(h: Healthy, conn: sa.Connection) -> None:
        h.drop(conn, "paid")
        h.row(conn, name, **values)

    return do


def _deleted(hours: float) -> Callable[[Healthy, sa.Connection], None]:
    """Bob, who spent an hour ago; an hour earlier or later than that."""
    at = HOUR_AGO + dt.timedelta(hours=hours)
    return lambda h, conn: h.user(conn, h.bob, deleted_at=at)


def _deleted_user(user: str) -> Callable[[Healthy, sa.Connection], None]:
    def do(h: Healthy, conn: sa.Connection) -> None:
        conn.execute(sa.delete(h.users).where(h.users.c.key == getattr(h, user)))

    return do


def _stray_pending(h: Healthy, conn: sa.Connection) -> None:
    h.add(conn, "stray", h.eve, "purchase", 3, status="pending", at=HOUR_AGO)
    _deleted_user("eve")(h, conn)


def _deleted_shop(h: Healthy, conn: sa.Connection) -> None:
    conn.execute(sa.delete(h.schema.workshops).where(h.schema.workshops.c.key == h.shops["two"]))


def _shop_of_nobody(h: Healthy, conn: sa.Connection) -> None:
    h.shops["gone"] = h.world.key(h.world.config.host.workshops.key_type)
    h.row(conn, "waiting", workshop_id=h.shops["gone"])


def _same_key(h: Healthy, conn: sa.Connection) -> None:
    h.drop_index(conn, "idempotency_key")
    first, second = sorted(["unlocked", "refunded"], key=lambda name: h.rows[name])
    h.row(conn, first, idempotency_key="same")
    h.row(conn, second, idempotency_key="same")
    h.rows["second"] = h.rows[second]


def _same_session(h: Healthy, conn: sa.Connection) -> None:
    h.drop_index(conn, "stripe_session")
    first, second = sorted(["bought", "bob bought"], key=lambda name: h.rows[name])
    h.row(conn, first, stripe_session_id="cs_same")
    h.row(conn, second, stripe_session_id="cs_same")
    h.rows["second"] = h.rows[second]


def _reversal(**values: Any) -> Callable[[Healthy, sa.Connection], None]:
    """A refund at Stripe of what Bob bought, with these values."""
    defaults = {"kind": "refund", "amount": 3950, "currency": "usd", "status": "succeeded", "status_rank": 1}

    def do(h: Healthy, conn: sa.Connection) -> None:
        h.row(conn, "bob bought", stripe_payment_intent_id="pi_1")
        of = {"id": "re_1", "stripe_payment_intent_id": "pi_1"}
        conn.execute(sa.insert(stripe_reversals).values(**defaults | of | values))

    return do


def _without_amount(h: Healthy, conn: sa.Connection) -> None:
    table = conn.dialect.identifier_preparer.format_table(h.ledger)
    conn.exec_driver_sql(f"ALTER TABLE {table} ALTER amount DROP NOT NULL")
    h.row(conn, "unlocked", amount=None)


def _without_user(h: Healthy, conn: sa.Connection) -> None:
    table = conn.dialect.identifier_preparer.format_table(h.ledger)
    conn.exec_driver_sql(f"ALTER TABLE {table} ALTER user_id DROP NOT NULL")
    h.row(conn, "waiting", user_id=None)


def _lost_event(h: Healthy, conn: sa.Connection) -> None:
    since = HOUR_AGO - dt.timedelta(days=1)
    conn.execute(sa.update(event_settings).values(recorded_since=since))
    for name, kind in (
        ("bob bought", "purchase.completed"),
        ("bob refunded", "refund.completed"),
        ("bob unlocked", "balance.low"),
    ):
        conn.execute(sa.insert(events).values(position=1, kind=kind, transaction_id=h.rows[name]))


def _sum_without_rows(_h: Healthy, conn: sa.Connection) -> None:
    day = dt.date(2020, 1, 1)
    conn.execute(sa.insert(days).values(day=day, writers_before=1, closed_at=sa.func.now()))
    conn.execute(sa.insert(daily_sums).values(day=day, kind="grant", currency="", credits=5, paid=0))


FAULTS = [
    Fault("gapless_sequence", "unlocked again", _deleted_middle, "sequence 4"),
    Fault("gapless_sequence", "second", _repeated_number, "sequence 3", "a number twice"),
    Fault("chain_arithmetic", "bob refunded", lambda h, c: h.row(c, "bob refunded", amount=-1), "balance_after -1"),
    Fault("user_sequence", "bob", _deleted_last, "credit_sequence 3 with balance -1", "last row deleted"),
    Fault("user_sequence", "bob", _deleted_whole_history, "credit_sequence 3", "all rows deleted"),
    Fault("user_sequence", "eve", lambda h, c: h.user(c, h.eve, credit_sequence=-1), "credit_sequence -1", "negative"),
    Fault("user_balance", "ann", lambda h, c: h.user(c, h.ann, credit_balance=40), "credit_balance 40"),
    Fault("user_balance", "eve", lambda h, c: h.user(c, h.eve, credit_balance=1), "credit_balance 1", "no rows at all"),
    Fault("unknown_user", "bob", _deleted_user("bob"), "credit transactions: 3"),
    Fault("unknown_user", "eve", _stray_pending, "credit transactions: 1", "only a pending row"),
    Fault("no_overdraft", "overdrawn", _overdrawn, "balance_after -2 after a consumption of -1"),
    Fault("amount_sign", "backwards", _wrong_sign, "amount 1"),
    Fault("amount_sign", "waiting", _nothing, "amount 0", "zero"),
    Fault("completed", "unlocked", _without_time, "completed_at None"),
    Fault("completed", "ghost", _failed_but_counted, "sequence 5", "failed, and yet counted"),
    Fault("sequence_positive", "waiting", _numbered_zero, "sequence 0"),
    Fault("only_purchases_wait", "half-done", _waiting_consumption, "status failed"),
    Fault("refund_of", "refunded", _refund_of_nothing, "refund_of None"),
    Fault("refund_of", "waiting", _purchase_of_purchase, "refund_of ", "a purchase that refunds"),
    Fault("paid", "bought", _no_currency, "currency None"),
    Fault("paid", "bought", _shouted_currency, "currency USD", "capitals"),
    Fault("paid", "bought", _negative_price, "amount_paid -1", "negative"),
    Fault("refund_excess", "bought", _refunded_too_much, "11 credits in 2 rows that name it"),
    Fault("refundable", "refunded", _refund_of("failed"), "a failed purchase", "failed"),
    Fault("refundable", "refunded", _refund_of("unlocked"), "a completed consumption", "no purchase"),
    Fault("refundable", "refunded", _refund_of("bob bought"), "a completed purchase of user", "another user's"),
    Fault("unknown_purchase", "refunded", _refund_of_unknown, "none"),
    Fault("refund_excess", "unlocked", _reversed_too_much, "2 credits in 1 rows that name it", "a reversal"),
    Fault("refundable", "wrong", _reversal_of_a_purchase, "a completed purchase of user", "a reversal of a purchase"),
    Fault("hold_shape", "waiting", _held_purchase, "held 1", "a purchase that holds"),
    Fault("hold_amount", "hold", _hold(-1), "amount -1, held 2"),
    Fault("hold_amount", "hold", _hold(-2, capture_limit=1), "capture_limit 1", "a limit below what it holds"),
    Fault("hold_amount", "hold", _hold(-2, capture_limit=0), "capture_limit 0", "closed, and yet open"),
    Fault("hold_amount", "hold", _hold(-4, sequence=5, capture_limit=3), "amount -4", "charged beyond its limit"),
    Fault("held", "ann", lambda h, c: h.user(c, h.ann, credit_held=2), "credit_held 2"),
    Fault("held", "ann", _held_twice, "credit_held 3", "a hold counted twice"),
    Fault("lot", "gift", _lot(remaining=2), "2 left"),
    Fault("lot", "gift", _lot(amount=4, remaining=4), "4 left", "more than was given"),
    Fault("lot", "gift", _lot_without_end, "3 left of 3, until ", "the row without an end"),
    Fault("lot_moves", "gift", _moved(by="unlocked"), "a move of 2 by", "more than the row took"),
    Fault("lot_moves", "gift", _moved(by="bob refunded"), "a move of 2 by", "by another user's row"),
    Fault("lot_moves", "gift", _moved(by="no row"), "a move of 2 by", "by a row that is gone"),
    Fault("lot_kept", "gift", _lot(kept=False), "none"),
    Fault("lots_covered", "ann", _lot_not_spent, "3 left"),
    Fault("lots_covered", "ann", _lot_in_debt, "3 left", "in debt"),
    Fault("expiry_in_time", "expired", _expired_early, "completed_at"),
    Fault("due", "ann", _lot(due=None), "credit_due_at None"),
    Fault("workshop_charged_once", "twice", _charged_twice, "2; this is the last"),
    Fault("workshop_charged_once", "paid by ann too", _charged_two_users, "2; this is the last", "by two users"),
    Fault("workshop_charged_once", "bob unlocked", _charged_two_before, "2; this is the last", "by two owners before"),
    Fault("workshop_marked", "unlocked", lambda h, c: h.shop(c, "one", credit_consumed_at=None), "is empty"),
    Fault("workshop_paid", "locked", lambda h, c: h.shop(c, "locked", credit_consumed_at=HOUR_AGO), "none, but"),
    Fault("unknown_workshop", "unlocked again", _deleted_shop, "workshop_id "),
    Fault("workshop_link", "waiting", _shop_of_nobody, "workshop_id ", "on a purchase"),
    Fault(
        "workshop_link", "refunded", lambda h, c: h.row(c, "refunded", workshop_id=h.shops["locked"]), "workshop_id "
    ),
    *(
        Fault("only_purchases_are_paid", at, _said_by_stripe(at, **values), found, next(iter(values)))
        for at, values, found in (
            ("unlocked", {"stripe_session_id": "cs_9"}, "cs_9"),
            ("refunded", {"amount_paid": 4, "currency": "usd"}, "amount_paid 4"),
            ("bob unlocked", {"stripe_payment_intent_id": "pi_9"}, "another"),
            ("bob refunded", {"stripe_price_id": "price_9"}, "another"),
        )
    ),
    Fault("key_shape", "unlocked", lambda h, c: h.row(c, "unlocked", idempotency_key=None), "None"),
    Fault("key_shape", "refunded", lambda h, c: h.row(c, "refunded", idempotency_key=""), "idempotency_key ", "empty"),
    Fault("key_shape", "waiting", lambda h, c: h.row(c, "waiting", idempotency_key="k" * 256), "kkk", "too long"),
    Fault("spent_after_deletion", "bob unlocked", _deleted(-1), "-1 credits at"),
    Fault(
        "completed_in_order",
        "unlocked again",
        lambda h, c: h.row(c, "refunded", completed_at=MONTH_AGO + dt.timedelta(seconds=1)),
        "of row 4",
    ),
    Fault(
        "created_before_completed",
        "unlocked",
        lambda h, c: h.row(c, "unlocked", created_at=MONTH_AGO + dt.timedelta(seconds=1)),
        "created_at ",
    ),
    Fault("unique_idempotency_key", "second", _same_key, "an earlier row"),
    Fault("unique_stripe_session", "second", _same_session, "an earlier row"),
    Fault("settled_within_a_day", "waiting", lambda h, c: h.row(c, "waiting", created_at=MONTH_AGO), "cs_2"),
    Fault("money_and_credits", "bob bought", _reversal(), "it has taken none; the purchase has 7900 usd on record"),
    Fault("money_and_credits", "bob bought", _reversal(status="failed", applied="share"), "it has taken some"),
    Fault("money_and_credits", "bob bought", _reversal(kind="dispute", status="lost"), "it has taken none"),
    Fault("merged_on_both_sides", "left", _one_sided_merge, "none behind refund_of"),
    Fault("event_recorded", "bob unlocked", _lost_event, "no event"),
    Fault("daily_sums", "day 2020-01-01", _sum_without_rows, "+5 and 0 in"),
    Fault("tally", "all users", _without_amount, "sums that differ"),
    Fault("unknown_user", "no user", _without_user, "credit transactions: 1", "a row without one"),
]


def test_each_fault_is_found_and_nothing_else(any_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = Healthy(any_world)
    faults = [
        fault for fault in FAULTS if healthy.schema.workshops is not None or not CHECKS[fault.check].needs_workshops
    ]
    with healthy.broken() as conn:
        for fault in faults:
            with conn.begin_nested() as savepoint:
                fault.do(healthy, conn)
                findings = audit(conn, any_world.config).findings
                assert [finding.check for finding in findings] == [fault.check], fault
                (finding,) = findings
                assert fault.found in finding.found, fault
                named = (finding.transaction, finding.workshop, finding.user, finding.where)
                assert healthy.named(fault.at) in named, fault
                assert "{" not in f"{finding.expected}{finding.likely_cause}{finding.what_to_do}", fault
                # each user by itself; and too many suspects to look at them alone
                for settings in (PARTS_OF_ONE, {"SUSPECTS": 0}):
                    with monkeypatch.context() as patch:
                        for setting, value in settings.items():
                            patch.setattr(sys.modules[audit.__module__], setting, value)
                        again = audit(conn, any_world.config).findings
                    assert [finding.check for finding in again] == [fault.check], (settings, fault)
                savepoint.rollback()


def test_each_check_and_each_constraint_has_its_fault() -> None:
    # what an app with balances of its own raises is in tests/migrations/test_adopt.py
    assert {fault.check for fault in FAULTS} == set(CHECKS) - {"balance_opened"}
    assert set(CONSTRAINTS) == {"type", "status", "paid", "held"}  # each is dropped by a fault above


def test_a_healthy_ledger_has_no_findings(any_world: World, small_parts: Callable[[], None]) -> None:
    healthy = Healthy(any_world)
    for _ in range(2):
        report = healthy.audit()
        assert report.clean
        assert not report.truncated
        assert (report.users, report.rows) == (3, 9)
        small_parts()
    assert healthy.audit(user=healthy.ann).rows == 6
    assert healthy.audit(since=MONTH_AGO - dt.timedelta(days=1)).users == 2
    shops = {name for name, check in CHECKS.items() if check.needs_workshops}
    assert set(CHECKS) - set(report.checked) == (set() if any_world.schema.workshops is not None else shops)


def _each_change(h: Healthy) -> list[tuple[str, sa.Update | sa.Delete]]:
    """Every completed row's every number off by one, or the row gone; every user's two numbers."""
    changes: list[tuple[str, sa.Update | sa.Delete]] = []
    for name, key in h.rows.items():
        if name in ("failed", "waiting"):
            continue
        this = h.ledger.c.id == key
        columns = (h.ledger.c.amount, h.ledger.c.balance_after, h.ledger.c.sequence)
        changes += [
            (f"{name}: {column.name} {by:+}", sa.update(h.ledger).where(this).values({column: column + by}))
            for column in columns
            for by in (-1, 1, 100)
        ]
        changes += [
            (f"{name}: deleted", sa.delete(h.ledger).where(this)),
            (f"{name}: given to eve", sa.update(h.ledger).where(this).values(user_id=h.eve)),
            (f"{name}: no longer completed", sa.update(h.ledger).where(this).values(status="pending")),
            *(
                (f"{name}: {column.name} missing", sa.update(h.ledger).where(this).values({column: None}))
                for column in columns[1:]
            ),
        ]
    for user in (h.ann, h.bob, h.eve):
        this = h.users.c.key == user
        changes += [
            (f"user {user}: {column.name}", sa.update(h.users).where(this).values({column: column + 1}))
            for column in (h.users.c.credit_balance, h.users.c.credit_sequence)
        ]
    return changes


def test_no_single_change_of_what_counts_goes_unnoticed(healthy: Healthy) -> None:
    with healthy.broken() as conn:
        healthy.drop(conn, *CONSTRAINTS)
        healthy.drop_index(conn, "sequence")
        for what, change in _each_change(healthy):
            with conn.begin_nested() as savepoint:
                conn.execute(change)
                assert not audit(conn, healthy.world.config).clean, what
                savepoint.rollback()
        assert audit(conn, healthy.world.config).clean


def test_no_number_is_too_large_to_be_judged(healthy: Healthy) -> None:
    low, high = -(2**31), 2**31 - 1
    with healthy.broken() as conn:
        healthy.drop(conn, *CONSTRAINTS)
        for name, (amount, sequence, balance) in {
            "unlocked": (high, 2, low),
            "unlocked again": (low, high, high),
            "bob refunded": (low, high - 1, low),
            "bob unlocked": (1, low, high),
        }.items():
            healthy.row(conn, name, amount=amount, sequence=sequence, balance_after=balance)
        healthy.user(conn, healthy.bob, credit_sequence=low, credit_balance=low)
        healthy.user(conn, healthy.eve, credit_sequence=high, credit_balance=high)
        healthy.drop_index(conn, "sequence")
        healthy.add(conn, "beyond", healthy.ann, "purchase", 1, high, 0)  # after the highest number, the same again
    assert {finding.check for finding in healthy.audit().findings} >= {"gapless_sequence", "user_sequence"}


def test_what_nobody_did_wrong_is_no_finding(healthy: Healthy) -> None:
    shops = healthy.schema.workshops
    with healthy.world.engine.begin() as conn:
        conn.execute(sa.delete(shops).where(shops.c.key == healthy.shops["one"]))  # the host's own, hard delete
        conn.execute(sa.update(healthy.users).values(deleted_at=sa.func.now()))
    with healthy.broken() as conn:
        nullable = conn.dialect.identifier_preparer.format_table(shops)
        conn.exec_driver_sql(f"ALTER TABLE {nullable} ALTER user_id DROP NOT NULL")
        healthy.shop(conn, "two", owner=None)
    assert healthy.audit().findings == ()
    with healthy.broken() as conn:
        healthy.row(conn, "unlocked again", completed_at=MONTH_AGO - dt.timedelta(hours=1))  # the clock was set back
    report = healthy.audit()
    assert report.clean
    assert {finding.check for finding in report.findings} == {"completed_in_order", "created_before_completed"}
    assert "completed_in_order" not in {finding.check for finding in healthy.audit(quick=True).findings}


@pytest.mark.parametrize("shape", ["uuid", "clerk", "quoted"])
def test_a_workshop_that_is_handed_over_or_put_back_is_no_fault(
    shape: str, make_world: Callable[..., World], small_parts: Callable[[], None]
) -> None:
    world = make_world(shape)
    buyer, heir = world.user(credits=5), world.user(credits=5)
    handed, put_back = world.workshop(buyer), world.workshop(buyer)
    shops = world.schema.workshops
    with world.autocommit.connect() as conn:
        for workshop in (handed, put_back):
            world.ledger.consume(conn, buyer, workshop=workshop, key=str(workshop))
        conn.execute(sa.update(shops).where(shops.c.key == handed).values(owner=heir))
        # deleted, and put back from a backup of the host's
        where = shops.c.key == put_back
        kept = conn.execute(sa.select(shops).where(where)).one()._mapping
        conn.execute(sa.delete(shops).where(where))
        assert audit(conn, world.config).findings == ()
        conn.execute(sa.insert(shops).values({column.key: kept[column] for column in shops.c}))
        for _ in range(2):
            assert audit(conn, world.config).findings == ()
            small_parts()
        # and one that was marked by hand is still found
        conn.execute(sa.update(shops).where(where).values(credit_consumed_at=MONTH_AGO))
        assert [finding.check for finding in audit(conn, world.config).findings] == ["workshop_paid"]


def test_a_deletion_that_took_its_time_is_no_fault(healthy: Healthy) -> None:
    """It dates from the beginning of its transaction, and the user spent until it came to the row."""
    with healthy.broken() as conn:
        _deleted(-1 / 60)(healthy, conn)
    assert healthy.audit().findings == ()
    with healthy.broken() as conn:  # a host's own column, without a time zone: it holds UTC
        table = conn.dialect.identifier_preparer.format_table(healthy.users)
        conn.exec_driver_sql(
            f"ALTER TABLE {table} ALTER deleted_at TYPE timestamp(0) USING deleted_at AT TIME ZONE 'UTC'"
        )
        conn.exec_driver_sql("SET LOCAL TimeZone = 'Asia/Kolkata'")
        assert audit(conn, healthy.world.config).findings == ()


def test_a_workshop_that_nobody_owns_and_nobody_paid_for(healthy: Healthy, small_parts: Callable[[], None]) -> None:
    with healthy.broken() as conn:
        nullable = conn.dialect.identifier_preparer.format_table(healthy.schema.workshops)
        conn.exec_driver_sql(f"ALTER TABLE {nullable} ALTER user_id DROP NOT NULL")
        healthy.shop(conn, "locked", owner=None, credit_consumed_at=HOUR_AGO)
    small_parts()
    (finding,) = healthy.audit().findings
    assert (finding.check, finding.workshop, finding.user) == ("workshop_paid", healthy.shops["locked"], None)


def test_a_reversal_takes_an_unlocking_back(healthy: Healthy) -> None:
    with healthy.broken() as conn:
        healthy.add(conn, "reversed", healthy.ann, "reversal", 1, 5, 5, workshop="one", refund_of="unlocked")
        healthy.user(conn, healthy.ann, credit_sequence=5, credit_balance=5)
        healthy.shop(conn, "one", credit_consumed_at=None)
    assert healthy.audit().clean
    with healthy.broken() as conn:
        healthy.shop(conn, "one", credit_consumed_at=HOUR_AGO)
    assert [finding.check for finding in healthy.audit().findings] == ["workshop_paid"]


def test_one_user_or_the_lately_moved_ones(healthy: Healthy) -> None:
    with healthy.broken() as conn:
        healthy.user(conn, healthy.ann, credit_balance=40)
        healthy.user(conn, healthy.bob, credit_balance=40)
        healthy.shop(conn, "locked", credit_consumed_at=HOUR_AGO)
        healthy.shop(conn, "bobs", credit_consumed_at=None)
    found = {
        name: [(finding.check, finding.user) for finding in healthy.audit(**arguments).findings]
        for name, arguments in {
            "ann": {"user": healthy.ann},
            "ann as text": {"user": str(healthy.ann)},
            "bob": {"user": healthy.bob},
            "eve": {"user": healthy.eve},
            "today": {"since": HOUR_AGO - dt.timedelta(minutes=1), "user": healthy.bob},
            "tomorrow": {"since": dt.datetime.now(dt.UTC) + dt.timedelta(days=1)},
        }.items()
    }
    of_ann = [("user_balance", healthy.ann), ("workshop_paid", healthy.ann)]
    of_bob = [("user_balance", healthy.bob), ("workshop_marked", healthy.bob)]
    assert found == {"ann": of_ann, "ann as text": of_ann, "bob": of_bob, "eve": [], "today": of_bob, "tomorrow": []}
    with healthy.broken() as conn:
        healthy.delete(conn, "waiting")  # ann's only recent row
    report = healthy.audit(since=HOUR_AGO - dt.timedelta(minutes=1))
    assert [(finding.check, finding.user) for finding in report.findings] == of_bob
    assert (report.users, report.rows) == (1, 3)


@pytest.mark.parametrize(
    "values",
    [
        {"applied": "share"},
        {"status": "failed"},
        {"kind": "dispute", "status": "won"},
        {"kind": "dispute", "status": "warning_needs_response"},
        {"stripe_payment_intent_id": "pi_of_another_sale"},
    ],
)
def test_refunds_that_the_ledger_followed_are_no_finding(healthy: Healthy, values: dict[str, str]) -> None:
    with healthy.broken() as conn:
        _reversal(**values)(healthy, conn)
    assert healthy.audit().findings == ()


def test_the_limit_is_each_checks_own(healthy: Healthy, small_parts: Callable[[], None]) -> None:
    with healthy.broken() as conn:
        conn.execute(sa.update(healthy.users).values(credit_balance=77))
        healthy.row(conn, "waiting", created_at=MONTH_AGO)
    expected = ["user_balance", "user_balance", "settled_within_a_day"]
    for _ in range(2):
        report = healthy.audit(limit=2)
        assert [finding.check for finding in report.findings] == expected
        assert report.truncated
        assert not healthy.audit(limit=3).truncated
        small_parts()


@pytest.mark.parametrize(
    ("check", "do"),
    [
        ("user_balance", lambda h, conn: h.user(conn, h.ann, credit_balance=40)),
        ("workshop_marked", lambda h, conn: h.shop(conn, "one", credit_consumed_at=None)),
        ("workshop_paid", lambda h, conn: h.shop(conn, "locked", credit_consumed_at=HOUR_AGO)),
    ],
)
@pytest.mark.parametrize("shape", ["uuid", "clerk", "quoted"])
def test_the_statement_to_type_mends_it(
    check: str, do: Callable[[Healthy, sa.Connection], None], shape: str, make_world: Callable[..., World]
) -> None:
    healthy = Healthy(make_world(shape))
    with healthy.broken() as conn:
        do(healthy, conn)
    (finding,) = healthy.audit().findings
    assert finding.check == check
    with healthy.world.engine.begin() as conn:
        conn.exec_driver_sql(finding.what_to_do[finding.what_to_do.index("UPDATE") :].replace("%", "%%"))
    assert healthy.audit().clean


def test_keys_of_another_collation(make_world: Callable[..., World], small_parts: Callable[[], None]) -> None:
    healthy = Healthy(make_world("clerk"))
    with healthy.broken() as conn:
        conn.exec_driver_sql(f"ALTER TABLE {LEDGER} ALTER user_id TYPE text COLLATE ucs_basic")
        conn.exec_driver_sql(f"ALTER TABLE {LEDGER} ALTER workshop_id TYPE text COLLATE ucs_basic")
        conn.exec_driver_sql("ALTER TABLE workshops ALTER user_id TYPE text COLLATE ucs_basic")
    small_parts()
    assert healthy.audit().clean
    assert healthy.audit(since=MONTH_AGO).users == 2
    with healthy.broken() as conn:
        _deleted_middle(healthy, conn)
        _refund_of_unknown(healthy, conn)
        _deleted_shop(healthy, conn)
        healthy.shop(conn, "one", owner=healthy.bob)
        healthy.user(conn, healthy.eve, credit_balance=1)
    assert [finding.check for finding in healthy.audit().findings] == [
        "gapless_sequence",
        "user_balance",
        "unknown_workshop",
    ]


def test_progress_ends_at_all_rows(healthy: Healthy, small_parts: Callable[[], None]) -> None:
    seen: list[Progress] = []
    small_parts()
    healthy.audit(progress=seen.append)
    assert len(seen) > 1
    assert seen == sorted(seen, key=lambda now: now.done)
    assert all(now.total and now.done <= now.total for now in seen)
    assert seen[-1] == Progress("ledger rows", 9, 9)


def test_an_interrupted_audit_goes_on(healthy: Healthy, small_parts: Callable[[], None]) -> None:
    with healthy.broken() as conn:
        for user in (healthy.ann, healthy.bob):
            healthy.user(conn, user, credit_balance=40)
    whole = healthy.audit()
    assert len(whole.findings) == 2
    small_parts()
    parts: list[AuditReport] = []

    def stop_after_the_first(part: AuditReport) -> None:
        parts.append(part)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        healthy.audit(each=stop_after_the_first)
    while (last := parts[-1].last) is not None:
        with suppress(KeyboardInterrupt):
            healthy.audit(after=last, each=stop_after_the_first)
    assert len(parts) > 2
    assert sum(part.users for part in parts) == whole.users
    assert sum(part.rows for part in parts) == whole.rows
    found = [finding for part in parts for finding in part.findings]
    assert sorted(map(repr, found)) == sorted(map(repr, whole.findings))


def test_reports_of_ranges_together_keep_to_the_limit(healthy: Healthy, small_parts: Callable[[], None]) -> None:
    with healthy.broken() as conn:
        for user in (healthy.ann, healthy.bob):
            healthy.user(conn, user, credit_balance=40)
    small_parts()
    parts: list[AuditReport] = []
    report = healthy.audit(limit=1, each=parts.append)
    assert [finding for part in parts for finding in part.findings] == list(report.findings)
    assert report.truncated
    assert parts[-1].truncated
    assert report.last is None


def test_it_changes_nothing_and_leaves_the_callers_transaction_alone(healthy: Healthy) -> None:
    with healthy.broken() as conn:
        healthy.user(conn, healthy.ann, credit_balance=40)
    with Session(healthy.world.engine) as session:
        session.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
        report = audit(session, healthy.world.config)
        assert [finding.check for finding in report.findings] == ["user_balance"]
        assert session.in_transaction()


def test_arguments_that_make_no_sense(healthy: Healthy) -> None:
    for arguments, words in (
        ({"limit": 0}, "limit=0"),
        ({"limit": "5"}, "limit='5': pass a whole number of 1 or more"),
        ({"quick": "no"}, "quick='no': pass True or False"),
        ({"since": "2026-01-01"}, "since='2026-01-01': pass a datetime with a time zone"),
        ({"user": uuid.uuid4(), "after": uuid.uuid4()}, "pass only one of them"),
        ({"since": dt.datetime(2026, 1, 1)}, "time zone"),  # noqa: DTZ001  the point of the case
        ({"user": "nobody"}, "no uuid key"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            healthy.audit(**arguments)
    with pytest.raises(UnknownUser, match="nor in the ledger"):
        healthy.audit(user=uuid.uuid4())


def test_a_database_that_is_not_migrated(fresh_database: Callable[..., str]) -> None:
    engine = sa.create_engine(fresh_database(), poolclass=sa.NullPool)
    for ddl in ("SELECT 1", SHAPES["uuid"].ddl):
        with engine.begin() as conn:
            conn.exec_driver_sql(ddl)
        with engine.connect() as conn, pytest.raises(NotMigrated, match="tallystick migrate apply"):
            audit(conn, Config())


def test_credits_that_a_hold_has_kept_since_the_callers_transaction_began_are_no_fault(world: World) -> None:
    user, soon = world.user(), dt.datetime.now(dt.UTC) + dt.timedelta(seconds=0.5)
    with world.autocommit.connect() as conn:
        world.ledger.grant(conn, user, credits=5, key="g", description="d", expires_at=soon)
        world.ledger.hold(conn, user, credits=5, key="h")
    with world.engine.begin() as conn, world.autocommit.connect() as another:
        assert conn.scalar(sa.func.now()) < soon
        time.sleep(0.6)
        world.ledger.grant(another, user, credits=1, key="later", description="d")  # which finds that they expired
        assert audit(conn, world.config).findings == ()


def test_live_traffic_never_looks_like_a_fault(world: World) -> None:
    """30,000 rows; buyers, spenders and refunders at work; audits of the whole and in parts, again and again."""
    with world.engine.begin() as conn:
        conn.exec_driver_sql("SET LOCAL session_replication_role = replica")
        conn.exec_driver_sql(
            "INSERT INTO users (id, email, credit_balance, credit_sequence)"
            " SELECT md5(n::text)::uuid, n || '@example.com', 20, 20 FROM generate_series(1, 1500) n"
        )
        conn.exec_driver_sql(
            f"INSERT INTO {LEDGER} (id, user_id, type, status, amount, balance_after, sequence, description,"
            " completed_at) SELECT md5(n || ' ' || k)::uuid, md5(n::text)::uuid, 'purchase', 'completed', 1, k, k,"
            " 'Purchased 1', now() FROM generate_series(1, 20) k, generate_series(1, 1500) n"
        )
    users = [world.user(credits=50) for _ in range(20)]
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(mine: list[Any]) -> None:
        try:
            with world.autocommit.connect() as conn:
                while not stop.is_set():
                    for user in mine:
                        bought = world.buy(conn, user, 2)
                        world.ledger.consume(conn, user, workshop=world.workshop(user), key=str(uuid.uuid4()))
                        world.ledger.refund(conn, user, bought.id, credits=1, key=str(uuid.uuid4()))
                        world.ledger.start_purchase(conn, user, credits=1, description="left")
        except BaseException as error:  # noqa: BLE001  shown by the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(users[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    try:
        with world.autocommit.connect() as conn:
            first = audit(conn, world.config)
            reports = [first, *(audit(conn, world.config) for _ in range(4))]
            small = sys.modules[audit.__module__]
            assert first.rows < small.PART_ROWS
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(small, "PART_ROWS", 6_000)
                reports += [audit(conn, world.config) for _ in range(4)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert [report.findings for report in reports if not report.clean] == []
    assert reports[-1].rows > first.rows > 30_000
