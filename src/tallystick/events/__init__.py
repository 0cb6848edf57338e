"""Events: switching them on and off, and following them.

``tallystick.events.deliver`` sends them to webhooks, which needs the extra ``events``. The feed itself is
``Ledger.events``.
"""

from tallystick.events.follow import follow
from tallystick.events.switch import EventsStatus, disable, enable, prune, status

__all__ = ["EventsStatus", "disable", "enable", "follow", "prune", "status"]
