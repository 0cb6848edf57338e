from django.conf import settings
from django.db import models
from django.db.models.functions import Now


class Workshop(models.Model):
    user = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE)
    title = models.TextField()
    created_at = models.DateTimeField(db_default=Now())
