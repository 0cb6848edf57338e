-- Gives the credits of a user, negative when in debt, and how many of them holds have set aside. Expired credits are
-- not counted, also before the next write or sweep writes a row for them. ``expires_at`` is the time at which the
-- next of the user's holds and lots expires.
CREATE OR REPLACE FUNCTION tallystick.balance(user_id {user_key_type}) RETURNS tallystick.answer
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.answer;
  expired {credits};
BEGIN
  SELECT u.{user_key}, {balance}, u.credit_held, u.credit_due_at
    INTO answer.user_id, answer.balance, answer.credit_held, answer.expires_at
    FROM {users} AS u WHERE u.{user_key} = balance.user_id;
  answer.outcome := CASE WHEN FOUND THEN 'completed' ELSE 'unknown_user' END;
  IF answer.expires_at <= clock_timestamp() THEN
    SELECT coalesce(sum(t.held), 0) INTO answer.credit_held FROM {ledger} AS t
      WHERE t.user_id = answer.user_id AND t.status = 'pending' AND t.sequence IS NULL
        AND t.held IS NOT NULL AND t.expires_at > clock_timestamp();
    SELECT coalesce(sum(l.remaining), 0) INTO expired FROM tallystick.lots AS l
      WHERE l.user_id = answer.user_id AND l.remaining > 0 AND l.expires_at <= clock_timestamp();
    answer.balance := answer.balance - least(expired, greatest(answer.balance - answer.credit_held, 0));
  END IF;
  RETURN answer;
END $$
