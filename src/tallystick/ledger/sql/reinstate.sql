-- Gives back credits that refunds took from a purchase, or all of them: a refund failed, a dispute was won.
CREATE OR REPLACE FUNCTION tallystick.reinstate(
  user_id {user_key_type},
  purchase_id uuid,
  key text,
  amount {credits} DEFAULT NULL,
  description text DEFAULT NULL,
  metadata jsonb DEFAULT NULL
) RETURNS tallystick.answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path}
  SET plan_cache_mode = force_generic_plan AS $$
BEGIN
  RETURN tallystick.give_or_take('reinstate', user_id, purchase_id, key, amount, description, metadata);
END $$
