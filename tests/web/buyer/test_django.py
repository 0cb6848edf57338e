"""The buyer's side in Django, through the example there: the same pages, by Django's means."""

from __future__ import annotations

import asyncio
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import jinja2
import pytest
import sqlalchemy as sa

from pages import ROOT, blocks
from sites import HTMX, ODD_KEYS, DjangoShop
from tallystick.schema import INT32_MAX

pytestmark = pytest.mark.one_server


def test_a_step_is_behind_a_credit(django_shop: DjangoShop) -> None:
    user = django_shop.user()
    workshop = django_shop.workshop(user)
    client = django_shop.client(user)
    assert client.get(f"/workshops/{workshop}/steps/6").status_code == 200
    for address in (f"/workshops/{workshop}/steps/7", f"/workshops/{workshop}/summary"):  # a class, and a function
        refused = client.get(address)
        assert refused.status_code == 402
        page = refused.content.decode()
        assert "Mobile App Discovery continues here" in page
        assert "You have 0 credits. One unlocks this workshop." in page
        assert '<a class="brand" href="/">Workshops</a>' in page  # in the app's own layout, a template of Django's
        assert '<div class="filler">' in page
        assert f"/billing/pricing?return_to=%2Fworkshops%2F{workshop}" in page


def test_a_program_gets_a_problem(django_shop: DjangoShop) -> None:
    user = django_shop.user()
    workshop = django_shop.workshop(user)
    refused = django_shop.client(user).get(f"/workshops/{workshop}/steps/7", headers={"Accept": "application/json"})
    assert (refused.status_code, refused["Content-Type"]) == (402, "application/problem+json; charset=utf-8")
    answer = refused.json()
    assert (answer["type"], answer["balance"], answer["required"]) == ("urn:tallystick:problem:workshop-locked", 0, 1)
    assert (answer["workshop"], answer["checkout"]) == (str(workshop), None)
    assert [pack["credits"] for pack in answer["packs"]] == [1, 3, 10]


def test_spending_asks_first_and_then_says_what_it_did(django_shop: DjangoShop) -> None:
    user = django_shop.user(credits=3)
    workshop = django_shop.workshop(user)
    client = django_shop.client(user, checks_csrf=True)
    address = f"/billing/workshops/{workshop}/unlock"
    asked = client.get(f"{address}?return_to=/workshops/{workshop}/steps/7")
    assert "This will use 1 credit. You have 3." in asked.content.decode()
    assert client.post(address, {"return_to": "/"}).status_code == 403  # Django's, without the token of the form
    assert django_shop.balance(user.email) == 3

    done = client.post(address, {"return_to": f"/workshops/{workshop}/steps/7", "csrfmiddlewaretoken": token(asked)})
    assert done.status_code == 303
    shown = client.get(done["Location"]).content.decode()
    assert "1 credit used. 2 left." in shown
    assert f'href="/workshops/{workshop}/steps/7"' in shown
    again = client.post(address, {"csrfmiddlewaretoken": token(asked)})
    assert "unlocked already. Nothing was charged" in client.get(again["Location"]).content.decode()
    assert client.get(f"/workshops/{workshop}/steps/7").status_code == 200
    assert django_shop.balance(user.email) == 2


def test_htmx_gets_the_dialog_alone(django_shop: DjangoShop) -> None:
    user = django_shop.user(credits=1)
    client = django_shop.client(user)
    address = f"/billing/workshops/{django_shop.workshop(user)}/unlock"
    assert client.get(address, headers=HTMX).content.decode().lstrip().startswith("<dialog")
    done = client.post(address, headers=HTMX)
    assert "1 credit used. 0 left." in done.content.decode()
    assert done["HX-Trigger"] == "tallystick:balance"
    assert "0 credits" in client.get("/billing/badge", headers=HTMX).content.decode()


def test_the_view_of_a_refusal_keeps_djangos_transaction(django_shop: DjangoShop) -> None:
    user = django_shop.user()
    workshop = django_shop.workshop(user)
    refused = django_shop.client(user).post(f"/billing/workshops/{workshop}/unlock")
    assert refused.status_code == 402
    assert "You have 0 credits." in refused.content.decode()


def test_nothing_is_charged_for_a_workshop_that_is_open_already(django_shop: DjangoShop) -> None:
    from django.test import RequestFactory

    from django_workshops.billing import billing
    from tallystick.web.buyer.buyer_request import Reply
    from tallystick.web.django import DjangoBilling
    from tallystick.web.django.django_billing import DjangoRequest

    free = DjangoBilling(billing.config.model_copy(update={"paywall": False}))
    request = DjangoRequest(RequestFactory().post("/", headers={"Accept": "text/html"}))
    for credits in (0, 2):
        user = django_shop.user(credits=credits)
        workshop = str(django_shop.workshop(user))
        sent = free.pages.unlock(connection(), request, user.pk, workshop, return_to=None)
        assert isinstance(sent, Reply)
        assert sent.headers["Location"].endswith("spent=0")
        assert django_shop.balance(user.email) == credits


@pytest.mark.parametrize("key", ODD_KEYS)
def test_the_key_of_a_workshop_may_hold_any_character(django_shop: DjangoShop, key: str) -> None:
    from django.test import RequestFactory
    from django.urls import resolve

    from tallystick.web.django.django_billing import DjangoRequest

    client = django_shop.client(django_shop.user())
    for name in ("unlock", "unlock_now", "unlocked"):
        address = DjangoRequest(RequestFactory().get("/")).url(name, workshop=key)
        assert address == f"/billing/workshops/{quote(key, safe='')}/{name.removesuffix('_now')}"
        assert resolve(unquote(address)).kwargs == {"workshop": key}
        assert client.get(address).status_code == 404  # the example's keys are numbers


def test_another_users_workshop_is_not_there(django_shop: DjangoShop) -> None:
    workshop = django_shop.workshop(django_shop.user())
    client = django_shop.client(django_shop.user(credits=1))
    for address in (f"/billing/workshops/{workshop}/unlock", "/billing/workshops/no-number/unlock"):
        assert client.get(address).status_code == client.post(address).status_code == 404
    assert client.get(f"/workshops/{workshop}/steps/7").status_code == 404


def test_nobody_is_sent_to_djangos_sign_in_and_back(django_shop: DjangoShop) -> None:
    client = django_shop.client()
    sent = client.get("/billing/history?before=7")
    assert (sent.status_code, sent["Location"]) == (303, "/sign-in?next=%2Fbilling%2Fhistory%3Fbefore%3D7")
    assert client.get("/billing/pricing", headers=HTMX)["HX-Redirect"] == "/sign-in?next=%2Fbilling%2Fpricing"
    assert client.get("/billing/badge", headers=HTMX).status_code == 204
    assert client.get("/billing/history", headers={"Accept": "*/*"}).status_code == 401


def test_a_buyer_returns_to_the_whole_address(django_shop: DjangoShop) -> None:
    from django.test import RequestFactory

    from tallystick.web.django.django_billing import DjangoRequest

    user = django_shop.user()
    here = f"/workshops/{django_shop.workshop(user)}/steps/7?x=1&q=a%20b%26c&r=%C3%A9"
    locked = django_shop.client(user).get(here).content.decode()
    (buy,) = re.findall(r'href="([^"]+/pricing[^"]*)"', locked)
    assert parse_qs(urlsplit(unescape(buy)).query)["return_to"] == [here]
    history = "/billing/history?before=7&q=a%20b%26c"
    assert django_shop.client().get(history)["Location"] == f"/sign-in?next={quote(history, safe='')}"
    for path in ("/gr%C3%B6%C3%9Fe%202?a=1", "/a%23b", "/50%25"):
        assert DjangoRequest(RequestFactory().get(path)).address == path


def test_the_history_and_its_file(django_shop: DjangoShop) -> None:
    user = django_shop.user(credits=3)
    client = django_shop.client(user)
    client.post(f"/billing/workshops/{django_shop.workshop(user)}/unlock")
    page = client.get("/billing/history").content.decode()
    assert "You have 2 credits." in page
    assert page.index("Mobile App Discovery") < page.index("A present")
    file = client.get("/billing/history.csv")
    assert file["Content-Disposition"] == 'attachment; filename="credits.csv"'
    lines = b"".join(file.streaming_content).decode().splitlines()
    assert len(lines) == 3
    assert client.get("/billing/history?before=no-cursor").status_code == 422
    assert client.post("/billing/history").status_code == 405


@pytest.mark.filterwarnings("error:StreamingHttpResponse")
def test_the_file_of_the_history_under_asgi(django_shop: DjangoShop) -> None:
    from asgiref.sync import sync_to_async
    from django.db import connections
    from django.test import AsyncClient

    user = django_shop.user(credits=3)

    async def lines() -> list[str]:
        client = AsyncClient()
        await client.aforce_login(user)
        answer = await client.get("/billing/history.csv")
        assert (answer.status_code, answer.is_async) == (200, True)
        found = b"".join([part async for part in answer]).decode().splitlines()
        await sync_to_async(connections.close_all)()
        return found

    with ThreadPoolExecutor(1) as thread:  # the browser's loop may run in this one
        head, row = thread.submit(asyncio.run, lines()).result()
    assert ("grant" in row, "," in head) == (True, True)


def test_the_headers_of_our_pages(django_shop: DjangoShop) -> None:
    client = django_shop.client(django_shop.user())
    page = client.get("/billing/pricing")
    assert "default-src 'none'" in page["Content-Security-Policy"]
    assert page["Cache-Control"] == "no-store"
    (style,) = re.findall(r'href="(/billing/static/tallystick\.css\?v=\w+)"', page.content.decode())
    assert client.get(style)["Cache-Control"] == "public, max-age=31536000, immutable"
    assert client.get(style.partition("?")[0])["Cache-Control"] == "no-cache"
    assert client.get("/billing/static/nothing.css").status_code == 404


def test_the_welcome_is_remembered(django_shop: DjangoShop) -> None:
    client = django_shop.client(django_shop.user())
    assert "ts-welcome" in client.get("/").content.decode()
    assert client.post("/billing/welcome", {"return_to": "//evil.example"})["Location"] == "/"
    assert "ts-welcome" not in client.get("/").content.decode()


def test_buying(django_shop: DjangoShop) -> None:
    user = django_shop.user()
    workshop = django_shop.workshop(user)
    client = django_shop.client(user, checks_csrf=True)
    pricing = client.get(f"/billing/pricing?workshop={workshop}&return_to=/workshops/{workshop}/steps/7")
    form = {"pack": "Flight Crew", "key": "k", "workshop": str(workshop), "csrfmiddlewaretoken": token(pricing)}
    started = client.post("/billing/checkout", form, headers={"Host": django_shop.origin.partition("://")[2]})
    assert started["Location"].startswith(django_shop.double.url), started.content
    again = client.post("/billing/checkout", form)
    assert again["Location"] == started["Location"]
    session = urlsplit(started["Location"]).path.rpartition("/")[2]
    waiting = client.get("/billing/success", {"session_id": session, "workshop": workshop})
    assert "Your payment is on its way" in waiting.content.decode()
    assert 'hx-trigger="every 3s"' in waiting.content.decode()
    assert "looked=1" in waiting.content.decode()
    slower = client.get("/billing/success", {"session_id": session, "looked": 20}).content.decode()
    assert 'hx-trigger="every 30s"' in slower
    assert (
        "hx-get"
        not in client.get("/billing/success", {"session_id": session, "looked": 38}, headers=HTMX).content.decode()
    )
    assert "Nothing was charged." in client.get("/billing/cancelled").content.decode()

    django_shop.double.pay(session)
    page = client.get("/billing/success", {"session_id": session, "workshop": workshop}).content.decode()
    assert "3 credits added. You have 3." in page
    assert "Use 1 credit to unlock Mobile App Discovery" in page
    over = client.get(client.post("/billing/checkout", form)["Location"])  # the form again, as by the back button
    assert "Use 1 credit to unlock Mobile App Discovery" in over.content.decode()
    for address in (f"/billing/success?session_id={session}", "/billing/cancelled?"):
        assert client.get(f"{address}&workshop=0").status_code == 200  # one that was deleted meanwhile
    stranger = django_shop.client(django_shop.user())
    assert stranger.get("/billing/success", {"session_id": session}).status_code == 404
    unknown = form | {"pack": "Nothing", "key": "l"}
    assert client.post("/billing/checkout", unknown).status_code == 404


def test_a_nul_or_a_long_key_is_refused(django_shop: DjangoShop) -> None:
    client = django_shop.client(django_shop.user())
    host = {"Host": django_shop.origin.partition("://")[2]}
    for form, status in (
        ({"key": "\0a"}, 422),
        ({"key": "x" * 201}, 422),
        ({"pack": "\0"}, 404),
        ({"workshop": "\0"}, 404),
        ({"workshop": ""}, 303),
        ({"return_to": "/\0"}, 303),
    ):
        answer = client.post("/billing/checkout", {"pack": "Flight Crew"} | form, headers=host)
        assert answer.status_code == status, form
        assert "web:" not in answer.content.decode()
    for path in ("workshops/%00/unlock", "pricing?workshop=%00", "success?session_id=%00", "cancelled?workshop=%00",
                 "history?before=%00", "welcome?return_to=%00"):  # fmt: skip
        assert client.get(f"/billing/{path}").status_code in {200, 404, 422}, path


def test_a_payment_whose_credits_the_ledger_refuses(django_shop: DjangoShop) -> None:
    from django_workshops.billing import billing

    user = django_shop.user()
    client = django_shop.client(user)
    host = {"Host": django_shop.origin.partition("://")[2]}
    started = client.post("/billing/checkout", {"pack": "Flight Crew"}, headers=host)
    session = urlsplit(started["Location"]).path.rpartition("/")[2]
    billing.ledger.grant(connection(), user.pk, credits=INT32_MAX - 1, key="k", description="A present")
    django_shop.double.pay(session)
    page = client.get("/billing/success", {"session_id": session}).content.decode()
    assert f"the credits could not be added. Tell us: reference {session}" in page
    billing.ledger.consume(connection(), user.pk, credits=5, key="l")
    assert "3 credits added" in client.get("/billing/success", {"session_id": session}).content.decode()


def test_a_delivery_needs_a_signature_and_no_token(django_shop: DjangoShop) -> None:
    client = django_shop.client(checks_csrf=True)
    for address in ("/billing/webhooks/stripe", "/billing/webhooks/stripe/"):
        assert client.post(address, b"{}", content_type="application/json").status_code == 400
        assert client.get(address).status_code == 405


def test_djangos_login_required_middleware_leaves_our_pages_to_themselves(django_shop: DjangoShop) -> None:
    from django.conf import settings
    from django.test import override_settings

    everywhere = "django.contrib.auth.middleware.LoginRequiredMiddleware"
    with override_settings(MIDDLEWARE=[*settings.MIDDLEWARE, everywhere]):
        client = django_shop.client()
        assert client.get("/").status_code == 302  # the app's own pages are behind it
        for address in ("/billing/webhooks/stripe", "/billing/webhooks/stripe/"):
            assert client.post(address, b"{}", content_type="application/json").status_code == 400
        assert client.get("/billing/static/tallystick.css").status_code == 200
        assert client.get("/billing/history", headers={"Accept": "application/json"}).status_code == 401
        assert client.get("/billing/badge", headers=HTMX).status_code == 204
        sent = client.get("/billing/history")
        assert (sent.status_code, sent["Location"]) == (303, "/sign-in?next=%2Fbilling%2Fhistory")


def test_the_admin_shows_the_ledger_and_changes_nothing(django_shop: DjangoShop) -> None:
    from django.contrib.auth import get_user_model

    root = get_user_model().objects.create_superuser("root", email="root@example.com")
    client = django_shop.client(root)
    user = django_shop.user(credits=3)
    page = client.get(f"/admin/auth/user/{user.pk}/change/").content.decode()
    assert "You have 3 credits." in page
    (row,) = re.findall(r"<tr><td>(.*?)</td></tr>", page)
    cells = row.split("</td><td>")
    assert (cells[0], *cells[2:]) == ("1", "grant", "completed", "+3", "3", "A present")
    assert client.get(f"/admin/auth/user/{user.pk}/delete/").status_code == 403
    assert 'name="credit_ledger"' not in page
    assert client.get("/admin/auth/user/add/").status_code == 200
    assert 'value="delete_selected"' not in client.get("/admin/auth/user/").content.decode()


def admin_of(model: Any) -> tuple[Any, Any]:
    """The admin of a model, with the ledger, and a superuser's request."""
    from django.contrib import admin
    from django.contrib.auth import get_user_model
    from django.test import RequestFactory

    from django_workshops.billing import billing
    from tallystick.web.django import LedgerAdmin

    kind = type("WithLedger", (LedgerAdmin, admin.ModelAdmin), {"billing": billing})
    request = RequestFactory().get("/")
    request.user = get_user_model()(is_superuser=True, is_active=True)
    return kind(model, admin.site), request


def test_a_page_of_the_admins_writes_no_old_balance_back(django_shop: DjangoShop) -> None:
    from django.contrib import admin
    from django.db import models

    from django_workshops.billing import billing
    from tallystick.web.django import LedgerAdmin

    class Person(models.Model):  # noqa: DJ008 - nothing shows one
        username = models.TextField()
        credits = models.BigIntegerField(db_column="credit_balance", default=0)

        class Meta:
            app_label = "django_workshops"
            db_table = "auth_user"
            managed = False

    shown, request = admin_of(Person)
    assert shown.get_readonly_fields(request) == ("credit_ledger", "credits")

    user = django_shop.user(credits=3)
    opened, listed = shown.get_object(request, str(user.pk)), shown.get_queryset(request).get(pk=user.pk)
    loaded = Person.objects.get(pk=user.pk)
    billing.ledger.consume(connection(), user.pk, credits=1, key="meanwhile")
    opened.username = listed.username = loaded.username = "renamed"
    opened.save()
    listed.save()
    shown.save_model(request, loaded, None, change=True)
    assert Person.objects.get(pk=user.pk).username == "renamed"
    assert django_shop.balance(user.email) == 2

    with pytest.raises(TypeError, match=r"ModelAdmin before LedgerAdmin.*class Wrong\(LedgerAdmin, …\)"):
        type("Wrong", (admin.ModelAdmin, LedgerAdmin), {})


def test_a_list_of_users_takes_one_query(django_shop: DjangoShop) -> None:
    from django.db import models
    from django.test.utils import CaptureQueriesContext

    class Listed(models.Model):  # noqa: DJ008 - nothing shows one
        username = models.TextField()
        credit_balance = models.GeneratedField(  # as the snippet has it
            expression=models.Value(None, models.IntegerField()), output_field=models.IntegerField(), db_persist=True
        )

        class Meta:
            app_label = "django_workshops"
            db_table = "auth_user"
            managed = False

    shown, request = admin_of(Listed)
    mine = [django_shop.user(credits=number).pk for number in (1, 2, 3)]
    with CaptureQueriesContext(connection()) as sent:
        found = shown.get_queryset(request).filter(pk__in=mine).order_by("pk")
        assert [user.credit_balance for user in found] == [1, 2, 3]  # in a column of the app's own
    assert len(sent) == 1


def test_a_fault_of_the_databases_is_a_page_without_the_apps_layout(django_shop: DjangoShop) -> None:
    user = django_shop.user(credits=1)
    client, address = django_shop.client(user), f"/billing/workshops/{django_shop.workshop(user)}/unlock"
    with django_shop.engine.begin() as other, connection().cursor() as cursor:
        other.execute(sa.text("SELECT FROM auth_user WHERE id = :id FOR UPDATE"), {"id": user.pk})
        cursor.execute("SET lock_timeout = '50ms'")
        refused = client.post(address)
        cursor.execute("RESET lock_timeout")
    assert refused.status_code == 503
    page = refused.content.decode()
    assert '<main class="ts ts-main">' in page
    assert "Workshops</a>" not in page  # its layout shows the balance, and the transaction takes no query any more
    assert client.post(address).status_code == 303


def test_a_refused_purchase_leaves_the_transaction_of_a_testcase_as_it_is(django_shop: DjangoShop) -> None:
    from django.db import transaction

    user = django_shop.user(credits=1)
    client = django_shop.client(user)
    workshop = django_shop.workshop(user)
    django_shop.double.fault("POST", "/v1/checkout/sessions", 503, times=3)
    with transaction.atomic():
        assert client.post("/billing/checkout", {"pack": "Flight Crew"}).status_code == 503
        assert client.post(f"/billing/workshops/{workshop}/unlock").status_code == 303
    assert django_shop.balance(user.email) == 0


def test_stripe_refuses_the_sale(django_shop: DjangoShop, caplog: pytest.LogCaptureFixture) -> None:
    client = django_shop.client(django_shop.user())
    django_shop.double.fault("POST", "/v1/checkout/sessions", 401, times=2)
    page, answer = (
        client.post("/billing/checkout", {"pack": "Flight Crew"}, headers={"Accept": accepts})
        for accepts in ("text/html", "application/json")
    )
    assert (page.status_code, answer.status_code) == (503, 503)
    assert "The payment provider refused this" in page.content.decode()
    assert answer.json()["type"].endswith("payment-provider-refused")
    assert "Check STRIPE_SECRET_KEY" in caplog.text


def test_a_user_whom_the_ledger_does_not_know(django_shop: DjangoShop) -> None:
    from django.contrib import admin
    from django.contrib.auth.models import User
    from django.test import RequestFactory

    from django_workshops.billing import billing

    request = RequestFactory().get("/")
    request.user = User(pk=2**31 - 1)
    assert billing.fragments(request).badge == ""
    shown = admin.site.get_model_admin(User)
    assert shown.credit_ledger(request.user) == "No account: this user has no row in the mapped table."


def test_the_key_of_a_user_is_the_one_that_the_mapping_names(django_shop: DjangoShop) -> None:
    from django.contrib import admin
    from django.contrib.auth.models import AnonymousUser, User
    from django.test import RequestFactory

    from django_workshops.billing import billing
    from tallystick import HostMapping, UsersTable
    from tallystick.errors import NotSignedIn
    from tallystick.web.django import DjangoBilling, LedgerAdmin

    class WithLedger(LedgerAdmin, admin.ModelAdmin):
        pass

    user, request = django_shop.user(), RequestFactory().get("/")
    # a key beside the primary key, which as a number could be another user's; and a table that is not Django's
    for key, expected in (("id", user.pk), ("email", user.email), ("person_id", user.pk)):
        users = UsersTable(table="auth_user", key=key, key_type="text" if key == "email" else "integer")
        mapped = DjangoBilling(billing.config.model_copy(update={"host": HostMapping(users=users, workshops=None)}))
        WithLedger.billing = mapped
        request.user = user
        assert mapped.signed_in(request) == WithLedger(User, admin.site).user_key(user) == expected
        request.user = AnonymousUser()
        with pytest.raises(NotSignedIn):
            mapped.signed_in(request)


def test_it_does_not_start_to_sell_without_an_address(django_shop: DjangoShop) -> None:
    from django_workshops.billing import billing
    from tallystick.errors import ConfigError
    from tallystick.web.django import DjangoBilling, urls

    nowhere = billing.config.model_copy(update={"database_url": None})
    with pytest.raises(ConfigError, match=r"DATABASE_URL.*engine="):
        urls(DjangoBilling(nowhere))
    found, _ = urls(DjangoBilling(nowhere, engine=django_shop.engine))
    assert {"checkout", "success"} <= {each.name for each in found}


def test_an_app_extends_a_page_of_ours_in_its_own_layout(django_shop: DjangoShop) -> None:
    from django.test import RequestFactory

    from django_workshops.billing import billing
    from tallystick.web.django import DjangoBilling

    more = '{% extends "original/tallystick/welcome.html" %}{% block main %}<i>Hello</i>{{ super() }}{% endblock %}'
    own = DjangoBilling(
        billing.config, layout="billing.html", templates=jinja2.DictLoader({"tallystick/welcome.html": more})
    )
    request = RequestFactory().get("/", headers={"Accept": "text/html"})
    request.user = django_shop.user()
    page = own.response(request, own.pages.welcome(return_to=None)).content.decode()
    assert '<main class="ts wide"><i>Hello</i>' in " ".join(page.split()).replace("> <", "><")
    assert f"<title>{own.renderer.texts.welcome_title} · Workshops</title>" in page
    assert '<a class="brand" href="/">Workshops</a>' in page


def test_the_texts_follow_the_language_of_the_request(django_shop: DjangoShop) -> None:
    from django.test import RequestFactory
    from django.utils.translation import get_language, gettext_lazy, override

    from django_workshops.billing import billing
    from tallystick.web.buyer.texts import Texts
    from tallystick.web.django import DjangoBilling

    class Translated(Texts):
        welcome_title = gettext_lazy("Log in")
        welcome = (gettext_lazy("Log out"),)

        @property
        def language(self) -> str:  # type: ignore[override]
            return get_language()

    for layout in (None, "billing.html"):
        own = DjangoBilling(billing.config, texts=Translated(), layout=layout)
        request = RequestFactory().get("/", headers={"Accept": "text/html"})
        request.user = django_shop.user()
        for language, title, text in (("de", "Anmelden", "Abmelden"), ("en", "Log in", "Log out")):
            with override(language):
                page = own.response(request, own.pages.welcome(return_to=None)).content.decode()
            assert f"<title>{title}" in page
            assert text in page
            assert layout is not None or f'<html lang="{language}">' in page


def test_the_checks_before_a_view(django_shop: DjangoShop) -> None:
    from django.contrib.auth.models import AnonymousUser
    from django.http import HttpResponse
    from django.test import RequestFactory
    from django.views import View

    from django_workshops.billing import billing
    from tallystick.web.django import OpenWorkshopMixin

    def report(_request: Any) -> HttpResponse:
        return HttpResponse("the report")

    async def later(_request: Any) -> HttpResponse:
        return HttpResponse()

    guarded = billing.requires_credit(2)(report)
    for user, status in (
        (AnonymousUser(), 401),
        (django_shop.user(credits=1), 402),
        (django_shop.user(credits=2), 200),
    ):
        request = RequestFactory().get("/report")
        request.user = user
        answer = guarded(request)
        assert answer.status_code == status
    assert (answer["Cache-Control"], answer["Vary"]) == ("private", "Cookie")
    request = RequestFactory().get("/report", headers={"Accept": "text/html"})
    request.user = django_shop.user(credits=1)
    page = guarded(request).content.decode()
    assert "Not enough credits" in page
    assert "You have 1 credit. This takes 2." in page
    with pytest.raises(TypeError, match="later is async"):
        billing.requires_open_workshop(later)
    with pytest.raises(TypeError, match=r"View before OpenWorkshopMixin.*class Wrong\(OpenWorkshopMixin, …\)"):
        type("Wrong", (View, OpenWorkshopMixin), {})
    with pytest.raises(TypeError, match="Later is async"):
        type("Later", (OpenWorkshopMixin, View), {"get": later})


@pytest.mark.parametrize("names", [("shop",), ("shop", "money")])
def test_the_pages_inside_other_namespaces(
    django_shop: DjangoShop, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    from django.test import override_settings
    from django.urls import include, path

    import django_workshops.urls as project
    from django_workshops.billing import billing
    from tallystick.web.django import urls

    routes = [path("billing/", include(urls(billing)))]
    for name in names:
        routes = [path(f"{name}/", include((routes, name)))]
    outside = ModuleType("outside")
    outside.urlpatterns = [*routes, *(each for each in project.urlpatterns if "billing/" not in str(each.pattern))]
    monkeypatch.setitem(sys.modules, "outside", outside)
    user = django_shop.user()
    workshop = django_shop.workshop(user)
    prefix = "/".join(["", *reversed(names), "billing"])
    with override_settings(ROOT_URLCONF="outside"):
        client = django_shop.client(user)
        page = client.get(f"{prefix}/pricing")
        assert page.status_code == 200
        assert f'action="{prefix}/checkout"' in page.content.decode()
        refused = client.get(f"/workshops/{workshop}/steps/7")  # a page of the app's
        assert refused.status_code == 402
        assert f"{prefix}/pricing?return_to=" in refused.content.decode()


def test_the_page_on_django(django_shop: DjangoShop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from django.contrib import admin
    from django.contrib.auth.models import User
    from django.test import RequestFactory, override_settings

    made: dict[str, ModuleType] = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", django_shop.engine.url.render_as_string(hide_password=False))
    (tmp_path / "tallystick.toml").write_text(
        '[host.users]\ntable = "auth_user"\nkey_type = "integer"\n[host.workshops]\nkey_type = "bigint"\n'
    )
    for code in blocks(ROOT / "docs" / "django.md", "python"):
        if code.startswith("# "):
            name = code.partition("\n")[0][2:].removesuffix(".py").replace("/", ".")
            made[name] = ModuleType(name)
            monkeypatch.setitem(sys.modules, name, made[name])
            exec(compile(code, "docs/django.md", "exec", dont_inherit=True), made[name].__dict__)
    user = django_shop.user(credits=2)
    workshop = django_shop.workshop(user)
    request = RequestFactory().get("/", headers={"Accept": "application/json"})
    request.user = user
    steps = made["shop.steps"]
    with override_settings(ROOT_URLCONF="urls"):
        for view in (steps.last_step, steps.LastStep.as_view()):
            assert view(request, workshop=workshop).status_code == 402
        assert steps.report(request).status_code == 200
        made["shop.billing"].billing.pages.paywall.unlock(connection(), user.pk, workshop)
        for view in (steps.last_step, steps.LastStep.as_view()):
            assert view(request, workshop=workshop).content == b"The first screen"
        assert steps.report(request).status_code == 402
    shown = made["shop.admin"].WithLedger(User, admin.site)
    assert "You have 1 credit." in shown.credit_ledger(user)


def test_the_view_without_the_pages(django_shop: DjangoShop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from django.contrib.auth.models import User
    from django.test import RequestFactory

    from django_workshops.billing import billing

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tallystick.toml").write_text(
        '[host.users]\ntable = "auth_user"\nkey_type = "integer"\n[host.workshops]\nkey_type = "bigint"\n'
    )
    (code,) = (code for code in blocks(ROOT / "docs" / "django.md", "python") if "def unlock" in code)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/django.md", "exec", dont_inherit=True), names)

    def status(user: Any, workshop: int) -> int:
        request = RequestFactory().post("/")
        request.user = user
        return int(names["unlock"](request, workshop).status_code)

    user, other = django_shop.user(credits=1), django_shop.user()
    mine, gone = django_shop.workshop(user), django_shop.workshop(user)
    billing.accounts.delete_workshop(connection(), gone)
    assert (status(user, mine), status(user, mine)) == (200, 200)
    assert status(user, django_shop.workshop(user)) == 402
    for workshop in (gone, django_shop.workshop(other), 2**62):
        assert status(user, workshop) == 404
    billing.accounts.delete_user(connection(), other.pk)
    for user in (other, User(pk=2**31 - 1)):
        assert status(user, django_shop.workshop(other)) == 404


def connection() -> Any:
    from django.db import connection

    return connection


def token(page: Any) -> str:
    return re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', page.content.decode())[0]
