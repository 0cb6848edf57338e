"""A small Stripe for tests, the demo and development: Checkout, refunds, disputes, signed webhooks.

::

    with DevStripe() as dev:
        client = StripeClient(dev.secret_key, base_addresses={"api": dev.url})
        ...
        dev.pay(session.id)

It serves the part of Stripe's API that selling credits needs, on 127.0.0.1, with a hosted page to click,
and refuses everything else by name. Other processes can call its controls (the methods of DevStripe) by
``POST /_control/<method>`` with a JSON object of arguments.

Tests compare these parts with Stripe's own: the fields and types of every object and event (Stripe's OpenAPI document,
the SDK's annotations), the parameters of requests (the same document), the error types that the SDK makes of the
answers, signatures (checked by the SDK), and the requests of the official command line to complete, refund and dispute
a payment.

These parts follow Stripe's documentation only, and were not compared with live Stripe:

- the events of each step, their order, and most error messages and codes;
- idempotency keys: kept for exactly a day; requests refused for their parameters are not stored, all executed ones
  are, also a refusal such as ``charge_already_refunded`` and a 500;
- requests are answered one at a time, so a key is never found in use (409) by a concurrent request;
- deliveries are retried a few times within seconds, by the real clock, instead of over days; endpoints
  other than the given one, its ``pending_webhooks`` and ``delivery_success`` count successes alone;
- payments happen at once, fees are 2.9 % + 30, disputes cost 1500, and the balance is never empty;
- the tax of a session is the argument of ``pay``, and its invoice is only an id;
- subscriptions are not modelled, only their invoices: ``bill`` makes a paid one of the given lines, with the event
  ``invoice.paid`` alone;
- a declined card leaves no payment intent and no event behind; a promotion code is a plain discount;
- a failed refund lowers the charge's ``amount_refunded`` again; a pending one counts from the start;
- every API version gets the objects of the version of the schemas.
"""

from tallystick.dev.stripe.server import DevStripe

__all__ = ["DevStripe"]
