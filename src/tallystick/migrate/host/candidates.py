"""Tables that could hold an app's users, with the signs for it. Only reads.

A name alone is a weak sign: Auth.js has ``accounts`` beside ``users`` for sign-ins with Google, Supabase has a table
``auth.users`` that no app can add a column to. So signs of a framework count more: its columns for sign-in, and foreign
keys of its own tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from tallystick.migrate.host.tables import HostTable, plain

USUAL_USERS = (
    *("users", "user", "appusers", "appuser", "people", "useraccounts", "useraccount", "accounts", "account"),
    *("members", "customers", "profiles", "profile", "userprofiles", "userprofile"),
)
"""As ``plain`` gives them."""

SERVICES = ("auth", "neon_auth")
"""Schemas of services that store an app's people, and alter their tables themselves."""

_COLUMNS = sa.text("""
    SELECT a.attrelid::bigint AS oid, lower(a.attname) AS column,
           EXISTS (SELECT FROM pg_index i WHERE i.indrelid = a.attrelid AND i.indisunique AND i.indnkeyatts = 1
                   AND i.indkey[0] = a.attnum AND i.indpred IS NULL) AS is_unique
    FROM pg_attribute a WHERE a.attrelid = ANY (CAST(:tables AS oid[])) AND a.attnum > 0 AND NOT a.attisdropped
""")
_REFERENCES = sa.text("""
    SELECT c.conrelid::bigint AS of, f.relname AS of_name, lower(a.attname) AS column, c.confrelid::bigint AS to,
           n.nspname || '.' || t.relname AS to_name
    FROM pg_constraint c
    JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = c.conkey[1]
    JOIN pg_class f ON f.oid = c.conrelid
    JOIN pg_class t ON t.oid = c.confrelid JOIN pg_namespace n ON n.oid = t.relnamespace
    WHERE c.contype = 'f' AND array_length(c.conkey, 1) = 1 AND c.conrelid = ANY (CAST(:tables AS oid[]))
    ORDER BY f.relname, a.attnum
""")
_SIGNS_IN_BY: Mapping[str, tuple[str, ...]] = {
    "Django signs people in by it": ("password", "last_login"),
    "Laravel signs people in by it": ("password", "remember_token"),
    "Devise signs people in by it": ("encrypted_password",),
    "Rails signs people in by it": ("password_digest",),
}
_CLERK = ("clerk_user_id", "clerkuserid", "clerk_id", "clerkid")
# Auth.js and Better Auth: tables of sign-ins with other services, of people in another table
_LINKS = (
    {"provider", "provideraccountid"},
    {"provider", "provider_account_id"},
    {"providerid", "accountid"},
    {"provider_id", "account_id"},
)
_PLATFORM = "supabase_"


@dataclass(frozen=True)
class Candidate:
    """A table that could hold the users: the signs, and their rank (lower is stronger)."""

    table: HostTable
    why: str
    rank: tuple[int, int]

    @property
    def signed(self) -> bool:
        """True if a framework's own signs say so, not the name alone."""
        return self.rank[0] == 0

    @property
    def named(self) -> bool:
        """True if it has a usual name."""
        return self.rank[1] < len(USUAL_USERS)


def candidates(conn: sa.Connection, everything: Sequence[HostTable]) -> list[Candidate]:
    """All tables that could be the users, the likeliest first, unsuitable ones included.

    A service's table is among them only if the app has none of its own.
    """
    oids = {"tables": [table.oid for table in everything]}
    columns: dict[int, dict[str, bool]] = {}
    for row in conn.execute(_COLUMNS, oids):
        columns.setdefault(row.oid, {})[row.column] = row.is_unique
    references: dict[int, list[Any]] = {}
    for row in conn.execute(_REFERENCES, oids):
        for oid in {row.of, row.to}:
            references.setdefault(oid, []).append(row)
    people = {table.oid for table in everything if table.table.lower().endswith(("user", "users"))}
    links = {oid for oid, names in columns.items() if any(link <= names.keys() for link in _LINKS)} - people
    found = []
    for table in everything:
        if table.oid in links:
            continue
        signs = [
            *_own_signs(columns.get(table.oid, {})),
            *_signs_of_others(table, columns, references.get(table.oid, ()), links),
        ]
        name = plain(table.table)
        named = USUAL_USERS.index(name) if name in USUAL_USERS else None
        if not signs and named is None:
            continue
        why = "; ".join(dict.fromkeys(signs)) or "its name"
        found.append(Candidate(table, why, (0 if signs else 1, len(USUAL_USERS) if named is None else named)))
    found = [one for one in found if one.table.schema not in SERVICES] or found
    return sorted(found, key=lambda one: (one.rank, one.table.schema != "public", one.table.shown))


def likeliest(found: Sequence[Candidate]) -> list[Candidate]:
    """The candidates with the strongest signs: one is the answer, more are a question for a person."""
    named = [one for one in found if one.named]
    signed = [one for one in found if one.signed]
    both = [one for one in named if one.signed]
    if signed and not both:
        return [*signed, *named]
    pool = [one for one in (both or named) if one.rank == min(other.rank for other in both or named)]
    return [one for one in pool if one.table.schema == "public"] or pool


def platform_refusal(table: HostTable) -> str | None:
    """The reason why no column can be added to a table that belongs to the platform; else None."""
    if table.owned or not table.owner.startswith(_PLATFORM):
        return None
    make = f"CREATE TABLE public.profiles (id uuid PRIMARY KEY REFERENCES {table.quoted})"
    fill = "INSERT INTO public.profiles SELECT id FROM " + table.quoted  # noqa: S608 - for a person to read
    return (
        f"belongs to {table.owner}, a role of Supabase's own, and Supabase lets nobody add columns to it. Make a table "
        f"for people of the app's own, fill it, and run tallystick init: {make}; {fill}"
    )


def _own_signs(columns: Mapping[str, bool]) -> Iterator[str]:
    for sign, names in _SIGNS_IN_BY.items():
        if columns.keys() >= set(names):
            yield f"{sign} ({', '.join(names)})"
    for name in _CLERK:
        if columns.get(name):
            yield f"its people are Clerk's ({name}, each once)"


def _signs_of_others(
    table: HostTable, columns: Mapping[int, Mapping[str, bool]], references: Sequence[Any], links: set[int]
) -> Iterator[str]:
    for reference in references:
        if reference.to == table.oid:
            if reference.of in links:
                yield f"{reference.of_name} keeps its sign-ins with other services"
            elif (reference.of_name, reference.column) == ("django_admin_log", "user_id"):
                yield "Django's admin names its people by it"
        elif (
            reference.of == table.oid
            and reference.to_name.partition(".")[0] in SERVICES
            and columns[table.oid][reference.column]
        ):
            yield f"one row for each of {reference.to_name} ({reference.column})"
