"""The weightd daemon: state, sockets and handles. Its loader children move the bytes."""

from weightd import __version__

__all__ = ["__version__"]
