"""A host app with Tallystick's router.

No ``from __future__ import annotations`` here: FastAPI reads the signatures at run time.
"""

import dataclasses
from typing import Annotated, Any, Self
from uuid import UUID, uuid4

import sqlalchemy as sa
from fastapi import Depends, FastAPI, Header
from fastapi.testclient import TestClient
from sqlalchemy.ext.asyncio import AsyncEngine

from tallystick import Access, Pack, TallystickError, stripe
from tallystick.config import TEXT_KEYS
from tallystick.dev.stripe import DevStripe
from tallystick.errors import Key
from tallystick.web import Billing, router
from worlds import SHAPES, World

ORIGIN = "http://testserver"
PACKS = (Pack(name="Single Flight", credits=1, amount=7900), Pack(name="Flight Crew", credits=3, amount=14900))
HTML = {"accept": "text/html,application/xhtml+xml"}
ODD_KEYS = (
    "org/repo",
    "a/unlock",
    "/a//b/",
    "a?b",
    "a#b",
    "50%",
    "x%41",
    "a%2Fb",
    "größe 2",
    "q\"'<&\\",
    "../a",
    "a;b=c+d",
)
"""Keys of workshops that an address holds only if they are quoted."""

HTMX = {"accept": "text/html", "hx-request": "true"}


class Site:
    """The host app of a world. ``site.as_(user)`` makes requests with the user's session: here a header."""

    def __init__(self, world: World, engine: sa.Engine | AsyncEngine | None = None, **options: Any) -> None:
        self.world = world
        key_type = world.config.host.users.key_type

        async def current_user(x_session: Annotated[str | None, Header()] = None) -> Key | None:
            if x_session is None:
                return None
            return {"uuid": UUID, **dict.fromkeys(TEXT_KEYS, str)}.get(key_type, int)(x_session)

        self.billing: Billing = router(
            world.config, engine=engine or world.engine, current_user=current_user, **options
        )
        self.app = FastAPI()
        self.app.include_router(self.billing, prefix="/billing")
        self.app.add_exception_handler(TallystickError, self.billing.refusal)
        self._guarded()
        self.client = TestClient(self.app, base_url=ORIGIN, follow_redirects=False)

    def _guarded(self) -> None:
        billing = self.billing

        @self.app.get("/paid/{workshop}")
        async def paid(access: Annotated[Access, Depends(billing.requires_open_workshop)]) -> str:
            return access.reason

        @self.app.get("/report")
        async def report(balance: Annotated[int, Depends(billing.requires_credit(2))]) -> int:
            return balance

    def as_(self, user: Key, **headers: str) -> dict[str, str]:
        return {"x-session": str(user), **headers}

    def get(self, user: Key, path: str, *, headers: dict[str, str] | None = None, **more: Any) -> Any:
        return self.client.get(path, headers=self.as_(user) | (headers or {}), **more)

    def post(self, user: Key, path: str, *, headers: dict[str, str] | None = None, **more: Any) -> Any:
        return self.client.post(path, headers=self.as_(user) | (headers or {}), **more)

    def balance(self, user: Key) -> int:
        with self.world.engine.connect() as conn:
            return self.world.ledger.balance(conn, user)


def settings_for(double: DevStripe) -> dict[str, Any]:
    """The settings with which a site sells at the double."""
    return {
        "packs": PACKS,
        "checkout_origins": (ORIGIN,),
        "stripe_secret_key": double.secret_key,
        "stripe_api_base": double.url,
        "stripe_webhook_secret": "whsec_of_no_endpoint",
    }


class Shop(Site):
    """A site whose packs are on sale at the double, and an endpoint for its events that nobody listens at."""

    def __init__(self, url: str, double: DevStripe, engine: AsyncEngine | None = None) -> None:
        host = SHAPES["uuid"].host
        unpriced = World(url, host, **settings_for(double))
        made = stripe.setup(unpriced.config, endpoint_url=f"http://127.0.0.1:9/{uuid4()}/webhooks/stripe")
        assert made.endpoint is not None
        prices = {pack.pack: pack.price for pack in made.packs}
        priced = tuple(dataclasses.replace(pack, stripe_price_id=prices[pack.name]) for pack in PACKS)
        more = {"packs": priced, "stripe_webhook_secret": made.endpoint.secret}
        self.double = double
        self.endpoint = made.endpoint.id
        super().__init__(World(url, host, **(settings_for(double) | more)), engine)

    def __enter__(self) -> Self:
        self.client.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.client.__exit__()

    def start(self, user: Key, **form: str) -> str:
        """Press the button of a pack; the Stripe session that came of it."""
        sent = self.post(user, "/billing/checkout", data={"pack": "Flight Crew"} | form, headers=HTML)
        assert sent.status_code == 303, sent.text
        assert sent.headers["location"].startswith(self.double.url)
        return sent.headers["location"].split("?")[0].rpartition("/")[2]

    def return_from_stripe(self, user: Key, session: str, **query: str) -> Any:
        return self.get(user, "/billing/success", params={"session_id": session, **query}, headers=HTML)


@dataclasses.dataclass(frozen=True)
class DjangoShop:
    """The example in Django. ``client(user)`` makes requests as Django's own test client does."""

    origin: str
    engine: sa.Engine
    double: DevStripe

    def user(self, *, credits: int = 0) -> Any:
        from django.contrib.auth import get_user_model
        from django.db import connection

        from django_workshops.billing import billing

        name = f"{uuid4()}@example.com"
        made = get_user_model().objects.create_user(name, email=name)
        if credits:
            billing.ledger.grant(connection, made.pk, credits=credits, key="start", description="A present")
        return made

    def workshop(self, user: Any, title: str = "Mobile App Discovery") -> int:
        from django_workshops.models import Workshop

        return Workshop.objects.create(user=user, title=title).pk

    def client(self, user: Any = None, *, checks_csrf: bool = False) -> Any:
        from django.test import Client

        client = Client(enforce_csrf_checks=checks_csrf, headers=HTML)
        if user is not None:
            client.force_login(user)
        return client

    def balance(self, email: str) -> int:
        with self.engine.connect() as conn:
            asked = sa.text("SELECT credit_balance FROM auth_user WHERE email = :email")
            return int(conn.execute(asked, {"email": email}).scalar_one())
