"""The buyer's side: paywall, purchase, history and welcome, as pages and as JSON.

``paywall``, ``core``, ``sales``, ``refusals`` and ``rendering`` use no framework: they get a user, a workshop and a
``BuyerRequest``, and return an answer. ``tallystick.web.django`` adapts them to Django. The adapter for FastAPI is
here: a request goes through ``entrance`` (checks), a route (``json_api``, ``views`` or ``purchase``) and ``billing`` to
the pages and the ledger. ``entrance`` catches an error, and ``refusals`` makes the answer to it.
"""
