"""The mapping that ``tallystick init`` proposes for a database that it reads."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import sqlalchemy as sa
from pydantic import ValidationError

from tallystick.config import HostMapping, UsersTable, Word, WorkshopsTable
from tallystick.database import refuse_other_than
from tallystick.errors import HostMismatch
from tallystick.migrate.host.candidates import Candidate, candidates, likeliest, platform_refusal
from tallystick.migrate.host.preflight import (
    adopted_columns,
    current_revision,
    mapped_table,
    prepared_revisions,
    refuse_two_integers,
    spelled_otherwise,
    taken,
    unfit,
)
from tallystick.migrate.host.tables import (
    KEY_WORDS,
    MOMENTS,
    HostColumn,
    HostTable,
    columns_of,
    host_tables,
    oid_of,
    plain,
    reading_catalogues,
    unsuitable,
)
from tallystick.schema import mapping_of, refuse_other_mapping

_REFERENCES = sa.text("""
    SELECT f.attname AS column, t.attname AS key
    FROM pg_constraint c
    JOIN pg_attribute f ON f.attrelid = c.conrelid AND f.attnum = c.conkey[1]
    JOIN pg_attribute t ON t.attrelid = c.confrelid AND t.attnum = c.confkey[1]
    WHERE c.contype = 'f' AND c.conrelid = :from AND c.confrelid = :to AND array_length(c.conkey, 1) = 1
    UNION
    SELECT f.attname, t.attname
    FROM pg_constraint c
    JOIN pg_constraint p ON p.conrelid = c.confrelid AND p.conkey = c.confkey
    JOIN pg_attribute f ON f.attrelid = c.conrelid AND f.attnum = c.conkey[1]
    JOIN pg_attribute t ON t.attrelid = p.confrelid AND t.attnum = p.confkey[1]
    WHERE c.contype = 'f' AND p.contype = 'f' AND c.conrelid = :from AND p.confrelid = :to
      AND array_length(c.conkey, 1) = 1
    UNION
    SELECT f.attname, k.attname
    FROM pg_constraint c
    JOIN pg_constraint u ON u.confrelid = c.confrelid AND u.confkey = c.confkey
    JOIN pg_index i ON i.indrelid = u.conrelid AND i.indisunique AND i.indnkeyatts = 1 AND i.indkey[0] = u.conkey[1]
    JOIN pg_attribute f ON f.attrelid = c.conrelid AND f.attnum = c.conkey[1]
    JOIN pg_attribute k ON k.attrelid = u.conrelid AND k.attnum = u.conkey[1]
    WHERE c.contype = 'f' AND u.contype = 'f' AND c.conrelid = :from AND u.conrelid = :to
      AND array_length(c.conkey, 1) = 1
    ORDER BY 1, 2
""")
"""Columns with a key of ``to``: by a foreign key to it, to what refers to it by its own key, or to what its own key
refers to."""

_TARGETS = sa.text("""
    SELECT f.attname AS column, c.confrelid::bigint AS oid
    FROM pg_constraint c JOIN pg_attribute f ON f.attrelid = c.conrelid AND f.attnum = c.conkey[1]
    WHERE c.contype = 'f' AND c.conrelid = :from AND array_length(c.conkey, 1) = 1 ORDER BY c.conkey[1]
""")

_WORKSHOPS = ("workshops", "workshop")
_OWNERS = ("userid", "ownerid", "owner", "user", "createdby", "authorid", "clerkuserid")
_TITLES = ("title", "name", "subject", "heading", "topic")
_CREATED = ("createdat", "created", "createdon", "insertedat", "datecreated")
_BALANCES = (
    *("creditbalance", "credits", "creditsbalance", "credit", "creditsleft", "creditsremaining"),
    *("remainingcredits", "availablecredits"),
)
_OF_BALANCES = (*_BALANCES, "balance", "walletbalance", "currentbalance", "availablebalance")
_EMAILS = ("email", "emailaddress", "mail")
"""Usual names, the likeliest first, as ``plain`` gives them."""

_CALLED_BALANCES = re.compile(r"(wallet|balance|credit|credit_?account)s?$", re.IGNORECASE)
_HOLDERS = sa.text("""
    SELECT DISTINCT attrelid::bigint FROM pg_attribute
    WHERE attrelid = ANY (CAST(:tables AS oid[])) AND NOT attisdropped
      AND replace(lower(attname), '_', '') = ANY (:names)
""")
_NUMBERS = ("int2", "int4", "int8", "numeric", "float4", "float8", "money")
"""Types, or what a domain is over, of a column that may hold credits; some of them must be changed first."""


@dataclass(frozen=True)
class BalancesApart:
    """A column that seems to hold the users' credits in another table, whose column ``key`` has a user's key.

    With ``options`` ``tallystick init`` maps that table in place of the users. ``obstacle`` is the reason why it is
    unsuitable as it is, or None.
    """

    column: str
    key: str
    options: Mapping[str, str]
    obstacle: str | None

    def sentence(self, init: str = "tallystick init --force") -> str:
        """A sentence with the command that maps the table."""
        command = " ".join([init, *(f"{name} {shlex.quote(to)}" for name, to in self.options.items())])
        first = f"It cannot serve yet, since {self.obstacle}. Mend that, then run" if self.obstacle else "If so, run"
        return (
            f"{self.column} may hold the credits of each user ({self.key}) already, and with this mapping everybody "
            f"begins with 0 in another column. {first}: {command}"
        )


def propose(
    conn: sa.Connection,
    users: str | None = None,
    workshops: str | None = None,
    users_key: str | None = None,
    *,
    balance: str | None = None,
    credits: Literal["integer", "bigint"] | None = None,
    own_columns: bool = False,
) -> HostMapping:
    """A mapping for this database, from the names of its tables and the references between them.

    Args:
        conn: only read from.
        users: the users' table, as ``table`` or ``schema.table``, if the guess is wrong.
        workshops: likewise; the default is a table named workshop(s), or none. ``"none"`` is none in any case.
        users_key: the users' key column, if it is not the primary key.
        balance: the users' column that holds credits already; the default is one with a usual name. ``"none"`` is
            none in any case.
        credits: the type of a number of credits; the default is ``bigint`` if the balances are, else ``integer``.
        own_columns: add ``stripe_customer_id``, ``updated_at`` and ``deleted_at`` even if the app has such columns in
            another spelling, as "deletedAt"; the default is to use those.

    A migrated database has its stored mapping, which is returned.

    Raises:
        HostMismatch: no table, or more than one, fits; the message says what to type. Or the database was migrated for
            another mapping than the arguments ask for.
    """
    refuse_other_than(conn, (sa.Connection,), "propose takes a Connection of SQLAlchemy")
    with reading_catalogues(conn):
        stored = mapping_of(conn) if current_revision(conn) or prepared_revisions(conn) else None
        if stored is not None and users is workshops is users_key is balance is credits is None and not own_columns:
            return _with_present_email(conn, stored)
        found = _propose(conn, users, workshops, users_key, balance, credits=credits)
        found = found if own_columns else _with_app_columns(conn, found)
        if stored is not None:  # it alone knows these two
            found = replace(found, credits=credits or stored.credits, ledger_schema=stored.ledger_schema)
            refuse_other_mapping(stored, found)
        return found


def _with_present_email(conn: sa.Connection, stored: HostMapping) -> HostMapping:
    """The stored mapping, with another column of e-mail addresses if the app has none of that name any more."""
    table = mapped_table(conn, "users", stored.users.schema, stored.users.table)
    columns = columns_of(conn, table)
    if stored.users.email is None or stored.users.email in columns:
        return stored
    found = _pick(columns.values(), _EMAILS, ("text", "varchar", "citext"))
    return replace(stored, users=replace(stored.users, email=found))


def people(conn: sa.Connection) -> list[Candidate]:
    """The suitable tables that could be the users, the likeliest first."""
    return [one for one in candidates(conn, host_tables(conn)) if not unsuitable(one.table)]


def other_than_primary(conn: sa.Connection, mapping: HostMapping) -> str | None:
    """The primary key of the users, if the mapping names another column as their key."""
    table = mapped_table(conn, "users", mapping.users.schema, mapping.users.table)
    primary = [column.name for column in columns_of(conn, table).values() if column.is_primary]
    return None if not primary or primary == [mapping.users.key] else ", ".join(primary)


def has_balances(conn: sa.Connection, mapping: HostMapping) -> bool:
    """True if the mapped balance column exists before the migration, and so is adopted."""
    table = mapped_table(conn, "users", mapping.users.schema, mapping.users.table)
    return current_revision(conn) is None and mapping.users.balance in columns_of(conn, table)


def in_place_of_ours(conn: sa.Connection, mapping: HostMapping) -> list[tuple[str, str]]:
    """The app's columns that the mapping uses in place of ours, before the migration: both names."""
    return [
        (f'{table.schema}.{table.table}."{name}"', ours)
        for table in (mapping.by_word.values() if current_revision(conn) is None else ())
        for ours, name in table.adoptable.items()
        if ours not in (name, "credit_balance")
    ]


def _with_app_columns(conn: sa.Connection, mapping: HostMapping) -> HostMapping:
    """The mapping with the app's columns whose names are ours in another spelling."""
    users, workshops = mapping.users, mapping.workshops
    return replace(
        mapping,
        users=replace(users, **_columns_spelled_otherwise(conn, "users", users)),
        workshops=workshops and replace(workshops, **_columns_spelled_otherwise(conn, "workshops", workshops)),
    )


def _columns_spelled_otherwise(conn: sa.Connection, word: Word, table: UsersTable | WorkshopsTable) -> dict[str, Any]:
    columns = columns_of(conn, mapped_table(conn, word, table.schema, table.table))
    found: dict[str, Any] = {}
    for ours in table.adoptable:
        # a balance is found by its usual names
        if ours != "credit_balance" and ours not in columns:
            spelled = [name for name in spelled_otherwise(ours, columns) if not unfit(word, ours, columns[name])]
            if len(spelled) == 1:
                found[ours] = spelled[0]
    return found


def balances_apart(conn: sa.Connection, mapping: HostMapping) -> list[BalancesApart]:
    """Columns that seem to hold the credits of the users, beside the mapped one; none where that is adopted."""
    with reading_catalogues(conn):
        return _balances_apart(conn, mapping)


def _balances_apart(conn: sa.Connection, mapping: HostMapping) -> list[BalancesApart]:
    users = mapped_table(conn, "users", mapping.users.schema, mapping.users.table)
    columns = columns_of(conn, users)
    ours = current_revision(conn) is not None and ("users", "credit_balance") not in adopted_columns(conn)
    if mapping.users.balance in columns and not ours:
        return []
    place = mapping.workshops
    if place is not None and oid_of(conn, place.schema, place.table) is None:
        # the defaults, before tallystick init: which looks for workshops by itself
        beside = _balances_apart(conn, replace(mapping, workshops=None))
        return [replace(one, options={k: v for k, v in one.options.items() if k != "--workshops"}) for one in beside]
    mapped = {(mapping.users.schema, mapping.users.table), *([(place.schema, place.table)] if place else [])}
    # a table that inherits is a partition, and its balances are those of the whole
    tables = [t for t in host_tables(conn) if (t.schema, t.table) not in mapped and (t.kind != "r" or not t.inherits)]
    names = {"tables": [table.oid for table in tables], "names": list(_OF_BALANCES)}
    holders = set(conn.scalars(_HOLDERS, names))
    found = [
        (table, one) for table in tables if table.oid in holders for one in _balances_of(conn, table, users, mapping)
    ]
    # a view stands for the table behind it, which may be another of them
    beside = [one for table, one in found if not unsuitable(table)] or [one for _, one in found]
    others = [column for column in columns.values() if column.name != mapping.users.balance]
    own = _pick_balance(others, _OF_BALANCES)
    return [*([_apart(users, own, mapping.users.key, mapping, _balance_obstacle(own))] if own else []), *beside]


def _balances_of(
    conn: sa.Connection, table: HostTable, users: HostTable, mapping: HostMapping
) -> Iterator[BalancesApart]:
    columns = columns_of(conn, table)
    balance = _pick_balance(columns.values(), _OF_BALANCES)
    references = {row.column: row.key for row in conn.execute(_REFERENCES, {"from": table.oid, "to": users.oid})}
    called = _CALLED_BALANCES.search(table.table)
    usual = [name for name in columns if plain(name) in _OWNERS or name == mapping.users.key != "id"]
    of_users = [name for name in (*references, *_ranked(usual, _OWNERS)) if columns[name].key_type]
    key = min(of_users, key=lambda name: references.get(name) != mapping.users.key, default=None)
    if balance is None:
        return
    if key is None:
        if called and any(row.oid == table.oid for row in conn.execute(_TARGETS, {"from": users.oid})):
            lacking = f"{table.shown} has no column with the user's key: it needs one, NOT NULL and UNIQUE"
            yield _apart(table, balance, "user_id", mapping, lacking)
        return
    if not (called or (key in references and columns[key].identifies)):
        return
    obstacle = None
    if reason := unsuitable(table):
        obstacle = f"{table.shown} {reason}"
    elif references.get(key, mapping.users.key) != mapping.users.key and mapping.workshops is not None:
        obstacle = (
            f"{key} refers to {users.shown}.{references[key]}, and the workshops name their owner by "
            f"{mapping.users.key}: it needs a column of these too"
        )
    elif not columns[key].identifies:
        obstacle = f"{key} is not both NOT NULL and UNIQUE: it has to hold one row for each user"
    else:
        obstacle = _balance_obstacle(balance) or _of_another_type(conn, columns[key], mapping)
    found = _apart(table, balance, key, mapping, obstacle)
    if obstacle is None:
        asked = found.options
        try:
            _propose(conn, asked["--users"], asked["--workshops"], asked["--users-key"], asked["--balance"])
        except HostMismatch as error:
            found = replace(found, obstacle=error.message)
    yield found


def _apart(
    table: HostTable, balance: HostColumn, key: str, mapping: HostMapping, obstacle: str | None
) -> BalancesApart:
    place = mapping.workshops
    return BalancesApart(
        column=f"{table.shown}.{balance.name}",
        key=key,
        options={
            "--users": table.shown,
            "--users-key": key,
            "--balance": balance.name,
            "--workshops": f"{place.schema}.{place.table}" if place else "none",
        },
        obstacle=obstacle,
    )


def _balance_obstacle(balance: HostColumn) -> str | None:
    """The reason why the ledger cannot use a column of balances as it is."""
    found = unfit("users", "credit_balance", balance)
    if not found:
        return None
    if balance.generated:
        return f"{balance.name} is generated: it has to be a column that can be written"
    return f"{balance.name} is {balance.shown}: it has to be {found.expected.removesuffix(', whole numbers from 0')}"


def _of_another_type(conn: sa.Connection, key: HostColumn, mapping: HostMapping) -> str | None:
    """The reason why the workshops cannot name their owner by that key."""
    place = mapping.workshops
    if place is None:
        return None
    owner = columns_of(conn, mapped_table(conn, "workshops", place.schema, place.table)).get(place.owner)
    if owner is None or owner.key_type == key.key_type:
        return None
    return (
        f"{key.name} is {key.shown}, and the workshops name their owner by {owner.name}, which is {owner.shown}: "
        "both have to be of one type"
    )


def _propose(
    conn: sa.Connection,
    users: str | None,
    workshops: str | None,
    users_key: str | None,
    balance: str | None,
    *,
    credits: Literal["integer", "bigint"] | None = None,
) -> HostMapping:
    migrated = bool(current_revision(conn) or prepared_revisions(conn))
    everything = host_tables(conn)
    users_table = _named_table("users", everything, users) if users is not None else _users(conn, everything)
    if refusal := platform_refusal(users_table):
        raise HostMismatch(f"{users_table.shown} {refusal}", table=users_table.shown)
    columns = columns_of(conn, users_table)
    keys = [column for column in columns.values() if column.identifies]
    if not keys:
        raise HostMismatch(
            f"{users_table.shown} has no column that is NOT NULL, UNIQUE and of a type that can be a key "
            f"({KEY_WORDS}). Give it one, or name another table: --users schema.table",
            table=users_table.shown,
        )
    key = _users_key(users_table, columns, keys, users_key)
    workshops_table = None
    if workshops is None:
        workshops_table = _workshops(conn, everything, users_table)
    elif workshops != "none":
        workshops_table = _named_table("workshops", everything, workshops)
        if workshops_table.oid == users_table.oid:
            raise HostMismatch(
                f"users and workshops would both be {users_table.shown}. Name another table with --users or with "
                "--workshops, or use --workshops none",
                table=users_table.shown,
            )
    found = None
    if workshops_table is not None:
        asked = [key] if users_key is not None else keys
        people = {one.table.oid for one in candidates(conn, everything)}
        key, found = _propose_workshops(conn, users_table, asked, key, workshops_table, people=people)
    held_in = _balance(users_table, columns, balance, key=key.name)
    name = held_in.name if held_in else "credit_balance"
    credits = credits or ("bigint" if held_in and held_in.type == "int8" else "integer")
    if not migrated and name in columns:
        _refuse_unfit(users_table, columns[name], credits, balance)
    with _one_column_for_each(users_table, "Name another one: --users-key COLUMN, or --balance COLUMN"):
        mapped = UsersTable(
            schema=users_table.schema,
            table=users_table.table,
            **key.key_settings,
            email=_pick(columns.values(), _EMAILS, ("text", "varchar", "citext")),
            balance=name,
        )
    mapping = HostMapping(users=mapped, workshops=found, credits=credits)
    apart = not migrated and taken(conn, mapping)
    return replace(mapping, ledger_schema="tallystick") if apart else mapping


def _balance(table: HostTable, columns: Mapping[str, HostColumn], asked: str | None, *, key: str) -> HostColumn | None:
    """The app's own column of credits."""
    if asked not in (None, "none"):
        if asked == key:
            raise HostMismatch(
                f"{asked} is the key of {table.shown}, so it holds no credits. Name the column that does, or use "
                "--balance none",
                table=table.shown,
                column=asked,
            )
        if asked not in columns:
            raise HostMismatch(
                f"{table.shown} has no column {asked}. Name the column that holds credits, or use --balance none",
                table=table.shown,
                column=asked,
            )
        return columns[asked]
    found = _pick_balance(columns.values(), _OF_BALANCES if _CALLED_BALANCES.search(table.table) else _BALANCES)
    return found if found and asked != "none" and not _balance_obstacle(found) else None


def _refuse_unfit(table: HostTable, column: HostColumn, credits: str, asked: str | None) -> None:
    """Raise HostMismatch if the column that would be the balance cannot be adopted, as the plan would."""
    name = column.name
    rename = (
        f"If it means something else, it needs another name, since Tallystick's own column is called {name}: code that "
        f"uses it breaks with ALTER TABLE {table.quoted} RENAME COLUMN {name} TO {name}_before, so deploy code "
        "that knows both names first"
    )
    if asked == "none":
        raise HostMismatch(f"{table.shown} has a column {name} already. {rename}", table=table.shown, column=name)
    if wrong := unfit("users", "credit_balance", column, credits):
        other = rename if name == "credit_balance" else "If it holds no credits, use --balance none"
        raise HostMismatch(
            f"{table.shown}.{name} is {wrong.found}, and a balance has to be {wrong.expected}. If it holds credits, "
            f"change that, or name another column with --balance. {other}",
            table=table.shown,
            column=name,
        )


def _users_key(
    table: HostTable, columns: Mapping[str, HostColumn], keys: Sequence[HostColumn], asked: str | None
) -> HostColumn:
    """The column that was asked for, or else the primary key; never another one silently."""
    found = [column for column in keys if (column.name == asked if asked is not None else column.is_primary)]
    primary = [f"{column.name} ({column.shown})" for column in columns.values() if column.is_primary]
    if not found and (asked is not None or primary or len(keys) > 1):
        cause = "it has no primary key"
        if asked is not None:
            cause = f"{asked} is not NOT NULL, UNIQUE and of a type that can be a key ({KEY_WORDS})"
            cause = cause if asked in columns else f"it has no column {asked}"
        elif primary:
            cause = f"its primary key {', '.join(primary)} cannot be a key here ({KEY_WORDS} of one column can)"
        others = " or ".join(f"--users-key {shlex.quote(column.name)}" for column in keys)
        raise HostMismatch(
            f"no key could be chosen for {table.shown}: {cause}. Choose one: {others}",
            table=table.shown,
            column=asked,
        )
    return (found or list(keys))[0]


def _propose_workshops(
    conn: sa.Connection,
    users: HostTable,
    keys: Sequence[HostColumn],
    primary: HostColumn,
    table: HostTable,
    *,
    people: Collection[int],
) -> tuple[HostColumn, WorkshopsTable]:
    """The workshops, and the users' key that their owner column contains.

    ``people`` are the tables that could be the users.
    """
    columns = columns_of(conn, table)
    key = min((c for c in columns.values() if c.identifies), key=lambda c: not c.is_primary, default=None)
    if key is None:
        raise HostMismatch(
            f"{table.shown} has no column that is NOT NULL, UNIQUE and of a type that can be a key ({KEY_WORDS}). "
            "Give it one, or name another table: --workshops schema.table",
            table=table.shown,
        )
    by_name = {candidate.name: candidate for candidate in keys}
    references = {
        row.column: by_name[row.key]
        for row in conn.execute(_REFERENCES, {"from": table.oid, "to": users.oid})
        if row.key in by_name
    }
    owner = next(iter(_ranked(references, _OWNERS)), None)
    if owner is not None:
        users_key = references[owner]
    else:
        # Without a foreign key: a column with the name of a users' key, or with a usual name and a key's type.
        like_a_key = [name for name in by_name if name in columns and name not in (key.name, primary.name)]
        usual = [name for name in columns if plain(name) in _OWNERS]
        of_others = [row.column for row in conn.execute(_TARGETS, {"from": table.oid}) if row.oid in people]
        matches = [
            (name, candidate)
            for name in (*like_a_key, *_ranked(usual, _OWNERS), *of_others)
            for candidate in sorted(keys, key=lambda c: (c.name != name, not c.is_primary))
            if columns[name].key_type == candidate.key_type
        ]
        if not matches:
            raise HostMismatch(
                f"no column of {table.shown} refers to {users.shown}. Name the table of the things that a credit "
                "unlocks (--workshops schema.table), or write host.workshops.owner into tallystick.toml by hand",
                table=table.shown,
            )
        owner, users_key = matches[0]
    if users_key.key_type is not None:
        of_users = (users.schema, users.table, users_key.name)
        migrated = current_revision(conn) is not None or bool(prepared_revisions(conn))
        refuse_two_integers(of_users, users_key.key_type, table, columns[owner], migrated=migrated)
    with _one_column_for_each(table, "Name another table: --workshops schema.table, or --workshops none"):
        return users_key, WorkshopsTable(
            schema=table.schema,
            table=table.table,
            **key.key_settings,
            owner=owner,
            title=_pick(columns.values(), _TITLES, ("text", "varchar")),
            created_at=_pick(columns.values(), _CREATED, MOMENTS),
        )


@contextmanager
def _one_column_for_each(table: HostTable, instead: str) -> Iterator[None]:
    """Raise HostMismatch where the mapping would use one column for two things, as a key stripe_customer_id."""
    try:
        yield
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ").partition(". ")[0]
        raise HostMismatch(
            f"{table.shown}: {fault}, and Tallystick needs a column for each. {instead}. If the app can do without the "
            "name, rename its column",
            table=table.shown,
        ) from error


def _users(conn: sa.Connection, everything: Sequence[HostTable]) -> HostTable:
    """The users' table, by its name and signs."""
    found = candidates(conn, everything)
    best = likeliest([one for one in found if not unsuitable(one.table)])
    # the table of a view may be another candidate; a partitioned table has none behind it
    barred = [one for one in found if unsuitable(one.table) and (not best or one.table.kind not in "vm")]
    if barred and (not best or barred[0].rank < best[0].rank):
        table = barred[0].table
        raise HostMismatch(f"{table.shown} {unsuitable(table)}. Name another: --users schema.table", table=table.shown)
    if not best:
        tables = ", ".join(t.shown for t in everything if not unsuitable(t))
        then = "Name it: --users schema.table" if tables else "Create the app's tables first, or check the address"
        raise HostMismatch(f"no table looks like users (there are: {tables or 'none at all'}). {then}", table="users")
    if len(best) > 1:
        raise _ambiguous("users", [(one.table, one.why) for one in best])
    return best[0].table


def _workshops(conn: sa.Connection, everything: Sequence[HostTable], users: HostTable) -> HostTable | None:
    """The table named like workshops; one with an app's prefix only if it references the users."""
    suitable = [table for table in everything if not unsuitable(table) and table.oid != users.oid]
    exactly = [[table for table in suitable if table.table.lower() == name] for name in _WORKSHOPS]
    prefixed = (
        table
        for table in suitable
        if table.table.lower().endswith(tuple(f"_{name}" for name in _WORKSHOPS))
        and conn.execute(_REFERENCES, {"from": table.oid, "to": users.oid}).first()
        and any(column.identifies for column in columns_of(conn, table).values())
    )
    found = next((tables for tables in exactly if tables), None) or list(prefixed)
    best = [table for table in found if table.schema == "public"] or found
    if len(best) > 1:
        raise _ambiguous("workshops", [(table, "its name") for table in best])
    return best[0] if best else None


def _ambiguous(word: Word, found: Sequence[tuple[HostTable, str]]) -> HostMismatch:
    """The error for several candidates, with the signs and a command for each."""
    lines = "".join(f"\n  tallystick init --{word} {shlex.quote(table.shown)}    {why}" for table, why in found)
    return HostMismatch(f"more than one table could be {word}. Choose one:{lines}", table=word)


def _named_table(word: Word, everything: Sequence[HostTable], asked: str) -> HostTable:
    found = [t for t in everything if asked in (t.table, t.shown, f'{t.schema}."{t.table}"', f'"{t.table}"')]
    found = [t for t in found if t.schema == "public"] or found if len(found) > 1 else found
    if len(found) > 1:
        raise _ambiguous(word, [(table, "called so") for table in found])
    if not found:
        near = difflib.get_close_matches(
            asked, [name for t in everything for name in (t.table, t.shown)], n=1, cutoff=0.5
        )
        raise HostMismatch(
            f"there is no table {asked}{f'; did you mean {near[0]}?' if near else '.'} Name the table: --{word} TABLE",
            table=asked,
        )
    if fault := unsuitable(found[0]):
        raise HostMismatch(f"{found[0].shown} {fault}. Name another: --{word} schema.table", table=found[0].shown)
    return found[0]


def _ranked(names: Iterable[str], usual: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda n: usual.index(plain(n)) if plain(n) in usual else len(usual))


def _pick(columns: Iterable[HostColumn], usual: Sequence[str], types: Sequence[str]) -> str | None:
    fitting = [c.name for c in columns if plain(c.name) in usual and c.type in types]
    return _ranked(fitting, usual)[0] if fitting else None


def _pick_balance(columns: Iterable[HostColumn], usual: Sequence[str]) -> HostColumn | None:
    """The column with a number and a usual name; before all others one that the ledger can use as it is."""
    fitting = {c.name: c for c in columns if plain(c.name) in usual and c.base in _NUMBERS}
    ranked = sorted(_ranked(fitting, usual), key=lambda name: _balance_obstacle(fitting[name]) is not None)
    return fitting[ranked[0]] if ranked else None
