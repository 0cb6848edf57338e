"""Grants, and what Stripe said: a fourth type of credit transaction, and the bookkeeping of events and reversals.

An expansion: old code keeps working, it merely never meets a grant it made itself. Frozen in time, as 0001.

The new label is added in the transaction and used only after it, as PostgreSQL demands: so the changed rule about
``refund_of`` speaks of the types that are not the new one. That rule is weaker than the one it replaces; it is
added NOT VALID and validated afterwards, since a scan under the lock would stall every purchase.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psycopg.sql import SQL, Composable, Identifier

revision = "0002"
down_revision = "0001"
kind = "expand"
creates: tuple[str, ...] = ()  # nothing in the host's schema

BOOKKEEPING = {
    "stripe_events": """
CREATE TABLE tallystick.stripe_events (
  id text NOT NULL,
  type text NOT NULL,
  object_id text NOT NULL,
  received_at timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT stripe_events_pkey PRIMARY KEY (id)
)""",
    "stripe_checkouts": """
CREATE TABLE tallystick.stripe_checkouts (
  purchase_id uuid NOT NULL,
  pack text,
  amount bigint NOT NULL,
  currency char(3) NOT NULL,
  rounding text NOT NULL DEFAULT 'down',
  request jsonb,
  created_at timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT stripe_checkouts_pkey PRIMARY KEY (purchase_id),
  CONSTRAINT stripe_checkouts_rounding CHECK (rounding IN ('down', 'nearest', 'up'))
)""",
    "stripe_reversals": """
CREATE TABLE tallystick.stripe_reversals (
  id text NOT NULL,
  kind text NOT NULL,
  stripe_payment_intent_id text NOT NULL,
  amount bigint NOT NULL,
  currency char(3) NOT NULL,
  charge_amount bigint,
  credits bigint,
  status text NOT NULL,
  status_rank smallint NOT NULL,
  applied text NOT NULL DEFAULT 'none',
  seen_at timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT stripe_reversals_pkey PRIMARY KEY (id),
  CONSTRAINT stripe_reversals_kind CHECK (kind IN ('refund', 'dispute')),
  CONSTRAINT stripe_reversals_applied CHECK (applied IN ('none', 'share', 'marked'))
)""",
    "stripe_findings": """
CREATE TABLE tallystick.stripe_findings (
  kind text NOT NULL,
  object_id text NOT NULL,
  purchase_id uuid,
  expected text,
  found text,
  seen_at timestamptz NOT NULL DEFAULT now(),
  dismissed_at timestamptz,
  CONSTRAINT stripe_findings_pkey PRIMARY KEY (kind, object_id)
)""",
    "stripe_failed_deliveries": """
CREATE TABLE tallystick.stripe_failed_deliveries (
  event_id text NOT NULL,
  type text NOT NULL,
  object_type text NOT NULL,
  object_id text NOT NULL,
  reason text NOT NULL,
  attempts integer NOT NULL DEFAULT 1,
  first_at timestamptz NOT NULL DEFAULT now(),
  last_at timestamptz NOT NULL DEFAULT now(),
  resolved_at timestamptz,
  CONSTRAINT stripe_failed_deliveries_pkey PRIMARY KEY (event_id)
)""",
    "stripe_reconciliations": """
CREATE TABLE tallystick.stripe_reconciliations (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  since timestamptz,
  stage text NOT NULL,
  position text,
  report jsonb NOT NULL DEFAULT '{}',
  started_at timestamptz NOT NULL DEFAULT now(),
  finished_at timestamptz
)""",
}
BOOKKEEPING_INDEXES = (
    # what is to be taken from or given back to a purchase
    "CREATE INDEX stripe_reversals_payment_intent ON tallystick.stripe_reversals (stripe_payment_intent_id)",
)

OLD_REFUND_OF = "CHECK ((type = 'refund') = (refund_of IS NOT NULL))"
NEW_REFUND_OF = (
    "CHECK (CASE type WHEN 'refund' THEN refund_of IS NOT NULL"
    " WHEN 'purchase' THEN refund_of IS NULL WHEN 'consumption' THEN refund_of IS NULL ELSE true END)"
)


def prepare(host: Any) -> Iterator[Composable]:
    """New objects, and the new label: nothing here touches a table of the host."""
    # IF NOT EXISTS: undo leaves the label where it was
    yield SQL("ALTER TYPE {} ADD VALUE IF NOT EXISTS 'grant'").format(
        Identifier(host.users.schema, "credit_transaction_type")
    )
    for statement in (*BOOKKEEPING.values(), *BOOKKEEPING_INDEXES):
        yield SQL(statement.strip())


def locks(host: Any) -> tuple[Identifier, ...]:
    """The ledger alone; the host's tables stay untouched."""
    return (_ledger(host),)


def locked(host: Any) -> Iterator[Composable]:
    """A grant may name the purchase whose credits it gives back."""
    yield _replace_rule(host, NEW_REFUND_OF)


def indexes(_host: Any) -> dict[str, Composable]:
    """None on the host's tables."""
    return {}


def validates(host: Any) -> dict[str, Composable]:
    """The rule that :func:`locked` left unchecked on old rows."""
    name = Identifier("credit_transactions_refund_of")
    return {"credit_transactions_refund_of": SQL("ALTER TABLE {} VALIDATE CONSTRAINT {}").format(_ledger(host), name)}


def undo_locks(host: Any) -> tuple[Identifier, ...]:
    """The ledger, then what is dropped."""
    return (_ledger(host), *unprepare_locks(host))


def unprepare_locks(_host: Any) -> tuple[Identifier, ...]:
    """What :func:`unprepare` drops."""
    return tuple(Identifier("tallystick", name) for name in BOOKKEEPING)


def unprepare(_host: Any) -> Iterator[Composable]:
    """Back from :func:`prepare` alone, before :func:`locked`; the label stays, as in :func:`undo`."""
    yield _drop_bookkeeping()


def undo(host: Any) -> Iterator[Composable]:
    """Back to 0001, except for the label.

    PostgreSQL cannot drop a label, and making the type anew would rewrite the ledger under its lock. Undoing 0001, in
    the same transaction, drops the whole type. Should a later package stop at 0001, the label is one that nobody
    writes, and a second 0002 finds it in place.
    """
    yield _replace_rule(host, OLD_REFUND_OF)
    yield _drop_bookkeeping()


def _drop_bookkeeping() -> Composable:
    return SQL("DROP TABLE {}").format(SQL(", ").join(Identifier("tallystick", name) for name in BOOKKEEPING))


def _replace_rule(host: Any, rule: str) -> Composable:
    return SQL(
        "ALTER TABLE {} DROP CONSTRAINT credit_transactions_refund_of, "
        "ADD CONSTRAINT credit_transactions_refund_of {} NOT VALID"
    ).format(_ledger(host), SQL(rule))


def _ledger(host: Any) -> Identifier:
    return Identifier(host.users.schema, "credit_transactions")
