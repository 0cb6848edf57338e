"""Configuration: the database, the host's tables, the packs on sale. Frozen, passed in, never global."""

from __future__ import annotations

import codecs
import datetime as dt
import difflib
import ipaddress
import json
import os
import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from tallystick.address import Address as ParsedAddress
from tallystick.address import without
from tallystick.errors import ConfigError, shown
from tallystick.files import replace_file

KeyType = Literal["uuid", "text", "char", "citext", "smallint", "integer", "bigint"]
"""The type of a key in PostgreSQL: a domain counts as its base type, varchar as text; char is ``char(n)``."""

Word = Literal["users", "workshops"]
"""Our name for a table of the host."""

INTEGER_KEYS: frozenset[KeyType] = frozenset({"smallint", "integer", "bigint"})
TEXT_KEYS: frozenset[KeyType] = frozenset({"text", "char", "citext"})
FILE_NAME = "tallystick.toml"
CREDITS_MAX = {"integer": 2**31 - 1, "bigint": 2**63 - 1}
"""The largest number of credits, by ``HostMapping.credits``."""

_STRICT = ConfigDict(extra="forbid")

# PostgreSQL truncates longer names silently (to NAMEDATALEN - 1 bytes), so that two names could become one.
_MAX_IDENTIFIER_BYTES = 63


def _identifier(value: object) -> object:
    if isinstance(value, str):
        if not value or "\0" in value:
            raise ValueError("a name in PostgreSQL has at least one character and no NUL")
        if len(value.encode("utf-8", "surrogatepass")) > _MAX_IDENTIFIER_BYTES:
            raise ValueError(f"a name in PostgreSQL has at most {_MAX_IDENTIFIER_BYTES} bytes")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError("a name in PostgreSQL is valid UTF-8; this one holds a lone surrogate")
    return value


Identifier = Annotated[str, BeforeValidator(_identifier)]


def _none_for_false(value: object) -> object:
    return None if value is False else value  # TOML has no null: `workshops = false` means that there is no such table


OptionalColumn = Annotated[Identifier | None, BeforeValidator(_none_for_false)]
Collation = Annotated[tuple[Identifier, Identifier] | None, BeforeValidator(_none_for_false)]


_PRISMAS = frozenset(
    ("connection_limit", "pgbouncer", "pool_timeout", "schema", "socket_timeout", "statement_cache_size")
)
"""Parameters of an address that Prisma reads, and libpq refuses."""


def _address(value: object) -> object:
    """A PostgreSQL address in any usual form, as one for SQLAlchemy with psycopg 3."""
    if isinstance(value, str):
        scheme, separator, rest = value.strip().partition("://")
        # The value may contain a password anywhere, so only its scheme is repeated.
        if scheme in ("postgres", "postgresql", "postgresql+psycopg") and separator:
            address = f"postgresql+psycopg://{rest}"
            if re.split("[/?]", rest, maxsplit=1)[0].count("@") > 1:
                raise ValueError("the address has more than one @; write one in the user or the password as %40")
            parsed = ParsedAddress.of(address)
            return without(_PRISMAS, address) if _PRISMAS.intersection(parsed.query) else address
        begins = f"begins with {scheme!r}" if separator else "has no scheme"
        raise ValueError(f"the address {begins}; expected one that begins with postgresql://")
    return value


Address = Annotated[str, BeforeValidator(_address)]


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class UsersTable:
    """The host's table of users.

    ``key`` names any column that is NOT NULL and UNIQUE, the primary key or an external identity such as
    ``clerk_user_id``. ``key_type`` is its type: a domain counts as its base type, varchar as text. For citext,
    ``key_type_schema`` is the extension's schema. ``key_collation`` (schema and name) is the collation of a text key,
    if it is not the database's. ``email``, if named, is shown to operators and never written. ``balance`` is the column
    of the user's credits: one that the app has already is adopted under its name. So are ``stripe_customer_id``,
    ``updated_at``, the time of the row's last change, and ``deleted_at``, null until the user is soft-deleted.
    """

    schema: Identifier = "public"
    table: Identifier = "users"
    key: Identifier = "id"
    key_type: KeyType = "uuid"
    key_type_schema: OptionalColumn = None
    key_collation: Collation = None
    email: OptionalColumn = None
    balance: Identifier = "credit_balance"
    stripe_customer_id: Identifier = "stripe_customer_id"
    updated_at: Identifier = "updated_at"
    deleted_at: Identifier = "deleted_at"

    @property
    def adoptable(self) -> Mapping[str, str]:
        """Tallystick's columns that may have another name in this table, each with that name."""
        return {
            "credit_balance": self.balance,
            "stripe_customer_id": self.stripe_customer_id,
            "updated_at": self.updated_at,
            "deleted_at": self.deleted_at,
        }

    @model_validator(mode="after")
    def _require_distinct_columns(self) -> Self:
        _refuse_shared(self, ("key", "email", "balance", "stripe_customer_id", "updated_at", "deleted_at"))
        return self


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class WorkshopsTable:
    """The host's table of the thing that one credit unlocks.

    ``owner`` names the column that holds the owner's user key (as in ``UsersTable.key``). ``title`` is quoted in
    descriptions; ``created_at`` decides if a workshop is older than the paywall. Either may be None (false in TOML).
    ``deleted_at`` is null until the workshop is soft-deleted; an existing column is adopted under its name.
    """

    schema: Identifier = "public"
    table: Identifier = "workshops"
    key: Identifier = "id"
    key_type: KeyType = "uuid"
    key_type_schema: OptionalColumn = None
    key_collation: Collation = None
    owner: Identifier = "user_id"
    title: OptionalColumn = "title"
    created_at: OptionalColumn = "created_at"
    deleted_at: Identifier = "deleted_at"

    @property
    def adoptable(self) -> Mapping[str, str]:
        """As ``UsersTable.adoptable``."""
        return {"deleted_at": self.deleted_at}

    @model_validator(mode="after")
    def _require_distinct_columns(self) -> Self:
        _refuse_shared(self, ("key", "owner", "title", "created_at", "deleted_at"))
        return self


_ADDED_TO_USERS = ("credit_sequence", "onboarding_complete", "plan_tier", "credit_held", "credit_due_at")
_ADDED_TO_WORKSHOPS = ("credit_consumed_at",)
"""Tallystick's columns that have one name in every app."""


def _refuse_shared(table: UsersTable | WorkshopsTable, settings: tuple[str, ...]) -> None:
    """Refuse two settings that name one column that the ledger writes: it would change the meaning of both."""
    added = _ADDED_TO_USERS if isinstance(table, UsersTable) else _ADDED_TO_WORKSHOPS
    written = {*table.adoptable.values(), *added}
    named: dict[str, str] = {}
    for setting in settings:
        column = getattr(table, setting)
        if column in added:
            raise ValueError(
                f"{setting} names the column {column!r}, in which the ledger keeps something else. "
                "Name another, or rename the app's column"
            )
        if column in named and column in written:
            raise ValueError(f"{named[column]} and {setting} both name the column {column!r}. Name one for each")
        named[column] = setting


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class HostMapping:
    """The host app's tables and columns that Tallystick needs.

    The ledger is put into the schema of the users, or into ``ledger_schema``: ``"tallystick"``, for an app that has a
    table ``credit_transactions`` of its own. ``credits`` is the type of a number of credits: ``bigint`` for a host that
    counts in parts of a credit, such as micro-credits. Both are chosen before the first migration.
    """

    users: UsersTable = Field(default_factory=UsersTable)
    workshops: Annotated[WorkshopsTable | None, BeforeValidator(_none_for_false)] = Field(
        default_factory=WorkshopsTable
    )
    credits: Literal["integer", "bigint"] = "integer"
    ledger_schema: Literal["tallystick"] | None = None

    @model_validator(mode="after")
    def _two_tables(self) -> Self:
        users, workshops = self.users, self.workshops
        if workshops is not None and (workshops.schema, workshops.table) == (users.schema, users.table):
            raise ValueError(
                f"users and workshops both name the table {users.schema}.{users.table}. Name one for each, or set "
                "workshops = false"
            )
        return self

    @property
    def by_word(self) -> dict[Word, UsersTable | WorkshopsTable]:
        """The mapped tables, by our names for them."""
        found: dict[Word, UsersTable | WorkshopsTable] = {"users": self.users}
        return found if self.workshops is None else found | {"workshops": self.workshops}

    @property
    def schema_of_ledger(self) -> str:
        """The ledger's schema."""
        return self.ledger_schema or self.users.schema

    def to_json(self) -> str:
        """The mapping as it is stored in the database."""
        return _MAPPING.dump_json(self).decode()

    @staticmethod
    def from_json(text: str) -> HostMapping:
        """The mapping that ``to_json`` wrote, without settings that a later version of this package added."""
        found = _known(json.loads(text), HostMapping)
        for name, kind in (("users", UsersTable), ("workshops", WorkshopsTable)):
            found[name] = found.get(name) and _known(found[name], kind)
        return _MAPPING.validate_python(found)


def _known(values: dict[str, Any], kind: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in kind.__dataclass_fields__}


_MAPPING = TypeAdapter(HostMapping)


# By Stripe: https://docs.stripe.com/currencies#minor-units. All others have two decimals.
_ZERO_DECIMAL = frozenset(
    ["bif", "clp", "djf", "gnf", "jpy", "kmf", "krw", "mga", "pyg", "rwf", "vnd", "vuv", "xaf", "xof", "xpf"]
)
_THREE_DECIMAL = frozenset(["bhd", "jod", "kwd", "omr", "tnd"])


def decimals_of(currency: str) -> int:
    """The decimals of a currency: 2 for ``usd``, whose minor unit is a cent; 0 for ``jpy``; 3 for ``kwd``."""
    return 0 if currency in _ZERO_DECIMAL else 3 if currency in _THREE_DECIMAL else 2


Rounding = Literal["down", "nearest", "up"]
"""Rounding of a fraction of a credit: down, to the nearest whole number (halves up), or up."""


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class Pack:
    """Something on sale: ``credits`` for ``amount`` minor units of ``currency`` (7900 and "usd" are $79.00).

    ``refund_rounding`` is the pack's own; None stands for the setting of this name. Its credits expire
    ``expires_after_days`` after the payment; None stands for never.
    """

    name: Annotated[str, Field(min_length=1, max_length=200)]
    credits: Annotated[int, Field(strict=True, ge=1, le=CREDITS_MAX["bigint"])]
    amount: Annotated[int, Field(strict=True, ge=0)] | None = None
    currency: Annotated[str, Field(pattern="^[a-z]{3}$")] = "usd"
    stripe_price_id: str | None = None
    refund_rounding: Rounding | None = None
    expires_after_days: Annotated[int, Field(strict=True, ge=1, le=36_500)] | None = None

    @property
    def expires_after(self) -> dt.timedelta | None:
        """``expires_after_days`` as a timedelta."""
        return None if self.expires_after_days is None else dt.timedelta(days=self.expires_after_days)


Every = Literal["week", "month"]


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class Allowance:
    """Credits that the users of a plan get every week or month, and lose at its end.

    Up to ``rollover`` of the credits that are left are carried over into the next period. With ``stripe_price_id``, the
    price of a subscription, each paid invoice for it gives the credits, for the period that it bills, not ``every``.
    """

    plan_tier: Annotated[str, Field(min_length=1, max_length=32)]
    credits: Annotated[int, Field(strict=True, ge=1, le=CREDITS_MAX["bigint"])]
    every: Every = "month"
    rollover: Annotated[int, Field(strict=True, ge=0, le=CREDITS_MAX["bigint"])] = 0
    stripe_price_id: Annotated[str, Field(min_length=1, max_length=255)] | None = None


def _plans_once(allowances: tuple[Allowance, ...]) -> tuple[Allowance, ...]:
    for what, setting in (("price", "stripe_price_id"), ("plan", "plan_tier")):
        for value, times in Counter(getattr(each, setting) for each in allowances).items():
            if value is not None and times > 1:
                raise ValueError(f"the {what} {value!r} has two allowances. Leave one")
    return allowances


QUANTITY_MAX = 999
"""The largest number of packs in one purchase."""

_NOT_FOR_CREDITS = {
    "mode": "credits are sold by one-time payments",
    "line_items": "a session sells one pack, so that its money stands for its credits",
    "optional_items": "a session sells one pack, so that its money stands for its credits",
    "discounts": "less would be paid than is on record; let the buyer enter a code with promotion_codes",
    "after_expiration": "a recovered session would pay for a purchase that has failed",
    "customer": "it is the user's, made and kept by checkout",
    "metadata": "it proves which purchase is paid",
    "client_reference_id": "it is the purchase's id",
    "shipping_address_collection": "credits are not shipped",
    "shipping_options": "credits are not shipped",
    "subscription_data": "credits are sold by one-time payments",
    "setup_intent_data": "credits are sold by one-time payments",
    "payment_intent_data": "the payment is captured at once and carries the purchase's metadata",
    "success_url": "pass it to checkout",
    "cancel_url": "pass it to checkout",
}


def _for_credits(value: object) -> object:
    for name in value if isinstance(value, dict) else ():
        if name in _NOT_FOR_CREDITS:
            raise ValueError(f"{name} makes no sense for credits: {_NOT_FOR_CREDITS[name]}")
    return value


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class CheckoutOptions:
    """Options of a Stripe Checkout Session that make sense for credits.

    ``promotion_codes`` lets the buyer enter one: the buyer pays less for the same credits. ``automatic_tax`` lets
    Stripe Tax compute the tax and add it, unless the price includes it. ``invoice`` makes an invoice of the payment,
    and ``tax_ids`` lets a business enter its tax id for it. ``quantity_max`` lets the buyer change the number of packs
    on Stripe's page, from 1 to this, and grants the credits of the paid number. ``save_payment_method`` saves the
    buyer's payment method for automatic top-ups. ``locale`` is the page's language, as in "de". ``submit_text`` is
    shown beside the button.
    """

    promotion_codes: bool = False
    automatic_tax: bool = False
    invoice: bool = False
    tax_ids: bool = False
    save_payment_method: bool = False
    quantity_max: Annotated[int, Field(strict=True, ge=1, le=QUANTITY_MAX)] | None = None
    locale: Annotated[str, Field(pattern="^(auto|[a-z]{2,3}(-[A-Z]{2}|-419)?)$")] | None = None
    submit_text: Annotated[str, Field(min_length=1, max_length=1200, pattern="^[^\\x00]*$")] | None = None


def _names_once(packs: tuple[Pack, ...]) -> tuple[Pack, ...]:
    for number, pack in enumerate(packs):
        for other in packs[:number]:
            if other.name == pack.name:
                raise ValueError(
                    f"two packs are called {pack.name!r}, one in {other.currency} and one in {pack.currency}. A sale "
                    "names its pack: give each a name of its own"
                )
    return packs


def _console_address(value: str) -> str:
    parts = urlsplit(value)
    here = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if not parts.netloc or parts.path.strip("/") or not (parts.scheme == "https" or (here and parts.scheme == "http")):
        raise ValueError(
            "write scheme and host only, as in https://console.example.com; http is for this machine alone"
        )
    origin = _origin(f"{parts.scheme}://{parts.netloc}")
    is_usual = parts.port == {"https": 443, "http": 80}[parts.scheme]  # raises ValueError for a port that is none
    return origin.rpartition(":")[0] if is_usual else origin  # a browser's Host header has no usual port


def _password_hash(value: str) -> str:
    if not re.fullmatch(r"scrypt:[A-Za-z0-9_=-]+:[A-Za-z0-9_=-]+", value):
        raise ValueError("this is no password hash. Make one with: tallystick serve --hash-password")
    return value


OperatorName = Annotated[str, Field(min_length=1, max_length=100)]
PasswordHash = Annotated[str, AfterValidator(_password_hash)]


def _network(value: str) -> str:
    try:
        return str(ipaddress.ip_network(value, strict=False))
    except ValueError:
        raise ValueError(f"{value!r} is no IP address or network, as in 10.0.0.5 or 10.0.0.0/24") from None


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class ConsoleAccess:
    """Access to the operator's console (``tallystick serve``) from elsewhere than this machine.

    ``address`` is the console's address in the operators' browsers. Either ``operators`` names them, each with a hash
    made by ``tallystick serve --hash-password``; or ``proxy_peers`` are the addresses of a reverse proxy that
    authenticates them and passes the name in ``proxy_header``.
    """

    address: Annotated[str, AfterValidator(_console_address)] | None = None
    # a dict has no hash, and settings are hashed
    operators: dict[OperatorName, PasswordHash] = field(default_factory=dict, repr=False, hash=False)
    proxy_peers: tuple[Annotated[str, AfterValidator(_network)], ...] = ()
    proxy_header: Annotated[str, Field(pattern="^[A-Za-z0-9-]+$")] = "X-Forwarded-User"

    def __post_init__(self) -> None:
        if self.operators and self.proxy_peers:
            raise ValueError("operators and proxy_peers are two ways in; choose one")


def _aware(value: dt.datetime) -> dt.datetime:
    if value.tzinfo is None:
        raise ValueError("add a time zone, as in 2026-01-31T00:00:00Z")
    return value


# Settings that other tools also read from variables of these names.
_BESIDE = ("database_url_unpooled", "database_url_replica")
"""Further addresses of the same database."""

_USUAL_VARIABLES = (
    "database_url",
    *_BESIDE,
    "stripe_secret_key",
    "stripe_webhook_secret",
    "stripe_api_base",
)


def _origin(value: str) -> str:
    if re.fullmatch(r"https?://[A-Za-z0-9.\-]+(:\d+)?", value) or re.fullmatch(
        r"https?://\[[0-9a-fA-F:]+\](:\d+)?", value
    ):
        return value.lower()
    raise ValueError("write an origin as https://app.example.com, without a path")


Origin = Annotated[str, AfterValidator(_origin)]


class Config(BaseModel):
    """All settings. Construct it, or read it with ``load``.

    ``database_url`` is the app's database; ``database_url_unpooled``, if the first is a pooler's, is the direct
    address that migrations need; ``database_url_replica`` is a hot standby's, for the console and the commands that
    only read. With ``paywall`` off every workshop is open. Workshops created before
    ``grandfathered_before`` are open; None stands for the moment at which revision 0001 was applied.

    ``refund_rounding`` rounds the credits that a partial refund takes.

    ``checkout_origins`` are the origins (``https://app.example.com``) to which a buyer may be sent back from Stripe.
    ``checkout_options`` apply to every session; a call may pass its own.
    ``stripe_webhook_secret`` may hold several secrets separated by commas, while one is being replaced.
    ``stripe_api_base`` points to another address than Stripe's, such as the test double's. ``stripe_realm`` names this
    installation at Stripe; None stands for a name of the database's own, which a copy of it shares.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    database_url: Address | None = Field(default=None, repr=False)
    database_url_unpooled: Address | None = Field(default=None, repr=False)
    database_url_replica: Address | None = Field(default=None, repr=False)
    host: HostMapping = Field(default_factory=HostMapping)
    packs: Annotated[tuple[Pack, ...], AfterValidator(_names_once)] = ()
    allowances: Annotated[tuple[Allowance, ...], AfterValidator(_plans_once)] = ()
    refund_rounding: Rounding = "down"
    paywall: bool = True
    grandfathered_before: Annotated[dt.datetime, AfterValidator(_aware)] | None = None
    checkout_origins: tuple[Origin, ...] = ()
    checkout_options: Annotated[CheckoutOptions, BeforeValidator(_for_credits)] = Field(default_factory=CheckoutOptions)
    stripe_secret_key: str | None = Field(default=None, repr=False)
    stripe_webhook_secret: str | None = Field(default=None, repr=False)
    stripe_api_base: str | None = None
    stripe_realm: Annotated[str, Field(pattern="^[A-Za-z0-9._-]{1,64}$")] | None = None
    console: ConsoleAccess = Field(default_factory=ConsoleAccess)

    @model_validator(mode="after")
    def _packs_fit(self) -> Self:
        most = CREDITS_MAX[self.host.credits]
        giving = [("packs", pack.name, pack.credits) for pack in self.packs]
        giving += [("allowances", each.plan_tier, each.credits + each.rollover) for each in self.allowances]
        for setting, name, credits in giving:
            if credits > most:
                raise ValueError(
                    f"{setting}: {name} has {credits} credits; where host.credits is {self.host.credits!r}, "
                    f"a number of credits is at most {most}"
                )
        return self

    def at(self, database_url: str) -> Self:
        """The same settings for another database, by its direct address. Raises ConfigError."""
        try:
            given = {name: getattr(self, name) for name in self.model_fields_set}
            others = dict.fromkeys(_BESIDE)
            return self.model_validate(given | others | {"database_url": database_url})
        except ValidationError as error:
            raise _explain(error, None, {"database_url": "--database-url"}) from None

    @classmethod
    def load(cls, path: Path | str | None = None, *, environ: Mapping[str, str] | None = None) -> Self:
        """Read the settings of the app in the working directory.

        One file is read, the first of these: ``path``, ``tallystick.toml``, ``[tool.tallystick]`` in ``pyproject.toml``
        (here or in a folder above). Environment variables (``TALLYSTICK_PAYWALL``, …) override single settings.
        ``DATABASE_URL``, ``DATABASE_URL_UNPOOLED``, ``DATABASE_URL_REPLICA``, ``STRIPE_SECRET_KEY``,
        ``STRIPE_WEBHOOK_SECRET`` and ``STRIPE_API_BASE`` fill in what is set nowhere else. The unpooled address and
        the replica's are taken from where the first one comes from: a file's own, that of
        ``TALLYSTICK_DATABASE_URL``, or that of ``DATABASE_URL``.

        Raises:
            ConfigError: names the file, the line and the key.
        """
        values, origins, source = _gathered(path, environ)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _explain(error, source, origins) from None


def origins(path: Path | str | None = None) -> dict[str, str]:
    """The source of each setting that ``Config.load`` finds set: a variable or a file. Raises ConfigError."""
    values, variables, source = _gathered(path, None)
    file = "" if source is None else os.path.relpath(source.path)
    return {name: variables.get(name, file) for name, value in values.items() if value is not None}


def _gathered(
    path: Path | str | None, environ: Mapping[str, str] | None
) -> tuple[dict[str, Any], dict[str, str], _Source | None]:
    """All settings that are set, the variables that set some of them, and the file that sets the others."""
    environ = os.environ if environ is None else environ
    _refuse_unknown(environ)
    source = _find(Path(path) if path is not None else None)
    values: dict[str, Any] = (source.values or {}) if source else {}
    variables = {}
    for name in Config.model_fields:
        variable = f"TALLYSTICK_{name.upper()}"
        if environ.get(variable):  # an empty one, as of a compose file, is not set
            values = {**values, name: _from_environment(environ[variable], text=name in _TEXTS)}
            variables[name] = variable
    for name in _USUAL_VARIABLES:
        if values.get(name) is None and environ.get(name.upper()):
            values = {**values, name: environ[name.upper()]}
            variables[name] = name.upper()
    if values.get("database_url") is not None:
        # an address from another source may be another database's, which would then be migrated
        for name in _BESIDE:
            other: Any = (source.values or {}).get(name) if source else None
            if first := variables.get("database_url"):
                variables[name] = first + name.removeprefix("database_url").upper()
                other = environ.get(variables[name]) and _from_environment(environ[variables[name]], text=True)
            values = {**values, name: other}
    return values, variables, source


_TEXTS = (*_USUAL_VARIABLES, "refund_rounding", "stripe_realm")
"""Settings whose value is a text."""

_OTHER_VARIABLES = ("TALLYSTICK_ENV", "TALLYSTICK_HOME", "TALLYSTICK_PG_BIN")
"""Read elsewhere: by the seed, and by the embedded server."""


def _refuse_unknown(environ: Mapping[str, str]) -> None:
    """Refuse a TALLYSTICK_* variable that nothing reads: its name is mistyped."""
    known = [*(f"TALLYSTICK_{name.upper()}" for name in Config.model_fields), *_OTHER_VARIABLES]
    for name in environ:
        if name.startswith("TALLYSTICK_") and name not in known and not name.startswith("TALLYSTICK_TEST_"):
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"{name}: no such setting{f'; did you mean {near[0]}?' if near else '. Unset it'}",
                key=name,
            )


def _from_environment(value: str, *, text: bool) -> Any:
    """A variable's value: as a TOML value where it parses as one (true, 3, a date, an inline table), else the text.

    For a setting that is a ``text`` only a TOML string is parsed: 2026 is a name of a realm, and no number.
    """
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value
    return value if text and not isinstance(parsed, str) else parsed


class _Source:
    """One TOML file: its values, and the line of each key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table = _table_in(path)
        try:
            self.text = path.read_text(encoding="utf-8-sig")  # programs of Windows write a byte order mark
            self.values: Any = tomllib.loads(self.text)
        except OSError as error:
            remedy = "Check this path, and who may read it"
            if isinstance(error, FileNotFoundError):
                remedy = f"Write one with: tallystick init --output {shlex.quote(str(path))}"
            raise ConfigError(
                f"{path}: {error.strerror}. {remedy}",
                path=str(path),
            ) from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: not UTF-8. Save it as UTF-8", path=str(path)) from None
        except tomllib.TOMLDecodeError as error:
            line = int(found[1]) if (found := re.search(r"at line (\d+)", str(error))) else None
            raise ConfigError(f"{path}: not valid TOML: {error}", path=str(path), line=line) from None
        for name in self.table:
            self.values = self.values.get(name) if isinstance(self.values, dict) else None
        if self.values is not None and not isinstance(self.values, dict):
            raise ConfigError(
                f"{path}: [{'.'.join(self.table)}] is not a table", path=str(path), key=".".join(self.table)
            )

    def line_of(self, location: tuple[str | int, ...]) -> int | None:
        """The line (from 1) of a key, or of the innermost table around it that has one."""
        wanted = [*self.table, *(str(part) for part in location)]
        here: list[str] = []
        seen: dict[str, int] = {}
        best: tuple[int, int] | None = None
        for number, line in enumerate(self.text.splitlines(), 1):
            if header := re.match(r"\s*\[\[\s*([^\]]+?)\s*\]\]", line):
                index = seen[header[1]] = seen.get(header[1], -1) + 1
                here = [*_parts(header[1]), str(index)]
                found = here
            elif header := re.match(r"\s*\[\s*([^\]]+?)\s*\]", line):
                here = found = _parts(header[1])
            elif key := re.match(r"\s*([\w\-.\"']+)\s*=", line):
                found = [*here, *_parts(key[1])]
            else:
                continue
            if found == wanted[: len(found)] and (best is None or len(found) > best[0]):
                best = len(found), number
        return best[1] if best else None


def _parts(dotted: str) -> list[str]:
    return [part.strip().strip("\"'") for part in dotted.split(".")]


def _table_in(path: Path) -> tuple[str, ...]:
    """The table that has the settings in the file at ``path``."""
    return ("tool", "tallystick") if path.name == "pyproject.toml" else ()


def _find(path: Path | None) -> _Source | None:
    if path is not None:
        return _Source(path)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if _is_there(file := folder / FILE_NAME):
            return _Source(file)
        if _is_there(file := folder / "pyproject.toml") and (source := _Source(file)).values is not None:
            return source
    return None


def _is_there(path: Path) -> bool:
    """True also for a link to nothing and a folder, as a failed mount leaves it: they are errors, and no defaults."""
    return path.is_symlink() or path.exists()


def _explain(error: ValidationError, source: _Source | None, origins: Mapping[str, str]) -> ConfigError:
    """The first fault as one sentence with file, line and key, and the nearest name for a misspelt one."""
    fault = error.errors(include_url=False)[0]
    # pydantic adds names to a location, such as a union's branch, that are not in the file
    location = tuple(part for part in fault["loc"] if not str(part).startswith(("function-", "constrained-")))
    key = ".".join(str(part) for part in location)
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        message = "no such setting"
        name = str(location[-1])
        near = difflib.get_close_matches(name, _settings(location[:-1]), n=1)
        if near:
            message += f"; did you mean {near[0]}?"
        elif len(location) > 1 and name in Config.model_fields:  # it was written below the last table
            above = (
                f"directly below [{'.'.join(source.table)}]" if source and source.table else "above the first [table]"
            )
            message += f" in this table. Move {name} {above}"
    elif fault["type"] in ("bool_parsing", "bool_type"):
        message = f"{shown(fault['input'])} is neither true nor false"
    variable = origins.get(str(location[0])) if location else None
    if variable or source is None:
        where, line = variable or "settings", None
        path = None
    else:
        path, line = str(source.path), source.line_of(location)
        where = f"{path}, line {line}" if line else path
    told = where if variable and len(location) == 1 else f"{where}: {key}"  # the variable names the setting
    return ConfigError(f"{told}: {message}", path=path, line=line, key=key)


def _settings(location: tuple[str | int, ...]) -> list[str]:
    """The settings of the table at a location, which in a list of tables has a number."""
    kinds: dict[tuple[str | int, ...], Any] = {
        ("host",): HostMapping,
        ("console",): ConsoleAccess,
        ("checkout_options",): CheckoutOptions,
        ("packs",): Pack,
        ("allowances",): Allowance,
        ("host", "users"): UsersTable,
        ("host", "workshops"): WorkshopsTable,
    }
    kind = kinds.get(tuple(part for part in location if isinstance(part, str)))
    return list(kind.__dataclass_fields__ if kind else () if location else Config.model_fields)


def to_toml(host: HostMapping) -> str:
    """A settings file for ``host``, as ``tallystick init`` writes it, with the packs as an example to fill in."""
    return "\n".join([_BEGINNING, *_host_tables(host), "", _PACKS_EXAMPLE])


def _host_tables(host: HostMapping, above: tuple[str, ...] = ()) -> list[str]:
    """The lines of ``[host]`` and the tables below it, in a file that has the settings in the table ``above``."""
    of_all = ["workshops = false"] if host.workshops is None else []
    if host.credits != "integer":
        of_all.append(f"credits = {_toml(host.credits)}")
    if host.ledger_schema is not None:
        of_all.append(f"ledger_schema = {_toml(host.ledger_schema)}")
    lines = ["", f"[{'.'.join((*above, 'host'))}]", *of_all] if of_all else []
    for word, table in host.by_word.items():
        values = {field: getattr(table, field) for field in type(table).__dataclass_fields__}
        values = {k: v for k, v in values.items() if v is not None or k not in _USUALLY_ABSENT}
        values = {k: v for k, v in values.items() if v != _USUAL.get(k, ...)}
        lines += ["", f"[{'.'.join((*above, 'host', word))}]"]
        lines += [f"{k} = {_toml(v)}" for k, v in values.items() if v is not None]
        absent = [k for k, v in values.items() if v is None]
        lines += [f"{k} = false{_UNDATED if k == 'created_at' else ''}" for k in absent]
    return lines[1:]


def settings_file(path: Path | None = None) -> Path:
    """The file that ``Config.load(path)`` reads, or ``tallystick.toml`` in the working directory if it finds none."""
    source = _find(path)
    return Path(FILE_NAME) if source is None else Path(os.path.relpath(source.path))


def has_host(path: Path) -> bool:
    """True if there is a settings file at ``path`` that sets ``host``. Raises ConfigError."""
    return path.is_file() and "host" in (_Source(path).values or {})


def write_host(path: Path, host: HostMapping) -> None:
    """Write ``host`` to the settings file at ``path``, which is made if there is none.

    In an existing file the tables ``[host]``, ``[host.users]`` and ``[host.workshops]`` are replaced, and everything
    else stays as it is, byte by byte.

    Raises:
        ConfigError: the file cannot be read, or sets host other than by tables.
    """
    if not path.is_file():
        table = _table_in(path)
        replace_file(path, ("\n".join([*_host_tables(host, table), ""]) if table else to_toml(host)).encode())
        return
    source = _Source(path)
    before = (source.values or {}).get("host")
    if before is not None and _mapping_or_none(before) == host:
        return
    written = path.read_bytes()
    mark = codecs.BOM_UTF8 if written.startswith(codecs.BOM_UTF8) else b""
    text = written.removeprefix(mark).decode()
    wanted = _with_host(text, host, source.table)
    if wanted is None:
        line = source.line_of(("host",))
        raise ConfigError(
            f"{path}{f', line {line}' if line else ''}: host is written by tables ([host.users] and others), which "
            "this file does not allow, since it has a key for host or for all settings. Take the key out, or write it "
            "as a table, then run: tallystick init --force",
            path=str(path),
            line=line,
            key="host",
        )
    replace_file(path, mark + wanted.encode())


def _with_host(text: str, host: HostMapping, above: tuple[str, ...]) -> str | None:
    """``text`` with other tables of the host, or None if these alone cannot be replaced."""
    end = "\r\n" if "\r\n" in text else "\n"
    ours = (*above, "host")
    new = [f"{line}{end}" for line in _host_tables(host, above)]
    parts: list[str] = []
    sections = list(_sections(text))
    for number, (path, lines) in enumerate(sections):
        if path[: len(ours)] != ours:
            parts += lines
            continue
        if new:
            parts, new = [*parts, *new], []
        # a comment after the last key is about what follows
        kept = len(lines)
        while kept > 1 and lines[kept - 1].lstrip()[:1] in ("", "#"):
            kept -= 1
        left = lines[kept:]
        follows = sections[number + 1][0] if number + 1 < len(sections) else ()
        if follows[: len(ours)] != ours or any(line.strip() for line in left):
            parts += left
    if new:
        if parts and not parts[-1].endswith("\n"):
            parts.append(end)
        parts += [end, *new] if parts else new
    written = "".join(parts)
    try:
        found, before = (_lifted(tomllib.loads(each), ours) for each in (written, text))
    except tomllib.TOMLDecodeError:
        return None
    return written if _mapping_or_none(found[0]) == host and found[1] == before[1] else None


def _sections(text: str) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """The lines of a TOML file by table, each with the table's name; those before the first header have none."""
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    name: tuple[str, ...] = ()
    start = 0
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("["):
            continue
        try:
            header = tomllib.loads(line)
            tomllib.loads("".join(lines[:number]))  # in the middle of a value this fails
        except tomllib.TOMLDecodeError:
            continue
        yield name, lines[start:number]
        name, start = (), number
        while isinstance(header, dict) and header:
            ((part, header),) = header.items()
            name += (part,)
    yield name, lines[start:]


def _lifted(values: dict[str, Any], path: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """The value at ``path``, None if there is none, and all other values; tables without a value are left out."""
    first, *rest = path
    others = {name: value for name, value in values.items() if name != first}
    inner = values.get(first)
    if not rest or not isinstance(inner, dict):
        return inner, others
    found, left = _lifted(inner, tuple(rest))
    return found, others | ({first: left} if left else {})


def _mapping_or_none(values: object) -> HostMapping | None:
    try:
        return _MAPPING.validate_python(values)
    except ValidationError:
        return None


_USUALLY_ABSENT = ("key_type_schema", "key_collation")
_USUAL = {"balance": "credit_balance"} | {name: name for name in ("stripe_customer_id", "updated_at", "deleted_at")}

_UNDATED = "  # none tells when it was made: with the paywall on, no old one is open without a credit"

_BEGINNING = """\
# Settings of Tallystick. The database address comes from DATABASE_URL unless it is set here.
# Settings outside any table, such as checkout_origins = ["https://app.example.com"], are written here, above the first.
"""

_PACKS_EXAMPLE = """\
# The packs on sale. amount is in minor units: 7900 is $79.00.
#
# [[packs]]
# name = "Single Flight"
# credits = 1
# amount = 7900
# currency = "usd"
# stripe_price_id = "price_…"
"""


def _toml(text: str | tuple[str, ...]) -> str:
    """A TOML basic string, or an array of them."""
    if isinstance(text, tuple):
        return f"[{', '.join(map(_toml, text))}]"
    escaped = "".join(f"\\u{ord(c):04x}" if c < " " or c in '"\\\x7f' else c for c in text)
    return f'"{escaped}"'
