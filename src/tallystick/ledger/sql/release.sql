-- Gives up a hold: its credits are available again, and it can no longer be captured, also one that has expired.
CREATE OR REPLACE FUNCTION tallystick.release(user_id {user_key_type}, hold_id uuid) RETURNS tallystick.answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.answer;
  account record;
  hold {ledger};
BEGIN
  IF hold_id IS NULL THEN
    RETURN tallystick.invalid_argument('hold_id', 'the id of a hold');
  END IF;
  SELECT u.{user_key} AS key, {balance} AS balance, u.credit_sequence AS sequence, u.credit_held AS held,
      u.credit_due_at AS due
    INTO account FROM {users} AS u WHERE u.{user_key} = release.user_id FOR NO KEY UPDATE;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_user';
    RETURN answer;
  END IF;
  {due}
  SELECT * INTO hold FROM {ledger} AS t WHERE t.id = hold_id;
  IF hold.user_id IS DISTINCT FROM account.key OR hold.held IS NULL THEN
    answer.outcome := 'unknown_hold';
    RETURN answer;
  END IF;
  IF hold.status = 'failed' AND hold.capture_limit IS DISTINCT FROM 0 THEN
    -- expired: its credits are available already
    UPDATE {ledger} AS t SET capture_limit = 0 WHERE t.id = hold_id;
  END IF;
  IF hold.status <> 'pending' THEN
    SELECT CASE hold.status WHEN 'failed' THEN 'replayed' ELSE 'hold_closed' END, {row}, account.balance, NULL, NULL,
        NULL, NULL, account.held, t.expires_at
      INTO answer FROM {ledger} AS t WHERE t.id = hold_id;
    RETURN answer;
  END IF;
  UPDATE {ledger} AS t SET status = 'failed', capture_limit = 0, description = t.description || ' (released)'
    WHERE t.id = hold_id
    RETURNING 'completed', {row}, account.balance, NULL, NULL, NULL, NULL, account.held - hold.held, t.expires_at
      INTO answer;
  IF answer.status IS DISTINCT FROM 'failed' THEN
    PERFORM tallystick.host_interfered({ledger_name});
  END IF;
  PERFORM tallystick.settle_held(
    account.key, account.sequence, account.held, account.balance, account.sequence, answer.credit_held,
    CASE WHEN answer.credit_held = 0 THEN tallystick.next_due(account.key, 0) ELSE account.due END);
  answer.balance := coalesce(tallystick.settle_ended(account.key), answer.balance);
  RETURN answer;
END $$
