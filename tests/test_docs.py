"""The documentation is true: its examples run, and every command, setting and public name stands in it."""

from __future__ import annotations

import datetime as dt
import functools
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import tomllib
from pathlib import Path
from uuid import UUID

import pytest
import sqlalchemy as sa
import typer
from standardwebhooks import Webhook

import tallystick
import tallystick.config as config_module
from pages import blocks
from tallystick import Config, HostMapping, Pack, UsersTable, WorkshopsTable, events, migrate, pytest_plugin
from tallystick.audit import audit
from tallystick.cli import commands
from tallystick.config import Allowance, ConsoleAccess
from tallystick.dev.demo_app import build_host_app
from tallystick.dev.postgres import Server
from tallystick.dev.seed import ENVIRONMENT_VARIABLES
from tallystick.schema import CreditTransactionType
from worlds import World

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
RECORD_EVENT = (ROOT / "src" / "tallystick" / "ledger" / "sql" / "record_event.sql").read_text(encoding="utf-8")
NO_KINDS = {"accounts.set_low_balance", "tallystick.set_low_balance"}


def subcommands(group, path=("tallystick",)):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from subcommands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(subcommands(typer.main.get_command(commands())))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented_with_its_options(command):
    assert f"`{command}" in TEXT
    assert COMMANDS[command].help
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    for option in COMMANDS[command].params:
        for flag in (f for f in option.opts if f.startswith("--") and f not in ("--json", "--help")):
            assert flag in page, f"{command} {flag}"


def test_no_command_is_documented_that_is_not_there():
    groups = {command.rsplit(" ", 1)[0] for command in COMMANDS}
    named = set(re.findall(r"`tallystick ([a-z][a-z-]*(?: [a-z][a-z-]*)?)", TEXT))
    known = {command.removeprefix("tallystick ") for command in COMMANDS}
    for words in named:
        first = words.split()[0]
        assert words in known or first in known or f"tallystick {words}" in groups, words


@pytest.mark.parametrize("name", tallystick.__all__)
def test_every_public_name_is_documented(name):
    assert re.search(rf"\b{name}\b", TEXT)


REFERENCE = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.MULTILINE)
EXPORTING = ("tallystick", "tallystick.events", "tallystick.stripe", "tallystick.web", "tallystick.web.django")


@pytest.mark.parametrize("module", [*EXPORTING, "tallystick.web.console"])
def test_the_reference_of_python_has_every_exported_name(module):
    shown = [pkgutil.resolve_name(name) for name in REFERENCE]
    shown += [value for found in shown if inspect.ismodule(found) for value in vars(found).values()]
    exporting = importlib.import_module(module)
    missing = [name for name in exporting.__all__ if not any(getattr(exporting, name) is each for each in shown)]
    assert module in REFERENCE or missing == []


SETTINGS = {*Config.model_fields, *HostMapping.__dataclass_fields__}.union(
    *(kind.__dataclass_fields__ for kind in (UsersTable, WorkshopsTable, Pack, Allowance, ConsoleAccess))
)


@pytest.mark.parametrize("name", sorted(SETTINGS - {"host"}))
def test_every_setting_is_documented(name):
    assert f"`{name}`" in TEXT or f"`host.{name}`" in TEXT


def test_every_environment_variable_is_documented():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    variables = page.split("## Environment variables")[1].split("\n## ")[0]
    names = {name.upper() for name in config_module._USUAL_VARIABLES} | {pytest_plugin.VARIABLE}
    names |= {*config_module._OTHER_VARIABLES, *ENVIRONMENT_VARIABLES}
    assert {name for name in names if f"`{name}`" not in variables} == set()


def test_the_example_variables_load(tmp_path):
    (tmp_path / "tallystick.toml").touch()
    (script,) = blocks(ROOT / "docs" / "configuration.md", "sh")
    environ = dict(line.removeprefix("export ").split("=", 1) for line in script.splitlines())
    found = Config.load(tmp_path / "tallystick.toml", environ={k: v.strip("'") for k, v in environ.items()})
    assert (found.paywall, len(found.checkout_origins), found.packs[0].amount) == (False, 2, 7900)


def test_every_extra_is_in_the_readme():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| ", readme.split("| extra |")[1].split("```")[0], re.MULTILINE) == [
        *sorted(project["optional-dependencies"], key=["stripe", "web", "django", "events", "backup", "devdb"].index)
    ]


def test_the_example_settings_load(tmp_path):
    file = tmp_path / "tallystick.toml"
    file.write_text(blocks(ROOT / "docs" / "configuration.md", "toml")[0], encoding="utf-8")
    assert [pack.credits for pack in Config.load(file, environ={}).packs] == [1, 3]


@pytest.mark.parametrize("page", ["ledger.md", "holds.md", "people.md"])
def test_a_page_of_the_ledger_runs_on_the_tables_of_db_example(page: str, fresh_database, monkeypatch, tmp_path):
    url = fresh_database()
    build_host_app(url, users=1, workshops=1)
    migrate.apply(url, Config())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", url)
    names: dict[str, object] = {}
    try:
        for block in blocks(ROOT / "docs" / page, "python"):
            exec(compile(block, f"docs/{page}", "exec"), names)
    finally:
        names["engine"].dispose()


def test_the_page_on_events_reads_them_all(world: World, monkeypatch, capsys, tmp_path):
    events.enable(world.url, world.config)
    user = world.user(credits=4)
    monkeypatch.setattr(sa, "create_engine", functools.partial(sa.create_engine, poolclass=sa.NullPool))
    monkeypatch.setenv("DATABASE_URL", world.url)
    monkeypatch.chdir(tmp_path)
    reading, verifying = blocks(ROOT / "docs" / "events.md", "python")
    exec(compile(reading, "docs/events.md", "exec"), {})
    assert capsys.readouterr().out == f"purchase.completed {user} 4 4\n"

    secret, body, now = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "{}", dt.datetime.now(dt.UTC)
    signature = Webhook(secret).sign("evt_1", now, body)
    stamp = str(int(now.timestamp()))
    headers = {"webhook-id": "evt_1", "webhook-timestamp": stamp, "webhook-signature": signature}
    names = {"secret": secret, "body": body, "headers": headers}
    exec(compile(verifying, "docs/events.md", "exec"), names)
    assert names["said"] == {}


def test_the_page_on_events_knows_every_kind():
    page = (ROOT / "docs" / "events.md").read_text(encoding="utf-8")
    kinds = {f"{each}.completed" for each in CreditTransactionType}
    kinds |= set(re.findall(r"'(balance\.\w+)'", RECORD_EVENT))
    kinds |= {f"consumption.{word}" for word in re.findall(r"(?:THEN|ELSE) '(held|released|expired)'", RECORD_EVENT)}
    assert set(re.findall(r"`(\w+\.\w+)`", page.split("## Kinds")[1].split("## Reading")[0])) - NO_KINDS == kinds | {
        "purchase.failed"
    }


def test_the_webhook_on_the_page_is_as_it_is_sent():
    page = (ROOT / "docs" / "events.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    assert [*json.loads(shown)["data"]] == [
        name for name in tallystick.Event.__dataclass_fields__ if name not in ("kind", "created_at")
    ]


def test_the_readmes_example_runs(world: World, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", world.url)
    # its engine is nobody's to dispose of, so it must not keep a connection
    monkeypatch.setattr(sa, "create_engine", functools.partial(sa.create_engine, poolclass=sa.NullPool))
    user = world.user()
    (block,) = blocks(ROOT / "README.md", "python")
    to_fill_in = "user, workshop = ..., ..."
    assert to_fill_in in block
    filled = block.replace(to_fill_in, f"user, workshop = {user!r}, {world.workshop(user)!r}")
    names: dict[str, object] = {"UUID": UUID}
    exec(compile(filled, "README.md", "exec"), names)
    names["engine"].dispose()
    assert names["done"].balance_after == 2


def test_every_message_that_is_explained_is_one_of_ours():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    source = "".join(
        file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*") if file.suffix in (".py", ".sql")
    )
    explained = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(explained) > 15
    assert [message for message in explained if message not in source] == []


@pytest.mark.parametrize("written", [40, 1])
def test_the_row_that_is_missing_after_a_balance_was_written_is_added(
    world: World, server: Server, tmp_path: Path, written: int
):
    user, ledger, users = world.user(credits=5), world.ledger, world.schema.users
    with world.engine.begin() as conn:
        conn.execute(sa.update(users).where(users.c.key == user).values(credit_balance=written))
        for number in range(2):
            ledger.grant(conn, user, credits=1, key=f"later {number}", description="Later")
        [finding] = audit(conn, world.config).findings
        conn.execute(sa.text("INSERT INTO tallystick.days SELECT (now() AT TIME ZONE 'UTC')::date, 0, now()"))  # closed
    credits = int(finding.found.split()[1]) - int(finding.expected.split()[1].rstrip(","))
    assert (finding.check, credits) == ("chain_arithmetic", written - 5)
    (script,) = blocks(ROOT / "docs" / "troubleshooting.md", "sql")
    (tmp_path / "missing_row.sql").write_text(script, encoding="utf-8")
    given = {"ON_ERROR_STOP": 1, "user": user, "sequence": 2, "credits": credits}
    options = [f"--set={name}={value}" for name, value in given.items()]
    command = server.command("psql", *options, "-f", "missing_row.sql", str(world.engine.url.database))
    subprocess.run(command, cwd=tmp_path, env=server.env, check=True, capture_output=True)
    with world.engine.connect() as conn:
        assert audit(conn, world.config).findings == ()
        rows = ledger.history(conn, user)
        assert [row.sequence for row in rows] == [4, 3, 2, 1]
        assert (rows[2].amount, ledger.balance(conn, user)) == (written - 5, written + 2)


def test_every_page_is_in_the_list_for_machines():
    listed = (ROOT / "docs" / "llms.txt").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"({page.name})" not in listed] == []


def test_links_between_pages_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
