-- Stores the Stripe session of a purchase, and its payment intent once there is one. The first of each stays.
CREATE OR REPLACE FUNCTION tallystick.attach_session(
  user_id {user_key_type},
  purchase_id uuid,
  stripe_session_id text,
  stripe_payment_intent_id text DEFAULT NULL
) RETURNS tallystick.answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.answer;
  account record;
BEGIN
  IF purchase_id IS NULL THEN
    RETURN tallystick.invalid_argument('purchase_id', 'the id of a purchase');
  ELSIF stripe_session_id IS NULL OR char_length(stripe_session_id) NOT BETWEEN 1 AND 255 THEN
    RETURN tallystick.invalid_argument('stripe_session_id', 'a text of 1 to 255 characters');
  ELSIF char_length(stripe_payment_intent_id) NOT BETWEEN 1 AND 255 THEN
    RETURN tallystick.invalid_argument('stripe_payment_intent_id', 'a text of 1 to 255 characters');
  END IF;

  SELECT u.{user_key} AS key, {balance_now} AS balance
    INTO account FROM {users} AS u WHERE u.{user_key} = attach_session.user_id FOR NO KEY UPDATE;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_user';
    RETURN answer;
  END IF;
  answer := tallystick.find_purchase(account.key, purchase_id, stripe_session_id, account.balance);
  IF answer.outcome IS NOT NULL THEN
    RETURN answer;
  END IF;
  IF answer.stripe_session_id IS NOT NULL
      AND (answer.stripe_payment_intent_id IS NOT NULL OR stripe_payment_intent_id IS NULL) THEN
    answer.outcome := 'replayed';
    RETURN answer;
  END IF;

  UPDATE {ledger} AS t SET
      stripe_session_id = attach_session.stripe_session_id,
      stripe_payment_intent_id = coalesce(t.stripe_payment_intent_id, attach_session.stripe_payment_intent_id)
    WHERE t.id = attach_session.purchase_id
    RETURNING 'completed', {row}, account.balance, NULL, NULL, NULL, NULL, NULL, NULL INTO answer;
  IF answer.stripe_session_id IS DISTINCT FROM stripe_session_id THEN
    PERFORM tallystick.host_interfered({ledger_name});
  END IF;
  RETURN answer;
END $$
