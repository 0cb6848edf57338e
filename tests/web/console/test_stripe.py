"""Asking Stripe about what waits, against the double."""

from __future__ import annotations

import pytest

from stripe_sales.shop import CREDITS, Shop
from tallystick import events
from tallystick.dev.stripe import DevStripe
from tallystick.schema import INT32_MAX

pytestmark = pytest.mark.one_server  # it is about what is asked of Stripe


@pytest.fixture
def shop(world):
    with DevStripe(retry_delays_s=(), senders=1) as double:
        made = Shop(world, double)
        yield made
        made.engine.dispose()


@pytest.fixture
def visitor(shop, open_console):
    shop.world.config = shop.config
    return open_console(shop.world, allow_actions=True)


def ask(visitor, **fields):
    answer = visitor.submit("/pending/ask", **fields)
    assert answer.status_code == 303, answer.text
    return visitor.get(answer.headers["location"]).text


def test_about_one_purchase(shop, visitor):
    user = shop.world.user()
    bought = shop.checkout(user, key="1")
    page = visitor.get("/pending").text
    assert f'value="{bought.session}"' in page

    assert "Not paid yet" in ask(visitor, key=user, session=bought.session)
    assert shop.balance(user) == 0
    shop.dev.pay(bought.session)  # and no webhook comes
    assert "the credits are granted" in ask(visitor, key=user, session=bought.session)
    assert shop.balance(user) == CREDITS
    ask(visitor, key=user, session=bought.session)  # twice changes nothing
    assert shop.balance(user) == CREDITS


def test_about_a_purchase_that_the_ledger_refuses(shop, visitor):
    user = shop.world.user()
    bought = shop.checkout(user, key="1")
    with shop.world.engine.begin() as conn:
        shop.world.ledger.grant(conn, user, credits=INT32_MAX - 1, key="g", description="A present")
    assert "Refused by the ledger" not in visitor.get("/pending").text
    shop.dev.pay(bought.session)
    page = ask(visitor, key=user, session=bought.session)
    assert "Paid, and refused" in page
    assert "Not paid yet" not in page
    for shown in (page, visitor.get("/pending").text):
        assert "Refused by the ledger" in shown
        assert f"a change by {CREDITS} leaves the range of a balance" in shown
        assert bought.session in shown

    with shop.world.engine.begin() as conn:
        shop.world.ledger.consume(conn, user, credits=CREDITS, key="c")
    assert "the credits are granted" in ask(visitor, key=user, session=bought.session)


def test_about_all(shop, visitor):
    users = [shop.world.user() for _ in range(3)]
    for user in users[:2]:
        shop.dev.pay(shop.checkout(user, key="1").session)
    shop.checkout(users[2], key="1")
    page = ask(visitor)
    while "data-watch" in page:
        page = visitor.get("/pending").text
    assert "Stripe was asked" in page
    assert [shop.balance(user) for user in users] == [CREDITS, CREDITS, 0]


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        ("/pending/ask", {"event": "\0"}, 404),
        ("/pending/ask", {"session": "\0"}, 404),
        ("/pending/ask", {"session": "cs_1", "key": "\0"}, 404),
        ("/user/grant", {"credits": "1", "reason": "a\0"}, 422),
        ("/user/grant", {"credits": "1\0", "reason": "a"}, 422),
        ("/user/grant", {"credits": "1", "reason": "a", "once": "\0"}, 409),
        ("/user/grant", {"credits": "1", "reason": "a", "key": "\0"}, 404),
        ("/user/refund", {"credits": "1", "reason": "a", "purchase": "\0"}, 404),
    ],
)
def test_a_nul_in_a_form_is_refused(shop, visitor, path, fields, status):
    answer = visitor.submit(path, **({"key": shop.world.user(), "once": "1"} | fields))
    assert answer.status_code == status, answer.text


@pytest.mark.parametrize("name", ["q", "key", "before", "after", "outcome", "done", "purchase", "credits", "once"])
def test_a_nul_in_an_address_is_refused(shop, visitor, name):
    events.enable(shop.world.url, shop.config)
    user = shop.world.user(credits=1)
    pages = ("users", "user", "user/holds", "user/lots", "events", "pending", "audit", "migrations", "user/grant")
    for page in (*pages, *(f"{one}.{form}" for one in pages[:-1] for form in ("json", "csv")), "user/refund", "days"):
        answer = visitor.get(f"/{page}", params={"key": user, name: "\0"})
        assert answer.status_code < 500, (page, answer.text)


def test_another_users_session_is_no_way_to_credits(shop, visitor):
    owner, other = shop.world.user(), shop.world.user()
    bought = shop.checkout(owner, key="1")
    shop.dev.pay(bought.session)
    for session in (bought.session, "cs_test_none", "x"):
        assert visitor.submit("/pending/ask", key=other, session=session).status_code == 404
    assert shop.balance(owner) == shop.balance(other) == 0


def test_a_nul_in_a_form(shop, visitor):
    user = shop.world.user()
    for fields in ({"event": "\0"}, {"session": "\0", "key": user}, {"session": "cs_x", "key": "\0"}):
        assert visitor.submit("/pending/ask", **fields).status_code == 404, fields


def test_without_an_answer_it_says_so(shop, visitor):
    user = shop.world.user()
    bought = shop.checkout(user, key="1")
    shop.dev.__exit__(None, None, None)
    answer = visitor.submit("/pending/ask", key=user, session=bought.session)
    assert answer.status_code == 502
    assert "Stripe did not answer" in answer.text


def test_it_needs_leave_to_act_and_a_key(shop, open_console):
    asking = "Ask Stripe about all"
    assert asking not in open_console(shop.world, allow_actions=True).get("/pending").text
    shop.world.config = shop.config
    assert asking not in open_console(shop.world).get("/pending").text
    assert asking in open_console(shop.world, allow_actions=True).get("/pending").text


def test_a_delivery_that_failed_is_listed_with_its_reason_and_run_again(shop, visitor, open_console):
    user = shop.world.user()
    bought = shop.checkout(user)
    shop.dev.pay(bought.session)
    shop.deliver_all()
    shop.dev.refund(shop.intent(bought))
    shop.dev.fault("GET", "/v1/refunds", 500, times=3)
    shop.deliver(*shop.events("charge.refunded"))
    [event] = shop.events("charge.refunded")
    page = visitor.get("/pending").text
    assert "charge.refunded" in page
    assert "Stripe answered 500" in page
    assert f'name="event" value="{event}"' in page
    reader = open_console(shop.world).get("/pending").text
    assert "tallystick stripe reconcile" in reader
    assert "Run again" not in reader

    assert "The delivery had its effect now." in ask(visitor, event=event)
    assert shop.balance(user) == 0
    assert "Deliveries that failed" not in ask(visitor, event=event)  # twice changes nothing
