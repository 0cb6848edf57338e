"""The app. What Tallystick does in it stands in :func:`sell_credits`; the rest is what such an app has anyway.

No ``from __future__ import annotations`` here: FastAPI reads the signatures at run time.
"""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit
from uuid import UUID

import jinja2
import sqlalchemy as sa
from fastapi import Cookie, Depends, FastAPI, Form, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from markupsafe import Markup

from tallystick import Config, TallystickError
from tallystick.web import Billing, Fragments, Texts, router
from workshops.steps import FREE, STEPS

HERE = Path(__file__).parent
WEEK_S = 7 * 24 * 3600


class Words(Texts):
    """Texts of this app's own."""

    pricing_lead = f"One credit unlocks all {len(STEPS)} steps of a workshop, for good."
    welcome = (
        f"Each workshop has {len(STEPS)} steps. The first {FREE} are free.",
        "One credit unlocks the rest of a workshop, for good.",
    )


def sell_credits(app: FastAPI, config: Config, engine: sa.Engine) -> Billing:
    """Tallystick in this app: its pages under /billing, and its refusals as pages or problem+json."""
    billing = router(
        config,
        engine=engine,
        current_user=current_user,
        texts=Words(),
        templates=jinja2.FileSystemLoader(HERE / "templates"),
        sign_in="/sign-in?next={return_to}",
        contact="mailto:hello@example.com",
        preview=preview,
    )
    app.include_router(billing, prefix="/billing")
    app.add_exception_handler(TallystickError, billing.refusal)
    return billing


def connection(request: Request) -> Iterator[sa.Connection]:
    """A connection for one request, each statement by itself.

    FastAPI leaves a dependency only after the answer was sent; a commit there would come too late for a browser that
    follows a redirect at once.
    """
    with request.app.state.engine.connect() as conn:
        yield conn.execution_options(isolation_level="AUTOCOMMIT")


Conn = Annotated[sa.Connection, Depends(connection)]


def current_user(request: Request, session: Annotated[str | None, Cookie()] = None) -> UUID | None:
    """The user who is signed in, by the token in a cookie.

    Its connection goes back to the pool at once: a purchase waits for Stripe, and others need the connection meanwhile.
    """
    with request.app.state.engine.connect() as conn:
        asked = sa.text("SELECT user_id FROM sessions WHERE token = :token")
        user: UUID | None = conn.scalar(asked, {"token": session})
    return user


User = Annotated[UUID | None, Depends(current_user)]


def preview(_request: Request, _workshop: object) -> Markup:
    """The text that is blurred behind the lock: filler, since a browser can show everything that it gets."""
    lines = ("Step by step from here", *("Every step ends with something you can show to somebody. " * 3,) * 4)
    return Markup('<div class="filler">{}</div>').format(Markup().join(Markup("<p>{}</p>").format(x) for x in lines))


@dataclass
class Where:
    """A step of a workshop, as its address says."""

    workshop: UUID
    step: int


def create_app(config: Config, engine: sa.Engine) -> FastAPI:
    """The whole app for one database."""
    app = FastAPI(title="Workshops")
    app.state.engine = engine
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    templates = Jinja2Templates(directory=HERE / "templates")
    billing = sell_credits(app, config, engine)
    Ours = Annotated[Fragments, Depends(billing.fragments)]

    @app.get("/")
    def workshops(request: Request, user: User, conn: Conn, ours: Ours) -> Response:
        if user is None:
            return RedirectResponse("/sign-in", 303)
        mine = conn.execute(
            sa.text("SELECT id, title, credit_consumed_at FROM workshops WHERE user_id = :user ORDER BY created_at"),
            {"user": user},
        )
        return templates.TemplateResponse(request, "workshops.html", {"workshops": mine.all(), "billing": ours})

    @app.post("/workshops")
    def new_workshop(user: User, conn: Conn, title: Annotated[str, Form(min_length=1, max_length=500)]) -> Response:
        if user is None:
            return RedirectResponse("/sign-in", 303)
        made = conn.scalar(
            sa.text("INSERT INTO workshops (user_id, title) VALUES (:user, :title) RETURNING id"),
            {"user": user, "title": title},
        )
        return RedirectResponse(f"/workshops/{made}/steps/1", 303)

    async def paid_for(request: Request, step: int, user: Annotated[UUID, Depends(billing.signed_in)]) -> None:
        if step > FREE:
            await billing.require_open(user, request.path_params["workshop"])

    @app.get("/workshops/{workshop}/steps/{step}", dependencies=[Depends(paid_for)])  # noqa: FAST003 - in Where
    def show_step(request: Request, where: Annotated[Where, Depends()], user: User, conn: Conn, ours: Ours) -> Response:
        title = conn.scalar(
            sa.text("SELECT title FROM workshops WHERE id = :workshop AND user_id = :user"),
            {"workshop": where.workshop, "user": user},
        )
        if title is None or not 1 <= where.step <= len(STEPS):
            raise HTTPException(404)
        page = {"where": where, "title": title, "steps": STEPS, "billing": ours}
        # behind a credit: no shared cache may give it to another user
        return templates.TemplateResponse(request, "step.html", page, headers={"Cache-Control": "private"})

    @app.get("/sign-in")
    def ask_who(request: Request, next: str = "/") -> HTMLResponse:  # noqa: A002 - the name in the address
        return templates.TemplateResponse(
            request, "sign_in.html", {"next": next, "billing": billing.fragments_of(request, None)}
        )

    @app.post("/sign-in")
    def sign_in(
        request: Request, conn: Conn, email: Annotated[str, Form(min_length=3, max_length=200)],
        next: Annotated[str, Form()] = "/",  # noqa: A002
    ) -> Response:  # fmt: skip
        token = secrets.token_urlsafe(32)
        conn.execute(
            sa.text(
                "WITH found AS (INSERT INTO users (email) VALUES (:email) "
                "ON CONFLICT (email) DO UPDATE SET email = excluded.email RETURNING id) "
                "INSERT INTO sessions (token, user_id) SELECT :token, id FROM found"
            ),
            {"email": email, "token": token},
        )
        response = RedirectResponse(billing.returning(next), 303)
        secure = urlsplit(str(request.url)).scheme == "https"
        response.set_cookie("session", token, max_age=WEEK_S, httponly=True, samesite="lax", secure=secure)
        return response

    @app.post("/sign-out")
    def sign_out(conn: Conn, session: Annotated[str | None, Cookie()] = None) -> Response:
        conn.execute(sa.text("DELETE FROM sessions WHERE token = :token"), {"token": session})
        return RedirectResponse("/sign-in", 303)

    return app
