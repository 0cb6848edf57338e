"""The buyer's side: a router for FastAPI with the paywall, purchase, history and welcome, as pages and as JSON.

One request goes down through ``entrance`` (checks), a route (``json_api``, ``views`` or ``purchase``), ``billing`` and
``paywall`` to the ledger. An error goes up to ``entrance``, and ``refusals`` makes the answer of it.
"""
