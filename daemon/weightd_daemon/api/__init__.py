"""The gRPC API: the services, whose call it is, and how errors are sent."""
