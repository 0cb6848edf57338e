-- The credits of a user, negative when in debt.
CREATE OR REPLACE FUNCTION tallystick.balance(user_id {user_key_type}) RETURNS tallystick.answer
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.answer;
BEGIN
  SELECT u.{user_key}, {balance} INTO answer.user_id, answer.balance
    FROM {users} AS u WHERE u.{user_key} = balance.user_id;
  answer.outcome := CASE WHEN FOUND THEN 'completed' ELSE 'unknown_user' END;
  RETURN answer;
END $$
