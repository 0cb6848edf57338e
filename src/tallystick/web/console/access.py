"""Access to the console: three ways to sign in, one for each way to run it, each followed by a signed session.

- ``LocalLink``: on the operator's own machine, a link that works once.
- ``Passwords``: named operators, each with a password whose hash is in the settings.
- ``TrustedProxy``: a reverse proxy authenticates the operator and passes the name in a header, which counts only from
  the configured addresses.

A session is a cookie, signed with a key of the process, so it cannot be forged, and restarting the console ends all
sessions. It is HttpOnly and SameSite=Strict; every form has a token made from it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import math
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from itsdangerous import BadData, URLSafeTimedSerializer

SESSION_S = 12 * 3600
LINK_S = 15 * 60
OPERATOR_MAX = 100

# The recommendation for an interactive log-in by scrypt: 16 MiB and some 50 ms for each guess.
_SCRYPT = {"n": 2**14, "r": 8, "p": 1}
_SCRYPT_BYTES = 64 * 2**20


def cookie_name(port: int | None) -> str:
    """The name of the session's cookie. Browsers send one to all ports of a host, where other consoles may be."""
    return "tallystick_console" if port is None else f"tallystick_console_{port}"


@dataclass(frozen=True, slots=True)
class Session:
    """A signed-in operator, and the session's random name."""

    operator: str
    id: str


class Sessions:
    """The sessions: signs and reads them, and keeps those that logged out until they would have expired."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._signer = URLSafeTimedSerializer(self._key, salt="console session")
        self._ended: dict[str, float] = {}
        self._lock = threading.Lock()

    def begin(self, operator: str) -> tuple[Session, str]:
        """A new session for ``operator`` and its cookie's value."""
        session = Session(operator, secrets.token_urlsafe(16))
        return session, self._signer.dumps([session.operator, session.id])

    def read(self, cookie: str | None) -> Session | None:
        """The session of a cookie; None if it is forged, too old or logged out."""
        try:
            operator, id = self._signer.loads(cookie or "", max_age=SESSION_S)
        except (BadData, ValueError, TypeError):
            return None
        return None if id in self._ended else Session(operator, id)

    def end(self, session: Session) -> None:
        """Log out."""
        now = time.monotonic()
        with self._lock:
            self._ended = {id: until for id, until in self._ended.items() if until > now}
            self._ended[session.id] = now + SESSION_S

    def token(self, session: Session) -> str:
        """The token that each form of this session must contain."""
        return hmac.new(self._key, f"form {session.id}".encode(), hashlib.sha256).hexdigest()

    def accepts(self, session: Session, token: str) -> bool:
        """True if a form's token is this session's."""
        return hmac.compare_digest(self.token(session).encode(), token.encode("utf-8", "replace"))


class LocalLink:
    """A link that works once, within a quarter of an hour; for a console that only this machine can reach."""

    operator: ClassVar[str] = "local operator"

    def __init__(self) -> None:
        self.token = secrets.token_urlsafe(32)
        self._expires = time.monotonic() + LINK_S
        self._used = False
        self._lock = threading.Lock()

    def redeem(self, token: str) -> str | None:
        """The operator for this token; None if it was used before."""
        with self._lock:
            good = hmac.compare_digest(self.token.encode(), token.encode("utf-8", "replace"))
            if self._used or not good or time.monotonic() > self._expires:
                return None
            self._used = True
            return self.operator


class TooMany(Exception):
    """Too many log-ins failed; the next is allowed in ``seconds``."""

    def __init__(self, seconds: int) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Passwords:
    """Operators by name, each with a hash made by ``hash_password``.

    After five wrong passwords for a name, or thirty in all, log-ins are refused until a minute has passed: guessing at
    that rate is hopeless, and an attacker's guesses do not lock out an operator for long.
    """

    PER_NAME: ClassVar[int] = 5
    IN_ALL: ClassVar[int] = 30
    WINDOW_S: ClassVar[float] = 60.0

    def __init__(self, operators: Mapping[str, str]) -> None:
        self._operators = dict(operators)
        self._unknown_name_hash = hash_password(
            secrets.token_urlsafe(16)
        )  # an unknown name takes as long as a wrong password
        self._failures: list[tuple[float, str]] = []
        self._lock = threading.Lock()  # one guess at a time, since each needs much memory

    def check(self, name: str, password: str) -> str | None:
        """The operator if the password is right. Raises TooMany."""
        name = name[:OPERATOR_MAX]
        with self._lock:
            now = time.monotonic()
            self._failures = [(at, who) for at, who in self._failures if at > now - self.WINDOW_S]
            of_name = [at for at, who in self._failures if who == name]
            every = [at for at, _ in self._failures]
            for failed, allowed in ((of_name, self.PER_NAME), (every, self.IN_ALL)):
                if len(failed) >= allowed:
                    raise TooMany(math.ceil(failed[0] + self.WINDOW_S - now))
            known = self._operators.get(name)
            if _verify(known or self._unknown_name_hash, password) and known is not None:
                self._failures = [(at, who) for at, who in self._failures if who != name]
                return name
            self._failures.append((now, name))
            return None


class TrustedProxy:
    """A reverse proxy that passes the operator's name in ``header``, trusted only from ``peers``, its addresses."""

    def __init__(self, peers: Sequence[str], *, header: str = "X-Forwarded-User") -> None:
        self._networks = [ipaddress.ip_network(peer, strict=False) for peer in peers]
        self._header = header.lower().encode("ascii")

    def trusts(self, peer: str | None) -> bool:
        """True if ``peer`` is the proxy."""
        try:
            address = ipaddress.ip_address(peer or "")
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None) or address
        return any(mapped in network for network in self._networks)

    def operator(self, headers: Sequence[tuple[bytes, bytes]]) -> str | None:
        """The name that the proxy passed; None if the header comes twice, since a client may have added one."""
        found = [value for name, value in headers if name.lower() == self._header]
        if len(found) != 1:
            return None
        name = found[0].decode("utf-8", "replace").strip()
        return name if 0 < len(name) <= OPERATOR_MAX and name.isprintable() else None


SignIn = LocalLink | Passwords | TrustedProxy


def hash_password(password: str) -> str:
    """The hash of ``password`` for the settings: ``scrypt:salt:hash``, with a random salt."""
    salt = secrets.token_bytes(16)
    return f"scrypt:{_encode(salt)}:{_encode(_derive(password, salt))}"


def _verify(stored: str, password: str) -> bool:
    try:
        method, salt, expected = stored.split(":")
        wanted = base64.urlsafe_b64decode(expected)
        found = _derive(password, base64.urlsafe_b64decode(salt))
    except (ValueError, binascii.Error):
        return False
    return method == "scrypt" and hmac.compare_digest(wanted, found)


def _derive(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode("utf-8", "replace"), salt=salt, dklen=32, maxmem=_SCRYPT_BYTES, **_SCRYPT)


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode("ascii")
