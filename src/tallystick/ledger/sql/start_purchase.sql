-- Records that a user is about to buy credits; the balance does not move. Call it before Stripe is asked for a
-- session. Credits with ``expires_after`` expire that long after they are paid.
CREATE OR REPLACE FUNCTION tallystick.start_purchase(
  user_id {user_key_type},
  amount {credits},
  description text,
  key text DEFAULT NULL,
  stripe_price_id text DEFAULT NULL,
  metadata jsonb DEFAULT NULL,
  expires_after interval DEFAULT NULL
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
  ELSIF description IS NULL OR char_length(description) NOT BETWEEN 1 AND 10000 THEN
    RETURN tallystick.invalid_argument('description', 'a text of 1 to 10000 characters');
  ELSIF char_length(key) NOT BETWEEN 1 AND 255 OR starts_with(key, 'tallystick:') THEN
    RETURN tallystick.invalid_argument('key', {key_domain});
  ELSIF char_length(stripe_price_id) NOT BETWEEN 1 AND 255 THEN
    RETURN tallystick.invalid_argument('stripe_price_id', 'a text of 1 to 255 characters');
  ELSIF jsonb_typeof(metadata) <> 'object' THEN
    RETURN tallystick.invalid_argument('metadata', 'a JSON object');
  ELSIF expires_after <= interval '0' OR expires_after > interval '1000 years' THEN
    RETURN tallystick.invalid_argument('expires_after', 'an interval above 0 and up to 1000 years, as 90 days, or NULL');
  END IF;

  -- Without a lock but the foreign key's: two transactions may each start a purchase of one user, and complete it.
  SELECT u.{user_key} AS key, {balance_now} AS balance, u.{user_deleted_at} AS deleted_at
    INTO account FROM {users} AS u WHERE u.{user_key} = start_purchase.user_id;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_user';
    RETURN answer;
  END IF;
  SELECT * INTO prior FROM {ledger} AS t WHERE t.user_id = account.key AND t.idempotency_key = start_purchase.key;
  IF FOUND THEN
    RETURN tallystick.replay(
      prior,
      jsonb_build_object(
        'type', 'purchase',
        -- a buyer may have paid for another number
        CASE WHEN prior.started_amount IS NULL THEN 'amount' ELSE 'started_amount' END, amount),
      account.balance);
  END IF;
  IF account.deleted_at IS NOT NULL THEN
    answer.outcome := 'user_deleted';
    answer.balance := account.balance;
    answer.detail := jsonb_build_object('deleted_at', tallystick.utc(account.deleted_at));
    RETURN answer;
  END IF;

  INSERT INTO {ledger} AS t (
      id, user_id, type, status, amount, description, stripe_price_id, idempotency_key, metadata, expires_after)
    VALUES (
      tallystick.uuid7(), account.key, 'purchase', 'pending', start_purchase.amount, start_purchase.description,
      start_purchase.stripe_price_id, start_purchase.key, start_purchase.metadata, start_purchase.expires_after)
    ON CONFLICT DO NOTHING
    RETURNING 'completed', {row}, account.balance, NULL, NULL, NULL, NULL, NULL, NULL INTO answer;
  IF NOT FOUND THEN
    -- the same key was being written by somebody else, who has committed by now
    SELECT * INTO prior FROM {ledger} AS t WHERE t.user_id = account.key AND t.idempotency_key = start_purchase.key;
    IF FOUND THEN
      RETURN tallystick.replay(
        prior,
        jsonb_build_object(
          'type', 'purchase', CASE WHEN prior.started_amount IS NULL THEN 'amount' ELSE 'started_amount' END, amount),
        account.balance);
    END IF;
    PERFORM tallystick.host_interfered({ledger_name});
  END IF;
  RETURN answer;
END $$
