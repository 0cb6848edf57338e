"""The hosted page, clicked through as a browser does it."""

from __future__ import annotations

import urllib.parse
import urllib.request
from typing import Any

import pytest
import stripe

from tallystick.dev.stripe import DevStripe

pytestmark = pytest.mark.one_server  # it is about the double, which has no database


class Stay(urllib.request.HTTPRedirectHandler):
    """The app behind success_url does not run here."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


browser = urllib.request.build_opener(Stay, urllib.request.HTTPErrorProcessor)


def visit(url: str | None, action: str | None = None) -> tuple[int, str, str | None]:
    """Return the status, the page and where a redirect leads to."""
    data = urllib.parse.urlencode({"action": action}).encode() if action else None
    try:
        with browser.open(str(url), data, timeout=30) as answer:
            return answer.status, answer.read().decode(), None
    except urllib.error.HTTPError as redirect:
        with redirect:
            return redirect.code, redirect.read().decode(), redirect.headers["Location"]


def test_the_page_shows_what_is_bought(session: stripe.checkout.Session) -> None:
    status, page, _ = visit(session.url)
    assert status == 200
    assert "50.00 USD" in page
    assert "2 &times; Single Flight" in page
    assert page.count("<button") == 4


@pytest.mark.parametrize(("currency", "shown"), [("jpy", "100 JPY"), ("kwd", "0.100 KWD"), ("eur", "1.00 EUR")])
def test_the_page_shows_money_with_the_decimals_of_its_currency(
    client: stripe.StripeClient, order: Any, currency: str, shown: str
) -> None:
    price = {"currency": currency, "unit_amount": 100, "product_data": {"name": "Sticker"}}
    made = client.v1.checkout.sessions.create({**order, "line_items": [{"price_data": price, "quantity": 1}]})
    assert f"<h1>{shown}</h1>" in visit(made.url)[1]


def test_pay(client: stripe.StripeClient, session: stripe.checkout.Session) -> None:
    status, _, target = visit(session.url, "pay")
    assert (status, target) == (303, f"http://127.0.0.1:1/done?session={session.id}")
    assert client.v1.checkout.sessions.retrieve(session.id).payment_status == "paid"
    assert "complete: paid" in visit(session.url)[1]


@pytest.mark.parametrize(("action", "payment_status"), [("succeed", "paid"), ("bounce", "unpaid")])
def test_pay_later(
    dev: DevStripe,
    client: stripe.StripeClient,
    session: stripe.checkout.Session,
    action: str,
    payment_status: str,
) -> None:
    _, _, target = visit(session.url, "pay_later")
    assert target == f"http://127.0.0.1:1/done?session={session.id}"
    assert visit(session.url)[1].count("<button") == 2
    visit(session.url, action)
    assert client.v1.checkout.sessions.retrieve(session.id).payment_status == payment_status
    assert "<button" not in visit(session.url)[1]


def test_fail(client: stripe.StripeClient, session: stripe.checkout.Session) -> None:
    status, page, _ = visit(session.url, "fail")
    assert status == 200
    assert "Your card was declined." in page
    assert client.v1.checkout.sessions.retrieve(session.id).status == "open"


def test_cancel(client: stripe.StripeClient, session: stripe.checkout.Session) -> None:
    assert visit(session.url, "cancel")[2] == "http://127.0.0.1:1/cancelled"
    assert client.v1.checkout.sessions.retrieve(session.id).status == "open"


def test_cancel_with_nowhere_to_go(client: stripe.StripeClient, order: Any) -> None:
    del order["cancel_url"]
    url = client.v1.checkout.sessions.create(order).url
    assert 'value="cancel"' not in visit(url)[1]


def test_names_are_escaped(client: stripe.StripeClient, order: Any, price: stripe.Price) -> None:
    client.v1.products.update(str(price.product), {"name": "<script>alert(1)</script>"})
    url = client.v1.checkout.sessions.create(order).url
    assert "<script>" not in visit(url)[1]


@pytest.mark.parametrize("action", ["pay", "steal"])
def test_a_button_that_is_not_there(client: stripe.StripeClient, session: stripe.checkout.Session, action: str) -> None:
    client.v1.checkout.sessions.expire(session.id)
    status, page, target = visit(session.url, action)
    assert (status, target) == (200, None)
    assert "role=alert" in page
    assert client.v1.checkout.sessions.retrieve(session.id).status == "expired"


def test_no_such_page(dev: DevStripe) -> None:
    assert visit(f"{dev.url}/c/pay/cs_none")[0] == 404
    assert visit(f"{dev.url}/elsewhere")[0] == 404
