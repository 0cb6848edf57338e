"""SQL for a role that can run the ledger and cannot rewrite it: for an app that does not own its tables.

What it may not do is refused by its privileges, or by triggers of its own. Every operation adds a row and moves a
balance, so the role must be able to do both, and the triggers hold them together: after each statement a balance is
where the user's rows lead, and a completed row is one that its user's balance has reached. What the role finds as one
unbroken chain, with the balance at its end, it leaves as one; so the audit's sums come out whatever the role does.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import sqlalchemy as sa
from psycopg import sql

from tallystick.config import HostMapping
from tallystick.errors import InvalidArgument, MigrationError, shown
from tallystick.schema import (
    BOOKKEEPING_SCHEMA,
    Schema,
    stripe_checkouts,
    stripe_events,
    stripe_failed_deliveries,
    stripe_findings,
    stripe_reconciliations,
    stripe_reversals,
)

_HEAD = """\
-- A role for the app: it can run every operation of the ledger, and not touch history.
-- Run by the owner of the tables, after: tallystick migrate apply
-- The app's own privileges on its tables stay as they are, but for what is named here.
"""

_TAKEN_BACK = """\
-- What the app's role got from the same script without --revoke is taken back.
-- Run by the owner of the tables, before: tallystick migrate undo
"""

_CHECKS = sql.SQL("""\
BEGIN
  IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = {role}) THEN
    RAISE EXCEPTION 'there is no role %', {role} USING HINT = 'Make it first: CREATE ROLE app LOGIN';
  END IF;
  IF EXISTS (
    SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_roles r ON r.rolname = {role}
    WHERE c.oid IN ({tables}) AND (r.rolsuper OR pg_catalog.pg_has_role(r.oid, c.relowner, 'member'))
  ) THEN
    RAISE EXCEPTION 'role % owns the tables or is a superuser, which no privilege limits', {role}
      USING HINT = 'Make another role for the app: CREATE ROLE app LOGIN';
  END IF;
  IF EXISTS (
    SELECT FROM pg_catalog.pg_trigger t WHERE t.tgname = {trigger} AND t.tgrelid = {users}::pg_catalog.regclass
      AND t.tgargs <> pg_catalog.convert_to({role}, pg_catalog.getdatabaseencoding()) || '\\x00'::pg_catalog.bytea
  ) THEN
    RAISE EXCEPTION 'another role runs the ledger already'
      USING HINT = 'Make this one a member of it: GRANT the_other TO this_one. Its members are held to the same';
  END IF;
END""")

# Both run after the statement, so that each sees the ledger's row and the user's, which one statement writes. Who owns
# the table is asked last, and only where something is to be refused: it costs as much as all the rest.

# From where the user stood; one who is new, or has a new key, stood nowhere. All rows behind that place are the
# statement's own, one or a list's, and lead without a gap to the new place, which so is the last row's.
_BALANCE_BY_LEDGER = sql.SQL("""\
DECLARE
  place integer := 0;
  balance bigint := 0;
  follows boolean := true;
  behind record;
BEGIN
  IF TG_OP = 'UPDATE' AND NEW.{key} = OLD.{key} THEN
    place := OLD.credit_sequence;
    balance := OLD.credit_balance;
    IF (place, balance) = (NEW.credit_sequence, NEW.credit_balance) THEN
      RETURN NULL;
    END IF;
  END IF;
  FOR behind IN
    SELECT sequence, amount, balance_after FROM {ledger}
    WHERE user_id = NEW.{key} AND sequence > place ORDER BY sequence
  LOOP
    place := place + 1;
    balance := balance + behind.amount;
    follows := follows AND (place, balance) = (behind.sequence, behind.balance_after);
  END LOOP;
  IF (follows AND (place, balance) = (NEW.credit_sequence, NEW.credit_balance)) IS NOT TRUE THEN
    IF NOT {owned} THEN
      RAISE EXCEPTION 'a balance is what the ledger''s last row says'
        USING ERRCODE = '42501', HINT = 'Change it with an operation of the ledger';
    END IF;
  END IF;
  RETURN NULL;
END""")

# A row at or before its user's place is of the chain that the other trigger looks at, since no number is given twice.
# When it was completed tells balance_at, so it is now: to the minute, for a clock may be set back between the two.
_BALANCE_HAS_MOVED = sql.SQL("""\
BEGIN
  PERFORM FROM {users} WHERE {key} = NEW.user_id AND credit_sequence >= NEW.sequence
    AND NEW.completed_at > statement_timestamp() - interval '1 minute'
    AND NEW.completed_at < clock_timestamp() + interval '1 minute';
  IF NOT FOUND THEN
    IF NOT {owned} THEN
      RAISE EXCEPTION 'a completed row moves its user''s balance, and is dated now'
        USING ERRCODE = '42501', HINT = 'Add it with an operation of the ledger';
    END IF;
  END IF;
  RETURN NULL;
END""")

# Who may drop these triggers is not held by them.
_OWNED = sql.SQL("pg_has_role(current_user, (SELECT relowner FROM pg_class WHERE oid = TG_RELID), 'usage')")

# Of the role and its members. Where the role was dropped to_regrole is null, and nobody is held or stopped.
_TRIGGER = sql.SQL("""\
CREATE OR REPLACE TRIGGER {trigger} AFTER INSERT OR UPDATE OF {columns} ON {table}
  FOR EACH ROW WHEN ({rows}pg_catalog.pg_has_role(current_user, pg_catalog.to_regrole({identifier}), 'usage'))
  EXECUTE FUNCTION {function}({role})""")

# The trigger's argument is there to be read here alone. An address may name no such table any more.
_LIMITED = sa.text("""
    SELECT tgargs FROM pg_catalog.pg_trigger
    WHERE tgname = :trigger AND tgrelid = pg_catalog.to_regclass(:users)
""")

_IS_THERE = sa.text("SELECT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = :role)")

_TRIGGER_NAME = "tallystick_balance_by_ledger"
_FUNCTION_NAME = sql.Identifier(BOOKKEEPING_SCHEMA, "balance_by_ledger")
_ROW_TRIGGER_NAME = "tallystick_balance_has_moved"
_ROW_FUNCTION_NAME = sql.Identifier(BOOKKEEPING_SCHEMA, "balance_has_moved")

_NAME_MAX = 63  # PostgreSQL cuts a longer identifier off, but not the name that a trigger compares

_LEDGER_INSERTS = (
    "id",
    "user_id",
    "type",
    "status",
    "amount",
    "balance_after",
    "sequence",
    "description",
    "workshop_id",
    "refund_of",
    "stripe_price_id",
    "idempotency_key",
    "completed_at",
)
"""What a new row says of itself. When it was made is the server's to say, and what was paid comes later."""

_LEDGER_UPDATES = (
    "status",
    "balance_after",
    "sequence",
    "description",
    "completed_at",
    "stripe_session_id",
    "stripe_payment_intent_id",
    "amount_paid",
    "currency",
)
"""What completing, failing or attaching a session writes; the append-only trigger says when."""


_STRIPES = (
    stripe_events,
    stripe_checkouts,
    stripe_reversals,
    stripe_findings,
    stripe_failed_deliveries,
    stripe_reconciliations,
)
"""What selling through Stripe keeps beside the ledger; nothing is ever deleted there."""


def grant(host: HostMapping, role: str) -> str:
    """A script that gives ``role`` what the ledger and the accounts need, and takes away what could rewrite history.

    ``role`` must exist and neither own the tables nor be a superuser: the script refuses that, and a second role.
    Several roles become members of one.

    Raises:
        InvalidArgument: no role can have that name.
    """
    schema = Schema.of(host)
    to = _role(role)
    users, ledger = _name(schema.users), _name(schema.credit_transactions)
    own = [column.name for column in schema.users.c if column.key not in ("key", "email", "updated_at")]
    tables = [schema.users, schema.credit_transactions, *([schema.workshops] if schema.workshops is not None else [])]
    schemas = sorted({*(str(table.schema) for table in tables), BOOKKEEPING_SCHEMA})
    checks = _CHECKS.format(
        role=sql.Literal(role),
        tables=sql.SQL(", ").join(
            sql.SQL("{}::pg_catalog.regclass").format(sql.Literal(_name(table).as_string())) for table in tables
        ),
        trigger=sql.Literal(_TRIGGER_NAME),
        users=sql.Literal(users.as_string()),
    )
    checked = sql.SQL("DO {}").format(_quoted(checks))
    steps: list[sql.Composable] = [
        checked,
        sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(sql.SQL(", ").join(map(sql.Identifier, schemas)), to),
        sql.SQL("GRANT SELECT ON ALL TABLES IN SCHEMA {} TO {}").format(sql.Identifier(BOOKKEEPING_SCHEMA), to),
        sql.SQL("GRANT INSERT, UPDATE ON {} TO {}").format(sql.SQL(", ").join(map(_name, _STRIPES)), to),
        # ctid tells the ledger's statements whether the row that they locked is the one that they see
        sql.SQL("GRANT SELECT (ctid, {}) ON {} TO {}").format(_columns(schema.users), users, to),
        sql.SQL("GRANT UPDATE ({}) ON {} TO {}").format(_join(own), users, to),
        # a trigger runs as whoever writes, so who may make one can do what the owner can
        sql.SQL("REVOKE TRIGGER ON {} FROM {}").format(
            sql.SQL(", ").join(_name(table) for table in tables if table is not schema.credit_transactions), to
        ),
        sql.SQL("REVOKE ALL ON {} FROM PUBLIC, {}").format(ledger, to),
        sql.SQL("GRANT SELECT, INSERT ({}) ON {} TO {}").format(_join(_LEDGER_INSERTS), ledger, to),
        sql.SQL("GRANT UPDATE ({}) ON {} TO {}").format(_join(_LEDGER_UPDATES), ledger, to),
    ]
    if schema.workshops is not None:
        workshops = _name(schema.workshops)
        marks = _join(["credit_consumed_at", "deleted_at"])
        steps += [
            sql.SQL("GRANT SELECT ({}) ON {} TO {}").format(_columns(schema.workshops), workshops, to),
            sql.SQL("GRANT UPDATE ({}) ON {} TO {}").format(marks, workshops, to),
        ]
    parts = {"users": users, "ledger": ledger, "key": sql.Identifier(schema.users.c.key.name), "owned": _OWNED}
    place = [schema.users.c.key.name, "credit_balance", "credit_sequence"]
    held = {"role": sql.Literal(role), "identifier": sql.Literal(to.as_string())}
    steps += [
        _function(_FUNCTION_NAME, _BALANCE_BY_LEDGER.format(**parts)),
        _TRIGGER.format(
            trigger=sql.Identifier(_TRIGGER_NAME),
            columns=_join(place),
            table=users,
            rows=sql.SQL(""),
            function=_FUNCTION_NAME,
            **held,
        ),
    ]
    more = [
        checked,  # psql goes on after a transaction that was refused
        _function(_ROW_FUNCTION_NAME, _BALANCE_HAS_MOVED.format(**parts)),
        _TRIGGER.format(
            trigger=sql.Identifier(_ROW_TRIGGER_NAME),
            columns=_join(["sequence"]),
            table=ledger,
            rows=sql.SQL("NEW.sequence IS NOT NULL AND "),
            function=_ROW_FUNCTION_NAME,
            **held,
        ),
    ]
    return _script(_HEAD, steps, more)


def revoke(host: HostMapping, role: str) -> str:
    """A script that takes back what :func:`grant` gave; needed before ``tallystick migrate undo``.

    What :func:`grant` took is not given back: the ledger to everybody, TRIGGER on the host's tables to ``role``.
    """
    schema = Schema.of(host)
    to = _role(role)
    users, ledger = _name(schema.users), _name(schema.credit_transactions)
    own = [column.name for column in schema.users.c if column.key not in ("key", "email", "updated_at")]
    return _script(
        _TAKEN_BACK,
        [
            sql.SQL("DROP TRIGGER IF EXISTS {} ON {}").format(sql.Identifier(_ROW_TRIGGER_NAME), ledger),
            sql.SQL("DROP FUNCTION IF EXISTS {}()").format(_ROW_FUNCTION_NAME),
        ],
        [
            sql.SQL("DROP TRIGGER IF EXISTS {} ON {}").format(sql.Identifier(_TRIGGER_NAME), users),
            sql.SQL("DROP FUNCTION IF EXISTS {}()").format(_FUNCTION_NAME),
            sql.SQL("REVOKE ALL ON {} FROM {}").format(ledger, to),
            sql.SQL("REVOKE UPDATE ({}) ON {} FROM {}").format(_join(own), users, to),
            sql.SQL("REVOKE ALL ON ALL TABLES IN SCHEMA {} FROM {}").format(sql.Identifier(BOOKKEEPING_SCHEMA), to),
            sql.SQL("REVOKE ALL ON SCHEMA {} FROM {}").format(sql.Identifier(BOOKKEEPING_SCHEMA), to),
        ],
    )


def refuse_limited(conn: sa.Connection, host: HostMapping) -> None:
    """Refuse to go on while a role is limited by :func:`grant`: its triggers need the ledger.

    Raises:
        MigrationError: names the role, and the command that takes its part back.
    """
    schema = Schema.of(host)
    users, ledger = _name(schema.users).as_string(), _name(schema.credit_transactions).as_string()
    arguments = conn.scalar(_LIMITED, {"trigger": _TRIGGER_NAME, "users": users})
    if arguments is None:
        return
    role = bytes(arguments).rstrip(b"\0").decode()
    if conn.scalar(_IS_THERE, {"role": role}):
        raise MigrationError(
            f"the role {role} runs the ledger with privileges of its own. Nothing was changed. Take them back, as the "
            f"owner of the tables: tallystick migrate sql --role {shlex.quote(role)} --revoke | "
            'psql "$DATABASE_URL", then run this again'
        )
    raise MigrationError(
        f"the role {role} ran the ledger and is gone, but not its triggers. Nothing was changed. As the owner of the "
        f"tables: DROP TRIGGER {_TRIGGER_NAME} ON {users}; DROP TRIGGER IF EXISTS {_ROW_TRIGGER_NAME} ON {ledger}; "
        f"DROP FUNCTION IF EXISTS {_FUNCTION_NAME.as_string()}(), {_ROW_FUNCTION_NAME.as_string()}(); then run this "
        "again"
    )


def _role(name: str) -> sql.Identifier:
    length = len(name.encode(errors="surrogatepass"))
    if not 1 <= length <= _NAME_MAX or "\0" in name or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise InvalidArgument(
            f"role={shown(name)} is no name of a role: 1 to {_NAME_MAX} bytes of text. List them with: \\du in psql",
            argument="role",
            value=name,
        )
    return sql.Identifier(name)


def _name(table: sa.Table) -> sql.Identifier:
    return sql.Identifier(str(table.schema), table.name)


def _columns(table: sa.Table) -> sql.Composed:
    return _join([column.name for column in table.c])


def _quoted(body: sql.Composable) -> sql.Composable:
    """Between dollars that no name in it contains, so that none can end it."""
    text, tag = body.as_string(), "$$"
    while tag in text:
        tag = f"${tag.strip('$')}q$"
    return sql.SQL(f"{tag} {text} {tag}")  # of composed parts


def _join(names: list[str] | tuple[str, ...]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, names))


def _function(name: sql.Identifier, body: sql.Composable) -> sql.Composed:
    # A session keeps its plan, and must not keep one that was good while the tables were small.
    return sql.SQL(
        "CREATE OR REPLACE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql\n"
        "SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS {}"
    ).format(name, _quoted(body))


def _script(head: str, *transactions: Sequence[sql.Composable]) -> str:
    """One transaction for each table that a trigger locks: with two locks at once it could deadlock with the app."""
    return head + "".join(
        "\nBEGIN;\n" + "".join(f"{step.as_string()};\n" for step in steps) + "COMMIT;\n" for steps in transactions
    )
