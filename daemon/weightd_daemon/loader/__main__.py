"""Entry point of the loader process: `python -m weightd_daemon.loader CONTROL DESCRIPTORS PARENT`."""

import sys

from .job import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
