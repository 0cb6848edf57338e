"""The rules on other people's migrations: each finding has its example, and what is safe gives none."""

from __future__ import annotations

from pathlib import Path

import pytest
from hosts import App

from tallystick import migrate
from tallystick.errors import ConfigError
from tallystick.migrate.lint import RULES
from tallystick.migrate.rules import Lock, normalise, operations, split

GUARD = "SET lock_timeout = '100ms';"

EXAMPLES = [
    # what happens between two statements
    (
        "lock-upgrade",
        f"{GUARD} CREATE TRIGGER t BEFORE UPDATE ON users EXECUTE FUNCTION f(); ALTER TABLE users ADD a int;",
    ),
    ("lock-upgrade", f"{GUARD} LOCK TABLE users IN SHARE MODE; ALTER TABLE users DROP CONSTRAINT c;"),
    ("foreign-key-first", f"{GUARD} CREATE TABLE l (u int REFERENCES users (id)); ALTER TABLE users ADD a int;"),
    (
        "foreign-key-first",
        f"{GUARD} ALTER TABLE w ADD u int REFERENCES users; ALTER TABLE users ADD a int;",
    ),
    ("rows-under-lock", f"{GUARD} ALTER TABLE users ADD a int; UPDATE users SET a = 1;"),
    ("rows-under-lock", f"{GUARD} ALTER TABLE users ADD a int; DELETE FROM other WHERE x;"),
    ("concurrently-in-transaction", "CREATE INDEX CONCURRENTLY i ON users (a);"),
    ("concurrently-in-transaction", "BEGIN; DROP INDEX CONCURRENTLY i; COMMIT;"),
    ("concurrently-short-timeout", f"BEGIN; COMMIT; {GUARD} CREATE INDEX CONCURRENTLY i ON users (a);"),
    ("concurrently-short-timeout", "BEGIN; COMMIT; SET statement_timeout TO 5000; REINDEX INDEX CONCURRENTLY i;"),
    (
        "validate-in-transaction",
        f"{GUARD} ALTER TABLE users ADD CONSTRAINT c CHECK (a > 0) NOT VALID; ALTER TABLE users VALIDATE CONSTRAINT c;",
    ),
    ("new-label-used", "ALTER TYPE kind ADD VALUE 'gift'; INSERT INTO t VALUES ('gift');"),
    # what one statement does
    ("scan-under-lock", f"{GUARD} ALTER TABLE users ADD CONSTRAINT c CHECK (a > 0);"),
    ("scan-under-lock", f"{GUARD} ALTER TABLE users ADD a int CHECK (a > 0);"),
    ("scan-under-lock", f"{GUARD} ALTER TABLE users ALTER COLUMN a SET NOT NULL;"),
    ("scan-under-lock", f"{GUARD} ALTER TABLE w ADD FOREIGN KEY (u) REFERENCES users (id);"),
    ("scan-under-lock", f"{GUARD} ALTER TABLE users ADD UNIQUE (a);"),
    ("scan-under-lock", f"{GUARD} ALTER TABLE users ADD a int UNIQUE;"),
    ("rewrite", f"{GUARD} ALTER TABLE users ALTER a TYPE bigint;"),
    ("rewrite", f"{GUARD} ALTER TABLE users ADD a uuid DEFAULT gen_random_uuid();"),
    ("rewrite", f"{GUARD} ALTER TABLE users ADD a timestamptz DEFAULT clock_timestamp() NOT NULL;"),
    ("rewrite", f"{GUARD} ALTER TABLE users ADD a bigserial;"),
    ("rewrite", f"{GUARD} ALTER TABLE users ADD a int GENERATED ALWAYS AS (b * 2) STORED;"),
    ("rewrite", f"{GUARD} VACUUM FULL users;"),
    ("index-not-concurrent", f"{GUARD} CREATE UNIQUE INDEX i ON users (a);"),
    ("not-null-without-default", f"{GUARD} ALTER TABLE users ADD a int NOT NULL;"),
    ("if-not-exists-index", "BEGIN; COMMIT; CREATE INDEX CONCURRENTLY IF NOT EXISTS i ON users (a);"),
    ("no-lock-timeout", "ALTER TABLE users ADD a int;"),
    ("no-lock-timeout", "SET lock_timeout = 0; ALTER TABLE users ADD a int;"),
    ("no-lock-timeout", "BEGIN; SET LOCAL lock_timeout = '1s'; COMMIT; BEGIN; DROP TRIGGER t ON users; COMMIT;"),
    ("rename", f"{GUARD} ALTER TABLE users RENAME COLUMN a TO b;"),
    ("drop", f"{GUARD} ALTER TABLE users DROP COLUMN a;"),
    ("drop", f"{GUARD} DROP TABLE users;"),
    ("unknown", "FROBNICATE users;"),
    # types
    ("rewrite", f"CREATE DOMAIN mail AS text CHECK (VALUE LIKE '%@%'); {GUARD} ALTER TABLE users ADD a mail;"),
    ("rewrite", f'CREATE DOMAIN app."Mail" text NOT NULL; {GUARD} ALTER TABLE users ADD a app."Mail" DEFAULT \'x\';'),
    ("unknown-type", f"{GUARD} ALTER TABLE users ADD COLUMN IF NOT EXISTS a app.mail;"),
    ("domain-constraint", "ALTER DOMAIN mail ADD CONSTRAINT c CHECK (VALUE <> '');"),
    ("domain-constraint", "ALTER DOMAIN mail VALIDATE CONSTRAINT c;"),
    ("domain-constraint", "ALTER DOMAIN mail SET NOT NULL;"),
    # what a block of code runs
    ("drop", f"{GUARD} DO $$ BEGIN DROP TABLE users; END $$;"),
    ("no-lock-timeout", "DO 'BEGIN ALTER TABLE users ADD a int; END';"),
    ("index-not-concurrent", f"{GUARD} DO $x$ BEGIN IF a > 1 THEN CREATE INDEX i ON users (a); END IF; END $x$;"),
    (
        "rewrite",
        f"""{GUARD} DO LANGUAGE plpgsql $$ DECLARE t text; BEGIN FOR t IN SELECT x FROM y LOOP
        EXECUTE format('ALTER TABLE %I ALTER a TYPE bigint', t); END LOOP; END $$;""",
    ),
    ("drop", f"{GUARD} DO $$ BEGIN <<l>> BEGIN NULL; EXCEPTION WHEN others THEN DROP TABLE users; END; END $$;"),
    ("rename", f"{GUARD} DO $$ BEGIN EXECUTE 'ALTER TABLE users RENAME a TO b' USING 1; END $$;"),
    ("rows-under-lock", f"{GUARD} DO $$ BEGIN ALTER TABLE users ADD a int; UPDATE users SET a = 1; END $$;"),
    (
        "rows-under-lock",
        f"""{GUARD} ALTER TABLE users ADD a int;
        DO $$ DECLARE r record; BEGIN FOR r IN UPDATE users SET a = 1 RETURNING a LOOP NULL; END LOOP; END $$;""",
    ),
    ("unreadable", "DO $$ BEGIN EXECUTE 'ALTER TABLE ' || name || ' ADD a int'; END $$;"),
    ("unreadable", "DO $$ BEGIN EXECUTE format('ALTER TABLE %s ADD a int', name); END $$;"),
    ("unreadable", "DO $$ DECLARE c text := 'DROP TABLE users'; BEGIN EXECUTE c; END $$;"),
    ("unreadable", "DO $$ DECLARE r record; BEGIN FOR r IN EXECUTE q LOOP NULL; END LOOP; END $$;"),
    ("unreadable", "DO LANGUAGE plpython3u $$ plpy.execute('DROP TABLE users') $$;"),
    ("unknown", "DO $$ BEGIN CALL drop_everything(); END $$;"),
]

SAFE = [
    f"{GUARD} ALTER TABLE users ADD a int NOT NULL DEFAULT 0, ADD b varchar(32) DEFAULT 'x' NOT NULL;",
    f"{GUARD} ALTER TABLE users ADD a timestamptz NOT NULL DEFAULT now();",
    f"{GUARD} ALTER TABLE users ADD a numeric(10, 2) NOT NULL DEFAULT 0.0;",
    f"{GUARD} ALTER TABLE users ADD CONSTRAINT c CHECK (a > 0) NOT VALID;",
    f"{GUARD} ALTER TABLE w ADD FOREIGN KEY (u) REFERENCES users (id) NOT VALID;",
    "BEGIN; COMMIT; SET lock_timeout = 0; CREATE UNIQUE INDEX CONCURRENTLY i ON users (a);",
    "BEGIN; COMMIT; ALTER TABLE users VALIDATE CONSTRAINT c;",
    "CREATE TABLE t (id int PRIMARY KEY); CREATE INDEX ON t (id); ALTER TABLE t ADD b int; INSERT INTO t VALUES (1);",
    f"{GUARD} ALTER TABLE users ADD a int; CREATE TRIGGER t BEFORE UPDATE ON users EXECUTE FUNCTION f();",
    f"{GUARD} BEGIN; ALTER TABLE users ADD a int; COMMIT; UPDATE users SET a = 1;",
    "CREATE TYPE t AS ENUM ('a'); CREATE SCHEMA s; GRANT SELECT ON users TO someone; COMMENT ON TABLE users IS 'x';",
    "-- ALTER TABLE users ADD a int\nSELECT 'ALTER TABLE users ADD a int';",
    f"{GUARD} /* tallystick: allow drop */ ALTER TABLE users /* tallystick: allow drop */ DROP COLUMN a;",
    f"CREATE DOMAIN mail AS text; {GUARD} ALTER TABLE users ADD a mail, ADD b double precision, ADD c unseen[];",
    f"CREATE TYPE app.mood AS ENUM ('a'); {GUARD} ALTER TABLE users ADD a app.mood NOT NULL DEFAULT 'a';",
    "ALTER DOMAIN mail ADD CONSTRAINT c CHECK (VALUE <> '') NOT VALID;",
    # batches, each committed
    """BEGIN; COMMIT; DO $$ DECLARE n int := 1; done boolean; BEGIN WHILE n > 0 LOOP
    UPDATE users SET a = 1 WHERE a IS NULL; GET DIAGNOSTICS n = ROW_COUNT; done := n = 0; COMMIT;
    PERFORM pg_sleep(0.1); END LOOP; RAISE NOTICE 'ok'; END $$;""",
    "DO $$ BEGIN CASE WHEN a THEN NULL; ELSE RETURN; END CASE; END $$;",
    "DO $$ /* tallystick: allow unreadable */ BEGIN EXECUTE c; END $$;",
]


def codes(folder: Path, script: str) -> list[str]:
    file = folder / "migration.sql"
    file.write_text(script)
    return [finding.code for finding in migrate.lint(file)]


@pytest.mark.parametrize(("code", "script"), EXAMPLES)
def test_it_finds(tmp_path: Path, code: str, script: str) -> None:
    assert codes(tmp_path, script) == [code]


@pytest.mark.parametrize("script", SAFE)
def test_it_passes(tmp_path: Path, script: str) -> None:
    assert codes(tmp_path, script) == []


def test_every_rule_has_its_example() -> None:
    assert {code for code, _ in EXAMPLES} | {"shared-transaction"} == set(RULES)


def test_a_domain_of_an_earlier_script_is_known(tmp_path: Path) -> None:
    (tmp_path / "1.sql").write_text("CREATE DOMAIN mail AS text CHECK (VALUE <> ''); CREATE DOMAIN plain AS text;")
    (tmp_path / "2.sql").write_text(f"{GUARD} ALTER TABLE users ADD a mail, ADD b plain;")
    assert [(finding.where, finding.code) for finding in migrate.lint(tmp_path)] == [("2.sql:1", "rewrite")]


def test_our_own_script_has_nothing_to_find(app: App, tmp_path: Path) -> None:
    with app.engine.connect() as conn:
        script = migrate.sql(conn, app.config)
    assert codes(tmp_path, script) == []


ENV = """
from alembic import context
context.configure(connection=None, {options})
"""
REVISION = """
import sqlalchemy as sa
from alembic import op
revision, down_revision = {revision!r}, {down!r}
def upgrade():
    {code}
"""


def alembic_folder(folder: Path, *bodies: str, options: str = "") -> Path:
    (folder / "versions").mkdir()
    (folder / "env.py").write_text(ENV.format(options=options))
    for number, body in enumerate(bodies):
        text = REVISION.format(revision=f"r{number}", down=f"r{number - 1}" if number else None, code=body)
        (folder / "versions" / f"r{number}_x.py").write_text(text)
    return folder


ADD = "op.add_column('users', sa.Column('a', sa.Integer))"
INDEX = "op.create_index('i', 'users', ['a'], postgresql_concurrently=True)"
WITH_TIMEOUT = "op.execute(\"SET LOCAL lock_timeout = '1s'\"); "


def test_alembic_revisions_that_share_a_transaction(tmp_path: Path) -> None:
    folder = alembic_folder(tmp_path, WITH_TIMEOUT + ADD, WITH_TIMEOUT + "op.execute('UPDATE users SET a = 1')")
    found = migrate.lint(folder)
    assert [(finding.where, finding.code) for finding in found] == [
        ("r1", "shared-transaction"),
        ("r1, statement 2", "rows-under-lock"),
    ]


def test_alembic_revisions_with_a_transaction_each(tmp_path: Path) -> None:
    folder = alembic_folder(
        tmp_path,
        WITH_TIMEOUT + ADD,
        "op.execute('UPDATE users SET a = 1')",
        options="transaction_per_migration=True",
    )
    assert migrate.lint(folder) == ()


def test_alembic_concurrently(tmp_path: Path) -> None:
    wrong = alembic_folder(tmp_path, INDEX)
    assert [finding.code for finding in migrate.lint(wrong)] == ["concurrently-in-transaction"]


def test_alembic_autocommit_block(tmp_path: Path) -> None:
    right = alembic_folder(tmp_path, f"with op.get_context().autocommit_block(): {INDEX}")
    assert migrate.lint(right) == ()


def test_a_revision_that_asks_the_database(tmp_path: Path) -> None:
    folder = alembic_folder(tmp_path, "sa.inspect(op.get_bind()).get_table_names()")
    with pytest.raises(ConfigError, match="revision r0 cannot be read offline"):
        migrate.lint(folder)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither"):
        migrate.lint(tmp_path)


class TestReading:
    def test_statements_are_told_apart(self) -> None:
        script = "a;\n-- x;\n b $$ ; $$ ';' ; /* /* ; */ ; */ c\n;\\set x 1;\nE'\\';' d \\;\n e"
        assert list(split(script)) == [("a", 1), ("b $$ ; $$ ';' ", 3), ("c\n", 3), ("E'\\';' d ", 5), ("e", 6)]

    def test_names_are_as_the_server_stores_them(self) -> None:
        for written, stored in (
            ("Users", "users"),
            ('"Users"', "Users"),
            ('app . "The ""Users"""', 'app.The "Users"'),
            ("ONLY public.users", "public.users"),
        ):
            [operation] = operations(f"ALTER TABLE IF EXISTS {written} ADD a int")
            assert operation.table == stored

    def test_strings_and_comments_are_no_statements(self) -> None:
        assert normalise("select 'drop table x' -- drop table y") == ("SELECT '?'", ("'drop table x'",))

    def test_each_action_of_an_alter_table_counts(self) -> None:
        found = operations("ALTER TABLE t ADD a int DEFAULT f(1, 2), VALIDATE CONSTRAINT c, ADD b int")
        assert [(operation.rewrites, operation.lock) for operation in found] == [
            (True, Lock.ACCESS_EXCLUSIVE),
            (False, Lock.SHARE_UPDATE_EXCLUSIVE),
            (False, Lock.ACCESS_EXCLUSIVE),
        ]


def test_the_rules_agree_with_the_server(app: App) -> None:
    """Each lock of the table against pg_locks, in a transaction that has run the statement."""
    app.run(
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
        "CREATE TABLE other ()",
        "CREATE DOMAIN strict AS text CHECK (VALUE <> '')",
        "CREATE DOMAIN unchecked AS text",
        "ALTER DOMAIN unchecked ADD CONSTRAINT later CHECK (VALUE <> '') NOT VALID",
        "CREATE DOMAIN plain AS text",
    )
    for statement in (
        "ALTER TABLE users ADD a int",
        "ALTER TABLE users ADD a int NOT NULL DEFAULT 0",
        "ALTER TABLE users ADD a uuid DEFAULT gen_random_uuid()",
        "ALTER TABLE users ADD a int CHECK (a > 0)",
        "ALTER TABLE users ADD a strict",
        "ALTER TABLE users ADD a unchecked",
        "ALTER TABLE users ADD a plain",
        "ALTER TABLE users ADD CONSTRAINT c CHECK (email <> '') NOT VALID",
        "ALTER TABLE users ADD CONSTRAINT c CHECK (email <> '')",
        "ALTER TABLE users ALTER email SET STATISTICS 10",
        "ALTER TABLE users ALTER email SET DEFAULT ''",
        "ALTER TABLE users ALTER email TYPE varchar(99)",
        "ALTER TABLE users SET (fillfactor = 90)",
        "ALTER TABLE users DISABLE TRIGGER USER",
        "ALTER TABLE users RENAME email TO mail",
        "ALTER TABLE workshops ADD FOREIGN KEY (user_id) REFERENCES users (id)",
        "ALTER TABLE workshops ADD FOREIGN KEY (user_id) REFERENCES users (id) NOT VALID",
        "CREATE TABLE l (u uuid REFERENCES users (id))",
        "CREATE INDEX ON users (email)",
        "CREATE TRIGGER t BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION f()",
        "LOCK TABLE users, workshops IN SHARE UPDATE EXCLUSIVE MODE",
        "TRUNCATE other",
        "DELETE FROM users WHERE email = ''",
        "UPDATE users SET email = 'x' WHERE email = 'y'",
        "INSERT INTO users (email) VALUES ('new')",
    ):
        expected: dict[str, Lock] = {}
        rewrites = False
        for operation in operations(statement, domains=("strict", "unchecked")):
            for table, lock in ((operation.table, operation.lock), *operation.also):
                expected[str(table)] = max(expected.get(str(table), Lock.NONE), lock)
            rewrites |= operation.rewrites
        with app.engine.connect() as conn:
            files = "SELECT relname, relfilenode FROM pg_class WHERE relname IN ('users', 'workshops') ORDER BY 1"
            before = conn.exec_driver_sql(files).all()
            conn.rollback()
            conn.exec_driver_sql(statement)
            held = conn.exec_driver_sql(
                "SELECT relation::regclass::text, mode FROM pg_locks WHERE pid = pg_backend_pid()"
                " AND locktype = 'relation' AND relation::regclass::text IN ('users', 'workshops', 'other')"
            ).all()
            after = conn.exec_driver_sql(files).all()
        strongest: dict[str, Lock] = {}
        for table, mode in held:
            lock = {as_pg(lock): lock for lock in Lock}[mode]
            strongest[table] = max(strongest.get(table, Lock.NONE), lock)
        for table, lock in strongest.items():
            if lock > Lock.ROW_SHARE:
                assert expected.get(table) == lock, statement
        assert rewrites == (before != after), statement


def as_pg(lock: Lock) -> str:
    return "".join(word.title() for word in lock.name.split("_")) + "Lock"


def test_a_domains_constraint_keeps_writers_of_its_tables_out(app: App) -> None:
    """Against pg_locks: the rules know no table by name, but the lock."""
    app.run(
        "CREATE DOMAIN mail AS text",
        "CREATE TABLE letters (sender mail)",
        "ALTER DOMAIN mail ADD CONSTRAINT later CHECK (VALUE <> '') NOT VALID",
    )
    for statement in (
        "ALTER DOMAIN mail VALIDATE CONSTRAINT later",
        "ALTER DOMAIN mail ADD CONSTRAINT c CHECK (VALUE <> '')",
        "ALTER DOMAIN mail SET NOT NULL",
        "ALTER DOMAIN mail ADD CONSTRAINT c CHECK (VALUE <> '') NOT VALID",
    ):
        [operation] = operations(statement)
        with app.engine.connect() as conn:
            conn.exec_driver_sql(statement)
            held = conn.exec_driver_sql(
                "SELECT mode FROM pg_locks WHERE pid = pg_backend_pid() AND relation = 'letters'::regclass"
            ).scalar()
        assert held == (as_pg(operation.lock) if operation.lock else None), statement
