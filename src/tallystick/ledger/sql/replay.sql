-- The answer to a key that was used before: a replay if the call is the same, else a refusal that names the differences.
-- ``asked`` has the call's values by column, each a text, a number or null. They are those that decide what moves: not
-- the description, the metadata, or when something expires.
CREATE OR REPLACE FUNCTION tallystick.replay(t {ledger}, asked jsonb, balance {credits}) RETURNS tallystick.answer
LANGUAGE plpgsql STABLE AS $$
DECLARE
  kept jsonb := pg_catalog.to_jsonb(t);
  answer tallystick.answer;
BEGIN
  SELECT 'replayed', {row}, replay.balance, NULL, NULL, NULL, NULL, NULL, t.expires_at INTO answer;
  IF NOT kept @> asked THEN
    answer.outcome := 'idempotency_key_reused';
    answer.detail := pg_catalog.jsonb_build_object(
      'differs',
      (SELECT pg_catalog.jsonb_object_agg(a.name, pg_catalog.jsonb_build_array(kept -> a.name, a.value))
       FROM pg_catalog.jsonb_each(asked) AS a (name, value) WHERE a.value IS DISTINCT FROM kept -> a.name));
  END IF;
  RETURN answer;
END $$
