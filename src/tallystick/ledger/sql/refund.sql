-- Takes back credits of a completed purchase, or all that is left of it. The balance may fall below zero. Then the
-- next purchase pays this debt first, and nothing can be consumed meanwhile.
CREATE OR REPLACE FUNCTION tallystick.refund(
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
  RETURN tallystick.give_or_take('refund', user_id, purchase_id, key, amount, description, metadata);
END $$
