"""Host databases before Tallystick, as DDL, each with the mapping that ``propose`` finds for it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from tallystick import Config, HostMapping, UsersTable, WorkshopsTable
from tallystick.dev.postgres import Server

CATALOGUE = """
    WITH ours AS (
      SELECT oid, nspname FROM pg_namespace
      WHERE nspname NOT IN ('pg_catalog', 'information_schema') AND nspname !~ '^pg_'
    )
    SELECT 'schema', nspname::text FROM ours
    UNION ALL
    SELECT concat('relation ', c.relkind), concat(c.oid::regclass, ' ', pg_get_indexdef(i.indexrelid), i.indisvalid)
    FROM pg_class c LEFT JOIN pg_index i ON i.indexrelid = c.oid WHERE c.relnamespace IN (SELECT oid FROM ours)
    UNION ALL
    SELECT 'column', concat(c.oid::regclass, ' ', row_number() OVER (PARTITION BY c.oid ORDER BY a.attnum), ' ',
      a.attname, ' ', format_type(a.atttypid, a.atttypmod), a.attnotnull, pg_get_expr(d.adbin, d.adrelid))
    FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
    WHERE c.relnamespace IN (SELECT oid FROM ours)
    UNION ALL
    SELECT 'constraint', concat(conrelid::regclass, ' ', conname, ' ', pg_get_constraintdef(oid))
    FROM pg_constraint WHERE connamespace IN (SELECT oid FROM ours)
    UNION ALL
    SELECT 'trigger', concat(pg_get_triggerdef(oid), tgenabled)
    FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL
    SELECT 'function', concat(oid::regprocedure, prosrc) FROM pg_proc WHERE pronamespace IN (SELECT oid FROM ours)
    UNION ALL
    SELECT 'type', concat(t.oid::regtype, ' ', t.typtype,
      (SELECT string_agg(enumlabel, ',' ORDER BY enumsortorder) FROM pg_enum WHERE enumtypid = t.oid))
    FROM pg_type t WHERE t.typnamespace IN (SELECT oid FROM ours)
"""


@dataclass
class App:
    """A host's database that is not migrated yet."""

    url: str
    config: Config
    server: Server

    def __post_init__(self) -> None:
        self.engine = sa.create_engine(self.url, poolclass=sa.NullPool)

    def run(self, *statements: str) -> None:
        """Each statement alone, committed."""
        with self.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as conn:
            for statement in statements:
                conn.exec_driver_sql(statement)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with self.engine.connect() as conn:
            return [tuple(row) for row in conn.exec_driver_sql(query)]

    def value(self, query: str) -> Any:
        return self.rows(query)[0][0]

    def shape(self) -> set[tuple[str, str]]:
        """All there is in the catalogues, by names: quicker than a dump, for tests that look often."""
        return {(str(kind), str(text)) for kind, text in self.rows(CATALOGUE)}

    def psql(self, script: str) -> None:
        """Run a script as an administrator would: again, where an autovacuum or a checkpoint was in its way."""
        command = self.server.command("psql", "--quiet", "--no-psqlrc", str(self.engine.url.database))
        for _ in range(10):
            ran = subprocess.run(
                command, env=self.server.env, check=False, capture_output=True, text=True, input=script
            )
            if "timeout" not in ran.stderr:
                break
        assert ran.returncode == 0, ran.stderr

    def dump(self, *options: str) -> str:
        """All of the database, as pg_dump writes it."""
        command = self.server.command("pg_dump", *options, str(self.engine.url.database))
        text = subprocess.run(command, env=self.server.env, check=True, capture_output=True, text=True).stdout
        # newer ones frame the dump with a random word
        return "\n".join(line for line in text.splitlines() if not line.startswith(("\\restrict", "\\unrestrict")))


@dataclass(frozen=True)
class HostCase:
    ddl: str
    mapping: HostMapping
    adopted: tuple[str, ...] = ()
    asked: dict[str, str] | None = None  # what `tallystick init` has to be told


HOSTS = {
    "uuid": HostCase(
        """
        CREATE TABLE users (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), email text NOT NULL UNIQUE);
        CREATE TABLE workshops (
          id uuid PRIMARY KEY DEFAULT gen_random_uuid(), user_id uuid NOT NULL REFERENCES users, title text,
          created_at timestamptz NOT NULL DEFAULT now());
        INSERT INTO users (email) SELECT 'user ' || i FROM generate_series(1, 500) i;
        INSERT INTO workshops (user_id, title) SELECT id, 'of ' || email FROM users;
        """,
        HostMapping(users=UsersTable(email="email")),
    ),
    "text": HostCase(
        """
        CREATE TABLE users (id varchar(36) PRIMARY KEY);
        CREATE TABLE workshops (id text PRIMARY KEY, owner_id varchar(36) REFERENCES users, name varchar(99),
          "createdAt" timestamp(3) NOT NULL DEFAULT now());
        INSERT INTO users VALUES ('a'), ('b');
        INSERT INTO workshops VALUES ('w', 'a', 'x');
        """,
        HostMapping(
            users=UsersTable(key_type="text"),
            workshops=WorkshopsTable(key_type="text", owner="owner_id", title="name", created_at="createdAt"),
        ),
    ),
    "integer": HostCase(
        """
        CREATE TABLE users (id serial PRIMARY KEY);
        CREATE TABLE workshops (id serial PRIMARY KEY, user_id integer NOT NULL REFERENCES users);
        INSERT INTO users SELECT FROM generate_series(1, 9);
        INSERT INTO workshops (user_id) SELECT id FROM users;
        """,
        HostMapping(
            users=UsersTable(key_type="integer"),
            workshops=WorkshopsTable(key_type="integer", title=None, created_at=None),
        ),
    ),
    "bigint": HostCase(
        """
        CREATE TABLE users (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY);
        CREATE TABLE workshops (id bigint PRIMARY KEY, user_id bigint NOT NULL, title text, created_at timestamptz);
        """,
        HostMapping(users=UsersTable(key_type="bigint"), workshops=WorkshopsTable(key_type="bigint")),
    ),
    "keyed by an external identity": HostCase(
        """
        CREATE TABLE users (id serial PRIMARY KEY, clerk_user_id text NOT NULL UNIQUE, email text);
        CREATE TABLE workshops (
          id uuid PRIMARY KEY, clerk_user_id text NOT NULL, title text, created_at timestamptz);
        INSERT INTO users (clerk_user_id) VALUES ('user_1'), ('user_2');
        """,
        HostMapping(
            users=UsersTable(key="clerk_user_id", key_type="text", email="email"),
            workshops=WorkshopsTable(owner="clerk_user_id"),
        ),
    ),
    "quoted, reserved and in schemas": HostCase(
        '''
        CREATE SCHEMA app;
        CREATE SCHEMA "Über %s";
        CREATE TABLE app."User" (id uuid PRIMARY KEY, "order" integer NOT NULL UNIQUE, "Email" text);
        CREATE TABLE "Über %s"."select" ("it's ""key""" bigint PRIMARY KEY, "user" uuid REFERENCES app."User");
        ''',
        HostMapping(
            users=UsersTable(schema="app", table="User", email="Email"),
            workshops=WorkshopsTable(
                schema="Über %s",
                table="select",
                key='it\'s "key"',
                key_type="bigint",
                owner="user",
                title=None,
                created_at=None,
            ),
        ),
        asked={"workshops": "select"},
    ),
    "with names that would end a quoted body": HostCase(
        """
        CREATE SCHEMA "$$app";
        CREATE TABLE "$$app".users ("id$$" uuid PRIMARY KEY, email text);
        CREATE TABLE "$$app".workshops (
          "$q$" uuid PRIMARY KEY, user_id uuid NOT NULL REFERENCES "$$app".users, title text, "createdAt" timestamptz);
        INSERT INTO "$$app".users VALUES (gen_random_uuid(), 'a');
        """,
        HostMapping(
            users=UsersTable(schema="$$app", key="id$$", email="email"),
            workshops=WorkshopsTable(schema="$$app", key="$q$", created_at="createdAt"),
        ),
    ),
    "keyed by a reserved word": HostCase(
        'CREATE TABLE "user" ("order" integer PRIMARY KEY); INSERT INTO "user" VALUES (1);',
        HostMapping(users=UsersTable(table="user", key="order", key_type="integer"), workshops=None),
    ),
    "no workshops": HostCase(
        "CREATE TABLE users (id uuid PRIMARY KEY, email varchar(200));",
        HostMapping(users=UsersTable(email="email"), workshops=None),
    ),
    "with columns of its own that fit": HostCase(
        """
        CREATE TABLE users (
          id uuid PRIMARY KEY, deleted_at timestamp(3), stripe_customer_id varchar(64), plan_tier text DEFAULT 'gold',
          onboarding_complete boolean NOT NULL DEFAULT true, updated_at timestamp(0) NOT NULL DEFAULT now());
        CREATE TABLE workshops (
          id uuid PRIMARY KEY, user_id uuid REFERENCES users, title text, created_at timestamptz,
          deleted_at timestamptz(3));
        INSERT INTO users VALUES ('00000000-0000-0000-0000-000000000001', now(), 'cus_1', 'gold', false, now());
        """,
        HostMapping(),
        adopted=(
            "users.deleted_at",
            "users.onboarding_complete",
            "users.plan_tier",
            "users.stripe_customer_id",
            "users.updated_at",
            "workshops.deleted_at",
        ),
    ),
    "Prisma, with such columns in its own spelling": HostCase(
        """
        CREATE TABLE "User" (id text PRIMARY KEY, email text NOT NULL UNIQUE, "createdAt" timestamp(3) NOT NULL
          DEFAULT now(), "updatedAt" timestamp(3) NOT NULL, "deletedAt" timestamp(3), "stripeCustomerId" text);
        CREATE TABLE "Workshop" (
          id text PRIMARY KEY, "userId" text NOT NULL REFERENCES "User", title text,
          "createdAt" timestamp(3) NOT NULL DEFAULT now(), "deletedAt" timestamp(3));
        INSERT INTO "User" VALUES ('u1', 'a@example.com', now(), '2026-01-02', '2026-01-03', 'cus_1');
        """,
        HostMapping(
            users=UsersTable(
                table="User",
                key_type="text",
                email="email",
                stripe_customer_id="stripeCustomerId",
                updated_at="updatedAt",
                deleted_at="deletedAt",
            ),
            workshops=WorkshopsTable(
                table="Workshop", key_type="text", owner="userId", created_at="createdAt", deleted_at="deletedAt"
            ),
        ),
        adopted=("users.deleted_at", "users.stripe_customer_id", "users.updated_at", "workshops.deleted_at"),
    ),
    "balances in a table of their own": HostCase(
        """
        CREATE TABLE users (id serial PRIMARY KEY, email text NOT NULL UNIQUE);
        CREATE TABLE workshops (
          id serial PRIMARY KEY, user_id integer NOT NULL REFERENCES users, title text, created_at timestamptz,
          "deletedAt" timestamp);
        CREATE TABLE "Wallet" (
          "userId" integer PRIMARY KEY REFERENCES users ON DELETE CASCADE, "creditsLeft" numeric(12,2) DEFAULT 0,
          "updatedAt" timestamp(3) NOT NULL DEFAULT now(), "deletedAt" timestamp, "stripeCustomerId" varchar(60));
        INSERT INTO users (email) VALUES ('a@example.com');
        INSERT INTO workshops (user_id) VALUES (1);
        INSERT INTO "Wallet" ("userId", "creditsLeft") VALUES (1, 4);
        """,
        HostMapping(
            users=UsersTable(
                table="Wallet",
                key="userId",
                key_type="integer",
                balance="creditsLeft",
                stripe_customer_id="stripeCustomerId",
                updated_at="updatedAt",
                deleted_at="deletedAt",
            ),
            workshops=WorkshopsTable(key_type="integer", deleted_at="deletedAt"),
        ),
        adopted=(
            "users.credit_balance",
            "users.deleted_at",
            "users.stripe_customer_id",
            "users.updated_at",
            "workshops.deleted_at",
        ),
        asked={"users": "Wallet", "users_key": "userId"},
    ),
    "with every column already": HostCase(
        """
        CREATE TABLE users (
          id uuid PRIMARY KEY, credit_balance integer NOT NULL DEFAULT 0, credit_sequence integer NOT NULL DEFAULT 0,
          onboarding_complete boolean NOT NULL DEFAULT false, stripe_customer_id text,
          plan_tier varchar(40) NOT NULL DEFAULT 'free', updated_at timestamptz, deleted_at timestamptz);
        CREATE TABLE workshops (
          id uuid PRIMARY KEY, user_id uuid REFERENCES users, title text, created_at timestamptz,
          credit_consumed_at timestamptz, deleted_at timestamp);
        """,
        HostMapping(),
        adopted=(
            "users.credit_balance",
            "users.credit_sequence",
            "users.deleted_at",
            "users.onboarding_complete",
            "users.plan_tier",
            "users.stripe_customer_id",
            "users.updated_at",
            "workshops.credit_consumed_at",
            "workshops.deleted_at",
        ),
    ),
}
