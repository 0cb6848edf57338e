"""The app of docs/flask.md: a paywall, a sale, and Stripe's delivery."""

from __future__ import annotations

import re
import runpy
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
from flask.testing import FlaskClient

import pages
from stripe_sales.shop import CREDITS, ORIGIN, PACK, PRICE, Shop
from tallystick import Pack, stripe
from tallystick.accounts import Accounts
from tallystick.errors import Key

pytestmark = pytest.mark.one_server  # it is about the page's code


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The names of each file that the page shows."""
    files = pages.files_of("flask.md")
    folder = pages.write(tmp_path_factory.mktemp("flask"), files)
    return {name: runpy.run_path(str(folder / name)) for name in files}


class Browser:
    """A user who is signed in."""

    def __init__(self, client: FlaskClient, user: Key) -> None:
        self.client = client
        with client.session_transaction(base_url=ORIGIN) as session:
            session["user"] = str(user)

    def get(self, path: str) -> tuple[int, str]:
        answer = self.client.get(path, base_url=ORIGIN)
        return answer.status_code, answer.text

    def post(self, path: str, **form: str) -> tuple[int, str]:
        """The status, and the address that it leads to."""
        answer = self.client.post(path, base_url=ORIGIN, data=form)
        return answer.status_code, answer.headers.get("Location", "")


@pytest.fixture
def app(page: dict[str, dict[str, Any]], shop: Shop) -> Any:
    return page["shop.py"]["create_app"](shop.config, shop.engine, "secret")


def test_a_user_buys_and_unlocks(app: Any, shop: Shop) -> None:
    user = shop.world.user()
    workshop = shop.world.workshop(user)
    browser, step = Browser(app.test_client(), user), f"/workshops/{workshop}/steps/7"

    status, paywall = browser.get(step)
    assert (status, "You have 0." in paywall) == (402, True)
    unlock = re.search(r'action="(.*?)"', paywall)
    assert unlock is not None
    assert browser.post(unlock[1]) == (303, "/packs")  # without a credit

    status, packs = browser.get("/packs")
    form, button = re.search(r'value="(\w+)"', packs), re.search(r'action="(.*?)"', packs)
    assert form is not None
    assert button is not None
    status, address = browser.post(button[1], form_id=form[1])
    assert status == 303
    assert browser.post(button[1], form_id=form[1]) == (303, address)  # the button was pressed twice
    session = address.rpartition("/")[2]
    assert browser.get(f"/done?session_id={session}")[1].startswith("Your payment is not complete")

    shop.dev.pay(session)
    assert browser.post(button[1], form_id=form[1]) == (303, f"/done?session_id={session}")  # after Stripe, back
    [event] = shop.events("checkout.session.completed")[:1]
    body, signature = shop.dev.signed(event, shop.endpoint)
    for _ in range(2):
        answer = app.test_client().post("/webhook", data=body, headers={"Stripe-Signature": signature})
        assert answer.status_code == 200
    assert app.test_client().post("/webhook", data=body).status_code == 400
    assert browser.get(f"/done?session_id={session}") == (200, "Thank you")

    for _ in range(2):
        assert browser.post(unlock[1]) == (303, step)
    assert browser.get(step) == (200, "<h1>Step 7</h1>")
    assert shop.balance(user) == CREDITS - 1


def test_each_button_buys_its_own_pack(page: dict[str, dict[str, Any]], shop: Shop) -> None:
    small = Pack(name="Small", credits=5, amount=100)
    made = stripe.setup(shop.configure(packs=(*shop.config.packs, small)))
    shop.configure(packs=(shop.config.packs[0], replace(small, stripe_price_id=made.packs[1].price)))
    app = page["shop.py"]["create_app"](shop.config, shop.engine, "secret")
    browser = Browser(app.test_client(), shop.world.user())
    packs = browser.get("/packs")[1]
    for id, button, amount in zip(*(re.findall(it, packs) for it in FORM), (PRICE, 100), strict=True):
        address = browser.post(button, form_id=id)[1]
        assert shop.api.checkout.sessions.retrieve(address.rpartition("/")[2]).amount_total == amount


FORM = r'value="(\w+)"', r'action="(.*?)"'


def test_refusals_have_their_status(app: Any, shop: Shop) -> None:
    user, other = shop.world.user(), shop.world.user(credits=3)
    workshop = shop.world.workshop(user)
    assert app.test_client().get(f"/workshops/{workshop}/steps/7").status_code == 401
    stranger = Browser(app.test_client(), other)
    assert stranger.get(f"/workshops/{workshop}/steps/7")[0] == 404
    assert stranger.post(f"/workshops/{workshop}/unlock")[0] == 404
    assert stranger.post("/packs/nothing", form_id="1")[0] == 404
    assert stranger.get("/done?session_id=cs_other")[0] == 404
    assert shop.balance(other) == 3


def test_what_a_client_causes_is_no_fault_of_the_server(app: Any, shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    user = shop.world.user(credits=3)
    workshop = shop.world.workshop(user)
    browser, step = Browser(app.test_client(), user), f"/workshops/{workshop}/steps/7"
    for text in ("x" * 5000, "\0"):
        assert browser.post(f"/packs/{PACK}", form_id=text)[0] == 422
    accounts = Accounts(shop.config)
    with shop.engine.begin() as conn:
        accounts.delete_workshop(conn, workshop)
    assert browser.get(step)[0] == 404  # not the paywall, which asks for a credit that cannot open it
    assert browser.post(f"/workshops/{workshop}/unlock")[0] == 404
    other = shop.world.workshop(user)
    with shop.engine.begin() as conn:
        accounts.delete_user(conn, user)
    for visitor in (browser, Browser(app.test_client(), uuid4())):
        assert visitor.post(f"/packs/{PACK}", form_id="1")[0] == 403
    assert browser.post(f"/workshops/{other}/unlock")[0] == 403
    assert shop.balance(user) == 3
    assert not caplog.records


def test_the_connection_of_psycopg(page: dict[str, dict[str, Any]], shop: Shop) -> None:
    user = shop.world.user(credits=3)
    workshop = shop.world.workshop(user)
    address = shop.world.url.replace("+psycopg", "")
    for _ in range(2):
        assert page["with_psycopg.py"]["spend"](shop.config, address, user, workshop) == 2


def test_the_pack_is_named_by_its_address(app: Any, shop: Shop) -> None:
    assert PACK.replace(" ", "%20") in Browser(app.test_client(), shop.world.user()).get("/packs")[1]
