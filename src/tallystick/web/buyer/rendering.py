"""Answers rendered from templates, and the addresses in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import jinja2
from markupsafe import Markup

from tallystick.config import Config, Pack
from tallystick.web.buyer.buyer_request import SERVER_FAULT, BuyerPage, BuyerRequest, Reply
from tallystick.web.buyer.paywall import UNLOCK_CREDITS, Workshop
from tallystick.web.buyer.texts import Texts
from tallystick.web.shared.addresses import return_address
from tallystick.web.shared.pages import StaticFiles, environment

Frame = Callable[[Any, str, Markup], str]
"""A function that puts the title and main part of a page into the host's layout, for a request of its adapter."""


class Renderer:
    """A renderer of the buyer's templates, each as a page or, for htmx, as a dialog.

    A host replaces ``tallystick/layout.html`` with a file of that name in its own folder of templates, which can
    include the original as ``original/tallystick/layout.html``. If its layout is no Jinja template it passes a
    ``frame``.
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
        frame: Frame | None = None,
    ) -> None:
        self.texts = texts
        self.home = home
        self.static = StaticFiles("tallystick.web.buyer", "tallystick.web.shared")
        self._origins = config.checkout_origins
        self._frame = frame
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
            has_workshops=config.host.workshops is not None,
            new_key=lambda: uuid4().hex,  # for one purchase form, so that sending it twice buys once
        )

    def render(self, request: BuyerRequest, template: str, /, **context: Any) -> str:
        """A template of ours or the host's, in a layout that is also a Jinja template."""
        return self._templates.get_template(f"tallystick/{template}").render(self._given(request, context))

    def answer(self, request: BuyerRequest, page: BuyerPage, *, preview: Any = None) -> Reply:
        """A rendered page; ``preview`` is shown blurred behind the lock."""
        given = {**page.context, **({"preview": preview} if page.template == PAYWALL else {})}
        # a host's layout may query the database, which may fail after a fault
        if self._frame is None or request.fragment or page.status >= SERVER_FAULT:
            body = self.render(request, page.template, **given)
        else:
            body = self._framed(self._frame, request, page.template, given)
        return Reply(page.status, body, headers=page.headers)

    def _framed(self, frame: Frame, request: BuyerRequest, template: str, given: Mapping[str, Any]) -> str:
        end_of_title = uuid4().hex
        rendered = self.render(request, template, **given, layout="tallystick/framed.html", end_of_title=end_of_title)
        title, _, main = rendered.partition(end_of_title)
        return frame(request, str(Markup(title).unescape()), Markup(main))  # noqa: S704 - our templates

    def url(
        self, request: BuyerRequest, name: str, /, *, query: Mapping[str, object] | None = None, **path: object
    ) -> str:
        """The path of one of our routes under the host's prefix, with the values of ``query`` that are not None."""
        address = request.url(name, **{k: str(v) for k, v in path.items()})
        given = {k: v for k, v in (query or {}).items() if v is not None}
        return f"{address}?{urlencode(given)}" if given else address

    def absolute(self, request: BuyerRequest, path: str) -> str:
        """``path`` with an origin, for Stripe: this request's origin if it is one of ours, else our first one.

        So the client's ``Host`` header is never trusted.
        """
        ours = self._origins
        return (ours[0] if ours and request.origin not in ours else request.origin) + path

    def returning(self, wanted: str | None) -> str:
        """The address to return to: ``wanted`` if it is on this site or an allowed one, else home."""
        return return_address(wanted, self.home, self._origins)

    def _given(self, request: BuyerRequest, context: Mapping[str, Any]) -> dict[str, Any]:
        fragment = request.fragment
        return {
            "url": partial(self.url, request),
            "static": partial(self._static, request),
            "form_token": request.form_token,
            "fragment": fragment,
            "heading": "h2" if fragment else "h1",
            "layout": f"tallystick/{'dialog' if fragment else 'layout'}.html",
            **context,
        }

    def _static(self, request: BuyerRequest, name: str) -> str:
        return self.url(request, "static", name=name, query={"v": self.static.version(name)})


PAYWALL = "paywall.html"


def paywall(workshop: Workshop | None, *, balance: int, required: int = UNLOCK_CREDITS, return_to: str) -> BuyerPage:
    """The page for 402; ``workshop`` is None if the credits are for something else."""
    return BuyerPage(
        PAYWALL,
        {"workshop": workshop, "balance": balance, "required": required, "return_to": return_to},
        status=402,
        preview_of=None if workshop is None else workshop.key,
    )
