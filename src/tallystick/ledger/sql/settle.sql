-- Moves a user's row from one balance and sequence to the next, and checks the result: the host's triggers and rules on
-- the table run inside this statement, and may drop or change it. False if the row was not at the expected balance.
CREATE OR REPLACE FUNCTION tallystick.settle(
  user_id {user_key_type}, balance {credits}, sequence integer, new_balance {credits}, new_sequence integer
) RETURNS boolean
LANGUAGE plpgsql VOLATILE SET search_path = {host_path} AS $$
#variable_conflict use_column
DECLARE
  kept_balance {credits};
  kept_sequence integer;
BEGIN
  IF new_balance = balance THEN
    -- a row about what the app wrote: its triggers on UPDATE OF the balance have seen that
    UPDATE {users} AS u SET credit_sequence = settle.new_sequence
      WHERE u.{user_key} {is} settle.user_id
        AND {balance} = settle.balance AND u.credit_sequence = settle.sequence
      RETURNING {balance}, u.credit_sequence INTO kept_balance, kept_sequence;
  ELSE
    UPDATE {users} AS u SET {balance_column} = settle.new_balance, credit_sequence = settle.new_sequence
      WHERE u.{user_key} {is} settle.user_id
        AND {balance} = settle.balance AND u.credit_sequence = settle.sequence
      RETURNING {balance}, u.credit_sequence INTO kept_balance, kept_sequence;
  END IF;
  IF NOT FOUND THEN
    RETURN false;
  ELSIF kept_balance <> new_balance OR kept_sequence <> new_sequence THEN
    PERFORM tallystick.host_interfered({users_name});
  END IF;
  RETURN true;
END $$
