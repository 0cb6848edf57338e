"""Credits: the ledger and its functions, the columns on the host's tables, the bookkeeping.

An expansion: old code keeps working.

Frozen in time: literal DDL, nothing imported from today's code. ``host`` has the names of the host's tables, columns
and key types, and the ledger's functions as of this revision (see ``tallystick.migrate.revisions.HostNames``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psycopg.sql import SQL, Composable, Identifier, Literal

revision = "0001"
down_revision = None
kind = "expand"

USERS_COLUMNS = {
    "credit_balance": "{credits} NOT NULL DEFAULT 0",
    "credit_sequence": "integer NOT NULL DEFAULT 0",
    "onboarding_complete": "boolean NOT NULL DEFAULT false",
    "stripe_customer_id": "text",
    "plan_tier": "varchar(32) NOT NULL DEFAULT 'free'",
    "updated_at": "timestamptz NOT NULL DEFAULT now()",
    "deleted_at": "timestamptz",
}
WORKSHOPS_COLUMNS = {
    "credit_consumed_at": "timestamptz",
    "deleted_at": "timestamptz",
}
CUSTOMER_INDEX = "tallystick_users_stripe_customer_id"
FOLLOWING = {
    "tallystick_new_balance": "AFTER INSERT ON {users} FOR EACH ROW WHEN (NEW.{balance} < 0 OR NEW.{balance} % 1 <> 0"
    " OR NEW.{balance} > {credits_max})",
    "tallystick_balance": "AFTER UPDATE ON {users} FOR EACH ROW"
    " WHEN (NEW.{balance} IS DISTINCT FROM OLD.{balance} AND NEW.credit_sequence = OLD.credit_sequence)",
}

APPEND_ONLY = """
CREATE FUNCTION tallystick.append_only() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  fault text;
BEGIN
  IF TG_OP <> 'UPDATE' THEN
    fault := lower(TG_OP);
  ELSIF (NEW.id, NEW.user_id, NEW.type, NEW.refund_of, NEW.idempotency_key, NEW.created_at)
      IS DISTINCT FROM
      (OLD.id, OLD.user_id, OLD.type, OLD.refund_of, OLD.idempotency_key, OLD.created_at) THEN
    fault := 'a change of what the row is about';
  ELSIF NEW.amount IS DISTINCT FROM OLD.amount
      -- a buyer may have chosen how many; that is known when it is paid
      AND (OLD.status = 'completed' OR NEW.status <> 'completed') THEN
    fault := 'a change of amount but for completing a purchase';
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

TOUCH_UPDATED_AT = """
CREATE FUNCTION tallystick.touch_updated_at() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  NEW.updated_at := pg_catalog.now();
  RETURN NEW;
END $$
"""

FOLLOW_BALANCE = """
CREATE FUNCTION tallystick.follow_balance() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  account record;
  before {credits};
BEGIN
  IF NEW.{balance_column} % 1 <> 0 THEN
    RAISE EXCEPTION 'credits are whole numbers, and % is none', NEW.{balance_column} USING ERRCODE = 'check_violation';
  ELSIF NEW.{balance_column} < 0
      AND (TG_OP = 'INSERT' OR NEW.{balance_column} < OLD.{balance_column} OR OLD.{balance_column} IS NULL) THEN
    RAISE EXCEPTION 'the balance of user % would be %', NEW.{user_key}, NEW.{balance_column}
      USING ERRCODE = 'check_violation', HINT = 'Credits that are not there are not spent.';
  ELSIF NEW.{balance_column} > {credits_max} THEN
    RAISE EXCEPTION 'the balance of user % would be %', NEW.{user_key}, NEW.{balance_column}
      USING ERRCODE = 'check_violation', HINT = 'The largest balance is {credits_max}.';
  ELSIF NEW.credit_sequence = 0 THEN
    RETURN NULL;  -- the opening balance will be what is there then
  END IF;
  -- what is there now: another trigger may have changed it again, and that is recorded already
  SELECT {balance} AS balance, u.credit_sequence AS sequence INTO account
    FROM {users} AS u WHERE u.{user_key} = NEW.{user_key};
  SELECT t.balance_after INTO before FROM {ledger} AS t
    WHERE t.user_id = NEW.{user_key} AND t.sequence = account.sequence;
  IF account.balance <> before THEN
    INSERT INTO {ledger} (
        id, user_id, type, status, amount, balance_after, sequence, description, idempotency_key, completed_at)
      VALUES (
        tallystick.uuid7(), NEW.{user_key},
        (CASE WHEN account.balance > before THEN 'grant' ELSE 'consumption' END)::{type}, 'completed',
        account.balance - before, account.balance, account.sequence + 1, 'Changed by the app',
        'tallystick:app:' || account.sequence + 1, clock_timestamp());
    IF NOT tallystick.settle(
        NEW.{user_key}, account.balance, account.sequence, account.balance, account.sequence + 1) THEN
      PERFORM tallystick.host_interfered({users_name});
    END IF;
  END IF;
  RETURN NULL;
END $$
"""

LEDGER = """
CREATE TABLE {ledger} (
  id uuid NOT NULL,
  user_id {user_key_type} NOT NULL,
  type {type} NOT NULL,
  status {status} NOT NULL,
  amount {credits} NOT NULL,
  balance_after {credits},
  sequence integer,
  description text NOT NULL,
  workshop_id {workshop_key_type},
  refund_of uuid,
  stripe_session_id text,
  stripe_payment_intent_id text,
  stripe_price_id text,
  amount_paid bigint,
  currency char(3),
  idempotency_key text,
  metadata jsonb,
  created_at timestamptz NOT NULL DEFAULT now(),
  completed_at timestamptz,
  CONSTRAINT credit_transactions_pkey PRIMARY KEY (id),
  CONSTRAINT credit_transactions_refund_fk FOREIGN KEY (refund_of) REFERENCES {ledger} (id),
  -- Three rules and not one for each fact: the server reads their text anew for every row that is written.
  CONSTRAINT credit_transactions_type
    CHECK (CASE type
      WHEN 'consumption' THEN amount < 0 AND balance_after >= 0 AND refund_of IS NULL AND status = 'completed'
      WHEN 'purchase' THEN amount > 0 AND refund_of IS NULL
      WHEN 'refund' THEN amount < 0 AND refund_of IS NOT NULL AND status = 'completed'
      ELSE amount > 0 AND status = 'completed' END),
  CONSTRAINT credit_transactions_status
    CHECK (num_nonnulls(balance_after, sequence, completed_at) = CASE status WHEN 'completed' THEN 3 ELSE 0 END
      AND sequence > 0),
  CONSTRAINT credit_transactions_paid
    CHECK (num_nonnulls(stripe_session_id, stripe_payment_intent_id, stripe_price_id, amount_paid, currency) = 0
      OR type = 'purchase' AND (amount_paid IS NULL) = (currency IS NULL)
        AND amount_paid >= 0 AND currency ~ '^[a-z]{{3}}$')
)
"""

MAPPING = """
CREATE TABLE tallystick.mapping (
  host jsonb NOT NULL,
  stored_at timestamptz NOT NULL DEFAULT now(),
  the_only_row boolean NOT NULL DEFAULT true,
  CONSTRAINT mapping_pkey PRIMARY KEY (the_only_row),
  CONSTRAINT mapping_the_only_row CHECK (the_only_row)
)
"""

NO_WORKSHOPS = """
CREATE TABLE tallystick.workshops (
  key uuid NOT NULL,
  owner {user_key_type},
  credit_consumed_at timestamptz,
  deleted_at timestamptz,
  CONSTRAINT workshops_pkey PRIMARY KEY (key),
  CONSTRAINT workshops_none CHECK (false)
)
"""

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
  stated_at timestamptz NOT NULL DEFAULT now(),
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
    # the reversals of a purchase
    "CREATE INDEX stripe_reversals_payment_intent ON tallystick.stripe_reversals (stripe_payment_intent_id)",
)

UNIQUE, PLAIN = True, False
LEDGER_INDEXES = {
    "credit_transactions_idempotency_key": (UNIQUE, "(user_id, idempotency_key)"),
    "credit_transactions_sequence": (UNIQUE, "(user_id, sequence) WHERE sequence IS NOT NULL"),
    "credit_transactions_unfinished": (PLAIN, "(user_id, status, id) WHERE sequence IS NULL"),
    "credit_transactions_stripe_session": (UNIQUE, "(stripe_session_id) WHERE stripe_session_id IS NOT NULL"),
    "credit_transactions_completed": (PLAIN, "(user_id, completed_at, sequence) WHERE completed_at IS NOT NULL"),
    "credit_transactions_refund_of": (PLAIN, "(refund_of) WHERE refund_of IS NOT NULL"),
    "credit_transactions_pending": (PLAIN, "(created_at) WHERE status = 'pending'"),
    "credit_transactions_workshop": (PLAIN, "(workshop_id) WHERE workshop_id IS NOT NULL"),
    "credit_transactions_payment_intent": (
        PLAIN,
        "(stripe_payment_intent_id) WHERE stripe_payment_intent_id IS NOT NULL",
    ),
}

columns = {"users": tuple(USERS_COLUMNS), "workshops": tuple(WORKSHOPS_COLUMNS)}
creates = (
    "credit_transactions",
    "credit_transactions_pkey",
    *LEDGER_INDEXES,
    CUSTOMER_INDEX,
    "credit_transaction_type",
    "credit_transaction_status",
)


def prepare(host: Any) -> Iterator[Composable]:
    """New objects: nothing here touches a table of the host."""
    yield SQL("CREATE SCHEMA tallystick")
    yield SQL(
        "CREATE TABLE tallystick.alembic_version ("
        "version_num varchar(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
    )
    yield SQL(
        "CREATE TABLE tallystick.migration_log ("
        "id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, "
        "revision text NOT NULL, "
        "direction text NOT NULL, "
        "applied_at timestamptz NOT NULL DEFAULT now(), "
        "adopted jsonb NOT NULL DEFAULT '[]', "
        "attempts integer NOT NULL DEFAULT 1, "
        "locked_ms double precision, "
        "duration_ms double precision, "
        "waited_for jsonb NOT NULL DEFAULT '[]', "
        "kind text NOT NULL DEFAULT 'expand')"
    )
    yield SQL(APPEND_ONLY.strip())
    yield SQL(TOUCH_UPDATED_AT.strip())
    for statement in (MAPPING, *BOOKKEEPING.values(), *BOOKKEEPING_INDEXES):
        yield SQL(statement.strip())
    yield SQL("INSERT INTO tallystick.mapping (host) VALUES ({})").format(Literal(host.mapping))
    if not host.workshops:
        yield SQL(NO_WORKSHOPS.strip()).format(user_key_type=host.users.key_type)
    yield SQL("CREATE TYPE {} AS ENUM ('purchase', 'consumption', 'refund', 'grant')").format(_type(host))
    yield SQL("CREATE TYPE {} AS ENUM ('pending', 'completed', 'failed')").format(_status(host))
    yield SQL(LEDGER.strip()).format(
        ledger=_ledger(host),
        user_key_type=host.users.key_column,
        workshop_key_type=host.workshops.key_column if host.workshops else SQL("uuid"),
        type=_type(host),
        status=_status(host),
        credits=SQL(host.credits),
    )
    for name, (unique, definition) in LEDGER_INDEXES.items():
        yield SQL("CREATE UNIQUE INDEX {} ON {} " if unique else "CREATE INDEX {} ON {} ").format(
            Identifier(name), _ledger(host)
        ) + SQL(definition)
    yield SQL(
        "CREATE TRIGGER tallystick_append_only BEFORE UPDATE OR DELETE ON {}"
        " FOR EACH ROW EXECUTE FUNCTION tallystick.append_only()"
    ).format(_ledger(host))
    yield SQL(
        "CREATE TRIGGER tallystick_no_truncate BEFORE TRUNCATE ON {}"
        " FOR EACH STATEMENT EXECUTE FUNCTION tallystick.append_only()"
    ).format(_ledger(host))
    yield from host.functions("0001")
    if host.adopts_balance:
        yield host.sql(FOLLOW_BALANCE, **host.placeholders())
    yield SQL("REVOKE ALL ON ALL FUNCTIONS IN SCHEMA tallystick FROM PUBLIC")


def locks(host: Any) -> tuple[Identifier, ...]:
    """The tables that ``locked`` changes, in the order in which they are locked."""
    return tuple(table.name for table, _ in _tables(host))


def locked(host: Any) -> Iterator[Composable]:
    """The changes of the host's tables: no scan, no rewrite, one ALTER for each table."""
    for table, columns in _tables(host):
        missing = [
            SQL("ADD COLUMN {} ").format(Identifier(name)) + SQL(definition).format(credits=SQL(host.credits))
            for name, definition in columns.items()
            if (table.word, name) not in host.adopted
        ]
        if missing:
            yield SQL("ALTER TABLE {} ").format(table.name) + SQL(", ").join(missing)
    keys = [
        SQL(
            "ADD CONSTRAINT credit_transactions_user_fk"
            " FOREIGN KEY (user_id) REFERENCES {} ({}) ON UPDATE CASCADE ON DELETE RESTRICT"
        ).format(host.users.name, host.users.key)
    ]
    if host.workshops:
        keys.append(
            SQL(
                "ADD CONSTRAINT credit_transactions_workshop_fk"
                " FOREIGN KEY (workshop_id) REFERENCES {} ({}) ON DELETE SET NULL"
            ).format(host.workshops.name, host.workshops.key)
        )
    yield SQL("ALTER TABLE {} ").format(_ledger(host)) + SQL(", ").join(keys)
    if ("users", "updated_at") not in host.adopted:
        yield SQL(
            "CREATE TRIGGER tallystick_updated_at BEFORE UPDATE ON {}"
            " FOR EACH ROW EXECUTE FUNCTION tallystick.touch_updated_at()"
        ).format(host.users.name)
    if host.adopts_balance:
        # writes of the app's old code are recorded in the ledger too; the ledger's own writes change both
        for name, when in FOLLOWING.items():
            yield (
                SQL("CREATE TRIGGER {} ").format(Identifier(name))
                + SQL(when).format(**host.placeholders() | {"balance": host.users.balance})
                + SQL(" EXECUTE FUNCTION tallystick.follow_balance()")
            )


def indexes(host: Any) -> dict[str, Composable]:
    """Indexes to build concurrently, after the commit; each in the schema of its table."""
    return {
        CUSTOMER_INDEX: SQL(
            "CREATE UNIQUE INDEX CONCURRENTLY {name} ON {users} ({column}) WHERE {column} IS NOT NULL"
        ).format(name=Identifier(CUSTOMER_INDEX), users=host.users.name, column=host.users.stripe_customer_id)
    }


def validates(_host: Any) -> dict[str, Composable]:
    """Nothing: the ledger is empty when its rules are made."""
    return {}


def undo_locks(host: Any) -> tuple[Identifier, ...]:
    """The tables that ``undo`` changes, in the order in which they are locked."""
    return (*locks(host), _ledger(host))


def unprepare_locks(host: Any) -> tuple[Identifier, ...]:
    """The tables that ``unprepare`` drops: all of them ours."""
    return (_ledger(host),)


def unprepare(host: Any) -> Iterator[Composable]:
    """Undo ``prepare`` alone, before ``locked``: the host's objects are not touched."""
    yield from host.drop_functions("0001")
    yield from host.drop_types("0001")
    yield SQL("DROP TABLE {}").format(_ledger(host))
    yield from _drop_the_rest(host)


def unreplaces(host: Any) -> Iterator[Composable]:
    """Drop the functions: nobody sees that before the commit."""
    yield from host.drop_functions("0001")


def undo(host: Any) -> Iterator[Composable]:
    """Undo all: adopted columns stay as they were."""
    if ("users", "updated_at") not in host.adopted:
        yield SQL("DROP TRIGGER IF EXISTS tallystick_updated_at ON {}").format(host.users.name)
    if host.adopts_balance:
        for name in FOLLOWING:
            yield SQL("DROP TRIGGER IF EXISTS {} ON {}").format(Identifier(name), host.users.name)
    yield from host.drop_types("0001")
    yield SQL("DROP TABLE {}").format(_ledger(host))
    yield SQL("DROP INDEX IF EXISTS {}").format(Identifier(host.users.schema, CUSTOMER_INDEX))
    for table, columns in _tables(host):
        added = [
            SQL("DROP COLUMN IF EXISTS {}").format(Identifier(name))
            for name in columns
            if (table.word, name) not in host.adopted
        ]
        if added:
            yield SQL("ALTER TABLE {} ").format(table.name) + SQL(", ").join(added)
    yield from _drop_the_rest(host)


def _drop_the_rest(host: Any) -> Iterator[Composable]:
    yield SQL("DROP TYPE {}, {}").format(_type(host), _status(host))
    yield SQL("DROP FUNCTION tallystick.append_only(), tallystick.touch_updated_at()")
    if host.adopts_balance:
        yield SQL("DROP FUNCTION tallystick.follow_balance()")
    yield SQL("DROP TABLE {}").format(SQL(", ").join(Identifier("tallystick", name) for name in BOOKKEEPING))
    if not host.workshops:
        yield SQL("DROP TABLE tallystick.workshops")
    yield SQL("DROP TABLE tallystick.mapping, tallystick.migration_log, tallystick.alembic_version")
    yield SQL("DROP SCHEMA tallystick")


def _tables(host: Any) -> list[tuple[Any, dict[str, str]]]:
    pairs = ((host.users, USERS_COLUMNS), (host.workshops, WORKSHOPS_COLUMNS))
    return [(table, columns) for table, columns in pairs if table and not table.gone]


def _ledger(host: Any) -> Identifier:
    return Identifier(host.ledger_schema, "credit_transactions")


def _type(host: Any) -> Identifier:
    return Identifier(host.ledger_schema, "credit_transaction_type")


def _status(host: Any) -> Identifier:
    return Identifier(host.ledger_schema, "credit_transaction_status")
