-- Gives the credits of a lot that have expired, also at the accounts to which merges moved them. It includes those that
-- the next call of their account will write a row for.
CREATE OR REPLACE FUNCTION tallystick.expired(lot_id uuid) RETURNS bigint
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
BEGIN
  RETURN (
    WITH RECURSIVE moved (lot_id) AS (
      VALUES (expired.lot_id)
      UNION
      SELECT t.refund_of FROM moved JOIN tallystick.lot_moves AS m ON m.lot_id = moved.lot_id
        JOIN {ledger} AS t ON t.id = m.transaction_id AND t.type::text = 'transfer'
    )
    SELECT coalesce(sum(
        coalesce((SELECT - sum(t.amount) FROM {ledger} AS t
          WHERE t.refund_of = moved.lot_id AND t.type::text = 'expiry'), 0)
        + coalesce((SELECT greatest(l.remaining - u.credit_held, 0) FROM tallystick.lots AS l
          JOIN {users} AS u ON u.{user_key} = l.user_id
          WHERE l.id = moved.lot_id AND l.expires_at <= clock_timestamp()), 0)), 0)
      FROM moved);
END $$
