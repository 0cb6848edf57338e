"""The database knows for which tables it was migrated: a caller needs no settings, and wrong ones are refused."""

from __future__ import annotations

import psycopg
import pytest
import sqlalchemy as sa
from psycopg.rows import dict_row
from sqlalchemy.orm import Session

from tallystick import Config, HostMapping, Ledger, UsersTable, WorkshopsTable
from tallystick.accounts import Accounts
from tallystick.errors import HostMismatch, NotMigrated
from tallystick.schema import mapping_of, verify, with_stored_mapping
from worlds import World


def test_a_ledger_is_made_from_an_engine_or_a_connection_alone(any_world: World) -> None:
    user = any_world.user(credits=5)
    with any_world.engine.connect() as conn:
        for source in (any_world.engine, conn):
            ledger, accounts = Ledger(source), Accounts(source)
            assert ledger.config.host == any_world.config.host == mapping_of(source)
            assert ledger.consume(conn, user, key="a").balance_after == 4
            assert accounts.get(conn, user).credit_balance == 4
        if any_world.schema.workshops is not None:
            assert not Ledger(any_world.engine).access(conn, any_world.workshop(user)).open


def test_a_connection_of_psycopgs_is_enough(world: World) -> None:
    with psycopg.connect(world.url.replace("+psycopg", ""), row_factory=dict_row) as conn:
        verify(conn, world.config.host)
        assert mapping_of(conn) == world.config.host


def test_a_connection_stays_usable_where_nothing_is_migrated(fresh_database) -> None:
    engine = sa.create_engine(fresh_database(), poolclass=sa.NullPool)
    with engine.connect() as conn:
        for source in (engine, conn):
            with pytest.raises(NotMigrated, match="tallystick migrate apply"):
                Ledger(source)
        assert conn.scalar(sa.text("SELECT 1")) == 1


OTHERS = {
    "host.users.key_type is 'integer', in the database 'uuid'": HostMapping(users=UsersTable(key_type="integer")),
    "host.users.table is 'people', in the database 'users'": HostMapping(users=UsersTable(table="people")),
    "host.workshops.title is not set, in the database 'title'": HostMapping(workshops=WorkshopsTable(title=None)),
    "host.workshops.owner is 'owner', in the database 'user_id'; host.workshops.created_at is 'made', in the database "
    "'created_at'": HostMapping(workshops=WorkshopsTable(owner="owner", created_at="made")),
    "host.workshops is not set, in the database 'public.workshops'": HostMapping(workshops=None),
    "host.credits is 'bigint', in the database 'integer'": HostMapping(credits="bigint"),
}


def refusals(conn: sa.Connection | Session, host: HostMapping) -> list[HostMismatch]:
    with pytest.raises(HostMismatch) as at_start:
        verify(conn, host)
    with pytest.raises(HostMismatch) as settled:
        with_stored_mapping(conn, Config(host=host))
    return [at_start.value, settled.value]


def test_settings_that_disagree_are_refused_and_both_are_shown(world: World) -> None:
    with world.engine.connect() as conn, Session(world.engine) as session:
        for usable in (conn, session):
            verify(usable, world.config.host)
            for message, host in OTHERS.items():
                for refused in refusals(usable, host):
                    assert message in refused.message
                    assert refused.table == "public.users"
        assert with_stored_mapping(conn, Config(paywall=False)).host == world.config.host
        assert not with_stored_mapping(conn, Config(paywall=False)).paywall


def test_where_addresses_are_kept_no_function_knows(world: World) -> None:
    """So an app may map its column of e-mail addresses at any time."""
    with world.engine.connect() as conn:
        verify(conn, HostMapping(users=UsersTable(email=None)))
