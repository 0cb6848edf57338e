-- A moment as a host's column keeps it: one without time zone holds UTC.
CREATE OR REPLACE FUNCTION tallystick.utc(kept timestamptz) RETURNS timestamptz
LANGUAGE sql IMMUTABLE AS $$ SELECT kept $$;
CREATE OR REPLACE FUNCTION tallystick.utc(kept timestamp) RETURNS timestamptz
LANGUAGE sql IMMUTABLE AS $$ SELECT kept AT TIME ZONE 'UTC' $$;
CREATE OR REPLACE FUNCTION tallystick.utc(kept date) RETURNS timestamptz
LANGUAGE sql IMMUTABLE AS $$ SELECT kept::timestamp AT TIME ZONE 'UTC' $$;
-- And the way there: the moment in the type of the column that is named beside it.
CREATE OR REPLACE FUNCTION tallystick.kept_as(moment timestamptz, in_column timestamptz) RETURNS timestamptz
LANGUAGE sql IMMUTABLE AS $$ SELECT moment $$;
CREATE OR REPLACE FUNCTION tallystick.kept_as(moment timestamptz, in_column timestamp) RETURNS timestamp
LANGUAGE sql IMMUTABLE AS $$ SELECT moment AT TIME ZONE 'UTC' $$
