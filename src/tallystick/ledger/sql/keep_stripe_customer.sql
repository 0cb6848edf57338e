-- The write of set_stripe_customer, which fires the host's triggers.
CREATE OR REPLACE FUNCTION tallystick.keep_stripe_customer(
  user_id {user_key_type}, stripe_customer_id text
) RETURNS tallystick.account_answer
LANGUAGE plpgsql VOLATILE SET search_path = {host_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.account_answer;
BEGIN
  UPDATE {users} AS u SET {user_customer} = keep_stripe_customer.stripe_customer_id
    WHERE u.{user_key} {is} keep_stripe_customer.user_id
    RETURNING 'completed', {account}, NULL INTO answer;
  IF answer.stripe_customer_id IS DISTINCT FROM stripe_customer_id THEN
    PERFORM tallystick.host_interfered({users_name});
  END IF;
  RETURN answer;
END $$
