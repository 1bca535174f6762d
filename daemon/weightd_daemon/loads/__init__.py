"""The daemon's side of loads: their waiters, their order, and the loader processes that execute them."""
