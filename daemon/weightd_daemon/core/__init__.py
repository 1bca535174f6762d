"""The pure core: resident content, its holders, its placement, and its eviction. No I/O, clock, grpc or device."""
