"""Customers, products and prices."""

from __future__ import annotations

import re
import secrets
from typing import Final

from tallystick.dev.stripe.account import Object, StripeAccount, merged_metadata
from tallystick.dev.stripe.parameters import Params, empty, refused

# Currencies whose amounts are a multiple of this many minor units.
STEPS: Final = {"isk": 100, "ugx": 100, "bhd": 10, "jod": 10, "kwd": 10, "omr": 10, "tnd": 10}
AMOUNT_MAX: Final = 99_999_999  # minor units of a price, a payment or a refund


def check_amount(amount: int, currency: str, param: str) -> None:
    """Refuse an amount that is not a multiple of the currency's step."""
    step = STEPS.get(currency, 1)
    if amount % step:
        raise refused(
            f"Amount must be a multiple of {step} in {currency}: {amount}", "parameter_invalid_integer", param
        )


def check_email(params: Params) -> None:
    """Refuse an address as Stripe does; an empty one unsets it."""
    email = params.get("email")
    if email and not re.fullmatch(r"[^\s@<>,]+@[^\s@<>,]+\.[^\s@<>,.]+", email):
        raise refused(f"Invalid email address: {email}", "email_invalid", "email")


def update_customer(account: StripeAccount, params: Params, key: str) -> Object:
    """Change a customer."""
    check_email(params)
    return account.update("customer", key, params)


def create_customer(account: StripeAccount, params: Params) -> Object:
    """Make a customer."""
    check_email(params)
    customer = account.new(
        "customer",
        **{
            "balance": 0,
            "delinquent": False,
            "invoice_prefix": secrets.token_hex(4).upper(),
            "invoice_settings": empty("invoice_setting_customer_setting"),
            "preferred_locales": [],
            "tax_exempt": "none",
        }
        | params
        | {"metadata": merged_metadata(params)},
    )
    account.emit("customer.created", customer)
    return customer


def create_product(account: StripeAccount, params: Params) -> Object:
    """Make a product."""
    if params.get("id") in account.objects["product"]:
        raise refused(f"Product already exists: {params['id']}", "resource_already_exists", "id")
    product = account.new(
        "product",
        **{"active": True, "images": [], "marketing_features": []}
        | params
        | {"metadata": merged_metadata(params), "updated": account.now()},
    )
    account.emit("product.created", product)
    return product


def create_price(account: StripeAccount, params: Params) -> Object:
    """Make a one-time price of an existing or a new product."""
    params = {**params}
    if "unit_amount" not in params:
        raise refused("Missing required param: unit_amount.", "parameter_missing", "unit_amount")
    if params["unit_amount"] < 0:
        raise refused("Invalid non-negative integer", "parameter_invalid_integer", "unit_amount")
    check_amount(params["unit_amount"], params["currency"].lower(), "unit_amount")
    if params["unit_amount"] > AMOUNT_MAX:
        raise refused(f"Amount must be no more than {AMOUNT_MAX}", "amount_too_large", "unit_amount")
    holders = [
        price
        for price in account.objects["price"].values()
        if params.get("lookup_key") and price["lookup_key"] == params["lookup_key"]
    ]
    if not params.pop("transfer_lookup_key", False) and holders:
        message = f"A price (`{holders[0]['id']}`) already uses that lookup key."
        raise refused(message, param="lookup_key")
    if "product_data" in params:
        params["product"] = create_product(account, params.pop("product_data"))["id"]
    elif "product" not in params:
        raise refused("Missing required param: product.", "parameter_missing", "product")
    account.get("product", params["product"], param="product")
    for price in holders:
        account.update("price", price["id"], {"lookup_key": None})
    price = account.new(
        "price",
        **{"active": True, "billing_scheme": "per_unit", "tax_behavior": "unspecified"}
        | params
        | {
            "currency": params["currency"].lower(),
            "metadata": merged_metadata(params),
            "type": "one_time",
            "unit_amount_decimal": str(params["unit_amount"]),
        },
    )
    account.emit("price.created", price)
    return price
