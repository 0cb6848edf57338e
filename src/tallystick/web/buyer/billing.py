"""The router that a host includes, and the dependencies for the host's own routes.

No ``from __future__ import annotations`` here: FastAPI reads the signatures below at run time, and what they depend on
is made for one configuration.
"""

from collections.abc import Callable, Coroutine, Mapping
from typing import Annotated, Any

import jinja2
import sqlalchemy as sa
from fastapi import APIRouter, Depends
from markupsafe import Markup
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import Request
from starlette.responses import Response

from tallystick.accounts import Account, Accounts
from tallystick.config import Config
from tallystick.errors import Key, NotSignedIn, TallystickError
from tallystick.ledger import Access, CreditTransaction, Lot, Standing
from tallystick.web.buyer.engine import Database
from tallystick.web.buyer.entrance import checked_route, dressed
from tallystick.web.buyer.paywall import UNLOCK_CREDITS, Paywall, Workshop
from tallystick.web.buyer.refusals import Refusals
from tallystick.web.buyer.rendering import Preview, Renderer
from tallystick.web.buyer.texts import Texts
from tallystick.web.shared.pages import STRIPE_CHECKOUT, security_headers

CurrentUser = Callable[..., Any]
"""The host's own FastAPI dependency: the key of who is signed in, or None. It may be async and depend on more."""


class Billing(APIRouter):
    """Everything a buyer meets: JSON under ``/api``, pages beside it, and what a host's own routes need of it.

    Made by ``tallystick.web.router``, which explains the arguments.

    Attributes:
        signed_in: dependency; the key of the user. Raises NotSignedIn.
        requires_open_workshop: dependency for routes with a ``{workshop}``; its Access. Raises WorkshopLocked.
        fragments: dependency; ``Fragments`` for the host's templates.
    """

    def __init__(
        self,
        config: Config,
        *,
        sells: bool,
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
        self.packs = config.packs if sells else ()
        self.database = Database(engine)
        self.paywall = Paywall(config)
        self.ledger = self.paywall.ledger
        self.accounts = Accounts(config)
        self.texts = texts or Texts()
        self.renderer = Renderer(
            config, self.packs, self.texts, templates=templates, home=home, contact=contact, preview=preview
        )
        self._refusals = Refusals(self.packs, self.renderer, sells=sells, sign_in=sign_in)
        ours = {**security_headers(form_targets=_checkout_pages(config)), **(headers or {})}
        self._headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in ours.items()]

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
            return self.fragments_of(request, account)

        self.fragments: Callable[..., Coroutine[Any, Any, Fragments]] = fragments
        super().__init__(route_class=checked_route(self._refusals, config.checkout_origins, self._headers))

    # --- for the host's own routes ---

    def requires_credit(self, amount: int) -> Callable[..., Coroutine[Any, Any, int]]:
        """A dependency that lets only those pass who have ``amount`` credits; it gives the balance.

        It looks and does not spend. Spend in the route with ``ledger.consume``, which checks again: two requests may
        pass here with one credit, and only one of them gets it.
        """

        async def requires_credit(user: Annotated[Key, Depends(self.signed_in)]) -> int:
            return await self.database.run(lambda conn: self.paywall.require_credits(conn, user, amount))

        return requires_credit

    async def require_open(self, user: Key, workshop: object) -> Access:
        """The access of a workshop that is open and the user's.

        Raises:
            WorkshopLocked, WorkshopDeleted, UnknownWorkshop, WorkshopNotOwned.
        """
        return await self.database.run(lambda conn: self.paywall.require_open(conn, user, workshop))

    async def refusal(self, request: Request, error: Exception) -> Response:
        """The answer to a TallystickError raised anywhere in the host's app, for ``app.add_exception_handler``."""
        if not isinstance(error, TallystickError):
            raise error
        return dressed(await self._refusals.answer(request, error), self._headers)

    def fragments_of(self, request: Request, account: Account | None) -> "Fragments":
        """As ``fragments``, for an account that the app has read already: no query of ours.

        An app that loads its user with every request makes the account of that row's own columns.
        """
        return Fragments(self.renderer, request, account)

    def returning(self, asked: str | None) -> str:
        """The address to return to: ``asked`` where it is of this site or an allowed one, else home."""
        return self.renderer.returning(asked)

    # --- operations, each on a connection of its own ---

    async def account(self, user: Key) -> Account:
        """The user's account, in one query."""
        return await self.database.run(lambda conn: self.accounts.get(conn, user))

    async def standing(self, user: Key) -> Standing:
        """The user's credits, in one query."""
        return await self.database.run(lambda conn: self.ledger.standing(conn, user))

    def expiring(self, conn: sa.Connection, user: Key, now: Standing) -> list[Lot]:
        """The user's credits that expire, the soonest first: no query where nothing does."""
        return [] if now.due_at is None else self.ledger.lots(conn, user)

    async def workshop(self, user: Key, workshop: object) -> Workshop:
        """A workshop of the user's, from its key or the text of it in an address.

        Raises:
            UnknownWorkshop, WorkshopNotOwned.
        """
        return await self.database.run(lambda conn: self.paywall.workshop(conn, user, workshop))

    async def workshop_and_standing(self, user: Key, workshop: object) -> tuple[Workshop, Standing]:
        """As ``workshop``, and the user's credits."""
        return await self.database.run(lambda conn: self.paywall.workshop_and_standing(conn, user, workshop))

    async def unlock(self, user: Key, workshop: object, *, key: str | None = None) -> CreditTransaction:
        """Spend a credit on a workshop, once; ``key`` is the client's name for this intent.

        Raises:
            InsufficientCredits, IdempotencyKeyReused, UnknownWorkshop, WorkshopNotOwned, WorkshopDeleted, …
        """
        return await self.database.run(lambda conn: self.paywall.unlock(conn, user, workshop, key=key))


def _checkout_pages(config: Config) -> list[str]:
    """Origins that a form that buys may lead to: Stripe's hosted page, or the test double's."""
    return [STRIPE_CHECKOUT, *([config.stripe_api_base] if config.stripe_api_base else [])]


class Fragments:
    """Parts of pages for the host's own templates, each as Markup.

    Give one to the template as, say, ``billing`` and write ``{{ billing.badge }}``. Nothing is shown to whom is not
    signed in.
    """

    def __init__(self, renderer: Renderer, request: Request, account: Account | None) -> None:
        self._renderer = renderer
        self._request = request
        self.account = account

    @property
    def head(self) -> Markup:
        """Style sheet and scripts, for ``<head>``. All of them are files of ours: no inline script or style."""
        return self._render("head.html")

    @property
    def badge(self) -> Markup:
        """The credits that can be spent, as a link to the history."""
        return Markup() if self.account is None else self._render("badge.html", balance=self._spendable)

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
        return self._render(
            "paywall_card.html", workshop=workshop, balance=self._spendable, required=UNLOCK_CREDITS,
            preview=Markup(caller()) if caller else None,  # noqa: S704 - rendered, so escaped, by the host's template
            return_to=self._here,
        )  # fmt: skip

    @property
    def _spendable(self) -> int:
        return 0 if self.account is None else self.account.standing.spendable

    @property
    def _here(self) -> str:
        return self._renderer.returning(self._request.url.path)

    def _render(self, template: str, **context: Any) -> Markup:
        return Markup(self._renderer.render(self._request, template, **context))  # noqa: S704 - from our own templates


__all__ = ["Billing", "CurrentUser", "Fragments", "Preview", "Workshop"]
