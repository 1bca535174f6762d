"""Operation of the daemon: sockets, preloads, reloads, drains, and notifications to the service manager."""
