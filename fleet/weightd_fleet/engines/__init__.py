"""What a fleet has from the system that runs it: Ray hosts its service and names its nodes, Kubernetes labels nodes."""
