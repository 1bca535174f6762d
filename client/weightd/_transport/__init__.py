"""The connection between a client and its daemon: address, handle socket, gRPC, and messages as plain values."""
