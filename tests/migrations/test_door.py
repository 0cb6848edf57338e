"""Our revision inside a host's own Alembic history, run by Alembic."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config as AlembicConfig
from hosts import HOSTS, App

from tallystick import migrate
from tallystick.config import to_toml
from tallystick.errors import LedgerNotEmpty, MigrationError

ENV = """
from alembic import context
import sqlalchemy as sa
url = context.config.get_main_option("sqlalchemy.url")
if context.is_offline_mode():
    context.configure(url=url, literal_binds=True, dialect_opts={{"paramstyle": "named"}})
    with context.begin_transaction():
        context.run_migrations()
else:
    with sa.create_engine(url, poolclass=sa.NullPool).connect() as connection:
        context.configure(connection=connection, transaction_per_migration=True)
        with context.begin_transaction():
            context.run_migrations()
"""
REVISION = """
from alembic import op
from tallystick.migrate import downgrade_revision, upgrade_revision
revision, down_revision = {revision!r}, {down!r}
def upgrade():
    {code}
def downgrade():
    {back}
"""
SCHEMA = "upgrade_revision(op, to='0001')"
ONLINE = "upgrade_revision(op, to='0001', part='online')"
ALL = (
    *(f"upgrade_revision(op, to={revision.revision!r})" for revision in migrate.revisions()),
    *(
        f"with op.get_context().autocommit_block(): upgrade_revision(op, to={revision.revision!r}, part='online')"
        for revision in migrate.revisions()
    ),
)


BACKS = [f"downgrade_revision(op, to={revision.down_revision!r})" for revision in migrate.revisions()]


def history(
    app: App, folder: Path, monkeypatch: pytest.MonkeyPatch, *bodies: str, backs: Sequence[str] = ()
) -> AlembicConfig:
    """One revision for each body, with what its ``downgrade()`` does."""
    (folder / "host" / "versions").mkdir(parents=True)
    (folder / "tallystick.toml").write_text(to_toml(app.config.host))
    (folder / "host" / "env.py").write_text(ENV.replace("{{", "{").replace("}}", "}"))
    for number, (body, back) in enumerate(itertools.zip_longest(bodies, backs, fillvalue="pass")):
        code = REVISION.format(revision=f"h{number}", down=f"h{number - 1}" if number else None, code=body, back=back)
        (folder / "host" / "versions" / f"h{number}.py").write_text(code)
    monkeypatch.chdir(folder)
    config = AlembicConfig(output_buffer=io.StringIO())
    config.set_main_option("script_location", str(folder / "host"))
    config.set_main_option("sqlalchemy.url", app.url.replace("%", "%%"))
    return config


def without_its_own(shape: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Without the version table of the host's Alembic."""
    return {(kind, text) for kind, text in shape if "alembic_version" not in text}


def test_both_parts_end_as_apply_does(app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alembic = history(app, tmp_path, monkeypatch, *ALL, "op.execute('SELECT 1')")
    command.upgrade(alembic, "head")

    with app.engine.connect() as conn:
        assert migrate.status(conn, app.config).healthy
    assert not migrate.apply(app.url, app.config).changed
    assert app.value("SELECT version_num FROM alembic_version") == f"h{len(ALL)}"


def test_it_is_all_or_nothing_with_the_hosts_revision(
    app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = app.shape()
    alembic = history(app, tmp_path, monkeypatch, f"{SCHEMA}; op.execute('SELECT 1 / 0')")
    with pytest.raises(sa.exc.DataError, match="division by zero"):
        command.upgrade(alembic, "head")
    assert without_its_own(app.shape()) == before


def test_concurrently_is_refused_in_a_transaction(app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alembic = history(app, tmp_path, monkeypatch, SCHEMA, ONLINE)
    with pytest.raises(MigrationError, match=r"autocommit_block\(\):\n .*part=\"online\""):
        command.upgrade(alembic, "head")


def test_an_interrupted_build_is_repaired_and_settings_of_the_hosts_session_stay(
    migrated: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = migrated.shape()
    migrated.run(
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'tallystick_users_stripe_customer_id'::regclass"
    )
    check = f"op.execute(\"SET lock_timeout = '7s'\"); {ONLINE}; "
    check += "op.execute(\"CREATE TABLE seen AS SELECT current_setting('lock_timeout') AS value\")"
    body = f"with op.get_context().autocommit_block(): {check}"
    command.upgrade(history(migrated, tmp_path, monkeypatch, body), "head")
    assert migrated.value("SELECT value FROM seen") == "7s"
    migrated.run("DROP TABLE seen")
    assert without_its_own(migrated.shape()) == without_its_own(after)


def test_the_schema_is_refused_outside_of_one(app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alembic = history(app, tmp_path, monkeypatch, f"with op.get_context().autocommit_block(): {SCHEMA}")
    with pytest.raises(MigrationError, match="needs a transaction"):
        command.upgrade(alembic, "head")


def test_after_the_runner_it_has_nothing_to_do(migrated: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after = migrated.shape()
    command.upgrade(history(migrated, tmp_path, monkeypatch, *ALL), "head")
    assert without_its_own(migrated.shape()) == without_its_own(after)


def test_an_unknown_revision_is_named(app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alembic = history(app, tmp_path, monkeypatch, "upgrade_revision(op, to='9999')")
    with pytest.raises(MigrationError, match=r"no revision '9999'\. Known: 0001"):
        command.upgrade(alembic, "head")


def test_settings_of_the_hosts_transaction_stay(app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = (
        "op.execute(\"SET LOCAL lock_timeout = '7s'\"); "
        f"{SCHEMA}; op.execute(\"CREATE TABLE seen AS SELECT current_setting('lock_timeout') AS value\")"
    )
    command.upgrade(history(app, tmp_path, monkeypatch, check), "head")
    assert app.value("SELECT value FROM seen") == "7s"


def test_offline_it_is_written_out(app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alembic = history(app, tmp_path, monkeypatch, *ALL)
    command.upgrade(alembic, "head", sql=True)
    script = alembic.output_buffer.getvalue()
    app.psql(script)
    with app.engine.connect() as conn:
        assert migrate.status(conn, app.config).healthy


class TestDowngrade:
    @pytest.mark.parametrize(
        "name",
        [
            "uuid",
            "quoted, reserved and in schemas",
            "balances in a table of their own",
            "with every column already",
        ],
    )
    def test_exactly_what_was_there_remains(
        self, name: str, make_app: Callable[..., App], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        app = make_app(HOSTS[name].ddl, HOSTS[name].mapping)
        before = app.shape()
        alembic = history(app, tmp_path, monkeypatch, *ALL, backs=BACKS)
        for _ in range(2):
            command.upgrade(alembic, "head")
            with app.engine.connect() as conn:
                assert migrate.status(conn, app.config).healthy
            command.downgrade(alembic, "base")
            assert without_its_own(app.shape()) == before

    def revision(self, app: App) -> str | None:
        with app.engine.connect() as conn:
            return migrate.status(conn, app.config).revision

    def test_after_undo_it_has_nothing_to_do(self, app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = app.shape()
        alembic = history(app, tmp_path, monkeypatch, *ALL, backs=BACKS)
        command.upgrade(alembic, "head")
        migrate.undo(app.url, app.config)
        command.downgrade(alembic, "base")
        assert without_its_own(app.shape()) == before

    def test_it_is_all_or_nothing_with_the_hosts_revision(
        self, app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alembic = history(
            app, tmp_path, monkeypatch, *ALL, backs=[*BACKS[:-1], f"{BACKS[-1]}; op.execute('SELECT 1 / 0')"]
        )
        command.upgrade(alembic, "head")
        after = app.shape()
        with pytest.raises(sa.exc.DataError, match="division by zero"):
            command.downgrade(alembic, "base")
        assert without_its_own(app.shape()) == without_its_own(after)

    def test_rows_are_not_thrown_away_unasked(self, app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        discarding = [back.replace(")", ", discard_ledger=True)") for back in BACKS]
        refusing = history(app, tmp_path / "a", monkeypatch, *ALL, backs=BACKS)
        command.upgrade(refusing, "head")
        app.run(
            "INSERT INTO credit_transactions (id, user_id, type, status, amount, description)"
            " SELECT gen_random_uuid(), id, 'purchase', 'pending', 1, 'x' FROM users LIMIT 1"
        )
        after = app.shape()
        with pytest.raises(LedgerNotEmpty, match=r"1 credit transaction,.*discard_ledger=True"):
            command.downgrade(refusing, "base")
        assert without_its_own(app.shape()) == without_its_own(after)
        command.downgrade(history(app, tmp_path / "b", monkeypatch, *ALL, backs=discarding), "base")
        assert self.revision(app) is None

    @pytest.mark.parametrize(
        ("back", "message"),
        [
            ("downgrade_revision(op, to='9999')", r"no revision '9999'\. Known: 0001"),
            (
                "with op.get_context().autocommit_block(): downgrade_revision(op, to=None)",
                "needs a transaction. Call downgrade_revision outside",
            ),
        ],
    )
    def test_what_is_refused(
        self, app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: str, message: str
    ) -> None:
        alembic = history(app, tmp_path, monkeypatch, *ALL[:1], backs=[back])
        command.upgrade(alembic, "head")
        after = app.shape()
        with pytest.raises(MigrationError, match=message):
            command.downgrade(alembic, "base")
        assert without_its_own(app.shape()) == without_its_own(after)

    def test_it_is_not_written_out(self, app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        alembic = history(app, tmp_path, monkeypatch, *ALL, backs=BACKS)
        with pytest.raises(MigrationError, match="alembic downgrade without --sql"):
            command.downgrade(alembic, "h0:base", sql=True)

    def test_settings_of_the_hosts_transaction_stay(
        self, app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        back = f"op.execute(\"SET LOCAL lock_timeout = '7s'\"); {BACKS[-1]}; "
        back += "op.execute(\"CREATE TABLE seen AS SELECT current_setting('lock_timeout') AS value\")"
        alembic = history(app, tmp_path, monkeypatch, *ALL, backs=[*BACKS[:-1], back])
        command.upgrade(alembic, "head")
        command.downgrade(alembic, "base")
        assert app.value("SELECT value FROM seen") == "7s"


def test_what_an_interrupted_run_prepared_is_gone_on_with(
    app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def progress(now: migrate.MigrationProgress) -> None:
        if now.phase == "prepared":
            raise Stop

    before = app.shape()
    alembic = history(app, tmp_path, monkeypatch, *ALL, backs=BACKS)
    with pytest.raises(Stop):
        migrate.apply(app.url, app.config, two_transactions=True, progress=progress)
    command.upgrade(alembic, "head")
    with app.engine.connect() as conn:
        assert migrate.status(conn, app.config).healthy
    command.downgrade(alembic, "base")
    assert without_its_own(app.shape()) == before
