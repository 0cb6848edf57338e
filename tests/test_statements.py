"""The ledger's SQL as reviewers read it, and the plans it gets on tables that are not small."""

from __future__ import annotations

import datetime as dt
import difflib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from tallystick import HostMapping
from tallystick.dev.postgres import Server
from tallystick.schema import Schema
from tallystick.statements import statements
from worlds import SHAPES, World

GOLDEN = Path(__file__).parent / "golden" / "statements.sql"
UPDATE = "TALLYSTICK_UPDATE_GOLDEN"


def readable(statement: sa.Executable, schema: Schema) -> str:
    """One clause a line; the words and their order are the compiler's own.

    What all statements repeat is shortened: ``public.`` is left out, and all columns of the ledger are its ``*``.
    """
    dialect = postgresql.psycopg.dialect(paramstyle="named")
    text = " ".join(str(statement.compile(dialect=dialect)).split()).replace("public.", "")
    text = re.sub(r"\b(\w+)\.(\w+) AS \2(?:_\d+)?\b", r"\1.\2", text)  # names that only the compiler needs
    columns = [column.name for column in schema.credit_transactions.c]
    for table in (
        "credit_transactions",
        "written",
        "unlocked",
        "prior",
        "purchase",
        "page",
        "of_status",
        "anon_1",
        "anon_2",
    ):
        text = text.replace(", ".join(f"{table}.{name}" for name in columns), f"{table}.*")
    text = re.sub(r"\((?=SELECT|INSERT|UPDATE)", "(\n", text)
    text = re.sub(
        r" (?=(?:(?<!DISTINCT )FROM|WHERE|SET|ON CONFLICT|RETURNING|ORDER BY|LIMIT|FOR NO|LEFT|UNION)\b)", "\n", text
    )
    text = re.sub(r"(?<=\),) (?=\w+ AS(?: MATERIALIZED)? \()|(?<=\)) (?=SELECT|UPDATE)", "\n", text)
    lines, depth = [], 0
    for line in text.splitlines():
        lines.append("  " * depth + line.strip())
        depth += line.count("(") - line.count(")")
    return "\n".join(lines)


def compiled() -> str:
    schema = Schema.of(HostMapping())
    head = (
        "-- Every statement of the ledger for the default mapping, as the tests compile it (test_statements.py).\n"
        '-- Shortened: no "public.", and all columns of a row are its *.\n'
        f"-- After a change that is meant: {UPDATE}=1 make test\n"
    )
    return head + "".join(
        f"\n-- {name}\n{readable(statement, schema)};\n" for name, statement in statements(schema).items()
    )


def test_the_sql_is_what_reviewers_read() -> None:
    now = compiled()
    if os.environ.get(UPDATE):
        GOLDEN.write_text(now)
    before = GOLDEN.read_text() if GOLDEN.exists() else ""
    changes = "\n".join(difflib.unified_diff(before.splitlines(), now.splitlines(), "golden", "now", lineterm="", n=1))
    assert not changes, f"{changes}\n\nIf this is meant: {UPDATE}=1 make test, and review the file's diff"


# --- plans ---

ROWS = 20_000  # users, and workshops; three times as many rows in the ledger: nothing is scanned for want of size

FILL = """
INSERT INTO users (id, email, credit_balance, credit_sequence)
SELECT md5('user' || n)::uuid, n || '@example.com', 3, 3 FROM generate_series(1, {rows}) n;
INSERT INTO workshops (id, user_id, title, credit_consumed_at)
SELECT md5('workshop' || n)::uuid, md5('user' || n)::uuid, 'A workshop', CASE WHEN mod(n, 3) = 0 THEN now() END
FROM generate_series(1, {rows}) n;
INSERT INTO credit_transactions (id, user_id, type, status, amount, balance_after, sequence, description, workshop_id,
  refund_of, stripe_session_id, idempotency_key, completed_at)
SELECT md5('row' || n || '-' || k)::uuid, md5('user' || n)::uuid,
  (ARRAY['purchase', 'consumption', 'refund'])[k]::credit_transaction_type, 'completed',
  (ARRAY[5, -1, -1])[k], (ARRAY[5, 4, 3])[k], k, 'x', CASE WHEN k = 2 THEN md5('workshop' || n)::uuid END,
  CASE WHEN k = 3 THEN md5('row' || n || '-1')::uuid END, CASE WHEN k = 1 THEN 'cs_' || n END, 'key ' || k, now()
FROM generate_series(1, {rows}) n, generate_series(1, 3) k;
"""


@pytest.fixture(scope="module")
def filled(server: Server, _templates: Callable[[str], str]) -> Iterator[World]:
    name = f"plans_{uuid.uuid4().hex}"
    world = World(server.create_database(name, template=_templates("uuid")), SHAPES["uuid"].host)
    with world.autocommit.connect() as conn:
        conn.exec_driver_sql(FILL.format(rows=ROWS))
        conn.exec_driver_sql("VACUUM ANALYZE")
    yield world
    server.drop_database(name)


VALUES = {
    "p_id": uuid.uuid4(),
    "p_user": uuid.UUID(hashlib.md5(b"user7", usedforsecurity=False).hexdigest()),
    "p_workshop": uuid.UUID(hashlib.md5(b"workshop7", usedforsecurity=False).hexdigest()),
    "p_purchase": uuid.UUID(hashlib.md5(b"row7-1", usedforsecurity=False).hexdigest()),
    "p_session": "cs_7",
    "p_key": "key 2",
    "p_amount": 1,
    "p_when": dt.datetime.now(dt.UTC),
    "p_limit": 50,
    "p_before_id": uuid.UUID(int=2**128 - 1),
    "p_before_sequence": 2**31 - 1,
    "p_status": "failed",
    "p_currency": "usd",
    "p_paid": 7900,
}


def value_of(parameter: str) -> Any:
    """A value, or a list of it where the statement takes lists."""
    single = parameter.removesuffix("s")
    return VALUES.get(parameter) if single == parameter else [VALUES.get(single)]


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize("name", statements(Schema.of(HostMapping())))
def test_no_statement_reads_a_whole_table(filled: World, name: str, mode: str) -> None:
    """Planned for the values at hand, and for any values, as a prepared statement is after a while."""
    dialect = postgresql.psycopg.dialect(paramstyle="numeric_dollar")
    statement = filled.ledger.statements[name].compile(dialect=dialect)
    values = [value_of(parameter) for parameter in statement.positiontup]
    with psycopg.connect(filled.url.replace("+psycopg", ""), cursor_factory=psycopg.ClientCursor) as conn:
        conn.execute(f"SET plan_cache_mode = {mode}")
        conn.execute(f"PREPARE it AS {statement}")
        slots = ", ".join(["%s"] * len(values))
        answer = conn.execute(f"EXPLAIN (FORMAT JSON) EXECUTE it ({slots})", values).fetchone()
    plan = answer[0][0]["Plan"]
    scanned = {node["Relation Name"] for node in nodes(plan) if node["Node Type"] == "Seq Scan"}
    assert scanned <= {"migration_log"}, json.dumps(plan, indent=1)
