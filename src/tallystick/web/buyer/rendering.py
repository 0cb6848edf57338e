"""Templates as answers, and the addresses in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import jinja2
from markupsafe import Markup

from tallystick.config import Config, Pack
from tallystick.web.buyer.asked import SERVER_FAULT, Asked, BuyerPage, Reply
from tallystick.web.buyer.paywall import UNLOCK_CREDITS, Workshop
from tallystick.web.buyer.texts import Texts
from tallystick.web.shared.addresses import return_address
from tallystick.web.shared.pages import StaticFiles, environment

Frame = Callable[[Any, str, Markup], str]
"""Puts the title and the main part of a page into a layout of the host's, for a request as its adapter made it."""


class Renderer:
    """Renders the buyer's templates, each as a page or, for htmx, as the dialog of it.

    A host replaces ``tallystick/layout.html`` with a file of that name in its own folder of templates; inside, the
    original is at ``original/tallystick/layout.html``. A host whose layout is no Jinja template gives a ``frame``.
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
            new_key=_new_key,
        )

    def render(self, asked: Asked, template: str, /, **context: Any) -> str:
        """A template of ours or the host's, in a layout that is a template of Jinja's as well."""
        return self._templates.get_template(f"tallystick/{template}").render(self._given(asked, context))

    def answer(self, asked: Asked, page: BuyerPage, *, preview: Any = None) -> Reply:
        """A page, rendered; ``preview`` shows blurred behind the lock."""
        given = {**page.context, **({"preview": preview} if page.template == PAYWALL else {})}
        # A host's layout may query, which the transaction or the server may not allow after a fault
        if self._frame is None or asked.fragment or page.status >= SERVER_FAULT:
            body = self.render(asked, page.template, **given)
        else:
            body = self._framed(self._frame, asked, page.template, given)
        return Reply(page.status, body, headers=page.headers)

    def _framed(self, frame: Frame, asked: Asked, template: str, given: Mapping[str, Any]) -> str:
        end_of_title = uuid4().hex
        rendered = self.render(asked, template, **given, layout="tallystick/framed.html", end_of_title=end_of_title)
        title, _, main = rendered.partition(end_of_title)
        return frame(asked, str(Markup(title).unescape()), Markup(main))  # noqa: S704 - our templates

    def url(self, asked: Asked, name: str, /, *, query: Mapping[str, object] | None = None, **path: object) -> str:
        """The path of one of our routes under the host's prefix, with what is not None of ``query``."""
        address = asked.url(name, **{k: str(v) for k, v in path.items()})
        given = {k: v for k, v in (query or {}).items() if v is not None}
        return f"{address}?{urlencode(given)}" if given else address

    def absolute(self, asked: Asked, path: str) -> str:
        """``path`` as Stripe needs it: on the origin of this request if that is ours, else on the first of ours.

        So the client's ``Host`` header is never trusted.
        """
        ours = self._origins
        return (ours[0] if ours and asked.origin not in ours else asked.origin) + path

    def returning(self, wanted: str | None) -> str:
        """The address to return to: ``wanted`` where it is of this site or an allowed one, else home."""
        return return_address(wanted, self.home, self._origins)

    def _given(self, asked: Asked, context: Mapping[str, Any]) -> dict[str, Any]:
        fragment = asked.fragment
        return {
            "url": partial(self.url, asked),
            "static": partial(self._static, asked),
            "form_token": asked.form_token,
            "fragment": fragment,
            "heading": "h2" if fragment else "h1",
            "layout": f"tallystick/{'dialog' if fragment else 'layout'}.html",
            **context,
        }

    def _static(self, asked: Asked, name: str) -> str:
        return self.url(asked, "static", name=name, query={"v": self.static.version(name)})


PAYWALL = "paywall.html"


def paywall(workshop: Workshop | None, *, balance: int, required: int = UNLOCK_CREDITS, return_to: str) -> BuyerPage:
    """402 as a page; ``workshop`` is None where the credits are for something else."""
    return BuyerPage(
        PAYWALL,
        {"workshop": workshop, "balance": balance, "required": required, "return_to": return_to},
        status=402,
        preview_of=None if workshop is None else workshop.key,
    )


def _new_key() -> str:
    """A name for one purchase form, so that sending it twice buys once."""
    return uuid4().hex
