"""An address becomes the same arguments of libpq as SQLAlchemy makes of it."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from tallystick.address import Address, without


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "/app",
        "host",
        "host:5432/app",
        "Host.Example:6543",
        "user@host/app",
        "user:pass@host:5432/app",
        "us%40er:p%2Fa%23s%25s@host/my%20app",
        "user:a#b?c@host/app",
        "user:@host/app",
        "user:p:q@host/app",
        "[::1]:5432/app",
        "user@[2001:db8::1]/app",
        "one,two/app",
        "user@/app?host=/var/run/postgresql&port=5433",
        "postgres@/app?host=%2Ftmp%2Frun&port=5432",
        "user@/app?host=one:5432&host=two:5433",
        "user@/app?host=one&host=two",
        "user@/app?host=one:5432",
        "user@/app?host=one,two&port=5432,5433",
        "user@host/app?sslmode=require&application_name=my+app&options=-c%20geqo%3Doff",
        "user@host/app?sslmode=&connect_timeout=3",
        "host?target_session_attrs=read-write",
    ],
)
def test_the_arguments_are_those_of_sqlalchemy(rest: str):
    address = f"postgresql+psycopg://{rest}"
    engine = sa.create_engine(address)
    (_, theirs) = engine.dialect.create_connect_args(engine.url)
    assert Address.of(address).arguments == {name: str(value) for name, value in theirs.items() if name != "context"}


FAULTY = {
    "postgresql://host:one/app": "the port is not a number",
    "postgresql://host:/app": "the port is not a number",
    "postgresql://one:1,two:2/app": "several hosts are written as",
    "postgresql:///app?host=one&host=two&port=1&port=2": "several hosts are written as",
    "postgresql:///app?host=one:1&host=two:2&port=3": "several hosts are written as",
    "postgresql:///app?host=one:1&port=3": "several hosts are written as",
    "postgresql:///app?host=[::1]:1&host=[::1]:2": "has no brackets",
    "postgresql://host/app?options=-c%20a&options=-c%20b": "the parameter options is given twice",
    "postgresql://host/app?prepare_threshold=5": "prepare_threshold is no parameter",
    "postgresql://user:SEC%00RET@host/app": "NUL",
    "no address": "expected an address",
}


@pytest.mark.parametrize("address", FAULTY)
def test_a_faulty_address_is_refused(address: str):
    with pytest.raises(ValueError, match=FAULTY[address]) as refused:
        Address.of(address)
    assert "SEC" not in str(refused.value)


def test_a_parameter_is_left_out_and_the_rest_stays_as_it_was():
    address = "postgresql://user:a?b%2Fc@host/app?pgbouncer=true&options=-c%20a&schema=public"
    assert without({"pgbouncer", "schema"}, address) == "postgresql://user:a?b%2Fc@host/app?options=-c%20a"
    assert without({"pgbouncer"}, "postgresql://host/app?pgbouncer=true") == "postgresql://host/app"
    assert without({"pgbouncer"}, "postgresql://host/app") == "postgresql://host/app"
