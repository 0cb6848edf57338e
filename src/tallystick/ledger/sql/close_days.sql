-- Adds up the credits and the money of a UTC day that is over, for the console's overview: it reads the rows of all
-- other days, so that nothing but its speed depends on this. Each call closes at most one day, of the last sixty, and
-- gives the number of those that are still open. Call it again, in another transaction, while that number falls.
--
-- A writer locks the user, and so has the number of its transaction, before it takes the moment of a row. So a day has
-- all its rows once every transaction has ended whose number is lower than one that was given after the day was over:
-- one call notes that number, and a later one closes the day. An hour lies between, so that a clock may be set back by
-- less.
CREATE OR REPLACE FUNCTION tallystick.close_days() RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path} AS $$
DECLARE
  today date := (clock_timestamp() AT TIME ZONE 'UTC' - interval '1 hour')::date;
  -- a transaction that has written before has a number that may be too old
  is_new boolean := pg_current_xact_id_if_assigned() IS NULL;
  still_open integer;
  kept integer;
  closing date;
BEGIN
  SELECT 60 - count(*) FILTER (WHERE d.closed_at IS NOT NULL AND d.day >= today - 60 AND d.day < today), count(*)
    INTO still_open, kept FROM tallystick.days AS d;
  IF still_open = 0 AND kept = 60 THEN
    RETURN 0;
  END IF;
  -- one call at a time, and none while a day is opened again, which deletes its row
  BEGIN
    LOCK TABLE tallystick.days IN SHARE ROW EXCLUSIVE MODE NOWAIT;
  EXCEPTION WHEN lock_not_available THEN
    RETURN still_open;
  END;
  SELECT min(d.day) INTO closing
    FROM tallystick.days AS d, pg_current_snapshot() AS now (snapshot)
    WHERE d.closed_at IS NULL AND d.day >= today - 60 AND d.day < today
      AND d.writers_before <= pg_snapshot_xmin(now.snapshot)::text::bigint;
  IF closing IS NOT NULL THEN
    -- The rows are read before the first sum is written: until then the transaction has no number, which would keep the
    -- feed of events and vacuum back.
    INSERT INTO tallystick.daily_sums (day, kind, currency, credits, paid)
      SELECT closing, r.kind, r.currency, sum(r.amount), coalesce(sum(r.amount_paid), 0)
      FROM (
        SELECT CASE WHEN t.type = 'grant' AND t.refund_of IS NOT NULL THEN 'reinstatement' ELSE t.type::text END AS kind,
          coalesce(t.currency::text, '') AS currency, t.amount, t.amount_paid
        FROM {ledger} AS t
        WHERE t.completed_at >= closing::timestamp AT TIME ZONE 'UTC'
          AND t.completed_at < (closing + 1)::timestamp AT TIME ZONE 'UTC'
          AND t.status = 'completed' -- the index's predicate
      ) AS r
      GROUP BY r.kind, r.currency
      ON CONFLICT DO NOTHING;
    UPDATE tallystick.days AS d SET closed_at = clock_timestamp() WHERE d.day = closing;
  END IF;
  -- too old, or of a clock that was ahead
  DELETE FROM tallystick.days AS d WHERE d.day < today - 60 OR d.day >= today;
  IF is_new THEN
    INSERT INTO tallystick.days AS d (day, writers_before)
      SELECT today - n, pg_current_xact_id()::text::bigint FROM generate_series(1, 60) AS n
      WHERE NOT EXISTS (SELECT FROM tallystick.days AS d WHERE d.day = today - n)
      ON CONFLICT DO NOTHING;
    -- of another server, whose transactions had higher numbers
    UPDATE tallystick.days AS d SET writers_before = pg_current_xact_id()::text::bigint
      WHERE d.closed_at IS NULL AND d.writers_before > pg_current_xact_id()::text::bigint;
  END IF;
  RETURN (SELECT 60 - count(*) FILTER (WHERE d.closed_at IS NOT NULL) FROM tallystick.days AS d);
END $$
