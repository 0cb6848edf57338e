-- After a hold has ended, expires the credits of an expired lot that only this hold had kept. Gives the balance then, or
-- NULL if there is no such lot.
CREATE OR REPLACE FUNCTION tallystick.settle_ended(user_id {user_key_type}) RETURNS {credits}
LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
  IF EXISTS (
    SELECT FROM tallystick.lots AS l
    WHERE l.user_id = settle_ended.user_id AND l.remaining > 0 AND l.expires_at <= clock_timestamp()
  ) THEN
    RETURN (tallystick.settle_due(user_id)).balance;
  END IF;
  RETURN NULL;
END $$
