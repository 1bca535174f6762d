"""Map the daemon's memory into this process, one module per kind of device."""
