"""The pages of ``Billing``: plain forms and links, which htmx shows as dialogs.

No ``from __future__ import annotations`` here, as in ``billing``.
"""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, Form, HTTPException, Query
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tallystick.errors import Key
from tallystick.ledger import HISTORY_MAX, CreditTransaction
from tallystick.web.buyer.billing import Billing
from tallystick.web.buyer.core import CSV, csv_lines
from tallystick.web.buyer.entrance import StarletteRequest
from tallystick.web.buyer.json_api import Before, WorkshopPath
from tallystick.web.buyer.paywall import UNLOCK_CREDITS

# An address that is too long or leads elsewhere is no error: the buyer then returns to home.
ReturnTo = Annotated[str | None, Query(description="Where to go afterwards: a path of this site.")]
PostedReturnTo = Annotated[str | None, Form()]


def add_to(billing: Billing) -> None:
    """Add the pages. They are not part of the OpenAPI document: programs use the JSON."""
    _add_reading(billing)
    _add_welcome(billing)
    if billing.config.host.workshops is not None:
        _add_unlocking(billing)


def _add_reading(billing: Billing) -> None:
    User = Annotated[Key, Depends(billing.signed_in)]  # noqa: N806 - a type
    pages = billing.pages

    @billing.get("/static/{name}", name="tallystick.static", include_in_schema=False)
    async def static(name: str, v: str | None = None) -> Response:
        found = pages.static(name, v)
        if found is None:
            raise HTTPException(404)
        content, media_type, kept = found
        return Response(content, media_type=media_type, headers={"Cache-Control": kept})

    @billing.get("/badge", name="tallystick.badge", include_in_schema=False)
    async def badge(request: Request, user: User) -> Response:
        return await billing.shown(request, lambda conn: pages.badge(conn, user))

    @billing.get("/pricing", name="tallystick.pricing", include_in_schema=False)
    async def pricing(
        request: Request, user: User, return_to: ReturnTo = None, workshop: str | None = None
    ) -> Response:
        return await billing.shown(
            request, lambda conn: pages.pricing(conn, user, workshop=workshop, return_to=return_to)
        )

    @billing.get("/history", name="tallystick.history", include_in_schema=False)
    async def history(request: Request, user: User, before: Before = None) -> Response:
        return await billing.shown(request, lambda conn: pages.history(conn, user, before=before))

    @billing.get("/history.csv", name="tallystick.history_csv", include_in_schema=False)
    async def history_csv(user: User) -> Response:
        async def after(row: CreditTransaction | None) -> list[CreditTransaction]:
            return await billing.database.run(lambda conn: pages.rows(conn, user, before=row))

        async def lines(rows: list[CreditTransaction]) -> AsyncIterator[str]:
            yield pages.csv_head()
            while rows:
                yield "".join(csv_lines(rows))
                rows = await after(rows[-1]) if len(rows) == HISTORY_MAX else []

        first = await after(None)  # before the response begins, so that an error can still be answered
        return StreamingResponse(lines(first), media_type=CSV, headers=pages.csv_headers())


def _add_welcome(billing: Billing) -> None:
    User = Annotated[Key, Depends(billing.signed_in)]  # noqa: N806 - a type

    @billing.get(
        "/welcome", name="tallystick.welcome", include_in_schema=False, dependencies=[Depends(billing.signed_in)]
    )
    async def welcome(request: Request, return_to: ReturnTo = None) -> Response:
        return await billing.answers.send(request, billing.pages.welcome(return_to=return_to))

    @billing.post("/welcome", name="tallystick.welcomed", include_in_schema=False)
    async def welcomed(request: Request, user: User, return_to: PostedReturnTo = None) -> Response:
        buyer_request = StarletteRequest(request)
        return await billing.shown(
            request, lambda conn: billing.pages.welcomed(conn, buyer_request, user, return_to=return_to)
        )


def _add_unlocking(billing: Billing) -> None:
    User = Annotated[Key, Depends(billing.signed_in)]  # noqa: N806 - a type
    pages = billing.pages

    @billing.get("/workshops/{workshop:tallystick_key}/unlock", name="tallystick.unlock", include_in_schema=False)
    async def confirm(request: Request, user: User, workshop: WorkshopPath, return_to: ReturnTo = None) -> Response:
        return await billing.shown(request, lambda conn: pages.confirm(conn, user, workshop, return_to=return_to))

    @billing.post("/workshops/{workshop:tallystick_key}/unlock", name="tallystick.unlock_now", include_in_schema=False)
    async def unlock(
        request: Request, user: User, workshop: WorkshopPath, return_to: PostedReturnTo = None
    ) -> Response:
        buyer_request = StarletteRequest(request)
        return await billing.shown(
            request, lambda conn: pages.unlock(conn, buyer_request, user, workshop, return_to=return_to)
        )

    @billing.get("/workshops/{workshop:tallystick_key}/unlocked", name="tallystick.unlocked", include_in_schema=False)
    async def unlocked(
        request: Request,
        user: User,
        workshop: WorkshopPath,
        return_to: ReturnTo = None,
        spent: Annotated[int, Query(ge=0, le=UNLOCK_CREDITS)] = 0,
    ) -> Response:
        return await billing.shown(
            request, lambda conn: pages.unlocked(conn, user, workshop, spent=spent, return_to=return_to)
        )
