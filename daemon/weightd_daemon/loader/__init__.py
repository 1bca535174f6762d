"""Loading: the child process that moves bytes (child, copying, hashing …) and the daemon's side of it (process, load)."""
