"""The pages as plain HTML, as they are without JavaScript, and the fragments that htmx asks for."""

from __future__ import annotations

import csv
import datetime as dt
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit
from uuid import UUID, uuid4

import jinja2
import pytest
import sqlalchemy as sa
from fastapi import Depends
from fastapi.testclient import TestClient
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse

from sites import HTML, HTMX, ODD_KEYS, ORIGIN, Site
from tallystick.accounts import Account
from tallystick.config import Pack
from tallystick.web import Fragments, Texts
from tallystick.web.buyer.entrance import StarletteRequest

pytestmark = pytest.mark.one_server  # it is about requests and answers


def test_spending_asks_first_and_then_says_what_it_did(site: Site) -> None:
    user = site.world.user(credits=3)
    workshop = site.world.workshop(user)
    address = f"/billing/workshops/{workshop}/unlock"
    asked = site.get(user, f"{address}?return_to=/steps/7", headers=HTML)
    assert "This will use 1 credit. You have 3." in asked.text
    assert "Mobile App Discovery" in asked.text
    assert site.balance(user) == 3

    done = site.post(user, address, data={"return_to": "/steps/7"}, headers=HTML)
    assert done.status_code == 303
    shown = site.get(user, done.headers["location"], headers=HTML)
    assert "1 credit used. 2 left." in shown.text
    assert 'href="/steps/7"' in shown.text

    again = site.get(user, site.post(user, address, headers=HTML).headers["location"], headers=HTML)
    assert "unlocked already. Nothing was charged" in again.text
    assert "unlocked already" in site.get(user, address, headers=HTML).text
    assert site.balance(user) == 2


@pytest.mark.parametrize("key", ODD_KEYS)
def test_a_key_is_one_segment_of_an_address(site: Site, key: str) -> None:
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "app": site.app}
    for name in ("unlock", "unlock_now", "unlocked", "api.unlock", "api.access"):
        address = StarletteRequest(Request(scope)).url(name, workshop=key)
        assert address.split("/")[-2:-1] == [quote(key, safe="")], address


# Starlette's test client decodes a path twice
@pytest.mark.parametrize("key", [key for key in ODD_KEYS if unquote(key) == key])
def test_the_key_of_a_workshop_may_hold_any_character(make_site: Callable[..., Site], key: str) -> None:
    site = make_site("clerk")
    user, other = site.world.user(credits=1), site.world.user(credits=1)
    with site.world.engine.begin() as conn:
        conn.execute(sa.insert(site.world.schema.workshops).values(key=key, owner=user, title="Pricing"))
        for near in {key.partition("/")[0], key.partition("?")[0], key.partition("#")[0], unquote(key)} - {key}:
            conn.execute(sa.insert(site.world.schema.workshops).values(key=near, owner=other, title="Another"))

    @site.app.get("/open/{workshop:path}", dependencies=[Depends(site.billing.requires_open_workshop)])
    async def opened() -> str:
        return "ok"

    locked = site.get(user, f"/open/{quote(key, safe='')}", headers=HTML)
    assert locked.status_code == 402
    (link,) = re.findall(r'href="([^"]+/unlock[^"]*)"', locked.text)
    asked = site.get(user, unescape(link), headers=HTML)
    assert "This will use 1 credit. You have 1." in asked.text
    (form,) = re.findall(r'action="([^"]+)"', asked.text)
    done = site.post(user, unescape(form), headers=HTML)
    assert "1 credit used. 0 left." in site.get(user, done.headers["location"], headers=HTML).text
    about = f"/billing/api/workshops/{quote(key, safe='')}"
    assert site.get(user, f"{about}/access").json()["workshop"] == key
    assert site.post(user, f"{about}/unlock").json()["transaction"]["workshop"] == key
    assert site.get(user, f"/open/{quote(key, safe='')}").json() == "ok"


def test_a_deleted_workshop_cannot_be_unlocked(site: Site) -> None:
    user = site.world.user(credits=1)
    workshop = site.world.workshop(user)
    with site.world.engine.begin() as conn:
        site.world.accounts.delete_workshop(conn, workshop)
    for path in (f"/billing/workshops/{workshop}/unlock", f"/paid/{workshop}"):
        page = site.get(user, path, headers=HTML)
        assert page.status_code == 410
        assert "This workshop was deleted" in page.text


def test_htmx_gets_the_dialog_alone(site: Site) -> None:
    user = site.world.user(credits=1)
    address = f"/billing/workshops/{site.world.workshop(user)}/unlock"
    asked = site.get(user, address, headers=HTMX)
    assert asked.text.lstrip().startswith("<dialog")
    assert "<html" not in asked.text
    done = site.post(user, address, headers=HTMX)
    assert "1 credit used. 0 left." in done.text
    assert done.headers["hx-trigger"] == "tallystick:balance"
    assert "0 credits" in site.get(user, "/billing/badge", headers=HTMX).text


def test_the_paywall_is_a_page_for_browsers(make_site: Callable[..., Site]) -> None:
    site = make_site(preview=lambda _request, workshop: Markup("<p>Teaser of {}</p>").format(workshop))
    user = site.world.user()
    workshop = site.world.workshop(user, title="Pricing")
    page = site.get(user, f"/paid/{workshop}", headers=HTML)
    assert page.status_code == 402
    assert "Pricing continues here" in page.text
    assert "You have 0 credits. One unlocks this workshop." in page.text
    assert f'<div class="ts-preview" aria-hidden="true" inert><p>Teaser of {workshop}</p></div>' in page.text
    assert f"/billing/pricing?return_to=%2Fpaid%2F{workshop}" in page.text


def test_credits_for_something_else_than_a_workshop(site: Site) -> None:
    for credits, has in ((0, "You have 0 credits."), (1, "You have 1 credit.")):
        page = site.get(site.world.user(credits=credits), "/report", headers=HTML)
        assert page.status_code == 402
        assert "Not enough credits" in page.text
        assert f"{has} This takes 2." in page.text
        assert "workshop" not in text(page.text).lower()
        assert "/billing/pricing?return_to=%2Freport" in page.text


def test_an_app_without_workshops_sells_credits(make_site: Callable[..., Site]) -> None:
    site = make_site("alone")
    user = site.world.user()
    for path in ("/billing/pricing", "/report"):
        page = text(site.get(user, path, headers=HTML).text)
        assert "You have 0 credits." in page
        assert "workshop" not in page.lower()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_preview_may_be_async(make_site: Callable[..., Site], asynchronous: bool) -> None:
    async def preview(_request: object, _workshop: object) -> Markup:
        return Markup("<p>later</p>")

    site = make_site(preview=preview, asynchronous=asynchronous)
    user = site.world.user()
    assert "<p>later</p>" in site.get(user, f"/paid/{site.world.workshop(user)}", headers=HTML).text


def test_pricing(make_site: Callable[..., Site]) -> None:
    packs = (
        Pack(name="One", credits=1, amount=7900),
        Pack(name="Three", credits=3, amount=10000),
        Pack(name="Yen", credits=2, amount=5000, currency="jpy"),
        Pack(name="Unpriced", credits=4),
    )
    site = make_site(settings={"packs": packs}, contact="mailto:sales@example.com")
    user = site.world.user()
    page = site.get(user, "/billing/pricing", headers=HTML).text
    assert site.get(user, "/billing/pricing?workshop=", headers=HTML).status_code == 200  # a link without one
    buttons = re.findall(r"<button[^>]*>([^<]+)</button>", page)
    assert buttons == ["Buy 1 credit for $79", "Buy 3 credits for $100", "Buy 2 credits for ¥5,000", "Buy 4 credits"]
    assert "$33.34 a credit" in page  # rounded up, never down
    assert page.index("mailto:sales@example.com") > page.index("Unpriced")
    keys = re.findall(r'name="key" value="(\w{32})"', page)
    assert len(set(keys)) == 4


def test_nothing_on_sale(make_site: Callable[..., Site]) -> None:
    site = make_site(settings={"packs": ()})
    assert "Nothing is on sale" in site.get(site.world.user(), "/billing/pricing", headers=HTML).text


def test_history_and_its_file(site: Site) -> None:
    user = site.world.user()
    assert "will be listed here" in site.get(user, "/billing/history", headers=HTML).text
    with site.world.engine.begin() as conn:
        site.world.buy(conn, user, 40)
        for number in range(35):
            site.world.ledger.consume(conn, user, key=str(number), description='=HYPERLINK("http://x") é')
    page = site.get(user, "/billing/history", headers=HTML).text
    assert page.count("<tr") == 31
    older = re.search(r'href="([^"]+before=[^"]+)"', page)
    assert older
    last = site.get(user, older[1], headers=HTML).text
    assert last.count("<tr") == 7
    assert "Purchased 40" in last
    assert "+40" in last
    assert "$40" in last

    answer = site.get(user, "/billing/history.csv")
    assert answer.headers["content-disposition"] == 'attachment; filename="credits.csv"'
    rows = list(csv.DictReader(answer.text.splitlines()))
    assert [int(row["sequence"]) for row in rows] == list(range(36, 0, -1))
    assert rows[0]["description"] == '\'=HYPERLINK("http://x") é'  # text to a spreadsheet, never a formula
    assert (rows[-1]["amount_paid_minor_units"], rows[-1]["currency"]) == ("4000", "usd")


def test_a_file_longer_than_one_read_is_whole(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tallystick.web.buyer.views.HISTORY_MAX", 10)
    user = site.world.user(credits=30)
    with site.world.engine.begin() as conn:
        for number in range(29):
            site.world.ledger.consume(conn, user, key=str(number))
    rows = site.get(user, "/billing/history.csv").text.splitlines()
    assert len(rows) == 1 + 30


def test_the_welcome_is_shown_until_it_was_closed_once(site: Site) -> None:
    user = site.world.user()
    assert "Every workshop begins free of charge" in site.get(user, "/billing/welcome", headers=HTML).text
    done = site.post(user, "/billing/welcome", data={"return_to": "/home"}, headers=HTML)
    assert (done.status_code, done.headers["location"]) == (303, "/home")
    with site.world.engine.connect() as conn:
        assert site.world.accounts.get(conn, user).onboarding_complete
    assert site.post(user, "/billing/welcome", headers=HTMX).status_code == 204


def test_fragments_for_the_hosts_own_templates(site: Site) -> None:
    user = site.world.user(credits=1)
    workshop = site.world.workshop(user)
    host = jinja2.Environment(autoescape=True)
    template = host.from_string(
        "{{ ts.head }}{{ ts.badge }}{{ ts.welcome }}{{ ts.pricing }}"
        "{% call ts.paywall(workshop) %}<i>{{ teaser }}</i>{% endcall %}"
    )
    shown: list[str] = []

    from starlette.requests import Request

    async def page(request: Request, ts: Fragments = Depends(site.billing.fragments)) -> str:  # noqa: B008
        found = await site.billing.workshop(user, workshop)
        shown.append(template.render(ts=ts, workshop=found, teaser="<b>"))
        return "ok"

    page.__annotations__.update(request=Request, ts=Fragments)
    site.app.get("/page")(page)
    assert site.get(user, "/page").status_code == 200
    html = shown[0]
    assert re.search(r'<link rel="stylesheet" href="/billing/static/tallystick\.css\?v=\w{12}">', html)
    assert "1 credit" in html
    assert "<dialog" in html
    assert "Buy 3 credits for $149" in html
    assert "<i>&lt;b&gt;</i>" in html
    assert 'name="return_to" value="/page"' in html
    shown.clear()
    site.client.get("/page")
    assert site.get(uuid4(), "/page").status_code == 200  # signed in, and no row in the table of users
    for without in shown:
        assert "<dialog" not in without
        assert "1 credit</span>" not in without
    assert len(shown) == 2


def test_the_badge_can_be_had_without_a_query_of_ours(make_site: Callable[..., Site]) -> None:
    """From the row of the user that the host has read by itself."""
    site = make_site()
    user, new = site.world.user(credits=2), site.world.user()
    columns = site.world.schema.users.c

    @site.app.get("/own")
    def own(request: Request, user: UUID) -> HTMLResponse:
        with site.world.engine.connect() as conn:
            row = conn.execute(sa.select(columns).where(columns.key == user)).one()
        account = Account(
            user=row.key, credit_balance=row.credit_balance, onboarding_complete=row.onboarding_complete,
            stripe_customer_id=row.stripe_customer_id, plan_tier=row.plan_tier, updated_at=row.updated_at,
            deleted_at=row.deleted_at,
        )  # fmt: skip
        parts = site.billing.fragments_of(request, account)
        return HTMLResponse(parts.badge + parts.welcome)

    asked: list[str] = []
    sa.event.listen(site.world.engine, "before_cursor_execute", lambda *event_args: asked.append(event_args[2]))
    assert "Balance: 2 credits" in site.client.get("/own", params={"user": str(user)}).text
    assert "Welcome" in site.client.get("/own", params={"user": str(new)}).text
    assert len(asked) == 2


def test_a_browser_without_a_session_is_sent_to_sign_in_and_back(make_site: Callable[..., Site]) -> None:
    site = make_site(sign_in="/login?next={return_to}")
    sent = site.client.get("/billing/history?before=9", headers=HTML)
    assert (sent.status_code, sent.headers["location"]) == (303, "/login?next=%2Fbilling%2Fhistory%3Fbefore%3D9")
    assert site.client.get("/billing/history", headers=HTMX).headers["hx-redirect"].startswith("/login")
    badge = site.client.get("/billing/badge", headers=HTMX)  # it refreshes itself: the page stays as it is
    assert (badge.status_code, badge.text, "hx-redirect" in badge.headers) == (204, "", False)
    without = make_site().client.get("/billing/history", headers=HTML)
    assert without.status_code == 401
    assert "Sign in first" in without.text


WAYS_BACK = ("step=10&x=1", "q=a%20b%26c&r=%C3%A9", "")


@pytest.mark.parametrize("query", WAYS_BACK)
@pytest.mark.parametrize("key", ["plain", "größe 2", "a#b", "50%"])
def test_a_buyer_returns_to_the_whole_address(make_site: Callable[..., Site], key: str, query: str) -> None:
    site = make_site("clerk", sign_in="/login?next={return_to}")
    user = site.world.user()
    with site.world.engine.begin() as conn:
        conn.execute(sa.insert(site.world.schema.workshops).values(key=key, owner=user, title="Pricing"))

    @site.app.get("/packs/{name}")
    async def packs(request: Request) -> HTMLResponse:
        return HTMLResponse(site.billing.fragments_of(request, None).pricing)

    here = f"{quote(key)}?{query}".rstrip("?")
    locked = site.get(user, f"/paid/{here}", headers=HTML)
    (buy,) = re.findall(r'href="([^"]+/pricing[^"]*)"', locked.text)
    assert parse_qs(urlsplit(unescape(buy)).query)["return_to"] == [f"/paid/{here}"]
    sent = site.client.get(f"/paid/{here}", headers=HTML)
    assert sent.headers["location"] == f"/login?next={quote(f'/paid/{here}', safe='')}"
    shown = site.client.get(f"/packs/{here}", headers=HTML).text
    assert {unescape(one) for one in re.findall(r'name="return_to" value="([^"]+)"', shown)} == {f"/packs/{here}"}


@pytest.mark.parametrize("sent", ["/billing/pricing?x=1", "/tools/größe/billing/pricing?x=1"])
def test_a_buyer_returns_below_the_path_that_a_proxy_removes(make_site: Callable[..., Site], sent: str) -> None:
    site = make_site(sign_in="/login?next={return_to}")
    proxied = TestClient(site.app, base_url=ORIGIN, root_path="/tools/größe", follow_redirects=False)
    answer = proxied.get(sent, headers=HTML)
    back = parse_qs(urlsplit(answer.headers["location"]).query)["next"]
    assert back == ["/tools/gr%C3%B6%C3%9Fe/billing/pricing?x=1"]


@pytest.mark.parametrize("path", ["//evil.example/x", "/" + "a" * 2001, "/%2F/../evil\\x"])
def test_a_refused_address_is_no_way_to_another_site(site: Site, path: str) -> None:
    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "headers": []}
    request = StarletteRequest(Request({**scope, "query_string": b"next=//evil.example"}))
    assert site.billing.returning(request.address) == "/"
    del scope["raw_path"]
    assert StarletteRequest(Request({**scope, "path": "/größe"})).address == "/gr%C3%B6%C3%9Fe"


def test_every_word_can_be_another(make_site: Callable[..., Site]) -> None:
    class Deutsch(Texts):
        language = "de"
        history_title = "Deine Guthaben"

        def credits(self, count: int) -> str:
            return f"{count} Guthaben"

        def history_balance(self, balance: int) -> str:
            return f"Du hast {self.credits(balance)}."

    site = make_site(texts=Deutsch())
    page = site.get(site.world.user(credits=2), "/billing/history", headers=HTML).text
    assert '<html lang="de">' in page
    assert "Deine Guthaben" in page
    assert "Du hast 2 Guthaben." in page


def test_a_host_replaces_a_template_and_can_extend_the_original(make_site: Callable[..., Site], tmp_path: Path) -> None:
    (tmp_path / "tallystick").mkdir()
    (tmp_path / "tallystick" / "layout.html").write_text(
        '{% extends "original/tallystick/layout.html" %}{% block header %}{{ home ~ "<b>" }}{% endblock %}', "utf-8"
    )
    site = make_site(templates=jinja2.FileSystemLoader(tmp_path))
    page = site.get(site.world.user(), "/billing/welcome", headers=HTML).text
    assert "/&lt;b&gt;" in page
    assert '<html lang="en">' in page


def test_no_word_stands_in_a_template() -> None:
    """All that people read is in texts.py, or a translation would be half a one."""
    folder = Path(__file__).parents[3] / "src/tallystick/web/buyer/templates/tallystick"
    for template in folder.glob("*.html"):
        source = template.read_text("utf-8")
        for code in (r"\{#.*?#\}", r"\{%.*?%\}", r"\{\{.*?\}\}", r'<(?:"[^"]*"|[^>"])*>'):
            source = re.sub(code, " ", source, flags=re.DOTALL)
        assert not re.search(r"[A-Za-z]{2,}", source), (template.name, source.split())


def test_debt_is_said_in_words(site: Site) -> None:
    user = site.world.user()
    with site.world.engine.begin() as conn:
        bought = site.world.buy(conn, user, 2)
        site.world.ledger.consume(conn, user, key="a", credits=2)
        site.world.ledger.refund(conn, user, bought.id, key="r")
    assert "You owe 2 credits." in site.get(user, "/billing/history", headers=HTML).text
    assert "2 credits owed" in site.get(user, "/billing/badge", headers=HTML).text
    locked = site.get(user, f"/paid/{site.world.workshop(user)}", headers=HTML)
    assert "The next purchase pays that first." in locked.text


def test_static_files_are_kept_for_ever_by_their_version(site: Site) -> None:
    page = site.get(site.world.user(), "/billing/pricing", headers=HTML).text
    for address in re.findall(r'(?:href|src)="(/billing/static/[^"]+)"', page):
        answer = site.client.get(address)
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
        assert site.client.get(urlsplit(address).path).headers["cache-control"] == "no-cache"
        assert parse_qs(urlsplit(address).query)["v"]
    assert site.client.get("/billing/static/README.md").status_code == 404
    assert site.client.get("/billing/static/..%2f..%2fpages.py").status_code == 404


def text(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_what_is_set_aside_cannot_be_spent_and_the_pages_say_so(site: Site) -> None:
    ledger, user = site.world.ledger, site.world.user(credits=2)
    soon = dt.datetime(2060, 3, 1, 9, 30, tzinfo=dt.UTC)
    with site.world.engine.begin() as conn:
        lot = ledger.grant(conn, user, credits=3, key="g", description="Spring promotion", expires_at=soon)
        used = ledger.consume(conn, user, credits=2, key="c", description="Answer 16")
        ledger.reverse(conn, user, used.id, credits=1, key="r")
        ledger.correct(conn, user, lot.id, credits=1, key="x")
        held = ledger.hold(conn, user, credits=2, key="h", description="Answer 17")
    page = text(site.get(user, "/billing/history", headers=HTML).text)
    assert "You have 3 credits. 2 of them are set aside for work under way, 1 can be spent." in page
    assert "1 credit expires on 1 March 2060." in page
    assert "Answer 17 set aside \N{MINUS SIGN}2" in page
    assert "Answer 16 given back +1" in page
    assert "Spring promotion taken back \N{MINUS SIGN}1" in page
    assert "1 credit<" in site.get(user, "/billing/badge", headers=HTMX).text
    workshop = site.world.workshop(user)
    unlock = f"/billing/workshops/{workshop}/unlock"
    assert "This will use 1 credit. You have 1." in site.get(user, unlock, headers=HTML).text
    assert "You have 1 credit." in text(site.get(user, f"/paid/{workshop}", headers=HTML).text)

    with site.world.engine.begin() as conn:
        ledger.hold(conn, user, credits=1, key="h2", expires_in=dt.timedelta(minutes=5))
    assert site.get(user, unlock, headers=HTML).status_code == 402
    locked = site.get(user, f"/paid/{workshop}", headers=HTML).text
    assert "You have 0 credits. One unlocks this workshop." in locked
    assert "Buy credits" in locked
    assert site.post(user, unlock, headers=HTML).status_code == 402
    with site.world.engine.begin() as conn:
        ledger.capture(conn, user, held.id)
    assert site.balance(user) == 1


def test_an_expired_hold_and_expired_credits_are_not_counted_by_the_badge(make_site: Callable[..., Site]) -> None:
    """Also where the host's page has it from the account, and no query more for a user who has neither."""
    site = make_site()
    ledger, user, plain = site.world.ledger, site.world.user(credits=2), site.world.user(credits=2)
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
    with site.world.engine.begin() as conn:
        ledger.grant(conn, user, credits=3, key="g", description="Spring promotion", expires_at=soon)
        ledger.hold(conn, user, credits=4, key="h", description="Answer 17")

    async def page(ts: Fragments = Depends(site.billing.fragments)) -> HTMLResponse:  # noqa: B008
        return HTMLResponse(ts.badge)

    page.__annotations__.update(ts=Fragments)
    site.app.get("/page")(page)
    assert "Balance: 1 credit. " in site.get(user, "/page").text
    site.world.pass_time(days=2)
    for path in ("/page", "/billing/badge"):
        assert "Balance: 2 credits. " in site.get(user, path).text
    history = text(site.get(user, "/billing/history", headers=HTML).text)
    assert "You have 2 credits. " in history
    assert "Answer 17 not used" in history

    asked: list[str] = []
    sa.event.listen(site.world.engine, "before_cursor_execute", lambda *event_args: asked.append(event_args[2]))
    for path, queries in (("/page", 1), ("/billing/badge", 1), ("/billing/history", 2), ("/billing/api/balance", 1)):
        asked.clear()
        assert site.get(plain, path, headers=HTML).status_code == 200
        assert len(asked) == queries, (path, asked)
