"""A server that is not ready yet, as one that sleeps when idle: waited for; a refusal that will not pass is not."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from hosts import HOSTS, App
from psycopg import pq

from delay import far_away
from tallystick import Config, migrate
from tallystick.database import connect
from tallystick.dev.postgres import Server
from tallystick.errors import DatabaseUnavailable

SSL_REQUEST, GSS_REQUEST = 80877103, 80877104


def socket_of(app: App) -> Path:
    return Path(app.server.env["PGHOST"]) / f".s.PGSQL.{app.server.env['PGPORT']}"


def url_through(app: App, port: int) -> str:
    return sa.make_url(app.url).set(host="127.0.0.1", port=port, query={}).render_as_string(hide_password=False)


@contextmanager
def proxy_refusing(message: str) -> Iterator[int]:
    """A server as Neon's proxy is while it cannot reach a compute: it accepts the connection and answers XX000.

    Gives its port. With no message it hangs up instead.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):  # the listener was closed
                while True:
                    client, _ = listener.accept()
                    with client, suppress(OSError, struct.error):
                        while message:
                            length, code = struct.unpack("!II", client.recv(8))
                            if code not in (SSL_REQUEST, GSS_REQUEST):
                                client.recv(length - 8)
                                fields = b"".join(
                                    kind + text + b"\0"
                                    for kind, text in ((b"S", b"ERROR"), (b"C", b"XX000"), (b"M", message.encode()))
                                )
                                client.sendall(b"E" + struct.pack("!I", len(fields) + 5) + fields + b"\0")
                                break
                            client.sendall(b"N")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture
def waking() -> Iterator[
    Callable[..., tuple[threading.Event, list[migrate.MigrationProgress], Callable[[], migrate.Receipt]]]
]:
    """``waking(url, config) -> (told, seen, result)``: a run in the background that is told to wait."""
    with ThreadPoolExecutor(1) as pool:

        def start(
            url: str, config: Config
        ) -> tuple[threading.Event, list[migrate.MigrationProgress], Callable[[], migrate.Receipt]]:
            reported = threading.Event()
            seen: list[migrate.MigrationProgress] = []

            def progress(now: migrate.MigrationProgress) -> None:
                seen.append(now)
                if now.phase == "connecting":
                    reported.set()

            run = pool.submit(migrate.apply, url, config, progress=progress)
            return reported, seen, lambda: run.result(120)

        yield start


def test_a_server_that_is_starting_up(scratch: Path, server: Server, waking) -> None:
    """A real one, that answers 57P03 until it is told to go on."""
    settings = {"fsync": "off", "hot_standby": "off"}
    with Server(scratch, settings=settings, bin_dir=server.bin) as own:
        url = own.create_database("app")
        app = App(url, Config(database_url=url, host=HOSTS["uuid"].mapping), own)
        app.run(*HOSTS["uuid"].ddl.split(";")[:-1])
    own._run("/bin/sh", "-c", "touch data/standby.signal")
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(own.start)
        try:
            conninfo = own.url("app", driver="").encode()
            deadline = time.monotonic() + 60
            while pq.PGconn.ping(conninfo) != pq.Ping.REJECT:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            reported, seen, result = waking(app.url, app.config)
            assert reported.wait(60)
        finally:
            own._run("pg_ctl", "-D", "data", "promote")
            starting.result(120)
    try:
        assert result().changed
        # two of its sentences, by how far it has come
        assert re.search("is starting up|not accepting connections", str(seen[0].detail))
    finally:
        own.stop()


def test_a_server_that_is_not_there_yet(app: App, waking) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        port = found.getsockname()[1]
    reported, seen, result = waking(url_through(app, port), app.config)
    assert reported.wait(60)
    with far_away(socket_of(app), one_way_s=0, port=port):
        assert result().changed
    assert "refused" in str(seen[0].detail)


@pytest.mark.parametrize("message", ["Couldn't connect to compute node", "Control plane request failed", ""])
def test_a_proxy_whose_server_wakes(app: App, waking, message: str) -> None:
    with proxy_refusing(message) as port:
        reported, seen, result = waking(url_through(app, port), app.config)
        assert reported.wait(60)
    with far_away(socket_of(app), one_way_s=0, port=port):
        assert result().changed
    assert message in str(seen[0].detail)


def test_a_refusal_that_will_not_pass(app: App) -> None:
    seen: list[migrate.MigrationProgress] = []
    with (
        proxy_refusing("Control plane request failed: endpoint is disabled") as port,
        pytest.raises(DatabaseUnavailable, match="endpoint is disabled"),
    ):
        migrate.apply(url_through(app, port), app.config, progress=seen.append)
    assert seen == []


def test_a_wrong_password_is_not_tried_again(scratch: Path, server: Server) -> None:
    with Server(scratch, settings={"fsync": "off"}, bin_dir=server.bin) as own:
        own._run(
            "/bin/sh",
            "-c",
            "(echo local all guarded scram-sha-256; cat data/pg_hba.conf) >new && mv new data/pg_hba.conf",
        )
        url = own.create_database("app")
        with psycopg.connect(own.url(driver=""), autocommit=True) as conn:
            conn.execute("CREATE ROLE guarded LOGIN PASSWORD 'right'")
            conn.execute("SELECT pg_reload_conf()")
        wrong = sa.make_url(url).set(username="guarded", password="wrong").render_as_string(hide_password=False)
        seen: list[migrate.MigrationProgress] = []
        deadline = time.monotonic() + 60
        while True:  # until the new rule counts
            try:
                with connect(wrong):
                    assert time.monotonic() < deadline
            except DatabaseUnavailable:
                break
        with pytest.raises(DatabaseUnavailable, match="password authentication failed"):
            migrate.apply(wrong, Config(database_url=wrong, host=HOSTS["uuid"].mapping), progress=seen.append)
        assert seen == []


def test_patience_ends(app: App) -> None:
    messages: list[str] = []
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        port = found.getsockname()[1]
    with (
        pytest.raises(DatabaseUnavailable, match="cannot connect"),
        connect(url_through(app, port), patience_s=1, waiting=messages.append),
    ):
        pass
    assert messages


def test_without_patience_it_is_said_at_once(app: App) -> None:
    messages: list[str] = []
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        port = found.getsockname()[1]
    with pytest.raises(DatabaseUnavailable), connect(url_through(app, port), waiting=messages.append):
        pass
    assert messages == []
