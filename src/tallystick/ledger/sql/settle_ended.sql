-- After a hold has ended: what of an expired lot it alone had kept alive expires now. Gives the balance then, and NULL
-- where there is no such lot.
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
