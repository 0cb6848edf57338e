"""Templates as answers, and the addresses in them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse

from tallystick.config import Config, Pack
from tallystick.errors import Key
from tallystick.web.buyer.paywall import UNLOCK_CREDITS, Workshop
from tallystick.web.buyer.texts import Texts
from tallystick.web.shared.pages import StaticFiles, environment
from tallystick.web.shared.requests import return_address

Preview = Callable[[Request, Key], Any]
"""The part of a workshop that the paywall shows blurred, as Markup. It reaches the browser, so it must hold nothing
that a credit buys."""


class Renderer:
    """Renders the buyer's templates, each as a page or, for htmx, as the dialog of it.

    A host replaces ``tallystick/layout.html`` with a file of that name in its own folder of templates; inside, the
    original is at ``original/tallystick/layout.html``.
    """

    def __init__(
        self,
        config: Config,
        packs: Sequence[Pack],
        texts: Texts,
        *,
        templates: jinja2.BaseLoader | None,
        home: str,
        contact: str | None,
        preview: Preview | None,
    ) -> None:
        self.texts = texts
        self.home = home
        self.static = StaticFiles("tallystick.web.buyer", "tallystick.web.shared")
        self._origins = config.checkout_origins
        self._preview = preview
        own = jinja2.PackageLoader("tallystick.web.buyer")
        self._templates = environment(
            *([templates] if templates else []),
            own,
            jinja2.PrefixLoader({"original": own}),
            texts=texts,
            unlock_credits=UNLOCK_CREDITS,
            home=home,
            contact=contact,
            packs=packs,
            new_key=_new_key,
        )

    def render(self, request: Request, template: str, /, **context: Any) -> str:
        """A template of ours or the host's."""
        fragment = is_fragment(request)
        return self._templates.get_template(f"tallystick/{template}").render(
            url=partial(self.url, request),
            static=partial(self._static, request),
            fragment=fragment,
            heading="h2" if fragment else "h1",
            layout=f"tallystick/{'dialog' if fragment else 'layout'}.html",
            **context,
        )

    def page(
        self, request: Request, template: str, /, *, status: int = 200, headers: Mapping[str, str] | None = None,
        **context: Any,
    ) -> HTMLResponse:  # fmt: skip
        """A template as an answer."""
        return HTMLResponse(self.render(request, template, **context), status, headers)

    async def paywall(
        self,
        request: Request,
        workshop: Workshop | None,
        *,
        balance: int,
        required: int = UNLOCK_CREDITS,
        return_to: str,
    ) -> HTMLResponse:
        """402 as a page, with the host's preview behind the lock."""
        preview = None
        if self._preview is not None and workshop is not None and not is_fragment(request):
            preview = self._preview(request, workshop.key)
            if inspect.isawaitable(preview):
                preview = await preview
        return self.page(
            request, "paywall.html", status=402, workshop=workshop, balance=balance, required=required,
            preview=preview, return_to=return_to,
        )  # fmt: skip

    def url(self, request: Request, name: str, /, *, query: Mapping[str, object] | None = None, **path: object) -> str:
        """The path of one of our routes under the host's prefix, with what is not None of ``query``."""
        address = request.url_for(f"tallystick.{name}", **{k: str(v) for k, v in path.items()}).path
        given = {k: v for k, v in (query or {}).items() if v is not None}
        return f"{address}?{urlencode(given)}" if given else address

    def absolute(self, request: Request, path: str) -> str:
        """``path`` as Stripe needs it: on the origin of this request if that is ours, else on the first of ours.

        What a client wrote into ``Host`` is thereby never believed.
        """
        origin = f"{request.url.scheme}://{request.url.netloc}"
        ours = self._origins
        return (ours[0] if ours and origin not in ours else origin) + path

    def returning(self, asked: str | None) -> str:
        """The address to return to: ``asked`` where it is of this site or an allowed one, else home."""
        return return_address(asked, self.home, self._origins)

    def _static(self, request: Request, name: str) -> str:
        return self.url(request, "static", name=name, query={"v": self.static.version(name)})


def is_fragment(request: Request) -> bool:
    """True where htmx asks for a part of a page."""
    return request.headers.get("hx-request") == "true"


def _new_key() -> str:
    """A name for one purchase form, so that sending it twice buys once."""
    return uuid4().hex
