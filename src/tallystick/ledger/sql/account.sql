-- Gives plan, onboarding, Stripe customer and balance of a user. For a user with holds, or with credits that expire,
-- the detail has ``credit_held`` and ``credit_due_at``, the time at which the next of them expires. Expired credits
-- are not counted in the balance.
CREATE OR REPLACE FUNCTION tallystick.account(user_id {user_key_type}) RETURNS tallystick.account_answer
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.account_answer;
  standing tallystick.answer;
BEGIN
  SELECT 'completed', {account}, CASE WHEN u.credit_due_at IS NOT NULL THEN '{{}}'::jsonb END
    INTO answer FROM {users} AS u WHERE u.{user_key} = account.user_id;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_user';
  ELSIF answer.detail IS NOT NULL THEN
    standing := tallystick.balance(account.user_id);
    answer.credit_balance := standing.balance;
    answer.detail := jsonb_build_object('credit_held', standing.credit_held, 'credit_due_at', standing.expires_at);
  END IF;
  RETURN answer;
END $$
