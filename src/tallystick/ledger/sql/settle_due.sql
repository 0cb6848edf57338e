-- Writes the expiries of a user, who is locked: holds fail, and a row takes back the rest of a lot. As many credits as
-- holds have set aside stay until the holds end. The answer has the balance, the sequence, the credits held, and the
-- next expiry as ``expires_at``.
CREATE OR REPLACE FUNCTION tallystick.settle_due(user_id {user_key_type}) RETURNS tallystick.answer
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
  moment timestamptz := clock_timestamp();
  answer tallystick.answer;
  old_sequence integer;
  old_held {credits};
  released {credits};
  lot record;
  taken {credits};
  row_id uuid;
BEGIN
  SELECT u.{user_key}, {balance}, u.credit_sequence, u.credit_held
    INTO answer.user_id, answer.balance, answer.sequence, answer.credit_held
    FROM {users} AS u WHERE u.{user_key} = settle_due.user_id;
  old_sequence := answer.sequence;
  old_held := answer.credit_held;
  WITH failed AS (
    UPDATE {ledger} AS t SET status = 'failed', description = t.description || ' (expired)'
      WHERE t.user_id = answer.user_id AND t.status = 'pending' AND t.sequence IS NULL AND t.held IS NOT NULL
        AND t.expires_at <= moment
      RETURNING t.held
  )
  SELECT coalesce(sum(f.held), 0) INTO released FROM failed AS f;
  answer.credit_held := answer.credit_held - released;

  FOR lot IN
    SELECT l.id, l.remaining, t.description FROM tallystick.lots AS l JOIN {ledger} AS t ON t.id = l.id
    WHERE l.user_id = answer.user_id AND l.remaining > 0 AND l.expires_at <= moment ORDER BY l.expires_at, l.id
  LOOP
    taken := least(lot.remaining, greatest(answer.balance, answer.credit_held) - answer.credit_held);
    IF taken > 0 THEN
      INSERT INTO {ledger} AS t (
          id, user_id, type, status, amount, balance_after, sequence, description, refund_of, idempotency_key,
          completed_at)
        VALUES (
          tallystick.uuid7(), answer.user_id, 'expiry', 'completed', - taken, answer.balance - taken,
          answer.sequence + 1, 'Expired: ' || lot.description, lot.id,
          'tallystick:expiry:' || lot.id || ':' || answer.sequence + 1, clock_timestamp())
        ON CONFLICT DO NOTHING
        RETURNING t.id INTO row_id;
      EXIT WHEN NOT FOUND;  -- the user's row is behind the ledger, as the caller will find by itself
      answer.balance := answer.balance - taken;
      answer.sequence := answer.sequence + 1;
      INSERT INTO tallystick.lot_moves (transaction_id, lot_id, amount) VALUES (row_id, lot.id, taken);
    END IF;
    -- what the balance does not cover is gone: the app wrote the balance itself
    lot.remaining := lot.remaining - taken;
    IF lot.remaining > answer.credit_held THEN
      INSERT INTO tallystick.lot_moves AS m (transaction_id, lot_id, amount)
        VALUES (lot.id, lot.id, lot.remaining - answer.credit_held)
        ON CONFLICT ON CONSTRAINT lot_moves_pkey DO UPDATE SET amount = m.amount + excluded.amount;
      lot.remaining := answer.credit_held;
    END IF;
    UPDATE tallystick.lots AS l SET remaining = lot.remaining WHERE l.id = lot.id;
  END LOOP;

  answer.expires_at := tallystick.next_due(answer.user_id, answer.credit_held);
  PERFORM tallystick.settle_held(
    answer.user_id, old_sequence, old_held,
    answer.balance, answer.sequence, answer.credit_held, answer.expires_at);
  -- a trigger of the host's may have called the ledger when the balance was written
  SELECT {balance}, u.credit_sequence, u.credit_held, u.credit_due_at
    INTO answer.balance, answer.sequence, answer.credit_held, answer.expires_at
    FROM {users} AS u WHERE u.{user_key} = settle_due.user_id;
  RETURN answer;
END $$
