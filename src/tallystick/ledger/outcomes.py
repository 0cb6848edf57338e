"""The refusals of the ledger's functions, each as the error that Python raises.

The names are those of ``sql/sqlstate_of.sql``; a name that is added there is added here.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from uuid import UUID

from tallystick import errors
from tallystick.errors import LedgerError, SchemaTooNew, TallystickError, shown

DONE, REPLAYED = "completed", "replayed"


class Refusal(NamedTuple):
    """A refusal: the call's arguments, and the details in the answer."""

    arguments: Mapping[str, Any]
    id: Any = None
    status: Any = None
    amount: Any = None
    stripe_session_id: Any = None
    balance: Any = None
    required: Any = None
    remaining: Any = None
    held: Any = None
    workshop_id: Any = None
    detail: Mapping[str, Any] = {}

    @property
    def user(self) -> Any:
        """The user's key, as the caller gave it."""
        return self.arguments.get("into_user_id" if self.detail.get("argument") == "into_user_id" else "user_id")

    @property
    def workshop(self) -> Any:
        """The workshop's key, as the caller gave it, or without such an argument as the answer has it."""
        asked = self.arguments.get("workshop_id")
        return self.workshop_id if asked is None else asked

    @property
    def purchase(self) -> Any:
        """The purchase, as the caller named it."""
        return self.arguments.get("purchase_id") or self.arguments.get("stripe_session_id")

    @property
    def command(self) -> str:
        """The user as an argument of a command line."""
        return shlex.quote(str(self.user))


def error_of(outcome: str, refused: Refusal) -> TallystickError:
    """The error for a refusal, with its fields and its message."""
    made = ERRORS.get(outcome)
    if made is None:
        return SchemaTooNew(
            f"the database answers {outcome!r}, which this package does not know. Run: pip install -U tallystick",
        )
    return made(refused)


def counted(credits: int) -> str:
    """A number of credits in words."""
    return f"{credits} credit" if credits in (1, -1) else f"{credits} credits"


def _invalid_argument(r: Refusal) -> LedgerError:
    argument = str(r.detail.get("argument"))
    value = r.arguments.get(argument)
    return errors.InvalidArgument(
        f"{argument}={shown(value)}: pass {r.detail.get('expected')}", argument=argument, value=value
    )


def _session_conflict(r: Refusal) -> LedgerError:
    asked = r.arguments.get("stripe_session_id")
    holder = r.detail.get("held_by")
    message = (
        f"the Stripe session {asked} belongs to purchase {holder}, not {r.id}. A session pays for one purchase"
        if holder
        else f"purchase {r.id} has the Stripe session {r.stripe_session_id}, not {asked}. "
        "Start another purchase for another session"
    )
    return errors.SessionConflict(message, purchase=r.id, stripe_session_id=asked)


def _stripe_customer_conflict(r: Refusal) -> LedgerError:
    customer = r.arguments.get("stripe_customer_id")
    reason = (
        f"the user has {r.detail['has']}. To change it: replace=True"
        if "has" in r.detail
        else "another user has this customer"
    )
    return errors.StripeCustomerConflict(
        f"cannot give user {r.user} the Stripe customer {customer}: {reason}", user=r.user, stripe_customer_id=customer
    )


def _insufficient_credits(r: Refusal) -> LedgerError:
    held = r.held or 0
    kept = f", of which holds keep {held} and {r.balance - held} can be spent," if held else ""
    return errors.InsufficientCredits(
        f"user {r.user} has {counted(r.balance)}{kept} and this takes {counted(r.required)}. "
        "Sell a pack first (ledger.start_purchase), or give credits: tallystick grant",
        user=r.user,
        balance=r.balance,
        held=held,
        available=r.balance - held,
        required=r.required,
    )


def _asked(r: Refusal) -> object:
    return "all" if r.required is None else r.required


def _asked_credits(r: Refusal) -> int:
    return int(r.remaining if r.required is None else r.required)


def _hold_closed(r: Refusal) -> LedgerError:
    done = "released. Place another one, with another key: ledger.hold"
    if r.status == "completed":
        done = "captured already. To give its credits back: ledger.reverse"
    return errors.HoldClosed(f"hold {r.id} is {done}", hold=r.id, status=r.status)


def _balance_out_of_range(r: Refusal) -> LedgerError:
    moved = r.amount if r.required is None else r.required
    return errors.BalanceOutOfRange(
        f"user {r.user} has {counted(r.balance)}; a change by {moved} leaves the range of a balance. "
        "Nothing was written",
        user=r.user,
        balance=r.balance,
        amount=moved,
    )


def _idempotency_key_reused(r: Refusal) -> LedgerError:
    key = r.arguments.get("key")
    one, remedy = f"key {key!r}", ". Use a new key for a new intent"
    if key is None:  # an operation that is done once for a row, and has no key
        kind = "hold" if "hold_id" in r.arguments else "purchase"
        key, remedy = str(r.id), ""
        one = f"{kind} {key}"
    differs = {
        name: (_typed(name, before), _typed(name, now)) for name, (before, now) in r.detail.get("differs", {}).items()
    }
    listed = ", ".join(f"{name} {before!s} (now {after!s})" for name, (before, after) in differs.items())
    return errors.IdempotencyKeyReused(f"the {one} was used before, for {listed}{remedy}", key=key, differs=differs)


def _ledger_inconsistent(r: Refusal) -> LedgerError:
    sequence = r.detail.get("sequence")
    other = "" if sequence else ", or the balance is below 0"
    return errors.LedgerInconsistent(
        f"the row of user {r.user} says {sequence} completed rows, and the ledger has more{other}. "
        f"Nothing was written. Look with: tallystick audit --user {r.command}",
        user=r.user,
    )


def _typed(name: str, value: Any) -> Any:
    return UUID(value) if name == "refund_of" and value is not None else value


def _minute(r: Refusal) -> str:
    return str(r.detail.get("deleted_at", ""))[:16].replace("T", " ")


ERRORS: Mapping[str, Callable[[Refusal], LedgerError]] = {
    "invalid_argument": _invalid_argument,
    "unknown_user": lambda r: errors.UnknownUser(
        f"no user {shown(r.user)} in the mapped table. Pass the value of the mapped key column (host.users.key)",
        user=r.user,
    ),
    "user_deleted": lambda r: errors.UserDeleted(
        f"user {r.user} was deleted at {_minute(r)}. To bring the user back: tallystick users restore, or "
        "Accounts.restore_user",
        user=r.user,
    ),
    "unknown_workshop": lambda r: errors.UnknownWorkshop(
        f"no workshop {shown(r.workshop)} in the mapped table. "
        "Pass the value of the mapped key column (host.workshops.key)",
        workshop=r.workshop,
    ),
    "workshop_deleted": lambda r: errors.WorkshopDeleted(
        f"workshop {r.workshop} was deleted at {_minute(r)}. To bring it back: tallystick workshops restore, or "
        "Accounts.restore_workshop",
        workshop=r.workshop,
    ),
    "workshop_not_owned": lambda r: errors.WorkshopNotOwned(
        f"workshop {r.workshop} belongs to another user than {r.user}. Only its owner can unlock it",
        workshop=r.workshop,
        user=r.user,
    ),
    "workshop_unaccounted": lambda r: errors.WorkshopUnaccounted(
        f"workshop {r.workshop} is marked as unlocked, but no consumption paid for it. Nothing was charged. "
        f"Look with: tallystick audit --user {r.command}",
        workshop=r.workshop,
    ),
    "unknown_purchase": lambda r: errors.UnknownPurchase(
        f"user {r.user} has no purchase {r.purchase}. Look with: tallystick history {r.command}",
        user=r.user,
        purchase=r.purchase,
    ),
    "purchase_not_pending": lambda r: errors.PurchaseNotPending(
        f"purchase {r.id} is {r.status} and cannot fail. To take its credits back: tallystick refund, or "
        "ledger.refund in Python",
        purchase=r.id,
        status=r.status,
    ),
    "purchase_not_completed": lambda r: errors.PurchaseNotCompleted(
        f"purchase {r.id} is {r.status}; there is nothing to take back. To give it up: ledger.fail_purchase",
        purchase=r.id,
        status=r.status,
    ),
    "session_conflict": _session_conflict,
    "stripe_customer_conflict": _stripe_customer_conflict,
    "insufficient_credits": _insufficient_credits,
    "refund_exceeds_purchase": lambda r: errors.RefundExceedsPurchase(
        f"purchase {r.id} has {counted(r.remaining)} left to refund of {counted(r.amount)}; asked: {_asked(r)}",
        purchase=r.id,
        left=r.remaining,
        asked=_asked_credits(r),
    ),
    "reinstatement_exceeds_refunds": lambda r: errors.ReinstatementExceedsRefunds(
        f"refunds took {counted(r.remaining)} of purchase {r.id}; "
        f"asked to give back: {_asked(r)}. To give more: ledger.grant",
        purchase=r.id,
        taken=r.remaining,
        asked=_asked_credits(r),
    ),
    "balance_out_of_range": _balance_out_of_range,
    "idempotency_key_reused": _idempotency_key_reused,
    "ledger_inconsistent": _ledger_inconsistent,
    "unknown_consumption": lambda r: errors.UnknownConsumption(
        f"user {r.user} has no completed consumption {r.arguments.get('consumption_id')}. "
        f"Look with: tallystick history {r.command}",
        user=r.user,
        consumption=r.arguments.get("consumption_id"),
    ),
    "unknown_grant": lambda r: errors.UnknownGrant(
        f"user {r.user} has no grant {r.arguments.get('grant_id')} that can be corrected. "
        f"Look with: tallystick history {r.command}",
        user=r.user,
        grant=r.arguments.get("grant_id"),
    ),
    "unknown_hold": lambda r: errors.UnknownHold(
        f"user {r.user} has no hold {r.arguments.get('hold_id')}. Look with: tallystick history {r.command}",
        user=r.user,
        hold=r.arguments.get("hold_id"),
    ),
    "reversal_exceeds_consumption": lambda r: errors.ReversalExceedsConsumption(
        f"consumption {r.id} has {counted(r.remaining)} left to give back of {counted(-r.amount)}; "
        f"asked: {_asked(r)}. To give more: ledger.grant",
        consumption=r.id,
        left=r.remaining,
        asked=_asked_credits(r),
    ),
    "correction_exceeds_grant": lambda r: errors.CorrectionExceedsGrant(
        f"grant {r.id} has {counted(r.remaining)} left to take back of {counted(r.amount)}; asked: {_asked(r)}",
        grant=r.id,
        left=r.remaining,
        asked=_asked_credits(r),
    ),
    "hold_closed": _hold_closed,
    "capture_exceeds_hold": lambda r: errors.CaptureExceedsHold(
        f"hold {r.id} allows {counted(r.remaining)} to be charged; asked: {r.required}. "
        "Charge the rest with ledger.consume, and give the next hold a capture_limit",
        hold=r.id,
        limit=r.remaining,
        asked=r.required,
    ),
    "holds_pending": lambda r: errors.HoldsPending(
        f"holds of user {r.user} have set {counted(r.held)} aside. Capture or release them first; "
        f"they are in: tallystick history {r.command}",
        user=r.user,
        held=r.held,
    ),
}
