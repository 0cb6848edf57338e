"""The guard of all pages: it checks each request's host, origin, session and form token.

Refusing is the default: all but our own files (``/static``) and the log-in need a session.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from urllib.parse import parse_qsl, quote, urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tallystick.errors import CrossSiteRequest, RequestTooLarge, RequestTooSlow
from tallystick.web.console.access import (
    SESSION_S,
    LocalLink,
    Passwords,
    Session,
    Sessions,
    SignIn,
    TooMany,
    TrustedProxy,
    cookie_name,
)
from tallystick.web.shared.pages import security_headers
from tallystick.web.shared.requests import BODY_MAX_BYTES, check_same_site, limited

log = logging.getLogger("tallystick.console")

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

Show = Callable[..., Response]


class Refused(Exception):  # an answer, not an error of the database or the ledger, so not in their tree
    """A refused request."""

    def __init__(self, status: int, title: str, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(title)
        self.status, self.title, self.text, self.headers = status, title, text, dict(headers or {})


class Guard:
    """ASGI middleware around the console's pages. ``show(request, template, status=…, **values)`` renders one."""

    def __init__(self, app: ASGIApp, *, sign_in: SignIn, address: str, show: Show) -> None:
        self._app = app
        self._sign_in = sign_in
        self._show = show
        self._sessions = Sessions()
        parts = urlsplit(address)
        port = f":{parts.port}" if parts.port else ""
        names = {parts.netloc.lower()}
        if f"[{parts.hostname}]" in _LOOPBACK or parts.hostname in _LOOPBACK:
            names |= {name + port for name in _LOOPBACK}
        self._hosts = names
        self._origins = {f"{parts.scheme}://{name}" for name in names}
        self._secure = parts.scheme == "https"
        self._cookie_name = cookie_name(parts.port)
        self._headers = {
            **security_headers(),
            "Referrer-Policy": "same-origin",
            "X-Frame-Options": "DENY",
            "X-Robots-Tag": "noindex",
            **({"Strict-Transport-Security": "max-age=31536000"} if self._secure else {}),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        cookie: str | None = None

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    if not (name == "Cache-Control" and name in headers):
                        headers[name] = value
                if cookie is not None:
                    headers.append("set-cookie", cookie)
            await send(message)

        request = Request(scope, receive)
        scope.setdefault("state", {})
        request.state.session, request.state.token = None, ""
        try:
            self._check_host(request.headers)
            answer, cookie = await self._admit(request)
        except Refused as refusal:
            log.info("refused status=%d path=%r peer=%r", refusal.status, scope["path"], _peer(scope))
            answer = self._show(request, "refused.html", status=refusal.status, title=refusal.title, text=refusal.text)
            answer.headers.update(refusal.headers)
        await answer(scope, receive, with_headers)

    async def _admit(self, request: Request) -> tuple[ASGIApp, str | None]:
        """The app that answers this request, and the cookie to set. Raises Refused."""
        path = _path(request.scope)
        if path.startswith("/static/"):
            return self._app, None
        session, cookie = self._session(request)
        if session is None:
            return await self._answer_signed_out(request, path)
        request.state.session, request.state.token = session, self._sessions.token(session)
        if request.method in ("GET", "HEAD"):
            if path in ("/login", "/enter"):  # a bookmark, or the link once more
                return RedirectResponse(_home(request.scope), 303), cookie
            return self._app, cookie
        self._check_origin(request)
        request.state.form = await _form(request)
        if not self._sessions.accepts(session, request.state.form.get("token", "")):
            raise Refused(403, "This form is out of date", "Nothing was changed. Go back, reload, and try again.")
        if path == "/logout":
            self._sessions.end(session)
            log.info("log-out operator=%r", session.operator)
            return RedirectResponse(_home(request.scope), 303), self._cookie("", age=0)
        return self._app, cookie

    # --- sign-in ---

    def _session(self, request: Request) -> tuple[Session | None, str | None]:
        """The request's session, and the cookie to set if it is new."""
        session = self._sessions.read(request.cookies.get(self._cookie_name))
        if not isinstance(self._sign_in, TrustedProxy):
            return session, None
        # The proxy's header is required on every request: a cookie alone is not enough.
        if not self._sign_in.trusts(_peer(request.scope)):
            raise Refused(403, "Not from here", "This console is reached through its proxy only.")
        operator = self._sign_in.operator(request.scope["headers"])
        if operator is None:
            raise Refused(401, "Who are you?", "The proxy named no operator.")
        if session is not None and session.operator == operator:
            return session, None
        session, value = self._sessions.begin(operator)
        log.info("log-in operator=%r by=proxy", operator)
        return session, self._cookie(value)

    async def _answer_signed_out(self, request: Request, path: str) -> tuple[Response, str | None]:
        """Answer a request without a session: the log-in itself, or a redirect to it."""
        sign_in, scope = self._sign_in, request.scope
        if isinstance(sign_in, LocalLink):
            if path == "/enter" and request.method == "GET":
                operator = sign_in.redeem(request.query_params.get("token", ""))
                if operator is not None:
                    return self._begin_session(scope, operator, "link")
                log.warning("log-in refused by=link peer=%r", _peer(scope))
            raise Refused(
                401,
                "This link is used up" if path == "/enter" else "Not logged in",
                "Open the link that was printed when the console started. It works once, within 15 minutes. "
                "For a new one, start it again: tallystick serve",
            )
        assert isinstance(sign_in, Passwords)  # noqa: S101 - proxies were dealt with
        if path == "/login" and request.method == "POST":
            return await self._log_in(request, sign_in)
        if path == "/login" and request.method in ("GET", "HEAD"):
            return self._show(request, "login.html", error=None, name=""), None
        if request.method in ("GET", "HEAD") and not path.endswith((".json", ".csv")):
            return RedirectResponse(f"{_root(scope)}/login", 303), None
        raise Refused(401, "Not logged in", "Log in first.")

    async def _log_in(self, request: Request, sign_in: Passwords) -> tuple[Response, str | None]:
        self._check_origin(request)  # there is no session yet to make a token from
        form = await _form(request)
        name = form.get("name", "")
        try:
            operator = await run_in_threadpool(sign_in.check, name, form.get("password", ""))
        except TooMany as error:
            log.warning("log-in refused operator=%r peer=%r too many", name[:100], _peer(request.scope))
            raise Refused(
                429,
                "Too many log-ins failed",
                f"Try again in {error.seconds} seconds.",
                {"Retry-After": str(error.seconds)},
            ) from None
        if operator is None:
            log.warning("log-in refused operator=%r peer=%r", name[:100], _peer(request.scope))
            fault = "Name and password do not match."
            return self._show(request, "login.html", status=401, error=fault, name=name), None
        return self._begin_session(request.scope, operator, "password")

    def _begin_session(self, scope: Scope, operator: str, by: str) -> tuple[Response, str]:
        _, value = self._sessions.begin(operator)
        log.info("log-in operator=%r by=%s peer=%r", operator, by, _peer(scope))
        return RedirectResponse(_home(scope), 303), self._cookie(value)

    def _cookie(self, value: str, *, age: int = SESSION_S) -> str:
        secure = "; Secure" if self._secure else ""
        return f"{self._cookie_name}={value}; Max-Age={age}; Path=/; HttpOnly; SameSite=Strict{secure}"

    # --- origin ---

    def _check_host(self, headers: Headers) -> None:
        # Another site can point its own name at 127.0.0.1 (DNS rebinding); the Host header then has that name.
        if headers.get("host", "").lower() not in self._hosts:
            raise Refused(421, "Another host's name", "This console is not served under the name in this address.")

    def _check_origin(self, request: Request) -> None:
        try:
            check_same_site(request.method, request.headers, self._origins, and_no_other=True)
        except CrossSiteRequest:
            text = "Nothing was changed. Forms are accepted from the console itself."
            raise Refused(403, "From another site", text) from None


async def _form(request: Request) -> dict[str, str]:
    """The fields of a plain form; the last value of a repeated one."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise Refused(415, "Not a form", "Nothing was changed. Send application/x-www-form-urlencoded.")
    try:
        body = await Request(request.scope, limited(request, BODY_MAX_BYTES)).body()
        return dict(parse_qsl(body.decode("utf-8"), keep_blank_values=True, max_num_fields=50))
    except RequestTooLarge:
        raise Refused(413, "Too long", f"Nothing was changed. A form has at most {BODY_MAX_BYTES} bytes.") from None
    except RequestTooSlow:
        raise Refused(408, "Too slow", "Nothing was changed. The form did not arrive whole: send it again.") from None
    except ValueError:
        raise Refused(400, "Not a form", "Nothing was changed. Its fields could not be read.") from None


def _peer(scope: Scope) -> str | None:
    """The address at the other end of the connection, regardless of headers."""
    return scope["client"][0] if scope.get("client") else None


def _root(scope: Scope) -> str:
    return quote(str(scope.get("root_path", "")).rstrip("/"))


def _home(scope: Scope) -> str:
    return f"{_root(scope)}/"


def _path(scope: Scope) -> str:
    root = str(scope.get("root_path", "")).rstrip("/")
    path = str(scope["path"])
    return path[len(root) :] if root and path.startswith(root) else path
