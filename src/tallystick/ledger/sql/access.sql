-- Says if a workshop is open, and why: unlocked, older than the paywall, or no paywall. ``grandfathered_before`` is the
-- moment from which a credit is needed; left out, it is when Tallystick was installed.
CREATE OR REPLACE FUNCTION tallystick.access(
  workshop_id {workshop_key_type},
  paywall boolean DEFAULT true,
  grandfathered_before timestamptz DEFAULT NULL
) RETURNS tallystick.workshop_answer
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.workshop_answer;
  workshop record;
BEGIN
  SELECT w.{workshop_key} AS key, {workshop_created_at} AS created_at, w.credit_consumed_at,
      w.{workshop_deleted_at} AS deleted_at
    INTO workshop FROM {workshops} AS w WHERE w.{workshop_key} = access.workshop_id;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_workshop';
    RETURN answer;
  END IF;
  answer.outcome := 'completed';
  answer.workshop_id := workshop.key;
  answer.deleted_at := tallystick.utc(workshop.deleted_at);
  answer.reason := CASE
    WHEN workshop.deleted_at IS NOT NULL THEN 'deleted'
    WHEN workshop.credit_consumed_at IS NOT NULL THEN 'unlocked'
    WHEN workshop.created_at < coalesce(
      access.grandfathered_before,
      (SELECT min(l.applied_at) FROM tallystick.migration_log AS l WHERE l.revision = '0001')) THEN 'grandfathered'
    WHEN NOT paywall THEN 'paywall_off'
    ELSE 'locked' END;
  answer.open := answer.reason NOT IN ('deleted', 'locked');
  RETURN answer;
END $$
