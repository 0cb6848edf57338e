-- Every statement of the ledger for the default mapping, as the tests compile it (test_statements.py).
-- Shortened: no "public.", and all columns of a row are its *.
-- After a change that is meant: TALLYSTICK_UPDATE_GOLDEN=1 make test

-- start_purchase
WITH written AS (
  INSERT INTO credit_transactions (id, user_id, type, status, amount, description, stripe_price_id, idempotency_key)
  SELECT :p_id::UUID AS id, users.id AS user_id, 'purchase' AS type, 'pending' AS status, :p_amount::INTEGER AS amount, :p_description::VARCHAR AS description, :p_price::VARCHAR AS stripe_price_id, :p_key::VARCHAR AS idempotency_key
  FROM users
  WHERE users.id = :p_user::UUID AND users.deleted_at IS NULL
  ON CONFLICT DO NOTHING
  RETURNING credit_transactions.*)
SELECT written.*
FROM written;

-- attach_session
WITH kept AS (
  SELECT users.id
  FROM users
  WHERE users.id = :p_user::UUID AND pg_current_xact_id_if_assigned() IS NOT NULL FOR KEY SHARE SKIP LOCKED),
mine AS (
  SELECT users.ctid = (
    SELECT seen.ctid
    FROM users AS seen
    WHERE seen.id = :p_user::UUID) AS as_seen
  FROM users
  WHERE users.id = :p_user::UUID AND (EXISTS (
      SELECT kept.id
      FROM kept))
  FOR NO KEY UPDATE SKIP LOCKED),
turn AS (
  SELECT CASE WHEN (EXISTS (
      SELECT mine.as_seen
      FROM mine)) THEN NULL ELSE pg_advisory_xact_lock(hashtextextended(CAST(:p_user::UUID AS TEXT), 0)) END AS taken
  WHERE NOT (EXISTS (
      SELECT mine.as_seen
      FROM mine
      WHERE NOT mine.as_seen))),
account AS (
  SELECT users.id AS key, users.credit_balance, users.credit_sequence
  FROM users JOIN turn ON true
  WHERE users.id = :p_user::UUID
  FOR NO KEY UPDATE OF users)
UPDATE credit_transactions
SET stripe_session_id=:p_session::VARCHAR, stripe_payment_intent_id=coalesce(credit_transactions.stripe_payment_intent_id, :p_intent::VARCHAR)
FROM account
WHERE credit_transactions.user_id = :p_user::UUID AND credit_transactions.id = :p_purchase::UUID AND credit_transactions.type = 'purchase' AND coalesce(credit_transactions.stripe_session_id, :p_session::VARCHAR) = :p_session::VARCHAR AND NOT (EXISTS (
    SELECT *
    FROM credit_transactions AS other
    WHERE other.stripe_session_id = :p_session::VARCHAR AND other.id != credit_transactions.id)) AND account.key = credit_transactions.user_id AND (credit_transactions.stripe_session_id IS NULL OR credit_transactions.stripe_payment_intent_id IS NULL AND :p_intent::VARCHAR IS NOT NULL)
RETURNING credit_transactions.*;

-- complete_by_id
WITH kept AS (
  SELECT users.id
  FROM users
  WHERE users.id = :p_user::UUID AND pg_current_xact_id_if_assigned() IS NOT NULL FOR KEY SHARE SKIP LOCKED),
mine AS (
  SELECT users.ctid = (
    SELECT seen.ctid
    FROM users AS seen
    WHERE seen.id = :p_user::UUID) AS as_seen
  FROM users
  WHERE users.id = :p_user::UUID AND (EXISTS (
      SELECT kept.id
      FROM kept))
  FOR NO KEY UPDATE SKIP LOCKED),
turn AS (
  SELECT CASE WHEN (EXISTS (
      SELECT mine.as_seen
      FROM mine)) THEN NULL ELSE pg_advisory_xact_lock(hashtextextended(CAST(:p_user::UUID AS TEXT), 0)) END AS taken
  WHERE NOT (EXISTS (
      SELECT mine.as_seen
      FROM mine
      WHERE NOT mine.as_seen))),
account AS (
  SELECT users.id AS key, users.credit_balance, users.credit_sequence
  FROM users JOIN turn ON true
  WHERE users.id = :p_user::UUID
  FOR NO KEY UPDATE OF users),
stamped AS (
  SELECT account.key, account.credit_balance, account.credit_sequence, clock_timestamp() AS now
  FROM account),
written AS (
  UPDATE credit_transactions
  SET status='completed', balance_after=(stamped.credit_balance + credit_transactions.amount), sequence=(stamped.credit_sequence + 1), description=(credit_transactions.description || CASE WHEN (credit_transactions.status = 'failed') THEN ' (paid after all)' ELSE '' END), stripe_session_id=coalesce(credit_transactions.stripe_session_id, :p_session::VARCHAR), stripe_payment_intent_id=coalesce(credit_transactions.stripe_payment_intent_id, :p_intent::VARCHAR), amount_paid=coalesce(credit_transactions.amount_paid, :p_paid::BIGINT), currency=coalesce(credit_transactions.currency, :p_currency::VARCHAR), completed_at=stamped.now
  FROM stamped
  WHERE credit_transactions.user_id = :p_user::UUID AND credit_transactions.id = :p_purchase::UUID AND coalesce(credit_transactions.stripe_session_id, :p_session::VARCHAR) IS NOT DISTINCT FROM coalesce(:p_session::VARCHAR, credit_transactions.stripe_session_id) AND NOT (EXISTS (
      SELECT *
      FROM credit_transactions AS other
      WHERE other.stripe_session_id = :p_session::VARCHAR AND other.id != credit_transactions.id)) AND credit_transactions.type = 'purchase' AND credit_transactions.status != 'completed' AND stamped.credit_balance <= 2147483647 - credit_transactions.amount
  RETURNING credit_transactions.*),
moved AS (
  UPDATE users
  SET credit_balance=written.balance_after, credit_sequence=written.sequence
  FROM written
  WHERE users.id = :p_user::UUID AND users.id = written.user_id)
SELECT written.*
FROM written;

-- complete_by_session
WITH kept AS (
  SELECT users.id
  FROM users
  WHERE users.id = :p_user::UUID AND pg_current_xact_id_if_assigned() IS NOT NULL FOR KEY SHARE SKIP LOCKED),
mine AS (
  SELECT users.ctid = (
    SELECT seen.ctid
    FROM users AS seen
    WHERE seen.id = :p_user::UUID) AS as_seen
  FROM users
  WHERE users.id = :p_user::UUID AND (EXISTS (
      SELECT kept.id
      FROM kept))
  FOR NO KEY UPDATE SKIP LOCKED),
turn AS (
  SELECT CASE WHEN (EXISTS (
      SELECT mine.as_seen
      FROM mine)) THEN NULL ELSE pg_advisory_xact_lock(hashtextextended(CAST(:p_user::UUID AS TEXT), 0)) END AS taken
  WHERE NOT (EXISTS (
      SELECT mine.as_seen
      FROM mine
      WHERE NOT mine.as_seen))),
account AS (
  SELECT users.id AS key, users.credit_balance, users.credit_sequence
  FROM users JOIN turn ON true
  WHERE users.id = :p_user::UUID
  FOR NO KEY UPDATE OF users),
stamped AS (
  SELECT account.key, account.credit_balance, account.credit_sequence, clock_timestamp() AS now
  FROM account),
written AS (
  UPDATE credit_transactions
  SET status='completed', balance_after=(stamped.credit_balance + credit_transactions.amount), sequence=(stamped.credit_sequence + 1), description=(credit_transactions.description || CASE WHEN (credit_transactions.status = 'failed') THEN ' (paid after all)' ELSE '' END), stripe_session_id=coalesce(credit_transactions.stripe_session_id, :p_session::VARCHAR), stripe_payment_intent_id=coalesce(credit_transactions.stripe_payment_intent_id, :p_intent::VARCHAR), amount_paid=coalesce(credit_transactions.amount_paid, :p_paid::BIGINT), currency=coalesce(credit_transactions.currency, :p_currency::VARCHAR), completed_at=stamped.now
  FROM stamped
  WHERE credit_transactions.user_id = :p_user::UUID AND credit_transactions.stripe_session_id = :p_session::VARCHAR AND credit_transactions.type = 'purchase' AND credit_transactions.status != 'completed' AND stamped.credit_balance <= 2147483647 - credit_transactions.amount
  RETURNING credit_transactions.*),
moved AS (
  UPDATE users
  SET credit_balance=written.balance_after, credit_sequence=written.sequence
  FROM written
  WHERE users.id = :p_user::UUID AND users.id = written.user_id)
SELECT written.*
FROM written;

-- fail_by_id
WITH kept AS (
  SELECT users.id
  FROM users
  WHERE users.id = :p_user::UUID AND pg_current_xact_id_if_assigned() IS NOT NULL FOR KEY SHARE SKIP LOCKED),
mine AS (
  SELECT users.ctid = (
    SELECT seen.ctid
    FROM users AS seen
    WHERE seen.id = :p_user::UUID) AS as_seen
  FROM users
  WHERE users.id = :p_user::UUID AND (EXISTS (
      SELECT kept.id
      FROM kept))
  FOR NO KEY UPDATE SKIP LOCKED),
turn AS (
  SELECT CASE WHEN (EXISTS (
      SELECT mine.as_seen
      FROM mine)) THEN NULL ELSE pg_advisory_xact_lock(hashtextextended(CAST(:p_user::UUID AS TEXT), 0)) END AS taken
  WHERE NOT (EXISTS (
      SELECT mine.as_seen
      FROM mine
      WHERE NOT mine.as_seen))),
account AS (
  SELECT users.id AS key, users.credit_balance, users.credit_sequence
  FROM users JOIN turn ON true
  WHERE users.id = :p_user::UUID
  FOR NO KEY UPDATE OF users)
UPDATE credit_transactions
SET status='failed', description=(credit_transactions.description || ' (failed: ' || :p_reason::VARCHAR || ')')
FROM account
WHERE credit_transactions.user_id = :p_user::UUID AND credit_transactions.id = :p_purchase::UUID AND credit_transactions.type = 'purchase' AND credit_transactions.status = 'pending' AND account.key = credit_transactions.user_id
RETURNING credit_transactions.*;

-- fail_by_session
WITH kept AS (
  SELECT users.id
  FROM users
  WHERE users.id = :p_user::UUID AND pg_current_xact_id_if_assigned() IS NOT NULL FOR KEY SHARE SKIP LOCKED),
mine AS (
  SELECT users.ctid = (
    SELECT seen.ctid
    FROM users AS seen
    WHERE seen.id = :p_user::UUID) AS as_seen
  FROM users
  WHERE users.id = :p_user::UUID AND (EXISTS (
      SELECT kept.id
      FROM kept))
  FOR NO KEY UPDATE SKIP LOCKED),
turn AS (
  SELECT CASE WHEN (EXISTS (
      SELECT mine.as_seen
      FROM mine)) THEN NULL ELSE pg_advisory_xact_lock(hashtextextended(CAST(:p_user::UUID AS TEXT), 0)) END AS taken
  WHERE NOT (EXISTS (
      SELECT mine.as_seen
      FROM mine
      WHERE NOT mine.as_seen))),
account AS (
  SELECT users.id AS key, users.credit_balance, users.credit_sequence
  FROM users JOIN turn ON true
  WHERE users.id = :p_user::UUID
  FOR NO KEY UPDATE OF users)
UPDATE credit_transactions
SET status='failed', description=(credit_transactions.description || ' (failed: ' || :p_reason::VARCHAR || ')')
FROM account
WHERE credit_transactions.user_id = :p_user::UUID AND credit_transactions.stripe_session_id = :p_session::VARCHAR AND credit_transactions.type = 'purchase' AND credit_transactions.status = 'pending' AND account.key = credit_transactions.user_id
RETURNING credit_transactions.*;

-- consume
WITH kept AS (
  SELECT users.id
  FROM users
  WHERE users.id = :p_user::UUID AND pg_current_xact_id_if_assigned() IS NOT NULL FOR KEY SHARE SKIP LOCKED),
mine AS (
  SELECT users.ctid = (
    SELECT seen.ctid
    FROM users AS seen
    WHERE seen.id = :p_user::UUID) AS as_seen
  FROM users
  WHERE users.id = :p_user::UUID AND (EXISTS (
      SELECT kept.id
      FROM kept))
  FOR NO KEY UPDATE SKIP LOCKED),
turn AS (
  SELECT CASE WHEN (EXISTS (
      SELECT mine.as_seen
      FROM mine)) THEN NULL ELSE pg_advisory_xact_lock(hashtextextended(CAST(:p_user::UUID AS TEXT), 0)) END AS taken
  WHERE NOT (EXISTS (
      SELECT mine.as_seen
      FROM mine
      WHERE NOT mine.as_seen))),
account AS (
  SELECT users.id AS key, users.credit_balance, users.credit_sequence
  FROM users JOIN turn ON true
  WHERE users.id = :p_user::UUID AND users.deleted_at IS NULL
  FOR NO KEY UPDATE OF users),
written AS (
  INSERT INTO credit_transactions (id, user_id, type, status, amount, balance_after, sequence, description, idempotency_key, completed_at)
  SELECT :p_id::UUID AS id, account.key AS user_id, 'consumption' AS type, 'completed' AS status, -:p_amount::INTEGER AS amount, account.credit_balance - :p_amount::INTEGER AS balance_after, account.credit_sequence + 1 AS sequence, coalesce(:p_description::VARCHAR, 'Credit consumed') AS description, :p_key::VARCHAR AS idempotency_key, clock_timestamp() AS completed_at
  FROM account
  WHERE account.credit_balance >= :p_amount::INTEGER
  ON CONFLICT DO NOTHING
  RETURNING credit_transactions.*),
moved AS (
  UPDATE users
  SET credit_balance=written.balance_after, credit_sequence=written.sequence
  FROM written
  WHERE users.id = :p_user::UUID AND users.id = written.user_id)
SELECT written.balance_after, written.sequence, written.description, written.created_at, written.completed_at
FROM written;

-- consume_many
WITH fresh AS (
  SELECT item.id, item."user" AS "user", item.workshop, item.amount, item.key, item.description, item.n
  FROM unnest(:p_ids::UUID[], :p_users::UUID[], :p_workshops::UUID[], :p_amounts::INTEGER[], :p_keys::TEXT[], :p_descriptions::TEXT[]) WITH ORDINALITY AS item(id, "user", workshop, amount, key, description, n)
  WHERE NOT (EXISTS (
      SELECT *
      FROM credit_transactions AS prior
      WHERE prior.user_id = item."user" AND prior.idempotency_key = item.key))),
taken AS (
  SELECT pg_advisory_xact_lock(users.hash) AS taken
  FROM (
    SELECT DISTINCT hashtextextended(CAST(listed."user" AS TEXT), 0) AS hash
    FROM unnest(:p_users::UUID[]) AS listed("user") JOIN (
      SELECT count(*) AS rows
      FROM fresh) AS read ON read.rows >= 0
    ORDER BY hash) AS users),
turn AS (
  SELECT count(*) AS taken
  FROM taken),
account AS (
  SELECT users.id AS key, users.credit_balance, users.credit_sequence, (
    SELECT coalesce(max(ahead.sequence), 0) AS coalesce_1
    FROM credit_transactions AS ahead
    WHERE ahead.user_id = users.id AND ahead.sequence IS NOT NULL) <= users.credit_sequence AS agrees
  FROM users JOIN turn ON true
  WHERE users.id = ANY (:p_users::UUID[]) AND users.deleted_at IS NULL
  ORDER BY users.id
  FOR NO KEY UPDATE OF users),
claim AS (
  SELECT workshops.id AS key, workshops.user_id AS owner, coalesce(workshops.title, CAST(workshops.id AS TEXT)) AS name
  FROM workshops JOIN account ON workshops.user_id = account.key
  WHERE workshops.deleted_at IS NULL AND workshops.credit_consumed_at IS NULL AND workshops.id = ANY (:p_workshops::UUID[])
  ORDER BY workshops.id
  FOR NO KEY UPDATE OF workshops),
clock AS (
  SELECT count(*) AS users, clock_timestamp() AS now
  FROM account),
spend AS (
  SELECT fresh.n, fresh.id, fresh."user" AS "user", fresh.workshop, fresh.amount, fresh.key, coalesce(fresh.description, 'Credit consumed' || coalesce(' for Workshop: ' || claim.name, '')) AS description, account.credit_balance - sum(fresh.amount) OVER (PARTITION BY fresh."user"
    ORDER BY fresh.n) AS balance, account.credit_sequence + row_number() OVER (PARTITION BY fresh."user"
    ORDER BY fresh.n) AS sequence, clock.now
  FROM fresh JOIN account ON account.key = fresh."user"
  LEFT OUTER JOIN claim ON claim.key = fresh.workshop AND claim.owner = fresh."user" JOIN clock ON true
  WHERE account.agrees AND (fresh.workshop IS NULL OR claim.key IS NOT NULL)),
written AS (
  INSERT INTO credit_transactions (id, user_id, type, status, amount, balance_after, sequence, description, workshop_id, idempotency_key, completed_at)
  SELECT spend.id, spend."user" AS "user", 'consumption', 'completed', -spend.amount AS anon_1, spend.balance, spend.sequence, spend.description, spend.workshop, spend.key, spend.now
  FROM spend
  WHERE spend.balance >= 0),
moved AS (
  UPDATE users
  SET credit_balance=last.balance, credit_sequence=last.sequence
  FROM (
    SELECT spend."user" AS "user", min(spend.balance) AS balance, max(spend.sequence) AS sequence
    FROM spend
    WHERE spend.balance >= 0 GROUP BY spend."user") AS last
  WHERE users.id = last."user" AND users.id = ANY (:p_users::UUID[])),
marked AS (
  UPDATE workshops
  SET credit_consumed_at=spend.now
  FROM spend
  WHERE workshops.id = spend.workshop AND spend.balance >= 0)
SELECT spend.n, spend.balance, spend.sequence, spend.description, now() AS now_1, spend.now
FROM spend
WHERE spend.balance >= 0;

-- refund
WITH kept AS (
  SELECT users.id
  FROM users
  WHERE users.id = :p_user::UUID AND pg_current_xact_id_if_assigned() IS NOT NULL FOR KEY SHARE SKIP LOCKED),
mine AS (
  SELECT users.ctid = (
    SELECT seen.ctid
    FROM users AS seen
    WHERE seen.id = :p_user::UUID) AS as_seen
  FROM users
  WHERE users.id = :p_user::UUID AND (EXISTS (
      SELECT kept.id
      FROM kept))
  FOR NO KEY UPDATE SKIP LOCKED),
turn AS (
  SELECT CASE WHEN (EXISTS (
      SELECT mine.as_seen
      FROM mine)) THEN NULL ELSE pg_advisory_xact_lock(hashtextextended(CAST(:p_user::UUID AS TEXT), 0)) END AS taken
  WHERE NOT (EXISTS (
      SELECT mine.as_seen
      FROM mine
      WHERE NOT mine.as_seen))),
account AS (
  SELECT users.id AS key, users.credit_balance, users.credit_sequence
  FROM users JOIN turn ON true
  WHERE users.id = :p_user::UUID
  FOR NO KEY UPDATE OF users),
seen AS (
  SELECT users.credit_sequence AS sequence
  FROM users
  WHERE users.id = :p_user::UUID),
bought AS (
  SELECT credit_transactions.id, credit_transactions.amount, credit_transactions.description
  FROM credit_transactions
  WHERE credit_transactions.user_id = :p_user::UUID AND credit_transactions.id = :p_purchase::UUID AND credit_transactions.type = 'purchase' AND credit_transactions.status = 'completed'),
back AS (
  SELECT (
    SELECT coalesce(sum(-credit_transactions.amount), 0) AS coalesce_1
    FROM credit_transactions
    WHERE credit_transactions.user_id = :p_user::UUID AND credit_transactions.refund_of = :p_purchase::UUID) AS credits),
written AS (
  INSERT INTO credit_transactions (id, user_id, type, status, amount, balance_after, sequence, description, refund_of, idempotency_key, completed_at)
  SELECT :p_id::UUID AS id, account.key AS user_id, 'refund' AS type, 'completed' AS status, -coalesce(:p_amount::INTEGER, bought.amount - back.credits) AS amount, account.credit_balance + -coalesce(:p_amount::INTEGER, bought.amount - back.credits) AS balance_after, account.credit_sequence + 1 AS sequence, coalesce(:p_description::VARCHAR, 'Refunded: ' || bought.description) AS description, bought.id AS refund_of, :p_key::VARCHAR AS idempotency_key, clock_timestamp() AS completed_at
  FROM account JOIN seen ON true JOIN bought ON true JOIN back ON true
  WHERE account.credit_sequence = seen.sequence AND coalesce(:p_amount::INTEGER, bought.amount - back.credits) BETWEEN 1 AND bought.amount - back.credits AND account.credit_balance >= -2147483648 + coalesce(:p_amount::INTEGER, bought.amount - back.credits)
  ON CONFLICT DO NOTHING
  RETURNING credit_transactions.*),
moved AS (
  UPDATE users
  SET credit_balance=written.balance_after, credit_sequence=written.sequence
  FROM written
  WHERE users.id = :p_user::UUID AND users.id = written.user_id)
SELECT written.*
FROM written;

-- grant
WITH kept AS (
  SELECT users.id
  FROM users
  WHERE users.id = :p_user::UUID AND pg_current_xact_id_if_assigned() IS NOT NULL FOR KEY SHARE SKIP LOCKED),
mine AS (
  SELECT users.ctid = (
    SELECT seen.ctid
    FROM users AS seen
    WHERE seen.id = :p_user::UUID) AS as_seen
  FROM users
  WHERE users.id = :p_user::UUID AND (EXISTS (
      SELECT kept.id
      FROM kept))
  FOR NO KEY UPDATE SKIP LOCKED),
turn AS (
  SELECT CASE WHEN (EXISTS (
      SELECT mine.as_seen
      FROM mine)) THEN NULL ELSE pg_advisory_xact_lock(hashtextextended(CAST(:p_user::UUID AS TEXT), 0)) END AS taken
  WHERE NOT (EXISTS (
      SELECT mine.as_seen
      FROM mine
      WHERE NOT mine.as_seen))),
account AS (
  SELECT users.id AS key, users.credit_balance, users.credit_sequence
  FROM users JOIN turn ON true
  WHERE users.id = :p_user::UUID AND users.deleted_at IS NULL
  FOR NO KEY UPDATE OF users),
written AS (
  INSERT INTO credit_transactions (id, user_id, type, status, amount, balance_after, sequence, description, idempotency_key, completed_at)
  SELECT :p_id::UUID AS id, account.key AS user_id, 'grant' AS type, 'completed' AS status, :p_amount::INTEGER AS amount, account.credit_balance + :p_amount::INTEGER AS balance_after, account.credit_sequence + 1 AS sequence, :p_description::VARCHAR AS description, :p_key::VARCHAR AS idempotency_key, clock_timestamp() AS completed_at
  FROM account
  WHERE account.credit_balance <= 2147483647 - :p_amount::INTEGER
  ON CONFLICT DO NOTHING
  RETURNING credit_transactions.*),
moved AS (
  UPDATE users
  SET credit_balance=written.balance_after, credit_sequence=written.sequence
  FROM written
  WHERE users.id = :p_user::UUID AND users.id = written.user_id)
SELECT written.*
FROM written;

-- reinstate
WITH kept AS (
  SELECT users.id
  FROM users
  WHERE users.id = :p_user::UUID AND pg_current_xact_id_if_assigned() IS NOT NULL FOR KEY SHARE SKIP LOCKED),
mine AS (
  SELECT users.ctid = (
    SELECT seen.ctid
    FROM users AS seen
    WHERE seen.id = :p_user::UUID) AS as_seen
  FROM users
  WHERE users.id = :p_user::UUID AND (EXISTS (
      SELECT kept.id
      FROM kept))
  FOR NO KEY UPDATE SKIP LOCKED),
turn AS (
  SELECT CASE WHEN (EXISTS (
      SELECT mine.as_seen
      FROM mine)) THEN NULL ELSE pg_advisory_xact_lock(hashtextextended(CAST(:p_user::UUID AS TEXT), 0)) END AS taken
  WHERE NOT (EXISTS (
      SELECT mine.as_seen
      FROM mine
      WHERE NOT mine.as_seen))),
account AS (
  SELECT users.id AS key, users.credit_balance, users.credit_sequence
  FROM users JOIN turn ON true
  WHERE users.id = :p_user::UUID
  FOR NO KEY UPDATE OF users),
seen AS (
  SELECT users.credit_sequence AS sequence
  FROM users
  WHERE users.id = :p_user::UUID),
bought AS (
  SELECT credit_transactions.id, credit_transactions.amount, credit_transactions.description
  FROM credit_transactions
  WHERE credit_transactions.user_id = :p_user::UUID AND credit_transactions.id = :p_purchase::UUID AND credit_transactions.type = 'purchase' AND credit_transactions.status = 'completed'),
back AS (
  SELECT (
    SELECT coalesce(sum(-credit_transactions.amount), 0) AS coalesce_1
    FROM credit_transactions
    WHERE credit_transactions.user_id = :p_user::UUID AND credit_transactions.refund_of = :p_purchase::UUID) AS credits),
written AS (
  INSERT INTO credit_transactions (id, user_id, type, status, amount, balance_after, sequence, description, refund_of, idempotency_key, completed_at)
  SELECT :p_id::UUID AS id, account.key AS user_id, 'grant' AS type, 'completed' AS status, coalesce(:p_amount::INTEGER, back.credits) AS amount, account.credit_balance + coalesce(:p_amount::INTEGER, back.credits) AS balance_after, account.credit_sequence + 1 AS sequence, coalesce(:p_description::VARCHAR, 'Given back: ' || bought.description) AS description, bought.id AS refund_of, :p_key::VARCHAR AS idempotency_key, clock_timestamp() AS completed_at
  FROM account JOIN seen ON true JOIN bought ON true JOIN back ON true
  WHERE account.credit_sequence = seen.sequence AND coalesce(:p_amount::INTEGER, back.credits) BETWEEN 1 AND back.credits AND account.credit_balance <= 2147483647 - coalesce(:p_amount::INTEGER, back.credits)
  ON CONFLICT DO NOTHING
  RETURNING credit_transactions.*),
moved AS (
  UPDATE users
  SET credit_balance=written.balance_after, credit_sequence=written.sequence
  FROM written
  WHERE users.id = :p_user::UUID AND users.id = written.user_id)
SELECT written.*
FROM written;

-- lock
WITH kept AS (
  SELECT users.id
  FROM users
  WHERE users.id = :p_user::UUID AND pg_current_xact_id_if_assigned() IS NOT NULL FOR KEY SHARE SKIP LOCKED),
mine AS (
  SELECT users.ctid = (
    SELECT seen.ctid
    FROM users AS seen
    WHERE seen.id = :p_user::UUID) AS as_seen
  FROM users
  WHERE users.id = :p_user::UUID AND (EXISTS (
      SELECT kept.id
      FROM kept))
  FOR NO KEY UPDATE SKIP LOCKED),
turn AS (
  SELECT CASE WHEN (EXISTS (
      SELECT mine.as_seen
      FROM mine)) THEN NULL ELSE pg_advisory_xact_lock(hashtextextended(CAST(:p_user::UUID AS TEXT), 0)) END AS taken
  WHERE NOT (EXISTS (
      SELECT mine.as_seen
      FROM mine
      WHERE NOT mine.as_seen))),
account AS (
  SELECT users.id AS key, users.credit_balance, users.credit_sequence
  FROM users JOIN turn ON true
  WHERE users.id = :p_user::UUID
  FOR NO KEY UPDATE OF users)
SELECT account.credit_balance
FROM account;

-- balance
SELECT users.credit_balance
FROM users
WHERE users.id = :p_user::UUID;

-- balance_at
SELECT coalesce((
    SELECT credit_transactions.balance_after
    FROM credit_transactions
    WHERE credit_transactions.user_id = :p_user::UUID AND credit_transactions.completed_at <= :p_when::TIMESTAMP WITH TIME ZONE
    ORDER BY credit_transactions.completed_at DESC, credit_transactions.sequence DESC
    LIMIT 1), 0) AS coalesce_1
FROM users
WHERE users.id = :p_user::UUID;

-- history
SELECT page.*
FROM (
  SELECT of_status.*
  FROM unnest(:p_statuses::credit_transaction_status[]) AS shown(status) JOIN LATERAL (
    SELECT credit_transactions.*
    FROM credit_transactions
    WHERE credit_transactions.user_id = :p_user::UUID AND credit_transactions.status = shown.status AND credit_transactions.sequence IS NULL AND credit_transactions.id < :p_before_id::UUID
    ORDER BY credit_transactions.id DESC
    LIMIT :p_limit::INTEGER) AS of_status ON true
  UNION ALL SELECT anon_1.*
  FROM (
    SELECT credit_transactions.*
    FROM credit_transactions
    WHERE credit_transactions.user_id = :p_user::UUID AND credit_transactions.sequence < :p_before_sequence::INTEGER
    ORDER BY credit_transactions.sequence DESC
    LIMIT :p_limit::INTEGER) AS anon_1) AS page
ORDER BY page.sequence DESC NULLS FIRST, page.id DESC
LIMIT :p_limit::INTEGER;

-- facts
SELECT users.id, users.credit_balance, users.credit_sequence, users.deleted_at, (
  SELECT max(last.sequence) AS max_1
  FROM credit_transactions AS last
  WHERE last.user_id = asked."user" AND last.sequence IS NOT NULL) AS anon_1, (
  SELECT coalesce(sum(-credit_transactions.amount), 0) AS coalesce_1
  FROM credit_transactions
  WHERE credit_transactions.user_id = asked."user" AND credit_transactions.refund_of = asked.purchase) AS anon_2, (
  SELECT holder.id
  FROM credit_transactions AS holder
  WHERE holder.stripe_session_id = asked.session) AS anon_3, workshops.id, workshops.user_id, workshops.deleted_at, workshops.credit_consumed_at, prior.*, purchase.*, unlocked.*
FROM unnest(:p_users::UUID[], :p_keys::TEXT[], :p_purchases::UUID[], :p_sessions::TEXT[], :p_workshops::UUID[]) WITH ORDINALITY AS asked("user", key, purchase, session, workshop, n)
LEFT OUTER JOIN users ON users.id = asked."user"
LEFT OUTER JOIN credit_transactions AS prior ON prior.user_id = asked."user" AND prior.idempotency_key = asked.key
LEFT OUTER JOIN credit_transactions AS purchase ON purchase.user_id = asked."user" AND purchase.id = coalesce(asked.purchase, (
    SELECT holder.id
    FROM credit_transactions AS holder
    WHERE holder.stripe_session_id = asked.session))
LEFT OUTER JOIN LATERAL (
  SELECT credit_transactions.*
  FROM credit_transactions
  WHERE credit_transactions.user_id = asked."user" AND credit_transactions.workshop_id = asked.workshop AND credit_transactions.type = 'consumption'
  ORDER BY credit_transactions.sequence DESC
  LIMIT 1) AS unlocked ON true
LEFT OUTER JOIN workshops ON workshops.id = asked.workshop
ORDER BY asked.n;

-- consume_for_workshop
WITH kept AS (
  SELECT users.id
  FROM users
  WHERE users.id = :p_user::UUID AND pg_current_xact_id_if_assigned() IS NOT NULL FOR KEY SHARE SKIP LOCKED),
mine AS (
  SELECT users.ctid = (
    SELECT seen.ctid
    FROM users AS seen
    WHERE seen.id = :p_user::UUID) AS as_seen
  FROM users
  WHERE users.id = :p_user::UUID AND (EXISTS (
      SELECT kept.id
      FROM kept))
  FOR NO KEY UPDATE SKIP LOCKED),
turn AS (
  SELECT CASE WHEN (EXISTS (
      SELECT mine.as_seen
      FROM mine)) THEN NULL ELSE pg_advisory_xact_lock(hashtextextended(CAST(:p_user::UUID AS TEXT), 0)) END AS taken
  WHERE NOT (EXISTS (
      SELECT mine.as_seen
      FROM mine
      WHERE NOT mine.as_seen))),
account AS (
  SELECT users.id AS key, users.credit_balance, users.credit_sequence
  FROM users JOIN turn ON true
  WHERE users.id = :p_user::UUID AND users.deleted_at IS NULL
  FOR NO KEY UPDATE OF users),
claim AS (
  SELECT workshops.id AS key, workshops.user_id AS owner, coalesce(workshops.title, CAST(workshops.id AS TEXT)) AS name
  FROM workshops JOIN account ON workshops.user_id = account.key
  WHERE workshops.deleted_at IS NULL AND workshops.credit_consumed_at IS NULL AND workshops.id = :p_workshop::UUID AND workshops.user_id = :p_user::UUID
  FOR NO KEY UPDATE OF workshops),
written AS (
  INSERT INTO credit_transactions (id, user_id, type, status, amount, balance_after, sequence, description, workshop_id, idempotency_key, completed_at)
  SELECT :p_id::UUID AS id, account.key AS user_id, 'consumption' AS type, 'completed' AS status, -:p_amount::INTEGER AS amount, account.credit_balance - :p_amount::INTEGER AS balance_after, account.credit_sequence + 1 AS sequence, coalesce(:p_description::VARCHAR, 'Credit consumed for Workshop: ' || claim.name) AS description, claim.key AS workshop_id, :p_key::VARCHAR AS idempotency_key, clock_timestamp() AS completed_at
  FROM account JOIN claim ON true
  WHERE account.credit_balance >= :p_amount::INTEGER
  ON CONFLICT DO NOTHING
  RETURNING credit_transactions.*),
moved AS (
  UPDATE users
  SET credit_balance=written.balance_after, credit_sequence=written.sequence
  FROM written
  WHERE users.id = :p_user::UUID AND users.id = written.user_id),
marked AS (
  UPDATE workshops
  SET credit_consumed_at=written.completed_at
  FROM written
  WHERE workshops.id = :p_workshop::UUID AND workshops.user_id = :p_user::UUID AND workshops.id = written.workshop_id)
SELECT written.balance_after, written.sequence, written.description, written.created_at, written.completed_at
FROM written;

-- access
SELECT workshops.created_at, workshops.credit_consumed_at, workshops.deleted_at, (
  SELECT min(tallystick.migration_log.applied_at) AS min_1
  FROM tallystick.migration_log
  WHERE tallystick.migration_log.revision = '0001') AS anon_1
FROM workshops
WHERE workshops.id = :p_workshop::UUID;
