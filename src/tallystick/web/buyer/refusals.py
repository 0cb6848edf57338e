"""Refusals as HTTP answers: a table from error to status; problem+json of RFC 9457, or a page."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from tallystick import errors
from tallystick.config import Pack
from tallystick.errors import InsufficientCredits, InvalidArgument, NotSignedIn, TallystickError, WorkshopLocked
from tallystick.ledger import Access, AccessReason, Standing
from tallystick.web.buyer.buyer_request import SERVER_FAULT, BuyerPage, BuyerRequest, Reply, redirect
from tallystick.web.buyer.paywall import Workshop
from tallystick.web.buyer.rendering import Renderer, paywall

log = logging.getLogger("tallystick.web")

MEDIA_TYPE: Final = "application/problem+json"
TYPE_PREFIX: Final = "urn:tallystick:problem:"
UNPROCESSABLE: Final = 422


@dataclass(frozen=True, slots=True)
class Meaning:
    """The public form of an error: an HTTP status and the name of the problem.

    ``retry_after_s`` is set if the same request may be made again after that time.
    """

    status: int
    name: str
    retry_after_s: int | None = None


# The nearest class above an error decides. A workshop that does not exist and another user's have the same answer, so
# that it tells a stranger nothing.
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
    errors.StripeRefused: Meaning(503, "payment-provider-refused"),
    errors.StripeNotConfigured: Meaning(503, "not-on-sale"),
    errors.PackMismatch: Meaning(503, "not-on-sale"),
    errors.ReturnAddressRefused: Meaning(503, "not-on-sale"),
    TallystickError: Meaning(500, "server-error"),
}
"""The only table; ``docs/web.md`` shows it, and a test compares the two."""


def meaning(error: TallystickError) -> Meaning:
    """The row of ``MEANINGS`` for ``error``."""
    return next(MEANINGS[kind] for kind in type(error).__mro__ if kind in MEANINGS)


class Refusals:
    """Answers to errors, made from an error's fields without the database.

    ``sign_in`` gets the quoted address that a browser without a session requested, and returns the one that it is
    redirected to. ``checkout`` is the name of the JSON route for purchases.
    """

    def __init__(
        self,
        packs: Sequence[Pack],
        renderer: Renderer,
        *,
        sign_in: Callable[[str], str] | None,
        checkout: str | None,
    ) -> None:
        self._packs = packs
        self._checkout = checkout
        self._renderer = renderer
        self._texts = renderer.texts
        self._sign_in = sign_in

    def answer(self, request: BuyerRequest, error: TallystickError) -> BuyerPage | Reply:
        """A page for a browser, problem+json for all else; nothing for a badge that refreshes itself, which stays."""
        if request.fragment and request.address.partition("?")[0] == self._renderer.url(request, "badge"):
            _reference(error)
            return Reply(204)
        if isinstance(error, InsufficientCredits | WorkshopLocked):
            return self._credits_page(request, error) if request.html else self._credits_problem(request, error)
        if not request.html:
            return self._problem(error)
        if isinstance(error, NotSignedIn) and self._sign_in is not None:
            return self._redirect_to_sign_in(request, self._sign_in)
        found = meaning(error)
        shown = {
            "title": self._texts.problem_title(found.name),
            "detail": self._texts.problem(error, found.name),
            "reference": _reference(error),
        }
        return BuyerPage("problem.html", shown, found.status, _retry(found))

    def invalid(self, request: BuyerRequest, found: Sequence[Mapping[str, str]]) -> BuyerPage | Reply:
        """The answer to invalid values, each with its place (``where``) and the ``message``."""
        summary = "; ".join(f"{each['where']}: {each['message']}" for each in found)
        if not request.html:
            return self._problem(InvalidArgument(summary, argument=found[0]["where"], value=None), errors=found)
        title = self._texts.problem_title("invalid-argument")
        return BuyerPage("problem.html", {"title": title, "detail": summary, "reference": None}, UNPROCESSABLE)

    def _problem(self, error: TallystickError, **more: Any) -> Reply:
        """``error`` as RFC 9457 problem+json; ``more`` are its extension members.

        The detail is a sentence for people. Our own messages name tables and commands, so they go to the log, except
        those about a wrong argument.
        """
        found = meaning(error)
        body = {
            "type": TYPE_PREFIX + found.name,
            "title": self._texts.problem_title(found.name),
            "status": found.status,
            "detail": str(error) if isinstance(error, InvalidArgument) else self._texts.problem(error, found.name),
            **more,
        }
        if (name := _reference(error)) is not None:
            body["reference"] = name
        return Reply(found.status, json.dumps(body, ensure_ascii=False), MEDIA_TYPE, _retry(found))

    # --- 402: with all data for a purchase ---

    def _credits_problem(self, request: BuyerRequest, error: InsufficientCredits | WorkshopLocked) -> Reply:
        return self._problem(
            error,
            balance=error.balance,
            held=error.held,
            available=error.available,
            required=error.required,
            workshop=str(error.workshop) if isinstance(error, WorkshopLocked) else None,
            packs=[describe(pack) for pack in self._packs],
            checkout=None if self._checkout is None else self._renderer.url(request, self._checkout),
        )

    def _credits_page(self, request: BuyerRequest, error: InsufficientCredits | WorkshopLocked) -> BuyerPage:
        workshop = None
        if isinstance(error, WorkshopLocked):
            workshop = Workshop(error.workshop, error.title, Access(open=False, reason=AccessReason.LOCKED))
        spendable = Standing(error.balance, error.held).spendable
        return paywall(workshop, balance=spendable, required=error.required, return_to=self._here(request))

    def _here(self, request: BuyerRequest) -> str:
        """The address to return to: the requested one, but not that of a form's POST."""
        return self._renderer.returning(request.address if request.method == "GET" else None)

    def _redirect_to_sign_in(self, request: BuyerRequest, sign_in: Callable[[str], str]) -> Reply:
        target = sign_in(quote(self._here(request), safe=""))
        return Reply(200, headers={"HX-Redirect": target}) if request.fragment else redirect(target)


def describe(pack: Pack) -> dict[str, Any]:
    """A pack as JSON; ``amount`` in minor units of ``currency``."""
    return {"name": pack.name, "credits": pack.credits, "amount": pack.amount, "currency": pack.currency}


def _retry(found: Meaning) -> dict[str, str]:
    return {} if found.retry_after_s is None else {"Retry-After": str(found.retry_after_s)}


def _reference(error: TallystickError) -> str | None:
    """Log a fault of ours under a reference that the user can quote; None for an ordinary refusal."""
    if meaning(error).status < SERVER_FAULT:
        return None
    name = secrets.token_hex(4)
    log.error("reference %s: %s: %s", name, type(error).__name__, error, exc_info=error)
    return name
