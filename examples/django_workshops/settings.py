"""Django's settings for one database, and the packs on sale there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import django
import sqlalchemy as sa
from django.conf import settings
from django.core.management import call_command

from tallystick import Config, HostMapping, UsersTable, WorkshopsTable, migrate, stripe
from tallystick.dev.stripe import DevStripe
from workshops.__main__ import PACKS

HERE = Path(__file__).parent
HOST = HostMapping(
    users=UsersTable(table="auth_user", key_type="integer", email="email"),
    workshops=WorkshopsTable(key_type="bigint"),
)


def prepare(database_url: str, origin: str, double: DevStripe) -> None:
    """Django set up, its tables made, Tallystick's beside them, and the packs on sale at the double."""
    config = Config(
        database_url=database_url,
        host=HOST,
        packs=PACKS,
        checkout_origins=(origin,),
        stripe_secret_key=double.secret_key,
        stripe_api_base=double.url,
    )
    made = stripe.setup(config, endpoint_url=f"{origin}/billing/webhooks/stripe")
    prices = {pack.pack: pack.price for pack in made.packs}
    packs = tuple(dataclasses.replace(pack, stripe_price_id=prices[pack.name]) for pack in PACKS)
    secret = made.endpoint.secret if made.endpoint else None
    _configure(config.model_copy(update={"packs": packs, "stripe_webhook_secret": secret}))
    call_command("migrate", verbosity=0)
    migrate.apply(database_url, config)


def _configure(config: Config) -> None:
    address = sa.make_url(str(config.database_url))
    query = dict(address.query)
    settings.configure(
        TALLYSTICK=config,
        SECRET_KEY="of an example",  # noqa: S106
        ALLOWED_HOSTS=["127.0.0.1", "testserver"],
        ROOT_URLCONF="django_workshops.urls",
        LOGIN_URL="sign-in",
        USE_TZ=True,
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        INSTALLED_APPS=[
            "django.contrib.admin",
            "django.contrib.auth",
            "django.contrib.contenttypes",
            "django.contrib.sessions",
            "django.contrib.messages",
            "django_workshops",
        ],
        MIDDLEWARE=[
            "django.middleware.security.SecurityMiddleware",
            "django.contrib.sessions.middleware.SessionMiddleware",
            "django.middleware.csrf.CsrfViewMiddleware",
            "django.contrib.auth.middleware.AuthenticationMiddleware",
            "django.contrib.messages.middleware.MessageMiddleware",
        ],
        TEMPLATES=[
            {
                "BACKEND": "django.template.backends.django.DjangoTemplates",
                "APP_DIRS": True,
                "OPTIONS": {
                    "context_processors": [
                        "django.template.context_processors.request",
                        "django.contrib.auth.context_processors.auth",
                        "django.contrib.messages.context_processors.messages",
                        "django_workshops.billing.in_templates",
                    ]
                },
            }
        ],
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": address.database,
                "USER": address.username or "",
                "PASSWORD": address.password or "",
                "HOST": query.get("host", address.host or ""),
                "PORT": query.get("port", address.port or ""),
                "ATOMIC_REQUESTS": True,
            }
        },
    )
    django.setup()
