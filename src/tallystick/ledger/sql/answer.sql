-- The answer of every operation of the ledger. Attributes are only ever added, at the end.
CREATE TYPE tallystick.answer AS (
  -- 'completed': the call did what it says; 'replayed': an earlier call had done it; or the name of a refusal
  outcome text,
  -- the credit transaction that was written or found; of a refusal, the one that speaks against it
  id uuid,
  user_id {user_key_type},
  type text,
  status text,
  amount {credits},
  balance_after {credits},
  sequence integer,
  description text,
  workshop_id {workshop_key_type},
  refund_of uuid,
  stripe_session_id text,
  stripe_payment_intent_id text,
  stripe_price_id text,
  amount_paid bigint,
  currency text,
  idempotency_key text,
  metadata jsonb,
  created_at timestamptz,
  completed_at timestamptz,
  -- for a message
  balance {credits},    -- of the user, now
  required {credits},   -- credits that the call asked for
  remaining {credits},  -- credits of the purchase that can still be refunded, or given back
  detail jsonb,         -- what else there is to say, by outcome
  item integer,         -- the place in the lists of consume_many, from 1
  credit_held {credits},    -- credits of the user that holds have set aside, now
  expires_at timestamptz    -- of a hold, or of the credits that the row gave
)
