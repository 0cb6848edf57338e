-- The answer of access, delete_workshop and restore_workshop. Attributes are only ever added, at the end.
CREATE TYPE tallystick.workshop_answer AS (
  outcome text,
  workshop_id {workshop_key_type},
  open boolean,
  reason text,
  deleted_at timestamptz
)
