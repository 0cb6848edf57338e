"""``python -m tallystick``: the command line, where its script is not on the PATH."""

from tallystick.cli import main

main()
