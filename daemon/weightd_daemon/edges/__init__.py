"""The edges: sockets, kernel locks, files. They translate; they do not decide."""
