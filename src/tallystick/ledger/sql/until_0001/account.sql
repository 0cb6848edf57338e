-- The billing side of a user.
CREATE OR REPLACE FUNCTION tallystick.account(user_id {user_key_type}) RETURNS tallystick.account_answer
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.account_answer;
BEGIN
  SELECT 'completed', {account}, NULL INTO answer FROM {users} AS u WHERE u.{user_key} = account.user_id;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_user';
  END IF;
  RETURN answer;
END $$
