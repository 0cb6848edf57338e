"""The packs and the webhook endpoint at Stripe: compared with the configuration, and created if missing."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import stripe as sdk

from tallystick.config import Config, Pack
from tallystick.errors import PackMismatch, StripeNotConfigured
from tallystick.stripe.checkout import price_of, require_price
from tallystick.stripe.client import API_VERSION, ask, ask_or_none, client, is_live, list_all
from tallystick.stripe.webhooks import HANDLERS

_PAGE = 100
_SLUG_MAX = 40


@dataclass(frozen=True, slots=True)
class PackCheck:
    """One pack against Stripe; ``problem`` is None when it can be sold."""

    pack: str
    price: str | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class PackSetup:
    """A pack's price at Stripe; ``made`` says that it was missing. Put ``price`` into the pack's stripe_price_id."""

    pack: str
    price: str
    made: bool


@dataclass(frozen=True, slots=True)
class EndpointSetup:
    """The webhook endpoint. Stripe shows ``secret`` only at its creation: put it into STRIPE_WEBHOOK_SECRET.

    ``outdated`` are endpoints of the same address with another API version, which Stripe cannot change: remove them
    when the new secret is in use.
    """

    id: str
    url: str
    made: bool
    changed: bool
    secret: str | None
    outdated: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Setup:
    """The objects at Stripe that ``setup`` found or made."""

    packs: tuple[PackSetup, ...]
    endpoint: EndpointSetup | None


def check(config: Config) -> list[PackCheck]:
    """Compare every pack with its price at Stripe: it exists, is active, and has the configured amount.

    Raises:
        StripeNotConfigured, StripeUnavailable, StripeRefused: nothing was changed.
    """
    stripe = client(config)
    return [PackCheck(pack.name, pack.stripe_price_id, _problem(stripe, config, pack)) for pack in config.packs]


def setup(config: Config, *, endpoint_url: str | None = None) -> Setup:
    """Create the missing objects at Stripe: a product and a price for each pack, and the webhook endpoint.

    Doing it again creates nothing more: prices are found by a lookup key, the endpoint by its address. An object that
    differs is an error and never changed: its price may be in use elsewhere.

    Raises:
        PackMismatch: a pack names a price that differs from it.
        StripeNotConfigured: a pack has no amount, or the address is not https in live mode.
        StripeUnavailable, StripeRefused: objects created before stay.
    """
    stripe = client(config)
    for pack in config.packs:
        if pack.amount is None:
            raise StripeNotConfigured(f"the pack {pack.name!r} has no amount to charge", setting="packs")
    if endpoint_url is not None:
        parts = urlsplit(endpoint_url)
        if not parts.netloc or parts.scheme not in (("https",) if is_live(config) else ("https", "http")):
            raise StripeNotConfigured(
                f"{endpoint_url!r} is no address that Stripe can send events to. Pass https://…",
                setting="endpoint_url",
            )
    packs = tuple(_price(stripe, config, pack) for pack in config.packs)
    return Setup(packs, None if endpoint_url is None else _endpoint(stripe, endpoint_url))


def _problem(stripe: sdk.StripeClient, config: Config, pack: Pack) -> str | None:
    if pack.stripe_price_id is None or pack.amount is None:
        return f"no {'amount' if pack.amount is None else 'stripe_price_id'}; run: tallystick stripe setup"
    try:
        require_price(pack, price_of(stripe, pack), live=is_live(config))
    except PackMismatch as mismatch:
        return mismatch.problem
    return None


def _price(stripe: sdk.StripeClient, config: Config, pack: Pack) -> PackSetup:
    if pack.stripe_price_id is not None:
        require_price(pack, price_of(stripe, pack), live=is_live(config))
        return PackSetup(pack.name, pack.stripe_price_id, made=False)
    name = _slug(pack.name)
    lookup_key = f"{name}_{pack.credits}_{pack.amount}_{pack.currency}"
    known = ask(lambda: stripe.v1.prices.list({"lookup_keys": [lookup_key], "active": True}))
    if known.data:
        there = replace(pack, stripe_price_id=known.data[0].id)
        require_price(there, price_of(stripe, there), live=is_live(config))
        return PackSetup(pack.name, known.data[0].id, made=False)
    if ask_or_none(lambda: stripe.v1.products.retrieve(name)) is None:
        product: Any = {"id": name, "name": pack.name, "metadata": {"tallystick_pack": pack.name}}
        ask(lambda: stripe.v1.products.create(product, {"idempotency_key": f"product {name}"}))
    price: Any = {
        "product": name,
        "unit_amount": pack.amount,
        "currency": pack.currency,
        "lookup_key": lookup_key,
        "metadata": {"tallystick_pack": pack.name, "tallystick_credits": str(pack.credits)},
    }
    made = ask(lambda: stripe.v1.prices.create(price, {"idempotency_key": f"price {lookup_key}"}))
    return PackSetup(pack.name, made.id, made=True)


def _endpoint(stripe: sdk.StripeClient, url: str) -> EndpointSetup:
    there = list_all(lambda: stripe.v1.webhook_endpoints.list({"limit": _PAGE}))
    same = [one for one in there if one.url == url and one.status == "enabled"]
    outdated = tuple(one.id for one in same if one.api_version != API_VERSION)
    for one in same:
        if one.api_version == API_VERSION:
            missing = {*HANDLERS} - {*one.enabled_events} if "*" not in one.enabled_events else set()
            if missing:
                _subscribe(stripe, one)
            return EndpointSetup(one.id, url, made=False, changed=bool(missing), secret=None, outdated=outdated)
    wanted: Any = {
        "url": url,
        "api_version": API_VERSION,
        "enabled_events": sorted(HANDLERS),
        "description": "Tallystick: credits",
    }
    made = ask(lambda: stripe.v1.webhook_endpoints.create(wanted))
    return EndpointSetup(made.id, url, made=True, changed=False, secret=made.secret, outdated=outdated)


def _subscribe(stripe: sdk.StripeClient, endpoint: sdk.WebhookEndpoint) -> None:
    events: Any = {"enabled_events": sorted({*HANDLERS, *endpoint.enabled_events})}
    ask(lambda: stripe.v1.webhook_endpoints.update(endpoint.id, events))


def _slug(name: str) -> str:
    """A product's id: readable, and unique for a name in any script."""
    readable = re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")[:_SLUG_MAX]
    return f"tallystick_{readable}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
