"""The parts that every page shares: the Jinja environment, the static files and the security headers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from importlib import resources
from types import MappingProxyType
from typing import Any, Final

import jinja2

STRIPE_CHECKOUT: Final = "https://checkout.stripe.com"

MEDIA_TYPES: Final = MappingProxyType(
    {
        "css": "text/css; charset=utf-8",
        "js": "text/javascript; charset=utf-8",
        "svg": "image/svg+xml",
    }
)


def environment(*loaders: jinja2.BaseLoader, **values: Any) -> jinja2.Environment:
    """Templates from ``loaders``, of which the first that has one wins; all templates get ``values``.

    All output is escaped, and an undefined name is an error.
    """
    made = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals.update(values)
    return made


def security_headers(*, form_targets: Iterable[str] = ()) -> Mapping[str, str]:
    """The headers of every page: no script, style or frame except our own files, and no shared caches.

    ``form_targets`` are further origins for forms: browsers apply ``form-action`` to redirects too, and buying
    redirects to Stripe.
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
        # one address has a page and, for htmx, its fragment
        "Vary": "Accept, HX-Request, Cookie",
    }


def buyer_headers(stripe_api_base: str | None) -> Mapping[str, str]:
    """As ``security_headers``, for pages that redirect to Stripe's hosted one, or to the test double's."""
    return security_headers(form_targets=[STRIPE_CHECKOUT, *([stripe_api_base] if stripe_api_base else [])])


class StaticFiles:
    """The files in the ``static`` folders of some of our packages: style sheets, scripts, pictures."""

    def __init__(self, *packages: str) -> None:
        self._files = {
            file.name: (file.read_bytes(), MEDIA_TYPES[ending])
            for package in packages
            for file in resources.files(package).joinpath("static").iterdir()
            if (ending := file.name.rpartition(".")[2]) in MEDIA_TYPES
        }
        self._versions = {name: hashlib.sha256(content).hexdigest()[:12] for name, (content, _) in self._files.items()}

    def get(self, name: str) -> tuple[bytes, str] | None:
        """The content and media type of a file, or None if there is none of this name."""
        return self._files.get(name)

    def version(self, name: str) -> str | None:
        """A digest of a file for its address, so that browsers may cache it for ever."""
        return self._versions.get(name)
