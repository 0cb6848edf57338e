-- Locks the ledger of a user until the caller's transaction ends, and gives the balance. Operations of the same
-- transaction go on; those of other transactions wait for its end.
CREATE OR REPLACE FUNCTION tallystick.lock(user_id {user_key_type}) RETURNS tallystick.answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.answer;
  account record;
BEGIN
  SELECT u.{user_key} AS key, {balance} AS balance, u.credit_sequence AS sequence, u.credit_held AS held,
      u.credit_due_at AS due
    INTO account FROM {users} AS u WHERE u.{user_key} = "lock".user_id FOR NO KEY UPDATE;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_user';
    RETURN answer;
  END IF;
  {due}
  answer.outcome := 'completed';
  answer.user_id := account.key;
  answer.balance := account.balance;
  answer.credit_held := account.held;
  RETURN answer;
END $$
