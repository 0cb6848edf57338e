"""The ledger: buy, spend, give back, and read. Each operation is one call of a function in the database.

The rules are in ``sql/``, one file a function; this module makes the arguments and reads the answers. Each
operation's first argument is the caller's connection, of any kind that ``tallystick.ledger.connections`` lists;
nothing opens, commits, rolls back or retries a database transaction, so a host can create a workshop and spend the
credit for it in one. With an async connection the result is awaited: ``await ledger.consume(aconn, user, …)``.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from uuid import UUID

from tallystick.config import Config, HostMapping
from tallystick.errors import InvalidArgument, Key, LedgerError, shown
from tallystick.ledger.connections import Call, Operation, Rows, document, json_text, moment, reader_of, uuid
from tallystick.ledger.outcomes import DONE, REPLAYED, Refusal, error_of
from tallystick.schema import INT64_MAX, CreditTransactionStatus, CreditTransactionType, Keys, mapping_of

if TYPE_CHECKING:
    import sqlalchemy as sa

TEXT_MAX = 10_000
KEY_MAX = 255
HISTORY_MAX = 1_000
SWEEP_MAX = 100_000
INTERVAL_MAX = dt.timedelta(days=360_000)  # PostgreSQL compares a year as 360 days
DEPTH_MAX = 100
"""The largest depth of metadata. Readers of the ledger, such as Python's json, have limits of their own."""


@dataclass(frozen=True, slots=True)
class CreditTransaction:
    """One row of the ledger, as the columns of ``credit_transactions``.

    ``replayed`` is true when the call changed nothing because its effect was there already: the same key again,
    a redelivered completion, a workshop that is already unlocked. ``balance`` is the user's after the call, which for
    a replay may differ from the row's ``balance_after``; rows of a history have none. ``expires_at`` is that of a hold,
    or of the credits that the row gave.
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
    metadata: Mapping[str, Any] | None
    created_at: dt.datetime
    completed_at: dt.datetime | None
    replayed: bool = False
    balance: int | None = field(default=None, compare=False)
    expires_at: dt.datetime | None = None

    @property
    def cursor(self) -> str:
        """This row's position in its user's history; pass it as ``before`` to read on from here."""
        return str(self.id if self.sequence is None else self.sequence)


@dataclass(frozen=True, slots=True)
class Lot:
    """Credits of a user that expire: the row that gave them, and how many of them are left."""

    id: UUID
    given: int
    remaining: int
    expires_at: dt.datetime
    description: str


@dataclass(frozen=True, slots=True)
class Standing:
    """The credits of a user: all of them, and those that holds have set aside.

    ``due_at`` is when the next of the user's holds and lots expires, None if none does.
    """

    balance: int
    held: int
    due_at: dt.datetime | None = None

    @property
    def available(self) -> int:
        """The credits that can be spent; below 0 in debt."""
        return self.balance - self.held

    @property
    def spendable(self) -> int:
        """The credits as pages show them: those that can be spent, at least 0, or a debt below 0."""
        return min(self.balance, max(self.available, 0))


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a user's credits, from the feed of ``Ledger.events``.

    ``kind`` is the type of the ledger's row and what became of it, as ``purchase.completed``, or ``balance.low`` and
    ``balance.debt`` for a balance that fell below ``threshold`` or below 0. The rest are columns of the row.
    """

    id: int
    cursor: str
    kind: str
    created_at: dt.datetime
    user_id: Key
    transaction_id: UUID
    amount: int
    balance_after: int | None
    sequence: int | None
    workshop_id: Key | None
    idempotency_key: str | None
    metadata: Mapping[str, Any] | None
    threshold: int | None


@dataclass(frozen=True, slots=True)
class Consume:
    """One item of ``consume_many``: the arguments of ``consume``."""

    user: Key
    workshop: Key | None = field(default=None, kw_only=True)
    credits: int = field(default=1, kw_only=True)
    key: str = field(kw_only=True)
    description: str | None = field(default=None, kw_only=True)
    metadata: Mapping[str, Any] | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class Merged:
    """The result of a merge: the user who got the other's ``credits``, below 0 for a debt, and the new balance."""

    into: Key
    credits: int
    balance: int
    replayed: bool = False


class AccessReason(StrEnum):
    """The reason why a workshop is open or closed."""

    UNLOCKED = "unlocked"
    GRANDFATHERED = "grandfathered"
    PAYWALL_OFF = "paywall_off"
    LOCKED = "locked"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Access:
    """If a workshop is open, and why."""

    open: bool
    reason: AccessReason


class Ledger:
    """The operations for one host. Holds no connection and no state; share it freely.

    Made from a configuration, or from an engine or a connection of SQLAlchemy alone: the mapping is then read from
    the database, where ``migrate apply`` has stored it.
    """

    def __init__(self, source: Config | HostMapping | sa.Engine | sa.Connection) -> None:
        if isinstance(source, Config):
            self.config = source
        else:
            self.config = Config(host=source if isinstance(source, HostMapping) else mapping_of(source))
        self.keys = Keys(self.config.host)
        self._credits_max = self.keys.credits_max
        self._user = reader_of(self.config.host.users.key_type)
        self._workshop = reader_of(self.config.host.workshops.key_type if self.config.host.workshops else None)

    # --- purchases: pending → completed or failed ---

    @Operation
    def start_purchase(
        self,
        user: Key,
        *,
        credits: int,
        description: str,
        key: str | None = None,
        stripe_price_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        expires_after: dt.timedelta | None = None,
    ) -> Call[CreditTransaction]:
        """Record that ``user`` is about to buy ``credits``; the balance does not move.

        Call it before asking Stripe for a session: the row's ``id`` is then Stripe's idempotency key and
        ``client_reference_id``, and completion grants this row's own amount, whatever the catalogue says later.
        Credits with ``expires_after`` last so long from the moment at which they are paid.

        Raises:
            InvalidArgument, UnknownUser, UserDeleted, IdempotencyKeyReused: nothing was written.
        """
        return self._one(
            "start_purchase",
            user_id=self.keys.user_key(user),
            amount=self._whole("credits", credits),
            description=_text("description", description),
            key=_optional("key", key, KEY_MAX),
            stripe_price_id=_optional("stripe_price_id", stripe_price_id, KEY_MAX),
            metadata=_document(metadata),
            expires_after=_interval("expires_after", expires_after),
        )

    @Operation
    def attach_session(
        self,
        user: Key,
        purchase: UUID | str,
        *,
        stripe_session_id: str,
        stripe_payment_intent_id: str | None = None,
    ) -> Call[CreditTransaction]:
        """Store the Stripe session of a purchase, and its payment intent once there is one.

        Doing it again with the same session changes nothing; the first payment intent stays.

        Raises:
            InvalidArgument, UnknownUser, UnknownPurchase, SessionConflict: one of the two is already tied to another.
        """
        return self._one(
            "attach_session",
            user_id=self.keys.user_key(user),
            purchase_id=_uuid("purchase", purchase),
            stripe_session_id=_text("stripe_session_id", stripe_session_id, KEY_MAX),
            stripe_payment_intent_id=_optional("stripe_payment_intent_id", stripe_payment_intent_id, KEY_MAX),
        )

    @Operation
    def complete_purchase(
        self,
        user: Key,
        *,
        purchase: UUID | str | None = None,
        stripe_session_id: str | None = None,
        amount_paid: int | None = None,
        currency: str | None = None,
        stripe_payment_intent_id: str | None = None,
        credits: int | None = None,
    ) -> Call[CreditTransaction]:
        """Grant a purchase: pending → completed, and the balance grows by the row's own amount.

        Name the purchase by its id, by ``stripe_session_id``, or by both to attach the session in the same call.
        ``amount_paid`` is in minor units of ``currency`` (a three-letter code), both or neither. A failed purchase
        that was paid after all completes too, and its description says so. A soft-deleted user is granted it as well:
        the money is real. ``credits`` is the number that the buyer chose at the payment, and becomes the row's amount.
        Completing a completed purchase returns it, marked ``replayed``.

        Raises:
            InvalidArgument, UnknownUser, UnknownPurchase, SessionConflict, BalanceOutOfRange: nothing was written.
            IdempotencyKeyReused: it was completed with another amount, currency, payment intent or number of credits.
        """
        _either("purchase", purchase, "stripe_session_id", stripe_session_id)
        if (amount_paid is None) != (currency is None):
            raise InvalidArgument(
                f"amount_paid={shown(amount_paid)}, currency={shown(currency)}: pass both or neither",
                argument="currency",
                value=currency,
            )
        return self._one(
            "complete_purchase",
            user_id=self.keys.user_key(user),
            purchase_id=None if purchase is None else _uuid("purchase", purchase),
            stripe_session_id=_optional("stripe_session_id", stripe_session_id, KEY_MAX),
            amount_paid=None if amount_paid is None else _whole("amount_paid", amount_paid, 0, INT64_MAX),
            currency=None if currency is None else _currency(currency),
            stripe_payment_intent_id=_optional("stripe_payment_intent_id", stripe_payment_intent_id, KEY_MAX),
            amount=None if credits is None else self._whole("credits", credits),
        )

    @Operation
    def fail_purchase(
        self,
        user: Key,
        *,
        purchase: UUID | str | None = None,
        stripe_session_id: str | None = None,
        reason: str,
    ) -> Call[CreditTransaction]:
        """Give up a pending purchase: pending → failed; ``reason`` is added to its description.

        Failing a failed purchase returns it, marked ``replayed``, with its first reason.

        Raises:
            InvalidArgument, UnknownUser, UnknownPurchase, SessionConflict: nothing was written.
            PurchaseNotPending: it was paid; refund it instead.
        """
        _either("purchase", purchase, "stripe_session_id", stripe_session_id)
        return self._one(
            "fail_purchase",
            user_id=self.keys.user_key(user),
            purchase_id=None if purchase is None else _uuid("purchase", purchase),
            stripe_session_id=_optional("stripe_session_id", stripe_session_id, KEY_MAX),
            reason=_text("reason", reason),
        )

    # --- spending and giving back ---

    @Operation
    def consume(
        self,
        user: Key,
        *,
        workshop: Key | None = None,
        credits: int = 1,
        key: str,
        description: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Call[CreditTransaction]:
        """Spend ``credits``, and unlock ``workshop`` with them if one is named.

        A workshop is paid for once: when it is unlocked already its consumption comes back, marked ``replayed``, and
        nothing is charged. ``key`` is the caller's name for this one intent.

        Raises:
            InvalidArgument, UnknownUser, UserDeleted, UnknownWorkshop, WorkshopDeleted: nothing was written.
            WorkshopNotOwned, WorkshopUnaccounted, InsufficientCredits, IdempotencyKeyReused: nothing was written.
        """
        return self._one(
            "consume",
            user_id=self.keys.user_key(user),
            key=_text("key", key, KEY_MAX),
            workshop_id=None if workshop is None else self.keys.workshop_key(workshop),
            amount=self._whole("credits", credits),
            description=_optional("description", description),
            metadata=_document(metadata),
        )

    @Operation
    def consume_many(self, items: Sequence[Consume]) -> Call[list[CreditTransaction | LedgerError]]:
        """Consume for each item, in one call; returns for each its row, or the refusal as a value.

        A refused item, even one with wrong arguments or of another type, does not affect the others: a smaller one
        after it may still be covered. Results come in the order of ``items``.

        Raises:
            InvalidArgument: ``items`` is no list; nothing was written.
        """
        if not isinstance(items, Sequence) or isinstance(items, str | bytes):
            raise InvalidArgument.of("items", items, "pass a list of Consume(user, key=…)")
        calls: list[Call[CreditTransaction]] = []
        refused: dict[int, LedgerError] = {}
        for n, item in enumerate(items):
            try:
                calls.append(self._consumption(n, item))
            except LedgerError as refusal:
                refused[n] = refusal
        many = self.together(calls)

        def read(rows: Rows) -> list[CreditTransaction | LedgerError]:
            results = iter(many.read(rows))
            return [refused[n] if n in refused else next(results) for n in range(len(items))]

        return Call(many.function, many.arguments, read)

    @Operation
    def refund(
        self,
        user: Key,
        purchase: UUID | str,
        *,
        credits: int | None = None,
        key: str,
        description: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Call[CreditTransaction]:
        """Take back ``credits`` of a completed purchase, or all that is left of it.

        The money is already on its way back, so the balance may fall below zero: the debt is on record, the next
        purchase pays it first, and nothing can be consumed meanwhile.

        Raises:
            InvalidArgument, UnknownUser, UnknownPurchase, PurchaseNotCompleted: nothing was written.
            RefundExceedsPurchase, BalanceOutOfRange, IdempotencyKeyReused: nothing was written.
        """
        return self._linked("refund", user, purchase, credits, key, description, metadata)

    @Operation
    def reinstate(
        self,
        user: Key,
        purchase: UUID | str,
        *,
        credits: int | None = None,
        key: str,
        description: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Call[CreditTransaction]:
        """Give back ``credits`` that refunds took from a purchase, or all of them: a refund failed, a dispute was won.

        The row is a grant whose ``refund_of`` names the purchase, and counts against its refunds. A soft-deleted
        user gets them as well: the money is real.

        Raises:
            InvalidArgument, UnknownUser, UnknownPurchase, ReinstatementExceedsRefunds: nothing was written.
            BalanceOutOfRange, IdempotencyKeyReused: nothing was written.
        """
        return self._linked("reinstate", user, purchase, credits, key, description, metadata)

    @Operation
    def grant(
        self,
        user: Key,
        *,
        credits: int,
        key: str,
        description: str,
        metadata: Mapping[str, Any] | None = None,
        expires_at: dt.datetime | None = None,
    ) -> Call[CreditTransaction]:
        """Give ``credits`` that nobody paid for: goodwill, a promotion, an opening balance.

        Credits with ``expires_at`` are spent before all others, those that expire soonest first. A row of type
        ``expiry`` takes back those that are left then.

        Raises:
            InvalidArgument, UnknownUser, UserDeleted, BalanceOutOfRange, IdempotencyKeyReused: nothing was written.
        """
        return self._one(
            "grant",
            user_id=self.keys.user_key(user),
            amount=self._whole("credits", credits),
            key=_text("key", key, KEY_MAX),
            description=_text("description", description),
            metadata=_document(metadata),
            expires_at=None if expires_at is None else _moment("expires_at", expires_at),
        )

    # --- undoing mistakes ---

    @Operation
    def reverse(
        self,
        user: Key,
        consumption: UUID | str,
        *,
        credits: int | None = None,
        key: str,
        description: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Call[CreditTransaction]:
        """Give back ``credits`` of a consumption, or all that is left of it: the job failed, or it was a mistake.

        When all of it is given back, the workshop is locked again and can be charged again. Credits go back to the lot
        that they came from; if it has expired they expire at once.

        Raises:
            InvalidArgument, UnknownUser, UnknownConsumption, ReversalExceedsConsumption: nothing was written.
            BalanceOutOfRange, IdempotencyKeyReused: nothing was written.
        """
        return self._linked("reverse", user, consumption, credits, key, description, metadata)

    @Operation
    def correct(
        self,
        user: Key,
        grant: UUID | str,
        *,
        credits: int | None = None,
        key: str,
        description: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Call[CreditTransaction]:
        """Take back ``credits`` of a grant that was a mistake, or all that is left of it.

        The balance may fall below zero, as by a refund.

        Raises:
            InvalidArgument, UnknownUser, UnknownGrant, CorrectionExceedsGrant: nothing was written.
            BalanceOutOfRange, IdempotencyKeyReused: nothing was written.
        """
        return self._linked("correct", user, grant, credits, key, description, metadata)

    # --- credits set aside for work under way ---

    @Operation
    def hold(
        self,
        user: Key,
        *,
        credits: int,
        key: str,
        expires_in: dt.timedelta | None = None,
        workshop: Key | None = None,
        capture_limit: int | None = None,
        description: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Call[CreditTransaction]:
        """Set ``credits`` aside for work under way; the row is a pending consumption.

        ``capture`` charges them and ``release`` gives them up. After ``expires_in`` (15 minutes, if not given) the
        hold counts as released, even if nothing has run since. ``capture_limit`` is the most that may be captured,
        where the work may cost more than the hold. A ``workshop`` is unlocked when the hold is captured. For one that
        is unlocked already nothing is set aside: the answer is the consumption that unlocked it, ``replayed``. The
        ``key`` of a hold that has ended sets nothing aside either: the answer is that hold's row, ``replayed``, and its
        ``status`` is no longer pending.

        Raises:
            InvalidArgument, UnknownUser, UserDeleted, UnknownWorkshop, WorkshopDeleted: nothing was written.
            WorkshopNotOwned, WorkshopUnaccounted, InsufficientCredits, IdempotencyKeyReused: nothing was written.
        """
        return self._one(
            "hold",
            user_id=self.keys.user_key(user),
            amount=self._whole("credits", credits),
            key=_text("key", key, KEY_MAX),
            expires_in=_interval("expires_in", expires_in),
            workshop_id=None if workshop is None else self.keys.workshop_key(workshop),
            capture_limit=None if capture_limit is None else self._whole("capture_limit", capture_limit),
            description=_optional("description", description),
            metadata=_document(metadata),
        )

    @Operation
    def capture(
        self, user: Key, hold: UUID | str, *, credits: int | None = None, allow_debt: bool = False
    ) -> Call[CreditTransaction]:
        """Charge a hold, once: all that it set aside, or ``credits``, up to its limit.

        A hold that has expired is charged where the credits are there, and the description says so. With
        ``allow_debt`` it is charged in any case, and the balance may fall below zero. Capturing it again for the same
        number of credits returns the row marked ``replayed``.

        Raises:
            InvalidArgument, UnknownUser, UnknownHold, HoldClosed, CaptureExceedsHold: nothing was written.
            InsufficientCredits, BalanceOutOfRange, IdempotencyKeyReused: nothing was written.
            WorkshopNotOwned, WorkshopDeleted, WorkshopUnaccounted: nothing was written.
        """
        return self._one(
            "capture",
            user_id=self.keys.user_key(user),
            hold_id=_uuid("hold", hold),
            amount=None if credits is None else self._whole("credits", credits),
            allow_debt=boolean("allow_debt", allow_debt),
        )

    @Operation
    def release(self, user: Key, hold: UUID | str) -> Call[CreditTransaction]:
        """Give up a hold: its credits can be spent again. One that has expired can no longer be captured.

        Raises:
            InvalidArgument, UnknownUser, UnknownHold, HoldClosed: it was captured; reverse it instead.
        """
        return self._one("release", user_id=self.keys.user_key(user), hold_id=_uuid("hold", hold))

    @Operation
    def sweep(self, *, limit: int = 1000) -> Call[int]:
        """Write the expiries of at most ``limit`` users that no operation has written yet; returns their number.

        Each operation does it for its own user, so only readers of the tables themselves depend on it.

        Raises:
            InvalidArgument: nothing was written.
        """
        arguments = {"row_limit": _whole("limit", limit, 1, SWEEP_MAX)}

        return Call("sweep", arguments, lambda rows: len([_accepted(row, arguments) for row in rows]))

    @Operation
    def close_days(self) -> Call[int]:
        """Add up one day that is over, for the console's overview; returns the number of days that are still open.

        Only the speed of the overview depends on it. A day is closed when no more rows of it can appear. Call it
        again, in another transaction, while that number falls: ``close_all_days`` does.
        """
        return Call("close_days", {}, lambda rows: int(rows[0][0]))

    # --- two accounts of one person ---

    @Operation
    def merge(
        self,
        user: Key,
        *,
        into: Key,
        key: str,
        description: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Call[Merged]:
        """Move all credits of ``user`` to another, debts too, and soft-delete ``user``: two accounts become one.

        Rows of type ``transfer`` keep both chains whole, one that takes and one that gives, each with the other as its
        ``refund_of``; credits that expire still expire at the same moment. Earlier rows, workshops, plan tier and
        Stripe customer stay with their user. A purchase of ``user`` that completes later gives its credits to
        ``user``; merge again, with another ``key``.

        Raises:
            InvalidArgument, UnknownUser, UserDeleted, HoldsPending: nothing was written.
            BalanceOutOfRange, IdempotencyKeyReused: nothing was written.
        """
        arguments = {
            "user_id": self.keys.user_key(user),
            "into_user_id": self.keys.user_key(into),
            "key": _text("key", key, KEY_MAX),
            "description": _optional("description", description),
            "metadata": _document(metadata),
        }

        def read(rows: Rows) -> Merged:
            row = _accepted(rows[0], arguments)
            return Merged(self._user(row[2]), row[5], row[20], row[0] == REPLAYED)

        return Call("merge", arguments, read)

    # --- reading ---

    @Operation
    def standing(self, user: Key) -> Call[Standing]:
        """The credits of ``user``, and those that holds have set aside. Raises UnknownUser."""
        arguments = {"user_id": self.keys.user_key(user)}

        def read(rows: Rows) -> Standing:
            row = _accepted(rows[0], arguments)
            return Standing(row[20], row[_HELD], moment(row[_EXPIRES_AT]))

        return Call("balance", arguments, read)

    @Operation
    def lots(self, user: Key) -> Call[list[Lot]]:
        """The credits of ``user`` that expire, in the order in which they are spent. An unknown user has none."""

        def read(rows: Rows) -> list[Lot]:
            return [Lot(uuid(row[1]), row[5], row[22], moment(row[_EXPIRES_AT]), row[8]) for row in rows]  # type: ignore[arg-type]  # every lot has both

        return Call("lots", {"user_id": self.keys.user_key(user)}, read)

    @Operation
    def balance(self, user: Key) -> Call[int]:
        """The credits of ``user``, negative when in debt. Raises UnknownUser."""
        return _balance("balance", user_id=self.keys.user_key(user))

    @Operation
    def balance_at(self, user: Key, when: dt.datetime) -> Call[int]:
        """The balance after all that had completed at ``when`` (inclusive; needs a time zone), by the server's clock.

        Raises:
            InvalidArgument, UnknownUser: nothing was read.
        """
        return _balance("balance_at", user_id=self.keys.user_key(user), at=_moment("when", when))

    @Operation
    def history(
        self,
        user: Key,
        *,
        limit: int = 50,
        before: str | None = None,
        include_failed: bool = False,
    ) -> Call[list[CreditTransaction]]:
        """The rows of ``user``, newest first: pending ones, then completed ones by ``sequence``.

        Read on with ``before=rows[-1].cursor``; each page costs the same, however long the history. An unknown user
        has none. ``include_failed`` shows failed purchases among the pending ones.

        Raises:
            InvalidArgument: nothing was read.
        """
        if before is not None and not isinstance(before, str):
            raise InvalidArgument.of("before", before, "pass the cursor of a row that history returned")
        arguments = {
            "user_id": self.keys.user_key(user),
            "row_limit": _whole("limit", limit, 1, HISTORY_MAX),
            "before": _optional("before", before, KEY_MAX),
            "include_failed": boolean("include_failed", include_failed),
        }
        return Call("history", arguments, lambda rows: [self._answered(row, arguments) for row in rows])

    @Operation
    def events(self, *, after: str | None = None, limit: int = 100) -> Call[list[Event]]:
        """The events of all users, oldest first, those after the cursor ``after``, or from the oldest that is kept.

        Read on with ``after=events[-1].cursor``: nothing is missed, since an event is returned once all transactions
        that began to write before its own have ended. There are none until ``tallystick events enable``.

        Raises:
            InvalidArgument: nothing was read.
        """
        if after is not None and not isinstance(after, str):
            raise InvalidArgument.of("after", after, "pass the cursor of an event")
        arguments = {
            "after": _optional("after", after, KEY_MAX),
            "row_limit": _whole("limit", limit, 1, HISTORY_MAX),
        }
        return Call("events", arguments, lambda rows: [self._event(row, arguments) for row in rows])

    @Operation
    def access(self, workshop: Key) -> Call[Access]:
        """If ``workshop`` is open, and why: unlocked, older than the paywall, or no paywall.

        A ``created_at`` without a time zone is taken as UTC.

        Raises:
            InvalidArgument, UnknownWorkshop: nothing was read.
        """
        arguments = {
            "workshop_id": self.keys.workshop_key(workshop),
            "paywall": self.config.paywall,
            "grandfathered_before": self.config.grandfathered_before,
        }

        def read(rows: Rows) -> Access:
            ((outcome, _, is_open, reason, *_),) = rows
            if outcome != DONE:
                raise error_of(outcome, Refusal(arguments))
            return Access(open=is_open, reason=AccessReason(reason))

        return Call("access", arguments, read)

    @Operation
    def lock(self, user: Key) -> Call[int]:
        """Lock the ledger of ``user`` until the caller's transaction ends; returns the balance.

        For a decision in several steps, such as a present for a user with 10 credits. Operations of the same
        transaction go on, those of others wait for its end.

        Raises:
            InvalidArgument, UnknownUser: nothing was read.
        """
        return _balance("lock", user_id=self.keys.user_key(user))

    # --- answers ---

    def _one(self, function: str, **arguments: Any) -> Call[CreditTransaction]:
        return Call(function, arguments, lambda rows: self._answered(rows[0], arguments))

    def _consumption(self, n: int, item: object) -> Call[CreditTransaction]:
        if not isinstance(item, Consume):
            raise InvalidArgument(
                f"items[{n}]={shown(item)}: pass Consume(user, key=…), with the arguments of consume",
                argument="items",
                value=item,
            )
        return self.consume.call(
            item.user,
            workshop=item.workshop,
            credits=item.credits,
            key=item.key,
            description=item.description,
            metadata=item.metadata,
        )

    def together(self, calls: Sequence[Call[CreditTransaction]]) -> Call[list[CreditTransaction | LedgerError]]:
        """Calls of ``consume`` as one of ``consume_many``, whose results come in the order of the calls."""
        asked = [call.arguments for call in calls]

        def read(rows: Rows) -> list[CreditTransaction | LedgerError]:
            results: dict[int, CreditTransaction | LedgerError] = {}
            for row in rows:
                n = row[_ITEM] - 1
                try:
                    results[n] = self._answered(row, asked[n])
                except LedgerError as refusal:
                    results[n] = refusal
            return [results[n] for n in range(len(asked))]

        def listed(name: str) -> list[Any] | None:
            values = [arguments[name] for arguments in asked]
            return None if all(value is None for value in values) else values

        arguments = {
            "user_ids": [arguments["user_id"] for arguments in asked],
            "keys": [arguments["key"] for arguments in asked],
            "workshop_ids": listed("workshop_id"),
            "amounts": listed("amount"),
            "descriptions": listed("description"),
            "metadata": listed("metadata"),
        }
        return Call("consume_many", arguments, read)

    def _answered(self, row: Sequence[Any], arguments: Mapping[str, Any]) -> CreditTransaction:
        """The row of a ``tallystick.answer``. Raises the error of a refusal."""
        outcome = row[0]
        if outcome != DONE and outcome != REPLAYED:  # noqa: PLR1714 - on the path of every call
            raise _refusal(row, arguments, workshop_id=self._workshop(row[9]))
        # By position, in the server's order of attributes: names would take a third of the time.
        return CreditTransaction(
            uuid(row[1]),
            self._user(row[2]),
            _TYPES[row[3]],
            _STATUSES[row[4]],
            row[5],
            row[6],
            row[7],
            row[8],
            self._workshop(row[9]),
            uuid(row[10]),
            row[11],
            row[12],
            row[13],
            row[14],
            row[15],
            row[16],
            document(row[17]),
            moment(row[18]),  # type: ignore[arg-type]  # every row has one
            moment(row[19]),
            outcome == REPLAYED,
            row[20],
            moment(row[_EXPIRES_AT]),
        )

    def _event(self, row: Sequence[Any], arguments: Mapping[str, Any]) -> Event:
        if row[0] != DONE:
            raise error_of(row[0], Refusal(arguments, detail=document(row[14]) or {}))
        return Event(
            row[2],
            row[1],
            row[3],
            moment(row[4]),  # type: ignore[arg-type]  # every event has one
            self._user(row[5]),
            uuid(row[6]),
            row[7],
            row[8],
            row[9],
            self._workshop(row[10]),
            row[11],
            document(row[12]),
            row[13],
        )

    # --- arguments ---

    def _whole(self, argument: str, value: object) -> int:
        return _whole(argument, value, 1, self._credits_max)

    def _linked(  # noqa: PLR0917 - by place, as its two callers have them
        self,
        function: str,
        user: Key,
        target: UUID | str,
        credits: int | None,
        key: str,
        description: str | None,
        metadata: Mapping[str, Any] | None,
    ) -> Call[CreditTransaction]:
        about = {"reverse": "consumption", "correct": "grant"}.get(function, "purchase")
        return self._one(
            function,
            user_id=self.keys.user_key(user),
            amount=None if credits is None else self._whole("credits", credits),
            key=_text("key", key, KEY_MAX),
            description=_optional("description", description),
            metadata=_document(metadata),
            **{f"{about}_id": _uuid(about, target)},
        )


# --- answers ---

_TYPES = {str(each): each for each in CreditTransactionType}
_STATUSES = {str(each): each for each in CreditTransactionStatus}
_ITEM = 24
_HELD, _EXPIRES_AT = 25, 26
"""Positions in an answer. Later versions add attributes after them."""


def _balance(function: str, **arguments: Any) -> Call[int]:
    return Call(function, arguments, lambda rows: int(_accepted(rows[0], arguments)[20]))


def _accepted(row: Sequence[Any], arguments: Mapping[str, Any]) -> Sequence[Any]:
    """The row of an answer. Raises the error of a refusal."""
    if row[0] != DONE and row[0] != REPLAYED:
        raise _refusal(row, arguments)
    return row


def _refusal(row: Sequence[Any], arguments: Mapping[str, Any], *, workshop_id: Key | None = None) -> Exception:
    return error_of(
        row[0],
        Refusal(
            arguments,
            id=uuid(row[1]),
            status=row[4],
            amount=row[5],
            stripe_session_id=row[11],
            balance=row[20],
            required=row[21],
            remaining=row[22],
            held=row[_HELD],
            workshop_id=workshop_id,
            detail=document(row[23]) or {},
        ),
    )


# --- arguments ---


def _whole(argument: str, value: object, low: int, high: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return int(value)  # also of an enum's member
    raise InvalidArgument.of(argument, value, f"pass a whole number from {low} to {high}")


def boolean(argument: str, value: object) -> bool:
    """``value``, which must be True or False: in Python the text "false" counts as true. Raises InvalidArgument."""
    if isinstance(value, bool):
        return value
    raise InvalidArgument.of(argument, value, "pass True or False")


def _text(argument: str, value: object, longest: int = TEXT_MAX) -> str:
    if isinstance(value, str) and 0 < len(value) <= longest:
        try:
            value.encode()
        except UnicodeEncodeError:
            pass
        else:
            if "\0" not in value:
                return str.__str__(value)  # an enum member's text, where str() returns its name
        problem = "holds a NUL or a lone surrogate, which PostgreSQL cannot store"
    else:
        problem = f"pass a text of 1 to {longest} characters"
    raise InvalidArgument.of(argument, value, problem)


def _optional(argument: str, value: object, longest: int = TEXT_MAX) -> str | None:
    return None if value is None else _text(argument, value, longest)


def _moment(argument: str, value: object) -> dt.datetime:
    if not isinstance(value, dt.datetime) or value.tzinfo is None:
        raise InvalidArgument.of(argument, value, "pass a datetime with a time zone, as datetime.now(UTC)")
    try:
        value.astimezone(dt.UTC)  # as it is read again
    except OverflowError:
        raise InvalidArgument.of(argument, value, "pass a datetime that is in the years 1 to 9999 in UTC") from None
    return value


def _interval(argument: str, value: object) -> dt.timedelta | None:
    if value is None or (isinstance(value, dt.timedelta) and abs(value) <= INTERVAL_MAX):
        return value
    raise InvalidArgument.of(
        argument, value, f"pass a timedelta of at most {INTERVAL_MAX.days} days, as timedelta(days=90)"
    )


def _document(value: object) -> Mapping[str, Any] | None:
    """A JSON object that PostgreSQL can store and that can be read again: no NaN, no NUL, no lone surrogate."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        try:
            text = json_text(value, ascii_only=False)
            text.encode()
        except (TypeError, ValueError, RecursionError):
            pass
        else:
            # in JSON a NUL is written as \u0000, and a backslash before these letters as two
            if not ("\\u0000" in text and _NUL.search(text)) and _depth(text) <= DEPTH_MAX:
                return value
    raise InvalidArgument.of(
        "metadata", value, f"pass a mapping that is a JSON object, without NUL, nested at most {DEPTH_MAX} deep"
    )


_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]')


def _depth(text: str) -> int:
    """The depth of a JSON text, or a larger number that is still allowed."""
    most = text.count("{") + text.count("[")
    if most <= DEPTH_MAX:
        return most
    depth = most = 0
    for found in _BRACKETS.finditer(text):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(found[0], 0)
        most = max(most, depth)
    return most


def _uuid(argument: str, value: object) -> UUID:
    if isinstance(value, UUID):
        return value
    if isinstance(value, str):
        try:
            return UUID(value)
        except ValueError:
            pass
    raise InvalidArgument.of(argument, value, "pass the id of a credit transaction, a UUID")


def _currency(value: object) -> str:
    if isinstance(value, str) and len(value) == 3 and value.isascii() and value.isalpha():  # noqa: PLR2004 - ISO 4217
        return value.lower()
    raise InvalidArgument.of("currency", value, "pass a three-letter code, as 'usd'")


def _either(one: str, first: object, other: str, second: object) -> None:
    if first is None and second is None:
        raise InvalidArgument(f"pass {one} or {other}", argument=one, value=None)
