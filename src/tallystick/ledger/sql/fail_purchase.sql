-- Gives up a pending purchase. The reason is added to its description.
CREATE OR REPLACE FUNCTION tallystick.fail_purchase(
  user_id {user_key_type},
  purchase_id uuid DEFAULT NULL,
  stripe_session_id text DEFAULT NULL,
  reason text DEFAULT NULL
) RETURNS tallystick.answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.answer;
  account record;
BEGIN
  IF purchase_id IS NULL AND stripe_session_id IS NULL THEN
    RETURN tallystick.invalid_argument('purchase_id', 'the id of a purchase, or its stripe_session_id');
  ELSIF reason IS NULL OR char_length(reason) NOT BETWEEN 1 AND 10000 THEN
    RETURN tallystick.invalid_argument('reason', 'a text of 1 to 10000 characters');
  END IF;

  SELECT u.{user_key} AS key, {balance_now} AS balance
    INTO account FROM {users} AS u WHERE u.{user_key} = fail_purchase.user_id FOR NO KEY UPDATE;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_user';
    RETURN answer;
  END IF;
  answer := tallystick.find_purchase(account.key, purchase_id, stripe_session_id, account.balance);
  IF answer.outcome IS NOT NULL THEN
    RETURN answer;
  ELSIF answer.status = 'failed' THEN
    answer.outcome := 'replayed';
    RETURN answer;
  ELSIF answer.status = 'completed' THEN
    answer.outcome := 'purchase_not_pending';
    RETURN answer;
  END IF;

  UPDATE {ledger} AS t SET status = 'failed', description = t.description || ' (failed: ' || fail_purchase.reason || ')'
    WHERE t.id = answer.id
    RETURNING 'completed', {row}, account.balance, NULL, NULL, NULL, NULL, NULL, NULL INTO answer;
  IF answer.status IS DISTINCT FROM 'failed' THEN
    PERFORM tallystick.host_interfered({ledger_name});
  END IF;
  RETURN answer;
END $$
