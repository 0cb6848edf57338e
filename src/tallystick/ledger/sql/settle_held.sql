-- As settle, for a user who is locked: also writes the credits that holds have set aside, and the next expiry of holds
-- and lots. ``old_sequence`` and ``old_held`` are what the caller has read: a trigger of the host's may have called the
-- ledger since then, and what that wrote must not be undone.
CREATE OR REPLACE FUNCTION tallystick.settle_held(
  user_id {user_key_type}, old_sequence integer, old_held {credits},
  balance {credits}, sequence integer, held {credits}, due timestamptz
) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = {host_path} AS $$
#variable_conflict use_column
DECLARE
  kept record;
BEGIN
  -- a hold leaves the balance: the app's triggers on UPDATE OF it have nothing to see
  UPDATE {users} AS u
    SET credit_sequence = settle_held.sequence, credit_held = settle_held.held, credit_due_at = settle_held.due
    WHERE u.{user_key} {is} settle_held.user_id AND {balance} = settle_held.balance
      AND u.credit_sequence = settle_held.old_sequence AND u.credit_held = settle_held.old_held
    RETURNING {balance} AS balance, u.credit_sequence AS sequence, u.credit_held AS held, u.credit_due_at AS due
      INTO kept;
  IF NOT FOUND THEN
    UPDATE {users} AS u
      SET {balance_column} = settle_held.balance, credit_sequence = settle_held.sequence,
        credit_held = settle_held.held, credit_due_at = settle_held.due
      WHERE u.{user_key} {is} settle_held.user_id
        AND u.credit_sequence = settle_held.old_sequence AND u.credit_held = settle_held.old_held
      RETURNING {balance} AS balance, u.credit_sequence AS sequence, u.credit_held AS held, u.credit_due_at AS due
        INTO kept;
  END IF;
  IF NOT FOUND OR kept.balance <> settle_held.balance OR kept.sequence <> settle_held.sequence
      OR kept.held <> settle_held.held OR kept.due IS DISTINCT FROM settle_held.due THEN
    PERFORM tallystick.host_interfered({users_name});
  END IF;
END $$
