"""The idempotency keys of clients, and their place among the keys of the ledger."""

from __future__ import annotations

import re
from typing import Final, Literal

from tallystick.errors import InvalidArgument

KEY_MAX: Final = 200
"""The characters of a client's idempotency key."""


def ledger_key(purpose: Literal["key", "buy"], key: str) -> str:
    """The idempotency key for the ``key`` of a client: with a prefix, so that it is none of the host's or Stripe's.

    Raises:
        InvalidArgument: it cannot be stored.
    """
    if not 0 < len(key) <= KEY_MAX or "\0" in key:
        raise InvalidArgument(
            f"the key is not a text of 1 to {KEY_MAX} characters without NUL. Use another key",
            argument="key",
            value=key,
        )
    return f"web:{purpose}:{key}"


def sent_key(key: str) -> str | None:
    """The client's part of an idempotency key in the ledger; None if no client sent it."""
    found = re.fullmatch("web:(?:key|buy):(.*)", key, re.DOTALL)
    return None if found is None else found[1]
