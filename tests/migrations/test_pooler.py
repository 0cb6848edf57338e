"""A real PgBouncer in transaction mode: migrations refuse it and say what to do, the ledger does not mind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from hosts import App
from typer.testing import CliRunner

import bouncer
from delay import far_away
from tallystick import Ledger, migrate
from tallystick.audit import audit
from tallystick.cli import commands
from tallystick.errors import InsufficientCredits, PoolerRefused
from worlds import World

pytestmark = pytest.mark.skipif(bouncer.PROGRAM is None, reason="needs a real pgbouncer (apt-get install pgbouncer)")


@pytest.fixture
def pooled() -> Iterator[Callable[[str], str]]:
    """``pooled(url) -> url``: the same database through three server connections that all clients share."""
    with ExitStack() as running:

        @cache
        def through(url: str) -> str:
            return running.enter_context(bouncer.bouncing(url, connections=3))

        yield through


def test_migrations_refuse_it(app: App, pooled: Callable[[str], str]) -> None:
    before = app.shape()
    for change in (migrate.apply, migrate.undo):
        with pytest.raises(PoolerRefused, match="DATABASE_URL_UNPOOLED"):
            change(pooled(app.url), app.config)
    assert app.shape() == before

    engine = sa.create_engine(pooled(app.url), poolclass=sa.NullPool)
    with engine.connect() as conn:
        stops = [finding.text for finding in migrate.plan(conn, app.config).findings if finding.severity == "stop"]
    assert any("pooler" in text for text in stops)


@pytest.mark.parametrize("call", ["upgrade_revision", "upgrade_revision, online", "downgrade_revision"])
def test_the_hosts_own_alembic_is_refused_too(app: App, pooled: Callable[[str], str], call: str) -> None:
    before = app.shape()
    function, _, online = call.partition(", ")
    options = {"part": "online"} if online else {}
    engine = sa.create_engine(pooled(app.url), poolclass=sa.NullPool)
    if online:
        engine = engine.execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as conn:
        op = Operations(MigrationContext.configure(conn))
        with pytest.raises(PoolerRefused, match="DATABASE_URL_UNPOOLED"):
            getattr(migrate, function)(op, to="0001", config=app.config, **options)
    assert app.shape() == before


def test_commands_leave_no_prepared_statement_in_it(
    app: App, pooled: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Psycopg names those of each client alike, so those of the next client would collide with them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", pooled(app.url))
    for _ in range(2):
        for line in ("init --force", "doctor", "migrate plan", "migrate status"):
            result = CliRunner().invoke(commands(), line.split())
            refused = result.output + str(result.exception)
            assert "already exists" not in refused, line
            assert "pooler" in refused or line not in ("doctor", "migrate plan")
    engine = sa.create_engine(pooled(app.url), poolclass=sa.NullPool, connect_args={"prepare_threshold": None})
    with ExitStack() as held:  # every server connection of the pool
        for conn in [held.enter_context(engine.connect()) for _ in range(3)]:
            assert conn.scalars(sa.text("SELECT statement FROM pg_prepared_statements")).all() == []


def test_a_host_name_says_it_too(app: App) -> None:
    """Neon's pooled addresses; the name resolves to where there is a server, whatever it is called."""
    env = app.server.env
    with far_away(Path(env["PGHOST"]) / f".s.PGSQL.{env['PGPORT']}", one_way_s=0) as port:
        url = sa.make_url(app.url).set(host="ep-cool-1-pooler.eu.example", port=port, query={"hostaddr": "127.0.0.1"})
        with pytest.raises(PoolerRefused, match="the host is called ep-cool-1-pooler"):
            migrate.apply(url.render_as_string(hide_password=False), app.config)


def test_the_ledger_works_through_it(world: World, pooled: Callable[[str], str]) -> None:
    """Sixteen clients on three server connections, in transactions and without, with overdrafts and replays."""
    user = world.user(credits=40)
    # what a pooler hands to another client is no place for this client's prepared statements
    engine = sa.create_engine(pooled(world.url), poolclass=sa.NullPool, connect_args={"prepare_threshold": None})
    ledger = Ledger(world.config)

    def spend(client: int) -> int:
        done = 0
        for number in range(5):
            isolation = "AUTOCOMMIT" if client % 2 else "READ COMMITTED"
            key = f"{client}-{number // 2}"  # every second one is a replay
            with engine.connect().execution_options(isolation_level=isolation) as conn:
                with suppress(InsufficientCredits):
                    done += not ledger.consume(conn, user, key=key).replayed
                conn.commit()
        return done

    with ThreadPoolExecutor(16) as clients:
        spent = sum(clients.map(spend, range(16)))

    assert spent == 40
    with world.engine.connect() as conn:
        assert ledger.balance(conn, user) == 0
        assert not audit(conn, world.config).findings
