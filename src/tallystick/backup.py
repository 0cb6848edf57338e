"""A backup is one file that is whole or is not there: pg_dump through zstd, verified by reading it back.

The file is a zstd stream of pg_dump's custom format, so ``zstd -dc FILE | pg_restore`` reads it without Tallystick.
The manifest follows in a frame that zstd skips: the rows of each table and the dump's SHA-256.
"""

from __future__ import annotations

import codecs
import datetime as dt
import fcntl
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Self

import psycopg
import sqlalchemy as sa
import zstandard
from psycopg.sql import SQL, Identifier

from tallystick.database import connect, driver, refuse_hidden_rows, server_message, with_known_settings
from tallystick.errors import BackupError
from tallystick.migrate.host.blockers import exclusive_holders
from tallystick.progress import OnProgress, Progress, ignore_progress
from tallystick.signals import ended_by_signals

LEVEL = 3
CHUNK = 1 << 20
_SKIPPABLE = 0x184D2A50
_MARK = b"TALLYSTK"


@dataclass(frozen=True)
class Manifest:
    """The contents of a backup. ``rows`` is by table, as ``schema.table``; ``sha256`` is of the uncompressed dump.

    ``roles`` are all that own an object in it, have a privilege on one, or are named by a policy.
    """

    database: str
    server: str
    taken_at: str
    rows: Mapping[str, int]
    dump_bytes: int
    sha256: str
    roles: Sequence[str] = ()


@dataclass(frozen=True)
class Backup:
    """A verified file."""

    path: Path
    bytes: int
    manifest: Manifest


def backup(
    database: str,
    target: Path,
    *,
    bin_dir: Path,
    progress: OnProgress = ignore_progress,
    waiting: Callable[[str], None] = lambda _: None,
) -> Backup:
    """Write a verified backup to ``target``, which must not exist yet.

    Ctrl-C, SIGTERM and SIGHUP leave nothing; files that a killed run left in the same folder are removed.

    Args:
        database: its address; the password reaches pg_dump through the environment, never a command line.
        target: readable only by its owner. There is no file of this name until all is verified.
        bin_dir: where pg_dump and pg_restore are; their version must not be older than the server's.
        progress: called with the progress.
        waiting: called with the sessions that hold tables exclusively while it waits for one of them.

    Raises:
        BackupError, PermissionDenied: there is no backup; nothing is left.
    """
    if target.exists():
        raise BackupError(f"{target} is there already. Give another name; a backup is never overwritten")
    with ended_by_signals(), _unfinished(target) as (file, finish):
        manifest = _dump(database, file, bin_dir, progress, waiting)
        file.write(_frame(manifest))
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        found = _read_back(file, bin_dir, manifest, progress)
        if found != manifest.rows:
            raise BackupError(f"what was written does not hold what was read: {_difference(manifest.rows, found)}")
        finish()
    return Backup(target, target.stat().st_size, manifest)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a backup. Raises BackupError where the file is none, or cut off."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_MARK) - 4, os.SEEK_END)
            (size,) = struct.unpack("<I", file.read(4))
            if file.read() != _MARK:
                raise BackupError(f"{path} is not a backup of tallystick's, or not a complete one. Use another file")
            file.seek(-len(_MARK) - 4 - size, os.SEEK_END)
            return Manifest(**json.loads(file.read(size)))
    except FileNotFoundError:
        raise BackupError(f"there is no file {path}. Name an existing backup") from None
    except (OSError, struct.error, ValueError, TypeError) as error:
        raise BackupError(f"{path} cannot be read as a backup: {error}") from error


def verify_backup(path: Path, *, bin_dir: Path, progress: OnProgress = ignore_progress) -> Manifest:
    """Read all of a backup and compare it with its manifest. Raises BackupError."""
    manifest = read_manifest(path)
    with path.open("rb") as file:
        found = _read_back(file, bin_dir, manifest, progress)
    if found != manifest.rows:
        raise BackupError(f"{path} is damaged: {_difference(manifest.rows, found)}")
    return manifest


def restore(
    path: Path, database: str, *, bin_dir: Path, owners: bool = True, progress: OnProgress = ignore_progress
) -> Manifest:
    """Put a backup into an empty database, in one transaction, and count its rows.

    With ``owners`` off, everything belongs to the role that restores, and privileges and tablespaces are left out; a
    failure may leave the definitions there, so this is for a database that is thrown away.

    Raises:
        BackupError: the file is damaged, the database not empty, or its server too old for the programs in
            ``bin_dir``; nothing was changed.
    """
    read_manifest(path)  # a file that is no backup is refused before anything else
    with _reading(database) as conn:
        taken = conn.scalars(_TABLES).all()
        server = _server_major(conn)
    if server < _TIMEOUT_SINCE <= (ours := _major(bin_dir)):
        raise _too_new(ours, server)
    if taken:
        raise BackupError(f"the database is not empty: it has {taken[0]}. Restore into a new one, made by createdb")
    manifest = verify_backup(path, bin_dir=bin_dir, progress=progress)
    command = ["pg_restore", "--single-transaction", "--exit-on-error"]
    if not owners:
        plain = ["--no-owner", "--no-privileges", "--no-tablespaces"]
        _define(path, database, bin_dir, manifest, plain)
        command += [*plain, "--section=data", "--section=post-data"]
    # a conninfo without a name: the name, as all else, comes from the environment
    command.append("--dbname=application_name=tallystick")
    with (
        ended_by_signals(),
        path.open("rb") as file,
        _Program(bin_dir, command, database) as program,
    ):
        program.feed(_decompressed(file, manifest, "restoring", progress))
        program.end()
    with _reading(database) as conn:
        found = _count(conn)
    if found != manifest.rows:
        raise BackupError(f"the restored database differs: {_difference(manifest.rows, found)}")
    return manifest


# pg_dump of minor releases from November 2026 on writes this for every column, and older servers refuse it.
_NOTED = re.compile(rb"^ALTER TABLE ONLY .* SET \(pg_attver=\d+\);\n", re.MULTILINE)
_RESTRICTED = re.compile(rb"^\\(?:un)?restrict \w+\n", re.MULTILINE)


def _define(path: Path, database: str, bin_dir: Path, manifest: Manifest, options: Sequence[str]) -> None:
    """Create the tables and all else that comes before rows, without options that this server does not know."""
    command = ["pg_restore", "--section=pre-data", "--file=-", *options]
    with (
        path.open("rb") as file,
        _Program(bin_dir, command) as program,
        program.fed(_decompressed(file, manifest, "restoring", ignore_progress)),
    ):
        script = program.stdout.read()
    with connect(database) as conn:
        raw = conn.connection.dbapi_connection
        assert isinstance(raw, psycopg.Connection)  # noqa: S101  # our own engine's
        try:
            raw.execute(_RESTRICTED.sub(b"", _NOTED.sub(b"", script)), prepare=False)
        except psycopg.Error as error:
            raise BackupError(f"the copy's definitions could not be made: {error}") from error


def make_roles(path: Path, database: str) -> None:
    """Create the roles of a backup that this server does not have, without login and privileges."""
    with connect(database) as conn:
        there = set(conn.scalars(sa.text("SELECT rolname FROM pg_roles")))
        for name in read_manifest(path).roles:
            if name not in there and not name.startswith("pg_"):  # pg_* are PostgreSQL's own
                conn.exec_driver_sql(SQL("CREATE ROLE {} NOLOGIN").format(Identifier(name)).as_string())


_TIMEOUT_SINCE = 17


def _too_new(programs: int, server: int) -> BackupError:
    return BackupError(
        f"pg_restore {programs} sets transaction_timeout, which PostgreSQL {server} does not know. Back up and restore "
        f"with that version's own programs: TALLYSTICK_PG_BIN=/usr/lib/postgresql/{server}/bin"
    )


@dataclass(frozen=True)
class Programs:
    """A folder with pg_dump and pg_restore of one major version."""

    folder: Path
    major: int

    def __str__(self) -> str:
        return f"PostgreSQL {self.major}'s programs in {self.folder}"


def programs_for(database: str, folders: Iterable[Path], *, restoring: bool = False) -> Programs:
    """The programs to use for this server, of those in ``folders``, in the order of preference.

    To back up: the lowest version that is not older than the server, so that an equally old server can read the file
    again. To restore: the newest that the server understands, since it reads the most files.

    Raises:
        BackupError: there is none, with what to install.
    """
    with connect(database) as conn:
        server = _server_major(conn)
    found = [Programs(folder, _major(folder)) for folder in dict.fromkeys(folders)]
    if restoring:
        understood = [one for one in found if server >= _TIMEOUT_SINCE or one.major < _TIMEOUT_SINCE]
        if understood:
            return max(understood, key=lambda one: one.major)
        if found:
            raise _too_new(min(one.major for one in found), server)
    elif new_enough := [one for one in found if one.major >= server]:
        return min(new_enough, key=lambda one: one.major)
    have = ", ".join(str(one) for one in found) or "none"
    raise BackupError(
        f"PostgreSQL {server} needs the programs of its own version or a later one; found: {have}. Install "
        f"postgresql-client-{server}, or name their folder with TALLYSTICK_PG_BIN"
    )


def newest_programs(folders: Iterable[Path]) -> Programs:
    """The newest programs, which read the most files. Raises BackupError where there are none."""
    found = [Programs(folder, _major(folder)) for folder in dict.fromkeys(folders)]
    if not found:
        raise BackupError(
            "there is no pg_restore to read it with. Install PostgreSQL's client programs, or name their folder with "
            "TALLYSTICK_PG_BIN"
        )
    return max(found, key=lambda one: one.major)


def installed() -> list[Path]:
    """Folders with pg_dump and pg_restore: Debian's folders, Red Hat's, pg_config's, and on PATH."""
    folders = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr").glob("pgsql-*/bin")]
    if pg_config := shutil.which("pg_config"):
        output = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)  # noqa: S603 - from PATH
        folders += [Path(output.stdout.strip())] if output.returncode == 0 else []
    if on_path := shutil.which("pg_dump"):
        folders.append(Path(on_path).resolve().parent)  # Debian's own is a link to a script that chooses by cluster
    return [folder for folder in folders if all((folder / name).is_file() for name in ("pg_dump", "pg_restore"))]


def _server_major(conn: sa.Connection) -> int:
    return driver(conn).info.server_version // 10_000


def _major(bin_dir: Path) -> int:
    """The major version of the programs in a folder."""
    try:
        command = [str(bin_dir / "pg_restore"), "--version"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603 - as named
    except (OSError, subprocess.CalledProcessError) as error:
        raise BackupError(f"{bin_dir / 'pg_restore'} cannot be run: {error}. Set TALLYSTICK_PG_BIN") from error
    found = re.search(r"\d+", output)
    if found is None:
        raise BackupError(f"{bin_dir / 'pg_restore'} --version said {output!r}. Set TALLYSTICK_PG_BIN")
    return int(found[0])


@contextmanager
def _reading(database: str) -> Iterator[sa.Connection]:
    """A transaction that may take as long as a dump, whatever timeouts the role or the database has."""
    try:
        with connect(database) as conn:
            timeouts = ["statement_timeout", "idle_in_transaction_session_timeout"]
            timeouts += ["transaction_timeout"] if _server_major(conn) >= _TIMEOUT_SINCE else []
            for name in timeouts:  # by SET: after a query the isolation level could not be set any more
                conn.exec_driver_sql(SQL("SET LOCAL {} = 0").format(Identifier(name)).as_string())
            yield conn
    except sa.exc.DBAPIError as error:
        if error.connection_invalidated:
            raise BackupError(
                f"the database stopped answering: {server_message(error)}. Run the same command again"
            ) from error
        raise BackupError(
            f"the database refused: {server_message(error)}. Mend that, or connect as who owns all of it"
        ) from error


def _dump(
    database: str, file: IO[bytes], bin_dir: Path, progress: OnProgress, waiting: Callable[[str], None]
) -> Manifest:
    """Write the dump and count the rows, in one snapshot."""
    hasher = hashlib.sha256()
    size = 0
    with _reading(database) as conn, _telling_who_is_waited_for(conn, waiting):
        conn.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
        _refuse_unreadable(conn)
        snapshot = conn.scalar(sa.text("SELECT pg_export_snapshot()"))
        expected = conn.scalar(_HEAP_BYTES) or 1
        command = ["pg_dump", "--format=custom", "--compress=0", f"--snapshot={snapshot}"]
        compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)
        with (
            _Program(bin_dir, command, database) as program,
            compressor.stream_writer(file, closefd=False) as writer,
        ):
            while part := program.stdout.read(CHUNK):
                hasher.update(part)
                size += len(part)
                writer.write(part)
                progress(Progress("dumping", min(1.0, size / expected), 1))
            program.end()
        progress(Progress("counting rows"))
        rows = _count(conn)
        version = conn.scalar(sa.text("SELECT current_setting('server_version')")) or ""
        name = conn.scalar(sa.text("SELECT current_database()")) or ""
        roles = list(conn.scalars(_ROLES))
    taken_at = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    return Manifest(name, version, taken_at, rows, size, hasher.hexdigest(), roles)


@contextmanager
def _telling_who_is_waited_for(conn: sa.Connection, waiting: Callable[[str], None]) -> Iterator[None]:
    """Call ``waiting`` when this session or pg_dump waits for a table, and when others hold it than before."""
    ended = threading.Event()
    pid = driver(conn).info.backend_pid

    def watch() -> None:
        told: set[tuple[int, str | None]] = set()
        autocommitting = conn.engine.execution_options(isolation_level="AUTOCOMMIT")
        with suppress(sa.exc.SQLAlchemyError), with_known_settings(autocommitting).connect() as side:
            while not ended.wait(_LOOK_EVERY_S):
                holders = exclusive_holders(side) if side.scalar(_WAITS, {"pid": pid}) else []
                now = {(holder.pid, holder.gid) for holder in holders}
                if now - told:
                    waiting("; ".join(map(str, holders)))
                told = now

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()


_LOOK_EVERY_S = 1.0

_WAITS = sa.text("""
    SELECT EXISTS (
      SELECT FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
      WHERE NOT l.granted AND l.locktype = 'relation' AND (l.pid = :pid OR a.application_name = 'pg_dump'))
""")


def _refuse_unreadable(conn: sa.Connection) -> None:
    """Raise BackupError or PermissionDenied if this role cannot read all of it; pg_dump would name one table alone."""
    lacking = conn.execute(_UNREADABLE).all()
    if lacking:
        role = lacking[0].role
        names = [row.shown for row in lacking]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        grants = dict.fromkeys(row.remedy for row in lacking) if not more else {}
        raise BackupError(
            f"{role} may not read {', '.join(names[:_NAMED])}{more}. "
            + (f"Let the owner run: {'; '.join(grants)}. Or let" if grants else "Let")
            + f" an administrator run: GRANT pg_read_all_data TO {role}"
        )
    if tables := [(row.schema, row.table) for row in conn.execute(_TABLES)]:
        refuse_hidden_rows(conn, tables, "whether the backup is whole")


_NAMED = 5

# pg_dump locks each table and reads each sequence
_UNREADABLE = sa.text("""
    SELECT quote_ident(current_user) AS role, o.shown,
           'GRANT ' || o.grant || ' ' || o.shown || ' TO ' || quote_ident(current_user) AS remedy
    FROM (
      SELECT n.oid, quote_ident(n.nspname) AS shown, 'USAGE ON SCHEMA' AS grant, n.nspname AS schema,
             has_schema_privilege(n.oid, 'USAGE') AS reads
      FROM pg_namespace n
      UNION ALL
      SELECT c.oid, quote_ident(n.nspname) || '.' || quote_ident(c.relname),
             CASE c.relkind WHEN 'S' THEN 'SELECT ON SEQUENCE' ELSE 'SELECT ON' END, n.nspname,
             CASE c.relkind WHEN 'S' THEN has_sequence_privilege(c.oid, 'SELECT')
                            ELSE has_table_privilege(c.oid, 'SELECT') END
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p', 'S')
    ) o
    WHERE NOT o.reads AND o.schema <> 'information_schema' AND o.schema !~ '^pg_'
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = o.oid AND d.deptype = 'e')
    ORDER BY o.shown
""")


def _read_back(file: IO[bytes], bin_dir: Path, manifest: Manifest, progress: OnProgress) -> dict[str, int]:
    """Count the rows that pg_restore reads from the file, and compare its checksum.

    Only tables of the manifest count: the file also has rows of tables that belong to extensions.
    """
    command, parts = ["pg_restore", "--file=-", "--data-only"], _decompressed(file, manifest, "verifying", progress)
    with _Program(bin_dir, command) as program, program.fed(parts):
        rows = _rows_of(program.stdout)
    return {table: rows.get(_unquoted(table), 0) for table in manifest.rows}


def _decompressed(file: IO[bytes], manifest: Manifest, what: str, progress: OnProgress) -> Iterator[bytes]:
    """The dump, piece by piece. Raises BackupError at the end where its checksum differs."""
    hasher = hashlib.sha256()
    size = 0
    try:
        with zstandard.ZstdDecompressor().stream_reader(file, closefd=False) as reader:
            while part := reader.read(CHUNK):
                hasher.update(part)
                size += len(part)
                progress(Progress(what, min(1.0, size / max(1, manifest.dump_bytes)), 1))
                yield part
    except zstandard.ZstdError as error:
        raise BackupError(f"the backup is damaged: {error}") from error
    if hasher.hexdigest() != manifest.sha256:
        raise BackupError(f"the backup is damaged: SHA-256 {hasher.hexdigest()}, expected {manifest.sha256}")


class _Program:
    """One of PostgreSQL's programs between two pipes. It never outlives the block, and its errors are raised."""

    def __init__(self, bin_dir: Path, command: Sequence[str], database: str | None = None) -> None:
        self.name = command[0]
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed by __exit__
        try:
            self._process = subprocess.Popen(  # noqa: S603  # our own arguments, and no shell
                [str(bin_dir / self.name), *command[1:]],
                env=os.environ | (_environment(database) if database else {}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
            )
        except OSError as error:
            self._stderr.close()
            raise BackupError(f"{bin_dir / self.name} cannot be run: {error.strerror}") from error
        assert self._process.stdin is not None  # noqa: S101
        assert self._process.stdout is not None  # noqa: S101
        self.stdin, self.stdout = self._process.stdin, self._process.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        with suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.close()
        self._process.wait()
        self._stderr.close()

    def kill(self) -> None:
        """End it, unless it has ended."""
        if self._process.poll() is None:
            self._process.kill()

    def feed(self, parts: Iterable[bytes]) -> None:
        """Write all of it, unless the program ends before; ``end`` then says why."""
        try:
            for part in parts:
                self.stdin.write(part)
            self.stdin.close()
        except BrokenPipeError:
            pass
        except BaseException:
            self._process.kill()  # it must not take a truncated input for the whole
            raise

    @contextmanager
    def fed(self, parts: Iterable[bytes]) -> Iterator[None]:
        """Write all of it in a thread, for a block that reads the output, then wait for the program's end."""
        with ThreadPoolExecutor(1) as pool:
            feeding = pool.submit(self.feed, parts)
            try:
                yield
            except BaseException:
                self.kill()  # or the pool would wait for ever for output that nobody reads
                raise
            feeding.result()
            self.end()

    def end(self) -> None:
        """Wait for it. Raises BackupError with its error output where it failed."""
        if not self.stdin.closed:
            with suppress(BrokenPipeError):
                self.stdin.close()
        while self.stdout.read(CHUNK):
            pass
        if self._process.wait() != 0:
            self._stderr.seek(0)
            output = self._stderr.read().decode(errors="replace").strip()
            raise BackupError(f"{self.name} failed: {output or f'exit code {self._process.returncode}'}")


def _environment(database: str) -> dict[str, str]:
    """The address as libpq's variables: a command line can be read by everyone on the machine."""
    url = sa.make_url(database)
    known = {option.keyword: option.envvar for option in psycopg.pq.Conninfo.get_defaults()}
    _, given = url.get_dialect()().create_connect_args(url)  # it also handles several hosts
    return {
        envvar.decode(): str(value)
        for name, value in given.items()
        if value is not None and (envvar := known.get(name.encode())) is not None
    }


_NAME = r'(?:"(?:[^"]|"")*"|[^\s"(),.;]+)'
_COPY = re.compile(rf"COPY ({_NAME}\.{_NAME}) (?:\({_NAME}(?:, {_NAME})*\))? FROM stdin;\n")

_ENCODING = re.compile(rb"SET client_encoding = '(\w+)';\n")


def _codec(encoding: str) -> str:
    """Python's name of a database's encoding: WIN1252 and KOI8R are cp1252 and koi8_r."""
    name = encoding.replace("WIN", "cp").replace("KOI8", "koi8_")
    try:
        return codecs.lookup(name).name
    except LookupError:
        return "utf-8"


def _unquoted(table: str) -> tuple[str, ...]:
    """Schema and table, without quotes: versions differ in the names that they quote."""
    return tuple(name[1:-1].replace('""', '"') if name.startswith('"') else name for name in re.findall(_NAME, table))


def _rows_of(script: IO[bytes]) -> dict[tuple[str, ...], int]:
    """Rows by table, from the COPY blocks of a script, in which each row is one line."""
    rows: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] | None = None
    codec = "utf-8"
    for line in script:
        if table is None:
            if found_encoding := _ENCODING.fullmatch(line):
                codec = _codec(found_encoding[1].decode())
            if not line.startswith(b"COPY "):
                continue
            statement = line
            while statement.count(b'"') % 2:  # a name may contain a newline
                statement += next(script)
            if found := _COPY.fullmatch(statement.decode(codec, "replace")):
                table = _unquoted(found[1])
                rows[table] = 0
        elif line == b"\\.\n":
            table = None
        else:
            rows[table] += 1
    return rows


_TABLES = sa.text("""
    SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS shown, n.nspname AS schema, c.relname AS table
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                      AND d.deptype = 'e')
    ORDER BY 1
""")

_ROLES = sa.text("""
    SELECT DISTINCT r.rolname FROM pg_shdepend d JOIN pg_roles r ON r.oid = d.refobjid
    WHERE d.refclassid = 'pg_authid'::regclass AND d.dbid = (SELECT oid FROM pg_database
                                                             WHERE datname = current_database())
    ORDER BY 1
""")

_HEAP_BYTES = sa.text("""
    SELECT sum(pg_table_size(c.oid))::bigint FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
""")


def _count(conn: sa.Connection) -> dict[str, int]:
    """The rows of every table, by its quoted name; exact, so a scan of each."""
    counts = {}
    for row in conn.execute(_TABLES).all():
        table = sa.table(row.table, schema=row.schema)
        # as pg_dump copies them: without the rows of tables that inherit from it
        rows = sa.select(sa.func.count()).select_from(table).with_hint(table, "ONLY", "postgresql")
        counts[row.shown] = conn.scalar(rows) or 0
    return counts


def _difference(expected: Mapping[str, int], found: Mapping[str, int]) -> str:
    tables = sorted({*expected, *found})
    wrong = [table for table in tables if expected.get(table) != found.get(table)]
    return ", ".join(f"{table} has {found.get(table, 'no')} rows instead of {expected.get(table)}" for table in wrong)


def _frame(manifest: Manifest) -> bytes:
    """A frame that zstd skips: the manifest, its length and our mark, to be found from the end."""
    text = json.dumps(asdict(manifest)).encode()
    body = text + struct.pack("<I", len(text)) + _MARK
    return struct.pack("<II", _SKIPPABLE, len(body)) + body


_PARTIAL = ".tallystick-partial"


def _new_partial(target: Path) -> tuple[int, Path]:
    """A file beside the target, 0600, locked while it is open, so that other runs do not remove it."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=_PARTIAL, dir=target.parent)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_nlink:
                _try_a_link(Path(name))
                return handle, Path(name)
        except BlockingIOError:
            pass
        except BaseException:
            os.close(handle)
            Path(name).unlink(missing_ok=True)
            raise
        os.close(handle)  # another run removed it before it was locked


def _try_a_link(partial: Path) -> None:
    """Give the finished file its name without ever overwriting one, also on a file system without hard links."""
    probe = partial.with_name(f"{partial.name.removesuffix(_PARTIAL)}.link{_PARTIAL}")
    try:
        os.link(partial, probe)
        probe.unlink()
    except OSError as error:
        raise BackupError(
            f"{partial.parent} is on a file system without hard links ({error.strerror}), where a backup could "
            "overwrite a file. Name a folder on another one, and move the file afterwards"
        ) from error


def _remove_leftovers(folder: Path) -> None:
    """Unfinished files of killed runs. One that another run still writes is locked, and stays."""
    for path in folder.glob(f".*{_PARTIAL}"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@contextmanager
def _unfinished(target: Path) -> Iterator[tuple[IO[bytes], Callable[[], None]]]:
    """A new file beside the target, 0600; it takes the target's name when finished, and is removed otherwise."""
    try:
        _remove_leftovers(target.parent)
        handle, partial = _new_partial(target)
    except OSError as error:
        raise BackupError(f"{target.parent}: {error.strerror}. Name a folder that can be written to") from error

    def finish() -> None:
        try:
            os.link(partial, target)  # unlike a rename, it never overwrites
        except FileExistsError:
            raise BackupError(f"{target} has come meanwhile. Give another name") from None
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    try:
        # close() inside the try: it writes the rest of the buffer
        with os.fdopen(handle, "w+b") as file:
            yield file, finish
    except OSError as error:
        raise BackupError(f"{target}: {error.strerror or error}. Nothing was left there") from error
    finally:
        partial.unlink(missing_ok=True)  # another run may have removed it already
