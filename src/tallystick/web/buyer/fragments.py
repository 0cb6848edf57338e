"""Parts of pages for the host's own templates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from tallystick.accounts import Account
from tallystick.web.buyer.buyer_request import BuyerRequest
from tallystick.web.buyer.paywall import UNLOCK_CREDITS, Workshop
from tallystick.web.buyer.rendering import Renderer


class Fragments:
    """Parts of pages for the host's own templates, each as Markup.

    Pass one to the template as, say, ``billing`` and write ``{{ billing.badge }}``. All are empty for a visitor who is
    not signed in.
    """

    def __init__(self, renderer: Renderer, request: BuyerRequest, account: Account | None) -> None:
        self._renderer = renderer
        self._request = request
        self.account = account

    @property
    def head(self) -> Markup:
        """Style sheet and scripts, for ``<head>``. All are our own files: no inline script or style."""
        return self._render("head.html")

    @property
    def badge(self) -> Markup:
        """The credits that can be spent, as a link to the history."""
        return Markup() if self.account is None else self._render("badge.html", balance=self._spendable)

    @property
    def welcome(self) -> Markup:
        """The welcome dialog, until this user has closed it on any device."""
        if self.account is None or self.account.onboarding_complete:
            return Markup()
        return self._render("welcome_dialog.html", return_to=self._here)

    @property
    def pricing(self) -> Markup:
        """The packs side by side."""
        return self._render("pricing_packs.html", return_to=self._here, workshop=None)

    def paywall(self, workshop: Workshop, *, caller: Callable[[], str] | None = None) -> Markup:
        """The lock over a workshop. The content of ``{% call %}`` is shown blurred behind it."""
        return self._render(
            "paywall_card.html", workshop=workshop, balance=self._spendable, required=UNLOCK_CREDITS,
            preview=Markup(caller()) if caller else None,  # noqa: S704 - rendered, so escaped, by the host's template
            return_to=self._here,
        )  # fmt: skip

    @property
    def _spendable(self) -> int:
        return 0 if self.account is None else self.account.standing.spendable

    @property
    def _here(self) -> str:
        return self._renderer.returning(self._request.address)

    def _render(self, template: str, **context: Any) -> Markup:
        return Markup(self._renderer.render(self._request, template, **context))  # noqa: S704 - from our own templates
