"""The handle socket: who is connected, what a client attaches, and the descriptors and leases that it gets."""
