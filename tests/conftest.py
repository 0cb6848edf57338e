"""A real PostgreSQL for every test that wants one, and migrated host apps in it."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from servers import major, pg_bin
from tallystick import Config, migrate
from tallystick.dev.postgres import Server
from tallystick.dev.throwaway import FOLDER_PREFIX, scratch_root, throwaway_server
from worlds import SHAPES, World, dispose_when_idle

for inherited in ("TALLYSTICK_PG_BIN", "TALLYSTICK_HOME"):
    os.environ.pop(inherited, None)  # a developer's own choice is not what is tested

# Children inherit what is ignored, as these are under nohup and in a script's background; commands are tried as a
# terminal starts them.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail each test that would be skipped")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Two workers for each processor (``-n auto``): a third of a test's time passes in waiting for others."""
    return 2 * (os.cpu_count() or 1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _failed_if_skipped(item.config, (yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _failed_if_skipped(collector.config, (yield))


def _failed_if_skipped(config: pytest.Config, report: Any) -> Any:
    """A skipped test fails where everything is installed, since nobody would notice it."""
    if report.skipped and config.getoption("no_skips"):
        report.outcome, report.longrepr = "failed", f"skipped, with --no-skips: {report.longrepr}"
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this PostgreSQL cannot have: nothing that somebody could install would bring it."""
    older = [item for item in items if any(major() < mark.args[0] for mark in item.iter_markers("since"))]
    if older:
        config.hook.pytest_deselected(items=older)
        items[:] = [item for item in items if item not in older]


@pytest.fixture
def needs_icu(server: Server) -> Callable[[], None]:
    """Skips the test where the server knows no collation of ICU's, and so none that takes two keys for one."""

    def check() -> None:
        with psycopg.connect(server.url(driver="")) as conn:
            if (
                conn.execute("SELECT FROM pg_collation WHERE collprovider = 'i' AND collname <> 'unicode'").rowcount
                == 0
            ):
                pytest.skip("the embedded PostgreSQL is built without ICU; Debian's has it (TALLYSTICK_TEST_PG=15)")

    return check


@pytest.fixture
def scratch() -> Iterator[Path]:
    """An empty folder for servers of a test's own; unlike ``tmp_path``, root's server can live there."""
    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=scratch_root()))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One server for each process of the test run, so that xdist's workers share nothing."""
    with throwaway_server(bin_dir=pg_bin()) as running:
        yield running


@pytest.fixture
def fresh_database(server: Server) -> Iterator[Callable[..., str]]:
    """``fresh_database(template=None) -> url``: a new database, empty or a copy, gone after the test."""
    made: list[str] = []

    def make(template: str | None = None) -> str:
        made.append(f"test_{uuid.uuid4().hex}")
        return server.create_database(made[-1], template=template)

    yield make
    for name in made:
        server.drop_database(name)


@pytest.fixture(scope="session")
def _templates(server: Server) -> Callable[[str], str]:
    """The name of a migrated, empty host app of a shape; migrated once, copied for each test."""
    made: dict[str, str] = {}

    def template(shape: str) -> str:
        if shape not in made:
            name = f"template_{shape}"
            url = server.create_database(name)
            host = SHAPES[shape].host
            with psycopg.connect(url.replace("+psycopg", "", 1)) as conn:
                conn.execute(SHAPES[shape].ddl)
            migrate.apply(url, Config(database_url=url, host=host), stall_budget_ms=10_000)  # nobody waits
            made[shape] = name
        return made[shape]

    return template


@pytest.fixture
def make_world(fresh_database: Callable[..., str], _templates: Callable[[str], str]) -> Iterator[Callable[..., World]]:
    """``make_world(shape="uuid", **settings) -> World``: a migrated host app of its own."""

    pools: list[sa.Engine] = []

    def make(shape: str = "uuid", **settings: Any) -> World:
        world = World(fresh_database(_templates(shape)), SHAPES[shape].host, pooled=True, **settings)
        pools.append(world.engine)  # a test may give its world another one
        return world

    yield make
    for pool in pools:
        dispose_when_idle(pool)


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    """The first user's host app: uuid keys, ``users`` and ``workshops``."""
    return make_world()


@pytest.fixture(params=SHAPES)
def any_world(request: pytest.FixtureRequest, make_world: Callable[..., World]) -> World:
    """Each shape of host app in turn."""
    return make_world(request.param)
