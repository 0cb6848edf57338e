-- A UUID of version 7 (RFC 9562): 48 bits of milliseconds, 12 bits of a millisecond's parts, 62 random bits. One
-- expression, which the planner puts in place of the call. PostgreSQL has its own from 18 on.
CREATE OR REPLACE FUNCTION tallystick.uuid7() RETURNS uuid
LANGUAGE sql VOLATILE AS $$
  SELECT (
    pg_catalog.overlay(
      pg_catalog.lpad(
        pg_catalog.to_hex(
          (pg_catalog.date_part('epoch', pg_catalog.clock_timestamp()) OPERATOR(pg_catalog.*) 4096000)::bigint), 15, '0'),
      '7', 13, 0)
    || pg_catalog.right(pg_catalog.gen_random_uuid()::text, 17))::uuid
$$
