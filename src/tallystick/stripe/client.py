"""Stripe's SDK for one configuration, and its errors as ours. Nothing here knows the database."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import stripe as sdk
from sqlalchemy.util.concurrency import await_only, in_greenlet

from tallystick.config import Config
from tallystick.errors import StripeNotConfigured, StripeRefused, StripeUnavailable

if TYPE_CHECKING:
    import httpx

API_VERSION = "2026-10-28.endive"
"""The API version of every request and every webhook endpoint."""

MISSING = "resource_missing"
"""Stripe's code for an object that it does not have, in this account and mode."""

TIMEOUT_S = 20
RETRIES = 2
_PAUSES_S = (0.5, 1.0)  # before each retry after a 429, which the SDK does not retry
_TOO_MANY, _CONFLICT, _SERVER = 429, 409, 500

Object = dict[str, Any]
"""One of Stripe's objects, as its JSON."""

T = TypeVar("T")
One = TypeVar("One", bound=sdk.StripeObject)


def client(config: Config) -> sdk.StripeClient:
    """The SDK's client, made once for each key and address.

    Raises:
        StripeNotConfigured: the secret key is missing or malformed.
    """
    key = config.stripe_secret_key
    if not key:
        raise StripeNotConfigured(
            "no Stripe secret key. Set STRIPE_SECRET_KEY (sk_test_… while developing)", setting="stripe_secret_key"
        )
    if not key.startswith(("sk_test_", "sk_live_", "rk_test_", "rk_live_")) or not key.isascii():
        raise StripeNotConfigured(
            "STRIPE_SECRET_KEY is no secret key. Such a key begins with sk_test_, sk_live_, rk_test_ or rk_live_. "
            "Copy it from the dashboard under Developers, API keys",
            setting="stripe_secret_key",
        )
    return _client(key, config.stripe_api_base)


@lru_cache(maxsize=16)
def _client(key: str, base: str | None) -> sdk.StripeClient:
    return sdk.StripeClient(
        key,
        stripe_version=API_VERSION,
        base_addresses={"api": base} if base else {},
        max_network_retries=RETRIES,
        http_client=_Transport(timeout=TIMEOUT_S, async_fallback_client=_OnTheLoop()),
    )


class _Transport(sdk.RequestsClient):
    """The SDK's blocking HTTP client; under an async engine of SQLAlchemy it awaits.

    There the caller runs in a greenlet on the event loop. So the same code serves both ways, with the SDK's own
    retries.
    """

    def request_with_retries(self, *args: Any, **kwargs: Any) -> tuple[str, int, Mapping[str, str]]:
        """As the SDK's, or awaiting in a greenlet."""
        if in_greenlet():
            return await_only(self.request_with_retries_async(*args, **kwargs))
        return super().request_with_retries(*args, **kwargs)


class _OnTheLoop(sdk.HTTPClient):
    """An asynchronous HTTP client for the SDK.

    The SDK's own one keeps its connections for the first event loop that uses it, and passes the body by an argument
    that httpx deprecates.
    """

    name = "httpx"

    async def request_async(
        self, method: str, url: str, headers: Mapping[str, str], post_data: str | None = None
    ) -> tuple[bytes, int, Mapping[str, str]]:
        """One request, on the connections of the running event loop."""
        http = async_http()
        try:
            response = await _connections().request(method, url, headers=headers, content=post_data)
        except (http.HTTPError, http.InvalidURL) as error:
            message = f"{type(error).__name__}: {error}"
            raise sdk.APIConnectionError(message, should_retry=True) from error  # type: ignore[no-untyped-call]
        return response.content, response.status_code, response.headers

    def sleep_async(self, secs: float) -> Any:
        """The SDK's pause before a retry."""
        return asyncio.sleep(secs)


_by_loop: dict[asyncio.AbstractEventLoop, httpx.AsyncClient] = {}
"""Connections to Stripe, by their event loop; a process usually has one."""


def async_http() -> ModuleType:
    """The HTTP library for requests on an event loop. Raises ModuleNotFoundError with the extra's name."""
    try:
        import httpx  # noqa: PLC0415 - needed under an async engine alone
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "selling on an async engine needs httpx. Run: pip install 'tallystick[stripe]'", name=missing.name
        ) from missing
    return httpx


def _connections() -> httpx.AsyncClient:
    loop = asyncio.get_running_loop()
    if loop not in _by_loop:
        for closed in [one for one in tuple(_by_loop) if one.is_closed()]:
            _by_loop.pop(closed, None)
        trusted = ssl.create_default_context(cafile=sdk.ca_bundle_path)
        _by_loop[loop] = async_http().AsyncClient(verify=trusted, timeout=TIMEOUT_S)
    return _by_loop[loop]


async def disconnect() -> None:
    """Close the connections to Stripe of the running event loop, before it ends."""
    connections = _by_loop.pop(asyncio.get_running_loop(), None)
    if connections is not None:
        await connections.aclose()


def _pause(seconds: float) -> None:
    if in_greenlet():
        await_only(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)


def is_live(config: Config) -> bool:
    """True if the key is a live one."""
    return (config.stripe_secret_key or "")[3:].startswith("live_")


def ask(call: Callable[[], T]) -> T:
    """Make a request, with retries after a 429; the SDK itself retries after a 5xx or a lost connection.

    Raises:
        StripeUnavailable: try again later.
        StripeRefused: the message says what to do.
    """
    for pause_s in (*_PAUSES_S, None):
        try:
            return call()
        except sdk.RateLimitError as error:
            if pause_s is None:
                raise _unavailable(error) from error
            _pause(pause_s * random.uniform(0.5, 1))  # noqa: S311 - not a secret
        except sdk.APIConnectionError as error:
            raise _unavailable(error) from error
        except sdk.StripeError as error:
            if error.http_status is None or error.http_status >= _SERVER or error.http_status == _CONFLICT:
                raise _unavailable(error) from error
            raise _refused(error) from error
    raise AssertionError


def ask_or_none(call: Callable[[], T]) -> T | None:
    """As ``ask``; None if Stripe does not have the object."""
    try:
        return ask(call)
    except StripeRefused as error:
        if error.code == MISSING:
            return None
        raise


def list_all(call: Callable[[], sdk.ListObject[One]]) -> Iterator[One]:
    """All objects of a list; each page is a request by ``ask``."""
    page = ask(call)
    while True:
        yield from page.data
        if not page.has_more:
            return
        page = ask(page.next_page)


def _unavailable(error: sdk.StripeError) -> StripeUnavailable:
    reason = f"answered {error.http_status}" if error.http_status else "did not answer"
    return StripeUnavailable(
        f"Stripe {reason}. Nothing is lost: make the same call again, with the same key if it takes one",
        status=error.http_status,
    )


def _refused(error: sdk.StripeError) -> StripeRefused:
    reason = (error.user_message or "no reason given").rstrip(".")
    advice = {
        401: "Check STRIPE_SECRET_KEY",
        403: "Give the restricted key the permission it lacks",
    }.get(error.http_status or 0, "Compare with: tallystick stripe check")
    return StripeRefused(
        f"Stripe refused ({error.http_status}): {reason}. {advice}",
        status=error.http_status,
        code=error.code,
        param=getattr(error, "param", None),
    )
