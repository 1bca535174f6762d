"""The pure core of the fleet: manifests, atoms, the catalogue, placing. No I/O, clock, grpc or daemon."""
