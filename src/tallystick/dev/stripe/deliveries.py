"""Deliveries: signed events to the account's webhook endpoints, with retries."""

from __future__ import annotations

import hashlib
import heapq
import hmac
import http.client
import itertools
import json
import secrets
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final
from urllib.parse import urlsplit

from tallystick.dev.stripe.account import Object, StripeAccount
from tallystick.dev.stripe.parameters import refused

USER_AGENT: Final = "Stripe/1.0 (+https://stripe.com/docs/webhooks)"


@dataclass(frozen=True)
class Delivery:
    """One event to be delivered to one endpoint."""

    event: str
    type: str
    endpoint: str
    attempt: int = 1


@dataclass(frozen=True)
class Attempt(Delivery):
    """The result of a delivery: the endpoint's status, or the error."""

    status: int | None = None
    error: str | None = None

    @property
    def succeeded(self) -> bool:
        """True for 2xx only: at Stripe a redirect is a failure, and is not followed."""
        return self.status is not None and 200 <= self.status < 300  # noqa: PLR2004 - HTTP's own numbers


def new_secret() -> str:
    """Make a signing secret."""
    return "whsec_" + secrets.token_hex(16)


def sign(body: bytes, keys: Iterable[str], at: int) -> str:
    """Return the ``Stripe-Signature`` header, with one v1 signature for each signing secret."""
    signed = f"{at}.".encode() + body
    signatures = [hmac.new(key.encode(), signed, hashlib.sha256).hexdigest() for key in keys]
    return ",".join([f"t={at}", *(f"v1={signature}" for signature in signatures)])


class Webhooks:
    """Threads that send each event to the endpoints that subscribe to it.

    ``retry_delays_s`` stands for the days over which Stripe retries. While ``hold`` is on, deliveries and retries wait
    for ``release``.
    """

    def __init__(
        self, account: StripeAccount, *, retry_delays_s: Sequence[float], timeout_s: float, senders: int
    ) -> None:
        self.account = account
        self.retry_delays_s = retry_delays_s
        self.timeout_s = timeout_s
        self.log: list[Attempt] = []
        self.held: list[Delivery] = []
        self._holding = False
        self._changed = threading.Condition()
        self._queue: list[tuple[float, int, Delivery]] = []  # a heap: due time, tie-breaker
        self._order = itertools.count()
        self._under_way = 0
        self._closed = False
        self._threads = [threading.Thread(target=self._send_queued, daemon=True) for _ in range(senders)]
        for thread in self._threads:
            thread.start()

    # -- automatic deliveries

    def announce(self, event: Object) -> None:
        """Queue an event for each endpoint that subscribes to its type. The account's lock is held."""
        deliveries = [
            Delivery(event["id"], event["type"], endpoint["id"])
            for endpoint in self._enabled()
            if {"*", event["type"]} & {*endpoint["enabled_events"]}
        ]
        event["pending_webhooks"] = len(deliveries)
        for delivery in deliveries:
            self._queue_up(delivery)

    def _enabled(self) -> list[Object]:
        return [one for one in self.account.objects["webhook_endpoint"].values() if one["status"] == "enabled"]

    def _queue_up(self, delivery: Delivery, delay_s: float = 0) -> None:
        with self._changed:
            if self._holding:
                self.held.append(delivery)
            else:
                heapq.heappush(self._queue, (time.monotonic() + delay_s, next(self._order), delivery))
            self._changed.notify_all()

    def _send_queued(self) -> None:
        while (delivery := self._next()) is not None:
            try:
                self.send(delivery)
            finally:
                with self._changed:
                    self._under_way -= 1
                    self._changed.notify_all()

    def _next(self) -> Delivery | None:
        with self._changed:
            while not self._closed:
                wait_s = self._queue[0][0] - time.monotonic() if self._queue else None
                if wait_s is not None and wait_s <= 0:
                    self._under_way += 1
                    return heapq.heappop(self._queue)[2]
                self._changed.wait(wait_s)
            return None

    def send(self, delivery: Delivery) -> Attempt | None:
        """Send one delivery now, log it, and queue its retry if it failed; None if its endpoint was removed."""
        with self.account.lock:
            event = self.account.objects["event"][delivery.event]
            endpoint = self.account.objects["webhook_endpoint"].get(delivery.endpoint)
            if endpoint is None:
                return None
            url = endpoint["url"]
            body, signature = self.signed(event, endpoint)
        status = error = None
        try:
            status = self._post(url, body, signature)
        except (OSError, http.client.HTTPException) as failure:
            error = repr(failure)
        attempt = Attempt(**asdict(delivery), status=status, error=error)
        with self.account.lock:
            self.log.append(attempt)
            if attempt.succeeded:
                event["pending_webhooks"] = max(0, event["pending_webhooks"] - 1)
        if not attempt.succeeded and delivery.attempt <= len(self.retry_delays_s):
            again = replace(delivery, attempt=delivery.attempt + 1)
            self._queue_up(again, self.retry_delays_s[delivery.attempt - 1])
        return attempt

    def signed(self, event: Object, endpoint: Object, *, at: int | None = None) -> tuple[bytes, str]:
        """Return the body and the signature header, signed by the real clock, since receivers check the age."""
        now = time.time()
        shown = event | {"api_version": endpoint["api_version"] or event["api_version"]}
        body = json.dumps(shown, indent=2).encode()
        valid = [secret for secret, until in self.account.secrets[endpoint["id"]] if until is None or until > now]
        return body, sign(body, valid, int(now) if at is None else at)

    def _post(self, url: str, body: bytes, signature: str) -> int:
        target = urlsplit(url)
        make = http.client.HTTPSConnection if target.scheme == "https" else http.client.HTTPConnection
        connection = make(target.netloc, timeout=self.timeout_s)
        try:
            path = (target.path or "/") + (f"?{target.query}" if target.query else "")
            headers = {
                "Content-Type": "application/json; charset=utf-8",
                "Stripe-Signature": signature,
                "User-Agent": USER_AGENT,
            }
            connection.request("POST", path, body, headers)
            return connection.getresponse().status
        finally:
            connection.close()

    # -- controls for tests

    def hold(self) -> None:
        """Hold all deliveries, also those that wait for a retry, until ``release``."""
        with self._changed:
            self._holding = True
            self.held += [delivery for _due, _order, delivery in sorted(self._queue)]
            self._queue.clear()
            self._changed.notify_all()

    def release(self, events: Sequence[str] | None = None) -> list[Attempt]:
        """Send held deliveries one after the other, in this thread, and return the result of each.

        None sends all and ends the hold. A list of event ids sends those, in its order and as often as it names them;
        the others stay held.
        """
        with self._changed:
            if events is None:
                chosen, self.held, self._holding = self.held, [], False
            else:
                chosen = [one for event in events for one in self._held_of(event)]
                self.held = [one for one in self.held if one not in chosen]
        attempts = [self.send(delivery) for delivery in chosen]
        return [attempt for attempt in attempts if attempt is not None]

    def drop(self, events: Sequence[str]) -> int:
        """Drop the held deliveries of these events for good, and return their number."""
        with self._changed:
            lost = {one for event in events for one in self._held_of(event)}
            self.held = [one for one in self.held if one not in lost]
            return len(lost)

    def _held_of(self, event: str) -> list[Delivery]:
        found = [delivery for delivery in self.held if delivery.event == event]
        if not found:
            raise refused(f"No delivery of {event} is held.", "resource_missing", "events", status=404)
        return found

    def roll_secret(self, endpoint: Object, keep_old_s: float) -> str:
        """Give an endpoint a new secret; the old ones also sign until ``keep_old_s`` from now."""
        secret = new_secret()
        until = time.time() + keep_old_s
        old = self.account.secrets[endpoint["id"]]
        self.account.secrets[endpoint["id"]] = [
            (secret, None),
            *((one, until if end is None else min(end, until)) for one, end in old),
        ]
        return secret

    def resend(self, event: str) -> int:
        """Queue an event again for every enabled endpoint; return their number."""
        with self.account.lock:
            found = self.account.get("event", event)
            endpoints = [endpoint["id"] for endpoint in self._enabled()]
        for endpoint in endpoints:
            self._queue_up(Delivery(found["id"], found["type"], endpoint))
        return len(endpoints)

    def wait(self, timeout_s: float) -> bool:
        """Wait until nothing is queued, waiting for a retry or under way. False after ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._under_way, timeout_s)

    def close(self) -> None:
        """Stop the senders; a delivery under way is finished first."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()


def as_json(attempts: Iterable[Delivery]) -> list[dict[str, Any]]:
    """Return them as plain objects for the control endpoints."""
    return [asdict(attempt) for attempt in attempts]
