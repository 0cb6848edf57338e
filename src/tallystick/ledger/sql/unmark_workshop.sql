-- Locks a workshop again, and checks the result, as mark_workshop does.
CREATE OR REPLACE FUNCTION tallystick.unmark_workshop(workshop_id {workshop_key_type}) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = {host_path} AS $$
#variable_conflict use_column
DECLARE
  marked boolean;
BEGIN
  UPDATE {workshops} AS w SET credit_consumed_at = NULL
    WHERE w.{workshop_key} {is} unmark_workshop.workshop_id
    RETURNING w.credit_consumed_at IS NOT NULL INTO marked;
  IF marked IS NOT FALSE THEN
    PERFORM tallystick.host_interfered({workshops_name});
  END IF;
END $$
