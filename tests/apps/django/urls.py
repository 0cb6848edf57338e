from django.urls import path
from shop.views import unlock

urlpatterns = [path("workshops/<int:workshop_id>/unlock", unlock)]
