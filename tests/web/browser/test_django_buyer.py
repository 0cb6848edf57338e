"""The example in Django, in a browser: what differs there is Django's, its templates, forms and sessions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect

from web_browser import Visitor, problems_of

Visit = Callable[..., Visitor]

pytestmark = pytest.mark.one_server


def bought(buyer: Visitor) -> str:
    """From the paywall to Stripe and back; the address of the workshop's steps."""
    page = buyer.page
    steps = buyer.begin()
    buyer.go(steps + "7")
    expect(page.get_by_role("heading", name="Mobile App Discovery continues here")).to_be_visible()
    page.get_by_role("link", name="Buy credits").click()
    buyer.buy()
    expect(page.get_by_text("3 credits added. You have 3.")).to_be_visible()
    return steps


def test_from_the_paywall_to_stripe_and_back_unlocked(visit_django: Visit) -> None:
    buyer = visit_django()
    page = buyer.sign_in()
    steps = bought(buyer)
    buyer.go(steps + "7")
    page.get_by_role("link", name="Use 1 credit").click()
    expect(page.get_by_role("dialog").get_by_text("This will use 1 credit. You have 3.")).to_be_visible()
    page.get_by_role("dialog").get_by_role("button", name="Use 1 credit").click()
    expect(page.get_by_text("1 credit used. 2 left.")).to_be_visible()
    page.get_by_role("link", name="Continue").click()
    expect(page.get_by_role("heading", name="The first screen")).to_be_visible()
    expect(page.get_by_role("link", name="Balance: 2 credits. Show history")).to_be_visible()
    assert buyer.balance == 2


def test_without_javascript_on_a_dark_phone(visit_django: Visit) -> None:
    buyer = visit_django(java_script_enabled=False, color_scheme="dark", viewport={"width": 360, "height": 740})
    page = buyer.sign_in(welcomed=False)
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    bought(buyer)
    page.get_by_role("button", name="Use 1 credit to unlock Mobile App Discovery").click()
    expect(page.get_by_text("1 credit used. 2 left.")).to_be_visible()
    page.get_by_role("link", name="Continue").click()
    page.get_by_role("link", name="Balance: 2 credits. Show history").click()
    expect(page.get_by_role("row")).to_have_count(2)  # without the header, which a phone has no room for
    assert buyer.balance == 2


@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (360, "dark")])
def test_every_page_is_accessible_and_fits(visit_django: Visit, axe: str, width: int, scheme: str) -> None:
    buyer = visit_django(viewport={"width": width, "height": 740}, color_scheme=scheme, reduced_motion="reduce")
    page = buyer.sign_in(welcomed=False)
    problems: list[Any] = []

    def check(what: str) -> None:
        problems.extend((what, *one) for one in problems_of(page, axe))

    check("welcome")
    buyer.start()
    steps = buyer.begin()
    for path in (steps + "7", "/billing/pricing", "/billing/history", "/billing/cancelled", "/billing/welcome"):
        buyer.go(path)
        check(path)
    assert problems == []
