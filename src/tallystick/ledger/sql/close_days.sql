-- Adds up the credits and the money of the UTC days that are over, for the console's overview: it reads the rows of all
-- other days, so that nothing but its speed depends on this. Gives the number of days that it has closed.
--
-- A writer locks the user, and so has the number of its transaction, before it takes the moment of a row. So a day has
-- all its rows once every transaction has ended whose number is lower than one that was given after the day was over.
-- An hour lies between, so that a clock may be set back by less.
CREATE OR REPLACE FUNCTION tallystick.close_days() RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path} AS $$
DECLARE
  today date := (clock_timestamp() AT TIME ZONE 'UTC' - interval '1 hour')::date;
  -- a transaction that has written before has a number that may be too old
  is_new boolean := pg_current_xact_id_if_assigned() IS NULL;
  number bigint;
  closing date[];
BEGIN
  IF (SELECT count(*) FROM tallystick.days AS d
      WHERE d.day >= today - 60 AND d.day < today AND d.closed_at IS NOT NULL) = 60 THEN
    RETURN 0;
  END IF;
  number := pg_current_xact_id()::text::bigint;
  -- one call at a time, and none while a day is opened again, which deletes its row
  LOCK TABLE tallystick.days IN SHARE ROW EXCLUSIVE MODE;
  DELETE FROM tallystick.days AS d WHERE d.day < today - 60;
  IF is_new THEN
    INSERT INTO tallystick.days AS d (day, writers_before)
      SELECT today - n, number FROM generate_series(1, 60) AS n
      WHERE NOT EXISTS (SELECT FROM tallystick.days AS d WHERE d.day = today - n);
    -- of another server, whose transactions had higher numbers
    UPDATE tallystick.days AS d SET writers_before = number
      WHERE d.closed_at IS NULL AND d.writers_before > number AND d.day < today;
  END IF;
  WITH closed AS (
    UPDATE tallystick.days AS d SET closed_at = clock_timestamp()
      FROM pg_current_snapshot() AS now (snapshot)
      WHERE d.closed_at IS NULL AND d.writers_before <= pg_snapshot_xmin(now.snapshot)::text::bigint
      RETURNING d.day
  )
  SELECT array_agg(c.day ORDER BY c.day) INTO closing FROM closed AS c;
  IF closing IS NULL THEN
    RETURN 0;
  END IF;
  INSERT INTO tallystick.daily_sums (day, kind, currency, credits, paid)
    SELECT r.day, r.kind, r.currency, sum(r.amount), coalesce(sum(r.amount_paid), 0)
    FROM (
      SELECT (t.completed_at AT TIME ZONE 'UTC')::date AS day,
        CASE WHEN t.type = 'grant' AND t.refund_of IS NOT NULL THEN 'reinstatement' ELSE t.type::text END AS kind,
        coalesce(t.currency::text, '') AS currency, t.amount, t.amount_paid
      FROM {ledger} AS t
      WHERE t.completed_at >= closing[1]::timestamp AT TIME ZONE 'UTC'
        AND t.completed_at < (closing[cardinality(closing)] + 1)::timestamp AT TIME ZONE 'UTC'
    ) AS r
    WHERE r.day = ANY (closing)
    GROUP BY r.day, r.kind, r.currency;
  RETURN cardinality(closing);
END $$
