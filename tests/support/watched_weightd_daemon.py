"""`python -m support.watched_weightd_daemon serve …`: a daemon whose loop is watched (support/loop_watch.py).

Tests know a daemon by `weightd_daemon` in its command line, so this module has it in its name. With `--forks` it is a
template of such daemons (support/template.py).
"""

from __future__ import annotations

import sys

from support import loop_watch, template
from weightd_daemon.__main__ import main


def serve() -> None:
    """Be a daemon with the arguments of this process, to its end."""
    loop_watch.install()
    sys.exit(main())


if __name__ == "__main__":
    if (line := template.line_of(sys.argv[1:])) is None:
        serve()
    else:
        template.serve(line, serve, ())
