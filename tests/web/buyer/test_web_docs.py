"""The tutorial runs as it is printed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from sites import HTML, Site
from tallystick import Config, stripe
from tallystick.dev.stripe import DevStripe
from tallystick.web.shared.pages import STRIPE_CHECKOUT, buyer_headers
from worlds import World

DOCS = Path(__file__).parents[3] / "docs"
ORIGIN = "https://app.example.com"


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.one_server  # it is about the page's code
def test_a_paywall_in_ten_minutes(
    make_world: Callable[..., World], double: DevStripe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world = make_world()
    environment = {
        "DATABASE_URL": world.url, "STRIPE_SECRET_KEY": double.secret_key, "STRIPE_API_BASE": double.url,
        "STRIPE_WEBHOOK_SECRET": "whsec_x",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    (settings,) = blocks("paywall.md", "toml")
    (tmp_path / "tallystick.toml").write_text(settings, "utf-8")
    for pack in stripe.setup(Config.load()).packs:
        named = f'name = "{pack.pack}"\n'
        settings = settings.replace(named, f'{named}stripe_price_id = "{pack.price}"\n')
    (tmp_path / "tallystick.toml").write_text(settings, "utf-8")

    names: dict[str, object] = {}
    for block in blocks("paywall.md", "python"):
        exec(compile(block, "docs/paywall.md", "exec", dont_inherit=True), names)

    user = world.user()
    workshop = world.workshop(user)
    with TestClient(names["app"], base_url=ORIGIN, cookies={"session": str(user)}, follow_redirects=False) as client:  # type: ignore[arg-type]
        step = f"/workshops/{workshop}/steps/7"
        assert client.get(step).status_code == 402
        assert "continues here" in client.get(step, headers={"accept": "text/html"}).text
        sent = client.post("/billing/checkout", data={"pack": "Flight Crew", "return_to": step})
        session = sent.headers["location"].rpartition("/")[2]
        double.pay(session)
        assert "3 credits added" in client.get(f"/billing/success?session_id={session}").text
        client.post(f"/billing/workshops/{workshop}/unlock")
        assert client.get(step).json() == "The first screen"
        assert client.post("/reports/q3").json() == 0
        assert client.post("/reports/q4").json()["balance"] == 0
        assert "0 credits" in client.get("/home").text
    names["engine"].dispose()  # type: ignore[attr-defined]


@pytest.mark.one_server
def test_the_policy_for_a_checkout_domain_is_ours_but_for_the_domain(make_site: Callable[..., Site]) -> None:
    (block,) = (block for block in blocks("web.md", "python") if "Content-Security-Policy" in block)
    names: dict[str, dict[str, str]] = {}
    exec(block, names)
    headers = names["headers"]
    assert headers == {
        name: value.replace(STRIPE_CHECKOUT, "https://pay.example.com")
        for name, value in buyer_headers(None).items()
        if name in headers
    }
    site = make_site(headers=headers)
    page = site.get(site.world.user(), "/billing/pricing", headers=HTML)
    assert page.headers.get_list("content-security-policy") == list(headers.values())
