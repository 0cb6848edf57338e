-- Undoes a soft delete of a workshop.
CREATE OR REPLACE FUNCTION tallystick.restore_workshop(workshop_id {workshop_key_type}) RETURNS tallystick.workshop_answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {host_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.workshop_answer;
BEGIN
  UPDATE {workshops} AS w SET deleted_at = NULL
    WHERE w.{workshop_key} {is} restore_workshop.workshop_id
    RETURNING 'completed', w.{workshop_key}, NULL, NULL, tallystick.utc(w.deleted_at) INTO answer;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_workshop';
  END IF;
  RETURN answer;
END $$
