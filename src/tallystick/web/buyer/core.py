"""The buyer's pages, for a user, a workshop and a request. No framework is used here.

Each takes a connection as the ledger does. An adapter, ``views`` for FastAPI and ``tallystick.web.django``, reads a
request, calls one of these and sends the result; ``refusals`` answers the errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from tallystick.accounts import Accounts
from tallystick.config import Config
from tallystick.errors import InsufficientCredits, Key
from tallystick.ledger import HISTORY_MAX, CreditTransaction, Lot, Standing
from tallystick.ledger.connections import SyncConnection
from tallystick.web.buyer.buyer_request import BuyerPage, BuyerRequest, Reply, redirect
from tallystick.web.buyer.paywall import UNLOCK_CREDITS, Paywall, Workshop
from tallystick.web.buyer.rendering import Renderer, paywall
from tallystick.web.shared.spreadsheet import csv_line

HISTORY_PAGE: Final = 30
FOR_EVER: Final = "public, max-age=31536000, immutable"


class Pages:
    """The pages of one configuration. Holds no connection."""

    def __init__(self, config: Config, renderer: Renderer) -> None:
        self.paywall = Paywall(config)
        self.ledger = self.paywall.ledger
        self.accounts = Accounts(config)
        self._renderer = renderer
        self._returning = renderer.returning

    # --- reading ---

    def badge(self, conn: SyncConnection, user: Key) -> BuyerPage:
        """The credits that can be spent, for a host's header."""
        return BuyerPage("badge.html", {"balance": self.ledger.standing(conn, user).spendable})

    def pricing(self, conn: SyncConnection, user: Key, *, workshop: str | None, return_to: str | None) -> BuyerPage:
        """The packs; the credits are for ``workshop``."""
        found = self.paywall.workshop_and_standing(conn, user, workshop) if workshop else None
        now = self.ledger.standing(conn, user) if found is None else found[1]
        back = self._returning(return_to)
        return BuyerPage(
            "pricing.html", {"balance": now.spendable, "return_to": back, "workshop": found[0] if found else None}
        )

    def history(self, conn: SyncConnection, user: Key, *, before: str | None) -> BuyerPage:
        """The balance and the credit transactions, newest first."""
        now = self.ledger.standing(conn, user)
        rows = self.ledger.history(conn, user, limit=HISTORY_PAGE + 1, before=before)
        lots = self.expiring(conn, user, now)
        shown = rows[:HISTORY_PAGE]
        return BuyerPage(
            "history.html",
            {
                "now": now,
                "soonest": lots[0] if lots else None,
                "rows": shown,
                "newest": before is None,
                "older": shown[-1].cursor if len(rows) > HISTORY_PAGE else None,
            },
        )

    def expiring(self, conn: SyncConnection, user: Key, now: Standing) -> list[Lot]:
        """The user's credits that expire, the soonest first; without any it makes no query."""
        return [] if now.due_at is None else self.ledger.lots(conn, user)

    def rows(self, conn: SyncConnection, user: Key, *, before: CreditTransaction | None) -> list[CreditTransaction]:
        """The next rows for a file, as many as one call of ``history`` allows; from ``before`` on."""
        cursor = None if before is None else before.cursor
        return self.ledger.history(conn, user, limit=HISTORY_MAX, before=cursor, include_failed=True)

    # --- welcome ---

    def welcome(self, *, return_to: str | None) -> BuyerPage:
        """The welcome as a page of its own."""
        return BuyerPage("welcome.html", {"return_to": self._returning(return_to)})

    def welcomed(self, conn: SyncConnection, request: BuyerRequest, user: Key, *, return_to: str | None) -> Reply:
        """Complete the onboarding; the page's script, with htmx's header, gets no page."""
        self.accounts.complete_onboarding(conn, user)
        return Reply(204) if request.fragment else redirect(self._returning(return_to))

    # --- unlocking ---

    def confirm(self, conn: SyncConnection, user: Key, workshop: str, *, return_to: str | None) -> BuyerPage:
        """Ask before spending."""
        found, now = self.paywall.workshop_and_standing(conn, user, workshop)
        found.require_not_deleted()
        back, balance = self._returning(return_to), now.spendable
        if found.access.open:
            return _unlocked(found, balance=balance, spent=0, return_to=back)
        if balance < UNLOCK_CREDITS:
            return paywall(found, balance=balance, return_to=back)
        return BuyerPage("confirm.html", {"workshop": found, "balance": balance, "return_to": back})

    def unlock(
        self, conn: SyncConnection, request: BuyerRequest, user: Key, workshop: str, *, return_to: str | None
    ) -> BuyerPage | Reply:
        """Spend, then redirect to a page with the result, which may be reloaded and gone back to."""
        back = self._returning(return_to)
        try:
            spent = self.paywall.unlock(conn, user, workshop)
        except InsufficientCredits as refused:
            found = self.paywall.workshop(conn, user, workshop)
            return paywall(found, balance=Standing(refused.balance, refused.held).spendable, return_to=back)
        charged = 0 if spent is None or spent.replayed else -spent.amount
        if not request.fragment:
            query = {"return_to": back, "spent": charged}
            return redirect(self._renderer.url(request, "unlocked", workshop=workshop, query=query))
        found, now = self.paywall.workshop_and_standing(conn, user, workshop)
        return _unlocked(
            found, balance=now.spendable, spent=charged, return_to=back, headers={"HX-Trigger": "tallystick:balance"}
        )

    def unlocked(
        self, conn: SyncConnection, user: Key, workshop: str, *, spent: int, return_to: str | None
    ) -> BuyerPage:
        """The page after unlocking; ``spent`` is from the address, so it only counts for an open workshop."""
        found, now = self.paywall.workshop_and_standing(conn, user, workshop)
        paid = spent if found.access.open else 0
        return _unlocked(found, balance=now.spendable, spent=paid, return_to=self._returning(return_to))

    # --- files ---

    def static(self, name: str, version: str | None) -> tuple[bytes, str, str] | None:
        """The content, media type and Cache-Control of a file of ours."""
        files = self._renderer.static
        found = files.get(name)
        return None if found is None else (*found, FOR_EVER if version == files.version(name) else "no-cache")

    def csv_head(self) -> str:
        """The first line of the history's file."""
        return csv_line(self._renderer.texts.csv_columns)

    def csv_headers(self) -> dict[str, str]:
        """The headers that make a browser save the file."""
        return {"Content-Disposition": f'attachment; filename="{self._renderer.texts.csv_name}.csv"'}


CSV: Final = "text/csv; charset=utf-8"


def csv_lines(rows: Sequence[CreditTransaction]) -> Iterator[str]:
    """Rows for the history's file."""
    for r in rows:
        yield csv_line((
            r.sequence, r.created_at, r.completed_at, r.type, r.status, r.amount, r.balance_after, r.description,
            r.amount_paid, r.currency, r.id,
        ))  # fmt: skip


def _unlocked(
    workshop: Workshop, *, balance: int, spent: int, return_to: str, headers: dict[str, str] | None = None
) -> BuyerPage:
    shown = {"workshop": workshop, "balance": balance, "spent": spent, "return_to": return_to}
    return BuyerPage("unlocked.html", shown, headers=headers or {})
