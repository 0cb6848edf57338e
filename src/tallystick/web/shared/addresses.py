"""Return addresses from a client."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final
from urllib.parse import quote_plus, urlsplit

RETURN_MAX: Final = 2_000  # characters, as encoded into an address for Stripe, which takes 5,000 in all


def return_address(address: str | None, default: str, allowed_origins: Collection[str] = ()) -> str:
    """``address`` if it leads to this site or an allowed one, else ``default``.

    A path begins with one slash: browsers take two, or one and a backslash, for another site, and first remove tabs and
    line ends.
    """
    if (
        address is None
        or len(quote_plus(address)) > RETURN_MAX
        or not re.fullmatch(r"[!-~]+", address)
        or "\\" in address
    ):
        return default
    if address.startswith("/") and not address.startswith("//"):
        return address
    try:
        parts = urlsplit(address)
    except ValueError:
        return default
    if parts.scheme in {"http", "https"} and f"{parts.scheme}://{parts.netloc}" in allowed_origins:
        return address
    return default
