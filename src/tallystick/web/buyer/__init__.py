"""The buyer's side: paywall, purchase, history and welcome, as pages and as JSON.

``paywall``, ``pages``, ``sales``, ``refusals`` and ``rendering`` know no framework: who, which workshop, what was
asked; and the answer. ``tallystick.web.django`` is an adapter to them. The one for FastAPI is here: a request goes down
through ``entrance`` (checks), a route (``json_api``, ``views`` or ``purchase``) and ``billing`` to the pages and the
ledger. An error goes up to ``entrance``, and ``refusals`` says the answer to it.
"""
