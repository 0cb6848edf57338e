"""The common handling of requests to our own routes: checks before anything is done, and answers to errors.

It does not apply to the host's own routes; for them use
``app.add_exception_handler(TallystickError, billing.refusal)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, Final
from urllib.parse import quote

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tallystick.errors import Key, RequestRefused, TallystickError
from tallystick.web.buyer.buyer_request import HTML, BuyerPage, Reply, quoted
from tallystick.web.buyer.refusals import Refusals
from tallystick.web.buyer.rendering import Renderer
from tallystick.web.shared.requests import BODY_MAX_BYTES, SAFE_METHODS, WEBHOOK_MAX_BYTES, check_same_site, limited

Headers = Sequence[tuple[bytes, bytes]]
"""Response headers, their names in lower case."""

WEBHOOK: Final = "tallystick.stripe_webhook"
"""The name of the only route for POST requests without a session."""

Preview = Callable[[Request, Key], Any]
"""The part of a workshop that the paywall shows blurred, as Markup. It is sent to the browser, so it must not contain
what a credit buys."""


class StarletteRequest:
    """A request of Starlette's, for the pages."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self.method = request.method
        self.address = _address(request)
        self.origin = f"{request.url.scheme}://{request.url.netloc}"
        self.fragment = request.headers.get("hx-request") == "true"
        self.html = HTML in request.headers.get("accept", "")

    def url(self, name: str, /, **path: str) -> str:
        """The path of one of our routes, under the host's prefix."""
        return self._request.url_for(f"tallystick.{name}", **quoted(path)).path

    def form_token(self) -> Markup:
        """None: ``check_same_site`` needs no token."""
        return Markup()


def _address(request: Request) -> str:
    scope = request.scope
    path: bytes = scope.get("raw_path") or quote(scope["path"]).encode()  # the raw one is optional in ASGI
    query: bytes = scope.get("query_string", b"")
    root = str(scope.get("root_path", "")).rstrip("/")
    if not f"{scope['path']}/".startswith(f"{root}/"):  # a proxy has removed it, as some servers expect
        path = quote(root).encode() + path
    return (path + (b"?" + query if query else b"")).decode("latin-1")


class Answers:
    """The answers of the pages as Starlette's responses, with our headers."""

    def __init__(self, renderer: Renderer, refusals: Refusals, preview: Preview | None, headers: Headers) -> None:
        self._renderer = renderer
        self._refusals = refusals
        self._preview = preview
        self._headers = headers

    async def send(self, request: Request, found: BuyerPage | Reply) -> Response:
        """The response for a page or an answer."""
        if isinstance(found, BuyerPage):
            found = self._renderer.answer(
                StarletteRequest(request), found, preview=await self._previewed(request, found)
            )
        return Response(found.body, found.status, dict(found.headers), found.media_type if found.body else None)

    async def refuse(self, request: Request, error: TallystickError) -> Response:
        """The response to an error."""
        return await self.send(request, self._refusals.answer(StarletteRequest(request), error))

    async def invalid(self, request: Request, error: RequestValidationError) -> Response:
        """The response to values that FastAPI found invalid."""
        found = [{"where": ".".join(map(str, e["loc"])), "message": e["msg"]} for e in error.errors()]
        return await self.send(request, self._refusals.invalid(StarletteRequest(request), found))

    def with_headers(self, response: Response) -> Response:
        """``response`` with our headers, except those that it has itself."""
        own = {name for name, _ in response.raw_headers}
        response.raw_headers.extend(header for header in self._headers if header[0] not in own)
        return response

    async def _previewed(self, request: Request, page: BuyerPage) -> Any:
        if self._preview is None or page.preview_of is None or StarletteRequest(request).fragment:
            return None
        preview = self._preview(request, page.preview_of)
        return await preview if inspect.isawaitable(preview) else preview


def checked_route(answers: Answers, origins: Collection[str]) -> type[APIRoute]:
    """A route class that checks each request, answers each error, and adds our headers."""

    class CheckedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            signed = self.name == WEBHOOK  # the signature of Stripe's delivery proves its origin
            body_max = WEBHOOK_MAX_BYTES if signed else BODY_MAX_BYTES

            async def checked(request: Request) -> Response:
                try:
                    if request.method not in SAFE_METHODS:  # safe methods have no body
                        if not signed:
                            check_same_site(request.method, request.headers, origins)
                        request = Request(request.scope, limited(request, body_max))
                    response = await handle(request)
                except TallystickError as error:
                    response = await answers.refuse(request, error)
                except RequestValidationError as error:
                    response = await answers.invalid(request, error)
                except HTTPException as error:
                    if not isinstance(error.__cause__, RequestRefused):  # FastAPI wraps errors of reading the body
                        raise
                    response = await answers.refuse(request, error.__cause__)
                return answers.with_headers(response)

            return checked

    return CheckedRoute
