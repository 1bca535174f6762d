"""Running the daemon: its sockets, preloads, reloads, drains, and what the service manager is told."""
