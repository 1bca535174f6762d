"""A daemon whose segments are of another size. For bench/gpu.py; not for use.

`BYTES serve …` runs the daemon; `BYTES --loader …` runs one of its loaders.
"""

from __future__ import annotations

import sys

from weightd_daemon.core import memory

if __name__ == "__main__":
    memory.SEGMENT_BYTES = int(sys.argv[1])
    # Imported after that: they take the size over.
    from weightd_daemon.__main__ import main as serve
    from weightd_daemon.loader.job import main as load

    if sys.argv[2] == "--loader":
        sys.exit(load(sys.argv[3:]))
    sys.exit(serve(sys.argv[2:], loader_argv=[sys.executable, "-P", __file__, sys.argv[1], "--loader"]))
