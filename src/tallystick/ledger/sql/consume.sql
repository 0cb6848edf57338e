-- Spends credits of a user, and unlocks a workshop with them if one is named. A workshop is paid for once: asked for
-- again, the consumption that unlocked it comes back as a replay.
CREATE OR REPLACE FUNCTION tallystick.consume(
  user_id {user_key_type},
  key text,
  workshop_id {workshop_key_type} DEFAULT NULL,
  amount {credits} DEFAULT 1,
  description text DEFAULT NULL,
  metadata jsonb DEFAULT NULL
) RETURNS tallystick.answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.answer;
  account record;
  workshop record;
  prior {ledger};
  name text;
  claimable boolean := true;
BEGIN
  IF amount IS NULL OR amount < 1 THEN
    RETURN tallystick.invalid_argument('amount', {amount_domain});
  ELSIF key IS NULL OR char_length(key) NOT BETWEEN 1 AND 255 THEN
    RETURN tallystick.invalid_argument('key', 'a text of 1 to 255 characters');
  ELSIF char_length(description) NOT BETWEEN 1 AND 10000 THEN
    RETURN tallystick.invalid_argument('description', 'a text of 1 to 10000 characters');
  ELSIF jsonb_typeof(metadata) <> 'object' THEN
    RETURN tallystick.invalid_argument('metadata', 'a JSON object');
  END IF;

  -- 1. Lock the user, then the workshop. All that is read after this holds until the transaction ends.
  SELECT u.{user_key} AS key, u.credit_balance AS balance, u.credit_sequence AS sequence, u.deleted_at
    INTO account FROM {users} AS u WHERE u.{user_key} = consume.user_id FOR NO KEY UPDATE;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_user';
    RETURN answer;
  END IF;
  IF workshop_id IS NOT NULL THEN
    SELECT {title} INTO name FROM {workshops} AS w
      WHERE w.{workshop_key} = consume.workshop_id AND w.{owner} = account.key
        AND w.credit_consumed_at IS NULL AND w.deleted_at IS NULL
      FOR NO KEY UPDATE;
    claimable := FOUND;
  END IF;

  -- 2. Write, if nothing speaks against it: the row, the balance, the workshop's mark.
  IF claimable AND account.deleted_at IS NULL AND account.balance >= amount THEN
    INSERT INTO {ledger} AS t (
        id, user_id, type, status, amount, balance_after, sequence, description,
        workshop_id, idempotency_key, metadata, completed_at)
      VALUES (
        tallystick.uuid7(), account.key, 'consumption', 'completed', - consume.amount,
        account.balance - consume.amount, account.sequence + 1,
        coalesce(consume.description, 'Credit consumed' || coalesce(' for Workshop: ' || name, '')),
        consume.workshop_id, consume.key, consume.metadata, clock_timestamp())
      ON CONFLICT DO NOTHING
      RETURNING 'completed', {row}, t.balance_after, consume.amount, NULL, NULL, NULL INTO answer;
    IF FOUND THEN
      PERFORM tallystick.settle(answer.user_id, answer.balance_after, answer.sequence);
      IF workshop_id IS NOT NULL THEN
        PERFORM tallystick.mark_workshop(workshop_id, answer.completed_at);
      END IF;
      RETURN answer;
    END IF;
  END IF;

  -- 3. Nothing was written: find out why.
  SELECT * INTO prior FROM {ledger} AS t WHERE t.user_id = account.key AND t.idempotency_key = consume.key;
  IF FOUND THEN
    RETURN tallystick.replay(
      prior,
      jsonb_build_object('type', 'consumption', 'amount', - amount, 'workshop_id',
        -- when the host deletes a workshop its row stays, without it
        CASE WHEN prior.workshop_id IS NOT NULL
          OR EXISTS (SELECT FROM {workshops} AS w WHERE w.{workshop_key} = consume.workshop_id)
        THEN consume.workshop_id END),
      account.balance);
  END IF;
  answer.balance := account.balance;
  answer.required := amount;
  IF account.deleted_at IS NOT NULL THEN
    answer.outcome := 'user_deleted';
    answer.detail := jsonb_build_object('deleted_at', tallystick.utc(account.deleted_at));
    RETURN answer;
  END IF;
  IF NOT claimable THEN
    SELECT w.{owner} AS owner, w.deleted_at INTO workshop
      FROM {workshops} AS w WHERE w.{workshop_key} = consume.workshop_id;
    IF NOT FOUND THEN
      answer.outcome := 'unknown_workshop';
    ELSIF workshop.owner IS DISTINCT FROM account.key THEN
      answer.outcome := 'workshop_not_owned';
    ELSIF workshop.deleted_at IS NOT NULL THEN
      answer.outcome := 'workshop_deleted';
      answer.detail := jsonb_build_object('deleted_at', tallystick.utc(workshop.deleted_at));
    ELSE
      -- paid for already: by this user, or by an owner before
      SELECT 'replayed', {row}, account.balance, NULL, NULL, NULL, NULL INTO answer FROM {ledger} AS t
        WHERE t.workshop_id = consume.workshop_id AND t.type = 'consumption'
        ORDER BY t.user_id = account.key DESC, t.completed_at DESC LIMIT 1;
      IF NOT FOUND THEN
        answer.outcome := 'workshop_unaccounted';
        answer.balance := account.balance;
      END IF;
    END IF;
  ELSIF account.balance < amount THEN
    answer.outcome := 'insufficient_credits';
  ELSE
    -- the next sequence number is taken: the user's row is behind the ledger
    answer.outcome := 'ledger_inconsistent';
    answer.detail := jsonb_build_object('sequence', account.sequence);
  END IF;
  RETURN answer;
END $$
