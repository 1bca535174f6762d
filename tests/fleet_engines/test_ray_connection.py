"""What is wrong with the settings of a catalogue is said before a cluster is asked."""

from __future__ import annotations

import pytest

from weightd.errors import DaemonUnreachableError, InvalidReferenceError
from weightd_fleet.engines.ray_connection import connect_catalogue, restart_catalogue

NOBODY = "127.0.0.1:1"


@pytest.mark.parametrize("said", ["tls", "./tls", "~/tls"])
def test_a_relative_tls_folder_is_refused(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalogue would look for it in a folder of Ray's."""
    with pytest.raises(InvalidReferenceError, match=f"^{said}: is relative"):
        connect_catalogue(NOBODY, tls_dir=said)
    with pytest.raises(InvalidReferenceError, match=f"^{said}: is relative"):
        restart_catalogue(NOBODY, port=None, tls_dir=said)
    monkeypatch.setenv("WEIGHTD_FLEET_TLS_DIR", said)
    with pytest.raises(InvalidReferenceError, match=f"^{said}: is relative"):
        connect_catalogue(NOBODY)
    with pytest.raises(DaemonUnreachableError):
        connect_catalogue(NOBODY, start_it=False)  # starts nothing with it


def test_an_absolute_tls_folder_is_taken() -> None:
    for start_it in (True, False):
        with pytest.raises(DaemonUnreachableError):
            connect_catalogue(NOBODY, tls_dir="/tls", start_it=start_it)
