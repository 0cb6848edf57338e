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
  -- what is there now: a trigger of the host's may have called the ledger when the balance was written
  SELECT {balance} AS balance, u.credit_sequence AS sequence, u.credit_held AS held, u.credit_due_at AS due INTO account
    FROM {users} AS u WHERE u.{user_key} = given.user_id;
  left_over := least(given.amount, greatest(account.balance, others) - others);
  INSERT INTO tallystick.lots (id, user_id, amount, remaining, expires_at)
    VALUES (given.id, given.user_id, given.amount, left_over, given.expires_at);
  IF left_over < given.amount THEN
    INSERT INTO tallystick.lot_moves (transaction_id, lot_id, amount)
      VALUES (given.id, given.id, given.amount - left_over);
  END IF;
  PERFORM tallystick.settle_held(
    given.user_id, account.sequence, account.held,
    account.balance, account.sequence, account.held, least(account.due, given.expires_at));
END $$
