"""The daemon's side of loads: who waits for which load, in which order, and the loader processes that do them."""
