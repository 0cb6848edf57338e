-- Gives credits back to the lots from which ``target``, or the row that took it back, had taken them: credits that do
-- not expire first, then the lot that expires last. True if any lot got some. An expired lot gets them too, and they
-- expire at once. A lot never gets credits that were taken back from the row that gave it, nor credits that pay a debt:
-- all lots together hold no more than the balance after it.
CREATE OR REPLACE FUNCTION tallystick.give_to_lots(
  user_id {user_key_type}, transaction_id uuid, target uuid, amount {credits}, most {credits}, balance_after {credits}
) RETURNS boolean
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
  lot record;
  given {credits};
  found_lots boolean := false;
BEGIN
  FOR lot IN
    SELECT m.lot_id AS id, sum(m.amount) AS taken, sum(sum(m.amount)) OVER () AS taken_in_all,
      l.amount - l.remaining + (
        SELECT coalesce(sum(t.amount), 0) FROM {ledger} AS t
        WHERE t.refund_of = m.lot_id AND t.user_id = give_to_lots.user_id) AS room
    FROM tallystick.lot_moves AS m JOIN tallystick.lots AS l ON l.id = m.lot_id
    -- one list, so that the moves are found by their key and not by reading them all
    WHERE m.transaction_id = ANY (target || ARRAY(
        SELECT t.id FROM {ledger} AS t
        WHERE t.refund_of = target AND t.user_id = give_to_lots.user_id AND t.type <> 'expiry'))
      AND m.transaction_id <> m.lot_id -- the debt that a lot paid when it came
    GROUP BY m.lot_id, l.expires_at, l.amount, l.remaining HAVING sum(m.amount) > 0
    ORDER BY l.expires_at DESC, m.lot_id DESC
  LOOP
    IF NOT found_lots THEN
      amount := least(
        amount - greatest(most - lot.taken_in_all, 0),  -- what came from no lot goes to none
        (SELECT greatest(give_to_lots.balance_after - coalesce(sum(l.remaining), 0), 0) FROM tallystick.lots AS l
          WHERE l.user_id = give_to_lots.user_id AND l.remaining > 0));
    END IF;
    EXIT WHEN amount <= 0;
    found_lots := true;
    given := least(amount, lot.taken, lot.room);
    CONTINUE WHEN given <= 0;
    UPDATE tallystick.lots AS l SET remaining = l.remaining + given WHERE l.id = lot.id;
    INSERT INTO tallystick.lot_moves (transaction_id, lot_id, amount)
      VALUES (give_to_lots.transaction_id, lot.id, - given);
    amount := amount - given;
  END LOOP;
  RETURN found_lots;
END $$
