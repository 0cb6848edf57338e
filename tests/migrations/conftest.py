from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hosts import HOSTS, App

from tallystick import Config, HostMapping, migrate
from tallystick.cli import main
from tallystick.dev.postgres import Server


def app_in(url: str, ddl: str, mapping: HostMapping, server: Server) -> App:
    """An app in an empty database."""
    app = App(url, Config(database_url=url, host=mapping), server)
    with app.engine.begin() as conn:
        # as one message without parameters, so that a % in a name is a %
        assert conn.connection.dbapi_connection is not None
        conn.connection.dbapi_connection.cursor().execute(ddl)
    return app


@pytest.fixture(scope="session")
def _usual(server: Server) -> str:
    """The name of a database with the app of most tests, which is copied for each."""
    app_in(server.create_database("usual"), HOSTS["uuid"].ddl, HOSTS["uuid"].mapping, server)
    return "usual"


@pytest.fixture(scope="session")
def _migrated(server: Server) -> Callable[[str, HostMapping], str]:
    """The name of a database with a migrated app; migrated once, copied for each test."""
    made: dict[tuple[str, HostMapping], str] = {}

    def template(ddl: str, mapping: HostMapping) -> str:
        if (ddl, mapping) not in made:
            name = f"migrated_{len(made)}"
            url = app_in(server.create_database(name), ddl, mapping, server).url
            migrate.apply(url, Config(database_url=url, host=mapping), stall_budget_ms=10_000)  # nobody waits
            made[ddl, mapping] = name
        return made[ddl, mapping]

    return template


@pytest.fixture
def make_app(fresh_database: Callable[..., str], _usual: str, server: Server) -> Callable[..., App]:
    """``make_app(ddl, mapping) -> App``."""

    def make(ddl: str = HOSTS["uuid"].ddl, mapping: HostMapping = HOSTS["uuid"].mapping) -> App:
        if ddl == HOSTS["uuid"].ddl:
            url = fresh_database(_usual)
            return App(url, Config(database_url=url, host=mapping), server)
        return app_in(fresh_database(), ddl, mapping, server)

    return make


@pytest.fixture
def make_migrated(
    fresh_database: Callable[..., str], _migrated: Callable[[str, HostMapping], str], server: Server
) -> Callable[..., App]:
    """``make_migrated(ddl, mapping) -> App``: as ``make_app``, and migrated, for what is done to it afterwards."""

    def make(ddl: str = HOSTS["uuid"].ddl, mapping: HostMapping = HOSTS["uuid"].mapping) -> App:
        url = fresh_database(_migrated(ddl, mapping))
        return App(url, Config(database_url=url, host=mapping), server)

    return make


@pytest.fixture
def app(make_app: Callable[..., App]) -> App:
    """500 users and their workshops, with uuid keys."""
    return make_app()


@pytest.fixture
def migrated(make_migrated: Callable[..., App]) -> App:
    """The same, migrated."""
    return make_migrated()


@pytest.fixture
def tallystick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """``tallystick(app, "adopt") -> (code, out, err)``: a command of an app, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("DATABASE_URL_UNPOOLED", "TALLYSTICK_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(app: App, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setenv("DATABASE_URL", app.url)
        monkeypatch.setattr(sys, "argv", ["tallystick", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return (int(ended.value.code or 0), *capfd.readouterr())

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The stalls of live traffic, for a person to read."""
    rows = [
        (report.nodeid.rpartition("::")[2], value)
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "traffic" and report.when == "call"
    ]
    if rows:
        terminalreporter.section("live traffic during the migration")
        for test, value in rows:
            terminalreporter.line(f"{test}: {value}")
