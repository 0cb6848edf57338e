"""The SQL of the ledger's functions, for one host: the files in ``sql/`` with the host's names and types put in.

Each file holds one function (or type) and reads as plain SQL but for its placeholders:

=========================  ================================================================================
``{users}``                the host's table of users; ``{user_key}`` its key column, ``{user_key_type}`` its type
``{workshops}``            the host's table of workshops, or an empty one of ours where the host has none;
                           ``{workshop_key}``, ``{workshop_key_type}`` and ``{owner}`` likewise
``{title}``                an expression on the workshop ``w`` that names it for people
``{workshop_created_at}``  an expression on the workshop ``w``: when it was made, or NULL
``{user_customer}``        the column that holds a user's Stripe customer
``{user_deleted_at}``      the column that says when a user was soft-deleted; ``{workshop_deleted_at}`` likewise
``{ledger}``               the table of credit transactions
``{row}``                  the columns of a credit transaction ``t``, in the order of ``tallystick.answer``
``{account}``              the columns of a user ``u``, in the order of ``tallystick.account_answer``
``{credits}``              the type of credits, and ``{credits_max}``, ``{credits_min}`` its range
``{balance}``              the balance of a user ``u``, and ``{balance_column}`` the column that holds it
``{balance_now}``          the same without the credits that have expired since the last write
``{opened}``               where the app had balances before: gives ``account`` its opening balance first, if it has
                           none (``open_balance``); ``{opened_many}`` does so for all of ``user_ids``
``{due}``                  writes the expiries of ``account``, who is locked, and reads it again (``settle_due``)
``{…_name}``               the same name as a text, for messages
``{search_path}``          the schemas in which a function looks up names: none where another role could make one
``{host_path}``            the same for a statement that fires the host's triggers, which may name the host's tables
                           without a schema; such a function holds that one statement, and compares keys by ``{is}``,
                           which no other schema can shadow
=========================  ================================================================================

A revision that changes a function moves the old file to ``sql/until_<the revision before>/``: earlier revisions go on
installing that one. ``REVISIONS`` lists the files of each revision.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

from psycopg.sql import SQL, Composable, Identifier
from psycopg.sql import Literal as SqlLiteral

from tallystick.schema import ROW

REVISIONS: dict[str, tuple[str, ...]] = {
    # types first, then functions that the others call
    "0001": (
        "answer",
        "account_answer",
        "workshop_answer",
        "utc",
        "uuid7",
        "sqlstate_of",
        "host_interfered",
        "invalid_argument",
        "replay",
        "settle",
        "settle_many",
        "open_balance",
        "mark_workshop",
        "mark_workshops",
        "find_purchase",
        "give_or_take",
        "start_purchase",
        "attach_session",
        "complete_purchase",
        "fail_purchase",
        "consume",
        "consume_many",
        "refund",
        "reinstate",
        "grant",
        "lock",
        "balance",
        "balance_at",
        "history",
        "access",
        "account",
        "complete_onboarding",
        "reset_onboarding",
        "set_plan_tier",
        "keep_stripe_customer",
        "set_stripe_customer",
        "delete_user",
        "restore_user",
        "delete_workshop",
        "restore_workshop",
    ),
    "0002": (
        "settle_held",
        "next_due",
        "take_from_lots",
        "take_back_from_lots",
        "give_to_lots",
        "open_lot",
        "settle_due",
        "settle_ended",
        "expired",
        "unmark_workshop",
        "hold",
        "capture",
        "release",
        "reverse",
        "correct",
        "sweep",
        "lots",
    ),
    "0003": (
        "event_answer",
        "record_event",
        "events",
        "set_low_balance",
    ),
    "0004": (
        "merge",
        "erase",
    ),
    "0005": ("close_days",),
}
"""The files of ``sql/`` that each revision added or changed, in an order in which they can be created."""

HEAD = max(REVISIONS)

_CREDITS = {"integer": (-(2**31), 2**31 - 1), "bigint": (-(2**63), 2**63 - 1)}

_OPENED = """\
IF account.sequence = 0 AND account.balance <> 0 THEN
    account.sequence := tallystick.open_balance(account.key);
  END IF;"""

_DUE = """\
IF account.due <= pg_catalog.clock_timestamp() THEN
    SELECT s.balance, s.sequence, s.credit_held, s.expires_at
      INTO account.balance, account.sequence, account.held, account.due FROM tallystick.settle_due(account.key) AS s;
  END IF;"""

_OPENED_MANY = """\
PERFORM tallystick.open_balance(u.{user_key}) FROM {users} AS u
    WHERE u.{user_key} = ANY (user_ids) AND u.credit_sequence = 0 AND {balance} <> 0;"""

_TYPE = "CREATE TYPE tallystick."
_QUOTED = r'"(?:[^"]|"")*"'  # a name of the host's, which may hold anything
_SIGNATURE = re.compile(
    rf'CREATE OR REPLACE FUNCTION tallystick\."?(?P<name>\w+)"?\((?P<parameters>(?:{_QUOTED}|[^"])*?)\)'
    r" RETURNS (?P<returns>.*?)\n"
    rf'LANGUAGE (?P<language>\w+)(?P<options>(?:{_QUOTED}|[^$"])*)\$\w*\$',
    re.DOTALL,
)
_PART = rf'(?:{_QUOTED}|\([^()]*\)|[^",()])+?'
_PARAMETER = re.compile(rf"\s*(?P<name>\w+) (?P<kind>{_PART})(?: DEFAULT (?P<default>{_PART}))?\s*(?:,|$)", re.DOTALL)


@dataclass(frozen=True)
class Function:
    """One function, as its file declares it; types are still placeholders."""

    name: str
    parameters: tuple[tuple[str, str, str | None], ...]
    """(name, type, default or None), in order."""
    returns: str
    comment: str
    public: bool
    """Callers of the ledger use it, and get an answer; the others are called by these, or by an operator."""
    writes: bool


def declared() -> tuple[Function, ...]:
    """The functions that callers may use, in the order of the files; the strict ones are not among them."""
    return tuple(function for name in _names(HEAD) for function in _functions_of(_text(name, HEAD)) if function.public)


def statements(host: Any, revision: str = HEAD) -> tuple[Composable, ...]:
    """All types and functions for ``host``, a ``HostNames``, as of ``revision``, in the order of creation."""
    return _rendered(host, revision).statements


def with_names(text: str, names: Mapping[str, Composable]) -> Composable:
    """``text`` with ``names``, its body quoted by a dollar tag that no name contains, so that none can end it."""
    written = tag = quote[0] if (quote := re.search(r"\$\w*\$", text)) else "$$"
    with_dollars = [name for value in names.values() if "$" in (name := value.as_string(None))]
    while any(tag in name for name in with_dollars):
        tag = f"${tag.strip('$')}q$"
    return SQL(text.replace(written, tag)).format(**names)


def changes(host: Any, before: str, after: str, *, by_name: bool) -> Iterator[Composable]:
    """From the functions of one revision to those of another, in either direction.

    With ``by_name``, the functions and types whose name only one of the two has; without it, the functions that both
    have and that differ. A function whose parameters changed is dropped first: beside the new one, a call would match
    both. The revision itself changes a type that both have.
    """
    old, new = (_rendered(host, each).functions for each in (before, after))
    names = {name for name, _ in old} ^ {name for name, _ in new}
    old_types, new_types = (_rendered(host, each).types if by_name else {} for each in (before, after))
    yield from (statement for name, statement in new_types.items() if name not in old_types)
    for signature in reversed(old):
        if signature not in new and (signature[0] in names) is by_name:
            yield SQL("DROP FUNCTION tallystick.{}({})").format(Identifier(signature[0]), SQL(signature[1]))
    for signature, (text, statement) in new.items():
        if (signature not in old or old[signature][0] != text) and (signature[0] in names) is by_name:
            yield statement
    yield from (SQL("DROP TYPE tallystick.{}").format(Identifier(name)) for name in old_types if name not in new_types)


@dataclass(frozen=True)
class _Rendered:
    """The statements of one revision for one host."""

    statements: tuple[Composable, ...]
    types: dict[str, Composable]
    """Name → statement."""
    functions: dict[tuple[str, str], tuple[str, Composable]]
    """Name and parameters → text and statement."""
    granted: tuple[tuple[str, str], ...]
    """Name and parameters of each function that a caller may use."""


def _rendered(host: Any, revision: str) -> _Rendered:
    names = ((name, value.as_string(None)) for name, value in names_of(host, revision).items())
    return _render(tuple(names), revision, opens_balances=host.adopts_balance)


@lru_cache(maxsize=16)  # a few hosts, each at a few revisions: status and a run ask for the same ones many times
def _render(names: tuple[tuple[str, str], ...], revision: str, *, opens_balances: bool) -> _Rendered:
    placeholders = {name: SQL(text) for name, text in names}
    made: list[Composable] = []
    for name in _names(revision):
        if name == "open_balance" and not opens_balances:
            continue
        text = _text(name, revision)
        made += (
            with_names(_without_head(statement), placeholders) for statement in re.split(r";\n(?=--|CREATE)", text)
        )
        made += (_strict(each, placeholders) for each in _functions_of(text) if each.public and each.writes)
    texts = [(statement.as_string(None), statement) for statement in made]
    found = [(match, text, statement) for text, statement in texts if (match := _SIGNATURE.search(text))]
    signatures = [(match["name"], _types(match["parameters"])) for match, _, _ in found]
    return _Rendered(
        tuple(made),
        {text.removeprefix(_TYPE).split()[0]: statement for text, statement in texts if text.startswith(_TYPE)},
        {signature: (text, statement) for signature, (_, text, statement) in zip(signatures, found, strict=True)},
        tuple(
            signature
            for signature, (match, _, _) in zip(signatures, found, strict=True)
            if "SECURITY DEFINER" in match["options"]
        ),
    )


def drops(host: Any, revision: str = HEAD) -> Iterator[Composable]:
    """The statements that drop the functions of ``statements``."""
    for name, types in reversed(_rendered(host, revision).functions):
        yield SQL("DROP FUNCTION tallystick.{}({})").format(Identifier(name), SQL(types))


def key_type_changes(before: Any, after: Any) -> tuple[list[Composable], list[Composable]]:
    """For two hosts that differ in key types: statements that drop the first's functions, and create the second's.

    Between the two the types of answers are changed.
    """
    old, new = (_rendered(host, HEAD).functions for host in (before, after))
    gone: list[Composable] = [
        SQL("DROP FUNCTION tallystick.{}({})").format(Identifier(name), SQL(types)) for name, types in old.keys() - new
    ]
    return gone, [statement for key, (text, statement) in new.items() if key not in old or old[key][0] != text]


def type_drops(host: Any, revision: str = HEAD) -> Iterator[Composable]:
    """The statements that drop the types of ``statements``, after ``drops``."""
    for name in reversed(_rendered(host, revision).types):
        yield SQL("DROP TYPE tallystick.{}").format(Identifier(name))


def grants(host: Any, role: Composable) -> Iterator[Composable]:
    """EXECUTE on each function that a caller may use, for ``role``."""
    for name, types in _rendered(host, HEAD).granted:
        yield SQL("GRANT EXECUTE ON FUNCTION tallystick.{}({}) TO {}").format(Identifier(name), SQL(types), role)


def _names(revision: str) -> Iterator[str]:
    return (name for brought, names in REVISIONS.items() if brought <= revision for name in names)


@cache
def _text(name: str, revision: str) -> str:
    """The file as of ``revision``: the first that a later revision replaced, or the present one."""
    folder = files(__package__) / "sql"
    replaced = (folder / f"until_{each}" / f"{name}.sql" for each in REVISIONS if each >= revision)
    found = next((file for file in replaced if file.is_file()), folder / f"{name}.sql")
    return found.read_text("utf-8").strip()


def _types(parameters: str) -> str:
    return ", ".join(f"{name} {kind}" for name, kind, _ in _parameters(parameters))


def _without_head(text: str) -> str:
    """The text without the comment at its top, which is for readers of the file and may mention placeholders."""
    lines = text.splitlines()
    while lines and lines[0].startswith("--"):
        lines.pop(0)
    return "\n".join(lines)


def _functions_of(text: str) -> Iterator[Function]:
    comment = " ".join(
        line.removeprefix("-- ")
        for line in text.splitlines()[: text.splitlines().index(_without_head(text).splitlines()[0])]
    )
    for found in _SIGNATURE.finditer(text):
        yield Function(
            found["name"],
            tuple(_parameters(found["parameters"])),
            found["returns"],
            comment,
            public="SECURITY DEFINER" in found["options"] and "tallystick." in found["returns"],
            writes="STABLE" not in found["options"] and "IMMUTABLE" not in found["options"],
        )


def _parameters(text: str) -> Iterator[tuple[str, str, str | None]]:
    for found in _PARAMETER.finditer(text):
        yield found["name"], found["kind"], found["default"]


def _strict(function: Function, names: Mapping[str, Composable]) -> Composable:
    set_of = function.returns.startswith("SETOF ")
    parameters = ", ".join(
        f"{name} {kind}{f' DEFAULT {default}' if default else ''}" for name, kind, default in function.parameters
    )
    of_it = {
        "plain": Identifier(function.name),
        "strict": Identifier(f"{function.name}_strict"),
        "parameters": SQL(parameters).format(**names),
        "arguments": SQL(", ").join(SQL(f"{name} => {name}") for name, _, _ in function.parameters),
        "returns": SQL(function.returns),
        "answer": SQL(function.returns.removeprefix("SETOF ")),
        "give": SQL("RETURN NEXT answer;" if set_of else "RETURN answer;"),
        "done": SQL("RETURN;" if set_of else "RETURN NULL;"),
    }
    return with_names(_without_head(_text("strict", HEAD)), {**names, **of_it})


def names_of(host: Any, revision: str = HEAD) -> dict[str, Composable]:
    """The value of each placeholder, as of ``revision``."""
    users, workshops = host.users, host.workshops
    low, high = _CREDITS[host.credits]
    ledger = Identifier(host.ledger_schema, "credit_transactions")
    schemas = dict.fromkeys([users.schema, workshops.schema if workshops else users.schema, "public"])
    of_types = [table.key_type_schema for table in (users, workshops) if table and table.key_type_schema]
    cast = {"type": "::text", "status": "::text", "currency": "::text"}
    # an adopted column may be of another type of number, and may hold nulls
    kept = "coalesce(u.{}, 0)::" + host.credits if host.adopts_balance else "u.{}"
    balance = SQL(kept).format(users.balance)
    # NULL for a user without holds and lots, for whom nothing more is read
    balance_now = (
        SQL(
            "CASE WHEN u.credit_due_at <= pg_catalog.clock_timestamp()"
            " THEN (tallystick.balance(u.{})).balance ELSE {} END"
        ).format(users.key, balance)
        if revision >= "0002"
        else balance
    )
    shown = Identifier("tallystick", "workshops") if workshops is None else workshops.name
    key = Identifier("key") if workshops is None else workshops.key
    as_text = SQL("w.{}::text").format(key)
    title = (
        SQL("coalesce(w.{}::text, {})").format(workshops.title, as_text) if workshops and workshops.title else as_text
    )
    created_at = (
        SQL("tallystick.utc(w.{})").format(workshops.created_at)
        if workshops and workshops.created_at
        else SQL("NULL::timestamptz")
    )
    return {
        "users": users.name,
        "users_name": SqlLiteral(users.name.as_string(None)),
        "user_key": users.key,
        "user_key_type": users.key_type,
        "workshops": shown,
        "workshops_name": SqlLiteral(shown.as_string(None)),
        "workshop_key": key,
        "workshop_key_type": SQL("uuid") if workshops is None else workshops.key_type,
        "owner": Identifier("owner") if workshops is None else workshops.owner,
        "title": title,
        "workshop_created_at": created_at,
        "user_customer": users.stripe_customer_id,
        "user_deleted_at": users.deleted_at,
        "workshop_deleted_at": workshops.deleted_at if workshops else Identifier("deleted_at"),
        "ledger": ledger,
        "ledger_name": SqlLiteral(ledger.as_string(None)),
        "type": Identifier(host.ledger_schema, "credit_transaction_type"),
        "status": Identifier(host.ledger_schema, "credit_transaction_status"),
        "credits": SQL(host.credits),
        "balance": balance,
        "balance_now": balance_now,
        "balance_column": users.balance,
        "opened": SQL(_OPENED if host.adopts_balance else ""),
        "due": SQL(_DUE),
        "opened_many": SQL(_OPENED_MANY if host.adopts_balance else "").format(
            users=users.name, user_key=users.key, balance=balance
        ),
        "credits_max": SQL(str(high)),
        "credits_min": SQL(f"({low})" if host.credits == "integer" else "(-9223372036854775807 - 1)"),
        "key_domain": SqlLiteral("a text of 1 to 255 characters that does not begin with tallystick:"),
        "amount_domain": SqlLiteral(f"a whole number from 1 to {high}"),
        "expiry_domain": SqlLiteral("a moment in the future and before the year 9999, or NULL"),
        "row": SQL(", ").join(SQL(f"t.{name}{cast.get(name, '')}") for name in ROW),
        "account": SQL(
            "u.{}, {}, coalesce(u.onboarding_complete, false), u.{}::text, "
            "coalesce(u.plan_tier::text, 'free'), tallystick.utc(u.{}), tallystick.utc(u.{})"
        ).format(users.key, balance_now, users.stripe_customer_id, users.updated_at, users.deleted_at),
        "search_path": SQL(", ").join([SQL("pg_catalog"), *of_types, SQL("pg_temp")]),
        "host_path": SQL(", ").join([SQL("pg_catalog"), *of_types, *map(Identifier, schemas), SQL("pg_temp")]),
        # an extension's type, as citext, brings its own operator
        "is": SQL("=") if of_types else SQL("OPERATOR(pg_catalog.=)"),
    }
