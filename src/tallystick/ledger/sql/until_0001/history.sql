-- The credit transactions of a user, newest first: what is pending, then what completed, by sequence. The cursor
-- ``before`` is the sequence of the last row that was read, or its id where it has none. An unknown user has no rows.
CREATE OR REPLACE FUNCTION tallystick.history(
  user_id {user_key_type},
  row_limit integer DEFAULT 50,
  before text DEFAULT NULL,
  include_failed boolean DEFAULT false
) RETURNS SETOF tallystick.answer
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  before_sequence integer := 2147483647;
  before_rows integer;
  before_id uuid := 'ffffffff-ffff-ffff-ffff-ffffffffffff';
BEGIN
  IF row_limit IS NULL OR row_limit NOT BETWEEN 1 AND 1000 THEN
    RETURN NEXT tallystick.invalid_argument('row_limit', 'a whole number from 1 to 1000');
    RETURN;
  ELSIF before ~ '^[0-9]{{1,10}}$' AND before::bigint <= before_sequence THEN
    before_sequence := before;
    before_id := NULL;
  ELSIF before ~ '^[0-9a-fA-F]{{8}}(-[0-9a-fA-F]{{4}}){{3}}-[0-9a-fA-F]{{12}}$' THEN
    before_id := before;
  ELSIF before IS NOT NULL THEN
    RETURN NEXT tallystick.invalid_argument('before', 'the sequence, or without one the id, of a row that history gave');
    RETURN;
  END IF;
  -- State by state, each cut off at the page's length by an index of its own, so that a page costs the same anywhere:
  -- a pending purchase is found behind thousands of failed ones.
  IF before_id IS NOT NULL THEN
    RETURN QUERY
      SELECT 'completed', {row}, NULL::{credits}, NULL::{credits}, NULL::{credits}, NULL::jsonb, NULL::integer
      FROM unnest(CASE WHEN include_failed THEN ARRAY['pending', 'failed']::{status}[]
        ELSE ARRAY['pending']::{status}[] END) AS shown (status),
      LATERAL (
        SELECT * FROM {ledger} AS t
        WHERE t.user_id = history.user_id AND t.status = shown.status AND t.sequence IS NULL AND t.id < before_id
        ORDER BY t.id DESC LIMIT row_limit
      ) AS t
      ORDER BY t.id DESC LIMIT row_limit;
    GET DIAGNOSTICS before_rows = ROW_COUNT;
    row_limit := row_limit - before_rows;
  END IF;
  RETURN QUERY
    SELECT 'completed', {row}, NULL::{credits}, NULL::{credits}, NULL::{credits}, NULL::jsonb, NULL::integer
    FROM {ledger} AS t
    WHERE t.user_id = history.user_id AND t.sequence < before_sequence
    ORDER BY t.sequence DESC LIMIT row_limit;
END $$
