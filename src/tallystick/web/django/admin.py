"""A user's ledger in Django's admin, read-only."""

from __future__ import annotations

from typing import Any, ClassVar

from django.contrib.admin import ModelAdmin
from django.db.models import Model, QuerySet
from django.http import HttpRequest
from django.utils.html import format_html, format_html_join

from tallystick.declared_tables import Schema
from tallystick.errors import UnknownUser
from tallystick.web.django.django_billing import DjangoBilling, refuse_base_before_mixin
from tallystick.web.shared import numbers

ROWS = 50
FIELD = "credit_ledger"


class LedgerAdmin:
    """A mixin for the ``ModelAdmin`` of the app's users, with their newest ledger rows, read-only.

    ``billing`` is the app's, as a class attribute. Columns of ours that the model has are read-only. A user with
    rows in the ledger cannot be deleted: the database would refuse it.

    Django saves every column that it has loaded, and a user's credits may have changed meanwhile. So this admin saves
    an object without the columns that the ledger's functions write.
    """

    billing: ClassVar[DjangoBilling]

    def __init_subclass__(cls, **given: Any) -> None:
        """Raise TypeError if the ``ModelAdmin`` comes first: none of these methods would be called."""
        super().__init_subclass__(**given)
        refuse_base_before_mixin(LedgerAdmin, ModelAdmin, cls)

    def credit_ledger(self, user: Any) -> Any:
        """The balance and the newest rows, as a table."""
        ledger, conn, key = self.billing.ledger, self.billing.connection, self.user_key(user)
        try:
            now = ledger.standing(conn, key)
        except UnknownUser:  # the mapped table may be another than that of the signed-in users
            return "No account: this user has no row in the mapped table."
        rows = ledger.history(conn, key, limit=ROWS, include_failed=True)
        texts = self.billing.renderer.texts
        columns = ("#", "When (UTC)", "Type", "Status", "Amount", "Balance after", "Description")
        head = format_html_join("", '<th scope="col">{}</th>', ((column,) for column in columns))
        body = format_html_join(
            "",
            "<tr>" + "<td>{}</td>" * len(columns) + "</tr>",
            (
                (
                    "" if row.sequence is None else row.sequence,
                    f"{row.completed_at or row.created_at:%Y-%m-%d %H:%M:%S}",
                    row.type,
                    row.status,
                    numbers.change(row.amount),
                    "" if row.balance_after is None else numbers.number(row.balance_after),
                    row.description,
                )
                for row in rows
            ),
        )
        summary = f"{texts.history_balance(now.balance)} {texts.history_held(now) or ''}".strip()
        if len(rows) == ROWS:
            summary += f" The newest {ROWS} entries; all are in the console."
        return format_html("<p>{}</p><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>", summary, head, body)

    credit_ledger.short_description = "Ledger"  # type: ignore[attr-defined]  # Django's own way

    def user_key(self, user: Any) -> Any:
        """The user's key in the ledger, as ``DjangoBilling.key_of``."""
        return self.billing.key_of(user)

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> tuple[Any, ...]:
        """The app's read-only fields, the ledger, and the columns that only its functions write."""
        theirs = super().get_readonly_fields(request, obj)  # type: ignore[misc]  # of the ModelAdmin beside it
        return (*theirs, FIELD, *(field.name for field in self._ours() if field.name not in theirs))

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """The app's queryset, without those of our columns that Django would save and the list does not show."""
        found: QuerySet[Any] = super().get_queryset(request)  # type: ignore[misc]
        shown = self.get_list_display(request)  # type: ignore[attr-defined]  # one statement a row would load them
        return found.defer(*(field.name for field in self._ours() if not field.generated and field.name not in shown))

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> Any:
        """The user of an admin page, whom its form may save."""
        return self._unloaded(super().get_object(request, object_id, from_field))  # type: ignore[misc]

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: Any) -> None:
        """Save as the app does, without our columns."""
        super().save_model(request, self._unloaded(obj) if change else obj, form, change)  # type: ignore[misc]

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> list[Any]:
        """The app's fieldsets, and the ledger below them, except for a new user."""
        theirs = super().get_fieldsets(request, obj)  # type: ignore[misc]
        kept = [
            (title, {**options, "fields": tuple(name for name in options["fields"] if name != FIELD)})
            for title, options in theirs
        ]
        return kept if obj is None else [*kept, ("Credits", {"fields": (FIELD,)})]

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """False for a user with rows in the ledger."""
        allowed = bool(super().has_delete_permission(request, obj))  # type: ignore[misc]
        if not allowed or obj is None:
            return allowed
        rows = self.billing.ledger.history(self.billing.connection, self.user_key(obj), limit=1, include_failed=True)
        return not rows

    def get_actions(self, request: HttpRequest) -> dict[str, Any]:
        """The actions without "delete selected", which does not check single users."""
        theirs: dict[str, Any] = super().get_actions(request)  # type: ignore[misc]
        return {name: action for name, action in theirs.items() if name != "delete_selected"}

    def _ours(self) -> list[Any]:
        """The model's fields for columns that only the ledger's functions write."""
        columns = Schema.of(self.billing.ledger.config.host).users.c
        written = {columns[key].name for key in OURS}
        model: Any = self.model  # type: ignore[attr-defined]
        return [field for field in model._meta.concrete_fields if field.column in written]  # noqa: SLF001 - documented

    def _unloaded(self, user: Any) -> Any:
        """``user`` with our columns marked as not loaded, since Django saves those that are."""
        if isinstance(user, Model):
            for field in self._ours():
                if not field.generated:  # Django does not save it
                    user.__dict__.pop(field.attname, None)
        return user


OURS = ("credit_balance", "credit_sequence", "credit_held", "credit_due_at", "stripe_customer_id")
