"""One Stripe account in test mode: its objects, its clock and its events."""

from __future__ import annotations

import copy
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from tallystick.dev.stripe.parameters import Params, empty, has_field, refused, specification

Object = dict[str, Any]

DAY_S: Final = 86_400
EVENTS_KEPT_S: Final = 30 * DAY_S
ID_PREFIXES: Final = {
    "balance_transaction": "txn",
    "charge": "ch",
    "checkout.session": "cs_test",
    "customer": "cus",
    "dispute": "du",
    "event": "evt",
    "invoice": "in",
    "item": "li",
    "line_item": "il",
    "payment_intent": "pi",
    "payment_method": "pm",
    "price": "price",
    "product": "prod",
    "refund": "re",
    "webhook_endpoint": "we",
}


class StripeAccount:
    """The state of the double. Callers hold ``lock`` while they read or write."""

    def __init__(self, api_version: str | None = None) -> None:
        self.lock = threading.RLock()
        self.url = ""  # of the hosted pages, once they are served
        self.api_version: str = api_version or specification()["api_version"]
        self.clock_offset_s = 0
        self.objects: dict[str, dict[str, Object]] = {kind: {} for kind in ID_PREFIXES}
        self.deleted: set[str] = set()  # ids of customers, which Stripe still returns
        self.line_items: dict[str, list[Object]] = {}  # by session
        self.intent_data: dict[str, Params] = {}  # by session, until its payment intent exists
        self.cards: dict[str, str] = {}  # by payment method: a card number, or "async" for a bank debit
        self.secrets: dict[str, list[tuple[str, float | None]]] = {}  # by endpoint: secret and its last second
        self.cause: Object = {"id": None, "idempotency_key": None}  # the request that an event names
        self.on_event: Callable[[Object], None] = lambda _event: None
        self.check: Callable[[Object], None] = lambda _object: None

    def now(self) -> int:
        """Return the account's time in Unix seconds."""
        return int(time.time()) + self.clock_offset_s

    def new(self, kind: str, **fields: Any) -> Object:
        """Make and store an object with every field that Stripe always sends, null unless given."""
        entropy = secrets.token_hex(28 if kind == "checkout.session" else 12)
        made = empty(kind) | {"id": f"{ID_PREFIXES[kind]}_{entropy}", "object": kind}
        always = {"created": self.now(), "livemode": False, "metadata": {}}
        made |= {name: value for name, value in always.items() if has_field(kind, name)}
        made |= fields
        self.objects[kind][made["id"]] = made
        return made

    def get(self, kind: str, key: str, *, param: str | None = None) -> Object:
        """Return an object, or raise ``resource_missing``: 404, or 400 if a parameter named the object."""
        found = self.objects[kind].get(key)
        if found is None or (kind == "event" and self.forgotten(found)):
            message = f"No such {kind}: '{key}'"
            raise refused(message, "resource_missing", param or "id", status=400 if param else 404)
        return found

    def forgotten(self, event: Object) -> bool:
        """True if Stripe would no longer have this event."""
        return bool(event["created"] <= self.now() - EVENTS_KEPT_S)

    def update(self, kind: str, key: str, params: Params) -> Object:
        """Set plain fields and merge metadata; with an event for the kinds that Stripe has one for."""
        subject = self.get(kind, key)
        changes = {**params}
        if "metadata" in params:
            changes["metadata"] = merged_metadata(params, subject["metadata"])
        previous = {name: subject.get(name) for name in changes if subject.get(name) != changes[name]}
        subject.update(changes)
        if previous and kind in ("customer", "price", "product", "refund"):
            self.emit(f"{kind}.updated", subject, previous)
        return subject

    def delete(self, kind: str, key: str) -> Object:
        """Delete an object."""
        subject = self.get(kind, key)
        del self.objects[kind][key]
        if kind == "customer":
            self.deleted.add(key)
            self.emit("customer.deleted", subject)
        return {"id": key, "object": kind, "deleted": True}

    def emit(self, event_type: str, subject: Object, previous: Object | None = None) -> None:
        """Record an event with a copy of its object, and queue it for delivery."""
        data = {"object": copy.deepcopy(subject)}
        if previous is not None:
            data["previous_attributes"] = previous
        event = self.new(
            "event",
            type=event_type,
            api_version=self.api_version,
            data=data,
            pending_webhooks=0,
            request={**self.cause},
        )
        self.on_event(event)
        self.check(subject)
        self.check(event)


def merged_metadata(params: Params, old: dict[str, str] | None = None) -> dict[str, str]:
    """Return metadata as Stripe merges it: an empty value unsets its key, an empty whole unsets all."""
    given: dict[str, str] = params.get("metadata") or {}
    if params.get("metadata") == "":
        return {}
    merged = (old or {}) | given
    for key, value in given.items():
        if value == "":
            del merged[key]
        elif len(key) > 40 or len(value) > 500:  # noqa: PLR2004 - Stripe's documented limits
            raise refused("Metadata keys take 40 characters and values 500.", param=f"metadata[{key}]")
    if len(merged) > 50:  # noqa: PLR2004 - as above
        raise refused("Metadata takes 50 keys.", param="metadata")
    return merged
