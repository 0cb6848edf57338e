-- Brings the user's row to the credit transaction that was just written, and sees that it is there: whatever the host
-- hung on its table runs inside this statement, and may have swallowed or changed it.
CREATE OR REPLACE FUNCTION tallystick.settle(user_id {user_key_type}, balance {credits}, sequence integer) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = {host_path} AS $$
#variable_conflict use_column
DECLARE
  kept_balance {credits};
  kept_sequence integer;
BEGIN
  UPDATE {users} AS u SET credit_balance = settle.balance, credit_sequence = settle.sequence
    WHERE u.{user_key} {is} settle.user_id
    RETURNING u.credit_balance, u.credit_sequence INTO kept_balance, kept_sequence;
  IF kept_balance IS DISTINCT FROM balance OR kept_sequence IS DISTINCT FROM sequence THEN
    PERFORM tallystick.host_interfered({users_name});
  END IF;
END $$
