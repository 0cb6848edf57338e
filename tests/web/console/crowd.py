"""A big host app made set-wise: users by the hundred thousand, each with an honest chain of ledger rows."""

from __future__ import annotations

import psycopg

USERS = """
INSERT INTO users (id, email)
SELECT md5('user ' || n)::uuid, 'person' || n || '@example.com' FROM generate_series(1, %(users)s) n
"""

# The n-th row of a user is a purchase of five credits when n is 1, 6, 11, …, and spends one otherwise. Times run
# up to now over 90 days, user after user, so that rows lie as live traffic would have left them; ids are UUIDv7.
ROWS = """
INSERT INTO credit_transactions (
  id, user_id, type, status, amount, balance_after, sequence, description, amount_paid, currency, created_at,
  completed_at)
SELECT
  (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7' || substr(md5(k::text), 1, 3)
    || '8' || substr(md5(k::text), 4, 15))::uuid,
  md5('user ' || u)::uuid,
  (CASE WHEN s %% 5 = 1 THEN 'purchase' ELSE 'consumption' END)::credit_transaction_type,
  'completed',
  CASE WHEN s %% 5 = 1 THEN 5 ELSE -1 END,
  5 * ((s + 4) / 5) - (s - (s + 4) / 5),
  s,
  CASE WHEN s %% 5 = 1 THEN 'Purchased Five Flights pack' ELSE 'Credit consumed for Workshop: Mobile App Discovery' END,
  CASE WHEN s %% 5 = 1 THEN 34900 END,
  CASE WHEN s %% 5 = 1 THEN 'usd' END,
  at,
  at
FROM (
  SELECT k, 1 + k %% %(users)s AS u, (1 + k / %(users)s)::int AS s,
    now() - interval '90 days' + (k + 1)::float / (%(users)s * %(rows_each)s) * interval '90 days' AS at
  FROM generate_series(0, %(users)s * %(rows_each)s - 1) k) made
"""

STANDINGS = """
UPDATE users SET credit_sequence = last.sequence, credit_balance = last.balance_after
FROM (SELECT DISTINCT ON (user_id) user_id, sequence, balance_after FROM credit_transactions
  ORDER BY user_id, sequence DESC) last
WHERE last.user_id = users.id
"""


def fill(url: str, *, users: int, rows_each: int) -> None:
    """Fill a migrated, empty database of the shape ``uuid``."""
    asked = {"users": users, "rows_each": rows_each}
    with psycopg.connect(url.replace("+psycopg", "", 1), autocommit=True) as conn:
        for statement in (USERS, ROWS, STANDINGS):
            conn.execute(statement, asked)
        conn.execute("VACUUM ANALYZE")
