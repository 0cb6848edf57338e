-- The answer to a key that was used before: a replay if the call is the same, else a refusal that names the differences.
-- ``asked`` has the call's values by column; the description, being for people, is not compared.
CREATE OR REPLACE FUNCTION tallystick.replay(t {ledger}, asked jsonb, balance {credits}) RETURNS tallystick.answer
LANGUAGE plpgsql STABLE AS $$
DECLARE
  answer tallystick.answer;
BEGIN
  SELECT 'replayed', {row}, replay.balance, NULL, NULL,
    (SELECT pg_catalog.jsonb_object_agg(a.name, pg_catalog.jsonb_build_array(pg_catalog.to_jsonb(t) -> a.name, a.value))
     FROM pg_catalog.jsonb_each(asked) AS a (name, value)
     WHERE a.value IS DISTINCT FROM pg_catalog.to_jsonb(t) -> a.name),
    NULL, NULL, t.expires_at
  INTO answer;
  IF answer.detail IS NOT NULL THEN
    answer.outcome := 'idempotency_key_reused';
    answer.detail := pg_catalog.jsonb_build_object('differs', answer.detail);
  END IF;
  RETURN answer;
END $$
