"""What runs the service of a fleet, a room for each engine: who the nodes are, and how drivers reach the catalogue."""
