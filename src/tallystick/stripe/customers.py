"""The Stripe customer of a user: made once, replaced when Stripe no longer has it, its e-mail kept as the host's."""

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
from tallystick.stripe.client import MISSING, Object, ask, found, is_live
from tallystick.stripe.effects import Effects, in_transaction

USER_KEY = "tallystick_user"
EMAIL_KEY = "tallystick_email"
METADATA_MAX = 500  # characters: Stripe's limit for a value of metadata
CHECKED = 20
REPLAYS_MAX = 10


@dataclass(frozen=True, slots=True)
class CustomerCheck:
    """A user's stored customer that Stripe cannot charge, and why."""

    user: Key
    customer: str
    problem: str


def customer_of(effects: Effects, account: Account) -> str:
    """The user's customer, ready for a session; made, or made anew, if Stripe has none of the stored id.

    Callers that ask at the same time ask with the same idempotency key, so they get the same customer.
    """
    stored = account.stripe_customer_id
    if stored is None:
        return _made(effects, account.user, after=None)
    customer = _existing(effects, stored)
    if customer is None:
        return _made(effects, account.user, after=stored)
    _bring_email(effects, account.user, customer)
    return stored


def replaced(effects: Effects, user: Key, gone: str) -> str:
    """Another customer for the user, after Stripe refused ``gone``."""
    return _made(effects, user, after=gone)


def check_customers(engine: sa.Engine, config: Config, *, most: int = CHECKED) -> list[CustomerCheck]:
    """Ask Stripe about some of the stored customers, and return those that it does not have.

    Customers of test keys in a live account, of another account, and deleted ones are found here. A sale repairs its
    own buyer's.

    Raises:
        StripeNotConfigured, StripeUnavailable, StripeRefused, DatabaseError: nothing was written.
    """
    effects = Effects(engine, config)
    users = effects.store.schema.users.c
    stored = sa.select(users.key, users.stripe_customer_id).where(users.stripe_customer_id.is_not(None))
    sample = stored.order_by(users.stripe_customer_id).limit(most)  # ids are random, and the index has their order
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
    now = found(lambda: effects.client.v1.customers.retrieve(customer))
    seen: Object | None = None if now is None else now.to_dict()
    return None if seen is None or seen.get("deleted") else seen


def _made(effects: Effects, user: Key, *, after: str | None) -> str:
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
        gone = made  # Stripe answers with a deleted customer for as long as it keeps the key

    def store(conn: sa.Connection) -> str:
        effects.store.ledger.lock(conn, user)
        stored = accounts.get(conn, user).stripe_customer_id
        if stored not in (None, after):
            return stored
        return accounts.set_stripe_customer(conn, user, made, replace=True).stripe_customer_id or made

    return in_transaction(engine, store)


def _create(effects: Effects, user: Key, email: str | None, *, identity: str) -> tuple[str, bool]:
    """Ask Stripe for a customer; without the e-mail if Stripe refuses that. One identity makes one customer.

    Returns its id, and whether this is the answer to an earlier request.
    """
    about = {USER_KEY: str(user)[:METADATA_MAX]} | ({EMAIL_KEY: _digest(email)} if email else {})
    params: Any = {"metadata": about}
    if email:
        once: Any = {"idempotency_key": f"customer {_digest(identity)}"}
        try:
            return _answered(ask(lambda: effects.client.v1.customers.create(params | {"email": email}, once)))
        except StripeRefused as refusal:
            if refusal.param != "email":
                raise
    without: Any = {"idempotency_key": f"customer without e-mail {_digest(identity)}"}
    return _answered(ask(lambda: effects.client.v1.customers.create(params, without)))


def _answered(customer: sdk.Customer) -> tuple[str, bool]:
    answer = customer.last_response
    return customer.id, answer is not None and "Idempotent-Replayed" in answer.headers


def _bring_email(effects: Effects, user: Key, customer: Object) -> None:
    """Give a customer of ours the host's e-mail, if the host's has changed since it was last given.

    The digest of the last one is in the customer's metadata: an address that somebody set at Stripe is kept.
    """
    about = customer["metadata"] or {}
    email = in_transaction(effects.engine, lambda conn: _email(effects, conn, user))
    if not email or USER_KEY not in about or about.get(EMAIL_KEY) == _digest(email):
        return
    mark: Any = {"metadata": {EMAIL_KEY: _digest(email)}}
    id = customer["id"]
    try:
        ask(lambda: effects.client.v1.customers.update(id, mark | {"email": email}))
    except StripeRefused as refusal:
        if refusal.param == "email":
            ask(lambda: effects.client.v1.customers.update(id, mark))  # so that it is not tried at every sale
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
