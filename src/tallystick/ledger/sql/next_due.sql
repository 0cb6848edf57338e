-- The time at which the next hold or lot of a user expires; NULL if there is none. Holds keep the rest of an expired lot
-- until they end.
CREATE OR REPLACE FUNCTION tallystick.next_due(user_id {user_key_type}, held {credits}) RETURNS timestamptz
LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
  RETURN least(
    (SELECT min(t.expires_at) FROM {ledger} AS t
      WHERE t.user_id = next_due.user_id AND t.status = 'pending' AND t.sequence IS NULL AND t.held IS NOT NULL),
    (SELECT min(l.expires_at) FROM tallystick.lots AS l
      WHERE l.user_id = next_due.user_id AND l.remaining > 0
        AND (next_due.held = 0 OR l.expires_at > clock_timestamp())));
END $$
