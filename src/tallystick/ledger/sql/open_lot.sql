-- Makes a lot of the credits that a row has given, less the debt that they paid.
CREATE OR REPLACE FUNCTION tallystick.open_lot(given tallystick.answer) RETURNS void
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
  others bigint;
  left_over {credits};
  account record;
BEGIN
  SELECT coalesce(sum(l.remaining), 0) INTO others FROM tallystick.lots AS l
    WHERE l.user_id = given.user_id AND l.remaining > 0;
  left_over := least(given.amount, greatest(given.balance_after, others) - others);
  INSERT INTO tallystick.lots (id, user_id, amount, remaining, expires_at)
    VALUES (given.id, given.user_id, given.amount, left_over, given.expires_at);
  IF left_over < given.amount THEN
    INSERT INTO tallystick.lot_moves (transaction_id, lot_id, amount)
      VALUES (given.id, given.id, given.amount - left_over);
  END IF;
  SELECT u.credit_held AS held, u.credit_due_at AS due INTO account
    FROM {users} AS u WHERE u.{user_key} = given.user_id;
  PERFORM tallystick.settle_held(
    given.user_id, given.balance_after, given.sequence, account.held, least(account.due, given.expires_at));
END $$
