-- Moves all credits of a user to another, debts too, and soft-deletes the first: two accounts of one person become
-- one. The answer's ``amount`` is the credits that moved; its ``balance`` is the new balance of ``into_user_id``.
-- Earlier rows, workshops, plan and Stripe customer stay with the user that they belong to. Two rows for each lot,
-- and two for the credits that do not expire: one that takes, one that gives, each with the other as its refund_of.
CREATE OR REPLACE FUNCTION tallystick.merge(
  user_id {user_key_type},
  into_user_id {user_key_type},
  key text,
  description text DEFAULT NULL,
  metadata jsonb DEFAULT NULL
) RETURNS tallystick.answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.answer;
  account record;
  other record;
  prior {ledger};
  given {ledger};
  part record;
  own record;
  total {credits};
  old_sequence integer;
  moved {credits};
  closing_id uuid;
  opening_id uuid;
  closing_key text := merge.key;
  moment timestamptz;
BEGIN
  IF key IS NULL OR char_length(key) NOT BETWEEN 1 AND 255 OR starts_with(key, 'tallystick:') THEN
    RETURN tallystick.invalid_argument('key', {key_domain});
  ELSIF char_length(description) NOT BETWEEN 1 AND 10000 THEN
    RETURN tallystick.invalid_argument('description', 'a text of 1 to 10000 characters');
  ELSIF jsonb_typeof(metadata) <> 'object' THEN
    RETURN tallystick.invalid_argument('metadata', 'a JSON object');
  ELSIF user_id = into_user_id THEN
    RETURN tallystick.invalid_argument('into_user_id', 'another user than user_id');
  END IF;

  -- in the order of their keys, as consume_many locks users
  PERFORM FROM {users} AS u WHERE u.{user_key} IN (merge.user_id, merge.into_user_id)
    ORDER BY u.{user_key} FOR NO KEY UPDATE;
  SELECT u.{user_key} AS key, {balance} AS balance, u.credit_sequence AS sequence, u.credit_held AS held,
      u.credit_due_at AS due, u.{user_deleted_at} AS deleted_at
    INTO account FROM {users} AS u WHERE u.{user_key} = merge.into_user_id;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_user';
    answer.detail := jsonb_build_object('argument', 'into_user_id');
    RETURN answer;
  END IF;
  {opened}
  {due}
  other := account;
  SELECT u.{user_key} AS key, {balance} AS balance, u.credit_sequence AS sequence, u.credit_held AS held,
      u.credit_due_at AS due, u.{user_deleted_at} AS deleted_at
    INTO account FROM {users} AS u WHERE u.{user_key} = merge.user_id;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_user';
    RETURN answer;
  END IF;
  {opened}
  {due}

  answer.user_id := other.key;
  answer.balance := other.balance;
  SELECT * INTO prior FROM {ledger} AS t WHERE t.user_id = account.key AND t.idempotency_key = merge.key;
  IF FOUND THEN
    SELECT * INTO given FROM {ledger} AS t WHERE t.id = prior.refund_of AND prior.type = 'transfer';
    IF given.user_id IS DISTINCT FROM other.key THEN
      RETURN tallystick.replay(
        CASE WHEN FOUND THEN given ELSE prior END,
        jsonb_build_object('type', 'transfer', 'user_id', other.key), other.balance);
    END IF;
    answer.outcome := 'replayed';
    SELECT - sum(t.amount) INTO answer.amount FROM {ledger} AS t
      WHERE t.user_id = account.key AND t.type = 'transfer' AND t.completed_at = prior.completed_at;
    RETURN answer;
  END IF;
  answer.amount := account.balance;
  IF other.deleted_at IS NOT NULL THEN
    answer.outcome := 'user_deleted';
    answer.detail := jsonb_build_object('argument', 'into_user_id', 'deleted_at', tallystick.utc(other.deleted_at));
  ELSIF account.held > 0 THEN
    answer.outcome := 'holds_pending';
    answer.credit_held := account.held;
  ELSIF account.balance > 0 AND other.balance > {credits_max} - account.balance
      OR account.balance < 0 AND other.balance < {credits_min} - account.balance
      OR account.balance = {credits_min} THEN  -- whose opposite, the row that takes it, is above the range
    answer.outcome := 'balance_out_of_range';
    answer.required := account.balance;
    answer.detail := jsonb_build_object('argument', 'into_user_id');
  ELSE
    -- in the order of the one index that finds it at once, whatever the age of the statistics
    SELECT found.argument, found.sequence INTO part FROM (
      (SELECT NULL AS argument, account.sequence AS sequence FROM {ledger} AS t
        WHERE t.user_id = account.key AND t.sequence > account.sequence ORDER BY t.sequence LIMIT 1)
      UNION ALL
      (SELECT 'into_user_id', other.sequence FROM {ledger} AS t
        WHERE t.user_id = other.key AND t.sequence > other.sequence ORDER BY t.sequence LIMIT 1)
      UNION ALL  -- a balance below 0 without a row, as in grant
      SELECT NULL, 0 WHERE account.sequence = 0 AND account.balance < 0
      UNION ALL
      SELECT 'into_user_id', 0 WHERE other.sequence = 0 AND other.balance < 0
    ) AS found LIMIT 1;
    IF FOUND THEN
      answer.outcome := 'ledger_inconsistent';
      answer.detail := jsonb_strip_nulls(to_jsonb(part));
    END IF;
  END IF;
  IF answer.outcome IS NOT NULL THEN
    RETURN answer;
  END IF;

  total := account.balance;
  old_sequence := account.sequence;
  moment := clock_timestamp();
  FOR part IN
    SELECT l.id, l.remaining, l.expires_at FROM tallystick.lots AS l
      WHERE l.user_id = account.key AND l.remaining > 0 AND account.balance > 0
    UNION ALL SELECT NULL, account.balance, NULL
    ORDER BY expires_at, id
  LOOP
    moved := CASE WHEN part.id IS NULL THEN account.balance ELSE least(part.remaining, account.balance) END;
    CONTINUE WHEN moved = 0;
    closing_id := tallystick.uuid7();
    opening_id := tallystick.uuid7();
    -- as one statement: each row names the other
    INSERT INTO {ledger} AS t (
        id, user_id, type, status, amount, balance_after, sequence, description, refund_of, idempotency_key, metadata,
        expires_at, completed_at)
      VALUES
        (closing_id, account.key, 'transfer', 'completed', - moved, account.balance - moved, account.sequence + 1,
          coalesce(merge.description, 'Merged into another account'), opening_id, closing_key, merge.metadata,
          NULL, moment),
        (opening_id, other.key, 'transfer', 'completed', moved, other.balance + moved, other.sequence + 1,
          coalesce(merge.description, 'Merged from another account'), closing_id, 'tallystick:merge:' || closing_id,
          merge.metadata, part.expires_at, moment);
    IF part.id IS NOT NULL THEN
      PERFORM tallystick.take_from_lots(account.key, closing_id, moved, part.id);
    END IF;
    IF NOT tallystick.settle(other.key, other.balance, other.sequence, other.balance + moved, other.sequence + 1) THEN
      PERFORM tallystick.host_interfered({users_name});
    END IF;
    account.balance := account.balance - moved;
    account.sequence := account.sequence + 1;
    other.balance := other.balance + moved;
    other.sequence := other.sequence + 1;
    closing_key := 'tallystick:merge:' || opening_id;
    IF part.id IS NOT NULL THEN
      SELECT 'completed', {row}, other.balance, moved, NULL, NULL, NULL, other.held, t.expires_at
        INTO answer FROM {ledger} AS t WHERE t.id = opening_id;
      PERFORM tallystick.open_lot(answer);
    ELSIF moved < 0 THEN
      -- first the lots that were merged into that account, for what was refunded of them since: a refund takes its own
      FOR own IN
        WITH RECURSIVE lot (id, origin) AS (
          SELECT l.id, l.id FROM tallystick.lots AS l WHERE l.user_id = account.key
          UNION
          SELECT t.refund_of, lot.origin FROM lot JOIN tallystick.lot_moves AS m ON m.lot_id = lot.id
            JOIN {ledger} AS t ON t.id = m.transaction_id AND t.type = 'transfer'
        )
        SELECT l.id, least(l.remaining, (
            SELECT - coalesce(sum(t.amount), 0) FROM {ledger} AS t
            WHERE t.refund_of = lot.origin AND t.user_id = account.key AND t.type <> 'expiry'
          ) - (
            SELECT coalesce(sum(m.amount), 0) FROM tallystick.lot_moves AS m JOIN {ledger} AS t ON t.id = m.transaction_id
            WHERE m.lot_id = lot.origin AND t.refund_of = lot.origin AND t.type <> 'expiry'
          ) - (
            SELECT coalesce(sum(m.amount), 0) FROM tallystick.lot_moves AS m
              JOIN {ledger} AS t ON t.id = m.transaction_id AND t.type = 'transfer'
              JOIN {ledger} AS o ON o.id = t.refund_of AND o.user_id = account.key
            WHERE m.lot_id = l.id
          ))::{credits} AS owed
        FROM lot JOIN tallystick.lots AS l ON l.id = lot.id AND l.user_id = other.key AND l.remaining > 0
        ORDER BY l.expires_at, l.id
      LOOP
        IF own.owed > 0 THEN
          PERFORM tallystick.take_from_lots(other.key, opening_id, least(own.owed, - moved), own.id);
          moved := moved + least(own.owed, - moved);
        END IF;
      END LOOP;
      PERFORM tallystick.take_back_from_lots(other.key, opening_id, NULL, - moved, other.balance);
    END IF;
  END LOOP;
  IF total <> 0 THEN
    PERFORM tallystick.settle_held(
      account.key, old_sequence, account.held,
      account.balance, account.sequence, account.held, tallystick.next_due(account.key, account.held));
  END IF;
  PERFORM tallystick.delete_user(account.key);
  answer := NULL;
  answer.outcome := 'completed';
  answer.user_id := other.key;
  answer.amount := total;
  answer.balance := other.balance;
  RETURN answer;
END $$
