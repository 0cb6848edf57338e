-- The SQLSTATE that a strict function raises for a refusal. A code is never used for another refusal.
CREATE OR REPLACE FUNCTION tallystick.sqlstate_of(outcome text) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
  SELECT CASE outcome
    WHEN 'invalid_argument' THEN 'TS101'
    WHEN 'unknown_user' THEN 'TS102'
    WHEN 'user_deleted' THEN 'TS103'
    WHEN 'unknown_workshop' THEN 'TS104'
    WHEN 'workshop_deleted' THEN 'TS105'
    WHEN 'workshop_not_owned' THEN 'TS106'
    WHEN 'workshop_unaccounted' THEN 'TS107'
    WHEN 'unknown_purchase' THEN 'TS108'
    WHEN 'purchase_not_pending' THEN 'TS109'
    WHEN 'purchase_not_completed' THEN 'TS110'
    WHEN 'session_conflict' THEN 'TS111'
    WHEN 'stripe_customer_conflict' THEN 'TS112'
    WHEN 'insufficient_credits' THEN 'TS113'
    WHEN 'refund_exceeds_purchase' THEN 'TS114'
    WHEN 'reinstatement_exceeds_refunds' THEN 'TS115'
    WHEN 'balance_out_of_range' THEN 'TS116'
    WHEN 'idempotency_key_reused' THEN 'TS117'
    WHEN 'ledger_inconsistent' THEN 'TS118'
    WHEN 'host_interfered' THEN 'TS119'
    WHEN 'unknown_consumption' THEN 'TS120'
    WHEN 'unknown_grant' THEN 'TS121'
    WHEN 'unknown_hold' THEN 'TS122'
    WHEN 'reversal_exceeds_consumption' THEN 'TS123'
    WHEN 'correction_exceeds_grant' THEN 'TS124'
    WHEN 'hold_closed' THEN 'TS125'
    WHEN 'capture_exceeds_hold' THEN 'TS126'
  END
$$
