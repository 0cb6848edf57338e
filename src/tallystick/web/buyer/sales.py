"""Purchases at Stripe, for every framework: the start of a purchase, and the page with its result."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import sqlalchemy as sa

from tallystick import stripe
from tallystick.config import Config
from tallystick.errors import (
    Key,
    StripeNotConfigured,
    StripeRefused,
    StripeUnavailable,
    UnknownWorkshop,
    WorkshopNotOwned,
)
from tallystick.ledger import AccessReason
from tallystick.ledger.connections import SyncConnection
from tallystick.schema import CreditTransactionStatus
from tallystick.web.buyer.buyer_request import BuyerPage, BuyerRequest
from tallystick.web.buyer.core import Pages
from tallystick.web.buyer.paywall import Workshop
from tallystick.web.buyer.rendering import Renderer
from tallystick.web.shared.client_keys import ledger_key

log = logging.getLogger("tallystick.web")

LOOKED: Final = "looked"
"""The parameter of the waiting page's address that counts how often it has asked for itself again."""

LOOKS: Final = ((20, 3), (38, 30))
"""The seconds to the next look, by the number of looks: 3 s for a minute, then 30 s for nine, then none.

Each is a request to Stripe, and the bank may take days.
"""

Outcome = tuple[str, stripe.Confirmation | None]
"""The state of a purchase by the template's name, and Stripe's confirmation."""


def is_refused(found: stripe.Confirmation) -> bool:
    """True for a purchase that is paid, and whose credits the ledger refused; the reason is in a finding."""
    return found.outcome is stripe.Outcome.REFUSED and not found.granted


class Sales:
    """The purchases of one configuration. Calls with requests to Stripe take an engine, for their own transactions."""

    def __init__(self, config: Config, pages: Pages, renderer: Renderer) -> None:
        self._config = config
        self._pages = pages
        self._renderer = renderer

    def start(
        self,
        engine: sa.Engine,
        request: BuyerRequest,
        user: Key,
        *,
        pack: str,
        key: str | None,
        return_to: str | None,
        workshop: str | None,
    ) -> stripe.Checkout:
        """Start the purchase of a pack; ``key`` is the client's name for this intent.

        The caller has checked that ``workshop`` is the user's.
        """
        back = {"return_to": self._renderer.returning(return_to), "workshop": workshop}
        success, cancelled = (
            self._renderer.absolute(request, self._renderer.url(request, page, query=back))
            for page in ("success", "cancelled")
        )
        name = None if key is None else ledger_key("buy", key)
        return stripe.checkout(engine, self._config, user, pack, success_url=success, cancel_url=cancelled, key=name)

    def address_after_start(
        self, request: BuyerRequest, started: stripe.Checkout, *, return_to: str | None, workshop: str | None
    ) -> str:
        """The address for the buyer of a started purchase: Stripe's, or our page if it is over already."""
        back = self._renderer.returning(return_to)
        over = {"session_id": started.session, "return_to": back, "workshop": workshop}
        return started.url or self._renderer.url(request, "success", query=over)

    def confirm(self, engine: sa.Engine, user: Key, session: str) -> stripe.Confirmation:
        """Read a session from Stripe, and grant its credits at once if it is paid."""
        return stripe.confirm(engine, self._config, user, session)

    def outcome(self, engine: sa.Engine, user: Key, session: str) -> Outcome:
        """As ``confirm``, for a page. A buyer who may have paid is never told that nothing was charged."""
        try:
            found = self.confirm(engine, user, session)
        except (StripeUnavailable, StripeRefused, StripeNotConfigured) as error:
            log.warning("session %r could not be read, its webhook will grant it: %s", session, error)
            return "waiting", None
        if found.granted:
            return "granted", found
        if is_refused(found):
            return "refused", found
        return ("failed" if found.purchase.status is CreditTransactionStatus.FAILED else "waiting"), found

    def finished(
        self, conn: SyncConnection, request: BuyerRequest, user: Key, outcome: Outcome, query: Mapping[str, str]
    ) -> BuyerPage:
        """The page that Stripe redirects the buyer to; ``query`` is that of the request."""
        texts = self._renderer.texts
        state, found = outcome
        about, balance = self._about(conn, user, query.get("workshop"))
        bought = found.purchase.amount if found is not None else 0
        title, text = {
            "granted": (texts.success_title, texts.success(bought, balance)),
            "waiting": (texts.waiting_title, texts.waiting),
            "failed": (texts.failed_title, texts.failed),
            "refused": (texts.refused_title, texts.refused(query.get("session_id", ""))),
        }[state]
        more = self._next_look(request, query) if state == "waiting" else {}
        return self._page(state, title, text, balance, about, return_to=query.get("return_to"), **more)

    def _next_look(self, request: BuyerRequest, query: Mapping[str, str]) -> dict[str, object]:
        """The addresses of a page that waits, for the buyer (``here``) and for the page itself, if it looks again."""
        given = {name: value for name, value in query.items() if name != LOOKED}
        looked = query.get(LOOKED, "")
        count = int(looked) if re.fullmatch("[0-9]{1,3}", looked) else 0
        wait_s = next((wait_s for up_to, wait_s in LOOKS if count < up_to), None)
        here = self._renderer.url(request, "success", query=given)
        again = self._renderer.url(request, "success", query={**given, LOOKED: count + 1})
        return {"here": here, "again": again, "wait_s": wait_s}

    def cancelled(self, conn: SyncConnection, user: Key, *, workshop: str | None, return_to: str | None) -> BuyerPage:
        """The page after the buyer cancelled."""
        texts = self._renderer.texts
        about, balance = self._about(conn, user, workshop)
        return self._page("cancelled", texts.cancelled_title, texts.cancelled, balance, about, return_to=return_to)

    def _about(self, conn: SyncConnection, user: Key, workshop: str | None) -> tuple[Workshop | None, int]:
        """The workshop that the credits were for, and the balance; None if it is gone: the buyer has paid anyway."""
        if workshop is not None:
            with suppress(UnknownWorkshop, WorkshopNotOwned):
                found, now = self._pages.paywall.workshop_and_standing(conn, user, workshop)
                return None if found.access.reason is AccessReason.DELETED else found, now.spendable
        return None, self._pages.ledger.standing(conn, user).spendable

    def _page(
        self,
        state: str,
        title: str,
        text: str,
        balance: int,
        about: Workshop | None,
        *,
        return_to: str | None,
        **more: object,
    ) -> BuyerPage:
        back = self._renderer.returning(return_to)
        shown = {"state": state, "title": title, "text": text, "balance": balance, "workshop": about}
        # the badge of the host's header has the balance from before
        headers = {"HX-Trigger": "tallystick:balance"} if state == "granted" else {}
        return BuyerPage("outcome.html", {**shown, "return_to": back, **more}, headers=headers)
