"""The app's addresses, and Tallystick's under /billing."""

from __future__ import annotations

from django.contrib import admin
from django.urls import include, path
from django.views.static import serve

from django_workshops import views
from django_workshops.billing import billing
from tallystick.web.django import urls
from workshops.app import HERE

urlpatterns = [
    path("", views.workshops, name="workshops"),
    path("workshops/<int:workshop>/steps/<int:step>", views.free_step, name="step"),
    path("workshops/<int:workshop>/summary", views.summary, name="summary"),
    path("sign-in", views.sign_in, name="sign-in"),
    path("sign-out", views.sign_out, name="sign-out"),
    path("static/<path:path>", serve, {"document_root": HERE / "static"}),
    path("billing/", include(urls(billing))),
    path("admin/", admin.site.urls),
]
