-- Soft-deletes a user: the row and its ledger stay, and nothing can be bought or spent. The first time is kept.
CREATE OR REPLACE FUNCTION tallystick.delete_user(user_id {user_key_type}) RETURNS tallystick.account_answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {host_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.account_answer;
BEGIN
  UPDATE {users} AS u
    SET {user_deleted_at} = coalesce(
      u.{user_deleted_at}, tallystick.kept_as(pg_catalog.clock_timestamp(), u.{user_deleted_at}))
    WHERE u.{user_key} {is} delete_user.user_id
    RETURNING 'completed', {account}, NULL INTO answer;
  IF NOT FOUND AND NOT EXISTS (SELECT FROM {users} AS u WHERE u.{user_key} {is} delete_user.user_id) THEN
    answer.outcome := 'unknown_user';
  ELSIF answer.outcome IS NULL OR answer.deleted_at IS NULL THEN
    PERFORM tallystick.host_interfered({users_name});
  END IF;
  RETURN answer;
END $$
