-- Gives credits that nobody paid for: goodwill, a promotion, an opening balance. Those that expire are spent first.
CREATE OR REPLACE FUNCTION tallystick.grant(
  user_id {user_key_type},
  amount {credits},
  key text,
  description text,
  metadata jsonb DEFAULT NULL,
  expires_at timestamptz DEFAULT NULL
) RETURNS tallystick.answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path}
  SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.answer;
  account record;
  prior {ledger};
BEGIN
  IF amount IS NULL OR amount < 1 THEN
    RETURN tallystick.invalid_argument('amount', {amount_domain});
  ELSIF key IS NULL OR char_length(key) NOT BETWEEN 1 AND 255 OR starts_with(key, 'tallystick:')
      AND NOT starts_with(key, 'tallystick:allowance:') THEN
    RETURN tallystick.invalid_argument('key', {key_domain});
  ELSIF description IS NULL OR char_length(description) NOT BETWEEN 1 AND 10000 THEN
    RETURN tallystick.invalid_argument('description', 'a text of 1 to 10000 characters');
  ELSIF jsonb_typeof(metadata) <> 'object' THEN
    RETURN tallystick.invalid_argument('metadata', 'a JSON object');
  ELSIF expires_at >= '9999-01-01' THEN
    RETURN tallystick.invalid_argument('expires_at', {expiry_domain});
  END IF;

  SELECT u.{user_key} AS key, {balance} AS balance, u.credit_sequence AS sequence, u.credit_held AS held,
      u.credit_due_at AS due, u.{user_deleted_at} AS deleted_at
    INTO account FROM {users} AS u WHERE u.{user_key} = "grant".user_id FOR NO KEY UPDATE;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_user';
    RETURN answer;
  END IF;
  {opened}
  {due}
  SELECT * INTO prior FROM {ledger} AS t WHERE t.user_id = account.key AND t.idempotency_key = "grant".key;
  IF FOUND THEN
    RETURN tallystick.replay(
      prior, jsonb_build_object('type', 'grant', 'amount', amount, 'refund_of', NULL), account.balance);
  END IF;
  -- not before: a call that is repeated after this moment is a replay all the same
  IF expires_at <= clock_timestamp() THEN
    RETURN tallystick.invalid_argument('expires_at', {expiry_domain});
  END IF;
  answer.balance := account.balance;
  answer.required := amount;
  IF account.deleted_at IS NOT NULL THEN
    answer.outcome := 'user_deleted';
    answer.detail := jsonb_build_object('deleted_at', tallystick.utc(account.deleted_at));
    RETURN answer;
  ELSIF account.balance > 0 AND amount > {credits_max} - account.balance THEN
    answer.outcome := 'balance_out_of_range';
    RETURN answer;
  ELSIF account.sequence = 0 AND account.balance < 0 THEN
    -- the app wrote it, just before the migration: no row explains it, so the first one would not add up
    answer.outcome := 'ledger_inconsistent';
    answer.detail := jsonb_build_object('sequence', account.sequence);
    RETURN answer;
  END IF;

  INSERT INTO {ledger} AS t (
      id, user_id, type, status, amount, balance_after, sequence, description, idempotency_key, metadata,
      expires_at, completed_at)
    VALUES (
      tallystick.uuid7(), account.key, 'grant', 'completed', "grant".amount, account.balance + "grant".amount,
      account.sequence + 1, "grant".description, "grant".key, "grant".metadata,
      "grant".expires_at, clock_timestamp())
    ON CONFLICT DO NOTHING
    RETURNING 'completed', {row}, t.balance_after, "grant".amount, NULL, NULL, NULL, account.held, t.expires_at INTO answer;
  IF NOT FOUND THEN
    -- a purchase was starting under the key, without the user's lock; or the user's row is behind the ledger
    SELECT * INTO prior FROM {ledger} AS t WHERE t.user_id = account.key AND t.idempotency_key = "grant".key;
    IF FOUND THEN
      RETURN tallystick.replay(prior, jsonb_build_object('type', 'grant'), account.balance);
    END IF;
    answer.outcome := 'ledger_inconsistent';
    answer.balance := account.balance;
    answer.detail := jsonb_build_object('sequence', account.sequence);
    RETURN answer;
  END IF;
  IF NOT tallystick.settle(
      account.key, account.balance, account.sequence, answer.balance_after, answer.sequence) THEN
    PERFORM tallystick.host_interfered({users_name});
  END IF;
  IF answer.expires_at IS NOT NULL THEN
    PERFORM tallystick.open_lot(answer);
  END IF;
  RETURN answer;
END $$
