"""The how-to of docs/stripe.md, from its settings to a balance; its tables, and docs/stripe-cases.md, are complete."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import sqlalchemy as sa
import stripe as sdk

from stripe_sales.shop import Shop
from tallystick import Config, Pack, stripe
from tallystick.stripe.webhooks import HANDLERS

pytestmark = pytest.mark.one_server  # it is about the page's code

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "stripe.md").read_text(encoding="utf-8")
CASES = (DOCS / "stripe-cases.md").read_text(encoding="utf-8")


def block(language: str, holding: str = "") -> str:
    """The first block of code in this language that holds these words."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return next(one for one in blocks if holding in one)


def test_the_how_to_sells(shop: Shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sa, "create_engine", partial(sa.create_engine, poolclass=sa.NullPool))
    file = tmp_path / "tallystick.toml"
    file.write_text(block("toml"), encoding="utf-8")
    environment = {"STRIPE_SECRET_KEY": shop.dev.secret_key, "STRIPE_API_BASE": shop.dev.url}
    made = stripe.setup(Config.load(file, environ=environment), endpoint_url="http://127.0.0.1:2/webhook")
    file.write_text(block("toml") + f'stripe_price_id = "{made.packs[0].price}"\n', encoding="utf-8")
    assert made.endpoint is not None
    environment |= {"STRIPE_WEBHOOK_SECRET": made.endpoint.secret or "", "DATABASE_URL": shop.world.url}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert [one.problem for one in stripe.check(Config.load())] == [None]

    names: dict[str, Any] = {}
    exec(compile(block("python"), "docs/stripe.md", "exec"), names)
    user = shop.world.user()
    url = names["buy"](user, "form 1")
    session = url.rsplit("/", 1)[1]
    address = shop.api.checkout.sessions.retrieve(session).success_url
    assert parse_qs(urlsplit(address).query) == {"session_id": ["{CHECKOUT_SESSION_ID}"]}
    assert not names["done"](user, session)
    shop.dev.pay(session)
    assert names["buy"](user, "form 1") == f"http://127.0.0.1:8000/done?session_id={session}"
    [event] = shop.events("checkout.session.completed")[:1]
    body, signature = shop.dev.signed(event, made.endpoint.id)
    assert names["webhook"](body.encode(), signature) == 200
    assert names["done"](user, session)
    assert shop.balance(user) == 3


def test_the_double_of_stripe_runs_alone():
    command = [sys.executable, "-m", "tallystick.dev.stripe", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as double:
        try:
            printed = [double.stdout.readline().removeprefix("export ").strip().split("=", 1) for _ in range(2)]
            config = Config(packs=(Pack(name="One", credits=1, amount=900),), **{k.lower(): v for k, v in printed})
            assert stripe.setup(config, endpoint_url="http://127.0.0.1:2/webhook").packs[0].made
        finally:
            double.terminate()


def test_a_session_of_ones_own_as_the_page_shows_it(shop: Shop, monkeypatch):
    monkeypatch.setattr(sdk, "StripeClient", partial(sdk.StripeClient, base_addresses={"api": shop.dev.url}))
    product = {"product": shop.api.products.list().data[0].id, "currency": "usd", "unit_amount": 900}
    names: dict[str, Any] = {
        "stripe": stripe,
        "engine": shop.engine,
        "config": shop.config,
    }
    exec(compile(block("python", "def sell"), "docs/stripe.md", "exec"), names)
    names["price_id"] = shop.api.prices.create(product).id
    user = shop.world.user()
    session = names["sell"](user, "order 7").rsplit("/", 1)[1]
    assert names["sell"](user, "order 7").endswith(session)
    shop.dev.pay(session)
    shop.deliver_all()
    assert (shop.balance(user), shop.findings()) == (10, [])
    assert stripe.confirm(shop.engine, shop.config, user, session).granted


def test_every_case_names_tests_that_there_are():
    cases = re.findall(r"^\| (.+?) \| .+? \| (.+?) \|$", CASES, re.MULTILINE)
    there = {
        name
        for file in (Path(__file__).parents[1]).rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    named = {case: re.findall(r"`(test_\w+)`", tests) for case, tests in cases[1:]}
    assert len(named) > 50
    assert {case for case, tests in named.items() if not tests} == set()
    assert {test for tests in named.values() for test in tests} - there == set()


@pytest.mark.parametrize("kind", stripe.FindingKind)
def test_every_finding_is_explained(kind):
    assert f"`{kind}`" in PAGE


def test_setup_subscribes_to_events_that_stripe_has(shop: Shop):
    assert {*shop.api.webhook_endpoints.retrieve(shop.endpoint).enabled_events} == {*HANDLERS}


def test_the_listen_recipe_asks_for_every_event_that_is_handled():
    recipe = block("sh").replace("\\\n", "")
    events = re.findall(r"--events (\S+)", recipe)[0]
    assert sorted(events.split(",")) == sorted(HANDLERS)
