"""`python -m weightd`: the same as the `weightd` command."""

from __future__ import annotations

import sys

from weightd.cli import main

if __name__ == "__main__":
    sys.exit(main())
