-- Links the user to a Stripe customer. A link to another customer stays unless ``replace`` is true.
CREATE OR REPLACE FUNCTION tallystick.set_stripe_customer(
  user_id {user_key_type}, stripe_customer_id text, replace boolean DEFAULT false
) RETURNS tallystick.account_answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.account_answer;
BEGIN
  IF stripe_customer_id IS NULL OR char_length(stripe_customer_id) NOT BETWEEN 1 AND 255 THEN
    answer.outcome := 'invalid_argument';
    answer.detail := jsonb_build_object(
      'argument', 'stripe_customer_id', 'expected', 'a text of 1 to 255 characters');
    RETURN answer;
  END IF;
  SELECT 'completed', {account}, NULL INTO answer
    FROM {users} AS u WHERE u.{user_key} = set_stripe_customer.user_id FOR NO KEY UPDATE;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_user';
  ELSIF answer.stripe_customer_id <> stripe_customer_id AND replace IS NOT TRUE THEN
    answer.outcome := 'stripe_customer_conflict';
    answer.detail := jsonb_build_object('has', answer.stripe_customer_id);
  ELSIF EXISTS (
    SELECT FROM {users} AS u
    WHERE u.{user_customer} = set_stripe_customer.stripe_customer_id AND u.{user_key} <> answer.user_id
  ) THEN
    answer.outcome := 'stripe_customer_conflict';
    answer.detail := jsonb_build_object('of_another_user', true);
  ELSE
    RETURN tallystick.keep_stripe_customer(answer.user_id, stripe_customer_id);
  END IF;
  RETURN answer;
END $$
