-- The answer of every operation of the accounts. Attributes are only ever added, at the end.
CREATE TYPE tallystick.account_answer AS (
  outcome text,
  user_id {user_key_type},
  credit_balance {credits},
  onboarding_complete boolean,
  stripe_customer_id text,
  plan_tier text,
  updated_at timestamptz,
  deleted_at timestamptz,
  detail jsonb
)
