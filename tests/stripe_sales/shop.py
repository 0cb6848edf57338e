"""A shop: a migrated host app that sells through the Stripe double, and holds every delivery for the test to make."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from tallystick import Config, CreditTransaction, Pack, stripe
from tallystick.declared_tables import stripe_events, stripe_findings
from tallystick.dev.stripe import DevStripe
from tallystick.errors import Key
from tallystick.stripe.client import client, disconnect
from worlds import World

CREDITS, PRICE = 97, 1000  # no whole number of cents for a credit, so that rounding shows
PACK = "Serial Entrepreneur"
ORIGIN = "https://app.example.com"
ADDRESSES = {"success_url": f"{ORIGIN}/done", "cancel_url": f"{ORIGIN}/packs"}

T = TypeVar("T")


class Shop:
    """A world with a Stripe account, one pack on sale, and the deliveries of its webhook endpoint on hold.

    Where it is ``asynchronous``, checkouts and deliveries run as they do for an app with an async engine.
    """

    def __init__(
        self,
        world: World,
        dev: DevStripe,
        *,
        endpoint_url: str = "http://127.0.0.1:1/webhook",
        asynchronous: bool = False,
    ) -> None:
        self.world, self.dev, self.asynchronous = world, dev, asynchronous
        self.engine = sa.create_engine(world.url)  # pooled, as a web server's
        self.config = world.config.model_copy(
            update={
                "stripe_secret_key": dev.secret_key,
                "stripe_api_base": dev.url,
                "checkout_origins": (ORIGIN,),
                "packs": (Pack(name=PACK, credits=CREDITS, amount=PRICE),),
            }
        )
        made = stripe.setup(self.config, endpoint_url=endpoint_url)
        assert made.endpoint is not None
        self.endpoint = made.endpoint.id
        self.configure(
            packs=(Pack(name=PACK, credits=CREDITS, amount=PRICE, stripe_price_id=made.packs[0].price),),
            stripe_webhook_secret=made.endpoint.secret,
        )
        self.api = client(self.config).v1
        dev.hold()

    def configure(self, **settings: Any) -> Config:
        self.config = self.config.model_copy(update=settings)
        return self.config

    def checkout(self, user: Key, **options: Any) -> stripe.Checkout:
        return self.run(lambda engine: stripe.checkout(engine, self.config, user, PACK, **(ADDRESSES | options)))

    def run(self, work: Callable[[sa.Engine], T]) -> T:
        if not self.asynchronous:
            return work(self.engine)
        with ThreadPoolExecutor(1) as other:  # a browser that is open in this thread has its own event loop
            return other.submit(asyncio.run, self._on_a_loop(work)).result()

    async def _on_a_loop(self, work: Callable[[sa.Engine], T]) -> T:
        engine = create_async_engine(self.world.url, poolclass=sa.NullPool)
        try:
            async with AsyncSession() as greenlet:
                return await greenlet.run_sync(lambda _: work(engine.sync_engine))
        finally:
            await disconnect()

    def foreign(self, **fields: Any) -> str:
        """A paid session that something else than ``checkout`` made, such as a Payment Link."""
        price = {"currency": "usd", "unit_amount": 50, "product_data": {"name": "Sticker"}}
        made = self.api.checkout.sessions.create(
            {
                "mode": "payment",
                "line_items": [{"price_data": price, "quantity": 1}],
                "success_url": f"{ORIGIN}/",
                **fields,
            }
        )
        self.dev.pay(made.id)
        return made.id

    def events(self, *types: str) -> list[str]:
        """The ids of the held events of these types, oldest first."""
        return [one["event"] for one in self.dev.held() if not types or one["type"] in types]

    def deliver(self, *events: str) -> list[stripe.Received]:
        """Deliver events as they are signed for the endpoint, in this order."""
        received = []
        for event in events:
            body, signature = self.dev.signed(event, self.endpoint)
            received.append(self.run(partial(self._receive, body.encode(), signature)))
        return received

    def _receive(self, body: bytes, signature: str, engine: sa.Engine) -> stripe.Received:
        return stripe.receive(engine, self.config, body, signature)

    def deliver_all(self) -> list[stripe.Received]:
        return self.deliver(*self.events())

    def outcomes(self, *types: str) -> list[str]:
        """Deliver the held events of these types and say what came of each."""
        received = self.deliver(*self.events(*types))
        assert {one.status for one in received} <= {200}
        return [str(one.outcome) for one in received]

    def balance(self, user: Key) -> int:
        with self.engine.begin() as conn:
            return self.world.ledger.balance(conn, user)

    def rows(self, user: Key) -> list[tuple[str, int]]:
        """The completed rows of a user, oldest first: type and amount."""
        with self.engine.begin() as conn:
            history = self.world.ledger.history(conn, user, limit=1000, include_failed=True)
        return [(str(row.type), row.amount) for row in reversed(history) if row.sequence is not None]

    def purchase(self, bought: stripe.Checkout) -> CreditTransaction:
        with self.engine.begin() as conn:
            history = self.world.ledger.history(conn, bought.purchase.user_id, limit=1000, include_failed=True)
        return next(row for row in history if row.id == bought.purchase.id)

    def intent(self, bought: stripe.Checkout) -> str:
        intent = self.api.checkout.sessions.retrieve(bought.session).payment_intent
        assert isinstance(intent, str)
        return intent

    def findings(self) -> list[str]:
        with self.engine.begin() as conn:
            return list(conn.scalars(sa.select(stripe_findings.c.kind).order_by(stripe_findings.c.kind)))

    def written(self) -> tuple[int, ...]:
        """Numbers that any write changes."""
        tables = (self.world.schema.credit_transactions, stripe_events, stripe_findings)
        with self.engine.begin() as conn:
            return tuple(conn.scalar(sa.select(sa.func.count()).select_from(table)) or 0 for table in tables)
