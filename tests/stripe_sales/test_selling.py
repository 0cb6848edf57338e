"""Before anything is sold: packs, prices, addresses, customers, keys; and what ``stripe setup`` makes."""

from __future__ import annotations

import threading
import uuid
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
import stripe as sdk

from stripe_sales.shop import ADDRESSES, CREDITS, ORIGIN, PACK, PRICE, Shop
from tallystick import Config, Pack, stripe
from tallystick import errors as e
from tallystick.config import CheckoutOptions
from tallystick.declared_tables import stripe_checkouts
from tallystick.schema import INT32_MAX
from tallystick.stripe.client import _client

pytestmark = pytest.mark.one_server  # it is about what is asked of Stripe; test_machine runs on both


def nothing_sent(shop: Shop) -> bool:
    return not shop.api.checkout.sessions.list().data and shop.written()[0] == 0


def test_a_pack_is_sold(shop: Shop):
    user = shop.world.user()
    started = shop.checkout(user)
    [session] = shop.api.checkout.sessions.list({"expand": ["data.line_items"]}).data
    assert started.url == session.url
    assert session.client_reference_id == str(started.purchase.id)
    realm = session.metadata["tallystick_realm"]
    assert session.metadata.to_dict() == {"tallystick_purchase": str(started.purchase.id), "tallystick_realm": realm}
    assert len(realm) == 16
    assert session.success_url == f"{ORIGIN}/done?session_id={{CHECKOUT_SESSION_ID}}"
    assert [item.amount_total for item in session.line_items.data] == [PRICE]
    assert (started.purchase.amount, started.purchase.status) == (CREDITS, "pending")
    assert started.purchase.stripe_session_id == session.id


def test_the_same_key_is_the_same_purchase_and_another_key_another(shop: Shop):
    user = shop.world.user()
    first, again, other = (shop.checkout(user, key=key) for key in ("form 1", "form 1", "form 2"))
    assert (first.purchase.id, first.session, first.url) == (again.purchase.id, again.session, again.url)
    assert other.session != first.session


@pytest.mark.parametrize("wanted", [("Small", 1), (PACK, 2), ("nothing that is on sale", 1)])
@pytest.mark.parametrize("paid", [False, True])
def test_a_used_key_with_another_pack_or_quantity_is_refused(shop: Shop, wanted: tuple[str, int], paid: bool):
    small = Pack(name="Small", credits=5, amount=100)
    made = stripe.setup(shop.configure(packs=(*shop.config.packs, small)))
    shop.configure(packs=(shop.config.packs[0], replace(small, stripe_price_id=made.packs[1].price)))
    user = shop.world.user()
    first = shop.checkout(user, key="form 1")
    if paid:
        shop.dev.pay(first.session)
        shop.deliver_all()
    pack, quantity = wanted
    with pytest.raises(e.IdempotencyKeyReused, match=r"'form 1' was used before, for .*Use a new key") as refused:
        stripe.checkout(shop.engine, shop.config, user, pack, key="form 1", quantity=quantity, **ADDRESSES)
    assert refused.value.key == "form 1"
    assert refused.value.differs == ({"quantity": (1, 2)} if pack == PACK else {"pack": (PACK, pack)})
    assert shop.checkout(user, key="form 1").session == first.session


def test_two_tabs_with_one_key_and_two_packs_sell_one_of_them(shop: Shop):
    twin = replace(shop.config.packs[0], name="Twin")  # as many credits: the ledger sees no difference
    shop.configure(packs=(*shop.config.packs, twin))
    user = shop.world.user()
    sold: list[str] = []

    def buy(pack: str) -> None:
        with suppress(e.IdempotencyKeyReused):
            stripe.checkout(shop.engine, shop.config, user, pack, key="form 1", **ADDRESSES)
            sold.append(pack)

    tabs = [threading.Thread(target=buy, args=(pack,)) for pack in (PACK, "Twin") * 3]
    for tab in tabs:
        tab.start()
    for tab in tabs:
        tab.join()
    assert sold in ([PACK] * 3, ["Twin"] * 3)


def test_a_key_of_a_top_up_or_of_ones_own_sale_starts_no_checkout(shop: Shop):
    user = shop.world.user()
    start_sale(shop, user, key="order 7", credits=CREDITS)
    with pytest.raises(e.UnknownPurchase, match="not through checkout"):
        shop.checkout(user, key="order 7")
    with shop.engine.begin() as conn:
        conn.execute(sa.update(stripe_checkouts).values(request={"mode": "top_up", "customer": "cus_1"}, pack=PACK))
    with pytest.raises(e.UnknownPurchase, match="not through checkout"):
        shop.checkout(user, key="order 7")


def test_two_tabs_with_one_key_open_one_session(shop: Shop):
    user = shop.world.user()
    found: list[stripe.Checkout] = []
    tabs = [threading.Thread(target=lambda: found.append(shop.checkout(user, key="form 1"))) for _ in range(6)]
    for tab in tabs:
        tab.start()
    for tab in tabs:
        tab.join()
    assert len({(one.purchase.id, one.session) for one in found}) == 1
    assert len(found) == 6
    assert len(shop.api.checkout.sessions.list().data) == 1


def test_concurrent_first_purchases_make_one_customer(shop: Shop):
    user = shop.world.user()
    tabs = [threading.Thread(target=shop.checkout, args=(user,)) for _ in range(6)]
    for tab in tabs:
        tab.start()
    for tab in tabs:
        tab.join()
    [customer] = shop.api.customers.list().data
    assert customer.email == f"{user}@example.com"
    assert {session.customer for session in shop.api.checkout.sessions.list().data} == {customer.id}
    shop.checkout(user)
    assert len(shop.api.customers.list().data) == 1


def test_a_customer_whose_answer_was_lost_is_found_again(either_shop: Shop):
    shop = either_shop
    shop.dev.fault("POST", "/v1/customers", "cut", when="after")
    shop.dev.fault("POST", "/v1/customers", "cut", times=2)
    user = shop.world.user()
    with pytest.raises(e.StripeUnavailable):
        shop.checkout(user)
    shop.checkout(user)
    assert len(shop.api.customers.list().data) == 1


def test_a_user_without_an_email_buys_too(make_shop):
    shop = make_shop("alone")
    assert shop.checkout(shop.world.user()).url
    assert [customer.email for customer in shop.api.customers.list().data] == [None]


@pytest.mark.parametrize(
    ("settings", "options", "error", "payload"),
    [
        ({"stripe_secret_key": None}, {}, e.StripeNotConfigured, "STRIPE_SECRET_KEY"),
        ({"stripe_secret_key": "pk_test_1"}, {}, e.StripeNotConfigured, "no secret key"),
        ({"stripe_secret_key": "sk_test_other"}, {}, e.StripeRefused, "Check STRIPE_SECRET_KEY"),
        ({"packs": ()}, {}, e.UnknownPack, "none at all"),
        ({"packs": (Pack(name=PACK, credits=1),)}, {}, e.StripeNotConfigured, "tallystick stripe setup"),
        ({}, {"success_url": "https://evil.example/done"}, e.ReturnAddressRefused, ORIGIN),
        ({}, {"cancel_url": "javascript:alert(1)"}, e.ReturnAddressRefused, ORIGIN),
        ({}, {"cancel_url": f"{ORIGIN}@evil.example/"}, e.ReturnAddressRefused, ORIGIN),
        ({}, {"cancel_url": f"{ORIGIN}.evil.example/"}, e.ReturnAddressRefused, ORIGIN),
        ({}, {"cancel_url": "http://[::1/"}, e.ReturnAddressRefused, ORIGIN),
        ({}, {"success_url": f"{ORIGIN}/{'x' * 5000}"}, e.ReturnAddressRefused, "Stripe takes 5000"),
        ({}, {"cancel_url": f"{ORIGIN}/{'x' * 5000}"}, e.ReturnAddressRefused, "Stripe takes 5000"),
        ({"checkout_origins": ()}, {}, e.ReturnAddressRefused, "checkout_origins"),
        *(({}, {"key": key}, e.InvalidArgument, "key=") for key in ("", "a\0", "\ud800", "k" * 256)),
        ({}, {"success_url": f"{ORIGIN}/\0"}, e.ReturnAddressRefused, "may not be sent"),
        ({}, {"cancel_url": f"{ORIGIN}/#\x7f"}, e.ReturnAddressRefused, "may not be sent"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sold(shop: Shop, settings, options, error, payload):
    user = shop.world.user()
    config = shop.config.model_copy(update=settings)
    with pytest.raises(error, match=payload):
        stripe.checkout(shop.engine, config, user, PACK, **(ADDRESSES | options))
    assert nothing_sent(shop)


@pytest.mark.parametrize("text", ["\0", "evt_\0", "\ud800", "", "e" * 256])
def test_a_text_that_postgresql_cannot_store_is_no_id_and_no_key(shop: Shop, text: str):
    with pytest.raises(e.InvalidArgument, match="events="):
        stripe.redeliver(shop.engine, shop.config, ["evt_1", text])
    with pytest.raises(e.InvalidArgument, match="objects="):
        stripe.dismiss(shop.engine, shop.config, text)
    with pytest.raises(e.InvalidArgument, match="key="):
        stripe.refund(shop.engine, shop.config, uuid.uuid4(), key=f"{text}\0")
    with pytest.raises(e.InvalidArgument):
        start_sale(shop, shop.world.user(), key=text)


def test_a_text_beside_the_button_has_no_nul():
    with pytest.raises(ValueError, match="submit_text"):
        CheckoutOptions(submit_text="a\nb\0")
    assert CheckoutOptions(submit_text="a\nb\n").submit_text == "a\nb\n"


def test_the_longest_address_that_stripe_takes_is_taken(shop: Shop):
    added = "?session_id={CHECKOUT_SESSION_ID}"
    longest = f"{ORIGIN}/".ljust(5000 - len(added), "x")
    started = shop.checkout(shop.world.user(), success_url=longest)
    assert shop.api.checkout.sessions.retrieve(started.session).success_url == longest + added
    with pytest.raises(e.ReturnAddressRefused, match="5001 characters"):
        shop.checkout(shop.world.user(), success_url=longest + "x")


def test_a_pack_that_the_balance_cannot_hold_is_not_sold(shop: Shop):
    user = shop.world.user(credits=INT32_MAX - CREDITS + 1)
    with pytest.raises(e.BalanceOutOfRange, match="none is above 2147483647") as refused:
        shop.checkout(user)
    assert (refused.value.balance, refused.value.amount) == (INT32_MAX - CREDITS + 1, CREDITS)
    assert shop.api.checkout.sessions.list().data == []
    assert shop.rows(user) == [("purchase", INT32_MAX - CREDITS + 1)]
    with shop.engine.begin() as conn:
        shop.world.ledger.consume(conn, user, key="room")
    shop.dev.pay(shop.checkout(user).session)
    shop.deliver_all()
    assert shop.balance(user) == INT32_MAX


@pytest.mark.parametrize("deleted", [True, False])
def test_nothing_is_sold_to_who_is_not_there(shop: Shop, deleted):
    user = shop.world.user() if deleted else shop.world.key("uuid")
    if deleted:
        with shop.engine.begin() as conn:
            shop.world.accounts.delete_user(conn, user)
    with pytest.raises(e.UserDeleted if deleted else e.UnknownUser):
        shop.checkout(user)
    assert nothing_sent(shop)
    assert shop.api.customers.list().data == []


def price(shop: Shop, **changes: Any) -> str:
    product = shop.api.products.create({"name": "Another"}).id
    given = {"product": product, "currency": "usd", "unit_amount": PRICE} | changes
    return shop.api.prices.create(given).id


@pytest.mark.parametrize(
    ("changes", "payload"),
    [
        ({"unit_amount": 7900}, "Stripe would charge 7900 usd, the pack says 1000 usd"),
        ({"currency": "eur"}, "1000 eur"),
        ({"active": False}, "not active"),
        (None, "has no price price_nowhere"),
    ],
)
def test_a_price_that_is_not_the_packs(shop: Shop, changes, payload):
    there = "price_nowhere" if changes is None else price(shop, **changes)
    shop.configure(packs=(Pack(name=PACK, credits=CREDITS, amount=PRICE, stripe_price_id=there),))
    with pytest.raises(e.PackMismatch, match=payload):
        shop.checkout(shop.world.user())
    assert nothing_sent(shop)
    [checked] = stripe.check(shop.config)
    assert payload in (checked.problem or "")
    with pytest.raises(e.PackMismatch):
        stripe.setup(shop.config)


def test_a_product_that_was_taken_off_sale(shop: Shop):
    [product] = shop.api.products.list().data
    shop.api.products.update(product.id, {"active": False})
    with pytest.raises(e.PackMismatch, match="not active"):
        shop.checkout(shop.world.user())


def test_a_refusal_fails_the_purchase_and_says_why(either_shop: Shop):
    shop = either_shop
    user = shop.world.user()
    price = shop.config.packs[0].stripe_price_id
    shop.dev.fault("POST", "/v1/checkout/sessions", 400)
    with pytest.raises(e.StripeRefused, match="400"):
        shop.checkout(user)
    with shop.engine.begin() as conn:
        [row] = shop.world.ledger.history(conn, user, include_failed=True)
    assert row.description == f"Purchased {PACK} pack (failed: Stripe refused: 400)"
    assert row.stripe_price_id == price


# --- options of a checkout ---


def test_several_packs_are_one_purchase(shop: Shop):
    user = shop.world.user()
    started = shop.checkout(user, quantity=3)
    assert (started.purchase.amount, started.purchase.description) == (3 * CREDITS, f"Purchased 3 {PACK} packs")
    shop.dev.pay(started.session)
    shop.deliver_all()
    assert (shop.balance(user), shop.purchase(started).amount_paid, shop.findings()) == (3 * CREDITS, 3 * PRICE, [])
    shop.dev.refund(shop.intent(started), amount=PRICE)
    shop.deliver_all()
    assert shop.balance(user) == 2 * CREDITS


@pytest.mark.parametrize("quantity", [0, -1, 1000, True, 1.5, "2"])
def test_a_quantity_that_is_none(shop: Shop, quantity):
    with pytest.raises(e.InvalidArgument, match="from 1 to 999"):
        shop.checkout(shop.world.user(), quantity=quantity)
    assert nothing_sent(shop)


@pytest.mark.parametrize("where", ["settings", "call"])
def test_options_are_asked_of_stripe_and_repeated_with_the_request(shop: Shop, where: str):
    options = CheckoutOptions(promotion_codes=True, locale="de", submit_text="Credits never expire.")
    if where == "settings":
        shop.configure(checkout_options=options)
    given = {"options": options} if where == "call" else {}
    user = shop.world.user()
    shop.dev.fault("POST", "/v1/checkout/sessions", "cut", when="after")
    shop.dev.fault("POST", "/v1/checkout/sessions", "cut", times=2)
    with pytest.raises(e.StripeUnavailable):
        shop.checkout(user, key="form 1", **given)
    shop.configure(checkout_options=CheckoutOptions())
    started = shop.checkout(user, key="form 1")
    [session] = shop.api.checkout.sessions.list().data
    assert (session.id, session.allow_promotion_codes, session.locale) == (started.session, True, "de")
    assert session.custom_text.submit.message == "Credits never expire."


@pytest.mark.parametrize("discount", [250, PRICE])
def test_a_promotion_code_that_was_allowed_is_no_finding(shop: Shop, discount: int):
    user = shop.world.user()
    started = shop.checkout(user, options=CheckoutOptions(promotion_codes=True))
    shop.dev.pay(started.session, discount=discount)
    shop.deliver_all()
    assert (shop.balance(user), shop.findings()) == (CREDITS, [])
    assert shop.purchase(started).amount_paid == PRICE - discount
    if discount < PRICE:
        shop.dev.refund(shop.intent(started))  # what was paid takes all of the credits
        shop.deliver_all()
        assert shop.balance(user) == 0


@pytest.mark.parametrize("inclusive", [True, False])
def test_tax_that_was_asked_for_is_no_finding(shop: Shop, inclusive: bool):
    product = shop.api.products.list().data[0].id
    with_tax = {"product": product, "currency": "usd", "unit_amount": PRICE}
    there = shop.api.prices.create({**with_tax, "tax_behavior": "inclusive" if inclusive else "exclusive"}).id
    shop.configure(packs=(Pack(name=PACK, credits=CREDITS, amount=PRICE, stripe_price_id=there),))
    user = shop.world.user()
    options = CheckoutOptions(automatic_tax=True, invoice=True, tax_ids=True)
    started = shop.checkout(user, options=options)
    session = shop.api.checkout.sessions.retrieve(started.session)
    asked = (session.automatic_tax.enabled, session.invoice_creation.enabled, session.tax_id_collection.enabled)
    assert asked == (True, True, True)
    shop.dev.pay(started.session, tax=190)
    shop.deliver_all()
    paid = PRICE if inclusive else PRICE + 190
    assert (shop.balance(user), shop.purchase(started).amount_paid, shop.findings()) == (CREDITS, paid, [])
    shop.dev.refund(shop.intent(started), amount=190)  # the tax, as a share of all that was paid
    shop.deliver_all()
    assert shop.balance(user) == CREDITS - CREDITS * 190 // paid
    shop.dev.refund(shop.intent(started))
    shop.deliver_all()
    assert shop.balance(user) == 0


def test_tax_that_nobody_asked_for_is_a_finding(shop: Shop):
    user = shop.world.user()
    started = shop.checkout(user)
    payload = shop.dev.account.objects["checkout.session"][started.session]
    payload["automatic_tax"]["enabled"] = True  # a default of the account
    shop.dev.pay(started.session, tax=190)
    shop.deliver_all()
    assert (shop.balance(user), shop.findings()) == (CREDITS, ["amount_differs"])


def test_a_discount_and_a_tax_and_a_quantity_together(shop: Shop):
    user = shop.world.user()
    options = CheckoutOptions(promotion_codes=True, automatic_tax=True, quantity_max=5)
    started = shop.checkout(user, options=options)
    shop.dev.pay(started.session, discount=500, tax=250, quantity=3)
    shop.deliver_all()
    assert (shop.balance(user), shop.purchase(started).amount_paid) == (3 * CREDITS, 3 * PRICE - 250)
    assert shop.findings() == []


@pytest.mark.parametrize("started_with", [1, 2])
@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_the_number_that_the_buyer_chose_is_granted_from_the_row(shop: Shop, started_with: int, chosen: int):
    user = shop.world.user()
    started = shop.checkout(user, quantity=started_with, options=CheckoutOptions(quantity_max=4), key="form 1")
    assert started.purchase.amount == started_with * CREDITS
    shop.configure(packs=())  # what was on sale counts, not what is
    shop.dev.pay(started.session, quantity=chosen)
    assert "granted" in shop.outcomes("checkout.session.completed")
    purchase = shop.purchase(started)
    assert (purchase.amount, purchase.amount_paid, shop.findings()) == (chosen * CREDITS, chosen * PRICE, [])
    assert shop.rows(user) == [("purchase", chosen * CREDITS)]
    assert shop.checkout(user, key="form 1", quantity=started_with).purchase.id == purchase.id
    assert not stripe.reconcile(shop.engine, shop.config).changed
    shop.dev.refund(shop.intent(started), amount=PRICE)  # of one of them
    shop.deliver_all()
    assert shop.balance(user) == (chosen - 1) * CREDITS


def test_a_chosen_number_is_found_by_metadata_alone(shop: Shop):
    user = shop.world.user()
    shop.dev.fault("POST", "/v1/checkout/sessions", "cut", when="after")
    shop.dev.fault("POST", "/v1/checkout/sessions", "cut", times=2)
    with pytest.raises(e.StripeUnavailable):
        shop.checkout(user, key="form 1", options=CheckoutOptions(quantity_max=3))
    [session] = shop.api.checkout.sessions.list().data
    shop.dev.pay(session.id, quantity=3)
    assert "granted" in shop.outcomes("checkout.session.completed")
    assert (shop.balance(user), shop.findings()) == (3 * CREDITS, [])


def test_a_price_that_is_no_number_of_packs_grants_what_was_started(shop: Shop):
    user = shop.world.user()
    started = shop.checkout(user, options=CheckoutOptions(quantity_max=3))
    session = shop.dev.account.objects["checkout.session"][started.session]
    session["amount_subtotal"] = PRICE + 1
    shop.dev.pay(started.session)
    shop.deliver_all()
    assert (shop.balance(user), shop.findings()) == (CREDITS, ["amount_differs"])


def test_a_buyer_can_choose_no_more_than_the_balance_holds(shop: Shop):
    user = shop.world.user(credits=INT32_MAX - 2 * CREDITS)
    started = shop.checkout(user, options=CheckoutOptions(quantity_max=9))
    with pytest.raises(e.DevStripeError):
        shop.dev.pay(started.session, quantity=3)
    shop.dev.pay(started.session, quantity=2)
    shop.deliver_all()
    assert shop.balance(user) == INT32_MAX
    with pytest.raises(e.InvalidArgument, match="from 1 to 2"):
        shop.checkout(shop.world.user(), quantity=3, options=CheckoutOptions(quantity_max=2))


# --- a session of the host's own ---


def own_session(shop: Shop, sale: stripe.Sale, *, amount: int = 900, **more: Any) -> str:
    price = {"currency": "usd", "unit_amount": amount, "product_data": {"name": "Ten credits"}}
    return shop.api.checkout.sessions.create(
        {
            "mode": "payment",
            "line_items": [{"price_data": price, "quantity": 1}],
            "success_url": f"{ORIGIN}/",
            "metadata": dict(sale.metadata),
            **more,
        },
        {"idempotency_key": str(sale.purchase.id)},
    ).id


def start_sale(shop: Shop, user: e.Key, **more: Any) -> stripe.Sale:
    terms = {"credits": 10, "amount": 900, "currency": "usd", "description": "Ten credits"}
    return stripe.start_sale(shop.engine, shop.config, user, **(terms | more))


@pytest.mark.parametrize("stored", [True, False])
def test_a_session_of_ones_own_is_granted_compared_and_refunded(shop: Shop, stored: bool):
    user = shop.world.user()
    sale = start_sale(shop, user, key="order 7", refund_rounding="up")
    assert start_sale(shop, user, key="order 7").purchase.id == sale.purchase.id
    session = own_session(shop, sale)
    if stored:
        with shop.engine.begin() as conn:
            shop.world.ledger.attach_session(conn, user, sale.purchase.id, stripe_session_id=session)
    shop.dev.pay(session, discount=100)
    shop.deliver_all()
    assert (shop.balance(user), shop.findings()) == (10, ["amount_differs"])
    intent = shop.api.checkout.sessions.retrieve(session).payment_intent
    shop.dev.refund(str(intent), amount=1)
    shop.deliver_all()
    assert shop.balance(user) == 9  # "up", as the sale says


@pytest.mark.parametrize("other", [{"amount": 800}, {"currency": "eur"}])
def test_a_used_key_of_a_sale_with_other_terms_is_refused(shop: Shop, other: dict[str, Any]):
    user = shop.world.user()
    start_sale(shop, user, key="order 7")
    with pytest.raises(e.IdempotencyKeyReused, match="'order 7' was used before") as refused:
        start_sale(shop, user, key="order 7", **other)
    assert set(refused.value.differs) == set(other)
    shop.checkout(user, key="form 1")
    with pytest.raises(e.IdempotencyKeyReused, match=PACK):
        start_sale(shop, user, key="form 1", credits=CREDITS, amount=PRICE)


@pytest.mark.parametrize("path", ["webhook", "success page", "reconcile"])
def test_a_session_of_ones_own_at_another_price_grants_nothing(shop: Shop, path: str):
    user = shop.world.user()
    session = own_session(shop, start_sale(shop, user), amount=50)
    shop.dev.pay(session)
    if path == "success page":
        with pytest.raises(e.SessionNotYours):
            stripe.confirm(shop.engine, shop.config, user, session)
    elif path == "webhook":
        shop.deliver_all()
    assert [one.kind for one in stripe.reconcile(shop.engine, shop.config).findings] == ["unproven_session"]
    assert shop.balance(user) == 0


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"amount": -1}, e.InvalidArgument),
        ({"amount": 1.5}, e.InvalidArgument),
        ({"currency": "USD"}, e.InvalidArgument),
        ({"credits": 0}, e.InvalidArgument),
        ({"credits": INT32_MAX + 1}, e.InvalidArgument),
        ({"credits": "10"}, e.InvalidArgument),
        ({"description": ""}, e.InvalidArgument),
    ],
)
def test_a_sale_that_makes_no_sense_is_not_started(shop: Shop, wrong: dict[str, object], error: type[Exception]):
    with pytest.raises(error):
        start_sale(shop, shop.world.user(), **wrong)
    assert nothing_sent(shop)


def test_a_sale_that_the_balance_cannot_hold_is_not_started(shop: Shop):
    user = shop.world.user(credits=INT32_MAX - 9)
    with pytest.raises(e.BalanceOutOfRange):
        start_sale(shop, user)
    assert shop.written()[0] == 1


@pytest.mark.parametrize("name", ["discounts", "mode", "metadata", "shipping_options", "payment_intent_data"])
def test_an_option_that_makes_no_sense_for_credits_is_refused_by_name(tmp_path, name: str):
    file = tmp_path / "tallystick.toml"
    file.write_text(f"[checkout_options]\n{name} = true\n", encoding="utf-8")
    with pytest.raises(e.ConfigError, match=f"{name} makes no sense for credits"):
        Config.load(file, environ={})


# --- customers that the shop deleted, and e-mails ---


def customer(shop: Shop, user: e.Key) -> str | None:
    with shop.engine.begin() as conn:
        return shop.world.accounts.get(conn, user).stripe_customer_id


def set_customer(shop: Shop, user: e.Key, id: str | None) -> None:
    users = shop.world.schema.users
    with shop.engine.begin() as conn:
        conn.execute(users.update().where(users.c.key == user).values(stripe_customer_id=id))


def gone_customer(shop: Shop, user: e.Key, how: str) -> str:
    """The user's customer is gone at Stripe."""
    if how == "of another account":
        set_customer(shop, user, "cus_elsewhere")
        return "cus_elsewhere"
    shop.checkout(user)
    gone = customer(shop, user)
    shop.api.customers.delete(gone)
    if how == "deleted, and the column cleared":
        set_customer(shop, user, None)
    return str(gone)


GONE = ["deleted", "deleted, and the column cleared", "of another account"]


@pytest.mark.parametrize("how", GONE)
def test_a_customer_that_is_gone_is_replaced(shop: Shop, how: str):
    user = shop.world.user()
    gone = gone_customer(shop, user, how)
    started = shop.checkout(user)
    [there] = shop.api.customers.list().data
    assert there.id not in (gone, None)
    assert shop.api.checkout.sessions.retrieve(started.session).customer == there.id == customer(shop, user)
    with shop.engine.begin() as conn:
        rows = shop.world.ledger.history(conn, user, include_failed=True)
    assert {str(row.status) for row in rows} == {"pending"}
    shop.dev.pay(started.session)
    assert "granted" in shop.outcomes("checkout.session.completed")
    assert shop.findings() == []  # customer_differs would be one


@pytest.mark.parametrize("how", GONE)
def test_concurrent_checkouts_replace_a_customer_once(shop: Shop, how: str):
    user = shop.world.user()
    gone_customer(shop, user, how)
    before = {one.id for one in shop.api.checkout.sessions.list({"limit": 100}).data}
    made: list[stripe.Checkout] = []
    tabs = [threading.Thread(target=lambda: made.append(shop.checkout(user, key="form 1"))) for _ in range(3)]
    tabs += [threading.Thread(target=lambda: made.append(shop.checkout(user))) for _ in range(3)]
    for tab in tabs:
        tab.start()
    for tab in tabs:
        tab.join()
    assert len(made) == 6
    [there] = shop.api.customers.list().data
    assert customer(shop, user) == there.id
    new = [one for one in shop.api.checkout.sessions.list({"limit": 100}).data if one.id not in before]
    assert ({one.customer for one in new}, len(new)) == ({there.id}, 4)


def test_a_customer_that_goes_between_two_tries_of_one_purchase(shop: Shop):
    user = shop.world.user()
    shop.dev.fault("POST", "/v1/checkout/sessions", 503, times=3)
    with pytest.raises(e.StripeUnavailable):
        shop.checkout(user, key="form 1")
    shop.api.customers.delete(customer(shop, user))
    started = shop.checkout(user, key="form 1")
    assert shop.api.checkout.sessions.retrieve(started.session).customer == customer(shop, user)
    assert shop.checkout(user, key="form 1").session == started.session
    with shop.engine.begin() as conn:
        assert len(shop.world.ledger.history(conn, user, include_failed=True)) == 1


def test_a_session_whose_answer_was_lost_is_found_though_its_customer_is_gone(shop: Shop):
    user = shop.world.user()
    shop.dev.fault("POST", "/v1/checkout/sessions", "cut", when="after")
    shop.dev.fault("POST", "/v1/checkout/sessions", "cut", times=2)
    with pytest.raises(e.StripeUnavailable):
        shop.checkout(user, key="form 1")
    [session] = shop.api.checkout.sessions.list().data
    shop.api.customers.delete(customer(shop, user))
    assert shop.checkout(user, key="form 1").session == session.id


def test_customers_deleted_again_and_again_within_a_day(either_shop: Shop):
    shop = either_shop
    user = shop.world.user()
    for _ in range(3):
        shop.checkout(user)
        shop.api.customers.delete(customer(shop, user))
    set_customer(shop, user, None)  # from here three idempotency keys answer with deleted customers
    assert shop.checkout(user).url
    assert [one.id for one in shop.api.customers.list().data] == [customer(shop, user)]


def set_email(shop: Shop, user: e.Key, email: str | None) -> None:
    users = shop.world.schema.users
    with shop.engine.begin() as conn:
        conn.execute(users.update().where(users.c.key == user).values(email=email))


@pytest.mark.parametrize("email", ["nobody", "a b@example.com", "x" * 600, ""])
def test_an_email_that_stripe_refuses_is_left_out(shop: Shop, email: str):
    user = shop.world.user()
    set_email(shop, user, email)
    for _ in range(2):
        assert shop.checkout(user).url
    [there] = shop.api.customers.list().data
    assert (there.id, there.email) == (customer(shop, user), None)
    set_email(shop, user, "ada@example.com")
    shop.checkout(user)
    assert [one.email for one in shop.api.customers.list().data] == ["ada@example.com"]


def test_an_email_that_changed_in_the_host_is_brought_to_stripe(shop: Shop):
    user = shop.world.user()
    shop.checkout(user)
    id = customer(shop, user)
    set_email(shop, user, "married@example.com")
    shop.checkout(user)
    assert shop.api.customers.retrieve(id).email == "married@example.com"
    set_email(shop, user, "not an address")
    assert shop.checkout(user).url
    shop.api.customers.update(id, {"email": "accounts@example.com"})  # by an operator: it stays
    shop.checkout(user)
    assert shop.api.customers.retrieve(id).email == "accounts@example.com"


def test_a_customer_of_the_hosts_own_keeps_its_email(shop: Shop):
    user = shop.world.user()
    id = shop.api.customers.create({"email": "billing@example.com"}).id
    set_customer(shop, user, id)
    shop.checkout(user)
    assert (shop.api.customers.retrieve(id).email, customer(shop, user)) == ("billing@example.com", id)


def test_check_finds_nothing_where_all_is_well(shop: Shop):
    assert [(one.pack, one.problem) for one in stripe.check(shop.config)] == [(PACK, None)]


def test_setup_makes_what_is_missing_and_nothing_twice(shop: Shop):
    packs = (Pack(name="Größe L", credits=3, amount=300, currency="eur"), Pack(name="Grösse L", credits=3, amount=300))
    config = shop.configure(packs=packs)
    url = "http://127.0.0.1:2/hook"
    first, again = (stripe.setup(config, endpoint_url=url) for _ in range(2))
    assert [one.made for one in first.packs] == [True, True]
    assert [one.made for one in again.packs] == [False, False]
    assert [one.price for one in first.packs] == [one.price for one in again.packs]
    assert len({one.price for one in first.packs}) == 2
    assert first.endpoint is not None
    assert again.endpoint is not None
    assert (first.endpoint.made, again.endpoint.made, first.endpoint.id) == (True, False, again.endpoint.id)
    assert (first.endpoint.secret or "").startswith("whsec_")
    assert again.endpoint.secret is None
    assert shop.api.webhook_endpoints.retrieve(first.endpoint.id).api_version == stripe.API_VERSION
    assert "whsec_" not in repr(shop.config)


def test_setup_subscribes_to_what_is_missing_and_names_what_is_outdated(shop: Shop):
    url = "http://127.0.0.1:2/hook"
    wanted = {"url": url, "enabled_events": ["charge.refunded", "customer.created"]}
    old = shop.api.webhook_endpoints.create({**wanted, "api_version": "2024-06-20"})
    here = shop.api.webhook_endpoints.create({**wanted, "api_version": stripe.API_VERSION})
    made = stripe.setup(shop.config, endpoint_url=url).endpoint
    assert made is not None
    assert (made.id, made.made, made.changed, made.outdated) == (here.id, False, True, (old.id,))
    events = shop.api.webhook_endpoints.retrieve(here.id).enabled_events
    assert {*stripe.webhooks.HANDLERS, "customer.created"} == {*events}


@pytest.mark.parametrize("url", ["app.example.com/hook", "ftp://app.example.com/", "http://app.example.com/hook"])
def test_setup_refuses_an_address_that_stripe_cannot_use(url):
    config = Config(stripe_secret_key="sk_live_1")
    with pytest.raises(e.StripeNotConfigured):
        stripe.setup(config, endpoint_url=url)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_hosts_own_use_of_the_sdk_is_left_as_it_is(shop: Shop, monkeypatch, tmp_path, wanted: bool):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))  # where the SDK keeps a file of its own
    monkeypatch.setattr(sdk, "enable_telemetry", wanted)
    settings = {name: getattr(sdk, name) for name in sorted(vars(sdk)) if not callable(getattr(sdk, name))}
    _client.cache_clear()
    shop.checkout(shop.world.user())
    stripe.reconcile(shop.engine, shop.config)
    assert {name: getattr(sdk, name) for name in settings} == settings
