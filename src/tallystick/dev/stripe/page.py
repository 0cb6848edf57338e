"""The page that a Checkout Session's ``url`` opens: plain forms, to be clicked by a person or a test."""

from __future__ import annotations

from html import escape
from string import Template
from typing import Final

from tallystick.config import decimals_of
from tallystick.dev.stripe import payments
from tallystick.dev.stripe.account import Object, StripeAccount
from tallystick.dev.stripe.parameters import refused

_PAGE: Final = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Checkout (test double)</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 28rem; margin: 3rem auto; padding: 0 1rem }
small { color: #4f566b } p[role=alert] { color: #a41c4e; font-weight: 600 }
button { font: inherit; width: 100%; padding: .6rem; margin: .25rem 0; border: 1px solid #c1c9d2;
  border-radius: .4rem; background: #fff; cursor: pointer }
button.pay { background: #5469d4; border-color: #5469d4; color: #fff }
</style>
<main><small>devstripe: a test double of Stripe. No money moves.</small>
$body
</main></html>
""")
# The action, text and CSS class of each button.
_OPEN: Final = (
    ("pay", "Pay", "pay"),
    ("pay_later", "Pay later (bank debit: the outcome comes afterwards)", ""),
    ("fail", "Fail (the card is declined)", ""),
    ("cancel", "Cancel", ""),
)
_CARDS: Final = {"pay": payments.GOOD_CARD, "pay_later": payments.ASYNC, "fail": payments.DECLINED_CARD}
_WAITING: Final = (("succeed", "The bank debit arrives", "pay"), ("bounce", "The bank debit fails", ""))


def render(account: StripeAccount, session: Object, problem: str = "") -> str:
    """Return the page for the session's state."""
    rows = "".join(
        f"<li>{item['quantity']} &times; {escape(item['description'])}</li>"
        for item in account.line_items[session["id"]]
    )
    body = f"<h1>{_money(session)}</h1><ul>{rows}</ul>"
    if problem:
        body += f"<p role=alert>{escape(problem)}</p>"
    if session["status"] == "open":
        body += _buttons(_OPEN if session["cancel_url"] else _OPEN[:-1])
    else:
        body += f"<p>This session is {session['status']}: {session['payment_status']}.</p>"
        body += _buttons(_WAITING) if payments.is_settling(account, session) else ""
    return _PAGE.substitute(body=body)


def _money(session: Object) -> str:
    decimals = decimals_of(session["currency"])
    whole, minor = divmod(session["amount_total"], 10**decimals)
    amount = f"{whole}.{minor:0{decimals}}" if decimals else f"{whole}"
    return f"{amount} {escape(session['currency'].upper())}"


def _buttons(buttons: tuple[tuple[str, str, str], ...]) -> str:
    inner = "".join(
        f'<button name="action" value="{action}" class="{style}">{escape(label)}</button>'
        for action, label, style in buttons
    )
    return f'<form method="post">{inner}</form>'


def act(account: StripeAccount, session: Object, action: str) -> str | None:
    """Perform a button's action; return the address for a redirect, or None to stay.

    Raises DevStripeError if the card is declined or the session's state does not allow it.
    """
    back = str(session["success_url"]).replace("{CHECKOUT_SESSION_ID}", session["id"])
    if action in _CARDS:
        payments.pay_session(account, session, card=_CARDS[action])
    elif action == "cancel":
        back = session["cancel_url"]
    elif action in ("succeed", "bounce"):
        payments.settle_session(account, session, succeeded=action == "succeed")
        return None
    else:
        raise refused(f"The page has no button {action!r}.", param="action")
    return back
