-- Gives the balance at a moment, by the server's clock. Rows that completed at that moment are included.
CREATE OR REPLACE FUNCTION tallystick.balance_at(user_id {user_key_type}, at timestamptz) RETURNS tallystick.answer
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.answer;
BEGIN
  IF at IS NULL THEN
    RETURN tallystick.invalid_argument('at', 'a moment');
  END IF;
  SELECT u.{user_key} INTO answer.user_id FROM {users} AS u WHERE u.{user_key} = balance_at.user_id;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_user';
    RETURN answer;
  END IF;
  SELECT t.balance_after INTO answer.balance FROM {ledger} AS t
    WHERE t.user_id = answer.user_id AND t.completed_at <= balance_at.at
    ORDER BY t.completed_at DESC, t.sequence DESC LIMIT 1;
  answer.outcome := 'completed';
  answer.balance := coalesce(answer.balance, 0);
  RETURN answer;
END $$
