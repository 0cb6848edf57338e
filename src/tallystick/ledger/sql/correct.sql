-- Takes back credits of a grant that was a mistake, or all that is left of it. The balance may fall below zero.
CREATE OR REPLACE FUNCTION tallystick.correct(
  user_id {user_key_type},
  grant_id uuid,
  key text,
  amount {credits} DEFAULT NULL,
  description text DEFAULT NULL,
  metadata jsonb DEFAULT NULL
) RETURNS tallystick.answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path}
  SET plan_cache_mode = force_generic_plan AS $$
BEGIN
  RETURN tallystick.give_or_take('correct', user_id, grant_id, key, amount, description, metadata);
END $$
