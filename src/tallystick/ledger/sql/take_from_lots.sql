-- Takes credits from the lots of a user, those that expire soonest first; the rest comes from the credits that do not
-- expire. ``own`` is the lot to take from before all others. Credits of an expired lot that holds have kept are for
-- holds alone: ``due``, the user's next expiry, leaves them out. A clock would not do: the caller has found that nothing
-- is due, and a lot may expire since then.
CREATE OR REPLACE FUNCTION tallystick.take_from_lots(
  user_id {user_key_type}, transaction_id uuid, amount {credits}, own uuid DEFAULT NULL,
  due timestamptz DEFAULT NULL
) RETURNS void
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
  lot record;
  taken {credits};
BEGIN
  FOR lot IN
    SELECT l.id, l.remaining FROM tallystick.lots AS l
    WHERE l.user_id = take_from_lots.user_id AND l.remaining > 0
      AND (due IS NULL OR l.expires_at >= due)
    ORDER BY (l.id = own) DESC, l.expires_at, l.id
  LOOP
    EXIT WHEN amount <= 0;
    taken := least(amount, lot.remaining);
    UPDATE tallystick.lots AS l SET remaining = l.remaining - taken WHERE l.id = lot.id;
    INSERT INTO tallystick.lot_moves AS m (transaction_id, lot_id, amount)
      VALUES (take_from_lots.transaction_id, lot.id, taken)
      ON CONFLICT ON CONSTRAINT lot_moves_pkey DO UPDATE SET amount = m.amount + excluded.amount;
    amount := amount - taken;
  END LOOP;
END $$
