-- Gives back credits of a consumption, or all that is left of it: the job failed, the workshop was unlocked by
-- mistake. If all of it is given back, the workshop is locked again, and unlocking it later charges again. Credits of
-- a lot go back to the lot; if it has expired, they expire at once.
CREATE OR REPLACE FUNCTION tallystick.reverse(
  user_id {user_key_type},
  consumption_id uuid,
  key text,
  amount {credits} DEFAULT NULL,
  description text DEFAULT NULL,
  metadata jsonb DEFAULT NULL
) RETURNS tallystick.answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path}
  SET plan_cache_mode = force_generic_plan AS $$
BEGIN
  RETURN tallystick.give_or_take('reverse', user_id, consumption_id, key, amount, description, metadata);
END $$
