"""Paid invoices of subscriptions."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tallystick.dev.stripe.account import Object, StripeAccount
from tallystick.dev.stripe.parameters import empty, refused

LINES_SHOWN: Final = 10
"""The number of lines in an invoice itself; the others have a list of their own."""


def bill(account: StripeAccount, customer: Object, lines: Sequence[Mapping[str, Any]]) -> Object:
    """Make a paid invoice with these lines, and its event."""
    if not lines:
        raise refused("An invoice has one line or more.", "parameter_missing", "lines")
    now, subscription = account.now(), f"sub_{customer['id'].removeprefix('cus_')}"
    subtotal = sum(line["amount"] for line in lines)
    total = subtotal - sum(line.get("discount", 0) for line in lines)
    paid = max(total, 0)
    invoice = account.new(
        "invoice",
        amount_due=paid,
        amount_overpaid=0,
        amount_paid=paid,
        amount_paid_off_stripe=0,
        amount_remaining=0,
        amount_shipping=0,
        attempt_count=1,
        attempted=True,
        auto_advance=False,
        automatic_tax={"disabled_reason": None, "enabled": False, "liability": None, "provider": None, "status": None},
        billing_reason="subscription_cycle",
        collection_method="charge_automatically",
        currency="usd",
        customer=customer["id"],
        default_tax_rates=[],
        discounts=[],
        issuer={"type": "self"},
        parent={
            "quote_details": None,
            "subscription_details": {"metadata": {}, "subscription": subscription},
            "type": "subscription_details",
        },
        payment_settings=empty("invoices_payment_settings"),
        period_end=now,
        period_start=now,
        post_payment_credit_notes_amount=0,
        pre_payment_credit_notes_amount=0,
        starting_balance=0,
        status="paid",
        status_transitions=empty("invoices_resource_status_transitions") | {"finalized_at": now, "paid_at": now},
        subtotal=subtotal,
        total=total,
    )
    made = [_line(account, invoice["id"], subscription, line) for line in lines]
    invoice["lines"] = {
        "object": "list",
        "data": made[:LINES_SHOWN],
        "has_more": len(made) > LINES_SHOWN,
        "url": f"/v1/invoices/{invoice['id']}/lines",
    }
    account.emit("invoice.paid", invoice)
    return invoice


def _line(account: StripeAccount, invoice: str, subscription: str, line: Mapping[str, Any]) -> Object:
    price = account.get("price", line["price"], param="lines[price]")
    discount = f"di_{secrets.token_hex(12)}" if line.get("discount") else None
    return account.new(
        "line_item",
        amount=line["amount"],
        currency="usd",
        discountable=True,
        discount_amounts=[{"amount": line["discount"], "discount": discount}] if discount else [],
        discounts=[discount] if discount else [],
        invoice=invoice,
        parent={
            "invoice_item_details": None,
            "subscription_item_details": {
                "invoice_item": f"ii_{secrets.token_hex(12)}" if line.get("proration") else None,
                "proration": bool(line.get("proration")),
                "proration_details": None,
                "subscription": subscription,
                "subscription_item": line.get("item", f"si_{price['id'].removeprefix('price_')}"),
            },
            "type": "subscription_item_details",
        },
        period={"start": line["start"], "end": line["end"]},
        pricing={
            "price_details": {"price": price["id"], "product": price["product"]},
            "type": "price_details",
            "unit_amount_decimal": price["unit_amount_decimal"],
        },
        quantity=line.get("quantity", 1),
        subscription=subscription,
        subtotal=line["amount"],
    )
