-- Writes the rows for expired holds and credits of at most ``row_limit`` users who had no write since then, those who
-- have waited longest first, and gives an answer for each. Users who are locked by another transaction are left to
-- the next call, and so is one for whom it fails: a warning says why. Those are not counted: however many they are,
-- they keep no other user waiting. Only code that reads the tables directly depends on it.
CREATE OR REPLACE FUNCTION tallystick.sweep(row_limit integer DEFAULT 1000) RETURNS SETOF tallystick.answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.answer;
  account record;
  swept integer := 0;
BEGIN
  IF row_limit IS NULL OR row_limit NOT BETWEEN 1 AND 100000 THEN
    RETURN NEXT tallystick.invalid_argument('row_limit', 'a whole number from 1 to 100000');
    RETURN;
  END IF;
  FOR account IN
    SELECT u.{user_key} AS key, u.credit_due_at AS due FROM {users} AS u WHERE u.credit_due_at <= clock_timestamp()
    -- beyond row_limit for those who fail; a bound, so that the server reads them by their index and does not sort all
    ORDER BY u.credit_due_at LIMIT row_limit + 100000 FOR NO KEY UPDATE SKIP LOCKED
  LOOP
    BEGIN
      answer := tallystick.settle_due(account.key);
      IF answer.expires_at = account.due THEN
        RAISE EXCEPTION 'the ledger has more rows than the row of the user says' USING ERRCODE = 'TS118';
      END IF;
      answer.outcome := 'completed';
      RETURN NEXT answer;
      swept := swept + 1;
    EXCEPTION WHEN OTHERS THEN
      RAISE WARNING 'the expiries of user % were not written: %', account.key, SQLERRM USING ERRCODE = SQLSTATE;
    END;
    EXIT WHEN swept = row_limit;
  END LOOP;
END $$
