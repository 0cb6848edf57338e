"""``docs/sql.md``: its reference is that of the installed functions, and its examples run."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from psycopg.rows import dict_row

from tallystick.dev.postgres import Server
from tallystick.ledger.functions import declared
from tallystick.ledger.reference import PARAMETERS, outcomes_of, refusals
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
        FROM pg_proc AS p JOIN pg_type AS answer ON answer.oid = p.prorettype
        -- close_days and triggers give no answer
        WHERE pronamespace = 'tallystick'::regnamespace AND prosecdef AND typnamespace = pronamespace
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
        result = returns.replace("a set of", "SETOF")
        documented[name] = (listed, result)
        if strict:
            documented[strict] = (listed, result)
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


@pytest.mark.parametrize(
    "function", [each.name for each in declared() if "row_limit" in {name for name, *_ in each.parameters}]
)
def test_the_line_of_row_limit_has_each_functions_limits(world: World, function: str):
    user = world.user()
    name = "user_id => :user, " if function == "history" else ""
    call = sa.text(f"SELECT outcome, detail FROM tallystick.{function}({name}row_limit => 0)")
    with world.engine.connect() as conn:
        outcome, detail = conn.execute(call, {"user": user} if name else {}).one()
    assert outcome == "invalid_argument"
    least, most = map(int, re.findall(r"\d+", detail["expected"]))
    phrase = PARAMETERS["row_limit"]
    assert f"{least} to {most:,}" in (phrase.partition(" of sweep ")[2] if function == "sweep" else phrase)


def test_every_refusal_has_its_code(conn: psycopg.Connection):
    documented = re.findall(r"^\| `(\w+)` \| `(TS\d+)` \|", PAGE, re.MULTILINE)
    assert [(refusal.name, refusal.sqlstate) for refusal in refusals()] == documented
    for name, sqlstate in documented:
        assert conn.execute("SELECT tallystick.sqlstate_of(%s)", [name]).fetchone() == (sqlstate,)


BIG = 2**31 - 1
REFUSED = {
    "invalid_argument": "consume(user_id => %(user)s, key => 'k', amount => 0)",
    "unknown_user": "consume(user_id => %(nobody)s, key => 'k')",
    "user_deleted": "consume(user_id => %(gone)s, key => 'k')",
    "unknown_workshop": "consume(user_id => %(user)s, key => 'k', workshop_id => %(nobody)s)",
    "workshop_deleted": "consume(user_id => %(user)s, key => 'k', workshop_id => %(closed)s)",
    "workshop_not_owned": "consume(user_id => %(user)s, key => 'k', workshop_id => %(others)s)",
    "workshop_unaccounted": "consume(user_id => %(user)s, key => 'k', workshop_id => %(marked)s)",
    "unknown_purchase": "complete_purchase(user_id => %(user)s, purchase_id => %(nobody)s)",
    "purchase_not_pending": "fail_purchase(user_id => %(user)s, purchase_id => %(paid)s, reason => 'expired')",
    "purchase_not_completed": "refund(user_id => %(user)s, purchase_id => %(pending)s, key => 'k')",
    "session_conflict": "attach_session(user_id => %(user)s, purchase_id => %(pending)s, stripe_session_id => 'cs_2')",
    "stripe_customer_conflict": "set_stripe_customer(user_id => %(user)s, stripe_customer_id => 'cus_2')",
    "insufficient_credits": "consume(user_id => %(user)s, key => 'k', amount => 50)",
    "refund_exceeds_purchase": "refund(user_id => %(user)s, purchase_id => %(paid)s, key => 'k', amount => 50)",
    "reinstatement_exceeds_refunds": "reinstate(user_id => %(user)s, purchase_id => %(paid)s, key => 'k')",
    "balance_out_of_range": f"grant(user_id => %(user)s, amount => {BIG}, key => 'k', description => 'All')",
    "idempotency_key_reused": "consume(user_id => %(user)s, key => 'used', amount => 2)",
    "ledger_inconsistent": "consume(user_id => %(behind)s, key => 'k')",
    "unknown_consumption": "reverse(user_id => %(user)s, consumption_id => %(paid)s, key => 'k')",
    "unknown_grant": "correct(user_id => %(user)s, grant_id => %(paid)s, key => 'k')",
    "unknown_hold": "capture(user_id => %(user)s, hold_id => %(paid)s)",
    "reversal_exceeds_consumption": "reverse(user_id => %(user)s, consumption_id => %(used)s, key => 'k', amount => 5)",
    "correction_exceeds_grant": "correct(user_id => %(user)s, grant_id => %(given)s, key => 'k', amount => 50)",
    "hold_closed": "capture(user_id => %(user)s, hold_id => %(released)s)",
    "capture_exceeds_hold": "capture(user_id => %(user)s, hold_id => %(held)s, amount => 50)",
    "holds_pending": "merge(user_id => %(user)s, into_user_id => %(behind)s, key => 'k')",
}


@pytest.mark.parametrize("outcome", REFUSED)
def test_a_refusal_tells_what_the_page_says_and_is_raised_with_its_code(outcome: str, world: World):
    refusal = {each.name: each for each in refusals()}[outcome]
    user, gone, behind = world.user(credits=9), world.user(), world.user(credits=3)
    with world.engine.begin() as conn:
        paid = world.buy(conn, user, 5)
        pending = world.ledger.start_purchase(conn, user, credits=1, description="Purchased 1")
        world.ledger.attach_session(conn, user, pending.id, stripe_session_id="cs_1")
        used = world.ledger.consume(conn, user, key="used")
        granted = world.ledger.grant(conn, user, credits=1, key="given", description="Given")
        held, released = (world.ledger.hold(conn, user, credits=1, key=key) for key in ("held", "released"))
        world.ledger.release(conn, user, released.id)
        world.accounts.set_stripe_customer(conn, user, "cus_1")
        world.accounts.delete_user(conn, gone)
        conn.exec_driver_sql("UPDATE users SET credit_sequence = 0 WHERE id = %s", (behind,))
    given = {
        "user": user,
        "gone": gone,
        "behind": behind,
        "nobody": world.key("uuid"),
        "paid": paid.id,
        "pending": pending.id,
        "used": used.id,
        "given": granted.id,
        "held": held.id,
        "released": released.id,
        "others": world.workshop(gone),
        "closed": world.workshop(user, deleted_at=sa.func.now()),
        "marked": world.workshop(user, credit_consumed_at=sa.func.now()),
    }
    function, arguments = REFUSED[outcome].split("(", 1)
    with psycopg.connect(world.url.replace("+psycopg", "", 1), row_factory=dict_row, autocommit=True) as conn:
        answer = conn.execute(f"SELECT * FROM tallystick.{function}({arguments}", given).fetchone()
        assert answer is not None
        assert answer["outcome"] == outcome
        assert outcome in outcomes_of(function)
        fields = {**answer, **{f"detail.{name}": value for name, value in (answer["detail"] or {}).items()}}
        assert not [name for name, kind in refusal.fields.items() if not kind.endswith("?") and fields[name] is None]
        with pytest.raises(psycopg.Error) as raised:
            conn.execute(f"SELECT * FROM tallystick.{function}_strict({arguments}", given)
    assert (raised.value.sqlstate, raised.value.diag.message_primary) == (refusal.sqlstate, outcome)
    assert json.loads(raised.value.diag.message_detail or "")["outcome"] == outcome


def test_every_refusal_but_the_one_that_is_always_raised_was_provoked():
    assert {*REFUSED, "host_interfered"} == {refusal.name for refusal in refusals()}


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

data = json.load(sys.stdin)
settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", **data["database"]}},
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth"],
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
)
django.setup()
exec(data["view"])

from uuid import UUID
from django.db import transaction
from django.test import RequestFactory

def ask(workshop):
    request = RequestFactory().post("/")
    request.user = SimpleNamespace(pk=UUID(data["user"]), is_authenticated=True)
    response = unlock(request, UUID(workshop))
    return [response.status_code, json.loads(response.content)]

answers = [ask(data["workshop"]), ask(data["nobody"])]
with connection.cursor() as cursor:
    cursor.execute("SELECT tallystick.grant(%s, 2, 'welcome', 'Welcome')", [UUID(data["user"])])
try:
    with transaction.atomic():
        answers.append(ask(data["workshop"]))
        raise KeyError
except KeyError:
    pass  # rolled back, and so the same is done again
print(json.dumps([*answers, ask(data["workshop"]), ask(data["workshop"])]))
"""


def test_the_django_view(world: World):
    text = (ROOT / "docs" / "django.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    view = "\n".join(block for block in blocks if not re.match(r"# \S+\.py\n", block))  # files of an app of its own
    at = psycopg.conninfo.conninfo_to_dict(world.url.replace("+psycopg", "", 1))
    user = world.user()
    request_data = {
        "view": view,
        "database": {"NAME": at["dbname"], "HOST": at["host"], "PORT": at["port"], "USER": at["user"]},
        "user": str(user),
        "workshop": str(world.workshop(user)),
        "nobody": str(world.key("uuid")),
    }
    done = subprocess.run(
        [sys.executable, "-c", VIEW],
        input=json.dumps(request_data),
        env=os.environ | {"DATABASE_URL": world.url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        [402, {"open": False, "balance": 0, "required": 1}],
        [404, {"open": False}],
        [200, {"open": True, "balance": 1}],
        [200, {"open": True, "balance": 1}],
        [200, {"open": True, "balance": 1}],
    ]
