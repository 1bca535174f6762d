"""The gRPC API: its services, the identity of callers, and the encoding of errors."""
