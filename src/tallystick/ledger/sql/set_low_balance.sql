-- Sets a user's threshold: the event ``balance.low`` is written when the balance falls from the threshold or more to
-- less. NULL stands for the default, which ``tallystick events enable`` sets; 0 stands for never.
CREATE OR REPLACE FUNCTION tallystick.set_low_balance(
  user_id {user_key_type},
  threshold {credits} DEFAULT NULL
) RETURNS tallystick.account_answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.account_answer;
BEGIN
  IF threshold < 0 THEN
    answer.outcome := 'invalid_argument';
    answer.detail := jsonb_build_object('argument', 'threshold', 'expected', 'a whole number, 0 or more, or NULL');
    RETURN answer;
  END IF;
  SELECT 'completed', {account}, NULL INTO answer FROM {users} AS u WHERE u.{user_key} = set_low_balance.user_id;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_user';
  ELSIF threshold IS NULL THEN
    DELETE FROM tallystick.low_balances AS l WHERE l.user_id = answer.user_id;
  ELSE
    INSERT INTO tallystick.low_balances (user_id, threshold) VALUES (answer.user_id, set_low_balance.threshold)
      ON CONFLICT (user_id) DO UPDATE SET threshold = excluded.threshold;
  END IF;
  RETURN answer;
END $$
