"""The example app and the people in front of it."""

from __future__ import annotations

from typing import Protocol

import sqlalchemy as sa
from playwright.sync_api import BrowserContext, Page

from tallystick.dev.stripe import DevStripe

WAIT_MS = 20_000  # a loaded machine is no failure


class Example:
    """The running example, its double, and the things that tests do behind its back."""

    def __init__(self, origin: str, engine: sa.Engine, double: DevStripe) -> None:
        self.origin = origin
        self.engine = engine
        self.double = double

    def balance(self, email: str) -> int:
        with self.engine.connect() as conn:
            asked = sa.text("SELECT credit_balance FROM users WHERE email = :email")
            return int(conn.execute(asked, {"email": email}).scalar_one())

    def end_sessions(self, email: str) -> None:
        with self.engine.begin() as conn:
            conn.execute(
                sa.text("DELETE FROM sessions WHERE user_id = (SELECT id FROM users WHERE email = :email)"),
                {"email": email},
            )


class Site(Protocol):
    """An app to visit."""

    @property
    def origin(self) -> str: ...

    def balance(self, email: str) -> int: ...


class Visitor:
    """A person on one device. ``page`` is where they are."""

    def __init__(self, example: Site, context: BrowserContext, email: str) -> None:
        self.example = example
        self.context = context
        self.email = email
        self.complaints: list[str] = []
        context.set_default_timeout(WAIT_MS)
        context.on("console", lambda message: self._note_console_error(message.text))
        context.on("weberror", lambda error: self._note_console_error(f"uncaught: {error.error}"))
        self.page: Page = context.new_page()

    def _note_console_error(self, text: str) -> None:
        if "Content Security Policy" in text or text.startswith("uncaught"):
            self.complaints.append(text)

    def go(self, path: str) -> Page:
        self.page.goto(self.example.origin + path)
        return self.page

    def sign_in(self, *, welcomed: bool = True) -> Page:
        self.go("/sign-in")
        self.page.fill("#email", self.email)
        self.page.get_by_role("button", name="Sign in").click()
        if welcomed:
            self.start()
        return self.page

    def start(self) -> None:
        """Close the welcome, and let the answer come: who leaves sooner is welcomed once more."""
        with self.page.expect_response("**/billing/welcome"):
            self.page.get_by_role("button", name="Start").click()

    def begin(self, title: str = "Mobile App Discovery") -> str:
        """A new workshop; its address up to the number of the step."""
        self.go("/")
        self.page.fill("#title", title)
        self.page.get_by_role("button", name="Begin").click()
        self.page.wait_for_url("**/steps/1")
        return self.page.url.removeprefix(self.example.origin)[:-1]

    def buy(self, name: str = "Buy 3 credits for $149") -> Page:
        self.page.get_by_role("button", name=name).click()
        self.page.get_by_role("button", name="Pay", exact=True).click()
        return self.page

    @property
    def balance(self) -> int:
        return self.example.balance(self.email)


def problems_of(page: Page, axe: str) -> list[tuple[str, list[str]]]:
    """The violations that axe finds on the page, each with its elements; and if the page is wider than the screen."""
    page.evaluate(axe)
    found = page.evaluate("axe.run({resultTypes: ['violations']}).then(done => done.violations)")
    problems = [(one["id"], [node["html"] for node in one["nodes"]]) for one in found]
    if not page.evaluate("document.documentElement.scrollWidth <= innerWidth"):
        problems.append(("wider than the screen", []))
    return problems
