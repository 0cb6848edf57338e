"""Addresses that a client asked to be sent to."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final
from urllib.parse import quote_plus, urlsplit

RETURN_MAX: Final = 2_000  # characters, as encoded into an address for Stripe, which takes 5,000 in all


def return_address(asked: str | None, default: str, allowed_origins: Collection[str] = ()) -> str:
    """``asked`` if it leads to this site or an allowed one, else ``default``.

    A path begins with one slash: browsers read two, or one and a backslash, as another site, and they drop tabs and
    line ends before they look.
    """
    if asked is None or len(quote_plus(asked)) > RETURN_MAX or not re.fullmatch(r"[!-~]+", asked) or "\\" in asked:
        return default
    if asked.startswith("/") and not asked.startswith("//"):
        return asked
    try:
        parts = urlsplit(asked)
    except ValueError:
        return default
    if parts.scheme in {"http", "https"} and f"{parts.scheme}://{parts.netloc}" in allowed_origins:
        return asked
    return default
