"""`python -m support.watched_weightd_daemon serve …`: a daemon whose loop is watched (support/loop_watch.py).

Tests know a daemon by `weightd_daemon` in its command line, so this module has it in its name.
"""

from __future__ import annotations

import sys

from support import loop_watch
from weightd_daemon.__main__ import main

if __name__ == "__main__":
    loop_watch.install()
    sys.exit(main())
