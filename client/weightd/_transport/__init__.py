"""Between a client and its daemon: where it listens, the handle socket, gRPC, and messages as plain values."""
