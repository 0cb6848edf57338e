"""tallystick stripe …, as an operator types it."""

from __future__ import annotations

import json
import re
import sys
import uuid
from collections.abc import Callable

import pytest

from stripe_sales.shop import CREDITS, ORIGIN, PACK, PRICE, Shop
from tallystick.cli import main

pytestmark = pytest.mark.one_server  # it is about what the commands print

Tally = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shop(request: pytest.FixtureRequest, make_shop: Callable[..., Shop]) -> Shop:
    return make_shop(getattr(request, "param", "uuid"))


@pytest.fixture
def tally(shop: Shop, tmp_path, monkeypatch, capfd) -> Tally:
    """``tally("check") -> (code, out, err)``: in a folder with the shop's settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    environment = {
        "DATABASE_URL": shop.world.url,
        "STRIPE_SECRET_KEY": shop.dev.secret_key,
        "STRIPE_API_BASE": shop.dev.url,
        "STRIPE_WEBHOOK_SECRET": shop.config.stripe_webhook_secret or "",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    price = shop.config.packs[0].stripe_price_id
    settings = f"""checkout_origins = ["{ORIGIN}"]
[[packs]]
name = "{PACK}"
credits = {CREDITS}
amount = {PRICE}
stripe_price_id = "{price}"
"""
    (tmp_path / "tallystick.toml").write_text(settings, encoding="utf-8")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tallystick", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return int(ended.value.code or 0), out, err

    return run


def test_check_says_what_cannot_be_sold(shop: Shop, tally: Tally):
    code, out, _ = tally("stripe", "check")
    assert (code, "as the pack says" in out) == (0, True)
    shop.api.prices.update(shop.config.packs[0].stripe_price_id, {"active": False})
    code, out, _ = tally("stripe", "check", "--json")
    assert code == 1
    assert "not active" in json.loads(out)["packs"][0]["problem"]


@pytest.mark.parametrize("shop", ["uuid", "clerk"], indirect=True)  # the settings have no mapping: the database has it
def test_check_tells_customers_that_stripe_does_not_have(shop: Shop, tally: Tally):
    known, unknown = shop.world.user(), shop.world.user()
    shop.checkout(known)
    with shop.engine.begin() as conn:
        shop.world.accounts.set_stripe_customer(conn, unknown, "cus_of_a_test_key")
    code, out, _ = tally("stripe", "check")
    assert (code, f"User {unknown}: Stripe has no customer cus_of_a_test_key in test mode" in out) == (1, True)
    assert str(known) not in out
    shop.checkout(unknown)
    assert tally("stripe", "check")[0] == 0


def test_setup_prints_what_to_put_where(shop: Shop, tally: Tally):
    code, out, _ = tally("stripe", "setup", "--endpoint", "http://127.0.0.1:3/webhook")
    assert code == 0
    assert f'stripe_price_id = "{shop.config.packs[0].stripe_price_id}"' in out
    assert "STRIPE_WEBHOOK_SECRET=whsec_" in out
    assert "whsec_" not in tally("stripe", "setup", "--endpoint", "http://127.0.0.1:3/webhook")[1]


def test_a_command_that_changes_rows_prints_the_database_first(shop: Shop, tally: Tally):
    changing = ("reconcile",), ("dismiss", "--all"), ("redeliver", "--all"), ("refund", uuid.uuid4())
    for command in changing:
        assert tally("stripe", *command)[2].startswith("Database "), command
    for command in ("reconcile", "--dry-run"), ("deliveries",):
        assert "Database " not in tally("stripe", *command)[2], command


def test_reconcile_tells_and_does(shop: Shop, tally: Tally):
    user = shop.world.user()
    session = shop.checkout(user).session
    shop.dev.pay(session)
    code, out, _ = tally("stripe", "reconcile", "--dry-run")
    assert (code, "Dry run" in out, "granted" in out, shop.balance(user)) == (0, True, True, 0)
    code, out, _ = tally("stripe", "reconcile", "--json")
    assert (code, shop.balance(user)) == (0, CREDITS)
    assert json.loads(out)["looked_at"]["pending"] == 1
    assert "Nothing to change." in tally("stripe", "reconcile", "--since", "2026-01-01")[1]
    stray, other = (shop.foreign(metadata={"tallystick_purchase": str(uuid.uuid4())}) for _ in range(2))
    shop.foreign()
    code, out, _ = tally("stripe", "reconcile")
    assert (code, f"unknown_session {stray}" in out, "Objects of other sales at this Stripe account: 1." in out) == (
        1,
        True,
        True,
    )
    assert tally("stripe", "dismiss", stray, other)[0] == 0
    assert tally("stripe", "dismiss", stray)[0] == 1
    assert tally("stripe", "reconcile", "--since", "2026-01-01")[0] == 0  # found again, and not told again


def test_dismiss_wants_to_know_what(shop: Shop, tally: Tally):
    stray = shop.foreign(metadata={"tallystick_purchase": str(uuid.uuid4())})
    tally("stripe", "reconcile")
    for wrong in ((), (stray, "--all"), ("--kind", "unknown")):
        assert tally("stripe", "dismiss", *wrong)[0] == 2
    assert "1 finding dismissed" in tally("stripe", "dismiss", "--kind", "unknown_session")[1]
    assert tally("stripe", "dismiss", "--all")[0] == 1


def test_deliveries_that_failed_are_listed_and_run_again(shop: Shop, tally: Tally):
    user = shop.world.user()
    bought = shop.checkout(user)
    shop.dev.pay(bought.session)
    shop.deliver_all()
    assert "No delivery has failed." in tally("stripe", "deliveries")[1]
    shop.dev.refund(shop.intent(bought))
    shop.dev.fault("GET", "/v1/refunds", 500, times=3)
    [event] = shop.events("charge.refunded")
    shop.deliver(event)
    code, out, err = tally("stripe", "deliveries")
    assert (code, event in out, "Stripe answered 500" in out, "redeliver --all" in err) == (1, True, True, True)
    assert tally("stripe", "redeliver")[0] == 2
    code, out, _ = tally("stripe", "redeliver", event)
    assert (code, out.split(), shop.balance(user)) == (0, [event, "taken_back"], 0)
    assert json.loads(tally("stripe", "deliveries", "--json")[1]) == []
    assert "No delivery has failed." in tally("stripe", "redeliver", "--all")[1]


def test_refund_sends_the_money_back(shop: Shop, tally: Tally):
    user = shop.world.user()
    bought = shop.checkout(user)
    shop.dev.pay(bought.session)
    shop.deliver_all()
    code, out, _ = tally("stripe", "refund", bought.purchase.id, "--credits", 40, "--key", "ticket 7")
    assert (code, "57 credits left" in out, shop.balance(user)) == (0, True, 57)
    assert "57 credits left" in tally("stripe", "refund", bought.purchase.id, "--credits", 40, "--key", "ticket 7")[1]
    code, _, err = tally("stripe", "refund", bought.purchase.id, "--amount", 1, "--keep-credits")
    assert (code, shop.balance(user)) == (0, 57)
    assert "sends back 1 usd (minor units) and takes 0 credits. The purchase has 57 credits left" in " ".join(
        err.split()
    )
    assert "of which 0 are spent already. The balance goes from 57 to 57" in " ".join(err.split())
    code, _, err = tally("stripe", "refund", bought.purchase.id, "--credits", 60)
    assert (code, "57 of 97 credits left" in err) == (1, True)


def test_a_refund_without_an_answer_is_repeated_by_the_key_that_was_told(shop: Shop, tally: Tally):
    user = shop.world.user()
    bought = shop.checkout(user)
    shop.dev.pay(bought.session)
    shop.deliver_all()
    refund = ("stripe", "refund", bought.purchase.id, "--credits", 40)
    shop.dev.fault("POST", "/v1/refunds", 500, when="after")
    code, _, err = tally(*refund)
    assert (code, "Stripe answered 500" in err) == (1, True)
    (key,) = re.findall(r"--key (cli-[0-9a-f-]{36})", err)
    code, out, err = tally(*refund, "--key", key)
    assert (code, "57 credits left" in out, "--key" in err) == (0, True, False)
    shop.deliver_all()
    assert shop.balance(user) == 57


def test_grant_gives_credits(shop: Shop, tally: Tally):
    user = shop.world.user()
    for word in ("Done", "Already done"):
        code, out, _ = tally("grant", user, 5, "--description", "Sorry about Tuesday", "--key", "tuesday")
        assert (code, out.startswith(word), "Sorry about Tuesday (+5). Balance 5" in out) == (0, True, True)


def test_a_missing_key_is_one_sentence(tally: Tally, monkeypatch):
    monkeypatch.delenv("STRIPE_SECRET_KEY")
    code, out, err = tally("stripe", "check")
    assert (code, out, "Set STRIPE_SECRET_KEY" in err) == (1, "", True)
