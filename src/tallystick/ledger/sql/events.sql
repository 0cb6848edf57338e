-- Gives the events of all users, oldest first. ``after`` is the cursor of the last event that was read; left out, the
-- feed begins with the oldest event that is kept. An event is given when every transaction that began to write before
-- its own has ended. Then no earlier event can appear any more, so a reader that goes on after its last cursor misses
-- no event.
CREATE OR REPLACE FUNCTION tallystick.events(
  after text DEFAULT NULL,
  row_limit integer DEFAULT 100
) RETURNS SETOF tallystick.event_answer
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.event_answer;
  after_position bigint := -1;
  after_id bigint := 0;
  feed record;
BEGIN
  IF row_limit IS NULL OR row_limit NOT BETWEEN 1 AND 1000 THEN
    answer.outcome := 'invalid_argument';
    answer.detail := jsonb_build_object('argument', 'row_limit', 'expected', 'a whole number from 1 to 1000');
    RETURN NEXT answer;
    RETURN;
  ELSIF after !~ '^[0-9]{{1,18}}-[0-9]{{1,18}}$' THEN
    answer.outcome := 'invalid_argument';
    answer.detail := jsonb_build_object('argument', 'after', 'expected', 'the cursor of an event');
    RETURN NEXT answer;
    RETURN;
  ELSIF after IS NOT NULL THEN
    after_position := split_part(after, '-', 1);
    after_id := split_part(after, '-', 2);
  END IF;
  SELECT s.xid_offset + pg_snapshot_xmin(now.snapshot)::text::bigint AS ended,
      s.xid_offset + pg_snapshot_xmax(now.snapshot)::text::bigint AS begun,
      s.xid_offset + pg_current_xact_id_if_assigned()::text::bigint AS own
    INTO feed FROM tallystick.event_settings AS s, pg_current_snapshot() AS now (snapshot);
  IF EXISTS (SELECT FROM tallystick.events AS e WHERE e.position >= feed.begun AND e.position IS DISTINCT FROM feed.own) THEN
    RAISE EXCEPTION 'the events were written on another server, whose transactions had higher numbers'
      USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'Number the new ones after them: tallystick events enable';
  END IF;
  RETURN QUERY
    SELECT 'completed', e.position || '-' || e.id, e.id, e.kind, e.created_at, t.user_id, e.transaction_id,
      CASE WHEN e.completed OR t.held IS NULL THEN t.amount ELSE - t.held END, CASE WHEN e.completed THEN t.balance_after END,
      CASE WHEN e.completed THEN t.sequence END, t.workshop_id, t.idempotency_key, t.metadata, e.threshold::{credits}, NULL::jsonb
    FROM (
      -- the row may be further by now
      SELECT e.*, e.kind LIKE '%.completed' OR e.kind LIKE 'balance.%' AS completed FROM tallystick.events AS e
      WHERE (e.position, e.id) > (after_position, after_id) AND e.position < feed.ended
      ORDER BY e.position, e.id LIMIT row_limit
    ) AS e
    JOIN {ledger} AS t ON t.id = e.transaction_id
    ORDER BY e.position, e.id;
END $$
