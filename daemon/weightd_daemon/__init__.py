"""The weightd daemon: books, sockets and handles. It moves no bytes itself; its loader children do."""

from weightd import __version__

__all__ = ["__version__"]
