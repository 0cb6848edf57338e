"""The app's own objects that depend on its tables' columns: on all of them as a row, or on those that undo drops.

A function's body is only text in the catalogue. It is searched for the known ways to copy a whole row; the run itself
finds others by writing to the tables before its commit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import sqlalchemy as sa
from psycopg.sql import SQL, Composable
from psycopg.sql import Literal as SqlLiteral

from tallystick.migrate.revisions import TableNames, do_block

# Tables with a column of the row type, an array or domain of it, or a composite type that contains one.
_ROW_COLUMNS = sa.text("""
    WITH RECURSIVE shaped AS (
      SELECT t.oid, c.oid AS source FROM pg_class c JOIN pg_type t ON t.oid = c.reltype
      WHERE c.oid = ANY (CAST(:tables AS oid[]))
      UNION
      SELECT made.oid, s.source FROM shaped s CROSS JOIN LATERAL (
        SELECT typarray FROM pg_type WHERE pg_type.oid = s.oid AND typarray <> 0
        UNION ALL SELECT pg_type.oid FROM pg_type WHERE typbasetype = s.oid
        UNION ALL SELECT c.reltype FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid AND c.relkind = 'c'
        WHERE a.atttypid = s.oid AND NOT a.attisdropped
      ) made (oid)
    )
    SELECT s.source::regclass::text AS table, c.oid::regclass::text AS other, a.attname AS column
    FROM shaped s JOIN pg_attribute a ON a.atttypid = s.oid AND NOT a.attisdropped
    JOIN pg_class c ON c.oid = a.attrelid AND c.relkind IN ('r', 'm', 'p')
    ORDER BY 1, 2, 3
""")

_FUNCTIONS = sa.text("""
    SELECT p.oid::regprocedure::text AS name, l.lanname AS language,
           coalesce(pg_get_function_sqlbody(p.oid), p.prosrc) AS body,
           pg_get_function_sqlbody(p.oid) IS NOT NULL AS atomic,
           p.prorettype IN (SELECT reltype FROM pg_class WHERE oid = ANY (CAST(:tables AS oid[]))) AS gives_rows,
           p.proargmodes && '{o,t,b}'::"char"[] AS gives_columns,
           coalesce(t.triggers, '{}') AS triggers
    FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang JOIN pg_namespace n ON n.oid = p.pronamespace
    -- once for all functions: pg_trigger has no index for one function's, and four rows for each foreign key
    LEFT JOIN (
      SELECT tgfoid, array_agg(format('%s on %s', tgname, tgrelid::regclass) ORDER BY tgname, tgrelid) AS triggers
      FROM pg_trigger WHERE NOT tgisinternal AND tgenabled <> 'D' AND tgrelid = ANY (CAST(:tables AS oid[]))
      GROUP BY tgfoid
    ) t ON t.tgfoid = p.oid
    WHERE l.lanname IN ('sql', 'plpgsql') AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'tallystick')
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid
                      AND d.deptype = 'e')
    ORDER BY 1
""")

# DROP COLUMN silently drops indexes, checks and statistics too, and refuses all else, one at a time.
_ON_COLUMNS = SQL("""
DECLARE
  found text;
BEGIN
  SELECT string_agg(DISTINCT pg_describe_object(d.classid, d.objid, 0), ', ') INTO found
  FROM pg_depend d JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
  JOIN (VALUES {columns}) ours (name, columns)
    ON a.attrelid = to_regclass(ours.name) AND a.attname::text = ANY (ours.columns::text[])
  LEFT JOIN pg_class c ON d.classid = 'pg_class'::regclass AND c.oid = d.objid
  LEFT JOIN pg_constraint k ON d.classid = 'pg_constraint'::regclass AND k.oid = d.objid
  LEFT JOIN pg_trigger t ON d.classid = 'pg_trigger'::regclass AND t.oid = d.objid
  WHERE d.refclassid = 'pg_class'::regclass AND d.deptype IN ('n', 'a') AND d.classid <> 'pg_attrdef'::regclass
    AND coalesce(c.relname, k.conname, t.tgname, '') NOT LIKE 'tallystick\\_%' AND c.relkind IS DISTINCT FROM 'S'
    AND k.contype IS DISTINCT FROM 'n';
  IF found IS NOT NULL THEN
    RAISE EXCEPTION '%', found USING ERRCODE = {code};
  END IF;
END""")

DEPENDED_ON = "TS005"
"""SQLSTATE of an undo that would drop objects of the app."""


def refuse_dependents(columns: Iterable[tuple[TableNames, list[str]]]) -> Composable:
    """A block that fails if objects of the app depend on columns that are to be dropped, and names them."""
    rows = (
        SQL("({}, {})").format(SqlLiteral(table.name.as_string(None)), SqlLiteral(names)) for table, names in columns
    )
    return do_block(_ON_COLUMNS.format(columns=SQL(", ").join(rows), code=SqlLiteral(DEPENDED_ON)))


_COMMENT = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)
_ROW = r"(?:ROW\s*)?\(?\s*(?:NEW|OLD)\s*(?:\.\s*\*)?\s*\)?"
_COMPARISON = re.compile(rf"{_ROW}\s*(?:IS\s+(?:NOT\s+)?DISTINCT\s+FROM|=|<>|!=)\s*{_ROW}", re.IGNORECASE)
_COPIES_NEW = re.compile(
    r"\bINSERT\s+INTO\b[^;]*?(?:\b(?:NEW|OLD)\b\s*\)?|\(\s*\$\d+\s*\))\s*\.\s*\*", re.IGNORECASE | re.DOTALL
)
_LISTED = re.compile(r"\b(?:SELECT(?:\s+DISTINCT)?|RETURNING)\s+(?P<list>[^;]*?)(?:\bFROM\b|;|$)", re.IGNORECASE)
_STAR = r"(?:[^;]*?,)?\s*(?:[\w\"$]+\.)?\*"


def breaks_with_more_columns(conn: sa.Connection, tables: Sequence[tuple[int, str, str]]) -> Iterator[str]:
    """Objects that would fail once the tables have more columns, each as a sentence that ends with the remedy.

    ``tables`` are (oid, schema, name).
    """
    oids = [oid for oid, _, _ in tables]
    for row in conn.execute(_ROW_COLUMNS, {"tables": oids}):
        yield (
            f"the column {row.other}.{row.column} holds whole rows of {row.table}, which therefore cannot be given a "
            f"column. Make it another type, such as jsonb, or drop it"
        )
    names = "|".join(rf'(?:"?{re.escape(schema)}"?\s*\.\s*)?"?{re.escape(name)}"?' for _, schema, name in tables)
    of_ours = rf"\bFROM\s+(?:ONLY\s+)?(?:{names})(?![\w$\".])"
    for row in conn.execute(_FUNCTIONS, {"tables": oids}):
        found = _fault(row, of_ours)
        if found is not None:
            what, passage, remedy = found
            where = f", which the trigger {' and '.join(row.triggers)} calls," if row.triggers else ""
            yield f'the function {row.name}{where} {what} ("{_line(passage)}"). {remedy}'


def _fault(row: sa.Row[tuple[object, ...]], of_ours: str) -> tuple[str, str, str] | None:
    body = _COMPARISON.sub(" ", _COMMENT.sub(" ", row.body))
    if row.triggers and (copied := _COPIES_NEW.search(body)):
        return (
            "copies whole rows: it fails for every write once there are further columns",
            copied[0],
            "Name the columns in it, on both sides of the INSERT, or keep to_jsonb(NEW) instead",
        )
    every = re.compile(rf"\bSELECT\s+{_STAR}[^;]*?{of_ours}", re.IGNORECASE | re.DOTALL)
    copied = re.search(rf"\bINSERT\s+INTO\b[^;]*?{every.pattern}", body, re.IGNORECASE | re.DOTALL)
    united = re.search(
        rf"{every.pattern}[^;]*?\bUNION\b[^;]*|\bUNION\b[^;]*?{every.pattern}", body, re.IGNORECASE | re.DOTALL
    )
    if copied or united:
        return (
            "takes every column of a table that gets further ones, and then fails",
            (copied or united)[0],  # type: ignore[index]  # one of them is there
            "Name the columns in it",
        )
    given = _given(body, row.language)
    if row.gives_columns and (star := next((one for one in given if every.match(one)), None)):
        return (
            "gives every column of a table that gets further ones, while its own are fixed, and then fails",
            star,
            "Name the columns in it",
        )
    if row.gives_rows and (listed := next((one for one in given if _lists_columns(one)), None)):
        return (
            "lists the columns of rows that get further ones, and then fails",
            listed,
            # a parsed body keeps the columns that * had when it was made
            (
                "Select a whole row as one value there, as in SELECT u FROM users u (in BEGIN ATOMIC, * stays the "
                "columns that the table has now), or let it return a TABLE of the columns"
                if row.atomic
                else "Select * there, or let it return a TABLE of the columns"
            ),
        )
    return None


def _given(body: str, language: str) -> list[str]:
    """The queries whose rows a function returns."""
    if language == "plpgsql":
        return [found[1] for found in re.finditer(r"\bRETURN\s+QUERY\s+(SELECT\b[^;]*)", body, re.IGNORECASE)]
    body = re.sub(r"^\s*BEGIN\s+ATOMIC\b|\bEND\s*;?\s*$", "", body.strip(), flags=re.IGNORECASE)
    last = [part for part in body.split(";") if part.strip()][-1:]
    found = (re.search(r"\b(?:SELECT|RETURNING)\b.*", part, re.IGNORECASE | re.DOTALL) for part in last)
    return [query[0] for query in found if query]


def _lists_columns(query: str) -> bool:
    found = _LISTED.match(query)
    return found is not None and "," in found["list"] and not re.match(_STAR, found["list"])


def _line(passage: str) -> str:
    line = " ".join(passage.split())
    return line if len(line) <= 120 else f"{line[:119]}…"  # noqa: PLR2004  # to fit in a sentence
