-- Gives a user whose balance the app had before its first row: a grant of all of it. Gives the sequence that follows. A
-- balance below zero has no such row, and is left as it is.
CREATE OR REPLACE FUNCTION tallystick.open_balance(user_id {user_key_type}) RETURNS integer
LANGUAGE plpgsql VOLATILE SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  account record;
BEGIN
  SELECT u.{user_key} AS key, {balance} AS balance, u.credit_sequence AS sequence
    INTO account FROM {users} AS u WHERE u.{user_key} = open_balance.user_id FOR NO KEY UPDATE;
  -- the app may have deleted the user, or changed the key, while this waited for the lock
  IF NOT FOUND OR account.sequence <> 0 OR account.balance <= 0
      -- after the cut-over no balance is the app's any more
      OR EXISTS (SELECT FROM tallystick.migration_log AS l WHERE l.direction = 'adopt') THEN
    RETURN account.sequence;
  END IF;
  INSERT INTO {ledger} AS t (
      id, user_id, type, status, amount, balance_after, sequence, description, idempotency_key, completed_at)
    VALUES (
      tallystick.uuid7(), account.key, 'grant', 'completed', account.balance, account.balance, 1, 'Opening balance',
      'tallystick:opening', clock_timestamp())
    ON CONFLICT DO NOTHING;
  IF NOT FOUND THEN
    RETURN 0;  -- the user's row is behind the ledger, as the caller will say
  ELSIF NOT tallystick.settle(account.key, account.balance, 0, account.balance, 1) THEN
    PERFORM tallystick.host_interfered({users_name});
  END IF;
  RETURN 1;
END $$
