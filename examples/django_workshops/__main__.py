"""Start the example: an embedded PostgreSQL, the Stripe double, the app. Nothing outside this folder is touched."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from django.core.servers.basehttp import ThreadedWSGIServer, WSGIRequestHandler
from django.core.wsgi import get_wsgi_application

from django_workshops.settings import prepare
from tallystick.dev.postgres import Server
from tallystick.dev.stripe import DevStripe


def listening(port: int = 0) -> ThreadedWSGIServer:
    """Django's server for development, on a port of its own if none is given."""
    return ThreadedWSGIServer(("127.0.0.1", port), WSGIRequestHandler)


def main() -> None:
    """Run until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m django_workshops", description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    port = parser.parse_args().port
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    folder = Path(tempfile.mkdtemp(prefix="tallystick-example-"))
    folder.chmod(0o711)  # root's server runs as another account and has to reach it
    try:
        with suppress(KeyboardInterrupt), Server(folder) as server, DevStripe() as double, listening(port) as site:
            origin = f"http://127.0.0.1:{port}"
            prepare(server.create_database("workshops"), origin, double)
            site.set_app(get_wsgi_application())
            print(f"Workshops: {origin}   (the Stripe double: {double.url}; stop with Ctrl-C)")
            site.serve_forever()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
