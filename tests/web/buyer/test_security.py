"""Requests that a hostile browser, page or user can send."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers
from starlette.requests import Request

from sites import HTML, ORIGIN, Shop, Site
from tallystick.config import Config
from tallystick.errors import CrossSiteRequest, TallystickError
from tallystick.web import Texts
from tallystick.web.buyer.buyer_request import redirect
from tallystick.web.buyer.entrance import StarletteRequest
from tallystick.web.buyer.refusals import MEANINGS
from tallystick.web.shared.addresses import return_address
from tallystick.web.shared.requests import check_same_site, limited

pytestmark = pytest.mark.one_server  # it is about requests and answers

EVIL = "https://evil.example"
XSS = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{7*7}}"


def test_a_forged_user(site: Site) -> None:
    """A key that current_user vouches for but the database does not know."""
    stranger = uuid.uuid4()
    for path in ("/billing/api/balance", "/report"):
        assert site.get(stranger, path).json()["type"].endswith("unknown-user")
    workshop = site.world.workshop(site.world.user(credits=1))
    assert site.post(stranger, f"/billing/api/workshops/{workshop}/unlock").status_code in {403, 404}
    assert site.client.get("/billing/api/balance").status_code == 401


@pytest.mark.parametrize("accept", [{}, HTML])
def test_another_users_workshop_is_as_one_that_is_not_there(site: Site, accept: dict[str, str]) -> None:
    owner, other = site.world.user(credits=1), site.world.user(credits=1)
    theirs, nobodys = site.world.workshop(owner, title="Secret plan"), uuid.uuid4()
    for method, path in (
        ("GET", "/paid/{}"),
        ("GET", "/billing/api/workshops/{}/access"),
        ("POST", "/billing/api/workshops/{}/unlock"),
        ("GET", "/billing/workshops/{}/unlock"),
        ("POST", "/billing/workshops/{}/unlock"),
        ("GET", "/billing/workshops/{}/unlocked"),
        ("GET", "/billing/pricing?workshop={}"),
        ("GET", "/billing/cancelled?workshop={}"),  # without the workshop, which may be gone after a payment
    ):
        answers = [
            site.client.request(method, path.format(key), headers=site.as_(other) | accept) for key in (theirs, nobodys)
        ]
        assert {a.status_code for a in answers} == {200 if "cancelled" in path else 404}, path
        assert answers[0].text.replace(str(theirs), "") == answers[1].text.replace(str(nobodys), "")
        assert "Secret plan" not in answers[0].text
    assert (site.balance(owner), site.balance(other)) == (1, 1)


CROSS_SITE: tuple[dict[str, str], ...] = (
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},  # another subdomain may be someone else's
    {"sec-fetch-site": "cross-site", "origin": EVIL},
    {"origin": EVIL},  # a browser from before Sec-Fetch-Site
    {"origin": "null"},
    {"origin": "http://testserver.evil.example"},
)
SAME_SITE: tuple[dict[str, str], ...] = (
    {"sec-fetch-site": "same-origin", "origin": ORIGIN},
    {"sec-fetch-site": "none"},
    {"origin": ORIGIN},
    {},  # no browser
)


@pytest.mark.parametrize("headers", CROSS_SITE)
def test_a_form_on_another_site_changes_nothing(site: Site, headers: dict[str, str]) -> None:
    user = site.world.user(credits=1)
    workshop = site.world.workshop(user)
    for method, path in (
        ("POST", f"/billing/workshops/{workshop}/unlock"),
        ("POST", f"/billing/api/workshops/{workshop}/unlock"),
        ("POST", "/billing/welcome"),
        ("PUT", "/billing/api/onboarding"),
        ("POST", "/billing/checkout"),
        ("POST", "/billing/api/checkout"),
    ):
        answer = site.client.request(method, path, headers=site.as_(user) | headers)
        assert answer.status_code == 403, path
        assert answer.json()["type"].endswith("cross-site-request")
    assert site.balance(user) == 1
    assert site.get(user, "/billing/api/onboarding").json() == {"complete": False}
    assert site.get(user, "/billing/api/balance", headers=headers).status_code == 200  # reading is for everyone


@pytest.mark.parametrize("headers", SAME_SITE)
def test_our_own_forms_do(site: Site, headers: dict[str, str]) -> None:
    user = site.world.user(credits=1)
    answer = site.post(user, f"/billing/workshops/{site.world.workshop(user)}/unlock", headers=headers)
    assert answer.status_code == 303
    assert site.balance(user) == 0


ELSEWHERE = (
    EVIL,
    "//evil.example",
    "/\\evil.example",
    "\\\\evil.example",
    "/\t/evil.example",
    "/\n/evil.example",
    " //evil.example",
    "https:evil.example",
    "https:/evil.example",
    "http://testserver@evil.example",
    "http://testserver.evil.example/",
    "javascript:alert(1)",
    "data:text/html,x",
    "evil.example",
    "?x",
    "",
    "/a\r\nSet-Cookie: x=1",
    "/é",
    "http://[evil",
    "/" + "a" * 2001,
)


@pytest.mark.parametrize("address", ELSEWHERE)
def test_no_open_redirect(address: str) -> None:
    assert return_address(address, "/home", [ORIGIN]) == "/home"


@pytest.mark.parametrize("address", ["/", "/workshops/7/steps/7?x=1#y", "/a//b", f"{ORIGIN}/x", "/%2F%2Fevil.example"])
def test_our_own_addresses_are_returned_to(address: str) -> None:
    assert return_address(address, "/home", [ORIGIN]) == address


def test_a_redirect_quotes_what_no_header_can_hold() -> None:
    assert redirect("/x/Ж 1?a=%2Fé&b=~1").headers == {"Location": "/x/%D0%96%201?a=%2F%C3%A9&b=~1"}


@pytest.mark.parametrize("address", [a for a in ELSEWHERE if 0 < len(a) < 2000])
def test_no_open_redirect_through_a_route(site: Site, address: str) -> None:
    user = site.world.user()
    done = site.post(user, "/billing/welcome", data={"return_to": address})
    assert (done.status_code, done.headers["location"]) == (303, "/")
    page = site.get(user, "/billing/pricing", params={"return_to": address}, headers=HTML)
    assert "evil" not in page.text
    assert "javascript:" not in page.text


def test_headers_cannot_be_injected(site: Site) -> None:
    user = site.world.user(credits=1)
    workshop = site.world.workshop(user)
    for value in ("/x\r\nSet-Cookie: admin=1", "/x%0d%0aSet-Cookie: admin=1"):
        for answer in (
            site.post(user, "/billing/welcome", data={"return_to": value}),
            site.post(user, f"/billing/workshops/{workshop}/unlock", data={"return_to": value}),
        ):
            assert "set-cookie" not in answer.headers
            assert "\n" not in answer.headers["location"]


def test_a_title_or_description_is_text(site: Site) -> None:
    user = site.world.user()
    workshop = site.world.workshop(user, title=XSS)
    pages = [site.get(user, f"/paid/{workshop}", headers=HTML)]
    with site.world.engine.begin() as conn:
        site.world.buy(conn, user, 2)
        site.world.ledger.consume(conn, user, key="k", description=XSS)
    pages += [
        site.get(user, f"/billing/workshops/{workshop}/unlock", headers=HTML),
        site.get(user, f"/billing/pricing?workshop={workshop}", headers=HTML),
        site.get(user, f"/billing/cancelled?workshop={workshop}", headers=HTML),
        site.get(user, "/billing/history", headers=HTML),
        site.get(user, f"/billing/workshops/{XSS}/unlock".replace("/script", "script"), headers=HTML),
        site.get(user, "/billing/history", params={"before": XSS[:36]}, headers=HTML),
        site.get(user, "/billing/pricing", params={"return_to": f"/{XSS}"}, headers=HTML),
    ]
    for page in pages:
        assert "<script>alert" not in page.text
        assert "<img" not in page.text
        assert page.headers["content-type"].startswith("text/html")


def test_no_page_needs_inline_script_or_style(site: Site) -> None:
    user = site.world.user(credits=1)
    workshop = site.world.workshop(user)
    for path in ("pricing", "history", "welcome", "cancelled", f"workshops/{workshop}/unlock", "badge"):
        page = site.get(user, f"/billing/{path}", headers=HTML)
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self';" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        assert page.headers["cache-control"] == "no-store"
        assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:|hx-on", page.text)
        assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", page.text))


FORM = "application/x-www-form-urlencoded"


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/billing/api/checkout", {"json": {"pack": "x" * 100_000}}),
        ("/billing/checkout", {"data": {"pack": "x" * 100_000}}),
        ("/billing/welcome", {"data": {"return_to": "/" * 100_000}}),
        ("/billing/webhooks/stripe", {"content": b"x" * (1024 * 1024 + 1)}),
        ("/billing/webhooks/stripe", {"content": (b"x" * 65536 for _ in range(17))}),  # of no announced length
        ("/billing/checkout", {"content": (b"x" * 65536 for _ in range(2)), "headers": {"content-type": FORM}}),
    ],
)
def test_oversize_bodies(site: Site, path: str, more: dict[str, Any]) -> None:
    answer = site.post(site.world.user(), path, **more)
    assert answer.status_code == 413
    assert answer.json()["type"].endswith("request-too-large")
    if "webhooks" in path:
        return
    announced = site.post(site.world.user(), path, content=b"x", headers={"content-length": "99999999"})
    assert announced.status_code == 413


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"pack": 7}', b"\xff\xfe", b'{"pack":"\\ud800"}', b"null"])
def test_bodies_that_make_no_sense(site: Site, body: bytes) -> None:
    answer = site.post(
        site.world.user(), "/billing/api/checkout", content=body, headers={"content-type": "application/json"}
    )
    assert 400 <= answer.status_code < 500, answer.text


async def _trickle() -> dict[str, Any]:
    """A client that sends a byte now and then."""
    await asyncio.sleep(0.02)
    return {"type": "http.request", "body": b"x", "more_body": True}


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/billing/welcome", FORM), ("/billing/api/onboarding", "application/json")],
)
def test_a_body_that_takes_too_long(site: Site, monkeypatch: pytest.MonkeyPatch, path: str, kind: str) -> None:
    monkeypatch.setitem(limited.__kwdefaults__, "limit_s", 0.2)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = {"x-session": str(site.world.user()), "content-type": kind, "host": "testserver"}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "path": path,
        "method": "PUT" if "api" in path else "POST", "raw_path": path.encode(), "query_string": b"",
        "server": ("testserver", 80), "client": ("127.0.0.1", 1),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    with ThreadPoolExecutor(1) as other:  # a browser that is open in this thread has its own event loop
        other.submit(asyncio.run, site.app(scope, _trickle, send)).result(60)
    assert sent[0]["status"] == 408, sent
    assert json.loads(sent[1]["body"])["detail"] == "It did not arrive whole, and nothing was changed. Send it again."


@pytest.mark.parametrize("path", ["pricing", "welcome", "cancelled"])
@pytest.mark.parametrize("return_to", ["/" + "a" * 2_000, "/" + "a" * 60_000, "/?q=" + "é" * 700])
def test_a_page_is_shown_whatever_the_length_of_return_to(site: Site, path: str, return_to: str) -> None:
    page = site.get(site.world.user(), f"/billing/{path}", params={"return_to": return_to}, headers=HTML)
    assert page.status_code == 200
    assert "aaaa" not in page.text
    workshop = site.world.workshop(user := site.world.user(credits=1))
    spent = site.post(user, f"/billing/workshops/{workshop}/unlock", data={"return_to": return_to}, headers=HTML)
    assert spent.status_code == 303
    assert "return_to=%2F&" in spent.headers["location"]


def test_fields_that_we_do_not_know(site: Site) -> None:
    """A form may carry a host's own token; in JSON a name that we do not know is a mistake of the client's."""
    user = site.world.user()
    form = {"return_to": "/x", "csrf_token": "of the host's own"}
    assert site.post(user, "/billing/welcome", data=form, headers=HTML).headers["location"] == "/x"
    refused = site.client.put(
        "/billing/api/onboarding", headers=site.as_(user), json={"complete": False, "compleat": True}
    )
    assert refused.status_code == 422
    assert "compleat" in refused.json()["detail"]
    assert site.get(user, "/billing/api/onboarding").json() == {"complete": True}


NUL_FORMS = ({"key": "\0a"}, {"pack": "\0"}, {"workshop": "\0"}, {"return_to": "/\0"})


@pytest.mark.parametrize("form", NUL_FORMS)
def test_a_nul_in_a_form(shop: Shop, form: dict[str, str]) -> None:
    user = shop.world.user()
    answer = shop.post(user, "/billing/checkout", data={"pack": "Flight Crew", "key": "k"} | form, headers=HTML)
    assert answer.status_code == {"key": 422, "return_to": 303}.get(next(iter(form)), 404)
    if "key" in form:
        assert "A value is not valid" in answer.text
    for text in (answer.text, str(answer.headers)):
        assert "SELECT" not in text
        assert "web:" not in text


@pytest.mark.parametrize(
    "path", ["workshops/%00/unlock", "pricing?workshop=%00", "success?session_id=%00", "cancelled?workshop=%00",
             "history?before=%00", "welcome?return_to=%00"],
)  # fmt: skip
def test_a_nul_in_an_address(shop: Shop, path: str) -> None:
    assert shop.get(shop.world.user(), f"/billing/{path}", headers=HTML).status_code in {200, 404, 422}


def test_a_host_header_does_not_decide_where_stripe_sends_people(site: Site) -> None:
    forged = Request(
        {"type": "http", "method": "GET", "path": "/", "scheme": "https", "headers": [(b"host", b"evil.example")]}
    )
    assert site.billing.renderer.absolute(StarletteRequest(forged), "/billing/success") == f"{ORIGIN}/billing/success"


def test_no_secret_of_stripes_in_any_answer(site: Site) -> None:
    user = site.world.user(credits=1)
    for path in ("/billing/pricing", "/billing/history", "/openapi.json"):
        page = site.get(user, path, headers=HTML).text
        assert "sk_test" not in page
        assert "whsec" not in page


def test_every_problem_has_a_title_and_a_sentence() -> None:
    texts = Texts()
    for kind, answer in MEANINGS.items():
        if kind is not TallystickError:
            assert texts.problem_titles.get(answer.name), answer.name
            error = kind("x", balance=0, held=0, available=0, required=1)
            if answer.status != 422:  # there our own message says which value is wrong
                assert texts.problem(error, answer.name) != texts.problem_default, answer.name


def test_the_refusal_of_another_site_names_a_setting_that_there_is() -> None:
    with pytest.raises(CrossSiteRequest) as refused:
        check_same_site("POST", Headers({"origin": EVIL}))
    assert "checkout_origins" in refused.value.message
    assert "checkout_origins" in Config.model_fields


def test_the_table_of_statuses_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "web.md").read_text("utf-8")
    for error, answer in MEANINGS.items():
        row = rf"\| `{error.__name__}` +\| {answer.status} +\| `{answer.name}` +\|"
        assert re.search(row, page), f"docs/web.md lacks {error.__name__} | {answer.status} | {answer.name}"
