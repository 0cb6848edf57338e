-- Gives the credits of a user that expire, in the order of spending: each row that gave them, and what is left of it.
CREATE OR REPLACE FUNCTION tallystick.lots(user_id {user_key_type}) RETURNS SETOF tallystick.answer
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
BEGIN
  RETURN QUERY
    SELECT 'completed', {row}, NULL::{credits}, NULL::{credits}, l.remaining, NULL::jsonb, NULL::integer,
      NULL::{credits}, l.expires_at
    FROM tallystick.lots AS l JOIN {ledger} AS t ON t.id = l.id
    WHERE l.user_id = lots.user_id AND l.remaining > 0 AND l.expires_at > clock_timestamp()
    ORDER BY l.expires_at, l.id;
END $$
