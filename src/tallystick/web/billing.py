"""The router that a host includes, and the dependencies that guard the host's own routes.

No ``from __future__ import annotations`` here: FastAPI reads the signatures below at run time, and what they depend on
is made for one configuration.
"""

import inspect
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Final
from urllib.parse import quote, urlencode
from uuid import uuid4

import jinja2
import sqlalchemy as sa
from fastapi import APIRouter, Depends, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from markupsafe import Markup
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from tallystick.accounts import Account, Accounts
from tallystick.config import Config, Pack
from tallystick.database import run
from tallystick.errors import (
    InsufficientCredits,
    InvalidArgument,
    Key,
    NotSignedIn,
    RequestTooLarge,
    TallystickError,
    UnknownWorkshop,
    WorkshopDeleted,
    WorkshopLocked,
    WorkshopNotOwned,
)
from tallystick.ledger import Access, AccessReason, CreditTransaction, Ledger
from tallystick.web import pages, problems
from tallystick.web.engine import Database
from tallystick.web.requests import BODY_MAX_BYTES, WEBHOOK_MAX_BYTES, check_same_site, limited, return_address
from tallystick.web.texts import Texts

UNLOCK_CREDITS: Final = 1
"""What opens a workshop."""

WEBHOOK: Final = "tallystick.stripe_webhook"
"""The name of the one route that is posted to without a session."""

CurrentUser = Callable[..., Any]
"""The host's own FastAPI dependency: the key of who is signed in, or None. It may be async and depend on more."""

Preview = Callable[[Request, Key], Any]
"""What the paywall shows blurred, as Markup. It reaches the browser, so it must hold nothing that a credit buys."""


@dataclass(frozen=True, slots=True)
class Workshop:
    """A workshop as its owner sees it. ``title`` is None where the host maps none."""

    key: Key
    title: str | None
    access: Access

    def require_there(self) -> None:
        """Raises WorkshopDeleted: no credit opens it again."""
        if self.access.reason is AccessReason.DELETED:
            raise WorkshopDeleted(
                f"workshop {self.key} was deleted. To bring it back: Accounts.restore_workshop", workshop=self.key
            )


class Billing(APIRouter):
    """Everything a buyer meets: JSON under ``/api``, pages beside it, and what a host's own routes need of it.

    Made by :func:`tallystick.web.router`, which explains the arguments.

    Attributes:
        signed_in: dependency; the key of the user. Raises NotSignedIn.
        requires_open_workshop: dependency for routes with a ``{workshop}``; its Access. Raises WorkshopLocked.
        fragments: dependency; :class:`Fragments` for the host's templates.
    """

    def __init__(
        self,
        config: Config,
        *,
        engine: sa.Engine | AsyncEngine,
        current_user: CurrentUser,
        texts: Texts | None = None,
        templates: jinja2.BaseLoader | None = None,
        sign_in: str | None = None,
        home: str = "/",
        contact: str | None = None,
        preview: Preview | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config
        self.database = Database(engine)
        self.ledger = Ledger(config)
        self.accounts = Accounts(config)
        self.texts = texts or Texts()
        self.home = home
        self.contact = contact
        self.sign_in = sign_in
        self._preview = preview
        self._headers = {**pages.security_headers(form_targets=_checkout_pages(config)), **(headers or {})}
        self._templates = pages.environment(*([templates] if templates else []), texts=self.texts)

        async def signed_in(user: Annotated[Key | None, Depends(current_user)]) -> Key:
            if user is None:
                raise NotSignedIn("nobody is signed in. Give current_user's session, then make the request again")
            return user

        self.signed_in: Callable[..., Coroutine[Any, Any, Key]] = signed_in

        async def requires_open_workshop(request: Request, user: Annotated[Key, Depends(signed_in)]) -> Access:
            return await self.require_open(user, request.path_params["workshop"])

        self.requires_open_workshop: Callable[..., Coroutine[Any, Any, Access]] = requires_open_workshop

        async def fragments(request: Request, user: Annotated[Key | None, Depends(current_user)]) -> Fragments:
            account = None if user is None else await self.account(user)
            return Fragments(self, request, account)

        self.fragments: Callable[..., Coroutine[Any, Any, Fragments]] = fragments
        super().__init__(route_class=self._guarded_route())

    # --- for the host's own routes ---

    def requires_credit(self, amount: int) -> Callable[..., Coroutine[Any, Any, int]]:
        """A dependency that lets only those pass who have ``amount`` credits; it gives the balance.

        It looks and does not spend. Spend in the route with ``ledger.consume``, which checks again: two requests may
        pass here with one credit, and only one of them gets it.
        """

        async def requires_credit(user: Annotated[Key, Depends(self.signed_in)]) -> int:
            balance = await self.balance(user)
            if balance < amount:
                raise InsufficientCredits(
                    f"user {user} has {balance} and this takes {amount}. Sell a pack first",
                    user=user,
                    balance=balance,
                    required=amount,
                )
            return balance

        return requires_credit

    async def require_open(self, user: Key, workshop: object) -> Access:
        """The access of a workshop that is open and the user's.

        Raises:
            WorkshopLocked, WorkshopDeleted, UnknownWorkshop, WorkshopNotOwned.
        """
        found = await self.workshop(user, workshop)
        found.require_there()
        if not found.access.open:
            raise WorkshopLocked(
                f"workshop {found.key} is {found.access.reason}. To open it: POST …/workshops/{found.key}/unlock",
                workshop=found.key,
                user=user,
                required=UNLOCK_CREDITS,
            )
        return found.access

    async def refusal(self, request: Request, error: Exception) -> Response:
        """The answer to a TallystickError raised anywhere in the host's app, for ``app.add_exception_handler``."""
        if not isinstance(error, TallystickError):
            raise error
        response = await self._refuse(request, error)
        for name, value in self._headers.items():
            response.headers.setdefault(name, value)
        return response

    # --- reading ---

    async def account(self, user: Key) -> Account:
        """The user's account, in one query."""
        return await self.database.run(lambda conn: self.accounts.get(conn, user))

    async def balance(self, user: Key) -> int:
        """The user's balance, in one query."""
        return await self.database.run(lambda conn: self.ledger.balance(conn, user))

    async def workshop(self, user: Key, workshop: object) -> Workshop:
        """A workshop of the user's, from its key or the text of it in an address.

        Raises:
            UnknownWorkshop, WorkshopNotOwned.
        """
        return await self.database.run(lambda conn: self._workshop(conn, user, workshop))

    async def workshop_and_balance(self, user: Key, workshop: object) -> tuple[Workshop, int]:
        """As :meth:`workshop`, and the user's balance."""
        return await self.database.run(
            lambda conn: (self._workshop(conn, user, workshop), self.ledger.balance(conn, user))
        )

    async def unlock(self, user: Key, workshop: object, *, key: str | None = None) -> CreditTransaction:
        """Spend a credit on a workshop; ``key`` is the client's name for this intent.

        Without one the workshop itself names the intent, since it is paid for once. A client's keys are kept apart
        from the host's and Stripe's, so that nobody can occupy one of those.

        Raises:
            InsufficientCredits, IdempotencyKeyReused, UnknownWorkshop, WorkshopNotOwned, WorkshopDeleted, …
        """
        opened = self.workshop_key(workshop)
        name = f"web:key:{key}" if key is not None else f"web:unlock:{opened}"
        return await self.database.run(
            lambda conn: self.ledger.consume(conn, user, workshop=opened, credits=UNLOCK_CREDITS, key=name)
        )

    def workshop_key(self, text: object) -> Key:
        """The key that ``text`` in an address stands for. Raises UnknownWorkshop where it can be none."""
        mapped = self.config.host.workshops
        try:
            if mapped is not None and mapped.key_type in {"integer", "bigint"} and isinstance(text, str):
                text = int(text) if text.removeprefix("-").isdecimal() and text.isascii() else text
            return self.ledger.schema.workshop_key(text)
        except (InvalidArgument, ValueError):  # int() refuses thousands of digits
            raise UnknownWorkshop(f"no workshop {text!r}", workshop=str(text)) from None

    def _workshop(self, conn: sa.Connection, user: Key, workshop: object) -> Workshop:
        key = self.workshop_key(workshop)
        table = self.ledger.schema.workshops
        assert table is not None  # noqa: S101 - workshop_key refuses a host without workshops
        title = table.c.title if "title" in table.c else sa.null()
        row = run(
            conn,
            sa.select(table.c.owner, title).where(table.c.key == sa.bindparam("p_workshop", type_=table.c.key.type)),
            {"p_workshop": key},
        ).one_or_none()
        if row is None:
            raise UnknownWorkshop(f"no workshop {key!r}", workshop=key)
        if row[0] != self.ledger.schema.user_key(user):
            raise WorkshopNotOwned(f"workshop {key} belongs to another user than {user}", workshop=key, user=user)
        return Workshop(key, row[1], self.ledger.access(conn, key))

    # --- addresses ---

    def url(self, request: Request, name: str, /, *, query: Mapping[str, object] | None = None, **path: object) -> str:
        """The path of one of our routes under the host's prefix, with what is not None of ``query``."""
        address = request.url_for(f"tallystick.{name}", **{k: str(v) for k, v in path.items()}).path
        given = {k: v for k, v in (query or {}).items() if v is not None}
        return f"{address}?{urlencode(given)}" if given else address

    def absolute(self, request: Request, path: str) -> str:
        """``path`` as Stripe needs it: on the origin of this request if that is ours, else on the first of ours.

        What a client wrote into ``Host`` is thereby never believed.
        """
        origin = f"{request.url.scheme}://{request.url.netloc}"
        ours = self.config.checkout_origins
        return (ours[0] if ours and origin not in ours else origin) + path

    def returning(self, asked: str | None) -> str:
        """Where ``asked`` may lead: to this site or an allowed one, else home."""
        return return_address(asked, self.home, self.config.checkout_origins)

    # --- answers ---

    def render(self, request: Request, template: str, /, **context: Any) -> str:
        """A template of ours or the host's, with what all of them use."""
        fragment = is_fragment(request)
        return self._templates.get_template(f"tallystick/{template}").render(
            url=partial(self.url, request),
            static=partial(self._static, request),
            texts=self.texts,
            unlock_credits=UNLOCK_CREDITS,
            home=self.home,
            contact=self.contact,
            packs=self.config.packs,
            new_key=_new_key,
            fragment=fragment,
            heading="h2" if fragment else "h1",
            layout=f"tallystick/{'dialog' if fragment else 'layout'}.html",
            **context,
        )

    def page(
        self, request: Request, template: str, /, *, status: int = 200, headers: Mapping[str, str] | None = None,
        **context: Any,
    ) -> HTMLResponse:  # fmt: skip
        """A template as an answer: a page, or for htmx the dialog of it."""
        return HTMLResponse(self.render(request, template, **context), status, headers)

    async def paywall(
        self, request: Request, workshop: Workshop | None, *, balance: int, return_to: str,
        required: int = UNLOCK_CREDITS,
    ) -> HTMLResponse:  # fmt: skip
        """402 as a page, with the host's preview behind the lock."""
        preview = None
        if self._preview is not None and workshop is not None and not is_fragment(request):
            preview = self._preview(request, workshop.key)
            if inspect.isawaitable(preview):
                preview = await preview
        return self.page(
            request, "paywall.html", status=402, workshop=workshop, balance=balance, required=required,
            preview=preview, return_to=return_to,
        )  # fmt: skip

    def _static(self, request: Request, name: str) -> str:
        return self.url(request, "static", name=name, query={"v": pages.static_version(name)})

    async def _refuse(self, request: Request, error: TallystickError) -> Response:
        html = "text/html" in request.headers.get("accept", "")
        if isinstance(error, InsufficientCredits | WorkshopLocked):
            return await self._refuse_for_credits(request, error, html=html)
        if not html:
            return problems.problem(error, self.texts)
        if isinstance(error, NotSignedIn) and self.sign_in is not None:
            back = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            target = self.sign_in.format(return_to=quote(back if request.method == "GET" else self.home, safe=""))
            if is_fragment(request):
                return Response(status_code=200, headers={"HX-Redirect": target})
            return RedirectResponse(target, 303)
        found = problems.answer(error)
        return self.page(
            request,
            "problem.html",
            status=found.status,
            title=self.texts.problem_title(found.name),
            detail=self.texts.problem(error, found.name),
            reference=problems.reference(error),
            headers={} if found.retry_after_s is None else {"Retry-After": str(found.retry_after_s)},
        )

    async def _refuse_for_credits(
        self, request: Request, error: InsufficientCredits | WorkshopLocked, *, html: bool
    ) -> Response:
        """402, with all that is needed to go on: the balance, what it takes, the packs and where to buy one."""
        key = error.workshop if isinstance(error, WorkshopLocked) else None
        balance = error.balance if isinstance(error, InsufficientCredits) else await self.balance(error.user)
        if html:
            here = request.url.path if request.method == "GET" else None
            workshop = None if key is None else await self.workshop(error.user, key)
            return await self.paywall(
                request, workshop, balance=balance, required=error.required, return_to=self.returning(here)
            )
        return problems.problem(
            error,
            self.texts,
            balance=balance,
            required=error.required,
            workshop=None if key is None else str(key),
            packs=[describe(pack) for pack in self.config.packs],
            checkout=self.url(request, "api.checkout"),
        )

    # --- the guard around our own routes ---

    def _guarded_route(self) -> type[APIRoute]:
        billing = self

        class Guarded(APIRoute):
            def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
                handle = super().get_route_handler()
                signed = self.name == WEBHOOK

                async def guarded(request: Request) -> Response:
                    return await billing._guard(request, handle, signed=signed)

                return guarded

        return Guarded

    async def _guard(
        self, request: Request, handle: Callable[[Request], Awaitable[Response]], *, signed: bool
    ) -> Response:
        try:
            if not signed:  # Stripe's deliveries prove by their signature who they are from
                check_same_site(request.method, request.headers, self.config.checkout_origins)
            request = Request(request.scope, limited(request, WEBHOOK_MAX_BYTES if signed else BODY_MAX_BYTES))
            response = await handle(request)
        except TallystickError as error:
            response = await self._refuse(request, error)
        except RequestValidationError as error:
            response = self._invalid(request, error)
        except HTTPException as error:
            if not isinstance(error.__cause__, RequestTooLarge):  # FastAPI wraps what reading the body raised
                raise
            response = await self._refuse(request, error.__cause__)
        for name, value in self._headers.items():
            response.headers.setdefault(name, value)
        return response

    def _invalid(self, request: Request, error: RequestValidationError) -> Response:
        found = [{"where": ".".join(map(str, e["loc"])), "message": e["msg"]} for e in error.errors()]
        summary = "; ".join(f"{e['where']}: {e['message']}" for e in found)
        refused = InvalidArgument(summary, argument=found[0]["where"], value=None)
        if "text/html" not in request.headers.get("accept", ""):
            return problems.problem(refused, self.texts, errors=found)
        return self.page(
            request, "problem.html", status=problems.UNPROCESSABLE, title=self.texts.problem_title("invalid-argument"),
            detail=summary, reference=None,
        )  # fmt: skip


def is_fragment(request: Request) -> bool:
    """Whether htmx asks for a part of a page."""
    return request.headers.get("hx-request") == "true"


def describe(pack: Pack) -> dict[str, Any]:
    """A pack as JSON shows it; ``amount`` in minor units of ``currency``."""
    return {"name": pack.name, "credits": pack.credits, "amount": pack.amount, "currency": pack.currency}


def _checkout_pages(config: Config) -> list[str]:
    """Where a form that buys may end up: Stripe's hosted page, or the test double's."""
    return [pages.STRIPE_CHECKOUT, *([config.stripe_api_base] if config.stripe_api_base else [])]


def _new_key() -> str:
    """A name for one purchase form, so that sending it twice buys once."""
    return uuid4().hex


class Fragments:
    """Parts of pages for the host's own templates, each as Markup.

    Give one to the template as, say, ``billing`` and write ``{{ billing.badge }}``. Nothing is shown to whom is not
    signed in.
    """

    def __init__(self, billing: Billing, request: Request, account: Account | None) -> None:
        self._billing = billing
        self._request = request
        self.account = account

    @property
    def head(self) -> Markup:
        """Style sheet and scripts, for ``<head>``. All of them are files of ours: no inline script or style."""
        return self._render("head.html")

    @property
    def badge(self) -> Markup:
        """The balance, as a link to the history."""
        return Markup() if self.account is None else self._render("badge.html", balance=self.account.credit_balance)

    @property
    def welcome(self) -> Markup:
        """The welcome dialog, until this user has closed it once on any device."""
        if self.account is None or self.account.onboarding_complete:
            return Markup()
        return self._render("welcome_dialog.html", return_to=self._here)

    @property
    def pricing(self) -> Markup:
        """The packs side by side."""
        return self._render("pricing_packs.html", return_to=self._here, workshop=None)

    def paywall(self, workshop: Workshop, *, caller: Callable[[], str] | None = None) -> Markup:
        """The lock over a workshop. Inside ``{% call %}`` is what shows blurred behind it."""
        balance = 0 if self.account is None else self.account.credit_balance
        return self._render(
            "paywall_card.html", workshop=workshop, balance=balance, required=UNLOCK_CREDITS,
            preview=Markup(caller()) if caller else None,  # noqa: S704 - rendered, so escaped, by the host's template
            return_to=self._here,
        )  # fmt: skip

    @property
    def _here(self) -> str:
        return self._billing.returning(self._request.url.path)

    def _render(self, template: str, **context: Any) -> Markup:
        return Markup(self._billing.render(self._request, template, **context))  # noqa: S704 - from our own templates


__all__ = ["Billing", "CurrentUser", "Fragments", "Preview", "Workshop"]
