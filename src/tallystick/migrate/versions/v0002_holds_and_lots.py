"""Holds, reversals, corrections, and credits that expire.

An expansion: old code keeps working.

Frozen in time: literal DDL, nothing imported from today's code; ``host`` as in revision 0001.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psycopg.sql import SQL, Composable, Identifier, Literal

from tallystick.migrate.versions import v0001_credits as before

revision = "0002"
down_revision = "0001"
kind = "expand"

USERS_COLUMNS = {
    "credit_held": "{credits} NOT NULL DEFAULT 0",
    "credit_due_at": "timestamptz",
}
LEDGER_COLUMNS = {
    "expires_at": "timestamptz",
    "expires_after": "interval",
    "held": "{credits}",
    "capture_limit": "{credits}",
    "started_amount": "{credits}",
}
TYPES = ("reversal", "correction", "expiry")
DUE_INDEX = "tallystick_users_credit_due_at"

columns = {"users": tuple(USERS_COLUMNS)}
creates = (DUE_INDEX,)

LOTS = (
    """
CREATE TABLE tallystick.lots (
  id uuid NOT NULL,
  user_id {user_key_type} NOT NULL,
  amount {credits} NOT NULL,
  remaining {credits} NOT NULL,
  expires_at timestamptz NOT NULL,
  CONSTRAINT lots_pkey PRIMARY KEY (id),
  CONSTRAINT lots_remaining CHECK (remaining >= 0 AND remaining <= amount)
)""",
    "CREATE INDEX lots_user ON tallystick.lots (user_id, expires_at) WHERE remaining > 0",
    """
CREATE TABLE tallystick.lot_moves (
  transaction_id uuid NOT NULL,
  lot_id uuid NOT NULL,
  amount {credits} NOT NULL,
  CONSTRAINT lot_moves_pkey PRIMARY KEY (transaction_id, lot_id)
)""",
    "CREATE INDEX lot_moves_lot ON tallystick.lot_moves (lot_id)",
)

TYPE_RULE = """CHECK (CASE type
      WHEN 'consumption' THEN amount < 0 AND refund_of IS NULL
        AND (balance_after >= 0 AND status = 'completed' OR held IS NOT NULL)
      WHEN 'purchase' THEN amount > 0 AND refund_of IS NULL
      WHEN 'refund' THEN amount < 0 AND refund_of IS NOT NULL AND status = 'completed'
      WHEN 'grant' THEN amount > 0 AND status = 'completed'
      ELSE amount <> 0 AND refund_of IS NOT NULL AND status = 'completed' END)"""
HELD_RULE = """CHECK (CASE WHEN held IS NULL THEN capture_limit IS NULL
      ELSE type = 'consumption' AND held > 0 AND expires_at IS NOT NULL END)"""

TYPE_RULE_BEFORE = """CHECK (CASE type
      WHEN 'consumption' THEN amount < 0 AND balance_after >= 0 AND refund_of IS NULL AND status = 'completed'
      WHEN 'purchase' THEN amount > 0 AND refund_of IS NULL
      WHEN 'refund' THEN amount < 0 AND refund_of IS NOT NULL AND status = 'completed'
      ELSE amount > 0 AND status = 'completed' END)"""

PAID_RULE = """CHECK (
      num_nonnulls(stripe_session_id, stripe_payment_intent_id, stripe_price_id, amount_paid, currency) = 0
      OR type = 'purchase' AND (amount_paid IS NULL) = (currency IS NULL)
        AND amount_paid >= 0 AND currency ~ '^[a-z]{{3}}$')"""

APPEND_ONLY_BEFORE = before.APPEND_ONLY.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION", 1)

APPEND_ONLY = """
CREATE OR REPLACE FUNCTION tallystick.append_only() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  fault text;
BEGIN
  IF TG_OP <> 'UPDATE' THEN
    fault := lower(TG_OP);
  ELSIF (NEW.id, NEW.user_id, NEW.type, NEW.refund_of, NEW.idempotency_key, NEW.created_at, NEW.held,
         NEW.expires_after)
      IS DISTINCT FROM
      (OLD.id, OLD.user_id, OLD.type, OLD.refund_of, OLD.idempotency_key, OLD.created_at, OLD.held,
       OLD.expires_after) THEN
    fault := 'a change of what the row is about';
  ELSIF (NEW.amount, NEW.started_amount) IS DISTINCT FROM (OLD.amount, OLD.started_amount)
      -- a buyer may have chosen how many; that is known when it is paid, as what a hold is charged for when captured
      AND (OLD.status = 'completed' OR NEW.status <> 'completed') THEN
    fault := 'a change of amount but for completing a purchase or a hold';
  ELSIF NEW.expires_at IS DISTINCT FROM OLD.expires_at
      -- bought credits last from the moment at which they are paid
      AND (OLD.expires_at IS NOT NULL OR OLD.status = 'completed' OR NEW.status <> 'completed') THEN
    fault := 'a change of when it expires';
  ELSIF NEW.capture_limit IS DISTINCT FROM OLD.capture_limit
      AND NOT (OLD.status <> 'completed' AND NEW.status = 'failed' AND NEW.capture_limit = 0) THEN
    fault := 'a change of capture_limit but for releasing the hold';
  ELSIF NEW.workshop_id IS DISTINCT FROM OLD.workshop_id
      -- the foreign key's ON DELETE SET NULL runs inside a trigger of the workshops table
      AND (NEW.workshop_id IS NOT NULL OR pg_trigger_depth() < 2) THEN
    fault := 'a change of workshop_id';
  ELSIF (OLD.stripe_session_id IS NOT NULL AND NEW.stripe_session_id IS DISTINCT FROM OLD.stripe_session_id)
      OR (OLD.stripe_payment_intent_id IS NOT NULL
        AND NEW.stripe_payment_intent_id IS DISTINCT FROM OLD.stripe_payment_intent_id)
      OR (OLD.stripe_price_id IS NOT NULL AND NEW.stripe_price_id IS DISTINCT FROM OLD.stripe_price_id)
      OR (OLD.amount_paid IS NOT NULL AND NEW.amount_paid IS DISTINCT FROM OLD.amount_paid)
      OR (OLD.currency IS NOT NULL AND NEW.currency IS DISTINCT FROM OLD.currency) THEN
    fault := 'a change of what Stripe said';
  ELSIF NEW.status = OLD.status THEN
    IF (NEW.balance_after, NEW.sequence, NEW.completed_at, NEW.description)
        IS DISTINCT FROM (OLD.balance_after, OLD.sequence, OLD.completed_at, OLD.description) THEN
      fault := 'a change without a step of its status';
    END IF;
  ELSIF (OLD.status::text, NEW.status::text)
      NOT IN (('pending', 'completed'), ('pending', 'failed'), ('failed', 'completed')) THEN
    fault := format('the step from %s to %s', OLD.status, NEW.status);
  END IF;
  IF fault IS NULL THEN
    RETURN NEW;
  END IF;
  RAISE EXCEPTION 'credit_transactions is append-only: % is refused', fault
    USING ERRCODE = 'restrict_violation',
      HINT = 'Correct a mistake with a further row, such as a refund. History is never edited.';
END $$
"""

# Roles that were granted the ledger get its new objects, as by ``tallystick migrate sql --role``.
SAME_CALLERS = """
DO $body$
DECLARE
  command text;
BEGIN
  FOR command IN
    WITH callers AS (
      SELECT DISTINCT a.grantee AS role FROM pg_proc p, aclexplode(p.proacl) a
      WHERE p.pronamespace = 'tallystick'::regnamespace AND p.proname = 'consume'
        AND a.privilege_type = 'EXECUTE' AND a.grantee NOT IN (0, p.proowner)
    )
    SELECT format('GRANT EXECUTE ON FUNCTION %s TO %I', p.oid::regprocedure, r.rolname)
      FROM callers JOIN pg_roles r ON r.oid = callers.role, pg_proc p
      WHERE p.pronamespace = 'tallystick'::regnamespace AND p.prosecdef
        AND p.proname NOT IN ('follow_balance')
        AND NOT EXISTS (SELECT FROM aclexplode(p.proacl) a WHERE a.grantee = r.oid)
    {others}
  LOOP
    EXECUTE command;
  END LOOP;
END $body$
"""
SAME_READERS = """
DO $body$
DECLARE
  command text;
BEGIN
  FOR command IN
    SELECT DISTINCT format('GRANT %s TO %I', given, r.rolname)
    FROM pg_proc p CROSS JOIN LATERAL aclexplode(p.proacl) a JOIN pg_roles r ON r.oid = a.grantee,
      unnest(ARRAY['SELECT ON tallystick.lots, tallystick.lot_moves',
        format('SELECT (credit_held, credit_due_at) ON %s', {users}::regclass)]) AS given
    WHERE p.pronamespace = 'tallystick'::regnamespace AND p.proname = 'consume'
      AND a.privilege_type = 'EXECUTE' AND a.grantee NOT IN (0, p.proowner)
  LOOP
    EXECUTE command;
  END LOOP;
END $body$
"""


def prepare(host: Any) -> Iterator[Composable]:
    """New objects and labels: nothing uses them yet."""
    for label in TYPES:
        yield SQL("ALTER TYPE {} ADD VALUE IF NOT EXISTS '" + label + "'").format(_type(host))
    for statement in LOTS:
        yield SQL(statement.strip()).format(user_key_type=host.users.key_column, credits=SQL(host.credits))
    yield from host.other_functions("0001", "0002")


def replaces(host: Any) -> Iterator[Composable]:
    """The functions that read and write the columns of ``locked``."""
    yield SQL(APPEND_ONLY.strip())
    yield from host.changed_functions("0001", "0002")
    yield SQL("REVOKE ALL ON ALL FUNCTIONS IN SCHEMA tallystick FROM PUBLIC")
    yield SQL(SAME_CALLERS.strip()).format(others=SQL(""))


def locks(host: Any) -> tuple[Identifier, ...]:
    """The tables that ``locked`` changes, in the order in which they are locked."""
    return (host.users.name, _ledger(host))


def locked(host: Any) -> Iterator[Composable]:
    """Add the columns and the rules: no scan, no rewrite."""
    users = [
        SQL("ADD COLUMN {} ").format(Identifier(name)) + SQL(definition).format(credits=SQL(host.credits))
        for name, definition in USERS_COLUMNS.items()
        if ("users", name) not in host.adopted
    ]
    if users:
        yield SQL("ALTER TABLE {} ").format(host.users.name) + SQL(", ").join(users)
    ledger = [
        SQL("ADD COLUMN {} ").format(Identifier(name)) + SQL(definition).format(credits=SQL(host.credits))
        for name, definition in LEDGER_COLUMNS.items()
    ]
    rules = [
        SQL("DROP CONSTRAINT credit_transactions_type"),
        SQL("ADD CONSTRAINT credit_transactions_type " + TYPE_RULE + " NOT VALID"),
        SQL("ADD CONSTRAINT credit_transactions_held " + HELD_RULE + " NOT VALID"),
    ]
    yield SQL("ALTER TABLE {} ").format(_ledger(host)) + SQL(", ").join([*ledger, *rules])
    yield SQL("ALTER TYPE tallystick.answer ADD ATTRIBUTE credit_held {}, ADD ATTRIBUTE expires_at timestamptz").format(
        SQL(host.credits)
    )
    yield host.sql(SAME_READERS, users=Literal(host.users.name.as_string(None)))


def indexes(host: Any) -> dict[str, Composable]:
    """Indexes to build concurrently, after the commit: the users whom ``sweep`` looks for."""
    return {
        DUE_INDEX: SQL("CREATE INDEX CONCURRENTLY {} ON {} (credit_due_at) WHERE credit_due_at IS NOT NULL").format(
            Identifier(DUE_INDEX), host.users.name
        )
    }


def validates(host: Any) -> dict[str, Composable]:
    """The rules of the ledger, validated after the commit, beside live traffic."""
    return {
        name: SQL("ALTER TABLE {} VALIDATE CONSTRAINT {}").format(_ledger(host), Identifier(name))
        for name in ("credit_transactions_type", "credit_transactions_held")
    }


def undo_locks(host: Any) -> tuple[Identifier, ...]:
    """The tables that ``undo`` changes, in the order in which they are locked."""
    return locks(host)


def unprepare_locks(_host: Any) -> tuple[Identifier, ...]:
    """The tables that ``unprepare`` drops: all of them ours."""
    return (Identifier("tallystick", "lots"), Identifier("tallystick", "lot_moves"))


def unprepare(host: Any) -> Iterator[Composable]:
    """Undo ``prepare`` alone, before ``locked``: the host's objects are not touched."""
    yield from host.other_functions("0002", "0001")
    yield _drop_lots()


def unreplaces(host: Any) -> Iterator[Composable]:
    """The functions as of revision 0001."""
    yield from host.other_functions("0002", "0001")
    yield from host.changed_functions("0002", "0001")
    yield SQL("REVOKE ALL ON ALL FUNCTIONS IN SCHEMA tallystick FROM PUBLIC")
    yield SQL(SAME_CALLERS.strip()).format(others=SQL(""))
    yield SQL(APPEND_ONLY_BEFORE.strip())


def undo(host: Any) -> Iterator[Composable]:
    """Undo to revision 0001. Removing the types' labels rewrites the ledger: it is empty, or discarded."""
    yield SQL("ALTER TYPE tallystick.answer DROP ATTRIBUTE credit_held, DROP ATTRIBUTE expires_at")
    yield SQL("DROP INDEX IF EXISTS {}").format(Identifier(host.users.schema, DUE_INDEX))
    added = [
        SQL("DROP COLUMN IF EXISTS {}").format(Identifier(n)) for n in USERS_COLUMNS if ("users", n) not in host.adopted
    ]
    if added:
        yield SQL("ALTER TABLE {} ").format(host.users.name) + SQL(", ").join(added)
    if not host.ledger_goes:
        yield from _ledger_before(host)
    yield _drop_lots()


def _ledger(host: Any) -> Identifier:
    return Identifier(host.ledger_schema, "credit_transactions")


def _type(host: Any) -> Identifier:
    return Identifier(host.ledger_schema, "credit_transaction_type")


def _drop_lots() -> Composable:
    return SQL("DROP TABLE tallystick.lots, tallystick.lot_moves")


def _ledger_before(host: Any) -> Iterator[Composable]:
    """The ledger's columns, rules and type as of revision 0001."""
    # a rule keeps the type that it was made with
    rules = ("credit_transactions_type", "credit_transactions_paid", "credit_transactions_held")
    yield SQL("ALTER TABLE {} ").format(_ledger(host)) + SQL(", ").join(
        SQL("DROP CONSTRAINT {}").format(Identifier(name)) for name in rules
    )
    yield SQL("ALTER TYPE {} RENAME TO credit_transaction_type_of_0002").format(_type(host))
    yield SQL("CREATE TYPE {} AS ENUM ('purchase', 'consumption', 'refund', 'grant')").format(_type(host))
    yield (
        SQL("ALTER TABLE {} ALTER COLUMN type TYPE {} USING type::text::{}, ").format(
            _ledger(host), _type(host), _type(host)
        )
        + SQL(", ").join(SQL("DROP COLUMN {}").format(Identifier(name)) for name in LEDGER_COLUMNS)
    )
    yield SQL(
        f"ALTER TABLE {{}} ADD CONSTRAINT credit_transactions_type {TYPE_RULE_BEFORE},"
        f" ADD CONSTRAINT credit_transactions_paid {PAID_RULE}"
    ).format(_ledger(host))
    yield SQL("DROP TYPE {}").format(Identifier(host.ledger_schema, "credit_transaction_type_of_0002"))
