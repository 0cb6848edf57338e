from __future__ import annotations

from collections.abc import Callable

import pytest
from hosts import HOSTS, App

from tallystick import Config, HostMapping
from tallystick.dev.postgres import Server


@pytest.fixture
def make_app(fresh_database: Callable[..., str], server: Server) -> Callable[..., App]:
    """``make_app(ddl, mapping) -> App``."""

    def make(ddl: str = HOSTS["uuid"].ddl, mapping: HostMapping = HOSTS["uuid"].mapping) -> App:
        url = fresh_database()
        app = App(url, Config(database_url=url, host=mapping), server)
        with app.engine.begin() as conn:
            # as one message without parameters, so that a % in a name is a %
            assert conn.connection.dbapi_connection is not None
            conn.connection.dbapi_connection.cursor().execute(ddl)
        return app

    return make


@pytest.fixture
def app(make_app: Callable[..., App]) -> App:
    """500 users and their workshops, with uuid keys."""
    return make_app()


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
