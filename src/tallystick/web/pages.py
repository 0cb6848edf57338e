"""What every page shares: the Jinja environment, the static files and the security headers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Final

import jinja2

from tallystick.web.texts import Texts

STRIPE_CHECKOUT: Final = "https://checkout.stripe.com"

MEDIA_TYPES: Final = MappingProxyType(
    {
        "css": "text/css; charset=utf-8",
        "js": "text/javascript; charset=utf-8",
        "svg": "image/svg+xml",
    }
)


def environment(*loaders: jinja2.BaseLoader, texts: Texts | None = None) -> jinja2.Environment:
    """Templates from ``loaders``, first found wins, then Tallystick's own under ``tallystick/``.

    A host replaces ``tallystick/layout.html`` with a file of that name in its own folder of templates; inside, the
    original is at ``original/tallystick/layout.html``. All output is escaped, and an undefined name is an error.
    """
    own = jinja2.PackageLoader("tallystick.web")
    made = jinja2.Environment(
        loader=jinja2.ChoiceLoader([*loaders, own, jinja2.PrefixLoader({"original": own})]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["texts"] = texts or Texts()
    return made


def security_headers(*, form_targets: Iterable[str] = ()) -> Mapping[str, str]:
    """The headers of every page: no script, style or frame but our own files, nothing kept in shared caches.

    ``form_targets`` are origins that a form may end up at: browsers apply ``form-action`` also to where a form's
    answer redirects, and buying redirects to Stripe.
    """
    return {
        "Content-Security-Policy": "; ".join(
            (
                "default-src 'none'",
                "script-src 'self'",
                "style-src 'self'",
                "img-src 'self' data:",
                "font-src 'self'",
                "connect-src 'self'",
                " ".join(("form-action 'self'", *form_targets)),
                "base-uri 'none'",
                "frame-ancestors 'none'",
            )
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "strict-origin-when-cross-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
        # one address serves a page and, asked by htmx, its fragment
        "Vary": "Accept, HX-Request, Cookie",
    }


@cache
def static_file(name: str) -> tuple[bytes, str] | None:
    """The content and media type of one of our static files, or None; ``name`` never leaves the folder."""
    if not re.fullmatch(r"[a-z][a-z.\-]*\.(?:css|js|svg)", name):
        return None
    file = resources.files("tallystick.web").joinpath("static", name)
    if not file.is_file():
        return None
    return file.read_bytes(), MEDIA_TYPES[name.rpartition(".")[2]]


@cache
def static_version(name: str) -> str:
    """A digest of one of our static files for its address, so that browsers may keep it for ever."""
    found = static_file(name)
    if found is None:
        raise FileNotFoundError(name)
    return hashlib.sha256(found[0]).hexdigest()[:12]
