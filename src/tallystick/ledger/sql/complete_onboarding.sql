-- Records that the user has completed the onboarding.
CREATE OR REPLACE FUNCTION tallystick.complete_onboarding(user_id {user_key_type}) RETURNS tallystick.account_answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {host_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.account_answer;
BEGIN
  UPDATE {users} AS u SET onboarding_complete = true
    WHERE u.{user_key} {is} complete_onboarding.user_id
    RETURNING 'completed', {account}, NULL INTO answer;
  IF NOT FOUND AND NOT EXISTS (SELECT FROM {users} AS u WHERE u.{user_key} {is} complete_onboarding.user_id) THEN
    answer.outcome := 'unknown_user';
  ELSIF answer.outcome IS NULL OR answer.onboarding_complete IS NOT TRUE THEN
    PERFORM tallystick.host_interfered({users_name});
  END IF;
  RETURN answer;
END $$
