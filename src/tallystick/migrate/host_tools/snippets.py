"""The lines for the host's own schema file, so that its tool does not drop our columns."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping

from psycopg.sql import Identifier

from tallystick.config import Config, HostMapping, Word
from tallystick.errors import ConfigError, shown
from tallystick.migrate.revisions import HostNames
from tallystick.schema import LEDGER, CreditTransactionStatus, CreditTransactionType

_SQLALCHEMY_IMPORTS = """\
# --- at the top of your models
from datetime import datetime
from sqlalchemy import Boolean, DateTime, Index, Integer, String, Text, text
from sqlalchemy.orm import Mapped, mapped_column
"""
_SQLALCHEMY_USERS = """\
# --- in the model of {users}
    credit_balance: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    credit_sequence: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    onboarding_complete: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    stripe_customer_id: Mapped[str | None] = mapped_column(Text)
    plan_tier: Mapped[str] = mapped_column(String(32), server_default=text("'free'"))
    updated_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=text("now()"))
    deleted_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    credit_held: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    credit_due_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
"""
_SQLALCHEMY_INDEX = """\
# --- below the model of {users}, with its class for User
Index(
    "tallystick_users_stripe_customer_id",
    User.stripe_customer_id,
    unique=True,
    postgresql_where=text({customer_there}),
)
Index(
    "tallystick_users_credit_due_at", User.credit_due_at, postgresql_where=text("credit_due_at IS NOT NULL")
)
"""
_SQLALCHEMY_WORKSHOPS = """\
# --- in the model of {workshops}
    credit_consumed_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    deleted_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
"""
_SQLALCHEMY_ENV = '''\
# --- in env.py of Alembic, and include_name=include_name in each context.configure()
def include_name(name, type_, parent_names):
    """Tallystick migrates what is its own."""
    if type_ == "schema":
        return name != "tallystick"
    return not (type_ == "table" and name == "{ledger}")
'''

_DRIZZLE = """\
// --- in the table of {users}
  creditBalance: integer("credit_balance").notNull().default(0),
  creditSequence: integer("credit_sequence").notNull().default(0),
  onboardingComplete: boolean("onboarding_complete").notNull().default(false),
  stripeCustomerId: text("stripe_customer_id"),
  planTier: varchar("plan_tier", {{ length: 32 }}).notNull().default("free"),
  updatedAt: timestamp("updated_at", {{ withTimezone: true }}).notNull().defaultNow(),
  deletedAt: timestamp("deleted_at", {{ withTimezone: true }}),
  creditHeld: integer("credit_held").notNull().default(0),
  creditDueAt: timestamp("credit_due_at", {{ withTimezone: true }}),
"""
_DRIZZLE_INDEX = """\
// --- and in its third argument
  uniqueIndex("tallystick_users_stripe_customer_id").on(table.stripeCustomerId)
    .where(sql`{customer} IS NOT NULL`),
  index("tallystick_users_credit_due_at").on(table.creditDueAt)
    .where(sql`credit_due_at IS NOT NULL`),
"""
_DRIZZLE_WORKSHOPS = """\
// --- in the table of {workshops}
  creditConsumedAt: timestamp("credit_consumed_at", {{ withTimezone: true }}),
  deletedAt: timestamp("deleted_at", {{ withTimezone: true }}),
"""
_DRIZZLE_CONFIG = """\
// --- beside the tables: drizzle-kit drops types that it does not know, and has no filter for them
export const creditTransactionType = {enum}("credit_transaction_type", [{types}]);
export const creditTransactionStatus = {enum}("credit_transaction_status", [{statuses}]);
// --- in drizzle.config.ts: Tallystick migrates what is its own (name your other schemas too)
  tablesFilter: ["!{ledger}"],
  schemaFilter: [{schemas}],
// --- then, where drizzle-kit generate writes your migrations: run it, and put this into the .sql file in place of all
// --- that it wrote, for the database has it already
SELECT 1;
"""

_PRISMA = """\
// --- in the model of {users}
  creditBalance      Int       @default(0) @map("credit_balance")
  creditSequence     Int       @default(0) @map("credit_sequence")
  onboardingComplete Boolean   @default(false) @map("onboarding_complete")
  stripeCustomerId   String?   @map("stripe_customer_id")
  planTier           String    @default("free") @map("plan_tier") @db.VarChar(32)
  updatedAt          DateTime  @default(now()) @map("updated_at") @db.Timestamptz(6)
  deletedAt          DateTime? @map("deleted_at") @db.Timestamptz(6)
  creditHeld         Int       @default(0) @map("credit_held")
  creditDueAt        DateTime? @map("credit_due_at") @db.Timestamptz(6)
"""
_PRISMA_WORKSHOPS = """\
// --- in the model of {workshops}
  creditConsumedAt DateTime? @map("credit_consumed_at") @db.Timestamptz(6)
  deletedAt        DateTime? @map("deleted_at") @db.Timestamptz(6)
"""
_PRISMA_CONFIG = """\
// --- in prisma.config.ts: Tallystick migrates what is its own
  experimental: {{ externalTables: true }},
  tables: {{ external: ["{schema}.{ledger}"] }},
  enums: {{ external: ["{schema}.credit_transaction_type", "{schema}.credit_transaction_status"] }},
"""

_DJANGO_IMPORTS = """\
# --- at the top of your models
from django.db import models
from django.db.models.functions import Now


def of_the_ledger(field):  # Django reads a generated field, and no save() writes it
    return models.GeneratedField(expression=models.Value(None, field), output_field=field, db_persist=True)
"""
_DJANGO = """\
# --- in the model of {users}
    credit_balance = of_the_ledger(models.IntegerField())
    credit_sequence = of_the_ledger(models.IntegerField())
    onboarding_complete = models.BooleanField(db_default=False)
    stripe_customer_id = of_the_ledger(models.TextField())
    plan_tier = models.CharField(max_length=32, db_default="free")
    updated_at = models.DateTimeField(db_default=Now())
    deleted_at = models.DateTimeField(null=True)
    credit_held = of_the_ledger(models.IntegerField())
    credit_due_at = of_the_ledger(models.DateTimeField())
"""
_DJANGO_WORKSHOPS = """\
# --- in the model of {workshops}
    credit_consumed_at = of_the_ledger(models.DateTimeField())
    deleted_at = models.DateTimeField(null=True)
"""
_DJANGO_STATE = """\
# --- then run makemigrations, and wrap the operations that it wrote: the columns are there already
    operations = [migrations.SeparateDatabaseAndState(state_operations=[
        ...,
    ])]
"""

_TOOLS: Mapping[str, tuple[str, str, str, str, str]] = {
    "sqlalchemy": (_SQLALCHEMY_IMPORTS, _SQLALCHEMY_USERS, _SQLALCHEMY_INDEX, _SQLALCHEMY_WORKSHOPS, _SQLALCHEMY_ENV),
    "drizzle": ("", _DRIZZLE, _DRIZZLE_INDEX, _DRIZZLE_WORKSHOPS, _DRIZZLE_CONFIG),
    "prisma": ("", _PRISMA, "", _PRISMA_WORKSHOPS, _PRISMA_CONFIG),
    "django": (_DJANGO_IMPORTS, _DJANGO, "", _DJANGO_WORKSHOPS, _DJANGO_STATE),
}
_NOT_READ = "{comment} leave out the columns that your models name already, and keep your own lines for them\n"

TOOLS = tuple(_TOOLS)


def snippet(
    tool: str,
    config: Config,
    adopted: Collection[str] | None = None,
    *,
    there: Mapping[Word, Collection[str]] | None = None,
) -> str:
    """The lines for one of ``TOOLS``.

    ``adopted``: columns that the app had before and its models name already, as ``Host.adopted_names``. They are left
    out; if they are not known (None), a comment says to do so. ``there``: the names of all columns of the app's tables,
    as ``Host.columns``. A field of ours with the name of one of them gets another name.

    Raises:
        ConfigError: there are none for this tool.
    """
    if tool not in _TOOLS:
        raise ConfigError(f"there is no snippet for {shown(tool)}. There is one for: {', '.join(TOOLS)}", key=tool)
    imports, users, index, workshops, rest = _TOOLS[tool]
    # a column that is used in place of ours has a field of the app's
    of_users = set((there or {}).get("users", ())) - set(config.host.users.adoptable.values())
    of_workshops = (there or {}).get("workshops", ())
    # columns with other names in the mapping are known without the database
    theirs = {*(adopted or ()), *HostNames.of(config.host).adopted_names}
    users, index = _renamed(_without(users, "users", theirs), of_users), _renamed(index, of_users)
    workshops = _renamed(_without(workshops, "workshops", theirs), of_workshops)
    if config.host.credits == "bigint":
        imports, users = _large(imports), _MONEY.sub(lambda line: _large(line[0]), users)
    parts = [imports, users, index, workshops if config.host.workshops else "", rest]
    text = "\n".join(part for part in parts if part).format(**_names(config.host))
    return _NOT_READ.format(comment=rest.split()[0]) + text if adopted is None else text


_LARGE = {
    "IntegerField(": "BigIntegerField(",
    "(Integer,": "(BigInteger,",
    " Integer,": " BigInteger, Integer,",
    'integer("credit_balance")': 'bigint("credit_balance", {{ mode: "number" }})',
    'integer("credit_held")': 'bigint("credit_held", {{ mode: "number" }})',
    " Int  ": " BigInt",
}
_MONEY = re.compile(r"^.*credit_(?:balance|held).*\n", re.MULTILINE)
"""The lines of the columns whose type follows ``HostMapping.credits``."""


def _large(part: str) -> str:
    """The lines with 64-bit types in place of 32-bit ones."""
    for small, large in _LARGE.items():
        part = part.replace(small, large)
    return part


def _renamed(part: str, there: Collection[str]) -> str:
    """Rename our camel-case fields of Prisma's and Drizzle's models that are names of the app's columns."""
    for name in there:
        if name != name.lower():
            field = f"tallystick{name[0].upper()}{name[1:]}"
            part = re.sub(rf"^  {re.escape(name)}(:|\s)", rf"  {field}\1", part, flags=re.MULTILINE)
            part = re.sub(rf"\btable\.{re.escape(name)}\b", f"table.{field}", part)
    return part


def _without(part: str, word: str, adopted: Collection[str]) -> str:
    """The lines without those of adopted columns; empty if no column is left."""
    names = [re.escape(name.partition(".")[2]) for name in adopted if name.startswith(f"{word}.")]
    if not names:
        return part
    names_column = re.compile(rf"\b({'|'.join(names)})\b")
    head, *lines = [line for line in part.splitlines(keepends=True) if not names_column.search(line)]
    return head + "".join(lines) if lines else ""


def _names(host: HostMapping) -> dict[str, str]:
    workshops, customer = host.workshops, host.users.stripe_customer_id
    if not re.fullmatch("[a-z_][a-z0-9_]*", customer):
        customer = Identifier(customer).as_string(None)
    schemas = dict.fromkeys(table.schema for table in host.by_word.values())
    return {
        "users": f"{host.users.schema}.{host.users.table}",
        "workshops": f"{workshops.schema}.{workshops.table}" if workshops else "",
        "schema": host.users.schema,
        "schemas": ", ".join(json.dumps(schema, ensure_ascii=False) for schema in schemas),
        "ledger": LEDGER,
        # what a template of JavaScript's, and SQLAlchemy's text(), would read as their own
        "customer": re.sub(r"[\\`]|\$(?=\{)", r"\\\g<0>", customer),
        "customer_there": json.dumps(re.sub(r":(?=\w)", r"\\:", customer) + " IS NOT NULL", ensure_ascii=False),
        "enum": "pgEnum" if host.users.schema == "public" else f'pgSchema("{host.users.schema}").enum',
        "types": ", ".join(f'"{label}"' for label in CreditTransactionType),
        "statuses": ", ".join(f'"{label}"' for label in CreditTransactionStatus),
    }
