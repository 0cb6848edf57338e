-- Raises the error for a trigger, rule or policy of the host's that dropped or changed a write of the ledger. Nothing of
-- the call stays.
CREATE OR REPLACE FUNCTION tallystick.host_interfered(relation text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'a trigger, rule or policy of % changed or swallowed what the ledger wrote', relation
    USING ERRCODE = 'TS119',
      HINT = 'Nothing was written. Exempt the columns of Tallystick from it; \d ' || relation || ' in psql lists them.';
END $$
