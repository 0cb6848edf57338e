-- Sets the user's plan, a name that the host chooses.
CREATE OR REPLACE FUNCTION tallystick.set_plan_tier(user_id {user_key_type}, plan_tier text) RETURNS tallystick.account_answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {host_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.account_answer;
BEGIN
  IF plan_tier IS NULL OR pg_catalog.char_length(plan_tier) NOT BETWEEN 1 AND 32 THEN
    answer.outcome := 'invalid_argument';
    answer.detail := pg_catalog.jsonb_build_object('argument', 'plan_tier', 'expected', 'a text of 1 to 32 characters');
    RETURN answer;
  END IF;
  UPDATE {users} AS u SET plan_tier = set_plan_tier.plan_tier
    WHERE u.{user_key} {is} set_plan_tier.user_id
    RETURNING 'completed', {account}, NULL INTO answer;
  IF NOT FOUND AND NOT EXISTS (SELECT FROM {users} AS u WHERE u.{user_key} {is} set_plan_tier.user_id) THEN
    answer.outcome := 'unknown_user';
  ELSIF answer.outcome IS NULL OR answer.plan_tier IS DISTINCT FROM plan_tier THEN
    PERFORM tallystick.host_interfered({users_name});
  END IF;
  RETURN answer;
END $$
