"""For development: Stripe cannot reach this machine, so its events are fetched and delivered to the app's webhook."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import stripe as sdk

from tallystick.config import Config
from tallystick.errors import StripeNotConfigured
from tallystick.stripe.client import ask, client, every, is_live
from tallystick.stripe.webhooks import HANDLERS

_TIMEOUT_S = 20
_TRIES = 3
_SLACK_S = 5  # between this clock and Stripe's


@dataclass(frozen=True, slots=True)
class Forwarded:
    """One delivery: the app's status, or None when it did not answer."""

    event: str
    type: str
    status: int | None


def listen(config: Config, url: str, *, poll_s: float = 1.0) -> Iterator[Forwarded | None]:
    """Deliver every new event to ``url``, signed with the configured secret, and yield what came of each.

    Goes on until the caller stops asking; yields None after a look that found nothing. A delivery that fails is
    made again with the next looks, three times in all.

    Raises:
        StripeNotConfigured: a secret is missing, or the key is a live one.
        StripeUnavailable, StripeRefused.
    """
    stripe = client(config)
    secret = (config.stripe_webhook_secret or "").split(",")[0].strip()
    if not secret:
        raise StripeNotConfigured(
            "no secret to sign with. Set STRIPE_WEBHOOK_SECRET to any text, here and where the app runs",
            setting="stripe_webhook_secret",
        )
    if is_live(config):
        raise StripeNotConfigured("listening is for development: use a test key", setting="stripe_secret_key")
    if urlsplit(url).scheme not in ("http", "https"):
        raise StripeNotConfigured(f"{url!r} is no address of a webhook. Pass http://127.0.0.1:…", setting="url")
    return _forwarded(stripe, secret, url, poll_s)


def _forwarded(stripe: sdk.StripeClient, secret: str, url: str, poll_s: float) -> Iterator[Forwarded | None]:
    tries: dict[str, int] = {}
    newest = ask(lambda: stripe.v1.events.list({"limit": 1})).data
    since = (newest[0].created if newest else int(time.time())) - _SLACK_S
    before = {one.id for one in _since(stripe, since)}
    while True:
        fresh = [one for one in _since(stripe, since) if one.id not in before]
        for event in reversed(fresh):  # oldest first
            status = _deliver(url, json.dumps(event.to_dict(for_json=True)), secret)
            tries[event.id] = tries.get(event.id, 0) + 1
            delivered = status is not None and 200 <= status < 300  # noqa: PLR2004 - HTTP's own numbers
            if delivered or tries[event.id] == _TRIES:
                before.add(event.id)
            yield Forwarded(event.id, event.type, status)
        yield None
        time.sleep(poll_s)


def _since(stripe: sdk.StripeClient, since: int) -> list[sdk.Event]:
    asked: Any = {"created": {"gte": since}, "types": sorted(HANDLERS), "limit": 100}
    return list(every(lambda: stripe.v1.events.list(asked)))


def _deliver(url: str, body: str, secret: str) -> int | None:
    headers = {
        "Content-Type": "application/json; charset=utf-8",
        "Stripe-Signature": sdk.WebhookSignature.generate_signature_header(body, secret),
    }
    request = urllib.request.Request(url, body.encode(), headers)  # noqa: S310 - the scheme was checked
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - as above
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return None
