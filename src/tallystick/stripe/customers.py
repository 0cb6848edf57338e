"""A user's Stripe customer: made once, replaced if Stripe no longer has it, updated when the host's e-mail changes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import stripe as sdk

from tallystick.accounts import Account, Accounts
from tallystick.config import Config
from tallystick.database import run
from tallystick.errors import Key, StripeRefused
from tallystick.stripe.client import MISSING, Object, ask, ask_or_none, is_live
from tallystick.stripe.effects import Effects, in_transaction

USER_KEY = "tallystick_user"
EMAIL_KEY = "tallystick_email"
METADATA_MAX = 500  # characters: Stripe's limit for a value of metadata
SAMPLE_MAX = 20
REPLAYS_MAX = 10


@dataclass(frozen=True, slots=True)
class CustomerCheck:
    """A user's stored customer that Stripe cannot charge, and the reason."""

    user: Key
    customer: str
    problem: str


def customer_of(effects: Effects, account: Account) -> str:
    """The user's customer for a session. A missing customer, or one that Stripe does not have, is made.

    Concurrent calls use the same idempotency key, so they get the same customer.
    """
    stored = account.stripe_customer_id
    if stored is None:
        return make_customer(effects, account.user, after=None)
    customer = _existing(effects, stored)
    if customer is None:
        return make_customer(effects, account.user, after=stored)
    _update_email(effects, account.user, customer)
    return stored


def check_customers(engine: sa.Engine, config: Config) -> list[CustomerCheck]:
    """Ask Stripe about some of the stored customers, and return those that it does not have.

    It finds deleted customers, those of the other mode and those of another account. A sale replaces its own buyer's.

    Raises:
        StripeNotConfigured, StripeUnavailable, StripeRefused, DatabaseError: nothing was written.
    """
    effects = Effects(engine, config)
    users = effects.store.schema.users.c
    stored = sa.select(users.key, users.stripe_customer_id).where(users.stripe_customer_id.is_not(None))
    sample = stored.order_by(users.stripe_customer_id).limit(
        SAMPLE_MAX
    )  # ids are random, and the index has their order
    rows = in_transaction(engine, lambda conn: run(conn, sample, {}).all())
    mode = "live" if is_live(config) else "test"
    return [
        CustomerCheck(
            user,
            customer,
            f"Stripe has no customer {customer} in {mode} mode: deleted, of the other mode, or of another account. "
            "The user's next checkout makes a new one",
        )
        for user, customer in rows
        if _existing(effects, customer) is None
    ]


def _existing(effects: Effects, customer: str) -> Object | None:
    now = ask_or_none(lambda: effects.client.v1.customers.retrieve(customer))
    seen: Object | None = None if now is None else now.to_dict()
    return None if seen is None or seen.get("deleted") else seen


def make_customer(effects: Effects, user: Key, *, after: str | None) -> str:
    """Make a customer and store it, unless another call has stored one other than ``after`` meanwhile."""
    accounts, engine = Accounts(effects.config), effects.engine
    now = in_transaction(engine, lambda conn: accounts.get(conn, user)).stripe_customer_id
    if now not in (None, after):
        return now
    email, realm = in_transaction(engine, lambda conn: (_email(effects, conn, user), effects.store.realm(conn)))
    gone, made = after or "", ""
    for _ in range(REPLAYS_MAX):
        made, replayed = _create(effects, user, email, identity=f"{realm} {user} {email} {gone}")
        if not replayed or _existing(effects, made) is not None:
            break
        gone = made  # Stripe returns a deleted customer as long as it keeps the idempotency key

    def store(conn: sa.Connection) -> str:
        effects.store.ledger.lock(conn, user)
        stored = accounts.get(conn, user).stripe_customer_id
        if stored not in (None, after):
            return stored
        return accounts.set_stripe_customer(conn, user, made, replace=True).stripe_customer_id or made

    return in_transaction(engine, store)


def _create(effects: Effects, user: Key, email: str | None, *, identity: str) -> tuple[str, bool]:
    """Create a customer at Stripe, without the e-mail if Stripe refuses that; one for each identity.

    Returns its id, and True if this is the answer to an earlier request.
    """
    metadata = {USER_KEY: str(user)[:METADATA_MAX]} | ({EMAIL_KEY: _digest(email)} if email else {})
    params: Any = {"metadata": metadata}
    if email:
        once: Any = {"idempotency_key": f"customer {_digest(identity)}"}
        try:
            return _id_and_replayed(ask(lambda: effects.client.v1.customers.create(params | {"email": email}, once)))
        except StripeRefused as refusal:
            if refusal.param != "email":
                raise
    without: Any = {"idempotency_key": f"customer without e-mail {_digest(identity)}"}
    return _id_and_replayed(ask(lambda: effects.client.v1.customers.create(params, without)))


def _id_and_replayed(customer: sdk.Customer) -> tuple[str, bool]:
    answer = customer.last_response
    return customer.id, answer is not None and "Idempotent-Replayed" in answer.headers


def _update_email(effects: Effects, user: Key, customer: Object) -> None:
    """Update the e-mail of a customer of ours if the host's has changed since the last update.

    The digest of the last one is in the customer's metadata, so an address that was set at Stripe is kept.
    """
    metadata = customer["metadata"] or {}
    email = in_transaction(effects.engine, lambda conn: _email(effects, conn, user))
    if not email or USER_KEY not in metadata or metadata.get(EMAIL_KEY) == _digest(email):
        return
    mark: Any = {"metadata": {EMAIL_KEY: _digest(email)}}
    id = customer["id"]
    try:
        ask(lambda: effects.client.v1.customers.update(id, mark | {"email": email}))
    except StripeRefused as refusal:
        if refusal.param == "email":
            ask(lambda: effects.client.v1.customers.update(id, mark))  # or every sale would try it again
        elif refusal.code != MISSING:
            raise


def _email(effects: Effects, conn: sa.Connection, user: Key) -> str | None:
    users = effects.store.schema.users.c
    if "email" not in users:
        return None
    email: str | None = run(conn, sa.select(users.email).where(users.key == user), {}).scalar_one()
    return email or None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
