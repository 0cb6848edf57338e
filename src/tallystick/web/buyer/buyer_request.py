"""A request to the buyer's pages, and their answers: the same for every framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol
from urllib.parse import quote

from markupsafe import Markup

from tallystick.errors import Key

SEE_OTHER: Final = 303
SERVER_FAULT: Final = 500
HTML: Final = "text/html"
OF_ADDRESSES: Final = ":/%#?=&;,@[]!$'()*+~"
"""The characters with a meaning in an address, and the percent sign."""


class BuyerRequest(Protocol):
    """A request. Each framework's adapter makes one of its own.

    Attributes:
        method: in capitals.
        address: path and query as the client wrote them, so that it can return there.
        origin: scheme and host, as the client wrote them.
        fragment: True if htmx requests a part of a page.
        html: True if a browser requests it, not a program.
    """

    method: str
    address: str
    fragment: bool
    html: bool

    @property
    def origin(self) -> str: ...  # noqa: D102 - see above

    def url(self, name: str, /, **path: str) -> str:
        """The path of one of our routes, under the host's prefix."""

    def form_token(self) -> Markup:
        """The hidden field that the framework requires in each form, or empty."""


@dataclass(frozen=True, slots=True)
class BuyerPage:
    """A page to be rendered. ``preview_of`` is the workshop whose preview the host may show in it."""

    template: str
    context: Mapping[str, Any]
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    preview_of: Key | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer."""

    status: int
    body: str = ""
    media_type: str = HTML
    headers: Mapping[str, str] = field(default_factory=dict)


def quoted(path: Mapping[str, str]) -> dict[str, str]:
    """The parameters of a path, each quoted as one segment: a key of the host's may hold any character."""
    return {name: quote(value, safe="") for name, value in path.items()}


def redirect(to: str) -> Reply:
    """An answer that redirects a browser to ``to`` by GET. Only characters that are not ASCII are quoted."""
    return Reply(SEE_OTHER, headers={"Location": quote(to, safe=OF_ADDRESSES)})
