"""The functions and their outcomes as facts, for the pages and the clients that are written from them.

Names, parameters and the outcomes of each function are read out of ``sql/``, so none of it can drift from what is
installed. The sentences are here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from tallystick.ledger.functions import REVISIONS, Function
from tallystick.ledger.outcomes import DONE, REPLAYED


@dataclass(frozen=True)
class DocumentedRefusal:
    """A refusal: its name, the SQLSTATE of the strict functions, its meaning, and the fields of an answer with it.

    ``fields`` maps attributes of the answer to their types; those of ``detail`` are written ``detail.NAME``. A field
    whose type ends in ``?`` may be missing.
    """

    name: str
    sqlstate: str
    meaning: str
    fields: Mapping[str, str]


_MEANINGS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "invalid_argument": (
        "An argument is missing or out of its domain. Pass the expected value.",
        {"detail.argument": "text", "detail.expected": "text"},
    ),
    "unknown_user": (
        "No user has this key (argument says if it is into_user_id). Pass the value of the mapped key column.",
        {"detail.argument": "text?"},
    ),
    "user_deleted": ("The user is soft-deleted. To bring the user back: restore_user.", {"detail.deleted_at": "text"}),
    "unknown_workshop": ("No workshop has this key. Pass the value of the mapped key column.", {}),
    "workshop_deleted": (
        "The workshop is soft-deleted. To bring it back: restore_workshop.",
        {"detail.deleted_at": "text"},
    ),
    "workshop_not_owned": ("The workshop belongs to another user. Only its owner can unlock it.", {}),
    "workshop_unaccounted": (
        (
            "The workshop is marked as unlocked, but no consumption paid for it. Nothing was charged. "
            "Look with: tallystick audit."
        ),
        {},
    ),
    "unknown_purchase": ("The user has no such purchase. Look with: tallystick history.", {}),
    "purchase_not_pending": (
        "The purchase is completed and cannot fail. To take its credits back: refund.",
        {"id": "uuid", "status": "text"},
    ),
    "purchase_not_completed": (
        "The purchase is not completed, so there is nothing to take back. To give it up: fail_purchase.",
        {"id": "uuid", "status": "text"},
    ),
    "session_conflict": (
        (
            "The purchase has another Stripe session, or another purchase has this one (held_by). "
            "Start another purchase for another session."
        ),
        {"id": "uuid", "stripe_session_id": "text?", "detail.held_by": "uuid?"},
    ),
    "stripe_customer_conflict": (
        "The user has another Stripe customer (has; replace changes it), or another user has this one.",
        {"detail.has": "text?", "detail.of_another_user": "boolean?"},
    ),
    "insufficient_credits": (
        (
            "The call needs more credits than the balance less the credits in holds (credit_held). Sell a pack first, "
            "or grant credits."
        ),
        {"balance": "credits", "required": "credits", "credit_held": "credits?"},
    ),
    "refund_exceeds_purchase": (
        "Less of the purchase is left to refund than was asked for, or nothing.",
        {"id": "uuid", "amount": "credits", "required": "credits?", "remaining": "credits"},
    ),
    "reinstatement_exceeds_refunds": (
        "Refunds took less of the purchase than was asked for, or nothing. To give more: grant.",
        {"id": "uuid", "amount": "credits", "required": "credits?", "remaining": "credits"},
    ),
    "balance_out_of_range": ("The balance would leave the range of its type.", {"balance": "credits"}),
    "idempotency_key_reused": (
        (
            "The key was used before, for something else: differs has, by column, the earlier value and the value of "
            "this call. Use a new key for a new intent."
        ),
        {"id": "uuid", "detail.differs": "differences"},
    ),
    "ledger_inconsistent": (
        (
            "The user's row says fewer completed rows (sequence) than the ledger has, or has a balance below 0 and no "
            "row. Look with: tallystick audit."
        ),
        {"detail.sequence": "integer"},
    ),
    "host_interfered": (
        (
            "A trigger, rule or policy of the host changed or suppressed a write. The plain functions raise it too, "
            "and the whole transaction is rolled back."
        ),
        {},
    ),
    "unknown_consumption": ("The user has no such completed consumption. Look with: tallystick history.", {}),
    "unknown_grant": (
        "The user has no such grant, or it gave refunded credits back: reinstate and refund move those.",
        {},
    ),
    "unknown_hold": ("The user has no such hold. Look with: tallystick history.", {}),
    "reversal_exceeds_consumption": (
        "Less of the consumption is left to give back than was asked for, or nothing. To give more: grant.",
        {"id": "uuid", "amount": "credits", "required": "credits?", "remaining": "credits"},
    ),
    "correction_exceeds_grant": (
        "Less of the grant is left to take back than was asked for, or nothing.",
        {"id": "uuid", "amount": "credits", "required": "credits?", "remaining": "credits"},
    ),
    "hold_closed": (
        "The hold was released, or is captured already. To give captured credits back: reverse.",
        {"id": "uuid", "status": "text"},
    ),
    "holds_pending": (
        "Holds of the user have set credits aside (credit_held). Capture or release them before the account is merged.",
        {"credit_held": "credits"},
    ),
    "capture_exceeds_hold": (
        "The hold allows less to be charged. Give a hold a capture_limit if the work may cost more.",
        {"id": "uuid", "required": "credits", "remaining": "credits"},
    ),
}


PARAMETERS: Mapping[str, str] = {
    "user_id": "the user, by the mapped key column",
    "into_user_id": "the user that gets the credits",
    "key": "your name for this one intent, 1 to 255 characters, not beginning with `tallystick:`; the same key again "
    "gives the first result",
    "amount": "a number of credits, 1 or more; if NULL is allowed, it means all that are left, or held",
    "description": "for people, 1 to 10,000 characters; not compared when a key is used again",
    "metadata": "a JSON object of your own, such as the member of a team or the request",
    "workshop_id": "the workshop, by the mapped key column",
    "consumption_id": "the id of the consumption's row",
    "grant_id": "the id of the grant's row",
    "hold_id": "the id of the hold's row",
    "expires_at": "the moment at which the rest of these credits expires, in the future and before the year 9999; NULL "
    "for never",
    "expires_after": "the time that bought credits last, from their payment, up to 1000 years; NULL for ever",
    "expires_in": "the time that the hold lasts, 1 second to 366 days; NULL is 15 minutes",
    "capture_limit": "the most that may be captured, the amount or more; NULL is the amount",
    "allow_debt": "true also charges credits that the balance does not cover",
    "purchase_id": "the id of the purchase's row",
    "stripe_session_id": "the Checkout session, 1 to 255 characters; with purchase_id it is stored with that purchase",
    "stripe_payment_intent_id": "the payment intent, 1 to 255 characters",
    "stripe_price_id": "the price that is bought, 1 to 255 characters",
    "amount_paid": "money in minor units of the currency, 0 or more; given with currency, or neither",
    "currency": "three letters, as usd",
    "reason": "the reason of the failure, 1 to 10,000 characters; required",
    "at": "a moment; rows that completed at it are included",
    "row_limit": "the number of rows, 1 to 1,000; of sweep the number of users, 1 to 100,000",
    "before": "the cursor of a row, to read on after it: its sequence, or its id if it has none",
    "include_failed": "failed purchases too",
    "after": "the cursor of an event, to read on after it; NULL begins with the oldest",
    "threshold": "credits, 0 or more: a balance below it is low; NULL is the default, 0 is never",
    "paywall": "false opens every workshop that is not deleted",
    "grandfathered_before": "workshops made before this moment are open; NULL is the installation of Tallystick",
    "plan_tier": "a name of your choosing, 1 to 32 characters",
    "stripe_customer_id": "the customer at Stripe, 1 to 255 characters",
    "replace": "true replaces another customer of the user",
    # of consume_many, item by item
    "user_ids": "the users",
    "keys": "the keys, one for each user",
    "workshop_ids": "the workshops, one for each key; NULL, as a list or an item, for none",
    "amounts": "the numbers of credits, one for each key; NULL, as a list or an item, for 1",
    "descriptions": "the descriptions, one for each key; NULL, as a list or an item, for none",
}
"""One phrase for each parameter."""

ATTRIBUTES: Mapping[str, str] = {
    "outcome": "`completed`, `replayed`, or the name of a refusal",
    "id": "of the row that was written or found; of a refusal, of the row it is about",
    "user_id": "the user's key",
    "type": "`purchase`, `consumption`, `refund`, `grant`, `reversal`, `correction`, `expiry` or `transfer`",
    "status": "`pending`, `completed` or `failed`",
    "amount": "credits, signed",
    "balance_after": "the running balance; NULL until completed",
    "sequence": "1, 2, 3 … of the user, in the order of completion; NULL until completed",
    "description": "for people",
    "workshop_id": "the workshop's key",
    "refund_of": "the row that this one takes or gives back credits of; of a merge, the other account's row",
    "stripe_session_id": "the Checkout session, from Stripe",
    "stripe_payment_intent_id": "the payment intent, from Stripe",
    "stripe_price_id": "the price, from Stripe",
    "amount_paid": "money in minor units",
    "currency": "three lower-case letters",
    "idempotency_key": "the call's `key`",
    "metadata": "the caller's",
    "created_at": "when the row was written",
    "completed_at": "when the row was completed",
    "balance": "the user's balance now; in a replay it may differ from `balance_after`",
    "required": "credits that the call asked for",
    "remaining": "credits of the row that can still be taken or given back, or are left of a lot",
    "detail": "further values of a refusal, by outcome",
    "item": "the place in the lists of `consume_many`, from 1",
    "credit_held": "credits of the user that holds have set aside, now",
    "expires_at": "of a hold, or of the credits that the row gave",
    "event_id": "a number that no other event has",
    "cursor": "of an event: pass it as `after` to read on",
    "kind": "`purchase.completed` and the like, `balance.low` or `balance.debt`",
    "transaction_id": "the row of the ledger that the event is about",
    "threshold": "of `balance.low`: the balance fell below it",
    "credit_balance": "credits",
    "onboarding_complete": "the user has completed the onboarding",
    "stripe_customer_id": "the customer at Stripe",
    "plan_tier": "the plan",
    "updated_at": "when the user's row last changed",
    "deleted_at": "when it was soft-deleted",
    "open": "the workshop may be used",
    "reason": "`unlocked`, `grandfathered`, `paywall_off`, `locked` or `deleted`",
}
"""One phrase for each attribute of an answer."""


@cache
def refusals() -> tuple[DocumentedRefusal, ...]:
    """Every refusal, in the order of its code."""
    codes = re.findall(r"WHEN '(\w+)' THEN '(\w+)'", _text("sqlstate_of"))
    return tuple(DocumentedRefusal(name, code, *_MEANINGS[name]) for name, code in codes)


_LINKED = frozenset(
    {
        "unknown_purchase",
        "unknown_consumption",
        "unknown_grant",
        "purchase_not_completed",
        "refund_exceeds_purchase",
        "reinstatement_exceeds_refunds",
        "reversal_exceeds_consumption",
        "correction_exceeds_grant",
    }
)

_NEVER: Mapping[str, frozenset[str]] = {
    # refusals in the shared body that only the other functions give
    function: _LINKED - own
    for function, own in {
        "refund": {"unknown_purchase", "refund_exceeds_purchase", "purchase_not_completed"},
        "reinstate": {"unknown_purchase", "reinstatement_exceeds_refunds"},
        "reverse": {"unknown_consumption", "reversal_exceeds_consumption"},
        "correct": {"unknown_grant", "correction_exceeds_grant"},
    }.items()
}


@cache
def outcomes_of(function: str) -> tuple[str, ...]:
    """All outcomes of a function, those of functions that it calls included: ``completed`` first, refusals by code."""
    named = _named_in(function) - _NEVER.get(function, frozenset())
    rest = [REPLAYED, *(refusal.name for refusal in refusals())]
    return (DONE, *(name for name in rest if name in named))


def sentence(function: Function, name: Callable[[str], str]) -> str:
    """A function as its file introduces it; ``name`` writes the names in it, such as those of parameters."""
    for_callers = function.comment.split(" -- ")[0]  # the rest is for readers of the SQL
    return re.sub(r"``(\w+)``", lambda found: f"`{name(found[1])}`", for_callers)


@cache
def attributes(answer: str) -> tuple[tuple[str, str], ...]:
    """The attributes of a composite type, such as ``tallystick.answer``: (name, type), in order."""
    body = _text(answer.removeprefix("tallystick.")).split(" AS (", 1)[1].rsplit(")", 1)[0]
    lines = (line.split("--")[0].strip().rstrip(",") for line in body.splitlines())
    return tuple((name, kind) for name, _, kind in (line.partition(" ") for line in lines if line))


def _named_in(function: str) -> frozenset[str]:
    """All quoted words of a function's file, and of those of the functions it calls."""
    seen: set[str] = set()
    words: set[str] = set()
    left = [function]
    while left:
        name = left.pop()
        if name in seen or not any(name in names for names in REVISIONS.values()):
            continue
        seen.add(name)
        text = _text(name)
        words.update(re.findall(r"'(\w+)'", text))
        left.extend(re.findall(r"tallystick\.(\w+)\(", text))
    return frozenset(words)


@cache
def _text(name: str) -> str:
    return (files(__package__) / "sql" / f"{name}.sql").read_text("utf-8")
