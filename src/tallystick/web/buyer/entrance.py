"""The way into our own routes: checks before anything is done, and errors turned into answers.

A host's own routes do not pass here; for them there is ``app.add_exception_handler(TallystickError, billing.refusal)``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, Final

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tallystick.errors import RequestRefused, TallystickError
from tallystick.web.buyer.refusals import Refusals
from tallystick.web.shared.requests import BODY_MAX_BYTES, SAFE_METHODS, WEBHOOK_MAX_BYTES, check_same_site, limited

Headers = Sequence[tuple[bytes, bytes]]
"""Headers as they are sent, their names in lower case."""

WEBHOOK: Final = "tallystick.stripe_webhook"
"""The name of the one route that is posted to without a session."""


def checked_route(refusals: Refusals, origins: Collection[str], headers: Headers) -> type[APIRoute]:
    """A class of routes: each request is checked, each error becomes an answer, and answers get ``headers``."""

    class CheckedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            signed = self.name == WEBHOOK  # a delivery of Stripe's, whose signature proves its origin
            body_max = WEBHOOK_MAX_BYTES if signed else BODY_MAX_BYTES

            async def checked(request: Request) -> Response:
                try:
                    if request.method not in SAFE_METHODS:  # of the others no body is read
                        if not signed:
                            check_same_site(request.method, request.headers, origins)
                        request = Request(request.scope, limited(request, body_max))
                    response = await handle(request)
                except TallystickError as error:
                    response = await refusals.answer(request, error)
                except RequestValidationError as error:
                    response = refusals.invalid(request, error)
                except HTTPException as error:
                    if not isinstance(error.__cause__, RequestRefused):  # FastAPI wraps errors of reading the body
                        raise
                    response = await refusals.answer(request, error.__cause__)
                return dressed(response, headers)

            return checked

    return CheckedRoute


def dressed(response: Response, headers: Headers) -> Response:
    """``response`` with ``headers`` where it has none of its own."""
    own = {name for name, _ in response.raw_headers}
    response.raw_headers.extend(header for header in headers if header[0] not in own)
    return response
