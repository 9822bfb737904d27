"""``python -m pp_to_vpp``."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Entry point of the program and the console script."""
    from .cli import INTERRUPTED
    from .cli import main as command_line  # workers that spawn do not need it

    status = command_line(sys.argv[1:])
    if status == INTERRUPTED:
        # Nothing is left to be done, and torch, where it was loaded, takes most of a second to go.
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
