"""Whatever is typed: a command does it or refuses with one message and a documented exit code, and a refused one
leaves the database as it was."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import QUIET, TEXTS

from tallystick.audit import audit
from tallystick.cli import main
from tallystick.config import to_toml
from worlds import World

pytestmark = pytest.mark.one_server  # it is about what is typed

LONG = "<long>"  # stands for so many letters; Linux takes 131,072 bytes for one argument
LETTERS = 100_000
SAID_MAX = 3_000  # characters of a refusal, however long what was typed


@dataclass(frozen=True)
class Output:
    code: int
    out: str
    err: str


def run(*arguments: str) -> Output:
    """The command line as a shell would run it, without a terminal. What it raises is a traceback there."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace")]
    with (
        mock.patch.object(sys, "argv", ["tallystick", *arguments]),
        redirect_stdout(streams[0]),
        redirect_stderr(streams[1]),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode() for stream in streams)
    return Output(int(ended.value.code or 0), out, err)


@pytest.fixture
def typed(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A host app with its settings in an empty folder, where the commands run."""
    monkeypatch.chdir(tmp_path)
    for name in ("TALLYSTICK_HOME", "DATABASE_URL_UNPOOLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DATABASE_URL", world.url)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "tallystick.toml").write_text(to_toml(world.config.host), encoding="utf-8")
    return world


def everything(world: World) -> list[list[tuple[object, ...]]]:
    """All rows that a command could have changed."""
    tables = [world.schema.users, world.schema.credit_transactions]
    if world.schema.workshops is not None:
        tables.append(world.schema.workshops)
    with world.engine.connect() as conn:
        return [sorted((tuple(row) for row in conn.execute(sa.select(each))), key=repr) for each in tables]


def commands(world: World) -> st.SearchStrategy[list[str]]:
    """Command lines of what is right and what is not, in any mixture."""
    user = world.user(credits=1_000_000)
    with world.engine.connect() as conn:
        bought = str(world.ledger.history(conn, user)[0].id)
    workshop = str(world.workshop(user)) if world.config.host.workshops else "w"
    text = TEXTS | st.just(LONG)
    number = st.one_of(st.integers(), st.integers(-2, 3), st.floats()).map(str) | text
    users = st.sampled_from([str(user), str(world.user())]) | st.integers().map(str) | text
    file = text | st.sampled_from(["missing/file", ".", "tallystick.toml", "/dev/null"])
    time = st.datetimes().map(str) | st.dates().map(str) | number

    def options(**values: st.SearchStrategy[str] | None) -> st.SearchStrategy[list[str]]:
        each = [
            st.just([])
            | (
                st.just([f"--{name.replace('_', '-')}"])
                if value is None
                else value.map(lambda typed, name=name: [f"--{name}", typed])
            )
            for name, value in values.items()
        ]
        return st.tuples(*each).map(lambda chosen: [word for words in chosen for word in words])

    def command(*words: str | st.SearchStrategy[str], **values: st.SearchStrategy[str] | None):
        parts = [st.just(word) if isinstance(word, str) else word for word in words]
        return st.tuples(st.tuples(*parts).map(list), options(json=None, **values)).map(lambda both: both[0] + both[1])

    by_hand = {"key": st.sampled_from(["a", "b"]) | text, "description": text}
    return st.one_of(
        command("balance", users),
        command("history", users, limit=number, before=number | st.just(bought), failed=None),
        command("consume", users, workshop=st.just(workshop) | text, amount=number, **by_hand),
        command("grant", users, number, **by_hand),
        command("refund", users, st.just(bought) | text, credits=number, **by_hand),
        command("onboarding", users, complete=None, reset=None),
        command("audit", user=users, since=time, after=users, limit=number, checks=None),
        command("init", users=text, workshops=text, output=file),
        command("migrate", "plan", backup=file),
        command("migrate", "sql", offline=None, role=text),
        command("migrate", "status", drizzle=file),
        command("migrate", "snippet", st.sampled_from(["drizzle", "prisma"]) | text),
        command("client", "typescript", output=file),
        command("migrate", "undo"),
        command("backup", file.filter(lambda name: name != "/dev/null"), check=None),
        command("restore", file),
        command("seed", only=text, list=None),
        command("stripe", "dismiss", text, text),
        command("stripe", "refund", users, st.just(bought) | text, credits=number),
        command("stripe", "reconcile", since=time),
        st.lists(text, max_size=3),
        st.tuples(st.sampled_from(["--config", "--database-url"]), text, st.just("balance"), users).map(list),
    )


WRITES = {"consume", "grant", "refund", "onboarding", "seed"}


def test_any_command_line_is_done_or_refused_with_a_message(typed: World) -> None:
    lines = commands(typed)

    @settings(QUIET, max_examples=200)
    @given(line=lines)
    def check(line: list[str]) -> None:
        before = everything(typed)
        result = run(*(word.replace(LONG, "x" * LETTERS) for word in line))
        assert result.code in (0, 1, 2)
        assert "Traceback" not in result.out + result.err
        if result.code:
            assert everything(typed) == before
            assert result.err.strip() or not line  # nothing typed: the help
            if result.code == 1:  # wrong usage repeats what was typed
                assert len(result.err) < SAID_MAX
        elif line[:1] and line[0] not in WRITES:
            assert everything(typed) == before
        if result.code == 0 and "--json" in line and "sql" not in line:
            json.loads(result.out)

    check()
    with typed.engine.connect() as conn:
        assert audit(conn, typed.config).clean


@pytest.mark.parametrize(
    ("line", "code", "named"),
    [
        (["balance", "nobody\ud800"], 1, "nobody"),
        (["consume", "{user}", "--credits", "1.5"], 2, "--credits"),
        (["consume", "{user}", "--credits", "99"], 1, "99"),
        (["consume", "{user}", "--key", "a\0b"], 1, "key='a\\x00b'"),
        (["grant", "{user}", str(2**31)], 1, str(2**31)),
        (["refund", "{user}", "'; DROP TABLE users; --"], 1, "DROP TABLE users"),
        (["history", "{user}", "--before", "yesterday"], 1, "yesterday"),
        (["history", "{user}", "--limit", "0"], 2, "--limit"),
        (["audit", "--since", "yesterday"], 2, "--since"),
        (["audit", "--user", "x" * LETTERS], 1, "x" * 50),
        (["seed", "--only", "nonsense"], 1, "nonsense"),
        (["backup", "missing/file"], 1, "missing"),
        (["init", "--output", "missing/file"], 1, "missing/file"),
        (["client", "typescript", "--output", "missing/file"], 1, "missing/file"),
        (["migrate", "plan", "--backup", "missing/file", "--json"], 0, "there is no folder"),
        (["migrate", "sql", "--role", "x" * 64], 1, "1 to 63 bytes"),
        (["migrate", "sql", "--role", "a\ud800"], 1, "role='a\\ud800'"),
        (["migrate", "snippet", "nonsense"], 1, "nonsense"),
        (["--config", "missing/file", "balance", "x"], 1, "missing/file"),
        (["--database-url", "nonsense", "balance", "x"], 1, "database"),
    ],
)
def test_a_message_names_what_is_wrong(typed: World, line: list[str], code: int, named: str) -> None:
    user = typed.user(credits=5)
    before = everything(typed)
    result = run(*(word.format(user=user) if word == "{user}" else word for word in line))
    assert result.code == code, result.err
    assert named in (result.out if code == 0 else result.err)
    assert everything(typed) == before
