"""Django's admin, in which a user's page shows the ledger."""

from __future__ import annotations

from django.contrib import admin
from django.contrib.auth import get_user_model
from django.contrib.auth.admin import UserAdmin

from django_workshops.billing import billing
from tallystick.web.django import LedgerAdmin

User = get_user_model()
admin.site.unregister(User)


@admin.register(User)
class WithLedger(LedgerAdmin, UserAdmin):
    """Django's own, and the ledger."""

    billing = billing
