"""The pure core: what is held, by whom, where, and what may go. No I/O, no clock, no grpc, no device."""
