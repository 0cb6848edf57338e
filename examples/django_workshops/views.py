"""The app's own pages. The last steps of a workshop are behind a credit."""

from __future__ import annotations

from django.contrib.auth import get_user_model, login, logout
from django.contrib.auth.decorators import login_required
from django.db import connection
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views import View
from django.views.decorators.http import require_POST

from django_workshops.billing import billing
from django_workshops.models import Workshop
from tallystick.web.django import OpenWorkshopMixin
from workshops.steps import FREE, STEPS


@login_required
def workshops(request: HttpRequest) -> HttpResponse:
    """Those of who is signed in; and a new one."""
    mine = Workshop.objects.filter(user=request.user)
    if request.method == "POST":
        made = mine.create(user=request.user, title=request.POST["title"])
        return redirect("step", workshop=made.pk, step=1)
    access = [(each, billing.ledger.access(connection, each.pk)) for each in mine.order_by("created_at")]
    return render(request, "django_workshops/workshops.html", {"workshops": access})


@login_required
def free_step(request: HttpRequest, workshop: int, step: int) -> HttpResponse:
    """One of the first steps; the others are shown by ``PaidStep``."""
    if step > FREE:
        return paid_step(request, workshop=workshop, step=step)
    return _step(request, workshop, step)


class PaidStep(OpenWorkshopMixin, View):
    """A step behind the credit."""

    billing = billing

    def get(self, request: HttpRequest, workshop: int, step: int) -> HttpResponse:
        """Show it."""
        return _step(request, workshop, step)


paid_step = PaidStep.as_view()


@billing.requires_open_workshop
def summary(_request: HttpRequest, workshop: int) -> HttpResponse:
    """All that was written down, as a text."""
    return HttpResponse(f"Workshop {workshop}", content_type="text/plain")


def sign_in(request: HttpRequest) -> HttpResponse:
    """By e-mail alone, since this is an example."""
    if request.method == "POST":
        email = request.POST["email"]
        user, _ = get_user_model().objects.get_or_create(username=email, defaults={"email": email})
        login(request, user, backend="django.contrib.auth.backends.ModelBackend")
        return redirect(billing.renderer.returning(request.POST.get("next")))
    return render(request, "django_workshops/sign_in.html", {"next": request.GET.get("next", "/")})


@require_POST
def sign_out(request: HttpRequest) -> HttpResponse:
    """And back to the door."""
    logout(request)
    return redirect("sign-in")


def _step(request: HttpRequest, workshop: int, step: int) -> HttpResponse:
    found = get_object_or_404(Workshop, pk=workshop, user=request.user)
    if not 1 <= step <= len(STEPS):
        raise Http404
    name, task = STEPS[step - 1]
    following = STEPS[step][0] if step < len(STEPS) else None
    shown = {"workshop": found, "step": step, "steps": len(STEPS), "name": name, "task": task, "following": following}
    return render(request, "django_workshops/step.html", shown)
