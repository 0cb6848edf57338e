"""The rules on other people's migrations: each finding has its example, and what is safe gives none."""

from __future__ import annotations

import re
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
    ("lock-upgrade", f"{GUARD} LOCK TABLE users IN SHARE MODE; ALTER TABLE users ALTER a SET DEFAULT 1;"),
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
    ("no-lock-timeout", "BEGIN; SET LOCAL lock_timeout = '1s'; COMMIT; BEGIN; LOCK users; COMMIT;"),
    ("no-lock-timeout", "CREATE OR REPLACE VIEW v AS SELECT 1;"),
    ("no-lock-timeout", "CREATE TABLE l (u int REFERENCES users);"),
    ("no-lock-timeout", "CREATE TABLE p PARTITION OF users FOR VALUES IN (1);"),
    ("lock-upgrade", f"{GUARD} LOCK users IN SHARE MODE; CREATE TABLE p PARTITION OF users DEFAULT;"),
    ("scan-under-lock", f"{GUARD} ALTER TABLE users ADD CONSTRAINT c PRIMARY KEY USING INDEX i;"),
    ("every-row", "UPDATE users SET a = 1;"),
    ("every-row", "EXPLAIN (ANALYZE, BUFFERS) DELETE FROM users;"),
    ("every-row", "EXPLAIN ANALYZE DELETE FROM users;"),
    ("rows-under-lock", f"{GUARD} LOCK users; EXPLAIN ANALYZE VERBOSE UPDATE users SET a = 1;"),
    ("rows-under-lock", f"{GUARD} BEGIN; LOCK users; BEGIN; UPDATE users SET a = 1 WHERE b; COMMIT;"),
    ("index-not-concurrent", f"{GUARD} DROP INDEX i;"),
    ("index-not-concurrent", f"{GUARD} REINDEX TABLE users;"),
    ("unknown", "FROBNICATE users;"),
    ("unknown", f"{GUARD} ALTER TABLE users FROBNICATE;"),
    ("unknown", "ALTER EXTENSION hstore UPDATE;"),
    ("unknown", "ALTER TYPE pair ALTER ATTRIBUTE a TYPE bigint;"),
    # what breaks running code
    *(
        ("drop", f"{GUARD} {statement};")
        for statement in (
            "ALTER TABLE users DROP COLUMN a",
            "ALTER TABLE users ALTER a DROP NOT NULL",
            "ALTER TABLE users ALTER COLUMN a DROP DEFAULT",
            "ALTER TABLE users ALTER a DROP EXPRESSION",
            "ALTER TABLE users DROP CONSTRAINT c",
            "ALTER TABLE users DISABLE TRIGGER t",
            "ALTER TABLE users OWNER TO someone",
            "ALTER TABLE users NO INHERIT people",
            "ALTER TABLE users DETACH PARTITION p",
            "ALTER TABLE users REPLICA IDENTITY NOTHING",
            "ALTER TYPE pair DROP ATTRIBUTE a",
            "ALTER DOMAIN mail DROP CONSTRAINT c",
            "CREATE TABLE t (); DROP TABLE IF EXISTS t, users",
            "DROP FOREIGN TABLE users",
            "DROP VIEW v",
            "DROP MATERIALIZED VIEW v",
            "DROP SEQUENCE s CASCADE",
            "DROP SCHEMA app CASCADE",
            "DROP TYPE mood CASCADE",
            "DROP DOMAIN mail CASCADE",
            "DROP EXTENSION hstore",
            "DROP FUNCTION f(int)",
            "DROP TRIGGER t ON users",
            "DROP RULE r ON users",
            "DROP DATABASE app",
            "DROP ROLE app",
            "DROP PUBLICATION p",
            "REVOKE ALL ON users FROM app",
            "REVOKE USAGE ON SCHEMA app FROM app",
        )
    ),
    *(
        ("rename", f"{GUARD} {statement};")
        for statement in (
            "ALTER TABLE users RENAME COLUMN a TO b",
            "ALTER TABLE users RENAME TO people",
            "ALTER TABLE users SET SCHEMA app",
            "ALTER VIEW v RENAME TO w",
            "ALTER SEQUENCE s SET SCHEMA app",
            "ALTER INDEX i RENAME TO j",
            "ALTER SCHEMA app RENAME TO old",
            "ALTER TYPE mood RENAME VALUE 'a' TO 'b'",
            "ALTER TYPE mood RENAME TO feeling",
            "ALTER FUNCTION f(int) RENAME TO g",
            "ALTER DATABASE app RENAME TO old",
        )
    ),
    ("truncate", f"{GUARD} TRUNCATE users CASCADE;"),
    ("truncate", f"{GUARD} CREATE TABLE t (); TRUNCATE TABLE ONLY t, users RESTART IDENTITY;"),
    *(
        ("row-security", f"{GUARD} {statement};")
        for statement in (
            "ALTER TABLE users ENABLE ROW LEVEL SECURITY",
            "ALTER TABLE users NO FORCE ROW LEVEL SECURITY",
            "CREATE POLICY p ON users USING (true)",
            "DROP POLICY IF EXISTS p ON users",
        )
    ),
    ("no-lock-timeout", "/* tallystick: allow drop */ DROP TYPE /* tallystick: allow drop */ mood CASCADE;"),
    # types
    ("rewrite", f"CREATE DOMAIN mail AS text CHECK (VALUE LIKE '%@%'); {GUARD} ALTER TABLE users ADD a mail;"),
    ("rewrite", f'CREATE DOMAIN app."Mail" text NOT NULL; {GUARD} ALTER TABLE users ADD a app."Mail" DEFAULT \'x\';'),
    ("unknown-type", f"{GUARD} ALTER TABLE users ADD COLUMN IF NOT EXISTS a app.mail;"),
    ("domain-constraint", f"{GUARD} ALTER DOMAIN mail ADD CONSTRAINT c CHECK (VALUE <> '');"),
    ("domain-constraint", f"{GUARD} ALTER DOMAIN mail VALIDATE CONSTRAINT c;"),
    ("domain-constraint", f"{GUARD} ALTER DOMAIN mail SET NOT NULL;"),
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
    f"{GUARD} BEGIN; ALTER TABLE users ADD a int; COMMIT; UPDATE users SET a = 1 WHERE id = 1;",
    "CREATE TYPE t AS ENUM ('a'); CREATE SCHEMA s; GRANT SELECT ON users TO someone; COMMENT ON TABLE users IS 'x';",
    "-- ALTER TABLE users ADD a int\nSELECT 'ALTER TABLE users ADD a int';",
    f"{GUARD} /* tallystick: allow drop */ ALTER TABLE users /* tallystick: allow drop */ DROP COLUMN a;",
    f"CREATE DOMAIN mail AS text; {GUARD} ALTER TABLE users ADD a mail, ADD b double precision, ADD c unseen[];",
    f"CREATE TYPE app.mood AS ENUM ('a'); {GUARD} ALTER TABLE users ADD a app.mood NOT NULL DEFAULT 'a';",
    "ALTER DOMAIN mail ADD CONSTRAINT c CHECK (VALUE <> '') NOT VALID;",
    f"{GUARD} ALTER TABLE users DROP CONSTRAINT c, ADD CONSTRAINT c CHECK (a > 0) NOT VALID;",
    f"{GUARD} ALTER TABLE users INHERIT people, ENABLE TRIGGER t, ALTER CONSTRAINT c DEFERRABLE;",
    "CREATE TABLE t (); UPDATE t SET a = 1; TRUNCATE t; DROP TABLE t; EXPLAIN SELECT 1; EXPLAIN DELETE FROM users;",
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


SQUAWK = {
    "adding-field-with-default": ("rewrite", "ALTER TABLE users ADD COLUMN a uuid DEFAULT gen_random_uuid()"),
    "adding-foreign-key-constraint": (
        "scan-under-lock",
        "ALTER TABLE w ADD CONSTRAINT f FOREIGN KEY (u) REFERENCES users (id)",
    ),
    "adding-not-nullable-field": ("scan-under-lock", "ALTER TABLE users ALTER COLUMN a SET NOT NULL"),
    "adding-required-field": ("not-null-without-default", "ALTER TABLE users ADD COLUMN a int NOT NULL"),
    "adding-serial-primary-key-field": ("rewrite", "ALTER TABLE users ADD COLUMN a serial PRIMARY KEY"),
    "ban-alter-database-options": ("unknown", "ALTER DATABASE app SET work_mem = '1MB'"),
    "ban-alter-domain-with-add-constraint": (
        "domain-constraint",
        "ALTER DOMAIN mail ADD CONSTRAINT c CHECK (VALUE > 0)",
    ),
    "ban-alter-extension": ("unknown", "ALTER EXTENSION hstore UPDATE"),
    "ban-alter-generated-expression": ("rewrite", "ALTER TABLE users ALTER COLUMN a SET EXPRESSION AS (b * 2)"),
    "ban-alter-policy-condition": ("row-security", "ALTER POLICY p ON users USING (true)"),
    "ban-alter-policy-roles": ("row-security", "ALTER POLICY p ON users TO app"),
    "ban-alter-role-options": ("unknown", "ALTER ROLE app NOLOGIN"),
    "ban-alter-row-level-security": ("row-security", "ALTER TABLE users ENABLE ROW LEVEL SECURITY"),
    "ban-alter-system-options": ("unknown", "ALTER SYSTEM SET work_mem = '1MB'"),
    "ban-concurrent-index-creation-in-transaction": (
        "concurrently-in-transaction",
        "BEGIN; SET lock_timeout = 0; CREATE INDEX CONCURRENTLY i ON users (a); COMMIT",
    ),
    "ban-create-domain-with-constraint": (
        "rewrite",
        "CREATE DOMAIN mail AS text CHECK (VALUE > 0); ALTER TABLE users ADD COLUMN a mail",
    ),
    "ban-create-policy": ("row-security", "CREATE POLICY p ON users USING (true)"),
    "ban-detach-inheritance": ("drop", "ALTER TABLE users NO INHERIT people"),
    "ban-disable-trigger": ("drop", "ALTER TABLE users DISABLE TRIGGER t"),
    "ban-drop-column": ("drop", "ALTER TABLE users DROP COLUMN a"),
    "ban-drop-constraint": ("drop", "ALTER TABLE users DROP CONSTRAINT c"),
    "ban-drop-database": ("drop", "DROP DATABASE app"),
    "ban-drop-default": ("drop", "ALTER TABLE users ALTER COLUMN a DROP DEFAULT"),
    "ban-drop-domain": ("drop", "DROP DOMAIN mail"),
    "ban-drop-extension": ("drop", "DROP EXTENSION hstore"),
    "ban-drop-function": ("drop", "DROP FUNCTION f(int)"),
    "ban-drop-generated-expression": ("drop", "ALTER TABLE users ALTER COLUMN a DROP EXPRESSION"),
    "ban-drop-index": ("index-not-concurrent", "DROP INDEX i"),
    "ban-drop-not-null": ("drop", "ALTER TABLE users ALTER COLUMN a DROP NOT NULL"),
    "ban-drop-policy": ("row-security", "DROP POLICY p ON users"),
    "ban-drop-schema": ("drop", "DROP SCHEMA app"),
    "ban-drop-sequence": ("drop", "DROP SEQUENCE s"),
    "ban-drop-table": ("drop", "DROP TABLE users"),
    "ban-drop-trigger": ("drop", "DROP TRIGGER t ON users"),
    "ban-drop-type": ("drop", "DROP TYPE mood"),
    "ban-drop-view": ("drop", "DROP VIEW v"),
    "ban-replica-identity": ("drop", "ALTER TABLE users REPLICA IDENTITY NOTHING"),
    "ban-revoke": ("drop", "REVOKE SELECT ON users FROM app"),
    "ban-set-schema": ("rename", "ALTER TABLE users SET SCHEMA app"),
    "ban-truncate-cascade": ("truncate", "TRUNCATE users CASCADE"),
    "changing-column-type": ("rewrite", "ALTER TABLE users ALTER COLUMN a TYPE bigint"),
    "constraint-missing-not-valid": ("scan-under-lock", "ALTER TABLE users ADD CONSTRAINT c CHECK (a > 0)"),
    "disallowed-unique-constraint": ("scan-under-lock", "ALTER TABLE users ADD CONSTRAINT c UNIQUE (a)"),
    "prefer-repack": ("rewrite", "VACUUM FULL users"),
    "renaming-column": ("rename", "ALTER TABLE users RENAME COLUMN a TO b"),
    "renaming-object": ("rename", "ALTER TYPE mood RENAME TO feeling"),
    "renaming-table": ("rename", "ALTER TABLE users RENAME TO people"),
    "require-concurrent-index-creation": ("index-not-concurrent", "CREATE INDEX i ON users (a)"),
    "require-concurrent-index-deletion": ("index-not-concurrent", "DROP INDEX i"),
    "require-concurrent-partition-detach": ("drop", "ALTER TABLE users DETACH PARTITION p"),
    "require-concurrent-reindex": ("index-not-concurrent", "REINDEX INDEX i"),
    "require-lock-timeout": ("no-lock-timeout", "SET lock_timeout = 0; ALTER TABLE users ADD COLUMN a int"),
    "require-timeout-settings": ("no-lock-timeout", "SET lock_timeout = 0; ALTER TABLE users ADD COLUMN a int"),
}
"""Each rule of squawk 2.70 about what stalls or breaks running code: our code for it, and the SQL."""

NOT_ABOUT_DOWNTIME = {
    "ban-add-column": "who names the columns is not touched; plan looks for prepared SELECT *",
    "ban-add-composite-attribute": "what is there stays where it is",
    "ban-add-enum-value": "nothing waits; what fails, its use in the same transaction, is new-label-used",
    "ban-alter-function-options": "nothing waits; what the options are worth is for who reviews the function",
    "ban-alter-identity": "nothing stops that is there; who may give a value is for who reviews the table",
    "ban-alter-sequence-values": "about values, not locks",
    "ban-alter-view-options": "rights and checks of a view, for who reviews it",
    "ban-char-field": "a type to be preferred",
    "ban-duplicate-column-assignments": "the server refuses it at once",
    "ban-new-write-restriction": "NOT VALID is the remedy here; whether running code keeps to the rule no text tells",
    "ban-replace-view-function": "same name, same shape; an unbounded wait for the view's lock is no-lock-timeout",
    "ban-set-default": "rows that are there stay as they are",
    "ban-uncommitted-transaction": "changes nothing",
    "identifier-too-long": "the server cuts it off, with a notice",
    "prefer-bigint-over-int": "a type to be preferred",
    "prefer-bigint-over-smallint": "a type to be preferred",
    "prefer-identity": "a type to be preferred",
    "prefer-robust-stmts": "about running it again; where IF NOT EXISTS deceives is if-not-exists-index",
    "prefer-text-field": "a type to be preferred",
    "prefer-timestamp-tz": "a type to be preferred",
    "require-enum-value-ordering": "an order to be preferred",
    "require-statement-timeout": "a wait is bounded by lock_timeout; this one would cut an index build short",
    "require-table-schema": "a way to write names",
    "transaction-nesting": "a warning of the server's; locks are followed through it",
    "unused-ignore": "about squawk's own comments",
}


@pytest.mark.parametrize("rule", SQUAWK)
def test_it_finds_what_squawk_does(tmp_path: Path, rule: str) -> None:
    code, script = SQUAWK[rule]
    assert codes(tmp_path, f"{GUARD} {script};") == [code]


def test_each_rule_of_squawk_is_placed() -> None:
    assert len(SQUAWK) + len(NOT_ABOUT_DOWNTIME) == len(SQUAWK | NOT_ABOUT_DOWNTIME) == 78


def test_every_rule_has_its_example() -> None:
    assert {code for code, _ in EXAMPLES} | {"shared-transaction"} == set(RULES)


def test_every_rule_is_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs/migration.md").read_text()
    assert re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE) == list(RULES)


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
        "op.execute('UPDATE users SET a = 1 WHERE id = 1')",
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


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import os; op.execute(os.environ['NOT_SET'])",
            r"r0_x\.py, line 6: KeyError: 'NOT_SET'. Where .* environment",
        ),
        ("import the_app", r"r0_x\.py, line 6: ModuleNotFoundError: No module named 'the_app'. Set PYTHONPATH"),
        ("op.execute(open('there_is_none.sql').read())", r"r0_x\.py, line 6: FileNotFoundError: .*Run it from"),
        ("pass\nimport the_app.models", r"cannot be read: .*r0_x\.py, line 7: ModuleNotFoundError: .*PYTHONPATH"),
        ("pass\nraise RuntimeError('no')", r"cannot be read: .*r0_x\.py, line 7: RuntimeError: no$"),
        ("pass\nthis is no Python", r"cannot be read: .*r0_x\.py, line 7: SyntaxError"),
    ],
)
def test_a_revision_whose_code_fails(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        migrate.lint(alembic_folder(tmp_path, code))


@pytest.mark.parametrize("there", [True, False])
def test_revisions_that_lie_elsewhere(tmp_path: Path, there: bool) -> None:
    folder = alembic_folder(tmp_path)
    if not there:
        (folder / "versions").rmdir()
    with pytest.raises(ConfigError, match=r"no revisions in .*versions\. .*alembic upgrade head --sql > all\.sql"):
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
        "CREATE SCHEMA elsewhere",
        "CREATE TABLE events (month int) PARTITION BY LIST (month)",
        "CREATE TYPE mood AS ENUM ('good')",
        "CREATE TABLE people (id uuid NOT NULL, email text NOT NULL)",
        "ALTER TABLE workshops ADD mood mood, ADD CONSTRAINT owner FOREIGN KEY (user_id) REFERENCES users",
        "CREATE TRIGGER old BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION f()",
        "CREATE POLICY own ON users USING (true)",
        "CREATE INDEX mails ON users (email)",
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
        "CREATE TABLE january PARTITION OF events FOR VALUES IN (1)",
        "CREATE INDEX ON users (email)",
        "CREATE TRIGGER t BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION f()",
        "LOCK TABLE users, workshops IN SHARE UPDATE EXCLUSIVE MODE",
        "TRUNCATE people, other",
        "DROP TABLE people, other",
        "ALTER TABLE users ALTER email DROP NOT NULL",
        "ALTER TABLE users ALTER id DROP DEFAULT",
        "ALTER TABLE workshops ALTER CONSTRAINT owner DEFERRABLE",
        "ALTER TABLE users ENABLE ROW LEVEL SECURITY",
        "ALTER TABLE users ENABLE ALWAYS TRIGGER old",
        "ALTER TABLE users SET SCHEMA elsewhere",
        "ALTER TABLE users OWNER TO CURRENT_USER",
        "ALTER TABLE users REPLICA IDENTITY FULL",
        "ALTER TABLE users INHERIT people",
        "DROP TRIGGER old ON users",
        "ALTER POLICY own ON users TO PUBLIC",
        "CREATE RULE r AS ON INSERT TO users DO ALSO NOTHING",
        "EXPLAIN ANALYZE DELETE FROM users WHERE email = ''",
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
                " AND locktype = 'relation' AND relation::regclass::text IN ('users', 'workshops', 'other', 'events')"
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
