-- Gives the credits of a user, negative when in debt, and how many of them holds have set aside. Expired credits are
-- not counted, also before the next write or sweep writes a row for them. ``expires_at`` is the time at which the
-- next of the user's holds and lots expires.
CREATE OR REPLACE FUNCTION tallystick.balance(user_id {user_key_type}) RETURNS tallystick.answer
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.answer;
  moment timestamptz := clock_timestamp();
  expired {credits};
BEGIN
  SELECT u.{user_key}, {balance}, u.credit_held, u.credit_due_at
    INTO answer.user_id, answer.balance, answer.credit_held, answer.expires_at
    FROM {users} AS u WHERE u.{user_key} = balance.user_id;
  answer.outcome := CASE WHEN FOUND THEN 'completed' ELSE 'unknown_user' END;
  IF answer.expires_at <= moment THEN
    SELECT coalesce(sum(t.held), 0), min(t.expires_at) INTO answer.credit_held, answer.expires_at FROM {ledger} AS t
      WHERE t.user_id = answer.user_id AND t.status = 'pending' AND t.sequence IS NULL
        AND t.held IS NOT NULL AND t.expires_at > moment;
    SELECT coalesce(sum(l.remaining) FILTER (WHERE l.expires_at <= moment), 0),
        least(answer.expires_at, min(l.expires_at) FILTER (WHERE l.expires_at > moment))
      INTO expired, answer.expires_at FROM tallystick.lots AS l
      WHERE l.user_id = answer.user_id AND l.remaining > 0;
    answer.balance := answer.balance - least(expired, greatest(answer.balance, answer.credit_held) - answer.credit_held);
  END IF;
  RETURN answer;
END $$
