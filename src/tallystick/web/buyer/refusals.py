"""Every refusal as an HTTP answer: one table from error to status; problem+json of RFC 9457, or a page."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from fastapi.exceptions import RequestValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from tallystick import errors
from tallystick.config import Pack
from tallystick.errors import InsufficientCredits, InvalidArgument, NotSignedIn, TallystickError, WorkshopLocked
from tallystick.ledger import Access, AccessReason, Standing
from tallystick.web.buyer.paywall import Workshop
from tallystick.web.buyer.rendering import Renderer, is_fragment

log = logging.getLogger("tallystick.web")

MEDIA_TYPE: Final = "application/problem+json"
TYPE_PREFIX: Final = "urn:tallystick:problem:"
UNPROCESSABLE: Final = 422
SERVER_FAULT: Final = 500


@dataclass(frozen=True, slots=True)
class Meaning:
    """The public form of an error: an HTTP status and the name of the problem.

    ``retry_after_s`` says that the same request may be made again, and when.
    """

    status: int
    name: str
    retry_after_s: int | None = None


# The nearest class above an error decides. What a stranger could learn nothing from is one and the same to them: a
# workshop that is not there and another user's.
MEANINGS: Final[Mapping[type[TallystickError], Meaning]] = {
    errors.NotSignedIn: Meaning(401, "not-signed-in"),
    errors.InsufficientCredits: Meaning(402, "insufficient-credits"),
    errors.WorkshopLocked: Meaning(402, "workshop-locked"),
    errors.CrossSiteRequest: Meaning(403, "cross-site-request"),
    errors.UnknownUser: Meaning(403, "unknown-user"),
    errors.UserDeleted: Meaning(403, "user-deleted"),
    errors.UnknownWorkshop: Meaning(404, "unknown-workshop"),
    errors.WorkshopNotOwned: Meaning(404, "unknown-workshop"),
    errors.UnknownPurchase: Meaning(404, "unknown-purchase"),
    errors.UnknownPack: Meaning(404, "unknown-pack"),
    errors.SessionNotYours: Meaning(404, "unknown-purchase"),
    errors.RequestTooSlow: Meaning(408, "request-too-slow"),
    errors.PurchaseNotPending: Meaning(409, "purchase-not-pending"),
    errors.PurchaseNotCompleted: Meaning(409, "purchase-not-completed"),
    errors.SessionConflict: Meaning(409, "session-conflict"),
    errors.StripeCustomerConflict: Meaning(409, "customer-conflict"),
    errors.RefundExceedsPurchase: Meaning(409, "refund-exceeds-purchase"),
    errors.ReinstatementExceedsRefunds: Meaning(409, "reinstatement-exceeds-refunds"),
    errors.BalanceOutOfRange: Meaning(409, "balance-out-of-range"),
    errors.WorkshopUnaccounted: Meaning(409, "workshop-unaccounted"),
    errors.WorkshopDeleted: Meaning(410, "workshop-deleted"),
    errors.RequestTooLarge: Meaning(413, "request-too-large"),
    errors.InvalidArgument: Meaning(422, "invalid-argument"),
    errors.IdempotencyKeyReused: Meaning(422, "idempotency-key-reused"),
    errors.Conflict: Meaning(503, "busy", retry_after_s=1),
    errors.OutcomeUnknown: Meaning(503, "outcome-unknown", retry_after_s=1),
    errors.DatabaseUnavailable: Meaning(503, "unavailable", retry_after_s=5),
    errors.StripeUnavailable: Meaning(503, "payment-provider-unavailable", retry_after_s=5),
    errors.StripeNotConfigured: Meaning(503, "not-on-sale"),
    errors.PackMismatch: Meaning(503, "not-on-sale"),
    TallystickError: Meaning(500, "server-error"),
}
"""The one table; ``docs/web.md`` shows it, and a test holds the two against each other."""


def meaning(error: TallystickError) -> Meaning:
    """The row of ``MEANINGS`` for ``error``."""
    return next(MEANINGS[kind] for kind in type(error).__mro__ if kind in MEANINGS)


class Refusals:
    """Makes the answer to an error, from what the error carries: it reads nothing from the database.

    ``sign_in`` is the address a browser without a session is sent to.
    """

    def __init__(self, packs: Sequence[Pack], renderer: Renderer, *, sells: bool, sign_in: str | None) -> None:
        self._packs = packs
        self._sells = sells
        self._renderer = renderer
        self._texts = renderer.texts
        self._sign_in = sign_in

    async def answer(self, request: Request, error: TallystickError) -> Response:
        """A page for a browser, problem+json for anything else."""
        html = _wants_html(request)
        if isinstance(error, InsufficientCredits | WorkshopLocked):
            return await self._for_credits(request, error) if html else self._credits_problem(request, error)
        if not html:
            return self._problem(error)
        if isinstance(error, NotSignedIn) and self._sign_in is not None:
            return self._to_sign_in(request, self._sign_in)
        found = meaning(error)
        return self._renderer.page(
            request,
            "problem.html",
            status=found.status,
            title=self._texts.problem_title(found.name),
            detail=self._texts.problem(error, found.name),
            reference=_reference(error),
            headers=_retry(found),
        )

    def invalid(self, request: Request, error: RequestValidationError) -> Response:
        """The answer to values that are not valid, with each of them and why."""
        found = [{"where": ".".join(map(str, e["loc"])), "message": e["msg"]} for e in error.errors()]
        summary = "; ".join(f"{e['where']}: {e['message']}" for e in found)
        refused = InvalidArgument(summary, argument=found[0]["where"], value=None)
        if not _wants_html(request):
            return self._problem(refused, errors=found)
        return self._renderer.page(
            request, "problem.html", status=UNPROCESSABLE, title=self._texts.problem_title("invalid-argument"),
            detail=summary, reference=None,
        )  # fmt: skip

    def _problem(self, error: TallystickError, **more: Any) -> JSONResponse:
        """``error`` as RFC 9457 problem+json; ``more`` are its extension members.

        The detail is a sentence for people. Our own messages name tables and commands, so they go to the log, except
        where they say which argument was wrong.
        """
        found = meaning(error)
        body = {
            "type": TYPE_PREFIX + found.name,
            "title": self._texts.problem_title(found.name),
            "status": found.status,
            "detail": str(error) if found.status == UNPROCESSABLE else self._texts.problem(error, found.name),
            **more,
        }
        if (name := _reference(error)) is not None:
            body["reference"] = name
        return JSONResponse(body, found.status, _retry(found), MEDIA_TYPE)

    # --- 402: all that is needed to go on ---

    def _credits_problem(self, request: Request, error: InsufficientCredits | WorkshopLocked) -> Response:
        return self._problem(
            error,
            balance=error.balance,
            held=error.held,
            available=error.available,
            required=error.required,
            workshop=str(error.workshop) if isinstance(error, WorkshopLocked) else None,
            packs=[describe(pack) for pack in self._packs],
            checkout=self._renderer.url(request, "api.checkout") if self._sells else None,
        )

    async def _for_credits(self, request: Request, error: InsufficientCredits | WorkshopLocked) -> Response:
        workshop = None
        if isinstance(error, WorkshopLocked):
            workshop = Workshop(error.workshop, error.title, Access(open=False, reason=AccessReason.LOCKED))
        here = self._renderer.returning(request.url.path if request.method == "GET" else None)
        spendable = Standing(error.balance, error.held).spendable
        return await self._renderer.paywall(
            request, workshop, balance=spendable, required=error.required, return_to=here
        )

    def _to_sign_in(self, request: Request, sign_in: str) -> Response:
        back = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        target = sign_in.format(return_to=quote(back if request.method == "GET" else self._renderer.home, safe=""))
        if is_fragment(request):
            return Response(status_code=200, headers={"HX-Redirect": target})
        return RedirectResponse(target, 303)


def describe(pack: Pack) -> dict[str, Any]:
    """A pack as JSON shows it; ``amount`` in minor units of ``currency``."""
    return {"name": pack.name, "credits": pack.credits, "amount": pack.amount, "currency": pack.currency}


def _wants_html(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")


def _retry(found: Meaning) -> dict[str, str]:
    return {} if found.retry_after_s is None else {"Retry-After": str(found.retry_after_s)}


def _reference(error: TallystickError) -> str | None:
    """Log a fault of ours under a name that the person who met it can quote; None for an ordinary refusal."""
    if meaning(error).status < SERVER_FAULT:
        return None
    name = secrets.token_hex(4)
    log.error("reference %s: %s: %s", name, type(error).__name__, error, exc_info=error)
    return name
