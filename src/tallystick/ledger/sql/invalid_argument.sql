-- The answer to an argument that is out of its domain.
CREATE OR REPLACE FUNCTION tallystick.invalid_argument(argument text, expected text) RETURNS tallystick.answer
LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  answer tallystick.answer;
BEGIN
  answer.outcome := 'invalid_argument';
  answer.detail := pg_catalog.jsonb_build_object('argument', argument, 'expected', expected);
  RETURN answer;
END $$
