"""Loading: the child process that moves bytes (child, copying, …) and the daemon's side of it (process, load, …)."""
