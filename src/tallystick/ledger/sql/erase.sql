-- Removes a person's data from the ledger, and soft-deletes the user. It removes descriptions, metadata, the
-- addresses of checkouts, the Stripe customer, and the idempotency keys of calls that a deleted user is refused.
-- Credits, times and Stripe's data about payments stay. A removed key does not bring an earlier answer back.
CREATE OR REPLACE FUNCTION tallystick.erase(user_id {user_key_type}) RETURNS tallystick.account_answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.account_answer;
  account record;
BEGIN
  SELECT u.{user_key} AS key, {balance} AS balance, u.credit_sequence AS sequence INTO account
    FROM {users} AS u WHERE u.{user_key} = erase.user_id FOR NO KEY UPDATE;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_user';
    RETURN answer;
  END IF;
  -- now and not later: no opening balance of an erased user may get the app's history
  {opened}
  -- what the append-only trigger lets pass: these texts and no others
  UPDATE {ledger} AS t SET
      description = 'Erased',
      metadata = NULL,
      idempotency_key = CASE
        WHEN t.refund_of IS NULL AND t.type IN ('purchase', 'consumption', 'grant')
          AND t.idempotency_key NOT LIKE 'tallystick:%'
        THEN 'tallystick:erased:' || t.id ELSE t.idempotency_key END
    WHERE t.user_id = account.key
      AND (t.description <> 'Erased' OR t.metadata IS NOT NULL OR t.idempotency_key NOT LIKE 'tallystick:%');
  UPDATE tallystick.stripe_checkouts AS c
    -- what fulfilling and reconciling it still read
    SET request = (
      SELECT jsonb_object_agg(r.key, r.value) FROM jsonb_each(c.request) AS r (key, value)
      WHERE r.key IN ('mode', 'customer', 'line_items', 'allow_promotion_codes', 'automatic_tax'))
    FROM {ledger} AS t WHERE t.user_id = account.key AND t.type = 'purchase' AND c.purchase_id = t.id;
  -- letters that no receiver took keep what they say
  UPDATE tallystick.event_dead_letters AS d
    SET body = ((d.body::jsonb #- '{{data,metadata}}') #- '{{data,idempotency_key}}')::text
    WHERE (d.body::jsonb #>> '{{data,transaction_id}}')::uuid IN (
      SELECT t.id FROM {ledger} AS t WHERE t.user_id = account.key);
  PERFORM tallystick.delete_user(account.key);
  RETURN tallystick.keep_stripe_customer(account.key, NULL);
END $$
