"""Events: a feed of the ledger's changes, off until it is enabled.

An expansion: nothing of it is used until then, and no existing table is touched.

Frozen in time: literal DDL, nothing imported from today's code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psycopg.sql import SQL, Composable, Identifier

revision = "0003"
down_revision = "0002"
kind = "expand"

TABLES = {
    "events": """
CREATE TABLE tallystick.events (
  position bigint NOT NULL,
  id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
  kind text NOT NULL,
  transaction_id uuid NOT NULL,
  threshold bigint,
  created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  CONSTRAINT events_pkey PRIMARY KEY (position, id)
)""",
    "event_settings": """
CREATE TABLE tallystick.event_settings (
  xid_offset bigint NOT NULL DEFAULT 0,
  low_balance bigint,
  notifies boolean NOT NULL DEFAULT false,
  recorded_since timestamptz,
  the_only_row boolean NOT NULL DEFAULT true,
  CONSTRAINT event_settings_pkey PRIMARY KEY (the_only_row),
  CONSTRAINT event_settings_the_only_row CHECK (the_only_row)
)""",
    "low_balances": """
CREATE TABLE tallystick.low_balances (
  user_id {user_key_type} NOT NULL,
  threshold bigint NOT NULL,
  CONSTRAINT low_balances_pkey PRIMARY KEY (user_id)
)""",
    "event_endpoints": """
CREATE TABLE tallystick.event_endpoints (
  name text NOT NULL,
  url text NOT NULL,
  secret_variable text NOT NULL,
  kinds text[],
  cursor text,
  attempts integer NOT NULL DEFAULT 0,
  next_attempt_at timestamptz,
  last_error text,
  created_at timestamptz NOT NULL DEFAULT now(),
  removed_at timestamptz,
  CONSTRAINT event_endpoints_pkey PRIMARY KEY (name)
)""",
    "event_dead_letters": """
CREATE TABLE tallystick.event_dead_letters (
  endpoint text NOT NULL,
  event_id bigint NOT NULL,
  kind text NOT NULL,
  body text NOT NULL,
  attempts integer NOT NULL,
  last_error text NOT NULL,
  failed_at timestamptz NOT NULL DEFAULT now(),
  replayed_at timestamptz,
  CONSTRAINT event_dead_letters_pkey PRIMARY KEY (endpoint, event_id)
)""",
}
INDEX = "CREATE INDEX events_transaction ON tallystick.events (transaction_id)"

columns: dict[str, tuple[str, ...]] = {}
creates = ()


# Roles that were granted the ledger get its new objects, as by ``tallystick migrate sql --role``.
SAME_CALLERS = """
DO $body$
DECLARE
  command text;
BEGIN
  FOR command IN
    WITH callers AS (
      SELECT DISTINCT quote_ident(r.rolname) AS role
      FROM pg_proc p CROSS JOIN LATERAL aclexplode(p.proacl) a JOIN pg_roles r ON r.oid = a.grantee
      WHERE p.pronamespace = 'tallystick'::regnamespace AND p.proname = 'consume'
        AND a.privilege_type = 'EXECUTE' AND a.grantee <> p.proowner
    )
    SELECT format('GRANT EXECUTE ON FUNCTION %s TO %s', p.oid::regprocedure, c.role) FROM callers c, pg_proc p
      WHERE p.pronamespace = 'tallystick'::regnamespace
        AND p.proname IN ('events', 'set_low_balance', 'set_low_balance_strict')
    UNION ALL
    SELECT format('GRANT %s TO %s', given, c.role) FROM callers c, unnest(ARRAY[
      'SELECT ON tallystick.events, tallystick.event_settings, tallystick.low_balances',
      'SELECT, INSERT, UPDATE ON tallystick.event_endpoints, tallystick.event_dead_letters']) AS given
  LOOP
    EXECUTE command;
  END LOOP;
END $body$
"""


def prepare(host: Any) -> Iterator[Composable]:
    """New objects: nothing here touches an existing table."""
    for statement in TABLES.values():
        yield SQL(statement.strip()).format(user_key_type=host.users.key_column)
    yield SQL(INDEX)
    yield SQL("INSERT INTO tallystick.event_settings DEFAULT VALUES")
    yield from host.other_functions("0002", "0003")


def locks(_host: Any) -> tuple[Identifier, ...]:
    """None: no existing table is changed."""
    return ()


def locked(_host: Any) -> Iterator[Composable]:
    """Grant the privileges, after the default ones of new objects were revoked."""
    yield SQL(SAME_CALLERS.strip())


def indexes(_host: Any) -> dict[str, Composable]:
    """None."""
    return {}


def validates(_host: Any) -> dict[str, Composable]:
    """Nothing."""
    return {}


def undo_locks(host: Any) -> tuple[Identifier, ...]:
    """The ledger, which has the trigger if events are on."""
    return (_ledger(host),)


def undo(host: Any) -> Iterator[Composable]:
    """Undo to a ledger without events; those that were written are dropped."""
    yield SQL("DROP TRIGGER IF EXISTS tallystick_events ON {}").format(_ledger(host))
    yield from unprepare(host)


def unprepare_locks(_host: Any) -> tuple[Identifier, ...]:
    """None: nobody uses the dropped objects."""
    return ()


def unprepare(host: Any) -> Iterator[Composable]:
    """Undo ``prepare`` alone."""
    yield from host.other_functions("0003", "0002")
    yield SQL("DROP TABLE {}").format(SQL(", ").join(Identifier("tallystick", name) for name in TABLES))


def _ledger(host: Any) -> Identifier:
    return Identifier(host.ledger_schema, "credit_transactions")
