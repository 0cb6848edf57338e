"""Trial writes to the app's tables within the transaction that changes them, each rolled back at once.

They run the app's own triggers, rules and checks, before the tables are locked and again after they are changed. A
write that succeeds before and fails afterwards ends the transaction, so a commit cannot break the app's code. A write
that fails both times is the app's own refusal. A try is a subtransaction, which keeps no lock when it is rolled back.
"""

from __future__ import annotations

from collections.abc import Sequence

from psycopg.sql import SQL, Composable
from psycopg.sql import Literal as SqlLiteral

from tallystick.migrate.revisions import TableNames, do_block

BROKEN = "TS004"
"""SQLSTATE of a write that fails because of the change."""

# A copy of a row runs BEFORE INSERT triggers and fails at the unique key. It has the row's identity too, which is given
# and not taken from a sequence: that would go on, since nextval is never rolled back. A deletion is not tried, since it
# may cascade to any number of other tables. SQL functions are checked as at their creation, without being run.
_TRIES = """
    WITH mapped AS (
      SELECT t.name::regclass AS name, t.key FROM (VALUES {tables}) t (name, key)
    ), written AS (
      SELECT m.name, m.key, string_agg(quote_ident(a.attname), ', ') AS list,
             string_agg(format('%1$I = %1$I', a.attname), ', ') FILTER (WHERE a.attidentity <> 'a') AS same
      FROM mapped m JOIN pg_attribute a ON a.attrelid = m.name
      WHERE a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' AND a.attname <> ALL ({ours})
      GROUP BY m.name, m.key
    ), one AS (
      SELECT *, format('ctid OPERATOR(pg_catalog.=) (SELECT ctid FROM %2$s ORDER BY %1$s LIMIT 1', key, name) AS row
      FROM written
    )
    SELECT format('an UPDATE of a row of %s', name) AS what,
           format('UPDATE %s SET %s WHERE %s FOR UPDATE SKIP LOCKED)', name, same, row) AS try
    FROM one WHERE same IS NOT NULL
    UNION ALL
    SELECT format('an INSERT into %s', name),
           format('INSERT INTO %1$s (%2$s) OVERRIDING SYSTEM VALUE SELECT %2$s FROM %1$s WHERE %3$s)', name, list, row)
    FROM one WHERE {inserts}
    UNION ALL
    SELECT format('the function %s', p.oid::regprocedure), format('SELECT fmgr_sql_validator(%s)', p.oid)
    FROM pg_proc p
    WHERE p.prolang = (SELECT oid FROM pg_language WHERE lanname = 'sql')
      AND p.pronamespace <> 'pg_catalog'::regnamespace AND EXISTS (
        SELECT FROM mapped m JOIN pg_class c ON c.oid = m.name
        WHERE c.reltype = p.prorettype OR c.reltype = ANY (p.proargtypes)
          OR (p.prosrc ~ '[*]' AND position(c.relname::text IN p.prosrc) > 0)
      )
"""

_TRIED = """
DECLARE
  tried jsonb := '[]';
  -- functions of the app's find its tables by the path that its sessions begin with
  path text := (
    SELECT s.reset_val FROM pg_catalog.pg_settings s WHERE s.name OPERATOR(pg_catalog.=) 'search_path');
  one record;
  state text;
  message text;
  context text;
BEGIN
  FOR one IN {source} LOOP
    BEGIN
      PERFORM set_config('search_path', path, true), set_config('enable_seqscan', 'off', true),
              set_config('jit', 'off', true), set_config('check_function_bodies', 'on', true);
      EXECUTE one.try;
      SET CONSTRAINTS ALL IMMEDIATE;
      RAISE EXCEPTION 'taken back';
    EXCEPTION WHEN OTHERS THEN
      GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT, context = PG_EXCEPTION_CONTEXT;
      IF state IN ('55P03', '40P01') THEN
        RAISE;
      END IF;
      IF message = 'taken back' THEN
        state := '00000';
      END IF;
    END;
    {each}
  END LOOP;
  {ended}
END"""

# A write succeeded, or reached the unique key.
_THROUGH = "state IN ('00000', '23505')"


def try_writes(tables: Sequence[TableNames], *, without: Sequence[str], inserts: bool = True) -> Composable:
    """A block that tries writes to ``tables``, except for the columns ``without``, and records those that succeed."""
    pairs = (SQL("({}, {})").format(*(SqlLiteral(each.as_string(None)) for each in (t.name, t.key))) for t in tables)
    return _block(
        SQL(_TRIES).format(tables=SQL(", ").join(pairs), inserts=SqlLiteral(inserts), ours=SqlLiteral(list(without))),
        SQL(f"IF {_THROUGH} THEN tried := tried || to_jsonb(one); END IF;"),
        SQL("PERFORM set_config('tallystick.tried', tried::text, true);"),
    )


def try_writes_again() -> Composable:
    """A block that fails if one of the recorded writes fails now."""
    return _block(
        SQL("SELECT * FROM jsonb_to_recordset(current_setting('tallystick.tried')::jsonb) AS t (what text, try text)"),
        # a refusal by the ledger's own rules is not the app's fault
        SQL(
            f"IF NOT ({_THROUGH} OR state LIKE 'TS%') THEN"
            " RAISE EXCEPTION '% fails with the columns changed: %', one.what, message"
            f" USING ERRCODE = '{BROKEN}', DETAIL = split_part(context, E'\\n', 1); END IF;"
        ),
        SQL(""),
    )


def _block(source: Composable, each: Composable, ended: Composable) -> Composable:
    return do_block(SQL(_TRIED).format(source=source, each=each, ended=ended))
