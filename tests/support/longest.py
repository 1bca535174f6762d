"""The test files that take longest, the longest first: conftest.py begins with them.

Of files that it does not name, those with a test marked `slow` come first. Order is all that matters, so a list that is
somewhat out of date costs little. `pytest --durations=0 --durations-min=5` shows what takes long.
"""

from __future__ import annotations

LONGEST = (
    "tests/fault/test_driver_calls.py",
    "tests/integration/test_servers.py",
    "tests/integration/test_transformers.py",
    "tests/integration/test_lifetimes.py",
    "tests/integration/test_gpu.py",
    "tests/integration/test_sweep.py",
    "tests/systemd/test_driver_errors.py",
    "tests/systemd/test_survival.py",
    "tests/systemd/test_many.py",
    "tests/systemd/test_many_tensors.py",
    "tests/soak/test_soak.py",
    "tests/driver/test_gpu_probe.py",
    "tests/driver/test_gpu_day.py",
    "tests/integration/test_command.py",
    "tests/integration/test_capacity.py",
    "tests/integration/test_diffusers.py",
    "tests/fuzz/test_message_mutations.py",
)
