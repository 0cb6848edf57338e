-- After credits were taken back, takes them from lots: first from their own lot, then from others only what the balance
-- no longer covers.
CREATE OR REPLACE FUNCTION tallystick.take_back_from_lots(
  user_id {user_key_type}, transaction_id uuid, lot_id uuid, amount {credits}, balance_after {credits}
) RETURNS void
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
  own {credits};
  uncovered bigint;
BEGIN
  SELECT l.remaining INTO own FROM tallystick.lots AS l WHERE l.id = take_back_from_lots.lot_id;
  IF own > 0 THEN
    PERFORM tallystick.take_from_lots(
      user_id, transaction_id, least(take_back_from_lots.amount, own), take_back_from_lots.lot_id);
  END IF;
  SELECT sum(l.remaining) - greatest(balance_after, 0) INTO uncovered FROM tallystick.lots AS l
    WHERE l.user_id = take_back_from_lots.user_id AND l.remaining > 0;
  IF uncovered > 0 THEN
    PERFORM tallystick.take_from_lots(user_id, transaction_id, uncovered::{credits});
  END IF;
END $$
