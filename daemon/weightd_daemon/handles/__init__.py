"""The handle socket: peers, attaches, and the descriptors and leases that clients receive."""
