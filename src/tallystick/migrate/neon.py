"""A branch of a Neon project for a rehearsal: made through Neon's API, and deleted however the rehearsal ends.

Source: the API's specification, https://api-docs.neon.tech (v2), with the names that it uses. Nothing here was ever run
against Neon itself: the tests have a double of its HTTP.
"""

from __future__ import annotations

import json
import random
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import sqlalchemy as sa

from tallystick.errors import ConfigError, NeonError

API = "https://console.neon.tech/api/v2"
KEY = "NEON_API_KEY"

_PATIENCE_S = 180.0
_ANSWER_S = 30.0
_LOCKED = (423, 429)  # other operations of the project run, or too many requests: nothing was done
_DONE = ("finished", "skipped")
_OVER = ("error", "cancelled")  # "failed" is not the end: Neon tries again by itself


@contextmanager
def branch(
    project: str,
    original: sa.URL,
    *,
    api_key: str,
    api: str = API,
    waiting: Callable[[str], None] | None = None,
    patience_s: float = _PATIENCE_S,
) -> Iterator[sa.URL]:
    """The direct address of a new branch, with the data of ``original``: of its own branch where the host tells which.

    ``original`` is not connected to; its database and role are those of the branch's address.

    Args:
        project: the project's id, as ``aged-wildflower-123456``.
        original: the address of the database to be copied.
        api_key: sent to ``api`` alone, and in no message.
        api: where Neon's API is.
        waiting: told what is waited for.
        patience_s: for how long other operations of the project are waited for, each time.

    Raises:
        NeonError: it refused or did not answer. A branch that could not be deleted is named.
        ConfigError: the key or a part of the address is missing.
    """
    if not api_key:
        raise ConfigError(f"no API key of Neon. Set {KEY} in the environment", path=None, line=None, key=KEY)
    if not original.username or not original.database:
        raise ConfigError(
            "the database address names no user or no database, which a branch is reached by. Give it in full",
            path=None,
            line=None,
            key="database_url",
        )
    neon = _Neon(project, api_key, api, waiting or (lambda _: None), patience_s)
    name = f"tallystick-rehearsal-{secrets.token_hex(6)}"
    try:
        yield neon.create(name, original)
    finally:
        neon.delete(name)


class _Neon:
    """The few calls that this takes."""

    def __init__(self, project: str, api_key: str, api: str, waiting: Callable[[str], None], patience_s: float) -> None:
        where = urlsplit(api)
        if where.scheme != "https" and where.hostname not in ("127.0.0.1", "::1", "localhost"):
            raise ConfigError(f"{api} is not https, and the API key would be readable", path=None, line=None, key=None)
        self.root = f"{api.rstrip('/')}/projects/{quote(project, safe='')}"
        self.api_key = api_key
        self.waiting = waiting
        self.patience_s = patience_s
        self.asked = False
        self.id: str | None = None

    def create(self, name: str, original: sa.URL) -> sa.URL:
        wanted: dict[str, Any] = {"name": name}
        endpoint = (original.host or "").split(".")[0].removesuffix("-pooler")
        if endpoint.startswith("ep-"):
            wanted["parent_id"] = self.call("GET", f"/endpoints/{quote(endpoint)}")["endpoint"]["branch_id"]
        self.waiting(f"making the branch {name}")
        self.asked = True
        try:
            made = self.call("POST", "/branches", {"branch": wanted, "endpoints": [{"type": "read_write"}]})
        except NeonError as error:
            self.asked = error.status is None or error.status >= 500  # noqa: PLR2004 - a refusal has made nothing
            raise
        self.id = made["branch"]["id"]
        for operation in made["operations"]:
            self.finish(operation)
        where = {"branch_id": self.id, "database_name": original.database, "role_name": original.username}
        uri = self.call("GET", f"/connection_uri?{urlencode(where)}")["uri"]
        return sa.make_url(uri).set(drivername="postgresql+psycopg")

    def finish(self, operation: Mapping[str, Any]) -> None:
        deadline = time.monotonic() + self.patience_s
        while operation["status"] not in _DONE:
            if operation["status"] in _OVER or time.monotonic() > deadline:
                raise NeonError(
                    f"Neon's operation {operation['action']} is {operation['status']}. Look at the project in Neon's "
                    "console, then run it again",
                    status=None,
                )
            self.waiting(f"{operation['action']} is {operation['status']}")
            time.sleep(random.uniform(0.5, 1))  # noqa: S311  # jitter, not a secret
            operation = self.call("GET", f"/operations/{operation['id']}")["operation"]

    def delete(self, name: str) -> None:
        """Also one that was asked for and never answered for, which its name tells."""
        if not self.asked:
            return
        self.waiting(f"deleting the branch {name}")
        try:
            if self.id is None:
                found = self.call("GET", f"/branches?{urlencode({'search': name})}")["branches"]
                self.id = next((one["id"] for one in found if one["name"] == name), None)
            if self.id is not None:
                self.call("DELETE", f"/branches/{quote(self.id)}")
        except NeonError as error:
            if error.status != 404:  # noqa: PLR2004 - gone already
                raise NeonError(
                    f"the branch {name} could not be deleted ({error}). Delete it in Neon's console",
                    status=error.status,
                ) from error

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Again while the project is locked by other operations, or, for what may be asked twice, not reachable."""
        deadline = time.monotonic() + self.patience_s
        pause_s = 0.5
        while True:
            try:
                return self.once(method, path, body)
            except NeonError as error:
                harmless = error.status in _LOCKED or (method != "POST" and (error.status or 599) >= 500)  # noqa: PLR2004
                if not harmless or time.monotonic() + pause_s > deadline:
                    raise
                self.waiting(str(error))
            time.sleep(pause_s * random.uniform(0.5, 1))  # noqa: S311  # jitter, not a secret
            pause_s = min(pause_s * 2, 8)

    def once(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.api_key}", "Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        request = urllib.request.Request(  # noqa: S310 - the scheme was checked
            self.root + path, json.dumps(body).encode() if body is not None else None, headers, method=method
        )
        try:
            with _OPENER.open(request, timeout=_ANSWER_S) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise NeonError(_said(error), status=error.code) from error
        except (OSError, HTTPException) as error:
            raise NeonError(f"Neon's API did not answer: {error}. Run it again", status=None) from error
        found: dict[str, Any] = json.loads(text) if text else {}
        return found


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to wherever it leads."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _said(error: urllib.error.HTTPError) -> str:
    with error:
        try:
            said = json.loads(error.read())["message"]
        except (ValueError, KeyError, TypeError, OSError):
            said = error.reason
    remedy = {
        401: f"Set {KEY} to a key of this project",
        403: f"Set {KEY} to a key that may make branches in this project",
        404: "Is the project's id right, and is this database in it?",
    }.get(error.code, "Look at the project in Neon's console")
    return f"Neon's API said {error.code}: {said}. {remedy}"
