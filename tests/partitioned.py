"""The ledger on four hash partitions by user, as tables that are distributed by user would have it."""

from __future__ import annotations

import sqlalchemy as sa

from tallystick.config import Config
from tallystick.migrate.checks.status import functions_sql

PARTITIONS = 4

INDEXES = """
SELECT indexname, indexdef FROM pg_indexes
WHERE schemaname = 'public' AND tablename = 'credit_transactions' AND indexname <> 'credit_transactions_pkey'
"""

# A unique key of a partitioned table holds the column that it is partitioned by.
TABLE = """
ALTER TABLE credit_transactions RENAME TO plain;
CREATE TABLE credit_transactions (LIKE plain INCLUDING DEFAULTS INCLUDING CONSTRAINTS) PARTITION BY HASH (user_id);
INSERT INTO credit_transactions SELECT * FROM plain;
DROP TABLE plain CASCADE;
ALTER TABLE credit_transactions
  ADD CONSTRAINT credit_transactions_pkey PRIMARY KEY (user_id, id),
  ADD CONSTRAINT credit_transactions_user_fk
    FOREIGN KEY (user_id) REFERENCES users (id) ON UPDATE CASCADE ON DELETE RESTRICT,
  ADD CONSTRAINT credit_transactions_workshop_fk
    FOREIGN KEY (workshop_id) REFERENCES workshops (id) ON DELETE SET NULL;
CREATE TRIGGER tallystick_append_only BEFORE UPDATE OR DELETE ON credit_transactions
  FOR EACH ROW EXECUTE FUNCTION tallystick.append_only();
CREATE TRIGGER tallystick_no_truncate BEFORE TRUNCATE ON credit_transactions
  FOR EACH STATEMENT EXECUTE FUNCTION tallystick.append_only();
"""


def partition(engine: sa.Engine, config: Config) -> None:
    """Put a partitioned table in the place of the ledger's; of a migrated app with ``public.users`` by ``id``.

    The functions are made once more, as they are: a parameter of one is a row of the table.

    Its keys are (user, id), (user, idempotency key), (user, sequence) and (user, Stripe session). There is no foreign
    key on ``refund_of``: the two rows of a merge name each other, and belong to two users.
    """
    with engine.begin() as conn:
        indexes = conn.execute(sa.text(INDEXES)).all()
        parts = "".join(
            f"CREATE TABLE ledger_{n} PARTITION OF credit_transactions"
            f" FOR VALUES WITH (MODULUS {PARTITIONS}, REMAINDER {n});"
            for n in range(PARTITIONS)
        )
        before, _, after = TABLE.partition("INSERT INTO")
        conn.exec_driver_sql(f"{before}{parts}INSERT INTO{after}".replace("%", "%%"))
        for _, made in indexes:
            composite = made.replace("(stripe_session_id) WHERE", "(user_id, stripe_session_id) WHERE")
            conn.exec_driver_sql(composite.replace("%", "%%"))
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as conn:
        conn.exec_driver_sql(functions_sql(None, config).replace("%", "%%"))
