"""``python -m pp_to_vpp``."""

from __future__ import annotations

import sys


def main() -> int:
    """Entry point of the program and the console script."""
    from .cli import main as command_line  # workers that spawn do not need it

    return command_line(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
