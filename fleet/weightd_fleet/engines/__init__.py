"""What a fleet has from the system that runs it: nodes, actors and requests of Ray; labels of nodes in Kubernetes."""
