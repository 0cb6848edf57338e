"""The TypeScript client: one file for one host, written from the functions' own declarations.

``typescript.ts`` in this folder is the part that all clients share; its lines ``//# name`` are filled in here.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from importlib.resources import files

from tallystick.config import INTEGER_KEYS, HostMapping, KeyType, UsersTable, WorkshopsTable
from tallystick.ledger.functions import Function, declared
from tallystick.ledger.operations import AccessReason
from tallystick.ledger.outcomes import DONE, REPLAYED
from tallystick.ledger.reference import PARAMETERS, DocumentedRefusal, attributes, outcomes_of, refusals, sentence
from tallystick.schema import HEAD, ROW, CreditTransactionStatus, CreditTransactionType

SIGNED = "written by: tallystick client typescript"
"""The first lines of each client."""


@dataclass(frozen=True)
class _Shape:
    """A function's answer: the name of its interface, and the attributes of ``answer`` that it sets."""

    name: str
    comment: str
    answer: str
    only: tuple[str, ...] | None = None
    also: str | None = None
    """The interface that it extends."""

    def columns(self) -> Iterator[tuple[str, str]]:
        return ((name, kind) for name, kind in attributes(self.answer) if self.only is None or name in self.only)


_ROW = _Shape(
    "CreditTransaction",
    "A row of the ledger.",
    "tallystick.answer",
    ("outcome", *ROW, "expires_at", "detail"),
)
_WRITTEN = _Shape(
    "Written",
    "The row of the ledger that the call wrote, or found; and the user's balance now.",
    "tallystick.answer",
    also="CreditTransaction",
)
_BALANCE = _Shape(
    "Balance",
    "The credits of a user, negative when in debt.",
    "tallystick.answer",
    ("outcome", "user_id", "balance", "detail"),
)
_STANDING = _Shape(
    "Standing",
    "The credits of a user, negative when in debt, and those of them that holds have set aside.",
    "tallystick.answer",
    ("outcome", "user_id", "balance", "credit_held", "detail"),
)
_LOT = _Shape(
    "Lot",
    "A row that gave credits which expire, and what is left of them.",
    "tallystick.answer",
    ("outcome", *ROW, "remaining", "expires_at", "detail"),
)
_MERGED = _Shape(
    "Merged",
    "The user who has the credits of the other now, what that were, below zero for a debt, and the user's balance.",
    "tallystick.answer",
    ("outcome", "user_id", "amount", "balance", "detail"),
)
_ACCESS = _Shape("Access", "If a workshop is open, and why.", "tallystick.workshop_answer")
_WORKSHOP = _Shape(
    "Workshop", "A workshop, after the call.", "tallystick.workshop_answer", ("outcome", "workshop_id", "deleted_at")
)
_ACCOUNT = _Shape("Account", "The billing side of a user.", "tallystick.account_answer")
_EVENT = _Shape(
    "LedgerEvent",
    "Something that happened to a user's credits: its kind, and the row of the ledger that it is about.",
    "tallystick.event_answer",
)
_SHAPES = (_ROW, _WRITTEN, _BALANCE, _STANDING, _LOT, _MERGED, _ACCESS, _WORKSHOP, _ACCOUNT, _EVENT)
_SHAPE_OF = {
    "balance": _STANDING,
    "balance_at": _BALANCE,
    "lock": _STANDING,
    "sweep": _STANDING,
    "lots": _LOT,
    "merge": _MERGED,
    "history": _ROW,
    "access": _ACCESS,
    "events": _EVENT,
    "tallystick.answer": _WRITTEN,
    "tallystick.account_answer": _ACCOUNT,
    "tallystick.workshop_answer": _WORKSHOP,
}
_NOT_NULL = {
    *("id", "user_id", "type", "status", "amount", "description", "created_at", "balance"),
    *("cursor", "event_id", "kind", "transaction_id"),
    *("credit_balance", "onboarding_complete", "plan_tier"),
}
_NOT_NULL_IN = {
    "Standing": {"credit_held"},
    "Lot": {"remaining", "expires_at"},
    "Access": {"workshop_id", "open", "reason"},
    "Workshop": {"workshop_id"},
}
_OF_REFUSALS = {"outcome", "required", "remaining", "detail", "item"}
_UNIONS: dict[str, type[StrEnum]] = {
    "type": CreditTransactionType,
    "status": CreditTransactionStatus,
    "reason": AccessReason,
}
_WIDTH = 120
_NUMBERS: frozenset[KeyType] = INTEGER_KEYS - {"bigint"}
"""Keys that a number of JavaScript holds; the others are given back as texts."""


def typescript(host: HostMapping) -> str:
    """The client for ``host``."""
    client = _Client(host)
    text = (files(__package__) / "typescript.ts").read_text("utf-8")
    for mark, value in client.words().items():
        text = text.replace(mark, value)
    for name, lines in client.parts().items():
        before, after = re.split(rf"^ *//# {name}\n", text, flags=re.MULTILINE)
        text = before + "".join(f"{line}\n" for line in lines) + after
    return text


@dataclass(frozen=True)
class _Client:
    host: HostMapping

    def words(self) -> dict[str, str]:
        workshops = self.host.workshops
        return {
            "__REVISION__": HEAD,
            "__USER_KEY__": self.host.users.key_type,
            "__WORKSHOP_KEY__": f"workshops by {workshops.key_type}" if workshops else "there are no workshops",
            "__CREDITS__": self.host.credits,
        }

    def parts(self) -> dict[str, Iterable[str]]:
        return {
            "types": self._types(),
            "operations": self._operations(),
            "calls": self._calls(),
            "facts": self._facts(),
        }

    # --- functions ---

    @cached_property
    def _functions(self) -> tuple[Function, ...]:
        """The functions for callers; without those about workshops, where there are none."""
        return tuple(
            f for f in declared() if self.host.workshops or _shape_of(f).answer != "tallystick.workshop_answer"
        )

    def _parameters(self, function: Function) -> Iterator[tuple[str, str, str | None]]:
        for name, kind, default in function.parameters:
            if self.host.workshops or "{workshop_key_type}" not in kind:
                yield name, kind, default

    def _outcomes(self, function: Function) -> list[str]:
        # an argument may also be refused before it is sent
        named = {*outcomes_of(function.name), "invalid_argument"}
        order = (DONE, REPLAYED, *(refusal.name for refusal in refusals()))
        return [name for name in order if name in named and (self.host.workshops or "workshop" not in name)]

    @cached_property
    def _answered(self) -> list[DocumentedRefusal]:
        """The refusals that are answers; one is always raised."""
        return [
            refusal
            for refusal in refusals()
            if refusal.name != "host_interfered" and (self.host.workshops or "workshop" not in refusal.name)
        ]

    def _sql_type(self, kind: str) -> str:
        users, workshops = self.host.users, self.host.workshops
        return (
            kind.replace("{user_key_type}", _key_type(users))
            .replace("{workshop_key_type}", _key_type(workshops) if workshops else "uuid")
            .replace("{credits}", self.host.credits)
        )

    # --- types ---

    def _types(self) -> Iterator[str]:
        users, workshops = self.host.users, self.host.workshops
        yield f"/** A user's key, as it is given back{_accepted(users.key_type)}. */"
        yield f"export type UserKey = {_key(users)};"
        if workshops:
            yield ""
            yield f"/** A workshop's key, as it is given back{_accepted(workshops.key_type)}. */"
            yield f"export type WorkshopKey = {_key(workshops)};"
        yield ""
        yield "/** A number of credits, as it is given back. */"
        yield f"export type Credits = {'bigint' if self.host.credits == 'bigint' else 'number'};"
        for shape in _SHAPES:
            if self.host.workshops or shape.answer != "tallystick.workshop_answer":
                yield from self._interface(shape)
        yield from self._refusals()
        for function in self._functions:
            yield from self._options(function)
        yield from self._face()

    def _interface(self, shape: _Shape) -> Iterator[str]:
        inherited = {name for name, _ in _ROW.columns()} if shape.also else set()
        yield ""
        yield _comment(shape.comment)
        yield f"export interface {shape.name}{f' extends {shape.also}' if shape.also else ''} {{"
        for name, kind in shape.columns():
            if (
                name in _OF_REFUSALS - _NOT_NULL_IN.get(shape.name, set())
                or name in inherited
                or (name == "workshop_id" and not self.host.workshops)
            ):
                continue
            null = "" if name in _NOT_NULL | _NOT_NULL_IN.get(shape.name, set()) else " | null"
            yield f"  {_camel(name)}: {self._given_back(name, kind)}{null};"
        yield "}"

    def _given_back(self, name: str, kind: str) -> str:
        if union := _UNIONS.get(name):
            return " | ".join(json.dumps(str(each)) for each in union)
        return {
            "{user_key_type}": "UserKey",
            "{workshop_key_type}": "WorkshopKey",
            "{credits}": "Credits",
            "credits": "Credits",
            "integer": "number",
            "bigint": "number",  # minor units, and the number of an event
            "boolean": "boolean",
            "timestamptz": "Date",
            "jsonb": "{ readonly [name: string]: Json }",
            "differences": "{ readonly [column: string]: readonly [before: Json, asked: Json] }",
        }.get(kind, "string")

    def _accepts(self, kind: str) -> str:
        plain = kind.removesuffix("[]")
        if plain == "{credits}":
            return "number | bigint" if self.host.credits == "bigint" else "number"
        sql = self._sql_type(plain)
        if plain.endswith("_key_type}"):
            return "string | number | bigint" if sql == "bigint" else "number" if sql in _NUMBERS else "string"
        return {
            "integer": "number",
            "bigint": "number | bigint",
            "boolean": "boolean",
            "timestamptz": "Date",
            "interval": "Duration",
            "jsonb": "{ readonly [name: string]: Json | undefined }",
        }.get(sql, "string")

    def _refusals(self) -> Iterator[str]:
        yield ""
        yield "/** Each refusal, and what it tells. */"
        yield "export interface Refusals {"
        for refusal in self._answered:
            fields = []
            for attribute, kind in refusal.fields.items():
                name = _camel(attribute.removeprefix("detail."))
                optional = "?" if kind.endswith("?") else ""
                fields.append(f"{name}{optional}: {self._given_back(name, kind.removesuffix('?'))}")
            yield _comment(refusal.meaning, "  ")
            yield f"  {refusal.name}: {{ {'; '.join(fields)} }};" if fields else f"  {refusal.name}: object;"
        yield "}"

    def _options(self, function: Function) -> Iterator[str]:
        name = _pascal(function.name)
        many = _is_list(function)
        yield ""
        yield f"export interface {name}{'Item' if many else 'Options'} {{"
        for parameter, kind, default in self._parameters(function):
            single = _singular(parameter) if many else parameter
            option, accepted = _camel(single), self._accepts(kind)
            yield _comment(_phrase(single), "  ")
            if default is None:
                yield f"  {option}: {accepted};"
            else:
                yield f"  {option}?: {accepted}{' | null' if default == 'NULL' else ''} | undefined;"
        yield "}"
        yield ""
        done = " | ".join(json.dumps(each) for each in self._outcomes(function) if each in (DONE, REPLAYED))
        refused = " | ".join(json.dumps(each) for each in self._outcomes(function) if each not in (DONE, REPLAYED))
        yield f"export type {name}Answer ="
        yield f"  | ({{ outcome: {done} }} & {_shape_of(function).name})"
        yield from _wrapped("  | Refused<", refused, ">;")

    def _face(self) -> Iterator[str]:
        yield ""
        yield "/** The operations. Each answers with a result, whose `outcome` says what it is, or with a list. */"
        yield "export interface Tallystick {"
        for function in self._functions:
            given = _given(function)
            comment = sentence(function, _camel)
            if _is_list(function):
                comment = comment.replace(
                    "Each answer's `item` says which it belongs to.", "Answers are in the items' order."
                )
            yield _comment(comment, "  ")
            yield f"  {_camel(function.name)}: ({given}) => Promise<{_answer(function)}>;"
        yield "}"

    # --- values ---

    def _operations(self) -> Iterator[str]:
        for function in self._functions:
            name, argument = _camel(function.name), _argument(function)
            sent = "sentEach(query, calls.{}, items)" if _is_list(function) else "sent(query, calls.{}(options))"
            yield f"    {name}: ({argument}) => {sent.format(name)},"

    def _calls(self) -> Iterator[str]:
        for function in self._functions:
            kind = "WritingCall" if function.writes else "Call"
            yield f"  {_camel(function.name)}: ({_given(function)}): {kind}<{_answer(function)}> =>"
            shape, many = json.dumps(_shape_of(function).name), json.dumps(_is_set(function))
            yield f'    new FunctionCall("{function.name}", {shape}, {many}, ['
            for parameter, kind, default in self._parameters(function):
                sent_as = json.dumps(self._sql_type(kind), ensure_ascii=False)
                yield f'      ["{parameter}", {sent_as}, {_value(function, parameter, default)}],'
            yield "    ]),"

    def _of_refusals(self, shape: _Shape) -> list[tuple[str, str]]:
        """Attributes that refusals of the shape's functions have, and its results do not."""
        promised = {
            name
            for function in self._functions
            for refusal in self._answered
            if _shape_of(function) is shape and refusal.name in outcomes_of(function.name)
            for name in refusal.fields
        }
        own = {name for name, _ in shape.columns()}
        return [(name, kind) for name, kind in attributes(shape.answer) if name in promised - own]

    def _facts(self) -> Iterator[str]:
        yield f'const REVISION = "{HEAD}";'
        yield ""
        yield "// what is read of an answer, by the name of its interface"
        yield "const COLUMNS = {"
        for shape in _SHAPES:
            if self.host.workshops or shape.answer != "tallystick.workshop_answer":
                read = [*shape.columns(), *self._of_refusals(shape)]
                columns = ", ".join(f'{name}:\xa0"{self._read_as(name, kind)}"' for name, kind in read)
                yield from _wrapped(f"  {shape.name}: {{ ", columns, " },")
        yield "} as const;"
        yield ""
        yield "// those of them that only refusals have"
        yield "const OF_REFUSALS: Readonly<Record<string, readonly string[]>> = {"
        for shape in _SHAPES:
            if names := [json.dumps(_camel(name)) for name, _ in self._of_refusals(shape)]:
                yield f"  {shape.name}: [{', '.join(names)}],"
        yield "};"
        yield ""
        yield "const MEANINGS: Readonly<Record<RefusalName, string>> = {"
        for refusal in self._answered:
            yield f"  {refusal.name}:\n    {json.dumps(refusal.meaning, ensure_ascii=False)},"
        yield "};"
        yield ""
        yield "const SQLSTATES: Readonly<Record<string, string>> = {"
        yield from (f'  {refusal.sqlstate}: "{refusal.name}",' for refusal in refusals())
        yield "};"

    def _read_as(self, name: str, kind: str) -> str:
        if name in ("amount_paid", "event_id"):
            return "number"
        if name == "detail":
            return "detail"
        if kind == "{credits}":
            return "bigint" if self.host.credits == "bigint" else "number"
        return {
            "smallint": "number",
            "integer": "number",
            "jsonb": "jsonb",
            "boolean": "boolean",
            "timestamptz": "timestamptz",
        }.get(self._sql_type(kind), "text")


def _key_type(table: UsersTable | WorkshopsTable) -> str:
    """The type of a key, as a function's parameter has it."""
    if table.key_type == "citext":
        schema = (table.key_type_schema or "public").replace('"', '""')
        return f'"{schema}".citext'
    return "bpchar" if table.key_type == "char" else table.key_type


def _key(table: UsersTable | WorkshopsTable) -> str:
    return "number" if table.key_type in _NUMBERS else "string"


def _shape_of(function: Function) -> _Shape:
    return _SHAPE_OF.get(function.name) or _SHAPE_OF[function.returns.removeprefix("SETOF ")]


def _is_set(function: Function) -> bool:
    return function.returns.startswith("SETOF ")


def _is_list(function: Function) -> bool:
    """True where each parameter is a list, of one value an item."""
    return all(kind.endswith("[]") for _, kind, _ in function.parameters)


def _argument(function: Function) -> str:
    return "items" if _is_list(function) else "options"


def _given(function: Function) -> str:
    name = _pascal(function.name)
    return f"items: readonly {name}Item[]" if _is_list(function) else f"options: {name}Options"


def _answer(function: Function) -> str:
    return f"{_pascal(function.name)}Answer{'[]' if _is_set(function) else ''}"


def _value(function: Function, parameter: str, default: str | None) -> str:
    if not _is_list(function):
        value = f"options.{_camel(parameter)}"
        return f"{value} ?? null" if default is None else value  # left out, the function refuses it
    listed = f"items.map((item) => item.{_camel(_singular(parameter))})"
    return listed if default is None else f"listed({listed})"


def _phrase(parameter: str) -> str:
    """A sentence on an option, with names of other options as the client spells them."""
    text = PARAMETERS[parameter].replace("NULL", "null")
    return re.sub(r"\b[a-z]+(_[a-z]+)+\b", lambda found: _camel(found[0]), text[0].upper() + text[1:]) + "."


def _comment(text: str, indent: str = "") -> str:
    if len(text) < _WIDTH - len(indent) - 7:
        return f"{indent}/** {text} */"
    lines = textwrap.wrap(text, _WIDTH - len(indent) - 3, break_long_words=False, break_on_hyphens=False)
    return "\n".join([f"{indent}/**", *(f"{indent} * {line}" for line in lines), f"{indent} */"])


def _wrapped(start: str, text: str, end: str) -> Iterator[str]:
    """The text on one line where it fits, else on lines of its own. It is never broken at a no-break space."""
    if len(start + text + end) > _WIDTH:
        indent = re.match(" *", start)[0]  # type: ignore[index]  # it always matches
        text = textwrap.fill(
            text,
            _WIDTH,
            initial_indent=f"{indent}  ",
            subsequent_indent=f"{indent}  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        start, end = f"{start.rstrip()}\n", f"\n{indent}{end.lstrip()}"
    yield f"{start}{text}{end}".replace("\xa0", " ")


def _singular(name: str) -> str:
    return name.removesuffix("s")


def _camel(name: str) -> str:
    return re.sub(r"_(\w)", lambda found: found[1].upper(), name)


def _pascal(name: str) -> str:
    return _camel(f"_{name}")


def _accepted(key_type: KeyType) -> str:
    return "; a number or a bigint is taken as well" if key_type == "bigint" else ""
