"""``docs/sql.md``: its reference is that of the installed functions, and its examples run."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from tallystick.dev.postgres import Server
from tallystick.ledger.reference import outcomes_of, refusals
from worlds import World

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "sql.md").read_text("utf-8")
KINDS = {"user_key": "uuid", "workshop_key": "uuid", "credits": "integer"}  # of the world that it is held against


@pytest.fixture
def conn(world: World):
    with psycopg.connect(world.url.replace("+psycopg", "", 1)) as conn:
        yield conn


def test_the_reference_is_written_from_the_files():
    written = runpy.run_path(str(ROOT / "tools" / "sql_page.py"))
    assert written["page"](PAGE) == PAGE, "run: python tools/sql_page.py"


def installed(conn: psycopg.Connection) -> dict[str, tuple[list[tuple[str, str, str | None]], str]]:
    """(name, type, default) of each parameter, and what is returned, of what a role can be given EXECUTE on."""
    rows = conn.execute("""
        SELECT proname, proargnames[:pronargs], proargtypes::regtype[]::text[],
          ARRAY(SELECT pg_get_function_arg_default(p.oid, n) FROM generate_series(1, pronargs) AS n),
          pg_get_function_result(p.oid)
        FROM pg_proc AS p WHERE pronamespace = 'tallystick'::regnamespace AND prosecdef
    """)
    return {
        name: (
            [
                (parameter, kind, default and default.split("::")[0])
                for parameter, kind, default in zip(names, kinds, defaults, strict=True)
            ],
            returns,
        )
        for name, names, kinds, defaults, returns in rows
    }


def test_the_reference_is_that_of_the_installed_functions(conn: psycopg.Connection):
    documented = {}
    for name, parameters, returns, outcomes, strict in re.findall(
        r"^tallystick\.(\w+)\(\n(.*?)\n\) → (.*?)\n```\n\nOutcomes: (.*?)\.(?: Strict: `(\w+)`\.)?$",
        PAGE,
        re.MULTILINE | re.DOTALL,
    ):
        listed = []
        for line in parameters.splitlines():
            parameter, kind, *default = line.strip().rstrip(",").replace(" DEFAULT ", " ").split(" ")
            array = "[]" if kind.endswith("[]") else ""
            kind = KINDS.get(kind.removesuffix("[]"), kind.removesuffix("[]")) + array
            listed.append((parameter, kind.replace("timestamptz", "timestamp with time zone"), *(default or [None])))
        told = returns.replace("a set of", "SETOF")
        documented[name] = (listed, told)
        if strict:
            documented[strict] = (listed, told)
        assert tuple(re.findall(r"`(\w+)`", outcomes)) == outcomes_of(name)
    assert documented == installed(conn)


def test_every_attribute_and_parameter_has_its_line(conn: psycopg.Connection):
    for answer in ("answer", "account_answer", "workshop_answer"):
        section = PAGE.split(f"### tallystick.{answer}\n")[1].split("\n#")[0]
        attributes = conn.execute(
            "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND NOT attisdropped ORDER BY attnum",
            [f"tallystick.{answer}"],
        )
        assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [name for (name,) in attributes]
    section = PAGE.split("## Parameters\n")[1].split("\n#")[0]
    parameters = {name for names, _ in installed(conn).values() for name, _, _ in names}
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == parameters


def test_every_refusal_has_its_code(conn: psycopg.Connection):
    documented = re.findall(r"^\| `(\w+)` \| `(TS\d+)` \|", PAGE, re.MULTILINE)
    assert [(refusal.name, refusal.sqlstate) for refusal in refusals()] == documented
    for name, sqlstate in documented:
        assert conn.execute("SELECT tallystick.sqlstate_of(%s)", [name]).fetchone() == (sqlstate,)


def test_what_is_typed_in_psql_answers_as_shown(server: Server, world: World):
    user = world.user()
    variables = ["-v", f"user={user}", "-v", f"workshop={world.workshop(user)}", "-v", "VERBOSITY=verbose"]
    shown = []
    for block in re.findall(r"^```psql\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        for each in re.split(r"^=> ", block, flags=re.MULTILINE)[1:]:
            lines = each.splitlines()
            typed = [lines[0], *(line.removeprefix("-> ") for line in lines[1:] if line.startswith("-> "))]
            shown.append(("\n".join(typed), [line.rstrip() for line in lines[len(typed) :]]))
    assert len(shown) == 10
    command = server.command("psql", "-X", "-q", *variables)
    environment = {**server.env, "PGDATABASE": world.url.rsplit("/", 1)[1].split("?")[0]}
    for typed, answer in shown:
        done = subprocess.run(command, env=environment, input=typed, capture_output=True, text=True, check=False)
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        assert [line.rstrip() for line in [*errors, *done.stdout.splitlines()] if line] == answer, typed


VIEW = """
import json, sys
import django
from django.conf import settings
from types import SimpleNamespace

told = json.load(sys.stdin)
settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", **told["database"]}},
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth"],
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
)
django.setup()
exec(told["view"])

from uuid import UUID
from django.db import transaction
from django.test import RequestFactory

def ask(workshop):
    request = RequestFactory().post("/")
    request.user = SimpleNamespace(pk=UUID(told["user"]), is_authenticated=True)
    response = unlock(request, UUID(workshop))
    return [response.status_code, json.loads(response.content)]

answers = [ask(told["workshop"]), ask(told["nobody"])]
with connection.cursor() as cursor:
    cursor.execute("SELECT tallystick.grant(%s, 2, 'welcome', 'Welcome')", [UUID(told["user"])])
try:
    with transaction.atomic():
        answers.append(ask(told["workshop"]))
        raise KeyError
except KeyError:
    pass  # rolled back, and so the same is done again
print(json.dumps([*answers, ask(told["workshop"]), ask(told["workshop"])]))
"""


def test_the_django_view(world: World):
    (view,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    at = psycopg.conninfo.conninfo_to_dict(world.url.replace("+psycopg", "", 1))
    user = world.user()
    told = {
        "view": view,
        "database": {"NAME": at["dbname"], "HOST": at["host"], "PORT": at["port"], "USER": at["user"]},
        "user": str(user),
        "workshop": str(world.workshop(user)),
        "nobody": str(world.key("uuid")),
    }
    done = subprocess.run(
        [sys.executable, "-c", VIEW], input=json.dumps(told), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        [402, {"open": False, "balance": 0, "required": 1}],
        [404, {"open": False}],
        [200, {"open": True, "balance": 1}],
        [200, {"open": True, "balance": 1}],
        [200, {"open": True, "balance": 1}],
    ]
