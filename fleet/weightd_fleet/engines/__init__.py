"""What a fleet has from the system that runs it: nodes of Ray, nodes of Kubernetes."""
