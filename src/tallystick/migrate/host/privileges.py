"""Privileges: revokes default privileges on new objects, and finds roles that could write credits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from psycopg.sql import SQL, Composable
from psycopg.sql import Literal as SqlLiteral

from tallystick.config import HostMapping
from tallystick.declared_tables import user_columns
from tallystick.migrate.host.preflight import Host
from tallystick.migrate.host.tables import quoted
from tallystick.migrate.revisions import HostNames, do_block

_OBJECTS = SQL("""
    SELECT c.oid, CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END AS kind, c.oid::regclass::text AS name,
           c.relowner AS owner, c.relacl AS acl
    FROM pg_class c WHERE c.relkind IN ('r', 'v', 'm', 'S', 'p')
      AND (c.relnamespace = to_regnamespace('tallystick') OR c.oid = to_regclass({ledger}))
    UNION ALL
    SELECT p.oid, 'ROUTINE', p.oid::regprocedure::text, p.proowner, coalesce(p.proacl, acldefault('f', p.proowner))
    FROM pg_proc p WHERE p.pronamespace = to_regnamespace('tallystick')
    UNION ALL
    SELECT n.oid, 'SCHEMA', quote_ident(n.nspname), n.nspowner, n.nspacl
    FROM pg_namespace n WHERE n.nspname = 'tallystick'
""")


def remember_objects(names: HostNames) -> Composable:
    """Record the existing objects, for ``close_new_objects``."""
    return SQL(
        "SELECT set_config('tallystick.objects', coalesce(jsonb_agg(o.oid), '[]')::text, true) FROM ({objects}) o"
    ).format(objects=_objects(names))


def close_new_objects(names: HostNames) -> Composable:
    """Revoke all privileges on objects made since ``remember_objects`` from all roles but the owner.

    Default privileges, such as Supabase's for ``anon`` and ``authenticated``, may have granted them. Privileges on
    older objects stay.
    """
    body = SQL("""
DECLARE
  command text;
BEGIN
  FOR command IN
    SELECT format('REVOKE ALL ON %s %s FROM %s', o.kind, string_agg(DISTINCT o.name, ', '),
                  CASE WHEN r.oid IS NULL THEN 'PUBLIC' ELSE quote_ident(r.rolname) END)
    FROM ({objects}) o CROSS JOIN LATERAL aclexplode(o.acl) a LEFT JOIN pg_roles r ON r.oid = a.grantee
    WHERE a.grantee <> o.owner AND NOT current_setting('tallystick.objects')::jsonb @> jsonb_build_array(o.oid)
    GROUP BY o.kind, r.oid, r.rolname
  LOOP
    EXECUTE command;
  END LOOP;
END""").format(objects=_objects(names))
    return do_block(body)


def _objects(names: HostNames) -> Composable:
    return _OBJECTS.format(ledger=SqlLiteral(names.ledger.as_string()))


# The app's own roles are those with an explicit grant on the ledger.
_APPS = sa.text("""
    SELECT DISTINCT a.grantee::bigint FROM pg_proc p CROSS JOIN LATERAL aclexplode(p.proacl) a
    JOIN pg_roles r ON r.oid = a.grantee AND r.rolname NOT IN ('anon', 'authenticated')
    WHERE p.pronamespace = to_regnamespace('tallystick') AND a.grantee <> p.proowner
""")

# A privilege on a table is one on each of its columns, and one on a column is enough to set a balance. A view of these
# columns is written with its owner's rights, past row level security too.
_WRITERS = sa.text("""
    WITH RECURSIVE shown (oid, attnum, attname) AS (
      SELECT t.attrelid, t.attnum, t.attname FROM pg_attribute t
      WHERE t.attrelid = :ledger AND t.attnum > 0 OR (t.attrelid = :users
        AND t.attname IN (:balance, 'credit_sequence', 'credit_held', 'credit_due_at'))
      UNION
      -- in a view, perhaps under another name: a column is passed over if it has the name of another one of the table
      SELECT t.attrelid, t.attnum, t.attname FROM shown s
      JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = s.oid AND d.refobjsubid = s.attnum
      JOIN pg_rewrite w ON d.classid = 'pg_rewrite'::regclass AND w.oid = d.objid AND w.ev_class <> s.oid
      JOIN pg_attribute t ON t.attrelid = w.ev_class AND t.attnum > 0
      WHERE t.attname = s.attname
        OR NOT EXISTS (SELECT FROM pg_attribute b WHERE b.attrelid = s.oid AND b.attname = t.attname)
    ), given AS (
      SELECT c.oid AS table, c.relowner AS owner, a.grantee, a.privilege_type AS privilege
      FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) a
      WHERE c.oid IN (:users, :ledger)
         OR (c.relnamespace = to_regnamespace('tallystick') AND c.relkind IN ('r', 'p'))
      UNION
      SELECT c.oid, c.relowner, a.grantee, a.privilege_type
      FROM pg_class c JOIN pg_attribute t ON t.attrelid = c.oid AND NOT t.attisdropped
      CROSS JOIN LATERAL aclexplode(t.attacl) a
      WHERE c.oid = :ledger
         OR (c.oid = :users AND t.attname IN (:balance, 'credit_sequence', 'credit_held', 'credit_due_at'))
      UNION
      SELECT c.oid, c.relowner, a.grantee, a.privilege_type
      FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) a
      WHERE c.relkind = 'v' AND a.privilege_type IN ('INSERT', 'UPDATE')
        AND pg_relation_is_updatable(c.oid, false) & CASE a.privilege_type WHEN 'UPDATE' THEN 4 ELSE 8 END <> 0
        AND NOT EXISTS (SELECT FROM pg_options_to_table(c.reloptions) o
                        WHERE o.option_name = 'security_invoker' AND o.option_value::boolean)
        AND c.oid IN (SELECT s.oid FROM shown s)
    )
    SELECT g.table::bigint AS oid, n.nspname AS schema, c.relname AS name, coalesce(r.rolname, 'PUBLIC') AS role,
           r.oid IS NULL AS everyone, array_agg(g.privilege ORDER BY g.privilege) AS privileges
    FROM given g JOIN pg_class c ON c.oid = g.table JOIN pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN pg_roles r ON r.oid = g.grantee
    WHERE g.grantee <> g.owner AND NOT coalesce(r.rolsuper, false)
      AND (r.oid IS NULL OR NOT pg_has_role(r.oid, g.owner, 'USAGE'))
      AND NOT EXISTS (SELECT FROM unnest(CAST(:apps AS oid[])) app WHERE pg_has_role(r.oid, app, 'USAGE'))
      AND g.privilege = ANY (CASE WHEN g.table = :users THEN '{INSERT,UPDATE}'::text[]
                                  ELSE '{INSERT,UPDATE,DELETE,TRUNCATE,TRIGGER}' END)
    GROUP BY g.table, n.nspname, c.relname, r.oid, r.rolname ORDER BY n.nspname, c.relname, r.rolname
""")

_READERS = sa.text("""
    SELECT coalesce(r.rolname, 'PUBLIC') AS role, r.oid IS NULL AS everyone,
           array_agg(DISTINCT p.polname::text) AS policies
    FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee
    JOIN pg_policy p ON p.polrelid = c.oid AND p.polcmd IN ('r', '*') AND p.polpermissive
      AND EXISTS (SELECT FROM unnest(p.polroles) named WHERE named = 0 OR named = a.grantee
                  OR (a.grantee <> 0 AND named <> 0 AND pg_has_role(a.grantee, named, 'USAGE')))
    WHERE c.oid = :users AND c.relrowsecurity AND a.privilege_type = 'SELECT' AND a.grantee <> c.relowner
      AND NOT coalesce(r.rolsuper OR r.rolbypassrls, false)
      AND a.grantee <> ALL (CAST(:apps AS oid[]))
      AND position(CAST(:key AS text) IN pg_get_expr(p.polqual, p.polrelid)) = 0
    GROUP BY r.oid, r.rolname ORDER BY r.rolname
""")


@dataclass(frozen=True)
class Writer:
    """A role other than the owner and the app's that may write ``table``; ``remedy`` is the SQL that revokes it."""

    table: str
    role: str
    privileges: tuple[str, ...]
    remedy: str


def writers(conn: sa.Connection, host: Host, mapping: HostMapping, ledger: int | None) -> Iterator[Writer]:
    """Roles that could write the ledger, its bookkeeping or a balance without the functions."""
    own = _own_columns(conn, host, mapping)
    values = {"users": host.users.oid, "ledger": ledger, "apps": _apps(conn), "balance": host.balance}
    for row in conn.execute(_WRITERS, values):
        table, role = quoted(row.schema, row.name), "PUBLIC" if row.everyone else quoted(row.role)
        remedy = _narrower(row.privileges, table, role, own if row.oid == host.users.oid else "")
        yield Writer(f"{row.schema}.{row.name}", row.role, tuple(row.privileges), remedy)


def open_policies(conn: sa.Connection, host: Host, mapping: HostMapping) -> Iterator[str]:
    """Policies on the users that show other users' billing columns, one sentence each."""
    own, key = _own_columns(conn, host, mapping), mapping.users.key
    table = host.users.quoted
    billing = f"{host.balance}, {mapping.users.stripe_customer_id} and plan_tier"
    for row in conn.execute(_READERS, {"users": host.users.oid, "key": key, "apps": _apps(conn)}):
        role = "PUBLIC" if row.everyone else quoted(row.role)
        yield (
            f"{row.role} may read {billing} of other people: the policy {' and '.join(row.policies)} of "
            f"{host.users.shown} does not ask whose row it is ({key}). If that is not meant: "
            f"{_narrower(['SELECT'], table, role, own)}"
        )


_FORCED = sa.text("""
    SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS name, quote_ident(r.rolname) AS role
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN pg_class l ON l.oid = CAST(:ledger AS oid)
    JOIN pg_roles r ON r.oid = l.relowner OR (l.oid IS NULL AND r.rolname = current_user)
    WHERE c.oid = ANY (CAST(:tables AS oid[])) AND c.relrowsecurity AND c.relforcerowsecurity
      AND NOT r.rolsuper AND NOT r.rolbypassrls ORDER BY 1
""")


def forced_policies(conn: sa.Connection, host: Host, ledger: int | None) -> Iterator[str]:
    """Mapped tables whose policies bind the role that the ledger's functions run as, one sentence each.

    ``ledger`` is None before the migration: the functions will belong to the role that applies it.
    """
    tables = [table.oid for table in host.tables]
    for row in conn.execute(_FORCED, {"tables": tables, "ledger": ledger}):
        yield (
            f"row level security is forced on {row.name}, so it binds {row.role}, which the ledger's functions run as: "
            "a user or workshop that its policies hide is unknown to them. Let the owner run: "
            f"ALTER TABLE {row.name} NO FORCE ROW LEVEL SECURITY, or an administrator: ALTER ROLE {row.role} BYPASSRLS"
        )


def _apps(conn: sa.Connection) -> list[int]:
    return list(conn.scalars(_APPS))


def _narrower(privileges: Sequence[str], table: str, role: str, columns: str) -> str:
    """SQL that revokes privileges on a table, and grants them on some columns."""
    taken = f"REVOKE {', '.join(privileges)} ON {table} FROM {role}"
    given = ", ".join(f"{privilege} ({columns})" for privilege in privileges)
    return f"{taken}; GRANT {given} ON {table} TO {role}" if columns else taken


def _own_columns(conn: sa.Connection, host: Host, mapping: HostMapping) -> str:
    """The app's own columns, for a GRANT, without its balances and other billing columns."""
    theirs = {name for word, name in host.adopted if word == "users"} & {"updated_at", "deleted_at"}
    ours = {column.name for column in user_columns(mapping) if column.key not in theirs}
    names = conn.scalars(_COLUMNS, {"table": host.users.oid})
    return ", ".join(quoted(name) for name in names if name not in ours)


_COLUMNS = sa.text("""
    SELECT attname FROM pg_attribute
    WHERE attrelid = CAST(:table AS oid) AND attnum > 0 AND NOT attisdropped AND attgenerated = '' ORDER BY attnum
""")
