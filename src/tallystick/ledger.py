"""The ledger: buy, spend, give back, and read. Every balance change is one SQL statement and one round trip.

Each operation's first argument is the caller's ``Connection`` or ``Session``; nothing here opens, commits, rolls
back or retries a database transaction, so a host can create a workshop and spend the credit for it in one. From
asyncio: ``await aconn.run_sync(ledger.consume, user, workshop=…, key=…)``.

Why one statement is enough, and where it is not. A statement that waited for a row lock sees the newest version of
the rows it locks; all else it reads is as of its start. ``consume`` depends only on rows it locks and on unique
indexes. ``refund`` depends on other rows (what was refunded before), so it reads the user's ``credit_sequence`` with
and without the lock and writes only if both agree: nobody completed anything in between, and the older view is still
true. If they differ nothing was written, and the statement runs again on a new view.
"""

from __future__ import annotations

import datetime as dt
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from uuid_utils.compat import uuid7

from tallystick.config import Config
from tallystick.database import DbConnection, run
from tallystick.errors import (
    BalanceOutOfRange,
    Conflict,
    IdempotencyKeyReused,
    InsufficientCredits,
    InvalidArgument,
    Key,
    LedgerError,
    LedgerInconsistent,
    PurchaseNotCompleted,
    PurchaseNotPending,
    RefundExceedsPurchase,
    ReinstatementExceedsRefunds,
    SessionConflict,
    UnknownPurchase,
    UnknownUser,
    UnknownWorkshop,
    UserDeleted,
    WorkshopDeleted,
    WorkshopNotOwned,
    WorkshopUnaccounted,
    shown,
)
from tallystick.schema import (
    INT32_MAX,
    INT32_MIN,
    INT64_MAX,
    CreditTransactionStatus,
    CreditTransactionType,
    Schema,
)
from tallystick.statements import statements

PURCHASE, CONSUMPTION, REFUND, GRANT = CreditTransactionType
PENDING, COMPLETED, FAILED = CreditTransactionStatus

TEXT_MAX = 10_000
KEY_MAX = 255
HISTORY_MAX = 1_000

# A statement that finds nothing to do, though nothing speaks against it, met a change in between and runs again.
# In autocommit each run needs a quiet moment of one user's ledger; this many without one is no longer chance.
_TRIES = 200


@dataclass(frozen=True, slots=True)
class CreditTransaction:
    """One row of the ledger, as the columns of ``credit_transactions``.

    ``replayed`` is true when the call changed nothing because its effect was there already: the same key again,
    a redelivered completion, a workshop that is already unlocked.
    """

    id: UUID
    user_id: Key
    type: CreditTransactionType
    status: CreditTransactionStatus
    amount: int
    balance_after: int | None
    sequence: int | None
    description: str
    workshop_id: Key | None
    refund_of: UUID | None
    stripe_session_id: str | None
    stripe_payment_intent_id: str | None
    stripe_price_id: str | None
    amount_paid: int | None
    currency: str | None
    idempotency_key: str | None
    created_at: dt.datetime
    completed_at: dt.datetime | None
    replayed: bool = False

    @property
    def cursor(self) -> str:
        """Where this row stands in its user's history; pass it as ``before`` to read on from here."""
        return str(self.id if self.sequence is None else self.sequence)


_WIDTH = 18  # columns of a ledger row


@dataclass(frozen=True, slots=True)
class Consume:
    """One item of ``consume_many``: the arguments of ``consume``."""

    user: Key
    workshop: Key | None = field(default=None, kw_only=True)
    amount: int = field(default=1, kw_only=True)
    key: str = field(kw_only=True)
    description: str | None = field(default=None, kw_only=True)


class AccessReason(StrEnum):
    """Why a workshop is open, or is not."""

    UNLOCKED = "unlocked"
    GRANDFATHERED = "grandfathered"
    PAYWALL_OFF = "paywall_off"
    LOCKED = "locked"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Access:
    """Whether a workshop is open, and why."""

    open: bool
    reason: AccessReason


class Ledger:
    """The operations for one configuration. Holds statements only: no connection, no state; share it freely."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.schema = Schema.of(config.host)
        self.statements = statements(self.schema)

    # --- purchases: pending → completed or failed ---

    def start_purchase(
        self,
        conn: DbConnection,
        user: Key,
        *,
        credits: int,
        description: str,
        key: str | None = None,
        stripe_price_id: str | None = None,
    ) -> CreditTransaction:
        """Record that ``user`` is about to buy ``credits``; the balance does not move.

        Call it before asking Stripe for a session: the row's ``id`` is then Stripe's idempotency key and
        ``client_reference_id``, and what will be granted is this row's own amount, whatever the catalogue says later.

        Raises:
            InvalidArgument, UnknownUser, UserDeleted, IdempotencyKeyReused.
        """
        values = {
            "p_id": uuid7(),
            "p_user": self.schema.user_key(user),
            "p_amount": _whole("credits", credits, 1, INT32_MAX),
            "p_description": _text("description", description),
            "p_key": None if key is None else _text("key", key, KEY_MAX),
            "p_price": None if stripe_price_id is None else _text("stripe_price_id", stripe_price_id, KEY_MAX),
        }

        def explain(facts: _Facts) -> CreditTransaction | None:
            if facts.prior:
                return _replay(facts.prior, key, type=PURCHASE, amount=credits)
            facts.require_user()
            return None

        return self._write(conn, "start_purchase", values, explain)

    def attach_session(
        self,
        conn: DbConnection,
        user: Key,
        id: UUID,
        *,
        stripe_session_id: str,
        stripe_payment_intent_id: str | None = None,
    ) -> CreditTransaction:
        """Store the Stripe session of a purchase, and its payment intent once there is one.

        Doing it again with the same session changes nothing; the first payment intent stays.

        Raises:
            InvalidArgument, UnknownPurchase, SessionConflict: one of the two is already tied to another.
        """
        values = {
            "p_user": self.schema.user_key(user),
            "p_purchase": _uuid("id", id),
            "p_session": _text("stripe_session_id", stripe_session_id, KEY_MAX),
            "p_intent": None
            if stripe_payment_intent_id is None
            else _text("stripe_payment_intent_id", stripe_payment_intent_id, KEY_MAX),
        }

        def explain(facts: _Facts) -> CreditTransaction | None:
            purchase = facts.require_purchase(id)
            stored = purchase.stripe_payment_intent_id is not None or stripe_payment_intent_id is None
            if purchase.stripe_session_id == stripe_session_id and stored:
                return replace(purchase, replayed=True)
            facts.require_session(purchase, stripe_session_id)
            return None

        return self._write(conn, "attach_session", values, explain)

    def complete_purchase(
        self,
        conn: DbConnection,
        user: Key,
        *,
        id: UUID | None = None,
        stripe_session_id: str | None = None,
        amount_paid: int | None = None,
        currency: str | None = None,
        stripe_payment_intent_id: str | None = None,
    ) -> CreditTransaction:
        """Grant what was bought: pending → completed, and the balance grows by the row's own amount.

        Find the purchase by ``id``, by ``stripe_session_id``, or by ``id`` and attach the session in the same
        statement. ``amount_paid`` is in minor units of ``currency`` (a three-letter code), both or neither. A failed
        purchase that was paid after all completes too, and its description says so. A soft-deleted user is granted
        it as well: the money is real. Completing a completed purchase returns it, marked ``replayed``.

        Raises:
            InvalidArgument, UnknownUser, UnknownPurchase, SessionConflict, BalanceOutOfRange,
            IdempotencyKeyReused: it was completed before with another amount, currency or payment intent.
        """
        _either("id", id, "stripe_session_id", stripe_session_id)
        if (amount_paid is None) != (currency is None):
            raise InvalidArgument(
                f"amount_paid={shown(amount_paid)}, currency={shown(currency)}: pass both or neither",
                argument="currency",
                value=currency,
            )
        values = {
            "p_user": self.schema.user_key(user),
            "p_purchase": None if id is None else _uuid("id", id),
            "p_session": None if stripe_session_id is None else _text("stripe_session_id", stripe_session_id, KEY_MAX),
            "p_paid": None if amount_paid is None else _whole("amount_paid", amount_paid, 0, INT64_MAX),
            "p_currency": None if currency is None else _currency(currency),
            "p_intent": None
            if stripe_payment_intent_id is None
            else _text("stripe_payment_intent_id", stripe_payment_intent_id, KEY_MAX),
        }
        paid = {
            "amount_paid": values["p_paid"],
            "currency": values["p_currency"],
            "stripe_payment_intent_id": values["p_intent"],
        }

        def explain(facts: _Facts) -> CreditTransaction | None:
            facts.require_user(deleted_too=True)
            purchase = facts.require_purchase(id or stripe_session_id)
            if stripe_session_id is not None:
                facts.require_session(purchase, stripe_session_id)
            if purchase.status is COMPLETED:
                return _replay(
                    purchase,
                    stripe_session_id or str(id),
                    **{name: value for name, value in paid.items() if value is not None},
                )
            facts.require_range(purchase.amount)
            return None

        by = "complete_by_id" if id is not None else "complete_by_session"
        return self._write(conn, by, values, explain)

    def fail_purchase(
        self,
        conn: DbConnection,
        user: Key,
        *,
        id: UUID | None = None,
        stripe_session_id: str | None = None,
        reason: str,
    ) -> CreditTransaction:
        """Give up a pending purchase: pending → failed; ``reason`` is added to its description.

        Failing a failed purchase returns it, marked ``replayed``, with its first reason.

        Raises:
            InvalidArgument, UnknownPurchase, PurchaseNotPending: it was paid; refund it instead.
        """
        _either("id", id, "stripe_session_id", stripe_session_id)
        values = {
            "p_user": self.schema.user_key(user),
            "p_purchase": None if id is None else _uuid("id", id),
            "p_session": None if stripe_session_id is None else _text("stripe_session_id", stripe_session_id, KEY_MAX),
            "p_reason": _text("reason", reason),
        }

        def explain(facts: _Facts) -> CreditTransaction | None:
            purchase = facts.require_purchase(id or stripe_session_id)
            if purchase.status is FAILED:
                return replace(purchase, replayed=True)
            if purchase.status is COMPLETED:
                raise PurchaseNotPending(
                    f"purchase {purchase.id} is completed and cannot fail. To take its credits back: ledger.refund",
                    purchase=purchase.id,
                    status=str(purchase.status),
                )
            return None

        by = "fail_by_id" if id is not None else "fail_by_session"
        return self._write(conn, by, values, explain)

    # --- spending and giving back ---

    def consume(
        self,
        conn: DbConnection,
        user: Key,
        *,
        workshop: Key | None = None,
        amount: int = 1,
        key: str,
        description: str | None = None,
    ) -> CreditTransaction:
        """Spend ``amount`` credits, and unlock ``workshop`` with them if one is named.

        A workshop is paid for once: when it is unlocked already its consumption comes back, marked ``replayed``, and
        nothing is charged. ``key`` is the caller's name for this one intent.

        Raises:
            InvalidArgument, UnknownUser, UserDeleted, UnknownWorkshop, WorkshopDeleted, WorkshopNotOwned,
            WorkshopUnaccounted, InsufficientCredits, IdempotencyKeyReused.
        """
        item = Consume(user, workshop=workshop, amount=amount, key=key, description=description)
        values = self._spending(item)
        name = "consume" if workshop is None else "consume_for_workshop"
        return self._write(
            conn, name, values, lambda facts: _explain_consume(facts, values), lambda told: _spent(values, told)
        )

    def consume_many(self, conn: DbConnection, items: Sequence[Consume]) -> list[CreditTransaction | LedgerError]:
        """As one ``consume`` after the other, in one statement: for each item its row, or the refusal as a value.

        An item that is refused, even for its arguments, does not touch the others: a smaller one after it may still
        be covered; a refusal may name the balance from before that. If any was not written, one more statement asks
        why. An item that has a key or workshop of an earlier one waits for what becomes of that, which can take more
        statements. Results come in the order of ``items``.
        Each user takes an entry of the server's lock table until the transaction ends: keep to a few thousand users.
        A user whose row contradicts the ledger gets LedgerInconsistent for each item.

        Raises:
            Conflict: one of the keys was being written by somebody else. In a database transaction run the whole of it
                again. In autocommit make the same call again: what an earlier statement of it wrote is replayed.
            DatabaseUnavailable: also where the server's lock table has no room for so many users.
        """
        results: list[CreditTransaction | LedgerError | None] = [None] * len(items)
        waiting: dict[int, dict[str, Any]] = {}
        for n, item in enumerate(items):
            try:
                waiting[n] = self._spending(item)
            except LedgerError as refusal:
                results[n] = refusal
        # Each round settles at least the first item of each user, and what repeats it, so this ends.
        while waiting:
            for n, row in self._spend(conn, _round(waiting)):
                results[n] = row
            waiting = {n: values for n, values in waiting.items() if results[n] is None}
            for n, known in self._refusals(conn, waiting):
                results[n] = known
            waiting = {n: values for n, values in waiting.items() if results[n] is None}
        return [result for result in results if result is not None]

    def _refusals(
        self, conn: DbConnection, waiting: Mapping[int, Mapping[str, Any]]
    ) -> Iterator[tuple[int, CreditTransaction | LedgerError]]:
        """Those of ``waiting`` that no further round can write: a row that was there already, or a refusal.

        An item that could be written waits, and so does what comes after it with its key or its workshop.
        """
        if not waiting:
            return
        undecided: set[_Name] = set()
        for (n, values), facts in zip(waiting.items(), self._facts(conn, list(waiting.values())), strict=True):
            names = _names(values)
            try:
                found = _explain_consume(facts, values) if undecided.isdisjoint(names) else None
                if found is None:
                    facts.require_agreement()
                    undecided |= names
                else:
                    yield n, found
            except LedgerError as refusal:
                yield n, refusal

    def _spending(self, item: Consume) -> dict[str, Any]:
        return {
            "p_id": uuid7(),
            "p_user": self.schema.user_key(item.user),
            "p_workshop": None if item.workshop is None else self.schema.workshop_key(item.workshop),
            "p_amount": _whole("amount", item.amount, 1, INT32_MAX),
            "p_key": _text("key", item.key, KEY_MAX),
            "p_description": None if item.description is None else _text("description", item.description),
        }

    def _spend(self, conn: DbConnection, calls: Mapping[int, Mapping[str, Any]]) -> list[tuple[int, CreditTransaction]]:
        """One statement for all of these; what it wrote."""
        numbers = list(calls)
        lists = {f"{name}s": [values[name] for values in calls.values()] for name in next(iter(calls.values()))}
        done = []
        for place, *told in run(conn, self.statements["consume_many"], lists).all():
            n = numbers[place - 1]
            done.append((n, _spent(calls[n], told)))
        return done

    def refund(
        self,
        conn: DbConnection,
        user: Key,
        purchase: UUID | str,
        *,
        credits: int | None = None,
        key: str,
        description: str | None = None,
    ) -> CreditTransaction:
        """Take back ``credits`` of a completed purchase, or all that is left of it.

        The money is already on its way back, so the balance may fall below zero: the debt is on record, the next
        purchase pays it first, and nothing can be consumed meanwhile.

        Raises:
            InvalidArgument, UnknownUser, UnknownPurchase, PurchaseNotCompleted, RefundExceedsPurchase,
            BalanceOutOfRange, IdempotencyKeyReused.
        """
        values = {
            "p_id": uuid7(),
            "p_user": self.schema.user_key(user),
            "p_purchase": _uuid("purchase", purchase),
            "p_amount": None if credits is None else _whole("credits", credits, 1, INT32_MAX),
            "p_key": _text("key", key, KEY_MAX),
            "p_description": None if description is None else _text("description", description),
        }

        def explain(facts: _Facts) -> CreditTransaction | None:
            if facts.prior:
                same = {"type": REFUND, "refund_of": values["p_purchase"]}
                return _replay(facts.prior, key, **same, **({} if credits is None else {"amount": -credits}))
            facts.require_user(deleted_too=True)
            bought = facts.require_purchase(purchase)
            if bought.status is not COMPLETED:
                raise PurchaseNotCompleted(
                    f"purchase {bought.id} is {bought.status}; there is nothing to take back. "
                    "To give it up: ledger.fail_purchase",
                    purchase=bought.id,
                    status=str(bought.status),
                )
            left = bought.amount - facts.refunded
            asked = left if credits is None else credits
            if not 0 < asked <= left:
                raise RefundExceedsPurchase(
                    f"purchase {bought.id} has {_count(left)} left to refund of {_count(bought.amount)}; "
                    f"asked: {'all' if credits is None else credits}",
                    purchase=bought.id,
                    left=left,
                    asked=asked,
                )
            facts.require_range(-asked)
            return None

        return self._write(conn, "refund", values, explain)

    def grant(self, conn: DbConnection, user: Key, *, credits: int, key: str, description: str) -> CreditTransaction:
        """Give ``credits`` that nobody paid for: goodwill, a promotion, an opening balance.

        Raises:
            InvalidArgument, UnknownUser, UserDeleted, BalanceOutOfRange, IdempotencyKeyReused.
        """
        values = {
            "p_id": uuid7(),
            "p_user": self.schema.user_key(user),
            "p_amount": _whole("credits", credits, 1, INT32_MAX),
            "p_key": _text("key", key, KEY_MAX),
            "p_description": _text("description", description),
        }

        def explain(facts: _Facts) -> CreditTransaction | None:
            if facts.prior:
                return _replay(facts.prior, key, type=GRANT, amount=credits, refund_of=None)
            facts.require_user()
            facts.require_range(credits)
            return None

        return self._write(conn, "grant", values, explain)

    def reinstate(
        self,
        conn: DbConnection,
        user: Key,
        purchase: UUID,
        *,
        credits: int | None = None,
        key: str,
        description: str | None = None,
    ) -> CreditTransaction:
        """Give back ``credits`` that refunds took from a purchase, or all of them: a refund failed, a dispute was won.

        The row is a grant whose ``refund_of`` names the purchase, and counts against its refunds. A soft-deleted
        user gets them as well: the money is real.

        Raises:
            InvalidArgument, UnknownUser, UnknownPurchase, ReinstatementExceedsRefunds, BalanceOutOfRange,
            IdempotencyKeyReused.
        """
        values = {
            "p_id": uuid7(),
            "p_user": self.schema.user_key(user),
            "p_purchase": _uuid("purchase", purchase),
            "p_amount": None if credits is None else _whole("credits", credits, 1, INT32_MAX),
            "p_key": _text("key", key, KEY_MAX),
            "p_description": None if description is None else _text("description", description),
        }

        def explain(facts: _Facts) -> CreditTransaction | None:
            if facts.prior:
                same = {"type": GRANT, "refund_of": values["p_purchase"]}
                return _replay(facts.prior, key, **same, **({} if credits is None else {"amount": credits}))
            facts.require_user(deleted_too=True)
            bought = facts.require_purchase(purchase)
            asked = facts.refunded if credits is None else credits
            if not 0 < asked <= facts.refunded:
                raise ReinstatementExceedsRefunds(
                    f"refunds took {_count(facts.refunded)} of purchase {bought.id}; "
                    f"asked to give back: {'all' if credits is None else credits}. To give more: ledger.grant",
                    purchase=bought.id,
                    taken=facts.refunded,
                    asked=asked,
                )
            facts.require_range(asked)
            return None

        return self._write(conn, "reinstate", values, explain)

    # --- reading ---

    def balance(self, conn: DbConnection, user: Key) -> int:
        """The credits of ``user``, negative when in debt. Raises UnknownUser."""
        row = run(conn, self.statements["balance"], {"p_user": self.schema.user_key(user)}).one_or_none()
        if row is None:
            raise _unknown_user(user)
        return int(row[0])

    def balance_at(self, conn: DbConnection, user: Key, when: dt.datetime) -> int:
        """The balance after all that had completed at ``when`` (inclusive; needs a time zone), by the server's clock.

        Raises:
            InvalidArgument, UnknownUser.
        """
        if not isinstance(when, dt.datetime) or when.tzinfo is None:
            raise InvalidArgument(
                f"when={shown(when)}: pass a datetime with a time zone, as datetime.now(UTC)",
                argument="when",
                value=when,
            )
        row = run(
            conn, self.statements["balance_at"], {"p_user": self.schema.user_key(user), "p_when": when}
        ).one_or_none()
        if row is None:
            raise _unknown_user(user)
        return int(row[0])

    def history(
        self,
        conn: DbConnection,
        user: Key,
        *,
        limit: int = 50,
        before: str | None = None,
        include_failed: bool = False,
    ) -> list[CreditTransaction]:
        """The rows of ``user``, newest first: what is pending, then what completed, by ``sequence``.

        Read on with ``before=rows[-1].cursor``; each page costs the same, however long the history. An unknown user
        has none. ``include_failed`` shows failed purchases among the pending ones.

        Raises:
            InvalidArgument.
        """
        before_id, before_sequence = _position(before)
        values = {
            "p_user": self.schema.user_key(user),
            "p_limit": _whole("limit", limit, 1, HISTORY_MAX),
            "p_before_id": before_id,
            "p_before_sequence": before_sequence,
            "p_statuses": [PENDING, FAILED] if include_failed else [PENDING],
        }
        return [CreditTransaction(*row) for row in run(conn, self.statements["history"], values)]

    def access(self, conn: DbConnection, workshop: Key) -> Access:
        """Whether ``workshop`` is open, and why: unlocked, older than the paywall, or no paywall.

        A ``created_at`` without a time zone is taken as UTC.

        Raises:
            InvalidArgument, UnknownWorkshop.
        """
        row = run(conn, self.statements["access"], {"p_workshop": self.schema.workshop_key(workshop)}).one_or_none()
        if row is None:
            raise _unknown_workshop(workshop)
        created_at, consumed_at, deleted_at, migrated_at = row
        if deleted_at is not None:
            return Access(open=False, reason=AccessReason.DELETED)
        if consumed_at is not None:
            return Access(open=True, reason=AccessReason.UNLOCKED)
        since = self.config.grandfathered_before or migrated_at
        if created_at is not None and since is not None and _utc(created_at) < since:
            return Access(open=True, reason=AccessReason.GRANDFATHERED)
        if not self.config.paywall:
            return Access(open=True, reason=AccessReason.PAYWALL_OFF)
        return Access(open=False, reason=AccessReason.LOCKED)

    def lock(self, conn: DbConnection, user: Key) -> int:
        """Keep the ledger of ``user`` still until the caller's transaction ends; gives the balance.

        For what is decided in several steps, as "who has 10 credits gets a present". Operations of the same
        transaction go on, those of others wait for its end.

        Raises:
            InvalidArgument, UnknownUser.
        """
        values = {"p_user": self.schema.user_key(user)}
        for _ in range(_TRIES):
            if (balance := run(conn, self.statements["lock"], values).scalar()) is not None:
                return int(balance)
            self._facts(conn, [values])[0].require_user(deleted_too=True)
        raise _kept_moving(user, "lock")

    # --- one write ---

    def _write(
        self,
        conn: DbConnection,
        name: str,
        values: Mapping[str, Any],
        explain: Callable[[_Facts], CreditTransaction | None],
        made: Callable[[sa.Row[*tuple[Any, ...]]], CreditTransaction] = lambda row: CreditTransaction(*row),
    ) -> CreditTransaction:
        """Run a statement; if it wrote nothing, ask once why. ``explain`` returns a replay or raises the refusal.

        ``made`` makes the row of what the statement tells, where that is not the row.
        """
        for _ in range(_TRIES):
            if row := run(conn, self.statements[name], values).one_or_none():
                return made(row)
            (facts,) = self._facts(conn, [values])
            if (replayed := explain(facts)) is not None:
                return replayed
            facts.require_agreement()
        raise _kept_moving(values["p_user"], name)

    def _facts(self, conn: DbConnection, calls: Sequence[Mapping[str, Any]]) -> list[_Facts]:
        """What speaks against each of these calls."""
        asked = {f"{name}s": [values.get(name) for values in calls] for name in _FACTS_ABOUT}
        rows = run(conn, self.statements["facts"], asked)
        return [_Facts(row, values["p_user"]) for row, values in zip(rows, calls, strict=True)]


_FACTS_ABOUT = ("p_user", "p_key", "p_purchase", "p_session", "p_workshop")


def _spent(values: Mapping[str, Any], told: Iterable[Any]) -> CreditTransaction:
    """A consumption's row: what was asked for, and what the statement told (``statements.SPENT``)."""
    balance, sequence, description, created_at, completed_at = told
    # By place, as rows come from the server: eighteen names would take a third of the time of making it.
    return CreditTransaction(
        values["p_id"],
        values["p_user"],
        CONSUMPTION,
        COMPLETED,
        -values["p_amount"],
        balance,
        sequence,
        description,
        values["p_workshop"],
        *_NOT_OF_A_CONSUMPTION,
        values["p_key"],
        created_at,
        completed_at,
    )


_NOT_OF_A_CONSUMPTION = (None,) * 6  # refund_of, and the five columns of a sale


def _explain_consume(facts: _Facts, values: Mapping[str, Any]) -> CreditTransaction | None:
    user, workshop, amount = values["p_user"], values["p_workshop"], values["p_amount"]
    if facts.prior:
        # when the host deletes a workshop its row stays, without it
        gone = facts.workshop_found is None and facts.prior.workshop_id is None
        return _replay(
            facts.prior,
            values["p_key"],
            type=CONSUMPTION,
            amount=-amount,
            workshop_id=None if gone else workshop,
        )
    balance = facts.require_user()
    if workshop is not None and (unlocked := facts.require_workshop(workshop)):
        return replace(unlocked, replayed=True)
    if balance < amount:
        raise InsufficientCredits(
            f"user {user} has {_count(balance)} and this takes {_count(amount)}. "
            "Sell a pack first (ledger.start_purchase), or give credits: tallystick grant",
            user=user,
            balance=balance,
            required=amount,
        )
    return None


_Name = tuple[Key, str, object]


def _names(values: Mapping[str, Any]) -> set[_Name]:
    """What only one of several items can have: the user's key, and the user's workshop."""
    user, workshop = values["p_user"], values["p_workshop"]
    return {(user, "key", values["p_key"])} | ({(user, "workshop", workshop)} if workshop is not None else set())


def _round(waiting: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What one statement can do now.

    A user's second use of a key or a workshop must see what became of the first; it, and all that this user asks for
    after it, wait.
    """
    now = {}
    seen: set[_Name] = set()
    behind: set[Key] = set()
    for n, values in waiting.items():
        names = _names(values)
        if values["p_user"] in behind or not seen.isdisjoint(names):
            behind.add(values["p_user"])
        else:
            seen |= names
            now[n] = values
    return now


class _Facts:
    """What one SELECT found out about a statement that wrote nothing."""

    def __init__(self, row: sa.Row[*tuple[Any, ...]], user: Key) -> None:
        self.user, self.typed = user, shlex.quote(str(user))
        (
            self.user_found,
            self.balance,
            self.sequence,
            self.user_deleted_at,
            self.last_sequence,
            self.refunded,
            self.session_holder,
            self.workshop_found,
            self.owner,
            self.workshop_deleted_at,
            self.consumed_at,
        ) = row[: -3 * _WIDTH]
        self.prior, self.purchase, self.unlocked = (
            CreditTransaction(*columns) if columns[0] is not None else None
            for columns in (row[-3 * _WIDTH : -2 * _WIDTH], row[-2 * _WIDTH : -_WIDTH], row[-_WIDTH:])
        )

    def require_user(self, *, deleted_too: bool = False) -> int:
        """The balance of a user who exists."""
        if self.user_found is None:
            raise _unknown_user(self.user)
        if self.user_deleted_at is not None and not deleted_too:
            raise UserDeleted(
                f"user {self.user} was deleted at {self.user_deleted_at:%Y-%m-%d %H:%M}. "
                "To bring the user back: Accounts.restore_user",
                user=self.user,
            )
        return int(self.balance)

    def require_purchase(self, asked: object) -> CreditTransaction:
        if self.purchase is None or self.purchase.type is not PURCHASE:
            raise UnknownPurchase(
                f"user {self.user} has no purchase {asked}. Look with: tallystick history {self.typed}",
                user=self.user,
                purchase=asked,
            )
        return self.purchase

    def require_session(self, purchase: CreditTransaction, session: str) -> None:
        """``session`` is this purchase's, or neither is tied to anything yet."""
        if purchase.stripe_session_id not in (None, session):
            raise SessionConflict(
                f"purchase {purchase.id} has the Stripe session {purchase.stripe_session_id}, not {session}. "
                "Start another purchase for another session",
                purchase=purchase.id,
                stripe_session_id=session,
            )
        if self.session_holder not in (None, purchase.id):
            raise SessionConflict(
                f"the Stripe session {session} belongs to purchase {self.session_holder}, not {purchase.id}. "
                "A session pays for one purchase",
                purchase=purchase.id,
                stripe_session_id=session,
            )

    def require_workshop(self, workshop: Key) -> CreditTransaction | None:
        """The consumption that unlocked the workshop already, or None if it is locked."""
        if self.workshop_found is None:
            raise _unknown_workshop(workshop)
        if self.owner != self.user:
            raise WorkshopNotOwned(
                f"workshop {workshop} belongs to another user than {self.user}. Only its owner can unlock it",
                workshop=workshop,
                user=self.user,
            )
        if self.workshop_deleted_at is not None:
            raise WorkshopDeleted(
                f"workshop {workshop} was deleted at {self.workshop_deleted_at:%Y-%m-%d %H:%M}. "
                "To bring it back: Accounts.restore_workshop",
                workshop=workshop,
            )
        if self.consumed_at is not None and self.unlocked is None:
            raise WorkshopUnaccounted(
                f"workshop {workshop} is marked as unlocked, but no consumption of user {self.user} paid for it. "
                f"Nothing was charged. Look with: tallystick audit --user {self.typed}",
                workshop=workshop,
            )
        return self.unlocked if self.consumed_at is not None else None

    def require_range(self, amount: int) -> None:
        if not INT32_MIN <= self.balance + amount <= INT32_MAX:
            raise BalanceOutOfRange(
                f"user {self.user} has {self.balance} credits; {amount:+} more leaves the range of a balance "
                f"({INT32_MIN} to {INT32_MAX}). Nothing was written",
                user=self.user,
                balance=self.balance,
                amount=amount,
            )

    def require_agreement(self) -> None:
        """The user's row and the ledger name the same last sequence; if not, no call can succeed."""
        if self.user_found is not None and self.sequence != (self.last_sequence or 0):
            raise LedgerInconsistent(
                f"user {self.user} says {self.sequence} completed rows, the ledger's last is "
                f"{self.last_sequence or 0}. Nothing was written. Look with: tallystick audit --user {self.typed}",
                user=self.user,
            )


def _replay(first: CreditTransaction, key: str | None, **now: object) -> CreditTransaction:
    """``first`` again, if this call asks for the same; the description, being for people, may differ."""
    differs = {name: (getattr(first, name), value) for name, value in now.items() if getattr(first, name) != value}
    if differs:
        said = ", ".join(f"{name} {before!s} (now {after!s})" for name, (before, after) in differs.items())
        raise IdempotencyKeyReused(
            f"{key!r} was used before, for {said}. Use a new key for a new intent",
            key=key,
            differs=differs,
        )
    return replace(first, replayed=True)


# --- arguments ---


def _whole(argument: str, value: object, low: int, high: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return int(value)  # an enum's member can be one
    raise InvalidArgument(
        f"{argument}={shown(value)}: pass a whole number from {low} to {high}", argument=argument, value=value
    )


def _text(argument: str, value: object, longest: int = TEXT_MAX) -> str:
    if isinstance(value, str) and 0 < len(value) <= longest:
        try:
            value.encode()
        except UnicodeEncodeError:
            pass
        else:
            if "\0" not in value:
                return str.__str__(value)  # of an enum's member its text, where str() gives its name
        problem = "holds a NUL or a lone surrogate, which PostgreSQL cannot store"
    else:
        problem = f"pass a text of 1 to {longest} characters"
    raise InvalidArgument(f"{argument}={shown(value)}: {problem}", argument=argument, value=value)


def _uuid(argument: str, value: object) -> UUID:
    if isinstance(value, UUID):
        return value
    if isinstance(value, str):
        try:
            return UUID(value)
        except ValueError:
            pass
    raise InvalidArgument(
        f"{argument}={shown(value)}: pass the id of a credit transaction, a UUID", argument=argument, value=value
    )


def _currency(value: object) -> str:
    if isinstance(value, str) and len(value) == 3 and value.isascii() and value.isalpha():  # noqa: PLR2004 - ISO 4217
        return value.lower()
    raise InvalidArgument(
        f"currency={shown(value)}: pass a three-letter code, as 'usd'", argument="currency", value=value
    )


def _either(one: str, first: object, other: str, second: object) -> None:
    if first is None and second is None:
        raise InvalidArgument(f"pass {one} or {other}", argument=one, value=None)


def _position(before: object) -> tuple[UUID, int]:
    """A cursor as the two places to read below: in what has not completed (by id) and in what has (by sequence)."""
    if before is None:
        return UUID(int=2**128 - 1), INT32_MAX
    if isinstance(before, str):
        if before.isascii() and before.isdigit() and len(before) <= len(str(INT32_MAX)) and int(before) <= INT32_MAX:
            return UUID(int=0), int(before)
        try:
            return UUID(before), INT32_MAX
        except ValueError:
            pass
    raise InvalidArgument(
        f"before={shown(before)}: pass the cursor of a row that history returned", argument="before", value=before
    )


def _kept_moving(user: Key, name: str) -> Conflict:
    return Conflict(
        f"the ledger of user {user} kept moving during {_TRIES} tries of {name}; nothing was written. "
        "Make the same call again, or make it inside a transaction",
        sqlstate=None,
    )


def _count(credits: int) -> str:
    return f"{credits} credit" if credits in (1, -1) else f"{credits} credits"


def _utc(moment: dt.datetime) -> dt.datetime:
    return moment.replace(tzinfo=dt.UTC) if moment.tzinfo is None else moment


def _unknown_user(user: Key) -> UnknownUser:
    return UnknownUser(f"no user {shown(user)}. Is it the mapped key (tallystick.toml, host.users.key)?", user=user)


def _unknown_workshop(workshop: Key) -> UnknownWorkshop:
    return UnknownWorkshop(
        f"no workshop {shown(workshop)}. Is it the mapped key (tallystick.toml, host.workshops.key)?", workshop=workshop
    )
