"""The router that a host includes, and the dependencies for the host's own routes.

No ``from __future__ import annotations`` here: FastAPI reads the signatures below at run time, and their dependencies
are made for one configuration.
"""

from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any

import jinja2
import sqlalchemy as sa
from fastapi import APIRouter, Depends
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import Request
from starlette.responses import Response

from tallystick.accounts import Account
from tallystick.config import Config
from tallystick.errors import Key, NotSignedIn, TallystickError, UnknownUser
from tallystick.ledger import Access, CreditTransaction, Standing
from tallystick.ledger.connections import SyncConnection
from tallystick.web.buyer.buyer_request import BuyerPage, Reply
from tallystick.web.buyer.core import Pages
from tallystick.web.buyer.engine import Database
from tallystick.web.buyer.entrance import Answers, Preview, StarletteRequest, checked_route
from tallystick.web.buyer.fragments import Fragments
from tallystick.web.buyer.paywall import Workshop
from tallystick.web.buyer.refusals import Refusals
from tallystick.web.buyer.rendering import Renderer
from tallystick.web.buyer.texts import Texts
from tallystick.web.shared.pages import buyer_headers

CurrentUser = Callable[..., Any]
"""The host's FastAPI dependency: the key of the signed-in user, or None. It may be async and have dependencies."""


class Billing(APIRouter):
    """The buyer's routes: JSON under ``/api`` and pages; and dependencies for the host's own routes.

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
        lifespan: Callable[[Any], AbstractAsyncContextManager[None]] | None = None,
    ) -> None:
        self.config = config
        self.packs = config.packs if sells else ()
        self.database = Database(engine)
        self.renderer = Renderer(config, self.packs, texts or Texts(), templates=templates, home=home, contact=contact)
        self.pages = Pages(config, self.renderer)
        self.ledger = self.pages.ledger
        self.accounts = self.pages.accounts
        self._paywall = self.pages.paywall
        refusals = Refusals(
            self.packs,
            self.renderer,
            sign_in=None if sign_in is None else lambda quoted: sign_in.format(return_to=quoted),
            checkout="api.checkout" if sells else None,
        )
        ours = {**buyer_headers(config.stripe_api_base), **(headers or {})}
        sent = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in ours.items()]
        self.answers = Answers(self.renderer, refusals, preview, sent)

        async def signed_in(user: Annotated[Key | None, Depends(current_user)]) -> Key:
            if user is None:
                raise NotSignedIn("nobody is signed in. Give current_user's session, then make the request again")
            return user

        self.signed_in: Callable[..., Coroutine[Any, Any, Key]] = signed_in

        async def requires_open_workshop(
            request: Request, response: Response, user: Annotated[Key, Depends(signed_in)]
        ) -> Access:
            _keep_from_shared_caches(response)
            return await self.require_open(user, request.path_params["workshop"])

        self.requires_open_workshop: Callable[..., Coroutine[Any, Any, Access]] = requires_open_workshop

        async def fragments(request: Request, user: Annotated[Key | None, Depends(current_user)]) -> Fragments:
            try:
                account = None if user is None else await self.account(user)
            except UnknownUser:  # signed in, but without a row in the mapped table of users
                account = None
            return self.fragments_of(request, account)

        self.fragments: Callable[..., Coroutine[Any, Any, Fragments]] = fragments
        route_class = checked_route(self.answers, config.checkout_origins)
        super().__init__(tags=["credits"], route_class=route_class, lifespan=lifespan)

    # --- for the host's own routes ---

    def requires_credit(self, amount: int) -> Callable[..., Coroutine[Any, Any, int]]:
        """A dependency that requires ``amount`` credits, and returns the credits that can be spent.

        It does not spend. Spend in the route with ``ledger.consume``, which checks again: two requests may pass here
        with one credit, and only one of them gets it.
        """

        async def requires_credit(response: Response, user: Annotated[Key, Depends(self.signed_in)]) -> int:
            _keep_from_shared_caches(response)
            return await self.database.run(lambda conn: self._paywall.require_credits(conn, user, amount))

        return requires_credit

    async def require_open(self, user: Key, workshop: object) -> Access:
        """The access of a workshop that is open and the user's.

        Raises:
            WorkshopLocked, WorkshopDeleted, UnknownWorkshop, WorkshopNotOwned: it is not open to this user.
        """
        return await self.database.run(lambda conn: self._paywall.require_open(conn, user, workshop))

    async def refusal(self, request: Request, error: Exception) -> Response:
        """The answer to a TallystickError raised anywhere in the host's app, for ``app.add_exception_handler``."""
        if not isinstance(error, TallystickError):
            raise error
        return self.answers.with_headers(await self.answers.refuse(request, error))

    def fragments_of(self, request: Request, account: Account | None) -> Fragments:
        """As ``fragments``, for an account that the app has read already; makes no query.

        An app that loads its user with every request can construct the account from that row.
        """
        return Fragments(self.renderer, StarletteRequest(request), account)

    def returning(self, wanted: str | None) -> str:
        """The address to return to: ``wanted`` if it is on this site or an allowed one, else home."""
        return self.renderer.returning(wanted)

    # --- operations, each on a connection of its own ---

    async def shown(self, request: Request, work: Callable[[SyncConnection], BuyerPage | Reply]) -> Response:
        """The response for the result of ``work``, which gets a connection."""
        return await self.answers.send(request, await self.database.run(work))

    async def account(self, user: Key) -> Account:
        """The user's account, in one query."""
        return await self.database.run(lambda conn: self.accounts.get(conn, user))

    async def standing(self, user: Key) -> Standing:
        """The user's credits, in one query."""
        return await self.database.run(lambda conn: self.ledger.standing(conn, user))

    async def workshop(self, user: Key, workshop: object) -> Workshop:
        """A workshop of the user's, by its key or the text of the key in an address.

        Raises:
            UnknownWorkshop, WorkshopNotOwned: this user has no such workshop.
        """
        return await self.database.run(lambda conn: self._paywall.workshop(conn, user, workshop))

    async def workshop_and_standing(self, user: Key, workshop: object) -> tuple[Workshop, Standing]:
        """As ``workshop``, and the user's credits."""
        return await self.database.run(lambda conn: self._paywall.workshop_and_standing(conn, user, workshop))

    async def unlock(self, user: Key, workshop: object, *, key: str | None = None) -> CreditTransaction | None:
        """Spend a credit on a workshop, once; None, and nothing is spent, if it is open although nobody paid for it.

        ``key`` is the client's name for this intent.

        Raises:
            LedgerError: as ``Ledger.consume``, such as InsufficientCredits or WorkshopDeleted.
        """
        return await self.database.run(lambda conn: self._paywall.unlock(conn, user, workshop, key=key))


def _keep_from_shared_caches(response: Response) -> None:
    """Mark the answer of a route behind a credit: a shared cache must not give it to users without the credit.

    FastAPI leaves these headers out where the route returns a response of its own.
    """
    response.headers["Cache-Control"] = "private"
    response.headers.add_vary_header("Cookie")


__all__ = ["Billing", "CurrentUser", "Fragments", "Preview", "Workshop"]
