-- As settle, for many users in one statement.
CREATE OR REPLACE FUNCTION tallystick.settle_many(
  user_ids {user_key_type}[], balances {credits}[], sequences integer[]
) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = {host_path} AS $$
#variable_conflict use_column
DECLARE
  kept bigint;
BEGIN
  WITH moved AS (
    UPDATE {users} AS u SET {balance_column} = last.balance, credit_sequence = last.sequence
      FROM ROWS FROM (pg_catalog.unnest(user_ids), pg_catalog.unnest(balances), pg_catalog.unnest(sequences))
        AS last (user_id, balance, sequence)
      WHERE u.{user_key} {is} last.user_id AND u.{user_key} {is} ANY (user_ids)
      RETURNING {balance} IS NOT DISTINCT FROM last.balance
        AND u.credit_sequence IS NOT DISTINCT FROM last.sequence AS kept
  )
  SELECT pg_catalog.count(*) INTO kept FROM moved WHERE moved.kept;
  IF kept IS DISTINCT FROM pg_catalog.cardinality(user_ids) THEN
    PERFORM tallystick.host_interfered({users_name});
  END IF;
END $$
