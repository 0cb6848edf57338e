"""Everything Tallystick raises, as one tree.

::

    TallystickError
    ├── ConfigError                  tallystick.toml, pyproject.toml or the environment
    ├── DevServerError               the embedded PostgreSQL
    ├── DevStripeError               the Stripe test double refused, as Stripe does
    ├── DatabaseError                the database or the connection to it
    │   ├── DatabaseUnavailable      no connection could be made            (retryable)
    │   ├── OutcomeUnknown           the connection died under a call        (outcome_unknown)
    │   ├── Conflict                 serialization failure, deadlock, timeout (retryable)
    │   ├── PermissionDenied         the role may not do this
    │   └── HostInterfered           a trigger of the host changed or suppressed a write
    ├── SchemaError                  the database is not in the shape this package needs
    │   ├── NotMigrated              run: tallystick migrate apply
    │   ├── SchemaTooNew             the database is ahead of this package
    │   ├── HostMismatch             the mapping names a table or column that does not exist or does not fit
    │   └── IncompatibleColumn       the host has a column of ours with another type
    ├── MigrationError               a migration did not happen; nothing was changed
    │   ├── MigrationRunning         another run holds the lock
    │   ├── MigrationBlocked         the tables could not be locked within the budget
    │   ├── PoolerRefused            the address is a pooler's
    │   └── LedgerNotEmpty           undo would delete history
    ├── BackupError                  a backup or a restore did not happen; nothing is left of it
    ├── RequestRefused               the web pages refused a request; nothing was changed
    │   ├── NotSignedIn              no user is signed in
    │   ├── CrossSiteRequest         another site's page made it
    │   ├── RequestTooLarge          its body is over the limit
    │   ├── RequestTooSlow           its body did not arrive in time
    │   └── WorkshopLocked           a credit opens this workshop
    ├── StripeError                  Stripe, or a request to it
    │   ├── StripeNotConfigured      a key, secret or pack is missing, or of the wrong mode
    │   ├── UnknownPack              nothing of this name is on sale
    │   ├── PackMismatch             Stripe's price differs from the pack
    │   ├── ReturnAddressRefused     the address is on no allowed origin
    │   ├── SessionNotYours          the session is another user's, or unknown here
    │   ├── StripeRefused            Stripe refused the request
    │   └── StripeUnavailable        Stripe did not answer, or asked to wait     (retryable)
    ├── SeedRefused                  this database does not look like development
    ├── SeedImpossible               the host's tables refuse the seed's rows, or their removal
    └── LedgerError                  a ledger call was refused; nothing was written
        ├── InvalidArgument          (also a ValueError)
        ├── UnknownUser
        ├── UserDeleted
        ├── UnknownWorkshop
        ├── WorkshopDeleted
        ├── WorkshopNotOwned
        ├── WorkshopUnaccounted      marked as unlocked, and no consumption paid for it
        ├── UnknownPurchase
        ├── PurchaseNotPending       the state machine has no such step
        ├── PurchaseNotCompleted     only a completed purchase can be refunded
        ├── SessionConflict          the session has another purchase, or the purchase another session
        ├── StripeCustomerConflict   the customer has another user, or the user another customer
        ├── InsufficientCredits
        ├── RefundExceedsPurchase
        ├── ReinstatementExceedsRefunds
        ├── UnknownConsumption
        ├── ReversalExceedsConsumption
        ├── UnknownGrant
        ├── CorrectionExceedsGrant
        ├── UnknownHold
        ├── HoldClosed               released, or captured already
        ├── CaptureExceedsHold
        ├── HoldsPending             the account has open holds and cannot be merged yet
        ├── BalanceOutOfRange        the balance would leave the range of its type
        ├── IdempotencyKeyReused     same key, other payload
        └── LedgerInconsistent       the ledger contradicts itself; run the audit

Each type has its values as attributes, and its message ends with the next step. Two flags are for the caller:
``retryable`` (nothing was written, and the transaction may be run again) and ``outcome_unknown`` (the call may or may
not have written; the same call with the same key is safe).
"""

from __future__ import annotations

from typing import ClassVar, Self
from uuid import UUID

Key = UUID | str | int  # a host's user or workshop key

SHOWN_MAX = 80


def type_shown(kind: type) -> str:
    """A type for a message about a value of it: "a str", "a psycopg.Connection"."""
    return f"a {kind.__qualname__}" if kind.__module__ == "builtins" else f"a {kind.__module__}.{kind.__qualname__}"


def shown(value: object) -> str:
    """The beginning of ``value``, for a message: a value may be a megabyte."""
    if isinstance(value, UUID):
        return str(value)
    try:
        text = repr(value[: SHOWN_MAX + 1] if isinstance(value, str | bytes) else value)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes, or lists in lists
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}…"


class TallystickError(Exception):
    """Root of the tree. Keyword arguments become attributes; the message is for a person.

    A field that is None unless it is given has that as its default.
    """

    retryable: ClassVar[bool] = False
    outcome_unknown: ClassVar[bool] = False

    def __init__(self, message: str, **fields: object) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields
        self.__dict__.update(fields)

    def __reduce__(self) -> tuple[object, ...]:
        # Errors are pickled between processes (worker pools, task queues); the default loses keyword arguments.
        return _rebuild, (type(self), self.message, self.fields)


def _rebuild(kind: type[TallystickError], message: str, fields: dict[str, object]) -> TallystickError:
    return kind(message, **fields)


class ConfigError(TallystickError):
    """The configuration cannot be read."""

    path: str | None = None
    line: int | None = None
    key: str | None = None


class DevServerError(TallystickError):
    """The embedded PostgreSQL cannot be found, started or stopped."""


class DevStripeError(TallystickError):
    """The Stripe test double refused a request or a control; its state is as it was.

    Over HTTP these are the fields of Stripe's error answer.
    """

    status: int
    type: str
    code: str | None = None
    param: str | None = None


class DatabaseError(TallystickError):
    """The database could not execute a call."""

    sqlstate: str | None = None


class DatabaseUnavailable(DatabaseError):
    """No connection could be made, or the server has no disk or memory left (53*). Nothing was written."""

    retryable = True


class OutcomeUnknown(DatabaseError):
    """The connection died under a call (SQLSTATE 08*, 57P*, 58030, XX000), so its effect is unknown.

    Make the same call again with the same key: if the first one was written, its result comes back marked
    ``replayed``.
    """

    outcome_unknown = True


class Conflict(DatabaseError):
    """Another transaction was in the way (40001, 40P01) or a timeout cut the wait (55P03, 57014).

    Nothing was written. Roll back and run the whole transaction again.
    """

    retryable = True


class PermissionDenied(DatabaseError):
    """The database role lacks a privilege (42501)."""


class HostInterfered(DatabaseError):
    """A trigger, rule or policy of the host changed or suppressed a write of the ledger (TS119). All is rolled back."""


class SchemaError(TallystickError):
    """The database is not in the shape that this package needs."""


class NotMigrated(SchemaError):
    """Tallystick's tables or columns are missing."""

    revision: str | None = None


class SchemaTooNew(SchemaError):
    """A later version of Tallystick migrated this database. ``revision`` is None if an unknown answer showed it."""

    revision: str | None = None


class HostMismatch(SchemaError):
    """The mapping names a table or column that does not exist or does not fit."""

    table: str
    column: str | None = None


class IncompatibleColumn(SchemaError):
    """The host has a column of ours that cannot be adopted."""

    table: str
    column: str
    found: str
    expected: str


class MigrationError(TallystickError):
    """A migration did not happen. The database is as it was."""


class MigrationRunning(MigrationError):
    """Another migration of this database is running."""

    retryable = True


class MigrationBlocked(MigrationError):
    """The tables could not be locked without stalling traffic."""

    attempts: int
    blockers: list[object]

    retryable = True


class PoolerRefused(MigrationError):
    """Migrations need a session of their own; a transaction pooler gives none."""


class LedgerNotEmpty(MigrationError):
    """Undo would delete credit transactions."""

    rows: int


class BackupError(TallystickError):
    """A backup or a restore did not happen. Nothing is left of it."""


class StripeError(TallystickError):
    """Selling through Stripe did not work."""


class StripeNotConfigured(StripeError):
    """A key, a secret or a pack is missing or of the wrong mode. Nothing was sent."""

    setting: str


class UnknownPack(StripeError):
    """Nothing of this name is on sale."""

    pack: str


class PackMismatch(StripeError):
    """The price at Stripe is missing, inactive, or differs from the pack. Nothing was sold."""

    pack: str
    problem: str


class ReturnAddressRefused(StripeError):
    """A buyer would be sent to an address that is on no allowed origin."""

    address: str


class SessionNotYours(StripeError):
    """The Stripe session pays for no purchase of this user."""

    stripe_session_id: str


class StripeRefused(StripeError):
    """Stripe refused the request (a 4xx other than 409 and 429)."""

    status: int | None
    code: str | None
    param: str | None


class StripeUnavailable(StripeError):
    """No answer, a 5xx or a 429. The same call may be made again: it continues the same purchase."""

    retryable = True

    status: int | None


class SeedRefused(TallystickError):
    """The database does not look like a development database."""

    reason: str


class RequestRefused(TallystickError):
    """The web pages refused a request. Nothing was changed."""


class NotSignedIn(RequestRefused):
    """The app's ``current_user`` found no user for this request."""


class CrossSiteRequest(RequestRefused):
    """A page of another site made this request with the user's cookies."""

    origin: str | None


class RequestTooLarge(RequestRefused):
    """The body is over the limit."""

    limit_bytes: int


class RequestTooSlow(RequestRefused):
    """The body did not arrive within the time for it."""

    limit_s: float


class WorkshopLocked(RequestRefused):
    """The workshop needs a credit that was not spent yet."""

    workshop: Key
    title: str | None
    user: Key
    balance: int
    held: int
    available: int
    required: int


class SeedImpossible(TallystickError):
    """The host's own columns, constraints or triggers refuse the seed's rows, or their removal.

    The refused call wrote nothing. ``column`` and ``constraint`` are None if neither is the cause.
    """

    table: str
    column: str | None = None
    constraint: str | None = None


class LedgerError(TallystickError):
    """A call was refused. Nothing was written and the caller's transaction is still usable."""


class InvalidArgument(LedgerError, ValueError):
    """An argument is out of its domain."""

    argument: str
    value: object

    @classmethod
    def of(cls, argument: str, value: object, problem: str) -> Self:
        """The error for a value that is no good; ``problem`` is what to pass instead."""
        return cls(f"{argument}={shown(value)}: {problem}", argument=argument, value=value)


class UnknownUser(LedgerError):
    """No user has this key."""

    user: Key


class UserDeleted(LedgerError):
    """The user is soft-deleted."""

    user: Key


class UnknownWorkshop(LedgerError):
    """No workshop has this key."""

    workshop: Key


class WorkshopDeleted(LedgerError):
    """The workshop is soft-deleted."""

    workshop: Key


class WorkshopNotOwned(LedgerError):
    """The workshop belongs to another user."""

    workshop: Key
    user: Key


class WorkshopUnaccounted(LedgerError):
    """The workshop is marked as unlocked, but no consumption paid for it."""

    workshop: Key


class UnknownPurchase(LedgerError):
    """This user has no such purchase."""

    user: Key
    purchase: object


class PurchaseNotPending(LedgerError):
    """The purchase cannot take this step from its state."""

    purchase: UUID
    status: str


class PurchaseNotCompleted(LedgerError):
    """Only a completed purchase can be refunded."""

    purchase: UUID
    status: str


class SessionConflict(LedgerError):
    """The Stripe session belongs to another purchase, or the purchase to another session."""

    purchase: UUID
    stripe_session_id: str


class StripeCustomerConflict(LedgerError):
    """The user has another Stripe customer, or the customer is another user's."""

    user: Key
    stripe_customer_id: str


class InsufficientCredits(LedgerError):
    """The balance, less the credits that holds have set aside, does not cover the amount."""

    user: Key
    balance: int
    held: int
    available: int
    required: int


class RefundExceedsPurchase(LedgerError):
    """The call asked to refund more credits than are left of the purchase."""

    purchase: UUID
    left: int
    asked: int


class ReinstatementExceedsRefunds(LedgerError):
    """The call asked to give back more credits than refunds took of the purchase."""

    purchase: UUID
    taken: int
    asked: int


class UnknownConsumption(LedgerError):
    """This user has no such consumption."""

    user: Key
    consumption: object


class ReversalExceedsConsumption(LedgerError):
    """The call asked to give back more credits than are left of the consumption."""

    consumption: UUID
    left: int
    asked: int


class UnknownGrant(LedgerError):
    """This user has no such grant."""

    user: Key
    grant: object


class CorrectionExceedsGrant(LedgerError):
    """The call asked to take back more credits than are left of the grant."""

    grant: UUID
    left: int
    asked: int


class UnknownHold(LedgerError):
    """This user has no such hold."""

    user: Key
    hold: object


class HoldClosed(LedgerError):
    """The hold was released, or is captured already."""

    hold: UUID
    status: str


class CaptureExceedsHold(LedgerError):
    """The call asked to charge more credits than the hold allows."""

    hold: UUID
    limit: int
    asked: int


class HoldsPending(LedgerError):
    """The user has holds that are not closed. Capture or release them before the merge."""

    user: Key
    held: int


class BalanceOutOfRange(LedgerError):
    """The balance would leave the range of its type, integer or bigint."""

    user: Key
    balance: int
    amount: int


class IdempotencyKeyReused(LedgerError):
    """The key was used before for something else."""

    key: str
    differs: dict[str, tuple[object, object]]


class LedgerInconsistent(LedgerError):
    """The user's row and the ledger contradict each other."""

    user: Key
