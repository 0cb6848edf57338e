-- The answer of events. Attributes are only ever added, at the end.
CREATE TYPE tallystick.event_answer AS (
  outcome text,
  cursor text,
  event_id bigint,
  kind text,
  created_at timestamptz,
  user_id {user_key_type},
  transaction_id uuid,
  amount {credits},
  balance_after {credits},
  sequence integer,
  workshop_id {workshop_key_type},
  idempotency_key text,
  metadata jsonb,
  threshold {credits},
  detail jsonb
)
