"""Every refusal as an HTTP answer: one table from error to status, and problem+json of RFC 9457."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from starlette.responses import JSONResponse

from tallystick import errors
from tallystick.errors import TallystickError
from tallystick.web.texts import Texts

log = logging.getLogger("tallystick.web")

MEDIA_TYPE: Final = "application/problem+json"
TYPE_PREFIX: Final = "urn:tallystick:problem:"
UNPROCESSABLE: Final = 422
SERVER_FAULT: Final = 500


@dataclass(frozen=True, slots=True)
class Answer:
    """What an error is to the outside: an HTTP status and the name of the problem.

    ``retry_after_s`` says that the same request may be made again, and when.
    """

    status: int
    name: str
    retry_after_s: int | None = None


# The nearest class above an error decides. What a stranger could learn nothing from is one and the same to them: a
# workshop that is not there and another user's.
ANSWERS: Final[Mapping[type[TallystickError], Answer]] = {
    errors.NotSignedIn: Answer(401, "not-signed-in"),
    errors.InsufficientCredits: Answer(402, "insufficient-credits"),
    errors.WorkshopLocked: Answer(402, "workshop-locked"),
    errors.CrossSiteRequest: Answer(403, "cross-site-request"),
    errors.UnknownUser: Answer(403, "unknown-user"),
    errors.UserDeleted: Answer(403, "user-deleted"),
    errors.UnknownWorkshop: Answer(404, "unknown-workshop"),
    errors.WorkshopNotOwned: Answer(404, "unknown-workshop"),
    errors.UnknownPurchase: Answer(404, "unknown-purchase"),
    errors.UnknownPack: Answer(404, "unknown-pack"),
    errors.SessionNotYours: Answer(404, "unknown-purchase"),
    errors.PurchaseNotPending: Answer(409, "purchase-not-pending"),
    errors.PurchaseNotCompleted: Answer(409, "purchase-not-completed"),
    errors.SessionConflict: Answer(409, "session-conflict"),
    errors.StripeCustomerConflict: Answer(409, "customer-conflict"),
    errors.RefundExceedsPurchase: Answer(409, "refund-exceeds-purchase"),
    errors.ReinstatementExceedsRefunds: Answer(409, "reinstatement-exceeds-refunds"),
    errors.BalanceOutOfRange: Answer(409, "balance-out-of-range"),
    errors.WorkshopUnaccounted: Answer(409, "workshop-unaccounted"),
    errors.WorkshopDeleted: Answer(410, "workshop-deleted"),
    errors.RequestTooLarge: Answer(413, "request-too-large"),
    errors.InvalidArgument: Answer(422, "invalid-argument"),
    errors.IdempotencyKeyReused: Answer(422, "idempotency-key-reused"),
    errors.Conflict: Answer(503, "busy", retry_after_s=1),
    errors.OutcomeUnknown: Answer(503, "outcome-unknown", retry_after_s=1),
    errors.DatabaseUnavailable: Answer(503, "unavailable", retry_after_s=5),
    errors.StripeUnavailable: Answer(503, "payment-provider-unavailable", retry_after_s=5),
    errors.StripeNotConfigured: Answer(503, "not-on-sale"),
    errors.PackMismatch: Answer(503, "not-on-sale"),
    TallystickError: Answer(500, "server-error"),
}
"""The one table; ``docs/web.md`` shows it, and a test holds the two against each other."""


def answer(error: TallystickError) -> Answer:
    """The row of :data:`ANSWERS` for ``error``."""
    return next(ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS)


def reference(error: TallystickError) -> str | None:
    """Log a fault of ours under a name that the person who met it can quote; None for an ordinary refusal."""
    if answer(error).status < SERVER_FAULT:
        return None
    name = secrets.token_hex(4)
    log.error("reference %s: %s: %s", name, type(error).__name__, error, exc_info=error)
    return name


def problem(error: TallystickError, texts: Texts, **more: Any) -> JSONResponse:
    """``error`` as RFC 9457 problem+json; ``more`` are its extension members.

    The detail is a sentence for people. Our own messages name tables and commands, so they go to the log, except
    where they say which argument was wrong.
    """
    found = answer(error)
    body = {
        "type": TYPE_PREFIX + found.name,
        "title": texts.problem_title(found.name),
        "status": found.status,
        "detail": str(error) if found.status == UNPROCESSABLE else texts.problem(error, found.name),
        **more,
    }
    if (name := reference(error)) is not None:
        body["reference"] = name
    headers = {} if found.retry_after_s is None else {"Retry-After": str(found.retry_after_s)}
    return JSONResponse(body, found.status, headers, MEDIA_TYPE)
