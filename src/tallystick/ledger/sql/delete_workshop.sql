-- Soft-deletes a workshop; what unlocked it stays on record. The first time is kept.
CREATE OR REPLACE FUNCTION tallystick.delete_workshop(workshop_id {workshop_key_type}) RETURNS tallystick.workshop_answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {host_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.workshop_answer;
BEGIN
  UPDATE {workshops} AS w
    SET {workshop_deleted_at} = coalesce(
      w.{workshop_deleted_at}, tallystick.kept_as(pg_catalog.clock_timestamp(), w.{workshop_deleted_at}))
    WHERE w.{workshop_key} {is} delete_workshop.workshop_id
    RETURNING 'completed', w.{workshop_key}, NULL, NULL, tallystick.utc(w.{workshop_deleted_at}) INTO answer;
  IF NOT FOUND AND NOT EXISTS (SELECT FROM {workshops} AS w WHERE w.{workshop_key} {is} delete_workshop.workshop_id) THEN
    answer.outcome := 'unknown_workshop';
  ELSIF answer.outcome IS NULL OR answer.deleted_at IS NULL THEN
    PERFORM tallystick.host_interfered({workshops_name});
  END IF;
  RETURN answer;
END $$
