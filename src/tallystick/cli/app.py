"""The parts that all commands share: the database's address, and the output of results and errors."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, cast

import typer
from typer.core import TyperGroup

from tallystick.config import Config, origins
from tallystick.database import connect_driver, driver, server_message, standby
from tallystick.errors import DatabaseUnavailable, NotMigrated, OutcomeUnknown
from tallystick.progress import OnProgress
from tallystick.schema import changed_columns, mapping_of, with_stored_mapping

if TYPE_CHECKING:
    import psycopg
    import sqlalchemy as sa
    from rich.console import Console
    from rich.table import Table

    from tallystick.dev import postgres

EMBEDDED_DATABASE = "app"

C = TypeVar("C", bound=Union["sa.Connection", "psycopg.Connection[Any]"])
Connect = Callable[[str], AbstractContextManager[C]]
"""``database.connect`` or ``connect_driver``: one transaction on a connection of its own, committed at the end."""


_GLOBAL_OPTIONS = ("--config", "--database-url")


def without_global_options(args: Iterable[str]) -> tuple[list[str], list[str]]:
    """The global options with their values, wherever they stand, and the other words."""
    ours: list[str] = []
    others: list[str] = []
    rest = iter(args)
    for arg in rest:
        if arg == "--":
            others += [arg, *rest]
        elif arg in _GLOBAL_OPTIONS:
            value = next(rest, None)
            if value is None:
                return [*ours, arg], []  # the parser refuses it, unless another word follows
            ours += [arg, value]
        else:
            (ours if arg.startswith(tuple(f"{option}=" for option in _GLOBAL_OPTIONS)) else others).append(arg)
    return ours, others


class _Commands(TyperGroup):
    """The commands in the order in which a new user needs them."""

    def list_commands(self, ctx: Any) -> list[str]:
        panels = ("Begin here", "Credits", "Trust", "Development")

        def panel(name: str) -> int:
            return panels.index(getattr(self.commands[name], "rich_help_panel", None) or panels[-1])

        return sorted(super().list_commands(ctx), key=panel)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the global options also after a command."""
        if "--help" in args or not args[1:]:  # a group without a command shows its help too
            _show_flags_alone(self, ctx)
        ours, others = without_global_options(args)
        return super().parse_args(ctx, ours + others)


def _show_flags_alone(command: Any, ctx: Any) -> None:
    """Let the help show ``--json`` in place of ``--json <bool>``, since a flag takes no value."""
    for param in command.get_params(ctx):
        if getattr(param, "is_flag", False):
            param.metavar = ""
    for each in getattr(command, "commands", {}).values():
        _show_flags_alone(each, ctx)


def examples(*lines: str) -> str:
    """The end of a command's help: command lines to copy."""
    return "\n\n".join((f"[bold]{'Example' if len(lines) == 1 else 'Examples'}:[/]", *lines))


app = typer.Typer(
    cls=_Commands,
    name="tallystick",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Prepaid credits inside your app's own PostgreSQL, and an audit of every balance.\n\n"
    "Begin with [bold]tallystick init[/], then [bold]tallystick migrate plan[/] and "
    "[bold]tallystick migrate apply[/]. To see it all at work on a temporary database: [bold]tallystick demo[/].",
    epilog="The database's address is the first of these that is set: --database-url, TALLYSTICK_DATABASE_URL, "
    "database_url in tallystick.toml, DATABASE_URL. Without one, a command uses the embedded PostgreSQL of tallystick "
    "db start. Migrations and backups prefer DATABASE_URL_UNPOOLED.",
)


class _Lazy:
    """A console that is made when it is first used, since the import of rich takes as long as a short command."""

    def __init__(self, **options: Any) -> None:
        self._options = options

    @cached_property
    def _console(self) -> Console:
        from rich.console import Console  # noqa: PLC0415

        # With emoji=True the user "a:on:b" would be printed as "a🔛b".
        return Console(highlight=False, soft_wrap=True, emoji=False, **self._options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._console, name)


if os.environ.get("COLUMNS") == "0":  # as terminals of containers set it; rich would print nothing at all
    del os.environ["COLUMNS"]
# Without a terminal rich takes 80 columns, in which a table breaks ids that the next command needs.
_wide = sys.stdout is not None and not sys.stdout.isatty() and "COLUMNS" not in os.environ
out = cast("Console", _Lazy(width=160 if _wide else None))
err = cast("Console", _Lazy(stderr=True))


def escape(text: str) -> str:
    """A text without markup of rich's."""
    from rich.markup import escape  # noqa: PLC0415

    return escape(text)


_NO_ADDRESS = (
    "DATABASE_URL is not set. Set it to the address of the app's database, or pass --database-url. To try Tallystick "
    "on a PostgreSQL of its own, in this folder: tallystick db start"
)

_MESSAGE_MAX = 2_000  # a message may repeat an argument of 100,000 characters


def print_error(message: str) -> None:
    """Print an error on stderr, with any characters; a long one without its middle."""
    if len(message) > _MESSAGE_MAX:
        message = f"{message[: _MESSAGE_MAX // 2]} … {message[-_MESSAGE_MAX // 2 :]}"
    err.print(message, style="red", markup=False)


def counted(number: int, noun: str) -> str:
    """A number with its noun, as "1 user" and "1,234 users"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def note(message: str) -> None:
    """Print a note on stderr, since it is not part of the result."""
    err.print(message, style="dim", markup=False)


@dataclasses.dataclass
class Invocation:
    """The global options."""

    config_path: Path | None
    database_url: str | None
    _noted: set[str] = dataclasses.field(default_factory=set)

    def note_once(self, message: str) -> None:
        """Print a note on stderr, unless this command has: some connect more than once."""
        if message not in self._noted:
            self._noted.add(message)
            note(message)

    def config(self) -> Config:
        """The settings; an address on the command line has priority."""
        config = Config.load(self.config_path)
        return config if self.database_url is None else config.at(self.database_url)

    @contextmanager
    def database(self, *, migrating: bool = False) -> Iterator[Config]:
        """The settings with an address: the configured one, or the embedded server's, which runs meanwhile."""
        config = self.config()
        if migrating and config.database_url_unpooled:
            config = config.model_copy(update={"database_url": config.database_url_unpooled})
        elif migrating and config.database_url and os.environ.get("DATABASE_URL_UNPOOLED"):
            self.note_once("DATABASE_URL_UNPOOLED is not used: the database's address does not come from DATABASE_URL.")
        with ExitStack() as stack:
            if config.database_url is None:
                from tallystick.dev import postgres  # noqa: PLC0415 - few commands need a server of their own

                server = postgres.Server(postgres.default_folder())
                if not (server.made or os.environ.get("TALLYSTICK_HOME")):
                    raise DatabaseUnavailable(_NO_ADDRESS)
                stack.enter_context(server)
                self.note_once(f"No database address is set: using the embedded PostgreSQL in {server.folder}.")
                # one in the environment would be another database's
                config = config.model_copy(
                    update={"database_url": embedded_address(server), "database_url_replica": None}
                )
            yield config

    @contextmanager
    def connection(self, connect: Connect[C], *, only_reads: bool = False) -> Iterator[tuple[C, Config]]:
        """A connection of its own, in a transaction that is committed at the end.

        A command that only calls the ledger connects by ``connect_driver`` and needs no SQLAlchemy. With ``only_reads``
        it goes to the replica, if there is one, and a note gives its age.
        """
        with self.database() as config:
            replica = config.database_url_replica if only_reads else None
            with connect(replica or address(config)) as conn:
                if replica:
                    note(str(standby(conn) or f"{place(conn)}, which is no standby."))
                yield conn, config


@contextmanager
def reading() -> Iterator[None]:
    """For a command that only reads: after a lost connection nothing is unknown, and it is not said to have written."""
    try:
        yield
    except OutcomeUnknown as error:
        why = server_message(error.__cause__ or error).partition("\n")[0]
        raise DatabaseUnavailable(
            f"the connection was lost: {why}. Nothing was written; run the command again",
            sqlstate=error.sqlstate,
        ) from error


def with_mapping(conn: sa.Connection | psycopg.Connection[Any], config: Config, *, renews: bool = False) -> Config:
    """The settings, if they have no mapping with that of the database, if it is migrated.

    With ``renews`` theirs may name other columns that are only read. Raises HostMismatch, see
    ``schema.with_stored_mapping``.
    """
    try:
        if renews and "host" in config.model_fields_set:
            changed_columns(mapping_of(conn), config.host)
            return config
        return with_stored_mapping(conn, config)
    except NotMigrated:
        return config


def address(config: Config) -> str:
    """The address, which ``Invocation.database`` has set."""
    if config.database_url is None:
        raise DatabaseUnavailable(_NO_ADDRESS)
    return config.database_url


def place(conn: sa.Connection | psycopg.Connection[Any]) -> str:
    """The database's name, host and role, to be shown before a change; without a password."""
    info = driver(conn).info
    return f"Database {info.dbname} on {info.host or 'this machine'}:{info.port} as role {info.user}"


def mapping(ctx: typer.Context, config: Config) -> str:
    """The users' key column, and the setting that names it."""
    users = config.host.users
    stored = "the database" if "host" in config.model_fields_set else "defaults"
    origin = origins(invocation(ctx).config_path).get("host", stored)
    return f"users by {users.schema}.{users.table}.{users.key} ({origin})"


def embedded_address(server: postgres.Server) -> str:
    """The address of the embedded server's database ``app``, which is created if missing."""
    with connect_driver(server.url()) as conn:
        found = conn.execute("SELECT true FROM pg_database WHERE datname = %s", [EMBEDDED_DATABASE]).fetchone()
    return server.url(EMBEDDED_DATABASE) if found else server.create_database(EMBEDDED_DATABASE)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"tallystick {version('tallystick')}")
        raise typer.Exit


@app.callback()
def _begin(
    ctx: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="The settings file to read in place of tallystick.toml.", metavar="FILE"),
    ] = None,
    database_url: Annotated[
        str | None,
        typer.Option(
            "--database-url",
            help="The address of the app's database, postgresql://…. Put a password into DATABASE_URL instead.",
            metavar="URL",
        ),
    ] = None,
    _: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    ctx.obj = Invocation(config, database_url)


def invocation(ctx: typer.Context) -> Invocation:
    """The global options, with their type."""
    found = ctx.find_object(Invocation)
    if found is None:
        raise typer.BadParameter("commands are run through the tallystick app")
    return found


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
UserArgument = Annotated[
    str,
    typer.Argument(help="The user's key (the value in the mapped key column), or the e-mail address.", metavar="USER"),
]


def emit(result: Any, show: Callable[[], None], *, as_json: bool) -> None:
    """Print a result: as JSON for programs, or as ``show`` does for people."""
    if as_json:
        write_json(result, indent=2)
    else:
        show()
        sys.stdout.flush()


def write_json(result: Any, *, indent: int | None = None) -> None:
    """Write a result as JSON, valid in any encoding of stdout."""
    escaped = not (sys.stdout.encoding or "").lower().startswith("utf")
    sys.stdout.write(json.dumps(plain(result), indent=indent, ensure_ascii=escaped) + "\n")
    sys.stdout.flush()


def plain(value: Any) -> Any:
    """Dataclasses, moments, UUIDs and enums as types of JSON."""
    match value:
        case None | bool() | int() | float():
            return value
        case dict():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(item) for item in value]
        case dt.datetime():
            return value.isoformat()
        case _ if dataclasses.is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return str(value)


def table(*columns: str, right: tuple[str, ...] = (), title: str | None = None) -> Table:
    """A table in our style; columns named in ``right`` are right-aligned numbers."""
    from rich.table import Table  # noqa: PLC0415 - most commands print a line

    made = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


@contextmanager
def progress_bar(description: str) -> Iterator[OnProgress]:
    """A progress bar on stderr, removed at the end; called with each ``Progress``."""
    from rich.progress import (  # noqa: PLC0415 - few commands take so long
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    with bar:
        task = bar.add_task(description, total=None)
        yield lambda now: bar.update(task, completed=now.done, total=now.total)
