"""The routes of a purchase: to Stripe's page and back, as a form and as JSON; and Stripe's webhook.

No ``from __future__ import annotations`` here, as in ``billing``.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from enum import StrEnum
from typing import Annotated, Any, Final
from uuid import UUID

import sqlalchemy as sa
from fastapi import Depends, Form, Header, Path, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tallystick import stripe
from tallystick.errors import Key
from tallystick.stripe.client import async_http, disconnect
from tallystick.web.buyer.billing import Billing
from tallystick.web.buyer.buyer_request import redirect
from tallystick.web.buyer.entrance import WEBHOOK, StarletteRequest
from tallystick.web.buyer.json_api import EXAMPLE_ID, refusals
from tallystick.web.buyer.sales import Sales, is_refused
from tallystick.web.buyer.views import ReturnTo
from tallystick.web.shared.addresses import RETURN_MAX
from tallystick.web.shared.client_keys import KEY_MAX

SESSION_MAX: Final = 255


class CheckoutRequest(BaseModel):
    """The pack to buy, and the path that the buyer returns to. The credits are for ``workshop``."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"pack": "Flight Crew", "return_to": "/workshops/7/steps/7"}]}
    )

    pack: str = Field(min_length=1, max_length=200)
    return_to: str | None = Field(default=None, max_length=RETURN_MAX)
    workshop: str | None = Field(default=None, max_length=200)


class CheckoutForm(BaseModel):
    """The form of a pack's button. ``key`` was made with the form, so that a double click buys once."""

    pack: str = Field(max_length=200)
    key: str | None = Field(default=None, min_length=1, max_length=KEY_MAX)
    return_to: str | None = None
    workshop: str | None = Field(default=None, max_length=200)


class CheckoutAnswer(BaseModel):
    """A purchase to be paid at ``url``, Stripe's hosted page; null if it is paid or over already."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "purchase": EXAMPLE_ID,
                    "session": "cs_test_a1",
                    "url": "https://checkout.stripe.com/c/pay/cs_test_a1",
                    "credits": 3,
                }
            ]
        }
    )

    purchase: UUID
    session: str
    url: str | None
    credits: int


class PurchaseStatus(StrEnum):
    """The state of a purchase in the ledger; or ``refused``, if it is paid and the ledger refused the credits."""

    PENDING = "pending"
    COMPLETED = "completed"
    FAILED = "failed"
    REFUSED = "refused"


class PurchaseAnswer(BaseModel):
    """The present state of a purchase.

    ``pending`` after paying means that the bank has not confirmed it yet. ``refused`` means that it is paid and the
    credits could not be added: the app's operator has a finding about it, and asking again does not help.
    """

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"purchase": EXAMPLE_ID, "status": "completed", "credits": 3, "balance": 3}]}
    )

    purchase: UUID
    status: PurchaseStatus
    credits: int
    balance: int


def lifespan(engine: sa.Engine | AsyncEngine) -> Callable[[Any], AbstractAsyncContextManager[None]] | None:
    """A lifespan that closes the connections to Stripe of an app on an async engine; None for a sync one.

    Raises:
        ModuleNotFoundError: the HTTP library is not installed; the message names the extra.
    """
    if not isinstance(engine, AsyncEngine):
        return None
    async_http()

    @asynccontextmanager
    async def connected(_app: Any) -> AsyncIterator[None]:
        yield
        await disconnect()

    return connected


def add_to(billing: Billing) -> None:
    """Add the routes that need Stripe."""
    sales = Sales(billing.config, billing.pages, billing.renderer)
    _add_pages(billing, sales)
    _add_json(billing, sales)
    _add_webhook(billing)


async def _start(
    billing: Billing,
    sales: Sales,
    request: Request,
    user: Key,
    wanted: CheckoutForm | CheckoutRequest,
    *,
    key: str | None,
) -> stripe.Checkout:
    workshop, back, buyer_request = wanted.workshop, wanted.return_to, StarletteRequest(request)
    if workshop is not None:
        await billing.workshop(user, workshop)  # it must be the user's
    return await billing.database.run_on_engine(
        lambda engine: sales.start(
            engine, buyer_request, user, pack=wanted.pack, key=key, return_to=back, workshop=workshop
        )
    )


def _add_pages(billing: Billing, sales: Sales) -> None:
    User = Annotated[Key, Depends(billing.signed_in)]  # noqa: N806 - a type

    @billing.post("/checkout", name="tallystick.checkout", include_in_schema=False)
    async def checkout(request: Request, user: User, wanted: Annotated[CheckoutForm, Form()]) -> Response:
        started = await _start(billing, sales, request, user, wanted, key=wanted.key)
        to = sales.address_after_start(
            StarletteRequest(request), started, return_to=wanted.return_to, workshop=wanted.workshop
        )
        return await billing.answers.send(request, redirect(to))

    @billing.get("/success", name="tallystick.success", include_in_schema=False)
    async def success(
        request: Request, user: User, session_id: Annotated[str, Query(max_length=SESSION_MAX)]
    ) -> Response:
        """The page that Stripe redirects the buyer to: grants the paid credits at once, even before the webhook."""
        outcome = await billing.database.run_on_engine(lambda engine: sales.outcome(engine, user, session_id))
        buyer_request = StarletteRequest(request)
        return await billing.shown(
            request, lambda conn: sales.finished(conn, buyer_request, user, outcome, request.query_params)
        )

    @billing.get("/cancelled", name="tallystick.cancelled", include_in_schema=False)
    async def cancelled(
        request: Request, user: User, workshop: str | None = None, return_to: ReturnTo = None
    ) -> Response:
        return await billing.shown(
            request, lambda conn: sales.cancelled(conn, user, workshop=workshop, return_to=return_to)
        )


def _add_json(billing: Billing, sales: Sales) -> None:
    User = Annotated[Key, Depends(billing.signed_in)]  # noqa: N806 - a type

    @billing.post(
        "/api/checkout",
        name="tallystick.api.checkout",
        responses=refusals(403, 404, 408, 409, 413),
        status_code=201,
    )
    async def checkout(
        request: Request,
        user: User,
        wanted: CheckoutRequest,
        idempotency_key: Annotated[
            str | None, Header(min_length=1, max_length=KEY_MAX, description="The client's name for this one purchase.")
        ] = None,
    ) -> CheckoutAnswer:
        """Start a purchase; send the buyer to ``url``."""
        started = await _start(billing, sales, request, user, wanted, key=idempotency_key)
        return CheckoutAnswer(
            purchase=started.purchase.id, session=started.session, url=started.url, credits=started.purchase.amount
        )

    @billing.post("/api/checkout/{stripe_session}/confirm", name="tallystick.api.confirm", responses=refusals(403, 404))
    async def confirm(
        user: User, stripe_session: Annotated[str, Path(max_length=SESSION_MAX, examples=["cs_test_a1"])]
    ) -> PurchaseAnswer:
        """Read a session from Stripe, and grant its credits at once if it is paid; safe to repeat."""
        found = await billing.database.run_on_engine(lambda engine: sales.confirm(engine, user, stripe_session))
        return PurchaseAnswer(
            purchase=found.purchase.id,
            status=PurchaseStatus.REFUSED if is_refused(found) else PurchaseStatus(found.purchase.status),
            credits=found.purchase.amount,
            balance=(await billing.standing(user)).balance,
        )


def _add_webhook(billing: Billing) -> None:
    # Both spellings answer: a redirect from one to the other would count as a failed delivery.
    @billing.post("/webhooks/stripe", name=WEBHOOK, include_in_schema=False)
    @billing.post("/webhooks/stripe/", name=WEBHOOK, include_in_schema=False)
    async def webhook(request: Request) -> Response:
        body, signature = await request.body(), request.headers.get("stripe-signature")
        answer = await billing.database.run_on_engine(
            lambda engine: stripe.receive(engine, billing.config, body, signature)
        )
        return JSONResponse({"outcome": answer.outcome, "detail": answer.detail}, answer.status)
