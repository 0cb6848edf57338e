"""People change: a user's key may change, two accounts may become one, personal text may be erased.

An expansion: old code keeps working.

Frozen in time: literal DDL, nothing imported from today's code; ``host`` as in revision 0001.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psycopg.sql import SQL, Composable, Identifier

from tallystick.migrate.versions import v0002_holds_and_lots as before

revision = "0004"
down_revision = "0003"
kind = "expand"

LOW_BALANCES = Identifier("tallystick", "low_balances")
# AFTER ROW triggers fire in the order of their names, and this one must fire before the foreign key's, which is named
# RI_ConstraintTrigger_a_…. As a BEFORE trigger it would also refuse a delete that the app's own trigger makes a soft
# one.
DELETION = "A_tallystick_buyer_stays"

columns: dict[str, tuple[str, ...]] = {}
creates: tuple[str, ...] = ()

BUYER_STAYS = """
CREATE FUNCTION tallystick.buyer_stays() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path} AS $$
BEGIN
  IF EXISTS (SELECT FROM {ledger} AS t WHERE t.user_id = OLD.{user_key}) THEN
    RAISE EXCEPTION 'user % has credit transactions, and history stays', OLD.{user_key}
      USING ERRCODE = 'foreign_key_violation', SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME,
        HINT = format(
          'To close the account: SELECT * FROM tallystick.delete_user(%1$L). To remove its personal text too: '
          'SELECT * FROM tallystick.erase(%1$L). To move its credits to another user first: tallystick.merge.',
          OLD.{user_key});
  END IF;
  RETURN NULL;
END $$
"""

APPEND_ONLY = """
CREATE OR REPLACE FUNCTION tallystick.append_only() RETURNS trigger LANGUAGE plpgsql
SET search_path = {search_path} AS $$
DECLARE
  fault text;
BEGIN
  IF TG_OP <> 'UPDATE' THEN
    fault := lower(TG_OP);
  ELSIF (NEW.id, NEW.type, NEW.refund_of, NEW.created_at, NEW.held, NEW.expires_after)
      IS DISTINCT FROM
      (OLD.id, OLD.type, OLD.refund_of, OLD.created_at, OLD.held, OLD.expires_after) THEN
    fault := 'a change of what the row is about';
  ELSIF NEW.user_id IS DISTINCT FROM OLD.user_id
      -- the foreign key's ON UPDATE CASCADE: the old key is nobody's any more
      AND EXISTS (SELECT FROM {users} AS u WHERE u.{user_key} = OLD.user_id) THEN
    fault := 'a change of what the row is about';
  ELSIF NEW.idempotency_key IS DISTINCT FROM OLD.idempotency_key
      -- erased: of calls that a deleted user is refused anyway
      AND (NEW.idempotency_key IS DISTINCT FROM 'tallystick:erased:' || OLD.id OR NEW.description <> 'Erased'
        OR OLD.refund_of IS NOT NULL OR OLD.type::text NOT IN ('purchase', 'consumption', 'grant')) THEN
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
    IF (NEW.balance_after, NEW.sequence, NEW.completed_at) IS DISTINCT FROM
        (OLD.balance_after, OLD.sequence, OLD.completed_at)
        OR NEW.description NOT IN (OLD.description, 'Erased') THEN
      fault := 'a change without a step of its status';
    END IF;
  ELSIF (OLD.status::text, NEW.status::text)
      NOT IN (('pending', 'completed'), ('pending', 'failed'), ('failed', 'completed')) THEN
    fault := format('the step from %s to %s', OLD.status, NEW.status);
  END IF;
  IF fault IS NULL THEN
    IF NEW.user_id::text <> OLD.user_id::text THEN  -- of citext also where the case alone changes
      UPDATE tallystick.lots AS l SET user_id = NEW.user_id WHERE l.id = NEW.id;
    END IF;
    RETURN NEW;
  END IF;
  RAISE EXCEPTION 'credit_transactions is append-only: % is refused', fault
    USING ERRCODE = 'restrict_violation',
      HINT = 'Correct a mistake with a further row, such as a refund. History is never edited.';
END $$
"""


def prepare(host: Any) -> Iterator[Composable]:
    """New functions and a label: nothing uses them yet."""
    yield SQL("ALTER TYPE {} ADD VALUE IF NOT EXISTS 'transfer'").format(
        Identifier(host.ledger_schema, "credit_transaction_type")
    )
    yield from host.other_functions("0003", "0004")


def replaces(host: Any) -> Iterator[Composable]:
    """The functions that take a changed key into account."""
    yield host.sql(APPEND_ONLY, **host.placeholders())
    yield from host.changed_functions("0003", "0004")
    yield SQL(before.SAME_CALLERS.strip()).format(others=SQL(""))
    yield host.sql(BUYER_STAYS, **host.placeholders())
    yield SQL("REVOKE ALL ON FUNCTION tallystick.buyer_stays() FROM PUBLIC")


def locks(host: Any) -> tuple[Identifier, ...]:
    """The tables that ``locked`` changes, in the order in which they are locked."""
    return (host.users.name, LOW_BALANCES)


def locked(host: Any) -> Iterator[Composable]:
    """Let a user's threshold follow a change of its key; refuse to delete a buyer, with the remedy."""
    # validated at once: it has only a row for each user with a threshold of their own
    yield SQL(
        "ALTER TABLE {} ADD CONSTRAINT low_balances_user_fk"
        " FOREIGN KEY (user_id) REFERENCES {} ({}) ON UPDATE CASCADE ON DELETE CASCADE"
    ).format(LOW_BALANCES, host.users.name, host.users.key)
    yield SQL("CREATE TRIGGER {} AFTER DELETE ON {} FOR EACH ROW EXECUTE FUNCTION tallystick.buyer_stays()").format(
        Identifier(DELETION), host.users.name
    )


def indexes(_host: Any) -> dict[str, Composable]:
    """None."""
    return {}


def validates(_host: Any) -> dict[str, Composable]:
    """Nothing."""
    return {}


def undo_locks(host: Any) -> tuple[Identifier, ...]:
    """The tables that ``undo`` changes, in the order in which they are locked."""
    return locks(host)


def unprepare_locks(_host: Any) -> tuple[Identifier, ...]:
    """None: ``unprepare`` only drops functions."""
    return ()


def unprepare(host: Any) -> Iterator[Composable]:
    """Undo ``prepare`` alone, before ``locked``. The label stays: PostgreSQL cannot remove one from a type."""
    yield from host.other_functions("0004", "0003")


def unreplaces(host: Any) -> Iterator[Composable]:
    """The functions as of revision 0003."""
    yield SQL(before.APPEND_ONLY.strip())
    yield from host.changed_functions("0004", "0003")


def undo(host: Any) -> Iterator[Composable]:
    """Undo to revision 0003."""
    yield SQL("DROP TRIGGER IF EXISTS {} ON {}").format(Identifier(DELETION), host.users.name)
    yield SQL("DROP FUNCTION tallystick.buyer_stays()")
    yield SQL("ALTER TABLE {} DROP CONSTRAINT low_balances_user_fk").format(LOW_BALANCES)
    yield from unprepare(host)
