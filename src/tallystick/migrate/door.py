"""The third door: a revision of ours inside one of the host's own Alembic history."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal

import sqlalchemy as sa
from alembic.operations import Operations
from psycopg.sql import Composable

from tallystick.config import Config
from tallystick.errors import MigrationError
from tallystick.migrate.host import current_revision, examine
from tallystick.migrate.revisions import HostNames, Revision, revisions, up_to
from tallystick.migrate.statements import STALL_BUDGET_MS, text, upward

_SETTINGS = ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout")


def upgrade_revision(
    op: Operations,
    *,
    to: str,
    config: Config | None = None,
    part: Literal["schema", "online"] = "schema",
    stall_budget_ms: int = STALL_BUDGET_MS,
) -> None:
    """Apply one revision from within ``upgrade()`` of the host's own Alembic history.

    ::

        from tallystick.migrate import upgrade_revision

        def upgrade():
            upgrade_revision(op, to="0001")

    It joins Alembic's transaction, so it keeps the locks until that ends: give it a revision of its own, and set
    ``transaction_per_migration=True``. Unlike ``tallystick migrate apply`` it neither waits for open transactions nor
    tries again as a whole; run ``alembic upgrade`` again when it could not lock the tables.

    What is built concurrently cannot be in a transaction. It is a second revision's::

        def upgrade():
            with op.get_context().autocommit_block():
                upgrade_revision(op, to="0001", part="online")

    Offline (``alembic upgrade --sql``) it writes the statements out and takes no column for granted.

    Raises:
        MigrationError: in a transaction where there must be none, or the other way round, or not the next revision.
        SchemaError: as for :func:`apply`.
    """
    config = config or Config.load()
    revision = next((known for known in revisions() if known.revision == to), None)
    if revision is None:
        known = ", ".join(r.revision for r in revisions())
        raise MigrationError(f"there is no revision {to!r}. Known: {known}")
    if op.get_context().as_sql:
        _write_out(op, revision, config, part, stall_budget_ms)
        return
    conn = op.get_bind()
    if part == "online":
        _build(conn, revision, config)
    else:
        _change(conn, revision, config, stall_budget_ms)


def _change(conn: sa.Connection, revision: Revision, config: Config, stall_budget_ms: int) -> None:
    if _autocommits(conn):
        raise MigrationError(
            f"revision {revision.revision} is all or nothing and needs a transaction. "
            "Call upgrade_revision outside of autocommit_block()"
        )
    host = examine(conn, config)
    if revision in up_to(host.revision):
        return  # applied through another door
    if host.revision != revision.down_revision:
        raise MigrationError(
            f"revision {revision.revision} follows {revision.down_revision or 'nothing'}, and the database is at "
            f"{host.revision or 'nothing'}. Call upgrade_revision for the ones between, in order"
        )
    messages = upward(
        revision,
        HostNames.of(config.host, host.adopted),
        expected=host.revision,
        adopted=host.adopted_names if revision.down_revision is None else (),
        stall_budget_ms=stall_budget_ms,
        prepared=host.prepared == revision.revision,
    )
    before = {name: conn.scalar(sa.select(sa.func.current_setting(name))) for name in _SETTINGS}
    for statement in _inside((*messages.opening, *messages.locked)):
        conn.execute(statement)
    for name, value in before.items():  # what follows in this transaction is the host's
        conn.execute(sa.select(sa.func.set_config(name, value, sa.true())))


def _build(conn: sa.Connection, revision: Revision, config: Config) -> None:
    if not _autocommits(conn):
        raise MigrationError(
            "an index cannot be built CONCURRENTLY inside a transaction. Give it a revision of its own:\n\n"
            "    with op.get_context().autocommit_block():\n"
            f'        upgrade_revision(op, to="{revision.revision}", part="online")\n\n'
            "or run: tallystick migrate apply"
        )
    if current_revision(conn) is None:
        raise MigrationError(f'call upgrade_revision(op, to="{revision.revision}") in a revision before this one')
    schema = config.host.users.schema
    names = HostNames.of(config.host)
    for statement in revision.validates(names).values():
        conn.execute(_text(statement))
    for name, statement in revision.indexes(names).items():
        valid = conn.scalar(_VALID, {"schema": schema, "name": name})
        if valid is False:
            raise MigrationError(f"an interrupted build left the index {name} invalid. Run: tallystick migrate apply")
        if valid is None:
            conn.execute(sa.text("SET lock_timeout = 0"))
            conn.execute(sa.text("SET statement_timeout = 0"))
            conn.execute(_text(statement))


def _write_out(op: Operations, revision: Revision, config: Config, part: str, stall_budget_ms: int) -> None:
    names = HostNames.of(config.host)
    messages = upward(revision, names, expected=revision.down_revision, adopted=(), stall_budget_ms=stall_budget_ms)
    chosen = messages.online.values() if part == "online" else (*messages.opening, *messages.locked)
    for statement in _inside(list(chosen)):
        op.execute(statement)


_VALID = sa.text("""
    SELECT i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
    WHERE c.relnamespace = to_regnamespace(quote_ident(:schema)) AND c.relname = :name
""")


def _inside(statements: Sequence[Composable]) -> Iterator[sa.TextClause]:
    """Without BEGIN and COMMIT, which are Alembic's here."""
    for statement in statements:
        if text([statement]) not in ("BEGIN", "COMMIT"):
            yield _text(statement)


def _text(statement: Composable) -> sa.TextClause:
    # a colon before a word would be a parameter
    return sa.text(re.sub(r"(?<!:):(?=\w)", r"\\:", text([statement])))


def _autocommits(conn: sa.Connection) -> bool:
    # asked of the driver: what SQLAlchemy calls the isolation level is the server's, which knows no such one
    return bool(getattr(conn.connection.dbapi_connection, "autocommit", False))
