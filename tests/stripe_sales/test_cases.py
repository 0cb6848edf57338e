"""What fulfilment must survive: one test for each row of the table in docs/stripe.md."""

from __future__ import annotations

from stripe_sales.shop import CREDITS, Shop


def test_bought(shop: Shop):
    user = shop.world.user()
    bought = shop.checkout(user)
    shop.dev.pay(bought.session)
    assert shop.outcomes() == ["granted"]
    assert shop.balance(user) == CREDITS
