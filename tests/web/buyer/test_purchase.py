"""Buying, with the real SDK against the Stripe double."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from typing import Any

import anyio.to_thread
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sites import HTML, HTMX, Shop
from tallystick.dev.stripe import DevStripe
from tallystick.schema import INT32_MAX
from tallystick.stripe.client import client
from worlds import World

pytestmark = pytest.mark.one_server  # it is about requests and answers


def test_bought_and_back(shop: Shop) -> None:
    user = shop.world.user()
    workshop = shop.world.workshop(user, title="Pricing")
    session = shop.start(user, return_to="/workshops/1/steps/7", workshop=str(workshop))
    where = {"return_to": "/workshops/1/steps/7", "workshop": str(workshop)}
    stripe_has = client(shop.world.config).v1.checkout.sessions.retrieve(session)
    assert "return_to=%2Fworkshops%2F1%2Fsteps%2F7" in str(stripe_has.success_url)

    assert "on its way" in shop.return_from_stripe(user, session, **where).text
    assert shop.balance(user) == 0

    shop.double.pay(session)
    page = shop.return_from_stripe(user, session, **where).text
    assert "3 credits added. You have 3." in page
    assert "Use 1 credit to unlock Pricing" in page
    assert "Back to Pricing" in page
    assert 'href="/workshops/1/steps/7"' in page
    assert "3 credits added" in shop.return_from_stripe(user, session, **where).text
    assert shop.balance(user) == 3


@pytest.mark.parametrize(
    "path", ["/" + "%" * 1999, "/" + "%F0%9F%98%80" * 166, "/workshops/" + "x" * 1900, "/?a=" + "&" * 1990]
)
@pytest.mark.parametrize("way", ["form", "json"])
def test_the_longest_return_address_still_sells(shop: Shop, path: str, way: str) -> None:
    user = shop.world.user()
    workshop = str(shop.world.workshop(user))
    if way == "form":
        session = shop.start(user, return_to=path, workshop=workshop)
    else:
        wanted = {"pack": "Flight Crew", "return_to": path, "workshop": workshop}
        session = shop.post(user, "/billing/api/checkout", json=wanted).json()["session"]
    address = str(client(shop.world.config).v1.checkout.sessions.retrieve(session).success_url)
    assert len(address) <= 5000
    kept = path.startswith("/workshops/")  # one that gets too long when it is encoded leads home instead
    assert ("return_to=%2Fworkshops%2Fxxx" in address) is kept


def test_a_double_click_buys_once(shop: Shop) -> None:
    user = shop.world.user()
    sessions: list[str] = []

    def click() -> None:
        sessions.append(shop.start(user, key="made-with-the-form"))

    threads = [threading.Thread(target=click) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sessions) == 4
    assert len(set(sessions)) == 1
    rows = shop.get(user, "/billing/api/history").json()["rows"]
    assert [row["status"] for row in rows] == ["pending"]

    shop.double.pay(sessions[0])
    over = shop.post(user, "/billing/checkout", data={"pack": "Flight Crew", "key": "made-with-the-form"}, headers=HTML)
    assert over.headers["location"].startswith("/billing/success?session_id=cs_")
    assert shop.balance(user) == 3


def test_a_buyer_who_presses_a_button_of_a_paid_form_is_led_on_to_the_workshop(shop: Shop) -> None:
    user = shop.world.user()
    workshop = shop.world.workshop(user, title="Pricing")
    form = {"pack": "Flight Crew", "key": "k", "workshop": str(workshop), "return_to": "/here"}
    shop.double.pay(shop.start(user, **form))
    over = shop.post(user, "/billing/checkout", data=form, headers=HTML)
    page = shop.get(user, over.headers["location"], headers=HTML).text
    assert "Use 1 credit to unlock Pricing" in page
    assert 'href="/here"' in page


ELSEWHERE = "postgresql+psycopg://nobody:wrong@192.0.2.1:9/nowhere?connect_timeout=1"


@pytest.mark.parametrize("by", ["connect_args", "creator", "hook"])
def test_selling_takes_all_of_an_async_engine(
    make_world: Callable[..., World], make_shop: Callable[[str, AsyncEngine], Shop], by: str
) -> None:
    """The address leads nowhere: only what the host gave its engine besides can reach the database."""
    url = make_world().url
    real = psycopg.conninfo.conninfo_to_dict(url.replace("+psycopg", "", 1)) | {"application_name": "the-host"}
    match by:
        case "connect_args":  # as with sslmode=verify-full, a CA, options
            engine = create_async_engine(ELSEWHERE, poolclass=sa.NullPool, connect_args=real)
        case "creator":

            async def connect() -> psycopg.AsyncConnection[Any]:
                return await psycopg.AsyncConnection.connect(**real)

            engine = create_async_engine(ELSEWHERE, poolclass=sa.NullPool, async_creator=connect)
        case "hook":  # as with a token for a password
            engine = create_async_engine(ELSEWHERE, poolclass=sa.NullPool)

            @sa.event.listens_for(engine.sync_engine, "do_connect")
            def token(dialect: Any, record: Any, cargs: Any, cparams: dict[str, Any]) -> None:
                cparams.clear()
                cparams.update(real)

    names: list[str] = []

    @sa.event.listens_for(engine.sync_engine, "begin")
    def begun(conn: sa.Connection) -> None:
        names.append(str(conn.scalar(sa.text("SELECT current_setting('application_name')"))))

    shop = make_shop(url, engine)
    user = shop.world.user()
    session = shop.start(user)
    assert "on its way" in shop.return_from_stripe(user, session).text
    shop.double.pay(session)
    event = client(shop.world.config).v1.events.list({"type": "checkout.session.completed", "limit": 1}).data[0]
    body, signature = shop.double.signed(event.id, shop.endpoint)
    delivered = shop.client.post("/billing/webhooks/stripe", content=body, headers={"stripe-signature": signature})
    assert delivered.json()["outcome"] == "granted"
    assert "3 credits added" in shop.return_from_stripe(user, session).text
    assert names
    assert set(names) == {"the-host"}


def test_others_are_served_while_stripe_thinks(
    make_world: Callable[..., World], make_shop: Callable[[str, AsyncEngine], Shop]
) -> None:
    """On an async engine a slow answer of Stripe's holds up nobody else on the event loop."""
    url = make_world().url
    shop = make_shop(url, create_async_engine(url, poolclass=sa.NullPool))
    user = shop.world.user()
    shop.start(user)  # the customer is made, and all is loaded
    finished: list[str] = []
    shop.double.fault("POST", "/v1/checkout/sessions", "timeout", wait_s=3)

    def buy() -> None:
        shop.start(user)
        finished.append("checkout")

    buying = threading.Thread(target=buy)
    buying.start()
    while shop.double.api.faults[-1].times:
        time.sleep(0.01)
    assert shop.get(user, "/billing/api/balance").json()["balance"] == 0
    finished.append("balance")
    buying.join()
    assert finished == ["balance", "checkout"]


def test_the_threads_of_those_who_wait_for_stripe_are_not_those_of_others(
    make_world: Callable[..., World], double: DevStripe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a sync engine many slow answers of Stripe's hold up nobody who only reads."""
    monkeypatch.setattr("tallystick.web.buyer.engine.THREADS_MAX", 2)
    with Shop(make_world().url, double) as shop:
        users = [shop.world.user() for _ in range(2)]
        for user in users:
            shop.start(user)  # the customer is made, and all is loaded
        double.fault("POST", "/v1/checkout/sessions", "timeout", times=2, wait_s=3)
        buying = [threading.Thread(target=shop.start, args=[user]) for user in users]
        for thread in buying:
            thread.start()
        while double.api.faults[-1].times:
            time.sleep(0.01)
        assert shop.get(users[0], "/billing/api/balance").json()["balance"] == 0
        assert all(thread.is_alive() for thread in buying)
        for thread in buying:
            thread.join()


class _NoThread(ThreadPoolExecutor):
    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{fn} was to run in a thread")


def test_nothing_of_a_buyers_request_leaves_the_event_loop(
    make_world: Callable[..., World], make_shop: Callable[[str, AsyncEngine], Shop], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = make_world().url
    shop = make_shop(url, create_async_engine(url, poolclass=sa.NullPool))
    user = shop.world.user()
    workshop = shop.world.workshop(user)

    async def no_threads() -> None:
        asyncio.get_running_loop().set_default_executor(_NoThread())

    async def none(fn: Any, *_args: Any, **_kwargs: Any) -> None:
        raise AssertionError(f"{fn} was to run in a thread")

    assert shop.client.portal is not None
    shop.client.portal.call(no_threads)
    monkeypatch.setattr(anyio.to_thread, "run_sync", none)
    with pytest.raises(AssertionError, match="was to run in a thread"):  # so it is forbidden
        shop.client.portal.call(asyncio.to_thread, print)

    def deliver(kind: str) -> str:
        event = client(shop.world.config).v1.events.list({"type": kind, "limit": 1}).data[0]
        body, signature = shop.double.signed(event.id, shop.endpoint)
        sent = shop.client.post("/billing/webhooks/stripe", content=body, headers={"stripe-signature": signature})
        assert sent.status_code == 200, sent.text
        return str(sent.json()["outcome"])

    def read(*paths: str, headers: dict[str, str]) -> set[int]:
        return {shop.get(user, f"/billing/{path}", headers=headers).status_code for path in paths}

    shop.double.fault("POST", "/v1/checkout/sessions", 429)  # a pause, and again
    session = shop.start(user, workshop=str(workshop))
    assert "on its way" in shop.return_from_stripe(user, session).text
    shop.double.pay(session)
    assert shop.post(user, f"/billing/api/checkout/{session}/confirm").json()["status"] == "completed"
    assert "3 credits added" in shop.return_from_stripe(user, session).text
    assert deliver("checkout.session.completed") == "unchanged"
    later = shop.post(user, "/billing/api/checkout", json={"pack": "Flight Crew"}).json()["session"]
    shop.double.pay(later)
    assert deliver("checkout.session.completed") == "granted"
    intent = client(shop.world.config).v1.checkout.sessions.retrieve(later).payment_intent
    shop.double.refund(str(intent))
    assert deliver("charge.refunded") == "taken_back"  # asks for the charge's refunds
    assert read("api/balance", "api/history", "api/packs", "api/onboarding", headers={}) == {200}
    pages = ("badge", "pricing", "history", "history.csv", "welcome", "cancelled", f"workshops/{workshop}/unlock")
    assert read(*pages, headers=HTML) == {200}
    assert shop.post(user, f"/billing/workshops/{workshop}/unlock", headers=HTML).status_code == 303
    assert shop.post(user, f"/billing/api/workshops/{workshop}/unlock").json()["replayed"]
    assert read(f"workshops/{workshop}/unlocked", headers=HTML) == read(f"api/workshops/{workshop}/access", headers={})
    assert shop.get(user, f"/paid/{workshop}").status_code == 200
    assert shop.post(user, "/billing/welcome", headers=HTML).status_code == 303
    assert shop.balance(user) == 2


def test_another_users_session_grants_nothing(shop: Shop) -> None:
    buyer, other = shop.world.user(), shop.world.user()
    session = shop.start(buyer)
    shop.double.pay(session)
    for asked in (session, "cs_test_unknown", "cs_test_../customers", "pi_1", "é" * 60):
        assert shop.return_from_stripe(other, asked).status_code == 404
        assert shop.post(other, f"/billing/api/checkout/{asked}/confirm").status_code == 404
    assert (shop.balance(buyer), shop.balance(other)) == (0, 0)
    assert shop.return_from_stripe(buyer, session).status_code == 200
    assert (shop.balance(buyer), shop.balance(other)) == (3, 0)


@pytest.mark.parametrize(("succeeds", "says", "balance"), [(True, "3 credits added", 3), (False, "did not go", 0)])
def test_a_bank_debit_arrives_or_does_not(shop: Shop, *, succeeds: bool, says: str, balance: int) -> None:
    user = shop.world.user()
    session = shop.start(user)
    shop.double.pay(session, card="async")
    page = shop.return_from_stripe(user, session)
    assert "Your payment is on its way" in page.text
    assert 'hx-trigger="every 3s"' in page.text
    assert "hx-trigger" not in page.headers
    assert shop.balance(user) == 0
    shop.double.settle(session, succeeded=succeeds)
    page = shop.return_from_stripe(user, session)
    assert says in page.text
    assert page.headers.get("hx-trigger") == ("tallystick:balance" if succeeds else None)  # for the badge
    assert shop.balance(user) == balance


def test_the_waiting_page_looks_less_and_less_often(shop: Shop) -> None:
    user = shop.world.user()
    session = shop.start(user, return_to="/x")
    page = shop.return_from_stripe(user, session, return_to="/x").text
    delays = []
    while found := re.search(r'hx-get="([^"]+)" hx-trigger="every (\d+)s"', page):
        delays.append(int(found[2]))
        page = shop.get(user, unescape(found[1]), headers=HTMX).text
    assert sorted(delays) == delays
    assert (delays.count(3), delays.count(30), len(delays)) == (20, 18, 38)  # ten minutes
    again = re.search(r'href="(/billing/success[^"]+)">Check again', page)
    assert again
    assert "looked" not in again[1]
    page = shop.get(user, unescape(again[1]), headers=HTML).text
    assert 'hx-trigger="every 3s"' in page
    assert 'href="/x"' in page
    for odd in ("-1", "x", "9" * 30, "\0"):
        assert shop.return_from_stripe(user, session, looked=odd).status_code == 200
    shop.double.pay(session)
    assert "3 credits added" in shop.return_from_stripe(user, session, looked="38").text


def test_a_payment_whose_credits_the_ledger_refuses(shop: Shop) -> None:
    user = shop.world.user(credits=1)
    session = shop.start(user, return_to="/x")
    with shop.world.engine.begin() as conn:
        shop.world.ledger.grant(conn, user, credits=INT32_MAX - 2, key="k", description="A present")
    confirm = f"/billing/api/checkout/{session}/confirm"
    assert shop.post(user, confirm).json()["status"] == "pending"
    shop.double.pay(session)
    page = shop.return_from_stripe(user, session, return_to="/x").text
    assert f"Your payment arrived, but the credits could not be added. Tell us: reference {session}" in page
    assert "hx-get" not in page  # to ask again changes nothing
    assert "Choose a pack" not in page
    assert 'href="/x"' in page
    answer = shop.post(user, confirm).json()
    assert (answer["status"], answer["balance"]) == ("refused", INT32_MAX - 1)

    with shop.world.engine.begin() as conn:
        shop.world.ledger.consume(conn, user, credits=5, key="l")
    assert "3 credits added" in shop.return_from_stripe(user, session).text
    assert shop.post(user, confirm).json()["status"] == "completed"


@pytest.mark.parametrize("gone", ["deleted", "soft-deleted", "of another user"])
def test_the_workshop_is_gone_when_the_buyer_returns(shop: Shop, gone: str) -> None:
    world, user = shop.world, shop.world.user()
    workshop = world.workshop(user, title="Pricing")
    about = {"workshop": str(workshop), "return_to": "/x"}
    session = shop.start(user, **about)
    shop.double.pay(session)
    workshops = world.schema.workshops
    assert workshops is not None
    with world.engine.begin() as conn:
        if gone == "deleted":
            conn.execute(sa.delete(workshops).where(workshops.c.key == workshop))
        elif gone == "soft-deleted":
            world.accounts.delete_workshop(conn, workshop)
        else:
            conn.execute(sa.update(workshops).where(workshops.c.key == workshop).values(owner=world.user()))
    for page, says in (
        (shop.return_from_stripe(user, session, **about), "3 credits added. You have 3."),
        (shop.get(user, "/billing/cancelled", params=about, headers=HTML), "Nothing was charged."),
    ):
        assert page.status_code == 200
        assert says in page.text
        assert "Pricing" not in page.text
        assert 'href="/x"' in page.text
        assert "unlock" not in page.text


def test_cancelled(shop: Shop) -> None:
    user = shop.world.user()
    workshop = shop.world.workshop(user, title="Pricing")
    page = shop.get(user, f"/billing/cancelled?workshop={workshop}&return_to=/x", headers=HTML).text
    assert "Nothing was charged." in page
    assert 'href="/x"' in page
    assert "Back to Pricing" in page


def test_a_field_that_we_do_not_know_is_named_and_nothing_is_written(shop: Shop) -> None:
    user = shop.world.user()
    for path, send in (("checkout", shop.client.post), ("onboarding", shop.client.put)):
        body = {"pack": "Flight Crew", "complete": True, "amount": 1}
        refused = send(f"/billing/api/{path}", json=body, headers=shop.as_(user))
        assert refused.status_code == 422
        assert "body.amount: Extra inputs are not permitted" in refused.json()["detail"]
    assert shop.get(user, "/billing/api/history").json()["rows"] == []
    assert shop.get(user, "/billing/api/onboarding").json() == {"complete": False}
    form = {"pack": "Flight Crew", "amount": "1"}  # of a form it is left unread: the pack's own price holds
    assert shop.post(user, "/billing/checkout", data=form, headers=HTML).status_code == 303


def test_stripe_is_away_before_buying(shop: Shop) -> None:
    user = shop.world.user()
    shop.double.fault("POST", "/v1/checkout/sessions", 503, times=3)
    answer = shop.post(user, "/billing/api/checkout", json={"pack": "Flight Crew"}, headers={"idempotency-key": "k"})
    assert answer.status_code == 503
    assert answer.json()["type"].endswith("payment-provider-unavailable")
    assert answer.headers["retry-after"]
    again = shop.post(user, "/billing/api/checkout", json={"pack": "Flight Crew"}, headers={"idempotency-key": "k"})
    assert again.status_code == 201
    assert len(shop.get(user, "/billing/api/history").json()["rows"]) == 1


def test_stripe_refuses_the_sale(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    user = shop.world.user()
    shop.double.fault("POST", "/v1/checkout/sessions", 401, times=2)  # the key was rolled
    answer = shop.post(user, "/billing/api/checkout", json={"pack": "Flight Crew"})
    page = shop.post(user, "/billing/checkout", data={"pack": "Flight Crew"}, headers=HTML)
    assert (answer.status_code, page.status_code) == (503, 503)
    assert answer.json()["type"].endswith("payment-provider-refused")
    for told in (answer.json()["detail"], page.text):
        assert "It did not take this. What you have paid for is not lost. We have been told." in told
        assert "STRIPE_SECRET_KEY" not in told
    assert answer.json()["reference"] in caplog.text
    assert caplog.text.count("Stripe refused (401)") >= 2  # for the operator
    assert "Check STRIPE_SECRET_KEY" in caplog.text


def test_nothing_is_written_when_stripe_is_away_from_the_start(shop: Shop) -> None:
    user = shop.world.user()
    shop.double.fault("GET", "/v1/prices/*", 503, times=3)
    page = shop.post(user, "/billing/checkout", data={"pack": "Flight Crew"}, headers=HTML)
    assert page.status_code == 503
    assert "The payment provider does not answer" in page.text
    assert "Try again in a moment. Nothing is charged twice." in page.text
    assert shop.get(user, "/billing/api/history").json()["rows"] == []
    assert shop.start(user)


@pytest.mark.parametrize(("status", "times"), [(503, 3), (401, 1)])  # 401: the key was rolled
def test_stripe_does_not_answer_as_it_should_when_the_buyer_returns(shop: Shop, status: int, times: int) -> None:
    user = shop.world.user()
    session = shop.start(user)
    shop.double.pay(session)
    shop.double.fault("GET", f"/v1/checkout/sessions/{session}", status, times=2 * times)
    told = (
        shop.post(user, f"/billing/api/checkout/{session}/confirm").text + shop.return_from_stripe(user, session).text
    )
    assert "on its way" in told
    assert "Nothing was charged" not in told
    assert "3 credits added" in shop.return_from_stripe(user, session).text


def test_json_checkout_and_confirm(shop: Shop) -> None:
    user = shop.world.user()
    workshop = shop.world.workshop(shop.world.user())
    refused = shop.post(user, "/billing/api/checkout", json={"pack": "Flight Crew", "workshop": str(workshop)})
    assert refused.status_code == 404
    unknown = shop.post(user, "/billing/api/checkout", json={"pack": "Nothing"})
    assert (unknown.status_code, unknown.json()["type"]) == (404, "urn:tallystick:problem:unknown-pack")
    started = shop.post(user, "/billing/api/checkout", json={"pack": "Single Flight"}).json()
    assert (started["credits"], started["url"].startswith(shop.double.url)) == (1, True)
    pending = shop.post(user, f"/billing/api/checkout/{started['session']}/confirm").json()
    assert (pending["status"], pending["balance"]) == ("pending", 0)
    shop.double.pay(started["session"])
    for _ in range(2):
        done = shop.post(user, f"/billing/api/checkout/{started['session']}/confirm").json()
        assert (done["status"], done["credits"], done["balance"]) == ("completed", 1, 1)
    assert done["purchase"] == started["purchase"]


@pytest.mark.parametrize("path", ["/billing/webhooks/stripe", "/billing/webhooks/stripe/"])
def test_a_delivery_grants_once_and_is_never_redirected(shop: Shop, path: str) -> None:
    user = shop.world.user()
    session = shop.start(user)
    shop.double.pay(session)
    event = client(shop.world.config).v1.events.list({"type": "checkout.session.completed", "limit": 1}).data[0]
    body, signature = shop.double.signed(event.id, shop.endpoint)
    for headers in ({}, {"stripe-signature": "t=1,v1=00"}, {"stripe-signature": signature.replace("v1=", "v1=0")}):
        assert shop.client.post(path, content=body, headers=headers).status_code == 400
    changed = body.replace(str(user), str(shop.world.user()))
    if changed != body:
        assert shop.client.post(path, content=changed, headers={"stripe-signature": signature}).status_code == 400
    assert shop.balance(user) == 0
    signed = {"stripe-signature": signature, "origin": "https://stripe.example", "sec-fetch-site": "cross-site"}
    first = shop.client.post(path, content=body, headers=signed)
    assert (first.status_code, first.json()["outcome"]) == (200, "granted")
    assert shop.client.post(path, content=body, headers=signed).json()["outcome"] == "duplicate"
    assert "3 credits added" in shop.return_from_stripe(user, session).text
    assert shop.balance(user) == 3
