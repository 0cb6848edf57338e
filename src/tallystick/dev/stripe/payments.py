"""Checkout Sessions, payments, refunds and disputes: their states, and the events of each.

Objects named ``session``, ``charge`` and so on are the account's own; functions change them in place.
"""

from __future__ import annotations

import secrets
from typing import Final, Literal

from tallystick.dev.stripe import catalogue
from tallystick.dev.stripe.account import DAY_S, Object, StripeAccount, merged_metadata
from tallystick.dev.stripe.parameters import Params, empty, has_field, refused
from tallystick.errors import DevStripeError

# Stripe's test cards, and their tokens.
GOOD_CARD: Final = "4242424242424242"
DECLINED_CARD: Final = "4000000000000002"
DISPUTED_CARD: Final = "4000000000000259"
INQUIRED_CARD: Final = "4000000000001976"
LATER_DECLINED_CARD: Final = "4000000000000341"  # it can be saved, but later charges are declined
AUTHENTICATED_CARD: Final = "4000002760003184"  # each payment needs the customer's authentication
SLOW_REFUND_CARD: Final = "4000000000007726"
TOKENS: Final = {
    "visa": GOOD_CARD,
    "chargeDeclined": DECLINED_CARD,
    "createDispute": DISPUTED_CARD,
    "createDisputeInquiry": INQUIRED_CARD,
}
ASYNC: Final = "async"  # instead of a card number: a bank debit, whose outcome comes later

LINE_ITEMS_MAX: Final = 100
QUANTITY_MAX: Final = 999_999  # of a line item that the customer may adjust
QUANTITY_MAX_DEFAULT: Final = 99
MINIMUM_TOTAL: Final = {"usd": 50, "eur": 50, "gbp": 30}  # minor units

# The allowed steps from each state; all others are refused.
REFUND_STEPS: Final[dict[str, set[str]]] = {
    "pending": {"succeeded", "failed", "canceled"},
    "succeeded": {"failed", "canceled"},  # a bank may send a refund back days later
    "failed": set(),
    "canceled": set(),
}
DISPUTE_STEPS: Final[dict[str, set[str]]] = {
    "warning_needs_response": {"warning_under_review", "warning_closed", "needs_response"},
    "warning_under_review": {"warning_closed", "needs_response"},
    "needs_response": {"under_review", "won", "lost"},
    "under_review": {"won", "lost"},
    "warning_closed": set(),
    "won": {"lost"},  # a second decision, of the card network
    "lost": {"won"},
}


# -- sessions


def create_session(account: StripeAccount, params: Params) -> Object:
    """Open a Checkout Session for a one-time payment."""
    now = account.now()
    expires_at = params.get("expires_at", now + DAY_S)
    _check_session(params, expires_at - now)
    customer = account.get("customer", params["customer"], param="customer") if "customer" in params else None
    metadata = merged_metadata(params)
    if len(params["line_items"]) > LINE_ITEMS_MAX:
        raise refused(f"Invalid array: line_items takes {LINE_ITEMS_MAX} items", param="line_items")
    items = [_line_item(account, item, i) for i, item in enumerate(params["line_items"])]
    currency = items[0]["currency"]
    if any(item["currency"] != currency for item in items):
        raise refused("All line items must have the same currency.", param="line_items")
    total = sum(item["amount_total"] for item in items)
    if 0 < total < MINIMUM_TOTAL.get(currency, 0):
        message = f"The total must be at least {MINIMUM_TOTAL[currency]} {currency} in minor units, or 0."
        raise refused(message, "amount_too_small")
    if total > catalogue.AMOUNT_MAX:
        raise refused(f"Amount must be no more than {catalogue.AMOUNT_MAX}", "amount_too_large", "line_items")
    asked = {name: value for name, value in params.items() if has_field("checkout.session", name)}
    session = account.new(
        "checkout.session",
        **{"payment_method_types": ["card"], "ui_mode": "hosted_page", "customer_creation": "if_required"}
        | asked
        | {
            "amount_subtotal": total,
            "amount_total": total,
            "automatic_tax": _automatic_tax(params),
            "currency": currency,
            "custom_fields": [],
            "custom_text": empty("payment_pages_checkout_session_custom_text") | params.get("custom_text", {}),
            "expires_at": expires_at,
            "invoice_creation": _invoice_creation(params),
            "metadata": metadata,
            "payment_status": "unpaid",
            "shipping_options": [],
            "status": "open",
            "tax_id_collection": {"enabled": _is_on(params, "tax_id_collection"), "required": "never"},
            "total_details": {"amount_discount": 0, "amount_shipping": 0, "amount_tax": 0},
        },
    )
    session.pop("line_items")  # only present if expanded
    session["url"] = f"{account.url}/c/pay/{session['id']}"
    if customer is not None:
        session["customer_creation"] = None
        session["customer_details"] = _customer_details(customer["email"], customer["name"])
    account.line_items[session["id"]] = items
    account.intent_data[session["id"]] = params.get("payment_intent_data", {})
    return session


def _check_session(params: Params, open_for_s: int) -> None:
    for name in ("mode", "line_items", "success_url"):
        if not params.get(name):
            raise refused(f"Missing required param: {name}.", "parameter_missing", name)
    for name, only in {"mode": "payment", "ui_mode": "hosted_page"}.items():
        if params.get(name, only) != only:
            raise refused(f"devstripe models {name}={only} alone.", "parameter_not_modelled", name)
    if "customer" in params and "customer_email" in params:
        raise refused("You may only specify one of these parameters: customer, customer_email.")
    _check_customer_update(params)
    slack_s = 5  # between the caller's clock and this one
    if not DAY_S // 48 - slack_s <= open_for_s <= DAY_S + slack_s:
        message = "The `expires_at` timestamp must be between 30 minutes and 24 hours from now."
        raise refused(message, param="expires_at")


def _is_on(params: Params, name: str) -> bool:
    return bool(params.get(name, {}).get("enabled"))


def _automatic_tax(params: Params) -> Object:
    if not _is_on(params, "automatic_tax"):
        return {"enabled": False, "liability": None, "provider": None, "status": None}
    return {
        "enabled": True,
        "liability": {"type": "self"},
        "provider": "stripe",
        "status": "requires_location_inputs",
    }


def _invoice_creation(params: Params) -> Object:
    data = empty("payment_pages_checkout_session_invoice_settings") | {"metadata": {}}
    return {"enabled": _is_on(params, "invoice_creation"), "invoice_data": data}


def _check_customer_update(params: Params) -> None:
    """Refuse options that would change a given customer without permission, as Stripe does."""
    update = params.get("customer_update", {})
    if "customer" not in params:
        if update:
            raise refused("`customer_update` can only be used with `customer`.", param="customer_update")
        return
    for option, name in (("automatic_tax", "address"), ("tax_id_collection", "name")):
        if _is_on(params, option) and update.get(name) != "auto":
            raise refused(
                f"{option} for an existing customer needs customer_update[{name}] set to auto.",
                "customer_tax_location_invalid" if name == "address" else None,
                f"customer_update[{name}]",
            )


def _adjustable(item: Params, where: str) -> Object | None:
    given = item.get("adjustable_quantity", {})
    if not given.get("enabled"):
        return None
    low, high = given.get("minimum", 0), given.get("maximum", QUANTITY_MAX_DEFAULT)
    if not 0 <= low <= item["quantity"] <= high <= QUANTITY_MAX:
        message = f"The quantity {item['quantity']} is not between minimum {low} and maximum {high}."
        raise refused(message, param=f"{where}[adjustable_quantity]")
    return {"enabled": True, "minimum": low, "maximum": high}


def _line_item(account: StripeAccount, item: Params, index: int) -> Object:
    where = f"line_items[{index}]"
    quantity = item.get("quantity", 0)
    if quantity < 1:
        raise refused(f"Missing required param: {where}[quantity].", "parameter_missing", f"{where}[quantity]")
    if "price" in item:
        price = account.get("price", item["price"], param=f"{where}[price]")
    elif "price_data" in item:
        price = catalogue.create_price(account, item["price_data"])
    else:
        raise refused(f"Missing required param: {where}[price].", "parameter_missing", f"{where}[price]")
    if not price["active"]:
        message = "The price specified is inactive. This field only accepts active prices."
        raise refused(message, param=f"{where}[price]")
    amount = price["unit_amount"] * quantity
    return account.new(
        "item",
        adjustable_quantity=_adjustable(item, where),
        amount_discount=0,
        amount_subtotal=amount,
        amount_tax=0,
        amount_total=amount,
        currency=price["currency"],
        description=account.get("product", price["product"])["name"],
        price=price,
        quantity=quantity,
    )


def expire_session(account: StripeAccount, session: Object) -> Object:
    """Expire an open session."""
    if session["status"] != "open":
        message = (
            'Only Checkout Sessions with a status in ["open"] can be expired. '
            f"This Checkout Session has a status of `{session['status']}`."
        )
        raise refused(message)
    session.update(status="expired", url=None)
    account.emit("checkout.session.expired", session)
    return session


def expire_due(account: StripeAccount) -> None:
    """Expire the open sessions that are due. Called before anything reads them."""
    now = account.now()
    for session in account.objects["checkout.session"].values():
        if session["status"] == "open" and now >= session["expires_at"]:
            expire_session(account, session)


def pay_session(
    account: StripeAccount,
    session: Object,
    *,
    card: str,
    discount: int = 0,
    tax: int = 0,
    quantity: int | None = None,
) -> Object:
    """Pay a session, as the customer does on the hosted page. ``discount`` stands for a promotion code."""
    if session["status"] != "open":
        message = f"This Checkout Session is no longer open: its status is `{session['status']}`."
        raise refused(message, "checkout_session_not_open")
    subtotal = session["amount_subtotal"] if quantity is None else _adjusted(account, session, quantity)
    if not 0 <= discount <= subtotal:
        raise refused(f"A discount is between 0 and {subtotal}, not {discount}.")
    if tax and not session["automatic_tax"]["enabled"]:
        raise refused(f"{session['id']} has no automatic_tax.", param="tax")
    _decline(card)
    _identify_customer(account, session)
    item = account.line_items[session["id"]][0]
    total = subtotal - discount + (0 if item["price"]["tax_behavior"] == "inclusive" else tax)
    if quantity is not None:
        item.update(quantity=quantity, amount_subtotal=subtotal, amount_total=subtotal)
    _close(session, subtotal, total, {"amount_discount": discount, "amount_tax": tax})
    if total == 0:
        session["payment_status"] = "no_payment_required"
    else:
        data = account.intent_data[session["id"]]
        intent = _new_intent(
            account,
            amount=total,
            card=card,
            currency=session["currency"],
            customer=session["customer"],
            description=data.get("description"),
            metadata=merged_metadata(data),
            receipt_email=data.get("receipt_email"),
            setup_future_usage=data.get("setup_future_usage"),
            shipping=data.get("shipping") and empty("shipping") | data["shipping"],
        )
        session["payment_intent"] = intent["id"]
        _collect(account, intent)
        if intent["status"] == "succeeded":
            session["payment_status"] = "paid"
    account.emit("checkout.session.completed", session)
    return session


def _close(session: Object, subtotal: int, total: int, details: Object) -> None:
    session.update(amount_subtotal=subtotal, amount_total=total, status="complete", url=None)
    session["total_details"].update(details)
    if session["automatic_tax"]["enabled"]:
        session["automatic_tax"]["status"] = "complete"
    if session["invoice_creation"]["enabled"] and total:
        session["invoice"] = f"in_{secrets.token_hex(12)}"


def _adjusted(account: StripeAccount, session: Object, quantity: int) -> int:
    """Return the subtotal with another quantity of the only line item, if that may be adjusted to it."""
    [item, *others] = account.line_items[session["id"]]
    allowed = item["adjustable_quantity"]
    if allowed is None or others or not allowed["minimum"] <= quantity <= allowed["maximum"]:
        raise refused(f"The quantity of {session['id']} cannot become {quantity}.", param="quantity")
    return int(item["price"]["unit_amount"] * quantity)


def _decline(card: str) -> None:
    if card == DECLINED_CARD:
        message = "Your card was declined."
        raise DevStripeError(message, status=402, type="card_error", code="card_declined")


def _identify_customer(account: StripeAccount, session: Object) -> None:
    if session["customer"] is None:
        email = session["customer_email"] or "buyer@example.com"
        session["customer_details"] = _customer_details(email, None)
        if session["customer_creation"] == "always":
            session["customer"] = catalogue.create_customer(account, {"email": email})["id"]


def _customer_details(email: str | None, name: str | None) -> Object:
    details = empty("payment_pages_checkout_session_customer_details")
    return details | {"email": email, "name": name, "tax_exempt": "none", "tax_ids": []}


def is_settling(account: StripeAccount, session: Object) -> bool:
    """True if a delayed payment of the session is under way."""
    intent = account.objects["payment_intent"].get(session["payment_intent"])
    return intent is not None and intent["status"] == "processing"


def settle_session(account: StripeAccount, session: Object, *, succeeded: bool) -> Object:
    """Set the outcome of a delayed payment."""
    if not is_settling(account, session):
        raise refused(f"No delayed payment of {session['id']} is under way.")
    intent = account.get("payment_intent", session["payment_intent"])
    if succeeded:
        _succeed(account, intent)
        session["payment_status"] = "paid"
        account.emit("checkout.session.async_payment_succeeded", session)
    else:
        intent["status"] = "requires_payment_method"
        account.emit("payment_intent.payment_failed", intent)
        account.emit("checkout.session.async_payment_failed", session)
    return session


# -- payment intents and charges


def create_payment_method(account: StripeAccount, params: Params) -> Object:
    """Make a payment method from a test token or number; only its type and card are stored."""
    token = params.get("card", {}).get("token") or params.get("card", {}).get("number") or GOOD_CARD
    card = TOKENS.get(token.removeprefix("tok_"), token) if params["type"] == "card" else ASYNC
    return _new_payment_method(account, params["type"], card, params.get("billing_details", {}))


def _new_payment_method(
    account: StripeAccount, kind: str, card: str, billing: Params | None = None, *, customer: object = None
) -> Object:
    details = empty("billing_details") | (billing or {})
    if details["address"]:
        details["address"] = empty("address") | details["address"]
    method = account.new("payment_method", type=kind, billing_details=details, customer=customer)
    account.cards[method["id"]] = card
    return method


def create_intent(account: StripeAccount, params: Params) -> Object:
    """Pay without Checkout, in one step, as the official command line does to trigger events."""
    token = params.get("payment_method", "")
    card = TOKENS.get(token.removeprefix("pm_card_")) or account.cards.get(token)
    if card is None or not params.get("confirm"):
        message = "devstripe models payment intents with confirm=true and a known test payment_method alone."
        raise refused(message, "parameter_not_modelled", "payment_method")
    if "customer" in params:
        account.get("customer", params["customer"], param="customer")
    about: Object = {"metadata": merged_metadata(params), "description": params.get("description")}
    about |= {"amount": params["amount"], "currency": params["currency"], "customer": params.get("customer")}
    if params.get("off_session"):
        return _charge_off_session(account, account.get("payment_method", token, param="payment_method"), about)
    _decline(card)
    intent = _new_intent(account, card=card, **about)
    _succeed(account, intent)
    return intent


def _charge_off_session(account: StripeAccount, method: Object, about: Object) -> Object:
    """Charge a payment method that was saved for its customer; a declined intent is stored too."""
    if method["customer"] is None or method["customer"] != about["customer"]:
        raise refused(f"{method['id']} is not saved for this customer.", param="payment_method")
    card = account.cards[method["id"]]
    intent = _new_intent(account, card=card, method=method["id"], **about)
    codes = {AUTHENTICATED_CARD: "authentication_required"}
    codes |= dict.fromkeys((DECLINED_CARD, LATER_DECLINED_CARD), "card_declined")
    if code := codes.get(card):
        message = "Your card was declined."
        intent["last_payment_error"] = {"type": "card_error", "code": code, "message": message}
        intent["last_payment_error"]["payment_method"] = {**method}
        intent.update(status="requires_payment_method", payment_method=None)
        account.emit("payment_intent.payment_failed", intent)
        raise DevStripeError(message, status=402, type="card_error", code=code)
    _collect(account, intent)
    return intent


def _new_intent(account: StripeAccount, *, card: str, method: str | None = None, **fields: object) -> Object:
    kind = "sepa_debit" if card == ASYNC else "card"
    if method is None:
        saved_for = fields["customer"] if fields.get("setup_future_usage") else None
        method = _new_payment_method(account, kind, card, customer=saved_for)["id"]
    intent = account.new(
        "payment_intent",
        amount_capturable=0,
        amount_details={"tip": {}},
        amount_received=0,
        capture_method="automatic_async",
        confirmation_method="automatic",
        payment_method=method,
        payment_method_types=[kind],
        status="requires_confirmation",
        **fields,
    )
    account.emit("payment_intent.created", intent)
    return intent


def _collect(account: StripeAccount, intent: Object) -> None:
    """Take the money, or wait for it where it is a bank debit."""
    if account.cards[intent["payment_method"]] == ASYNC:
        intent["status"] = "processing"
        account.emit("payment_intent.processing", intent)
    else:
        _succeed(account, intent)


def _succeed(account: StripeAccount, intent: Object) -> None:
    amount = intent["amount"]
    charge = account.new(
        "charge",
        amount=amount,
        amount_captured=amount,
        amount_refunded=0,
        billing_details=empty("billing_details"),
        captured=True,
        currency=intent["currency"],
        customer=intent["customer"],
        description=intent["description"],
        disputed=False,
        metadata={**intent["metadata"]},
        paid=True,
        payment_intent=intent["id"],
        payment_method=intent["payment_method"],
        refunded=False,
        status="succeeded",
    )
    fee = amount * 29 // 1000 + 30
    charge["balance_transaction"] = _move_money(account, "charge", amount, charge, fee=fee)["id"]
    intent.update(status="succeeded", amount_received=amount, latest_charge=charge["id"])
    account.emit("charge.succeeded", charge)
    account.emit("payment_intent.succeeded", intent)
    card = account.cards[intent["payment_method"]]
    if card in (DISPUTED_CARD, INQUIRED_CARD):
        open_dispute(account, charge, inquiry=card == INQUIRED_CARD)


def _move_money(account: StripeAccount, kind: str, amount: int, source: Object, *, fee: int = 0) -> Object:
    return account.new(
        "balance_transaction",
        amount=amount,
        available_on=account.now(),
        balance_type="payments",
        currency=source["currency"],
        fee=fee,
        fee_details=[],
        net=amount - fee,
        reporting_category="dispute" if source["object"] == "dispute" else kind,
        source=source["id"],
        status="available",
        type=kind,
    )


# -- refunds


def create_refund(account: StripeAccount, params: Params, *, pending: bool = False) -> Object:
    """Refund a charge in full or in part. Bank debits and one test card start as pending, too."""
    charge = charge_of(account, params)
    left = charge["amount"] - charge["amount_refunded"]
    amount = params.get("amount", left)
    if _is_charged_back(account, charge):
        raise refused(f"Charge {charge['id']} has been charged back; cannot issue a refund.", "charge_disputed")
    if left == 0:
        raise refused(f"Charge {charge['id']} has already been refunded.", "charge_already_refunded")
    if amount < 1:
        raise refused("Invalid positive integer", "parameter_invalid_integer", "amount")
    if amount > left:
        message = f"Refund amount ({amount}) is greater than unrefunded amount on charge ({left})"
        raise refused(message, param="amount")
    catalogue.check_amount(amount, charge["currency"], "amount")
    slow = account.cards[charge["payment_method"]] in (ASYNC, SLOW_REFUND_CARD)
    refund = account.new(
        "refund",
        amount=amount,
        charge=charge["id"],
        currency=charge["currency"],
        metadata=merged_metadata(params),
        payment_intent=charge["payment_intent"],
        reason=params.get("reason"),
        status="pending" if pending or slow else "succeeded",
    )
    refund["balance_transaction"] = _move_money(account, "refund", -amount, refund)["id"]
    previous = _count_refund(charge, amount)
    account.emit("refund.created", refund)
    account.emit("charge.refunded", charge, previous)
    return refund


def charge_of(account: StripeAccount, params: Params) -> Object:
    """Return the charge that a request's ``charge`` or ``payment_intent`` names."""
    if "charge" in params:
        return account.get("charge", params["charge"], param="charge")
    if "payment_intent" not in params:
        message = "One of the following params should be provided for this request: payment_intent or charge."
        raise refused(message)
    intent = account.get("payment_intent", params["payment_intent"], param="payment_intent")
    if intent["latest_charge"] is None:
        message = f"This PaymentIntent ({intent['id']}) does not have a successful charge to refund."
        raise refused(message, param="payment_intent")
    return account.get("charge", intent["latest_charge"])


def _count_refund(charge: Object, amount: int) -> Object:
    previous = {name: charge[name] for name in ("amount_refunded", "refunded")}
    charge["amount_refunded"] += amount
    charge["refunded"] = charge["amount_refunded"] == charge["amount"]
    return previous


def _is_charged_back(account: StripeAccount, charge: Object) -> bool:
    return any(
        dispute["charge"] == charge["id"] and not dispute["is_charge_refundable"]
        for dispute in account.objects["dispute"].values()
    )


def settle_refund(account: StripeAccount, refund: Object, status: Literal["succeeded", "failed", "canceled"]) -> Object:
    """Set the outcome of a refund, even after it succeeded."""
    _step(refund, status, REFUND_STEPS)
    previous = {"status": refund["status"]}
    refund["status"] = status
    if status in ("failed", "canceled"):
        returned = _move_money(account, "refund_failure", refund["amount"], refund)
        refund["failure_balance_transaction"] = returned["id"]
        _count_refund(account.get("charge", refund["charge"]), -refund["amount"])
    if status == "failed":
        refund["failure_reason"] = "expired_or_canceled_card"
        account.emit("refund.failed", refund)
    account.emit("refund.updated", refund, previous)
    account.emit("charge.refund.updated", refund, previous)
    return refund


def _step(subject: Object, status: str, steps: dict[str, set[str]]) -> None:
    allowed = steps[subject["status"]]
    if status not in allowed:
        message = (
            f"{subject['id']} is {subject['status']} and cannot become {status}; "
            f"from here it can become: {', '.join(sorted(allowed)) or 'nothing else'}."
        )
        raise refused(message)


# -- disputes


def open_dispute(account: StripeAccount, charge: Object, *, amount: int | None = None, inquiry: bool = False) -> Object:
    """Let the cardholder dispute a charge, or only inquire about it (``warning_*``: no money moves)."""
    amount = charge["amount"] if amount is None else amount
    if not 1 <= amount <= charge["amount"]:
        raise refused(f"A dispute is about 1 to {charge['amount']}, not {amount}.", param="amount")
    if charge["disputed"]:
        raise refused(f"Charge {charge['id']} is already disputed.", "charge_disputed")
    dispute = account.new(
        "dispute",
        amount=amount,
        balance_transactions=[],
        charge=charge["id"],
        currency=charge["currency"],
        enhanced_eligibility_types=[],
        evidence=empty("dispute_evidence") | {"enhanced_evidence": {}},
        evidence_details={
            "due_by": account.now() + 7 * DAY_S,
            "enhanced_eligibility": {},
            "has_evidence": False,
            "past_due": False,
            "submission_count": 0,
        },
        is_charge_refundable=inquiry,
        payment_intent=charge["payment_intent"],
        reason="fraudulent",
        status="warning_needs_response" if inquiry else "needs_response",
    )
    charge["disputed"] = True
    if not inquiry:
        _withdraw(account, dispute)
    account.emit("charge.dispute.created", dispute)
    if not inquiry:
        account.emit("charge.dispute.funds_withdrawn", dispute)
    return dispute


def _withdraw(account: StripeAccount, dispute: Object) -> None:
    moved = _move_money(account, "adjustment", -dispute["amount"], dispute, fee=1500)
    dispute["balance_transactions"].append(moved)
    dispute["is_charge_refundable"] = False


def move_dispute(account: StripeAccount, dispute: Object, status: str) -> Object:
    """Move a dispute to its next state: reviewed, escalated from an inquiry, won, lost or closed."""
    _step(dispute, status, DISPUTE_STEPS)
    previous = {"status": dispute["status"]}
    dispute["status"] = status
    moved = None
    if status == "needs_response" or (previous["status"], status) == ("won", "lost"):
        _withdraw(account, dispute)
        moved = "charge.dispute.funds_withdrawn"
    elif status == "won":
        dispute["balance_transactions"].append(_move_money(account, "adjustment", dispute["amount"], dispute))
        dispute["is_charge_refundable"] = True
        moved = "charge.dispute.funds_reinstated"
    account.emit("charge.dispute.updated", dispute, previous)
    if moved:
        account.emit(moved, dispute)
    if status in ("won", "lost", "warning_closed"):
        account.emit("charge.dispute.closed", dispute, previous)
    return dispute


def answer_dispute(account: StripeAccount, dispute: Object, params: Params) -> Object:
    """Take evidence; Stripe's test text ``winning_evidence`` or ``losing_evidence`` decides at once."""
    evidence = params.get("evidence", {})
    dispute["evidence"].update(evidence)
    dispute["evidence_details"].update(has_evidence=True, submission_count=1)
    dispute["metadata"] = merged_metadata(params, dispute["metadata"])
    account.emit("charge.dispute.updated", dispute)
    verdict = {"winning_evidence": "won", "losing_evidence": "lost"}.get(evidence.get("uncategorized_text"))
    if verdict:
        inquiry = dispute["status"].startswith("warning_")
        move_dispute(account, dispute, "warning_closed" if inquiry else verdict)
    return dispute
