"""The checks of every request before anything is done: its size, its pace and its origin.

Cross-site requests: the host's session is a cookie, so a page of another site could post a form with it. Browsers send
the origin of a request in ``Sec-Fetch-Site``, older ones in ``Origin``; no page can forge either. A request that
changes something is refused if they name another site. A request with neither does not come from a browser of this
decade, so its sender has set its cookies. Tokens in forms would only add state. The host's cookie should still be
``SameSite=Lax``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import anyio
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Message, Receive

from tallystick.errors import CrossSiteRequest, RequestTooLarge, RequestTooSlow

SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
BODY_MAX_BYTES: Final = 64 * 1024
WEBHOOK_MAX_BYTES: Final = 1024 * 1024
BODY_MAX_S: Final = 30.0


def check_same_site(
    method: str, headers: Headers, allowed_origins: Collection[str] = (), *, and_no_other: bool = False
) -> None:
    """Refuse a request that changes something and was made by a page of another site.

    ``allowed_origins`` are trusted besides the origin that the request was sent to, or with ``and_no_other`` instead of
    it.

    Raises:
        CrossSiteRequest.
    """
    if method in SAFE_METHODS:
        return
    origin = headers.get("origin")
    if origin is not None and origin in allowed_origins:
        return
    site = headers.get("sec-fetch-site")
    other = and_no_other and origin is not None
    if not other and site in {"same-origin", "none"}:
        return
    # Behind a proxy that ends TLS the scheme differs, so hosts are compared.
    if not other and site is None and (origin is None or origin.partition("://")[2] == headers.get("host")):
        return
    raise CrossSiteRequest(
        f"a page of {origin or site} made this request. If that is one of yours, name it in checkout_origins",
        origin=origin,
    )


def limited(request: Request, limit_bytes: int, *, limit_s: float = BODY_MAX_S) -> Receive:
    """The request's ``receive``, for a body of at most ``limit_bytes`` that arrives within ``limit_s``.

    Raises:
        RequestTooLarge: at once by the Content-Length, else when the body exceeds the limit.
        RequestTooSlow: the body has not arrived in time.
    """
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limit_bytes:
        raise _too_large(limit_bytes)
    receive, seen, whole = request.receive, 0, False
    deadline: float | None = None

    async def counted() -> Message:
        nonlocal seen, whole, deadline
        if whole:  # the next message is the client's disconnection, at any time
            return await receive()
        if deadline is None:
            deadline = anyio.current_time() + limit_s
        with anyio.CancelScope(deadline=deadline):
            message = await receive()
            seen += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > limit_bytes:
                raise _too_large(limit_bytes)
            return message
        raise RequestTooSlow(
            f"the body did not arrive within {limit_s:g} s. Make the same request again", limit_s=limit_s
        )

    return counted


def _too_large(limit_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body is longer than {limit_bytes} bytes. Send less", limit_bytes=limit_bytes)
