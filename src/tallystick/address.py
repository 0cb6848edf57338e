"""A database's address as SQLAlchemy writes it, read without SQLAlchemy: its import takes longer than most commands."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self
from urllib.parse import parse_qsl, unquote, unquote_plus

# SQLAlchemy's own pattern. That of urllib lowers a host's case, and takes a # in a password for a fragment.
_ADDRESS = re.compile(
    r"[\w+]+://(?:(?P<user>[^:/]*)(?::(?P<password>[^@]*))?@)?"
    r"(?:\[(?P<ipv6>[^/?]+)\]|(?P<host>[^/:?]+))?(?::(?P<port>[^/?]*))?(?:/(?P<dbname>[^?]*))?(?:\?(?P<query>.*))?"
)


@dataclass(frozen=True, slots=True)
class Address:
    """The parts of an address. ``query`` has every parameter behind the question mark with all of its values."""

    user: str | None
    password: str | None
    host: str | None
    port: int | None
    dbname: str | None
    query: Mapping[str, list[str]]

    @classmethod
    def of(cls, text: str) -> Self:
        """The parts of ``text``. Raises ValueError; its message repeats nothing of it, which may hold a password."""
        found = _ADDRESS.match(text)
        if found is None:
            raise ValueError("expected an address as postgresql://user:password@host:5432/database")
        if "%00" in text or "\0" in text:
            raise ValueError("the address holds a NUL character (%00), which PostgreSQL cannot read")
        if found["port"] is not None and not re.fullmatch("[0-9]+", found["port"]):
            if "," in text.partition("://")[2].rpartition("@")[2]:
                raise ValueError(_SEVERAL_HOSTS)
            raise ValueError(
                "the port is not a number; expected postgresql://user:password@host:5432/database, "
                "with any @ in the password as %40"
            )
        query: dict[str, list[str]] = {}
        for name, value in parse_qsl(found["query"] or ""):
            query.setdefault(name, []).append(value)
        _check(query)
        user, password, dbname = (found[part] and unquote(found[part]) for part in ("user", "password", "dbname"))
        port = int(found["port"]) if found["port"] else None
        return cls(user, password, found["host"] or found["ipv6"], port, dbname, query)

    @property
    def arguments(self) -> dict[str, str]:
        """The arguments of libpq, as SQLAlchemy makes them: several hosts are ``host=one:5432&host=two:5432`` too."""
        parts = {
            "user": self.user,
            "password": self.password,
            "host": self.host,
            "port": self.port and str(self.port),
            "dbname": self.dbname,
        }
        made = {name: part for name, part in parts.items() if part}
        made |= {name: ",".join(values) for name, values in self.query.items()}
        hosts = self.query.get("host", [])
        if len(hosts) > 1 or _has_ports(hosts):
            each = [host.partition(":") for host in hosts]
            made["host"] = ",".join(name for name, _, _ in each)
            made["port"] = ",".join(port for _, _, port in each)
        return made


_SEVERAL_HOSTS = "several hosts are written as postgresql://user@/database?host=host1:5432&host=host2:5432"

_OF_PSYCOPG = ("autocommit", "context", "cursor_factory", "prepare_threshold", "row_factory")
"""Arguments of ``psycopg.connect`` that are no parameters of libpq."""


def _has_ports(hosts: list[str]) -> bool:
    return any(re.fullmatch(r"[a-zA-Z0-9\-.]*:\d*", host) for host in hosts)


def _check(query: Mapping[str, list[str]]) -> None:
    for name, values in query.items():
        if name in _OF_PSYCOPG:
            raise ValueError(f"{name} is no parameter of an address. Leave it out")
        if len(values) > 1 and name == "port":
            raise ValueError(_SEVERAL_HOSTS)
        if len(values) > 1 and name != "host":
            raise ValueError(f"the parameter {name} is given twice. Write it once")
    hosts = query.get("host", [])
    if any("[" in host for host in hosts):
        raise ValueError("an IPv6 address in host= has no brackets, and its port is a parameter: host=::1&port=5432")
    if "port" in query and (len(hosts) > 1 or _has_ports(hosts)):
        raise ValueError(_SEVERAL_HOSTS)


def without(names: Collection[str], text: str) -> str:
    """The address without these parameters, and as it was otherwise."""
    found = _ADDRESS.match(text)
    if found is None or found["query"] is None:
        return text
    kept = [each for each in found["query"].split("&") if unquote_plus(each.partition("=")[0]) not in names]
    return text[: found.start("query") - 1] + ("?" + "&".join(kept) if kept else "")
