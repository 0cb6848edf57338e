-- Grants what was bought: the purchase is completed, and the balance grows by the row's own amount, or by ``amount``
-- where the buyer chose how many. A failed purchase that was paid after all completes too. A deleted user gets the
-- credits as well, since the money was paid.
CREATE OR REPLACE FUNCTION tallystick.complete_purchase(
  user_id {user_key_type},
  purchase_id uuid DEFAULT NULL,
  stripe_session_id text DEFAULT NULL,
  amount_paid bigint DEFAULT NULL,
  currency text DEFAULT NULL,
  stripe_payment_intent_id text DEFAULT NULL,
  amount {credits} DEFAULT NULL
) RETURNS tallystick.answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.answer;
  account record;
  prior {ledger};
BEGIN
  IF purchase_id IS NULL AND stripe_session_id IS NULL THEN
    RETURN tallystick.invalid_argument('purchase_id', 'the id of a purchase, or its stripe_session_id');
  ELSIF char_length(stripe_session_id) NOT BETWEEN 1 AND 255 THEN
    RETURN tallystick.invalid_argument('stripe_session_id', 'a text of 1 to 255 characters');
  ELSIF char_length(stripe_payment_intent_id) NOT BETWEEN 1 AND 255 THEN
    RETURN tallystick.invalid_argument('stripe_payment_intent_id', 'a text of 1 to 255 characters');
  ELSIF (amount_paid IS NULL) <> (currency IS NULL) THEN
    RETURN tallystick.invalid_argument('currency', 'amount_paid and currency, or neither');
  ELSIF amount_paid < 0 THEN
    RETURN tallystick.invalid_argument('amount_paid', 'a whole number of minor units, 0 or more');
  ELSIF currency !~ '^[A-Za-z]{{3}}$' THEN
    RETURN tallystick.invalid_argument('currency', 'a three-letter code, as usd');
  ELSIF complete_purchase.amount < 1 THEN
    RETURN tallystick.invalid_argument('amount', {amount_domain});
  END IF;

  SELECT u.{user_key} AS key, {balance} AS balance, u.credit_sequence AS sequence, u.credit_held AS held,
      u.credit_due_at AS due
    INTO account FROM {users} AS u WHERE u.{user_key} = complete_purchase.user_id FOR NO KEY UPDATE;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_user';
    RETURN answer;
  END IF;
  {opened}
  {due}
  answer := tallystick.find_purchase(account.key, purchase_id, stripe_session_id, account.balance);
  IF answer.outcome IS NOT NULL THEN
    RETURN answer;
  END IF;
  IF answer.status = 'completed' THEN
    SELECT * INTO prior FROM {ledger} AS t WHERE t.id = answer.id;
    RETURN tallystick.replay(
      prior,
      jsonb_strip_nulls(jsonb_build_object(
        'amount_paid', amount_paid, 'currency', lower(currency),
        'stripe_payment_intent_id', stripe_payment_intent_id, 'amount', complete_purchase.amount)),
      account.balance);
  END IF;
  answer.amount := coalesce(complete_purchase.amount, answer.amount);
  IF account.balance > 0 AND answer.amount > {credits_max} - account.balance THEN
    answer.outcome := 'balance_out_of_range';
    RETURN answer;
  END IF;
  -- a balance below 0 without a row, which the app wrote just before the migration, as in grant
  IF account.sequence = 0 AND account.balance < 0
      OR EXISTS (SELECT FROM {ledger} AS t WHERE t.user_id = account.key AND t.sequence = account.sequence + 1) THEN
    answer.outcome := 'ledger_inconsistent';
    answer.detail := jsonb_build_object('sequence', account.sequence);
    RETURN answer;
  END IF;

  UPDATE {ledger} AS t SET
      status = 'completed',
      amount = answer.amount,
      started_amount = nullif(t.amount, answer.amount),
      balance_after = account.balance + answer.amount,
      sequence = account.sequence + 1,
      completed_at = clock_timestamp(),
      expires_at = clock_timestamp() + t.expires_after,
      description = t.description || CASE t.status WHEN 'failed' THEN ' (paid after all)' ELSE '' END,
      stripe_session_id = coalesce(t.stripe_session_id, complete_purchase.stripe_session_id),
      stripe_payment_intent_id = coalesce(t.stripe_payment_intent_id, complete_purchase.stripe_payment_intent_id),
      amount_paid = coalesce(t.amount_paid, complete_purchase.amount_paid),
      currency = coalesce(t.currency, lower(complete_purchase.currency))
    WHERE t.id = answer.id
    RETURNING 'completed', {row}, t.balance_after, NULL, NULL, NULL, NULL, account.held, t.expires_at INTO answer;
  IF answer.status IS DISTINCT FROM 'completed' THEN
    PERFORM tallystick.host_interfered({ledger_name});
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
