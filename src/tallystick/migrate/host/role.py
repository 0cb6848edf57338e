"""SQL for an app's role that runs the ledger and cannot write a balance: for an app that does not own its tables.

The role gets EXECUTE on the functions of the ledger and SELECT on its rows. Only the functions write
``credit_balance``, ``credit_sequence``, ``credit_held`` and ``credit_due_at`` of users and ``credit_consumed_at`` of
workshops; and the role cannot update the keys of both tables. INSERT and UPDATE on a whole table include these columns,
so the script replaces them by INSERT and UPDATE of all other columns that the table has when it runs. A privilege that
the role has in another way (``ways_out.sql``) is an error with the statement that revokes it, since others may need it.

Privileges belong to a role, not to its name, so a role that is renamed keeps them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files

import sqlalchemy as sa
from psycopg import sql

from tallystick.config import HostMapping
from tallystick.declared_tables import (
    event_dead_letters,
    event_endpoints,
    stripe_checkouts,
    stripe_events,
    stripe_failed_deliveries,
    stripe_findings,
    stripe_reconciliations,
    stripe_reversals,
    user_columns,
    workshop_columns,
)
from tallystick.errors import InvalidArgument, shown
from tallystick.ledger import functions
from tallystick.migrate.revisions import HostNames, TableNames
from tallystick.schema import BOOKKEEPING_SCHEMA

_HEAD = """\
-- A role for the app: it can run every function of the ledger, and writes no balance itself.
-- Run by the owner of the tables, after: tallystick migrate apply
"""

_TAKEN_BACK = """\
-- What the app's role got from the same script without --revoke is taken back. Two things stay as that script made
-- them, since nobody wrote down how they were: USAGE on the schemas of the app's tables, and no TRIGGER on the tables.
-- Run by the owner of the tables.
"""

_BESIDE = (
    event_endpoints,
    event_dead_letters,
    stripe_events,
    stripe_checkouts,
    stripe_reversals,
    stripe_findings,
    stripe_failed_deliveries,
    stripe_reconciliations,
)
"""Tables of event delivery and of sales through Stripe; no row of them is ever deleted."""

_NAME_MAX = 63  # PostgreSQL truncates a longer identifier

_SETTINGS = (
    sql.SQL("SET LOCAL search_path = pg_catalog, pg_temp"),
    sql.SQL("SET LOCAL jit = off"),  # it compiles the search for ways past the functions for seconds
)

_LIMITABLE = sql.SQL("""
DECLARE
  app record;
  others text;
BEGIN
  SELECT oid, rolsuper INTO app FROM pg_roles WHERE rolname = {role};
  IF NOT FOUND THEN
    RAISE EXCEPTION 'there is no role %', {role}
      USING HINT = format('Make it first: CREATE ROLE %I LOGIN', {role});
  END IF;
  IF app.rolsuper OR EXISTS (
    SELECT FROM pg_class AS c WHERE c.oid IN (SELECT oid FROM {tables} AS t (oid, inserts, updates))
      AND pg_has_role(app.oid, c.relowner, 'MEMBER')
  ) THEN
    RAISE EXCEPTION 'role % owns the tables or is a superuser, which no privilege limits', {role}
      USING HINT = 'Make another role for the app: CREATE ROLE app LOGIN';
  END IF;
  SELECT string_agg(DISTINCT format('REVOKE ALL ON %s FROM %s CASCADE', c.oid::regclass, {identifier}), '; ')
    INTO others FROM {tables} AS t (oid, inserts, updates)
    JOIN pg_class AS c ON c.oid = t.oid, aclexplode(c.relacl) AS a
    WHERE a.grantor = app.oid;
  IF others IS NOT NULL THEN
    RAISE EXCEPTION 'role % has passed on its rights on the tables to other roles', {role}
      USING HINT = 'Take them all back, and grant anew what is needed: ' || others;
  END IF;
END""")

_BY_COLUMN = sql.SQL("""
DECLARE
  item record;
BEGIN
  FOR item IN
    SELECT c.oid::regclass AS relation, verb, quoted, whole, array_to_string(ARRAY(
        SELECT quote_ident(a.attname) FROM pg_attribute AS a
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attname::text <> ALL (kept)
        ORDER BY a.attnum), ', ') AS columns
    FROM {tables} AS t (oid, inserts, updates)
    JOIN pg_class AS c ON c.oid = t.oid
    CROSS JOIN LATERAL (VALUES ('INSERT', t.inserts), ('UPDATE', t.updates)) AS v (verb, kept)
    CROSS JOIN LATERAL (SELECT string_agg(quote_ident(k), ', ') AS quoted FROM unnest(kept) AS k) AS q
    CROSS JOIN LATERAL (SELECT EXISTS (
      SELECT FROM aclexplode(c.relacl) AS a JOIN pg_roles AS r ON r.oid = a.grantee
      WHERE r.rolname = {role} AND a.privilege_type = verb) AS whole) AS w
  LOOP
    IF item.whole THEN
      EXECUTE format('REVOKE %s ON %s FROM %s', item.verb, item.relation, {identifier});
      EXECUTE format('GRANT %s (%s) ON %s TO %s', item.verb, item.columns, item.relation, {identifier});
      RAISE NOTICE '% on % is now for these columns: %', item.verb, item.relation, item.columns
        USING HINT = format('A column that the app adds later needs: GRANT %s (that_column) ON %s TO %s',
          item.verb, item.relation, {identifier});
    ELSE
      EXECUTE format('REVOKE %s (%s) ON %s FROM %s', item.verb, item.quoted, item.relation, {identifier});
    END IF;
  END LOOP;
END""")

# The reverse: a role that may write all columns but the guarded ones had the whole table before.
_RESTORE_TABLE_PRIVILEGES = sql.SQL("""
DECLARE
  item record;
BEGIN
  FOR item IN
    SELECT c.oid::regclass AS relation, verb, quote_ident(r.rolname) AS role,
      string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) AS columns
    FROM {tables} AS t (oid, inserts, updates)
    JOIN pg_class AS c ON c.oid = t.oid
    CROSS JOIN LATERAL (VALUES ('INSERT', t.inserts), ('UPDATE', t.updates)) AS v (verb, kept)
    JOIN pg_roles AS r ON {is_app}
    JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
      AND a.attname::text <> ALL (kept)
    CROSS JOIN LATERAL (SELECT EXISTS (
      SELECT FROM aclexplode(a.attacl) AS x
      WHERE x.grantee = r.oid AND x.privilege_type = verb AND x.grantor = c.relowner) AS held) AS h
    GROUP BY c.oid, verb, r.rolname HAVING bool_and(held)
  LOOP
    EXECUTE format('REVOKE %s (%s) ON %s FROM %s', item.verb, item.columns, item.relation, item.role);
    EXECUTE format('GRANT %s ON %s TO %s', item.verb, item.relation, item.role);
  END LOOP;
END""")

_HELD = sql.SQL("""
DECLARE
  found text;
BEGIN
  SELECT string_agg(format('- it %s. To take that back: %s', w.way, w.remedy), E'\\n') INTO found FROM ({ways}) AS w;
  IF found IS NOT NULL THEN
    RAISE EXCEPTION E'role % can get past the functions of the ledger:\\n%', {role}, found
      USING HINT = 'Nothing was changed. Run what is named, then this script again';
  END IF;
  IF (SELECT r.rolsuper FROM pg_class AS c JOIN pg_roles AS r ON r.oid = c.relowner
      WHERE c.oid = {ledger}::regclass) THEN
    RAISE WARNING 'the owner of the ledger is a superuser: every trigger on the tables runs as it'
      USING HINT = 'Give the tables and the functions to a role of their own';
  END IF;
END""")

_IS_GRANTED = sql.SQL("""r.oid IN (
    SELECT a.grantee FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace, aclexplode(p.proacl) AS a
    WHERE n.nspname = 'tallystick' AND a.grantee NOT IN (0, p.proowner))""")
"""True for a role that was granted the ledger, under whatever present name."""


def grant(host: HostMapping, role: str) -> str:
    """A script that grants ``role`` the functions of the ledger, and revokes privileges to write without them.

    ``role`` must exist and neither own the tables nor be a superuser. If it has other ways to write, the script changes
    nothing, and lists them with the statements that close them.

    Raises:
        InvalidArgument: no role can have that name.
    """
    names, to = HostNames.of(host), _role(role)
    ledger = names.ledger
    schemas = dict.fromkeys(table.schema for table in names.tables)
    everything = sql.SQL("IN SCHEMA {}").format(sql.Identifier(BOOKKEEPING_SCHEMA))
    limited = {
        "role": sql.Literal(role),
        "identifier": sql.Literal(to.as_string()),
        "tables": _tables(names),
        "ledger": sql.Literal(ledger.as_string()),
    }
    return _script(
        _HEAD,
        _do(_LIMITABLE.format(**limited)),
        *(sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(sql.Identifier(schema), to) for schema in schemas),
        sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(sql.Identifier(BOOKKEEPING_SCHEMA), to),
        sql.SQL("REVOKE ALL ON ALL TABLES {} FROM PUBLIC, {}").format(everything, to),
        sql.SQL("REVOKE ALL ON ALL SEQUENCES {} FROM PUBLIC, {}").format(everything, to),
        sql.SQL("GRANT SELECT ON ALL TABLES {} TO {}").format(everything, to),
        sql.SQL("GRANT INSERT, UPDATE ON {} TO {}").format(
            sql.SQL(", ").join(sql.Identifier(BOOKKEEPING_SCHEMA, table.name) for table in _BESIDE), to
        ),
        sql.SQL("REVOKE ALL ON {} FROM PUBLIC, {}").format(ledger, to),
        sql.SQL("GRANT SELECT ON {} TO {}").format(ledger, to),
        *_ours_to_read(host, to, "GRANT", "TO"),
        # a trigger made by the role would run as the owner, inside the functions
        *(sql.SQL("REVOKE TRIGGER ON {} FROM {}").format(table.name, to) for table in names.tables),
        _do(_BY_COLUMN.format(**limited)),
        sql.SQL("REVOKE ALL ON ALL FUNCTIONS {} FROM PUBLIC, {}").format(everything, to),
        *functions.grants(names, to),
        _do(_HELD.format(ways=_ways_out(names, sql.SQL("r.rolname = {}").format(sql.Literal(role))), **limited)),
    )


def revoke(host: HostMapping, role: str) -> str:
    """A script that revokes the privileges of ``grant``, and restores INSERT and UPDATE on whole tables.

    USAGE on the schemas of the app's tables stays, and TRIGGER on the tables is not given back: ``left_behind``.
    ``tallystick migrate undo`` does not need it.
    """
    names, to = HostNames.of(host), _role(role)
    everything = sql.SQL("IN SCHEMA {}").format(sql.Identifier(BOOKKEEPING_SCHEMA))
    return _script(
        _TAKEN_BACK,
        restore_table_privileges(names, sql.SQL("r.rolname = {}").format(sql.Literal(role))),
        *_ours_to_read(host, to, "REVOKE", "FROM"),
        sql.SQL("REVOKE ALL ON {} FROM {}").format(names.ledger, to),
        sql.SQL("REVOKE ALL ON ALL TABLES {} FROM {}").format(everything, to),
        sql.SQL("REVOKE ALL ON ALL FUNCTIONS {} FROM {}").format(everything, to),
        sql.SQL("REVOKE ALL ON SCHEMA {} FROM {}").format(sql.Identifier(BOOKKEEPING_SCHEMA), to),
    )


def restore_table_privileges(names: HostNames, is_app: sql.Composable = _IS_GRANTED) -> sql.Composable:
    """Restore INSERT and UPDATE on whole tables for the roles that were granted the ledger, before it is dropped."""
    return _do(_RESTORE_TABLE_PRIVILEGES.format(tables=_tables(names), is_app=is_app))


def granted_roles(conn: sa.Connection) -> tuple[str, ...]:
    """The roles that were granted the ledger, by name."""
    query = sql.SQL("SELECT r.rolname FROM pg_roles AS r WHERE {} ORDER BY 1").format(_IS_GRANTED)
    return tuple(conn.scalars(sa.text(query.as_string())))


def left_behind(host: HostMapping, role: str) -> str:
    """The statements that take back what ``grant`` gave a role and nothing else does, and give back what it took."""
    tables = HostNames.of(host).tables
    return "; ".join(
        sql.SQL(text).format(name, _role(role)).as_string()
        for text, names in (
            ("REVOKE USAGE ON SCHEMA {} FROM {}", [sql.Identifier(s) for s in dict.fromkeys(t.schema for t in tables)]),
            ("GRANT TRIGGER ON {} TO {}", [sql.SQL(", ").join(table.name for table in tables)]),
        )
        for name in names
    )


def ways_out(conn: sa.Connection, host: HostMapping) -> Iterator[tuple[str, str, str]]:
    """The ways of granted roles to write without the functions: (role, way, remedy)."""
    query = _ways_out(HostNames.of(host), _IS_GRANTED).as_string()
    # SQLAlchemy takes a colon before a word for a parameter
    for row in conn.execute(sa.text(re.sub(r"(?<!:):(?=\w)", r"\\:", query))):
        yield row.role, row.way, row.remedy


def _ways_out(names: HostNames, is_app: sql.Composable) -> sql.Composable:
    text = (files(__package__) / "ways_out.sql").read_text("utf-8")
    schemas = {table.schema for table in names.tables} | {"public"}
    return sql.SQL(text.strip()).format(
        is_app=is_app,
        tables=_tables(names),
        schemas=sql.Literal(sorted(schemas)),
        ledger=sql.Literal(names.ledger.as_string()),
    )


def _guarded(table: TableNames) -> list[str]:
    """The columns that only the functions write."""
    return (
        [_bare(table.balance), "credit_sequence", "credit_held", "credit_due_at"]
        if table.word == "users"
        else ["credit_consumed_at"]
    )


def _tables(names: HostNames) -> sql.Composable:
    """The mapped tables as rows (oid, columns without INSERT, columns without UPDATE)."""
    rows = [
        sql.SQL("({}::regclass::oid, {}::text[], {}::text[])").format(
            sql.Literal(table.name.as_string()),
            sql.Literal(_guarded(table)),
            sql.Literal([_bare(table.key), *_guarded(table)]),
        )
        for table in names.tables
    ]
    return sql.SQL("(VALUES {})").format(sql.SQL(", ").join(rows))


def _ours_to_read(host: HostMapping, to: sql.Identifier, verb: str, preposition: str) -> Iterator[sql.Composable]:
    columns = {"users": user_columns(host), "workshops": workshop_columns(host)}
    for table in HostNames.of(host).tables:
        ours = sql.SQL(", ").join(sql.Identifier(column.name) for column in columns[table.word])
        yield sql.SQL(f"{verb} SELECT ({{}}) ON {{}} {preposition} {{}}").format(
            ours, table.name, to
        )  # all of it is our own text


def _bare(name: sql.Identifier) -> str:
    return name.as_string()[1:-1].replace('""', '"')


def _role(name: str) -> sql.Identifier:
    length = len(name.encode(errors="surrogatepass"))
    if not 1 <= length <= _NAME_MAX or "\0" in name or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise InvalidArgument(
            f"role={shown(name)} is no name of a role: 1 to {_NAME_MAX} bytes of text. List them with: \\du in psql",
            argument="role",
            value=name,
        )
    return sql.Identifier(name)


def _do(body: sql.Composable) -> sql.Composable:
    """A DO block, quoted by a dollar tag that no name in it contains, so that none can end it."""
    text, tag = body.as_string(), "$$"
    while tag in text:
        tag = f"${tag.strip('$')}q$"
    return sql.SQL(f"DO {tag}{{}}\n{tag}").format(body)


def _script(head: str, *steps: sql.Composable) -> str:
    """One transaction, with a search_path in which no other role can create objects."""
    return f"{head}\nBEGIN;\n" + "".join(f"{step.as_string()};\n" for step in (*_SETTINGS, *steps)) + "COMMIT;\n"
