"""The pages of ``Billing``: plain forms and links that htmx turns into dialogs where it runs.

No ``from __future__ import annotations`` here, as in ``billing``.
"""

from collections.abc import AsyncIterator
from typing import Annotated, Final

import sqlalchemy as sa
from fastapi import Depends, Form, HTTPException, Query
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse

from tallystick.errors import InsufficientCredits, Key
from tallystick.ledger import HISTORY_MAX, CreditTransaction, Lot, Standing
from tallystick.web.buyer.billing import Billing
from tallystick.web.buyer.json_api import Before, WorkshopPath
from tallystick.web.buyer.paywall import UNLOCK_CREDITS
from tallystick.web.buyer.rendering import is_fragment
from tallystick.web.shared.spreadsheet import csv_line

SEE_OTHER: Final = 303
HISTORY_PAGE: Final = 30
FOR_EVER: Final = "public, max-age=31536000, immutable"

# One that is too long or leads elsewhere is no fault of the person's: they go home afterwards.
ReturnTo = Annotated[str | None, Query(description="Where to go afterwards: a path of this site.")]
PostedReturnTo = Annotated[str | None, Form()]


def add_to(billing: Billing) -> None:
    """Add the pages. They are not part of the OpenAPI document: people read them, programs use the JSON."""
    _add_reading(billing)
    _add_welcome(billing)
    if billing.config.host.workshops is not None:
        _add_unlocking(billing)


def _add_reading(billing: Billing) -> None:
    User = Annotated[Key, Depends(billing.signed_in)]  # noqa: N806 - a type

    @billing.get("/static/{name}", name="tallystick.static", include_in_schema=False)
    async def static(name: str, v: str | None = None) -> Response:
        files = billing.renderer.static
        found = files.get(name)
        if found is None:
            raise HTTPException(404)
        content, media_type = found
        kept = FOR_EVER if v == files.version(name) else "no-cache"
        return Response(content, media_type=media_type, headers={"Cache-Control": kept})

    @billing.get("/badge", name="tallystick.badge", include_in_schema=False)
    async def badge(request: Request, user: User) -> HTMLResponse:
        return billing.renderer.page(request, "badge.html", balance=(await billing.standing(user)).spendable)

    @billing.get("/pricing", name="tallystick.pricing", include_in_schema=False)
    async def pricing(
        request: Request, user: User, return_to: ReturnTo = None, workshop: str | None = None
    ) -> HTMLResponse:
        return billing.renderer.page(
            request, "pricing.html", balance=(await billing.standing(user)).spendable,
            return_to=billing.returning(return_to),
            workshop=None if workshop is None else await billing.workshop(user, workshop),
        )  # fmt: skip

    @billing.get("/history", name="tallystick.history", include_in_schema=False)
    async def history(request: Request, user: User, before: Before = None) -> HTMLResponse:
        def read(conn: sa.Connection) -> tuple[Standing, list[Lot], list[CreditTransaction]]:
            now = billing.ledger.standing(conn, user)
            rows = billing.ledger.history(conn, user, limit=HISTORY_PAGE + 1, before=before)
            return now, billing.expiring(conn, user, now), rows

        now, lots, rows = await billing.database.run(read)
        shown = rows[:HISTORY_PAGE]
        return billing.renderer.page(
            request, "history.html", now=now, soonest=lots[0] if lots else None, rows=shown, newest=before is None,
            older=shown[-1].cursor if len(rows) > HISTORY_PAGE else None,
        )  # fmt: skip

    @billing.get("/history.csv", name="tallystick.history_csv", include_in_schema=False)
    async def history_csv(user: User) -> Response:
        first = await _page_of(billing, user, None)  # before the answer begins, so that a refusal can still be one
        return StreamingResponse(
            _csv(billing, user, first),
            media_type="text/csv; charset=utf-8",
            headers={"Content-Disposition": f'attachment; filename="{billing.texts.csv_name}.csv"'},
        )


async def _page_of(billing: Billing, user: Key, before: str | None) -> list[CreditTransaction]:
    return await billing.database.run(
        lambda conn: billing.ledger.history(conn, user, limit=HISTORY_MAX, before=before, include_failed=True)
    )


async def _csv(billing: Billing, user: Key, rows: list[CreditTransaction]) -> AsyncIterator[str]:
    yield csv_line(billing.texts.csv_columns)
    while rows:
        yield "".join(
            csv_line((
                r.sequence, r.created_at, r.completed_at, r.type, r.status, r.amount, r.balance_after, r.description,
                r.amount_paid, r.currency, r.id,
            ))
            for r in rows
        )  # fmt: skip
        rows = await _page_of(billing, user, rows[-1].cursor) if len(rows) == HISTORY_MAX else []


def _add_welcome(billing: Billing) -> None:
    User = Annotated[Key, Depends(billing.signed_in)]  # noqa: N806 - a type

    @billing.get(
        "/welcome", name="tallystick.welcome", include_in_schema=False, dependencies=[Depends(billing.signed_in)]
    )
    async def welcome(request: Request, return_to: ReturnTo = None) -> HTMLResponse:
        return billing.renderer.page(request, "welcome.html", return_to=billing.returning(return_to))

    @billing.post("/welcome", name="tallystick.welcomed", include_in_schema=False)
    async def welcomed(request: Request, user: User, return_to: PostedReturnTo = None) -> Response:
        """Remember it; by htmx's header the script says that it needs no page."""
        await billing.database.run(lambda conn: billing.accounts.complete_onboarding(conn, user))
        if is_fragment(request):
            return Response(status_code=204)
        return RedirectResponse(billing.returning(return_to), SEE_OTHER)


def _add_unlocking(billing: Billing) -> None:
    User = Annotated[Key, Depends(billing.signed_in)]  # noqa: N806 - a type

    @billing.get("/workshops/{workshop}/unlock", name="tallystick.unlock", include_in_schema=False)
    async def confirm(request: Request, user: User, workshop: WorkshopPath, return_to: ReturnTo = None) -> Response:
        """Ask before spending."""
        found, now = await billing.workshop_and_standing(user, workshop)
        balance = now.spendable
        found.require_there()
        back = billing.returning(return_to)
        if found.access.open:
            return billing.renderer.page(
                request, "unlocked.html", workshop=found, balance=balance, spent=0, return_to=back
            )
        if balance < UNLOCK_CREDITS:
            return await billing.renderer.paywall(request, found, balance=balance, return_to=back)
        return billing.renderer.page(request, "confirm.html", workshop=found, balance=balance, return_to=back)

    @billing.post("/workshops/{workshop}/unlock", name="tallystick.unlock_now", include_in_schema=False)
    async def unlock(
        request: Request,
        user: User,
        workshop: WorkshopPath,
        return_to: PostedReturnTo = None,
    ) -> Response:
        """Spend, then show what was done at an address of its own, which may be reloaded and gone back to."""
        back = billing.returning(return_to)
        try:
            spent = await billing.unlock(user, workshop)
        except InsufficientCredits as refused:
            found = await billing.workshop(user, workshop)
            spendable = Standing(refused.balance, refused.held).spendable
            return await billing.renderer.paywall(request, found, balance=spendable, return_to=back)
        charged = 0 if spent.replayed else -spent.amount
        if not is_fragment(request):
            query = {"return_to": back, "spent": charged}
            return RedirectResponse(
                billing.renderer.url(request, "unlocked", workshop=workshop, query=query), SEE_OTHER
            )
        found, now = await billing.workshop_and_standing(user, workshop)
        balance = now.spendable
        return billing.renderer.page(
            request, "unlocked.html", workshop=found, balance=balance, spent=charged, return_to=back,
            headers={"HX-Trigger": "tallystick:balance"},
        )  # fmt: skip

    @billing.get("/workshops/{workshop}/unlocked", name="tallystick.unlocked", include_in_schema=False)
    async def unlocked(
        request: Request,
        user: User,
        workshop: WorkshopPath,
        return_to: ReturnTo = None,
        spent: Annotated[int, Query(ge=0, le=UNLOCK_CREDITS)] = 0,
    ) -> HTMLResponse:
        found, now = await billing.workshop_and_standing(user, workshop)
        balance = now.spendable
        return billing.renderer.page(
            request, "unlocked.html", workshop=found, balance=balance, spent=spent if found.access.open else 0,
            return_to=billing.returning(return_to),
        )  # fmt: skip
