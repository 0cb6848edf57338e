"""Selling: the pending purchase, the Stripe session that pays for it, and the confirmation for the success page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import sqlalchemy as sa
import stripe as sdk
from sqlalchemy.dialects import postgresql as pg

from tallystick.accounts import Account, Accounts
from tallystick.config import QUANTITY_MAX, CheckoutOptions, Config, Pack, Rounding
from tallystick.database import run
from tallystick.declared_tables import stripe_checkouts
from tallystick.errors import (
    BalanceOutOfRange,
    IdempotencyKeyReused,
    InvalidArgument,
    Key,
    PackMismatch,
    ReturnAddressRefused,
    SessionNotYours,
    StripeNotConfigured,
    StripeRefused,
    UnknownPack,
    UnknownPurchase,
    UserDeleted,
    shown,
)
from tallystick.ledger import CreditTransaction
from tallystick.schema import INT64_MAX
from tallystick.stripe.client import MISSING, Object, ask, ask_or_none, is_live, list_all
from tallystick.stripe.customers import customer_of, make_customer
from tallystick.stripe.effects import PAGE, Effects, failure_of, in_transaction
from tallystick.stripe.store import ID_MAX, METADATA_KEY, REALM_KEY, Outcome, Store, storable, store_of

SESSION_PLACEHOLDER = "{CHECKOUT_SESSION_ID}"
ADDRESS_MAX = 5000  # characters: Stripe's limit for success_url and cancel_url
IDEMPOTENCY_KEY_MAX = 255
CUSTOMERS_MAX = 3  # customers to try, each of which may be deleted meanwhile
IDEMPOTENCY_KEY_KEPT_S = 86_400  # Stripe keeps a key at least so long, so a session may be made this late
CLOCK_SKEW_MAX_S = 3600  # between the database's clock and Stripe's; a large value only makes a list longer


@dataclass(frozen=True, slots=True)
class Checkout:
    """A purchase and its Stripe session. Send the buyer to ``url``.

    ``url`` is None if the session is over: it was paid, or has expired. Send the buyer to the success page then, with
    ``session``.
    """

    purchase: CreditTransaction
    session: str
    url: str | None


@dataclass(frozen=True, slots=True)
class Sale:
    """A purchase that is paid through a session of the host's own.

    Put ``metadata`` into the session and its ``payment_intent_data``: it proves which purchase is paid.
    """

    purchase: CreditTransaction
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Confirmation:
    """The state of a purchase that the success page may show."""

    purchase: CreditTransaction
    outcome: Outcome

    @property
    def granted(self) -> bool:
        """True once the credits are there; False if a delayed payment is still under way, or nothing was paid."""
        return self.purchase.status == "completed"


def checkout(
    engine: sa.Engine,
    config: Config,
    user: Key,
    pack: str,
    *,
    success_url: str,
    cancel_url: str,
    key: str | None = None,
    quantity: int = 1,
    options: CheckoutOptions | None = None,
) -> Checkout:
    """Start the purchase of a pack and open a Stripe session for it.

    All arguments are checked before anything is written or sold. The pending row is written first, and its id is
    Stripe's idempotency key and ``client_reference_id``. With ``key`` (the caller's name for this one intent) a
    second call, after a lost answer or from another tab, returns the same purchase and session; with another ``pack``
    or ``quantity`` it is refused. Both addresses must
    be on one of ``config.checkout_origins``; ``session_id`` is added to the first one unless it contains
    ``{CHECKOUT_SESSION_ID}``. ``quantity`` packs make one purchase of that many times the credits. ``options`` replace
    ``config.checkout_options``.

    Raises:
        StripeNotConfigured, UnknownPack, PackMismatch, ReturnAddressRefused, UnknownUser, UserDeleted,
        BalanceOutOfRange, InvalidArgument, IdempotencyKeyReused, UnknownPurchase (the key started one without
        ``checkout``): nothing was sold.
        StripeUnavailable: the purchase is pending; call again with the same ``key``.
        StripeRefused: the purchase failed; its description gives the reason.
    """
    effects = Effects(engine, config)
    addresses = {
        "success_url": _require_allowed_origin(config, _with_session_id(success_url)),
        "cancel_url": _require_allowed_origin(config, cancel_url),
    }
    accounts = Accounts(config)
    account = in_transaction(engine, lambda conn: accounts.get(conn, user))
    started = None
    if key is not None:
        named = storable("key", key)
        started = in_transaction(
            engine, lambda conn: _started_before(effects, conn, user, named, pack=pack, quantity=quantity)
        )
    if started is None:
        require_not_deleted(account)
        chosen, wanted_options = pack_named(config, pack), options or config.checkout_options
        room = require_room(
            effects.store, account, chosen.credits * _valid_quantity(quantity, wanted_options.quantity_max), pack
        )
        require_price(chosen, price_of(effects.client, chosen), live=is_live(config))
        request = {
            "customer": customer_of(effects, account),
            **addresses,
            **_parameters_of_options(wanted_options),
            "line_items": [_item(chosen, quantity, wanted_options.quantity_max, most=room // chosen.credits)],
        }
        started = in_transaction(
            engine, lambda conn: _start(effects, conn, user, chosen, more=request, key=key, quantity=quantity)
        )
    purchase, request = started
    session = _session(effects, purchase, request)
    return in_transaction(engine, lambda conn: _store_session(effects, conn, purchase, session))


def start_sale(
    engine: sa.Engine,
    config: Config,
    user: Key,
    *,
    credits: int,
    amount: int,
    currency: str,
    description: str,
    key: str | None = None,
    refund_rounding: Rounding | None = None,
) -> Sale:
    """Start the purchase for a session that you make yourself: write the pending row and the expected price.

    ``amount`` is the session's price before discounts and tax, in minor units of ``currency``. Put ``metadata`` into
    the session; store the session with ``ledger.attach_session``. No request is sent to Stripe here.

    Raises:
        InvalidArgument, UnknownUser, UserDeleted, BalanceOutOfRange, IdempotencyKeyReused: nothing was written.
    """
    store = store_of(config)

    def work(conn: sa.Connection) -> Sale:
        purchase = store.ledger.start_purchase(conn, user, credits=credits, description=description, key=key)
        if not purchase.replayed:
            require_room(store, Accounts(config).get(conn, user), credits, description)
        terms = pg.insert(stripe_checkouts).values(
            purchase_id=purchase.id,
            amount=amount,
            currency=currency,
            rounding=refund_rounding or config.refund_rounding,
        )
        run(conn, terms.on_conflict_do_nothing(), {})
        sold = stripe_checkouts.c
        stored = run(conn, sa.select(sold.pack, sold.amount, sold.currency).where(sold.purchase_id == purchase.id), {})
        before = stored.one()
        _require_same(
            key, pack=(before.pack, None), amount=(before.amount, amount), currency=(before.currency, currency)
        )
        return Sale(purchase, metadata_of(store, conn, purchase))

    if isinstance(amount, bool) or not isinstance(amount, int) or not 0 <= amount <= INT64_MAX:
        raise InvalidArgument.of("amount", amount, "pass a whole number of minor units, 0 or more")
    if not re.fullmatch("[a-z]{3}", currency):
        raise InvalidArgument.of("currency", currency, "pass a three-letter code, as usd")
    return in_transaction(engine, work)


def confirm(engine: sa.Engine, config: Config, user: Key, session: str) -> Confirmation:
    """Grant the credits of a paid session at once, as its webhook would; for the success page.

    The session is read from Stripe, and nothing else from the browser is trusted. Calling it twice, or at the same time
    as the webhook, grants once.

    Raises:
        SessionNotYours: it is another user's session, or none of ours.
        StripeNotConfigured, StripeUnavailable, StripeRefused: nothing was sold.
    """
    effects = Effects(engine, config)
    refusal = SessionNotYours(
        f"the session {shown(session)} pays for no purchase of user {user}. Nothing was granted",
        stripe_session_id=session,
    )
    if len(session) > ID_MAX or not re.fullmatch("cs_[A-Za-z0-9_]+", session):
        raise refusal
    found = effects.session_now(session)
    if found is None:
        raise refusal
    owner = effects.store.schema.user_key(user)
    purchase = in_transaction(engine, lambda conn: effects.store.claim(conn, found).purchase)
    if purchase is None or purchase.user_id != owner:
        raise refusal
    effect = effects.session(found, failed=failure_of(found))

    def work(conn: sa.Connection) -> Confirmation:
        outcome = effect(conn)
        return Confirmation(effects.store.purchase(conn, id=purchase.id) or purchase, outcome)

    return in_transaction(engine, work)


def pack_named(config: Config, name: str) -> Pack:
    """A pack of the configuration that can be sold. Raises UnknownPack, StripeNotConfigured."""
    for pack in config.packs:
        if pack.name == name:
            if pack.stripe_price_id is None or pack.amount is None:
                raise StripeNotConfigured(
                    f"the pack {name!r} has no {'amount' if pack.amount is None else 'stripe_price_id'}. "
                    "Make its price with: tallystick stripe setup",
                    setting="packs",
                )
            return pack
    names = ", ".join(repr(pack.name) for pack in config.packs) or "none at all"
    raise UnknownPack(f"no pack is called {name!r}; on sale: {names}. Packs stand in [[packs]]", pack=name)


def price_of(stripe: sdk.StripeClient, pack: Pack) -> Object | None:
    """The pack's price at Stripe, with its product; None if Stripe has none of this id."""
    price = ask_or_none(lambda: stripe.v1.prices.retrieve(pack.stripe_price_id or "", {"expand": ["product"]}))
    return None if price is None else price.to_dict()


def require_price(pack: Pack, price: Object | None, *, live: bool) -> None:
    """Check that the price equals the pack's, so that buyers pay the price they see. Raises PackMismatch."""
    problem = None
    if price is None:
        problem = f"Stripe has no price {pack.stripe_price_id} in {'live' if live else 'test'} mode"
    elif not price["active"] or not price["product"].get("active", True):
        problem = f"the price {price['id']} is not active"
    elif price["type"] != "one_time":
        problem = f"the price {price['id']} is {price['type']}, not one_time"
    elif (price["unit_amount"], price["currency"]) != (pack.amount, pack.currency):
        problem = (
            f"Stripe would charge {price['unit_amount']} {price['currency']}, "
            f"the pack says {pack.amount} {pack.currency}"
        )
    if problem:
        raise PackMismatch(
            f"the pack {pack.name!r} cannot be sold: {problem}. Nothing was sold. Look with: tallystick stripe check",
            pack=pack.name,
            problem=problem,
        )


# --- the steps of a checkout ---


def _valid_quantity(quantity: int, most: int | None) -> int:
    most = QUANTITY_MAX if most is None else most
    if isinstance(quantity, bool) or not isinstance(quantity, int) or not 1 <= quantity <= most:
        raise InvalidArgument.of("quantity", quantity, f"pass a whole number from 1 to {most}")
    return quantity


def _item(pack: Pack, quantity: int, quantity_max: int | None, *, most: int) -> dict[str, Any]:
    """The pack as a line item; a buyer may choose at most ``most``, as many as the balance can hold."""
    item: dict[str, Any] = {"price": pack.stripe_price_id, "quantity": quantity}
    if quantity_max is not None:
        item["adjustable_quantity"] = {"enabled": True, "minimum": 1, "maximum": min(quantity_max, most)}
    return item


def _parameters_of_options(options: CheckoutOptions) -> dict[str, Any]:
    """The options as parameters of the session, which are stored with the request so that it can be repeated."""
    # Stripe needs permission to store the buyer's entries with the customer
    entries = {"address": options.automatic_tax, "name": options.tax_ids}
    update = {name: "auto" for name, wanted in entries.items() if wanted}
    parameters: tuple[tuple[object, str, Any], ...] = (
        (options.promotion_codes, "allow_promotion_codes", True),
        (options.automatic_tax, "automatic_tax", {"enabled": True}),
        (options.save_payment_method, "payment_intent_data", {"setup_future_usage": "off_session"}),
        (options.invoice, "invoice_creation", {"enabled": True}),
        (options.tax_ids, "tax_id_collection", {"enabled": True}),
        (update, "customer_update", update),
        (options.locale, "locale", options.locale),
        (options.submit_text, "custom_text", {"submit": {"message": options.submit_text}}),
    )
    return {name: value for wanted, name, value in parameters if wanted}


def require_room(store: Store, account: Account, credits: int, what: str) -> int:
    """The number of credits that the balance can take; a sale of more is refused. Raises BalanceOutOfRange."""
    most = store.schema.credits_max
    if account.credit_balance + credits > most:
        raise BalanceOutOfRange(
            f"{what!r}, {credits} credits, cannot be sold to user {account.user}: the balance is "
            f"{account.credit_balance}, and none is above {most}. Nothing was sold",
            user=account.user,
            balance=account.credit_balance,
            amount=credits,
        )
    return most - account.credit_balance


def require_not_deleted(account: Account) -> None:
    """Refuse a sale to a soft-deleted user. Raises UserDeleted."""
    if account.deleted_at is not None:
        raise UserDeleted(
            f"user {account.user} was deleted. To bring the user back: tallystick users restore, or "
            "Accounts.restore_user",
            user=account.user,
        )


def metadata_of(store: Store, conn: sa.Connection, purchase: CreditTransaction) -> dict[str, str]:
    """The metadata for a session and payment of a purchase."""
    return {METADATA_KEY: str(purchase.id), REALM_KEY: store.realm(conn)}


def _started_before(
    effects: Effects, conn: sa.Connection, user: Key, key: str, *, pack: str, quantity: int
) -> tuple[CreditTransaction, dict[str, Any]] | None:
    """The purchase that this key started before, and its stored request. Raises what ``_stored`` raises."""
    row = effects.store.schema.credit_transactions.c
    prior = sa.select(row.id).where(row.user_id == effects.store.schema.user_key(user), row.idempotency_key == key)
    id = run(conn, prior, {}).scalar_one_or_none()
    purchase = None if id is None else effects.store.purchase(conn, id=id)
    if purchase is None:
        return None
    return replace(purchase, replayed=True), _stored(conn, purchase, key, pack=pack, quantity=quantity)


def _stored(
    conn: sa.Connection, purchase: CreditTransaction, key: str | None, *, pack: str, quantity: int
) -> dict[str, Any]:
    """The stored request of a purchase that ``key`` started.

    Raises:
        IdempotencyKeyReused: it is one of another pack or quantity.
        UnknownPurchase: it was not started by ``checkout``.
    """
    sold = stripe_checkouts.c
    terms = run(conn, sa.select(sold.pack, sold.request).where(sold.purchase_id == purchase.id), {}).one_or_none()
    request: dict[str, Any] = {} if terms is None else terms.request or {}
    if terms is None or request.get("mode") != "payment":
        raise UnknownPurchase(
            f"the key {key!r} started purchase {purchase.id}, but not through checkout. Use a new key",
            user=purchase.user_id,
            purchase=purchase.id,
        )
    _require_same(key, pack=(terms.pack, pack), quantity=(request["line_items"][0]["quantity"], quantity))
    return request


def _require_same(key: str | None, **terms: tuple[object, object]) -> None:
    """Check that the stored terms are those of the call. Raises IdempotencyKeyReused."""
    differs = {name: (before, now) for name, (before, now) in terms.items() if before != now}
    if differs:
        listed = ", ".join(f"{name} {shown(before)} (now {shown(now)})" for name, (before, now) in differs.items())
        raise IdempotencyKeyReused(
            f"the key {key!r} was used before, for {listed}. Use a new key for a new intent", key=key, differs=differs
        )


def _start(
    effects: Effects,
    conn: sa.Connection,
    user: Key,
    pack: Pack,
    *,
    more: dict[str, Any],
    key: str | None,
    quantity: int,
) -> tuple[CreditTransaction, dict[str, Any]]:
    """Write the purchase and the request for its session, which can so be repeated exactly."""
    purchase = effects.store.ledger.start_purchase(
        conn,
        user,
        credits=pack.credits * quantity,
        description=f"Purchased {pack.name} pack" if quantity == 1 else f"Purchased {quantity} {pack.name} packs",
        key=key,
        stripe_price_id=pack.stripe_price_id,
        expires_after=pack.expires_after,
    )
    metadata = metadata_of(effects.store, conn, purchase)
    request = {
        "mode": "payment",
        "client_reference_id": str(purchase.id),
        "metadata": metadata,
        **more,
        "payment_intent_data": {"metadata": metadata, **more.get("payment_intent_data", {})},
    }
    if purchase.replayed:  # another tab was faster
        return purchase, _stored(conn, purchase, key, pack=pack.name, quantity=quantity)
    store_terms(effects, conn, purchase.id, pack, request, quantity=quantity)
    return purchase, request


def store_terms(
    effects: Effects, conn: sa.Connection, purchase: UUID, pack: Pack, request: dict[str, Any], *, quantity: int = 1
) -> None:
    """Store the terms of a purchase of ``pack``, and the request for its payment; those that are there stay."""
    terms = pg.insert(stripe_checkouts).values(
        purchase_id=purchase,
        pack=pack.name,
        amount=(pack.amount or 0) * quantity,
        currency=pack.currency,
        rounding=pack.refund_rounding or effects.config.refund_rounding,
        request=request,
    )
    run(conn, terms.on_conflict_do_nothing(), {})


def _session(effects: Effects, purchase: CreditTransaction, request: dict[str, Any]) -> Object:
    if purchase.stripe_session_id is not None:
        stored = effects.session_now(purchase.stripe_session_id)
        if stored is not None:
            return stored
    if purchase.replayed:
        missed = session_of_purchase(effects, purchase, request["customer"])
        if missed is not None:
            return missed
    for attempt in range(1, CUSTOMERS_MAX + 1):
        try:
            return _create_session(effects, purchase, request)
        except StripeRefused as refusal:
            if refusal.code == MISSING and refusal.param == "customer" and attempt < CUSTOMERS_MAX:
                request = _with_another_customer(effects, purchase, request)
                continue
            if refusal.status not in (400, 404) or isinstance(refusal.__cause__, sdk.IdempotencyError):
                raise  # an error such as a wrong key is not about this purchase
            reason = f"Stripe refused: {refusal.code or refusal.status}"
            in_transaction(
                effects.engine,
                lambda conn: effects.store.ledger.fail_purchase(
                    conn,
                    purchase.user_id,
                    purchase=purchase.id,
                    reason=reason,  # noqa: B023 - called at once
                ),
            )
            raise
    raise AssertionError


def _create_session(effects: Effects, purchase: CreditTransaction, request: dict[str, Any]) -> Object:
    """Create the session at Stripe. The idempotency key names the customer: with another one the request differs."""
    parameters: Any = request
    once: Any = {"idempotency_key": f"{purchase.id} {request['customer']}"[:IDEMPOTENCY_KEY_MAX]}
    session: Object = ask(lambda: effects.client.v1.checkout.sessions.create(parameters, once)).to_dict()
    return session


def _with_another_customer(effects: Effects, purchase: CreditTransaction, request: dict[str, Any]) -> dict[str, Any]:
    """The stored request with a new customer; it changes once, even if several calls find the old customer gone."""
    gone = request["customer"]
    customer = make_customer(effects, purchase.user_id, after=gone)
    sold = stripe_checkouts.c

    def store(conn: sa.Connection) -> dict[str, Any]:
        new = sa.func.jsonb_set(sold.request, ["customer"], sa.func.to_jsonb(sa.cast(customer, sa.Text)))
        this = sold.purchase_id == purchase.id
        update = sa.update(stripe_checkouts).where(this, sold.request["customer"].astext == gone)
        run(conn, update.values(request=new), {})
        return run(conn, sa.select(sold.request).where(this), {}).scalar_one_or_none() or request

    return in_transaction(effects.engine, store)


def session_of_purchase(effects: Effects, purchase: CreditTransaction, customer: str) -> Object | None:
    """Search for the session of a purchase whose answer was lost: Stripe may have dropped the idempotency key."""
    since = int(purchase.created_at.timestamp()) - CLOCK_SKEW_MAX_S
    of_customer: Any = {"customer": customer, "created": {"gte": since}, "limit": PAGE}
    # for a customer that is gone
    of_that_day: Any = {
        "created": {"gte": since, "lte": since + 2 * CLOCK_SKEW_MAX_S + IDEMPOTENCY_KEY_KEPT_S},
        "limit": PAGE,
    }
    sessions = effects.client.v1.checkout.sessions
    page = ask_or_none(lambda: sessions.list(of_customer))
    candidates = list_all(lambda: page or sessions.list(of_that_day))
    session = next((one for one in map(sdk.StripeObject.to_dict, candidates) if names(one, purchase)), None)
    return None if session is None else effects.session_now(session["id"])


def names(stated: Object, purchase: CreditTransaction) -> bool:
    """True if the metadata of a session or payment intent names the purchase."""
    return bool((stated["metadata"] or {}).get(METADATA_KEY) == str(purchase.id))


def _store_session(effects: Effects, conn: sa.Connection, purchase: CreditTransaction, session: Object) -> Checkout:
    """Store the session, and its result if it is over already."""
    effects.session(session, failed=failure_of(session))(conn)
    now = effects.store.purchase(conn, id=purchase.id) or purchase
    return Checkout(now, session["id"], session["url"] if session["status"] == "open" else None)


# --- return addresses ---


def _require_allowed_origin(config: Config, address: str) -> str:
    if len(address) > ADDRESS_MAX:
        raise ReturnAddressRefused(
            f"the address {shown(address)} has {len(address)} characters; Stripe takes {ADDRESS_MAX}. Nothing was "
            "sold. Send the buyer to a shorter one",
            address=address,
        )
    try:
        parts = urlsplit(address)
    except ValueError:  # an address such as http://[::1
        parts = urlsplit("")
    origin = f"{parts.scheme}://{parts.netloc}".lower()
    if origin in config.checkout_origins and address.isprintable() and not any(c in " \\" for c in address):
        return address
    allowed = ", ".join(config.checkout_origins) or "none; set checkout_origins"
    raise ReturnAddressRefused(
        f"a buyer may not be sent to {shown(address)}. Allowed origins: {allowed}. Nothing was sold", address=address
    )


def _with_session_id(address: str) -> str:
    if SESSION_PLACEHOLDER in address:
        return address
    whole, mark, fragment = address.partition("#")
    return f"{whole}{'&' if '?' in whole else '?'}session_id={SESSION_PLACEHOLDER}{mark}{fragment}"
