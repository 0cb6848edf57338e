"""credit-ledger: its `decrement` with a key, on SQLAlchemy's pool.

The package ships no schema, only its repository does; here are the tables and constraints that its SQL needs. Row
level security is left out: the superuser of this benchmark would pass it by, and it can only cost time.
"""

from __future__ import annotations

from uuid import UUID

import credit_ledger
import sqlalchemy as sa

TABLES = """
CREATE TABLE tenants (id uuid PRIMARY KEY, name text);
CREATE TABLE credit_balance (
  tenant_id uuid PRIMARY KEY REFERENCES tenants ON DELETE CASCADE, credits numeric(18, 4) NOT NULL,
  updated_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE credit_ledger (
  id uuid PRIMARY KEY, tenant_id uuid NOT NULL REFERENCES tenants ON DELETE CASCADE, delta numeric(18, 4) NOT NULL,
  reason varchar(120) NOT NULL, idempotency_key varchar(200), balance_after numeric(18, 4),
  created_at timestamptz NOT NULL DEFAULT now(), UNIQUE (tenant_id, idempotency_key));
CREATE INDEX ON credit_ledger (tenant_id);
"""


class Adapter:
    def __init__(self, url: str, connections: int) -> None:
        self.engine = sa.create_engine(url, pool_size=connections, max_overflow=0)

    def create(self) -> None:
        with self.engine.begin() as conn:
            conn.exec_driver_sql(TABLES)

    def open(self, account: int, credits: int) -> None:
        with self.engine.begin() as conn:
            tenant = {"id": UUID(int=account), "name": str(account)}
            conn.execute(sa.text("INSERT INTO tenants (id, name) VALUES (:id, :name)"), tenant)
        credit_ledger.grant(str(UUID(int=account)), credits, idempotency_key="opening", engine=self.engine)

    def consume(self, account: int, key: str) -> bool:
        charge = credit_ledger.decrement(str(UUID(int=account)), 1, idempotency_key=key, engine=self.engine)
        return charge.ok and not charge.deduped

    consume_again = consume

    def close(self) -> None:
        self.engine.dispose()
