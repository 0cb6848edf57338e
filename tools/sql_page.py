"""Write the reference in docs/sql.md from the functions' own declarations: python tools/sql_page.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tallystick.ledger.functions import Function, declared
from tallystick.ledger.reference import ATTRIBUTES, PARAMETERS, attributes, outcomes_of, refusals, sentence

PAGE = Path(__file__).parents[1] / "docs" / "sql.md"
BEGIN = "<!-- what follows is written by tools/sql_page.py -->\n"
KINDS = {
    "{user_key_type}": "user_key",
    "{workshop_key_type}": "workshop_key",
    "{credits}": "credits",
}
ANSWERS = ("tallystick.answer", "tallystick.account_answer", "tallystick.workshop_answer", "tallystick.event_answer")


def page(text: str) -> str:
    """The page with its reference written anew."""
    return text.split(BEGIN, maxsplit=1)[0] + BEGIN + "".join(f"{line}\n" for line in reference())


def reference() -> Iterator[str]:
    """Its lines."""
    yield "\n## Functions"
    yield "A key has the type of your own column: `user_key` of the users', `workshop_key` of the workshops'. `credits`"
    yield "is integer, or bigint where `host.credits` says so."
    for function in declared():
        yield from _function(function)
    yield from _parameters()
    yield "\n## Answers"
    yield "Attributes are only ever added, at the end; a client that names those that it reads goes on working."
    for answer in ANSWERS:
        yield from _answer(answer)
    yield from _refusals()


def _function(function: Function) -> Iterator[str]:
    yield f"\n### {function.name}"
    yield sentence(function, str)
    yield "\n```"
    yield f"tallystick.{function.name}("
    yield ",\n".join(
        f"  {name} {_kind(kind)}{f' DEFAULT {default}' if default else ''}"
        for name, kind, default in function.parameters
    )
    yield f") → {function.returns.replace('SETOF ', 'a set of ')}"
    yield "```\n"
    outcomes = ", ".join(f"`{name}`" for name in outcomes_of(function.name))
    strict = f" Strict: `{function.name}_strict`." if function.writes else ""
    yield f"Outcomes: {outcomes}.{strict}"


def _parameters() -> Iterator[str]:
    yield "\n## Parameters"
    yield "| parameter | |"
    yield "|---|---|"
    named = dict.fromkeys(name for function in declared() for name, _, _ in function.parameters)
    yield from (f"| `{name}` | {PARAMETERS[name]} |" for name in named)


def _answer(answer: str) -> Iterator[str]:
    given_by = [f"`{f.name}`" for f in declared() if f.returns.removeprefix("SETOF ") == answer]
    yield f"\n### {answer}"
    yield f"Of {', '.join(given_by)}.\n"
    yield "| attribute | type | |"
    yield "|---|---|---|"
    for name, kind in attributes(answer):
        yield f"| `{name}` | {_kind(kind)} | {ATTRIBUTES[name]} |"


def _refusals() -> Iterator[str]:
    yield "\n## Refusals"
    yield "A code is never used for another refusal. `detail.NAME` is a key of the attribute `detail`.\n"
    yield "| outcome | SQLSTATE | tells | |"
    yield "|---|---|---|---|"
    for refusal in refusals():
        fields = ", ".join(f"`{name}`" for name in refusal.fields)
        yield f"| `{refusal.name}` | `{refusal.sqlstate}` | {fields} | {refusal.meaning} |"


def _kind(kind: str) -> str:
    return KINDS.get(kind.removesuffix("[]"), kind.removesuffix("[]")) + ("[]" if kind.endswith("[]") else "")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
