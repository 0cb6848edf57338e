"""Adopting a host and migrating it: tallystick init, and tallystick migrate plan, apply, status, sql, undo."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import sqlalchemy as sa
import typer
from rich.console import Console
from typer.core import TyperGroup

from tallystick import migrate
from tallystick.audit import audit
from tallystick.cli.app import (
    Json,
    address,
    app,
    counted,
    emit,
    err,
    escape,
    examples,
    invocation,
    mapping,
    note,
    out,
    place,
    plain,
    reading,
    with_mapping,
)
from tallystick.cli.backups import backups, take_backup
from tallystick.config import Config, HostMapping, has_host, settings_file, write_host
from tallystick.database import PATIENCE_S, connect, translated
from tallystick.dev import postgres
from tallystick.errors import BackupError, ConfigError, Conflict, TallystickError
from tallystick.files import replace_file
from tallystick.migrate.checks.rehearsal import split
from tallystick.migrate.host import role as roles
from tallystick.progress import Progress
from tallystick.signals import Cleanup


class _InOrder(TyperGroup):
    """The commands in the order in which a migration needs them."""

    def list_commands(self, ctx: Any) -> list[str]:
        order = ("plan", "rehearse", "apply", "status", "undo", "sql", "snippet", "widen-key")
        return sorted(super().list_commands(ctx), key=order.index)


migrations = typer.Typer(
    cls=_InOrder,
    no_args_is_help=True,
    help="Migrate a live database, and back, without stalling its traffic.",
)
app.add_typer(migrations, name="migrate", rich_help_panel="Begin here")


def connect_when_ready(config: Config) -> AbstractContextManager[sa.Connection]:
    """A connection, with retries while the server is starting up, as one that sleeps when idle."""
    messages: list[str] = []

    def waiting(message: str) -> None:
        if not messages:
            note(f"The database is not ready yet, trying again for up to {PATIENCE_S:g} s: {message}")
        messages.append(message)

    return connect(address(config), patience_s=PATIENCE_S, waiting=waiting)


@contextmanager
def migrating(ctx: typer.Context, *, renews: bool = False) -> Iterator[tuple[sa.Connection, Config]]:
    """A connection that migrations can use, to read, and the settings."""
    with reading(), invocation(ctx).database(migrating=True) as config, connect_when_ready(config) as conn:
        yield conn, with_mapping(conn, config, renews=renews)


def _show_target(ctx: typer.Context, config: Config, *, renews: bool = False) -> Config:
    with connect_when_ready(config) as conn:
        found = with_mapping(conn, config, renews=renews)
        note(f"{place(conn)}, {mapping(ctx, found)}.")
        return found


StallBudget = Annotated[
    int,
    typer.Option(
        "--stall-budget-ms",
        help="The longest time for which one attempt may make traffic wait for a lock.",
        min=1,
        max=migrate.STALL_BUDGET_MAX_MS,
        metavar="MS",
    ),
]
GiveUpAfter = Annotated[
    float, typer.Option("--give-up-after", help="The time after which to stop trying.", min=1, metavar="SECONDS")
]


class Credits(StrEnum):
    """As ``HostMapping.credits``."""

    integer = "integer"
    bigint = "bigint"


_OTHERS = 3


def _init_again(options: Mapping[str, str | None], *, own_columns: bool) -> str:
    given = [f"{name} {shlex.quote(to)}" for name, to in options.items() if to]
    return " ".join(["tallystick init --force", *given, *(["--own-columns"] if own_columns else [])])


def _without_balance(column: str, init_again: str) -> str:
    ours = column == "credit_balance"
    return ", rename it first: Tallystick's own column has this name" if ours else f": {init_again}"


@app.command(rich_help_panel="Begin here")
def init(
    ctx: typer.Context,
    users: Annotated[
        str | None, typer.Option("--users", help="The table of users, as table or schema.table.", metavar="TABLE")
    ] = None,
    workshops: Annotated[
        str | None,
        typer.Option(
            "--workshops",
            help="The table of the things that one credit unlocks; 'none' if there is none.",
            metavar="TABLE",
        ),
    ] = None,
    users_key: Annotated[
        str | None,
        typer.Option("--users-key", help="The key column of users, if it is not their primary key.", metavar="COLUMN"),
    ] = None,
    balance: Annotated[
        str | None,
        typer.Option(
            "--balance",
            help="The column of users that holds credits already, and is adopted; 'none' if there is none.",
            metavar="COLUMN",
        ),
    ] = None,
    credits: Annotated[
        Credits | None,
        typer.Option("--credits", help="The type of amounts and balances: bigint if you count in parts of a credit."),
    ] = None,
    own_columns: Annotated[
        bool,
        typer.Option(
            "--own-columns",
            help="Add stripe_customer_id, updated_at and deleted_at also where the app has such a column in another "
            "spelling, such as deletedAt.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="The file to write. The default is the one that the settings come from, else tallystick.toml.",
            metavar="FILE",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace \\[host] in an existing file. Its other settings stay as they are.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read the app's database, propose the mapping to its tables and columns, and write it to tallystick.toml.

    If the settings are in another file, such as pyproject.toml, it is written there. Changes nothing in the database.
    """
    chosen_file = invocation(ctx).config_path
    given = {
        "--users": users,
        "--users-key": users_key,
        "--workshops": workshops,
        "--balance": balance,
        "--credits": credits and credits.value,
        "--output": None if output is None else str(output),
        "--config": None if chosen_file is None else str(chosen_file),
    }
    again = _init_again(given, own_columns=own_columns)
    target = settings_file(chosen_file) if output is None else output
    if not force and has_host(target):
        raise ConfigError(
            f"{target} has the tables of an app already, under [host]. To replace them: {again}",
            path=str(target),
            key="host",
        )
    with reading(), invocation(ctx).database() as config, connect_when_ready(config) as conn:
        host = migrate.propose(
            conn,
            users=users,
            workshops=workshops,
            users_key=users_key,
            balance=balance,
            credits=None if credits is None else credits.value,
            own_columns=own_columns,
        )
        primary = migrate.other_than_primary(conn, host)
        adopts = migrate.has_balances(conn, host)
        in_place = migrate.in_place_of_ours(conn, host)
        found = migrate.people(conn)
        apart = [] if balance == "none" else migrate.balances_apart(conn, host)
    write_host(target, host)

    def show() -> None:
        named = host.users
        instead = f", not by its primary key {primary}" if primary else ""
        chosen = [one for one in found if (one.table.schema, one.table.table) == (named.schema, named.table)]
        why = "".join(f": {one.why}" for one in chosen if one.signed)
        out.print(
            f"users      {named.schema}.{named.table}, by {named.key} ({named.key_type}){instead}{why}", markup=False
        )
        others = [one for one in found if one not in chosen]
        for one in others[:_OTHERS] if users is None else ():
            instead_of_it = f"{again} --users {shlex.quote(one.table.shown)}"
            out.print(f"           or {one.table.shown} ({one.why}): {instead_of_it}", markup=False, soft_wrap=True)
        if host.workshops is None:
            advice = "" if workshops else f". If a credit unlocks something: {again} --workshops TABLE"
            out.print(f"workshops  none{advice}")
        else:
            place = host.workshops
            out.print(
                f"workshops  {place.schema}.{place.table}, by {place.key} ({place.key_type}), "
                f"owner {place.owner}, title {place.title or 'none'}, created {place.created_at or 'none'}",
                markup=False,
            )
        if host.workshops is not None and host.workshops.created_at is None:
            out.print(
                f"           {host.workshops.schema}.{host.workshops.table} seems to have no column with the time at "
                "which a workshop was made, so old workshops will need a credit too. If there is one, set created_at "
                "to it in the file.",
                markup=False,
            )
        if adopts:
            column = f"{named.schema}.{named.table}.{named.balance}"
            without = _without_balance(
                named.balance, _init_again({**given, "--balance": "none"}, own_columns=own_columns)
            )
            out.print(
                f"balance    {column}: these credits are kept and taken into the ledger. To see them: tallystick "
                f"adopt. If the column means something else{without}",
                markup=False,
            )
        if in_place:
            which = ", ".join(f"{column} is used for {ours}" for column, ours in in_place)
            out.print(
                f"columns    {which}. The app has {'it' if len(in_place) == 1 else 'them'} already, and no second one "
                f"is added. If a column means something else: {again} --own-columns",
                markup=False,
            )
        options = {name: given[name] for name in ("--credits", "--output", "--config")}
        for beside in apart:
            advice = beside.sentence(_init_again(options, own_columns=own_columns))
            out.print(f"balance    {advice}", markup=False, soft_wrap=True)
        if host.ledger_schema is not None:
            out.print(
                f"ledger     in schema {host.ledger_schema}, since the app has names like the ledger's already; they "
                "stay as they are",
                markup=False,
            )
        file = f"--config {shlex.quote(str(target))} " if output or chosen_file else ""
        out.print(f"Written to {target}. Check it, then: tallystick {file}migrate plan", markup=False)

    emit({**plain(host), "balances_apart": apart}, show, as_json=as_json)


def _as_named(host: HostMapping, columns: Sequence[str]) -> str:
    """Columns by our words, as ``users.credit_balance``, by the names that the app has for them."""
    return ", ".join(
        f"{table.schema}.{table.table}.{name}{'' if name == ours else f' (as {ours})'}"
        for word, _, ours in (column.partition(".") for column in columns)
        if (table := host.users if word == "users" else host.workshops) and (name := table.adoptable.get(ours, ours))
    )


@migrations.command()
def plan(
    ctx: typer.Context,
    backup: Annotated[
        Path | None,
        typer.Option("--backup", help="Also check that there is room for a backup at this path.", metavar="FILE"),
    ] = None,
    whole: Annotated[
        bool, typer.Option("--all", help="Also show the statements before the locks, which make new objects alone.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the statements of apply, their locks, and the sessions that hold the tables now. Changes nothing.

    Exit code 1 if something would stop apply.
    """
    with migrating(ctx, renews=True) as (conn, config):
        here = f"{place(conn)}, {mapping(ctx, config)}."
        planned = migrate.plan(conn, config, backup_folder=backup.absolute().parent if backup else None)
    stopped = bool(planned.revisions or planned.renewed) and any(
        finding.severity == "stop" for finding in planned.findings
    )

    def show() -> None:
        out.print(here, markup=False)
        if not planned.revisions and not planned.renewed:
            out.print(f"Nothing to do: the database is at revision {planned.before} already.")
            return
        sizes = ", ".join(f"{size.table} (about {size.rows:,} rows)" for size in planned.tables)
        out.print(f"PostgreSQL {planned.server}; {sizes}.", markup=False)
        if planned.adopted:
            out.print(
                f"There already, and adopted as they are: {_as_named(config.host, planned.adopted)}.", markup=False
            )
        show_plan(out, planned, brief=() if whole else ("prepare",))
        if not whole:
            out.print("To see each statement: tallystick migrate plan --all", style="dim")
        out.print(f"The tables will be locked for about {planned.estimated_hold_ms:.0f} ms.")
        for blocker in planned.blockers:
            out.print(f"In the way now: {blocker}.", markup=False)
        for pid, age_s in planned.long_transactions:
            out.print(f"Open for {age_s:.0f} s: pid {pid}; an index built beside the traffic waits for it.")
        for finding in planned.findings:
            out.print(f"{finding.severity.capitalize()}: {finding.text}.", markup=False)
        if not stopped:
            out.print("Apply makes all of these changes, or none. Next: tallystick migrate apply")

    emit(planned, show, as_json=as_json)
    if stopped:
        raise typer.Exit(1)


def _show_trackers(found: Sequence[migrate.Tracker]) -> None:
    for tracker in found:
        at = tracker.newest or ("a revision that this role may not read" if tracker.grant else "nothing")
        out.print(f"The app's own {tracker.tool} ({tracker.table}) is at {at}.", markup=False)
    for concern in migrate.concerns(found):
        out.print(f"  {concern}.", markup=False)


_PHASES = {
    "prepare": "First, statements that no traffic waits for",
    "locked": "Then, under the locks, sent with COMMIT as one message",
    "online": "Afterwards, one by one, while traffic goes on",
}


def show_plan(console: Console, planned: migrate.Plan, *, brief: Collection[str] = tuple(_PHASES)) -> None:
    """The statements of a plan with their locks; those that lock no existing table are counted in ``brief`` phases."""

    def line(text: str, style: str = "") -> None:
        console.print(f"   {text}", style=style, markup=False, no_wrap=True, overflow="ellipsis", soft_wrap=False)

    for changed in planned.renewed:
        line(f"The functions are made anew: {changed}.")
    for revision in planned.revisions:
        line(f"{revision.revision}. {revision.title}")
    for phase, title in _PHASES.items():
        of_phase = [statement for statement in planned.statements if statement.phase == phase]
        felt = [statement for statement in of_phase if statement.locks or phase not in brief]
        if of_phase:
            line(title, "bold")
        for statement in felt:
            line("  " + " ".join(statement.sql.split()))
            costs = [word for word, true in (("scans", statement.scans), ("rewrites", statement.rewrites)) if true]
            if statement.locks or costs:
                line("      " + ", ".join([_locks(statement), *costs]), "dim")
        if others := len(of_phase) - len(felt):
            line(f"  and {counted(others, 'more statement')}, which lock no existing table", "dim")


def _locks(statement: migrate.PlannedStatement) -> str:
    tables: dict[str, list[str]] = {}
    for name, lock in statement.locks:
        tables.setdefault(lock, []).append(name)
    return "; ".join(f"{lock} on {', '.join(names)}" for lock, names in tables.items())


@migrations.command(
    epilog=examples("tallystick migrate sql > credits.sql", 'tallystick migrate sql --role app | psql "$DATABASE_URL"')
)
def sql(
    ctx: typer.Context,
    offline: Annotated[
        bool, typer.Option("--offline", help="Print it without a database, for tables that have none of our columns.")
    ] = False,
    role: Annotated[
        str | None,
        typer.Option(
            "--role",
            help="Print instead the grants with which this role can run the ledger's functions and write no balance.",
            metavar="ROLE",
        ),
    ] = None,
    revoke: Annotated[
        bool, typer.Option("--revoke", help="With --role: print the statements that take the grants back.")
    ] = False,
    functions: Annotated[
        bool, typer.Option("--functions", help="Print the ledger's functions alone, to restore them.")
    ] = False,
) -> None:
    """Print the migration as one SQL script, for review or for another tool."""
    if revoke and role is None:
        raise typer.BadParameter("--revoke takes back the grants of a role. Name the role: --role ROLE")
    if functions and role is not None:
        raise typer.BadParameter("--role and --functions print two different scripts. Leave one out")
    if role is not None:
        config = invocation(ctx).config()
        if config.database_url and "host" not in config.model_fields_set and not offline:
            with migrating(ctx) as (_, config):  # which of its tables are the app's, a migrated database knows
                pass
        script = (roles.revoke if revoke else roles.grant)(config.host, role)
        out.print(_STOP_AT_ERROR + script, markup=False)
        return
    write = (lambda *of: _STOP_AT_ERROR + migrate.functions_sql(*of)) if functions else migrate.sql
    if offline:
        out.print(write(None, invocation(ctx).config()), markup=False)
        return
    with migrating(ctx) as (conn, config):
        out.print(write(conn, config), markup=False)


# Without it psql prints an error for each statement after the first error, and ends with exit code 0.
_STOP_AT_ERROR = "\\set ON_ERROR_STOP on\n"
_NOT_MIGRATED = "Not migrated yet. Run: tallystick migrate plan, then: tallystick migrate apply"
_NO_REMEDY = "tallystick migrate apply does not mend this: find out who changed it, then restore the expected state"
_PREPARED = (
    "On the way to revision {}: its new objects exist, and nothing uses them yet. "
    "To continue: tallystick migrate apply. To remove them: {}"
)


@migrations.command()
def status(
    ctx: typer.Context,
    drizzle: Annotated[
        Path | None,
        typer.Option("--drizzle", help="Also compare the app's Drizzle migrations in this folder.", metavar="FOLDER"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the database's revision, and each difference from the expected schema. Exit code 1 if there is one."""
    with migrating(ctx) as (conn, config):
        found = migrate.status(conn, config)
        others = migrate.trackers(conn, drizzle=drizzle)

    def show() -> None:
        _show_trackers(others)
        _show_status(found, config.host)

    emit({**plain(found), "trackers": others}, show, as_json=as_json)
    if not found.healthy:
        raise typer.Exit(1)


def _show_status(found: migrate.Status, host: HostMapping) -> None:
    if found.revision is None or found.prepared is not None:
        out.print(
            _PREPARED.format(found.prepared, migrate.undo_command(found.revision)) if found.prepared else _NOT_MIGRATED
        )
    if found.revision is None:
        return
    out.print(f"At revision {found.revision}; this package needs {found.head}.")
    for row in found.history:
        locked = "" if row.locked_ms is None else f", tables locked for {row.locked_ms:.1f} ms"
        out.print(f"  {row.applied_at:%Y-%m-%d %H:%M} {row.direction} {row.revision}{locked}")
    if found.adopted:
        out.print(f"Adopted as they were: {_as_named(host, found.adopted)}.", markup=False)
    for warning in found.warnings:
        out.print(f"Warning: {warning}.", markup=False)
    if found.revision != found.head:
        out.print("Run: tallystick migrate apply")
    elif found.drift:
        out.print(f"[red]{counted(len(found.drift), 'difference')}[/] from what this package declares:")
        for drift in found.drift:
            out.print(f"  {drift}", markup=False)
            out.print(f"    {f'Mend it: {drift.remedy}' if drift.remedy else _NO_REMEDY}", markup=False)
    else:
        out.print("[green]As declared:[/] every column, constraint, index, trigger, label, function and privilege.")


@migrations.command()
def snippet(
    ctx: typer.Context,
    tool: Annotated[str, typer.Argument(help=f"One of: {', '.join(migrate.TOOLS)}.", metavar="TOOL")],
) -> None:
    """Print the lines for the app's own schema file, so that its tool does not drop our columns."""
    config, host = invocation(ctx).config(), None
    if config.database_url or postgres.default_folder().exists():  # it has the columns that the app had before
        try:
            with translated(), invocation(ctx).database(migrating=True) as config, connect(address(config)) as conn:
                config = with_mapping(conn, config)  # noqa: PLW2901 - the same, with the database's mapping
                host = migrate.examine(conn, config, strict=False)
        except TallystickError as error:
            note(f"The database was not looked at: {error.message}")
    lines = (
        migrate.snippet(tool, config)
        if host is None
        else migrate.snippet(tool, config, host.adopted_names, there=host.columns)
    )
    out.print(lines, markup=False)


@migrations.command()
def apply(
    ctx: typer.Context,
    backup: Annotated[
        Path | None,
        typer.Option("--backup", help="Take a verified backup into this file first.", metavar="FILE"),
    ] = None,
    stall_budget_ms: StallBudget = migrate.STALL_BUDGET_MS,
    give_up_after: GiveUpAfter = migrate.GIVE_UP_AFTER_S,
    two_transactions: Annotated[
        bool,
        typer.Option(
            "--two-transactions",
            help="For a database that is too busy: commit the new objects first, then the locked part alone. After an "
            "interruption between the two, the next apply goes on, and undo removes the objects.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Migrate the database while its traffic goes on. All or nothing; a second run changes nothing."""
    with invocation(ctx).database(migrating=True) as config:
        config = _show_target(ctx, config, renews=True)  # noqa: PLW2901 - the same, with the database's mapping
        if backup is not None:
            take_backup(address(config), backup)
        with connect_when_ready(config) as conn:
            tools = migrate.tools(conn, Path.cwd())
            apart = []
            with suppress(Conflict):  # a table is locked: the run waits for it, and names who holds it
                apart = migrate.balances_apart(conn, config.host)
        with _MigrationProgress() as shown:
            receipt = migrate.apply(
                address(config),
                config,
                stall_budget_ms=stall_budget_ms,
                give_up_after_s=give_up_after,
                two_transactions=two_transactions,
                progress=shown,
            )

    for beside in apart if receipt.changed and receipt.before is None else ():
        note(f"Warning: {beside.sentence('tallystick migrate undo, and tallystick init --force')}.")

    def show() -> None:
        _show_receipt(receipt, config.host)
        for tool in tools if receipt.changed else ():
            out.print(
                f"The app uses {tool.name} ({tool.sign}), which {tool.otherwise}. Next: tallystick migrate snippet "
                f"{tool.snippet}. Put its lines into the app's schema files",
                markup=False,
            )

    emit(receipt, show, as_json=as_json)


@app.command(rich_help_panel="Begin here")
def adopt(
    ctx: typer.Context,
    history: Annotated[
        str | None,
        typer.Option("--history", help="The app's own history of credits, as table or schema.table.", metavar="TABLE"),
    ] = None,
    note_history: Annotated[
        bool,
        typer.Option("--note-history", help="Put the history into the metadata of each user's opening balance."),
    ] = False,
    cut_over: Annotated[
        bool,
        typer.Option(
            "--cut-over", help="Stop recording the app's own changes of balances, once none of its code makes any."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """For an app that has credits already: show its balances and its history, and take them into the ledger.

    Before the migration it changes nothing. After it, it opens the balances that are not in the ledger yet, while
    traffic goes on.
    """
    with invocation(ctx).database(migrating=True) as config:
        config = _show_target(ctx, config)  # noqa: PLW2901 - the same, with the database's mapping
        with connect_when_ready(config) as conn:
            before = migrate.look_at_own_credits(conn, config, history=history)
        did = migrate.cut_over(address(config), config) if cut_over else None
        if note_history or (before.migrated and not cut_over):
            opened = did.opened if did else 0
            did = migrate.adopt(address(config), config, history=history, note_history=note_history)
            did = replace(did, opened=did.opened + opened)
        with connect_when_ready(config) as conn:
            found = migrate.look_at_own_credits(conn, config, history=history)

    def show() -> None:
        _show_own_credits(found)
        if did is not None and did.opened:
            out.print(f"Opened the balances of {counted(did.opened, 'user')}.")
        if did is not None and did.noted:
            out.print(f"Noted the history in the opening balances of {counted(did.noted, 'user')}.")
        out.print(_next_of(found), markup=False)

    emit({"own_credits": found, "did": did}, show, as_json=as_json)


def _show_own_credits(found: migrate.OwnCredits) -> None:
    out.print(f"{found.column}: {counted(found.credits, 'credit')} of {counted(found.users, 'user')}.", markup=False)
    if found.migrated:
        waiting = f" Without an opening balance: {counted(found.waiting, 'user')}." if found.waiting else ""
        out.print(
            f"In the ledger: opening balances of {counted(found.opened, 'user')}. "
            f"Changes by the app's own code since then: {found.changed_by_app:,}.{waiting}"
        )
    if (history := found.history) is None:
        out.print("No table looks like a history of credits. If you have one: tallystick adopt --history TABLE")
        return
    signs = ", with the sign of each amount by its type" if history.signs_from_type else ""
    out.print(f"{history.table}: {counted(history.rows, 'row')}{signs}.", markup=False)
    if history.wrong_balances:
        out.print(f"  Rows whose stored balance is not the sum up to them: {history.wrong_balances:,}.")
    if not history.differing:
        out.print("  For each user the sum of these rows is the balance.")
        return
    out.print(f"  The sum of these rows differs from the balance of {counted(history.differing, 'user')}:")
    for one in history.differences:
        out.print(f"    {one.user}: has {one.balance:,}, the history gives {one.history:,} ({one.by:+,})", markup=False)
    if history.differing > len(history.differences):
        out.print(f"    and {history.differing - len(history.differences):,} more")
    out.print("  The balance is kept, since users see it.")
    if found.follows or not found.migrated:
        out.print("  To correct a balance, change it in the app, before the cut-over.")


def _next_of(found: migrate.OwnCredits) -> str:
    if not found.migrated:
        return "Nothing was changed. Next: tallystick migrate plan"
    if not found.follows:
        return "Only the ledger writes balances. Next: tallystick audit"
    if found.waiting:
        return "Next: run tallystick adopt again when the transactions that hold these users have ended"
    return (
        "Next: deploy code that spends and grants through the ledger; the old code may run beside it. When no old "
        "code runs any more: tallystick adopt --cut-over"
    )


@migrations.command()
def undo(
    ctx: typer.Context,
    discard_ledger: Annotated[bool, typer.Option("--discard-ledger", help="Delete the ledger's rows too.")] = False,
    to: Annotated[
        str | None,
        typer.Option("--to", help="Only go back to this earlier revision.", metavar="REVISION"),
    ] = None,
    stall_budget_ms: StallBudget = migrate.STALL_BUDGET_MS,
    give_up_after: GiveUpAfter = migrate.GIVE_UP_AFTER_S,
    as_json: Json = False,
) -> None:
    """Take Tallystick out of the database again. Refused while the ledger has rows."""
    with invocation(ctx).database(migrating=True) as config:
        config = _show_target(ctx, config)  # noqa: PLW2901 - the same, with the database's mapping
        with _MigrationProgress() as shown:
            receipt = migrate.undo(
                address(config),
                config,
                to=to,
                discard_ledger=discard_ledger,
                stall_budget_ms=stall_budget_ms,
                give_up_after_s=give_up_after,
                progress=shown,
            )
    emit(receipt, lambda: _show_receipt(receipt, config.host), as_json=as_json)


class Widenable(StrEnum):
    """A table whose key may be widened."""

    users = "users"
    workshops = "workshops"


@migrations.command("widen-key")
def widen_key(
    ctx: typer.Context,
    table: Annotated[
        Widenable, typer.Argument(help="users or workshops: the table whose key becomes larger.", metavar="TABLE")
    ],
    give_up_after: GiveUpAfter = 60,
    as_json: Json = False,
) -> None:
    """Give the ledger bigint keys, before the app changes a key from integer to bigint.

    The ledger is rewritten, up to half a minute for each million rows, and its callers wait meanwhile: run it at a
    quiet time. Afterwards renew every connection of the app. To finish an interrupted run, run the command again.
    """
    with invocation(ctx).database(migrating=True) as config:
        with connect_when_ready(config) as conn:
            note(f"{place(conn)}.")
        widened = migrate.widen_key(address(config), table.value, give_up_after_s=give_up_after)

    def show() -> None:
        took = f" The ledger was locked for {widened.rewrite_ms:,.0f} ms." if widened.rewrite_ms else ""
        out.print(f"Now bigint: {', '.join(widened.columns)}, and the ledger's functions.{took}", markup=False)
        out.print(
            "Next: renew every connection of your app (restart it; RECONNECT in PgBouncer). Statements that they have "
            'prepared fail with "cached plan must not change result type".',
            markup=False,
        )
        out.print(
            f'Set key_type = "bigint" under [host.{table.value}] in tallystick.toml, or write it anew: tallystick init '
            "--force. Then make your own columns bigint, the key and each that refers to it, and renew the connections "
            "again.",
            markup=False,
        )

    emit(widened, show, as_json=as_json)


@migrations.command()
def rehearse(
    ctx: typer.Context,
    backup_file: Annotated[
        Path | None,
        typer.Option("--from", help="Use this backup, in place of a new copy of the database.", metavar="FILE"),
    ] = None,
    statements: Annotated[
        Path | None,
        typer.Option("--statements", help="Also try the app's own statements in this .sql file.", metavar="FILE"),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write the report to this HTML file.", metavar="FILE")
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            help="Rehearse on a copy that you made, such as a branch at Neon. The copy is changed, and its ledger is "
            "emptied.",
            metavar="ADDRESS",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Migrate a temporary copy of the database, use the ledger there, audit it, and undo the migration.

    Exit code 1 if the rehearsal found a reason not to migrate the original. The original is only read.
    """
    if on is not None and backup_file is not None:
        raise typer.BadParameter("--on names a copy that has data already. Leave --from out")
    of_the_app = tuple(split(_script(statements))) if statements else ()
    with ExitStack() as stack:
        source = _given(ctx, on) if on is not None else _restored(ctx, backup_file)
        config, copy = stack.enter_context(source)
        done = migrate.rehearse(
            copy,
            config,
            app_statements=of_the_app,
            audit=lambda conn: _audited(conn, config),
            progress=stack.enter_context(_RehearsalProgress()),
        )

    from tallystick.cli.rehearsal_report import rehearsal_page, rehearsal_report  # noqa: PLC0415 - of this command alone

    emit(done, lambda: out.print(rehearsal_report(done)), as_json=as_json)
    if html is not None:
        replace_file(html, rehearsal_page(done).encode())
    if not done.passed:
        raise typer.Exit(1)


def _script(path: Path) -> str:
    """An .sql file of the app's."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8. Save it as UTF-8", path=str(path)) from None


_NO_EXTENSION = re.compile(r"extension \"([^\"]+)\" is not available|extension/([^/\"]+)\.control\"")


@contextmanager
def _restored(ctx: typer.Context, backup_file: Path | None) -> Iterator[tuple[Config, str]]:
    """A copy in a temporary server, from the given backup or from one that is taken now."""
    with Cleanup() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="tallystick-rehearsal-")))
        folder.chmod(0o711)  # root's embedded server runs as another account, which must be able to pass
        if backup_file is None:
            config = stack.enter_context(invocation(ctx).database(migrating=True))
            backup_file = folder / "copy.backup"
            config = _show_target(ctx, config)
            with connect_when_ready(config) as conn:
                migrate.refuse_nothing_to_rehearse(conn)
            take_backup(address(config), backup_file)
        else:
            backups().read_manifest(backup_file)  # before a server is started for it
            config = invocation(ctx).config()
            note(f"A copy from {backup_file}, {mapping(ctx, config)}.")
        with _RehearsalProgress() as steps:
            steps(Progress("starting an embedded server"))
            server = stack.enter_context(postgres.Server(folder / "server"))
            copy = server.create_database("rehearsal")
            steps(Progress("restoring the copy"))
            backups().make_roles(backup_file, copy)
            try:
                backups().restore(backup_file, copy, bin_dir=server.bin, owners=False)
            except BackupError as error:
                if found := _NO_EXTENSION.search(error.message):
                    raise BackupError(
                        f"the copy needs the extension {found[1] or found[2]}, which the rehearsal's server does not "
                        "have. Rehearse with a PostgreSQL of this machine that has it "
                        "(TALLYSTICK_PG_BIN=/usr/lib/postgresql/…/bin), or on a copy that you make (--on ADDRESS)"
                    ) from error
                raise
        yield config, copy


@contextmanager
def _given(ctx: typer.Context, copy: str) -> Iterator[tuple[Config, str]]:
    """A copy that the user made, after a check that it is not the original."""
    config = invocation(ctx).config().at(copy)
    with connect_when_ready(config) as conn:
        note(f"{place(conn)}, {mapping(ctx, config)}.")
        if invocation(ctx).config().database_url:
            with invocation(ctx).database(migrating=True) as original, connect_when_ready(original) as source:
                migrate.refuse_same_database(conn, source)
    yield config, address(config)


def _audited(conn: sa.Connection, config: Config) -> list[str]:
    return [str(finding) for finding in audit(conn, config).findings if finding.fault]


class _RehearsalProgress(ExitStack):
    """The steps of a rehearsal on stderr, on a terminal in one line, with the duration of each finished step."""

    def __init__(self) -> None:
        super().__init__()
        self._step = ""
        self._since = time.monotonic()
        self._status = self.enter_context(err.status("")) if err.is_terminal else None
        self.callback(self, Progress(""))

    def __call__(self, begun: Progress) -> None:
        if self._status is None:
            if begun.step:
                note(begun.step)
            return
        now = time.monotonic()
        if self._step:
            note(f"{now - self._since:6.1f} s  {self._step}")
        self._step, self._since = begun.step, now
        self._status.update(begun.step)


class _MigrationProgress(ExitStack):
    """The progress of a migration and its blockers on stderr, on a terminal in one line.

    After an interruption it prints what is done already.
    """

    def __init__(self) -> None:
        super().__init__()
        self._told: set[tuple[object, ...]] = set()
        self._done: list[str] = []
        self._now: migrate.MigrationProgress | None = None
        self._status = self.enter_context(err.status("Looking …")) if err.is_terminal else None

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> bool | None:  # noqa: PYI036  # as ExitStack has it
        ended = super().__exit__(kind, *rest)
        if kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit):
            note(f"Interrupted. {self._left()} To continue, run the same command again.")
        return ended

    def _left(self) -> str:
        done = f"Committed: {', '.join(self._done)}." if self._done else "Nothing is committed."
        match self._now:
            case migrate.MigrationProgress(phase="online", step=str(step)):
                return f"{done} Not finished: {step}."
            case migrate.MigrationProgress(phase="locking", revision=str(revision)):
                # the interruption may have come while COMMIT was answered
                done = done if self._done else ""
                return f"{done} {revision} is done or is not, as a whole.".strip()
        return done

    def __call__(self, now: migrate.MigrationProgress) -> None:
        self._now = now
        if now.phase in ("prepared", "applied", "undone"):
            self._done.append(f"the new objects of {now.revision}" if now.phase == "prepared" else f"{now.revision}")
        line = f"{now.revision or 'the database'}: {now.phase}"
        if now.step != now.phase:
            line += f" {now.step}"
        if now.detail:
            line += f", {now.detail}"
        if now.total:
            line += f" {now.done / now.total:.0%}"
        if now.waits_for:
            line += f", waits for pid {now.waits_for}"
        if now.blockers:
            line += " for " + "; ".join(str(blocker) for blocker in now.blockers)
        if self._status is not None:
            self._status.update(escape(line))
        else:
            # a log gets a line for each change, not for each poll
            what = (now.phase, now.revision, now.step, now.waits_for, tuple(blocker.pid for blocker in now.blockers))
            if what not in self._told:
                note(line)
            self._told.add(what)


def _show_receipt(receipt: migrate.Receipt, host: HostMapping) -> None:
    if not receipt.changed:
        where = f"at revision {receipt.after}" if receipt.after else "without Tallystick"
        out.print(f"Nothing to do: the database is {where} already.")
        return
    for changed in receipt.renewed:
        out.print(f"The functions were made anew: {changed}.", markup=False)
    if receipt.revisions:
        verb = "Applied" if receipt.action == "apply" else "Undid"
        out.print(
            f"{verb} {', '.join(receipt.revisions)}: tables locked for {receipt.locked_ms:.1f} ms, "
            f"{counted(receipt.attempts, 'attempt')}, {receipt.duration_ms / 1000:.1f} s in all"
            f"{', in two transactions' if receipt.two_transactions else ''}."
        )
        if receipt.adopted:
            out.print(f"  Adopted as they were: {_as_named(host, receipt.adopted)}.", markup=False)
        for blocker in receipt.waited_for:
            out.print(f"  Waited for {blocker}.", markup=False)
    for built in receipt.online:
        out.print(f"{built.outcome.capitalize()} {built.name} beside the traffic in {built.duration_ms / 1000:.1f} s.")
    for name in receipt.roles:
        out.print(
            f"The role {name} may write the whole tables again. It still has USAGE on their schema, and no TRIGGER on "
            "them, whatever it had before tallystick migrate sql --role. To change that: "
            f"{roles.left_behind(host, name)}",
            markup=False,
        )
    if receipt.action == "apply":
        out.print("Next: tallystick migrate status, or tallystick audit")
