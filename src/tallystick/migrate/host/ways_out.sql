-- The ways in which a role that was granted the ledger could change a balance or a credit transaction without the
-- functions: (role, way, remedy). The functions run as the owner of the tables, and so does the host's code that they
-- fire: a role that can change this code can do all that the owner can.
WITH RECURSIVE app AS (
  SELECT r.oid, r.rolname AS name, r.rolsuper AS super FROM pg_roles AS r WHERE {is_app}
),
-- The role, and the roles that it can become by SET ROLE, with the memberships that lead there.
reach AS (
  SELECT app.oid AS app, app.name AS role, app.super, r.oid, r.rolname, r.rolsuper, r.rolcreaterole,
    CASE WHEN r.oid = app.oid THEN '' ELSE ' as ' || quote_ident(r.rolname) END AS via,
    (SELECT string_agg(DISTINCT 'REVOKE ' || quote_ident(r.rolname) || ' FROM ' || quote_ident(m.rolname), '; ')
     FROM pg_auth_members AS am JOIN pg_roles AS m ON m.oid = am.member
     WHERE am.roleid = r.oid AND pg_has_role(app.oid, am.member, 'MEMBER')) AS leave
  FROM app JOIN pg_roles AS r ON pg_has_role(app.oid, r.oid, 'MEMBER')
  WHERE NOT app.super OR r.oid = app.oid
),
grantee AS (
  SELECT app, role, oid, quote_ident(rolname) AS name, via,
    CASE WHEN rolname ~ '^[[:alnum:]_.-]+$' THEN rolname::text
      ELSE '''' || replace(rolname::text, '''', '''"''"''') || '''' END AS shell_word
  FROM reach
  UNION ALL
  SELECT oid, name, 0, 'PUBLIC', ' as everybody may', NULL FROM app
),
-- The schemas in which the functions, or the host's code that they fire, look up names.
place AS (
  SELECT n.oid, n.nspname, n.nspowner, n.nspacl FROM pg_namespace AS n
  WHERE n.nspname = 'tallystick' OR n.nspname::text = ANY ({schemas}::text[])
),
-- The tables, with the privileges that only the owner needs, and the columns that only the functions write. A partition
-- has privileges of its own; and who may set the sequence of the events' numbers can have them given twice.
held AS (
  SELECT c.oid, c.relowner, c.relacl, ARRAY['TRIGGER', 'INSERT', 'UPDATE'] AS rights, h.inserts, h.updates
  FROM {tables} AS h (oid, inserts, updates) JOIN pg_class AS c ON c.oid = h.oid
  UNION ALL
  SELECT c.oid, c.relowner, c.relacl,
    CASE WHEN c.relkind = 'S' THEN ARRAY['UPDATE']
      WHEN starts_with(c.relname::text, 'stripe_') OR c.relname IN ('event_endpoints', 'event_dead_letters')
      THEN ARRAY['DELETE', 'TRUNCATE', 'TRIGGER']
      ELSE ARRAY['INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'TRIGGER'] END,
    NULL::text[], NULL::text[]
  FROM pg_class AS c
  WHERE c.oid = {ledger}::regclass
    OR c.oid IN (SELECT p.relid FROM pg_partition_tree({ledger}::regclass) AS p)
    OR c.relkind IN ('r', 'p', 'S') AND c.relnamespace = (SELECT n.oid FROM pg_namespace AS n WHERE n.nspname = 'tallystick')
),
-- The columns that only the functions write, and those of other relations through which they can be written: of a view,
-- or of a table with rules, with the rights of its owner; and a key that one of them follows (ON UPDATE CASCADE).
-- A column of a view is passed over only if it has the name of another column that is not among them.
guarded AS (
  SELECT held.oid, a.attnum, a.attname, v.verb, false AS followed
  FROM held JOIN pg_attribute AS a ON a.attrelid = held.oid AND a.attnum > 0 AND NOT a.attisdropped
  CROSS JOIN (VALUES ('INSERT'), ('UPDATE'), ('DELETE')) AS v (verb)
  WHERE v.verb = ANY (held.rights) AND coalesce(
    a.attname::text = ANY (CASE v.verb WHEN 'INSERT' THEN held.inserts ELSE held.updates END), true)
  UNION
  SELECT l.* FROM guarded AS g, LATERAL (
    SELECT w.ev_class, a.attnum, a.attname,
      CASE w.ev_type WHEN '2' THEN 'UPDATE' WHEN '3' THEN 'INSERT' WHEN '4' THEN 'DELETE' ELSE g.verb END, false
    FROM pg_depend AS d
    JOIN pg_rewrite AS w ON w.oid = d.objid AND w.ev_class <> g.oid
    JOIN pg_attribute AS a ON a.attrelid = w.ev_class AND a.attnum > 0 AND NOT a.attisdropped
    WHERE d.classid = 'pg_rewrite'::regclass
      AND d.refclassid = 'pg_class'::regclass AND d.refobjid = g.oid AND d.refobjsubid = g.attnum
      AND (w.ev_type <> '1' OR a.attname = g.attname
        OR NOT EXISTS (SELECT FROM pg_attribute AS b WHERE b.attrelid = g.oid AND b.attname = a.attname))
    UNION ALL
    SELECT f.confrelid, a.attnum, a.attname, g.verb, true
    FROM pg_constraint AS f
    JOIN pg_attribute AS a ON a.attrelid = f.confrelid AND a.attnum = f.confkey[array_position(f.conkey, g.attnum)]
    WHERE f.contype = 'f' AND f.conrelid = g.oid AND f.confupdtype IN ('c', 'n', 'd') AND g.verb = 'UPDATE'
  ) AS l
),
-- Those other relations. What a view or a rule of one of the examined roles can do is told of that role.
beside AS (
  SELECT DISTINCT c.oid, c.relowner, c.relacl, g.verb, g.followed
  FROM guarded AS g JOIN pg_class AS c ON c.oid = g.oid
  WHERE c.oid NOT IN (SELECT held.oid FROM held) AND (g.followed OR (
    c.relowner NOT IN (SELECT reach.oid FROM reach)
    AND c.relkind IN ('r', 'p', 'v')
    AND pg_relation_is_updatable(c.oid, false) & CASE g.verb WHEN 'UPDATE' THEN 4 WHEN 'INSERT' THEN 8 ELSE 16 END <> 0
    AND NOT EXISTS (SELECT FROM pg_options_to_table(c.reloptions) AS o
      WHERE o.option_name = 'security_invoker' AND o.option_value::boolean)))
),
-- The types of the columns, and those that a domain among them is over.
typed (oid) AS (
  SELECT a.atttypid FROM pg_attribute AS a JOIN held ON a.attrelid = held.oid WHERE a.attnum > 0 AND NOT a.attisdropped
  UNION
  SELECT t.typbasetype FROM typed JOIN pg_type AS t ON t.oid = typed.oid WHERE t.typtype = 'd'
),
-- Functions that run when a row of these tables is written; a domain has checks of its own.
code AS (
  SELECT d.refobjid AS oid FROM pg_depend AS d JOIN pg_constraint AS t ON t.oid = d.objid
  WHERE d.refclassid = 'pg_proc'::regclass AND d.classid = 'pg_constraint'::regclass
    AND t.contypid IN (SELECT typed.oid FROM typed)
  UNION ALL
  SELECT d.refobjid FROM pg_depend AS d
  WHERE d.refclassid = 'pg_proc'::regclass AND CASE d.classid
    WHEN 'pg_trigger'::regclass THEN (SELECT t.tgrelid FROM pg_trigger AS t WHERE t.oid = d.objid)
    WHEN 'pg_constraint'::regclass THEN (SELECT t.conrelid FROM pg_constraint AS t WHERE t.oid = d.objid)
    WHEN 'pg_attrdef'::regclass THEN (SELECT t.adrelid FROM pg_attrdef AS t WHERE t.oid = d.objid)
    WHEN 'pg_class'::regclass THEN (SELECT t.indrelid FROM pg_index AS t WHERE t.indexrelid = d.objid)
    WHEN 'pg_policy'::regclass THEN (SELECT t.polrelid FROM pg_policy AS t WHERE t.oid = d.objid)
    WHEN 'pg_rewrite'::regclass THEN (SELECT t.ev_class FROM pg_rewrite AS t WHERE t.oid = d.objid)
    END IN (SELECT held.oid FROM held)
),
owned AS (
  SELECT 'DATABASE ' || quote_ident(d.datname) AS what, d.datdba AS owner FROM pg_database AS d
  WHERE d.datname = current_database()
  UNION ALL
  SELECT 'SCHEMA ' || quote_ident(place.nspname), place.nspowner FROM place
  UNION ALL
  SELECT 'TABLE ' || held.oid::regclass::text, held.relowner FROM held
  UNION
  SELECT 'TABLE ' || beside.oid::regclass::text, beside.relowner FROM beside WHERE beside.followed
  UNION ALL
  SELECT 'FUNCTION ' || p.oid::regprocedure::text, p.proowner FROM pg_proc AS p
  WHERE p.oid IN (SELECT code.oid FROM code) OR p.pronamespace IN (SELECT place.oid FROM place WHERE nspname = 'tallystick')
  UNION ALL
  SELECT 'TYPE ' || format_type(t.oid, NULL), t.typowner FROM pg_type AS t
  WHERE t.oid IN (SELECT typed.oid FROM typed)
),
-- Each privilege on our or mapped objects, by object.
granted AS (
  SELECT 'SCHEMA ' || quote_ident(place.nspname) AS what, NULL::text AS column, a.*, place.nspowner AS owner,
    a.privilege_type = 'CREATE' AS opens, false AS whole
  FROM place, aclexplode(place.nspacl) AS a
  UNION ALL
  SELECT held.oid::regclass::text, NULL, a.*, held.relowner, a.privilege_type = ANY (held.rights),
    held.inserts IS NOT NULL AND a.privilege_type IN ('INSERT', 'UPDATE')
  FROM held, aclexplode(held.relacl) AS a
  UNION ALL
  SELECT held.oid::regclass::text, quote_ident(c.attname), a.*, held.relowner,
    a.privilege_type = ANY (held.rights)
      AND coalesce(c.attname::text = ANY (CASE a.privilege_type WHEN 'INSERT' THEN held.inserts ELSE held.updates END),
        true),
    false
  FROM held JOIN pg_attribute AS c ON c.attrelid = held.oid, aclexplode(c.attacl) AS a
  UNION ALL
  SELECT beside.oid::regclass::text, NULL, a.*, beside.relowner, true, false
  FROM beside, aclexplode(beside.relacl) AS a WHERE a.privilege_type = beside.verb
  UNION ALL
  SELECT beside.oid::regclass::text, quote_ident(c.attname), a.*, beside.relowner, true, false
  FROM beside JOIN guarded AS g ON g.oid = beside.oid AND g.verb = beside.verb
  JOIN pg_attribute AS c ON c.attrelid = g.oid AND c.attnum = g.attnum, aclexplode(c.attacl) AS a
  WHERE a.privilege_type = beside.verb
  UNION ALL
  SELECT 'FUNCTION ' || p.oid::regprocedure::text, NULL, a.*, p.proowner, false, false
  FROM pg_proc AS p JOIN place ON place.oid = p.pronamespace, aclexplode(p.proacl) AS a
  WHERE place.nspname = 'tallystick'
),
ways AS (
  SELECT app, role, 1 AS rank, CASE WHEN via = '' THEN 'is a superuser, which no privilege limits'
      ELSE 'can become the superuser ' || quote_ident(rolname) END AS way,
    coalesce(leave, 'CREATE ROLE another LOGIN, and give that the ledger') AS remedy
  FROM reach WHERE rolsuper
  UNION ALL
  SELECT app, role, 2, 'may give itself any role but a superuser''s (CREATEROLE)' || via,
    'ALTER ROLE ' || quote_ident(rolname) || ' NOCREATEROLE'
  FROM reach WHERE rolcreaterole AND NOT super AND current_setting('server_version_num')::integer < 160000
  UNION ALL
  SELECT app, role, 3, 'is a member of ' || rolname, leave
  FROM reach WHERE rolname IN ('pg_write_all_data', 'pg_execute_server_program', 'pg_write_server_files')
  UNION ALL
  -- A parameter that switches triggers and foreign keys off, or names a program or a library that the server runs. Each
  -- of its privileges is a dependency of the role's, also before PostgreSQL 15, which has no such privileges.
  SELECT reach.app, reach.role, 3, 'may set the parameter ' || p.identity || reach.via,
    'REVOKE ALL ON PARAMETER ' || p.identity || ' FROM ' || quote_ident(reach.rolname)
  FROM pg_shdepend AS d JOIN reach ON reach.oid = d.refobjid
  CROSS JOIN LATERAL pg_identify_object(d.classid, d.objid, 0) AS p
  WHERE d.dbid = 0 AND d.refclassid = 'pg_authid'::regclass AND d.deptype = 'a' AND p.type = 'parameter ACL'
    AND p.identity ~ '^session_replication_role$|_command$|librar' AND NOT reach.super
  UNION ALL
  SELECT reach.app, reach.role, 4, 'owns ' || string_agg(owned.what, ', ' ORDER BY owned.what) || reach.via,
    coalesce(reach.leave, string_agg('ALTER ' || owned.what || ' OWNER TO another', '; ' ORDER BY owned.what))
  FROM owned JOIN reach ON reach.oid = owned.owner
  WHERE NOT reach.super GROUP BY reach.app, reach.role, reach.via, reach.leave
  UNION ALL
  SELECT g.app, g.role, 5,
    'may ' || string_agg(DISTINCT p.privilege_type || coalesce(' (' || p.column || ')', ''), ', ')
      || CASE WHEN starts_with(p.what, 'SCHEMA ') THEN ' in ' ELSE ' ' END || p.what || g.via,
    CASE WHEN p.whole AND g.oid <> 0 AND p.grantor = p.owner
      THEN 'tallystick migrate sql --role ' || g.shell_word || ' | psql "$DATABASE_URL"'
      ELSE CASE WHEN p.grantor = p.owner THEN '' ELSE 'SET ROLE ' || quote_ident(pg_get_userbyid(p.grantor)) || '; ' END
        || 'REVOKE ' || string_agg(DISTINCT p.privilege_type || coalesce(' (' || p.column || ')', ''), ', ')
        || ' ON ' || p.what || ' FROM ' || g.name END
  FROM granted AS p JOIN grantee AS g ON g.oid = p.grantee
  WHERE p.opens AND p.grantee <> p.owner GROUP BY g.app, g.role, g.oid, g.name, g.shell_word, g.via, p.what, p.whole,
    p.grantor, p.owner
  UNION ALL
  SELECT g.app, g.role, 6,
    'may pass on ' || string_agg(DISTINCT p.privilege_type || coalesce(' (' || p.column || ')', ''), ', ') || ' on '
      || p.what || g.via,
    'REVOKE GRANT OPTION FOR ' || string_agg(DISTINCT p.privilege_type || coalesce(' (' || p.column || ')', ''), ', ')
      || ' ON ' || p.what || ' FROM ' || g.name || ' CASCADE'
  FROM granted AS p JOIN grantee AS g ON g.oid = p.grantee
  WHERE p.is_grantable AND NOT p.opens AND p.grantee <> p.owner GROUP BY g.app, g.role, g.name, g.via, p.what
)
SELECT role::text AS role, way, remedy FROM ways WHERE NOT (role IN (SELECT name FROM app WHERE super) AND rank > 1)
ORDER BY role, rank, way
