"""The JSON routes of ``Billing``, for an app with its own front end.

No ``from __future__ import annotations`` here, as in ``billing``.
"""

import datetime as dt
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import Depends, Header, Path, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.convertors import Convertor, register_url_convertor
from starlette.responses import Response

from tallystick.accounts import Account
from tallystick.errors import Key
from tallystick.ledger import AccessReason, CreditTransaction, Lot
from tallystick.ledger.connections import SyncConnection
from tallystick.schema import CreditTransactionStatus, CreditTransactionType
from tallystick.web.buyer.billing import Billing
from tallystick.web.buyer.paywall import UNLOCK_CREDITS
from tallystick.web.buyer.refusals import MEDIA_TYPE, TYPE_PREFIX
from tallystick.web.shared.client_keys import KEY_MAX

PAGE_MAX: Final = 200

EXAMPLE_ID: Final = "0198c1de-9f04-7a30-8f2b-53f2b7a7f0aa"
_EXAMPLE_WORKSHOP: Final = "0198c1de-7c1a-7f6e-9a55-2f6f3f1c9b10"
_EXAMPLE_ROW: Final[dict[str, Any]] = {
    "id": EXAMPLE_ID,
    "type": "consumption",
    "status": "completed",
    "amount": -1,
    "balance_after": 2,
    "sequence": 2,
    "description": "Credit consumed for Workshop: Mobile App Discovery",
    "workshop": _EXAMPLE_WORKSHOP,
    "amount_paid": None,
    "currency": None,
    "created_at": "2026-03-01T09:30:00Z",
    "completed_at": "2026-03-01T09:30:00Z",
    "expires_at": None,
}
_EXAMPLE_LOT: Final[dict[str, Any]] = {
    "id": EXAMPLE_ID,
    "credits": 3,
    "expires_at": "2026-03-31T00:00:00Z",
    "description": "Spring promotion",
}
_EXAMPLE_PACK: Final[dict[str, Any]] = {"name": "Flight Crew", "credits": 3, "amount": 14900, "currency": "usd"}


def _shown(example: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [example]})


class ExpiringCredits(BaseModel):
    """Credits that are taken back at ``expires_at`` if they are not spent by then."""

    model_config = _shown(_EXAMPLE_LOT)

    id: UUID = Field(description="The credit transaction that gave them.")
    credits: int = Field(description="Those of them that are left.")
    expires_at: dt.datetime
    description: str


class BalanceAnswer(BaseModel):
    """A user's credits; below zero is a debt that the next purchase pays."""

    model_config = _shown({"balance": 5, "held": 2, "available": 3, "expiring": [_EXAMPLE_LOT], "plan_tier": "free"})

    balance: int
    held: int = Field(description="Credits that are set aside for work under way.")
    available: int = Field(description="Credits that can be spent: the balance less what is held.")
    expiring: list[ExpiringCredits] = Field(description="Credits that expire, in the order in which they are spent.")
    plan_tier: str


class HistoryRow(BaseModel):
    """One credit transaction. ``amount_paid`` is in minor units of ``currency``."""

    model_config = _shown(_EXAMPLE_ROW)

    id: UUID
    type: CreditTransactionType
    status: CreditTransactionStatus
    amount: int
    balance_after: int | None
    sequence: int | None
    description: str
    workshop: str | None
    amount_paid: int | None
    currency: str | None
    created_at: dt.datetime
    completed_at: dt.datetime | None
    expires_at: dt.datetime | None = Field(description="Of a hold, or of the credits that the row gave.")


class HistoryAnswer(BaseModel):
    """A page of history, newest first. Read on with ``before=next`` until ``next`` is null."""

    model_config = _shown({"rows": [_EXAMPLE_ROW], "next": "2"})

    rows: list[HistoryRow]
    next: str | None


class AccessAnswer(BaseModel):
    """A workshop's access: open or not, the reason, and the credits that would open it."""

    model_config = _shown(
        {"workshop": _EXAMPLE_WORKSHOP, "open": False, "reason": "locked", "required": 1, "balance": 3, "available": 3}
    )

    workshop: str
    open: bool
    reason: AccessReason
    required: int = Field(description="Credits that open it; 0 when it is open or gone.")
    balance: int
    available: int = Field(description="Credits that can be spent: the balance less what is held.")


class UnlockAnswer(BaseModel):
    """The consumption that opened the workshop. ``replayed``: it was open already and nothing was charged now."""

    model_config = _shown({"transaction": _EXAMPLE_ROW, "balance": 2, "replayed": False})

    transaction: HistoryRow | None = Field(
        description="null if the workshop is open without a payment: it is older than the paywall, or there is none."
    )
    balance: int
    replayed: bool


class PackAnswer(BaseModel):
    """Something on sale; ``amount`` in minor units of ``currency``, null if the price is only known at checkout."""

    model_config = _shown(_EXAMPLE_PACK)

    name: str
    credits: int
    amount: int | None
    currency: str


class Onboarding(BaseModel):
    """The user's onboarding: true once the welcome was finished."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"complete": True}]})

    complete: bool


class Problem(BaseModel):
    """A refusal, as RFC 9457 problem details. ``reference`` names a fault of ours in the log."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "type": f"{TYPE_PREFIX}insufficient-credits",
                    "title": "Not enough credits",
                    "status": 402,
                    "detail": "You have 0 credits. This takes 1.",
                    "balance": 0,
                    "held": 0,
                    "available": 0,
                    "required": 1,
                    "workshop": None,
                    "packs": [_EXAMPLE_PACK],
                    "checkout": "/billing/api/checkout",
                }
            ]
        },
    )

    type: str
    title: str
    status: int
    detail: str
    reference: str | None = None


def answer(model: BaseModel, status: int = 200) -> Response:
    """``model`` as JSON. FastAPI would build and validate a returned model a second time."""
    return Response(model.model_dump_json(), status, media_type="application/json")


def history_row(row: CreditTransaction) -> HistoryRow:
    """A ledger row for its user: without Stripe's ids and the idempotency key."""
    return HistoryRow(
        id=row.id,
        type=row.type,
        status=row.status,
        amount=row.amount,
        balance_after=row.balance_after,
        sequence=row.sequence,
        description=row.description,
        workshop=None if row.workshop_id is None else str(row.workshop_id),
        amount_paid=row.amount_paid,
        currency=row.currency,
        created_at=row.created_at,
        completed_at=row.completed_at,
        expires_at=row.expires_at,
    )


_REFUSALS: Final = {
    401: "Nobody is signed in.",
    402: "Not enough credits: balance, required, packs and where to buy are in the body.",
    403: "A page of another site made this request, or the user has no account here.",
    404: "Not there, or another user's.",
    408: "The body did not arrive in time.",
    409: "The ledger's state does not allow it.",
    410: "The workshop was deleted.",
    413: "The body is too long.",
    422: "A value is not valid, or the idempotency key was used for something else.",
    503: "Nothing was written, or it is unknown; make the same request again.",
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route for OpenAPI."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {"description": _REFUSALS[status], "model": Problem, "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in (401, *statuses, 422, 503)
    }


class _Key(Convertor[str]):
    """A workshop's key in a path. Servers decode %2F, so that a key with a slash arrives as several segments."""

    regex = "(?s:.+)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("tallystick_key", _Key())

WorkshopPath = Annotated[str, Path(max_length=200, description="The workshop's key.", examples=[_EXAMPLE_WORKSHOP])]
# A value of `next`: a sequence, or the id of a pending purchase.
_CURSOR = r"^([0-9]{1,9}|1[0-9]{9}|20[0-9]{8}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})$"

Before = Annotated[
    str | None,
    Query(max_length=36, pattern=_CURSOR, description="``next`` of the page before, to read on.", examples=["41"]),
]


def add_to(billing: Billing) -> None:
    """Add the JSON routes."""
    User = Annotated[Key, Depends(billing.signed_in)]  # noqa: N806 - a type
    ledger, run = billing.ledger, billing.database.run

    @billing.get("/api/balance", name="tallystick.api.balance", response_model=BalanceAnswer, responses=refusals(403))
    async def balance(user: User) -> Response:
        """The credits of the signed-in user."""

        def read(conn: SyncConnection) -> tuple[Account, list[Lot]]:
            account = billing.accounts.get(conn, user)
            return account, billing.pages.expiring(conn, user, account.standing)

        account, lots = await run(read)
        return answer(
            BalanceAnswer(
                balance=account.standing.balance,
                held=account.standing.held,
                available=account.standing.available,
                expiring=[
                    ExpiringCredits(
                        id=lot.id, credits=lot.remaining, expires_at=lot.expires_at, description=lot.description
                    )
                    for lot in lots
                ],
                plan_tier=account.plan_tier,
            )
        )

    @billing.get("/api/history", name="tallystick.api.history", response_model=HistoryAnswer, responses=refusals(403))
    async def history(
        user: User,
        before: Before = None,
        limit: Annotated[int, Query(ge=1, le=PAGE_MAX, description="Rows on a page.")] = 50,
    ) -> Response:
        """The credit transactions of the signed-in user, newest first; every page costs the same."""
        rows = await run(lambda conn: ledger.history(conn, user, limit=limit, before=before))
        following = rows[-1].cursor if len(rows) == limit else None
        return answer(HistoryAnswer(rows=[history_row(row) for row in rows], next=following))

    @billing.get("/api/packs", name="tallystick.api.packs")
    async def packs() -> list[PackAnswer]:
        """The packs on sale."""
        return [PackAnswer(name=p.name, credits=p.credits, amount=p.amount, currency=p.currency) for p in billing.packs]

    @billing.get(
        "/api/onboarding", name="tallystick.api.onboarding", response_model=Onboarding, responses=refusals(403)
    )
    async def onboarding(user: User) -> Response:
        """The onboarding state: true once the welcome was finished, on any device."""
        return answer(Onboarding(complete=(await billing.account(user)).onboarding_complete))

    @billing.put("/api/onboarding", name="tallystick.api.set_onboarding", responses=refusals(403, 408, 413))
    async def set_onboarding(user: User, wanted: Onboarding) -> Onboarding:
        """Mark the welcome as finished, or show it again."""
        change = billing.accounts.complete_onboarding if wanted.complete else billing.accounts.reset_onboarding
        return Onboarding(complete=(await run(lambda conn: change(conn, user))).onboarding_complete)

    if billing.config.host.workshops is not None:
        _add_workshops(billing)


def _add_workshops(billing: Billing) -> None:
    User = Annotated[Key, Depends(billing.signed_in)]  # noqa: N806 - a type

    @billing.get(
        "/api/workshops/{workshop:tallystick_key}/access",
        name="tallystick.api.access",
        response_model=AccessAnswer,
        responses=refusals(403, 404),
    )
    async def access(user: User, workshop: WorkshopPath) -> Response:
        """The access to one of the user's workshops, with the reason."""
        found, now = await billing.workshop_and_standing(user, workshop)
        locked = found.access.reason is AccessReason.LOCKED
        return answer(
            AccessAnswer(
                workshop=str(found.key),
                open=found.access.open,
                reason=found.access.reason,
                required=UNLOCK_CREDITS if locked else 0,
                balance=now.balance,
                available=now.available,
            )
        )

    @billing.post(
        "/api/workshops/{workshop:tallystick_key}/unlock",
        name="tallystick.api.unlock",
        response_model=UnlockAnswer,
        responses=refusals(402, 403, 404, 409, 410, 413),
    )
    async def unlock(
        user: User,
        workshop: WorkshopPath,
        idempotency_key: Annotated[
            str | None, Header(min_length=1, max_length=KEY_MAX, description="The client's name for this one intent.")
        ] = None,
    ) -> Response:
        """Spend a credit on a workshop, once: a repeated call charges nothing and returns the first result.

        Nothing is charged for a workshop that is open without a payment.
        """
        spent = await billing.unlock(user, workshop, key=idempotency_key)
        row = None if spent is None else history_row(spent)
        if spent is None or spent.replayed:
            balance = (await billing.standing(user)).balance
            return answer(UnlockAnswer(transaction=row, balance=balance, replayed=True))
        return answer(UnlockAnswer(transaction=row, balance=spent.balance_after or 0, replayed=False))
