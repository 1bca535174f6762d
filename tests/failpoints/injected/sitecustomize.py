"""Python imports this at the start of every process that has this folder in PYTHONPATH: it arms the failpoints."""

import os

if os.environ.get("FAILPOINTS_ARMED_BY"):
    from failpoints.injection import install

    install(os.environ["FAILPOINTS_ARMED_BY"])
