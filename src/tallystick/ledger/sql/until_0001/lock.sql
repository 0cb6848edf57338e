-- Keeps the ledger of a user still until the caller's transaction ends, and gives the balance. Operations of the same
-- transaction go on, those of others wait for its end.
CREATE OR REPLACE FUNCTION tallystick.lock(user_id {user_key_type}) RETURNS tallystick.answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.answer;
BEGIN
  SELECT u.{user_key}, {balance} INTO answer.user_id, answer.balance
    FROM {users} AS u WHERE u.{user_key} = "lock".user_id FOR NO KEY UPDATE;
  answer.outcome := CASE WHEN FOUND THEN 'completed' ELSE 'unknown_user' END;
  RETURN answer;
END $$
