"""A buyer's way through the pages, in a browser."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from playwright.sync_api import Locator, Page, expect

from web_browser import Example, Visitor, problems_of

Visit = Callable[..., Visitor]

pytestmark = pytest.mark.one_server  # it is about what a browser shows


def button(page: Page | Locator, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def test_the_welcome_is_shown_once_on_all_devices(visit: Visit) -> None:
    laptop = visit()
    page = laptop.sign_in(welcomed=False)
    expect(page.get_by_role("dialog", name="Welcome")).to_be_visible()
    with page.expect_response("**/billing/welcome"):
        page.keyboard.press("Escape")  # closing it any way counts
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.reload()
    expect(page.get_by_role("heading", name="Your workshops")).to_be_visible()
    expect(page.get_by_role("dialog")).to_have_count(0)

    phone = visit(laptop.email, viewport={"width": 390, "height": 780}, has_touch=True)
    page = phone.sign_in(welcomed=False)
    expect(page.get_by_role("heading", name="Your workshops")).to_be_visible()
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_from_the_paywall_to_stripe_and_back_unlocked(visit: Visit) -> None:
    buyer = visit()
    page = buyer.sign_in()
    steps = buyer.begin()
    buyer.go(steps + "6")
    page.get_by_role("link", name="Next: The first screen").click()
    expect(page.get_by_role("heading", name="Mobile App Discovery continues here")).to_be_visible()
    expect(page.get_by_text("You have 0 credits. One unlocks this workshop.")).to_be_visible()
    page.get_by_role("link", name="Buy credits").click()
    buyer.buy()
    expect(page.get_by_text("3 credits added. You have 3.")).to_be_visible()
    button(page, "Use 1 credit to unlock Mobile App Discovery").click()
    expect(page.get_by_text("1 credit used. 2 left.")).to_be_visible()
    page.get_by_role("link", name="Continue").click()
    expect(page.get_by_role("heading", name="The first screen")).to_be_visible()
    assert page.url.endswith(steps + "7")
    expect(page.get_by_role("link", name="Balance: 2 credits. Show history")).to_be_visible()
    buyer.go(steps + "10")
    expect(page.get_by_role("heading", name="The first release")).to_be_visible()
    assert buyer.balance == 2


def funded(visit: Visit, **context: Any) -> tuple[Visitor, str]:
    """A buyer with three credits, in front of a locked step."""
    buyer = visit(**context)
    buyer.sign_in()
    steps = buyer.begin()
    buyer.go("/billing/pricing")
    buyer.buy()
    buyer.go(steps + "7")
    return buyer, steps


def test_two_tabs_and_a_double_click_spend_one_credit(visit: Visit) -> None:
    buyer, _ = funded(visit)
    tabs = [buyer.page, buyer.context.new_page()]
    tabs[1].goto(buyer.page.url)
    for tab in tabs:
        tab.get_by_role("link", name="Use 1 credit").dblclick()
        expect(tab.get_by_role("dialog").get_by_text("This will use 1 credit. You have 3.")).to_be_visible()
    for tab in tabs:
        button(tab.get_by_role("dialog"), "Use 1 credit").dblclick()
    expect(tabs[0].get_by_role("dialog").get_by_text("1 credit used. 2 left.")).to_be_visible()
    expect(tabs[1].get_by_role("dialog").get_by_text("unlocked already. Nothing was charged.")).to_be_visible()
    for tab in tabs:
        tab.get_by_role("link", name="Continue").click()
        expect(tab.get_by_role("heading", name="The first screen")).to_be_visible()
    assert buyer.balance == 2


def test_the_dialog_by_keyboard(visit: Visit) -> None:
    buyer, _ = funded(visit)
    page = buyer.page
    opener = page.get_by_role("link", name="Use 1 credit")
    opener.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Mobile App Discovery")
    expect(button(dialog, "Use 1 credit")).to_be_focused()
    for _ in range(4):
        page.keyboard.press("Tab")
        # the browser's own bar is part of the round; nothing behind the dialog is
        assert page.evaluate("document.activeElement === document.body || !!document.activeElement.closest('dialog')")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(opener).to_be_focused()
    assert buyer.balance == 3

    page.keyboard.press("Enter")
    expect(button(page.get_by_role("dialog"), "Use 1 credit")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_text("1 credit used. 2 left.")).to_be_visible()
    expect(page.get_by_role("link", name="Continue")).to_be_focused()
    expect(page.get_by_role("link", name=re.compile("Balance: 2 credits"), include_hidden=True)).to_have_count(1)
    page.keyboard.press("Escape")  # the page behind is locked no more, and says so
    expect(page.get_by_role("heading", name="The first screen")).to_be_visible()


def test_not_now(visit: Visit) -> None:
    buyer, _ = funded(visit)
    buyer.page.get_by_role("link", name="Use 1 credit").click()
    buyer.page.get_by_role("link", name="Not now").click()
    expect(buyer.page.get_by_role("dialog")).to_have_count(0)
    assert buyer.balance == 3


def test_the_back_button(visit: Visit) -> None:
    buyer = visit()
    page = buyer.sign_in()
    steps = buyer.begin()
    buyer.go(steps + "7")
    page.get_by_role("link", name="Buy credits").click()
    buyer.buy()
    button(page, "Use 1 credit to unlock Mobile App Discovery").click()
    page.get_by_role("link", name="Continue").click()
    expect(page.get_by_role("heading", name="The first screen")).to_be_visible()
    page.go_back()  # what was done
    expect(page.get_by_role("heading", name="Unlocked")).to_be_visible()
    page.go_back()  # the success page: granted once, and nothing more to unlock
    expect(page.get_by_text("3 credits added. You have 2.")).to_be_visible()
    expect(page.get_by_role("button")).to_have_count(0)
    page.go_back()  # Stripe's page
    page.go_back()  # pricing, which can be used again
    button(page, "Buy 1 credit for $79").click()
    button(page, "Pay").click()
    expect(page.get_by_text("1 credit added. You have 3.")).to_be_visible()
    assert buyer.balance == 3


def test_cancelled_at_stripe(visit: Visit) -> None:
    buyer = visit()
    page = buyer.sign_in()
    steps = buyer.begin()
    buyer.go(steps + "7")
    page.get_by_role("link", name="Buy credits").click()
    button(page, "Buy 1 credit for $79").click()
    button(page, "Cancel").click()
    expect(page.get_by_text("Nothing was charged.")).to_be_visible()
    page.get_by_role("link", name="Back to Mobile App Discovery").click()
    expect(page.get_by_role("heading", name="Mobile App Discovery continues here")).to_be_visible()
    assert buyer.balance == 0


def test_a_payment_that_arrives_while_the_page_is_open(visit: Visit) -> None:
    buyer = visit()
    page = buyer.sign_in()
    buyer.go("/billing/pricing")
    button(page, "Buy 3 credits for $149").click()
    page.get_by_role("button", name=re.compile("^Pay later")).click()
    expect(page.get_by_role("heading", name="Your payment is on its way")).to_be_visible()
    session = re.search(r"session_id=(cs_\w+)", page.url)
    assert session
    badge = page.get_by_role("link", name=re.compile("^Balance:"))
    expect(badge).to_have_text("0 credits")
    page.evaluate("window.untouched = true")
    page.route("**/billing/success**", lambda route: route.fulfill(status=503, body="<h1>Busy</h1>"), times=1)
    with page.expect_response("**/billing/success**"):
        pass  # a look that fails leaves the page as it is, and another follows
    buyer.example.double.settle(session[1], succeeded=True)
    expect(page.get_by_role("heading", name="Payment received")).to_be_visible()
    expect(page.get_by_text("3 credits added. You have 3.")).to_be_visible()
    expect(badge).to_have_text("3 credits")
    assert page.evaluate("window.untouched")  # it was not reloaded
    assert buyer.balance == 3


def test_the_session_expired_meanwhile(visit: Visit) -> None:
    buyer, steps = funded(visit)
    page = buyer.page
    buyer.example.end_sessions(buyer.email)
    page.get_by_role("link", name="Use 1 credit").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    page.fill("#email", buyer.email)
    button(page, "Sign in").click()
    expect(page.get_by_text("This will use 1 credit. You have 3.")).to_be_visible()
    button(page, "Use 1 credit").click()
    expect(page.get_by_text("1 credit used. 2 left.")).to_be_visible()
    page.get_by_role("link", name="Continue").click()
    assert page.url.endswith(steps + "7")


def test_a_badge_that_cannot_refresh_itself_moves_nobody(visit: Visit) -> None:
    buyer, steps = funded(visit)
    page = buyer.page
    buyer.example.end_sessions(buyer.email)
    with page.expect_response("**/billing/badge"):
        page.evaluate("document.body.dispatchEvent(new CustomEvent('tallystick:balance'))")  # as after "back"
    page.wait_for_timeout(500)
    assert page.url.endswith(steps + "7")
    expect(page.get_by_role("link", name=re.compile("^Balance:"))).to_have_text("3 credits")


def test_without_javascript(visit: Visit) -> None:
    buyer = visit(java_script_enabled=False)
    page = buyer.sign_in(welcomed=False)
    expect(page.get_by_role("dialog", name="Welcome")).to_be_visible()
    button(page, "Start").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    steps = buyer.begin()
    buyer.go(steps + "7")
    page.get_by_role("link", name="Buy credits").click()
    buyer.buy()
    page.get_by_role("link", name="Back to Mobile App Discovery").click()
    page.get_by_role("link", name="Use 1 credit").click()
    expect(page.get_by_text("This will use 1 credit. You have 3.")).to_be_visible()
    button(page, "Use 1 credit").click()
    expect(page.get_by_text("1 credit used. 2 left.")).to_be_visible()
    page.get_by_role("link", name="Continue").click()
    expect(page.get_by_role("heading", name="The first screen")).to_be_visible()
    page.get_by_role("link", name="Balance: 2 credits. Show history").click()
    expect(page.get_by_role("row")).to_have_count(3)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download as CSV").click()
    assert download.value.suggested_filename == "credits.csv"
    assert buyer.balance == 2


# The contrast of a colour with another, as WCAG has it.
CONTRAST = """([a, b]) => {
  const light = (text) => text.match(/[\\d.]+/g).slice(0, 3).map((one) => one / 255)
    .map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4))
    .reduce((sum, one, n) => sum + one * [0.2126, 0.7152, 0.0722][n], 0);
  const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
}"""


def test_a_dark_dialog_has_an_edge(visit: Visit) -> None:
    buyer, _ = funded(visit, color_scheme="dark")
    buyer.page.get_by_role("link", name="Use 1 credit").click()
    dialog = buyer.page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    edge, paper = dialog.evaluate(
        "one => [getComputedStyle(one).borderTopColor, getComputedStyle(document.body).backgroundColor]"
    )
    assert buyer.page.evaluate(CONTRAST, [edge, paper]) >= 3


@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (1100, "dark"), (360, "light"), (360, "dark")])
def test_every_page_is_accessible_and_fits(visit: Visit, axe: str, width: int, scheme: str) -> None:
    buyer = visit(viewport={"width": width, "height": 740}, color_scheme=scheme, reduced_motion="reduce")
    page = buyer.sign_in(welcomed=False)

    problems: list[tuple[str, str, list[str]]] = []

    def check(what: str) -> None:
        problems.extend((what, *one) for one in problems_of(page, axe))

    check("welcome")
    buyer.start()
    steps = buyer.begin("A workshop with a long, long title about mobile applications and their discovery")
    check("step")
    buyer.go(steps + "7")
    check("paywall")
    page.get_by_role("link", name="Buy credits").click()
    check("pricing")
    buyer.buy()
    check("success")
    buyer.go(steps + "7")
    page.get_by_role("link", name="Use 1 credit").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    check("confirm")
    page.keyboard.press("Enter")
    expect(page.get_by_text("1 credit used. 2 left.")).to_be_visible()
    check("unlocked")
    for path in ("history", "cancelled", "welcome", "workshops/none/unlock"):
        buyer.go(f"/billing/{path}")
        check(path)
    assert problems == []


def test_on_a_phone_an_amount_stands_apart_from_its_text(visit: Visit) -> None:
    buyer = visit(viewport={"width": 360, "height": 740})
    page = buyer.sign_in()
    buyer.go("/billing/pricing")
    buyer.buy()
    buyer.go("/billing/history")
    text, amount = (page.get_by_role("cell").filter(has_text=one).bounding_box() for one in ("$149", "+3"))
    assert text is not None
    assert amount is not None
    assert text["x"] + text["width"] + 8 <= amount["x"]


def test_a_button_works_again_after_a_slow_request_was_stopped(visit: Visit) -> None:
    buyer = visit()
    page = buyer.sign_in()
    buyer.go("/billing/pricing")
    sent: list[str] = []
    page.route("**/billing/checkout", lambda route: sent.append(route.request.url))  # no answer
    # timers, since Playwright waits for a page that is on its way elsewhere
    page.evaluate(
        """() => {
            const buy = document.querySelector(".ts-pack button");
            for (const [when, what] of [[0, () => buy.click()], [100, () => buy.click()], [500, () => stop()],
                [3500, () => buy.click()], [4000, () => stop()]]) setTimeout(what, when);
        }"""
    )
    time.sleep(5)
    page.wait_for_timeout(100)
    assert len(sent) == 2


def test_without_an_answer_the_browser_says_what_is_wrong(visit: Visit) -> None:
    buyer = visit()
    page = buyer.sign_in()
    buyer.go("/billing/pricing")
    buyer.buy()
    last = buyer.begin() + "7"
    buyer.go(last)
    buyer.context.set_offline(True)
    page.get_by_role("link", name="Use 1 credit").click()
    expect(page).to_have_url(re.compile("chrome-error://"))  # wait_for_url() would raise the error itself
    buyer.context.set_offline(False)
    buyer.go(last)
    page.get_by_role("link", name="Use 1 credit").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    buyer.context.set_offline(True)
    page.get_by_role("button", name="Use 1 credit").click()
    expect(page).to_have_url(re.compile("chrome-error://"))
    buyer.context.set_offline(False)
    assert buyer.balance == 3


def test_the_page_of_a_proxy_is_shown_by_the_browser(visit: Visit) -> None:
    buyer, steps = funded(visit)
    page = buyer.page
    page.route("**/unlock**", lambda route: route.fulfill(status=502, content_type="text/html", body="<h1>Gone</h1>"))
    page.get_by_role("link", name="Use 1 credit").click()
    expect(page.get_by_role("heading", name="Gone")).to_be_visible()
    page.unroute_all()
    buyer.go(steps + "7")
    page.get_by_role("link", name="Use 1 credit").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.route("**/unlock**", lambda route: route.fulfill(status=502, content_type="text/html", body="<h1>Gone</h1>"))
    button(page, "Use 1 credit").click()
    expect(page.get_by_role("heading", name="Gone")).to_be_visible()
    assert buyer.balance == 3


def test_a_purchase_that_waits_for_stripe_keeps_no_connection(example: Example) -> None:
    with httpx.Client(base_url=example.origin, timeout=60) as buyer:
        buyer.post("/sign-in", data={"email": "waits@example.com"})
        example.double.fault("GET", "/v1/prices/*", "timeout", wait_s=3)
        buying = threading.Thread(target=buyer.post, args=["/billing/checkout"], kwargs={"data": {"pack": "Squadron"}})
        buying.start()
        while example.double.api.faults[-1].times:
            time.sleep(0.01)
        pool = example.engine.pool
        assert isinstance(pool, sa.QueuePool)
        assert (pool.checkedout(), buying.is_alive()) == (0, True)
        buying.join()
