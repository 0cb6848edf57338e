"""The app's own table; its users are Django's."""

from __future__ import annotations

from django.conf import settings
from django.db import models
from django.db.models.functions import Now


class Workshop(models.Model):
    """Ten steps, of which a credit opens the last four. The ledger's functions alone write ``credit_consumed_at``."""

    user = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE)
    title = models.CharField(max_length=500)
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        """The name that Tallystick's mapping has without being told."""

        db_table = "workshops"

    def __str__(self) -> str:
        return str(self.title)
