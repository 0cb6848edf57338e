"""Widening a key from integer to bigint after the migration: first in the ledger, then in the app's own tables.

The ledger's columns and functions have the type of the key. A larger type also holds the smaller key, but not the other
way round, so the ledger is changed before the app's own tables. These are the steps:

1. All tables briefly locked: triggers replace the foreign keys to the app's table. Changing a column would also
   recreate its foreign key, and lock the app's table against readers until the column is rewritten.
2. The ledger alone locked: its columns are rewritten, its types and functions changed.
3. All tables briefly locked: the foreign keys are added NOT VALID, and the triggers dropped.
4. Beside live traffic: the foreign keys are validated.

If the second step fails, a run still takes the third and fourth. If a run is killed, the next one continues it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import sqlalchemy as sa
from psycopg.sql import SQL, Composable, Identifier, Literal

from tallystick.config import HostMapping, Word
from tallystick.errors import MigrationError, TallystickError
from tallystick.ledger import functions
from tallystick.migrate.host.preflight import adopted_columns, current_revision
from tallystick.migrate.host.privileges import close_new_objects, remember_objects
from tallystick.migrate.revisions import HostNames, do_block, revisions
from tallystick.migrate.runner.online import Building, OnlineStep, is_validated, validate
from tallystick.migrate.runner.session import engine_of, lost, send_when_free, session, single_run
from tallystick.schema import LEDGER, mapping_of

_SMALLER = ("smallint", "integer")
_NAMED: dict[Word, list[str]] = {"users": ["user_id", "owner"], "workshops": ["workshop_id"]}
STAND_INS: dict[Word, str] = {"users": "widening_users", "workshops": "widening_workshops"}
"""The functions of the triggers that replace the foreign keys meanwhile."""
KEYS = frozenset(("credit_transactions_user_fk", "low_balances_user_fk", "credit_transactions_workshop_fk"))
"""The foreign keys to the app's tables, which ``apply`` validates if a run has not."""
_UPDATED, _DELETED = Identifier("A_tallystick_widening_update"), Identifier("A_tallystick_widening_delete")

_BODIES: dict[Word, str] = {
    "users": """
BEGIN
  IF TG_OP = 'UPDATE' THEN
    UPDATE {ledger} AS t SET user_id = NEW.{user_key} WHERE t.user_id {is} OLD.{user_key};
    UPDATE tallystick.low_balances AS l SET user_id = NEW.{user_key} WHERE l.user_id {is} OLD.{user_key};
  ELSE
    -- a user with credit transactions is refused by tallystick.buyer_stays
    DELETE FROM tallystick.low_balances AS l WHERE l.user_id {is} OLD.{user_key};
  END IF;
  RETURN NULL;
END""",
    "workshops": """
BEGIN
  IF TG_OP = 'DELETE' THEN
    UPDATE {ledger} AS t SET workshop_id = NULL WHERE t.workshop_id {is} OLD.{workshop_key};
  ELSIF EXISTS (SELECT FROM {ledger} AS t WHERE t.workshop_id {is} OLD.{workshop_key}) THEN
    RAISE EXCEPTION 'workshop % has credit transactions', OLD.{workshop_key} USING ERRCODE = 'foreign_key_violation';
  END IF;
  RETURN NULL;
END""",
}

_COLUMNS = sa.text("""
    SELECT n.nspname AS schema, c.relname AS table, a.attname AS column, c.relkind = 'c' AS of_type
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE a.attname = ANY (:columns) AND a.atttypid = CAST(:type AS regtype) AND c.relkind IN ('r', 'c')
      AND (n.nspname = 'tallystick' OR n.nspname = :schema AND c.relname = :ledger)
    ORDER BY n.nspname = :schema AND c.relname = :ledger DESC, 1, 2, 3
""")
_INTERRUPTED = sa.text("""
    SELECT proname::text FROM pg_proc
    WHERE pronamespace = to_regnamespace('tallystick') AND proname = ANY (CAST(:names AS text[]))
""")
_OWNER = sa.text("SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = to_regclass(:ledger)")

_REMEMBER_GRANTS = SQL("""
SELECT set_config('tallystick.grants', coalesce(
    jsonb_agg(jsonb_build_object('name', p.proname, 'grantee', a.grantee, 'grantable', a.is_grantable)), '[]')::text,
  true)
FROM pg_proc p CROSS JOIN LATERAL aclexplode(p.proacl) a
WHERE p.pronamespace = 'tallystick'::regnamespace AND a.grantee NOT IN (0, p.proowner)""")

# Our functions have different names. One that was replaced in place still has its grants.
_GIVE_BACK = """
DECLARE
  command text;
BEGIN
  FOR command IN
    SELECT format('ALTER FUNCTION %s OWNER TO %I', p.oid::regprocedure, {owner}) FROM pg_proc p
    WHERE p.pronamespace = 'tallystick'::regnamespace AND pg_get_userbyid(p.proowner) <> {owner}
      AND NOT current_setting('tallystick.objects')::jsonb @> jsonb_build_array(p.oid)
    UNION ALL
    SELECT format('GRANT EXECUTE ON FUNCTION %s TO %I', p.oid::regprocedure, r.rolname)
      || CASE WHEN bool_or(g.grantable) THEN ' WITH GRANT OPTION' ELSE '' END
    FROM jsonb_to_recordset(current_setting('tallystick.grants')::jsonb) AS g (name text, grantee oid, grantable bool)
    JOIN pg_proc p ON p.pronamespace = 'tallystick'::regnamespace AND p.proname = g.name
    JOIN pg_roles r ON r.oid = g.grantee
    WHERE NOT current_setting('tallystick.objects')::jsonb @> jsonb_build_array(p.oid) GROUP BY p.oid, r.rolname
  LOOP
    EXECUTE command;
  END LOOP;
END"""

# Sessions keep plans of functions whose text does not change, such as the triggers', for columns of the old type.
_FORGET_PLANS = """
DECLARE
  command text;
BEGIN
  FOR command IN SELECT pg_get_functiondef(oid) FROM pg_proc
    WHERE pronamespace = 'tallystick'::regnamespace AND prokind = 'f'
  LOOP
    EXECUTE command;
  END LOOP;
END"""


@dataclass(frozen=True)
class Widened:
    """The mapping with the larger key, and Tallystick's columns that have its type now.

    ``rewrite_ms`` is how long the ledger was locked for it, 0 if an earlier run had done it. ``online`` are the foreign
    keys that were validated afterwards.
    """

    host: HostMapping
    columns: tuple[str, ...]
    rewrite_ms: float
    online: tuple[OnlineStep, ...]


@dataclass(frozen=True)
class _ForeignKey:
    name: str
    table: Identifier
    definition: Composable


def widen_key(
    database: sa.Engine | str, word: Word, *, lock_timeout_ms: int = 50, give_up_after_s: float = 60
) -> Widened:
    """Change the ledger to bigint for the key of ``word``, or finish an interrupted run.

    The ledger is rewritten, and its users wait meanwhile. Prepared statements of connections that were open before fail
    afterwards, so the app must renew its connections.

    Raises:
        MigrationError: the key is no smaller integer, or the database is not at this package's revision.
        MigrationBlocked: the tables were never free; names the sessions that held them.
        MigrationRunning: another run is active.
    """
    with session(engine_of(database)) as conn, single_run(conn):
        head = revisions()[-1].revision
        if current_revision(conn) != head:
            raise MigrationError(f"the database is not at revision {head}. Run: tallystick migrate apply")
        if interrupted(conn) not in (None, word):
            refuse_interrupted(conn)
        before = mapping_of(conn)
        table = before.by_word.get(word)
        if table is None:
            raise MigrationError(f"no table of {word} is mapped, so there is no key to widen")
        adopted = adopted_columns(conn)
        run = _Widening(conn, word, HostNames.of(before, adopted), lock_timeout_ms, give_up_after_s)
        if table.key_type in _SMALLER:
            larger: dict[str, Any] = {word: replace(table, key_type="bigint")}
            after = replace(before, **larger)
            try:
                run.open()
                rewrite_ms = run.rewrite(HostNames.of(after, adopted), table.key_type)
            except TallystickError:
                if not lost(conn):
                    run.close()
                raise
        elif run.is_whole():
            raise MigrationError(
                f"the key of {word} is of type {table.key_type}. Only a smallint or integer key can be widened"
            )
        else:
            after, rewrite_ms = before, 0.0
        validated = run.close()
        columns = [f"{row.schema}.{row.table}.{row.column}" for row in run.columns("bigint") if not row.of_type]
        return Widened(after, tuple(columns), round(rewrite_ms, 3), validated)


def interrupted(conn: sa.Connection) -> Word | None:
    """The table on which triggers still replace foreign keys, because a run was interrupted."""
    found = conn.scalar(_INTERRUPTED, {"names": list(STAND_INS.values())})
    return next((word for word, name in STAND_INS.items() if name == found), None)


def refuse_interrupted(conn: sa.Connection) -> None:
    """Raise MigrationError if a run was interrupted, which only ``widen_key`` can finish."""
    if word := interrupted(conn):
        raise MigrationError(
            f"a run of widen-key was ended, and triggers stand in the place of foreign keys to the table of {word}. "
            f"To finish it: tallystick migrate widen-key {word}"
        )


def validate_keys(
    conn: sa.Connection, names: HostNames, progress: Callable[[str, Building | None], None]
) -> Iterator[OnlineStep]:
    """Validate each foreign key to the app's tables that is NOT VALID."""
    words: tuple[Word, ...] = ("users", "workshops")
    for key in (key for word in words for key in _foreign_keys(names, word)):
        statement = SQL("ALTER TABLE {} VALIDATE CONSTRAINT {}").format(key.table, Identifier(key.name))
        yield from validate(
            conn, table=key.table, name=key.name, statement=statement, progress=partial(progress, key.name)
        )


@dataclass(frozen=True)
class _Widening:
    """The steps of a widening, each of which does nothing if it was done already."""

    conn: sa.Connection
    word: Word
    names: HostNames
    lock_timeout_ms: int
    give_up_after_s: float

    @property
    def keys(self) -> list[_ForeignKey]:
        return _foreign_keys(self.names, self.word)

    @property
    def of_app(self) -> Identifier:
        table = self.names.users if self.word == "users" else self.names.workshops
        assert table is not None  # noqa: S101 - widen_key has looked
        return table.name

    @property
    def owner(self) -> str:
        return str(self.conn.scalar(_OWNER, {"ledger": self.names.ledger.as_string(None)}))

    def is_whole(self) -> bool:
        return interrupted(self.conn) is None and all(is_validated(self.conn, key.table, key.name) for key in self.keys)

    def columns(self, key_type: str) -> Sequence[Any]:
        """The columns of tables and types that hold the key and have that type."""
        asked = {"columns": _NAMED[self.word], "schema": self.names.ledger_schema, "ledger": LEDGER}
        return self.conn.execute(_COLUMNS, {**asked, "type": key_type}).all()

    def open(self) -> None:
        """Replace the foreign keys by triggers."""
        if interrupted(self.conn) == self.word:
            return
        function = Identifier("tallystick", STAND_INS[self.word])
        values = self.names.placeholders()
        key = values["user_key" if self.word == "users" else "workshop_key"]
        created = SQL(
            "CREATE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = {} AS {}"
        ).format(function, values["host_path"], Literal(SQL(_BODIES[self.word]).format(**values).as_string(None)))
        self._when_free(
            [
                remember_objects(self.names),
                created,
                SQL("ALTER FUNCTION {}() OWNER TO {}").format(function, Identifier(self.owner)),
                SQL(
                    "CREATE TRIGGER {} AFTER UPDATE ON {} FOR EACH ROW WHEN (OLD.{} IS DISTINCT FROM NEW.{})"
                    " EXECUTE FUNCTION {}()"
                ).format(_UPDATED, self.of_app, key, key, function),
                SQL("CREATE TRIGGER {} AFTER DELETE ON {} FOR EACH ROW EXECUTE FUNCTION {}()").format(
                    _DELETED, self.of_app, function
                ),
                *(
                    SQL("ALTER TABLE {} DROP CONSTRAINT {}").format(key.table, Identifier(key.name))
                    for key in self.keys
                    if is_validated(self.conn, key.table, key.name) is not None
                ),
                close_new_objects(self.names),
            ],
            tables=self._all(),
        )

    def rewrite(self, after: HostNames, key_type: str) -> float:
        """Change the ledger's columns, types and functions; returns the milliseconds for which it was locked."""
        rows = self.columns(key_type)
        gone, made = functions.key_type_changes(self.names, after)
        types, columns = (
            [
                SQL(change).format(Identifier(row.schema, row.table), Identifier(row.column))
                for row in rows
                if row.of_type is of_type
            ]
            for of_type, change in (
                (True, "ALTER TYPE {} ALTER ATTRIBUTE {} TYPE bigint"),
                (False, "ALTER TABLE {} ALTER {} TYPE bigint"),
            )
        )
        return self._when_free(
            [
                remember_objects(self.names),
                _REMEMBER_GRANTS,
                *gone,
                *types,
                *columns,
                *made,
                close_new_objects(self.names),
                do_block(SQL(_GIVE_BACK).format(owner=Literal(self.owner))),
                do_block(SQL(_FORGET_PLANS)),
                SQL("UPDATE tallystick.mapping SET host = {}").format(Literal(after.mapping)),
            ],
            tables=[Identifier(row.schema, row.table) for row in rows if not row.of_type],
        )

    def close(self) -> tuple[OnlineStep, ...]:
        """Replace the triggers by the foreign keys, and validate these."""
        missing = [key for key in self.keys if is_validated(self.conn, key.table, key.name) is None]
        if missing or interrupted(self.conn) == self.word:
            add = SQL("ALTER TABLE {} ADD CONSTRAINT {} {} NOT VALID")
            self._when_free(
                [
                    *(add.format(key.table, Identifier(key.name), key.definition) for key in missing),
                    *(
                        SQL("DROP TRIGGER IF EXISTS {} ON {}").format(trigger, self.of_app)
                        for trigger in (_UPDATED, _DELETED)
                    ),
                    SQL("DROP FUNCTION IF EXISTS tallystick.{}()").format(Identifier(STAND_INS[self.word])),
                ],
                tables=self._all(),
                unchanged="Until then triggers stand in the place of foreign keys, and your app goes on",
            )
        return tuple(validate_keys(self.conn, self.names, lambda _name, _building: None))

    def _all(self) -> list[Identifier]:
        """All tables, in the order in which writers lock them."""
        return [self.of_app, *(key.table for key in self.keys)]

    def _when_free(
        self, statements: Sequence[Composable], *, tables: Sequence[Identifier], unchanged: str = "Nothing was changed"
    ) -> float:
        lock = SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(SQL(", ").join(tables))
        return send_when_free(
            self.conn,
            [lock, *statements],
            action="widen the key",
            tables=tables,
            lock_timeout_ms=self.lock_timeout_ms,
            give_up_after_s=self.give_up_after_s,
            unchanged=unchanged,
        )


def _foreign_keys(names: HostNames, word: Word) -> list[_ForeignKey]:
    """The foreign keys to the app's table, as the revisions made them."""
    low_balances = Identifier("tallystick", "low_balances")
    rules = {
        "users": [
            ("credit_transactions_user_fk", names.ledger, "user_id", "ON UPDATE CASCADE ON DELETE RESTRICT"),
            ("low_balances_user_fk", low_balances, "user_id", "ON UPDATE CASCADE ON DELETE CASCADE"),
        ],
        "workshops": [("credit_transactions_workshop_fk", names.ledger, "workshop_id", "ON DELETE SET NULL")],
    }
    table = names.users if word == "users" else names.workshops
    return [
        _ForeignKey(
            name,
            of,
            SQL("FOREIGN KEY ({}) REFERENCES {} ({}) ").format(Identifier(column), table.name, table.key) + SQL(rule),
        )
        for name, of, column, rule in rules[word]
        if table is not None
    ]
