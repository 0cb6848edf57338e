"""A database's address as SQLAlchemy writes it, read without SQLAlchemy: its import takes longer than most commands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self
from urllib.parse import parse_qsl, unquote

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
        """The parts of ``text``. Raises ValueError where the port is no number, or it is no address at all."""
        found = _ADDRESS.match(text)
        if found is None:
            raise ValueError("expected an address as postgresql://user:password@host:5432/database")
        query: dict[str, list[str]] = {}
        for name, value in parse_qsl(found["query"] or ""):
            query.setdefault(name, []).append(value)
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
        if len(hosts) > 1 or (hosts and "port" not in self.query and re.fullmatch(r"[a-zA-Z0-9\-.]*:\d*", hosts[0])):
            each = [host.partition(":") for host in hosts]
            made["host"] = ",".join(name for name, _, _ in each)
            made["port"] = ",".join(port for _, _, port in each)
        return made
