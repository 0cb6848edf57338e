"""Run the double alone: ``python -m tallystick.dev.stripe``. It prints the variables to set, and runs until Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading

from tallystick.dev.stripe.server import DevStripe


def main() -> None:
    """Run until interrupted. Its objects are gone afterwards."""
    parser = argparse.ArgumentParser(prog="python -m tallystick.dev.stripe", description=__doc__)
    parser.add_argument("--port", type=int, default=12111)
    with contextlib.suppress(KeyboardInterrupt), DevStripe(port=parser.parse_args().port) as double:
        sys.stdout.write(f"export STRIPE_SECRET_KEY={double.secret_key}\nexport STRIPE_API_BASE={double.url}\n")
        sys.stdout.flush()
        threading.Event().wait()


if __name__ == "__main__":
    main()
