-- As mark_workshop, for many workshops in one statement.
CREATE OR REPLACE FUNCTION tallystick.mark_workshops(
  workshop_ids {workshop_key_type}[], moment timestamptz
) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = {host_path} AS $$
#variable_conflict use_column
DECLARE
  kept bigint;
BEGIN
  WITH marked AS (
    UPDATE {workshops} AS w SET credit_consumed_at = tallystick.kept_as(mark_workshops.moment, w.credit_consumed_at)
      WHERE w.{workshop_key} {is} ANY (workshop_ids)
      RETURNING w.credit_consumed_at IS NOT NULL AS kept
  )
  SELECT pg_catalog.count(*) INTO kept FROM marked WHERE marked.kept;
  IF kept IS DISTINCT FROM pg_catalog.cardinality(workshop_ids) THEN
    PERFORM tallystick.host_interfered({workshops_name});
  END IF;
END $$
