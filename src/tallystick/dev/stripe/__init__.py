"""A small Stripe for tests, the demo and development: Checkout, refunds, disputes, signed webhooks.

::

    with DevStripe() as dev:
        client = StripeClient(dev.secret_key, base_addresses={"api": dev.url})
        ...
        dev.pay(session.id)

It serves the part of Stripe's API that selling credits needs, on 127.0.0.1, with a hosted page to click,
and refuses everything else by name. Its controls (the methods of DevStripe) are also there for other
processes: ``POST /_control/<method>`` with a JSON object of arguments.

Known, because tests compare it with something of Stripe's: the fields and types of every object and event
(Stripe's OpenAPI document, the SDK's annotations), the parameters that requests take (the same document),
the error types that the SDK makes of the answers, signatures (checked by the SDK), and the requests that
the official command line makes to complete, refund and dispute a payment.

Modelled, from Stripe's documentation and nothing else; live Stripe was not asked:

- which events a step makes, in which order, and most error messages and codes;
- idempotency keys: kept for exactly a day; requests refused for their parameters are not remembered,
  everything executed is, a refusal such as ``charge_already_refunded`` and a 500 included;
- requests are answered one at a time, so a key is never found in use (409) by a concurrent request;
- deliveries are retried a few times within seconds, by the real clock, instead of over days; endpoints
  other than the given one, its ``pending_webhooks`` and ``delivery_success`` count successes alone;
- payments happen at once, fees are 2.9 % + 30, disputes cost 1500, and the balance is never empty;
- the tax of a session is whatever ``pay`` is told, and its invoice is an id that nothing can be asked about;
- subscriptions are not modelled, but the invoices that they make: ``bill`` makes a paid one, of the lines it is told,
  and announces ``invoice.paid`` alone;
- a declined card leaves no payment intent and no event behind; a promotion code is a plain discount;
- a failed refund lowers the charge's ``amount_refunded`` again; a pending one counts from the start;
- every API version gets the objects of the one that the schemas were taken from.
"""

from tallystick.dev.stripe.server import DevStripe

__all__ = ["DevStripe"]
