"""The bridge to Alembic: a revision of ours inside one of the host's own history, and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import sqlalchemy as sa
from psycopg.sql import Composable

from tallystick.config import Config
from tallystick.errors import MigrationError
from tallystick.migrate.host.preflight import current_revision, examine, refuse_rows
from tallystick.migrate.revisions import HostNames, Revision, revision_named, up_to
from tallystick.migrate.runner.messages import STALL_BUDGET_MS, Messages, downward, text, upward
from tallystick.migrate.runner.online import online
from tallystick.migrate.runner.session import autocommits, refuse_pooler, restoring_settings

if TYPE_CHECKING:  # the host has imported it
    from alembic.operations import Operations


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

    An index that is built concurrently cannot be in a transaction. Write a second revision for it::

        def upgrade():
            with op.get_context().autocommit_block():
                upgrade_revision(op, to="0001", part="online")

    Offline (``alembic upgrade --sql``) it prints the statements, and adds all columns.

    Raises:
        MigrationError: inside a transaction where none is allowed, or outside one, or not the next revision.
        PoolerRefused: the address is a pooler's.
        SchemaError: as for ``apply``.
    """
    config = config or Config.load()
    revision = revision_named(to)
    if op.get_context().as_sql:
        _write_out(op, revision, config, part, stall_budget_ms)
        return
    conn = op.get_bind()
    refuse_pooler(conn)
    if part == "online":
        _build(conn, revision, config)
    else:
        _change(conn, revision, config, stall_budget_ms)


def downgrade_revision(
    op: Operations,
    *,
    to: str | None,
    config: Config | None = None,
    discard_ledger: bool = False,
    stall_budget_ms: int = STALL_BUDGET_MS,
) -> None:
    """Undo one revision from within ``downgrade()`` of the host's own Alembic history.

    ``to`` is the revision before, or None for the database as it was before the first. ::

        def downgrade():
            downgrade_revision(op, to=None)

    It joins Alembic's transaction, with the same conditions as ``upgrade_revision``. The indexes of ``part="online"``
    are dropped with their columns: that revision's ``downgrade()`` has nothing to do.

    Raises:
        LedgerNotEmpty: the ledger has rows, and ``discard_ledger`` is False.
        MigrationError: outside of a transaction, or not the revision before, or offline: only the database knows which
            columns were the host's own.
        SchemaError: as for ``apply``.
    """
    config = config or Config.load()
    if to is not None:
        revision_named(to)
    if op.get_context().as_sql:
        raise MigrationError(
            "downgrade_revision cannot be written out: which columns you had before is known to the database alone. "
            "Run alembic downgrade without --sql, or: tallystick migrate undo"
        )
    conn = op.get_bind()
    refuse_pooler(conn)
    _needs_transaction(conn, "downgrade_revision", "undoing a revision")
    host = examine(conn, config)
    gone = [revision for revision in up_to(host.revision) if revision not in up_to(to)]
    prepared = [one for one in map(revision_named, reversed(host.prepared)) if one not in up_to(to)]
    if not gone and not prepared:
        return  # undone in another way
    if len(gone) > 1:
        raise MigrationError(
            f"{to or 'nothing'} is not just before {host.revision}, where the database is. Call downgrade_revision for "
            f"the ones between, in order: {', '.join(str(one.down_revision) for one in reversed(gone[1:]))}"
        )
    if gone and not discard_ledger:
        refuse_rows(conn, host, "call downgrade_revision(…, discard_ledger=True)")
    _run_inside(
        conn,
        downward(
            gone,
            HostNames.of(config.host, host.adopted),
            expected=host.revision,
            discard_ledger=discard_ledger,
            stall_budget_ms=stall_budget_ms,
            prepared=prepared,
        ),
    )


def _needs_transaction(conn: sa.Connection, function: str, what: str) -> None:
    if autocommits(conn):
        raise MigrationError(
            f"{what} is all or nothing and needs a transaction. Call {function} outside of autocommit_block()"
        )


def _run_inside(conn: sa.Connection, messages: Messages) -> None:
    # the rest of this transaction is the host's and gets its settings back, except the wait for a standby at its end,
    # during which the tables would be locked
    with restoring_settings(conn, local=True):
        for statement in _inside((*messages.opening, *messages.locked)):
            conn.execute(statement)


def _change(conn: sa.Connection, revision: Revision, config: Config, stall_budget_ms: int) -> None:
    _needs_transaction(conn, "upgrade_revision", f"revision {revision.revision}")
    host = examine(conn, config)
    if revision in up_to(host.revision):
        return  # applied in another way
    if host.revision != revision.down_revision:
        raise MigrationError(
            f"revision {revision.revision} follows {revision.down_revision or 'nothing'}, and the database is at "
            f"{host.revision or 'nothing'}. Call upgrade_revision for the ones between, in order"
        )
    messages = upward(
        [revision],
        HostNames.of(config.host, host.adopted),
        expected=host.revision,
        adopted=host.adopted_names,
        stall_budget_ms=stall_budget_ms,
        prepared=[one for one in host.prepared if one == revision.revision],
    )
    _run_inside(conn, messages)


def _build(conn: sa.Connection, revision: Revision, config: Config) -> None:
    if not autocommits(conn):
        raise MigrationError(
            "an index cannot be built CONCURRENTLY inside a transaction. Give it a revision of its own:\n\n"
            "    with op.get_context().autocommit_block():\n"
            f'        upgrade_revision(op, to="{revision.revision}", part="online")\n\n'
            "or run: tallystick migrate apply"
        )
    if current_revision(conn) is None:
        raise MigrationError(f'call upgrade_revision(op, to="{revision.revision}") in a revision before this one')
    for _ in online(conn, revision, HostNames.of(config.host), lambda _name, _building: None):
        pass


def _write_out(op: Operations, revision: Revision, config: Config, part: str, stall_budget_ms: int) -> None:
    names = HostNames.of(config.host)
    messages = upward(
        [revision],
        names,
        expected=revision.down_revision,
        adopted=names.adopted_names,
        stall_budget_ms=stall_budget_ms,
    )
    chosen = messages.online.values() if part == "online" else (*messages.opening, *messages.locked)
    for statement in _inside(list(chosen)):
        op.execute(statement)


def _inside(statements: Sequence[Composable]) -> Iterator[sa.TextClause]:
    """The statements without BEGIN and COMMIT, which are Alembic's here."""
    for statement in statements:
        if text([statement]) not in ("BEGIN", "COMMIT"):
            yield _text(statement)


def _text(statement: Composable) -> sa.TextClause:
    # escapes only what SQLAlchemy takes for a parameter: it would leave any other backslash where it is
    return sa.text(re.sub(r"(?<![:\w\\]):([\w$]+)(?![:\w$])", r"\\:\1", text([statement])))
