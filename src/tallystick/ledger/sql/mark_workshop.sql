-- Marks a workshop as unlocked, and checks the result, as settle does for the user's row.
CREATE OR REPLACE FUNCTION tallystick.mark_workshop(workshop_id {workshop_key_type}, moment timestamptz) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = {host_path} AS $$
#variable_conflict use_column
DECLARE
  marked boolean;
BEGIN
  UPDATE {workshops} AS w SET credit_consumed_at = tallystick.kept_as(mark_workshop.moment, w.credit_consumed_at)
    WHERE w.{workshop_key} {is} mark_workshop.workshop_id
    RETURNING w.credit_consumed_at IS NOT NULL INTO marked;
  IF marked IS NOT TRUE THEN
    PERFORM tallystick.host_interfered({workshops_name});
  END IF;
END $$
