"""Buying: to Stripe's page and back, as a form and as JSON; and where Stripe delivers its events.

No ``from __future__ import annotations`` here, as in ``billing``.
"""

from typing import Annotated, Final
from uuid import UUID

from fastapi import Depends, Form, Header, Path, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from tallystick import stripe
from tallystick.errors import Key, StripeUnavailable
from tallystick.schema import CreditTransactionStatus
from tallystick.web.buyer.billing import Billing, Workshop
from tallystick.web.buyer.entrance import WEBHOOK
from tallystick.web.buyer.json_api import EXAMPLE_ID, KEY_MAX, TAGS, refusals
from tallystick.web.buyer.views import SEE_OTHER, ReturnTo
from tallystick.web.shared.requests import RETURN_MAX

SESSION_MAX: Final = 255


class CheckoutRequest(BaseModel):
    """The pack to buy, and the path that the buyer returns to. ``workshop`` is what the credits are for."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"pack": "Flight Crew", "return_to": "/workshops/7/steps/7"}]}
    )

    pack: str = Field(min_length=1, max_length=200)
    return_to: str | None = Field(default=None, max_length=RETURN_MAX)
    workshop: str | None = Field(default=None, max_length=200)


class CheckoutForm(BaseModel):
    """The button of a pack. ``key`` was made with the form, so that a double click buys once."""

    pack: str = Field(max_length=200)
    key: str | None = Field(default=None, min_length=1, max_length=KEY_MAX)
    return_to: str | None = None
    workshop: str | None = Field(default=None, max_length=200)


class CheckoutAnswer(BaseModel):
    """A purchase that waits for payment at ``url``, Stripe's hosted page; null when it is paid or over already."""

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


class PurchaseAnswer(BaseModel):
    """A purchase as it is now. ``pending`` after paying means that the bank has not confirmed it yet."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"purchase": EXAMPLE_ID, "status": "completed", "credits": 3, "balance": 3}]}
    )

    purchase: UUID
    status: CreditTransactionStatus
    credits: int
    balance: int


def add_to(billing: Billing) -> None:
    """Add the routes that need Stripe."""
    _add_pages(billing)
    _add_json(billing)
    _add_webhook(billing)


async def _start(
    billing: Billing, request: Request, user: Key, wanted: CheckoutForm | CheckoutRequest, key: str | None
) -> stripe.Checkout:
    if wanted.workshop is not None:
        await billing.workshop(user, wanted.workshop)  # theirs, or nothing is sold for it
    back = {"return_to": billing.returning(wanted.return_to), "workshop": wanted.workshop}
    success, cancelled = (
        billing.renderer.absolute(request, billing.renderer.url(request, page, query=back))
        for page in ("success", "cancelled")
    )
    name = None if key is None else f"web:buy:{key}"  # kept apart from the host's keys, as for unlocking
    return await billing.database.run_on_engine(
        lambda engine: stripe.checkout(
            engine, billing.config, user, wanted.pack, success_url=success, cancel_url=cancelled, key=name
        )
    )


async def _confirm(billing: Billing, user: Key, session: str) -> stripe.Confirmation:
    return await billing.database.run_on_engine(lambda engine: stripe.confirm(engine, billing.config, user, session))


async def _outcome(billing: Billing, user: Key, session: str) -> tuple[str, stripe.Confirmation | None]:
    """The state of a purchase, in the template's words; what was paid is granted by asking."""
    try:
        found = await _confirm(billing, user, session)
    except StripeUnavailable:
        return "waiting", None  # the webhook will grant it
    if found.granted:
        return "granted", found
    return ("failed" if found.purchase.status is CreditTransactionStatus.FAILED else "waiting"), found


def _add_pages(billing: Billing) -> None:
    User = Annotated[Key, Depends(billing.signed_in)]  # noqa: N806 - a type
    texts = billing.texts

    async def about(user: User, workshop: str | None = None) -> Workshop | None:
        return None if workshop is None else await billing.workshop(user, workshop)

    About = Annotated[Workshop | None, Depends(about)]  # noqa: N806 - a type

    @billing.post("/checkout", name="tallystick.checkout", include_in_schema=False)
    async def checkout(request: Request, user: User, wanted: Annotated[CheckoutForm, Form()]) -> Response:
        started = await _start(billing, request, user, wanted, wanted.key)
        over = {"session_id": started.session, "return_to": billing.returning(wanted.return_to)}
        return RedirectResponse(started.url or billing.renderer.url(request, "success", query=over), SEE_OTHER)

    @billing.get("/success", name="tallystick.success", include_in_schema=False)
    async def success(
        request: Request,
        user: User,
        workshop: About,
        session_id: Annotated[str, Query(max_length=SESSION_MAX)],
        return_to: ReturnTo = None,
    ) -> Response:
        """The page that Stripe sends the buyer to: grants at once what was paid, with or without the webhook."""
        state, found = await _outcome(billing, user, session_id)
        balance = (await billing.standing(user)).spendable
        bought = found.purchase.amount if found is not None else 0
        title, text = {
            "granted": (texts.success_title, texts.success(bought, balance)),
            "waiting": (texts.waiting_title, texts.waiting),
            "failed": (texts.failed_title, texts.failed),
        }[state]
        here = billing.renderer.url(request, "success", query=dict(request.query_params))
        return billing.renderer.page(
            request, "outcome.html", state=state, title=title, text=text, balance=balance, workshop=workshop,
            here=here, return_to=billing.returning(return_to),
        )  # fmt: skip

    @billing.get("/cancelled", name="tallystick.cancelled", include_in_schema=False)
    async def cancelled(request: Request, user: User, workshop: About, return_to: ReturnTo = None) -> Response:
        return billing.renderer.page(
            request, "outcome.html", state="cancelled", title=texts.cancelled_title, text=texts.cancelled,
            balance=(await billing.standing(user)).spendable, workshop=workshop, here="",
            return_to=billing.returning(return_to),
        )  # fmt: skip


def _add_json(billing: Billing) -> None:
    User = Annotated[Key, Depends(billing.signed_in)]  # noqa: N806 - a type

    @billing.post(
        "/api/checkout",
        name="tallystick.api.checkout",
        tags=TAGS,
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
        started = await _start(billing, request, user, wanted, idempotency_key)
        return CheckoutAnswer(
            purchase=started.purchase.id, session=started.session, url=started.url, credits=started.purchase.amount
        )

    @billing.post(
        "/api/checkout/{stripe_session}/confirm", name="tallystick.api.confirm", tags=TAGS, responses=refusals(403, 404)
    )
    async def confirm(
        user: User, stripe_session: Annotated[str, Path(max_length=SESSION_MAX, examples=["cs_test_a1"])]
    ) -> PurchaseAnswer:
        """Ask Stripe whether a session is paid, and grant it at once if so; safe to make again."""
        found = await _confirm(billing, user, stripe_session)
        return PurchaseAnswer(
            purchase=found.purchase.id,
            status=found.purchase.status,
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
