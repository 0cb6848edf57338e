-- {plain}, for callers who cannot branch, such as a batch that must roll back by itself: a refusal raises an error with
-- an SQLSTATE of its own, and has the answer as JSON in its DETAIL.
CREATE OR REPLACE FUNCTION tallystick.{strict}({parameters}) RETURNS {returns}
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path} AS $$
DECLARE
  answer {answer};
BEGIN
  FOR answer IN SELECT * FROM tallystick.{plain}({arguments}) LOOP
    IF answer.outcome NOT IN ('completed', 'replayed') THEN
      RAISE EXCEPTION '%', answer.outcome
        USING ERRCODE = tallystick.sqlstate_of(answer.outcome), DETAIL = jsonb_strip_nulls(to_jsonb(answer));
    END IF;
    {give}
  END LOOP;
  {done}
END $$
