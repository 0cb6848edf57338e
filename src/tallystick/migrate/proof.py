"""Writes to the app's tables within the transaction that changes them, each taken back at once.

What such a write runs is the app's own: triggers, rules, checks. It is tried when the tables are locked and again
when they are changed. A write that went through before and fails afterwards ends the transaction, so nothing of the
app's can break by a commit. One that fails both times is the app's own refusal.
"""

from __future__ import annotations

from collections.abc import Sequence

from psycopg.sql import SQL, Composable, Composed
from psycopg.sql import Literal as SqlLiteral

from tallystick.migrate.revisions import TableNames

BROKEN = "TS004"
"""SQLSTATE of a write that fails because of the change."""

# Statement by statement, with its name. A copy of a row gets as far as the unique key, behind triggers BEFORE INSERT;
# a deletion is not tried, since it may go on to any number of other tables. SQL functions are checked as if they were
# created now, without being run.
_WRITES = """
    WITH mapped AS (
      SELECT t.name::regclass AS name, t.key FROM (VALUES {tables}) t (name, key)
    ), written AS (
      SELECT m.name, m.key, string_agg(quote_ident(a.attname), ', ') AS list,
             string_agg(format('%1$I = %1$I', a.attname), ', ') AS same
      FROM mapped m JOIN pg_attribute a ON a.attrelid = m.name
      WHERE a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' AND a.attidentity <> 'a'
      GROUP BY m.name, m.key
    ), one AS (
      SELECT *, format('%1$s = (SELECT %1$s FROM %2$s ORDER BY %1$s LIMIT 1)', key, name) AS row FROM written
    )
    SELECT format('an UPDATE of a row of %s', name) AS what, format('UPDATE %s SET %s WHERE %s', name, same, row) AS sql
    FROM one
    UNION ALL
    SELECT format('an INSERT into %s', name),
           format('INSERT INTO %1$s (%2$s) SELECT %2$s FROM %1$s WHERE %3$s', name, list, row)
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

_TRIED = SQL(
    """
DECLARE
  before jsonb := coalesce(nullif(current_setting('tallystick.writes', true), ''), '{{}}');
  outcomes jsonb := '{{}}';
  one record;
  state text;
  said text;
  place text;
BEGIN
  FOR one IN"""
    + _WRITES
    + """  LOOP
    BEGIN
      PERFORM set_config('enable_seqscan', 'off', true), set_config('check_function_bodies', 'on', true);
      EXECUTE one.sql;
      SET CONSTRAINTS ALL IMMEDIATE;
      RAISE EXCEPTION 'taken back';
    EXCEPTION WHEN OTHERS THEN
      GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, said = MESSAGE_TEXT, place = PG_EXCEPTION_CONTEXT;
      IF state IN ('55P03', '40P01') THEN
        RAISE;
      END IF;
      IF state = 'P0001' AND said = 'taken back' THEN
        state := 'done';
      END IF;
    END;
    IF {changed} AND before ->> one.what IN ('done', '23505') AND state NOT IN ('done', '23505')
        AND state NOT LIKE 'TS%' THEN
      RAISE EXCEPTION '% fails with the columns changed: %', one.what, said
        USING ERRCODE = {broken}, DETAIL = split_part(place, E'\\n', 1);
    END IF;
    outcomes := outcomes || jsonb_build_object(one.what, state);
  END LOOP;
  PERFORM set_config('tallystick.writes', outcomes::text, true);
END"""
)


def writes(tables: Sequence[TableNames], *, changed: bool, inserts: bool = True) -> Composable:
    """A block that tries to write to ``tables``: before they are changed, or with ``changed`` afterwards."""
    body = _TRIED.format(
        tables=SQL(", ").join(
            SQL("({}, {})").format(*(SqlLiteral(each.as_string(None)) for each in (table.name, table.key)))
            for table in tables
        ),
        inserts=SqlLiteral(inserts),
        changed=SqlLiteral(changed),
        broken=SqlLiteral(BROKEN),
    )
    return Composed([SQL("DO "), SqlLiteral(body.as_string(None))])
